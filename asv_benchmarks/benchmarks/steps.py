"""Whole training steps beside plain SGD's on the same network, over a period of 20 that refreshes the inverse once."""

import numpy as np

from .backends import QUICK, backend, present
from .operation import ratio

PERIOD, EXAMPLES, INPUTS, CLASSES = (2 if QUICK else 20), 512, 196, 10
DEVICES = [name for name in present() if name in ("torch", "cuda")]
rng = np.random.default_rng(0)
X, Y = rng.random((EXAMPLES, INPUTS), dtype=np.float32), rng.integers(CLASSES, size=EXAMPLES)


def mlp(_, width):
    """Algorithm 2 on NumPy."""
    from kfaclinalg import KFACOptions, kfac_step
    from kfaclinalg_mlp import MLP, sparse_weights

    model = MLP(("tanh", "tanh", "identity"), "categorical")
    sizes = (INPUTS, width, width, CLASSES)
    start = tuple(W.astype(np.float32) for W in sparse_weights(sizes, rng=np.random.default_rng(0)))
    problem = model.problem(X, Y, rng=np.random.default_rng(0))
    held, weights = [start, None], [start]

    def ours():
        held[:] = kfac_step(problem, *held, KFACOptions())[:2]

    def sgd():
        _, gradient = problem.loss_and_gradient(weights[0])
        weights[0] = tuple(W - 0.01 * g for W, g in zip(weights[0], gradient, strict=True))

    return ours, sgd


def network(name, width):
    """A model, its batch, and a step of plain SGD."""
    import torch

    by = backend(name)
    torch.manual_seed(0)
    layers = [torch.nn.Linear(INPUTS, width), torch.nn.Tanh(), torch.nn.Linear(width, width), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, CLASSES)).to(by.device)
    return model, by.asarray(X), by.asarray(Y), by


def trained(model, x, y, by, optimizer, preconditioner=None):
    import torch

    def step():
        optimizer.zero_grad()
        outputs = model(x)
        if preconditioner is not None and preconditioner.likelihood is not None:
            preconditioner.update(outputs)
        torch.nn.functional.cross_entropy(outputs, y).backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
        by.wait(None)

    return step


def sgd(name, width):
    import torch

    model, *rest = network(name, width)
    return trained(model, *rest, torch.optim.SGD(model.parameters(), lr=0.01))


def kfac(name, width):
    """Algorithm 2 in torch."""
    from kfaclinalg_torch import KFAC

    model, x, y, by = network(name, width)
    optimizer = KFAC(model, "categorical")
    return lambda: by.wait(optimizer.step(x, y)), sgd(name, width)


def preconditioned(optimizer, estimator):
    """The preconditioner, its inverse refreshed every 20 steps, with an optimizer of torch."""

    def build(name, width):
        import torch

        from kfaclinalg_torch import KFACPreconditioner

        model, *rest = network(name, width)
        options = {"likelihood": "categorical"} if estimator == "sampled" else {}
        preconditioner = KFACPreconditioner(model, estimator=estimator, inverse_period=20, **options)
        chosen = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
        return trained(model, *rest, chosen, preconditioner), sgd(name, width)

    return build


def period(step):
    def run():
        for _ in range(PERIOD):
            step()

    return run


class _Step:
    param_names = ("backend", "width")
    params = (DEVICES, [64] if QUICK else [64, 256, 1024])
    rounds, repeat, warmup_time, number, timeout = 1, (2, 5, 1.0), 0, 1, 300

    def setup(self, name, width):
        pair = type(self).built(name, width)
        for step in pair:
            for _ in range(1 if QUICK else 4):  # past the refreshes of the first three
                step()
        self.ours, self.sgd = map(period, pair)

    def time_period(self, name, width):
        self.ours()

    def peakmem_period(self, name, width):
        self.ours()

    def track_ratio_to_sgd(self, name, width):
        return ratio(self.ours, self.sgd)

    track_ratio_to_sgd.unit = "ratio to plain SGD"


class KfacStepOfMlp(_Step):
    built, params = staticmethod(mlp), (["numpy"], _Step.params[1])


class Kfac(_Step):
    built = staticmethod(kfac)


class PreconditionerSgdEmpirical(_Step):
    built = staticmethod(preconditioned("SGD", "empirical"))


class PreconditionerAdamwSampled(_Step):
    built = staticmethod(preconditioned("AdamW", "sampled"))


OPERATIONS = {"kfac_step": KfacStepOfMlp, "KFAC": Kfac, "KFACPreconditioner": PreconditionerSgdEmpirical}
OPERATIONS |= {"kfac_iteration": KfacStepOfMlp, "kfac_report": KfacStepOfMlp}  # which `kfac_step` is made of
