"""Changes to train.py of several lines, as (old text, new text), which the task table and the scripted day share."""

# regions of the batch that carry the same phrase are no negatives of each other
SOFT_TARGETS = [
    (
        "def contrastive(a: Tensor, b: Tensor, scale: Tensor)",
        "def contrastive(a: Tensor, b: Tensor, scale: Tensor, same: Tensor | None = None)",
    ),
    (
        "    target = torch.arange(len(a), device=a.device)",
        "    same = torch.eye(len(a), device=a.device) if same is None else same.float()\n"
        "    target = same / same.sum(1, keepdim=True)",
    ),
    (
        "    phrase = model.text(data.phrases[region])",
        "    ids = data.phrases[region]\n    phrase, same = model.text(ids), (ids[:, None] == ids[None]).all(2)",
    ),
    ("contrastive(view, phrase, model.logit_scale())", "contrastive(view, phrase, model.logit_scale(), same)"),
]
PROJECTORS = [
    (
        "        self.heatmap = HeatmapProcessor(",
        "        self.image_head = nn.Sequential(nn.GELU(), nn.Linear(embed_dim, embed_dim))\n"
        "        self.text_head = nn.Sequential(nn.GELU(), nn.Linear(embed_dim, embed_dim))\n"
        "        self.heatmap = HeatmapProcessor(",
    ),
    (
        "            return tower(x)\n",
        "            image, patches = tower(x)\n            return self.image_head(image), patches\n",
    ),
    (
        "        return x[torch.arange(len(x), device=x.device), tokens.argmax(1)] @ clip.text_projection",
        "        x = x[torch.arange(len(x), device=x.device), tokens.argmax(1)] @ clip.text_projection\n"
        "        return self.text_head(x)",
    ),
]
