"""Tells a person what happened: program.md's `notify` is a command of theirs, which gets a line on standard input.

It runs in the background and in run.sh's clean environment; nothing waits for it, and nothing fails with it.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from subprocess import DEVNULL

import program
from history import History
from project import ROOT, RUNS, Refused, read_json, say, visible, write_json
from record import Attempt

STATE, LOG = RUNS / "notify.json", RUNS / "notify.log"  # whether the command fails; what it said the last time
TROUBLE = RUNS / "notify.trouble"  # an empty file, which a full disk takes too: when NOTHING_RUNS was told last
LIMIT_S = 30  # for the command, with what it started
NOTHING_RUNS = "nothing runs, please see to it"
AGAIN_S = 3600  # until that is told once more: the agent tries again and again
MAX_LINE = 300  # characters


def tell(text: str) -> None:
    """Start the command, where program.md names one, with the beginning of this text as its line."""
    line = visible(" ".join(f"{ROOT.name}: {text}".split()))[:MAX_LINE]
    with contextlib.suppress(program.ProgramError, OSError):
        if program.read().notify:
            command = ["env", "-u", "CLAUDECODE", ROOT / "run.sh", "notify", line]  # it is not the agent's to call
            subprocess.Popen(command, stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, start_new_session=True)


def tell_result(attempt: Attempt, history: History) -> None:
    """A large improvement, and the end of a phase. history: by which the experiment was planned."""
    if not history.program.notify:
        return
    if read_json(STATE, {}).get("fault") == "new":
        say("run.sh: warning: program.md's `notify` fails; ./run.sh notify, in a terminal, shows how")
        with contextlib.suppress(OSError):  # a full disk
            write_json(STATE, {"fault": "said"})
    now = History.load(history.program)
    best, phase = f"{now.program.metric} {now.best_line()}", now.phase.name if now.phase else ""
    if attempt.verdict == "kept" and -(attempt.percent or 0) > now.program.notify_gain:
        tell(f"experiment {attempt.experiment} is kept ({attempt.percent:+.1f} %): {attempt.hypothesis}; {best}")
    if attempt.phase not in ("", phase):
        tell(f"phase '{attempt.phase}' has ended; next: {phase or 'none'}; {best}")


def notify(line: str = "") -> None:
    """Run the command to its end; without a line, for a person who tries it. Raises Refused when it fails."""
    words, trouble = program.read().notify, NOTHING_RUNS in line
    if not words:
        raise Refused("program.md has no `notify` under Settings; .claude/README.md says what it may be")
    if trouble and TROUBLE.exists() and 0 <= time.time() - TROUBLE.stat().st_mtime < AGAIN_S:
        return
    given = (line or f"{ROOT.name}: a line to try `notify`") + "\n"
    with LOG.open("wb") as log:
        command = ["timeout", "-k", "5", str(LIMIT_S), *words]
        status = subprocess.run(command, input=given.encode(), stdout=log, stderr=log, cwd=ROOT).returncode
    if trouble and not status:
        TROUBLE.touch()
    fault = read_json(STATE, {}, fault=str).get("fault") or ("new" if line else "said")
    write_json(STATE, {"fault": fault if status else ""})
    if status:
        said = visible(" ".join(LOG.read_text(errors="replace").split()))[-200:] or "it said nothing"
        raise Refused(f"program.md's `notify` failed ({f'after {LIMIT_S} s' if status == 124 else status}): {said}")
    say("`notify` ended well; look whether the line has arrived")
