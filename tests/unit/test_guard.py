"""The guard alone: what it lets through, straight into it and by the hook's command line. The client: client/test_lock.

The phase that it reads names two domains; the record is made up.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import calls
import fuzz
import session
from calls import ABILITIES, ASK, INSTEAD, Case
from recorded import Recorded
from repository import PROGRAM, Project, copy_of_the_repository

FUZZ_SEED, WEB_SEED, FUZZ_CALLS = 20264, 20265, 20_000
WEB = ["arxiv.org", "github.com"]
PLAN = PROGRAM.replace("until: 40 experiments\n", f"until: 40 experiments\nweb: {', '.join(WEB)}\n")
EDIT = {"old_string": "a", "new_string": "b"}


@pytest.fixture(scope="session")
def trapped(tmp_path_factory) -> Project:
    """The repository, with files around that are not to be touched. Not to be changed: use `project`."""
    folder = tmp_path_factory.mktemp("trapped")
    made = copy_of_the_repository(folder / "repo")
    calls.set_traps(made.path, folder / "out")
    made.write("program.md", PLAN)
    return made


@pytest.fixture
def project(trapped: Project, tmp_path: Path) -> Project:
    """A copy of `trapped`, to be used up by one test."""
    shutil.copytree(trapped.path, tmp_path / "repo", symlinks=True)
    return Project(tmp_path / "repo")


class Guard:
    """guard.py of a project, called in this process, with a made-up record."""

    def __init__(self, project: Project, monkeypatch: pytest.MonkeyPatch):
        self.project, self.root = project, str(project.path)
        self.module = load(project.path / ".claude/hooks/guard.py")
        self.plan = Recorded(monkeypatch, PLAN)
        monkeypatch.setattr(session, "SESSIONS", project.path / "runs/session")
        monkeypatch.delenv("CLAUDE_PROJECT_DIR", raising=False)

    def check(self, tool: str, given: dict, **more) -> dict:
        """The decision's fields for a call that passes. Raises Denied."""
        asked = {"tool_name": tool, "tool_input": given, "cwd": self.root, "session_id": "s", "tool_use_id": "toolu_1"}
        return self.module.check({**asked, **more})

    def refusal(self, tool: str, given: dict, **more) -> str:
        """Why a call is denied, which says what to do instead; '' when it passes."""
        try:
            self.check(tool, given, **more)
        except self.module.Denied as e:
            assert INSTEAD.search(str(e)), (tool, given, e)
            return str(e)
        except (UnicodeError, ValueError):
            return "a crash, which the hook's command line turns into a refusal"
        return ""


def load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.fixture
def guard(project: Project, monkeypatch) -> Guard:
    return Guard(project, monkeypatch)


def web_log(project: Project) -> list[str]:
    files = sorted((project.path / "runs/web").glob("*"))
    return [file.read_text().rstrip("\n").split("\t", 3)[3] for file in files]


# Files, and the one command


def resolved(case: Case, root: str) -> dict:
    """The call as the client asks about it: it trims a path and resolves it."""
    given = dict(case.given)
    for key in ("file_path", "notebook_path"):
        if isinstance(given.get(key), str) and given[key]:
            given[key] = "/" + os.path.normpath(os.path.join(root, given[key].strip())).lstrip("/")
    return given


def test_only_the_three_abilities(guard, figure):
    """Every call written by hand, as it stands and as the client resolves it."""
    root, wrong = guard.root, []
    fine = calls.abilities(guard.project.path)
    others = calls.refused(guard.project.path, guard.project.path.parent, guard.project.path.parent / "out")
    for case in fine:
        if why := guard.refusal(case.tool, resolved(case, root)):
            wrong.append(f"{case}: {why}")
    asks_for_web = [c for c in others if c.tool.startswith("Web") and "127.0.0.1" not in str(c.given)]
    for case in others:
        for given in (case.given, resolved(case, root)):
            if not guard.refusal(case.tool, given) and case not in asks_for_web:
                wrong.append(f"allowed: {case}")
    figure("lock: written calls straight into the guard", len(fine) + 2 * len(others), len(wrong), abilities=len(fine))
    assert not wrong, "\n".join(wrong)
    assert len(fine) > 40 and len(others) > 400 and len(asks_for_web) == 3
    guard.plan.edit(f"web: {', '.join(WEB)}\n", "")
    assert all("no web access" in guard.refusal(c.tool, c.given) for c in asks_for_web)


