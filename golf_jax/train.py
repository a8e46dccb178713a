"""python -m golf_jax.train: text -> shards -> training -> average -> quantize -> pack -> reload from the bytes -> score."""

import contextlib
import json
import lzma
import platform as host
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import zstandard
from jax.sharding import Mesh

from golf_jax import cli
from golf_jax.artifact.calibration import collect_hessians
from golf_jax.artifact.code import bundle, raw_code_bytes
from golf_jax.artifact.ledger import estimate_bytes
from golf_jax.artifact.model import Loaded, Packed, load_model, pack_model
from golf_jax.config import CAP_BYTES, GolfError, Recipe, recipe_names, to_dict
from golf_jax.data import load_val_tokens, make_loader
from golf_jax.data.corpus import build_embedded
from golf_jax.data.loader import Loader
from golf_jax.data.prefetch import local_rows
from golf_jax.data.tokenizer import ByteTables, Tokenizer, byte_tables, check_tables, split_documents
from golf_jax.evaluation.fixed import evaluate_sliding, evaluate_standard
from golf_jax.evaluation.legality import check_model
from golf_jax.evaluation.score import Result
from golf_jax.evaluation.ttt import evaluate_ttt
from golf_jax.mesh import make_mesh, platform
from golf_jax.model import count, resolve, to_tensors
from golf_jax.processes import cache_directory, from_main, initialize_distributed, keep_compiled_programs, split_cpu
from golf_jax.quant import quantize, without_hessians
from golf_jax.training.checkpoints import Checkpoints, check_same_recipe
from golf_jax.training.loop import Trained, train
from golf_jax.training.rundir import RunDir, environment
from golf_jax.training.step import micro_rows

DESCRIPTION = """Train, pack and score one model: data -> train -> average -> quantize -> pack -> reload from the bytes -> score.

With no argument: a small model on the text every Python carries, on CPU, in minutes. Any field of a recipe is a flag:

  python -m golf_jax.train pr2005 --model.width 128 --budget.steps 100 --data.train 'shards/train_*.bin' ...

The run directory holds config, log, metrics, artifact and result."""


@dataclass(frozen=True)
class Options:
    run_dir: str = ""
    """Directory of this run; default runs/<recipe>-<time>."""
    resume: str = ""
    """Run directory of an interrupted run (with checkpoints) to go on with."""
    devices: int = 0
    """Devices to use; 0: all. Of a CPU this many are made; 0: about one per core."""
    emulate_devices: int = 0
    """Reproduce the data order of this many ranks, with the same tokens per step (the recipes' own number is 8)."""


@dataclass(frozen=True)
class Text:
    """Tokenized text, ready to use."""

    train: str
    val_tokens: np.ndarray
    tokenizer: Tokenizer
    tables: ByteTables
    val_bytes: int


def prepare_text(recipe: Recipe) -> Text:
    """Open shards and tokenizer and check that they fit the recipe and each other. Raises GolfError."""
    data, vocab = recipe.data, recipe.model.vocab_size
    train_glob, val_glob, model = data.train, data.val, data.tokenizer
    if data.train == "embedded":
        directory = Path(build_embedded(cache_directory(), vocab)["directory"])
        train_glob, val_glob, model = (str(directory / n) for n in ("train_*.bin", "val_*.bin", "tokenizer.model"))
    if not Path(model).is_file():
        raise GolfError(f"{model}: no such tokenizer; give --data.tokenizer, or fetch the export: python -m golf_jax.data download --help")
    tokenizer = Tokenizer(model)
    if tokenizer.vocab_size != vocab:
        raise GolfError(f"model.vocab_size {vocab} differs from the {tokenizer.vocab_size} pieces of {model}: set --model.vocab-size")
    tokens = load_val_tokens(val_glob, vocab)
    if len(tokens) <= data.seq_len:
        raise GolfError(f"{val_glob}: {len(tokens)} validation tokens are fewer than one window of data.seq_len {data.seq_len}")
    tables = byte_tables(tokenizer.processor)
    sample = tokens[: 1 << 22]  # the denominator is checked against the decoded text on the first 4 M tokens
    return Text(train_glob, tokens, tokenizer, tables, check_tables(tokenizer, sample, tables))


def code_size(recipe: Recipe) -> tuple[int, int]:
    """(shipped, raw) bytes of the code that trains and scores this recipe, as one compressed file."""
    data = bundle("golf_jax.train", *([f"golf_jax.configs.{recipe.name}"] if recipe.name in recipe_names() else []))
    return len(data), raw_code_bytes(data)


def reference_compressors(text: Text) -> dict[str, float]:
    """Bits per byte that zstd -22 and xz reach on the validation text: the scale for a small model's score."""
    ids = [document for document in split_documents(text.val_tokens[: 1 << 22], text.tokenizer.bos_id)]
    raw = "".join(text.tokenizer.decode(document) for document in ids).encode()
    packed = {"zstd-22": zstandard.ZstdCompressor(level=22).compress(raw), "xz": lzma.compress(raw, preset=9)}
    return {name: 8 * len(data) / len(raw) for name, data in packed.items()}


