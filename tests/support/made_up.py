"""A made-up day, for tests of the report: recorded by the harness's own code, with invented numbers and no training.

usage: PYTHONPATH=container/harness python tests/support/made_up.py REPOSITORY [EXPERIMENTS]

REPOSITORY has data/prints.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import dataset
import experiment
import git
import publish
import record
from history import History
from in_process import made_up_run
from measure import Run
from record import REFS, Attempt
from recorded import Recorded

PHASES = ("first", "second", "third", "fourth", "fifth")
PLAN = "# Program\n\n## Settings\ndata: prints\n" + "".join(
    f"\n## Phase {n} — {name}\nuntil: 8 experiments\npatience: {2 if name == 'third' else 0}\n"
    for n, name in enumerate(PHASES, 1)
)
IDEAS = """relax the logit-scale clamp to 100|learning rate 1e-3 to 7e-4|batch size 128|warm-up of 60 steps
weight decay 0.02|600 steps instead of 300|cosine to a tenth instead of zero|gradient clipping off
expert probability 1.0|expert loss weight 0.5|mixup alpha 2|cold start: no expert for the first fifth
soft targets for equal phrases|contrast the region with the whole caption|reconstruct the heatmap from the patches
heatmap as a fourth channel|mean pooling in the text tower|no causal mask|convolutional stem, two layers
embedding 256|two-layer projection heads|patch 12|width 128, three layers|shared projection for both views
label smoothing 0.05|separate rate for the logit scale|average the weights of the last 50 steps
colour-preserving crops|hard negatives by caption overlap|sigmoid loss""".replace("\n", "|").split("|")
FAILS = (5, 17, 29)  # the ideas that crash
CONTROLS = (12, 24)  # those that are taken out again, as a control
REMEASURED = (14, 31)  # those after which the incumbent runs again
NOISE = 0.04  # of log(mean rank), one run
BASELINE, GALLERY = 285.0, 2000  # mean rank of a day's baseline among so many pairs
EVERY_S = 420  # from one record to the next
CRASH = Run("failed", 7, "crash after 7.1 s, 31 of 300 steps", timing={"total": 12.3, "train": 7.1})


def npy(values: list, shape: tuple, kind: str) -> bytes:
    """A .npy file, without numpy: kind is f (float32) or i (int32)."""
    head = f"{{'descr': '<{kind}4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + struct.pack(f"<{len(values)}{kind}", *values)


def run(rank: float, seed: int, gallery: int) -> Run:
    made = made_up_run(rank, seed)
    made.metrics.update({"gallery": gallery, "random": (gallery + 1) / 2})
    claims = {"steps": "300", "loss": "4.1 -> 2.3", "peak_memory": "1.31 GB"}
    return replace(made, train={**made.train, "claims": claims}, timing={"total": 74.0, "train": 61.0})


class Day(Recorded):
    """Attempts, and audits and finals, written into a repository through one `git fast-import`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, path: Path, seed: int = 1):
        super().__init__(monkeypatch, (path / "program.md").read_text())
        monkeypatch.setattr(dataset, "comparable", lambda program, image: self.comparable)
        monkeypatch.setattr(dataset, "prepare", lambda *words: 0)
        monkeypatch.setattr(git, "content", lambda name: self.sources[name])
        monkeypatch.setattr(publish.Trainings, "run", lambda made, side, source: self.train(made, side))
        self.path, self.rng, self.out, self.when = path, random.Random(seed), io.BytesIO(), 1_790_000_000
        raw = (path / "data/prints/val.key.npy").read_bytes()
        self.key = list(struct.unpack(f"<{(len(raw) - 128) // 8}q", raw[128:]))  # of an image's row, its caption's
        self.first = self.true = BASELINE * (len(self.key) + 1) / (GALLERY + 1)  # mean rank without noise
        self.code, self.parent, self.sources = (path / "train.py").read_text(), "refs/heads/main", {}
        self.incumbent = self.blob(self.code)

    @property
    def history(self) -> History:
        return History.load(image="made up")

    @property
    def n(self) -> int:
        return len(self.records)

    def blob(self, code: str) -> str:
        blob = hashlib.sha1(b"blob %d\0" % len(code.encode()) + code.encode()).hexdigest()
        self.sources[blob] = code.encode()
        return blob

    def noisy(self, rank: float) -> float:
        return rank * math.exp(self.rng.gauss(0, NOISE))

    def attempt(self, kind: str, idea: str, draw: Callable[[], float | None], code: str = "") -> Attempt:
        """As experiment.measure_and_decide does it; draw: the rank that a run finds, None for a crash."""
        code = code or self.code
        made = Attempt(kind=kind, train=self.blob(code), scratchpad="2" * 40, hypothesis=idea, experiment=self.n + 1)
        while made.verdict == "again":
            rank = draw()
            made.runs.append(run(rank, self.rng.randrange(2**30), len(self.key)) if rank else CRASH)
            made.verdict = experiment.verdict(made, self.history)
        experiment.complete(made, self.history)
        made.when = self.when
        files = {"result.json": made.json(), "train.log": self.log((made.values() or [200])[0])}
        if made.values():
            files.update(self.arrays(made.values()[0]))
        self.commit(made.message(), code, files)
        if made.verdict in ("kept", "baseline"):
            self.incumbent, self.code, self.parent = made.train, code, f"{REFS}{self.n}"
        return made

    def arrays(self, mean: float) -> dict[str, bytes]:
        """Ranks, and the five best answers to some queries, the right one where its rank says."""
        n, count = len(self.key), min(24, len(self.key))
        ranks = [min(n, 1 + int(self.rng.expovariate(1) ** 2 * (mean - 1) / 2)) for _ in range(2 * n)]
        queries, answers = [int(q * (n - 1) / (count - 1)) for q in range(count)], []
        for side, right in ((0, self.key), (1, range(n))):
            for q in queries:
                five = self.rng.sample([x for x in range(n) if x != right[q]], 5)
                at = ranks[side * n + q] - 1
                answers += [*five[:at], right[q], *five[at:4]] if at < 5 else five
        return {"ranks.npy": npy(ranks, (2, n), "f"), "examples.npy": npy(answers, (2, count, 5), "i")}

    def log(self, rank: float) -> bytes:
        end = 2 + rank / 200
        curve = ((s, end + (4.2 - end) * math.exp(-s / 90) + self.rng.gauss(0, 0.03)) for s in range(15, 301, 15))
        return "\n".join(f"step {step}/300 loss {loss:.3f}" for step, loss in curve).encode()

    def commit(self, message: str, code: str, files: dict[str, bytes]) -> None:
        def data(b: bytes) -> None:
            self.out.write(b"data %d\n%s\n" % (len(b), b))

        number = self.n + 1
        self.out.write(f"commit {REFS}{number}\ncommitter T <t@example.org> {self.when} +0000\n".encode())
        data(message.encode())
        self.out.write(f"from {self.parent}\nM 100644 inline train.py\n".encode())
        data(code.encode())
        for name, content in files.items():
            self.out.write(f"M 100644 inline experiment/{name}\n".encode())
            data(content)
        self.sources[f"{REFS}{number}^:train.py"] = self.sources[self.incumbent]
        self.records.append(record.parse(str(number), str(self.when), message))
        self.when += EVERY_S

    def write(self) -> None:
        command = ["git", "fast-import", "--quiet", "--force"]
        subprocess.run(command, cwd=self.path, input=self.out.getvalue(), check=True)

    # What a day brings

    def other_data(self, count: int) -> None:
        """A baseline and discarded ideas that are not comparable with what comes after."""
        self.comparable = "0ld"
        self.attempt("baseline", "", lambda: self.noisy(2 * self.first))
        for i in range(1, count):
            self.attempt("candidate", f"with other data, {i}", lambda: 3 * self.first, f"{self.code}\nOTHER = {i}\n")
        self.comparable = "c0ffee"

    def ideas(self, count: int, hostile: str = "") -> None:
        """A baseline and so many ideas: the mean rank falls from 285 to about 160 of 2,000, as on a real day."""
        self.attempt("baseline", "", lambda: self.noisy(self.first))
        for i in range(count):
            idea = hostile if hostile and i % 7 == 3 else IDEAS[i % len(IDEAS)]
            if i in FAILS:
                self.attempt("candidate", idea, lambda: None, f"{self.code}\nBROKEN = {i}\n")
                continue
            idea = f"control: without {idea}" if i in CONTROLS else idea
            good = self.rng.random() < 0.55 or i == 2
            gain = 0.24 if i == 2 else self.rng.uniform(0.01, 0.075) * 40 / max(count, 40)
            rank = self.true * math.exp(-gain if good else self.rng.expovariate(1 / 0.09))
            name, value = (("WARMUP", 20 + i), ("LR", f"{1e-3 * (1 + i / 7):.2e}"), ("WEIGHT_DECAY", i / 100))[i % 3]
            code = re.sub(rf"^{name} = .*?(  #|$)", rf"{name} = {value}\1", self.code, count=1, flags=re.M)
            if i % 3 == 0:
                code = code.replace("def load(", f"def idea_{i}(x):\n    return x * {i}  # {hostile}\n\n\ndef load(", 1)
            if self.attempt("candidate", idea, lambda: self.noisy(rank), code).verdict == "kept":
                self.true = rank
            if i in REMEASURED:
                self.attempt("remeasured", "", lambda: self.noisy(self.true))

    def audit(self, gallery: int = 1000) -> Attempt:
        """Baseline, best and the best without each change: the first that can be taken out fails."""
        self.gallery = gallery
        return self.published(*publish.run_audit(publish.Trainings(self.history, Path(), None), 3, ablate=True))

    def final(self, gallery: int = 1000) -> Attempt:
        self.gallery = gallery
        return self.published(*publish.run_final(publish.Trainings(self.history, Path(), None)))

    def train(self, trainings: publish.Trainings, side: str) -> Run:
        """Instead of a training."""
        rank = {"baseline": self.first, "best": self.true}.get(side, self.true * self.rng.uniform(1, 1.1))
        rank *= (self.gallery + 1) / (len(self.key) + 1)
        without = [made["side"] for made in trainings.runs if "without" in made["side"]]
        fails = "without" in side and side == [*without, side][0]
        made = CRASH if fails else run(self.noisy(rank), self.rng.randrange(2**30), self.gallery)
        trainings.runs.append({"side": side, **asdict(made)})
        return made

    def published(self, made: Attempt, more: dict) -> Attempt:
        self.commit(made.message(), self.code, {"result.json": made.json(**more)})
        return made


@contextlib.contextmanager
def day(path: Path, seed: int = 1) -> Iterator[Day]:
    """A day to be filled; then it is in that repository's record."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = Day(monkeypatch, path, seed)
        yield made
        made.write()


if __name__ == "__main__":
    with day(Path(sys.argv[1])) as made:
        made.ideas(int((sys.argv[2:] or ["40"])[0]))
        made.audit()
        made.final()
