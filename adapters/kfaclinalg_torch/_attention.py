"""`nn.MultiheadAttention` as its four linear layers, whose outputs its own forward pass does not show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._linear import Linear

MAPS = ("q_proj", "k_proj", "v_proj", "out_proj")


@contextmanager
def differentiable() -> Iterator[None]:
    """The one way through attention that has products with the Jacobian, in training and in evaluation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def reason(module: nn.MultiheadAttention) -> str:
    """Why it cannot be preconditioned; empty where it can."""
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return "MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn"
    if not all(p.requires_grad for p in module.parameters()):
        return "MultiheadAttention of which some parameters are frozen"
    return ""


def projections(name: str, module: nn.MultiheadAttention) -> Iterator[Linear]:
    """The query's, key's and value's, parts of one packed weight, and the output's."""
    E = module.embed_dim
    for i, which in enumerate(MAPS[:3]):
        part = slice(i * E, (i + 1) * E)
        yield Linear(f"{name}.{which}".lstrip("."), module.in_proj_weight, module.in_proj_bias, part)
    yield Linear(f"{name}.out_proj".lstrip("."), module.out_proj.weight, module.out_proj.bias)


def forward(
    module: nn.MultiheadAttention,
    see: Callable[[str, Tensor, Tensor, None], None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What the module's own forward returns, after one `see(map, inputs, outputs, None)` a map, the batch first."""

    def project(i: int, x: Tensor) -> Tensor:
        W = module.in_proj_weight if i < 3 else module.out_proj.weight
        b = module.in_proj_bias if i < 3 else module.out_proj.bias
        part = slice(i * module.embed_dim, (i + 1) * module.embed_dim) if i < 3 else slice(None)
        # the layout of the module's own outputs, on which the numbers of a later dropout depend
        y = functional.linear(x.transpose(0, 1), W[part], None if b is None else b[part]).transpose(0, 1)
        see(MAPS[i], x, y, None)
        return y

    if is_causal and attn_mask is None:
        raise ValueError("is_causal is a hint about attn_mask, which is None")
    batched = query.ndim == 3
    inputs = [query, key, value]
    if not batched:
        inputs = [x[None] for x in inputs]
    elif not module.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    q, k, v = (
        project(i, x).unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2) for i, x in enumerate(inputs)
    )
    mask = _additive(attn_mask, key_padding_mask, q)
    dropout = module.dropout if module.training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.mT / module.head_dim**0.5
        weights = functional.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
        heads = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        heads = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
    outputs = project(3, heads.permute(2, 0, 1, 3).flatten(2).transpose(0, 1))
    if not batched:
        return outputs[0], None if weights is None else weights[0]
    return outputs if module.batch_first else outputs.transpose(0, 1), weights


def _additive(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as what is added to the scores (N, heads, L, S); in a boolean one True means: do not attend."""
    masks = []
    if attn_mask is not None:
        masks.append(attn_mask.unflatten(0, (-1, q.shape[1])) if attn_mask.ndim == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask.reshape(-1, 1, 1, key_padding_mask.shape[-1]))
    floats = [
        torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
        for mask in masks
    ]
    return sum(floats[1:], floats[0]).to(q.dtype) if floats else None
