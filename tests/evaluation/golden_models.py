"""Model configurations and parameters of the small reference models (tests/golden and ../shared/golden)."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from golf_jax.config import ModelConfig, load_recipe
from golf_jax.data.tokenizer import ByteTables
from golf_jax.model import from_tensors


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as z:
        return {name: z[name] for name in z.files}


def model_config(pr: int, config: dict) -> ModelConfig:
    """The recipe's model at the size of the reference file, in float32."""
    c = {k.lower(): v for k, v in config.items()}
    model = load_recipe(f"pr{pr}").model
    size = dict(
        vocab_size=c["vocab_size"],
        width=c["model_dim"],
        num_heads=c["num_heads"],
        num_kv_heads=c["num_kv_heads"],
        rope_dims=c.get("rope_dims", 0),
        rope_bf16_frequencies=False,
        dtype="float32",
        attention="xla",
    )
    if model.bigram_buckets:
        size |= dict(bigram_buckets=c["bigram_vocab_size"], bigram_dim=c["bigram_dim"])
    if pr in (638, 1182):
        size["rope_train_len"] = c["rope_train_seq_len"]
    if pr == 1182:
        size |= dict(trigram_buckets=c["trigram_vocab_size"], trigram_dim=c["trigram_dim"], value_embed_dim=c["ve_dim"])
    if pr == 372:
        size["fake_quant"] = replace(model.fake_quant, min_numel=c["golden_numel"])
    return replace(model, **size)


def tensors(z: dict[str, np.ndarray], prefix: str = "param/", layers: int = 11) -> dict[str, np.ndarray]:
    """The tensors under `prefix`, banks of PR 1182 split into one matrix per layer."""
    found = {k[len(prefix) :]: v for k, v in z.items() if k.startswith(prefix)}
    if "smear_gate" in found:
        found["smear.gate"] = found.pop("smear_gate")
    banks = {
        "qo_bank": ("attn.c_q", "attn.proj"),
        "kv_bank": ("attn.c_k", "attn.c_v"),
        "mlp_up_bank": ("mlp.fc",),
        "mlp_down_bank": ("mlp.proj",),
    }
    for bank, parts in banks.items():
        if bank in found:
            stack = found.pop(bank)
            for j, part in enumerate(parts):
                found |= {f"blocks.{i}.{part}.weight": stack[j * layers + i] for i in range(layers)}
    return found


def params(config: ModelConfig, z: dict[str, np.ndarray], prefix: str = "param/") -> dict[str, np.ndarray]:
    return from_tensors(config, tensors(z, prefix, config.num_layers))


class Portable:
    """tests/golden/prN.npz: model, tokens and byte tables of one PR, sequences of 32, stride 8."""

    seq_len, stride = 32, 8

    def __init__(self, pr: int, folder: Path) -> None:
        self.z = load(folder / f"pr{pr}.npz")
        self.settings = json.loads(str(self.z["config"]))
        self.config = model_config(pr, self.settings)
        self.params = params(self.config, self.z)
        self.tokens = self.z["eval_tokens"].astype(np.uint16)
        self.tables = tables(self.z)

    def sums(self, tag: str) -> tuple[float, int, int]:
        return float(self.z[f"{tag}/nll_sum"]), int(self.z[f"{tag}/token_count"]), int(self.z[f"{tag}/byte_count"])


def tables(z: dict[str, np.ndarray]) -> ByteTables:
    """Byte tables under whichever names the file has them."""
    base, space, boundary = (
        next(z[k] for k in z if k.startswith("lut") and word in k) for word in ("base_bytes", "leading_space", "boundary")
    )
    return ByteTables(base, space, boundary)
