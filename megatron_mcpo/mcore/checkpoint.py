"""Saving and loading what a run needs to go on: model, head, optimizer, schedule, random states, and the loop's state.

A checkpoint holds Megatron's sharded files, which can be loaded under any parallel layout, state.json, the model's
configuration and tokenizer, with which it can be exported anywhere, and the manifest of
megatron_mcpo.storage.checkpoint_files. The manifest shows damage, not malice: who can write a checkpoint can write its
manifest. That is why no checkpoint is trusted: nothing in one can run code, whoever wrote it (mcore.pickles).
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.distributed.parallel import Groups, agree, gather_objects, together
from megatron_mcpo.mcore import megatron_fixes
from megatron_mcpo.mcore.model import unwrap
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.mcore.saving import Saving, reason
from megatron_mcpo.storage import checkpoint_files
from megatron_mcpo.storage.checkpoint_files import STATE
from megatron_mcpo.storage.files import step_files
from megatron_mcpo.weights import safe_unpickler
from megatron_mcpo.weights.mapping import parameters

FORMAT = 2
"""Of state.json and what stands in the sharded files. The manifest has no version: it is read before this is known."""

_NEW_RUN = "or start a new run with --run.resume never"


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """state: what `save` was given; layout: of the run that wrote it; passed_over: newer ones, and their damage"""

    step: int
    layout: str
    state: dict[str, Any]
    passed_over: tuple[str, ...]


@dataclass(kw_only=True)
class Checkpoints:
    """The checkpoints of one run. Methods but `warnings` and `close` are collective, and fail on all ranks or on none.

    vocabulary: fingerprint of the tokenizer, which a checkpoint's must equal
    assets: name -> content of the files besides weights that an export needs; on rank 0
    keep, keep_every: the newest `keep` stay, and besides them those of every keep_every-th step (0: none)
    in_background: `save` returns when this rank's state is copied to host memory, a thread writes it; needs that memory
    """

    policy: Policy
    folder: Path
    vocabulary: str
    assets: Mapping[str, bytes]
    keep: int
    keep_every: int
    in_background: bool
    _under_way: tuple[int, Saving] | None = field(default=None, init=False)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begin the checkpoint of `step`, of the state as it is now, once the one under way has its name.

        state: JSON-able, the same on every rank
        Without in_background it also is complete when this returns. Raises as `finish`, and OSError; the others are
        untouched then.
        """
        self.finish()
        header = json.dumps({**self._header(step), "state": state}).encode()
        saving = Saving(
            self.folder / f"step_{step:06d}",
            {**_sharded_state(self.policy, is_loading=False), "rng": _random_states(self.policy.groups)},
            {STATE: header, **self.assets},
            self.policy.groups,
        )
        self._under_way = step, saving
        saving.write(in_background=self.in_background)
        if not self.in_background:
            self.finish()

    def advance(self) -> None:
        """Give the checkpoint under way its name where all ranks have written theirs. Raises as `finish`."""
        if self._under_way and all(gather_objects(self._under_way[1].is_written, self.policy.groups)):
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint under way, give it its name, then delete those that are not kept any more.

        Raises ConfigError (no room on the disk) or RuntimeError where it could not be written: it is gone then, and the
        others are untouched. OSError where they can't be deleted.
        """
        if self._under_way is None:
            return
        step, saving = self._under_way
        saving.wait()
        self._under_way = None
        saving.publish()
        with together(self.policy.groups):
            if self.policy.groups.rank == 0:
                checkpoint_files.prune(self.folder, newest=step, keep=self.keep, keep_every=self.keep_every)

    def close(self) -> None:
        """Leave what is under way unfinished: for a process that is about to end."""
        if self._under_way:
            self._under_way[1].abandon()

    def warnings(self) -> list[str]:
        """What a user should know before the first save: it needs room for one more checkpoint than are kept."""
        more = self.keep + 1 - len(step_files(self.folder))
        size = self._approximate_bytes()
        free = shutil.disk_usage(self.folder).free
        if free >= size * more:
            return []
        return [
            f"WARNING: {self.folder}: the disk has {free:,} bytes left, and {more} more checkpoints of about {size:,} "
            f"bytes each have to fit (run.keep_checkpoints = {self.keep}, and the one being written): a save without "
            "room ends the run; free some, or lower run.keep_checkpoints"
        ]

    def load(self) -> Loaded | None:
        """Put the newest checkpoint whose files are whole into a policy that was just built; None where there is none.

        Every rank gets its random states back where the checkpoint was written by as many ranks; there is no telling
        which of them others should have.
        Raises ConfigError where there are checkpoints but none is whole, and where the newest whole one is not this
        run's: of another format, model or vocabulary, or with contents that are none of a checkpoint.
        """
        groups = self.policy.groups
        passed_over: list[str] = []
        for path in reversed(agree([path for _, path in step_files(self.folder)], groups)):
            damage = self._damage(path)
            if not damage:
                return self._load(path, tuple(passed_over))
            passed_over.append(f"{path} is damaged: {'; '.join(damage)}")
        if passed_over:
            raise ConfigError([*passed_over, f"no checkpoint is left to go on from; put one back, {_NEW_RUN}"])
        return None

    def _damage(self, path: Path) -> list[str]:
        """What is wrong with the files; every rank reads its share of them."""
        groups = self.policy.groups
        with together(groups):
            own = checkpoint_files.problems(path, part=groups.rank, num_parts=groups.world_size)
        return sorted({problem for part in gather_objects(own, groups) for problem in part})

    def _load(self, path: Path, passed_over: tuple[str, ...]) -> Loaded:
        policy, groups = self.policy, self.policy.groups
        with together(groups):
            header = self._read_header(path)
            _check_contents(path)
        with together(groups), _opening(path):
            # Also the first thing that Megatron loads, before its ranks wait for each other: there none fails alone.
            dist_checkpointing.load_common_state_dict(str(path))
        wanted = _sharded_state(policy, is_loading=True)
        if header["ranks"] == groups.world_size:
            wanted["rng"] = _random_states(groups)
        with policy.optimizer_on_device(), together(groups), _opening(path):
            loaded = dist_checkpointing.load(wanted, str(path))
            for number, chunk in enumerate(policy.chunks):
                unwrap(chunk).load_state_dict(loaded[f"model{number}"])
            policy.optimizer.load_state_dict(loaded["optimizer"])
            policy.lr_schedule.load_state_dict(loaded["lr_schedule"])
        if "rng" in loaded:
            torch.set_rng_state(loaded["rng"]["torch"])
            tensor_parallel.get_cuda_rng_tracker().set_states(loaded["rng"]["tracker"])
        policy.version = header["version"]
        return Loaded(step=header["step"], layout=header["layout"], state=header["state"], passed_over=passed_over)

    def _approximate_bytes(self) -> int:
        """Of a checkpoint: every weight, its fp32 copy and two moments; the head not counted."""
        rows = [
            parameter.mapping
            for parameter in parameters(self.policy.model_config, Layout())
            if not parameter.mapping.tied
        ]
        count = sum(torch.Size(shape).numel() for row in rows for shape in row.shapes)
        return count * (next(self.policy.chunks[0].parameters()).element_size() + 12)

    def _header(self, step: int) -> dict[str, Any]:
        """What state.json says besides the loop's state."""
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

    def _read_header(self, path: Path) -> dict[str, Any]:
        """state.json, of this format, model and vocabulary. Raises ConfigError with all that differs."""
        own = self._header(0)
        try:
            found = json.loads((path / STATE).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError([f"{path / STATE}: can't be read ({error}); put it back, {_NEW_RUN}"]) from error
        if not isinstance(found, dict) or type(found.get("format")) is not int or found["format"] != FORMAT:
            value = found.get("format") if isinstance(found, dict) else None
            raise ConfigError(
                [
                    f"{path / STATE}: format = {value!r}: this version reads {FORMAT}; go on with the version that "
                    f"wrote it, {_NEW_RUN}"
                ]
            )
        wrong = [key for key in (*own, "state") if type(found.get(key)) is not type(own.get(key, {}))]
        if wrong:
            raise ConfigError([f"{path / STATE}: {wrong[0]} = {found.get(wrong[0])!r}: no value of it; {_NEW_RUN[3:]}"])
        if found["experts_apart"] != own["experts_apart"]:
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
    """Fields of the model that are not the same."""
    return [
        f"model.{key} = {theirs.get(key)!r}, that of model.path has {ours.get(key)!r}"
        for key in sorted(theirs.keys() | ours.keys())
        if key not in theirs or key not in ours or theirs[key] != ours[key]
    ]


def _check_contents(path: Path) -> None:
    """Raises ConfigError where the table of contents could run code or names files that are not the checkpoint's."""
    try:
        metadata = safe_unpickler.read_metadata(path)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}; it was not opened: delete it, {_NEW_RUN}"]) from error
    shards = {str(getattr(info, "relative_path", info)) for info in metadata.storage_data.values()}
    lost = sorted(shards - set(checkpoint_files.names(path)))
    if lost:
        raise ConfigError([f"{path}: shard {lost[0]} is missing; put it back, {_NEW_RUN}"])


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """A block that opens sharded files. Raises ConfigError for whatever is wrong with them, code in them too."""
    try:
        with safe_unpickler.no_code():
            yield
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        fix = f"go back to the layout it was written under, or delete it to go on from the one before, {_NEW_RUN}"
        raise ConfigError([f"{path}: can't be loaded ({reason(error)}); {fix}"]) from error


def _sharded_state(policy: Policy, *, is_loading: bool) -> dict[str, Any]:
    """What is saved, described so that another layout can load it."""
    megatron_fixes.count_padding(policy.gradient_buffers)
    for part in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        if part.optimizer is not None:  # as where a rank has no parameters of its kind
            part.init_state_fn(part.optimizer, part.config)  # what the first update does; it may not have been yet
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "dp_cp_group": policy.groups.data_context,
        "chained_optim_avoid_prefix": True,
    }
    models = {
        f"model{number}": unwrap(chunk).sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(policy.chunks)
    }
    optimizer = policy.optimizer.sharded_state_dict(dict(models), is_loading=is_loading, metadata=metadata)
    return {**models, "optimizer": optimizer, "lr_schedule": policy.lr_schedule.state_dict()}


def _random_states(groups: Groups) -> ShardedObject:
    """This rank's random states. Nothing draws from them today: no layer drops out, and every rollout has a seed."""
    states = {"torch": torch.get_rng_state(), "tracker": tensor_parallel.get_cuda_rng_tracker().get_states()}
    return ShardedObject("rng", states, (groups.world_size,), (groups.rank,), replica_id=0)
