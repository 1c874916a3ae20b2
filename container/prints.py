"""Procedural woodblock prints: the built-in data set, drawn instead of downloaded.

`draw(seed, index, size)` returns one print with its caption and its regions. Everything is a pure function of these
three numbers: no file, no network, no global state, so that any number of processes can share the work.

A print is composed first (`compose`: what stands where, and the words for it) and then painted (`paint`). Composition
knows nothing of pixels: positions are in units of the print's side, x to the right and y down, so that one scene can
be painted at any size. A motif's own shape is given in motif units: the origin is the motif's anchor (its centre in
the sky, the middle of its foot elsewhere) and 1.0 is about half its width.
"""

from __future__ import annotations

import functools
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SUPERSAMPLING = 2  # painted pixels per side of a final pixel; smooths the edges
LINES_PER_SIDE = 110  # an outline is 1/110 of the print's side wide, at least one painted pixel
FRAME_WIDTH = 0.012  # of the print's side
HORIZON_RANGE = (0.48, 0.62)  # of the print's side, from the top
NAMED_SHARE = 0.85  # share of the motifs that the caption mentions
MIN_NAMED = 2  # motifs a caption mentions at least
SIZE_WORD_SHARE = 0.6  # share of the phrases that say how large the motif is (where it is not of medium size)
COLUMN_WORD_SHARE = 0.35  # share of the mentions that say where the motif stands
GROUND_SHARE = 0.5  # share of the captions that mention the ground
SKY_SHARE = 0.65  # share of the captions that mention the sky
SKY_FIRST_SHARE = 0.25  # of the captions that mention the sky and have no lead: share that begin with it
HILLS_SHARE = 0.4  # share of the prints that get far hills, which no caption names
NEIGHBOUR_SHARE = 0.2  # how often a motif is let stand right behind or before another one
TEXTURE_COUNT = 12  # paper textures per image size
TEXTURE_SEED = 1234

# The contact sheet
COLUMNS_OF_TILES, TILES = 4, 12
TILE = 288  # pixels per side of an image
GAP = 16  # pixels
LINE_HEIGHT = 18  # pixels
FONT_SIZE = 14  # pixels
CAPTION_WIDTH = 44  # characters
CAPTION_LINES = 4
SHEET_COLOUR, TEXT_COLOUR = (246, 242, 232), (44, 40, 48)
BOX_COLOURS = ((214, 0, 110), (0, 118, 214), (0, 140, 70), (206, 90, 0), (122, 60, 200))  # one per region shown

RGB = tuple[int, int, int]
Point = tuple[float, float]
Region = dict[str, str | list[float]]


@dataclass(frozen=True)
class Colour:
    """A pigment and its names."""

    rgb: RGB
    words: tuple[str, ...]


@dataclass(frozen=True)
class Sky:
    """Vertical gradient behind the horizon, and its names."""

    top: RGB
    bottom: RGB
    words: tuple[str, ...]


@dataclass(frozen=True)
class Ground:
    """Colour below the horizon, and its names."""

    rgb: RGB
    words: tuple[str, ...]


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
ROBES = ("red", "blue", "green", "yellow", "purple", "grey", "white", "black")

SKIES = {
    "night": Sky((22, 34, 74), (84, 100, 140), ("a night sky", "the dark of night", "a deep indigo night")),
    "dawn": Sky((236, 196, 186), (246, 226, 196), ("a pink dawn", "the first light of dawn", "a rosy morning sky")),
    "dusk": Sky((206, 96, 60), (242, 196, 120), ("an orange dusk", "a burning sunset sky", "the evening glow")),
    "day": Sky((92, 148, 190), (216, 226, 216), ("a clear blue sky", "a bright day", "a calm blue morning")),
    "mist": Sky((208, 206, 196), (226, 222, 208), ("thick mist", "a hazy grey sky", "morning fog")),
    "gold": Sky((226, 196, 112), (240, 222, 168), ("a golden sky", "a sky of gold leaf", "warm yellow light")),
    "rain": Sky((120, 132, 144), (178, 184, 182), ("falling rain", "a rain shower", "a grey downpour")),
    "snow": Sky((150, 162, 178), (222, 224, 224), ("falling snow", "a snowfall", "drifting snowflakes")),
}
GROUNDS = {
    "sea": Ground((52, 96, 144), ("by the sea", "on the open sea", "along the coast")),
    "river": Ground((120, 164, 172), ("by a river", "along the river bank", "beside a calm stream")),
    "field": Ground((150, 164, 84), ("in a green field", "among the rice fields", "on a grassy plain")),
    "snow": Ground((232, 232, 226), ("on snowy ground", "in a snow-covered land", "in deep snow")),
    "earth": Ground((190, 156, 108), ("on a dusty road", "along the road", "on bare earth")),
    "autumn": Ground((186, 112, 60), ("in an autumn meadow", "on russet ground", "among fallen leaves")),
}

INK = (38, 34, 44)  # outlines
FRAME = (40, 36, 44)
SEAL = (176, 44, 40)
PAPER_TINT = (1.03, 1.0, 0.95)  # multiplies red, green, blue
CREST = (190, 50, 44)  # of the crane
SNOW_CAP = (246, 244, 238)
PLASTER = (232, 220, 196)
WALL = (222, 206, 176)
DOOR = (90, 66, 52)
PINE_BARK = (96, 66, 48)
CHERRY_BARK = (86, 60, 50)
WILLOW_BARK = (96, 74, 54)
PETAL = (250, 240, 236)
HULL = (120, 82, 54)
FOAM = (248, 246, 240)
FISH_EYE = (250, 248, 240)
CAT_EYE = (250, 220, 80)
SKIN = (238, 214, 186)
STALK = (66, 112, 66)
LEAF = (76, 124, 72)
RAINDROP = (206, 212, 214)
SNOWFLAKE = (250, 250, 250)


