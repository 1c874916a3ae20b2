"""Draws the report. Runs in a container: JSON of report.gather() on standard input, and on standard output a JSON
object, file name -> content in base64. Hypotheses, diffs and logs are an agent's: the template escapes everything.
"""

import base64
import io
import json
import math
import re
import secrets
import sys
import textwrap
import time
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import rc
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

DATA = Path("/data")
# of the light theme and of progress.png, and of the dark theme
LIGHT = {"ink": "#1b2430", "muted": "#66707d", "grid": "#e3e5e8", "paper": "#ffffff", "kept": "#1f5fa8"}
LIGHT |= {"discarded": "#a3abb5", "failed": "#c8402f", "audit": "#b07508", "baseline": "#5b6673", "control": "#7d4fb3"}
DARK = {"ink": "#e6e9ee", "muted": "#97a1ad", "grid": "#2c333c", "paper": "#12161b", "kept": "#79b0f2"}
DARK |= {"discarded": "#69737f", "failed": "#f07a66", "audit": "#e2b04c", "baseline": "#a9b3bf", "control": "#b993e6"}
# the last lies on top
MARKERS = {"discarded": "o", "remeasured": ".", "control": "^", "failed": "X", "baseline": "D", "kept": "o"}
CURVE_SIZE, LOSS_SIZE = (800 / 72, 430 / 72), (6.5, 2.9)  # inches
PNG_DPI = 144  # 1600 pixels wide
WORST = 1.30  # times the first incumbent: what is worse is drawn there
NAME_CHARS, NAMES = 32, 30  # length of a name at the curve; how many have room beside each other
THUMBNAIL = 128  # pixels
LOSS = re.compile(r"^step (\d{1,9})/\d{1,9} loss (\d{1,6}(?:\.\d{1,6})?)\s*$", re.M)
rc("svg", fonttype="none")
rc("font", size=11)
rc("text", parse_math=False)  # a hypothesis may hold anything
rc("axes", edgecolor=LIGHT["grid"], grid=True, axisbelow=True)
rc("axes.grid", axis="y")
rc("axes.spines", top=False, right=False, left=False)
rc(("xtick.major", "ytick.major"), size=0)
rc("grid", color=LIGHT["grid"])
rc("legend", frameon=False, fontsize=9.5)


def number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def percent(value: float) -> str:
    return "0.0\u00a0%" if abs(value) < 0.05 else f"{value:+.1f}\u00a0%".replace("-", "−")


def svg(fig: Figure, name: str) -> Markup:
    """The figure as inline SVG whose colours follow the page's theme."""
    out = io.StringIO()
    fig.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue().partition("<svg ")[2].partition(">")[2]
    text = text.replace("xlink:href", "href").replace(' target="_blank"', "").replace('<g id="', f'<g id="{name}-')
    for key, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{key})")
    width, height = (72 * inches for inches in fig.get_size_inches())
    return Markup(f'<svg id="{name}" viewBox="0 0 {width:g} {height:g}">{text}')


def progress(d: dict, rows: list) -> Figure:
    """The incumbent with its noise, every experiment, failures at the foot, audits; lower is better."""
    fig = Figure(CURVE_SIZE, layout="constrained")
    metric = d["program"]["metric"].replace("_", " ")
    ax = fig.add_subplot(yscale="log", xlabel="experiment", ylabel=f"{metric}, lower is better (log)")
    noise, led = math.exp(d["sigma"]), [e for e in rows if e["incumbent"]]  # those with an incumbent after them
    x = [*(e["number"] for e in led), rows[-1]["number"] + 0.5]
    line = np.array([*(e["incumbent"] for e in led), led[-1]["incumbent"]])
    band = f"±1 σ ({d['sigma'] * 100:.1f} %)"
    ax.fill_between(x, line / noise, line * noise, step="post", color=LIGHT["kept"], alpha=0.13, lw=0, label=band)
    ax.step(x, line, where="post", color=LIGHT["kept"], lw=2, label="incumbent")
    worst, best = line[0] * WORST, min(e["value"] for e in rows if e["value"])
    foot = best / noise * (best / line.max()) ** 0.5  # there is room for names above
    for verdict, marker in MARKERS.items():
        some = [e for e in rows if e["verdict"] == verdict and (e["value"] or verdict == "failed")]
        if some:
            y = [min(e["value"], worst) if e["value"] else foot for e in some]
            style = {"color": LIGHT.get(verdict, LIGHT["baseline"]), "edgecolor": LIGHT["paper"], "lw": 0.8}
            style |= {"s": 52 if verdict == "kept" else 36, "marker": marker, "label": verdict, "zorder": 3}
            dots = ax.scatter([e["number"] for e in some], y, **style)
            dots.set(urls=[f"#e{e['number']}" for e in some], gid=f"v-{verdict}", clip_on=False)
    draw_audits(ax, d, rows)
    name_the_kept(ax, rows)
    low, high = ax.set_ylim(bottom=foot)
    even = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 8 * low else even)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    ax.margins(x=0.02)
    fig.legend(loc="outside upper left", ncols=5)
    return fig


def draw_audits(ax, d: dict, rows: list) -> None:
    """Mean and standard error of both sides; ranks in a gallery of another size are scaled to the curve's."""
    runs = [run for e in rows for run in e["result"].get("runs", []) if run["outcome"] == "ok"]
    for e in d["experiments"]:
        audit = e["result"].get("audit")
        if runs and audit and audit["metric"] == d["program"]["metric"]:
            gallery = runs[0]["metrics"]["gallery"]
            scale = (gallery + 1) / (audit["gallery"] + 1)
            note = "" if scale == 1 else f", scaled to {gallery} pairs"
            for (side, s), marker in zip(audit["sides"].items(), "Ds"):
                style = {"fmt": marker, "color": LIGHT["audit"], "capsize": 3, "zorder": 4}
                ax.errorbar(e["number"], s["mean"] * scale, s["se"] * scale, label=f"audit: {side}{note}", **style)


