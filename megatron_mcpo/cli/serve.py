"""Serve an engine: `mcpo serve CONFIG [--host HOST] [--port PORT] [--section.key VALUE ...]`.

The process prints the command of vLLM's OpenAI server, with the options that a run of the same configuration needs of
its `engine.servers`, and becomes that server. It has no weights until a run sends some.
"""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_mcpo.cli import options
from megatron_mcpo.config.config import Config, ConfigError, load
from megatron_mcpo.config.environment import vllm_on_cpu, vllm_problems
from megatron_mcpo.config.hf_config import from_folder
from megatron_mcpo.config.layout import Layout
from megatron_mcpo.config.model import layout_problems
from megatron_mcpo.config.model_rules import serving_problems
from megatron_mcpo.rollout.vllm_fields import option_problems
from megatron_mcpo.rollout.vllm_options import ENVIRONMENT, OPTIONS, PROCESS_GROUP, as_flags, engine_options

_QUIET = {
    # As in the trainer's process (vllm_cpu_fixes): vLLM announces and warns of what our options ask for. Uvicorn still
    # says when the server is ready; VLLM_LOGGING_LEVEL=INFO brings all of it back.
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_ON_CPU = {
    # As for this process (environment.hide_gpu): the command that is printed must work by itself.
    "CUDA_VISIBLE_DEVICES": "",
    # Workers of several servers would else be bound to the same cores, and to as many threads as there are cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # As in the trainer's process: helpers that vLLM would compile on first use run as they are.
    "TORCH_COMPILE_DISABLE": "1",
    # That no CUDA runtime is found, which a CPU does not need.
    "TORCH_LOGS": "-torch.utils.cpp_extension",
    # That vLLM binds memory to the one NUMA node.
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def main(arguments: Sequence[str]) -> int:
    """Become the server. Returns only the exit code of bad input."""
    parser = options.parser("serve", __doc__, example="examples/quickstart/config.toml --port 8001")
    options.add_config(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    known, overrides = parser.parse_known_args(arguments)
    if not 0 < known.port < 2**16:
        parser.error(f"--port {known.port}: must be from 1 to {2**16 - 1}")
    try:
        config = load(known.config, overrides)
        _check(config)
    except ConfigError as error:
        return options.refuse(error)
    environment, command = server_command(config, host=known.host, port=known.port)
    settings = [f"{key}={value}" for key, value in environment.items()]
    print(shlex.join(["env", *settings, *command]))
    print(f"http://{known.host}:{known.port} answers after the line `Application startup complete`", flush=True)
    # This process becomes the server: its child will be the server's.
    subprocess.Popen([sys.executable, "-m", "megatron_mcpo.rollout.server_guard", str(os.getpid())])
    os.execve(command[0], command, {**environment, **os.environ})


def server_command(config: Config, *, host: str, port: int) -> tuple[dict[str, str], list[str]]:
    """Return environment variables, which a user's own replace, and the command line of the server."""
    options = engine_options(
        Path(config.model.path).resolve(),
        dtype=config.model.dtype,
        quantization=config.engine.quantization,
        tensor_parallel=config.engine.tensor_parallel,
        max_model_len=config.rollout.max_prompt_tokens + config.rollout.max_response_tokens,
        max_concurrent=config.engine.max_concurrent,
        kv_cache_gib=config.engine.kv_cache_gib,
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        load_weights=False,
        routed_experts=config.model.replays_engine,
        further=config.engine.options,
        transport=PROCESS_GROUP,
        on_cpu=vllm_on_cpu(),
    ) | {
        "worker_extension_cls": "megatron_mcpo.rollout.vllm_transfer.WorkerExtension",
        # What a run compares with its own.
        **({"additional_config": {OPTIONS: config.engine.options}} if config.engine.options else {}),
        # Tokens in, tokens out is all that a run asks for; chat would need the tokenizer.
        "tokens_only": True,
        "disable_uvicorn_access_log": True,
        # By default every page that a browser on this machine shows may control the engine and read its answers.
        "allowed_origins": [],
        "middleware": "megatron_mcpo.rollout.browser_guard.BrowserGuard",
        "host": host,
        "port": port,
    }
    environment = {**ENVIRONMENT, **_QUIET, "VLLM_SERVER_DEV_MODE": "1", **(_ON_CPU if vllm_on_cpu() else {})}
    # The module says that it is deprecated in favour of `vllm serve`, which does not start where the package is called
    # vllm-cpu (vllm 0.30.0).
    module = ["-W", "ignore::DeprecationWarning", "-m", "vllm.entrypoints.openai.api_server"]
    return environment, [sys.executable, *module, *as_flags(options)]


def _check(config: Config) -> None:
    """Check that vLLM can serve the model. Raises ConfigError with all problems."""
    model = from_folder(Path(config.model.path), with_weights=False)
    problems = vllm_problems() + option_problems(config.engine.options, on_cpu=vllm_on_cpu())
    problems += layout_problems(model, Layout(), config.engine.tensor_parallel, engine_in_ranks=False)
    problems += serving_problems(config, model, in_servers=True, on_cpu=vllm_on_cpu())
    if problems:
        raise ConfigError(problems)
