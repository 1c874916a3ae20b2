"""A scripted model and the real Claude Code client talking to it. Standard library only; nothing leaves loopback.

The model is a script: a list of turns, or a function that is shown what is new (tool results, texts) and returns the
next turn. A turn is one block or a list of blocks, made by `say` and `call`. The client is the pinned one, with a HOME
of its own, so that everything in between is real: settings, permission rules, hooks, tools.

    talk = Conversation(project.path, home, [call("Bash", command="./run.sh"), say("done")])
    talk.run("start")
    talk.model.results[0].content
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CLIENT = Path(__file__).resolve().parents[1] / ".client" / "node_modules" / ".bin" / "claude"
COMPACTING = "CRITICAL: Respond with TEXT ONLY"  # how the client's own request for a summary begins
SUBAGENT = "I am a subagent."  # what one answers that has no script
PASSED_ON = ("PATH", "LANG", "TERM", "DOCKER_HOST", "XDG_RUNTIME_DIR", "AR_ENGINE")  # of the environment, besides HOME
ENGINE_FOLDERS = (".local/share/containers", ".config/containers", ".docker")  # where rootless engines keep the image


def say(text: str) -> dict:
    return {"type": "text", "text": text}


def call(tool: str, /, **given) -> dict:
    return {"type": "tool_use", "name": tool, "input": given}


@dataclass
class Result:
    """What came back for one tool call."""

    id: str
    tool: str
    given: dict
    is_error: bool
    content: str


@dataclass
class Shown:
    """What a request shows the model for the first time."""

    results: list[Result] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    first: bool = False  # in its conversation, or after a compaction

    @property
    def text(self) -> str:
        return "\n".join([*self.texts, *(r.content for r in self.results)])


@dataclass
class Request:
    """One request to the model: sizes in bytes of JSON, names of the tools it was offered, what was new in it."""

    system: int
    tools: int
    messages: int
    names: list[str]
    shown: Shown
    body: dict

    @property
    def size(self) -> int:
        return self.system + self.tools + self.messages


@dataclass
class Turn:
    """An ordinary answer. Whatever else has a `send` may stand in for one, such as a fault."""

    blocks: list[dict]
    tokens: int = 10  # the size the client is told its request had; near the window it compacts
    why: str = ""  # its stop_reason, where it is not tool_use or end_turn

    def send(self, http: BaseHTTPRequestHandler, body: dict) -> None:
        respond(http, 200, self.text(body).encode(), "text/event-stream" if body.get("stream") else "application/json")

    def text(self, body: dict) -> str:
        wants_tool = any(b["type"] == "tool_use" for b in self.blocks)
        stop = {"stop_reason": self.why or ("tool_use" if wants_tool else "end_turn"), "stop_sequence": None}
        usage = {
            "input_tokens": self.tokens,
            "output_tokens": 1,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }
        message = {
            "id": f"msg_{time.time_ns()}",
            "type": "message",
            "role": "assistant",
            "model": body.get("model"),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        if not body.get("stream"):
            return json.dumps({**message, **stop, "content": self.blocks})
        events = [{"type": "message_start", "message": message}]
        for i, block in enumerate(self.blocks):
            if block["type"] == "text":
                start, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
            else:
                start = {**block, "input": {}}
                delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
            events += [
                {"type": "content_block_start", "index": i, "content_block": start},
                {"type": "content_block_delta", "index": i, "delta": delta},
                {"type": "content_block_stop", "index": i},
            ]
        events += [{"type": "message_delta", "delta": stop, "usage": usage}, {"type": "message_stop"}]
        return "".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n" for e in events)


Script = Callable[[Shown], "Turn | list[dict] | dict"]


def respond(
    http: BaseHTTPRequestHandler, status: int, body: bytes = b"{}", kind: str = "application/json", **headers: str
) -> None:
    http.send_response(status)
    for name, value in {"content-type": kind, "content-length": str(len(body)), **headers}.items():
        http.send_header(name, value)
    http.end_headers()
    if http.command != "HEAD":
        http.wfile.write(body)


def read_out(turns: Iterable) -> Script:
    """A list of turns as a script; when it is used up, the model says so and ends its turn."""
    left = iter(turns)
    return lambda shown: next(left, say("The script has ended."))


class Model:
    """Answers the Messages API from a script and keeps what it was shown: requests, results and texts, in order.

    Only requests of the main conversation reach the script, and those of a subagent `subagent`, where there is one. The
    client's own ones (titles, summaries, searches) are answered with a text and counted in `asides`.
    """

    def __init__(self, script: Script | Iterable, subagent: Script | Iterable | None = None):
        self.script = script if callable(script) else read_out(script)
        self.subagent = subagent if callable(subagent) or subagent is None else read_out(subagent)
        self.inner: list[Result] = []  # the subagent's results
        self.bodies: list[dict] = []  # every request, as it came
        self.requests: list[Request] = []
        self.results: list[Result] = []
        self.texts: list[str] = []
        self.asides: list[str] = []
        self.calls: dict[str, dict] = {}
        self.error: BaseException | None = None  # raised by the script; Conversation.run raises it again
        self._before: Counter = Counter()  # the texts of the request before, and how often each stood in it
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return "http://127.0.0.1:%d" % self.server.server_address[1]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, body: dict) -> Turn:
        with self._lock:
            self.bodies.append(body)
            aside = self._aside(body)
            if aside == SUBAGENT and self.subagent:
                results = self._results(body)
                self.inner += results
                return self._turn(self.subagent, Shown(results))
            if aside:
                self.asides.append(aside)
                return Turn([say(aside)])
            shown = self._new(body)
            size = {
                k: len(json.dumps(body.get(k, []), ensure_ascii=False).encode())
                for k in ("system", "tools", "messages")
            }
            self.requests.append(Request(**size, names=[t["name"] for t in body["tools"]], shown=shown, body=body))
            self.results += shown.results
            self.texts += shown.texts
            return self._turn(self.script, shown)

    def _turn(self, script: Script, shown: Shown) -> Turn:
        try:
            turn = script(shown)
        except BaseException as e:
            self.error = self.error or e
            turn = say("The script failed.")
        if isinstance(turn, dict):
            turn = [turn]
        if isinstance(turn, list):
            turn = Turn(turn)
        if isinstance(turn, Turn):
            turn.blocks = [self._numbered(b) for b in turn.blocks]
        return turn

    def _aside(self, body: dict) -> str:
        """The answer to a request that is not the conversation's next turn, '' when it is."""
        if not body.get("tools"):
            return "A title"
        blocks = [b for _, b in blocks_of(body)]
        if any(b.get("text", "").startswith(COMPACTING) for b in blocks):
            return "<summary>The summary of all that went before.</summary>"
        if body["tools"][0].get("type", "").startswith("web_search"):
            return "Nothing was found."
        return SUBAGENT if "cc_is_subagent=true" in json.dumps(body.get("system")) else ""

    def _new(self, body: dict) -> Shown:
        first = all(message["role"] != "assistant" for message in body["messages"])
        shown, before = Shown(first=first), Counter() if first else self._before
        texts = [b["text"] for role, b in blocks_of(body) if b["type"] == "text" and role != "assistant"]
        self._before = Counter(texts)
        for text in texts:
            if before[text] > 0:
                before[text] -= 1
            else:
                shown.texts.append(text)
        shown.results = self._results(body)
        return shown

    def _results(self, body: dict) -> list[Result]:
        new = []
        for _, block in blocks_of(body):
            made = self.calls.get(block.get("tool_use_id", "")) if block["type"] == "tool_result" else None
            if made and "back" not in made:
                made["back"] = True
                new.append(Result(made["id"], made["name"], made["input"], bool(block.get("is_error")), flat(block)))
        return new

    def _numbered(self, block: dict) -> dict:
        if block["type"] != "tool_use":
            return block
        numbered = {**block, "id": f"toolu_{next(self._numbers):04d}"}
        self.calls[numbered["id"]] = dict(numbered)
        return numbered

    def _handler(model):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                respond(self, 404)

            do_HEAD = do_GET

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
                if "count_tokens" in self.path:
                    respond(self, 200, b'{"input_tokens": 100}')
                elif self.path.startswith("/v1/messages"):
                    model.answer(body).send(self, body)
                else:
                    respond(self, 404)

            def log_message(self, *args):
                pass

        return Handler


