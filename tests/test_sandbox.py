"""The sandbox against a hostile train.py: probes under the real flags on every engine found, then whole trainings."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import probes
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "container"))
import engine

PROBES_LIMIT_S = 120  # of one container full of probes
MEMORY, SMALL_MEMORY, MORE_MEMORY = "3g", "64m", "1g"
CGROUP_LIFTS = ("pids", "memory")  # limits that an engine without control groups cannot hold
# not ALL: a machine may lack one of them, and then docker starts nothing
CAPABILITIES = ("CHOWN DAC_OVERRIDE DAC_READ_SEARCH MKNOD NET_ADMIN NET_BIND_SERVICE NET_RAW SETFCAP SETGID SETUID SYS_ADMIN "
                "SYS_BOOT SYS_CHROOT SYS_MODULE SYS_NICE SYS_PACCT SYS_RAWIO SYS_TIME SYSLOG").split()  # fmt: skip
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
    with contextlib.suppress(engine.EngineError):
        return engine.find_image()
    found = [base for base in (engine.REGISTRY_BASE, engine.DEBIAN_BASE) if engine.exists(base)]
    return found[0] if found else pytest.skip("no image with a python3 in this engine's store")


def cannot(p: probes.Probe) -> list[str]:
    """Why the positive control of a probe cannot work on this machine and engine; usually nothing."""
    yama = Path("/proc/sys/kernel/yama/ptrace_scope")
    has = {"all": True, "yama": yama.exists() and yama.read_text().strip() != "0", "rootless": engine.rootless()}
    return [why for what, why in p.never.items() if has.get(what, what.startswith("/") and not Path(what).exists())]


def lifts(outside: Outside) -> dict[str, list[tuple]]:
    """name: (flags that engine.sandbox must have given, what stands there in a control)."""
    unmask = "unmask=ALL" if engine.name() == "podman" else "systempaths=unconfined"
    folder = outside.facts["folder"]
    size = [(f"size={engine.TMP_SIZE}", "size=4g"), ("size=64m", "size=256m")]
    return {
        "seccomp": [(f"seccomp={ROOT / 'container/seccomp.json'}", "seccomp=unconfined")],
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
        "input": [(":/input:ro", ":/input:rw")],
        "code": [(":/probes.py:ro", ":/probes.py:rw")],
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
        """engine.sandbox's own, with what is lifted replaced."""
        mounts = {"/probes.py": self.code, "/input": Path(self.facts["folder"]) / "input"}
        argv = engine.sandbox(container, image(engine.name()), ["python3", "-I", "/probes.py", *command], memory=memory,
                              limit_s=PROBES_LIMIT_S, mounts=mounts, out_size="64m", gpu=False,
                              environment={"PROBE_HOST": json.dumps(self.facts, separators=(",", ":"))})  # fmt: skip
        line = " ".join(argv)
        for name in lifted.split():
            for old, new in lifts(self)[name]:
                assert line.count(old) >= 1, f"engine.sandbox gives no {old}"
                line = line.replace(old, new)
        return line.split()

    def probe(self, names: list[str], lifted: str = "", memory: str = MEMORY) -> dict[str, dict]:
        """Run probes in one container: name -> answer."""
        self.runs += 1
        argv = self.argv(f"ar-{os.getpid()}-probes-{self.runs}", lifted, names, memory)
        done = engine.run(argv, timeout=PROBES_LIMIT_S + 60)
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


def test_no_probe_gets_through_and_every_control_does(chosen, tmp_path, figure):
    outside = Outside(tmp_path / "outside")
    table = [p for p in probes.PROBES if engine.limits_hold() or p.lift not in CGROUP_LIFTS]
    controls = [p for p in table if not cannot(p)]
    started, held, opened = time.monotonic(), {}, {}
    for names, lifted, memory in outside.batches(table, False):
        held |= outside.probe(names, lifted, memory)
    seconds = time.monotonic() - started
    with outside.with_neighbour():
        for names, lifted, memory in outside.batches(controls, True):
            opened |= outside.probe(names, lifted, memory)
    version = engine.run([*engine.client(), "--version"]).stdout.strip()
    kind = f"{version}, {'rootless' if engine.rootless() else 'rootful'}"
    for group in sorted({p.group for p in table}):
        names = [p.name for p in table if p.group == group]
        wrong = [n for n in names if held[n].get("open") is not False]
        figure(f"sandbox: {group}", len(names), len(wrong), engine=kind, seconds=round(seconds, 1),
               controls=sum(opened.get(n, {}).get("open") is True for n in names))  # fmt: skip
    assert {n: a for n, a in held.items() if a.get("open") is not False} == {}
    assert {n: a for n, a in opened.items() if a.get("open") is not True} == {}
    assert len(held) == len(table) and len(opened) == len(controls)
