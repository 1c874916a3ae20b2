"""A made-up day for tests of the report: records as run.sh writes them, but with invented numbers and no training.

usage: made_up.py REPOSITORY [EXPERIMENTS]       (the repository has data/prints)
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".claude" / "hooks"))
import record  # noqa: E402
import result  # noqa: E402

IDEAS = """relax the logit-scale clamp to 100|learning rate 1e-3 to 7e-4|batch size 128|warm-up of 60 steps
weight decay 0.02|600 steps instead of 300|cosine to a tenth instead of zero|gradient clipping off
expert probability 1.0|expert loss weight 0.5|mixup alpha 2|cold start: no expert for the first fifth
soft targets for equal phrases|contrast the region with the whole caption|reconstruct the heatmap from the patches
heatmap as a fourth channel|mean pooling in the text tower|no causal mask|convolutional stem, two layers
embedding 256|two-layer projection heads|patch 12|width 128, three layers|shared projection for both views
label smoothing 0.05|separate rate for the logit scale|average the weights of the last 50 steps
colour-preserving crops|hard negatives by caption overlap|sigmoid loss""".replace("\n", "|").split("|")
NOISE = 0.05


def npy(values: list, shape: tuple, kind: str) -> bytes:
    """A .npy file, without numpy: kind is f (float32) or i (int32)."""
    head = f"{{'descr': '<{kind}4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head + struct.pack(f"<{len(values)}{kind}", *values)


def ranks(rng: random.Random, n: int, mean: float) -> tuple[list, bytes]:
    found = [min(n, 1 + int(rng.expovariate(1) ** 2 * (mean - 1) / 2)) for _ in range(2 * n)]
    return found, npy(found, (2, n), "f")


def examples(rng: random.Random, found: list, key: list) -> bytes:
    """The five best of E queries, the right one where its rank says."""
    n = len(key)
    queries = [int(q * (n - 1) / (min(24, n) - 1)) for q in range(min(24, n))]
    out = []
    for side, right in ((0, key), (1, range(n))):
        for q in queries:
            five = rng.sample([x for x in range(n) if x != right[q]], 5)
            at = int(found[side * n + q]) - 1
            out += [*five[:at], right[q], *five[at:4]] if at < 5 else five
    return npy(out, (2, len(queries), 5), "i")


def log(rng: random.Random, start: float, end: float) -> bytes:
    lines = [f"step {s}/300 loss {end + (start - end) * math.exp(-s / 90) + rng.gauss(0, 0.03):.3f}"
             for s in range(15, 301, 15)]  # fmt: skip
    return "\n".join([*lines, "---", "steps: 300", "loss: 4.1 -> 2.3", "peak_memory: 1.31 GB"]).encode()


class Day:
    """Writes experiments into a repository through one `git fast-import`."""

    def __init__(self, path: Path, seed: int = 1):
        self.path, self.rng, self.out, self.n = path, random.Random(seed), io.BytesIO(), 0
        self.when = 1_790_000_000
        raw = (path / "data/prints/val.key.npy").read_bytes()
        size = (len(raw) - 128) // 8
        self.key = list(struct.unpack(f"<{size}q", raw[128:]))
        self.base = (path / "train.py").read_text()
        self.code, self.parent, self.incumbent, self.kept = self.base, "refs/heads/main", [], []
        self.groups: list = []

    def git(self, *args: str, data: bytes | None = None) -> str:
        done = subprocess.run(["git", *args], cwd=self.path, input=data, capture_output=True, check=True)
        return done.stdout.decode()

    def blob(self, code: str) -> str:
        return record.hashlib.sha1(b"blob %d\0" % len(code.encode()) + code.encode()).hexdigest()

    def add(self, verdict: str, idea: str, values: list, phase: str = "", code: str = "", **extra) -> None:
        """One record; values: the metric of each run."""
        self.n += 1
        self.when += 420
        n, code, sigma = len(self.key), code or self.code, record.sigma(self.groups)
        runs, files = [], []
        for i, v in enumerate(values or [0]):
            found, raw = ranks(self.rng, n, v or 1)
            metrics = {"mean_rank": v, "median_rank": v / 2.2, "gallery": n, "random": (n + 1) / 2,
                       "i2t": [2.1, 8.9, 15.2], "t2i": [1.9, 8.1, 14.0]}  # fmt: skip
            run = {"seed": self.rng.randrange(2**30), "outcome": "ok" if values else "failed", "metrics": metrics,
                   "reason": "crash after 7.1 s, 31 of 300 steps",
                   "train": {"claims": {"steps": "300", "loss": "4.1 -> 2.3", "peak_memory": "1.31 GB"}},
                   "timing": {"total": 74.0 + 5 * i, "train": 61.0 + 4 * i}}  # fmt: skip
            runs.append(run)
            if values and not i:
                files += [("ranks.npy", raw), ("examples.npy", examples(self.rng, found, self.key))]
        r = {"experiment": self.n, "verdict": verdict, "hypothesis": idea, "metric": "mean_rank", "runs": runs,
             "reason": "" if values else runs[0]["reason"], "phase": phase, "sigma": sigma, "before": self.incumbent,
             "train": self.blob(code), "comparable": extra.pop("comparable", "c0ffee"), "by_hand": False,
             "branch": "main", "chain": extra.pop("chain", ""), "web": ""}  # fmt: skip
        if values and self.incumbent and verdict in ("kept", "discarded"):
            g = record.gain(values, self.incumbent)
            r |= {"percent": round((math.exp(-g) - 1) * 100, 1), "sigmas": round(g / sigma, 1)}
        loss = log(self.rng, 4.2, 2 + (values or [200])[0] / 200)
        files += [("result.json", json.dumps(r | extra).encode()), ("train.log", loss)]
        self.commit(result.message(r), code, files)
        if values and verdict in ("kept", "baseline"):
            self.incumbent, self.code, self.parent = values, code, f"refs/experiments/{self.n}"
        if values:
            self.groups.append(values)

    def commit(self, message: str, code: str, files: list) -> None:
        def data(b: bytes) -> None:
            self.out.write(b"data %d\n%s\n" % (len(b), b))

        self.out.write(f"commit refs/experiments/{self.n}\ncommitter T <t@example.org> {self.when} +0000\n".encode())
        data(message.encode())
        self.out.write(f"from {self.parent}\nM 100644 inline train.py\n".encode())
        data(code.encode())
        for name, content in files:
            self.out.write(f"M 100644 inline experiment/{name}\n".encode())
            data(content)

    def done(self) -> None:
        self.git("fast-import", "--quiet", "--force", data=self.out.getvalue())


def day(path: Path, count: int = 40, hostile: str = "", old: int = 0) -> Day:
    """A day like a real one: mean rank from 285 to about 160 of 2,000; scaled to the gallery that is there."""
    made = Day(path)
    rng, scale = made.rng, (len(made.key) + 1) / 2001
    true = 285.0 * scale
    for i in range(old):
        made.add("discarded" if i else "baseline", f"measured with other data, {i}", [true * 2], comparable="old")
    made.groups = []
    made.add("baseline", "baseline", [true * 1.02, true * 0.98])
    phases = ["first", "second", "third", "fourth", "fifth"]
    if "## Phase 1 — get" in (path / "program.md").read_text():
        phases = ["get the baseline right", "the expert mechanism", "architecture", "advanced", "moonshots"]
    for i in range(count):
        phase, idea = phases[min(4, i * 5 // count)], IDEAS[i % len(IDEAS)]
        if hostile and i % 7 == 3:
            idea = hostile
        if i in (5, 17, 29):
            made.add("failed", idea, [], phase, made.code + f"\nBROKEN = {i}\n")
            continue
        good = rng.random() < 0.55 or i == 2
        gain = 0.24 if i == 2 else rng.uniform(0.01, 0.075) * 40 / max(count, 40)
        effect = -gain if good else rng.expovariate(1 / 0.09)
        values = [true * math.exp(effect + rng.gauss(0, NOISE * 0.8))]
        name, value = (("WARMUP", 20 + i), ("LR", f"{1e-3 * (1 + i / 7):.2e}"), ("WEIGHT_DECAY", i / 100))[i % 3]
        code = re.sub(rf"^{name} = .*?(  #|$)", rf"{name} = {value}\1", made.code, count=1, flags=re.M)
        if i % 3 == 0:
            code = code.replace("def load(", f"def idea_{i}(x):\n    return x * {i}  # {hostile}\n\n\ndef load(", 1)
        verdict = record.rule(values, made.incumbent, NOISE, 2.0)
        if verdict == "again":
            values.append(true * math.exp(effect + rng.gauss(0, NOISE * 0.8)))
            verdict = record.rule(values, made.incumbent, NOISE, 2.0)
        if verdict == "kept":
            true *= math.exp(effect)
        made.add(verdict, idea, values, phase, code)
        if i in (14, 31):
            made.add("remeasured", "the incumbent, measured once more", [true * math.exp(rng.gauss(0, NOISE))])
    return made


def audit(made: Day, gallery: int = 1000) -> None:
    half = (gallery + 1) / (len(made.key) + 1)
    sides = {}
    for name, at in (("baseline", 285 * (len(made.key) + 1) / 2001), ("best", record.geometric(made.incumbent) * 1.03)):
        values = [at * half * math.exp(made.rng.gauss(0, NOISE)) for _ in range(3)]
        mean = sum(values) / 3
        sides[name] = {"values": values, "mean": mean, "se": (sum((v - mean) ** 2 for v in values) / 6) ** 0.5}
    percent = (sides["best"]["mean"] / sides["baseline"]["mean"] - 1) * 100
    made.add("audit", "audit: baseline and best, fresh seeds", [], comparable="", audit={
        "metric": "mean_rank", "gallery": gallery, "split": "audit", "sides": sides,
        "difference": {"percent": percent, "low": percent - 5, "high": percent + 5},
        "ablation": [{"experiment": 4, "hypothesis": IDEAS[2], "values": [180.0], "percent": 9.1, "low": 2, "high": 16},
                     {"experiment": 9, "hypothesis": IDEAS[8], "not_separable": True}]})  # fmt: skip
    metrics = {"mean_rank": 81.3, "median_rank": 30.5, "gallery": 1000, "random": 500.5, "i2t": [4.1, 15.2, 25.0],
               "t2i": [3.9, 14.8, 24.1]}  # fmt: skip
    final = {"split": "test", "looks": 1, "metrics": metrics}
    made.add("final", "final: the test split", [], comparable="", final=final)


if __name__ == "__main__":
    made = day(Path(sys.argv[1]), int((sys.argv[2:] or ["40"])[0]))
    audit(made)
    made.done()
