"""K-FAC's inverses as preconditioners of Hessian-free optimisation, and one step of K-FAC beside its exact minimum.

    python docs/examples/hessian_free.py            # about a minute on one core
    python docs/examples/hessian_free.py --quick    # about 10 seconds

Hessian-free optimisation (Martens 2010) minimises Section 6.4's M(δ) = 1/2 δᵀ (F + λI) δ + ∇hᵀ δ by conjugate
gradients, each iteration two passes over the data. Here F is the exact Fisher matrix of an autoencoder of a thousand
of scikit-learn's digits after some iterations of K-FAC, by products alone (`FisherOperator`); `cg` is SciPy's; the
preconditioner is none, the diagonal of K-FAC's F, F̆⁻¹ (block-diagonal) or F̂⁻¹ (block-tridiagonal), with γ = √λ.

Left: the residual against the iterations, for one λ. Middle: what M(δ) lacks to its minimum, which is what an optimizer
is after. The table has the iterations to each, and the seconds in all, the fit of the factors included. Right: for each
λ, M(δ) of a single step, δ = αΔ with Δ = -F̆⁻¹∇h and the best α, as a share of the minimum, which conjugate gradients
approach and one step of K-FAC cannot exceed. Shown: with F̆⁻¹ and F̂⁻¹ the first iterations do most of the work. To a
small residual only F̂⁻¹ needs fewer of them than none: a preconditioner changes the norm that is made small.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.sparse.linalg import LinearOperator, cg
from sklearn.datasets import load_digits
from tqdm import tqdm

from _curvature_examples import arguments, publish
from _demo_page import COLOURS, FAINT
from kfaclinalg_torch import KFAC, FisherOperator, fit_curvature
from mnist_autoencoder import autoencoder

SIZES = (64, 100, 50, 25, 6, 25, 50, 100, 64)
NONE, DIAGONAL, BLOCKS, NEIGHBOURS = "none", "diagonal", "F̆, block-diagonal", "F̂, block-tridiagonal"
COLOUR = dict(zip((NONE, DIAGONAL, BLOCKS, NEIGHBOURS), (FAINT, *COLOURS.values()), strict=False))
RESIDUAL = 1e-4  # where conjugate gradients stop
RESIDUALS, SHARES = (0.1, 0.01, RESIDUAL), (0.5, 0.9, 0.99)  # of the table
LAMBDA = 1e-2  # of the left panel
LAMBDAS = (1e-3, 1e-2, 1e-1, 1.0)
Vector = np.ndarray


class Solve(NamedTuple):
    """What conjugate gradients did."""

    residuals: list[float]  # relative, before each iteration
    values: list[float]  # -M there
    seconds: float


class System:
    """(F + λI) δ = -∇h of a model, and its preconditioners."""

    def __init__(self, model: torch.nn.Module, digits: torch.Tensor) -> None:
        data = [(digits, digits)]
        self.F = FisherOperator(model, "bernoulli", data)
        self.slope = -self.F.stacked(self.F.gradient()).numpy()
        self.fits, self.seconds = {}, {NONE: 0.0}
        for name, structure in ((BLOCKS, "block-diagonal"), (NEIGHBOURS, "block-tridiagonal")):
            start = time.perf_counter()
            self.fits[name] = fit_curvature(model, "bernoulli", data, structure=structure, progress=False)
            self.seconds[name] = time.perf_counter() - start
        self.fits[DIAGONAL], self.seconds[DIAGONAL] = self.fits[BLOCKS], self.seconds[BLOCKS]

    def preconditioner(self, name: str, damping: float) -> Any:
        n = len(self.slope)
        if name == NONE:
            return LinearOperator((n, n), lambda r: r, dtype=np.float64)
        if name == DIAGONAL:
            d = damping + self.F.stacked(self.fits[name].operator.diagonal()).numpy()
            return LinearOperator((n, n), lambda r: r.reshape(-1) / d, dtype=np.float64)
        return self.fits[name].inverse(damping**0.5).to_namespace(np).as_scipy()

    def solve(self, name: str, damping: float, rtol: float, limit: int) -> Solve:
        residuals: list[float] = []
        values: list[float] = []
        at = [np.zeros_like(self.slope)]  # the iterate
        with tqdm(total=limit, desc=f"cg, {name}, λ = {damping:g}", mininterval=0.5, leave=False) as bar:
            start = time.perf_counter()
            inverse = self.preconditioner(name, damping)

            def preconditioned(r: Vector) -> Vector:  # it is what sees the residual
                residuals.append(float(np.linalg.norm(r) / np.linalg.norm(self.slope)))
                values.append(float(at[0] @ (self.slope + r.reshape(-1)) / 2))
                bar.update()
                return inverse @ r

            M = LinearOperator(inverse.shape, preconditioned, dtype=np.float64)

            def seen(x: Vector) -> None:
                at[0] = x.copy()

            x, _ = cg(self.F.as_scipy(damping), self.slope, M=M, rtol=rtol, maxiter=limit, callback=seen)
        values.append(float(x @ self.slope / 2))
        return Solve(residuals, values, time.perf_counter() - start + self.seconds[name])

    def one_step(self, name: str, damping: float) -> float:
        """-M(αΔ) at the best α."""
        Delta = self.preconditioner(name, damping) @ self.slope
        return float((Delta @ self.slope) ** 2 / (2 * Delta @ (self.F.as_scipy(damping) @ Delta)))


def trained(digits: torch.Tensor, iterations: int, seed: int) -> torch.nn.Module:
    model, generator = autoencoder(seed, SIZES).double(), torch.Generator().manual_seed(seed)
    optimizer = KFAC(model, "bernoulli", structure="block-tridiagonal", damping=1.0, generator=generator)
    for _ in tqdm(range(iterations), desc="training", mininterval=0.5, leave=False):
        optimizer.step(digits, digits)
    return model


def first(reached: list[bool], end: int, limit: int) -> str:
    """After how many iterations; after all of them, where it stopped by itself."""
    return str(reached.index(True)) if any(reached) else str(end) if end < limit else f"> {limit}"


def draw(figure: Figure, solves: dict[str, Solve], shares: dict[str, list[float]]) -> None:
    left, middle, right = figure.subplots(1, 3)
    least = max(max(solve.values) for solve in solves.values())
    for name, solve in solves.items():
        left.semilogy(solve.residuals, color=COLOUR[name], label=name, linewidth=1)
        middle.semilogy([1 - value / least for value in solve.values[:-1]], color=COLOUR[name])
    left.axhline(RESIDUAL, color=FAINT, linewidth=1, linestyle=":")
    left.set(title=f"Residual, λ = {LAMBDA:g}", xlabel="iterations", ylim=(RESIDUAL / 3, None))
    middle.set(title="What M lacks to its minimum, as a share", xlabel="iterations", ylim=(1e-3, 1.1), xlim=(0, 200))
    for name, values in shares.items():
        right.plot(LAMBDAS[-len(values) :], values, "o-", color=COLOUR[name])
    right.set(xscale="log", ylim=(0, 1.02), xlabel="λ", title="One step's share of the minimum")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def main() -> None:
    args = arguments(__doc__)
    count, iterations, limit, lambdas = (300, 10, 150, LAMBDAS[1:]) if args.quick else (1000, 30, 600, LAMBDAS)
    digits = torch.from_numpy(load_digits().data[:count]) / 16
    system = System(trained(digits, iterations, args.seed), digits)
    solves = {name: system.solve(name, LAMBDA, RESIDUAL, limit) for name in COLOUR}
    # The minimum of M, by the best of the preconditioners: M(δ*) = ∇hᵀ δ* / 2.
    least = [system.solve(NEIGHBOURS, d, 1e-3, limit).values[-1] for d in lambdas]
    shares = {name: [system.one_step(name, d) / m for d, m in zip(lambdas, least, strict=True)] for name in COLOUR}
    best = max(max(solve.values) for solve in solves.values())
    heads = ["preconditioner", *(f"residual {r:g}" for r in RESIDUALS), *(f"{s:.0%} of M" for s in SHARES), "seconds"]
    rows = [[*heads, *(f"one step, λ = {d:g}" for d in lambdas)]]
    for name, solve in solves.items():
        steps = [first([x <= r for x in solve.residuals], len(solve.residuals), limit) for r in RESIDUALS]
        steps += [first([v >= s * best for v in solve.values], len(solve.values), limit) for s in SHARES]
        rows.append([name, *steps, f"{solve.seconds:.1f}", *(f"{share:.3f}" for share in shares[name])])
    publish(args.out / "hessian_free.png", rows, lambda figure: draw(figure, solves, shares), (12, 4.4))


if __name__ == "__main__":
    main()
