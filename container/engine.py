#!/usr/bin/env python3
"""The container engine: find it, build the image, start a sandbox, sweep up. Host side, standard library only.

usage: engine.py name | gpus | image | sweep | data FOLDER NAME ...

`name` prints podman or docker, `image` builds what is missing and prints its id, `sweep` removes what a killed
run left behind, `data` makes data/NAME. When something is missing: one line, exit 2 (3 where ./run.sh setup helps).
"""

from __future__ import annotations

import functools
import hashlib
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENGINES = ("podman", "docker")  # the order in which they are asked
REGISTRY_BASE = "docker.io/library/python:3.12-slim"
DEBIAN_BASE = "localhost/autoresearch-base:" + hashlib.sha256((HERE / "base_image.sh").read_bytes()).hexdigest()[:12]
PULL_TIMEOUT_S = 600
CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
UID = "10001:10001"  # nobody on the host
PIDS = 512  # data loader workers and threads fit, a fork bomb does not
FILES = 8192  # open files
DATA_MEMORY = "8g"  # for preparing a data set
DATA_LIMIT_S = 24 * 3600  # a server may ask for long pauses
GIVEN = ("odvg", "annotations", "images", "weights")  # folders for prepare_data.py; images may be an archive
FETCHED = {"ukiyo-e": {"--annotations", "--images", "--weights"}}  # data from the network, unless all this is given
PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "HF_ENDPOINT")
TMP_SIZE = "2g"  # /tmp inside, counts against the memory limit
SHM_SIZE = "2g"  # shared memory of data loader workers, likewise
KILL_TRIES = 5  # the engines wait some 10 s each time


class EngineError(Exception):
    """Something is missing; the message says what to do."""


class MissingTool(EngineError):
    """A tool that ./run.sh setup installs; exit 3."""


@functools.lru_cache(maxsize=None)
def name() -> str:
    """podman or docker, whichever answers first. Raises EngineError when neither does."""
    asked = os.environ.get("AR_ENGINE")
    for engine in ENGINES:
        if (
            asked in (None, engine)
            and shutil.which(engine)
            and (engine == "podman" or run([engine, "version"]).returncode == 0)
        ):
            return engine
    raise EngineError(f"no container engine: {asked or 'neither podman nor docker'} answers; run ./run.sh setup")


def run(argv: list[str], **kw) -> subprocess.CompletedProcess:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", **kw)


@functools.lru_cache(maxsize=None)
def quirks() -> tuple[str, ...]:
    """Ulimits, always named: where CAP_SYS_RESOURCE is missing, podman's own defaults lie above what it may set."""
    flags = []
    for name_, most, which in (("nofile", FILES, resource.RLIMIT_NOFILE), ("nproc", 4096, resource.RLIMIT_NPROC)):
        hard = resource.getrlimit(which)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        flags += ["--ulimit", f"{name_}={value}:{value}"]
    return tuple(flags)


@functools.lru_cache(maxsize=None)
def client() -> tuple[str, ...]:
    """The client and its global flags. crun refuses the mixed cgroup layout, runc does not."""
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
    listed = run(["nvidia-smi", "-L"]) if shutil.which("nvidia-smi") else None
    return listed.stdout.count("GPU ") if listed and listed.returncode == 0 else 0


def gpu_flags() -> tuple[str, ...]:
    """Flags that pass the GPU of this run through, none without one.

    podman 4 ignores --gpus without a word, so it gets CDI. AR_DEVICE is the number of the lock that run.sh holds.
    """
    if not gpus():
        return ()
    one = int(os.environ.get("AR_DEVICE") or 0) % gpus()
    return ("--device", f"nvidia.com/gpu={one}") if name() == "podman" else ("--gpus", f"device={one}")


def launch() -> list[str]:
    """program.md's `launch`: words of a command that finds a node and starts there what follows them; none is here."""
    return os.environ.get("AR_LAUNCH", "").split()


def caller() -> str:
    """The user inside that is the caller outside: root in a rootless engine is the caller."""
    return "0:0" if rootless() else f"{os.getuid()}:{os.getgid()}"


def label(whole_repository: bool = False) -> str:
    """The mark of this worktree's containers, or of those that there is one of in all worktrees."""
    which = "--git-common-dir" if whole_repository else "--git-dir"
    folder = run(["git", "-C", str(HERE), "rev-parse", "--path-format=absolute", which]).stdout.strip()
    return "autoresearch=" + hashlib.sha256(folder.encode()).hexdigest()[:12] + "-background" * whole_repository


