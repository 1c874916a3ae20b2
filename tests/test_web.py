"""The web where the plan allows it, and the planner: what passes, what leaves this machine, what is written down.

The real client talks to a scripted model, and its WebFetch to an internet on loopback (tests/internet.py).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import fuzz
import pytest
from client import Conversation, Shown, call, say
from conftest import Project, copy_of_the_repository
from internet import Internet

WEB = ["arxiv.org", "github.com"]
WEB_SEED, WEB_CALLS = 20265, 20_000
INSTEAD = re.compile(r"\./run\.sh|train\.py|scratchpad\.md|tell the person")  # every refusal says what to do instead
LOGGED = re.compile(r"[0-9]{20}\.toolu_\d+")
ASK = call("Agent", description="plan", prompt="What next?", subagent_type="planner")


def set_web(project: Project, domains: list[str]) -> None:
    plan = re.sub(r"^web: .*\n", "", project.read("program.md"), flags=re.M)
    line = f"until: 40 experiments\nweb: {', '.join(domains)}\n" if domains else "until: 40 experiments\n"
    project.write("program.md", plan.replace("until: 40 experiments\n", line))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """The repository, its first phase with web; nothing is trained here."""
    made = copy_of_the_repository(tmp_path / "repo")
    set_web(made, WEB)
    return made


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def web_log(project: Project) -> list[list[str]]:
    """What run.sh will find, in order: time, tool, characters, text."""
    files = sorted((project.path / "runs/web").glob("*"))
    assert all(LOGGED.fullmatch(f.name) for f in files), files
    lines = [f.read_text() for f in files]
    assert all(x.endswith("\n") and x.count("\n") == 1 for x in lines), lines
    return [x.rstrip("\n").split("\t") for x in lines]


def in_order(talk: Conversation) -> list:
    return sorted(talk.model.results, key=lambda r: r.id)


def ask_guard(project: Project, tool: str, given: dict, **more) -> dict:
    """The guard as the client calls it; its decision."""
    asked = {
        "tool_name": tool,
        "tool_input": given,
        "cwd": str(project.path),
        "session_id": "s",
        "tool_use_id": "toolu_1",
    }
    done = subprocess.run(
        [sys.executable, "-I", project.path / ".claude/hooks/guard.py"],
        input=json.dumps({**asked, **more}),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["hookSpecificOutput"]


def denied(project: Project, tool: str, given: dict, **more) -> str:
    """The reason, which says what to do instead."""
    answer = ask_guard(project, tool, given, **more)
    assert answer["permissionDecision"] == "deny", (tool, given)
    assert INSTEAD.search(answer["permissionDecisionReason"]), answer
    return answer["permissionDecisionReason"]


# --- which addresses -------------------------------------------------------------------------------------------------

FINE = """
https://arxiv.org
https://arxiv.org/
https://arxiv.org/abs/2403.10153
https://arxiv.org/list/cs.CV/recent?skip=0&show=50#top
https://export.arxiv.org/api/query?search_query=all:%22clip%22
https://github.com/mlfoundations/open_clip/blob/main/README.md
https://gist.github.com/@evil.com//evil.com/
https://www.arxiv.org/a:443
"""
WRONG = """
http://arxiv.org/
HTTPS://arxiv.org/
https://ARXIV.org/
https://arxiv.org:443/
https://arxiv.org:8443/
https://arxiv.org:/
https://arxiv.org./
https://evil-arxiv.org/
https://arxiv.org.evil.com/
https://arxiv.org@evil.com/
https://evil.com@arxiv.org/
https://user:password@arxiv.org/
https://evil.com/arxiv.org
https://evil.com?x=.arxiv.org
https://evil.com#.arxiv.org
https://evil.com\\.arxiv.org/
https://arxiv.org\\@evil.com/
https:\\\\arxiv.org/
https://arxiv.org%2eevil.com/
https://arxiv%2Eorg/
https://arxiv.org/\u202e
https://\u0430rxiv.org/
https://arxiv\u3002org/
https://xn--rxiv-3ve.org/
https://xn--a.arxiv.org/
https://127.0.0.1/
https://2130706433/
https://0x7f000001/
https://0x7f.1/
https://0177.0.0.1/
https://[::1]/
https://[::ffff:a9fe:a9fe]/
https://169.254.169.254/latest/meta-data/
https://localhost/
https://org/
https:arxiv.org/
https:///arxiv.org/
//arxiv.org/
arxiv.org
data:text/html,arxiv.org
file:///etc/passwd
ftp://arxiv.org/
javascript:fetch('https://arxiv.org/')
view-source:https://arxiv.org/
https://a_b.arxiv.org/
https://-.arxiv.org/
https://arxiv.org/<x>
https://arxiv.org/a b
https://arxiv.org/a|b
"""
LONG = ["https://arxiv.org/" + "x" * 482, "https://arxiv.org/" + "x" * 483]
BLANKS = ["https://arxiv.org/\n", "https://arxiv.org/\t", " https://arxiv.org/", "\ufeffhttps://arxiv.org/"]
BLANKS += ["https://arxiv\t.org/"]


def test_the_client_fetches_these_and_no_others(project, home, tmp_path):
    """Every address in one conversation. What the sites were asked is what the guard let through and wrote down.

    The client takes blanks out of an address before it asks the guard, and fetches what it asked about.
    """
    wrong = [*WRONG.strip("\n").split("\n"), LONG[1], "https://arxiv.org\x00/", "https://arxiv.org\n.evil.com/"]
    fine = [*FINE.split(), LONG[0], *BLANKS]
    internet = Internet(
        tmp_path / "internet", ["arxiv.org", "*.arxiv.org", "github.com", "*.github.com", "evil.com"], {}
    )
    tries = [call("WebFetch", url=url, prompt="PRIVATE: what is it?") for url in [*fine, *wrong]]
    talk = Conversation(project.path, home, [tries], env=internet.env).run("hello")
    results = in_order(talk)
    assert [r.given["url"] for r in results if not r.is_error] == fine, [r for r in results if not r.is_error]
    fine = [re.sub("[\n\t \ufeff]", "", url) for url in fine]
    assert all(INSTEAD.search(r.content) or "<tool_use_error>" in r.content for r in results if r.is_error)
    assert sum(INSTEAD.search(r.content) is not None for r in results if r.is_error) >= 25
    plain = {u.partition("#")[0] for u in fine}
    assert internet.urls == {u + "/" * (u.count("/") == 2) for u in plain}
    assert sorted(row[3] for row in web_log(project)) == sorted(fine)
    assert all([row[1], row[2]] == ["WebFetch", str(len(row[3]))] for row in web_log(project))
    # the prompt goes to the model with the page, not to the site
    assert not any("PRIVATE" in asked for asked in internet.asked)
    assert any(
        "PRIVATE" in json.dumps(b) and "<h1>" not in json.dumps(b) and not b.get("tools") for b in talk.model.bodies
    )


def test_what_a_page_redirects_to_is_a_new_call(project, home, tmp_path):
    """The client follows on the same host alone, "www." aside; anything else comes back, and to the guard."""
    site = "https://arxiv.org"
    followed = {f"{site}/same": "/page", f"{site}/www": "https://www.arxiv.org/page"}
    returned = {
        f"{site}/evil": "https://evil.com/?q=secret",
        f"{site}/sub": "https://export.arxiv.org/page",
        f"{site}/http": "http://arxiv.org/page",
        f"{site}/port": "https://arxiv.org:8443/page",
        f"{site}/address": "https://127.0.0.1/page",
    }
    hosts = ["arxiv.org", "*.arxiv.org", "evil.com"]
    internet = Internet(tmp_path / "internet", hosts, {**followed, **returned})
    first = [call("WebFetch", url=url, prompt="x") for url in (*followed, *returned)]
    then = [call("WebFetch", url=url, prompt="x") for url in returned.values()]
    talk = Conversation(project.path, home, [first, then], env=internet.env).run("hello")
    results = in_order(talk)
    assert not any(r.is_error for r in results[: len(first)])
    told = [r.given["url"] for r in results[: len(first)] if "REDIRECT DETECTED" in r.content]
    assert told == list(returned), told
    assert [r.given["url"] for r in results[len(first) :] if not r.is_error] == ["https://export.arxiv.org/page"]
    pages = {f"{site}/page", "https://www.arxiv.org/page", "https://export.arxiv.org/page"}
    assert internet.urls == {*followed, *returned, *pages}


def test_a_search_asks_for_the_phases_domains(project, home):
    """As the model's provider is asked by the client itself, whatever the agent wrote."""
    wanted = [
        ({"query": "clip heatmap"}, WEB),
        ({"query": "clip", "allowed_domains": ["github.com"]}, ["github.com"]),
        ({"query": "clip", "allowed_domains": []}, WEB),
        ({"query": "clip", "blocked_domains": ["arxiv.org"]}, WEB),
        ({"query": "q" * 300}, WEB),
    ]
    wrong = [
        {"query": "clip", "allowed_domains": ["evil.com"]},
        {"query": "clip", "allowed_domains": ["arxiv.org", "evil.com"]},
        {"query": "clip", "allowed_domains": ["arxiv.org/evil"]},
        {"query": "q" * 301},
        {"query": "clip\x1b[2J"},
        {"query": "clip\nheatmap"},
        {"query": "clip\u200b"},
    ]
    tries = [[call("WebSearch", **given)] for given in [*(g for g, _ in wanted), *wrong]]
    talk = Conversation(project.path, home, tries).run("hello")
    assert [r.is_error for r in in_order(talk)] == [False] * len(wanted) + [True] * len(wrong), talk.model.results
    searches = [b for b in talk.model.bodies if any("web_search" in t.get("type", "") for t in b.get("tools", []))]
    assert [b["tools"][0]["allowed_domains"] for b in searches] == [domains for _, domains in wanted]
    assert all(len(b["tools"]) == 1 and "blocked_domains" not in b["tools"][0] for b in searches)
    assert [g["query"] in json.dumps(b["messages"]) for (g, _), b in zip(wanted, searches)] == [True] * len(wanted)
    assert [row[1:] for row in web_log(project)] == [["WebSearch", str(len(g["query"])), g["query"]] for g, _ in wanted]


