#!/bin/sh
# What a launch command (program.md) starts on the node it has found: a sandbox, with what only that node knows.
#
# usage: on_node.sh FOLDER GPU JOB CLIENT ARG...
#   GPU: gpu or none; JOB: own, where srun has made a job for this alone; CLIENT: the engine's, with its global flags
set -eu
cd "$1"
gpu=$2 job=$3 client=$4
shift 4
if [ "$gpu" = gpu ] && nvidia-smi -L >/dev/null 2>&1; then
  # by their names, and only those that a scheduler gave us
  ids=$(nvidia-smi --query-gpu=uuid --format=csv,noheader ${CUDA_VISIBLE_DEVICES:+-i "$CUDA_VISIBLE_DEVICES"}) || {
    echo "nvidia-smi knows no GPU ${CUDA_VISIBLE_DEVICES-} (CUDA_VISIBLE_DEVICES): $ids" >&2
    exit 1
  }
  case $client in
    podman*) for id in $ids; do set -- --device "nvidia.com/gpu=$id" "$@"; done ;;
    *) set -- --gpus "\"device=$(printf %s "$ids" | tr '\n' ,)\"" "$@" ;;
  esac
fi
# shellcheck disable=SC2086  # words on purpose
$client run --cpus "$(nproc)" "$@" && exit
status=$?
# LIFELINE_LOST (stage.py): a killed srun leaves its job to nobody, which would hold the node until its time limit
[ "$status" != 75 ] || [ "$job" != own ] || [ -z "${SLURM_JOB_ID-}" ] || scancel "$SLURM_JOB_ID" || :
exit "$status"
