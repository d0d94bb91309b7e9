#!/bin/sh
# Compiles Transformer Engine's part for torch, which the package index has only as source, as requirements/te.lock pins
# it, for the torch of a Python environment, with the CUDA headers of that environment (no CUDA toolkit):
#   tools/te_wheel.sh PYTHON FOLDER    the wheel is put into FOLDER
# Exit code 3: this machine can't compile; what is missing was printed.
set -eu
cd "$(dirname "$0")/.."
python=$1
folder=$2
lock=requirements/te.lock

missing() {
    command -v "${CXX:-c++}" >/dev/null 2>&1 || echo "a C++ compiler (apt install g++)"
    "$python" -c 'import sys, sysconfig, pathlib; sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists())' ||
        echo "Python's headers (apt install python3.12-dev)"
}

# A compiler takes up to 2 GiB here.
jobs() {
    cores=$(nproc)
    fit=$(awk '/^MemAvailable/ { print int($2 / 2097152) }' /proc/meminfo)
    [ "$fit" -lt "$cores" ] && cores=$fit
    [ "$cores" -gt 0 ] && echo "$cores" || echo 1
}

lacks=$(missing)
if [ -n "$lacks" ]; then
    echo "te_wheel: to compile Transformer Engine, this machine lacks" >&2
    echo "$lacks" | sed 's/^/  /' >&2
    exit 3
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' HUP INT TERM
awk '/^[a-z]/ { ours = /^transformer-engine-torch==/ } ours' $lock >"$work/torch.txt"
count=$(jobs)
echo "te_wheel: compiling Transformer Engine for torch with $count job(s): about 15 minutes of one core" >&2
# Without NVTE_PYTORCH_FORCE_BUILD its setup.py asks its project's site for a wheel first. The library for expert
# parallelism (NCCL_EP) wants a newer NCCL than torch has.
NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 \
    MAX_JOBS=$count PATH=$(cd "$(dirname "$python")" && pwd):$PATH "$python" -m pip wheel --disable-pip-version-check --no-cache-dir \
    --no-deps --no-build-isolation --require-hashes --requirement "$work/torch.txt" --wheel-dir "$work" \
    >"$work/log" 2>&1 || {
    tail -n 40 "$work/log" >&2
    echo "te_wheel: it could not be compiled, see above" >&2
    exit 1
}
mkdir -p "$folder"
mv "$work"/transformer_engine_torch-*.whl "$folder"
