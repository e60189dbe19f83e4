"""The dense float64 factors of a model and what `step()` must make of them.

The reference shares no code with the adapter. A twin of the model has a perturbation added to the output of each
module: the Jacobian of the network's outputs with respect to it, an example at a time, gives g; a is the module's
response to unit weights. Examples that depend on each other (batch normalisation in training) stay together.
"""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backends import TORCH
from layer_rows import ROWS, HandAttention
from matrices import judge
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from kfaclinalg import Diagonal, LayerFactors
from kfaclinalg_torch import Empirical, KFACPreconditioner

DAMPING = 0.05
EPS = float(np.finfo(float).eps)
LIKELIHOODS = ("gaussian", "bernoulli", "categorical")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TRANSPOSED = CONVOLUTIONS[3:]
CHANNELS_LAST = (nn.LayerNorm, nn.RMSNorm)
SCALES = (*CHANNELS_LAST, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
every_likelihood = pytest.mark.parametrize("likelihood", LIKELIHOODS)
both_sharings = pytest.mark.parametrize("sharing", ["expand", "reduce"])


# -- losses and targets, by hand --


def losses(likelihood: str, z: Tensor, y: Tensor) -> Tensor:
    """Minus the log likelihood of each example (N,)."""
    if likelihood == "gaussian":
        each = (z - y) ** 2 / 2
    elif likelihood == "bernoulli":
        each = torch.log1p(torch.exp(z)) - y * z
    else:
        each = torch.log(torch.exp(z).sum(-1)) - (z * functional.one_hot(y, z.shape[-1])).sum(-1)
    return each.flatten(1).sum(1) if each.ndim > 1 else each


def targets_for(likelihood: str, z: Tensor) -> Tensor:
    if likelihood == "categorical":
        return torch.randint(z.shape[-1], z.shape[:-1])
    return torch.randn(z.shape) if likelihood == "gaussian" else torch.rand(z.shape).round()


# -- the reference --


class Seen(NamedTuple):
    """Of one example: a (R, groups, n) and the Jacobians g (D, R, groups, m) of each block, and the D x D curvature."""

    a: dict[str, Tensor]
    g: dict[str, Tensor]
    F: Tensor


def twin(model: nn.Module) -> nn.Module:
    """A copy with attention written out."""
    copy = deepcopy(model)
    for name, module in list(copy.named_children()):
        if isinstance(module, nn.MultiheadAttention):
            setattr(copy, name, HandAttention(module))
    return copy


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))}


