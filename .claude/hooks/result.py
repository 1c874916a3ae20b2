#!/usr/bin/env python3
"""What run.sh asks between its steps: may this run, what is the verdict, what is written and shown. Standard library.

usage: result.py plan AGENT IMAGE                     refuse (exit 2, one line), or print key=value lines
       result.py decide WORK KIND IMAGE COMPARABLE    again, kept, discarded, failed, baseline, remeasured, unmeasured
       result.py write WORK N KIND VERDICT BLOB IMAGE [BY_HAND]     WORK/result.json and the commit's message
       result.py block WORK COMMIT LOG IMAGE          the result block for the agent
       result.py tsv | log [N] | status               the history, for the agent and for a person
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
import program  # noqa: E402
import record  # noqa: E402
from record import COUNTED, MARGIN, ROOT, Record, Refused, State, clean, gain, geometric, git, rule, show  # noqa: E402

PLACEHOLDER = "write one line here"
OWN_SEED = "the result does not depend on SEED: take every random number from it, so that a second run means something"
BY_CHANCE = 50  # pairs: in a smaller gallery two seeds may well give the same ranks
MOST_HYPOTHESIS = 100  # characters
MOST_BLOCK = 1990  # bytes of a result block
LOG_LINES = 20  # of a failed run, in its block
MOST_NEWS = 1000  # bytes of a block on what changed in the plan, and on what a new phase asks for
TITLES = {"baseline": "baseline", "remeasured": "the incumbent, measured once more", "unmeasured": "the incumbent"}


def hypothesis() -> str:
    """The first line under `## Next experiment` in scratchpad.md. Raises Refused."""
    try:
        text = (ROOT / "scratchpad.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    m = re.search(r"^##\s+Next experiment\s*$(.*?)(?=^##\s|\Z)", text, re.M | re.S | re.I)
    lines = (clean(re.sub(r"^\s*(?:[-*+>]|\d+[.)])\s+", "", line)) for line in (m[1].splitlines() if m else []))
    line = next(filter(None, lines), "")
    if not line or PLACEHOLDER in line:
        raise Refused("no hypothesis: write one line under '## Next experiment' in scratchpad.md, then run ./run.sh")
    if len(line) > MOST_HYPOTHESIS:
        raise Refused(
            f"the hypothesis has {len(line)} characters; make the line under '## Next experiment' in "
            f"scratchpad.md {MOST_HYPOTHESIS} or fewer"
        )
    return line


def blob_of(name: str) -> str:
    """Object id of a file's bytes as they are, stored in git. Raises Refused when it is not an ordinary file."""
    path = ROOT / name
    if path.is_symlink() or not path.is_file() or path.stat().st_nlink != 1 or path.stat().st_size > 1 << 20:
        raise Refused(
            f"{name} must be one ordinary file below 1 MiB, not missing, a link or a folder; "
            f"a person can put it back with: git checkout {name}"
        )
    return git("hash-object", "-w", "--no-filters", "--", name).strip()


def plan(agent: str, image: str) -> None:
    """Refuse, or print key=value lines; kind is candidate, baseline or remeasure."""
    state = State(image)
    blob, pad = blob_of("train.py"), blob_of("scratchpad.md")
    if not state.head_blob:
        raise Refused("train.py is not committed; commit it first, it is the baseline")
    changed = blob != state.head_blob
    if state.incumbent and not changed and agent == "1":
        raise Refused(
            "train.py is unchanged, so there is nothing to measure; edit it as your hypothesis says, then "
            "run ./run.sh again"
        )
    idea = new_idea(state, blob) if changed else ""
    kind = "baseline" if not state.incumbent else "candidate" if changed else "remeasure"
    fields = {
        "kind": kind,
        "n": state.newest + 1,
        "blob": blob,
        "pad": pad,
        "incumbent": state.head_blob,
        "data": state.data,
        "budget": state.plan.budget,
        "memory": state.plan.memory,
        "cooldown": state.plan.cooldown,
        "devices": state.plan.devices,
        "ar_launch": " ".join(state.plan.launch),
        "comparable": state.comparable,
        "idea": idea,
        "remeasure": int(kind == "candidate" and state.incumbent_is_due()),
    }
    print("\n".join(f"{k}={v}" for k, v in fields.items()))


