"""One line of a report: what was checked, what came out, from which line, by which rule."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from golf_jax.config.base import escape

Status = Literal["pass", "fail", "warning", "not checkable"]

RULES = {
    "input": "a log is whole, and one run",
    "implied bytes": "bits per byte divide by the text's own bytes: val_loss / (ln 2 * val_bpb) * val_tokens is 151,080,891",
    "coverage": "every target of the official validation set is scored",
    "bytes": "code and compressed model together take at most 16,000,000 bytes",
    "training clock": "training ends within 600 s, up to the step that was under way",
    "Hessian clock": "Hessians read training data, so they end within the 600 s (ruling in PR 677)",
    "evaluation clock": "evaluation takes at most 600 s",
    "hardware": "the clocks are those of 8 H100",
    "data": "no validation document is in the training shards; data and tokenizer are identified by digest",
    "C1-C4": "causal, normalized, scored before trained on, one pass (issue 1017)",
    "C1": "a prediction depends on the artifact and on earlier tokens only (issue 1017)",
    "C2": "a full distribution, fixed before the token is known (issue 1017)",
    "C3": "a token is scored before anything is trained on it (issue 1017)",
    "C4": "one pass, every token scored once (issue 1017)",
    "round trip": "the artifact, read in a fresh process, gives the score again",
    "code": "the code that ran is the code that ships",
    "seeds": "three distinct seeds, each with a log of its own",
    "settings": "all seeds run with the same settings",
    "claims": "submission.json and README say what the logs say",
    "significance": "better than the baseline by 0.005 nats per token at p < 0.01",
}


@dataclass(frozen=True)
class Finding:
    """status, rule (a key of RULES), text with the figures, source (`file:line`, where there is one)."""

    status: Status
    rule: str
    text: str
    source: str = ""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"basis": RULES[self.rule]}


def fold(findings: Iterable[Finding]) -> list[Finding]:
    """Findings that say the same become one, with all their sources."""
    sources: dict[tuple[Status, str, str], list[str]] = {}
    for f in findings:
        sources.setdefault((f.status, f.rule, f.text), []).append(f.source)
    return [Finding(*key, ", ".join(dict.fromkeys(filter(None, where)))) for key, where in sources.items()]


def table(title: str, findings: Sequence[Finding]) -> str:
    """The report for the terminal, in order; below what did not pass stands the rule in full."""
    count = {status: sum(f.status == status for f in findings) for status in get_args(Status)}
    lines = [f"{title}: {', '.join(f'{n} {status}' for status, n in count.items() if n)}"]
    for f in findings:
        lines.append(f"  {f.status:<13} {f.rule:<16} {f.text}" + (f"  [{f.source}]" if f.source else ""))
        if f.status in ("fail", "warning"):
            lines.append(f"  {'':<30} rule: {RULES[f.rule]}")
    return "\n".join([*map(escape, lines), ""])  # names of files and folders, too, may hold what steers a terminal
