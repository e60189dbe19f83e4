"""The curvature of a data set beside curvlinops, laplace-torch and kronfluence: our time over the best of theirs.

With the extra `interop`, on one thread, in one process and in turn, the medians of the rounds in seconds of the
processor, which a machine that others use too does not change much:

    make .venv-interop/.made
    .venv-interop/bin/python asv_benchmarks/curvature_peers.py            # --network convnet, --only logdet, ...

- the fit of K-FAC's factors (exact Fisher) and of EKFAC (empirical Fisher), on 10,000 digits in batches of 500;
- log det (N F + δI) for 100 values of δ, of a fit at hand, its decompositions made;
- the scores of 100 queries against 10,000 examples, with EKFAC fitted.

"floor" is the arithmetic by hand, of a perceptron: for the fit two passes over the data, two products and two rotations
a layer, the eigenvectors; for the scores one product of q m by n with n by N a layer. All libraries do that work.

The network is a perceptron 784-256-128-10 in float32, or another of the `NETWORKS`. laplace-torch takes its factors
from curvlinops, so that where its own backend no longer runs with curvlinops 3 its fit has no row.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import curvlinops
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from kfaclinalg_torch import fit_curvature, laplace_backend

N, QUERIES, BATCH, DELTAS = 10_000, 100, 500, torch.logspace(-3, 3, 100)
NETWORKS = {
    "perceptron": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    ),
    "convnet": lambda: nn.Sequential(
        *(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    ),
}
LONG = 5.0  # seconds: once is enough
Calls = dict[str, Callable[[], Any]]


class Setting:
    """The model, its data, and what each library makes of them."""

    def __init__(self, network: str, n: int) -> None:
        torch.manual_seed(0)
        self.model, self.x = NETWORKS[network]().eval(), torch.rand(n, 1, 28, 28)
        self.y = torch.randint(10, (n,))
        self.parameters, self.loss = list(self.model.parameters()), nn.CrossEntropyLoss()
        self.loader = list(zip(self.x.split(BATCH), self.y.split(BATCH), strict=True))

    def ours(self, structure: str, estimator: str) -> Any:
        options = {"structure": structure, "estimator": estimator, "progress": False}
        return fit_curvature(self.model, "categorical", self.loader, **options)

    def curvlinops(self, kind: str, fisher: Any) -> Any:
        options = {"fisher_type": fisher, "check_deterministic": False, "separate_weight_and_bias": False}
        operator = getattr(curvlinops, f"{kind}LinearOperator")
        made = operator(self.model, self.loss, self.parameters, self.loader, **options)
        made.compute_kronecker_factors()
        if kind == "EKFAC":
            made.compute_eigenvalue_correction()
        return made

    def laplace(self, backend: Any) -> Any:
        from laplace import Laplace

        options = {"subset_of_weights": "all", "hessian_structure": "kron", "backend": backend}
        la: Any = Laplace(self.model, "classification", **options)
        la.fit(DataLoader(TensorDataset(self.x, self.y), batch_size=BATCH), progress_bar=False)
        return la


def fits(setting: Setting) -> Iterator[tuple[str, Calls]]:
    from laplace.curvature import CurvlinopsGGN

    kinds = curvlinops.FisherType
    yield (
        "fit, K-FAC",
        {
            "ours": lambda: setting.ours("block-diagonal", "exact"),
            "curvlinops": lambda: setting.curvlinops("KFAC", kinds.TYPE2),
            "laplace-torch": lambda: setting.laplace(CurvlinopsGGN),
        },
    )
    with kronfluence(setting) as analyzer:
        yield (
            "fit, empirical EKFAC",
            {
                "ours": lambda: setting.ours("eigen", "empirical").eigen,
                "floor": lambda: ekfac_by_hand(setting),
                "curvlinops": lambda: setting.curvlinops("EKFAC", kinds.EMPIRICAL),
                "kronfluence": analyzer.fit,
            },
        )
        curvature = setting.ours("eigen", "empirical")
        queries = (setting.x[:QUERIES], setting.y[:QUERIES])
        yield (
            "scores",
            {
                "ours": lambda: curvature.scores(queries, setting.loader),
                "floor": lambda: scores_by_hand(setting),
                "kronfluence": analyzer.scores,
            },
        )
    curvature, la = setting.ours("block-diagonal", "exact"), setting.laplace(laplace_backend())
    posterior = la.H  # decomposed by its fit
    curvature.logdet(1.0)
    yield (
        "100 logdets",
        {
            "ours": lambda: [curvature.logdet(d, scale=N) for d in DELTAS],
            "ours, of shifted operators": lambda: [curvature.shifted(d, scale=N).logdet() for d in DELTAS],
            "laplace-torch": lambda: [(posterior + d[None]).logdet() for d in DELTAS],
        },
    )


def shown(setting: Setting, x: torch.Tensor, y: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs with a one, and gradients at the outputs, of each layer of a perceptron: one forward and backward pass."""
    a, s, h = [], [], x.flatten(1)
    for layer in setting.model:
        if isinstance(layer, nn.Linear):
            a.append(torch.cat([h.detach(), h.new_ones(len(h), 1)], 1))
            h = layer(h)
            s.append(h)
        else:
            h = layer(h) if h.ndim == 2 else h
    gradients = torch.autograd.grad(nn.functional.cross_entropy(h, y, reduction="sum"), s)
    return list(zip(a, gradients, strict=True))


