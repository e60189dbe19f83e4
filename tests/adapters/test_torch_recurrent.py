"""Recurrent layers step by step against the modules themselves: outputs, gradients and what is seen of the maps."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, jvp
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence
from torch.utils._pytree import tree_leaves

from kfaclinalg_torch._recurrent import forward, maps

N, T, FEATURES, HIDDEN = 3, 5, 4, 6

CLASSES = {
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 2}),
}
CELLS = {
    "tanh cell": (nn.RNNCell, {}),
    "relu cell": (nn.RNNCell, {"nonlinearity": "relu"}),
    "gru cell": (nn.GRUCell, {}),
    "lstm cell": (nn.LSTMCell, {}),
}
OPTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "layers": {"num_layers": 3},
    "both": {"bidirectional": True},
    "all": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False},
}
INPUTS = ["batch", "one", "packed", "unsorted"]

pytestmark = pytest.mark.usefixtures("double")


def layer(kind, **options):
    torch.manual_seed(0)
    of, own = (CLASSES | CELLS)[kind]
    return of(FEATURES, HIDDEN, **own, **options)


def inputs(module, kind, hx):
    """Leaves that require gradients, and the arguments made of them."""
    torch.manual_seed(1)
    cell, batched = isinstance(module, nn.RNNCellBase), kind != "one"
    batch = (N,) if batched else ()
    places = () if cell else (len(list(maps(module))) // (3 if module.proj_size else 2),)
    if cell:
        leaves = [torch.randn(*batch, FEATURES)]
    elif kind in ("packed", "unsorted"):
        leaves = [torch.randn(n, FEATURES) for n in ((5, 3, 3) if kind == "packed" else (2, 5, 4))]
    elif batched and not module.batch_first:
        leaves = [torch.randn(T, N, FEATURES)]
    else:
        leaves = [torch.randn(*batch, T, FEATURES)]
    hidden = []
    if hx:
        lstm = isinstance(module, nn.LSTM | nn.LSTMCell)
        sizes = [getattr(module, "proj_size", 0) or HIDDEN, HIDDEN][: 1 + lstm]
        hidden = [torch.randn(*places, *batch, n) for n in sizes]
    leaves = [x.requires_grad_() for x in leaves]
    hidden = [h.requires_grad_() for h in hidden]
    x = pack_sequence(leaves, enforce_sorted=kind == "packed") if kind in ("packed", "unsorted") else leaves[0]
    state = (hidden[0] if len(hidden) == 1 else tuple(hidden)) if hidden else None
    return leaves + hidden, x, state


def floats(outputs):
    return [y for y in tree_leaves(outputs) if isinstance(y, torch.Tensor) and y.is_floating_point()]


def loss_of(outputs):
    """It depends on every output in a way of its own."""
    generator = torch.Generator().manual_seed(2)
    return sum((y * torch.randn(y.shape, generator=generator)).sin().sum() for y in floats(outputs))


def blind(*seen):
    pass


def assert_equal(come, expected, tolerance=1e-12):
    assert len(come) == len(expected)
    for a, b in zip(come, expected, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same(module, kind, hx=True, see=blind):
    """Outputs, and the gradients of parameters, inputs and first states."""
    runs = []
    for run in (module, lambda *args: forward(module, see, *args)):
        leaves, x, state = inputs(module, kind, hx)
        torch.manual_seed(3)
        outputs = run(x, state)
        gradients = torch.autograd.grad(loss_of(outputs), [*module.parameters(), *leaves])
        runs.append((outputs, gradients, torch.rand(1)))
    (expected, *wanted), (come, *got) = runs
    assert type(come) is type(expected)
    if isinstance(expected, tuple) and isinstance(expected[0], PackedSequence):
        for a, b in zip(come[0][1:], expected[0][1:], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)
    assert_equal(floats(come), floats(expected))
    assert_equal(got[0], wanted[0], 1e-11)
    return got[1], wanted[1]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("hx", [False, True])
def test_a_layer_gives_the_same(kind, options, given, hx):
    assert_same(layer(kind, **OPTIONS[options]), given, hx)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("given", ["batch", "one"])
@pytest.mark.parametrize("hx", [False, True])
def test_a_cell_gives_the_same(kind, bias, given, hx):
    assert_same(layer(kind, bias=bias), given, hx)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize("training", [False, True])
def test_dropout_draws_the_same_numbers(kind, given, p, training):
    module = layer(kind, num_layers=3, bidirectional=True, batch_first=True, dropout=p).train(training)
    come, expected = assert_same(module, given)
    assert torch.equal(come, expected)  # what the generator draws next


@pytest.mark.parametrize(("kind", "given"), [*product(CLASSES, INPUTS), *product(CELLS, ["batch", "one"])])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("target", ["all", "parameters", "weights"])
def test_what_is_seen_makes_the_gradients(kind, given, bias, target):
    """Whichever gradients are asked for, each s has one, all steps in it at once."""
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True} if kind in CLASSES else {}
    module = layer(kind, bias=bias, **options)
    seen, arrived = {}, {}

    def see(suffix, x, s, mask):
        assert suffix not in seen
        seen[suffix] = (x.detach(), get_gradient_edge(s), mask)
        s.register_hook(lambda g: arrived.setdefault(suffix, []).append(g))

    leaves, x, state = inputs(module, given, hx=True)
    loss = loss_of(forward(module, see, x, state))
    names = dict(module.named_parameters())
    if target == "weights":
        names = {name: p for name, p in names.items() if name.startswith("weight")}
    wanted = [*names.values(), *(leaves if target == "all" else [])]
    expected = dict(zip(names, torch.autograd.grad(loss, wanted, retain_graph=True), strict=False))
    assert list(seen) == list(maps(module))
    at_edges = torch.autograd.grad(loss, [edge for _, edge, _ in seen.values()])
    for (suffix, (a, _, mask)), g in zip(seen.items(), at_edges, strict=True):
        assert len(arrived[suffix]) == 2  # one for each of the two calls above
        assert torch.equal(arrived[suffix][0], g)
        W = getattr(module, f"weight_{suffix}")
        steps = () if kind in CELLS else (T,)
        assert a.shape == (1 if given == "one" else N, *steps, W.shape[1])
        assert g.shape == (*a.shape[:-1], W.shape[0])
        torch.testing.assert_close(g.flatten(0, -2).mT @ a.flatten(0, -2), expected[f"weight_{suffix}"])
        if f"bias_{suffix}" in expected:
            torch.testing.assert_close(g.flatten(0, -2).sum(0), expected[f"bias_{suffix}"])
        if given not in ("packed", "unsorted"):
            assert mask is None
            continue
        assert mask.sum(1).tolist() == ([5, 3, 3] if given == "packed" else [2, 5, 4])
        assert not a[~mask].any()
        assert not g[~mask].any()
        if suffix == "ih_l0":
            assert torch.equal(a[mask], torch.cat(leaves[:N]))


@pytest.mark.parametrize("kind", [*CLASSES, *CELLS])
def test_forward_mode_is_the_transpose_of_reverse_mode(kind):
    """⟨u, J d⟩ of this forward pass against ⟨Jᵀ u, d⟩ of the module's own."""
    options = {"num_layers": 2, "bidirectional": True} if kind in CLASSES else {}
    module = layer(kind, **options)
    _, x, state = inputs(module, "unsorted" if kind in CLASSES else "batch", hx=False)
    x = x._replace(data=x.data.detach()) if isinstance(x, PackedSequence) else x.detach()
    weights = {name: p.detach() for name, p in module.named_parameters()}
    d = {name: torch.randn_like(p) for name, p in weights.items()}

    class Stepwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self):
            return forward(self.inner, blind, x, hx=state)

    def ours(weights):
        inner = {f"inner.{name}": w for name, w in weights.items()}
        return torch.cat([y.flatten() for y in floats(functional_call(Stepwise(), inner, ()))])

    outputs, pushed = jvp(ours, (weights,), (d,))
    assert not pushed.requires_grad
    expected = torch.cat([y.flatten() for y in floats(module(x, state))])
    u = torch.randn_like(outputs)
    pulled = torch.autograd.grad(expected, list(module.parameters()), u)
    assert_equal([outputs], [expected.detach()])
    assert_equal([u @ pushed], [sum((g * v).sum() for g, v in zip(pulled, d.values(), strict=True))], 1e-10)


