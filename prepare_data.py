#!/usr/bin/env python3
"""Prepares a data set once, so that training only reads memory-mapped uint8. Runs inside the container image.

    python prepare_data.py prints --out DIR                the built-in woodblock prints, drawn here
    python prepare_data.py NAME --odvg FOLDER --out DIR    your own images and annotations

FOLDER holds train.jsonl, val.jsonl, test.jsonl and images/. Every line describes one image:

    {"filename": "a.png", "width": 400, "height": 100,
     "grounding": {"caption": "...", "regions": [{"phrase": "...", "bbox": [x0, y0, x1, y1]}]}}

with boxes in pixels. Images are stretched to a square: nothing is cut off, no pixel is spent on padding, and a box in
units of the image's width and height stays right. Every problem is reported with its file and line, and then nothing
is written.

What DIR holds afterwards:

    info.json                      sizes, source, licence, and a hash of the whole content
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
import contextlib
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent / "container"))

import prints

FORMAT = 1
SPLITS = ("train", "val", "test")
CHANNELS = 3
DEFAULT_SIZE = 96  # pixels per side
SIZE_RANGE = (16, 1024)  # pixels per side
PRINTS_COUNTS = {"train": 8000, "val": 2000, "test": 1000}
PRINTS_SEED = 7
MIN_PROCESSES = 2
ROWS_PER_TASK = 32  # what a process is handed at a time
ROWS_PER_BATCH = 256  # of an Arrow file: 7 MB at 96 px
MAX_PROBLEMS_SHOWN = 20
MAX_QUOTED = 80  # characters of the user's input in a message
MAX_SIDE = 100_000  # pixels per side of an image; a larger number is a typing error
BOX_SLACK = 1.0  # pixels a box may stick out by and is cut back: annotation tools round outwards
BOX_DECIMALS = 6
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
EIGHT_BIT_MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}  # Pillow would clip the others
NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

SHEET_COLUMNS = 4
SHEET_ROWS = 3
TILE = 288  # pixels per side of an image in the preview
GAP = 16  # pixels
FONT_SIZE = 14  # pixels
CAPTION_WIDTH = 44  # characters
CAPTION_LINES = 4
PHRASE_LINES = 5  # under an image with boxes
SHEET_COLOUR = (246, 242, 232)
TEXT_COLOUR = (44, 40, 48)
BOX_COLOURS = ((214, 0, 110), (0, 118, 214), (0, 140, 70), (206, 90, 0), (122, 60, 200))

Region = dict[str, Any]
RunAll = Callable[..., Iterator[Any]]  # like map(function, items): in order, maybe in other processes


class DataError(Exception):
    """The input cannot be used; `problems` are one line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(f"{len(problems)} problems")
        self.problems = problems


@dataclass(frozen=True)
class Row:
    """One image (3, S, S) uint8 with its caption and its regions, boxes in [0, 1]."""

    pixels: np.ndarray
    caption: str
    regions: list[Region]


# The built-in prints


def draw_row(index: int, size: int) -> Row:
    return Row(*prints.draw(PRINTS_SEED, index, size))


class Prints:
    """The built-in data: print 0 and following are the training split, then come validation and test."""

    name = "prints"
    source = "drawn by container/prints.py"
    licence = "that of this repository"

    def __init__(self, counts: dict[str, int], image_size: int) -> None:
        self.counts = counts
        self.image_size = image_size
        self.problems: list[str] = []

    def rows(self, split: str, run_all: RunAll) -> Iterator[Row]:
        start = sum(self.counts[before] for before in SPLITS[: SPLITS.index(split)])
        indices = range(start, start + self.counts[split])
        return run_all(functools.partial(draw_row, size=self.image_size), indices)

    def preview(self, train: datasets.Dataset) -> list[Row]:
        """The first training prints, drawn larger than they are stored."""
        return [draw_row(index, TILE) for index in range(min(len(train), SHEET_COLUMNS * SHEET_ROWS))]


