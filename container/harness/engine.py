"""Podman or docker: which one, its options, GPUs, containers, and the image that is there. install.py builds it."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import resource
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import git
from project import IMAGE_MADE_OF, ROOT, Broken, Refused

IMAGE = ROOT / "container" / "image"  # what the image is built from
ENGINES = ("podman", "docker")  # in the order in which they are tried
IMAGE_NAME = "localhost/autoresearch"
IMAGE_LABEL = "autoresearch-image"  # of those that setup built: where another one takes its name, it has this alone
REGISTRY_BASE = "docker.io/library/python:3.12-slim"
DEBIAN_BASE = "localhost/autoresearch-base:" + hashlib.sha256((IMAGE / "base_image.sh").read_bytes()).hexdigest()[:12]
UID = "10001:10001"  # nobody on the host
PIDS = 512  # data loader workers and threads fit, a fork bomb does not; with many CPUs more: see on_node.sh
PIDS_PER_CPU = 8
ULIMITS = (("nofile", 8192, resource.RLIMIT_NOFILE), ("nproc", 4096, resource.RLIMIT_NPROC))
TMP_SIZE = "2g"  # /tmp inside, counts against the memory limit
SHM_SIZE = "2g"  # shared memory of data loader workers, likewise
KILL_TRIES = 5  # the engines wait some 10 s each time
GPU = re.compile(r"GPU (\d+): (.+) \(UUID: (.+)\)")  # a line of `nvidia-smi -L`
SLICE = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (.+)\)")  # likewise, beneath its GPU's
NO_GPU = ("", "-1", "NoDevFiles")  # in CUDA_VISIBLE_DEVICES; what stands behind one of them is not seen either
NVIDIA = Path("/proc/driver/nvidia/gpus")  # there as soon as the driver is
SMI_TIMEOUT_S = 60  # a GPU in trouble can keep nvidia-smi waiting for ever
WSL = Path("/dev/dxg")  # all GPUs of Windows are this device, for which CDI has one name
LIMITS = {"memory": "memory", "process": "pids", "CPU": "cpu"}  # and the cgroup controllers that hold them
DOCKER_HOLDS = "{{if .MemoryLimit}}memory {{end}}{{if .PidsLimit}}pids {{end}}{{if .CpuCfsQuota}}cpu{{end}}"


class EngineMissing(Broken):
    """None is installed."""


class ImageMissing(Broken):
    """The engine answers, and does not have the image."""


@dataclass(frozen=True)
class Gpu:
    """A GPU, or one slice of it (MIG)."""

    name: str  # as CDI and docker count them: 0, or 0:1 for a slice
    uuid: str
    model: str


@dataclass
class Container:
    """What runs, and all that it may have of this machine."""

    name: str
    image: str
    command: list[str]
    memory: str  # as the engines write it, such as 3g
    mounts: dict[str, Path]  # path inside: path on the host; all read-only
    out_size: str | None = None  # of a tmpfs at /out
    device: int | None = None  # number of the device lock that is held; None: it gets no GPU
    # a folder at /writable, for our own data preparation only, which then runs as the caller; so is a network
    writable: Path | None = None
    network: str = "none"
    background: bool = False  # at most one core, and only what the others leave of it
    shared_as: str = ""  # whose leftovers it belongs to, where not to those of this worktree's experiments: see sweep
    environment: dict[str, str] = field(default_factory=dict)
    launch: Sequence[str] = ()  # program.md's command that finds a node and starts there what follows it
    folder: Path | None = None  # to start in, here or on that node


def run(argv: list[str], **options) -> subprocess.CompletedProcess:
    """Run a command to its end, its output captured as text."""
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", **options)


def words_of(failed: subprocess.CompletedProcess) -> str:
    """What a command said before it failed, as one short line."""
    return " ".join((failed.stderr or failed.stdout).split())[-300:] or f"it ended with {failed.returncode}"


@functools.lru_cache(maxsize=None)
def name() -> str:
    """podman or docker, whichever answers first; AR_ENGINE asks for one. Raises EngineMissing, Refused."""
    wanted, silent = os.environ.get("AR_ENGINE"), []
    for engine in ENGINES:
        if wanted in (None, engine) and shutil.which(engine):
            asked = run([engine, "version"])
            if asked.returncode == 0:
                return engine
            silent.append(f"{engine} does not answer: {words_of(asked)}")
    if silent:
        raise Broken(f"no container engine: {'; '.join(silent)}; mend that, then try again")
    raise EngineMissing(f"no container engine: {wanted or 'neither podman nor docker'} is here; run ./run.sh setup")


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


@functools.lru_cache(maxsize=None)
def missing_limits() -> list[str]:
    """The limits that this engine cannot hold: a kernel or systemd may withhold cgroup controllers. Raises Refused."""
    if name() == "podman" and not rootless():
        return []
    asked = DOCKER_HOLDS if name() == "docker" else "{{.Host.CgroupControllers}}"
    info = run([*client(), "info", "--format", asked])
    if info.returncode:
        raise Broken(f"{name()} fails: {words_of(info)}; ./run.sh doctor says more")
    controllers = re.findall(r"\w+", info.stdout)
    return [limit for limit, controller in LIMITS.items() if controller not in controllers]


@functools.lru_cache(maxsize=None)
def all_gpus() -> tuple[Gpu, ...]:
    """Every GPU of this machine, or the slices it is cut into. Raises Refused where they do not answer."""
    if not shutil.which("nvidia-smi"):
        if NVIDIA.is_dir():
            remedy = "install it (the driver's nvidia-utils), or set CUDA_VISIBLE_DEVICES=-1 to train on the CPU"
            raise Broken(f"there is an NVIDIA GPU ({NVIDIA}), but no nvidia-smi: {remedy}")
        return ()
    listed = run(["timeout", "-k", "5", str(SMI_TIMEOUT_S), "nvidia-smi", "-L"])
    found: dict[str, Gpu] = {}
    for line in listed.stdout.splitlines():
        if whole := GPU.match(line):
            number, model, uuid = whole.groups()
            found[number] = Gpu(number, uuid, model)
        elif part := SLICE.match(line):
            found.pop(number, None)  # a GPU that is cut can only be used in slices
            found[f"{number}:{part[2]}"] = Gpu(f"{number}:{part[2]}", part[3], f"{model} MIG {part[1]}")
    if listed.returncode or not found:
        remedy = "restart this machine or mend its driver; with CUDA_VISIBLE_DEVICES=-1 trainings run on the CPU"
        raise Broken(f"this machine's GPU does not answer (nvidia-smi: {words_of(listed)}); {remedy}")
    return tuple(found.values())


def gpus() -> list[Gpu]:
    """Those for trainings: what CUDA_VISIBLE_DEVICES names, or all; of these, the first one's model. Raises Refused."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        visible = list(all_gpus())
    else:
        words = itertools.takewhile(lambda word: word not in NO_GPU, map(str.strip, named.split(",")))
        visible = list(dict.fromkeys(map(gpu_called, words)))
    return [gpu for gpu in visible if gpu.model == visible[0].model]


