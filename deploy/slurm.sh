#!/bin/bash
# Duopool on Slurm: sbatch --nodes=6 deploy/slurm.sh
# The first PREFILL_NODES nodes hold prefill workers, the others decode workers; one node alone holds both. The system
# lives as long as the job. Everything behind the script's name is passed on to `duopool serve`.
#SBATCH --job-name=duopool
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail

nodes=${SLURM_JOB_NUM_NODES:?run me with sbatch}
export PREFILL_NODES=${PREFILL_NODES:-$(((nodes + 2) / 3))}
export NUM_DECODE=$((nodes > 1 ? nodes - PREFILL_NODES : 1))
((NUM_DECODE > 0)) || { echo "PREFILL_NODES=$PREFILL_NODES of $nodes nodes leaves none for decode" >&2; exit 1; }
export HEAD=${HEAD:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
# One token for all nodes of this job, in no file.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')}
export DUOPOOL_CREDENTIAL=$RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0

# Started once on every node; Ray's head is the first one, where `duopool serve` runs too.
start_node() {
    local pool='{"decode": 1}'
    if ((SLURM_JOB_NUM_NODES == 1)); then
        pool='{"prefill": 1, "decode": 1}'
    elif ((SLURM_PROCID < PREFILL_NODES)); then
        pool='{"prefill": 1}'
    fi
    exec ray symmetric-run --address "$HEAD:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
        --resources "$pool" --object-store-memory 100000000 \
        -- duopool serve --ray-address auto --pin-pools --host 0.0.0.0 --prefill "$PREFILL_NODES" --decode "$NUM_DECODE" "$@"
}
export -f start_node

srun --ntasks-per-node=1 --kill-on-bad-exit bash -c 'start_node "$@"' start_node "$@"
