"""The day on a GPU, in miniature on the CPU: every script of it runs, and what it says can be read."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_day.py"


@pytest.fixture(scope="module")
def day():
    spec = importlib.util.spec_from_file_location("gpu_day", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_item_runs_in_miniature(tmp_path):
    subprocess.run([sys.executable, SCRIPT, "--dry", "--out", tmp_path], check=True, timeout=600)
    done = {d["item"]: d for d in map(json.loads, (tmp_path / "day.jsonl").read_text().splitlines())}
    assert all(r["ok"] for name in ("attention xla", "MLP xla") for r in done[name]["result"])
    assert done["step pr638, pallas with its MLP"]["result"]["step"]["wall_ms"] > 0
    torch = importlib.util.find_spec("torch") is not None
    name = "pr2005 looping, pallas" + " beside PyTorch" * torch
    traced, second = done["step pr638, cudnn, traced"]["result"], done[f"step {name}"]["result"]
    assert traced["parts"] and traced["mfu"] > 0 and list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert not torch or second["peers"]["eager"]["jax_over_torch"] > 0
    assert f"| {name} |" in (tmp_path / "day.md").read_text()


def test_an_item_that_hangs_or_fails_costs_only_itself(day, tmp_path):
    (tmp_path / "hangs.py").write_text(
        "import sys, time\nopen(sys.argv[sys.argv.index('--json') + 1], 'w').write('{\"ok\": true}\\n')\ntime.sleep(60)"
    )
    (tmp_path / "fails.py").write_text("raise SystemExit('no such kernel')")
    hangs, fails = (day.run(day.Item(n, 9, [str(tmp_path / f"{n}.py")]), tmp_path, 3, {}) for n in ("hangs", "fails"))
    assert hangs["end"].startswith("cut off") and hangs["result"] == [{"ok": True}]
    assert fails["end"] == "exit status 1" and "no such kernel" in fails["log"] and fails["result"] is None


def test_the_day_has_every_recipe_with_every_backend_and_each_beside_pytorch(day, tmp_path):
    names = [item.name for item in day.items(False, tmp_path)]
    assert len(set(names)) == len(names)
    for recipe in day.RECIPES:
        assert f"step {recipe}, cudnn beside PyTorch" in names
        for backend in ("cudnn", "pallas"):
            assert any(n.startswith(f"step {recipe}, {backend}") for n in names)
    assert {f"attention {b}" for b in day.BACKENDS} < set(names)
    assert {"MLP pallas", f"step pr638, {day.MLP}", f"step pr2005 looping, {day.MLP}"} < set(names)