def gpu_fault() -> str:
    """What has become of the GPUs since this process asked for the first time; '' while they are as they were."""
    if not gpus():
        return ""
    try:
        now = all_gpus.__wrapped__()  # past the cache, which stays: results belong to the device it knows
    except Refused as e:
        return str(e)
    return "" if now == all_gpus() else "a GPU has gone since this began; see ./run.sh doctor"


def gpu_called(word: str) -> Gpu:
    """The one that a word of CUDA_VISIBLE_DEVICES means: a number or a (shortened) UUID. Raises Refused."""
    for gpu in all_gpus():
        if word in (gpu.name, gpu.name.partition(":")[0]) or gpu.uuid.startswith(word) and not word.isdigit():
            return gpu
    there = ", ".join(f"{gpu.name} ({gpu.uuid})" for gpu in all_gpus()) or "none"
    raise Broken(f"CUDA_VISIBLE_DEVICES names a GPU '{word}' that is not here; nvidia-smi knows: {there}")


def device_kind() -> str:
    """What trainings run on here: cpu, or the GPU's model. Raises Refused."""
    return gpus()[0].model if gpus() else "cpu"


def slots(program) -> list[int]:
    """Numbers of the locks of which a training takes one: a GPU's place among all, or with more trainings than GPUs
    that place once more, and so on. A launch command looks after its nodes' GPUs. Raises Refused.
    """
    usable = [] if program.launch else [all_gpus().index(gpu) for gpu in gpus()]
    if not usable:
        return list(range(program.devices or 1))
    count = program.devices or len(usable)
    return [usable[n % len(usable)] + n // len(usable) * len(all_gpus()) for n in range(count)]


def gpu_options(slot: int) -> list[str]:
    """Options that pass one GPU through. podman 4 ignores --gpus without a word, so it gets CDI."""
    if not gpus():
        return []
    gpu = all_gpus()[slot % len(all_gpus())].name
    if name() == "podman":
        return ["--device", f"nvidia.com/gpu={'all' if WSL.exists() else gpu}"]
    return ["--gpus", f"device={gpu}"]


def mount(outside: Path, inside: str, more: str = "") -> list[str]:
    """What a container sees of this machine. A row of CSV, in which any character of a path can be quoted."""
    source = str(outside.resolve()).replace('"', '""')
    return ["--mount", f'type=bind,"source={source}",target={inside}{more}']


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
        "--security-opt", f"seccomp={IMAGE / 'seccomp.json'}", "--security-opt", "label=disable",
        "--ipc", "private", "--log-driver", "none",
        "--stop-signal", "SIGKILL",  # PID 1 ignores any other, and podman rm -f would wait 10 s for it
        *held("memory", "--memory", c.memory, "--memory-swap", c.memory), "--shm-size", SHM_SIZE,
        "--ulimit", "core=0:0", *ulimits(), "--workdir", "/tmp",
        "--tmpfs", f"/tmp:rw,nosuid,nodev,size={TMP_SIZE},mode=1777,exec",  # exec: what torch.compile builds
        # threads that wait sleep: spinning, a busy machine trained 6 and 9 times slower (two pairs)
        "--env", "OMP_WAIT_POLICY=PASSIVE", *(f"--env={key}={value}" for key, value in c.environment.items()),
        *(word for inside, outside in c.mounts.items() for word in mount(outside, inside, ",readonly")),
    ]  # fmt: skip
    if c.writable:
        options += mount(c.writable, "/writable")
    if c.out_size:
        options += ["--tmpfs", f"/out:rw,nosuid,nodev,noexec,size={c.out_size},mode=1777"]
    if c.background:
        options += held("CPU", "--cpu-shares", "2")
    if name() == "podman":
        options += ["--read-only-tmpfs=false", "--http-proxy=false"]
    if c.launch:
        return on_node(c, options)
    cpus = os.cpu_count()
    options += held("CPU", "--cpus", "1" if c.background else str(cpus))
    options += held("process", "--pids-limit", str(max(PIDS, PIDS_PER_CPU * cpus)))
    if c.device is not None:
        options += gpu_options(c.device)
    return [*client(), "run", *options, c.image, *c.command]


