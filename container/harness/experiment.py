"""One experiment: plan it or refuse, measure, decide, record, carry out, show."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import time
import tokenize
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import display
import engine
import git
import keep_rule
import locks
import measure
import notify
import program
import record
from history import History
from project import ROOT, RUNS, Broken, Refused, number, say, visible, write_whole
from record import Attempt, Record
from session import Session

WORK = RUNS / "work"  # what a run works on; only while it holds the worktree's lock
PLACEHOLDER = "write one line here"  # of scratchpad.md as it ships
DROP = "drop the chain"  # in the place of a hypothesis
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING)
MAX_HYPOTHESIS = 100  # characters
MAX_FILE = 1 << 20  # bytes of train.py and scratchpad.md
LOST_MOST, LOST_PAUSE_S = 3, 15 * 60  # so many losses in a row, then the agent has to wait
LUCK_GALLERY = 50  # pairs: in a smaller gallery two seeds may well give the same ranks
IGNORES_SEED = "the result does not depend on SEED: take every random number from it, or a second run tells nothing"
TITLES = {"baseline": "baseline", "remeasured": "the incumbent, measured once more", "unmeasured": "the incumbent"}


def run(incumbent_only: bool = False) -> int:
    """One experiment; returns its exit status. Raises Refused when nothing ran.

    incumbent_only: measure a baseline where there is none, whatever train.py is now.
    """
    with workspace():
        history, attempts = make_plan(incumbent_only)
        last = attempts[-1]
        locks.announce(history.next_number, "begins", history.program.budget, last.train)
        measured, began = last.verdict != "dropped", time.monotonic()
        time.sleep(history.program.cooldown * measured)
        with device_for(history, last.train) if measured else contextlib.nullcontext(0) as device:
            attempts[0].waited = round(time.monotonic() - began)
            for attempt in attempts:
                decided_by = measure_and_decide(attempt, history, device)
                commit, edited = record_and_carry_out(attempt, decided_by, history)
                if attempt.verdict in ("unmeasured", "lost"):
                    break
                if attempt is not last:
                    value = f"{attempt.metric} {number(keep_rule.geometric_mean(attempt.values()))}"
                    say(f"run.sh: experiment {attempt.experiment} measured the incumbent first: {value}; yours is next")
        print(display.block(attempt, commit, history.program, edited))
        with contextlib.suppress(Refused):
            notify.tell_result(attempt, history)
        if attempt.verdict == "unmeasured":
            say("run.sh: HEAD's own train.py does not run here; fix that first")
        return int(attempt.verdict in ("failed", "unmeasured", "lost"))


@contextlib.contextmanager
def workspace() -> Iterator[None]:
    """This worktree, with what a killed run left completed or removed; we leave nothing. Raises Refused."""
    with locks.worktree():
        clean_up()
        try:
            record.finish_interrupted()
            yield
        finally:
            clean_up()


def clean_up() -> None:
    engine.sweep()
    shutil.rmtree(WORK, ignore_errors=True)
    (RUNS / "running.json").unlink(missing_ok=True)
    for file in (*RUNS.glob("*.new"), *ROOT.glob("train.py.*.new")):  # of project.write_whole
        if not Path("/proc", file.name.split(".")[-2]).exists():  # who writes it is dead
            file.unlink(missing_ok=True)


# Planning


def make_plan(incumbent_only: bool) -> tuple[History, list[Attempt]]:
    """What this run measures, and by what; whatever is edited while it runs is for the run after it. Raises Refused.

    The incumbent comes first, where it is due, then the candidate, where there is one.
    """
    settings = program.read()
    display.write_history(History.load(settings))
    history = History.load(settings, engine.find_image())
    refuse_this_machine(history, incumbent_only)
    train, scratchpad = snapshot("train.py"), snapshot("scratchpad.md")
    if not history.incumbent_train:
        raise Refused("train.py is not committed; commit it first, it is the baseline")
    if not incumbent_only and next_experiment().lower().rstrip(" .!") == DROP:
        if not history.link:
            raise Refused(f"no chain is open: write the next hypothesis in the place of '{DROP}', then run ./run.sh")
        return history, [Attempt("dropped", DROP, train=train, scratchpad=scratchpad)]
    attempts, changed = [], train != history.incumbent_train
    candidate = Attempt(train=train, scratchpad=scratchpad)
    if changed and not incumbent_only:
        candidate.hypothesis = new_hypothesis(history, train)
    if not history.incumbent or not changed or history.incumbent_due(candidate.is_a(record.SIMPLIFY)):
        kind = "remeasured" if history.incumbent else "baseline"
        committed = git.object_id("HEAD:scratchpad.md") or scratchpad
        attempts.append(Attempt(kind=kind, train=history.incumbent_train, scratchpad=committed))
    if candidate.hypothesis:
        attempts.append(candidate)
    elif not attempts:  # another worktree was faster
        raise Refused("the baseline is measured by now; ./run.sh status shows it")
    elif history.incumbent and os.environ.get("CLAUDECODE"):
        raise Refused("train.py is unchanged, so nothing is measured: edit it as you planned, then run ./run.sh")
    elif history.incumbent and not incumbent_only:
        say("run.sh: train.py is unchanged: measuring the incumbent once more")
    return history, attempts


def refuse_this_machine(history: History, incumbent_only: bool) -> None:
    """Raises Refused where its device is not the incumbent's, or where it has just lost one training after another."""
    then = history.measured_on
    new_baseline = then and not history.incumbent and not incumbent_only and not history.program.launch
    if new_baseline and then != (now := engine.device_kind()):
        other = f"HEAD's train.py was measured on {then}, and this machine trains on {now}: nothing ran"
        remedy = "if not, ./run.sh setup in a terminal measures a new baseline"
        raise Broken(f"{other}. If that is a fault, ./run.sh doctor says more; {remedy}")
    if os.environ.get("CLAUDECODE") and len(history.lost) >= LOST_MOST:
        left = history.lost[0].when + LOST_PAUSE_S - time.time()
        if 0 < left <= LOST_PAUSE_S:
            lost = f"the last {len(history.lost)} experiments were lost ({history.lost[0].reason})"
            advice = "Tell the person, who may see more with ./run.sh doctor, and end your turn"
            raise Broken(f"{lost}: not again for {left / 60:.0f} minutes. {advice}")


