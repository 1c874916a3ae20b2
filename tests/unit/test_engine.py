"""Engines and GPUs that this machine does not have: stand-ins for podman, docker and nvidia-smi on PATH."""

from __future__ import annotations

import csv
import errno
import functools
import io
import json
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

import dataset
import engine
import install
import measure
import program
import sandbox
from in_process import VALUES, Small, train_py
from project import ROOT, Refused
from repository import block

KEPT = train_py(VALUES["kept"])
TWO = "GPU 0: NVIDIA A100 (UUID: GPU-aaaa-1)\nGPU 1: NVIDIA A100 (UUID: GPU-bbbb-2)\n"
CUT = """GPU 0: NVIDIA A100 (UUID: GPU-aaaa-1)
  MIG 3g.20gb     Device  0: (UUID: MIG-c774-1)
  MIG 3g.20gb     Device  1: (UUID: MIG-GPU-aaaa-1/2/0)
  MIG 1g.5gb      Device  2: (UUID: MIG-c776-3)
GPU 1: NVIDIA A100 (UUID: GPU-bbbb-2)
"""
MIXED = "GPU 0: NVIDIA A100 (UUID: GPU-aaaa-1)\nGPU 1: Tesla T4 (UUID: GPU-bbbb-2)\n"
ODD_NAMES = [
    "a:b",
    "a,b",
    "a\nb",
    'a"b',
    "it's",
    " a b ",
    "a=b",
    "-a",
    "--mount",
    "é漢",
    "a\\b",
    "$(id)",
    "a;b",
    "a%s{b}",
]
FULL = "Error: creating runtime static files directory: mkdir /var/lib/containers: no space left on device"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch):
    """machine(podman="shell script", ...): a PATH with these programs, and all else that is usual but no engine."""
    (bin := tmp_path / "bin").mkdir()
    for tool in ("sh", "git", "timeout", "cat", "echo"):
        (bin / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(bin))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("AR_ENGINE", raising=False)
    monkeypatch.setattr(engine, "WSL", tmp_path / "dxg")

    def make(**programs: str) -> Path:
        for name, script in programs.items():
            file = bin / name.replace("_", "-")
            file.write_text(f"#!/bin/sh\n{script}\n")
            file.chmod(0o755)
        forget()
        return bin

    yield make
    forget()


def forget() -> None:
    for f in vars(engine).values():
        if hasattr(f, "cache_clear"):
            f.cache_clear()


def smi(listed: str, status: int = 0) -> str:
    return f"cat <<'END'\n{listed}\nEND\nexit {status}"


# Which GPUs


@pytest.mark.parametrize(
    ("listed", "named", "used"),
    [
        (TWO, None, "0 1"),
        (TWO, "1", "1"),
        (TWO, "1,0", "1 0"),
        (TWO, " 1 , 1", "1"),
        (TWO, "GPU-bbbb-2", "1"),
        (TWO, "GPU-b", "1"),
        (TWO, "", ""),
        (TWO, "-1", ""),
        (TWO, "NoDevFiles", ""),
        (TWO, "0,-1,1", "0"),
        (CUT, None, "0:0 0:1"),
        (CUT, "MIG-c776-3", "0:2"),
        (CUT, "MIG-GPU-aaaa-1/2/0", "0:1"),
        (CUT, "1", "1"),
        (CUT, "0", "0:0"),
        (MIXED, None, "0"),
        (MIXED, "1", "1"),
        (MIXED, "1,0", "1"),
    ],
)
def test_cuda_visible_devices_is_heeded(machine, monkeypatch, listed: str, named: str | None, used: str):
    machine(nvidia_smi=smi(listed), podman="exit 0")
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert " ".join(gpu.name for gpu in engine.gpus()) == used
    plan = program.Program([])
    passed = [engine.gpu_options(slot) for slot in engine.slots(plan)]
    assert passed == ([["--device", f"nvidia.com/gpu={name}"] for name in used.split()] or [[]])
    plan.devices = 5  # more trainings than GPUs: no two share a lock, and none leaves what was named
    assert len(set(engine.slots(plan))) == 5
    assert {word for slot in engine.slots(plan) for word in engine.gpu_options(slot)[1:]} <= {p[1] for p in passed if p}


