#!/usr/bin/env python3
"""One run of one train.py: train, embed both sides, judge. Host side, standard library only.

usage: experiment.py WORK DATA BUDGET_S MEMORY SEED LOG IMAGE

WORK holds the snapshot train.py (world-readable) and receives result.json, ranks.npy and examples.npy. What the
sandboxes send is untrusted: it is capped, never opened here, and passed on to the next sandbox; only the judge's
answer is read.
result.json: {"outcome": "ok" | "failed", "reason": "...", "metrics": {...}, "train": {...}, "seed": n, "timing": {...}}
"""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import io
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
from pathlib import Path

sys.dont_write_bytecode = True
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import engine  # noqa: E402

GRACE_S = 5  # between the budget, at which PID 1 inside kills, and the kill from outside
QUEUE_LIMIT_S = 23 * 3600  # until a launch command has found a node; Claude Code waits 24 hours for ./run.sh
NOTICE_S = 10  # after which it is said that we wait for that
IMPORT_LIMIT_S = 120  # until a sandbox has imported torch
END_S = 5  # until a sandbox elsewhere, told to end, has done so
BEAT, BEAT_S = b"%020d", 5  # sign of life to a sandbox, always as long, and the seconds from one to the next
STILL_S = 45  # without one, after which a sandbox that is gone may have ended itself
ENGINE_FAILED = 125  # exit status of podman and docker when they could not start a container
LOST = 75  # exit status of a sandbox that saw none for LIFELINE_S (stage.py)
PROBE_LIMIT_S = 60  # load and encode a few training rows, where embedding failed
EMBED_LIMIT_S = 120  # load and encode one side; no longer than training left of its budget, since `load` could train on
EMBED_LEAST_S = 30  # but so long at least
JUDGE_LIMIT_S = 120
JUDGE_MEMORY = "4g"
OUT_SIZE = "2g"  # tmpfs for what training leaves, within the memory limit
OUT_MAX = 2 << 30  # bytes of archive that leave the sandbox
ARRAY_MAX = 512 << 20  # bytes of one side's embeddings
LINE_MAX = 4096  # bytes of a JSON line from a sandbox
PR_SET_PDEATHSIG = 1
LAST_WORDS = 64 << 10  # bytes of standard error in which Slurm's words are looked for
SLURM = (
    ("DUE TO TIME LIMIT", "Slurm: time limit"),
    ("(?i)node failure", "Slurm: node failure"),
    ("DUE TO PREEMPTION", "Slurm: preempted"),
    ("CANCELLED AT|Force Terminated", "Slurm cancelled the job"),
)
NOT_YOURS = "not the edit's fault; the same idea may be tried again"
MOST_EXCEPTION = 120  # characters of one in the reason of a failure
LOG_HEAD, LOG_TAIL = 256 << 10, 256 << 10  # bytes of the log kept from either end


class Failed(Exception):
    """The attempt failed; the message is its reason, one line. `end` is what PID 1 said of the training, if it did."""

    def __init__(self, reason: str, end: dict | None = None):
        super().__init__(reason)
        self.end = end or {}


class Lost(Failed):
    """A sandbox did not start, or ended, for a reason that is not train.py's."""


