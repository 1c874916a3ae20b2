"""A container while it runs: its lifeline, the messages and bytes that it sends, its log, and why it ended.

Why a sandbox ended is not always certain. Where PID 1 inside (stage.py) sent no status, it was killed, or its engine
failed. We blame train.py only where memory may have run out: else it is Lost, and the same idea may be tried again.
train.py could fake that, and gains nothing by it: neither is kept.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import engine
import locks
from project import Broken, say

QUEUE_LIMIT_S = 23 * 3600  # until a launch command has found a node; Claude Code waits 24 hours for ./run.sh
IMPORT_S = 120  # until a sandbox has imported torch
NOTICE_S = 10  # after which a person is told that we wait for that
END_LIMIT_S = 120  # until a sandbox that has sent everything has ended
TERMINATE_S = 5  # until one elsewhere, whose lifeline was cut, has ended
BEAT, BEAT_S = b"%020d", 5  # content of the lifeline, always as long, and the seconds from one change to the next
STILL_S = 45  # without a change, after which a sandbox that is gone may have ended itself
LIFELINE_LOST = 75  # exit status of a sandbox that saw no change for a minute (stage.py)
KILLED = 128 + signal.SIGKILL  # likewise of one that was killed
ENGINE_FAILED = (125, 126, 127, 255)  # of a client whose engine failed meanwhile; PID 1 ends with 0 or 1
MESSAGE_BYTES = 4096  # of one JSON line
ERROR_BYTES = 64 << 10  # the end of standard error, in which Slurm's messages are looked for
CHUNK = 1 << 20  # bytes copied at once
LOG_HEAD, LOG_TAIL = 256 << 10, 256 << 10  # bytes of the log kept from either end
SLURM = (
    ("DUE TO TIME LIMIT", "Slurm: time limit"),
    ("(?i)node failure", "Slurm: node failure"),
    ("DUE TO PREEMPTION", "Slurm: preempted"),
    ("CANCELLED AT|Force Terminated", "Slurm cancelled the job"),
)
NOT_YOURS = "not the edit's fault; the same idea may be tried again"


class Failed(Exception):
    """The attempt failed; the message is its reason, one line."""


class Lost(Exception):
    """The same, for a reason that is not train.py's: what the machine or a scheduler did. It counts for nothing."""


