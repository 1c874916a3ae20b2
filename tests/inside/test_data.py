"""prepare_data.py and the prints. Runs inside the container image, with the repository read-only."""

import json
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
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
from conftest import COUNTS, ROOT, SIZE, TINY, Folder, make, prepare_data, read, run_tool, same_regions, stretched
from PIL import Image, ImageChops

from prepare_data import prints

NLVR = Path(os.environ.get("SHARED", ROOT.parent / "shared")) / "data" / "nlvr-sample"
PRINTS_OF = {"val": range(40, 52), "test": range(52, 61)}
DRAWN = [prints.draw(prepare_data.PRINTS_SEED, index, SIZE) for index in range(62)]


def orders(out: Path, split: str) -> tuple[list[int], list[int]]:
    """Which prints are the rows of the images, and which those of the captions?"""
    images, captions = (datasets.load_from_disk(out / split / side) for side in ("images", "captions"))
    assert (list(images.features), list(captions.features)) == (["image"], ["caption"])
    pixels, texts = [row[0].reshape(-1).tolist() for row in DRAWN], [row[1] for row in DRAWN]
    return [pixels.index(row) for row in images["image"]], [texts.index(row) for row in captions["caption"]]


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
    assert pixels.mean(axis=(1, 2)) == pytest.approx([103.7, 130.2, 154.3], abs=0.1)
    assert caption == (
        "Under a clear blue sky, a yellow drifting cloud on the left, an amber gateway in the middle "
        "near an amber flowering tree."
    )
    assert prints.VERSION == 2 and prints.draw(7, 9, 96)[2] == [
        {"phrase": "a large orange sun disc", "bbox": [0.069, 0.1167, 0.2797, 0.3275]},
        {"phrase": "a blue torii gate", "bbox": [0.6386, 0.473, 0.9254, 0.6852]},
        {"phrase": "a tiny orange tree in bloom", "bbox": [0.3754, 0.5234, 0.5349, 0.6925]},
        {"phrase": "a small pale cat", "bbox": [0.0689, 0.7309, 0.2416, 0.8599]},
    ]


def test_variety() -> None:
    scenes = [prints.place_motifs(random.Random(index), 0.5) for index in range(500)]
    assert len(prints.KINDS) == 24
    assert {id(motif.kind) for motifs in scenes for motif in motifs} == {id(kind) for kind in prints.KINDS.values()}
    assert {len(motifs) for motifs in scenes} == {2, 3, 4}
    drawn = [prints.draw(1, index, 16) for index in range(2000)]
    captions = [caption.lower() for _, caption, _ in drawn]
    assert {len(regions) for _, _, regions in drawn} == {2, 3, 4}
    assert len(set(captions)) > 1990 and len({region["phrase"] for _, _, regions in drawn for region in regions}) > 1500
    for named in (*prints.SKIES, *prints.GROUNDS):
        assert all(any(word in caption for caption in captions) for word in named.words)


def test_motifs_near_each_other_stand_in_different_columns() -> None:
    for index in range(500):
        motifs = prints.place_motifs(random.Random(index), 0.5)
        for plane in (["sky"], ["middle", "near"]):
            xs = sorted(motif.x for motif in motifs if motif.kind.layer in plane)
            assert all(right - left > 0.15 for left, right in zip(xs, xs[1:], strict=False))


def test_captions_name_the_regions_in_sound_english_and_boxes_are_inside() -> None:
    for _, caption, regions in (prints.draw(2, index, 16) for index in range(500)):
        words = caption.lower().replace(",", "").split()
        assert "  " not in caption and len(regions) >= 2
        assert not [pair for pair in zip(words, words[1:], strict=False) if pair[0] == "a" and pair[1][0] in "aeiou"]
        for region in regions:
            x0, y0, x1, y1 = region["bbox"]
            assert region["phrase"].lower() in caption.lower()
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1