@pytest.mark.parametrize("named", ["7", "GPU-zzzz", "MIG-1", "0,7", "all"])
def test_a_gpu_that_is_not_there_is_named(machine, monkeypatch, named: str):
    machine(nvidia_smi=smi(TWO))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    with pytest.raises(Refused, match=f"names a GPU '{named.split(',')[-1]}'.*0 .GPU-aaaa-1."):
        engine.gpus()


def test_slices_and_windows_have_names_of_their_own(machine, tmp_path: Path, monkeypatch):
    machine(nvidia_smi=smi(CUT), docker="exit 0")
    assert engine.device_kind() == "NVIDIA A100 MIG 3g.20gb"
    assert engine.gpu_options(1) == ["--gpus", "device=0:1"]
    machine(nvidia_smi=smi(TWO), podman="exit 0")
    (tmp_path / "dxg").touch()  # WSL 2: there CDI knows `all` alone
    assert engine.gpu_options(0) == ["--device", "nvidia.com/gpu=all"]


@pytest.mark.parametrize(
    ("listed", "status"),
    [
        ("Failed to initialize NVML: Driver/library version mismatch", 18),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9),
        ("Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.", 15),
        ("No devices were found", 6),
        ("No devices found.", 0),
    ],
)
def test_a_gpu_that_does_not_answer_is_no_cpu(machine, monkeypatch, listed: str, status: int):
    machine(nvidia_smi=smi(listed, status), podman="exit 0")
    with pytest.raises(Refused) as e:
        engine.device_kind()
    assert listed in str(e.value) and "CUDA_VISIBLE_DEVICES=-1" in str(e.value)
    monkeypatch.setattr(engine, "find_image", lambda: "made-up")
    found = {f.what: f for f in install.findings() if f.what in ("gpu", "disk")}
    assert found["gpu"].good is False and listed in found["gpu"].text and found["disk"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert engine.device_kind() == "cpu"


def test_a_driver_without_its_tool_is_no_cpu(machine, tmp_path: Path, monkeypatch):
    machine(podman="exit 0")
    assert engine.device_kind() == "cpu"
    engine.all_gpus.cache_clear()
    monkeypatch.setattr(engine, "NVIDIA", tmp_path)
    with pytest.raises(Refused, match="there is an NVIDIA GPU .*, but no nvidia-smi: install it"):
        engine.device_kind()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert engine.device_kind() == "cpu"


def test_a_launch_command_looks_after_its_own_gpus(machine):
    machine(nvidia_smi=smi("broken", 9))
    assert engine.slots(program.Program([], launch=["srun"])) == [0]
    assert engine.slots(program.Program([], launch=["srun"], devices=2)) == [0, 1]


def test_run_sh_passes_the_choice_on(tmp_path: Path):
    shutil.copy(ROOT / "run.sh", tmp_path / "run.sh")
    (tmp_path / "container/harness").mkdir(parents=True)
    (tmp_path / "container/harness/__main__.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    for given in (None, "", "1", "GPU-aaaa,MIG-b"):
        env = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
        done = subprocess.run([tmp_path / "run.sh"], env={"HOME": "/", **env}, capture_output=True, text=True)
        told = json.loads(done.stdout)
        assert told.get("CUDA_VISIBLE_DEVICES") == given and "/usr/lib/wsl/lib" in told["PATH"].split(":")


# Which engine, and what it can


def test_an_engine_that_does_not_answer_says_why(machine):
    machine(docker="echo 'permission denied while trying to connect to the Docker daemon socket' >&2; exit 1")
    with pytest.raises(Refused, match="docker does not answer: permission denied") as e:
        engine.name()
    assert not isinstance(e.value, engine.EngineMissing)  # setup would install another one
    machine(podman="exit 0")
    assert engine.name() == "podman"


def test_none_at_all(machine):
    machine()
    with pytest.raises(engine.EngineMissing, match="neither podman nor docker is here; run ./run.sh setup"):
        engine.name()


@pytest.mark.parametrize("said", [FULL, "Error: database graph driver mismatch", "Error: creating lock file"])
def test_an_engine_that_fails_is_no_missing_image(machine, monkeypatch, said: str):
    machine(podman=f"case $1 in version|--version) echo podman version 4.3.1 ;; *) echo '{said}' >&2; exit 125 ;; esac")
    for ask in (engine.find_image, install.need_image):
        with pytest.raises(Refused) as e:
            ask()
        assert said in str(e.value) and not isinstance(e.value, engine.ImageMissing)
    found = [f for f in install.findings() if f.what in ("engine", "image")]
    assert found[-1].what == "engine" and found[-1].good is False and said in found[-1].text


def test_an_image_that_is_missing_is_built_by_setup_alone(machine, monkeypatch):
    machine(podman="exit 0")
    with pytest.raises(engine.ImageMissing, match="run ./run.sh setup"):
        engine.find_image()
    monkeypatch.setattr(install, "build_image", lambda: "built")
    assert install.need_image() == "built"


def test_a_pull_that_fails_says_why(machine, monkeypatch, capsys):
    full = "Error: writing blob: storing blob to file: no space left on device"
    machine(
        podman=f"case $1 in pull) echo '{full}' >&2; exit 125;; images) exit 0;; *) echo podman version 4.9.3;; esac"
    )
    monkeypatch.setattr(install, "run", lambda *words, **how: None)
    monkeypatch.setattr(install, "install_packages", lambda *words: None)
    assert install.make_base() == engine.DEBIAN_BASE
    assert f"cannot be pulled ({full}): making a base image" in capsys.readouterr().err


def as_user(monkeypatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)


@pytest.mark.parametrize("kind", engine.ENGINES)
def test_an_engine_that_does_not_say_what_it_can_hold_starts_nothing(machine, monkeypatch, kind: str):
    """Without limits a training could take the machine."""
    machine(**{kind: "case $1 in info) echo 'Error: database is locked' >&2; exit 125;; *) echo ok;; esac"})
    as_user(monkeypatch)
    with pytest.raises(Refused, match=f"{kind} fails: Error: database is locked; ./run.sh doctor"):
        engine.arguments(engine.Container("name", "image", ["true"], "1g", {}))


@pytest.mark.parametrize(
    ("programs", "missing"),
    [
        ({"podman": "echo '[cpuset cpu io memory pids]'"}, ""),
        ({"podman": "echo '[memory pids]'"}, "CPU"),  # Ubuntu 22.04
        ({"podman": "echo '[]'"}, "memory, process, CPU"),  # cgroup v1
        ({"docker": "echo 'memory pids cpu'"}, ""),
        ({"docker": "echo 'pids cpu'"}, "memory"),  # a kernel without swap or memory accounting
    ],
)
def test_limits_that_cannot_be_held_are_left_out_and_named(machine, monkeypatch, programs: dict, missing: str):
    machine(**programs)
    as_user(monkeypatch)
    monkeypatch.setattr(engine, "find_image", lambda: "made-up")
    assert ", ".join(engine.missing_limits()) == missing
    argv = " ".join(engine.arguments(engine.Container("name", "image", ["true"], "1g", {}, background=True)))
    for words, options in (("memory", "--memory"), ("process", "--pids-limit"), ("CPU", "--cpus"), ("CPU", "--cpu-sh")):
        assert (options in argv) == (words not in missing), argv
    found = next(f for f in install.findings() if f.what == "limits")
    assert found.good is (True if not missing else None if missing == "CPU" else False)
    assert not missing or f"IGNORES {missing} limits" in found.text and "Delegate=" in found.text


@pytest.mark.parametrize("client", ["podman", "docker"])
def test_both_engines_may_read_what_is_mounted_under_selinux(machine, client: str):
    machine(**{client: "exit 0"})
    argv = engine.arguments(engine.Container("name", "image", ["true"], "1g", {}))
    assert argv[argv.index("label=disable") - 1] == "--security-opt"


@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_path_can_be_mounted(tmp_path: Path, name: str):
    (folder := tmp_path / name).mkdir()
    option, value = engine.mount(folder, "/inside", ",readonly")
    row = next(csv.reader(io.StringIO(value, newline="")))
    assert option == "--mount" and row == ["type=bind", f"source={folder}", "target=/inside", "readonly"]


def test_a_large_machine_has_room_for_its_threads(machine, monkeypatch):
    machine(podman="exit 0")
    for cpus, pids in ((2, 512), (64, 512), (128, 1024), (256, 2048)):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        argv = engine.arguments(engine.Container("name", "image", ["true"], "1g", {}))
        assert argv[argv.index("--pids-limit") + 1] == str(pids)


@pytest.mark.parametrize(
    ("version", "gpu", "words"),
    [("4.0.3", True, "knows no CDI"), ("4.1.0", True, ""), ("5.2.2", False, ""), ("3.4.4", False, "")],
)
def test_doctor_knows_what_versions_of_podman_need(machine, monkeypatch, version: str, gpu: bool, words: str):
    machine(podman=f"echo podman version {version}", **({"nvidia_smi": smi(TWO)} if gpu else {}))
    as_user(monkeypatch)
    monkeypatch.setattr(engine, "find_image", lambda: "made-up")
    told = [f for f in install.check_engine() if "podman wants" in f.text or "CDI" in f.text]
    assert [words in f.text for f in told] == [True] * bool(words)


NO_FIELD = (
    'echo "Error: template: info: can\'t evaluate field RootlessNetworkCmd in type *define.HostInfo" >&2; exit 125'
)


@pytest.mark.parametrize(
    ("info", "root", "lacks"),
    [
        ("echo 'pasta '", False, True),  # podman 5
        ("echo 'pasta /usr/bin/pasta'", False, False),
        ("echo 'slirp4netns '", False, False),  # as containers.conf may say
        (NO_FIELD, False, False),  # podman 4, for which some distributions have no passt
        ("echo 'pasta '", True, False),
    ],
)
def test_setup_installs_passt_where_a_build_would_have_no_network(machine, monkeypatch, info, root, lacks):
    machine(podman=f'case "$*" in *RootlessNetworkCmd*) {info} ;; *info*) echo "[cpu memory pids]" ;; esac')
    if not root:
        as_user(monkeypatch)
    installed, built = [], []
    monkeypatch.setattr(install, "install_packages", lambda what, *packages: installed.extend(packages))
    monkeypatch.setattr(install, "make_base", lambda: "base")
    monkeypatch.setattr(install.dataset, "certificates", lambda: Path("/ca"))
    monkeypatch.setattr(install, "run", lambda *words, **how: built.append(words))
    monkeypatch.setattr(install, "pip_settings", lambda: "")
    monkeypatch.setattr(engine, "find_image", lambda: "made-up")
    assert install.build_image() == "made-up" and installed == ["passt"] * lacks
    assert f"{engine.IMAGE_LABEL}=yes" in built[0]  # by which doctor knows it when it has lost its name
    assert [f.good for f in install.check_engine() if "podman wants passt" in f.text] == [None] * lacks


# by their names, and those without one by their label
IMAGES = """
case "$*" in
*dangling=true*label=autoresearch-image) printf 'dddddddddddd\\t6.9 GB\\n' ;;
*dangling*|*label*|*ID}}*Size}}) printf 'eeeeeeeeeeee\\t9 GB\\n' ;;
*Size}}*localhost/autoresearch) printf 'aaaaaaaaaaaa\\t6.78 GB\\nbbbbbbbbbbbb\\t6.7 GB\\n' ;;
*Size}}*localhost/autoresearch-base) printf 'cccccccccccc\\t450 MB\\nffffffffffff\\t440 MB\\n' ;;
*images*autoresearch-base:*) echo sha256:cccccccccccccccccccc ;;
*images*autoresearch:*) echo %s ;;
esac
"""


@pytest.mark.parametrize("current", ["sha256:" + "a" * 64, ""])
def test_doctor_names_images_that_stay_behind(machine, current: str):
    """And nobody else's; also where the one for now is missing, perhaps for want of room."""
    machine(podman=IMAGES % current)
    found = [f.text for f in install.check_engine() if f.what == "image"]
    old = ["bbbbbbbbbbbb", "ffffffffffff", "dddddddddddd"]
    old, sizes = old if current else ["aaaaaaaaaaaa", *old], "6.7 GB, 440 MB, 6.9 GB"
    assert found[0] == "a" * 12 if current else "run ./run.sh setup" in found[0]
    assert found[1].endswith(f"podman rmi {' '.join(old)}") and sizes in found[1]


# What a run needs before it begins


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("free", "enough"), [(0, False), (10**9, False), (3 * 10**9, False), (4 * 10**9, True)])
def test_without_room_on_the_disk_nothing_runs(tmp_path: Path, monkeypatch, free: int, enough: bool):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, free))
    if enough:
        measure.require_room(tmp_path)
        return
    with pytest.raises(
        Refused, match=rf"may need 3.8 GB of disk, and there are {free / 1e9:.1f} GB.*nothing ran: make"
    ):
        measure.require_room(tmp_path)


