"""A records folder: claims against logs, seeds, copies, code, and submission.json as it comes."""

import base64
import json
import lzma
import random
import shutil
import tracemalloc
import zlib

import brotli
import pytest
from made_logs import BYTES, SCRIPT, bpb_of, log, records_folder

from golf_jax.config import GolfError
from golf_jax.proof.compare import check_significance
from golf_jax.proof.folder import check_shared_logs, check_submission, read_submission, submissions, unwrap


def check(path):
    return check_submission(read_submission(path))


def texts(path, rule, *status):
    return [f.text for f in check(path) if f.rule == rule and f.status in status]


def test_a_clean_folder_raises_no_alarm(tmp_path):
    found = check(records_folder(tmp_path / "clean", hessians=None))
    assert [f for f in found if f.status in ("fail", "warning")] == []
    assert {f.rule for f in found if f.status == "pass"} >= {"implied bytes", "bytes", "code", "seeds", "settings", "claims"}


@pytest.mark.parametrize(
    "claims, word",
    [
        ({"val_bpb": 1.05}, "val_bpb 1.05 is in no log"),
        ({"val_bpb": 1.1371}, "is the training score"),
        ({"bytes_total": 15_000_001}, "the logs' totals are"),
        ({"seeds": [42, 42, 1337]}, "claimed twice"),
        ({"seeds": [42, 1337, 2025, 7]}, "4 seeds are claimed, 3 finished runs in the logs, none of seed 7"),
        ({"seeds": None, "seed_results": None, "blurb": "the 5-seed mean is good"}, "5 seeds are claimed"),
        ({"seed_results": {"42": {"val_bpb": 1.05}}}, "seed 42: val_bpb 1.05 is in no log"),
    ],
)
def test_claims_that_the_logs_do_not_bear_out(tmp_path, claims, word):
    path = records_folder(tmp_path / "f", claims=claims)
    assert any(word in t for rule in ("claims", "seeds") for t in texts(path, rule, "fail"))


@pytest.mark.parametrize(
    "claims, word",
    [
        ({"bytes_total": 15_800_000}, "the model without its code"),
        ({"val_loss": 1.1195}, "in bits per byte, not nats per token"),
        ({"val_bpb": "1.1195"}, "val_bpb is a string"),
        ({"val_bpb": None, "mean_val_bpb": 1.1195, "seeds": [42, 1337, 7]}, "seed 7 is claimed, the logs are of seed 2025 instead"),
    ],
)
def test_claims_that_are_only_untidy(tmp_path, claims, word):
    path = records_folder(tmp_path / "f", claims=claims)
    assert any(word in t for rule in ("claims", "seeds") for t in texts(path, rule, "warning"))


def test_a_compliance_claim_falls_with_its_rule(tmp_path):
    path = records_folder(tmp_path / "f", phases=(("legal_ttt", 700_000),))
    assert "compliance.eval_under_600s is claimed true, evaluation clock fails" in texts(path, "claims", "fail")


def test_the_digits_of_a_claim_count(tmp_path):
    """1.11900 as written claims more than 1.119."""
    path = records_folder(tmp_path / "f")
    text = (path / "submission.json").read_text()
    for written, fails in (("1.119", 0), ("1.11900", 1)):
        (path / "submission.json").write_text(text.replace('"val_bpb": 1.1195', f'"val_bpb": {written}', 1))
        assert len([t for t in texts(path, "claims", "fail") if t.startswith("val_bpb")]) == fails


def test_copied_logs(tmp_path):
    path = records_folder(tmp_path / "f", losses={42: 1.89, 1337: 1.89, 7: 1.89}, claims={"seed_results": None})
    shutil.copy(path / "train_seed42.log", path / "train.log")  # the usual second name
    assert texts(path, "seeds", "fail") == [] and "train.log is train_seed42.log again, counted once" in texts(path, "seeds", "pass")
    (path / "train_seed1337.log").write_bytes((path / "train_seed42.log").read_bytes().replace(b"\n", b"\r\n"))
    assert any("again, under another seed" in t for t in texts(path, "seeds", "fail"))
    (path / "train_seed1337.log").write_text((path / "train_seed42.log").read_text().replace("seed: 42", "seed: 1337"))
    assert any("same losses at every step" in t for t in texts(path, "seeds", "fail"))


def test_a_log_that_two_submissions_ship(tmp_path):
    one, two = records_folder(tmp_path / "one"), records_folder(tmp_path / "two", losses={42: 1.89, 7: 1.88, 8: 1.88})
    first, second = read_submission(one), read_submission(two)
    (finding,) = check_shared_logs(first, [first, second])
    assert finding.status == "warning" and finding.source == "train_seed42.log" and "two: train_seed42.log" in finding.text


