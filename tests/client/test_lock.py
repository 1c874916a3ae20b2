"""The lock: what Claude Code may do here, tried with the real client against every way round it that came to mind.

One process of the client for each configuration is handed all calls in one conversation. Each call is one of the three
abilities and did its job, or was refused with a reason; afterwards the project, .git and HOME are what they were.
unit/test_guard.py tries the guard alone, with more calls.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import sys
from pathlib import Path

import pytest

import fuzz
from calls import ABILITIES, Case, abilities, refused, set_traps
from client import Conversation, call, say
from repository import ROOT, Project

FUZZ_SEED, CLIENT_CALLS, CLIENT_SAMPLE = 20265, 480, 120
CLIENTS_OWN_REFUSAL = "<tool_use_error>"  # input it rejects before it asks any hook
CLIENTS_OWN_FILES = re.compile(  # what the client keeps in HOME for itself, whatever the model asks
    r"\.claude\.json|\.claude/(backups/\.claude\.json\.backup\.\d+|projects/[^/]+/[0-9a-f-]{36}(/subagents/agent-\w+)?(\.jsonl|\.meta\.json)"
    r"|plugins/store/[\w-]+\.json|session-env/[0-9a-f-]{36}|shell-snapshots/snapshot-bash-[\w-]+\.sh"
    r"|file-history/[0-9a-f-]{36}/[0-9a-f]+@v\d+|sessions/\d+\.json|\.last-cleanup)"
    r"|\.cache/claude-cli-nodejs/[\w-]+/mcp-logs-notes/[\w-]+\.jsonl|\.config/git/ignore"
)
NOTHING = re.compile("(?!)")
STUB = """#!/bin/bash
printf '%s|%s|%s\\n' "$(cd runs/session && rm -v "proof.$CLAUDE_CODE_SESSION_ID")" "$PWD" "$*" | tee -a {log}
"""
MCP_SERVER = """
import json, sys
ANSWERS = {
    "initialize": {"protocolVersion": "2024-11-05", "capabilities": {"tools": {}},
                   "serverInfo": {"name": "notes", "version": "1"}},
    "tools/list": {"tools": [{"name": "write", "description": "write", "inputSchema": {"type": "object"}}]},
    "tools/call": {"content": [{"type": "text", "text": "written"}]},
}
for line in sys.stdin:
    asked = json.loads(line)
    answer = ANSWERS.get(asked["method"], {})
    if "id" in asked:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": answer}), flush=True)
"""
EVERYTHING = [
    "Bash",
    "Edit",
    "Write",
    "Read",
    "NotebookEdit",
    "WebFetch",
    "WebSearch",
    "Agent",
    "Skill",
    "Workflow",
    "Monitor",
    "EnterWorktree",
    "CronCreate",
    "ToolSearch",
    "mcp__notes__write",
]


# The ground they are tried on


def tree(folder: Path) -> dict[str, tuple]:
    """Every file, folder and link under it: kind and mode, and content. Not what Python keeps of its modules."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts):
        st = path.lstat()
        if stat.S_ISLNK(st.st_mode):
            content = str(path.readlink())
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(st.st_mode) else ""
        found[str(path.relative_to(folder))] = (oct(st.st_mode), content)
    return found


def changes(before: dict, after: dict, but: re.Pattern) -> list[str]:
    """Paths that differ; a folder is no change when all that changed in it is excused by `but`."""
    return [
        p
        for p in sorted(before.keys() | after.keys())
        if before.get(p) != after.get(p) and not but.fullmatch(p) and not after.get(p, ("",))[0].startswith("0o4")
    ]


