"""How far one update of K-FAC lowers the objective, against γ: raw, rescaled and with momentum (the paper's Figure 7).

    python docs/examples/improvement_against_gamma.py            # about 30 seconds on two cores
    python docs/examples/improvement_against_gamma.py --quick    # about 10 seconds

An autoencoder of scikit-learn's 8 x 8 digits is trained by K-FAC with the block-tridiagonal inverse, full batch, with
the paper's constants. At the last iterate each γ gives a Δ = -F̂⁻¹∇h and one -F̆⁻¹∇h, from the same factors. The
improvement h(θ) - h(θ + δ), weight decay included, is that of δ = Δ, of δ = αΔ and of δ = αΔ + μδ0, where α and μ
minimise the quadratic model with the exact Fisher and δ0 is the last update.

Paper: without rescaling Δ is a very poor update, which lowers h only where γ is very large; rescaled, it may have a
much smaller γ, and lowers h much further. Ours: the same, with decades between the two γ (the numbers are printed);
momentum adds a little to that, and the block-tridiagonal inverse leads. Where they differ: the paper's network is
that of MNIST after 500 iterations, so that only shapes compare. The dotted line, which the paper does not have, is
the γ of K-FAC itself: as λ starts at 150 and falls slowly, it is still far above the best one here.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

from _arguments import count, positive, whole
from _demo_page import COLOURS, FAINT, INK, STYLE
from kfaclinalg import block_diagonal_inverse, block_tridiagonal_inverse, fit_quadratic, inner_products
from kfaclinalg_torch import KFAC
from kfaclinalg_torch._batch import Batch
from kfaclinalg_torch._problem import NetworkProblem
from mnist_autoencoder import autoencoder, print_table

SIZES = (64, 100, 50, 25, 6, 25, 50, 100, 64)
STRUCTURES = {"block-tridiagonal": block_tridiagonal_inverse, "block-diagonal": block_diagonal_inverse}
UPDATES = ("raw Δ", "rescaled", "with momentum")  # Δ, αΔ, αΔ + μδ0
PICTURE = Path(__file__).resolve().parents[2] / "build" / "figures" / "figure_7.png"


class Checkpoint(NamedTuple):
    """Where K-FAC stands: all that its next update depends on."""

    problem: NetworkProblem
    weights: tuple[Tensor, ...]
    factors: tuple  # kfaclinalg.Factors
    last: tuple[Tensor, ...]  # δ0
    damping: float  # λ + η
    gamma: float


def train(iterations: int, damping: float, seed: int) -> Checkpoint:
    digits = torch.from_numpy(load_digits().data) / 16
    model, generator = autoencoder(seed, SIZES).double(), torch.Generator().manual_seed(seed)
    optimizer = KFAC(model, "bernoulli", structure="block-tridiagonal", damping=damping, generator=generator)
    with tqdm(range(iterations), desc="training", mininterval=0.5) as bar:
        for _ in bar:
            bar.set_postfix(h=f"{optimizer.step(digits, digits):.3f}", refresh=False)
    state, options = optimizer.state_dict()["state"], optimizer.options
    everything = options._replace(curvature_fraction=1.0)  # the exact Fisher of all digits, so that nothing is random
    problem = optimizer._problem(Batch(digits, digits), optimizer._trained.capture(), everything)
    weights = optimizer._trained.network.weights()
    damping = state["damping"] + options.weight_decay
    return Checkpoint(problem, weights, optimizer.factors, tuple(state["update"]), damping, state["gamma"])


def objective(at: Checkpoint, weights: tuple[Tensor, ...]) -> float:
    eta = at.problem.options.weight_decay
    return float(at.problem.loss(weights) + eta / 2 * inner_products([weights], [weights])[0, 0])


def improvements(at: Checkpoint, structure: str, gamma: float) -> list[float]:
    """h(θ) - h(θ + δ) of the three updates for this structure and γ."""
    _, gradient = at.problem.loss_and_gradient(at.weights)
    gradient = tuple(g + at.problem.options.weight_decay * W for g, W in zip(gradient, at.weights, strict=True))
    Delta = tuple(-U for U in STRUCTURES[structure](at.factors, gamma) @ gradient)
    F = at.problem.curvature_gram(at.weights, [Delta, at.last])
    D = inner_products([Delta, at.last], [Delta, at.last])
    slopes = inner_products([Delta, at.last], [gradient])[:, 0]
    alpha = float(fit_quadratic(F[:1, :1], D[:1, :1], slopes[:1], at.damping).coefficients[0])
    alpha_and_mu = fit_quadratic(F, D, slopes, at.damping).coefficients.tolist()
    h = objective(at, at.weights)
    moved = []
    for a, mu in ((1.0, 0.0), (alpha, 0.0), alpha_and_mu):
        layers = zip(at.weights, Delta, at.last, strict=True)
        moved.append(tuple(W + a * U + mu * V for W, U, V in layers))
    return [h - objective(at, weights) for weights in moved]


def sweep(at: Checkpoint, gammas: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """The improvement for each γ, by structure and update."""
    grid = [(structure, gamma) for structure in STRUCTURES for gamma in gammas]
    values = [improvements(at, *point) for point in tqdm(grid, desc="γ", mininterval=0.5)]
    curves = np.array(values).reshape(len(STRUCTURES), len(gammas), len(UPDATES))
    return {(s, u): curves[i, :, j] for i, s in enumerate(STRUCTURES) for j, u in enumerate(UPDATES)}


def table(curves: dict[tuple[str, str], np.ndarray], gammas: np.ndarray) -> list[list[str]]:
    rows = [["update", "best improvement", "at γ", "lowers h for all γ from", "at the smallest γ"]]
    for (structure, update), curve in curves.items():
        fails = np.flatnonzero(~(curve > 0))  # a NaN fails
        start = fails[-1] + 1 if len(fails) else 0
        helps = f"{gammas[start]:.2g}" if start < len(gammas) else "none"
        best = curve[np.nanargmax(curve)], gammas[np.nanargmax(curve)]
        rows.append([f"{structure}, {update}", f"{best[0]:.4f}", f"{best[1]:.2g}", helps, f"{curve[0]:.3g}"])
    return rows


def verdict(curves: dict[tuple[str, str], np.ndarray], gammas: np.ndarray, at: Checkpoint) -> str:
    lines = []
    for structure in STRUCTURES:
        raw, rescaled, momentum = (curves[structure, update] for update in UPDATES)
        gain, more = np.nanmax(rescaled) / np.nanmax(raw), np.nanmax(momentum) / np.nanmax(rescaled)
        best, best_raw = (gammas[np.nanargmax(curve)] for curve in (rescaled, raw))
        lines.append(
            f"{structure}: the best rescaled update lowers h {gain:.1f} times as much as the best raw one, "
            f"at γ = {best:.2g} against {best_raw:.2g}; with momentum {more:.2f} times as much again."
        )
    return "\n".join([*lines, f"K-FAC's own γ at this point is {at.gamma:.2g}."])


def draw(curves: dict[tuple[str, str], np.ndarray], gammas: np.ndarray, at: Checkpoint, title: str) -> None:
    """One panel a structure. Below zero, where an update makes h worse, only the fall's beginning is shown."""
    mpl.rcParams.update(STYLE)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    top = max(np.nanmax(curve) for curve in curves.values())
    for panel, structure in zip(panels, STRUCTURES, strict=True):
        for update, colour in zip(UPDATES, COLOURS.values(), strict=False):
            curve = curves[structure, update]
            best = np.nanargmax(curve)
            panel.plot(gammas, curve, color=colour, label=update)
            panel.plot(gammas[best], curve[best], "o", color=colour, markersize=5)
        panel.axhline(0, color=FAINT, linewidth=0.8)
        panel.axvline(at.gamma, color=INK, linewidth=0.8, linestyle=":")
        panel.text(at.gamma, 1.08 * top, "K-FAC's own γ ", ha="right", va="top")
        panel.set(xscale="log", ylim=(-0.3 * top, 1.1 * top), title=f"{structure} inverse", xlabel="γ")
    panels[0].set_ylabel("improvement h(θ) − h(θ + δ)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=11)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer iterations and values of γ")
    parser.add_argument("--iterations", type=count, help="of K-FAC before the sweep (default 150, with --quick 40)")
    parser.add_argument("--damping", type=positive, help="λ at the start (default 150, the paper's; with --quick 1)")
    parser.add_argument("--seed", type=whole, default=0, help="of the initial weights and all sampling (default 0)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the layers are small: a second thread would only wait for the first
    # With λ0 = 150, λ is still so large after 40 iterations that it limits all rescaled updates; λ0 = 1 is past that.
    iterations = args.iterations or (40 if args.quick else 150)
    damping = (1.0 if args.quick else 150.0) if args.damping is None else args.damping
    at = train(iterations, damping, args.seed)
    gammas = np.geomspace(1e-4, 1e2, 7 if args.quick else 37)
    curves = sweep(at, gammas)
    print_table(table(curves, gammas))
    print(verdict(curves, gammas, at))
    draw(curves, gammas, at, f"One update of K-FAC after {iterations} iterations from λ = {damping:g}")
    print(f"Picture: {PICTURE}")


if __name__ == "__main__":
    main()
