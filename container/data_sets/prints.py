"""Procedural woodblock prints: the built-in data set, drawn instead of downloaded.

`draw(seed, index, size)` returns one print with its caption and its regions: a pure function of these three numbers
and of prints.json, so that any number of processes can share the work. prints.json holds what is drawn and the words
for it; this file composes, describes and paints.

Positions are in units of the print's side, x to the right and y down, so that a scene can be painted at any size. The
shapes of a motif are in motif units: the origin is the motif's anchor (its centre in the sky, the middle of its foot
elsewhere), and 1.0 is about half its width.
"""

from __future__ import annotations

import functools
import json
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace as Entry  # of prints.json: its fields are attributes

import numpy as np
from PIL import Image, ImageDraw, ImageFont

VERSION = 2  # raise it whenever a print or its caption changes; info.json states it

SUPERSAMPLING = 2  # painted pixels per side of a final pixel; smooths the edges
OUTLINE = 1 / 110  # width, in units of the print's side
FRAME_WIDTH = 0.012  # in units of the print's side
HORIZON_RANGE = (0.48, 0.6)  # in units of the print's side, from the top
NAMED_SHARE = 0.7  # of the motifs; a caption names two in any case
MENTION_SHARE = 0.57  # how often a caption mentions each of the rest: a size, a column, the ground, the sky
HILLS_SHARE = 0.4  # of the prints; no caption names them
GROUND_MARKS, FALLING_MARKS = 20, 40  # ripples, blades, stones or tracks; raindrops or flakes
TEXTURE_COUNT = 12  # paper textures per image size
SHADOW = 0.8  # multiplies a colour
PAPER_TINT = (1.03, 1.0, 0.95)  # multiplies red, green, blue

# The contact sheet
TILES_PER_ROW = 4
TILE, GAP = 192, 16  # pixels
LINE_HEIGHT, FONT_SIZE = 16, 13  # pixels
CAPTION_WIDTH, CAPTION_LINES = 32, 5  # characters, lines
SHEET_COLOUR, TEXT_COLOUR = (246, 242, 232), (44, 40, 48)
BOX_COLOURS = ((214, 0, 110), (0, 118, 214), (0, 140, 70), (206, 90, 0))  # one per region

