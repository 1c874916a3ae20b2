"""eCLIP in one file: CLIP that also learns from the regions experts marked in its training images.

An ordinary step pulls each image towards its caption. An expert step adds a second pair: one marked region of each
image becomes a heatmap, the heatmap attends to the image's patches, and the resulting view of the image, mixed with
the ordinary one, is pulled towards the phrase that names the region. Only training sees regions; afterwards the model
is a plain two-tower encoder, judged by image-text retrieval. (eCLIP: ECCV 2024; towers: open_clip.)

Contract with ./run.sh: `python train.py` reads the table in $DATA, takes every random number from $SEED, ends within
$BUDGET_S seconds and leaves a checkpoint in $OUT. `load` (last function) is called later, without training data, to
encode images and captions nobody has seen. Importing this file runs nothing. All else is yours to change.
"""

import math
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from datasets import load_from_disk
from torch import Tensor, nn

# Training
STEPS = 300  # fixed, so that a result does not depend on the machine's speed: about 60 s on two CPU cores
STOP_AT = 0.85  # share of the budget after which a machine too slow for STEPS stops early and saves what it has
BATCH = 64  # pairs a step; the other pairs of the batch are the negatives
LR = 1e-3  # peak; linear warm-up, then a cosine to zero
WARMUP = 20  # steps
WEIGHT_DECAY = 0.1  # on matrices only, not on biases, gains and the logit scale
BETAS = (0.9, 0.98)
GRAD_CLIP = 1.0  # norm of the whole gradient

# Loss
LOGIT_SCALE_INIT = math.log(1 / 0.07)  # learnable, kept as a logarithm
LOGIT_SCALE_MAX = 2.0  # of the scale itself
LABEL_SMOOTHING = 0.0

# Expert branch
EXPERT_PROB = 0.3  # share of steps that also train on a region of every image in the batch
EXPERT_WEIGHT = 1.0  # of the expert loss beside the caption loss
MIX_ALPHA = 0.5  # mixup of ordinary and expert view, weight drawn from Beta(alpha, alpha)
HEAT_SIGMA = 1 / 3  # of the box's width and height
HEAT_SIGMA_MIN = 0.03  # of the image's side, so that thin boxes still cover a patch

# Model (0.9 M parameters)
EMBED_DIM = 64  # the space both towers share
PATCH = 16  # px
CONTEXT = 56  # tokens, start and end included; longer captions are cut
PIXEL_MEAN, PIXEL_STD = 127.5, 63.75  # on the 0-255 scale
VISION = {"width": 96, "layers": 4, "head_width": 32, "patch_size": PATCH}
TEXT = {"width": 96, "layers": 2, "heads": 4, "context_length": CONTEXT}
HEAT_HEADS = 4


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """The training split: image i has caption i and the regions `first[i]` to `first[i + 1] - 1`."""

    images: Tensor  # (N, 3, S, S) uint8, on the device
    captions: Tensor  # (N, CONTEXT) token ids, on the device
    phrases: Tensor  # (R, L) token ids, on the device; L is the longest phrase's length
    boxes: Tensor  # (R, 4) x0 y0 x1 y1 in 0..1, on the device
    first: np.ndarray  # (N + 1,)
    vocabulary: Tensor  # (V,) the tokenizer's ids that occur here, ascending


def tokenize(texts: list[str]) -> Tensor:
    """Texts to CLIP's own token ids (B, CONTEXT), 0 where a text has ended."""
    return open_clip.tokenize(texts, context_length=CONTEXT)


def compact(ids: Tensor, vocabulary: Tensor) -> Tensor:
    """Ids (B, L) to their places in the vocabulary: 0 padding, 1 unknown, 2... known.

    The order is kept, so the end token is still the largest of a row, which is how its place is found.
    """
    place = torch.searchsorted(vocabulary, ids).clamp(max=len(vocabulary) - 1)
    return torch.where(vocabulary[place] == ids, place + (place > 0), 1)


