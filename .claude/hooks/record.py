#!/usr/bin/env python3
"""The record: what was tried, what the incumbent is, whether the next result is kept. Standard library only.

Every attempt is a commit under refs/experiments/<n>; its message carries, as trailers, all that later decisions
need, so one git call reads the whole history. Nothing else is stored.

usage (from run.sh; prints what run.sh or a person reads, exit 2 with one line when refusing):
  record.py plan AGENT IMAGE          may this train.py run? prints kind, n, data, budget, memory, comparable
  record.py decide WORK               verdict after WORK/run-1 (and run-2): again, kept, discarded, failed, baseline
  record.py write WORK N COMMIT ...   result.json, commit message, result block
  record.py tsv | log | status
"""
from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
import program  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PRIOR_SIGMA, PRIOR_RUNS = 0.04, 2  # noise of log(metric) before anything was run twice: 4 %, worth two runs
MARGIN = 0.25  # sigmas by which a candidate must win, seen once or twice
REMEASURE_AFTER = 10  # discards in a row
MAX_INCUMBENT_RUNS = 4
JUDGED = ("kept", "discarded")
COUNTED = (*JUDGED, "failed")  # what a phase and `stop` count
PLACEHOLDER = "write one line here"
JUDGE_FILES = ("container/judge.py", "container/stage.py", "container/seccomp.json")
TRAILER = re.compile(r"([A-Z][A-Za-z-]*): (.*)")


class Refused(Exception):
    """Nothing ran; the message says why and what to do next."""


@dataclass
class Record:
    """One attempt, from its trailers. runs and median_runs: the metric of each seed, in the order they ran."""

    n: int
    commit: str
    when: int
    hypothesis: str
    verdict: str
    phase: str
    train: str
    comparable: str
    runs: list
    median_runs: list
    change: str
    reason: str
    by_hand: bool

    def values(self, metric: str) -> list:
        return self.runs if metric == "mean_rank" else self.median_runs


