"""What the tests of prepare_data.py share. They run inside the container image, the repository read-only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import prepare_data

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "odvg"
SIZE = 32
COUNTS = {"train": 40, "val": 12, "test": 9}
TINY = ["prints", "--size", SIZE, *(f"--{split}={count}" for split, count in COUNTS.items())]


def run_tool(*arguments: object, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
    """Runs prepare_data.py as a user does, but with an empty environment and no home."""
    command = [sys.executable, "-B", str(ROOT / "prepare_data.py"), *map(str, arguments)]
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, umask=umask)


def make(out: Path, *arguments: object, status: int = 0) -> Path:
    """Makes a data set in this process."""
    assert prepare_data.main([*map(str, arguments), "--out", str(out), "--processes", "1"]) == status
    return out


def read(out: Path) -> dict:
    return json.loads((out / "info.json").read_text())


def same_regions(stored: list[dict], want: list[dict]) -> bool:
    return all(
        a["phrase"] == b["phrase"] and a["bbox"] == pytest.approx(b["bbox"], abs=1e-6)
        for a, b in zip(stored, want, strict=True)
    )


def stretched(path: Path) -> list[int]:
    with Image.open(path) as image:
        square = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return np.asarray(square).transpose(2, 0, 1).reshape(-1).tolist()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny set of prints, made by the command under a umask that hides everything from others."""
    out = tmp_path_factory.mktemp("data") / "prints"
    done = run_tool(*TINY, "--out", out, umask=0o077)
    assert (done.returncode, done.stderr) == (0, "train: 40 images\nval: 12 images\ntest: 9 images\n")
    return out


class Folder:
    """A copy of the fixture that can be spoilt."""

    def __init__(self, path: Path) -> None:
        self.path, self.images = shutil.copytree(FIXTURE, path), path / "images"
        self.upright: Path | None = None  # a copy of the picture that a row should show, where its file is not that

    def lines(self, split: str) -> list[dict]:
        text = (self.path / f"{split}.jsonl").read_text("utf-8-sig")
        return [json.loads(line) for line in text.splitlines()]

    def change(self, split: str, number: int, **changes: object) -> None:
        """Changes keys of a line (counted from 1), or of the grounding in it."""
        lines = self.lines(split)
        for key, value in changes.items():
            (lines[number - 1]["grounding"] if key in ("caption", "regions") else lines[number - 1])[key] = value
        (self.path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def box(self, *box: object, phrase: str = "a thing") -> None:
        self.change("val", 1, regions=[{"phrase": phrase, "bbox": list(box)}])

    def text(self, split: str, old: bytes, new: bytes) -> None:
        file = self.path / f"{split}.jsonl"
        file.write_bytes(file.read_bytes().replace(old, new, 1))

    def keep(self, split: str, count: int) -> None:
        """Leaves that many lines."""
        file = self.path / f"{split}.jsonl"
        file.write_text("\n".join(file.read_text("utf-8-sig").splitlines()[:count]) + "\n")

    def image(self, split: str, number: int) -> Path:
        return self.images / self.lines(split)[number - 1]["filename"]

    def picture(self, name: str, split: str, number: int, image: Image.Image, keep: int | None = None) -> None:
        """Lets a line have another picture, of which only the first bytes are kept."""
        image.save(self.images / name)
        (self.images / name).write_bytes((self.images / name).read_bytes()[:keep])
        self.change(split, number, filename=name)

    def renamed(self, split: str, number: int, file: str, name: str) -> None:
        """The file has one name, and the line says another."""
        (self.images / file).parent.mkdir(exist_ok=True)
        old = self.image(split, number).rename(self.images / file)
        self.upright = self.upright or shutil.copy(old, self.path.parent / "upright.png")
        self.change(split, number, filename=name)

    def twins(self, split: str, number: int) -> None:
        for name in ("twin.png", "TWIN.png"):
            shutil.copy(self.image(split, number), self.images / name)
        self.change(split, number, filename="Twin.png")

    def recode(self, split: str, encoding: str) -> None:
        file = self.path / f"{split}.jsonl"
        file.write_bytes(file.read_text().encode(encoding))

    def link_to_images(self) -> None:
        self.images.rename(self.path.parent / "elsewhere")
        self.images.symlink_to("../elsewhere")

    def repack(self, split: str, number: int, name: str, mode: str | None = None, **how: object) -> None:
        """The same picture in another format."""
        with Image.open(self.image(split, number)) as image:
            image = image.convert(mode or "RGB")
        self.upright = self.path.parent / "upright.png"
        image.convert("RGB").save(self.upright)
        extra = {} if name.endswith("gif") else {"quality": 98, "subsampling": 0}
        image.save(self.images / name, **extra, **how)
        self.change(split, number, filename=name)

    def turned(
        self, split: str, number: int, orientation: int, kind: str = "jpg", upright: bool = True, odd: bool = False
    ):
        """The picture as a camera stores it; upright: its line and boxes are of the picture as one sees it."""
        back = {2: 0, 3: 3, 6: 2, 8: 4}.get(orientation)  # Image.Transpose that undoes what EXIF asks for
        with Image.open(self.image(split, number)) as image:
            image = image.convert("RGB")
        if upright:
            self.upright = self.path.parent / "upright.png"
            image.save(self.upright)
        if upright and back is not None:
            image = image.transpose(back)
        (exif := Image.Exif())[0x0112] = orientation
        if odd:  # and a resolution that lies far behind the end of the file
            entries = b"\x12\1\3\0\1\0\0\0%c\0\0\0\x1a\1\5\0\1\0\0\0\xff\xff\xff\0" % orientation
            exif = b"Exif\0\0II*\0\x08\0\0\0\2\0" + entries + bytes(4)
        image.save(self.images / f"turned.{kind}", exif=exif, quality=98, subsampling=0)
        self.change(split, number, filename=f"turned.{kind}")

    def much_text(self, name: str, split: str, number: int) -> None:
        """A picture whose file also holds two million characters."""
        (text := PngInfo()).add_text("log", "x" * 2_000_000, zip=True)
        with Image.open(self.image(split, number)) as image:
            image.save(self.images / name, pnginfo=text)
        self.change(split, number, filename=name)

    def damaged(self, kind: str, split: str, number: int) -> None:
        """A file of that kind whose second half is something else."""
        image = Image.effect_noise((400, 100), 80).convert("RGB")
        compression = {"compression": "tiff_lzw"} if kind == "tiff" else {}
        image.save(self.images / f"a.{kind}", **compression)
        content = (self.images / f"a.{kind}").read_bytes()
        if kind == "dds":  # its header names a pixel format that there is not
            content = content[:80] + b"\4\0\0\0ODD!" + content[88:]
        else:
            content = content[: len(content) // 2] + bytes(range(256))[::-1] * 9
        (self.images / f"a.{kind}").write_bytes(content)
        self.change(split, number, filename=f"a.{kind}", width=400, height=100)

    def outside(self, link: bool) -> None:
        path = self.image("val", 1)
        path.rename(self.path / "outside.png")
        path.symlink_to("../outside.png") if link else self.change("val", 1, filename="../outside.png")

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
