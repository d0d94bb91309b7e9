"""Train or evaluate on one rank: build the parts, use them, and shut them down."""

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_mcpo import progress
from megatron_mcpo.config.config import Config, ConfigError
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import ModelConfig
from megatron_mcpo.config.summary import empty_terms, slow_arithmetic
from megatron_mcpo.data.domains import splits_of
from megatron_mcpo.data.stream import PromptStream
from megatron_mcpo.distributed import parallel
from megatron_mcpo.distributed.device import device
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.distributed.peers import agree, together
from megatron_mcpo.distributed.watchdog import watching
from megatron_mcpo.mcore.checkpoint import Checkpoints, Loaded
from megatron_mcpo.mcore.policy import Policy, Reference
from megatron_mcpo.mcore.precision import layer_notes
from megatron_mcpo.reporting.run_logger import RunLogger
from megatron_mcpo.storage import run_items
from megatron_mcpo.storage.run_folder import RunFolder, run_that_goes_on
from megatron_mcpo.trainer.evaluation import evaluate, left_out
from megatron_mcpo.trainer.parts import Inputs, build_parts, load_inputs
from megatron_mcpo.trainer.rollout_stream import RolloutStream
from megatron_mcpo.trainer.trainer import Trainer
from megatron_mcpo.trainer.unfinished import FILE, Unfinished, decode
from megatron_mcpo.weights.hf_write import read_assets


def run(config: Config, layout: Layout, model: ModelConfig, *, verbose: bool) -> None:
    """Train as the configuration says. Raises ConfigError for errors that only show when files are opened."""
    with watching(_patience(config)):
        _train(config, layout, model, verbose=verbose)
    parallel.destroy()


def _train(config: Config, layout: Layout, model: ModelConfig, *, verbose: bool) -> None:
    inputs = load_inputs(config, layout, model, run=run_that_goes_on(config))
    groups = inputs.groups
    with ExitStack() as closing:
        folder = _open_folder(config, groups)
        notes: list[str] = []
        weights = [domain.weight for domain in config.domain]
        stream = PromptStream(inputs.domains, weights=weights, seed=config.run.seed, data=config.data)
        policy = Policy(config, model, groups)
        reference = Reference(config, model, groups) if config.algorithm.kl_weight > 0 else None
        checkpoints = _checkpoints(config, folder, policy, inputs.tokenizer, say=lambda text: run_logger.note(text))
        closing.callback(checkpoints.close)
        loaded = checkpoints.load()
        if loaded is None and config.model.init_from is not None:
            notes.append(_init_from(Path(config.model.init_from), checkpoints))
        notes += _begin_items(config, folder, stream, loaded, inputs)
        resumed = loaded.step if loaded else None
        run_logger = _open_run_logger(config, folder, inputs, resumed=resumed, verbose=verbose)
        closing.callback(run_logger.close)
        for note in [
            *notes,
            *(_loading_notes(loaded, layout) if loaded else ()),
            *checkpoints.warnings(),
            *empty_terms(config),
            *slow_arithmetic(config),
            *layer_notes(),
            *inputs.notes,
        ]:
            run_logger.note(note)
        parts = closing.enter_context(build_parts(config, model, inputs, policy, run_logger.note))
        rollouts = RolloutStream(config, parts.collector, stream, first_step=loaded.step if loaded else 0)
        for note in rollouts.resume(loaded.state.get("rollouts"), _read_unfinished(loaded, groups)) if loaded else ():
            run_logger.note(note)
        trainer = Trainer(
            config,
            groups=groups,
            policy=policy,
            reference=reference,
            engine=parts.engine,
            weight_sync=parts.weight_sync,
            collector=parts.collector,
            engine_check=parts.engine_check,
            rollouts=rollouts,
            domains=inputs.domains,
            run_logger=run_logger,
            checkpoints=checkpoints,
            first_step=loaded.step if loaded else 0,
        )
        trainer.run()
        _conclude(trainer, run_logger)


def measure(
    config: Config, layout: Layout, model: ModelConfig, note: Callable[[str], None], *, run: Path | None
) -> dict[str, float]:
    """Evaluate the model in model.path as a run does; the same metrics on every rank. No optimizer is built.

    note: called on every rank with what happens
    run: the folder of the run that the weights are of, if any
    Raises as `run`.
    """
    with watching(_patience(config)):
        inputs = load_inputs(config, layout, model, run=run)
        frozen = Reference(config, model, inputs.groups)
        for text in inputs.notes:
            note(text)
        with build_parts(config, model, inputs, frozen, note) as parts:
            parts.engine.wake()
            parts.weight_sync.sync(frozen.version)
            note(f"weight sync verified: {parts.engine_check.compare_weights()}")
            with progress.phase("evaluation"):
                metrics = evaluate(parts.collector, inputs.domains, config)
            for warning in left_out(metrics, inputs.domains):
                note(warning)
    parallel.destroy()
    return metrics


def _patience(config: Config) -> float:
    """Return the seconds without progress after which the job hangs: a verifier and its next worker may need more."""
    return max(config.run.collective_timeout, 1.5 * config.rewards.timeout)


