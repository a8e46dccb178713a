"""The JSON files of a run, read into checked values: a type or a size that cannot be is told by file and field.

Declared is, once, what some reader uses; what a file says beyond that is passed on unread.
"""

import contextlib
import shlex
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NotRequired, TypedDict, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from golf_jax.config import GolfError, Recipe, from_dict, parse_json
from golf_jax.config.base import check
from golf_jax.files import json_rows, read_bytes, sealed

MAX_BYTES = 1 << 26  # of one file of a run

# Bounds are those of the value of a number, of the length of anything else; text with bounds goes to the screen, so it is printable.
Count = Annotated[int, 0, 1 << 53]
AtLeastOne = Annotated[int, 1, 1 << 53]
Positive = Annotated[float, 0.0, 1e12]
Number = Annotated[float, -1e300, 1e300]
Label = Annotated[str, 1, 200]


class Shard(TypedDict):
    name: str
    bytes: Count
    content: str


class Identity(TypedDict):
    """What text it was (`golf_jax.data.identity`)."""

    tokenizer: str
    train: list[Shard]
    val: list[Shard]


class Facts(TypedDict):
    """See `golf_jax.evaluation.score.Facts`."""

    targets: Count
    covered: Count
    duplicates: Count
    order_violations: Count
    updates: Count
    causal: bool | None
    normalization_error: Positive | None
    exactly_once: bool


class Scored(TypedDict):
    mode: Label
    val_loss: Positive
    val_bpb: Positive
    legal: bool


class Evaluation(TypedDict):
    """One evaluation of the packed model, as `golf_jax.evaluation.Result.to_dict` has it."""

    nll_nats: Positive
    tokens: AtLeastOne
    bytes: AtLeastOne
    val_loss: Positive
    val_bpb: Positive
    legal: bool
    partial: bool
    facts: Facts
    seconds: dict[Label, Positive]


class Train(TypedDict):
    steps: Count
    seconds: Positive
    final_loss: Number
    compile_seconds: dict[Label, Positive]


class Sizes(TypedDict):
    train_and_calibration_seconds: Positive
    artifact_bytes: Count
    code_bytes: Count
    code_bytes_raw: Count
    total_bytes: Count


class Pack(Sizes):
    pre_quantization: Scored
    headroom_bytes: Annotated[int, -1 << 53, 1 << 53]
    sha256: Label


class Change(TypedDict):
    field: Label
    before: Any
    after: Any


class Stages(TypedDict, total=False):
    """stages.json: what each finished stage of a run said."""

    recipe: dict[str, Any]
    text: Identity
    train: Train
    pack: Pack
    evaluations: Annotated[dict[Label, Evaluation], 1, 100]
    changes: list[Change]


class Result(Sizes):
    """result.json of a finished run."""

    recipe: Label
    steps: Count
    train_seconds: Positive
    sha256: NotRequired[Label]
    tokenizer_sha256: Label
    evaluations: Annotated[dict[Label, Evaluation], 1, 100]


class Environment(TypedDict):
    """environment.json: where a run ran."""

    devices: Annotated[list[Label], 1, 1 << 20]
    devices_used: NotRequired[AtLeastOne]
    cores_used: NotRequired[AtLeastOne]
    attention: NotRequired[Label]
    packages: NotRequired[dict[Label, Label | None]]


class Meta(TypedDict):
    """What a checkpoint says beside its arrays."""

    step: Count
    seconds: Positive
    position: dict[Label, Count]
    recipe: dict[str, Any]
    text: Identity
    dtype: Label
    digests: dict[str, list[Count]]
    loss: NotRequired[Number]


class Step(TypedDict):
    """A training step in metrics.jsonl; None for what is not finite."""

    step: Count
    seconds: Number
    lr_factor: Number
    loss: Number
    momentum: Number | None
    grad_norm: Number | None


class Validation(TypedDict):
    """A validation during training in metrics.jsonl."""

    step: Count
    seconds: Number
    val_loss: Number | None
    val_bpb: Number


def read_json(path: Path, fix: str = "") -> Any:
    """JSON of a file of a run. Raises GolfError naming it and the fix, if one is given, FileNotFoundError where it is not there."""
    fix = f"; {fix}" if fix else ""
    try:
        if not path.exists():
            raise FileNotFoundError(path)
        return parse_json(read_bytes(path, MAX_BYTES))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        if isinstance(error, GolfError) and str(path) in str(error):
            raise GolfError(f"{error}{fix}") from None
        raise GolfError(f"{path}: cannot be read ({next(iter(str(error).splitlines()), type(error).__name__)}){fix}") from None


def read_config(run: Path) -> Recipe:
    """The recipe in config.json of the run directory. Raises GolfError naming the file."""
    file = run / "config.json"
    try:
        stored = read_json(file)
    except FileNotFoundError:
        raise GolfError(f"{run}: no run is there (config.json is missing)") from None
    try:
        return from_dict(Recipe, stored)
    except GolfError as error:
        raise GolfError(f"{file}: {error}{by_other_code(run)}") from None


