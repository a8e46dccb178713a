"""Logs of training programs, as messy as they come, into runs: numbers with the line they stand on.

Nothing is guessed: a number is taken only from a line that names it, and every number keeps its source line. Source code that a log
carries is set aside first, so that nothing in it is mistaken for output.
"""

import codecs
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from golf_jax.files import read_bytes

LONGEST = 2_000  # characters of a line that are looked at; programs print no longer lines of results
NUMBER = r"[-+]?\d[\d,_]{0,20}(?:\.\d{0,20})?(?:[eE][-+]?\d{1,2})?"
_SCORE = re.compile(rf"^([^'\"{{}}]*?)\bval_loss\s*[:=]\s*({NUMBER})\b.*?\bval_bpb\s*[:=]\s*({NUMBER})(?![\w.])(.*)$")
_BARE_BPB = re.compile(rf"\b((?!val_bpb_?(?:std|delta))\w*bpb\w*)\s*[:=]\s*({NUMBER})(?![\w.])")
_TRAINING = re.compile(r"^(?:step[: ]\s*)?(\d+)/\d+\b")
_STEP_LOSS = re.compile(rf"^(?:step[: ]\s*)?(\d+)(?:/\d+)?\s.*?\b(?:train_)?loss\s*[:= ]\s*({NUMBER})")
_SECONDS = re.compile(rf"\b(?:eval_time|time)\s*[:=]\s*({NUMBER})\s*(ms|s)\b")
_STOP = re.compile(rf"^stopping_early\b.*?train_time\s*[:=]\s*({NUMBER})\s*(ms|s)\b")
_TRAIN_TIME = re.compile(rf"\btrain_time\s*[:=]\s*({NUMBER})\s*(ms|s|m)\b")
_STEP_AVG = re.compile(rf"\bstep_avg\s*[:=]\s*({NUMBER})\s*ms\b")
_HESSIANS = re.compile(
    rf"^gptq:\s*(?:collected \d+ hessians|collected hessians for \d+ layers|calibrated \d+ layers)\s+in ({NUMBER})\s*s\b", re.I
)
_ADAPTED = re.compile(rf"^(\w*ttt\w*):done\b.*?\b(?:time|elapsed)\s*[:=]\s*({NUMBER})\s*(ms|s)\b", re.I)
_TOTAL_EVAL = re.compile(rf"^total_eval_time\s*[:=]\s*({NUMBER})\s*(ms|s)\b")
_MODEL = re.compile(rf"^Serialized model(?: (\S[^:]*))?:\s*({NUMBER})\s*bytes\b", re.I)
_ARTIFACT = re.compile(rf"^artifact(?:[ _](?:size|bytes))?\s*[:=]\s*({NUMBER}) bytes\b", re.I)  # code or not is not said
_CODE = re.compile(rf"^(?:Code size(?: \((\w+)\))?|CODE_BYTES)\s*:\s*({NUMBER})(?: bytes)?\s*$", re.I)
_TOTALS = (
    re.compile(rf"^Total submission size(?: (\S[^:]*))?:\s*({NUMBER})\s*bytes\b", re.I),
    re.compile(rf"\bTotal submission(?: size)?()\s*[:=]\s*({NUMBER})\s*bytes\b", re.I),
    re.compile(rf"^artifact ()\S+:\s*{NUMBER} bytes \+ {NUMBER} code = ({NUMBER}) total\b"),
    re.compile(rf"^budget()\s*:\s*({NUMBER})\s*/\s*16,?000,?000\b", re.I),
    re.compile(rf"^(?:bytes[ _]total|total[ _]bytes|submission[ _](?:size|bytes))()\s*[:=]\s*({NUMBER})(?: bytes)?\b(?! *MB)", re.I),
)
_TOKENS = re.compile(rf"(?:^val_tokens\s*[:=]\s*|^Validation tokens:\s*|^val_loader:.*\btokens\s*[:=]\s*|\bval_tokens:)({NUMBER})")
_SCORED = re.compile(rf"\bnats[:=]{NUMBER} tokens[:=]({NUMBER}) bytes[:=]{NUMBER}")  # as this project's score lines have it
_PAIR = re.compile(r"(\w+):([\w.+-]+)")
_PAIRS = re.compile(r"^\w+:[\w.+-]+(?: \w+:[\w.+-]+)*$")
_SETTING = re.compile(r"^\s+(\w+): (.*)$")
_COLOUR = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
_STAMP = re.compile(
    r"^(?:\d{9,}\.\d+|\[?\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[\d.,]*Z?\]?(?: std(?:out|err) F)?|\[(?:rank|default)\d+\]:?)(?:[ \t]|$|(?<=:))"
)  # one space only: the program's own indentation stays
_TASK = re.compile(r"^\d{1,4}:(?: |$)")  # as srun --label has it: a prefix only where every line has it
_RULE = re.compile(r"^={60,}$")
_PYTHON = re.compile(r"^\s*(?:import \w|from [\w.]+ import |(?:async )?def \w+\(|class \w+|@\w+)")
_START = re.compile(r"^(?:Hyperparameters:|val_bpb:enabled\b|logs/\S+\.txt\s*$)")
_DIFFERENCE = re.compile(r"delta|diff|gain|improve|degrad", re.I)
_DIAGNOSTIC = re.compile(r"diagnos|pre[-_ ]?quant|post[-_ ]?(?:ema|swa|train)|best_averaging|^val_interim|^(?:raw|ema|swa)\b", re.I)


