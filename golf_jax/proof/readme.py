"""README.md of a records folder: the scores, bytes and steps that its tables and text name, value by value against the logs.

A table is read where it says whose numbers it holds: a column (or a row) of seeds, or names beside values. What stands for another
program (`PR #1493`, `baseline`, differences) is left alone, and what no log can bear out is not checkable, never a guess.
"""

import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from golf_jax.config import CAP_BYTES
from golf_jax.proof.claims import Claim, Claims, seeds_said
from golf_jax.proof.compare import IMMATERIAL, equal, select
from golf_jax.proof.finding import Finding
from golf_jax.proof.logs import LONGEST, Run

Kind = Literal["bpb", "loss", "bytes", "steps"]
README = "README.md"
_OTHERS = re.compile(
    r"Δ|#\d|\b(?:delta|gain|gap|diff\w*|penalty|improve\w*|change|std|sd|vs|versus|base(?:line)?|sota|merged|prior|previous|leader\w*"
    r"|budget|cap|limit|headroom|margin|under|valid|fits|mbpp|mbpb|train(?:ing)?[ _]loss|best|noise|p)\b",
    re.I,
)  # a quantity of another program, a difference, or a bound
_KINDS: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("bpb", re.compile(r"\bbp[bp]\b|\bbits per byte\b", re.I)),
    ("loss", re.compile(r"\bval loss\b|\bnats\b|^(?:\w+ )?loss\b", re.I)),
    ("steps", re.compile(r"^(?:train(?:ing|ed)? )?steps?(?: completed| reached)?$", re.I)),
    ("bytes", re.compile(r"\bartifact\b|\btotal(?: submission)?(?: size| bytes)?$|\bsubmission size\b|^(?:size|bytes)\b", re.I)),
)
_OWN_COLUMN = re.compile(
    r"(?:this|our)s?(?: (?:run|work|pr|pull request|submission|record|entry|result|value))?|values?|results?|measured", re.I
)
_EARLY = re.compile(r"\bpre\b|\bema\b|\bswa\b|\braw\b|\btrain|\bfloat|\bfp\d|\bbf16|\bunquant|\bfull|\bstandard|\bin training", re.I)
_VALUE = re.compile(r"(?<![\w.])(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)\s*(bytes|[KM]i?B)?(?![\w%]|[.,]\d)", re.I)
_ROUGH = re.compile(r"^[^\d]*[~≈<>≤≥∼]")
_SCALES = {"kb": (1e3, 2**10), "mb": (1e6, 2**20), "kib": (2**10,), "mib": (2**20,)}
_TEXT: tuple[tuple[Kind, re.Pattern[str]], ...] = (
    ("bpb", re.compile(r"\b(val_bpb)\b\s*(?:\([^()]*\)\s*)?[:=]?\s*(\d\.\d{3,})")),
    ("loss", re.compile(r"\b(val_loss)\b\s*(?:\([^()]*\)\s*)?[:=]?\s*(\d\.\d{3,})")),
    ("bytes", re.compile(r"\b(total submission size|artifact(?: size)?|serialized model)\b[^:=.]*[:=]\s*([\d,]{7,})", re.I)),
)
# A line that opens with the score, or a title that ends with it.
_OWN = re.compile(r"(?:#++(?!.*\b(?:baseline|from|previous)\b).*[-—(:]|[\s#>*-]*+)\s*(?:mean |final |score:? )*val_bpb(?!.*(?:->|→))")


@dataclass(frozen=True)
class Said:
    """One value of the README. seed: whose it is; None: of all runs, or of one of them. rough: `~15.9 MB`."""

    kind: Kind
    name: str
    seed: int | None
    claims: tuple[Claim, ...]
    line: int
    rough: bool
    mean: bool = False
    own: bool = False
    """The README opens with it as its own score."""

    @property
    def text(self) -> str:
        return f"{self.name} {self.claims[0].text}"


def check_readme(text: str, runs: Sequence[Run], claims: Claims) -> list[Finding]:
    """Every value that the README names, against the runs of its seed; one line per table, and one for the text."""
    if not runs or not text:
        return []
    found: list[Finding] = []
    lines = _plain(text)
    for table in _tables(lines):
        found += _check_table(table, runs, claims)
    return found + _check_text(lines, runs, claims)


