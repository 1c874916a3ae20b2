#!/bin/bash -p
# run.sh: one experiment. Sandbox, metric, commit or revert. See ./run.sh help.
# -p: bash reads neither BASH_ENV nor functions from the caller's environment.
set -euo pipefail; shopt -s inherit_errexit # in $(...) too: a tree that could not be written is never recorded
umask 022; THEIRS=$PATH PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin
ROOT=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
readonly ROOT RUNS=runs REFUSED=2
SHOWN=0 KIND='' BLOB='' IDEA='' # whether the result was shown; what result.py plan says
[[ ${1-} != night ]] || exec env PATH="$THEIRS" "$(command -v python3)" -I "$ROOT/.claude/night.py" "${@:2}" # it wants the person's own
if [[ ${AR_CLEAN-} != "$$" ]]; then
  # Everything below runs with a clean environment: no keys, no sockets of the client, no GIT_* or PYTHON* variables.
  keep=()
  for name in HOME USER TERM CI XDG_RUNTIME_DIR DOCKER_HOST AR_ENGINE AR_PROOF {http,https,no}_proxy {HTTP,HTTPS,NO}_PROXY \
    SSL_CERT_FILE NODE_EXTRA_CA_CERTS HF_ENDPOINT; do
    [[ -z ${!name-} ]] || keep+=("$name=${!name}")
  done
  exec env -i "${keep[@]}" AR_CLEAN="$$" AGENT="${CLAUDECODE:+1}" LANG=C.UTF-8 \
    PATH="$PATH" /bin/bash -p "$ROOT/run.sh" "$@"
fi
cd "$ROOT"
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

take_lock() {
  COMMON=$(git_ rev-parse --path-format=absolute --git-common-dir) || refuse "not a git repository"
  mkdir -p "$RUNS/session" || refuse "cannot write $ROOT/$RUNS"
  { exec 9>>"$COMMON/autoresearch.lock"; } 2>/dev/null || refuse "cannot write $COMMON/autoresearch.lock; is .git read-only?"
  flock -n 9 || refuse "another experiment is running: $(result status | sed -n 's/^running: *//p' | sed 's/^nothing$/in another worktree/'); wait for it"
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
  setsid nice -n 19 python3 -I container/report.py refresh </dev/null &>/dev/null 9>&- &
  for run in 1 2; do
    [[ $VERDICT == again ]] || break
    mkdir "$WORK/run-$run"
    git_ cat-file blob "$blob" >"$WORK/run-$run/train.py"
    progress "$N" "$kind, run $run"
    # in the background, so that a signal ends us at once; our own child, so that it goes when we are killed
    python3 -I container/experiment.py "$WORK/run-$run" "$DATA" "$BUDGET" "$MEMORY" "$((RANDOM << 15 | RANDOM))" \
      "$(file "$N" log)" "$IMAGE" 9>&- &
    wait "$!" || refuse "experiment $N could not run (see above)"
    rm -f "$WORK/run-$run"/{out.tar,images.npy,captions.npy}
    VERDICT=$(result decide "$WORK" "$kind" "$IMAGE" "$COMPARABLE")
  done
  record_attempt "$kind" "$blob" "$pad"
}
file() { printf '%s/%04d.%s' "$RUNS" "$1" "$2"; } # usage: file N log|diff
# usage: progress N WHAT: for the status line, and for a person who waits
progress() {
  printf '{"pid": %d, "n": %d, "what": "%s", "started": %d, "budget": %d}\n' \
    "$$" "$1" "$2" "$(date +%s)" "$BUDGET" >"$RUNS/running.json"
  [[ ! -t 2 ]] || say "experiment $1 ($2): training for at most $BUDGET s; tail -f $(file "$1" log)"
}
# usage: record_attempt KIND BLOB SCRATCHPAD: commit object, ref, and for a kept one the branch, index and file
record_attempt() {
  local -r kind=$1 blob=$2
  local head tree pad=$3 theirs
  head=$(git_ rev-parse HEAD) theirs=$(git_ rev-parse -q --verify HEAD:scratchpad.md || :)
  [[ ! -f scratchpad.md || $(git_ hash-object --no-filters scratchpad.md) != "$theirs" ]] || pad=$theirs # committed meanwhile
  if [[ $VERDICT == kept && $(git_ rev-parse HEAD:train.py) != "$INCUMBENT" ]]; then
    VERDICT=discarded
    say "run.sh: HEAD's train.py changed meanwhile, so experiment $N is not kept; ./run.sh keep $N overrules"
  fi
  while :; do
    result write "$WORK" "$N" "$kind" "$VERDICT" "$blob" "$IMAGE" "${BY_HAND-}"
    tree=$(tree_with "$head" "$blob" "$pad" "$WORK/result.json" "$WORK"/run-*/{ranks,examples}.npy "$(file "$N" log)")
    COMMIT=$(commit_tree "$tree" "$head" "$WORK/message")
    claim "$N" "$COMMIT" && break
    mv -n "$(file "$N" log)" "$(file $((N + 1)) log)" # another worktree was faster
    N=$((N + 1))
  done
  git_ diff --no-color --no-ext-diff --no-textconv "$head:train.py" "$blob" | tr -d '\000-\010\013-\037\177' >"$(file "$N" diff)" || : # as clean as a log
  finish "$COMMIT"
}

