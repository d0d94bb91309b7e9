"""List every metric of a run, with its meaning, its chance level or target, and the function that computes it.

`SECTIONS` describes metrics.jsonl, `EVALUATION` describes eval.jsonl; docs/metrics.md is generated from both. A metric
without a function is supplied by the module that measures it.
"""

import statistics

from megatron_mcpo.reporting.metric import Metric, Section
from megatron_mcpo.reporting.metric_table_work import AHEAD, EXPERTS, WORK
from megatron_mcpo.reporting.selection import (
    anchors,
    domain_mean_reward,
    largest_mismatch,
    mean,
    mean_positives,
)
from megatron_mcpo.types import StopReason

_SAMPLED = Section(
    title="Sampled rollouts",
    about="All rollouts of the step, also those that dynamic sampling then replaced. Groups whose verifier failed "
    "count as errors and nowhere else. A mean over nothing is null.",
    metrics=(
        Metric(
            keys=("reward/<domain>",),
            meaning="Mean reward over rollouts.",
            target="Rises. The chance level is that of guessing an answer of the domain.",
            compute=lambda rollouts: mean([r for g in rollouts.scored for r in g.rewards]),
        ),
        Metric(
            keys=("reward/mean",),
            meaning="Mean of the domains' rewards, each domain counting the same; null when one of them is.",
            target="Rises.",
            compute=domain_mean_reward,
        ),
        Metric(
            keys=("reward_std/<domain>",),
            meaning="Standard deviation of the rewards within a group (divided by G), averaged over groups.",
            target="Above 0: a group of equal rewards has no advantage.",
            compute=lambda rollouts: mean([statistics.pstdev(g.rewards) for g in rollouts.scored]),
        ),
        Metric(
            keys=("pass_rate/<domain>",),
            meaning="Share of rollouts whose answer is correct, whatever penalties their reward has.",
            target="Rises.",
            compute=lambda rollouts: mean([c for g in rollouts.scored for c in g.correct]),
        ),
        Metric(
            keys=("all_right/<domain>",),
            meaning="Share of groups in which every rollout is correct.",
            target="Near 1 the domain is too easy to learn from.",
            compute=lambda rollouts: mean([all(g.correct) for g in rollouts.scored]),
        ),
        Metric(
            keys=("all_wrong/<domain>",),
            meaning="Share of groups in which every rollout is incorrect.",
            target="Near 1 the domain is too hard to learn from.",
            compute=lambda rollouts: mean([not any(g.correct) for g in rollouts.scored]),
        ),
        Metric(
            keys=("nonzero_advantage", "nonzero_advantage/<domain>"),
            meaning="Share of groups whose rewards differ; only these have an advantage that is not 0.",
            target="Well above 0; at 0 the policy term learns nothing.",
            compute=lambda rollouts: mean([g.has_nonzero_advantage for g in rollouts.scored]),
        ),
        Metric(
            keys=("response_tokens", "response_tokens/<domain>"),
            meaning="Mean number of tokens per response.",
            compute=lambda rollouts: mean([outline.num_tokens for outline in rollouts.outlines]),
        ),
        Metric(
            keys=("truncated", "truncated/<domain>"),
            meaning="Share of rollouts that reached the response limit.",
            target="Near 0; else raise rollout.max_response_tokens.",
            compute=lambda rollouts: mean([outline.stop_reason is StopReason.LENGTH for outline in rollouts.outlines]),
        ),
        Metric(
            keys=("groups/errors", "errors/<domain>"),
            meaning="Number of groups whose verifier failed.",
            target="0. A run stops above rewards.max_error_rate.",
            compute=lambda rollouts: float(len(rollouts.sampled) - len(rollouts.scored)),
        ),
        Metric(
            keys=("timeouts/<domain>",),
            meaning="Number of the failed groups whose verifier took too long.",
            target="0.",
            compute=lambda rollouts: float(sum(g.timed_out for g in rollouts.sampled)),
        ),
    ),
)