# Images and annotations in ODVG format


@dataclass(frozen=True)
class Annotation:
    """A line of a .jsonl file that is right as far as can be told without opening the image."""

    where: str  # such as "val.jsonl line 3", for messages
    path: Path
    width: int
    height: int
    caption: str
    regions: list[Region]


@dataclass(frozen=True)
class Loaded:
    """An image as a row, and a hash of what it shows; or what is wrong with it."""

    row: Row | None = None
    digest: bytes = b""
    problem: str = ""


def quote(value: object) -> str:
    """The user's input in a message, on one line and not too long."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 3] + "..."


def text_problem(text: object, what: str) -> str | None:
    """What is wrong with a caption or a phrase, if anything."""
    if not isinstance(text, str):
        return f"{what} is {quote(text)}, not a string"
    if not text.strip():
        return f"{what} is empty; write one or remove the line"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{what} {quote(text)} holds half a surrogate pair, which is not Unicode text"
    return None


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def normalise_box(box: object, width: int, height: int) -> list[float]:
    """A box in pixels as x0, y0, x1, y1 in [0, 1].

    Raises ValueError, with the reason, unless it is four numbers, inside the image, with an area.
    """
    if not (isinstance(box, list) and len(box) == 4 and all(is_number(value) for value in box)):
        raise ValueError(f"bbox is {quote(box)}, not four numbers [x0, y0, x1, y1]")
    x0, y0, x1, y1 = box
    inside_x = all(-BOX_SLACK <= x <= width + BOX_SLACK for x in (x0, x1))
    inside_y = all(-BOX_SLACK <= y <= height + BOX_SLACK for y in (y0, y1))
    if not (inside_x and inside_y):
        raise ValueError(f"bbox {quote(box)} leaves the image of {width}x{height} pixels; cut it to the image")
    ends = [x0 / width, y0 / height, x1 / width, y1 / height]
    ends = [round(min(1.0, max(0.0, end)), BOX_DECIMALS) for end in ends]
    if ends[0] >= ends[2] or ends[1] >= ends[3]:
        raise ValueError(f"bbox {quote(box)} has no area; it must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return ends


def read_regions(regions: object, width: int, height: int) -> tuple[list[Region], list[str]]:
    """The regions with their boxes in [0, 1], and what is wrong with them."""
    if not isinstance(regions, list):
        return [], [f"regions is {quote(regions)}, not a list; write [] where there are none"]
    good, problems = [], []
    for number, region in enumerate(regions, start=1):
        if not isinstance(region, dict):
            problems.append(f"region {number} is {quote(region)}, not an object with phrase and bbox")
            continue
        if problem := text_problem(region.get("phrase"), f"the phrase of region {number}"):
            problems.append(problem)
            continue
        try:
            box = normalise_box(region.get("bbox"), width, height)
        except ValueError as error:
            problems.append(f"region {number}: {error}")
            continue
        good.append({"phrase": region["phrase"], "bbox": box})
    return good, problems


def load_row(annotation: Annotation, size: int) -> Loaded:
    """Decodes the image and stretches it to (3, size, size)."""
    name = quote(annotation.path.name)
    try:
        with Image.open(annotation.path, formats=IMAGE_FORMATS) as image:
            if image.size != (annotation.width, annotation.height):
                stated, found = f"{annotation.width}x{annotation.height}", f"{image.width}x{image.height}"
                return Loaded(problem=f"image {name} has {found} pixels, not {stated}; correct width and height")
            if image.mode not in EIGHT_BIT_MODES:
                return Loaded(problem=f"image {name} has mode {image.mode}; save it with 8 bits a channel")
            rgb = flatten(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return Loaded(problem=f"image {name} cannot be decoded ({quote(str(error))}); replace it")
    digest = hashlib.sha256(f"{rgb.size}".encode() + rgb.tobytes()).digest()
    stretched = rgb.resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.ascontiguousarray(np.asarray(stretched).transpose(2, 0, 1))
    return Loaded(Row(pixels, annotation.caption, annotation.regions), digest)


def flatten(image: Image.Image) -> Image.Image:
    """The image as RGB; what is transparent becomes white, as paper is."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    paper = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")


