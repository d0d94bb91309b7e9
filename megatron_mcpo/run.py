"""One rank of a run: builds the parts, trains, takes them down."""

import hashlib
import json
import uuid
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_mcpo import parallel
from megatron_mcpo.canary import Canary
from megatron_mcpo.collect import Collector
from megatron_mcpo.config import Config
from megatron_mcpo.data.domains import Domain, load_domains, load_tokenizer
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.journal import Journal
from megatron_mcpo.layout import Layout
from megatron_mcpo.mcore.checkpoint import Checkpoints, Loaded
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.memory import trim
from megatron_mcpo.model_config import ModelConfig
from megatron_mcpo.parallel import Groups, agree
from megatron_mcpo.plan import empty_terms
from megatron_mcpo.rewards.scorer import Scorer
from megatron_mcpo.rollout.vllm_engine import VllmEngine
from megatron_mcpo.run_folder import RunFolder
from megatron_mcpo.trainer import Trainer

_COLLECTIVE_TIMEOUT_SECONDS = 1800.0
_CACHE = Path(".cache/data")


def run(config: Config, layout: Layout, model: ModelConfig) -> None:
    """Train as the configuration says. Raises ConfigError for what only shows when files are opened."""
    groups = parallel.init(layout, seed=config.run.seed, timeout_seconds=_COLLECTIVE_TIMEOUT_SECONDS)
    tokenizer, domains = _load_data(config, groups)
    with ExitStack() as closing:
        folder = _open_folder(config, groups)
        scorer = _start_scorer(config, groups, closing)
        stream = PromptStream(domains, weights=[d.weight for d in config.domain], seed=config.run.seed)
        policy = Policy(config, model, groups)
        reference = Reference(config, model, groups) if config.algorithm.kl_weight > 0 else None
        checkpoints = Checkpoints(
            policy=policy,
            folder=Path(agree(str(folder.path / "checkpoints") if folder else "", groups)),
            vocabulary=_vocabulary(tokenizer),
            keep=config.run.keep_checkpoints,
            keep_every=config.run.keep_every,
        )
        loaded = checkpoints.load()
        if loaded is not None:
            stream.load_state_dict(loaded.state["stream"])
        journal = _open_journal(config, folder, tokenizer, groups, resumed=loaded.step if loaded else None)
        closing.callback(journal.close)
        for note in [
            *(_loading_notes(loaded, layout) if loaded else ()),
            *empty_terms(config),
            *(note for domain in domains for note in domain.notes),
        ]:
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
        trainer = Trainer(
            config,
            groups=groups,
            policy=policy,
            reference=reference,
            engine=engine,
            collector=collector,
            canary=Canary(config, collector, policy, groups, [domain.held_out[0] for domain in domains]),
            stream=stream,
            domains=domains,
            journal=journal,
            save=lambda step: _save(checkpoints, stream, step),
            first_step=loaded.step if loaded else 0,
        )
        trainer.run()
        journal.finish()
        engine.close()
    parallel.destroy()


def _load_data(config: Config, groups: Groups) -> tuple[PreTrainedTokenizerBase, list[Domain]]:
    """What a user may have to mend comes first. Rank 0 makes the items, the others find them in the cache."""
    with parallel.together(groups):
        tokenizer = load_tokenizer(config)
    loaded: list[Domain] | None = None
    for turn in (groups.rank == 0, groups.rank != 0):
        with parallel.together(groups):
            if turn:
                loaded = load_domains(config, tokenizer, cache_dir=_CACHE)
    assert loaded is not None
    return tokenizer, loaded


def _start_scorer(config: Config, groups: Groups, closing: ExitStack) -> Scorer | None:
    """On the first rank of every engine; killed when the run ends, however it ends."""
    if groups.rank % config.engine.tensor_parallel:
        return None
    scorer = Scorer(config.rewards)
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
        job_tag=agree(uuid.uuid4().hex[:12], groups),
    )


def _save(checkpoints: Checkpoints, stream: PromptStream, step: int) -> None:
    checkpoints.save(step, {"stream": stream.state_dict()})
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
    resumed: int | None,
) -> Journal:
    """resumed: the step of the checkpoint that the run goes on from"""
    first_step = resumed or 0
    evaluated = False
    if folder is not None:
        folder.truncate_after(-1 if resumed is None else resumed)
        evaluated = folder.evaluated(first_step)
    evaluated = agree(evaluated, groups)
    with parallel.together(groups):
        journal = Journal(config, folder, tokenizer, first_step=first_step, evaluated=evaluated)
    for note in folder.notes if folder else ():
        journal.note(note)
    if resumed is not None:
        journal.note(f"going on after step {first_step}")
    return journal
