"""Time a step of TRL's GRPOTrainer and one of this trainer, one after the other, on the same prompts.

`.venv/bin/python -m benchmarks.peers.trl_step [--json] [--out benchmarks/results/NAME.json]`
The quick start's model in the dtype that this CPU multiplies fastest, GRPO with a reference model, 64 rollouts of about
150 tokens, all responses of one length. TRL is installed into an environment of its own, .cache/peers/trl, which takes
what it shares with this project (torch, transformers) from the environment that runs this; it samples by transformers,
as it does without a GPU. Each side is a process of its own. The first step of each warms up and does not count.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, options, write_rows
from megatron_mcpo.config.config import load

TRL = "1.16.0"
_FOLDER = ROOT / ".cache" / "peers" / "trl"
_HERE = Path(__file__).parent
_STEPS = 3
PROMPTS, SAMPLES, RESPONSE_TOKENS, KL_WEIGHT = 8, 8, 40, 0.001
_GRPO = ("--contrastive.cross_domain_weight=0", "--contrastive.in_domain_weight=0")


def main(arguments: Sequence[str]) -> int:
    return write_rows("trl_step", rows(), options(__doc__).parse_args(arguments))


def rows() -> Iterator[dict[str, Any]]:
    """Yield one row: seconds of a step on every side, peak memory, and what TRL takes over what this trainer takes."""
    python = environment()
    ours = {
        name: _ours(overrides, share_prompts=share)
        for name, overrides, share in (("ours", _GRPO, True), ("ours_unshared", _GRPO, False), ("ours_mcpo", (), True))
    }
    config = load(ROOT / "examples" / "quickstart" / "config.toml")
    trl = _run(
        [str(python), str(_HERE / "trl_side.py")],
        {
            "model": str(ROOT / config.model.path),
            "dtype": config.model.dtype,
            "prompts": ours["ours"]["prompts"],
            "samples": SAMPLES,
            "response_tokens": RESPONSE_TOKENS,
            "learning_rate": config.optimizer.lr,
            "kl_weight": KL_WEIGHT,
            "threads": os.cpu_count() or 1,
        },
    )
    assert trl["prompt_tokens"] == ours["ours"]["prompt_tokens"] == ours["ours_unshared"]["prompt_tokens"]
    seconds = {name: _seconds(found) for name, found in (*ours.items(), ("trl", trl))}
    tokens = [count + RESPONSE_TOKENS for step in trl["prompt_tokens"] for count in step]
    yield {
        "trl": TRL,
        "dtype": config.model.dtype,
        "rollouts": PROMPTS * SAMPLES,
        "tokens": round(statistics.fmean(tokens)),
        **{f"{name}_seconds": round(value, 1) for name, value in seconds.items()},
        "ratio": round(seconds["trl"] / seconds["ours"], 2),
        "ratio_unshared": round(seconds["trl"] / seconds["ours_unshared"], 2),
        "phases": ours["ours"]["phases"],
        **{f"{name}_peak_bytes": found["peak_bytes"] for name, found in (*ours.items(), ("trl", trl))},
    }


def environment() -> Path:
    """Return the Python of TRL's environment, which is made if it is not there."""
    python = _FOLDER / TRL / "bin" / "python"
    if not python.exists():
        base = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
        subprocess.run([base, "-m", "venv", str(_FOLDER / TRL)], check=True)
        packages = next((_FOLDER / TRL / "lib").glob("python*/site-packages"))
        shared = next(path for path in sys.path if path.endswith("site-packages"))
        (packages / "shared.pth").write_text(shared + "\n", encoding="utf-8")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"trl=={TRL}"], check=True)
    return python


def _ours(overrides: Sequence[str], *, share_prompts: bool) -> dict[str, Any]:
    settings = {
        "batch.prompts": PROMPTS,
        "batch.samples": SAMPLES,
        "rollout.max_response_tokens": RESPONSE_TOKENS,
        "algorithm.kl_weight": KL_WEIGHT,
    }
    task = {
        "overrides": [*(f"--{key}={value}" for key, value in settings.items()), *overrides],
        "steps": _STEPS,
        "share_prompts": share_prompts,
    }
    return _run([sys.executable, "-m", "benchmarks.peers.our_side"], task)


def _run(command: Sequence[str], task: dict[str, Any]) -> dict[str, Any]:
    """Run one side; return what its last line says."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, json.dumps(task)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _seconds(found: dict[str, Any]) -> float:
    return statistics.fmean(found["seconds"][1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
