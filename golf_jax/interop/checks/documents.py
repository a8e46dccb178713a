"""Test-time training per document, its queue, adapters and global phase (PR 2135)."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from golf_jax.data.sidecar import Sidecar
from golf_jax.data.tokenizer import ByteTables
from golf_jax.evaluation import Result, Stream
from golf_jax.evaluation.adapters import Adapters, chunk_loss
from golf_jax.evaluation.documents import GlobalPhase, evaluate_documents
from golf_jax.evaluation.packed import inside_documents
from golf_jax.evaluation.queue import Documents, Queue, chunk_window, segments
from golf_jax.evaluation.scorer import shapes_of
from golf_jax.interop.checks.base import quick_compilation
from golf_jax.interop.checks.reference import Arrays, Case, NotComputed
from golf_jax.mesh import make_mesh, replicate
from golf_jax.model import Model, nll, to_tensors

Outputs = dict[str, Any]


def stream_of(case: Case) -> tuple[np.ndarray, ByteTables | Sidecar]:
    """The first tokens of the stream, as many as the case says, and what counts their bytes."""
    seen = case.seen
    if not {"target_bytes", "base_bytes"} & {*seen}:
        raise NotComputed("neither byte tables nor target_bytes")
    tokens = seen["tokens"][: case.settings.get("tokens")].astype(np.uint16)
    if "target_bytes" in seen:
        return tokens, Sidecar(np.append(0, seen["target_bytes"])[: len(tokens)])
    return tokens, ByteTables(seen["base_bytes"].astype(np.int16), seen["leading_space"].astype(bool), seen["boundary"].astype(bool))


def sums(result: Result) -> dict[str, Any]:
    s = result.score
    return {"nats": s.nll_nats, "count": s.tokens, "bytes": s.bytes, "bpb": s.bpb}


def check_documents(case: Case) -> None:
    result, _ = _run(case)
    trace = result.trace
    assert trace is not None and result.scores is not None
    documents, queue = _queue(case)
    ttt = case.recipe.eval.documents
    nats = result.scores.astype(np.float64)
    tokens, tables = stream_of(case)
    counted = tables.of_targets(tokens[: len(nats) + 1], slice(None))
    spans = {
        "doc": [slice(a, a + n) for a, n in zip(documents.start, documents.targets, strict=True)],
        "chunk": [slice(row[4], row[4] + row[5]) for row in _chunks(documents, queue, ttt.chunk, ttt.seq_len)],
    }
    docs = np.stack([documents.start, documents.length, _by_document(queue, [np.full(len(b), i) for i, b in enumerate(queue.batches)])], 1)
    ours = sums(result) | {"nll": result.scores, "docs": docs, "loss": trace.loss, "grad_norm": trace.grad_norm, "lr": trace.lr}
    for what, of in spans.items():
        ours[f"{what}_nats"] = [nats[s].sum() for s in of]
        ours[f"{what}_counts"] = [(s.stop - s.start, counted[s].sum()) for s in of]
    start, after = to_tensors(case.model, case.params), to_tensors(case.model, trace.params)
    for name, x in after.items():
        change = x.astype(np.float64) - start[name]
        ours |= {f"final_change/{name}": change, f"change_norm/{name}": np.linalg.norm(change)}
    case.compare(ours)


def tokens_of_run(case: Case) -> np.ndarray:
    """The scored tokens of the set's run."""
    run = _run_of(case)
    return Stream.of(*stream_of(run), run.recipe.eval.documents.seq_len).tokens


def _run_of(case: Case) -> Case:
    """The run that a unit is about: named, or the set's first."""
    return case.refs.case(case.settings["run"]) if "run" in case.settings else next(case.refs.cases("ttt"))


def _queue(case: Case) -> tuple[Documents, Queue]:
    ttt = case.recipe.eval.documents
    documents = Documents.of(Stream.of(*stream_of(case), ttt.seq_len).tokens)
    return documents, Queue.of(documents, ttt.batch)


