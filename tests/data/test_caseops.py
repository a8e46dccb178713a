"""CaseOps: every string comes back, bytes are those of the original, what no encoder wrote is refused."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from golf_jax.config import GolfError
from golf_jax.data.caseops import ALLCAPS, CAPNEXT, ESC, OPERATORS, TITLE, decode, encode, original_bytes

LIKELY = st.text(st.sampled_from(f"aAbBzZ19 -'éÉß日😀\n\t\x00{OPERATORS}\ue000\ufeff"), max_size=12)
ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


@settings(max_examples=400, deadline=None)
@given(LIKELY | ANY)
@example("İstanbul ﬁ Ⅷ ＡｂＣ")
def test_every_text_comes_back_and_its_bytes_are_counted(text):
    coded = encode(text)
    assert decode(coded) == decode(coded, strict=False) == text
    assert not any(letter.isascii() and letter.isupper() for letter in coded)
    size = len(text.encode())
    assert sum(original_bytes(coded)) == size  # character by character, also between an escape and what it escapes
    assert list(original_bytes([coded])) == [size]


@pytest.mark.parametrize(
    ("text", "coded"),
    [
        ("NASA", f"{ALLCAPS}nasa"),
        ("A", f"{TITLE}a"),
        ("iPhone", f"i{CAPNEXT}phone"),
        ("McDonald", f"{TITLE}mc{CAPNEXT}donald"),
        ("ABc", f"{TITLE}a{CAPNEXT}bc"),
        ("USA1 B-52", f"{ALLCAPS}usa1 {TITLE}b-52"),
        (f"x{TITLE}Y", f"x{ESC}{TITLE}{TITLE}y"),
    ],
)
def test_words_are_coded_as_the_record_codes_them(text, coded):
    assert encode(text) == coded


@pytest.mark.parametrize(
    "coded",
    [TITLE, ESC, f"a{CAPNEXT}", f"{TITLE}1", f"{ALLCAPS} x", f"x{TITLE}y", f"{TITLE}{ALLCAPS}a", f"{CAPNEXT}{CAPNEXT}a",
     f"{TITLE}{ESC}{TITLE}a", f"{CAPNEXT}{TITLE}a"],
)  # fmt: skip
def test_what_no_encoder_wrote_is_refused_or_read_as_far_as_it_goes(coded):
    with pytest.raises(GolfError, match="caseops: .* at character"):
        decode(coded)
    assert isinstance(decode(coded, strict=False), str)


@settings(max_examples=300, deadline=None)
@given(LIKELY)
def test_a_text_that_decodes_is_worth_its_bytes_or_refused(coded):
    """The decoder on anything: it refuses, or what it gives can be coded again."""
    try:
        text = decode(coded)
    except GolfError:
        return
    assert decode(encode(text)) == text


def test_the_records_own_vectors(shared):
    units = np.load(shared / "reference/pr2135/units.npz")
    text = lambda name: units[name].tobytes().decode()  # noqa: E731
    cases = sorted({name.split("/")[0] for name in units.files if name.startswith("caseops")})
    assert len(cases) > 30
    for case in cases:
        given_text = text(f"{case}/in/text")
        if "bad" in case:
            with pytest.raises(GolfError):
                decode(given_text)
        elif "decode" in case:
            assert decode(given_text) == text(f"{case}/out/text")
        else:
            assert encode(given_text) == text(f"{case}/out/text") and decode(encode(given_text)) == given_text