class Ground:
    """A project with traps in it, a HOME and a folder outside. Its run.sh notes how it was called."""

    def __init__(self, project: Project, tmp_path: Path):
        self.path, self.home, self.out = project.path, tmp_path / "home", tmp_path / "out"
        self.log = tmp_path / "runs.log"
        self.log.touch()
        project.write("run.sh", STUB.format(log=self.log))
        set_traps(self.path, self.out)
        (self.out / "mcp.py").write_text(MCP_SERVER)
        project.git("add", "-A")  # so that what the control does with git finds nothing to undo
        project.git("commit", "-qm", "the ground")
        server = {"command": sys.executable, "args": [str(self.out / "mcp.py")]}
        self.mcp = json.dumps({"mcpServers": {"notes": server}})

    def settings(self, change) -> None:
        file = self.path / ".claude/settings.json"
        settings = json.loads(file.read_text())
        change(settings)
        file.write_text(json.dumps(settings))

    def talk(self, cases: list[Case], timeout: float = 600, **kw) -> tuple[Conversation, list]:
        """All calls, 60 a turn. Returns the results in the order of the calls."""
        turns = [[call(c.tool, **c.given) for c in cases[i : i + 60]] for i in range(0, len(cases), 60)]
        talk = Conversation(self.path, self.home, turns, **kw).run("hello", timeout=timeout)
        results = sorted(talk.model.results, key=lambda r: r.id)  # Reads of one turn run side by side
        assert [r.given for r in results] == [c.given for c in cases]
        return talk, results


@pytest.fixture
def ground(made_up, tmp_path) -> Ground:
    return Ground(made_up, tmp_path)


def open_wide(settings: dict) -> None:
    """Settings in which nothing but the hook stands: every tool offered, no mode but bypass."""
    del settings["agent"]
    settings["permissions"] = {"allow": EVERYTHING}


# What the conversation is started with
CONFIGURATIONS = {
    "plain": {},
    "user-widened": {
        "trusted": True,
        "user": {"permissions": {"allow": EVERYTHING, "defaultMode": "bypassPermissions"}},
    },
    "local-widened": {"trusted": True, "local": {"permissions": {"allow": EVERYTHING, "defaultMode": "acceptEdits"}}},
    "bypass": {"trusted": True, "args": ["--dangerously-skip-permissions"], "env": {"IS_SANDBOX": "1"}},
}
BYPASS = CONFIGURATIONS["bypass"]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_only_the_three_abilities(ground, name, figure, sample):
    options = {**CONFIGURATIONS[name]}
    fine, cases = abilities(ground.path), refused(ground.path, ground.home, ground.out)
    if name == "bypass":
        ground.settings(open_wide)
        options["args"] = [*options["args"], "--mcp-config", ground.mcp]
    else:  # where only the hook stands, all of them; otherwise some, others each time
        cases = sample(cases[list(CONFIGURATIONS).index(name) :: 3], 60)
    cases = [*(case for case in fine if name in ("plain", "bypass") or case.tool == "Bash"), *cases]
    if local := options.pop("local", None):
        (ground.path / ".claude/settings.local.json").write_text(json.dumps(local))
    before = tree(ground.path), tree(ground.out)

    talk, results = ground.talk(cases, **options)

    pairs = list(zip(cases, results))
    wrong = [f"{case}: {result.content[:200]}" for case, result in pairs if case.ability == result.is_error]
    count = sum(case.ability for case in cases)
    figure(f"lock: written calls through the client, {name}", len(cases), len(wrong), abilities=count)
    assert not wrong, "\n".join(wrong)
    by_guard = [(c, r.content) for c, r in pairs if r.is_error and CLIENTS_OWN_REFUSAL not in r.content]
    mute = [f"{case}: {reason[:200]}" for case, reason in by_guard if not ABILITIES.search(reason)]
    assert not mute, "refused without saying what to do instead:\n" + "\n".join(mute)
    assert len(by_guard) >= (len(cases) - count) * 2 // 3, f"only {len(by_guard)} calls reached the guard"

    # The abilities did their jobs ...
    runs = ground.log.read_text().splitlines()
    count_runs = sum(c.ability and c.tool == "Bash" for c in cases)
    one = f"removed 'proof.{talk.id}'|{ground.path}|"
    assert runs == [one] * count_runs, "each with its own proof, no arguments, in the right folder"
    if count == len(fine):
        train, pad = (ground.path / name for name in ("train.py", "scratchpad.md"))
        assert train.read_text() == "# lock: 0\n# train.py 3\n# train.py 2\n# train.py 1\n# twice\n# twice\n"
        assert pad.read_text() == "# lock: 0\n# scratchpad.md 5\n# scratchpad.md 4\n"
    assert all(r.content for c, r in pairs if c.ability)
    # ... and nothing else happened.
    own = re.compile(rf"train\.py|scratchpad\.md|runs/session/{talk.id}\.json")
    assert not changes(before[0], tree(ground.path), own)
    assert not changes(before[1], tree(ground.out), NOTHING)
    assert at_home(ground) == ([".claude/settings.json"] if "user" in options else [])


