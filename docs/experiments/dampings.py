"""
The two dampings
================

λ is added to the curvature, γ to its factors. Here is what each does to the eigenvalues of one layer, and to its
step.
"""

import matplotlib.pyplot as plt
import numpy as np

from kfaclinalg import Kronecker, LayerFactors, factored_tikhonov, tikhonov_pi

# %%
# A layer of 12 inputs and 8 outputs, whose inputs are ten times as large as its gradients, with eigenvalues over four
# decades on each side.

rng = np.random.default_rng(0)


def spd(eigenvalues):
    Q = np.linalg.qr(rng.normal(size=(len(eigenvalues), len(eigenvalues))))[0]
    return Q * eigenvalues @ Q.T


layer = LayerFactors(spd(np.logspace(1, -3, 12)), spd(np.logspace(-1, -5, 8)))
A, G = layer
print("π =", float(tikhonov_pi(layer)))

# %%
# The eigenvalues
# ---------------
#
# Those of A ⊗ G are all products of one of A and one of G. Eqn 6 adds λ to each of them: what was above λ stays, what
# was below becomes λ. Eqn 7, the factored form with γ = √λ, adds more: (a + πγ)(g + γ/π) is larger than a g + γ² by
# πγ g + γ/π a. With π = 1 the same γ drowns the small side, G here, and hardly touches the other.

lam = 1e-5
gamma = np.sqrt(lam)
a, g = np.linalg.eigvalsh(A), np.linalg.eigvalsh(G)
exact = np.sort(np.multiply.outer(a, g).ravel())[::-1]
order = np.argsort(np.multiply.outer(a, g).ravel())[::-1]
damped = factored_tikhonov(layer, gamma)
factored = np.multiply.outer(np.linalg.eigvalsh(damped.A), np.linalg.eigvalsh(damped.G)).ravel()[order]
plain = np.multiply.outer(a + gamma, g + gamma).ravel()[order]

figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
axes.semilogy(exact, color="k", label="A ⊗ G")
axes.semilogy(exact + lam, color="#0072B2", label="A ⊗ G + λ I (eqn 6)")
axes.semilogy(factored, ".", color="#D55E00", label="factored, γ = √λ (eqn 7)")
axes.semilogy(plain, ".", color="#999999", label="factored, π = 1")
axes.axhline(lam, color="#999999", linewidth=0.8)
axes.annotate("λ", (0, lam), xytext=(0, 3), textcoords="offset points")
axes.set(xlabel="eigenvalue, in order", ylabel="size")
axes.legend(frameon=False)
plt.show()

# %%
# The step
# --------
#
# Without damping a step is K-FAC's, as long as the smallest eigenvalues make it; with much of it the gradient's
# direction, and short. In between its direction turns. The exact form turns to the gradient sooner: the residual of
# the factored one keeps something of A's and of G's shape.

V = rng.normal(size=(8, 12))
lambdas = np.logspace(-10, 2, 49)


def steps(invert):
    Us = [invert(lam) @ V for lam in lambdas]
    cosines = [np.vdot(U, V) / np.linalg.norm(U) / np.linalg.norm(V) for U in Us]
    return [np.linalg.norm(U) for U in Us], cosines


figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for name, colour, invert in (
    ("exact (eqn 6)", "#0072B2", lambda lam: Kronecker(A, G).shifted_inverse(lam)),
    ("factored (eqn 7)", "#D55E00", lambda lam: Kronecker(*factored_tikhonov(layer, lam**0.5)).inverse()),
):
    lengths, cosines = steps(invert)
    left.loglog(lambdas, lengths, color=colour, label=name)
    right.semilogx(lambdas, cosines, color=colour, label=name)
left.set(xlabel="λ = γ²", ylabel="length of the step")
right.set(xlabel="λ = γ²", ylabel="cosine of its angle to the gradient")
right.legend(frameon=False)
plt.show()

# %%
# That is why λ and γ are adapted each for itself in Algorithm 2 (Section 6.6), and why ``Relative(0.1)``, the
# preconditioner's default, is a part of the mean eigenvalue of each layer and not one number for all.
