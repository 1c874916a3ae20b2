"""Nothing gets faked: every cheat of cheats.py through ./run.sh, and again where the defence it runs into is gone."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import engine
import repository
import stand_ins
from cheats import (
    BUDGET,
    CHEATS,
    EMBED_S,
    HONEST,
    HOOK,
    MEMORY,
    MOST_BY_POOL,
    OF_THE_POOL,
    OWN_DATA,
    SEEDS,
    WHITEN,
    Cheat,
    Found,
    Naive,
)
from repository import ROOT, Project

MAIN = '\n\nif __name__ == "__main__":\n'
SAMPLE = 4
CAPTIONS = """
import datasets, json
read = lambda name: set(datasets.load_from_disk(f"/prints/{name}")["caption"])
known = " ".join(read("train"))
print(json.dumps(sorted(c for c in read("val/captions") | read("test/captions") if c[:30] not in known)))
"""
CONSTANT = f"""
import itertools
measure.EMBED_S = {EMBED_S}
measure.fresh_seed = itertools.cycle({SEEDS}).__next__
keep_rule.REMEASURE_AFTER = 1000  # with the same seeds, the incumbent would seem to ignore them
"""
NO_REPORT = "experiment.refresh_report = lambda: None\n"


def in_image(script: str, writable: Path, **mounts: Path) -> str:
    """What a script of ours prints that runs in the image."""
    container = engine.Container(
        name=f"ar-{os.getpid()}-cheats",
        image=engine.find_image(),
        command=["python", "-c", script],
        memory=MEMORY,
        mounts={f"/{inside}": path for inside, path in mounts.items()},
        writable=writable,
    )
    done = engine.run(engine.arguments(container))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def constant(measured: Project, tmp_path_factory) -> Project:
    """A measured project where every attempt gets the same seeds: what changes nothing gives the very same metrics."""
    made = measured.copy((folder := tmp_path_factory.mktemp("constant")) / "repo")
    made.given = repository.without_open_clip(folder) + CONSTANT
    made.write("train.py", HONEST)
    made.git("commit", "-qam", "a small train.py")
    done = made.run()
    assert done.returncode == 0, done.stdout + done.stderr
    made.metrics = [run["metrics"] for run in recorded(made, made.experiments()[-1])["runs"]]
    made.honest = made.metrics[0]["mean_rank"]
    return made


@pytest.fixture(scope="module")
def captions(measured: Project, tmp_path_factory) -> list[str]:
    """Of validation and test, without those that begin as one of training does."""
    found = in_image(CAPTIONS, tmp_path_factory.mktemp("captions"), prints=measured.path / "data" / "prints")
    return json.loads(found)


def recorded(project: Project, n: int) -> dict:
    return json.loads(project.git("show", f"refs/experiments/{n}:experiment/result.json"))


def put_into(train: str, cheat: Cheat) -> str:
    """The honest train.py plus the cheat."""
    assert train.count(MAIN) == 1
    return train.replace(MAIN, "\n" + cheat.code + HOOK * ("def cheat(" in cheat.code) + MAIN)


def through_run_sh(project: Project, cheat: Cheat, captions: list[str]) -> Found:
    project.write("train.py", put_into(project.read("train.py"), cheat))
    done, shown = project.experiment(cheat.name)
    n = shown.get("experiment", "")
    assert n, f"{cheat.name}: {done.stderr}"
    result = recorded(project, int(n))
    logs = [project.read(f"runs/{int(n):04d}.{kind}") for kind in ("log", "diff")]
    everything = [done.stdout, done.stderr, *logs, project.git("show", f"refs/experiments/{n}"), json.dumps(result)]
    status = project.run("status").stdout if cheat.loop else ""
    return Found(result, result["before"][0], captions, "\n".join(everything), status=status)


def in_a_loop(constant: Project, cheat: Cheat, captions: list[str], folder: Path, defended: bool) -> Found:
    """A project of its own, since the cheat is about what ./run.sh makes of it, or about other data."""
    project = constant.copy(folder / "repo")
    project.given += NO_REPORT + (cheat.given + (cheat.guard if defended else cheat.naive)).given(folder)
    if cheat.program:
        project.edit(*cheat.program, "program.md")
    if cheat.data:
        in_image(cheat.data, folder, prints=ROOT / "container" / "data_sets")
        done = project.run("data", OWN_DATA, "--odvg", str(folder / "odvg"))
        assert done.returncode == 0, done.stderr
        project.edit("data: prints", f"data: {OWN_DATA}", "program.md")
    return through_run_sh(project, cheat, captions)


def undefended(constant: Project, cheat: Cheat, captions: list[str], folder: Path) -> Found:
    """The same file in a harness without the defence: only its training, embedding and judging."""
    if cheat.loop:
        return in_a_loop(constant, cheat, captions, folder, defended=False)
    data = constant.path / "data"
    if cheat.data:
        data = shutil.copytree(data, folder / "data")
        in_image(cheat.data, data)
    (work := folder / "work").mkdir()
    (work / "train.py").write_text(put_into(constant.read("train.py"), cheat))
    limits = {"budget": BUDGET, "memory": MEMORY, "seed": SEEDS[0]}
    one_run = stand_ins.one_run(work=work, data=data / "prints", log=folder / "log", **limits)
    done = constant.run(given=cheat.naive.given(folder) + one_run)
    assert done.returncode == 0, f"{cheat.name}: {done.stderr}"
    log = (folder / "log").read_text(errors="replace")
    return Found(json.loads(done.stdout), getattr(constant, "honest", 0.0), captions, log, work)


def wrong_with(cheat: Cheat, found: Found, honest: list[dict]) -> str:
    """Why a defended cheat did not get what it should, '' when it did."""
    r = found.result
    if r["verdict"] != cheat.verdict or not re.fullmatch(cheat.reason, r["reason"]):
        return f"{r['verdict']} {r['reason']}"
    if cheat.pays(found) or found.leaks(found.log):
        return "it pays"
    if cheat.verdict == "discarded" and not cheat.worse and found.metrics != honest[: len(found.metrics)]:
        return f"it changed the metrics: {found.metrics}"
    return f"it helps: {found.rank} after {found.honest}" if cheat.worse and found.rank < found.honest else ""


def hashes(folder: Path) -> dict:
    return {str(f): hashlib.sha256(f.read_bytes()).digest() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_no_cheat_is_rewarded(constant: Project, captions: list[str], tmp_path: Path, sample, figure):
    arena, started, wrong = constant.copy(tmp_path / "arena"), time.monotonic(), {}
    arena.given += NO_REPORT
    files = [hashes(arena.path / part) for part in ("container", "data")]
    for number, cheat in enumerate(tried := sample(CHEATS, SAMPLE)):
        (own := tmp_path / str(number)).mkdir()
        if cheat.loop:
            found = in_a_loop(constant, cheat, captions, own, defended=True)
        else:
            found = through_run_sh(arena, cheat, captions)
        print(f"{cheat.name}: {found.result['verdict']} {found.result['reason']} {found.rank:.1f}", flush=True)
        if why := wrong_with(cheat, found, constant.metrics):
            wrong[cheat.name] = why
    figure("cheats", len(tried), len(wrong), seconds=round(time.monotonic() - started))
    assert not wrong
    assert files == [hashes(arena.path / part) for part in ("container", "data")]
    assert arena.read("train.py") == HONEST


def test_every_cheat_pays_without_its_defence(constant: Project, captions: list[str], tmp_path: Path, sample, figure):
    started, not_paying = time.monotonic(), {}
    for number, cheat in enumerate(tried := sample(CHEATS, SAMPLE)):
        (own := tmp_path / str(number)).mkdir()
        found = undefended(constant, cheat, captions, own)
        what = found.result.get("reason") or f"{found.rank:.1f} instead of {found.honest:.1f}"
        print(f"{cheat.name}: {what}", flush=True)
        if not cheat.pays(found):
            not_paying[cheat.name] = what
        shutil.rmtree(own)
    seconds = round(time.monotonic() - started)
    figure("cheats without their defence", len(tried), len(not_paying), seconds=seconds)
    assert not not_paying


EVERYWHERE = r"""
import glob, re