@pytest.mark.parametrize(
    ("wanted", "launch", "ready", "words"),
    [
        ("cpu", (), {"device": "cpu"}, ""),
        ("NVIDIA A100", (), {"device": "NVIDIA A100-SXM4"}, ""),
        (
            "NVIDIA A100",
            (),
            {"device": "cpu"},
            "results so far are of NVIDIA A100, and the sandbox has cpu: nothing ran",
        ),
        (
            "NVIDIA A100",
            (),
            {"fault": "RuntimeError: no kernel image"},
            "does not work in the sandbox (RuntimeError: no",
        ),
        ("NVIDIA A100", ("srun",), {"device": "NVIDIA A100"}, ""),
        (
            "NVIDIA A100",
            ("srun",),
            {"device": "Tesla T4"},
            "and the sandbox has Tesla T4: nothing ran; ask for it in",
        ),
        ("", ("srun",), {"device": "Tesla T4"}, ""),
    ],
)
def test_what_the_sandbox_has_is_what_results_so_far_are_of(tmp_path, monkeypatch, wanted, launch, ready, words):
    monkeypatch.setattr(engine, "device_kind", lambda: wanted)
    job = measure.Job(tmp_path, tmp_path, 5, "1g", 1, tmp_path / "log", "image", launch=launch, measured_on=wanted)
    check = functools.partial(measure.Measurement(job).check_device, ready)
    if not words:
        check()
        return
    with pytest.raises(Refused) as e:
        check()
    assert words in str(e.value)


