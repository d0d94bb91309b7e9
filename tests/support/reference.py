"""Compute the objective plainly, with dense matrices and autograd in one process, to compare the trainer with.

It shares no line with megatron_mcpo.algo. Memory is O(M^2). Shape legend: see megatron_mcpo.types.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.schema import AdvantageKind, AlgorithmConfig, ContrastiveConfig
from megatron_mcpo.types import RolloutGroup, RolloutLabels


def gradients(
    model: nn.Module,
    head: Mapping[str, Tensor],
    groups: Sequence[RolloutGroup],
    old_logp: Sequence[Tensor],
    ref_logp: Sequence[Tensor],
    config: Config,
) -> dict[str, Tensor]:
    """Return the gradient of the whole objective for every parameter: autograd in float64, one rollout at a time.

    model: a Hugging Face causal model; it is left in float64
    head: `weight` [D, H] and, for an mlp, `hidden_weight` [H, H]; empty without a contrastive term
    old_logp, ref_logp: log-probs of every rollout's tokens
    Returns the gradients under the names of the model's parameters, those of the head as contrastive_head.NAME.
    """
    model = model.double()
    head = {name: weight.detach().double().requires_grad_() for name, weight in head.items()}
    rollouts = [(group.prompt, completion) for group in groups for completion in group.completions]
    results = []
    for prompt, completion in rollouts:
        with imposed(model, completion.experts):
            results.append(_evaluate(model, head, prompt.token_ids, completion.token_ids, config))
    rewards = [torch.tensor(group.rewards, dtype=torch.float64) for group in groups]
    contrast = torch.zeros((), dtype=torch.float64)
    if head:
        z_MD, labels, used_M = representations(torch.stack([y_D for _, y_D in results]), _labels(groups), config)
        contrast = contrastive_loss(z_MD, labels, config.contrastive)
        if config.contrastive.mode == "reward":
            penalty_M = torch.zeros(len(used_M), dtype=torch.float64)
            penalty_M[used_M] = reward_penalty(z_MD, labels, config.contrastive)
            penalties = penalty_M.split([len(r) for r in rewards])
            rewards = [r + penalty for r, penalty in zip(rewards, penalties, strict=True)]
    policy = policy_term(
        [logp_r for logp_r, _ in results],
        old_logp,
        [torch.tensor(c.logprobs) for group in groups for c in group.completions],
        ref_logp,
        advantages(rewards, [group.prompt.domain for group in groups], config.algorithm.advantage),
        config.algorithm,
        longest=config.rollout.max_response_tokens,
    )
    named = dict(model.named_parameters()) | {f"contrastive_head.{name}": weight for name, weight in head.items()}
    found = torch.autograd.grad(policy + contrast, list(named.values()))
    return dict(zip(named, found, strict=True))


def representations(y_MD: Tensor, labels: RolloutLabels, config: Config) -> tuple[Tensor, RolloutLabels, Tensor]:
    """Return unit vectors of the rollouts that take part, their labels, and which ones these are (bool [M]).

    y_MD: the head's output before it is scaled
    """
    if config.contrastive.center == "off":
        return F.normalize(y_MD, dim=1), labels, torch.ones(len(labels), dtype=torch.bool)
    rows, used = [], []
    for prompt, y_D in zip(labels.prompt_M.tolist(), y_MD, strict=True):
        mine_M = labels.prompt_M == prompt
        rows.append(F.normalize(y_D - y_MD[mine_M].mean(0), dim=0))
        used.append(len(set(labels.correct_M[mine_M].tolist())) == 2)
    used_M = torch.tensor(used)
    kept = RolloutLabels(
        domain_M=labels.domain_M[used_M], prompt_M=labels.prompt_M[used_M], correct_M=labels.correct_M[used_M]
    )
    return torch.stack(rows)[used_M], kept, used_M


def policy_term(
    logp: Sequence[Tensor],
    old_logp: Sequence[Tensor],
    engine_logp: Sequence[Tensor],
    ref_logp: Sequence[Tensor],
    advantages: Sequence[float],
    settings: AlgorithmConfig,
    *,
    longest: int,
) -> Tensor:
    """Return the clipped ratio with importance weights, plus the KL estimate to the reference; a tensor per rollout.

    longest: the most tokens that a response may have, the denominator of `dr_grpo`
    """
    assert settings.importance != "off"
    sums, means = [], []
    for new, old, engine, ref, advantage in zip(logp, old_logp, engine_logp, ref_logp, advantages, strict=True):
        ratio = (new - old.double()).exp()
        if settings.clip == "gspo":
            ratio = (new - old.double()).mean().exp().expand_as(new)
        clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
        gain = torch.minimum(ratio * advantage, clipped * advantage)
        if settings.clip == "cispo":
            gain = clipped.detach() * advantage * new
        weight = (old.double() - engine.double()).exp()
        if settings.importance == "mask":
            weight = weight * ((weight >= settings.importance_floor) & (weight <= settings.importance_cap))
        weight = weight.clamp(max=settings.importance_cap)
        towards = ref.double() - new
        kl = {"k2": towards.square() / 2, "k3": towards.exp() - 1 - towards}[settings.kl_estimator]
        token = -weight * gain + settings.kl_weight * kl
        sums.append(token.sum())
        means.append(token.sum() / max(1, len(new)))
    total = torch.stack(sums).sum()
    if settings.aggregation == "token_mean":
        return total / sum(len(new) for new in logp)
    if settings.aggregation == "dr_grpo":
        return total / (len(logp) * longest)
    return torch.stack(means).mean()


def contrastive_loss(z_MD: Tensor, labels: RolloutLabels, settings: ContrastiveConfig) -> Tensor:
    """Return cross_domain_weight * L_cross_domain + in_domain_weight * L_in_domain, with a graph to z."""
    cross_domain, _ = cross_domain_term(z_MD, labels, settings)
    in_domain, _ = in_domain_term(z_MD, labels, settings)
    return settings.cross_domain_weight * cross_domain + settings.in_domain_weight * in_domain


def reward_penalty(z_MD: Tensor, labels: RolloutLabels, settings: ContrastiveConfig) -> Tensor:
    """Return max(-(cross_domain_weight * L_cross_domain(i) + in_domain_weight * L_in_domain(i)), -0.5) [M]."""
    cross_domain_M, _ = _cross_domain_costs(z_MD.detach(), labels, settings)
    in_domain_M, _ = _in_domain_costs(z_MD.detach(), labels, settings)
    return (-settings.cross_domain_weight * cross_domain_M - settings.in_domain_weight * in_domain_M).clamp(min=-0.5)


def cross_domain_term(z_MD: Tensor, labels: RolloutLabels, settings: ContrastiveConfig) -> tuple[Tensor, Tensor]:
    """Return L_cross_domain, and which rollouts are its anchors."""
    return _mean(*_cross_domain_costs(z_MD, labels, settings))


def in_domain_term(z_MD: Tensor, labels: RolloutLabels, settings: ContrastiveConfig) -> tuple[Tensor, Tensor]:
    """Return L_in_domain, and which rollouts are its anchors."""
    return _mean(*_in_domain_costs(z_MD, labels, settings))


def cross_domain_positives(z_MD: Tensor, labels: RolloutLabels, settings: ContrastiveConfig) -> Tensor:
    """Return C(i) as rows of a matrix [M, M]."""
    candidates = _correct_pairs(labels) & ~_same(labels.domain_M)
    similarity = (z_MD @ z_MD.T).detach()
    if settings.transfer == "all":
        return candidates
    if settings.transfer == "threshold":
        return candidates & (similarity >= settings.threshold)
    chosen = torch.zeros_like(candidates)
    for domain in labels.domain_M.unique():
        inside = candidates & (labels.domain_M == domain)
        ranking = similarity.masked_fill(~inside, -torch.inf).argsort(dim=1, descending=True, stable=True)
        chosen |= torch.zeros_like(candidates).scatter_(1, ranking[:, : settings.top_k], True) & inside
    return chosen


def negatives(labels: RolloutLabels, settings: ContrastiveConfig) -> Tensor:
    """Return M(i) as rows of a matrix [M, M]."""
    return _scope(labels, settings) & ~labels.correct_M


def rivals(labels: RolloutLabels, settings: ContrastiveConfig) -> Tensor:
    """Return the rollouts that the positives of i compete with, as rows of a matrix [M, M]."""
    if settings.denominator == "negatives":
        return negatives(labels, settings)
    return _scope(labels, settings).fill_diagonal_(False)


def _scope(labels: RolloutLabels, settings: ContrastiveConfig) -> Tensor:
    if settings.negatives == "pool":
        return labels.correct_M.new_ones(len(labels), len(labels))
    return _same(labels.domain_M if settings.negatives == "domain" else labels.prompt_M)


def _cross_domain_costs(z_MD: Tensor, labels: RolloutLabels, settings: ContrastiveConfig) -> tuple[Tensor, Tensor]:
    candidates = _correct_pairs(labels) & ~_same(labels.domain_M)
    return _info_nce(z_MD, cross_domain_positives(z_MD, labels, settings), candidates, labels, settings)


def _in_domain_costs(z_MD: Tensor, labels: RolloutLabels, settings: ContrastiveConfig) -> tuple[Tensor, Tensor]:
    same = _same(labels.domain_M if settings.in_domain_scope == "domain" else labels.prompt_M)
    positives = same & _correct_pairs(labels)
    positives.fill_diagonal_(False)
    if settings.in_domain_loss == "infonce":
        return _info_nce(z_MD, positives, positives, labels, settings)
    distances = ((1 - z_MD @ z_MD.T) * positives).sum(1) / positives.sum(1).clamp(min=1)
    return distances, positives.any(1)


def _info_nce(
    z_MD: Tensor, positives: Tensor, candidates: Tensor, labels: RolloutLabels, settings: ContrastiveConfig
) -> tuple[Tensor, Tensor]:
    """Return the term of every anchor [M], 0 for all others, and which rollouts are anchors.

    candidates: the pairs that the positives were chosen from; an anchor needs a rival besides them
    """
    logits = z_MD @ z_MD.T / settings.temperature
    against = rivals(labels, settings)
    anchors = positives.any(1) & (against & ~candidates).any(1)
    logits, positives, against = logits[anchors], positives[anchors], against[anchors]
    others = logits.masked_fill(~against, -torch.inf).logsumexp(1, keepdim=True)
    whole = torch.logaddexp(others.expand_as(logits), logits)
    if settings.denominator == "all":
        whole = torch.where(against, others, whole)  # a positive among the rivals is not counted twice
    costs = torch.where(positives, whole - logits, 0.0).sum(1) / positives.sum(1)
    return z_MD.new_zeros(len(labels)).masked_scatter(anchors, costs), anchors


def _mean(cost_M: Tensor, anchors_M: Tensor) -> tuple[Tensor, Tensor]:
    return cost_M.sum() / anchors_M.sum().clamp(min=1), anchors_M


def _same(group_M: Tensor) -> Tensor:
    return group_M[:, None] == group_M


def _correct_pairs(labels: RolloutLabels) -> Tensor:
    return labels.correct_M[:, None] & labels.correct_M


@contextmanager
def imposed(model: nn.Module, experts_tXK: Tensor | None) -> Iterator[None]:
    """Give the tokens of one rollout these experts, in a Qwen3-MoE of transformers; the last token's router chooses.

    A token's weights of its experts are those that the router gives them, scaled to a sum of 1.
    """

    def impose(layer: int) -> Callable[..., Any]:
        def hook(_router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            assert experts_tXK is not None
            logits_tE, weights_tK, chosen_tK = output
            chosen_tK = torch.cat([experts_tXK[:, layer].long(), chosen_tK[-1:]])
            found_tK = logits_tE.softmax(-1).gather(1, chosen_tK)
            return logits_tE, (found_tK / found_tK.sum(-1, keepdim=True)).to(weights_tK.dtype), chosen_tK

        return hook

    layers: Any = () if experts_tXK is None else model.get_submodule("model.layers")
    handles = [layer.mlp.gate.register_forward_hook(impose(number)) for number, layer in enumerate(layers)]
    yield
    for handle in handles:
        handle.remove()


def _evaluate(
    model: nn.Module, head: Mapping[str, Tensor], prompt: Sequence[int], response: Sequence[int], config: Config
) -> tuple[Tensor, Tensor]:
    """Return log-probs of a response's tokens and, with a head, its output [D] before it is scaled."""
    ids, start = torch.tensor([[*prompt, *response]]), len(prompt)
    output = model(ids, output_hidden_states=True)
    log_probs = (output.logits[0, start - 1 : -1] / config.rollout.temperature).log_softmax(-1)
    logp_r = log_probs.gather(1, ids[0, start:, None]).squeeze(1)
    if not head:
        return logp_r, torch.zeros(0)
    hidden_rH = output.hidden_states[-1][0, start:]  # behind the final norm
    pooled_rH = hidden_rH[-1:] if config.contrastive.pool == "last" else hidden_rH
    features_H = pooled_rH.sum(0) / max(1, len(pooled_rH))  # 0 of an empty response
    if config.contrastive.mode == "reward":
        features_H = features_H.detach()
    if "hidden_weight" in head:
        features_H = F.gelu(head["hidden_weight"] @ features_H)
    return logp_r, head["weight"] @ features_H


