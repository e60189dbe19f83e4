"""The ground state of helium by variational Monte Carlo: a small network, and a likelihood that K-FAC has not heard of.

    python docs/examples/jax_variational_monte_carlo.py            # a few minutes on one core
    python docs/examples/jax_variational_monte_carlo.py --quick    # under a minute

The network is log ψ(x) of the two electrons, with a factor for their cusps. In every step walkers sample ψ², and K-FAC
fits log ψ to what imaginary time makes of it, log ψ - τ (E_loc - Ē) at each walker. That is a loss like any other, and
its Fisher matrix, 4 Cov(∇ log ψ), is the one of stochastic reconfiguration. The likelihood has three lines. Picture:
build/figures/jax_variational_monte_carlo.png.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import trange

from _arguments import folder
from kfaclinalg import kfac_report
from kfaclinalg_jax import KFAC, Network

jax.config.update("jax_enable_x64", True)
EXACT, HARTREE_FOCK = -2.903724, -2.861680  # Hartree
OUT = Path(__file__).parents[2] / "build" / "figures"
TAU, MOVES, STRIDE = 0.15, 10, 0.35  # imaginary time of a step; Metropolis moves between two steps, and their size
# All of a batch is used, since a walker costs more than a pass of the network does. λ stays: the loss of a batch cannot
# see the noise of its own curvature, and λ would fall until a step blows up.
OPTIONS = {
    "damping": 1e-2,
    "damping_decay": 1.0,
    "weight_decay": 0.0,
    "statistics_fraction": 1.0,
    "curvature_fraction": 1.0,
}


def initial(key, width=24):
    """A network of (|r1|, |r2|, |r1 - r2|)."""
    sizes = zip(jax.random.split(key, 3), (3, width, width), (width, width, 1), strict=True)
    return [(jax.random.normal(k, (n, m)) / n**0.5, jnp.zeros(m)) for k, n, m in sizes]


def log_psi(params, x):
    """log ψ (N,) of electrons x (N, 2, 3): symmetric, and with the cusps where two particles meet."""
    r1, r2, r12 = (jnp.sqrt((d**2).sum(-1) + 1e-12) for d in (x[:, 0], x[:, 1], x[:, 0] - x[:, 1]))

    def network(*distances):
        a = jnp.log1p(jnp.stack(distances, axis=-1))
        for W, b in params[:-1]:
            a = jnp.tanh(a @ W + b)
        W, b = params[-1]
        return (a @ W + b)[:, 0]

    correction = network(r1, r2, r12) + network(r2, r1, r12)
    return -2 * (r1 + r2) + 0.5 * r12 / (1 + r12) + correction


def local_energy(params, x):
    """(H ψ)/ψ at each walker: -½ (∇² log ψ + ‖∇ log ψ‖²) and the potential."""

    def kinetic(x):
        slope = jax.grad(lambda y: log_psi(params, y.reshape(1, 2, 3))[0])
        g, push = jax.linearize(slope, x.ravel())
        return -0.5 * (jnp.trace(jax.vmap(push)(jnp.eye(6))) + g @ g)

    r1, r2, r12 = (jnp.linalg.norm(d, axis=-1) for d in (x[:, 0], x[:, 1], x[:, 0] - x[:, 1]))
    return jax.vmap(kinetic)(x) - 2 / r1 - 2 / r2 + 1 / r12


class Walkers:
    """Of log ψ, whose constant means nothing: 2 Var(log ψ - y), so that F_R = 4 (I - 1 1ᵀ/N)."""

    def loss(self, z, y):
        return 2 * jnp.var(z - y)

    def sample(self, z, key):
        return z + 0.5 * jax.random.normal(key, z.shape, z.dtype)

    def fisher_product(self, z, t):
        return 4 * (t - t.mean())


@jax.jit
def walk(params, x, key):
    """Metropolis' walk in ψ², and how many moves were taken."""

    def move(carry, key):
        x, z = carry
        one, other = jax.random.split(key)
        y = x + STRIDE * jax.random.normal(one, x.shape, x.dtype)
        new = log_psi(params, y)
        taken = jnp.log(jax.random.uniform(other, z.shape)) < 2 * (new - z)
        return (jnp.where(taken[:, None, None], y, x), jnp.where(taken, new, z)), taken.mean()

    (x, z), taken = jax.lax.scan(move, (x, log_psi(params, x)), jax.random.split(key, MOVES))
    return x, z, local_energy(params, x), taken.mean()


