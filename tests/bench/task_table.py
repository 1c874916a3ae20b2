"""How the built-in task answers: small changes to train.py, several fresh seeds each, as a table.

    python tests/bench/task_table.py --data data/prints --jobs 2 --seeds 3

Run it inside the container image, or wherever torch, open_clip and datasets are installed. Every cell is a training
from scratch in a process of its own. Finished runs stay in --work, so an interrupted table goes on where it stopped; a
changed train.py or data set starts afresh. The table goes to stdout and to task_table.md beside this file.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from datasets import disable_progress_bars, load_from_disk

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))
from changes import PROJECTORS, SOFT_TARGETS  # noqa: E402

Edits = list[tuple[str, str]]  # old text, new text; the old one has to occur exactly once

CLAMP: Edits = [("LOGIT_SCALE_MAX = 2.0", "LOGIT_SCALE_MAX = 100.0")]
DROPOUT: Edits = [
    ("    with torch.autocast(a.", "    a, b = F.dropout(a, 0.1), F.dropout(b, 0.1)\n    with torch.autocast(a.")
]
BEST: Edits = [
    ("EXPERT_PROB = 0.3", "EXPERT_PROB = 1.0"),
    ("LR = 1e-3", "LR = 7e-4"),
    ("EMBED_DIM = 64", "EMBED_DIM = 256"),
    ('"context_length": CONTEXT}', '"context_length": CONTEXT, "no_causal_mask": True}'),
    *SOFT_TARGETS,
]

CHANGES: dict[str, Edits] = {
    "as shipped": [],
    "logit scale clamped at 100": CLAMP,
    "expert off": CLAMP + [("EXPERT_PROB = 0.3", "EXPERT_PROB = 0.0")],
    "expert always": CLAMP + [("EXPERT_PROB = 0.3", "EXPERT_PROB = 1.0")],
    "learning rate 2.5e-4": CLAMP + [("LR = 1e-3", "LR = 2.5e-4")],
    "learning rate 5e-4": CLAMP + [("LR = 1e-3", "LR = 5e-4")],
    "learning rate 3e-3": CLAMP + [("LR = 1e-3", "LR = 3e-3")],
    "embedding 16": CLAMP + [("EMBED_DIM = 64", "EMBED_DIM = 16")],
    "embedding 256": CLAMP + [("EMBED_DIM = 64", "EMBED_DIM = 256")],
    "label smoothing 0.1": CLAMP + [("LABEL_SMOOTHING = 0.0", "LABEL_SMOOTHING = 0.1")],
    "dropout 0.1 on the embeddings": CLAMP + DROPOUT,
    "two-layer projectors": CLAMP + PROJECTORS,
    "batch 128, half the steps": CLAMP + [("BATCH = 64", "BATCH = 128"), ("STEPS = 300", "STEPS = 150")],
    "best by hand": CLAMP + BEST,
}
NOTES = (
    "Mean of the runs ± standard deviation between seeds. Change: of the mean rank, from the shipped file in the first"
    " two rows, from the second row in all that follow, which also have the clamp at 100. Best by hand: expert always,"
    " learning rate 7e-4, embedding 256, equal phrases count as positives of each other, no causal mask."
)


def edited(source: str, edits: Edits) -> str:
    for old, new in edits:
        assert source.count(old) == 1, f"{source.count(old)} times in train.py: {old!r}"
        source = source.replace(old, new)
    return source


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of the true match (the diagonal) in each row: 1 is best, ties count half."""
    true = scores.diagonal()[:, None]
    ties = np.count_nonzero(scores == true, axis=1) - 1
    return 1 + np.count_nonzero(scores > true, axis=1) + ties / 2


@torch.inference_mode()
def evaluate(program: Path, out: Path, data: Path, device: str) -> dict[str, float]:
    """Retrieval on the validation split, both directions, with the encoders that `load` of this train.py returns."""
    spec = importlib.util.spec_from_file_location(program.parent.name, program)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load(str(out), device)
    pixels = load_from_disk(data / "val/images").with_format("arrow")[:]["image"]
    pixels = np.concatenate([chunk.flatten().to_numpy() for chunk in pixels.chunks]).reshape(len(pixels), 3, -1)
    size = math.isqrt(pixels.shape[2])
    images = torch.from_numpy(pixels).view(-1, 3, size, size)
    captions = load_from_disk(data / "val/captions")["caption"][:]
    captions = [captions[row] for row in np.load(data / "val.key.npy")]
    image = torch.cat([model.encode_image(part.to(device)).float().cpu() for part in images.split(250)])
    text = [model.encode_text(captions[i : i + 250]).float().cpu() for i in range(0, len(captions), 250)]
    image, text = (torch.nn.functional.normalize(x, dim=1).numpy() for x in (image, torch.cat(text)))
    assert np.isfinite(image).all() and np.isfinite(text).all()
    scores = image @ text.T
    both = ranks(scores), ranks(scores.T)
    result = {"gallery": len(scores), "mean_rank": float(np.mean([r.mean() for r in both]))}
    result["median_rank"] = float(np.mean([np.median(r) for r in both]))
    for k in (1, 5, 10):
        result[f"r{k}"] = float(np.mean([(r <= k).mean() * 100 for r in both]))
    return result