@pytest.mark.parametrize("kind", prints.KINDS.values(), ids=prints.KINDS)
def test_a_box_is_where_the_motif_is(kind: SimpleNamespace) -> None:
    side, margin = 400, 10  # pixels; a thick line reaches over its points
    blank = Image.new("RGB", (side, side), (255, 0, 255))
    canvas = blank.copy()
    tones = {"colour": (0, 200, 0), "accent": (200, 0, 0), "shadow": (0, 0, 200)}
    xs, ys = zip(*prints.paint(canvas, kind.shapes, 0.5, 0.5, 0.15, **tones), strict=True)
    painted = ImageChops.difference(canvas, blank).getbbox()
    assert painted == pytest.approx([value * side for value in (min(xs), min(ys), max(xs), max(ys))], abs=margin)


# What is written


def test_files_and_info(tiny: Path) -> None:
    info = read(tiny)
    assert (
        info.items()
        >= {"format": 3, "prints_version": prints.VERSION, "name": "prints", "image_size": SIZE, **COUNTS}.items()
    )
    assert len(bytes.fromhex(info["hash"])) == 32 and set(info) >= {"source", "licence", "made_by"}
    hidden = {f"{split}{suffix}" for split in PRINTS_OF for suffix in ("", ".key.npy", ".regions.json")}
    assert {path.name for path in tiny.iterdir()} == {"info.json", "preview.png", "train"} | hidden
    assert list(tiny.parent.iterdir()) == [tiny]
    for path in [tiny, *tiny.rglob("*")]:  # everybody may read, and no path of this machine is written
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644)
        assert path.is_dir() or str(tiny.parent).encode() not in path.read_bytes()


def test_the_training_table(tiny: Path) -> None:
    table = datasets.load_from_disk(tiny / "train")
    assert list(table.features) == ["image", "caption", "regions"]
    assert table.features["image"] == datasets.List(datasets.Value("uint8"), length=3 * SIZE * SIZE)
    chunks = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in table.data.column("image").chunks]
    images = np.concatenate(chunks).reshape(COUNTS["train"], 3, SIZE, SIZE)
    for row, image, (pixels, caption, regions) in zip(table, images, DRAWN[:40], strict=True):
        assert np.array_equal(image, pixels) and row["caption"] == caption and same_regions(row["regions"], regions)


@pytest.mark.parametrize("split", PRINTS_OF)
def test_the_key_and_the_regions_belong_to_the_images(tiny: Path, split: str) -> None:
    images, captions = orders(tiny, split)
    key, regions = np.load(tiny / f"{split}.key.npy"), json.loads((tiny / f"{split}.regions.json").read_text())
    assert sorted(images) == list(PRINTS_OF[split]) and key.dtype == np.int64
    assert images == [captions[place] for place in key]
    assert all(same_regions(stored, DRAWN[index][2]) for stored, index in zip(regions, images, strict=True))


def test_both_sides_are_shuffled_differently_and_by_the_content(tiny: Path, tmp_path: Path) -> None:
    """With one print more for training, validation has as many prints as before, but others."""
    images, captions = orders(tiny, "val")
    others = orders(make(tmp_path / "other", *TINY, "--train", COUNTS["train"] + 1), "val")
    found = [PRINTS_OF["val"], images, captions, *([index - 1 for index in other] for other in others)]
    assert len({tuple(order) for order in found}) == 5


def test_the_same_input_gives_the_same_hash_and_another_size_or_count_another(tiny: Path, tmp_path: Path) -> None:
    make(tmp_path / "one", *TINY)
    assert run_tool(*TINY, "--processes", "3", "--out", tmp_path / "three").returncode == 0
    for file in ("info.json", "val.key.npy", "test.key.npy", "val.regions.json", "preview.png"):
        contents = {(out / file).read_bytes() for out in (tiny, tmp_path / "one", tmp_path / "three")}
        assert len(contents) == 1, file
    larger = make(tmp_path / "larger", *TINY, "--size", SIZE + 1)
    fewer = make(tmp_path / "fewer", *TINY, "--test", COUNTS["test"] - 1)
    assert len({read(out)["hash"] for out in (tiny, larger, fewer)}) == 3


def test_the_preview_is_a_sheet_of_prints(tiny: Path, tmp_path: Path) -> None:
    with Image.open(tiny / "preview.png") as sheet:
        assert sheet.width > 4 * prints.TILE and len(sheet.getcolors()) > 100
    with Image.open(make(tmp_path / "one", *TINY, "--train", 1) / "preview.png") as sheet:
        assert sheet.width < 2 * prints.TILE