def blocks_of(body: dict) -> Iterator[tuple[str, dict]]:
    for message in body["messages"]:
        content = message["content"]
        for block in [say(content)] if isinstance(content, str) else content:
            yield message["role"], block


def flat(result: dict) -> str:
    """The text of a tool_result block."""
    content = result.get("content") or ""
    return content if isinstance(content, str) else "\n".join(b.get("text", f"[{b['type']}]") for b in content)


def prepare_home(home: Path, project: Path, *, trusted: bool = False, user: dict | None = None) -> Path:
    """A HOME as after the client's onboarding; `user` are the settings in it. A HOME that exists is left as it is."""
    if home.exists():
        return home
    (home / ".claude").mkdir(parents=True)
    state = {
        "hasCompletedOnboarding": True,
        "theme": "dark",
        "numStartups": 5,
        "customApiKeyResponses": {"approved": ["not-a-key"], "rejected": []},
    }
    if trusted:
        state["projects"] = {str(project): {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True}}
    (home / ".claude.json").write_text(json.dumps(state))
    if user is not None:
        (home / ".claude" / "settings.json").write_text(json.dumps(user))
    for name in ENGINE_FOLDERS:
        kept = Path.home() / name
        if kept.is_dir() and os.geteuid() != 0:
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).symlink_to(kept)
    return home


