"""Define the sections of the configuration: every key with its type, range, default and meaning. Imports no torch.

The descriptions are what `mcpo config keys` and the documentation print (config/reference.py).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from megatron_mcpo.config.model import fast_dtype

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0
"""vLLM (0.30.0) refuses higher temperatures, and samples at the lowest where one between 0 and it is asked for."""
Temperature = Annotated[float, Field(ge=LOWEST_TEMPERATURE, le=HIGHEST_TEMPERATURE)]
PathText = Annotated[str, Field(min_length=1)]
# Names become folders and keys of metrics: they have no slash and no leading dot.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", examples=["math_1"])]


class Section(BaseModel):
    """A table of the configuration: frozen, without unknown keys, and without conversions between types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunConfig(Section):
    """Name, length and folder of a run, its checkpoints and its experiment trackers."""

    name: Name = Field("run", description="name of the run, which is also its folder under `dir`")
    dir: PathText = Field("runs", description="folder that holds the folders of all runs")
    seed: Seed = Field(
        0, description="seed of all random choices: sampling, the order of the data, the weights of the new head"
    )
    steps: PositiveInt = Field(description="number of training steps; each samples rollouts and updates the policy")
    checkpoint_every: PositiveInt = Field(
        5, description="steps between two checkpoints; the last step always writes one"
    )
    keep_checkpoints: PositiveInt = Field(
        2,
        description="number of newest checkpoints that are kept; with 2, a run can resume from the older one when the "
        "newest is damaged",
    )
    keep_every: NonNegativeInt = Field(
        0,
        description="checkpoints of steps that this number divides are kept forever, in addition to the newest; 0: "
        "only the newest are kept",
    )
    resume: PathText = Field(
        "auto",
        description="which run goes on; auto: an unfinished one of the same name and settings, if there is one; never: "
        "a new one begins; latest, or a run's name or folder: this one, with the settings that are given now, and also "
        "if it is finished (`--resume RUN` is short for it)",
    )
    collective_timeout: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        600.0,
        description="seconds without any progress of any rank, or with a rank that is silent, after which the job is "
        "ended and says which rank is where; up to three times as long at the start and where a step pauses for long; "
        "at least 1.5 times rewards.timeout",
    )
    trackers: list[Literal["wandb", "mlflow", "trackio"]] = Field(
        [],
        description="experiment trackers that get the metrics, in addition to metrics.jsonl and TensorBoard; each is "
        "an optional extra of the package",
    )


Recompute = Literal["none", "selective", "full"]
Fp8 = Literal["off", "blockwise", "tensorwise"]


class ModelSection(Section):
    """The policy model, and the reference model, which starts as a copy of it."""

    path: PathText = Field(
        description="folder of the model: config.json, tokenizer and safetensors in Hugging Face's format, or the "
        "output of `mcpo convert to-megatron`"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="data type of weights and activations, in the trainer and in the engine; auto: bf16, but fp32 on "
        "a CPU that is slow in bf16 (no AVX-512)",
    )
    init_from: PathText | None = Field(
        None,
        description="checkpoint whose weights, and head if it has the same shape, a new run begins with, instead of "
        "those of `path`; the reference model stays the one in `path` (`--init-from CHECKPOINT` is short for it)",
    )
    recompute: Recompute = Field(
        "none",
        description="activations of the policy's layers that the backward pass computes again instead of storing; "
        "selective: those of attention scores and MLP; full: all except the inputs of the layers",
    )
    fp8: Fp8 = Field(
        "off",
        description="FP8 matrix products in all layers except the first and the last, on Hopper or later GPUs with "
        "Transformer Engine; blockwise: e4m3 with one scale per block of 128 x 128; tensorwise: one scale per tensor "
        "and e5m2 gradients, which is faster",
    )
    router_replay: Literal["off", "trainer", "engine"] = Field(
        "off",
        description="whose choices of experts the policy repeats; trainer: the update those of the scoring pass; "
        "engine: both those that the engine made while it sampled; off: every pass chooses, as its rounding has it",
    )
    offload_reference: bool = Field(
        False,
        description="whether the weights of the reference model are in host memory except while it computes log-probs",
    )

    @property
    def replays_engine(self) -> bool:
        """Return whether rollouts carry the experts that the engine chose."""
        return self.router_replay == "engine"

    @field_validator("dtype", mode="before", json_schema_input_type=Literal["bf16", "fp32", "auto"])
    @classmethod
    def _resolved(cls, value: Any) -> Any:
        return fast_dtype() if value == "auto" else value

    @field_validator("fp8", mode="before")
    @classmethod
    def _not_blackwell(cls, value: Any) -> Any:
        if value == "mxfp8":
            raise ValueError(
                "must be 'off', 'blockwise' or 'tensorwise' (MXFP8 needs a Blackwell GPU, compute capability 10.0, and "
                "is not supported). Set it to one of them."
            )
        return value