def test_a_preview_is_small_whatever_the_images_show(tiny: Path, folder: Folder) -> None:
    assert (tiny / "preview.png").stat().st_size < 100_000
    random = np.random.default_rng(0)
    for n in range(1, 9):
        noise = Image.fromarray(random.integers(0, 256, (224, 224, 3), dtype=np.uint8))
        folder.picture(f"noise {n}.png", "train", n, noise)
        folder.change("train", n, width=224, height=224, regions=[])
    assert (folder.make() / "preview.png").stat().st_size < 100_000


# What the agent is told of the training side


def test_the_training_pairs_are_described(tiny: Path, folder: Folder) -> None:
    numbers, caption = read(tiny)["training"]
    drawn = [prints.draw(7, index, SIZE) for index in range(COUNTS["train"])]
    assert caption == drawn[0][1]
    words, regions = (sorted(counts) for counts in ([len(c.split()) for _, c, _ in drawn], [len(r) for *_, r in drawn]))
    assert numbers == (
        f"40 training pairs, {SIZE} x {SIZE} px, {regions[0]} to {regions[-1]} regions each "
        f"(median {regions[20]}), captions of {words[20]} words (median; most {words[-1]})"
    )
    folder.change("train", 1, caption="x" * 5000)
    assert read(folder.make())["training"][1] == "x" * 300


# Where it is written


def test_an_empty_folder_is_used_and_a_full_one_left_alone(tmp_path: Path, capsys) -> None:
    (tmp_path / "prints").mkdir()
    before = sorted(make(tmp_path / "prints", *TINY).rglob("*"))
    make(tmp_path / "prints", *TINY, status=1)
    assert "prints is not an empty folder; remove it" in capsys.readouterr().err
    make(tmp_path / "missing" / "prints", *TINY, status=1)
    assert "No such file or directory" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "prints", *before]


def test_a_killed_run_leaves_no_data_set_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    out, partial = tmp_path / "prints", tmp_path / "prints.partial"
    command = [sys.executable, "-B", ROOT / "prepare_data.py", "prints", "--out", out]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (partial / "train.arrow").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.iterdir()) == [partial]
    make(out, *TINY)
    assert list(tmp_path.iterdir()) == [out]


