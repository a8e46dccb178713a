"""Devices, processes, transfers."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from golf_jax import processes
from golf_jax.config import GolfError
from golf_jax.mesh import make_mesh, platform, put_replicated
from golf_jax.processes import from_main, initialize_distributed, keep_compiled_programs, split_cpu


def test_mesh_takes_what_is_asked_for():
    assert make_mesh().size == 8 and make_mesh(3).size == 3
    assert make_mesh(3).axis_names == ("data",) and platform(make_mesh(1)) == "cpu"
    with pytest.raises(GolfError, match=r"--devices 9: only 8 cpu device\(s\) are here"):
        make_mesh(9)
    with pytest.raises(GolfError, match="--devices -1: give a number of devices, or 0 for all"):
        make_mesh(-1)


@pytest.mark.parametrize(
    ("asked", "sequences", "cores", "made"),
    [(0, 16, 1, 1), (0, 16, 2, 2), (0, 16, 7, 4), (0, 384, 64, 8), (0, 6, 8, 2), (0, 3, 8, 1), (3, 16, 2, 3), (99_999, 16, 2, 256)],
)
def test_a_cpu_becomes_about_one_device_per_core(asked, sequences, cores, made, monkeypatch):
    updates = []
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(processes, "cores", lambda: cores)
    monkeypatch.setattr(jax.config, "update", lambda *pair: updates.append(pair))
    split_cpu(asked, sequences)
    assert updates == [("jax_num_cpu_devices", made)]
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    split_cpu(asked, sequences)
    assert len(updates) == 1, "the environment has said how many"


def test_devices_are_made_before_jax_looks_and_never_after():
    lines = [
        "from golf_jax.mesh import make_mesh; from golf_jax.processes import split_cpu",
        "split_cpu(5, 1); print(make_mesh().size)",
        "split_cpu(2, 1); print(make_mesh().size)",
    ]
    fresh = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-c", "; ".join(lines)]
    done = subprocess.run(command, env=fresh | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["5", "5"], done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "JAX_NUM_PROCESSES is '': give JAX_NUM_PROCESSES and JAX_PROCESS_ID"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is ''"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES is 'two'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID 2 must be below JAX_NUM_PROCESSES 2"),
    ],
)
def test_half_a_cluster_is_refused(variables, message, monkeypatch):
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(GolfError, match=message):
        initialize_distributed()


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        ({}, None),
        ({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"SLURM_STEP_NUM_TASKS": "2"}, ()),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ()),
        ({"JAX_COORDINATOR_ADDRESS": "auto"}, ()),
        ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("host:1", 4, 3)),
    ],
)
def test_processes_join_where_the_environment_says_so(variables, arguments, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(args))
    for name in ("JAX_COORDINATOR_ADDRESS", "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    initialize_distributed()
    assert calls == ([] if arguments is None else [arguments])


def test_explicit_transfer_passes_the_guard():
    four = make_mesh(4)
    with jax.transfer_guard("disallow"):
        x, y = put_replicated(four, (np.float32(2.5), np.arange(3)))
    assert x.sharding.is_fully_replicated and len(x.addressable_shards) == 4
    assert float(x) == 2.5 and y.tolist() == [0, 1, 2]


def test_one_process_asks_nobody():
    assert from_main("text") == "text"


def test_cache_of_programs_follows_the_environment(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled_programs(tmp_path / "here")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "here")
        keep_compiled_programs(tmp_path / "there")  # JAX_COMPILATION_CACHE_DIR sets the option at start: it stays
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "here")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
