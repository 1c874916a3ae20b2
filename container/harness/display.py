"""What people and the agent are shown: the result block, status, log, the history file and the brief."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections import Counter

import git
import locks
import program
import session
from history import History, with_error
from keep_rule import HOPELESS, MARGIN, geometric_mean
from project import ROOT, RUNS, Refused, number, read_json, visible, write_whole
from record import JUDGED, REFS, REVERTED, Attempt, Record, results, run_file

HISTORY_FILE = RUNS / "experiments.tsv"
MAX_BLOCK = 1990  # bytes of a result block
LOG_LINES, LOG_WIDTH = 20, 110  # lines of a failed run's log in its block, characters of one
LOG_BYTES = 6000  # of the log's end in which they are looked for
MAX_BRIEF = 1300  # bytes
BRIEF_NEWEST, BRIEF_DEAD_ENDS = 10, 5  # attempts in a brief
DATA_WIDTH = 160  # bytes of the caption there
SHARES = (10, 20, 40, 60, 80, 100)  # of its steps, in per cent, at which a run's loss is shown
CHANGED, CHANGED_WIDTH = {"-": 1, "+": 2}, 48  # lines of train.py that a block shows; bytes of one
PAUSE_S = 30 * 60  # so long no model thinks
CLAIMS = {"steps": "{} steps", "peak_memory": "peak {}"}  # of train.py that are shown, and how
ASK = "ask the planner (Agent, subagent_type planner), then "
STEP = "write the next hypothesis in scratchpad.md, edit train.py, run ./run.sh"


def lines(rows: list[tuple], width: int = 13) -> list[str]:
    """`key: value`, without those that have no value."""
    return [f"{key + ':':{width}} {value}" for key, value in rows if value != ""]


def cut(text: str, most: int) -> str:
    """The beginning of a text, so many bytes at most, and not within a word unless that is a long one."""
    beginning = text.encode()[:most].decode("utf-8", "ignore")
    words = text[: len(beginning) + 1].rpartition(" ")[0]
    return words if beginning != text and 2 * len(words) > len(beginning) else beginning


def fitted(first: list[str], middle: list[str], last: list[str], most: int) -> str:
    """Lines in so many bytes at most; of those in the middle the first are left out."""
    while middle and len("\n".join([*first, *middle, *last]).encode()) > most:
        middle = middle[1:]
    return cut("\n".join([*first, *middle, *last]), most)


def block(attempt: Attempt, commit: str, plan: program.Program, edited: str = "") -> str:
    """The result block, below 2 KB.

    plan: the run's, for where program.md has a mistake by now. edited: what to do where train.py is not the verdict's.
    """
    try:
        history = History.load()  # what was edited while this ran is for the next experiment
    except program.ProgramError:
        history = History.load(plan)
    phase, before = history.phase.name if history.phase else "", git.object_id(f"{commit}^:train.py")
    log, failed = run_file(attempt.experiment, "log"), attempt.failure()
    why = session.Session.load().reason_to_end(history)
    printed = log.read_bytes() if log.is_file() else b""
    curve, quoted = losses(printed), log_end(printed) if failed else []
    earlier = [r for r in history.compared if r.number < attempt.experiment and attempt.kind == "candidate"]
    first = [
        ("experiment", attempt.experiment),
        ("verdict", attempt.verdict),
        ("hypothesis", attempt.hypothesis),
        ("changed", changed(attempt, history, before)),
        ("tried before", tried_before(history, attempt.train, earlier)),
        *metric_rows(attempt),
        ("reason" if failed else "note", attempt.reason),
        ("train", training(attempt, plan.budget)),
        *loss_rows(curve, losses(earlier_log(history, before, attempt.experiment))),
    ]
    last = [
        ("plan", "program.md has changed since you last read it: read it" if session.plan_has_changed() else ""),
        ("new phase", f"{phase}: read its section in program.md" if phase and attempt.phase not in ("", phase) else ""),
        ("commit", commit[:9] + (" (in the record)" if edited else consequence(attempt, why))),
        ("train.py", edited),
        ("log", log.relative_to(ROOT)),
        ("elsewhere", history.better_elsewhere()),
        ("phase", history.phase_line()),
        ("next", "first see train.py above; then " * bool(edited) + next_step(attempt, history, why)),
    ]
    return fitted(["---", *lines(first)], quoted, lines(last), MAX_BLOCK)


def tried_before(history: History, train: str, records: list[Record]) -> str:
    """The first of these attempts that measured this very train.py, as a control or the baseline may have, or ''."""
    same = next((r for r in records if r.train == train and history.values(r)), None)
    measured = f"{history.program.metric} {shown_value(history, same)}" if same else ""
    return f"experiment {same.number}, {same.verdict}, {measured} ({same.hypothesis})" if same else ""


def metric_rows(attempt: Attempt) -> list[tuple]:
    """The metric, its change, and the other metrics."""
    measured = [run.metrics for run in attempt.runs if run.outcome == "ok"]
    if not measured:
        return []
    size = f"gallery {measured[0]['gallery']}, random {measured[0]['random']:.1f}"
    twice = f", mean of {len(measured)} runs: {', '.join(map(number, attempt.values()))}" if len(measured) > 1 else ""
    value = number(geometric_mean(attempt.values()))
    rows = [(attempt.metric, f"{value}   (validation, {size}, lower is better{twice})")]
    if fits := [run.fit for run in attempt.runs if run.fit]:
        fit = number(geometric_mean([fit[attempt.metric] for fit in fits]))
        rows.append(("fit", f"{fit}   (in that gallery; {fits[0]['gallery']} training pairs)"))
    if attempt.percent is not None:
        runs = "1 run" if len(attempt.before) == 1 else f"{len(attempt.before)} runs"
        rows.append(("before", f"{with_error(attempt.before, attempt.sigma)}   ({runs})"))
        lucky = attempt.verdict == "discarded" and 0 < attempt.sigmas < MARGIN
        note = f"; below {MARGIN} sigma nothing is kept" if lucky else ""
        rows.append(("change", f"{attempt.percent:+.1f} %   ({attempt.gain}, sigma {attempt.sigma * 100:.1f} %){note}"))
    other = "median_rank" if attempt.metric == "mean_rank" else "mean_rank"
    value = number(geometric_mean(attempt.values(other)))
    return [*rows, ("costs", attempt.saved), (other, value), ("recall", recall(measured))]


def recall(measured: list[dict]) -> str:
    """In percent, the mean of the runs."""
    sides = []
    for side in ("i2t", "t2i"):
        means = (statistics.mean(values) for values in zip(*(metrics[side] for metrics in measured)))
        sides.append(f"{side} {' / '.join(f'{mean:.1f}' for mean in means)}")
    return "   ".join(sides) + "   (R@1 / 5 / 10, %)"


def changed(attempt: Attempt, history: History, before: str) -> str:
    """How many lines of train.py, and the first of them without comments at their end, quoted: data, no instructions.

    before: the incumbent's blob. Within a chain it is what the attempt itself changed that counts.
    """
    if attempt.chain and attempt.chain.link > 1:
        earlier = (r.train for r in reversed(history.own(history.counted)) if r.number < attempt.experiment)
        before = next(earlier, before)
    hunks = git.diff(before, attempt.train).partition("\n@@")[2].splitlines()[1:]
    found = [line for line in hunks if line[:1] in ("-", "+") and line[1:].strip()]
    first = [line for sign, most in CHANGED.items() for line in [x for x in found if x[0] == sign][:most]]
    count = f"{len(found)} lines" + f" ({len(first)} shown)" * (len(found) > len(first))
    return "\n".join([count, *told_apart(first)]) if found else ""


def told_apart(lines: list[str]) -> list[str]:
    """Lines of a diff, cut: an old and a new one that begin alike around the first difference."""
    texts = [line[1:].expandtabs(4) for line in lines]
    bare = [re.sub(r"(?<=\S)  #.*", "", text).strip() for text in texts]
    texts = bare if len({*bare}) == len(bare) else texts  # else a comment or the indentation is what was changed
    alike = os.path.commonprefix(texts[:2]) if [line[0] for line in lines[:2]] == ["-", "+"] else ""
    if len(alike.encode()) > CHANGED_WIDTH - 12:  # else the difference is shown anyway
        texts[:2] = [f"…{text[len(alike) - 10 :]}" for text in texts[:2]]
    return [cut(f"| {line[0]} {text}", CHANGED_WIDTH) for line, text in zip(lines, texts)]


def losses(log: bytes) -> list[tuple[int, float, float]]:
    """Steps, per cent of all steps and loss in the lines of a log's last run: train.py's own claims."""
    found: list = []
    for step, steps, loss in (claim for claim in locks.STEP.findall(log) if claim[2]):
        if found and int(step) <= found[-1][0]:
            found = []  # the next run begins
        found.append((int(step), 100 * int(step) / int(steps), float(loss)))
    return found


def loss_rows(this: list[tuple], incumbent: list[tuple]) -> list[tuple]:
    """Two curves, of which the first was printed now."""
    at = f"(at {' '.join(map(str, SHARES))} % of steps)"
    rows = [("loss", f"{at_shares(this)}  {at}"), ("incumbent's", at_shares(incumbent).rstrip())]
    return [(key, value) for (key, value), curve in zip(rows, (this, incumbent)) if this and curve]


def at_shares(curve: list[tuple]) -> str:
    """The losses nearest to SHARES; a dash where none is near, as in a run that ended early."""
    near = [min(curve, key=lambda point: abs(point[1] - share), default=(0, 999, 0)) for share in SHARES]
    there = [abs(point[1] - share) < 5.1 for point, share in zip(near, SHARES)]
    return " ".join(f"{point[2]:<#5.3g}" if ok else "-    " for point, ok in zip(near, there))


def earlier_log(history: History, train: str, n: int) -> bytes:
    """What train.py printed when this one was measured the last time, but for experiment n."""
    known = (r for r in reversed(history.compared) if r.train == train and r.number != n and history.values(r))
    names = [f"{REFS}{r.number}:experiment/train.log" for r in known][:1]
    return b"".join(git.contents(names).values())


def training(attempt: Attempt, budget: int) -> str:
    """Seconds are the harness's, the rest are train.py's own claims."""
    if not attempt.runs:
        return ""
    run = attempt.runs[-1]
    claims, seconds = run.train.get("claims", {}), run.timing["train"]
    claimed = [words.format(claims[key]) for key, words in CLAIMS.items() if key in claims]
    pace = f"{run.train['step_ms']:.0f} ms a step" if run.train.get("step_ms") else ""
    around = f"{run.timing['total'] - seconds:.0f} s around it"
    return ", ".join(filter(None, [f"{seconds:.0f} s of {budget}", pace, *claimed, run.train.get("device"), around]))


def consequence(attempt: Attempt, why: str) -> str:
    """What became of the edit. why: the loop has ended, '' while it goes on."""
    chain = attempt.chain
    if attempt.verdict == "lost":
        return " (in the record, and counted for nothing; train.py is as it was)"
    if attempt.verdict not in REVERTED or attempt.verdict == "kept":
        return f" (the whole chain of {chain.link})" if chain else ""
    if chain and chain.continues:
        drop = "write 'drop the chain' as the next experiment, then run ./run.sh"
        return f" (in the record; train.py keeps your edit, build on it: {chain.position} in this chain; or {drop})"
    ended = ", the chain has ended" if chain or attempt.verdict == "dropped" else ""
    if attempt.verdict == "control" or (attempt.sigmas or 0) < -HOPELESS:
        ended += f": nothing is built on a control, or on what loses by over {HOPELESS} sigma" if chain else ""
    elif chain and chain.link < chain.limit:
        ended += " with the loop" if why else " with its phase"
    return f" (in the record; train.py is the incumbent again{ended})"


def next_step(attempt: Attempt, history: History, why: str) -> str:
    """One order: the first that applies."""
    if why or history.phase is None:
        return f"the loop has ended: {why or history.phase_line()}; {session.SUM_UP}"
    if attempt.verdict == "lost":
        return "nothing is held against this idea: run ./run.sh again, as it is"
    due = history.planner_due() and attempt.verdict != "dropped"
    if attempt.verdict == "failed" and not due:
        diff, chain = run_file(attempt.experiment, "diff").relative_to(ROOT), attempt.chain
        again = "mend it where it stands" if chain and chain.continues else f"make it again ({diff}) without its fault"
        return f"your edit failed: {again}, or another one for a new hypothesis; then run ./run.sh"
    taught = attempt.verdict in ("discarded", "control")
    return "note in scratchpad.md what this taught; " * taught + ASK * due + STEP


def log_end(log: bytes) -> list[str]:
    """Its last lines, quoted: data, not instructions."""
    text = log[-LOG_BYTES:].decode("utf-8", "replace")
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
            verdict = r.verdict + ", cut short" * bool(r.reason and history.values(r)) + in_chain(r)
            verdict += "" if r.comparable == history.comparable else " (not comparable)"
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


def spent(history: History) -> list[tuple]:
    """What the loop took so far, '' where nothing tells. Between two runs the model thinks, unless that is long."""
    rows, took, ended = history.own(history.records), Counter(), 0
    for r, result in zip(rows, results(rows)):
        timings = [run["timing"] for run in result.get("runs", []) if r.comparable]
        training, total = (sum(timing.get(stage, 0) for timing in timings) for stage in ("train", "total"))
        waited = result.get("waited", 0)
        between, ended = r.when - total - waited - ended, r.when
        model = between if total and 0 < between < PAUSE_S else 0
        took.update(training=training, harness=total - training, waiting=waited, model=model)
    whole = sum(took.values())
    shares = ", ".join(f"{what} {s / whole * 100:.0f} %" for what, s in took.items() if s)
    return [("time", f"{whole / 3600:.1f} h: {shares}" if whole else ""), ("used", session.used_in_all())]


def status() -> None:
    history, error = History.load(), RUNS / "report.err"
    counts = ", ".join(f"{sum(r.verdict == v for r in history.counted)} {v}" for v in JUDGED)
    rows = [
        ("phase", history.phase_line()),
        ("best", f"{history.program.metric} {history.best_line()}"),
        ("record", f"{len(history.counted)} experiment{'s' * (len(history.counted) != 1)}: {counts}"),
        ("running", locks.running_line() or "nothing"),
        *spent(history),
        ("elsewhere", history.better_elsewhere()),
        ("report", f"could not be drawn: {error.read_text().strip()}" if error.exists() else ""),
    ]
    print("\n".join(lines(rows, width=9)))


def training_data(name: str) -> list[str]:
    """What prepare_data.py found, a caption quoted: data, not instructions. [] if an older version of it prepared."""
    info = read_json(git.data_folder(name) / "info.json", {"training": []}, training=list)
    found = [visible(str(line)) for line in info["training"]]
    if not found:
        return []
    return [f"Data: {found[0]}, such as", *(cut(f"| {caption}", DATA_WIDTH) for caption in found[1:2])]


def brief(history: History) -> str:
    """Where things stand, for a conversation that begins."""
    rows = history.counted
    kept, best = sum(r.verdict == "kept" for r in rows), f"Best {history.program.metric}: {history.best_line()}"
    first = [f"Phase {history.phase_line()}.", f"{best}. {len(rows)} experiments so far, {kept} kept."]
    first += training_data(history.program.data)
    first += ["The last (runs/experiments.tsv has all):"] * bool(rows)
    newest = []
    for r in rows[-BRIEF_NEWEST:]:
        outcome = r.change.split(" (")[0] or r.reason.split(":")[0]
        newest.append(f"{r.number} {r.verdict} {outcome}: {cut(r.hypothesis, 60)}")
    discarded = [r for r in rows[:-BRIEF_NEWEST] if r.verdict == "discarded"]
    worst = sorted(discarded, key=lambda r: -r.percent)[:BRIEF_DEAD_ENDS]
    dead_ends = "; ".join(f"{cut(r.hypothesis, 40)} ({r.percent:+.1f} %)" for r in worst)
    return fitted(first, newest, [f"Dead ends before: {dead_ends}"] if worst else [], MAX_BRIEF)
