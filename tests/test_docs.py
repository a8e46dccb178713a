"""The documentation does what it says: every bash and python block runs, every flag it shows exists, every link leads somewhere.

A block is left out only by a comment before it that says why: `<!-- docs-test: skip, needs Slurm -->`; `<!-- docs-test: slow -->` runs with
the slow tests. Blocks of one page run in order, in one folder that has a finished tiny run, its text, and the repository's files.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from tiny_recipes import build_text, environment, on_text, recipe_file, tiny

from golf_jax.artifact.model import pack_model
from golf_jax.data.tokenizer import Tokenizer
from golf_jax.model import init_params

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- docs-test: (?P<mark>[^>]*?) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(page, *kinds):
    """(mark, kind, code, first line) of the page's blocks."""
    text = page.read_text()
    found = [m for m in _BLOCK.finditer(text) if m["kind"] in kinds]
    return [(m["mark"] or "", m["kind"], m["code"], text[: m.start("code")].count("\n") + 1) for m in found]


def where(page, line):
    return f"{page.relative_to(ROOT)}:{line}"


def test_marks_are_understood():
    for page in PAGES:
        text = page.read_text()
        found = blocks(page, "bash", "python")
        assert text.count("docs-test:") == sum(bool(mark) for mark, *_ in found), f"{page.name}: a mark that stands before no block"
        for mark, _, _, line in found:
            assert not mark or mark == "slow" or re.fullmatch(r"skip, \S.{5,}", mark), where(page, line)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name}: {target}"
    for target in re.findall(r"`((?:docs|tests|benchmarks|golf_jax|configs|kernels)/[\w./-]+\.\w+)`", page.read_text()):
        assert (ROOT / target).exists(), f"{page.name}: {target}"


def commands(page):
    """Every `python -m golf_jax.NAME ...` of blocks and transcripts, continued lines joined: (line, name, words)."""
    for _, _, code, first in blocks(page, "bash", "python", ""):
        for number, line in enumerate(code.replace("\\\n", "  ").splitlines(), first):
            for name, rest in re.findall(r"python -m golf_jax[. ](\w+)((?: [^#&|;]*)?)", line):
                yield number, name, rest.split()


def flags_of(name, capsys):
    """The flags that a command's help lists."""
    package = (ROOT / "golf_jax" / name).is_dir()
    main = importlib.import_module(f"golf_jax.{name}{'.__main__' if package else ''}").main
    for part in (["build"], ["download"], ["verify"]) if name == "data" else ([],):
        with pytest.raises(SystemExit, match="0"):
            main([*part, "--help"])
    return set(re.findall(r"--[\w.-]+", capsys.readouterr().out))


def test_every_flag_exists(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    known, checked = {}, 0
    for page in PAGES:
        for line, name, words in commands(page):
            if name not in known:
                known[name] = flags_of(name, capsys)
            for word in words:
                if word.startswith("--") and len(word) > 2:
                    flag = word.split("=")[0]
                    assert flag in known[name], f"{where(page, line)}: {name} has no {flag}"
                    checked += 1
    assert checked > 40


def folder(root, programs, **more):
    """A folder with the repository's files and generated text; installing and testing are no-ops in it. Returns it and its environment."""
    for name in ("tests", "docs", "configs", "benchmarks", "pyproject.toml"):
        (root / name).symlink_to(ROOT / name)
    (root / "bin").mkdir()
    for name in ("pip", "pytest"):  # this environment is installed, and its tests are running
        (root / "bin" / name).write_text("#!/bin/sh\n")
        (root / "bin" / name).chmod(0o755)
    (root / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (root / "bin" / "python").chmod(0o755)
    build_text(root / "data")
    return root, environment(programs, devices=1) | {"PATH": f"{root / 'bin'}:{os.environ['PATH']}"} | more


@pytest.fixture(scope="module")
def packed(tmp_path_factory, programs):
    """Such a folder with the artifact of an untrained model where the pages have a run."""
    root, env = folder(tmp_path_factory.mktemp("packed"), programs)
    recipe, tokenizer = tiny("quickstart", vocab_size=300), Tokenizer(root / "data/tokenizer.model")
    run = root / "runs/quickstart-20261125"
    run.mkdir(parents=True)
    artifact = pack_model(recipe, init_params(recipe.model, jax.random.key(0)), tokenizer.sha256, code_bytes=0)
    (run / "artifact.golf").write_bytes(artifact.data)
    (run / "tokenizer.model").write_bytes(tokenizer.model)
    return root, env


@pytest.fixture(scope="module")
def trained(tmp_path_factory, programs):
    """Such a folder with a finished run of two steps."""
    root, env = folder(tmp_path_factory.mktemp("trained"), programs)
    recipe = recipe_file(on_text(tiny("quickstart", steps=2, vocab_size=300), Path("data")), root / "tiny.py")
    train = [sys.executable, "-m", "golf_jax.train", recipe, "--run-dir", "runs/quickstart-20261125", "--devices", "1"]
    subprocess.run(train, cwd=root, env=env, check=True, capture_output=True)
    return root, env


def run_blocks(page, place, wanted):
    root, env = place
    ran = 0
    for mark, kind, code, line in blocks(page, "bash", "python"):
        if mark == wanted:
            program = ["bash", "-euo", "pipefail", "-c", code] if kind == "bash" else [str(root / "bin" / "python"), "-c", code]
            done = subprocess.run(program, cwd=root, env=env, capture_output=True, text=True)
            assert done.returncode == 0, f"{where(page, line)}:\n{code}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            ran += 1
    return ran


QUICK = [page for page in PAGES if any(not mark for mark, *_ in blocks(page, "bash", "python"))]
LONG = [page for page in PAGES if any(mark == "slow" for mark, *_ in blocks(page, "bash", "python"))]


@pytest.mark.parametrize("page", QUICK, ids=lambda p: p.stem)
def test_quick_blocks_run(page, packed):
    assert run_blocks(page, packed, "")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in LONG if page.name != "README.md"], ids=lambda p: p.stem)
def test_long_blocks_run(page, trained):
    assert run_blocks(page, trained, "slow")


@pytest.mark.slow
def test_the_readme_from_the_first_line_on(tmp_path, programs):
    """The quickstart is trained for real, in an empty folder, and everything else is done with that run."""
    whole = folder(tmp_path, programs, JAX_DISABLE_MOST_OPTIMIZATIONS="0", XLA_FLAGS="")
    assert run_blocks(ROOT / "README.md", whole, "slow") == 3
