"""What a model's server, or the model itself, can do wrong: each stands in for a Turn of client.py."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

from client import Turn, call, respond, say


@dataclass
class Error:
    """An answer that is an error, as the Messages API writes it."""

    status: int
    kind: str
    message: str
    retry_after: str = ""

    def send(self, http: BaseHTTPRequestHandler, body: dict) -> None:
        error = {"type": "error", "error": {"type": self.kind, "message": self.message}}
        respond(http, self.status, json.dumps(error).encode(), **{"retry-after": self.retry_after})


class Reset:
    """The connection goes, with nothing said."""

    def send(self, http: BaseHTTPRequestHandler, body: dict) -> None:
        http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        http.close_connection = True
        http.connection.close()


@dataclass
class Cut:
    """An ordinary answer whose stream ends in the middle."""

    turn: Turn

    def send(self, http: BaseHTTPRequestHandler, body: dict) -> None:
        text = self.turn.text(body).encode()
        with contextlib.suppress(OSError):
            respond(http, 200, text[: len(text) // 2], "text/event-stream", **{"content-length": str(len(text))})
            http.connection.shutdown(socket.SHUT_RDWR)
        http.close_connection = True


@dataclass
class Silence:
    """No answer for so many seconds, then an ordinary one."""

    seconds: float

    def send(self, http: BaseHTTPRequestHandler, body: dict) -> None:
        time.sleep(self.seconds)
        with contextlib.suppress(OSError):
            Turn([say("Sorry, I was away.")]).send(http, body)


class BrokenCall(Turn):
    """A tool call whose input is no JSON."""

    def __init__(self):
        super().__init__([call("Bash", command="./run.sh")])

    def text(self, body: dict) -> str:
        return super().text(body).replace(r"{\"command\": \"./run.sh\"}", r"{\"command\": \"./run.s")


INTERNAL = Error(500, "api_error", "Internal server error")
OVERLOADED = Error(529, "overloaded_error", "Overloaded")
LIMITED = Error(429, "rate_limit_error", "This request would exceed your rate limit", retry_after="1")
TOO_LONG = Error(400, "invalid_request_error", "prompt is too long: 210000 tokens > 200000 maximum")
CUT = Cut(Turn([say("a long answer " * 50)]))
REFUSAL = Turn([say("I cannot help with that.")], why="refusal")
# Name: turns, and whether the conversation ends with them, for a client that asks again once and a loop with 3 turns.
ALL: dict[str, tuple[list, bool]] = {
    "500": ([INTERNAL, INTERNAL], True),
    "529, once": ([OVERLOADED], False),
    "429 with retry-after": ([LIMITED, LIMITED], True),
    "connection reset": ([Reset(), Reset()], True),
    "stream cut, once": ([CUT], False),
    "context full": ([TOO_LONG, TOO_LONG], True),
    "call that is no JSON": ([BrokenCall()], False),
    "unknown tool": ([call("Nonsense", x=1)], False),
    "wrong types": ([call("Bash", command=7), call("Read", file_path=["train.py"])], False),
    "forbidden calls": ([call("Bash", command="ls"), call("Read", file_path="run.sh")], False),
    "cut at its longest": ([Turn([call("Bash", command="./run.sh")], why="max_tokens")], False),
    "refusal": ([REFUSAL, REFUSAL], True),
    "asks": ([say("Shall I go on?")], False),
    "stops every turn": ([say("I have stopped."), say("As I said."), say("Shall I go on?")], True),
}