class Brush:
    """Paints in a frame of its own, given by its origin and scale in units of the print's side.

    `extent` is x0, y0, x1, y1 of the shapes painted so far, in units of the print's side; line widths do not count.
    """

    origin: Point = (0.0, 0.0)
    scale = 1.0

    def __init__(self, target: ImageDraw.ImageDraw, side: int, rng: Random) -> None:
        self.target = target
        self.side = side
        self.rng = rng
        self.line_width = max(1, round(side / LINES_PER_SIDE))
        self.extent = [math.inf, math.inf, -math.inf, -math.inf]

    def _pixels(self, points: Sequence[Point]) -> list[Point]:
        """Points in painted pixels; grows the extent by them."""
        placed = [(self.origin[0] + x * self.scale, self.origin[1] + y * self.scale) for x, y in points]
        xs, ys = zip(*placed, strict=True)
        x0, y0, x1, y1 = self.extent
        self.extent = [min(x0, *xs), min(y0, *ys), max(x1, *xs), max(y1, *ys)]
        return [(x * self.side, y * self.side) for x, y in placed]

    def polygon(self, points: Sequence[Point], fill: RGB, outline: RGB | None = INK) -> None:
        pixels = self._pixels(points)
        self.target.polygon(pixels, fill=fill)
        if outline is not None:
            self.target.line([*pixels, pixels[0]], fill=outline, width=self.line_width)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: RGB, outline: RGB | None = INK) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outline)

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: RGB, outline: RGB | None = INK) -> None:
        """Ellipse around (x, y) with the half axes rx and ry."""
        box = self._pixels([(x - rx, y - ry), (x + rx, y + ry)])
        self.target.ellipse(box, fill=fill, outline=outline, width=0 if outline is None else self.line_width)

    def stroke(self, points: Sequence[Point], colour: RGB = INK, width: float = 1.0) -> None:
        """Open line; width in outlines."""
        pixels = self._pixels(points)
        self.target.line(pixels, fill=colour, width=max(1, round(self.line_width * width)), joint="curve")


class MotifBrush(Brush):
    """Paints in motif units, with a slightly varied tone of the motif's colour."""

    def __init__(self, target: ImageDraw.ImageDraw, side: int, rng: Random, motif: Motif) -> None:
        super().__init__(target, side, rng)
        self.motif = motif
        self.origin = (motif.x, motif.y)
        self.scale = motif.scale
        self.colour = shade(PALETTE[motif.colour].rgb, rng.uniform(0.94, 1.06))


