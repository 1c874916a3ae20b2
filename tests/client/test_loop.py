"""The loop: the real client goes on by its hooks alone, with a model that ends every turn in text.

Experiments are made up (support/instant.py); all else of them is real. unit/test_session.py has what ends a loop.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import faults
import instant
from client import CLIENT, Conversation, Model, Shown, Turn, call, environment, prepare_home, say
from repository import Project, block

RUN = call("Bash", command="./run.sh")


def forever(*turns) -> Callable:
    """A script that says these turns, over and over."""
    left: list = []

    def script(shown: Shown):
        if not left:
            left.extend(turns)
        return left.pop(0)

    return script


def notices(talk: Conversation) -> list[str]:
    """What the harness told the person."""
    return [e["content"] for e in talk.events if e.get("subtype") == "informational"]


def texts(talk: Conversation, pattern: str) -> list[str]:
    return [t for t in talk.model.texts if re.search(pattern, t)]


def hook(project: Project, event: str, **given) -> dict:
    """loop.py as the client calls it."""
    done = subprocess.run(
        [project.path / ".claude/hooks/loop.py"],
        capture_output=True,
        text=True,
        input=json.dumps({"hook_event_name": event, "session_id": "s", **given}),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# A day, as CLAUDE.md wants it


class Researcher:
    """A model that follows CLAUDE.md: reads, edits, runs, and decides by the last verdict where to go next."""

    LADDERS = [  # values to climb while each is kept
        ["150", "never"],  # worse
        ["undefined_name", "never"],  # crashes
        ["100.1", "never"],
        ["99.9", "never"],  # better by less than chance
        ["50", "20", "25"],
        ["'text'"],
    ]
    EXPECTED = ["discarded", "failed", "discarded", "discarded", "kept", "kept", "discarded", "failed"]

    def __init__(self, compact_after: int):
        self.ladders = [list(values) for values in self.LADDERS]
        self.compact_after = compact_after
        self.blocks: list[dict] = []
        self.ideas: list[str] = []
        self.step = self.steps()

    def __call__(self, shown: Shown):
        self.shown = shown
        return next(self.step)

    def steps(self):
        while True:
            yield [call("Read", file_path="train.py"), call("Read", file_path="scratchpad.md")]
            source = next(r.content for r in self.shown.results if r.given["file_path"] == "train.py")
            line, value = re.search(r"^\s*\d+\t(VALUE = .*)$", source, re.M)[1], self.choose()
            self.ideas.append(f"{len(self.ideas) + 1}: VALUE to {value}")
            pad = f"# Scratchpad\n\n## Next experiment\n{self.ideas[-1]}\n\n## Notes\n{len(self.blocks)} so far\n"
            yield [
                call("Edit", file_path="train.py", old_string=line, new_string=f"VALUE = {value}"),
                call("Write", file_path="scratchpad.md", content=pad),
            ]
            assert not any(r.is_error for r in self.shown.results), self.shown.results
            yield RUN
            result = self.shown.results[0]
            self.blocks.append(block(result.content))
            assert len(result.content.encode()) < 2048 and result.is_error == (self.verdict == "failed"), result.content
            near_the_limit = len(self.blocks) == self.compact_after
            yield Turn([say(f"{self.ideas[-1]}: {self.verdict}.")], tokens=150_000 if near_the_limit else 10)

    @property
    def verdict(self) -> str:
        return self.blocks[-1]["verdict"] if self.blocks else ""

    def choose(self) -> str:
        """Kept: further in that direction. Otherwise: another."""
        if self.blocks and self.verdict != "kept":
            del self.ladders[0]
        return self.ladders[0].pop(0)


def test_eight_experiments_and_a_compaction(made_up, home):
    instant.make_instant(made_up, idea=False)
    made_up.edit("stop: 100 experiments", "stop: 8 experiments", "program.md")
    researcher = Researcher(compact_after=4)
    talk = Conversation(made_up.path, home, researcher, args=["--autocompact", "100000"]).run("start")

    # The record holds what the model was told, in order: eight experiments after the baseline.
    judged = [made_up.trailers(f"refs/experiments/{n}") for n in made_up.experiments()[1:]]
    assert [t["Hypothesis"] for t in judged] == researcher.ideas
    assert [t["Verdict"] for t in judged] == [b["verdict"] for b in researcher.blocks] == researcher.EXPECTED
    kept = [t["Hypothesis"] for t in judged if t["Verdict"] == "kept"]
    subjects = made_up.git("log", "-n", str(len(kept)), "--reverse", "--format=%s").splitlines()
    assert [subject.split(" (")[0] for subject in subjects] == kept
    assert made_up.git("status", "--short", "train.py") == "" and "VALUE = 20\n" in made_up.read("train.py")
    # Every turn ended in text; the Stop hook alone went on, until program.md's stop.
    went_on = texts(talk, "^Stop hook feedback")
    assert ["Since start 1 of 8 experiments." in went_on[0], len(went_on), len(talk.ends)] == [True, 7, 1]
    assert notices(talk) == [
        "Stop says: The loop has ended: 8 experiments since start, as program.md's `stop` says. "
        "Type start to go on, ./run.sh log for what was tried."
    ]
    # In the middle the client compacted; the brief was seen again and the loop went on.
    assert [e["compact_metadata"]["trigger"] for e in talk.events if e.get("subtype") == "compact_boundary"] == ["auto"]
    at = next(i for i, r in enumerate(talk.model.requests) if "This session is being continued" in r.shown.text)
    again = talk.model.requests[at].shown.text
    assert "SessionStart hook additional context: Phase 1 of 2 (first), 4 of 40 experiments" in again
    assert "The loop is on." in again and researcher.ideas[3] in again
    assert "How you work here" in json.dumps(talk.model.requests[at].body), "CLAUDE.md is still there"


def test_a_failed_edit_before_a_run_and_extras_that_are_dropped(quick, home):
    """The client asks no hook about an edit that it does not begin. What runs is the call without its time-out."""
    quick.write("slow", "2")
    value = "A train.py"
    wrong = call("Edit", file_path="train.py", old_string="nowhere", new_string="x")
    right = call("Edit", file_path="train.py", old_string=value, new_string=value + "!")
    turns = [
        [right, wrong, right, RUN],
        [call("Bash", command="./run.sh", timeout=500, dangerouslyDisableSandbox=False)],  # as it is: it means it
        [wrong],
        RUN,
        [right],
        RUN,
        [call("Write", file_path="scratchpad.md"), RUN],
        [wrong],
        [right, call("Read", file_path="train.py", pages="1"), RUN],
    ]
    talk = Conversation(quick.path, home, [*turns, say("done")]).run("hello")
    done = [r for r in sorted(talk.model.results, key=lambda r: r.id) if r.tool != "Edit"]
    assert [r.is_error for r in done] == [True, False, True, False, True, True, False, False], "\n".join(
        f"{r.id} {r.tool} {r.is_error} {r.content[:300]}" for r in sorted(talk.model.results, key=lambda r: r.id)
    )
    refusals = [done[n].content for n in (0, 2, 5)]
    assert all("Nothing ran: since the last run an edit failed, of " in why for why in refusals), refusals
    assert "train.py (String to replace not found in file. String: nowhere)" in refusals[0]
    assert "scratchpad.md (InputValidationError: Write failed" in refusals[2] and "train.py (" not in refusals[2]
    assert len(quick.experiments()) == 1 + 3, "each at its second try, and the slow one to its end"


# Ends and interruptions


def test_stop_in_the_plan_ends_it_and_start_goes_on(quick, home):
    """Also within a turn that never ends."""
    quick.edit("stop: 100 experiments", "stop: 2 experiments", "program.md")
    turns = [RUN, say("noted"), RUN, say("noted"), RUN, RUN, RUN, RUN, say("summed up")]
    talk = Conversation(quick.path, home, turns).run("start", "start")
    assert len(quick.experiments()) == 1 + 2 + 2
    assert len(notices(talk)) == 2 and all("2 experiments since start" in n for n in notices(talk))
    assert [r.is_error for r in talk.model.results] == [False] * 4 + [True] * 2
    refusal = talk.model.results[4].content
    assert "2 experiments since start, as program.md's `stop` says" in refusal and "end your turn" in refusal


def test_an_open_chain_and_the_last_block_at_the_loops_end(quick, home):
    """It ends by idle turns, then by `stop`, which run.sh knows by the conversation's id."""
    quick.edit("until: 40 experiments", "until: 40 experiments\npatience: 3", "program.md")
    instant.give(quick, "keep_rule.HOPELESS = 99\n")  # else its ideas lose too much to be built upon

    def script():
        yield from [RUN, say("a"), say("b"), say("c"), say("d")]
        quick.edit("stop: 100 experiments", "stop: 1 experiments", "program.md")
        yield from [RUN, say("summed up")]

    steps = script()
    talk = Conversation(quick.path, home, lambda shown: next(steps)).run("start", "start")
    first, last = (block(r.content) for r in talk.model.results)
    assert "train.py keeps your edit, build on it: 1 of 3" in first["commit"]
    assert quick.trailers("refs/experiments/3")["Verdict"] == "dropped" and quick.experiments() == [1, 2, 3, 4]
    assert last["next"].startswith("the loop has ended: 1 experiments since start, as program.md's `stop` says; sum up")
    assert "the incumbent again, the chain has ended" in last["commit"]
    assert quick.git("status", "--short", "train.py") == "" and len(notices(talk)) == 2


