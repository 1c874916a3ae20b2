"""eCLIP in one file: CLIP that also learns from the regions experts marked in its training images.

An ordinary step pulls each image towards its caption. An expert step adds a second pair: one marked region of each
image becomes a heatmap, the heatmap attends to the image's patches, and the resulting view of the image, mixed with
the ordinary one, is pulled towards the phrase that names the region. Only training sees regions; afterwards the model
is a plain two-tower encoder, judged by image-text retrieval. (eCLIP: ECCV 2024; towers: open_clip.)

Contract with ./run.sh: `python train.py` reads the table in $DATA, takes every random number from $SEED, ends within
$BUDGET_S seconds and leaves a checkpoint in $OUT; published weights lie in $WEIGHTS. `load` (last function) is called
later, with neither, to encode unseen images and captions. Importing this file runs nothing. The rest is yours.
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
from safetensors.torch import load_file
from torch import Tensor, nn

# Training
STEPS = 300  # fixed, so that a result does not depend on the machine's speed: about 60 s on two CPU cores
STOP_AT = 0.85  # share of the budget after which a machine too slow for STEPS stops early and saves what it has
BATCH = 64  # pairs a step; the other pairs of the batch are the negatives
LR = 1e-3  # peak; linear warm-up, then a cosine to zero
TUNING_STEPS, TUNING_LR = 1000, 1e-4  # the same two where training starts from published weights
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

# Model: small images train one from scratch (0.9 M parameters), large ones start from published weights
TUNE_FROM = 224  # px of an image's side
EMBED_DIM = 64  # the space both towers share
CONTEXT = 56  # tokens, start and end included; longer captions are cut
HEAT_HEADS = 4
VISION = {"width": 96, "layers": 4, "head_width": 32, "patch_size": 16}
TEXT = {"width": 96, "layers": 2, "heads": 4, "context_length": CONTEXT}
VIT_S = {"timm_model_name": "vit_small_patch16_224", "timm_pool": "token", "timm_proj": "linear"}  # ImageNet
CLIP_TEXT = {"width": 512, "layers": 12, "heads": 8, "context_length": 77}  # of CLIP ViT-B/32
PUBLISHED = {"ViT-B-32.safetensors": "", "vit_small_patch16_224.safetensors": "visual.trunk."}
MODELS = {  # embedding width, towers, mean and deviation of pixels (0-255), files in $WEIGHTS and where they go
    "scratch": (EMBED_DIM, VISION, TEXT, (127.5, 63.75), {}),
    "ViT-S/16": (512, VIT_S, CLIP_TEXT, (127.5, 127.5), PUBLISHED),  # 86 M
}


@dataclass
class Data:
    """The training split: image i has caption i and the regions `first[i]` to `first[i + 1] - 1`."""

    images: Tensor  # (N, 3, S, S) uint8, on the device
    captions: Tensor  # (N, context) token ids, on the device
    phrases: Tensor  # (R, L) token ids, on the device; L is the longest phrase's length
    boxes: Tensor  # (R, 4) x0 y0 x1 y1 in 0..1, on the device
    first: np.ndarray  # (N + 1,)
    vocabulary: Tensor  # (V,) ids the model knows, ascending: those that occur here, or all of a published one's
    kind: str  # of MODELS


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
    kind = "ViT-S/16" if size >= TUNE_FROM else "scratch"
    ids = open_clip.tokenize(captions + phrases, MODELS[kind][2]["context_length"])
    known = torch.arange(open_clip.tokenizer.SimpleTokenizer().vocab_size) if MODELS[kind][4] else ids.flatten()
    vocabulary = torch.cat([ids.new_zeros(1), known]).unique()
    caption_ids, phrase_ids = compact(ids, vocabulary).split([len(captions), len(phrases)])
    images = torch.from_numpy(pixels).view(-1, 3, size, size).to(device)
    phrase_ids = phrase_ids[:, : int(phrase_ids.argmax(1).max()) + 1].to(device)  # to the end token
    boxes = torch.tensor(boxes, dtype=torch.float32, device=device)
    return Data(images, caption_ids.to(device), phrase_ids, boxes, np.array(first), vocabulary, kind)


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


class HeatmapProcessor(nn.Module):
    """The expert's view of an image: heatmap patches attend to image patches, averaged where the heatmap is warm."""

    def __init__(self, patches: int, patch: int, width: int, embed_dim: int):
        super().__init__()
        self.patch, self.embed = patch, nn.Linear(patch**2, width)
        self.position = nn.Parameter(torch.randn(patches, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, HEAT_HEADS, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, embed_dim, bias=False)

    def forward(self, tokens: Tensor, heatmap: Tensor) -> Tensor:
        """Image patches (B, P, width) and a heatmap (B, S, S) to (B, D)."""
        heat = F.unfold(heatmap[:, None], self.patch, stride=self.patch).transpose(1, 2)  # (B, P, patch * patch)
        query = self.embed(heat) + self.position
        attended, _ = self.attention(query, tokens, tokens, need_weights=False)
        weight = heat.mean(2, keepdim=True)
        weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-6)
        return self.project(self.norm(((tokens + attended) * weight).sum(1)))