def test_settings_that_differ(tmp_path):
    path = records_folder(tmp_path / "f")
    file = path / "train_seed42.log"
    file.write_text(file.read_text().replace("matrix_lr: 0.02", "matrix_lr: 0.03"))
    assert texts(path, "settings", "warning") == ["1 settings differ between the runs: matrix_lr: 0.02, 0.03"]


def test_code_in_the_log_and_code_that_ships(tmp_path):
    path = records_folder(tmp_path / "f")
    (path / "train_gpt.py").write_text(SCRIPT.replace("x + 3", "x - 3"))
    assert texts(path, "code", "warning") == ["2 lines differ from the shipped train_gpt.py"]
    packed = base64.b85encode(lzma.compress((SCRIPT + "\n#" + "".join(random.Random(0).choices("abcdefgh", k=4000))).encode())).decode()
    wrapper = f"import base64, lzma\nexec(lzma.decompress(base64.b85decode({packed!r})))\n"
    assert unwrap(wrapper).startswith(SCRIPT) and unwrap(SCRIPT) == SCRIPT and unwrap("def (") == "def ("


@pytest.mark.parametrize("pack", [lzma.compress, zlib.compress, brotli.compress])
def test_a_script_unpacks_to_no_more_than_a_program(pack):
    """Zeros behind a program's first line: of 50 MB, hardly more than the limit is ever in memory."""
    packed = base64.b85encode(pack(b"import os\n" + random.Random(0).randbytes(2_000).hex().encode() + bytes(50_000_000))).decode()
    wrapper = f"exec(unpack({packed!r}))\n"
    tracemalloc.start()
    assert unwrap(wrapper) == wrapper
    assert unwrap("a\n" * 1_000_000) == "a\n" * 1_000_000
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_code_beside_the_script_counts(tmp_path):
    path = records_folder(tmp_path / "f", model=15_990_000, script=SCRIPT + "\nimport tables")
    (path / "tables.py").write_text("x = 1\n" * 2_000)
    (path / "unused.py").write_text("x = 1\n" * 2_000)
    assert texts(path, "bytes", "warning") == [
        "12,000 bytes of code beside train_gpt.py are not in the log's total: tables.py 12,000; with them it is over the cap"
    ]


def test_a_non_record_run_has_no_clock(tmp_path):
    path = records_folder(tmp_path / "f", claims={"track": "non-record-16mb"}, stop_ms=4_000_000)
    assert texts(path, "training clock", "fail", "warning") == []


