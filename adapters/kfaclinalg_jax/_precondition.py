"""K-FAC as a transformation of optax: ∇W becomes G⁻¹ ∇W A⁻¹."""

from __future__ import annotations

from typing import Any

from kfaclinalg import KFACOptions

from ._control import Control
from ._damping import Relative
from ._network import Network
from ._transformation import Transformation


def precondition(
    net: Network,
    damping: Any = Relative(0.1),  # noqa: B008 - a value
    *,
    structure: Any = "block-diagonal",
    decay: Any = 0.95,
    statistics_period: Any = "auto",
    inverse_period: Any = "auto",
    length: Any = "auto",
    kl_clip: Any = None,
    kl_lr: Any = None,
    inverse_sharding: Any = None,
) -> Any:
    """The gradient of every layer becomes G⁻¹ ∇W A⁻¹: an `optax.GradientTransformationExtraArgs`.

    `update(gradient, state, params, statistics=...)` takes the statistics of `Network.value_grad_and_statistics`;
    without them the averages stay as they are. It is pure and compiles once: no schedule, key or λ makes a new program.
    A batch whose gradients are not finite is refused, its update is zero; where only its statistics are not, they are.
    Where a layer's factors cannot be inverted, nor with up to 10,000 times the damping, its inverse stays, and
    `failures` counts.

    Args:
        net: the network; layers of which the gradients of some parameters are missing (`optax.masked`) are left alone.
        damping: λ: `Relative(fraction)`, of the mean eigenvalue of each layer, or one number for all; or a function of
            the step that gives one. Factored Tikhonov damping takes γ = √λ (Section 6.3).
        structure: "block-diagonal", "eigen" (EKFAC, of a network that keeps rows), or a value of `kfaclinalg`,
            `Factored(norm)`, `Exact()`, `LowRank(rank)`, `Eigen()`.
        decay: the bound of ε in the averages, ε = min(1 - 1/k, decay) (Section 5).
        statistics_period, inverse_period: in steps; the layers are refreshed in different steps of a period. "auto": at
            most a quarter of the model's work for each; 1 and 10 where λ is a number.
        length: the root mean square of each layer's update, whose direction alone is then K-FAC's; None: as long as
            it is. "auto": 1e-3, None where λ is a number or with `kl_clip`.
        kl_clip, kl_lr: κ and lr, 1 unless given: the update is multiplied by `min(1, √(κ / Σ lr² |⟨V, U⟩|))`, V and U
            being the gradients before and after. None: it is not.
        inverse_sharding: a `NamedSharding` of one dimension: the layers of equal shapes are divided over its devices,
            each of which refreshes its own. In `shard_map` the network's `axis_name` says it.

    Raises:
        TypeError, ValueError: a wrong option.

    >>> import jax, jax.numpy as jnp, optax
    >>> params, x, y = {"W": jnp.ones((2, 3))}, jnp.ones((8, 2)), jnp.zeros(8, int)
    >>> net = Network(lambda p, x: x @ p["W"], "categorical", example=(params, x))
    >>> tx = optax.chain(precondition(net), optax.sgd(0.3, momentum=0.9))
    >>> state = tx.init(params)
    >>> (loss, outputs), gradient, statistics = net.value_grad_and_statistics(params, x, y, key=jax.random.key(0))
    >>> updates, state = tx.update(gradient, state, params, statistics=statistics)
    >>> params = optax.apply_updates(params, updates)
    """
    import optax

    if not isinstance(net, Network):
        raise TypeError(f"net is a {type(net).__name__}, expected a Network")
    control = Control(damping, decay, statistics_period, inverse_period, length, kl_clip, kl_lr, inverse_sharding)
    found = KFACOptions(structure).checked().structure_value
    if found.linked:
        raise ValueError(f"structure is {structure!r}, expected one that takes no links between layers")
    if found.observes and net.keep != "rows":
        raise ValueError(f"structure {structure!r} takes the gradients of single examples: Network(..., keep='rows')")
    return optax.GradientTransformationExtraArgs(*Transformation(net, control, found))
