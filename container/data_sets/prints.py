"""Procedural woodblock prints: the built-in data set, drawn instead of downloaded.

`draw(seed, index, size)` returns one print with its caption and its regions. It is a pure function of these three
numbers, without files, network or global state, so that any number of processes can share the work.

Positions are in units of the print's side, x to the right and y down, so that a scene can be painted at any size. The
shapes of a motif are in motif units: the origin is the motif's anchor (its centre in the sky, the middle of its foot
elsewhere), and 1.0 is about half its width.
"""

from __future__ import annotations

import functools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

VERSION = 2  # raise it whenever a print or its caption changes; info.json states it

SUPERSAMPLING = 2  # painted pixels per side of a final pixel; smooths the edges
OUTLINE = 1 / 110  # width, in units of the print's side
FRAME_WIDTH = 0.012  # in units of the print's side
HORIZON_RANGE = (0.48, 0.6)  # in units of the print's side, from the top
NAMED_SHARE = 0.65  # of the motifs; a caption names two in any case
MENTION_SHARE = 0.6  # how often a caption mentions each of the rest: a size, a column, the ground, the sky
TEXTURE_COUNT = 12  # paper textures per image size

# The contact sheet
TILES, TILES_PER_ROW = 12, 4
TILE, GAP = 288, 16  # pixels
LINE_HEIGHT, FONT_SIZE = 18, 14  # pixels
CAPTION_WIDTH, CAPTION_LINES = 44, 4  # characters, lines
SHEET_COLOUR, TEXT_COLOUR = (246, 242, 232), (44, 40, 48)
BOX_COLOURS = ((214, 0, 110), (0, 118, 214), (0, 140, 70), (206, 90, 0))  # one per region

RGB = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Colour:
    """A colour and the words for it. That of a sky fades to another one at the horizon."""

    rgb: RGB
    words: tuple[str, ...]
    at_horizon: RGB = (0, 0, 0)


PALETTE = {
    "red": Colour((188, 48, 40), ("red", "vermilion", "crimson")),
    "blue": Colour((40, 78, 142), ("blue", "indigo", "prussian blue")),
    "green": Colour((70, 116, 66), ("green", "mossy green", "jade")),
    "yellow": Colour((226, 184, 62), ("yellow", "golden", "ochre")),
    "purple": Colour((116, 70, 134), ("purple", "violet")),
    "grey": Colour((126, 128, 134), ("grey", "ash-grey", "slate")),
    "white": Colour((243, 240, 230), ("white", "pale")),
    "black": Colour((46, 44, 52), ("black", "dark")),
    "pink": Colour((232, 150, 164), ("pink", "rosy")),
    "orange": Colour((222, 122, 44), ("orange", "amber")),
    "brown": Colour((124, 84, 54), ("brown", "umber")),
}
SKIES = {
    "night": Colour((22, 34, 74), ("under a night sky", "in the dark of night", "on an indigo night"), (84, 100, 140)),
    "dawn": Colour((236, 196, 186), ("at a pink dawn", "in the first light of dawn", "at sunrise"), (246, 226, 196)),
    "dusk": Colour((206, 96, 60), ("at dusk", "under a burning sunset sky", "in the evening glow"), (242, 196, 120)),
    "day": Colour((92, 148, 190), ("under a clear blue sky", "on a bright day", "on a calm morning"), (216, 226, 216)),
    "mist": Colour((208, 206, 196), ("in thick mist", "under a hazy sky", "in the morning fog"), (226, 222, 208)),
    "gold": Colour((226, 196, 112), ("under a golden sky", "in yellow light", "under gold leaf"), (240, 222, 168)),
    "rain": Colour((120, 132, 144), ("in the falling rain", "in a shower", "in a grey downpour"), (178, 184, 182)),
    "snow": Colour((150, 162, 178), ("in falling snow", "during a snowfall", "in drifting flakes"), (222, 224, 224)),
}
GROUNDS = {
    "sea": Colour((52, 96, 144), ("by the sea", "on the open sea", "along the coast")),
    "river": Colour((120, 164, 172), ("by a river", "along the river bank", "beside a calm stream")),
    "field": Colour((150, 164, 84), ("in a green field", "among the rice fields", "on a grassy plain")),
    "snow": Colour((232, 232, 226), ("on snowy ground", "in a snow-covered land", "in deep snow")),
    "earth": Colour((190, 156, 108), ("on a dusty road", "along the road", "on bare earth")),
    "autumn": Colour((186, 112, 60), ("in an autumn meadow", "on russet ground", "among fallen leaves")),
}
INK, SEAL, SNOW, RAINDROP = (38, 34, 44), (176, 44, 40), (246, 244, 238), (206, 212, 214)
PLASTER, BARK, SKIN, CREST = (232, 220, 196), (92, 66, 48), (238, 214, 186), (190, 50, 44)
PAPER_TINT = (1.03, 1.0, 0.95)  # multiplies red, green, blue


