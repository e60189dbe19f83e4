"""How many weights a network can lose: those of the least curvature beside those of the least size.

    python docs/examples/pruning.py            # under a minute on one core
    python docs/examples/pruning.py --quick    # a few seconds

A perceptron 196-100-50-10 is trained on MNIST's digits and pruned in one step, without training afterwards, by

- magnitude: the smallest |w|;
- the diagonal of the curvature F: the smallest w² F_ii, Optimal Brain Damage (LeCun et al. 1990);
- that of its inverse: the smallest w² / [F⁻¹]_ii, Optimal Brain Surgeon (Hassibi & Stork 1993);
- the same, and the other weights move to make up for the loss: the minimum of the quadratic model δᵀ F δ where the
  pruned weights are zero, by SciPy's conjugate gradients on the others.

Drawn is the test accuracy against the share of weights kept, mean and range of the seeds. Shown: with the others moved
a fifth of the weights does what half of them do by magnitude. The saliency by the inverse takes for granted that the
others move: without that it is no better than magnitude, and the plain diagonal is.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

from _curvature_examples import accuracy, arguments, mnist, perceptron, publish, train
from _demo_page import COLOURS
from kfaclinalg_torch import fit_curvature

SIZES = (196, 100, 50, 10)
DAMPING = 1e-3  # of the mean eigenvalue of a layer
KEPT = (0.5, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)
MAGNITUDE, DAMAGE, SURGEON, MOVED = "magnitude", "curvature", "inverse curvature", "inverse curvature, the others moved"
COLOUR = dict(zip((MAGNITUDE, DAMAGE, SURGEON, MOVED), COLOURS.values(), strict=False))
Matrices = tuple[Tensor, ...]  # one a layer


def flat(Vs: Any) -> Tensor:
    return torch.cat([V.flatten() for V in Vs])


def split(v: Tensor, like: Matrices) -> Matrices:
    parts = v.split([V.numel() for V in like])
    return tuple(part.view(V.shape) for part, V in zip(parts, like, strict=True))


def moved(F: Any, W: Matrices, keep: Tensor) -> Matrices:
    """The weights that keep these entries and lie nearest to W in the norm of F."""
    w = flat(W)
    lost = torch.where(keep, 0.0, -w)
    free = keep.double()
    product = lambda v: flat(F @ split(torch.as_tensor(v).to(w), W))  # noqa: E731
    n = len(w)
    system = LinearOperator((n, n), lambda v: (free * product(free * torch.as_tensor(v))).numpy(), dtype=np.float64)
    delta, _ = cg(system, -(free * product(lost)).numpy(), maxiter=50, rtol=1e-3)
    return split(w + lost + free * torch.from_numpy(delta), W)


def prune(model: torch.nn.Module, data: Any, test: tuple[Tensor, Tensor]) -> dict[str, list[float]]:
    """The test accuracy with each share of the weights kept, by the method."""
    curvature = fit_curvature(model, "categorical", data, progress=False)
    W = curvature.pack(dict(model.named_parameters()))
    W = tuple(V.detach() for V in W)
    F = curvature.shifted([DAMPING * float(block.eigenvalues.mean()) for block in curvature.eigen])
    square = flat(W).square()
    saliency = {MAGNITUDE: square, DAMAGE: square * flat(curvature.operator.diagonal())}
    saliency |= {SURGEON: square / flat(F.inverse().diagonal())}
    saliency[MOVED] = saliency[SURGEON]
    found: dict[str, list[float]] = {name: [] for name in saliency}
    for share in tqdm(KEPT, desc="pruning", leave=False):
        for name, s in saliency.items():
            keep = torch.zeros_like(s, dtype=torch.bool)
            keep[s.topk(round(share * len(s))).indices] = True
            kept = moved(F, W, keep) if name == MOVED else split(torch.where(keep, flat(W), 0.0), W)
            found[name].append(accuracy(called(model, curvature.unpack(kept)), *test))
    return found


def called(model: torch.nn.Module, values: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: functional_call(model, values, (x,))


def draw(figure: Figure, found: dict[str, np.ndarray], whole: float) -> None:
    panel = figure.subplots()
    for name, values in found.items():
        panel.plot(KEPT, values.mean(0), "o-", color=COLOUR[name], label=name, markersize=4)
        panel.fill_between(KEPT, values.min(0), values.max(0), color=COLOUR[name], alpha=0.15, linewidth=0)
    panel.axhline(whole, color="#8a9097", linewidth=1, linestyle=":")
    panel.set(xscale="log", ylim=(0, 1), xlabel="share of weights kept", ylabel="test accuracy")
    panel.set_title("Pruned in one step; dotted: all weights")
    panel.set_xticks(KEPT, [f"{share:g}" for share in KEPT], minor=False)
    panel.minorticks_off()
    panel.legend(frameon=False, loc="lower right")


def main() -> None:
    args = arguments(__doc__, seeds=3)
    size, epochs, seeds = (1000, 5, 1) if args.quick else (5000, 15, args.seeds)
    (x, y), (test, labels) = mnist(size, 2000, pixels=14)
    x, test = x.double(), test.double()
    runs, whole = [], []
    for seed in range(args.seed, args.seed + seeds):
        torch.manual_seed(seed)
        model = train(perceptron(*SIZES).double(), x, y, epochs, seed, lr=2e-3)
        whole.append(accuracy(model, test, labels))
        runs.append(prune(model, list(zip(x.split(500), y.split(500), strict=True)), (test, labels)))
    found = {name: np.array([run[name] for run in runs]) for name in COLOUR}
    rows = [["accuracy with", *(f"{share:.0%}" for share in KEPT), "all"]]
    rows += [[name, *(f"{v:.3f}" for v in values.mean(0)), f"{np.mean(whole):.3f}"] for name, values in found.items()]
    publish(args.out / "pruning.png", rows, lambda figure: draw(figure, found, float(np.mean(whole))), (8, 5))


if __name__ == "__main__":
    main()