def name_the_kept(ax, rows: list) -> None:
    """The hypothesis at each kept point, largest gains first, as far as there is room."""
    first, length = rows[0]["number"], rows[-1]["number"] - rows[0]["number"]
    named: list = []
    kept = [e for e in rows if e["verdict"] == "kept" and e["value"]]
    for e in sorted(kept, key=lambda e: -(e["result"].get("sigmas") or 0)):
        n = e["number"]
        if all(abs(n - other) > length / NAMES for other in named):
            named.append(n)
            text = textwrap.shorten(e["hypothesis"], NAME_CHARS, placeholder="…")
            left = n - first > length / 5  # else there is no room to the left of the point
            style = {"xytext": (-5, -6), "ha": "right"} if left else {"xytext": (5, 6), "ha": "left"}
            style |= {"textcoords": "offset points", "va": "center", "rotation": 30, "rotation_mode": "anchor"}
            style |= {"color": LIGHT["kept"], "fontsize": 9.5, "zorder": 5, "gid": f"v-kept-{n}", "url": f"#e{n}"}
            ax.annotate(text, (n, e["value"]), **style)


def loss_curve(log: str) -> np.ndarray:
    """A row of steps and one of losses; where train.py ran twice, the second run's."""
    losses = {int(step): float(loss) for step, loss in LOSS.findall(log)}
    return np.array(sorted(losses.items())).T


def training(rows: list, sides: dict) -> Figure:
    """Training loss by step, as train.py printed it; baseline and best stand out."""
    fig = Figure(LOSS_SIZE, layout="constrained")
    ax = fig.add_subplot(xlabel="step", ylabel="training loss")
    for e in rows:
        ax.plot(*loss_curve(e["log"]), color=LIGHT["discarded"], lw=0.8, alpha=0.45)
    for (side, e), colour in zip(sides.items(), ("baseline", "kept")):
        ax.plot(*loss_curve(e["log"]), color=LIGHT[colour], lw=2, label=f"{side}, {e['number']}")
    ax.legend()
    return fig


def phases(rows: list) -> list:
    """What each phase brought: its verdicts, and the incumbent before and after them, in the order they began."""
    found, before = {}, None
    for e in rows:
        if e["incumbent"] and e["phase"]:
            p = found.setdefault(e["phase"], {"before": before or e["incumbent"], "verdicts": []})
            p["verdicts"] += [] if e["by_hand"] else [e["verdict"]]  # which tries nothing
            p |= {"name": e["phase"], "after": e["incumbent"], "percent": (e["incumbent"] / p["before"] - 1) * 100}
        before = e["incumbent"]
    return list(found.values())


def thumbnail(flat: list) -> Markup:
    """The data URL of an image: 3 * side * side bytes, channels first."""
    side, out = math.isqrt(len(flat) // 3), io.BytesIO()
    picture = Image.fromarray(np.array(flat, np.uint8).reshape(3, side, side).transpose(1, 2, 0))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(out, "WEBP", quality=80)
    return Markup("data:image/webp;base64," + base64.b64encode(out.getvalue()).decode())


def retrieval(d: dict) -> dict:
    """What the template shows retrieval from, {} without it: queries spread evenly over the gallery, none chosen."""
    if not (DATA / "val").is_dir() or not all(len(pair) == 2 for pair in d["arrays"].values()):
        return {}
    from datasets import load_from_disk  # slow, and not always needed

    images, captions = (load_from_disk(DATA / "val" / name) for name in ("images", "captions"))
    key = np.load(DATA / "val.key.npy", allow_pickle=False)  # row of an image -> row of its caption
    # per side: ranks, float32 (2, gallery); best answers to some queries, int32 (2, queries, 5), rows of the other side
    arrays = {
        side: [np.load(io.BytesIO(base64.b64decode(raw)), allow_pickle=False) for raw in pair]
        for side, pair in d["arrays"].items()
    }
    count = arrays["best"][1].shape[1]
    queries = np.linspace(0, len(key) - 1, count).astype(int)  # as judge.py chose them
    return {
        "arrays": arrays,
        "queries": [(i, queries[i], key[queries[i]]) for i in range(0, count, 4)],
        "thumbnail": lambda row: thumbnail(images[int(row)]["image"]),
        "caption": lambda row: captions[int(row)]["caption"],
    }


def main() -> None:
    d = json.load(sys.stdin)
    rows = [e for e in d["experiments"] if e["comparable"] == d["comparable"]]
    sides = {side: next(e for e in rows if e["number"] == n) for side, n in d["sides"].items()}
    curve, picture = progress(d, rows), io.BytesIO()
    curve.savefig(picture, format="png", dpi=PNG_DPI)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    env = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.ChainableUndefined)
    env.filters |= {"number": number, "percent": percent}
    env.filters["clock"] = lambda t: time.strftime("%Y-%m-%d %H:%M", time.gmtime(t))
    env.globals |= {"light": LIGHT, "dark": DARK, "nonce": secrets.token_urlsafe(16)}
    charts = {"curve": svg(curve, "curve"), "training": svg(training(rows, sides), "training")}
    parts = {"phases": phases(rows), "retrieval": retrieval(d), **sides, **charts}
    page = env.get_template("report.html.jinja").render(d=d, rows=rows, **parts).encode("utf-8", "replace")
    files = {"report.html": page, "progress.png": picture.getvalue()}
    json.dump({name: base64.b64encode(raw).decode() for name, raw in files.items()}, sys.stdout)


if __name__ == "__main__":
    main()
