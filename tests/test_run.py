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
from sweep import CANDIDATES, QUICK

BUDGET = 10  # seconds, for tests that run into it
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
    """Put code where train.py begins to train."""
    project.edit('if __name__ == "__main__":\n', 'if __name__ == "__main__":\n' + code.strip("\n") + "\n")


def small_budget(project: Project) -> None:
    """A plan with a short hard limit; its baseline is measured anew, since the budget is part of what is compared."""
    project.edit("budget: 120", f"budget: {BUDGET}", "program.md")
    project.git("commit", "-qm", "short", "program.md")
    project.git("checkout", "-q", "train.py")
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


def test_a_change_that_helps_is_kept_and_one_that_hurts_is_reverted(fast: Project):
    """And the user's own uncommitted and staged work survives both, and the next commit holds only what was staged."""
    fast.write("notes.txt", "mine, untracked")
    fast.write("README.md", fast.read("README.md") + "an uncommitted line\n")
    fast.write("LICENSE", fast.read("LICENSE") + "a staged line\n")
    fast.git("add", "LICENSE")

    edited, turned = CANDIDATES.values()
    fast.write("train.py", edited)
    done, shown = fast.experiment("words: fitted to rough pixels")
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert len(done.stdout.encode()) <= 2048
    assert fast.git("log", "-1", "--format=%s").startswith("words: fitted to rough pixels (")
    assert fast.git("show", "--stat", "--format=", "--name-only", "HEAD").split() == ["scratchpad.md", "train.py"]
    assert fast.read("train.py") == edited == fast.git("show", "HEAD:train.py") + "\n"
    kept = fast.trailers("HEAD")
    assert kept["Verdict"] == "kept" and kept["Experiment"] == "3" and kept["Change"].endswith(" sigma better)")
    assert fast.git("diff", "--cached", "--name-only") == "LICENSE"
    assert fast.git("diff", "--name-only") == "README.md"
    fast.git("commit", "-qm", "what the user staged")
    assert fast.git("show", "--format=", "--name-only", "HEAD").split() == ["LICENSE"]

    fast.write("train.py", turned)
    done, shown = fast.experiment("the sign turned")
    assert (done.returncode, shown["verdict"]) == (0, "discarded"), done.stdout + done.stderr
    assert fast.read("train.py") == edited
    record = "refs/experiments/4"
    assert "SIGN = -1" in fast.git("show", f"{record}:train.py")
    assert "what train.py printed" in fast.git("show", f"{record}:experiment/train.log")
    assert (
        len(
            subprocess.run(["git", "show", f"{record}:experiment/ranks.npy"], cwd=fast.path, capture_output=True).stdout
        )
        == 128 + 2 * 200 * 4
    )
    assert "+SIGN = -1" in fast.git("show", record)
    assert fast.git("log", "-1", "--format=%s") == "what the user staged"
    assert "an uncommitted line" in fast.read("README.md") and fast.read("notes.txt") == "mine, untracked"
    assert "the sign turned" in fast.read("runs/experiments.tsv")

    fast.write("train.py", turned)
    done, _ = fast.experiment("the same file again")
    assert done.returncode == 2 and "experiment 4, discarded" in done.stderr

    done = fast.run("keep", "4")
    assert done.returncode == 2 and "uncommitted changes" in done.stderr
    fast.git("checkout", "train.py")
    done = fast.run("keep", "4")
    assert done.returncode == 0, done.stderr
    assert "SIGN = -1" in fast.read("train.py") and "kept by hand" in fast.git("log", "-1", "--format=%s")
    assert fast.git("diff", "--name-only").split() == ["README.md"]
    assert "best" in fast.run("status").stdout and "the sign turned" in fast.run("log").stdout
    assert fast.containers() == ""


def test_a_small_gain_is_run_twice(fast: Project):
    fast.edit("stop:", "confirm_below: 99\nstop:", "program.md")
    fast.write("train.py", CANDIDATES["kept"].replace("5 * torch.eye", "(5 + int(os.environ['SEED']) % 9) * torch.eye"))
    done, shown = fast.experiment("words fitted to rough pixels, under a rule that always wants to see it twice")
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert "mean of 2 runs" in shown["mean_rank"]
    runs = fast.trailers("HEAD")["Mean-Rank-Runs"].split()
    assert len(runs) == 2 and len(set(fast.trailers("HEAD")["Seed"].split())) == 2


def test_a_crash_shows_its_traceback_and_may_be_tried_again(fast: Project):
    before = QUICK
    inject(fast, "    assert SIGN < 0, 'no such luck'")
    done, shown = fast.experiment("crash on purpose")
    assert (done.returncode, shown["verdict"]) == (1, "failed")
    assert re.fullmatch(r"crash after [\d.]+ s(, .* steps)?: AssertionError: no such luck", shown["reason"])
    assert "| AssertionError: no such luck" in done.stdout and 'train.py", line' in done.stdout
    assert "runpy" not in done.stdout and len(done.stdout.encode()) <= 2048
    assert fast.read("train.py") == before
    assert "no such luck" in fast.git("show", "refs/experiments/3:train.py")
    assert "no such luck" in fast.read("runs/0003.diff") and "no such luck" in fast.read("runs/0003.log")

    inject(fast, "    print('\\x1b[2J' + 'x' * 5_000_000); raise SystemExit('gave up')")
    done, shown = fast.experiment("crash on purpose")  # the same hypothesis, after a failure
    assert shown["verdict"] == "failed" and "gave up" in done.stdout and "\x1b" not in done.stdout
    assert os.path.getsize(fast.path / "runs/0004.log") < 530_000  # 256 KiB from either end


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


