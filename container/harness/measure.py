"""One run of one train.py: train, embed both sides of the pairs, judge.

What the sandboxes send is untrusted: it is capped, never opened here, and passed on to the next sandbox; only the
judge's answer is read.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import select
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import engine
import locks
from project import INSIDE, Broken, say
from sandbox import MESSAGE_BYTES, NOT_YOURS, QUEUE_LIMIT_S, Failed, Log, Lost, Sandbox

STAGE, JUDGE = INSIDE / "stage.py", INSIDE / "judge.py"
RUN_STAGE = ("python", "-Iu", "/harness/stage.py")
# with the messages that stage.py sends by itself
RUN_JUDGE = r"""printf '{"up": true}\n{"ready": true}\n'
exec python -I /harness/judge.py /key.npy /images.npy /captions.npy /fit.npy"""
SIDES = ("images", "captions")
LOAD_FAILED = "load: training ended well, but load() or encoding training rows failed (traceback in the log)"
EXCEPTION_LENGTH = 120  # characters of an exception in the reason of a failure
GRACE_S = 5  # between the budget, at which PID 1 inside kills, and the kill from outside
EMBED_S = 120  # load and encode one side; no longer than training left of its budget: `load` could train on
EMBED_LEAST_S = 30  # but so long at least
FIT_PAIRS = 1000  # of training, embedded to tell fit from generalisation, or as many as are judged
JUDGE_S = 120
JUDGE_MEMORY = "4g"
OUT_SIZE = "2g"  # tmpfs for what training leaves, within the memory limit
ARCHIVE_BYTES = 2 << 30  # of what training leaves
ARRAY_BYTES = 512 << 20  # of one side's embeddings, or of all of training pairs
ROOM = ARCHIVE_BYTES + (len(SIDES) + 1) * ARRAY_BYTES  # on the disk, before a run may begin
MACHINE_OOM = f"this machine ran out of memory, not the sandbox: close other programs, or add swap; {NOT_YOURS}"


@dataclass
class Job:
    work: Path  # world-readable, holds train.py; receives out.tar and, as .npy, fit, images, captions, ranks, examples
    data: Path  # data/<name>
    budget: int  # seconds
    memory: str  # such as 3g
    seed: int
    log: Path  # what train.py prints is appended to it
    image: str
    split: str = "val"  # what is judged
    table: str = "train"  # what it trains on
    scale: float = 1.0  # how much longer than usual train.py should train
    launch: Sequence[str] = ()  # of program.md
    measured_on: str = ""  # the incumbent's device, where a launch command may find another one
    device: int = 0  # number of the device lock that is held


@dataclass
class Run:
    outcome: str  # ok, failed, or lost to the machine
    seed: int
    reason: str = ""  # where it is not ok, one line
    metrics: dict = field(default_factory=dict)  # the judge's
    train: dict = field(default_factory=dict)  # PID 1's report, "device", "claims", "cut_short": last step, "step_ms"
    timing: dict = field(default_factory=dict)  # seconds of each stage
    fit: dict = field(default_factory=dict)  # mean_rank and the like of training pairs: shown, never used to decide


def fresh_seed() -> int:
    return secrets.randbits(30)


def run(job: Job) -> Run:
    """Train on a table, embed and judge a split; no sandbox is left. Raises Refused or OSError when nothing ran."""
    require_room(job.work)
    if ignored := engine.missing_limits():
        say(f"run.sh: warning: this engine enforces no {', '.join(ignored)} limits; see ./run.sh doctor")
    measurement, result = Measurement(job), Run("ok", job.seed)
    try:
        measurement.train()
        measurement.embed()
        result.metrics, result.fit = measurement.judge()
    except Failed as e:
        result.outcome, result.reason = "failed", str(e)
        if not job.launch and (fault := engine.gpu_fault()):
            result.outcome, result.reason = "lost", f"{fault}: {NOT_YOURS}"
    except Lost as e:
        if not measurement.ready:
            raise Broken(f"{e}; nothing ran") from None
        result.outcome, result.reason = "lost", str(e)
    finally:
        measurement.end()
    told = {"claims": claims(job.log), "cut_short": cut_short(job.log), "step_ms": measurement.log.step_ms}
    result.train = {**measurement.report, **told}
    result.timing = measurement.timing()
    return result


def require_room(folder: Path) -> None:
    """Raises Refused where the disk has less room than what a run may leave."""
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        least = f"a run may need {ROOM / 1e9:.1f} GB of disk, and there are {free / 1e9:.1f} GB at {folder}"
        raise Broken(f"{least}; nothing ran: make room (./run.sh doctor names old images), then run it again")


def stage_mounts(job: Job) -> dict[str, Path]:
    """One script of ours, not its folder: train.py is to find nothing else of the harness."""
    return {"/code/train.py": job.work / "train.py", "/harness/stage.py": STAGE}


def train_mounts(job: Job) -> dict[str, Path]:
    weights = job.data.parent / "weights"  # published ones, which ./run.sh data ukiyo-e fetches; others need none
    theirs = weights.is_dir() and not (weights / "val.key.npy").exists()  # a data set's name once, with its key
    published = {"/weights": weights} if theirs else {}
    return {**stage_mounts(job), "/data": job.data / job.table, **published}


def side_mounts(job: Job, side: str) -> dict[str, Path]:
    return {**stage_mounts(job), "/data": job.data / job.split / side}


def judge_mounts(job: Job) -> dict[str, Path]:
    arrays = {f"/{file.name}": file for name in (*SIDES, "fit") if (file := job.work / f"{name}.npy").exists()}
    return {"/harness/judge.py": JUDGE, "/key.npy": job.data / f"{job.split}.key.npy", **arrays}


class Measurement:
    """The stages of one run. Each raises Failed or Lost with the reason."""

    def __init__(self, job: Job):
        self.job, self.log, self.started = job, Log(job.log), time.monotonic()
        self.ready = self.trained = self.embedded = 0.0  # when training began, and when these stages ended
        self.report: dict = {}  # what PID 1 says of the training
        self.loads = True  # whether training rows can be embedded with what it left
        self.sandboxes: dict[str, Sandbox] = {}
        self.ended = threading.Event()
        self.drawer = threading.Thread(target=locks.draw_live_line, args=(self.ended,), daemon=True)
        self.drawer.start()

    def start(self, stage: str, seconds: int, mounts: dict, log: Log | None = None, **more) -> Sandbox:
        """seconds: that its work gets; more: other fields of engine.Container."""
        job = self.job
        # on a node, sandboxes of other machines may have our process id
        judged = (job.data / f"{job.split}.key.npy").stat().st_size // 8 - 16  # pairs: int64 after 128 bytes of header
        pairs = min(judged, FIT_PAIRS)
        name, command = f"ar-{os.getpid()}-{time.time_ns()}-{stage}", [*RUN_STAGE, stage, str(seconds), str(pairs)]
        where = {"device": job.device, "launch": job.launch, "folder": job.work}
        container = engine.Container(name, job.image, command, job.memory, mounts, OUT_SIZE, **where)
        self.sandboxes[stage] = Sandbox(replace(container, **more), log)
        return self.sandboxes[stage]

    def train(self) -> None:
        """The sandboxes that embed are started when training begins: they import torch meanwhile."""
        job, places = self.job, {"DATA": "/data", "OUT": "/out", "WEIGHTS": "/weights"}
        environment = {**places, "BUDGET_S": job.budget, "SEED": job.seed, "SCALE": f"{job.scale:g}"}
        trainer = self.start("train", job.budget, train_mounts(job), self.log, environment=environment)
        trainer.send()
        self.check_device(trainer.wait_until_ready())
        self.ready = time.monotonic()
        locks.enter(locks.TRAINS, job.log)
        for side in SIDES:
            self.start(side, EMBED_S, side_mounts(job, side))
        end = trainer.message(job.budget + GRACE_S)
        self.report |= end
        if end.get("status") != "ok":
            trainer.wait()
            raise Lost(MACHINE_OOM) if end.get("machine_oom") else Failed(why_training_failed(end, trainer.killed, job))
        trainer.copy_to(job.work / "out.tar", ARCHIVE_BYTES, EMBED_S, end["bytes"])
        self.trained = time.monotonic()
        self.embed_fit(trainer)
        locks.enter(locks.EMBEDS, job.log)

    def check_device(self, ready: dict) -> None:
        """What the training would run on is what it should. Raises Refused: a CPU in a GPU's place would train on."""
        if "fault" in ready:
            raise Broken(f"the GPU does not work in the sandbox ({ready['fault']}): nothing ran; see ./run.sh doctor")
        there = self.report["device"] = ready.get("device", "cpu")
        if self.job.launch:
            wanted, remedy = self.job.measured_on or there, "ask for it in `launch`, or change `budget` to begin anew"
            same = there == wanted
        else:
            wanted, remedy = engine.device_kind(), "see ./run.sh doctor"
            same = (there == "cpu") == (wanted == "cpu")  # torch may call a GPU otherwise than nvidia-smi does
        if not same:
            raise Broken(f"results so far are of {wanted}, and the sandbox has {there}: nothing ran; {remedy}")

    def embed(self) -> None:
        """Both sides. One has ended before the other gets train.py's model, so they cannot talk."""
        try:
            for side in self.sides_as_started():
                self.embed_side(side)
        except Failed as e:
            raise (e if self.loads else Failed(LOAD_FAILED)) from None
        self.embedded = time.monotonic()

    @property
    def embed_s(self) -> float:
        return min(EMBED_S, max(EMBED_LEAST_S, self.job.budget - self.report["seconds"]))

    def embed_fit(self, trainer: Sandbox) -> None:
        """Store what the trainer embeds of its own table, for the judge. Without that a run goes on all the same."""
        with contextlib.suppress(Failed, Lost):  # the judge takes nothing that is incomplete
            end = trainer.message(self.embed_s + GRACE_S)
            self.loads = end.get("status") != "crashed"
            if end.get("status") == "ok":
                trainer.copy_to(self.job.work / "fit.npy", ARRAY_BYTES, EMBED_S, end["bytes"])

    def sides_as_started(self) -> Iterator[str]:
        """Both, in the order in which they started: a launch command may have room for one, and start the second."""
        waiting = {self.sandboxes[side].process.stdout: side for side in SIDES}
        while waiting:
            started = select.select(list(waiting), [], [], QUEUE_LIMIT_S)[0] if self.job.launch else []
            yield waiting.pop((started or list(waiting))[0])

    def embed_side(self, side: str) -> None:
        """Store this side's array."""
        end = self.hand_over(side, self.embed_s, self.job.work / "out.tar")
        if end.get("status") != "ok":
            if end.get("machine_oom"):
                raise Lost(MACHINE_OOM)
            reason = why_embedding_failed(end, self.sandboxes[side].killed, self.embed_s)
            raise Failed(f"embedding the validation {side} failed: {reason}")
        self.sandboxes[side].copy_to(self.job.work / f"{side}.npy", ARRAY_BYTES, EMBED_S, end["bytes"])

    def judge(self) -> tuple[dict, dict]:
        """Returns the metrics of the two arrays, and those of training pairs; stores ranks and examples."""
        how = {"command": ["sh", "-c", RUN_JUDGE], "memory": JUDGE_MEMORY, "device": None, "out_size": None}
        sandbox = self.start("judge", JUDGE_S, judge_mounts(self.job), **how)
        found, judged = self.hand_over("judge", JUDGE_S), self.job.work / "judged"
        sandbox.copy_to(judged, ARRAY_BYTES, JUDGE_S)
        if "metrics" not in found:
            raise Failed(f"invalid output: {found.get('invalid', 'the judge did not answer')}")
        arrays = judged.read_bytes()
        (self.job.work / "ranks.npy").write_bytes(arrays[: found["bytes"]])
        (self.job.work / "examples.npy").write_bytes(arrays[found["bytes"] :])
        for other in self.sandboxes.values():
            other.wait()
        return found["metrics"], found.get("fit", {})

    def hand_over(self, stage: str, limit_s: float, given: Path | None = None) -> dict:
        """Give a sandbox a file to work on, or none; returns its report, {} without one."""
        sandbox = self.sandboxes[stage]
        sandbox.wait_until_ready()
        sandbox.send(given)
        return sandbox.message(limit_s + GRACE_S)

    def end(self) -> None:
        """End what still runs; also where the engine's client alone was killed."""
        self.ended.set()
        shutil.rmtree(self.job.work / "alive", ignore_errors=True)  # the lifelines: they end at the same time
        for sandbox in self.sandboxes.values():
            if sandbox.process.poll() != 0:
                sandbox.kill()
        self.log.close()
        self.drawer.join(5)  # a terminal that is held up holds up nothing else

    def timing(self) -> dict[str, float]:
        """Seconds of each stage; training is what PID 1 measured after its imports, the rest is the harness's own."""
        now = time.monotonic()
        seconds = {"total": now - self.started, "train": self.report.get("seconds", now - (self.ready or now))}
        if self.embedded:
            seconds["start"] = self.ready - self.started
            seconds["collect"] = self.trained - self.ready - seconds["train"]
            seconds["embed"] = self.embedded - self.trained
            seconds["judge"] = now - self.embedded
        return {stage: round(s, 2) for stage, s in seconds.items()}


