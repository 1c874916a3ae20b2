"""What stage.py tells of the machine (a GPU that cannot be used, whose memory ran out), and what it embeds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch

import stage


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, {"device": "NVIDIA A100"}),
        (
            RuntimeError("CUDA error: no kernel image is available\nCompile with"),
            "RuntimeError: CUDA error: no kernel image",
        ),
        (RuntimeError("The NVIDIA driver on your system is too old"), "RuntimeError: The NVIDIA driver"),
        (AssertionError("Torch not compiled with CUDA enabled"), "AssertionError: Torch not"),
        (SystemExit(3), "a first sum on it: crashed"),
    ],
)
def test_a_gpu_is_tried_before_training(monkeypatch, error, told):
    def ones(*_, device):
        assert device == "cuda"
        if error:
            raise error
        return torch.zeros(1)

    monkeypatch.setattr(
        stage, "torch", SimpleNamespace(ones=ones, cuda=SimpleNamespace(get_device_name=lambda: "NVIDIA A100"))
    )
    monkeypatch.setattr(stage, "DEVICE", "cuda")
    said = stage.device()
    assert said == told if isinstance(told, dict) else told in said["fault"] and "\n" not in json.dumps(said)


def test_without_a_gpu_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(stage, "DEVICE", "cpu")
    assert stage.device() == {"device": "cpu"}


@pytest.mark.parametrize(
    ("files", "events"),
    [
        ({"memory.events": "low 0\nhigh 0\nmax 7\noom 1\noom_kill 2\noom_group_kill 0\n"}, (2, 7)),
        ({"memory.events": "low 0\nmax 0\noom_kill 1\n"}, (1, 0)),  # the whole machine's want
        ({"memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"}, (3, 3)),
        ({}, (0, 0)),
    ],
)
def test_whose_memory_ran_out(tmp_path: Path, monkeypatch, files: dict, events: tuple):
    monkeypatch.setattr(stage, "CGROUP_V2", tmp_path / "memory.events")
    monkeypatch.setattr(stage, "CGROUP_V1", tmp_path / "memory.oom_control")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert stage.memory_events() == events


@pytest.mark.parametrize(("pairs", "rows"), [(3, [0, 3, 6]), (7, [0, 1, 2, 3, 4, 5, 6]), (99, [0, 1, 2, 3, 4, 5, 6])])
def test_so_many_training_pairs_are_embedded_images_first(monkeypatch, pairs: int, rows: list):
    columns = {"image": [[n] * 12 for n in range(7)], "caption": [f"{n}" for n in range(7)], "regions": [[]] * 7}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.List(datasets.Value("uint8"), 12))
    model = SimpleNamespace(
        encode_image=lambda images: images[:, :2, 0, 0].float(),
        encode_text=lambda captions: torch.tensor([[100.0 + int(c)] * 2 for c in captions]),
    )
    monkeypatch.setattr(stage, "load_model", lambda: model)
    monkeypatch.setattr(datasets, "load_from_disk", lambda path: table if path == "/data" else None)
    stage.encode_fit(pairs, result := io.BytesIO())
    embedded = np.load(io.BytesIO(result.getvalue()))
    assert embedded[:, 0].tolist() == [*rows, *(100 + n for n in rows)] and embedded.dtype == np.float32


def test_the_size_of_an_archive_is_known_before_it_is_sent(monkeypatch, tmp_path: Path):
    real = stage.tarfile.TarFile.add

    def add(tar, name, *more, **how):
        return real(tar, tmp_path if name == "/out" else name, *more, **how)

    monkeypatch.setattr(stage.tarfile.TarFile, "add", add)
    for size in (0, 1, 512, 5000, 9000, 10240, 100_000):
        (tmp_path / f"{size}").write_bytes(b"x" * size)
        assert stage.archive(out := io.BytesIO()) == len(out.getvalue()) > size
        assert stage.archive(io.BytesIO(), lambda *_, **__: None) == len(out.getvalue())  # and without reading it
