"""A run is stages between values: check -> train -> keep -> pack -> score.

Every stage takes values and leaves a file in the run directory (a checkpoint, `artifact.golf`, rows of `stages.json`) from which the next
can start in another process: `--resume` goes on at the first stage that is not done.
"""

import contextlib
import hashlib
import json
import lzma
import platform as host
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np
import zstandard

from golf_jax import evaluation
from golf_jax.ahead import ahead, compiling_ahead
from golf_jax.artifact.calibration import collect_hessians
from golf_jax.artifact.code import bundle, raw_code_bytes
from golf_jax.artifact.ledger import estimate_bytes
from golf_jax.artifact.model import Packed, pack_model, scheme_packed
from golf_jax.config import CAP_BYTES, GolfError, Recipe, recipe_names, to_dict
from golf_jax.data import make_loader
from golf_jax.data.identity import difference, watch
from golf_jax.data.prefetch import local_rows
from golf_jax.data.text import Text, open_text
from golf_jax.data.tokenizer import split_documents
from golf_jax.evaluation import Result, Stream
from golf_jax.evaluation.methods import METHODS, methods_of
from golf_jax.files import NotWritten, read_bytes
from golf_jax.interrupt import Interrupted, Signals, catching
from golf_jax.mesh import make_mesh, platform
from golf_jax.model import Model as Network
from golf_jax.model import count, to_tensors
from golf_jax.opening import load, open_artifact
from golf_jax.options import Options
from golf_jax.plan import Plan, border, check
from golf_jax.processes import cores, from_main, initialize_distributed, keep_compiled_programs, others_alive, split_cpu
from golf_jax.progress import Log, Progress, clock_seconds, patience
from golf_jax.quant import quantize, rules_for, without_hessians
from golf_jax.starting import work_begins
from golf_jax.supervise import said_all
from golf_jax.training.checkpoints import Checkpoints, digest_ahead
from golf_jax.training.keep import Keeper
from golf_jax.training.loop import Trained, exported, train
from golf_jax.training.memory import fitted
from golf_jax.training.phases import phases
from golf_jax.training.resume import changed, check_same_recipe, elsewhere, located, stages_to_repeat, stored_recipe
from golf_jax.training.rundir import RunDir, all_again, environment, go_on, kept, new_path, start_again
from golf_jax.training.runfiles import read_result
from golf_jax.training.state import graph, state_shapes
from golf_jax.training.step import compile_step


def run(recipe: Recipe, options: Options = Options()) -> dict[str, Any]:  # noqa: B008 - frozen
    """The whole job, or what is left of it (`options.resume`); returns what result.json says.

    Raises GolfError for whatever cannot be, Interrupted when a signal ends it: what was finished by then is kept.
    """
    path = options.resume or options.run_dir
    with others_alive(lambda: all_again(path)):
        plan = check(recipe, options)
        changes = changed(located(stored_recipe(options.resume)), plan.asked, options.accept, options.resume) if options.resume else []
        path = from_main(path or (str(new_path("runs", recipe.name)) if jax.process_index() == 0 else ""))
    with catching() as signals, contextlib.closing(RunDir(path, resume=bool(options.resume))) as directory:
        try:
            with others_alive(lambda: all_again(path)), compiling_ahead(min(4, cores() - 2)):  # two are busy with the run itself
                return _stages(plan, options, changes, directory, signals)
        except (Interrupted, NotWritten, OSError) as stop:
            begun = (Path(path) / "config.json").exists() and not kept(path)
            lost = "nothing is kept yet; " * begun  # also of training that a full disk has let nobody save
            begin = f"start again with: {start_again(path, plan.mesh.size)}" if begun else "start again"
            rest = f"go on with: {go_on(path)}" if kept(path) else begin
            if not isinstance(stop, Interrupted):  # a disk that is full
                what = stop if isinstance(stop, NotWritten) else f"{stop.filename or path}: {stop.strerror or stop}"
                raise GolfError(f"{what}; {lost}once that is mended, {rest}") from None
            directory.log(f"interrupted by {stop}{'' if stop.advice else f': {lost}{rest}'}")
            stop.told = True
            if directory.main:
                said_all(stop.status)
            raise