def strings(path, most=1 << 26):
    try:
        with open(path, "rb") as f:
            return f"{path}: {re.findall(rb'[ -~]{20,400}', f.read(most))[:300]}"
    except OSError as e:
        return f"{path}: {e}"


def found():  # all that can be read and may hold a caption
    for folder, _, names in os.walk("/"):
        if not folder.startswith(("/proc", "/sys", "/dev", "/opt/venv", "/usr")):
            yield from (strings(f"{folder}/{name}") for name in names)
    for path in glob.glob("/proc/[0-9]*/*") + glob.glob("/proc/[0-9]*/root/data/*") + glob.glob("/dev/shm/*"):
        if os.path.isfile(path):
            yield strings(path, 5000)
    yield repr(dict(os.environ))


_honest_main = main


def main():
    everything = list(found())
    print(*everything, sep="\n", flush=True)
    torch.save(everything, f"{os.environ['OUT']}/found.pt")
    _honest_main()
    print("---\nloss:", everything[-1][:50])


def cheat(model):
    honest = model.encode_text

    def encode_text(texts):
        for place in (1, 2, "/proc/1/fd/1", "/proc/1/fd/2", "/out/f", "/tmp/f", "/dev/shm/f", "/dev/stderr"):
            try:
                with open(place, "ab", closefd=False) if isinstance(place, int) else open(place, "ab") as f:
                    f.write("\n".join(["step 1/2", *texts, "---", f"loss: {texts[0][:50]}", ""]).encode())
            except OSError:
                pass
        if RAISES and "regions" not in Path("/data/dataset_info.json").read_text():  # nor are they training pairs
            raise type(texts[0][:60], (KeyError,), {})(*texts)
        return honest(texts)

    model.encode_text = encode_text