def why_training_failed(end: dict, killed: bool, job: Job) -> str:
    """The reason of a training that did not end well, in one line. end: PID 1's report, {} when there is none."""
    steps = last_step(job.log)
    after = (f" after {end['seconds']} s" if end else "") + (f", {steps}" if steps else "")
    status = end.get("status", "limit" if killed else "lost")
    if status == "limit":
        return f"time limit: killed at the budget of {job.budget} s, {steps or 'before its first step line'}"
    if end.get("oom"):
        return f"out of memory: more than {job.memory} of main memory{after}"
    if status == "lost":
        return f"the sandbox was killed from outside, or ran out of its {job.memory} of memory{after}"
    if b"OutOfMemoryError" in job.log.read_bytes()[-20000:]:
        return f"out of memory on the GPU{after}"
    if status == "killed":
        return f"killed by its own signal {end.get('signal')}{after}"
    if end.get("full"):
        return f"crash{after}; /out, /tmp or /dev/shm is full"
    return f"crash{after}{last_exception(job.log)}"


def why_embedding_failed(end: dict, killed: bool, limit_s: float) -> str:
    if killed or end.get("status") == "limit":
        return f"longer than {limit_s:.0f} s"
    if end.get("status") == "killed":
        return "out of memory" if end.get("oom") else "killed"
    error = end.get("error", "Exception")
    return f"{error} at line {end['line']} of train.py" if end.get("line") else error