def test_stop_typed_in_the_middle_and_turns_without_an_experiment(quick, home):
    """Talk, reading and refused calls are no experiments."""

    def script():
        yield RUN
        yield say("noted")
        talk.type("stop")
        yield RUN
        yield RUN  # not heeded
        yield say("What was learned.")
        yield RUN  # after "what now?": the person may ask for one
        yield say("Here it is.")
        yield from [RUN, say("noted"), say("let me think"), [call("Read", file_path="train.py")], say("hm")]
        yield from [[call("Bash", command="ls")], say("hm"), say("never said")]

    steps = script()
    talk = Conversation(quick.path, home, lambda shown: next(steps))
    talk.run("start", "what now?", "start")
    runs = [r for r in talk.model.results if r.given.get("command") == "./run.sh"]
    assert [r.is_error for r in runs] == [False, False, True, False, False], [r.content for r in runs]
    assert "the person said stop" in runs[2].content and "end your turn" in runs[2].content
    assert texts(talk, "The loop is off: do not run another experiment")
    assert len(quick.experiments()) == 1 + 4
    assert len(texts(talk, "^Stop hook feedback")) == 1 + 3 and len(notices(talk)) == 1
    assert "3 turns in a row brought no experiment" in notices(talk)[0] and "never said" not in talk.told


