"""Logs as people keep them: two dozen kinds of mess, on made logs and on a real clean record.

Mess that leaves the text whole changes no figure; mess that takes text away changes no figure that is left. Neither raises an alarm.
"""

import random
import re

import pytest
from made_logs import SCRIPT, log, records_folder

from golf_jax.config import GolfError
from golf_jax.proof.folder import check_submission, read_submission
from golf_jax.proof.logs import parse_log, read_text

SEED = random.Random(5)


def lines(change):
    """A change of every line."""
    return lambda text: "".join(change(line) + "\n" for line in text.splitlines()).encode()


def wandb_between(text):
    noise = [
        "wandb: Syncing run sunny-sea-42",
        "wandb: 🚀 View run at https://wandb.ai/x/y",
        "W0401 12:00:00.000 torch/_inductor warning: x=1.5",
    ]
    return "\n".join(part for line in text.splitlines() for part in (line, SEED.choice(noise))).encode()


def bars_between(text):
    bar = "".join(f"\r 12%|█▏   | {i}/100 [00:0{i}<00:09, 9.8it/s, loss=2.{i}]" for i in range(9)) + "\r"
    return "\n".join(f"{bar}{line}" if i % 7 == 3 else line for i, line in enumerate(text.splitlines())).encode()


WHOLE = {
    "utf-16, CRLF": lambda t: t.replace("\n", "\r\n").encode("utf-16"),
    "utf-16 big-endian with mark": lambda t: b"\xfe\xff" + t.encode("utf-16-be"),
    "utf-8 with mark, CRLF": lambda t: b"\xef\xbb\xbf" + t.replace("\n", "\r\n").encode(),
    "CR CR LF": lambda t: t.replace("\n", "\r\r\n").encode(),
    "old Mac line ends": lambda t: t.replace("\n", "\r").encode(),
    "zero bytes at the end": lambda t: t.encode() + b"\0" * 5000,
    "bytes of no encoding": lambda t: t.replace("step:3/", "caf\u00e9\nstep:3/").encode("latin-1"),
    "space at the ends": lines(lambda s: s + "   \t"),
    "epoch stamps": lines(lambda s: f"1776143360.163 {s}" if s else s),
    "ISO stamps": lines(lambda s: f"2026-04-01T12:00:00.123Z {s}" if s else s),
    "bracketed stamps": lines(lambda s: f"[2026-04-01 12:00:00,123] {s}" if s else s),
    "rank prefixes": lines(lambda s: f"[rank0]: {s}" if s else s),
    "colours": lines(lambda s: f"\x1b[32m{s}\x1b[0m" if s else s),
    "Slurm task numbers": lines(lambda s: f"0: {s}"),
    "torchrun's default prefix": lines(lambda s: f"[default0]:{s}"),
    "Kubernetes": lines(lambda s: f"2026-04-01T12:00:00.123456789Z stdout F {s}"),
    "trackers between": wandb_between,
    "progress bars between": bars_between,
    "a banner before": lambda t: (f"{'#' * 80}\nnohup: ignoring input\n{'#' * 80}\n" + t).encode(),
    "a shell's time after": lambda t: (t + "\nreal\t12m3.1s\nuser\t90m1.0s\nsys\t2m0.5s\n[1]+  Done   torchrun\n").encode(),
    "Markdown fences": lambda t: f"```\n{t}```\n".encode(),
    "a line of ten million characters": lambda t: (t + "x" * 10_000_000 + "\n").encode(),
}
PART = {
    "cut in the last number": lambda t: t.rstrip("\n")[:-3].encode(),
    "cut in the middle": lambda t: t[: len(t) // 2].encode(),
    "without its beginning": lambda t: t[len(t) // 3 :].encode(),
    "a hole in the middle": lambda t: (t[: len(t) // 3] + t[len(t) // 2 :]).encode(),
    "utf-16 cut within a character": lambda t: t.encode("utf-16")[:-7],
    "scores that are not numbers": lambda t: re.sub(r"val_(loss|bpb):[\d.]+", r"val_\1:nan", t).encode(),
    "scores without digits": lambda t: re.sub(r"val_bpb:[\d.]+", "val_bpb:inf", t).encode(),
    "compressed": lambda t: __import__("gzip").compress(t.encode()),
    "nothing": lambda t: b"",
    "blank": lambda t: b" \n\t\n" * 50,
}


def figures(data, path):
    path.write_bytes(data)
    runs = parse_log(read_text(path), "train.log")
    scores = [(s.name, s.kind, s.loss.value, s.bpb.value, s.seconds) for r in runs for s in r.scores]
    sizes = [n.value for r in runs for n in (*r.totals, *r.models, *r.tokens, *r.hessians, *([r.stop] if r.stop else []))]
    steps = [pair for r in runs for pair in r.steps]
    return len(runs), scores, sizes, steps, [r.seed for r in runs]


@pytest.mark.parametrize("name", WHOLE)
def test_mess_around_whole_text_changes_no_figure(name, tmp_path):
    text = log(source=SCRIPT)
    assert figures(WHOLE[name](text), tmp_path / "messy.log") == figures(text.encode(), tmp_path / "clean.log")


@pytest.mark.parametrize("name", PART)
def test_what_is_left_of_a_damaged_log_is_read_as_it_stood(name, tmp_path):
    text = log(source=SCRIPT)
    whole, part = figures(text.encode(), tmp_path / "clean.log"), figures(PART[name](text), tmp_path / "messy.log")
    assert set(part[1]) <= set(whole[1]) and set(part[2]) <= set(whole[2]) and set(part[3]) <= set(whole[3])


def alarms(path):
    try:
        return [(f.status, f.rule, f.text) for f in check_submission(read_submission(path)) if f.status == "fail"]
    except GolfError as error:
        return [error] if "neither a log" not in str(error) else []


@pytest.mark.parametrize("name", WHOLE | PART)
def test_no_mess_raises_an_alarm_on_a_clean_folder(name, tmp_path):
    """One of three logs is messy. What its damage leaves unsaid may be told, as missing; it is no failure of the run."""
    path = records_folder(tmp_path / "clean")
    file = path / "train_seed42.log"
    file.write_bytes((WHOLE | PART)[name](file.read_text()))
    allowed = {"seeds", "claims"} if name in PART else set()  # what is claimed has no log any more
    assert [a for a in alarms(path) if a[1] not in allowed] == []


@pytest.mark.parametrize("name", WHOLE)
def test_a_published_record_stays_clean(name, shared, tmp_path):
    (tmp_path / "pr549").mkdir()
    for file in (shared / "logs/pr549").iterdir():
        text = file.read_text()
        (tmp_path / "pr549" / file.name).write_bytes(WHOLE[name](text) if file.suffix == ".log" else text.encode())
    assert alarms(tmp_path / "pr549") == []


@pytest.mark.parametrize("kind", ["folder", "link to nothing", "unreadable"])
def test_what_is_no_file_is_one_line(kind, tmp_path):
    path = records_folder(tmp_path / "f")
    odd = path / "train_seed7.log"
    if kind == "folder":
        odd.mkdir()
    elif kind == "link to nothing":
        odd.symlink_to(tmp_path / "gone")
    else:
        odd.write_bytes(b"\xff" * 3000)
    assert alarms(path) == []


def test_the_end_of_a_program_whose_beginning_is_lost_is_no_output():
    ends = "\n".join(["    slot_steps = 24", *(f"def part_{i}(x):\n    return x  # final_slot {i}" for i in range(25)), "=" * 100])
    run = parse_log(log(after=ends), "x.log")[0]
    assert "def part_3(x):" in run.sources[-1] and not any("slot" in line for _, line in run.text)


def test_the_total_beside_its_parts_is_the_total():
    text = log(
        after="Total submission size: 91741200 bytes\nartifact int6+zstd-22: 15697770 bytes + 83709 code = 15781479 total (payload:2)"
    )
    assert parse_log(text, "x.log")[0].totals[-1].value == 15_781_479