def _stages(plan: Plan, options: Options, changes: list[dict[str, Any]], run: RunDir, signals: Signals) -> dict[str, Any]:
    record, recipe = run.record, plan.recipe
    if options.resume and "text" in record and (what := difference(record["text"], plan.text.identity)):
        raise GolfError(f"--resume {run.path}: the data are not those of this run: {what}")
    for stage in stages_to_repeat(changes):
        record.pop(stage, None)
        run.remove("result.json")
    if changes:
        run.note("changes", record.get("changes", []) + changes)
    artifact = _packed_before(run)
    if found := json.loads(from_main(json.dumps(_finished_before(run, artifact) if run.main else None))):
        run.log(f"finished: see {run.path / 'result.json'}")
        return found
    with signals.held():  # on which the next process compares them
        record["recipe"] = to_dict(plan.asked)
        run.note("text", plan.text.identity)
        run.write("config.json", to_dict(plan.asked))
    run.track(options.tracker, to_dict(plan.asked))
    here = {"attention": recipe.model.attention, "devices_used": plan.mesh.size}
    here |= {"cores_used": cores()} if platform(plan.mesh) == "cpu" else {}  # by which XLA splits its sums there
    moved = json.loads(from_main(json.dumps(elsewhere(run.path, here) if options.resume and run.main else [])))
    if any(change["field"] == "model.attention" for change in changes):  # not `auto`, which was another one
        moved = [change for change in moved if change["field"] != "attention"]
    if moved:
        run.note("changes", [*record.get("changes", []), *moved])
    for change in moved:
        run.log("{field} is {after} here and was {before}: the same to float32 rounding, not bit for bit".format(**change))
    run.write(
        "environment.json",
        environment() | here | {"text": plan.text.identity, "data": to_dict(recipe.data)},
    )
    run.write("tokenizer.model", plan.text.tokenizer.model)
    by_name = {f"golf_jax.configs.{recipe.name}": recipe.name in recipe_names(), "golf_jax.data.corpus": recipe.data.train == "embedded"}
    code = bundle("golf_jax.train", *(module for module, needed in by_name.items() if needed))
    if options.resume and (other := _other_code(run, code)) and other not in (before := record.get("changes", [])):
        run.note("changes", [*before, other])
        run.log("WARNING: the code is another than this run's so far (code.pyz): what was trained before, that one trained")
    if not artifact:  # what was counted with an artifact stays what lies beside it
        run.write("code.pyz", code)
    run.log(f"golf_jax {recipe.name} in {run.path}")
    run.log(
        f"on {plan.mesh.size} {platform(plan.mesh)} device(s), {recipe.model.dtype}, attention {recipe.model.attention}, "
        f"Python {host.python_version()}, jax {jax.__version__}"
    )
    run.log(f"model_params:{count(recipe.model)} batch_tokens:{recipe.data.batch_tokens} val_tokens:{len(plan.text.val_tokens)} "
            f"val_bytes_checked:{plan.text.val_bytes}")  # fmt: skip
    for fact in plan.text.facts:
        run.log(fact if fact.startswith("WARNING") else f"text: {fact}")
    if recipe.data.packed:
        run.log(border(recipe.model, plan.text.tokenizer.bos_id))
    run.drop_scores(packed=bool(artifact))
    if not artifact:
        with contextlib.closing(Checkpoints(run.path / "checkpoints")) as checkpoints:
            trained = train_and_keep(plan, options, run, signals, checkpoints, len(code))
        artifact = pack(plan, run, signals, trained, len(code), raw_code_bytes(code)).data  # on every process: only 0 writes the file
    score(plan, run, artifact, signals)
    return finish(plan, run)


def _other_code(run: RunDir, code: bytes) -> dict[str, Any]:
    """What the run did so far was done by other code than this: as a change of the field `code`; else nothing."""
    file = run.path / "code.pyz"
    before = from_main(hashlib.sha256(read_bytes(file)).hexdigest()[:12] if run.main and file.exists() else "")
    now = hashlib.sha256(code).hexdigest()[:12]
    return {"field": "code", "before": before, "after": now} if before not in ("", now) else {}


def _finished_before(run: RunDir, artifact: bytes) -> dict[str, Any] | None:
    """What result.json says, if it is about this artifact and says what `stages.json` does."""
    file = run.path / "result.json"
    try:
        found, why = dict(read_result(run.path)), f"{file}"
    except FileNotFoundError:
        return None
    except GolfError as error:
        found, why = {}, str(error)
    if found and artifact and found["evaluations"] == run.record.get("evaluations") and found.items() >= run.record["pack"].items():
        return found
    run.log(f"{why}: is not the result of what lies here, and is made anew")
    return None


