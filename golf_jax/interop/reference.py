"""Reference sets, format 1 (docs/reference-format.md): arrays by fixed names, settings and tolerances as data.

`Set` is one directory or portable file in memory, `Case` one computation in it: its configuration, parameters and inputs in our terms,
and the comparison of what we compute, by the format's names, with what is stored under the tolerances the set gives.
"""

import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from golf_jax.config import GolfError, GroupConfig, ModelConfig, Recipe, load_recipe, named, parse_json
from golf_jax.config.serialize import from_dict, to_dict
from golf_jax.data.sidecar import Sidecar
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation.queue import BOS
from golf_jax.files import read_bytes, refuse_pointer
from golf_jax.interop.comparison import CheckResult, bars_of
from golf_jax.interop.hparams import scoring_settings
from golf_jax.interop.packed import raw_limit
from golf_jax.mesh import make_mesh
from golf_jax.model import Model, from_tensors

Arrays = dict[str, np.ndarray]
LONGEST_CHAIN = 64  # of cases that refer to each other
# Items that a case takes as given; everything else in its section is compared.
INPUTS = {
    "params": ".+", "model": "tokens|segments|cu_seqlens", "grads": "tokens|segments", "newton_schulz": "input",
    "optimizer": "start/.+|grad/.+", "init": "", "schedule": "step|seconds", "loader": "shard/.+|shard_lengths",
    "train": "(warmup_)?(tokens|segments)", "quant": "calibration",
    "eval": "tokens|base_bytes|leading_space|boundary|target_bytes", "ttt": "tokens|base_bytes|leading_space|boundary|target_bytes",
    "units": "in/.+",
}  # fmt: skip


class NotComputed(GolfError):
    """Something a set holds that this implementation has no part for."""


def is_input(section: str, item: str) -> bool:
    return item.startswith("index/") or re.fullmatch(INPUTS[section], item.partition("@")[0]) is not None


def tensor_of(item: str) -> str:
    """The tensor an item is about: `after/3/tok_emb.weight` -> `tok_emb.weight`."""
    return re.sub(r"^\w+/(\d+/)?", "", item)


@dataclass
class Set:
    """One reference set. Raises GolfError naming what is damaged."""

    path: Path
    devices: int = 1
    tokenizer: str = ""
    """SentencePiece model of the script, where texts are to be cut into tokens."""
    json: dict[str, Any] = field(default_factory=dict)
    items: dict[str, Arrays] = field(default_factory=dict)
    """By `section/case`, then by item."""
    not_checked: dict[str, str] = field(default_factory=dict)
    """What was not compared, and why."""
    _cache: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        portable = self.path.is_file()
        if not portable and not (self.path / "reference.json").is_file():
            what = "holds no reference.json" if self.path.is_dir() else "no such file or directory"
            raise GolfError(f"{self.path}: {what}; a reference set is a directory with reference.json, or one portable npz file")
        arrays: Arrays = {}
        for file in [self.path] if portable else sorted(self.path.glob("*.npz")):
            arrays |= {key if portable else f"{file.stem}/{key}": array for key, array in read_npz(file).items()}
        if portable and "reference" not in arrays:
            raise GolfError(f"{self.path}: no entry 'reference': not a portable reference set of format 1")
        self.json = _read_json(
            str(arrays.pop("reference")) if portable else read_bytes(self.path / "reference.json").decode(errors="replace"), self.path
        )
        for section, about in self.json["sections"].items():
            if section not in INPUTS:
                raise GolfError(f"{self.path}: unknown section {section!r}; sections are {', '.join(INPUTS)}")
            self.items |= {f"{section}/{case}": {} for case in about["cases"]}
        for key, array in arrays.items():
            section, case, item = ([*key.split("/", 2), "", ""])[:3]
            if f"{section}/{case}" not in self.items or not item:
                raise GolfError(f"{self.path}: entry {key!r} belongs to no case that reference.json lists")
            if item.partition("@")[0] in ("tokens", "warmup_tokens", "segments", "cu_seqlens") and array.dtype.kind not in "iu":
                raise GolfError(f"{self.path}: entry {key!r} is {array.dtype}; tokens and segments are integers")
            self.items[f"{section}/{case}"][item] = array
        for kind in ("inputs", "base", "params"):
            for where in self.items:
                chain = [where]
                while (following := self._following(kind, chain[-1])) in self.items:
                    if following in chain or len(chain) == LONGEST_CHAIN:
                        via = " -> ".join([*chain, following][:4])
                        raise GolfError(f"{self.path}: reference.json: the `{kind}` of {where} lead in a circle ({via}); name another case")
                    chain.append(following)

    def _following(self, kind: str, where: str) -> str:
        """The case from which this one takes what it has not itself: "" for none."""
        section, _, name = where.partition("/")
        value = str(self.json["sections"][section]["cases"][name].get(kind, ""))
        if kind != "inputs" and (kind == "base") != (section == "params"):  # where it is not read
            return ""
        return f"params/{value}" if kind == "base" else "/".join(value.partition("@")[0].removeprefix("own/").split("/")[:2])

    @cached_property
    def recipe(self) -> Recipe:
        """The shipped recipe, or the recipe file of the set."""
        name = self.json["recipe"]
        if not name.endswith(".py"):
            return load_recipe(name)
        if self.path.is_file() or Path(name).name != name:
            raise GolfError(f"{self.path}: recipe {name!r}: a recipe file lies beside reference.json, and a portable set has none")
        return load_recipe(str(self.path / name))

    def cases(self, section: str) -> Iterator["Case"]:
        for where in self.items:
            if where.startswith(f"{section}/"):
                yield self.case(where)

    def counts(self, sections: Iterable[str]) -> tuple[int, int]:
        """(arrays and facts that were compared, all that these sections hold beside what is given)."""
        pairs = [case.counts for section in sections for case in self.cases(section)]
        return sum(compared for compared, _ in pairs), sum(held for _, held in pairs)

    def case(self, where: str) -> "Case":
        if where not in self.items:
            raise GolfError(f"{self.path}: refers to {where}, which is not there")
        return self.once(("case", where), lambda: Case(self, where))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Compiled functions and results that several cases share."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def read_npz(path: Path) -> Arrays:
    """All entries of an npz file, nothing pickled."""
    if not path.is_file():  # a pipe would block for ever
        raise GolfError(f"{path}: cannot be read (not there, or no file)")
    with open(path, "rb") as file:
        refuse_pointer(path, file.read(64))
    try:
        with np.load(path, allow_pickle=False) as z:
            claimed, allowed = sum(entry.file_size for entry in z.zip.infolist()), raw_limit(path.stat().st_size)
            if claimed > allowed:
                raise ValueError(f"its entries claim {claimed:,} bytes; of a file of this size at most {allowed:,} are read")
            return {key: z[key] for key in z.files}
    except Exception as e:  # damage of zip and npy raises half a dozen types
        told = str(e) and not isinstance(e, zipfile.BadZipFile) and "pickle" not in str(e)  # NumPy's advice there is to load it unsafely
        text = str(e).splitlines()[0] if told else type(e).__name__
        raise GolfError(f"{path}: not a readable npz file without pickles ({text})") from None


