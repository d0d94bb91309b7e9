#!/bin/bash
# Checks a configuration here, before it is queued: what is wrong would otherwise show when the job starts.
#
#   examples/launch/submit.sh [[--gpu h100] [OPTIONS OF sbatch] --] CONFIG [--section.key VALUE ...]
#
# from the repository's folder. --gpu: as megatron_mcpo/cli/plan.py takes it; a job that doesn't fit into their memory is refused too.
# How many nodes there will be, and GPUs in each, is read from --nodes and --gpus-per-node.
set -euo pipefail
exec "${PYTHON:-.venv/bin/python}" -m megatron_mcpo.cli.submit "$@"