def test_the_input_can_be_a_keyword():
    module = layer("gru")
    _, x, state = inputs(module, "batch", hx=True)
    assert_equal(floats(forward(module, blind, input=x, hx=state)), floats(module(x, state)))


def test_weights_frozen_or_not_need_the_same_gradients():
    """Without any, nothing does; with one, the map of it is still seen."""
    module = layer("projected", bias=False).requires_grad_(False)
    x, seen = torch.randn(T, N, FEATURES), {}
    forward(module, lambda suffix, x, s, mask: seen.update({suffix: s.requires_grad}), x)
    assert seen == {"ih_l0": False, "hh_l0": False, "hr_l0": False}
    assert not any(y.requires_grad for y in floats(forward(module, blind, x)))
    module.weight_hr_l0.requires_grad_()
    forward(module, lambda suffix, x, s, mask: seen.update({suffix: s.requires_grad}), x)
    assert seen == {"ih_l0": False, "hh_l0": False, "hr_l0": True}


def test_infinite_weights_do_not_spoil_other_gradients():
    """What lets s depend on the weight is no product with it."""
    module = layer("tanh", bias=False)
    with torch.no_grad():
        module.weight_hh_l0[0, 0] = torch.inf
    s = {}
    forward(module, lambda suffix, x, at, mask: s.update({suffix: at}), torch.randn(1, N, FEATURES))
    assert not s["hh_l0"].any()


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [*CLASSES, *CELLS])
def test_other_dtypes(kind, dtype):
    module = layer(kind).to(dtype)
    x = torch.randn(*(() if kind in CELLS else (T,)), N, FEATURES, dtype=dtype)
    come, expected = floats(forward(module, blind, x)), floats(module(x))
    assert_equal(come, expected, 8 * torch.finfo(dtype).eps)


