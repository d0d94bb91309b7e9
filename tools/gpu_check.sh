#!/bin/sh
# Checks on one GPU what a CPU can't show, prints a table and writes benchmarks/results/gpu-<device>.json:
#   tools/gpu_check.sh [--rows NAME ...] [--list] [--seconds N] [--resume FILE] [--out FOLDER] [--rehearse]
set -eu
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=$(command -v python3)
exec "$python" -m benchmarks.gpu.run "$@"
