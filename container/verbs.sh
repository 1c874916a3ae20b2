# shellcheck shell=bash disable=SC2034  # variables are run.sh's
# Sourced by run.sh: the verbs that are for a person.
# What setup and test install, they show first.

readonly ENGINE_PACKAGES=(podman crun runc uidmap slirp4netns fuse-overlayfs ca-certificates)
readonly CLIENT_VERSION=2.1.328 # the Claude Code that the tests drive
readonly TEST_REQUIREMENTS=(pytest==9.2.0 ruff==0.17.6 playwright==1.65.2) # playwright drives the system's chromium

# usage: install_packages WHY PACKAGE...: with Debian's package manager; asks on a terminal, never takes root silently
install_packages() {
  local -r why=$1
  shift
  command -v apt-get >/dev/null || refuse "$why is missing; install it with your system's package manager, then try again"
  local -r as_root=$([[ $EUID == 0 ]] || printf 'sudo ')
  local -r command="${as_root}apt-get install -y --no-install-recommends $*"
  say "$why is missing. To install it:"
  say "    $command"
  if [[ -t 0 ]]; then
    local answer
    read -r -p "Run this now? [y/N] " answer
    [[ $answer == [yY]* ]] || refuse "nothing was installed"
  elif [[ $EUID != 0 ]]; then
    refuse "run the command above, then try again"
  fi
  # shellcheck disable=SC2086  # words on purpose: sudo or nothing, then the command as it was shown
  ${as_root}apt-get update -qq >&2
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive $command >&2 || refuse "the installation failed (see above)"
}

need_image() {
  py container/engine.py name >/dev/null 2>&1 || install_packages 'a container engine' "${ENGINE_PACKAGES[@]}"
  IMAGE=$(py container/engine.py image) && return
  [[ $? == 3 ]] || exit "$REFUSED" # 3: no registry in reach, and the base image wants this tool
  install_packages mmdebstrap mmdebstrap
  IMAGE=$(py container/engine.py image) || exit "$REFUSED"
}

verb_setup() {
  need_image
  local name
  name=$(set -o pipefail; py .claude/hooks/program.py | sed -n 's/^ "data": "\(.*\)",$/\1/p') || exit "$REFUSED"
  if [[ ! -e $(data_folder)/$name/info.json ]]; then
    [[ $name == prints ]] || refuse "data/$name is missing; ./run.sh data $name makes it, of your own data with --odvg DIR (program.md names it)"
    verb_data prints
  fi
  local plan
  # refused, because train.py is being edited: a reason to go no further only where there is no baseline
  plan=$(result plan 0 "$IMAGE") || ! result status | grep -q 'not measured yet' || exit "$REFUSED"
  if grep -qx 'kind=baseline' <<<"$plan"; then
    say "measuring the baseline: two trainings of the train.py in HEAD"
    experiment baseline
  else
    result status
  fi
}

