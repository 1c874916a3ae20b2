"""Tests of prepare_data.py and container/prints.py. They run inside the container image, the repository read-only."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageChops, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
from prepare_data import prints  # noqa: E402

FIXTURE = ROOT / "tests" / "fixtures" / "odvg"
NLVR = Path(os.environ.get("SHARED", ROOT.parent / "shared")) / "data" / "nlvr-sample"
SIZE = 32
COUNTS = {"train": 40, "val": 12, "test": 9}
TINY_PRINTS = ["prints", "--size", SIZE, *(f"--{split}={count}" for split, count in COUNTS.items())]
HIDDEN_SPLITS = ("val", "test")
PRINTS_OF = {"val": range(40, 52), "test": range(52, 61)}


def run_tool(*arguments: object, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
    """Runs prepare_data.py as a user does, but with an empty environment and no home."""
    command = [sys.executable, "-B", str(ROOT / "prepare_data.py"), *map(str, arguments)]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, umask=umask)


def make(out: Path, *arguments: object, status: int = 0) -> Path:
    """Makes a data set in this process."""
    assert prepare_data.main([*map(str, arguments), "--out", str(out), "--processes", "1"]) == status
    return out


def info_of(out: Path) -> dict:
    return json.loads((out / "info.json").read_text())


def read_images(folder: Path) -> np.ndarray:
    """The images of a table, (n, 3 * SIZE * SIZE) uint8, read without a copy as training reads them."""
    table = datasets.load_from_disk(folder)
    chunks = table.data.column("image").chunks
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks]).reshape(len(table), -1)


def same_regions(stored: list[dict], drawn: list[dict]) -> bool:
    return all(a["phrase"] == b["phrase"] and a["bbox"] == pytest.approx(b["bbox"], abs=1e-6)
               for a, b in zip(stored, drawn, strict=True))


def find_prints(images: np.ndarray) -> list[int]:
    """Which prints show these pixels? All that can be meant are drawn again to find out."""
    indices = range(sum(COUNTS.values()) + 1)
    drawn = {prints.draw(prepare_data.PRINTS_SEED, index, SIZE)[0].tobytes(): index for index in indices}
    return [drawn[pixels.tobytes()] for pixels in images]


def read_orders(out: Path, split: str) -> tuple[list[int], list[int]]:
    """For every row of the images and of the captions: which pair of the split it comes from."""
    indices = find_prints(read_images(out / split / "images"))
    image_order = [index - min(indices) for index in indices]
    key = np.load(out / f"{split}.key.npy").tolist()
    return image_order, [image_order[key.index(row)] for row in range(len(key))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny set of prints, made by the command under a umask that hides everything from others."""
    out = tmp_path_factory.mktemp("data") / "prints"
    done = run_tool(*TINY_PRINTS, "--out", out, umask=0o077)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "train: 40 images\nval: 12 images\ntest: 9 images\n"
    return out


# The prints


def test_a_print_is_a_function_of_seed_and_index() -> None:
    pixels, *words = prints.draw(7, 5, 96)
    again, *words_again = prints.draw(7, 5, 96)
    assert (pixels.shape, pixels.dtype) == ((3, 96, 96), np.uint8)
    assert np.array_equal(pixels, again) and words == words_again == [*prints.draw(7, 5, 224)[1:]]
    assert not np.array_equal(pixels, prints.draw(7, 6, 96)[0])
    assert not np.array_equal(pixels, prints.draw(8, 5, 96)[0])


def test_the_task_has_not_changed() -> None:
    """Results are comparable only as long as the same print comes out."""
    pixels, caption, _ = prints.draw(7, 0, 96)
    assert pixels.mean(axis=(1, 2)) == pytest.approx([110.5, 131.2, 145.9], abs=0.1)
    assert caption == (
        "Three black birds, together with a big pale hanging lamp and an open red folding fan with a clear blue sky."
    )
    assert prints.draw(7, 9, 96)[2] == [
        {"phrase": "a little amber setting sun", "bbox": [0.1113, 0.153, 0.2122, 0.2538]},
        {"phrase": "great dark bamboo stalks", "bbox": [0.3828, 0.3, 0.6201, 0.6889]},
        {"phrase": "a crimson-sailed skiff", "bbox": [0.0968, 0.6473, 0.375, 0.8838]},
        {"phrase": "a small violet mossy stone", "bbox": [0.3979, 0.8323, 0.5665, 0.9039]},
    ]


