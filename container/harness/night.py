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
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from subprocess import DEVNULL, Popen, SubprocessError, run

import display
import locks
from history import History
from project import ROOT, RUNS, Refused, visible, write_json
from record import JUDGED
from session import NIGHT, NIGHT_LOCK, Night, Session, current_night, load, progressed, seconds_up

LOG, OUTPUT = RUNS / "night.log", RUNS / "night.out"  # OUTPUT: the client's, which says how the conversation ended
FIRST_WAIT = 10  # s until the client is started again; doubled after each conversation without an experiment
LONGEST_WAIT = 15 * 60  # s
SILENT = 30 * 60  # s without a message or a running experiment, after which the client is ended
LATE = 5 * 60  # s, the same once the loop has ended
BARREN = 3 * 3600  # s without an experiment, after which the client is ended
FRUITLESS = 10  # conversations in a row that ended in order but brought no experiment: then the night gives up
DYING = 60  # s that an experiment gets to clean up, and then the client
POLL = 3  # s
CLIENT = ("setpriv", "--pdeathsig", "TERM", "claude", "-p", "start", "--output-format", "json", "--session-id")
ENV = {
    **os.environ,
    "DISABLE_AUTOUPDATER": "1",
}  # else the next conversation may be with a client that nobody has tried
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


def end_experiment() -> None:
    if now := locks.running():
        end_process(now.pid, locks.running)


@dataclass
class Watchdog:
    """When the client last did what it should; time.monotonic()."""

    last_message: float = field(default_factory=time.monotonic)
    last_experiment: float = field(default_factory=time.monotonic)
    size: int = 0  # bytes of its transcripts
    newest: int = 0  # experiment

    def fault(self, session: Session, newest: int, loop_ended: bool) -> str:
        """Why the client must be ended, '' while it need not be."""
        now, size = time.monotonic(), sum(file.stat().st_size for file in session.transcripts())
        if locks.running() or newest > self.newest:
            self.last_message, self.last_experiment, self.newest = now, now, newest
        elif size > self.size:
            self.last_message, self.size = now, size
        if now > self.last_experiment + BARREN:
            return "no experiment from the client for long, so it was ended"
        late = now > self.last_message + (LATE if loop_ended else SILENT)
        return "no word from the client for long, so it was ended" if late else ""


class Keeper:
    """Starts conversations while the loop goes on."""

    def __init__(self, night: Night):
        self.night, self.history, self.logged, self.stops = night, History.load(), night.after, 0
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
        fruitless, wait = 0, FIRST_WAIT
        while not (why := self.check()) and fruitless < FRUITLESS:
            before, fault = self.logged, self.run_client()
            ended = self.check()
            if progressed(self.history, before):
                fruitless, wait = 0, FIRST_WAIT
            elif not fault:
                fruitless += 1
            if not ended and fruitless < FRUITLESS:
                log_line(f"{fault or f'the conversation has ended: {self.message}'}; again in {wait} s")
                until, wait = time.monotonic() + wait, min(2 * wait, LONGEST_WAIT)
                while (time.monotonic() < until or locks.running()) and not self.check():
                    time.sleep(POLL)
        while locks.running() and self.stops < 2:  # an experiment whose client was killed
            time.sleep(POLL)
        end_experiment()
        self.check()
        in_vain = f"{fruitless} conversations in a row brought no experiment; the last said: {self.message}"
        self.log_summary(why or in_vain)
        self.night.status = 0 if why else 1
        self.save()
        return self.night.status

    def run_client(self) -> str:
        """One conversation to its end; what went wrong in it, '' when nothing did."""
        self.night.conversations += 1
        self.save()
        log_line(f"Claude Code starts, conversation {self.night.conversations}, version {client_version()}")
        ident, watchdog, fault = str(uuid.uuid4()), Watchdog(newest=self.logged), ""
        command, limit = [*CLIENT, ident], self.history.program.stop.usd
        if limit is not None:
            command += ["--max-budget-usd", f"{limit - self.night.usd:.6f}"]
        try:
            with OUTPUT.open("wb") as out:
                client = Popen(
                    command, cwd=ROOT, env=ENV, stdin=DEVNULL, stdout=out, stderr=out, start_new_session=True
                )
        except OSError as e:
            return f"the client cannot be started: {e}"
        while client.poll() is None and not fault:
            time.sleep(POLL)
            ended = bool(self.check())
            fault = watchdog.fault(Session.load(ident), self.logged, ended)
            fault = "the client was ended at once" if self.stops > 1 else fault
        if fault:
            end_experiment()
            end_process(-client.pid, lambda: client.poll() is None)
        return self.conclude(Session.load(ident), client.wait(), fault)

    def conclude(self, session: Session, code: int, fault: str) -> str:
        """Add up what a conversation used; what went wrong in it."""
        last_line = (OUTPUT.read_text(errors="replace").strip().splitlines() or [""])[-1]
        try:
            result = dict(json.loads(last_line))
        except (ValueError, TypeError):  # a complaint, or nothing
            result = {"is_error": True, "result": last_line}
        words = str(result.get("result") or result.get("errors") or "it said nothing").split()
        self.message = visible(" ".join(words).split(". ")[0])[:150]
        self.night.tokens += session.tokens()
        self.night.usd += result.get("total_cost_usd") or 0
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


def begin(clock: str) -> int:
    """Start the keeper, in a session of its own that no terminal can end, and follow it. Raises Refused."""
    if not shutil.which("claude"):
        raise Refused("claude is not in PATH; install Claude Code, or add its folder to PATH")
    RUNS.mkdir(exist_ok=True)
    with NIGHT_LOCK.open("a") as lock, LOG.open("ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused("another night has just begun here; ./run.sh night shows it") from None
        now = {"since": time.time(), "up": seconds_up()}
        keeper = Keeper(Night(**now, after=History.load().newest, clock=clock, log=log.tell()))
        if why := keeper.check():
            raise Refused(f"there is nothing to do: {why}")
        if NIGHT.exists() and load(Night, NIGHT).status is None:
            print("The last night was cut off (the machine went down, or its keeper was killed).")
        keeper.save()
        print(f"A night begins. {HINT}", flush=True)
        command = ["setsid", "--fork", sys.executable, "-I", "-X", "utf8", ROOT / "container/harness", "night", "keep"]
        run(command, stdin=DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()])
    return follow(keeper.night.log)


def follow(start: int) -> int:
    """Show the log from byte `start` on, until the night ends; its exit status."""
    try:
        with LOG.open("rb") as log:
            log.seek(start)
            while current_night():
                print(log.read().decode("utf-8", "replace"), end="", flush=True)
                time.sleep(1)
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
    night = current_night()
    if word == "keep" and night and not night.pid:  # from begin(), whose lock this process has
        return Keeper(night).keep()
    if more or word not in ("", "stop") and not re.fullmatch(r"([01]?\d|2[0-3]):[0-5]\d", word):
        raise Refused("usage: ./run.sh night [HH:MM], or ./run.sh night stop")
    if word == "stop":
        if not night or not night.pid:
            raise Refused("no night is under way here")
        os.kill(night.pid, signal.SIGTERM)
        print("No new experiment begins. ./run.sh night shows the end; a second ./run.sh night stop ends it at once.")
        return 0
    if not night:
        return begin(word)
    began, until = time.strftime("%H:%M", time.localtime(night.since)), night.clock or "the plan ends"
    print(f"A night is under way here since {began}, until {until}.\n{HINT}")
    return follow(night.log)
