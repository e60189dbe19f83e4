"""
Train an autoencoder and read its report
========================================

``KFAC`` has no learning rate. After each step ``optimizer.info`` says what it did and how well it knew what would
happen: λ, γ, α, μ, ρ. This page trains a deep autoencoder of scikit-learn's digits and reads them.
"""

import copy
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from kfaclinalg_torch import KFAC

torch.manual_seed(0)
x = torch.tensor(load_digits().data / 16, dtype=torch.float32)  # 1,797 digits of 8 x 8 pixels in [0, 1]
sizes = [64, 100, 50, 25, 6, 25, 50, 100, 64]
layers = []
for i, (n, m) in enumerate(pairwise(sizes)):
    layers.append(torch.nn.Linear(n, m))
    if i not in (3, 7):  # the code is linear, and the outputs are logits
        layers.append(torch.nn.Tanh())
model = torch.nn.Sequential(*layers)
start = copy.deepcopy(model)

# %%
# Pixels are taken as probabilities, hence ``"bernoulli"``. The batch is the whole set, so that τ1 and τ2, the parts
# of it from which the statistics and the quadratic model are taken, may be one: that is the best there is, and costs
# more.

optimizer = KFAC(model, "bernoulli", damping=0.1, statistics_fraction=1.0, curvature_fraction=1.0)
report = []
for _ in range(100):
    optimizer.step(x, x)
    report.append(optimizer.info)

with torch.no_grad():
    error = (torch.sigmoid(model(x)) - x).square().sum(1).mean()
last = report[-1]
print(f"squared error {error:.2f}; in the last step λ {last.damping:.2g}, γ {last.gamma:.2g}, "
      f"α {last.alpha:.2g}, μ {last.mu:.2g}")  # fmt: skip

# %%
# Reading it
# ----------

figure, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained")
curves = {
    "loss": "loss", "damping": "λ, the damping of the model", "gamma": "γ, the damping of the factors",
    "alpha": "α, of the proposal", "mu": "μ, of the last update", "ratio": "ρ, fallen over foretold",
}  # fmt: skip
for ax, (field, title) in zip(axes.flat, curves.items(), strict=True):
    ax.plot([getattr(info, field) for info in report], "." if field == "ratio" else "-", color="#0072B2")
    ax.set_title(title, fontsize=10)
    if field in ("loss", "damping", "gamma"):
        ax.set_yscale("log")
for level in (0.25, 0.75):
    axes[1, 2].axhline(level, color="#999", linewidth=0.8)
plt.show()

# %%
# **ρ** is by how much the loss fell over how much the quadratic model had foretold; it is measured every five steps.
# Near 1 the model is right. Above ¾ λ falls, below ¼ it rises (the grey lines). A negative ρ means that the loss
# rose.
#
# **λ** is how far the model is trusted. That it falls steadily says that damping, and not curvature, is what holds
# the steps back: it started too large. Give ``damping`` a tenth. If it rises at once it started too small.
#
# **γ** damps the two factors of each layer, and starts at √λ. Every 20 steps three candidates are tried, and the best
# stays.
#
# **α** is the length that the exact model gives to the proposal. It is rarely 1: the proposal is made with γ, which
# makes up for the Kronecker approximation too. A small α says that F̆, which approximates F, is too small there.
#
# **μ** is how much of the last update is taken again, and is found together with α. Near 1 it is a long memory; it
# may exceed 1 and be negative.
#
# And ``info.refused`` is not empty where a step was not taken: :doc:`/how_to/read_a_refusal`.
#
# Beside Adam, at the same number of steps
# ----------------------------------------

other = copy.deepcopy(start)
adam, losses = torch.optim.Adam(other.parameters(), lr=0.01), []
for _ in range(100):
    adam.zero_grad()
    h = torch.nn.functional.binary_cross_entropy_with_logits(other(x), x, reduction="none").sum(1).mean()
    h.backward()
    adam.step()
    losses.append(h.item())

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.plot([info.loss for info in report], label="KFAC", color="#0072B2")
axes.plot(losses, label="Adam, rate 0.01", color="#009E73")
axes.set(xlabel="step", ylabel="loss")
axes.legend(frameon=False)
plt.show()
print(f"loss after 100 steps: KFAC {report[-1].loss:.2f}, Adam {losses[-1]:.2f}")