def test_other_folders(guard):
    for cwd in ("/", "", f"{guard.root}/sub", f"{guard.root}/..", f"{guard.root}/link.py"):
        assert "start claude there" in guard.refusal("Read", {"file_path": "train.py"}, cwd=cwd)
    assert not guard.refusal("Read", {"file_path": "train.py"}, cwd=f"{guard.root}/sub/..")


def test_generated_calls(guard, figure):
    """What passes is spelled plainly and is one of the three abilities."""
    root, rng = guard.root, random.Random(FUZZ_SEED)
    passed, wrong = set(), []
    for n, (tool, given) in enumerate(fuzz.calls(FUZZ_SEED, root, FUZZ_CALLS)):
        cwd = root if rng.random() < 0.9 else rng.choice(["/", f"{root}/sub", f"{root}/..", "", f"{root}/link.py"])
        asked = {"tool_name": tool, "tool_input": given, "cwd": cwd, "session_id": "s", "tool_use_id": f"toolu_{n}"}
        try:
            answer = guard.module.check(asked)
        except guard.module.Denied as e:
            if not INSTEAD.search(str(e)):
                wrong.append(f"refused without saying what to do instead: {asked}: {e}")
            continue
        except (UnicodeError, ValueError):
            continue  # a crash, which the hook's command line turns into a refusal
        passed.add((tool, json.dumps(given)))
        plain = given.get("file_path", "").replace(f"{root}/", "", 1).replace("./", "", 1)
        if not fuzz.allowed(tool, given, root) or plain != os.path.normpath(plain) and plain or cwd != root:
            wrong.append(f"allowed: {asked}")
        elif answer.get("updatedInput", given) != fuzz.rewritten(tool, given) or answer.keys() - {"updatedInput"}:
            wrong.append(f"{asked}: {answer}")
    figure("lock: calls straight into the guard", FUZZ_CALLS, len(wrong), passed=len(passed))
    assert not wrong, "\n".join(wrong[:20])
    assert len(passed) >= 15


@pytest.mark.parametrize("name", ["train.py", "scratchpad.md", "runs/0001.log"])
def test_links_and_folders_in_place_of_a_file(guard, name):
    """The file itself is looked at, at every call."""
    project = guard.project
    file, other = project.path / name, project.path / "run.sh"
    tries = [("Read", {"file_path": name})]
    if name != "runs/0001.log":
        tries += [("Write", {"file_path": name, "content": "x"}), ("Edit", {"file_path": name, **EDIT})]
    assert not any(guard.refusal(*one) for one in tries)
    put: list[Callable] = [
        lambda: file.symlink_to(other),
        lambda: os.link(other, file),
        lambda: file.symlink_to(project.path / "sub"),
        file.mkdir,
        lambda: os.mkfifo(file),
        lambda: file.symlink_to("/dev/null"),
        lambda: file.symlink_to("nowhere"),
        lambda: None,
    ]
    for one in put:
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink(missing_ok=True)
        one()
        assert all("no ordinary file" in guard.refusal(*call) for call in tries)


def test_a_folder_that_is_a_link(guard):
    project, runs = guard.project, guard.project.path / "runs"
    runs.rename(project.path.parent / "runs")
    runs.symlink_to(project.path.parent / "runs")
    assert "no ordinary file" in guard.refusal("Read", {"file_path": "runs/0001.log"})