def test_an_endless_loop_that_ignores_signals_is_killed_at_the_limit(fast: Project):
    small_budget(fast)
    inject(fast, HANG)
    started = time.monotonic()
    done, shown = fast.experiment("never end")
    assert (done.returncode, shown["verdict"]) == (1, "failed")
    assert shown["reason"] == f"time limit: killed at the budget of {BUDGET} s, 7 of 300 steps"
    assert time.monotonic() - started < BUDGET + 60
    assert fast.containers() == ""


def test_out_of_memory_is_named(fast: Project):
    inject(fast, "    hog = [torch.ones(1 << 26) for _ in range(64)]")
    done, shown = fast.experiment("allocate 16 GB")
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


def test_two_runs_at_once_and_a_killed_one(fast: Project):
    """The second is refused; after a SIGKILL the next run sweeps the container and works."""
    inject(fast, "    import time; time.sleep(60)")
    fast.hypothesis("sleep")
    first = subprocess.Popen(
        ["./run.sh"], cwd=fast.path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while not fast.containers() and time.monotonic() < deadline:
        time.sleep(0.2)
    done = fast.run()
    assert done.returncode == 2 and "another experiment is running: experiment 3 (candidate, run 1)" in done.stderr
    assert "experiment 3" in fast.run("status").stdout
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert fast.containers() != ""
    fast.write("train.py", CANDIDATES["discarded"])
    done, shown = fast.experiment("the sign turned")
    assert (done.returncode, shown["experiment"], shown["verdict"]) == (0, "3", "discarded"), done.stderr
    assert fast.containers() == "" and "fatal" not in fast.git("fsck")


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL])
def test_when_run_sh_alone_is_ended_its_containers_go_too(fast: Project, signal_: int):
    inject(fast, "    import time; time.sleep(90)")
    fast.hypothesis("sleep")
    first = subprocess.Popen(["./run.sh"], cwd=fast.path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(fast.containers().split()) == 3)  # training, and both sides wait to embed
    first.send_signal(signal_)
    first.wait(timeout=30)
    wait_for(lambda: fast.containers() == "")
    fast.git("checkout", "train.py")
    assert "nothing" in fast.run("status").stdout and fast.experiments() == [1, 2]


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


def test_odd_places(quick_base: Project, tmp_path):
    """Spaces, quotes and unicode in the path, umask 077, a detached HEAD, no identity, a worktree that shares data."""
    odd = tmp_path / 'it\'s a "répo" dir'
    project = quick_base.copy(odd)
    project.git("config", "--unset", "user.name")
    project.git("config", "--unset", "user.email")
    project.git("checkout", "-q", "--detach")
    project.git("worktree", "add", "-q", str(tmp_path / "second"))
    other = Project(tmp_path / "second")
    other.write("train.py", CANDIDATES["kept"])
    other.hypothesis("words fitted to rough pixels, from a worktree")
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        ["sh", "-c", "umask 077; exec ./run.sh"], cwd=other.path, env=env, capture_output=True, text=True
    )
    assert block(done.stdout)["verdict"] == "kept", done.stdout + done.stderr
    assert other.git("log", "-1", "--format=%an") == "autoresearch"
    project.write("train.py", CANDIDATES["discarded"])
    project.hypothesis("the sign turned")
    done = subprocess.run(["sh", "-c", "umask 077; exec ./run.sh"], cwd=odd, env=env, capture_output=True, text=True)
    assert block(done.stdout)["verdict"] == "discarded", done.stdout + done.stderr
    assert project.experiments() == [1, 2, 3, 4]


def test_a_scratchpad_that_git_does_not_know(fast: Project):
    fast.git("rm", "-q", "--cached", "scratchpad.md")
    fast.git("commit", "-qm", "mine alone")
    fast.edit("budget: 120", "budget: 119", "program.md")  # HEAD is measured first
    fast.write("train.py", CANDIDATES["kept"])
    done, shown = fast.experiment("words fitted to rough pixels")
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert fast.run("status").returncode == 0 and "best:     mean_rank" in fast.run("status").stdout
    assert fast.experiments() == [1, 2, 3, 4] and fast.git("status", "--short", "scratchpad.md") == ""


def test_a_person_measures_the_incumbent_once_more_and_other_data_is_never_compared(fast: Project):
    done = fast.run()
    assert block(done.stdout)["verdict"] == "remeasured"
    assert len(fast.trailers("refs/experiments/3")["Mean-Rank-Runs"].split()) == 1
    done = fast.run("data", "prints")
    assert done.returncode == 2 and "exists already" in done.stderr
    fast.edit("budget: 120", "budget: 119", "program.md")
    fast.write("train.py", CANDIDATES["discarded"])
    done, shown = fast.experiment("the sign turned, under another budget")
    assert shown["verdict"] == "discarded" and "2 runs" in shown["before"]
    assert "experiment 4 measured the incumbent first" in done.stderr
    assert fast.experiments() == [1, 2, 3, 4, 5] and fast.trailers("refs/experiments/4")["Verdict"] == "baseline"


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