def sandbox(
    container: str,
    image: str,
    command: list[str],
    *,
    memory: str,
    limit_s: int,
    mounts: dict,
    out_size: str | None = None,
    gpu: bool = True,
    writable: Path | None = None,
    background: bool = False,
    network: str = "none",
    environment: dict | None = None,
    folder: Path | None = None,
) -> list[str]:
    """argv of a locked-down `run`: no network, read-only, no privileges; memory, processes and tmpfs are limited.

    mounts: path inside -> path on the host, all read-only. out_size: size of a tmpfs at /out. writable: a folder of
    the caller's at /writable, for our own data preparation only, which then runs as the caller; so is a network.
    background: at most one core, and only what the other containers leave of it; a mark that sweep does not know.
    folder: start in it, on the node that program.md's launch command finds; without one, and without `folder`, here.
    The run limit here is only the third line of defence: PID 1 inside keeps the time, and the caller kills.
    """
    away = launch() if folder else []
    flags = [
        "--rm",
        "-i",
        "--name",
        container,
        "--network",
        network,
        "--stop-signal",
        "SIGKILL",  # PID 1 ignores any other, and podman rm -f would wait 10 s for it
        "--label",
        label(background),
        "--read-only",
        "--cap-drop",
        "ALL",
        "--security-opt",
        "no-new-privileges",
        "--security-opt",
        f"seccomp={HERE / 'seccomp.json'}",
        "--user",
        caller() if writable else UID,
        "--pids-limit",
        str(PIDS),
        "--memory",
        memory,
        "--memory-swap",
        memory,
        "--ipc",
        "private",
        "--shm-size",
        SHM_SIZE,
        "--ulimit",
        "core=0:0",
        "--hostname",
        "sandbox",
        # threads that wait sleep: spinning, a busy machine trained 6 and 9 times slower (two pairs)
        "--env",
        "OMP_WAIT_POLICY=PASSIVE",
        "--workdir",
        "/tmp",
        "--log-driver",
        "none",
        "--pull",
        "never",
        "--tmpfs",
        f"/tmp:rw,nosuid,nodev,size={TMP_SIZE},mode=1777,exec",
    ]  # exec: what torch.compile builds
    if not away:
        flags += ["--cpus", "1" if background else str(os.cpu_count())]
    if background:
        flags += ["--cpu-shares", "2"]
    if out_size:
        flags += ["--tmpfs", f"/out:rw,nosuid,nodev,noexec,size={out_size},mode=1777"]
    if name() == "podman":
        flags += [
            "--read-only-tmpfs=false",
            "--http-proxy=false",
            "--security-opt",
            "label=disable",
            "--timeout",
            str(limit_s + 30),
        ]
    for inside, host in mounts.items():
        flags += ["-v", f"{Path(host).resolve()}:{inside}:ro"]
    for key, value in (environment or {}).items():
        flags += ["--env", f"{key}={value}"]
    if writable:
        flags += ["-v", f"{writable.resolve()}:/writable:rw"]
    if not away:
        return [*client(), "run", *flags, *quirks(), *(gpu_flags() if gpu else ()), image, *command]
    there = [
        "sh",
        str(HERE / "on_node.sh"),
        str(folder.resolve()),
        "gpu" if gpu else "none",
        "" if "SLURM_JOB_ID" in os.environ else "own",
        " ".join(client()),
        *flags,
        *quirks(),
        image,
        *command,
    ]
    return away + ([shlex.quote(word) for word in there] if any(Path(word).name == "ssh" for word in away) else there)


def kill(container: str) -> None:
    """End a container and wait until it is gone: 500 processes take their time to die. Quiet when it already is."""
    for _ in range(KILL_TRIES):
        if run([*client(), "rm", "-f", container]).returncode == 0:
            return
        if run([*client(), "container", "inspect", container]).returncode:
            return


def sweep(background: bool = False) -> None:
    """Remove containers that a killed run left. Only under the lock of who starts them: they have no owner then."""
    left = run([*client(), "ps", "-aq", "--filter", f"label={label(background)}"]).stdout.split()
    if left:
        run([*client(), "rm", "-f", *left])


def image_tag(base: str) -> str:
    """The tag is a hash of everything the image is made of, so an unchanged one is found at once."""
    h = hashlib.sha256(base.encode())
    for f in ("Containerfile", "requirements.txt"):
        h.update((HERE / f).read_bytes())
    return f"localhost/autoresearch:{h.hexdigest()[:12]}"


def exists(tag: str) -> str:
    """The image's own id, '' when there is none."""
    return run([*client(), "image", "inspect", "--format", "{{.Id}}", tag]).stdout.strip()


def find_image() -> str:
    """The id of the image that is built: a tag may name another one tomorrow. Raises EngineError when there is none."""
    for base in (REGISTRY_BASE, DEBIAN_BASE):
        if found := exists(image_tag(base)):
            return found
    raise EngineError("the image is not built, or container/ has changed since; run ./run.sh setup")


