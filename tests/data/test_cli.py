"""`python -m golf_jax.data`: the commands run, teach, and never show a traceback for a user's mistake."""

import sys

import pytest

from golf_jax import cli
from golf_jax.data.__main__ import main


def test_build_then_verify(tmp_path, capsys):
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"File {number} holds {number**5} and {number**7:x}.")
    assert main(["build", str(tmp_path), "--out", str(tmp_path / "data"), "--vocab-size", "300", "--val-every", "5"]) == 0
    assert "--data.train" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "data")]) == 0
    assert capsys.readouterr().out.endswith("sound\n")
    (tmp_path / "data/val_000000.bin").write_bytes(b"")
    assert main(["verify", str(tmp_path / "data")]) == 1
    assert "PROBLEM: " in capsys.readouterr().out


def test_a_screen_that_is_full_ends_no_build_and_is_no_fault_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "lines.jsonl").write_text("".join(f'{{"text": "Line {n} holds {n**5} and {n**7:x}."}}\n' for n in range(60)))
    monkeypatch.setattr("sys.stdout", open("/dev/full", "w"))
    with pytest.raises(OSError, match="No space left"):  # of the last line, which says how to train: `cli.run` tells it
        main(["build", str(tmp_path / "lines.jsonl"), "--out", str(tmp_path / "data"), "--vocab-size", "300", "--val-every", "5"])
        sys.stdout.flush()
    assert (tmp_path / "data/manifest.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "no-such-file.txt", "--out", "new"], "error: no-such-file.txt: cannot be read"),
        (["verify", "no-such-directory"], "error: no-such-directory: no such directory"),
    ],
)
def test_mistakes_end_in_one_line_and_status_two(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["data", *arguments])
    with pytest.raises(SystemExit, match="2"):
        cli.run(main)
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "words"), [("build", "JSONL"), ("download", "--train-shards"), ("verify", "no validation text in training")]
)
def test_help_explains_each_command(command, words, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert words in shown and "python -m golf_jax.data" in shown
