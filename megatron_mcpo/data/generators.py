"""Get items of reasoning-gym generators, made in another process and cached as JSON lines."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_mcpo.config.config import ConfigError
from megatron_mcpo.config.domain_schema import SourceConfig

CACHE = Path(".cache/data")
"""The folder in which runs cache generated items."""

GENERATION_SECONDS = 600.0
"""Time limit of all generators together, with the import of reasoning-gym."""

FORMAT = 1
"""Part of the cache key: raise it when generator_worker.py makes other items from the same request."""


@dataclass(frozen=True, kw_only=True)
class ItemRequest:
    """`size` items of one source; `domain` is for messages."""

    domain: str
    source: SourceConfig
    size: int
    seed: int

    @property
    def message(self) -> dict[str, Any]:
        """Return the request to the generating process, which is also the key of the cache."""
        return {
            "generator": self.source.generator,
            "options": self.source.options,
            "seed": self.seed,
            "size": self.size,
        }


def generate(requests: Sequence[ItemRequest], *, cache_dir: Path) -> list[list[dict[str, Any]]]:
    """Return for each request up to `size` items (question, answer, metadata) with unique questions.

    There are fewer where the generator runs out. What `cache_dir` lacks is made in ONE subprocess and added; several
    ranks may do so at once. Raises ConfigError with a line for every source that failed, or where `cache_dir` can't be
    written.
    """
    paths = [cache_dir / _file_name(request) for request in requests]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    if missing:
        _check_writable(cache_dir)
        replies = _run_generators([requests[i].message for i in missing])
        failures = [_explain(requests[i], reply) for i, reply in zip(missing, replies, strict=True) if "error" in reply]
        if failures:
            raise ConfigError(failures)
        for i, reply in zip(missing, replies, strict=True):
            _write(paths[i], reply["items"])
    return [_read(path) for path in paths]


def _check_writable(folder: Path) -> None:
    """Create the cache. Raises ConfigError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            [
                f"domain.sources: generators need the folder {str(folder.absolute())!r}, which can't be written "
                f"({error.strerror or error}). Start in a folder that you may write to"
            ]
        ) from None


def _file_name(request: ItemRequest) -> str:
    key = {**request.message, "reasoning-gym": version("reasoning-gym"), "format": FORMAT}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{request.source.generator}-{digest[:20]}.jsonl"


def _run_generators(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-W", "ignore", "-m", "megatron_mcpo.data.generator_worker"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(messages),
            capture_output=True,
            encoding="utf-8",
            env=environment,
            timeout=GENERATION_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        names = ", ".join(message["generator"] for message in messages)
        limit = f"{GENERATION_SECONDS:g} s"
        raise ConfigError(
            [f"domain.sources: {names} made no items within {limit}; request fewer or easier items"]
        ) from None
    if done.returncode != 0:
        raise RuntimeError(f"the item generator ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def _explain(request: ItemRequest, reply: dict[str, Any]) -> str:
    return f"domain {request.domain!r}, source {request.source.generator!r}: {reply['error']}"


def _write(path: Path, items: list[dict[str, Any]]) -> None:
    """Write the items so that a reader sees no file or the whole one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", encoding="utf-8", delete=False) as file:
        file.writelines(json.dumps(item) + "\n" for item in items)
    os.replace(file.name, path)


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
