"""What doctor says about the client and about settings that lie in wait before a conversation starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import engine
import install
import settings
from repository import ROOT, copy_of_the_repository


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


# What a person or a company has told the client for all projects


@pytest.fixture
def written(tmp_path: Path, monkeypatch):
    """written(where, settings): the only settings there are besides the project's; what doctor says of them."""
    person, company = tmp_path / "home/.claude", tmp_path / "etc"
    local = tmp_path / "settings.local.json"
    monkeypatch.setenv("HOME", str(person.parent))
    monkeypatch.delenv("CLAUDE_CONFIG_DIR", raising=False)
    monkeypatch.setattr(settings, "COMPANY", company)
    monkeypatch.setattr(settings, "LOCAL", local)
    monkeypatch.setattr(settings, "MEMORIES", ())
    files = {
        "person": person / "settings.json",
        "local": local,
        "company": company / "managed-settings.json",
        "company, a part": company / "managed-settings.d/10-rules.json",
        "company, remote": person / "remote-settings.json",
        "person's CLAUDE.md": person / "CLAUDE.md",
    }

    def write(where: str, what: dict | str) -> list[install.Finding]:
        file = files[where]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(what if isinstance(what, str) else json.dumps(what))
        found = list(install.check_settings())
        assert all(str(file) in f.text and "\n" not in f.text for f in found)
        return found

    return write


STOPPING = [
    "Bash", "Bash(*)", "Bash(./run.sh)", "Bash(./run.sh:*)", "Bash(./*)", "Bash(*.sh)", "Edit", "Write", "Read", "*",
    "Edit(**)", "Edit(*.py)", "Edit(./train.py)", "Edit(/train.py)", f"Edit(/{ROOT}/**)", "Write(scratchpad.md)",
    "Bash(./run.sh *)", "Read(*.diff)", "Read(data/**)",
    "Read(**/*.py)", "Read(./runs/**)", "Read(runs)", "Read(program.md)", "Agent", "Agent(planner)",
    "Task", "Task(planner)",
]  # fmt: skip
HARMLESS = [
    "Bash(rm -rf *)", "Bash(git push:*)", "Bash(curl *)", "Bash(sudo:*)", "Read(./.env)", "Read(**/.env.*)", "mcp__x",
    "Read(~/.ssh/**)", "Read(//etc/**)", "Edit(~/.claude/**)", "Edit(package.json)", "NotebookEdit",
    "Read(./secrets/**)", "Skill(x)", "", "garbage (((",
]  # fmt: skip


@pytest.mark.parametrize("where", ["person", "local", "company", "company, a part", "company, remote"])
@pytest.mark.parametrize("kind", ["ask", "deny"])
def test_rules_that_deny_what_the_agent_needs(written, where, kind):
    for rule in STOPPING:
        (found,) = written(where, {"permissions": {kind: [*HARMLESS, rule], "allow": ["Bash"]}})
        assert found.good is False and f"permissions.{kind} {rule} denies" in found.text, rule
        assert "take it out while the agent works" in found.text
    assert written(where, {"permissions": {kind: HARMLESS}}) == []
    assert written(where, {"permissions": {"allow": STOPPING}}) == []


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ({"disableAllHooks": True}, "disableAllHooks overrides"),
        ({"allowManagedHooksOnly": True}, "allowManagedHooksOnly switches the guard and the loop off"),
        ({"sandbox": {"enabled": True}}, "sandbox overrides"),
        ({"agent": "other"}, "agent overrides"),
        ({"permissions": {"defaultMode": "plan"}}, "permissions.defaultMode plan overrides"),
        ({"statusLine": {"type": "command", "command": "date"}}, "statusLine overrides"),
        ({"env": {"BASH_DEFAULT_TIMEOUT_MS": "1000"}}, "env BASH_DEFAULT_TIMEOUT_MS overrides"),
    ],
)
def test_what_of_a_company_wins_over_the_project(written, what, named):
    assert written("person", what) == [], "the project's win over these"
    written("person", {})
    (found,) = written("company", what)
    assert found.good is False and named in found.text


@pytest.mark.parametrize("name", [early.replace("env ", "") for early in settings.EARLY])
def test_variables_that_the_client_reads_before_the_projects(written, name):
    (found,) = written("person", {"env": {name: "1", "EDITOR": "vi"}})
    assert found.good is False and name in found.text
    assert written("person", {"env": {name: "0"}}) == []