def shade(colour: RGB, factor: float) -> RGB:
    """The colour made darker (factor below 1) or lighter (above 1)."""
    red, green, blue = (min(255, int(value * factor)) for value in colour)
    return red, green, blue


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float, steps: int = 14) -> list[Point]:
    """Points on an ellipse around (x, y), from one angle to another (half turns, clockwise from the right)."""
    angles = [math.pi * (start + (end - start) * step / steps) for step in range(steps + 1)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


# The motifs. Each function paints one, in motif units (see the top of this file), with brush.colour as its own colour.


def draw_sun(brush: MotifBrush) -> None:
    brush.ellipse(0, 0, 0.75, 0.75, brush.colour)


def draw_moon(brush: MotifBrush) -> None:
    brush.polygon(arc(0, 0, 0.75, 0.75, 0.5, 1.5) + arc(0, 0, 0.3, 0.75, 1.5, 0.5), brush.colour)


def draw_geese(brush: MotifBrush) -> None:
    for place in range(brush.motif.count):
        step = place - (brush.motif.count - 1) / 2
        x, y = step * 0.62, abs(step) * 0.28
        wing = [(-0.3, -0.15), (-0.06, 0), (0, 0.105), (0.06, 0), (0.3, -0.15), (0, -0.015)]
        brush.polygon([(x + dx, y + dy) for dx, dy in wing], brush.colour)


def draw_crane(brush: MotifBrush) -> None:
    brush.stroke([(-0.1, -0.6), (-0.12, 0)])
    brush.stroke([(0.08, -0.6), (0.12, 0)])
    body = arc(0, -0.9, 0.5, 0.36, 0.05 / math.pi, 1)
    brush.polygon([*body, (-0.75, -1.08), (-0.2, -1.2)], brush.colour)
    brush.stroke([(0.42, -0.9), (0.5, -1.3), (0.38, -1.62)], brush.colour, 3)
    brush.ellipse(0.42, -1.68, 0.13, 0.11, CREST)
    brush.stroke([(0.5, -1.68), (0.75, -1.64)])


def draw_kite(brush: MotifBrush) -> None:
    brush.polygon([(0, -0.8), (0.5, -0.1), (0, 0.7), (-0.5, -0.1)], brush.colour)
    brush.stroke([(0, -0.8), (0, 0.7)])
    brush.stroke([(-0.5, -0.1), (0.5, -0.1)])
    brush.stroke([(0, 0.7), (0.2, 1), (-0.05, 1.2), (0.15, 1.5)])


def draw_lantern(brush: MotifBrush) -> None:
    brush.stroke([(0, -1), (0, -0.6)])
    brush.ellipse(0, 0, 0.48, 0.6, brush.colour)
    for y in (-0.3, 0, 0.3):
        brush.stroke(arc(0, y, 0.44, 0.1, 0, 1, 6))
    brush.rectangle(-0.25, -0.7, 0.25, -0.55, INK)


def draw_cloud(brush: MotifBrush) -> None:
    for x, y, radius in ((-0.8, 0.1, 0.42), (-0.25, -0.1, 0.55), (0.35, 0, 0.5), (0.9, 0.12, 0.36)):
        brush.ellipse(x, y, radius, radius * 0.62, brush.colour)
    brush.polygon([(-1.1, 0.12), (1.15, 0.12), (1, 0.36), (-1, 0.36)], brush.colour, outline=None)


def draw_mountain(brush: MotifBrush) -> None:
    left = [(-1.35, 0), (-0.75, -0.57), (-0.2, -1.44)]
    right = [(0.2, -1.44), (0.7, -0.63), (1.35, 0)]
    brush.polygon(left + right, brush.colour)
    cap = [(-0.42, -1.08), (-0.2, -1.44), (0.2, -1.44), (0.42, -1.08), (0.2, -0.93), (0.05, -1.11), (-0.16, -0.9)]
    brush.polygon(cap, SNOW_CAP)


def draw_pagoda(brush: MotifBrush) -> None:
    for storey in range(3):
        y, half = -0.52 * storey, 0.62 - 0.12 * storey
        brush.rectangle(-half * 0.6, y, half * 0.6, y - 0.3, PLASTER)
        eaves, ridge = half * 1.2, half * 0.6
        roof = [(-eaves, y - 0.26), (-ridge, y - 0.5), (ridge, y - 0.5), (eaves, y - 0.26)]
        brush.polygon(roof, brush.colour)
    brush.stroke([(0, -1.5), (0, -1.95)], width=1.6)


def draw_torii(brush: MotifBrush) -> None:
    for x in (-0.55, 0.55):
        post = [(x - 0.09, 0), (x + 0.09, 0), (x * 0.9 + 0.08, -1.3), (x * 0.9 - 0.08, -1.3)]
        brush.polygon(post, brush.colour)
    brush.rectangle(-0.75, -0.95, 0.75, -0.82, brush.colour)
    lintel = [(-1, -1.48), (0, -1.36), (1, -1.48), (0.92, -1.2), (0, -1.14), (-0.92, -1.2)]
    brush.polygon(lintel, brush.colour)


def draw_house(brush: MotifBrush) -> None:
    brush.rectangle(-0.7, 0, 0.7, -0.55, WALL)
    brush.rectangle(-0.12, 0, 0.2, -0.4, DOOR)
    brush.polygon([(-1, -0.5), (-0.5, -1.1), (0.5, -1.1), (1, -0.5)], brush.colour)


def draw_bridge(brush: MotifBrush) -> None:
    deck = arc(0, 0.1, 1.35, 0.85, 1, 2, 16)
    brush.polygon(deck + arc(0, 0.1, 1.2, 0.6, 2, 1, 16), brush.colour)
    for x, y in deck[2:15:3]:
        brush.stroke([(x, y), (x, y - 0.28)], brush.colour, 2)
    brush.stroke([(x, y - 0.28) for x, y in deck[2:15]], brush.colour, 2)


def draw_pine(brush: MotifBrush) -> None:
    brush.polygon([(-0.1, 0), (0.1, 0), (0.2, -0.8), (-0.02, -1.4), (0, -0.7)], PINE_BARK)
    for x, y, radius in ((-0.35, -0.75, 0.5), (0.45, -1, 0.48), (-0.1, -1.4, 0.52), (0.1, -1.8, 0.34)):
        brush.ellipse(x, y, radius, 0.2, brush.colour)


def draw_blossom(brush: MotifBrush) -> None:
    brush.polygon([(-0.1, 0), (0.1, 0), (0.06, -0.8), (-0.06, -0.8)], CHERRY_BARK)
    for x, y, radius in ((-0.45, -1, 0.4), (0.42, -1.05, 0.42), (0, -1.4, 0.46), (-0.1, -0.95, 0.36)):
        brush.ellipse(x, y, radius, radius * 0.85, brush.colour)
    for _ in range(9):
        angle, distance = brush.rng.random() * 6.28, brush.rng.random() * 0.75
        x, y = math.cos(angle) * distance, -1.15 + math.sin(angle) * distance * 0.6
        brush.ellipse(x, y, 0.07, 0.07, PETAL, outline=None)


def draw_willow(brush: MotifBrush) -> None:
    brush.polygon([(-0.1, 0), (0.12, 0), (0.02, -1.5), (-0.08, -1.5)], WILLOW_BARK)
    for twig in range(-4, 5):
        x, tip = twig * 0.22, -(0.35 + 0.16 * (twig % 3))
        colour = brush.colour if twig % 2 else shade(brush.colour, 0.72)
        brush.stroke([(0, -1.55), (x * 0.7, -1.72), (x, -1.2), (x * 1.05, tip)], colour, 2)


def draw_bamboo(brush: MotifBrush) -> None:
    for x, height in ((-0.4, 1.7), (0, 2), (0.4, 1.6)):
        brush.polygon([(x - 0.07, 0), (x + 0.07, 0), (x + 0.1, -height), (x, -height)], brush.colour)
        for share in (0.35, 0.6, 0.85):
            y = -height * share
            leaf = [(x, y), (x + 0.35, y - 0.12), (x + 0.12, y + 0.05)]
            brush.polygon(leaf, shade(brush.colour, 0.75), outline=None)


def draw_boat(brush: MotifBrush) -> None:
    brush.polygon([(-1, -0.3), (1, -0.3), (0.65, 0), (-0.7, 0)], HULL)
    brush.stroke([(0, -0.3), (0, -1.7)], width=1.6)
    sail = [(-0.5, -1.6), (0.45, -1.6), (0.62, -1), (0.5, -0.45), (-0.55, -0.45)]
    brush.polygon(sail, brush.colour)


def draw_wave(brush: MotifBrush) -> None:
    back = [(-1.3, 0), *arc(0.1, -0.1, 1.25, 1.15, 1.05, 1.85, 12)]
    hollow = [*arc(0.55, -0.35, 0.55, 0.45, 1.85, 1, 8), (0.2, 0)]
    brush.polygon(back + hollow, brush.colour)
    for place in (4, 6, 8, 10, 12, 13):
        x, y = back[place]
        brush.ellipse(x, y, 0.17, 0.15, FOAM)


def draw_fish(brush: MotifBrush) -> None:
    brush.polygon([(-0.7, -0.4), (-1.15, -0.78), (-1, -0.4), (-1.15, -0.02)], brush.colour)
    brush.ellipse(0, -0.4, 0.8, 0.4, brush.colour)
    brush.polygon([(-0.2, -0.76), (0.3, -0.76), (0, -1.02)], shade(brush.colour, 0.8))
    brush.ellipse(0.5, -0.48, 0.08, 0.08, FISH_EYE)
    for x in (-0.2, 0.05):
        brush.stroke(arc(x, -0.4, 0.16, 0.28, -1.2 / math.pi, 1.2 / math.pi, 6))


def draw_umbrella(brush: MotifBrush) -> None:
    brush.polygon([(-0.16, -0.95), (0.16, -0.95), (0.42, 0), (-0.42, 0)], PALETTE[brush.motif.robe].rgb)
    brush.ellipse(0, -1.1, 0.17, 0.17, SKIN)
    brush.stroke([(0.12, -0.6), (0.12, -1.7)], width=1.4)
    brush.polygon(arc(0.1, -1.25, 0.85, 0.62, 1, 2, 12), brush.colour)
    for x in (-0.45, 0, 0.45):
        brush.stroke([(0.1, -1.85), (0.1 + x, -1.25)])


def draw_cat(brush: MotifBrush) -> None:
    brush.ellipse(0, -0.38, 0.48, 0.4, brush.colour)
    ears = [(0.2, -1.25), (0.3, -0.95), (0.75, -0.95), (0.85, -1.25), (0.68, -1.1), (0.38, -1.1)]
    brush.polygon(ears, brush.colour)
    brush.ellipse(0.52, -0.82, 0.33, 0.28, brush.colour)
    brush.stroke([(-0.42, -0.25), (-0.8, -0.3), (-0.85, -0.75)], brush.colour, 3)
    for x in (0.42, 0.64):
        brush.ellipse(x, -0.86, 0.05, 0.05, CAT_EYE, outline=None)


def draw_iris(brush: MotifBrush) -> None:
    for stem in range(3):
        x, height = (stem - 1) * 0.55, 1 + 0.25 * (stem % 2)
        brush.stroke([(x, 0), (x, -height)], STALK, 2.2)
        brush.polygon([(x, 0), (x + 0.28, -height * 0.75), (x + 0.1, 0)], LEAF, outline=None)
        for angle in (-2.5, -1.57, -0.64):
            petal = (x + math.cos(angle) * 0.18, -height + math.sin(angle) * 0.16)
            brush.ellipse(*petal, 0.17, 0.15, brush.colour)


def draw_rock(brush: MotifBrush) -> None:
    brush.polygon([(-1, 0), (-0.8, -0.5), (-0.3, -0.85), (0.25, -0.7), (0.7, -0.4), (1, 0)], brush.colour)
    brush.stroke([(-0.3, -0.8), (-0.1, -0.4), (-0.2, 0)])
    brush.stroke([(0.25, -0.7), (0.4, -0.3)])


def draw_fan(brush: MotifBrush) -> None:
    brush.polygon(arc(0, -0.1, 1, 1, 1.12, 1.88, 12) + arc(0, -0.1, 0.35, 0.35, 1.88, 1.12, 6), brush.colour)
    for rib in range(1, 6):
        angle = math.pi * (1.12 + 0.76 * rib / 6)
        brush.stroke([(0, -0.1), (math.cos(angle) * 0.95, -0.1 + math.sin(angle) * 0.95)])


@dataclass(frozen=True)
class MotifKind:
    """What can be drawn, where it belongs and how it is spoken of.

    `forms` are phrases with the places {size} (with a blank behind it, or empty), {colour}, {noun}, and for single
    kinds {count} or {robe}.
    """

    draw: Callable[[MotifBrush], None]
    layer: str
    colours: tuple[str, ...]
    nouns: tuple[str, ...]
    forms: tuple[str, ...] = ("a {size}{colour} {noun}",)


KINDS = {
    "sun": MotifKind(
        draw_sun,
        "sky",
        ("red", "orange", "yellow", "white", "pink"),
        ("sun", "sun disc", "setting sun"),
    ),
    "moon": MotifKind(
        draw_moon,
        "sky",
        ("white", "yellow", "orange", "grey", "red"),
        ("crescent moon", "moon", "half moon"),
    ),
    "geese": MotifKind(
        draw_geese,
        "sky",
        ("black", "white", "grey", "brown"),
        ("geese", "wild geese", "birds"),
        ("{count} {colour} {noun}", "a flock of {count} {colour} {noun}", "{count} {colour} {noun} in flight"),
    ),
    "kite": MotifKind(
        draw_kite,
        "sky",
        ("red", "blue", "yellow", "white", "purple", "green", "black"),
        ("kite", "paper kite"),
        ("a {size}{colour} {noun}", "a {size}{noun} in {colour}"),
    ),
    "lantern": MotifKind(
        draw_lantern,
        "sky",
        ("red", "white", "yellow", "orange", "pink", "green"),
        ("lantern", "paper lantern", "hanging lamp"),
    ),
    "cloud": MotifKind(
        draw_cloud,
        "sky",
        ("white", "pink", "grey", "purple", "yellow"),
        ("cloud", "bank of cloud", "drifting cloud"),
    ),
    "mountain": MotifKind(
        draw_mountain,
        "far",
        ("blue", "grey", "green", "purple", "red", "brown", "black"),
        ("mountain", "peak", "snow-capped mountain", "volcano"),
        ("a {size}{colour} {noun}", "a {size}{noun} in {colour}"),
    ),
    "pagoda": MotifKind(
        draw_pagoda,
        "mid",
        ("red", "blue", "green", "grey", "black", "brown"),
        ("pagoda", "temple tower"),
        ("a {size}{noun} with {colour} roofs", "a {size}{colour}-roofed {noun}"),
    ),
    "torii": MotifKind(
        draw_torii,
        "mid",
        ("red", "orange", "brown", "white", "black", "grey"),
        ("torii gate", "shrine gate", "gateway"),
    ),
    "house": MotifKind(
        draw_house,
        "mid",
        ("brown", "grey", "yellow", "blue", "red", "white"),
        ("house", "cottage", "tea house", "hut"),
        ("a {size}{noun} with a {colour} roof", "a {size}{colour}-roofed {noun}"),
    ),
    "bridge": MotifKind(
        draw_bridge,
        "mid",
        ("red", "brown", "grey", "orange", "blue", "black"),
        ("bridge", "arched bridge", "footbridge"),
    ),
    "pine": MotifKind(
        draw_pine,
        "mid",
        ("green", "black", "blue", "yellow"),
        ("pine", "pine tree", "old pine"),
    ),
    "blossom": MotifKind(
        draw_blossom,
        "mid",
        ("pink", "white", "red", "orange", "yellow", "purple"),
        ("blossoming tree", "tree in bloom", "flowering tree"),
        ("a {size}{colour} {noun}", "a {size}{noun} with {colour} petals"),
    ),
    "willow": MotifKind(
        draw_willow,
        "mid",
        ("green", "yellow", "brown", "grey"),
        ("willow", "weeping willow", "willow tree"),
    ),
    "bamboo": MotifKind(
        draw_bamboo,
        "mid",
        ("green", "yellow", "brown", "black"),
        ("bamboo", "bamboo stalks", "bamboo canes"),
        ("{size}{colour} {noun}", "some {colour} {noun}"),
    ),
    "boat": MotifKind(
        draw_boat,
        "near",
        ("white", "red", "yellow", "blue", "brown", "purple", "pink", "black"),
        ("boat", "fishing boat", "skiff", "ship"),
        ("a {size}{noun} with a {colour} sail", "a {size}{colour}-sailed {noun}"),
    ),
    "wave": MotifKind(
        draw_wave,
        "near",
        ("blue", "green", "purple", "grey", "black"),
        ("wave", "breaking wave", "curling wave"),
    ),
    "fish": MotifKind(
        draw_fish,
        "near",
        ("red", "yellow", "black", "white", "orange", "blue"),
        ("carp", "fish", "koi"),
    ),
    "umbrella": MotifKind(
        draw_umbrella,
        "near",
        ("red", "blue", "yellow", "white", "green", "purple", "black", "pink", "orange"),
        ("figure", "woman", "traveller", "person"),
        (
            "a {noun} with a {colour} umbrella",
            "a {noun} in a {robe} robe under a {colour} umbrella",
            "a {noun} in {robe} holding a {colour} parasol",
        ),
    ),
    "cat": MotifKind(
        draw_cat,
        "near",
        ("white", "black", "orange", "grey", "brown"),
        ("cat", "sitting cat"),
    ),
    "crane": MotifKind(
        draw_crane,
        "near",
        ("white", "grey", "black", "pink", "blue"),
        ("crane", "heron", "standing crane"),
    ),
    "iris": MotifKind(
        draw_iris,
        "near",
        ("purple", "blue", "white", "yellow", "pink", "red"),
        ("irises", "iris flowers", "flowers"),
        ("{colour} {noun}", "some {colour} {noun}", "a clump of {colour} {noun}"),
    ),
    "rock": MotifKind(
        draw_rock,
        "near",
        ("grey", "brown", "black", "green", "purple"),
        ("rock", "boulder", "mossy stone"),
    ),
    "fan": MotifKind(
        draw_fan,
        "near",
        ("red", "yellow", "blue", "white", "purple", "green", "pink"),
        ("fan", "folding fan", "paper fan"),
        ("an open {colour} {noun}", "a {size}{colour} {noun}"),
    ),
}


@dataclass(frozen=True)
class Layer:
    """A depth of the scene: how likely its places are, how large its motifs, and when they are painted."""

    weight: float
    scale: float  # half width of a motif of medium size, in units of the print's side
    order: int  # the lower is painted first


LAYERS = {
    "sky": Layer(weight=1.0, scale=0.105, order=1),
    "far": Layer(weight=0.5, scale=0.235, order=0),
    "mid": Layer(weight=1.3, scale=0.14, order=2),
    "near": Layer(weight=1.5, scale=0.13, order=3),
}
COLUMNS = (0.2, 0.5, 0.8)  # x of the left, middle and right places, in units of the print's side
SIZES = (0.68, 1.0, 1.38)  # small, medium, large: factor on a layer's scale
GEESE_SCALE = 0.8  # a flock is wider than its motif unit

COUNT_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}
SIZE_WORDS = (("small ", "tiny ", "little "), ("",), ("large ", "great ", "big "))
COLUMN_WORDS = (
    ("on the left", "at left", "to the left"),
    ("in the middle", "at the centre", "in the centre"),
    ("on the right", "at right", "to the right"),
)
LEADS = (
    *("", "", ""),
    "a woodblock print of ",
    "a print showing ",
    "ukiyo-e scene with ",
    "a view of ",
    "a landscape with ",
)


