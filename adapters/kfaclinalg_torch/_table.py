"""The open table: by the class of a module the rule that says what its weights are.

A rule names the blocks of a module. Most modules are seen from outside: each block sees the inputs and the outputs of
the module's own forward pass. A rule with a `forward` takes the place of that pass, and shows each block what it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from . import _attention as attention
from . import _functional as functional
from . import _recurrent as recurrent
from ._blocks import Block
from ._convolution import Convolution
from ._embedding import Embedding
from ._linear import Bilinear, Linear
from ._normalisation import NORMS, Scale, epsilon, is_root_mean_square, root_mean_square

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell)


def _never(module: Any) -> str:
    return ""


def _nothing(module: Any) -> Sequence[nn.Module]:
    return ()


@dataclass(frozen=True)
class Rule:
    """How the weights of a class of modules are seen.

    Args:
        blocks: `blocks(name, module)` gives each `Block` of the module, whose names begin with its name.
        forward: `forward(module, see, *inputs)` returns what the module's own forward pass does, and calls
            `see(suffix, x, s, mask)` for the inputs x and outputs s of the block named f"{name}.{suffix}", the batch
            first; the mask (N, T) says which positions exist, None: all. Where there is none every block sees the
            first input and the output of the module's own pass.
        formula: what the module's pass must return, to be taken for one: `formula(module, *inputs)`. None: whatever it
            returns.
        reason: `reason(module)` says why this module cannot be taken, "" where it can.
        inside: `inside(module)` are the modules in it whose weights it uses without calling them.
    """

    blocks: Callable[[str, Any], Iterable[Block]]
    forward: Callable[..., Any] | None = None
    formula: Callable[..., Any] | None = None
    reason: Callable[[Any], str] = _never
    inside: Callable[[Any], Sequence[nn.Module]] = _nothing


def trained(parameter: Any) -> Tensor | None:
    """The parameter, where it is one that is trained."""
    return parameter if isinstance(parameter, nn.Parameter) and parameter.requires_grad else None


def _linear(name: str, module: Any) -> Iterable[Block]:
    weight, bias = trained(module._parameters.get("weight")), trained(module._parameters.get("bias"))
    if weight is not None:
        yield (Bilinear if isinstance(module, nn.Bilinear) else Linear)(name, weight, bias)


def _transposed(name: str, module: Any) -> Iterable[Block]:
    if (weight := trained(module._parameters.get("weight"))) is not None:
        yield Linear(name, weight, trained(module._parameters.get("bias")), transposed=True)


def _embedding(name: str, module: Any) -> Iterable[Block]:
    if (weight := trained(module._parameters.get("weight"))) is not None:
        yield Embedding(name, weight, module.padding_idx)


def _convolution(name: str, module: Any) -> Iterable[Block]:
    if (weight := trained(module._parameters.get("weight"))) is not None:
        yield Convolution(name, module, weight, trained(module._parameters.get("bias")))


def _scale(name: str, module: Any) -> Iterable[Block]:
    if (weight := trained(module._parameters.get("weight"))) is not None:
        yield Scale(name, module, weight, trained(module._parameters.get("bias")))


def _recurrent(name: str, module: Any) -> Iterable[Block]:
    for suffix in recurrent.maps(module):
        weight, bias = (trained(module._parameters.get(f"{kind}_{suffix}")) for kind in ("weight", "bias"))
        if weight is not None or bias is not None:
            yield Linear(f"{name}.{suffix}".lstrip("."), weight, bias)


def _scaled(module: Any) -> str:
    return "an Embedding with gradients scaled by frequency" if module.scale_grad_by_freq else ""


RULES: dict[type, Rule] = {
    nn.Linear: Rule(_linear),
    nn.Bilinear: Rule(_linear),
    nn.Embedding: Rule(_embedding, reason=_scaled),
    **dict.fromkeys(CONVOLUTIONS, Rule(_convolution)),
    **dict.fromkeys(NORMS, Rule(_scale)),
    **dict.fromkeys(RECURRENT, Rule(_recurrent, recurrent.forward)),
    nn.MultiheadAttention: Rule(
        attention.projections, attention.forward, reason=attention.reason, inside=lambda module: [module.out_proj]
    ),
}
BY_NAME = {
    "transformers.pytorch_utils.Conv1D": Rule(_transposed),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": Rule(
        functional.linears, functional.forward, inside=functional.inside
    ),
}
EXPERTS = Rule(functional.experts, functional.forward)
ROOT_MEAN_SQUARE = Rule(_scale, formula=root_mean_square)


def table_of(layers: Mapping[type, Any] | None) -> dict[type, Rule]:
    """The rules that a user adds: a `Rule`, a function that gives blocks, or a class whose rule is taken.

    Raises:
        TypeError, ValueError: something else, or a class that there is no rule for.
    """
    if not isinstance(layers or {}, Mapping):
        raise TypeError(f"layers is {layers!r}, expected a mapping of module classes to rules")
    return {_module_class(kind): _rule(rule) for kind, rule in (layers or {}).items()}


def rule_of(module: nn.Module, table: Mapping[type, Rule]) -> Rule | None:
    """The rule of a module, from a user's table first; None where there is none.

    A class that inherits a rule and has a forward pass of its own must return what its parent would.
    """
    for kind in type(module).__mro__:
        if kind in table:
            return table[kind]
        rule = RULES.get(kind) or BY_NAME.get(f"{kind.__module__}.{kind.__qualname__}")
        if rule:
            own: Any = type(module).forward
            inherited: Any = kind.forward  # type: ignore[attr-defined]
            return rule if own is inherited else replace(rule, formula=inherited)
    if is_root_mean_square(module) and epsilon(module) is not None:
        return ROOT_MEAN_SQUARE
    return EXPERTS if functional.is_stacked(module) else None


def _module_class(kind: Any) -> type:
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise TypeError(f"layers has the key {kind!r}, expected a class of modules")
    return kind


def _rule(rule: Any) -> Rule:
    if isinstance(rule, type) and rule in RULES:
        return RULES[rule]
    if isinstance(rule, type) or not (isinstance(rule, Rule) or callable(rule)):
        raise ValueError(
            f"layers has the rule {rule!r}, expected a Rule, a function that gives blocks, or one of "
            f"{', '.join(kind.__name__ for kind in RULES)}"
        )
    return rule if isinstance(rule, Rule) else Rule(rule)
