"""
Invariance
==========

Theorem 1 of the paper: without damping K-FAC's updates do not depend on how a network is written down. Replace each
tanh by a sigmoid, and change the weights so that the network computes the same; K-FAC takes both along the same path,
and gradient descent does not.
"""

from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np

from kfaclinalg import block_diagonal_inverse
from kfaclinalg_mlp import MLP

# %%
# Two ways to write one network
# -----------------------------
#
# As tanh(s) = 2 σ(2 s) - 1, a layer of tanh units is one of sigmoid units with other weights: those into it are
# doubled, W† = 2 W, and those out of it take a = 2 a† - 1 back. In the paper's terms Φ = ½ I, and Ω is ½ I with ½ in
# the column of the bias.

rng = np.random.default_rng(0)
sizes = [6, 8, 7, 4]
x = rng.normal(size=(800, 6))
y = np.tanh(x @ rng.normal(size=(6, 4))) + 0.1 * rng.normal(size=(800, 4))
weights = tuple(rng.normal(size=(m, n + 1)) / np.sqrt(n) for n, m in pairwise(sizes))


def as_sigmoid(weights):
    """The weights with which a network of sigmoid units gives the same outputs."""
    changed = []
    for i, W in enumerate(weights):
        T = np.eye(W.shape[1])
        if i > 0:  # its inputs are those of tanh: a = 2 a† - 1
            T[:-1] *= 2
            T[:-1, -1] = -1
        changed.append((2 if i < len(weights) - 1 else 1) * W @ T)
    return tuple(changed)


tanh = MLP(("tanh", "tanh", "identity"), "gaussian")
sigmoid = MLP(("sigmoid", "sigmoid", "identity"), "gaussian")
difference = tanh.outputs(weights, x) - sigmoid.outputs(as_sigmoid(weights), x)
print("largest difference of the outputs:", np.abs(difference).max())

# %%
# Thirty steps of each
# --------------------


def path(mlp, weights, direction, rate):
    """The outputs and the losses along it; the same random targets for all."""
    problem = mlp.problem(x, y, rng=np.random.default_rng(1), statistics_fraction=1, curvature_fraction=1)
    outputs, losses = [], []
    for _ in range(30):
        loss, gradient = problem.loss_and_gradient(weights)
        outputs.append(mlp.outputs(weights, x))
        losses.append(float(loss))
        update = direction(problem.factors(weights, False), gradient)
        weights = tuple(W - rate * U for W, U in zip(weights, update, strict=True))
    return np.array(outputs), np.array(losses)


def kfac(gamma):
    return lambda factors, gradient: block_diagonal_inverse(factors, gamma) @ gradient


methods = {
    "gradient descent": (lambda factors, gradient: gradient, 0.1),
    "K-FAC, γ = 0.3": (kfac(0.3), 0.3),
    "K-FAC, γ = 0": (kfac(0.0), 0.3),
}
figure, panels = plt.subplots(1, 3, figsize=(9.5, 3.3), layout="constrained", sharey=True)
for axes, (name, (direction, rate)) in zip(panels, methods.items(), strict=True):
    one, losses = path(tanh, weights, direction, rate)
    two, others = path(sigmoid, as_sigmoid(weights), direction, rate)
    apart = np.abs(one - two).max(axis=(1, 2))[-1]
    print(f"{name:18} outputs of the two after 30 steps differ by {apart:.1e} at the most")
    axes.semilogy(losses, color="#0072B2", label="tanh")
    axes.semilogy(others, "--", color="#D55E00", label="sigmoid")
    axes.set_title(f"{name}: apart by {apart:.0e}", fontsize=10)
    axes.set_xlabel("step")
panels[0].set_ylabel("loss")
panels[0].legend(frameon=False)
plt.show()

# %%
# With γ = 0 the two curves are one, to rounding. Damping adds the identity in the coordinates that the weights happen
# to have, and so brings them back in: some of the invariance is what it costs. ``tests/paper/test_section_10.py``
# holds the theorem for random Ω and Φ, for F̆ and F̂.
