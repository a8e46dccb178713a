"""The library that a machine's C++ compiler makes of library.cc: built once, by whichever compiler is named, or told why not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from golf_jax.config import GolfError, ModelConfig
from golf_jax.kernels.attention import native
from golf_jax.kernels.native import library
from golf_jax.model import choose, resolve

needs_compiler = pytest.mark.skipif(not library.compiler(), reason="no C++ compiler on this machine")


@pytest.fixture
def unloaded(tmp_path, monkeypatch):
    """Nothing loaded and nothing built; the folder where libraries are kept. In place of library.cc a source that is compiled at once."""
    (tmp_path / "small.cc").write_text("".join(f'extern "C" void {name}() {{}}\n' for name in library.TARGETS.values()))
    monkeypatch.setattr(library, "_SOURCE", tmp_path / "small.cc")
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
    library.begin.cache_clear()
    monkeypatch.setattr(library, "MEASURED", True)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *a, **k: None)  # other tests use those that are registered
    yield tmp_path / "xla"
    jax.config.update("jax_compilation_cache_dir", before)
    library.begin.cache_clear()


@needs_compiler
def test_built_once_and_kept_with_the_compiled_programs(unloaded, monkeypatch):
    library.load()
    (built,) = unloaded.iterdir()
    library.begin.cache_clear()
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("built twice"))
    library.load()
    assert [*unloaded.iterdir()] == [built]


@needs_compiler
def test_without_a_cache_it_lies_where_python_keeps_compiled_modules(unloaded):
    jax.config.update("jax_compilation_cache_dir", None)
    library.load()
    assert [path.suffix for path in (unloaded.parent / "__pycache__").iterdir()] == [".so"]


def test_another_compiler_builds_its_own(monkeypatch):
    names = set()
    for compiler in ("g++", "clang++ -stdlib=libc++"):
        monkeypatch.setenv("CXX", compiler)
        names.add(library._digest(library.compiler().split()))
    assert len(names) == 2


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("/dev/null/c++", "cannot be run"),
        (f"{sys.executable} -c raise(SystemExit(3))", "cannot compile .*exit status 3"),
    ],
)
def test_a_compiler_that_fails_is_told_when_the_model_is_resolved(unloaded, monkeypatch, compiler, message):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(GolfError, match=f"model.attention: .*{message}.*auto and xla need none"):
        resolve(ModelConfig(attention="native"), "cpu")
    assert not [*unloaded.glob("*")]


def test_auto_does_without_a_compiler_that_fails_and_says_so_once(unloaded, monkeypatch, capsys):
    monkeypatch.setenv("CXX", f"{sys.executable} -c raise(SystemExit(4))")
    assert choose(ModelConfig(), "cpu").attention == "native"
    for _ in range(2):
        assert resolve(ModelConfig(), "cpu").attention == "xla"
    assert capsys.readouterr().err.count("exit status 4): xla computes attention") == 1


def test_the_compiler_works_while_something_else_is_done(unloaded, monkeypatch):
    monkeypatch.setenv("CXX", f"{sys.executable} -c __import__('time').sleep(60)")
    begun, x = time.monotonic(), jax.ShapeDtypeStruct((1, 8, 2, 16), "float32")
    choose(ModelConfig(), "cpu")
    assert "golf_xsa_forward" in jax.jit(lambda q, k, v: native.xsa_attention(q, k, v, xsa=True)).lower(x, x, x).as_text()
    assert time.monotonic() - begun < 30


@needs_compiler
@pytest.mark.parametrize("left", [lambda whole: whole[:3000], lambda whole: whole.replace(b"\x01", b"\x02", 1), lambda whole: b""])
def test_a_damaged_library_is_built_again(unloaded, left):
    library.load()
    (built,) = unloaded.iterdir()
    whole = built.read_bytes()
    built.unlink()  # not written over: this process has it loaded
    built.write_bytes(left(whole))
    library.begin.cache_clear()
    library.load()
    assert whole in [path.read_bytes() for path in unloaded.iterdir()]


@needs_compiler
def test_a_library_without_the_calls_is_told(unloaded, monkeypatch):
    monkeypatch.setenv("CXX", f"{library.compiler()} -fvisibility=hidden")
    with pytest.raises(ValueError, match="cannot be loaded .*golf_"):
        library.load()


@needs_compiler
@pytest.mark.parametrize("other", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_or_a_device_is_no_library(unloaded, other):
    library.load()
    (built,) = unloaded.iterdir()
    built.unlink()
    other(built)
    library.begin.cache_clear()
    library.load()
    assert [path.is_file() for path in unloaded.iterdir()] == [True]


@needs_compiler
def test_what_cannot_be_read_is_no_library(unloaded):
    """As that of another user; here a folder, which the superuser cannot read either."""
    library.load()
    (built,) = unloaded.iterdir()
    (unloaded / f"{built.name[:-19]}{'0' * 16}.so").mkdir()
    built.rename(built.with_suffix(".moved"))
    library.begin.cache_clear()
    library.load()
    assert built.is_file()


@needs_compiler
def test_a_place_that_keeps_nothing_is_no_hindrance(unloaded, monkeypatch):
    unloaded.write_text("a file")
    library.load()


def test_a_compiler_that_hangs_or_makes_nothing_is_told(unloaded, monkeypatch):
    monkeypatch.setattr(library, "_PATIENCE", 0.2)
    for command, message in ((f"{sys.executable} -c while(1):pass", "timed out"), (f"{sys.executable} -c 0", "exit status 0")):
        monkeypatch.setenv("CXX", command)
        library.begin.cache_clear()
        with pytest.raises(ValueError, match=message):
            library.load()


def test_a_command_that_ends_takes_the_compiler_with_it(tmp_path):
    """Also what the compiler's driver has started, and all that they have written."""
    driver, said, scratch = tmp_path / "c++", tmp_path / "said", tmp_path / "scratch"
    scratch.mkdir()
    driver.write_text(f"#!/bin/sh\nsleep 60 2> /dev/null &\necho > $TMPDIR/half.s\necho $! > {said}\nwait\n")
    driver.chmod(0o755)
    program = f"""
import pathlib, time
from golf_jax.kernels.native import library
library._places = lambda: [pathlib.Path({str(tmp_path)!r})]
library.begin()
while not (pathlib.Path({str(said)!r}).exists() and pathlib.Path({str(said)!r}).read_text()): time.sleep(0.01)
"""
    surroundings = {**os.environ, "CXX": str(driver), "TMPDIR": str(scratch)}
    subprocess.run([sys.executable, "-c", program], env=surroundings, timeout=60, check=True)
    assert not [*scratch.iterdir()]
    child, until = Path("/proc", said.read_text().strip(), "stat"), time.monotonic() + 30
    while child.exists() and ") Z " not in child.read_text() and time.monotonic() < until:  # a zombie where nobody is its parent
        time.sleep(0.05)
    assert time.monotonic() < until


def test_without_a_compiler_the_need_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(GolfError, match="native needs float32, .* and a C\\+\\+ compiler"):
        resolve(ModelConfig(attention="native"), "cpu")
