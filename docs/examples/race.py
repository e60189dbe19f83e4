"""K-FAC's preconditioner and KFAC beside the optimizers that one would take otherwise, on six small tasks.

    python docs/examples/race.py --tasks gru             # one task: 5 to 20 minutes on one core
    python docs/examples/race.py --quick                 # a short form of two tasks, about 30 seconds
    python docs/examples/race.py --report                # the page again, from what is stored

Each method has four learning rates to choose from (KFAC four dampings) and the same number of steps. The one with the
lowest final held-out loss is run with the other seeds too. Seconds are those of the steps on one thread, without the
evaluations. K-FAC's own options are its defaults; nobody has weight decay. SOAP and Shampoo are there where
`pytorch_optimizer` is. L-BFGS takes the whole data in each of an eighth as many steps, on the autoencoders. Results
are added to build/race/results.json, the table and the curves are in build/race/index.html.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from tqdm import tqdm

from _arguments import count, folder, positive
from _race_page import Run, table_of, write_page
from _race_tasks import TASKS, Data, Task
from kfaclinalg_torch import KFAC, KFACPreconditioner
from mnist_autoencoder import ROOT, print_table

Step = Callable[[Tensor, Tensor], Any]
EVALUATIONS, EVALUATED = 30, 1000  # examples of digits; of text a sixteenth, each has 64 characters
ADAM_RATES, SGD_RATES = (1e-3, 3e-3, 1e-2, 3e-2), (1e-3, 1e-2, 1e-1, 1.0)


# -- the methods: each makes of a model, a task and its one number a function that takes a step --


def descent(model: nn.Module, task: Task, *optimizers: torch.optim.Optimizer, preconditioner: Any = None) -> Step:
    """A user's training loop."""

    def step(x: Tensor, y: Tensor) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        outputs = model(x)
        if preconditioner is not None:
            preconditioner.update(outputs)
        task.loss(outputs, y).backward()
        if preconditioner is not None:
            preconditioner.step()
        for optimizer in optimizers:
            optimizer.step()

    return step


def adamw(model: nn.Module, task: Task, lr: float) -> Step:
    return descent(model, task, AdamW(model.parameters(), lr=lr, weight_decay=0))


def sgd(model: nn.Module, task: Task, lr: float) -> Step:
    return descent(model, task, nesterov(model, lr))


def nesterov(model: nn.Module, lr: float) -> SGD:
    return SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)