def image() -> str:
    """Find or build the image, return its id."""
    try:
        return find_image()
    except EngineError:
        base = make_base()
    say(f"building the image from {base}: torch and its friends, about 3 GB to fetch, 5 to 10 minutes")
    secrets = tempfile.mkdtemp(prefix="ar-build-")
    try:
        files = pip_secrets(Path(secrets))
        argv = [*client(), "build", "--build-arg", f"BASE={base}", "-t", image_tag(base)]
        for key, path in files.items():
            argv += ["--secret", f"id={key},src={path}"]
        done = subprocess.run(
            [*argv, *(quirks() if name() == "podman" else ()), str(HERE)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            env={**os.environ, "DOCKER_BUILDKIT": "1"},
        )
    finally:
        shutil.rmtree(secrets)
    if done.returncode:
        raise EngineError(f"{name()} build failed (see above); mend it and run ./run.sh setup again")
    return find_image()


def make_base() -> str:
    """A base image: from the registry, or, where none is reached, made from this machine's Debian packages."""
    try:
        if exists(REGISTRY_BASE) or run([*client(), "pull", REGISTRY_BASE], timeout=PULL_TIMEOUT_S).returncode == 0:
            return REGISTRY_BASE
    except subprocess.TimeoutExpired:
        pass
    say("no image registry in reach: making a base image from Debian packages")
    if not shutil.which("mmdebstrap"):
        raise MissingTool("mmdebstrap is missing, with which the base image is made; install it, or run ./run.sh setup")
    if not exists(DEBIAN_BASE):
        with tempfile.TemporaryDirectory(prefix="ar-base-") as d:
            subprocess.run([str(HERE / "base_image.sh"), f"{d}/base.tar"], check=True, stdout=sys.stderr)
            subprocess.run([*client(), "import", f"{d}/base.tar", DEBIAN_BASE], check=True, stdout=sys.stderr)
    return DEBIAN_BASE


def pip_secrets(folder: Path) -> dict[str, Path]:
    """The host's pip index settings and certificates, for the build step alone. Its paths mean nothing inside."""
    keep = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout")
    lines = []
    for line in run(["python3", "-m", "pip", "config", "list"]).stdout.splitlines():
        key, _, value = line.partition("=")
        option, value = key.rsplit(".", 1)[-1], value.strip("'\"")
        if option in keep and "file:" not in value:
            lines.append(f"{option} = {value}\n")
    (folder / "pip.conf").write_text("[global]\n" + "".join(lines))
    return {"pip_conf": folder / "pip.conf", "ca": certificates()}


def certificates() -> Path:
    """This machine's certificate authorities, which may include the company's own."""
    ca = next((p for p in CA_BUNDLES if Path(p).exists()), None)
    if not ca:
        raise EngineError("no certificate bundle found under /etc/ssl; install ca-certificates")
    return Path(ca)


def data(folder: str, *args: str) -> int:
    """Run prepare_data.py to make the data set data/<name>. `folder` is data/, args are its own; returns its status."""
    options = list(args)
    mounts = {"/repo/prepare_data.py": HERE.parent / "prepare_data.py", "/repo/container": HERE}
    for what in GIVEN:
        if f"--{what}" in options[:-1]:
            at = options.index(f"--{what}") + 1
            given, options[at] = Path(options[at]), f"/{what}"
            if not (given.is_dir() or what == "images" and given.is_file()):
                raise EngineError(f"--{what} {given}: no such folder; README says what belongs in it")
            mounts[f"/{what}"] = given
    online = args[0] in FETCHED and "--add" not in options and not FETCHED[args[0]] <= set(options)
    environment = {"PROGRESS": "1"} if sys.stderr.isatty() else {}
    if online:
        environment.update({key: os.environ[key] for key in PASSED_ON if key in os.environ})
        environment.update(dict.fromkeys(("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"), "/ca.pem"))
        mounts["/ca.pem"] = os.environ.get("SSL_CERT_FILE") or certificates()
    Path(folder).mkdir(exist_ok=True)
    command = ["python", "/repo/prepare_data.py", *options, "--out", f"/writable/{args[0]}"]
    argv = sandbox(
        f"ar-{os.getpid()}-data",
        image(),
        command,
        memory=DATA_MEMORY,
        limit_s=DATA_LIMIT_S,
        mounts=mounts,
        gpu=False,
        writable=Path(folder),
        network="host" if online else "none",
        environment=environment,
    )
    return subprocess.run(argv, stdin=subprocess.DEVNULL).returncode


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


COMMANDS = {
    "name": lambda: print(name()),
    "gpus": lambda: print(gpus()),
    "image": lambda: print(image()),
    "sweep": sweep,
    "data": lambda *args: sys.exit(data(*args)),
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(__doc__)
    try:
        COMMANDS[sys.argv[1]](*sys.argv[2:])
    except (EngineError, subprocess.CalledProcessError) as e:
        say(f"run.sh: {e}")
        sys.exit(3 if isinstance(e, MissingTool) else 2)
