"""The metric. Runs in a sandbox of its own, without train.py: two arrays and the key in, ranks and metrics out.

usage: judge.py KEY.npy IMAGES.npy CAPTIONS.npy [FIT.npy]

Prints one JSON line, {"metrics": {...}, "fit": {...}, "bytes": n} followed by two raw .npy files, the ranks (n bytes)
and the best matches of a few examples, or {"invalid": "why"}. "fit" is of training pairs, for comparison alone. Ranks
are exact, counted from 1; ties count half, so that a constant embedding ranks in the middle, not first.
"""

import io
import json
import sys

import numpy as np

MAX_WIDTH = 4096  # embedding dimensions
CHUNK = 1024  # rows of the score matrix held at once
RECALL_AT = (1, 5, 10)
EXAMPLES, BEST = 24, 5  # queries whose best matches are kept for the report, and how many of each


class InvalidOutput(ValueError):
    """What train.py's model returned cannot be judged; the message says why."""


def load_embeddings(path: str, n: int, encoder: str) -> np.ndarray:
    """Read an untrusted .npy and return it as unit rows, float32 (n, D).

    Raises InvalidOutput for pickles, broken files, wrong shape, dtype, count or width, and non-finite values. Its
    message quotes nothing of the file: the model that wrote it saw validation captions, and the agent reads the reason.
    """
    try:
        a = np.lib.format.open_memmap(path, mode="r")  # the plain format only: no pickles, no archives, no allocation
    except Exception:  # of numpy's parser, whatever a forged header makes it raise
        raise InvalidOutput(f"{encoder}: not a plain array") from None
    if a.ndim != 2 or a.dtype != np.float32:
        raise InvalidOutput(f"{encoder}: want float32 (n, D)")
    if len(a) != n or not 1 <= a.shape[1] <= MAX_WIDTH:
        raise InvalidOutput(f"{encoder}: want {n} rows of 1 to {MAX_WIDTH} numbers")
    a = np.array(a)
    if not np.isfinite(a).all():
        raise InvalidOutput(f"{encoder}: NaN or infinity in the embeddings")
    norm = np.linalg.norm(a.astype(np.float64), axis=1, keepdims=True)
    return (a / np.where(norm > 0, norm, 1)).astype(np.float32)


def ranks(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Rank of gallery row i for query row i, float64 (n,): 1 + strictly better + half of the ties.

    The true score is taken from the same matrix: a separate dot product rounds differently and loses ties.
    """
    out, block = np.empty(len(queries)), np.empty((min(CHUNK, len(queries)), len(gallery)), np.float32)
    for start in range(0, len(queries), CHUNK):
        part = queries[start : start + CHUNK]
        scores = np.matmul(part, gallery.T, out=block[: len(part)])  # fresh memory for each would cost a fifth more
        rows = np.arange(len(scores))
        true = scores[rows, start + rows][:, None]
        better = np.count_nonzero(scores > true, axis=1)
        ties = np.count_nonzero(scores == true, axis=1) - 1
        out[start : start + CHUNK] = 1 + better + ties / 2
    return out


def retrieval(images: np.ndarray, captions: np.ndarray, key: np.ndarray) -> tuple[dict, np.ndarray]:
    """Metrics and ranks (2, n) of unit embeddings (n, D); key[i] is the row of the caption that belongs to image i."""
    captions = captions[key]
    both = np.stack([ranks(images, captions), ranks(captions, images)])
    i2t, t2i = (both[:, :, None] <= RECALL_AT).mean(axis=1) * 100
    metrics = {
        "mean_rank": float(both.mean()),
        "median_rank": float(np.median(both, axis=1).mean()),
        "gallery": len(key),
        "random": (len(key) + 1) / 2,
        "i2t": i2t.tolist(),
        "t2i": t2i.tolist(),
    }
    return metrics, both


def examples(images: np.ndarray, captions: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Best matches int32 (2, E, BEST): caption rows of E evenly spaced images, and image rows of their captions."""
    rows = np.linspace(0, len(key) - 1, min(EXAMPLES, len(key))).astype(int)
    both = images[rows] @ captions.T, captions[key[rows]] @ images.T
    return np.stack([np.argsort(-scores, axis=1, kind="stable")[:, :BEST] for scores in both]).astype(np.int32)


def fit(path: str, gallery: int) -> dict:
    """How training pairs, the images first in one array, would rank in a gallery of that size; {} without them.

    They are fewer, to save time: those that come before the right one are scaled up, which on average is exact for the
    mean rank. A train.py may fake this; it never decides.
    """
    try:
        pairs = min(len(np.lib.format.open_memmap(path, mode="r")) // 2, gallery)
        rows = load_embeddings(path, 2 * max(pairs, 2), "fit")  # one would be no gallery
        found, _ = retrieval(rows[:pairs], rows[pairs:], np.arange(pairs))
        scaled = {name: 1 + (found[name] - 1) * (gallery - 1) / (pairs - 1) for name in ("mean_rank", "median_rank")}
    except Exception:  # no such file, and whatever a forged one raises
        return {}
    return {**scaled, "gallery": pairs}


def main(key_path: str, images_path: str, captions_path: str, fit_path: str = "") -> None:
    key = np.load(key_path, allow_pickle=False)
    try:
        images = load_embeddings(images_path, len(key), "encode_image")
        captions = load_embeddings(captions_path, len(key), "encode_text")
        if images.shape[1] != captions.shape[1]:
            raise InvalidOutput(f"image and text embeddings differ in width: {images.shape[1]} and {captions.shape[1]}")
    except InvalidOutput as e:
        print(json.dumps({"invalid": str(e)}))
        return
    metrics, both = retrieval(images, captions, key)
    arrays = io.BytesIO()
    np.save(arrays, both.astype(np.float32))
    size = arrays.tell()
    np.save(arrays, examples(images, captions, key))
    del images, captions  # the room may be needed
    print(json.dumps({"metrics": metrics, "fit": fit(fit_path, len(key)), "bytes": size}), flush=True)
    sys.stdout.buffer.write(arrays.getvalue())


if __name__ == "__main__":
    main(*sys.argv[1:])