def test_a_failure_is_lost_when_the_gpu_has_gone_meanwhile(machine, tmp_path: Path, monkeypatch):
    def fails(self):
        raise measure.Failed("crash after 5 s: RuntimeError: CUDA error: unspecified launch failure")

    monkeypatch.setattr(measure.Measurement, "train", fails)
    monkeypatch.setattr(measure.Measurement, "end", lambda self: None)
    job = measure.Job(tmp_path, tmp_path, 5, "1g", 1, tmp_path / "log", "image")
    for listed, status, outcome in ((TWO, 0, "failed"), ("GPU is lost", 15, "lost"), (TWO.split("\n")[0], 0, "lost")):
        machine(nvidia_smi=smi(TWO), podman="exit 0")
        engine.all_gpus()  # as planning asks
        (Path(os.environ["PATH"]) / "nvidia-smi").write_text(f"#!/bin/sh\n{smi(listed, status)}\n")
        run = measure.run(job)
        assert run.outcome == outcome and ("may be tried again" in run.reason) == (outcome == "lost"), run


@pytest.mark.parametrize(
    ("status", "oom", "outcome", "words"),
    [
        (125, False, "lost", "podman failed (its client ended with 125)"),  # the daemon was restarted, conmon died
        (255, False, "lost", "podman failed"),
        (137, False, "lost", "the sandbox was killed from outside: not the edit's fault"),  # podman kill, systemd-oomd
        (137, True, "failed", "killed from outside, or ran out of its 1g of memory"),
        (1, False, "failed", "killed from outside, or ran"),  # PID 1 itself: what train.py left cannot be handed over
    ],
)
def test_what_an_engine_does_to_a_training(machine, tmp_path, monkeypatch, status, oom, outcome, words):
    """PID 1 has reported that training may begin, and nothing after that."""
    ready = """echo '{"up": true}'; echo '{"ready": true, "device": "cpu"}'"""
    script = f"case $1 in run) {ready}; {'echo >oom' * oom}\nexit {status};; *) echo podman version 4.9.3;; esac"
    machine(podman=script)
    for folder in ("train", "val/images", "val/captions"):
        (tmp_path / "data/x" / folder).mkdir(parents=True)
    (tmp_path / "data/x/val.key.npy").write_bytes(bytes(136))
    (tmp_path / "work").mkdir()
    monkeypatch.setattr(measure, "ROOM", 0)
    found = measure.run(measure.Job(tmp_path / "work", tmp_path / "data/x", 5, "1g", 1, tmp_path / "log", "image"))
    assert found.outcome == outcome and words in found.reason