def calibration(recipe: Recipe, text: Text, params: dict[str, Any], mesh: Mesh) -> dict[str, np.ndarray] | None:
    """Hessians for GPTQ over rank 0's first training batches (PR 2005, 5.2); None where no rule asks for them."""
    if not recipe.quant.gptq_batches:
        return None
    d = recipe.data
    loader = make_loader(d.order, text.train, d.ranks, d.rows_per_rank, d.seq_len, slice(0, d.rows_per_rank), recipe.model.vocab_size)
    batches = (loader.next_batch()[0] for _ in range(recipe.quant.gptq_batches))
    return collect_hessians(recipe.model, params, batches, mesh)


def score(recipe: Recipe, loaded: Loaded, text: Text, mesh: Mesh, run: RunDir) -> dict[str, Result]:
    """Every evaluation the recipe asks for, of the parameters read back from the artifact's bytes."""
    common: dict[str, Any] = {"seq_len": loaded.seq_len, "mesh": mesh, "eval": recipe.eval, "log": run.log}
    results = {"standard": evaluate_standard(recipe.model, loaded.params, text.val_tokens, text.tables, **common)}
    if recipe.eval.stride:
        results["sliding"] = evaluate_sliding(recipe.model, loaded.params, text.val_tokens, text.tables, **common)
    if recipe.eval.ttt.kind != "off":
        results["ttt"] = evaluate_ttt(recipe.model, loaded.params, text.val_tokens, text.tables, **common)[0]
    causal, error = check_model(recipe.model, loaded.params, text.val_tokens, mesh, loaded.seq_len)
    facts = {"causal": causal, "normalization_error": error}
    results = {name: replace(result, facts=replace(result.facts, **facts)) for name, result in results.items()}
    label = f"{recipe.quant.rules[-1].scheme}_{recipe.quant.compressor}"
    for name, result in results.items():
        seconds = result.seconds["score"] + result.seconds["train"]
        mark = "" if result.facts.legal else "ILLEGAL_"
        run.log(f"final_{mark}{label}_{name}_exact {result.score.line()} eval_time:{1000 * seconds:.0f}ms")
    return results


def summary(recipe: Recipe, trained: Trained, before: Result, packed: Packed, results: dict[str, Result], scale: dict[str, float]) -> str:
    """The closing table."""
    rows = [
        ("steps", f"{trained.steps:,} in {trained.seconds:.1f} s of training, last loss {trained.final_loss:.4f}"),
        ("before quantization", f"{before.score.bpb:.5f} bits per byte, {before.score.loss:.5f} nats per token (standard)"),
    ]
    for name, result in results.items():
        legal = "" if result.facts.legal else "   ILLEGAL: trained on tokens before scoring them"
        rows.append((f"packed, {name}", f"{result.score.bpb:.5f} bits per byte, {result.score.loss:.5f} nats per token{legal}"))
    rows += [(f"{name} on the same text", f"{bpb:.5f} bits per byte") for name, bpb in scale.items()]
    ledger = packed.ledger
    rows.append(("artifact", f"{ledger.model_bytes:,} model + {ledger.code_bytes:,} code = {ledger.total_bytes:,} bytes"))
    rows.append(("headroom to the cap", f"{ledger.headroom_bytes:,} of {ledger.cap_bytes:,} bytes"))
    return "\n".join(f"{name:<26}{value}" for name, value in rows)


