"""Claims against logs, and runs against a baseline."""

import statistics
from collections.abc import Sequence

from golf_jax.proof.claims import Claim, Claims
from golf_jax.proof.finding import Finding
from golf_jax.proof.logs import Run
from golf_jax.proof.rules import headline, implied_bytes
from golf_jax.proof.statistics import LEVEL, MARGIN_NATS, paired_test, t_test

IMMATERIAL = 5e-6  # bits per byte or nats per token
BPB, LOSS = ("val_bpb", "mean_val_bpb", "val_bpb_mean"), ("val_loss", "mean_val_loss", "val_loss_mean")
TOTAL = ("bytes_total", "artifact_bytes", "total_bytes", "artifact_bytes_max")
# What a claimed `true` stands on.
COMPLIANCE = {
    "train_under_600s": ("training clock",),
    "training_under_600s": ("training clock",),
    "artifact_under_16mb": ("bytes",),
    "eval_under_600s": ("evaluation clock",),
    "three_seeds": ("seeds",),
    "score_first_ttt": ("C3",),
    "no_ngram_cache": ("C2",),
    "no_pre_quant_ttt": ("C3",),
    "no_slot": ("C1",),
}


def select(runs: Sequence[Run], claims: Claims) -> list[Run]:
    """The runs that the claims are about: of several with one claimed seed, those that have the claimed score; else all."""
    chosen: list[Run] = []
    all_there = set(claims.seeds) <= {r.seed for r in runs}
    for run in runs:
        same = [r for r in runs if r.seed is not None and r.seed == run.seed]
        claim = claims.of_seed(run.seed, *BPB) if run.seed is not None else None
        exact = [r for r in same if claim and any(equal(claim, s.bpb.value, s.bpb.half) for s in r.finals)]
        if claims.seeds and all_there and run.seed not in claims.seeds:
            continue
        if len(same) < 2 or not exact or run in exact:
            chosen.append(run)
    return chosen or list(runs)


def is_variant(run: Run, runs: Sequence[Run], claims: Claims) -> bool:
    """Whether the claimed score is another run's with the same seed: where one run is claimed, the others are ablations, exports, tries."""
    given = [c for names in (BPB, LOSS) if (c := claims.number(*names))]
    if len(runs) < 2 or claims.seed_count > 1 or not given:
        return False
    meant = [r for r in runs if any(equal(c, n.value, n.half) for c in given for s in r.finals for n in (s.bpb, s.loss))]
    return not any(run is r for r in meant) and run.seed in [r.seed for r in meant]


def equal(claim: Claim, value: float, half: float = 0.0) -> bool:
    """Equal as far as both are printed; a claim may be cut off instead of rounded, a mean be taken of rounded numbers."""
    return abs(claim.value - value) < max(claim.unit + half, IMMATERIAL)


def check_claims(claims: Claims, runs: Sequence[Run], found: Sequence[Finding], shipped: int | None = None) -> list[Finding]:
    """Value by value: scores, bytes, steps, and the compliance that `found` contradicts."""
    out = [Finding("warning" if claims.readable else "fail", "claims", problem, claims.file) for problem in claims.problems]
    if not runs:
        return out
    for names, what in ((BPB, "bpb"), (LOSS, "loss")):
        if claim := claims.number(*names):
            out.append(_score(claim, what, runs, claims))
    if claim := claims.number(*TOTAL):
        out += _bytes(claim, runs, claims, shipped)
    for seed in claims.per_seed:
        ours = [r for r in runs if r.seed == seed]
        for names, what in ((BPB, "bpb"), (LOSS, "loss")):
            if (claim := claims.of_seed(seed, *names)) and ours:
                out.append(_score(claim, what, ours, claims, f"seed {seed}: "))
        if (claim := claims.of_seed(seed, *TOTAL)) and ours:
            out += _bytes(claim, ours, claims, shipped, f"seed {seed}: ")
        if (claim := claims.of_seed(seed, "steps")) and ours and (steps := [max(s for s, _ in r.steps) for r in ours if r.steps]):
            if claim.value < min(steps):
                out.append(Finding("fail", "claims", f"seed {seed}: steps {claim.value:.0f}, the log goes on to {min(steps)}", claims.file))
    return out + _compliance(claims, found)