def test_proofs_are_left_for_approved_runs_only(guard):
    project, left = guard.project, []
    for ident, command in (("a", "id"), ("../b", "./run.sh"), ("c/../../d", "./run.sh"), ("", "./run.sh")):
        left.append(guard.refusal("Bash", {"command": command}, session_id=ident))
    assert [bool(why) for why in left] == [True, False, False, True] and "no session_id" in left[3]
    assert "no session_id" in guard.refusal("Bash", {"command": "./run.sh"}, session_id="..")
    there = {file.name for file in (project.path / "runs/session").iterdir()}
    assert there == {"proof.b", "proof.cd", "x.json"}


def test_nothing_runs_once_the_loop_has_ended(guard):
    guard.plan.edit("stop: 100 experiments", "stop: 2 experiments")
    session.Session(id="s", on=True, since=time.time()).save()
    guard.plan.add("discarded", "failed")
    why = guard.refusal("Bash", {"command": "./run.sh"})
    assert "The loop has ended: 2 experiments since start, as program.md's `stop` says. Do not run" in why
    assert "sum up in scratchpad.md" in why and "end your turn" in why
    session.Session(id="s", stopped=True).save()
    assert "the person said stop" in guard.refusal("Bash", {"command": "./run.sh"})
    assert not guard.refusal("Bash", {"command": "./run.sh"}, session_id="another")


DROPPED = [
    ("Bash", {"command": "./run.sh"}, {"timeout": 1}),
    ("Bash", {"command": "./run.sh", "description": "x"}, {"timeout": [None], "dangerouslyDisableSandbox": False}),
    ("Read", {"file_path": "train.py", "limit": 3}, {"pages": "1-5", "allow_large": False}),
]


@pytest.mark.parametrize(("tool", "given", "more"), DROPPED)
def test_what_changes_nothing_is_dropped_and_nothing_is_rewritten_without_need(guard, tool, given, more):
    assert guard.check(tool, given) == {}, "another hook's rewritten input would be replaced"
    assert guard.check(tool, {**given, **more}) == {"updatedInput": given}
    for key in ("run_in_background", "model", "unknown"):
        assert f"leave out {key} and call" in guard.refusal(tool, {**given, **more, key: False})
        assert guard.refusal(tool, {**given, **more, key: None})
    assert all(guard.refusal(tool, {**given, switch: True}) for switch in ("dangerouslyDisableSandbox", "allow_large"))


def test_nothing_is_dropped_from_a_call_that_is_refused(guard):
    assert "may be run" in guard.refusal("Bash", {"command": "./run.sh setup", "timeout": 1})
    assert "can be read" in guard.refusal("Read", {"file_path": "run.sh", "pages": "1"})
    assert guard.refusal("Write", {"file_path": "train.py", "content": "x", "timeout": 1})
    assert guard.refusal("Agent", {**ASK, "pages": "1"})


def test_a_plan_that_cannot_be_read_does_not_keep_run_sh_from_saying_so(guard):
    guard.plan.text = "no plan"
    assert guard.check("Bash", {"command": "./run.sh"}) == {}
    assert (guard.project.path / "runs/session/proof.s").exists()


# An edit that failed before ./run.sh: the client's transcript tells (client/test_loop.py has a real one)

NOT_FOUND = "<tool_use_error>String to replace not found in file.\nString: LR = 1</tool_use_error>"


class Transcript:
    """As the client writes it; a call is (tool, file), what came of it "" or an error; `late` is not there yet."""

    def __init__(self, guard: Guard, monkeypatch: pytest.MonkeyPatch):
        self.guard, self.file, self.count = guard, guard.project.path / "t.jsonl", 0
        self.file.write_text('{"type": "mode"}\n')
        monkeypatch.setattr(session, "LOOKS", 5)

    def line(self, **message) -> None:
        with self.file.open("a") as f:
            f.write(json.dumps({"type": "x", "message": message}, separators=(",", ":")) + "\n")

    def use(self, answer: int, name: str, late: bool = False, **given) -> str:
        self.count += 1
        block = {"type": "tool_use", "id": f"toolu_{self.count}", "name": name, "input": given}
        if not late:
            self.line(id=f"msg_{answer}", content=[block])
        return block["id"]

    def edit(self, answer: int, file: str | None, error: str | None = "", tool: str = "Edit") -> None:
        used = self.use(answer, tool, **({"file_path": file} if file else {}))
        failure = {"is_error": True, "content": error} if error else {"content": "The file has been updated."}
        if error is not None:
            self.line(content=[{"type": "tool_result", "tool_use_id": used, **failure}])

    def run(self, answer: int, late: bool = False) -> str:
        """The guard's refusal of a ./run.sh."""
        used = self.use(answer, "Bash", late, command="./run.sh")
        return self.guard.refusal("Bash", {"command": "./run.sh"}, tool_use_id=used, transcript_path=str(self.file))


