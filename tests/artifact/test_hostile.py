"""Artifacts of a few kilobytes that claim much: refused at once, and with nothing but the module's own error."""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import forgery
import numpy as np
import pytest
import zstandard
from forgery import forge, genuine, outcome, parts_of, run

from golf_jax.artifact import ArtifactError, unpack
from golf_jax.artifact.model import load_model
from golf_jax.config import GolfError
from golf_jax.files import read_bytes
from golf_jax.opening import load


def test_mutated_artifacts_are_refused_or_loaded():
    report = run(400, seed=2)
    assert set(report["outcomes"]) == {"refused", "loaded"} and report["outcomes"]["refused"] > 300


@pytest.mark.slow
def test_twenty_thousand_mutated_artifacts_in_bounded_memory():
    command = [sys.executable, str(Path(forgery.__file__)), "20000", "3"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, timeout=1200)
    report = json.loads(done.stdout)
    assert set(report["outcomes"]) == {"refused", "loaded"} and report["slowest_seconds"] < 5, report


def test_a_large_claim_of_a_small_file_costs_nothing():
    """1 GiB of zeros in 33 kB, column levels of an empty matrix, a million layers: no time, no memory."""
    table, streams, _ = parts_of(genuine())
    bomb, scale = (zstandard.ZstdCompressor().compress(bytes(n)) for n in (1 << 28, 2))

    def with_model(**fields):
        header = table["header"] | {"model": table["header"]["model"] | fields}
        return forge(table | {"header": header}, streams)

    def with_tensors(rows, streams):
        return forge({"header": {}, "tensors": rows, "sections": [len(s) for s in streams]}, streams)

    cases = {
        "claim 268435456 values": with_tensors([["a", "int6", "float32", [1, 1 << 28]]], [bomb, scale]),
        "claim 1073741824 values": with_tensors([["a", "int6", "float32", [0, 1 << 30]]], []),
        "1000000 layers": with_model(num_layers=10**6),
        "layers; at most": with_model(loop_repeats=10**9, loop_start=0, loop_end=1),
        "5000 tensors": with_tensors([[str(i), "float16", "float32", [0]] for i in range(5000)], []),
    }
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        for message, data in cases.items():
            with pytest.raises(ArtifactError, match=message):
                load_model(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 << 20 and time.perf_counter() - begin < 5


def test_the_configuration_is_compared_before_tensors_are_decompressed():
    table, streams, _ = parts_of(genuine())
    broken = [b"\0" * len(s) for s in streams]  # would be refused as damaged
    table["header"]["model"]["width"] = 32
    with pytest.raises(ArtifactError, match=r"has shape .*, the model configuration needs"):
        load_model(forge(table, broken))


@pytest.mark.parametrize(
    ("field", "value"),
    [("seq_len", "64"), ("seq_len", True), ("seq_len", 64.0), ("seq_len", 0), ("embedded", 1), ("tokenizer_sha256", ""),
     ("tokenizer_sha256", None), ("model", []), ("eval", {"sliding": {"stride": 10**9}}), ("model", {"mlp_ratio": 1e308}),
     ("model", {"num_layers": 10**300}), ("name", None), ("name", ["x"]), ("text", 7), ("text", None), ("model", {"softcap": 80.1}),
     ("eval", {"score_first": {"ranks": 10**9}}), ("eval", {"packed": {"ranks": 10**9}}), ("eval", {"documents": {"rank": 10**9}}),
     ("eval", {"documents": {"batch": 10**9}})],
)  # fmt: skip
def test_header_fields_have_strict_types(field, value):
    table, streams, _ = parts_of(genuine())
    assert outcome(forge(table, streams)) == "loaded"
    table["header"][field] = value
    with pytest.raises(ArtifactError):
        load_model(forge(table, streams))


def test_names_cannot_steer_the_terminal():
    table, streams, _ = parts_of(genuine())
    table["tensors"][0][0] = "\x1b[31mred\n"
    with pytest.raises(ArtifactError) as caught:
        load_model(forge(table, streams))
    assert r"\x1b[31mred\n" in str(caught.value) and str(caught.value).isprintable()


NOT_FINITE = [("float16", "float32", np.nan), ("float32", "float32", np.inf), ("float32", "bfloat16", 3.4e38)]


@pytest.mark.parametrize(("kind", "dtype", "value"), NOT_FINITE)
def test_weights_that_are_not_finite_are_refused(kind, dtype, value):
    stream = zstandard.ZstdCompressor().compress(np.array([value], kind).tobytes())
    data = forge({"header": {}, "tensors": [["a", kind, dtype, [1]]], "sections": [len(stream)]}, [stream])
    with pytest.raises(ArtifactError, match="a: a value is NaN or infinite"):
        unpack(data)


def test_pipes_devices_and_large_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(GolfError, match="a pipe, socket or device, not a file"):
            load(path)
    (tmp_path / "artifact.golf").mkdir()
    with pytest.raises(GolfError, match="a directory"):
        load(tmp_path)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(GolfError, match="at most"):
        load(tmp_path / "sparse")
    with pytest.raises(GolfError, match="cannot be read"):
        read_bytes("a\0b")