def _score(claim: Claim, what: str, runs: Sequence[Run], claims: Claims, label: str = "") -> Finding:
    """Which line has the claimed score: a mean over the runs, one run's final, or one that is no final score."""
    said = f"{label}{claim.name} {claim.text}"
    by_name: dict[str, list[tuple[float, float, str]]] = {}
    for run in runs:
        for name, score in {s.name: s for s in run.finals}.items():
            number = score.bpb if what == "bpb" else score.loss
            by_name.setdefault(name, []).append((number.value, number.half, run.at(number)))
        for name, number in dict(run.bare).items() if what == "bpb" else ():
            by_name.setdefault(f"{name} (without nats)", []).append((number.value, number.half, run.at(number)))
    by_name = dict(sorted(by_name.items(), key=lambda item: max(half for _, half, _ in item[1])))  # the most precise print first
    for name, entries in by_name.items():
        mean, half = statistics.fmean(v for v, _, _ in entries), max(h for _, h, _ in entries)
        if len(entries) == len(runs) and equal(claim, mean, half):
            over = f"the mean of {len(entries)} runs' {name}" if len(entries) > 1 else name
            return Finding("pass", "claims", f"{said} is {over}", claims.file if len(entries) > 1 else entries[0][2])
    ones = [(name, e) for name, entries in by_name.items() for e in entries if equal(claim, e[0], e[1])]
    if ones:
        name, (_, _, where) = ones[0]
        best = len(runs) > 1 and claims.seed_count > 1
        note = f"one run's {name}, not the mean" if best else f"one run's {name}"
        return Finding("warning" if best else "pass", "claims", f"{said} is {note}", where)
    if what == "loss":
        as_bpb = _score(claim, "bpb", runs, claims)
        if as_bpb.status == "pass":
            return Finding("warning", "claims", f"{said} is in bits per byte, not nats per token", as_bpb.source)
    for run in runs:
        for s in run.scores:
            number = s.bpb if what == "bpb" else s.loss
            if s.kind != "final" and claim.unit < 0.005 and equal(claim, number.value, number.half):
                status = "fail" if run.finals else "warning"
                return Finding(
                    status, "claims", f"{said} is the {s.kind} score {s.name!r}, not a score of the packed model", run.at(s.line)
                )
    heads = [h for h in map(headline, runs) if h]
    if not heads:
        return Finding("not checkable", "claims", f"{said}: the logs have no final score", claims.file)
    if claims.seed_count > len(heads) and not label:
        text = f"{said}: a mean over {claims.seed_count} seeds, of which {len(heads)} have logs with a final score"
        return Finding("not checkable", "claims", text, claims.file)
    number = [h.bpb.value if what == "bpb" else h.loss.value for h in heads]
    listed = ", ".join(f"{v:.6f}" for v in number[:5])
    return Finding(
        "fail", "claims", f"{said} is in no log; the lowest final scores are {listed} (mean {statistics.fmean(number):.6f})", claims.file
    )


