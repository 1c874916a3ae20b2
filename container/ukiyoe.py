"""Fetches Ukiyo-eVG and the pretrained weights: only what is needed, every file checked, resumed after a failure.

Annotations come from the authors' Google Drive folder (gdown), images from the Zenodo archive of 175,000 prints, of
which about 11,000 are wanted: they are copied by HTTP ranges into a local sparse file of the archive's size, which the
standard library's zipfile then reads, checking every CRC. Weights come from the hub. A local copy of each may be given.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
import zipfile
import zlib
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath

import gdown
import gdown.exceptions
import httpx2
import huggingface_hub
import requests
import safetensors
from PIL import Image
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

DRIVE_FOLDER = "1cLhue-10GYtjybQ5CMPRyFcI_LjgArcE"  # Ukiyo-eVG, to which the authors' selinakhan/vg_art points
ANNOTATIONS = {
    "train": "refined/ukiyoe_vg_train_pgt_odvg.jsonl",
    "val": "refined/ukiyoe_vg_val_pgt_odvg.jsonl",
    "test": "ukiyoe_vg_test_annotated.jsonl",
}
RECORD = "https://zenodo.org/api/records/13120879"
ARCHIVE = "images_ukiyo-e.zip"
# What train.py's models are called: repository and file on the hub. The first is the tag timm takes by itself; the
# second open_clip's laion2b_s34b_b79k: trained on open data, on the hub as safetensors, and with the plain GELU of
# ViT-B-32 (OpenAI's own weights are silently worse in it). Their tables are compared with this one in the tests.
WEIGHTS = {
    "vit_small_patch16_224": ("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "model.safetensors"),
    "ViT-B-32": ("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", "open_clip_model.safetensors"),
}

CONNECTIONS = 4
GAP = 512 << 10  # bytes: a smaller gap is fetched too, as Zenodo answers a guest 60 requests a minute
RANGE = 16 << 20  # bytes asked for at once, at most (unless one member is larger)
TAIL = 1 << 20  # bytes of the archive's end, where its directory is, asked for at first
CHUNK = 64 << 10  # bytes read at once; as much may be lost with a connection
TIMEOUT_S = 60  # without a byte
TRIES = 8  # failures in a row, with none but the first byte in between
PAUSE_S = 1.0  # before the second try; doubles
SHAPE_SLACK = 0.02  # by which the aspect ratio of a print may differ from what the annotation states
MIN_SIDE = 1.0  # pixels of a box; smaller ones are left out
AGAIN = "run the same command again (it goes on where it stopped), or give a local copy with --{}"
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError)


class FetchError(Exception):
    """One line that says what is wrong, where, and what to do next."""


class Bar(tqdm):
    """Shown on a terminal; in a container, which has none, where engine.py says that the caller has one."""

    def __init__(self, *args: object, **options: object) -> None:
        disable = False if "PROGRESS" in os.environ else None
        super().__init__(*args, disable=disable, leave=False, **options)


class Patient(Retry):
    """Waits as long as the server asks for, and says so where that is long."""

    def sleep_for_retry(self, response: object = None) -> bool:
        wait = self.get_retry_after(response) or 0
        if wait > TIMEOUT_S:
            Bar.write(f"the server asks for a pause of {wait:.0f} s", file=sys.stderr)
        return super().sleep_for_retry(response)


def fetch(folder: Path, weights: Path, given: dict[str, Path | None], report: dict) -> Path:
    """Fetches everything into `folder`; afterwards it holds train.jsonl, val.jsonl, test.jsonl in ODVG form.

    Returns the folder to which their file names are relative. `weights` is where the weights go; `given` names local
    copies of annotations, images, weights, or None; `report` gets counts. Raises FetchError.
    """
    folder.mkdir(exist_ok=True)
    files = fetch_annotations(folder / "annotations", given["annotations"])
    lines = {split: [read_line(line) for line in file.read_bytes().splitlines()] for split, file in files.items()}
    needed = {base_name(entry["filename"]) for split in lines for entry in lines[split] if named(entry)}
    fetch_weights(weights, folder / "hub", given["weights"])
    root, places = fetch_images(needed, folder, given["images"])
    report.update(dict.fromkeys(("captionless_prints", "other_sizes", "regions_left_out"), 0))
    for split, entries in lines.items():
        with (folder / f"{split}.jsonl").open("w") as file:
            for entry in Bar(entries, f"{split} sizes"):
                entry = fit(entry, root, places, report) if named(entry) else entry
                file.write("\n" if entry is None else json.dumps(entry) + "\n")
    return root


# Annotations


def fetch_annotations(folder: Path, source: Path | None) -> dict[str, Path]:
    """The file of every split. In a local folder it may lie deeper, or all three flat."""
    if source:
        found = {
            split: sorted(source.rglob(name)) or sorted(source.rglob(base_name(name)))
            for split, name in ANNOTATIONS.items()
        }
        for split, paths in found.items():
            if len(paths) != 1:
                raise FetchError(f"--annotations {source}: {len(paths)} files {ANNOTATIONS[split]}; want exactly one")
        return {split: paths[0] for split, paths in found.items()}
    files = {split: folder / name for split, name in ANNOTATIONS.items()}
    lacking = [split for split, file in files.items() if not file.is_file()]
    options = {"quiet": True, "use_cookies": False, "timeout": TIMEOUT_S}
    try:
        listing = gdown.download_folder(id=DRIVE_FOLDER, skip_download=True, **options) if lacking else []
        ids = {entry.path: entry.id for entry in listing}
        for split in lacking:
            files[split].parent.mkdir(parents=True, exist_ok=True)
            with Bar(desc=f"{split} annotations", unit="B", unit_scale=True) as bar:
                gdown.download(
                    id=ids[ANNOTATIONS[split]],
                    output=str(files[split]),
                    resume=True,
                    retries=3,
                    progress=lambda at, _: bar.update(at - bar.n),
                    **options,
                )
    except (gdown.exceptions.DownloadError, requests.RequestException, KeyError) as error:  # KeyError: not listed
        raise FetchError(
            f"Google Drive folder {DRIVE_FOLDER}: {brief(error)}; {AGAIN.format('annotations')}"
        ) from error
    return files


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"


def base_name(path: object) -> str:
    return PurePosixPath(str(path)).name


def read_line(line: bytes) -> object:
    """A line's value; a line that is not JSON stays as it is, for the reader of ODVG lines names it."""
    try:
        return json.loads(line) if line.strip() else None
    except ValueError:
        return line.decode(errors="replace")


