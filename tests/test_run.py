"""./run.sh with the real engine, real git and real trainings of a few seconds: every verdict, every refusal."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import PROGRAM, ROOT, Project, block

BUDGET = 20  # seconds, for tests that run into it
HANG = """
    import signal
    for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        try: signal.signal(s, signal.SIG_IGN)
        except (OSError, ValueError): pass
    print("step 7/300 loss 4.000", flush=True)
    while True:
        pass
"""


def inject(project: Project, code: str) -> None:
    """Put code at the beginning of train.py's main()."""
    project.edit("def main() -> None:\n", "def main() -> None:\n" + code.strip("\n") + "\n")


def small_budget(project: Project) -> None:
    """A plan with a short hard limit; its baseline is measured anew, since the budget is part of what is compared."""
    project.edit("budget: 120", f"budget: {BUDGET}", "program.md")
    project.set("STEPS", "2")
    project.git("commit", "-qam", "short")
    assert project.run().returncode == 0


def test_baseline_is_run_twice_and_recorded(measured: Project):
    shown = block(measured.baseline.stdout)
    assert shown["verdict"] == "baseline" and "mean of 2 runs" in shown["mean_rank"]
    assert "gallery 200, random 100.5" in shown["mean_rank"]
    assert len(measured.baseline.stdout.encode()) <= 2048
    trailers = measured.trailers("refs/experiments/1")
    assert len(trailers["Mean-Rank-Runs"].split()) == 2 and len(set(trailers["Seed"].split())) == 2
    files = measured.git("ls-tree", "--name-only", "refs/experiments/1:experiment").split()
    arrays = ["examples-2.npy", "examples.npy", "ranks-2.npy", "ranks.npy"]
    assert sorted(files) == sorted([*arrays, "program.md", "result.json", "train.log"])
    assert measured.git("rev-parse", "HEAD^{tree}") != "" and measured.git("status", "--porcelain") == ""


def test_a_change_that_helps_is_kept_and_one_that_hurts_is_reverted(project: Project):
    """And the user's own uncommitted and staged work survives both, and the next commit holds only what was staged."""
    project.write("notes.txt", "mine, untracked")
    project.write("README.md", project.read("README.md") + "an uncommitted line\n")
    project.write("LICENSE", project.read("LICENSE") + "a staged line\n")
    project.git("add", "LICENSE")

    project.set("STEPS", "120")
    edited = project.read("train.py")
    done, shown = project.experiment("more steps: four times as long")
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert len(done.stdout.encode()) <= 2048
    assert project.git("log", "-1", "--format=%s").startswith("more steps: four times as long (")
    assert project.git("show", "--stat", "--format=", "--name-only", "HEAD").split() == ["scratchpad.md", "train.py"]
    assert project.read("train.py") == edited == project.git("show", "HEAD:train.py") + "\n"
    kept = project.trailers("HEAD")
    assert kept["Verdict"] == "kept" and kept["Experiment"] == "2" and kept["Change"].endswith(" sigma better)")
    assert project.git("diff", "--cached", "--name-only") == "LICENSE"
    assert project.git("diff", "--name-only") == "README.md"
    project.git("commit", "-qm", "what the user staged")
    assert project.git("show", "--format=", "--name-only", "HEAD").split() == ["LICENSE"]

    project.set("LR", "1e-9")
    done, shown = project.experiment("hardly learn at all")
    assert (done.returncode, shown["verdict"]) == (0, "discarded"), done.stdout + done.stderr
    assert project.read("train.py") == edited
    record = "refs/experiments/3"
    assert "LR = 1e-9" in project.git("show", f"{record}:train.py")
    assert "step " in project.git("show", f"{record}:experiment/train.log")
    assert (
        len(
            subprocess.run(
                ["git", "show", f"{record}:experiment/ranks.npy"], cwd=project.path, capture_output=True
            ).stdout
        )
        == 128 + 2 * 200 * 4
    )
    assert "+LR = 1e-9" in project.git("show", record)
    assert project.git("log", "-1", "--format=%s") == "what the user staged"
    assert "an uncommitted line" in project.read("README.md") and project.read("notes.txt") == "mine, untracked"
    assert "hardly learn" in project.read("runs/experiments.tsv")

    project.set("LR", "1e-9")
    done, _ = project.experiment("the same file again")
    assert done.returncode == 2 and "experiment 3, discarded" in done.stderr

    done = project.run("keep", "3")
    assert done.returncode == 2 and "uncommitted changes" in done.stderr
    project.git("checkout", "train.py")
    done = project.run("keep", "3")
    assert done.returncode == 0, done.stderr
    assert "LR = 1e-9" in project.read("train.py") and "kept by hand" in project.git("log", "-1", "--format=%s")
    assert project.git("diff", "--name-only").split() == ["README.md"]
    assert "best" in project.run("status").stdout and "hardly learn" in project.run("log").stdout
    assert project.containers() == ""


