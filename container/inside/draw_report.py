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
import time
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import rc, rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

DATA = Path("/data")
# of the light theme and of progress.png, and of the dark theme
LIGHT = {"ink": "#1b2430", "muted": "#66707d", "grid": "#e3e5e8", "paper": "#ffffff", "kept": "#1f5fa8"}
LIGHT |= {"discarded": "#a3abb5", "failed": "#c8402f", "audit": "#b07508", "baseline": "#5b6673"}
DARK = {"ink": "#e6e9ee", "muted": "#97a1ad", "grid": "#2c333c", "paper": "#12161b", "kept": "#79b0f2"}
DARK |= {"discarded": "#69737f", "failed": "#f07a66", "audit": "#e2b04c", "baseline": "#a9b3bf"}
# verdict -> marker and its area in square points
MARKERS = {
    "discarded": ("o", 26),
    "remeasured": (".", 26),
    "kept": ("o", 52),
    "baseline": ("D", 40),
    "failed": ("x", 36),
}
CURVE_SIZE, LOSS_SIZE = (800 / 72, 430 / 72), (6.5, 2.9)  # inches
CURVE_WIDTH = 720  # points between the axes' ends, about
PNG_DPI = 144  # 1600 pixels wide
WORST = 1.30  # times the first incumbent: what is worse is drawn at the upper edge
NAME_CHARS, NAME_GAP = 32, 24  # the length of a name at the curve; points between two of them
EXAMPLES = 12
THUMBNAIL = 128  # pixels
LOSS = re.compile(r"^step (\d{1,9})/\d{1,9} loss (\d{1,6}(?:\.\d{1,6})?)\s*$", re.M)
MAX_POINTS = 200  # of a loss curve
rc("svg", fonttype="none")
rc("font", size=11)
rc("text", color=LIGHT["ink"], parse_math=False)
rc("axes", edgecolor=LIGHT["grid"], labelcolor=LIGHT["muted"], grid=True, axisbelow=True)
rc("axes.grid", axis="y")
rc("axes.spines", top=False, right=False, left=False)
rc(("xtick", "ytick"), color=LIGHT["muted"])
rc(("xtick.major", "ytick.major"), size=0)
rc("grid", color=LIGHT["grid"])
rc("legend", frameon=False)


def number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def signed(value: float) -> str:
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def visible(text: str) -> str:
    """Without control and other invisible characters, which could fake a line of a diff."""
    return "".join(c for c in text.replace("\t", "    ") if c.isprintable() or c == "\n")


def geometric_mean(values: list) -> float | None:
    return math.exp(np.log(values).mean()) if values else None


def content(d: dict, e: dict, name: str) -> bytes:
    """A file of an experiment's record, b"" where it was not sent."""
    return base64.b64decode(d["files"].get(f"refs/experiments/{e['number']}:experiment/{name}", ""))


def complete(d: dict) -> tuple:
    """Add to every record its result and what follows from it; returns the comparable ones, and {side: its record}.

    Ends where this branch has no incumbent, which a clone with a part of the record may lack.
    `incumbent`: the mean of all runs so far of what this branch had kept after the experiment, None before a first.
    """
    runs, blob, own = {}, "", False
    for e in d["experiments"]:
        e["result"] = json.loads(content(d, e, "result.json") or "{}")
        tried = e["result"].get("runs", [])
        e["metrics"] = next((run["metrics"] for run in tried if run["outcome"] == "ok"), {})
        e["claims"] = tried[-1]["train"].get("claims", {}) if tried else {}
        e["train_s"], e["total_s"] = (sum(run["timing"][part] for run in tried) for part in ("train", "total"))
        e["diff"] = d["diffs"].get(str(e["number"]), "")
        e["runs"] = e["runs"][d["program"]["metric"]]
        e["value"], e["incumbent"] = geometric_mean(e["runs"]), None
        if e["comparable"]:
            runs.setdefault(e["train"], []).extend(e["runs"])
            own |= e["branch"] == d["branch"]  # what was kept before came with the branch
            kept = e["verdict"] in ("kept", "baseline") and runs[e["train"]]  # one kept by hand may be unmeasured
            if kept and (not own or e["branch"] in ("", d["branch"])):
                blob = e["train"]
            e["incumbent"] = geometric_mean(runs.get(blob))
    if not blob:
        sys.exit("what this branch kept is missing; git fetch origin 'refs/experiments/*:refs/experiments/*'")
    rows = [e for e in d["experiments"] if e["comparable"]]
    measured = [e for e in rows if e["runs"]]
    return rows, {"baseline": measured[0], "best": [e for e in measured if e["train"] == blob][-1]}