def perturbed(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
    """The outputs, and of each use of a module its name, inputs and the zero that was added to its outputs."""
    uses: list[tuple[str, Tensor, Tensor]] = []

    def hook(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        zero = torch.zeros_like(output, requires_grad=True)
        uses.append((name, inputs[0].detach(), zero))
        return output + zero

    handles = [module.register_forward_hook(partial(hook, name)) for name, module in leaves(model).items()]
    z = model(*args)
    for handle in handles:
        handle.remove()
    return z, uses


def seen(model: nn.Module, args: tuple[Tensor, ...], likelihood: str, y: Tensor | None = None) -> list[Seen]:
    """One at a time; with targets the curvature is that of the one gradient of the loss."""
    return [
        _seen(model, tuple(x[n : n + 1] for x in args), likelihood, None if y is None else y[n : n + 1])
        for n in range(len(args[0]))
    ]


def _seen(model: nn.Module, args: tuple[Tensor, ...], likelihood: str, y: Tensor | None) -> Seen:
    z, uses = perturbed(model, args)
    flat, point = z.flatten(), z.detach()
    columns = [torch.autograd.grad(entry, [zero for *_, zero in uses], retain_graph=True) for entry in flat]
    slopes = [torch.stack(column) for column in zip(*columns, strict=True)]
    target = targets_for(likelihood, point) if y is None else y

    def loss(v: Tensor) -> Tensor:
        return losses(likelihood, v.reshape(z.shape), target).sum()

    v = point.flatten().requires_grad_()
    if y is None:
        (e,) = torch.autograd.grad(loss(v), v, create_graph=True)
        F = torch.stack(
            [torch.autograd.grad(entry, v, retain_graph=True)[0] for entry in e]
        )  # the same for all targets
    else:
        (e,) = torch.autograd.grad(loss(v), v)
        F = torch.outer(e, e)
    a, g = blocks_of(model, uses, slopes, 1)
    return Seen({k: v[0] for k, v in a.items()}, {k: v[:, 0] for k, v in g.items()}, F)


def seen_together(model: nn.Module, args: tuple[Tensor, ...], likelihood: str, y: Tensor) -> list[Seen]:
    """The same from the gradient of the sum over the batch, whose examples depend on each other."""
    z, uses = perturbed(model, args)
    slopes = torch.autograd.grad(losses(likelihood, z, y).sum(), [zero for *_, zero in uses])
    a, g = blocks_of(model, uses, [s[None] for s in slopes], len(y))
    return [
        Seen({k: v[n] for k, v in a.items()}, {k: v[:, n] for k, v in g.items()}, torch.ones(1, 1))
        for n in range(len(y))
    ]


def blocks_of(model: nn.Module, uses: list[Any], slopes: list[Tensor], n: int) -> tuple[dict[str, Tensor], ...]:
    """a (n, R, groups, width) and g (D, n, R, groups, m) of each block, the positions of all its uses together."""
    a: dict[str, list[Tensor]] = {}
    g: dict[str, list[Tensor]] = {}
    tied = tied_weights(model)
    for (name, x, _), slope in zip(uses, slopes, strict=True):
        module = leaves(model)[name]
        if isinstance(module, SCALES):
            a.setdefault(name, []).append(torch.ones(n, 1, module.weight.numel(), 1))
            g.setdefault(name, []).append(scale_slopes(module, x, slope, n))
            continue
        rows = inputs_of(module, x)
        rows, outer = rows.reshape(n, -1, *rows.shape[-2:]), outputs_of(module, x, slope)
        outer = outer.reshape(len(slope), n, -1, *outer.shape[-2:])
        ones = torch.ones(*rows.shape[:-1], 1)
        has_bias = getattr(module, "bias", None) is not None and module.bias.requires_grad
        if has_bias and id(module.weight) in tied:
            a.setdefault(f"{name}.bias", []).append(ones)
            g.setdefault(f"{name}.bias", []).append(outer)
        elif has_bias:
            rows = torch.cat([rows, ones], -1)
        a.setdefault(name, []).append(rows)
        g.setdefault(name, []).append(outer)
    return {k: torch.cat(v, 1) for k, v in a.items()}, {k: torch.cat(v, 2) for k, v in g.items()}


def tied_weights(model: nn.Module) -> set[int]:
    weights = [id(getattr(m, "weight", m)) for m in leaves(model).values()]
    return {w for w in weights if weights.count(w) > 1}


def inputs_of(module: nn.Module, x: Tensor) -> Tensor:
    """(..., groups, n): what the module's outputs are linear in, the weights being given."""
    if isinstance(module, nn.Linear):
        return x[..., None, :]
    if isinstance(module, nn.Embedding):
        a = functional.one_hot(x, module.num_embeddings).to(torch.get_default_dtype())
        return (a if module.padding_idx is None else a * (x != module.padding_idx)[..., None])[..., None, :]
    return torch.stack(list(responses(module, x)), -1)


def responses(module: Any, x: Tensor) -> Iterator[Tensor]:
    """(N, *positions, groups) for each entry of the kernel: the outputs where that is 1 and everything else 0."""
    groups, transposed = module.groups, isinstance(module, TRANSPOSED)
    entries = torch.eye(module.in_channels // groups * prod(module.kernel_size))
    for unit in entries.reshape(len(entries), -1, *module.kernel_size):
        # In W = [..., kernel back to front] a transposed convolution is one.
        kernel = unit.flip(*range(1, unit.ndim)) if transposed else unit
        copies = kernel.repeat(groups, *[1] * len(module.kernel_size)) if transposed else kernel
        weight = copies.unsqueeze(1 if transposed else 0).expand_as(module.weight)
        parameters = {"weight": weight.contiguous()} | (
            {} if module.bias is None else {"bias": 0 * module.bias.detach()}
        )
        s = functional_call(module, parameters, (x,))
        yield s[:, :: module.out_channels // groups].movedim(1, -1)


def outputs_of(module: Any, x: Tensor, g: Tensor) -> Tensor:
    """(D, ..., groups, m); zero at the padding of an embedding, where a is."""
    if isinstance(module, CONVOLUTIONS):
        return g.movedim(2, -1).unflatten(-1, (module.groups, -1))
    if getattr(module, "padding_idx", None) is not None:
        g = g * (x != module.padding_idx)[..., None]
    return g[..., None, :]


def scale_slopes(module: Any, x: Tensor, g: Tensor, n: int) -> Tensor:
    """(D, n, 1, channels, 1 or 2): the Jacobians of the scale and the shift."""
    given = dict(module.named_parameters())
    unit = {"weight": torch.ones_like(given["weight"])}
    unit |= {"bias": torch.zeros_like(given["bias"])} if "bias" in given else {}
    x_hat = functional_call(deepcopy(module), unit, (x,)).detach()
    parts = [g * x_hat, g][: len(given)]
    if isinstance(module, CHANNELS_LAST):
        parts = [p.reshape(len(g), n, -1, module.weight.numel()).sum(2) for p in parts]
    else:
        parts = [p.reshape(len(g), n, -1, p.shape[2], prod(p.shape[3:])).sum((2, 4)) for p in parts]
    return torch.stack(parts, -1)[:, :, None]


def moments(examples: list[Seen], sharing: str | dict[str, str] = "expand") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A and G (groups, ., .) of each block by the formulas of its setting."""
    found = {}
    for name in examples[0].a:
        setting = sharing if isinstance(sharing, str) else sharing.get(name, "expand")
        a, g = ([getattr(example, side)[name] for example in examples] for side in "ag")
        if setting == "reduce":
            a, g = [x.mean(0, keepdim=True) for x in a], [x.sum(1, keepdim=True) for x in g]
        rows = sum(len(x) for x in a)
        A = sum(torch.einsum("rgi,rgj->gij", x, x) for x in a) / rows
        G = sum(torch.einsum("drgi,de,ergj->gij", x, e.F, x) for x, e in zip(g, examples, strict=True)) / len(g)
        found[name] = (A.numpy(), G.numpy())
    return found


def gradient(model: nn.Module, name: str, like: Callable[[Tensor], Tensor] = lambda p: p.grad) -> np.ndarray:
    """W (groups, m, n) of the block of this name."""
    parts = dict(model.named_modules())
    parent, _, last = name.rpartition(".")
    if last in ("q_proj", "k_proj", "v_proj") and isinstance(parts[parent], nn.MultiheadAttention):
        E, i = parts[parent].embed_dim, ("q_proj", "k_proj", "v_proj").index(last)
        tensors = [like(p)[i * E : (i + 1) * E] for p in parts[parent].parameters(recurse=False)]
        return torch.cat([t.reshape(E, -1) for t in tensors], 1)[None].detach().numpy()
    if last == "bias" and name not in parts:
        return like(parts[parent].bias)[None, :, None].detach().numpy()
    module: Any = parts[name]
    weight, bias = like(module.weight).detach(), getattr(module, "bias", None)
    bias = None if bias is None or not bias.requires_grad else like(bias).detach()
    if isinstance(module, nn.Embedding):
        return weight.T[None].numpy()
    if isinstance(module, SCALES):
        return torch.stack([t.flatten() for t in (weight, bias) if t is not None], 1)[..., None].numpy()
    g = getattr(module, "groups", 1)
    if isinstance(module, TRANSPOSED):
        weight = weight.reshape(g, -1, *weight.shape[1:]).transpose(1, 2)
        weight = weight.flip(*range(3, weight.ndim))
    W = weight.reshape(g, -1 if g == 1 else module.out_channels // g, prod(weight.shape) // module_outputs(module))
    if bias is None or id(module.weight) in tied_weights(model):
        return W.numpy()
    return torch.cat([W, bias.reshape(g, -1, 1)], 2).numpy()


def module_outputs(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def combined(pairs: list[tuple[np.ndarray, np.ndarray]], diagonal: bool) -> tuple[np.ndarray, np.ndarray]:
    """A and G of a shared weight: the partial traces of the dense Σ A_i ⊗ G_i, the first over the whole trace."""
    n, m = pairs[0][0].shape[-1], pairs[0][1].shape[-1]
    total = sum(np.kron(A[0], G[0]) for A, G in pairs).reshape(n, m, n, m)
    A, G = np.einsum("ikjk->ij", total) / np.einsum("ikik->", total), np.einsum("kikj->ij", total)
    return A[None], (np.diag(np.diag(G)) if diagonal else G)[None]


# -- dense inverses --


def factored(A: np.ndarray, G: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    """(A + πγI)⁻¹ ⊗ (G + γ/π I)⁻¹."""
    (n, m), gamma = (len(A), len(G)), damping**0.5
    pi = np.sqrt(np.trace(A) / n) / np.sqrt(np.trace(G) / m)
    return np.kron(np.linalg.inv(A + pi * gamma * np.eye(n)), np.linalg.inv(G + gamma / pi * np.eye(m)))


def exact(A: np.ndarray, G: np.ndarray, damping: float = DAMPING) -> np.ndarray:
    return np.linalg.inv(np.kron(A, G) + damping * np.eye(len(A) * len(G)))


def vec(V: np.ndarray) -> np.ndarray:
    return V.T.reshape(-1)


def judge_step(operation: str, U: np.ndarray, inverses: list[np.ndarray], V: np.ndarray) -> None:
    """An inverse, applied: 10 n cond eps, in the scale of what it can make of V."""
    for came, K, v in zip(U, inverses, V, strict=True):
        error = np.linalg.norm(vec(came) - K @ vec(v))
        spectrum = np.linalg.eigvalsh(K)
        largest, condition = spectrum[-1], spectrum[-1] / spectrum[0]
        judge(TORCH, operation, error, 10 * len(K) * condition * EPS * largest * np.linalg.norm(v))


def judge_factors(operation: str, layers: dict[str, LayerFactors], examples: list[Seen], sharing: Any) -> None:
    """Sums of outer products: 10 eps in the scale of the same sums of absolute values, for each operation before."""
    expected, sizes = moments(examples, sharing), moments([absolute(example) for example in examples], sharing)
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        for came, reference, size in zip(layer, expected[name], sizes[name], strict=True):
            M = came.to_dense() if isinstance(came, Diagonal) else came
            M = M if M.ndim == 3 else M[None]
            assert M.shape == reference.shape
            for one, full, scale in zip(M.numpy(), reference, size, strict=True):
                other = np.diag(np.diag(full)) if isinstance(came, Diagonal) else full
                judge(TORCH, operation, np.linalg.norm(one - other), 10 * OPERATIONS * EPS * np.trace(scale))


def absolute(example: Seen) -> Seen:
    a, g = ({name: x.abs() for name, x in side.items()} for side in (example.a, example.g))
    return Seen(a, g, example.F.abs())


OPERATIONS = 8  # of the network, one after the other, between what is compared


# -- a model, its batch, its preconditioner --


@dataclass
class Case:
    model: nn.Module
    args: tuple[Tensor, ...]
    likelihood: str = "categorical"
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        self.twin = twin(self.model)
        with torch.no_grad():
            self.targets = targets_for(self.likelihood, deepcopy(self.twin)(*self.args))

    def loss(self, model: nn.Module, reduction: str = "mean") -> Tensor:
        return getattr(losses(self.likelihood, model(*self.args), self.targets), reduction)()

    def preconditioner(self, estimator: str = "exact", reduction: str = "mean", **options: Any) -> KFACPreconditioner:
        self.reduction = reduction
        own = {"reduction": reduction} if estimator == "empirical" else {"likelihood": self.likelihood}
        options = own | {"damping": DAMPING, "factor_dtype": torch.float64} | options
        return KFACPreconditioner(self.model, estimator=estimator, **options)

    def run(self, estimator: str = "exact", **options: Any) -> KFACPreconditioner:
        """One step of a fresh preconditioner."""
        preconditioner = self.preconditioner(estimator, **options)
        self.step(preconditioner)
        return preconditioner

    def step(self, preconditioner: KFACPreconditioner, change: Callable[[], None] = lambda: None) -> None:
        self.model.zero_grad()
        z = self.model(*self.args)
        if not isinstance(preconditioner.estimator, Empirical):
            preconditioner.update(z)
        getattr(losses(self.likelihood, z, self.targets), self.reduction)().backward()
        change()
        preconditioner.step()

    def seen(self, estimator: str = "exact") -> list[Seen]:
        return seen(self.twin, self.args, self.likelihood, self.targets if estimator == "empirical" else None)

    def gradients(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        """∇W of these blocks, by the twin."""
        self.twin.zero_grad()
        self.loss(self.twin).backward()
        return {name: gradient(self.twin, name) for name in names}

    def judge(self, operation: str, inverses: dict[str, list[np.ndarray]], model: nn.Module | None = None) -> None:
        """That p.grad is these inverses, one a group, times the gradient."""
        for name, V in self.gradients(inverses).items():
            judge_step(operation, gradient(model or self.model, name), inverses[name], V)


def case(row: str, likelihood: str = "categorical") -> Case:
    model, *args = ROWS[row]()
    return Case(model, tuple(args), likelihood)


def effective(model: nn.Module, found: dict[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The factors of each weight: those of its block, or of all that share it, by the name of the first linear one."""
    names: dict[int, list[str]] = {}
    for name in found:
        module = dict(model.named_modules()).get(name)
        weight = model.get_submodule(name.rpartition(".")[0]).bias if module is None else module.weight
        names.setdefault(id(weight), []).append(name)
    result = {}
    for group in names.values():
        group.sort(key=lambda name: isinstance(dict(model.named_modules()).get(name), nn.Embedding))
        pairs = [found[name] for name in group]
        turned = len(group) > 1 and isinstance(dict(model.named_modules()).get(group[-1]), nn.Embedding)
        if turned:
            pairs[-1] = (pairs[-1][1], np.diag(np.diag(pairs[-1][0][0]))[None])
        embedding = isinstance(dict(model.named_modules()).get(group[0]), nn.Embedding)
        if embedding:
            pairs = [(np.diag(np.diag(A[0]))[None], G) for A, G in pairs]
        result[group[0]] = combined(pairs, turned) if len(group) > 1 else pairs[0]
    return result


def by_group(inverse: Callable[..., np.ndarray], found: dict[str, Any]) -> dict[str, list[np.ndarray]]:
    return {name: [inverse(*pair) for pair in zip(A, G, strict=True)] for name, (A, G) in found.items()}


def dense_ggn(model: nn.Module, args: tuple[Tensor, ...], likelihood: str) -> dict[str, np.ndarray]:
    """The diagonal blocks of (1/N) Σ Jᵀ H J (groups, n m, n m) by torch.func, one an example at a time."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    names = {p: name for name, p in model.named_parameters()}
    found: dict[str, Any] = {}
    examples = seen(model, args, likelihood)
    for n in range(len(args[0])):
        one = tuple(x[n : n + 1] for x in args)
        z = model(*one).detach()
        y = targets_for(likelihood, z)
        H = torch.func.hessian(lambda v, z=z, y=y: losses(likelihood, v.reshape(z.shape), y).sum())(z.flatten()).numpy()
        jacobian = torch.func.jacrev(lambda p, one=one: functional_call(model, p, one).flatten())(parameters)
        for block in examples[0].a:
            W = [gradient(model, block, lambda p, d=d, J=jacobian: J[names[p]][d]) for d in range(len(H))]
            J = np.array([[vec(part) for part in matrix] for matrix in W])  # (D, groups, n m)
            found[block] = found.get(block, 0.0) + np.einsum("dgi,de,egj->gij", J, H, J) / len(args[0])
    return found