class Sandbox:
    """A started container: JSON lines and raw bytes on its standard output, its log on standard error.

    Its lifeline is a file that we change every few seconds. PID 1 ends the sandbox when that stops or the file goes,
    wherever it runs and whatever became of us, the launch command and the engine's client.
    """

    started: list[Sandbox] = []

    def __init__(
        self, stage: str, image: str, command: list[str], work: Path, log: Log | None = None, *, mounts: dict, **limits
    ):
        # elsewhere, sandboxes of other machines may have our process id
        self.name = f"ar-{os.getpid()}{time.time_ns() if engine.launch() else ''}-{stage}"
        self.beat = work / "alive" / stage / "beat"
        self.beat.parent.mkdir(parents=True, exist_ok=True)
        self.beat.write_bytes(BEAT % 0)
        mounts = {**mounts, "/harness/alive": self.beat.parent}
        argv = engine.sandbox(self.name, image, command, mounts=mounts, folder=work, **limits)
        # in work: when memory runs out, podman leaves a file "oom" in the folder that it was started in
        self.process = subprocess.Popen(
            argv, cwd=work, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.killed, self.log, self.last = False, log, b""
        self.beaten, self.silent = time.monotonic(), 0.0  # when it last saw us alive, and how long it once did not
        self.started.append(self)
        threading.Thread(target=self._beat, daemon=True).start()
        self.drain = threading.Thread(target=self._read_log, args=(log,), daemon=True)
        self.drain.start()

    def _read_log(self, log: Log | None) -> None:
        while chunk := self.process.stderr.read1(1 << 16):
            self.last = (self.last + chunk)[-LAST_WORDS:]
            if log:
                with contextlib.suppress(ValueError, OSError):  # closed: nobody's; disk full: train.py need not wait
                    log.write(chunk)

    def _beat(self) -> None:
        for n in itertools.count(1):
            self.silent = max(self.silent, time.monotonic() - self.beaten)
            self.beaten = time.monotonic()
            try:
                with self.beat.open("r+b") as f:  # in place: a full disk is no end, and what is gone is not made again
                    f.write(BEAT % n)
            except FileNotFoundError:
                return
            except OSError:
                pass  # of a server that is away for a while
            time.sleep(BEAT_S)

    def end(self) -> None:
        """Cut the lifeline."""
        with contextlib.suppress(OSError):
            self.beat.unlink()

    def ready(self) -> dict:
        """What PID 1 says when it has imported torch; a launch command may queue for long. Raises Lost, EngineError."""
        launch, stage = " ".join(engine.launch()), self.name.rpartition("-")[2]
        notice = threading.Timer(NOTICE_S, engine.say, [f"run.sh: waiting for '{launch}' to start {stage}"])
        notice.daemon = True
        try:
            if launch:
                notice.start()
            ready = self.line(QUEUE_LIMIT_S if launch else IMPORT_LIMIT_S) and self.line(IMPORT_LIMIT_S)
        finally:
            notice.cancel()
        if not ready:
            self.wait()
            said = " | ".join(self.last[-300:].decode("utf-8", "replace").strip().splitlines())
            if self.process.returncode == ENGINE_FAILED:  # also with the next edit, and all night
                raise engine.EngineError(f"{engine.name()} could not start the sandbox of {stage}: {said}")
            raise Lost(f"the sandbox of {stage} did not start: {said or 'no word in time'}")
        return ready

    def line(self, limit_s: float) -> dict:
        """The next JSON line, {} when the container ended, said nothing in time, or said something else."""
        with self.killed_after(limit_s):
            try:
                found = json.loads(self.process.stdout.readline(LINE_MAX))
                return found if isinstance(found, dict) else {}
            except ValueError:
                return {}

    def copy_to(self, target, most: int, limit_s: float) -> None:
        """Copy the rest of its output to a file object. Raises Failed beyond `most` bytes or limit_s, or cut short."""
        size = 0
        with self.killed_after(limit_s):
            while chunk := self.process.stdout.read1(1 << 20):
                size += len(chunk)
                if size > most:
                    self.kill()
                    raise Failed(f"invalid output: more than {most >> 20} MiB")
                target.write(chunk)
            status = self.process.wait()
        stage = self.name.rpartition("-")[2]
        if self.killed:
            raise Failed(f"invalid output: {stage} did not hand it over in {limit_s} s")
        if status:
            self.wait()
            self.check_lost()
            raise Failed(f"the sandbox of {stage} was killed from outside before it had handed everything over")

    def send(self, source: Path | None) -> None:
        """Feed a file to its standard input and close that. A container that has ended is noticed later."""
        with contextlib.suppress(BrokenPipeError):
            if source:
                with source.open("rb") as f:
                    while chunk := f.read(1 << 20):
                        self.process.stdin.write(chunk)
            self.process.stdin.close()

    @contextlib.contextmanager
    def killed_after(self, limit_s: float):
        timer = threading.Timer(limit_s, self.kill)
        timer.daemon = True  # a signal may end us before it is cancelled
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def kill(self) -> None:
        self.killed = True
        self.end()
        if engine.launch():
            for stop in (self.process.terminate, self.process.kill):  # of the first, srun takes a job out of the queue
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(END_S)
                stop()
        else:
            engine.kill(self.name)
            self.process.kill()

    def check_lost(self) -> None:
        """Of a sandbox that ended without PID 1's word. Raises Lost where it shows why.

        train.py may have written these words: then they name its end, which is a failure all the same.
        """
        said = "\n".join(re.findall(r"^(?:srun|slurmstepd\S*): .*", self.last.decode("utf-8", "replace"), re.M))
        why = next((reason for words, reason in SLURM if re.search(words, said)), "") if engine.launch() else ""
        if engine.launch() and self.process.poll() == -signal.SIGKILL:
            why = "the launch command was killed"
        # a client that was stopped with us does not know the status
        elif self.process.poll() == LOST or max(self.silent, time.monotonic() - self.beaten) > STILL_S:
            why = "run.sh stood still, or its files were out of reach, for a minute"
        if why and not self.killed:
            raise Lost(f"{why}: {NOT_YOURS}")

    def wait(self) -> None:
        """Until it has ended and its log is complete."""
        with self.killed_after(EMBED_LIMIT_S):
            self.process.wait()
        self.drain.join(5)
        if self.log:
            self.log.close()


class Log:
    """A file that keeps the beginning and the end of what it gets, without invisible characters: the agent reads it."""

    DROP = dict.fromkeys((*range(9), *range(11, 32), 127))

    def __init__(self, path: Path):
        self.file = path.open("ab", buffering=0)
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.room, self.tail, self.dropped = LOG_HEAD, b"", 0

    def write(self, data: bytes) -> None:
        text = self.decode(data).replace("\r", "\n")
        if text.isascii():  # a flood is
            data = text.translate(self.DROP).encode()
        else:
            data = "".join(c for c in text if c in "\n\t" or c.isprintable()).encode()
        head, rest = data[: self.room], data[self.room :]
        self.file.write(head)
        self.room -= len(head)
        self.tail += rest
        if len(self.tail) > 2 * LOG_TAIL:
            self.dropped += len(self.tail) - LOG_TAIL
            self.tail = self.tail[-LOG_TAIL:]

    def close(self) -> None:
        """Write the end; may be called again."""
        if not self.file.closed:
            left_out = self.dropped + max(0, len(self.tail) - LOG_TAIL)
            self.file.write(b"\n[... %d bytes left out ...]\n" % left_out if left_out else b"")
            self.file.write(self.tail[-LOG_TAIL:])
            self.file.close()


def last_step(log: Path) -> str:
    """train.py's own progress, for the reason of a failure: '143 of 300 steps', or '' when it printed none."""
    found = re.findall(rb"^step (\d{1,9})/(\d{1,9})\b", log.read_bytes(), re.M)
    return f"{int(found[-1][0])} of {int(found[-1][1])} steps" if found else ""


def last_exception(log: Path) -> str:
    """': ValueError: ...', where that is the last line that train.py printed, else ''."""
    line = log.read_bytes()[-LINE_MAX:].decode("utf-8", "replace").rstrip().rpartition("\n")[2]
    return f": {line[:MOST_EXCEPTION]}" if re.match(r"[\w.]*(Error|Exception)\b", line) else ""


def claims(log: Path) -> dict:
    """`key: value` lines after the last `---` that train.py printed: shown as its own claims, never used to decide."""
    text = log.read_bytes().decode("utf-8", "replace")
    lines = text.rpartition("\n---\n")[2].splitlines() if "\n---\n" in text else []
    pairs = (re.fullmatch(r"([a-z_]{1,20}):\s*([\w.,%+>/ -]{1,60})", line.strip()) for line in lines[-20:])
    return {m[1]: m[2].strip() for m in pairs if m}


def why_training_ended(end: dict, sandbox: Sandbox, budget: int, memory: str, log: Path) -> str:
    """The reason of a training that did not end well, in one line."""
    steps = last_step(log)
    after = (f" after {end['seconds']} s" if end else "") + (f", {steps}" if steps else "")
    status = end.get("status")
    if status == "limit" or (not end and sandbox.killed):
        return f"time limit: killed at the budget of {budget} s, {steps or 'before its first step line'}"
    if status == "killed" and end.get("oom"):
        return f"out of memory: more than {memory} of main memory{after}"
    if not end:
        return f"the sandbox was killed from outside, or ran out of its {memory} of memory{after}"
    if b"OutOfMemoryError" in log.read_bytes()[-20000:]:
        return f"out of memory on the GPU{after}"
    if status == "killed":
        return f"killed by its own signal {end.get('signal')}{after}"
    return f"crash{after}" + ("; /out, /tmp or /dev/shm is full" if end.get("full") else last_exception(log))


def train(sandbox: Sandbox, work: Path, budget: int, memory: str, log: Path, on_ready) -> dict:
    """Wait for the training to end; returns what PID 1 said of it. Raises Failed."""
    try:
        ready = sandbox.ready()
    except Lost as e:
        if not engine.launch():
            raise
        raise engine.EngineError(f"{e}; nothing ran") from None
    on_ready(ready)
    end = sandbox.line(budget + GRACE_S)
    if end.get("status") != "ok":
        sandbox.wait()
        if not end:
            sandbox.check_lost()
        raise Failed(why_training_ended(end, sandbox, budget, memory, log), end)
    with (work / "out.tar").open("wb") as f:
        sandbox.copy_to(f, OUT_MAX, EMBED_LIMIT_S)
    sandbox.wait()
    return {**end, "device": ready.get("device", "cpu")}


def embed(sandbox: Sandbox, work: Path, side: str, limit_s: float) -> None:
    """Send what training left, store this side's array. Raises Failed, with no text that train.py could choose."""
    sandbox.ready()
    sandbox.send(work / "out.tar")
    end = sandbox.line(limit_s + GRACE_S)
    if not end:
        sandbox.wait()
        sandbox.check_lost()
    if end.get("status") != "ok":
        end |= {"status": "limit"} if sandbox.killed else {}
        what = {"limit": f"longer than {limit_s:.0f} s", "killed": "out of memory" if end.get("oom") else "killed"}
        error = end.get("error", "Exception") + (f" at line {end['line']} of train.py" if end.get("line") else "")
        raise Failed(f"embedding the validation {side} failed: {what.get(end.get('status'), error)}")
    with (work / f"{side}.npy").open("wb") as f:
        sandbox.copy_to(f, ARRAY_MAX, EMBED_LIMIT_S)


def probe(sandbox: Sandbox, work: Path) -> None:
    """Where embedding failed: does encoding training rows fail too? Then the log has a traceback. Raises Failed."""
    sandbox.ready()
    sandbox.send(work / "out.tar")
    end = sandbox.line(PROBE_LIMIT_S + GRACE_S)
    sandbox.wait()
    if end.get("status") != "ok":
        raise Failed("load: training ended well, but load() or encoding training rows failed (traceback in the log)")


def judge(work: Path, data: Path, image: str, split: str) -> dict:
    """Metrics of the two arrays; stores the ranks and examples. Raises Failed with the judge's reason."""
    for f in ("images.npy", "captions.npy"):
        (work / f).chmod(0o644)
    mounts = {
        "/harness/judge.py": HERE / "judge.py",
        "/key.npy": data / f"{split}.key.npy",
        "/images.npy": work / "images.npy",
        "/captions.npy": work / "captions.npy",
    }
    # it says that it is up, like the others: with a launch command it may have been queued
    command = ["sh", "-c", """echo '{"up": true}'; exec python -I "$@" """, "sh", *mounts]
    sandbox = Sandbox(
        "judge", image, command, work, memory=JUDGE_MEMORY, limit_s=JUDGE_LIMIT_S, gpu=False, mounts=mounts
    )
    sandbox.send(None)
    if not sandbox.line(QUEUE_LIMIT_S if engine.launch() else JUDGE_LIMIT_S):
        raise Lost(f"the sandbox of the judge did not start: {NOT_YOURS}")
    found = sandbox.line(JUDGE_LIMIT_S)
    arrays = io.BytesIO()
    sandbox.copy_to(arrays, ARRAY_MAX, JUDGE_LIMIT_S)
    sandbox.wait()
    if "metrics" not in found:
        raise Failed(f"invalid output: {found.get('invalid', 'the judge did not answer')}")
    (work / "ranks.npy").write_bytes(arrays.getvalue()[: found["bytes"]])
    (work / "examples.npy").write_bytes(arrays.getvalue()[found["bytes"] :])
    return found["metrics"]


def one_run(
    work: Path,
    data: Path,
    budget: int,
    memory: str,
    seed: int,
    log_path: Path,
    image: str,
    *,
    split: str = "val",
    table: str = "train",
    scale: float = 1.0,
) -> dict:
    """Train on a table, embed and judge a split. Returns what result.json holds; containers are gone afterwards.

    scale: how much longer than usual train.py should train. WORK keeps the archive of what training left.
    """
    if not engine.limits_hold():
        engine.say("run.sh: warning: this engine enforces no memory and process limits; see ./run.sh doctor")
    log, started = Log(log_path), time.monotonic()
    stamps, sides, result, end = {}, {}, {"seed": seed}, {}
    common, stage = {"image": image, "memory": memory, "work": work}, ["python", "-Iu", "/harness/stage.py"]
    # one script of ours, not its folder: prints.py there could draw the validation pairs again
    code = {"/code/train.py": work / "train.py", "/harness/stage.py": HERE / "stage.py"}

    def on_ready(ready: dict) -> None:
        """Start the embedding sandboxes now: their imports then happen while training runs."""
        stamps["ready"] = time.monotonic()
        for side in ("images", "captions"):
            sides[side] = Sandbox(
                side,
                command=["nice", *stage, "embed", str(EMBED_LIMIT_S)],
                out_size=OUT_SIZE,
                limit_s=budget + 4 * EMBED_LIMIT_S,
                mounts={**code, "/data": data / split / side},
                **common,
            )

    weights = data.parent / "weights"  # published ones, which ./run.sh data ukiyo-e fetches; others need none
    mounts = {**code, "/data": data / table} | ({"/weights": weights} if weights.is_dir() else {})
    environment = [
        f"BUDGET_S={budget}",
        f"SEED={seed}",
        "DATA=/data",
        "OUT=/out",
        "WEIGHTS=/weights",
        f"SCALE={scale:g}",
    ]
    trainer = Sandbox(
        "train",
        command=["env", *environment, *stage, "train", str(budget)],
        log=log,
        out_size=OUT_SIZE,
        limit_s=budget + IMPORT_LIMIT_S,
        mounts=mounts,
        **common,
    )
    try:
        trainer.send(None)
        end = train(trainer, work, budget, memory, log_path, on_ready)
        stamps["trained"] = time.monotonic()
        left = min(EMBED_LIMIT_S, max(EMBED_LEAST_S, budget - end["seconds"]))
        try:
            for side in sides:  # one has ended before the other gets train.py's model, so they cannot talk
                embed(sides[side], work, side, left)
        except Lost:
            raise
        except Failed:
            sides["probe"] = Sandbox(
                "probe",
                command=[*stage, "probe", str(PROBE_LIMIT_S)],
                log=Log(log_path),
                out_size=OUT_SIZE,
                limit_s=IMPORT_LIMIT_S + PROBE_LIMIT_S,
                mounts=mounts,
                **common,
            )
            probe(sides["probe"], work)
            raise
        stamps["embedded"] = time.monotonic()
        result |= {"outcome": "ok", "metrics": judge(work, data, image, split), "train": end}
    except Failed as e:
        result |= {"outcome": "failed", "reason": str(e), "train": e.end or end}
    finally:
        sandboxes = (trainer, *sides.values())
        for s in sandboxes:
            s.end()
        for s in sandboxes:
            if s.process.poll() is None:
                s.kill()
        shutil.rmtree(work / "alive", ignore_errors=True)
        log.close()
    result["train"]["claims"] = claims(log_path)
    result["timing"] = timing(started, stamps, result)
    return result


def timing(started: float, t: dict, result: dict) -> dict:
    """Seconds of each stage; training is what PID 1 measured after its imports, the rest is the harness's own."""
    now = time.monotonic()
    out = {"total": now - started, "train": result["train"].get("seconds", now - t.get("ready", now))}
    if "embedded" in t:
        out |= {
            "start": t["ready"] - started,
            "collect": t["trained"] - t["ready"] - out["train"],
            "embed": t["embedded"] - t["trained"],
            "judge": now - t["embedded"],
        }
    return {k: round(v, 2) for k, v in out.items()}


def end_with_the_caller() -> None:
    """When run.sh is killed, the kernel sends us SIGTERM, and the containers go at once."""

    def end(*_) -> None:
        for s in Sandbox.started:
            s.end()
            s.process.terminate()  # srun leaves the queue; a sandbox ignores it
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main(work: str, data: str, budget: str, memory: str, seed: str, log: str, image: str) -> None:
    end_with_the_caller()
    result = one_run(Path(work), Path(data), int(budget), memory, int(seed), Path(log), image)
    Path(work, "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    if len(sys.argv) != 8:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (engine.EngineError, OSError) as e:
        engine.say(f"run.sh: {e}")
        sys.exit(2)
