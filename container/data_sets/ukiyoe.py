"""Fetches Ukiyo-eVG and the pretrained weights: only what is needed, every file checked, resumed after a failure.

Annotations come from the authors' Google Drive folder (gdown), weights from the hub (huggingface_hub). Of the 175,000
images in the Zenodo archive about 11,000 are wanted: they are copied by HTTP ranges into a local sparse file of the
archive's size, which zipfile then reads, checking every CRC. A local copy of each may be given.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
import zipfile
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import gdown.exceptions
import httpx2
import huggingface_hub
import requests
import safetensors
from PIL import Image
from tqdm import tqdm
from urllib3.util import Retry

import odvg
from project import sha256

DRIVE_FOLDER = "1cLhue-10GYtjybQ5CMPRyFcI_LjgArcE"  # Ukiyo-eVG, to which the authors' selinakhan/vg_art points
ANNOTATIONS = {
    "train": "refined/ukiyoe_vg_train_pgt_odvg.jsonl",
    "val": "refined/ukiyoe_vg_val_pgt_odvg.jsonl",
    "test": "ukiyoe_vg_test_annotated.jsonl",
}
RECORD = "https://zenodo.org/api/records/13120879"
ARCHIVE = "images_ukiyo-e.zip"
# By the names of train.py's models: timm's default, and open_clip's laion2b_s34b_b79k, trained with the plain GELU of
# ViT-B-32 (OpenAI's own weights are silently worse in it). The tests compare both packages' tables with this one.
WEIGHTS = {
    "vit_small_patch16_224": ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "model.safetensors"),
    "ViT-B-32": ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "open_clip_model.safetensors"),
}

# Zenodo answers a guest about 2,000 requests an hour, so requests are few, and more than one at a time gains nothing.
GAP = 512 << 10  # bytes: a smaller gap between two members is fetched too
RANGE = 16 << 20  # bytes asked for at once, at most (unless one member is larger)
TAIL = 64 << 20  # bytes of the archive's end that hold the list of its members (175,000 take about 20 MB)
CHUNK = 64 << 10  # bytes read at once; as much may be lost with a connection
TIMEOUT_S = 60  # without a byte
TRIES = 8  # failures in a row, without a byte in between
PAUSE_S = 1.0  # before the second try; doubles
SHAPE_SLACK = 0.02  # by which the aspect ratio of a print may differ from what the annotation states
MIN_SIDE = 1.0  # pixels of a box; smaller ones are left out
# Shown on a terminal; in a container, which has none, if PROGRESS says that the caller has one.
Bar = functools.partial(tqdm, disable=False if "PROGRESS" in os.environ else None, leave=False)
AGAIN = "run the same command again (it goes on where it stopped), or give a local copy with --"


class DataError(Exception):
    """Why there is no data set: lines, in args, that each say what is wrong, where, and what to do next."""


def fetch(folder: Path, weights: Path, given: dict[str, Path | None], report: dict[str, int]) -> Path:
    """Fetches images and annotations (train.jsonl, val.jsonl, test.jsonl) into `folder`, and the weights.

    Returns the folder to which the annotations' file names are relative. `given` names local copies of annotations,
    images, weights, or None; `report` gets counts. Raises DataError.
    """
    folder.mkdir(exist_ok=True)
    files = fetch_annotations(folder / "annotations", given["annotations"])
    lines = {split: file.read_text("utf-8-sig", "replace").split("\n") for split, file in files.items()}
    needed = {image_name(line) for split in lines for line in lines[split]} - {""}
    fetch_weights(weights, folder / "hub", given["weights"])
    root, places = fetch_images(needed, folder, given["images"])
    report |= dict.fromkeys(("captionless_prints", "other_sizes", "regions_left_out"), 0)
    for split in lines:
        adapted = [adapt_line(line, root, places, report) for line in Bar(lines[split], f"{split} sizes")]
        (folder / f"{split}.jsonl").write_text("\n".join(adapted) + "\n")
    return root


def fetch_annotations(folder: Path, source: Path | None) -> dict[str, Path]:
    """The file of every split. In a local folder it may lie deeper, or all three flat. Raises DataError."""
    files = {split: folder / name for split, name in ANNOTATIONS.items()}
    if source:
        for split, name in ANNOTATIONS.items():
            found = sorted(source.rglob(name)) or sorted(source.rglob(PurePosixPath(name).name))
            if len(found) != 1:
                raise DataError(f"--annotations {source}: {len(found)} files {name}; want exactly one")
            files[split] = found[0]
        return files
    missing = [split for split, file in files.items() if not file.is_file()]
    options = {"quiet": True, "use_cookies": False, "timeout": TIMEOUT_S, "resume": True, "retries": 3}
    try:
        listing = gdown.download_folder(id=DRIVE_FOLDER, skip_download=True, **options) if missing else []
        ids = {entry.path: entry.id for entry in listing}
        for split in Bar(missing, "annotations"):
            files[split].parent.mkdir(parents=True, exist_ok=True)
            gdown.download(id=ids[ANNOTATIONS[split]], output=str(files[split]), **options)
    except (gdown.exceptions.DownloadError, requests.RequestException, KeyError) as error:  # KeyError: not listed
        raise DataError(f"Google Drive folder {DRIVE_FOLDER}: {error!r:.200}; {AGAIN}annotations") from error
    return files


def image_name(line: str) -> str:
    """The base name of the image that an annotation describes; empty if the line is no annotation."""
    try:
        return PurePosixPath(json.loads(line)["filename"]).name
    except (ValueError, KeyError, TypeError):
        return ""


def adapt_line(line: str, root: Path, places: dict[str, Path], report: dict[str, int]) -> str:
    """An annotation in the pixels of the image that was found, without what a machine left in it.

    Empty where there is no caption, as in the published runs. Regions without a phrase or an area are left out. An
    image of another size but the same shape is the same print. Whatever else is odd is reported when it is read again.
    """
    name = image_name(line)
    if not name:
        return line
    entry = json.loads(line) | {"filename": str(places[name])}
    with contextlib.suppress(Exception):  # whatever an annotation or an image holds
        stated, grounding = (entry["width"], entry["height"]), entry["grounding"]
        if not (grounding["caption"] or "").strip():
            report["captionless_prints"] += 1
            return ""
        with Image.open(root / places[name]) as image:
            width, height = odvg.upright_size(image)
        same_shape = abs(width / height * stated[1] / stated[0] - 1) <= SHAPE_SLACK
        found = (width, height) if same_shape else stated
        boxes = [{**region, "bbox": box} for region in grounding["regions"] for box in odvg.boxes_of(region)]
        regions = [fit_region(region, stated, found) for region in boxes]
        grounding["regions"] = [region for region in regions if region]
        entry["width"], entry["height"] = found
        report["other_sizes"] += found != stated
        report["regions_left_out"] += regions.count(None)
    return json.dumps(entry)


def fit_region(region: dict, stated: tuple[int, int], found: tuple[int, int]) -> dict | None:
    """A region with its box scaled and cut to the image, None without a phrase or an area; corners in any order."""
    box = [value * found[i % 2] / stated[i % 2] for i, value in enumerate(region["bbox"])]
    x0, x1 = sorted(min(max(x, 0), found[0]) for x in box[0::2])
    y0, y1 = sorted(min(max(y, 0), found[1]) for y in box[1::2])
    sound = region["phrase"].strip() and x1 - x0 >= MIN_SIDE and y1 - y0 >= MIN_SIDE
    return {**region, "bbox": [x0, y0, x1, y1]} if sound else None


def fetch_images(needed: set[str], folder: Path, source: Path | None) -> tuple[Path, dict[str, Path]]:
    """A folder, and the path in it of every image by its name. Raises DataError that names every missing one."""
    if source and source.is_dir():
        paths = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
        return source, choose(needed, ((path.name, path) for path in paths), f"folder {source}")
    target, where = folder / "images", f"archive {source or ARCHIVE}"
    target.mkdir(exist_ok=True)
    remote = None if source else RemoteArchive(folder)
    try:
        archive = remote.open() if remote else zipfile.ZipFile(source)
    except zipfile.BadZipFile as error:
        raise DataError(f"{where}: {error!r:.200}; give the archive, or a folder of images, with --images") from error
    with archive:
        members = choose(needed, ((PurePosixPath(info.filename).name, info) for info in archive.infolist()), where)
        for _ in range(2):  # a damaged member is fetched once again
            wanted = [info for name, info in members.items() if not in_place(target / name, info)]
            for start, end, inside in Bar(plan_ranges(archive, wanted), "images, as the server allows", unit=" ranges"):
                if remote:
                    remote.copy(start, end)
                for info in inside:
                    with contextlib.suppress(zipfile.BadZipFile, zlib.error, EOFError):  # as the checksum is wrong
                        write_whole(target / PurePosixPath(info.filename).name, archive.read(info))
    damaged = [name for name, info in members.items() if not in_place(target / name, info)]
    if damaged:
        names = ", ".join(damaged)
        raise DataError(f"{len(damaged)} images in {where} do not have their checksum, twice: {names}; {AGAIN}images")
    return target, {name: Path(name) for name in members}


def choose(needed: set[str], found: Iterable[tuple[str, object]], where: str) -> dict[str, object]:
    """What was found under every needed name. Raises DataError that names all that are missing or ambiguous."""
    by_name = defaultdict(list)
    for name, thing in found:
        by_name[name].append(thing)
    missing, twice = needed - by_name.keys(), {name for name in needed if len(by_name[name]) > 1}
    if missing or twice:
        names, fault = (missing, "not in") if missing else (twice, "more than once in")
        counted = f"{len(names)} of {len(needed)} images are {fault} {where}: {', '.join(sorted(names))}"
        raise DataError(f"{counted}; give a complete archive or folder with --images")
    return {name: by_name[name][0] for name in sorted(needed)}


def in_place(path: Path, info: zipfile.ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.file_size and zlib.crc32(path.read_bytes()) == info.CRC


def write_whole(path: Path, content: bytes) -> None:
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)


class RemoteArchive:
    """The archive on Zenodo, copied range by range into a sparse file. A busy server gets the pauses it asks for."""

    def __init__(self, folder: Path) -> None:
        self.session = requests.Session()
        self.session.headers.update({"User-Agent": "autoresearch-data (some members)", "Accept-Encoding": "identity"})
        retry = Retry(total=TRIES, connect=0, read=0, backoff_factor=PAUSE_S, status_forcelist=(429, 502, 503, 504))
        self.session.get_adapter(RECORD).max_retries = retry
        try:
            answer = self.session.get(RECORD, timeout=TIMEOUT_S)
            answer.raise_for_status()
            entry = next(entry for entry in answer.json()["files"] if entry["key"] == ARCHIVE)
            self.url, self.size, stamp = entry["links"]["self"], entry["size"], entry.get("checksum", "unstamped")
        except (requests.RequestException, ValueError, KeyError, StopIteration) as error:
            raise DataError(f"{RECORD} does not tell about {ARCHIVE}: {error!r:.200}; {AGAIN}images") from error
        self.file = folder / f"{stamp.replace(':', '-')}-{self.size}.zip"  # of another version, another file
        self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self.descriptor, self.size)

    def open(self) -> zipfile.ZipFile:
        """The archive as far as it is copied, at least its end with the list of the members. Raises BadZipFile."""
        if not zipfile.is_zipfile(self.file):
            self.copy(max(0, self.size - TAIL), self.size)
        return zipfile.ZipFile(self.file.open("rb", buffering=0))  # unbuffered, as more will be copied

    def copy(self, start: int, end: int) -> None:
        """Copies bytes start to end - 1. A connection that is cut is taken up where it was. Raises DataError."""
        failures = 0
        while start < end:
            wanted = f"bytes {start}-{end - 1}/{self.size}"
            headers = {"Range": f"bytes={start}-{end - 1}"}
            try:
                with self.session.get(self.url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
                    got = answer.headers.get("Content-Range", "")
                    if answer.status_code != 206 or got != wanted:
                        got = f"asked for {wanted}, got {answer.status_code} {answer.reason} {got}"
                        causes = "it has changed, or a proxy sends the whole archive instead of a range"
                        raise DataError(f"{self.url}: {got}: {causes}; {AGAIN}images")
                    for chunk in answer.iter_content(CHUNK):
                        start, failures = start + os.pwrite(self.descriptor, chunk, start), 0
                if start < end:
                    raise requests.ConnectionError("the answer ended early")
            except requests.RequestException as error:
                failures += 1
                if failures == TRIES or isinstance(error, requests.exceptions.RetryError):
                    raise DataError(f"{self.url}: {error!r:.200}; {AGAIN}images") from error
                time.sleep(PAUSE_S * 2 ** (failures - 1))


def plan_ranges(archive: zipfile.ZipFile, wanted: Iterable[zipfile.ZipInfo]) -> list[tuple[int, int, list]]:
    """Byte ranges (start, end, members in it). A member ends where the next one, wanted or not, begins."""
    begins = sorted({info.header_offset for info in archive.infolist()} | {archive.start_dir})
    ranges = []
    for info in sorted(wanted, key=lambda info: info.header_offset):
        start, end, before = info.header_offset, begins[bisect_right(begins, info.header_offset)], []
        if ranges and start - ranges[-1][1] <= GAP and end - ranges[-1][0] <= RANGE:
            start, _, before = ranges.pop()
        ranges.append((start, end, [*before, info]))
    return ranges


def fetch_weights(folder: Path, scratch: Path, source: Path | None) -> None:
    """folder/NAME.safetensors and info.json, which names their origin and SHA-256. What is there and sound, stays."""
    origins = read_origins(folder)
    for name, (repo, file) in WEIGHTS.items():
        target = folder / f"{name}.safetensors"
        if target.is_file() and sha256(target) == origins.get(target.name, {}).get("sha256"):
            continue
        if source:
            path, origin = source / target.name, read_origins(source).get(target.name, {})
            if not path.is_file():
                raise DataError(f"--weights {source}: no {target.name}; want one for each of {', '.join(WEIGHTS)}")
        else:
            path, origin = download_weights(repo, file, scratch)
        digest = sha256(path)
        if origin.setdefault("sha256", digest) != digest:
            if not source:
                path.unlink()
            stated = f"{'info.json there' if source else 'the hub'} states {origin['sha256']}"
            raise DataError(f"weights {path} have SHA-256 {digest}, {stated}; {AGAIN}weights")
        try:
            safetensors.safe_open(path, "numpy").keys()
        except (safetensors.SafetensorError, OSError) as error:
            raise DataError(f"weights {path}: {error!r:.200}; want safetensors") from error
        folder.mkdir(exist_ok=True)
        write_whole(target, path.read_bytes())
        origins[target.name] = origin
        write_whole(folder / "info.json", json.dumps(origins, indent=2).encode() + b"\n")


def download_weights(repo: str, file: str, scratch: Path) -> tuple[Path, dict]:
    """A file from the hub, and its origin with the SHA-256 that the hub states. Raises DataError."""
    # The image switches the hub off. Plain HTTP, because Xet would not take up a download where it was cut.
    huggingface_hub.constants.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_DISABLE_XET = False, True
    hub = {"endpoint": os.environ.get("HF_ENDPOINT"), "token": False}
    url = huggingface_hub.hf_hub_url(repo, file, endpoint=hub["endpoint"])
    try:
        stated = huggingface_hub.get_hf_file_metadata(url, **hub)
        hub |= {"revision": stated.commit_hash, "local_dir": scratch, "tqdm_class": Bar}
        path = Path(huggingface_hub.hf_hub_download(repo, file, **hub))
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise DataError(f"weights {repo}/{file}: {error!r:.200}; {AGAIN}weights") from error
    return path, {"repo": repo, "revision": stated.commit_hash, "file": file, "sha256": stated.etag}


def read_origins(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "info.json").read_text()) if (folder / "info.json").is_file() else {}