def named(entry: object) -> bool:
    return isinstance(entry, dict) and "filename" in entry


def fit(entry: dict, root: Path, places: dict[str, Path], report: dict) -> dict | None:
    """The line of a print in the pixels of the image that was found, without what a machine left in it.

    None where there is no caption, as in the published runs. Regions without a phrase or an area are left out, boxes
    cut to the image. An image of another size but the same shape is the same print. Whatever else is odd stays, and
    is reported with its line when the lines are read.
    """
    place = root / places[base_name(entry["filename"])]
    entry = {**entry, "filename": str(place.relative_to(root))}
    try:
        stated, caption = (entry["width"], entry["height"]), entry["grounding"]["caption"]
        if caption is None or not caption.strip():
            report["captionless_prints"] += 1
            return None
        regions = [tidy(region, stated) for region in entry["grounding"]["regions"]]
        entry["grounding"] = {**entry["grounding"], "regions": [region for region in regions if region]}
        report["regions_left_out"] += regions.count(None)
        with Image.open(place) as image:
            found = image.size
        if found != stated and abs(found[0] / found[1] * stated[1] / stated[0] - 1) <= SHAPE_SLACK:
            report["other_sizes"] += 1
            scale = [found[0] / stated[0], found[1] / stated[1]] * 2
            for region in entry["grounding"]["regions"]:
                region["bbox"] = [value * factor for value, factor in zip(region["bbox"], scale, strict=True)]
            entry["width"], entry["height"] = found
    except (AttributeError, KeyError, OSError, TypeError, ValueError, ZeroDivisionError, Image.DecompressionBombError):
        pass
    return entry


