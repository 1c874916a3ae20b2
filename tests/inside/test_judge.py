"""The judge against a brute-force rank, and what it must refuse. Runs inside the image."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import judge


def brute_force(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Average of the first and last place the true item can take when equal scores are shuffled, from 1."""
    out = []
    for i, scores in enumerate(queries @ gallery.T):
        order = np.sort(-scores)
        out.append((np.searchsorted(order, -scores[i], "left") + 1 + np.searchsorted(order, -scores[i], "right")) / 2)
    return np.array(out)


def unit(a: np.ndarray) -> np.ndarray:
    return (a / np.linalg.norm(a, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 7, 300, judge.CHUNK + 5])
def test_ranks_agree_with_brute_force(n: int):
    rng = np.random.default_rng(n)
    a, b = unit(rng.normal(size=(n, 16))), unit(rng.normal(size=(n, 16)))
    assert np.array_equal(judge.ranks(a, b), brute_force(a, b))


def test_ties_count_half():
    rng = np.random.default_rng(0)
    coarse = np.round(rng.normal(size=(200, 2))).astype(np.float32)  # exact in float32, full of equal scores
    assert np.array_equal(judge.ranks(coarse, coarse[::-1].copy()), brute_force(coarse, coarse[::-1].copy()))


def test_constant_embeddings_rank_in_the_middle():
    same = np.ones((101, 4), np.float32)
    metrics, ranks = judge.retrieval(same, same, np.arange(101))
    assert metrics["mean_rank"] == metrics["median_rank"] == metrics["random"] == 51 and (ranks == 51).all()
    assert metrics["i2t"] == metrics["t2i"] == [0, 0, 0]


