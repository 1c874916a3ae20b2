"""The host's side of data sets: names, where they lie, what a preparation is given, and who may prepare. No engine."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import dataset
import engine
import measure
import project
from in_process import KEPT, Small
from repository import ROOT

# The container that would be started, as a line; it makes the data set as far as `data` must see it.
SHOW = """
import types
def start(container):
    given = {inside: str(outside.resolve()) for inside, outside in container.mounts.items() if "/repo" not in inside}
    print([container.command[2:], given, str(container.writable), getattr(container, "shared_as", "")])
engine.arguments, engine.kill = start, lambda name: None
dataset.subprocess = types.SimpleNamespace(run=lambda *_, **__: types.SimpleNamespace(returncode=0), DEVNULL=None)
"""
GOOD_NAMES = ["mine", "Flickr30k", "coco_2017", "a.b-c", "weights2", "partial", "x" * 41]
BAD_NAMES = ["weights", "Weights", "mine.partial", "mine.download", "../mine", ".mine", "a/b", "a b", "", "é", "x" * 42]


def started(project: Small, *words: str, env: dict | None = None) -> list:
    done = project.run("data", *words, given=SHOW, env=env)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def refused(project: Small, message: str, *words: str, given: str = SHOW) -> None:
    done = project.run("data", *words, given=given)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done


def guard_of(project: Small):
    """Its guard, as a function of a path to read that says whether it may be read."""
    for file in (".claude/hooks/guard.py", *(str(f.relative_to(ROOT)) for f in (ROOT / "container/harness").glob("*"))):
        if (ROOT / file).is_file():
            (project.path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, project.path / file)

    def may_read(path: str) -> bool:
        call = {"tool_name": "Read", "tool_input": {"file_path": path}, "cwd": str(project.path)}
        command = ["python3", "-I", "-S", "-B", str(project.path / ".claude/hooks/guard.py")]
        done = subprocess.run(command, input=json.dumps(call), capture_output=True, text=True, cwd=project.path)
        return json.loads(done.stdout)["hookSpecificOutput"]["permissionDecision"] == "allow"

    return may_read


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_refused_is_refused_everywhere(small: Small, name: str):
    refused(small, "NAME is up to 41 letters, digits", name, "--odvg", str(small.path))
    small.edit("data: prints", f"data: {name}", "program.md")
    done = small.run()
    assert done.returncode == 2 and "program.md line 4: data: " in done.stderr, done.stderr
    (small.path / "data" / name).mkdir(parents=True, exist_ok=True)
    (small.path / "data" / name / "preview.png").write_bytes(b"?")
    assert not guard_of(small)(f"data/{name}/preview.png")


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_name_that_is_taken_is_taken_everywhere(small: Small, name: str):
    assert started(small, name, "--odvg", str(small.path))[0][0] == name
    small.edit("data: prints", f"data: {name}", "program.md")
    assert f"data/{name}/info.json is missing" in small.run().stderr
    (small.path / "data" / name).mkdir()
    (small.path / "data" / name / "preview.png").write_bytes(b"?")
    assert guard_of(small)(f"data/{name}/preview.png")


# What a preparation is given


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder of one's own, its images and a list elsewhere."""
    folder = tmp_path / "my data: 1=2"
    (tmp_path / "elsewhere").mkdir()
    folder.mkdir()
    for name in ("train.jsonl", "val.jsonl"):
        (folder / name).write_text("{}\n")
    (tmp_path / "elsewhere" / "list").write_text("{}\n")
    (folder / "images").symlink_to("../elsewhere")
    (folder / "test.jsonl").symlink_to("../elsewhere/list")
    return folder