def _packed_before(run: RunDir) -> bytes:
    """The artifact that `stages.json` speaks of, if it lies there whole; else nothing."""
    sha256, file = run.record.get("pack", {}).get("sha256"), run.path / "artifact.golf"
    data = file.read_bytes() if sha256 and file.is_file() else b""
    data = data if hashlib.sha256(data).hexdigest() == sha256 else b""
    if not from_main("packed" if data else ""):
        return b""
    if not data:
        raise GolfError(
            f"{file}: process {jax.process_index()} does not see it; a run goes on only where all processes share its directory"
        )
    return data


def _make_loader(plan: Plan, order: str, rows: slice) -> Any:
    d, text = plan.recipe.data, plan.text
    vocab_size, bos_id = plan.recipe.model.vocab_size, text.tokenizer.bos_id
    loader = make_loader(order, text.train, d.ranks, d.rows_per_rank, d.seq_len, rows, vocab_size, bos_id)
    watch(loader.shards, text.identity["train"])
    return loader


def _validator(plan: Plan) -> Any:
    """(params, looping, rehearse) -> score of the plainest method that the recipe asks for: packed streams, else rows side by side.

    rehearse: of one batch, which compiles the program of all of them.
    """
    recipe, text, mesh = plan.recipe, plan.text, plan.mesh
    name = "packed" if "packed" in methods_of(recipe.eval) else "standard"
    config = getattr(recipe.eval, name, None)
    stream = Stream.of(text.val_tokens, text.tables, getattr(config, "seq_len", recipe.data.seq_len), recipe.eval.batch_rows)
    first = stream.first_batch(mesh) if config is None else stream.beginning(config.ranks * config.rows * config.seq_len)

    def validate(params: dict[str, Any], looping: bool = True, rehearse: bool = False, log: Log | None = None) -> Result:
        return METHODS[name](Network(recipe.model, params, looping), first if rehearse else stream, mesh, config, log)

    return validate


def _estimate(recipe: Recipe, params: dict[str, Any], run: RunDir, code_bytes: int) -> None:
    """Says what the artifact would weigh now, while that can still be cured."""
    rules = without_hessians(rules_for(recipe.model, recipe.quant))
    quantized = quantize(to_tensors(recipe.model, params), rules)
    total = code_bytes + estimate_bytes(quantized, recipe.quant.compressor)
    over = " OVER THE CAP: the steps of quantization will be made coarser" if total > CAP_BYTES else ""
    run.log(f"estimated artifact {total:,} bytes with code, headroom {CAP_BYTES - total:,}{over}")


def _compile_ahead(plan: Plan, recipe: Recipe) -> None:
    """Begin to compile the rest of the run while this thread makes the initial weights, trains and packs."""
    mesh, shapes = plan.mesh, state_shapes(recipe, plan.mesh)
    for phase in phases(recipe):
        ahead(compile_step, graph(recipe), mesh, phase)
    digest_ahead(shapes)
    evaluation.score_ahead(Network(recipe.model, shapes.params), plan.text, mesh, recipe.eval, seq_len=recipe.data.seq_len)


def train_and_keep(plan: Plan, options: Options, run: RunDir, signals: Signals, checkpoints: Checkpoints, code_bytes: int) -> Trained:
    """Train from the newest sound checkpoint on, or from the start; the final state is always saved."""
    recipe, mesh, d = plan.recipe, plan.mesh, plan.recipe.data
    facts = {"recipe": to_dict(plan.asked), "text": plan.text.identity, "dtype": recipe.model.dtype}
    found = None
    if options.resume:
        found = checkpoints.restore(state_shapes(recipe, mesh), run.log)
        if found is None:
            raise GolfError(f"{run.path}: no checkpoint: nothing to go on from; start it again with: {start_again(run.path, mesh.size)}")
        if what := difference(found.meta["text"], plan.text.identity):
            raise GolfError(f"--resume {run.path}: the data are not those of checkpoint {found.step}: {what}")
        check_same_recipe(run.path, found.meta, facts["recipe"], run.record.get("changes", []))
        if found.meta["dtype"] != recipe.model.dtype:
            raise GolfError(f"--resume {run.path}: was trained in {found.meta['dtype']}; give --model.dtype {found.meta['dtype']}")
        done = run.record.get("train")
        if done and done["steps"] == found.step:
            run.log(f"checkpoint {found.step}: training complete, packing")
            return Trained(exported(recipe, found.state), *(done[f.name] for f in fields(Trained) if f.name != "params"))
        run.log(f"checkpoint {found.step:,} of {f'{recipe.budget.steps:,}' if recipe.budget.steps else f'{recipe.budget.seconds:.0f} s'}")
    recipe = fitted(recipe, mesh, run.log)
    _compile_ahead(plan, recipe)
    validate = _validator(plan)

    def validate_and_estimate(params: dict[str, Any], looping: bool, rehearse: bool) -> Result:
        if not rehearse:
            _estimate(recipe, params, run, code_bytes)
        return validate(params, looping, rehearse)

    keeper = Keeper(recipe, checkpoints, run, signals, facts)
    loader = _make_loader(plan, d.order, local_rows(mesh, d.batch_shape[0]))
    trained = train(recipe, mesh, loader, run, keeper, found=found, validate=validate_and_estimate, profile=options.profile)
    run.note("train", {f.name: getattr(trained, f.name) for f in fields(trained) if f.name != "params"})
    return trained


