"""
Influence and Laplace, from one fit
===================================

``fit_curvature`` takes the Fisher matrix of a trained model over its data, as one Kronecker product a layer. From
that value come an uncertainty of the predictions (Laplace), and which training examples spoke for one of them
(influence).
"""

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from kfaclinalg_torch import fit_curvature

# %%
# Two moons, and a network that is trained as usual.

rng = np.random.default_rng(0)
angle, label = rng.uniform(0, np.pi, 200), np.arange(200) % 2
moons = np.stack([np.cos(angle) + label, np.where(label, 0.25 - np.sin(angle), np.sin(angle) - 0.25)], axis=1)
x = torch.tensor(moons + 0.25 * rng.normal(size=(200, 2)), dtype=torch.float32)
y = torch.tensor(label)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(2, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=1 / 200)
for _ in range(300):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()

# %%
# The fit
# -------

curvature = fit_curvature(model, "categorical", [(x, y)], progress=False)
for name, (A, G) in curvature.layers.items():
    print(f"{name}: A {tuple(A.shape)}, G {tuple(G.shape)}")

# %%
# Laplace: where does it know?
# ----------------------------
#
# The posterior is taken to be normal around the trained weights, with the precision N F + δ I; δ = 1 is what the
# weight decay of the training was, times N. ``variances`` has the variances of the outputs that follow, J P⁻¹ Jᵀ.
# With them the boundary between the classes is sharp among the data and widens away from them: nothing there says how
# it goes on.

side = torch.linspace(-2.5, 3.5, 60)
grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1).reshape(-1, 2)
V = curvature.variances(grid, delta=1.0, scale=curvature.examples)  # (3600, 2, 2)
with torch.no_grad():
    z = model(grid) @ torch.tensor([-1.0, 1.0])  # the logit of the second class
variance = V[:, 0, 0] + V[:, 1, 1] - 2 * V[:, 0, 1]
laplace = torch.sigmoid(z / (1 + torch.pi / 8 * variance).sqrt())  # MacKay's approximation of the mean

figure, panels = plt.subplots(1, 2, figsize=(8, 3.8), layout="constrained")
for axes, p, title in zip(panels, (torch.sigmoid(z), laplace), ("the network", "with Laplace"), strict=True):
    image = axes.contourf(side, side, p.reshape(60, 60), levels=np.linspace(0, 1, 11), cmap="RdBu")
    axes.scatter(*x.T, c=y, cmap="RdBu", edgecolors="k", linewidths=0.5, s=14)
    axes.set_title(title, fontsize=10)
figure.colorbar(image, ax=panels, label="probability of the blue moon")
plt.show()

# %%
# The logarithm of the determinant of the precision is what a choice of δ by the evidence needs. The decomposition is
# made once; another δ costs next to nothing.

for delta in (0.1, 1.0, 10.0):
    posterior = curvature.shifted(delta, scale=curvature.examples)
    print(f"δ = {delta:<5} log det {float(posterior.logdet()):8.1f}")

# %%
# Influence: who spoke for this point?
# ------------------------------------
#
# The score of a training example for a query is gᵀ (F + λ I)⁻¹ g', by how much the query's loss would fall if the
# example counted more.

query = torch.tensor([[0.5, 0.0]])
wanted = model(query).argmax(1)
scores = curvature.scores((query, wanted), (x, y))[0]
order = scores.argsort()
figure, axes = plt.subplots(figsize=(5, 3.8), layout="constrained")
limit = float(scores.abs().max())
points = axes.scatter(*x.T, c=scores, cmap="PiYG", vmin=-limit, vmax=limit, edgecolors="k", linewidths=0.4, s=24)
axes.plot(*query.T, "k*", markersize=14)
figure.colorbar(points, label="for the star's class (green), against it (pink)")
plt.show()
print("most in favour:", x[order[-1]].tolist(), "of class", int(y[order[-1]]))

# %%
# More in :doc:`/curvature`: EKFAC's eigenvalues by ``structure="eigen"``, variances without samples, files.
