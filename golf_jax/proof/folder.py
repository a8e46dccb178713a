"""A submission as it lies on disk: its logs, claims and code, checked one by one and against each other."""

import ast
import base64
import binascii
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import brotli

from golf_jax.config import GolfError
from golf_jax.proof.claims import Claims, read_claims
from golf_jax.proof.compare import check_claims, is_variant, select
from golf_jax.proof.finding import Finding, Status, fold
from golf_jax.proof.logs import Run, digest, parse_log, read_text
from golf_jax.proof.readme import README, check_readme, seeds_claimed
from golf_jax.proof.rules import check_run

CLAIMS, PROGRAM = "submission*.json", "train_gpt*.py"
WRAPPER, UNPACKED = 1 << 18, 1 << 20  # characters of a script that is looked into, bytes of what is in it
LOG_SUFFIXES = (".log", ".txt", ".out")
NOT_LOGS = re.compile(r"^(?:requirements|readme|license|notes|verify)", re.I)
OWN_SETTINGS = {"seed", "run_id", "logfile", "rank", "local_rank", "is_main_process", "model_path", "quantized_model_path", "artifact_dir"}


@dataclass
class Submission:
    """What one path holds. digests: of every log's text, by file; copies: logs left out of `runs`, and the file they repeat."""

    path: Path
    runs: list[Run]
    claims: Claims
    digests: dict[str, str]
    copies: dict[str, str]
    script: str
    sidecars: dict[str, int]
    """Other programs in the folder that train_gpt.py names, with their bytes."""
    script_bytes: int | None = None
    readme: str = ""
    empty: tuple[str, ...] = ()
    """Files named as logs of a run that hold none."""

    @property
    def shipped_code(self) -> int | None:
        """Bytes of train_gpt.py and of what it names; None without one."""
        return None if self.script_bytes is None else self.script_bytes + sum(self.sidecars.values())

    @property
    def record(self) -> bool:
        return not (self.claims.non_record or "non_record" in str(self.path.resolve()))


def is_submission(path: Path) -> bool:
    """A folder with a submission.json, or with logs and no further submission below it."""
    return _only(path, CLAIMS) is not None or (any(_logs(path)) and next(path.rglob(CLAIMS), None) is None)


def submissions(path: Path) -> set[Path]:
    """The submissions below a folder: those with claims, and what else has logs, by the README or program that they belong to."""
    found = {p.parent for p in path.rglob(CLAIMS)}
    for log in path.rglob("*"):
        if _is_log(log) and not found & set(log.parents) and parse_log(read_text(log), log.name):
            above = [p for p in log.parents if p.is_relative_to(path)]
            found.add(next((p for p in above if (p / README).is_file() or _only(p, PROGRAM)), log.parent))
    return found


def _logs(path: Path) -> list[Path]:
    return [p for p in sorted(path.rglob("*")) if _is_log(p) and (p.parent == path or _only(p.parent, CLAIMS) is None)]


def _is_log(path: Path) -> bool:
    return path.suffix.lower() in LOG_SUFFIXES and not NOT_LOGS.match(path.name) and path.is_file()


