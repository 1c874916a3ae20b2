"""PID 1 inside the sandbox: run train.py and embed training pairs with it, or one side of the validation pairs.

usage: stage.py train SECONDS PAIRS    /code/train.py and /data (the training table) mounted, /out a tmpfs
       stage.py images|captions SECONDS PAIRS < archive    the same, but /data is one side of them, without the other

Everything heavy is imported first, then a child is forked: it runs the untrusted code with its standard output turned
to standard error. Standard output belongs to this process: JSON lines, then raw bytes (the archive of /out, or an
array). The child may do to itself what it likes; ptrace is closed by seccomp and this process is not dumpable, so it
can neither stop the clock nor write into the stream. What comes out is still untrusted for the host.
"""

import builtins
import contextlib
import ctypes
import functools
import gc
import json
import math
import os
import runpy
import select
import shutil
import signal
import sys
import tarfile
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import BinaryIO

BEAT = Path("/harness/alive/beat")  # a file that the harness outside changes every few seconds while it lives
LIFELINE_S = 60  # without a change
LIFELINE_LOST = 75  # exit status of a sandbox that nobody outside wants any more


def end_when_alone() -> None:
    """In a thread: end this sandbox when the harness outside is gone, which takes BEAT away or leaves it as it is."""
    last, silent = b"", 0
    while silent < LIFELINE_S:
        try:
            now = BEAT.read_bytes()  # opened anew every time, so that NFS asks its server
        except OSError:
            break
        # counted, not timed: seconds in which this process did not run either, on a paused machine, are no silence
        last, silent = now, silent + 1 if now == last else 0
        time.sleep(1)
    os._exit(LIFELINE_LOST)


if __name__ == "__main__":
    threading.Thread(target=end_when_alone, daemon=True).start()
    os.write(1, b'{"up": true}\n')  # with a launch command the harness may have waited for this for hours
    os.nice(0 if sys.argv[1] == "train" else 10)  # those that embed start beside a training

warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)  # our thread holds no lock
gc.disable()  # nothing to collect yet, and looking for it is a quarter of the time that these imports take
import datasets  # noqa: E402
import numpy as np  # noqa: E402
import open_clip  # noqa: E402, F401  (imported for train.py: the time it takes is then not training time)
import torch  # noqa: E402

gc.freeze()
gc.enable()

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU_PROOF_S = 60  # a GPU that does nothing by then is not going to
BATCH = 64  # images or captions encoded at once; larger ones fall out of the cache
PR_SET_DUMPABLE = 4
MAX_FD = 4096
LIBC = ctypes.CDLL(None)
CODE = Path("/code/train.py")
MAX_ROWS_OF_TRACE = 40
MAX_LINE = 999  # of train.py that is named where embedding failed: how much it may say there is bounded
MAX_ERROR = 200  # bytes, in which it says that
CGROUP_V2, CGROUP_V1 = Path("/sys/fs/cgroup/memory.events"), Path("/sys/fs/cgroup/memory/memory.oom_control")
TMPFS = ("/out", "/tmp", "/dev/shm")
NO_SPACE = 1 << 20  # bytes left on one that is full


def report(stream, **fields) -> None:
    """One JSON line to the host."""
    stream.write(json.dumps(fields).encode() + b"\n")
    stream.flush()


def in_child(work, limit_s: float) -> tuple[dict, BinaryIO]:
    """Fork and run work(result) in the child, for at most limit_s. Nothing that it started lives on.

    Returns {"seconds": s, "status": "ok" | "crashed" | "killed" | "limit"}, of a killed one with "signal", "oom" and,
    where that was the whole machine's want of memory, "machine_oom"; and what the child wrote into the file `result`.
    """
    result = os.fdopen(os.memfd_create("result"), "w+b")
    (kills, refusals), start = memory_events(), time.monotonic()
    LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    pid = os.fork()
    if pid == 0:
        LIBC.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
        os.closerange(3, result.fileno())  # the stream to the host is not the child's
        os.closerange(result.fileno() + 1, MAX_FD)
        Path("/proc/self/oom_score_adj").write_text("1000")  # when memory runs out the kernel ends this one, not PID 1
        os.dup2(2, 1)
        sys.path.insert(0, str(CODE.parent))
        os._exit(exit_status(work, result))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one signal that the child could end this process with
    in_time = select.select([os.pidfd_open(pid)], [], [], limit_s)[0]
    if not in_time:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    end_everybody_else()
    result.seek(0)
    end = {"seconds": round(time.monotonic() - start, 2), "status": "limit"}
    if in_time and os.WIFSIGNALED(status):
        kills_now, refusals_now = memory_events()
        oom = kills_now > kills
        end |= {"status": "killed", "signal": os.WTERMSIG(status)}
        end |= {"oom": oom, "machine_oom": oom and refusals_now == refusals}
    elif in_time:
        end["status"] = "crashed" if os.WEXITSTATUS(status) else "ok"
    return end, result


