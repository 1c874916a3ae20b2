"""Ukiyo-eVG is fetched from servers on loopback that speak as Zenodo, Google Drive and the hub do."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pytest
import requests
from conftest import ROOT, prepare_data, read
from PIL import Image, ImageEnhance
from safetensors.numpy import save

from prepare_data import prints, ukiyoe

SPLITS = {"train": 24, "val": 6, "test": 6}
UNNEEDED = 600
SIDES = (96, 128)  # of a print
SIZE = 64  # of the data set
COPIES = 3  # prints of the training split made from blocks of validation and test, in addition
KEY = "images_ukiyo-e.zip"
COMMIT = "c" * 40


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def impression(image: Image.Image) -> Image.Image:
    """Another print from the same block: cut a little, brighter, stored with more loss."""
    wide, high = image.size
    return ImageEnhance.Brightness(image.crop((1, 1, wide - 1, high - 1))).enhance(1.1).resize(SIDES)


def line(name: str, number: int) -> dict:
    box = [8.5, 10, 60, 100]
    grounding = {"caption": f"A woman with umbrella {number}", "regions": [{"phrase": "A woman", "bbox": box}]}
    return {"filename": name, "width": SIDES[0], "height": SIDES[1], "grounding": grounding}


class World:
    """Fixtures in the real layout: annotations/, archive.zip, weights/."""

    def __init__(self, folder: Path) -> None:
        drawn = iter(range(1000))
        self.folder, self.images, self.lines = folder, {}, {}
        for split, count in SPLITS.items():
            for number in range(count):
                picture = Image.fromarray(prints.draw(7, next(drawn), 128)[0].transpose(1, 2, 0)).resize(SIDES)
                self.images[f"{split}_{number}.jpg"] = jpeg(picture)
            self.lines[split] = [line(f"{split}_{number}.jpg", number) for number in range(count)]
        for number, origin in enumerate(("val_0.jpg", "test_1.jpg", "test_2.jpg")):
            name = f"copy_{number}.jpg"
            self.images[name] = jpeg(impression(Image.open(io.BytesIO(self.images[origin]))), 60)
            self.lines["train"].append(line(name, 100 + number))
        self.write_annotations()
        noise = np.random.default_rng(0)
        self.archive = folder / "archive.zip"
        with zipfile.ZipFile(self.archive, "w") as archive:
            names = [*self.images, *(f"other_{number}.jpg" for number in range(UNNEEDED))]
            for name in sorted(names, key=lambda name: hashlib.md5(name.encode()).digest()):
                content = self.images.get(name) or noise.bytes(20_000)
                archive.writestr(f"images/{name}", content, zipfile.ZIP_DEFLATED if name < "p" else zipfile.ZIP_STORED)
        self.weights = folder / "weights"
        self.weights.mkdir()
        for number, name in enumerate(ukiyoe.WEIGHTS):
            (self.weights / f"{name}.safetensors").write_bytes(save({"w": np.full((100, 100), number, np.float32)}))

    def write_annotations(self) -> None:
        for split, name in ukiyoe.ANNOTATIONS.items():
            path = self.folder / "annotations" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(entry) + "\n" for entry in self.lines[split]))

    def offset(self, name: str) -> tuple[int, int]:
        """Where the content of a member is, and its size."""
        with zipfile.ZipFile(self.archive) as archive:
            info = archive.getinfo(f"images/{name}")
        return info.header_offset + 30 + len(info.filename), info.compress_size

    def make(self, out: Path, *local: str, status: int = 0) -> Path:
        """Makes the data set; of annotations, images, weights those that are named come from local files."""
        places = {"annotations": self.folder / "annotations", "images": self.archive, "weights": self.weights}
        given = [str(part) for name in local for part in (f"--{name}", places[name])]
        arguments = ["ukiyo-e", "--size", str(SIZE), "--out", str(out), "--processes", "1", *given]
        assert prepare_data.main(arguments) == status
        return out


class Server(ThreadingHTTPServer):
    """Zenodo, the hub and Google Drive on one loopback port, with faults to order."""

    daemon_threads = True

    def __init__(self, world: World) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.world, self.base = world, f"http://127.0.0.1:{self.server_port}"
        self.content, self.size = bytearray(world.archive.read_bytes()), world.archive.stat().st_size
        self.asked: list[tuple[int, int]] = []  # ranges
        self.paths: list[str] = []
        self.sent, self.agents, self.busy_at, self.asked_at = 0, set(), [], []
        self.cut, self.busy, self.plain, self.slow, self.sha, self.spoil = 0, 0, False, 0.0, None, []

    def handle_error(self, *_: object) -> None: ...  # a client that has seen enough hangs up


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        defaults = {"Content_Type": "application/octet-stream", "Content_Length": len(body)}
        for key, value in {**defaults, **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        server, path = self.server, self.path.split("?")[0]
        server.paths.append(self.path)
        if path == "/api/records/13120879":
            entry = {"key": KEY, "size": server.size, "checksum": "md5:abc", "links": {"self": f"{server.base}/{KEY}"}}
            self.answer(200, json.dumps({"files": [{"key": "readme.txt"}, entry]}).encode())
        elif path == f"/{KEY}":
            self.range()
        elif path == "/embeddedfolderview":
            self.drive_folder()
        elif path == "/uc":
            name = next(name for name in ukiyoe.ANNOTATIONS.values() if f"id={drive_id(name)}" in self.path)
            disposition = f'attachment; filename="{Path(name).name}"'
            self.answer(200, (server.world.folder / "annotations" / name).read_bytes(), Content_Disposition=disposition)
        else:
            self.hub(path)

    def range(self) -> None:
        server = self.server
        server.agents.add(self.headers["User-Agent"])
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        if server.busy > 0:
            server.busy -= 1
            server.busy_at.append(time.monotonic())
            return self.answer(429, b"too many", Retry_After=1)
        server.asked.append((start, end + 1))
        server.asked_at.append(time.monotonic())
        time.sleep(server.slow)
        if server.plain:
            self.send_response(200)
            self.send_header("Content-Length", str(len(server.content)))
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(1 << 16))
                    server.sent += 1 << 16
            except OSError:
                return None
        body = bytearray(server.content[start : end + 1])
        for first, size in server.spoil[:1]:
            if start <= first < end:
                body[first - start : first - start + size] = bytes(size)
                server.spoil.pop(0)
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(server.content)}")
        self.end_headers()
        if server.cut > 0 and len(body) > 2000:
            server.cut -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)
        server.sent += len(body)
        return None

    def drive_folder(self) -> None:
        refined, names = "r" * 33, list(ukiyoe.ANNOTATIONS.values())
        if f"id={refined}" in self.path:
            title, links = "refined", [file_link(name) for name in names[:2]]
        else:
            folder = f'<a href="https://drive.google.com/drive/folders/{refined}">refined</a>'
            title, links = "Ukiyo-eVG", [folder, file_link(names[2]), file_link("raw/ukiyoe_vg_train_pgt_odvg.jsonl")]
        self.answer(200, f"<html><title>{title}</title>{''.join(links)}</html>".encode(), Content_Type="text/html")

    def hub(self, path: str) -> None:
        name = next((n for n, (repo, _) in ukiyoe.WEIGHTS.items() if path.startswith(f"/{repo}/resolve/")), None)
        if name is None:
            return self.answer(404)
        body = (self.server.world.weights / f"{name}.safetensors").read_bytes()
        digest = self.server.sha or hashlib.sha256(body).hexdigest()
        headers = {"X_Repo_Commit": COMMIT, "X_Linked_Etag": f'"{digest}"', "X_Linked_Size": len(body)}
        return self.answer(200, body, ETag=f'"{digest}"', **headers)


def drive_id(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:33]


def file_link(name: str) -> str:
    return f'<a href="https://drive.google.com/file/d/{drive_id(name)}/view">{Path(name).name}</a>'


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "world").mkdir()
    return World(tmp_path / "world")


@pytest.fixture
def server(world: World, monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server(world)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_ENDPOINT", server.base)
    monkeypatch.setattr(ukiyoe, "RECORD", f"{server.base}/api/records/13120879")
    faster = {"PAUSE_S": 0.01, "TAIL": 64 << 10, "GAP": 1 << 10, "RANGE": 100 << 10, "TRIES": 4, "CHUNK": 512}
    for name, value in faster.items():
        monkeypatch.setattr(ukiyoe, name, value)
    send = requests.adapters.HTTPAdapter.send

    def to_loopback(adapter: object, request: requests.PreparedRequest, **options: object) -> requests.Response:
        request.url = request.url.replace("https://drive.google.com", server.base)
        return send(adapter, request, **options)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", to_loopback)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data" / "ukiyo-e"


def failure(world: World, out: Path, capsys, *local: str) -> str:
    """The one line of a run that must fail; nothing is written but what was fetched."""
    capsys.readouterr()
    world.make(out, *local, status=1)
    lines = [text for text in capsys.readouterr().err.splitlines() if not text.endswith(" images")]
    assert len(lines) == 2 and lines[1] == "error: 1 problem; nothing was written", lines
    assert not out.exists() and not out.with_name("ukiyo-e.partial").exists()
    return lines[0]


def fetched(server: Server) -> list[tuple[int, int]]:
    """Ranges before the archive's directory."""
    with zipfile.ZipFile(server.world.archive) as archive:
        return [(start, end) for start, end in server.asked if end <= archive.start_dir]


