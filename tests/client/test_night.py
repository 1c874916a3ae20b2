"""./run.sh night: the real client, ended and started again through all faults, until the plan says enough."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_loop import forever, notices

import instant
from client import CLIENT, Conversation, Model, Turn, call, environment, prepare_home, say
from faults import ALL, OVERLOADED, Silence
from repository import CANDIDATES, Project

RUN = call("Bash", command="./run.sh")
DONE = say("noted")
FAST = instant.clocks(FIRST_WAIT=0.1, LONGEST_WAIT=1, POLL=0.1)


@pytest.fixture
def quick(quick: Project) -> Project:
    """Its nights do not wait long."""
    instant.give(quick, FAST)
    return quick


class Night:
    """./run.sh night in a shell of its own, and the model behind it."""

    def __init__(self, project: Project, home: Path, script, *words: str, given: str = "", **env: str):
        self.project, self.given, self.model = project, given, Model(script)
        path = f"{CLIENT.parent}:{os.environ['PATH']}"
        more = {"PATH": path, "CLAUDE_CODE_MAX_RETRIES": "1", **env}
        self.env = environment(prepare_home(home, project.path), self.model, more)
        self.shown = self.start(*words)

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.project.command("night", *words, given=self.given),
            cwd=self.project.path,
            env=self.env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def say(self, *words: str) -> str:
        return self.start(*words).communicate(timeout=60)[0]

    def end(self, seconds: float = 300) -> tuple[int, str]:
        """Its exit status and all that was shown."""
        text = self.shown.communicate(timeout=seconds)[0]
        if self.model.error:
            raise self.model.error
        return self.shown.returncode, text

    @property
    def state(self) -> dict:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.project.read("runs/night.json"))
        return {}

    def processes(self) -> list[str]:
        """The client, the keeper and what they started; the follower is no part of it."""
        table = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True).stdout.splitlines()
        mine = []
        for pid, _, args in (row.strip().partition(" ") for row in table):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/cwd") == str(self.project.path) and int(pid) != self.shown.pid:
                    mine.append(f"{pid} {args}")
        return mine

    def client(self) -> int:
        return next((int(p.split()[0]) for p in self.processes() if "-p start" in p), 0)

    def wait_for(self, done, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, (self.processes(), self.project.read("runs/night.log"))
            time.sleep(0.1)

    def close(self) -> None:
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.split()[0]), signal.SIGKILL)
        self.shown.kill()
        self.model.close()


@pytest.fixture
def night(home):
    """night(project, script, *words): every one is ended with its test."""
    made = []

    def begin(project, script, *words, **how):
        made.append(Night(project, home, script, *words, **how))
        return made[-1]

    yield begin
    for one in made:
        one.close()


def set_stop(project: Project, text: str) -> None:
    project.write("program.md", re.sub("stop: .*", f"stop: {text}", project.read("program.md")))


def experiment_runs(project: Project) -> bool:
    return (project.path / "runs/running.json").exists()


def once_each(project: Project, count: int) -> list[int]:
    """The numbers of the record, which are the baseline and `count` more, one commit each."""
    numbers = project.experiments()
    assert numbers == list(range(1, count + 2))
    assert len({project.git("rev-parse", f"refs/experiments/{n}") for n in numbers}) == len(numbers)
    return numbers


# A whole night


def test_a_night_goes_through_every_fault(quick, night):
    set_stop(quick, "10 experiments")
    script, ends = [], 0
    for at, (turns, fatal) in enumerate(ALL.values()):
        script += [RUN, DONE] * (at % 2) + turns
        ends += fatal
    went = night(quick, script + [RUN, DONE] * 9)
    status, text = went.end()
    assert status == 0, text
    once_each(quick, 10)
    assert all(text.count(f"#{n} ") == 1 for n in range(2, 12)), text
    for told in ("status 1: API Error: 500", "429", "ECONNRESET", "Prompt is too long", "safeguards", "Shall I go on?"):
        assert told in text, (told, text)
    assert went.state["conversations"] == text.count("Claude Code starts") == ends + 1, text
    assert text.rstrip().endswith("The night has ended: 10 experiments since start, as program.md's `stop` says"), text
    assert "10 experiments: 0 kept, 10 discarded, 0 failed" in text and re.search(r"[\d,]+ tokens, 0\.\d\d USD", text)
    assert text.partition("\n")[2] == quick.read("runs/night.log")
    assert not went.processes() and went.state["status"] == 0


def test_real_experiments_and_a_client_that_is_killed(fast, night):
    """A discarded, a repeated and a kept one; two clients die, one of them while a training runs. Nothing is given:
    the night, its keeper and every experiment are started by run.sh itself.
    """
    fast.given = ""
    set_stop(fast, "3 experiments")
    slow = CANDIDATES["discarded"].replace("    table =", "    import time; time.sleep(5)\n    table =")
    ideas = {"words turned": CANDIDATES["discarded"], "words": CANDIDATES["kept"], "wait": slow}
    read = [call("Read", file_path="train.py"), call("Read", file_path="scratchpad.md")]

    def attempt(name: str) -> list:
        pad = f"## Next experiment\n{name}\n\n## Notes\n"
        write = [
            call("Write", file_path="train.py", content=ideas[name]),
            call("Write", file_path="scratchpad.md", content=pad),
        ]
        return [read, write, RUN]

    def script():
        for name in ("words turned", "words turned", "words"):
            yield from attempt(name)
        went.wait_for((fast.path / "report.html").exists)  # drawn in the background of the agent's trainings
        os.kill(went.client(), signal.SIGKILL)
        yield say("never heard")
        yield from attempt("wait")
        yield say("the client was killed meanwhile")
        yield from [DONE] * 9

    steps = script()
    went = night(fast, lambda shown: next(steps))
    went.wait_for(lambda: experiment_runs(fast) and "wait" in fast.read("scratchpad.md"))
    time.sleep(1)
    os.kill(went.client(), signal.SIGKILL)
    status, text = went.end()
    assert status == 0 and text.count("was killed by signal 9") == 2, text
    verdicts = [fast.trailers(f"refs/experiments/{n}")["Verdict"] for n in fast.experiments()]
    assert verdicts[-3:] == ["discarded", "kept", "discarded"], text
    assert "was already judged" in "".join(r.content for r in went.model.results if r.is_error)
    assert fast.git("status", "--short", "train.py") == "" and fast.read("train.py") == CANDIDATES["kept"]
    assert (fast.path / "report.html").stat().st_size > 10_000 and "report.html shows it" in text
    assert "1 kept, 2 discarded, 0 failed" in text and "what 2 cost that did not tell" in text
    assert not went.processes() and not fast.containers()


# Its ends


def test_the_terminal_is_closed(quick, night):
    """SIGHUP, as from a terminal that goes; then somebody else follows the same night."""
    set_stop(quick, "3 experiments")
    quick.write("slow", "1")
    went = night(quick, forever(RUN, DONE), "stop")  # no night yet
    assert went.end()[0] == 2
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(quick.path)
        os.execve("./run.sh", ["./run.sh", "night"], went.env)
    shown = b""
    while b"conversation 1" not in shown:
        shown += os.read(terminal, 1000)
    assert b"It needs no terminal" in shown
    went.wait_for(went.client)
    os.close(terminal)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGHUP
    went.shown = went.start()
    status, text = went.end()
    assert status == 0 and "A night is under way here since" in text and "The night has ended: 3 exp" in text, text
    once_each(quick, 3)
    assert went.state["conversations"] == 1


def test_ctrl_c_leaves_it_and_stop_waits_for_the_experiment(quick, night):
    quick.write("slow", "3")
    went = night(quick, forever(RUN, DONE))
    went.wait_for(lambda: experiment_runs(quick))
    os.killpg(went.shown.pid, signal.SIGINT)
    status, text = went.end(10)
    assert status == 0 and "The night goes on." in text and "./run.sh night stop" in text, text
    assert "No new experiment begins" in went.say("stop")
    went.shown = went.start()
    status, text = went.end()
    assert status == 0 and text.rstrip().endswith("The night has ended: the person said night stop"), text
    once_each(quick, 1)
    denied = [r.content for r in went.model.results if r.is_error]
    assert not went.processes() and all("the person said night stop" in d for d in denied), denied
    assert "no night is under way here" in went.say("stop")


def test_a_second_stop_leaves_nothing_behind(fast, night):
    fast.write("train.py", "import time\ntime.sleep(100)\n")
    fast.hypothesis("wait")
    went = night(fast, forever(RUN, DONE), given=FAST)
    went.wait_for(fast.containers)
    time.sleep(1)
    went.say("stop")
    assert went.client() and fast.containers()
    went.say("stop")
    status, text = went.end()
    assert status == 0 and "the client was ended at once" not in text.splitlines()[-1], text
    went.wait_for(lambda: not went.processes() and not fast.containers(), 30)  # the pictures may still be drawn
    assert "time.sleep(100)" in fast.read("train.py") and not list((fast.path / "runs").glob("work*"))


def test_the_morning_comes(quick, night):
    """The hour is given as HH:MM of a time zone in which it is five seconds away."""
    west = (time.time() - (7 * 3600 + 1800 - 5)) % 86400  # seconds to go west from Greenwich, to 07:29:55
    zone = "AAA%02d:%02d:%02d" % (west // 3600, west // 60 % 60, west % 60)
    quick.write("slow", "1")
    status, text = night(quick, forever(RUN, DONE), "07:30", TZ=zone).end(60)
    assert status == 0 and text.rstrip().endswith("The night has ended: it is 07:30, as the person said"), text
    assert 1 < len(quick.experiments()) < 11 and "07:30  The night" in text and "until 07:30; phase" in text


def test_tokens_and_cost_are_those_of_all_conversations(quick, night):
    for plan, end in ("5k tokens", r"\d,\d\d\d tokens"), ("0.02 USD", r"0\.0[2-4] USD"):
        set_stop(quick, plan)
        went = night(quick, forever(Turn([RUN], tokens=3000), OVERLOADED), CLAUDE_CODE_MAX_RETRIES="0")
        status, text = went.end()
        assert status == 0 and re.search(f"The night has ended: {end} since start, as program.md", text), text
        assert went.state["conversations"] > 1


def test_it_gives_up_on_an_agent_that_only_talks(quick, night):
    instant.give(quick, "night.FRUITLESS = 3\n")
    went = night(quick, forever(say("May I begin?")))
    status, text = went.end()
    assert status == 1 and "3 conversations in a row brought no experiment; the last said: May I begin?" in text, text
    assert [float(s) for s in re.findall(r"again in ([\d.]+) s", text)] == [0.1, 0.2]
    assert not went.processes() and quick.experiments() == [1]


def test_a_client_that_does_not_get_on_is_ended_and_started_again(quick, night):
    """One that hangs, one that never gets to an experiment, and one that stays when the loop has ended."""
    instant.give(quick, "night.BARREN = 4\n")
    set_stop(quick, "1 experiments")
    quick.write("slow", "5")  # silent for longer, but an experiment runs
    look, hung = call("Read", file_path="train.py"), Silence(100)

    def script():
        yield hung
        while quick.read("runs/night.log").count("Claude Code starts") < 3:
            yield look
        yield RUN
        yield hung

    steps = script()
    went = night(quick, lambda shown: next(steps))
    status, text = went.end()
    assert status == 0 and text.count("no experiment from the client for long, so it was ended") == 2, text
    assert text.rstrip().endswith("The night has ended: 1 experiments since start, as program.md's `stop` says"), text
    once_each(quick, 1)
    assert went.state["conversations"] == 3 and not went.processes()


def test_a_night_that_was_cut_off_is_noticed(quick, night):
    went = night(quick, forever(RUN, DONE))
    went.wait_for(lambda: len(quick.experiments()) > 2)
    os.kill(went.state["pid"], signal.SIGKILL)
    status, text = went.end(30)
    assert status == 1 and "The night was cut off" in text
    went.wait_for(lambda: not went.processes())  # the client goes with its keeper
    count = len(quick.experiments()) - 1
    set_stop(quick, "1 experiments")
    went.shown = went.start()
    status, text = went.end()
    assert status == 0 and "The last night was cut off" in text and "1 experiments since start" in text, text
    once_each(quick, count + 1)


def test_refusals(quick, night):
    for env, words, why in (
        ({"CLAUDECODE": "1"}, (), "for a person"),
        ({"PATH": "/usr/bin:/bin"}, (), "claude is not in PATH"),
        ({}, ("7.30",), "usage: ./run.sh night"),
        ({}, ("keep",), "usage: ./run.sh night"),
        ({}, ("stop",), "no night is under way"),
    ):
        status, text = night(quick, [], *words, **env).end(20)
        assert status == 2 and why in text, text
    quick.write("program.md", "nothing")
    status, text = night(quick, []).end(20)
    assert status == 2 and "no '## Settings' section" in text
    assert not (quick.path / "runs/night.json").exists() and quick.experiments() == [1]


def test_tokens_end_a_conversation_without_a_night(quick, home):
    set_stop(quick, "10k tokens")
    turns = forever(Turn([RUN], tokens=2000), Turn([DONE], tokens=500))
    talk = Conversation(quick.path, home, turns).run("start")
    assert len(notices(talk)) == 1 and re.search(r"1\d,\d\d\d tokens since start", notices(talk)[0])
    assert 1 + 3 <= len(quick.experiments()) <= 1 + 5