def end_everybody_else() -> None:
    """As PID 1: daemons would train on, and change what is sent while it is."""
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        while os.getpid() == 1:
            os.kill(-1, signal.SIGKILL)
            os.waitpid(-1, 0)


def exit_status(work, result) -> int:
    """Run work(result), print the part of a traceback that lies in train.py's reach, return an exit status."""
    try:
        work(result)
        return 0
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException as e:
        trace = e.__traceback__
        while trace and trace.tb_frame.f_code.co_filename != str(CODE):
            trace = trace.tb_next
        traceback.print_exception(type(e), e, trace or e.__traceback__, limit=MAX_ROWS_OF_TRACE)
        return 1
    finally:
        with contextlib.suppress(BaseException):  # a broken stream must not change the verdict
            result.flush()
            sys.stdout.flush()
            sys.stderr.flush()


def memory_events() -> tuple[int, int]:
    """How many processes here the kernel has ended for want of memory, and how often the sandbox was at its own limit.

    cgroup v1's counter of that stays 0 on some kernels, so there every kill counts as one at the limit.
    """
    for file, at_limit in ((CGROUP_V2, "max"), (CGROUP_V1, "oom_kill")):
        if file.exists():
            counts = dict(line.split() for line in file.read_text().splitlines())
            return int(counts.get("oom_kill", 0)), int(counts.get(at_limit, 0))
    return 0, 0


def try_gpu(result) -> None:
    """In a child, since a process that has used a GPU cannot fork others that do: one sum on it, and its model."""
    try:
        torch.ones(8, device=DEVICE).sum().item()
        said = {"device": torch.cuda.get_device_name()}
    except Exception as e:  # an old driver, a GPU that this torch was not built for, one in trouble
        said = {"fault": f"{type(e).__name__}: {e}".partition("\n")[0][:MAX_ERROR]}
    result.write(json.dumps(said).encode())


def device() -> dict:
    """What the training would run on; "fault": why that GPU cannot be used."""
    if DEVICE == "cpu":
        return {"device": DEVICE}
    end, result = in_child(try_gpu, GPU_PROOF_S)
    return json.loads(result.read() or b"{}") or {"fault": f"a first sum on it: {end['status']}"}


def run_training(_) -> None:
    """What `python train.py` does, in a process where torch is already imported."""
    sys.argv[:] = ["train.py"]
    runpy.run_path(str(CODE), run_name="__main__")


def archive(out: BinaryIO, copy=tarfile.copyfileobj) -> int:
    """Write what training left, all of /out, what is in a file by `copy`; returns how many bytes that takes."""
    tarfile.copyfileobj = copy
    with tarfile.open(fileobj=out, mode="w|") as tar:
        tar.add("/out", arcname=".")
    out.flush()
    return math.ceil(tar.offset / tarfile.RECORDSIZE) * tarfile.RECORDSIZE


def unpack() -> None:
    """The archive on standard input, to where training left it."""
    with tarfile.open(fileobj=sys.stdin.buffer, mode="r|") as tar:
        # in here a forged member can do no harm; the filter, where this Python has it, only names it sooner
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall("/out")


def load_model():
    """What train.py's load returns for what training left."""
    import train

    return train.load("/out", DEVICE)


