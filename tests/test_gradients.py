"""The gradient of the whole objective, on the real Megatron model, against a plain one-process float64 reference.

Not covered here: the transport of weights to the engine (test_vllm_engine), bf16, GPUs.
"""

from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor
from transformers import PreTrainedModel

from megatron_mcpo import parallel
from megatron_mcpo.algo.advantage import group_advantages
from megatron_mcpo.algo.contrastive import contrastive, info_nce
from megatron_mcpo.algo.pairing import find_pairs
from megatron_mcpo.algo.policy_loss import policy_loss
from megatron_mcpo.algo.surrogate import surrogate
from megatron_mcpo.batch import make_batch, rewards_of
from megatron_mcpo.config import Config
from megatron_mcpo.gather import gather_rows
from megatron_mcpo.layout import Layout
from megatron_mcpo.mcore.head import ContrastiveHead
from megatron_mcpo.mcore.policy import LossInput, Policy
from megatron_mcpo.model_config import from_folder
from megatron_mcpo.types import RolloutGroup, TrainBatch
from megatron_mcpo.weights.sync import export

SHARE, CONSOLIDATE, TAU, TOP_K, KL = 0.5, 0.3, 0.2, 2, 0.05
Case = tuple[Path, list[RolloutGroup], dict[str, Tensor]]
CLIP = dict(clip_low=0.2, clip_high=0.2, kl_weight=KL, importance_cap=2.0)
LAYOUTS = [
    Layout(),
    Layout(data=2),
    Layout(data=4),
    Layout(tensor=2),
    Layout(tensor=2, sequence=True),
    Layout(tensor=4, sequence=True),
    Layout(pipeline=2),
    Layout(pipeline=2, virtual_pipeline=2),
    Layout(pipeline=4),
    Layout(context=2),
    Layout(tensor=2, pipeline=2, sequence=True),
    Layout(tensor=2, data=2, sequence=True),
    Layout(tensor=2, context=2, sequence=True),
    Layout(pipeline=2, data=2),
    Layout(pipeline=2, context=2),
    Layout(pipeline=2, virtual_pipeline=2, data=2),
    Layout(tensor=2, pipeline=2, data=2, sequence=True),
    Layout(tensor=3, sequence=True),
    Layout(pipeline=3),
]
SHAPES = {
    2: {"num_layers": 4, "num_heads": 4, "num_kv_heads": 2},
    3: {"num_layers": 3, "num_heads": 9, "num_kv_heads": 3},
}
"""Models whose layers and heads can be divided by 2, and by 3."""


def noise(values: Tensor, seed: int) -> Tensor:
    """Off-policy log-probs: far enough that clips and caps are hit."""
    return values + 0.4 * torch.randn(values.shape, generator=torch.Generator().manual_seed(seed), dtype=values.dtype)


def step_logprobs(groups: list[RolloutGroup], seed: int) -> list[Tensor]:
    """Made-up log-probs of old policy or reference, a tensor a rollout, in the batch's order."""
    engine = [torch.tensor(c.logprobs, dtype=torch.float64) for group in groups for c in group.completions]
    return list(noise(torch.cat(engine), seed).split([len(e) for e in engine]))


def reference_gradients(model: PreTrainedModel, head_DH: Tensor, groups: list[RolloutGroup]) -> dict[str, Tensor]:
    """Autograd through a Hugging Face model in float64; no Megatron, no packing, no second pass."""
    model = model.double()
    head_DH = head_DH.double().requires_grad_()
    logp, z = [], []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([group.prompt.token_ids + completion.token_ids])
            start = len(group.prompt.token_ids)
            output = model(ids, output_hidden_states=True)
            log_probs = output.logits[0].log_softmax(-1)[start - 1 : -1]
            logp.append(log_probs.gather(1, ids[0, start:, None]).squeeze(1))
            pooled_H = output.hidden_states[-1][0, start:].mean(0)
            z.append(torch.nn.functional.normalize(head_DH @ pooled_H, dim=0))
    lens = [len(part) for part in logp]
    batch = make_batch(
        groups,
        group_advantages(rewards_of(groups)),
        pass_threshold=1.0,
        num_data_ranks=1,
        data_rank=0,
        share_prompts=False,
    )
    term = policy_loss(
        logp_R=torch.cat(logp),
        old_logp_R=torch.cat(step_logprobs(groups, 1)),
        ref_logp_R=torch.cat(step_logprobs(groups, 2)),
        engine_logp_R=batch.engine_logp_R.double(),
        advantages_R=batch.advantages_N.double().repeat_interleave(torch.tensor(lens)),
        num_tokens=sum(lens),
        **CLIP,
    )
    z_MD = torch.stack(z)
    pairs = find_pairs(z_MD, batch.keys, top_k=TOP_K)
    logits_MM = z_MD @ z_MD.T / TAU
    share, _ = info_nce(logits_MM, pairs.share_MM, pairs.negatives_M)
    consolidate, _ = info_nce(logits_MM, pairs.consolidate_MM, pairs.negatives_M)
    (term.loss + SHARE * share + CONSOLIDATE * consolidate).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**gradients, "contrastive_head": head_DH.grad}


