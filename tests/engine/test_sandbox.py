"""The sandbox against a hostile train.py: probes under the real flags on every engine found, then whole trainings."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import textwrap
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Callable

import pytest

import engine
import install
import measure
import probes
import repository
import sandbox
import stand_ins
from project import Refused
from repository import Project

PROBES_LIMIT_S = 120  # of one container full of probes
MEMORY, SMALL_MEMORY, MORE_MEMORY = "3g", "64m", "1g"
CGROUP_LIFTS = ("pids", "memory")  # limits that an engine without control groups cannot hold
# not ALL: a machine may lack one of them, and then docker starts nothing
CAPABILITIES = ["CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "MKNOD", "NET_ADMIN", "NET_BIND_SERVICE", "NET_RAW",
                "SETFCAP", "SETGID", "SETUID", "SYS_ADMIN", "SYS_BOOT", "SYS_CHROOT", "SYS_MODULE", "SYS_NICE",
                "SYS_PACCT", "SYS_RAWIO", "SYS_TIME", "SYSLOG"]  # fmt: skip
ONLY = [os.environ["AR_ENGINE"]] if "AR_ENGINE" in os.environ else ["podman", "docker"]
FOUND = [e for e in ONLY if shutil.which(e) and engine.run([e, "version"]).returncode == 0]


def forget() -> None:
    """What engine.py remembers belongs to one engine."""
    for f in vars(engine).values():
        if hasattr(f, "cache_clear"):
            f.cache_clear()


@pytest.fixture(params=FOUND)
def chosen(request, monkeypatch) -> str:
    monkeypatch.setenv("AR_ENGINE", request.param)
    forget()
    yield request.param
    forget()


@functools.lru_cache(maxsize=None)
def image(_: str) -> str:
    """The project's image, or where this engine's store lacks it a base: the probes need only python3."""
    with contextlib.suppress(Refused):
        return engine.find_image()
    found = [base for base in (engine.REGISTRY_BASE, engine.DEBIAN_BASE) if engine.image_id(base)]
    return found[0] if found else pytest.skip("no image with a python3 in this engine's store")


def engine_name() -> str:
    """For the figures: "podman 4.3.1 rootful, runc 1.1.5"."""
    field = ".Client.Version" if engine.name() == "podman" else ".Server.Version"
    version = engine.run([*engine.client(), "version", "--format", "{{%s}}" % field]).stdout.strip()
    runtime = engine.run(["runc", "--version"]).stdout.split("\n")[0].replace(" version", "")
    return f"{engine.name()} {version} {'rootless' if engine.rootless() else 'rootful'}, {runtime}"


def cannot(p: probes.Probe) -> list[str]:
    """Why the positive control of a probe cannot work on this machine and engine; usually nothing."""
    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    has = {"all": True, "yama": yama.exists() and yama.read_text().strip() != "0", "rootless": engine.rootless()}
    return [why for what, why in p.never.items() if has.get(what, what.startswith("/") and not Path(what).exists())]


def lifts(outside: Outside) -> dict[str, list[tuple]]:
    """name: (flags of engine.arguments, what stands there in a control). One spelt otherwise leaves controls shut."""
    unmask = "unmask=ALL" if engine.name() == "podman" else "systempaths=unconfined"
    folder = outside.facts["folder"]
    size = [(f"size={engine.TMP_SIZE}", "size=4g"), ("size=64m", "size=256m")]
    return {
        "seccomp": [(f"seccomp={engine.IMAGE / 'seccomp.json'}", "seccomp=unconfined")],
        "root": [(f"--user {engine.UID}", "--user 0:0")],
        "caps": [("--cap-drop ALL", " ".join(f"--cap-add {c}" for c in CAPABILITIES))],
        "writable": [("--read-only ", "")],
        "new_privileges": [("--security-opt no-new-privileges", "")],
        "masks": [("--rm", f"--rm --security-opt {unmask}")],
        "sys": [("--rm", "--rm -v /sys:/sys:rw -v /sys/fs/cgroup:/sys/fs/cgroup:rw")],  # opened there, not written
        "neighbour": [("--network none", f"--network container:{outside.neighbour}"), ("--hostname sandbox", "")],
        "ipv6": [("--rm", "--rm --sysctl net.ipv6.conf.lo.disable_ipv6=0")],
        "host_network": [("--network none", "--network host")],  # reads one file there
        "folder": [("--rm", f"--rm -v {folder}:{folder}:ro -v {folder}/socket:/run/docker.sock")],
        "device": [("--rm", "--rm --device /dev/null:/dev/extra")],
        "input": [("target=/input,readonly", "target=/input")],
        "code": [("target=/probes.py,readonly", "target=/probes.py")],
        "dumpable": [("--rm", "--rm --env PROBE_DUMPABLE=1")],
        "nofile": [("nofile=8192:8192", "nofile=16384:16384")],
        "core": [("core=0:0", "core=1000:1000")],
        "pids": [(f"--pids-limit {engine.PIDS}", "--pids-limit 1024")],
        "memory": [(f"--memory {SMALL_MEMORY} --memory-swap {SMALL_MEMORY}",
                    f"--memory {MORE_MEMORY} --memory-swap {MORE_MEMORY}")],
        "sizes": [*size, (f"--shm-size {engine.SHM_SIZE}", "--shm-size 4g")],
    }  # fmt: skip


class Outside:
    """What lies outside the sandbox, for the probes to reach: files, sockets, and a neighbour for the controls."""

    def __init__(self, folder: Path):
        port = socket.create_server(("127.0.0.1", 0))
        (folder / "input").mkdir(parents=True)
        for path, mode in ((folder, 0o755), (folder / "input", 0o777)):
            path.chmod(mode)
        for path in (folder / "secret", folder / "input" / "file"):
            path.write_text("secret")
            path.chmod(0o666)
        self.code = folder / "probes.py"
        shutil.copy(probes.__file__, self.code)
        self.code.chmod(0o666)
        path_socket = probes.answering(str(folder / "socket"), 0, socket.AF_UNIX, socket.SOCK_STREAM)
        (folder / "socket").chmod(0o777)
        number = port.getsockname()[1]
        self.facts = {"port": number, "abstract": f"ar-{os.getpid()}", "folder": str(folder)}
        self.neighbour = f"ar-{os.getpid()}-neighbour"
        self.runs = 0
        datagrams = probes.answering("127.0.0.1", number, socket.AF_INET, socket.SOCK_DGRAM)
        abstract = probes.answering("\0" + self.facts["abstract"], 0, socket.AF_UNIX, socket.SOCK_STREAM)
        listeners = [port, path_socket, datagrams, abstract]
        threading.Thread(target=probes.serve, args=(listeners,), daemon=True).start()

    def argv(self, container: str, lifted: str, command: list[str], memory: str = MEMORY) -> list[str]:
        """engine.arguments' own, with what is lifted replaced."""
        mounts = {"/probes.py": self.code, "/input": Path(self.facts["folder"]) / "input"}
        environment = {"PROBE_HOST": json.dumps(self.facts, separators=(",", ":"))}
        limits = {"memory": memory, "out_size": "64m"}
        command, which = ["python3", "-I", "/probes.py", *command], image(engine.name())
        argv = engine.arguments(
            engine.Container(container, which, command, mounts=mounts, environment=environment, **limits)
        )
        line = " ".join(argv)
        for name in lifted.split():
            for old, new in lifts(self)[name]:
                line = line.replace(old, new)
        return line.split()

    def probe(self, names: list[str], lifted: str = "", memory: str = MEMORY) -> dict[str, dict]:
        """Run probes in one container: name -> answer."""
        self.runs += 1
        argv = self.argv(f"ar-{os.getpid()}-probes-{self.runs}", lifted, names, memory)
        done = engine.run(argv, timeout=PROBES_LIMIT_S + 60, cwd=self.facts["folder"])
        found = {row.pop("probe"): row for row in map(json.loads, done.stdout.splitlines())}
        lost = {"open": False, "how": "the container was killed"}
        if done.returncode != 137 or memory == MEMORY:
            lost = {"error": f"status {done.returncode}: {done.stderr[-300:]}"}
        return {name: found.get(name, lost) for name in names}

    @contextlib.contextmanager
    def with_neighbour(self):
        argv = self.argv(self.neighbour, "root caps seccomp ipv6", ["--listen"])
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as started:
            try:
                assert started.stdout.readline() == b"listening\n"
                yield
            finally:
                engine.kill(self.neighbour)

    def batches(self, table: list[probes.Probe], control: bool) -> list[tuple[list[str], str, str]]:
        """(names, lifted, memory) of each container: what shares flags shares one, what kills its container does not"""
        together, alone = defaultdict(list), []
        for p in table:
            if p.lift == "memory":
                alone.append(([p.name], p.lift if control else "", SMALL_MEMORY))
            else:
                together[p.lift if control else ""].append(p.name)
        return alone + [(names, lifted, MEMORY) for lifted, names in together.items()]