def test_a_nudge_is_answered_and_the_loop_goes_on_with_the_plan_as_it_is_now(quick, home):
    def script():
        yield RUN
        yield say("noted")
        talk.type("try a larger batch next")
        quick.write("program.md", quick.read("program.md") + "\nTry a larger batch.\n")
        yield RUN
        yield say("I will.")
        yield RUN
        yield say("noted")
        for word in "abc":
            yield say(word)

    steps = script()
    talk = Conversation(quick.path, home, lambda shown: next(steps))
    talk.run("start")
    assert texts(talk, "try a larger batch next") and texts(talk, "The loop is still on: answer the person")
    told = ["program.md has changed since you last read it: read it" in r.content for r in talk.model.results]
    assert told == [False, True, False]
    assert len(quick.experiments()) == 1 + 3 and len(notices(talk)) == 1


def test_a_conversation_without_start_is_left_alone(quick, home):
    """Also while the loop is on in another one, and after a run; a resumed one goes on where it was."""
    hook(quick, "UserPromptSubmit", prompt="start")  # in conversation "s"
    other = Conversation(quick.path, home, [RUN, say("noted")]).run("hello, please run it once")
    assert len(other.model.requests) == 2 and len(quick.experiments()) == 2 and not texts(other, "Stop hook feedback")
    assert "The loop begins when the person types: start" in other.model.requests[0].shown.text

    hook(quick, "UserPromptSubmit", prompt="start", session_id=other.id)
    turns = [say("hello again"), RUN, say("a"), say("b"), say("c")]
    resumed = Conversation(quick.path, home, turns, args=["--resume", other.id])
    resumed.run("are you there?")
    assert "The loop is on." in resumed.model.requests[0].shown.text
    assert texts(resumed, "The loop is still on") and len(quick.experiments()) == 3 and len(notices(resumed)) == 1


