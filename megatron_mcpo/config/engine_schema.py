"""Define the section of the configuration on the inference engine. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, JsonValue

from megatron_mcpo.config.schema import NonNegativeInt, PositiveFloat, PositiveInt, Section, Share

ServerUrl = Annotated[str, Field(pattern=r"^http://[A-Za-z0-9._-]+:[0-9]{1,5}$", examples=["http://10.0.0.1:8000"])]


class EngineConfig(Section):
    """The inference engine: inside the trainer's ranks, or, with `servers`, in processes of its own."""

    servers: list[ServerUrl] = Field(
        [],
        description="addresses of inference servers (`mcpo serve`), such as http://127.0.0.1:8000; empty: the engines "
        "run inside the trainer's ranks",
    )
    staleness: NonNegativeInt = Field(
        0,
        description="how many steps before it the tokens that a step learns from may have been sampled; 0: a step's "
        "rollouts are sampled when it begins; above 0, which needs `servers`: the engines sample for later steps while "
        "the trainer learns",
    )
    oversample: PositiveFloat | None = Field(
        None,
        description="prompts under way beyond those of one step, as a multiple of batch.prompts, at most `staleness`; "
        "unset: as many as `staleness`, and every step learns from its own prompts; with fewer, a step need not wait "
        "for long responses: those are continued, and learned from up to staleness - oversample steps later",
    )
    in_flight: Literal["wait", "keep"] = Field(
        "keep",
        description="what becomes of responses that servers are sampling when new weights come; wait: they are "
        "finished with the old ones first; keep: they are interrupted and go on with the new ones, and every token "
        "keeps the version that it was sampled with",
    )
    patience: PositiveFloat = Field(
        600.0, description="seconds without any server that answers after which a run with `servers` ends"
    )
    tensor_parallel: PositiveInt = Field(1, description="number of ranks that share the weights of one engine")
    kv_cache_gib: PositiveFloat = Field(0.5, description="size of the key-value cache in GiB, on a CPU only")
    gpu_memory_utilization: Share = Field(0.5, description="fraction of a GPU's memory that the engine may use")
    max_concurrent: PositiveInt = Field(64, description="maximum number of sequences that are decoded together")
    engine_check_every: PositiveInt = Field(
        10, description="steps between two comparisons of the engine's log-probs with the trainer's"
    )
    quantization: Literal["none", "fp8_per_block"] = Field(
        "none",
        description="quantization of the engine's weights; fp8_per_block: the weights of the layers are rounded to FP8 "
        "(e4m3, one scale per block of 128 x 128); embeddings, output layer, routers and norms keep their data type, "
        "and so does the trainer",
    )
    verify_sync: bool = Field(
        False,
        description="whether all weights of the engine are compared with the trainer's after every weight sync; false: "
        "only after the first",
    )
    options: dict[str, JsonValue] = Field(
        {},
        description="further options of vLLM, with the names of its EngineArgs, such as { enforce_eager = true }; what "
        "follows from other keys, or would sample from another model than the trainer's, is refused",
    )

    @property
    def prompts_ahead(self) -> float:
        """Return the prompts under way beyond those of one step, as a multiple of a step's."""
        return float(self.staleness) if self.oversample is None else self.oversample
