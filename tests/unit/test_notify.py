"""What a person is told, and when: program.md's `notify`."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import night
import notify
import program
from in_process import DISCARDED, KEPT, Small, train_py
from repository import PROGRAM, Project, copy_of_the_repository

IMPROVED = r"experiment 2 is kept \(-(50\.0|49\.9) %\): an idea; mean_rank 50\.[01] .*"
TOLD = "notify.tell = lambda text: print('TOLD:', text)"


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Project:
    return copy_of_the_repository(tmp_path_factory.mktemp("notify") / "repo")


@pytest.fixture
def told(copied: Project, monkeypatch):
    """told(command): a repository whose program.md has it, with a clean slate; tell() is that one's."""

    def make(command: str) -> Project:
        for name in ("notify.json", "notify.log", "told"):
            (copied.path / "runs" / name).unlink(missing_ok=True)
        (copied.path / "runs").mkdir(exist_ok=True)
        copied.write("program.md", PROGRAM.replace("## Settings\n", f"## Settings\nnotify: {command}\n", 1))
        monkeypatch.setattr(notify, "ROOT", copied.path)
        monkeypatch.setattr(program, "read", lambda: program.parse(copied.read("program.md")))
        return copied

    return make


def wait_for(file: Path, text: str) -> str:
    until = time.monotonic() + 20
    while not (file.exists() and text in file.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    return file.read_text()


def test_a_person_tries_it_and_the_agent_cannot(told):
    repo = told("tee runs/told")
    done = repo.run("notify", env={"CLAUDECODE": "1"})
    assert done.returncode == 2 and "'notify' is for a person" in done.stderr
    done = repo.run("notify")
    assert (done.returncode, done.stderr) == (0, "`notify` ended well; look whether the line has arrived\n"), done
    assert repo.read("runs/told") == "repo: a line to try `notify`\n"
    repo.write("program.md", PROGRAM)
    done = repo.run("notify")
    assert done.returncode == 2 and "program.md has no `notify` under Settings" in done.stderr


def test_it_gets_what_a_desktop_needs_and_no_keys(told):
    """notify-send finds the session's bus beneath XDG_RUNTIME_DIR."""
    repo = told("env")
    secret = {"ANTHROPIC_API_KEY": "1", "DBUS_SESSION_BUS_ADDRESS": "2", "SSH_AUTH_SOCK": "3", "DISPLAY": ":0"}
    assert repo.run("notify", env={**secret, "XDG_RUNTIME_DIR": "/run/user/1000"}).returncode == 0
    names = {line.partition("=")[0] for line in repo.read("runs/notify.log").splitlines()}
    assert {"HOME", "PATH", "XDG_RUNTIME_DIR"} <= names and not names & {*secret, "CLAUDECODE"}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("false", "program.md's `notify` failed (1): it said nothing"),
        ("ls runs/missing-1 runs/missing-2", "failed (2): ls: cannot access 'runs/missing-1'"),
        ("no-such-program", "failed (127): timeout: failed to run command 'no-such-program'"),
        ("sh -c sleep%32", "failed (127)"),  # no shell of ours takes words apart
        ("sleep 50", "failed (after 1 s)"),
        ("printf \\033[2Jnot-read", "program.md line 4: notify"),
    ],
)
def test_one_that_fails_is_one_line(told, command, message):
    done = told(command).run("notify", given="notify.LIMIT_S = 1", timeout=20)
    line = done.stderr.replace("‘", "'").replace("’", "'")
    assert done.returncode == 2 and line.startswith("run.sh: ") and line.count("\n") == 1 and message in line, line