def seeds_claimed(text: str) -> int:
    """Over how many seeds the README says that its own score is a mean; 0 if it does not say."""
    return max((n for line in _plain(text) if _OWN.match(line) for n in seeds_said(line)), default=0)


def _plain(text: str) -> list[str]:
    """The lines without markup; code blocks, where commands and logs stand, are empty."""
    lines, fenced = [], False
    for line in text.splitlines():
        fence = line.lstrip().startswith(("```", "~~~"))
        fenced ^= fence
        lines.append("" if fenced or fence else re.sub(r"\*\*|__|`|\\(?=_)|<[^<>]*>|~~", "", line[:LONGEST]))
    return lines


def _tables(lines: Sequence[str]) -> Iterator[list[Said]]:
    """The values of each table, in order; of one with seeds on top, turned over."""
    rows: list[tuple[int, list[str]]] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip().startswith("|"):
            rows.append((number, [cell.strip() for cell in line.strip().strip("|").split("|")]))
            continue
        if len(rows) > 2 and all(re.fullmatch(r":?-+:?", cell) for cell in rows[1][1]):
            yield list(_values(rows[0], rows[2:]))
        rows = []


def _values(header: tuple[int, list[str]], rows: Sequence[tuple[int, list[str]]]) -> Iterator[Said]:
    names = header[1]
    by_seed = next((i for i, name in enumerate(names) if re.fullmatch(r"seed", name, re.I)), None)
    if by_seed is not None:
        for number, cells in rows:
            if len(cells) == len(names) and (owner := _owner(cells[by_seed])):
                yield from (s for name, cell in zip(names, cells, strict=True) if (s := _said(name, cell, number, *owner)))
    elif sum(bool(_owner(name)) for name in names) > 1:
        for number, cells in rows:
            if len(cells) == len(names):
                owned = ((cell, owner) for name, cell in zip(names, cells, strict=True) if (owner := _owner(name)))
                yield from (s for cell, owner in owned if (s := _said(cells[0], cell, number, *owner)))
    elif own := [i for i, name in enumerate(names) if i and (_OWN_COLUMN.fullmatch(name) or (len(names) == 2 and _kind(name) is None))]:
        for number, cells in rows:
            if len(cells) == len(names) and (said := _said(cells[0], cells[own[0]], number, None, False)):
                yield said


def _owner(cell: str) -> tuple[int | None, bool] | None:
    """(seed, whether it is the mean) of a row or column; None if it is neither."""
    if match := re.fullmatch(r"(?:seed\s*)?(\d{1,9})(?:\s*\([^)]*\)|\s*[†*])?", cell, re.I):
        return int(match[1]), False
    mean = re.match(r"(?:\d-seed )?(?:mean|average|avg)\b", cell, re.I)
    return (None, True) if mean and not re.search(r"#\d|\bPR\b|baseline|SOTA", cell) else None


def _kind(name: str) -> Kind | None:
    name = re.sub(r"[_\s-]+", " ", name).strip()
    return None if _OTHERS.search(name) else next((kind for kind, pattern in _KINDS if pattern.search(name)), None)


def _said(name: str, cell: str, line: int, seed: int | None, mean: bool) -> Said | None:
    kind, match = _kind(name), _VALUE.search(cell)
    if kind is None or match is None or re.match(r"[-+−–]", cell):
        return None
    digits, unit = Decimal(match[1].replace(",", "")), (match[2] or "").lower()
    if kind in ("bpb", "loss") and ("." not in match[1] or unit or not 0.3 < digits < 12):
        return None
    if kind == "steps" and ("." in match[1] or unit):
        return None
    if kind == "bytes" and not unit and "." in match[1]:
        unit = "mb" if digits < 100 else ""
    scales = _SCALES.get(unit, (1,)) if kind == "bytes" else (1,)
    step = 10.0 ** int(digits.as_tuple().exponent or 0)
    if digits == CAP_BYTES or (kind == "bytes" and float(digits) * scales[0] < 1e5):
        return None
    claims = tuple(Claim(name, float(digits) * scale, step * scale, match[0].strip()) for scale in scales)
    return Said(kind, name, seed, claims, line, bool(_ROUGH.match(cell)), mean)


