"""One rank of a run, or of an evaluation: builds the parts, uses them, takes them down."""

import hashlib
import json
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_mcpo.config.config import Config
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.config.summary import empty_terms, slow_arithmetic
from megatron_mcpo.data.domains import Domain, load_domains, load_tokenizer
from megatron_mcpo.data.generators import CACHE
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import device
from megatron_mcpo.distributed.parallel import Groups, agree
from megatron_mcpo.mcore.checkpoint import Checkpoints, Loaded
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.reporting.run_logger import RunLogger
from megatron_mcpo.rewards import rules
from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.rollout.vllm_engine import VllmEngine, check_hardware
from megatron_mcpo.rollout.vllm_server import VllmServers
from megatron_mcpo.storage.run_folder import RunFolder
from megatron_mcpo.trainer.collector import Collector
from megatron_mcpo.trainer.engine_check import EngineCheck
from megatron_mcpo.trainer.evaluation import evaluate
from megatron_mcpo.trainer.trainer import Trainer
from megatron_mcpo.weights.hf_io import check_files
from megatron_mcpo.weights.hf_write import read_assets
from megatron_mcpo.weights.reshard_sync import FullTensorSync, WeightSync, choose_weight_sync

_COLLECTIVE_TIMEOUT_SECONDS = 1800.0


def run(config: Config, layout: Layout, model: ModelConfig) -> None:
    """Train as the configuration says. Raises ConfigError for what only shows when files are opened."""
    groups = parallel.init(layout, seed=config.run.seed, timeout_seconds=_COLLECTIVE_TIMEOUT_SECONDS)
    _check(config, groups)
    tokenizer, domains, data_notes = _load_data(config, groups)
    with ExitStack() as closing:
        folder = _open_folder(config, groups)
        scorer = _start_scorer(config, groups, closing)
        weights = [domain.weight for domain in config.domain]
        stream = PromptStream(domains, weights=weights, seed=config.run.seed, data=config.data)
        policy = Policy(config, model, groups)
        reference = Reference(config, model, groups) if config.algorithm.kl_weight > 0 else None
        checkpoints = _checkpoints(config, folder, policy, tokenizer)
        closing.callback(checkpoints.close)
        loaded = checkpoints.load()
        if loaded is not None:
            stream.load_state_dict(loaded.state["stream"])
        run_logger = _open_run_logger(config, folder, tokenizer, groups, resumed=loaded.step if loaded else None)
        closing.callback(run_logger.close)
        for note in [
            *(_loading_notes(loaded, layout) if loaded else ()),
            *checkpoints.warnings(),
            *empty_terms(config),
            *slow_arithmetic(config),
            *data_notes,
        ]:
            run_logger.note(note)
        engine = _engine(config, model, groups)
        collector = _collector(config, model, groups, engine, scorer, tokenizer)
        trainer = Trainer(
            config,
            groups=groups,
            policy=policy,
            reference=reference,
            engine=engine,
            weight_sync=_weight_sync(config, policy, engine, run_logger.note),
            collector=collector,
            engine_check=EngineCheck(config, collector, policy, groups, [domain.held_out[0] for domain in domains]),
            stream=stream,
            domains=domains,
            run_logger=run_logger,
            checkpoints=checkpoints,
            first_step=loaded.step if loaded else 0,
        )
        trainer.run()
        _conclude(trainer, run_logger)
        engine.close()
    parallel.destroy()


def measure(config: Config, layout: Layout, model: ModelConfig, note: Callable[[str], None]) -> dict[str, float]:
    """Evaluate the model in model.path as a run does; the same figures on every rank. No optimizer is built.

    note: told on every rank what happens. Raises as `run`.
    """
    groups = parallel.init(layout, seed=config.run.seed, timeout_seconds=_COLLECTIVE_TIMEOUT_SECONDS)
    _check(config, groups)
    tokenizer, domains, data_notes = _load_data(config, groups)
    with ExitStack() as closing:
        scorer = _start_scorer(config, groups, closing)
        frozen = Reference(config, model, groups)
        for text in data_notes:
            note(text)
        engine = _engine(config, model, groups)
        collector = _collector(config, model, groups, engine, scorer, tokenizer)
        weight_sync = _weight_sync(config, frozen, engine, note)
        engine.wake()
        weight_sync.sync(frozen.version)
        engine_check = EngineCheck(config, collector, frozen, groups, [domain.held_out[0] for domain in domains])
        note(f"the engine holds what it was sent: {engine_check.compare_weights()}")
        figures = evaluate(collector, domains, config)
        engine.close()
    parallel.destroy()
    return figures


def _check(config: Config, groups: Groups) -> None:
    """Raises ConfigError for what only a rank can see to be wrong with the machine or the model's files."""
    with parallel.together(groups):
        if not config.engine.servers:
            check_hardware(config.engine.quantization)
    check_files(Path(config.model.path), groups)


def _conclude(trainer: Trainer, run_logger: RunLogger) -> None:
    """No rank leaves before the run has its mark: where one has left, a launcher may end the others."""
    with parallel.together(trainer.groups):
        if trainer.stopped:
            run_logger.stop(trainer.step)
        else:
            run_logger.finish()