def test_it_is_told_in_the_background(told, monkeypatch):
    """In one line of plain text, whatever the agent wrote, and although the agent's ./run.sh is who tells."""
    repo = told("tee runs/told")
    monkeypatch.setenv("CLAUDECODE", "1")
    notify.tell("a \x1b[2J\u202e line\nand $(touch runs/harm) `id` é\r\n" + "x" * 999)
    shown = wait_for(repo.path / "runs/told", "\n")
    assert shown == ("repo: a [2J line and $(touch runs/harm) `id` é " + "x" * 999)[:300] + "\n"
    assert not (repo.path / "runs/harm").exists()
    began = time.monotonic()
    told("sleep 3")
    notify.tell("a line")
    assert time.monotonic() - began < 1
    monkeypatch.setattr(notify.subprocess, "Popen", lambda *_, **__: pytest.fail("program.md names none"))
    monkeypatch.setattr(program, "read", lambda: program.parse(PROGRAM))
    notify.tell("a line")


def test_that_nothing_runs_is_told_once_an_hour(told, monkeypatch, tmp_path):
    """Whatever the reason, and also where nothing can be remembered but that it was told."""
    told("tee -a told")
    for name in ("ROOT", "STATE", "LOG", "TROUBLE"):
        monkeypatch.setattr(notify, name, tmp_path / name if name != "ROOT" else tmp_path)

    def full(*_) -> None:
        raise OSError(28, "No space left")

    monkeypatch.setattr(notify, "write_json", full)
    lines = ["17 kept: a", notify.NOTHING_RUNS + ": 3.1 GB free", notify.NOTHING_RUNS + ": no GPU", "18 kept: a"]
    for line in [*lines, lines[1]]:
        with contextlib.suppress(OSError):
            notify.notify(line)
    assert (tmp_path / "told").read_text().splitlines() == [lines[0], lines[1], lines[3]]
    later = time.time() + 3601
    monkeypatch.setattr(time, "time", lambda: later)
    with contextlib.suppress(OSError):
        notify.notify(lines[2])
    assert (tmp_path / "told").read_text().splitlines()[-1] == lines[2]


def test_trouble_that_did_not_arrive_is_told_again(told, monkeypatch, tmp_path):
    (repo := told("false")).run("notify", notify.NOTHING_RUNS)
    assert not (repo.path / "runs/notify.trouble").exists()
    (repo := told("true")).run("notify", notify.NOTHING_RUNS)
    assert (repo.path / "runs/notify.trouble").exists()


@pytest.mark.parametrize(("words", "fault"), [(["a line"], "new"), ([], "said")])
def test_a_person_who_tries_it_is_not_told_twice(told, words, fault):
    (repo := told("false")).run("notify", *words)
    assert f'"fault": "{fault}"' in repo.read("runs/notify.json")
    (repo := told("true")).run("notify", *words)
    assert '"fault": ""' in repo.read("runs/notify.json")


def test_a_failure_is_said_once(small: Small):
    """Without what the command said: the agent reads this too."""
    small.write("runs/notify.json", '{"fault": "new"}')
    small.edit("## Settings\n", "## Settings\nnotify: true\n", "program.md")
    words = "run.sh: warning: program.md's `notify` fails; ./run.sh notify"
    for n, said in enumerate((1, 0)):
        small.write("train.py", train_py(150 + n))
        small.hypothesis(f"idea {n}")
        done = small.run()
        assert done.stderr.count(words) == said and done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("text", "settings", "wanted"),
    [
        (KEPT, "", [IMPROVED]),
        (KEPT, "notify_gain: 60 %\n", []),
        (KEPT, "notify_gain: 40.5\n", [IMPROVED]),
        (DISCARDED, "", []),
    ],
)
def test_a_large_improvement(small: Small, text, settings, wanted):
    small.edit("## Settings\n", f"## Settings\nnotify: true\n{settings}", "program.md")
    small.write("train.py", text)
    small.hypothesis("an idea")
    done = small.run(given=TOLD)
    shown = [line[6:] for line in done.stdout.splitlines() if line.startswith("TOLD:")]
    assert len(shown) == len(wanted) and all(map(re.fullmatch, wanted, shown)), done.stdout


