"""The challenge's validation set in figures: 50,000 FineWeb documents, as each published tokenizer cuts them."""

import re
from dataclasses import dataclass

from golf_jax.data.verify import OFFICIAL_BYTES, OFFICIAL_DOCUMENTS

CUT = 32_768  # programs cut the last targets off to fill rows: at most one row, of up to this many


@dataclass(frozen=True)
class Family:
    """A tokenizer of the challenge. targets: tokens to predict in the validation set."""

    name: str
    targets: int

    @property
    def bytes_per_token(self) -> float:
        return OFFICIAL_BYTES / self.targets

    def whole(self, tokens: float) -> bool:
        """Whether `tokens` is the validation set, but for the customary cut to whole rows."""
        return self.targets - CUT < tokens <= self.targets + 1


FAMILIES = (
    Family("sp1024", 62_021_845),
    Family("sp4096", 45_516_000),  # known after the cut only: 45,508,608 and 45,514,752 in published logs
    Family("sp8192", 40_540_802),
    Family("CaseOps", 47_853_343),
    Family("bytes", OFFICIAL_BYTES + OFFICIAL_DOCUMENTS),
)


def by_tokens(tokens: float) -> Family | None:
    return next((f for f in FAMILIES if f.whole(tokens)), None)


def by_words(tokenizer: str, vocab_size: str, caseops: str = "") -> Family | None:
    """The family that a program's settings name: path of tokenizer or data, size of the vocabulary, whether CaseOps is on."""
    name = tokenizer.lower()
    if "caseops" in name or caseops == "True":
        return _named("CaseOps")
    match = re.search(r"(?:fineweb_|fineweb10b_sp|/sp)(1024|4096|8192)\b|(?:^|\D)(1024|4096|8192)_bpe", name)
    if match:
        return _named(f"sp{match[1] or match[2]}")
    return None if name else _named(f"sp{vocab_size}")


def _named(name: str) -> Family | None:
    return next((f for f in FAMILIES if f.name == name), None)