def encode(m, rows: datasets.Dataset) -> np.ndarray:
    """Embed a table with one column, image (uint8, 3*S*S) or caption. Returns float32 (n, D).

    Raises TypeError or ValueError when the model returns anything but one finite-width float row per input.
    """
    out, text, rows = [], "caption" in rows.column_names, rows.with_format("arrow")
    what = "encode_text" if text else "encode_image"
    for start in range(0, len(rows), BATCH):
        column = rows[start : start + BATCH]["caption" if text else "image"]
        e = m.encode_text(column.to_pylist()) if text else m.encode_image(pixels(column).to(DEVICE))
        if not isinstance(e, torch.Tensor) or not e.is_floating_point():
            raise TypeError(f"{what} must return a float tensor, not {type(e).__name__}")
        if e.ndim != 2 or len(e) != len(column):
            raise ValueError(f"{what} must return (B, D) with B={len(column)}, not {tuple(e.shape)}")
        out.append(e.float().cpu().numpy())
    return np.concatenate(out)


def pixels(column) -> torch.Tensor:
    """An Arrow column of flat images as uint8 (B, 3, S, S), without turning numbers into Python's."""
    flat = np.concatenate([chunk.flatten().to_numpy() for chunk in column.chunks]).reshape(len(column), 3, -1)
    size = math.isqrt(flat.shape[2])
    return torch.from_numpy(flat.reshape(len(column), 3, size, size))


@torch.inference_mode()
def encode_fit(pairs: int, result) -> None:
    """In the child: embed so many training pairs, images first; a mistake in `load` shows its traceback.

    In the sandbox of the training, which sees nothing of validation: so the log and `fit` can tell nothing of it.
    """
    m, table = load_model(), datasets.load_from_disk("/data")
    table = table.select(np.linspace(0, len(table) - 1, min(pairs, len(table))).astype(int))
    np.save(result, np.concatenate([encode(m, table.select_columns(column)) for column in ("image", "caption")]))


@torch.inference_mode()
def encode_side(result) -> None:
    """In the child: embed this side with what training left, write the array, or what went wrong."""
    try:
        unpack()
        np.save(result, encode(load_model(), datasets.load_from_disk("/data")))
    except BaseException as e:
        # Only the exception's type and its line: a message could carry validation captions to the agent.
        lines = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == str(CODE)]
        result.write(json.dumps([type(e).__name__, lines[-1] if lines else 0]).encode())
        sys.exit(1)


def error_of(result: bytes) -> dict:
    """What the child says went wrong, reduced to a known exception's name and one line that train.py has: 16 bits.

    The child chooses both freely, from captions if it likes; `line` is 0 where it names no line of train.py.
    """
    try:
        kind, line = json.loads(result)
        type_ = getattr(builtins, kind, None)
        known = isinstance(type_, type) and issubclass(type_, BaseException) or kind == "OutOfMemoryError"
        there = type(line) is int and 1 <= line <= min(MAX_LINE, CODE.read_bytes().count(b"\n") + 1)
        return {"error": kind if known else "Exception", "line": line if there else 0}
    except (ValueError, TypeError):
        return {"error": "Exception", "line": 0}


def main(stage: str, limit_s: float, pairs: int) -> None:
    """Report that we are ready and how the stage ended; then, if well, send what it leaves."""
    work = {"train": run_training, "images": encode_side, "captions": encode_side}[stage]
    with os.fdopen(os.dup(1), "wb") as out:
        report(out, ready=True, **(device() if stage == "train" else {}))
        if stage != "train":  # the archive comes when training has ended; only then does the clock start
            select.select([sys.stdin], [], [])
        end, result = in_child(work, limit_s)
        if end["status"] == "ok" and stage == "train":
            size = archive(open(os.devnull, "wb"), lambda *_, **__: None)  # of what may be sparse, and claim a TiB
            report(out, **end, bytes=size)
            archive(out)  # before training pairs are embedded: code that trains on meanwhile changes nothing
            end, result = in_child(functools.partial(encode_fit, pairs), limit_s)
        elif end["status"] != "ok" and stage != "train":
            end |= error_of(result.read(MAX_ERROR))
        elif end["status"] == "crashed" and min(shutil.disk_usage(d).free for d in TMPFS) < NO_SPACE:
            end["full"] = True
        report(out, **end, bytes=os.fstat(result.fileno()).st_size)
        if end["status"] == "ok":
            shutil.copyfileobj(result, out)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
    os._exit(0)  # at once: tearing down what was imported takes time and says things that end up in the log
