"""The mechanical checks of one run: bytes of the text, coverage, bytes of the artifact, clocks, and what the log shows of C1-C4."""

import math
import re
from collections.abc import Sequence

from golf_jax.config import CAP_BYTES, LIMIT_SECONDS
from golf_jax.data.verify import OFFICIAL_BYTES, OFFICIAL_DOCUMENTS
from golf_jax.proof.finding import Finding
from golf_jax.proof.logs import Number, Run, Score
from golf_jax.proof.official import Family, by_tokens, by_words

NEAR = 200_000  # implied bytes off by less: windows, document starts and the cut tail are counted differently here and there
MOST_GAIN = 0.07  # bits per byte between the model in training and its final score
SAME_TEXT = 0.003  # bytes per token off by less, relatively: the same kind of text, cut by the same tokenizer

# Methods ruled out, by the lines that programs print when they run them (C1-C4 of issue 1017, rulings up to May 2026).
_METHODS = (
    ("C3", r"^(?:pre_?quant_)?ttt\w*:\s*epoch \d+/\d+", "trains on the validation set for whole epochs before it is scored"),
    ("C3", r"^(?:pre_?quant_ttt|pre-quant ttt)\b.*\b(?:start|epoch)", "trains on the validation set before quantization and scoring"),
    ("C3", r"^gptq:.*\bcalibrat\w+\b.*\b(?:val|validation)\b(?! *loss)", "calibrates the quantization on validation text"),
    ("C4", r"\b(?:ngram_)?two_pass\b|\bpass 2\b.*\b(?:rescor|n-?gram)", "scores in two passes: the second knows the text"),
    ("C4", r"^\w*ttt\w*:? (?:[2-9]|\d\d) passes\b", "passes over the text several times"),
    ("C2", r"^(?:final_)?\w*(?:ngram|n-gram)_?(?!tilt|hash|embed)(?:cache|eval|backoff|mix|interp|blend)\w*\b",
     "mixes in a hashed n-gram cache, whose values do not sum to one"),
    ("C2", r"^(?:final_|quantized_)?\w*ppm\w*\b.*\d", "mixes in a byte predictor (PPM), not one distribution over the tokens"),
    ("C1", r"^(?:final_)?slot\w*\b.*\d", "SLOT: fits a correction on the very tokens that it then scores"),
)  # fmt: skip


def check_run(run: Run, shipped_code: int | None = None, record: bool = True) -> list[Finding]:
    """All checks of one run. shipped_code: bytes of the train_gpt.py beside the log; record: whether the record track's limits apply."""
    findings = [*implied_bytes(run), *coverage(run), *artifact_bytes(run, shipped_code)]
    findings += [*clocks(run)] if record else [Finding("pass", "training clock", "non-record track: no limit on time", run.file)]
    return findings + legality(run)


def headline(run: Run) -> Score | None:
    """The score a run stands for when nothing else says which: the lowest of its final ones, in its most precise print."""
    return min(_sound(run.finals), key=lambda s: (round(s.bpb.value, 4), s.bpb.half), default=None)


def _sound(scores: Sequence[Score]) -> list[Score]:
    return [s for s in scores if s.bpb.value > 0 and s.loss.value > 0]


def family(run: Run) -> Family | None:
    """The tokenizer family that the log names."""
    line = next((text for _, text in run.text if "tokenizer_path=" in text), "")
    named = re.search(r"tokenizer_path=(\S+)", line)
    words = [named[1] if named else "", run.setting("tokenizer_path"), run.setting("datasets_dir"), run.setting("data_path")]
    return by_words(" ".join(filter(None, words)), run.setting("vocab_size"), run.setting("caseops_enabled"))


def bytes_per_token(score: Score) -> tuple[float, float, float]:
    """(value, lowest, highest) that the printed digits allow."""
    loss, bpb = score.loss, score.bpb
    low = (loss.value - loss.half) / (bpb.value + bpb.half)
    high = (loss.value + loss.half) / max(bpb.value - bpb.half, 1e-12)
    return loss.value / bpb.value / math.log(2), low / math.log(2), high / math.log(2)


