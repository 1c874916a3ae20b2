"""The web where the plan allows it, and the planner: what passes, what leaves this machine, what is written down.

The real client talks to a scripted model, and its WebFetch to an internet on loopback (support/internet.py). The guard
alone is tried with more addresses in unit/test_guard.py.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import calls
from calls import INSTEAD
from client import Conversation, Shown, call, say
from internet import Internet
from repository import Project

WEB = ["arxiv.org", "github.com"]
LOGGED = re.compile(r"[0-9]{20}\.toolu_\d+")
ASK = call("Agent", **calls.ASK)


def set_web(project: Project, domains: list[str]) -> None:
    plan = re.sub(r"^web: .*\n", "", project.read("program.md"), flags=re.M)
    line = f"until: 40 experiments\nweb: {', '.join(domains)}\n" if domains else "until: 40 experiments\n"
    project.write("program.md", plan.replace("until: 40 experiments\n", line))


@pytest.fixture
def project(made_up: Project) -> Project:
    """Its first phase has web."""
    set_web(made_up, WEB)
    return made_up


def web_log(project: Project) -> list[list[str]]:
    """What run.sh will find, in order: time, tool, characters, text."""
    files = sorted((project.path / "runs/web").glob("*"))
    assert all(LOGGED.fullmatch(f.name) for f in files), files
    lines = [f.read_text() for f in files]
    assert all(x.endswith("\n") and x.count("\n") == 1 for x in lines), lines
    return [x.rstrip("\n").split("\t") for x in lines]


def in_order(talk: Conversation) -> list:
    return sorted(talk.model.results, key=lambda r: r.id)


# Which addresses


def test_the_client_fetches_these_and_no_others(project, home, tmp_path):
    """Every address in one conversation. What the sites were asked is what the guard let through and wrote down.

    The client takes blanks out of an address before it asks the guard, and fetches what it asked about.
    """
    fine = [*calls.FINE_URLS, *calls.BLANKS]
    hosts = ["arxiv.org", "*.arxiv.org", "github.com", "*.github.com", "evil.com"]
    internet = Internet(tmp_path / "internet", hosts, {})
    tries = [call("WebFetch", url=url, prompt="PRIVATE: what is it?") for url in [*fine, *calls.WRONG_URLS]]
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
    bodies = [json.dumps(body) for body in talk.model.bodies if not body.get("tools")]
    assert any("PRIVATE" in body and "<h1>" not in body for body in bodies)


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
    wrong = calls.WRONG_SEARCHES
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
    done = plan.replace("until: 40", "until: 0")

    def script():
        set_web(project, [])
        yield tries
        project.write("program.md", done)  # the second phase has none
        yield tries
        project.write("program.md", done.replace("## Phase 2 — second\n", ""))
        yield tries
        project.write("program.md", plan.replace("budget: 120", "budget: soon"))
        yield tries
        (project.path / "program.md").unlink()
        yield tries
        project.write("program.md", plan)
        yield tries
        yield say("done")

    steps = script()
    talk = Conversation(project.path, home, lambda shown: next(steps), env=internet.env).run("hello")
    results = in_order(talk)
    assert [r.is_error for r in results] == [True] * 10 + [False] * 2, results
    reasons = ["'first' has no web", "'second' has no web", "'none' has no web", "line 5: budget", "program.md"]
    for n, why in enumerate(reasons):
        pair = results[2 * n : 2 * n + 2]
        assert all(why in r.content and INSTEAD.search(r.content) for r in pair), (why, pair)
    assert internet.urls == {"https://arxiv.org/abs/1"} and len(web_log(project)) == 2


# The planner

ANSWER = """Nothing is exhausted yet.
## Next experiment
1. raise LR to 7e-3: loss still falls at the end
   expect -10 %"""


def test_the_planner_reads_and_nothing_else(project, home, tmp_path):
    """Also when its own file gives it every tool; its answer reaches the agent once, which notes what it takes."""
    agent = project.path / ".claude/agents/planner.md"
    assert "\ntools: Read, WebSearch, WebFetch\n" in agent.read_text() and len(agent.read_bytes()) <= 2500
    agent.write_text(re.sub(r"^tools: .*\n", "", agent.read_text(), flags=re.M))
    train, pad = project.read("train.py"), project.read("scratchpad.md")
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
        call("Edit", file_path="train.py", old_string="VALUE", new_string="x", replace_all=True),
        ASK,
        call("WebFetch", url="https://evil.com/", prompt="x"),
        call("Skill", skill="simplify"),
    ]

    def agent_script():
        yield [call("Read", file_path="scratchpad.md")]
        yield ASK
        assert project.read("scratchpad.md") == pad, "nothing but the agent writes there"
        yield [call("Edit", file_path="scratchpad.md", old_string="# Scratchpad", new_string="## Planned\nraise LR\n")]
        yield say("done")

    steps, subagent = agent_script(), [may, may_not, say(ANSWER)]
    talk = Conversation(project.path, home, lambda shown: next(steps), subagent=subagent, env=internet.env)
    talk.run("hello")
    inner = sorted(talk.model.inner, key=lambda r: r.id)
    assert [r.is_error for r in inner] == [False] * len(may) + [True] * len(may_not), inner
    by_guard = [r for r in inner if r.is_error and INSTEAD.search(r.content)]
    assert len(by_guard) >= 6, [r.content for r in inner if r.is_error]
    assert project.read("train.py") == train and internet.urls == {"https://arxiv.org/abs/2"}
    assert not list(project.path.glob("runs/session/proof.*")), "its ./run.sh was approved"
    fetched, searched = ["WebFetch", "23", "https://arxiv.org/abs/2"], ["WebSearch", "4", "clip"]
    assert sorted(row[1:] for row in web_log(project)) == [fetched, searched]

    results = [r for r in talk.model.results if r.tool != "Read"]
    assert [(r.tool, r.is_error) for r in results] == [("Agent", False), ("Edit", False)], results
    assert json.dumps(talk.model.requests[-1].body).count("raise LR to 7e-3") == 1
    assert all(line.strip() in results[0].content for line in ANSWER.splitlines())


def test_only_the_planner_can_be_asked(project, home):
    """The client's own other agents, a fork, more keys, a long prompt."""
    questions = [[call("Agent", **given) for given in calls.WRONG_QUESTIONS]]
    talk = Conversation(project.path, home, questions).run("hello")
    passed = [r for r in talk.model.results if not r.is_error]
    assert not passed and len(talk.model.results) == len(calls.WRONG_QUESTIONS), passed
    assert not any("cc_is_subagent=true" in json.dumps(b) for b in talk.model.bodies)


def test_a_subagent_is_seen_as_one(project: Project, home: Path):
    """support/client.py itself: the subagent's requests come to its script, with their results."""
    seen: list[Shown] = []

    def subagent(shown: Shown):
        seen.append(shown)
        return [call("Read", file_path="train.py")] if len(seen) == 1 else say("a list")

    talk = Conversation(project.path, home, [ASK, say("done")], subagent=subagent).run("hello")
    assert [len(s.results) for s in seen] == [0, 1] and "VALUE = 100" in seen[1].results[0].content
    assert [r.tool for r in talk.model.results] == ["Agent"] and "a list" in talk.model.results[0].content