@pytest.fixture
def transcript(guard, monkeypatch) -> Transcript:
    return Transcript(guard, monkeypatch)


@pytest.mark.parametrize("file", ["train.py", "/somewhere/repo/train.py", " ./scratchpad.md", None])
@pytest.mark.parametrize("answer", [1, 2])
def test_a_run_after_a_failed_edit_is_refused_once(transcript, file, answer):
    transcript.edit(1, file, NOT_FOUND)
    why = transcript.run(answer)
    name = "scratchpad.md" if file and "scratch" in file else "train.py"
    assert why.startswith("Nothing ran") and f"{name} (String to replace not found in file. String: LR = 1)" in why
    assert "tool_use_error" not in why and len(why) < 400
    assert not list((transcript.guard.project.path / "runs/session").glob("proof*"))
    assert not transcript.run(answer + 1) and not transcript.run(answer + 1)


def test_what_clears_a_failed_edit(transcript):
    transcript.edit(1, "train.py", NOT_FOUND)
    transcript.edit(2, "train.py")
    assert not transcript.run(2), "made again after it was seen"
    transcript.edit(3, "train.py", NOT_FOUND)
    transcript.edit(3, "train.py", tool="Write")
    assert "train.py" in transcript.run(3), "written in the same answer, before it was seen"
    transcript.edit(4, "train.py", NOT_FOUND)
    transcript.edit(5, "scratchpad.md")
    assert "train.py" in transcript.run(6), "another file"
    transcript.edit(7, "train.py", NOT_FOUND)
    transcript.edit(7, "scratchpad.md", NOT_FOUND, tool="Write")
    transcript.edit(8, "train.py")
    why = transcript.run(8)
    assert "scratchpad.md (" in why and "train.py (" not in why


def test_what_is_no_failed_edit(transcript):
    transcript.edit(1, "program.md", "it cannot be edited")
    transcript.edit(1, "train.py", NOT_FOUND, tool="Read")
    transcript.edit(1, "train.py")
    assert not transcript.run(2)


def test_two_runs_in_one_answer(transcript):
    """What comes after a run is none of its business, and all of the next one's."""
    transcript.edit(3, "scratchpad.md", NOT_FOUND)
    first = transcript.use(3, "Bash", command="./run.sh")
    transcript.edit(3, "train.py", NOT_FOUND)
    second = transcript.use(3, "Bash", command="./run.sh")
    asked = {"transcript_path": str(transcript.file)}
    why = [transcript.guard.refusal("Bash", {"command": "./run.sh"}, tool_use_id=i, **asked) for i in (first, second)]
    assert "of scratchpad.md" in why[0] and "train.py (" not in why[0]
    assert "of train.py" in why[1] and "scratchpad.md (" not in why[1]
    assert not transcript.run(4)


def test_a_transcript_that_is_late_damaged_or_missing_keeps_nothing_from_running(transcript):
    """And a result that is on its way is waited for."""
    asked = {"tool_use_id": "toolu_9", "transcript_path": "/nowhere"}
    assert not transcript.guard.refusal("Bash", {"command": "./run.sh"}, **asked)
    assert not transcript.guard.refusal("Bash", {"command": "./run.sh"}), "no path"
    transcript.edit(1, "train.py", NOT_FOUND)
    assert not transcript.run(1, late=True)
    transcript.file.write_text(
        '"tool_\n{"tool_"\n{"message": {"content": "tool_"}}\n{"message": {"content": ["tool_"]}}\n'
    )
    transcript.line(id=None, content=[{"type": "tool_use", "id": "a", "name": "Edit", "input": "no JSON"}])
    transcript.edit(2, "scratchpad.md", None)
    assert not transcript.run(2)
    transcript.edit(3, "train.py", None)
    transcript.edit(3, "train.py", NOT_FOUND)
    result = {"type": "tool_result", "tool_use_id": f"toolu_{transcript.count - 1}", "content": "updated"}
    threading.Timer(0.05, lambda: transcript.line(content=[result])).start()
    began = time.monotonic()
    assert "train.py" in transcript.run(3) and time.monotonic() - began > 0.04


