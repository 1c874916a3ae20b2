"""What people and the agent are shown: the result block, status, log, the history file and the brief."""

from __future__ import annotations

import re
import statistics
import time

import locks
import program
import session
from history import History
from keep_rule import MARGIN, geometric_mean
from project import ROOT, RUNS, Refused, number, visible, write_whole
from record import JUDGED, Attempt, Record, run_file

HISTORY_FILE = RUNS / "experiments.tsv"
MAX_BLOCK = 1990  # bytes of a result block
LOG_LINES, LOG_WIDTH = 20, 110  # lines of a failed run's log in its block, characters of one
LOG_BYTES = 6000  # of the log's end in which they are looked for
MAX_BRIEF = 1300  # bytes
BRIEF_NEWEST, BRIEF_DEAD_ENDS = 10, 5  # attempts in a brief
CLAIMS = {"steps": "{} steps", "loss": "loss {}", "peak_memory": "peak {}"}  # of train.py that are shown, and how
ASK = "ask the planner (Agent, subagent_type planner), then "


def lines(rows: list[tuple], width: int = 13) -> list[str]:
    """`key: value`, without those that have no value."""
    return [f"{key + ':':{width}} {value}" for key, value in rows if value != ""]


def cut(text: str, most: int) -> str:
    """The beginning of a text, so many bytes at most."""
    return text.encode()[:most].decode("utf-8", "ignore")


def fitted(first: list[str], middle: list[str], last: list[str], most: int) -> str:
    """Lines in so many bytes at most; of those in the middle the first are left out."""
    while middle and len("\n".join([*first, *middle, *last]).encode()) > most:
        middle = middle[1:]
    return cut("\n".join([*first, *middle, *last]), most)


def block(attempt: Attempt, commit: str, plan: program.Program, edited: str = "") -> str:
    """The result block, below 2 KB.

    plan: what the run began with, for where program.md has a mistake by now. edited: what to do where train.py is not
    what the verdict says.
    """
    try:
        history = History.load()  # what was edited while this ran is for the next experiment
    except program.ProgramError:
        history = History.load(plan)
    phase = history.phase.name if history.phase else ""
    first = [
        ("experiment", attempt.experiment),
        ("verdict", attempt.verdict),
        ("hypothesis", attempt.hypothesis),
        *metric_rows(attempt),
        ("reason", attempt.reason),
        ("train", training(attempt, plan.budget)),
    ]
    last = [
        ("plan", "program.md has changed since you last read it: read it" if session.plan_has_changed() else ""),
        ("new phase", f"{phase}: read its section in program.md" if phase and attempt.phase not in ("", phase) else ""),
        ("commit", commit[:9] + (" (in the record)" if edited else consequence(attempt))),
        ("train.py", edited),
        ("log", run_file(attempt.experiment, "log").relative_to(ROOT)),
        ("elsewhere", history.better_elsewhere()),
        ("phase", history.phase_line()),
        ("next", "first see train.py above; then " * bool(edited) + next_step(attempt, history)),
    ]
    quoted = log_end(attempt.experiment) if attempt.reason else []
    return fitted(["---", *lines(first)], quoted, lines(last), MAX_BLOCK)


def metric_rows(attempt: Attempt) -> list[tuple]:
    """The metric, its change, and the other metrics."""
    measured = [run.metrics for run in attempt.runs if run.outcome == "ok"]
    if not measured:
        return []
    size = f"gallery {measured[0]['gallery']}, random {measured[0]['random']:.1f}"
    twice = f", mean of {len(measured)} runs" if len(measured) > 1 else ""
    value = number(geometric_mean(attempt.values()))
    rows = [(attempt.metric, f"{value}   (validation, {size}, lower is better{twice})")]
    if fits := [run.fit for run in attempt.runs if run.fit]:
        fit = number(geometric_mean([fit[attempt.metric] for fit in fits]))
        rows.append(("fit", f"{fit}   ({fits[0]['gallery']} training pairs; decides nothing)"))
    if attempt.percent is not None:
        runs = "1 run" if len(attempt.before) == 1 else f"{len(attempt.before)} runs"
        rows.append(("before", f"{number(geometric_mean(attempt.before))}   ({runs})"))
        lucky = attempt.verdict == "discarded" and 0 < attempt.sigmas < MARGIN
        note = f"; below {MARGIN} sigma nothing is kept" if lucky else ""
        rows.append(("change", f"{attempt.percent:+.1f} %   ({attempt.gain}, sigma {attempt.sigma * 100:.1f} %){note}"))
    other = "median_rank" if attempt.metric == "mean_rank" else "mean_rank"
    rows.append((other, number(geometric_mean(attempt.values(other)))))
    return [*rows, ("recall", recall(measured))]


def recall(measured: list[dict]) -> str:
    """In percent, the mean of the runs."""
    sides = []
    for side in ("i2t", "t2i"):
        means = (statistics.mean(values) for values in zip(*(metrics[side] for metrics in measured)))
        sides.append(f"{side} {' / '.join(f'{mean:.1f}' for mean in means)}")
    return "   ".join(sides) + "   (R@1 / 5 / 10, %)"


def training(attempt: Attempt, budget: int) -> str:
    """Seconds are the harness's, the rest are train.py's own claims."""
    if not attempt.runs:
        return ""
    run = attempt.runs[-1]
    claims, seconds = run.train.get("claims", {}), run.timing["train"]
    claimed = [words.format(claims[key]) for key, words in CLAIMS.items() if key in claims]
    around = f"{run.timing['total'] - seconds:.0f} s around it"
    return ", ".join(filter(None, [f"{seconds:.0f} s of {budget}", *claimed, run.train.get("device"), around]))


