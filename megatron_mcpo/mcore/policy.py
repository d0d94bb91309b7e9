"""Hold the models of a run: the policy that learns and the frozen reference. Only this module scales a loss.

Shape legend: see megatron_mcpo.types.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from torch import Tensor

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.data.routing import Routing
from megatron_mcpo.distributed.device import device
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.mcore import learning_rate, schedule
from megatron_mcpo.mcore.head import HeadSpec
from megatron_mcpo.mcore.model import DTYPES, build_chunks
from megatron_mcpo.mcore.offload import Offloaded, OptimizerMemory
from megatron_mcpo.mcore.packing import MicroBatch, pack
from megatron_mcpo.mcore.precision import TOKEN_MULTIPLE, check_context, check_fp8
from megatron_mcpo.mcore.routers import Routers
from megatron_mcpo.mcore.schedule import MicroOutput
from megatron_mcpo.mcore.spec import shares_prompts
from megatron_mcpo.types import Routes, Scores, TrainBatch, Update
from megatron_mcpo.weights.full_sync import export
from megatron_mcpo.weights.load import load_hf


@dataclass(frozen=True, kw_only=True)
class LossInput:
    """The part of a micro-batch that a loss reads. With context parallelism the tokens are this rank's share.

    logp_r: log-probs with a graph; response_r: where they stand in the batch's R
    z_nD: representations with a graph (None: no head); rollouts: which of the batch's N they belong to
    """

    logp_r: Tensor
    response_r: Tensor
    z_nD: Tensor | None
    rollouts: tuple[int, ...]


BUCKET_ELEMENTS: int | None = None
"""Gradients are reduced in buckets of so many elements while the backward pass goes on; None: Megatron's 40 million."""

LossFunction = Callable[[LossInput], tuple[Tensor, dict[str, Tensor]]]
"""Returns a micro-batch's share of the step's loss, which is the SUM over micro-batches and ranks, and metrics."""