def pack(plan: Plan, run: RunDir, signals: Signals, trained: Trained, code_bytes: int, raw_code: int) -> Packed:
    """Score once more before quantization, quantize, fit under the cap, and write artifact.golf."""
    recipe, text = plan.recipe, plan.text
    validate = _validator(plan)
    work_begins()  # where a resumed run begins with this stage
    before = validate(trained.params, log=run.log)
    run.log(f"pre_quantization_{recipe.schedule.export} {before.score.line()}")
    run.metrics("score", stage="pre_quantization", **before.to_dict())
    begin = time.perf_counter()
    hessians = None
    if recipe.quant.gptq_batches:  # over rank 0's first training batches (docs/recipes/pr2005.md, section 5.2)
        order = "shuffled" if recipe.data.packed else recipe.data.order  # PR 2135 calibrates on PR 2005's sequences, across documents
        loader = _make_loader(plan, order, slice(0, recipe.data.rows_per_rank))
        progress = Progress(run.log, "Hessians: batches", recipe.quant.gptq_batches)

        def batches() -> Iterator[np.ndarray]:
            for done in range(recipe.quant.gptq_batches):
                yield loader.next_batch().inputs
                progress.at(done + 1)

        hessians = collect_hessians(recipe.model, trained.params, batches(), plan.mesh)
    data_seconds = trained.seconds + (time.perf_counter() - begin if hessians is not None else 0.0)
    if hessians is not None:  # they read training data, so their time counts with training
        run.log(f"collected {len(hessians)} Hessians; training data read until {data_seconds:.1f} s on the clock")
    with patience(run.log, "quantizing and packing"):
        packed = pack_model(
            plan.asked,  # with its `auto`s: the artifact is scored on other machines, too
            trained.params,
            text.tokenizer.sha256,
            text.identity["digest"],
            code_bytes=code_bytes,
            hessians=hessians,
            score=lambda params: validate(params).score.bpb,
            log=run.log,
        )
    seconds = time.perf_counter() - begin
    run.log(f"quantized and packed in {seconds:.1f} s; {packed.fit}")
    run.log(packed.ledger.table())
    run.log(f"code: {raw_code:,} bytes of source, shipped as one compressed file")
    label = f"{scheme_packed(recipe.model, recipe.quant)}+{recipe.quant.compressor}"
    run.log(f"Serialized model {label}: {len(packed.data)} bytes\nCode size (compressed): {code_bytes} bytes")  # as the records' logs
    run.log(f"Total submission size {label}: {packed.ledger.total_bytes} bytes")
    facts = {
        "pre_quantization": before.to_dict(),
        "train_and_calibration_seconds": data_seconds,
        "quantization_seconds": seconds,
        "artifact_bytes": len(packed.data),
        "code_bytes": code_bytes,
        "code_bytes_raw": raw_code,
        "total_bytes": packed.ledger.total_bytes,
        "headroom_bytes": packed.ledger.headroom_bytes,
        "quant": to_dict(packed.quant),
        "sha256": hashlib.sha256(packed.data).hexdigest(),
    }
    with signals.held():  # one is worth nothing without the other
        run.write("artifact.golf", packed.data)
        run.note("pack", facts)
    return packed