def new_idea(state: State, blob: str) -> str:
    """The hypothesis, when both it and the file are new. Raises Refused."""
    idea = hypothesis()
    judged = [r for r in state.counted if r.verdict != "failed"]
    for r in judged:
        if r.train == blob:
            raise Refused(
                f"this very train.py was already judged: experiment {r.n}, {r.verdict}, {state.plan.metric} "
                f"{show(geometric(state.values(r)))} ({r.hypothesis}); change something else"
            )
    last = next((r for r in reversed(state.here) if r.verdict != "failed"), None)
    if last and last.hypothesis == idea:
        raise Refused(
            f"the hypothesis is still that of experiment {last.n} ({last.verdict}); write the "
            "new one under '## Next experiment' in scratchpad.md, then run ./run.sh"
        )
    for other in record.other_worktrees():
        if record.running(other).get("blob") == blob:
            raise Refused(f"this very train.py is being judged in the worktree {other.name}; change something else")
    if state.phase is None:
        raise Refused("all phases of program.md are done; a person can raise an `until` or add a phase")
    return idea


def runs_in(work: str) -> list:
    """What every run so far gave. Two that differ in nothing but their seed both failed: neither confirms the other."""
    runs = [json.loads(f.read_text()) for f in sorted(Path(work).glob("run-*/result.json"))]
    found = {json.dumps(r["metrics"], sort_keys=True) for r in runs if r["outcome"] == "ok"}
    seeds = {r["seed"] for r in runs if r["outcome"] == "ok" and r["metrics"]["gallery"] >= BY_CHANCE}
    if len(found) == 1 and len(seeds) > 1:
        runs = [{**r, "outcome": "failed", "reason": OWN_SEED} for r in runs]
    return runs


def metrics(runs: list, name: str) -> list:
    return [r["metrics"][name] for r in runs if r["outcome"] == "ok"]


def decide(work: str, kind: str, image: str, comparable: str) -> None:
    """Print the verdict after the runs so far, or 'again' when one more is wanted. Raises Refused."""
    state, runs = State(image), runs_in(work)
    if state.comparable != comparable:
        raise Refused("data or judge were changed while this ran, so it is not recorded; run ./run.sh again")
    values = metrics(runs, state.plan.metric)
    if len(values) < len(runs):
        print("failed" if kind == "candidate" else "unmeasured")
    elif kind == "candidate":
        if not state.incumbent:  # HEAD moved to a file nobody measured; nothing to compare with
            print("discarded")
        else:
            print(rule(values, state.incumbent, state.sigma, state.plan.confirm_below))
    else:
        print("remeasured" if kind == "remeasure" else "baseline" if len(values) > 1 else "again")


def write(work: str, n: str, kind: str, verdict: str, blob: str, image: str, by_hand: str = "") -> None:
    state, runs = State(image), runs_in(work)
    values = metrics(runs, state.plan.metric)
    result = {
        "experiment": int(n),
        "verdict": verdict,
        "hypothesis": TITLES.get(verdict) or by_hand or Path(work, "hypothesis").read_text().strip(),
        "reason": clean(next((r["reason"] for r in runs if r["outcome"] != "ok"), ""))[:300],
        "phase": state.phase.name if state.phase and kind == "candidate" else "",
        "metric": state.plan.metric,
        "sigma": round(state.sigma, 4),
        "before": state.incumbent,
        "train": blob,
        "comparable": state.comparable,
        "by_hand": bool(by_hand),
        "when": int(time.time()),
        "runs": runs,
    }
    if values and kind == "candidate" and state.incumbent:
        g = gain(values, state.incumbent)
        result |= {"percent": round((math.exp(-g) - 1) * 100, 1), "sigmas": round(g / state.sigma, 1)}
    result |= {"branch": state.branch, "chain": chain(state, result) if kind == "candidate" else "", "web": web(work)}
    Path(work, "result.json").write_text(json.dumps(result, indent=1) + "\n")
    Path(work, "message").write_text(message(result))


def chain(state: State, r: dict) -> str:
    """'2 of 4 on <incumbent>, goes on': which loser in a row this is, and whether the next is built on it.

    '' outside a chain. It ends with a keep, with the phase's `patience`, and with the phase.
    """
    link, most = state.link + 1, state.phase.patience if state.phase else 0
    moved = os.environ.get("INCUMBENT") != state.head_blob  # HEAD, while this ran: it was not built on that
    if r["by_hand"] or moved or most < 2 and link == 1:
        return ""
    name = state.phase and state.phase.name
    state.counted.append(Record(r["experiment"], r["when"], {"Verdict": r["verdict"], "Phase": r["phase"]}))
    goes_on = r["verdict"] != "kept" and link < most and state.phase and state.phase.name == name
    return f"{link} of {max(link, most)} on {state.head_blob[:9]}" + (", goes on" if goes_on else "")


def web(work: str) -> str:
    """How much the agent's requests to the web could have carried; WORK/web.log has them, a line each."""
    log = Path(work, "web.log")
    sizes = [int(line.split("\t")[2]) for line in log.read_text().splitlines()] if log.exists() else []
    return f"{len(sizes)} requests, {sum(sizes)} characters" if sizes else ""


