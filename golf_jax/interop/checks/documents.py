"""Test-time training per document, its queue, adapters and global phase (PR 2135)."""

import re
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from golf_jax.evaluation import Result, Stream
from golf_jax.evaluation.adapters import chunk_loss
from golf_jax.evaluation.documents import GlobalPhase, evaluate_documents
from golf_jax.evaluation.queue import BOS, Documents, Queue, chunk_window, segments
from golf_jax.evaluation.scorer import shapes_of
from golf_jax.interop.checks.schedule import row_starts
from golf_jax.interop.reference import Arrays, Case, NotComputed
from golf_jax.mesh import replicate
from golf_jax.model import to_tensors

Outputs = dict[str, Any]
ADAPTERS = "units/ttt_lora"  # the case that says with which adapters the set's runs begin


def result(case: Case) -> Result:
    return _run(case)[0]


def spans(case: Case) -> Outputs:
    """Sums of the run by document and by chunk, and where the documents are."""
    (documents, queue), ttt = _queue(case), case.recipe.eval.documents
    nats, stream = _run(case)[0].scores, stream_of(case)
    assert nats is not None
    counted = stream.tables.of_targets(stream.tokens, slice(None))
    batch = _by_document(queue, [np.full(len(b), i) for i, b in enumerate(queue.batches)])
    ours: Outputs = {"docs": np.stack([documents.start, documents.length, batch], 1)}
    chunks = _chunks(documents, queue, ttt.chunk, ttt.seq_len)
    for what, starts, counts in (("doc", documents.start, documents.targets), ("chunk", chunks[:, 4], chunks[:, 5])):
        parts = [slice(a, a + n) for a, n in zip(starts, counts, strict=True)]
        ours[f"{what}_nats"] = [nats[s].sum(dtype=np.float64) for s in parts]
        ours[f"{what}_counts"] = [(s.stop - s.start, counted[s].sum()) for s in parts]
    return ours


def run_of(case: Case) -> Case:
    """The run that a unit is about: named, or the set's first."""
    return case.refs.case(case.settings["run"]) if "run" in case.settings else next(case.refs.cases("ttt"))


def stream_of(case: Case) -> Stream:
    """What a run scores."""
    return replace(Stream.of(*case.text, case.recipe.eval.documents.seq_len), keep_scores=True)


def _queue(case: Case) -> tuple[Documents, Queue]:
    documents = Documents.of(stream_of(case).tokens)
    return documents, Queue.of(documents, case.recipe.eval.documents.batch)


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
    """The evaluation of a case from the set's own adapters, and the adapters and gradients that the set looks at on the way."""

    def make() -> tuple[Result, dict[Any, Any]]:
        if ADAPTERS not in case.refs.items:
            raise NotComputed(f"adapters start at random: the set needs {ADAPTERS}")
        ttt, given, model = case.recipe.eval.documents, case.refs.case(ADAPTERS), case.opened
        wanted = {(int(m[1]), int(m[2])) for item in given.own if (m := re.match(r"out/grad/q(\d+)_slot\d+_step(\d+)/", item))}
        seen: dict[Any, Any] = {}

        def start(number: int) -> Arrays:
            found = {n.removeprefix("all."): x for n, x in given.under(f"in/init/{number}/lora.").items()}
            return {n: x if n.startswith("head") else np.swapaxes(x, 0, 1) for n, x in found.items()}

        def observe(what: str, number: Any, value: Any) -> None:
            if what != "chunk":
                seen[what, number] = jax.tree.map(np.asarray, value)
            elif number in wanted:
                params, adapters, chunk = value
                loss = lambda leaves: chunk_loss(model.config, model.looping, ttt, params, leaves, chunk)[0]  # noqa: E731
                seen["grad", number] = jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(adapters.leaves))

        return evaluate_documents(model, stream_of(case), case.mesh, ttt, start=start, observe=observe), seen

    return case.refs.once(("documents", case.where), make)


def adapters_seen(case: Case, _: Arrays) -> Outputs:
    """States and gradients of adapters, under the set's names: `after/q2_slot1/lora.0.q.a` is that of step 0, `lora.all.q.a` of all."""
    seen, ours = _run(run_of(case))[1], {}
    for item in {i.partition("@")[0] for i in case.under("out/")}:
        m = re.fullmatch(r"(\w+)/q(\d+)(?:_slot(\d+))?(?:_step(\d+))?/lora\.((\w+)\.(.+))", item)
        if m is None:
            continue
        what, batch, slot, chunk, name, step, leaf = m.groups()
        x = seen[what, (int(batch), int(chunk)) if chunk else int(batch)][name if step == "head" else leaf]
        x = x[int(slot)] if slot else x
        ours[item] = np.take(x, int(step), axis=0 if slot else 1) if step.isdigit() else x
    return ours


def queue_of_run(case: Case, _: Arrays) -> Outputs:
    run = run_of(case)
    (documents, queue), ttt = _queue(run), run.recipe.eval.documents
    slots = [np.arange(len(batch)) for batch in queue.batches]
    chunks = _chunks(documents, queue, ttt.chunk, ttt.seq_len)
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
    return {"start_len_offset_count": np.array([chunk_window(np.array(t), int(c), int(w), int(i)) for t, c, w, i in rows])}


def segment_bounds(case: Case, given: Arrays) -> Outputs:
    length, cap = given["length_cap"]
    tokens = np.zeros(length, np.int64)
    tokens[given["bos"][given["bos"] >= 0]] = BOS
    return {"bounds": _bounds(segments(tokens, int(cap)))}


def _bounds(segments_T: np.ndarray) -> list[int]:
    return [*row_starts(segments_T), len(segments_T)]


def global_phase(case: Case, given: Arrays) -> Outputs:
    """The phase alone, or (of a whole run) the streams of its updates."""
    run, tokens = run_of(case), given["tokens"].astype(np.uint16)
    ttt = replace(run.recipe.eval.documents, ranks=case.settings.get("ranks", run.recipe.eval.documents.ranks))
    params = replicate(case.mesh, run.opened.params)
    phase = GlobalPhase(run.opened, case.mesh, ttt, shapes_of(params))
    batches = [phase.batch(tokens, c) for c in range(-(-(len(tokens) - 1) // ttt.global_chunk) - 1)]
    sizes = np.array([np.count_nonzero(weight[: len(phase.shares)], axis=1) for _, _, weight in batches])
    if "run" in case.settings:
        bounds = {f"segments/{c}": _bounds(segment[0][weight[0] > 0]) for c, (_, segment, weight) in enumerate(batches)}
        return {"update_tokens": sizes.sum(1)} | bounds
    before, after = to_tensors(case.model, run.params), to_tensors(case.model, phase.train(params, tokens))
    ours = {"grad_norm": np.array(phase.norm, np.float64), "tokens_per_rank": sizes, "loss_per_rank": phase.loss_per_rank()}
    return ours | {f"change/{n}": x - before[n] for n, x in after.items()}
