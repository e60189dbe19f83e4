"""A transformer of Flax nnx on characters: AdamW, and SGD behind K-FAC's preconditioner, at the best of three rates.

    python docs/examples/jax_transformer.py            # six minutes on one core
    python docs/examples/jax_transformer.py --quick    # about a minute

The text is the source of Python's own library; the last tenth is held out. All runs see the same mini-batches in the
same order, from the same start. K-FAC's options are the defaults, and so are AdamW's but for the rate; each rate falls
to zero as a cosine. `nnx.Optimizer` is the user's own loop: the one addition is `statistics=`. Picture: on the left the
held-out loss against steps, of the best rate of each; on the right its last value against the rate.
build/figures/jax_transformer.png.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import trange

from _arguments import count, folder
from kfaclinalg_jax import Network, precondition

try:
    from flax import nnx
except ImportError:
    raise SystemExit("flax is missing: pip install 'kfaclinalg[figures]'") from None

OUT = Path(__file__).parents[2] / "build" / "figures"
CONTEXT, WIDTH, HEADS, BLOCKS, BATCH, CHARACTERS = 48, 64, 4, 2, 32, 96
RATES = {"AdamW": (1e-3, 3e-3, 1e-2), "K-FAC + SGD": (0.1, 0.3, 1.0)}


class Block(nnx.Module):
    """Attention, then two layers for each position by itself."""

    def __init__(self, rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.query, self.key, self.value, self.mix = (nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(4))
        self.up, self.down = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        a = self.norm1(x)
        q, k, v = (layer(a).reshape(*x.shape[:2], HEADS, -1) for layer in (self.query, self.key, self.value))
        heads = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(heads.reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Transformer(nnx.Module):
    """Characters (N, T) to the logits of the next ones."""

    def __init__(self, rngs):
        self.tokens = nnx.Embed(CHARACTERS, WIDTH, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (CONTEXT, WIDTH)))
        self.blocks = nnx.List([Block(rngs) for _ in range(BLOCKS)])
        self.norm, self.head = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, CHARACTERS, rngs=rngs)

    def __call__(self, characters):
        x = self.tokens(characters) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def pieces():
    """Pieces of CONTEXT + 1 characters, for training and held out: printable ASCII as 1 to 95, all else 0."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    codes = np.frombuffer("".join(path.read_text("ascii", "ignore") for path in files).encode(), np.uint8)
    codes = np.where((codes < 32) | (codes > 126), 0, codes - 31).astype(np.int32)
    rows = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].reshape(-1, CONTEXT + 1)
    end = len(rows) * 9 // 10
    return rows[:end], rows[end:]


def transformation(name, rate, steps, net):
    schedule = optax.cosine_decay_schedule(rate, steps)
    if name == "AdamW":
        return optax.adamw(schedule)
    return optax.chain(precondition(net), optax.sgd(schedule, momentum=0.9, nesterov=True))


def train(name, rate, steps, data):
    """The held-out loss, a character, at every tenth step, and the seconds without compilation."""
    training, held_out = data
    model = Transformer(nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    net = Network(
        lambda params, x: nnx.merge(graph, params)(x),
        "categorical",
        example=(params, jnp.zeros((BATCH, CONTEXT), jnp.int32)),
    )
    tx = optax.with_extra_args_support(transformation(name, rate, steps, net))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, rows, key):
        params = nnx.split(model, nnx.Param)[1]
        _, gradient, statistics = net.value_grad_and_statistics(params, rows[:, :-1], rows[:, 1:], key=key)
        optimizer.update(model, gradient, statistics=statistics)

    @nnx.jit
    def loss(model, rows):
        return optax.softmax_cross_entropy_with_integer_labels(model(rows[:, :-1]), rows[:, 1:]).mean()

    rng, key, losses, seconds = np.random.default_rng(0), jax.random.key(1), [], 0.0
    some = held_out[np.random.default_rng(1).choice(len(held_out), 256, replace=False)]
    for i in trange(steps, desc=f"{name} {rate:g}", leave=False):
        rows = training[rng.integers(len(training), size=BATCH)]
        start = time.perf_counter()
        step(model, optimizer, rows, jax.random.fold_in(key, i))
        jax.block_until_ready(nnx.state(model, nnx.Param))
        seconds += (time.perf_counter() - start) * (i > 0)
        if i % 10 == 9 or i == steps - 1:
            losses.append((i + 1, float(loss(model, some))))
    return np.asarray(losses), seconds


def drawn(runs, best, out):
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (name, rate) in enumerate(best.items()):
        losses, _ = runs[name, rate]
        left.plot(*losses.T, f"C{i}", label=f"{name}, rate {rate:g}")
        ends = [(r, losses[-1, 1]) for (n, r), (losses, _) in runs.items() if n == name]
        right.semilogx(*np.transpose(ends), f"C{i}o-", label=name)
    left.set(xlabel="step", ylabel="held-out loss a character (nats)", title="A transformer on characters")
    right.set(xlabel="rate", title="The last loss against the rate")
    left.legend(frameon=False)
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "jax_transformer.png", dpi=150)
    print(f"Picture: {out / 'jax_transformer.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps, and one rate of each")
    parser.add_argument("--steps", type=count, default=500)
    parser.add_argument("--out", type=folder, default=OUT, help="folder of the picture")
    args = parser.parse_args()
    steps, data = 20 if args.quick else args.steps, pieces()
    rates = {name: values[1:2] if args.quick else values for name, values in RATES.items()}
    runs = {(name, rate): train(name, rate, steps, data) for name, values in rates.items() for rate in values}
    best = {name: min(values, key=lambda rate: runs[name, rate][0][-1, 1]) for name, values in rates.items()}
    for name, rate in best.items():
        losses = runs[name, rate][0]
        print(f"{name}, rate {rate:g}: held-out loss {losses[-1, 1]:.3f} after {steps} steps")
    kfac, adam = (runs[name, best[name]][1] for name in ("K-FAC + SGD", "AdamW"))
    print(f"a step of K-FAC takes {kfac / adam:.2f} times the seconds of AdamW's")
    drawn(runs, best, args.out)


if __name__ == "__main__":
    main()