def _conclude(trainer: Trainer, run_logger: RunLogger) -> None:
    """Mark the run as stopped or finished before any rank exits: a launcher may end the others when one exits."""
    with together(trainer.groups):
        if trainer.stopped:
            run_logger.stop(trainer.step)
        else:
            run_logger.finish()


def _init_from(path: Path, checkpoints: Checkpoints) -> str:
    """Load the weights that a new run begins with; return what a user should know of them."""
    has_head = checkpoints.load_weights(path)
    without_head = checkpoints.policy.head is not None and not has_head
    return f"weights of {path}" + ("; it has no head of this shape: the head begins random" if without_head else "")


def _begin_items(
    config: Config, folder: RunFolder | None, stream: PromptStream, loaded: Loaded | None, inputs: Inputs
) -> list[str]:
    """Continue the order of prompts, keep what the items are, and return what has changed of them.

    Raises ConfigError, the same on every rank, where items are missing that the run had.
    """
    with together(inputs.groups):
        if loaded is not None and loaded.step > config.run.steps:
            raise ConfigError(
                [f"run.steps = {config.run.steps}: must be at least {loaded.step} (the checkpoint's step). Raise it."]
            )
        changed = stream.load_state_dict(loaded.state["stream"]) if loaded is not None else []
        notes: list[str] = []
        if folder is not None:
            digests, allowed = stream.digests(), config.data.allow_changed
            if loaded is not None:
                notes = run_items.notes_of_changes(folder.path, digests, changed, allowed=allowed)
            if loaded is None or changed:
                run_items.write(folder.path, digests, splits_of(inputs.domains))
            folder.adopt_settings()
    return agree(notes, inputs.groups)


def _read_unfinished(loaded: Loaded, groups: Groups) -> list[Unfinished]:
    """Read the prompts that were under way at a checkpoint. Raises ConfigError, the same on every rank."""
    file, content = loaded.path / FILE, b"[]"
    with together(groups):
        if groups.rank == 0 and file.exists():
            content = file.read_bytes()
    content = agree(content, groups)
    try:
        return decode(content)
    except ValueError as error:
        raise ConfigError([f"{file}: can't be read ({error}). Delete it to resume without it."]) from error


def _loading_notes(loaded: Loaded, layout: Layout) -> list[str]:
    """Return what a user should know of the checkpoint that the run resumes from."""
    notes = [
        f"WARNING: {damaged}; skipping the damaged checkpoint; steps since the previous one are repeated"
        for damaged in loaded.skipped
    ]
    if loaded.layout != str(layout):
        notes.append(
            f"WARNING: the run was {loaded.layout} and resumes as {layout}: the prompts keep their order, but metrics "
            "agree up to rounding, not bit for bit"
        )
    return notes


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of all tokens with their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def _checkpoints(
    config: Config,
    folder: RunFolder | None,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    *,
    say: Callable[[str], None],
) -> Checkpoints:
    """Return what saves and loads checkpoints: in the background on a GPU; on a CPU the copies take too much memory."""
    groups = policy.groups
    with together(groups):
        assets = read_assets(Path(config.model.path)) if groups.rank == 0 else {}
    return Checkpoints(
        policy=policy,
        folder=Path(agree(str(folder.path / "checkpoints") if folder else "", groups)),
        vocabulary=_vocabulary(tokenizer),
        assets=assets,
        keep=config.run.keep_checkpoints,
        keep_every=config.run.keep_every,
        in_background=device().type != "cpu",
        say=say,
    )


def _open_folder(config: Config, groups: Groups) -> RunFolder | None:
    """Open the run folder on rank 0; where that fails, every rank raises."""
    folder = None
    with together(groups):
        if groups.rank == 0:
            folder = RunFolder.open(config)
    return folder


def _open_run_logger(
    config: Config,
    folder: RunFolder | None,
    inputs: Inputs,
    *,
    resumed: int | None,
    verbose: bool,
) -> RunLogger:
    """Open the logger and drop what was logged later than `resumed`, the step of the checkpoint to resume from."""
    first_step = resumed or 0
    evaluated, num_dropped = False, 0
    if folder is not None:
        num_dropped = folder.truncate_after(-1 if resumed is None else resumed)
        evaluated = folder.evaluated(first_step)
    evaluated = agree(evaluated, inputs.groups)
    with together(inputs.groups):
        run_logger = RunLogger(
            config,
            folder,
            inputs.tokenizer,
            stop_token_ids=inputs.stop_token_ids,
            first_step=first_step,
            evaluated=evaluated,
            verbose=verbose,
        )
    for note in folder.notes if folder else ():
        run_logger.note(note)
    if resumed is not None:
        run_logger.note(f"resuming after step {first_step}")
    if num_dropped:
        since = "the checkpoint" if resumed is not None else "the start, before any checkpoint"
        steps = "1 step" if num_dropped == 1 else f"{num_dropped} steps"
        run_logger.note(f"{steps} logged since {since}: dropped and repeated")
    return run_logger
