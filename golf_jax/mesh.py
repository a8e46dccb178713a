"""Devices and shardings: one mesh axis, `data`.

The whole training step runs inside one `jax.shard_map` over this axis (training/step.py), so every collective in the compiled
program is one that the source names. Evaluation shards its batch rows over the same axis.
"""

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from golf_jax.config import GolfError

AXIS = "data"
REPLICATED = PartitionSpec()
ROWS = PartitionSpec(AXIS)


def initialize_distributed() -> None:
    """Join the other hosts, when `JAX_COORDINATOR_ADDRESS` (or a cluster that jax knows) says there are any.

    Must run before the first call that touches a device. A single process without that variable is left alone.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address and not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(
                coordinator_address=address,
                num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
                process_id=int(os.environ["JAX_PROCESS_ID"]),
            )
        except KeyError as missing:
            message = f"JAX_COORDINATOR_ADDRESS is set but {missing} is not: give JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            raise GolfError(message) from None


def make_mesh(num_devices: int = 0) -> Mesh:
    """A mesh of the first `num_devices` devices (0: all of them), axis `data`.

    Raises GolfError if there are fewer devices than asked for.
    """
    devices = jax.devices()
    if num_devices > len(devices):
        raise GolfError(f"--devices {num_devices}: only {len(devices)} {devices[0].platform} device(s) are here")
    return Mesh(np.array(devices[: num_devices or len(devices)]), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, REPLICATED)


def rows(mesh: Mesh) -> NamedSharding:
    """Leading axis split over the devices."""
    return NamedSharding(mesh, ROWS)


def platform(mesh: Mesh) -> str:
    """`cpu`, `gpu` or `tpu`."""
    return mesh.devices.flat[0].platform