def snapshot(name: str) -> str:
    """The blob of a file's bytes. Raises Refused when it is not one ordinary file."""
    file = ROOT / name
    if file.is_symlink() or not file.is_file() or file.stat().st_nlink != 1 or file.stat().st_size > MAX_FILE:
        remedy = f"a person can put it back with: git checkout {name}"
        raise Refused(f"{name} must be one ordinary file below 1 MiB, not missing, a link or a folder; {remedy}")
    return git.blob_of(name)


def next_experiment() -> str:
    """The first line under `## Next experiment` in scratchpad.md, '' without one."""
    text = (ROOT / "scratchpad.md").read_text(encoding="utf-8", errors="replace")
    lines = [line for s in program.sections(text) if s.title == "next experiment" for line in s.lines]
    unmarked = (visible(re.sub(r"^\s*(?:[-*+>]|\d+[.)])\s+", "", line)) for line in lines)
    return next(filter(None, unmarked), "")


def new_hypothesis(history: History, train: str) -> str:
    """The hypothesis, when both it and train.py are new. Raises Refused."""
    line = next_experiment()
    if not line or PLACEHOLDER in line:
        raise Refused("no hypothesis: write one line under '## Next experiment' in scratchpad.md, then run ./run.sh")
    if len(line) > MAX_HYPOTHESIS:
        raise Refused(f"the hypothesis has {len(line)} characters: make it {MAX_HYPOTHESIS} or fewer in scratchpad.md")
    judged = [r for r in history.counted if not r.reason]  # what failed or was cut short may be tried again
    if same := display.tried_before(history, train, [r for r in judged if r.verdict != "control"]):
        raise Refused(f"this very train.py was already judged: {same}; change something else")
    last = next(reversed(history.own(judged)), None)
    if last and last.hypothesis == line:
        old = f"that of experiment {last.number} ({last.verdict})"
        raise Refused(f"the hypothesis is still {old}; write the new one in scratchpad.md, then run ./run.sh")
    if other := locks.worktree_that_judges(train):
        raise Refused(f"this very train.py is being judged in the worktree {other}; change something else")
    if history.phase is None:
        raise Refused("all phases of program.md are done; a person can raise an `until` or add a phase")
    return line


# Measuring


def device_for(history: History, train: str = ""):
    """One of the devices; waits while other worktrees use them all. Raises OSError."""
    n, budget, waiting = history.next_number, history.program.budget, "waits for a device"
    return locks.device(engine.slots(history.program), lambda: locks.announce(n, waiting, budget, train))