def _labels(groups: Sequence[RolloutGroup]) -> RolloutLabels:
    rollouts = [(number, group, correct) for number, group in enumerate(groups) for correct in group.correct]
    return RolloutLabels(
        domain_M=torch.tensor([group.prompt.domain for _, group, _ in rollouts]),
        prompt_M=torch.tensor([number for number, _, _ in rollouts]),
        correct_M=torch.tensor([correct for _, _, correct in rollouts]),
    )


def advantages(rewards: Sequence[Tensor], domains: Sequence[int], kind: AdvantageKind) -> list[float]:
    """Return reward minus the prompt's mean, divided as `settings.advantage` says; 0 if all rewards are equal."""
    centred = [r - r.mean() if len(set(r.tolist())) > 1 else torch.zeros_like(r) for r in rewards]
    found = []
    for r, own, domain in zip(rewards, centred, domains, strict=True):
        match kind:
            case "dr_grpo":
                found += own.tolist()
            case "grpo":
                found += (own / (r.std() + 1e-6)).tolist()
            case "rloo":
                others = (r.sum() - r) / (len(r) - 1)
                found += torch.where(own != 0, r - others, 0.0).tolist()
            case "per_domain":
                whole = torch.cat([c for c, d in zip(centred, domains, strict=True) if d == domain])
                found += (own / (whole.square().mean().sqrt() + 1e-6)).tolist()
    return found
