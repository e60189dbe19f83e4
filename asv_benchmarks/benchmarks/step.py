"""One iteration of the PyTorch optimizer on a small autoencoder, next to one of plain SGD."""

from itertools import pairwise
from time import perf_counter

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from kfaclinalg_torch import KFAC

from . import BACKENDS, wait

PERIOD = 20  # iterations, of which one refreshes the inverse, as in training


class Step:
    params = ([backend for backend in BACKENDS if backend != "numpy"], [64, 256])
    param_names = ("backend", "width")

    def setup(self, backend, width):
        torch.manual_seed(0)
        self.x = torch.rand(500, 196, device="cuda" if backend == "cuda" else "cpu")
        self.kfac_model, self.sgd_model = (self._model(width) for _ in range(2))
        self.kfac = KFAC(self.kfac_model, "bernoulli")
        self.sgd = torch.optim.SGD(self.sgd_model.parameters(), lr=1e-3)
        for _ in range(4):  # past the refreshes of the first three
            self.time_kfac(backend, width)
            self.time_sgd(backend, width)

    def time_kfac(self, backend, width):
        wait(self.kfac.step(self.x, self.x))

    def time_sgd(self, backend, width):
        self.sgd.zero_grad()
        loss = binary_cross_entropy_with_logits(self.sgd_model(self.x), self.x, reduction="sum") / len(self.x)
        loss.backward()
        self.sgd.step()
        wait(loss)

    def track_kfac_to_sgd(self, backend, width):
        """Time of a K-FAC iteration, refreshes included, over that of an SGD iteration."""
        return self._seconds(self.time_kfac, backend, width) / self._seconds(self.time_sgd, backend, width)

    track_kfac_to_sgd.unit = "ratio"

    def _seconds(self, step, backend, width):
        start = perf_counter()
        for _ in range(PERIOD):
            step(backend, width)
        return perf_counter() - start

    def _model(self, width):
        sizes = (196, width, width // 8, width, 196)
        layers = [layer for n, m in pairwise(sizes) for layer in (torch.nn.Linear(n, m), torch.nn.Tanh())]
        return torch.nn.Sequential(*layers[:-1]).to(self.x.device)
