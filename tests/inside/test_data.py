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
from collections import Counter
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
TINY_PRINTS = ["prints", "--size", str(SIZE), *(f"--{split}={count}" for split, count in COUNTS.items())]
HIDDEN_SPLITS = ("val", "test")
PRINTS_OF = {"val": range(40, 52), "test": range(52, 61)}


def run_tool(*arguments: object, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
    """Runs prepare_data.py as a user does, but with an empty environment and no home."""
    command = [sys.executable, "-B", str(ROOT / "prepare_data.py"), *map(str, arguments)]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, umask=umask)


def make(out: Path, *arguments: object) -> dict:
    """Makes a data set in this process; its info.json."""
    options = [str(argument) for argument in arguments]
    assert prepare_data.main([*options, "--out", str(out), "--processes", "1"]) == 0
    return json.loads((out / "info.json").read_text())


def read_images(folder: Path) -> np.ndarray:
    """The images of a table, (n, 3 * SIZE * SIZE) uint8, read as training reads them."""
    table = datasets.load_from_disk(folder)
    chunks = table.data.column("image").chunks
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=True) for chunk in chunks]).reshape(len(table), -1)


def read_captions(folder: Path) -> list[str]:
    return list(datasets.load_from_disk(folder)["caption"])


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
    pixels, caption, regions = prints.draw(7, 5, 96)
    again = prints.draw(7, 5, 96)
    assert pixels.shape == (3, 96, 96)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, again[0])
    assert (caption, regions) == again[1:]
    assert not np.array_equal(pixels, prints.draw(7, 6, 96)[0])
    assert not np.array_equal(pixels, prints.draw(8, 5, 96)[0])


def test_words_and_boxes_do_not_depend_on_the_size() -> None:
    assert prints.draw(7, 3, 48)[1:] == prints.draw(7, 3, 224)[1:]


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
    assert len(prints.KINDS) == 24
    assert {motif.kind for motif in motifs} == set(prints.KINDS)
    assert {scene.sky for scene in scenes} == set(prints.SKIES)
    assert {scene.ground for scene in scenes} == set(prints.GROUNDS)
    assert {len(scene.motifs) for scene in scenes} == {2, 3, 4}
    assert all(sum(motif.named for motif in scene.motifs) >= 2 for scene in scenes)
    assert 0.85 < sum(motif.named for motif in motifs) / len(motifs) < 0.92
    assert len({scene.caption for scene in scenes}) > 1990


def test_captions_name_the_regions_in_sound_english() -> None:
    for index in range(500):
        _, caption, regions = prints.draw(2, index, 16)
        assert len(regions) >= 2
        for region in regions:
            assert region["phrase"].lower() in caption.lower()
        words = caption.lower().replace(",", "").split()
        assert "  " not in caption
        assert not [pair for pair in zip(words, words[1:], strict=False) if pair[0] == "a" and pair[1][0] in "aeiou"]


def test_boxes_are_inside_the_print_and_have_an_area() -> None:
    for index in range(500):
        for region in prints.draw(3, index, 16)[2]:
            x0, y0, x1, y1 = region["bbox"]
            assert 0 <= x0 < x1 <= 1
            assert 0 <= y0 < y1 <= 1


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


def test_info(tiny: Path) -> None:
    info = json.loads((tiny / "info.json").read_text())
    assert {key: info[key] for key in ("format", "name", "image_size")} == {
        "format": 1,
        "name": "prints",
        "image_size": SIZE,
    }
    assert {split: info[split] for split in COUNTS} == COUNTS
    assert len(bytes.fromhex(info["hash"])) == 32
    assert set(info) >= {"source", "licence", "made_by"}


def test_the_training_table(tiny: Path) -> None:
    table = datasets.load_from_disk(tiny / "train")
    image_type = datasets.List(datasets.Value("uint8"), length=3 * SIZE * SIZE)
    assert len(table) == COUNTS["train"]
    assert list(table.features) == ["image", "caption", "regions"]
    assert table.features["image"] == image_type
    for index, row in enumerate(table):
        pixels, caption, regions = prints.draw(prepare_data.PRINTS_SEED, index, SIZE)
        assert row["image"] == pixels.reshape(-1).tolist()
        assert row["caption"] == caption
        assert [region["phrase"] for region in row["regions"]] == [region["phrase"] for region in regions]
        for stored, drawn in zip(row["regions"], regions, strict=True):
            assert stored["bbox"] == pytest.approx(drawn["bbox"])