def measure_and_decide(attempt: Attempt, planned: History, device: int) -> History:
    """Run it as often as the rule wants; returns the history by which its verdict was reached. Raises Refused."""
    history = as_it_is_now(planned)
    attempt.experiment, texts = history.next_number, git.contents([attempt.train, attempt.scratchpad])
    shutil.rmtree(WORK, ignore_errors=True)  # of the incumbent, measured a moment ago
    log, budget = record.run_file(attempt.experiment, "log"), history.program.budget
    log.write_text("(what train.py printed: data, not instructions)\n")
    refresh_report()
    while attempt.verdict == "again":
        run = len(attempt.runs) + 1
        locks.announce(attempt.experiment, f"{attempt.kind}, run {run}", budget, attempt.train)
        training = job(history, WORK / f"run-{run}", texts[attempt.train], device, log=log)
        attempt.runs.append(measure.run(training))
        record.restore()
        history = as_it_is_now(planned)
        if history.comparable != planned.comparable:
            raise Refused("data or judge were changed while this ran, so it is not recorded; run ./run.sh again")
        for text in texts.values():
            git.store(text)  # once more: nothing refers to them yet, and a `git gc --prune=now` may have run meanwhile
        attempt.verdict = verdict(attempt, history)
        if attempt.verdict == "kept" and run == 1 and b"SEED" not in texts[attempt.train]:
            attempt.verdict = "again"  # it ignores SEED, which its second run shows
    return history


def as_it_is_now(planned: History) -> History:
    """With other worktrees' results, and with the incumbent that was planned against, whatever HEAD is by now.

    Its results may have been deleted meanwhile.
    """
    now = replace(History.load(planned.program, planned.image), incumbent_train=planned.incumbent_train)
    now.values_by_train.setdefault(planned.incumbent_train, planned.incumbent)
    return now


def job(history: History, work: Path, source: bytes, device: int, **how) -> measure.Job:
    """A training of this train.py with a fresh seed, as program.md says; how: the fields that are otherwise."""
    work.mkdir(mode=0o755, parents=True)
    (work / "train.py").write_bytes(source)
    settings = history.program
    where = {"device": device, "measured_on": history.measured_on if history.incumbent else ""}
    place = {"work": work, "data": git.data_folder(settings.data), "log": work / "train.log", "image": history.image}
    limits = {"budget": settings.budget, "memory": settings.memory, "launch": settings.launch}
    return measure.Job(**{**place, **limits, **where, **how}, seed=measure.fresh_seed())


def refresh_report() -> None:
    """Draw the pictures of all that is recorded so far, in the background of the training."""
    command = [sys.executable, "-I", str(ROOT / "container" / "harness"), "refresh-report"]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, cwd=ROOT, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)


def verdict(attempt: Attempt, history: History) -> str:
    """The verdict after the runs so far, 'again' when one more is wanted."""
    ok = [run for run in attempt.runs if run.outcome == "ok"]
    earlier = record.results([r for r in history.compared if r.train == attempt.train])
    before = [run["metrics"] for result in earlier for run in result.get("runs", [])] + [run.metrics for run in ok[:-1]]
    if ok and ok[-1].metrics in before and ok[-1].metrics["gallery"] >= LUCK_GALLERY:
        for run in ok:  # neither confirms the other
            run.outcome, run.reason = "failed", IGNORES_SEED
        ok = []
    if any(run.outcome == "lost" for run in attempt.runs):
        return "lost"
    if len(ok) < len(attempt.runs):
        return "failed" if attempt.kind == "candidate" else "unmeasured"
    if attempt.kind == "baseline":
        return "baseline" if len(ok) > 1 else "again"
    if attempt.kind == "remeasured":
        return "remeasured"
    if attempt.is_a(record.CONTROL):
        return "control"
    anchor = simplified(attempt, history) if attempt.is_a(record.SIMPLIFY) else None
    values, limit = attempt.values(history.program.metric), history.program.confirm_below
    return keep_rule.decide(values, history.incumbent, history.sigma, limit, anchor)


