"""The figures of a report (Matplotlib): one panel each, so that a narrow page can put them below one another.

Colours are those of Okabe and Ito (2008), told apart by colour-blind readers; line styles and markers tell the same once more.
Text, axes and grid take the colour of the page's text.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure

from golf_jax.config import CAP_BYTES
from golf_jax.optim.schedules import Clock, fake_quant_strength, looping, swa_collects
from golf_jax.quant.schemes import FLOATS
from golf_jax.reporting.measure import Measured, TensorError
from golf_jax.reporting.record import Record

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vP"
TEXT = "#767779"  # legible on white and on black, so also in an exported file; `svg` replaces it by the page's own colour
SETTINGS: dict[Any, Any] = {
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: read aloud, searched, in the page's font
    "svg.hashsalt": "golf_jax",  # the same run, the same bytes
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": TEXT,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "axes.prop_cycle": cycler(color=COLOURS),
}
Draw = Callable[[Any], None]


def _figure(draw: Draw, x: str, y: str, height: float = 3.2) -> Figure:
    """One panel of 5 x `height` inches drawn by `draw(axes)`."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(5, height), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        draw(axes)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            figure.legend(loc="outside upper left", ncols=1)
        return figure


def style(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index % len(LINES)]}


def smoothed(values: Sequence[float], over: int) -> np.ndarray:
    """Exponential average with a horizon of `over` values, started at the mean of what there is so far."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = total * (1 - 1 / over) + value, weight * (1 - 1 / over) + 1
        out.append(total / weight)
    return np.array(out)


def training_loss(records: Sequence[Record], x: str, label: str) -> Figure | None:
    shown = [(i, r) for i, r in enumerate(records) if r.steps]

    def draw(axes: Any) -> None:
        for i, r in shown:
            at, loss = [row[x] for row in r.steps], [row["loss"] for row in r.steps]
            axes.plot(at, loss, color=style(i)["color"], alpha=0.4, linewidth=0.8)
            axes.plot(at, smoothed(loss, max(len(loss) // 20, 1)), label=r.name, **style(i))
        low, high = np.quantile([row["loss"] for _, r in shown for row in r.steps], [0, 0.98])
        axes.set_ylim(low - 0.03 * (high - low), high + 0.05 * (high - low) + 1e-9)

    return _figure(draw, label, "training loss, nats per token") if shown else None


def validation(records: Sequence[Record], x: str, label: str) -> Figure | None:
    shown = [(i, r) for i, r in enumerate(records) if r.validations]

    def draw(axes: Any) -> None:
        for i, r in shown:
            rows = [row for row in r.validations if row["step"]] or r.validations  # untrained, a model is off the scale
            axes.plot([row[x] for row in rows], [row["val_bpb"] for row in rows], label=r.name, marker=MARKERS[i % 6], **style(i))

    return _figure(draw, label, "validation bits per byte") if shown else None


def schedule(records: Sequence[Record], key: str, label: str) -> Figure | None:
    """`key` over the steps: lr_factor or momentum."""
    shown = [(i, r) for i, r in enumerate(records) if r.steps]

    def draw(axes: Any) -> None:
        for i, r in shown:
            axes.plot([row["step"] for row in r.steps], [row[key] for row in r.steps], label=r.name, **style(i))

    return _figure(draw, "step", label) if shown else None


def phases_of(record: Record) -> dict[str, list[int]]:
    """Phase -> the steps in which it was on, of the phases that a run has."""
    s, b, model = record.recipe.schedule, record.recipe.budget, record.recipe.model
    on: dict[str, list[int]] = {}
    for row in record.steps:
        step, factor = row["step"], row["lr_factor"]
        now = {
            "warmdown": factor < 1,
            "depth recurrence": bool(model.loop_repeats) and looping(s, b, Clock(step, row["seconds"])),
            "fake quantization": bool(fake_quant_strength(s, factor)),
            "weight averaging": swa_collects(s, factor, step + 1),
        }
        for name, is_on in now.items():
            if is_on:
                on.setdefault(name, []).append(step)
    return on


def phases(records: Sequence[Record]) -> Figure | None:
    bars = [(i, f"{name}: {r.name}" if len(records) > 1 else name, on) for i, r in enumerate(records) for name, on in phases_of(r).items()]
    bars.sort(key=lambda bar: bar[1])

    def draw(axes: Any) -> None:
        for y, (i, _, on) in enumerate(bars):
            axes.broken_barh([(step, 1) for step in on], (y - 0.3, 0.6), color=COLOURS[i % len(COLOURS)])
        axes.set_yticks(range(len(bars)), [name for _, name, _ in bars])
        axes.set_xlim(0, max(r.steps[-1]["step"] + 1 for r in records if r.steps))
        axes.invert_yaxis()

    return _figure(draw, "step", "", 1.2 + 0.28 * len(bars)) if bars else None


def _bars(names: Sequence[str], series: Sequence[tuple[int, str, Sequence[float]]], x: str, *, legend: bool) -> Figure:
    """Horizontal bars: for every name one bar per series (colour index, label, values)."""
    thick = 0.8 / len(series)

    def draw(axes: Any) -> None:
        for k, (i, label, values) in enumerate(series):
            at = np.arange(len(names)) - 0.4 + thick * (k + 0.5)
            axes.barh(at, values, thick, color=COLOURS[i % len(COLOURS)], label=label if legend else None)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.locator_params(axis="x", nbins=5)

    return _figure(draw, x, "", 1.2 + len(names) * max(0.2, 0.09 * len(series)))


def byte_budget(records: Sequence[Record]) -> Figure | None:
    """Stored bytes by group of tensors; what is left to the cap is the last bar."""
    shown = [(i, r, r.ledger) for i, r in enumerate(records) if r.ledger]
    if not shown:
        return None
    names = list(dict.fromkeys(line.label for _, _, ledger in shown for line in ledger.lines))
    series = []
    for i, r, ledger in shown:
        stored = {line.label: line.stored_bytes for line in ledger.lines}
        tail = (ledger.header_bytes, ledger.code_bytes, ledger.total_bytes)
        series.append((i, r.name, [stored.get(n, 0) / CAP_BYTES * 100 for n in names] + [b / CAP_BYTES * 100 for b in tail]))
    return _bars([*names, "header", "code", "total"], series, f"% of the cap of {CAP_BYTES:,} bytes", legend=len(shown) > 1)


def quantization(errors: Sequence[TensorError]) -> Figure | None:
    coded = [e for e in errors if e.kind not in FLOATS]
    return _bars([e.name for e in coded], [(0, "", [e.relative for e in coded])], "relative RMS error", legend=False) if coded else None


def positions(measured: Sequence[tuple[int, str, Measured]]) -> Figure:
    def draw(axes: Any) -> None:
        longest = max((m.positions for _, _, m in measured), key=len)
        for i, name, m in measured:
            axes.plot(range(len(m.positions)), [p.bpb for p in m.positions], label=name, marker=MARKERS[i % 6], **style(i))
        axes.set_xticks(range(len(longest)), [p.label for p in longest], rotation=45, ha="right")

    return _figure(draw, "tokens of context", "bits per byte")


def documents(measured: Sequence[tuple[int, str, Measured]]) -> Figure:
    def draw(axes: Any) -> None:
        edges = np.histogram_bin_edges([d.bpb for _, _, m in measured for d in m.documents], bins=24)
        for i, name, m in measured:
            axes.hist([d.bpb for d in m.documents], edges, histtype="step", linewidth=1.6, label=name, **style(i))

    return _figure(draw, "bits per byte of a document", "documents")


def chunks(measured: Sequence[tuple[int, str, Measured]]) -> Figure | None:
    def draw(axes: Any) -> None:
        for i, name, m in measured:
            bits, tokens = ([getattr(c, key) for c in m.chunks] for key in ("bpb", "tokens"))
            axes.plot(bits, color=style(i)["color"], alpha=0.3)
            axes.plot(np.cumsum(np.multiply(bits, tokens)) / np.maximum(np.cumsum(tokens), 1), label=f"{name}, mean so far", **style(i))

    measured = [m for m in measured if m[2].chunks]
    return _figure(draw, "chunk of test-time training", "bits per byte") if measured else None


def svg(figure: Figure, title: str) -> str:
    """The figure as SVG to be put into a page: no fixed size, text in the page's colour, no reference to anything outside."""
    file = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue()[file.getvalue().index("<svg") :], flags=re.S)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # `axes_1` of every figure; what is referred to has digests for names
    text = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?)px [^;\"]*", r"font-size: \1px", text).replace(TEXT, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def export(figure: Figure, path: Path) -> list[Path]:
    """`path`.svg and `path`.png (on white, 200 dots per inch)."""
    files = [path.with_suffix(".svg"), path.with_suffix(".png")]
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(files[0], metadata={"Date": None})
        figure.savefig(files[1], dpi=200, facecolor="white")
    return files
