"""
Put it in your loop
===================

You have a model, an optimizer, a schedule. ``KFACPreconditioner`` adds two lines between them. Here a small
convolutional network of scikit-learn's digits learns by AdamW, and by SGD with the preconditioner.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from kfaclinalg_torch import KFACPreconditioner

digits = load_digits()
x = torch.tensor(digits.images[:, None] / 16, dtype=torch.float32)
y = torch.tensor(digits.target)
train, held_out = slice(0, 1400), slice(1400, None)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


# %%
# The loop
# --------
#
# What is added stands under ``if preconditioner``. ``update`` takes the statistics, by a backward pass for targets
# that are drawn from the model; ``step`` turns every gradient into its direction. The optimizer, its momentum and its
# schedule stay as they are. The rate is another one: 0.3 or so with SGD.

STEPS, BATCH = 80, 128


def run(make_optimizer, *, preconditioned):
    model = network()
    optimizer = make_optimizer(model.parameters())
    preconditioner = KFACPreconditioner(model, likelihood="categorical") if preconditioned else None
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        batch = torch.randint(1400, (BATCH,), generator=generator)
        optimizer.zero_grad()
        outputs = model(x[batch])
        if preconditioner:
            preconditioner.update(outputs)
        loss = nn.functional.cross_entropy(outputs, y[batch])
        loss.backward()
        if preconditioner:
            preconditioner.step()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        wrong = (model(x[held_out]).argmax(1) != y[held_out]).float().mean().item()
    return losses, wrong, preconditioner


# %%
# A sweep of three rates for each, as one should; the lowest mean loss of the last ten steps wins.


def best(make, rates, **options):
    runs = [(rate, *run(lambda p, r=rate: make(p, r), **options)) for rate in rates]
    return min(runs, key=lambda result: sum(result[1][-10:]))


adamw = best(lambda p, r: torch.optim.AdamW(p, lr=r), [0.003, 0.01, 0.03], preconditioned=False)
kfac = best(lambda p, r: torch.optim.SGD(p, lr=r, momentum=0.9, nesterov=True), [0.1, 0.3, 1.0], preconditioned=True)

figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
for (rate, losses, _, _), name, colour in ((adamw, "AdamW", "#009E73"), (kfac, "SGD + K-FAC", "#0072B2")):
    axes.semilogy(losses, label=f"{name}, rate {rate}", color=colour)
axes.set(xlabel="step", ylabel="loss of the batch")
axes.legend(frameon=False)
plt.show()
for name, (rate, losses, wrong, _) in {"AdamW": adamw, "SGD + K-FAC": kfac}.items():
    print(f"{name:12} rate {rate:<5} loss {sum(losses[-10:]) / 10:.4f}, wrong on held-out digits {wrong:.1%}")

# %%
# The jump at the end is no instability. Two of the 128 digits of the last batch, 316 and 1010, had been in none before;
# the others the network knows by heart by then.
#
# What it took for a layer
# ------------------------
#
# ``layers`` has A and G by the names of the modules; ``fallback`` and ``skipped`` what no rule knew and what was left
# alone. Those two dictionaries are what to look at first with a model of your own.

preconditioner = kfac[3]
for name, (A, G) in preconditioner.layers.items():
    print(f"{name}: A {tuple(A.shape)}, G {tuple(G.shape)}")
print("fallback:", preconditioner.fallback, " skipped:", preconditioner.skipped)

# %%
# Next: :doc:`/how_to/choose_damping`, :doc:`/how_to/inspect_a_run`, and all its options in :doc:`/preconditioner`.