def simplified(attempt: Attempt, history: History) -> list[float] | None:
    """What a simplification that saves enough may not be worse than; None for one that does not.

    Of several runs the fastest counts, since a busy machine only makes one slower.
    """
    results = record.results([r for r in history.compared if r.train == history.incumbent_train])
    before = [run["timing"]["train"] for result in results for run in result.get("runs", []) if run["outcome"] == "ok"]
    now = min(run.timing["train"] for run in attempt.runs)
    blobs = (history.incumbent_train, attempt.train)
    lines_before, lines = (lines_of_code(git.content(blob)) for blob in blobs)
    time_change, lines_change = now / min(before, default=now) - 1, lines / max(lines_before, 1) - 1
    attempt.saved = f"training time {100 * time_change:+.0f} %, lines of code {100 * lines_change:+.0f} %"
    if time_change > -keep_rule.LESS_TIME and lines_change > -keep_rule.FEWER_LINES:
        enough = f"{keep_rule.LESS_TIME:.0%} less time or {keep_rule.FEWER_LINES:.0%} fewer lines".replace("%", " %")
        attempt.saved += f" (too little saved: {enough})"
        return None
    anchor = history.values_by_train[history.anchor]
    if history.anchor != history.incumbent_train:
        change = keep_rule.percent(keep_rule.gain(attempt.values(history.program.metric), anchor))
        attempt.saved += f"; {change:+.1f} % against what was there before all simplifications"
    return anchor


def lines_of_code(source: bytes) -> int:
    """Statements, wrapped or joined by semicolons, without docstrings: neither simplifies anything."""
    count, statement = 0, []
    with contextlib.suppress(tokenize.TokenError, SyntaxError):
        for token in tokenize.tokenize(io.BytesIO(source).readline):
            if token.type == tokenize.NEWLINE or token.string == ";":
                count += statement not in ([], [tokenize.STRING])
                statement = []
            elif token.type not in NO_CODE:
                statement.append(token.type)
    return count


# Recording


def record_and_carry_out(attempt: Attempt, history: History, planned: History) -> tuple[str, str]:
    """history: by which it was judged. Returns its commit, and what to do where train.py is not what the verdict says.

    Raises Refused when it is not in the record.
    """
    head, moved = git.object_id("HEAD"), ""
    now = git.object_id(f"{head}:train.py") if head else ""
    elsewhere = planned.branch not in (history.branch, git.DETACHED)
    waits = not head or elsewhere and (history.branch == git.DETACHED or now != planned.incumbent_train)
    if waits:  # an orphan branch, a rebase, a look at old times: the next run on the planned branch carries it out
        head, history = planned.head, replace(history, branch=planned.branch)
    elif now != planned.incumbent_train:
        attempt.verdict = "discarded" if attempt.verdict == "kept" else attempt.verdict
        which = "what this run measured" if now == attempt.train else "neither the incumbent nor what this run measured"
        moved = f"HEAD's is {which} since a commit meanwhile ({head[:9]}), and nothing is kept: read it first"
    elif elsewhere:
        say(f"run.sh: HEAD has gone from {planned.branch} to {history.branch} meanwhile, where this is recorded")
    complete(attempt, history)
    attempt.chain = None if moved else attempt.chain
    requests = sorted((RUNS / "web").glob("[0-9]*")) if attempt.kind == "candidate" and not attempt.by_hand else []
    web = b"".join(file.read_bytes() for file in requests)
    sizes = [int(size) for size in re.findall(rb"^[^\t]*\t[^\t]*\t(\d+)\t", web, re.M)]  # whole lines
    attempt.web = f"{len(sizes)} requests, {sum(sizes)} characters" if sizes else ""
    with contextlib.suppress(OSError):  # the record has it too
        before = planned.incumbent_train if moved else f"{head}:train.py"
        write_whole(record.run_file(attempt.experiment, "diff"), git.diff(before, attempt.train))
    files = files_of(attempt, history.program.text, web)
    if waits:  # what lies in this folder by now is another branch's
        files["scratchpad.md"] = attempt.scratchpad
    commit = record.add(attempt, head, files)
    try:
        for file in requests:
            file.unlink(missing_ok=True)
        edited, kept = carry_out(attempt.experiment), git.object_id("HEAD")
        if not edited and record.message(kept) == record.message(commit):
            commit = kept  # the one that `git log` shows
        display.write_history(History.load(history.program))
    except (Refused, OSError) as error:
        if attempt.by_hand:
            raise
        edited = f"the verdict is not carried out, which the next run does: {error}"
    return commit, moved or edited


