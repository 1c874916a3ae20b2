"""The loop: the real client goes on by its hooks alone, with a model that ends every turn in text."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from client import CLIENT, Conversation, Model, Shown, Turn, call, environment, prepare_home, say
from conftest import Project, block

RUN = call("Bash", command="./run.sh")
# A made-up experiment: a record as run.sh leaves it, in no time.
STUB = r"""#!/bin/bash
set -e
n=$(($(git for-each-ref refs/experiments | wc -l) + 1))
commit=$(git show -s --format=%B refs/experiments/1 |
  sed -e "1s/.*/discarded: idea $n/" -e "s/^Experiment:.*/Experiment: $n/" -e 's/^Verdict:.*/Verdict: discarded/' \
    -e "s/^Hypothesis:.*/Hypothesis: idea $n ${1-}\nPhase: first/" \
    -e "s/^Train:.*/Train: $(printf %040d $n)\nChange: +$n.0 % (-1.0 sigma)/" |
  git commit-tree 'HEAD^{tree}' -p HEAD)
git update-ref "refs/experiments/$n" "$commit"
echo "experiment $n"
"""


@pytest.fixture
def quick(project: Project) -> Project:
    """A project whose run.sh records a made-up discarded experiment."""
    project.write("run.sh", STUB)
    return project


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


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


# --- real experiments ------------------------------------------------------------------------------------------------


class Researcher:
    """A model that follows CLAUDE.md: reads, edits, runs, and decides by the last verdict where to go next."""

    LADDERS = {  # constant: values to climb while each is kept
        "LR": ["0.0", "never"],  # learns nothing
        "BATCH": ["undefined_name", "never"],  # crashes
        "WARMUP": ["100_000", "never"],  # learns nothing yet
        "GRAD_CLIP": ["0.0", "never"],
        "EMBED_DIM": ["1", "never"],
        "WEIGHT_DECAY": ["1e30", "never"],  # not finite
        "STEPS": ["120", "1"],  # the one thing that surely helps the short training of these tests; then too little
        "PATCH": ["undefined_name"],
    }
    EXPECTED = ["discarded", "failed", "discarded", "discarded", "discarded", "failed", "kept", "discarded"]

    def __init__(self, compact_after: int):
        self.ladders = {k: list(v) for k, v in self.LADDERS.items()}
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
            constant, value = self.choose()
            line = re.search(rf"^\s*\d+\t({constant} = .*)$", source, re.M)[1]
            self.ideas.append(f"{constant} to {value}")
            pad = f"# Scratchpad\n\n## Next experiment\n{self.ideas[-1]}\n\n## Notes\n{len(self.blocks)} so far\n"
            yield [
                call("Edit", file_path="train.py", old_string=line, new_string=f"{constant} = {value}"),
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

    def choose(self) -> tuple[str, str]:
        """Kept: further in that direction. Otherwise: another constant."""
        if self.blocks and self.verdict != "kept":
            del self.ladders[next(iter(self.ladders))]
        constant = next(iter(self.ladders))
        return constant, self.ladders[constant].pop(0)


def test_eight_experiments_and_a_compaction(project, home):
    project.edit("stop: 100 experiments", "stop: 8 experiments", "program.md")
    project.git("commit", "-qam", "a short night")
    researcher = Researcher(compact_after=4)
    talk = Conversation(project.path, home, researcher, args=["--autocompact", "100000"]).run("start", timeout=2400)

    # The record holds what the model was told, in order: eight experiments after the baseline.
    judged = [project.trailers(f"refs/experiments/{n}") for n in project.experiments()[1:]]
    assert [t["Hypothesis"] for t in judged] == researcher.ideas
    assert [t["Verdict"] for t in judged] == [b["verdict"] for b in researcher.blocks]
    seen = [t["Verdict"] for t in judged]
    if "120 steps" in researcher.blocks[6]["train"]:  # on a machine too busy for that many, it may not be kept
        assert seen == researcher.EXPECTED, researcher.blocks
    assert len(seen) == 8 and "never" not in " ".join(researcher.ideas)
    kept = [t["Hypothesis"] for t in judged if t["Verdict"] == "kept"]
    assert [
        s.split(" (")[0] for s in project.git("log", "-n", str(len(kept)), "--reverse", "--format=%s").splitlines()
    ] == kept
    assert project.git("status", "--short", "train.py") == ""
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


# --- ends and interruptions, with made-up experiments ----------------------------------------------------------------


def test_stop_setting_ends_it_and_start_goes_on(quick, home):
    quick.edit("stop: 100 experiments", "stop: 2 experiments", "program.md")
    talk = Conversation(quick.path, home, forever(RUN, say("noted"))).run("start", "start")
    assert len(quick.experiments()) == 1 + 2 + 2
    assert len(notices(talk)) == 2 and all("2 experiments since start" in n for n in notices(talk))


def test_stop_setting_holds_within_a_turn_that_never_ends(quick, home):
    quick.edit("stop: 100 experiments", "stop: 2 experiments", "program.md")
    talk = Conversation(quick.path, home, [RUN, RUN, RUN, RUN, say("summed up")]).run("start")
    assert len(quick.experiments()) == 1 + 2
    assert [r.is_error for r in talk.model.results] == [False, False, True, True]
    assert "2 experiments since start, as program.md's `stop` says" in talk.model.results[2].content
    assert "end your turn" in talk.model.results[2].content and "2 experiments since start" in notices(talk)[0]


def test_the_last_phase_ends_it(quick, home):
    quick.edit("until: 40 experiments", "until: 3 experiments", "program.md")
    quick.edit("## Phase 2 — second\n", "", "program.md")
    talk = Conversation(quick.path, home, forever(RUN, say("noted"))).run("start")
    assert len(quick.experiments()) == 1 + 3 and "all phases of program.md are done" in notices(talk)[0]


def test_three_idle_turns_end_it(quick, home):
    """Talk, reading and refused calls are no experiments; one experiment in between starts the count anew."""
    idle = [
        say("let me think"),
        [call("Read", file_path="train.py")],
        say("hm"),
        [call("Bash", command="ls")],
        say("hm"),
    ]
    talk = Conversation(quick.path, home, [*idle[:3], RUN, say("noted"), *idle, say("never said")]).run("start")
    assert len(quick.experiments()) == 2
    assert (
        len(notices(talk)) == 1
        and "3 turns in a row brought no experiment" in notices(talk)[0]
        and "Type start" in notices(talk)[0]
    )
    assert len(texts(talk, "^Stop hook feedback")) == 5 and "never said" not in talk.told


def test_stop_typed_in_the_middle(quick, home):
    def script():
        yield RUN
        yield say("noted")
        talk.type("stop")
        yield RUN
        yield RUN  # not heeded
        yield say("What was learned.")
        yield RUN  # after "what now?": the person may ask for one
        yield say("Here it is.")
        yield from forever_turns

    forever_turns = iter([RUN, say("noted"), say("a"), say("b"), say("c")])
    steps = script()
    talk = Conversation(quick.path, home, lambda shown: next(steps))
    talk.run("start", "what now?", "start")
    runs = [r for r in talk.model.results if r.tool == "Bash"]
    assert [r.is_error for r in runs] == [False, False, True, False, False], [r.content for r in runs]
    assert "the person said stop" in runs[2].content and "end your turn" in runs[2].content
    assert texts(talk, "The loop is off: do not run another experiment")
    assert len(quick.experiments()) == 1 + 4
    assert len(texts(talk, "^Stop hook feedback")) == 1 + 3 and len(notices(talk)) == 1


@pytest.mark.parametrize("word", ["Stop", "pause", " STOP! "])
def test_spellings_of_stop(quick, word):
    hook(quick, "UserPromptSubmit", prompt=" Start. ")
    assert hook(quick, "Stop")["decision"] == "block"
    hook(quick, "UserPromptSubmit", prompt="do not stop before morning, and start with the learning rate")
    assert hook(quick, "Stop")["decision"] == "block"
    assert "loop is off" in json.dumps(hook(quick, "UserPromptSubmit", prompt=word))
    assert hook(quick, "Stop") == {}


def test_a_nudge_is_answered_and_the_loop_goes_on(quick, home):
    def script():
        yield RUN
        yield say("noted")
        talk.type("try a larger batch next")
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
    assert len(quick.experiments()) == 1 + 3 and len(notices(talk)) == 1


def test_a_conversation_without_start_is_left_alone(quick, home):
    """Also while the loop is on in another one, and after a run; a resumed one goes on where it was."""
    hook(quick, "UserPromptSubmit", prompt="start")  # in conversation "s"
    other = Conversation(quick.path, home, [RUN, say("noted")]).run("hello, please run it once")
    assert len(other.model.requests) == 2 and len(quick.experiments()) == 2 and not texts(other, "Stop hook feedback")
    assert "The loop is off until the person types: start" in other.model.requests[0].shown.text

    hook(quick, "UserPromptSubmit", prompt="start", session_id=other.id)
    resumed = Conversation(
        quick.path, home, [say("hello again"), RUN, say("a"), say("b"), say("c")], args=["--resume", other.id]
    )
    resumed.run("are you there?")
    assert "The loop is on." in resumed.model.requests[0].shown.text
    assert texts(resumed, "The loop is still on") and len(quick.experiments()) == 3 and len(notices(resumed)) == 1


def test_a_broken_plan_is_told_and_ends_the_loop(project, home):
    """From the start, with the real run.sh; then in the middle of a loop."""
    plan = project.read("program.md")
    broken = plan.replace("budget: 120", "budget: soon")
    project.write("program.md", broken)
    talk = Conversation(project.path, home, [RUN, say("Please mend line 5.")]).run("start")
    assert len(talk.model.requests) == 2 and "program.md line 5: budget: soon" in talk.model.requests[0].shown.text
    assert "program.md line 5: budget: soon" in talk.model.results[0].content and talk.model.results[0].is_error
    assert project.experiments() == [1]

    project.write("program.md", plan)
    project.write("run.sh", STUB)

    def script():
        yield RUN
        project.write("program.md", broken)
        yield say("noted")
        yield say("never said")

    steps = script()
    talk = Conversation(project.path, home, lambda shown: next(steps)).run("start")
    assert len(notices(talk)) == 1 and "program.md line 5: budget: soon" in notices(talk)[0]
    assert "never said" not in talk.told


def test_the_brief_stays_short(quick):
    """With forty records, long hypotheses and phase names."""
    quick.edit("## Phase 1 — first", "## Phase 1 — " + "long name " * 5, "program.md")
    for n in range(40):
        quick.run("é" * 90 if n % 2 else "wide " * 18)
    assert len(quick.experiments()) == 41
    for event in ("SessionStart", "UserPromptSubmit"):
        said = hook(quick, event, prompt="start")["hookSpecificOutput"]["additionalContext"]
        assert len(said.encode()) <= 1500, said
    assert "idea 41" in hook(quick, "SessionStart")["hookSpecificOutput"]["additionalContext"]


# --- in a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """A terminal on a tmux server of its own."""

    def __init__(self, folder: Path, argv: list, env: dict):
        self.socket = str(folder / "tmux")
        exports = [f"{k}={v}" for k, v in env.items()]
        self.tmux(
            "new-session",
            "-d",
            "-x",
            "160",
            "-y",
            "50",
            "-c",
            str(folder / "repo"),
            "env",
            "-i",
            *exports,
            "TERM=screen-256color",
            *map(str, argv),
        )

    def tmux(self, *args: str) -> str:
        env = {k: v for k, v in os.environ.items() if not k.startswith("TMUX")}
        done = subprocess.run(
            ["tmux", "-S", self.socket, "-f", "/dev/null", *args], capture_output=True, text=True, env=env
        )
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
        terminal.wait_for(r"#1 \| mean_rank \d+.*phase 1 of 2 \(first\), 0 of 40 experiments")
        terminal.type("start")
        terminal.wait_for("The loop has ended: 3 experiments since start")
        terminal.wait_for(r"#4 \| mean_rank .*3 of 40 experiments")
        assert len(quick.experiments()) == 1 + 3
        assert [r.is_error for r in model.results] == [False] * 3
        terminal.type("!./run.sh typed")  # the person's own shell: no hook is asked
        terminal.wait_for("experiment 5")
    finally:
        terminal.tmux("kill-server")
        model.close()