def test_without_web_in_the_phase_nothing_is_fetched(project, home, tmp_path):
    """As the plan stands at each call: no `web`, the next phase, all phases done, a plan that cannot be read."""
    internet = Internet(tmp_path / "internet", ["arxiv.org"], {})
    tries = [call("WebFetch", url="https://arxiv.org/abs/1", prompt="x"), call("WebSearch", query="clip")]
    plan = project.read("program.md")

    def script():
        set_web(project, [])
        yield tries
        project.write("program.md", plan.replace("until: 40", "until: 0"))  # the second phase has none
        yield tries
        project.write("program.md", plan.replace("until: 40", "until: 0").replace("## Phase 2 — second\n", ""))
        yield tries
        project.write("program.md", plan.replace("budget: 120", "budget: soon"))
        yield tries
        (project.path / "program.md").unlink()
        yield tries
        project.write("program.md", plan)
        yield tries
        yield say("done")

    steps = script()
    # a planted variable must not name another plan
    (tmp_path / "plan.md").write_text(plan)
    env = {**internet.env, "AR_PLAN": str(tmp_path / "plan.md")}
    talk = Conversation(project.path, home, lambda shown: next(steps), env=env).run("hello")
    results = in_order(talk)
    assert [r.is_error for r in results] == [True] * 10 + [False] * 2, results
    for n, why in enumerate(
        ["'first' has no web", "'second' has no web", "'none' has no web", "line 5: budget", "program.md"]
    ):
        assert all(why in r.content and INSTEAD.search(r.content) for r in results[2 * n : 2 * n + 2]), (why, results)
    assert internet.urls == {"https://arxiv.org/abs/1"} and len(web_log(project)) == 2


