"""README.md against the logs: every value that it names, and no alarm about what is somebody else's."""

import time

import pytest
from made_logs import readme, records_folder

from golf_jax.proof.folder import check_submission, read_submission
from golf_jax.proof.readme import seeds_claimed

LOSSES = {42: 1.8900, 1337: 1.8910, 2025: 1.8896}


def found(tmp_path, **changes):
    path = records_folder(tmp_path / "f", losses=LOSSES, hessians=None)
    readme(path, LOSSES, **changes)
    return [f for f in check_submission(read_submission(path)) if f.text.startswith("README")]


def test_a_true_readme(tmp_path):
    """Nine cells, the mean, the headline; the baseline's score is somebody else's, its gain a difference."""
    assert [(f.status, f.text) for f in found(tmp_path)] == [
        ("pass", "README: 9 values of a table are in the logs (Steps, Sliding BPB, Artifact)"),
        ("pass", "README: 1 value of the text is in the logs (val_bpb)"),
        ("not checkable", "README: no line of the logs has val_bpb 1.2244"),
    ]


@pytest.mark.parametrize(
    "changes, status, word",
    [
        ({"s42_bpb": "1.1090"}, "fail", "seed 42: Sliding BPB 1.1090 is not in the log; final_int6_sliding_window"),
        ({"s42_bpb": "1.1290"}, "warning", "seed 42: Sliding BPB 1.1290 is not in the log"),
        ({"s42_bpb": "1.1"}, None, ""),  # as far as it is printed
        ({"s42_bpb": "~1.1090"}, None, ""),
        ({"s1337_bytes": "15,700,000"}, "fail", "seed 1337: Artifact 15,700,000 is not in the log; the total is"),
        ({"s1337_bytes": "15.80 MB"}, None, ""),  # the model
        ({"s2025_steps": "6,900"}, "warning", "seed 2025: Steps 6,900 is not in the log; the last step is 7,059"),
        ({"mean_bpb": "1.1090"}, "fail", "Sliding BPB 1.1090 is not the mean of the 3 seeds beside it"),
        ({"head": "1.0500"}, "fail", "val_bpb 1.0500 is not in the log"),
        ({"s42_bpb": "1.0500", "s1337_bpb": "1.0500", "s2025_bpb": "1.0500", "mean_bpb": "1.0500"}, "fail", "seed 42: Sliding BPB 1.0500"),
    ],
)
def test_values_that_the_logs_do_not_bear_out(tmp_path, changes, status, word):
    alarms = [f for f in found(tmp_path, **changes) if f.status in ("fail", "warning")]
    assert bool(alarms) == bool(status) and all(f.status == status for f in alarms)
    assert any(word in f.text and f.source.startswith("README.md:") for f in alarms) or not status


def test_what_is_not_about_these_runs_is_left_alone(tmp_path):
    path = records_folder(tmp_path / "f", losses=LOSSES, hessians=None)
    (path / "README.md").write_text(
        "| Seed | This PR | PR #1 bpb | gain (bpb) |\n|---|---|---|---|\n| 42 | 1.0 | 1.05 | 0.01 |\n\n"
        "```\n| seed | val_bpb |\n|---|---|\n| 42 | 1.01 |\n```\n\n"
        "| Setting | val_bpb |\n|---|---|\n| lr 0.1 | 1.01 |\n\n"
        "| Metric | Seed 42 | Seed 1337 |\n|---|---|---|\n| steps | 7059 | 7,059 |\n"
    )
    readings = [f for f in check_submission(read_submission(path)) if f.text.startswith("README")]
    assert [(f.status, f.text) for f in readings] == [("pass", "README: 2 values of a table are in the logs (steps)")]


def test_seeds_that_only_the_readme_claims(tmp_path):
    path = records_folder(tmp_path / "f", losses=LOSSES, hessians=None, claims={"seeds": None, "seed_results": None})
    readme(path, LOSSES)
    (path / "train_seed42.log").write_text("")
    findings = {(f.rule, f.status): f.text for f in check_submission(read_submission(path))}
    assert findings["seeds", "fail"] == "3 seeds are claimed, 2 finished runs in the logs"
    assert findings["input", "warning"] == "no line of training or scoring in it" and ("claims", "fail") not in findings


@pytest.mark.parametrize("bpb, status", [("1.1194", "pass"), ("1.0500", "warning")])
def test_of_a_table_of_metrics_the_column_of_this_run_is_read(tmp_path, bpb, status):
    """Beside the column of another program and remarks."""
    path = records_folder(tmp_path / "f", losses=LOSSES, hessians=None)
    (path / "README.md").write_text(
        f"| Metric | Baseline | This run | Notes |\n|---|---|---|---|\n| val_bpb | 1.2244 | {bpb} | three seeds |\n"
    )
    (finding,) = (f for f in check_submission(read_submission(path)) if f.text.startswith("README"))
    assert finding.status == status


def test_long_lines_of_blanks_and_hashes_are_read_at_once():
    begin = time.process_time()
    assert seeds_claimed("\n".join(character * 1_900 for character in "  \t#>" * 20)) == 0  # 5 s where each is read from every place
    assert time.process_time() - begin < 1
