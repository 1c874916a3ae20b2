"""What needs numpy, torch or datasets is tested inside the image, with the sandbox's own flags."""

from __future__ import annotations

import os
import subprocess
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "container"))
import engine

LIMIT_S = 900


def test_inside_the_image():
    mounts = {"/repo": ROOT}
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        mounts["/shared"] = shared  # third-party data, where it is there
    argv = engine.sandbox(
        f"ar-{os.getpid()}-inside",
        engine.find_image(),
        [
            "env",
            "SHARED=/shared",
            "python",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--basetemp=/tmp/t",
            "/repo/tests/inside",
        ],
        memory="6g",
        limit_s=LIMIT_S,
        mounts=mounts,
        gpu=False,
    )
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S + 60)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