def test_a_request_that_cannot_be_logged_is_not_made(project):
    given = {"url": "https://arxiv.org/", "prompt": "x"}
    assert ask_guard(project, "WebFetch", given)["permissionDecision"] == "allow" and len(web_log(project)) == 1
    web = project.path / "runs/web"
    web.rename(project.path / "runs/was")
    web.write_text("a file")
    assert "cannot be logged" in denied(project, "WebFetch", given)
    web.unlink()
    web.symlink_to("/proc/1/nowhere")
    assert "cannot be logged" in denied(project, "WebSearch", {"query": "clip"})
    assert "no tool_use_id" in denied(project, "WebFetch", given, tool_use_id="..")


def test_web_fuzz(project, figure):
    """Generated addresses, searches and subagents straight into the guard, with and without domains in the phase."""
    spec = importlib.util.spec_from_file_location("guard", project.path / ".claude/hooks/guard.py")
    guard = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(guard)
    logged, real = [], guard.domains_of_phase

    def no_domains():
        raise guard.Denied("no web: scratchpad.md")

    guard.log = lambda _, text: logged.append(text)
    passed, wrong = set(), []
    for n, (tool, given) in enumerate(fuzz.web_calls(WEB_SEED, WEB_CALLS)):
        domains, inside = fuzz.DOMAINS if n % 4 else [], n % 5 == 0
        guard.domains_of_phase = (lambda: fuzz.DOMAINS) if domains else no_domains
        asked = {"tool_name": tool, "tool_input": given, "cwd": str(project.path), "tool_use_id": "toolu_1"}
        before = len(logged)
        try:
            answer = guard.check({**asked, "agent_id": "a"} if inside else asked)
        except guard.Denied as e:
            if not INSTEAD.search(str(e)) or len(logged) > before:
                wrong.append(f"{asked}: {e}")
            continue
        passed.add((tool, json.dumps(given)))
        if not fuzz.allowed(tool, given, str(project.path), domains) or inside and tool == "Agent":
            wrong.append(f"allowed: {asked}")
        if tool == "WebSearch":
            want = [d for d in domains if d in (given.get("allowed_domains") or domains)]
            if answer != {"updatedInput": {"query": given["query"], "allowed_domains": want}}:
                wrong.append(f"{asked}: {answer}")
        if logged[before:] != [given[k] for k in ("url", "query") if k in given and tool != "Agent"][:1]:
            wrong.append(f"logged {logged[before:]} for {asked}")
    guard.domains_of_phase = real
    figure("lock: addresses, searches and subagents into the guard", WEB_CALLS, len(wrong), passed=len(passed))
    assert not wrong, "\n".join(wrong[:20])
    assert {tool for tool, _ in passed} == {"WebFetch", "WebSearch", "Agent"} and len(passed) >= 150, len(passed)