def environment(home: Path, model: Model, extra: dict | None = None) -> dict:
    """What the client is started with: nothing of the caller's but what run.sh and a terminal need."""
    return {
        **{k: os.environ[k] for k in PASSED_ON if k in os.environ},
        "HOME": str(home),
        "ANTHROPIC_BASE_URL": model.url,
        "ANTHROPIC_API_KEY": "not-a-key",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        **(extra or {}),
    }


class Conversation:
    """One process of the client in `-p` mode, with one conversation. Prompts can be typed while it works."""

    def __init__(
        self,
        project: Path,
        home: Path,
        script: Script | Iterable,
        *,
        trusted: bool = False,
        user: dict | None = None,
        local: dict | None = None,
        args: Iterable[str] = (),
        env: dict | None = None,
        subfolder: str = "",
        subagent: Script | Iterable | None = None,
    ):
        prepare_home(home, project, trusted=trusted, user=user)
        if local is not None:
            (project / ".claude" / "settings.local.json").write_text(json.dumps(local))
        self.model = Model(script, subagent)
        self.events: list[dict] = []
        self.errors = ""
        self._news = threading.Condition()
        self._process = subprocess.Popen(
            [CLIENT, "-p", "--input-format", "stream-json", "--output-format", "stream-json", "--verbose", *args],
            cwd=project / subfolder,
            env=environment(home, self.model, env),
            start_new_session=True,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._readers = [threading.Thread(target=f, daemon=True) for f in (self._read_events, self._read_errors)]
        for reader in self._readers:
            reader.start()

    def type(self, prompt: str) -> None:
        """Send a prompt; during a turn the client takes it in before the model's next one."""
        message = {"type": "user", "message": {"role": "user", "content": prompt}}
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def run(self, *prompts: str, timeout: float = 300) -> Conversation:
        """Type each prompt when the one before is answered, end the input, wait for the client to exit."""
        deadline = time.monotonic() + timeout
        try:
            for prompt in prompts:
                before = len(self.ends)
                self.type(prompt)
                self._wait(lambda n=before: len(self.ends) > n, deadline)
            self._process.stdin.close()
            self._wait(lambda: self._process.poll() is not None, deadline)
        finally:
            self.close()
        if self.model.error:
            raise self.model.error
        return self

    def close(self) -> None:
        """Ends the client and all it started, and the model."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for reader in self._readers:
            reader.join(5)
        self.model.close()

    @property
    def ends(self) -> list[dict]:
        return [e for e in self.events if e.get("type") == "result"]

    @property
    def id(self) -> str:
        return next(e["session_id"] for e in self.events if "session_id" in e)

    @property
    def told(self) -> str:
        """Everything the person is told: the model's texts and the harness's messages."""
        return json.dumps(self.events, ensure_ascii=False)

    def _wait(self, done: Callable[[], bool], deadline: float) -> None:
        with self._news:
            while not done():
                left = deadline - time.monotonic()
                assert left > 0, (
                    f"the client was too slow; last event: {self.events[-1:]}; stderr: {self.errors[-2000:]}"
                )
                assert self._process.poll() is None, f"the client has ended: {self.errors[-2000:]} {self.events[-1:]}"
                self._news.wait(min(left, 0.2))

    def _read_events(self) -> None:
        for line in self._process.stdout:
            with self._news:
                self.events.append(json.loads(line))
                self._news.notify_all()

    def _read_errors(self) -> None:
        for line in self._process.stderr:
            self.errors += line