_TRAINED = Section(
    title="Rollouts that are trained on",
    about="Measured with the weights that sampled them, before the update. Means are over response tokens, in nats.",
    metrics=(
        Metric(
            keys=("entropy", "entropy/<domain>"),
            meaning="Entropy of the policy per token.",
            target="Falls slowly; a fall to 0 is a collapse. The highest possible value is log(vocabulary size).",
            compute=lambda rollouts: rollouts.token_mean(0),
        ),
        Metric(
            keys=("kl", "kl/<domain>"),
            meaning="k3 estimate of KL(policy || reference); 0 without a reference.",
            target="0 in step 1, then grows slowly.",
            compute=lambda rollouts: rollouts.token_mean(1),
        ),
        Metric(
            keys=("engine/logprob_diff_mean", "engine/logprob_diff/<domain>"),
            meaning="Mismatch of trainer and engine: mean of |log-prob in the trainer - log-prob in the engine| of the "
            "sampled tokens.",
            target="What rounding gives: below 1e-4 in fp32, 0.02 to 0.06 in bf16 for the model of the quick start. "
            "The tolerance of the engine check is 1e-4 in fp32, 0.05 in bf16 and 0.35 with an FP8 engine; above it all "
            "weights are compared, and above four times the tolerance the run stops. With engine.staleness it is "
            "mostly what was learned since the tokens were sampled; only the engine check then compares equal weights.",
            compute=lambda rollouts: rollouts.token_mean(2),
        ),
        Metric(
            keys=("engine/logprob_diff_max",),
            meaning="The largest of these differences.",
            compute=largest_mismatch,
        ),
    ),
)

_UPDATES = Section(
    title="Updates",
    about="Means over the optimizer steps of a step. A metric of the policy loss is a mean over response tokens.",
    metrics=(
        Metric(keys=("loss/policy",), meaning="Policy term of the loss.", target="Near 0: its sign has no meaning."),
        Metric(
            keys=("loss/kl",), meaning="KL term of the loss, with algorithm.kl_weight.", target="Small and positive."
        ),
        Metric(
            keys=("loss/cross_domain", "loss/in_domain"),
            meaning="Contrastive terms without their weights: means over their anchors, left out without one.",
            target="Below the chance level log(1 + contrast/negatives), which equal similarities give; with "
            "in_domain_loss = 'align' the chance level of loss/in_domain is 1.",
        ),
        Metric(
            keys=("clip_fraction",),
            meaning="Share of tokens whose ratio was replaced by the clip.",
            target="0 with one optimizer step per batch; with several, up to some per cent.",
        ),
        Metric(
            keys=("ratio",),
            meaning="Probability ratio policy / old policy (of the whole rollout with clip = 'gspo').",
            target="1 with one optimizer step per batch.",
        ),
        Metric(
            keys=("importance/weight",),
            meaning="Importance weight for the mismatch of engine and trainer; 1 where it is off.",
            target="Near 1.",
        ),
        Metric(
            keys=("importance/capped",),
            meaning="Share of tokens whose importance weight is the cap or, with mask and reject, 0.",
            target="Near 0.",
        ),
        Metric(
            keys=("importance/effective",),
            meaning="Effective sample size of the importance weights as a share of the n tokens, "
            "(sum w)^2 / (n sum w^2).",
            target="Near 1; what is missing to 1 is lost to the mismatch and to old rollouts.",
        ),
        Metric(
            keys=("grad_norm",),
            meaning="Norm of the gradient before it is clipped; null where the update was skipped.",
            target="Steady; single peaks are clipped to optimizer.clip_grad.",
        ),
        Metric(
            keys=("lr", "head_lr"),
            meaning="Learning rates of the model and of the contrastive head; 0 where the update was skipped, and "
            "without a head.",
        ),
        Metric(
            keys=("update/applied",),
            meaning="0 where the gradient was not finite, so that the update was skipped; else 1.",
            target="1.",
        ),
    ),
)