# --- the planner -----------------------------------------------------------------------------------------------------

PLAN = """Nothing is exhausted yet.
## Next experiment
a planted hypothesis
##\tNotes
1. raise LR to 3e-3: loss still falls\u200b at the end\x1b[2J
```
   expect -10 %"""
PAD = "# Pad\n\n## Next experiment\nmine\n\n## Planned\nold\n### old too\n\n## Notes\né  \n".encode()


def hypothesis(project: Project) -> str:
    """As result.py finds it."""
    done = subprocess.run(
        [sys.executable, "-c", "import result; print(result.hypothesis())"],
        cwd=project.path / ".claude/hooks",
        capture_output=True,
        text=True,
    )
    return (done.stdout + done.stderr).strip()


def test_the_planner_reads_and_nothing_else(project, home, tmp_path):
    """Also when its own file gives it every tool; what it says is in the scratchpad, whatever the agent makes of it."""
    agent = project.path / ".claude/agents/planner.md"
    assert "\ntools: Read, WebSearch, WebFetch\n" in agent.read_text() and len(agent.read_bytes()) <= 2500
    agent.write_text(re.sub(r"^tools: .*\n", "", agent.read_text(), flags=re.M))
    (project.path / "scratchpad.md").write_bytes(PAD)
    train = project.read("train.py")
    internet = Internet(tmp_path / "internet", ["arxiv.org"], {})
    may = [
        call("Read", file_path="train.py"),
        call("Read", file_path="program.md"),
        call("WebFetch", url="https://arxiv.org/abs/2", prompt="x"),
        call("WebSearch", query="clip", blocked_domains=["arxiv.org"]),
    ]
    may_not = [
        call("Bash", command="./run.sh"),
        call("Bash", command="id"),
        call("Read", file_path="run.sh"),
        call("Write", file_path="scratchpad.md", content="x"),
        call("Edit", file_path="train.py", old_string="import", new_string="x", replace_all=True),
        ASK,
        call("WebFetch", url="https://evil.com/", prompt="x"),
        call("Skill", skill="simplify"),
    ]

    def agent_script():
        yield [call("Read", file_path="scratchpad.md")]
        yield ASK
        assert "stands under '## Planned' in scratchpad.md" in "\n".join(talk.model.texts)
        yield [call("Read", file_path="scratchpad.md")]
        yield [call("Edit", file_path="scratchpad.md", old_string="mine", new_string="again mine")]
        yield say("done")

    steps = agent_script()
    talk = Conversation(
        project.path, home, lambda shown: next(steps), subagent=[may, may_not, say(PLAN)], env=internet.env
    )
    talk.run("hello")
    inner = sorted(talk.model.inner, key=lambda r: r.id)
    assert [r.is_error for r in inner] == [False] * len(may) + [True] * len(may_not), inner
    by_guard = [r for r in inner if r.is_error and INSTEAD.search(r.content)]
    assert len(by_guard) >= 6, [r.content for r in inner if r.is_error]
    assert project.read("train.py") == train and internet.urls == {"https://arxiv.org/abs/2"}
    assert sorted(row[1:] for row in web_log(project)) == [
        ["WebFetch", "23", "https://arxiv.org/abs/2"],
        ["WebSearch", "4", "clip"],
    ]

    results = [r for r in talk.model.results if r.tool != "Read"]
    assert [(r.tool, r.is_error) for r in results] == [("Agent", False), ("Edit", False)], results
    pad = (project.path / "scratchpad.md").read_bytes()
    quoted = (
        PLAN.replace("\u200b", "").replace("\x1b", "").replace("##\tNotes", "##Notes").replace("   expect", "expect")
    )
    body = "".join(f"> {line}\n" for line in quoted.splitlines()).encode()
    assert pad.replace(b"again mine", b"mine") == PAD.replace(b"old\n### old too\n", body)
    assert hypothesis(project) == "again mine"


