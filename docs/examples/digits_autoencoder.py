"""K-FAC on a deep autoencoder of scikit-learn's digits: how fast it learns, and whether it ever blows up.

    python docs/examples/digits_autoencoder.py                # iterations to given errors; minutes
    python docs/examples/digits_autoencoder.py --stability    # 80 runs of 1,000 iterations; more than half an hour

The mini-batch is the whole set of 1,797 digits. The error is the squared reconstruction error, summed over pixels, mean
over digits; in a table it is the smaller one of the last iterate and the average of the iterates (Section 13). Without
the guards of `kfac_step` (λ >= η, γ >= √η) the paper's algorithm may blow up late with τ2 < 1, where λ and γ follow the
noise of a small S2 down to nothing; and without the third, by which τ2 grows, that noise would end the progress.
"""

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

from kfaclinalg import KFACOptions
from kfaclinalg_torch import KFAC
from mnist_autoencoder import initialise_sparsely, print_table, reconstruction_error

SIZES = (64, 100, 50, 25, 6, 25, 50, 100, 64)
CODE = 4  # this layer and the last are linear; all others are tanh
STRUCTURES = {"block-diagonal": "tab:blue", "block-tridiagonal": "tab:orange"}
THRESHOLDS = (2, 1, 0.5, 0.3, 0.25)
# Not ours: the iterations that a separate, plain implementation of the paper's Algorithm 2 needed, with seed 0.
REFERENCE = {
    ("block-diagonal", 1): (40, 79, 138, 217, 277),
    ("block-tridiagonal", 1): (41, 72, 123, 192, 235),
    ("block-diagonal", 0.01): (27, 58, 104, 187, 268),
    ("block-tridiagonal", 0.01): (15, 36, 73, 132, 174),
}
DIVERGED, SETTLED = 2.0, 200  # an error above 2 in any evaluation from iteration 200 on: the run has diverged
FIGURES = Path(__file__).resolve().parents[2] / "build" / "figures"


class Plan(NamedTuple):
    """One training run."""

    structure: str
    damping: float  # λ at the start
    statistics_fraction: float  # τ1
    curvature_fraction: float  # τ2
    seed: int
    iterations: int
    target: float = 0.0  # an error at which to stop
    every: int = 1  # iterations between evaluations of the error


class Run(NamedTuple):
    """What came of it. Row i of `errors` is after plan.every * (i + 1) iterations."""

    plan: Plan
    errors: np.ndarray  # (evaluations, 2): of the last iterate, and of the average
    refused: int  # steps that were not taken

    @property
    def best(self) -> np.ndarray:
        return np.fmin(*self.errors.T)

    @property
    def diverged(self) -> bool:
        return not (self.errors[SETTLED // self.plan.every - 1 :, 0] <= DIVERGED).all()  # NaN has diverged


def autoencoder(seed: int) -> nn.Sequential:
    """Its biases are 0.5, but for the output 0: with a code layer of 0 the first iterations are not the reference's."""
    generator = torch.Generator().manual_seed(seed)
    modules: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(SIZES), start=1):
        layer, last = nn.Linear(inputs, outputs), i == len(SIZES) - 1
        initialise_sparsely(layer, bias=0.0 if last else 0.5, generator=generator)
        modules += [layer] if last or i == CODE else [layer, nn.Tanh()]
    return nn.Sequential(*modules)


def train(plan: Plan) -> Run:
    digits = torch.from_numpy(load_digits().data / 16).float()
    model, average = autoencoder(plan.seed), autoencoder(plan.seed)
    options = {name: getattr(plan, name) for name in KFACOptions._fields if name in Plan._fields}
    optimizer = KFAC(model, "bernoulli", **options, generator=torch.Generator().manual_seed(plan.seed))
    errors, refused = [], 0
    for k in range(1, plan.iterations + 1):
        optimizer.step(digits, digits)
        refused += bool(optimizer.info.refused)
        follow(average, model, k=k)
        if k % plan.every == 0:
            errors.append((reconstruction_error(model, digits), reconstruction_error(average, digits)))
            if min(errors[-1]) <= plan.target:
                break
    return Run(plan, np.array(errors), refused)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, *, k: int) -> None:
    """The average of Section 13, debiased: ξ_k = min(1 - 1/k, 0.99)."""
    for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(parameter, max(1 / k, 0.01))


