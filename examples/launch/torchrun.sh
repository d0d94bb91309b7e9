#!/bin/bash
# The ranks of one node, started by torchrun. Many nodes: the same on each of them, or train.sbatch, which does that.
#
#   RANKS=8 examples/launch/torchrun.sh CONFIG [--section.key VALUE ...]
#   RANKS=8 NODES=4 HEAD=node1:29500 examples/launch/torchrun.sh CONFIG [--section.key VALUE ...]
#
# RANKS   on this node; without it one for each GPU that Slurm gave, or a single one
# NODES   1; with more, HEAD is HOST:PORT of one of them, the same on all, and RUN_ID any word they share
# LOGS    folder for what each rank prints (logs); the node's first rank also prints here
# NUMA    how ranks are bound to cores near their GPU: torchrun's --numa-binding, or `no`. Unless it is set: `node` where
#         there are GPUs, several NUMA nodes and numactl, and all cores are ours
# PYTHON  of an environment; without it .venv-gpu/bin/python where there is a GPU and `make env-gpu` was run, else
#         .venv/bin/python
#
# SIGTERM and SIGUSR1 end the run after the current step, saved; SIGINT (Ctrl-C) ends it at once.
# gloo or NCCL is the program's choice. On a host with several networks set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
# (docs/clusters.md has NCCL's other variables).
set -euo pipefail

ranks=${RANKS:-${SLURM_GPUS_ON_NODE:-1}}
nodes=${NODES:-1}
if ! [ "$ranks" -gt 0 ] 2>/dev/null || { [ "$nodes" != 1 ] && [ -z "${HEAD:-}" ]; }; then
    echo "torchrun.sh: RANKS = '$ranks' must be a number above 0, and with NODES = $nodes HEAD must be HOST:PORT of one of them" >&2
    exit 2
fi
if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv/bin/python
    if [ -e /dev/nvidia0 ] && [ -x .venv-gpu/bin/python ]; then
        PYTHON=.venv-gpu/bin/python
    fi
fi

# Only with all cores: torchrun ends the job if a rank may use none of the NUMA node of its GPU. nproc obeys OpenMP's limit.
near=()
if [ -z "${NUMA:-}" ] && [ -e /dev/nvidia0 ] && [ -e /sys/devices/system/node/node1 ] &&
    [ "$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)" -eq "$(nproc --all)" ] && command -v numactl >/dev/null; then
    NUMA=node
fi
if [ "${NUMA:-no}" != no ]; then
    near=(--numa-binding="$NUMA")
fi

# Ranks that share the cores must not each start a thread for every core.
threads=$(($(nproc) / ranks))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

if [ "$nodes" -eq 1 ]; then
    meeting=(--standalone)
else
    meeting=(--rdzv-backend=c10d --rdzv-endpoint="$HEAD" --rdzv-id="${RUN_ID:-mcpo}")
fi

# --signals-to-handle: a signal that torchrun does not handle kills it and leaves its ranks behind, on their GPUs. Only
#   the option works, the environment variable of the same meaning is overwritten.
# --shutdown-timeout: after that long, torchrun kills ranks that were asked to stop. A step and a save take their time.
# --max-restarts: after a crash the ranks start once more, from the last checkpoint. Where a node is lost, the others
#   wait for ten minutes; Slurm notices within five and starts the whole job on other nodes.
exec "$PYTHON" -m torch.distributed.run "${meeting[@]}" "${near[@]}" \
    --nnodes="$nodes" --nproc-per-node="$ranks" --max-restarts=1 \
    --signals-to-handle=SIGTERM,SIGUSR1,SIGINT,SIGHUP,SIGQUIT --shutdown-timeout=1800 \
    --log-dir="${LOGS:-logs}" --redirects=3 --tee=3 --local-ranks-filter=0 \
    -m megatron_mcpo train "$@"
