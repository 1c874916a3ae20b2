#!/usr/bin/env python3
"""./run.sh night [HH:MM|stop]: keeps Claude Code at work until the loop ends by itself. Standard library only.

A keeper, detached from the terminal, starts `claude -p start` again and again; between two conversations the brief and
the scratchpad are the memory. The terminal only follows runs/night.log. program.md's `stop` counts over the whole
night, whose state is in runs/night.json; runs/night.lock is held while the keeper lives. Exit status: 0 the loop ended
as planned or was stopped, 1 the night gave up or was cut off, 2 refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent / "hooks"))
import loop  # noqa: E402
import record  # noqa: E402

LOG = record.ROOT / "runs" / "night.log"
FIRST_WAIT, LONGEST_WAIT = 10, 15 * 60  # s until the client is started again; doubled until an experiment is recorded
SILENT, BARREN = 30 * 60, 3 * 3600  # s without a line from the client, without an experiment: then it is ended
LATE = 5 * 60  # s, and two budgets, that the client may take to end once the loop has
FRUITLESS = 10  # conversations in a row that ended orderly but brought no experiment
DYING = 60  # s that run.sh gets to clean up, and then the client
POLL = 3  # s
OURS = ("setpriv", "--pdeathsig", "TERM")  # a client without its keeper would not know the hour
START = ("-p", "start", "--output-format", "stream-json", "--verbose")
HINT = "It needs no terminal: Ctrl-C ends this view, ./run.sh night stop the night, after its running experiment."


def tell(text: str) -> None:
    """A line of the log: the keeper's standard output."""
    with contextlib.suppress(OSError):  # a full disk
        print(time.strftime("%m-%d %H:%M  ") + text, flush=True)


def plan() -> record.program.Program:
    """program.md, or none while there is a mistake in it: the agent is told which."""
    with contextlib.suppress(ValueError):
        return record.program.read(record.ROOT / "program.md")
    return record.program.Program([])


def running() -> int:
    """The process of the experiment that runs now, 0 when none does."""
    return record.running().get("pid", 0)


def end(pid: int) -> None:
    """End a process and all that it started: first run.sh, which removes its containers, then the client, then all."""
    table = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [(int(p), int(parent), args) for p, parent, args in (row.split(None, 2) for row in table.splitlines())]
    tree = {pid}
    while more := {p for p, parent, _ in rows if parent in tree} - tree:
        tree |= more
    ours = {p for p, _, args in rows if p in tree and f"{record.ROOT}/run.sh" in args}
    for number, those in ((signal.SIGTERM, ours), (signal.SIGTERM, {pid}), (signal.SIGKILL, tree)):
        for p in those:
            with contextlib.suppress(OSError):
                os.kill(p, number)
        until = time.monotonic() + DYING
        while any(os.path.exists(f"/proc/{p}/exe") for p in those) and time.monotonic() < until:
            time.sleep(0.2)


