"""Speed against what a user would have otherwise, in one run on this machine, as a table (speed.md beside this file).

usage: python3 tests/bench/speed.py [--data data/prints] [--rounds 5] [--only input,evaluation,...] [--out FILE]

Every part runs inside the image, in a sandbox with the flags of a training. Ours and theirs take turns; a figure is the
median of its turns, after one turn of each that does not count. With a GPU, the step is also measured for ViT-S/16
at batch 64 to 512, as a share of what the card does in a large bf16 matmul; nothing has to be set for that.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
INSIDE = sys.argv[1:2] == ["inside"]
sys.path[:0] = [str(ROOT), *(str(ROOT / "container" / room) for room in ("inside", "data_sets", "harness"))]
if INSIDE:
    import numpy as np
    import open_clip
    import torch
    from open_clip_train.train import train_one_epoch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset
    from torch.utils.flop_counter import FlopCounterMode

    import judge
    import prepare_data
    import prints
    import train

    CUDA = torch.cuda.is_available()
    DEVICE = "cuda" if CUDA else "cpu"
else:
    import engine

MEMORY = "8g"
LIMIT_S = 3600  # of one part
SIZE = 224  # px, of the input and of the GPU's models
JPEG_SIDES, JPEG_QUALITY = (512, 1024), 90  # px; small and usual for a scanned print
IMAGES, BATCH = 512, 64
WORKERS = 4  # of their DataLoader
GALLERIES, WIDTHS = (1100, 3300, 20000), (64, 512)  # rows; numbers a row: train.py's and CLIP's
BIG, BIG_ROUNDS = 20000, 2  # a turn of theirs takes 10 s there
RARE = 1e-3  # share of rows where another score equals the true one: sorting breaks such a tie, ours counts it half
SKIP, STEPS = 4, 20  # steps of a turn that do not count, and that do
GPU_BATCHES = (64, 128, 256, 512)
MATMUL, MATMULS = 8192, 20  # side and number of the products that show the card's limit
NOTES = f"""Both sides do the same work; all they read is in memory before the clock starts.

- input: {IMAGES} images, batches of {BATCH} in random order, to normalised float32 on the device; equal (checked).
  Ours: rows of the tensor that `load_data` returns, through `ECLIP.image` without its tower. Theirs: JPEG files of
  quality {JPEG_QUALITY}, Pillow, open_clip's transform, a DataLoader with {WORKERS} workers, already running.
- evaluation: one direction. Ours: `judge.ranks`. Theirs: numpy's argsort of each row of the same float32 scores,
  computed in the same chunks; equal ranks but for rare ties (checked). Width 64 is train.py's; 512 is CLIP's, where the
  scores, which are the same work on both sides, take most of the time.
- step: ours is `train.main` as it is, with every step an ordinary one; row indexing and normalising are included.
  Theirs is `open_clip_train.train.train_one_epoch` as it is, on batches normalised and on the device beforehand, with
  its `ClipLoss`, its clamp, AdamW as `open_clip_train.main` sets it up, and our clipping of gradients. The same model
  from random weights, float32 on a CPU, bf16 autocast on a GPU.
- compile: train.py's model under `torch.compile` with an empty cache, against eager; loss and gradients equal
  (checked)."""


# --- inside the image ------------------------------------------------------------------------------------------------


def row(part: str, what: str, ours: str, theirs: str, ratio: float, want: float | None, note: str = "") -> dict:
    return {"part": part, "what": what, "ours": ours, "theirs": theirs, "ratio": ratio, "want": want, "note": note}


def in_turn(rounds: int, *sides: Callable[[], float], first: int = 1) -> list[float]:
    """The median of what each side returns: called in turn, the first turn left out, unless they had it."""
    turns = [[side() for side in sides] for _ in range(first + rounds)]
    return [statistics.median(column) for column in zip(*turns[first:])]


def now() -> float:
    """Seconds, when the device has done what it was given."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(work: Callable[[], object]) -> float:
    start = now()
    work()
    return now() - start