def _read_json(text: str, path: Path) -> dict[str, Any]:
    with named(f"{path}: reference.json"):
        found = parse_json(text)
    try:
        if found.get("format") != 1:
            raise GolfError(f"{path}: format is {found.get('format')!r}, this reader knows 1")
        if not isinstance(found["recipe"], str):
            raise GolfError(f"{path}: reference.json: `recipe` is a name")
        if odd := [n for n, s in found["sections"].items() if not all(isinstance(case, dict) for case in s["cases"].values())]:
            raise GolfError(f"{path}: reference.json: section {odd[0]!r}: `cases` holds an object for every case")
        return found
    except (AttributeError, KeyError, TypeError) as e:
        raise GolfError(f"{path}: reference.json is not what the format asks for ({type(e).__name__}: {e})") from None


class Case:
    """One computation of a set."""

    def __init__(self, refs: Set, where: str) -> None:
        self.refs, self.where = refs, where
        self.section, self.name = where.split("/", 1)
        about = refs.json["sections"][self.section]
        self.settings: dict[str, Any] = about["cases"][self.name]
        self._given = (self.settings.get("tolerances", {}), about.get("tolerances", {}))
        self._rows: dict[Any, CheckResult] = {}
        self.added: set[str] = set()
        """Items and facts that were compared."""

    @property
    def own(self) -> Arrays:
        return self.refs.items[self.where]

    @cached_property
    def seen(self) -> Arrays:
        """Own items, and the inputs that `inputs` names elsewhere."""
        found, (source, _, spec) = dict(self.own), self.settings.get("inputs", "").partition("@")
        for item, array in self.refs.case(source).seen.items() if source else ():
            if is_input(self.section, item) or (self.section == "loader" and item == "tokens"):
                found.setdefault(item, array[self.index(spec)] if item == "tokens" else array)
        return found

    def index(self, spec: str) -> tuple:
        """What `@spec` means to numpy."""
        parts: tuple = ()
        for p in filter(None, spec.split(",")):
            if ":" in p:
                parts += (slice(*(int(x) if x else None for x in p.split(":"))),)
            elif re.fullmatch(r"-?\d+", p):
                parts += (int(p),)
            else:
                if (found := self.own.get(f"index/{p}")) is None:
                    raise GolfError(f"{self.refs.path}: {self.where}: @{p} needs the entry index/{p}")
                parts += tuple(found.T) if found.ndim == 2 else (found,)
        return parts

    def under(self, prefix: str) -> Arrays:
        """Items that start with `prefix`, without it."""
        return {k.removeprefix(prefix): v for k, v in self.seen.items() if k.startswith(prefix)}

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with the set's configuration, the parameter set's and the case's laid on it. NotComputed where a field is unknown."""
        layers = [self.settings.get("config", {})]
        if not self.settings.get("shipped"):
            by_name = scoring_settings(self.refs.json.get("hyperparameters", {}), self.settings.get("note", ""))
            source = self.source.settings.get("config", {}) if self.source else {}
            layers = [by_name, self.refs.json["config"], source, *layers]
        document = to_dict(self.refs.recipe)
        try:
            for layer in layers:
                for dotted, value in layer.items():
                    for target, field_name in _places(document, dotted):
                        target[field_name] = value
            made = from_dict(Recipe, document)
        except (GolfError, KeyError, TypeError) as e:
            raise NotComputed(f"{e}" if isinstance(e, GolfError) else f"config: no field {e}") from None
        fake = replace(made.model.fake_quant, in_eval=bool(self.settings.get("fake_quant")))
        model = replace(made.model, fake_quant=fake)
        if "smear_gate.weight" in self.stored:
            model = replace(model, gate_window=self.stored["smear_gate.weight"].shape[-1])
        if self.settings.get("smear_bos_fix"):
            model = replace(model, boundary_token=BOS)
        named = any("model.rope_bf16_frequencies" in layer for layer in layers)
        if made.numerics == "fp32" and not named:  # everything float32, the frequencies too
            model = replace(model, rope_bf16_frequencies=False)
        if self.settings.get("muon_bf16"):
            made, model = replace(made, numerics="as_run"), replace(model, bf16_params=())
        return replace(made, model=model)

    @property
    def model(self) -> ModelConfig:
        return self.recipe.model

    @property
    def matrices(self) -> GroupConfig:
        """The group of the recipe that Muon updates. NotComputed where there is none."""
        for group in self.recipe.optim.groups:
            if group.kind == "muon":
                return group
        raise NotComputed("no group of the recipe is updated by Muon")

    @property
    def looping(self) -> bool:
        return self.settings.get("looping", True)

    @cached_property
    def source(self) -> "Case | None":
        """The case of `params` that this one is about in the end, through `quant/` and `own/`."""
        name = self.name if self.section == "params" else self.settings.get("params", "main")
        if "/" in name:
            return self.refs.case("/".join(name.removeprefix("own/").split("/")[:2])).source
        held = [where for where in self.refs.items if where.startswith("params/")]
        return self.refs.case(f"params/{name}" if f"params/{name}" in held else held[0]) if held else None

    @cached_property
    def stored(self) -> Arrays:
        """The stored parameters that the case is about in the end, with what they take from their base, in their dtype."""
        if self.source is not self:
            return self.source.stored if self.source else {}
        base, dtype = self.settings.get("base"), self.settings.get("dtype")
        tensors = (self.refs.case(f"params/{base}").stored if base else {}) | self.own
        return {n: x.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32) for n, x in tensors.items()}

    @cached_property
    def tensors(self) -> Arrays:
        """The weights of the case, by the challenge's names and in its orientation."""
        name = self.settings.get("params", "main")
        if "/" not in name:
            return self.refs.case(f"params/{name}").stored
        from golf_jax.interop.checks import quantization, training  # they read cases

        own, where = name.startswith("own/"), name.removeprefix("own/")
        if where.startswith("train/"):
            run, which = where.rsplit("/", 1)
            return training.weights(self.refs.case(run), which)
        return quantization.dequantized(self.refs.case(where), own=own)

    @cached_property
    def params(self) -> Arrays:
        """The weights as our parameters."""
        return from_tensors(self.model, self.tensors)

    @cached_property
    def opened(self) -> Model:
        """The network with these weights, as it is evaluated here."""
        return replace(Model.open(self.model, self.params, jax.default_backend()), looping=self.looping)

    @property
    def mesh(self) -> Mesh:
        return make_mesh(self.refs.devices)

    @cached_property
    def text(self) -> tuple[np.ndarray, ByteTables | Sidecar]:
        """The first tokens of the stream, as many as the case says, and what counts their bytes."""
        seen = self.seen
        if not {"target_bytes", "base_bytes"} & {*seen}:
            raise NotComputed("neither byte tables nor target_bytes")
        tokens = seen["tokens"][: self.settings.get("tokens")].astype(np.uint16)
        if "target_bytes" in seen:
            return tokens, Sidecar(np.append(0, seen["target_bytes"])[: len(tokens)])
        return tokens, ByteTables(seen["base_bytes"].astype(np.int16), seen["leading_space"].astype(bool), seen["boundary"].astype(bool))

    def add(self, item: str, ours: Any, reference: Any, start: Any = None) -> None:
        """Compare one array or fact under the set's tolerance for it."""
        ours, reference = np.asarray(ours), np.asarray(reference)
        with named(f"{self.refs.path}: {self.where}"):
            key, bars = self.bars(item, reference.shape)
        self.added.add(item)
        for bar, part in bars:
            label = f"{key}[:{bar['until']}]" if "until" in bar else f"{key} of {bar['names']}" if "names" in bar else key
            row = self._rows.setdefault((key, id(bar)), CheckResult(f"{self.where}: {label}", bar["value"], bar["measure"]))
            if ours.shape != reference.shape:
                row.add(item, ours, reference)
            elif reference[part].size or not part:
                row.add(item, ours[part], reference[part], start)

    def bars(self, item: str, shape: tuple[int, ...]) -> tuple[str, list[tuple[dict[str, Any], Any]]]:
        """The tolerances of an item (`bars_of`): the longest key of the case's, or else of its section's, that the item begins with."""
        for given in self._given:
            if keys := [k for k in given if f"{item.partition('@')[0]}/".startswith(f"{k}/")]:
                return (key := max(keys, key=len)), bars_of(given[key], item, tensor_of(item), shape)
        raise GolfError(f"no tolerance for {item}")

    def compare(self, ours: Mapping[str, Any], start: Mapping[str, Any] | None = None) -> None:
        """Every stored item and fact that the section computes, by the format's names; the others are named as not checked.

        start: by tensor, what `change` measures from.
        """
        for item, reference in self.held.items():
            base, _, spec = item.partition("@")
            if (found := _fact(ours, base)) is None:
                if item not in self.added:
                    self.refs.not_checked.setdefault(f"{self.where}/{item}", "not computed here")
            elif isinstance(reference, str):
                self.add(item, found == reference, True)
            else:
                origin, pick = (start or {}).get(tensor_of(base)), self.index(spec)
                self.add(item, np.asarray(found)[pick], reference, None if origin is None else np.asarray(origin)[pick])

    @cached_property
    def held(self) -> dict[str, Any]:
        """What the set says and the case is compared with: arrays by item, facts as `FACT/TENSOR`."""
        if self.section == "params":
            return {}
        arrays = {item: x for item, x in self.own.items() if not is_input(self.section, item)}
        return arrays | {f"{fact}/{name}": x for name, about in self.settings.get("tensors", {}).items() for fact, x in about.items()}

    @property
    def counts(self) -> tuple[int, int]:
        """(arrays and facts of the case that were compared, all that are not given)."""
        return len({*self.held} & self.added), len(self.held)

    def results(self) -> list[CheckResult]:
        return [*self._rows.values()]


