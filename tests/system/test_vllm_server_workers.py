"""A real server of two tensor-parallel workers on a CPU: every worker gets every push, is compared, and ends with it.

Not covered: GPUs and NCCL, workers on several hosts.
"""

from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.rollout.engine import Comparison, SamplingRequest
from megatron_mcpo.rollout.vllm_server import VllmServers
from tests.support import tiny_run
from tests.support import vllm_cases as cases
from tests.support.engine_server import Server
from tests.support.program import write_config

MAX_LEN = 204  # as in program.CONFIG
REQUESTS = [
    SamplingRequest(token_ids=prompt, num_samples=1, seed=0, max_tokens=8, temperature=0.0)
    for prompt in ([7, 8, 9], [30] * 40 + [9], list(range(20, 45)))
]
SWAPPED = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
pytestmark = pytest.mark.timeout(600)


def _alone(model: Path) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Greedy samples of an engine of one rank that reads the weights from the disk."""
    engine = cases.build(model, max_model_len=MAX_LEN, load_weights=True)
    return [(sample.token_ids, sample.logprobs) for (sample,) in engine.generate(REQUESTS)]


def test_both_workers_get_the_weights(tmp_path: Path) -> None:
    # Untrained: the trained one's ten digits are nearly equally likely, and rounding might choose between them.
    tiny_run.save_chat_model(tmp_path / "model", trained=False, spread=0.1)
    path = write_config(tmp_path / "model", tmp_path)
    path.write_text(path.read_text().replace("[engine]", "[engine]\ntensor_parallel = 2"))
    server = Server(path, tmp_path / "server.log")
    family: list[psutil.Process] = []
    try:
        expected = cases.run(_alone, tmp_path / "model", timeout=540)
        server.wait_ready()
        right: dict[str, Tensor] = cases.weights(tmp_path / "model")
        wrong = right | {SWAPPED[0]: right[SWAPPED[1]], SWAPPED[1]: right[SWAPPED[0]]}
        engine = VllmServers(
            [server.url],
            from_folder(tmp_path / "model"),
            tag="workers",
            max_model_len=MAX_LEN,
            max_concurrent=8,
            in_flight="wait",
            wanted={},
            device=torch.device("cpu"),
        )
        for version, weights in enumerate((wrong, right), start=1):
            engine.update(weights.items(), version)
            assert engine.compare(weights.items()) == Comparison(different=(), unread=(), num_tensors=len(right))
        assert sorted(engine.compare(wrong.items()).different) == SWAPPED
        found = [(sample.token_ids, sample.logprobs) for (sample,) in engine.generate(REQUESTS)]
        assert [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
        torch.testing.assert_close(*(torch.tensor([logp for _, logp in each]) for each in (found, expected)))

        family = psutil.Process(server.process.pid).children(recursive=True)
        assert len(family) >= 4, "an engine, its two workers, and what ends them"
        server.process.kill()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
    finally:
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        server.kill()
