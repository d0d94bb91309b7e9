"""The configuration's sections: every key with its type, range, default and meaning. Imports no torch."""

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
PathText = Annotated[str, Field(min_length=1)]
# Names become folders and keys of metrics: no slash, no leading dot.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")]

ServerUrl = Annotated[str, Field(pattern=r"^http://[A-Za-z0-9._-]+:[0-9]{1,5}$")]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RunConfig(Section):
    """What is run, how long, and where its files go."""

    name: Name = Field("run", description="folder of the run under `dir`")
    dir: PathText = Field("runs", description="folder that holds all runs")
    seed: Seed = Field(0, description="of everything random: sampling, order of the data, the new head")
    steps: PositiveInt = Field(description="rollout-and-update steps")
    checkpoint_every: PositiveInt = Field(5, description="steps between checkpoints; the last step always has one")
    keep_checkpoints: PositiveInt = Field(
        2, description="newest checkpoints that are kept; with 2, one is left to go on from when the newest is damaged"
    )
    keep_every: NonNegativeInt = Field(
        0, description="checkpoints of steps divisible by this are kept for good, besides the newest; 0: none"
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: go on with an unfinished run of the same name and settings; never: a new folder"
    )
    trackers: list[Literal["wandb", "mlflow", "trackio"]] = Field(
        [], description="experiment trackers besides metrics.jsonl and TensorBoard, each an optional extra"
    )


Recompute = Literal["none", "selective", "full"]
Fp8 = Literal["off", "blockwise", "tensorwise"]


class ModelSection(Section):
    """The policy, and the reference that starts as its copy."""

    path: PathText = Field(
        description="folder with config.json, tokenizer and safetensors, or what `mcpo convert to-megatron` made of one"
    )
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16",
        description="of weights and activations, in trainer and engine; 'auto': bf16, but fp32 on a CPU that is slow "
        "in bf16",
    )
    recompute: Recompute = Field(
        "none",
        description="what the backward pass of the policy's layers computes a second time instead of keeping it; "
        "selective: attention scores and MLP; full: all but the layers' inputs",
    )
    fp8: Fp8 = Field(
        "off",
        description="products of all layers but the first and the last, on Hopper GPUs and later with Transformer "
        "Engine; blockwise: e4m3 in blocks of 128 x 128; tensorwise: one scale a tensor, e5m2 gradients: faster",
    )
    offload_reference: bool = Field(
        False, description="the reference's weights live in host memory, and are on the device for its scores alone"
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _resolved(cls, value: Any) -> Any:
        return fast_dtype() if value == "auto" else value

    @field_validator("fp8", mode="before")
    @classmethod
    def _not_blackwell(cls, value: Any) -> Any:
        if value == "mxfp8":
            raise ValueError(
                "MXFP8 needs a Blackwell GPU (compute capability 10.0) and is not offered; set it to 'blockwise' or "
                "'tensorwise'"
            )
        return value


class ParallelConfig(Section):
    """How the model is divided over ranks."""

    tensor: PositiveInt = Field(1, description="ranks that share every weight matrix")
    pipeline: PositiveInt = Field(1, description="stages the layers are divided into")
    virtual_pipeline: PositiveInt = Field(1, description="chunks of layers a stage holds (interleaved schedule)")
    context: PositiveInt = Field(1, description="ranks that share every sequence")
    expert: PositiveInt = Field(
        1, description="ranks that a layer's experts are divided over; they are ranks of tensor x context x data"
    )
    sequence: bool = Field(True, description="sequence parallelism, where tensor > 1")
    data: PositiveInt | None = Field(
        None, description="data-parallel replicas; left out, torchrun's world size gives them (1 without torchrun)"
    )


class BatchConfig(Section):
    """What a step trains on. Everything else is derived and printed at the start."""

    prompts: PositiveInt = Field(description="prompts a step, over all ranks")
    samples: Annotated[int, Field(gt=1)] = Field(description="rollouts a prompt (the group of GRPO)")
    micro_batch_tokens: PositiveInt = Field(2048, description="most tokens in one packed micro-batch of one rank")
    minibatches: PositiveInt = Field(1, description="optimizer steps a rollout batch is divided into")


class RolloutConfig(Section):
    """Sampling."""

    max_prompt_tokens: PositiveInt = Field(512, description="longer prompts are refused at the start")
    max_response_tokens: PositiveInt = Field(16, description="a longer response is cut (stop reason: length)")
    temperature: PositiveFloat = Field(1.0, description="of the training rollouts")


class EngineConfig(Section):
    """The inference engine, in the trainer's ranks; with `servers`, what those are started with."""

    servers: list[ServerUrl] = Field(
        [], description="addresses of engines in other processes, such as http://127.0.0.1:8000; none: in the ranks"
    )
    tensor_parallel: PositiveInt = Field(1, description="ranks an engine's weights are divided over")
    kv_cache_gib: PositiveFloat = Field(0.5, description="key-value cache on a CPU")
    gpu_memory_utilization: Share = Field(0.5, description="share of a GPU's memory that the engine may take")
    max_concurrent: PositiveInt = Field(64, description="sequences decoded together")
    engine_check_every: PositiveInt = Field(10, description="steps between checks that engine and trainer agree")
    quantization: Literal["none", "fp8_per_block"] = Field(
        "none",
        description="fp8_per_block: the engine rounds its layers' weights to FP8 (e4m3, a scale for each 128 x 128); "
        "embeddings, output, routers and norms stay as they are, and so does the trainer",
    )
    verify_sync: bool = Field(
        False, description="compare all weights of the engine with the trainer's after every push; else after the first"
    )


AdvantageKind = Literal["grpo", "dr_grpo", "rloo", "per_domain"]
"""The estimators in algo/advantage.py, which asserts that it has exactly these."""


class AlgorithmConfig(Section):
    """The policy term (objective: group-relative advantages, clipped ratio, KL to the reference)."""

    advantage: AdvantageKind = Field(
        "grpo",
        description="rewards minus their prompt's mean, divided by its standard deviation; dr_grpo: not divided; rloo: "
        "minus the mean of the prompt's OTHER rollouts; per_domain: divided by the deviation of the whole domain",
    )
    clip: Literal["ppo", "gspo", "cispo"] = Field(
        "ppo",
        description="ppo: every token's ratio (clip_high above clip_low is DAPO's clip-higher); gspo: one ratio a "
        "rollout; cispo: the clipped ratio is a weight, no token loses its gradient",
    )
    clip_low: Fraction = Field(0.2, description="the ratio is clipped below 1 - clip_low")
    clip_high: NonNegativeFloat = Field(0.2, description="the ratio is clipped above 1 + clip_high")
    aggregation: Literal["token_mean", "seq_mean_token_mean", "dr_grpo"] = Field(
        "token_mean",
        description="over the step's response tokens; seq_mean_token_mean: over each rollout's, then over rollouts; "
        "dr_grpo: divided by rollouts x max_response_tokens, whatever their lengths",
    )
    kl_weight: NonNegativeFloat = Field(0.001, description="beta of the KL term; 0: no reference model is built")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="of KL(policy || reference), by token")
    importance: Literal["truncate", "mask", "off"] = Field(
        "truncate",
        description="weight exp(old - engine log-prob) of a token: capped at importance_cap; mask: 0 outside "
        "importance_floor .. importance_cap (IcePop); off: 1",
    )
    importance_cap: PositiveFloat = Field(2.0, description="largest importance weight")
    importance_floor: PositiveFloat = Field(0.5, description="smallest importance weight, for mask")
    pass_threshold: Fraction = Field(
        1.0 - 1e-6, description="a rollout is correct whose verifiers, all but format and length, give at least this"
    )


