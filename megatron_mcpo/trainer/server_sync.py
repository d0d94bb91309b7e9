"""Bring the policy's weights into servers, of which some may be away."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_mcpo import progress
from megatron_mcpo.config.config import RunError
from megatron_mcpo.distributed.parallel import Groups
from megatron_mcpo.distributed.peers import agree, anywhere, gather_lists, gather_objects
from megatron_mcpo.rollout.vllm_server import VllmServers
from megatron_mcpo.weights.full_sync import TransferStats
from megatron_mcpo.weights.reshard_sync import FullTensorSync

LOOK_SECONDS = 5.0


class NoServers(RunError):
    """No engine server has answered for longer than engine.patience."""


@dataclass(kw_only=True)
class ServerSync:
    """A weight sync to every server that answers.

    patience: the longest wait, in seconds, while none does
    note: is called on every rank with what a user should know
    """

    full: FullTensorSync
    engine: VllmServers
    groups: Groups
    patience: float
    note: Callable[[str], None]
    _answers: int = -1
    _since: float = 0.0

    @property
    def name(self) -> str:
        """Return what the sync is called."""
        return self.full.name

    def sync(self, version: int) -> TransferStats:
        """Send the weights; return the bytes. Collective. Raises NoServers, the same on every rank."""
        start = time.monotonic()
        while True:
            stats = self.full.sync(version)
            for line in gather_lists(self.engine.news(), self.groups):
                self.note(line)
            if anywhere(self.engine.num_live > 0, self.groups):
                return stats
            self._wait_for_one(start)

    def restore(self, version: int) -> TransferStats:
        """Send the weights again once no server answers. Collective.

        Raises NoServers also where servers have come back, but answered no request, for longer than `patience`.
        """
        answers = sum(gather_objects(self.engine.num_answers, self.groups))
        if answers > self._answers:
            self._answers, self._since = answers, time.monotonic()
        self._check(time.monotonic() - self._since, "has answered a request")
        return self.sync(version)

    def _wait_for_one(self, start: float) -> None:
        """Wait until a server is there, until `patience` seconds after the start."""
        self.note(f"no engine server answers: waiting for one, at most {self.patience:g} s (engine.patience)")
        with progress.phase("wait for an engine server"):
            while not anywhere(self.engine.any_returns(), self.groups):
                self._check(time.monotonic() - start, "has answered")
                time.sleep(LOOK_SECONDS)
                progress.tick()

    def _check(self, seconds: float, what: str) -> None:
        """Raise NoServers on all ranks where the first one has waited for longer than `patience`. Collective."""
        waited = agree(seconds, self.groups)
        if waited > self.patience:
            reasons = gather_lists(self.engine.reasons(), self.groups)
            raise NoServers(
                f"no engine server {what} for {waited:.0f} s (engine.patience = {self.patience:g}): "
                + "; ".join(reasons)
                + ". Start one with mcpo serve, and resume the run with the same command"
            )