def test_a_failure_on_the_way_leaves_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(prints, "draw_sheet", lambda rows: Path("/dev/full").write_text("?"))
    make(tmp_path / "prints", *TINY, status=1)
    monkeypatch.setattr(prints, "TILE", 0)
    monkeypatch.setattr(prepare_data.operator, "call", die)
    make(tmp_path / "prints", *TINY, status=1)
    errors = capsys.readouterr().err
    assert "No space left on device" in errors and "try fewer --processes" in errors and not list(tmp_path.iterdir())


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ukiyoe"], "unknown data set ukiyoe; take prints or ukiyo-e, or give your own with --odvg FOLDER"),
        (["prints", "--odvg", "x"], "--odvg is not for the data set prints"),
        (["mine", "--odvg", "x", "--train", "5"], "--train is not for the data set mine"),
        (["prints", "--val", "0"], "counts must be 1 or more"),
        (["prints", "--size", "8"], "--size must be 16 to 1024"),
        (["../mine", "--odvg", "x"], "a name is up to 41 letters"),
        (["weights", "--odvg", "x"], "but not weights"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        make(tmp_path / "out", *arguments)
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


# Your own images


def test_own_images(folder: Folder) -> None:
    out = folder.make()
    assert read(out).items() >= {"name": "mine", "image_size": SIZE, "train": 12, "val": 4, "test": 4}.items()
    for line, row in zip(folder.lines("train"), datasets.load_from_disk(out / "train"), strict=True):
        want = [
            {"phrase": region["phrase"], "bbox": np.divide(region["bbox"], (400, 100, 400, 100)).tolist()}
            for region in line["grounding"]["regions"]
        ]
        assert row["caption"] == line["grounding"]["caption"] and same_regions(row["regions"], want)
        assert row["image"] == stretched(folder.images / line["filename"])
    for split in PRINTS_OF:
        images, captions = (datasets.load_from_disk(out / split / side) for side in ("images", "captions"))
        key = np.load(out / f"{split}.key.npy").tolist()
        for line in folder.lines(split):
            row = list(images["image"]).index(stretched(folder.images / line["filename"]))
            assert captions[key[row]]["caption"] == line["grounding"]["caption"]


def test_own_images_give_the_same_hash_again_and_another_one_after_any_change(folder: Folder) -> None:
    hashes = [read(folder.make(name))["hash"] for name in ("a", "b")]
    folder.change("val", 2, caption="Something else")
    hashes.append(read(folder.make("c"))["hash"])
    folder.change("train", 1, regions=[])
    hashes.append(read(folder.make("d"))["hash"])
    folder.picture("turned.png", "test", 3, Image.open(folder.image("test", 3)).transpose(Image.Transpose.ROTATE_180))
    hashes.append(read(folder.make("e"))["hash"])
    assert hashes[0] == hashes[1] and len(set(hashes)) == 4


def test_no_regions_paper_under_transparency_and_boxes_cut_to_the_image(folder: Folder) -> None:
    clear = Image.new("RGBA", (400, 100), (255, 0, 0, 0))
    clear.paste((0, 0, 255, 255), (200, 0, 400, 100))
    folder.picture("clear.png", "train", 1, clear)
    folder.change("train", 1, regions=[])
    folder.change("train", 2, regions=[{"phrase": "all", "bbox": [-1, -0.5, 400.4, 101]}])
    first, second = datasets.load_from_disk(folder.make() / "train").select(range(2))
    image = np.array(first["image"]).reshape(3, SIZE, SIZE)
    assert (image[:, 5, 2].tolist(), image[:, 5, SIZE - 3].tolist()) == ([255, 255, 255], [0, 0, 255])
    assert (first["regions"], second["regions"]) == ([], [{"phrase": "all", "bbox": [0, 0, 1, 1]}])


NOISE = Image.effect_noise((400, 100), 80)
BROKEN = [
    (lambda f: f.image("val", 2).unlink(), "val.jsonl line 2: image .* is not in images/; add it"),
    (lambda f: f.image("val", 2).write_text("?"), "val.jsonl line 2: image .* cannot be decoded .*; replace it"),
    (lambda f: f.picture("a.png", "val", 3, NOISE, 20000), "val.jsonl line 3: image 'a.png' cannot be decoded"),
    (lambda f: f.picture("a.jpg", "val", 3, NOISE, 2000), "val.jsonl line 3: image 'a.jpg' cannot be decoded"),
    (lambda f: f.damaged("avif", "val", 3), "val.jsonl line 3: image 'a.avif' cannot be decoded"),
    (lambda f: f.damaged("jp2", "val", 3), "val.jsonl line 3: image 'a.jp2' cannot be decoded"),
    (lambda f: f.damaged("dds", "val", 3), "val.jsonl line 3: image 'a.dds' cannot be decoded"),
    (lambda f: f.damaged("webp", "val", 3), "val.jsonl line 3: image 'a.webp' cannot be decoded"),
    (lambda f: f.damaged("tiff", "val", 3), "val.jsonl line 3: image 'a.tiff' cannot be decoded"),
    (lambda f: f.much_text("a.png", "val", 3), "val.jsonl line 3: image 'a.png' cannot be decoded .*MAX_TEXT_CHUNK"),
    (lambda f: f.image("val", 2).write_bytes(b""), "val.jsonl line 2: image .* cannot be decoded .*; replace it"),
    (lambda f: f.picture("a.tiff", "val", 2, NOISE.convert("F")), "val.jsonl line 2: .* 8 bits a channel"),
    (
        lambda f: f.turned("val", 2, 6, upright=False),
        "val.jsonl line 2: image .* has 100x400 pixels, not 400x100; correct width and height and the boxes",
    ),
    (
        lambda f: f.turned("val", 2, 6, "tiff", upright=False),
        "val.jsonl line 2: image .* has 100x400 pixels, not 400x100; correct width and height and the boxes",
    ),
    (lambda f: f.picture("a.png", "val", 2, Image.new("I;16", (400, 100))), "val.jsonl line 2: .* 8 bits a channel"),
    (
        lambda f: f.change("test", 1, width=200, regions=[]),
        "test.jsonl line 1: image .* has 400x100 pixels, not 200x100; correct width and height",
    ),
    (lambda f: f.change("test", 1, width=None), r"test.jsonl line 1: width and height are \(None, 100\)"),
    (lambda f: f.change("val", 4, grounding=None), "val.jsonl line 4: TypeError.*; write a JSON object .*grounding"),
    (
        lambda f: f.text("val", b'"filename"', b'"file"'),
        r"val.jsonl line 1: KeyError\('filename'\); write a JSON object filename",
    ),
    (lambda f: f.change("train", 12, caption=" "), "train.jsonl line 12: the caption is ' '; write a text"),
    (lambda f: f.change("train", 2, caption=["a", 5]), "train.jsonl line 2: the caption is 5; write a text"),
    (lambda f: f.change("train", 2, caption=[]), r"train.jsonl line 2: the caption is \[\]; write a text"),
    (
        lambda f: f.change("val", 2, caption=["a", "b"]),
        r"val.jsonl line 2: .*only a training image may have several captions",
    ),
    (
        lambda f: f.change("val", 2, caption="half \ud83d"),
        r"val.jsonl line 2: .*\\ud83d', which holds half a character",
    ),
    (lambda f: f.box(0, 0, 9, 9, phrase="\udc80"), r"val.jsonl line 1: the phrase of region 1 .* half a character"),
    (
        lambda f: f.change("val", 2, filename="\ud83d.png"),
        r"val.jsonl line 2: image .* cannot be found .UnicodeEncodeError.; rename it",
    ),
    (lambda f: f.change("val", 2, filename="a\0.png"), "val.jsonl line 2: image .* cannot be found"),
    (lambda f: f.change("val", 2, filename="a" * 300), "val.jsonl line 2: image .* (cannot be found|is not in)"),
    (lambda f: f.text("val", b"{", b'{"a": ' + b"[" * 99_999), "val.jsonl line 1: RecursionError"),
    (lambda f: f.text("val", b"{", b'{"width": 9, '), "val.jsonl line 1: ValueError.*a second 'width'"),
    (lambda f: f.recode("val", "utf-16"), "val.jsonl: is UTF-16; save it as UTF-8"),
    (lambda f: f.change("val", 2, width=400.5), r"val.jsonl line 2: width and height are \(400.5, 100\)"),
    (lambda f: f.change("val", 2, width=True), r"val.jsonl line 2: width and height are \(True, 100\)"),
    (
        lambda f: f.twins("val", 2),
        r"val.jsonl line 2: image 'Twin.png' is not in images/, but \['.*', '.*'\] are; write the name",
    ),
    (lambda f: f.change("train", 2, caption=None), "train.jsonl line 2: the caption is None; write a text"),
    (lambda f: f.text("train", b"}}\n", b"}\n"), "train.jsonl line 1: JSONDecodeError.*; write a JSON object"),
    (lambda f: f.text("train", b": ", b": \xff"), "train.jsonl line 1: UnicodeDecodeError.*; write a JSON object"),
    (lambda f: (f.change("val", 2, caption=""), f.text("val", b"\n", b"\n\n \n")), "val.jsonl line 4: the caption"),
    (lambda f: f.change("val", 1, regions=None), "val.jsonl line 1: .*, with an empty list for no regions"),
    (lambda f: f.change("val", 1, regions=["a"]), "val.jsonl line 1: TypeError.*phrase, bbox"),
    (lambda f: f.box(0, 0, 9, 9, phrase=""), "val.jsonl line 1: the phrase of region 1 is ''; write a text"),
    (
        lambda f: f.box(380, 0, 410, 9),
        r"val.jsonl line 1: bbox \[380, 0, 410, 9\] of region 1 leaves the image of 400x100 pixels; cut it",
    ),
    (lambda f: f.box(0, -9, 9, 9), "val.jsonl line 1: .* leaves the image"),
    (lambda f: f.box(float("nan"), 0, 9, 9), "val.jsonl line 1: .* leaves the image"),
    (lambda f: f.box(5, 5, 5, 9), "val.jsonl line 1: .* has no area; write"),
    (lambda f: f.box(300, 80, 60, 20), "val.jsonl line 1: .* has no area.*; this one looks like x, y, width, height"),
    (lambda f: f.box(9, 5, 0, 0), "val.jsonl line 1: .* has no area"),
    (lambda f: f.box(0.1, 0.2, 0.5, 1), "val.jsonl line 1: .* looks like fractions of the image; write pixels"),
    (lambda f: f.box(0, 0, 1, 1), "val.jsonl line 1: .* looks like fractions"),
    (lambda f: f.box([0, 0, 9, 9], [0, 0, 0.9, 0.7]), "val.jsonl line 1: .* of region 2 looks like fractions"),
    (lambda f: f.box([0, 0, 9, 9], 3), "val.jsonl line 1: .* is not four numbers"),
    (lambda f: f.box(float("inf"), 0, 10**400, 9), "val.jsonl line 1: .* leaves the image"),
    (lambda f: f.box(0, 0, True, 9), "val.jsonl line 1: .* is not four numbers"),
    (lambda f: f.box("0", 0, 9, 9), "val.jsonl line 1: .* is not four numbers"),
    (lambda f: f.box(0, 0, 9), "val.jsonl line 1: .* is not four numbers"),
    (
        lambda f: f.change("val", 3, filename=f.image("val", 1).name),
        "val.jsonl line 3: .* in val.jsonl line 1; keep one",
    ),
    (
        lambda f: f.change("test", 2, filename="./" + f.image("train", 4).name),
        "test.jsonl line 2: image .* was used before, in train.jsonl line 4; keep one",
    ),
    (
        lambda f: f.picture("copy.bmp", "test", 2, Image.open(f.image("train", 4)).convert("RGB")),
        "test.jsonl line 2: .* shows the same as that of train.jsonl line 4; keep it in one split only",
    ),
    (
        lambda f: f.picture("copy.bmp", "val", 3, Image.open(f.image("val", 1)).convert("RGB")),
        "val.jsonl line 3: .* shows the same as that of val.jsonl line 1; keep it in one split only, and in val",
    ),
    (
        lambda f: f.picture("copy.bmp", "test", 4, Image.open(f.image("test", 2)).convert("RGB")),
        "test.jsonl line 4: .* shows the same as that of test.jsonl line 2; keep it .* in val and test once",
    ),
    (lambda f: (f.path / "train.jsonl").chmod(0), "train.jsonl may not be read by the container; chmod -R a.rX /"),
    (lambda f: f.images.chmod(0), "png may not be read by the container; chmod -R a.rX .*/odvg$"),
    (lambda f: f.image("val", 2).chmod(0), "hidden-3496-1-0.png may not be read by the container; chmod -R"),
    (lambda f: f.outside(link=False), "val.jsonl line 1: image '../outside.png' lies outside of the folder images/"),
    (
        lambda f: f.outside(link=True),
        "val.jsonl line 1: image .* lies outside of the folder images/; put the file itself",
    ),
    (lambda f: f.change("val", 1, filename="/etc/passwd"), "val.jsonl line 1: image '/etc/passwd' lies outside of"),
    (lambda f: f.change("val", 1, filename=None), "val.jsonl line 1: image None is not in images/"),
    (lambda f: f.change("val", 1, filename="."), "val.jsonl line 1: image '.' is not in images/"),
    (
        lambda f: (f.path / "val.jsonl").write_text("\n"),
        "val.jsonl: is missing or empty; every split needs at least one image",
    ),
    (lambda f: (f.path / "val.jsonl").unlink(), "val.jsonl: is missing or empty; every split"),
    (lambda f: shutil.rmtree(f.images), "^--odvg: images is not a folder; put the images there"),
]


@pytest.mark.parametrize(("spoil", "message"), BROKEN)
def test_a_problem_is_named_with_its_line_and_nothing_is_written(spoil, message: str, folder: Folder, capsys) -> None:
    spoil(folder)
    problem, summary = folder.failure(capsys)
    assert re.search(message, problem)
    assert summary == "error: 1 problem; nothing was written"


@pytest.mark.parametrize(("unit", "name"), prepare_data.odvg.UNITS.items())
def test_boxes_in_other_units_than_pixels(unit: int, name: str, tmp_path: Path) -> None:
    """Label Studio writes per cent, some language models thousandths. One line alone may well have such boxes."""
    (tmp_path / "a.png").touch()
    problems: list[str] = []
    for count, side, most in ((20, 2 * unit, unit), (19, 2 * unit, unit), (20, unit, unit), (20, 2 * unit, unit + 1)):
        regions = [{"phrase": "a thing", "bbox": [9, 9, most - n, 50]} for n in range(count)]
        entry = {"filename": "a.png", "width": side, "height": side}
        entry["grounding"] = {"caption": "a picture", "regions": regions}
        (tmp_path / "train.jsonl").write_text(json.dumps(entry))
        list(prepare_data.odvg.read(tmp_path / "train.jsonl", prepare_data.odvg.Images(tmp_path), problems))
    (problem,) = problems
    assert problem == (
        f"train.jsonl: none of 20 boxes goes beyond {unit}, in images of {2 * unit} pixels and more: "
        f"they look like {name} of the image; write pixels"
    )


def test_a_small_validation_is_taken_with_a_warning(folder: Folder, capsys) -> None:
    folder.keep("val", 1)
    folder.make()
    assert "val: 1 different captions alone, so what is found there is luck" in capsys.readouterr().err


def test_a_person_is_told_the_folders_own_path_to_make_readable(folder: Folder, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MAKE_READABLE", "chmod -R a+rX /home/me/images")
    folder.images.chmod(0o600)
    assert folder.failure(capsys)[0].endswith("may not be read by the container; chmod -R a+rX /home/me/images")
    folder.images.chmod(0o755)
    folder.path.parent.chmod(0o500)  # what may not be written is another matter
    folder.make(status=1)
    assert "Permission denied: '" in capsys.readouterr().err


# Clear enough to be taken: what is done to a folder, and what row 2 of its training table is then


CLEAR = {
    "a size of 400.0": lambda f: f.change("train", 2, width=400.0, height=1e2),
    "a byte order mark": lambda f: f.recode("train", "utf-8-sig"),
    "lines of Windows": lambda f: [f.text("train", b"}}\n", b"}}\r\n") for _ in range(12)],
    "another normal form": lambda f: f.renamed("train", 2, "caf\u00e9.png", "cafe\u0301.png"),
    "another normal form, the other way": lambda f: f.renamed("train", 2, "cafe\u0301.png", "caf\u00e9.png"),
    "another case": lambda f: f.renamed("train", 2, "a.JPG.png", "A.jpg.PNG"),
    "a blank that looks like another": lambda f: f.renamed("train", 2, "8.55\u202fPM.png", "8.55 PM.png"),
    "slashes of Windows": lambda f: f.renamed("train", 2, "sub/a.png", "sub\\a.png"),
    "images/ before the name": lambda f: f.renamed("train", 2, "a.png", "images/a.png"),
    "a blank, a colon, a quote, a line break": lambda f: f.renamed("train", 2, "a b:c'd\n.png", "a b:c'd\n.png"),
    "a folder that is a link": lambda f: f.link_to_images(),
    "a list of one caption": lambda f: f.change("train", 2, caption=[f.lines("train")[1]["grounding"]["caption"]]),
    "turned by 180 degrees": lambda f: f.turned("train", 2, 3),
    "turned to the left": lambda f: f.turned("train", 2, 6),
    "turned to the right": lambda f: f.turned("train", 2, 8),
    "mirrored": lambda f: f.turned("train", 2, 2),
    "turned, as PNG has it": lambda f: f.turned("train", 2, 6, "png"),
    "turned, as TIFF has it": lambda f: f.turned("train", 2, 6, "tiff"),
    "turned, as WebP has it": lambda f: f.turned("train", 2, 8, "webp"),
    "an orientation that there is not": lambda f: f.turned("train", 2, 77),
    "EXIF that cannot be read": lambda f: f.repack("train", 2, "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\xff\1"),
    "EXIF that is empty": lambda f: f.repack("train", 2, "a.jpg", exif=b"Exif\0\0"),
    "EXIF with two heads": lambda f: f.repack("train", 2, "a.jpg", exif=b"Exif\0\0Exif\0\0II*\0\x08\0\0\0\0\0"),
    "a turn beside EXIF that cannot be read": lambda f: f.turned("train", 2, 6, odd=True),
    "a palette": lambda f: f.repack("train", 2, "a.gif"),
    "an animation": lambda f: f.repack("train", 2, "a.gif", save_all=True, append_images=[NOISE]),
    "two pictures in one": lambda f: f.repack("train", 2, "a.mpo", save_all=True, append_images=[NOISE]),
    "ink": lambda f: f.repack("train", 2, "a.jpg", "CMYK"),
    "grey": lambda f: f.repack("train", 2, "a.png", "L"),
    "black and white": lambda f: f.repack("train", 2, "a.png", "1"),
    "a damaged colour profile": lambda f: f.repack("train", 2, "a.png", icc_profile=b"nothing"),
    "another kind than its name says": lambda f: (
        f.repack("train", 2, "a.bmp"),
        f.renamed("train", 2, "a.jpg", "a.jpg"),
    ),
}


@pytest.mark.parametrize("what", CLEAR)
def test_what_is_clear_is_taken(what: str, folder: Folder) -> None:
    before = datasets.load_from_disk(folder.make("before") / "train")[1]
    CLEAR[what](folder)
    after = datasets.load_from_disk(folder.make("after") / "train")[1]
    assert after["caption"] == before["caption"] and same_regions(after["regions"], before["regions"])
    row, upright = after["image"], stretched(folder.upright or folder.image("train", 2))
    assert row == upright if not folder.upright else np.abs(np.subtract(row, upright)).max() <= 12  # as JPEG stores it


def test_a_phrase_with_several_boxes_is_a_region_for_each(folder: Folder) -> None:
    folder.change("train", 2, regions=[{"phrase": "a box", "bbox": [[0, 0, 200, 50], [200, 50, 400, 100]]}])
    regions = datasets.load_from_disk(folder.make() / "train")[1]["regions"]
    want = [{"phrase": "a box", "bbox": box} for box in ([0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1])]
    assert regions == want


def test_several_captions_of_a_training_image_are_a_row_for_each(folder: Folder) -> None:
    folder.change("train", 1, caption=["one", "two", "three"])
    folder.change("train", 9, filename=folder.image("train", 4).name, width=400, height=100)
    rows = datasets.load_from_disk(folder.make() / "train")
    assert rows["caption"][:3] == ["one", "two", "three"] and len(rows) == 14
    assert rows[0]["image"] == rows[2]["image"] and rows[5]["image"] == rows[10]["image"]


def test_all_problems_are_counted_and_twenty_are_shown(folder: Folder, capsys) -> None:
    folder.change("train", 1, caption="")
    folder.image("test", 2).write_bytes(b"broken")
    first, second, _ = folder.failure(capsys)
    assert first.startswith("train.jsonl line 1: ") and second.startswith("test.jsonl line 2: ")
    for number in range(1, 11):
        folder.change("train", number, regions=[{"phrase": "a thing", "bbox": [0, 0, 999, 9]}] * 2)
    lines = folder.failure(capsys)
    assert len(lines) == 21 and lines[-1] == "error: 22 problems (2 more than shown); nothing was written"


if NLVR.is_dir():  # defined, not skipped, where the sample is: a skipped test fails the suite

    def test_the_whole_sample(tmp_path: Path) -> None:
        done = run_tool("nlvr", "--odvg", NLVR, "--out", tmp_path / "nlvr")
        assert done.returncode == 0, done.stderr
        assert read(tmp_path / "nlvr").items() >= {"image_size": 96, "train": 461, "val": 99, "test": 99}.items()
        boxes = [r["bbox"] for row in datasets.load_from_disk(tmp_path / "nlvr" / "train")["regions"] for r in row]
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in boxes)