def test_what_may_or_may_not_matter_is_a_note(written):
    hook = [{"matcher": "Bash", "hooks": [{"type": "command", "command": "rewriter --all"}]}]
    (found,) = written("person", {"hooks": {"PreToolUse": hook}})
    assert found.good is None and "PreToolUse: rewriter --all" in found.text
    (found,) = written("person", {"enabledPlugins": {"helper@market": True, "off@market": False}})
    assert found.good is None and "helper@market" in found.text and "off@market" not in found.text
    (found,) = written(
        "person", {"permissions": {"ask": ["WebSearch"], "deny": ["WebFetch(domain:x.org)", "Bash(rm *)"]}}
    )
    assert (
        found.good is None
        and "deny the web, which phases with `web` want: WebFetch(domain:x.org), WebSearch" in found.text
    )
    (found,) = written("person", {"allowManagedPermissionRulesOnly": True})
    assert found.good is None and "leaves the project's rules out" in found.text
    assert written("person", "{") == [], "the client does not read it either"
    (found,) = written("person", {"claudeMdExcludes": ["**/other/CLAUDE.md", "**/CLAUDE.md"]})
    assert found.good is False and "**/CLAUDE.md keeps CLAUDE.md from the agent" in found.text
    for odd in ([], "x", {"permissions": [1]}, {"permissions": {"deny": "Bash"}}, {"env": 3, "hooks": [1]}, None):
        assert written("person", odd if isinstance(odd, dict) else json.dumps(odd)) == [], odd
    for usual in ({"model": "opus", "language": "german", "includeCoAuthoredBy": False, "apiKeyHelper": "x"}, {}):
        assert written("person", usual) == []
    (found,) = written("person's CLAUDE.md", "Always ask before you run a command.\n")
    assert found.good is None


def test_whatever_else_the_agent_is_told_is_a_note(written, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "ROOT", tmp_path / "work/project")
    monkeypatch.setattr(settings, "MEMORIES", ("CLAUDE.md", "CLAUDE.local.md"))
    rules = tmp_path / "home/.claude/rules/style/python.md"
    for file in (rules, tmp_path / "work/CLAUDE.md", tmp_path / "work/project/CLAUDE.local.md"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("Always ask.\n")
        (found,) = (f for f in install.check_settings() if str(file) in f.text)
        assert found.good is None and "the agent is told this too" in found.text
    (tmp_path / "work/project/CLAUDE.md").write_text("ours\n")
    assert len(list(install.check_settings())) == 3


def test_a_conversation_is_told_what_is_in_the_way(written):
    assert settings.in_the_way() == ""
    written("person", {"permissions": {"ask": ["Bash"]}, "hooks": {"Stop": []}})
    told = settings.in_the_way()
    assert "permissions.ask Bash denies calls that the agent needs" in told and "Stop" not in told


# The rest of a person's environment


def run_sh(verb: str, **env: str) -> subprocess.CompletedProcess:
    kept = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **env}
    return subprocess.run([ROOT / "run.sh", verb], env=kept, capture_output=True)


@pytest.fixture
def old_python(tmp_path: Path) -> Path:
    """A folder with a python3 of some forgotten environment."""
    file = tmp_path / "old/python3"
    file.parent.mkdir()
    file.write_text('#!/bin/sh\n[ "$*" != "-I -V" ] || { echo Python 3.6.8; exit; }\necho SyntaxError >&2; exit 1\n')
    file.chmod(0o755)
    return file.parent


@pytest.mark.parametrize("verb", ["help", "night"])
def test_an_old_python_first_on_the_path(old_python, verb):
    done = run_sh(verb, PATH=f"{old_python}:{os.environ['PATH']}", CLAUDECODE="1")
    assert b"SyntaxError" not in done.stderr, done
    assert b"for a person" in done.stderr if verb == "night" else done.returncode == 0


