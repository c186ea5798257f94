#!/usr/bin/env bash
# Trains on the nodes of a Slurm job: sbatch cluster/slurm.sh [RECIPE] [SECTION.FIELD=VALUE...] (cluster/README.md).
# A Ray of the job's own: a head on the first node, which has GPUs too, and a node on each other one.
#SBATCH --job-name=mlc-ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
# SIGTERM for this script five minutes before the time is over: time for a checkpoint.
#SBATCH --signal=B:TERM@300
set -euo pipefail

recipe="${1:-recipe:qwen2.5-7b}"
[ "$#" -eq 0 ] || shift
shared="${MLC_RAY_SHARED:-/shared}"            # SET THIS: storage that all nodes see
venv="${MLC_RAY_VENV:-$shared/mlc_ray-venv}"   # made by cluster/install.sh
gpus="${SLURM_GPUS_ON_NODE:?run this by sbatch}"

# shellcheck source=/dev/null
source "$venv/bin/activate"

# A token of this job alone: whoever reaches the head's ports without it can run nothing.
token="$shared/.mlc_ray-$SLURM_JOB_ID.token"   # all nodes read it, and this user alone
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32))' >"$token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
port=$((20000 + SLURM_JOB_ID % 20000))         # two jobs may share a node
export RAY_ADDRESS="$head:$port"
cpus="$SLURM_CPUS_PER_TASK"

start() {  # NODE OPTION...
  local node="$1"
  shift
  # A step does not inherit --cpus-per-task from its job.
  srun --overlap --nodes=1 --ntasks=1 --cpus-per-task="$cpus" --nodelist="$node" \
    ray start --block --num-cpus="$cpus" --num-gpus="$gpus" "$@" &
  ray_nodes+=("$!")
}

ray_nodes=()
trap 'kill "${ray_nodes[@]}" 2>/dev/null || true; rm -f "$token"' EXIT

start "$head" --head --port="$port"
until ray status >/dev/null 2>&1; do
  kill -0 "${ray_nodes[0]}" || { echo "the Ray head on $head did not start" >&2; exit 1; }
  sleep 2
done
for node in "${nodes[@]:1}"; do start "$node" --address="$RAY_ADDRESS"; done
# A run that asks for more than is there is refused at once, so all nodes are waited for.
python -m mlc_ray.nodes "${#nodes[@]}" 600

settings=()
for setting in "$@"; do settings+=(--set "$setting"); done
# The driver gets the signal, saves a checkpoint and ends with 143. The recipe's `resume: auto` goes on from there when
# Slurm queues the job again, as it does after a preemption, or when you do, after the time limit.
mlc-ray train --config "$recipe" \
  --set "output_dir=$shared/runs" --set "cluster.workers=$((${#nodes[@]} * gpus))" --set cluster.accelerator=gpu \
  ${settings[@]+"${settings[@]}"} &
driver=$!
trap 'kill -TERM "$driver"' TERM
status=0
wait "$driver" || status=$?
if kill -0 "$driver" 2>/dev/null; then  # the signal ended `wait`, and the driver is saving
  status=0
  wait "$driver" || status=$?
fi
exit "$status"