def by_other_code(run: Path) -> str:
    """What follows the refusal of a file that the run in `run` wrote where another version of golf_jax wrote it; else nothing."""
    from golf_jax.artifact.code import runs_here  # where something is refused, not in every command

    file = run / "code.pyz"
    with contextlib.suppress(GolfError, OSError):
        if file.exists() and not runs_here(read_bytes(file, MAX_BYTES)):
            goes_on = f"python {shlex.quote(str(file))} --resume {shlex.quote(str(run))}"
            return f" (another version of golf_jax wrote this run; its own code goes on with it: {goes_on})"
    return ""


def read_stages(run: Path) -> Stages:
    """What each finished stage of the run said (`stages.json`); nothing where there is none. Raises GolfError if it was altered."""
    file, fix = run / "stages.json", "remove it to repeat what follows training"
    try:
        stages = read_json(file, fix)
    except FileNotFoundError:
        return {}
    if not isinstance(stages, dict) or stages != sealed(stages):
        raise GolfError(f"{file}: was altered; {fix}{by_other_code(run)}")
    del stages["sha256"]
    checked = cast(Stages, _checked(stages, Stages, file, fix))
    for stage, before in (("pack", "train"), ("evaluations", "pack")):
        check(stage not in checked or before in checked, f"{file}: tells {stage} and not {before}, which comes first; {fix}")
    return checked


def read_result(run: Path) -> Result:
    """Of a finished run. Raises GolfError naming file and field, FileNotFoundError where it is not there."""
    file = run / "result.json"
    fix = f"go on with the run to make it anew: python -m golf_jax.train --resume {shlex.quote(str(run))}"
    return cast(Result, _checked(read_json(file, fix), Result, file, fix))


def read_environment(run: Path) -> Environment | None:
    """Where the run ran; None where it does not say. Raises GolfError naming file and field."""
    file, fix = run / "environment.json", "put back what the run wrote, or remove it: where the run ran is then unknown"
    try:
        return cast(Environment, _checked(read_json(file, fix), Environment, file, fix))
    except FileNotFoundError:
        return None


def read_metrics(run: Path) -> tuple[list[Step], list[Validation]]:
    """Steps with a loss and validations with a score, in their order. Raises GolfError naming file, step and field."""
    file = run / "metrics.jsonl"
    rows = json_rows(file)

    def of(event: str, kind: Any, score: str) -> Any:
        found = [row for row in rows if row["event"] == event and row.get(score, "") is not None]  # null: it was not finite
        return [_checked(row, kind, f"{file}: step {str(row.get('step'))[:20]!a}", "remove that line") for row in found]

    return of("train", Step, "loss"), of("validation", Validation, "val_bpb")


def checked_meta(meta: Any, step: int) -> dict[str, Any]:
    """The meta data of checkpoint `step`. Raises GolfError if they were altered."""
    if not isinstance(meta, dict) or meta != sealed(meta) or meta.get("step") != step:
        raise GolfError(f"checkpoint {step}: its meta data were altered")
    return _checked(meta, Meta, f"checkpoint {step}", "its meta data were altered")


def newest_meta(run: Path) -> dict[str, Any]:
    """What the newest checkpoint whose meta data are whole says of the run; nothing where there is none."""
    for folder in sorted((p for p in run.glob("checkpoints/*") if p.name.isdecimal()), key=lambda p: -int(p.name)):
        with contextlib.suppress(GolfError, FileNotFoundError):
            if isinstance(meta := read_json(folder / "meta/metadata"), dict) and meta == sealed(meta):
                return meta
    return {}


def _checked(value: Any, hint: Any, where: str | Path, fix: str) -> Any:
    if problem := next(_problems(value, hint, ""), ""):
        raise GolfError(f"{where}: {problem}; {fix}")
    return value


def _problems(value: Any, hint: Any, field: str) -> Any:
    """Yields what of the JSON data `value` is not what `hint` declares, by field."""
    kind, args = get_origin(hint) or hint, get_args(hint)
    dot = f"{field}." if field else ""
    if is_typeddict(hint):
        if not isinstance(value, dict):
            yield _is(field, value, "an object")
            return
        for name, inner in get_type_hints(hint, include_extras=True).items():
            if name in value:
                yield from _problems(value[name], get_args(inner)[0] if get_origin(inner) is NotRequired else inner, f"{dot}{name}")
            elif name in hint.__required_keys__:
                yield f"{dot}{name} is missing"
    elif kind is Annotated:
        inner, low, high = args
        wrong = next(_problems(value, inner, field), "")
        number = not isinstance(value, list | dict | str)
        if wrong:
            yield wrong
        elif not low <= (value if number else len(value)) <= high or (isinstance(value, str) and not value.isprintable()):
            yield _is(field, value, f"{'from' if number else 'of length'} {low:g} to {high:g}{', printable' * isinstance(value, str)}")
    elif kind in (Union, UnionType):
        if value is not None:
            yield from _problems(value, args[0], field)
    elif kind is list and isinstance(value, list) and args:
        for i, inner in enumerate(value):
            yield from _problems(inner, args[0], f"{dot}{i}")
    elif kind is dict and isinstance(value, dict):
        for name, inner in value.items():
            yield from _problems(name, args[0], f"a name in {field}")
            yield from _problems(inner, args[1], f"{dot}{name}")
    elif kind is not Any:
        sound = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        if not sound:
            words = {int: "a whole number", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "an object"}
            yield _is(field, value, words[kind])


def _is(field: str, value: Any, what: str) -> str:
    return f"{field or 'it'} is {ascii(value)[:60]}, not {what}"