class Night:
    """The keeper. Its state is what the hooks read; its attributes are about the conversation under way."""

    def __init__(self, claude: str, clock: str, log: int):
        self.claude, self.stops, self.session, self.said, self.result = claude, 0, "", "", {}
        self.told = record.State().newest
        self.state = {
            "since": time.time(),
            "from": self.told,
            "clock": clock,
            "log": log,
            "stop": "",
            "tokens": 0,
            "usd": 0.0,
            "unpaid": 0,
            "conversations": 0,
        }

    def save(self) -> None:
        with contextlib.suppress(OSError):
            loop.put(loop.NIGHT, self.state)

    def ended(self) -> str:
        """Why the loop is over, as the hooks see it; '' while it goes on or cannot be told."""
        if self.stops:
            self.state["stop"] = "the person said night stop"
            self.save()  # every time: the disk may have been full
        try:
            begun = {k: self.state[k] for k in ("from", "since")}
            return self.state["stop"] or loop.reason_to_end(begun, record.State())
        except Exception:
            return self.state["stop"]

    def keep(self) -> int:
        """Conversations until there is a reason to end; the exit status."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stops", self.stops + 1))
        self.state["pid"], fruitless, wait = os.getpid(), 0, FIRST_WAIT
        tell(f"A night, until {self.state['clock'] or 'the plan ends'}; phase {record.State().phase_line()}")
        while not (why := self.ended()):
            before, fault = self.told, self.converse()
            if self.news(before):
                fruitless, wait = 0, FIRST_WAIT
            elif not fault:
                fruitless += 1
            if fruitless == FRUITLESS:
                break
            if not self.ended():
                tell(f"{fault or 'the conversation has ended: ' + self.said}; again in {wait} s")
                until, wait = time.monotonic() + wait, min(2 * wait, LONGEST_WAIT)
                while (time.monotonic() < until or running()) and not self.ended():
                    time.sleep(POLL)
        while running() and self.stops < 2:  # an experiment whose client was killed
            time.sleep(POLL)
        if left := running():
            end(left)
        self.news(0)
        self.sum_up(why or f"{fruitless} conversations in a row brought no experiment; the last said: {self.said}")
        self.state["status"] = 0 if why else 1
        self.save()
        return self.state["status"]

    def converse(self) -> str:
        """One conversation to its end; what went wrong in it, '' when nothing did."""
        self.state["conversations"] += 1
        self.save()
        tell(f"Claude Code starts, conversation {self.state['conversations']}")
        self.session, self.said, self.result, fault, over = "", "it said nothing", {}, "", 0.0
        command = [*OURS, self.claude, *START]
        if "usd" in plan().stop:
            command += ["--max-budget-usd", f"{plan().stop['usd'] - self.state['usd']:.6f}"]
        try:
            client = subprocess.Popen(
                command,
                cwd=record.ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as e:
            return f"the client cannot be started: {e}"
        lines: queue.Queue = queue.Queue()
        reader = threading.Thread(target=lambda: [lines.put(line) for line in client.stdout], daemon=True)
        reader.start()
        heard = brought = time.monotonic()
        while not fault and client.poll() is None:
            try:
                before = self.told
                self.hear(lines.get(timeout=POLL))
                heard = time.monotonic()
                brought = heard if self.told > before else brought
            except queue.Empty:
                heard, brought = (time.monotonic(),) * 2 if running() else (heard, brought)
            if lines.empty():
                over = (over or time.monotonic()) if self.ended() else 0.0
            if self.stops > 1:
                fault = "the client was ended at once"
            elif over and time.monotonic() > over + LATE + 2 * plan().budget:
                fault = "the client was still there long after the loop had ended, and was ended"
            elif time.monotonic() > min(heard + SILENT, brought + BARREN):
                word = "experiment" if time.monotonic() > brought + BARREN else "word"
                fault = f"no {word} from the client for long, so it was ended"
        if fault:
            end(client.pid)
        code = client.wait()
        reader.join(5)  # longer only when something that it started holds the pipe
        while not lines.empty():
            self.hear(lines.get())
        session = loop.load({"session_id": self.session})
        self.state["tokens"] += loop.tokens(session)
        self.state["usd"] += self.result.get("total_cost_usd") or 0
        self.state["unpaid"] += "total_cost_usd" not in self.result
        self.save()
        # the Stop hook switches the loop off where a conversation ends in order
        if fault or code == 0 and self.result and not self.result.get("is_error") and not session.get("on"):
            return fault
        return f"the client {f'was killed by signal {-code}' if code < 0 else f'ended with status {code}'}: {self.said}"

    def hear(self, line: bytes) -> None:
        """One line of the client's stream, or of its complaints."""
        try:
            event = dict(json.loads(line))
        except (ValueError, TypeError):
            event = {"result": line.decode("utf-8", "replace")}
        self.session = str(event.get("session_id") or self.session)
        if event.get("type") == "result":
            self.result = event
        elif event.get("type") == "user":
            self.news(self.told)
        notice = event.get("content") if event.get("subtype") == "informational" else ""
        said = " ".join(str(event.get("result") or event.get("errors") or notice or "").split()).split(". ")[0]
        self.said = record.clean(said)[:150] or self.said

    def news(self, since: int) -> list:
        """Log what was recorded since the last look; the experiments after `since`, as the Stop hook counts them."""
        try:
            state = record.State()
        except Exception as e:
            return tell(f"the record cannot be read: {e}") or []
        for r in state.own(state.all):
            if r.n > self.told:
                value = record.show(record.geometric(state.values(r))) if state.values(r) else ""
                text = " — ".join(filter(None, [r.hypothesis, r.reason]))
                tell(f"#{r.n:<4} {r.verdict:<10} {value:>7} {r.change.split(' (')[0]:>9}  {text}")
        self.told = state.newest
        return [r for r in state.own(state.all) if r.n > since and r.verdict != "unmeasured"]

    def sum_up(self, why: str) -> None:
        with contextlib.suppress(Exception):
            state = record.State()
            verdicts = [r.verdict for r in state.tried if r.n > self.state["from"]]
            counts = ", ".join(f"{verdicts.count(v)} {v}" for v in record.COUNTED)
            tell(f"{len(verdicts)} experiments: {counts}; {state.plan.metric} {state.best_line()}")
        unpaid = f", and what {self.state['unpaid']} cost that did not tell" if self.state["unpaid"] else ""
        tell("{conversations} conversations, {tokens:,} tokens, {usd:.2f} USD".format(**self.state) + unpaid)
        drawn = subprocess.run(
            [record.ROOT / "run.sh", "report"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        tell("report.html shows it" if drawn.returncode == 0 else f"no report: {drawn.stderr.strip()[-200:]}")
        tell(f"The night has ended: {why}")


def detach(night: Night) -> None:
    """Run the keeper in a process of its own that no terminal can end."""
    if os.fork():
        return
    status = 1
    try:
        os.setsid()
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # not ignored, which the client would inherit
        null, log = os.open(os.devnull, os.O_RDONLY), os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for ours, theirs in enumerate((null, log, log)):
            os.dup2(theirs, ours)
        status = night.keep()
    except BaseException:
        tell("the keeper failed: " + traceback.format_exc())
    os._exit(status)


def follow(start: int) -> int:
    """Show the log from byte `start` on, until the night ends; its exit status."""
    live, alive = sys.stdout.isatty(), True
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    try:
        with LOG.open("rb") as log:
            log.seek(start)
            while alive:
                alive = bool(loop.night())
                print("\r\033[K" * live + log.read().decode("utf-8", "replace"), end="", flush=True)
                if alive:
                    print((" " * 13 + record.running_line()) * live, end="", flush=True)
                    time.sleep(1)
    except KeyboardInterrupt:
        print("\nThe night goes on. ./run.sh night shows it again, ./run.sh night stop ends it.")
        return 0
    state = loop.get(loop.NIGHT, {})
    if "status" not in state:
        print("The night was cut off: its keeper is gone. What was recorded is safe; ./run.sh night begins another.")
    return state.get("status", 1)


def main(word: str = "") -> int | str:
    """The exit status, or why nothing was done."""
    if os.environ.get("CLAUDECODE"):
        return "'night' is for a person, in a terminal"
    if word not in ("", "stop") and not re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", word):
        return "usage: ./run.sh night [HH:MM], or ./run.sh night stop"
    now, start = loop.night(), LOG.stat().st_size if LOG.exists() else 0
    if word == "stop":
        if not now.get("pid"):
            return "no night is under way here"
        os.kill(now["pid"], signal.SIGTERM)
        print(
            "No new experiment begins. ./run.sh night shows the end; a second ./run.sh night stop does not wait for "
            "the running experiment."
        )
        return 0
    if now:
        print(
            f"A night is under way here since {time.strftime('%H:%M', time.localtime(now['since']))}, until "
            f"{now['clock'] or 'the plan ends'}.\n{HINT}"
        )
        return follow(now["log"])
    claude = shutil.which("claude")
    if not claude:
        return "claude is not in PATH; install Claude Code, or add its folder to PATH"
    LOG.parent.mkdir(exist_ok=True)
    LOG.touch()
    try:
        night = Night(claude, word, start)
    except (ValueError, record.Refused) as e:
        return str(e)
    with loop.NIGHT_LOCK.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "another night has just begun here; ./run.sh night shows it"
        last = loop.get(loop.NIGHT, {"status": 0})
        night.save()  # at once: whoever asks now must not find the last one's process
        if why := night.ended():
            loop.put(loop.NIGHT, last)
            return f"there is nothing to do: {why}"
        if "status" not in last:
            print("The last night was cut off (the machine went down, or its keeper was killed).")
        print(f"A night begins. {HINT}", flush=True)
        detach(night)
    return follow(start)


if __name__ == "__main__":
    done = main(*sys.argv[1:2])
    if isinstance(done, str):
        print(f"run.sh: {done}", file=sys.stderr)
    sys.exit(2 if isinstance(done, str) else done)