def git(*args: str, check: bool = True) -> str:
    """Run git without hooks, pagers, signatures or monitors; returns stdout. Raises Refused when it fails."""
    argv = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false", "--no-pager", *args]
    done = subprocess.run(argv, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode and check:
        raise Refused(f"git {args[0]} failed: {done.stderr.strip()[:200]}")
    return done.stdout


def parse(n: int, commit: str, when: str, message: str) -> Record:
    t = {m[1]: m[2].strip() for m in map(TRAILER.fullmatch, message.splitlines()) if m}
    numbers = [[float(x) for x in t.get(k, "").split()] for k in ("Mean-Rank-Runs", "Median-Rank-Runs")]
    return Record(n, commit, int(when), t.get("Hypothesis", ""), t.get("Verdict", ""), t.get("Phase", ""),
                  t.get("Train", ""), t.get("Comparable", ""), *numbers, t.get("Change", ""), t.get("Reason", ""),
                  "By-Hand" in t)


def records() -> list:
    """All attempts in order of their number. A clone without refs/experiments still finds what its branch carries."""
    fmt = "%(refname:lstrip=2)%09%(objectname)%09%(committerdate:unix)%09%(contents)%00"
    found = {}
    for entry in git("for-each-ref", f"--format={fmt}", "refs/experiments/").split("\0"):
        head, _, message = entry.lstrip("\n").partition("\t")
        if head.isdigit():
            commit, when, message = message.split("\t", 2)
            found[int(head)] = parse(int(head), commit, when, message)
    kept = git("log", "-1", "--format=%H%x09%ct%x09%B", "HEAD", "--", "train.py", check=False)
    m = re.search(r"^Experiment: (\d+)$", kept, re.M)
    if m and int(m[1]) not in found:
        commit, when, message = kept.split("\t", 2)
        found[int(m[1])] = parse(int(m[1]), commit, when, message)
    return [found[n] for n in sorted(found)]


def sigma(groups: list) -> float:
    """Standard deviation of log(metric) of one run, pooled over everything run more than once, with a prior."""
    total, weight = PRIOR_RUNS * PRIOR_SIGMA**2, PRIOR_RUNS
    for values in groups:
        if len(values) > 1:
            logs = [math.log(v) for v in values]
            mean = sum(logs) / len(logs)
            total += sum((x - mean) ** 2 for x in logs)
            weight += len(logs) - 1
    return math.sqrt(total / weight)


def gain(candidate: list, incumbent: list) -> float:
    """How much lower the candidate's mean of log(metric) is: 0.1 is about 10 %."""
    return sum(map(math.log, incumbent)) / len(incumbent) - sum(map(math.log, candidate)) / len(candidate)


def rule(candidate: list, incumbent: list, s: float, confirm_below: float) -> str:
    """The keep rule: 'kept', 'discarded', or 'again' for a small gain seen once.

    Discard below 0.25 sigma, keep at once at confirm_below sigmas, otherwise ask for a second run and keep when the
    mean of the two still wins by 0.25 sigma. Simulated in tests/test_rule.py: about half the bias of 'any lower number'.
    """
    sigmas = gain(candidate, incumbent) / s
    if sigmas < MARGIN:
        return "discarded"
    return "kept" if sigmas >= confirm_below or len(candidate) > 1 else "again"


def geometric(values: list) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


class State:
    """Everything that follows from program.md, git, the data and the image."""

    def __init__(self, image: str | None = None):
        self.plan = program.read(ROOT / "program.md")
        self.all = records()
        self.data = data_folder(self.plan.data)
        self.comparable = comparable(self.plan, self.data, image) if image else self._latest_comparable()
        self.mine = [r for r in self.all if r.comparable == self.comparable]
        self.next_n = (self.all[-1].n if self.all else 0) + 1
        self.head_blob = git("rev-parse", "HEAD:train.py", check=False).strip()
        metric = self.plan.metric
        self.groups: dict = {}
        for r in self.mine:
            self.groups.setdefault(r.train, []).extend(r.values(metric))
        self.incumbent = self.groups.get(self.head_blob, [])
        self.sigma = sigma(list(self.groups.values()))

    def _latest_comparable(self) -> str:
        """Without an image at hand (hooks, status line): what the newest record was compared with."""
        return self.all[-1].comparable if self.all else ""

    def counted(self, phase: str | None = None) -> list:
        return [r for r in self.mine if r.verdict in COUNTED and not r.by_hand and phase in (None, r.phase)]

    def discards_in_a_row(self, phase: str | None = None) -> int:
        n = 0
        for r in reversed([r for r in self.mine if phase in (None, r.phase)]):
            if r.verdict == "kept":
                break
            n += r.verdict in ("discarded", "failed")
        return n

    def phase(self) -> program.Phase | None:
        """The first phase, in file order, whose `until` is not met; None when all are."""
        for p in self.plan.phases:
            met = (len(self.counted(p.name)) >= p.until.get("experiments", math.inf)
                   or self.discards_in_a_row(p.name) >= p.until.get("discards", math.inf))
            if not met:
                return p
        return None

    def phase_line(self) -> str:
        p = self.phase()
        if not p:
            return "all phases of program.md are done"
        done, of = len(self.counted(p.name)), p.until.get("experiments")
        place = self.plan.phases.index(p) + 1
        return f"{place} of {len(self.plan.phases)} ({p.name}), {done}{f' of {of}' if of else ''} experiments"

    def baseline(self) -> float | None:
        first = next((r for r in self.mine if r.verdict == "baseline" and r.values(self.plan.metric)), None)
        return geometric(first.values(self.plan.metric)) if first else None


def data_folder(name: str) -> Path:
    """data/<name> beside the main worktree's .git, so that all worktrees share it."""
    common = git("rev-parse", "--path-format=absolute", "--git-common-dir").strip()
    return Path(common).parent / "data" / name


def comparable(plan: program.Program, data: Path, image: str) -> str:
    """A short hash of what makes two results comparable: data, judge, image, budget. Raises Refused without data."""
    try:
        data_hash = json.loads((data / "info.json").read_text())["hash"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        kind = "is missing" if isinstance(e, FileNotFoundError) else "is damaged"
        raise Refused(f"data/{plan.data}/info.json {kind}; run ./run.sh data {plan.data} in a terminal") from None
    h = hashlib.sha256(f"{data_hash} {image} {plan.budget}".encode())
    for f in JUDGE_FILES:
        h.update((ROOT / f).read_bytes())
    return h.hexdigest()[:12]


def hypothesis() -> str:
    """The first line under `## Next experiment` in scratchpad.md. Raises Refused."""
    try:
        text = (ROOT / "scratchpad.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        raise Refused("scratchpad.md is missing; write it, with a line under '## Next experiment'") from None
    m = re.search(r"^##\s+Next experiment\s*$(.*?)(?=^##\s|\Z)", text, re.M | re.S | re.I)
    lines = [clean(re.sub(r"^\s*(?:[-*+>]|\d+[.)])\s+", "", line)) for line in (m[1].splitlines() if m else [])]
    line = next((x for x in lines if x), "")
    if not line or PLACEHOLDER in line:
        raise Refused("no hypothesis: write one line under '## Next experiment' in scratchpad.md, then run ./run.sh again")
    if len(line) > 100:
        raise Refused(f"the hypothesis has {len(line)} characters; make the line under '## Next experiment' 100 or fewer")
    return line


def clean(text: str) -> str:
    """Without control characters and other invisible ones, so that nothing can steer a terminal or fake a line."""
    return "".join(c for c in text if c.isprintable()).strip()


def blob_of(path: Path) -> str:
    """Object id of a file's bytes as they are, stored in git. Raises Refused when it is not an ordinary file."""
    st = path.lstat() if path.exists() or path.is_symlink() else None
    if st is None or not path.is_file() or path.is_symlink() or st.st_nlink != 1 or st.st_size > 1 << 20:
        raise Refused(f"{path.name} must be one ordinary file below 1 MiB, not a link or folder; put it back with "
                      f"git checkout {path.name}")
    return git("hash-object", "-w", "--no-filters", "--", path.name).strip()


def show(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cmd_plan(agent: str, image: str) -> None:
    """Refuse, or print `key=value` lines: kind is candidate, baseline or remeasure."""
    state = State(image)
    blob, pad = blob_of(ROOT / "train.py"), blob_of(ROOT / "scratchpad.md")
    if not state.head_blob:
        raise Refused("train.py is not committed; commit it first, it is the baseline")
    kind, idea = "candidate", ""
    phase = state.phase()
    if not state.incumbent:
        kind = "baseline"
    elif blob == state.head_blob:
        if agent == "1":
            raise Refused("train.py is unchanged, so there is nothing to measure; edit it as your hypothesis says, "
                          "then run ./run.sh again")
        kind = "remeasure"
    if blob != state.head_blob:
        idea = hypothesis()
        same = next((r for r in state.mine if r.train == blob and r.verdict in JUDGED), None)
        if same:
            raise Refused(f"this very train.py was already judged: experiment {same.n}, {same.verdict}, "
                          f"{state.plan.metric} {show(geometric(same.values(state.plan.metric)))} ({same.hypothesis}); "
                          "change something else")
        last = next((r for r in reversed(state.mine) if r.verdict in JUDGED and not r.by_hand), None)
        if last and last.hypothesis == idea:
            raise Refused(f"the hypothesis is still that of experiment {last.n} ({last.verdict}); write the new one "
                          "under '## Next experiment' in scratchpad.md")
        if phase is None:
            raise Refused("all phases of program.md are done; a person can raise an `until` or add a phase")
    again = kind == "candidate" and due_for_remeasure(state)
    print(f"kind={kind}\nn={state.next_n}\nblob={blob}\nscratchpad={pad}\nincumbent={state.head_blob}\ndata={state.data}")
    print(f"budget={state.plan.budget}\nmemory={state.plan.memory}\ncomparable={state.comparable}")
    print(f"cooldown={state.plan.cooldown}\nremeasure={int(again)}\nhypothesis={idea}")


def due_for_remeasure(state: State) -> bool:
    """After every ten discards in a row the incumbent runs again, up to four runs in all: it may have been lucky."""
    row = state.discards_in_a_row()
    newest = [r.verdict for r in state.mine if r.verdict != "failed"][-1:]
    return (row > 0 and row % REMEASURE_AFTER == 0 and newest != ["remeasured"]
            and len(state.incumbent) < MAX_INCUMBENT_RUNS)


def runs_in(work: Path) -> list:
    return [json.loads(f.read_text()) for f in sorted(work.glob("run-*/result.json"))]


def cmd_decide(work: str, kind: str, image: str) -> None:
    """Print the verdict after the runs so far, or 'again' when one more is wanted."""
    state, runs = State(image), runs_in(Path(work))
    values = [r["metrics"][state.plan.metric] for r in runs if r["outcome"] == "ok"]
    if len(values) < len(runs):
        print("failed" if kind == "candidate" else "unmeasured")
    elif kind != "candidate":
        wanted = 2 if kind == "baseline" else 1
        print("again" if len(values) < wanted else {"baseline": "baseline", "remeasure": "remeasured"}[kind])
    elif not state.incumbent:
        raise Refused("HEAD's train.py changed while the experiment ran and was never measured; run ./run.sh again")
    else:
        print(rule(values, state.incumbent, state.sigma, state.plan.confirm_below))


def cmd_write(work: str, n: str, kind: str, verdict: str, blob: str, image: str, by_hand: str = "") -> None:
    """Write WORK/result.json and WORK/message, the commit's message; `block` then prints them for the agent."""
    state, folder = State(image), Path(work)
    runs = runs_in(folder)
    good = [r for r in runs if r["outcome"] == "ok"]
    metric, values = state.plan.metric, [r["metrics"][state.plan.metric] for r in good]
    phase = state.phase()
    titles = {"baseline": "baseline", "remeasured": "the incumbent, measured once more", "unmeasured": "the incumbent"}
    result = {
        "experiment": int(n), "verdict": verdict, "hypothesis": titles.get(verdict) or by_hand or hypothesis_of(folder),
        "reason": clean(next((r["reason"] for r in runs if r["outcome"] != "ok"), ""))[:300],
        "phase": phase.name if phase and kind == "candidate" else "", "train": blob, "comparable": state.comparable,
        "metric": metric, "sigma": round(state.sigma, 4), "before": state.incumbent, "runs": runs,
        "when": int(time.time()), "by_hand": bool(by_hand),
    }
    if values and kind == "candidate" and state.incumbent:
        g = gain(values, state.incumbent)
        result["change_percent"] = round((math.exp(-g) - 1) * 100, 1)
        result["change_sigma"] = round(g / state.sigma, 1)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "message").write_text(message(result))


def hypothesis_of(folder: Path) -> str:
    return (folder / "hypothesis").read_text().strip()


def message(r: dict) -> str:
    """The commit's message: subject for people, trailers for the next decision."""
    values = [x["metrics"][r["metric"]] for x in r["runs"] if x["outcome"] == "ok"]
    subject = r["hypothesis"]
    if r["verdict"] == "kept" and values:
        subject += f" ({show(geometric(r['before']))} → {show(geometric(values))})"
    elif r["verdict"] != "baseline":
        subject = f"{r['verdict']}: {subject}"
    trailers = {"Experiment": r["experiment"], "Verdict": r["verdict"], "Hypothesis": r["hypothesis"]}
    for key, name in (("Mean-Rank", "mean_rank"), ("Median-Rank", "median_rank")):
        series = [x["metrics"][name] for x in r["runs"] if x["outcome"] == "ok"]
        if series:
            trailers |= {key: f"{geometric(series):.3f}", f"{key}-Runs": " ".join(f"{v:.4f}" for v in series)}
    if "change_percent" in r:
        trailers["Change"] = f"{r['change_percent']:+.1f} % ({r['change_sigma']:+.1f} sigma)"
    trailers |= {"Seed": " ".join(str(x["seed"]) for x in r["runs"]), "Phase": r["phase"], "Reason": r["reason"],
                 "Train": r["train"], "Comparable": r["comparable"], "By-Hand": "yes" if r["by_hand"] else ""}
    return subject + "\n\n" + "".join(f"{k}: {v}\n" for k, v in trailers.items() if v != "")


def cmd_block(work: str, commit: str, log: str, image: str) -> None:
    """Print the result block, under 2 KB."""
    state, r = State(image), json.loads(Path(work, "result.json").read_text())
    good = [x for x in r["runs"] if x["outcome"] == "ok"]
    out = ["---", f"experiment:   {r['experiment']}", f"verdict:      {r['verdict']}", f"hypothesis:   {r['hypothesis']}"]
    if good:
        m = good[-1]["metrics"]
        two = f", mean of {len(good)} runs" if len(good) > 1 else ""
        value = geometric([x["metrics"][r["metric"]] for x in good])
        out.append(f"{r['metric']}:{' ' * (13 - len(r['metric']))}{show(value)}   (validation, gallery {m['gallery']}, "
                   f"random {m['random']:.1f}, lower is better{two})")
        if "change_percent" in r:
            out.append(f"before:       {show(geometric(r['before']))}   ({len(r['before'])} runs)")
            out.append(f"change:       {r['change_percent']:+.1f} %   ({abs(r['change_sigma']):.1f} sigma "
                       f"{'better' if r['change_sigma'] > 0 else 'worse'}, sigma {r['sigma'] * 100:.1f} %)")
        other = "median_rank" if r["metric"] == "mean_rank" else "mean_rank"
        out.append(f"{other}:{' ' * (13 - len(other))}{show(geometric([x['metrics'][other] for x in good]))}")
        sides = ["   ".join(f"{s} " + " / ".join(f"{sum(x['metrics'][s][k] for x in good) / len(good):.1f}" for k in range(3))
                            for s in ("i2t", "t2i"))]
        out.append(f"recall:       {sides[0]}   (R@1 / 5 / 10, %)")
    if r["reason"]:
        out.append(f"reason:       {r['reason']}")
    out.append(training_line(r["runs"][-1], state.plan.budget))
    if r["reason"]:
        out += traceback_lines(ROOT / log)
    out += [f"commit:       {commit[:9]}{'' if r['verdict'] == 'kept' else ' (in the record; train.py is the incumbent again)'}"
            if r["verdict"] in COUNTED else f"commit:       {commit[:9]}",
            f"log:          {log}", f"phase:        {state.phase_line()}", f"next:         {what_next(r, state)}"]
    print(shorten(out))


def training_line(run: dict, budget: int) -> str:
    c, t = run["train"].get("claims", {}), run["timing"]
    said = [f"{c['steps']} steps" if "steps" in c else "", f"loss {c['loss']}" if "loss" in c else "",
            f"peak {c['peak_memory']}" if "peak_memory" in c else "", run["train"].get("device", "")]
    return f"train:        {t['train']:.0f} s of {budget}, harness {t['total'] - t['train']:.0f} s, " + ", ".join(filter(None, said))


def traceback_lines(log: Path) -> list:
    """The last 20 lines of the log, marked as data."""
    try:
        text = log.read_bytes()[-6000:].decode("utf-8", "replace")
    except OSError:
        return []
    lines = [clean(line.expandtabs(4).rstrip())[:110] if line.strip() else "" for line in text.splitlines()]
    return [f"| {line}" for line in lines if line][-20:]


def shorten(lines: list, most: int = 1990) -> str:
    """Join the block; when it is too long, lines of the log go first, from their beginning."""
    while len("\n".join(lines).encode()) > most:
        quoted = [i for i, line in enumerate(lines) if line.startswith("| ")]
        if not quoted:
            return "\n".join(lines).encode()[:most].decode("utf-8", "ignore")
        del lines[quoted[0]]
    return "\n".join(lines)


def what_next(r: dict, state: State) -> str:
    if state.phase() is None:
        return "all phases of program.md are done; say so and stop"
    step = "write the next hypothesis in scratchpad.md, edit train.py, run ./run.sh"
    if r["verdict"] == "failed":
        return f"mend it (your edit is in runs/{r['experiment']:04d}.diff) or note why not in scratchpad.md; then {step}"
    if r["verdict"] == "discarded":
        return f"note in scratchpad.md what this taught; then {step}"
    return step


def cmd_tsv() -> None:
    """The history the agent reads."""
    state = State()
    print("n\tverdict\tmetric\tchange\tphase\thypothesis")
    for r in state.all:
        v = r.values(state.plan.metric)
        old = "" if r.comparable == state.comparable else " (other data, judge, image or budget)"
        print("\t".join([str(r.n), r.verdict + old, show(geometric(v)) if v else r.reason.split(":")[0], r.change, r.phase, r.hypothesis]))


def best_line(state: State) -> str:
    if not state.incumbent:
        return "not measured yet"
    now, first = geometric(state.incumbent), state.baseline()
    since = f", {(now / first - 1) * 100:+.1f} % since the baseline {show(first)}" if first else ""
    return f"{show(now)}{since} ({len(state.incumbent)} runs, noise {state.sigma * 100:.1f} % a run)"


def brief(state: State) -> str:
    """Where things stand, for a conversation that begins: under 1.4 KB."""
    rows = [r for r in state.mine if r.verdict in COUNTED]
    out = [f"Phase {state.phase_line()}.", f"Best {state.plan.metric}: {best_line(state)}. {len(rows)} experiments so far, "
           f"{sum(r.verdict == 'kept' for r in rows)} kept."]
    if rows:
        out.append("Last ten (runs/experiments.tsv has all):")
        out += [f"{r.n} {r.verdict} {r.change.split(' (')[0] or r.reason.split(':')[0]}: {r.hypothesis[:60]}" for r in rows[-10:]]
        dead = sorted((r for r in rows[:-10] if r.verdict == "discarded"), key=percent, reverse=True)[:5]
        if dead:
            out.append("Dead ends before: " + "; ".join(f"{r.hypothesis[:40]} ({percent(r):+.1f} %)" for r in dead))
    return "\n".join(out).encode()[:1300].decode("utf-8", "ignore")


def percent(r: Record) -> float:
    """The change of the metric in percent; negative is better."""
    m = re.match(r"[+-]?\d+(\.\d+)?", r.change)
    return float(m[0]) if m else 0.0


def cmd_log(count: str = "20") -> None:
    """The last experiments, one line each, for a person."""
    state = State()
    for r in state.all[-int(count):]:
        v = state_value(state, r)
        when = time.strftime("%m-%d %H:%M", time.localtime(r.when))
        print(f"{r.n:>5}  {when}  {r.verdict:<10} {v:>8}  {r.change:<26} {r.hypothesis or r.reason}")


def state_value(state: State, r: Record) -> str:
    v = r.values(state.plan.metric)
    return show(geometric(v)) if v else ""


def cmd_status() -> None:
    state = State()
    print(f"phase:      {state.phase_line()}\nbest:       {best_line(state)}")
    rows = state.counted()
    print(f"record:     {len(rows)} experiments, {sum(r.verdict == 'kept' for r in rows)} kept, "
          f"{sum(r.verdict == 'failed' for r in rows)} failed")
    print(f"running:    {running() or 'nothing'}")


def running() -> str:
    """The experiment that runs now and how long it may still train, '' when none does."""
    try:
        now = json.loads((ROOT / "runs" / "running.json").read_text())
        os.kill(now["pid"], 0)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    left = now["started"] + now["budget"] - time.time()
    return f"experiment {now['n']} ({now['what']}), {f'at most {left:.0f} s of training left' if left > 0 else 'finishing'}"


COMMANDS = {"plan": cmd_plan, "decide": cmd_decide, "write": cmd_write, "block": cmd_block, "tsv": cmd_tsv,
            "log": cmd_log, "status": cmd_status}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    try:
        COMMANDS[sys.argv[1]](*sys.argv[2:])
    except (Refused, program.ProgramError) as e:
        print(f"run.sh: {e}", file=sys.stderr)
        sys.exit(2)