def _load_data(config: Config, groups: Groups) -> tuple[PreTrainedTokenizerBase, list[Domain], list[str]]:
    """What a user may have to mend comes first, and what one should know of the data and where their code runs.

    Rank 0 makes the items, the others find them in the cache.
    """
    with parallel.together(groups):
        tokenizer = load_tokenizer(config)
    loaded: list[Domain] | None = None
    for turn in (groups.rank == 0, groups.rank != 0):
        with parallel.together(groups):
            if turn:
                loaded = load_domains(config, tokenizer, cache_dir=CACHE)
    assert loaded is not None
    with parallel.together(groups):
        place = rules.where_code_runs(config, [domain.verifiers_of_rows for domain in loaded])
    return tokenizer, loaded, [*place, *(note for domain in loaded for note in domain.notes)]


def _engine_numbers(config: Config, groups: Groups) -> tuple[int, range]:
    """How many engines there are, and which of them this rank uses; servers are dealt out to the ranks."""
    servers, ranks = len(config.engine.servers), config.engine.tensor_parallel
    if servers:
        return servers, range(groups.rank, servers, groups.world_size)
    return groups.world_size // ranks, range(groups.rank // ranks, groups.rank // ranks + 1)


def _start_scorer(config: Config, groups: Groups, closing: ExitStack) -> Scorer | None:
    """On the first rank of every engine; killed when the run ends, however it ends."""
    _, my_engines = _engine_numbers(config, groups)
    shares_engine = not config.engine.servers and groups.rank % config.engine.tensor_parallel > 0
    if shares_engine or not my_engines:
        return None
    scorer = Scorer(config)
    closing.callback(scorer.close)
    return scorer


def _loading_notes(loaded: Loaded, layout: Layout) -> list[str]:
    """What a user should know of the checkpoint that the run goes on from."""
    notes = [f"WARNING: {damaged}; passed over, its steps are run again" for damaged in loaded.passed_over]
    if loaded.layout != str(layout):
        notes.append(
            f"WARNING: the run was {loaded.layout}, it goes on as {layout}: the same prompts in the same order, but "
            "figures that agree up to rounding, not bit for bit"
        )
    return notes


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all tokens with their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _collector(
    config: Config,
    model: ModelConfig,
    groups: Groups,
    engine: VllmEngine | VllmServers,
    scorer: Scorer | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Collector:
    """Once every rank's verifiers are ready. Collective."""
    with parallel.together(groups):
        if scorer is not None:
            scorer.wait_ready()
    num_engines, my_engines = _engine_numbers(config, groups)
    return Collector(
        engine,
        scorer,
        tokenizer,
        groups,
        num_engines=num_engines,
        my_engines=my_engines,
        stop_token_ids=model.eos_token_ids,
    )


def _engine(config: Config, model: ModelConfig, groups: Groups) -> VllmEngine | VllmServers:
    _, my_engines = _engine_numbers(config, groups)
    tag = agree(uuid.uuid4().hex[:12], groups)
    max_model_len = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if config.engine.servers:
        with parallel.together(groups):
            return VllmServers(
                [config.engine.servers[number] for number in my_engines],
                model,
                max_model_len=max_model_len,
                max_concurrent=config.engine.max_concurrent,
                device=device(),
                tag=f"{config.run.name}-{tag}",
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
    )


def _weight_sync(
    config: Config, policy: Policy | Reference, engine: VllmEngine | VllmServers, note: Callable[[str], None]
) -> WeightSync:
    """How weights go to the engine, from the first push to the last. Collective."""
    weight_sync: WeightSync
    reason: str | None = "engines in other processes take full tensors"
    if isinstance(engine, VllmServers):
        weight_sync = FullTensorSync(
            chunks=policy.chunks, model=policy.model_config, groups=policy.groups, engine=engine
        )
    else:
        weight_sync, reason = choose_weight_sync(
            policy.chunks, policy.model_config, policy.groups, engine, engine_ranks=config.engine.tensor_parallel
        )
    note(f"weights go to the engine by {weight_sync.name}" + (f": {reason}" if reason else ""))
    return weight_sync


def _checkpoints(
    config: Config, folder: RunFolder | None, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> Checkpoints:
    """Written beside training on a GPU; on a CPU, copies would take the memory that the run itself needs."""
    groups = policy.groups
    with parallel.together(groups):
        assets = read_assets(Path(config.model.path)) if groups.rank == 0 else {}
    return Checkpoints(
        policy=policy,
        folder=Path(agree(str(folder.path / "checkpoints") if folder else "", groups)),
        vocabulary=_vocabulary(tokenizer),
        assets=assets,
        keep=config.run.keep_checkpoints,
        keep_every=config.run.keep_every,
        in_background=device().type != "cpu",
    )


def _open_folder(config: Config, groups: Groups) -> RunFolder | None:
    """The run folder on rank 0; where it can't be had, every rank raises."""
    folder = None
    with parallel.together(groups):
        if groups.rank == 0:
            folder = RunFolder.open(config)
    return folder


def _open_run_logger(
    config: Config,
    folder: RunFolder | None,
    tokenizer: PreTrainedTokenizerBase,
    groups: Groups,
    *,
    resumed: int | None,
) -> RunLogger:
    """resumed: the step of the checkpoint that the run goes on from"""
    first_step = resumed or 0
    evaluated = False
    if folder is not None:
        folder.truncate_after(-1 if resumed is None else resumed)
        evaluated = folder.evaluated(first_step)
    evaluated = agree(evaluated, groups)
    with parallel.together(groups):
        run_logger = RunLogger(config, folder, tokenizer, first_step=first_step, evaluated=evaluated)
    for note in folder.notes if folder else ():
        run_logger.note(note)
    if resumed is not None:
        run_logger.note(f"going on after step {first_step}")
    return run_logger
