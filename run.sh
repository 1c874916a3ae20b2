#!/bin/bash -p
# ./run.sh: one experiment; ./run.sh help lists the verbs. A clean environment, then the harness (container/harness).
# -p: bash reads neither BASH_ENV nor functions from the caller's environment.
set -euo pipefail
root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
cd "$root"
system=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin
system+=:/usr/lib/wsl/lib # nvidia-smi of WSL 2

# The system's python before the user's, whose first may be an old one of some environment.
python=$(PATH=$system:$PATH; type -P python3) || python=
version=$([[ -z $python ]] || "$python" -I -V 2>&1)
if [[ ! $version =~ ^Python\ 3\.(9|[1-9][0-9]) ]]; then
  echo "run.sh: python3 is ${version:-missing}${python:+ in $python}; install Python 3.9 or newer" >&2
  exit 2
fi
harness=("$python" -I -X utf8 "$root/container/harness" "$@")
if [[ ${1-} == night ]]; then
  exec "${harness[@]}" # it starts claude, which needs the person's own environment
fi

# Nothing of the client's keys and sockets, no GIT_* and no PYTHON* variables; the system's programs before the user's.
# Also empty ones, which mean UTC and no GPU
keep=(${TZ+"TZ=$TZ"} ${CUDA_VISIBLE_DEVICES+"CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"})
for name in HOME USER TERM CI XDG_RUNTIME_DIR DOCKER_HOST AR_ENGINE CLAUDECODE CLAUDE_CODE_SESSION_ID \
  CLAUDE_CONFIG_DIR SLURM_JOB_ID {http,https,no}_proxy {HTTP,HTTPS,NO}_PROXY SSL_CERT_FILE NODE_EXTRA_CA_CERTS \
  HF_ENDPOINT; do
  [[ -z ${!name-} ]] || keep+=("$name=${!name}")
done
keep+=(AR_FROM="${OLDPWD-}") # where the caller stands
PATH=$system
exec env -i "${keep[@]}" PATH="$system" LANG=C.UTF-8 "${harness[@]}"