class _Model:
    """The chunks of a GPTModel on this rank, and the forward-only pass that both models have."""

    def __init__(self, config: Config, model: ModelConfig, groups: Groups, *, head: HeadSpec | None):
        self.groups = groups
        self.model_config = model
        self.temperature = config.rollout.temperature
        self.device = device()
        self.max_tokens = config.batch.micro_batch_tokens
        self.head = head
        self.version = 0
        check_fp8(config.model.fp8)
        check_context(groups.layout.context, DTYPES[config.model.dtype])
        self.token_multiple = 1 if config.model.fp8 == "off" else TOKEN_MULTIPLE
        self.chunks: list[Any] = build_chunks(
            model,
            groups,
            dtype=DTYPES[config.model.dtype],
            head=head,
            recompute=config.model.recompute,
            fp8=config.model.fp8,
        )
        load_hf(self.chunks, model, Path(config.model.path), groups)
        self._routers: Routers | None = None
        self.routing: Routing | None = None

    def score(self, batch: TrainBatch) -> Scores:
        """Return log-probs, entropies and (with a head) representations of the batch, on every rank of the replica."""
        return self._score(batch, routes=None)

    def _score(self, batch: TrainBatch, *, routes: Routes | None) -> Scores:
        for chunk in self.chunks:
            chunk.eval()
        return self._run(batch, self._pack(batch), loss=None, routes=routes)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every full tensor with its Hugging Face name, on every rank. Collective over the replica."""
        return export(self.chunks, self.model_config, self.groups)

    @property
    def shares_prompts(self) -> bool:
        """Return whether batches for this model should keep the rollouts of a prompt together."""
        return shares_prompts(self.groups.layout)

    def _pack(self, batch: TrainBatch) -> list[MicroBatch]:
        return pack(
            batch,
            max_tokens=self.max_tokens,
            token_multiple=self.token_multiple,
            layout=self.groups.layout,
            context_rank=self.groups.context_rank,
            pool=self.head.pool if self.head else "mean",
            device=self.device,
        )

    def _run(
        self,
        batch: TrainBatch,
        micros: Sequence[MicroBatch],
        *,
        loss: schedule.MicroLoss | None,
        routes: Routes | None,
    ) -> Scores:
        """Run the micro-batches of a batch; return its scores, on all stages."""
        if self._routers is not None:
            self._routers.begin(routes)
        outputs = schedule.run(
            self.chunks,
            micros,
            self.groups,
            return_representations=self.head is not None,
            temperature=self.temperature,
            loss=loss,
            routers=self._routers,
        )
        scores = self._collect(batch, micros, outputs)
        return scores if self._routers is None else replace(scores, routes=self._routers.end())

    def _collect(self, batch: TrainBatch, micros: Sequence[MicroBatch], outputs: Sequence[MicroOutput]) -> Scores:
        """Put micro-batch results (the last stage's; other stages have none) in the batch's order, on all stages."""
        tokens_2R = torch.zeros(2, int(batch.response_lens_N.sum()), device=device())
        z_ND = None if self.head is None else torch.zeros(len(batch), self.head.dim, device=device())
        for micro, output in zip(micros if outputs else (), outputs, strict=True):
            tokens_2R[0, micro.response_r] = output.logp_r
            tokens_2R[1, micro.response_r] = output.entropy_r
            if z_ND is not None and output.z_nD is not None:
                z_ND[list(micro.rollouts)] = output.z_nD
        if self.groups.layout.context > 1 and outputs:
            dist.all_reduce(tokens_2R, group=self.groups.context)
        self._tell_stages(tokens_2R)
        if z_ND is not None:
            self._tell_stages(z_ND)
            # Sums over tokens may round differently on each tensor rank of a GPU; all must find the same pairs.
            dist.broadcast(z_ND, src=dist.get_global_rank(self.groups.tensor, 0), group=self.groups.tensor)
        return Scores(logp_R=tokens_2R[0], entropy_R=tokens_2R[1], z_ND=z_ND, version=self.version)

    def _tell_stages(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with the last stage's on all stages of this rank's pipeline."""
        if self.groups.layout.pipeline > 1:
            dist.broadcast(tensor, src=self.groups.last_stage_global_rank, group=self.groups.pipeline)


class Reference(_Model):
    """The frozen model that the KL term measures against: its own weights, no head, no gradient.

    With model.offload_reference its weights are on the device only during `score`.
    """

    def __init__(self, config: Config, model: ModelConfig, groups: Groups):
        super().__init__(config, model, groups, head=None)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
        weights = [weight for chunk in self.chunks for weight in chunk.parameters()]
        self._offloaded = Offloaded(lambda: weights, frozen=True) if config.model.offload_reference else None

    def score(self, batch: TrainBatch) -> Scores:
        with self._offloaded.on_device() if self._offloaded else nullcontext():
            return super().score(batch)


class Policy(_Model):
    """The model that learns, with its optimizer and schedule.

    With optimizer.offload gradients have memory only from `backward` to the end of `update`.
    """

    def __init__(self, config: Config, model: ModelConfig, groups: Groups):
        head = HeadSpec.of(config.contrastive, hidden_size=model.hidden_size, seed=config.run.seed)
        super().__init__(config, model, groups, head=head)
        if model.experts is not None:
            self._routers = Routers(self.chunks, model, groups, replays=config.model.router_replay != "off")
        if config.model.replays_engine:
            self.routing = Routing.of(model)
        # Gathering weights during the next forward pass would gain nothing: a weight sync follows the update.
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            bucket_size=BUCKET_ELEMENTS,
        )
        megatron_config = self.chunks[0].config
        self.chunks = [
            DistributedDataParallel(megatron_config, ddp_config, chunk, disable_bucketing=number > 0)
            for number, chunk in enumerate(self.chunks)
        ]
        optimizer_config = learning_rate.megatron_config(config.optimizer, dtype=DTYPES[config.model.dtype])
        self.optimizer = get_megatron_optimizer(
            optimizer_config,
            self.chunks,
            config_overrides={
                **get_standard_config_overrides(optimizer_config),
                **learning_rate.head_rate(config.optimizer),
            },
        )
        num_updates = config.run.steps * config.batch.minibatches
        self.lr_schedule = learning_rate.make_schedule(self.optimizer, config.optimizer, num_updates=num_updates)
        no_syncs = [chunk.no_sync for chunk in self.chunks]
        megatron_config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
        megatron_config.finalize_model_grads_func = finalize_model_grads
        megatron_config.grad_scale_func = self.optimizer.scale_loss
        self._offloaded = OptimizerMemory(self.optimizer, self.gradient_buffers) if config.optimizer.offload else None

    def score(self, batch: TrainBatch, *, routes: Routes | None = None) -> Scores:
        """Return the scores of the batch, as both models do.

        routes: the experts that an earlier pass over the same batch used, which are used again where they are replayed
        """
        return self._score(batch, routes=routes)

    def optimizer_on_device(self) -> AbstractContextManager[None]:
        """Keep the optimizer's state on the device for a block; without optimizer.offload it is always there."""
        return self._offloaded.on_device() if self._offloaded else nullcontext()

    def backward(
        self, batch: TrainBatch, loss: LossFunction, *, routes: Routes | None = None
    ) -> tuple[dict[str, float], Scores]:
        """Leave the gradient of the sum of all losses, over micro-batches and ranks, in the gradient buffers.

        `loss` returns a micro-batch's share of the global loss, with global denominators already in it. Megatron's
        schedule multiplies it by the context size and divides it by the number of micro-batches, and its DDP averages
        over data x context ranks: all of that is undone here and nowhere else. routes: as in `score`.
        Returns, on every rank, the sums over micro-batches and ranks of the metrics that `loss` returns, and the scores
        of the forward pass.
        """
        layout = self.groups.layout
        micros = self._pack(batch)
        undo = len(micros) * layout.data
        totals: dict[str, Tensor] = {}

        def scaled(micro: MicroBatch, output: MicroOutput) -> Tensor:
            # Context ranks hold copies of z and their gradients are summed: each copy gets its share.
            z_nD = output.z_nD
            if z_nD is not None and layout.context > 1:
                z_nD = _ScaleGradient.apply(z_nD, 1 / layout.context)
            value, metrics = loss(
                LossInput(logp_r=output.logp_r, response_r=micro.response_r, z_nD=z_nD, rollouts=micro.rollouts)
            )
            for name, metric in metrics.items():
                totals[name] = totals.get(name, torch.zeros((), device=metric.device)) + metric.detach().float()
            # A bucket is reduced once all its parameters have a gradient, also those that the loss does not depend on.
            outputs = output.logp_r.sum() if z_nD is None else output.logp_r.sum() + z_nD.sum()
            return value * undo + 0 * outputs

        if self._offloaded:
            self._offloaded.take_gradients()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        scores = self._run(batch, micros, loss=scaled, routes=routes)
        return self._sum_over_ranks(totals), scores

    def update(
        self,
        batch: TrainBatch,
        loss: LossFunction,
        *,
        representation_version: int | None = None,
        routes: Routes | None = None,
    ) -> Update:
        """Take one optimizer step on the batch; if any gradient is not finite, nothing changes and `applied` is False.

        Args:
            batch: The rollouts to train on.
            loss: As in `backward`.
            representation_version: The version of the weights that computed the representations that `loss` was built
                from. A gradient at other weights would be that of no loss.
            routes: As in `score`.

        Raises:
            ValueError: The policy's weights are of another version.
        """
        if representation_version not in (None, self.version):
            raise ValueError(
                f"representation_version = {representation_version}: must be {self.version} (the version of the "
                "policy's weights); score the batch again"
            )
        metrics, scores = self.backward(batch, loss, routes=routes)
        applied, grad_norm, lr, head_lr = self._gradients_finite(), float("nan"), 0.0, 0.0
        if applied:
            # Before the update, so that a warm-up does not waste its first update on a rate of zero.
            self.lr_schedule.step(increment=1)
            lr, head_lr = (self._rate(of_head=of_head) for of_head in (False, True))
            with self.optimizer_on_device():
                grad_norm = float(self.optimizer.step()[1])
            self.version += 1
        if self._offloaded:
            self._offloaded.drop_gradients()
        return Update(
            grad_norm=grad_norm,
            lr=lr,
            head_lr=head_lr,
            applied=applied,
            metrics=metrics,
            scores=scores,
            load_XE=self._routers.load() if self._routers else None,
        )

    def _rate(self, *, of_head: bool) -> float:
        """Return the present learning rate of the head, 0 without one, or of the model; the same on every rank.

        Megatron-Core gives all ranks the same parameter groups, and marks those without a rate of their own.
        """
        groups = self.optimizer.param_groups
        return next((group["lr"] for group in groups if group["default_config"] is not of_head), 0.0)

    def trunk_gradient(self, batch: TrainBatch, loss: LossFunction, *, routes: Routes | None = None) -> Tensor:
        """Return this rank's share of the gradient of `loss` on all weights but the head's, flat fp32; nothing changes.

        Every element is on one rank only, so that `dot` of such shares is the product of the whole gradients. routes:
        as in `score`.
        """
        self.backward(batch, loss, routes=routes)
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                if not self._is_counted(name, parameter):
                    parameter.main_grad.zero_()
        shards = []
        for buffer in self.gradient_buffers:
            group = buffer.data_parallel_group
            shards += [bucket.grad_data.chunk(group.size())[group.rank()] for bucket in buffer.buckets]
        return torch.cat(shards).float()

    def dot(self, left: Tensor, right: Tensor) -> float:
        """Return the dot product of two gradients whose shares all ranks hold. Collective over all ranks."""
        product = (left * right).sum(dtype=torch.float64).float()
        dist.all_reduce(product, group=self.groups.world)
        return product.item()

    def _is_counted(self, name: str, parameter: Any) -> bool:
        """Return whether a parameter belongs to the trunk and this rank's copy counts, where others hold it, too."""
        if "contrastive_head" in name:
            return False
        if getattr(parameter, "shared_embedding", False) and self.groups.layout.pipeline > 1:
            return self.groups.is_first_stage
        divided = getattr(parameter, "tensor_model_parallel", False) or not getattr(parameter, "allreduce", True)
        return divided or self.groups.tensor_rank == 0

    @property
    def gradient_buffers(self) -> list[Any]:
        """Return Megatron's gradient buffers; those of divided experts are reduced over other ranks than the rest."""
        return [buffer for chunk in self.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]

    def _gradients_finite(self) -> bool:
        """Return whether all gradients are finite, and their norm in fp32, too. Collective over all ranks."""
        norms = torch.stack([torch.linalg.vector_norm(buffer.grad_data) for buffer in self.gradient_buffers])
        square = norms.double().square().sum()
        dist.all_reduce(square, group=self.groups.world)
        return square.item() < torch.finfo(torch.float32).max

    def _sum_over_ranks(self, totals: dict[str, Tensor]) -> dict[str, float]:
        """Sum over data x context ranks of the last stage, then send the sums to the other stages."""
        names: list[Any] = [sorted(totals)]
        if self.groups.layout.pipeline > 1:
            dist.broadcast_object_list(
                names, src=self.groups.last_stage_global_rank, group=self.groups.pipeline, device=device()
            )
        values = torch.stack([totals[n] for n in names[0]]) if totals else torch.zeros(len(names[0]), device=device())
        if self.groups.is_last_stage:
            dist.all_reduce(values, group=self.groups.data_context)
        self._tell_stages(values)
        return dict(zip(names[0], values.tolist(), strict=True))


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None