def prepare(count: int, side: int) -> tuple[list[Path], str, float]:
    """JPEG files of prints, the training table that prepare_data makes of them, and the seconds it takes."""
    folder = Path(f"/tmp/jpegs-{side}")
    images, lines = folder / "images", []
    images.mkdir(parents=True)
    for index in range(count + 2):
        pixels, caption, _ = prints.draw(prepare_data.PRINTS_SEED, index, side)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(images / f"{index}.jpg", quality=JPEG_QUALITY)
        about = {"filename": f"{index}.jpg", "width": side, "height": side}
        lines.append(json.dumps(about | {"grounding": {"caption": caption, "regions": []}}))
    for split, part in {"train": lines[:count], "val": lines[-2:-1], "test": lines[-1:]}.items():
        (folder / f"{split}.jsonl").write_text("\n".join(part))
    command = ["jpegs", "--odvg", str(folder), "--size", str(SIZE), "--out", str(folder / "table")]
    took = seconds(lambda: prepare_data.main(command))
    return [images / f"{index}.jpg" for index in range(count)], str(folder / "table" / "train"), took


def measure_input(rounds: int) -> Iterator[dict]:
    yield from (compare_input(rounds, side) for side in JPEG_SIDES)


def compare_input(rounds: int, side: int) -> dict:
    files, table, took = prepare(IMAGES, side)
    data, train.BATCH = train.load_data(table, DEVICE), BATCH
    scale = train.MODELS[data.kind][3]
    no_tower = SimpleNamespace(pixels=scale, clip=SimpleNamespace(visual=lambda x: x))
    mean, deviation = ((x / 255,) * 3 for x in scale)
    transform = open_clip.image_transform((SIZE, SIZE), False, mean, deviation, resize_mode="squash")
    options = {"batch_size": BATCH, "num_workers": WORKERS, "pin_memory": CUDA}

    class Jpegs(Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> torch.Tensor:
            return transform(Image.open(files[i]))

    def ours() -> None:
        for rows in itertools.islice(batches, len(files) // BATCH):
            train.ECLIP.image(no_tower, data.images[torch.from_numpy(rows).to(DEVICE)])

    def theirs() -> None:
        for images in loader:
            images.to(DEVICE, non_blocking=True)

    first = next(iter(DataLoader(Jpegs(), **options)))
    torch.testing.assert_close(train.ECLIP.image(no_tower, data.images[:BATCH]).cpu(), first, rtol=0, atol=1e-4)
    loader = DataLoader(Jpegs(), shuffle=True, persistent_workers=True, **options)
    batches = train.batches(len(files), np.random.default_rng(0))
    a, b = in_turn(rounds, lambda: len(files) / seconds(ours), lambda: len(files) / seconds(theirs))
    note = f"once: {took:.0f} s to make the table of {len(files)}"
    what = f"images/s into the step at {SIZE} px, from JPEG of {side} px"
    return row("input", what, f"{a:,.0f}", f"{b:,.0f}", a / b, 20, note)


def ranks_by_sorting(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """What sorting every row gives; the scores are computed as judge.ranks does, ties are not looked at."""
    out = np.empty(len(queries))
    for start in range(0, len(queries), judge.CHUNK):
        for i, scores in enumerate(queries[start : start + judge.CHUNK] @ gallery.T, start):
            out[i] = 1 + np.flatnonzero(np.argsort(-scores) == i)[0]
    return out


def peak(work: Callable[[], object]) -> float:
    """MB that the work allocates at most."""
    tracemalloc.start()
    work()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 1e6


def measure_evaluation(rounds: int) -> Iterator[dict]:
    rng = np.random.default_rng(0)
    for n, width in itertools.product(GALLERIES, WIDTHS):
        captions = rng.standard_normal((n, width), dtype=np.float32)
        images = captions + 4 * rng.standard_normal((n, width), dtype=np.float32)
        pair = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, captions)]
        apart = np.abs(judge.ranks(*pair) - ranks_by_sorting(*pair))
        assert apart.max() <= 1 and (apart > 0).mean() < RARE, f"different ranks: {apart.max()}, {(apart > 0).mean():%}"
        sides = [lambda f=f, pair=pair: seconds(lambda: f(*pair)) * 1e3 for f in (judge.ranks, ranks_by_sorting)]
        a, b = in_turn(min(rounds, BIG_ROUNDS) if n == BIG else rounds, *sides, first=0)
        most, full = peak(lambda pair=pair: judge.ranks(*pair)), 4 * n * n / 1e6
        assert n < BIG or most < full / 4, f"{most} MB: too close to all scores at once"
        note = f"peak {most:,.0f} MB; all scores at once: {full:,.0f} MB" if n == BIG else ""
        yield row("evaluation", f"ranks, n = {n:,}, width {width}", f"{a:,.1f} ms", f"{b:,.1f} ms", b / a, 3, note)


class Clock(Exception):
    """Called by either loop with the number of every step; ends the loop by raising itself."""

    def __call__(self, step: int) -> None:
        if step == SKIP:
            self.start = now()
        if step == SKIP + STEPS:
            self.took = now() - self.start
            raise self

    def of(self, loop: Callable[[], object]) -> float:
        """Seconds of a step."""
        with contextlib.suppress(Clock), contextlib.redirect_stdout(sys.stderr):
            loop()
        return self.took / STEPS


def our_loop(data: train.Data, batch: int) -> float:
    """Seconds of a step of train.main, taken where it asks for the learning rate of a new step."""
    clock, seen, rate = Clock(), set(), train.learning_rate

    def learning_rate(step: int, *rest: int) -> float:
        if step not in seen:
            clock(step)
        seen.add(step)
        return rate(step, *rest)

    os.environ.update(DATA="", OUT="/out", SEED="1", BUDGET_S=str(LIMIT_S))
    train.BATCH, train.EXPERT_PROB, train.learning_rate = batch, 0.0, learning_rate
    train.load_data, train.start_from_published = lambda *_: data, lambda *_: None
    try:
        return clock.of(train.main)
    finally:
        train.learning_rate = rate


def side_of(data: train.Data) -> int:
    return data.images.shape[-1]


def their_loop(data: train.Data, batch: int) -> float:
    """Seconds of a step of open_clip's train_one_epoch with the same towers, taken where it calls its scheduler."""
    width, vision, text, (mean, deviation), _ = train.MODELS[data.kind]
    vision, text = vision | {"image_size": side_of(data)}, text | {"vocab_size": len(data.vocabulary) + 1}
    model = open_clip.CLIP(width, vision, text, output_dict=True).to(DEVICE)
    plain, matrices = [], []
    for name, p in model.named_parameters():  # as open_clip_train.main
        exempt = p.ndim < 2 or any(mark in name for mark in ("bn", "ln", "bias", "logit_scale"))
        (plain if exempt else matrices).append(p)
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": matrices, "weight_decay": train.WEIGHT_DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=train.LR, betas=train.BETAS, eps=1e-6)
    images = (data.images[:batch].float() - mean) / deviation

    class Batches(list):
        num_batches, num_samples = SKIP + STEPS + 1, (SKIP + STEPS + 1) * batch

    source = SimpleNamespace(dataloader=Batches([(images, data.captions[:batch])] * Batches.num_batches))
    source.set_epoch = lambda epoch: None
    args = SimpleNamespace(
        device=DEVICE,
        precision="amp_bf16" if CUDA else "fp32",
        grad_clip_norm=train.GRAD_CLIP,
        accum_freq=1,
        distill=False,
        skip_scheduler=False,
        horovod=False,
        wandb=False,
        rank=0,
        local_rank=0,
        log_local=False,
        world_size=1,
        batch_size=batch,
        log_every_n_steps=15,
    )
    clock, loss = Clock(), open_clip.ClipLoss(cache_labels=True)
    return clock.of(lambda: train_one_epoch(model, {"train": source}, loss, 0, optimizer, None, clock, None, args))


def new_model(data: train.Data) -> train.ECLIP:
    return train.ECLIP(data.kind, side_of(data), data.vocabulary).to(DEVICE)


def work_of_a_pair(data: train.Data) -> float:
    """FLOP, forward and backward."""
    model = new_model(data)
    with FlopCounterMode(display=False) as counter:
        (model.image(data.images[:2])[0].sum() + model.text(data.captions[:2]).sum()).backward()
    return counter.get_total_flops() / 2


def card_limit() -> float:
    """FLOP/s of a large bf16 matmul."""
    a = torch.randn(MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16)
    return 2 * MATMUL**3 * MATMULS / in_turn(5, lambda: seconds(lambda: [a @ a for _ in range(MATMULS)]))[0]


def measure_step(rounds: int) -> Iterator[dict]:
    logging.disable(logging.INFO)

    def compare(what: str, data: train.Data, batch: int) -> tuple[dict, float]:
        a, b = in_turn(rounds, lambda: batch / our_loop(data, batch), lambda: batch / their_loop(data, batch))
        return row("step", f"pairs/s, {what}, batch {batch}", f"{a:,.0f}", f"{b:,.0f}", a / b, 1), a

    yield compare("the built-in task", train.load_data("/data", DEVICE), BATCH)[0]
    if not CUDA:
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = True  # as open_clip_train.main
    limit, (_, table, _) = card_limit(), prepare(max(GPU_BATCHES), JPEG_SIDES[0])
    data = train.load_data(table, DEVICE)
    work = work_of_a_pair(data)
    for batch in GPU_BATCHES:
        found, speed = compare(data.kind, data, batch)
        share = f"{speed * work / limit:.0%} of the card's {limit / 1e12:,.0f} TFLOP/s in bf16"
        yield found | {"note": share}


def measure_compile(rounds: int) -> Iterator[dict]:
    data = train.load_data("/data", DEVICE)
    torch.manual_seed(0)
    model, images, captions = new_model(data), data.images[:BATCH], data.captions[:BATCH]

    def eager() -> torch.Tensor:
        return train.contrastive(model.image(images)[0], model.text(captions), model.logit_scale())

    def step(loss: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        model.zero_grad()
        value = loss()
        value.backward()
        return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    compiled, start = torch.compile(eager), now()
    first = step(compiled)
    start = now() - start
    for x, y in zip(first, step(eager), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)
    a, b = in_turn(4 * rounds, *(lambda f=f: seconds(lambda: step(f)) * 1e3 for f in (compiled, eager)))
    pays = f"pays after {math.ceil(start * 1e3 / (b - a)):,} steps" if b > a else "never pays here"
    what = f"forward and backward, batch {BATCH}; compiled against eager"
    yield row("compile", what, f"{a:.0f} ms", f"{b:.0f} ms", b / a, None, f"start-up {start:.0f} s: {pays}")


# --- on the host -----------------------------------------------------------------------------------------------------


def in_sandbox(part: str, data: Path, rounds: int) -> list[dict]:
    command = ["python", "-Iu", "/repo/tests/bench/speed.py", "inside", part, str(rounds)]
    container = engine.Container(
        name=f"ar-bench-{os.getpid()}",
        image=engine.find_image(),
        command=command,
        memory=MEMORY,
        mounts={"/repo": ROOT, "/data": data / "train"},
        out_size="2g",
        device=0,
    )
    argv = engine.arguments(container)
    return json.loads(subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True).stdout)


def output(*argv: str) -> str:
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine() -> str:
    cpus = [line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    gpu = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") if engine.gpus() else "no GPU"
    client = " ".join([output(engine.name(), "--version"), *engine.client()[1:]])
    return f"{cpus[0] if cpus else platform.machine()}, {os.cpu_count()} cores, {gpu}; {client}"


def report(rows: list[dict], took: float, load: float, args: argparse.Namespace) -> str:
    commit = output("git", "rev-parse", "--short", "HEAD")
    commit += " and uncommitted changes" if output("git", "status", "--porcelain", "-uno") else ""
    lines = [
        "# Speed",
        "",
        f"Written by `python3 tests/bench/speed.py --rounds {args.rounds}` on {time.strftime('%Y-%m-%d')}, "
        f"commit {commit}; {took:.0f} s, load before it {load:.1f}.",
        f"Machine: {machine()}.",
        "",
        "| part | what | ours | theirs | ratio | wanted | |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        want = f">= {r['want']}x" if r["want"] else ""
        cells = r["part"], r["what"], r["ours"], r["theirs"], f"{r['ratio']:.2f}x", want, r["note"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", NOTES, ""])


def main() -> None:
    parts = [name.removeprefix("measure_") for name in globals() if name.startswith("measure_")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "prints", help="the built-in data set")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side that count")
    parser.add_argument("--only", default=",".join(parts), help="parts, with commas between (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"))
    args, started, load = parser.parse_args(), time.monotonic(), os.getloadavg()[0]
    rows = [found for part in args.only.split(",") for found in in_sandbox(part, args.data, args.rounds)]
    text = report(rows, time.monotonic() - started, load, args)
    args.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    if INSIDE:
        print(json.dumps(list(globals()["measure_" + sys.argv[2]](int(sys.argv[3])))))
    else:
        main()
