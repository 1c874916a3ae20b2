# shellcheck shell=bash disable=SC2034  # variables are run.sh's
# Sourced by run.sh: the record in git. An attempt becomes a commit under refs/experiments/, its verdict is carried out,
# and what a killed run left behind is completed.

# usage: record_attempt KIND BLOB SCRATCHPAD: commit object, ref, and for a kept one the branch, index and file
record_attempt() {
  local -r kind=$1 blob=$2
  local head tree pad=$3 theirs asked=("$RUNS"/web/*)
  head=$(git_ rev-parse HEAD) theirs=$(git_ rev-parse -q --verify HEAD:scratchpad.md || :)
  [[ ! -f scratchpad.md || $(git_ hash-object --no-filters scratchpad.md) != "$theirs" ]] || pad=$theirs # committed meanwhile
  if [[ $VERDICT == kept && $(git_ rev-parse HEAD:train.py) != "$INCUMBENT" ]]; then
    VERDICT=discarded
    say "run.sh: HEAD's train.py changed meanwhile, so experiment $N is not kept; ./run.sh keep $N overrules"
  fi
  # what was asked of the web for this experiment, a file each; removed only once it is recorded
  [[ $kind != candidate || ! -f ${asked[0]} ]] || printf '%s\0' "${asked[@]}" | xargs -0 cat -- >"$WORK/web.log"
  while :; do
    result write "$WORK" "$N" "$kind" "$VERDICT" "$blob" "$IMAGE" "${BY_HAND-}"
    tree=$(tree_with "$head" "$blob" "$pad" "$WORK"/{result.json,web.log} "$WORK"/run-*/{ranks,examples}.npy \
      "$RUNS/program.new" "$(file "$N" log)")
    COMMIT=$(commit_tree "$tree" "$head" "$WORK/message")
    claim "$N" "$COMMIT" && break
    mv -n "$(file "$N" log)" "$(file $((N + 1)) log)" # another worktree was faster
    N=$((N + 1))
  done
  [[ ! -f $WORK/web.log ]] || printf '%s\0' "${asked[@]}" | xargs -0 rm -f --
  git_ diff --no-color --no-ext-diff --no-textconv "$head:train.py" "$blob" | tr -d '\000-\010\013-\037\177' >"$(file "$N" diff)" || : # as clean as a log
  finish "$COMMIT"
}

# Until 7 is closed. git children keep it open while they live: the locks of git on these refs then have no owner,
# unless a person's git is at work, which is waited for.
alone_with_the_record() {
  local seconds
  exec 7>>"$COMMON/autoresearch.record" && flock 7
  for ((seconds = 0; seconds < 10; seconds++)); do
    [[ -n $(find "$COMMON/refs/experiments" -name '*.lock' -print -quit 2>/dev/null) ]] || return 0
    pgrep -x git >/dev/null || break
    sleep 1
  done
  find "$COMMON/refs/experiments" -name '*.lock' -delete 2>/dev/null || :
}

