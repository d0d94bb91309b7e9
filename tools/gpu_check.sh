#!/bin/sh
# Checks on one GPU what a CPU can't show, prints a table and writes benchmarks/results/gpu-<device>.json:
#   tools/gpu_check.sh [--rows NAME ...] [--list] [--seconds N] [--resume FILE] [--out FOLDER] [--rehearse]
# --rehearse runs the rows on a CPU, with small models.
set -eu
cd "$(dirname "$0")/.."
case " $* " in *" --rehearse "*) python=.venv/bin/python ;; *) python=.venv-gpu/bin/python ;; esac
for python in "$python" .venv/bin/python "$(command -v python3)"; do
  [ ! -x "$python" ] || break
done
if [ ! -x "$python" ]; then
  echo "gpu_check: there is no Python here. Make an environment: make env-gpu" >&2
  exit 2
fi
exec "$python" -m benchmarks.gpu.run "$@"
