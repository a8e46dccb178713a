"""submission.json, as it comes: what it claims, and where it is not what it should be."""

import json
import re
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from golf_jax.config.base import repeated
from golf_jax.proof.logs import read_text


@dataclass(frozen=True)
class Claim:
    """A number as claimed; `unit` is the weight of its last printed digit."""

    name: str
    value: float
    unit: float
    text: str


@dataclass
class Claims:
    """What one submission.json says. problems: (field, what is wrong with it)."""

    file: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    readable: bool = False
    mean_over: int = 0
    """Seeds that the README's own score is a mean over, as it says."""

    def number(self, *names: str) -> Claim | None:
        """The first of `names` that holds a number."""
        return _number(self.fields, names)

    def of_seed(self, seed: int, *names: str) -> Claim | None:
        return _number(self.per_seed.get(seed, {}), names)

    @property
    def per_seed(self) -> dict[int, dict[str, Any]]:
        """Results by seed, from `seed_results` as an object or as a list of objects with a seed."""
        results = next((self.fields[n] for n in ("seed_results", "results_by_seed", "per_seed") if n in self.fields), None)
        pairs: list[tuple[Any, Any]] = []
        if isinstance(results, dict):
            pairs = list(results.items())
        elif isinstance(results, list):
            pairs = [(r.get("seed"), r) for r in results if isinstance(r, dict)]
        found = {}
        for key, entry in pairs:
            match = re.fullmatch(r"(?:seed[_ ]?)?(\d{1,12})", str(key).strip(), re.I)
            if match and isinstance(entry, int | Decimal) and not isinstance(entry, bool):
                entry = {"val_bpb": entry}
            if match and isinstance(entry, dict):
                found[int(match[1])] = entry
        return found

    @property
    def seeds(self) -> list[int]:
        """Seeds named one by one, as claimed (repetitions kept)."""
        listed = self.fields.get("seeds")
        if isinstance(listed, list) and listed:
            return [int(s) for s in listed if re.fullmatch(r"\d{1,12}", str(s).strip())]
        return list(self.per_seed)

    @property
    def seed_count(self) -> int:
        """How many seeds are claimed: by number, or by `3-seed mean` in the texts. 0: nothing is said."""
        said = seeds_said(" ".join(str(self.fields.get(n, "")) for n in ("blurb", "name", "technique_summary")), "|val")
        listed = self.fields.get("seeds")
        if isinstance(listed, int) and not isinstance(listed, bool) and 0 < listed < 100:
            said.append(listed)
        return max([len(set(self.seeds)), self.mean_over, *said])

    @property
    def non_record(self) -> bool:
        return "non" in str(self.fields.get("track", "")).lower().replace("-", "_").split("_")


def seeds_said(text: str, more: str = "") -> list[int]:
    """The numbers in `3-seed mean`, `five seed average`; more: words that may follow besides, as a pattern."""
    words = {"three": 3, "five": 5}
    return [words.get(n.lower()) or int(n) for n in re.findall(rf"\b(\d|three|five)[- ]seed (?:mean|average|avg{more})", text, re.I)]


def read_claims(path: Path, name: str) -> Claims:
    """Reads a submission.json; what is wrong with the file itself goes into `problems`. Decimals keep the digits they are written
    with: 1.0640 says more than 1.064."""
    claims = Claims(name)
    text = read_text(path).lstrip("\ufeff").lstrip()

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        claims.problems.extend(f"{again} is there twice, the last one is read" for again in repeated(pairs)[:4])
        return dict(pairs)

    try:
        value, end = json.JSONDecoder(parse_float=_decimal, parse_constant=str, object_pairs_hook=fields).raw_decode(text)
    except (ValueError, RecursionError) as error:
        claims.problems.append(f"not JSON: {error}")
        return claims
    if text[end:].strip():
        claims.problems.append(f"text after the JSON object: {text[end:].strip()[:40]!r}")
    if not isinstance(value, dict):
        claims.problems.append(f"holds {type(value).__name__}, not an object")
        return claims
    claims.fields, claims.readable = value, True
    for key in ("val_bpb", "val_loss", "bytes_total", "bytes_code", "artifact_bytes"):
        if isinstance(value.get(key), str):
            claims.problems.append(f"{key} is a string: {value[key][:40]!r}")
    if value.get("val_bpb", value.get("mean_val_bpb", 0)) is None:
        claims.problems.append("val_bpb is null")
    return claims


def _decimal(text: str) -> Decimal | str:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent beyond all bounds
        return text


def _number(fields: dict[str, Any], names: tuple[str, ...]) -> Claim | None:
    for name in names:
        value = fields.get(name)
        if isinstance(value, str) and re.fullmatch(r"\d{1,3}(?:,\d{3})+|\d{1,15}(?:\.\d{1,12})?", value.strip()):
            value = Decimal(value.strip().replace(",", ""))
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            continue
        value = Decimal(value)
        if value.adjusted() < 15:
            return Claim(name, float(value), 10.0 ** max(int(value.as_tuple().exponent), -20), str(value))
    return None
