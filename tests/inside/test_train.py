"""train.py with published weights: files in the layout of the real ones, filled with random numbers."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

import train

TEXTS = ["a heron, in the snow", "two boats!"]


@pytest.fixture(scope="module")
def clip() -> torch.nn.Module:
    return open_clip.create_model("ViT-B-32", pretrained=None).eval()


@pytest.fixture(scope="module")
def vit() -> torch.nn.Module:
    return timm.create_model("vit_small_patch16_224", pretrained=False).eval()


@pytest.fixture(scope="module")
def weights(clip, vit, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_file({k: v.contiguous().clone() for k, v in clip.state_dict().items()}, folder / "ViT-B-32.safetensors")
    save_file(vit.state_dict(), folder / "vit_small_patch16_224.safetensors")
    return folder


def published(folder: Path) -> train.ECLIP:
    model = train.ECLIP("ViT-S/16", 224, torch.arange(open_clip.tokenizer.SimpleTokenizer().vocab_size))
    train.start_from_published(model, str(folder))
    return model.eval()


@torch.inference_mode()
def test_the_towers_are_the_published_ones(clip, vit, weights: Path):
    model = published(weights)
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224), dtype=np.uint8))
    torch.testing.assert_close(model.encode_text(TEXTS), clip.encode_text(open_clip.tokenize(TEXTS)))
    mean, deviation = model.pixels
    x = (images.float() - mean) / deviation
    embedding, patches = model.image(images)
    torch.testing.assert_close(embedding, model.clip.visual.head(vit.forward_head(vit.forward_features(x), True)))
    assert patches.shape[:2] == (2, 14**2)
    assert model.expert(patches, torch.tensor([[0, 0, 0.5, 0.5]] * 2)).shape == embedding.shape
    assert float(model.clip.logit_scale.detach()) == pytest.approx(train.LOGIT_SCALE_INIT)  # not the published


def test_a_missing_weight_is_one_clear_line(weights: Path, tmp_path: Path):
    (tmp_path / "ViT-B-32.safetensors").symlink_to(weights / "ViT-B-32.safetensors")
    with pytest.raises(SystemExit, match=r"vit_small_patch16_224\.safetensors is missing: .*run\.sh data ukiyo-e"):
        published(tmp_path)


def test_weights_of_another_model_do_not_pass_for_published_ones(weights: Path, tmp_path: Path):
    for file in train.PUBLISHED:
        save_file({"token_embedding.weight": torch.zeros(49408, 512)}, tmp_path / file)
    with pytest.raises(AssertionError, match="not in the published weights"):
        published(tmp_path)


def table_of(path: Path, phrases: list[str], size: int = 32, count: int = 1) -> str:
    """A training table of equal images with these phrases."""
    regions = [{"phrase": phrase, "bbox": [0.0, 0.0, 1.0, 1.0]} for phrase in phrases]
    pixels = np.random.default_rng(0).integers(0, 256, 3 * size * size, dtype=np.uint8)
    rows = {"image": [pixels] * count, "caption": ["a boat"] * count, "regions": [regions] * count}
    box, text = datasets.List(datasets.Value("float32"), length=4), datasets.Value("string")
    image = datasets.List(datasets.Value("uint8"), length=3 * size * size)
    features = datasets.Features(image=image, caption=text, regions=datasets.List({"phrase": text, "bbox": box}))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(path)
    return str(path)


def test_large_images_train_and_load(weights: Path, tmp_path: Path, monkeypatch, capsys):
    """Nothing else runs this model where all data are small: two steps, both of them with the expert branch."""
    table, out = table_of(tmp_path / "table", ["boat"], train.TUNE_FROM, 4), tmp_path
    for name, value in {"TUNING_STEPS": 2, "BATCH": 2, "EXPERT_PROB": 1}.items():
        monkeypatch.setattr(train, name, value)
    given = {"DATA": table, "OUT": out, "SEED": 7, "BUDGET_S": 600, "WEIGHTS": weights}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    train.main()
    assert "step 2/2 loss" in capsys.readouterr().out
    model = train.load(str(out), "cpu")
    with torch.inference_mode():
        images, texts = model.encode_image(torch.zeros(2, 3, 224, 224, dtype=torch.uint8)), model.encode_text(TEXTS)
    assert model.kind == "ViT-S/16" and images.shape == texts.shape == (2, 512)


@pytest.mark.parametrize("end", ["", "!", "! !", '!"', "!\u2014", "!!\u2026!\u201d", "<start_of_text>!"])
def test_every_phrase_keeps_its_end_token(end: str, tmp_path: Path):
    """Id 0 is an exclamation mark, and padding."""
    phrases = ["boat", f"the very longest phrase of all of them{end}"]
    data = train.load_data(table_of(tmp_path / "table", phrases), "cpu")
    whole = train.compact(open_clip.tokenize(phrases, train.CONTEXT), data.vocabulary)
    assert torch.equal(data.phrases.argmax(1), whole.argmax(1)) and data.phrases.max() == whole.max()
    assert (data.phrases.max(1).values == whole.max(1).values).all()
    assert data.phrases.shape[1] == int(whole.argmax(1).max()) + 1


class Numbered(torch.utils.data.Dataset):
    """Each row says which worker made it."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, at: int) -> tuple[int, int, torch.Tensor]:
        return at, torch.utils.data.get_worker_info().id, torch.full((3, 64, 64), at, dtype=torch.uint8)


def test_data_loader_workers_fork_and_share_memory_in_the_sandbox():
    loader = torch.utils.data.DataLoader(Numbered(), batch_size=8, num_workers=2, multiprocessing_context="fork")
    batches = list(loader)
    assert torch.cat([at for at, _, _ in batches]).tolist() == list(range(64))
    assert {int(w) for _, workers, _ in batches for w in workers} == {0, 1}
    for at, _, pixels in batches:
        assert pixels.is_shared() and torch.equal(pixels[:, 0, 0, 0], at.byte())