@pytest.mark.parametrize(
    ("until", "second", "end"), [(1, "", "next: second"), (2, "", ""), (1, "until: 0 experiments", "next: none")]
)
def test_the_end_of_a_phase(small: Small, until, second, end):
    small.edit("until: 40 experiments", f"until: {until} experiments", "program.md")
    small.edit("## Settings\n", "## Settings\nnotify: true\n", "program.md")
    small.edit("## Phase 2 — second\n", f"## Phase 2 — second\n{second}\n", "program.md")
    small.write("train.py", DISCARDED)
    small.hypothesis("an idea")
    shown = small.run(given=TOLD).stdout
    assert shown.count("TOLD:") == bool(end) and (not end or f"TOLD: phase 'first' has ended; {end}" in shown), shown


@pytest.mark.parametrize("agent", [True, False])
@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("measure.run = lambda job: measure.require_room(job.work)\nmeasure.ROOM = 1 << 62", "a run may need"),
        ("engine.gpus = engine.all_gpus.__wrapped__\nengine.shutil.which = lambda _: 'x'\n"
         "engine.run = lambda *_, **__: engine.subprocess.CompletedProcess([], 9, '', 'GPU is lost')", "GPU is lost"),
        ("def full(job):\n raise OSError(28, 'No space left')\nmeasure.run = full", "No space left"),
        ("experiment.MAX_HYPOTHESIS = 1", ""),
    ],
)  # fmt: skip
def test_the_agent_cannot_mend_it(small: Small, given, wanted, agent):
    """A person who calls ./run.sh sees it; what the agent can mend is not told."""
    (proof := small.path / "runs/session/proof.s").parent.mkdir(exist_ok=True)
    proof.touch()
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    env = {"CLAUDECODE": "1", "CLAUDE_CODE_SESSION_ID": "s"} if agent else {}
    done = small.run(env=env, given=f"{TOLD}\n{given}")
    shown = [line for line in done.stdout.splitlines() if line.startswith("TOLD:")]
    assert done.returncode == 2 and len(shown) == bool(wanted and agent), done.stdout + done.stderr
    assert not shown or shown[0].startswith(f"TOLD: {notify.NOTHING_RUNS}: ") and wanted in shown[0]


# The loop


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(notify, "tell", found.append)
    return found


def test_the_loop_ends_or_stands_still(loop, lines):
    loop.stop_at("1 experiments")
    loop.hook("StopFailure", error="rate_limit")
    loop.type("start")
    loop.turn()
    assert lines == [], "it was off, and it goes on"
    loop.hook("StopFailure", error="rate_limit")
    assert lines.pop() == "the loop stands still, type anything to go on: rate_limit"
    loop.plan.add("discarded")
    loop.turn()
    assert lines.pop().startswith("the loop has ended: 1 experiments since start, as program.md's `stop` says; mean_r")
    loop.type("start")
    loop.type("stop")
    loop.turn()
    assert lines == [], "the person is there"
    loop.type("start")
    for _ in range(3):
        loop.turn()
    assert lines.pop().startswith("the loop has ended: 3 turns in a row brought no experiment")


def test_a_night_tells_its_own_end(loop, lines):
    loop.type("start")
    with loop.night(since=1.0, stop="it is late"):
        loop.type("start")
        loop.hook("StopFailure", error="rate_limit")
        assert "it is late" in loop.end() or not loop.session.on
    assert lines == []


def test_a_night_that_waits_or_ends(keeper, lines, monkeypatch):
    monkeypatch.setattr(night, "FIRST_WAIT", 0.1)
    monkeypatch.setattr(night, "LONGEST_WAIT", 0.2)
    monkeypatch.setattr(night.signal, "signal", lambda *_: None)
    one, until = keeper("echo overloaded; exit 1"), time.monotonic() + 20
    look = one.check
    monkeypatch.setattr(one, "check", lambda: look() or "it is late" * (lines != [] or time.monotonic() > until))
    monkeypatch.setattr(night, "run", lambda *_, **__: CompletedProcess([], 0, "", ""))
    monkeypatch.setattr(night, "end_chain", lambda: None)
    one.keep()
    assert lines[0] == f"{notify.NOTHING_RUNS}: the client ended with status 1: overloaded", lines
    assert lines[-1].startswith("the night has ended: it is late; mean_rank not measured yet")