class ECLIP(nn.Module):
    """Two open_clip towers and the heatmap processor; D is the width of the space they share."""

    def __init__(self, kind: str, image_size: int, vocabulary: Tensor):
        super().__init__()
        self.kind, self.image_size, self.vocabulary = kind, image_size, vocabulary
        embed_dim, vision, text, self.pixels, _ = MODELS[kind]
        vision = {**vision, "image_size": image_size, "output_tokens": True}
        text = {**text, "vocab_size": len(vocabulary) + 1}  # one more: the unknown token
        self.clip = open_clip.CLIP(embed_dim, vision, text, init_logit_scale=LOGIT_SCALE_INIT)
        trunk = getattr(self.clip.visual, "trunk", None)  # where the image tower is one of timm's
        conv = trunk.patch_embed.proj if trunk else self.clip.visual.conv1
        patch, width = conv.kernel_size[0], conv.out_channels
        self.heatmap = HeatmapProcessor((image_size // patch) ** 2, patch, width, embed_dim)

    def image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S) uint8 to embeddings (B, D) and patch tokens (B, P, width)."""
        x, tower = images.float().sub_(self.pixels[0]).div_(self.pixels[1]), self.clip.visual
        if not hasattr(tower, "trunk"):
            return tower(x)
        tokens = tower.trunk.forward_features(x)
        return tower.head(tower.trunk.forward_head(tokens)), tokens[:, tower.trunk.num_prefix_tokens :]

    def text(self, tokens: Tensor) -> Tensor:
        """Token ids (B, L) to embeddings (B, D). As in open_clip, but L may be shorter than the context."""
        clip, length = self.clip, tokens.shape[1]
        mask = None if clip.attn_mask is None else clip.attn_mask[:length, :length]
        x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
        x = clip.ln_final(clip.transformer(x, attn_mask=mask))
        return x[torch.arange(len(x), device=x.device), tokens.argmax(1)] @ clip.text_projection

    def expert(self, patches: Tensor, boxes: Tensor) -> Tensor:
        """Patch tokens (B, P, width) and one box for each image (B, 4) to embeddings (B, D)."""
        return self.heatmap(patches, gaussian_heatmap(boxes, self.image_size))

    def logit_scale(self) -> Tensor:
        """What cosines are multiplied by to become logits, a scalar."""
        return self.clip.logit_scale.exp().clamp(max=LOGIT_SCALE_MAX)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) uint8 to (B, D). Called for evaluation only."""
        return self.image(images)[0]

    def encode_text(self, captions: list[str]) -> Tensor:
        """Captions to (B, D). Called for evaluation only."""
        ids = open_clip.tokenize(captions, self.clip.context_length)
        return self.text(compact(ids, self.vocabulary).to(self.clip.logit_scale.device))


def start_from_published(model: ECLIP, folder: str) -> None:
    """Fills the towers from $WEIGHTS; a missing file ends the run in one line. From scratch there is nothing to do."""
    state = {}
    for file, place in MODELS[model.kind][4].items():
        if not Path(folder, file).is_file():
            raise SystemExit(f"weights/{file} is missing: a person gets it with ./run.sh data ukiyo-e")
        state |= {place + name: tensor for name, tensor in load_file(Path(folder, file)).items()}
    if state:
        words = state.pop("token_embedding.weight")
        state |= {"token_embedding.weight": torch.cat([words[:1], words]), "logit_scale": model.clip.logit_scale}
        new = model.clip.load_state_dict(state, strict=False).missing_keys
        assert set(new) <= {"attn_mask", "visual.head.proj.weight"}, f"not in the published weights: {new[:4]}"


def contrastive(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross-entropy of embeddings (B, D): row i of one belongs to row i of the other."""
    with torch.autocast(a.device.type, enabled=False):  # the only product that needs all of float32
        logits = scale * F.normalize(a.float(), dim=-1) @ F.normalize(b.float(), dim=-1).T
    target = torch.arange(len(a), device=a.device)
    return sum(F.cross_entropy(x, target, label_smoothing=LABEL_SMOOTHING) for x in (logits, logits.T)) / 2


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


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak at step 0 to steps - 1."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))


def main() -> None:
    started = time.monotonic()
    seed, budget = int(os.environ["SEED"]), float(os.environ["BUDGET_S"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or min(16, len(os.sched_getaffinity(0)))))
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    data = load_data(os.environ["DATA"], device)
    steps, peak_lr = (STEPS, LR) if data.kind == "scratch" else (TUNING_STEPS, TUNING_LR)
    steps = round(steps * float(os.environ.get("SCALE", 1)))  # ./run.sh final trains longer
    model = ECLIP(data.kind, data.images.shape[-1], data.vocabulary)
    start_from_published(model.to(device), os.environ.get("WEIGHTS", ""))
    decay, others = ([p for p in model.parameters() if (p.ndim >= 2) == matrix] for matrix in (True, False))
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=BETAS, fused=True)
    recent: list[Tensor] = []  # caption losses since the last one
    means: list[float] = []  # their means, one a line
    for step, rows in zip(range(steps), batches(len(data.images), rng), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * learning_rate(step, steps)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            caption_loss, expert_loss = losses(model, data, rows, rng)
        optimizer.zero_grad()
        (caption_loss + EXPERT_WEIGHT * expert_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        recent.append(caption_loss.detach())
        late = time.monotonic() - started > STOP_AT * budget
        if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps or late:
            means.append(float(torch.stack(recent).mean()))
            recent.clear()
            print(f"step {step + 1}/{steps} loss {means[-1]:.3f}", flush=True)  # which the result shows
            if not math.isfinite(means[-1]):
                raise FloatingPointError("the loss is not finite")
        if late:
            break  # the budget is nearly used up

    checkpoint = [model.kind, model.image_size, model.vocabulary, model.state_dict()]
    torch.save(checkpoint, f"{os.environ['OUT']}/checkpoint.pt")
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident
    print(f"---\nsteps: {step + 1}\nloss: {means[0]:.2f} -> {means[-1]:.2f}\npeak_memory: {peak / 1e9:.2f} GB")


def load(out_dir: str, device: str) -> ECLIP:
    """The trained model, ready for `encode_image` and `encode_text`."""
    *made_of, weights = torch.load(Path(out_dir) / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = ECLIP(*made_of)
    model.load_state_dict(weights)
    return model.to(device).eval()


if __name__ == "__main__":
    main()