def test_a_small_gain_is_run_twice(project: Project):
    project.edit("stop:", "confirm_below: 99\nstop:", "program.md")
    project.set("STEPS", "120")
    done, shown = project.experiment("more steps, under a rule that always wants to see it twice")
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert "mean of 2 runs" in shown["mean_rank"]
    runs = project.trailers("HEAD")["Mean-Rank-Runs"].split()
    assert len(runs) == 2 and len(set(project.trailers("HEAD")["Seed"].split())) == 2


def test_a_crash_shows_its_traceback_and_may_be_tried_again(project: Project):
    before = project.read("train.py")
    inject(project, "    assert STEPS < 0, 'no such luck'")
    done, shown = project.experiment("crash on purpose")
    assert (done.returncode, shown["verdict"]) == (1, "failed")
    assert re.fullmatch(r"crash after [\d.]+ s(, .* steps)?: AssertionError: no such luck", shown["reason"])
    assert "| AssertionError: no such luck" in done.stdout and 'train.py", line' in done.stdout
    assert "runpy" not in done.stdout and len(done.stdout.encode()) <= 2048
    assert project.read("train.py") == before
    assert "no such luck" in project.git("show", "refs/experiments/2:train.py")
    assert "no such luck" in project.read("runs/0002.diff") and "no such luck" in project.read("runs/0002.log")

    inject(project, "    print('\\x1b[2J' + 'x' * 5_000_000); raise SystemExit('gave up')")
    done, shown = project.experiment("crash on purpose")  # the same hypothesis, after a failure
    assert shown["verdict"] == "failed" and "gave up" in done.stdout and "\x1b" not in done.stdout
    assert os.path.getsize(project.path / "runs/0003.log") < 530_000  # 256 KiB from either end


def test_load_is_probed_where_its_traceback_may_be_shown(project: Project):
    project.edit(
        "    *made_of, weights = torch", "    raise KeyError('positional_embedding')\n    *made_of, weights = torch"
    )
    done, shown = project.experiment("break load")
    assert done.returncode == 1 and shown["reason"].startswith("load:")
    assert "KeyError: 'positional_embedding'" in done.stdout


def test_what_cannot_be_judged_fails(project: Project):
    """Two widths; tests/cheats.py has everything that somebody could mean by it."""
    project.edit(
        "    return model.to(device).eval()",
        "    encode = model.encode_text\n    model.encode_text = lambda texts: encode(texts)[:, :8]\n"
        "    return model.to(device).eval()",
    )
    done, shown = project.experiment("forget half of the text")
    assert (done.returncode, shown["verdict"]) == (1, "failed"), done.stdout + done.stderr
    assert shown["reason"] == "invalid output: image and text embeddings differ in width: 64 and 8"


def test_an_endless_loop_that_ignores_signals_is_killed_at_the_limit(project: Project):
    small_budget(project)
    inject(project, HANG)
    started = time.monotonic()
    done, shown = project.experiment("never end")
    assert (done.returncode, shown["verdict"]) == (1, "failed")
    assert shown["reason"] == f"time limit: killed at the budget of {BUDGET} s, 7 of 300 steps"
    assert time.monotonic() - started < BUDGET + 60
    assert project.containers() == ""


def test_out_of_memory_is_named(project: Project):
    inject(project, "    hog = [torch.ones(1 << 26) for _ in range(64)]")
    done, shown = project.experiment("allocate 16 GB")
    assert (done.returncode, shown["verdict"]) == (1, "failed")
    assert shown["reason"].startswith("out of memory: more than 3g of main memory after")


def test_training_sees_the_training_split_and_nothing_else(project: Project):
    """Not the keys, not validation or test, no environment of the caller, no network, no second writable place."""
    inject(
        project,
        """
    import socket, subprocess
    print(subprocess.run("find / -xdev -name '*.arrow' -o -name '*key*.npy' -o -name 'prints*' 2>/dev/null; "
                         "find /data -name '*.arrow'; env; id -u; "
                         "cat /proc/net/dev; touch /code/x /data/x /harness/x /usr/x",
                         shell=True, capture_output=True, text=True).stdout)
    for family in (socket.AF_VSOCK, socket.AF_PACKET, socket.AF_NETLINK):
        kind = socket.SOCK_STREAM if family == socket.AF_VSOCK else socket.SOCK_RAW
        try: socket.socket(family, kind); print("OPEN", family)
        except OSError as e: print("closed", family, e)
    raise SystemExit("looked around")
""",
    )
    done, _ = project.experiment(
        "look around", env={"ANTHROPIC_API_KEY": "sk-secret", "CLAUDE_CODE_MESSAGING_TOKEN": "token-secret"}
    )
    log = project.read("runs/0002.log")
    assert "looked around" in log and "secret" not in log and "OPEN" not in log and "10001" in log
    assert log.count(".arrow") == log.count("/data/data-") and "key.npy" not in log
    assert "prints" not in log  # its source could draw the validation pairs again
    assert "eth0" not in log and "SEED=" in log