TRAIN = """
import os, signal, socket, subprocess, sys, threading, time
import torch

class Model:
    def encode_image(self, x): return torch.rand(len(x), 8)
    def encode_text(self, x): return torch.rand(len(x), 8)

def load(out_dir, device): return Model()

def main():
{code}

if __name__ == "__main__":
    main()
"""
BUDGET, AMPLE = 12, 90  # seconds: for what runs into the limit, and for what ends by itself on a busy machine
MARK = f"leftover-{os.getpid()}"  # argv[0] of what a training leaves behind
DAEMON = "while kill -0 $1; do sleep 0.01; done; sleep 0.1; echo STILL HERE >&2; sleep 300"
OK, LIMIT = "^$", f"^time limit: killed at the budget of {BUDGET} s"
ODD = "^$|^embedding the validation (images|captions) failed: |^load: training ended well, but"
HOSTILE = {  # what it does: (the body of main, the reason wanted, or OK). The heavy ones are not in the sample
    "1 GB on standard output": ("for _ in range(1 << 10): os.write(1, b'x' * (1 << 20))", OK),
    "a daemon, forked twice": (
        f"""
        os.posix_fallocate(os.open('/out/big', os.O_CREAT | os.O_RDWR), 0, 300 << 20)  # handing this over takes time
        daemon, trainer = {DAEMON!r}, str(os.getpid())
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                for n in signal.valid_signals() - {{signal.SIGKILL, signal.SIGSTOP}}:
                    signal.signal(n, signal.SIG_IGN)
                os.execv('/bin/sh', ['sh', '-c', daemon, '{MARK}', trainer])
            os._exit(0)
        time.sleep(1)""",
        OK,
    ),
    "a checkpoint every step": ("for n in range(99): torch.save(torch.ones(9 << 20), f'/out/{n}')", "^crash .* full"),
    "every signal to PID 1": (
        """
        for n in signal.valid_signals():
            os.kill(1, n)
        time.sleep(1)""",
        OK,
    ),
    "processes until no more start": ("subprocess.run(['sh', '-c', 'while :; do sleep 99 & done'])", OK),
    "much memory": ("hog = [torch.ones(1 << 26) for _ in range(64)]", f"^out of memory: more than {MEMORY} of main"),
    "a fork bomb": (
        """
        while True:
            try:
                os.fork()
            except BlockingIOError:
                break
        os.getppid() == 1 or signal.pause()""",
        f"{OK}|{LIMIT}",
    ),
    "stops itself": ("os.kill(os.getpid(), signal.SIGSTOP)", LIMIT),
    "ignores every signal": (
        """
        for n in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(n, signal.SIG_IGN)
        while True:
            time.sleep(1)""",
        LIMIT,
    ),
    "a sparse file of 1 TiB": (
        "os.truncate(os.open('/out/big', os.O_CREAT | os.O_RDWR), 1 << 40)",
        "^invalid output: more than 2048 MiB",
    ),
    "100000 files": ("for n in range(100_000): os.mknod(f'/out/{n}')", OK),
    "odd names": ("for n in (b'-rf', b'a\\nb', b'\\xff\\xfe', b'x' * 255, b' ', b'$(id)'): os.mkdir(b'/out/' + n)", OK),
    "a deep tree": ("for n in range(300): os.mkdir('d'); os.chdir('d')", OK),
    "links out": ("os.symlink('/etc/passwd', '/out/a'); os.symlink('..', '/out/b'); os.link('/out/a', '/out/c')", ODD),
    "a FIFO": ("os.mkfifo('/out/pipe')", ODD),
}  # fmt: skip