@dataclass(frozen=True)
class Number:
    """A value as printed: `half` is half of its last printed digit, the error that rounding can have made."""

    value: float
    line: int
    half: float = 0.0


@dataclass(frozen=True)
class Score:
    """A line with nats per token and bits per byte. kind: `training` (of the weights in training), `diagnostic`, or `final`."""

    name: str
    kind: str
    loss: Number
    bpb: Number
    seconds: float | None

    @property
    def line(self) -> int:
        return self.bpb.line


@dataclass
class Run:
    """What one run of a log says. Times in seconds; every list in the order of the log."""

    file: str
    first_line: int
    settings: dict[str, tuple[str, int]] = field(default_factory=dict)
    tokens: list[Number] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    bare: list[tuple[str, Number]] = field(default_factory=list)
    """Bits per byte without the nats beside them, by the words before them (`final_ttt val_bpb`): claims stand on them, too."""
    steps: list[tuple[int, float]] = field(default_factory=list)
    """(step, training loss) as logged: two runs with other seeds never agree on them."""
    step_seconds: float = 0.0
    stop: Number | None = None
    last_train_time: Number | None = None
    hessians: list[Number] = field(default_factory=list)
    phases: list[tuple[str, Number]] = field(default_factory=list)
    """Evaluation phases that are not diagnostics: (name, seconds)."""
    total_eval: Number | None = None
    models: list[Number] = field(default_factory=list)
    code: dict[str, Number] = field(default_factory=dict)
    """Code bytes by kind: `` (as printed without a word), `compressed`, `uncompressed`."""
    totals: list[Number] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    """The programs that the log carries; often the one, several times."""
    text: list[tuple[int, str]] = field(default_factory=list)
    """The lines of output, numbered, without source code."""

    def at(self, line: int | Number) -> str:
        return f"{self.file}:{line.line if isinstance(line, Number) else line}"

    def setting(self, *names: str) -> str:
        """The first of `names` that the log prints; empty if none."""
        return next((self.settings[n][0] for n in names if n in self.settings), "")

    @property
    def finals(self) -> list[Score]:
        return [s for s in self.scores if s.kind == "final"]

    @property
    def seed(self) -> int | None:
        text = self.setting("seed")
        return int(text) if re.fullmatch(r"\d{1,12}", text) else None


def read_text(path: Path) -> str:
    """A file's text, whatever encoding it was saved in. Never fails on content; raises GolfError if it cannot be read."""
    data = read_bytes(path)
    for bom, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
        if data.startswith(bom):
            return data[len(bom) :].decode(encoding, "replace")
    head = data[:4096].rstrip(b"\0")
    zeros = [head[i::2].count(0) for i in (0, 1)]
    if max(zeros) > len(head) // 4 > 8 * min(zeros):  # UTF-16 without a mark: every other byte of ASCII is zero
        return data.decode("utf-16-le" if zeros[1] > zeros[0] else "utf-16-be", "replace")
    return data.decode("utf-8", "replace")


