#!/usr/bin/env python3
"""report.html and progress.png: read the record from git, have both drawn in a sandbox, put them in place.

usage: report.py             for a person: prints the two paths; one line and exit 2 when there is nothing to show
       report.py refresh     in the shadow of a training: lowest priority, silent, always exit 0

Host side, standard library only. Needs no lock. The report shows validation pairs, so its inputs go to the sandbox on
standard input and come back on standard output: nothing of it lies in runs/, which the agent reads.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / ".claude" / "hooks")]
import engine  # noqa: E402
import program  # noqa: E402
import record  # noqa: E402

FILES = ("report.html", "progress.png")
LIMIT_S = 180
MEMORY = "2g"
LOOKS = ("audit", "final")  # records that are no experiments
DIFFS = 400  # newest experiments whose diff is in the page
MOST_DIFF = 12_000  # characters of one
CURVES = 40  # newest experiments whose loss is drawn, besides the kept ones
MOST_LOG = 200_000  # bytes of a log that are searched for losses
MOST_POINTS = 200  # of a loss curve
STEP = re.compile(rb"^step (\d{1,9})/\d{1,9} loss (\d{1,6}(?:\.\d{1,6})?)\s*$", re.M)


def read_objects(names: list) -> dict:
    """{name: bytes} of those git objects that exist, from one git process."""
    done = subprocess.run(
        [*record.GIT, "cat-file", "--batch"],
        cwd=record.ROOT,
        capture_output=True,
        input="".join(f"{n}\n" for n in names).encode(),
    )
    found, at, out = {}, 0, done.stdout
    for name in names:
        end = out.index(b"\n", at)
        header, at = out[at:end].split(), end + 1
        if len(header) == 3 and header[1] == b"blob":
            found[name] = out[at : at + int(header[2])]
            at += int(header[2]) + 1
    return found


def diffs(numbers: list) -> dict:
    """{experiment: the hunks of train.py against its parent, visible characters only}, from one git process."""
    mark = secrets.token_hex(16)  # not \0: a train.py may have one, and what follows it would be another's diff
    command = [
        "log",
        "--no-walk=unsorted",
        "--stdin",
        "-p",
        "--no-ext-diff",
        "--no-textconv",
        "--no-color",
        "--no-show-signature",
        f"--format={mark}%(trailers:key=Experiment,valueonly,separator=){mark}",
        "train.py",
    ]
    done = subprocess.run(
        [*record.GIT, *command],
        cwd=record.ROOT,
        capture_output=True,
        text=True,
        errors="replace",
        input="".join(f"refs/experiments/{n}\n" for n in numbers),
    )
    parts, found = done.stdout.split(mark)[1:], {}
    for n, text in zip(parts[::2], parts[1::2]):
        hunks = text[text.find("\n@@") + 1 :] if "\n@@" in text else ""
        lines = [record.clean("|" + x.replace("\t", "    "))[1:] for x in hunks[:MOST_DIFF].splitlines()]
        found[int(n)] = "\n".join([*lines, *(["[... cut ...]"] if len(hunks) > MOST_DIFF else [])])
    return found


def losses(log: bytes) -> list:
    """[[step, loss], ...] of the first run in a log, thinned."""
    points: list = []
    for step, loss in STEP.findall(log[:MOST_LOG]):
        if points and int(step) <= points[-1][0]:
            break  # the second run begins
        points.append([int(step), float(loss)])
    return points[:: -(-len(points) // MOST_POINTS) or 1]


def line_of_incumbents(mine: list, values, branch: str) -> dict:
    """{experiment: (this branch's incumbent's metric after it, its file)}: the mean of all runs of that file so far."""
    runs: dict = {}
    train, found, begun = "", {}, False
    for r in mine:
        begun |= r.branch == branch  # what was kept before came with the branch
        runs.setdefault(r.train, []).extend(values(r))
        if r.verdict in ("kept", "baseline") and runs[r.train] and (not begun or r.branch in ("", branch)):
            train = r.train
        found[r.n] = (record.geometric(runs[train]) if train else None, train)
    return found


def entry(r: record.Record, result: dict, values: list) -> dict:
    """One experiment as the page shows it."""
    runs = result.get("runs", [])
    ok = [x for x in runs if x.get("outcome") == "ok"]
    notes = [r.chain and "chain, " + r.chain.partition(" on ")[0], r.web and "web: " + r.web, r.branch]
    return {
        "n": r.n,
        "verdict": r.verdict,
        "notes": list(filter(None, notes)),
        "hypothesis": r.hypothesis,
        "reason": r.reason,
        "phase": r.phase,
        "when": r.when,
        "by_hand": "By-Hand" in r.trailers,
        "values": values,
        "value": record.geometric(values) if values else None,
        "percent": result.get("percent"),
        "sigmas": result.get("sigmas"),
        "seeds": [x.get("seed") for x in runs],
        "train_s": sum(x["timing"]["train"] for x in runs),
        "total_s": sum(x["timing"]["total"] for x in runs),
        "claims": runs[-1]["train"].get("claims", {}) if runs else {},
        "metrics": ok[-1]["metrics"] if ok else {},
        "look": result.get(r.verdict) if r.verdict in LOOKS else None,
    }


def gather() -> tuple[dict, Path]:
    """All that the page shows, and the data folder. Raises Refused when there is nothing."""
    state = record.State()
    judged = [r for r in state.all if r.verdict not in LOOKS]
    mine = [r for r in judged if r.comparable == state.comparable]
    line = line_of_incumbents(mine, state.values, state.branch)
    if not any(value for value, _ in line.values()):
        raise record.Refused(
            "there is nothing to show: nothing was measured with today's data, judge, image and "
            "budget yet; run ./run.sh first"
        )
    best = next(r for r in reversed(mine) if r.train == line[mine[-1].n][1] and state.values(r))
    base = next(r for r in mine if state.values(r))
    curves = {r.n for r in mine if r.verdict in ("kept", "baseline")} | {r.n for r in mine[-CURVES:]}
    inside = "refs/experiments/{}:experiment/{}".format
    found = read_objects(
        [inside(r.n, "result.json") for r in state.all]
        + [inside(n, "train.log") for n in curves]
        + [inside(r.n, f"{f}.npy") for r in (base, best) for f in ("ranks", "examples")]
    )
    shown = diffs([r.n for r in judged if inside(r.n, "result.json") in found][-DIFFS:])
    rows = []
    for r in state.all:
        e = entry(r, json.loads(found.get(inside(r.n, "result.json"), b"{}")), state.values(r))
        rows.append(
            {
                **e,
                "line": line[r.n][0] if r.n in line else None,
                "comparable": r.n in line,
                "diff": shown.get(r.n),
                "loss": losses(found.get(inside(r.n, "train.log"), b"")),
            }
        )
    arrays = {
        side: {f: base64.b64encode(found.get(inside(r.n, f"{f}.npy"), b"")).decode() for f in ("ranks", "examples")}
        for side, r in (("baseline", base), ("best", best))
    }
    return {
        "metric": state.plan.metric.replace("_", " "),
        "sigma": state.sigma,
        "phases": [p.name for p in state.plan.phases],
        "data": state.plan.data,
        "budget": state.plan.budget,
        "now": int(time.time()),
        "running": record.running_line(),
        "experiments": rows,
        "arrays": arrays,
        "baseline": base.n,
        "best": best.n,
        "diffs": DIFFS,
    }, state.data


def draw(found: dict, data: Path) -> list:
    """The bytes of FILES, drawn in a sandbox. Raises EngineError."""
    name = f"ar-{os.getpid()}-report"
    mounts = {
        "/harness/draw.py": HERE / "draw.py",
        "/harness/report.html.jinja": HERE / "report.html.jinja",
        "/data/images": data / "val/images",
        "/data/captions": data / "val/captions",
        "/data/key.npy": data / "val.key.npy",
    }
    argv = engine.sandbox(
        name,
        engine.find_image(),
        ["timeout", "-k1", str(LIMIT_S), "nice", "-n19", "python", "-I", "/harness/draw.py"],
        memory=MEMORY,
        limit_s=LIMIT_S,
        gpu=False,
        background=True,
        mounts={k: v for k, v in mounts.items() if v.exists()},
    )
    try:
        done = subprocess.run(argv, input=json.dumps(found).encode(), capture_output=True, timeout=LIMIT_S + 10)
    except subprocess.TimeoutExpired:
        raise engine.EngineError(f"the report was not drawn within {LIMIT_S} s") from None
    finally:
        engine.kill(name)
    header, _, body = done.stdout.partition(b"\n")
    try:
        first, second = json.loads(header)
        if len(body) != first + second:
            raise ValueError
    except ValueError:
        raise engine.EngineError(f"the report was not drawn: {done.stderr.decode('utf-8', 'replace')[-800:]}") from None
    return [body[:first], body[first:]]


def publish(contents: list) -> None:
    """Each file appears whole: a browser that reloads never reads half of one."""
    for name, content in zip(FILES, contents):
        part = record.ROOT / f"{name}.{os.getpid()}"
        try:
            part.write_bytes(content)
            part.replace(record.ROOT / name)
        finally:
            part.unlink(missing_ok=True)


def make(wait: bool) -> None:
    """Draw and publish. One drawing at a time in all worktrees: on a busy machine they would wait side by side.

    Raises BlockingIOError when another is under way and it is not to be waited for.
    """
    common = record.git("rev-parse", "--path-format=absolute", "--git-common-dir").strip()
    with open(f"{common}/autoresearch.report", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        engine.sweep(background=True)  # what a killed one left
        publish(draw(*gather()))


def main() -> None:
    try:
        make(wait=True)
    except (record.Refused, program.ProgramError, engine.EngineError) as e:
        engine.say(f"run.sh: {e}")
        sys.exit(2)
    print("\n".join(str(record.ROOT / name) for name in FILES))


def refresh() -> None:
    """Silent: a report that could not be drawn must not show in an agent's run."""
    os.nice(19)
    with contextlib.suppress(Exception):
        make(wait=False)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["refresh"]):
        sys.exit(__doc__)
    refresh() if sys.argv[1:] else main()
