"""Keep account of the servers of a rank: which of them answer, and how busy each is. Threads share one."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mcpo.rollout.engine import EngineError
from megatron_mcpo.rollout.server import Server

_LOOK_SECONDS = 1.0


@dataclass(eq=False, kw_only=True)
class Member:
    """A server and what is known of it.

    own: this rank sends weights to it
    lost: why it is not used; None while it is
    load: requests under way; busy: seconds with at least one, until `since` if there are any now
    """

    server: Server
    own: bool
    lost: str | None
    load: int = 0
    busy: float = 0.0
    since: float = 0.0


class Fleet:
    """The servers that this rank may use: its own, and those of other ranks while none of its own answers."""

    def __init__(self, own: Sequence[Server], others: Sequence[Server], *, limit: int):
        """limit: the most requests of this rank that a server works on at a time"""
        self._limit = limit
        self._condition = threading.Condition()
        self._own = [Member(server=server, own=True, lost=None) for server in own]
        self._others = [Member(server=server, own=False, lost="not looked for") for server in others]
        self._version: int | None = None
        self._ended: str | None = None
        self._answers = 0
        self._news: list[str] = []

    @property
    def size(self) -> int:
        """Return the number of all servers."""
        return len(self._own) + len(self._others)

    @property
    def live(self) -> list[Member]:
        """Return this rank's own servers that answer."""
        with self._condition:
            return [member for member in self._own if member.lost is None]

    @property
    def lost(self) -> list[Member]:
        """Return this rank's own servers that do not."""
        with self._condition:
            return [member for member in self._own if member.lost is not None]

    @property
    def watched(self) -> list[Member]:
        """Return the servers that have to be looked at: own ones in use; without one, all of the others."""
        with self._condition:
            return [member for member in self._own if member.lost is None] or list(self._others)

    @property
    def is_starved(self) -> bool:
        """Return whether no server can be used although no update is under way."""
        with self._condition:
            return self._version is not None and self._ended is None and not self._usable()

    @property
    def reasons(self) -> list[str]:
        """Return why this rank's servers are not used, a line for each that is not."""
        with self._condition:
            return [member.lost for member in self._own if member.lost is not None]

    def take(self) -> tuple[Member, int]:
        """Wait for a server that takes a request; return the least busy one and the version of its weights.

        Waits while an update is under way, or no server answers. Raises EngineError once `end` was called.
        """
        with self._condition:
            while True:
                if self._ended is not None:
                    raise EngineError(self._ended)
                member = min(self._usable(), key=lambda member: member.load, default=None)
                if member is not None and self._version is not None and member.load < self._limit:
                    member.since = member.since if member.load else time.monotonic()
                    member.load += 1
                    return member, self._version
                self._condition.wait(_LOOK_SECONDS)

    @property
    def answers(self) -> int:
        """Return how many requests were answered since the start."""
        with self._condition:
            return self._answers

    def give_back(self, member: Member, *, answered: bool) -> None:
        """Say that a request has ended."""
        with self._condition:
            self._answers += answered
            member.load -= 1
            if member.load == 0:
                member.busy += time.monotonic() - member.since
            self._condition.notify_all()

    def wait_idle(self, member: Member, *, seconds: float) -> bool:
        """Wait until none of this rank's requests is under way at a server, or it is lost; return whether."""
        with self._condition:
            return self._condition.wait_for(lambda: member.load == 0 or member.lost is not None, timeout=seconds)

    def hold(self) -> None:
        """Hand out no server until `release`."""
        with self._condition:
            self._version = None

    def release(self, version: int) -> None:
        """Hand out servers again, which hold this version."""
        with self._condition:
            for member in self._others:
                member.server.expect(version)
            self._version = version
            self._condition.notify_all()

    def drop(self, member: Member, error: Exception) -> None:
        """Do not use a server any more, whose requests then fail."""
        with self._condition:
            is_new = member.lost is None and self._ended is None
            member.lost = member.lost or str(error)
            if is_new and member.own:
                self._news.append(f"WARNING: {error}; the run goes on without this server")
            self._condition.notify_all()
        member.server.abort()

    def refuse(self, member: Member, reason: str) -> None:
        """Leave a lost server out although it is there; say why once."""
        with self._condition:
            if member.lost != reason:
                self._news.append(f"WARNING: {reason}")
            member.lost = reason

    def restore(self, member: Member) -> None:
        """Use a server again."""
        with self._condition:
            if member.lost is not None and member.own:
                self._news.append(f"engine server {member.server.url} is back")
            member.lost = None
            self._condition.notify_all()

    def end(self, reason: str) -> None:
        """Let all requests fail with this reason, also later ones; the first reason stays."""
        with self._condition:
            self._ended = self._ended or reason
            self._condition.notify_all()
        for member in (*self._own, *self._others):
            member.server.abort()

    def disconnect(self) -> None:
        """Leave all servers."""
        for member in (*self._own, *self._others):
            member.server.close()

    def news(self) -> list[str]:
        """Return what a user should know of since the last call."""
        with self._condition:
            news, self._news = self._news, []
            return news

    def busy_seconds(self) -> list[float]:
        """Return how long each of this rank's servers has had requests since the start."""
        with self._condition:
            now = time.monotonic()
            return [member.busy + (now - member.since if member.load else 0.0) for member in self._own]

    def _usable(self) -> list[Member]:
        own = [member for member in self._own if member.lost is None]
        return own or [member for member in self._others if member.lost is None]
