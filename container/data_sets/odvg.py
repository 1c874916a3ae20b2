"""Reads images with captions and marked regions in ODVG format, a JSON object a line, as people really have them.

Where the meaning is clear a line is taken as it is: a phrase with several boxes, a width of 640.0, a name that differs
from the file's in Unicode's normal form, case or slashes only, several captions of a training image. All else that
cannot be used is one problem, with its line, which says what to do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import unicodedata
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

BOX_SLACK = 1.0  # pixels a box may stick out by and is cut back: annotation tools round outwards
FRACTION = 1.1  # a box with no larger number is not in pixels
UNITS = {100: "per cent", 1000: "thousandths"}  # of the image, in which some tools and models write boxes
ENOUGH_BOXES = 20  # of which none goes beyond such a number, in images that all have half as many pixels again
ONE_CAPTION = "only a training image may have several captions"
WANTED = "filename, width, height, grounding: {caption, regions: [{phrase, bbox}]}"
SIDEWAYS = (5, 6, 7, 8)  # EXIF's orientations that exchange width and height

# A row is one image (3, S, S) uint8, its caption, and its regions [{phrase, bbox}] with boxes in [0, 1].
Row = tuple[np.ndarray, str, list[dict]]
# A job is the name of a row, and a function of S that makes it, in another process, or says what is wrong with it.
Job = tuple[str, Callable[[int], "Row | str"]]


@dataclass
class Line:
    """What one line says; nothing is checked yet but that it is there."""

    filename: object
    size: tuple
    captions: list
    regions: list[tuple[object, object]]  # phrases with one box each


class Images:
    """The folder of the images, and which line uses which of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.used: dict[Path, str] = {}

    def find(self, name: str, where: str, several: bool) -> Path | str:
        """The file of that name; where there is none, that whose name differs in spelling only. Or what is wrong.

        where: the line that uses it from now on, perhaps as one of several. Raises PermissionError.
        """
        try:
            path = (self.folder / name).resolve()
            there = path.is_file()
        except PermissionError:
            raise
        except (OSError, ValueError, RuntimeError) as error:  # no file can have that name, or links go round
            return f"cannot be found ({type(error).__name__}); rename it or remove the line"
        if not path.is_relative_to(self.folder):
            return "lies outside of the folder images/; put the file itself there, no link to it"
        if not there:
            alike = self.by_spelling.get(spelling(name), [])
            if not alike:
                return "is not in images/; add it or remove the line"
            if len(alike) > 1:
                return f"is not in images/, but {[p.name for p in alike]} are; write the name of one"
            path = alike[0]
        before = self.used.setdefault(path, where)
        if before != where and not several:
            return f"was used before, in {before}; keep one of them ({ONE_CAPTION})"
        return path

    @functools.cached_property
    def by_spelling(self) -> dict[str, list[Path]]:
        found = defaultdict(list)
        for path in self.folder.rglob("*"):
            if path.is_file() and path.resolve().is_relative_to(self.folder):
                found[spelling(str(path.relative_to(self.folder)))].append(path.resolve())
        return found


def spelling(name: str) -> str:
    """What is the same for all ways to write a name: accents, blanks, case, slashes, images/ before it or not."""
    plain = unicodedata.normalize("NFKC", name.replace("\\", "/")).casefold()
    return plain.removeprefix("./").removeprefix("images/")


def read(file: Path, images: Images, problems: list[str]) -> Iterator[Job]:
    """The jobs of the good lines. Raises PermissionError, as the jobs do: the remedy is the whole folder's."""
    content = file.read_bytes() if file.is_file() else b""
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        problems.append(f"{file.name}: is UTF-16; save it as UTF-8")
        return
    lines = [(number, text) for number, text in enumerate(content.splitlines(), 1) if text.strip()]
    if not lines:
        problems.append(f"{file.name}: is missing or empty; every split needs at least one image")
    boxes, sides = [], []  # of the good lines with regions
    for number, text in lines:
        where, several = f"{file.name} line {number}", file.stem == "train"
        try:
            line = parse(text)
            faults = [*check_texts(line, several), *check_boxes(line)]
        except Exception as error:  # whatever a line holds
            faults = [f"{error!r:.80}; write a JSON object {WANTED}, with an empty list for no regions"]
        else:
            path = images.find(str(line.filename), where, several)
            if isinstance(path, str):
                faults.append(f"image {line.filename!r:.80} {path}")
        problems += [f"{where}: {fault}" for fault in faults]
        if not faults:
            boxes += [box for _, box in line.regions]
            sides += line.size if line.regions else ()
            regions = [{"phrase": phrase, "bbox": to_units(box, line.size)} for phrase, box in line.regions]
            yield from ((where, partial(load_image, path, line.size, caption, regions)) for caption in line.captions)

    for unit, name in UNITS.items():
        if len(boxes) >= ENOUGH_BOXES and max(map(max, boxes)) <= unit <= min(sides) / 1.5:
            seen = f"none of {len(boxes)} boxes goes beyond {unit}, in images of {min(sides)} pixels and more"
            problems.append(f"{file.name}: {seen}: they look like {name} of the image; write pixels")
            break