def run_recipe(recipe: Recipe, options: Options) -> dict[str, Any]:
    """The whole job; returns what result.json says."""
    mesh = make_mesh(options.devices)
    if options.emulate_devices:
        sequences = recipe.data.ranks * recipe.data.rows_per_rank
        if sequences % options.emulate_devices:
            raise GolfError(f"--emulate-devices {options.emulate_devices} does not divide the {sequences} sequences of a step")
        data = replace(recipe.data, ranks=options.emulate_devices, rows_per_rank=sequences // options.emulate_devices)
        recipe = replace(recipe, data=data)
    recipe = replace(recipe, model=resolve(recipe.model, platform(mesh)))
    micro_rows(recipe, mesh.size)
    text = prepare_text(recipe)
    path = from_main(options.resume or options.run_dir or f"runs/{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if options.resume:
        refuse_other_recipe(recipe, Path(path))
    d = recipe.data
    own = local_rows(mesh, d.ranks * d.rows_per_rank)
    loader = make_loader(d.order, text.train, d.ranks, d.rows_per_rank, d.seq_len, own, recipe.model.vocab_size)
    with contextlib.closing(RunDir(path, resume=bool(options.resume))) as run:
        return train_and_score(recipe, text, loader, mesh, run)


def refuse_other_recipe(recipe: Recipe, path: Path) -> None:
    """Raises GolfError unless the run in `path` is one of `recipe`."""
    try:
        stored = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        return  # RunDir says so
    except (OSError, ValueError) as error:
        raise GolfError(f"{path / 'config.json'}: cannot be read ({error})") from None
    check_same_recipe(recipe, stored, path)


def train_and_score(recipe: Recipe, text: Text, loader: Loader, mesh: Mesh, run: RunDir) -> dict[str, Any]:
    """Everything after the checks, into an open run directory."""
    run.write("config.json", to_dict(recipe))
    facts = environment() | {"tokenizer_sha256": text.tokenizer.sha256, "val_tokens": len(text.val_tokens), "data": to_dict(recipe.data)}
    run.write("environment.json", facts)
    run.log(f"golf_jax {recipe.name} in {run.path} on {mesh.size} {platform(mesh)} device(s), Python {host.python_version()}")
    run.log(f"model_params:{count(recipe.model)} batch_tokens:{recipe.data.batch_tokens} val_tokens:{len(text.val_tokens)} "
            f"val_bytes_checked:{text.val_bytes}")  # fmt: skip

    directory = run.path / "checkpoints"
    checkpoints = Checkpoints(directory) if recipe.checkpoint_every or directory.exists() else None

    def validate(params: dict[str, jax.Array], looping: bool, rehearse: bool = False) -> Result:
        """`rehearse`: one batch, which compiles the program of all of them."""
        common: dict[str, Any] = {"seq_len": recipe.data.seq_len, "mesh": mesh, "eval": recipe.eval, "looping": looping}
        most = mesh.size * recipe.eval.batch_rows * recipe.data.seq_len if rehearse else 0
        return evaluate_standard(recipe.model, params, text.val_tokens, text.tables, max_targets=most, **common)

    shipped, raw = code_size(recipe)

    def validate_and_estimate(params: dict[str, jax.Array], looping: bool, rehearse: bool) -> Result:
        """Also says what the artifact would weigh now, while that can still be cured."""
        if rehearse:
            return validate(params, looping, rehearse)
        quantized = quantize(to_tensors(recipe.model, params), without_hessians(recipe.quant))
        total = shipped + estimate_bytes(quantized, recipe.quant.compressor)
        over = " OVER THE CAP: the steps of quantization will be made coarser" if total > CAP_BYTES else ""
        run.log(f"estimated artifact {total:,} bytes with code, headroom {CAP_BYTES - total:,}{over}")
        return validate(params, looping)

    try:
        trained = train(recipe, mesh, loader, run, checkpoints=checkpoints, validate=validate_and_estimate)
    finally:
        if checkpoints:
            checkpoints.close()
    before = validate(trained.params, True)
    run.log(f"pre_quantization_{recipe.schedule.export} {before.score.line()}")
    begin = time.perf_counter()
    hessians = calibration(recipe, text, trained.params, mesh)
    data_seconds = trained.seconds + (time.perf_counter() - begin if hessians is not None else 0.0)
    if hessians is not None:  # they read training data, so their time counts with training
        run.log(f"collected {len(hessians)} Hessians; training data read until {data_seconds:.1f} s on the clock")
    portable = replace(recipe, model=replace(recipe.model, attention="auto"))  # the artifact is scored on other machines, too
    packed = pack_model(
        portable,
        trained.params,
        text.tokenizer.sha256,
        code_bytes=shipped,
        hessians=hessians,
        score=lambda params: validate(params, True).score.bpb,  # pyright: ignore[reportArgumentType]
    )
    quant_seconds = time.perf_counter() - begin
    run.log(f"quantized and packed in {quant_seconds:.1f} s; {packed.fit}")
    run.log(packed.ledger.table())
    run.log(f"code: {raw:,} bytes of source, {shipped:,} shipped as one compressed file")
    artifact = run.write("artifact.golf", packed.data)
    loaded = load_model(artifact if run.main else packed.data)
    results = score(recipe, loaded, text, mesh, run)
    scale = reference_compressors(text)
    run.log(summary(recipe, trained, before, packed, results, scale))
    result = {
        "recipe": recipe.name,
        "steps": trained.steps,
        "train_seconds": trained.seconds,
        "train_and_calibration_seconds": data_seconds,
        "compile_seconds": trained.compile_seconds,
        "quantization_seconds": quant_seconds,
        "train_loss": trained.final_loss,
        "pre_quantization": before.to_dict(),
        "evaluations": {name: r.to_dict() for name, r in results.items()},
        "artifact_bytes": len(packed.data),
        "code_bytes": shipped,
        "code_bytes_raw": raw,
        "total_bytes": packed.ledger.total_bytes,
        "headroom_bytes": packed.ledger.headroom_bytes,
        "quant": to_dict(packed.quant),
        "compressors_bits_per_byte": scale,
        "tokenizer_sha256": text.tokenizer.sha256,
    }
    run.write("result.json", result)
    return result


def main(argv: list[str]) -> int:
    recipe, options = cli.parse(argv, Options(), DESCRIPTION)
    keep_compiled_programs(cache_directory() / "xla")
    initialize_distributed()
    d = recipe.data
    split_cpu(options.devices, (options.emulate_devices or d.ranks) if recipe.optim.clip_per_rank else d.ranks * d.rows_per_rank)
    run_recipe(recipe, options)
    return 0


if __name__ == "__main__":
    cli.run(main)