# All of it


def test_everything_is_fetched_and_only_what_is_needed(world: World, server: Server, out: Path, capsys) -> None:
    world.make(out)
    info = read(out)
    assert info.items() >= {"image_size": SIZE, "train": 24, "val": 6, "test": 6}.items()
    assert info.items() >= {"near_duplicates_left_out": COPIES, "validation_like_test": 0}.items()
    assert "near duplicates left out: 3" in capsys.readouterr().err
    assert sorted(path.name for path in out.parent.iterdir()) == ["ukiyo-e", "weights"]
    with zipfile.ZipFile(world.archive) as archive:
        needed = sum(info.compress_size for info in archive.infolist() if "other" not in info.filename)
        size, listed = len(server.content), len(server.content) - archive.start_dir
    assert needed + listed < server.sent < 1.1 * needed + 2 * listed < 0.05 * size
    assert len(fetched(server)) <= len(world.images) and all("autoresearch" in agent for agent in server.agents)
    table = datasets.load_from_disk(out / "train")
    assert table["caption"] == [f"A woman with umbrella {number}" for number in range(24)]
    with Image.open(io.BytesIO(world.images["train_3.jpg"])) as image:
        want = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)).transpose(2, 0, 1).reshape(-1)
    assert table[3]["image"] == want.tolist()
    assert table[3]["regions"][0]["bbox"] == pytest.approx([8.5 / 96, 10 / 128, 60 / 96, 100 / 128], abs=1e-6)
    stated = json.loads((out.parent / "weights" / "info.json").read_text())
    for name, (repo, file) in ukiyoe.WEIGHTS.items():
        content = (out.parent / "weights" / f"{name}.safetensors").read_bytes()
        assert content == (world.weights / f"{name}.safetensors").read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        assert stated[f"{name}.safetensors"] == {"repo": repo, "revision": COMMIT, "file": file, "sha256": digest}