def implied_bytes(run: Run) -> list[Finding]:
    """val_loss, val_bpb and the token count together say how many bytes the score was divided by."""
    scores = _sound(run.finals) or _sound(run.scores)[-1:]
    if not scores:
        return [Finding("not checkable", "implied bytes", "the log has no line with val_loss and val_bpb", run.file)]
    bad = [f for s in scores if (f := _implied(run, s)).status == "fail"]
    return bad[-1:] or [_implied(run, headline(run) or scores[-1])]


def _implied(run: Run, score: Score) -> Finding:
    rate, low, high = bytes_per_token(score)
    where = run.at(score.line)
    named = family(run)
    if not run.tokens:
        if named is None:
            return Finding(
                "not checkable", "implied bytes", f"{rate:.4f} bytes per token; the log gives neither tokens nor tokenizer", where
            )
        expected, text = named.bytes_per_token, f"{rate:.4f} bytes per token, {named.name} has {named.bytes_per_token:.4f}; no token count"
        if low <= expected * (1 + SAME_TEXT) and high >= expected * (1 - SAME_TEXT):
            return Finding("pass", "implied bytes", text, where)
        return Finding("fail", "implied bytes", f"{text}: wrong denominator, times {rate / expected:.4f}, or another text", where)
    tokens = run.tokens[-1].value
    count = rate * tokens
    text = f"{count:,.0f} bytes ({tokens:,.0f} tokens, {rate:.4f} bytes per token, {score.name})"
    if low * tokens <= OFFICIAL_BYTES + NEAR and high * tokens >= OFFICIAL_BYTES - NEAR:
        return Finding("pass", "implied bytes", text, where)
    return Finding("fail", "implied bytes", f"{text}: {_why(run, tokens, rate, score)}", where)


def _why(run: Run, tokens: float, rate: float, score: Score) -> str:
    """Which of the ways to a wrong byte count this is, as far as the figures tell."""
    factor = rate * tokens / OFFICIAL_BYTES
    official, named = by_tokens(tokens), family(run)
    corrected = f"bpb would be {score.bpb.value * factor:.4f}"
    if official:
        plain = official.name == "CaseOps" and run.setting("caseops_enabled") == "False"
        cause = "; CaseOps shards are counted with the plain tokenizer's table" if plain else ""
        return f"wrong denominator, times {factor:.4f}: the tokens are those of {official.name}{cause}; {corrected}"
    if named and abs(rate / named.bytes_per_token - 1) < 10 * SAME_TEXT:
        if tokens < named.targets:
            return f"cut validation set: {100 * tokens / named.targets:.1f} % of {named.name}'s {named.targets:,} tokens"
        return f"foreign text: {named.name} has {named.targets:,} tokens in the official set"
    if factor < 0.9 or factor > 1.5:
        part = f"{100 * factor:.1f} % of the official text's bytes"
        return f"{part}, neither count is the official one: another or a cut validation set, or a wrong denominator"
    return f"wrong denominator, times {factor:.4f}, or a foreign text: the token count belongs to no known tokenizer; {corrected}"


def coverage(run: Run) -> list[Finding]:
    """Are all tokens and documents of the official set there?"""
    found = []
    for number, line in run.text:
        documents = re.search(r"\btotal_docs:(\d+)\b", line)
        if documents and int(documents[1][:12]) != OFFICIAL_DOCUMENTS:
            text = f"{int(documents[1][:12]):,} documents of {OFFICIAL_DOCUMENTS:,} are scored"
            found.append(Finding("fail", "coverage", text, run.at(number)))
            break
    fraction = run.setting("val_doc_fraction")
    if re.fullmatch(r"0?\.\d+", fraction):
        found.append(Finding("fail", "coverage", f"val_doc_fraction {fraction}", run.at(run.settings["val_doc_fraction"][1])))
    if not run.tokens:
        return found or [Finding("not checkable", "coverage", "the log does not say how many tokens were scored", run.file)]
    tokens, where = run.tokens[-1].value, run.at(run.tokens[-1])
    official, named = by_tokens(tokens), family(run)
    if official:
        cut = official.targets - tokens
        text = f"{tokens:,.0f} tokens, {official.name}'s official count" + (" up to the last rows" if cut > 1 else "")
        return [*found, *([] if found else [Finding("pass", "coverage", text, where)])]
    if named:
        share = f"{tokens:,.0f} tokens, {100 * tokens / named.targets:.1f} % of {named.name}'s {named.targets:,}"
        if all(f.status == "pass" for f in implied_bytes(run)):
            return [
                *found,
                Finding("warning", "coverage", f"{share}, but the bytes are right: another tokenizer than the name says", where),
            ]
        return [*found, Finding("fail", "coverage", share, where)]
    return [*found, Finding("not checkable", "coverage", f"{tokens:,.0f} tokens; the official count of this tokenizer is not known", where)]