def test_what_a_sandbox_sends_is_taken_part_by_part(tmp_path: Path):
    """As soon as all of a part is there, without waiting for the sandbox's end."""
    made = sandbox.Sandbox.__new__(sandbox.Sandbox)
    made.process = subprocess.Popen(["sh", "-c", "printf abcdefg; exec sleep 60"], stdout=subprocess.PIPE)
    made.killed, made.kill = False, lambda: None
    for size, want in ((3, b"abc"), (4, b"defg")):
        made.copy_to(tmp_path / "part", 4, 20, size)
        assert (tmp_path / "part").read_bytes() == want and made.process.poll() is None
    made.process.kill()
    made.process.wait()


@pytest.mark.parametrize(
    ("steps", "of", "shown"),
    [
        ((28, 42), 60, "42 of 60 steps"),
        ((15, 30, 45, 47), 60, "47 of 60 steps"),  # the last line comes out of turn
        (range(1, 42), 60, "41 of 60 steps"),
        (range(0, 300, 30), 300, ""),  # the first of each thirty
        (range(30, 301, 30), 300, ""),
        ((42,), 60, ""),  # only one was printed
        ((), 60, ""),
    ],
)
def test_a_training_that_stopped_early(tmp_path: Path, steps, of: int, shown: str):
    log = tmp_path / "log"
    log.write_text("step 20/20\n" + "".join(f"step {step}/{of} loss 3.6\n" for step in steps))
    assert measure.cut_short(log) == shown
    assert measure.last_step(log) == (f"{steps[-1]} of {of} steps" if steps else "20 of 20 steps")


