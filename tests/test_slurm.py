"""A launch command: experiments on a real Slurm of one node, whatever ends them; and the lifeline that needs no Slurm.

This machine is the node, so what run.sh removes at its end would hide a container that stayed behind: here it does not.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, Project, block
from slurm import CPUS, Slurm, wait_for
from sweep import CANDIDATES, QUICK, quick

LIFELINE_S = 20  # in most of these tests; 60 in the one that takes it as it is
SWEEP = "    if left:\n        run([*client()"
SLEEP = (
    QUICK
    + """
    import time
    for step in range(1, 1501):
        print(f"step {step}/1500", flush=True)
        time.sleep(0.2)
"""
)
NOT_YOURS = "not the edit's fault; the same idea may be tried again"


@pytest.fixture(scope="module")
def base(measured: Project, tmp_path_factory) -> Project:
    """A project whose incumbent's training takes no time; sandboxes that lost their lifeline wait less."""
    made = measured.copy(tmp_path_factory.mktemp("slurm") / "edited")
    made.edit(SWEEP, SWEEP.replace("left:", 'left and not os.environ.get("AR_LAUNCH"):'), "container/engine.py")
    made.edit("LIFELINE_S = 60", f"LIFELINE_S = {LIFELINE_S}", "container/stage.py")
    made.edit("STILL_S = 45", f"STILL_S = {LIFELINE_S - 5}", "container/experiment.py")
    return quick(tmp_path_factory.mktemp("slurm") / "base", made)


@pytest.fixture(scope="module")
def slurm():
    """For jobs that leave the node as it is."""
    made = Slurm()
    yield made
    made.stop()


@pytest.fixture
def other_slurm():
    """For those that do not."""
    made = Slurm()
    yield made
    made.stop()


