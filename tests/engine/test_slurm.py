"""A launch command: experiments on a real Slurm of one node, whatever ends them; and the lifeline that needs no Slurm.

This machine is the node, so what run.sh removes at its end would hide a container that stayed behind: here it does not.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

import engine
import stand_ins
from repository import CANDIDATES, QUICK, ROOT, Project, block
from slurm import CPUS, Slurm, wait_for, whoami

LIFELINE_S, STILL_S = 15, 10  # here, instead of 60 and 45
MEASURED = [1, 2, 3]  # of `base`
LOG = f"runs/{MEASURED[-1] + 1:04}.log"
GIVEN = f"""
experiment.refresh_report = lambda: None
engine.sweep = lambda background=False: None
sandbox.STILL_S, sandbox.NOTICE_S = {STILL_S}, 2
"""
SLEEP = (
    QUICK
    + """
    import time
    for step in range(1, 1501):
        print(f"step {step}/1500", flush=True)
        time.sleep(0.2)
"""
)
PRINTED = "slurmstepd: error: *** STEP 5.0 ON node CANCELLED AT 2026-11-23T20:37:09 DUE TO TIME LIMIT ***"
NOT_YOURS = "not the edit's fault; the same idea may be tried again"


@pytest.fixture(scope="module")
def here(quick_base: Project, tmp_path_factory) -> Project:
    """A project whose training takes no time; sandboxes that lost their lifeline wait less."""
    made = quick_base.copy((folder := tmp_path_factory.mktemp("slurm")) / "here")
    lifeline = stand_ins.stage(folder, f"stage.LIFELINE_S = {LIFELINE_S}")
    made.given += lifeline + GIVEN
    return made


@pytest.fixture(scope="module")
def base(here: Project, tmp_path_factory) -> Project:
    """The same with its baseline measured through a launch command: what such a one measures is compared with that."""
    made = here.copy(tmp_path_factory.mktemp("slurm") / "base")
    made.edit("stop:", "launch: env\nstop:", "program.md")
    done = made.run()
    assert done.returncode == 0 and made.experiments() == MEASURED, done.stdout + done.stderr
    made.git("checkout", "program.md")
    return made


@pytest.fixture(scope="module")
def slurms():
    """slurms(): one more Slurm, for jobs that do not leave its node as it is."""
    with contextlib.ExitStack() as stack:

        def make() -> Slurm:
            slurm = Slurm()
            stack.callback(slurm.stop)
            return slurm

        yield make


@pytest.fixture(scope="module")
def slurm(slurms) -> Slurm:
    """For jobs that leave the node as it is."""
    return slurms()


@pytest.fixture(scope="module")
def start(here: Project, base: Project, tmp_path_factory):
    """start(launch, slurm): a training that sleeps, of a project of its own, by that command."""
    runs = []

    def make(launch: str = "", slurm: Slurm | None = None) -> Running:
        source = base if launch else here
        runs.append(Running(source.copy(tmp_path_factory.mktemp("run") / "repo"), launch, slurm))
        return runs[-1]

    yield make
    for run in runs:
        run.kill_all()


@pytest.fixture(scope="module")
def slow(start, slurms) -> dict[str, Running]:
    """Trainings whose ends take their time, with a Slurm each: they run while others are tested."""
    limited, crashed = start("srun -n1 --time=1", slurms()), start("srun -n1", slurms())
    limited.wait_for("train")
    crashed.wait_for()
    crashed.slurm.crash()
    crashed.since = time.monotonic()
    return {"limited": limited, "crashed": crashed}


@pytest.fixture
def seconds(figure):
    """seconds(what, s): a figure; until no container was left."""
    return lambda what, s: figure(f"lifeline: {what}", 1, 0, gone_s=s)


class Running:
    """./run.sh in a session of its own."""

    def __init__(self, project: Project, launch: str, slurm: Slurm | None):
        self.project, self.slurm, self.out = project, slurm, project.path.parent / f"{project.path.name}.out"
        prepare(project, launch, SLEEP, slurm)
        with self.out.open("w") as out:
            self.process = project.start(stdout=out, stderr=out, start_new_session=True)

    def wait_for(self, stage: str = "captions") -> Running:
        """Until this stage's container is there."""
        wait_for(lambda: re.search(rf"-{stage}$", self.names(), re.M) or self.process.poll() is not None, 90)
        assert self.process.poll() is None, self.out.read_text()
        return self

    def names(self) -> str:
        return "\n".join(name(c) for c in self.project.containers().split())

    def job(self) -> str:
        """The number of its training's job."""
        jobs = [line.split(" ", 1) for line in self.slurm.call("squeue", "-h", "-o", "%i %Z").splitlines()]
        return min((number for number, folder in jobs if folder.startswith(str(self.project.path))), key=int)

    def launchers(self, stage: str) -> list[int]:
        """The processes of srun that started this stage: first the child, which only watches over the other one.

        Where that dies it ends the step, then the job: killed between the two, it leaves the job to its time limit.
        """
        parents = {}
        for p in Path("/proc").glob("[0-9]*"):
            try:
                _, parent, _, session = (p / "stat").read_text().rpartition(")")[2].split()[:4]
                command = (p / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if int(session) == self.process.pid and command.startswith("srun ") and f"-{stage} " in command:
                parents[int(p.name)] = int(parent)
        assert parents, self.out.read_text()
        return sorted(parents, key=lambda pid: parents[pid] in parents, reverse=True)

    def gone(self, limit_s: float) -> float:
        """Seconds until no container of the project runs.

        A Slurm that ends a step also ends what removes its container: that is left to the sweep, which is off here.
        """
        try:
            return wait_for(lambda: self.project.containers(which="-q") == "", limit_s)
        except AssertionError:
            raise AssertionError(f"{self.names()} left after {limit_s} s: {self.out.read_text()}") from None

    def ended(self, limit_s: float = 120) -> tuple[int, dict]:
        """Its exit status and result block."""
        return self.process.wait(limit_s), block(self.out.read_text())

    def kill_all(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def name(container: str) -> str:
    return engine.run(
        [*engine.client(), "ps", "-a", "--filter", f"id={container}", "--format", "{{.Names}}"]
    ).stdout.strip()


def prepare(project: Project, launch: str, code: str, slurm: Slurm | None = None) -> None:
    """run.sh passes no SLURM_CONF on: what a planted one names would run programs of its own."""
    if slurm and launch.startswith("srun"):
        launch = f"env SLURM_CONF={slurm.env['SLURM_CONF']} {launch}"
    if launch:
        project.edit("stop:", f"launch: {launch}\nstop:", "program.md")
    project.write("train.py", code)
    project.hypothesis("an idea")


def works(run: Running) -> None:
    """The next run, with another train.py, is as good as any."""
    run.project.write("train.py", CANDIDATES["kept"])
    done, shown = run.project.experiment("the next one")
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert run.project.containers() == ""


def lost_because(run: Running, reason: str) -> None:
    status, shown = run.ended()
    assert (status, shown.get("verdict")) == (1, "lost"), run.out.read_text()
    assert shown["reason"] == f"{reason}: {NOT_YOURS}"
    assert run.project.read("train.py") != QUICK  # to be tried again as it is


def test_experiments_that_a_command_starts(base: Project, slow, slurm: Slurm, tmp_path: Path):
    """Through srun; with Slurm's messages printed by train.py; through a shell, as ssh does."""
    odd = tmp_path / "it's a path"
    odd.mkdir()
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nshift\ncd /\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    kept = CANDIDATES["kept"]
    projects = [base.copy(folder / "repo") for folder in (tmp_path / "srun", tmp_path / "printed", odd)]
    prepare(projects[0], "srun -n1", kept, slurm)
    prepare(projects[1], "srun -n1", f"raise SystemExit('{PRINTED}')\n", slurm)
    prepare(projects[2], f"{ssh} node", kept)
    runs = [project.start() for project in projects]
    outputs = ["".join(run.communicate(timeout=300)) for run in runs]
    shown = [block(output) for output in outputs]
    assert (runs[0].returncode, shown[0].get("verdict")) == (0, "kept"), outputs[0]
    assert shown[1]["reason"].startswith("crash after"), outputs[1]
    assert (runs[2].returncode, shown[2].get("verdict")) == (0, "kept"), outputs[2]
    assert projects[0].containers() == "" and slurm.call("squeue", "-h") == ""


def test_trainings_that_others_end(start, slow, slurm: Slurm, slurms, seconds):
    """All at the same time; the sandboxes go at once."""
    cancelled, killed, alone, ended = (start("srun -n1", slurm) for _ in range(4))
    down = start("srun -n1", slurms())
    runs = {"scancel": cancelled, "scancel -s KILL": killed, "kill srun": alone, "SIGTERM of run.sh": ended}
    runs["node down"] = down
    for run in runs.values():
        run.wait_for()
    slurm.call("scancel", cancelled.job())
    slurm.call("scancel", "-s", "KILL", killed.job())
    for process in alone.launchers("train"):
        os.kill(process, signal.SIGKILL)
    ended.process.terminate()
    down.slurm.call("scontrol", "update", f"nodename={down.slurm.host}", "state=down", "reason=test")
    since = time.monotonic()
    for what, run in runs.items():
        run.gone(60)  # five at once on two cores: what is promised; alone they took 1 to 8 s
        seconds(what, round(time.monotonic() - since, 1))
    lost_because(cancelled, "Slurm cancelled the job")
    lost_because(killed, "Slurm cancelled the job")
    lost_because(alone, "the launch command was killed")
    lost_because(down, "Slurm: node failure")
    assert ended.process.wait(30) == 143
    wait_for(lambda: slurm.call("squeue", "-h") == "", LIFELINE_S + 30)  # nor does a job without a srun hold the node
    works(cancelled)


def test_what_takes_its_time(start, slow, slurm: Slurm, seconds):
    """Nobody left anywhere, everybody stopped, a node that crashed, Slurm's limit of a minute: they only wait."""
    alone, gone, here, stopped = start("srun -n1", slurm), start("srun -n1", slurm), start(), start()
    for run in (alone, gone, here, stopped):
        run.wait_for()
    alone.process.kill()
    for run in (gone, here):
        run.kill_all()
    os.killpg(stopped.process.pid, signal.SIGSTOP)
    killed = time.monotonic()
    assert "train" in alone.names() and "train" in gone.names() and "train" in here.names()
    for what, run in {
        "SIGKILL of run.sh": alone,
        "SIGKILL of all here": here,
        "of all, and srun": gone,
        "SIGSTOP of all here": stopped,
    }.items():
        run.gone(LIFELINE_S + 20)
        seconds(what, round(time.monotonic() - killed, 1))
    os.killpg(stopped.process.pid, signal.SIGCONT)
    lost_because(stopped, "run.sh stood still, or its files were out of reach, for a minute")
    wait_for(lambda: slurm.call("squeue", "-h") == "", LIFELINE_S + 30)
    slow["crashed"].gone(30)
    seconds("node crash", round(time.monotonic() - slow["crashed"].since, 1))
    lost_because(slow["crashed"], "Slurm: node failure")
    limited = slow["limited"]
    wait_for(lambda: "CANCELLED AT" in limited.project.read(LOG), 90)
    seconds("srun --time=1", limited.gone(30))
    lost_because(limited, "Slurm: time limit")


def test_a_node_that_is_full(base: Project, slurms, tmp_path: Path):
    """Nothing free at first, then room for one container at a time: they queue, which is no training time.

    That for captions gets the place before the one for images.
    """
    other_slurm, late = slurms(), tmp_path / "late"
    conf = f"SLURM_CONF={other_slurm.env['SLURM_CONF']}"
    late.write_text(f'#!/bin/sh\ncase "$*" in *-images\\ *) sleep 2 ;; esac\nexec env {conf} "$@"\n')
    late.chmod(0o755)
    others = [
        subprocess.Popen(["srun", f"-n{n}", "sleep", "600"], env={**os.environ, **other_slurm.env})
        for n in (1, CPUS - 1)
    ]
    wait_for(lambda: other_slurm.call("squeue", "-h", "-t", "R").count("\n") == 2, 20)
    project = base.copy(tmp_path / "repo")
    prepare(project, f"{late} srun -n1", CANDIDATES["kept"])
    run = project.start()
    wait_for(lambda: "PD" in other_slurm.call("squeue", "-h", "-o", "%t"), 20)
    time.sleep(3)
    others[0].terminate()
    out, err = run.communicate(timeout=120)
    assert block(out)["verdict"] == "kept" and "srun -n1' to start train" in err, out + err
    assert "queued and waiting for resources" in project.read(LOG)
    assert float(re.match(r"(\d+) s of", block(out)["train"])[1]) < 10
    for job in others:
        job.terminate()
        job.wait()


def test_a_job_that_never_starts(base: Project, slurm: Slurm, tmp_path: Path):
    """Nothing ran, nothing is recorded; srun's own words are shown."""
    project = base.copy(tmp_path / "repo")

    def start(launch: str) -> subprocess.Popen:
        project.git("checkout", "program.md")
        prepare(project, launch, SLEEP, slurm)
        return project.start()

    def refused(run: subprocess.Popen, words: str) -> None:
        error = run.communicate(timeout=60)[1]
        assert run.returncode == 2 and words in error and "nothing ran" in error, error
        assert project.experiments() == MEASURED and project.read("train.py") == SLEEP

    refused(start("srun -n1 -p nowhere"), "invalid partition specified: nowhere")
    refused(start("srun -n1 -w elsewhere"), "Invalid node name specified")
    run = start("srun -n1 --begin=now+1hour")
    wait_for(lambda: " PD " in slurm.call("squeue", "-h"), 20)
    slurm.call("scancel", "--user", whoami())
    refused(run, "cancelled")
    run = start("srun -n1 --begin=now+1hour")
    wait_for(lambda: " PD " in slurm.call("squeue", "-h"), 20)
    run.terminate()
    run.communicate(timeout=60)
    assert run.returncode == 143
    wait_for(lambda: slurm.call("squeue", "-h") == "", LIFELINE_S + 30)
    refused(start("no-such-command"), "no-such-command")


def test_the_gpus_that_a_scheduler_gave(tmp_path: Path, monkeypatch):
    """What on_node.sh asks of the engine, with a nvidia-smi that knows two GPUs."""
    for name, text in {
        "nvidia-smi": """[ -z "${BROKEN-}" ] || { echo 'Driver/library version mismatch'; exit 18; }
            case "$*" in *-i\\ 1) echo GPU-b ;; *-i*) exit 6 ;; *) echo GPU-a; echo GPU-b ;; esac""",
        "podman": 'printf "%s " "$@"',
        "docker": 'printf "%s " "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def asked(client: str, gpu: str, given: str | None) -> str:
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "BROKEN": os.environ.get("BROKEN", "")} | (
            {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
        )
        argv = ["sh", ROOT / "container/harness/on_node.sh", tmp_path, gpu, "", client, "--rm", "an image"]
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        return re.sub(r"--cpus \d+ --pids-limit \d+ ", "", done.stdout).strip() if done.returncode == 0 else done.stderr

    found = asked("podman --runtime runc", "gpu", "1")
    assert found == "--runtime runc run --device nvidia.com/gpu=GPU-b --rm an image"
    assert asked("podman", "gpu", None).count("--device") == 2
    assert asked("docker", "gpu", None) == 'run --gpus "device=GPU-a,GPU-b" --rm an image'
    assert asked("docker", "none", "1") == "run --rm an image"
    assert "finds no GPU 7" in asked("podman", "gpu", "7")
    for none in ("", "-1", "NoDevFiles"):
        assert asked("docker", "gpu", none) == "run --rm an image"
    assert asked("docker", "gpu", "MIG-a,MIG-b") == 'run --gpus "device=MIG-a,MIG-b" --rm an image'
    monkeypatch.setenv("BROKEN", "1")  # a driver that was updated: no training on the node's CPUs without a word
    assert "version mismatch" in asked("podman", "gpu", None) and asked("podman", "none", None) == "run --rm an image"