def muon(model: nn.Module, task: Task, lr: float) -> Step:
    """For hidden matrices; AdamW for the rest: embeddings, the head, kernels, vectors."""
    last = [p for p in model.parameters() if p.ndim == 2][-1]
    embedded = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    apart = {id(p) for p in (last, *embedded)}
    hidden = [p for p in model.parameters() if p.ndim == 2 and id(p) not in apart]
    rest = [p for p in model.parameters() if p.ndim != 2 or id(p) in apart]
    matrices = torch.optim.Muon(hidden, lr=lr, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    return descent(model, task, matrices, AdamW(rest, lr=lr, weight_decay=0))


def soap(model: nn.Module, task: Task, lr: float) -> Step:
    from pytorch_optimizer import SOAP

    return descent(model, task, SOAP(model.parameters(), lr=lr, weight_decay=0))


def shampoo(model: nn.Module, task: Task, lr: float) -> Step:
    """With the gradient's length, its default; a new root every 20 steps in the place of 1,000."""
    from pytorch_optimizer import ScalableShampoo

    return descent(model, task, ScalableShampoo(model.parameters(), lr=lr, preconditioning_compute_steps=20))


def lbfgs(model: nn.Module, task: Task, lr: float) -> Step:
    """One iteration a step, with a line search that starts at lr."""
    optimizer = torch.optim.LBFGS(model.parameters(), lr=lr, max_iter=1, line_search_fn="strong_wolfe")

    def step(x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = task.loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    return step


def preconditioned_sgd(model: nn.Module, task: Task, lr: float) -> Step:
    return descent(model, task, nesterov(model, lr), preconditioner=preconditioner(model, task))


def preconditioned_adamw(model: nn.Module, task: Task, lr: float) -> Step:
    optimizer = AdamW(model.parameters(), lr=lr, weight_decay=0)
    return descent(model, task, optimizer, preconditioner=preconditioner(model, task))


def preconditioner(model: nn.Module, task: Task) -> KFACPreconditioner:
    return KFACPreconditioner(model, likelihood=task.likelihood)


def kfac(model: nn.Module, task: Task, damping: float) -> Step:
    return KFAC(model, task.likelihood, damping=damping).step


class Method(NamedTuple):
    make: Callable[[nn.Module, Task, float], Step]
    numbers: Sequence[float]
    whole: bool = False  # all of the data in each step, of which there are an eighth

    def fits(self, task: Task) -> bool:
        return not self.whole or task.likelihood == "bernoulli"


METHODS = {
    "AdamW": Method(adamw, ADAM_RATES),
    "SGD": Method(sgd, SGD_RATES),
    "Muon": Method(muon, ADAM_RATES),
    "SOAP": Method(soap, ADAM_RATES),
    "Shampoo": Method(shampoo, SGD_RATES),
    "L-BFGS": Method(lbfgs, (0.1, 0.3, 1.0, 3.0), whole=True),
    "K-FAC + SGD": Method(preconditioned_sgd, (0.1, 0.3, 1.0, 3.0)),
    "K-FAC + AdamW": Method(preconditioned_adamw, ADAM_RATES),
    "KFAC": Method(kfac, (0.1, 1.0, 10.0, 100.0)),
}


# -- the race --


def train(name: str, method: str, number: float, seed: int, steps: int, bar: tqdm) -> Run:
    """One training, to its end or until it has diverged."""
    task = TASKS[name]
    data, held_out = task.data()
    torch.manual_seed(seed)
    model = task.network()
    step = METHODS[method].make(model, task, number)
    shown = [part.some(EVALUATED if part.inputs.is_floating_point() else EVALUATED // 16) for part in (data, held_out)]
    points, seconds, every = [], 0.0, max(4, steps // EVALUATIONS)
    for k, (x, y) in enumerate(data.batches(len(data.inputs) if METHODS[method].whole else task.batch, seed)):
        if k % every == 0 or k == steps:
            losses = [evaluate(model, task, part) for part in shown]
            points.append((k, seconds, *losses))
            bar.set_postfix_str(f"{name}, {method} {number:g}, seed {seed}: {losses[1]:.4g}", refresh=False)
        if k == steps or not math.isfinite(points[-1][2]):
            bar.update(steps - k)
            return Run(name, method, number, seed, steps, points)
        start = time.process_time()
        step(x, y)
        seconds += time.process_time() - start
        bar.update()
    raise AssertionError("the batches have no end")


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, data: Data) -> float:
    model.eval()
    try:
        return float(task.loss(model(data.inputs), data.targets))
    finally:
        model.train()


def race(args: argparse.Namespace, store: Callable[[Run], None]) -> None:
    budget = {name: max(4, round(TASKS[name].steps * args.steps)) for name in args.tasks}
    plans = [
        (name, method, max(4, budget[name] // 8) if METHODS[method].whole else budget[name])
        for name in args.tasks
        for method in args.methods
        if METHODS[method].fits(TASKS[name])
    ]
    total = sum(steps * (len(METHODS[method].numbers) + args.seeds - 1) for _, method, steps in plans)
    with tqdm(total=total, unit=" steps", mininterval=0.1 if sys.stderr.isatty() else 20) as bar:
        for name, method, steps in plans:
            swept = [train(name, method, number, 0, steps, bar) for number in METHODS[method].numbers]
            best = min(swept, key=lambda run: run.held_out)
            others = [train(name, method, best.number, seed, steps, bar) for seed in range(1, args.seeds)]
            for run in (*swept, *others):
                store(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short run of about 30 seconds, which shows little")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=count, default=3)
    parser.add_argument("--steps", type=positive, default=1.0, help="part of each task's steps (1)")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--out", type=folder, default=ROOT / "build" / "race", help="folder (build/race)")
    args = parser.parse_args()
    if args.quick:
        args.tasks, args.methods = (
            ["convnet", "gru"],
            [m for m in ("AdamW", "K-FAC + SGD", "KFAC") if m in args.methods],
        )
        args.seeds, args.steps, args.out = 1, 0.02, args.out / "quick"
    borrowed = [method for method in args.methods if method in ("SOAP", "Shampoo")]
    if borrowed and not find_spec("pytorch_optimizer"):
        args.methods = [method for method in args.methods if method not in borrowed]
        print(f"{' and '.join(borrowed)}: left out, for pytorch_optimizer is not installed.")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*the diagonal of the Fisher matrix.*")

    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "results.json"
    stored = path.read_text(encoding="utf-8") if path.exists() and not args.quick else "[]"
    known = {run.key: run for run in (Run(*fields) for fields in json.loads(stored))}

    def store(run: Run) -> None:
        known[run.key] = run
        path.write_text(json.dumps(list(known.values())), encoding="utf-8")

    if not args.report:
        race(args, store)
    if not known:
        raise SystemExit(f"no run is in {path}")
    rows = table_of(list(known.values()))
    print_table(rows)
    write_page(args.out / "index.html", list(known.values()), rows)
    print(f"Curves: {args.out / 'index.html'}")


if __name__ == "__main__":
    main()