def test_the_time_of_a_step_is_without_what_comes_before_the_first(tmp_path: Path, monkeypatch):
    """Data are loaded and a model is compiled before it."""
    log, now = sandbox.Log(tmp_path / "log"), [100.0]
    monkeypatch.setattr(sandbox.time, "monotonic", lambda: now[0])
    found = []
    for seconds, text in ((20, "loading\n"), (1, "step 10/50\n"), (1, "x\nstep 20/50 loss 1\n"), (3, "step 50/50\n")):
        now[0] += seconds
        log.write(text.encode())
        found.append(log.step_ms)
    for step in range(1, 100):  # another part of the training
        log.write(b"step %d/99\n" % step)
        assert log.step_ms == (step > 1) * 2000
        now[0] += 2
    assert found == [0, 0, 100, 100]


@pytest.mark.parametrize("end", [None, {}, {"status": "limit"}, {"status": "crashed"}, {"status": "ok", "bytes": 7}])
def test_a_run_goes_on_where_training_pairs_could_not_be_embedded(tmp_path: Path, monkeypatch, end: dict):
    def embed(self, side):
        raise measure.Failed("the side's own reason")

    def copy_to(*_):
        raise measure.Failed("invalid output: too much")

    def message(limit_s: float) -> dict:
        if end is None:
            raise measure.Lost("Slurm: time limit")
        return end

    trainer = SimpleNamespace(message=message, copy_to=copy_to)
    job = measure.Job(tmp_path, tmp_path, 5, "1g", 1, tmp_path / "log", "image")
    (measurement := measure.Measurement(job)).report = {"seconds": 3.0}
    measurement.embed_fit(trainer)
    assert "/fit.npy" not in measure.judge_mounts(job)
    monkeypatch.setattr(measure.Measurement, "sides_as_started", lambda self: iter(measure.SIDES))
    monkeypatch.setattr(measure.Measurement, "embed_side", embed)
    with pytest.raises(measure.Failed, match="^load: " if end == {"status": "crashed"} else "own reason"):
        measurement.embed()


def test_without_gpus_nothing_can_have_gone(machine, monkeypatch):
    machine(nvidia_smi=smi("a driver that is broken", 9))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert engine.gpu_fault() == ""
    machine()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (Path(os.environ["PATH"]) / "nvidia-smi").unlink()
    assert engine.gpu_fault() == ""


def test_a_closed_system_call_looks_like_an_old_kernel():
    """So that libraries fall back: with EPERM, glibc's faccessat2 and close_range fail under crun."""
    profile = json.loads((engine.IMAGE / "seccomp.json").read_text())
    assert (profile["defaultAction"], profile["defaultErrnoRet"]) == ("SCMP_ACT_ERRNO", errno.ENOSYS)


