"""Logs as they come: every encoding, cut, doubled, with their program inside; a number that is read stands on its line."""

import codecs
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_logs import SCRIPT, log

from golf_jax.proof.logs import parse_log, read_text
from golf_jax.proof.rules import headline

WHOLE = log(source=SCRIPT)


def only(text: str):
    (run,) = parse_log(text, "train.log")
    return run


def test_every_number_has_its_line():
    run, lines = only(WHOLE), WHOLE.splitlines()
    assert run.seed == 42 and run.stop.value == pytest.approx(600.05) and run.hessians[0].value == 3.0
    assert [s.kind for s in run.scores] == ["training"] + ["final"] * 4
    assert headline(run).name == "final_int6_sliding_window_exact" and headline(run).loss.value == 1.89
    assert [p[1].value for p in run.phases] == [9.0, 90.0]
    assert (run.totals[0].value, run.models[0].value) == (15_860_000, 15_800_000)
    assert "Total submission" in lines[run.totals[0].line - 1] and "GPTQ" in lines[run.hessians[0].line - 1]
    assert all(f"val_bpb:{s.bpb.value}" in lines[s.line - 1] for s in run.scores)
    assert run.sources == [SCRIPT]


@pytest.mark.parametrize(
    "encode",
    [
        lambda t: codecs.BOM_UTF8 + t.encode(),
        lambda t: codecs.BOM_UTF16_LE + t.replace("\n", "\r\n").encode("utf-16-le"),
        lambda t: t.encode("utf-16-be"),
        lambda t: re.sub("^(?=.)", "1776143360.163 ", t, flags=re.M).encode(),
    ],
    ids=["utf-8 with mark", "utf-16 with CRLF", "utf-16 without mark", "time stamps"],
)
def test_encodings(tmp_path, encode):
    path = tmp_path / "train.log"
    path.write_bytes(encode(log()))
    run, plain = only(read_text(path)), only(log())
    assert run.scores == plain.scores and run.totals == plain.totals and run.stop == plain.stop and run.steps == plain.steps


@pytest.mark.parametrize(
    "spelling",
    [
        "Total submission size: {} bytes",
        "Total submission size quantized+brotli: {} bytes",
        "INT7+zlib model: 15800000 bytes | Total submission: {} bytes",
        "budget:{}/16000000 (15.86/16.00MB) FITS",
        "bytes_total: {}",
    ],
)
def test_spellings_of_the_total(spelling):
    assert only(log(total=spelling)).totals[-1].value == 15_860_000


def test_several_runs_in_one_file():
    runs = parse_log(log(42, 1.89) + log(1337, 1.88), "both.log")
    assert [(r.seed, headline(r).loss.value) for r in runs] == [(42, 1.89), (1337, 1.88)]


def test_the_headline_need_not_come_last():
    run = only(
        log(after="DIAGNOSTIC val_loss:1.1 val_bpb:0.7\nroundtrip_delta val_loss:0.005 val_bpb:0.003\nquantized val_loss:2.0 val_bpb:1.19")
    )
    assert headline(run).loss.value == 1.89


def test_nothing_is_read_where_nothing_is():
    assert parse_log("", "x") == parse_log("hello\n\0\n" + SCRIPT, "x") == []


@given(st.integers(0, len(WHOLE)))
@settings(max_examples=150, deadline=None)
def test_a_cut_log_invents_nothing(cut):
    """Every figure read from a part is one of the whole."""
    whole = only(WHOLE)
    for run in parse_log(WHOLE[:cut], "cut.log"):
        assert {(s.name, s.loss.value, s.bpb.value) for s in run.scores} <= {(s.name, s.loss.value, s.bpb.value) for s in whole.scores}
        assert set(run.totals + run.models + run.hessians) <= set(whole.totals + whole.models + whole.hessians)