# usage: claim N COMMIT: the record's number N is this commit's; 1 when another worktree was faster
claim() {
  local status=0
  alone_with_the_record
  git_write -c core.filesRefLockTimeout=5000 update-ref "refs/experiments/$1" "$2" 0000000000000000000000000000000000000000 2>/dev/null || status=1
  exec 7>&-
  ((status)) || return 0
  ! git_ rev-parse -q --verify "refs/experiments/$1" >/dev/null || return 1
  refuse "cannot write refs/experiments/$1 (disk full or read-only?)"
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
      case $f in */web.log) ;; *.log) name=train.log ;; */run-2/*) name=${name/./-2.} ;; *.new) name=program.md ;; esac
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
  # in a phase with `patience` the next idea is built on this one
  [[ $(git_ show -s --format='%(trailers:key=Chain,valueonly,separator=)' "$1") == *', goes on' ]] || restore_file "$blob"
  result tsv >"$RUNS/experiments.tsv.new"; mv "$RUNS/experiments.tsv.new" "$RUNS/experiments.tsv"
}

# usage: update_user_index PARENT COMMIT: our two entries, unless the user has staged something else there
update_user_index() {
  local f
  for f in train.py scratchpad.md; do
    if [[ $(git_ ls-files -s -- "$f" | cut -d' ' -f2) == "$(git_ rev-parse -q --verify "$1:$f")" ]]; then
      git_write update-index --add --cacheinfo "100644,$(git_ rev-parse "$2:$f"),$f"
    fi
  done
}

# usage: restore_file BLOB: put train.py back to HEAD's, only if it still is what was judged
restore_file() {
  [[ -f train.py && ! -L train.py && $(git_ hash-object --no-filters -- train.py) == "$1" ]] || return 0
  git_ cat-file blob HEAD:train.py >"$RUNS/train.py.new"; mv -f "$RUNS/train.py.new" train.py
}

# usage: clean_up STATUS: at the beginning and the end; a failure that nobody foresaw, such as a git that the kernel
# killed, is "nothing ran", not "failed"; 130 and 143 are Ctrl-C and a kill
clean_up() {
  py container/engine.py sweep
  rm -rf -- "$RUNS"/{work.*,*.new,running.json}
  (($1 == 0 || $1 == REFUSED || $1 == 130 || $1 == 143 || SHOWN)) || refuse "stopped by the error above; mend that and run it again, which completes what is recorded"
}

# Before what it works on is cleaned up: it would write there, and start the next sandbox.
end_child() { [[ -z $CHILD ]] || { kill "$CHILD" 2>/dev/null && wait "$CHILD"; } || :; }

# usage: git_runs_here LOCK: whether a git that could own it works in this worktree; packed-refs belong to all of them
git_runs_here() {
  local pid
  for pid in $(pgrep -x git); do
    [[ $1 != *packed-refs.lock && $(readlink "/proc/$pid/cwd" 2>/dev/null) != "$ROOT"* ]] || return 0
  done
  return 1
}

# What a killed run left: containers, temporary files, stale locks on our refs, a verdict not carried out.
recover() {
  local last lock state
  state=$(cd "$(git_ rev-parse --git-dir)" && printf '%s\n' * | grep -Exm1 'rebase-(merge|apply)|(MERGE|CHERRY_PICK|REVERT)_HEAD') || :
  [[ -z $state ]] || refuse "git is in the middle of a ${state%[-_]*}; finish or abort it first"
  clean_up 0
  trap 'clean_up $?' EXIT
  trap 'end_child; exit 143' INT TERM HUP
  alone_with_the_record && exec 7>&-
  # our lock is held, and git children keep it open while they live: these locks have no owner, unless a person's git
  for lock in "$(git_ rev-parse --git-path index.lock)" "$(git_ rev-parse --git-path HEAD.lock)" \
    "$COMMON/$(git_ symbolic-ref -q HEAD || printf HEAD).lock" "$COMMON/packed-refs.lock"; do
    [[ -e $lock ]] || continue
    ! git_runs_here "$lock" || refuse "$lock exists and git is running; wait for it to finish, then try again"
    rm -f -- "$lock" && say "run.sh: removed $lock, left by a git that was killed"
  done
  # this worktree's last run, recorded (the number may have gone to another's), but never in its history file
  last=$(printf '%s\n' "$RUNS"/[0-9]*.log | sort -V | sed -n '$s|^.*/0*\([1-9][0-9]*\)\.log$|\1|p')
  if [[ -n $last ]] && ! grep -qs "^$last"$'\t' "$RUNS/experiments.tsv" && [[ $(git_ rev-parse -q --verify \
    "refs/experiments/$last:experiment/train.log") == $(git_ hash-object --no-filters "$(file "$last" log)") &&
    $(git_ show -s --format='%(trailers:key=Branch,valueonly,separator=)' "refs/experiments/$last") == \
      "$(git_ symbolic-ref --short -q HEAD || printf detached)" ]]; then
    WORK=$(mktemp -d "$RUNS/work.XXXXXX")
    finish "refs/experiments/$last"
    say "run.sh: completed experiment $last, which had been interrupted"
  fi
}
