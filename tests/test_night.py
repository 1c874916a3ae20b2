"""./run.sh night: the real client, ended and started again through all faults, until the plan says enough."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from client import CLIENT, Conversation, Model, Turn, call, environment, prepare_home, say
from conftest import Project
from faults import ALL, OVERLOADED, Silence
from sweep import CANDIDATES
from test_loop import STUB, forever, hook, notices

sys.dont_write_bytecode = True
RUN = call("Bash", command="./run.sh")
DONE = say("noted")
FAST = {"FIRST_WAIT, LONGEST_WAIT": "0.3, 3", "POLL": "0.2"}  # night.py's constants in these tests
# In place of run.sh's own work: test_loop's made-up experiment, which takes as long as the file `slow` says.
SLOW = r"""
[[ ${1-} != report ]] || exit 0
if [[ -f slow ]]; then
  printf '{"pid": %d, "n": 0, "what": "made up", "started": %d, "budget": 120}' $$ "$(date +%s)" >runs/running.json
  sleep "$(cat slow)"
  rm runs/running.json
fi
"""


def constants(project: Project, **values: str) -> None:
    for name, value in {**FAST, **values}.items():
        old = re.search(rf"^{name} = [^#\n]*", project.read(".claude/night.py"), re.M)[0]
        project.edit(old, f"{name} = {value}  ", ".claude/night.py")


@pytest.fixture
def quick(project: Project) -> Project:
    """A project whose experiments are made up, and whose nights do not wait long."""
    project.write("stub.sh", STUB.replace("set -e\n", "set -e\n" + SLOW))
    (project.path / "stub.sh").chmod(0o755)
    at = "if [[ ${AR_CLEAN-}"
    project.edit(at, f'[[ ${{1-report}} != report ]] || exec -a run.sh bash ./stub.sh "$@"\n{at}', "run.sh")
    constants(project)
    return project


class Night:
    """./run.sh night in a shell of its own, and the model behind it."""

    def __init__(self, project: Project, tmp: Path, script, *words: str, **env: str):
        self.project, self.model = project, Model(script)
        home = prepare_home(tmp / "home", project.path)
        path = f"{CLIENT.parent}:{os.environ['PATH']}"
        self.env = environment(home, self.model, {"PATH": path, "CLAUDE_CODE_MAX_RETRIES": "1", **env})
        self.shown = self.start(*words)

    def start(self, *words: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["./run.sh", "night", *words],
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
def night(tmp_path):
    """night(project, script, *words): every one is ended with its test."""
    made = []

    def begin(project, script, *words, **env):
        made.append(Night(project, tmp_path, script, *words, **env))
        return made[-1]

    yield begin
    for one in made:
        one.close()


def once_each(project: Project, count: int) -> list[int]:
    """The numbers of the record, which are the baseline and `count` more, one commit each."""
    numbers = project.experiments()
    assert numbers == list(range(1, count + 2))
    assert len({project.git("rev-parse", f"refs/experiments/{n}") for n in numbers}) == len(numbers)
    return numbers


# --- a whole night ---------------------------------------------------------------------------------------------------


def test_a_night_goes_through_every_fault(quick, night):
    quick.edit("stop: 100 experiments", "stop: 10 experiments", "program.md")
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
    """A discarded, a repeated, a kept and a crashing one; two clients die, one of them while a training runs."""
    constants(fast)
    fast.edit("stop: 100 experiments", "stop: 4 experiments", "program.md")
    slow = CANDIDATES["discarded"].replace("    table =", "    import time; time.sleep(6)\n    table =")
    ideas = {"words turned": CANDIDATES["discarded"], "words": CANDIDATES["kept"], "crash": "1 / 0\n", "wait": slow}
    told = []

    def attempt(name: str) -> list:
        pad = f"## Next experiment\n{name}\n\n## Notes\n"
        return [
            [call("Read", file_path="train.py"), call("Read", file_path="scratchpad.md")],
            [call("Write", file_path="train.py", content=ideas[name]),
             call("Write", file_path="scratchpad.md", content=pad)],
            RUN,
        ]  # fmt: skip

    def script():
        for name in ("words turned", "words turned", "words", "crash"):
            for turn in attempt(name):
                told.append((yield turn))
        os.kill(went.client(), signal.SIGKILL)
        yield say("never heard")
        for turn in attempt("wait"):
            yield turn
        yield say("the client was killed meanwhile")
        yield from [DONE] * 9

    steps = script()
    next(steps)
    first = [call("Read", file_path="train.py"), call("Read", file_path="scratchpad.md")]
    went = night(fast, lambda shown: first if not told and not told.append(None) else steps.send(shown))
    went.wait_for(lambda: (fast.path / "runs/running.json").exists() and "wait" in fast.read("scratchpad.md"))
    time.sleep(1)
    os.kill(went.client(), signal.SIGKILL)
    status, text = went.end()
    assert status == 0 and text.count("was killed by signal 9") == 2, text
    verdicts = [fast.trailers(f"refs/experiments/{n}")["Verdict"] for n in fast.experiments()]
    assert verdicts[-4:] == ["discarded", "kept", "failed", "discarded"], text
    assert "was already judged" in "".join(r.content for r in went.model.results if r.is_error)
    assert fast.git("status", "--short", "train.py") == "" and fast.read("train.py") == CANDIDATES["kept"]
    assert (fast.path / "report.html").stat().st_size > 10_000 and "report.html shows it" in text
    assert "1 kept, 2 discarded, 1 failed" in text and "what 2 cost that did not tell" in text
    assert not went.processes() and not fast.containers()


# --- its ends --------------------------------------------------------------------------------------------------------


def test_the_terminal_is_closed(quick, night):
    """SIGHUP, as from a terminal that goes; then somebody else follows the same night."""
    quick.edit("stop: 100 experiments", "stop: 3 experiments", "program.md")
    quick.write("slow", "2")
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
    went.wait_for(lambda: (quick.path / "runs/running.json").exists())
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
    constants(fast)
    fast.write("train.py", "import time\ntime.sleep(100)\n")
    fast.hypothesis("wait")
    went = night(fast, forever(RUN, DONE))
    went.wait_for(fast.containers)
    time.sleep(1)
    went.say("stop")
    assert went.client() and fast.containers()
    went.say("stop")
    status, text = went.end()
    assert status == 0 and "the client was ended at once" not in text.splitlines()[-1], text
    went.wait_for(lambda: not went.processes() and not fast.containers(), 30)  # the pictures may still be drawn
    assert "time.sleep(100)" in fast.read("train.py") and not list((fast.path / "runs").glob("work.*"))


def test_the_morning_comes(quick, night):
    """The hour is given as HH:MM of a time zone in which it is five seconds away; then program.md says it."""
    for words, plan in (("07:30",), "stop: 50 experiments"), ((), "stop: 07:30"):
        quick.write("program.md", re.sub("stop: .*", plan, quick.read("program.md")))
        west = (time.time() - (7 * 3600 + 1800 - 5)) % 86400  # seconds to go west from Greenwich, to 07:29:55
        zone = "AAA%02d:%02d:%02d" % (west // 3600, west // 60 % 60, west % 60)
        before = len(quick.experiments())
        quick.write("slow", "1")
        status, text = night(quick, forever(RUN, DONE), *words, TZ=zone).end(60)
        said = "as the person said" if words else "as program.md's `stop` says"
        assert status == 0 and text.rstrip().endswith(f"The night has ended: it is 07:30, {said}"), text
        assert 0 < len(quick.experiments()) - before < 10 and "07:30  The night" in text


def test_tokens_and_cost_are_those_of_all_conversations(quick, night):
    for plan, end in ("8k tokens", r"\d{1,2},\d\d\d tokens"), ("0.04 USD", r"0\.0[4-6] USD"):
        quick.write("program.md", re.sub("stop: .*", f"stop: {plan}", quick.read("program.md")))
        went = night(quick, forever(Turn([RUN], tokens=3000), *[OVERLOADED] * 2))
        status, text = went.end()
        assert status == 0 and re.search(f"The night has ended: {end} since start, as program.md", text), text
        assert went.state["conversations"] > 2


def test_it_gives_up_on_an_agent_that_only_talks(quick, night):
    constants(quick, FRUITLESS="3")
    went = night(quick, forever(say("May I begin?")))
    status, text = went.end()
    assert status == 1 and "3 conversations in a row brought no experiment; the last said: May I begin?" in text, text
    assert [float(s) for s in re.findall(r"again in ([\d.]+) s", text)] == [0.3, 0.6]
    assert not went.processes() and quick.experiments() == [1]


def test_a_client_that_hangs_is_started_again(quick, night):
    constants(quick, **{"SILENT, BARREN": "4, 60"})
    quick.edit("stop: 100 experiments", "stop: 2 experiments", "program.md")
    quick.write("slow", "6")  # silent for longer, but an experiment runs
    went = night(quick, [RUN, Silence(100), RUN, DONE])
    status, text = went.end()
    assert status == 0 and text.count("no word from the client for long, so it was ended") == 1, text
    once_each(quick, 2)
    assert went.state["conversations"] == 2


def test_an_agent_that_never_gets_to_an_experiment_is_started_again(quick, night):
    constants(quick, **{"SILENT, BARREN": "60, 3"})
    quick.edit("stop: 100 experiments", "stop: 1 experiments", "program.md")
    look = call("Read", file_path="train.py")
    status, text = night(quick, lambda shown: RUN if "experiment from" in quick.read("runs/night.log") else look).end()
    assert status == 0 and text.count("no experiment from the client for long, so it was ended") == 1, text


def test_a_client_that_stays_is_ended(quick, night):
    constants(quick, LATE="1")
    quick.edit("budget: 120", "budget: 1", "program.md")
    quick.edit("stop: 100 experiments", "stop: 1 experiments", "program.md")
    status, text = night(quick, [RUN, Silence(100)]).end(60)
    assert status == 0 and "The night has ended: 1 experiments since start" in text, text


def test_a_night_that_was_cut_off_is_noticed(quick, night):
    went = night(quick, forever(RUN, DONE))
    went.wait_for(lambda: len(quick.experiments()) > 2)
    os.kill(went.state["pid"], signal.SIGKILL)
    status, text = went.end(30)
    assert status == 1 and "The night was cut off" in text
    went.wait_for(lambda: not went.processes())  # nobody reads what the client says: it ends
    count = len(quick.experiments()) - 1
    quick.write("program.md", re.sub("stop: .*", "stop: 1 experiments", quick.read("program.md")))
    went.shown = went.start()
    status, text = went.end()
    assert status == 0 and "The last night was cut off" in text and "1 experiments since start" in text, text
    once_each(quick, count + 1)


def test_refusals(quick, night):
    for env, words, why in (
        ({"CLAUDECODE": "1"}, (), "for a person"),
        ({"PATH": "/usr/bin:/bin"}, (), "claude is not in PATH"),
        ({}, ("7.30",), "usage: ./run.sh night"),
        ({}, ("stop",), "no night is under way"),
    ):
        status, text = night(quick, [], *words, **env).end(20)
        assert status == 2 and why in text, text
    quick.write("program.md", "nothing")
    status, text = night(quick, []).end(20)
    assert status == 2 and "no '## Settings' section" in text
    assert not (quick.path / "runs/night.json").exists() and quick.experiments() == [1]


# --- `stop` in program.md --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def under_way(project: Project, **state):
    """As if a night were: its lock is held."""
    (project.path / "runs/night.json").write_text(json.dumps({"from": 1, "tokens": 0, "usd": 0, "clock": "", **state}))
    with (project.path / "runs/night.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_start_in_a_night_is_the_nights(quick):
    since = time.time() - 3 * 3600
    quick.write("program.md", re.sub("stop: .*", "stop: 2 hours, 50 USD", quick.read("program.md")))
    hook(quick, "UserPromptSubmit", prompt="start")
    assert hook(quick, "Stop")["decision"] == "block"
    with under_way(quick, since=since, usd=99):
        assert hook(quick, "Stop")["decision"] == "block", "begun before"
        hook(quick, "UserPromptSubmit", prompt="start")
        assert "3.0 hours since start" in hook(quick, "Stop")["systemMessage"]
    hook(quick, "UserPromptSubmit", prompt="start")
    assert hook(quick, "Stop")["decision"] == "block", "the night is over"


def test_the_clock_is_the_next_such_time(quick):
    sys.path.insert(0, str(quick.path / ".claude/hooks"))
    code = "import sys; sys.path.insert(0, '.claude/hooks'); import loop; print(loop.at_clock(*eval(sys.argv[1])))"

    def at(zone: str, clock: str, since: str) -> str:
        since_s = subprocess.run(["date", "-d", since, "+%s"], env={"TZ": zone}, capture_output=True, text=True).stdout
        done = subprocess.run([sys.executable, "-c", code, repr((clock, float(since_s)))], cwd=quick.path,
                              env={"TZ": zone}, capture_output=True, text=True)  # fmt: skip
        return subprocess.run(["date", "-d", f"@{done.stdout.strip()}", "+%F %H:%M"], env={"TZ": zone},
                              capture_output=True, text=True).stdout.strip()  # fmt: skip

    assert at("UTC", "07:30", "2026-11-23 22:10") == "2026-11-24 07:30"
    assert at("UTC", "23:30", "2026-11-23 22:10") == "2026-11-23 23:30"
    assert at("UTC", "22:10", "2026-12-31 22:10") == "2027-01-01 22:10"
    summer = "CET-1CEST,M3.5.0,M10.5.0/3"  # in the night of the 25th clocks go back, so that it has 25 hours
    assert at(summer, "07:30", "2026-10-24 22:00") == "2026-10-25 07:30"


def message(ident: str, **usage: int) -> str:
    return json.dumps({"type": "assistant", "message": {"id": ident, "usage": usage}}) + "\n"


def test_tokens_of_a_transcript(quick, tmp_path):
    """Each message once, without what the cache gave; subagents too; what is half written waits."""
    quick.write("program.md", re.sub("stop: .*", "stop: 1000 tokens", quick.read("program.md")))
    transcript, helper = tmp_path / "t.jsonl", tmp_path / "t/subagents/agent-1.jsonl"
    helper.parent.mkdir(parents=True)
    before = message("m0", input_tokens=5000)
    transcript.write_text(before)
    hook(quick, "UserPromptSubmit", prompt="start", transcript_path=str(transcript))

    def stopped() -> str:
        hook(quick, "UserPromptSubmit", prompt="go on")
        return hook(quick, "Stop").get("systemMessage", "")

    def add(file: Path, text: str) -> None:
        with file.open("a") as f:
            f.write(text)

    add(
        transcript,
        message("m1", input_tokens=100, output_tokens=1, cache_read_input_tokens=10**6) + 'no JSON "usage"\n',
    )
    add(
        transcript,
        2 * message("m1", input_tokens=100, output_tokens=100) + message("m2", cache_creation_input_tokens=300),
    )
    add(helper, message("a1", input_tokens=400))
    assert not stopped(), "900"
    last = message("m3", output_tokens=100)
    add(transcript, last[:40])
    assert not stopped()
    add(transcript, last[40:])
    assert "1,000 tokens since start, as program.md's `stop` says" in stopped()
    guard = {"session_id": "s", "tool_name": "Bash", "tool_input": {"command": "./run.sh"}, "tool_use_id": "x"}
    hook(quick, "UserPromptSubmit", prompt="start", transcript_path=str(transcript))  # counted from here
    add(transcript, message("m4", output_tokens=1000))
    done = subprocess.run([sys.executable, ".claude/hooks/guard.py"], cwd=quick.path, capture_output=True, text=True,
                          input=json.dumps({**guard, "cwd": str(quick.path)}))  # fmt: skip
    assert '"deny"' in done.stdout and "1,000 tokens since start" in done.stdout


def test_reading_a_long_transcript_again_costs_nothing(quick, tmp_path):
    quick.write("program.md", re.sub("stop: .*", "stop: 900M tokens", quick.read("program.md")))
    transcript = tmp_path / "t.jsonl"
    with transcript.open("w") as f:
        for n in range(3000):
            f.write(
                message(f"message-{n:027}", input_tokens=1, output_tokens=2)
                + json.dumps({"content": "x" * 10_000})
                + "\n"
            )
    hook(quick, "UserPromptSubmit", prompt="start", transcript_path=str(transcript))
    meter = json.loads(quick.read("runs/session/s.tokens"))
    assert sum(meter["used"].values()) == 9000 and meter["at"] == {str(transcript): transcript.stat().st_size}
    with transcript.open("r+") as f:  # what was read is not looked at again, so that this does not show
        f.write(message(f"message-{0:027}", input_tokens=7, output_tokens=2))
    with transcript.open("a") as f:
        f.write(message("another", input_tokens=1))
    hook(quick, "Stop")
    assert sum(json.loads(quick.read("runs/session/s.tokens"))["used"].values()) == 9001


def test_the_status_line_tells_the_cost(quick):
    quick.write("program.md", re.sub("stop: .*", "stop: 2 USD", quick.read("program.md")))

    def status(usd: float) -> str:
        given = json.dumps({"session_id": "s", "cost": {"total_cost_usd": usd}})
        return subprocess.run([".claude/hooks/loop.py", "statusline"], cwd=quick.path, input=given, text=True,
                              capture_output=True, check=True).stdout  # fmt: skip

    assert status(1.5).startswith("#1 | ")
    hook(quick, "UserPromptSubmit", prompt="start")
    status(3.49)
    assert "Since start 1.99 of 2.00 USD." in hook(quick, "Stop")["reason"]
    status(3.5)
    assert "2.00 USD since start, as program.md's `stop` says" in hook(quick, "Stop")["systemMessage"]


def test_tokens_end_a_conversation_without_a_night(quick, tmp_path):
    quick.write("program.md", re.sub("stop: .*", "stop: 10k tokens", quick.read("program.md")))
    turns = forever(Turn([RUN], tokens=2000), Turn([DONE], tokens=500))
    talk = Conversation(quick.path, tmp_path / "home", turns).run("start")
    assert len(notices(talk)) == 1 and re.search(r"1\d,\d\d\d tokens since start", notices(talk)[0])
    assert 1 + 3 <= len(quick.experiments()) <= 1 + 5