def read_submission(path: Path) -> Submission:
    """Reads a log file or a folder. Raises GolfError if there is nothing in it to check."""
    stated, program_file = (_only(path, CLAIMS), _only(path, PROGRAM)) if path.is_dir() else (None, None)
    claims = read_claims(stated, stated.name) if stated else Claims()
    files = _logs(path) if path.is_dir() else [path]
    runs: list[Run] = []
    digests: dict[str, str] = {}
    copies: dict[str, str] = {}
    empty: list[str] = []
    for file in sorted(files, key=lambda p: not _seed_in_name(p.name)):  # of a log and its copy, the one with the seed counts
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        text = read_text(file)
        parsed = parse_log(text, name)
        own = digest(text)
        if parsed and (original := next((n for n, d in digests.items() if d == own), None)):
            copies[name] = original
            continue
        for run in parsed:
            if run.seed is None and len(parsed) == 1 and (seed := _seed_in_name(file.name, claims.seeds)):
                run.settings["seed"] = (seed, run.first_line)
        if parsed:
            digests[name] = own
        elif _seed_in_name(name) or file.suffix == ".log":
            empty.append(name)
        runs += parsed
    script = read_text(program_file) if program_file else ""
    script_bytes = program_file.stat().st_size if program_file else None
    readme = read_text(path / README) if (path / README).is_file() else ""
    claims.mean_over = seeds_claimed(readme)
    if not runs and not claims.file:
        raise GolfError(f"{path}: neither a log of a training run, nor a folder with one; give a log, a records folder or a run directory")
    program = unwrap(script)
    others = (
        [p for p in path.glob("*") if p.suffix in (".py", ".c", ".cpp", ".cu") and p.is_file() and p != program_file]
        if path.is_dir()
        else []
    )
    sidecars = {p.name: p.stat().st_size for p in sorted(others) if re.search(rf"\b{re.escape(p.stem)}\b", program)}
    return Submission(path, runs, claims, digests, copies, script, sidecars, script_bytes, readme, tuple(empty))


def _only(path: Path, pattern: str) -> Path | None:
    """The file of the plain name (`submission.json`); without one, the single file that is named like it."""
    plain, like = path / pattern.replace("*", ""), sorted(path.glob(pattern))
    return plain if plain.is_file() else like[0] if len(like) == 1 else None


def _seed_in_name(name: str, claimed: Sequence[int] = ()) -> str:
    """The seed that a file's name gives: `train_seed42.log`, or `log_42.txt` where 42 is a claimed seed."""
    match = re.search(r"seed[_-]?(\d{1,9})", name)
    known = [n for n in re.findall(r"\d{1,9}", name) if int(n) in claimed]
    return match[1] if match else known[0] if len(known) == 1 else ""


def check_submission(s: Submission) -> list[Finding]:
    """Every check on a submission, per run and over all of them."""
    found = []
    claimed = select(s.runs, s.claims)
    for run in s.runs:
        besides = not any(run is r for r in claimed) or is_variant(run, s.runs, s.claims)
        found += [_beside(f) if besides else f for f in check_run(run, s.shipped_code, s.record)]
    if not s.runs:
        found.append(Finding("not checkable", "input", "no log: none of the claims can be checked", s.claims.file))
    if s.runs and not any(r.finals for r in s.runs):
        found.append(
            Finding("not checkable", "input", "no run has a final score: the log is cut, or training did not end", s.runs[-1].file)
        )
    found += [Finding("warning", "input", "no line of training or scoring in it", name) for name in s.empty]
    found += check_code(s)
    found += check_seeds(s)
    if s.claims.file:
        found += check_claims(s.claims, select(s.runs, s.claims), found, s.shipped_code)
    elif s.path.is_dir():
        found.append(Finding("warning", "claims", "no submission.json", str(s.path)))
    found += check_readme(s.readme, s.runs, s.claims)
    if not any(f.rule in ("C1", "C2", "C3", "C4") for f in found) and s.runs:
        text = "no line of the logs speaks against them; only running the program can show that they hold"
        found.append(Finding("not checkable", "C1-C4", text))
    return fold(found)


def _beside(f: Finding) -> Finding:
    """Of a run that nothing is claimed about, an ablation for example: what it breaks is no fault of the submission."""
    return replace(f, status="warning", text=f"{f.text} (no claim is about this run)") if f.status == "fail" else f


def check_shared_logs(s: Submission, others: Sequence[Submission]) -> list[Finding]:
    """Logs that another submission ships as its own: of the two claims, at most one has a run behind it."""
    found = []
    for other in others:
        for name, own in s.digests.items():
            if other is not s and (theirs := next((n for n, d in other.digests.items() if d == own), None)):
                found.append(Finding("warning", "seeds", f"the same log is in {other.path}: {theirs}", name))
    return found