def train_all(plans: Sequence[Plan]) -> list[Run]:
    """The runs in the order of the plans, as many at a time as there are cores, each on one thread."""
    spawn = multiprocessing.get_context("spawn")  # a fork after torch has started threads may hang
    with spawn.Pool(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(tqdm(pool.imap(train, plans), total=len(plans), unit=" runs"))


def progress(quick: bool) -> None:
    """Iterations to each error, and the picture."""
    seeds, dampings, errors = (1, (0.01,), THRESHOLDS[:2]) if quick else (3, (1, 0.01), THRESHOLDS)
    settings = itertools.product(dampings, STRUCTURES, range(seeds))
    runs = train_all([Plan(name, damping, 1, 1, seed, 400, target=errors[-1]) for damping, name, seed in settings])
    rows = [["iterations to an error of", *(f"{error:g}" for error in errors)]]
    for damping in dampings:
        means = []
        for structure in STRUCTURES:
            some = [run for run in runs if run.plan[:2] == (structure, damping)]
            means.append([np.mean([iterations_to(run, error) for run in some]) for error in errors])
            pairs = zip(means[-1], REFERENCE[structure, damping], strict=False)
            rows.append([f"{structure}, λ0 = {damping:g}", *(f"{x:.1f} ({x / y:.2f} x {y})" for x, y in pairs)])
        rows.append(["  second / first", *(f"{y / x:.2f}" for x, y in zip(*means, strict=True))])
    print(f"Mean over {seeds} seeds (over the reference's, seed 0). Steps refused: {sum(run.refused for run in runs)}")
    print_table(rows)
    picture, panels = panels_of([f"λ0 = {damping:g}" for damping in dampings])
    for damping, axes in zip(dampings, panels, strict=True):
        for structure, color in STRUCTURES.items():
            curves(axes, [run for run in runs if run.plan[:2] == (structure, damping)], color, label=structure)
            axes.plot(REFERENCE[structure, damping], THRESHOLDS, "o", color=color, mfc="none", label="reference")
    save(picture, panels, "digits_progress.png")


def iterations_to(run: Run, error: float) -> float:
    """The first iteration with this error, NaN where it is not reached."""
    reached = run.best <= error
    return float(np.argmax(reached)) + 1 if reached.any() else np.nan


def stability(quick: bool) -> None:
    """The paper's λ0 = 150 and τ1 = 1/8: there the reference, which has no guards, blew up in 3 of 6 runs, τ2 = 1/4."""
    seeds, iterations = (1, 100) if quick else (20, 1000)
    fractions = {1 / 4: "tab:red", 1: "tab:gray"}
    settings = itertools.product(range(seeds), STRUCTURES, fractions)
    runs = train_all([Plan(name, 150, 1 / 8, tau2, seed, iterations, every=5) for seed, name, tau2 in settings])
    heading = f"error after {iterations:,}: worst", "median", "mean", "diverged", "steps refused"
    rows = [[f"{seeds} seeds, λ0 = 150, τ1 = 1/8", *heading]]
    picture, panels = panels_of(list(STRUCTURES))
    for (structure, axes), (tau2, color) in itertools.product(zip(STRUCTURES, panels, strict=True), fractions.items()):
        some = [run for run in runs if (run.plan.structure, run.plan.curvature_fraction) == (structure, tau2)]
        ends = np.array([run.best[-1] for run in some])
        diverged = str(sum(run.diverged for run in some)) if iterations > SETTLED else "-"
        errors = [f"{x:.4f}" for x in (np.max(ends), np.median(ends), np.mean(ends))]
        rows.append([f"{structure}, τ2 = {tau2:g}", *errors, diverged, str(sum(run.refused for run in some))])
        curves(axes, some, color, label=f"τ2 = {tau2:g}")
    print_table(rows)
    save(picture, panels, "digits_stability.png")


def panels_of(titles: list[str]) -> tuple[Figure, np.ndarray]:
    picture = Figure(figsize=(5.5 * len(titles), 4.2), layout="constrained")
    panels = picture.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel="iterations", yscale="log")
    panels[0].set_ylabel("reconstruction error")
    return picture, panels


def curves(axes, runs: list[Run], color: str, *, label: str) -> None:
    """The last iterate's error of each run."""
    for run in runs:
        iterations = run.plan.every * np.arange(1, len(run.errors) + 1)
        axes.plot(iterations, run.errors[:, 0], color=color, lw=0.8, alpha=0.6, label=label if run is runs[0] else None)


def save(picture: Figure, panels: np.ndarray, name: str) -> None:
    for axes in panels:
        axes.legend()
        axes.grid(alpha=0.3)
    FIGURES.mkdir(parents=True, exist_ok=True)
    picture.savefig(FIGURES / name, dpi=120)
    print(f"Picture: {FIGURES / name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stability", action="store_true", help="20 seeds, both structures, τ2 = 1/4 and 1")
    parser.add_argument("--quick", action="store_true", help="a short form of about 15 seconds")
    args = parser.parse_args()
    (stability if args.stability else progress)(args.quick)


if __name__ == "__main__":
    main()