def test_variety() -> None:
    scenes = [prints.compose(1, index) for index in range(2000)]
    motifs = [motif for scene in scenes for motif in scene.motifs]
    assert len(prints.KINDS) == 24 and {motif.kind for motif in motifs} == set(prints.KINDS)
    assert {scene.sky for scene in scenes} == set(prints.SKIES)
    assert {scene.ground for scene in scenes} == set(prints.GROUNDS)
    assert {len(scene.motifs) for scene in scenes} == {2, 3, 4}
    assert all(sum(motif.named for motif in scene.motifs) >= 2 for scene in scenes)
    assert 0.85 < sum(motif.named for motif in motifs) / len(motifs) < 0.92
    assert len({scene.caption for scene in scenes}) > 1990


def test_captions_name_the_regions_in_sound_english_and_boxes_are_inside() -> None:
    for _, caption, regions in (prints.draw(2, index, 16) for index in range(500)):
        words = caption.lower().replace(",", "").split()
        assert "  " not in caption and len(regions) >= 2
        assert not [pair for pair in zip(words, words[1:], strict=False) if pair[0] == "a" and pair[1][0] in "aeiou"]
        for region in regions:
            x0, y0, x1, y1 = region["bbox"]
            assert region["phrase"].lower() in caption.lower()
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


@pytest.mark.parametrize("kind", prints.KINDS)
def test_a_box_is_where_the_motif_is(kind: str) -> None:
    side, margin = 400, 10  # pixels; a thick line reaches over its points
    colour = next(colour for colour in prints.KINDS[kind].colours if colour != "white")
    motif = prints.Motif(kind, 1, 1, 0.15, 0.5, 0.5, colour, count=3, robe="red")
    blank = Image.new("RGB", (side, side), (255, 0, 255))
    canvas = blank.copy()
    box = prints.paint_motif(prints.MotifBrush(ImageDraw.Draw(canvas), side, random.Random(0), motif))
    painted = ImageChops.difference(canvas, blank).getbbox()
    assert painted == pytest.approx([value * side for value in box], abs=margin)


# What is written


def test_files_and_info(tiny: Path) -> None:
    info = info_of(tiny)
    assert COUNTS | {"format": 1, "name": "prints", "image_size": SIZE} == {key: info[key] for key in
                                                                           ("format", "name", "image_size", *COUNTS)}
    assert len(bytes.fromhex(info["hash"])) == 32 and set(info) >= {"source", "licence", "made_by"}
    assert [path.name for path in tiny.parent.iterdir()] == ["prints"]
    hidden = {f"{split}{suffix}" for split in HIDDEN_SPLITS for suffix in ("", ".key.npy", ".regions.json")}
    assert {path.name for path in tiny.iterdir()} == {"info.json", "preview.png", "train"} | hidden
    for path in [tiny, *tiny.rglob("*")]:  # everybody may read, and no path of this machine is written
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)
        assert path.is_dir() or str(tiny.parent).encode() not in path.read_bytes()


def test_the_training_table(tiny: Path) -> None:
    table, images = datasets.load_from_disk(tiny / "train"), read_images(tiny / "train")
    assert list(table.features) == ["image", "caption", "regions"]
    assert table.features["image"] == datasets.List(datasets.Value("uint8"), length=3 * SIZE * SIZE)
    for index, row in enumerate(table):
        pixels, caption, regions = prints.draw(prepare_data.PRINTS_SEED, index, SIZE)
        assert row["image"] == pixels.reshape(-1).tolist() == images[index].tolist()
        assert row["caption"] == caption and same_regions(row["regions"], regions)
    assert index == COUNTS["train"] - 1


@pytest.mark.parametrize("split", HIDDEN_SPLITS)
def test_the_sides_are_apart_and_the_key_and_the_regions_belong_to_the_images(tiny: Path, split: str) -> None:
    images, captions = (datasets.load_from_disk(tiny / split / side) for side in ("images", "captions"))
    assert (list(images.features), list(captions.features)) == (["image"], ["caption"])
    key = np.load(tiny / f"{split}.key.npy")
    regions = json.loads((tiny / f"{split}.regions.json").read_text())
    indices = find_prints(read_images(tiny / split / "images"))
    assert key.dtype == np.int64 and sorted(key) == list(range(COUNTS[split]))
    assert len(captions) == len(regions) == COUNTS[split] and sorted(indices) == list(PRINTS_OF[split])
    for row, index in enumerate(indices):
        _, caption, drawn = prints.draw(prepare_data.PRINTS_SEED, index, SIZE)
        assert captions[int(key[row])]["caption"] == caption and same_regions(regions[row], drawn)


def test_both_sides_are_shuffled_differently_and_by_the_content(tiny: Path, tmp_path: Path) -> None:
    """With one print more for training, validation has as many prints as before, but others."""
    other = make(tmp_path / "other", *TINY_PRINTS, "--train", COUNTS["train"] + 1)
    in_order = list(range(COUNTS["val"]))
    orders = [in_order, *read_orders(tiny, "val"), *read_orders(other, "val")]
    assert all(sorted(order) == in_order for order in orders)
    assert len(set(map(tuple, orders))) == 5