@pytest.mark.parametrize("way", ["absolute", "equals", "relative", "relative, equals", "here", "home"])
def test_a_folder_is_found_however_it_is_written(small: Small, own: Path, way: str):
    words, env = ["--odvg", str(own)], {"AR_FROM": str(own.parent), "HOME": str(own.parent)}
    if way == "here":
        words, env["AR_FROM"] = ["--odvg", "."], str(own)
    elif way == "home":
        words = [f"--odvg=~/{own.name}"]
    else:
        path = own.name if "relative" in way else str(own)
        words = [f"--odvg={path}"] if "equals" in way else ["--odvg", path]
    command, given, _, _ = started(small, "mine", *words, "--size=32", env=env)
    assert command == ["mine", "--odvg", "/odvg", "--size", "32", "--out", "/writable/mine"]
    assert given == {
        "/odvg/train.jsonl": f"{own}/train.jsonl",
        "/odvg/val.jsonl": f"{own}/val.jsonl",
        "/odvg/test.jsonl": f"{own.parent}/elsewhere/list",
        "/odvg/images": f"{own.parent}/elsewhere",
    }


def test_the_container_can_say_how_to_make_a_persons_files_readable(small: Small, own: Path):
    show = f"{SHOW}\nengine.arguments = lambda container: print(repr(container.environment))"
    own.joinpath("val.jsonl").unlink()
    done = small.run("data", "mine", "--odvg", ".", given=show, env={"AR_FROM": str(own)})
    paths = [f"'{own}/{part}'" for part in ("train.jsonl", "test.jsonl", "images")]  # not whatever else lies there
    assert ast.literal_eval(done.stdout) == {"MAKE_READABLE": f"chmod -R a+rX {' '.join(paths)}"}, done.stderr
    local = [word for what in ("annotations", "images", "weights") for word in (f"--{what}", str(own.parent))]
    done = small.run("data", "ukiyo-e", *local, given=show)
    assert ast.literal_eval(done.stdout)["MAKE_READABLE"].endswith(" ".join(["a+rX", *[str(own.parent)] * 3]))


def test_run_sh_says_where_its_caller_stands(small: Small, tmp_path: Path):
    (tmp_path / "repo with blanks").mkdir()
    root = tmp_path / "repo with blanks"
    shutil.copy(ROOT / "run.sh", root)
    (root / "container/harness").mkdir(parents=True)
    (root / "container/harness/__main__.py").write_text("import os; print(os.environ['AR_FROM'], os.getcwd())")
    (tmp_path / "link").symlink_to(root)
    for command in ("../link/run.sh", str(root / "run.sh")):
        (tmp_path / "own data").mkdir(exist_ok=True)
        done = subprocess.run([command], cwd=tmp_path / "own data", capture_output=True, text=True)
        assert done.stdout == f"{tmp_path}/own data {root}\n", done.stderr


def test_a_folder_that_is_not_there_is_named(small: Small):
    refused(small, "--odvg /nowhere: no such folder; container/README.md", "mine", "--odvg=/nowhere")


# Who may prepare


def test_two_preparations_of_one_data_set_exclude_each_other(small: Small, tmp_path: Path):
    meanwhile = """
def start(container):
    for name in ("mine", "yours"):
        try:
            dataset.prepare_alone = lambda name, words: print(name, "is free") or 0
            dataset.prepare(name)
        except dataset.Refused as error:
            print(error)
engine.arguments = start
"""
    done = small.run("data", "mine", "--odvg", str(tmp_path), given=SHOW + meanwhile)
    refusal = "data/mine is being prepared by another ./run.sh; wait for it"
    assert done.stdout.splitlines() == [refusal, "yours is free"], done.stderr
    other = small.worktree(tmp_path / "two", "two")
    lock = "lock = locks.held(git.folder() / 'autoresearch.data-mine'); lock.__enter__()"
    refused(other, refusal, "mine", "--odvg", str(tmp_path), given=SHOW + lock)


def test_a_preparation_has_a_label_of_its_own(small: Small):
    assert started(small, "prints2", "--odvg", str(small.path))[3] == "data-prints2"
    labels = [engine.label(name) for name in ("", "background", "data-prints", "data-mine")]
    assert len(set(labels)) == 4


# Where data sets lie


def plain(small: Small, tmp_path: Path) -> Small:
    return small


def submodule(small: Small, tmp_path: Path) -> Small:
    (tmp_path / "super").mkdir()
    outer = Small(tmp_path / "super")
    outer.git("init", "-q")
    outer.git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(small.path), "eclip")
    return Small(tmp_path / "super/eclip")


