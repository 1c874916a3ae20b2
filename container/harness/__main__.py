"""The verbs of ./run.sh: who may call which, and what an error looks like."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple

import dataset
import display
import experiment
import install
import night
import notify
import publish
import report
from project import INSIDE, ROOT, RUNS, Broken, Refused, say

BY_AGENT = bool(os.environ.get("CLAUDECODE"))
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def one_experiment() -> int:
    """Claude Code must show that its guard let this very call through. Raises Refused."""
    if BY_AGENT:
        name = re.sub(r"[^A-Za-z0-9_-]", "", os.environ.get("CLAUDE_CODE_SESSION_ID", ""))
        proof = RUNS / "session" / f"proof.{name}"
        if not name or not proof.is_file():
            why = "the hooks are off, another hook changed it (./run.sh doctor names both), or it is a '!' command"
            remedy = f"Start claude in {ROOT} with its hooks on, or use a terminal."
            raise Refused(f"called by Claude Code, but its guard did not approve this call: {why}. {remedy}")
        proof.unlink()
        try:
            return experiment.run()
        except BrokenPipeError:  # the client is gone, and what it asked for is recorded
            raise
        except (Broken, OSError) as error:
            notify.tell(f"{notify.NOTHING_RUNS}: {error}")
            raise
    return experiment.run()


class Verb(NamedTuple):
    name: str
    words: str  # what may follow it
    help: str  # a line; '' for what nobody types
    function: Callable
    for_agent: bool = False

    def usage(self) -> str:
        return " ".join(filter(None, ["./run.sh", self.name, self.words]))


def print_help() -> None:
    for verb in VERBS:
        if verb.help:
            print(f"{verb.usage():33} {verb.help}")
    print(f"{'exit status':33} 0 recorded, 1 recorded as failed or lost, 2 refused and nothing ran")


VERBS = (
    Verb("", "", "one experiment: train, judge, commit or revert (what Claude Code runs)", one_experiment, True),
    Verb("setup", "", "engine, image, built-in data, baseline; only what is missing", install.setup),
    Verb("test", "[unit | --full]", "the tests, with what they need", install.test),
    Verb(
        "data", "NAME [--odvg DIR]", "draw prints, fetch ukiyo-e, or take your own (--size N: pixels)", dataset.prepare
    ),
    Verb("status", "", "where things stand", display.status, True),
    Verb("log", "[N]", "the last N experiments", display.log, True),
    Verb("report", "", "report.html for a browser", report.report),
    Verb("night", "[HH:MM|stop]", "Claude Code at work until the plan ends or that hour, whatever happens", night.main),
    Verb("notify", "", "try program.md's `notify`, which is told what happens", notify.notify),
    Verb("keep", "N", "overrule a verdict: make experiment N the incumbent", experiment.keep),
    Verb("audit", "[K] [--ablate]", "the numbers to publish: baseline against best, K seeds each", publish.audit),
    Verb("final", "", "the best, trained longer on all but the test pairs, judged once on those", publish.final),
    Verb("doctor", "", "what this machine can hold, and what it cannot", install.doctor, True),
    Verb("help", "", "this", print_help, True),
    Verb("refresh-report", "", "", report.refresh, True),  # started by the agent's ./run.sh too
    Verb("end-chain", "", "", experiment.end_chain, True),  # and this by its hooks
)


def run_verb(name: str, words: list[str]) -> int:
    """Returns the exit status. Raises Refused."""
    name = "help" if name in ("--help", "-h") else name
    verb = next((verb for verb in VERBS if verb.name == name), None)
    if not verb:
        raise Refused(f"unknown verb '{name}'; ./run.sh help lists them")
    if BY_AGENT and not verb.for_agent:
        raise Refused(f"'{name}' is for a person, in a terminal")
    try:
        inspect.signature(verb.function).bind(*words)
    except TypeError:
        raise Refused(f"usage: {verb.usage()}; ./run.sh help says more") from None
    return verb.function(*words) or 0


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
        if (path := os.fsencode(ROOT).decode("utf-8", "replace")) != str(ROOT):
            raise Refused(f"the path of this folder, {path}, is not UTF-8, which engines cannot mount; rename it")
        return run_verb(verb, words[1:])
    except Refused as error:
        say(f"run.sh: {error}")
    except BrokenPipeError:  # who read this has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:
        say(f"run.sh: {error}; nothing ran, or what is recorded is completed by the next run")
    except Exception as error:
        *_, place = traceback.extract_tb(error.__traceback__)
        where = f"{os.path.basename(place.filename)} line {place.lineno}"
        say(f"run.sh: {type(error).__name__} in {where}: {error}; please report it; what is recorded is safe")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
