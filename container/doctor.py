#!/usr/bin/env python3
"""./run.sh doctor: what this machine can hold, and what it cannot. One line a finding; exit 1 when one is bad."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parent))
import engine  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
DISK_GB = 15  # for the image and some data
CUDA_DRIVER = 580  # NVIDIA driver branch that torch's default build (CUDA 13) wants
CLIENT_PLACES = ("~/.local/bin", "~/.claude/local", "~/.npm-global/bin", "~/.volta/bin", "~/node_modules/.bin")
CUDA_PROOF = "import torch; print(torch.cuda.is_available(), torch.cuda.device_count())"

bad = 0


def finding(what: str, good: bool | None, text: str) -> None:
    """Print one line: ok, a note (None), or BAD."""
    global bad
    bad += good is False
    print(f"{'ok  ' if good else 'note' if good is None else 'BAD '}  {what:<10} {text}")


def check_engine() -> None:
    version = engine.run([*engine.client(), "--version"]).stdout.strip()
    finding("engine", True, f"{version}, {'rootless' if engine.rootless() else 'rootful'}: {' '.join(engine.client())}")
    hold = engine.limits_hold()
    finding(
        "limits",
        hold,
        "memory, process and CPU limits are enforced"
        if hold
        else "rootless podman on cgroup v1 IGNORES memory, process and CPU limits: a training can take the machine; "
        "boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1) or run as root",
    )
    try:
        finding("image", True, engine.find_image().removeprefix("sha256:")[:12])
    except engine.EngineError as e:
        finding("image", False, str(e))


def check_gpu() -> None:
    """A GPU counts only when torch sees it inside the sandbox, under the real flags."""
    if not engine.gpu_flags():
        finding("gpu", None, "none found: trainings run on the CPU")
        return
    found = engine.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    driver = int(re.search(r", (\d+)", found.stdout)[1])
    if driver < CUDA_DRIVER:
        finding(
            "driver",
            False,
            f"driver {driver} is older than {CUDA_DRIVER}, which torch's default build wants: set "
            "ARG TORCH_INDEX in container/Containerfile to the wheel index of an older CUDA build, or update it",
        )
    argv = engine.sandbox(
        "ar-doctor-gpu", engine.find_image(), ["python", "-c", CUDA_PROOF], memory="4g", limit_s=120, mounts={}
    )
    proof = engine.run(argv)
    text = f"{found.stdout.splitlines()[0]}; inside the sandbox: {proof.stdout.strip() or proof.stderr.strip()[-200:]}"
    finding(
        "gpu",
        proof.stdout.startswith("True"),
        text
        + (
            ""
            if proof.stdout.startswith("True")
            else "; podman wants a CDI specification (nvidia-ctk cdi generate), docker the NVIDIA container toolkit"
        ),
    )


def check_client() -> None:
    tested = re.search(r"CLIENT_VERSION=(\S+)", (ROOT / "container" / "verbs.sh").read_text())[1]
    path = os.pathsep.join([os.environ["PATH"], *map(os.path.expanduser, CLIENT_PLACES)])
    claude = shutil.which("claude", path=path)
    version = engine.run([claude, "--version"]).stdout.split(" ")[0] if claude else ""
    finding(
        "client",
        True if version == tested else None,
        f"Claude Code {version or 'not found on the usual paths'}"
        + ("" if version == tested else f"; the lock was tested with {tested}: run ./run.sh test after an update"),
    )


def check_lock() -> None:
    """What was planted before a conversation starts could run code or take the guard off; ConfigChange blocks it later.

    Permissions alone are harmless: the guard stands above them.
    """
    local = ROOT / ".claude" / "settings.local.json"
    try:
        keys = sorted(set(json.loads(local.read_text())) - {"permissions"}) if local.exists() else []
    except (ValueError, OSError):
        keys = ["what cannot be read"]
    finding(
        "lock",
        not keys,
        "guard in place"
        if not keys
        else f".claude/settings.local.json holds {', '.join(keys)}: it can run code or switch the guard OFF, remove it",
    )


def check_disk_and_git() -> None:
    free = shutil.disk_usage(ROOT).free / 1e9
    finding("disk", free > DISK_GB, f"{free:.0f} GB free")
    name = engine.run(["git", "-C", str(ROOT), "var", "GIT_COMMITTER_IDENT"])
    finding(
        "git",
        True if name.returncode == 0 else None,
        "identity set"
        if name.returncode == 0
        else "no identity: kept experiments are committed as 'autoresearch'; git config user.name and user.email set it",
    )


if __name__ == "__main__":
    try:
        check_engine()
        check_gpu()
    except engine.EngineError as e:
        finding("engine", False, str(e))
    check_client()
    check_lock()
    check_disk_and_git()
    sys.exit(1 if bad else 0)
