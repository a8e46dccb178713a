"""One run against the rules: what holds passes, and each way to break a rule is told by its name and figure."""

import pytest
from made_logs import BYTES, TOKENS, log

from golf_jax.proof.logs import parse_log
from golf_jax.proof.rules import check_run

SP8192 = "  vocab_size: 8192\n  tokenizer_path: ./data/tokenizers/fineweb_8192_bpe.model\n  caseops_enabled: False"


def found(text: str, rule: str, **options):
    (run,) = parse_log(text, "train.log")
    return [f for f in check_run(run, **options) if f.rule == rule]


def test_a_clean_run_passes_everything():
    (run,) = parse_log(log(hessians=None), "train.log")
    checked = check_run(run)
    assert [f.rule for f in checked] == ["implied bytes", "coverage", "bytes", "training clock", "evaluation clock"]
    assert {f.status for f in checked} == {"pass"} and all(f.source.startswith("train.log:") for f in checked)


@pytest.mark.parametrize(
    "figures, word",
    [
        ({"count": 1.1 * BYTES}, "wrong denominator, times 1.1000: the tokens are those of sp1024"),
        ({"tokens": TOKENS // 5}, "cut validation set: 20.0 % of sp1024"),
        ({"tokens": 64_000_000}, "foreign text: sp1024 has 62,021,845 tokens"),
        ({"tokens": 47_851_520, "count": 1.089 * BYTES, "settings": SP8192}, "CaseOps shards are counted with the plain tokenizer's table"),
        ({"tokens": 61_020_160, "count": 1.04 * BYTES, "settings": "  tokenizer_path: mine.vocab"}, "belongs to no known tokenizer"),
    ],
    ids=["denominator", "cut", "foreign", "caseops", "unknown tokenizer"],
)
def test_ways_to_a_wrong_byte_count_are_told_apart(figures, word):
    (finding,) = found(log(**figures), "implied bytes")
    assert finding.status == "fail" and word in finding.text


def test_no_token_count():
    text = log().replace(f"tokens:{TOKENS}", "")
    assert found(text, "implied bytes")[0].status == "pass"  # the tokenizer is named, and its bytes per token are known
    nameless = text.replace("tokenizer_path", "").replace("vocab_size", "")
    assert found(nameless, "implied bytes")[0].status == "not checkable"
    assert found(log(count=1.2 * BYTES).replace(f"tokens:{TOKENS}", ""), "implied bytes")[0].status == "fail"


def test_coverage():
    assert found(log(extra="ttt_phased: total_docs:10000 prefix_docs:2000"), "coverage")[0].text.startswith("10,000 documents")
    assert [f.status for f in found(log(tokens=TOKENS // 5), "coverage")] == ["fail"]


def test_cap():
    over = log(model=15_960_000)
    assert found(over, "bytes")[0].status == "fail" and "20,000 over" in found(over, "bytes")[0].text
    assert found(over, "bytes", shipped_code=17_000)[0].status == "warning"  # the log counted code that ships smaller
    assert found(log(total="Total submission size int6: 15000000 bytes"), "bytes")[0].status == "warning"  # not the sum of its parts


def test_clocks():
    assert found(log(stop_ms=600_080), "training clock")[0].status == "pass"  # the step under way
    assert found(log(stop_ms=601_400), "training clock")[0].status == "fail"
    assert found(log(stop_ms=588_000, hessians=13.1), "Hessian clock")[0].status == "warning"
    assert found(log(stop_ms=588_000, hessians=11.9), "Hessian clock")[0].status == "pass"
    slow = (("final_int6_roundtrip", 90_000), ("legal_ttt", 580_000))
    assert "670.0 s in 2 phases" in found(log(phases=slow), "evaluation clock")[0].text
    assert found(log(phases=slow), "evaluation clock")[0].status == "fail"
    assert found(log(phases=slow, after="total_eval_time:700.0s"), "evaluation clock")[0].text == "700.0 s by the log's own total"
    adapted = log(extra="", after="").replace("final_int6_roundtrip val", "ttt:done time=560000ms\nfinal_int6_roundtrip val")
    assert found(adapted, "evaluation clock")[0].status == "fail"
    assert found(log(stop_ms=2_400_000, world_size=2), "training clock")[0].status == "not checkable"
    assert found(log(stop_ms=(9e9).__int__()), "training clock", record=False)[0].status == "pass"


@pytest.mark.parametrize(
    "rule, line",
    [
        ("C3", "ttt:epoch 1/22 loss=2.2509"),
        ("C3", "prequant_ttt:start epochs=21 lr=0.0005"),
        ("C3", "gptq:calibrating on validation data"),
        ("C4", "ngram_two_pass: starting Pass 1"),
        ("C4", "legal_ttt: 3 passes, 7752704 tokens/rank"),
        ("C2", "ngram_cache val_loss:3.3559 (order=5)"),
        ("C2", "ppm_mix bytes=27048621 mix_bpb=0.903306"),
        ("C1", "final_slot steps:24 lr:0.024"),
        ("C1", "ngram_tilt:hints total=47851520 gated=9 token_gate=1 within_gate=5 word_gate=3 agree2plus=0"),
    ],
)
def test_methods_that_were_ruled_out(rule, line):
    assert [f.status for f in found(log(extra=line), rule)] == ["fail"]


@pytest.mark.parametrize(
    "line",
    [
        "  ttt_epochs: 3\n  slot_enabled: False\n  ppm_enabled: False\n  ngram_cache: 0",
        "slot_lr:0.0 ppm_order:5",
        "evaluation: order=12 two_pass=False stride=64",
        "ttt_sliding:start chunks=1893 chunk_tokens=32768 ttt_epochs=3",
        "ngram_tilt:hints total=47851520 gated=628130 token_gate=628130 within_gate=0 word_gate=0 agree2plus=0",
        "gptq:calibrated 68 layers in 3.8s",
        "ttt_lora:warming up compile (random tokens, no val data)",
    ],
)
def test_legal_methods_and_settings_are_no_alarm(line):
    assert not [f for rule in ("C1", "C2", "C3", "C4", "C1-C4") for f in found(log(extra=line), rule)]


def test_scores_too_good_for_their_method():
    text = log(after="final_sliding val_loss:1.60000000 val_bpb:0.94756000")
    assert found(text, "C1-C4")[0].status == "warning"


def test_scored_again_after_adaptation():
    scored = "ttt:done val_loss=1.88 val_bpb=1.113 elapsed=9s\nfinal_ttt_T1.0 val_loss:1.880 val_bpb:1.113"
    text = log(after=scored + "\nfinal_ttt_T0.98 val_loss:1.870 val_bpb:1.107")
    assert not found(log(after=scored), "C4")
    assert found(text, "C4")[0].status == "fail"
