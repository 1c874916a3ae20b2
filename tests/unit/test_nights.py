"""A night: what its conversations count and what ends them, and its keeper; loop.py and claude are stand-ins'."""

from __future__ import annotations

import json
import os
import time

import pytest

import locks
import night
import session
from looping import add, message
from session import Night


def test_start_in_a_night_is_the_nights(loop):
    since = time.time() - 3 * 3600
    loop.stop_at("2 hours, 50 USD")
    loop.type("start")
    assert loop.turn()["decision"] == "block"
    with loop.night(since=since, usd=99, clock=""):
        assert loop.turn()["decision"] == "block", "begun before"
        loop.type("start")
        assert "3.0 hours since start" in loop.end()
    loop.type("start")
    assert loop.turn()["decision"] == "block", "the night is over"


def test_a_nights_tokens_cost_and_experiments_are_of_all_its_conversations(loop):
    loop.stop_at("5 experiments, 1000 tokens, 2 USD")
    loop.plan.add(*["discarded"] * 3)
    with loop.night(since=time.time(), after=1, tokens=600, usd=1.5):
        add(loop.folder / "t.jsonl", message("m1", input_tokens=100))  # before `start`
        loop.type("start", transcript_path=str(loop.folder / "t.jsonl"))
        add(loop.folder / "t.jsonl", message("m2", input_tokens=50))
        assert loop.session.used(loop.plan.history) == {"experiments": (2, 5), "tokens": (650, 1000), "usd": (1.5, 2)}


def test_what_the_night_says_ends_its_conversations_alone(loop):
    since = time.time() - 60
    loop.type("start", session_id="before")
    with loop.night(since=since, clock="", stop="the person said night stop"):
        loop.type("start")
        assert loop.why == "the person said night stop"
        assert loop.turn(session_id="before")["decision"] == "block"
    assert not loop.why, "its lock is free: it is over"


def test_a_night_is_under_way_while_its_keeper_holds_the_lock(loop):
    assert session.current_night() is None
    with loop.night(since=1.0, pid=7, clock="07:30"):
        assert session.current_night() == Night(since=1.0, pid=7, clock="07:30")
        (loop.folder / "runs/night.json").write_text("half a f")
        assert session.current_night() == Night()
    assert session.current_night() is None


def test_a_client_without_an_experiment_is_ended(keeper, monkeypatch):
    """But not while one runs, nor soon after one that was over between two looks."""
    monkeypatch.setattr(night, "BARREN", 0.5)
    one, began = keeper("exec sleep 100"), time.monotonic()

    def seconds_up() -> float:
        return time.monotonic() - began

    assert "no experiment from the client" in one.run_client() and 0.5 <= seconds_up() < 5
    began = time.monotonic()
    person = locks.Running(0, 2, "training 1 of 6, baseline", time.time(), 120)
    monkeypatch.setattr(locks, "running", lambda: person if seconds_up() < 1.5 else None)
    assert "no experiment from the client" in one.run_client() and 1.9 <= seconds_up() < 7  # POLL before 1.5 s
    began, look = time.monotonic(), one.check

    def check() -> str:
        why, one.logged = look(), 7 if seconds_up() > 0.3 else 0
        return why

    monkeypatch.setattr(one, "check", check)
    assert "no experiment from the client" in one.run_client() and 0.8 <= seconds_up() < 6


def test_a_night_ends_what_it_started_and_nothing_else(keeper, monkeypatch):
    """At the second `night stop`: not a person's audit, not another conversation's experiment, but its own."""
    ended, one = [], keeper("exec sleep 100")
    monkeypatch.setattr(night, "end_process", lambda pid, runs: ended.append(pid) or pid < 0 and os.kill(pid, 9))
    person = locks.Running(7, 2, "audit", 0, 120)
    monkeypatch.setattr(locks, "running", lambda: person)
    assert one.experiment() is None, "before its first conversation"
    one.stops = 2
    for conversation in ("", "another"):
        monkeypatch.setattr(locks, "running", lambda c=conversation: locks.Running(7, 2, "", 0, 120, "", c))
        assert "ended at once" in one.run_client()
        assert len(ended) == 1 and ended.pop() < 0, "the client's process group"
    monkeypatch.setattr(locks, "running", lambda: locks.Running(7, 2, "", 0, 120, "", one.conversation))
    assert "ended at once" in one.run_client() and ended[0] == 7 and len(ended) == 2


def test_what_runs_names_the_conversation_that_started_it(loop, monkeypatch):
    for conversation in ("an-id", ""):
        monkeypatch.setenv("CLAUDE_CODE_SESSION_ID", conversation)
        monkeypatch.setattr(locks, "ROOT", loop.folder)
        locks.announce(3, "candidate, run 1", 120)
        assert json.loads((loop.folder / locks.RUNNING).read_text())["conversation"] == conversation


@pytest.mark.parametrize("version", ["2.1.328 (Claude Code)", "9.0.0", ""])
def test_the_log_names_the_client_which_does_not_update_itself(keeper, capsys, version):
    answer = '{"result": "updates $DISABLE_AUTOUPDATER", "total_cost_usd": 1}'
    one = keeper(f"cat << E\n{answer}\nE", version)
    one.run_client()
    assert one.message == "updates 1"
    assert f"Claude Code starts, conversation 1, version {version or 'unknown'}\n" in capsys.readouterr().out


def test_a_night_with_nobody_signed_in_ends_at_once(keeper, monkeypatch, capsys):
    """And not in the small hours, when a token may come back."""
    answer = '{"is_error": true, "result": "Not logged in · Please run /login"}'
    one = keeper(f"echo '{answer}'; exit 1")
    monkeypatch.setattr(night.Keeper, "log_summary", lambda self, why: night.log_line(why))
    monkeypatch.setattr(night.Keeper, "check", lambda self: "enough" if self.night.conversations > 2 else "")
    monkeypatch.setattr(night, "FIRST_WAIT", 0)
    monkeypatch.setattr(night.signal, "signal", lambda *_: None)
    assert one.keep() == 1 and one.night.conversations == 1
    assert "ended with status 1: Not logged in · Please run /login: start claude once" in capsys.readouterr().out
    one.night.conversations = 1
    assert one.keep() == 0 and one.night.conversations == 3


def test_words_that_mean_nothing_to_a_night(loop, monkeypatch):
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("nothing is to be killed"))
    for words in (("keep",), ("7.30",), ("24:00",), ("stop", "now")):
        with pytest.raises(night.Refused, match="usage: ./run.sh night"):
            night.main(*words)
    with loop.night(since=1.0, pid=7), pytest.raises(night.Refused, match="usage"):
        night.main("keep")
    with pytest.raises(night.Refused, match="no night is under way here"):
        night.main("stop")
