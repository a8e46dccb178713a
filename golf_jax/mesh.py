"""Devices and shardings: one mesh axis, `data`.

The whole training step runs inside one `jax.shard_map` over this axis (training/step.py), so every collective in the compiled
program is one that the source names. Evaluation shards its batch rows over the same axis.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from golf_jax.config import GolfError

AXIS = "data"
REPLICATED = PartitionSpec()
ROWS = PartitionSpec(AXIS)


def make_mesh(num_devices: int = 0) -> Mesh:
    """A mesh of the first `num_devices` devices (0: all of them), axis `data`.

    Raises GolfError if there are fewer devices than asked for.
    """
    if num_devices < 0:
        raise GolfError(f"--devices {num_devices}: give a number of devices, or 0 for all")
    devices = jax.devices()
    if num_devices not in (0, len(devices)) and jax.process_count() > 1:
        raise GolfError(f"--devices {num_devices}: with several processes all devices are used; start fewer processes")
    if num_devices > len(devices):
        raise GolfError(f"--devices {num_devices}: only {len(devices)} {devices[0].platform} device(s) are here")
    return Mesh(np.array(devices[: num_devices or len(devices)]), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, REPLICATED)


def rows(mesh: Mesh) -> NamedSharding:
    """Leading axis split over the devices."""
    return NamedSharding(mesh, ROWS)


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Host values, the same on every process, on every device: an explicit transfer, without a check across processes."""
    sharding = replicated(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    with jax.transfer_guard("allow"):  # jax counts this way of making an array as implicit
        return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), sharding, lambda _: np.asarray(x)), tree)


def platform(mesh: Mesh) -> str:
    """`cpu`, `gpu` or `tpu`."""
    return mesh.devices.flat[0].platform


def run_rarely(platform: str) -> dict[str, Any] | None:
    """Options for the compiler of a program that runs once or at every save: on a CPU compiled in a third of the time, half as fast."""
    if platform != "cpu":
        return None
    simpler = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}  # an option no more
    return {"xla_backend_optimization_level": 0, **simpler}


def put(mesh: Mesh, array: np.ndarray, spec: PartitionSpec = ROWS) -> jax.Array:
    """A host array that every process holds whole, sharded over the mesh."""
    return jax.make_array_from_callback(array.shape, NamedSharding(mesh, spec), lambda index: array[index])


def own_rows(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers, values) of the rows of `x` that this process' devices hold."""
    shards = x.addressable_shards
    rows = [np.arange(*s.index[0].indices(x.shape[0])) for s in shards]
    return np.concatenate(rows), np.concatenate([np.asarray(s.data) for s in shards])


def replicate(mesh: Mesh, params: dict[str, Any]) -> dict[str, jax.Array]:
    """Parameters on every device of the mesh, dtypes kept."""
    return {name: jax.device_put(value, replicated(mesh)) for name, value in params.items()}