def _bytes(claim: Claim, runs: Sequence[Run], claims: Claims, shipped: int | None, label: str = "") -> list[Finding]:
    totals = {r.at(r.totals[-1]): r.totals[-1].value for r in runs if r.totals}
    said, file = f"{label}{claim.name} {claim.value:,.0f}", claims.file
    if not totals:
        return [Finding("not checkable", "claims", f"{said}: the logs have no total", file)]
    values = list(totals.values())
    mean = statistics.fmean(values)
    where = next((w for w, v in totals.items() if v == claim.value), "")
    if where or abs(mean - claim.value) <= 1:
        total = "the log's total" if where else "the mean of the logs' totals"
        return [Finding("pass", "claims", f"{said} is {total}", where or file)]
    models = [r.models[-1].value for r in runs if r.models]
    if claim.value in models or (models and abs(claim.value - statistics.fmean(models)) <= 1):
        text = f"{said} is the model without its code; the log's total is {max(values):,.0f}"
        return [Finding("warning", "claims", text, file)]
    if shipped is not None and claim.value - shipped in models:
        return [Finding("pass", "claims", f"{said} is the log's model and the shipped train_gpt.py", file)]
    if claim.value % 1_000 == 0 and min(values) - 1e4 <= claim.value:
        return [Finding("pass", "claims", f"{said} is the rounded total {max(values):,.0f}", file)]
    if claims.seed_count > len(values) and not label:
        text = f"{said}: of {claims.seed_count} seeds, {len(values)} have logs with a total"
        return [Finding("not checkable", "claims", text, file)]
    near = min(values, key=lambda v: abs(v - claim.value))
    text = f"{said}, the logs' totals are {', '.join(f'{v:,.0f}' for v in values[:5])} ({claim.value - near:+,.0f} to the nearest)"
    return [Finding("warning" if claim.value >= max(values) else "fail", "claims", text, file)]


def _compliance(claims: Claims, found: Sequence[Finding]) -> list[Finding]:
    said = claims.fields.get("compliance")
    failed = {f.rule for f in found if f.status == "fail"}
    if not isinstance(said, dict):
        return []
    return [
        Finding("fail", "claims", f"compliance.{name} is claimed true, {rule} fails", claims.file)
        for name, rules in COMPLIANCE.items()
        for rule in rules
        if said.get(name) is True and rule in failed
    ]


def check_significance(runs: Sequence[Run], baseline: Sequence[Run], name: str) -> list[Finding]:
    """The written rule, on the headline scores of both. In nats per token of the candidate's tokenizer: a baseline with another
    one is carried over by its bits per byte."""
    ours = [(r, h) for r in runs if (h := headline(r))]
    theirs = [(r, h) for r in baseline if (h := headline(r))]
    if len(ours) < 2 or not theirs:
        text = f"{len(ours)} final scores against {len(theirs)} of {name}: no test without two runs of the candidate"
        return [Finding("not checkable", "significance", text)]
    rate = statistics.fmean(h.loss.value / h.bpb.value for _, h in ours)
    same = all(abs(h.loss.value / h.bpb.value / rate - 1) < 2e-3 for _, h in theirs)
    wrong = [r.file for r, _ in (*ours, *theirs) if any(f.status == "fail" for f in implied_bytes(r))]
    if wrong and not same:
        text = f"{wrong[0]} counts its bytes wrongly, and nats of different tokenizers compare by bytes only: no test against {name}"
        return [Finding("not checkable", "significance", text)]
    nats = [h.loss.value for _, h in ours]
    base = [h.loss.value if same else h.bpb.value * rate for _, h in theirs]
    test = t_test(nats, base)
    if test is None:
        return [Finding("not checkable", "significance", f"the runs do not differ at all from each other: no test against {name}")]
    carried = "" if same else ", carried over by bits per byte"
    text = (
        f"{test.gain:+.5f} nats per token better than {name} ({len(base)} run{'s' * (len(base) != 1)}{carried});"
        f" gain above {MARGIN_NATS}: t = {test.t:.2f}, {test.degrees:.1f} degrees of freedom, p = {test.p:.3g}"
    )
    found = [Finding("pass" if test.p < LEVEL else "fail", "significance", text)]
    pairs = [
        {r.seed: v for (r, _), v in zip(side, values, strict=True) if r.seed is not None} for side, values in ((ours, nats), (theirs, base))
    ]
    if paired := paired_test(pairs[0], pairs[1]):
        text = f"paired by seed: {paired.gain:+.5f} nats per token, p = {paired.p:.3g}"
        found.append(Finding("pass" if paired.p < LEVEL else "warning", "significance", text))  # the rule is about the first test
    return found