# usage: claim N COMMIT: the record's number N is this commit's; 1 when another worktree was faster
claim() {
  git_write update-ref "refs/experiments/$1" "$2" 0000000000000000000000000000000000000000 2>/dev/null && return
  git_ rev-parse -q --verify "refs/experiments/$1" >/dev/null || refuse "cannot write refs/experiments/$1 (disk full or read-only?)"
  return 1
}

# usage: tree_with HEAD BLOB SCRATCHPAD [FILE...]: HEAD's tree, the two files replaced, FILEs under experiment/
tree_with() {
  local -rx GIT_INDEX_FILE="$ROOT/$WORK/index"
  local f name
  git_ read-tree "$1"
  {
    printf '100644 %s\ttrain.py\n100644 %s\tscratchpad.md\n' "$2" "$3"
    for f in "${@:4}"; do
      name=${f##*/}
      case $f in *.log) name=train.log ;; */run-2/*) name=${name/./-2.} ;; esac
      [[ ! -f $f ]] || printf '100644 %s\texperiment/%s\n' "$(git_ hash-object -w --no-filters "$f")" "$name"
    done
  } | git_ update-index --add --index-info
  git_ write-tree
}

# usage: commit_tree TREE PARENT MESSAGE_FILE: prints the commit; a missing identity does not lose a night
commit_tree() {
  local identity=()
  git_ var GIT_COMMITTER_IDENT >/dev/null 2>&1 || identity=(-c user.name=autoresearch -c user.email=autoresearch@localhost)
  git_ "${identity[@]}" commit-tree "$1" -p "$2" -F "$3"
}

# usage: finish COMMIT: carry a recorded verdict into the branch, the index and the file. Every step can be repeated:
# what a killed run left undone the next one completes.
finish() {
  local verdict blob pad head before next
  verdict=$(git_ show -s --format='%(trailers:key=Verdict,valueonly,separator=)' "$1")
  blob=$(git_ rev-parse "$1:train.py") pad=$(git_ rev-parse "$1:scratchpad.md")
  head=$(git_ rev-parse HEAD) before=$(git_ rev-parse "$1^:train.py")
  if [[ $verdict == kept ]]; then
    if [[ $(git_ rev-parse HEAD:train.py) == "$before" ]]; then
      git_ show -s --format=%B "$1" >"$WORK/message"
      next=$(commit_tree "$(tree_with "$head" "$blob" "$pad")" "$head" "$WORK/message")
      git_write update-ref -m "experiment: $(head -n 1 "$WORK/message")" HEAD "$next" "$head"
    fi
    update_user_index "$1^" "$1"
    blob=$before # train.py as it was: kept by hand, or put back meanwhile
  fi
  restore_file "$blob"
  result tsv >"$RUNS/experiments.tsv.new"; mv "$RUNS/experiments.tsv.new" "$RUNS/experiments.tsv"
}

# usage: update_user_index PARENT COMMIT: our two entries, unless the user has staged something else there
update_user_index() {
  local f
  for f in train.py scratchpad.md; do
    if [[ $(git_ ls-files -s -- "$f" | cut -d' ' -f2) == "$(git_ rev-parse -q --verify "$1:$f")" ]]; then
      git_write update-index --cacheinfo "100644,$(git_ rev-parse "$2:$f"),$f"
    fi
  done
}

# usage: restore_file BLOB: put train.py back to HEAD's, only if it still is what was judged
restore_file() {
  [[ -f train.py && ! -L train.py && $(git_ hash-object --no-filters -- train.py) == "$1" ]] || return 0
  git_ cat-file blob HEAD:train.py >"$RUNS/train.py.new"; mv -f "$RUNS/train.py.new" train.py
}

# usage: clean_up STATUS: at the beginning and the end; a failure that nobody foresaw is "nothing ran", not "failed"
clean_up() {
  rm -rf -- "$RUNS"/{work.*,*.new,running.json}
  py container/engine.py sweep
  (($1 == 0 || $1 == REFUSED || $1 > 128 || SHOWN)) || refuse "stopped by the error above; mend that and run it again, which completes what is recorded"
}

# What a killed run left: containers, temporary files, stale locks on our refs, a verdict not carried out.
recover() {
  local last lock state
  state=$(cd "$(git_ rev-parse --git-dir)" && printf '%s\n' * | grep -Exm1 'rebase-(merge|apply)|(MERGE|CHERRY_PICK|REVERT)_HEAD') || :
  [[ -z $state ]] || refuse "git is in the middle of a ${state%[-_]*}; finish or abort it first"
  clean_up 0
  trap 'clean_up $?' EXIT
  trap 'exit 143' INT TERM HUP
  # our lock is held, and git children keep it open while they live: these locks have no owner
  find "$COMMON/refs/experiments" -name '*.lock' -delete 2>/dev/null || :
  for lock in "$(git_ rev-parse --git-path index.lock)" "$(git_ rev-parse --git-path HEAD.lock)" \
    "$COMMON/$(git_ symbolic-ref -q HEAD || printf HEAD).lock" "$COMMON/packed-refs.lock"; do
    [[ -e $lock ]] || continue
    pgrep -x git >/dev/null && refuse "$lock exists and git is running; wait for it to finish, then try again"
    rm -f -- "$lock" && say "run.sh: removed $lock, left by a git that was killed"
  done
  # this worktree's last run, recorded (the number may have gone to another's), but never in its history file
  last=$(printf '%s\n' "$RUNS"/[0-9]*.log | sort -V | sed -n '$s|^.*/0*\([1-9][0-9]*\)\.log$|\1|p')
  if [[ -n $last ]] && ! grep -qs "^$last"$'\t' "$RUNS/experiments.tsv" && [[ $(git_ rev-parse -q --verify \
    "refs/experiments/$last:experiment/train.log") == $(git_ hash-object --no-filters "$(file "$last" log)") ]]; then
    WORK=$(mktemp -d "$RUNS/work.XXXXXX")
    finish "refs/experiments/$last"
    say "run.sh: completed experiment $last, which had been interrupted"
  fi
}

# Read what result.py plan prints into variables: KIND, N, BLOB, ... Exits when it refuses.
read_plan() {
  local key value plan
  cp -- program.md "$RUNS/program.new" || refuse "program.md cannot be read; put it back: git checkout program.md"
  export AR_PLAN=$ROOT/$RUNS/program.new # what is edited while this runs is for the next run
  plan=$(result plan "${AGENT:-0}" "$IMAGE") || exit "$REFUSED"
  while IFS='=' read -r key value; do printf -v "${key^^}" '%s' "$value"; done <<<"$plan"
}

# usage: experiment [baseline]
experiment() {
  require_person_or_proof
  take_lock
  IMAGE=$(py container/engine.py image) || exit "$REFUSED"
  recover
  read_plan
  sleep "$COOLDOWN"
  if [[ $KIND != candidate || $REMEASURE == 1 ]]; then
    measure_incumbent
    [[ $BLOB != "$INCUMBENT" && ${1-} != baseline ]] || { show_block; exit 0; }
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
  measure "$kind" "$INCUMBENT" "$(git_ rev-parse HEAD:scratchpad.md)" ''
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
