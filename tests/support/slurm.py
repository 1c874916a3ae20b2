"""A Slurm of one node from Debian's packages, for a test: its own folder, key and ports; nothing in /etc is touched."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

CPUS = 16  # as told to Slurm, whatever the machine has
KILL_WAIT_S = 3  # from SIGTERM to SIGKILL when it ends a job
NODE_TIMEOUT_S = 10  # until a node that does not answer is down
CONF = """
ClusterName=tests
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={kill_wait}
OverTimeLimit=0
SlurmdTimeout={node_timeout}
SlurmctldTimeout=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """The three daemons, as processes of ours."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="ar-slurm-"))  # a socket's path has to be short
        self.host = platform.node().split(".")[0]
        self.env = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons = {}
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        (self.folder / "key").write_bytes(os.urandom(128))
        (self.folder / "key").chmod(0o400)
        fields = {"host": self.host, "user": whoami(), "folder": self.folder, "ports": free_ports(2), "cpus": CPUS}
        # other numbers than another Slurm's here: whoever watches over job 9 looks for the processes of any job 9
        fields["first_job"] = random.randrange(1000, 60_000_000)
        conf = CONF.format(**fields, kill_wait=KILL_WAIT_S, node_timeout=NODE_TIMEOUT_S)
        (self.folder / "slurm.conf").write_text(conf)
        own = [f"--{x}={self.folder}/munge.{x}" for x in ("socket", "pid-file", "log-file", "seed-file")]
        self.start("munged", "--foreground", "--force", f"--key-file={self.folder}/key", *own)
        wait_for(lambda: (self.folder / "munge.socket").exists(), 10)
        self.start("slurmctld", "-D")
        self.start_node()

    def start(self, name: str, *args: str) -> None:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                [shutil.which(name, path=path), *args],
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def start_node(self) -> None:
        self.start("slurmd", "-D", "-N", self.host)
        wait_for(lambda: self.call("sinfo", "-h", "-o", "%t").strip() == "idle", 30)

    def call(self, *argv: str) -> str:
        done = subprocess.run(argv, env={**os.environ, **self.env}, capture_output=True, text=True, timeout=30)
        return done.stdout + done.stderr

    def crash(self) -> None:
        """The node's daemon and what watches over its jobs die at once; the jobs' own processes do not."""
        self.daemons["slurmd"].kill()
        self.end_watchers()

    def end_watchers(self) -> None:
        """What watches over the jobs: where a job's processes were ended by others it may stay for ever."""
        mark = f"SLURM_CONF={self.folder}".encode()
        for p in Path("/proc").glob("[0-9]*/comm"):
            with contextlib.suppress(OSError):
                if p.read_text().startswith("slurmstepd") and mark in (p.parent / "environ").read_bytes():
                    os.kill(int(p.parent.name), signal.SIGKILL)

    def stop(self) -> None:
        self.call("scancel", "--user", whoami())
        for name in ("slurmd", "slurmctld", "munged"):
            self.daemons[name].terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.daemons[name].wait(10)
            self.daemons[name].kill()
        self.end_watchers()
        shutil.rmtree(self.folder)


def whoami() -> str:
    return subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()


def free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in listeners]
    for s in listeners:
        s.close()
    return ports


def wait_for(condition, seconds: float) -> float:
    """Until it holds; returns the seconds that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "too slow"
        time.sleep(0.1)
    return round(time.monotonic() - started, 1)