def check_code(s: Submission) -> list[Finding]:
    """Is the program in the log the one in the folder? Its size, where the log has no program."""
    found = []
    if s.sidecars:
        listed = ", ".join(f"{name} {size:,}" for name, size in s.sidecars.items())
        totals = [r.totals[-1].value for r in s.runs if r.totals]
        over = bool(totals) and max(totals) <= 16_000_000 < max(totals) + sum(s.sidecars.values())
        text = f"{sum(s.sidecars.values()):,} bytes of code beside train_gpt.py are not in the log's total: {listed}"
        if over:
            found.append(Finding("warning", "bytes", f"{text}; with them it is over the cap"))
    if not s.script:
        return found + [Finding("not checkable", "code", "no train_gpt.py beside the log")] * bool(s.path.is_dir() and s.runs)
    program = unwrap(s.script)
    for run in s.runs:
        if run.sources:
            changed = min(_changed(source, other) for source in run.sources for other in (s.script, program))
            text = (
                "the program in the log is the shipped train_gpt.py"
                if not changed
                else f"{changed} lines differ from the shipped train_gpt.py"
            )
            found.append(Finding("warning" if changed else "pass", "code", text, run.at(run.first_line)))
        elif run.code:
            sizes = {len(s.script.encode()), s.script_bytes, len(program.encode())}
            said = {int(n.value) for n in run.code.values()}
            text = f"{' / '.join(f'{n:,}' for n in sorted(said))} bytes by the log, {s.script_bytes:,} shipped"
            status = "pass" if said & sizes else "warning"
            found.append(Finding(status, "code", text, run.at(next(iter(run.code.values())))))
    return found


def _changed(a: str, b: str) -> int:
    """Lines that are in one program and not in the other; blank lines and space at the end of a line do not count."""
    left, right = (Counter(line.rstrip() for line in text.splitlines() if line.strip()) for text in (a, b))
    return ((left - right) + (right - left)).total()


def unwrap(script: str) -> str:
    """The program inside a self-extracting script (base64 or base85 of lzma, zlib or brotli); the script itself if it is none.

    Nothing is executed: literals are decoded, and what decodes to a Python program is it. What is longer than any such script, or would
    unpack to more than any program, is left as it is.
    """
    if len(script) > WRAPPER:
        return script
    try:
        literals = [node.value for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Constant)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return script
    room = UNPACKED  # of all literals together
    for literal in literals:
        data = literal.encode("ascii", "ignore") if isinstance(literal, str) else literal
        if not isinstance(data, bytes) or len(data) < 1_000:
            continue
        for decode in (base64.b85decode, base64.b64decode, base64.a85decode, bytes):
            for expand in (_lzma, _zlib, _brotli, _raw_lzma):
                try:
                    raw = expand(decode(data), room + 1)
                    room -= len(raw)
                    if room < 0:
                        return script
                    text = raw.decode("utf-8")
                except (ValueError, binascii.Error, lzma.LZMAError, zlib.error, brotli.error, EOFError):
                    continue
                if "import" in text:
                    return text
    return script


def _lzma(data: bytes, most: int) -> bytes:
    return _whole(lzma.LZMADecompressor(memlimit=1 << 27), data, most)  # twice what preset 9 needs


def _raw_lzma(data: bytes, most: int) -> bytes:
    return _whole(lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]), data, most)


def _zlib(data: bytes, most: int) -> bytes:
    return _whole(zlib.decompressobj(), data, most)


def _whole(decoder: Any, data: bytes, most: int) -> bytes:
    """The first `most` bytes of a stream, or all of it. EOFError where it is cut short."""
    raw = decoder.decompress(data, most)
    if len(raw) < most and not decoder.eof:
        raise EOFError
    return raw


def _brotli(data: bytes, most: int) -> bytes:
    decoder = brotli.Decompressor()
    raw = decoder.process(data, output_buffer_limit=most)
    while len(raw) < most and not decoder.is_finished():
        more = decoder.process(b"", output_buffer_limit=most - len(raw))
        if not more:
            raise EOFError
        raw += more
    return raw