class Hostile:
    """Runs a hostile train.py through the real measure.run, and looks at what it left outside."""

    def __init__(self, measured: Project, work: Path):
        self.data, self.work, self.log = measured.path / "data" / "prints", work / "work", work / "log"
        self.work.mkdir()
        (work / "beside").write_text("untouched")

    def fields(self, code: str, budget: int) -> dict:
        """Of a measure.Job with this body of main."""
        text = TRAIN.format(code=textwrap.indent(textwrap.dedent(code).strip(), "    "))
        (self.work / "train.py").write_text(text)
        limits = {"budget": budget, "memory": MEMORY, "seed": 1}
        return {"work": self.work, "data": self.data, "log": self.log, **limits}

    def run(self, code: str, budget: int = AMPLE) -> measure.Run:
        found = measure.run(measure.Job(**self.fields(code, budget), image=engine.find_image()))
        self.check()
        return found

    def check(self) -> None:
        """One bounded log, ordinary files of ours, no container and no process."""
        ours = {
            "train.py",
            "out.tar",
            "fit.npy",
            "images.npy",
            "captions.npy",
            "judged",
            "ranks.npy",
            "examples.npy",
            "oom",
        }
        assert {p.name for p in self.work.iterdir() if p.is_file() and not p.is_symlink()} <= ours
        assert sorted(p.name for p in self.work.parent.iterdir()) == ["beside", "log", "work"]
        assert self.log.stat().st_size < sandbox.LOG_HEAD + sandbox.LOG_TAIL + 100
        assert not Path("oom").exists()  # podman's own, where it was started
        assert b"STILL HERE" not in self.log.read_bytes()
        assert left_behind() == [] and f"ar-{os.getpid()}-" not in engine.run([*engine.client(), "ps", "-a"]).stdout