@dataclass(frozen=True)
class Motif:
    """One thing in a scene. Lengths in units of the print's side; column and size are places in COLUMNS and SIZES."""

    kind: str
    column: int
    size: int
    scale: float
    x: float
    y: float
    colour: str
    count: int = 0  # of geese
    robe: str = ""  # colour of the robe under the umbrella
    phrase: str = ""
    named: bool = False  # does the caption mention it?


@dataclass(frozen=True)
class Scene:
    """A print before it is painted; the motifs in the order of painting."""

    sky: str
    ground: str
    horizon: float
    motifs: tuple[Motif, ...]
    caption: str


def place_motif(rng: Random, kind: str, column: int, horizon: float) -> Motif:
    """A motif of this kind in this column, with a size, a place and a colour of its own."""
    layer = KINDS[kind].layer
    size = rng.choice((0, 1, 1, 2))
    scale = LAYERS[layer].scale * SIZES[size] * rng.uniform(0.93, 1.07)
    x = COLUMNS[column] + rng.uniform(-0.05, 0.05)
    heights = {
        "sky": rng.uniform(0.13, 0.3),
        "far": horizon + 0.01,
        "mid": horizon + rng.uniform(0.02, 0.14),
        "near": rng.uniform(0.76, 0.93),
    }
    motif = Motif(kind, column, size, scale, x, heights[layer], rng.choice(KINDS[kind].colours))
    if kind == "geese":
        return replace(motif, count=rng.choice((2, 3, 4, 5)), scale=scale * GEESE_SCALE)
    if kind == "umbrella":
        return replace(motif, robe=rng.choice(ROBES))
    return motif


