"""The time to the first result is that of the lines of `train`."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOLD = """#!/bin/sh
[ -e "$GOLF_JAX_CACHE/made" ] && sleep 0.1 || sleep 1
touch "$GOLF_JAX_CACHE/made"
echo "step:1/9 of $4 $5"
echo "final_int6_standard_exact val_bpb:1 eval_time:600ms"
echo "final_int6_sliding_exact val_bpb:1 eval_time:1900ms"
"""


def test_every_start_is_timed_with_nothing_cached_and_again(tmp_path):
    fake = tmp_path / "python"
    fake.write_text(TOLD)
    fake.chmod(0o700)
    command = [sys.executable, "benchmarks/first_result.py", "--rounds", "1", "--json", str(tmp_path / "out.json"), "--python", str(fake)]
    done = subprocess.run([*command, "--", "--budget.steps", "9"], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cold, warm = json.loads((tmp_path / "out.json").read_text())["starts"]
    assert [cold["cached"], warm["cached"]] == [False, True] and cold["scoring"] == warm["scoring"] == 2.5
    assert cold["first_step"] >= 1 > warm["first_step"] > 0
    fake.write_text("#!/bin/sh\necho error: no such recipe\nexit 2\n")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("status 2: error: no such recipe\n")
