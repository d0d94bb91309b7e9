"""What vLLM's own loaders put into the parameters of an engine rank: real models of vLLM, not yet packed for a CPU.

Runs in processes of their own (vllm_cases.run), one for every rank of the engine.
"""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_mcpo.rollout import vllm_cpu_fixes as fixes


def save_loaded(folder: Path, num_ranks: int, out: Path) -> None:
    """Load folder/model.safetensors as rank r of `num_ranks` and save all parameters to out/r.safetensors."""
    with fixes.quiet_import():
        from vllm.config import set_current_vllm_config
        from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader.utils import initialize_model
        from vllm.model_executor.models.registry import ModelRegistry
    rank = dist.get_rank() if dist.is_initialized() else 0
    arguments = EngineArgs(
        model=str(folder),
        dtype="float32",
        tensor_parallel_size=num_ranks,
        distributed_executor_backend="external_launcher" if num_ranks > 1 else "uni",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
    )
    # Registered as a class, a model is examined here, not by a process that first imports all of vLLM.
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    ModelRegistry.register_model(architecture, ModelRegistry.models[architecture].load_model_cls())
    # Ranks with different names for it share no memory: gloo is enough to form the groups.
    os.environ["VLLM_DIST_IDENT"] = f"rank {rank}"
    config = arguments.create_engine_config()
    method = "env://" if num_ranks > 1 else f"file://{out / 'rendezvous'}"
    with set_current_vllm_config(config):
        init_distributed_environment(num_ranks, rank, method, rank, backend="gloo")
        initialize_model_parallel(num_ranks)
        model = initialize_model(vllm_config=config)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        model.load_weights(load_file(folder / "model.safetensors").items())
    parameters = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(parameters, out / f"{rank}.safetensors")
    assert all(parameter.dtype is torch.float32 for parameter in parameters.values())
