"""./run.sh with the real engine, real git and real trainings of a few seconds: what only those can show.

Every refusal and every verdict are in tests/unit/test_experiment.py, without an engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

import in_process
import stand_ins
from record import Attempt
from repository import CANDIDATES, PROGRAM, QUICK, ROOT, Project, block

BUDGET = 6  # seconds, for a test that runs into it
LIFELINE_S = 12  # instead of a minute
# results under another budget are compared with those under the plan's
ANY_BUDGET = """
import dataclasses
compare = dataset.comparable
dataset.comparable = lambda program, image: compare(dataclasses.replace(program, budget=120), image)
"""
HANG = """
    import signal
    for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        try: signal.signal(s, signal.SIG_IGN)
        except (OSError, ValueError): pass
    print("step 7/300 loss 4.000", flush=True)
    while True:
        pass
"""
SLEEP = "    import time; time.sleep(90)"


def inject(project: Project, code: str) -> None:
    """Put code where train.py begins to train."""
    project.edit('if __name__ == "__main__":\n', 'if __name__ == "__main__":\n' + code.strip("\n") + "\n")


def wait_for(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.2)


def test_baseline_is_run_twice_and_recorded(measured: Project):
    shown = block(measured.baseline.stdout)
    assert shown["verdict"] == "baseline" and "mean of 2 runs" in shown["mean_rank"]
    assert "gallery 200, random 100.5" in shown["mean_rank"] and "in that gallery; 200 training pairs" in shown["fit"]
    assert re.search(r"\d+ ms a step", shown["train"]) and "note" not in shown
    assert len(measured.baseline.stdout.encode()) <= 2048
    trailers = measured.trailers("refs/experiments/1")
    assert len(trailers["Mean-Rank-Runs"].split()) == 2 and len(set(trailers["Seed"].split())) == 2
    files = measured.git("ls-tree", "--name-only", "refs/experiments/1:experiment").split()
    arrays = ["examples-2.npy", "examples.npy", "ranks-2.npy", "ranks.npy"]
    assert sorted(files) == sorted([*arrays, "program.md", "result.json", "train.log"])
    assert measured.git("status", "--porcelain") == ""
    # what the tests without an engine make up is like what is measured
    result = json.loads(measured.git("show", "refs/experiments/1:experiment/result.json"))
    made_up = in_process.made_up_run(100.0)
    for key in ("metrics", "train", "timing"):
        assert set(result["runs"][0][key]) >= set(getattr(made_up, key)), key
    assert set(result["runs"][0]["metrics"]) == set(made_up.metrics) and set(result) == set(vars(Attempt()))


def test_a_change_that_helps_is_kept_one_that_hurts_is_reverted_and_a_person_overrules(fast: Project):
    edited, turned = CANDIDATES.values()
    fast.write("train.py", edited)
    done, shown = fast.experiment("words: fitted to rough pixels")
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert len(done.stdout.encode()) <= 2048
    assert fast.git("log", "-1", "--format=%s").startswith("words: fitted to rough pixels (")
    assert fast.git("show", "--stat", "--format=", "--name-only", "HEAD").split() == ["scratchpad.md", "train.py"]
    assert fast.read("train.py") == edited == fast.git("show", "HEAD:train.py") + "\n"
    assert fast.git("diff", "--cached", "--name-only") == "LICENSE" and fast.git("diff", "--name-only") == ""

    fast.write("train.py", turned)
    done, shown = fast.experiment("the sign turned")
    assert (done.returncode, shown["verdict"]) == (0, "discarded"), done.stdout + done.stderr
    assert fast.read("train.py") == edited and fast.read("notes.txt") == "mine"
    assert "SIGN = -1" in fast.git("show", "refs/experiments/4:train.py")
    assert "what train.py printed" in fast.git("show", "refs/experiments/4:experiment/train.log")
    show = ["git", "show", "refs/experiments/4:experiment/ranks.npy"]
    assert len(subprocess.run(show, cwd=fast.path, capture_output=True).stdout) == 128 + 2 * 200 * 4

    done = fast.run("keep", "4")
    assert done.returncode == 0, done.stderr
    assert fast.read("train.py") == turned and "kept by hand" in fast.git("log", "-1", "--format=%s")
    assert "the sign turned" in fast.run("log").stdout and "unknown verb" in fast.run("fly").stderr
    assert fast.containers() == ""


def test_a_small_gain_is_run_twice(fast: Project):
    fast.edit("stop:", "confirm_below: 99\nstop:", "program.md")
    fast.given += "import itertools\nmeasure.fresh_seed = itertools.cycle((1, 8)).__next__\n"  # not the same twice
    fast.write("train.py", CANDIDATES["kept"].replace("5 * torch.eye", "(5 + int(os.environ['SEED']) % 9) * torch.eye"))
    done, shown = fast.experiment("words fitted to rough pixels, under a rule that always wants to see it twice")
    assert (done.returncode, shown["verdict"]) == (0, "kept"), done.stdout + done.stderr
    assert "mean of 2 runs" in shown["mean_rank"]
    trailers = fast.trailers("HEAD")
    assert len(trailers["Mean-Rank-Runs"].split()) == 2 and len(set(trailers["Seed"].split())) == 2


def test_a_crash_shows_its_traceback_and_a_flood_is_cut(fast: Project):
    inject(fast, "    assert SIGN < 0, 'no such luck'")
    done, shown = fast.experiment("crash on purpose")
    assert (done.returncode, shown["verdict"]) == (1, "failed")
    assert re.fullmatch(r"crash after [\d.]+ s(, .* steps)?: AssertionError: no such luck", shown["reason"])
    assert "| AssertionError: no such luck" in done.stdout and 'train.py", line' in done.stdout
    assert "runpy" not in done.stdout and len(done.stdout.encode()) <= 2048
    assert fast.read("train.py") == QUICK
    assert "no such luck" in fast.git("show", "refs/experiments/3:train.py")
    assert "no such luck" in fast.read("runs/0003.diff") and "no such luck" in fast.read("runs/0003.log")

    inject(fast, "    print('\\x1b[2J' + 'x' * 5_000_000); raise SystemExit('gave up')")
    done, shown = fast.experiment("crash on purpose")  # the same hypothesis, after a failure
    assert shown["verdict"] == "failed" and "gave up" in done.stdout and "\x1b" not in done.stdout
    assert os.path.getsize(fast.path / "runs/0004.log") < 530_000  # 256 KiB from either end


def test_what_fails_after_training(fast: Project):
    """`load` fails where its traceback may be shown; what cannot be judged has cheats.py, but for two widths."""
    fast.edit("    return Model(*torch", "    raise KeyError('positional_embedding')\n    return Model(*torch")
    done, shown = fast.experiment("break load")
    assert done.returncode == 1 and shown["reason"].startswith("load:")
    assert "KeyError: 'positional_embedding'" in done.stdout
    fast.edit("torch.randn(len(captions), 16,", "torch.randn(len(captions), 8,")
    done, shown = fast.experiment("forget half of the text")
    assert (done.returncode, shown["verdict"]) == (1, "failed"), done.stdout + done.stderr
    assert shown["reason"] == "invalid output: image and text embeddings differ in width: 16 and 8"


def test_limits_of_time_and_memory_are_named(fast: Project):
    fast.given += ANY_BUDGET
    inject(fast, HANG)
    fast.edit("budget: 120", f"budget: {BUDGET}", "program.md")
    started = time.monotonic()
    done, shown = fast.experiment("never end")
    assert (done.returncode, shown["verdict"]) == (1, "failed"), done.stdout + done.stderr
    assert shown["reason"] == f"time limit: killed at the budget of {BUDGET} s, 7 of 300 steps"
    assert time.monotonic() - started < BUDGET + 60
    fast.git("checkout", "-q", "program.md")
    inject(fast, "    hog = [torch.ones(1 << 26) for _ in range(64)]")
    done, shown = fast.experiment("allocate 16 GB")
    assert (done.returncode, shown["verdict"]) == (1, "failed")
    assert shown["reason"].startswith("out of memory: more than 3g of main memory after")
    assert fast.containers() == ""


def test_training_sees_the_training_split_and_nothing_else(fast: Project):
    """Not the keys, not validation or test, no environment of the caller, no network, no second writable place.

    And its bytes are the file's, with autocrlf and a clean filter configured, which git would apply.
    """
    fast.git("config", "core.autocrlf", "true")
    fast.git("config", "filter.shout.clean", "tr a-z A-Z")
    fast.write(".git/info/attributes", "train.py filter=shout\n")
    inject(
        fast,
        """
    import hashlib, socket, subprocess
    print(hashlib.sha256(open("/code/train.py", "rb").read()).hexdigest())
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
    text = fast.read("train.py").replace("\n", "\r\n").encode()
    (fast.path / "train.py").write_bytes(text)
    secrets = {"ANTHROPIC_API_KEY": "sk-secret", "CLAUDE_CODE_MESSAGING_TOKEN": "token-secret"}
    fast.experiment("look around", env=secrets)
    log = fast.read("runs/0003.log")
    assert "looked around" in log and "secret" not in log and "OPEN" not in log and "10001" in log
    assert log.count(".arrow") == log.count("/data/data-") and "key.npy" not in log
    assert "prints" not in log  # its source could draw the validation pairs again
    assert "eth0" not in log and "SEED=" in log and hashlib.sha256(text).hexdigest() in log
    blob = ["git", "cat-file", "blob", "refs/experiments/3:train.py"]
    assert subprocess.run(blob, cwd=fast.path, capture_output=True).stdout == text