_PAIRS = Section(
    title="Contrastive pairs",
    about="Left out when both contrastive terms are off. Means over the optimizer steps that have such a pair.",
    metrics=(
        Metric(
            keys=(
                *("contrast/gain_cross_domain", "contrast/gain_cross_domain/<domain>"),
                *("contrast/gain_in_domain", "contrast/gain_in_domain/<domain>"),
            ),
            meaning="How far a term is below its chance level, log(1 + contrast/negatives) - the loss of an anchor, in "
            "nats, mean over anchors; with in_domain_loss = 'align' 1 - the loss. Left out without an anchor.",
            target="Above 0 once the head has learned; the chance level is 0.",
        ),
        Metric(
            keys=("contrast/auc_cross_domain", "contrast/auc_cross_domain/<domain>"),
            meaning="Ranking across domains: the probability that a correct rollout is closer to a correct rollout of "
            "another domain than to an incorrect rollout of any domain, mean over correct rollouts. Left out without "
            "such a pair.",
            target="Rises above the chance level 0.5.",
        ),
        Metric(
            keys=("contrast/auc_other_domains", "contrast/auc_other_domains/<domain>"),
            meaning="The same against incorrect rollouts of other domains only, where no question or domain is shared.",
            target="Rises above the chance level 0.5.",
        ),
        Metric(
            keys=("contrast/auc_own_prompt", "contrast/auc_own_prompt/<domain>"),
            meaning="The same against incorrect rollouts of the same prompt only, which share the question.",
            target="The chance level is 0.5; lower where representations show the question rather than its solution.",
        ),
        Metric(
            keys=("contrast/anchors_cross_domain", "contrast/anchors_in_domain"),
            meaning="Number of anchors of each term; 0 when the terms are off.",
            target="Above 0; an anchor is a correct rollout with a positive and something to tell it from.",
        ),
        Metric(
            keys=("contrast/anchors/<domain>",),
            meaning="Number of the domain's rollouts that are an anchor of either term.",
            target="Above 0.",
            compute=anchors,
        ),
        Metric(
            keys=("contrast/positives_cross_domain", "contrast/positives/<domain>"),
            meaning="Positives per anchor of the cross-domain term, over all anchors of the step.",
            target="At most contrastive.top_k per other domain.",
            compute=lambda rollouts: mean_positives(rollouts.cross_domain_M),
        ),
        Metric(
            keys=("contrast/positives_in_domain",),
            meaning="Positives per anchor of the in-domain term, over all anchors of the step.",
            compute=lambda rollouts: mean_positives(rollouts.in_domain_M),
        ),
        Metric(
            keys=("contrast/negatives",),
            meaning="Negatives per anchor of either term; left out without an anchor.",
        ),
        Metric(
            keys=("contrast/negatives/<a>/<b>",),
            meaning="Negatives of domain b per anchor of domain a (also for a = b).",
        ),
        Metric(
            keys=("contrast/positives/<a>/<b>",),
            meaning="Positives of domain b per cross-domain anchor of domain a; left out without an anchor.",
        ),
        Metric(
            keys=("contrast/similarity/<a>/<b>",),
            meaning="Mean similarity of correct rollouts of both domains, once per two domains (a = b: two different "
            "rollouts of one domain); left out without such a pair.",
            target="From -1 to 1; the chance level is 0.",
        ),
        Metric(
            keys=("contrast/alignment",),
            meaning="Mean squared distance of two correct rollouts of one domain (arXiv 2005.10242, alpha = 2); left "
            "out without such a pair.",
            target="Falls from the chance level 2; at 0 they coincide.",
        ),
        Metric(
            keys=("contrast/uniformity",),
            meaning="log of the mean of exp(-2 distance^2) over pairs of rollouts (arXiv 2005.10242, t = 2).",
            target="About -4 for random directions; at 0 all representations coincide, a collapse.",
        ),
    ),
)