@contextlib.contextmanager
def when_late(limit_s: float, action: Callable, *arguments) -> Iterator[None]:
    """Do something, in a thread, if the block takes longer than that."""
    timer = threading.Timer(limit_s, action, arguments)
    timer.daemon = True  # a signal may end us before it is cancelled
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Sandbox:
    """A started container: JSON lines and raw bytes on its standard output, its log on standard error.

    Its lifeline is a file that we change every few seconds. PID 1 ends the sandbox when that stops or the file is gone,
    wherever it runs and whatever became of us, the launch command and the engine's client.
    """

    def __init__(self, container: engine.Container, log: Log | None = None):
        self.container, self.stage = container, container.name.rpartition("-")[2]
        self.log = log or Log(Path(os.devnull))
        self.beat = container.folder / "alive" / self.stage / "beat"
        self.beat.parent.mkdir(parents=True, exist_ok=True)
        self.beat.write_bytes(BEAT % 0)
        argv = engine.arguments(replace(container, mounts={**container.mounts, "/harness/alive": self.beat.parent}))
        # in its folder: when memory runs out, podman leaves a file "oom" where it was started; and it keeps the lock of
        # the device, the one file here that is inheritable, as long as it lives
        where = {"cwd": container.folder, "close_fds": False}
        self.process = subprocess.Popen(argv, stdin=PIPE, stdout=PIPE, stderr=PIPE, **where)
        self.killed, self.ready, self.last_error = False, False, b""
        self.last_beat, self.longest_silence = time.monotonic(), 0.0
        threading.Thread(target=self._beat, daemon=True).start()
        self.log_reader = threading.Thread(target=self._read_log, daemon=True)
        self.log_reader.start()

    def _read_log(self) -> None:
        while chunk := self.process.stderr.read1(ERROR_BYTES):
            self.last_error = (self.last_error + chunk)[-ERROR_BYTES:]
            with contextlib.suppress(ValueError, OSError):  # closed: nobody's; disk full: train.py need not wait
                self.log.write(chunk)

    def _beat(self) -> None:
        for n in itertools.count(1):
            self.longest_silence = max(self.longest_silence, time.monotonic() - self.last_beat)
            self.last_beat = time.monotonic()
            try:
                with self.beat.open("r+b") as f:  # in place: a full disk is no end, and what is gone is not made again
                    f.write(BEAT % n)
            except FileNotFoundError:
                return
            except OSError:
                pass  # of a server that is away for a while
            time.sleep(BEAT_S)

    def wait_until_ready(self) -> dict:
        """Wait for two messages: it is up, for which a launch command may queue, and it has imported what it needs.

        Returns the second. Raises Refused when the engine starts nothing, and Lost when a launch command does not.
        """
        if launch := " ".join(self.container.launch):
            with when_late(NOTICE_S, say, f"run.sh: waiting for '{launch}' to start {self.stage}"):
                up = self.message(QUEUE_LIMIT_S)
        else:
            up = self.message(IMPORT_S)
        if up and (ready := self.message(IMPORT_S)):
            self.ready = True
            return ready
        error = " | ".join(self.last_error[-300:].decode("utf-8", "replace").strip().splitlines())
        error = f"the sandbox of {self.stage} did not start: {error or 'no message in time'}"
        if launch:
            raise Lost(error)
        raise Broken(f"{engine.name()}: {error}; nothing is recorded, and ./run.sh doctor says more")

    def message(self, limit_s: float) -> dict:
        """The next JSON line; {} when it ended, sent nothing in time, or something else. Raises Lost."""
        with when_late(limit_s, self.kill), contextlib.suppress(ValueError):
            found = json.loads(self.process.stdout.readline(MESSAGE_BYTES))
            if found and isinstance(found, dict):
                return found
        self.raise_if_lost()
        return {}

    def copy_to(self, target: Path, most: int, limit_s: float, size: int = sys.maxsize) -> None:
        """Copy `size` bytes, or all. Raises Failed beyond `most` bytes or limit_s, and Lost when it is cut short."""
        copied = 0
        with when_late(limit_s, self.kill), target.open("wb") as file:
            while copied < size and (chunk := self.process.stdout.read1(min(CHUNK, size - copied))):
                copied += len(chunk)
                if copied > most:
                    self.kill()
                    raise Failed(f"invalid output: more than {most >> 20} MiB")
                file.write(chunk)
            status = 0 if copied == size else self.process.wait()
        if self.killed:
            raise Failed(f"invalid output: {self.stage} did not hand it over in {limit_s} s")
        if status:
            self.raise_if_lost()
            raise Failed(f"the sandbox of {self.stage} was killed from outside before it had handed everything over")

    def send(self, file: Path | None = None) -> None:
        """Feed a file to its standard input and close that. A container that has ended is noticed later."""
        with contextlib.suppress(BrokenPipeError):
            if file:
                with file.open("rb") as f:
                    shutil.copyfileobj(f, self.process.stdin, CHUNK)
            self.process.stdin.close()

    def kill(self) -> None:
        self.killed = True
        with contextlib.suppress(OSError):
            self.beat.unlink()
        if self.container.launch:
            for stop in (self.process.terminate, self.process.kill):  # of the first, srun takes a job out of the queue
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(TERMINATE_S)
                stop()
        else:
            engine.kill(self.container.name)
            self.process.kill()

    def raise_if_lost(self) -> None:
        """Wait for the end of a sandbox that sent no status, and classify it."""
        self.wait()
        if self.killed:
            return
        status, cause = self.process.returncode, ""
        if self.container.launch and status == -signal.SIGKILL:
            cause = "the launch command was killed"
        # or: the client may have been stopped as we were, and then does not know the status
        elif status == LIFELINE_LOST or max(self.longest_silence, time.monotonic() - self.last_beat) > STILL_S:
            cause = "run.sh stood still, or its files were out of reach, for a minute"
        elif self.container.launch:
            errors = re.findall(r"^(?:srun|slurmstepd\S*): .*", self.last_error.decode("utf-8", "replace"), re.M)
            cause = next((reason for pattern, reason in SLURM if re.search(pattern, "\n".join(errors))), "")
        if not cause and self.ready:  # else whoever waits for it tells what the engine says
            cause = self.ended_by_others(status)
        if cause:
            raise Lost(f"{cause}: {NOT_YOURS}")

    def ended_by_others(self, status: int) -> str:
        """What the engine did to a sandbox that was ready, or somebody; '' where its memory may have run out."""
        if status < 0 or status in ENGINE_FAILED:
            return f"{engine.name()} failed (its client ended with {status})"
        knows_oom = engine.name() == "podman" and not self.container.launch
        if status == KILLED and knows_oom and not (self.container.folder / "oom").exists():
            return "the sandbox was killed from outside"
        return ""

    def wait(self) -> None:
        """Until it has ended and its log is complete."""
        with when_late(END_LIMIT_S, self.kill):
            self.process.wait()
        self.log_reader.join(5)
        self.log.close()


class Log:
    """A file that keeps the beginning and the end of what it gets, without invisible characters: the agent reads it."""

    def __init__(self, path: Path):
        self.file = path.open("ab", buffering=0)
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.size, self.tail = 0, b""  # bytes so far; the last of those that went beyond LOG_HEAD
        self.steps: list[
            tuple[float, int]
        ] = []  # of this loop: when its first and its last one were told of, and which

    def write(self, data: bytes) -> None:
        text = self.decode(data).replace("\r", "\n")
        data = re.sub(r"[^\n\t -~]+", lambda odd: "".join(filter(str.isprintable, odd[0])), text).encode()
        for step in (int(claim[0]) for claim in locks.STEP.findall(data)):
            goes_on = self.steps and step > self.steps[-1][1]  # else a second loop begins
            self.steps = [*(self.steps[:1] if goes_on else []), (time.monotonic(), step)]
        room = max(0, LOG_HEAD - self.size)
        self.size += len(data)
        self.file.write(data[:room])
        self.tail = (self.tail + data[room:])[-LOG_TAIL:]

    @property
    def step_ms(self) -> float:
        """Milliseconds of a step, by when train.py told of them; 0.0 when it did not."""
        if len(self.steps) < 2:
            return 0.0
        (began, first), (ended, last) = self.steps
        return round(1000 * (ended - began) / (last - first), 1)

    def close(self) -> None:
        """Write the end; may be called again."""
        if not self.file.closed:
            left_out = self.size - LOG_HEAD - len(self.tail)
            self.file.write(b"\n[... %d bytes left out ...]\n" % left_out if left_out > 0 else b"")
            self.file.write(self.tail)
            self.file.close()