def test_local_copies_need_no_network_and_give_the_same(world: World, server: Server, out: Path) -> None:
    world.make(out, "weights")
    server.shutdown()
    server.paths.clear()
    from_zip = world.make(out.with_name("zip"), "annotations", "images", "weights")
    world.archive, archive = world.folder / "unpacked", world.archive
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(world.archive)
    from_folder = world.make(out.with_name("folder"), "annotations", "images", "weights")
    assert len({read(made)["hash"] for made in (out, from_zip, from_folder)}) == 1 and not server.paths


def test_the_tables_of_timm_and_open_clip_name_the_same_weights() -> None:
    from open_clip.pretrained import get_pretrained_cfg
    from timm.models import get_pretrained_cfg as timm_cfg

    assert timm_cfg("vit_small_patch16_224").hf_hub_id == ukiyoe.WEIGHTS["vit_small_patch16_224"][0]
    assert get_pretrained_cfg("ViT-B-32", "laion2b_s34b_b79k")["hf_hub"].rstrip("/") == ukiyoe.WEIGHTS["ViT-B-32"][0]


# What goes wrong on the way


def test_a_cut_connection_is_taken_up_where_it_was(world: World, server: Server, out: Path) -> None:
    server.cut = 9
    world.make(out, "annotations", "weights")
    assert read(out)["train"] == 24
    begun = {}
    rests = [start for start, end in server.asked if start > begun.setdefault(end, start)]
    assert len(rests) == 9 and server.cut == 0 and server.sent < 0.06 * len(server.content)


