"""What an update rule is: the only thing the optimizer, the training state and checkpoints know of Muon or AdamW."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

Tree = dict[str, jax.Array]


class Rule(NamedTuple):
    """How the leaves of one group become directions. A new rule is one of these and one row in `optimizer.RULES`."""

    spec: PartitionSpec
    """How packed gradients, state and directions lie on the mesh: `ROWS`, each device has its share of the first axis, or
    `REPLICATED`."""
    pack: Callable[[Tree], Tree]
    """Leaves -> the arrays the rule works on."""
    unpack: Callable[[Tree], Tree]
    init: Callable[[Tree], Any]
    """Packed parameters -> state."""
    update: Callable[[Tree, Any, Any], tuple[Tree, Any]]
    """(packed mean gradients, state, traced scalars of the rule) -> (packed directions, state), on this device's share."""
