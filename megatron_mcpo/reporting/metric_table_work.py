"""Define the metrics of a step's work: what it cost, and how far ahead of it the rollouts were sampled."""

from megatron_mcpo.reporting.metric import Metric, Section

AHEAD = Section(
    title="Rollouts ahead of the trainer",
    about="How old the rollouts were that the step learned from, and how busy the engines; with engine.staleness.",
    metrics=(
        Metric(
            keys=("staleness/mean", "staleness/max"),
            meaning="Steps between the weights that sampled a token and those that learned from it, over all tokens.",
            target="0 with engine.staleness = 0; at most engine.staleness.",
        ),
        Metric(
            keys=("engine/busy",),
            meaning="Share of the time since the step before in which a server had requests, averaged over servers.",
            target="Near 1; else the trainer is too slow, or engine.oversample too small.",
        ),
        Metric(
            keys=("rollouts/under_way",),
            meaning="Prompts under way or finished for later steps when the step had its own.",
        ),
        Metric(
            keys=("rollouts/passed_over",),
            meaning="Older prompts that the step did not wait for; a later step learns from them.",
        ),
        Metric(
            keys=("rollouts/passed_over_length",),
            meaning="Mean tokens that these had so far; above response_tokens the step prefers short responses, "
            "and a later one makes up for it.",
        ),
    ),
)

EXPERTS = Section(
    title="Experts",
    about="How the tokens of the update were divided over the experts of a model that has them, averaged over layers.",
    metrics=(
        Metric(
            keys=("moe/load_max_over_mean",),
            meaning="Tokens of a layer's fullest expert, over the mean of its experts.",
            target="Does not rise. 1 is even; experts over experts per token: all tokens have the same.",
        ),
        Metric(
            keys=("moe/load_entropy",),
            meaning="Entropy of the shares of a layer's experts, over log(experts).",
            target="Does not fall. 1 is even.",
        ),
        Metric(
            keys=("moe/unused_experts",),
            meaning="Share of the experts of all layers that no token was given.",
            target="0 with many tokens a step.",
        ),
    ),
)

WORK = Section(
    title="Work",
    about="What the step did and what it cost.",
    metrics=(
        Metric(keys=("resample/rounds",), meaning="Rounds of dynamic sampling; at most data.resample."),
        Metric(keys=("resample/replaced",), meaning="Groups with zero advantage that were replaced by other prompts."),
        Metric(keys=("resample/prompts",), meaning="Prompts sampled altogether, replacements included."),
        Metric(keys=("tokens/trained",), meaning="Prompt and response tokens; a prompt counts once per rollout."),
        Metric(keys=("time/step",), meaning="Seconds of the whole step."),
        Metric(keys=("time/rollout",), meaning="Seconds of sampling and verifying; absent with engine.staleness."),
        Metric(
            keys=("time/wait_for_rollouts",),
            meaning="Seconds in which the trainer waited for rollouts that are sampled ahead of it (engine.staleness).",
            target="Near 0.1, the time between two looks; else engines or verifiers are too slow (engine/busy).",
        ),
        Metric(keys=("time/sleep",), meaning="Seconds in which the engine gives its GPU memory back; 0 on a CPU."),
        Metric(
            keys=("time/exchange",),
            meaning="Seconds in which ranks get the tokens of their rollouts; waiting for slower ranks included.",
        ),
        Metric(keys=("time/score",), meaning="Seconds of scoring with policy and reference."),
        Metric(keys=("time/update",), meaning="Seconds of contrast, backward passes and optimizer."),
        Metric(keys=("time/wake",), meaning="Seconds in which the engine takes its GPU memory again; 0 on a CPU."),
        Metric(keys=("sync/seconds",), meaning="Seconds of the weight sync from trainer to engine."),
        Metric(keys=("time/verify",), meaning="Seconds of comparing the engine's weights (engine.verify_sync)."),
        Metric(keys=("time/diagnose",), meaning="Seconds of measuring gradients, in the steps that do."),
        Metric(
            keys=("sync/bytes",),
            meaning="Bytes of the new weights that rank 0 received from other ranks. Every worker of an engine server "
            "gets a full copy besides.",
        ),
        Metric(
            keys=("memory/peak_gib",),
            meaning="On a GPU: the most memory in use on any device at the end of a phase, whoever uses it. On a CPU: "
            "the largest resident size of every rank plus the present one of its workers, summed; an upper bound. "
            "GiB.",
        ),
    ),
)