# Whole runs


GPU = 'engine.all_gpus = lambda: [engine.Gpu("0", "GPU-a", "{}")]\nengine.gpus = engine.all_gpus\n'


def test_another_device_is_another_baseline_and_never_a_silent_one(small: Small):
    first = small.trailers("refs/experiments/1")
    assert first["Device"] == "cpu"
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    for then, now in (("cpu", "NVIDIA A100"), ("NVIDIA A100", "Tesla T4"), ("Tesla T4", "cpu")):
        small.given = "" if now == "cpu" else GPU.format(now)
        if now == "cpu":
            assert block(small.run().stdout)["verdict"] == "kept"  # back on the first: its results are there still
            break
        done = small.run()
        assert done.returncode == 2 and f"was measured on {then}, and this machine trains on {now}" in done.stderr
        assert "./run.sh setup" in done.stderr and small.read("train.py") == KEPT
        setup = small.run("setup", given='install.need_image = lambda: "sha256:made-up"')
        assert block(setup.stdout)["verdict"] == "baseline", setup.stderr
        made = small.trailers(f"refs/experiments/{small.experiments()[-1]}")
        assert made["Device"] == now and made["Comparable"] != first["Comparable"]


LOST = """
real = measure.run
measure.run = lambda job: measure.Run(
    "lost", job.seed, "Slurm: preempted: not the edit's fault; it may be tried again", timing=real(job).timing
)
"""


def test_what_is_lost_counts_for_nothing_and_is_tried_again(small: Small):
    """Not for ever: see below."""
    small.edit("until: 40 experiments", "until: 1 experiments, 1 discards\npatience: 3", "program.md")
    small.write("train.py", KEPT)
    done, shown = small.experiment("an idea", given=LOST)
    assert (done.returncode, shown["verdict"], small.read("train.py")) == (1, "lost", KEPT), done.stderr
    assert "Slurm: preempted" in shown["reason"] and "1 (first), 0 of 1" in shown["phase"].replace(" of 2", "")
    assert shown["next"].startswith("nothing is held against this idea: run ./run.sh again")
    assert "Chain" not in small.trailers("refs/experiments/2") and "0 failed" in small.run("status").stdout
    done = small.run()  # the same idea, in the same words
    assert block(done.stdout)["verdict"] == "kept", done.stderr


def test_the_agent_is_held_back_after_losses_in_a_row(small: Small):
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    for _ in range(3):
        assert block(small.run(given=LOST).stdout)["verdict"] == "lost"
    agent = {"CLAUDECODE": "1"}
    plan = "history, attempts = experiment.make_plan(False)\nprint(attempts[-1].hypothesis)\nraise SystemExit"
    done = small.run("help", given=plan, env=agent)
    assert "the last 3 experiments were lost (Slurm: preempted" in done.stderr and "not again for 15 min" in done.stderr
    assert "an idea" in small.run("help", given=plan).stdout  # a person may
    later = "import time\nreal = time.time\ntime.time = lambda: real() + 15 * 60\n"
    assert "an idea" in small.run("help", given=later + plan, env=agent).stdout
    progressed = "import session\nfrom history import History\nprint(session.progressed(History.load(), 1))"
    assert small.python(progressed) == "False"  # so the loop and the night end, as when nothing runs
    assert small.run().returncode == 0 and small.python(progressed) == "True"


def test_a_lost_incumbent_does_not_hide_as_unmeasured(small: Small):
    small.write("train.py", train_py(90))
    small.git("commit", "-qm", "mine", "train.py")
    done = small.run(given=LOST)
    assert (done.returncode, block(done.stdout)["verdict"]) == (1, "lost") and "fix that first" not in done.stderr
    assert block(small.run().stdout)["verdict"] == "baseline"


def test_the_device_is_part_of_what_is_comparable(machine, monkeypatch):
    monkeypatch.setattr(dataset, "verified_hash", lambda name: "data")
    plan, found = program.Program([]), set()
    for listed in (TWO, CUT, MIXED.replace("A100", "H100")):
        machine(nvidia_smi=smi(listed))
        found.add(dataset.comparable(plan, "image"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        found.add(dataset.comparable(plan, "image"))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    plan.launch = ["srun"]
    assert len(found) == 4 and dataset.comparable(plan, "image") not in found