@pytest.mark.parametrize(
    ("hypothesis", "message"),
    [
        ("", "no hypothesis"),
        ("write one line here", "no hypothesis"),
        ("x" * 101, "has 101 characters"),
    ],
)
def test_without_a_hypothesis_nothing_runs(project: Project, hypothesis: str, message: str):
    project.set("STEPS", "40")
    done, _ = project.experiment(hypothesis)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""
    assert project.experiments() == [1]


def test_refusals_name_the_next_step(project: Project):
    """Each is one line, exit 2, and leaves no experiment behind."""

    def refused(message: str, env: dict | None = None) -> None:
        done = project.run(env=env)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert project.experiments() == [1]

    project.hypothesis("an idea")
    project.edit("budget: 120", "budget: soon", "program.md")
    refused("program.md line 5: budget: soon: want a whole number")
    project.git("checkout", "program.md")
    project.edit("data: prints", "data: elsewhere", "program.md")
    refused("data/elsewhere/info.json is missing")
    project.git("checkout", "program.md")
    (project.path / "train.py").rename(project.path / "real.py")
    refused("train.py must be one ordinary file")
    (project.path / "train.py").symlink_to("real.py")
    refused("train.py must be one ordinary file")
    (project.path / "train.py").unlink()
    os.link(project.path / "real.py", project.path / "train.py")
    refused("train.py must be one ordinary file")
    (project.path / "real.py").unlink()
    (project.path / ".git" / "MERGE_HEAD").write_text(project.git("rev-parse", "HEAD"))
    refused("git is in the middle of a MERGE")
    (project.path / ".git" / "MERGE_HEAD").unlink()
    assert "unknown verb" in project.run("fly").stderr and "exit status" in project.run("help").stdout


def test_two_runs_at_once_and_a_killed_one(project: Project):
    """The second is refused; after a SIGKILL the next run sweeps the container and works."""
    inject(project, "    time.sleep(60)")
    project.hypothesis("sleep")
    first = subprocess.Popen(
        ["./run.sh"], cwd=project.path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while not project.containers() and time.monotonic() < deadline:
        time.sleep(0.2)
    done = project.run()
    assert done.returncode == 2 and "another experiment is running: experiment 2 (candidate, run 1)" in done.stderr
    assert "experiment 2" in project.run("status").stdout
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert project.containers() != ""
    project.git("checkout", "train.py")
    project.set("LR", "1e-9")
    done, shown = project.experiment("hardly learn")
    assert (done.returncode, shown["experiment"], shown["verdict"]) == (0, "2", "discarded"), done.stderr
    assert project.containers() == "" and "fatal" not in project.git("fsck")


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL])
def test_when_run_sh_alone_is_ended_its_containers_go_too(project: Project, signal_: int):
    inject(project, "    time.sleep(90)")
    project.hypothesis("sleep")
    first = subprocess.Popen(["./run.sh"], cwd=project.path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(project.containers().split()) == 3)  # training, and both sides wait to embed
    first.send_signal(signal_)
    first.wait(timeout=30)
    wait_for(lambda: project.containers() == "")
    project.git("checkout", "train.py")
    assert "nothing" in project.run("status").stdout and project.experiments() == [1]


def wait_for(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.2)


def test_bytes_are_the_same_in_file_run_hash_and_record(project: Project):
    """With autocrlf and a clean filter configured, which git would apply to what it is given."""
    project.git("config", "core.autocrlf", "true")
    project.git("config", "filter.shout.clean", "tr a-z A-Z")
    project.write(".git/info/attributes", "train.py filter=shout\n")
    text = (
        project.read("train.py").replace("\n", "\r\n", 5)
        + "\nprint(__import__('hashlib').sha256(open(__file__, 'rb').read()).hexdigest())\n"
    )
    (project.path / "train.py").write_bytes(text.encode())
    project.hypothesis("odd line ends")
    before = subprocess.run(["sha256sum", "train.py"], cwd=project.path, capture_output=True, text=True).stdout.split()[
        0
    ]
    incumbent = subprocess.run(
        ["git", "cat-file", "blob", "HEAD:train.py"], cwd=project.path, capture_output=True
    ).stdout
    project.run()
    assert before in project.read("runs/0002.log")
    recorded = subprocess.run(
        ["git", "cat-file", "blob", "refs/experiments/2:train.py"], cwd=project.path, capture_output=True
    ).stdout
    assert recorded == text.encode()
    after = (project.path / "train.py").read_bytes()
    assert after == (text.encode() if project.trailers("refs/experiments/2")["Verdict"] == "kept" else incumbent)