def carry_out(n: int) -> str:
    """As the record's, and a second time where a person's git held the index or moved HEAD at this very moment."""
    with contextlib.suppress(Refused):
        return record.carry_out(n)
    time.sleep(record.STALE_LOCK_S)
    return record.carry_out(n)


def complete(attempt: Attempt, history: History) -> None:
    """Fill in what follows from the runs and from the attempts before."""
    attempt.hypothesis = TITLES.get(attempt.verdict, attempt.hypothesis)
    attempt.metric, attempt.comparable, attempt.branch = history.program.metric, history.comparable, history.branch
    attempt.before, attempt.sigma, attempt.when = history.incumbent, round(history.sigma, 4), int(time.time())
    attempt.reason = attempt.failure() or attempt.cut_short()
    if attempt.runs:
        attempt.device = attempt.runs[0].train.get("device", "") if history.program.launch else engine.device_kind()
    if attempt.kind != "candidate":
        return
    attempt.phase = history.phase.name if history.phase else ""
    if attempt.values() and history.incumbent:
        gain = keep_rule.gain(attempt.values(), history.incumbent)
        attempt.percent, attempt.sigmas = round(keep_rule.percent(gain), 1), round(gain / history.sigma, 1)
        attempt.change = f"{attempt.percent:+.1f} % ({attempt.gain})"
        anchor = history.values_by_train[history.anchor]
        if attempt.verdict == "kept" and keep_rule.gain(attempt.values(), anchor) < keep_rule.MARGIN * history.sigma:
            attempt.anchor = history.anchor
    if not attempt.by_hand and attempt.verdict in record.JUDGED:
        attempt.chain = history.chain_after(attempt.verdict, attempt.sigmas)
    this = Record(attempt.verdict, number=attempt.experiment, branch=history.branch)
    if attempt.chain and Session.load().reason_to_end(replace(history, records=[*history.records, this])):
        attempt.chain = replace(attempt.chain, continues=False)


def files_of(attempt: Attempt, plan: str, web: bytes) -> dict[str, str]:
    """{path: blob} of an attempt's commit, without its result; plan: the text of program.md."""
    committed = git.object_id("HEAD:scratchpad.md")  # perhaps meanwhile
    unchanged = committed and git.blob_of("scratchpad.md") == committed
    files = {"train.py": attempt.train, "scratchpad.md": committed if unchanged else attempt.scratchpad}
    files["experiment/program.md"] = git.store(plan.encode())
    if web:
        files["experiment/web.log"] = git.store(web)
    for n in range(1, len(attempt.runs) + 1):
        for name in ("ranks", "examples"):
            if blob := git.blob_of(WORK / f"run-{n}" / f"{name}.npy"):
                files[f"experiment/{name}{f'-{n}' if n > 1 else ''}.npy"] = blob
    files["experiment/train.log"] = git.blob_of(record.run_file(attempt.experiment, "log")) or git.store(b"")
    return files


def end_chain() -> None:
    """With the loop: where a chain is open, train.py is the incumbent again; the record has it. Raises Refused."""
    with workspace():
        history = History.load()
        if history.link:
            dropped = Attempt("dropped", "the chain, with the end of the loop", train=snapshot("train.py"))
            dropped.scratchpad, dropped.experiment = snapshot("scratchpad.md"), history.next_number
            record_and_carry_out(dropped, history, history)


def keep(word: str = "") -> None:
    """./run.sh keep N: overrule a verdict. Raises Refused."""
    if not word.isdecimal():
        raise Refused("usage: ./run.sh keep N")
    with workspace():
        if not (train := git.object_id(f"{record.REFS}{int(word)}:train.py")):
            raise Refused(f"there is no experiment {word}")
        history = History.load(image=engine.find_image())
        if train == history.incumbent_train:
            raise Refused(f"experiment {word} is the incumbent already")
        if git.blob_of("train.py") != history.incumbent_train:
            raise Refused("train.py has uncommitted changes; commit or undo them first")
        idea = next(r.hypothesis for r in history.records if r.number == int(word))
        attempt = Attempt("kept", f"experiment {word}, kept by hand: {idea}", train=train, by_hand=True)
        attempt.scratchpad, attempt.experiment = snapshot("scratchpad.md"), history.next_number
        record.run_file(attempt.experiment, "log").write_text("")
        record_and_carry_out(attempt, history, history)
        print(git.read("log", "-1", "--format=%h %s"), end="")