def test_a_long_transcript_is_looked_at_from_its_end(transcript):
    transcript.edit(1, "scratchpad.md", NOT_FOUND)
    transcript.line(content=[{"type": "text", "text": '"tool_' + "x" * (8 << 20)}])
    transcript.edit(1, "train.py", NOT_FOUND)
    began, why = time.monotonic(), transcript.run(1)
    assert "of train.py" in why and "scratchpad.md" not in why and time.monotonic() - began < 0.1


# Addresses, searches, subagents


def test_addresses_of_the_phases_domains(guard):
    project = guard.project
    for n, url in enumerate(calls.FINE_URLS):
        assert guard.check("WebFetch", {"url": url, "prompt": "PRIVATE"}, tool_use_id=f"toolu_{n}") == {}
    assert web_log(project) == calls.FINE_URLS
    for url in (*calls.WRONG_URLS, *calls.BLANKS, None, ["https://arxiv.org/"], ""):
        assert "Only plain https URLs of arxiv.org, github.com" in guard.refusal("WebFetch", {"url": url}), url
    assert len(web_log(project)) == len(calls.FINE_URLS)


def test_searches_are_restricted_to_the_phases_domains(guard):
    project = guard.project
    for asked, domains in ((None, WEB), ([], WEB), (["github.com"], ["github.com"]), (WEB[::-1], WEB)):
        given = {"query": "clip", "allowed_domains": asked, "blocked_domains": ["arxiv.org"]}
        assert guard.check("WebSearch", given) == {"updatedInput": {"query": "clip", "allowed_domains": domains}}
    assert web_log(project)[-1] == "clip"
    assert all(guard.refusal("WebSearch", given) for given in calls.WRONG_SEARCHES)
    assert len(web_log(project)) == 4


def test_the_web_as_the_plan_stands_at_each_call(guard):
    """No `web`, the next phase, all phases done, a plan that cannot be read."""
    tries, plan = [("WebFetch", {"url": "https://arxiv.org/", "prompt": "x"}), ("WebSearch", {"query": "x"})], PLAN
    done = plan.replace("until: 40", "until: 0")
    for text, why in (
        (PROGRAM, "'first' has no web"),
        (done, "'second' has no web"),
        (done.replace("## Phase 2 — second\n", ""), "'none' has no web"),
        (plan.replace("budget: 120", "budget: soon"), "line 5: budget"),
    ):
        guard.plan.text = text
        assert all(why in guard.refusal(*one) for one in tries)


def test_a_request_that_cannot_be_logged_is_not_made(guard):
    project, given = guard.project, {"url": "https://arxiv.org/", "prompt": "x"}
    assert not guard.refusal("WebFetch", given) and len(web_log(project)) == 1
    web = project.path / "runs/web"
    web.rename(project.path / "runs/was")
    web.write_text("a file")
    assert "cannot be logged" in guard.refusal("WebFetch", given)
    web.unlink()
    web.symlink_to("/proc/1/nowhere")
    assert "cannot be logged" in guard.refusal("WebSearch", {"query": "clip"})
    assert "no tool_use_id" in guard.refusal("WebFetch", given, tool_use_id="..")


