#!/bin/bash
# Checks a configuration here, before it is queued: what is wrong would otherwise show when the job starts.
#
#   examples/launch/submit.sh [--gpu h100] [OPTIONS OF SBATCH --] CONFIG [--section.key VALUE ...]
#
# --gpu: as tools/plan.py takes it (a JSON file for nodes that don't have 8 GPUs); a job that doesn't fit into their
# memory is refused too. The number of nodes is read from --nodes=N.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}

gpu=
if [ "${1:-}" = --gpu ]; then
    gpu=${2:?--gpu: needs a name, such as h100}
    shift 2
fi
nodes=$(sed -n 's/^#SBATCH --nodes=//p' examples/launch/train.sbatch)
options=()
if [[ " $* " == *" -- "* ]]; then
    while [ "$1" != -- ]; do
        case $1 in
            --nodes=*) nodes=${1#--nodes=} ;;
            -N | --nodes) nodes=$2 ;;
        esac
        options+=("$1")
        shift
    done
    shift
fi

"$python" -m megatron_mcpo.train "$@" --dry-run >&2
if [ -n "$gpu" ]; then
    "$python" tools/plan.py "$1" --gpu "$gpu" --nodes "$nodes" "${@:2}" >&2 || {
        echo "Not queued: on $nodes node(s) it does not fit, or the plan can't be made; see above." >&2
        exit 1
    }
else
    echo "Whether it fits into the GPUs' memory is not checked: name them with --gpu." >&2
fi

exec sbatch "${options[@]}" examples/launch/train.sbatch "$@"