def _fact(ours: Mapping[str, Any], item: str) -> Any:
    """A fact of one tensor, or the norm of all that a pattern names; None where it is not known."""
    what, _, name = item.partition("/")
    if item in ours or not ("*" in name or "|" in name) or not what.endswith("norm"):
        return ours.get(item)
    found = [ours[k] for k in ours if k.startswith(f"{what}/") and matches(k[len(what) + 1 :], name)]
    return np.linalg.norm(found) if found else None


def matches(tensor: str, pattern: str) -> bool:
    """Is the tensor one of those that `blocks.*.attn.c_q.weight|tok_emb.weight` stands for?"""
    return any(fnmatchcase(tensor, part) for part in pattern.split("|"))


def _places(document: dict[str, Any], dotted: str) -> list[tuple[dict[str, Any], str]]:
    """The objects of a recipe that hold a field of the format, and its name there.

    `eval.stride` and `eval.ttt.FIELD` are settings of every method of evaluation that has them and is asked for, and `optim.FIELD`, where
    the groups have it, one of every group of a kind that reads it. Raises KeyError.
    """
    *path, last = dotted.split(".")
    if path == ["optim"] and last not in document["optim"]:
        kind = "adamw" if last in ("betas", "eps") else "muon"
        found = [group for group in document["optim"]["groups"] if group["kind"] == kind and last in group]
    elif dotted == "eval.stride" or path == ["eval", "ttt"]:
        methods = [m for name, m in document["eval"].items() if isinstance(m, dict) and (name != "sliding" or not path[1:])]
        found = [m for m in methods if last in m and m.get("epochs", 1)]
    else:
        for part in path:
            document = document[part]
        found = [document]
    if not found:
        raise KeyError(dotted)
    return [(target, last) for target in found]
