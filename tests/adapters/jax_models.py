"""Twenty-five functions of parameters and inputs, with the layers that are to be found in each.

A model is (f, params, inputs), and the shape of W by the end of the weight's path; what has no layer is listed too.
"""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import lax

jax.config.update("jax_enable_x64", True)
N = 4


class Draw:
    """Normal arrays, another one in each call."""

    def __init__(self):
        self.key = jax.random.key(0)

    def __call__(self, *shape):
        self.key, key = jax.random.split(self.key)
        return jax.random.normal(key, shape) / max(1, shape[0]) ** 0.5


def params(**shapes):
    draw = Draw()
    return {name: draw(*shape) for name, shape in shapes.items()}


def inputs(*shape):
    return jax.random.normal(jax.random.key(1), (N, *shape))


def tokens(T, vocabulary):
    return jax.random.randint(jax.random.key(1), (N, T), 0, vocabulary)


def library(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def mlp():
    def f(p, x):
        return jnp.tanh(x @ p["W"] + p["b"]) @ p["V"] + p["c"]

    return f, params(W=(3, 5), b=(5,), V=(5, 2), c=(2,)), inputs(3), {"W": (5, 4), "V": (2, 6)}, []


def tied():
    def f(p, x):
        return jnp.tanh(x @ p["W"]) @ p["W"].T

    return f, params(W=(3, 5)), inputs(3), {"W": (5, 3)}, []


def reused():
    def f(p, x):
        for _ in range(3):
            x = jnp.tanh(x @ p["W"] + p["b"])
        return x

    return f, params(W=(3, 3), b=(3,)), inputs(3), {"W": (3, 4)}, []


def tied_table():
    def f(p, x):
        return jnp.tanh(p["E"][x]) @ p["E"].T + p["b"]

    return f, params(E=(7, 3), b=(7,)), tokens(2, 7), {"E": (3, 7), "b": (7, 1, 1)}, []


def convolutions():
    def f(p, x):
        x = lax.conv_general_dilated(
            x, p["K"], (2, 1), ((1, 2), "SAME")[1], rhs_dilation=(1, 2), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jnp.tanh(x + p["k"])
        x = lax.conv_general_dilated(
            x, p["L"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )
        return (x + p["l"]).sum((1, 2))

    shapes = {"K": (3, 2, 2, 4), "k": (4,), "L": (2, 2, 2, 6), "l": (6,)}
    return f, params(**shapes), inputs(5, 6, 2), {"K": (4, 13), "L": (2, 3, 9)}, []


def a_convolution_turned():
    def f(p, x):
        y = lax.conv_transpose(x, p["K"], (2, 1), "SAME", transpose_kernel=True) + p["b"]
        return jnp.tanh(y).sum((1, 2)) @ jnp.flip(p["W"], (0, 2)).reshape(3, 2)

    return f, params(K=(3, 2, 3, 2), b=(3,), W=(3, 1, 2)), inputs(4, 5, 2), {"K": (3, 13), "W": (2, 3)}, []


def recurrent():
    def f(p, x):
        def step(h, xt):
            h = jnp.tanh(xt @ p["U"] + h @ p["W"] + p["b"])
            return h, h @ p["V"] + p["c"]

        _, y = lax.scan(step, jnp.zeros((len(x), 4)), x.swapaxes(0, 1))
        return y.swapaxes(0, 1)

    shapes = {"U": (3, 4), "W": (4, 4), "b": (4,), "V": (4, 2), "c": (2,)}
    layers = {"U": (4, 3), "W": (4, 4), "b": (4, 1, 1), "V": (2, 5)}
    return f, params(**shapes), inputs(5, 3), layers, []


def scanned_layers():
    def f(p, x):
        def step(x, layer):
            y = (x - x.mean(-1, keepdims=True)) * layer["s"] + layer["t"]
            return x + jnp.tanh(y @ layer["W"] + layer["b"]), None

        return lax.scan(step, x, p)[0]

    shapes = {"W": (6, 3, 3), "b": (6, 3), "s": (6, 3), "t": (6, 3)}
    return f, params(**shapes), inputs(2, 3), {"W": (6, 3, 4), "s": (6, 3, 2, 1)}, []


def rematerialised():
    def f(p, x):
        block = jax.checkpoint(lambda x, W, b: jnp.tanh(x @ W + b), policy=jax.checkpoint_policies.dots_saveable)
        return block(block(x, p["W"], p["b"]), p["V"], p["c"])

    return f, params(W=(3, 5), b=(5,), V=(5, 2), c=(2,)), inputs(3), {"W": (5, 4), "V": (2, 6)}, []


def nested_jit():
    @jax.jit
    def affine(x, W, b):
        return jax.jit(jnp.dot)(x, W) + b

    def f(p, x):
        return jax.jit(lambda p, x: affine(jnp.tanh(affine(x, p["W"], p["b"])), p["V"], p["c"]))(p, x)

    return f, params(W=(3, 5), b=(5,), V=(5, 2), c=(2,)), inputs(3), {"W": (5, 4), "V": (2, 6)}, []


def an_example_at_a_time():
    def one(p, x):
        return p["V"] @ jax.nn.silu(p["W"] @ x + p["b"]) * p["s"]

    def f(p, x):
        return jax.vmap(one, in_axes=(None, 0))(p, x)

    shapes = {"W": (5, 3), "b": (5,), "V": (2, 5), "s": (2,)}
    return f, params(**shapes), inputs(3), {"W": (5, 4), "V": (2, 5), "s": (2, 1, 1)}, []


def an_index_at_a_time():
    def f(p, x):
        return jax.vmap(jax.vmap(lambda i: p["W"].T @ jnp.tanh(p["E"][i]) + p["F"][:, i]))(x)

    layers = {"E": (3, 7), "F": (2, 7), "W": (2, 3)}
    return f, params(E=(7, 3), F=(2, 7), W=(3, 2)), tokens(2, 7), layers, []


def attention():
    def f(p, x):
        q, k, v = (jnp.einsum("ntd,dhk->nthk", x, p[w]) + p[w + "b"] for w in "qkv")
        a = jax.nn.softmax(jnp.einsum("nthk,nshk->nhts", q, k), axis=-1)
        return jnp.einsum("nhts,nshk,hkd->ntd", a, v, p["o"]) + p["ob"]

    shapes = dict.fromkeys("qkv", (4, 2, 3)) | {w + "b": (2, 3) for w in "qkv"}
    layers = dict.fromkeys("qkv", (6, 5)) | {"o": (4, 7)}
    return f, params(**shapes, o=(2, 3, 4), ob=(4,)), inputs(5, 4), layers, []


def composed_weights():
    def f(p, x):
        direction = p["v"] / jnp.linalg.norm(p["v"], axis=0)
        return jnp.tanh(x @ (direction * p["g"])) @ (p["A"] + p["B"]) @ p["W"]

    shapes = {"v": (3, 5), "g": (5,), "A": (5, 2), "B": (5, 2), "W": (2, 2)}
    return f, params(**shapes), inputs(3), {"W": (2, 2)}, ["A", "B", "g", "v"]


def branches_and_loops():
    def f(p, x):
        x = lax.cond(x.sum() > 0, lambda W, x: x @ W, lambda W, x: -x @ W, p["W"], x)
        _, x = lax.scan(lambda c, _: ((0.5 * c[0], jnp.tanh(c[1] @ c[0])), None), (p["C"], x), None, length=2)[0]
        return x @ p["V"]

    return f, params(W=(3, 3), C=(3, 3), V=(3, 2)), inputs(3), {"V": (2, 3)}, ["C", "W"]


def rules_of_ones_own():
    @jax.custom_vjp
    def own(x, W):
        return x @ W

    own.defvjp(lambda x, W: (x @ W, (x, W)), lambda kept, g: (g @ kept[1].T, 2 * kept[0].T @ g))

    def f(p, x):
        return own(jnp.tanh(x @ p["W"]), p["V"])

    return f, params(W=(3, 3), V=(3, 2)), inputs(3), {"W": (3, 3)}, ["V"]


def linen(module, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variables = module.init(jax.random.key(0), x)
    rest = {name: part for name, part in variables.items() if name != "params"}
    return lambda p, x: module.apply({"params": p, **rest}, x), variables["params"]


def linen_convnet():
    nn = library("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3), strides=2)(x))
            return nn.Dense(2)(nn.avg_pool(jax.nn.relu(x), (2, 2)).reshape(len(x), -1))

    x = inputs(8, 8, 2)
    f, p = linen(Net(), x)
    layers = {"Conv_0.kernel": (4, 19), "BatchNorm_0.scale": (4, 2, 1), "Dense_0.kernel": (2, 37)}
    return f, p, x, layers, []


def linen_transformer():
    nn = library("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
            return x + nn.Dense(4)(nn.gelu(nn.Dense(6)(nn.RMSNorm()(x)))), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = nn.Embed(7, 4)
            blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return table.attend(nn.LayerNorm()(blocks()(table(x), None)[0]))

    x = tokens(3, 7)
    f, p = linen(Net(), x)
    layers = {"Embed_0.embedding": (4, 7), "LayerNorm_0.scale": (4, 2, 1)}
    layers |= {f"{name}.kernel": (2, 4, 5) for name in ("query", "key", "value", "out")}
    layers |= {"Dense_0.kernel": (2, 4, 7), "Dense_1.kernel": (2, 6, 5)}
    layers |= {"Block_0.LayerNorm_0.scale": (2, 4, 2, 1), "RMSNorm_0.scale": (2, 4, 1, 1)}
    return f, p, x, layers, []


def nnx_network():
    nnx = library("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(2, 3, (3,), rngs=rngs)
            self.norm = nnx.GroupNorm(3, num_groups=1, rngs=rngs)
            self.linear = nnx.LinearGeneral((5, 3), 2, axis=(-2, -1), rngs=rngs)

        def __call__(self, x):
            return self.linear(jax.nn.relu(self.norm(self.conv(x))))

    graph, p = nnx.split(Net(nnx.Rngs(0)))
    layers = {"conv.kernel": (3, 7), "norm.scale": (3, 2, 1), "linear.kernel": (2, 16)}
    return lambda p, x: nnx.merge(graph, p)(x), p, inputs(5, 2), layers, []


def nnx_transformer():
    nnx = library("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 4, rngs=rngs)
            self.places = nnx.Embed(3, 4, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
            self.norm = nnx.LayerNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 7, rngs=rngs)

        def __call__(self, x):
            x = self.embed(x) + self.places(jnp.arange(x.shape[1]))
            return self.head(self.norm(x + self.attention(x)))

    graph, p = nnx.split(Net(nnx.Rngs(0)))
    layers = {f"attention.{name}.kernel": (4, 5) for name in ("query", "key", "value", "out")}
    layers |= {"embed.embedding": (4, 7), "places.embedding": (4, 3), "norm.scale": (4, 2, 1), "head.kernel": (7, 5)}
    return lambda p, x: nnx.merge(graph, p)(x), p, tokens(3, 7), layers, []


def haiku_mlp():
    hk = library("haiku")
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([5, 2])(hk.LayerNorm(-1, True, True)(x))))
    x = inputs(3)
    layers = {"linear_0.w": (5, 4), "linear_1.w": (2, 6), "layer_norm.scale": (3, 2, 1)}
    return net.apply, net.init(jax.random.key(0), x), x, layers, []


def haiku_lstm():
    hk = library("haiku")

    def unrolled(x):
        core = hk.LSTM(4)
        return hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)[0]

    net, x = hk.without_apply_rng(hk.transform(unrolled)), inputs(5, 3)
    return net.apply, net.init(jax.random.key(0), x), x, {"linear.w": (16, 8)}, []


def equinox(module):
    eqx = library("equinox")
    p, static = eqx.partition(module, eqx.is_inexact_array)
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), p


def equinox_mlp():
    eqx = library("equinox")
    f, p = equinox(eqx.nn.MLP(3, 2, 5, 2, key=jax.random.key(0)))
    return f, p, inputs(3), {"layers.0.weight": (5, 4), "layers.1.weight": (5, 6), "layers.2.weight": (2, 6)}, []


def equinox_convnet():
    eqx = library("equinox")
    keys = jax.random.split(jax.random.key(0), 2)
    convolution, linear = eqx.nn.Conv2d(2, 3, 3, key=keys[0]), eqx.nn.Linear(3 * 16, 2, key=keys[1])
    net = eqx.nn.Sequential([convolution, eqx.nn.LayerNorm((3, 4, 4)), eqx.nn.Lambda(jnp.ravel), linear])
    f, p = equinox(net)
    layers = {"layers.0.weight": (3, 19), "layers.1.weight": (48, 2, 1), "layers.3.weight": (2, 49)}
    return f, p, inputs(2, 6, 6), layers, []


def equinox_language():
    eqx = library("equinox")
    table = eqx.nn.Embedding(7, 3, key=jax.random.key(0))
    head = eqx.nn.Linear(3, 7, use_bias=False, key=jax.random.key(1))
    tied = eqx.nn.Shared((table, head), lambda pair: pair[1].weight, lambda pair: pair[0].weight)

    def one(tied, i):
        table, head = tied()
        return head(jnp.tanh(table(i)))

    p, static = eqx.partition(tied, eqx.is_inexact_array)
    f = lambda p, x: jax.vmap(jax.vmap(lambda i: one(eqx.combine(p, static), i)))(x)  # noqa: E731
    return f, p, tokens(2, 7), {"pytree.0.weight": (3, 7)}, []


MODELS = [
    mlp,
    tied,
    reused,
    tied_table,
    convolutions,
    a_convolution_turned,
    recurrent,
    scanned_layers,
    rematerialised,
    nested_jit,
]
MODELS += [an_example_at_a_time, an_index_at_a_time, attention, composed_weights, branches_and_loops, rules_of_ones_own]
MODELS += [linen_convnet, linen_transformer, nnx_network, nnx_transformer, haiku_mlp, haiku_lstm]
MODELS += [equinox_mlp, equinox_convnet, equinox_language]
