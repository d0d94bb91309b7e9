#!/bin/sh
# Installs Transformer Engine into .venv-gpu, as requirements/te.lock has it. The package index has its part for torch
# only as source: that is compiled here, against headers that are in .venv-gpu (no CUDA toolkit), and kept in .cache/te.
#   tools/build_te.sh          does nothing where it is installed
#   tools/build_te.sh WHEEL    installs this wheel of transformer-engine-torch instead of compiling one
# Exit code 3: this machine can't compile it, and nothing was changed.
set -eu
cd "$(dirname "$0")/.."
env=.venv-gpu
python=$env/bin/python
lock=requirements/te.lock

say() {
    echo "build_te: $*" >&2
}

locked() {
    sed -n "s/^transformer-engine-torch==\([^ ]*\).*/\1/p" $lock
}

# With `yes` the lines of transformer-engine-torch, which it compiled here; with `no` all others.
entries() {
    awk -v torch="$1" '/^[a-z]/ { ours = /^transformer-engine-torch==/ ? "yes" : "no" } ours == torch' $lock
}

missing() {
    command -v "${CXX:-c++}" >/dev/null 2>&1 || echo "a C++ compiler (apt install g++)"
    $python -c 'import sys, sysconfig, pathlib; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
        echo "Python's headers (apt install python3.12-dev)"
}

# A compiler takes up to 2 GiB here.
jobs() {
    cores=$(nproc)
    fit=$(awk '/^MemAvailable/ { print int($2 / 2097152) }' /proc/meminfo)
    [ "$fit" -lt "$cores" ] && cores=$fit
    [ "$cores" -gt 0 ] && echo "$cores" || echo 1
}

# Without NVTE_PYTORCH_FORCE_BUILD its setup.py asks its project's site for a wheel first. The library for expert
# parallelism (NCCL_EP) wants a newer NCCL than torch has.
compile() {
    say "compiling Transformer Engine $version for torch $torch with $1 job(s): about 15 minutes of one core"
    entries yes >"$work/torch.txt"
    NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 \
        MAX_JOBS=$1 PATH=$PWD/$env/bin:$PATH $python -m pip wheel --disable-pip-version-check --no-cache-dir --no-deps \
        --no-build-isolation --require-hashes --requirement "$work/torch.txt" --wheel-dir "$work" >"$work/log" 2>&1 || {
        tail -n 40 "$work/log" >&2
        say "it could not be compiled, see above. The program runs without it, with layers of torch: make env-gpu TE=no"
        exit 1
    }
    mkdir -p "$built"
    mv "$work"/transformer_engine_torch-*.whl "$built"
}

if ! torch=$($python -c 'import importlib.metadata as m; print(m.version("torch"), m.version("vllm"))' 2>/dev/null); then
    say "there is no GPU environment in $env. Make it first: make env-gpu"
    exit 2
fi
torch=${torch% *}
version=$(locked)
if [ $# -eq 0 ] && ls -d $env/lib/python3*/site-packages/transformer_engine_torch-"$version".dist-info >/dev/null 2>&1; then
    exit 0
fi
if [ $# -gt 0 ] && [ ! -f "$1" ]; then
    say "$1: must be a wheel of transformer-engine-torch $version (no such file)"
    exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
built=.cache/te/torch-$torch
wheel=${1:-}
lacks=$(missing)
if [ -z "$wheel" ] && ! ls "$built"/transformer_engine_torch-"$version"-*.whl >/dev/null 2>&1 && [ -n "$lacks" ]; then
    say "Transformer Engine is not installed, because this machine lacks"
    echo "$lacks" | sed 's/^/  /' >&2
    say "The program runs without it, with layers of torch, which are slower on a GPU and have no FP8. Install what is"
    say "missing and call it again, or give a wheel that another machine made in $built: make env-gpu TE_WHEEL=PATH"
    exit 3
fi

entries no >"$work/others.txt"
$env/bin/uv pip install --quiet --python $python --compile-bytecode --no-deps --require-hashes -r "$work/others.txt"
if [ -z "$wheel" ]; then
    ls "$built"/transformer_engine_torch-"$version"-*.whl >/dev/null 2>&1 || compile "$(jobs)"
    wheel=$(ls "$built"/transformer_engine_torch-"$version"-*.whl)
fi
$env/bin/uv pip install --quiet --python $python --compile-bytecode --no-deps --reinstall "$wheel"
# torch first: it loads the CUDA libraries that Transformer Engine looks for.
$python - <<'P' || {
import torch, transformer_engine, transformer_engine.pytorch
from importlib.metadata import version

print(f"build_te: Transformer Engine {version('transformer-engine')} works with torch {torch.__version__}")
P
    $env/bin/uv pip uninstall --quiet --python $python transformer-engine transformer-engine-cu13 transformer-engine-torch
    say "$wheel can't be imported, see above, and was removed again. It has to be made for torch $torch, Python 3.12"
    exit 1
}