def score(plan: Plan, run: RunDir, artifact: bytes, signals: Signals) -> dict[str, Any]:
    """Every evaluation the recipe asks for, of the parameters read back from the artifact's bytes; each is kept when it ends."""
    recipe = plan.recipe
    done = run.record.get("evaluations", {})
    label = f"{scheme_packed(recipe.model, recipe.quant)}_{recipe.quant.compressor}"
    left = [name for name in methods_of(recipe.eval) if name not in done]
    model = open_artifact(artifact, str(run.path / "artifact.golf"), plan.text.tokenizer)
    results = evaluation.score(model, plan.text, plan.mesh, recipe.eval, run.log, seq_len=recipe.data.seq_len, methods=left)
    for result in results if left else ():
        mark = "" if result.facts.legal else "ILLEGAL_"
        seconds = clock_seconds(result.seconds)
        done = done | {result.mode: result.to_dict()}
        with signals.held():  # once it is told, it is kept; noted last: a run killed before tells again what was not noted
            run.log(f"final_{mark}{label}_{result.mode}_exact {result.score.line()} eval_time:{1000 * seconds:.0f}ms")
            run.metrics("score", stage="packed", **result.to_dict())
            run.note("evaluations", done)
    return done


def score_artifact(recipe: Recipe, options: Options) -> None:
    """Every evaluation the recipe asks for, of the artifact `options.score` alone. Raises GolfError."""
    keep_compiled_programs()
    initialize_distributed()
    split_cpu(options.devices, recipe.data.batch_shape[0])
    mesh, d, model = make_mesh(options.devices), recipe.data, load(options.score)
    train = "embedded" if d.train == "embedded" else ""
    text = open_text(train, d.val, d.tokenizer, model.config.vocab_size, d.seq_len, sha256=model.tokenizer_sha256)
    say = print if jax.process_index() == 0 else lambda line: None
    say(f"{model.name}: {Path(model.name).stat().st_size:,} bytes, SHA-256 {model.sha256}")
    for result in evaluation.score(model, text, mesh, recipe.eval, say, seq_len=d.seq_len):
        say("\n".join(result.lines()))


def reference_compressors(text: Text) -> dict[str, float]:
    """Bits per byte that zstd -22 and xz reach on the validation text: the scale for a small model's score."""
    documents = list(split_documents(text.val_tokens[: 1 << 22], text.tokenizer.bos_id))
    raw = "".join(text.tokenizer.originals(documents, strict=False)).encode()
    packed = {"zstd-22": zstandard.ZstdCompressor(level=22).compress(raw), "xz": lzma.compress(raw, preset=9)}
    return {name: 8 * len(data) / len(raw) for name, data in packed.items()}


def finish(plan: Plan, run: RunDir) -> dict[str, Any]:
    """result.json, and the closing table."""
    record = run.record
    trained, packed = record["train"], record["pack"]
    result = {
        "recipe": plan.recipe.name,
        "steps": trained["steps"],
        "train_seconds": trained["seconds"],
        "compile_seconds": trained["compile_seconds"],
        "train_loss": trained["final_loss"],
        **packed,
        "evaluations": record["evaluations"],
        "compressors_bits_per_byte": reference_compressors(plan.text),
        "tokenizer_sha256": plan.text.tokenizer.sha256,
        "text": plan.text.identity,
        "text_facts": list(plan.text.facts),
        "overlap": asdict(plan.text.overlap) if plan.text.overlap else None,
        "changes": record.get("changes", []),
    }
    run.log(summary(result))
    run.write("result.json", result)
    return result


def summary(result: dict[str, Any]) -> str:
    """The closing table of result.json's facts."""
    line = "{val_bpb:.5f} bits per byte, {val_loss:.5f} nats per token".format
    rows = [
        ("steps", "{steps:,} in {train_seconds:.1f} s of training, last loss {train_loss:.4f}".format(**result)),
        ("before quantization", f"{line(**result['pre_quantization'])} ({result['pre_quantization']['mode']})"),
    ]
    for name, e in result["evaluations"].items():
        rows.append((f"packed, {name}", line(**e) + ("" if e["legal"] else "\n" + " " * 26 + "ILLEGAL: see C1 to C4")))
    rows += [(f"{name} on the same text", f"{bpb:.5f} bits per byte") for name, bpb in result["compressors_bits_per_byte"].items()]
    rows.append(("artifact", "{artifact_bytes:,} model + {code_bytes:,} code = {total_bytes:,} bytes".format(**result)))
    rows.append(("headroom to the cap", f"{result['headroom_bytes']:,} of {CAP_BYTES:,} bytes"))
    rows += [("text", fact) for fact in result["text_facts"] if fact.startswith("WARNING")]
    rows += [("changed on --resume", "{field}: {before} -> {after}".format(**c)) for c in result["changes"]]
    return "\n".join(f"{name:<26}{value}" for name, value in rows)
