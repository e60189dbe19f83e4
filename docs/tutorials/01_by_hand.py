"""
Your first K-FAC step, by hand
==============================

A K-FAC step is ten lines of NumPy. Here they are, on a model of one layer, beside the plain gradient; and then the
same from the library.
"""

import matplotlib.pyplot as plt
import numpy as np

# %%
# The data: three classes of points in five dimensions, of which the first is a hundred times as long as the last. Who
# measures one length in metres and another in centimetres has such data.

rng = np.random.default_rng(0)
N, classes = 600, 3
y = rng.integers(classes, size=N)
centres = rng.normal(size=(classes, 5))
x = (centres[y] + rng.normal(size=(N, 5))) * np.array([10, 3, 1, 0.3, 0.1])
x = np.concatenate([x, np.ones((N, 1))], axis=1)  # the bias is the last column of W


def probabilities(W):
    s = x @ W.T  # the layer: s = W a
    e = np.exp(s - s.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def loss(W):
    return -np.log(probabilities(W)[np.arange(N), y]).mean()


# %%
# The step
# --------
#
# ``A`` is the second moment of the layer's inputs, ``G`` that of the gradients at its outputs. For ``G`` the targets
# are drawn **from the model itself**, and not taken from the data: that makes it the Fisher matrix. The gradient is
# that of the data, as always.


def kfac_direction(W, gamma):
    p = probabilities(W)
    sampled = (p.cumsum(axis=1) > rng.random((N, 1))).argmax(axis=1)  # y from the model
    g = p - np.eye(classes)[sampled]  # of one example's loss, with respect to s
    A, G = x.T @ x / N, g.T @ g / N
    gradient = (p - np.eye(classes)[y]).T @ x / N  # of the data
    pi = np.sqrt((np.trace(A) / len(A)) / (np.trace(G) / len(G)))
    A, G = A + pi * gamma * np.eye(len(A)), G + gamma / pi * np.eye(len(G))
    return np.linalg.solve(G, gradient) @ np.linalg.inv(A)  # G⁻¹ ∇W A⁻¹


# %%
# Both take the best of several rates.


def run(direction, rate, steps=40):
    W, losses = np.zeros((classes, 6)), []
    for _ in range(steps):
        losses.append(loss(W))
        W = W - rate * direction(W)
    return losses


def gradient_direction(W):
    return (probabilities(W) - np.eye(classes)[y]).T @ x / N


rates = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]
with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
    descent = min((run(gradient_direction, rate) for rate in rates), key=lambda losses: losses[-1])
    kfac = min(
        (run(lambda W: kfac_direction(W, 0.01), rate) for rate in (0.03, 0.1, 0.3, 1.0)), key=lambda losses: losses[-1]
    )
print(f"after 40 steps: gradient descent {descent[-1]:.3f}, K-FAC {kfac[-1]:.3f}")

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.semilogy(descent, label="gradient descent", color="#D55E00")
axes.semilogy(kfac, label="K-FAC", color="#0072B2")
axes.set(xlabel="step", ylabel="loss")
axes.legend(frameon=False)
plt.show()

# %%
# Gradient descent must take a rate at which the longest direction of the data does not diverge, and then hardly moves
# along the others. K-FAC divides by the lengths, and by their correlations too.
#
# The same from the library
# -------------------------
#
# ``batch_factors`` makes the moments, ``block_diagonal_inverse`` damps and inverts them, ``@`` is G⁻¹ ∇W A⁻¹. Nothing
# here knows of the model: the same lines take PyTorch's or JAX's arrays.

from kfaclinalg import batch_factors, block_diagonal_inverse

W = np.zeros((classes, 6))
rng = np.random.default_rng(1)
by_hand = kfac_direction(W, 0.01)

rng = np.random.default_rng(1)  # the same sampled targets
p = probabilities(W)
sampled = (p.cumsum(axis=1) > rng.random((N, 1))).argmax(axis=1)
factors = batch_factors([x], [p - np.eye(classes)[sampled]])
(direction,) = block_diagonal_inverse(factors, 0.01) @ (gradient_direction(W),)
print("largest difference:", np.abs(direction - by_hand).max())
assert np.allclose(direction, by_hand)
