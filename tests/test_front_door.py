"""What `import golf_jax` and `python -m golf_jax` offer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import golf_jax
from golf_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]


def python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | environment
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def test_import_is_light():
    code = "import golf_jax, sys; assert 'jax' not in sys.modules; assert 'load' in dir(golf_jax); golf_jax.load_recipe('quickstart')"
    assert python("-c", code + "; assert 'jax' not in sys.modules").returncode == 0


def test_help_does_not_wait_for_jax():
    modules = [f"golf_jax.{name}" + ".__main__" * (name in ("data", "artifact")) for name in COMMANDS]
    code = f"import {', '.join(modules)}, sys; assert not {{'jax', 'scipy'}} & set(sys.modules)"
    assert python("-c", code).returncode == 0


@pytest.mark.parametrize("name", sorted(golf_jax._PUBLIC))
def test_every_name_is_there(name):
    assert callable(getattr(golf_jax, name))


def test_commands_are_listed_and_dispatched():
    assert "evaluate" in python("-m", "golf_jax").stdout
    wrong = python("-m", "golf_jax", "trian")
    assert (wrong.returncode, wrong.stderr) == (2, "error: no command 'trian'; did you mean train?\n")
    passed_on = python("-m", "golf_jax", "data", "verify", "no-such-directory")
    assert passed_on.returncode == 2 and passed_on.stderr.startswith("error: no-such-directory: no such directory")


def test_a_terminal_without_unicode_and_a_reader_that_left():
    say = "from golf_jax import cli; cli.run(lambda argv: print({}) or 0)"
    assert python("-c", say.format("'caf\\u00e9'"), PYTHONIOENCODING="ascii").stdout == "caf\\xe9\n"
    code = say.format("'x' * 10_000_000")
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}" | head -c 1; echo ${{PIPESTATUS[0]}}'], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("x141\n", "")