def is_free(rng: Random, layer: str, column: int, taken: set[tuple[str, int]]) -> bool:
    """May another motif go to this place? There is one mountain at most, and what is near rarely hides the middle."""
    if (layer, column) in taken:
        return False
    if layer == "far" and any(other == "far" for other, _ in taken):
        return False
    behind_or_before = {"mid": "near", "near": "mid"}.get(layer)
    return (behind_or_before, column) not in taken or rng.random() >= 1 - NEIGHBOUR_SHARE


def place_motifs(rng: Random, horizon: float) -> list[Motif]:
    """Two to four motifs of different kinds at different places, in the order of painting."""
    count = rng.choice((2, 3, 3, 4))
    places = [(layer, column) for layer in LAYERS for column in range(len(COLUMNS))]
    weights = [LAYERS[layer].weight for layer, _ in places]
    motifs: dict[str, Motif] = {}
    taken: set[tuple[str, int]] = set()
    while len(motifs) < count:
        layer, column = rng.choices(places, weights)[0]
        if not is_free(rng, layer, column, taken):
            continue
        kind = rng.choice([name for name, kind in KINDS.items() if kind.layer == layer])
        if kind not in motifs:
            motifs[kind] = place_motif(rng, kind, column, horizon)
            taken.add((layer, column))
    return sorted(motifs.values(), key=lambda motif: (LAYERS[KINDS[motif.kind].layer].order, motif.y))


