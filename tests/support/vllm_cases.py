"""What test_vllm_engine.py runs in processes of their own: a process can hold engines of one topology only.

Every case is a function of the folder with the models; it asserts, or returns what the test asserts. Processes are
forks of a server that has imported vLLM, except `fresh` ones, which see the import too.
"""

import multiprocessing as mp
import multiprocessing.connection
import os
import re
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_mcpo.rollout import vllm_cpu_fixes
from megatron_mcpo.rollout.engine import NUM_SEEDS, Comparison, EngineError, SamplingRequest
from megatron_mcpo.rollout.vllm_engine import VllmEngine, cpu_fp8_problem

needs_fp8 = pytest.mark.skipif(cpu_fp8_problem() is not None, reason=f"FP8 on a CPU: {cpu_fp8_problem()}")
MAX_LEN = 96
JOB_TAG = "mcpo-test"
PROMPTS = [[1, 2, 3, 4], [7] * 40 + [9], list(range(20, 45)), [500, 3]]
_SERVER = mp.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "megatron_mcpo.trainer.setup",
        "matplotlib.figure",
        "vllm.entrypoints.llm",
        "vllm.v1.worker.cpu_worker",
        "vllm.model_executor.layers.quantization.online.base",
        "vllm.model_executor.models.qwen3",
    ]
)