def message(r: dict) -> str:
    """The commit's message: subject for people, trailers for the next decision."""
    values, subject = metrics(r["runs"], r["metric"]), r["hypothesis"]
    if r["verdict"] == "kept" and values and r["before"]:
        subject += f" ({show(geometric(r['before']))} → {show(geometric(values))})"
    elif r["verdict"] != "baseline" and not r["by_hand"]:
        subject = f"{r['verdict']}: {subject}"
    trailers = {"Experiment": r["experiment"], "Verdict": r["verdict"], "Hypothesis": r["hypothesis"]}
    for key, name in (("Mean-Rank", "mean_rank"), ("Median-Rank", "median_rank")):
        series = metrics(r["runs"], name)
        if series:
            trailers |= {key: f"{geometric(series):.2f}", f"{key}-Runs": " ".join(f"{v:.4f}" for v in series)}
    if "percent" in r:
        trailers["Change"] = f"{r['percent']:+.1f} % ({in_sigmas(r)})"
    trailers |= {
        "Seed": " ".join(str(x["seed"]) for x in r["runs"]),
        "Phase": r["phase"],
        "Reason": r["reason"],
        "Train": r["train"],
        "Comparable": r["comparable"],
        "Branch": r["branch"],
        "Chain": r["chain"],
        "Web": r["web"],
        "By-Hand": "yes" if r["by_hand"] else "",
    }
    return subject + "\n\n" + "".join(f"{k}: {v}\n" for k, v in trailers.items() if v != "")


def in_sigmas(r: dict) -> str:
    return f"{abs(r['sigmas'])} sigma {'better' if r['sigmas'] > 0 else 'worse'}"


def block(work: str, commit: str, log: str, image: str) -> None:
    """Print the result block; the last lines of a failed run's log are quoted in it as data."""
    r, plan = json.loads(Path(work, "result.json").read_text()), os.environ.pop("AR_PLAN", "")
    try:
        state = State(image)  # what is edited while this ran is for the next experiment
    except program.ProgramError:
        os.environ["AR_PLAN"] = plan
        state = State(image)
    rows = [
        ("experiment", r["experiment"]),
        ("verdict", r["verdict"]),
        ("hypothesis", r["hypothesis"]),
        *metric_rows(r),
        ("reason", r["reason"]),
        ("train", training(r["runs"][-1], state.plan.budget)),
    ]
    end = [
        ("commit", commit[:9] + what_became_of_it(r)),
        ("log", log),
        ("elsewhere", state.better_elsewhere()),
        ("phase", state.phase_line()),
        ("next", what_next(r, state)),
    ]
    lines, quoted, last = ([f"{k + ':':13} {v}" for k, v in part if v != ""] for part in (rows, [], end))
    if r["reason"]:
        text = Path(ROOT, log).read_bytes()[-6000:].decode("utf-8", "replace")
        quoted = [f"| {clean(x)[:110]}" if x[:1].strip() else f"|   {clean(x)[:110]}" for x in text.splitlines()]
        quoted = [x for x in quoted if x.strip("| ")][-LOG_LINES:]
    last = [*news(r, state), *last]
    while len("\n".join(["---", *lines, *quoted, *last]).encode()) > MOST_BLOCK and quoted:
        quoted.pop(0)
    print("\n".join(["---", *lines, *quoted, *last]).encode()[:MOST_BLOCK].decode("utf-8", "ignore"))


def what_became_of_it(r: dict) -> str:
    if r["verdict"] not in COUNTED[1:]:
        return f" (the whole chain of {r['chain'].split()[0]})" if r["chain"] else ""
    if r["chain"].endswith("goes on"):
        return f" (in the record; train.py keeps your edit, build on it: {r['chain'].split(' on ')[0]} in this chain)"
    ended = ""
    if r["chain"]:
        link, _, most = r["chain"].split()[:3]
        ended = ", the chain has ended" + (" with its phase" if int(link) < int(most) else "")
    return f" (in the record; train.py is the incumbent again{ended})"


def news(r: dict, state: State) -> list:
    """What changed in program.md, and what a phase that has begun asks for."""
    changed, begun = record.news_of_the_plan(), state.phase if r["phase"] else None
    lines = ["plan:         program.md has changed:", *(f"  {line}" for line in changed)] if changed else []
    if begun and begun.name != r["phase"]:
        lines += [f"new phase:    {begun.name}", *(f"  {line}" for line in map(clean, begun.text.splitlines()) if line)]
    if len("\n".join(lines).encode()) <= MOST_NEWS:
        return lines
    while len("\n".join(lines).encode()) > MOST_NEWS - 40:
        lines.pop()
    return [*lines, "  [...] Read program.md for the rest"]


