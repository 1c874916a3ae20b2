"""Podman or docker: which one, its options, GPUs, containers, and the image that is there. install.py builds it."""

from __future__ import annotations

import functools
import hashlib
import os
import resource
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import git
from project import ROOT, Refused

IMAGE = ROOT / "container" / "image"  # what the image is built from
ENGINES = ("podman", "docker")  # in the order in which they are tried
REGISTRY_BASE = "docker.io/library/python:3.12-slim"
DEBIAN_BASE = "localhost/autoresearch-base:" + hashlib.sha256((IMAGE / "base_image.sh").read_bytes()).hexdigest()[:12]
UID = "10001:10001"  # nobody on the host
PIDS = 512  # data loader workers and threads fit, a fork bomb does not
ULIMITS = (("nofile", 8192, resource.RLIMIT_NOFILE), ("nproc", 4096, resource.RLIMIT_NPROC))
TMP_SIZE = "2g"  # /tmp inside, counts against the memory limit
SHM_SIZE = "2g"  # shared memory of data loader workers, likewise
KILL_TRIES = 5  # the engines wait some 10 s each time


@dataclass
class Container:
    """What runs, and all that it may have of this machine."""

    name: str
    image: str
    command: list[str]
    memory: str  # as the engines write it, such as 3g
    limit_s: float  # the third line of defence: PID 1 inside keeps the time, and the caller kills
    mounts: dict[str, Path]  # path inside: path on the host; all read-only
    out_size: str | None = None  # of a tmpfs at /out
    gpu: bool = True
    device: int = 0  # number of the device lock that is held
    # a folder at /writable, for our own data preparation only, which then runs as the caller; so is a network
    writable: Path | None = None
    network: str = "none"
    background: bool = False  # at most one core, and only what the others leave of it
    shared_as: str = ""  # whose leftovers it belongs to, where not to those of this worktree's experiments: see sweep
    environment: dict[str, str] = field(default_factory=dict)
    launch: Sequence[str] = ()  # program.md's command that finds a node and starts there what follows it
    folder: Path | None = None  # to start in, here or on that node
    keep_open: Sequence[int] = ()  # files that the client holds open too, so that a lock on them lasts as long


def run(argv: list[str], **options) -> subprocess.CompletedProcess:
    """Run a command to its end, its output captured as text."""
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", **options)


@functools.lru_cache(maxsize=None)
def name() -> str:
    """podman or docker, whichever answers first; AR_ENGINE asks for one. Raises Refused when neither does."""
    wanted = os.environ.get("AR_ENGINE")
    for engine in ENGINES:
        if wanted in (None, engine) and shutil.which(engine) and run([engine, "version"]).returncode == 0:
            return engine
    silent = f"{wanted} does not answer" if wanted else "neither podman nor docker answers"
    raise Refused(f"no container engine: {silent}; run ./run.sh setup")


@functools.lru_cache(maxsize=None)
def client() -> tuple[str, ...]:
    """The client and its global options. crun refuses the mixed cgroup layout, runc does not."""
    if name() == "podman" and Path("/sys/fs/cgroup/unified").is_dir() and shutil.which("runc"):
        return ("podman", "--runtime", "runc")
    return (name(),)


def rootless() -> bool:
    if name() == "podman":
        return os.geteuid() != 0
    return "rootless" in run(["docker", "info", "--format", "{{.SecurityOptions}}"]).stdout


def limits_hold() -> bool:
    """Whether memory, process and CPU limits are enforced: not by rootless podman on cgroup v1."""
    return not rootless() or Path("/sys/fs/cgroup/cgroup.controllers").exists()


@functools.lru_cache(maxsize=None)
def gpus() -> int:
    """How many GPUs this machine has."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = run(["nvidia-smi", "-L"])
    return listed.stdout.count("GPU ") if listed.returncode == 0 else 0


def gpu_options(device: int) -> list[str]:
    """Options that pass one GPU through. podman 4 ignores --gpus without a word, so it gets CDI."""
    if not gpus():
        return []
    if name() == "podman":
        return ["--device", f"nvidia.com/gpu={device % gpus()}"]
    return ["--gpus", f"device={device % gpus()}"]


def ulimits() -> list[str]:
    """Always given: where CAP_SYS_RESOURCE is missing, podman's own defaults lie above what it may set."""
    options = []
    for limit, most, which in ULIMITS:
        hard = resource.getrlimit(which)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        options.append(f"--ulimit={limit}={value}:{value}")
    return options


