"""Every public operation of the core, by its name: `time_ours`, and `track_ratio` to its floor."""

from . import conversions, dense, network, operators
from .backends import QUICK, present
from .operation import asv_classes

OPERATIONS = dense.OPERATIONS | operators.OPERATIONS | network.OPERATIONS | conversions.OPERATIONS
globals().update(asv_classes(OPERATIONS, __name__, [name for name in present() if QUICK or name != "jax"]))