# usage: test [PYTEST ARGS]
verb_test() {
  local missing=()
  python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
  local tool
  for tool in npm tmux shellcheck chromium slurmctld slurmd; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  command -v srun >/dev/null || missing+=(slurm-client)
  ((${#missing[@]} == 0)) || install_packages "for the tests, ${missing[*]}" "${missing[@]}"
  need_image
  if [[ $(cat tests/.venv/requirements 2>/dev/null) != "${TEST_REQUIREMENTS[*]}" ]]; then
    say "tests: a virtual environment with ${TEST_REQUIREMENTS[*]}"
    python3 -m venv --clear tests/.venv && tests/.venv/bin/python -m pip install -q "${TEST_REQUIREMENTS[@]}"
    printf '%s\n' "${TEST_REQUIREMENTS[*]}" >tests/.venv/requirements
  fi
  if [[ $(tests/.client/node_modules/.bin/claude --version 2>/dev/null) != "$CLIENT_VERSION "* ]]; then
    say "tests: Claude Code $CLIENT_VERSION"
    npm install --silent --no-audit --no-fund --prefix tests/.client "@anthropic-ai/claude-code@$CLIENT_VERSION" >&2
  fi
  exec tests/.venv/bin/python -m pytest "${@:-tests}"
}

# usage: keep N: overrule a verdict
verb_keep() {
  [[ ${1-} =~ ^[0-9]+$ ]] || refuse "usage: ./run.sh keep N"
  take_lock
  recover
  local from
  from=$(git_ rev-parse -q --verify "refs/experiments/$1") || refuse "there is no experiment $1"
  BLOB=$(git_ rev-parse "$from:train.py") PAD=$(git_ hash-object -w --no-filters -- scratchpad.md)
  INCUMBENT=$(git_ rev-parse HEAD:train.py)
  [[ $BLOB != "$INCUMBENT" ]] || refuse "experiment $1 is the incumbent already"
  [[ $(git_ hash-object --no-filters -- train.py) == "$INCUMBENT" ]] || refuse "train.py has uncommitted changes; commit or undo them first"
  IMAGE=$(py container/engine.py image)
  N=$(result plan 0 "$IMAGE" | sed -n 's/^n=//p') VERDICT=kept
  WORK=$(mktemp -d "$RUNS/work.XXXXXX")
  BY_HAND="experiment $1, kept by hand: $(git_ show -s --format='%(trailers:key=Hypothesis,valueonly,separator=)' "$from")"
  : >"$(file "$N" log)"
  record_attempt candidate "$BLOB" "$PAD"
  git_ log -1 --format='%h %s'
}

# beside the main worktree's .git, so that all worktrees share it
data_folder() { printf '%s/data' "$(dirname -- "$(git_ rev-parse --path-format=absolute --git-common-dir)")"; }

# usage: data NAME [--odvg DIR]: draw, fetch or import a data set
verb_data() {
  [[ ${1-} =~ ^[A-Za-z0-9][A-Za-z0-9_.-]*$ ]] || refuse "usage: ./run.sh data prints | ukiyo-e [--annotations DIR] [--images DIR_OR_ZIP] [--weights DIR] | NAME --odvg DIR"
  [[ ! -e $(data_folder)/$1 ]] || refuse "data/$1 exists already; move it away first"
  py container/engine.py data "$(data_folder)" "$@"
}

# usage: final: train the best on training and validation pairs, longer, and look at the test pairs once
verb_final() {
  (($# == 0)) || refuse "usage: ./run.sh final"
  publish final
}

# usage: audit [K] [--ablate]: baseline and best, K fresh seeds each, on pairs the loop never used
verb_audit() {
  local seeds=3 ablate='' word
  for word in "$@"; do
    case $word in
      --ablate) ablate=ablate ;;
      [2-9] | [1-9][0-9]) seeds=$word ;;
      *) refuse "usage: ./run.sh audit [K] [--ablate], with K from 2 to 99" ;;
    esac
  done
  publish audit "$seeds" "$ablate"
}

# usage: publish final|audit ARGS...: measure, record, and keep what was made under final/N, which the agent cannot read
publish() {
  take_lock
  exec 6>>"$COMMON/autoresearch.audit"
  flock -n 6 || refuse "an audit or a final runs in another worktree; both draw pairs into the same folder, so wait for it"
  IMAGE=$(py container/engine.py image) || exit "$REFUSED"
  recover
  take_device "$(py .claude/hooks/program.py | sed -n 's/^ "devices": \([0-9]*\),$/\1/p')"
  rm -rf final/work.* && mkdir -p final
  WORK=$(mktemp -d final/work.XXXXXX); chmod 755 "$WORK"
  python3 -I container/audit.py "$WORK" "$IMAGE" "$@" >"$WORK/shown" 9>&- 6>&- & # our own child, as in run.sh
  CHILD=$!
  wait "$CHILD" || exit "$REFUSED"
  local head tree
  head=$(git_ rev-parse HEAD)
  tree=$(tree_with "$head" "$(git_ rev-parse HEAD:train.py)" "$(git_ rev-parse HEAD:scratchpad.md)" "$WORK/result.json")
  N=$(git_ for-each-ref --format='%(refname:lstrip=2)' refs/experiments/ | sort -n | tail -n 1)
  while :; do
    N=$((N + 1))
    sed -i "s/^Experiment: .*/Experiment: $N/" "$WORK/message"
    COMMIT=$(commit_tree "$tree" "$head" "$WORK/message")
    claim "$N" "$COMMIT" && break
  done
  cat "$WORK/shown" # only now: whoever has seen the numbers finds the look counted
  rm -rf "$WORK"/{index,best,with,without,message} "$WORK"/run-*/{images,captions}.npy
  [[ $1 == final ]] || rm -f "$WORK"/run-*/out.tar
  mv -T "$WORK" "final/$(printf %04d "$N")"
  printf 'record:      experiment %d; logs%s in final/%04d\n' "$N" "$([[ $1 != final ]] || printf ' and the checkpoint (run-1/out.tar)')" "$N"
}

# report.html and progress.png, for a person: they show validation pairs
verb_report() { py container/report.py; }

usage() {
  cat <<'TEXT'
./run.sh                one experiment: train, judge, commit or revert (this is what Claude Code runs)
./run.sh setup          engine, image, built-in data, baseline; only what is missing
./run.sh test           all tests, with what they need
./run.sh data NAME [--odvg DIR]   draw prints, fetch ukiyo-e, or import your own ODVG lines and images
./run.sh status|log [N]|report   where things stand; the last N experiments; report.html for a browser
./run.sh night [HH:MM|stop]       Claude Code at work until the plan ends or that hour, whatever happens meanwhile
./run.sh keep N         overrule a verdict: make experiment N the incumbent
./run.sh audit [K] [--ablate]     baseline against best on fresh pairs, K seeds each: the numbers to publish
./run.sh final          the best, trained longer on all but the test pairs, judged once on those
./run.sh doctor         what this machine can hold, and what it cannot
exit status             0 recorded, 1 recorded as failed, 2 refused and nothing ran
TEXT
}

# usage: person VERB ARGS...
person() {
  case $1 in
    help | --help | -h) usage ;;
    setup | test | data | keep | final | audit | report)
      [[ -z ${AGENT-} ]] || refuse "'$1' is for a person, in a terminal"
      "verb_$1" "${@:2}"
      ;;
    *) say "run.sh: unknown verb '$1'"; usage >&2; exit "$REFUSED" ;;
  esac
}