def test_a_broken_plan_is_told_and_ends_the_loop(quick, home):
    """In the middle of a loop, then from the start."""
    error = "program.md line 5: budget: soon"

    def script():
        yield RUN
        quick.edit("budget: 120", "budget: soon", "program.md")
        yield say("noted")
        assert "hello" in "".join(talk.model.texts[-2:]), "went on after the loop's end"
        yield RUN
        yield say("Please fix line 5.")

    steps = script()
    talk = Conversation(quick.path, home, lambda shown: next(steps))
    talk.run("start", "hello")
    assert len(talk.ends) == 2 and notices(talk)[0].startswith(f"Stop says: The loop cannot go on: {error}")
    assert all(error in notice for notice in notices(talk))
    assert [r.is_error for r in talk.model.results] == [False, True] and error in talk.model.results[1].content
    assert len(quick.experiments()) == 2
    talk = Conversation(quick.path, home, [say("Please fix line 5.")]).run("start")
    assert len(talk.model.requests) == 1 and error in talk.model.requests[0].shown.text


def test_hooks_begin_anew_with_a_plan_whose_phases_are_done(quick, home):
    """Another budget is another baseline: the loop goes on, and the guard lets the run through."""
    quick.edit("until: 40 experiments\n\n## Phase 2 — second\n", "until: 1 experiments\n", "program.md")

    def script():
        yield RUN
        yield say("noted")
        quick.edit("budget: 120", "budget: 60", "program.md")
        yield from [RUN, RUN, say("noted"), say("never said")]

    steps = script()
    talk = Conversation(quick.path, home, lambda shown: next(steps)).run("start", "start")
    assert len(notices(talk)) == 2 and all("all phases of program.md are done" in n for n in notices(talk))
    results = [r.content for r in talk.model.results]
    assert "verdict:      discarded" in results[0] and "verdict:      discarded" in results[1], results
    assert "The loop has ended" in results[2] and "never said" not in talk.told


@pytest.mark.parametrize("fault", ["OVERLOADED", "LIMITED"])
def test_a_turn_that_the_provider_ends_is_told(quick, home, fault):
    """The client asks no Stop hook then."""
    turns = [RUN, *[getattr(faults, fault)] * 9]
    talk = Conversation(quick.path, home, turns, env={"CLAUDE_CODE_MAX_RETRIES": "1"})
    talk.type("start")
    shown, deadline = "", time.monotonic() + 120
    while "STANDS STILL" not in shown and time.monotonic() < deadline:
        time.sleep(0.5)
        given = json.dumps({"session_id": next((e["session_id"] for e in talk.events if "session_id" in e), "")})
        line = [quick.path / ".claude/hooks/loop.py", "statusline"]
        shown = subprocess.run(line, input=given, capture_output=True, text=True).stdout
    talk.close()
    assert re.match(r"THE LOOP STANDS STILL, type anything to go on: API Error", shown), shown
    assert not texts(talk, "^Stop hook feedback") and talk.ends[-1]["is_error"]


# In a terminal


class Terminal:
    """A terminal on a tmux server of its own."""

    def __init__(self, folder: Path, argv: list, env: dict):
        self.socket = str(folder / "tmux")
        exports = [f"{k}={v}" for k, v in env.items()]
        size = ["-x", "160", "-y", "50"]
        command = ["env", "-i", *exports, "TERM=screen-256color", *map(str, argv)]
        self.tmux("new-session", "-d", *size, "-c", str(folder / "repo"), *command)

    def tmux(self, *args: str) -> str:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TMUX")}
        command = ["tmux", "-S", self.socket, "-f", "/dev/null", *args]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def type(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)
        time.sleep(1)  # a paste would swallow the Enter
        self.tmux("send-keys", "Enter")

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            screen = self.tmux("capture-pane", "-p")
            if re.search(pattern, screen):
                return screen
            time.sleep(0.3)
        raise AssertionError(f"{pattern!r} did not appear; the screen:\n{screen}")


def test_in_a_terminal(quick, home, tmp_path):
    quick.edit("stop: 100 experiments", "stop: 3 experiments", "program.md")
    model = Model(forever(RUN, say("noted")))
    prepare_home(home, quick.path, trusted=True)
    terminal = Terminal(tmp_path, [CLIENT], environment(home, model))
    try:
        terminal.wait_for(r"@research")
        terminal.wait_for(r"#1 \| mean_rank \d+.*phase 1/2, 0/40")
        terminal.type("start")
        terminal.wait_for("The loop has ended: 3 experiments since start")
        terminal.wait_for(r"#4 \| mean_rank .*phase 1/2, 3/40")
        assert len(quick.experiments()) == 1 + 3
        assert [r.is_error for r in model.results] == [False] * 3
        terminal.type("!./run.sh")  # the person's own shell: no hook is asked
        terminal.wait_for("its guard did not approve")
    finally:
        terminal.tmux("kill-server")
        model.close()