def separate(small: Small, tmp_path: Path) -> Small:
    (tmp_path / "gits").mkdir()
    subprocess.run(["git", "clone", "-q", "--separate-git-dir", tmp_path / "gits/.git", small.path, tmp_path / "sep"])
    return Small(tmp_path / "sep")


def bare(small: Small, tmp_path: Path) -> Small:
    subprocess.run(["git", "clone", "-q", "--bare", small.path, tmp_path / "server/eclip.git"], check=True)
    Small(tmp_path / "server/eclip.git").git("worktree", "add", "-q", str(tmp_path / "work"))
    return Small(tmp_path / "work")


def linked(small: Small, tmp_path: Path) -> Small:
    (small.path / ".git").rename(tmp_path / "elsewhere.git")
    (small.path / ".git").symlink_to(tmp_path / "elsewhere.git")
    return small


@pytest.mark.parametrize("kind", [plain, submodule, separate, bare, linked])
def test_data_lie_in_the_first_worktree_and_all_share_them(small: Small, tmp_path: Path, kind):
    project = kind(small, tmp_path)
    shutil.rmtree(project.path / "data", ignore_errors=True)
    place = str(project.path / "data")
    assert started(project, "prints")[2] == place
    other = project.worktree(tmp_path / "other tree", "other")
    assert started(other, "mine", "--odvg", str(tmp_path))[2] == place
    assert not list(git_folder(project).glob("**/data"))


def test_git_does_not_remove_the_worktree_that_holds_the_data(small: Small, tmp_path: Path):
    """Beside a bare repository any can be removed: git would take all that it ignores along."""
    project = bare(small, tmp_path)
    project.make_data("prints")
    assert project.python("print(git.data_folder('prints'))") == str(project.path / "data/prints")
    other = project.worktree(tmp_path / "other", "other")
    other.python("git.main_worktree()")
    remove = ["git", "worktree", "remove", "--force"]
    refused = subprocess.run([*remove, project.path], cwd=git_folder(other), capture_output=True, text=True)
    assert refused.returncode and "data/ of all worktrees would be lost" in refused.stderr, refused
    assert (project.path / "data/prints/info.json").exists()
    subprocess.run([*remove, other.path], cwd=git_folder(other), check=True)  # which holds none
    project.git("worktree", "unlock", str(project.path))
    subprocess.run([*remove, project.path], cwd=git_folder(project), check=True)


def git_folder(project: Small) -> Path:
    return Path(project.git("rev-parse", "--path-format=absolute", "--git-common-dir"))


@pytest.mark.parametrize("kind", [plain, submodule, bare])
def test_another_worktree_sees_the_preview(small: Small, tmp_path: Path, kind):
    project = kind(small, tmp_path)
    started(project, "mine", "--odvg", str(tmp_path))
    project.make_data("prints")
    picture, secret = project.path / "data/prints/preview.png", project.path / "data/prints/val.key.npy"
    other = project.worktree(tmp_path / "other", "other")
    may_read = guard_of(other)
    assert not may_read("data/prints/preview.png")  # there is none yet
    for content in (b"first", b"second"):
        picture.write_bytes(content)
        for path in ("data/prints/preview.png", f"{other.path}/data/prints/preview.png"):
            assert may_read(path) and (other.path / "data/prints/preview.png").read_bytes() == content
    assert (
        not may_read("data/prints/val.key.npy")
        and not may_read(str(picture))
        and not may_read("data/nowhere/preview.png")
    )
    picture.unlink()
    picture.symlink_to(secret)
    (other.path / "data/prints/preview.png").unlink()
    assert not may_read("data/prints/preview.png")
    assert [f.name for f in (other.path / "data").rglob("*") if f.is_file()] == [] and os.listdir(other.path / "data")


def test_a_preview_on_another_disk(small: Small, tmp_path: Path):
    """`data` may be a link, which a person made; what it shows may be none."""
    small.make_data("prints")
    small.write("data/prints/preview.png", "a picture")
    (small.path / "data").rename(tmp_path / "disk")
    (small.path / "data").symlink_to(tmp_path / "disk")
    may_read = guard_of(small)
    assert may_read("data/prints/preview.png") and not may_read("data/prints/val.key.npy")
    (tmp_path / "disk/prints/preview.png").unlink()
    (tmp_path / "disk/prints/preview.png").symlink_to(tmp_path / "disk/prints/val.key.npy")
    assert not may_read("data/prints/preview.png")