def metric_rows(r: dict) -> list:
    good = [x["metrics"] for x in r["runs"] if x["outcome"] == "ok"]
    if not good:
        return []
    value = geometric([m[r["metric"]] for m in good])
    other = "median_rank" if r["metric"] == "mean_rank" else "mean_rank"
    twice = f", mean of {len(good)} runs" if len(good) > 1 else ""
    rows = [
        (
            r["metric"],
            f"{show(value)}   (validation, gallery {good[0]['gallery']}, random {good[0]['random']:.1f}, "
            f"lower is better{twice})",
        )
    ]
    if "percent" in r:
        noise = f"({in_sigmas(r)}, sigma {r['sigma'] * 100:.1f} %)"
        if r["verdict"] == "discarded" and 0 < r["sigmas"] < MARGIN:
            noise += f"; below {MARGIN} sigma nothing is kept"
        runs = "1 run" if len(r["before"]) == 1 else f"{len(r['before'])} runs"
        rows += [
            ("before", f"{show(geometric(r['before']))}   ({runs})"),
            ("change", f"{r['percent']:+.1f} %   {noise}"),
        ]
    at = {s: " / ".join(f"{sum(m[s][k] for m in good) / len(good):.1f}" for k in range(3)) for s in ("i2t", "t2i")}
    return [
        *rows,
        (other, show(geometric([m[other] for m in good]))),
        ("recall", f"i2t {at['i2t']}   t2i {at['t2i']}   (R@1 / 5 / 10, %)"),
    ]


def training(run: dict, budget: int) -> str:
    """Seconds are the harness's, the rest are train.py's own claims."""
    said, t = run["train"].get("claims", {}), run["timing"]
    claims = [
        f"{said['steps']} steps" if "steps" in said else "",
        f"loss {said['loss']}" if "loss" in said else "",
        f"peak {said['peak_memory']}" if "peak_memory" in said else "",
        run["train"].get("device", ""),
    ]
    around = f"{t['total'] - t['train']:.0f} s around it"
    return ", ".join(filter(None, [f"{t['train']:.0f} s of {budget}", *claims, around]))


def what_next(r: dict, state: State) -> str:
    if state.phase is None:
        return "all phases of program.md are done; say so and stop"
    step = "write the next hypothesis in scratchpad.md, edit train.py, run ./run.sh"
    step = record.ASK + step if state.planner_is_due() else step
    if r["verdict"] == "failed" and r["chain"].endswith("goes on"):
        return f"mend it where it stands, or try something else on top; {step}"
    if r["verdict"] == "failed":
        return f"your edit is in runs/{r['experiment']:04d}.diff: make it again, mended, or drop the idea; then {step}"
    return f"note in scratchpad.md what this taught; then {step}" if r["verdict"] == "discarded" else step


def tsv() -> None:
    state = State()
    print("n\tverdict\tmetric\tchange\tphase\thypothesis")
    for r in state.all:
        if not r.comparable:
            continue  # an audit or a final: numbers that the loop must not see
        old = "" if r.comparable == state.comparable else " (not comparable)"
        value = show(geometric(state.values(r))) if state.values(r) else r.reason.split(":")[0]
        print("\t".join([str(r.n), r.verdict + in_chain(r) + old, value, r.change, r.phase, r.hypothesis]))


def in_chain(r: Record) -> str:
    return f" (chain, {r.chain.split(' on ')[0]})" if r.chain else ""


def log(count: str = "20") -> None:
    """The last experiments, one line each."""
    state = State()
    for r in state.all[-int(count) :]:
        value = show(geometric(state.values(r))) if state.values(r) else ""
        when = time.strftime("%m-%d %H:%M", time.localtime(r.when))
        text = " — ".join(filter(None, [r.hypothesis, r.reason])) + in_chain(r)
        print(f"{r.n:>5}  {when}  {r.verdict:<10} {value:>8}  {r.change:<27} {text}")


def status() -> None:
    state = State()
    count = {v: sum(r.verdict == v for r in state.counted) for v in COUNTED}
    print(
        f"phase:    {state.phase_line()}\nbest:     {state.plan.metric} {state.best_line()}\n"
        f"record:   {len(state.counted)} experiments: {', '.join(f'{n} {v}' for v, n in count.items())}\n"
        f"running:  {record.running_line() or 'nothing'}"
    )
    if better := state.better_elsewhere():
        print(f"elsewhere: {better}")


COMMANDS = {f.__name__: f for f in (plan, decide, write, block, tsv, log, status)}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    try:
        COMMANDS[sys.argv[1]](*sys.argv[2:])
    except (Refused, program.ProgramError, OSError) as e:
        print(f"run.sh: {e}", file=sys.stderr)
        sys.exit(2)