def at_home(ground: Ground) -> list[str]:
    """Files in HOME that are not the client's own."""
    files = [name for name, (mode, _) in tree(ground.home).items() if mode.startswith("0o1")]
    return [name for name in files if not CLIENTS_OWN_FILES.fullmatch(name)]


def test_without_the_lock_the_same_calls_do_something(ground, sample):
    """Positive control: a refusal above means something only where the call would have worked."""
    ground.settings(lambda s: (s.clear(), s.update(env={"CLAUDE_BASH_MAINTAIN_PROJECT_WORKING_DIR": "1"})))
    shutil.rmtree(ground.path / ".claude/agents")
    order = {"Read": 0, "Bash": 1}
    harmless = [case for case in refused(ground.path, ground.home, ground.out) if case.control]
    cases = sorted(sample(harmless, 200), key=lambda c: order.get(c.tool, 2))
    before = tree(ground.path)
    args = [*BYPASS["args"], "--mcp-config", ground.mcp]
    _, results = ground.talk(cases, **{**BYPASS, "args": args})
    worked = [c for c, r in zip(cases, results) if not r.is_error]
    counts = {tool: sum(c.tool == tool for c in worked) for tool in ("Read", "Bash", "Edit", "Write")}
    runs = len(ground.log.read_text().splitlines())
    changed = changes(before, tree(ground.path), NOTHING)
    seen = f"{len(worked)} of {len(cases)} worked: {counts}; {runs} runs, {len(changed)} files changed"
    print(seen)
    assert len(worked) >= 0.6 * len(cases), seen
    assert counts["Read"] >= 10 and counts["Bash"] >= 60 and counts["Edit"] + counts["Write"] >= 25, seen
    assert len(worked) - sum(counts.values()) >= 4, seen  # other tools
    assert runs >= 20 and len(changed) >= 25, seen


# The permission rules of settings.json alone: a second layer, for a guard that is switched off

# The client takes files whose names differ in case for the same one. A worktree is made, by git, for a planner whose
# call asks for one, and removed
WRITTEN = re.compile(r"train\.py|scratchpad\.md|\.git/(FETCH_HEAD|packed-refs)", re.I)
KEPT_SECRET = re.compile(r"this is (data|runs/session)/|^(\d+\t)?secret$|root:x:0", re.M)


@pytest.mark.parametrize("trusted", [True, False])
def test_what_the_rules_alone_hold(ground, trusted, figure, sample):
    """No file is written but the two, no secret is read, no tool is used but the four that there are."""
    harmless = [case for case in refused(ground.path, ground.home, ground.out) if case.control or case.tool != "Bash"]
    harmless = harmless if trusted else sample(harmless, 150)
    cases = abilities(ground.path) + harmless
    before = tree(ground.path), tree(ground.out)
    _, results = ground.talk(cases, trusted=trusted, args=["--settings", '{"disableAllHooks": true}'])

    pairs = list(zip(cases, results))
    ran = [(case, result) for case, result in pairs if not case.ability and not result.is_error]
    used = {tool: sum(case.tool == tool for case, _ in ran) for tool in sorted({case.tool for case, _ in ran})}
    written = changes(before[0], tree(ground.path), WRITTEN) + changes(before[1], tree(ground.out), NOTHING)
    shown = [str(case) for case, result in ran if KEPT_SECRET.search(result.content)]
    wrong = [*written, *shown, *at_home(ground), *(used.keys() - {"Bash", "Read", "Write", "Edit", "Agent"})]
    title = f"lock: rules alone, {'trusted' if trusted else 'not trusted'}"
    figure(title, len(harmless), len(wrong), ran=len(ran), **{f"of {tool}": n for tool, n in used.items()})
    assert not wrong, wrong
    assert all(WRITTEN.fullmatch(case.given["file_path"]) for case, _ in ran if case.tool in ("Write", "Edit"))
    assert len(ran) <= (75 if trusted else 35), "\n".join(str(case) for case, _ in ran)
    denied = [str(case) for case, result in pairs if case.ability and result.is_error]
    assert not denied if trusted else len(denied) > 20, denied  # a folder that is not trusted allows nothing itself