def describe(rng: Random, motif: Motif) -> str:
    """A noun phrase for the motif, such as "a small vermilion torii gate"."""
    kind = KINDS[motif.kind]
    robe = rng.choice(PALETTE[motif.robe].words) if motif.robe else ""
    size = rng.choice(SIZE_WORDS[motif.size]) if rng.random() < SIZE_WORD_SHARE else ""
    form, colour, noun = rng.choice(kind.forms), rng.choice(PALETTE[motif.colour].words), rng.choice(kind.nouns)
    count = COUNT_WORDS.get(motif.count, "")
    phrase = form.format(size=size, colour=colour, noun=noun, count=count, robe=robe)
    return re.sub(r"\ba (?=[aeiou])", "an ", phrase)


def name_motifs(rng: Random, motifs: Sequence[Motif]) -> list[Motif]:
    """The motifs with their phrases; some stay unnamed, as in real captions, but never all but one."""
    phrased = [replace(motif, phrase=describe(rng, motif), named=rng.random() < NAMED_SHARE) for motif in motifs]
    for place in rng.sample(range(len(phrased)), len(phrased)):
        if sum(motif.named for motif in phrased) >= MIN_NAMED:
            break
        phrased[place] = replace(phrased[place], named=True)
    return phrased


def list_motifs(rng: Random, motifs: Sequence[Motif]) -> str:
    """The named motifs, in a random order, as one enumeration."""
    shuffled = rng.sample(motifs, len(motifs))
    parts = []
    for motif in (motif for motif in shuffled if motif.named):
        place = " " + rng.choice(COLUMN_WORDS[motif.column]) if rng.random() < COLUMN_WORD_SHARE else ""
        parts.append(motif.phrase + place)
    if rng.random() < 0.5:
        return ", ".join(parts[:-1]) + rng.choice((" and ", " with ", " beside ", " and ")) + parts[-1]
    return parts[0] + rng.choice((" with ", " near ", ", together with ")) + " and ".join(parts[1:])


