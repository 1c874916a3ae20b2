"""What needs numpy, torch or datasets is tested inside the image, with the sandbox's own flags."""

from __future__ import annotations

import os

import engine
from repository import ROOT

LIMIT_S = 900
MODULES = ("", "container/inside", "container/data_sets", "container/harness")  # of ours, which those tests import
OWN = "/repo/tests/inside"  # settings and conftest.py of these tests, not those of the host's
PYTEST = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", OWN]
PYTEST += ["--confcutdir", OWN, "--basetemp", "/tmp/t", "--durations", "5", OWN]


def test_inside_the_image():
    mounts, shared = {"/repo": ROOT}, ROOT.parent / "shared"
    if shared.is_dir():
        mounts["/shared"] = shared  # third-party data, where it is there
    container = engine.Container(
        name=f"ar-{os.getpid()}-inside",
        image=engine.find_image(),
        command=PYTEST,
        memory="6g",
        mounts=mounts,
        environment={"SHARED": "/shared", "PYTHONPATH": ":".join(f"/repo/{place}" for place in MODULES)},
    )
    done = engine.run(engine.arguments(container), timeout=LIMIT_S + 60)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
    print(done.stdout[-1500:])