class ContrastiveConfig(Section):
    """The contrastive terms; both weights 0: no head exists and the method is plain mixed-domain GRPO."""

    cross_domain_weight: NonNegativeFloat = Field(0.1, description="lambda of cross-domain knowledge sharing")
    in_domain_weight: NonNegativeFloat = Field(0.1, description="lambda of in-domain consolidation")
    mode: Literal["loss", "reward"] = Field(
        "loss",
        description="reward: a correct rollout's reward falls by its weighted terms, at most by 0.5, and the terms' "
        "gradient reaches the head alone",
    )
    temperature: PositiveFloat = Field(0.1, description="tau")
    transfer: Literal["top_k", "threshold", "all"] = Field(
        "top_k",
        description="correct rollouts of OTHER domains that are an anchor's positives: the top_k most similar of each "
        "domain; threshold: those at least that similar; all",
    )
    top_k: PositiveInt = Field(4, description="positives an anchor takes from EACH other domain, most similar first")
    threshold: Annotated[float, Field(ge=-1, le=1)] = Field(0.5, description="least similarity, for transfer threshold")
    negatives: Literal["pool", "domain", "prompt"] = Field(
        "pool", description="incorrect rollouts that are an anchor's negatives: of the step, its domain, its prompt"
    )
    in_domain_scope: Literal["domain", "prompt"] = Field(
        "domain", description="correct rollouts that an anchor is pulled to: of its domain, of its prompt"
    )
    in_domain_loss: Literal["infonce", "align"] = Field(
        "infonce", description="align: the mean of 1 - similarity, without negatives"
    )
    denominator: Literal["negatives", "all"] = Field(
        "negatives",
        description="what a positive competes with; all: every other rollout of where the negatives come from (of the "
        "pool: SupCon's loss)",
    )
    head: Literal["linear", "mlp"] = Field("linear", description="H x D; mlp: H x H, GELU, H x D")
    pool: Literal["mean", "last"] = Field("mean", description="response tokens that a representation is made of")
    dim: PositiveInt | None = Field(
        None, description="size of a representation, at most the hidden size; left out: 512, or the hidden size if less"
    )
    diagnose_every: NonNegativeInt = Field(
        0,
        description="steps between measurements of each term's gradient (three more passes forward and back); 0: never",
    )

    @property
    def enabled(self) -> bool:
        return self.cross_domain_weight > 0 or self.in_domain_weight > 0


class OptimizerConfig(Section):
    """Adam with decoupled weight decay."""

    lr: PositiveFloat = Field(description="peak learning rate")
    min_lr: NonNegativeFloat = Field(0.0, description="learning rate that a decay reaches one update after the last")
    warmup_steps: NonNegativeInt = Field(0, description="optimizer steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="shape after the warm-up")
    beta1: Decay = Field(0.9, description="decay of the first moment")
    beta2: Decay = Field(0.95, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")
    weight_decay: NonNegativeFloat = Field(0.0, description="decoupled; not applied to norms and biases")
    clip_grad: PositiveFloat = Field(1.0, description="global gradient norm is clipped to this")
    offload: bool = Field(
        False,
        description="fp32 master weights and moments live in host memory, and are on the device for the optimizer's "
        "step alone; gradient buffers have memory from the backward pass to that step",
    )