def test_odd_places(measured: Project, tmp_path):
    """Spaces, quotes and unicode in the path, umask 077, a detached HEAD, no identity, a worktree that shares data."""
    odd = tmp_path / 'it\'s a "répo" dir'
    shutil.copytree(measured.path, odd, ignore=shutil.ignore_patterns("data"))
    shutil.copytree(measured.path / "data", odd / "data", copy_function=os.link)
    project = Project(odd)
    project.git("config", "--unset", "user.name")
    project.git("config", "--unset", "user.email")
    project.git("checkout", "-q", "--detach")
    project.git("worktree", "add", "-q", str(tmp_path / "second"))
    other = Project(tmp_path / "second")
    other.set("STEPS", "120")
    other.hypothesis("more steps, from a worktree")
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["sh", "-c", "umask 077; exec ./run.sh"], cwd=other.path, env=env, capture_output=True, text=True
    )
    assert block(done.stdout)["verdict"] == "kept", done.stdout + done.stderr
    assert other.git("log", "-1", "--format=%an") == "autoresearch"
    project.set("LR", "1e-9")
    project.hypothesis("hardly learn")
    done = subprocess.run(["sh", "-c", "umask 077; exec ./run.sh"], cwd=odd, env=env, capture_output=True, text=True)
    assert block(done.stdout)["verdict"] == "discarded", done.stdout + done.stderr
    assert project.experiments() == [1, 2, 3]


def test_a_person_measures_the_incumbent_once_more_and_other_data_is_never_compared(project: Project):
    done = project.run()
    assert block(done.stdout)["verdict"] == "remeasured"
    assert len(project.trailers("refs/experiments/2")["Mean-Rank-Runs"].split()) == 1
    done = project.run("data", "prints")
    assert done.returncode == 2 and "exists already" in done.stderr
    project.edit("budget: 120", "budget: 119", "program.md")
    project.set("LR", "1e-9")
    done, shown = project.experiment("hardly learn, under another budget")
    assert shown["verdict"] == "discarded" and "2 runs" in shown["before"]
    assert "experiment 3 measured the incumbent first" in done.stderr
    assert project.experiments() == [1, 2, 3, 4] and project.trailers("refs/experiments/3")["Verdict"] == "baseline"


def test_own_data(measured: Project, tmp_path):
    """ODVG lines and images written by people: the 20-line fixture, and the larger sample where it is there."""
    project = Project(shutil.copytree(measured.path, tmp_path / "repo", ignore=shutil.ignore_patterns("data")))
    project.set("STEPS", "10")
    project.git("commit", "-qam", "short")
    sample = ROOT.parent / "shared" / "data" / "nlvr-sample"
    for name, folder in {
        "own": ROOT / "tests" / "fixtures" / "odvg",
        **({"nlvr": sample} if sample.is_dir() else {}),
    }.items():
        done = project.run("data", name, "--odvg", str(folder))
        assert done.returncode == 0, done.stderr
        project.write("program.md", PROGRAM.replace("data: prints", f"data: {name}"))
        assert block(project.run().stdout)["verdict"] == "baseline"
        project.set("LR", "1e-9")
        done, shown = project.experiment(f"hardly learn, on {name}")
        assert shown["verdict"] in ("kept", "discarded") and done.returncode == 0, done.stdout + done.stderr
        project.git("checkout", "-q", "HEAD", "train.py")
        if shown["verdict"] == "kept":
            project.git("reset", "-q", "--hard", "HEAD^")

    broken = tmp_path / "broken"
    shutil.copytree(ROOT / "tests" / "fixtures" / "odvg", broken)
    next((broken / "images").iterdir()).unlink()
    done = project.run("data", "broken", "--odvg", str(broken))
    assert (
        done.returncode == 1
        and ".jsonl line " in done.stderr + done.stdout
        and not (project.path / "data/broken").exists()
    )
    assert "no such folder" in project.run("data", "nowhere", "--odvg", str(tmp_path / "nowhere")).stderr
