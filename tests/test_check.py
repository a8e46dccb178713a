"""The command: what it prints, and its exit status."""

import json

import pytest
from made_logs import log, records_folder

from golf_jax.check import main
from golf_jax.config import GolfError


def test_exit_status_and_report(tmp_path, capsys):
    clean, bad = records_folder(tmp_path / "a/clean", hessians=None), records_folder(tmp_path / "a/bad", model=16_000_000)
    assert main([str(clean)]) == 0
    report = capsys.readouterr().out
    assert report.startswith(f"{clean}: ") and "0 fail" not in report and "  pass          bytes " in report
    assert main([str(tmp_path / "a")]) == 1  # a folder of submissions
    report = capsys.readouterr().out
    assert f"{bad}: " in report and "rule: code and compressed model together take at most 16,000,000 bytes" in report
    (tmp_path / "one.log").write_text(log(hessians=None))
    assert main([str(tmp_path / "one.log"), "--baseline", str(bad)]) == 0


def test_json(tmp_path, capsys):
    path = records_folder(tmp_path / "f", hessians=None)
    main([str(path), "--json", "--baseline", str(path)])
    found = json.loads(capsys.readouterr().out)[str(path)]
    assert {"status", "rule", "text", "source", "basis"} == set(found[0])
    assert found[-1]["rule"] == "significance" and found[-1]["status"] == "fail"  # no better than itself


def test_bad_input(tmp_path):
    (tmp_path / "train.txt").write_text("nothing\n")
    for arguments, word in (([], "nothing to check"), ([str(tmp_path / "no")], "does not exist"), ([str(tmp_path)], "neither a log")):
        with pytest.raises(GolfError, match=word):
            main(arguments)


def test_the_name_of_a_folder_cannot_steer_the_terminal(tmp_path, capsys):
    path = records_folder(tmp_path / "a\x1b[2Jb", hessians=None)
    (path / "train_seed42.log").rename(path / "train_seed42\x1b[2J.log")
    main([str(tmp_path)])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and shown.startswith(str(tmp_path / "a\\x1b[2Jb"))