def test_published_weights_are_no_data_set(tmp_path: Path):
    """One was called that before the name was taken: its key is not shown to train.py."""
    (weights := tmp_path / "weights").mkdir()
    job = measure.Job(tmp_path, tmp_path / "prints", 5, "1g", 1, tmp_path / "log", "image")
    assert measure.train_mounts(job)["/weights"] == weights
    (weights / "val.key.npy").touch()
    assert "/weights" not in measure.train_mounts(job)


# Data that were changed


def test_other_data_are_not_compared(small: Small):
    info = small.path / "data/prints/info.json"
    text, kind = info.read_text(), "print(experiment.make_plan(False)[1][0].kind)"
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    assert small.python(kind) == "candidate"
    info.write_text(text.replace(json.loads(text)["hash"], "0" * 64, 1))
    assert small.python(kind) == "baseline"
    info.write_text(text)
    assert small.python(kind) == "candidate"
    for name in ("inside/judge.py", "inside/stage.py", "image/seccomp.json"):
        (file := small.path / "container" / name).write_text(file.read_text() + "\n")
        assert small.python(kind) == "baseline", name
        file.write_text(file.read_text()[:-1])
    assert small.python(f"engine.find_image = lambda: 'another'\n{kind}") == "baseline"
    assert small.python(kind) == "candidate"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def flip_in_the_dark(file: Path) -> None:
    was = file.stat()
    flip(file)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def in_info(key: str, value: object = None):
    def change(file: Path) -> None:
        info = {**json.loads(file.read_text()), key: value}
        file.write_text(json.dumps({k: v for k, v in info.items() if v is not None}))

    return change


ARROW = "train/data-00000-of-00001.arrow"
DAMAGE = [
    ("info.json", cut, "is damaged: move it away and run ./run.sh data prints in a terminal"),
    ("info.json", in_info("hash"), "is damaged: move it away"),
    ("info.json", in_info("files"), "is damaged: move it away"),
    ("info.json", in_info("files", {"train": 7}), "is damaged: move it away"),
    ("info.json", in_info("format", 1), "data/prints was made by another version of prepare_data.py: move it away"),
    ("info.json", Path.unlink, "data/prints/info.json is missing: run ./run.sh data prints in a terminal"),
    (ARROW, flip, "is not what prepare_data.py wrote: move it away and run ./run.sh data prints in a terminal"),
    (ARROW, flip_in_the_dark, "is not what prepare_data.py wrote"),
    (ARROW, cut, "bytes instead of"),
    ("val/captions", shutil.rmtree, "cannot be read (No such file or directory): move it away"),
    ("val/captions/cache-1.arrow", lambda file: file.write_text("x"), "is no part of the data set, and train.py would"),
    ("val.key.npy", flip, "is not what prepare_data.py wrote"),
    ("val.key.npy", lambda file: shutil.copy(file.with_name("test.key.npy"), file), "bytes instead of"),
]


def test_damaged_data_are_named(small: Small, monkeypatch):
    data, kept = small.path / "data/prints", small.path / "data/kept"
    monkeypatch.setattr(dataset.git, "data_folder", lambda name: small.path / "data" / name)
    monkeypatch.setattr(dataset, "VERIFIED", small.path / "runs/data.json")
    shutil.copytree(data, kept)
    content = dataset.verified_hash("prints")
    for name, damage, message in DAMAGE:
        shutil.rmtree(data)
        shutil.copytree(kept, data)
        assert dataset.verified_hash("prints") == content  # a copy is as good, and is remembered
        damage(data / name)
        for _ in range(2):  # what is bad is not remembered as good
            with pytest.raises(project.Refused) as error:
                dataset.verified_hash("prints")
            text = str(error.value)
            assert message in text and f"data/prints/{name}" in text or "version" in text, (name, damage, text)
            assert "\n" not in text
    small.write("train.py", KEPT)
    small.hypothesis("an idea")
    small.refused("data/prints/val.key.npy has 928 bytes instead of 1728: move it away and run ./run.sh data prints")