def artifact_bytes(run: Run, shipped_code: int | None = None) -> list[Finding]:
    """Code and model against the cap, as the log adds them up and as the parts add up."""
    model = run.models[-1] if run.models else None
    code = run.code.get("compressed") or run.code.get("")
    if run.totals:
        total = run.totals[-1]
    elif model and not code and model.value <= CAP_BYTES:
        return [
            Finding("not checkable", "bytes", f"{model.value:,.0f} bytes of model; the log does not say what the code takes", run.at(model))
        ]
    elif model and not code:
        total = model
    elif model and code:
        total = Number(model.value + code.value, model.line)
    else:
        return [Finding("not checkable", "bytes", "the log has no total of code and model", run.file)]
    parts = f" = {model.value:,.0f} model + {total.value - model.value:,.0f} code" if model and total.value > model.value else ""
    over = total.value - CAP_BYTES
    text = f"{total.value:,.0f} bytes{parts}, {abs(over):,.0f} {'over' if over > 0 else 'below'} the cap"
    if over <= 0:
        counted = {total.value - n.value for n in run.code.values()} | {0.0}
        if model and model.value > CAP_BYTES - (code.value if code else 0):
            return [Finding("fail", "bytes", f"{text}, but the model alone has {model.value:,.0f}", run.at(model))]
        if model and run.code and model.value not in counted and total.value != model.value:
            return [Finding("warning", "bytes", f"{text}; the log's own parts do not add up to it", run.at(total))]
        return [Finding("pass", "bytes", text, run.at(total))]
    fits = model and shipped_code is not None and model.value + shipped_code <= CAP_BYTES
    if model and fits:
        real = model.value + (shipped_code or 0)
        return [Finding("warning", "bytes", f"{text}; with the code as shipped it is {real:,.0f} and fits", run.at(total))]
    return [Finding("fail", "bytes", text, run.at(total))]


def clocks(run: Run) -> list[Finding]:
    """Training, training with the Hessians, evaluation: each against 600 s; and the machine they ran on."""
    found = []
    stop = run.stop or (run.last_train_time if run.finals or run.totals else None)
    ranks = run.setting("world_size")
    if ranks and ranks != "8":
        found.append(Finding("warning", "hardware", f"world_size {ranks}: the limits are for 8", run.at(run.settings["world_size"][1])))
    if stop is None:
        found.append(Finding("not checkable", "training clock", "the log does not say when training ended", run.file))
    elif ranks not in ("", "8"):
        found.append(Finding("not checkable", "training clock", f"{stop.value:.1f} s on another machine", run.at(stop)))
    else:
        late = stop.value - stop.half > LIMIT_SECONDS + max(run.step_seconds, 0.5)
        text = f"training ended at {stop.value:.1f} s"
        found.append(Finding("fail" if late else "pass", "training clock", text, run.at(stop)))
        if run.hessians:
            total = stop.value + run.hessians[-1].value
            text = f"{stop.value:.1f} s + {run.hessians[-1].value:.1f} s of Hessians = {total:.1f} s"
            late = total - stop.half > LIMIT_SECONDS + 0.05
            note = "; tolerated in many records up to now" if late else ""
            found.append(Finding("warning" if late else "pass", "Hessian clock", text + note, run.at(run.hessians[-1])))
    return found + (evaluation_clock(run) if ranks in ("", "8") else [])


