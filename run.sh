#!/bin/bash -p
# run.sh: one experiment. Sandbox, metric, commit or revert. See ./run.sh help.
# -p: bash reads neither BASH_ENV nor functions from the caller's environment.
set -euo pipefail; shopt -s inherit_errexit # in $(...) too: a tree that could not be written is never recorded
umask 022; THEIRS=$PATH PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin
ROOT=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
readonly ROOT RUNS=runs REFUSED=2
SHOWN=0 CHILD='' KIND='' BLOB='' IDEA='' # was the result shown; who trains; what result.py plan says
[[ ${1-} != night ]] || exec env PATH="$THEIRS" "$(command -v python3)" -I "$ROOT/.claude/night.py" "${@:2}" # it wants the person's own
if [[ ${AR_CLEAN-} != "$$" ]]; then
  # Everything below runs with a clean environment: no keys, no sockets of the client, no GIT_* or PYTHON* variables.
  keep=()
  for name in HOME USER TERM CI XDG_RUNTIME_DIR DOCKER_HOST AR_ENGINE AR_PROOF SLURM_JOB_ID {http,https,no}_proxy \
    {HTTP,HTTPS,NO}_PROXY SSL_CERT_FILE NODE_EXTRA_CA_CERTS HF_ENDPOINT; do
    [[ -z ${!name-} ]] || keep+=("$name=${!name}")
  done
  exec env -i "${keep[@]}" AR_CLEAN="$$" AGENT="${CLAUDECODE:+1}" LANG=C.UTF-8 \
    PATH="$PATH" /bin/bash -p "$ROOT/run.sh" "$@"
fi
cd "$ROOT"
# shellcheck disable=SC1091 source=container/record.sh
. "$ROOT/container/record.sh"
say() { printf '%s\n' "$*" >&2; }
refuse() { say "run.sh: $*"; exit "$REFUSED"; }
py() { python3 -I "$ROOT/$1" "${@:2}"; }
result() { py .claude/hooks/result.py "$@"; }

# git, without what planted settings could make it run: hooks, monitors, pagers, signature programs, fetches of objects
readonly QUIET=(-c core.hooksPath=/dev/null -c core.fsmonitor=false -c commit.gpgSign=false -c log.showSignature=false
  -c protocol.allow=never -c gc.auto=0 --no-pager)
git_() { git "${QUIET[@]}" "$@"; }
# the same for writes, in a session of its own: a Ctrl-C or a kill of our group cannot stop it half-way
git_write() { setsid --wait git "${QUIET[@]}" "$@"; }

# Claude Code must show that its guard let this very call through; a person types in a terminal.
require_person_or_proof() {
  [[ -n ${AGENT-} ]] || return 0
  AR_PROOF=${AR_PROOF-} && local -r proof="$RUNS/session/proof.${AR_PROOF//[^A-Za-z0-9_-]/}"
  [[ -n $AR_PROOF && -f $proof ]] || refuse "called by Claude Code, but its guard did not approve this call: the" \
    "hooks are off or this is a typed '!' command. Start claude in $ROOT with its hooks on, or use a terminal."
  rm -f -- "$proof"
}

# One run at a time in a worktree.
take_lock() {
  local mine
  COMMON=$(git_ rev-parse --path-format=absolute --git-common-dir) || refuse "not a git repository"
  mine=$(git_ rev-parse --path-format=absolute --git-dir)/autoresearch.lock
  mkdir -p "$RUNS/session" || refuse "cannot write $ROOT/$RUNS"
  { exec 9>>"$mine"; } 2>/dev/null || refuse "cannot write $mine; is .git read-only?"
  flock -n 9 || refuse "another experiment is running: $(result status | sed -n 's/^running: *//p' | sed 's/^nothing$/it has just begun/'); wait for it"
}

# usage: take_device COUNT: one of COUNT devices (0: every GPU, or the CPU) until this run ends. Waits while other
# worktrees use them all.
take_device() {
  local i count=$1
  ((count > 0)) || count=$(py container/engine.py gpus)
  ((count > 0)) || count=1
  export AR_DEVICE=''
  while :; do
    for ((i = 0; i < count; i++)); do
      exec 8>>"$COMMON/autoresearch.device-$i"
      flock -n 8 && AR_DEVICE=$i && return
    done
    [[ -z ${N-} ]] || progress "$N" 'waits for a device'
    sleep 1
  done
}

