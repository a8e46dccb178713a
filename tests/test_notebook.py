"""docs/notebook.ipynb runs from its first cell to its last."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_recipes import build_text, environment, on_text, tiny

from golf_jax import pipeline

NOTEBOOK = Path(__file__).parents[1] / "docs/notebook.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, programs, quick_compilation):
    recipe = on_text(tiny("baseline", vocab_size=300, seq_len=32), build_text(tmp_path / "text"))
    pipeline.run(replace(recipe, name="notebook"), pipeline.Options(run_dir=str(tmp_path / "run")))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    program = "\n".join("".join(cell["source"]) for cell in cells)
    command = [sys.executable, "-c", f"{program}\nassert losses[-1] < losses[0]"]
    run = environment(programs, RUN=str(tmp_path / "run"))
    done = subprocess.run(command, env=run, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "most likely next:" in done.stdout and "standard val_loss:" in done.stdout