def write_caption(rng: Random, motifs: Sequence[Motif], sky: str, ground: str) -> str:
    """One sentence about the scene."""
    text = list_motifs(rng, motifs)
    where = " " + rng.choice(GROUNDS[ground].words) if rng.random() < GROUND_SHARE else ""
    when = ""
    if rng.random() < SKY_SHARE:
        when = rng.choice(("under ", "in ", "beneath ", "with ")) + rng.choice(SKIES[sky].words)
    lead = rng.choice(LEADS)
    text = lead + text + where
    if when:
        joint = rng.choice((", ", " "))
        sky_first = not lead and rng.random() < SKY_FIRST_SHARE
        text = f"{when}, {text}" if sky_first else text + joint + when
    return text[0].upper() + text[1:] + rng.choice(("", "."))


def compose(seed: int, index: int) -> Scene:
    """The scene of print `index`."""
    rng = Random(f"print-{seed}-{index}")
    sky, ground = rng.choice(list(SKIES)), rng.choice(list(GROUNDS))
    horizon = rng.uniform(*HORIZON_RANGE)
    motifs = name_motifs(rng, place_motifs(rng, horizon))
    return Scene(sky, ground, horizon, tuple(motifs), write_caption(rng, motifs, sky, ground))


def noise(rng: np.random.RandomState, size: int, shape: tuple[int, int], blur: Image.Resampling) -> np.ndarray:
    """Random values in [0, 1] on a coarse grid of `shape`, enlarged to (size, size) float32."""
    coarse = Image.fromarray((rng.rand(*shape) * 255).astype(np.uint8))
    return np.asarray(coarse.resize((size, size), blur), np.float32) / 255


