"""What a report says: sections made of records and of what was measured again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from matplotlib.figure import Figure

from golf_jax.config import CAP_BYTES
from golf_jax.options import Sampling
from golf_jax.proof.statistics import LEVEL
from golf_jax.reporting import compare, figures
from golf_jax.reporting.measure import Again, Measured, Portion, TensorError
from golf_jax.reporting.page import Picture, Section, Table
from golf_jax.reporting.record import Record

ROWS = 12  # of a course that is shown as a table
Drawn = dict[str, tuple[str, Figure]]  # name -> (title, figure)


def draw(records: Sequence[Record], measured: Again) -> Drawn:
    """Every figure that the runs have the numbers for."""
    many = len(records) > 1
    again = [(i, r.name, measured.scores[r.name]) for i, r in enumerate(records) if r.name in measured.scores]
    drawn: dict[str, tuple[str, Figure | None]] = {
        "loss-steps": ("Training loss over steps: every step faint, its average bold", figures.training_loss(records, "step", "step")),
        "loss-time": ("Training loss over training time", figures.training_loss(records, "seconds", "seconds of training")),
        "validation-steps": ("Validation over steps, before quantization", figures.validation(records, "step", "step")),
        "validation-time": ("Validation over training time", figures.validation(records, "seconds", "seconds of training")),
        "lr": ("Factor of all learning rates", figures.schedule(records, "lr_factor", "learning-rate factor")),
        "momentum": ("Muon's momentum", figures.schedule(records, "momentum", "momentum")),
        "phases": ("Phases of training", figures.phases(records)),
        "bytes": ("Bytes of the artifact by group of tensors, against the cap", figures.byte_budget(records)),
        "positions": ("Bits per byte by position in the row", figures.positions(again) if again else None),
        "documents": ("Documents by their bits per byte", figures.documents(again) if again else None),
        "chunks": ("Test-time training, chunk by chunk", figures.chunks(again)),
    }
    for name, of_run in measured.errors.items():
        title = "Quantization error of integer-coded tensors" + (f": {name}" if many else "")
        drawn[f"quantization-{name.strip('./').replace('/', '-')}" if many else "quantization"] = (title, figures.quantization(of_run))
    return {name: (title, figure) for name, (title, figure) in drawn.items() if figure}


def sections(records: Sequence[Record], drawn: Drawn, again: Again) -> list[Section]:
    """The report in its order."""

    def pictures(*names: str) -> list[Picture]:
        return [Picture(n, t, figures.svg(f, t)) for n, (t, f) in drawn.items() if n.startswith(names)]

    made = [
        results(records),
        comparison(records),
        training(records, pictures("loss", "validation")),
        Section("Schedule", (), pictures("lr", "momentum", "phases")),
        byte_budget(records, pictures("bytes")),
        Section("Quantization", (), pictures("quantization"), [_error_table(n, e) for n, e in again.errors.items()]),
        text(again.scores, pictures("positions", "documents")),
        ttt(records, again.scores, pictures("chunks")),
        samples(again.samples),
    ]
    made = [replace(s, notes=(*s.notes, *again.missing.get(s.title, ()))) for s in made if s]
    return [s for s in made if s.notes or s.pictures or s.tables or s.quotations]


def samples(texts: Mapping[str, str]) -> Section:
    """A text of each model, drawn as `generate` draws without options."""
    drawn = Sampling()
    how = f"temperature {drawn.temperature}, top-p {drawn.top_p}, seed {drawn.seed}"
    return Section("Sample text", quotations=[(f"{name} after a document start, {how}:", text) for name, text in texts.items()])


def results(records: Sequence[Record]) -> Section:
    heads = ("run", "recipe", "seed", "steps", "seconds", "score", "bits/byte", "nats/token", "bytes", "left of the cap", "remarks")
    rows, notes = [], []
    for r in records:
        trained = r.stages.get("train", {})
        first = [r.name, r.recipe.name, str(r.recipe.seed), *(_cells(trained, steps=",", seconds=".1f") if trained else ["", ""])]
        size = [f"{r.ledger.total_bytes:,}", f"{r.ledger.headroom_bytes:,}"] if r.ledger else ["", ""]
        scores = {"before quantization": r.stages["pack"]["pre_quantization"]} if "pack" in r.stages else {}
        for method, e in (scores | r.evaluations).items():
            remark = "" if e["legal"] else "ILLEGAL (C1 to C4)"
            packed = size if method in r.evaluations else ["", ""]
            rows.append([*first, method, *_cells(e, val_bpb=".5f", val_loss=".5f"), *packed, remark])
        if not r.evaluations:
            notes.append(f"{r.name} is not finished: {'trained, not yet scored' if trained else f'{len(r.steps):,} steps so far'}.")
    return Section("Results", notes, (), [Table(heads, rows)] if rows else ())


def comparison(records: Sequence[Record]) -> Section | None:
    """What differs between several runs, in settings and in scores."""
    if len(records) < 2:
        return None
    method, found = compare.common_method(records), compare.groups(records)
    settings = compare.differing(records)
    of_runs = [[r.name, *(str(values[i]) for _, values in settings)] for i, r in enumerate(records)]
    tables = [Table(("run", *(field for field, _ in settings)), of_runs)] if settings else []
    notes = [] if settings else ["All runs have the same settings."]
    rows = compare.compare(found, method) if method else []
    if rows:
        tables.append(Table(compare.HEADINGS, [compare.cells(row) for row in rows]))
        notes.append(
            f"Scores by the {method} evaluation. Gains are against {rows[0].label}, over runs with the same seed; p is that of a paired "
            f"t-test, two-sided. Beyond the noise means p < {LEVEL / max(len(rows) - 1, 1):.2g}"
            + (f", {LEVEL} over {len(rows) - 1} comparisons." if len(rows) > 2 else ".")
        )
    else:
        notes.append("No scores to compare: no method of evaluation that every run has.")
    return Section("What differs", notes, (), tables)


def training(records: Sequence[Record], pictures: Sequence[Picture]) -> Section:
    tables = []
    for r in records:
        if r.steps:
            chosen = r.steps[:: max(len(r.steps) // ROWS, 1)]
            chosen = chosen if chosen[-1] is r.steps[-1] else [*chosen, r.steps[-1]]
            formats = {"step": ",", "seconds": ".1f", "loss": ".4f", "lr_factor": ".3f", "momentum": ".3f", "grad_norm": ".3g"}
            heads = ("step", "seconds", "loss", "lr factor", "momentum", "gradient norm")
            tables.append(Table(heads, [_cells(w, **formats) for w in chosen], f"{r.name}: training as numbers"))
        if r.validations:
            rows = [_cells(v, step=",", seconds=".1f", val_bpb=".5f", val_loss=".5f") for v in r.validations]
            tables.append(Table(("step", "seconds", "bits/byte", "nats/token"), rows, f"{r.name}: validations as numbers"))
    silent = [r.name for r in records if not r.validations]
    notes = [f"No validation during training in {', '.join(silent)} (eval.every)."] if silent else []
    notes += [f"{r.name}: no training step is recorded." for r in records if not r.steps]
    return Section("Training", notes, pictures, tables)


def _cells(row: Mapping[str, Any], **formats: str) -> list[str]:
    """What a row holds under these names, each in its format; nothing for a number that there is not."""
    return ["" if row[name] is None else format(row[name], how) for name, how in formats.items()]


def byte_budget(records: Sequence[Record], pictures: Sequence[Picture]) -> Section:
    tables = []
    for r in records:
        if r.ledger:
            formats = {"label": "", "tensors": "", "items": ",", "entropy_bytes": ",.0f", "stored_bytes": ","}
            rows = [[*_cells(asdict(w), **formats), f"{8 * w.stored_bytes / w.items:.3f}"] for w in r.ledger.lines]
            for name in ("header", "code", "total", "headroom"):
                said = "left of the cap" if name == "headroom" else name
                rows.append([said, "", "", "", f"{getattr(r.ledger, f'{name}_bytes'):,}", ""])
            heads = ("stream", "tensors", "values", "entropy", "stored", "bits/value")
            tables.append(Table(heads, rows, f"{r.name}: {r.ledger.total_bytes:,} of {CAP_BYTES:,} bytes"))
    return Section("Bytes", [f"{r.name} has no artifact yet." for r in records if not r.ledger], pictures, tables)


def _error_table(name: str, errors: Sequence[TensorError]) -> Table:
    rows = [_cells(asdict(e), name="", kind="", values=",", relative=".5f") for e in errors]
    return Table(("tensor", "kind", "values", "relative RMS error"), rows, f"{name}: quantization error as numbers")


def text(measured: Mapping[str, Measured], pictures: Sequence[Picture]) -> Section:
    notes, tables = [], []
    for name, m in measured.items():
        notes.append(
            f"{name}: scored again through its artifact, standard evaluation of the first {m.targets:,} targets: {m.bpb:.5f} bits per byte."
        )
        tables.append(_portions("tokens of context", m.positions, f"{name}: by position as numbers"))
        hardest = sorted(m.documents, key=lambda d: -d.bpb)
        chosen = hardest if len(hardest) <= 2 * ROWS else hardest[:ROWS] + hardest[-ROWS:]
        tables.append(_portions("document begins", chosen, f"{name}: the hardest and the easiest of {len(hardest):,} documents"))
    return Section("Where the bits go", notes, pictures, tables)


def _portions(what: str, portions: Sequence[Portion], summary: str) -> Table:
    return Table((what, "targets", "bits/byte"), [_cells(asdict(p), label="", tokens=",", bpb=".5f") for p in portions], summary)


def ttt(records: Sequence[Record], measured: Mapping[str, Measured], pictures: Sequence[Picture]) -> Section | None:
    """For recipes with score-first test-time training."""
    if not any(r.recipe.eval.score_first.on for r in records):
        return None
    tables = [_portions("chunk", m.chunks, f"{name}: chunks as numbers") for name, m in measured.items() if m.chunks]
    notes = [] if tables else ["A run keeps no score by chunk; --score-again measures it."]
    return Section("Test-time training", notes, pictures, tables)
