#!/usr/bin/env python3
"""Prepares a data set once, so that training only reads memory-mapped uint8. Runs inside the container image.

    python prepare_data.py prints --out DIR                the built-in woodblock prints, drawn here
    python prepare_data.py ukiyo-e --out DIR               Ukiyo-eVG, real prints, and pretrained weights, fetched
    python prepare_data.py NAME --odvg FOLDER --out DIR    your own images and annotations
    python prepare_data.py NAME --add trainval --out DIR   to a data set: one table of training and validation pairs
    python prepare_data.py prints --add audit=K --out DIR  to the prints: as many pairs as for validation, never used

FOLDER holds train.jsonl, val.jsonl, test.jsonl and images/. Every line describes one image:

    {"filename": "a.png", "width": 400, "height": 100,
     "grounding": {"caption": "...", "regions": [{"phrase": "...", "bbox": [x0, y0, x1, y1]}]}}

with boxes in pixels. Images are stretched to a square: nothing is cut off, no pixel is spent on padding, and a box in
units of the image's width and height stays right. Every problem is reported with its file and line, and then nothing
is written.

What DIR holds afterwards:

    info.json                      sizes, source, licence, a hash of the whole content, and bytes and SHA-256 of each
                                   file that is read later
    train/                         a `datasets` table: image (3*S*S uint8, channels first), caption,
                                   regions [{phrase, bbox}] with boxes in [0, 1], possibly none
    val/images/, val/captions/     two tables of one column each, either in a random order of its own
    val.key.npy                    (n,) int64: image i belongs to caption key[i]
    val.regions.json               the regions of every image, in the order of val/images/
    test...                        the same
    preview.png                    a few training images with their captions and boxes

Neither order can be computed without the pairs themselves, so that a program that sees only one side learns nothing
about the key.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import operator
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

import datasets
import imagehash
import numpy as np
from datasets.arrow_writer import ArrowWriter
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent / "container"))

import prints
import ukiyoe

FORMAT = 2  # of info.json; record.py wants the same
SPLITS = ("train", "val", "test")
SIZES = range(16, 1025)  # pixels per side
PRINTS_COUNTS = {"train": 8000, "val": 2000, "test": 1000}
PRINTS_SEED = 7
ROWS_PER_TASK = 32  # what a process is handed at a time
ROWS_PER_BATCH = 256  # of an Arrow file: 7 MB at 96 px
MAX_PROBLEMS_SHOWN = 20
HASH_SIDE = 16  # of a perceptual hash: 256 bits
# Bits by which the hashes of two impressions of a block may differ. Measured on 1,000 drawn prints: copies brightened
# by 20 %, cut by 2 % and stored anew as JPEG differ by up to 46, 9 in 10 of them by up to 40; of 500,000 pairs of
# different prints five come below 46. The usual 64 bits tell them apart worse: at 10, which also finds 9 in 10 copies,
# 1 in 2,000 pairs of different prints is one, so a training print would on average have a double among 2,199 others.
HASH_BITS = 40
PREVIEW_COLOURS = 128  # of preview.png, which an agent that looks at it carries along in every request
BOX_SLACK = 1.0  # pixels a box may stick out by and is cut back: annotation tools round outwards

# A row is one image (3, S, S) uint8, its caption, and its regions [{phrase, bbox}] with boxes in [0, 1].
Row = tuple[np.ndarray, str, list[dict]]
# A job is the name of a row, for messages, and a function of S that makes it or says in a line what is wrong with it.
# It is run in another process. A source lists its jobs for every split, and may append to the problems.
Job = tuple[str, Callable[[int], Row | str]]


def list_prints(options: argparse.Namespace, *_: object) -> dict[str, list[Job]]:
    """Print 0 and following are the training split, then come validation and test."""
    jobs, start = {}, 0
    for split in SPLITS:
        end = start + (getattr(options, split) or PRINTS_COUNTS[split])
        jobs[split] = [(f"print {index}", partial(prints.draw, PRINTS_SEED, index)) for index in range(start, end)]
        start = end
    return jobs


def list_ukiyoe(options: argparse.Namespace, problems: list[str], report: dict) -> dict[str, list[Job]]:
    """Ukiyo-eVG, fetched first. What was fetched stays until the data set is written."""
    given = {name: getattr(options, name) for name in GIVEN}
    folder, used = download_folder(options.out), {}
    try:
        images = ukiyoe.fetch(folder, options.out.with_name("weights"), given, report).resolve()
    except ukiyoe.FetchError as error:
        problems.append(str(error))
        return {}
    return {split: list(read_odvg(folder / f"{split}.jsonl", images, used, problems)) for split in SPLITS}


def download_folder(out: Path) -> Path:
    return out.with_name(out.name + ".download")


def list_odvg(options: argparse.Namespace, problems: list[str], _: dict) -> dict[str, list[Job]]:
    """The images and annotations in a folder."""
    images = (options.odvg / "images").resolve()
    if not images.is_dir():
        problems.append(f"{options.odvg / 'images'} is not a folder; put the images there")
        return {}
    used: dict[Path, str] = {}
    return {split: list(read_odvg(options.odvg / f"{split}.jsonl", images, used, problems)) for split in SPLITS}


def read_odvg(file: Path, images: Path, used: dict[Path, str], problems: list[str]) -> Iterator[Job]:
    """The jobs of the good lines; `used` says which line uses an image."""
    try:
        lines = [(number, line) for number, line in enumerate(file.read_bytes().splitlines(), 1) if line.strip()]
    except OSError as error:
        problems.append(f"{file.name}: cannot be read ({error.strerror}); every split needs its file")
        return
    if not lines:
        problems.append(f"{file.name}: is empty; every split needs at least one image")
    for number, line in lines:
        where = f"{file.name} line {number}"
        try:
            entry = json.loads(line)
            name, size, caption = entry["filename"], (entry["width"], entry["height"]), entry["grounding"]["caption"]
            regions = [(region["phrase"], region["bbox"]) for region in entry["grounding"]["regions"]]
        except ValueError as error:
            problems.append(f"{where}: not JSON ({error}); write one object per line")
            continue
        except (KeyError, TypeError) as error:
            problems.append(
                f"{where}: write filename, width, height, grounding: {{caption, regions: "
                f"[{{phrase, bbox}}]}}, the list empty where there are none ({error!r:.80})"
            )
            continue
        path = (images / str(name)).resolve()
        faults = list(check_line(size, caption, regions))
        if not path.is_relative_to(images):
            faults.append(f"image {name!r:.80} leaves the folder images/; put it there")
        elif path in used:
            faults.append(f"image {name!r:.80} was used before, in {used[path]}; keep one of them")
        elif not path.is_file():
            faults.append(f"image {name!r:.80} is not in images/; add it or remove the line")
        used.setdefault(path, where)
        problems += [f"{where}: {fault}" for fault in faults]
        if not faults:
            in_units = [{"phrase": phrase, "bbox": to_units(box, size)} for phrase, box in regions]
            yield where, partial(load_image, path, size, caption, in_units)


def check_line(size: tuple, caption: object, regions: list[tuple]) -> Iterator[str]:
    """What is wrong with a line, as far as can be told without the image."""
    texts = {"the caption": caption}
    texts |= {f"the phrase of region {number}": phrase for number, (phrase, _) in enumerate(regions, 1)}
    for what, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            yield f"{what} is {text!r:.80}; write a text or remove it"
    if not all(type(side) is int and side > 0 for side in size):
        yield f"width and height are {size!r:.80}; write the numbers of pixels"
        return
    for number, (_, box) in enumerate(regions, 1):
        what = f"bbox {box!r:.80} of region {number}"
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)):
            yield f"{what} is not four numbers; write [x0, y0, x1, y1]"
        elif not all(-BOX_SLACK <= value <= side + BOX_SLACK for value, side in zip(box, size * 2, strict=True)):
            yield f"{what} leaves the image of {size[0]}x{size[1]} pixels; cut it to the image"
        elif not np.all(np.less(to_units(box, size)[:2], to_units(box, size)[2:])):
            yield f"{what} has no area; write [x0, y0, x1, y1] with x0 < x1 and y0 < y1"


def to_units(box: list[float], size: tuple[int, int]) -> list[float]:
    """A box in pixels as a box in [0, 1]."""
    return [round(min(1.0, max(0.0, value / side)), 6) for value, side in zip(box, size * 2, strict=True)]


def load_image(path: Path, stated: tuple[int, int], caption: str, regions: list[dict], size: int) -> Row | str:
    """The image stretched to a square; what is transparent becomes white, as paper is."""
    try:
        with Image.open(path) as image:
            if image.size != stated:
                found = f"{image.width}x{image.height}"
                return f"image {path.name!r} has {found} pixels, not {stated[0]}x{stated[1]}; correct width and height"
            if image.mode.startswith(("I", "F")):  # Pillow would clip it to white
                return f"image {path.name!r} has mode {image.mode}; save it with 8 bits a channel"
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return f"image {path.name!r} cannot be decoded ({error!s:.80}); replace it"
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)), caption, regions


# What lists the jobs, pixels per side, source, licence, and whether several prints were made from one block.
SOURCES = {
    "prints": (list_prints, 96, "drawn by container/prints.py", "that of this repository", False),
    "ukiyo-e": (list_ukiyoe, 224, f"Ukiyo-eVG (selinakhan/vg_art), images of {ukiyoe.RECORD}", "theirs", True),
}
OWN = (list_odvg, 96, "images and annotations in ODVG format", "that of the images", False)
GIVEN = ("annotations", "images", "weights")  # local copies for ukiyo-e


def write_data_set(options: argparse.Namespace, folder: Path) -> list[str]:
    """Writes everything. Where it returns problems, what it wrote is of no use."""
    list_jobs, size, source, licence, doubles = OWN if options.odvg else SOURCES[options.name]
    size, problems, report = options.size or size, [], {}
    jobs = list_jobs(options, problems, report)
    tables, digests, seen, hashes = {}, {}, {}, []
    # Forked, because they need nothing but numpy and Pillow, and starting anew would import everything in each.
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("fork")) as pool:
        for split in reversed(jobs) if doubles else jobs:
            makers = [make for _, make in jobs[split]]
            rows = pool.map(operator.call, makers, repeat(size), chunksize=ROWS_PER_TASK)
            rows = ukiyoe.Bar(rows, split, len(makers), unit=" images")
            named = ((where, row) for (where, _), row in zip(jobs[split], rows, strict=True))
            if doubles:
                named, seen = watch_doubles(named, split, hashes, report), {}
            tables[split], digests[split] = store_rows(named, folder / f"{split}.arrow", size, seen, problems)
            print(f"{split}: {len(makers)} images", file=sys.stderr, flush=True)
    if problems:
        return problems
    tables["train"].save_to_disk(folder / "train", num_shards=1)
    content = hashlib.sha256(digests["train"].encode())
    for split in ("val", "test"):
        key = store_pairs_apart(tables[split], digests[split], folder, split)
        content.update(digests[split].encode() + key.astype("<i8").tobytes())
    sheet = prints.draw_sheet([make(prints.TILE) for _, make in jobs["train"][: prints.TILES]])
    sheet.quantize(PREVIEW_COLOURS).save(folder / "preview.png", optimize=True)
    for split in SPLITS:
        (folder / f"{split}.arrow").unlink()
    info = {"format": FORMAT, "name": options.name, "image_size": size}
    info |= {split: len(tables[split]) for split in SPLITS} | report
    for what, count in report.items():
        print(f"{what.replace('_', ' ')}: {count}", file=sys.stderr, flush=True)
    info |= {
        "source": source,
        "licence": licence,
        "hash": content.hexdigest(),
        "made_by": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "pillow", "datasets")},
        },
    }
    for file in folder.rglob("state.json"):  # the random mark in it would make the same data differ
        mark = hashlib.sha256(f"{content.hexdigest()} {file.relative_to(folder)}".encode()).hexdigest()[:16]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_fingerprint": mark}, indent=2) + "\n")
    info["files"] = dict(
        describe(file, folder) for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".png"
    )
    (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")
    return []


def describe(file: Path, folder: Path) -> tuple[str, tuple[int, str]]:
    """Its name in the folder, its size, and its digest."""
    with file.open("rb") as f:
        return str(file.relative_to(folder)), (file.stat().st_size, hashlib.file_digest(f, "sha256").hexdigest())


def look(pixels: np.ndarray) -> np.ndarray:
    """Perceptual hash (4,) uint64 of an image (3, S, S) uint8."""
    return np.packbits(imagehash.phash(Image.fromarray(pixels.transpose(1, 2, 0)), HASH_SIDE).hash).view(np.uint64)


def is_like_one_of(others: np.ndarray, mine: np.ndarray) -> bool:
    """Whether one of the hashes (n, 4) is near this one (4,)."""
    return bool(np.any(np.bitwise_count(others ^ mine).sum(axis=1) <= HASH_BITS))


def watch_doubles(
    rows: Iterator[tuple[str, Row | str]], split: str, hashes: list[np.ndarray], report: dict
) -> Iterator[tuple[str, Row | str]]:
    """Leaves out training images that look like one of validation or test, which come first, test before validation.

    Those of validation that look like one of test are only counted. `hashes` are those of the images so far, (4,)
    uint64 each.
    """
    others = np.array(hashes, np.uint64).reshape(-1, HASH_SIDE**2 // 64)
    doubles = 0
    for where, row in rows:
        if not isinstance(row, str):
            hashes.append(look(row[0]))
            double = is_like_one_of(others, hashes[-1])
            doubles += double
            if double and split == "train":
                continue
        yield where, row
    if split != "test":
        report["training_doubles_left_out" if split == "train" else "validation_like_test"] = doubles


def store_rows(
    rows: Iterator[tuple[str, Row | str]],
    file: Path,
    size: int,
    seen: dict[bytes, tuple[Path, str]],
    problems: list[str],
) -> tuple[datasets.Dataset, str]:
    """Streams a split into an Arrow file, so that it need not fit into memory; the table and a hash of all rows.

    `seen` says where a picture was found first, as the same picture must not be in two splits.
    """
    box, text = datasets.List(datasets.Value("float32"), length=4), datasets.Value("string")
    image = datasets.List(datasets.Value("uint8"), length=3 * size * size)
    features = datasets.Features(image=image, caption=text, regions=datasets.List({"phrase": text, "bbox": box}))
    content = hashlib.sha256()
    with ArrowWriter(path=str(file), features=features, writer_batch_size=ROWS_PER_BATCH) as writer:
        for where, row in rows:
            if isinstance(row, str):
                problems.append(f"{where}: {row}")
                continue
            pixels, caption, regions = row
            first_file, first = seen.setdefault(hashlib.sha256(pixels).digest(), (file, where))
            if first_file != file:
                problems.append(f"{where}: the image shows the same as that of {first}; keep it in one split only")
            content.update(pixels)
            content.update(json.dumps([caption, regions]).encode())
            writer.write({"image": pixels.reshape(-1), "caption": caption, "regions": regions})
        writer.finalize()
    return datasets.Dataset.from_file(str(file)), content.hexdigest()


def store_pairs_apart(table: datasets.Dataset, digest: str, folder: Path, split: str) -> np.ndarray:
    """Writes images and captions in two orders of their own, and beside them the key (n,) int64, which it returns.

    The secret of the orders is the content of all pairs in the order of the source: a program that is given one side
    only, or a constant of this file, cannot redo them.
    """
    orders = {}
    for column in ("image", "caption"):
        marks = [hashlib.sha256(f"{digest} {column}s {row}".encode()).digest() for row in range(len(table))]
        orders[column] = np.array(sorted(range(len(table)), key=marks.__getitem__), dtype=np.int64)
        table.select_columns(column).select(orders[column]).save_to_disk(folder / split / f"{column}s", num_shards=1)
    key = np.argsort(orders["caption"])[orders["image"]].astype(np.int64)
    np.save(folder / f"{split}.key.npy", key)
    regions = table.select_columns("regions").select(orders["image"])["regions"]
    (folder / f"{split}.regions.json").write_text(json.dumps(list(regions)) + "\n")
    return key


def add_trainval(folder: Path, staging: Path) -> None:
    """One table of the training and the validation pairs, for ./run.sh final; without those that look like test."""
    images, captions = (datasets.load_from_disk(folder / "val" / side) for side in ("images", "captions"))
    pairs = images.add_column("caption", list(captions.select(np.load(folder / "val.key.npy"))["caption"]))
    train = datasets.load_from_disk(folder / "train")
    regions = json.loads((folder / "val.regions.json").read_text())
    pairs = pairs.add_column("regions", regions, feature=train.features["regions"]).cast(train.features)
    info = json.loads((folder / "info.json").read_text())
    if "validation_like_test" in info:
        shape = (3, info["image_size"], info["image_size"])
        test = datasets.load_from_disk(folder / "test" / "images").with_format("numpy", dtype=np.uint8)
        others = np.stack([look(row["image"].reshape(shape)) for row in test])
        looks = (look(row["image"].reshape(shape)) for row in images.with_format("numpy", dtype=np.uint8))
        pairs = pairs.select([i for i, mine in enumerate(looks) if not is_like_one_of(others, mine)])
    datasets.concatenate_datasets([train, pairs]).save_to_disk(staging / "trainval", num_shards=1)


def add_audit(folder: Path, staging: Path, number: int) -> None:
    """Pairs for audit `number`, drawn with indices that no split and no other audit has."""
    info = json.loads((folder / "info.json").read_text())
    first = sum(info[split] for split in SPLITS) + number * info["val"]
    rows = ((f"print {i}", prints.draw(PRINTS_SEED, i, info["image_size"])) for i in range(first, first + info["val"]))
    rows = ukiyoe.Bar(rows, "audit", info["val"], unit=" images")
    table, digest = store_rows(rows, staging / "audit.arrow", info["image_size"], {}, [])
    store_pairs_apart(table, digest, staging, "audit")


def add(options: argparse.Namespace) -> list[str]:
    """Adds pairs to a data set, in the place of those that an earlier call added."""
    staging = options.out / "add.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    os.umask(0o022)
    if options.add == "trainval":
        add_trainval(options.out, staging)
    else:
        add_audit(options.out, staging, int(options.add.removeprefix("audit=")))
        (staging / "audit.arrow").unlink()
    for new in sorted(staging.iterdir()):
        old = options.out / new.name
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        new.rename(old)
    staging.rmdir()
    return []


def prepare(options: argparse.Namespace) -> list[str]:
    """Writes the data set, completely or, where it returns problems, not at all."""
    out, staging = options.out, options.out.with_name(options.out.name + ".partial")
    if not out.parent.is_dir():
        return [f"{out.parent} is not a folder; make it first"]
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        return [f"{out} is not an empty folder; remove it, or give another one"]
    os.umask(0o022)  # everybody may read it
    shutil.rmtree(staging, ignore_errors=True)  # left by a run that was killed
    staging.mkdir()
    try:
        problems = write_data_set(options, staging)
        if not problems:
            staging.rename(out)
            shutil.rmtree(download_folder(out), ignore_errors=True)
        return problems
    except BrokenProcessPool:
        return ["a process was killed, perhaps for want of memory; try fewer --processes"]
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prepares a data set.", allow_abbrev=False)
    parser.add_argument("name", help=f"{' or '.join(SOURCES)}, or the name of your own data set (with --odvg)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet, or be empty")
    parser.add_argument("--odvg", type=Path, help="folder with train.jsonl, val.jsonl, test.jsonl and images/")
    for what in GIVEN:
        parser.add_argument(f"--{what}", type=Path, help=f"ukiyo-e: local folder with the {what}, or archive of images")
    parser.add_argument("--size", type=int, help="pixels per side")
    parser.add_argument("--add", help="trainval or audit=NUMBER: add pairs to the data set in --out")
    for split, count in PRINTS_COUNTS.items():
        parser.add_argument(f"--{split}", type=int, help=f"number of {split} images, for prints only ({count})")
    default_processes = max(2, len(os.sched_getaffinity(0)))
    parser.add_argument("--processes", type=int, default=default_processes, help="(%(default)s)")
    options = parser.parse_args(arguments)
    given = [split for split in SPLITS if getattr(options, split) is not None]
    if options.size is not None and options.size not in SIZES:
        parser.error(f"--size must be {SIZES[0]} to {SIZES[-1]}")
    additions = r"trainval|audit=\d{1,6}" if options.name == "prints" else "trainval"
    if options.add and not re.fullmatch(additions, options.add):
        parser.error("--add takes trainval, and for the prints audit=NUMBER")
    if options.processes < 1 or any(getattr(options, split) < 1 for split in given):
        parser.error("counts must be 1 or more")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", options.name):
        parser.error("a name is lower-case letters, digits, dots, dashes and underscores")
    if not options.odvg and not options.add and options.name not in SOURCES:
        known = " or ".join(SOURCES)
        parser.error(f"unknown data set {options.name}; take {known}, or give your own with --odvg FOLDER")
    if options.odvg and options.name in SOURCES:
        parser.error(f"{options.name} is a built-in data set; give your own another name")
    if options.name != "ukiyo-e" and any(getattr(options, what) for what in GIVEN):
        parser.error(f"--{', --'.join(GIVEN)} are for ukiyo-e only")
    if given and options.name != "prints":
        parser.error(f"--{', --'.join(given)}: the number of images can be chosen for prints only")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    datasets.disable_progress_bars()
    try:
        problems = (add if options.add else prepare)(options)
    except OSError as error:
        problems = [str(error)]
    if not problems:
        return 0
    print(*problems[:MAX_PROBLEMS_SHOWN], sep="\n", file=sys.stderr)
    hidden = len(problems) - MAX_PROBLEMS_SHOWN
    more = f" ({hidden} more than shown)" if hidden > 0 else ""
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    print(f"error: {count}{more}; nothing was written", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
