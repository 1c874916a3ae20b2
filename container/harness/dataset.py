"""A data set: its folder, whether it is what prepare_data.py wrote, and making one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import engine
import git
import locks
from program import Program
from project import DATA_FORMAT, DATA_NAME, DATA_NAME_HINT, MEASURES, ROOT, RUNS, Refused, read_json, sha256, write_json

VERIFIED = RUNS / "data.json"  # the data files whose content was found to be right
MEMORY = "8g"  # for preparing a data set
PREPARE = ROOT / "prepare_data.py"
ODVG_PARTS = ("train.jsonl", "val.jsonl", "test.jsonl", "images")
FETCHED = {"--annotations", "--images", "--weights"}  # what Ukiyo-eVG is made of, fetched unless all of it is given
PASSED_ON = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "HF_ENDPOINT")
USAGE = "prints | ukiyo-e [--annotations DIR] [--images DIR_OR_ZIP] [--weights DIR] | NAME --odvg DIR"
CA_BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


def verified_hash(name: str) -> str:
    """The hash of a data set, every file of which is what info.json says. Raises Refused.

    Sizes are checked every time, content only where a file is not the very one that was read before: 0.3 ms for the
    8,000 prints, and 0.3 s the first time.
    """
    data, remedy = git.data_folder(name), f"move it away and run ./run.sh data {name} in a terminal"
    if not (data / "info.json").exists():
        raise Refused(f"data/{name}/info.json is missing: run ./run.sh data {name} in a terminal")
    info = read_json(data / "info.json", {})
    try:
        if info["format"] != DATA_FORMAT:
            raise Refused(f"data/{name} was made by another version of prepare_data.py: {remedy}")
        content, files = info["hash"], [(f, int(size), digest) for f, (size, digest) in info["files"].items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"data/{name}/info.json is damaged: {remedy}") from None
    before, now = read_json(VERIFIED, {}), {}
    for f, size, digest in files:
        try:
            s = (data / f).stat()
            now[f] = [digest, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
            if s.st_size != size:
                raise Refused(f"data/{name}/{f} has {s.st_size} bytes instead of {size}: {remedy}")
            if before.get(f) != now[f] and sha256(data / f) != digest:
                raise Refused(f"data/{name}/{f} is not what prepare_data.py wrote: {remedy}")
        except OSError as e:
            raise Refused(f"data/{name}/{f} cannot be read ({e.strerror}): {remedy}") from None
    folders = {data / f.partition("/")[0] for f in now if "/" in f}
    there = {str(file.relative_to(data)) for folder in folders for file in folder.rglob("*") if file.is_file()}
    if strays := there - now.keys():
        raise Refused(f"data/{name}/{min(strays)} is no part of the data set, and train.py would see it: delete it")
    if now != before:
        with contextlib.suppress(OSError):  # a full disk: then they are read again the next time
            write_json(VERIFIED, now)
    return content


def comparable(program: Program, image: str) -> str:
    """A short hash of what makes two results comparable: data, judge, image, budget, device. Raises Refused.

    What a launch command's node has is known when a training starts there, and compared then (measure.py).
    """
    device = "launched" if program.launch else engine.device_kind()
    h = hashlib.sha256(f"{verified_hash(program.data)} {image} {program.budget} {device}".encode())
    for f in MEASURES:
        h.update((ROOT / "container" / f).read_bytes())
    return h.hexdigest()[:12]


def prepare(name: str = "", *options: str) -> int:
    """Draw, fetch or import data/<name> in a container, or --add to it; returns an exit status. Raises Refused."""
    if not re.fullmatch(DATA_NAME, name):
        raise Refused(f"usage: ./run.sh data {USAGE}; NAME is {DATA_NAME_HINT}")
    try:
        with locks.held(git.folder() / f"autoresearch.data-{name}"):
            return prepare_alone(name, options)
    except BlockingIOError:
        raise Refused(f"data/{name} is being prepared by another ./run.sh; wait for it") from None


def prepare_alone(name: str, options: tuple[str, ...]) -> int:
    """Under the lock of this data set."""
    words = [part for word in options for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if git.data_folder(name).exists() and "--add" not in words:
        raise Refused(f"data/{name} exists already; move it away first")
    own = {}  # what a person gives: where it is inside, and here
    for at, option in enumerate(words[:-1], 1):
        if option in {"--odvg", *FETCHED}:
            given = Path(os.environ.get("AR_FROM", ""), Path(words[at]).expanduser())
            if not (given.is_dir() or (option == "--images" and given.is_file())):  # which may be an archive
                raise Refused(f"{option} {given}: no such folder; container/README.md says what belongs in it")
            words[at] = option.replace("--", "/")
            if option == "--odvg":  # part by part, since each may be a link to elsewhere
                own |= {f"/odvg/{part}": given / part for part in ODVG_PARTS if (given / part).exists()}
            else:
                own[words[at]] = given
    mounts = {"/repo/prepare_data.py": PREPARE, "/repo/container": PREPARE.parent / "container", **own}
    environment, network = {"PROGRESS": "1"} if sys.stderr.isatty() else {}, "none"
    environment["MAKE_READABLE"] = shlex.join(["chmod", "-R", "a+rX", *map(str, own.values())])
    if name == "ukiyo-e" and "--add" not in words and not set(words) >= FETCHED:
        network = "host"
        environment.update({key: os.environ[key] for key in PASSED_ON if key in os.environ})
        environment.update({"REQUESTS_CA_BUNDLE": "/ca.pem", "SSL_CERT_FILE": "/ca.pem"})
        mounts["/ca.pem"] = Path(os.environ.get("SSL_CERT_FILE") or certificates())
    command = ["python", "/repo/prepare_data.py", name, *words, "--out", f"/writable/{name}"]
    container = engine.Container(f"ar-{os.getpid()}-data", engine.find_image(), command, MEMORY, mounts)
    container.network, container.environment = network, environment
    container.writable, container.shared_as = git.data_folder(name).parent, f"data-{name}"
    container.writable.mkdir(exist_ok=True)
    engine.sweep(container.shared_as)  # what a killed one left would go on writing
    try:
        return subprocess.run(engine.arguments(container), stdin=subprocess.DEVNULL).returncode
    finally:
        engine.kill(container.name)


def certificates() -> Path:
    """This machine's certificate authorities, which may include the company's own. Raises Refused."""
    for bundle in map(Path, CA_BUNDLES):
        if bundle.exists():
            return bundle
    raise Refused("no certificate bundle found under /etc/ssl; install ca-certificates")