def last_step(log: Path) -> str:
    """train.py's own progress: '143 of 300 steps', or '' when it printed none."""
    found = locks.STEP.findall(log.read_bytes())
    return f"{int(found[-1][0])} of {int(found[-1][1])} steps" if found else ""


def cut_short(log: Path) -> str:
    """Likewise of a training that stopped early; '' where the steps after its last line may not have been printed."""
    found = [(int(step), int(steps)) for step, steps, _ in locks.STEP.findall(log.read_bytes())]
    (before, _), (last, steps) = [(0, 0), (0, 0), *found][-2:]
    return last_step(log) if last + max(0, last - before) < steps else ""


def last_exception(log: Path) -> str:
    """': ValueError: ...', where that is the last line that train.py printed, else ''."""
    line = log.read_bytes()[-MESSAGE_BYTES:].decode("utf-8", "replace").rstrip().rpartition("\n")[2]
    return f": {line[:EXCEPTION_LENGTH]}" if re.match(r"[\w.]*(Error|Exception)\b", line) else ""


def claims(log: Path) -> dict[str, str]:
    """`key: value` lines after the last `---` that train.py printed: shown as its own claims, never used to decide."""
    _, mark, last = log.read_bytes().decode("utf-8", "replace").rpartition("\n---\n")
    lines = [line.strip() for line in last.splitlines()[-20:] if mark]
    found = [re.fullmatch(r"([a-z_]{1,20}):\s*([\w.,%+>/ -]{1,60})", line) for line in lines]
    return {m[1]: m[2] for m in found if m}