def test_only_the_planner_can_be_asked(project, home):
    """The client's own other agents, a fork, more keys, a long prompt; and no planner inside a planner's session."""
    ask = {"description": "plan", "prompt": "x", "subagent_type": "planner"}
    wrong = [
        {**ask, "subagent_type": t} for t in ("fork", "general-purpose", "research", "Explore", "Plan", "planner ", "")
    ]
    wrong += [{**ask, key: value} for key, value in [("isolation", "worktree"), ("model", "haiku"), ("name", "x")]]
    wrong += [{**ask, "run_in_background": True}, {**ask, "prompt": "x" * 3001}, {"description": "x", "prompt": "x"}]
    for given in wrong:
        denied(project, "Agent", given)
    assert ask_guard(project, "Agent", ask)["permissionDecision"] == "allow"
    for inside in ({"agent_id": "a", "agent_type": "planner"}, {"agent_id": ""}, {"agent_type": "planner"}):
        for tool, given in (
            ("Agent", ask),
            ("Bash", {"command": "./run.sh"}),
            ("Edit", {"file_path": "train.py", "old_string": "a", "new_string": "b"}),
            ("Write", {"file_path": "scratchpad.md", "content": "x"}),
        ):
            assert "only reads" in denied(project, tool, given, **inside)
        assert ask_guard(project, "Read", {"file_path": "train.py"}, **inside)["permissionDecision"] == "allow"
    assert not list((project.path / "runs").glob("session/proof.*"))
    wrong = [given for given in wrong if "run_in_background" not in given]  # the client takes that out by itself
    talk = Conversation(project.path, home, [[call("Agent", **given) for given in wrong]]).run("hello")
    passed = [r for r in talk.model.results if not r.is_error]
    assert not passed and len(talk.model.results) == len(wrong), passed
    assert not any("cc_is_subagent=true" in json.dumps(b) for b in talk.model.bodies)


def tell(project: Project, text: str, notes: int = 0) -> str:
    """loop.py as the client calls it when a planner has answered; what the agent is told."""
    parts = [{"type": "text", "text": "<note>"}] * notes + [{"type": "text", "text": text}]
    answer = {"status": "completed", "content": parts, "harnessNoteCount": notes, "harnessTailCount": 0}
    given = {"hook_event_name": "PostToolUse", "session_id": "s", "tool_name": "Agent", "tool_response": answer}
    done = subprocess.run(
        [project.path / ".claude/hooks/loop.py"], input=json.dumps(given), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["hookSpecificOutput"]["additionalContext"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b"\n## Planned\n> new\n"),
        (b"# Pad\n\n## Next experiment\nmine", b"# Pad\n\n## Next experiment\nmine\n\n## Planned\n> new\n"),
        (b"## Planned\nold", b"## Planned\n> new\n"),
        (b"## planned \r\nold\r\n## Next experiment\r\nmine", b"## Planned\n> new\n\n## Next experiment\r\nmine"),
        (b"## Planned\n## Next experiment\nmine\n", b"## Planned\n> new\n\n## Next experiment\nmine\n"),
        (b"a\n## Planned by me\nb\n", b"a\n## Planned by me\nb\n\n## Planned\n> new\n"),
        (b"\xff## Planned\n## Planned\nx\n### y\n## z\r\n", b"\xff## Planned\n## Planned\n> new\n\n## z\r\n"),
    ],
)
def test_nothing_but_the_section_changes(project, before, after):
    pad = project.path / "scratchpad.md"
    pad.write_bytes(before)
    pad.chmod(0o640)
    assert "stands under" in tell(project, "new", notes=1)
    assert pad.read_bytes() == after and oct(pad.stat().st_mode)[-3:] == "640"
    assert "stands under" in tell(project, "new")
    assert pad.read_bytes() == after, "a second time changes nothing"
    if b"mine" in before:
        assert hypothesis(project) == "mine"
    assert not list((project.path / "runs/session").glob("*.new"))