def digest(text: str) -> str:
    """Of the text itself: the same log saved with other line ends or in another encoding is the same log."""
    return hashlib.sha256("\n".join(line.rstrip() for line in text.splitlines()).encode("utf-8", "replace")).hexdigest()


def parse_log(text: str, file: str) -> list[Run]:
    """The runs of a log, in order; none if there is no event of training or scoring in it."""
    lines = list(enumerate(_bare(text), 1))
    if lines[-1][1] and (match := _SCORE.match(lines[-1][1].strip()[:LONGEST])) and _digit(match[2]) != _digit(match[3]):
        lines.pop()  # the file ends within a number
    output, sources = _set_source_aside(lines)
    runs = []
    for part in _split(output):
        run = Run(file, part[0][0])
        for number, line in part:
            _read_line(run, number, line)
        if run.scores or run.steps or run.stop or run.totals:
            runs.append(run)
    for run in runs:
        run.sources = sources
    return runs


def _bare(text: str) -> list[str]:
    """The lines as the program printed them: without what terminals, launchers and collectors put before and after."""
    found = [_COLOUR.sub("", line.replace("\0", "")).rstrip() for line in re.split(r"\r\n|\n|\r", text)]
    printed = [line for line in found if line]
    if printed and all(_TASK.match(line) for line in printed):
        found = [_TASK.sub("", line) for line in found]
    return [_STAMP.sub("", line) for line in found]


def _set_source_aside(lines: list[tuple[int, str]]) -> tuple[list[tuple[int, str]], list[str]]:
    """(lines of output, programs): a block between rulers that imports and defines is source, up to its last definition's end; so are
    many definitions without an import, the rest of a program whose beginning is lost."""
    blocks: list[list[tuple[int, str]]] = [[]]
    for number, line in lines:
        if _RULE.match(line):
            blocks.append([])
        else:
            blocks[-1].append((number, line))
    output: list[tuple[int, str]] = []
    sources = []
    for block in blocks:
        code = [i for i, (_, line) in enumerate(block) if _PYTHON.match(line)]
        whole = any(block[i][1].startswith("import ") for i in code)
        if len(code) < (5 if whole else 20):
            output += block
            continue
        first = next(i for i, (_, line) in enumerate(block) if i == code[0] or line.startswith(('"""', "#", "from ", "'''")))
        while not whole and first and re.match(r"\s|#|$", block[first - 1][1]):
            first -= 1
        events = (i for i, (_, line) in enumerate(block) if i > code[-1] and (_TRAINING.match(line) or _SCORE.match(line[:LONGEST])))
        stop = next(events, len(block))
        output += block[:first] + block[stop:]
        sources.append("\n".join(line for _, line in block[first:stop]))
    return [(number, line[:LONGEST]) for number, line in output], sources