class ParallelConfig(Section):
    """The division of the model and of the batch over ranks."""

    tensor: PositiveInt = Field(1, description="tensor parallelism: number of ranks that share every weight matrix")
    pipeline: PositiveInt = Field(1, description="pipeline parallelism: number of stages that share the layers")
    virtual_pipeline: PositiveInt = Field(
        1, description="number of chunks of layers per pipeline stage; above 1, the schedule is interleaved"
    )
    layers_per_stage: list[PositiveInt] = Field(
        [],
        description="number of layers of every pipeline stage (of every chunk, if virtual_pipeline is above 1), in the "
        "order of the model; empty: all have equally many",
    )
    context: PositiveInt = Field(1, description="context parallelism: number of ranks that share every sequence")
    expert: PositiveInt = Field(
        1,
        description="expert parallelism: number of ranks that share the experts of a layer; they are taken from the "
        "tensor x context x data ranks of a pipeline stage",
    )
    sequence: bool = Field(True, description="whether sequence parallelism is used where `tensor` is above 1")
    data: PositiveInt | None = Field(
        None,
        description="number of data-parallel replicas; unset: as many as torchrun's world size gives, 1 without "
        "torchrun",
    )


class BatchConfig(Section):
    """The size of a training step; all other sizes are derived from it and printed at the start."""

    prompts: PositiveInt = Field(description="number of prompts per step, over all ranks")
    samples: Annotated[int, Field(gt=1)] = Field(description="number of rollouts per prompt (the group of GRPO)")
    micro_batch_tokens: PositiveInt = Field(
        2048, description="maximum number of tokens in one packed micro-batch of one rank"
    )
    minibatches: PositiveInt = Field(
        1, description="number of optimizer steps that a batch of rollouts is divided into"
    )


class RolloutConfig(Section):
    """Sampling of the rollouts."""

    max_prompt_tokens: PositiveInt = Field(
        512, description="maximum length of a prompt; longer prompts are rejected at the start of the run"
    )
    max_response_tokens: PositiveInt = Field(
        16,
        description="maximum length of a response, its reasoning included; a longer response is cut off (stop reason: "
        "length), which mostly makes it incorrect",
    )
    temperature: Temperature = Field(1.0, description="sampling temperature of the training rollouts")


AdvantageKind = Literal["grpo", "dr_grpo", "rloo", "per_domain"]
"""The estimators in algo/advantage.py, which asserts that it has exactly these."""


class AlgorithmConfig(Section):
    """The policy term of the objective: group-relative advantages, clipped ratio, KL to the reference model."""

    advantage: AdvantageKind = Field(
        "grpo",
        description="how advantages are computed from rewards; grpo: the mean of the prompt's rollouts is subtracted "
        "and the result is divided by their standard deviation; dr_grpo: as grpo without the division; rloo: the mean "
        "of the prompt's other rollouts is subtracted; per_domain: as grpo with the standard deviation of the domain",
    )
    clip: Literal["ppo", "gspo", "cispo"] = Field(
        "ppo",
        description="how the probability ratio is clipped; ppo: per token (clip_high above clip_low is DAPO's "
        "clip-higher); gspo: one ratio per rollout; cispo: the clipped ratio is a constant weight, so that every token "
        "keeps its gradient",
    )
    clip_low: Fraction = Field(0.2, description="the ratio is clipped below 1 - clip_low")
    clip_high: NonNegativeFloat = Field(0.2, description="the ratio is clipped above 1 + clip_high")
    aggregation: Literal["token_mean", "seq_mean_token_mean", "dr_grpo"] = Field(
        "token_mean",
        description="how token losses are averaged; token_mean: over all response tokens of the step; "
        "seq_mean_token_mean: over the tokens of each rollout, then over rollouts; dr_grpo: the sum is divided by "
        "rollouts x max_response_tokens, whatever the lengths of the responses",
    )
    kl_weight: NonNegativeFloat = Field(
        0.001, description="weight beta of the KL term; 0: there is no KL term, and no reference model is built"
    )
    kl_estimator: Literal["k2", "k3"] = Field("k3", description="estimator of KL(policy || reference), per token")
    importance: Literal["truncate", "mask", "reject", "off"] = Field(
        "truncate",
        description="importance weight of a token, exp(trainer's log-prob - engine's log-prob), which corrects the "
        "mismatch between engine and trainer, and older weights of the engine; truncate: capped at importance_cap; "
        "mask: 0 outside importance_floor .. importance_cap (IcePop); reject: as truncate, but 0 for all tokens of a "
        "rollout whose mean log-prob has moved by more than rejection_limit; off: always 1",
    )
    importance_cap: PositiveFloat = Field(2.0, description="largest importance weight")
    importance_floor: PositiveFloat = Field(0.5, description="smallest importance weight, used by importance = mask")
    rejection_limit: PositiveFloat = Field(
        0.1,
        description="largest absolute mean of the logarithms of a rollout's importance weights, in nats per token, "
        "used by importance = reject: their geometric mean is then at most e to this power and at least its inverse",
    )
    pass_threshold: Fraction = Field(
        1.0 - 1e-6,
        description="a rollout is correct if its verifiers (format and length excluded) give at least this score",
    )
    diagnose_every: NonNegativeInt = Field(
        0,
        description="steps between two measurements of how far the gradients of the domains agree, which take a "
        "forward and backward pass per domain; 0: never",
    )


