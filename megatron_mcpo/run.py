"""One rank of a run: builds the parts, trains, takes them down."""

import uuid
from pathlib import Path

import torch.distributed as dist
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_mcpo import parallel
from megatron_mcpo.canary import Canary
from megatron_mcpo.collect import Collector
from megatron_mcpo.config import Config
from megatron_mcpo.data.domains import load_domains
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.journal import Journal
from megatron_mcpo.layout import Layout
from megatron_mcpo.mcore import checkpoint
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.memory import trim
from megatron_mcpo.model_config import ModelConfig
from megatron_mcpo.parallel import Groups
from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.rollout.vllm_engine import VllmEngine
from megatron_mcpo.run_folder import RunFolder
from megatron_mcpo.trainer import Trainer

_COLLECTIVE_TIMEOUT_SECONDS = 1800.0
_CACHE = Path(".cache/data")


def run(config: Config, layout: Layout, model: ModelConfig) -> None:
    """Train as the configuration says. Raises ConfigError for what only shows when files are opened."""
    groups = parallel.init(layout, seed=config.run.seed, timeout_seconds=_COLLECTIVE_TIMEOUT_SECONDS)
    folder = _open_folder(config, groups)
    scorer = Scorer(config.rewards) if groups.rank % config.engine.tensor_parallel == 0 else None
    try:
        trainer, journal = _build(config, model, groups, folder, scorer)
        trainer.run()
        journal.finish()
        trainer.engine.close()
    finally:
        if scorer is not None:
            scorer.close()
    parallel.destroy()


def _build(
    config: Config, model: ModelConfig, groups: Groups, folder: RunFolder | None, scorer: Scorer | None
) -> tuple[Trainer, Journal]:
    tokenizer = AutoTokenizer.from_pretrained(config.model.path, trust_remote_code=False)
    domains = load_domains(config, tokenizer, cache_dir=_CACHE)
    stream = PromptStream(domains, weights=[d.weight for d in config.domain], seed=config.run.seed)
    policy = Policy(config, model, groups)
    reference = Reference(config, model, groups) if config.algorithm.kl_weight > 0 else None
    checkpoints = Path(_agree(str(folder.path / "checkpoints") if folder else "", groups))
    first_step = 0
    found = _agree(checkpoint.latest(checkpoints), groups)
    if found is not None:
        state = checkpoint.load(policy, found)
        stream.load_state_dict(state["stream"])
        first_step = int(state["step"])
    journal = _open_journal(config, folder, tokenizer, groups, first_step=first_step, resumed=found is not None)
    for note in (note for domain in domains for note in domain.notes):
        journal.note(note)
    engine = _engine(config, groups)
    with parallel.together(groups):
        if scorer is not None:
            scorer.wait_ready()
    collector = Collector(
        engine,
        scorer,
        tokenizer,
        groups,
        engine_ranks=config.engine.tensor_parallel,
        stop_token_ids=model.eos_token_ids,
    )
    canary = Canary(
        collector,
        policy,
        groups,
        [domain.held_out[0] for domain in domains],
        dtype=config.model.dtype,
        max_tokens=config.rollout.max_response_tokens,
        temperature=config.rollout.temperature,
    )
    trainer = Trainer(
        config,
        groups=groups,
        policy=policy,
        reference=reference,
        engine=engine,
        collector=collector,
        canary=canary,
        stream=stream,
        domains=domains,
        journal=journal,
        save=lambda step: _save(policy, stream, checkpoints, step),
        first_step=first_step,
    )
    return trainer, journal


def _engine(config: Config, groups: Groups) -> VllmEngine:
    return VllmEngine(
        Path(config.model.path),
        dtype=config.model.dtype,
        tensor_parallel=config.engine.tensor_parallel,
        max_model_len=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        max_concurrent=config.engine.max_concurrent,
        kv_cache_gib=config.engine.kv_cache_gib,
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        distributed=True,
        job_tag=_agree(uuid.uuid4().hex[:12], groups),
    )


def _save(policy: Policy, stream: PromptStream, checkpoints: Path, step: int) -> None:
    checkpoint.save(policy, checkpoints, step, {"stream": stream.state_dict()})
    trim()


def _open_folder(config: Config, groups: Groups) -> RunFolder | None:
    """The run folder on rank 0; where it can't be had, every rank raises."""
    folder = None
    with parallel.together(groups):
        if groups.rank == 0:
            folder = RunFolder.open(config)
    return folder


def _open_journal(
    config: Config,
    folder: RunFolder | None,
    tokenizer: PreTrainedTokenizerBase,
    groups: Groups,
    *,
    first_step: int,
    resumed: bool,
) -> Journal:
    evaluated = False
    if folder is not None:
        folder.truncate_after(first_step if resumed else -1)
        evaluated = folder.evaluated(first_step)
    evaluated = _agree(evaluated, groups)
    with parallel.together(groups):
        journal = Journal(config, folder, tokenizer, first_step=first_step, evaluated=evaluated)
    for note in folder.notes if folder else ():
        journal.note(note)
    if resumed:
        journal.note(f"going on after step {first_step}")
    return journal


def _agree[T](value: T, groups: Groups) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=groups.host)
    return box[0]
