"""The examples for containers: the Kubernetes JobSet, the image, and the Slurm job that starts its ranks in one.

Not covered: that Docker, a cluster with pyxis, or Kubernetes take them. The JobSet is held against the API's fields as
we read them (tests/data/jobset_schema.json), not by the API itself.
"""

import copy
import json
import os
import shlex
import subprocess

import jsonschema
import pytest
import yaml

from tests.support.paths import ROOT

SCHEMA = json.loads((ROOT / "tests/data/jobset_schema.json").read_text(encoding="utf-8"))
JOBSET = yaml.safe_load((ROOT / "examples/launch/jobset.yaml").read_text(encoding="utf-8"))


def test_the_jobset_has_only_fields_of_the_api_and_its_numbers_agree():
    jsonschema.validate(JOBSET, SCHEMA)
    (ranks,) = JOBSET["spec"]["replicatedJobs"]
    job = ranks["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(environment["NODES"]) == job["parallelism"] == job["completions"]
    assert int(environment["RANKS"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    name = JOBSET["metadata"]["name"]
    assert environment["HEAD"].partition(":")[0] == f"{name}-{ranks['name']}-0-0.{name}"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert os.access(ROOT / container["command"][0], os.X_OK)
    script = (ROOT / container["command"][0]).read_text(encoding="utf-8")
    assert [name for name in environment if f"${{{name}" not in script and f"${name}" not in script] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicatedJob"), []),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "replicatedJobs", 0, "template", "spec", "paralellism"), 4),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "env", 0, "value"), 8),
    ],
)
def test_the_schema_refuses_what_the_api_refuses(path, value):
    """A field that it does not know, a number that is text, a variable whose value is a number."""
    wrong = copy.deepcopy(JOBSET)
    at = wrong
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def test_the_image_copies_what_its_environment_is_made_from():
    """The files are there, and those that make_env.sh and build_te.sh read come before the environment is made."""
    lines = (ROOT / "examples/docker/Dockerfile").read_text(encoding="utf-8").splitlines()
    made = next(number for number, line in enumerate(lines) if line.startswith("RUN make env-gpu"))
    copied = [name for line in lines[:made] if line.startswith("COPY ") for name in shlex.split(line)[1:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    scripts = [name for name in copied if name.endswith(".sh")]
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in scripts) + "tools/make_env.sh"
    read = {"pyproject.toml", "requirements", "tools/make_env.sh", "tools/te_wheel.sh"}
    assert all(name in text for name in read) and read <= set(copied)
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {".git", ".venv*", ".cache", "runs"} <= set(ignored), "the image would hold this machine's environments"


@pytest.mark.parametrize("container", ["", "/images/mcpo.sqsh"], ids=["plain", "container"])
def test_the_slurm_job_runs_ranks_and_requeue_in_the_container(tmp_path, container):
    """The node's own Python may lack the package; without a container nothing of it is asked of srun."""
    (tmp_path / "srun").write_text('#!/bin/sh\necho "srun $*"\nexit 1\n')
    (tmp_path / "python").write_text('#!/bin/sh\necho "python $*"\nexit 1\n')
    for name in ("srun", "python"):
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1"}
    ours = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHON": "python",
        "CONTAINER": container,
        "MOUNTS": "/data:/data",
    }
    command = ["bash", ROOT / "examples/launch/train.sbatch", "a.toml", "--run.steps", "3"]
    job = subprocess.run(command, cwd=tmp_path, env=slurm | ours, capture_output=True, text=True, timeout=60)
    flags = f"--container-image={container} --container-mounts={tmp_path}:{tmp_path},/data:/data"
    flags = f"{flags} --container-workdir={tmp_path} " if container else ""
    on_one = f"srun --nodes=1 --ntasks=1 {flags}" if container else ""
    assert (job.returncode, job.stderr) == (1, "")
    assert job.stdout.splitlines() == [
        f"srun --kill-on-bad-exit=1 {flags}examples/launch/torchrun.sh a.toml --run.steps 3",
        f"{on_one}python -m megatron_mcpo requeue a.toml --run.steps 3",
    ]


@pytest.mark.parametrize(("numa", "bound"), [("node", ["--numa-binding=node"]), ("no", [])])
def test_ranks_are_bound_to_cores_as_asked(tmp_path, numa, bound):
    """torchrun knows the option; without GPUs the script does not choose it by itself."""
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    given = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python")}

    def options(**more):
        done = subprocess.run(
            [ROOT / "examples/launch/torchrun.sh", "a.toml"],
            env=given | more, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        return [line for line in done.stdout.splitlines() if "numa" in line]

    assert options(NUMA=numa) == bound
    if not os.path.exists("/dev/nvidia0"):
        assert options() == []


def test_torchrun_has_the_option_for_numa():
    from torch.distributed import run as torchrun

    assert torchrun.parse_args(["--numa-binding=node", "script"]).numa_binding == "node"