def megatron_gradients(
    config: Config, layout: Layout, groups: list[RolloutGroup], share_prompts: bool
) -> dict[str, Tensor]:
    """The same on ranks: two passes, packed, through the pipeline."""
    ranks = parallel.init(layout, seed=0, timeout_seconds=60)
    policy = Policy(config, from_folder(Path(config.model.path)), ranks)
    batch = make_batch(
        groups,
        group_advantages(rewards_of(groups)),
        pass_threshold=1.0,
        num_data_ranks=layout.data,
        data_rank=ranks.data_rank,
        share_prompts=share_prompts and policy.shares_prompts,
    )
    z_ND = policy.score(batch).z_ND
    assert z_ND is not None
    contrast = contrastive(
        gather_rows(z_ND, batch, ranks),
        batch.keys,
        share_weight=SHARE,
        consolidate_weight=CONSOLIDATE,
        temperature=TAU,
        top_k=TOP_K,
    )
    grad_ND = contrast.grad_z_MD[batch.rows_N]
    old_R, ref_R = (own_rows(step_logprobs(groups, seed), batch) for seed in (1, 2))
    advantages_R = batch.advantages_N.repeat_interleave(batch.response_lens_N)

    def loss(x: LossInput) -> tuple[Tensor, dict[str, Tensor]]:
        r = x.response_r
        term = policy_loss(
            logp_R=x.logp_r,
            old_logp_R=old_R[r],
            ref_logp_R=ref_R[r],
            engine_logp_R=batch.engine_logp_R[r],
            advantages_R=advantages_R[r],
            num_tokens=batch.num_response_tokens,
            **CLIP,
        )
        assert x.z_nD is not None
        return term.loss + surrogate(x.z_nD, grad_ND[list(x.rollouts)]), term.metrics

    policy.backward(batch, loss)
    return exported_gradients(policy)


def own_rows(per_rollout: list[Tensor], batch: TrainBatch) -> Tensor:
    rows = batch.rows_N.tolist()
    return torch.cat([per_rollout[row] for row in rows]).float() if rows else torch.zeros(0)


def exported_gradients(policy: Policy) -> dict[str, Tensor]:
    """Gradients under the parameters' Hugging Face names: they take the parameters' place and are exported."""
    group = policy.groups.data_context
    head = torch.zeros(0)
    for chunk in policy.chunks:
        for buffer in chunk.buffers:
            for bucket in buffer.buckets:  # the distributed optimizer leaves each rank its own shard of the sum
                shards = bucket.grad_data.chunk(group.size())
                gathered = [torch.empty_like(shard) for shard in shards]
                dist.all_gather(gathered, shards[group.rank()].contiguous(), group=group)
                bucket.grad_data.copy_(torch.cat(gathered))
        for name, parameter in chunk.named_parameters():
            parameter.data.copy_(parameter.main_grad)
            if "contrastive_head" in name:
                head = parameter.data.clone()
    gradients = {name: tensor.clone() for name, tensor in export(policy.chunks, policy.model_config, policy.groups)}
    return {**gradients, "contrastive_head": head}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Case]:
    """A model of each shape, the same rollouts for both, and the gradients expected."""
    groups = tiny.rollout_groups(num_prompts=6, num_samples=3)
    head = ContrastiveHead(tiny.HIDDEN, 16, dtype=torch.float32, device=torch.device("cpu"), seed=0).weight.detach()
    found = {}
    for divisor, shape in SHAPES.items():
        folder = tmp_path_factory.mktemp("model")
        model = tiny.save_model(folder, tied=request.param, **shape)
        found[divisor] = folder, groups, reference_gradients(model, head, groups)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradient_equals_the_reference(cases: dict[int, Case], layout: Layout) -> None:
    folder, groups, expected = cases[3 if 3 in (layout.tensor, layout.pipeline) else 2]
    for max_tokens, share_prompts in ((64, False), (64, True), (4096, True)):
        limits = {"max_prompt_tokens": 32, "max_response_tokens": 16}
        config = tiny.config(folder, batch={"micro_batch_tokens": max_tokens}, rollout=limits)
        results = run_ranks(layout.world_size, megatron_gradients, config, layout, groups, share_prompts, timeout=60)
        last = next(result for result in results if result["contrastive_head"].numel())
        results[0]["contrastive_head"] = last["contrastive_head"]
        assert set(results[0]) == set(expected)
        for name, gradient in expected.items():
            error = (results[0][name].double() - gradient).abs().max() / gradient.abs().max()
            assert error <= 1e-5, (
                f"{name}: relative error {error:.2e} with micro-batches of {max_tokens} tokens, {share_prompts=}"
            )


def test_a_data_rank_without_a_rollout_takes_part(tmp_path: Path) -> None:
    """One group, two data-parallel ranks: shared prompts keep it on one of them, in a pipeline too."""
    model = tiny.save_model(tmp_path, tied=True)
    groups = tiny.rollout_groups(num_prompts=1, num_samples=3)
    head = ContrastiveHead(tiny.HIDDEN, 16, dtype=torch.float32, device=torch.device("cpu"), seed=0).weight.detach()
    expected = reference_gradients(model, head, groups)
    limits = {"max_prompt_tokens": 32, "max_response_tokens": 16}
    config = tiny.config(tmp_path, batch={"micro_batch_tokens": 64}, rollout=limits)
    for layout in (Layout(data=2), Layout(pipeline=2, data=2)):
        found = run_ranks(layout.world_size, megatron_gradients, config, layout, groups, True, timeout=60)[0]
        for name in expected.keys() - {"contrastive_head"}:
            error = (found[name].double() - expected[name]).abs().max() / expected[name].abs().max()
            assert error <= 1e-5, f"{name}: relative error {error:.2e} with {layout}"