def test_two_runs_at_once_and_a_killed_one(fast: Project):
    """The second is refused; after a SIGKILL the next run sweeps the container and works."""
    inject(fast, SLEEP)
    fast.hypothesis("sleep")
    first = fast.start(start_new_session=True)
    wait_for(fast.containers)
    done = fast.run()
    assert done.returncode == 2 and "another experiment is running: experiment 3 (candidate, run 1)" in done.stderr
    assert "experiment 3" in fast.run("status").stdout
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert fast.containers() != ""
    fast.write("train.py", CANDIDATES["discarded"])
    done, shown = fast.experiment("the sign turned")
    assert (done.returncode, shown["experiment"], shown["verdict"]) == (0, "3", "discarded"), done.stderr
    assert fast.containers() == "" and "fatal" not in fast.git("fsck")


def test_a_terminal_shows_what_runs(fast: Project):
    """A live line, which leaves nothing behind; nothing of it without a terminal, as everywhere else here."""
    fast.write("train.py", CANDIDATES["discarded"])
    inject(fast, '    print("step 1/4 loss 2.5", flush=True); import time; time.sleep(2.5)')
    fast.hypothesis("wait a while")
    here, there = os.openpty()
    run = fast.start(stderr=there)
    os.close(there)
    assert block(run.communicate()[0])["verdict"] == "discarded"
    shown = os.read(here, 1 << 16).decode()
    assert re.search(r"experiment 3 \(candidate, run 1\), step 1/4 \(25 %\), \d+ s left, loss 2\.5 +\r", shown), shown
    assert shown.endswith("\r\x1b[K") and "\n" not in shown