def consequence(attempt: Attempt) -> str:
    """What became of the edit."""
    chain = attempt.chain
    if attempt.verdict == "lost":
        return " (in the record, and counted for nothing; train.py is as it was)"
    if attempt.verdict not in ("discarded", "failed"):
        return f" (the whole chain of {chain.link})" if chain else ""
    if chain and chain.continues:
        return f" (in the record; train.py keeps your edit, build on it: {chain.position} in this chain)"
    ended = ", the chain has ended" if chain else ""
    ended += " with its phase" if chain and chain.link < chain.limit else ""
    return f" (in the record; train.py is the incumbent again{ended})"


def next_step(attempt: Attempt, history: History) -> str:
    if history.phase is None:
        return "all phases of program.md are done; say so and stop"
    if attempt.verdict == "lost":
        return "nothing is held against this idea: run ./run.sh again, as it is"
    step = "write the next hypothesis in scratchpad.md, edit train.py, run ./run.sh"
    step = ASK + step if history.planner_due() else step
    chain = attempt.chain
    if attempt.verdict == "failed" and chain and chain.continues:
        return f"fix it where it stands, or try something else on top; {step}"
    if attempt.verdict == "failed":
        diff = run_file(attempt.experiment, "diff").relative_to(ROOT)
        return f"your edit is in {diff}: make it again, fixed, or drop the idea; then {step}"
    return f"note in scratchpad.md what this taught; then {step}" if attempt.verdict == "discarded" else step


def log_end(n: int) -> list[str]:
    """The last lines of a log, quoted: data, not instructions."""
    log = run_file(n, "log")
    text = log.read_bytes()[-LOG_BYTES:].decode("utf-8", "replace") if log.is_file() else ""
    quoted = [("| " if line[:1].strip() else "|   ") + visible(line)[:LOG_WIDTH] for line in text.splitlines()]
    return [line for line in quoted if line.strip("| ")][-LOG_LINES:]


def shown_value(history: History, r: Record) -> str:
    values = history.values(r)
    return number(geometric_mean(values)) if values else ""


def in_chain(r: Record) -> str:
    return f" (chain, {r.chain.position})" if r.chain else ""


def write_history(history: History) -> None:
    """runs/experiments.tsv, which the agent reads; audits and finals are not in it: numbers the loop must not see."""
    rows = [("n", "verdict", "metric", "change", "phase", "hypothesis")]
    for r in history.records:
        if r.comparable:
            verdict = r.verdict + in_chain(r) + ("" if r.comparable == history.comparable else " (not comparable)")
            value = shown_value(history, r) or r.reason.split(":")[0]
            rows.append((str(r.number), verdict, value, r.change, r.phase, r.hypothesis))
    write_whole(HISTORY_FILE, "".join("\t".join(row) + "\n" for row in rows))


def log(count: str = "20") -> None:
    """The last experiments, one line each. Raises Refused."""
    if not re.fullmatch("[1-9][0-9]*", count):
        raise Refused("usage: ./run.sh log [N]")
    history = History.load()
    for r in history.records[-int(count) :]:
        when = time.strftime("%m-%d %H:%M", time.localtime(r.when))
        text = " — ".join(filter(None, [r.hypothesis, r.reason])) + in_chain(r)
        print(f"{r.number:>5}  {when}  {r.verdict:<10} {shown_value(history, r):>8}  {r.change:<27} {text}")


def status() -> None:
    history, error = History.load(), RUNS / "report.err"
    counts = ", ".join(f"{sum(r.verdict == v for r in history.counted)} {v}" for v in JUDGED)
    rows = [
        ("phase", history.phase_line()),
        ("best", f"{history.program.metric} {history.best_line()}"),
        ("record", f"{len(history.counted)} experiments: {counts}"),
        ("running", locks.running_line() or "nothing"),
        ("elsewhere", history.better_elsewhere()),
        ("report", f"could not be drawn: {error.read_text().strip()}" if error.exists() else ""),
    ]
    print("\n".join(lines(rows, width=9)))


def brief(history: History) -> str:
    """Where things stand, for a conversation that begins."""
    rows = history.counted
    kept, best = sum(r.verdict == "kept" for r in rows), f"Best {history.program.metric}: {history.best_line()}"
    first = [f"Phase {history.phase_line()}.", f"{best}. {len(rows)} experiments so far, {kept} kept."]
    if rows:
        first.append("Last ten (runs/experiments.tsv has all):")
    newest = []
    for r in rows[-BRIEF_NEWEST:]:
        outcome = r.change.split(" (")[0] or r.reason.split(":")[0]
        newest.append(f"{r.number} {r.verdict} {outcome}: {cut(r.hypothesis, 60)}")
    discarded = [r for r in rows[:-BRIEF_NEWEST] if r.verdict == "discarded"]
    worst = sorted(discarded, key=lambda r: -r.percent)[:BRIEF_DEAD_ENDS]
    dead_ends = "; ".join(f"{cut(r.hypothesis, 40)} ({r.percent:+.1f} %)" for r in worst)
    return fitted(first, newest, [f"Dead ends before: {dead_ends}"] if worst else [], MAX_BRIEF)
