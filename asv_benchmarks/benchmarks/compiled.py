"""`core` on JAX, at one size and dtype: XLA takes seconds to compile each. A quick run traces them in `core`."""

from .backends import QUICK, present
from .core import OPERATIONS
from .operation import asv_classes

if "jax" in present() and not QUICK:
    middle = {
        name: row._replace(sizes=(256,) if 256 in row.sizes else row.sizes[-1:], dtypes=("float32",))
        for name, row in OPERATIONS.items()
    }
    globals().update(asv_classes(middle, __name__, ["jax"]))
