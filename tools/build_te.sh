#!/bin/sh
# Installs Transformer Engine into .venv-gpu, as requirements/te.lock pins it. Its part for torch is compiled
# (tools/te_wheel.sh), once: the wheel stays in .cache/te.
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

if ! found=$($python -c 'import importlib.metadata as m; print(m.version("torch"), m.version("vllm"))' 2>/dev/null); then
    say "there is no GPU environment in $env. Make it first: make env-gpu"
    exit 2
fi
torch=${found% *}
version=$(sed -n "s/^transformer-engine-torch==\([^ ]*\).*/\1/p" $lock)
if [ $# -eq 0 ] && ls -d $env/lib/python3*/site-packages/transformer_engine_torch-"$version".dist-info >/dev/null 2>&1; then
    exit 0
fi
if [ $# -gt 0 ] && [ ! -f "$1" ]; then
    say "$1: must be a wheel of transformer-engine-torch $version (no such file)"
    exit 2
fi

wheel=${1:-}
if [ -z "$wheel" ]; then
    built=.cache/te/torch-$torch
    if ! ls "$built"/transformer_engine_torch-"$version"-*.whl >/dev/null 2>&1; then
        tools/te_wheel.sh $python "$built" || {
            code=$?
            say "Transformer Engine is not installed. The program runs without it (make env-gpu TE=no), with layers of torch,"
            say "which are slower on a GPU and have no FP8. A wheel that another machine has made in $built will do:"
            say "make env-gpu TE_WHEEL=PATH"
            exit $code
        }
    fi
    wheel=$(ls "$built"/transformer_engine_torch-"$version"-*.whl)
fi

others=$(mktemp)
trap 'rm -f "$others"' EXIT
trap 'exit 130' HUP INT TERM
awk '/^[a-z]/ { ours = !/^transformer-engine-torch==/ } ours' $lock >"$others"
$env/bin/uv pip install --quiet --python $python --compile-bytecode --no-deps --require-hashes -r "$others"
$env/bin/uv pip install --quiet --python $python --compile-bytecode --no-deps --reinstall "$wheel"
# torch first: it loads the CUDA libraries that Transformer Engine looks for.
$python - <<'P' || {
import torch, transformer_engine, transformer_engine.pytorch
from importlib.metadata import version

print(f"build_te: Transformer Engine {version('transformer-engine')} can be imported beside torch {torch.__version__}")
P
    $env/bin/uv pip uninstall --quiet --python $python transformer-engine transformer-engine-cu13 transformer-engine-torch
    say "$wheel can't be imported, see above, and was removed again. It has to be made for torch $torch, Python 3.12"
    exit 1
}