@pytest.fixture
def start(base: Project, tmp_path: Path):
    """start(launch, slurm): a training that sleeps, of a project of its own, by that command."""
    runs = []

    def make(launch: str = "", slurm: Slurm | None = None, stage: str = "captions") -> Running:
        runs.append(Running(base.copy(tmp_path / f"p{len(runs)}"), launch, slurm))
        runs[-1].wait_for(stage)
        return runs[-1]

    yield make
    for run in runs:
        run.kill_all()


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
            self.process = subprocess.Popen(
                ["./run.sh"],
                cwd=project.path,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for(self, stage: str) -> None:
        """Until this stage's container is there."""
        wait_for(lambda: re.search(rf"-{stage}$", self.names(), re.M) or self.process.poll() is not None, 90)
        assert self.process.poll() is None, self.out.read_text()

    def names(self) -> str:
        return "\n".join(name(c) for c in self.project.containers().split())

    def jobs(self) -> list[str]:
        """The numbers of its jobs, the training's first; of one project alone on this Slurm."""
        return sorted(self.slurm.call("squeue", "-h", "-o", "%i").split(), key=int)

    def pids(self, words: str) -> list[int]:
        """Processes of its session with these words in their command line."""
        found = []
        for p in Path("/proc").glob("[0-9]*"):
            try:
                session = int((p / "stat").read_text().rpartition(")")[2].split()[3])
                if session == self.process.pid and words in (p / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                    found.append(int(p.name))
            except OSError:
                continue
        return sorted(found)

    def gone(self, limit_s: float) -> float:
        """Seconds until no container of the project is left."""
        return wait_for(lambda: self.project.containers() == "", limit_s)

    def ended(self, limit_s: float = 60) -> tuple[int, dict]:
        """Its exit status and result block."""
        return self.process.wait(limit_s), block(self.out.read_text())

    def kill_all(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def name(container: str) -> str:
    done = subprocess.run(
        ["podman", "ps", "-a", "--filter", f"id={container}", "--format", "{{.Names}}"], capture_output=True, text=True
    )
    return done.stdout.strip()


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


def failed_because(run: Running, reason: str) -> None:
    status, shown = run.ended()
    assert (status, shown.get("verdict")) == (1, "failed"), run.out.read_text()
    assert shown["reason"] == f"{reason}: {NOT_YOURS}"
    assert run.project.read("train.py") == QUICK


def test_an_experiment_through_srun(base: Project, slurm: Slurm, tmp_path: Path):
    project = base.copy(tmp_path / "repo")
    prepare(project, "srun -n1", CANDIDATES["kept"], slurm)
    done = project.run()
    shown = block(done.stdout)
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert project.containers() == "" and slurm.call("squeue", "-h") == ""


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("scancel", "Slurm cancelled the job"),
        ("scancel -s KILL", "Slurm cancelled the job"),
        ("kill srun", "the launch command was killed"),
    ],
)
def test_a_training_that_others_end(how: str, reason: str, start, slurm: Slurm, seconds):
    run = start("srun -n1", slurm)
    if how == "kill srun":
        os.kill(run.pids("srun -n1")[0], signal.SIGKILL)
    else:
        slurm.call(*how.split(), run.jobs()[0])
    seconds(how, run.gone(15))
    failed_because(run, reason)
    wait_for(lambda: slurm.call("squeue", "-h") == "", 30)  # nor does a job without a srun hold the node
    if how == "scancel":
        works(run)


@pytest.mark.parametrize("whom", ["run.sh", "experiment.py"])
def test_when_one_of_ours_is_killed_the_sandboxes_go_at_once(whom: str, start, slurm: Slurm, seconds):
    run = start("srun -n1", slurm)
    os.kill(run.pids(whom)[0], signal.SIGKILL)
    seconds(f"SIGKILL of {whom}", run.gone(15))
    run.process.wait(15)
    wait_for(lambda: slurm.call("squeue", "-h") == "", 30)


@pytest.mark.parametrize("how", ["crash", "down"])
def test_a_node_that_fails(how: str, start, other_slurm: Slurm, seconds):
    run = start("srun -n1", other_slurm)
    if how == "crash":
        other_slurm.crash()
    else:
        other_slurm.call("scontrol", "update", f"nodename={other_slurm.host}", "state=down", "reason=test")
    seconds(f"node {how}", run.gone(60))
    failed_because(run, "Slurm: node failure")


def test_what_takes_its_time(start, slurm: Slurm, seconds):
    """Slurm's limit of a minute, nobody left anywhere, or everybody stopped: at the same time, as they only wait."""
    limited = start("srun -n1 --time=1", slurm, stage="train")
    gone = start("srun -n1", slurm)
    here = start()
    stopped = start()
    for run in (gone, here):
        run.kill_all()
    os.killpg(stopped.process.pid, signal.SIGSTOP)
    killed = time.monotonic()
    assert "train" in gone.names() and "train" in here.names()
    for what, run in {"SIGKILL of all here": here, "of all, and srun": gone, "SIGSTOP of all here": stopped}.items():
        run.gone(LIFELINE_S + 20)
        seconds(what, round(time.monotonic() - killed, 1))
    os.killpg(stopped.process.pid, signal.SIGCONT)
    failed_because(stopped, "run.sh stood still, or its files were out of reach, for a minute")
    wait_for(lambda: "CANCELLED AT" in limited.project.read("runs/0003.log"), 90)
    seconds("srun --time=1", limited.gone(30))
    failed_because(limited, "Slurm: time limit")
    wait_for(lambda: slurm.call("squeue", "-h") == "", 30)


def test_a_node_that_is_full(base: Project, other_slurm: Slurm, tmp_path: Path):
    """Nothing free at first, then room for one container at a time: they queue, which is no training time."""
    others = [subprocess.Popen(["srun", f"-n{n}", "sleep", "600"], env={**os.environ, **other_slurm.env})
              for n in (1, CPUS - 1)]  # fmt: skip
    wait_for(lambda: other_slurm.call("squeue", "-h", "-t", "R").count("\n") == 2, 20)
    project = base.copy(tmp_path / "repo")
    prepare(project, "srun -n1", CANDIDATES["kept"], other_slurm)
    run = subprocess.Popen(["./run.sh"], cwd=project.path, stdout=subprocess.PIPE,
                           stderr=subprocess.PIPE, text=True)  # fmt: skip
    time.sleep(12)
    others[0].terminate()
    out, err = run.communicate(timeout=120)
    assert block(out)["verdict"] == "kept" and "srun -n1' to start train" in err, out + err
    assert "queued and waiting for resources" in project.read("runs/0003.log")
    assert float(re.match(r"(\d+) s of", block(out)["train"])[1]) < 10
    for job in others:
        job.terminate()
        job.wait()


def test_a_job_that_never_starts(base: Project, slurm: Slurm, tmp_path: Path):
    """Nothing ran, nothing is recorded; srun's own words are shown."""

    def refused(words: str) -> None:
        code, out = run.wait(60), run.stderr.read()
        assert code == 2 and words in out and "could not run" in out, out
        assert project.experiments() == [1, 2] and project.read("train.py") == SLEEP

    def start(launch: str) -> subprocess.Popen:
        project.git("checkout", "program.md")
        prepare(project, launch, SLEEP, slurm)
        return subprocess.Popen(["./run.sh"], cwd=project.path, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip

    project = base.copy(tmp_path / "repo")
    run = start("srun -n1 -p nowhere")
    refused("invalid partition specified: nowhere")
    run = start("srun -n1 -w elsewhere")
    refused("Invalid node name specified")
    run = start("srun -n1 --begin=now+1hour")
    wait_for(lambda: " PD " in slurm.call("squeue", "-h"), 20)
    slurm.call("scancel", "--user", "root")
    refused("cancelled")
    run = start("srun -n1 --begin=now+1hour")
    wait_for(lambda: " PD " in slurm.call("squeue", "-h"), 20)
    run.terminate()
    assert run.wait(60) == 143
    wait_for(lambda: slurm.call("squeue", "-h") == "", 30)
    run.stderr.close()
    run = start("no-such-command")
    refused("no-such-command")


def test_words_of_slurm_that_train_py_prints_change_nothing(base: Project, slurm: Slurm, tmp_path: Path):
    project = base.copy(tmp_path / "repo")
    said = "slurmstepd: error: *** STEP 5.0 ON node CANCELLED AT 2026-11-23T20:37:09 DUE TO TIME LIMIT ***"
    prepare(project, "srun -n1", f"raise SystemExit('{said}')\n", slurm)
    done = project.run()
    assert block(done.stdout)["reason"].startswith("crash after"), done.stdout + done.stderr


def test_through_a_shell_as_ssh_does(base: Project, tmp_path: Path):
    """ssh joins the words that it is given, and another machine's shell takes them apart."""
    odd = tmp_path / "it's a path"
    odd.mkdir()
    project = base.copy(odd / "repo")
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nshift\ncd /\nexec sh -c "$*"\n')
    ssh.chmod(0o755)
    prepare(project, f"{ssh} node", CANDIDATES["kept"])
    done = project.run()
    assert (done.returncode, block(done.stdout)["verdict"]) == (0, "kept"), done.stdout + done.stderr


def test_the_gpus_that_a_scheduler_gave(tmp_path: Path):
    """What on_node.sh asks of the engine, with a nvidia-smi that knows two GPUs."""
    for name, text in {
        "nvidia-smi": 'case "$*" in *-i\\ 1) echo GPU-b ;; *-i*) exit 6 ;; *) echo GPU-a; echo GPU-b ;; esac',
        "podman": 'printf "%s " "$@"',
        "docker": 'printf "%s " "$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)

    def asked(client: str, gpu: str, given: str | None) -> str:
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin"} | ({} if given is None else {"CUDA_VISIBLE_DEVICES": given})
        argv = ["sh", ROOT / "container/on_node.sh", tmp_path, gpu, "", client, "--rm", "an image"]
        done = subprocess.run(argv, env=env, capture_output=True, text=True)
        return re.sub(r"--cpus \d+ ", "", done.stdout).strip() if done.returncode == 0 else done.stderr

    found = asked("podman --runtime runc", "gpu", "1")
    assert found == "--runtime runc run --device nvidia.com/gpu=GPU-b --rm an image"
    assert asked("podman", "gpu", None).count("--device") == 2
    assert asked("docker", "gpu", None) == 'run --gpus "device=GPU-a,GPU-b" --rm an image'
    assert asked("docker", "none", "1") == "run --rm an image"
    assert "knows no GPU 7" in asked("podman", "gpu", "7")