def one_run(name: str, seed: int, source: str, args: argparse.Namespace) -> dict:
    """The result of one training, from --work if this very run is there."""
    facts = args.data / "info.json"
    identity = [source, str(seed), facts.read_text() if facts.is_file() else str(args.data)]
    folder = args.work / hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    saved, program, out = folder / "result.json", folder / "train.py", folder / "out"
    if saved.is_file():
        return json.loads(saved.read_text())
    out.mkdir(parents=True, exist_ok=True)
    program.write_text(source)
    threads = max(1, len(os.sched_getaffinity(0)) // args.jobs)
    env = os.environ | {
        "DATA": str(args.data / "train"),
        "OUT": str(out),
        "SEED": str(seed),
        "BUDGET_S": str(args.budget),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    started = time.monotonic()
    with (folder / "train.log").open("w") as log:
        status = subprocess.run([sys.executable, program], env=env, stdout=log, stderr=log, check=False).returncode
    text = (folder / "train.log").read_text()
    if status:
        raise SystemExit(f"{name}, seed {seed}: exit status {status}\n{text[-2000:]}")
    claims = dict(line.split(": ", 1) for line in text.split("---\n")[-1].splitlines() if ": " in line)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {"change": name, "seed": seed, "seconds": time.monotonic() - started, "steps": int(claims["steps"])}
    result["short"] = "stopping here" in text
    result |= evaluate(program, out, args.data, device)
    saved.write_text(json.dumps(result, indent=1))
    print(f"{name}, seed {seed}: {result['mean_rank']:.1f} ({result['seconds']:.0f} s)", file=sys.stderr, flush=True)
    return result


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    python = platform.python_version()
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {device}; Python {python}, torch {torch.__version__}"


def table(results: dict[str, list[dict]], args: argparse.Namespace, digest: str) -> str:
    def mean(name: str, key: str) -> float:
        return statistics.mean(run[key] for run in results[name])

    def spread(name: str, key: str) -> str:
        values = [run[key] for run in results[name]]
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"

    names = list(results)
    gallery = results[names[0]][0]["gallery"]
    command = f"python tests/bench/task_table.py --data data/prints --jobs {args.jobs} --seeds {args.seeds}"
    lines = [
        "# The built-in task: what small changes do",
        "",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')}.",
        f"Machine: {machine()}; {args.jobs} trainings at a time.",
        f"`train.py` {digest}, validation gallery {gallery}, random {(gallery + 1) / 2:g}, {args.seeds} seeds.",
        NOTES,
        "",
        "| change | mean rank | change | median | R@1 | R@5 | R@10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, name in enumerate(names):
        gain = 100 * (mean(name, "mean_rank") / mean(names[min(i, 2) // 2], "mean_rank") - 1)
        recall = " | ".join(f"{mean(name, key):.1f}" for key in ("r1", "r5", "r10"))
        cells = [name, spread(name, "mean_rank"), f"{gain:+.1f} %" if i else "", f"{mean(name, 'median_rank'):.0f}"]
        lines.append(f"| {' | '.join(cells)} | {recall} |")
    for key in ("mean_rank", "median_rank"):
        variances = [statistics.variance(math.log(run[key]) for run in runs) for runs in results.values()]
        freedom = len(variances) * (args.seeds - 1)
        noise = 100 * math.sqrt(statistics.mean(variances))
        lines += ["", f"Noise of one run, {key}: {noise:.1f} % (pooled over the table, {freedom} degrees of freedom)."]
    short = [f"{run['change']} seed {run['seed']}" for runs in results.values() for run in runs if run["short"]]
    if short:
        lines += ["", f"Stopped by the budget before their last step, so not comparable: {', '.join(short)}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="prepared data set, the folder with train/ and val/")
    parser.add_argument("--work", type=Path, default=Path("runs/task_table"), help="keeps what has been run")
    parser.add_argument("--out", type=Path, default=HERE / "task_table.md", help="where the table goes")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, which share the cores")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each change, at least 2")
    parser.add_argument("--budget", type=int, default=1800, help="seconds; generous, every run has to reach its end")
    args = parser.parse_args()
    disable_progress_bars()  # which are not made for threads
    original = (HERE.parents[1] / "train.py").read_text()
    sources = {name: edited(original, edits) for name, edits in CHANGES.items()}  # all of them before the first run
    torch.set_num_threads(1)
    with ThreadPoolExecutor(args.jobs) as pool:
        runs = {name: [] for name in sources}
        for seed in range(args.seeds):  # one whole table after another, so that a first one is there early
            for name, source in sources.items():
                runs[name].append(pool.submit(one_run, name, seed, source, args))
        try:
            results = {name: [run.result() for run in group] for name, group in runs.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    digest = hashlib.sha256(original.encode()).hexdigest()[:12]
    text = table(results, args, digest)
    args.out.write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
