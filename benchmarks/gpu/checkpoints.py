"""Check checkpoints: written beside training, carried between layers with and without Transformer Engine, converted."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.gpu import models
from benchmarks.gpu.models import SMALL, batch_of, signed_loss
from benchmarks.gpu.outcome import Band, Outcome
from benchmarks.measure import ROOT
from megatron_mcpo.distributed.device import device, uses_gpu
from megatron_mcpo.distributed.transformer_engine import transformer_engine_problem
from megatron_mcpo.mcore.checkpoint import Checkpoints
from megatron_mcpo.mcore.offload import state_tensors
from megatron_mcpo.mcore.policy import Policy
from megatron_mcpo.mcore.spec import uses_transformer_engine

_KINDS = ("TE", "torch", "TE")
"""The layers of three processes, each of which goes on from the checkpoint of the one before."""
_HIDDEN = "raise ModuleNotFoundError('hidden by the check of checkpoints')\n"


def checkpoint() -> Outcome:
    """Check that a checkpoint written while training continues holds the state at the time of the call."""
    groups = models.alone()
    with TemporaryDirectory() as name:
        folder = Path(name, "model")
        models.save_model(folder, SMALL, dtype=torch.bfloat16)
        learner = models.policy(models.settings(folder), groups)
        sampled = models.rollouts(SMALL.vocab, prompts=6, samples=4, prompt=(20, 60), response=(1, 30))
        batch = batch_of(sampled, learner)
        learner.update(batch, signed_loss(batch))
        saved = {each: tensor.clone() for each, tensor in learner.weights()}
        kept = _checkpoints(learner, Path(name, "checkpoints"))
        kept.save(1, {})
        following = learner.update(batch, signed_loss(batch))
        kept.finish()
        fresh = models.policy(models.settings(folder), groups)
        _checkpoints(fresh, Path(name, "checkpoints")).load()
    different = sum(not torch.equal(tensor, saved[each]) for each, tensor in fresh.weights())
    again = fresh.update(batch, signed_loss(batch))
    return Outcome(
        bands=(
            Band(name="tensors that differ", value=different, low=0, high=0),
            Band(
                name="gradient norm of the next update, relative difference",
                value=abs(again.grad_norm / following.grad_norm - 1),
                low=0.0,
                high=1e-3,
            ),
        )
    )


def te_checkpoint() -> Outcome:
    """Check that layers of Transformer Engine and of torch load each other's checkpoints, in every bit.

    Where Transformer Engine is missing on a CPU, all three processes have torch's layers.
    """
    problem = transformer_engine_problem()
    if uses_gpu() and problem is not None:
        return Outcome(skipped=f"Transformer Engine is wanted, {problem}")
    found = []
    with TemporaryDirectory() as name:
        folder = Path(name)
        models.save_model(folder / "model", SMALL, dtype=torch.bfloat16)
        hiding = folder / "hiding" / "transformer_engine"
        hiding.mkdir(parents=True)
        (hiding / "__init__.py").write_text(_HIDDEN)
        for step, kind in enumerate(_KINDS):
            paths = [str(hiding.parent)] if kind == "torch" else []
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
            command = [sys.executable, "-m", "benchmarks.gpu.checkpoints", name, str(step)]
            subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
            found.append(json.loads((folder / f"{step}.json").read_text()))
    wanted = [kind if problem is None else "torch" for kind in _KINDS]
    return Outcome(
        bands=(
            Band(
                name="processes with other layers than wanted",
                value=sum(each["layers"] != kind for each, kind in zip(found, wanted, strict=True)),
                low=0,
                high=0,
            ),
            *(
                Band(name=f"{before} to {after}: {what} that differ", value=value, low=0, high=0)
                for (before, after), each in zip([_KINDS[:2], _KINDS[1:]], found[1:], strict=True)
                for what, value in each["different"].items()
            ),
        ),
        figures={
            "layers": " to ".join(each["layers"] for each in found),
            "updates": sum(each["updates"] for each in found),
        },
    )


def _checkpoints(learner: Policy, folder: Path) -> Checkpoints:
    return Checkpoints(
        policy=learner,
        folder=folder,
        vocabulary="tokens",
        assets={},
        keep=2,
        keep_every=0,
        in_background=device().type != "cpu",
        say=print,
    )


def conversion() -> Outcome:
    """Check the conversion to Megatron's format and back, with the layers that the trainer has on this machine."""
    with TemporaryDirectory() as name:
        models.save_model(Path(name), SMALL, dtype=torch.bfloat16)
        command = [sys.executable, "-m", "megatron_mcpo", "convert", "check", name, "--layouts", "tp2pp2", "--json"]
        output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    row = json.loads(output)
    return Outcome(
        bands=(
            Band(name="bits that differ", value=row["bits"], low=0, high=0),
            Band(name="largest difference of logits", value=row["logits"], low=0.0, high=1e-4),
        )
    )


def _state(learner: Policy) -> dict[str, list[str]]:
    """Return hashes of what a checkpoint must bring back; each kind of layers has an order of its own."""
    weights = [f"{name} {_hash(tensor)}" for name, tensor in learner.weights()]
    return {"weights": weights, "states of the optimizer": list(map(_hash, state_tensors(learner.optimizer)))}


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().flatten().cpu().view(torch.uint8).numpy().tobytes()).hexdigest()


def main(arguments: Sequence[str]) -> None:
    """Load the checkpoint of the process before, compare it with what that one had, and save another, a step later."""
    folder, step = Path(arguments[0]), int(arguments[1])
    learner = models.policy(models.settings(folder / "model"), models.alone())
    kept = _checkpoints(learner, folder / "checkpoints")
    different = {}
    if step > 0:
        kept.load()
        before = json.loads((folder / f"{step - 1}.json").read_text())["state"]
        different = {
            what: (Counter(hashes) - Counter(before[what])).total() for what, hashes in _state(learner).items()
        }
    sampled = models.rollouts(SMALL.vocab, prompts=6, samples=4, prompt=(20, 60), response=(1, 30))
    batch = batch_of(sampled, learner)
    applied = learner.update(batch, signed_loss(batch)).applied
    kept.save(step + 1, {})
    kept.finish()
    layers = "TE" if uses_transformer_engine() else "torch"
    result = {"layers": layers, "updates": int(applied), "different": different, "state": _state(learner)}
    (folder / f"{step}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
