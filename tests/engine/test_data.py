"""./run.sh data ukiyo-e, through the real container, from local copies of everything."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import engine
import stand_ins
from repository import ROOT, TINY, Project, copy_of_the_repository

FIXTURE = ROOT / "tests" / "fixtures" / "odvg"
NAMES = {
    "train": "refined/ukiyoe_vg_train_pgt_odvg.jsonl",
    "val": "refined/ukiyoe_vg_val_pgt_odvg.jsonl",
    "test": "ukiyoe_vg_test_annotated.jsonl",
}


def tensors(value: float) -> bytes:
    """A safetensors file with one number in it."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + struct.pack("<f", value)


class Hub(BaseHTTPRequestHandler):
    """Gives the same weights for every name."""

    def log_message(self, *_): ...

    def do_GET(self):
        body = tensors(7)
        self.send_response(200)
        digest = hashlib.sha256(body).hexdigest()
        headers = {"Content-Length": len(body), "ETag": f'"{digest}"', "X-Repo-Commit": "c" * 40}
        for key, value in headers.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET


def test_ukiyo_e_from_local_copies(tmp_path: Path):
    project = copy_of_the_repository(tmp_path / "repo")
    for split, name in NAMES.items():
        (tmp_path / "annotations" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FIXTURE / f"{split}.jsonl", tmp_path / "annotations" / name)
    with zipfile.ZipFile(tmp_path / "prints.zip", "w") as archive:
        for image in (FIXTURE / "images").iterdir():
            archive.write(image, f"images/{image.name}")
    (tmp_path / "weights").mkdir()
    contents = {f"{name}.safetensors": tensors(n) for n, name in enumerate(("vit_small_patch16_224", "ViT-B-32"))}
    for name, content in contents.items():
        (tmp_path / "weights" / name).write_bytes(content)
    given = ["data", "ukiyo-e", "--annotations", f"{tmp_path}/annotations", "--images", f"{tmp_path}/prints.zip"]

    done = project.run(*given, "--weights", str(tmp_path / "nowhere"))
    assert done.returncode == 2 and "nowhere: no such folder" in done.stderr
    done = project.run(*given, "--weights", str(tmp_path / "weights"))
    assert done.returncode == 0, done.stderr
    data = project.path / "data"
    info = json.loads((data / "ukiyo-e" / "info.json").read_text())
    assert info["image_size"] == 224 and (info["val"], info["test"]) == (4, 4)
    assert info["train"] + info["near_duplicates_left_out"] == 12
    assert f"near duplicates left out: {info['near_duplicates_left_out']}" in done.stderr
    stated = json.loads((data / "weights" / "info.json").read_text())
    for name, content in contents.items():
        assert (data / "weights" / name).read_bytes() == content
        assert stated[name]["sha256"] == hashlib.sha256(content).hexdigest()
    assert sorted(path.name for path in data.iterdir()) == ["ukiyo-e", "weights"] and not project.containers()

    (data / "ukiyo-e").rename(data / "kept")
    with zipfile.ZipFile(tmp_path / "prints.zip", "w") as archive:
        archive.write(image, image.name)
    done = project.run(*given, "--weights", str(tmp_path / "weights"))
    assert done.returncode == 1 and "19 of 20 images are not in archive" in done.stderr
    assert not (data / "ukiyo-e").exists()

    # whatever is not given is fetched: the container then has this machine's network, and its proxy settings
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    for folder in ("weights", "kept"):
        shutil.rmtree(data / folder)
    given[-1] = str(FIXTURE / "images")
    proxies = {name: "" for name in os.environ if name.lower().endswith("_proxy")}
    done = project.run(*given, env={**proxies, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"})
    hub.shutdown()
    assert done.returncode == 0, done.stderr
    assert json.loads((data / "ukiyo-e" / "info.json").read_text())["hash"] == info["hash"]
    assert (data / "weights" / "ViT-B-32.safetensors").read_bytes() == tensors(7)


def test_a_preparation_is_its_own(tmp_path: Path):
    """An experiment that begins or ends meanwhile does not hit it, a second one is refused, a killed one is ended."""
    project, mark = copy_of_the_repository(tmp_path / "repo"), "-data-prints"
    first = project.start("data", "prints", "--train", "40000", stdout=None, stderr=subprocess.DEVNULL)
    while first.poll() is None and not project.containers(mark):
        time.sleep(0.1)
    project.run(given="engine.sweep(); raise SystemExit")
    assert project.containers(mark) and first.poll() is None
    done = project.run("data", "prints", *TINY)
    assert done.returncode == 2 and "data/prints is being prepared by another ./run.sh; wait for it" in done.stderr
    first.kill()
    first.wait()
    assert project.containers(mark)  # and would go on for as long as it takes
    done = project.run("data", "prints", *TINY)
    assert done.returncode == 0 and not project.containers(mark), done.stderr


def test_own_data_by_a_relative_path_through_links(tmp_path: Path):
    project = copy_of_the_repository(tmp_path / "a repo")
    (own := tmp_path / "my own: data, here").mkdir()
    for name in ("train.jsonl", "val.jsonl", "test.jsonl", "images"):
        (own / name).symlink_to(FIXTURE / name)
    done = subprocess.run(
        [str(project.path / "run.sh"), "data", "Mine", "--odvg=.", "--size=32"],
        cwd=own, env=project.environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((project.path / "data/Mine/info.json").read_text())["train"] == 12


# Weights in the layout of the published ones, with random numbers; of CLIP only what the text tower takes
WEIGHTS = """
import open_clip, timm
from safetensors.torch import save_file
clip = open_clip.create_model("ViT-B-32", pretrained=None).state_dict()
text = {k: v.clone() for k, v in clip.items() if not k.startswith("visual.")}
save_file(text, "/writable/ViT-B-32.safetensors")
vit = timm.create_model("vit_small_patch16_224", pretrained=False).state_dict()
save_file(vit, "/writable/vit_small_patch16_224.safetensors")
"""


def test_large_images_start_from_published_weights(tmp_path: Path):
    project = copy_of_the_repository(tmp_path / "repo")
    project.set("TUNING_STEPS, TUNING_LR", "2, 1e-4")
    project.set("BATCH", "8")
    done = project.run("data", "prints", "--size", "224", "--train", "40", "--val", "24", "--test", "8")
    assert done.returncode == 0, done.stderr
    (weights := project.path / "data" / "weights").mkdir()
    make_weights(weights)
    found, _ = one_run(project, tmp_path / "first")
    assert found["outcome"] == "ok" and found["metrics"]["gallery"] == 24 and found["train"]["claims"]["steps"] == "2"
    (weights / "vit_small_patch16_224.safetensors").unlink()
    found, log = one_run(project, tmp_path / "second")
    assert found["outcome"] == "failed"
    assert "vit_small_patch16_224.safetensors is missing: a person gets it with ./run.sh data ukiyo-e" in log


def make_weights(folder: Path) -> None:
    container = engine.Container(
        name=f"ar-{os.getpid()}-weights",
        image=engine.find_image(),
        command=["python", "-c", WEIGHTS],
        memory="4g",
        mounts={},
        writable=folder,
    )
    done = engine.run(engine.arguments(container), timeout=120)
    assert done.returncode == 0, done.stderr
    for file in folder.iterdir():
        file.chmod(0o644)  # as the data step leaves them; safetensors' own files are for their owner only


def one_run(project: Project, work: Path) -> tuple[dict, str]:
    """What a training of train.py gives, with what it printed."""
    work.mkdir()
    shutil.copy(project.path / "train.py", work)
    limits = {"budget": 120, "memory": "8g", "seed": 1}
    script = stand_ins.one_run(work=work, data=project.path / "data" / "prints", log=work / "log", **limits)
    done = project.run(given=script)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout), (work / "log").read_text()