def _split(lines: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """At every opening line that comes after training or scoring has begun, and where the steps begin again."""
    part: list[tuple[int, str]] = []
    begun, last = False, -1
    for number, line in lines:
        step = _TRAINING.match(line)
        again = bool(step) and int(step[1][:12]) < last and int(step[1][:12]) <= 1
        if part and ((begun and _START.match(line)) or again):
            yield part
            part, begun, last = [], False, -1
        if step:
            begun, last = True, int(step[1][:12])
        part.append((number, line))
    if part:
        yield part


def _read_line(run: Run, number: int, line: str) -> None:
    run.text.append((number, line))
    stripped = line.strip()
    if (match := _SCORE.match(stripped)) and not _DIFFERENCE.search(match[1]):
        _read_score(run, number, stripped, match)
    elif match := _STEP_LOSS.match(stripped):
        run.steps.append((int(match[1][:12]), _float(match[2])))
    if "bpb" in stripped and not _TRAINING.match(stripped):
        _read_bare(run, number, stripped)
    if not (run.steps or run.scores or run.code):  # settings come first; later lines of that form are results
        _read_settings(run, number, line)
    _read_clock(run, number, stripped)
    _read_size(run, number, stripped)
    if match := _TOKENS.search(stripped):
        run.tokens.append(_number(match[1], number))
    if match := _SCORED.search(stripped):
        run.tokens.append(_number(match[1], number))


def _read_settings(run: Run, number: int, line: str) -> None:
    if match := _SETTING.match(line):
        run.settings.setdefault(match[1], (match[2].strip(), number))
    elif _PAIRS.match(line.strip()) and not line.strip().startswith(("step", "warmup")):
        for key, value in _PAIR.findall(line):
            run.settings.setdefault(key, (value, number))


def _read_score(run: Run, number: int, line: str, match: re.Match[str]) -> None:
    name = re.sub(r"\s+", " ", match[1]).strip(" :,|-") or "val"
    kind = "training" if _TRAINING.match(line) else "diagnostic" if _DIAGNOSTIC.search(name) else "final"
    seconds = _SECONDS.search(match[4])
    took = _to_seconds(seconds[1], seconds[2]) if seconds and kind != "training" else None
    run.scores.append(Score(name, kind, _number(match[2], number), _number(match[3], number), took))
    if took is not None and kind == "final" and took not in (n.value for _, n in run.phases):  # `x` and `x_exact` are one phase
        run.phases.append((name, Number(took, number)))


def _read_bare(run: Run, number: int, line: str) -> None:
    score = _SCORE.match(line)
    for match in _BARE_BPB.finditer(line):
        if not _DIFFERENCE.search(match[1]) and not (score and match.start(2) == score.start(3)):
            first = re.match(r"[\w.+-]*", line)
            words = [w for w in (first[0] if first else "", match[1]) if w]
            run.bare.append((" ".join(dict.fromkeys(words)), _number(match[2], number)))


def _read_clock(run: Run, number: int, line: str) -> None:
    if match := _STOP.match(line):
        run.stop = Number(_to_seconds(match[1], match[2]), number)
    if _TRAINING.match(line):
        if match := _TRAIN_TIME.search(line):
            half = 0.5 * _digit(match[1]) * {"ms": 1e-3, "s": 1.0, "m": 60.0}[match[2]]
            run.last_train_time = Number(_to_seconds(match[1], match[2]), number, half)
        if match := _STEP_AVG.search(line):
            run.step_seconds = _float(match[1]) / 1000
    if match := _HESSIANS.match(line):
        run.hessians.append(Number(_float(match[1]), number))
    if (match := _ADAPTED.match(line)) and "val_loss" not in line:  # with a score, the score line that follows has the time
        took = _to_seconds(match[2], match[3])
        run.phases.append((match[1], Number(took, number)))
    if match := _TOTAL_EVAL.match(line):
        run.total_eval = Number(_to_seconds(match[1], match[2]), number)


def _read_size(run: Run, number: int, line: str) -> None:
    if match := _MODEL.match(line):
        if match[1]:  # without a word it is the model before compression
            run.models.append(_number(match[2], number))
    elif match := _ARTIFACT.match(line):
        run.models.append(_number(match[1], number))
    elif match := _CODE.match(line):
        run.code[(match[1] or "").lower()] = _number(match[2], number)
    else:
        for pattern in _TOTALS:
            if match := pattern.search(line):
                run.totals.append(_number(match[2], number))
                return


def _float(text: str) -> float:
    return float(text.replace(",", "").replace("_", ""))


def _digit(text: str) -> float:
    """The weight of the last printed digit."""
    mantissa, _, exponent = text.lower().partition("e")
    return 10.0 ** (int(exponent[:4] or 0) - len(mantissa.partition(".")[2]))


def _number(text: str, line: int) -> Number:
    return Number(_float(text), line, 0.5 * _digit(text))


def _to_seconds(text: str, unit: str) -> float:
    return _float(text) * {"ms": 1e-3, "s": 1.0, "m": 60.0}[unit]