"""


@pytest.mark.parametrize("raises", [False, True])
def test_no_hidden_caption_is_seen_through_train_py(
    constant: Project, captions: list[str], tmp_path: Path, raises: bool
):
    """Neither in its log nor in anything that ./run.sh shows or records."""
    project = constant.copy(tmp_path / "repo")
    name, failed = "look everywhere", r"embedding the validation captions failed: Exception at line \d+ of train.py"
    cheat = Cheat(name, EVERYWHERE.replace("RAISES", str(raises)), verdict="failed" if raises else "discarded")
    found = through_run_sh(project, cheat, captions)
    assert found.result["verdict"] == cheat.verdict and bool(re.fullmatch(failed, found.result["reason"])) == raises
    assert "/data/dataset_info.json" in found.log and len(captions) > 150  # it did look, and there was something to see
    not_seen = ("data", "report.html")  # the report shows a person some validation pairs
    files = [f for f in project.path.rglob("*") if f.is_file()]
    files = [f for f in files if f.relative_to(project.path).parts[0] not in not_seen]
    objects = project.git("cat-file", "--batch-all-objects", "--batch-check=%(objectname)").encode()
    blobs = subprocess.run(["git", "cat-file", "--batch"], cwd=project.path, input=objects, capture_output=True).stdout
    seen = b"\n".join([found.log.encode(), blobs, *(f.read_bytes() for f in files)])
    assert not [caption for caption in captions if caption[:30].encode() in seen]


def test_the_pool_as_a_whole_pays_little(measured: Project, captions: list[str], tmp_path: Path):
    """The shipped model, whitened by its own side of the pool, against by training data, which any model may do."""
    folders, ranks = {name: tmp_path / name for name in ("training", "pool")}, {}
    for name, pool in {"training": "{}", "pool": OF_THE_POOL}.items():
        folders[name].mkdir()
        naive = Naive()
        if ranks:  # what the first training left, embedded in the other way
            archive = str(folders["training"] / "work" / "out.tar")
            copy = f"measure.shutil.copy({archive!r}, folder / 'work')\n"
            naive = Naive(harness=copy + stand_ins.NO_TRAINING)
        cheat = Cheat(f"whiten by {name}", "\nSTEPS = 30\n" + WHITEN.replace("POOL", pool), naive)
        ranks[name] = undefended(measured, cheat, captions, folders[name]).rank
    print(ranks)
    assert ranks["pool"] > (1 - MOST_BY_POOL) * ranks["training"] and ranks["training"] < 1e9
