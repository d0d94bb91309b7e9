"""Build the parts that training and evaluation have in common: data, engine, weight sync, verifiers, engine check."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.data.domains import Domain, load_domains, token_problems
from megatron_mcpo.data.generators import CACHE
from megatron_mcpo.data.inspection import read_tokens
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import device
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.distributed.peers import agree, together
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.rewards import rules
from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.rollout.decoding import ResponseDecoder
from megatron_mcpo.rollout.server_client import wanted_description
from megatron_mcpo.rollout.vllm_engine import VllmEngine, check_hardware
from megatron_mcpo.rollout.vllm_server import VllmServers
from megatron_mcpo.storage import run_items
from megatron_mcpo.trainer.collector import Collector
from megatron_mcpo.trainer.engine_check import EngineCheck
from megatron_mcpo.trainer.jobs import EngineWorkshop, ServerWorkshop, Workshop
from megatron_mcpo.trainer.server_sync import ServerSync
from megatron_mcpo.weights.hf_io import check_files
from megatron_mcpo.weights.reshard_sync import FullTensorSync, WeightSync, choose_weight_sync

_COLLECTIVE_TIMEOUT_SECONDS = 86400.0
"""A rank may wait for as long as others work; where none does, the watchdog ends the job after run.collective_timeout.
"""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Hold what samples, verifies and evaluates on one rank."""

    engine: VllmEngine | VllmServers
    weight_sync: WeightSync
    collector: Collector
    engine_check: EngineCheck


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Hold what one rank has before it builds a model.

    stop_token_ids: the tokens that end a response
    notes: what a user should know of the data
    """

    groups: Groups
    tokenizer: PreTrainedTokenizerBase
    stop_token_ids: tuple[int, ...]
    domains: list[Domain]
    notes: list[str]


def load_inputs(config: Config, layout: Layout, model: ModelConfig, *, run: Path | None) -> Inputs:
    """Join the process group, check the machine and the model's files, and load the data; rank 0 makes the items.

    run: the folder of a run whose held-out items stay held out, as rank 0 sees it; None for a new division
    Raises ConfigError for everything that a user may have to correct, the same on every rank.
    """
    groups = parallel.init(layout, seed=config.run.seed, timeout_seconds=_COLLECTIVE_TIMEOUT_SECONDS)
    with together(groups):
        if not config.engine.servers:
            check_hardware(config.engine.quantization)
    check_files(Path(config.model.path), groups)
    with together(groups):
        tokens = read_tokens(config, model)
        splits = run_items.read_splits(run) if groups.rank == 0 else {}
    splits = agree(splits, groups)
    domains: list[Domain] | None = None
    for turn in (groups.rank == 0, groups.rank != 0):  # the other ranks find the items in the cache
        with together(groups):
            if turn:
                domains = load_domains(config, tokens.tokenizer, cache_dir=CACHE, splits=splits)
    assert domains is not None
    with together(groups):
        if problems := token_problems(domains, tokens.tokenizer, model.vocab_size):
            raise ConfigError(problems)
        notes = rules.where_code_runs(config, [domain.verifiers_of_rows for domain in domains])
    notes = [*notes, *(note for domain in domains for note in domain.notes)]
    return Inputs(
        groups=groups,
        tokenizer=tokens.tokenizer,
        stop_token_ids=tokens.stop_token_ids,
        domains=domains,
        notes=notes,
    )


@contextmanager
def build_parts(
    config: Config, model: ModelConfig, inputs: Inputs, weights: Policy | Reference, note: Callable[[str], None]
) -> Iterator[Parts]:
    """Start the engine and the verifiers; the engine holds `weights` after the first sync. Collective.

    The verifiers are killed however the block ends. The engine is closed only if it ends well: its ranks wait for each
    other, so one that fails must exit at once for torchrun to end the others.

    Args:
        config: the resolved configuration.
        model: the engine's model.
        inputs: from `load_inputs`.
        weights: what is synced to the engine and compared with it.
        note: is called on every rank with what a user should know.
    """
    groups = inputs.groups
    with ExitStack() as closing:
        scorer = _start_scorer(config, groups, closing)
        engine = _start_engine(config, model, groups)
        with together(groups):
            if scorer is not None:
                scorer.wait_ready()
        num_engines, my_engines = _engine_numbers(config, groups)
        weight_sync = _choose_weight_sync(config, weights, engine, note)
        restore = weight_sync.restore if isinstance(weight_sync, ServerSync) else weight_sync.sync
        collector = Collector(
            _workshop(engine, scorer, ResponseDecoder(inputs.tokenizer)),
            groups,
            num_engines=num_engines,
            my_engines=my_engines,
            stop_token_ids=inputs.stop_token_ids,
            restore=lambda: restore(engine.version),
            note=note,
        )
        prompts = [domain.held_out[0] for domain in inputs.domains]
        yield Parts(
            engine=engine,
            weight_sync=weight_sync,
            collector=collector,
            engine_check=EngineCheck(config, engine, collector, weights, groups, prompts),
        )
        engine.close()


def _workshop(engine: VllmEngine | VllmServers, scorer: Scorer | None, decoder: ResponseDecoder) -> Workshop:
    if isinstance(engine, VllmServers):
        return ServerWorkshop(engine, scorer, decoder)
    return EngineWorkshop(engine, scorer, decoder)


def _engine_numbers(config: Config, groups: Groups) -> tuple[int, range]:
    """Return how many engines there are, and which of them this rank uses; servers are divided over the ranks."""
    servers, ranks = len(config.engine.servers), config.engine.tensor_parallel
    if servers:
        return servers, range(groups.rank, servers, groups.world_size)
    return groups.world_size // ranks, range(groups.rank // ranks, groups.rank // ranks + 1)


def _start_scorer(config: Config, groups: Groups, closing: ExitStack) -> Scorer | None:
    """Start the verifiers on the first rank of every engine."""
    _, my_engines = _engine_numbers(config, groups)
    shares_engine = not config.engine.servers and groups.rank % config.engine.tensor_parallel > 0
    if shares_engine or not my_engines:
        return None
    scorer = Scorer(config)
    closing.callback(scorer.close)
    return scorer


def _start_engine(config: Config, model: ModelConfig, groups: Groups) -> VllmEngine | VllmServers:
    _, my_engines = _engine_numbers(config, groups)
    tag = agree(uuid.uuid4().hex[:12], groups)
    max_model_len = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.engine.servers:
        with together(groups):
            return VllmServers(
                [url for number, url in enumerate(config.engine.servers) if number in my_engines],
                model,
                others=[url for number, url in enumerate(config.engine.servers) if number not in my_engines],
                max_model_len=max_model_len,
                max_concurrent=config.engine.max_concurrent,
                in_flight=config.engine.in_flight,
                wanted=wanted_description(config, model),
                device=device(),
                tag=f"{config.run.name}-{tag}",
                routed_experts=config.model.replays_engine,
            )
    return VllmEngine(
        Path(config.model.path),
        dtype=config.model.dtype,
        quantization=config.engine.quantization,
        tensor_parallel=config.engine.tensor_parallel,
        max_model_len=max_model_len,
        max_concurrent=config.engine.max_concurrent,
        kv_cache_gib=config.engine.kv_cache_gib,
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        distributed=True,
        job_tag=tag,
        routed_experts=config.model.replays_engine,
        further=config.engine.options,
    )


def _choose_weight_sync(
    config: Config, weights: Policy | Reference, engine: VllmEngine | VllmServers, note: Callable[[str], None]
) -> WeightSync:
    """Choose how weights go to the engine, from the first sync to the last. Collective."""
    weight_sync: WeightSync
    reason: str | None = "engines in other processes take full tensors"
    if isinstance(engine, VllmServers):
        full = FullTensorSync(chunks=weights.chunks, model=weights.model_config, groups=weights.groups, engine=engine)
        weight_sync = ServerSync(
            full=full, engine=engine, groups=weights.groups, patience=config.engine.patience, note=note
        )
    else:
        weight_sync, reason = choose_weight_sync(
            weights.chunks, weights.model_config, weights.groups, engine, engine_ranks=config.engine.tensor_parallel
        )
    note(f"weight sync: {weight_sync.name}" + (f" ({reason})" if reason else ""))
    return weight_sync
