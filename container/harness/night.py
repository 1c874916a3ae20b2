"""./run.sh night [HH:MM|stop]: keeps Claude Code at work until the loop ends by itself.

A keeper, detached from the terminal, starts `claude -p start` again and again; between two conversations the brief and
the scratchpad are the memory. The terminal only follows runs/night.log. Exit status: 0 the loop ended as planned or was
stopped, 1 the night gave up or was cut off.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from subprocess import DEVNULL, Popen, SubprocessError, run

import display
import locks
import notify
from history import History
from project import ROOT, RUNS, Refused, visible, write_json
from record import JUDGED
from session import NIGHT, NIGHT_LOCK, Night, Session, current_night, end_chain, load, progressed

LOG, OUTPUT = RUNS / "night.log", RUNS / "night.out"  # OUTPUT: the client's, which says how the conversation ended
FIRST_WAIT = 10  # s until the client is started again; doubled after each conversation without an experiment
LONGEST_WAIT = 15 * 60  # s
BARREN = 45 * 60  # s without an experiment, after which the client is ended
FRUITLESS = 10  # conversations in a row that ended in order but brought no experiment: then the night gives up
SIGN_IN = "/login"  # in what the client says where nobody is signed in
DYING = 60  # s that an experiment gets to clean up, and then the client
POLL = 3  # s
CLIENT = ("setpriv", "--pdeathsig", "TERM", "claude", "-p", "start", "--output-format", "json", "--session-id")
ENV = {**os.environ, "DISABLE_AUTOUPDATER": "1"}  # else the next conversation may be with a client that nobody tried
HINT = "It needs no terminal: Ctrl-C ends this view, ./run.sh night stop the night, after its running experiment."


def log_line(text: str) -> None:
    """A line of the log: the keeper's standard output."""
    with contextlib.suppress(OSError):  # a full disk
        print(time.strftime("%m-%d %H:%M  ") + text, flush=True)


def client_version() -> str:
    with contextlib.suppress(OSError, SubprocessError):
        said = run(["claude", "--version"], stdin=DEVNULL, capture_output=True, text=True, timeout=DYING).stdout
        return visible(said)[:60] or "unknown"
    return "unknown"