# When the lock itself is damaged

BROKEN_GUARDS = {  # unit/test_guard.py has more
    "missing": None,
    "crashing": "raise SystemError('broken')",
    "exits 0 mute": "raise SystemExit(0)",
    "garbage": "print('{\"hookSpecificOutput\": ')",
    "hanging": "import time\ntime.sleep(1000)",
}


def test_a_damaged_guard_lets_nothing_through(ground):
    """In the widest configuration, where nothing but the guard says no; the guard changes within one conversation."""
    ground.settings(open_wide)
    settings = ground.path / ".claude/settings.json"
    settings.write_text(settings.read_text().replace("timeout -k 1 10 ", "timeout -k 1 1 "))
    guard = ground.path / ".claude/hooks/guard.py"
    intact = guard.read_text()
    one = [call("Bash", command="touch escaped")]
    tries = [
        *one,
        call("Write", file_path="escaped", content="x"),
        call("Read", file_path=".claude/settings.json"),
        call("Agent", description="x", prompt="SUBAGENT", subagent_type="general-purpose"),
        call("Bash", command="./run.sh"),
    ]
    seen = {}

    def script():
        for how, text in BROKEN_GUARDS.items():
            guard.unlink() if text is None else guard.write_text(text)
            before = len(talk.model.results)
            yield one if how == "hanging" else tries  # each call waits for the guard's time-out
            seen[how] = [r.is_error for r in talk.model.results[before:]]
        guard.write_text(intact)
        guard.chmod(0)  # root can read it all the same, and then it is an intact guard
        yield tries[:-1]
        guard.chmod(0o755)
        yield tries
        yield say("done")

    turns = script()
    talk = Conversation(ground.path, ground.home, lambda shown: next(turns), **BYPASS)
    results = talk.run("hello").model.results
    assert {how for how, errors in seen.items() if errors and all(errors)} == set(BROKEN_GUARDS), seen
    assert [r.is_error for r in results[-9:]] == [True] * 8 + [False], results[-9:]
    assert not (ground.path / "escaped").exists() and len(ground.log.read_text().splitlines()) == 1


def test_settings_written_while_it_runs_do_not_take_the_lock_off(ground):
    (ground.path / "run.sh").write_text(
        "#!/bin/bash\n"
        'echo \'{"disableAllHooks": true, "permissions": {"allow": ["Bash"]}}\' > .claude/settings.local.json\n'
        "sleep 2\n"
    )
    script = [
        call("Bash", command="./run.sh"),
        call("Bash", command="touch escaped"),
        call("Write", file_path="escaped", content="x"),
        call("Bash", command="./run.sh"),
        call("Bash", command="touch escaped"),
    ]
    results = Conversation(ground.path, ground.home, script, trusted=True).run("start").model.results
    assert [r.is_error for r in results] == [False, True, True, False, True], results
    assert (ground.path / ".claude/settings.local.json").exists() and not (ground.path / "escaped").exists()


# When the hooks are off

OFF = {
    "disabled in local settings": {"local": {"disableAllHooks": True}},
    "disabled on the command line": {"args": ["--settings", '{"disableAllHooks": true}']},
    "user settings only": {"args": ["--setting-sources", "user"]},
    "started in a subfolder": {"subfolder": "container"},
}
PROOFLESS = "its guard did not approve this call"