def test_no_python_but_an_old_one_is_named(old_python, tmp_path):
    copy = tmp_path / "run.sh"
    system = "system=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/run/current-system/sw/bin"
    text = (ROOT / "run.sh").read_text()
    assert system in text
    copy.write_text(text.replace(system, f"system={old_python}"))
    copy.chmod(0o755)
    for verb in ("help", "night"):
        done = subprocess.run([copy, verb], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"run.sh: python3 is Python 3.6.8 in {old_python}/python3; install Python 3.9 or newer" in done.stderr


def test_a_link_to_run_sh(tmp_path):
    (tmp_path / "run").symlink_to(ROOT / "run.sh")
    assert subprocess.run([tmp_path / "run", "help"], capture_output=True).returncode == 0


def launcher(folder: Path, harness: str) -> Path:
    """A run.sh whose harness is this Python."""
    (folder / "container").mkdir()
    (folder / "container/harness").write_text(harness)
    shutil.copy(ROOT / "run.sh", folder)
    return folder / "run.sh"


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/St_Johns", "", "XYZ-5:30"])
def test_one_time_zone_everywhere(tmp_path, zone):
    """What run.sh passes on to the harness; hooks and nights have the environment as it is."""
    copy = launcher(tmp_path, "import time; print(time.strftime('%H:%M %Z', time.localtime(0)))\n")
    here = {"PATH": "/usr/bin:/bin", "TZ": zone}
    as_it_is = subprocess.run(["date", "-d@0", "+%H:%M %Z"], env=here, capture_output=True, text=True).stdout
    for verb in ("log", "night"):
        assert subprocess.run([copy, verb], env=here, capture_output=True, text=True).stdout == as_it_is


def test_a_clone_under_another_umask(tmp_path):
    """Containers read as another user what is mounted from it."""
    made = copy_of_the_repository(tmp_path / "repo")
    subprocess.run(["chmod", "-R", "go=", made.path / "container"], check=True)
    assert made.run("help").returncode == 0
    inside = made.path / "container/inside"
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in (inside, *inside.iterdir()))
    assert inside.stat().st_mode & 0o055 == 0o055 and made.git("status", "--short") == ""


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LANG": "de_DE.ISO-8859-1"}, {"LC_ALL": "en_US.ISO-8859-1"}, {}])
def test_text_is_utf_8_whatever_the_locale(tmp_path, locale):
    copy = launcher(tmp_path, "import locale; print('—', locale.getpreferredencoding())\n")
    for verb in ("log", "night"):
        done = subprocess.run([copy, verb], env={"PATH": "/usr/bin:/bin", **locale}, capture_output=True)
        assert done.stdout.decode().lower() in ("— utf-8\n", "— utf8\n"), done


# A rented pod


@pytest.mark.parametrize("unshare", ["exit 1", '[ "$1" != -Urmpf ]', '[ "$1" = -Urmpf ]', None])
@pytest.mark.parametrize("docker", ["exit 1", "exit 0", None])
@pytest.mark.parametrize("inside", [True, False])
def test_a_container_that_may_start_none(tmp_path, monkeypatch, unshare, docker, inside):
    """It is said before anything is installed or fetched, unless unshare is missing and nothing tells."""
    for name, does in {"unshare": unshare, "docker": docker, "grep": "exit 1"}.items():
        if does:
            (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
            (tmp_path / name).chmod(0o755)
    (tmp_path / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(install, "CONTAINED", "true" if inside else "false")
    monkeypatch.setattr(engine, "name", lambda: pytest.fail("an engine is looked for"))
    bare = inside and unshare == "exit 1" and docker != "exit 0"
    if not bare:
        install.refuse_bare_pod()
        return
    for look in (install.need_image, lambda: list(install.check_engine())):
        with pytest.raises(install.Refused, match="itself a container and may start none.*: rent a virtual machine"):
            look()


def test_what_a_container_looks_like(tmp_path):
    """By marks beneath a folder of ours, in the place of this machine's."""
    looks = install.CONTAINED
    for folder in ("/proc/self/", "/run/", "test -e /"):
        looks = looks.replace(folder, f"test -e {tmp_path}/" if "test" in folder else f"{tmp_path}/")
    looks = looks.replace(f"test -e {tmp_path}{tmp_path}", f"test -e {tmp_path}")
    for mark, text, inside in (
        ("mountinfo", "27 1 254:0 / / rw - ext4 /dev/vda rw\n36 1 0:30 / /mnt rw - overlay o rw\n", False),
        ("mountinfo", "36 1 0:30 / / rw,relatime - overlay overlay rw\n", True),
        ("mountinfo", "", False),
        (".dockerenv", "", True),
        (".containerenv", "", True),
    ):
        (tmp_path / mark).write_text(text)
        assert (subprocess.run(["sh", "-c", looks]).returncode == 0) == inside, (looks, mark, text)
        (tmp_path / mark).unlink()
