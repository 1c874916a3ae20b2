"""What doctor says about the client and about settings that lie in wait before a conversation starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import install


@pytest.fixture
def claude(tmp_path: Path, monkeypatch) -> Path:
    """A program of that name where people have it, and no other."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    (file := tmp_path / ".local/bin/claude").parent.mkdir(parents=True)
    return file


def test_doctor_names_another_client(claude: Path):
    for version, good in ((install.CLIENT_VERSION, True), ("2.1.200", None), ("9.0.0", None)):
        claude.write_text(f"#!/bin/sh\necho '{version} (Claude Code)'\n")
        claude.chmod(0o755)
        found = install.check_client()
        assert found.good is good and version in found.text
        assert good or (install.CLIENT_VERSION in found.text and "./run.sh test" in found.text)


def test_doctor_names_planted_settings(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(install, "ROOT", tmp_path)
    assert install.check_lock().good
    (local := tmp_path / ".claude/settings.local.json").parent.mkdir()
    local.write_text(json.dumps({"permissions": {"allow": ["Bash"]}}))
    assert install.check_lock().good
    for key in ("disableAllHooks", "hooks", "env", "statusLine"):
        local.write_text(json.dumps({key: {}}))
        found = install.check_lock()
        assert found.good is False and key in found.text
    local.write_text("{")
    assert install.check_lock().good is False