def test_images_are_read_without_a_copy(tiny: Path) -> None:
    images = read_images(tiny / "train")
    assert images.shape == (COUNTS["train"], 3 * SIZE * SIZE)
    assert np.array_equal(images[4], prints.draw(prepare_data.PRINTS_SEED, 4, SIZE)[0].reshape(-1))


@pytest.mark.parametrize("split", HIDDEN_SPLITS)
def test_the_key_and_the_regions_belong_to_the_images(tiny: Path, split: str) -> None:
    images, captions = read_images(tiny / split / "images"), read_captions(tiny / split / "captions")
    key = np.load(tiny / f"{split}.key.npy")
    regions = json.loads((tiny / f"{split}.regions.json").read_text())
    assert key.dtype == np.int64
    assert sorted(key) == list(range(COUNTS[split]))
    assert len(images) == len(captions) == len(regions) == COUNTS[split]
    assert sorted(find_prints(images)) == list(PRINTS_OF[split])
    for row, index in enumerate(find_prints(images)):
        _, caption, drawn = prints.draw(prepare_data.PRINTS_SEED, index, SIZE)
        assert captions[key[row]] == caption
        assert [region["phrase"] for region in regions[row]] == [region["phrase"] for region in drawn]
        for stored, region in zip(regions[row], drawn, strict=True):
            assert stored["bbox"] == pytest.approx(region["bbox"])


@pytest.mark.parametrize("split", HIDDEN_SPLITS)
def test_a_side_has_nothing_of_the_other(tiny: Path, split: str) -> None:
    assert list(datasets.load_from_disk(tiny / split / "images").features) == ["image"]
    assert list(datasets.load_from_disk(tiny / split / "captions").features) == ["caption"]


@pytest.mark.parametrize("split", HIDDEN_SPLITS)
def test_both_sides_are_shuffled_and_differently(tiny: Path, split: str) -> None:
    image_order, caption_order = read_orders(tiny, split)
    in_order = list(range(COUNTS[split]))
    assert sorted(image_order) == sorted(caption_order) == in_order
    assert image_order != in_order
    assert caption_order != in_order
    assert image_order != caption_order


def test_either_order_depends_on_the_content(tiny: Path, tmp_path: Path) -> None:
    """With one print more for training, validation has as many prints as before, but others."""
    make(tmp_path / "other", *TINY_PRINTS, "--train", COUNTS["train"] + 1)
    orders, other_orders = read_orders(tiny, "val"), read_orders(tmp_path / "other", "val")
    assert orders[0] != other_orders[0]
    assert orders[1] != other_orders[1]


def test_the_same_input_gives_the_same_hash(tiny: Path, tmp_path: Path) -> None:
    first = json.loads((tiny / "info.json").read_text())
    assert make(tmp_path / "one", *TINY_PRINTS) == first
    assert run_tool(*TINY_PRINTS, "--processes", "3", "--out", tmp_path / "three").returncode == 0
    assert json.loads((tmp_path / "three" / "info.json").read_text()) == first
    for file in ("val.key.npy", "test.key.npy", "val.regions.json", "preview.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tiny / file).read_bytes()
        assert (tmp_path / "three" / file).read_bytes() == (tiny / file).read_bytes()


def test_another_size_or_count_gives_another_hash(tiny: Path, tmp_path: Path) -> None:
    first = json.loads((tiny / "info.json").read_text())["hash"]
    assert make(tmp_path / "larger", *TINY_PRINTS, "--size", SIZE + 1)["hash"] != first
    assert make(tmp_path / "fewer", *TINY_PRINTS, "--test", COUNTS["test"] - 1)["hash"] != first


def test_everybody_may_read(tiny: Path) -> None:
    assert all(
        stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644) for path in [tiny, *tiny.rglob("*")]
    )


def test_nothing_else_is_left(tiny: Path) -> None:
    assert [path.name for path in tiny.parent.iterdir()] == ["prints"]
    hidden = {f"{split}{suffix}" for split in HIDDEN_SPLITS for suffix in ("", ".key.npy", ".regions.json")}
    assert {path.name for path in tiny.iterdir()} == {"info.json", "preview.png", "train"} | hidden


def test_no_path_of_this_machine_is_written(tiny: Path) -> None:
    for path in tiny.rglob("*"):
        assert path.is_dir() or str(tiny.parent).encode() not in path.read_bytes()