RGB = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Shape:
    """A filled polygon, or an open line."""

    points: list[Point]  # relative to each of the places where it is painted
    places: list[Point]
    fill: str  # a pigment; or "colour", "shadow" or "accent": the motif's first colour, darker, and its second
    is_line: bool
    width: float  # of the line or outline, in outlines; 0 for none


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, steps: int = 14) -> list[Point]:
    """Points on an ellipse around (x, y), from one angle to another (half turns, clockwise from the right)."""
    angles = [math.pi * (start + (end - start) * step / steps) for step in range(steps + 1)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def read_points(entries: list) -> list[Point]:
    """[x, y] is a point, and {"arc": [x, y, rx, ry, start, end]} several on an ellipse."""
    points = []
    for entry in entries:
        points += [entry] if isinstance(entry, list) else arc(*entry.arc, getattr(entry, "steps", 14))
    return points


def read_object(entry: dict) -> Shape | Entry:
    """An object in prints.json: a shape, as an ellipse, rectangle, polygon or line; anything else as named fields."""
    if "ellipse" in entry:
        points = arc(*entry["ellipse"], 0, 2, steps=24)
    elif "rectangle" in entry:
        x0, y0, x1, y1 = entry["rectangle"]
        points = [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    elif "polygon" in entry or "line" in entry:
        points = read_points(entry.get("polygon") or entry["line"])
    else:
        return Entry(**entry)
    return Shape(
        points,
        places=read_points(entry.get("at", [[0, 0]])),
        fill=entry.get("fill", "colour"),
        is_line="line" in entry,
        width=entry.get("width", 1),
    )


DATA = json.loads(Path(__file__).with_name("prints.json").read_text(), object_hook=read_object)
PALETTE, LAYERS, KINDS = vars(DATA.palette), vars(DATA.layers), vars(DATA.kinds)
SKIES, GROUNDS = list(vars(DATA.skies).values()), list(vars(DATA.grounds).values())
PIGMENTS = {name: tuple(rgb) for name, rgb in vars(DATA.pigments).items()}


@dataclass(frozen=True)
class Motif:
    """One thing in a scene, and the words for it."""

    kind: Entry
    x: float  # of its anchor, in units of the print's side
    y: float
    scale: float  # motif unit, in units of the print's side
    colours: dict[str, RGB]  # of the fills
    phrase: str
    where: str  # the column in words, or empty


def maybe(rng: Random, words: Sequence[str]) -> str:
    """One of the words, or nothing."""
    return rng.choice(words) if rng.random() < MENTION_SHARE else ""


def make_motif(rng: Random, kind: Entry, column: Entry, horizon: float) -> Motif:
    """A motif of this kind in this column, with a size, a place, colours and a phrase of its own."""
    layer, size = LAYERS[kind.layer], DATA.sizes[rng.choice((0, 1, 1, 2))]
    first = rng.choice(kind.colours)
    second = rng.choice([name for name in DATA.accents if name != first])
    colour, accent, tone = PALETTE[first], PALETTE[second], rng.uniform(0.94, 1.06)
    words = {"colour": rng.choice(colour.words), "accent": rng.choice(accent.words), "noun": rng.choice(kind.nouns)}
    phrase = rng.choice(kind.forms).format(size=maybe(rng, size.words), **words)
    return Motif(
        kind,
        x=column.x + rng.uniform(-0.05, 0.05),
        y=horizon + rng.uniform(*layer.band),
        scale=layer.scale * size.factor * rng.uniform(0.93, 1.07),
        colours={
            "colour": shade(colour.rgb, tone),
            "accent": shade(accent.rgb, tone),
            "shadow": shade(colour.rgb, SHADOW),
        },
        phrase=re.sub(r"\ba (?=[aeiou])", "an ", " ".join(phrase.split())),
        where=maybe(rng, column.words),
    )


def place_motifs(rng: Random, horizon: float) -> list[Motif]:
    """Two to four motifs of different kinds, those of one plane in different columns, so that none hides another."""
    count, motifs, taken = rng.choice((2, 3, 3, 4)), [], []
    for kind in rng.sample(list(KINDS.values()), len(KINDS)):
        plane = LAYERS[kind.layer].plane
        free = [column for column in DATA.columns if (plane, column) not in taken]
        if free and len(motifs) < count:
            column = rng.choice(free)
            taken.append((plane, column))
            motifs.append(make_motif(rng, kind, column, horizon))
    return motifs


def write_caption(rng: Random, motifs: list[Motif], sky: Entry, ground: Entry) -> str:
    """One sentence that names these motifs."""
    parts = [f"{motif.phrase} {motif.where}".strip() for motif in motifs]
    things = ", ".join(parts[:-1]) + rng.choice(DATA.joints) + parts[-1]
    lead, place, time = (maybe(rng, words) for words in (DATA.leads, ground.words, sky.words))
    text = f"{lead} {things} {place}".strip()
    if time:
        text = f"{text}, {time}" if lead or rng.random() < 0.5 else f"{time}, {text}"
    return text[0].upper() + text[1:] + rng.choice(("", "."))


def shade(colour: RGB, factor: float) -> RGB:
    """The colour made darker (factor below 1) or lighter (above 1)."""
    return tuple(min(255, int(value * factor)) for value in colour)


def paint(
    canvas: Image.Image, shapes: list[Shape], x: float, y: float, scale: float = 1, **colours: RGB
) -> list[Point]:
    """Paints shapes around (x, y), with these colours beside the pigments; returns the points, without line widths."""
    pen, side, colours, painted = ImageDraw.Draw(canvas), canvas.width, PIGMENTS | colours, []
    for shape in shapes:
        fill, width = colours[shape.fill], max(1, round(OUTLINE * side * shape.width))
        for left, top in shape.places:
            points = [(x + (left + px) * scale, y + (top + py) * scale) for px, py in shape.points]
            pixels = [(px * side, py * side) for px, py in points]
            if shape.is_line:
                pen.line(pixels, fill, width, joint="curve")
            else:
                pen.polygon(pixels, fill)
                if shape.width:
                    pen.line([*pixels, pixels[0]], PIGMENTS["ink"], width)
            painted += points
    return painted


def paint_backdrop(rng: Random, sky: Entry, ground: Entry, horizon: float, side: int) -> Image.Image:
    """Sky and ground, (side, side), each in a slightly varied tone."""
    rows = int(horizon * side) + 1
    tones = [[rng.uniform(0.93, 1.07) for _ in range(3)] for _ in range(2)]
    fade = np.linspace(-0.15, 1.1, rows).clip(0, 1)[:, None] ** 0.8
    above = (np.array(sky.rgb) * (1 - fade) + np.array(sky.at_horizon) * fade) * tones[0]
    below = np.array(ground.rgb) * tones[1] * np.linspace(1.12, 0.84, side - rows)[:, None]
    column = np.concatenate([above, below]).clip(0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(column[:, None], side, axis=1))


@functools.cache
def paper_textures(size: int) -> list[np.ndarray]:
    """Multipliers for dust, grain, blots and fibres, (size, size) float32 each; one takes longer than a print."""
    rng, textures = np.random.RandomState(1234), []  # numpy promises never to change its stream
    grids = {(size, size): 0.05, (28, 1): 0.05, (7, 7): 0.06, (size, max(4, size // 12)): 0.07}
    for _ in range(TEXTURE_COUNT):
        texture = np.full((size, size), 0.86, np.float32)
        for shape, depth in grids.items():
            grid = Image.fromarray(rng.rand(*shape).astype(np.float32))
            texture += depth * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
        textures.append(texture)
    return textures


def print_on_paper(rng: Random, picture: Image.Image) -> np.ndarray:
    """The picture with the texture of paper, (3, size, size) uint8."""
    texture = rng.choice(paper_textures(picture.width))[:: rng.choice((1, -1)), :: rng.choice((1, -1))]
    tint = np.array(PAPER_TINT, np.float32) * rng.uniform(0.93, 1.05)
    pixels = (np.asarray(picture, np.float32) * texture[:, :, None] * tint).clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def draw(seed: int, index: int, size: int) -> tuple[np.ndarray, str, list[dict]]:
    """One print: pixels, caption, regions.

    Pixels are RGB uint8 of the shape (3, size, size). Every motif that the caption names has a region
    {"phrase": str, "bbox": [x0, y0, x1, y1]}, the box in units of the print's side, inside [0, 1].
    """
    rng, side = Random(f"print-{seed}-{index}"), size * SUPERSAMPLING
    sky, ground, horizon = rng.choice(SKIES), rng.choice(GROUNDS), rng.uniform(*HORIZON_RANGE)
    motifs = place_motifs(rng, horizon)
    named = motifs[:2] + [motif for motif in motifs[2:] if rng.random() < NAMED_SHARE]
    caption = write_caption(rng, named, sky, ground)
    canvas = paint_backdrop(rng, sky, ground, horizon, side)
    if rng.random() < HILLS_SHARE:
        paint(canvas, [DATA.hills], rng.random(), horizon, shadow=shade(sky.at_horizon, SHADOW))
    for _ in range(GROUND_MARKS):
        x, y = rng.random(), rng.uniform(horizon + 0.03, 1)
        paint(canvas, ground.marks, x, y, rng.uniform(0.5, 1.5), shadow=shade(ground.rgb, SHADOW))
    regions = []
    for motif in sorted(motifs, key=lambda motif: (motif.kind.layer != "far", motif.y)):
        points = paint(canvas, motif.kind.shapes, motif.x, motif.y, motif.scale, **motif.colours)
        if motif in named:
            box = np.clip([np.min(points, axis=0), np.max(points, axis=0)], 0, 1)
            regions.append({"phrase": motif.phrase, "bbox": box.round(4).flatten().tolist()})
    for _ in range(FALLING_MARKS):
        paint(canvas, sky.falling, rng.uniform(0, 1.1), rng.random())
    paint(canvas, [DATA.seal], rng.choice((0.05, 0.92)), rng.choice((0.05, 0.8)))
    frame = max(SUPERSAMPLING, round(FRAME_WIDTH * side))
    ImageDraw.Draw(canvas).rectangle((0, 0, side - 1, side - 1), outline=PIGMENTS["ink"], width=frame)
    return print_on_paper(rng, canvas.reduce(SUPERSAMPLING)), caption, regions


def draw_sheet(rows: list[tuple[np.ndarray, str, list[dict]]]) -> Image.Image:
    """A contact sheet of images (3, TILE, TILE) with their captions, in the last row also with their regions."""
    step_x, step_y = TILE + GAP, TILE + GAP + CAPTION_LINES * LINE_HEIGHT
    last = (len(rows) - 1) // TILES_PER_ROW
    width = GAP + min(len(rows), TILES_PER_ROW) * step_x
    sheet = Image.new("RGB", (width, GAP + (last + 1) * step_y + len(BOX_COLOURS) * LINE_HEIGHT), SHEET_COLOUR)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for place, (pixels, caption, regions) in enumerate(rows):
        x, y = GAP + place % TILES_PER_ROW * step_x, GAP + place // TILES_PER_ROW * step_y
        sheet.paste(Image.fromarray(pixels.transpose(1, 2, 0)), (x, y))
        lines = [(part, TEXT_COLOUR) for part in textwrap.wrap(caption, CAPTION_WIDTH, max_lines=CAPTION_LINES)]
        for region, colour in zip(regions, BOX_COLOURS, strict=False):
            if place // TILES_PER_ROW == last:
                x0, y0, x1, y1 = (value * (TILE - 1) for value in region["bbox"])
                pen.rectangle((x + x0, y + y0, x + x1, y + y1), outline=colour, width=3)
                lines.append((textwrap.shorten(region["phrase"], CAPTION_WIDTH), colour))
        for number, (text, colour) in enumerate(lines):
            pen.text((x, y + TILE + 4 + number * LINE_HEIGHT), text, colour, font)
    return sheet