def _chunks(documents: Documents, queue: Queue, chunk: int, window: int) -> np.ndarray:
    """Every chunk in the order of processing: batch, chunk, slot, document, first target, count, window start in the document, length."""
    rows = []
    for number, batch in enumerate(queue.batches):
        targets = documents.targets[batch]
        for c in range(-(-int(targets.max()) // chunk)):
            start, length, _, count = chunk_window(targets, chunk, window, c)
            for slot in np.flatnonzero(count):
                first = documents.start[batch[slot]] + c * chunk
                rows.append((number, c, slot, batch[slot], first, count[slot], start[slot], length[slot]))
    return np.array(rows)


def _run(case: Case) -> tuple[Result, dict[Any, Any]]:
    """The evaluation of a case from the set's own adapters, and what the set looks at on the way."""

    def make() -> tuple[Result, dict[Any, Any]]:
        ttt = case.recipe.eval.documents
        lora = next((where for where in case.refs.items if where.endswith("/ttt_lora")), None)
        if lora is None:
            raise NotComputed("adapters start at random: the set needs units ttt_lora")
        given = case.refs.items[lora]
        seen: dict[Any, Any] = {}

        def start(number: int) -> Arrays:
            prefix = f"in/init/{number}/lora."
            found = {k[len(prefix) :].removeprefix("all."): x for k, x in given.items() if k.startswith(prefix)}
            return {n: x if n.startswith("head") else np.swapaxes(x, 0, 1) for n, x in found.items()}

        def observe(what: str, number: int, value: Any) -> None:
            if what == "chunk":
                if seen.get("batch") == 1 and number < 2 and (number, 0) not in seen:
                    seen[number, 0] = _gradients(case, ttt, *value)
                return
            seen["batch"] = number
            seen[what, number] = {n: np.asarray(x) for n, x in value.items()}

        model = replace(Model.open(case.model, case.params, jax.default_backend()), looping=case.looping)
        stream = replace(Stream.of(*stream_of(case), ttt.seq_len), keep_scores=True)
        with quick_compilation():
            return evaluate_documents(model, stream, make_mesh(case.refs.devices), ttt, start=start, observe=observe), seen

    return case.refs.once(("documents", case.where), make)


def _gradients(case: Case, ttt: Any, params: Any, adapters: Adapters, chunk: Any) -> Arrays:
    model = Model.open(case.model, case.params, jax.default_backend())
    loss = lambda leaves: chunk_loss(model.config, case.looping, ttt, params, leaves, chunk)[0]  # noqa: E731
    return {n: np.asarray(x) for n, x in jax.jit(jax.grad(loss))(adapters.leaves).items()}


def adapters_seen(case: Case, _: Arrays) -> Outputs:
    """States and gradients of adapters, under the set's names."""
    seen = _run(_run_of(case))[1]
    ours: Outputs = {}
    for item in {i.partition("@")[0] for i in case.own if i.startswith("out/")}:
        what, which, name = item.split("/")[1:]
        step, *rest = name.split(".")[1:]
        leaf = ".".join(rest if step != "head" else [step, *rest])
        parts = which.split("_")
        number = int(parts[0][1:])
        if what == "grad":
            x = seen[int(parts[2][4:]), 0][leaf][int(parts[1][4:])]
        elif what == "after":
            x = seen["after", number][leaf][int(parts[1][4:])]
        else:
            x = seen["before", number][leaf]
        if step not in ("all", "head"):
            x = x[:, int(step)] if what == "before" else x[int(step)]
        ours[item.removeprefix("out/")] = x
    return ours


def queue_of_run(case: Case, _: Arrays) -> Outputs:
    run = _run_of(case)
    documents, queue = _queue(run)
    ttt = run.recipe.eval.documents
    chunks, slots = _chunks(documents, queue, ttt.chunk, ttt.seq_len), [np.arange(len(batch)) for batch in queue.batches]
    return {"chunks": chunks, "doc_slot": _by_document(queue, slots)} | _batches(queue, ttt.batch)


def _by_document(queue: Queue, of_batches: list[np.ndarray]) -> np.ndarray:
    """What is given per batch and slot, in the order of the documents."""
    return np.concatenate(of_batches)[np.argsort(queue.order)]


def _batches(queue: Queue, size: int) -> Outputs:
    padded = [np.pad(b, (0, size - len(b)), constant_values=-1) for b in queue.batches]
    return {"queue_batch": queue.from_shortest, "queue_docs": np.stack(padded)}


def doc_queue(case: Case, given: Arrays) -> Outputs:
    documents = Documents.of(given["tokens"])
    docs = np.stack([documents.start, documents.length], 1)
    return {"docs": docs} | _batches(Queue.of(documents, case.settings["batch"]), case.settings["batch"])


def chunk_windows_of(case: Case, given: Arrays) -> Outputs:
    rows = given["targets_chunk_window_index"]
    found = [chunk_window(np.array(t), int(c), int(w), int(i)) for t, c, w, i in rows]
    return {"start_len_offset_count": np.array(found)}


def segment_bounds(case: Case, given: Arrays) -> Outputs:
    length, cap = given["length_cap"]
    tokens = np.zeros(length, np.int64)
    tokens[given["bos"][given["bos"] >= 0]] = 1
    return {"bounds": _bounds(segments(tokens, int(cap)))}


def _bounds(segment: np.ndarray) -> np.ndarray:
    return np.append(np.flatnonzero(np.diff(segment, prepend=-1)), len(segment))


def global_phase(case: Case, given: Arrays) -> Outputs:
    """The phase alone, or (of a whole run) the streams of its updates."""
    run = _run_of(case)
    ttt = replace(run.recipe.eval.documents, ranks=case.settings.get("ranks", run.recipe.eval.documents.ranks))
    model = replace(Model.open(run.model, run.params, jax.default_backend()), looping=run.looping)
    mesh, tokens = make_mesh(case.refs.devices), given["tokens"].astype(np.uint16)
    params = replicate(mesh, model.params)
    with quick_compilation():
        phase = GlobalPhase(model, mesh, ttt, shapes_of(params))
    updates = -(-(len(tokens) - 1) // ttt.global_chunk) - 1
    batches = [phase.batch(tokens, c) for c in range(updates)]
    sizes = np.array([[int(np.count_nonzero(row)) for row in weight[: len(phase.shares)]] for _, _, weight in batches])
    if "run" in case.settings:
        bounds = {f"segments/{c}": _bounds(segment[0][weight[0] > 0]) for c, (_, segment, weight) in enumerate(batches)}
        return {"update_tokens": sizes.sum(1)} | bounds
    losses, before = [], to_tensors(case.model, run.params)
    config = inside_documents(model.config, mesh)

    @jax.jit
    def by_row(params: Any, x_BT: Any, segment_BT: Any, weight_BT: Any) -> Any:
        x_BT = x_BT.astype(np.int32)
        kept = {"segments_BT": segment_BT, "looping": model.looping, "training": True}
        return (nll(config, params, x_BT[:, :-1], x_BT[:, 1:], **kept) * (weight_BT > 0)).sum(1)

    def observe(params: Any, batch: Any) -> None:
        losses.append(np.asarray(by_row(params, *batch))[: len(phase.shares)] / (batch[2] > 0).sum(1)[: len(phase.shares)])

    phase.observe = observe
    after = to_tensors(case.model, phase.train(params, tokens))
    change = {f"change/{n}": x - before[n] for n, x in after.items()}
    return {"grad_norm": np.array(phase.norm, np.float64), "tokens_per_rank": sizes, "loss_per_rank": np.array(losses)} | change
