"""loop.py in process, with a made-up record and plan (recorded.py)."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

import locks
import session
from recorded import Recorded
from repository import PROGRAM, ROOT
from session import Session


class Loop:
    """loop.py and a made-up record; every method is in conversation "s", unless another is named."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys, folder: Path):
        self.patch, self.capsys, self.folder = monkeypatch, capsys, folder
        self.plan = Recorded(monkeypatch, PROGRAM)
        (folder / "runs").mkdir()
        (folder / "program.md").write_text(PROGRAM)
        for name, file in {
            "SESSIONS": "runs/session",
            "OPEN_CHAIN": "runs/open-chain",
            "PLAN": "program.md",
            "KNOWN_PLAN": "runs/session/program.md",
            "NIGHT": "runs/night.json",
            "NIGHT_LOCK": "runs/night.lock",
        }.items():
            monkeypatch.setattr(session, name, folder / file)
        monkeypatch.setattr(locks, "running", lambda: None)
        spec = importlib.util.spec_from_file_location("loop", ROOT / ".claude/hooks/loop.py")
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        self.module, self.main, self.chains_ended = module, module.main, 0
        monkeypatch.setattr(module, "end_chain", self.end_chain)

    def end_chain(self) -> None:
        self.chains_ended += 1

    def use_the_real_end_chain(self) -> None:
        self.patch.setattr(self.module, "end_chain", session.end_chain)

    def call(self, *words: str, **given) -> str:
        """What loop.py prints."""
        text = json.dumps({"session_id": "s", **given})
        self.patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        self.patch.setattr(sys, "argv", ["loop.py", *words])
        self.main()
        return self.capsys.readouterr().out

    def hook(self, event: str, **given) -> dict:
        return json.loads(self.call(hook_event_name=event, **given))

    def type(self, prompt: str, **given) -> str:
        """What the agent is told with it."""
        answer = self.hook("UserPromptSubmit", prompt=prompt, **given)
        return answer.get("hookSpecificOutput", {}).get("additionalContext", "")

    def turn(self, **given) -> dict:
        """The end of a turn."""
        return self.hook("Stop", **given)

    def end(self, **given) -> str:
        """What the person is told at the end of a turn that is the last; '' if it is not."""
        return self.turn(**given).get("systemMessage", "")

    def stop_at(self, stop: str) -> None:
        """The line of the plan."""
        self.plan.text = PROGRAM.replace("stop: 100 experiments", f"stop: {stop}")

    @property
    def session(self) -> Session:
        return Session.load("s")

    @property
    def why(self) -> str:
        return self.session.reason_to_end(self.plan.history)

    @contextlib.contextmanager
    def night(self, **state):
        """As if one were under way: its lock is held."""
        (self.folder / "runs/night.json").write_text(json.dumps(state))
        with (self.folder / "runs/night.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def message(ident: str, **usage: int | None) -> str:
    return json.dumps({"type": "assistant", "message": {"id": ident, "usage": usage}}) + "\n"


def add(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as f:
        f.write(text)
