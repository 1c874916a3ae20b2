"""./run.sh                one experiment: train, judge, commit or revert (this is what Claude Code runs)
./run.sh setup          engine, image, built-in data, baseline; only what is missing
./run.sh test [unit | --full]     the tests, with what they need
./run.sh data NAME [--odvg DIR]   draw prints, fetch ukiyo-e, or import your own ODVG lines and images
./run.sh status|log [N]|report    where things stand; the last N experiments; report.html for a browser
./run.sh night [HH:MM|stop]       Claude Code at work until the plan ends or that hour, whatever happens meanwhile
./run.sh keep N         overrule a verdict: make experiment N the incumbent
./run.sh audit [K] [--ablate]     baseline against best on fresh pairs, K seeds each: the numbers to publish
./run.sh final          the best, trained longer on all but the test pairs, judged once on those
./run.sh doctor         what this machine can hold, and what it cannot
exit status             0 recorded, 1 recorded as failed or lost, 2 refused and nothing ran
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import sys
import traceback

import dataset
import display
import experiment
import install
import night
import publish
import report
from project import INSIDE, ROOT, RUNS, Refused, say

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def by_agent() -> bool:
    return bool(os.environ.get("CLAUDECODE"))


def one_experiment() -> int:
    """Claude Code must show that its guard let this very call through. Raises Refused."""
    if by_agent():
        name = re.sub(r"[^A-Za-z0-9_-]", "", os.environ.get("CLAUDE_CODE_SESSION_ID", ""))
        proof = RUNS / "session" / f"proof.{name}"
        if not name or not proof.is_file():
            raise Refused(
                "called by Claude Code, but its guard did not approve this call: the hooks are off, another hook "
                "changed it (./run.sh doctor names both), or this is a typed '!' command. "
                f"Start claude in {ROOT} with its hooks on, or use a terminal."
            )
        proof.unlink()
    return experiment.run()


def usage() -> None:
    print(__doc__, end="")


HELP = dict.fromkeys(("help", "--help", "-h"), usage)
FOR_ANYBODY = {
    "": one_experiment,
    "refresh-report": report.refresh,  # started by the agent's ./run.sh too
    "status": display.status,
    "log": display.log,
    "doctor": install.doctor,
    **HELP,
}
FOR_A_PERSON = {
    "setup": install.setup,
    "test": install.test,
    "data": dataset.prepare,
    "keep": experiment.keep,
    "report": report.report,
    "night": night.main,
    "audit": publish.audit,
    "final": publish.final,
}


def run_verb(verb: str, words: list[str]) -> int:
    """Returns the exit status. Raises Refused."""
    if by_agent() and verb in FOR_A_PERSON:
        raise Refused(f"'{verb}' is for a person, in a terminal")
    function = {**FOR_ANYBODY, **FOR_A_PERSON}.get(verb)
    if not function:
        raise Refused(f"unknown verb '{verb}'; ./run.sh help lists them")
    parameters = inspect.signature(function)
    try:
        parameters.bind(*words)
    except TypeError:
        names = "".join(f" [{name.upper()}]" for name in parameters.parameters)
        raise Refused(f"usage: ./run.sh {verb}{names}; ./run.sh help says more") from None
    return function(*words) or 0


def end(number: int, _) -> None:
    """On a signal: leave through every `finally`, which ends the containers; a second one must not cut that short."""
    for s in ENDING:
        signal.signal(s, signal.SIG_IGN)
    raise SystemExit(128 + number)  # 130, 143: as shells have it


def readable_inside() -> None:
    """What is mounted into containers, for their other user: the clone may have been made under any umask."""
    for file in (INSIDE, *INSIDE.iterdir()):
        mode = file.stat().st_mode
        wanted = mode | (0o555 if file.is_dir() else 0o444)
        if mode != wanted:
            with contextlib.suppress(OSError):  # another person's
                file.chmod(wanted)


def main(words: list[str]) -> int:
    verb = words[0] if words else ""
    os.umask(0o022)  # containers read what is written here as another user
    readable_inside()
    if verb != "night":
        for s in ENDING:
            signal.signal(s, end)
    try:
        return run_verb(verb, words[1:])
    except Refused as error:
        say(f"run.sh: {error}")
    except OSError as error:
        say(f"run.sh: {error}; nothing ran, or what is recorded is completed by the next run")
    except Exception as error:
        *_, place = traceback.extract_tb(error.__traceback__)
        where = f"{os.path.basename(place.filename)} line {place.lineno}"
        say(f"run.sh: {type(error).__name__} in {where}: {error}; please report it; what is recorded is safe")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
