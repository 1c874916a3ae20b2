#!/bin/sh
# What a launch command (program.md) starts on the node it has found: a sandbox, with what only that node knows.
#
# usage: on_node.sh FOLDER GPU JOB CLIENT ARG...
#   GPU: gpu or none; JOB: own, where srun has made a job for this alone; CLIENT: the engine's, with its global flags
set -eu
cd "$1"
gpu=$2 job=$3 client=$4
shift 4
# only those that a scheduler gave us; with this value, which may be empty, none
case ${CUDA_VISIBLE_DEVICES-all} in "" | -1 | NoDevFiles) gpu=none ;; esac
if [ "$gpu" = gpu ] && command -v nvidia-smi >/dev/null; then
  case ${CUDA_VISIBLE_DEVICES-} in
    *MIG-*) ids=$(printf %s "$CUDA_VISIBLE_DEVICES" | tr , '\n') ;; # slices of one, which only CDI and docker know
    *)
      # by their names
      ids=$(nvidia-smi --query-gpu=uuid --format=csv,noheader ${CUDA_VISIBLE_DEVICES:+-i "$CUDA_VISIBLE_DEVICES"}) || {
        echo "nvidia-smi finds no GPU ${CUDA_VISIBLE_DEVICES-} (CUDA_VISIBLE_DEVICES): $ids" >&2
        exit 1
      }
      ;;
  esac
  case $client in
    podman*) for id in $ids; do set -- --device "nvidia.com/gpu=$id" "$@"; done ;;
    *) set -- --gpus "\"device=$(printf %s "$ids" | tr '\n' ,)\"" "$@" ;;
  esac
fi
cpus=$(nproc)
pids=$((cpus > 64 ? 8 * cpus : 512)) # threads of data loaders on a large machine: engine.py's PIDS
# shellcheck disable=SC2086  # words on purpose
$client run --cpus "$cpus" --pids-limit "$pids" "$@" && exit
status=$?
# LIFELINE_LOST (stage.py): a killed srun leaves its job to nobody, which would hold the node until its time limit
[ "$status" != 75 ] || [ "$job" != own ] || [ -z "${SLURM_JOB_ID-}" ] || scancel "$SLURM_JOB_ID" || :
exit "$status"