def _logged(run: Run, kind: Kind) -> list[tuple[str, float, float]]:
    """(what it is, value, half a digit) of everything that a log says of the kind."""
    if kind in ("bpb", "loss"):
        named = [("a training score" if s.kind == "training" else s.name, s.bpb if kind == "bpb" else s.loss) for s in run.scores]
        named += run.bare if kind == "bpb" else []
        return [(name, n.value, n.half) for name, n in named]
    if kind == "steps":
        return [("the last step", float(last), 0.0)] if (last := last_step(run)) else []
    pairs = [("the total", n) for n in run.totals] + [("the model", n) for n in run.models]
    pairs += [("the code", n) for n in run.code.values()]
    sums = [("model and code", m.value + c.value, 0.0) for m in run.models[-1:] for c in run.code.values()]
    return [(name, n.value, 0.0) for name, n in pairs] + sums


def last_step(run: Run) -> int:
    """The highest step that a line of the log is about; 0 if none is."""
    marks = (re.match(r"(?:stopping_early\b.*\bstep[: ]\s*|(?:step[: ]\s*)?)(\d{1,9})/\d+\b", line.strip()) for _, line in run.text)
    return max([int(m[1]) for m in marks if m] + [step for step, _ in run.steps], default=0)


def _matches(said: Said, logged: Sequence[tuple[str, float, float]]) -> list[str]:
    return [name for name, value, half in logged for claim in said.claims if equal(claim, value, half)]


def _check_table(table: Sequence[Said], runs: Sequence[Run], claims: Claims) -> list[Finding]:
    """Columns of which one value at least is in the log of its seed are about these runs: the others must be, too."""
    found, borne, open_ = [], [], []
    all_there = max(claims.seed_count, 1) <= sum(bool(r.finals) for r in runs)
    for name in dict.fromkeys(s.name for s in table):
        column = [s for s in table if s.name == name]
        rows = [s for s in column if not s.mean]
        logged = {s: [v for r in runs if s.seed in (None, r.seed) for v in _logged(r, s.kind)] for s in rows}
        cells = [s for s in rows if logged[s]]
        hits = {s: _matches(s, logged[s]) for s in cells}
        if any(s.seed is None for s in cells):  # a name beside a value: whose it is, nothing says
            ours = [s for s in cells if hits[s] or _of_all(s, select(runs, claims), claims.seed_count)]
            better = [s for s in cells if s not in ours and all_there and _flatters(s, logged[s])]
            found += [_contradiction(s, logged[s], False) for s in better]
            borne, open_ = borne + ours, open_ + [s for s in cells if s not in ours + better]
            continue
        matched = [s for s in cells if hits[s]]
        usual = set.intersection(*(set(hits[s]) for s in matched)) if matched else set()
        several = {s.seed for s in cells if sum(t.seed == s.seed for t in cells) > 1}  # rows of several settings
        for s in cells:
            if not hits[s] and not s.rough and s.seed not in several and (usual or _flatters(s, logged[s])):
                beside = [v for v in logged[s] if v[0] in usual] or [v for v in logged[s] if v[0] != "the code"] or logged[s]
                found.append(_contradiction(s, beside, s.claims[0].value < min(v for _, v, _ in beside)))
            elif not hits[s]:
                open_.append(s)
        for s in column:
            if s.mean and usual and not s.rough:
                found += _check_mean(s, rows, [[v for n, v, _ in logged[c] if n in usual] for c in rows])
        borne += matched
        found += _early(name, matched, hits)
    return [*found, *_summary("a table", borne, open_)]


def _summary(where: str, borne: Sequence[Said], open_: Sequence[Said]) -> list[Finding]:
    found = []
    if borne:
        names = ", ".join(dict.fromkeys(s.name for s in borne))
        count = "1 value" if len(borne) == 1 else f"{len(borne)} values"
        verb = "is" if len(borne) == 1 else "are"
        found.append(Finding("pass", "claims", f"README: {count} of {where} {verb} in the logs ({names})", f"{README}:{borne[0].line}"))
    if open_:
        listed = "; ".join(dict.fromkeys(s.text for s in open_[:4])) + "; ..." * (len(open_) > 4)
        found.append(Finding("not checkable", "claims", f"README: no line of the logs has {listed}", f"{README}:{open_[0].line}"))
    return found