def left_behind() -> list[str]:
    return [p.parent.name for p in Path("/proc").glob("[0-9]*/cmdline") if MARK.encode() in content(p)]


def content(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


@pytest.fixture
def hostile(measured: Project, tmp_path: Path) -> Callable[[], Hostile]:
    """hostile(): a place of its own for one more training."""

    def make() -> Hostile:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        return Hostile(measured, folder)

    return make


def tally(sweep: str, runs: dict[str, tuple[Callable, str]], figure) -> None:
    """Run all, count those that ended in anything but the reason wanted."""
    wrong, started = {}, time.monotonic()
    for what, (run, want) in runs.items():
        found = run()
        if not re.search(want, found.reason) or bool(found.metrics) == bool(found.reason):
            wrong[what] = found.reason or "judged"
    seconds = round(time.monotonic() - started, 1)
    figure(f"sandbox: {sweep}", len(runs), len(wrong), engine=engine_name(), seconds=seconds)
    assert wrong == {}


@pytest.fixture
def no_open_clip(tmp_path_factory, monkeypatch) -> None:
    """An empty one in the sandboxes: they start in half of the time."""
    monkeypatch.setattr(measure, "stage_mounts", measure.stage_mounts)
    exec(repository.without_open_clip(tmp_path_factory.mktemp("empty")), {"measure": measure})


@pytest.fixture(scope="module")
def abandoned(measured: Project, tmp_path_factory) -> tuple[Hostile, str]:
    """A run whose process was killed outside, and how the names of its containers begin; they end in a minute."""
    place = Hostile(measured, tmp_path_factory.mktemp("abandoned"))
    fields = place.fields("time.sleep(300)", AMPLE)
    process, deadline = measured.start(given=stand_ins.one_run(**fields)), time.monotonic() + 90
    while not re.search(rf"^ar-{process.pid}-.*captions$", names(), re.M):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.kill()
    process.communicate()
    return place, f"ar-{process.pid}-"


def names() -> str:
    """Of all containers."""
    return engine.run([*engine.client(), "ps", "-a", "--format", "{{.Names}}"]).stdout


def test_hostile_trainings_end_in_a_clear_verdict(hostile, abandoned, no_open_clip, sample, figure):
    tried = {what: HOSTILE[what] for what in sample(list(HOSTILE), 3)}
    runs = {
        what: (lambda code=code, want=want: hostile().run(code, BUDGET if LIMIT in want else AMPLE), want)
        for what, (code, want) in tried.items()
    }
    tally("trainings", runs, figure)


def member(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


FORGED = {
    "..": lambda tar: member(tar, "../../escaped", b"x"),
    "absolute": lambda tar: member(tar, "/tmp/escaped", b"x"),
    "through a symbolic link": lambda tar: (member(tar, "a", type=tarfile.SYMTYPE, linkname="/tmp"),
                                            member(tar, "a/escaped", b"x")),
    "a hard link out": lambda tar: member(tar, "a", type=tarfile.LNKTYPE, linkname="../../etc/passwd"),
    "a FIFO": lambda tar: member(tar, "checkpoint.pt", type=tarfile.FIFOTYPE),
    "a character device": lambda tar: member(tar, "a", type=tarfile.CHRTYPE, devmajor=1, devminor=1),
    "a block device": lambda tar: member(tar, "a", type=tarfile.BLKTYPE, devmajor=254),
    "1 TiB that is not there": lambda tar: tar.fileobj.write(truncated(1 << 40)),
    "a set-user-ID file": lambda tar: member(tar, "a", b"x", mode=0o6777, uid=0),
    "odd names": lambda tar: [member(tar, n, b"x") for n in ("-rf", "a\nb", "x" * 255, "\udcff", "", ".", "a\0b")],
    "no archive": lambda tar: tar.fileobj.write(os.urandom(1 << 16)),
}  # fmt: skip


def truncated(size: int) -> bytes:
    info = tarfile.TarInfo("big")
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_forged_archive_harms_nobody(hostile, no_open_clip, sample, figure, monkeypatch):
    """As if a training had taken over PID 1's stream: an archive of its own comes out."""
    monkeypatch.setattr(measure.Measurement, "train", None)
    exec(stand_ins.NO_TRAINING, {"measure": measure})

    def run(forge: Callable) -> measure.Run:
        place = hostile()
        with tarfile.open(place.work / "out.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            forge(tar)
        return place.run("pass")

    for module in (measure, sandbox):  # the host never opens it
        assert "tarfile" not in Path(module.__file__).read_text()
    before = sorted(os.listdir("/tmp"))
    tried = {what: FORGED[what] for what in sample(list(FORGED), 2)}
    tally("archives", {what: (lambda forge=forge: run(forge), ODD) for what, forge in tried.items()}, figure)
    assert not {n for n in set(os.listdir("/tmp")) - set(before) if "escaped" in n}


def test_probes_in_a_real_training(hostile, figure):
    """Under the real PID 1, with the real mounts."""
    names = [p.name for p in probes.PROBES if p.group != "limits"]
    source, place, started = Path(probes.__file__).read_text(), hostile(), time.monotonic()
    place.run(f"open('/tmp/probes.py', 'w').write({source!r})\nsys.path.insert(0, '/tmp')\n"
              "os.environ['PROBE_HOST'] = '{\"port\": 9, \"abstract\": \"none\", \"folder\": \"/none\"}'\n"
              f"import probes\nprobes.main({names})")  # fmt: skip
    answers = [json.loads(line) for line in place.log.read_text().splitlines() if line.startswith('{"probe"')]
    wrong = [a for a in answers if a.get("open") is not False]
    seconds = round(time.monotonic() - started, 1)
    figure("sandbox: in a training", len(answers), len(wrong), engine=engine_name(), seconds=seconds)
    assert wrong == [] and [a["probe"] for a in answers] == names


def test_no_probe_gets_through_and_every_control_does(chosen, tmp_path, figure):
    outside = Outside(tmp_path / "outside")
    table = [p for p in probes.PROBES if not engine.missing_limits() or p.lift not in CGROUP_LIFTS]
    controls = [p for p in table if not cannot(p)]
    started, held, opened = time.monotonic(), {}, {}
    for names, lifted, memory in outside.batches(table, False):
        held |= outside.probe(names, lifted, memory)
    seconds = time.monotonic() - started
    with outside.with_neighbour():
        for names, lifted, memory in outside.batches(controls, True):
            opened |= outside.probe(names, lifted, memory)
    for group in sorted({p.group for p in table}):
        names = [p.name for p in table if p.group == group]
        wrong = [n for n in names if held[n].get("open") is not False]
        figure(f"sandbox: {group}", len(names), len(wrong), engine=engine_name(), seconds=round(seconds, 1),
               controls=sum(opened.get(n, {}).get("open") is True for n in names))  # fmt: skip
    assert {n: a for n, a in held.items() if a.get("open") is not False} == {}
    assert {n: a for n, a in opened.items() if a.get("open") is not True} == {}
    assert len(held) == len(table) and len(opened) == len(controls)


def test_when_the_process_outside_is_killed_the_sandboxes_end_by_themselves(abandoned):
    place, prefix = abandoned
    deadline = time.monotonic() + AMPLE
    while prefix in names():
        assert time.monotonic() < deadline, names()
        time.sleep(0.5)
    place.check()


def test_an_engine_that_holds_no_limits_is_named_before_a_training_starts(monkeypatch, capsys, tmp_path):
    """Rootless podman on cgroup v1."""
    monkeypatch.setattr(engine, "missing_limits", lambda: list(engine.LIMITS))
    monkeypatch.setattr(engine, "rootless", lambda: True)
    assert install.doctor() == 1
    shown = next(line for line in capsys.readouterr().out.splitlines() if " limits " in line)
    assert shown.startswith("BAD ") and "IGNORES memory, process, CPU limits" in shown
    monkeypatch.setattr(measure, "Log", lambda path: pytest.fail(capsys.readouterr().err or "no warning"))
    with pytest.raises(pytest.fail.Exception, match="warning: this engine enforces no memory, process, CPU limits"):
        measure.run(measure.Job(tmp_path, tmp_path, BUDGET, MEMORY, 1, tmp_path / "log", "none"))