class Odvg:
    """Your own images with annotations. `problems` is complete once the rows of all splits have been taken.

    Raises DataError if there are no images at all.
    """

    source = "images and annotations in ODVG format"
    licence = "that of the images"

    def __init__(self, name: str, folder: Path, image_size: int) -> None:
        self.name = name
        self.folder = folder
        self.images = (folder / "images").resolve()
        self.image_size = image_size
        self.problems: list[str] = []
        self.seen_paths: dict[Path, str] = {}  # image -> the line that uses it
        self.seen_content: dict[bytes, tuple[str, str]] = {}  # hash -> split, the line that uses it
        if not self.images.is_dir():
            raise DataError([f"{folder / 'images'} is not a folder; put the images there"])
        self.annotations = {split: self.read_split(split) for split in SPLITS}
        self.counts = {split: len(annotations) for split, annotations in self.annotations.items()}

    def read_split(self, split: str) -> list[Annotation]:
        """The good lines of a split; notes what is wrong with the others."""
        file = self.folder / f"{split}.jsonl"
        try:
            lines = file.read_bytes().splitlines()
        except OSError as error:
            self.problems.append(f"{file.name}: cannot be read ({error.strerror}); every split needs its file")
            return []
        numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not numbered:
            self.problems.append(f"{file.name}: is empty; every split needs at least one image")
        parsed = [self.read_line(line, f"{file.name} line {number}") for number, line in numbered]
        return [annotation for annotation in parsed if annotation is not None]

    def read_line(self, line: bytes, where: str) -> Annotation | None:
        """The annotation in a line, or None if something is wrong with it, which is noted."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            self.problems.append(f"{where}: not JSON ({error}); write one object per line")
            return None
        if not isinstance(entry, dict) or not isinstance(entry.get("grounding"), dict):
            self.problems.append(f"{where}: not an object with filename, width, height and grounding")
            return None
        width, height = entry.get("width"), entry.get("height")
        if not all(type(side) is int and 0 < side <= MAX_SIDE for side in (width, height)):
            self.problems.append(f"{where}: width and height are {quote((width, height))}, not numbers of pixels")
            return None
        grounding = entry["grounding"]
        regions, problems = read_regions(grounding.get("regions"), width, height)
        caption = grounding.get("caption")
        if problem := text_problem(caption, "the caption"):
            problems.append(problem)
        path = self.find_image(entry.get("filename"), where, problems)
        self.problems += [f"{where}: {problem}" for problem in problems]
        return None if problems or path is None else Annotation(where, path, width, height, caption, regions)

    def find_image(self, filename: object, where: str, problems: list[str]) -> Path | None:
        """Where the image is, or None; adds to `problems` what is wrong with its name."""
        if not isinstance(filename, str) or not filename or "\0" in filename:
            problems.append(f"filename is {quote(filename)}, not the name of a file in images/")
            return None
        path = (self.images / filename).resolve()
        if not path.is_relative_to(self.images):
            problems.append(f"filename {quote(filename)} leaves the folder images/; put the image there")
        elif path in self.seen_paths:
            problems.append(f"image {quote(filename)} was used before, in {self.seen_paths[path]}; keep one of them")
        elif not path.is_file():
            problems.append(f"image {quote(filename)} is not in images/; add it or remove the line")
        else:
            self.seen_paths[path] = where
            return path
        return None

    def rows(self, split: str, run_all: RunAll) -> Iterator[Row]:
        """The rows of a split; notes what is wrong with images and leaves those rows out."""
        annotations = self.annotations[split]
        loaded_images = run_all(functools.partial(load_row, size=self.image_size), annotations)
        for annotation, loaded in zip(annotations, loaded_images, strict=True):
            problem = loaded.problem or self.leak(split, annotation, loaded.digest)
            if problem:
                self.problems.append(f"{annotation.where}: {problem}")
            elif loaded.row is not None:
                yield loaded.row

    def leak(self, split: str, annotation: Annotation, digest: bytes) -> str:
        """Says so if the same picture was found in another split before."""
        other_split, where = self.seen_content.setdefault(digest, (split, annotation.where))
        if other_split == split:
            return ""
        return f"image {quote(annotation.path.name)} shows the same as that of {where}; keep it in one split only"

    def preview(self, train: datasets.Dataset) -> list[Row]:
        """The first training images as they are stored."""
        shape = (CHANNELS, self.image_size, self.image_size)
        rows = train.select(range(min(len(train), SHEET_COLUMNS * SHEET_ROWS)))
        return [Row(np.array(row["image"], np.uint8).reshape(shape), row["caption"], row["regions"]) for row in rows]


Source = Prints | Odvg


# Writing


@dataclass(frozen=True)
class Stored:
    """The rows of a split in the order of the source, and a hash of all of them."""

    table: datasets.Dataset
    digest: str


def row_features(size: int) -> datasets.Features:
    box = datasets.List(datasets.Value("float32"), length=4)
    region = {"phrase": datasets.Value("string"), "bbox": box}
    return datasets.Features(
        {
            "image": datasets.List(datasets.Value("uint8"), length=CHANNELS * size * size),
            "caption": datasets.Value("string"),
            "regions": datasets.List(region),
        }
    )


def to_batch(rows: list[Row], schema: pa.Schema) -> pa.RecordBatch:
    pixels = pa.array(np.concatenate([row.pixels.reshape(-1) for row in rows]))
    columns = [
        pa.FixedSizeListArray.from_arrays(pixels, type=schema.field("image").type),
        pa.array([row.caption for row in rows], schema.field("caption").type),
        pa.array([row.regions for row in rows], schema.field("regions").type),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def store_rows(rows: Iterable[Row], file: Path, size: int) -> Stored:
    """Streams the rows into an Arrow file, so that a split need not fit into memory."""
    schema = row_features(size).arrow_schema
    content = hashlib.sha256()
    rows = iter(rows)
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while batch := list(itertools.islice(rows, ROWS_PER_BATCH)):
            for row in batch:
                content.update(row.pixels.tobytes())
                content.update(json.dumps([row.caption, row.regions]).encode())
            writer.write_batch(to_batch(batch, schema))
    return Stored(datasets.Dataset.from_file(str(file)), content.hexdigest())


def shuffled(count: int, secret: str) -> np.ndarray:
    """A permutation (count,) int64 that nobody can compute without the secret, and everybody gets with it."""
    marks = [hashlib.sha256(f"{secret} {row}".encode()).digest() for row in range(count)]
    return np.array(sorted(range(count), key=marks.__getitem__), dtype=np.int64)


def store_pairs_apart(stored: Stored, folder: Path, split: str) -> np.ndarray:
    """Writes images and captions in two orders of their own, and beside them the key (n,) int64, which it returns.

    The secret of the orders is the content of all pairs in the order of the source: a program that is given one side
    only, or a constant of this file, cannot redo them.
    """
    table = stored.table
    image_order = shuffled(len(table), f"{stored.digest} images")
    caption_order = shuffled(len(table), f"{stored.digest} captions")
    for column, order in (("image", image_order), ("caption", caption_order)):
        table.select_columns(column).select(order).save_to_disk(folder / split / f"{column}s", num_shards=1)
    row_of_caption = np.argsort(caption_order)
    key = row_of_caption[image_order].astype(np.int64)
    np.save(folder / f"{split}.key.npy", key)
    regions = table.select_columns("regions").select(image_order)["regions"]
    (folder / f"{split}.regions.json").write_text(json.dumps(list(regions)) + "\n")
    return key


def made_by() -> dict[str, str]:
    """The versions that the pixels depend on."""
    packages = {package: version(package) for package in ("numpy", "pillow", "datasets")}
    return {"python": platform.python_version(), **packages}


def write_data_set(source: Source, folder: Path, run_all: RunAll) -> None:
    """Writes everything but the final name. Raises DataError if the source has problems."""
    parts = {}
    for split in SPLITS:
        rows = with_progress(source.rows(split, run_all), split, source.counts[split])
        parts[split] = store_rows(rows, folder / f"{split}.arrow", source.image_size)
    if source.problems:
        raise DataError(source.problems)
    parts["train"].table.save_to_disk(folder / "train", num_shards=1)
    content = hashlib.sha256(parts["train"].digest.encode())
    for split in ("val", "test"):
        key = store_pairs_apart(parts[split], folder, split)
        content.update(parts[split].digest.encode() + key.astype("<i8").tobytes())
    draw_sheet(source.preview(parts["train"].table)).save(folder / "preview.png")
    for split in SPLITS:
        (folder / f"{split}.arrow").unlink()
    info = {
        "format": FORMAT,
        "name": source.name,
        "image_size": source.image_size,
        **{split: len(parts[split].table) for split in SPLITS},
        "source": source.source,
        "licence": source.licence,
        "hash": content.hexdigest(),
        "made_by": made_by(),
    }
    (folder / "info.json").write_text(json.dumps(info, indent=2) + "\n")


def draw_sheet(rows: list[Row]) -> Image.Image:
    """Images with their captions; the last row of the sheet shows the regions too."""
    line_height = FONT_SIZE + 4
    step_x, step_y = TILE + GAP, TILE + GAP + CAPTION_LINES * line_height
    sheet_rows = math.ceil(len(rows) / SHEET_COLUMNS)
    height = GAP + sheet_rows * step_y + PHRASE_LINES * line_height
    sheet = Image.new("RGB", (GAP + min(len(rows), SHEET_COLUMNS) * step_x, height), SHEET_COLOUR)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for place, row in enumerate(rows):
        x, y = GAP + place % SHEET_COLUMNS * step_x, GAP + place // SHEET_COLUMNS * step_y
        tile = Image.fromarray(row.pixels.transpose(1, 2, 0)).resize((TILE, TILE), Image.Resampling.BICUBIC)
        lines = [(line, TEXT_COLOUR) for line in wrap_caption(row.caption)]
        if place // SHEET_COLUMNS == sheet_rows - 1:
            mark_regions(tile, row.regions)
            lines += list_phrases(row.regions)
        sheet.paste(tile, (x, y))
        for number, (line, colour) in enumerate(lines):
            pen.text((x, y + TILE + 4 + number * line_height), line, colour, font)
    return sheet


def wrap_caption(caption: str) -> list[str]:
    return textwrap.wrap(caption, CAPTION_WIDTH, max_lines=CAPTION_LINES, placeholder=" ...")


def mark_regions(tile: Image.Image, regions: list[Region]) -> None:
    """Draws every box, in the colour that list_phrases gives its phrase."""
    pen = ImageDraw.Draw(tile)
    for region, colour in zip(regions, itertools.cycle(BOX_COLOURS), strict=False):
        corners = [value * (TILE - 1) for value in region["bbox"]]
        pen.rectangle(corners, outline=colour, width=3)


def list_phrases(regions: list[Region]) -> list[tuple[str, tuple[int, int, int]]]:
    """Lines with a colour: the phrases of the regions, or of the first of them if they are many."""
    phrases = [textwrap.shorten(region["phrase"], CAPTION_WIDTH, placeholder=" ...") for region in regions]
    lines = list(zip(phrases, itertools.cycle(BOX_COLOURS), strict=False))
    if len(lines) <= PHRASE_LINES:
        return lines
    shown = PHRASE_LINES - 1
    return [*lines[:shown], (f"and {len(lines) - shown} more", TEXT_COLOUR)]


def with_progress(rows: Iterator[Row], split: str, count: int) -> Iterator[Row]:
    """Passes the rows on; shows a bar on a terminal and otherwise a line per split, on stderr."""
    is_terminal = sys.stderr.isatty()
    yield from tqdm(rows, desc=split, total=count, unit=" images", disable=not is_terminal)
    if not is_terminal:
        print(f"{split}: {count} images", file=sys.stderr, flush=True)


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` at the end, readable for everybody, or else vanishes.

    Raises DataError if `out` is not free, or has nowhere to stand.
    """
    if not out.parent.is_dir():
        raise DataError([f"{out.parent} is not a folder; make it first"])
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError([f"{out} is not an empty folder; remove it, or give another one"])
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir()
    try:
        yield partial
        for path in (partial, *partial.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def processes(count: int) -> Iterator[RunAll]:
    """Something like map() that spreads the work over processes.

    They are forked: they need nothing but numpy and Pillow, and starting anew would import everything once more in
    each.
    """
    if count == 1:
        yield map
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        yield functools.partial(pool.map, chunksize=ROWS_PER_TASK)


def prepare(source: Source, out: Path, process_count: int) -> None:
    """Writes the data set to `out`, completely or not at all.

    Raises DataError if the source has problems or `out` is not free.
    """
    with processes(process_count) as run_all, staging(out) as folder:
        write_data_set(source, folder, run_all)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Prepares a data set.", allow_abbrev=False)
    parser.add_argument("name", help="prints, or the name of your own data set (with --odvg)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist yet, or be empty")
    parser.add_argument("--odvg", type=Path, help="folder with train.jsonl, val.jsonl, test.jsonl and images/")
    parser.add_argument("--size", type=int, default=DEFAULT_SIZE, help="pixels per side (%(default)s)")
    for split, count in PRINTS_COUNTS.items():
        parser.add_argument(f"--{split}", type=int, help=f"number of {split} images, for prints only ({count})")
    default_processes = max(MIN_PROCESSES, len(os.sched_getaffinity(0)))
    parser.add_argument("--processes", type=int, default=default_processes, help="(%(default)s)")
    options = parser.parse_args(arguments)
    given = {split: getattr(options, split) for split in SPLITS if getattr(options, split) is not None}
    if not SIZE_RANGE[0] <= options.size <= SIZE_RANGE[1]:
        parser.error(f"--size must be {SIZE_RANGE[0]} to {SIZE_RANGE[1]}")
    if options.processes < 1 or any(count < 1 for count in given.values()):
        parser.error("counts must be 1 or more")
    if not NAME_PATTERN.fullmatch(options.name):
        parser.error("a name is lower-case letters, digits, dots, dashes and underscores")
    if options.odvg is None and options.name != Prints.name:
        parser.error(f"unknown data set {options.name}; take {Prints.name}, or give your own with --odvg FOLDER")
    if options.odvg is not None and options.name == Prints.name:
        parser.error(f"{Prints.name} is the built-in data set; give your own another name")
    if options.odvg is not None and given:
        parser.error(f"--{', --'.join(given)}: the number of images can be chosen for {Prints.name} only")
    options.counts = PRINTS_COUNTS | given
    return options


def report(problems: list[str]) -> None:
    """Prints the problems, the first of them if they are many, and how many there are."""
    for problem in problems[:MAX_PROBLEMS_SHOWN]:
        print(problem, file=sys.stderr)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    hidden = len(problems) - MAX_PROBLEMS_SHOWN
    more = f" ({hidden} more than shown)" if hidden > 0 else ""
    print(f"error: {count}{more}; nothing was written", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    datasets.disable_progress_bars()
    try:
        if options.odvg is None:
            source: Source = Prints(options.counts, options.size)
        else:
            source = Odvg(options.name, options.odvg, options.size)
        prepare(source, options.out, options.processes)
    except DataError as error:
        report(error.problems)
        return 1
    except OSError as error:
        report([str(error)])
        return 1
    except BrokenProcessPool:
        report(["a process was killed, perhaps for want of memory; try fewer --processes"])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