def parse(text: bytes) -> Line:
    """Raises whatever a line that is not as it should be makes Python raise."""
    entry = json.loads(text, object_pairs_hook=without_twins)
    grounding = entry["grounding"]
    captions = grounding["caption"]
    regions = [(region["phrase"], box) for region in grounding["regions"] for box in boxes_of(region)]
    size = tuple(whole(entry[side]) for side in ("width", "height"))
    return Line(entry["filename"], size, captions if isinstance(captions, list) else [captions], regions)


def without_twins(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; of two equal keys Python would silently take the last."""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"a second {key!r}")
        found[key] = value
    return found


def boxes_of(region: dict) -> list:
    """The boxes of a phrase, which may have several."""
    boxes = region["bbox"]
    several = isinstance(boxes, list) and boxes and all(isinstance(box, list) for box in boxes)
    return boxes if several else [boxes]


def whole(number: object) -> object:
    """640.0 as 640."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def check_texts(line: Line, several: bool) -> Iterator[str]:
    if not line.captions or len(line.captions) > 1 and not several:
        yield f"the caption is {line.captions!r:.80}; write a text ({ONE_CAPTION})"
    texts = [("the caption", caption) for caption in line.captions]
    texts += [(f"the phrase of region {i}", phrase) for i, (phrase, _) in enumerate(line.regions, 1)]
    for what, text in texts:
        if not isinstance(text, str) or not text.strip():
            yield f"{what} is {text!r:.80}; write a text or remove it"
        elif any("\ud800" <= character <= "\udfff" for character in text):
            yield f"{what} is {text!r:.80}, which holds half a character; write it whole"


def check_boxes(line: Line) -> Iterator[str]:
    size = line.size
    if not all(type(side) is int and side > 0 for side in size):
        yield f"width and height are {size!r:.80}; write the numbers of pixels"
        return
    for number, (_, box) in enumerate(line.regions, 1):
        what = f"bbox {box!r:.80} of region {number}"
        if not (isinstance(box, list) and len(box) == 4 and all(type(value) in (int, float) for value in box)):
            yield f"{what} is not four numbers; write [x0, y0, x1, y1]"
        elif not is_inside(box, size):
            yield f"{what} leaves the image of {size[0]}x{size[1]} pixels; cut it to the image"
        elif max(box) <= FRACTION < min(size):
            yield f"{what} looks like fractions of the image; write pixels"
        elif not has_area(box, size):
            x, y, width, height = box
            corner_and_size = is_inside([x + width, y + height] * 2, size)
            hint = "; this one looks like x, y, width, height" if corner_and_size else ""
            yield f"{what} has no area; write [x0, y0, x1, y1] with x0 < x1 and y0 < y1{hint}"


def is_inside(box: list[float], size: tuple[int, int]) -> bool:
    return all(-BOX_SLACK <= value <= side + BOX_SLACK for value, side in zip(box, size * 2, strict=True))


def has_area(box: list[float], size: tuple[int, int]) -> bool:
    x0, y0, x1, y1 = to_units(box, size)
    return x0 < x1 and y0 < y1


def to_units(box: list[float], size: tuple[int, int]) -> list[float]:
    """A box in pixels as a box in [0, 1]."""
    return [round(min(1.0, max(0.0, value / side)), 6) for value, side in zip(box, size * 2, strict=True)]


def is_sideways(image: Image.Image) -> bool:
    """Whether an image will be turned by 90 degrees. An EXIF that cannot be read says nothing."""
    with contextlib.suppress(Exception):  # damaged ones raise all sorts
        return image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    return False


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Before the image is loaded. Of TIFF Pillow itself gives the upright size."""
    return image.size[::-1] if is_sideways(image) and image.format != "TIFF" else image.size


def load_image(path: Path, stated: tuple[int, int], caption: str, regions: list[dict], size: int) -> Row | str:
    """The upright image stretched to a square; what is transparent becomes white, as paper is."""
    try:
        with Image.open(path) as image:
            found = upright_size(image)
            if found != stated:
                sizes = "%dx%d pixels, not %dx%d" % (*found, *stated)
                boxes = " and the boxes: that is its size when it is turned upright, as its EXIF says"
                return f"image {path.name!r} has {sizes}; correct width and height{boxes * is_sideways(image)}"
            if image.mode.startswith(("I", "F")):  # Pillow would clip it to white
                return f"image {path.name!r} has mode {image.mode}; save it with 8 bits a channel"
            image.load()
            with contextlib.suppress(Exception):  # of what else a damaged EXIF holds
                ImageOps.exif_transpose(image, in_place=True)
            if image.has_transparency_data:
                paper = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(paper, image.convert("RGBA"))
            square = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except PermissionError:
        raise
    except Image.DecompressionBombError:
        return f"image {path.name!r} has more pixels than Pillow opens ({stated[0]}x{stated[1]}); make it smaller"
    except Exception as error:  # damaged files make decoders raise all sorts
        return f"image {path.name!r} cannot be decoded ({error!r:.80}); replace it"
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)), caption, regions