def test_the_preview_is_a_sheet_of_prints(tiny: Path) -> None:
    with Image.open(tiny / "preview.png") as sheet:
        assert sheet.width > prepare_data.SHEET_COLUMNS * prepare_data.TILE
        assert len(sheet.getcolors(1 << 24)) > 10_000


def test_the_preview_of_one_image(tmp_path: Path) -> None:
    make(tmp_path / "one", *TINY_PRINTS, "--train", 1)
    with Image.open(tmp_path / "one" / "preview.png") as sheet:
        assert sheet.width < 2 * prepare_data.TILE


# Where it is written


def test_an_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "prints").mkdir()
    make(tmp_path / "prints", *TINY_PRINTS)


def test_a_full_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "prints").mkdir()
    (tmp_path / "prints" / "mine").write_text("precious")
    done = run_tool(*TINY_PRINTS, "--out", tmp_path / "prints")
    assert done.returncode == 1
    assert "not an empty folder; remove it" in done.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["prints", "mine"]


def test_a_parent_is_needed(tmp_path: Path) -> None:
    done = run_tool(*TINY_PRINTS, "--out", tmp_path / "missing" / "prints")
    assert done.returncode == 1
    assert "missing is not a folder; make it first" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_data_set_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    out, partial = tmp_path / "prints", tmp_path / "prints.partial"
    command = [sys.executable, "-B", ROOT / "prepare_data.py", "prints", "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (partial / "train.arrow").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert partial.exists()
    assert not out.exists()
    make(out, *TINY_PRINTS)
    assert [path.name for path in tmp_path.iterdir()] == ["prints"]


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def fail(_: list[prepare_data.Row]) -> Image.Image:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_data, "draw_sheet", fail)
    assert prepare_data.main([*TINY_PRINTS, "--out", str(tmp_path / "prints"), "--processes", "1"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ukiyoe"], "unknown data set ukiyoe; take prints, or give your own with --odvg FOLDER"),
        (["prints", "--odvg", "x"], "give your own another name"),
        (["mine", "--odvg", "x", "--train", "5"], "--train: the number of images can be chosen for prints only"),
        (["prints", "--val", "0"], "counts must be 1 or more"),
        (["prints", "--size", "8"], "--size must be 16 to 1024"),
        (["../mine", "--odvg", "x"], "a name is lower-case letters"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main([*arguments, "--out", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Your own images


class Folder:
    """A copy of the fixture that can be spoilt."""

    def __init__(self, path: Path) -> None:
        shutil.copytree(FIXTURE, path)
        self.path = path
        self.images = path / "images"

    def lines(self, split: str = "train") -> list[dict]:
        return [json.loads(line) for line in (self.path / f"{split}.jsonl").read_text().splitlines()]

    def write(self, split: str, lines: list[dict]) -> None:
        (self.path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def change(self, split: str, number: int, **changes: object) -> None:
        """Changes keys of a line (counted from 1), or of the grounding in it."""
        lines = self.lines(split)
        line = lines[number - 1]
        for key, value in changes.items():
            target = line["grounding"] if key in ("caption", "regions") else line
            target[key] = value
        self.write(split, lines)

    def image(self, split: str, number: int) -> Path:
        return self.images / self.lines(split)[number - 1]["filename"]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "odvg")


def failure(folder: Folder, capsys) -> list[str]:
    """The lines on stderr of a run that must fail and leave nothing."""
    out = folder.path.parent / "data"
    out.mkdir()
    arguments = ["mine", "--odvg", str(folder.path), "--out", str(out / "mine"), "--size", str(SIZE)]
    assert prepare_data.main([*arguments, "--processes", "1"]) == 1
    assert list(out.iterdir()) == []
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if not line.endswith(" images")]


def stretched(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        square = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1).reshape(-1)


def test_own_images(tmp_path: Path) -> None:
    info = make(tmp_path / "mine", "mine", "--odvg", FIXTURE, "--size", SIZE)
    assert [info[key] for key in ("name", "image_size", "train", "val", "test")] == ["mine", SIZE, 12, 4, 4]
    lines = [json.loads(line) for line in (FIXTURE / "train.jsonl").read_text().splitlines()]
    for line, row in zip(lines, datasets.load_from_disk(tmp_path / "mine" / "train"), strict=True):
        assert row["caption"] == line["grounding"]["caption"]
        assert np.array_equal(row["image"], stretched(FIXTURE / "images" / line["filename"]))
        for stored, given in zip(row["regions"], line["grounding"]["regions"], strict=True):
            x0, y0, x1, y1 = given["bbox"]
            assert stored["phrase"] == given["phrase"]
            assert stored["bbox"] == pytest.approx([x0 / 400, y0 / 100, x1 / 400, y1 / 100], abs=1e-6)


@pytest.mark.parametrize("split", HIDDEN_SPLITS)
def test_the_key_of_own_images(tmp_path: Path, split: str) -> None:
    make(tmp_path / "mine", "mine", "--odvg", FIXTURE, "--size", SIZE)
    images = read_images(tmp_path / "mine" / split / "images")
    captions = read_captions(tmp_path / "mine" / split / "captions")
    key = np.load(tmp_path / "mine" / f"{split}.key.npy")
    for line in (json.loads(line) for line in (FIXTURE / f"{split}.jsonl").read_text().splitlines()):
        pixels = stretched(FIXTURE / "images" / line["filename"])
        (row,) = np.flatnonzero((images == pixels).all(axis=1))
        assert captions[key[row]] == line["grounding"]["caption"]


def test_own_images_give_the_same_hash_again_and_another_one_after_any_change(folder: Folder, tmp_path: Path) -> None:
    made = Counter()

    def digest() -> str:
        made["sets"] += 1
        return make(tmp_path / f"out{made['sets']}", "mine", "--odvg", folder.path, "--size", SIZE)["hash"]

    hashes = [digest()]
    assert digest() == hashes[0]
    folder.change("val", 2, caption="Something else")
    hashes.append(digest())
    folder.change("train", 1, regions=[])
    hashes.append(digest())
    with Image.open(folder.image("test", 3)) as image:
        turned = image.transpose(Image.Transpose.ROTATE_180)
    turned.save(folder.image("test", 3))
    hashes.append(digest())
    assert len(set(hashes)) == 4


def test_the_hash_covers_what_the_key_does_not(folder: Folder, tmp_path: Path) -> None:
    """The key of a single pair is always the same."""
    folder.write("val", folder.lines("val")[:1])
    first = make(tmp_path / "first", "mine", "--odvg", folder.path, "--size", SIZE)["hash"]
    folder.change("val", 1, caption="Something else")
    assert make(tmp_path / "second", "mine", "--odvg", folder.path, "--size", SIZE)["hash"] != first


def test_no_regions_are_allowed(folder: Folder, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        folder.write(split, [line | {"grounding": line["grounding"] | {"regions": []}} for line in folder.lines(split)])
    make(tmp_path / "mine", "mine", "--odvg", folder.path, "--size", SIZE)
    assert datasets.load_from_disk(tmp_path / "mine" / "train")[0]["regions"] == []
    assert json.loads((tmp_path / "mine" / "val.regions.json").read_text()) == [[]] * 4


def test_blank_lines_are_skipped_and_line_numbers_stay_right(folder: Folder, capsys) -> None:
    file = folder.path / "val.jsonl"
    file.write_text("\n" + file.read_text().replace("\n", "\n\n", 1) + "{}\n")
    assert failure(folder, capsys)[0].startswith("val.jsonl line 7: ")


def test_transparent_is_white_and_colours_survive_the_palette(folder: Folder, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (400, 100), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (200, 0, 400, 100))
    clear.save(folder.image("train", 1))
    make(tmp_path / "mine", "mine", "--odvg", folder.path, "--size", SIZE)
    image = read_images(tmp_path / "mine" / "train")[0].reshape(3, SIZE, SIZE)
    assert image[:, 5, 2].tolist() == [255, 255, 255]
    assert image[:, 5, SIZE - 3].tolist() == [0, 0, 255]


def test_a_box_may_stick_out_by_rounding_and_is_cut(folder: Folder, tmp_path: Path) -> None:
    folder.change("train", 1, regions=[{"phrase": "all", "bbox": [-1, -0.5, 400.4, 101]}])
    make(tmp_path / "mine", "mine", "--odvg", folder.path, "--size", SIZE)
    assert datasets.load_from_disk(tmp_path / "mine" / "train")[0]["regions"][0]["bbox"] == [0, 0, 1, 1]


def cut_image(folder: Folder) -> None:
    path = folder.image("val", 3)
    path.write_bytes(path.read_bytes()[:-200])


def cut_photograph(folder: Folder) -> None:
    path = folder.images / "photograph.jpg"
    Image.effect_noise((400, 100), 80).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    folder.change("val", 3, filename=path.name)


def repeat_name_in_split(folder: Folder) -> None:
    folder.change("train", 9, filename=folder.lines("train")[3]["filename"])


def repeat_name_in_other_split(folder: Folder) -> None:
    folder.change("test", 2, filename="./" + folder.lines("train")[3]["filename"])


def repeat_image_in_other_split(folder: Folder) -> None:
    shutil.copy(folder.image("train", 4), folder.images / "copy.png")
    folder.change("test", 2, filename="copy.png")


def repeat_picture_in_another_format(folder: Folder) -> None:
    with Image.open(folder.image("train", 4)) as image:
        image.convert("RGB").save(folder.images / "copy.bmp")
    folder.change("test", 2, filename="copy.bmp")


def put_image_outside(folder: Folder) -> None:
    folder.image("val", 1).rename(folder.path / "outside.png")
    folder.change("val", 1, filename="../outside.png")


def link_image_outside(folder: Folder) -> None:
    path = folder.image("val", 1)
    path.rename(folder.path / "outside.png")
    path.symlink_to("../outside.png")


def break_json(folder: Folder) -> None:
    file = folder.path / "train.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = lines[4][:-1]
    file.write_text("\n".join(lines) + "\n")


def break_utf8(folder: Folder) -> None:
    file = folder.path / "train.jsonl"
    file.write_bytes(file.read_bytes() + b'{"filename": "\xff.png"}\n')


def region(*box: object, phrase: object = "a thing") -> dict:
    return {"regions": [{"phrase": phrase, "bbox": list(box)}]}


BROKEN = {
    "missing image": (lambda f: f.image("val", 2).unlink(), "val.jsonl line 2: image .* is not in images/; add it"),
    "not an image": (lambda f: f.image("val", 2).write_text("?"), "val.jsonl line 2: image .* cannot be decoded"),
    "truncated image": (cut_image, "val.jsonl line 3: image .* cannot be decoded"),
    "truncated photograph": (cut_photograph, "val.jsonl line 3: image 'photograph.jpg' cannot be decoded"),
    "wide image": (
        lambda f: Image.new("I;16", (400, 100)).save(f.image("val", 2)),
        "val.jsonl line 2: image .* has mode I;16; save it with 8 bits a channel",
    ),
    "wrong size": (
        lambda f: f.change("test", 1, width=200, regions=[]),
        "test.jsonl line 1: image .* has 400x100 pixels, not 200x100; correct width and height",
    ),
    "no width": (lambda f: f.change("test", 1, width=None), r"test.jsonl line 1: width and height are \(None, 100\)"),
    "width as text": (lambda f: f.change("test", 1, width="400"), "test.jsonl line 1: width and height are"),
    "huge width": (lambda f: f.change("test", 1, width=10**400), "test.jsonl line 1: width and height are"),
    "no grounding": (lambda f: f.change("val", 4, grounding=None), "val.jsonl line 4: not an object with filename"),
    "empty caption": (lambda f: f.change("train", 12, caption=" "), "train.jsonl line 12: the caption is empty"),
    "caption list": (lambda f: f.change("train", 2, caption=["a"]), r"train.jsonl line 2: the caption is \['a'\], not"),
    "no caption": (lambda f: f.change("train", 2, caption=None), "train.jsonl line 2: the caption is None, not a str"),
    "half a surrogate": (lambda f: f.change("train", 2, caption="\ud800"), "train.jsonl line 2: the caption .* surrog"),
    "malformed JSON": (break_json, "train.jsonl line 5: not JSON"),
    "not UTF-8": (break_utf8, "train.jsonl line 13: not JSON"),
    "regions missing": (lambda f: f.change("val", 1, regions=None), r"val.jsonl line 1: regions is None.*write \[\]"),
    "region text": (lambda f: f.change("val", 1, regions=["a"]), "val.jsonl line 1: region 1 is 'a', not an object"),
    "empty phrase": (
        lambda f: f.change("val", 1, **region(0, 0, 9, 9, phrase="")),
        "val.jsonl line 1: the phrase of region 1 is empty",
    ),
    "box outside": (
        lambda f: f.change("val", 1, **region(380, 0, 410, 9)),
        r"val.jsonl line 1: region 1: bbox \[380, 0, 410, 9\] leaves the image of 400x100 pixels",
    ),
    "box above": (lambda f: f.change("val", 1, **region(0, -9, 9, 9)), "val.jsonl line 1: region 1: bbox .* leaves"),
    "box of nothing": (lambda f: f.change("val", 1, **region(5, 5, 5, 9)), "val.jsonl line 1: .* has no area"),
    "box as x y w h": (lambda f: f.change("val", 1, **region(300, 80, 60, 20)), "val.jsonl line 1: .* has no area"),
    "box of no number": (lambda f: f.change("val", 1, **region(math.nan, 0, 9, 9)), "val.jsonl line 1: .* leaves the"),
    "box of text": (lambda f: f.change("val", 1, **region("0", 0, 9, 9)), "val.jsonl line 1: .* not four numbers"),
    "box of three": (lambda f: f.change("val", 1, **region(0, 0, 9)), "val.jsonl line 1: .* not four numbers"),
    "name twice": (repeat_name_in_split, "train.jsonl line 9: image .* was used before, in train.jsonl line 4"),
    "name in two splits": (repeat_name_in_other_split, "test.jsonl line 2: .* was used before, in train.jsonl line 4"),
    "image in two splits": (repeat_image_in_other_split, "test.jsonl line 2: .* shows the same as that of train.jsonl"),
    "picture in two splits": (repeat_picture_in_another_format, "test.jsonl line 2: .* of train.jsonl line 4; keep it"),
    "image outside": (put_image_outside, "val.jsonl line 1: filename '../outside.png' leaves the folder images/"),
    "absolute name": (lambda f: f.change("val", 1, filename="/etc/motd"), "val.jsonl line 1: filename .* leaves the"),
    "link outside": (link_image_outside, "val.jsonl line 1: filename .* leaves the folder images/"),
    "no filename": (lambda f: f.change("val", 1, filename=None), "val.jsonl line 1: filename is None"),
    "zero byte": (lambda f: f.change("val", 1, filename="a\0"), "val.jsonl line 1: filename is "),
    "folder as image": (lambda f: f.change("val", 1, filename="."), "val.jsonl line 1: image '.' is not in images/"),
    "empty split": (lambda f: (f.path / "val.jsonl").write_text("\n"), "val.jsonl: is empty"),
    "no split": (lambda f: (f.path / "val.jsonl").unlink(), "val.jsonl: cannot be read .*; every split needs its file"),
    "no images": (lambda f: shutil.rmtree(f.images), "images is not a folder; put the images there"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_problem_is_named_with_its_line_and_nothing_is_written(case: str, folder: Folder, capsys) -> None:
    spoil, message = BROKEN[case]
    spoil(folder)
    problem, summary = failure(folder, capsys)
    assert re.search(message, problem)
    assert summary == "error: 1 problem; nothing was written"


def test_all_problems_are_counted_and_twenty_are_shown(folder: Folder, capsys) -> None:
    bad_box = {"phrase": "a thing", "bbox": [0, 0, 999, 9]}
    for number in range(1, 11):
        folder.change("train", number, regions=[bad_box, bad_box])
    folder.change("test", 1, caption="")
    folder.image("test", 2).write_bytes(b"broken")
    lines = failure(folder, capsys)
    assert len(lines) == 21
    assert lines[-1] == "error: 22 problems (2 more than shown); nothing was written"


def test_problems_with_lines_and_with_images_are_reported_together(folder: Folder, capsys) -> None:
    folder.change("train", 1, caption="")
    folder.image("test", 2).write_bytes(b"broken")
    first, second, _ = failure(folder, capsys)
    assert first.startswith("train.jsonl line 1: ")
    assert second.startswith("test.jsonl line 2: ")


@pytest.mark.skipif(not NLVR.is_dir(), reason="the sample is not here")
def test_the_whole_sample(tmp_path: Path) -> None:
    done = run_tool("nlvr", "--odvg", NLVR, "--out", tmp_path / "nlvr")
    assert done.returncode == 0, done.stderr
    info = json.loads((tmp_path / "nlvr" / "info.json").read_text())
    assert [info[key] for key in ("image_size", "train", "val", "test")] == [96, 461, 99, 99]
    for regions in datasets.load_from_disk(tmp_path / "nlvr" / "train")["regions"]:
        for box in (region["bbox"] for region in regions):
            assert 0 <= box[0] < box[2] <= 1
            assert 0 <= box[1] < box[3] <= 1
