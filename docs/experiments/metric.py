"""
Heskes' metric and whitening
============================

Two ways to see the block-diagonal F̆: as what measures how far a step moves each layer's outputs (Section 12), and as
gradient descent in coordinates where inputs and gradients are white (Corollary 3).
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Ellipse

from kfaclinalg import Kronecker

rng = np.random.default_rng(0)
N = 400
a = rng.normal(size=(N, 2)) @ np.array([[2.0, 0.9], [0.0, 0.5]])  # inputs of a layer: long in one direction
g = rng.normal(size=(N, 2)) @ np.array([[0.3, 0.0], [0.5, 1.0]])  # gradients at its outputs
A, G = a.T @ a / N, g.T @ g / N
gradient = rng.normal(size=(2, 2))

# %%
# A metric on each layer's outputs
# --------------------------------
#
# Heskes (2000) measured a change of W by how far it moves the layer's outputs s = W a, weighed with G, which says how
# much the predictions feel it:
#
# .. math:: D(W', W) = \tfrac12 \operatorname{E}\bigl[(s - s')^\top G\, (s - s')\bigr]
#           = \tfrac12 \operatorname{vec}(\Delta W)^\top (A \otimes G) \operatorname{vec}(\Delta W).
#
# So A ⊗ G is its curvature, and the K-FAC direction is the step that lowers the loss most for its D.

change = rng.normal(size=(2, 2))
s = a @ change.T  # s' - s of each example
by_definition = 0.5 * np.einsum("ni,ij,nj->", s, G, s) / N
by_kronecker = 0.5 * np.vdot(change, Kronecker(A, G) @ change)
print("D by its definition", by_definition, "  by A ⊗ G", by_kronecker)
assert np.isclose(by_definition, by_kronecker)

# %%
# White coordinates
# -----------------
#
# Let a† = A^(-1/2) a and g† = G^(-1/2) g. Their second moments are the identity, W† = G^(1/2) W A^(1/2) gives the
# same outputs, and the plain gradient in W† taken back to W is G⁻¹ ∇W A⁻¹.


def power(M, p):
    w, Q = np.linalg.eigh(M)
    return (Q * w**p) @ Q.T


there = power(G, -0.5) @ gradient @ power(A, -0.5)  # ∇W†
back = power(G, -0.5) @ there @ power(A, -0.5)
assert np.allclose(back, Kronecker(A, G).solve(gradient))

figure, panels = plt.subplots(1, 4, figsize=(11, 3), layout="constrained")
white = (a @ power(A, -0.5), g @ power(G, -0.5))
for axes, points, title in zip(panels, (a, white[0], g, white[1]), ("a", "a†, white", "g", "g†, white"), strict=True):
    M = points.T @ points / N
    w, Q = np.linalg.eigh(M)
    axes.scatter(*points.T, s=5, color="#56B4E9")
    tilt = np.degrees(np.arctan2(Q[1, 1], Q[0, 1]))
    axes.add_patch(
        Ellipse((0, 0), 4 * w[1] ** 0.5, 4 * w[0] ** 0.5, angle=tilt, fill=False, color="#D55E00", linewidth=1.5)
    )
    axes.set(title=title, xlim=(-6, 6), ylim=(-4, 4), aspect="equal")
plt.show()
print("cosine of the angle between the gradient and K-FAC's direction:",
      np.vdot(gradient, back) / np.linalg.norm(gradient) / np.linalg.norm(back))  # fmt: skip

# %%
# What batch normalisation does for the mean and the size of each unit, K-FAC does for their correlations too, and for
# the gradients, and without a change of the network. The tests are ``tests/paper/test_section_10.py`` (the corollary)
# and ``tests/paper/test_section_12.py`` (the metric).