@pytest.mark.parametrize("signal_", [signal.SIGTERM, signal.SIGKILL])
def test_when_run_sh_alone_is_ended_its_containers_go_too(fast: Project, tmp_path, signal_: int):
    fast.given += stand_ins.stage(tmp_path, f"stage.LIFELINE_S = {LIFELINE_S}")
    inject(fast, SLEEP)
    fast.hypothesis("sleep")
    first = fast.start()
    wait_for(lambda: len(fast.containers().split()) == 3)  # training, and both sides wait to embed
    first.send_signal(signal_)
    first.communicate(timeout=30)
    assert first.returncode == (143 if signal_ == signal.SIGTERM else -signal_)
    wait_for(lambda: fast.containers() == "", LIFELINE_S + 30)
    fast.git("checkout", "train.py")
    assert "nothing" in fast.run("status").stdout and fast.experiments() == [1, 2]


@pytest.mark.parametrize("name", ['it\'s a "répo" dir', "a:b,c=d\ne", "-v ${x};漢 "])
def test_odd_places(quick_base: Project, tmp_path, name: str):
    """Whatever a path may hold, umask 077, a detached HEAD, no identity, a worktree that shares data."""
    odd = tmp_path / name
    project = quick_base.copy(odd)
    project.git("config", "--unset", "user.name")
    project.git("config", "--unset", "user.email")
    project.git("checkout", "-q", "--detach")
    project.git("worktree", "add", "-q", "-b", "second", str(odd / "a second"))
    other = Project(odd / "a second")
    other.write("train.py", CANDIDATES["kept"])
    other.hypothesis("words fitted to rough pixels, from a worktree")
    env = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = ["sh", "-c", "umask 077; exec ./run.sh"]
    done = subprocess.run(command, cwd=other.path, env=env, capture_output=True, text=True)
    assert block(done.stdout)["verdict"] == "kept", done.stdout + done.stderr
    assert other.git("log", "-1", "--format=%an") == "autoresearch" and project.experiments() == [1, 2, 3]


def test_own_data(measured: Project, tmp_path):
    """ODVG lines and images written by people: the 20-line fixture, and the larger sample where it is there."""
    project = Project(shutil.copytree(measured.path, tmp_path / "repo", ignore=shutil.ignore_patterns("data")))
    project.set("STEPS", "10")
    project.git("commit", "-qam", "short")
    sample = ROOT.parent / "shared" / "data" / "nlvr-sample"
    folders = {"own": ROOT / "tests/fixtures/odvg", **({"nlvr": sample} if sample.is_dir() else {})}
    for name, folder in folders.items():
        done = project.run("data", name, "--odvg", str(folder))
        assert done.returncode == 0, done.stderr
        project.write("program.md", PROGRAM.replace("data: prints", f"data: {name}"))
        project.set("LR", "1e-9")
        done, shown = project.experiment(f"hardly learn, on {name}")
        assert shown["verdict"] in ("kept", "discarded") and done.returncode == 0, done.stdout + done.stderr
        assert "measured the incumbent first" in done.stderr and "(2 runs)" in shown["before"]
        project.git("checkout", "-q", "HEAD", "train.py")
        if shown["verdict"] == "kept":
            project.git("reset", "-q", "--hard", "HEAD^")
    assert "exists already" in project.run("data", "own").stderr

    broken = tmp_path / "broken"
    shutil.copytree(ROOT / "tests" / "fixtures" / "odvg", broken)
    next((broken / "images").iterdir()).unlink()
    done = project.run("data", "broken", "--odvg", str(broken))
    assert done.returncode == 1 and ".jsonl line " in done.stderr + done.stdout
    assert not (project.path / "data/broken").exists()
    assert "no such folder" in project.run("data", "nowhere", "--odvg", str(tmp_path / "nowhere")).stderr
