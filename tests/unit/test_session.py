"""The loop in one conversation: on and off, what counts, what ends it; loop.py, in process.

The record and the plan are made up (support/recorded.py); files are real.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

import pytest

import display
import record
import session
from looping import add, message
from repository import PROGRAM, ROOT
from session import Session

# On and off


@pytest.mark.parametrize("word", ["Stop", "pause", " STOP! "])
def test_start_and_stop_as_whole_messages(loop, word):
    assert loop.turn() == {} and not loop.session.on
    assert "The loop is on. Phase 1 of 2 (first), 0 of 40 experiments." in loop.type(" Start. ")
    assert loop.turn()["decision"] == "block"
    assert "The loop is still on" in loop.type("do not stop before morning, and start with the learning rate")
    assert loop.turn()["decision"] == "block"
    assert "The loop is off" in loop.type(word) and loop.why == "the person said stop"
    assert loop.turn() == {} and loop.session.stopped
    assert loop.type("what now?") == "" and loop.why == "", "the person may ask for one experiment"
    assert loop.turn() == {}


def test_it_is_on_in_its_own_conversation(loop):
    loop.type("start")
    assert loop.turn(session_id="other") == {} and loop.type("hello", session_id="other") == ""
    assert "The loop is on." in loop.hook("SessionStart")["hookSpecificOutput"]["additionalContext"]
    other = loop.hook("SessionStart", session_id="other")["hookSpecificOutput"]["additionalContext"]
    assert "The loop begins when the person types: start" in other and "off" not in other


def test_it_says_where_things_stand_and_when_to_ask_the_planner(loop):
    assert display.ASK in loop.type("start")
    loop.plan.add("discarded")
    reason = loop.turn()["reason"]
    assert reason.startswith("Phase 1 of 2 (first), 1 of 40 experiments. Since start 1 of 100 experiments. Next")
    assert display.STEP in reason and display.ASK not in reason
    loop.plan.add(*["discarded"] * 4)
    assert display.ASK in loop.turn()["reason"]


def test_what_a_conversation_is_told_stays_short(loop):
    """With forty records, long hypotheses and phase names."""
    loop.plan.text = PROGRAM.replace("## Phase 1 — first", "## Phase 1 — " + "long name " * 5)
    for n in range(41):
        loop.plan.add("discarded", percent=n + 1.0, sigmas=-1.0, hypothesis=f"idea {n} " + "é wide " * 13)
    for event in ("SessionStart", "UserPromptSubmit"):
        said = loop.hook(event, prompt="start")["hookSpecificOutput"]["additionalContext"]
        assert len(said.encode()) <= 1500, said
    assert "idea 40" in loop.hook("SessionStart")["hookSpecificOutput"]["additionalContext"]


def test_a_plan_that_cannot_be_read_is_told_and_ends_it(loop):
    loop.type("start")
    loop.plan.edit("budget: 120", "budget: soon")
    told = "program.md line 5: budget: soon"
    assert told in loop.end() and "decision" not in loop.turn()
    assert told in loop.type("start") and told in loop.call("statusline")
    at_start = loop.hook("SessionStart")
    assert told in at_start["systemMessage"] and told in at_start["hookSpecificOutput"]["additionalContext"]


def test_a_changed_plan_is_told_once(loop):
    """As run.sh does, in its result; a conversation that begins reads it anyway."""
    assert not session.plan_has_changed(), "never read"
    loop.type("start")
    assert not session.plan_has_changed()
    (loop.folder / "program.md").write_text("other\n")
    assert session.plan_has_changed() and not session.plan_has_changed()
    (loop.folder / "program.md").unlink()
    loop.hook("SessionStart")  # resumed or compacted, while the loop is on
    assert not session.plan_has_changed()


def test_damaged_files_and_strange_ids(loop):
    loop.type("start")
    (loop.folder / "runs/session/s.json").write_text('{"on": tr')
    assert loop.session == Session(id="s") and loop.turn() == {}
    (loop.folder / "runs/session/s.json").write_text('{"on": true, "of another version": 1}')
    assert loop.session == Session(id="s", on=True)
    assert Session.load("../../x/y").id == "xy" and len(Session.load("x" * 999).id) == 100
    loop.type("stop", session_id="../../x")
    assert (loop.folder / "runs/session/x.json").exists()


# What ends it


def test_turns_without_an_experiment(loop):
    loop.type("start")
    assert loop.turn()["decision"] == loop.turn()["decision"] == "block"
    loop.plan.add("failed")
    for _ in range(3):
        assert loop.turn()["decision"] == "block"
    loop.plan.add("unmeasured")  # HEAD's own train.py does not run: for a person
    ended = loop.end()
    assert "3 turns in a row brought no experiment. Type start to go on" in ended and not loop.session.on
    loop.type("start")
    assert loop.turn()["decision"] == "block"


def test_an_open_chain_ends_with_the_loop(loop):
    loop.type("stop", session_id="other")
    loop.type("start")
    loop.turn()
    assert loop.chains_ended == 0
    loop.type("stop")
    assert loop.chains_ended == 1
    loop.stop_at("1 experiments")
    loop.type("start")
    loop.plan.add("discarded")
    assert loop.end() and loop.chains_ended == 2
    loop.stop_at("9 experiments")
    with loop.night(since=time.time(), after=1):
        loop.type("start")
        assert [loop.end() != "" for _ in range(3)] == [False, False, True] and loop.chains_ended == 2
    loop.type("start")
    assert [loop.end() != "" for _ in range(3)] == [False, False, True] and loop.chains_ended == 3


def test_another_branchs_experiments_are_not_its_own(loop):
    loop.stop_at("2 experiments")
    loop.type("start")
    for _ in range(2):
        loop.plan.add("discarded", branch="second")
        assert loop.turn()["decision"] == "block"
    assert "3 turns in a row" in loop.end()


def test_experiments_since_start(loop):
    loop.stop_at("2 experiments")
    loop.plan.add("baseline", "discarded", "discarded")
    loop.type("start")
    loop.plan.add("remeasured", "kept")
    assert "Since start 1 of 2 experiments." in loop.turn()["reason"] and not loop.why
    loop.plan.add("failed")
    assert loop.why == "2 experiments since start, as program.md's `stop` says"
    assert loop.end().startswith("The loop has ended: 2 experiments since start, as program.md's `stop` says. Type")
    assert loop.why == "" and not loop.session.on, "the person may ask for one more"
    loop.type("start")
    assert loop.turn()["decision"] == "block"


def test_the_last_phase(loop):
    loop.plan.text = PROGRAM.replace("until: 40", "until: 1").replace("## Phase 2 — second\n", "")
    loop.type("start")
    loop.plan.add("discarded")
    assert "all phases of program.md are done" in loop.end()


def test_a_chain_is_ended_where_one_is_open(loop, monkeypatch):
    """An engine that hangs holds up nothing."""
    calls = []

    def hangs(command: list, timeout: float, **_) -> None:
        calls.append([str(word) for word in command])
        raise session.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(session.subprocess, "run", hangs)
    session.end_chain()
    assert calls == [] and not session.OPEN_CHAIN.exists()
    loop.plan.add("discarded", chain=record.Chain(1, 3, loop.plan.incumbent[:9], True))
    session.end_chain()
    assert calls == [[f"{ROOT}/run.sh", "end-chain"]] and session.OPEN_CHAIN.exists()
    loop.plan.text = "no plan"
    session.end_chain()  # nor does a mistake in program.md, which ends a night


def test_no_other_conversation_ends_the_chain_of_a_loop_that_goes_on(loop, monkeypatch):
    """The mark of a chain that could not be ended says nothing of the loop that began since."""
    loop.type("start")
    loop.type("stop")
    session.OPEN_CHAIN.touch()
    loop.type("start")
    ended = loop.chains_ended
    loop.hook("SessionStart", session_id="another")
    assert loop.chains_ended == ended and not session.OPEN_CHAIN.exists()


@pytest.mark.parametrize("prompt", ["what now?", "start"])
def test_a_chain_that_could_not_be_ended_is_ended_at_the_next_chance(loop, monkeypatch, prompt: str):
    """A run that was just stopped may still have the lock."""
    status = [2]

    def answers(command: list, check: bool = False, **_) -> subprocess.CompletedProcess:
        done = subprocess.CompletedProcess(command, status[0])
        loop.chains_ended += not status[0]
        if check:
            done.check_returncode()
        return done

    loop.plan.add("discarded", chain=record.Chain(1, 3, loop.plan.incumbent[:9], True))
    monkeypatch.setattr(session.subprocess, "run", answers)
    loop.use_the_real_end_chain()
    loop.type("start")
    loop.type("stop")
    loop.hook("SessionStart", session_id="other")
    assert loop.chains_ended == 0, "the lock is held still"
    status[0] = 0
    loop.call("statusline")
    assert loop.chains_ended == 0, "a status line has no time for that"
    loop.type(prompt, session_id="other")
    assert loop.chains_ended == 1
    loop.type(prompt, session_id="a third")
    assert loop.chains_ended == 1


def test_hours_and_several_limits(loop, monkeypatch):
    loop.stop_at("50 experiments, 1.5 hours, 20 USD")
    loop.type("start")
    began = session.seconds_up()
    monkeypatch.setattr(session, "seconds_up", lambda: began + 3600)
    loop.plan.add("discarded")
    assert "Since start 1 of 50 experiments, 1.0 of 1.5 hours, 0.00 of 20.00 USD." in loop.turn()["reason"]
    monkeypatch.setattr(session, "seconds_up", lambda: began + 5401)
    assert "1.5 hours since start, as program.md's `stop` says" in loop.end()


@pytest.fixture
def zone(monkeypatch):
    def set_to(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield set_to
    monkeypatch.undo()
    time.tzset()


SUMMER = "CET-1CEST,M3.5.0,M10.5.0/3"  # in the night of 25 October 2026 clocks go back: it has 25 hours


@pytest.mark.parametrize(
    ("where", "clock", "since", "then"),
    [
        ("UTC", "07:30", "2026-11-23 22:10", "2026-11-24 07:30"),
        ("UTC", "23:30", "2026-11-23 22:10", "2026-11-23 23:30"),
        ("UTC", "22:10", "2026-12-31 22:10", "2027-01-01 22:10"),
        (SUMMER, "07:30", "2026-10-24 22:00", "2026-10-25 07:30"),
        ("UTC", "7:05", "2026-02-28 07:06", "2026-03-01 07:05"),
    ],
)
def test_a_clock_is_the_next_such_time(zone, where, clock, since, then):
    zone(where)
    began = time.mktime(time.strptime(since, "%Y-%m-%d %H:%M"))
    at = session.next_time(clock, began)
    assert time.strftime("%Y-%m-%d %H:%M", time.localtime(at)) == then


def test_the_clock_ends_it(loop, zone, monkeypatch):
    zone("UTC")
    monkeypatch.setattr(time, "time", lambda: 22 * 3600.0)
    loop.stop_at("07:30")
    loop.type("start")
    monkeypatch.setattr(time, "time", lambda: (24 + 7) * 3600 + 1799.0)
    assert not loop.why
    monkeypatch.setattr(time, "time", lambda: (24 + 7) * 3600 + 1800.0)
    assert loop.why == "it is 07:30, as program.md's `stop` says"
    Session(id="night", on=True, since=22 * 3600.0, clock="6:00").save()
    assert Session.load("night").reason_to_end(loop.plan.history) == "it is 6:00, as the person said"


# Tokens and cost


def test_tokens_of_a_transcript(loop):
    """Each message once, without what the cache gave; subagents too; what is half written waits."""
    loop.stop_at("1000 tokens")
    transcript, helper = loop.folder / "t.jsonl", loop.folder / "t/subagents/agent-1.jsonl"
    add(transcript, message("m0", input_tokens=5000))
    loop.type("start", transcript_path=str(transcript))
    given = {"input_tokens": 100, "output_tokens": 1, "cache_read_input_tokens": 10**6}
    add(transcript, message("m1", **given) + 'no JSON "usage"\n{"usage": 1}\n[{"usage": 1}]\n')
    add(transcript, 2 * message("m1", input_tokens=100, output_tokens=100))
    add(transcript, message("m2", cache_creation_input_tokens=300, output_tokens=None))
    add(helper, message("a1", input_tokens=400))
    assert loop.session.used(loop.plan.history) == {"tokens": (900, 1000)}
    last = message("m3", output_tokens=100)
    add(transcript, last[:40])
    assert "Since start 900 of 1,000 tokens." in loop.turn()["reason"]
    add(transcript, last[40:])
    assert "1,000 tokens since start, as program.md's `stop` says" in loop.end()
    loop.type("start", transcript_path=str(transcript))  # counted from here
    assert loop.session.used(loop.plan.history)["tokens"] == (0, 1000)
    transcript.unlink()
    assert loop.turn() != {}, "a transcript that is gone ends nothing"


def test_a_long_transcript_is_read_at_once(loop):
    loop.stop_at("900M tokens")
    transcript, text = loop.folder / "t.jsonl", json.dumps({"content": "x" * 10_000}) + "\n"
    add(transcript, "".join(message(f"message-{n:027}", input_tokens=1, output_tokens=2) + text for n in range(3000)))
    loop.type("start", transcript_path=str(transcript))
    assert loop.session.tokens_before == 9000
    began = time.monotonic()
    loop.turn()
    assert time.monotonic() - began < 2, "30 MB take a tenth of that"


def test_the_status_line_reports_the_cost(loop):
    loop.stop_at("2 USD")
    loop.plan.add("baseline", train=loop.plan.incumbent)

    def status(usd: float | None) -> str:
        return loop.call("statusline", cost={"total_cost_usd": usd})

    assert re.fullmatch(r"#1 \| mean_rank 100\.0.* \(\+0\.0 %\) \| phase 1/2, 0/40\n", status(1.5)), status(1.5)
    loop.type("start")
    status(3.49)
    status(None)
    assert "Since start 1.99 of 2.00 USD." in loop.turn()["reason"]
    status(3.5)
    assert "2.00 USD since start, as program.md's `stop` says" in loop.end()


@pytest.mark.parametrize(
    ("before", "after", "risen"),
    [
        ([5], [12], 7),
        ([5], [12, 0.4, 14.9], 21.5),  # it starts anew after a compaction or a resume
        ([5], [0.4, 5], 4.6),
        ([], [3, 1, 2], 4),
        ([2, 7], [7, 7, 6.5, 7.5], 1),
        ([5], [], 0),
        ([5], [None, 0, 0], 0),
    ],
)
def test_a_cost_that_starts_anew(loop, before, after, risen):
    """Never less than nothing, and never less than what it rose by."""
    loop.stop_at("15 USD")
    for usd in before:
        loop.call("statusline", cost={"total_cost_usd": usd})
    loop.type("start")
    for usd in after:
        loop.call("statusline", cost={"total_cost_usd": usd})
    used, _ = loop.session.used(loop.plan.history)["usd"]
    assert used == pytest.approx(risen)
    assert ("USD since start, as program.md's `stop` says" in loop.end()) == (risen >= 15)


def test_tokens_of_a_transcript_that_is_replaced(loop):
    """Another file for the same conversation, a shorter one, none for a while: what was used stays used."""
    loop.stop_at("10000 tokens")
    first, second = loop.folder / "t.jsonl", loop.folder / "moved.jsonl"
    add(first, message("m0", input_tokens=5000))
    loop.type("start", transcript_path=str(first))

    def used(file: Path) -> int:
        loop.turn(transcript_path=str(file))
        loop.plan.add("discarded")
        return loop.session.used(loop.plan.history)["tokens"][0]

    add(first, message("m1", input_tokens=700))
    assert used(first) == 700
    add(second, message("m2", input_tokens=40))
    assert used(second) == 700, "less than before: it begins anew"
    add(second, message("m3", input_tokens=60))
    assert used(second) == 760
    second.rename(loop.folder / "away")
    assert used(second) == 760
    (loop.folder / "away").rename(second)
    assert used(second) == 760
    second.write_text(message("m4", output_tokens=30))
    add(second, message("m5", output_tokens=20))
    used(second)
    add(second, message("m6", output_tokens=5))
    assert used(second) == 765


def test_a_cost_file_of_an_older_version(loop):
    (loop.folder / "runs/session").mkdir(parents=True)
    (loop.folder / "runs/session/s.usd").write_text("5.0\n")
    loop.stop_at("2 USD")
    loop.type("start")
    assert loop.turn()["decision"] == "block"


@pytest.mark.parametrize("by_h", [1, 3, 48, -2, -24])
@pytest.mark.parametrize("after_h", [0, 0.5, 2])
def test_a_clock_that_is_set(loop, monkeypatch, by_h, after_h):
    """Hours are hours, whatever the clock says: a first NTP sync may set it forward; start is never in the future."""
    loop.stop_at("12 hours, 500 experiments")
    clock, up = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)

    def at(hours: float, set_back_h: float) -> None:
        monkeypatch.setattr(time, "time", lambda: clock + (hours - set_back_h) * 3600)
        monkeypatch.setattr(time, "clock_gettime", lambda _: up + hours * 3600)

    loop.type("start")
    for hours, said in ((after_h, after_h), (11.9, 11.9), (12.01, None)):
        at(hours, by_h)
        loop.plan.add("discarded")
        turn = loop.turn()
        assert loop.session.began <= time.time()
        if said is None:
            assert "12.0 hours since start" in turn["systemMessage"]
        else:
            assert f"{said:.1f} of 12.0 hours" in turn["reason"]


def test_a_clock_that_is_set_back_and_an_hour_of_the_day(loop, zone, monkeypatch):
    """It was a day ahead: 07:30 is then not a day later."""
    zone("UTC")
    began = (20 * 24 + 22) * 3600.0
    up = time.clock_gettime(time.CLOCK_BOOTTIME)
    monkeypatch.setattr(time, "time", lambda: began)
    loop.stop_at("07:30")
    loop.type("start")
    for hours, ended in ((1, False), (9, False), (9.6, True)):
        monkeypatch.setattr(time, "time", lambda h=hours: began + (h - 24) * 3600)
        monkeypatch.setattr(time, "clock_gettime", lambda _, h=hours: up + h * 3600)
        assert bool(loop.why) == ended, hours


def test_a_machine_that_restarted_counts_by_its_clock(loop, monkeypatch, tmp_path):
    loop.stop_at("12 hours")
    began = time.time()
    loop.type("start")
    (boot := tmp_path / "boot_id").write_text("another")
    monkeypatch.setattr(session, "BOOT", boot)
    monkeypatch.setattr(time, "clock_gettime", lambda _: 60.0)
    monkeypatch.setattr(time, "time", lambda: began + 5 * 3600)
    assert "5.0 of 12.0 hours" in loop.turn()["reason"]


def test_a_turn_that_the_provider_ended(loop, monkeypatch):
    """No Stop hook is asked then. The status line says so until something goes on."""
    standing = "THE LOOP STANDS STILL, type anything to go on: API Error: 529 Overloaded. | "
    loop.type("hello")
    failed = {"error": "server_error", "last_assistant_message": "API Error: 529\n Overloaded."}
    loop.hook("StopFailure", **failed)
    assert "STANDS STILL" not in loop.call("statusline"), "it was not on"
    loop.type("start")
    assert "STANDS STILL" not in loop.call("statusline")
    for going_on in (lambda: loop.type("go on"), lambda: loop.turn()):
        assert loop.hook("StopFailure", **failed) == {}
        assert loop.call("statusline").startswith(standing), loop.call("statusline")
        assert loop.session.on
        going_on()
        assert "STANDS STILL" not in loop.call("statusline")
    loop.hook("StopFailure", error="rate_limit")
    assert "STANDS STILL, type anything to go on: rate_limit" in loop.call("statusline")