def test_what_a_lost_connection_left_is_not_fetched_again(world: World, server: Server, out: Path, capsys) -> None:
    last = max(world.offset(f"{name}_{number}.jpg") for name, count in SPLITS.items() for number in range(count))
    content, server.content = server.content, Dying(server.content, last[0])
    told = failure(world, out, capsys, "annotations", "weights")
    assert "Connection" in told and "run the same command again" in told
    had = {path.name for path in (out.parent / "ukiyo-e.download" / "images").iterdir()}
    assert len(had) > 20
    damaged = out.parent / "ukiyo-e.download" / "images" / had.pop()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    server.content = content
    server.asked.clear()
    world.make(out, "annotations", "weights")
    inside = [name for name in had for start, end in server.asked if start <= world.offset(name)[0] < end]
    assert not inside and len(server.asked) <= len(world.images) - len(had) + 1


class Dying(bytearray):
    """Content whose server gives nothing of one place."""

    def __init__(self, content: bytes, place: int) -> None:
        super().__init__(content)
        self.place = place

    def __getitem__(self, part: slice) -> bytes:
        return super().__getitem__(part) if not part.start <= self.place < part.stop else b""


def test_a_killed_run_is_resumed_without_fetching_again(world: World, server: Server, out: Path) -> None:
    server.slow = 0.05
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from prepare_data import main, ukiyoe
        ukiyoe.RECORD, ukiyoe.TAIL, ukiyoe.GAP = {ukiyoe.RECORD!r}, 64 << 10, 1 << 10
        main(sys.argv[1:])"""
    arguments = ["ukiyo-e", "--size", SIZE, "--out", out, "--annotations", world.folder / "annotations"]
    arguments = map(str, [sys.executable, "-B", "-c", code, *arguments, "--weights", world.weights])
    process = subprocess.Popen([*arguments], stderr=subprocess.DEVNULL)
    images = out.parent / "ukiyo-e.download" / "images"
    while not (images.is_dir() and len(list(images.glob("*.jpg"))) >= 15) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    had = {path.name for path in images.glob("*.jpg")}
    assert 15 <= len(had) < len(world.images) and not out.exists()
    server.slow = 0
    time.sleep(0.2)
    server.asked.clear()
    world.make(out, "annotations", "weights")
    assert not [name for name in had for start, end in server.asked if start <= world.offset(name)[0] < end]
    assert len(server.asked) == len(fetched(server)) and not images.exists()  # nor the list of members


def test_a_wrong_checksum_is_fetched_again_once_and_then_named(world: World, server: Server, out: Path, capsys) -> None:
    first, second = world.offset("test_0.jpg"), world.offset("val_1.jpg")
    server.spoil = [(first[0] + 100, 50)]
    world.make(out, "annotations", "weights")
    assert len([1 for start, end in server.asked if start <= first[0] < end]) == 2
    out.rename(out.with_name("sound"))
    for place, _ in (first, second):
        server.content[place + 100 : place + 150] = bytes(50)
    told = failure(world, out, capsys, "annotations", "weights")
    assert "2 images in archive" in told and "test_0.jpg, val_1.jpg" in told and "checksum, twice" in told
    assert len(list((out.parent / "ukiyo-e.download" / "images").iterdir())) == len(world.images) - 2


@pytest.mark.parametrize("change", [-1, 1000])
def test_an_archive_of_another_size_is_refused(world: World, server: Server, out: Path, change: int, capsys) -> None:
    server.size += change
    told = failure(world, out, capsys, "annotations", "weights")
    assert "has changed" in told and str(server.size) in told and not fetched(server)


def test_the_server_is_given_the_pause_it_asks_for(world: World, server: Server, out: Path) -> None:
    server.busy = 1
    world.make(out, "annotations", "weights")
    assert read(out)["train"] == 24 and server.asked_at[0] - server.busy_at[0] > 1


def test_a_server_that_is_never_ready_ends_in_one_line(world: World, server: Server, out: Path, capsys) -> None:
    server.busy, ukiyoe.TRIES = 10**6, 1
    assert "429" in failure(world, out, capsys, "annotations", "weights")


def test_a_server_without_ranges_is_refused_unread(world: World, server: Server, out: Path, capsys) -> None:
    server.plain = True
    assert "the whole archive instead of a range" in failure(world, out, capsys, "annotations", "weights")
    assert server.sent < 8 << 20 and len(server.asked) == 1  # what fits into the buffers in between


def test_a_record_without_the_archive(world: World, server: Server, out: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(ukiyoe, "ARCHIVE", "other.zip")
    assert "does not tell about other.zip" in failure(world, out, capsys, "annotations", "weights")


@pytest.mark.parametrize("local", [(), ("images",)])
def test_all_missing_images_are_named_at_once(world: World, server: Server, out: Path, local: tuple, capsys) -> None:
    world.lines["train"] += [line(f"lost_{number}.jpg", number) for number in range(30)]
    world.write_annotations()
    told = failure(world, out, capsys, "annotations", "weights", *local)
    assert "30 of 69 images" in told and all(f"lost_{number}.jpg" in told for number in range(30))
    assert "--images" in told and not fetched(server)


def test_an_ambiguous_name_is_an_error(world: World, out: Path, capsys) -> None:
    with zipfile.ZipFile(world.archive, "a") as archive:
        archive.writestr("elsewhere/val_3.jpg", b"?")
    told = failure(world, out, capsys, "annotations", "weights", "images")
    assert "more than once" in told and told.count("val_3.jpg") == 1


# The lines


def test_what_machines_leave_in_annotations_is_left_out_and_counted(world: World, out: Path) -> None:
    boxes = [[-30, 60.5, 200, 20], [5, 5, 5.2, 90], [200, 5, 300, 90]]
    regions = [{"phrase": "all", "bbox": box, "score": 0.3} for box in boxes] + [{"phrase": " ", "bbox": [1, 1, 9, 9]}]
    world.lines["train"][0]["grounding"]["regions"] = regions
    world.lines["train"][1]["grounding"]["caption"] = ""
    half = {"caption": "half", "regions": [{"phrase": "a", "bbox": [4, 5, 30, 50]}]}
    world.lines["train"][2] |= {"width": 48, "height": 64, "grounding": half}
    world.write_annotations()
    info = read(world.make(out, "annotations", "weights", "images"))
    assert info.items() >= {"train": 23, "captionless_prints": 1, "other_sizes": 1, "regions_left_out": 3}.items()
    table = datasets.load_from_disk(out / "train")
    found = [region["bbox"] for region in table[0]["regions"]]
    assert found == [pytest.approx([0, 20 / 128, 1, 60.5 / 128], abs=1e-6)]
    assert table[1]["regions"][0]["bbox"] == pytest.approx([4 / 48, 5 / 64, 30 / 48, 50 / 64], abs=1e-6)


def test_a_line_is_in_the_units_of_the_upright_image(tmp_path: Path) -> None:
    """Several boxes of a phrase are scaled like one, and a print that lies on its side in the file is the same."""
    (exif := Image.Exif())[0x0112] = 6
    Image.new("RGB", (200, 100)).save(tmp_path / "a.jpg", exif=exif)
    regions = [{"phrase": "a", "bbox": [[0, 0, 10, 20], [20, 10, 50, 100]]}, {"phrase": "b", "bbox": [9, 9, 9, 20]}]
    entry = {"filename": "x/a.jpg", "width": 50, "height": 100, "grounding": {"caption": "c", "regions": regions}}
    counts = dict.fromkeys(("captionless_prints", "other_sizes", "regions_left_out"), 0)
    adapted = json.loads(ukiyoe.adapt_line(json.dumps(entry), tmp_path, {"a.jpg": Path("a.jpg")}, counts))
    assert (adapted["width"], adapted["height"], counts["other_sizes"]) == (100, 200, 1)
    boxes = [region["bbox"] for region in adapted["grounding"]["regions"]]
    assert boxes == [[0, 0, 20, 40], [40, 20, 100, 200]] and counts["regions_left_out"] == 1
    entry["grounding"]["regions"] = [{"phrase": "a", "bbox": [[0, 0, "?", 20]]}]  # then nothing is changed
    adapted = json.loads(ukiyoe.adapt_line(json.dumps(entry), tmp_path, {"a.jpg": Path("a.jpg")}, counts))
    assert adapted == entry | {"filename": "a.jpg"}


@pytest.mark.parametrize(
    ("split", "spoil", "message"),
    [
        ("train", {"width": 128, "height": 96}, "train.jsonl line 3: image .* has 96x128 pixels, not 128x96"),
        ("train", {"grounding": {"caption": "x"}}, "train.jsonl line 3: .*; write a JSON object filename"),
        ("val", {"filename": "val_1.jpg"}, "val.jsonl line 3: .* was used before, in val.jsonl line 2"),
        ("val", {"filename": "train_1.jpg"}, "val.jsonl line 3: .* was used before, in train.jsonl line 2"),
    ],
)
def test_other_faults_are_named_with_their_line(
    world, out: Path, split: str, spoil: dict, message: str, capsys
) -> None:
    world.lines[split][2] |= spoil
    world.write_annotations()
    assert re.match(message, failure(world, out, capsys, "annotations", "weights", "images"))


def test_a_missing_annotation_file(world: World, out: Path, capsys) -> None:
    (world.folder / "annotations" / ukiyoe.ANNOTATIONS["val"]).unlink()
    assert "0 files refined/ukiyoe_vg_val_pgt_odvg.jsonl" in failure(world, out, capsys, "annotations")


@pytest.mark.parametrize("what", ["annotations", "images", "weights"])
def test_a_local_copy_that_may_not_be_read(world: World, out: Path, capsys, what: str) -> None:
    (world.archive if what == "images" else world.folder / what).chmod(0)
    told = failure(world, out, capsys, "annotations", "images", "weights")
    assert re.search(r"may not be read by the container; chmod -R a\+rX /", told)


def test_a_drive_folder_that_is_closed(world: World, server: Server, out: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Handler, "drive_folder", lambda self: self.answer(404))
    told = failure(world, out, capsys)
    assert "Google Drive folder" in told and "--annotations" in told


# Near duplicates


def test_near_duplicates_between_validation_and_test_are_reported_and_stay(world: World, out: Path) -> None:
    world.images["val_5.jpg"] = world.images["test_5.jpg"]
    world.images["val_4.jpg"] = world.images["val_3.jpg"]  # what is published stays, exact copies too
    with zipfile.ZipFile(world.archive, "w") as archive:
        for name, content in world.images.items():
            archive.writestr(name, content)
    info = read(world.make(out, "annotations", "weights", "images"))
    assert info.items() >= {"val": 6, "test": 6, "train": 24, "validation_like_test": 1}.items()
    assert prepare_data.main(["ukiyo-e", "--add", "trainval", "--out", str(out)]) == 0  # but no final is trained on it
    assert len(datasets.load_from_disk(out / "trainval")) == 24 + 5


# Weights


def test_sound_weights_are_not_fetched_again_and_damaged_ones_are(world: World, server: Server, out: Path) -> None:
    world.make(out, "annotations", "images")
    server.paths.clear()
    world.make(out.with_name("second"), "annotations", "images")
    assert not server.paths
    damaged = out.parent / "weights" / "ViT-B-32.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-4] + b"????")
    world.make(out.with_name("third"), "annotations", "images")
    assert server.paths and not [path for path in server.paths if "vit_small" in path]
    assert damaged.read_bytes() == (world.weights / damaged.name).read_bytes()


def test_weights_with_another_checksum_are_refused(world: World, server: Server, out: Path, capsys) -> None:
    server.sha = "0" * 64
    told = failure(world, out, capsys, "annotations", "images")
    assert f"the hub states {server.sha}" in told and not (out.parent / "weights").exists()
    server.sha = None
    world.make(out, "annotations", "images")


def test_a_hub_that_does_not_know_the_weights(world: World, server: Server, out: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Handler, "hub", lambda self, _: self.answer(404))
    told = failure(world, out, capsys, "annotations", "images")
    assert "timm/vit_small_patch16_224.augreg_in21k_ft_in1k/model.safetensors: " in told and "--weights" in told


def test_local_weights_are_checked(world: World, out: Path, capsys) -> None:
    stated = {"ViT-B-32.safetensors": {"repo": "a/b", "revision": "r", "file": "f", "sha256": "0" * 64}}
    (world.weights / "info.json").write_text(json.dumps(stated))
    assert "info.json there states 0000" in failure(world, out, capsys, "annotations", "images", "weights")
    (world.weights / "info.json").unlink()
    (world.weights / "ViT-B-32.safetensors").write_text("<html>")
    assert "want safetensors" in failure(world, out, capsys, "annotations", "images", "weights")
    (world.weights / "ViT-B-32.safetensors").unlink()
    assert "no ViT-B-32.safetensors" in failure(world, out, capsys, "annotations", "images", "weights")


def test_the_options_are_for_this_data_set_only(world: World, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        prepare_data.main(["prints", "--out", str(tmp_path / "x"), "--images", str(world.archive)])
    assert "--images is not for the data set prints" in capsys.readouterr().err
