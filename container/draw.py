"""Draws the report. Runs in a sandbox: JSON from report.py on standard input; out come one JSON line with two sizes,
then report.html and progress.png. Hypotheses, diffs and logs are an agent's: the template escapes everything.
"""

import base64
import html
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
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
from PIL import Image

DATA = Path("/data")
LIGHT = {
    "ink": "#1b2430",
    "muted": "#66707d",
    "grid": "#e3e5e8",
    "kept": "#1f5fa8",
    "dropped": "#a3abb5",
    "failed": "#c8402f",
    "looked": "#b07508",
    "base": "#5b6673",
    "paper": "#ffffff",
}  # the page's dark ones: CSS
WIDE, NARROW, PICTURE, SMALL = (1040, 430), (380, 330), (800, 430), (700, 260)  # pixels
WORST = 1.30  # times the first value: what is worse is drawn at the upper edge
LABEL_PX, LABEL_CHARS = 26, 32  # between two names on the curve; of one
EXAMPLES, OPEN = 12, 6  # drawn, and shown without a click
THUMB = 128  # pixels
rcParams.update(
    {
        "svg.fonttype": "none",
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": LIGHT["grid"],
        "axes.labelcolor": LIGHT["muted"],
        "text.color": LIGHT["ink"],
        "xtick.color": LIGHT["muted"],
        "ytick.color": LIGHT["muted"],
        "text.parse_math": False,
        "axes.grid.axis": "y",
        "axes.grid": True,
        "grid.color": LIGHT["grid"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)


def number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def signed(value: float, digits: int = 1) -> str:
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if float(text.replace("−", "-")) else text[1:]


def canvas(size: tuple) -> tuple:
    fig = Figure((size[0] / 72, size[1] / 72), layout="constrained")  # a point is a pixel of the page
    return fig, fig.add_subplot()


def svg(fig: Figure, name: str, rows: dict) -> Markup:
    """The figure as inline SVG: colours follow the page's theme, points link to rows and tell what they are."""
    rcParams["svg.hashsalt"] = name  # ids differ between the figures of a page
    out = io.StringIO()
    fig.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = out.getvalue()[out.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>| xmlns(:xlink)?=\"[^\"]*\"", "", text, flags=re.S)
    text = re.sub(r' id="v-([a-z]+)"', r' class="v-\1"', re.sub(r' id="[a-z0-9]+_\d+"', "", text))
    text = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg class="{name}" \1 role="img">', text)
    for key, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{key})")

    def link(m: re.Match) -> str:
        e = rows[int(m[1])]
        title = f"{e['n']} {e['verdict']}{' ' + number(e['value']) if e['value'] else ''}: {e['hypothesis']}"
        return f'<a href="#e{e["n"]}"><title>{html.escape(title)}</title>'

    return Markup(re.sub(r'<a xlink:href="#e(\d+)"[^>]*>', link, text).replace("xlink:href", "href"))


def progress(d: dict, size: tuple, names: bool, legend: bool = False) -> Figure:
    """The progress curve: incumbent with its noise, every experiment, failures at the foot, audits."""
    fig, ax = canvas(size)
    rows = [e for e in d["experiments"] if e["comparable"]]
    lined = [e for e in rows if e["line"]]
    x = [*(e["n"] for e in lined), rows[-1]["n"] + 0.5]
    line = np.array([*(e["line"] for e in lined), lined[-1]["line"]])
    values = [e["value"] for e in rows if e["value"]]
    audits = [(e["n"], side, s) for e, sides in audit_sides(d) for side, s in sides.items()]
    low = min([line.min() * math.exp(-d["sigma"]), *values, *(s["low"] for *_, s in audits)])
    high = max([min(max(values), line[0] * WORST), *(s["high"] for *_, s in audits)]) * 1.04
    low *= (high / low) ** (-0.32 if names else -0.1)  # room for the names, and for the failures
    ax.set_yscale("log")
    ax.set_ylim(low, high)
    ticks = LogLocator(subs=(1, 2, 5)) if high > 8 * low else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])  # round numbers
    ax.yaxis.set_major_locator(FixedLocator([t for t in ticks.tick_values(low, high) if low <= t <= high]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    ax.xaxis.set_major_locator(MaxNLocator(8 if size[0] < 500 else 14, integer=True, steps=[1, 2, 5, 10]))
    ax.fill_between(
        x,
        line * math.exp(-d["sigma"]),
        line * math.exp(d["sigma"]),
        step="post",
        color=LIGHT["kept"],
        alpha=0.13,
        lw=0,
        label=f"±1 σ ({d['sigma'] * 100:.1f} %)",
    )
    ax.step(x, line, where="post", color=LIGHT["kept"], lw=2, label="incumbent")
    scale = 0.6 if len(rows) > 150 else 1
    for verdict, colour, marker, area in (
        ("discarded", "dropped", "o", 26),
        ("remeasured", "base", ".", 26),
        ("kept", "kept", "o", 52),
        ("baseline", "base", "D", 40),
        ("failed", "failed", "x", 36),
    ):
        some = [e for e in rows if e["verdict"] == verdict and (e["value"] or verdict == "failed")]
        at = [min(high / 1.01, e["value"] or low * (high / low) ** 0.03) for e in some]
        face = {"lw": 1.6} if marker == "x" else {"edgecolor": LIGHT["paper"], "lw": 0.8}
        dots = ax.scatter(
            [e["n"] for e in some],
            at,
            s=area * scale,
            color=LIGHT[colour],
            marker=marker,
            zorder=3,
            label=verdict if some and verdict != "remeasured" else None,
            clip_on=False,
            **face,
        )
        dots.set_urls([f"#e{e['n']}" for e in some])
        dots.set_gid(f"v-{verdict}")
    for n, side, s in audits:
        ax.errorbar(
            n,
            s["mean"],
            s["se"],
            fmt="s" if side == "best" else "D",
            color=LIGHT["looked"],
            capsize=3,
            zorder=4,
            label=f"audit: {side}{s['note']}",
        )
    if names:
        name_the_kept(ax, rows, (x[-1] - x[0] or 1) / (size[0] - 90))
    ax.set_xlabel("experiment")
    ax.set_ylabel(f"{d['metric']}, lower is better (log)")
    ax.margins(x=0.02)
    if legend:
        fig.legend(loc="outside upper left", ncols=4, fontsize=9.5, columnspacing=1.2, handlelength=1.4)
    return fig


def audit_sides(d: dict) -> list:
    """[(record, {side: mean, se, low, note})]; ranks in a gallery of another size are scaled to this one."""
    here = next((e["metrics"]["gallery"] for e in d["experiments"] if e["comparable"] and e["metrics"]), 0)
    found = []
    for e in d["experiments"]:
        a = e["verdict"] == "audit" and e["look"]
        if a and a["metric"].replace("_", " ") == d["metric"]:
            k = (here + 1) / (a["gallery"] + 1)
            note = "" if a["gallery"] == here else f", scaled to {here} pairs"
            sides = {
                name: {
                    "mean": s["mean"] * k,
                    "se": s["se"] * k,
                    "low": (s["mean"] - s["se"]) * k,
                    "high": (s["mean"] + s["se"]) * k,
                    "note": note,
                }
                for name, s in a["sides"].items()
            }
            found.append((e, sides))
    return found


def name_the_kept(ax, rows: list, per_px: float) -> None:
    """The hypothesis at each kept point, largest gains first, as far as there is room."""
    placed: list = []
    kept = [e for e in rows if e["verdict"] == "kept" and e["value"]]
    for e in sorted(kept, key=lambda e: -(e["sigmas"] or 0)):
        if all(abs(e["n"] - other) >= LABEL_PX * per_px for other in placed):
            placed.append(e["n"])
            text = e["hypothesis"] if len(e["hypothesis"]) <= LABEL_CHARS else e["hypothesis"][: LABEL_CHARS - 1] + "…"
            left = (e["n"] - rows[0]["n"]) / per_px < 150  # no room to the left: to the right, upwards
            ax.annotate(
                text,
                (e["n"], e["value"]),
                xytext=(5, 6) if left else (-5, -6),
                textcoords="offset points",
                rotation=30,
                rotation_mode="anchor",
                ha="left" if left else "right",
                va="center",
                fontsize=9.5,
                color=LIGHT["kept"],
                gid="v-kept",
                zorder=5,
            )


def training(d: dict) -> Figure:
    """Training loss by step: baseline and best stand out."""
    fig, ax = canvas(SMALL)
    for e in d["experiments"]:
        if e["loss"]:
            one = {d["baseline"]: ("base", 1.8, f"baseline, {e['n']}"), d["best"]: ("kept", 2.2, f"best, {e['n']}")}
            colour, width, label = one.get(e["n"], ("dropped", 0.8, None))
            ax.plot(
                *zip(*e["loss"]),
                color=LIGHT[colour],
                lw=width,
                label=label,
                alpha=1 if label else 0.45,
                zorder=3 if label else 1,
            )
    ax.set(xlabel="step", ylabel="training loss")
    if ax.lines:
        ax.legend()
    return fig


def examples(d: dict) -> list:
    """Retrieval of the best model beside the baseline's, for queries spread evenly, none chosen."""
    if not all(text for side in d["arrays"].values() for text in side.values()) or not (DATA / "captions").is_dir():
        return []
    from datasets import load_from_disk

    base, best = (
        {k: np.load(io.BytesIO(base64.b64decode(v)), allow_pickle=False) for k, v in arrays.items()}
        for arrays in (d["arrays"]["baseline"], d["arrays"]["best"])
    )
    captions, images = (load_from_disk(str(DATA / side)) for side in ("captions", "images"))
    key = np.load(DATA / "key.npy", allow_pickle=False)
    thumbs: dict = {}

    def thumb(row: int) -> Markup:
        if row not in thumbs:
            flat = np.array(images[row]["image"], np.uint8)
            side = math.isqrt(flat.size // 3)
            picture, out = Image.fromarray(flat.reshape(3, side, side).transpose(1, 2, 0)), io.BytesIO()
            picture.thumbnail((THUMB, THUMB))
            picture.save(out, "WEBP", quality=80)
            thumbs[row] = Markup("data:image/webp;base64," + base64.b64encode(out.getvalue()).decode())
        return thumbs[row]

    count = best["examples"].shape[1]
    queries, found = np.linspace(0, len(key) - 1, count).astype(int), []
    for e in np.linspace(0, count - 1, min(EXAMPLES, count)).astype(int):
        q = int(queries[e])
        sides = [
            {
                "name": name,
                "i2t": f"{a['ranks'][0][q]:g}",
                "t2i": f"{a['ranks'][1][q]:g}",
                "prints": [(thumb(int(row)), row == q) for row in a["examples"][1][e]],
                "captions": [(captions[int(row)]["caption"], row == key[q]) for row in a["examples"][0][e]],
            }
            for name, a in (("baseline", base), ("best", best))
        ]
        found.append({"n": q, "print": thumb(q), "caption": captions[int(key[q])]["caption"], "sides": sides})
    return found


def phases(d: dict) -> list:
    """What each phase brought: the incumbent before and after it."""
    found, before = {}, None
    for e in d["experiments"]:
        if e["comparable"] and e["line"]:
            if e["phase"]:
                p = found.setdefault(e["phase"], {"name": e["phase"], "before": before or e["line"], "rows": []})
                p["rows"].append(e["verdict"])
                p["after"] = e["line"]
            before = e["line"]
    for p in found.values():
        p |= {v: p["rows"].count(v) for v in ("kept", "discarded", "failed")}
        p["percent"] = (p["after"] / p["before"] - 1) * 100
    most = max([1.0, *(abs(p["percent"]) for p in found.values())])
    return [
        {**p, "bar": min(100, max(0, -p["percent"]) / most * 100)}
        for p in sorted(found.values(), key=lambda p: d["phases"].index(p["name"]) if p["name"] in d["phases"] else -1)
    ]


def page(d: dict) -> str:
    rows = {e["n"]: e for e in d["experiments"]}
    now = next(e["line"] for e in reversed(d["experiments"]) if e["line"])
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {
        "number": number,
        "signed": signed,
        "clock": lambda t: time.strftime("%Y-%m-%d %H:%M", time.gmtime(t)),
    }
    figures = {"wide": progress(d, WIDE, True), "narrow": progress(d, NARROW, False), "training": training(d)}
    return env.get_template("report.html.jinja").render(
        d=d,
        base=rows[d["baseline"]],
        best=rows[d["best"]],
        now=now,
        phases=phases(d),
        examples=examples(d),
        charts={name: svg(fig, name, rows) for name, fig in figures.items()},
        audits=audit_sides(d),
        open=OPEN,
        light=LIGHT,
        nonce=secrets.token_urlsafe(16),
    )


def main() -> None:
    d = json.load(sys.stdin)
    text, picture = page(d).encode("utf-8", "replace"), io.BytesIO()
    progress(d, PICTURE, True, legend=True).savefig(picture, format="png", dpi=144, facecolor="white")
    sys.stdout.buffer.write(json.dumps([len(text), picture.tell()]).encode() + b"\n" + text + picture.getvalue())


if __name__ == "__main__":
    main()
