#!/bin/sh
# Makes .venv from the lock files, once: exact versions, checked hashes, nothing but the package index.
# It never deletes or changes a .venv that it did not make. With --remove it deletes its own (make clean).
#
# A Python 3.12 is found by running candidates, because a name on the PATH says little: a pyenv shim exists for
# every version that is installed and fails for those that are not selected.
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)
stamp=.venv/.stamp # its first line is the project's folder, its second "unfinished" or what .venv was made from

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

# A user's own environment has no stamp; one that we made may have become one for GPUs since, with vLLM's GPU build.
is_users() {
    [ -e .venv ] && { [ ! -f $stamp ] || ls -d .venv/lib/python3*/site-packages/vllm-[0-9]*.dist-info >/dev/null 2>&1; }
}

if [ "${1:-}" = --remove ]; then
    if is_users; then
        echo "make_env: .venv was not made by this script (or holds vLLM for GPUs by now), so it stays" >&2
    else
        rm -rf .venv
    fi
    exit 0
fi

digest=$(cat requirements/bootstrap.txt requirements/cpu.lock pyproject.toml tools/make_env.sh | cksum)

if [ "$(line 1)" = "$here" ] && [ "$(line 2)" = "$digest" ] && works .venv/bin/python; then
    exit 0
fi

if is_users; then
    echo "make_env: .venv was not made by this script (or holds vLLM for GPUs by now), so it is left as it is. Either" >&2
    echo "  put it somewhere else, and make again:   mv .venv .venv-mine" >&2
    echo "  or use it, and call programs without make:   .venv/bin/python -m megatron_mcpo train CONFIG" >&2
    exit 2
fi

if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "make_env: this is $(uname -sm); requirements/cpu.lock is for Linux x86_64 (glibc 2.28 or newer)." >&2
    echo "Run in a Linux x86_64 container, or install requirements/cpu.in yourself." >&2
    exit 2
fi

# Nothing can be trusted in an environment that was left unfinished, or that came here from another folder (an
# environment can't be moved); any other is brought up to date.
if [ "$(line 1)" != "$here" ] || [ "$(line 2)" = unfinished ] || ! works .venv/bin/python; then
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
    echo "make_env: making .venv with $python (first time: several GB to download, some minutes)"
    rm -rf .venv
    mkdir .venv
    mark unfinished
    "$python" -m venv .venv
fi
mark unfinished
# Quiet twice: pip warns of an index of the user's settings that lacks a package which another one has.
.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
# Compiled here, because Python may not be able to keep what it compiles at a start (PYTHONDONTWRITEBYTECODE, as containers
# set it; an environment that is read-only): every rank would compile thousands of files whenever it starts.
.venv/bin/uv pip sync --quiet --python .venv/bin/python --compile-bytecode --require-hashes requirements/cpu.lock
# The lock's setuptools builds it: an isolated build would fetch an unpinned one.
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
mark "$digest"