def train(steps, walkers, key):
    """The energy and its variance over the walkers at each step, the last parameters, and what happened last."""
    start, key = jax.random.split(key)
    params, x = initial(start), jax.random.normal(key, (walkers, 2, 3)) * 0.5
    x = walk(params, walk(params, x, key)[0], start)[0]
    kfac = KFAC(Network(log_psi, Walkers(), example=(params, x)), **OPTIONS)
    state, seen = kfac.init(params), []
    bar = trange(steps)
    for k in bar:
        moving, sampling = jax.random.split(jax.random.fold_in(key, k))
        x, z, energy, taken = walk(params, x, moving)
        tau = TAU / (1 + k / 200)
        targets = z - tau * (energy - energy.mean())
        params, state, info = kfac.step(params, state, x, targets, sampling)
        if k % 10 == 0 or k == steps - 1:
            bar.set_postfix(E=f"{float(energy.mean()):.4f}", taken=f"{float(taken):.2f}")
        seen.append((energy.mean(), energy.var()))
    return np.asarray(seen, dtype=float), params, kfac_report(info)


def drawn(seen, params, out):
    """The energy, its variance, and how the second electron avoids the first, which is at one place."""
    fig, (energy, variance, plane) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    steps, width = np.arange(len(seen)), max(1, len(seen) // 25)
    energy.plot(steps, seen[:, 0], ".", color="0.7", ms=3, label="a step")
    kernel = np.ones(width) / width
    energy.plot(
        steps[width - 1 :], np.convolve(seen[:, 0], kernel, "valid"), color="C0", label=f"mean of {width} steps"
    )
    for level, style, name in ((EXACT, "-", "exact"), (HARTREE_FOCK, "--", "Hartree-Fock")):
        energy.axhline(level, color="k", lw=0.8, ls=style, label=name)
    energy.set(xlabel="step", ylabel="energy (Hartree)", title="Energy", ylim=(EXACT - 0.03, HARTREE_FOCK + 0.03))
    energy.legend(frameon=False, fontsize=8)
    variance.semilogy(steps, seen[:, 1], ".", color="C0", ms=3)
    variance.set(xlabel="step", title="Variance of the local energy")
    grid = np.linspace(-1.5, 1.5, 161)
    there = np.stack([*np.meshgrid(grid, grid), np.zeros((161, 161))], axis=-1).reshape(-1, 3)
    x = jnp.stack([jnp.broadcast_to(jnp.asarray([0.5, 0.0, 0.0]), there.shape), there], axis=1)
    mirrored = x * jnp.asarray([1.0, -1.0])[:, None]  # as far from the nucleus
    image = np.asarray(jnp.exp(2 * (log_psi(params, x) - log_psi(params, mirrored)))).reshape(161, 161)
    shown = plane.imshow(np.log2(image), extent=(-1.5, 1.5) * 2, origin="lower", cmap="RdBu_r", vmin=-1, vmax=1)
    fig.colorbar(shown, ax=plane, label="log₂ of its density here by that opposite")
    plane.plot([0.5], [0.0], "ko", ms=4)
    plane.plot([0.0], [0.0], "k+", ms=7)
    plane.set(title="The second electron avoids the first (o)", xlabel="x (Bohr)", ylabel="y (Bohr)")
    out.mkdir(parents=True, exist_ok=True)
    fig.savefig(out / "jax_variational_monte_carlo.png", dpi=150)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and walkers")
    parser.add_argument("--out", type=folder, default=OUT, help="folder of the picture")
    arguments = parser.parse_args()
    seen, params, info = train(*((60, 512) if arguments.quick else (500, 2048)), jax.random.key(0))
    last = seen[len(seen) // 2 :, 0]
    print(
        f"energy {last.mean():.5f} ± {last.std() / len(last) ** 0.5:.5f} Hartree over the last half; exact {EXACT:.5f}"
    )
    print(f"Hartree-Fock is {HARTREE_FOCK:.5f}; variance of the local energy {seen[-1, 1]:.1e}; last step: {info}")
    drawn(seen, params, arguments.out)
