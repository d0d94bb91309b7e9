"""Divide ranks over the kinds of parallelism: pure arithmetic, imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel groups. world_size = tensor * pipeline * context * data.

    expert: number of ranks that the experts of a layer are divided over; it adds no ranks but divides those of a
    pipeline stage (tensor * context * data), neighbours first. An expert is never cut.
    layers_per_stage: the layers of every pipeline chunk, in the order of the model; empty: all chunks have equally many
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    expert: int = 1
    data: int = 1
    sequence: bool = False
    layers_per_stage: tuple[int, ...] = ()

    @property
    def model_parallel(self) -> int:
        """Return the number of ranks that together hold one copy of the model (one data-parallel replica)."""
        return self.tensor * self.pipeline * self.context

    @property
    def world_size(self) -> int:
        """Return the number of ranks of the run."""
        return self.model_parallel * self.data

    @property
    def chunks(self) -> int:
        """Return the number of pipeline chunks: one per stage, or several where the schedule is interleaved."""
        return self.pipeline * self.virtual_pipeline

    def chunk_layers(self, num_layers: int) -> tuple[int, ...]:
        """Return how many of the model's layers every chunk has, in the order of the model.

        Chunk n belongs to stage n % pipeline.
        """
        return self.layers_per_stage or (num_layers // self.chunks,) * self.chunks

    def stage_layers(self, num_layers: int, stage: int) -> tuple[int, ...]:
        """Return how many layers each of a stage's chunks has."""
        return self.chunk_layers(num_layers)[stage :: self.pipeline]

    @property
    def sequence_alignment(self) -> int:
        """Return the number of tokens to a multiple of which every packed sequence is padded.

        Context parallelism deals a sequence out in 2 * context chunks; sequence parallelism then splits a rank's
        tokens over the tensor group.
        """
        chunks = 2 * self.context if self.context > 1 else 1
        return chunks * (self.tensor if self.sequence else 1)

    def __str__(self) -> str:
        parts = [f"tensor {self.tensor}", f"pipeline {self.pipeline}", f"context {self.context}", f"data {self.data}"]
        if self.virtual_pipeline > 1:
            parts.insert(2, f"virtual pipeline {self.virtual_pipeline}")
        if self.layers_per_stage:
            parts[1] += f" of {'+'.join(map(str, self.layers_per_stage))} layers"
        if self.expert > 1:
            parts.append(f"experts over {self.expert}")
        if self.sequence:
            parts.append("sequence parallel")
        return " x ".join(parts[:-1] if self.sequence else parts) + (", " + parts[-1] if self.sequence else "")


def nearly_even(num_layers: int, chunks: int) -> tuple[int, ...]:
    """Return layers of chunks that differ by one at most, fewer at both ends, where embedding and output layer are."""
    fewest, more = divmod(num_layers, chunks)
    from_the_middle = sorted(range(chunks), key=lambda chunk: abs(2 * chunk - (chunks - 1)))
    return tuple(fewest + (chunk in from_the_middle[:more]) for chunk in range(chunks))
