"""A deep autoencoder of MNIST's digits, trained by several processes that share the preconditioner's work.

    torchrun --nproc_per_node 2 docs/examples/distributed_autoencoder.py    # trains, by two processes
    python docs/examples/distributed_autoencoder.py                         # by 1, 2 and 4, and the picture
    python docs/examples/distributed_autoencoder.py --quick                 # the same in short

Each process has its part of every mini-batch; A, G and the inverses are with their owners. Measured are the seconds of
a step, what a process holds of them at most, and the bytes that it sends, beside what the cost model says; and the
model alone for 8 to 1,024 processes. On a CPU with fewer cores than processes the seconds are no gain: they say
what the processes cost each other. Picture: build/figures/distributed_autoencoder.png.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import torch
from torch import distributed, nn
from torch.utils._pytree import tree_leaves
from tqdm import trange

from _arguments import count
from _cost_model import NETWORKS, dense, model_of
from _sent_bytes import Sent
from kfaclinalg_torch import KFACPreconditioner
from mnist_autoencoder import load_digits

SIZES = (784, 250, 60, 15, 60, 250, 784)
PROCESSES, MANY = (1, 2, 4), (8, 16, 32, 64, 128, 256, 512, 1024)
BATCH, STATISTICS, INVERSES = 240, 1, 10  # σ and τ
HERE = Path(__file__).resolve()
PICTURE = HERE.parents[2] / "build" / "figures" / "distributed_autoencoder.png"


def autoencoder() -> nn.Sequential:
    layers = [module for n, m in pairwise(SIZES) for module in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def train(steps: int) -> dict[str, float]:
    """The last loss, the seconds of a step, and of a process the bytes of what it holds and of what it sends a step."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(autoencoder())
    periods = {"statistics_period": STATISTICS, "inverse_period": INVERSES}
    preconditioner = KFACPreconditioner(model, likelihood="bernoulli", placement="owner", **periods)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, nesterov=True)
    images, _ = load_digits(HERE.with_name("data") / "mnist_10000.npz")
    generator, sent, seconds = torch.Generator().manual_seed(0), Sent(), 0.0
    progress = trange(1, steps + 1, desc=f"{world} processes", disable=rank > 0)
    for step in progress:
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        x = images[chosen.tensor_split(world)[rank]]
        start = perf_counter()
        optimizer.zero_grad()
        outputs = model(x)
        with sent:
            preconditioner.update(outputs)  # from where the sums of the statistics leave
        loss = nn.functional.binary_cross_entropy_with_logits(outputs, x, reduction="sum") * world / BATCH
        loss.backward()
        with sent:
            preconditioner.step()
        optimizer.step()
        if step <= steps - INVERSES:
            sent.bytes = 0.0
        else:
            seconds += perf_counter() - start
        progress.set_postfix(loss=f"{loss.item():.1f}")
    held = preconditioner._estimate.averages.layers, preconditioner._inverses.inverses
    entries = sum(x.numel() for x in tree_leaves(held) if isinstance(x, torch.Tensor))
    own = torch.tensor([loss.item(), seconds / INVERSES, sent.bytes / INVERSES], dtype=torch.float64)
    most = torch.tensor(4.0 * entries)
    distributed.all_reduce(own)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    return dict(zip(("loss", "seconds", "bytes"), (own / world).tolist(), strict=True)) | {"memory": most.item()}


def child(steps: int, result: str | None) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    found = train(steps)
    if distributed.get_rank() == 0:
        print(json.dumps(found))
        if result:
            Path(result).write_text(json.dumps(found), encoding="utf-8")
    distributed.destroy_process_group()


def measured(processes: int, steps: int) -> dict[str, float]:
    with tempfile.NamedTemporaryFile() as file:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        subprocess.run([*torchrun, str(HERE), "--steps", str(steps), "--result", file.name], check=True)
        return json.loads(Path(file.name).read_text(encoding="utf-8"))


def draw(found: dict[int, dict[str, float]]) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
    items = [dense(n + 1, m) for n, m in pairwise(SIZES)]
    modelled = {P: model_of(items, P, "owner", STATISTICS, INVERSES) for P in PROCESSES}
    kinds = ("seconds", "s a step, measured"), ("memory", "MB of A, G, inverses at most"), ("bytes", "MB sent a step")
    for axis, (name, label) in zip(axes[0], kinds, strict=True):
        size = 1 if name == "seconds" else 1e-6
        axis.bar([str(P) for P in PROCESSES], [found[P][name] * size for P in PROCESSES], color="C0", label="measured")
        if name != "seconds":
            axis.plot([modelled[P][name] * size for P in PROCESSES], "k_", ms=30, mew=2, label="cost model")
            axis.legend()
        axis.set(title=f"autoencoder: {label}", xlabel="processes")
    for axis, (name, label) in zip(axes[1], (("seconds", "ms a step"), *kinds[1:]), strict=True):
        for network, color in zip(NETWORKS, ("C1", "C2"), strict=True):
            for placement, style in (("owner", "-"), ("replicated", "--")):
                values = [model_of(NETWORKS[network], P, placement, STATISTICS, INVERSES)[name] for P in MANY]
                size = 1e3 if name == "seconds" else 1e-6
                axis.loglog(MANY, [v * size for v in values], style, color=color, label=f"{network}, {placement}")
        axis.set(title=f"cost model: {label}", xlabel="processes", ylim=(None, 2 * axis.get_ylim()[1]))
        axis.set_xticks(MANY, [str(P) for P in MANY], minor=False)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1][2].legend(fontsize=8, loc="upper center", ncols=2)
    figure.suptitle("K-FAC on many processes; cost model at 25 GB/s a link, 19.5 Tflop/s float32, σ = 1, τ = 10")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=120)
    print(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=count, default=100)
    parser.add_argument("--quick", action="store_true", help="20 steps")
    parser.add_argument("--result", help=argparse.SUPPRESS)
    given = parser.parse_args()
    steps = 20 if given.quick else given.steps
    if "RANK" in os.environ:
        child(steps, given.result)
        return
    found = {processes: measured(processes, steps) for processes in PROCESSES}
    for processes, values in found.items():
        print(processes, {name: round(value, 4) for name, value in values.items()})
    draw(found)


if __name__ == "__main__":
    main()
