"""Prepares a data set once, so that training only reads memory-mapped uint8. Runs inside the container image.

    python prepare_data.py prints --out DIR                the built-in woodblock prints, drawn here
    python prepare_data.py ukiyo-e --out DIR               Ukiyo-eVG, real prints, and pretrained weights, fetched
    python prepare_data.py NAME --odvg FOLDER --out DIR    your own train.jsonl, val.jsonl, test.jsonl and images/
    python prepare_data.py NAME --add trainval --out DIR   to a data set: one table of training and validation pairs
    python prepare_data.py prints --add audit=K --out DIR  to the prints: as many pairs as for validation, never used

Every line of those files describes one image, with boxes in pixels of the upright image, which is stretched to a square
(container/data_sets/odvg.py tells what else is taken).

    {"filename": "a.png", "width": 400, "height": 100,
     "grounding": {"caption": "...", "regions": [{"phrase": "...", "bbox": [x0, y0, x1, y1]}]}}

Every problem is reported with its file and line, and then nothing is written. What DIR holds afterwards:

    info.json                   sizes, source, licence, bytes and SHA-256 of each file that is read later, a hash of
                                all; of the training pairs numbers and a caption, which the agent is told
    train/                      a `datasets` table: image (3*S*S uint8, channels first), caption,
                                regions [{phrase, bbox}] with boxes in [0, 1], possibly none
    val/images/, val/captions/  two tables of one column each, either in a random order of its own
    val.key.npy                 (n,) int64: image i belongs to caption key[i]
    val.regions.json            the regions of every image, in the order of val/images/; test/... are the same
    preview.png                 a few training images with their captions and boxes, at most 100 KB
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import operator
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import repeat
from pathlib import Path

import datasets
import imagehash
import numpy as np
from datasets.arrow_writer import ArrowWriter
from PIL import Image

sys.path.extend(str(Path(__file__).resolve().parent / "container" / part) for part in ("data_sets", "harness"))
import odvg
import prints
import ukiyoe
from odvg import Job, Row
from project import DATA_FORMAT, DATA_NAME, DATA_NAME_HINT, sha256
from ukiyoe import DataError

SPLITS = ("train", "val", "test")
SIZES = range(16, 1025)  # pixels per side
PRINTS_COUNTS = {"train": 8000, "val": 2000, "test": 1000}
PRINTS_SEED = 7
ROWS_PER_TASK = 32  # what a process is handed at a time
ROWS_PER_BATCH = 256  # of an Arrow file: 7 MB at 96 px
MAX_PROBLEMS_SHOWN = 20
FEW_CAPTIONS = 4  # different ones of validation or test: with fewer, chance puts all in order once in six times
HASH_SIDE = 16  # of a perceptual hash: 256 bits
# Bits by which the hashes of two impressions of a block may differ. Of 1,000 drawn prints, brightened by 20 %, cut by
# 2 % and stored as JPEG, 999 differ by no more from their originals; of 500,000 pairs of different prints one does.
HASH_BITS = 40
# Tiles and colours of preview.png: the first that give so few bytes, as an agent that looks carries it along for ever
PREVIEWS, PREVIEW_BYTES = ((8, 128), (8, 64), (4, 128), (4, 64), (4, 32), (4, 8)), 100_000
MAX_CAPTION = 300  # characters of the one in info.json
LOCAL_COPIES = ("annotations", "images", "weights")  # that may be given for ukiyo-e

Rows = Iterable[tuple[str, Row | str]]  # with their names, for messages; a text says what is wrong with a row


@dataclass(frozen=True)
class Source:
    """Where a data set comes from."""

    size: int  # pixels per side, if the options do not say
    origin: str
    licence: str
    options: tuple[str, ...]  # that other data sets do not have
    near_duplicates: bool = False  # several prints may come from one block: such training images are left out


SOURCES = {
    "prints": Source(96, "drawn by container/data_sets/prints.py", "that of this repository", SPLITS),
    "ukiyo-e": Source(224, f"Ukiyo-eVG (selinakhan/vg_art), {ukiyoe.RECORD}", "theirs", LOCAL_COPIES, True),
}
OWN = Source(96, "images and annotations in ODVG format", "that of the images", ("odvg",))


def list_jobs(options: argparse.Namespace, problems: list[str], report: dict[str, int]) -> dict[str, list[Job]]:
    """The jobs of every split. Appends to the problems, and counts for info.json. Raises DataError."""
    if options.name == "prints":
        jobs, start = {}, 0  # print 0 and following are the training split, then come validation and test
        for split in SPLITS:
            jobs[split] = list_prints(start, getattr(options, split) or PRINTS_COUNTS[split])
            start += len(jobs[split])
        return jobs
    if options.odvg:
        folder, images = options.odvg, options.odvg / "images"
    else:
        folder = options.out.with_name(f"{options.out.name}.download")  # stays until the data set is written
        local = {name: getattr(options, name) for name in LOCAL_COPIES}
        for given in local.values():
            if given and given.is_dir():
                os.listdir(given)  # raises PermissionError, where a search by pathlib finds nothing
        images = ukiyoe.fetch(folder, options.out.with_name("weights"), local, report)
    if not images.is_dir():
        raise DataError("--odvg: images is not a folder; put the images there")
    found = odvg.Images(images)
    return {split: list(odvg.read(folder / f"{split}.jsonl", found, problems)) for split in SPLITS}


def list_prints(start: int, count: int) -> list[Job]:
    return [(f"print {index}", partial(prints.draw, PRINTS_SEED, index)) for index in range(start, start + count)]


def write_data_set(options: argparse.Namespace, folder: Path) -> None:
    """Writes everything. Raises DataError."""
    source, problems, report = SOURCES.get(options.name, OWN), [], {}
    size, jobs = options.size or source.size, list_jobs(options, problems, report)
    tables, seen = {}, None if source.near_duplicates else {}  # what is published stays as it is
    for split in SPLITS:
        rows = make_rows(split, jobs[split], size, options.processes)
        tables[split] = store_rows(rows, folder / f"{split}.arrow", size, seen, problems)
        print(f"{split}: {len(jobs[split])} images", file=sys.stderr, flush=True)
    if problems:
        raise DataError(*problems)
    for split in ("val", "test"):
        if (count := len(tables[split].unique("caption"))) < FEW_CAPTIONS:
            print(f"{split}: {count} different captions alone, so what is found there is luck", file=sys.stderr)
    if source.near_duplicates:
        kept = rows_unlike(tables["train"], [tables["val"], tables["test"]])
        report["near_duplicates_left_out"] = len(tables["train"]) - len(kept)
        report["validation_like_test"] = len(tables["val"]) - len(rows_unlike(tables["val"], [tables["test"]]))
        tables["train"] = tables["train"].select(kept)
    tables["train"].save_to_disk(folder / "train", num_shards=1)
    (folder / "train.arrow").unlink()
    for split in ("val", "test"):
        store_pairs_apart(tables[split], folder, split)
    tiles = [make(prints.TILE) for _, make in jobs["train"][: PREVIEWS[0][0]]]
    for count, colours in PREVIEWS:
        prints.draw_sheet(tiles[:count]).quantize(colours).save(folder / "preview.png", optimize=True)
        if (folder / "preview.png").stat().st_size <= PREVIEW_BYTES:
            break
    for what, count in report.items():
        print(f"{what.replace('_', ' ')}: {count}", file=sys.stderr, flush=True)
    report |= {split: len(tables[split]) for split in SPLITS} | {"training": describe(tables["train"], size)}
    if options.name == "prints":
        report["prints_version"] = prints.VERSION
    write_info(folder, {"format": DATA_FORMAT, "name": options.name, "image_size": size, **report}, source)


def describe(table: datasets.Dataset, size: int) -> list[str]:
    """The training pairs in numbers, and one caption: what the agent that trains on them is told."""
    texts = table.select_columns(["caption", "regions"]).with_format("arrow")[:]
    captions, regions = texts["caption"].to_pylist(), sorted(map(len, texts["regions"].to_pylist()))
    count, words = len(captions), sorted(len(caption.split()) for caption in captions)
    return [
        f"{count} training pairs, {size} x {size} px, {regions[0]} to {regions[-1]} regions each "
        f"(median {regions[count // 2]}), captions of {words[count // 2]} words (median; most {words[-1]})",
        captions[0][:MAX_CAPTION],
    ]


def make_rows(what: str, jobs: list[Job], size: int, processes: int) -> Rows:
    """Does the jobs in processes, forked, because they need no more than numpy and Pillow. Raises BrokenProcessPool."""
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        rows = pool.map(operator.call, [make for _, make in jobs], repeat(size), chunksize=ROWS_PER_TASK)
        yield from zip([name for name, _ in jobs], ukiyoe.Bar(rows, what, len(jobs), unit=" images"), strict=True)


def write_info(folder: Path, info: dict, source: Source) -> None:
    """info.json, which also describes every file that is read later."""
    for file in folder.rglob("state.json"):  # the random mark in it would make the same data differ
        mark = sha256(file.with_name("data-00000-of-00001.arrow"))[:16]
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_fingerprint": mark}, indent=2) + "\n")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix != ".png")
    described = {str(file.relative_to(folder)): (file.stat().st_size, sha256(file)) for file in files}
    made_by = {"python": sys.version.split()[0], **{p: version(p) for p in ("numpy", "pillow", "datasets")}}
    content = hashlib.sha256(json.dumps(described).encode()).hexdigest()
    info |= {"source": source.origin, "licence": source.licence, "hash": content, "made_by": made_by}
    (folder / "info.json").write_text(json.dumps(info | {"files": described}, indent=2) + "\n")


def perceptual_hashes(table: datasets.Dataset) -> np.ndarray:
    """Of every image in a table; (n, 4) uint64."""
    hashes = []
    for row in table.select_columns("image").with_format("numpy", dtype=np.uint8):
        side = round((len(row["image"]) / 3) ** 0.5)
        image = Image.fromarray(row["image"].reshape(3, side, side).transpose(1, 2, 0))
        hashes.append(np.packbits(imagehash.phash(image, HASH_SIDE).hash).view(np.uint64))
    return np.stack(hashes)


def rows_unlike(table: datasets.Dataset, others: list[datasets.Dataset]) -> list[int]:
    """The rows of a table whose images are near duplicates of none in the others."""
    known = np.concatenate([perceptual_hashes(other) for other in others])
    distances = [np.bitwise_count(known ^ found).sum(axis=1).min() for found in perceptual_hashes(table)]
    return [row for row, distance in enumerate(distances) if distance > HASH_BITS]


def store_rows(rows: Rows, file: Path, size: int, seen: dict | None, problems: list[str]) -> datasets.Dataset:
    """Streams a split into an Arrow file. `seen`, if given, tells where a picture was: only training may repeat it."""
    box, text = datasets.List(datasets.Value("float32"), length=4), datasets.Value("string")
    image = datasets.List(datasets.Value("uint8"), length=3 * size * size)
    features = datasets.Features(image=image, caption=text, regions=datasets.List({"phrase": text, "bbox": box}))
    with ArrowWriter(path=str(file), features=features, writer_batch_size=ROWS_PER_BATCH) as writer:
        for where, row in rows:
            if isinstance(row, str):
                problems.append(f"{where}: {row}")
                continue
            pixels, caption, regions = row
            place = file.stem, where
            first = place if seen is None else seen.setdefault(hashlib.sha256(pixels).digest(), place)
            if first != place and {first[0], file.stem} != {"train"}:
                remedy = "keep it in one split only, and in val and test once"
                problems.append(f"{where}: the image shows the same as that of {first[1]}; {remedy}")
            writer.write({"image": pixels.reshape(-1), "caption": caption, "regions": regions})
        writer.finalize()
    return datasets.Dataset.from_file(str(file))


def store_pairs_apart(table: datasets.Dataset, folder: Path, split: str) -> None:
    """Writes images and captions in two orders of their own, and beside them the key (n,) int64.

    The orders come from the content of all pairs, so a program that is given one side only cannot redo them.
    """
    secret, orders = sha256(folder / f"{split}.arrow"), {}
    for column in ("image", "caption"):
        marks = [hashlib.sha256(f"{secret} {column}s {row}".encode()).digest() for row in range(len(table))]
        orders[column] = np.array(sorted(range(len(table)), key=marks.__getitem__), dtype=np.int64)
        table.select_columns(column).select(orders[column]).save_to_disk(folder / split / f"{column}s", num_shards=1)
    np.save(folder / f"{split}.key.npy", np.argsort(orders["caption"])[orders["image"]].astype(np.int64))
    regions = table.select_columns("regions").select(orders["image"])["regions"]
    (folder / f"{split}.regions.json").write_text(json.dumps(list(regions)) + "\n")
    (folder / f"{split}.arrow").unlink()


def add_trainval(folder: Path, staging: Path, info: dict) -> None:
    """One table of the training and the validation pairs, for ./run.sh final; without those that look like test."""
    images, captions = (datasets.load_from_disk(folder / "val" / side) for side in ("images", "captions"))
    train, regions = datasets.load_from_disk(folder / "train"), json.loads((folder / "val.regions.json").read_text())
    pairs = images.add_column("caption", list(captions.select(np.load(folder / "val.key.npy"))["caption"]))
    pairs = pairs.add_column("regions", regions, feature=train.features["regions"])
    # in memory: else what is cast would stay beside val/images, where train.py sees it
    pairs = pairs.cast(train.features, keep_in_memory=True)
    if "validation_like_test" in info:
        pairs = pairs.select(rows_unlike(images, [datasets.load_from_disk(folder / "test" / "images")]))
    datasets.concatenate_datasets([train, pairs]).save_to_disk(staging / "trainval", num_shards=1)


def add(options: argparse.Namespace) -> None:
    """Adds pairs to a data set, in the place of those that an earlier call added. Raises DataError."""
    out, info = options.out, json.loads((options.out / "info.json").read_text())
    if options.name == "prints" and info.get("prints_version") != prints.VERSION:
        raise DataError(f"{out} was drawn by another version of prints.py; move it away and draw the prints anew")
    with staged(out / "add.partial") as staging:
        if options.add == "trainval":
            add_trainval(out, staging, info)
        else:  # prints with indices that no split and no other audit has
            number, size = int(options.add.removeprefix("audit=")), info["image_size"]
            jobs = list_prints(sum(info[split] for split in SPLITS) + number * info["val"], info["val"])
            rows = make_rows("audit", jobs, size, options.processes)
            store_pairs_apart(store_rows(rows, staging / "audit.arrow", size, None, []), staging, "audit")
        for new in sorted(staging.iterdir()):
            old = out / new.name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            new.rename(old)


def prepare(options: argparse.Namespace) -> None:
    """Writes the data set, completely or, where it raises DataError, not at all."""
    out = options.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out} is not an empty folder; remove it, or give another one")
    with staged(out.with_name(f"{out.name}.partial")) as staging:
        write_data_set(options, staging)
        staging.rename(out)
    shutil.rmtree(out.with_name(f"{out.name}.download"), ignore_errors=True)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder, in the place of what a killed run left, that is gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def explain(error: OSError, options: argparse.Namespace) -> str:
    """The error, with a remedy where it is about a file of the person's, which has another path in a container."""
    for given in (getattr(options, name) for name in ("odvg", *LOCAL_COPIES)):
        if isinstance(error, PermissionError) and given and Path(error.filename).is_relative_to(given):
            remedy = os.environ.get("MAKE_READABLE", f"chmod -R a+rX {given}")
            return f"{Path(error.filename).name} may not be read by the container; {remedy}"
    return str(error)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("./run.sh data", argparse.SUPPRESS, "Prepares a data set.", allow_abbrev=False)
    parser.add_argument("name", help=f"{' or '.join(SOURCES)}, or the name of your own data set (with --odvg)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet, or be empty")
    parser.add_argument("--odvg", type=Path, help="folder with train.jsonl, val.jsonl, test.jsonl and images/")
    for what in LOCAL_COPIES:
        parser.add_argument(f"--{what}", type=Path, help=f"ukiyo-e: local folder with the {what}, or archive of images")
    parser.add_argument("--size", type=int, help="pixels per side")
    parser.add_argument("--add", help="trainval or audit=NUMBER: add pairs to the data set in --out")
    for split, count in PRINTS_COUNTS.items():
        parser.add_argument(f"--{split}", type=int, help=f"number of {split} images, for prints only ({count})")
    parser.add_argument("--processes", type=int, default=max(2, len(os.sched_getaffinity(0))), help="(%(default)s)")
    options = parser.parse_args(arguments)
    name, additions = options.name, r"trainval|audit=\d{1,6}" if options.name == "prints" else "trainval"
    if options.size is not None and options.size not in SIZES:
        parser.error(f"--size must be {SIZES[0]} to {SIZES[-1]}")
    if options.add and not re.fullmatch(additions, options.add):
        parser.error("--add takes trainval, and for the prints audit=NUMBER")
    if any(getattr(options, count) is not None and getattr(options, count) < 1 for count in ("processes", *SPLITS)):
        parser.error("counts must be 1 or more")
    if not re.fullmatch(DATA_NAME, name):
        parser.error(f"a name is {DATA_NAME_HINT}")
    if not options.odvg and not options.add and name not in SOURCES:
        parser.error(f"unknown data set {name}; take {' or '.join(SOURCES)}, or give your own with --odvg FOLDER")
    for option in (*SPLITS, *LOCAL_COPIES, "odvg"):
        if getattr(options, option) is not None and option not in SOURCES.get(name, OWN).options:
            parser.error(f"--{option} is not for the data set {name}; see --help")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    datasets.disable_progress_bars()
    datasets.disable_caching()  # whose files lie in the folder of the table that was read
    os.umask(0o022)  # everybody may read what is written
    warnings.simplefilter("ignore")  # of Pillow, about what it can read all the same
    try:
        add(options) if options.add else prepare(options)
        return 0
    except DataError as error:
        problems = error.args
    except BrokenProcessPool:
        problems = ("a process was killed, perhaps for want of memory; try fewer --processes",)
    except OSError as error:
        problems = (explain(error, options),)
    print(*problems[:MAX_PROBLEMS_SHOWN], sep="\n", file=sys.stderr)
    more = f" ({len(problems) - MAX_PROBLEMS_SHOWN} more than shown)" if len(problems) > MAX_PROBLEMS_SHOWN else ""
    print(f"error: {len(problems)} problem{'s' * (len(problems) > 1)}{more}; nothing was written", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