_GRADIENTS = Section(
    title="Gradients of terms and domains",
    about="Measured every contrastive.diagnose_every steps, if a term reaches the model's weights.",
    metrics=(
        Metric(
            keys=("gradient/z_cross_domain", "gradient/z_in_domain"),
            meaning="Norm of a term's gradient, with its weight, on the representations.",
        ),
        Metric(
            keys=("gradient/trunk_policy", "gradient/trunk_cross_domain", "gradient/trunk_in_domain"),
            meaning="Norm of a term's gradient, with its weight, on the model's weights without the projection head; "
            "the policy term includes the KL term.",
            target="A contrastive term far above the policy term dominates the update: lower its weight.",
        ),
        Metric(
            keys=("gradient/cos_cross_domain", "gradient/cos_in_domain"),
            meaning="Cosine of a contrastive term's gradient and the policy term's; left out where one of them is 0.",
            target="The chance level is 0; below 0 the terms work against each other.",
        ),
        Metric(
            keys=("gradient/cos_domains",),
            meaning="Mean cosine of the policy term's gradients of two domains; every algorithm.diagnose_every steps.",
            target="The chance level is 0; below 0 the domains work against each other.",
        ),
    ),
)

SECTIONS = (_SAMPLED, _TRAINED, _UPDATES, _PAIRS, _GRADIENTS, EXPERTS, AHEAD, WORK)
"""Every key of metrics.jsonl but `step`."""

EVALUATION = Section(
    title="Held-out evaluation",
    about="A line of eval.jsonl and the object of `mcpo evaluate --json`; the trackers have these as eval/KEY. k is "
    "evaluation.samples. Items whose verifier failed are left out; a domain without a verified item has null.",
    metrics=(
        Metric(
            keys=("<domain>",),
            meaning="Accuracy avg@k: mean over items of the share of their k responses that are correct.",
            target="Rises. The chance level is that of guessing an answer of the domain.",
        ),
        Metric(keys=("mean",), meaning="Mean of the domains' accuracies, each domain counting the same."),
        Metric(keys=("worst",), meaning="Lowest of the domains' accuracies."),
        Metric(keys=("items/<domain>",), meaning="Number of items whose responses were verified."),
        Metric(
            keys=("contrast/probe_transfer", "contrast/probe_transfer/<domain>"),
            meaning="Ranking of a domain's training rollouts by a linear probe of correctness that was fitted on the "
            "representations of all other domains (AUC; prompts with both outcomes, since the evaluation before), and "
            "the mean over domains. Only in a run with contrastive terms.",
            target="Above the chance level 0.5 where correctness has a direction that domains share.",
        ),
        Metric(
            keys=("contrast/probe_centered", "contrast/probe_centered/<domain>"),
            meaning="The same of representations less the mean of their prompt's.",
            target="As above.",
        ),
        Metric(
            keys=tuple(
                f"contrast/probe_{kind}_{bound}" for kind in ("transfer", "centered") for bound in ("low", "high")
            ),
            meaning="Bounds of the 95 % bootstrap intervals of the two means, over prompts.",
        ),
        Metric(
            keys=("accuracy_low/<domain>", "accuracy_high/<domain>", "accuracy_low/mean", "accuracy_high/mean"),
            meaning="Bounds of the 95 % bootstrap interval of the accuracy, over items.",
        ),
        Metric(
            keys=("pass_at_<K>/<domain>", "pass_at_<K>/mean"),
            meaning="Unbiased chance that one of K responses is correct (arXiv 2107.03374), for K = 2, 4, 8, ... below "
            "k and for K = k; only for k > 1.",
        ),
        Metric(
            keys=("maj_at_<k>/<domain>", "maj_at_<k>/mean"),
            meaning="Share of items whose most frequent answer is correct (arXiv 2203.11171); only for k > 1.",
        ),
        Metric(
            keys=tuple(
                f"{measure}_{bound}/{name}"
                for measure in ("pass_at_<K>", "maj_at_<k>")
                for bound in ("low", "high")
                for name in ("<domain>", "mean")
            ),
            meaning="Bounds of their 95 % bootstrap intervals.",
        ),
    ),
)
"""Every key of eval.jsonl but `step`."""