def held(limit: str, *options: str) -> tuple[str, ...]:
    """Options of a limit, left out where the engine cannot hold it: some would start nothing then."""
    return () if limit in missing_limits() else options


def on_node(c: Container, options: list[str]) -> list[str]:
    """argv of the launch command and of on_node.sh, which adds what only the node knows: its GPUs and CPUs."""
    script, folder = Path(__file__).with_name("on_node.sh"), c.folder.resolve()
    gpu = "none" if c.device is None else "gpu"
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
    content = base.encode() + b"".join((IMAGE / f).read_bytes() for f in IMAGE_MADE_OF)
    return f"{IMAGE_NAME}:{hashlib.sha256(content).hexdigest()[:12]}"


def image_id(tag: str) -> str:
    """The image's own id, '' when there is none. Raises Refused when the engine fails."""
    listed = run([*client(), "images", "-q", "--no-trunc", tag])
    if listed.returncode:
        raise Broken(f"{name()} fails: {words_of(listed)}; ./run.sh doctor says more")
    return listed.stdout.partition("\n")[0].strip().rpartition(":")[2]


def find_image() -> str:
    """The id of the image that is built: a tag may name another one tomorrow. Raises ImageMissing, Refused."""
    for base in (REGISTRY_BASE, DEBIAN_BASE):
        if found := image_id(image_tag(base)):
            return found
    raise ImageMissing("the image is not built, or container/image has changed since; run ./run.sh setup")