@functools.cache
def paper_textures(size: int) -> tuple[np.ndarray, ...]:
    """Multipliers for paper and wood grain, (size, size) float32 each.

    Made once per size, because one of them takes longer than the rest of a print. RandomState, because numpy
    promises never to change its stream.
    """
    rng = np.random.RandomState(TEXTURE_SEED)
    textures = []
    for _ in range(TEXTURE_COUNT):
        dust = rng.rand(size, size).astype(np.float32)
        grain = np.interp(np.linspace(0, 1, size), np.linspace(0, 1, 28), rng.rand(28))[:, None]
        blots = noise(rng, size, (7, 7), Image.Resampling.BICUBIC)
        fibres = noise(rng, size, (size, max(4, size // 12)), Image.Resampling.BILINEAR)
        texture = 0.86 + 0.05 * dust + 0.05 * grain + 0.06 * blots + 0.07 * fibres
        textures.append(texture.astype(np.float32))
    return tuple(textures)


def jitter(rng: Random, colour: RGB, amount: float) -> np.ndarray:
    """The colour, each channel times its own factor in 1 ± amount; (3,) floats."""
    return np.array(colour) * np.array([rng.uniform(1 - amount, 1 + amount) for _ in range(3)])


def paint_backdrop(rng: Random, scene: Scene, side: int) -> tuple[Image.Image, RGB]:
    """Sky and ground, (side, side); and the colour of the ground."""
    sky = SKIES[scene.sky]
    rows = int(scene.horizon * side) + 1
    fade = np.clip(np.linspace(-0.15, 1.1, rows), 0, 1)[:, None] ** 0.8
    tint = jitter(rng, (1, 1, 1), 0.07)
    gradient = (np.array(sky.top) * (1 - fade) + np.array(sky.bottom) * fade) * tint
    ground = np.clip(jitter(rng, GROUNDS[scene.ground].rgb, 0.08), 0, 255)
    darkening = np.linspace(1.12, 0.84, side - rows)[:, None]
    column = np.clip(np.concatenate([gradient, ground * darkening]), 0, 255).astype(np.uint8)
    pixels = np.repeat(column[:, None, :], side, axis=1)
    red, green, blue = (int(value) for value in ground)
    return Image.fromarray(pixels), (red, green, blue)


def paint_ground_marks(brush: Brush, scene: Scene, colour: RGB) -> None:
    """Ripples on water, blades in a meadow, stones on a road."""
    rng, horizon = brush.rng, scene.horizon
    if scene.ground in ("sea", "river"):
        ripple = shade(colour, 1.3 if scene.ground == "sea" else 0.8)
        for _ in range(16):
            x, y, half = rng.random(), rng.uniform(horizon + 0.03, 1), rng.uniform(0.03, 0.09)
            crests = [(x - half, y), (x - half / 2, y - 0.012), (x, y), (x + half / 2, y - 0.012), (x + half, y)]
            brush.stroke(crests, ripple)
    elif scene.ground in ("field", "autumn"):
        for _ in range(26):
            x, y = rng.random(), rng.uniform(horizon + 0.02, 1)
            brush.stroke([(x, y), (x + 0.008, y - 0.03)], shade(colour, 0.75))
            brush.stroke([(x, y), (x - 0.012, y - 0.025)], shade(colour, 0.8))
    elif scene.ground == "earth":
        for _ in range(14):
            x, y = rng.random(), rng.uniform(horizon + 0.02, 1)
            brush.ellipse(x, y, 0.012, 0.006, shade(colour, 0.85), outline=None)


def paint_hills(brush: Brush, scene: Scene) -> None:
    """Sometimes far hills, which no caption names: something to tell apart from a mountain."""
    has_mountain = any(KINDS[motif.kind].layer == "far" for motif in scene.motifs)
    if scene.sky == "mist" or brush.rng.random() >= HILLS_SHARE or has_mountain:
        return
    x, y = brush.rng.random(), scene.horizon
    ridge = [(x - 0.5, y), (x - 0.2, y - 0.07), (x, y - 0.04), (x + 0.2, y - 0.09), (x + 0.5, y)]
    brush.polygon(ridge, shade(SKIES[scene.sky].bottom, 0.82), outline=None)


def paint_motif(brush: MotifBrush) -> list[float]:
    """Paints the motif; its box inside the print, x0, y0, x1, y1 in units of the print's side."""
    KINDS[brush.motif.kind].draw(brush)
    return [round(min(1.0, max(0.0, value)), 4) for value in brush.extent]


def paint_weather(brush: Brush, scene: Scene) -> None:
    """Rain or snow before everything else."""
    rng = brush.rng
    if scene.sky == "rain":
        for _ in range(34):
            x, y = rng.random() * 1.1, rng.random()
            brush.stroke([(x, y), (x - 0.03, y + 0.1)], RAINDROP, 0.8)
    elif scene.sky == "snow":
        for _ in range(44):
            radius = rng.uniform(0.005, 0.011)
            brush.ellipse(rng.random(), rng.random(), radius, radius, SNOWFLAKE, outline=None)


def paint_seal(brush: Brush) -> None:
    """The publisher's seal in a corner, which no caption names."""
    x, y = brush.rng.choice((0.05, 0.92)), brush.rng.choice((0.05, 0.80))
    brush.rectangle(x, y, x + 0.035, y + 0.1, SEAL, outline=None)


def print_on_paper(rng: Random, picture: Image.Image) -> np.ndarray:
    """The picture with the texture of paper and a dark frame, (3, size, size) uint8."""
    size = picture.width
    textures = paper_textures(size)
    texture = textures[rng.randrange(len(textures))]
    if rng.random() < 0.5:
        texture = texture[::-1]
    if rng.random() < 0.5:
        texture = texture[:, ::-1]
    exposure = rng.uniform(0.93, 1.05)
    pixels = np.asarray(picture, np.float32) * texture[:, :, None] * np.array(PAPER_TINT, np.float32) * exposure
    edge = max(1, round(size * FRAME_WIDTH))
    framed = np.empty_like(pixels)
    framed[:] = FRAME
    framed[edge:-edge, edge:-edge] = pixels[edge:-edge, edge:-edge]
    return np.ascontiguousarray(np.clip(framed, 0, 255).astype(np.uint8).transpose(2, 0, 1))


def paint(scene: Scene, rng: Random, size: int) -> tuple[np.ndarray, list[list[float]]]:
    """The scene as (3, size, size) uint8, and the box of every motif, in the order of scene.motifs."""
    side = size * SUPERSAMPLING
    canvas, ground_colour = paint_backdrop(rng, scene, side)
    target = ImageDraw.Draw(canvas)
    paint_ground_marks(Brush(target, side, rng), scene, ground_colour)
    paint_hills(Brush(target, side, rng), scene)
    boxes = [paint_motif(MotifBrush(target, side, rng, motif)) for motif in scene.motifs]
    paint_weather(Brush(target, side, rng), scene)
    paint_seal(Brush(target, side, rng))
    return print_on_paper(rng, canvas.reduce(SUPERSAMPLING)), boxes


def draw(seed: int, index: int, size: int) -> tuple[np.ndarray, str, list[Region]]:
    """One print: pixels, caption, regions.

    Pixels are RGB uint8 of the shape (3, size, size). Every motif that the caption names has a region
    {"phrase": str, "bbox": [x0, y0, x1, y1]}, the box in units of the print's side, inside [0, 1].
    """
    scene = compose(seed, index)
    pixels, boxes = paint(scene, Random(f"draw-{seed}-{index}"), size)
    named = [(motif, box) for motif, box in zip(scene.motifs, boxes, strict=True) if motif.named]
    return pixels, scene.caption, [{"phrase": motif.phrase, "bbox": box} for motif, box in named]


def draw_sheet(rows: list[tuple[np.ndarray, str, list[Region]]]) -> Image.Image:
    """A contact sheet of images (3, TILE, TILE) with their captions, in the last row also with their regions."""
    step_x, step_y = TILE + GAP, TILE + GAP + CAPTION_LINES * LINE_HEIGHT
    last = (len(rows) - 1) // COLUMNS_OF_TILES
    width = GAP + min(len(rows), COLUMNS_OF_TILES) * step_x
    sheet = Image.new("RGB", (width, GAP + (last + 1) * step_y + len(BOX_COLOURS) * LINE_HEIGHT), SHEET_COLOUR)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for place, (pixels, caption, regions) in enumerate(rows):
        x, y = GAP + place % COLUMNS_OF_TILES * step_x, GAP + place // COLUMNS_OF_TILES * step_y
        sheet.paste(Image.fromarray(pixels.transpose(1, 2, 0)), (x, y))
        wrapped = textwrap.wrap(caption, CAPTION_WIDTH, max_lines=CAPTION_LINES, placeholder=" ...")
        lines = [(line, TEXT_COLOUR) for line in wrapped]
        if place // COLUMNS_OF_TILES == last:
            for region, colour in zip(regions, BOX_COLOURS, strict=False):
                x0, y0, x1, y1 = (value * (TILE - 1) for value in region["bbox"])
                pen.rectangle((x + x0, y + y0, x + x1, y + y1), outline=colour, width=3)
                lines.append((textwrap.shorten(region["phrase"], CAPTION_WIDTH, placeholder=" ..."), colour))
        for number, (line, colour) in enumerate(lines):
            pen.text((x, y + TILE + 4 + number * LINE_HEIGHT), line, colour, font)
    return sheet
