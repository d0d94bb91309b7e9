"""Check an engine in a process of its own on the same GPU: weight syncs to it, and a trainer that dies in one.

NCCL refuses two ranks of one host on one GPU. Both sides therefore claim to be different hosts and communicate through
sockets, which is slower than between GPUs. On a CPU they use gloo.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.engine import BF16_APART, apart, follows, same, speed
from benchmarks.gpu.models import MEDIUM, SMALL, sized
from benchmarks.gpu.outcome import Band, Outcome
from benchmarks.measure import ROOT
from megatron_mcpo.config.config import Config, dump, load
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.distributed.device import device
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.rollout.server_client import Client, wanted_description
from megatron_mcpo.rollout.vllm_server import VllmServers
from megatron_mcpo.rollout.weight_link import Bucket
from megatron_mcpo.weights.reshard_sync import FullTensorSync
from tests.support.engine_server import Server

_DEATHS = ("between buckets", "in a bucket")
"""Where a trainer dies: the server waits for nothing, or in a broadcast that never comes."""
_WAITING_SECONDS = 2.0
"""The time in which the server certainly begins to wait for a bucket."""
_EXIT_CODE = 3
"""Of the trainer that dies, so that one which failed earlier is noticed."""


@dataclass(frozen=True, kw_only=True)
class _Served:
    """A server, and a trainer's policy of the model that it serves."""

    server: Server
    config_path: Path
    config: Config
    learner: Policy

    def connect(self, tag: str) -> tuple[VllmServers, FullTensorSync]:
        """Connect as a trainer of this name."""
        sampler = _connect(self.config, self.server.url, tag)
        learner = self.learner
        sync = FullTensorSync(chunks=learner.chunks, model=learner.model_config, groups=learner.groups, engine=sampler)
        return sampler, sync


def servers() -> Outcome:
    """Check weight syncs to a server, which is a process of its own on the same GPU."""
    with _serving() as served:
        sampler, weight_sync = served.connect("gpu-check")
        weight_sync.sync(0)
        figures = speed(weight_sync, served.learner)
        difference = apart(served.learner, sampler)
        bands = (*same(served.learner, sampler), *follows(weight_sync, served.learner, sampler))
        sampler.close()
    low, high = BF16_APART
    return Outcome(
        bands=(*bands, Band(name="log-probs, mean difference", value=difference, low=low, high=high)), figures=figures
    )


def trainer_dies() -> Outcome:
    """Check that a server outlives trainers that die within a weight sync, and serves the next one."""
    bands: list[Band] = []
    figures: dict[str, float | str] = {}
    with _serving() as served:
        client = Client(served.server.url)
        for number, where in enumerate(_DEATHS):
            tag = f"dying-{number}"
            command = [sys.executable, "-m", "benchmarks.gpu.server", str(served.config_path), served.server.url, tag]
            died = subprocess.run([*command, where], cwd=ROOT, env={**os.environ, "NCCL_HOSTID": tag}).returncode
            left = client.get("/weight_info")["weight_version"] == f"{tag} version 1 (incomplete)"
            start = time.monotonic()
            sampler, weight_sync = served.connect(f"next-{number}")
            weight_sync.sync(1)
            figures[f"seconds until the next weights, {where}"] = time.monotonic() - start
            checks = (*same(served.learner, sampler), *follows(weight_sync, served.learner, sampler))
            bands += [
                Band(name=f"{where}: exit code of the trainer", value=died, low=_EXIT_CODE, high=_EXIT_CODE),
                Band(name=f"{where}: weights are marked incomplete", value=int(left), low=1, high=1),
                *(
                    Band(name=f"{where}: {each.name}", value=each.value, low=each.low, high=each.high)
                    for each in checks
                ),
            ]
            sampler.close()
    return Outcome(bands=tuple(bands), figures=figures)


@contextmanager
def _serving() -> Iterator[_Served]:
    os.environ["NCCL_HOSTID"] = "trainer"
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save_model(folder, sized(MEDIUM, SMALL), dtype=torch.bfloat16)
        engine = {"gpu_memory_utilization": 0.3, "kv_cache_gib": sized(1.0, 0.1)}
        config, config_path = models.settings(folder, engine=engine), folder / "config.toml"
        config_path.write_text(dump(config))
        learner = models.policy(config, models.alone())
        # Start it last: vLLM measures the GPU's memory at its start and requires that no one else changes it meanwhile.
        server = Server(config_path, folder / "log", {"NCCL_HOSTID": "server"})
        try:
            server.wait_ready()
            yield _Served(server=server, config_path=config_path, config=config, learner=learner)
        finally:
            server.kill()


def _connect(config: Config, url: str, tag: str) -> VllmServers:
    limits = config.rollout
    return VllmServers(
        [url],
        from_folder(Path(config.model.path)),
        max_model_len=limits.max_prompt_tokens + limits.max_response_tokens,
        max_concurrent=64,
        in_flight=config.engine.in_flight,
        wanted=wanted_description(config, from_folder(Path(config.model.path))),
        device=device(),
        tag=tag,
        bucket_bytes=sized(2**26, 2**18),
    )


def main(arguments: Sequence[str]) -> None:
    """Be the trainer that dies: send a third of the weights, then end, or first let the server wait for a bucket."""
    config_path, url, tag, where = arguments
    config = load(Path(config_path))
    tensors = {
        name: each.to(device()) for name, each in load_file(Path(config.model.path, "model.safetensors")).items()
    }

    def until_death() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors.items())[: len(tensors) // 3]
        if where == _DEATHS[1]:
            said = Bucket.of(list(tensors.items())[-2:], tag).as_json()
            Thread(target=Client(url).post, args=("/update_weights", {"update_info": said})).start()
            time.sleep(_WAITING_SECONDS)
        os._exit(_EXIT_CODE)  # as if it was killed: no connection and no group is closed

    _connect(config, url, tag).update(until_death(), 1)


if __name__ == "__main__":
    main(sys.argv[1:])