class ContrastiveConfig(Section):
    """The contrastive terms of the objective; with both weights 0 the method is mixed-domain GRPO without a head."""

    cross_domain_weight: NonNegativeFloat = Field(
        0.1, description="weight lambda of the cross-domain term (knowledge sharing)"
    )
    in_domain_weight: NonNegativeFloat = Field(0.1, description="weight lambda of the in-domain term (consolidation)")
    mode: Literal["loss", "reward"] = Field(
        "loss",
        description="how the terms act; loss: they are added to the loss; reward: the weighted terms are subtracted "
        "from the rewards of correct rollouts, at most 0.5, and their gradient reaches only the head",
    )
    temperature: PositiveFloat = Field(0.1, description="temperature tau of the similarities")
    transfer: Literal["top_k", "threshold", "all"] = Field(
        "top_k",
        description="which correct rollouts of other domains are the positives of an anchor; top_k: the top_k most "
        "similar of each domain; threshold: those with at least the similarity `threshold`; all: all of them",
    )
    top_k: PositiveInt = Field(
        4, description="number of positives that an anchor takes from each other domain, the most similar first"
    )
    threshold: Annotated[float, Field(ge=-1, le=1)] = Field(
        0.5, description="smallest cosine similarity of a positive, used by transfer = threshold"
    )
    negatives: Literal["pool", "domain", "prompt"] = Field(
        "pool",
        description="where the incorrect rollouts that are an anchor's negatives come from; pool: the whole step; "
        "domain: the anchor's domain; prompt: the anchor's prompt",
    )
    in_domain_scope: Literal["domain", "prompt"] = Field(
        "domain",
        description="where the correct rollouts that are an anchor's in-domain positives come from; domain: the "
        "anchor's domain; prompt: the anchor's prompt",
    )
    in_domain_loss: Literal["infonce", "align"] = Field(
        "infonce",
        description="loss of the in-domain term; infonce: contrasts positives with negatives; align: the mean of "
        "1 - similarity, without negatives",
    )
    denominator: Literal["negatives", "all"] = Field(
        "negatives",
        description="which rollouts a positive competes with; negatives: the anchor's negatives; all: every other "
        "rollout of the place where the negatives come from (with negatives = pool this is the SupCon loss)",
    )
    head: Literal["linear", "mlp"] = Field(
        "linear", description="projection from hidden size H to `dim` D; linear: H x D; mlp: H x H, GELU, H x D"
    )
    pool: Literal["mean", "last"] = Field(
        "mean",
        description="which response tokens form the representation of a rollout; mean: the mean over all of them; "
        "last: the last one",
    )
    center: Literal["off", "prompt"] = Field(
        "off",
        description="what is subtracted from a representation before it is scaled to length 1; off: nothing; prompt: "
        "the mean of the prompt's rollouts, so that pairs compare what distinguishes correct from incorrect answers "
        "instead of the questions; prompts with only one outcome are then left out",
    )
    dim: PositiveInt | None = Field(
        None,
        description="size of a representation, at most the hidden size; unset: 512, or the hidden size if that is "
        "smaller",
    )
    diagnose_every: NonNegativeInt = Field(
        20,
        description="steps between two measurements of the gradient of each term, which take up to three more forward "
        "and backward passes, if a term reaches the model's weights; 0: never",
    )

    @property
    def enabled(self) -> bool:
        """Return whether one of the two terms has a weight above 0."""
        return self.cross_domain_weight > 0 or self.in_domain_weight > 0


class OptimizerConfig(Section):
    """Adam with decoupled weight decay, and its learning rate schedule."""

    lr: PositiveFloat = Field(description="peak learning rate")
    head_lr: PositiveFloat = Field(
        1e-3,
        description="peak learning rate of the contrastive head, whose weights begin random; its schedule has the "
        "shape of the model's",
    )
    min_lr: NonNegativeFloat = Field(
        0.0,
        description="final learning rate of the linear and cosine schedules, which the step after the last would use",
    )
    warmup_steps: NonNegativeInt = Field(0, description="number of optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="shape of the learning rate after the warm-up"
    )
    beta1: Decay = Field(0.9, description="decay rate of the first moment")
    beta2: Decay = Field(0.95, description="decay rate of the second moment")
    eps: PositiveFloat = Field(1e-8, description="constant that is added to the square root of the second moment")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled weight decay, not applied to norms and biases")
    clip_grad: PositiveFloat = Field(1.0, description="maximum global gradient norm; larger gradients are scaled down")
    offload: bool = Field(
        False,
        description="whether fp32 master weights and moments stay in host memory and are moved to the device only for "
        "the optimizer step; gradient buffers are allocated only between the backward pass and that step",
    )