def evaluation_clock(run: Run) -> list[Finding]:
    phases = run.phases
    if not phases and run.total_eval is None:
        return [Finding("not checkable", "evaluation clock", "the log has no times of evaluation", run.file)]
    total = sum(n.value for _, n in phases)
    listed = " + ".join(f"{n.value:.1f}" for _, n in phases[:6]) + (" + ..." if len(phases) > 6 else "")
    text = f"{total:.1f} s in {len(phases)} phase{'s' * (len(phases) != 1)}" + (f" ({listed})" if len(phases) > 1 else "")
    line = phases[-1][1] if phases else run.total_eval
    if run.total_eval and run.total_eval.value > total:
        total, line = run.total_eval.value, run.total_eval
        text = f"{total:.1f} s by the log's own total"
    assert line is not None
    return [Finding("fail" if total > LIMIT_SECONDS + 0.05 else "pass", "evaluation clock", text, run.at(line))]


def legality(run: Run) -> list[Finding]:
    """What the log's lines show of C1-C4. A log can show that a rule was broken, never that it was kept."""
    found: dict[tuple[str, str], Finding] = {}
    for number, line in run.text:
        stripped = line.strip()
        if _is_setting(stripped):
            continue
        told = re.sub(r"\b[\w.-]+\s*[=:]\s*(?:False|0|off|none|disabled)\b", "", stripped, flags=re.I)
        for rule, pattern, what in _METHODS:
            if (rule, what) not in found and re.search(pattern, told, re.I):
                found[rule, what] = Finding("fail", rule, f"{what}: {stripped[:80]}", run.at(number))
        hints = re.match(r"ngram_tilt:hints\b.*\bwithin_gate=(\d+).*\bword_gate=(\d+)", stripped)
        if hints and (int(hints[1][:12]) or int(hints[2][:12])):
            text = f"n-gram hints that read the target: within_gate={hints[1]} word_gate={hints[2]}"
            found["C1", "tilt"] = Finding("fail", "C1", text, run.at(number))
        if re.search(r"precompute time excluded from eval", stripped):
            found["clock", "hints"] = Finding("warning", "evaluation clock", f"time left out: {stripped[:80]}", run.at(number))
    found |= {("gain", f.text): f for f in too_good(run)}
    rescored = _scored_after_adaptation(run)
    if rescored:
        found["C4", "again"] = rescored
    shards = re.search(r"\btrain_shards:\s*(\d+)", "\n".join(line for _, line in run.text))
    named = family(run)
    if shards and shards[1] == "1499" and (named is None or named.name == "CaseOps"):
        text = "1,499 training shards: what prepare_caseops_data.py leaves when it puts validation documents into training (issue 2127)"
        found["data", "overlap"] = Finding("warning", "data", text, run.file)
    return list(found.values())


def _is_setting(line: str) -> bool:
    """`name: value` or `name:value name:value`: that a method exists does not say that it ran."""
    words = line.split()
    return all(re.fullmatch(r"\w+:\S+", word) for word in words) or (len(words) == 2 and re.fullmatch(r"\w+:", words[0]) is not None)


def too_good(run: Run) -> list[Finding]:
    """Evaluation methods that keep the rules have never gained more than about 0.05 bits per byte over the plain model."""
    best = headline(run)
    plain = next((s for s in reversed(run.scores) if s.kind != "final" and best and s.line < best.line), None)
    if best is None or plain is None or plain.bpb.value - best.bpb.value <= MOST_GAIN:
        return []
    pattern = r"\b_?(?:n_?gram|ppm|slot)_\w+"
    names = sorted({name.lower() for source in run.sources for name in re.findall(pattern, source, re.I)})
    named = f"; its program names {', '.join(names[:4])}" if names else ""
    gain = f"{best.name} {best.bpb.value:.4f} is {plain.bpb.value - best.bpb.value:.4f} below {plain.name} {plain.bpb.value:.4f}"
    text = f"{gain}: more than a window or test-time training gives{named}"
    return [Finding("warning", "C1-C4", text, run.at(best.line))]


def _scored_after_adaptation(run: Run) -> Finding | None:
    done = next((i for i, (_, line) in enumerate(run.text) if re.match(r"\w*ttt\w*:done\b.*val_loss", line.strip())), None)
    if done is None:
        return None
    line = run.text[done][0]
    scores = [s for s in run.finals if s.line > line and "ttt" in s.name.lower()]
    other = next((s for s in scores if abs(s.bpb.value - scores[0].bpb.value) > 2e-4), None)
    if other is None:
        return None
    return Finding(
        "fail", "C4", f"scored again after test-time training over the same text: {other.name} {other.bpb.value}", run.at(other.line)
    )
