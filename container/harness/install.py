"""What this machine needs, shown before it is installed: engine and image. And `doctor`: what the machine can hold."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import dataset
import display
import engine
import experiment
import git
import program
import settings
from history import History
from project import ROOT, Broken, Refused, read_json, say

ENGINE_PACKAGES = ("podman", "crun", "runc", "uidmap", "slirp4netns", "fuse-overlayfs", "ca-certificates")
PODMAN_CDI = (4, 1)  # from this version on it knows CDI
CGROUP_REMEDY = (
    "boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1), let systemd hand its controllers on (Delegate=cpu "
    "cpuset io memory pids in user@.service), or run as root"
)
PULL_TIMEOUT_S = 600
CONTAINED = "test -e /.dockerenv || test -e /run/.containerenv || grep -q ' / / .* - overlay ' /proc/self/mountinfo"
# In a container that may start others, namespaces and /proc can be had, as root or as a user, or dockerd is outside
NESTS = "! type unshare || unshare -mpf --mount-proc true || unshare -Urmpf --mount-proc true || docker version"
PIP_OPTIONS = "index-url|extra-index-url|trusted-host|proxy|timeout"  # of the host's that a build gets
CLIENT_VERSION = "2.1.328"  # the Claude Code that the tests drive
DISK_GB = 15  # for the image and some data
CUDA_DRIVER = 580  # NVIDIA driver branch that torch's default build (CUDA 13) wants
CUDA_PROOF = ["timeout", "120", "python", "-c", "import torch; print(torch.ones(8, device='cuda').sum().item() == 8)"]
MARKS = {True: "ok", None: "note", False: "BAD"}  # of doctor's findings
CLIENT_PLACES = ("~/.local/bin", "~/.claude/local", "~/.npm-global/bin", "~/.volta/bin", "~/node_modules/.bin")


def run(*command: str | Path, **options) -> None:
    """Run a command whose output a person watches. Raises Refused when it fails."""
    if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, **options).returncode:
        raise Refused(f"{Path(command[0]).name} failed (see above); fix that and try again")


def install_packages(what: str, *packages: str) -> None:
    """With Debian's package manager; asks on a terminal, never becomes root silently. Raises Refused."""
    if not shutil.which("apt-get"):
        raise Refused(f"{what} is missing; install it with your system's package manager, then try again")
    as_root = [] if os.geteuid() == 0 else ["sudo"]
    command = [*as_root, "apt-get", "install", "-y", "--no-install-recommends", *packages]
    say(f"{what} is missing. To install it:\n    {' '.join(command)}")
    if sys.stdin.isatty():
        print("Run this now? [y/N] ", end="", file=sys.stderr, flush=True)
        if sys.stdin.readline()[:1] not in ("y", "Y"):
            raise Refused("nothing was installed")
    elif as_root:
        raise Refused("run the command above, then try again")
    run(*as_root, "apt-get", "update", "-qq")
    run(*command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"})


def refuse_bare_pod() -> None:
    """Before minutes are spent for nothing. Raises Broken in a container that may start none, whatever is installed."""
    if engine.run(["sh", "-c", f"({CONTAINED}) && ! ({NESTS})"]).returncode == 0:
        remedy = "rent a virtual machine (at vast.ai: a VM template) or a pod that is privileged"
        raise Broken(f"this machine is itself a container and may start none, as most rented GPU pods are: {remedy}")


def need_image() -> str:
    """The image's id; the engine and the image are made where they are missing."""
    refuse_bare_pod()
    try:
        engine.name()
    except engine.EngineMissing:
        install_packages("a container engine", *ENGINE_PACKAGES)
    try:
        return engine.find_image()
    except engine.ImageMissing:
        return build_image()


def build_image() -> str:
    if lacks_passt():
        install_packages("passt, from which this podman has its network,", "passt")
    base = make_base()
    say(f"building the image from {base}: torch and its friends, about 3 GB to fetch, 5 to 10 minutes")
    with tempfile.TemporaryDirectory(prefix="ar-build-") as folder:
        pip = Path(folder, "pip.conf")
        pip.write_text(pip_settings())
        secrets = ["--secret", f"id=pip_conf,src={pip}", "--secret", f"id=ca,src={dataset.certificates()}"]
        options = ["--build-arg", f"BASE={base}", "-t", engine.image_tag(base), *secrets]
        options += ["--label", f"{engine.IMAGE_LABEL}=yes"]
        if engine.name() == "podman":
            options += engine.ulimits()
        run(*engine.client(), "build", *options, engine.IMAGE, env={**os.environ, "DOCKER_BUILDKIT": "1"})
    return engine.find_image()


def make_base() -> str:
    """A base image: from the registry, or, where none is reached, made from this machine's Debian packages."""
    pull = ["timeout", str(PULL_TIMEOUT_S), *engine.client(), "pull", engine.REGISTRY_BASE]
    if engine.image_id(engine.REGISTRY_BASE) or (pulled := engine.run(pull)).returncode == 0:
        return engine.REGISTRY_BASE
    say(f"{engine.REGISTRY_BASE} cannot be pulled ({engine.words_of(pulled)}): making a base image of Debian packages")
    if not engine.image_id(engine.DEBIAN_BASE):
        if not shutil.which("mmdebstrap"):
            install_packages("mmdebstrap", "mmdebstrap")
        with tempfile.TemporaryDirectory(prefix="ar-base-") as folder:
            run(engine.IMAGE / "base_image.sh", f"{folder}/base.tar")
            run(*engine.client(), "import", f"{folder}/base.tar", engine.DEBIAN_BASE)
    return engine.DEBIAN_BASE


def pip_settings() -> str:
    """A pip.conf with the host's index settings, for the build step alone. Its paths mean nothing inside."""
    listed = engine.run(["python3", "-m", "pip", "config", "list"]).stdout
    found = re.findall(rf"^[^=]*\.({PIP_OPTIONS})=['\"]?(.*?)['\"]?$", listed, re.M)
    return "[global]\n" + "".join(f"{option} = {value}\n" for option, value in found if "file:" not in value)


def setup() -> int:
    """Only what is missing: engine, image, built-in data, baseline. Returns an exit status."""
    image, plan = need_image(), program.read()
    if not (git.data_folder(plan.data) / "info.json").exists():
        if plan.data != "prints":
            remedy = f"./run.sh data {plan.data} makes it, of your own data with --odvg DIR (program.md names it)"
            raise Refused(f"data/{plan.data} is missing; {remedy}")
        if status := dataset.prepare("prints"):
            return status
    if History.load(plan, image).incumbent:
        display.status()
        return 0
    say("measuring the baseline: two trainings of the train.py in HEAD")
    return experiment.run(incumbent_only=True)


def test(*words: str) -> None:
    """tests/run.py installs what the tests need, and runs them."""
    os.execv(sys.executable, [sys.executable, "-I", "-B", str(ROOT / "tests" / "run.py"), *words])


@dataclass
class Finding:
    what: str
    good: bool | None  # None: neither, a note
    text: str


def doctor() -> int:
    """One line a finding; returns 1 when one is bad."""
    status = 0
    for finding in findings():
        print(f"{MARKS[finding.good]:<4}  {finding.what:<10} {finding.text}", flush=True)
        status |= finding.good is False
    return status


def findings() -> Iterator[Finding]:
    for check, what in ((check_engine, "engine"), (check_gpu, "gpu")):
        try:
            yield from check()
        except Refused as e:
            yield Finding(what, False, str(e))
    yield check_client()
    yield check_lock()
    yield from check_settings()
    free = shutil.disk_usage(ROOT).free / 1e9
    yield Finding("disk", free > DISK_GB, f"{free:.0f} GB free")
    known = git.call("var", "GIT_COMMITTER_IDENT").returncode == 0
    unknown = "no identity: what is kept is committed as 'autoresearch'; git config user.name and user.email set it"
    yield Finding("git", known or None, "identity set" if known else unknown)


def check_engine() -> Iterator[Finding]:
    refuse_bare_pod()
    version = engine.run([*engine.client(), "--version"]).stdout.strip()
    kind = "rootless" if engine.rootless() else "rootful"
    yield Finding("engine", True, f"{version}, {kind}: {' '.join(engine.client())}")
    ignored = ", ".join(engine.missing_limits())
    text = f"{kind} {engine.name()} IGNORES {ignored} limits here: {CGROUP_REMEDY}"
    serious = None if ignored == "CPU" else False  # the others keep a training from harm
    yield Finding("limits", serious if ignored else True, text if ignored else "memory, process, CPU: enforced")
    old = "podman" in version and tuple(map(int, re.findall(r"\d+", version)[:2])) < PODMAN_CDI
    if old and engine.gpus():
        yield Finding("engine", False, "this podman knows no CDI, so no GPU: update it to 4.1, or AR_ENGINE=docker")
    if lacks_passt():
        yield Finding("engine", None, "this podman wants passt for a network, which a build needs: install passt")
    image = ""
    try:
        image = engine.find_image()
        yield Finding("image", True, image[:12])
    except engine.ImageMissing as e:
        yield Finding("image", False, str(e))
    yield from older_images(image, engine.image_id(engine.DEBIAN_BASE))


def lacks_passt() -> bool:
    """Whether a build would have no network: from version 5 on podman takes a user's, who is not root, from passt."""
    form = "{{.Host.RootlessNetworkCmd}} {{.Host.Pasta.Executable}}"  # which older ones, and docker, do not know
    return engine.rootless() and engine.run([*engine.client(), "info", "--format", form]).stdout.split() == ["pasta"]


def older_images(*current: str) -> Iterator[Finding]:
    """Images of former versions, their bases, and builds without a name, which nothing removes by itself."""
    ask, ours = [*engine.client(), "images", "--format", "{{.ID}}\t{{.Size}}"], f"label={engine.IMAGE_LABEL}"
    base, unnamed = engine.DEBIAN_BASE.partition(":")[0], ["--filter", "dangling=true", "--filter", ours]
    listed = "".join(engine.run([*ask, *kind]).stdout for kind in ([engine.IMAGE_NAME], [base], unnamed))
    sizes = dict(re.findall("^([0-9a-f]+)\t(.+)$", listed, re.M))
    old = {ident: size for ident, size in sizes.items() if not any(image.startswith(ident) for image in current)}
    if old:
        remedy = f"where no worktree or clone uses them: {engine.name()} rmi {' '.join(old)}"
        yield Finding("image", None, f"{len(old)} of other versions ({', '.join(old.values())}); {remedy}")


def check_gpu() -> Iterator[Finding]:
    """A GPU counts only when torch sees it inside the sandbox, under the real options."""
    if not engine.gpus():
        yield Finding("gpu", None, "none found: trainings run on the CPU")
        return
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver, kind = (engine.run(query).stdout.split() or ["unknown"])[0], engine.device_kind()
    others = sorted({gpu.model for gpu in engine.all_gpus()} - {kind})
    if others:
        remedy = "results of different ones are not compared, and CUDA_VISIBLE_DEVICES chooses"
        yield Finding("gpu", None, f"{kind} is used, not {', '.join(others)}: {remedy}")
    if driver[:1].isdigit() and int(driver.partition(".")[0]) < CUDA_DRIVER:
        remedy = "set ARG TORCH_INDEX in container/image/Containerfile to an older CUDA's wheel index, or update it"
        yield Finding("driver", False, f"{driver} is older than {CUDA_DRIVER}, which torch's default wants: {remedy}")
    slot = engine.slots(program.read())[0]
    container = engine.Container(f"ar-{os.getpid()}-doctor", engine.find_image(), CUDA_PROOF, "4g", {}, device=slot)
    proof = engine.run(engine.arguments(container))
    seen, said = proof.stdout.startswith("True"), proof.stdout.strip() or engine.words_of(proof)
    text = f"{len(engine.gpus())} × {kind}, driver {driver}; a sum on it inside the sandbox: {said}"
    if not seen:
        text += "; podman wants a CDI specification (nvidia-ctk cdi generate), docker the NVIDIA container toolkit"
    yield Finding("gpu", seen, text)


def check_client() -> Finding:
    path = os.pathsep.join([os.environ["PATH"], *map(os.path.expanduser, CLIENT_PLACES)])
    claude = shutil.which("claude", path=path)
    version = engine.run([claude, "--version"]).stdout.split(" ")[0] if claude else "not found on the usual paths"
    if version == CLIENT_VERSION:
        return Finding("client", True, f"Claude Code {version}")
    remedy = f"the lock was tested with {CLIENT_VERSION}: ./run.sh test after an update"
    return Finding("client", None, f"Claude Code {version}; {remedy}")


def check_lock() -> Finding:
    """What was planted before a conversation starts could run code or take the guard off; ConfigChange blocks it later.

    Permissions alone are harmless: the guard stands above them.
    """
    local = ROOT / ".claude" / "settings.local.json"
    settings = read_json(local, {"what cannot be read": 0}) if local.exists() else {}
    keys = ", ".join(sorted(set(settings) - {"permissions"}))
    if not keys:
        return Finding("lock", True, "guard in place")
    danger = "it can run code or switch the guard OFF, remove it"
    return Finding("lock", False, f".claude/settings.local.json holds {keys}: {danger}")


def check_settings() -> Iterator[Finding]:
    """What a person or a company has told the client for all projects."""
    for trouble in settings.troubles():
        yield Finding("settings", False if trouble.certain else None, str(trouble))