def audit_points(d: dict, gallery: int) -> list:
    """What is drawn of each audit's sides; ranks in a gallery of another size are scaled to this one."""
    found = []
    for e in d["experiments"]:
        audit = e["result"].get("audit")
        if audit and audit["metric"] == d["program"]["metric"]:
            scale = (gallery + 1) / (audit["gallery"] + 1)
            note = "" if audit["gallery"] == gallery else f", scaled to {gallery} pairs"
            for side, s in audit["sides"].items():
                point = {"number": e["number"], "side": side, "note": note}
                found.append({**point, "mean": s["mean"] * scale, "se": s["se"] * scale})
    return found


def svg(fig: Figure, name: str) -> Markup:
    """The figure as inline SVG whose colours follow the page's theme."""
    rcParams["svg.hashsalt"] = name  # no two figures of the page share an id
    out = io.StringIO()
    fig.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue().partition("<svg ")[2].partition(">")[2]
    text = text.replace("xlink:href", "href").replace(' target="_blank"', "").replace('<g id="', f'<g id="{name}-')
    for key, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{key})")
    width, height = (72 * inches for inches in fig.get_size_inches())
    return Markup(f'<svg id="{name}" viewBox="0 0 {width:g} {height:g}">{text}')


def progress(d: dict, rows: list, audits: list) -> Figure:
    """The incumbent with its noise, every experiment, failures at the foot, audits; lower is better."""
    fig = Figure(CURVE_SIZE, layout="constrained")
    ax = fig.add_subplot()
    noise, led = math.exp(d["sigma"]), [e for e in rows if e["incumbent"]]  # those with an incumbent after them
    x = [*(e["number"] for e in led), rows[-1]["number"] + 0.5]
    line = np.array([*(e["incumbent"] for e in led), led[-1]["incumbent"]])
    values = [e["value"] for e in rows if e["value"]]
    low = min([line.min() / noise, *values, *(a["mean"] - a["se"] for a in audits)])
    high = max([min(max(values), line[0] * WORST), *(a["mean"] + a["se"] for a in audits)]) * 1.04
    low *= (low / high) ** 0.32  # room for the names, and for the failures
    locator = LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])
    ticks = [t for t in locator.tick_values(low, high) if low <= t <= high]
    ax.set(yscale="log", ylim=(low, high))
    ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.xaxis.set_major_locator(MaxNLocator(14, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    ax.margins(x=0.02)
    ax.set_xlabel("experiment", gid="label-x")
    ax.set_ylabel(f"{d['program']['metric'].replace('_', ' ')}, lower is better (log)", gid="label-y")
    band = f"±1 σ ({d['sigma'] * 100:.1f} %)"
    ax.fill_between(x, line / noise, line * noise, step="post", color=LIGHT["kept"], alpha=0.13, lw=0, label=band)
    ax.step(x, line, where="post", color=LIGHT["kept"], lw=2, label="incumbent")
    for verdict, (marker, area) in MARKERS.items():
        some = [e for e in rows if e["verdict"] == verdict and (e["value"] or verdict == "failed")]
        at = [min(e["value"], high / 1.01) if e["value"] else low * (high / low) ** 0.03 for e in some]
        style = {"lw": 1.6} if marker == "x" else {"lw": 0.8, "edgecolor": LIGHT["paper"]}
        style |= {"color": LIGHT.get(verdict, LIGHT["baseline"]), "s": area if len(rows) < 150 else area * 0.6}
        dots = ax.scatter([e["number"] for e in some], at, marker=marker, clip_on=False, zorder=3, **style)
        dots.set(urls=[f"#e{e['number']}" for e in some], gid=f"v-{verdict}")
        if some and verdict != "remeasured":
            dots.set_label(verdict)
    for a in audits:
        marker, label = "s" if a["side"] == "best" else "D", f"audit: {a['side']}{a['note']}"
        ax.errorbar(a["number"], a["mean"], a["se"], fmt=marker, color=LIGHT["audit"], capsize=3, zorder=4, label=label)
    name_the_kept(ax, rows, CURVE_WIDTH / (x[-1] - x[0]))
    return fig


def name_the_kept(ax, rows: list, points: float) -> None:
    """The hypothesis at each kept point, largest gains first, as far as there is room: `points` an experiment."""
    placed: list = []
    kept = [e for e in rows if e["verdict"] == "kept" and e["value"]]
    for e in sorted(kept, key=lambda e: -(e["result"].get("sigmas") or 0)):
        n, text = e["number"], e["hypothesis"]
        if any(abs(n - other) * points < NAME_GAP for other in placed):
            continue
        placed.append(n)
        text = text if len(text) <= NAME_CHARS else text[: NAME_CHARS - 1] + "…"
        left = (n - rows[0]["number"]) * points > 150  # else there is no room to the left of the point
        style = {"xytext": (-5, -6), "ha": "right"} if left else {"xytext": (5, 6), "ha": "left"}
        style |= {"textcoords": "offset points", "va": "center", "rotation": 30, "rotation_mode": "anchor"}
        style |= {"color": LIGHT["kept"], "fontsize": 9.5, "zorder": 5, "gid": f"name-{n}", "url": f"#e{n}"}
        ax.annotate(text, (n, e["value"]), **style)


def loss_curve(log: str) -> list:
    """[(step, loss), ...] of the first run in a log, thinned."""
    points: list = []
    for step, loss in LOSS.findall(log):
        if points and int(step) <= points[-1][0]:
            break  # the second run begins
        points.append((int(step), float(loss)))
    return points[:: math.ceil(len(points) / MAX_POINTS) or 1]


def training(d: dict, sides: dict) -> Figure:
    """Training loss by step, as train.py printed it; baseline and best stand out."""
    fig = Figure(LOSS_SIZE, layout="constrained")
    ax = fig.add_subplot(xlabel="step", ylabel="training loss")
    for e in d["experiments"]:
        style = {"color": LIGHT["discarded"], "lw": 0.8, "alpha": 0.45}
        if e is sides["baseline"]:
            style = {"color": LIGHT["baseline"], "lw": 1.8, "zorder": 3, "label": f"baseline, {e['number']}"}
        if e is sides["best"]:
            style = {"color": LIGHT["kept"], "lw": 2.2, "zorder": 4, "label": f"best, {e['number']}"}
        points = loss_curve(content(d, e, "train.log").decode("utf-8", "replace"))
        ax.plot([step for step, _ in points], [loss for _, loss in points], **style)
    ax.legend()
    return fig


def phases(rows: list) -> list:
    """What each phase brought: its verdicts, and the incumbent before and after them, in the order they began."""
    found, before = {}, None
    for e in rows:
        if e["incumbent"] and e["phase"]:
            p = found.setdefault(e["phase"], {"before": before or e["incumbent"], "verdicts": []})
            p["verdicts"].append(e["verdict"])
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


def retrieval(d: dict, sides: dict) -> dict:
    """What the template shows retrieval from, {} without it: queries spread evenly over the gallery, none chosen."""
    files = {side: [content(d, e, f"{name}.npy") for name in ("ranks", "examples")] for side, e in sides.items()}
    if not (DATA / "val").is_dir() or not all(raw for pair in files.values() for raw in pair):
        return {}
    from datasets import load_from_disk  # slow, and not always needed

    images, captions = (load_from_disk(DATA / "val" / name) for name in ("images", "captions"))
    key = np.load(DATA / "val.key.npy", allow_pickle=False)  # row of an image -> row of its caption
    # per side: ranks, float32 (2, gallery); best answers to some queries, int32 (2, queries, 5), rows of the other side
    arrays = {side: [np.load(io.BytesIO(raw), allow_pickle=False) for raw in pair] for side, pair in files.items()}
    count = arrays["best"][1].shape[1]
    queries = np.linspace(0, len(key) - 1, count).astype(int)
    shown = np.linspace(0, count - 1, min(EXAMPLES, count)).astype(int)
    return {
        "arrays": arrays,
        "queries": [(i, queries[i], key[queries[i]]) for i in shown],
        "thumbnail": lambda row: thumbnail(images[int(row)]["image"]),
        "caption": lambda row: captions[int(row)]["caption"],
    }


def main() -> None:
    d = json.load(sys.stdin)
    rows, sides = complete(d)
    audits = audit_points(d, max(e["metrics"].get("gallery", 0) for e in rows))
    curve, picture = progress(d, rows, audits), io.BytesIO()
    charts = {"curve": svg(curve, "curve"), "training": svg(training(d, sides), "training")}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    env = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"number": number, "signed": signed, "visible": visible}
    env.filters["clock"] = lambda t: time.strftime("%Y-%m-%d %H:%M", time.gmtime(t))
    env.globals |= {"light": LIGHT, "dark": DARK, "nonce": secrets.token_urlsafe(16)}
    parts = {"phases": phases(rows), "retrieval": retrieval(d, sides), "audits": audits, **sides, **charts}
    page = env.get_template("report.html.jinja").render(d=d, rows=rows, **parts).encode("utf-8", "replace")
    curve.legend(loc="outside upper left", ncols=4, fontsize=9.5, columnspacing=1.2, handlelength=1.4)
    curve.savefig(picture, format="png", dpi=PNG_DPI, facecolor="white")
    files = {"report.html": page, "progress.png": picture.getvalue()}
    json.dump({name: base64.b64encode(raw).decode() for name, raw in files.items()}, sys.stdout)


if __name__ == "__main__":
    main()
