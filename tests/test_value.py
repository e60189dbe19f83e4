"""Operators as values: repr, pickle, pytrees, and the way between dtypes, devices, namespaces and SciPy."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import warnings
from typing import Any, NamedTuple

import array_api_compat
import array_api_strict
import jax
import numpy as np
import pytest
import torch
from backends import EAGER, JAX, NUMPY, TORCH, eager_backends, uncompiled_backends
from scipy.sparse.linalg import cg, eigsh, lsqr

from kfaclinalg import _backends, _checks
from kfaclinalg._backends.pytrees import _pending
from kfaclinalg._value import Value, as_scipy_on_matrices, as_scipy_on_vectors, linear_operator, value


class Moments(NamedTuple):
    A: Any
    G: Any


@value
class Product(Value):
    """V -> B V Aᵀ, with the fields and checks of `Kronecker`."""

    A: Any
    B: Any

    as_scipy = as_scipy_on_matrices

    def __post_init__(self) -> None:
        _backends.resolve(A=self.A, B=self.B)
        _checks.check_square(A=self.A, B=self.B)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.B.shape[-1], self.A.shape[-1])

    def __matmul__(self, V: Any) -> Any:
        return self.B @ V @ self.A.mT


@value
class Network(Value):
    """Operators side by side, and what else a field may hold."""

    blocks: tuple[Any, ...]
    links: tuple[Moments, ...] = ()

    def apply(self, Vs: Any) -> tuple[Any, ...]:
        return tuple(block @ V for block, V in zip(self.blocks, Vs, strict=True))

    def as_scipy(self) -> Any:
        return linear_operator(self, [block.shape for block in self.blocks], self.apply)


@value
class Scaling:
    """X -> diag(d) X."""

    d: Any

    as_scipy = as_scipy_on_vectors

    @property
    def shape(self) -> tuple[int, int]:
        return (self.d.shape[-1], self.d.shape[-1])

    def __matmul__(self, X: Any) -> Any:
        return self.d[..., :, None] * X


def product(b=NUMPY, *, batch=(), seed=0):
    rng = np.random.default_rng(seed)
    return Product(b.array(rng.standard_normal((*batch, 3, 3))), b.array(rng.standard_normal((*batch, 2, 2))))


def network(b=NUMPY):
    return Network((product(b), product(b, seed=1)), (Moments(b.array(np.ones((3, 3))), b.array(np.ones((2, 2)))),))


def arrays(x):
    return jax.tree_util.tree_leaves(x)


def assert_same(x, y):
    assert type(x) is type(y)
    for mine, theirs in zip(arrays(x), arrays(y), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


# --- a value


def test_it_is_frozen_and_equal_to_itself_alone():
    P = product()
    with pytest.raises(AttributeError):
        P.A = np.eye(3)
    with pytest.raises((AttributeError, TypeError)):
        P.other = 1
    assert [P].count(P) == 1
    assert Product(P.A, P.B) != P
    assert len({P, P, Product(P.A, P.B)}) == 2


def test_the_checks_of_the_class_run():
    with pytest.raises(ValueError, match=r"A has shape \(2, 3\)"):
        Product(np.ones((2, 3)), np.eye(2))
    with pytest.raises(TypeError, match="missing 1 required"):
        Product(np.eye(2))


def test_repr_shows_shapes():
    assert repr(product()) == "Product(A: (3, 3), B: (2, 2), float64, cpu)"
    assert repr(product(TORCH, batch=(5,))) == "Product(A: (5, 3, 3), B: (5, 2, 2), float64, cpu)"
    inner = "Product(A: (3, 3), B: (2, 2))"
    links = "links: (Moments(A: (3, 3), G: (2, 2)))"
    assert repr(network()) == f"Network(blocks: ({inner}, {inner}), {links}, float64, cpu)"
    assert repr(Network((product(),) * 12)).startswith(f"Network(blocks: ({inner}, {inner}, {inner}, ... 9 more), ")


def test_repr_takes_what_transformations_put_in_place_of_arrays():
    P = product()
    assert repr(jax.tree_util.tree_map(lambda _: None, P)) == "Product(A: NoneType, B: NoneType)"
    assert repr(jax.tree_util.tree_map(lambda _: 0, P)) == "Product(A: int, B: int)"
    assert repr(jax.eval_shape(lambda P: P, product(JAX[0]))) == "Product(A: (3, 3), B: (2, 2), float64)"
    seen = []
    jax.jit(lambda P: seen.append(repr(P)))(product(JAX[0]))
    torch.func.vmap(lambda P: (seen.append(repr(P)), P)[1])(product(TORCH, batch=(5,)))
    assert seen == ["Product(A: (3, 3), B: (2, 2), float64)", "Product(A: (3, 3), B: (2, 2), float64, cpu)"]
    graph = torch.fx.Graph()
    proxy = torch.fx.Proxy(graph.placeholder("A"))
    assert repr(Product(proxy, proxy)) == "Product(A: Proxy, B: Proxy)"
    assert len(graph.nodes) == 1


def test_repr_reads_no_value():
    meta = Product(torch.ones(3, 3, device="meta"), torch.ones(2, 2, device="meta"))
    assert repr(meta) == "Product(A: (3, 3), B: (2, 2), float32, meta)"


@pytest.mark.parametrize("array", [np.eye(2), torch.eye(2), jax.numpy.eye(2)], ids=["numpy", "torch", "jax"])
def test_an_array_on_the_left_is_refused(array):
    with pytest.raises(TypeError):
        array @ product()


@pytest.mark.parametrize("b", [*EAGER, JAX[0]], ids=str)
@pytest.mark.parametrize("travel", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy])
def test_pickle_and_copy(b, travel):
    there = travel(network(b))
    assert repr(there) == repr(network(b))
    for x, y in zip(arrays(there), arrays(network(b)), strict=True):
        np.testing.assert_array_equal(b.read(x), b.read(y))


# --- transformations


def test_jax_takes_and_returns_values():
    b = JAX[0]
    P, N, V = product(b), network(b), b.array(np.arange(6.0).reshape(2, 3))
    np.testing.assert_allclose(jax.jit(lambda P, V: P @ V)(P, V), P @ V)
    assert_same(jax.jit(lambda N: N)(N), N)
    assert_same(jax.tree_util.tree_map(lambda x: 2 * x, P), Product(2 * P.A, 2 * P.B))
    gradient = jax.grad(lambda P: jax.numpy.sum(P @ V))(P)
    assert isinstance(gradient, Product)
    np.testing.assert_allclose(gradient.A, (b.array(np.ones((2, 3))).mT @ (P.B @ V)), rtol=1e-12)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(N)[0]]
    assert paths[:2] == [".blocks[0].A", ".blocks[0].B"]


def test_jax_vmap_takes_axes_as_a_number_or_as_a_value():
    b = JAX[0]
    stacked, V = product(b, batch=(4,)), b.array(np.ones((2, 3)))
    mapped = jax.vmap(lambda P: P @ V)(stacked)
    np.testing.assert_allclose(mapped, stacked @ V)
    half = Product(stacked.A, stacked.B[0])
    axes = jax.tree_util.tree_map_with_path(lambda path, _: 0 if path[0].name == "A" else None, half)
    np.testing.assert_allclose(jax.vmap(lambda P: P @ V, in_axes=(axes,))(half), half @ V)
    out = jax.vmap(lambda P: P, in_axes=(axes,), out_axes=0)(half)
    assert repr(out).startswith("Product(A: (4, 3, 3), B: (4, 2, 2), ")


def test_torch_func_takes_and_returns_values():
    P, V = product(TORCH, batch=(4,)), TORCH.array(np.ones((2, 3)))
    torch.testing.assert_close(torch.func.vmap(lambda P: P @ V)(P), P @ V)
    doubled = torch.func.vmap(lambda P: Product(2 * P.A, P.B))(P)
    torch.testing.assert_close(doubled.A, 2 * P.A)
    single = product(TORCH)
    gradient = torch.func.grad(lambda P: (P @ V).sum())(single)
    torch.testing.assert_close(gradient.A, torch.ones_like(V).mT @ (single.B @ V))
    leaves, spec = torch.utils._pytree.tree_flatten(network(TORCH))
    assert len(leaves) == 6
    assert_same(torch.utils._pytree.tree_unflatten(leaves, spec), network(TORCH))
    paths = [torch.utils._pytree.keystr(path) for path, _ in torch.utils._pytree.tree_flatten_with_path(single)[0]]
    assert paths == [".A", ".B"]


COMPILED = {
    "made inside": lambda A, B, V: Product(A, B) @ V,
    "returned": lambda A, B, V: Product(2 * A, B),
    "nested": lambda A, B, V: Network((Product(A, B), Product(A, B))).apply((V, V))[1],
    "vmap": lambda A, B, V: torch.func.vmap(lambda P, V: P @ V)(Product(A[None], B[None]), V[None]),
    "grad": lambda A, B, V: torch.func.grad(lambda P: (P @ V).sum())(Product(A, B)).A,
}


@pytest.mark.parametrize("f", COMPILED.values(), ids=COMPILED)
def test_torch_compile_takes_it_whole(f):
    P, V = product(TORCH), TORCH.array(np.ones((2, 3)))
    for got, expected in zip(arrays(compiled(f)(P.A, P.B, V)), arrays(f(P.A, P.B, V)), strict=True):
        torch.testing.assert_close(got, expected)


def test_torch_compile_takes_and_returns_values():
    P, V = product(TORCH), TORCH.array(np.ones((2, 3)))
    torch.testing.assert_close(compiled(lambda P, V: P @ V)(P, V), P @ V)
    returned = compiled(lambda P: Network((Product(2 * P.A, P.B),)))(P)
    assert repr(returned) == repr(Network((P,)))
    torch.testing.assert_close(returned.blocks[0].A, 2 * P.A)
    torch.testing.assert_close(compiled(lambda N, V: N.apply((V, V)))(network(TORCH), V)[0], P @ V)


def compiled(f):
    torch._dynamo.reset()

    def quietly(*args):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
            return torch.compile(f, fullgraph=True, backend="eager")(*args)

    return quietly


# --- registration


def in_a_new_process(code):
    body = """
        import sys, threading, pickle
        from typing import Any
        import numpy as np
        from kfaclinalg._value import value

        @value
        class D:
            d: Any

        def jitted(x):
            import jax
            return jax.jit(lambda x: x)(x)
    """
    script = textwrap.dedent(body) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_no_framework_is_imported():
    assert in_a_new_process("D(np.ones(2)); print('jax' in sys.modules, 'torch' in sys.modules)") == ["False", "False"]


@pytest.mark.parametrize(
    "code",
    [
        "import jax, torch; x = D(np.ones(2))",
        "D(np.ones(2)); import torch, jax; x = D(np.ones(2))",
        "import torch; D(np.ones(2)); import jax; x = D(np.ones(2)); x = D(x.d)",
        "x = pickle.dumps(D(np.ones(2))); import jax, torch; x = pickle.loads(x)",
        """
        import jax, torch
        threads = [threading.Thread(target=D, args=(np.ones(2),)) for _ in range(8)]
        [t.start() for t in threads]; [t.join() for t in threads]
        x = D(np.ones(2))
        """,
        # the first instance of all is made while Dynamo traces
        """
        import torch
        f = torch.compile(lambda d: D(2 * d).d, fullgraph=True, backend="eager")
        assert f(torch.ones(2))[0] == 2
        import jax
        x = D(np.ones(2))
        """,
    ],
)
def test_whatever_the_order_of_imports(code):
    check = "\nimport torch\nprint(type(jitted(x)).__name__, len(torch.utils._pytree.tree_leaves(x)))"
    assert in_a_new_process(textwrap.dedent(code) + check) == ["D", "1"]


def test_a_missing_framework_that_is_marked_as_such_is_let_be(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)

    @value
    class Late:
        d: Any

    Late(np.ones(2))
    assert Late in [cls for cls, _ in _pending["jax"]]
    monkeypatch.undo()
    Late(np.ones(2))
    assert not _pending["jax"]
    assert len(jax.tree_util.tree_leaves(Late(np.ones(2)))) == 1


def test_classes_made_at_once_are_each_registered_once():
    def make():
        @value
        class Local:
            d: Any

        made.append(Local(np.ones(2)))

    made: list[Any] = []
    threads = [threading.Thread(target=make) for _ in range(16)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert [len(jax.tree_util.tree_leaves(x)) for x in made] == [1] * 16


# --- conversions


@uncompiled_backends
def test_astype(b):
    there = network(b).astype(b.array(np.ones(1), "float32").dtype)
    assert ", float32" in repr(there)
    np.testing.assert_allclose(b.read(there.blocks[1].A), b.read(network(b).blocks[1].A), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", torch.float32, np.int64, np.float16, None])
def test_astype_takes_the_dtypes_of_the_namespace(dtype):
    with pytest.raises(TypeError, match=r"expected float32 or float64 of array_api_compat\.numpy"):
        product().astype(dtype)


def test_astype_does_not_settle_for_less():
    with jax.enable_x64(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        P = product(JAX[1])
        with pytest.raises(TypeError, match="jax_enable_x64"):
            P.astype(jax.numpy.float64)


def test_to_device():
    here, there = array_api_strict.Device("CPU_DEVICE"), array_api_strict.Device("device2")
    P = Product(*(array_api_strict.asarray(np.eye(n), device=here) for n in (3, 2)))
    assert P.to_device(there).A.device == there
    assert repr(network(TORCH).to_device("meta")).endswith("float64, meta)")
    assert product().to_device("cpu").A is not None
    with pytest.raises(ValueError, match="device"):
        product().to_device("cuda")


NAMESPACES = [np, torch, jax.numpy, array_api_strict, array_api_compat.array_namespace(torch.ones(1))]


@eager_backends
@pytest.mark.parametrize("xp", NAMESPACES, ids=lambda xp: xp.__name__)
def test_to_namespace(b, xp):
    N = network(b)
    if b.name.startswith("strict"):  # where its devices are, nobody else can reach
        N = N.to_device(array_api_strict.Device("CPU_DEVICE"))
    there = N.to_namespace(xp)
    like = array_api_compat.array_namespace(xp.ones(1))
    assert all(array_api_compat.array_namespace(x) is like for x in arrays(there))
    assert f", {b.dtype}, " in repr(there)
    np.testing.assert_array_equal(np.asarray(there.blocks[1].A), b.read(network(b).blocks[1].A))


AWKWARD = {
    "negative strides": np.arange(9.0).reshape(3, 3)[::-1, ::-1],
    "negative stride of a single row": np.arange(9.0).reshape(1, 3, 3)[::-1],
    "transposed": np.arange(9.0).reshape(3, 3).T,
    "every other": np.arange(36.0).reshape(6, 6)[::2, ::2],
    "broadcast": np.broadcast_to(np.arange(3.0), (3, 3)),
}


@pytest.mark.parametrize("xp", NAMESPACES[1:], ids=lambda xp: xp.__name__)
@pytest.mark.parametrize("x", AWKWARD.values(), ids=AWKWARD)
def test_no_layout_is_too_awkward(x, xp):
    for start in (np, array_api_strict):
        P = Product(start.asarray(x), start.asarray(x)).to_namespace(xp)
        np.testing.assert_array_equal(np.asarray(P.A), x)
    if xp is not torch:
        x = torch.asarray(np.arange(3.0)).expand(3, 3)
        np.testing.assert_array_equal(np.asarray(Product(x, x).to_namespace(xp).A), x)


@pytest.mark.parametrize("frozen", [True, False])
def test_neither_side_sees_what_is_written_to_the_other(frozen):
    A = np.eye(3)
    A.flags.writeable = not frozen
    there = Product(A, A).to_namespace(torch)
    there.A[0, 0] = 7
    assert A[0, 0] == 1
    x = jax.numpy.asarray(A)
    Product(x, x).to_namespace(torch).A[0, 0] = 7
    assert x[0, 0] == 1
    assert Product(A, A).to_namespace(np).A is A


def test_to_namespace_refuses():
    with pytest.raises(TypeError, match=r"xp is .*jax.*expected an array namespace"):
        product().to_namespace(jax)
    with pytest.raises(RuntimeError, match=r"requires? grad"):
        Product(torch.eye(3, requires_grad=True), torch.eye(2)).to_namespace(np)
    with jax.enable_x64(False), pytest.raises(TypeError, match=r"jax\.numpy made float32 of float64"):
        product().to_namespace(jax.numpy)
    with pytest.raises(ValueError, match="device type meta"):  # an array without values
        product(TORCH).to_device("meta").to_namespace(np)


def test_what_has_no_dlpack_goes_round_by_numpy():
    class Deaf:
        """torch, were it deaf to DLPack."""

        __name__ = "deaf"
        asarray = staticmethod(torch.asarray)

        @staticmethod
        def from_dlpack(x):
            raise BufferError("no")

    for b in (NUMPY, JAX[0]):
        np.testing.assert_array_equal(product(b).to_namespace(Deaf()).A, product().A)
    assert product().to_namespace(torch, device="meta").A.device.type == "meta"


# --- SciPy


def dense(blocks):
    sizes = [block.shape[0] * block.shape[1] for block in blocks]
    whole, start = np.zeros((sum(sizes), sum(sizes))), 0
    for block, size in zip(blocks, sizes, strict=True):
        whole[start : start + size, start : start + size] = np.kron(block.A, block.B)
        start += size
    return whole


@pytest.mark.parametrize("operator", [product(), network()], ids=["one matrix", "a tuple"])
def test_as_scipy_acts_on_stacked_columns(operator):
    whole = dense(getattr(operator, "blocks", (operator,)))
    F = operator.as_scipy()
    X = np.random.default_rng(0).standard_normal((len(whole), 4))
    assert F.shape == whole.shape
    assert F.dtype == np.float64
    for x in (X, X[:, 0], X[:, :1], X[:, :0], X.astype(np.float32), np.ones(len(whole), dtype=int)):
        for applied in (F @ x, F.H @ x):
            np.testing.assert_allclose(applied, whole @ x, rtol=1e-6 if x.dtype == np.float32 else 1e-12, atol=1e-12)
    with pytest.raises(TypeError, match="Cannot cast"):
        F @ (1j * X)


def test_as_scipy_on_vectors():
    d, X = np.arange(1.0, 4.0), np.random.default_rng(0).standard_normal((3, 5))
    for x in (X, X[:, 0]):
        np.testing.assert_allclose(Scaling(d).as_scipy() @ x, np.diag(d) @ x)
    with pytest.raises(ValueError, match="got a batch"):
        Scaling(np.ones((2, 3))).as_scipy()


def test_as_scipy_serves_its_solvers():
    x = np.random.default_rng(0).standard_normal((2, 3, 3))
    P = Product(x[0] @ x[0].T + np.eye(3), x[1] @ x[1].T + np.eye(3))
    v = np.arange(9.0)
    inverse_v = np.linalg.solve(dense([P]), v)
    np.testing.assert_allclose(cg(P.as_scipy(), v, rtol=1e-12)[0], inverse_v, rtol=1e-8)
    largest = eigsh(P.as_scipy(), k=1, return_eigenvectors=False)
    np.testing.assert_allclose(largest, np.linalg.eigvalsh(dense([P]))[-1], rtol=1e-10)
    np.testing.assert_allclose(lsqr(P.as_scipy(), v, atol=1e-14, btol=1e-14, iter_lim=200)[0], inverse_v, rtol=1e-8)
    assert (P.astype(np.float32).as_scipy() @ v).dtype == np.float32


def test_as_scipy_refuses():
    with pytest.raises(TypeError, match=r"SciPy takes NumPy arrays, got Product\("):
        product(TORCH).as_scipy()
    for batch in ((4,), (1,)):
        with pytest.raises(ValueError, match="SciPy takes one operator, got a batch"):
            product(batch=batch).as_scipy()