def tidy(region: dict, size: tuple[int, int]) -> dict | None:
    """A region with its box cut to the image, None without a phrase or an area; corners may be in any order."""
    xs, ys = sorted(region["bbox"][0::2]), sorted(region["bbox"][1::2])
    x0, x1 = (min(max(x, 0), size[0]) for x in xs)
    y0, y1 = (min(max(y, 0), size[1]) for y in ys)
    if not region["phrase"].strip() or not (x1 - x0 >= MIN_SIDE and y1 - y0 >= MIN_SIDE):
        return None
    return {**region, "bbox": [x0, y0, x1, y1]}


# Images


def fetch_images(needed: set[str], folder: Path, source: Path | None) -> tuple[Path, dict[str, Path]]:
    """A folder, and the path in it of every image by its name. Raises FetchError that names every missing one."""
    if source and source.is_dir():
        paths = (path for path in source.rglob("*") if path.is_file())
        return source, pick(needed, ((path.relative_to(source),) * 2 for path in paths), f"folder {source}")
    target = folder / "images"
    target.mkdir(exist_ok=True)
    remote = None if source else Remote(folder)
    try:
        archive = zipfile.ZipFile(source) if source else remote.directory()
    except zipfile.BadZipFile as error:
        raise FetchError(f"--images {source}: {brief(error)}; give the archive, or a folder of images") from error
    with archive:
        members = pick(needed, ((info.filename, info) for info in archive.infolist()), f"archive {source or ARCHIVE}")
        wanted = [info for name, info in Bar(members.items(), "images in place") if not in_place(target / name, info)]
        for _ in range(2):  # a damaged member is fetched once again
            batches = remote.copy_members(archive, wanted) if remote else [Bar(wanted, "images")]
            wanted = [info for batch in batches for info in batch if not extract(archive, info, target)]
    if wanted:
        names = ", ".join(sorted(base_name(info.filename) for info in wanted))
        raise FetchError(
            f"{len(wanted)} images in archive {source or ARCHIVE} do not have their checksum, twice: "
            f"{names}; {AGAIN.format('images')}"
        )
    return target, {name: Path(name) for name in members}


def pick(needed: set[str], found: Iterable[tuple[object, object]], where: str) -> dict[str, object]:
    """What was found under every needed base name. Raises FetchError that names all that are missing or ambiguous."""
    by_name = defaultdict(list)
    for path, thing in found:
        by_name[base_name(path)].append(thing)
    missing, twice = sorted(needed - set(by_name)), sorted(name for name in by_name if len(by_name[name]) > 1)
    if missing or twice:
        raise FetchError(
            "; ".join(
                f"{len(names)} of {len(needed)} images are {what} {where}: {', '.join(names)}"
                for what, names in (("not in", missing), ("more than once in", twice))
                if names
            )
            + "; give a complete archive or folder with --images"
        )
    return {name: by_name[name][0] for name in sorted(needed)}


def in_place(path: Path, info: zipfile.ZipInfo) -> bool:
    return path.is_file() and path.stat().st_size == info.file_size and zlib.crc32(path.read_bytes()) == info.CRC