def end_process(pid: int, runs: Callable) -> None:
    """Ask a process (-pid: its group) to end, and make it when it still runs() after a while."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if not runs():
            return
        until = time.monotonic() + DYING
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        while runs() and time.monotonic() < until:
            time.sleep(0.2)


class Keeper:
    """Starts conversations while the loop goes on."""

    def __init__(self, night: Night):
        self.night, self.history, self.logged, self.stops = night, History.load(), night.after, 0
        self.conversation = ""  # id of the newest
        self.message = ""  # what the client said last

    def save(self) -> None:
        with contextlib.suppress(OSError):  # a full disk
            write_json(NIGHT, asdict(self.night))

    def check(self) -> str:
        """Log what was recorded meanwhile; why the loop has ended, as the hooks see it, '' while it goes on."""
        if self.stops:
            self.night.stop = "the person said night stop"
            self.save()
        with contextlib.suppress(Exception):  # a mistake in program.md, most often: the agent is told
            self.history = History.load()
        for r in self.history.own(self.history.records):
            if r.number > self.logged:
                text, value = " — ".join(filter(None, [r.hypothesis, r.reason])), display.shown_value(self.history, r)
                log_line(f"#{r.number:<4} {r.verdict:<10} {value:>7} {r.change.split(' (')[0]:>9}  {text}")
        self.logged = self.history.newest
        whole = Session()
        whole.start(self.night, self.logged)
        return self.night.stop or whole.reason_to_end(self.history)

    def keep(self) -> int:
        """Conversations until there is a reason to end; the exit status."""
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stops", self.stops + 1))
        self.night.pid = os.getpid()
        log_line(f"A night, until {self.night.clock or 'the plan ends'}; phase {self.history.phase_line()}")
        fruitless, wait, in_vain = 0, FIRST_WAIT, ""
        while not (why := self.check()) and not in_vain:
            before, fault = self.logged, self.run_client()
            ended = self.check()
            if progressed(self.history, before):
                fruitless, wait = 0, FIRST_WAIT
            elif not fault:
                fruitless += 1
            if fruitless == FRUITLESS:
                in_vain = f"{fruitless} conversations in a row brought no experiment; the last said: {self.message}"
            elif SIGN_IN in fault and self.night.conversations == 1:
                in_vain = f"{fault}: start claude once and sign in"
            elif not ended:
                log_line(f"{fault or f'the conversation has ended: {self.message}'}; again in {wait} s")
                if wait == LONGEST_WAIT:
                    notify.tell(f"{notify.NOTHING_RUNS}: {fault or self.message}")
                until, wait = time.monotonic() + wait, min(2 * wait, LONGEST_WAIT)
                while (time.monotonic() < until or locks.running()) and not self.check():
                    time.sleep(POLL)
        while self.experiment() and self.stops < 2:  # its client was killed
            time.sleep(POLL)
        self.end_experiment()
        end_chain()
        self.check()
        self.log_summary(why or in_vain)
        self.night.status = 0 if why else 1
        self.save()
        return self.night.status

    def experiment(self) -> locks.Running | None:
        """The night's own that runs now: a person's audit is none of its business."""
        now = locks.running()
        return now if now and self.conversation and now.conversation == self.conversation else None

    def end_experiment(self) -> None:
        if now := self.experiment():
            end_process(now.pid, self.experiment)

    def run_client(self) -> str:
        """One conversation to its end; what went wrong in it, '' when nothing did."""
        self.night.conversations += 1
        self.conversation = str(uuid.uuid4())
        self.save()
        log_line(f"Claude Code starts, conversation {self.night.conversations}, version {client_version()}")
        command, limit = [*CLIENT, self.conversation], self.history.program.stop.usd
        if limit is not None:
            command += ["--max-budget-usd", f"{limit - self.night.usd:.6f}"]
        try:
            with OUTPUT.open("wb") as out:
                client = Popen(
                    command, cwd=ROOT, env=ENV, stdin=DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
        except OSError as e:
            return f"the client cannot be started: {e}"
        if fault := self.watch(client):
            self.end_experiment()
            end_process(-client.pid, lambda: client.poll() is None)
        return self.conclude(client.wait(), fault)

    def watch(self, client: Popen) -> str:
        """Wait for its end; why it must be ended, '' when it did so by itself."""
        newest, since = self.logged, time.monotonic()  # the newest experiment, and when one was last seen
        while client.poll() is None:
            time.sleep(POLL)
            self.check()
            if self.stops > 1:
                return "the client was ended at once"
            if locks.running() or self.logged > newest:
                newest, since = self.logged, time.monotonic()
            if time.monotonic() > since + BARREN:
                return "no experiment from the client for long, so it was ended"
        return ""

    def conclude(self, code: int, fault: str) -> str:
        """Add up what a conversation used; what went wrong in it."""
        session = Session.load(self.conversation)
        last_line = (OUTPUT.read_text(errors="replace").strip().splitlines() or [""])[-1]
        try:
            result = dict(json.loads(last_line))
        except (ValueError, TypeError):  # a complaint, or nothing
            result = {"is_error": True, "result": last_line}
        words = str(result.get("result") or result.get("errors") or "it said nothing").split()
        self.message = visible(" ".join(words).split(". ")[0])[:150]
        self.night.tokens += session.tokens()
        self.night.usd += result.get("total_cost_usd") or 0
        session.note_cost(result.get("total_cost_usd") or 0)
        self.night.cost_unknown += "total_cost_usd" not in result
        self.save()
        in_order = code == 0 and not result.get("is_error") and not session.on  # switched off by its Stop hook
        if fault or in_order:
            return fault
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"the client {how}: {self.message}"

    def log_summary(self, why: str) -> None:
        night, history = self.night, self.history
        verdicts = [r.verdict for r in history.tried_here if r.number > night.after]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in JUDGED)
        log_line(f"{len(verdicts)} experiments: {counts}; {history.program.metric} {history.best_line()}")
        unknown = f", and what {night.cost_unknown} cost that did not tell" if night.cost_unknown else ""
        log_line(f"{night.conversations} conversations, {night.tokens:,} tokens, {night.usd:.2f} USD{unknown}")
        drawn = run([ROOT / "run.sh", "report"], stdin=DEVNULL, capture_output=True, text=True)
        log_line("report.html shows it" if drawn.returncode == 0 else f"no report: {drawn.stderr.strip()[-200:]}")
        log_line(f"The night has ended: {why}")
        notify.tell(f"the night has ended: {why}; {history.program.metric} {history.best_line()}")


def begin(clock: str) -> int:
    """Start the keeper and follow it; the exit status, in both processes. Raises Refused."""
    if not shutil.which("claude"):
        raise Refused("claude is not in PATH; install Claude Code, or add its folder to PATH")
    RUNS.mkdir(exist_ok=True)
    with NIGHT_LOCK.open("a") as lock, LOG.open("ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused("another night has just begun here; ./run.sh night shows it") from None
        keeper = Keeper(Night.now(after=History.load().newest, clock=clock, log=log.tell()))
        if why := keeper.check():
            raise Refused(f"there is nothing to do: {why}")
        if NIGHT.exists() and load(Night, NIGHT).status is None:
            print("The last night was cut off (the machine went down, or its keeper was killed).")
        keeper.save()
        print(f"A night begins. {HINT}", flush=True)
        if not os.fork():
            leave_terminal(log.fileno())
            return keeper.keep()
    return follow(keeper.night.log)


def leave_terminal(log: int) -> None:
    """Put this process into a session of its own, which no terminal can end; what it says goes to the log."""
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)


def follow(start: int) -> int:
    """Show the log from byte `start` on, until the night ends; its exit status."""
    goes_on = True
    try:
        with LOG.open("rb") as log:
            log.seek(start)
            while goes_on:
                time.sleep(1)
                goes_on = bool(current_night())
                print(log.read().decode("utf-8", "replace"), end="", flush=True)
    except KeyboardInterrupt:
        print("\nThe night goes on. ./run.sh night shows it again, ./run.sh night stop ends it.")
        return 0
    status = load(Night, NIGHT).status
    if status is None:
        print("The night was cut off: its keeper is gone. What was recorded is safe; ./run.sh night begins another.")
        return 1
    return status


def main(word: str = "", *more: str) -> int:
    """Begin, follow or stop a night; the exit status. Raises Refused."""
    if more or word not in ("", "stop") and not re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", word):
        raise Refused("usage: ./run.sh night [HH:MM], or ./run.sh night stop")
    night = current_night()
    if word == "stop":
        if not night or not night.pid:
            raise Refused("no night is under way here")
        os.kill(night.pid, signal.SIGTERM)
        print("No new experiment begins. ./run.sh night shows the end; a second ./run.sh night stop ends it at once.")
        return 0
    if not night:
        return begin(word)
    began, until = time.strftime("%H:%M", time.localtime(night.began)), night.clock or "the plan ends"
    print(f"A night is under way here since {began}, until {until}.\n{HINT}")
    return follow(night.log)
