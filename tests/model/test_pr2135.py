"""PR 2135's model against the PR's own script in float32: logits, losses, gradients and activations, in packed rows and plain ones.

The reference sets are in the project's exchange format 1; what a case sets is in its JSON, the tolerances too.
"""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_recipes import some

from golf_jax.config import ModelConfig
from golf_jax.kernels.cross_entropy import softcap_cross_entropy, softcap_logits
from golf_jax.model import from_tensors, head_softcap, hidden, nll, to_tensors

HERE = Path(__file__).parent
RECORD = dict(
    num_layers=11, mlp_slope=0.5, q_gain_init=5.0, xsa_last_n=11, head_gate="narrow", head_gate_scale=0.5, input_smear_gate=True,
    layer_scale=True, skip="gated", two_lanes_from=8, loop_start=3, loop_end=5, loop_repeats=2, asym_softcap=True,
    dtype="float32", attention="xla",
)  # fmt: skip


class ReferenceSet:
    """Settings and arrays of a set, by case: a directory of one file per section, or one file with all."""

    def __init__(self, path: Path):
        if path.suffix == ".npz":
            archive = np.load(path)
            self.document = json.loads(str(archive["reference"]))
            self.arrays = {name: archive[name] for name in archive.files if name != "reference"}
        else:
            self.document = json.loads((path / "reference.json").read_text())
            sections = {s: np.load(path / f"{s}.npz") for s in ("params", "model", "grads")}
            self.arrays = {f"{s}/{name}": z[name] for s, z in sections.items() for name in z.files}
        self.params = self.items("params/main")
        shape = {name.split(".", 1)[1]: value for name, value in self.document["config"].items() if name.startswith("model.")}
        self.config = ModelConfig(**RECORD, **shape, gate_window=self.params["smear_gate.weight"].shape[1])

    def items(self, case: str) -> dict[str, np.ndarray]:
        return {name[len(case) + 1 :]: x for name, x in self.arrays.items() if name.startswith(f"{case}/")}

    def settings(self, section: str, case: str) -> dict:
        return self.document["sections"][section]["cases"][case]

    def inputs(self, section: str, case: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Tokens [B, T + 1] and segments [B, T], or None."""
        items = self.items(self.settings(section, case).get("inputs", f"{section}/{case}"))
        segments = items.get("segments")
        return items["tokens"].astype(np.int32), None if segments is None else segments.astype(np.int32)

    def compare(self, section: str, item: str, ours, theirs: np.ndarray, name: str) -> None:
        tolerance = self.document["sections"][section]["tolerances"][item]
        ours, theirs = np.asarray(ours, np.float64), theirs.astype(np.float64)
        assert ours.shape == theirs.shape, name
        error = {
            "abs": lambda: np.abs(ours - theirs).max(),
            "rel": lambda: np.abs((ours - theirs) / theirs).max(),
            "of max": lambda: np.abs(ours - theirs).max() / np.abs(theirs).max(),
            "rel L2": lambda: np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) if theirs.any() else np.abs(ours).max(),
            "equal": lambda: float(np.mean(ours != theirs)),
        }[tolerance["measure"]]()
        assert error <= tolerance["value"], f"{name}: {error:.2e} {tolerance['measure']}"


@functools.cache
def load(which: str) -> ReferenceSet:
    path = HERE.parent / "reference/pr2135_model.npz" if which == "portable" else HERE.parents[2] / "shared/reference/pr2135"
    if not path.exists():
        pytest.skip("needs the reference data in ../shared, which is not part of the repository")
    return ReferenceSet(path)


def picked(x: np.ndarray, spec: str) -> np.ndarray:
    """x[spec] as the format writes it after `@`: integers and slices."""
    parts = [slice(*(int(n) if n else None for n in p.split(":"))) if ":" in p else int(p) for p in spec.split(",")] if spec else []
    return x[tuple(parts)]


QUICK = {"xla_backend_optimization_level": 0}
# Cases of one hidden state go together: the softcaps of training and evaluation differ in the head only.
FORWARD = [("portable", ("loop", "loop_eval")), ("portable", ("noloop", "noloop_eval")), ("portable", ("bos_fix_eval",))]
SLOW = [("portable", ("rows_eval",)), *(("full", cases) for _, cases in FORWARD), ("full", ("rows_eval",))]
NOT_COMPARED = re.compile("tokens|segments|cu_seqlens|acts/.*/sdpa")  # inputs; attention before XSA, which is one operation here


@pytest.mark.parametrize(("which", "cases"), some([*FORWARD, *SLOW], FORWARD[0]))
def test_forward(which, cases):
    ref = load(which)
    settings = ref.settings("model", cases[0])
    tokens, segments = ref.inputs("model", cases[0])
    config = replace(ref.config, boundary_token=1) if settings.get("smear_bos_fix") else ref.config

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(params):
        heads, taps = {}, {}
        x_BTD = hidden(config, params, tokens[:, :-1], segments_BT=segments, looping=settings["looping"], tap=taps.__setitem__)
        rows, targets = x_BTD.reshape(-1, config.width), tokens[:, 1:].reshape(-1)
        for case in cases:
            softcap = head_softcap(config, params, training="eval_softcap" not in ref.settings("model", case))
            out = softcap_logits(rows, params["tok_emb"], softcap=softcap).reshape(*x_BTD.shape[:2], -1)
            losses = softcap_cross_entropy(rows, params["tok_emb"], targets, softcap=softcap).reshape(x_BTD.shape[:2])
            heads[case] = {"logits": out, "nll": losses, "logsumexp": jax.nn.logsumexp(out, -1), "loss": jnp.mean(losses)}
        return heads, taps

    heads, taps = run(from_tensors(config, ref.params))
    acts = {"acts/" + re.sub(r"^(\d+)/\d+/", r"\1/", name): x for name, x in taps.items()}
    for case in cases:
        ours = heads[case] | acts | {"layer_order": sum(config.layer_order(settings["looping"]), ())}
        for entry, theirs in ref.items(f"model/{case}").items():
            item, _, spec = entry.partition("@")
            if not NOT_COMPARED.match(item):
                ref.compare("model", item.split("/")[0], picked(np.asarray(ours[item]), spec), theirs, f"{case} {entry}")


@pytest.mark.slow
@pytest.mark.parametrize(("which", "case"), [("portable", "loop"), ("portable", "noloop"), ("full", "loop"), ("full", "noloop")])
def test_gradients(which, case):
    ref = load(which)
    settings, items, config = ref.settings("grads", case), ref.items(f"grads/{case}"), ref.config
    tokens, segments = ref.inputs("grads", case)

    def loss(params):
        x, y = tokens[:, :-1], tokens[:, 1:]
        return jnp.mean(nll(config, params, x, y, segments_BT=segments, looping=settings["looping"], training=True))

    value, grads = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(from_tensors(config, ref.params))
    ref.compare("grads", "loss", value, items["loss"], "loss")
    tensors = to_tensors(config, grads)
    for name in settings["without_gradient"]:
        assert tensors.pop(name) == 0
    ref.compare("grads", "grad_norm", np.sqrt(sum(np.sum(g.astype(np.float64) ** 2) for g in tensors.values())), items["grad_norm"], "norm")
    for entry, theirs in items.items():
        if entry.startswith("grad/"):
            name, _, spec = entry[5:].partition("@")
            ref.compare("grads", "grad", picked(tensors[name], spec), theirs, entry)
    for name, facts in settings["tensors"].items():
        ref.compare("grads", "norm", np.linalg.norm(tensors[name]), np.asarray(facts["norm"]), name)