@pytest.mark.parametrize(
    "change, status, word",
    [
        (lambda t: "\ufeff" + t, "pass", "is the mean of 3 runs'"),
        (lambda t: t + "\n// done", "warning", "text after the JSON object"),
        (lambda t: t.replace("{", '{"val_bpb": 1.0, ', 1), "warning", "val_bpb is there twice"),
        (lambda t: t[: len(t) // 2], "fail", "not JSON"),
        (lambda t: "[1, 2]", "fail", "holds list"),
        (lambda t: t.replace("15860", "1e999999999"), "pass", "is the mean of 3 runs'"),
        (lambda t: "[" * 100_000, "fail", "not JSON"),
        (
            lambda t: '{"val_bpb": NaN, "seeds": {"a": 1}, "seed_results": [3, null, {"seed": "x"}], "bytes_total": true}',
            "warning",
            "is a string",
        ),
    ],
    ids=["mark", "trailing", "twice", "cut", "list", "huge", "deep", "odd types"],
)
def test_submission_json_as_it_comes(tmp_path, change, status, word):
    path = records_folder(tmp_path / "f", code=60_000)
    (path / "submission.json").write_text(change((path / "submission.json").read_text()), encoding="utf-8")
    assert any(word in t for t in texts(path, "claims", status))


def test_nothing_to_check(tmp_path):
    with pytest.raises(GolfError, match="neither a log"):
        read_submission(tmp_path)
    (tmp_path / "submission.json").write_text(json.dumps({"val_bpb": 1.1}))
    assert [f.status for f in check(tmp_path)] == ["not checkable"]


def test_significance(tmp_path):
    def runs(name, *losses, **figures):
        return read_submission(records_folder(tmp_path / name, losses=dict(zip((42, 1337, 2025), losses, strict=True)), **figures)).runs

    base, better = runs("base", 1.8900, 1.8911, 1.8895), runs("better", 1.8800, 1.8809, 1.8796)
    assert [f.status for f in check_significance(better, base, "base")] == ["pass", "pass"]  # unpaired and paired
    assert check_significance(runs("bit", 1.8870, 1.8881, 1.8866), base, "base")[0].status == "fail"
    named = {"tokens": 47_851_520, "settings": "  caseops_enabled: True"}  # another tokenizer
    other = runs("other", 2.4500, 2.4512, 2.4494, count=BYTES, **named)
    assert "carried over by bits per byte" in check_significance(better, other, "other")[0].text
    miscounted = runs("miscounted", 2.4500, 2.4512, 2.4494, count=1.1 * BYTES, **named)
    assert check_significance(better, miscounted, "other")[0].status == "not checkable"
    assert check_significance(better[:1], base, "base")[0].status == "not checkable"


@pytest.mark.parametrize("seed", range(40))
def test_mangled_folders_never_crash(tmp_path, seed):
    rng = random.Random(seed)
    path = records_folder(tmp_path / "f")
    ways = (
        lambda b: b[: rng.randrange(len(b))],
        lambda b: b.decode().encode("utf-16"),
        lambda b: b.replace(b".", b"e99").replace(b"1", b"9" * 30),
        lambda b: b"\n".join(rng.sample(lines := b.split(b"\n"), len(lines))),
        lambda b: bytes(rng.randrange(256) if rng.random() < 0.02 else x for x in b),
        lambda b: b + b,
    )
    for file in path.iterdir():
        if rng.random() < 0.7:
            file.write_bytes(rng.choice(ways)(file.read_bytes()))
    try:
        found = check(path)
    except GolfError:
        return
    assert all(f.status in ("pass", "fail", "warning", "not checkable") and f.text for f in found)


def test_logs_of_published_runs(shared):
    """What is known of six published pull requests is found, and nothing on the clean one."""
    known = {
        "pr549": set(),
        "pr1182": {("fail", "evaluation clock", "1011.2 s"), ("fail", "seeds", "3 seeds are claimed, 1 finished")},
        "pr2005": {("warning", "Hessian clock", "601.1 s"), ("warning", "claims", "the model without its code")},
        "pr562": {("fail", "evaluation clock", "602.8 s"), ("fail", "C3", "ttt:epoch 1/22")},
        "pr1143": {("fail", "implied bytes", "157,311,76")},
        "pr2071": {("fail", "implied bytes", "164,594,39")},
    }
    for name, facts in known.items():
        alarms = [(f.status, f.rule, f.text) for f in check(shared / "logs" / name) if f.status in ("fail", "warning")]
        for status, rule, text in facts:
            assert any(a[:2] == (status, rule) and text in a[2] for a in alarms), (name, rule)
        allowed = {"pr549": set(), "pr562": {"seeds", "claims"}}.get(name, set()) | {rule for _, rule, _ in facts}
        assert {rule for _, rule, _ in alarms} <= allowed


def test_a_score_printed_without_its_nats_is_in_the_log(tmp_path):
    path = records_folder(tmp_path / "f", claims={"val_bpb": 0.9054}, after="final_ngram neural_bpb:1.1301 blended_bpb:0.9054")
    assert "val_bpb 0.9054 is the mean of 3 runs' final_ngram blended_bpb (without nats)" in texts(path, "claims", "pass")


def test_what_an_ablation_breaks_is_no_fault_of_the_submission(tmp_path):
    one = {"val_bpb": round(bpb_of(1.89), 4), "seeds": None, "seed_results": None, "compliance": None}
    path = records_folder(tmp_path / "f", losses={42: 1.8900}, claims=one, hessians=None)
    (path / "ablation.log").write_text(log(42, 1.93, model=16_500_000))
    assert not texts(path, "bytes", "fail") and "no claim is about this run" in texts(path, "bytes", "warning")[0]
    (path / "train_seed7.log").write_text(log(7, 1.93, model=16_500_000))  # another seed is no ablation
    assert len(texts(path, "bytes", "fail")) == 1


def test_folders_without_the_usual_names(tmp_path):
    """Claims and program under longer names, a seed that only the claims tell to be one, logs without claims."""
    path = records_folder(tmp_path / "all/a", losses={42: 1.8900}, claims={"seeds": [42], "seed_results": None}, source="")
    (path / "submission.json").rename(path / "submission_ternary.json")
    (path / "train_gpt.py").rename(path / "train_gpt_cuda.py")
    unnamed = (path / "train_seed42.log").read_text().replace("  seed: 42\n", "")
    (path / "train_seed42.log").unlink()
    (path / "log_42.txt").write_text(unnamed)
    (tmp_path / "all/b/logs").mkdir(parents=True)
    (tmp_path / "all/b/logs/train.log").write_text(unnamed)
    (tmp_path / "all/b/README.md").write_text("no table\n")
    (tmp_path / "all/notes").mkdir()
    (tmp_path / "all/notes/ideas.txt").write_text("no run\n")
    s = read_submission(path)
    assert (s.claims.file, s.runs[0].seed, bool(s.script)) == ("submission_ternary.json", 42, True)
    assert submissions(tmp_path / "all") == {path, tmp_path / "all/b"}
