#!/bin/sh
# Makes .venv from the lock files, once: exact versions, checked hashes, nothing but the package index.
#
# A Python 3.12 is found by running candidates, because a name on the PATH says little: a pyenv shim exists for
# every version that is installed and fails for those that are not selected.
set -eu
cd "$(dirname "$0")/.."
stamp=.venv/.stamp

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

# What the environment depends on; the folder too, because an environment cannot be moved.
wanted() {
    pwd
    cat requirements/bootstrap.txt requirements/cpu.lock setup.py tools/make_env.sh
}
digest=$(wanted | cksum)

if [ "$(cat $stamp 2>/dev/null)" = "$digest" ] && works .venv/bin/python; then
    exit 0
fi

if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "make_env: this is $(uname -sm); requirements/cpu.lock is for Linux x86_64 (glibc 2.28 or newer)." >&2
    echo "Run in a Linux x86_64 container, or install requirements/cpu.in yourself." >&2
    exit 2
fi

# Without a stamp an earlier run was interrupted and nothing in .venv can be trusted; with one, it is brought up to date.
if [ ! -f $stamp ] || ! works .venv/bin/python; then
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
    "$python" -m venv .venv
fi
rm -f $stamp
.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
.venv/bin/uv pip sync --quiet --python .venv/bin/python --require-hashes requirements/cpu.lock
# The lock's setuptools builds it: an isolated build would fetch an unpinned one.
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation -e .
echo "$digest" >$stamp