def ekfac_by_hand(setting: Setting) -> list[torch.Tensor]:
    """EKFAC's eigenvalues of a perceptron by the fewest calls: two passes, A and G, their eigenvectors, the squares."""
    moments: list[Any] = []
    for x, y in setting.loader:
        new = [(a.mT @ a, g.mT @ g) for a, g in shown(setting, x, y)]
        moments = [(A + a, G + g) for (A, G), (a, g) in zip(moments, new, strict=True)] if moments else new
    bases = [tuple(torch.linalg.eigh(M)[1] for M in pair) for pair in moments]
    total: list[Any] = [0.0] * len(bases)
    for x, y in setting.loader:
        for i, ((a, g), (Q_A, Q_G)) in enumerate(zip(shown(setting, x, y), bases, strict=True)):
            total[i] += (g @ Q_G).square().mT @ (a @ Q_A).square()
    return total


def scores_by_hand(setting: Setting) -> None:
    """The products of the preconditioned gradients of the queries with the inputs of the examples, and no more."""
    rows = [
        torch.rand(QUERIES * layer.out_features, layer.in_features + 1)
        for layer in setting.model
        if hasattr(layer, "in_features")
    ]
    for x, _ in setting.loader:
        for P in rows:
            P @ torch.rand(P.shape[1], len(x))


class Kronfluence:
    def __init__(self, setting: Setting, folder: str) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.task import Task

        class Digits(Task):
            def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Any:
                return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

            def compute_measurement(self, batch: Any, model: nn.Module) -> Any:
                return self.compute_train_loss(batch, model)

        task = Digits()
        model = prepare_model(copy.deepcopy(setting.model), task)
        self.data = TensorDataset(setting.x, setting.y)
        self.analyzer = Analyzer("speed", model, task, output_dir=folder, disable_tqdm=True, cpu=True)
        self.factor_args = FactorArguments(strategy="ekfac", use_empirical_fisher=True)
        self.score_args = ScoreArguments(damping_factor=None)

    def fit(self) -> None:
        options = {"per_device_batch_size": BATCH, "factor_args": self.factor_args, "overwrite_output_dir": True}
        self.analyzer.fit_all_factors("f", self.data, **options)

    def scores(self) -> None:
        self.analyzer.compute_pairwise_scores(
            *("s", "f"),
            query_dataset=Subset(self.data, range(QUERIES)),
            train_dataset=self.data,
            per_device_query_batch_size=QUERIES,
            per_device_train_batch_size=BATCH,
            score_args=self.score_args,
            overwrite_output_dir=True,
        )


@contextlib.contextmanager
def kronfluence(setting: Setting) -> Iterator[Kronfluence]:
    with tempfile.TemporaryDirectory() as folder:
        found = Kronfluence(setting, folder)
        found.fit()
        yield found


def timed(calls: Calls, rounds: int) -> dict[str, float]:
    """The median seconds of each, in turn; what does not run is left out."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    once: set[str] = set()
    for k in range(rounds + 1):
        for name, call in calls.items():
            if name not in found or name in once:
                continue
            start = time.process_time()
            try:
                call()
            except Exception as error:
                print(f"  {name} does not run here: {type(error).__name__}: {str(error)[:90]}")
                del found[name]
                continue
            seconds = time.process_time() - start
            if k or seconds > LONG:  # the first is for warmth
                found[name].append(seconds)
            if seconds > LONG:
                once.add(name)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--network", choices=NETWORKS, default="perceptron")
    parser.add_argument("--examples", type=int, default=N)
    parser.add_argument("--only", default="", help="the jobs whose names hold this")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for job, calls in fits(Setting(args.network, args.examples)):
        if args.only not in job:
            continue
        seconds = timed(calls, args.rounds)
        best = min(
            (s for name, s in seconds.items() if name.split(",")[0] not in ("ours", "floor")), default=float("nan")
        )
        for name, s in seconds.items():
            print(f"{job:22} {name:28} {1e3 * s:10.1f} ms {s / best:8.2f} of the best of the others", flush=True)


if __name__ == "__main__":
    main()