def test_the_key_is_used_in_both_directions():
    rng = np.random.default_rng(1)
    images, key = unit(rng.normal(size=(50, 8))), rng.permutation(50)
    captions = np.empty_like(images)
    captions[key] = images  # caption key[i] belongs to image i
    metrics, ranks = judge.retrieval(images, captions, key)
    assert metrics["mean_rank"] == 1 and metrics["i2t"] == metrics["t2i"] == [100, 100, 100]
    wrong, _ = judge.retrieval(images, captions, np.arange(50))
    assert wrong["mean_rank"] > 15  # a row counter, which ignores the shuffle, scores like chance
    other_way = judge.retrieval(captions, images, np.argsort(key))[1]
    assert np.array_equal(np.sort(other_way[0]), np.sort(ranks[1]))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((5, 3), np.nan, np.float32), "NaN or infinity"),
        (np.full((5, 3), np.inf, np.float32), "NaN or infinity"),
        (np.ones((5, 3)), "want float32"),
        (np.ones((5, 3), np.complex64), "want float32"),
        (np.ones(5, np.float32), "want float32"),
        (np.ones((4, 3), np.float32), "want 5 rows"),
        (np.ones((5, 0), np.float32), "want 5 rows of 1 to 4096"),
        (np.ones((5, 4097), np.float32), "want 5 rows of 1 to 4096"),
        (np.array([[{}] * 3] * 5, object), "not a plain array"),
    ],
)
def test_invalid_embeddings(array: np.ndarray, message: str, tmp_path: Path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(judge.InvalidOutput, match=message):
        judge.load_embeddings(str(tmp_path / "a.npy"), 5, "encode_image")


@pytest.mark.parametrize("junk", [b"", b"\x93NUMPY", b"\x80\x04K\x01.", b"PK\x03\x04" + b"\0" * 64, b"x" * 100])
def test_junk_instead_of_an_array(junk: bytes, tmp_path: Path):
    (tmp_path / "a.npy").write_bytes(junk)
    with pytest.raises(judge.InvalidOutput):
        judge.load_embeddings(str(tmp_path / "a.npy"), 5, "encode_image")


def test_lengths_do_not_count_and_zero_rows_are_allowed(tmp_path: Path):
    a = np.random.default_rng(2).normal(size=(5, 3)).astype(np.float32)
    scaled = a * np.array([[1], [1e-20], [1e18], [5], [0]], np.float32)
    for name, x in (("a", a), ("s", scaled)):
        np.save(tmp_path / f"{name}.npy", x)
    one, two = (judge.load_embeddings(str(tmp_path / f"{name}.npy"), 5, "encode_image") for name in "as")
    assert np.allclose(one[:4], two[:4], atol=1e-6) and not two[4].any()


def made_up_pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    images = rng.normal(size=(count, 4)).astype(np.float32)
    return images, (images + rng.normal(size=images.shape)).astype(np.float32)


def test_training_pairs_are_ranked_among_themselves(tmp_path: Path):
    images, captions = made_up_pairs(30)
    np.save(tmp_path / "fit.npy", np.concatenate([images, captions]))
    expected, _ = judge.retrieval(unit(images), unit(captions), np.arange(30))
    fit = judge.fit(str(tmp_path / "fit.npy"), 30)
    assert fit == {name: expected[name] for name in ("mean_rank", "median_rank", "gallery")} and fit["gallery"] == 30
    np.save(tmp_path / "fit.npy", np.concatenate([images, images]))
    assert judge.fit(str(tmp_path / "fit.npy"), 40)["mean_rank"] == 1


def test_fewer_training_pairs_rank_as_in_a_gallery_of_the_judged_size(tmp_path: Path):
    images, captions = made_up_pairs(2000)
    whole, _ = judge.retrieval(unit(images), unit(captions), np.arange(2000))
    parts = []
    for part in np.split(np.arange(2000), 8):
        np.save(tmp_path / "fit.npy", np.concatenate([images[part], captions[part]]))
        parts.append(judge.fit(str(tmp_path / "fit.npy"), 2000))
    assert {fit["gallery"] for fit in parts} == {250}
    for metric, rel in (("mean_rank", 0.01), ("median_rank", 0.05)):
        assert np.mean([fit[metric] for fit in parts]) == pytest.approx(whole[metric], rel=rel)


@pytest.mark.parametrize(
    "array",
    [
        None,
        np.ones((62, 4), np.float32),  # more pairs than are judged
        np.ones((2, 4), np.float32),  # no gallery
        np.ones((41, 4), np.float32),
        np.ones((0, 4), np.float32),
        np.ones((1, 4), np.float32),
        np.full((40, 4), np.nan, np.float32),
        np.ones(40, np.float32),
        np.array(1, np.float32),
        np.array([[{}] * 4] * 40, object),
    ],
)
def test_training_pairs_that_cannot_be_judged_are_left_out(array: np.ndarray | None, tmp_path: Path):
    if array is not None:
        np.save(tmp_path / "fit.npy", array)
    assert judge.fit(str(tmp_path / "fit.npy"), 30) == {}


def test_the_program_prints_metrics_then_ranks(tmp_path: Path):
    rng = np.random.default_rng(3)
    for name, x in (
        ("key", rng.permutation(20)),
        ("i", rng.normal(size=(20, 4)).astype(np.float32)),
        ("c", rng.normal(size=(20, 4)).astype(np.float32)),
    ):
        np.save(tmp_path / f"{name}.npy", x)
    out = subprocess.run(
        [sys.executable, judge.__file__, *(tmp_path / f"{n}.npy" for n in ("key", "i", "c"))],
        capture_output=True,
        check=True,
    ).stdout
    line, _, arrays = out.partition(b"\n")
    said = json.loads(line)
    ranks, best = (np.load(io.BytesIO(part)) for part in (arrays[: said["bytes"]], arrays[said["bytes"] :]))
    assert (
        said["fit"] == {}
        and said["metrics"]["gallery"] == 20
        and ranks.shape == (2, 20)
        and best.shape == (2, 20, judge.BEST)
    )
    key = np.load(tmp_path / "key.npy")
    assert ((best[0] == key[:, None]).any(1) == (ranks[0] <= judge.BEST)).all()  # the right caption is among the best
    assert ((best[1] == np.arange(20)[:, None]).any(1) == (ranks[1] <= judge.BEST)).all()