@pytest.mark.parametrize("how", OFF)
def test_without_hooks_run_sh_refuses_claude_code(made_up, home, how):
    options = {"args": (), **OFF[how]}
    script = made_up.path / "run.sh"
    made_up.write("train.py", "VALUE = 1\n")
    made_up.hypothesis("a change that only a person may run here")
    before = tree(made_up.path)
    tries = [
        f"{script}",
        f"CLAUDE_CODE_SESSION_ID=another {script}",
        f"{script} setup",
        f"{script} status",
    ]
    options["args"] = [*options["args"], "--allowedTools", "Bash"]
    calls = [call("Bash", command=c) for c in tries]
    talk = Conversation(made_up.path, home, [calls], trusted=True, **options).run("hello")
    results = sorted(talk.model.results, key=lambda r: r.id)
    assert [r.is_error for r in results] == [True] * 3 + [False], results
    assert all(PROOFLESS in r.content and "terminal" in r.content for r in results[:2]), results
    assert "is for a person, in a terminal" in results[2].content, results
    assert not changes(before, tree(made_up.path), re.compile(r"\.claude/settings\.local\.json"))


# A person's own settings

BENDING = {
    "agent": "general-purpose",
    "autoCompactEnabled": False,
    "cleanupPeriodDays": 0,
    "disableAllHooks": True,
    "outputStyle": "Learning",
    "permissions": {"defaultMode": "plan"},
    "sandbox": {"enabled": True, "failIfUnavailable": True},
    "statusLine": {"type": "command", "command": "date"},
    "env": {
        "BASH_DEFAULT_TIMEOUT_MS": "100",
        "BASH_MAX_OUTPUT_LENGTH": "200",
        "CLAUDE_BASH_MAINTAIN_PROJECT_WORKING_DIR": "0",
        "CLAUDE_CODE_DISABLE_CLAUDE_MDS": "1",
        "CLAUDE_CODE_SHELL_PREFIX": "/usr/bin/nice",
        "CLAUDE_CODE_SKIP_PROMPT_HISTORY": "1",
        "DISABLE_COMPACT": "1",
        "LANG": "de_DE.ISO-8859-1",
        "PYTHONHOME": "/nonexistent",
        "TZ": "Asia/Tokyo",
    },
}


def test_what_a_persons_settings_would_bend_is_pinned(quick, tmp_path):
    """All of it at once: the request is the same as without, the result is whole, the transcript is there."""
    talks = []
    for name, user in (("plain", {}), ("bent", BENDING)):
        script = [call("Bash", command="./run.sh"), say("noted")]
        talks.append(Conversation(quick.path, tmp_path / name, script, trusted=True, user=user).run("hello"))
        assert len(list((tmp_path / name).glob(".claude/projects/*/*.jsonl"))) == 1
    plain, bent = (talk.model.requests[0] for talk in talks)
    assert (bent.system, bent.tools) == (plain.system, plain.tools) and "How you work here" in json.dumps(bent.body)
    assert abs(bent.messages - plain.messages) < 300, "the brief of one more experiment"
    assert "Learning" not in json.dumps(bent.body)
    (result,) = talks[1].model.results
    assert result.content.startswith("---\n") and "next:" in result.content, result


REWRITE = """python3 -c 'import json, sys, time
given = json.load(sys.stdin)["tool_input"]
time.sleep({seconds})
given["command"] = given["command"].replace("./run.sh", "{command}")
decision = {{"hookEventName": "PreToolUse", "permissionDecision": "allow", "updatedInput": given}}
print(json.dumps({{"hookSpecificOutput": decision}}))'
"""