def test_only_the_planner_can_be_asked_and_it_only_reads(guard):
    for given in (*calls.WRONG_QUESTIONS, {**ASK, "run_in_background": True}):
        assert guard.refusal("Agent", given), given
    assert not guard.refusal("Agent", ASK)
    for inside in ({"agent_id": "a", "agent_type": "planner"}, {"agent_id": ""}, {"agent_type": "planner"}):
        for tool, given in (
            ("Agent", ASK),
            ("Bash", {"command": "./run.sh"}),
            ("Edit", {"file_path": "train.py", **EDIT}),
            ("Write", {"file_path": "scratchpad.md", "content": "x"}),
        ):
            assert "only reads" in guard.refusal(tool, given, **inside)
        assert not guard.refusal("Read", {"file_path": "train.py"}, **inside)


def test_generated_addresses_searches_and_questions(guard, figure):
    """With and without domains in the phase, of the agent and of a subagent."""
    module, logged = guard.module, []
    module.log = lambda _, text: logged.append(text)

    def no_domains():
        raise module.Denied("no web: scratchpad.md")

    passed, wrong = set(), []
    for n, (tool, given) in enumerate(fuzz.web_calls(WEB_SEED, FUZZ_CALLS)):
        domains, inside = fuzz.DOMAINS if n % 4 else [], n % 5 == 0
        module.domains_of_phase = (lambda: fuzz.DOMAINS) if domains else no_domains
        asked, before = {"agent_id": "a"} if inside else {}, len(logged)
        try:
            answer = guard.check(tool, given, **asked)
        except module.Denied as e:
            if not INSTEAD.search(str(e)) or len(logged) > before:
                wrong.append(f"{tool} {given}: {e}")
            continue
        passed.add((tool, json.dumps(given)))
        if not fuzz.allowed(tool, given, guard.root, domains) or inside and tool == "Agent":
            wrong.append(f"allowed: {tool} {given}")
        if tool == "WebSearch":
            want = [d for d in domains if d in (given.get("allowed_domains") or domains)]
            if answer != {"updatedInput": {"query": given["query"], "allowed_domains": want}}:
                wrong.append(f"{given}: {answer}")
        if logged[before:] != [given[k] for k in ("url", "query") if k in given and tool != "Agent"][:1]:
            wrong.append(f"logged {logged[before:]} for {tool} {given}")
    figure("lock: addresses, searches and subagents into the guard", FUZZ_CALLS, len(wrong), passed=len(passed))
    assert not wrong, "\n".join(wrong[:20])
    assert {tool for tool, _ in passed} == {"WebFetch", "WebSearch", "Agent"} and len(passed) >= 150, len(passed)


# Where the guard is not asked, run.sh refuses what Claude Code starts


def test_run_sh_wants_a_proof_that_the_guard_let_this_call_through(project):
    (project.path / "runs/session/x").touch()
    for ident in ("", "another", "../session/x", "./..", "x"):
        done = project.run(env={"CLAUDECODE": "1", "CLAUDE_CODE_SESSION_ID": ident})
        assert done.returncode == 2 and "its guard did not approve this call" in done.stderr, done
        assert "terminal" in done.stderr
    for words in (
        ("setup",),
        ("keep", "1"),
        ("report",),
        ("data", "prints"),
        ("night",),
        ("audit",),
        ("final",),
        ("test",),
    ):
        done = project.run(*words, env={"CLAUDECODE": "1"})
        assert done.returncode == 2 and "is for a person, in a terminal" in done.stderr, done
    assert project.run("status", env={"CLAUDECODE": "1"}).returncode == 0


# The hook's own command line: exit status 2 and "deny" keep a call from being made, nothing else does


def hook(project: Project, given: str | dict, path: str = os.environ["PATH"]) -> subprocess.CompletedProcess:
    """The command of settings.json, as the client calls it; its time-out takes a second here."""
    settings = json.loads(project.read(".claude/settings.json"))
    command = settings["hooks"]["PreToolUse"][0]["hooks"][0]["command"].replace("timeout -k 1 10 ", "timeout -k 1 1 ")
    return subprocess.run(
        ["sh", "-c", command],
        input=given.encode("latin-1") if isinstance(given, str) else json.dumps(given).encode(),
        capture_output=True,
        cwd="/",
        env={"PATH": path, "CLAUDE_PROJECT_DIR": str(project.path)},
    )