def test_long_sequences_cost_as_many_operations_a_step():
    """In the graph of autograd, whose nodes the steps make."""

    def nodes(T):
        found, stack = set(), [loss_of(forward(layer("lstm"), blind, torch.randn(T, N, FEATURES))).grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in found:
                found.add(node)
                stack += [parent for parent, _ in node.next_functions]
        return len(found)

    assert nodes(30) - nodes(20) == nodes(20) - nodes(10)


@pytest.mark.parametrize("kind", [*CLASSES, *CELLS])
def test_what_does_not_fit_raises_as_the_module_does(kind):
    module, cell = layer(kind), kind in CELLS
    lstm = "lstm" in kind or kind == "projected"
    x = torch.randn(*(() if cell else (T,)), N, FEATURES)

    def state(*shape):
        h = torch.randn(shape)
        return (h, h) if lstm else h

    wrong = [
        (x[..., :-1],),
        (x.float(),),
        (torch.randn(2, 2, 2, FEATURES),),
        (x, state(*(() if cell else (1,)), N + 1, HIDDEN)),
        (x, state(*(() if cell else (1,)), N, HIDDEN + 1)),
        (x, state(2, 1, N, HIDDEN)),
    ]
    if not cell:
        wrong += [
            (x[:0],),
            (torch.randn(FEATURES),),
            (x[:, 0], state(1, 1, HIDDEN)),
            (pack_padded_sequence(x, [T] * N), state(1, N + 1, HIDDEN)),
            (pack_padded_sequence(x[..., :-1], [T] * N),),
        ]
    for args in wrong:
        with pytest.raises((RuntimeError, ValueError)) as expected:
            module(*args)
        with pytest.raises(type(expected.value)) as come:
            forward(module, blind, *args)
        assert str(come.value) == str(expected.value)
