#!/bin/bash -p
# ./run.sh: one experiment; ./run.sh help lists the verbs. A clean environment, then the harness (container/harness).
# -p: bash reads neither BASH_ENV nor functions from the caller's environment.
set -euo pipefail
root=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
cd "$root"
if [[ ${1-} == night ]]; then
  exec python3 -I "$root/container/harness" "$@" # it starts claude, which needs the person's own environment
fi

# Nothing of the client's keys and sockets, no GIT_* and no PYTHON* variables; the system's programs before the user's.
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin
keep=()
for name in HOME USER TERM CI XDG_RUNTIME_DIR DOCKER_HOST AR_ENGINE AR_PROOF CLAUDECODE SLURM_JOB_ID \
  {http,https,no}_proxy {HTTP,HTTPS,NO}_PROXY SSL_CERT_FILE NODE_EXTRA_CA_CERTS HF_ENDPOINT; do
  [[ -z ${!name-} ]] || keep+=("$name=${!name}")
done
keep+=(AR_FROM="${OLDPWD-}") # where the caller stands
exec env -i "${keep[@]}" PATH="$PATH" LANG=C.UTF-8 python3 -I "$root/container/harness" "$@"