@dataclass(frozen=True)
class Shape:
    """A filled polygon, or an open line if a line width is given."""

    points: Sequence[Point]
    fill: RGB | str = "colour"  # or "accent": the motif's first and second colour
    outlined: bool = True
    line_width: float = 0  # of an open line, in outlines


def line(points: Sequence[Point], fill: RGB | str = INK, width: float = 1) -> Shape:
    return Shape(points, fill, line_width=width)


def rectangle(x0: float, y0: float, x1: float, y1: float, fill: RGB | str = "colour", outlined: bool = True) -> Shape:
    return Shape([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outlined)


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, steps: int = 14) -> list[Point]:
    """Points on an ellipse around (x, y), from one angle to another (half turns, clockwise from the right)."""
    angles = [math.pi * (start + (end - start) * step / steps) for step in range(steps + 1)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


def ellipse(x: float, y: float, rx: float, ry: float, fill: RGB | str = "colour", outlined: bool = True) -> Shape:
    """Ellipse around (x, y) with the half axes rx and ry."""
    return Shape(arc(x, y, rx, ry, 0, 2, 24), fill, outlined)


# The shapes of the motifs, in the order of painting, in motif units (see the top of this file)
SUN = [ellipse(0, 0, 0.75, 0.75)]
MOON = [Shape(arc(0, 0, 0.75, 0.75, 0.5, 1.5) + arc(0, 0, 0.3, 0.75, 1.5, 0.5))]
KITE = [
    Shape([(0, -0.8), (0.5, -0.1), (0, 0.7), (-0.5, -0.1)]),
    Shape([(0, -0.8), (0.5, -0.1), (0, -0.1), (0, 0.7), (-0.5, -0.1), (0, -0.1)], "accent"),
    line([(0, 0.7), (0.2, 1), (-0.05, 1.2), (0.15, 1.5)]),
]
LANTERN = [
    line([(0, -1), (0, -0.6)]),
    ellipse(0, 0, 0.48, 0.6),
    *(line(arc(0, y, 0.44, 0.1, 0, 1)) for y in (-0.3, 0, 0.3)),
    rectangle(-0.25, -0.7, 0.25, -0.55, INK),
]
MOUNTAIN = [
    Shape([(-1.35, 0), (-0.75, -0.57), (-0.2, -1.44), (0.2, -1.44), (0.7, -0.63), (1.35, 0)]),
    Shape([(-0.42, -1.08), (-0.2, -1.44), (0.2, -1.44), (0.42, -1.08), (0.2, -0.9), (0.05, -1.1), (-0.16, -0.9)], SNOW),
]
PAGODA = [line([(0, -1.5), (0, -1.95)], width=1.6)]
for y, eaves, wall in ((0, 0.74, 0.37), (-0.52, 0.6, 0.3), (-1.04, 0.46, 0.23)):
    PAGODA.append(rectangle(-wall, y, wall, y - 0.3, PLASTER))
    PAGODA.append(Shape([(-eaves, y - 0.26), (-wall, y - 0.5), (wall, y - 0.5), (eaves, y - 0.26)]))
TORII = [
    *(Shape([(x * 0.64, 0), (x * 0.46, 0), (x * 0.42, -1.3), (x * 0.57, -1.3)]) for x in (-1, 1)),
    rectangle(-0.75, -0.95, 0.75, -0.82),
    Shape([(-1, -1.48), (0, -1.36), (1, -1.48), (0.92, -1.2), (0, -1.14), (-0.92, -1.2)]),
]
BRIDGE = [
    Shape(arc(0, 0.1, 1.35, 0.85, 1, 2) + arc(0, 0.1, 1.2, 0.6, 2, 1)),
    *(line([(x, y), (x, y - 0.28)], "colour", 2) for x, y in arc(0, 0.1, 1.35, 0.85, 1.15, 1.85, 4)),
    line(arc(0, -0.18, 1.35, 0.85, 1.15, 1.85), "colour", 2),
]
CROWNS = ((-0.45, -1, 0.4), (0.42, -1.05, 0.42), (0, -1.4, 0.46), (-0.1, -0.95, 0.36))
TREE = [
    Shape([(-0.1, 0), (0.1, 0), (0.06, -0.8), (-0.06, -0.8)], BARK),
    *(ellipse(x, y, radius, radius * 0.85) for x, y, radius in CROWNS),
    *(ellipse(x, y, 0.07, 0.07, SNOW, outlined=False) for x, y in arc(0, -1.13, 0.55, 0.36, 0.1, 2.1, 6)),
    *(ellipse(x, y, 0.07, 0.07, SNOW, outlined=False) for x, y in arc(-0.05, -1.25, 0.25, 0.2, 0.3, 2.3, 3)),
]
BOAT = [
    Shape([(-1, -0.3), (1, -0.3), (0.65, 0), (-0.7, 0)], "accent"),
    line([(0, -0.3), (0, -1.7)], width=1.6),
    Shape([(-0.5, -1.6), (0.45, -1.6), (0.62, -1), (0.5, -0.45), (-0.55, -0.45)]),
]
CRANE = [
    line([(-0.1, -0.6), (-0.12, 0)]),
    line([(0.08, -0.6), (0.12, 0)]),
    Shape([*arc(0, -0.9, 0.5, 0.36, 0, 1), (-0.75, -1.08), (-0.2, -1.2)]),
    line([(0.42, -0.9), (0.5, -1.3), (0.38, -1.62)], "colour", 3),
    ellipse(0.42, -1.68, 0.13, 0.11, CREST),
    line([(0.5, -1.68), (0.75, -1.64)]),
]
FIGURE = [
    Shape([(-0.16, -0.95), (0.16, -0.95), (0.42, 0), (-0.42, 0)], "accent"),
    ellipse(0, -1.1, 0.17, 0.17, SKIN),
    line([(0.12, -0.6), (0.12, -1.7)], width=1.4),
    Shape(arc(0.1, -1.25, 0.85, 0.62, 1, 2)),
    *(line([(0.1, -1.85), (x, -1.25)]) for x in (-0.35, 0.1, 0.55)),
]


@dataclass(frozen=True)
class Layer:
    """A depth of the scene. Lengths in units of the print's side."""

    scale: float  # half the width of a motif of medium size
    band: Point  # range of its motifs' anchors, below the horizon


@dataclass(frozen=True)
class Kind:
    """What can be drawn, where it belongs, and how it is spoken of.

    `forms` are phrases with the places {size} (with a blank behind it, or empty), {noun}, {colour}, {accent}.
    """

    shapes: list[Shape]
    layer: Layer
    nouns: tuple[str, ...]
    colours: tuple[str, ...]
    forms: tuple[str, ...] = ("a {size}{colour} {noun}",)


FAR = Layer(0.235, (0.01, 0.01))
SKY = Layer(0.105, (-0.37, -0.27))
MIDDLE = Layer(0.14, (0.02, 0.14))
NEAR = Layer(0.14, (0.24, 0.35))
LIGHTS = ("white", "yellow", "orange", "red", "grey")
BLOSSOMS = ("pink", "white", "red", "orange", "yellow", "purple")
TIMBER_AND_STONE = ("red", "orange", "brown", "grey", "black", "blue", "green")
PAINTS = ("red", "blue", "green", "yellow", "purple", "white", "black", "orange")
ROOFED = ("a {size}{noun} with {colour} roofs", "a {size}{colour}-roofed {noun}")
TWO_COLOURED = ("a {size}{colour} and {accent} {noun}", "a {size}{accent} and {colour} {noun}")
SAILED = ("a {size}{noun} with a {colour} sail", "a {size}{accent} {noun} with a {colour} sail")
DRESSED = ("a {noun} with a {colour} umbrella", "a {noun} in a {accent} robe under a {colour} umbrella")
KINDS = {
    "sun": Kind(SUN, SKY, ("sun", "sun disc", "setting sun"), LIGHTS),
    "moon": Kind(MOON, SKY, ("crescent moon", "moon", "half moon"), LIGHTS),
    "kite": Kind(KITE, SKY, ("kite", "paper kite"), PAINTS, TWO_COLOURED),
    "lantern": Kind(LANTERN, SKY, ("lantern", "paper lantern", "hanging lamp"), PAINTS),
    "mountain": Kind(MOUNTAIN, FAR, ("mountain", "peak", "snow-capped mountain", "volcano"), TIMBER_AND_STONE),
    "pagoda": Kind(PAGODA, MIDDLE, ("pagoda", "temple tower"), TIMBER_AND_STONE, ROOFED),
    "torii": Kind(TORII, MIDDLE, ("torii gate", "shrine gate", "gateway"), TIMBER_AND_STONE),
    "bridge": Kind(BRIDGE, MIDDLE, ("bridge", "arched bridge", "footbridge"), TIMBER_AND_STONE),
    "tree": Kind(TREE, MIDDLE, ("blossoming tree", "tree in bloom", "flowering tree"), BLOSSOMS),
    "boat": Kind(BOAT, NEAR, ("boat", "fishing boat", "skiff", "ship"), PAINTS, SAILED),
    "crane": Kind(CRANE, NEAR, ("crane", "heron", "standing crane"), ("white", "grey", "black", "pink", "blue")),
    "figure": Kind(FIGURE, NEAR, ("figure", "woman", "traveller", "person"), PAINTS, DRESSED),
}
COLUMNS = (0.2, 0.5, 0.8)  # x of the left, middle and right places, in units of the print's side
COLUMN_WORDS = ((" on the left", " at left"), (" in the middle", " at the centre"), (" on the right", " at right"))
SIZES = (0.68, 1.0, 1.38)  # small, medium, large: factor on a layer's scale
SIZE_WORDS = (("small ", "tiny ", "little "), ("",), ("large ", "great ", "big "))
LEADS = ("a woodblock print of ", "a print showing ", "ukiyo-e scene with ", "a view of ", "a landscape with ")
JOINTS = (" and ", " with ", " beside ", " near ", ", together with ")  # before the last motif of a caption


@dataclass(frozen=True)
class Motif:
    """One thing in a scene, and the words for it."""

    kind: Kind
    x: float  # of its anchor, in units of the print's side
    y: float
    scale: float  # motif unit, in units of the print's side
    colours: dict[str, RGB]  # of the fills "colour" and "accent"
    phrase: str
    where: str  # the column in words, or empty


def maybe(rng: Random, words: Sequence[str]) -> str:
    """One of the words, or nothing."""
    return rng.choice(words) if rng.random() < MENTION_SHARE else ""


def make_motif(rng: Random, kind: Kind, column: int, horizon: float) -> Motif:
    """A motif of this kind in this column, with a size, a place, colours and a phrase of its own."""
    size, first = rng.choice((0, 1, 1, 2)), rng.choice(kind.colours)
    second = rng.choice([name for name in PAINTS if name != first])
    colours = {"colour": PALETTE[first], "accent": PALETTE[second]}
    words = {name: rng.choice(colour.words) for name, colour in colours.items()}
    phrase = rng.choice(kind.forms).format(size=maybe(rng, SIZE_WORDS[size]), noun=rng.choice(kind.nouns), **words)
    tone = rng.uniform(0.94, 1.06)
    return Motif(
        kind,
        x=COLUMNS[column] + rng.uniform(-0.05, 0.05),
        y=horizon + rng.uniform(*kind.layer.band),
        scale=kind.layer.scale * SIZES[size] * rng.uniform(0.93, 1.07),
        colours={name: shade(colour.rgb, tone) for name, colour in colours.items()},
        phrase=re.sub(r"\ba (?=[aeiou])", "an ", phrase),
        where=maybe(rng, COLUMN_WORDS[column]),
    )


def place_motifs(rng: Random, horizon: float) -> list[Motif]:
    """Two to four motifs of different kinds. What is near never stands in front of something in the middle layer."""
    count, motifs, taken = rng.choice((2, 3, 3, 4)), [], set()
    for kind in rng.sample(list(KINDS.values()), len(KINDS)):
        plane = "ground" if kind.layer in (MIDDLE, NEAR) else kind.layer
        free = [column for column in range(len(COLUMNS)) if (plane, column) not in taken]
        if free and len(motifs) < count:
            column = rng.choice(free)
            taken.add((plane, column))
            motifs.append(make_motif(rng, kind, column, horizon))
    return motifs


def write_caption(rng: Random, motifs: list[Motif], sky: str, ground: str) -> str:
    """One sentence that names these motifs."""
    parts = [motif.phrase + motif.where for motif in motifs]
    text = ", ".join(parts[:-1]) + rng.choice(JOINTS) + parts[-1]
    lead, place, time = maybe(rng, LEADS), maybe(rng, GROUNDS[ground].words), maybe(rng, SKIES[sky].words)
    text = lead + text + (place and " " + place)
    if time:
        text = f"{text}, {time}" if lead or rng.random() < 0.5 else f"{time}, {text}"
    return text[0].upper() + text[1:] + rng.choice(("", "."))


def shade(colour: RGB, factor: float) -> RGB:
    """The colour made darker (factor below 1) or lighter (above 1)."""
    return tuple(min(255, int(value * factor)) for value in colour)


def paint(pen: ImageDraw.ImageDraw, side: int, shapes: Iterable[Shape], motif: Motif | None = None) -> list[float]:
    """Paints the shapes of a motif, or (at least one) shapes in units of the print's side.

    Returns their box x0, y0, x1, y1, cut to the print, in units of its side; the widths of lines do not count.
    """
    x, y, scale, colours = (motif.x, motif.y, motif.scale, motif.colours) if motif else (0, 0, 1, {})
    xs, ys = [], []
    for shape in shapes:
        points = [((x + px * scale) * side, (y + py * scale) * side) for px, py in shape.points]
        fill = colours.get(shape.fill, shape.fill)
        width = max(1, round(OUTLINE * side * (shape.line_width or 1)))
        if shape.line_width:
            pen.line(points, fill, width, joint="curve")
        else:
            pen.polygon(points, fill)
            if shape.outlined:
                pen.line([*points, points[0]], INK, width)
        xs += [px for px, _ in points]
        ys += [py for _, py in points]
    return [round(min(1.0, max(0.0, value / side)), 4) for value in (min(xs), min(ys), max(xs), max(ys))]


def ground_marks(rng: Random, sky: str, ground: str, horizon: float) -> Iterator[Shape]:
    """Distant hills in some prints, which no caption names; ripples on water, blades in a meadow, stones or tracks."""
    if rng.random() < 0.4:
        x, y = rng.random(), horizon
        ridge = [(x - 0.5, y), (x - 0.2, y - 0.07), (x, y - 0.04), (x + 0.2, y - 0.09), (x + 0.5, y)]
        yield Shape(ridge, shade(SKIES[sky].at_horizon, 0.82), outlined=False)
    colour = GROUNDS[ground].rgb
    for _ in range(20):
        x, y, half = rng.random(), rng.uniform(horizon + 0.03, 1), rng.uniform(0.03, 0.09)
        if ground in ("sea", "river"):
            crests = [(x - half, y), (x - half / 2, y - 0.012), (x, y), (x + half / 2, y - 0.012), (x + half, y)]
            yield line(crests, shade(colour, 1.3 if ground == "sea" else 0.8))
        elif ground in ("field", "autumn"):
            yield line([(x + 0.008, y - 0.03), (x, y), (x - 0.012, y - 0.025)], shade(colour, 0.77))
        else:
            yield ellipse(x, y, 0.012, 0.006, shade(colour, 0.88), outlined=False)


def weather(rng: Random, sky: str) -> Iterator[Shape]:
    """Rain or snow in front of everything else, and the publisher's seal in a corner, which no caption names."""
    for _ in range(40):
        x, y = rng.uniform(0, 1.1), rng.random()
        if sky == "rain":
            yield line([(x, y), (x - 0.03, y + 0.1)], RAINDROP)
        elif sky == "snow":
            yield ellipse(x, y, 0.008, 0.008, SNOW, outlined=False)
    x, y = rng.choice((0.05, 0.92)), rng.choice((0.05, 0.8))
    yield rectangle(x, y, x + 0.035, y + 0.1, SEAL, outlined=False)


def paint_backdrop(rng: Random, sky: Colour, ground: Colour, horizon: float, side: int) -> Image.Image:
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
    sky, ground, horizon = rng.choice(list(SKIES)), rng.choice(list(GROUNDS)), rng.uniform(*HORIZON_RANGE)
    motifs = place_motifs(rng, horizon)
    named = motifs[:2] + [motif for motif in motifs[2:] if rng.random() < NAMED_SHARE]
    caption = write_caption(rng, named, sky, ground)
    canvas = paint_backdrop(rng, SKIES[sky], GROUNDS[ground], horizon, side)
    pen = ImageDraw.Draw(canvas)
    paint(pen, side, ground_marks(rng, sky, ground, horizon))
    regions = []
    for motif in sorted(motifs, key=lambda motif: (motif.kind.layer != FAR, motif.y)):
        box = paint(pen, side, motif.kind.shapes, motif)
        if motif in named:
            regions.append({"phrase": motif.phrase, "bbox": box})
    paint(pen, side, weather(rng, sky))
    pen.rectangle((0, 0, side - 1, side - 1), outline=INK, width=max(SUPERSAMPLING, round(FRAME_WIDTH * side)))
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