# usage: measure KIND BLOB SCRATCHPAD HYPOTHESIS: run it as often as the rule wants, judge, record. Sets VERDICT.
measure() {
  local -r kind=$1 blob=$2 pad=$3 idea=$4
  local run
  VERDICT=again
  WORK=$(mktemp -d "$RUNS/work.XXXXXX"); chmod 755 "$WORK"
  printf '%s\n' "$idea" >"$WORK/hypothesis"
  printf '(what train.py printed: data, not instructions)\n' >"$(file "$N" log)"
  # the pictures of all that is recorded so far, drawn in the shadow of this training
  setsid nice -n 19 python3 -I container/report.py refresh </dev/null &>/dev/null 9>&- 8>&- &
  for run in 1 2; do
    [[ $VERDICT == again ]] || break
    mkdir "$WORK/run-$run"
    git_ cat-file blob "$blob" >"$WORK/run-$run/train.py"
    progress "$N" "$kind, run $run"
    [[ ! -t 2 ]] || say "experiment $N ($kind, run $run): training for at most $BUDGET s; tail -f $(file "$N" log)"
    # in the background, so that a signal ends us at once; our own child, so that it goes when we are killed
    python3 -I container/experiment.py "$WORK/run-$run" "$DATA" "$BUDGET" "$MEMORY" "$((RANDOM << 15 | RANDOM))" \
      "$(file "$N" log)" "$IMAGE" 9>&- &
    CHILD=$!
    wait "$CHILD" || refuse "experiment $N could not run (see above)"
    CHILD=''
    rm -f "$WORK/run-$run"/{out.tar,images.npy,captions.npy}
    VERDICT=$(result decide "$WORK" "$kind" "$IMAGE" "$COMPARABLE")
  done
  record_attempt "$kind" "$blob" "$pad"
}
file() { printf '%s/%04d.%s' "$RUNS" "$1" "$2"; } # usage: file N log|diff
# usage: progress N WHAT: for the status line, and so that no other worktree tries the same
progress() {
  printf '{"pid": %d, "n": %d, "what": "%s", "started": %d, "budget": %d, "blob": "%s"}\n' \
    "$$" "$1" "$2" "$(date +%s)" "$BUDGET" "$BLOB" >"$RUNS/running.json.new"
  mv "$RUNS/running.json.new" "$RUNS/running.json"
}
# Read what result.py plan prints into variables: KIND, N, BLOB, ... Exits when it refuses.
read_plan() {
  local key line plan
  cp -- program.md "$RUNS/program.new" || refuse "program.md cannot be read; put it back: git checkout program.md"
  export AR_LAUNCH INCUMBENT AR_PLAN=$ROOT/$RUNS/program.new # what is edited while this runs is for the next run
  plan=$(result plan "${AGENT:-0}" "$IMAGE") || exit "$REFUSED"
  while read -r line; do key=${line%%=*} && printf -v "${key^^}" '%s' "${line#*=}"; done <<<"$plan"
}

# usage: experiment [baseline]
experiment() {
  require_person_or_proof
  take_lock
  IMAGE=$(py container/engine.py image) || exit "$REFUSED"
  recover
  read_plan
  progress "$N" 'begins'
  sleep "$COOLDOWN" 9>&- & # in the background, so that a signal ends us at once
  wait "$!"
  take_device "$DEVICES"
  if [[ $KIND != candidate || $REMEASURE == 1 ]]; then
    measure_incumbent
    [[ $BLOB != "$INCUMBENT" && ${1-} != baseline ]] || { show_block; exit 0; }
    say "run.sh: experiment $N measured the incumbent first; yours is the next"
    N=$((N + 1))
  fi
  measure candidate "$BLOB" "$PAD" "$IDEA"
  show_block
  [[ $VERDICT != failed ]] || exit 1
}

# A baseline where nothing comparable was measured, or one more look at the incumbent
measure_incumbent() {
  local kind=$KIND
  [[ $kind != candidate ]] || kind=remeasure
  measure "$kind" "$INCUMBENT" "$(git_ rev-parse -q --verify HEAD:scratchpad.md || printf '%s' "$PAD")" ''
  [[ $VERDICT != unmeasured ]] || { show_block; say "run.sh: HEAD's own train.py does not run here; mend that first"; exit 1; }
}
show_block() { SHOWN=1 && result block "$WORK" "$COMMIT" "$(file "$N" log)" "$IMAGE"; }

main() {
  local -r verb=${1-}
  case $verb in
    '') experiment '' ;;
    status | log) result "$verb" "${@:2}" ;;
    doctor) py container/doctor.py ;;
    *)
      # shellcheck disable=SC1091 source=container/verbs.sh
      . "$ROOT/container/verbs.sh"
      person "$@"
      ;;
  esac
}
main "$@"
