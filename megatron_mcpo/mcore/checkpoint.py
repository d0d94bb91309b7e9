"""Save and load what a run needs to resume: model, head, optimizer, schedule, random states, and the loop's state.

A checkpoint holds Megatron's sharded files, which can be loaded under any parallel layout, state.json, the model's
configuration and tokenizer, with which it can be exported anywhere, and the manifest of
megatron_mcpo.storage.checkpoint_files. The manifest shows damage, not malice: whoever can write a checkpoint can write
its manifest. No checkpoint is trusted, therefore: nothing in one can run code (weights/safe_unpickler.py).
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.distributed.peers import agree, gather_lists, gather_objects, together
from megatron_mcpo.mcore import learning_rate, megatron_fixes
from megatron_mcpo.mcore.model import unwrap
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.mcore.saving import Saving, reason
from megatron_mcpo.storage import checkpoint_files
from megatron_mcpo.storage.checkpoint_files import STATE
from megatron_mcpo.storage.files import step_files
from megatron_mcpo.weights import safe_unpickler
from megatron_mcpo.weights.mapping import checkpoint_bytes

FORMAT = 3
"""The version of state.json and of the sharded files' content. The manifest has none, as it is read before this."""

_HEAD = "contrastive_head"
_EXTRA_STATE = re.compile(r"_extra_state\d*$")
"""End of the keys of what Transformer Engine's modules save beside their parameters: nothing, with the FP8 recipes that
can be chosen here (2.20.2). Experts that are multiplied together have one each, with a number from the second on. Plain
torch modules have no such keys, and each kind loads what the other has saved."""
_NEW_RUN = "or start a new run with --run.resume never"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint that was loaded.

    path: its folder, with the files that `save` was given
    state: what `save` was given; layout: of the run that wrote it
    skipped: a line for each newer checkpoint that is damaged
    """

    path: Path
    step: int
    layout: str
    state: dict[str, Any]
    skipped: tuple[str, ...]


@dataclass(kw_only=True)
class Checkpoints:
    """The checkpoints of one run. All methods but `warnings` and `close` are collective, and fail on all ranks or none.

    vocabulary: fingerprint of the tokenizer, which a checkpoint's must equal
    assets: name -> content of the files besides weights that an export needs; on rank 0
    keep, keep_every: the newest `keep` are kept, and those of every keep_every-th step besides (0: none)
    in_background: `save` returns when this rank's state is copied to host memory, and a thread writes it from there
    say: is called on rank 0 with warnings
    """

    policy: Policy
    folder: Path
    vocabulary: str
    assets: Mapping[str, bytes]
    keep: int
    keep_every: int
    in_background: bool
    say: Callable[[str], None]
    _under_way: tuple[int, Saving] | None = field(default=None, init=False)

    def save(self, step: int, state: dict[str, Any], files: Mapping[str, bytes] | None = None) -> None:
        """Finish the checkpoint under way, then begin that of `step` from the present state.

        Without in_background the checkpoint is complete when this returns. Raises what `finish` raises, and OSError;
        the other checkpoints are then untouched.

        state: JSON-able, the same on every rank; files: name -> content of what is too large for it, on rank 0
        """
        self.finish()
        header = json.dumps({**self._header(step), "state": state}).encode()
        saving = Saving(
            self.folder / f"step_{step:06d}",
            {**_sharded_state(self.policy, is_loading=False), "rng": _random_states(self.policy.groups)},
            {STATE: header, **(files or {}), **self.assets},
            self.policy.groups,
        )
        self._under_way = step, saving
        saving.write(in_background=self.in_background)
        if not self.in_background:
            self.finish()

    def advance(self) -> None:
        """Finish the checkpoint under way if all ranks have written their shards. Raises what `finish` raises."""
        if self._under_way and all(gather_objects(self._under_way[1].is_written, self.policy.groups)):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint under way, give it its name, then delete those that are no longer kept.

        Raises:
            ConfigError: The disk had too little room. What was written is deleted, other checkpoints are untouched.
            RuntimeError: It could not be written for another reason; the same holds.
        """
        if self._under_way is None:
            return
        step, saving = self._under_way
        saving.wait()
        self._under_way = None
        saving.publish()
        with together(self.policy.groups):
            if self.policy.groups.rank == 0:
                for warning in checkpoint_files.prune(
                    self.folder, newest=step, keep=self.keep, keep_every=self.keep_every
                ):
                    self.say(warning)

    def close(self) -> None:
        """Abandon the checkpoint under way, because the process is about to end."""
        if self._under_way:
            self._under_way[1].abandon()

    def warnings(self) -> list[str]:
        """Return a warning if the disk lacks room for the checkpoints that are kept and the one being written."""
        more = self.keep + 1 - len(step_files(self.folder))
        element_size = next(self.policy.chunks[0].parameters()).element_size()
        size = checkpoint_bytes(self.policy.model_config, element_size=element_size)
        free = shutil.disk_usage(self.folder).free
        if free >= size * more:
            return []
        return [
            f"WARNING: {self.folder}: the disk has {free:,} bytes free, but {more} more checkpoints of about {size:,} "
            f"bytes each have to fit (run.keep_checkpoints = {self.keep}, and the one being written); a save without "
            "room ends the run; free some space, or lower run.keep_checkpoints"
        ]

    def load(self) -> Loaded | None:
        """Load the newest undamaged checkpoint into a policy that was just built; return None if there is none.

        Every rank gets its random states back if the checkpoint was written by as many ranks; otherwise it is not known
        which rank should have which.

        Raises:
            ConfigError: There are checkpoints but all are damaged, or the newest undamaged one does not belong to this
                run: it has another format, model or vocabulary, or its contents are not those of a checkpoint.
        """
        groups = self.policy.groups
        skipped: list[str] = []
        for path in reversed(agree([path for _, path in step_files(self.folder)], groups)):
            damage = self._damage(path)
            if not damage:
                return self._load(path, tuple(skipped))
            skipped.append(f"{path} is damaged: {'; '.join(damage)}")
        if skipped:
            raise ConfigError([*skipped, f"no undamaged checkpoint is left to resume from; put one back, {_NEW_RUN}"])
        return None

    def load_weights(self, path: Path) -> bool:
        """Load the weights of a checkpoint, and nothing else of it, into a policy that was just built.

        Returns whether it had a head of the policy's shape; otherwise the policy's head stays as it is. Raises
        ConfigError where the checkpoint is damaged or of another format, model or vocabulary.
        """
        policy, groups = self.policy, self.policy.groups
        damage = self._damage(path)
        if damage:
            raise ConfigError([f"model.init_from: {path} is damaged: {'; '.join(damage)}. Choose another."])
        with together(groups):
            self._read_header(path, with_optimizer=False)
            saved = _check_contents(path).state_dict_metadata
        wanted: dict[str, Any] = _sharded_models(policy)
        heads = [tensor for part in wanted.values() for key, tensor in part.items() if _HEAD in key]
        fits = all(getattr(saved.get(head.key), "size", None) == torch.Size(head.global_shape) for head in heads)
        if not fits:
            wanted = {n: {k: v for k, v in part.items() if _HEAD not in k} for n, part in wanted.items()}
        with policy.optimizer_on_device(), together(groups), _opening(path):
            loaded = dist_checkpointing.load(wanted, str(path))
            _load_weights(policy, loaded, without=None if fits else _HEAD)
            policy.optimizer.reload_model_params()
        return all(gather_objects(fits, groups))

    def _damage(self, path: Path) -> list[str]:
        """Return what is wrong with a checkpoint's files; every rank reads its share of them."""
        groups = self.policy.groups
        with together(groups):
            own = checkpoint_files.problems(path, part=groups.rank, num_parts=groups.world_size)
        return sorted(set(gather_lists(own, groups)))

    def _load(self, path: Path, skipped: tuple[str, ...]) -> Loaded:
        policy, groups = self.policy, self.policy.groups
        with together(groups):
            header = self._read_header(path)
            _check_contents(path)
        with together(groups), _opening(path):
            # Megatron loads this first, too, but before its ranks wait for each other: here none fails alone.
            dist_checkpointing.load_common_state_dict(str(path))
        # Megatron-Core takes a step with zeros here, so that there are moments to load: on the device, as any step.
        with policy.optimizer_on_device():
            wanted = _sharded_state(policy, is_loading=True)
            if header["ranks"] == groups.world_size:
                wanted["rng"] = _random_states(groups)
            with together(groups), _opening(path):
                loaded = dist_checkpointing.load(wanted, str(path))
                _load_weights(policy, loaded)
                learning_rate.load_state(
                    policy.optimizer,
                    policy.lr_schedule,
                    loaded["optimizer"],
                    num_updates=loaded["lr_schedule"]["num_steps"],
                )
        if "rng" in loaded:
            torch.set_rng_state(loaded["rng"]["torch"])
            tensor_parallel.get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])
        policy.version = header["version"]
        return Loaded(path=path, step=header["step"], layout=header["layout"], state=header["state"], skipped=skipped)

    def _header(self, step: int) -> dict[str, Any]:
        """Return the content of state.json besides the loop's state."""
        return {
            "format": FORMAT,
            "step": step,
            "version": self.policy.version,
            "ranks": self.policy.groups.world_size,
            "layout": str(self.policy.groups.layout),
            "experts_apart": any(bool(chunk.expert_parallel_buffers) for chunk in self.policy.chunks),
            "model": json.loads(json.dumps(asdict(self.policy.model_config))),
            "vocabulary": self.vocabulary,
        }

    def _read_header(self, path: Path, *, with_optimizer: bool = True) -> dict[str, Any]:
        """Read state.json. Raises ConfigError for another format, model, vocabulary, or form of the optimizer."""
        own = self._header(0)
        try:
            found = json.loads((path / STATE).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError([f"{path / STATE}: can't be read ({error}); put it back, {_NEW_RUN}"]) from error
        if not isinstance(found, dict) or type(found.get("format")) is not int or found["format"] != FORMAT:
            value = found.get("format") if isinstance(found, dict) else None
            raise ConfigError(
                [
                    f"{path / STATE}: format = {value!r}: must be {FORMAT} (this version reads no other); resume "
                    f"with the version that wrote it, {_NEW_RUN}"
                ]
            )
        wrong = [key for key in (*own, "state") if type(found.get(key)) is not type(own.get(key, {}))]
        if wrong:
            raise ConfigError(
                [f"{path / STATE}: {wrong[0]} = {found.get(wrong[0])!r}: has the wrong type; {_NEW_RUN[3:]}"]
            )
        if with_optimizer and found["experts_apart"] != own["experts_apart"]:
            fix = "set parallel.expert above 1" if found["experts_apart"] else "set parallel.expert and tensor to 1"
            raise ConfigError(
                [
                    f"parallel: {own['layout']}: {path} was written as {found['layout']}, and Megatron-Core keeps the "
                    "optimizer's state of experts in another form where parallel.expert or parallel.tensor is above "
                    f"1; {fix}, {_NEW_RUN}"
                ]
            )
        problems = _differences(found["model"], own["model"])
        if found["vocabulary"] != self.vocabulary:
            problems.append(
                f"vocabulary = {found['vocabulary'][:12]!r}, the tokenizer of model.path has {self.vocabulary[:12]!r}"
            )
        if problems:
            fix = f"set model.path to the model that the run began with, {_NEW_RUN}"
            raise ConfigError([f"{path / STATE}: {problem}; {fix}" for problem in problems])
        return found


def _differences(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Return a line for every field in which two models differ."""
    return [
        f"model.{key} = {theirs.get(key)!r}, that of model.path has {ours.get(key)!r}"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in theirs or key not in ours or theirs[key] != ours[key]
    ]


def _check_contents(path: Path) -> Metadata:
    """Return the table of contents. Raises ConfigError if it could run code or names files that are not there."""
    try:
        metadata = safe_unpickler.read_metadata(path)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}; it was not opened; delete it, {_NEW_RUN}"]) from error
    shards = {str(getattr(info, "relative_path", info)) for info in metadata.storage_data.values()}
    lost = sorted(shards - set(checkpoint_files.names(path)))
    if lost:
        raise ConfigError([f"{path}: shard {lost[0]} is missing; put it back, {_NEW_RUN}"])
    return metadata


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Run a block that opens sharded files. Raises ConfigError for all that is wrong with them, also for code."""
    try:
        with safe_unpickler.no_code():
            yield
    except (Exception, CheckpointException) as error:  # torch's own does not derive from Exception
        fix = f"use the layout it was written under, or delete it to resume from the one before, {_NEW_RUN}"
        raise ConfigError([f"{path}: can't be loaded ({reason(error)}); {fix}"]) from error


def _sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    """Return the tensors to be saved, described so that another layout can load them."""
    megatron_fixes.count_padding(policy.gradient_buffers)
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        if part.optimizer is not None:  # a rank may have no parameters of its kind
            part.init_state_fn(part.optimizer, part.config)  # the first update does this, but may not have happened yet
    models = _sharded_models(policy)
    optimizer = policy.optimizer.sharded_state_dict(dict(models), is_loading=is_loading, metadata=_sharding(policy))
    return {**models, "optimizer": optimizer, "lr_schedule": policy.lr_schedule.state_dict()}


def _sharded_models(policy: Policy) -> dict[str, dict[str, Any]]:
    """Return the weights of every chunk, described so that another layout can load them."""
    chunks = [unwrap(chunk).sharded_state_dict(metadata=_sharding(policy)) for chunk in policy.chunks]
    return {
        f"model{number}": {key: value for key, value in chunk.items() if not _EXTRA_STATE.search(key)}
        for number, chunk in enumerate(chunks)
    }


def _load_weights(policy: Policy, loaded: dict[str, Any], *, without: str | None = None) -> None:
    """Hand out the weights that were loaded. without: what the keys of the parameters contain that stay as they are"""
    for number, chunk in enumerate(policy.chunks):
        missing, unexpected = unwrap(chunk).load_state_dict(loaded[f"model{number}"], strict=False)
        lost = [key for key in missing if not _EXTRA_STATE.search(key) and (without is None or without not in key)]
        if lost or unexpected:
            raise RuntimeError(f"parameters without values: {lost[:3]}; values without parameters: {unexpected[:3]}")


def _sharding(policy: Policy) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "dp_cp_group": policy.groups.data_context,
        "chained_optim_avoid_prefix": True,
    }


def _random_states(groups: Groups) -> ShardedObject:
    """Return this rank's random states. No computation uses them today: dropout is 0, and rollouts have seeds."""
    states = {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    return ShardedObject("rng", states, (groups.world_size,), (groups.rank,), replica_id=0)