def extract(archive: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> bool:
    """Whether the member is sound; then it is in the folder."""
    path = target / base_name(info.filename)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(archive.read(info))  # zipfile checks the CRC
    except DAMAGED:
        return False
    part.replace(path)
    return True


class Remote:
    """The archive on Zenodo, of which ranges are copied into a local sparse file of its size."""

    def __init__(self, folder: Path) -> None:
        self.session = requests.Session()
        self.session.headers.update({"User-Agent": "autoresearch-data (some members)", "Accept-Encoding": "identity"})
        retry = Patient(total=TRIES, connect=0, read=0, backoff_factor=PAUSE_S, status_forcelist=(429, 502, 503, 504))
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS, max_retries=retry))
        try:
            answer = self.session.get(RECORD, timeout=TIMEOUT_S)
            answer.raise_for_status()
            entry = next(entry for entry in answer.json()["files"] if entry["key"] == ARCHIVE)
            self.url, self.size, stamp = entry["links"]["self"], entry["size"], entry.get("checksum", "unstamped")
        except (requests.RequestException, ValueError, KeyError, StopIteration) as error:
            raise FetchError(
                f"{RECORD} does not tell about {ARCHIVE}: {brief(error)}; {AGAIN.format('images')}"
            ) from error
        self.file = folder / f"{stamp.replace(':', '-')}-{self.size}.zip"  # of another version, another file
        self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(self.descriptor, self.size)

    def directory(self) -> zipfile.ZipFile:
        """The list of members: more and more of the archive's end is copied until zipfile finds all of the list."""
        here = 0
        while True:
            try:  # unbuffered, as what is not copied yet must not be kept
                return zipfile.ZipFile(self.file.open("rb", buffering=0))
            except zipfile.BadZipFile as error:
                if here == self.size:
                    raise FetchError(f"{self.url}: {brief(error)}; {AGAIN.format('images')}") from error
            end, here = self.size - here, min(self.size, max(2 * here, TAIL))
            with Bar(desc="list of images", total=end - self.size + here, unit="B", unit_scale=True) as bar:
                self.copy(self.size - here, end, bar)

    def copy_members(self, archive: zipfile.ZipFile, wanted: list[zipfile.ZipInfo]) -> Iterator[list[zipfile.ZipInfo]]:
        """Copies the ranges of these members, a few at once, and yields the members of each as it is complete."""
        ranges = plan(archive, wanted)
        total = sum(end - start for start, end, _ in ranges)
        with Bar(desc="images", total=total, unit="B", unit_scale=True) as bar:
            pool = ThreadPoolExecutor(CONNECTIONS)
            try:
                done = {pool.submit(self.copy, start, end, bar): members for start, end, members in ranges}
                for future in as_completed(done):
                    future.result()
                    yield done[future]
            finally:
                pool.shutdown(cancel_futures=True)

    def copy(self, start: int, end: int, bar: Bar) -> None:
        """Copies bytes start to end. A connection that is cut is taken up where it was. Raises FetchError."""
        failures = 0
        while start < end:
            before = start
            try:
                with self.session.get(
                    self.url, headers={"Range": f"bytes={start}-{end - 1}"}, stream=True, timeout=TIMEOUT_S
                ) as answer:
                    self.check(answer, f"bytes {start}-{end - 1}/")
                    for chunk in answer.iter_content(CHUNK):
                        start += os.pwrite(self.descriptor, chunk, start)
                        bar.update(len(chunk))
                if start == before:
                    raise requests.ConnectionError("empty answer")
            except requests.RequestException as error:
                failures = 1 if start > before else failures + 1
                if failures == TRIES or isinstance(error, requests.exceptions.RetryError):
                    raise FetchError(f"{self.url}: {brief(error)}; {AGAIN.format('images')}") from error
                time.sleep(PAUSE_S * 2 ** (failures - 1))

    def check(self, answer: requests.Response, want: str) -> None:
        """Raises FetchError, the body unread, unless this is the range asked for of an archive of the right size."""
        found, stated = answer.headers.get("Content-Range", ""), f"{want}{self.size}"
        if answer.status_code != 206 or found != stated:
            fault = {
                200: "sends the whole archive instead of a range; is there a proxy in between?",
                206: f"has changed: asked for {stated}, it sends {found}",
                416: f"has changed: asked for {stated}, it has {found}",
            }
            told = fault.get(answer.status_code, f"answers {answer.status_code} {answer.reason}")
            raise FetchError(f"{self.url} {told}; {AGAIN.format('images')}")