def load_data(path: str, device: str) -> Data:
    """Reads the table once. Its images are raw CHW bytes, so nothing is decoded and they stay on the device."""
    table = load_from_disk(path).with_format("arrow")[:]
    pixels = np.concatenate([chunk.flatten().to_numpy(zero_copy_only=True) for chunk in table["image"].chunks])
    size = math.isqrt(len(pixels) // len(table) // 3)
    captions, phrases, boxes, first = table["caption"].to_pylist(), [], [], [0]
    for caption, regions in zip(captions, table["regions"].to_pylist(), strict=True):
        for region in regions or [{"phrase": caption, "bbox": (0, 0, 1, 1)}]:
            phrases.append(region["phrase"])
            boxes.append(region["bbox"])
        first.append(len(phrases))
    ids = tokenize(captions + phrases)
    vocabulary = torch.cat([ids.new_zeros(1), ids.flatten()]).unique()
    caption_ids, phrase_ids = compact(ids, vocabulary).split([len(captions), len(phrases)])
    return Data(
        images=torch.from_numpy(pixels).view(-1, 3, size, size).to(device),
        captions=caption_ids.to(device),
        phrases=phrase_ids[:, : int(phrase_ids.count_nonzero(1).max())].to(device),
        boxes=torch.tensor(boxes, dtype=torch.float32, device=device),
        first=np.array(first),
        vocabulary=vocabulary,
    )


def batches(count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers of one batch after another, reshuffled every epoch, for ever."""
    size = min(BATCH, count)
    while True:
        order = rng.permutation(count)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


def gaussian_heatmap(boxes: Tensor, size: int) -> Tensor:
    """Boxes (B, 4) to heatmaps (B, size, size): 1 at the centre of the box, falling off with its width and height."""
    axis = (torch.arange(size, device=boxes.device) + 0.5) / size
    low, high = boxes[:, :2, None], boxes[:, 2:, None]
    sigma = ((high - low) * HEAT_SIGMA).clamp_min(HEAT_SIGMA_MIN)
    x, y = torch.exp(-0.5 * ((axis - (low + high) / 2) / sigma) ** 2).unbind(1)  # (B, size) each
    return y[:, :, None] * x[:, None, :]


# --- model -----------------------------------------------------------------------------------------------------------


class HeatmapProcessor(nn.Module):
    """The expert's view of an image: heatmap patches attend to image patches, averaged where the heatmap is warm."""

    def __init__(self, patches: int, width: int):
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(torch.randn(patches, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, HEAT_HEADS, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, EMBED_DIM, bias=False)

    def forward(self, tokens: Tensor, heatmap: Tensor) -> Tensor:
        """Image patches (B, P, width) and a heatmap (B, S, S) to (B, EMBED_DIM)."""
        heat = F.unfold(heatmap[:, None], PATCH, stride=PATCH).transpose(1, 2)  # (B, P, PATCH * PATCH)
        query = self.embed(heat) + self.position
        attended, _ = self.attention(query, tokens, tokens, need_weights=False)
        weight = heat.mean(2, keepdim=True)
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-6)
        return self.project(self.norm(((tokens + attended) * weight).sum(1)))


class ECLIP(nn.Module):
    """Two open_clip towers and the heatmap processor."""

    def __init__(self, image_size: int, vocabulary: Tensor):
        super().__init__()
        self.image_size, self.vocabulary = image_size, vocabulary
        vision = VISION | {"image_size": image_size, "output_tokens": True}
        text = TEXT | {"vocab_size": len(vocabulary) + 1}  # one more: the unknown token
        self.clip = open_clip.CLIP(EMBED_DIM, vision, text, init_logit_scale=LOGIT_SCALE_INIT)
        self.heatmap = HeatmapProcessor((image_size // PATCH) ** 2, VISION["width"])

    def image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) uint8 to embeddings (B, EMBED_DIM) and patch tokens (B, P, width)."""
        return self.clip.visual((images.float() - PIXEL_MEAN) / PIXEL_STD)

    def text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) to embeddings (B, EMBED_DIM). As in open_clip, but L may be shorter than CONTEXT."""
        clip, length = self.clip, tokens.shape[1]
        mask = None if clip.attn_mask is None else clip.attn_mask[:length, :length]
        x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
        x = clip.ln_final(clip.transformer(x, attn_mask=mask))
        return x[torch.arange(len(x), device=x.device), tokens.argmax(1)] @ clip.text_projection

    def expert(self, patches: Tensor, boxes: Tensor) -> Tensor:
        """Patch tokens (B, P, width) and one box for each image (B, 4) to embeddings (B, EMBED_DIM)."""
        return self.heatmap(patches, gaussian_heatmap(boxes, self.image_size))

    def logit_scale(self) -> Tensor:
        """What cosines are multiplied by to become logits, a scalar."""
        return self.clip.logit_scale.exp().clamp(max=LOGIT_SCALE_MAX)

    @torch.inference_mode()
    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) uint8 to (B, EMBED_DIM). Called for evaluation only."""
        return self.image(images)[0]

    @torch.inference_mode()
    def encode_text(self, captions: list[str]) -> Tensor:
        """Captions to (B, EMBED_DIM). Called for evaluation only."""
        return self.text(compact(tokenize(captions), self.vocabulary).to(self.clip.logit_scale.device))


# --- training --------------------------------------------------------------------------------------------------------


def contrastive(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of embeddings (B, EMBED_DIM): row i of one belongs to row i of the other."""
    with torch.autocast(a.device.type, enabled=False):  # the only product that needs all of float32
        logits = scale * F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T
    target = torch.arange(len(a), device=a.device)
    loss = F.cross_entropy(logits, target, label_smoothing=LABEL_SMOOTHING)
    return (loss + F.cross_entropy(logits.T, target, label_smoothing=LABEL_SMOOTHING)) / 2


def losses(model: ECLIP, data: Data, rows: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor | float]:
    """Caption loss and expert loss (0 if this is an ordinary step) of one batch of row numbers (B,)."""
    device = data.images.device
    pick = torch.from_numpy(rows).to(device)
    image, patches = model.image(data.images[pick])
    caption = model.text(data.captions[pick])
    caption_loss = contrastive(image, caption, model.logit_scale())
    if rng.random() >= EXPERT_PROB:
        return caption_loss, 0.0
    region = torch.from_numpy(rng.integers(data.first[rows], data.first[rows + 1])).to(device)  # one for each image
    expert = model.expert(patches, data.boxes[region])
    phrase = model.text(data.phrases[region])
    mix = torch.from_numpy(rng.beta(MIX_ALPHA, MIX_ALPHA, (len(rows), 1))).float().to(device)
    view = mix * F.normalize(image, dim=-1) + (1 - mix) * F.normalize(expert, dim=-1)
    return caption_loss, contrastive(view, phrase, model.logit_scale())


def learning_rate(step: int) -> float:
    """Learning rate of step 0 to STEPS - 1."""
    return LR * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def main() -> None:
    started = time.monotonic()
    out, seed, budget = Path(os.environ["OUT"]), int(os.environ["SEED"]), float(os.environ["BUDGET_S"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(16, len(os.sched_getaffinity(0)))))
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)

    data = load_data(os.environ["DATA"], device)
    model = ECLIP(data.images.shape[-1], data.vocabulary).to(device)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)

    every = max(1, STEPS // 20)  # steps between progress lines
    recent: list[Tensor] = []  # caption losses since the last one
    means: list[float] = []  # their means, one a line
    for step, rows in zip(range(STEPS), batches(len(data.images), rng), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            caption_loss, expert_loss = losses(model, data, rows, rng)
        optimizer.zero_grad()
        (caption_loss + EXPERT_WEIGHT * expert_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()

        recent.append(caption_loss.detach())
        late = time.monotonic() - started > STOP_AT * budget
        if (step + 1) % every == 0 or step + 1 == STEPS or late:
            means.append(float(torch.stack(recent).mean()))
            recent.clear()
            print(f"step {step + 1}/{STEPS} loss {means[-1]:.3f}", flush=True)
            if not math.isfinite(means[-1]):
                raise FloatingPointError("the loss is not finite")
        if late:
            print("the budget is nearly used up: stopping here", flush=True)
            break

    checkpoint = {"image_size": model.image_size, "vocabulary": model.vocabulary, "model": model.state_dict()}
    torch.save(checkpoint, out / "checkpoint.pt")
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else rss
    print("---")
    print(f"steps: {step + 1}")
    print(f"loss: {means[0]:.2f} -> {means[-1]:.2f}")
    print(f"peak_memory: {peak / 1e9:.2f} GB")
    print(f"seconds: {time.monotonic() - started:.0f}")


def load(out_dir: str, device: str) -> ECLIP:
    """The trained model, ready for `encode_image` and `encode_text`."""
    checkpoint = torch.load(Path(out_dir) / "checkpoint.pt", map_location=device, weights_only=True)
    model = ECLIP(checkpoint["image_size"], checkpoint["vocabulary"].cpu())
    model.load_state_dict(checkpoint["model"])
    return model.to(device).eval()


if __name__ == "__main__":
    main()