def _flatters(said: Said, logged: Sequence[tuple[str, float, float]]) -> bool:
    """Lower than anything that the log has of the kind: a score, or the bytes of model or total."""
    values = [value - half for name, value, half in logged if name != "the code"]
    early = said.kind == "steps" or said.rough or _EARLY.search(re.sub(r"[_-]", " ", said.name))
    return not early and bool(values) and max(c.value + c.unit for c in said.claims) < min(values)


def _contradiction(said: Said, logged: Sequence[tuple[str, float, float]], better: bool) -> Finding:
    """A failure where the README is better than the log, else a mistake."""
    name, value, _ = min(logged, key=lambda item: abs(item[1] - said.claims[0].value))
    shown = f"{value:,.0f}" if said.kind in ("bytes", "steps") else f"{value:.6f}"
    seed = "" if said.seed is None else f"seed {said.seed}: "
    text = f"README: {seed}{said.text} is not in the log; {name} is {shown}"
    return Finding("fail" if better and said.kind != "steps" else "warning", "claims", text, f"{README}:{said.line}")


def _check_mean(said: Said, rows: Sequence[Said], behind: Sequence[Sequence[float]]) -> list[Finding]:
    """A mean is right if it is that of the column as printed, or of the numbers behind it; a failure where it is better."""
    claim, printed = said.claims[0], statistics.fmean(c.claims[0].value for c in rows)
    means = [printed, *([statistics.fmean(values[-1] for values in behind)] if all(behind) else [])]
    off = max(claim.unit, rows[0].claims[0].unit, IMMATERIAL * (said.kind in ("bpb", "loss"))) * 1.001
    if len(rows) < 2 or any(abs(m - claim.value) <= off for m in means):
        return []
    text = f"README: {said.text} is not the mean of the {len(rows)} seeds beside it, {printed:,.7g}"
    return [Finding("fail" if claim.value < printed and said.kind != "steps" else "warning", "claims", text, f"{README}:{said.line}")]


def _early(name: str, cells: Sequence[Said], hits: dict[Said, list[str]]) -> list[Finding]:
    """A column that by its name is the score, and in the logs is only one of the weights in training."""
    if not cells or cells[0].kind != "bpb" or _EARLY.search(re.sub(r"[_-]", " ", name)):
        return []
    if not all(set(hits[c]) == {"a training score"} for c in cells):
        return []
    return [Finding("warning", "claims", f"README: {cells[0].text} is a score of the weights in training", f"{README}:{cells[0].line}")]


def _of_all(said: Said, runs: Sequence[Run], seeds: int) -> bool:
    """Whether it is the mean of something that every log has, or as many logs as there are seeds."""
    logged = [{name: (value, half) for name, value, half in _logged(r, said.kind)} for r in runs]
    for name in {name for entry in logged for name in entry}:
        found = [entry[name] for entry in logged if name in entry]
        mean, half = statistics.fmean(value for value, _ in found), max(half for _, half in found)
        if len(found) in (len(runs), seeds) and any(equal(claim, mean, half) for claim in said.claims):
            return True
    return False


def _check_text(lines: Sequence[str], runs: Sequence[Run], claims: Claims) -> list[Finding]:
    """Prose names the scores of others, too: a value that is in no log contradicts them only where the README opens with it as its own."""
    borne, open_, found = [], [], []
    ours = select(runs, claims)
    for number, line in enumerate(lines, 1):
        for said in _of_text(line, number):
            logged = [v for r in ours for v in _logged(r, said.kind)]
            if _of_all(said, ours, claims.seed_count) or any(_matches(said, _logged(r, said.kind)) for r in runs):
                borne.append(said)
            elif said.own and logged and max(claims.seed_count, 1) <= sum(bool(r.finals) for r in ours):
                found.append(_contradiction(said, logged, _flatters(said, logged)))
            elif logged:
                open_.append(said)
    return [*found, *_summary("the text", borne, open_)]


def _of_text(line: str, number: int) -> Iterator[Said]:
    for kind, pattern in _TEXT if not line.strip().startswith("|") else ():
        for match in pattern.finditer(line):
            digits = Decimal(match[2].strip(",").replace(",", ""))
            if digits == CAP_BYTES:
                continue
            name = re.sub(r"\s+", " ", match[1])
            claim = Claim(name, float(digits), 10.0 ** int(digits.as_tuple().exponent or 0), match[2])
            yield Said(kind, name, None, (claim,), number, False, own=(o := _OWN.match(line)) is not None and o.end() == match.end(1))