def plan(archive: zipfile.ZipFile, wanted: list[zipfile.ZipInfo]) -> list[tuple[int, int, list[zipfile.ZipInfo]]]:
    """Byte ranges (start, end, members in it). A member ends where the next one, wanted or not, begins."""
    begins = sorted({info.header_offset for info in archive.infolist()} | {archive.start_dir})
    ranges = []
    for info in sorted(wanted, key=lambda info: info.header_offset):
        start, end = info.header_offset, begins[bisect_right(begins, info.header_offset)]
        if ranges and start - ranges[-1][1] <= GAP and end - ranges[-1][0] <= RANGE:
            start, _, members = ranges.pop()
            ranges.append((start, end, [*members, info]))
        else:
            ranges.append((start, end, [info]))
    return ranges


# Weights


def fetch_weights(folder: Path, scratch: Path, source: Path | None) -> None:
    """folder/NAME.safetensors and info.json, which names their origin and SHA-256. What is there and sound, stays."""
    info = read_json(folder / "info.json")
    for name, (repo, file) in WEIGHTS.items():
        target = folder / f"{name}.safetensors"
        if target.is_file() and sha256(target) == info.get(target.name, {}).get("sha256"):
            continue
        path, origin = local_weights(source, target.name) if source else hub_weights(repo, file, scratch / name)
        try:
            with safetensors.safe_open(path, "numpy") as tensors:
                tensors.keys()
        except (safetensors.SafetensorError, OSError) as error:
            raise FetchError(f"weights {path}: {brief(error)}; want safetensors") from error
        folder.mkdir(exist_ok=True)
        part = target.with_name(target.name + ".part")
        shutil.copyfile(path, part)
        part.replace(target)
        info[target.name] = origin
        part.write_text(json.dumps(info, indent=2) + "\n")
        part.replace(folder / "info.json")


def hub_weights(repo: str, file: str, scratch: Path) -> tuple[Path, dict]:
    """A file from the hub with its origin, checked against the SHA-256 that the hub states. Raises FetchError."""
    # The image switches the hub off. Plain HTTP, because Xet would not take up a download where it was cut.
    huggingface_hub.constants.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_DISABLE_XET = False, True
    hub = {"endpoint": os.environ.get("HF_ENDPOINT"), "token": False}
    url = huggingface_hub.hf_hub_url(repo, file, endpoint=hub["endpoint"])
    try:
        stated = huggingface_hub.get_hf_file_metadata(url, **hub)
        path = Path(
            huggingface_hub.hf_hub_download(
                repo, file, revision=stated.commit_hash, local_dir=scratch, tqdm_class=Bar, **hub
            )
        )
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise FetchError(f"weights {repo}/{file}: {brief(error)}; {AGAIN.format('weights')}") from error
    digest = sha256(path)
    if digest != stated.etag:
        path.unlink()
        raise FetchError(
            f"weights {repo}/{file} have SHA-256 {digest}, the hub states {stated.etag}; {AGAIN.format('weights')}"
        )
    return path, {"repo": repo, "revision": stated.commit_hash, "file": file, "sha256": digest}


def local_weights(source: Path, name: str) -> tuple[Path, dict]:
    """A file of a local folder with its origin, as far as an info.json beside it tells. Raises FetchError."""
    path, origin = source / name, read_json(source / "info.json").get(name, {})
    if not path.is_file():
        raise FetchError(f"--weights {source}: no {name}; want {' and '.join(f'{n}.safetensors' for n in WEIGHTS)}")
    digest = sha256(path)
    if origin.get("sha256", digest) != digest:
        raise FetchError(f"--weights {source}: {name} has SHA-256 {digest}, info.json there states {origin['sha256']}")
    return path, {**dict.fromkeys(("repo", "revision", "file")), **origin, "sha256": digest}


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