def run(function: Callable[..., Any], *args: Any, ranks: int = 1, fresh: bool = False, timeout: float = 540) -> Any:
    """`function(*args)` in `ranks` processes with torchrun's environment: the result, or the list of them by rank."""
    context: Any = mp.get_context("spawn") if fresh else _SERVER
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # The ranks meet at a file: a port found free might be taken when rank 0 binds it.
    meeting = Path(tempfile.mkdtemp(prefix="vllm-ranks-")) / "store"
    processes, pipes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe(duplex=False)
        where = (rank, ranks, port, meeting)
        processes.append(context.Process(target=_rank_main, args=(theirs, where, function, args)))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        results = _collect(pipes, deadline=time.monotonic() + timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
        shutil.rmtree(meeting.parent)
    return results if ranks > 1 else results[0]


def _collect(pipes: list[Any], *, deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        open_pipes = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(open_pipes, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks hang: {sorted(set(range(len(pipes))) - set(results))}"
        for pipe in (pipe for pipe in open_pipes if pipe in ready):
            ok, value = pipe.recv()
            assert ok, value
            results[pipes.index(pipe)] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Any, where: tuple[int, int, int, Path], function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    rank, ranks, port, meeting = where
    try:
        if ranks > 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
            os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
        pipe.send((True, function(*args)))
        if ranks > 1:
            dist.barrier()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    finally:
        os._exit(0)


def build(
    path: Path,
    dtype: Any = "fp32",
    *,
    quantization: Any = "none",
    tensor_parallel: int = 1,
    max_model_len: int = MAX_LEN,
    load_weights: bool = False,
    routed_experts: bool = False,
) -> VllmEngine:
    return VllmEngine(
        path,
        dtype=dtype,
        quantization=quantization,
        tensor_parallel=tensor_parallel,
        max_model_len=max_model_len,
        max_concurrent=64,
        kv_cache_gib=0.05,
        gpu_memory_utilization=0.5,
        distributed=dist.is_initialized(),
        job_tag=JOB_TAG,
        load_weights=load_weights,
        routed_experts=routed_experts,
    )


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def sampled(engine: VllmEngine, **changes: Any) -> list[tuple[Any, Any]]:
    """Tokens and log-probs of seeded samples of all prompts."""
    options = {"num_samples": 2, "seed": 11, "max_tokens": 8} | changes
    groups = engine.generate([SamplingRequest(token_ids=prompt, **options) for prompt in PROMPTS])
    return [(sample.token_ids, sample.logprobs) for group in groups for sample in group]


def failure(function: Callable[[], Any]) -> str:
    """Return the message of the EngineError that the call must raise."""
    try:
        function()
    except EngineError as error:
        return str(error)
    raise AssertionError("no EngineError was raised")


def update_equals_fresh(folder: Path, family: str, dtype: str, quantization: str = "none") -> None:
    a, b = folder / f"{family}_a", folder / f"{family}_b"
    engine, seen = build(a, dtype, quantization=quantization), []
    for version, path in enumerate((a, b, a), start=1):
        engine.update(reversed(list(weights(path).items())), version)
        assert engine.version == version
        seen.append(sampled(engine))
    engine.close()
    fresh = []
    for path in (a, b):
        engine = build(path, dtype, quantization=quantization, load_weights=True)
        fresh.append(sampled(engine))
        engine.close()
    assert seen == [fresh[0], fresh[1], fresh[0]]
    assert fresh[0] != fresh[1]


def without_fixes(folder: Path, family: str) -> tuple[bool, tuple[str, ...]]:
    """Return whether an update without the repairs equals a fresh engine, and what the engine says it holds wrongly."""
    vllm_cpu_fixes.LAST_AFFECTED = (0, 0)
    a, b = folder / f"{family}_a", folder / f"{family}_b"
    engine = build(a)
    engine.update(weights(a).items(), 1)
    engine.update(weights(b).items(), 2)
    updated, wrong = sampled(engine), engine.compare(weights(b).items()).different
    engine.close()
    return updated == sampled(build(b, load_weights=True)), wrong


def fp8_without_fix(folder: Path) -> str:
    vllm_cpu_fixes.cpu_fp8 = nullcontext  # type: ignore[assignment]
    return failure(lambda: build(folder / "tied_a", "bf16", quantization="fp8_per_block"))


def process_state() -> dict[str, Any]:
    """Everything of the process that a trainer relies on."""
    import random
    import signal

    import numpy as np

    owners = {"torch": torch, "cuda": torch.cuda, "Tensor": torch.Tensor, "accelerator": torch.accelerator}
    functions = {
        f"{label}.{name}": value
        for label, owner in owners.items()
        for name, value in vars(owner).items()
        if callable(value)
    }
    return functions | {
        "torch rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(),
        "numpy rng": [str(part) for part in np.random.get_state()],
        "environment": dict(os.environ),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device(), torch.get_float32_matmul_precision()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "grad": torch.is_grad_enabled(),
        "signals": (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        "affinity": os.sched_getaffinity(0),
    }


def leaves_no_trace(folder: Path) -> None:
    import gc
    import sys

    import torch._dynamo  # wraps torch.manual_seed when it is first imported, whoever does it

    assert "vllm" not in sys.modules
    frozen = gc.get_freeze_count()
    path = folder / "tied_a"
    policy = weights(path)
    torch.manual_seed(123)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    before = process_state()
    engine: VllmEngine | None = None
    for step in ("construction", "update", "generation", "second update", "comparison", "second engine"):
        if engine is None or step == "second engine":
            engine = build(path)
        elif "update" in step:
            engine.update(policy.items(), 1)
        elif step == "generation":
            sampled(engine)
        else:
            assert engine.compare(policy.items()).different == ()
        after = process_state()
        changed = [key for key in before if before[key] != after.get(key)]
        added = [key for key in set(after) - set(before) if key.split(".")[0] in ("Tensor", "accelerator")]
        assert not changed and not added, (step, changed, added)
        assert gc.get_freeze_count() <= frozen, step
    assert engine is not None
    engine.close()
    gc.collect()


def follows_requests(folder: Path) -> None:
    engine, path = build(folder / "untied_a"), folder / "untied_a"
    assert "no weights" in failure(lambda: sampled(engine))
    num_bytes = engine.update(weights(path).items(), 7)
    assert num_bytes == sum(tensor.nbytes for tensor in weights(path).values())
    assert engine.generate([]) == []
    _check_seeds_and_greedy(engine)
    _check_stop_token(engine)
    _check_refused_requests(engine)
    _check_many_long_prompts(engine)
    engine.sleep()
    assert "asleep" in failure(lambda: sampled(engine))
    assert "asleep" in failure(lambda: engine.update(weights(path).items(), 8))
    engine.wake()
    assert "no weights" in failure(lambda: sampled(engine))
    engine.update(weights(path).items(), 8)
    assert len(sampled(engine)) == 2 * len(PROMPTS)
    engine.close()
    assert "closed" in failure(lambda: sampled(engine))


def _check_seeds_and_greedy(engine: VllmEngine) -> None:
    together = sampled(engine, num_samples=3, seed=40)
    alone = [sampled(engine, num_samples=1, seed=40 + k) for k in range(3)]
    for prompt in range(len(PROMPTS)):
        tokens = [together[3 * prompt + k][0] for k in range(3)]
        assert tokens == [alone[k][prompt][0] for k in range(3)]
        assert len(set(tokens)) == 3
    assert len(sampled(engine, num_samples=3, seed=NUM_SEEDS - 3)) == 3 * len(PROMPTS), "the largest seeds are taken"
    greedy = sampled(engine, temperature=0.0, num_samples=2, seed=1)
    assert greedy[::2] == greedy[1::2] == sampled(engine, temperature=0.0, num_samples=1, seed=2)


def _check_stop_token(engine: VllmEngine) -> None:
    request = SamplingRequest(token_ids=PROMPTS[0], num_samples=1, seed=3, max_tokens=8)
    ((free,),) = engine.generate([request])
    assert (free.stop_reason.value, len(free.token_ids), free.text, free.versions) == ("length", 8, "", (7,) * 8)
    stop = free.token_ids[3]
    place = free.token_ids.index(stop) + 1
    request = SamplingRequest(token_ids=PROMPTS[0], num_samples=1, seed=3, max_tokens=8, stop_token_ids=(stop,))
    ((stopped,),) = engine.generate([request])
    assert stopped.stop_reason.value == "stop"
    assert stopped.token_ids == free.token_ids[:place]
    assert stopped.logprobs == free.logprobs[:place]


def _check_many_long_prompts(engine: VllmEngine) -> None:
    """More prompt tokens than fit into one step: none may be cut into pieces, or seeded sampling fails on a CPU."""
    prompts = [[first] * 90 for first in range(100)]
    requests = [SamplingRequest(token_ids=ids, num_samples=1, seed=ids[0], max_tokens=3) for ids in prompts]
    together = engine.generate(requests)
    assert [len(sample.token_ids) for (sample,) in together] == [3] * 100
    assert engine.generate(requests[-1:])[0][0].token_ids == together[-1][0].token_ids


def _check_refused_requests(engine: VllmEngine) -> None:
    good = dict(token_ids=[1], num_samples=1, seed=0, max_tokens=4)
    unusable: tuple[dict[str, Any], ...] = (
        {"token_ids": []},
        {"num_samples": 0},
        {"max_tokens": 0},
        *({"temperature": temperature} for temperature in (-1.0, 0.009, 2.1, float("nan"))),
        *({"seed": seed} for seed in (-1, NUM_SEEDS)),
        {"max_tokens": MAX_LEN},
    )
    for bad in unusable:
        try:
            engine.generate([SamplingRequest(**good), SamplingRequest(**(good | bad))])  # type: ignore[arg-type]
        except ValueError:
            continue
        raise AssertionError(f"{bad} was accepted")
    assert len(engine.generate([SamplingRequest(**good)])) == 1  # type: ignore[arg-type]


def logprobs_for(folder: Path, temperature: float) -> list[tuple[Any, Any]]:
    """Sample from a model whose generation_config.json asks for something else and whose end token is common."""
    engine = build(folder / "untied_a")
    engine.update(weights(folder / "untied_a").items(), 1)
    return sampled(engine, temperature=temperature, max_tokens=12)


def experts_for(folder: Path) -> list[tuple[list[int], Any]]:
    """Tokens of every sample, and the experts that the engine says it gave to all but the last of them."""
    engine = build(folder / "experts_a", routed_experts=True)
    engine.update(weights(folder / "experts_a").items(), 1)
    requests = [SamplingRequest(token_ids=prompt, num_samples=2, seed=3, max_tokens=12) for prompt in PROMPTS]
    groups = zip(PROMPTS, engine.generate(requests), strict=True)
    samples = [([*prompt, *c.token_ids], c.experts) for prompt, completions in groups for c in completions]
    return [(tokens, None if experts is None else experts.tolist()) for tokens, experts in samples]


def refuses_bad_updates(folder: Path) -> dict[str, str]:
    """Message by kind of bad update. After each one a new engine of the process must work as if nothing happened."""
    path = folder / "tied_a"
    policy, messages = weights(path), {}
    q_proj = "model.layers.1.self_attn.q_proj.weight"

    def interrupted() -> Iterator[tuple[str, Tensor]]:
        yield from list(policy.items())[:4]
        raise RuntimeError("the exporter died")

    bad: dict[str, Any] = {
        "missing": [(name, tensor) for name, tensor in policy.items() if name != q_proj],
        "unknown": [*policy.items(), ("lm_head.weight", policy["model.embed_tokens.weight"])],
        "shape": [(name, tensor[:64] if name == q_proj else tensor) for name, tensor in policy.items()],
        "twice": [*policy.items(), (q_proj, policy[q_proj])],
        "exporter": interrupted(),
    }
    expected = None
    for kind, tensors in bad.items():
        engine = build(path)
        engine.update(policy.items(), 1)
        expected = expected or sampled(engine)
        assert sampled(engine) == expected, kind
        messages[kind] = failure(lambda engine=engine, tensors=tensors: engine.update(tensors, 2))  # type: ignore[misc]
        assert engine.version == 1
        for call in (lambda e=engine: sampled(e), lambda e=engine: e.update(policy.items(), 3)):
            assert messages[kind] in failure(call)
        engine.close()
    engine = build(path)
    engine.update(policy.items(), 1)
    assert sampled(engine) == expected
    return messages


def finds_what_differs(folder: Path, family: str, dtype: str, quantization: str) -> None:
    """Compare each tensor changed by itself, two swapped, one transposed; and find nothing where nothing differs."""
    path = folder / f"{family}_a"
    engine, policy = build(path, dtype, quantization=quantization), weights(path)

    def different(sent: dict[str, Tensor]) -> list[str]:
        found = engine.compare(sent.items())
        assert (found.unread, found.num_tensors) == ((), len(sent))
        return sorted(found.different)

    engine.update(policy.items(), 1)
    assert different(policy) == []
    for name, tensor in policy.items():
        damaged = tensor.clone()
        damaged.view(-1)[-1] += 4.0
        tied = ["lm_head.weight"] if family == "tied" and "embed" in name else []
        expected = sorted([name, *tied, *shares_block(name, quantization)])
        assert different(policy | {name: damaged}) == expected, name
    swapped = [name for name in policy if re.fullmatch(r"model\.layers\.[01]\..*(q_proj|3\.down_proj)\.weight", name)]
    pairs = [*zip(swapped[: len(swapped) // 2], swapped[len(swapped) // 2 :], strict=True)]
    square = "model.layers.1.self_attn.q_proj.weight"
    sent = dict(policy)
    for one, other in pairs:
        sent |= {one: policy[other], other: policy[one]}
    engine.update(sent.items(), 2)
    assert different(policy) == sorted(swapped) and len(pairs) == (2 if family == "experts" else 1)
    engine.update((policy | {square: policy[square].T}).items(), 3)
    assert different(policy) == [square]


def shares_block(name: str, quantization: str) -> list[str]:
    """Key and value have 64 rows each, one after the other: in FP8 they share their scale."""
    other = name.replace("k_proj", "v_proj") if "k_proj" in name else name.replace("v_proj", "k_proj")
    return [other] if quantization != "none" and other != name else []


def on_ranks(folder: Path, family: str, tensor_parallel: int) -> dict[str, Any]:
    """Take a few steps on every rank, with generators that differ between ranks."""
    torch.manual_seed(1000 + dist.get_rank())
    a, b = weights(folder / f"{family}_a"), weights(folder / f"{family}_b")
    engine = build(folder / f"{family}_a", tensor_parallel=tensor_parallel)
    segments = [name for name in os.listdir("/dev/shm") if name.startswith(JOB_TAG)]
    engine.update(a.items(), 1)
    first = sampled(engine)
    engine.update(b.items(), 2)
    second = sampled(engine)
    engine.update(a.items(), 3)
    assert sampled(engine) == first != second
    damaged = {name: tensor.clone() for name, tensor in a.items()}
    for name, tensor in damaged.items():
        tensor[-1] += 0.5
        mine = engine.compare([(name, tensor)]).different
        assert engine.compare([(name, a[name])]) == Comparison(different=(), unread=(), num_tensors=1), name
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
        assert name in [wrong for names in found for wrong in names], name
    engine.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    return {"a": first, "b": second, "segments": segments, "sum": total.item()}
