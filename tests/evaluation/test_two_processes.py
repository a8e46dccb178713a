"""Two processes share the rows and agree on the sums."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation.reference_models import Tiny
from tiny_recipes import environment

from golf_jax.config import PackedConfig, SlidingConfig
from golf_jax.evaluation import METHODS
from golf_jax.mesh import make_mesh

TESTS = Path(__file__).resolve().parents[1]
ONE_OF_TWO = """
import json
from golf_jax.processes import initialize_distributed
initialize_distributed()
from evaluation.test_two_processes import scores
print(json.dumps(scores(0)))
"""


def scores(devices):
    from evaluation.test_documents import TTT, documents_case
    from evaluation.test_ttt import SCORE_FIRST

    case, documents = Tiny(), documents_case()
    settings = {
        "sliding": (case, SlidingConfig(stride=4, windows="tail")),
        "score_first": (case, replace(SCORE_FIRST, windows="tail_min")),
        "packed": (documents, PackedConfig(rows=2, seq_len=8, ranks=3)),
        "documents": (documents, TTT),  # batches of 3 documents over 4 devices: the queue does not depend on them
    }
    results = [METHODS[name](of.model, of.stream(), make_mesh(devices), config) for name, (of, config) in settings.items()]
    return [[r.score.nll_nats, r.score.tokens, r.score.bytes, r.facts.duplicates, r.facts.order_violations] for r in results]


@pytest.mark.slow
def test_two_processes_give_the_score_of_one(programs):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    made = environment(programs, 2, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2")
    made["PYTHONPATH"] += f"{os.pathsep}{TESTS}"
    command = [sys.executable, "-c", ONE_OF_TWO]
    pair = [
        subprocess.Popen(command, env=made | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    outputs = [process.communicate(timeout=900) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    expected = scores(1)
    for out, _ in outputs:
        for ours, want in zip(json.loads(out.splitlines()[-1]), expected, strict=True):
            assert ours[1:] == want[1:] and ours[0] == pytest.approx(want[0], rel=1e-6)