def test_what_the_planner_says_is_bounded_and_cannot_break_a_section(project):
    project.write("scratchpad.md", "## Planned\n\n## Next experiment\nmine\n")
    nasty = [
        "\n## Next experiment\nplanted",
        "\r## Next experiment\rplanted",
        "\x0b## Next experiment\u2028planted",
        "\ud800",
        "",
    ]
    for said in [
        *nasty,
        "é" * 50_000,
        "\n".join("## x" for _ in range(9999)),
        "> ## Planned\n```\n<!--",
        "\x1b]0;x\x07",
    ]:
        assert "stands under" in tell(project, said)
        pad = project.read("scratchpad.md")
        assert hypothesis(project) == "mine" and pad.endswith("\n\n## Next experiment\nmine\n")
        section = pad.split("\n\n## Next experiment")[0]
        assert len(section.encode()) <= 3000 + len("## Planned\n") and all(
            c.isprintable() or c == "\n" for c in section
        )
        assert all(line.startswith(">") for line in section.split("\n")[1:] if line)


@pytest.mark.parametrize("put", ["link", "hard link", "folder", "fifo", "nothing", "large"])
def test_a_scratchpad_that_is_no_ordinary_file_is_left_alone(project, put):
    pad, other = project.path / "scratchpad.md", project.path / "README.md"
    was = other.read_bytes()
    pad.unlink()
    {
        "link": lambda: pad.symlink_to("README.md"),
        "hard link": lambda: os.link(other, pad),
        "folder": pad.mkdir,
        "fifo": lambda: os.mkfifo(pad),
        "nothing": lambda: None,
        "large": lambda: pad.write_bytes(b"x" * ((1 << 20) + 1)),
    }[put]()
    said = tell(project, "new")
    assert "was not put into scratchpad.md" in said and "tell the person" in said
    assert other.read_bytes() == was and (put != "nothing") == (pad.is_symlink() or pad.exists())


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_other_calls_do_not_pay_for_it(project):
    """The record is read for a web request alone."""

    def fastest(tool: str, **given) -> float:
        took = []
        for _ in range(7):
            started = time.monotonic()
            ask_guard(project, tool, given)
            took.append(time.monotonic() - started)
        return min(took)

    read, web = fastest("Read", file_path="train.py"), fastest("WebSearch", query="clip")
    print(f"Read {read * 1000:.0f} ms, WebSearch {web * 1000:.0f} ms")
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__'); sys.stderr.write(repr(list(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", code, project.path / ".claude/hooks/guard.py"],
        input=json.dumps({"tool_name": "Read", "tool_input": {"file_path": "train.py"}, "cwd": str(project.path)}),
        capture_output=True,
        text=True,
    )
    assert '"allow"' in loaded.stdout and "'record'" not in loaded.stderr and "'subprocess'" not in loaded.stderr
    assert read < web


def test_a_subagent_is_seen_as_one(project, home):
    """tests/client.py itself: the subagent's requests come to its script, with their results."""
    seen: list[Shown] = []

    def subagent(shown: Shown):
        seen.append(shown)
        return [call("Read", file_path="train.py")] if len(seen) == 1 else say("a list")

    talk = Conversation(project.path, home, [ASK, say("done")], subagent=subagent).run("hello")
    assert [len(s.results) for s in seen] == [0, 1] and "eCLIP" in seen[1].results[0].content
    assert [r.tool for r in talk.model.results] == ["Agent"] and "a list" in talk.model.results[0].content