def test_the_same_input_gives_the_same_hash_and_another_size_or_count_another(tiny: Path, tmp_path: Path) -> None:
    make(tmp_path / "one", *TINY_PRINTS)
    assert run_tool(*TINY_PRINTS, "--processes", "3", "--out", tmp_path / "three").returncode == 0
    for file in ("info.json", "val.key.npy", "test.key.npy", "val.regions.json", "preview.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tiny / file).read_bytes()
        assert (tmp_path / "three" / file).read_bytes() == (tiny / file).read_bytes()
    larger = make(tmp_path / "larger", *TINY_PRINTS, "--size", SIZE + 1)
    fewer = make(tmp_path / "fewer", *TINY_PRINTS, "--test", COUNTS["test"] - 1)
    assert len({info_of(out)["hash"] for out in (tiny, larger, fewer)}) == 3


def test_the_preview_is_a_sheet_of_prints(tiny: Path, tmp_path: Path) -> None:
    with Image.open(tiny / "preview.png") as sheet:
        assert sheet.width > 4 * prints.TILE and len(sheet.getcolors(1 << 24)) > 10_000
    with Image.open(make(tmp_path / "one", *TINY_PRINTS, "--train", 1) / "preview.png") as sheet:
        assert sheet.width < 2 * prints.TILE


# Where it is written


def test_an_empty_folder_is_used_and_a_full_one_left_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "prints").mkdir()
    make(tmp_path / "prints", *TINY_PRINTS)
    before = sorted(tmp_path.rglob("*"))
    make(tmp_path / "prints", *TINY_PRINTS, status=1)
    make(tmp_path / "missing" / "prints", *TINY_PRINTS, status=1)
    errors = capsys.readouterr().err
    assert "prints is not an empty folder; remove it" in errors and "missing is not a folder; make it first" in errors
    assert sorted(tmp_path.rglob("*")) == before


def test_a_killed_run_leaves_no_data_set_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    out, partial = tmp_path / "prints", tmp_path / "prints.partial"
    command = [sys.executable, "-B", ROOT / "prepare_data.py", "prints", "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (partial / "train.arrow").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists() and not out.exists()
    make(out, *TINY_PRINTS)
    assert [path.name for path in tmp_path.iterdir()] == ["prints"]


def no_space(_: object) -> None:
    raise OSError(28, "No space left on device")


def kill_worker(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("function", "failure", "message"), [
    ("draw_sheet", no_space, "No space left on device"), ("draw", kill_worker, "try fewer --processes")])
def test_a_failure_on_the_way_leaves_nothing(function, failure, message, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(prints, function, failure)
    make(tmp_path / "prints", *TINY_PRINTS, status=1)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "message"), [
    (["ukiyoe"], "unknown data set ukiyoe; take prints, or give your own with --odvg FOLDER"),
    (["prints", "--odvg", "x"], "give your own another name"),
    (["mine", "--odvg", "x", "--train", "5"], "--train: the number of images can be chosen for prints only"),
    (["prints", "--val", "0"], "counts must be 1 or more"),
    (["prints", "--size", "8"], "--size must be 16 to 1024"),
    (["../mine", "--odvg", "x"], "a name is lower-case letters"),
])
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        make(tmp_path / "out", *arguments)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# Your own images


class Folder:
    """A copy of the fixture that can be spoilt."""

    def __init__(self, path: Path) -> None:
        self.path = shutil.copytree(FIXTURE, path)
        self.images = path / "images"

    def lines(self, split: str) -> list[dict]:
        return [json.loads(line) for line in (self.path / f"{split}.jsonl").read_text().splitlines()]

    def change(self, split: str, number: int, **changes: object) -> None:
        """Changes keys of a line (counted from 1), or of the grounding in it."""
        lines = self.lines(split)
        for key, value in changes.items():
            (lines[number - 1]["grounding"] if key in ("caption", "regions") else lines[number - 1])[key] = value
        (self.path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def image(self, split: str, number: int) -> Path:
        return self.images / self.lines(split)[number - 1]["filename"]

    def make(self, name: str = "mine", status: int = 0) -> Path:
        return make(self.path.parent / name, "mine", "--odvg", self.path, "--size", SIZE, status=status)

    def failure(self, capsys) -> list[str]:
        """The lines on stderr of a run that must fail and leave nothing."""
        self.make(status=1)
        assert list(self.path.parent.iterdir()) == [self.path]
        return [line for line in capsys.readouterr().err.splitlines() if not line.endswith(" images")]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "odvg")