@pytest.mark.parametrize(("seconds", "command"), [(0, "nice ./run.sh"), (1, "nice ./run.sh"), (1, "bash -c ./run.sh")])
def test_another_hook_that_rewrites_the_command(quick, home, seconds, command):
    hook = {"type": "command", "command": REWRITE.format(seconds=seconds, command=command)}
    user = {"hooks": {"PreToolUse": [{"matcher": "Bash", "hooks": [hook]}]}}
    script = [call("Bash", command="./run.sh"), call("Bash", command="id"), call("Bash", command="./run.sh"), say("x")]
    results = Conversation(quick.path, home, script, trusted=True, user=user).run("hello").model.results
    assert [r.is_error for r in results] == [False, True, False], results
    assert len(quick.experiments()) == 1 + 2


RULES = [
    {"ask": ["Bash"]},
    {"deny": ["Bash(./run.sh:*)"]},
    {"ask": ["Edit"]},
    {"deny": ["Read(./train.py)"]},
]


@pytest.mark.parametrize("rules", RULES)
def test_rules_that_deny_the_agents_calls_are_named(quick, home, rules):
    """Nothing of the project can allow what they deny; but person and agent are told which, and where."""
    script = [
        call("Bash", command="./run.sh"),
        call("Read", file_path="train.py"),
        call("Edit", file_path="scratchpad.md", old_string="idea", new_string="thought"),
    ]
    talk = Conversation(quick.path, home, script, trusted=True, user={"permissions": rules}).run("hello")
    ((kind, (rule,)),) = rules.items()
    assert any(r.is_error for r in talk.model.results), "a rule that does no harm"
    named = f"{home}/.claude/settings.json: permissions.{kind} {rule} denies calls that the agent needs"
    assert named in talk.model.requests[0].shown.text and named in talk.told


# Generated calls


def test_generated_calls(ground, figure, sample):
    """Through the real client, where nothing but the guard says no; unit/test_guard.py has more."""
    ground.settings(open_wide)
    generated = [c for c in fuzz.calls(FUZZ_SEED, str(ground.path), CLIENT_CALLS) if not unsendable(c)]
    cases = [Case(tool, given) for tool, given in sample(generated, CLIENT_SAMPLE)]
    before = tree(ground.path), tree(ground.out)
    _, results = ground.talk(cases, timeout=1800, **BYPASS)
    passed = [(c, r) for c, r in zip(cases, results) if not r.is_error]
    wrong = [str(c) for c, _ in passed if not fuzz.allowed(c.tool, c.given, str(ground.path))]
    by_guard = sum(r.is_error and CLIENTS_OWN_REFUSAL not in r.content for r in results)
    own = re.compile(r"train\.py|scratchpad\.md|runs/session/[0-9a-f-]{36}\.json")
    changed = changes(before[0], tree(ground.path), own) + changes(before[1], tree(ground.out), NOTHING)
    seen = f"{len(cases)} calls, {len(passed)} passed, {by_guard} refused by the guard"
    figure("lock: generated calls through the client", len(cases), len(wrong), passed=len(passed), guard=by_guard)
    assert not wrong and not changed, f"{seen}; allowed: {wrong[:20]}; changed: {changed}"
    runs = [line.split("|") for line in ground.log.read_text().splitlines()]
    assert all(pwd == str(ground.path) and not args for _, pwd, args in runs), runs
    assert len(passed) >= 3 and by_guard >= len(cases) // 3, seen


def unsendable(case: tuple[str, dict]) -> bool:
    """Lone surrogates, which no JSON on the wire can carry."""
    return "\\ud8" in json.dumps(case)


# The first request


def test_the_first_request_is_small(made_up, home):
    """With the plan that ships and the brief of a record and of the data; web and planner are about 5 KB of it."""
    shutil.copy(ROOT / "program.md", made_up.path / "program.md")
    request = Conversation(made_up.path, home, [say("hello")]).run("start").model.requests[0]
    told = "\n".join(request.shown.texts)
    assert "## Settings" in told and "./run.sh" in told and "The loop is on" in told
    own = {"Bash", "Edit", "Write", "Read", "WebFetch", "WebSearch", "Agent"}
    assert own <= set(request.names) <= own | {"DeferredToolPlaceholder"}
    sizes = f"{request.size} bytes: system {request.system}, tools {request.tools}, messages {request.messages}"
    print(sizes)
    assert request.size <= 24_000, sizes