def asked(project: Project, tool: str, **given) -> dict:
    where = {"cwd": str(project.path), "session_id": "s", "tool_use_id": "toolu_1"}
    return {"tool_name": tool, "tool_input": given, **where}


def refused(done: subprocess.CompletedProcess) -> bool:
    return b'"allow"' not in done.stdout and (done.returncode == 2 or b'"deny"' in done.stdout)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "null",
        "[]",
        "1",
        "{",
        '{"tool_name": "Bash"}',
        '{"tool_name": "Bash", "tool_input": null}',
        '{"tool_name": "Bash", "tool_input": "./run.sh"}',
        '{"tool_name": ["Bash"], "tool_input": {}}',
        '{"tool_name": "Bash", "tool_input": {"command": "./run.sh"}}',
        '{"tool_name": null}',
        "\xff",
        '{"tool_name": "Read", "tool_input": {"file_path": "a\\ud800"}}',
    ],
)
def test_garbage_is_refused(trapped, given):
    assert refused(hook(trapped, given))


BROKEN_GUARDS = {
    "missing": None,
    "empty": "",
    "crashing": "raise SystemError('broken')",
    "syntax": "def (",
    "exits 0 mute": "raise SystemExit(0)",
    "exits 1": "raise SystemExit(1)",
    "garbage": "print('{\"hookSpecificOutput\": ')",
    "other answer": 'print(\'{"decision": "approve"}\')',
    "killed": "import os\nos.kill(os.getpid(), 9)",
    "hanging": "import time\ntime.sleep(1000)",
}


def test_a_damaged_guard_refuses(project):
    guard, call = project.path / ".claude/hooks/guard.py", asked(project, "Bash", command="./run.sh")
    assert b'"allow"' in hook(project, call).stdout
    for how, text in BROKEN_GUARDS.items():
        guard.unlink() if text is None else guard.write_text(text)
        assert hook(project, call).returncode == 2, how


def test_without_python_nothing_passes(project, tmp_path):
    """As on a machine without one: the hook looks where the system's is first, so that is taken from it here."""
    project.edit("PATH=/usr/local/bin:/usr/bin:/bin:$PATH ", "", ".claude/settings.json")
    (tmp_path / "bin").mkdir()
    for name in ("sh", "timeout"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    for call in (asked(project, "Bash", command="./run.sh"), asked(project, "Read", file_path="train.py")):
        assert hook(project, call, str(tmp_path / "bin")).returncode == 2


def test_its_answers_are_what_the_client_reads(project):
    allowed = json.loads(hook(project, asked(project, "Bash", command="./run.sh", description="x")).stdout)
    decision = allowed["hookSpecificOutput"]
    assert (decision["hookEventName"], decision["permissionDecision"]) == ("PreToolUse", "allow")
    assert "updatedInput" not in decision, "another hook's would replace it, or it another hook's"
    assert (project.path / "runs/session/proof.s").exists()
    refusal = json.loads(hook(project, asked(project, "Bash", command="id")).stdout)["hookSpecificOutput"]
    assert refusal["permissionDecision"] == "deny" and ABILITIES.search(refusal["permissionDecisionReason"])


def test_other_calls_do_not_pay_for_the_web(project):
    """The record is read for a web request alone."""

    def seconds(tool: str, **given) -> float:
        began = time.monotonic()
        assert b'"allow"' in hook(project, asked(project, tool, **given)).stdout
        return time.monotonic() - began

    read = min(seconds("Read", file_path="train.py") for _ in range(5))
    print(f"Read {read * 1000:.0f} ms, WebSearch {seconds('WebSearch', query='clip') * 1000:.0f} ms")
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); sys.stderr.write(repr(list(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", code, project.path / ".claude/hooks/guard.py"],
        input=json.dumps(asked(project, "Read", file_path="train.py")),
        capture_output=True,
        text=True,
    )
    assert '"allow"' in loaded.stdout and "'record'" not in loaded.stderr and "'subprocess'" not in loaded.stderr