def check_seeds(s: Submission) -> list[Finding]:
    """Distinct seeds, a log for each, one set of settings, no copies."""
    found = []
    for copy, original in s.copies.items():
        claimed_twice = _seed_in_name(copy) != _seed_in_name(original) and _seed_in_name(copy)
        status, note = ("fail", ", under another seed") if claimed_twice else ("pass", ", counted once")
        found.append(Finding(status, "seeds", f"{copy} is {original} again{note}"))
    copied = [f"{a.at(a.first_line)} and {b.at(b.first_line)}" for a, b in combinations(s.runs, 2) if _same_course(a, b)]
    if copied:
        found.append(Finding("fail", "seeds", f"runs with other seeds have the same losses at every step: {'; '.join(copied[:3])}"))
    finished = [r for r in select(s.runs, s.claims) if r.finals]
    seeds = [r.seed for r in finished]
    claimed, count = s.claims.seeds, s.claims.seed_count
    if len(set(claimed)) < len(claimed):
        found.append(Finding("fail", "seeds", f"seeds are claimed twice: {claimed}", s.claims.file))
    known = {seed for seed in seeds if seed is not None}
    lacking = sorted(set(claimed) - known) if known else []
    have = len(finished)
    if s.runs and have < count and count > 1:
        text = f"{count} seeds are claimed, {have} finished run{'s' * (have != 1)} in the logs"
        found.append(Finding("fail", "seeds", text + f", none of seed {', '.join(map(str, lacking))}" * bool(lacking), s.claims.file))
    elif s.runs and lacking:
        others = ", ".join(map(str, sorted(known - set(claimed)))) or "no other"
        text = f"seed {', '.join(map(str, lacking))} is claimed, the logs are of seed {others} instead"
        found.append(Finding("warning", "seeds", text, s.claims.file))
    repeated = sorted(seed for seed, n in Counter(seeds).items() if seed is not None and n > 1)
    if repeated and len(s.runs) > 1:
        found.append(Finding("warning", "seeds", f"more than one run with seed {', '.join(map(str, repeated))}"))
    if finished and all(f.status == "pass" for f in found):
        found.append(customary(seeds, "warning" if s.path.is_dir() else "not checkable"))
    return found + check_settings(finished)


def customary(seeds: Sequence[int | None], fewer: Status = "warning") -> Finding:
    """Are there three? fewer: the status where there are not."""
    if len(seeds) >= 3:
        return Finding("pass", "seeds", f"{len(seeds)} runs, seeds {', '.join(map(str, seeds))}")
    return Finding(fewer, "seeds", f"{len(seeds)} run{'s' * (len(seeds) != 1)}; three seeds are customary")


def _same_course(a: Run, b: Run) -> bool:
    ours, theirs = dict(a.steps), dict(b.steps)
    shared = ours.keys() & theirs.keys()
    return len(shared) >= 8 and a.seed != b.seed and all(ours[step] == theirs[step] for step in shared)


def check_settings(runs: list[Run]) -> list[Finding]:
    """Settings that two runs both print, and print differently."""
    differ: dict[str, set[str]] = {}
    for a, b in combinations(runs, 2):
        for name in (a.settings.keys() & b.settings.keys()) - OWN_SETTINGS:
            values = {a.settings[name][0], b.settings[name][0]}
            if len(values) > 1 and not any("/" in v for v in values):  # paths are where, not what
                differ.setdefault(name, set()).update(values)
    if differ:
        listed = "; ".join(f"{name}: {', '.join(sorted(values))}" for name, values in sorted(differ.items())[:5])
        return [Finding("warning", "settings", f"{len(differ)} settings differ between the runs: {listed}")]
    if len(runs) > 1 and all(r.settings for r in runs):
        return [Finding("pass", "settings", f"{len(runs)} runs print the same settings")]
    return []
