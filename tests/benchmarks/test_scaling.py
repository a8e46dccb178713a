"""What the scaling page counts: the FLOPs of a traced program, the bytes that a compiled one sends over a ring."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
COUNT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import scaling  # its own process: it asks for 512 devices before jax starts
import jax, jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec as P
import numpy as np

def loop(a_MK, b_KK):
    return jax.lax.scan(lambda x, _: (jnp.sin(x @ b_KK), None), a_MK, None, length=7)[0]

product = jax.ShapeDtypeStruct((8, 16), jnp.float32), jax.ShapeDtypeStruct((16, 16), jnp.float32)
mesh = Mesh(np.array(jax.devices()[:4]), "d")

def sent(fn, out):
    share = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=P("d"), out_specs=out, check_vma=False))
    return scaling.sent(share.lower(jax.ShapeDtypeStruct((32, 100), jnp.float32)).compile().as_text(), 4)

print(json.dumps({
    "flops": scaling.flops(jax.jit(loop).trace(*product).jaxpr),
    "reduced": sent(lambda x: jax.lax.psum(x, "d"), P()),
    "gathered": sent(lambda x: jax.lax.all_gather(x, "d"), P()),
    "scattered": sent(lambda x: jax.lax.psum_scatter(x, "d", scatter_dimension=0, tiled=True), P("d")),
}))
"""


def test_products_count_as_often_as_they_run_and_collectives_by_their_ring():
    done = subprocess.run([sys.executable, "-c", COUNT, str(SCRIPTS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    share = 4 * 8 * 100  # bytes of one device's rows
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "flops": 7 * 2 * 8 * 16 * 16,
        "reduced": {"all-reduce": 2 * share * 3 / 4},
        "gathered": {"all-gather": 4 * share * 3 / 4},
        "scattered": {"reduce-scatter": share * 3 / 4},
    }