def label(shared_as: str = "") -> str:
    """The label of the containers of this worktree's experiments, or of a job that there is one of in all worktrees."""
    folder = git.folder("--git-common-dir" if shared_as else "--git-dir")
    mark = "autoresearch=" + hashlib.sha256(str(folder).encode()).hexdigest()[:12]
    return f"{mark}-{shared_as}" if shared_as else mark


def arguments(c: Container) -> list[str]:
    """argv of a locked-down `run`: no network, read-only, no privileges; memory, processes and tmpfs are limited."""
    user = UID
    if c.writable:  # the caller, whom root inside is in a rootless engine
        user = "0:0" if rootless() else f"{os.getuid()}:{os.getgid()}"
    options = [
        "--rm", "-i", "--name", c.name, "--label", label(c.shared_as), "--pull", "never",
        "--network", c.network, "--hostname", "sandbox", "--user", user,
        "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
        "--security-opt", f"seccomp={IMAGE / 'seccomp.json'}", "--ipc", "private", "--log-driver", "none",
        "--stop-signal", "SIGKILL",  # PID 1 ignores any other, and podman rm -f would wait 10 s for it
        "--pids-limit", str(PIDS), "--memory", c.memory, "--memory-swap", c.memory, "--shm-size", SHM_SIZE,
        "--ulimit", "core=0:0", *ulimits(), "--workdir", "/tmp",
        "--tmpfs", f"/tmp:rw,nosuid,nodev,size={TMP_SIZE},mode=1777,exec",  # exec: what torch.compile builds
        # threads that wait sleep: spinning, a busy machine trained 6 and 9 times slower (two pairs)
        "--env", "OMP_WAIT_POLICY=PASSIVE", *(f"--env={key}={value}" for key, value in c.environment.items()),
        *(f"--volume={host.resolve()}:{inside}:ro" for inside, host in c.mounts.items()),
    ]  # fmt: skip
    if c.writable:
        options.append(f"--volume={c.writable.resolve()}:/writable:rw")
    if c.out_size:
        options += ["--tmpfs", f"/out:rw,nosuid,nodev,noexec,size={c.out_size},mode=1777"]
    if c.background:
        options += ["--cpu-shares", "2"]
    if name() == "podman":
        options += ["--read-only-tmpfs=false", "--http-proxy=false", "--security-opt", "label=disable"]
        options += ["--timeout", str(int(c.limit_s) + 30)]
    if c.launch:
        return on_node(c, options)
    cpus = "1" if c.background else str(os.cpu_count())
    gpu = gpu_options(c.device) if c.gpu else []
    return [*client(), "run", "--cpus", cpus, *gpu, *options, c.image, *c.command]


def on_node(c: Container, options: list[str]) -> list[str]:
    """argv of the launch command and of on_node.sh, which adds what only the node knows: its GPUs and CPUs."""
    script, folder, gpu = Path(__file__).with_name("on_node.sh"), c.folder.resolve(), "gpu" if c.gpu else "none"
    job = "" if "SLURM_JOB_ID" in os.environ else "own"
    words = ["sh", str(script), str(folder), gpu, job, " ".join(client()), *options, c.image, *c.command]
    if any(Path(word).name == "ssh" for word in c.launch):  # it joins the words, and a shell there takes them apart
        words = [shlex.quote(word) for word in words]
    return [*c.launch, *words]


def kill(container: str) -> None:
    """End a container and wait until it is gone: 500 processes take their time to die. Quiet when it already is."""
    for _ in range(KILL_TRIES):
        removed = run([*client(), "rm", "-f", container]).returncode == 0
        if removed or run([*client(), "container", "inspect", container]).returncode:
            return


def sweep(shared_as: str = "") -> None:
    """Remove containers that a killed run left. Only under the lock of who starts them: they have no owner then."""
    left = run([*client(), "ps", "-aq", "--filter", f"label={label(shared_as)}"]).stdout.split()
    if left:
        run([*client(), "rm", "-f", *left])


def image_tag(base: str) -> str:
    """The tag is a hash of everything the image is made of, so an unchanged one is found at once."""
    content = base.encode() + b"".join((IMAGE / f).read_bytes() for f in ("Containerfile", "requirements.txt"))
    return f"localhost/autoresearch:{hashlib.sha256(content).hexdigest()[:12]}"


def image_id(tag: str) -> str:
    """The image's own id, '' when there is none."""
    return run([*client(), "image", "inspect", "--format", "{{.Id}}", tag]).stdout.strip()


def find_image() -> str:
    """The id of the image that is built: a tag may name another one tomorrow. Raises Refused when there is none."""
    for base in (REGISTRY_BASE, DEBIAN_BASE):
        if found := image_id(image_tag(base)):
            return found
    raise Refused("the image is not built, or container/image has changed since; run ./run.sh setup")
