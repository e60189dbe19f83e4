"""Recurrent layers and cells step by step, so that the inputs and outputs of all their linear maps are seen.

A map has a row for each of N examples at each of T steps. Those of step 0 come first, then those of step 1, as in a
`PackedSequence`, of which sequences of one length are the case where none ends before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence

Recurrent = nn.RNN | nn.GRU | nn.LSTM | nn.RNNCell | nn.GRUCell | nn.LSTMCell
See = Callable[[str, Tensor, Tensor, Tensor | None], None]
Run = tuple[Tensor, list[Tensor]]  # the rows of the outputs, and the last h, of an LSTM the last c too


def maps(module: Recurrent) -> Iterator[str]:
    """The suffixes of the weights: ih takes the input, hh the hidden state, hr projects that of an LSTM."""
    yield from (kind + place for place in _places(module) for kind in _kinds(module))


def forward(module: Recurrent, see: See, input: Any, hx: Any = None) -> Any:
    """What the module's own forward returns, after one `see(suffix, inputs, s, mask)` for each of its `maps`.

    The inputs (N, T, n) and s (N, T, m) have no T in a cell. The gradient at s is that at the map's outputs, whatever s
    holds itself. The mask (N, T) is false where a packed sequence has ended; inputs and gradients are zero there.
    """
    if not _fits(module, input, hx):
        own: Any = type(module).forward
        return own(module, input, hx)  # says what is wrong
    x = input.data if isinstance(input, PackedSequence) else input
    shapes, places = _hidden_shapes(module, input), len(_places(module))
    hidden = [x.new_zeros(shape) for shape in shapes] if hx is None else [hx] if isinstance(hx, Tensor) else hx
    states = [h.reshape(places, -1, h.shape[-1]) for h in hidden]
    N = states[0].shape[1]
    outputs: Any = None  # a cell has none but its state
    if isinstance(module, nn.RNNCellBase):
        _, last = _layers(module, see, _Grid([N], (N,)), x.reshape(N, -1), states)
    elif isinstance(input, PackedSequence):
        there, back = (slice(None) if i is None else i for i in (input.sorted_indices, input.unsorted_indices))
        rows, last = _layers(module, see, _packed(input), x, [h[:, there] for h in states])
        outputs, last = input._replace(data=rows), [h[:, back] for h in last]
    else:
        turned = module.batch_first and x.ndim == 3
        x = x.transpose(0, 1) if turned else x
        rows, last = _layers(module, see, _Grid([N] * len(x), (len(x), N)), x.reshape(len(x) * N, -1), states)
        outputs = rows.view(*x.shape[:-1], -1)
        outputs = outputs.transpose(0, 1) if turned else outputs
    last = [h.reshape(shape) for h, shape in zip(last, shapes, strict=True)]
    end = last[0] if len(last) == 1 else tuple(last)
    return end if outputs is None else (outputs, end)


def _kinds(module: Recurrent) -> tuple[str, ...]:
    return ("ih", "hh", "hr") if getattr(module, "proj_size", 0) else ("ih", "hh")


def _places(module: Recurrent) -> list[str]:
    """What the names of the parameters end in, of each layer in each direction."""
    if isinstance(module, nn.RNNCellBase):
        return [""]
    directions = ("", "_reverse") if module.bidirectional else ("",)
    return [f"_l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]


def _fits(module: Recurrent, input: Any, hx: Any) -> bool:
    x, ndims = input, (1, 2) if isinstance(module, nn.RNNCellBase) else (2, 3)
    if isinstance(input, PackedSequence):
        x, ndims = input.data, (2, 2)
    dtype = getattr(module, f"weight_{next(maps(module))}").dtype
    known = x.dtype == dtype or torch.is_autocast_enabled(x.device.type)
    if x.ndim not in ndims or x.shape[-1] != module.input_size or not known or not x.numel():
        return False
    hidden = [hx] if isinstance(hx, Tensor) else hx
    return hx is None or [h.shape for h in hidden] == _hidden_shapes(module, input)


def _hidden_shapes(module: Recurrent, input: Any) -> list[tuple[int, ...]]:
    """That of h, and in an LSTM that of c."""
    if isinstance(module, nn.RNNCellBase):
        before = input.shape[:-1]
    elif isinstance(input, PackedSequence):
        before = (len(_places(module)), int(input.batch_sizes[0]))
    else:
        before = (len(_places(module)), *(input.shape[:-2] if module.batch_first else input.shape[1:-1]))
    h = (*before, getattr(module, "proj_size", 0) or module.hidden_size)
    return [h, (*before, module.hidden_size)] if isinstance(module, nn.LSTM | nn.LSTMCell) else [h]


class _Grid(NamedTuple):
    """Which row is which example's at which step."""

    sizes: list[int]  # the number of rows of each step
    shape: tuple[int, ...]  # (T, N), of a cell (N,)
    at: Tensor | None = None  # of packed sequences, the place of each row in (N T)
    mask: Tensor | None = None

    def batch_first(self, rows: Tensor) -> Tensor:
        if self.at is None:
            return rows.unflatten(0, self.shape).transpose(0, len(self.shape) - 1)
        T, N = self.shape
        return rows.new_zeros(N * T, rows.shape[1]).index_copy(0, self.at, rows).view(N, T, -1)

    def steps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of each step, of what `batch_first` returned."""
        if self.at is None:
            return x.unbind(1) if len(self.shape) > 1 else (x,)
        return x.flatten(0, 1).index_select(0, self.at).split(self.sizes)


def _packed(x: PackedSequence) -> _Grid:
    T, N = len(x.batch_sizes), int(x.batch_sizes[0])
    t, n = (torch.arange(N) < x.batch_sizes[:, None]).nonzero().to(x.data.device).unbind(1)
    at = (n if x.sorted_indices is None else x.sorted_indices[n]) * T + t
    mask = torch.zeros(N * T, dtype=torch.bool, device=at.device).index_fill(0, at, True)
    return _Grid(x.batch_sizes.tolist(), (T, N), at, mask.view(N, T))


def _layers(module: Recurrent, see: See, grid: _Grid, x: Tensor, states: list[Tensor]) -> Run:
    outputs: list[Tensor] = []
    last = []
    for i, place in enumerate(_places(module)):
        if outputs and not place.endswith("_reverse"):  # the next layer
            p: Any = module.dropout
            x, outputs = functional.dropout(torch.cat(outputs, -1), p, module.training), []
        rows, state = _scan(module, see, grid, place, x, [h[i] for h in states])
        outputs.append(rows)
        last.append(state)
    return torch.cat(outputs, -1), [torch.stack(h) for h in zip(*last, strict=True)]


def _scan(module: Recurrent, see: See, grid: _Grid, place: str, x: Tensor, state: list[Tensor]) -> Run:
    """One layer in one direction."""
    W = {kind: getattr(module, f"weight_{kind}{place}") for kind in _kinds(module)}
    b = {kind: getattr(module, f"bias_{kind}{place}", None) for kind in W}
    s = {"ih": grid.batch_first(functional.linear(x, W["ih"], b["ih"]))}
    see(f"ih{place}", grid.batch_first(x), s["ih"], grid.mask)
    inputs: dict[str, list[Tensor]] = {kind: [] for kind in W if kind != "ih"}
    for kind in inputs:
        # The outputs arise one step after the other. The bias of each is cut from one s, at which the gradients of all
        # steps meet. It depends on W, through a sum of no columns, to get a gradient whenever W does.
        zeros = W[kind][:, :0].sum(1)
        s[kind] = grid.batch_first((zeros if b[kind] is None else zeros + b[kind]).expand(len(x), -1))
    steps = {kind: grid.steps(s[kind]) for kind in W}

    def apply(kind: str, t: int, h: Tensor) -> Tensor:
        inputs[kind].append(h)
        return torch.addmm(steps[kind][t], h, W[kind].mT)

    outputs = []
    N, order = len(state[0]), -1 if place.endswith("_reverse") else 1
    for t in range(len(grid.sizes))[::order]:
        n = grid.sizes[t]  # the first n sequences have this step, the others keep their state
        now = state if n == N else [h[:n] for h in state]
        new = _step(module, steps["ih"][t], apply("hh", t, now[0]), now)
        if "hr" in W:
            new[0] = apply("hr", t, new[0])
        outputs.append(new[0])
        state = new if n == N else [torch.cat([h, kept[n:]]) for h, kept in zip(new, state, strict=True)]
    for kind, h in inputs.items():
        see(kind + place, grid.batch_first(torch.cat(h[::order]).detach()), s[kind], grid.mask)
    return torch.cat(outputs[::order]), state


def _step(module: Recurrent, s_ih: Tensor, s_hh: Tensor, state: list[Tensor]) -> list[Tensor]:
    """The next state, in an LSTM before its projection."""
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        i, f, g, o = (s_ih + s_hh).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return [o.sigmoid() * c.tanh(), c]
    if isinstance(module, nn.GRU | nn.GRUCell):
        (r_i, z_i, n_i), (r_h, z_h, n_h) = s_ih.chunk(3, -1), s_hh.chunk(3, -1)
        n = torch.tanh(n_i + (r_i + r_h).sigmoid() * n_h)
        return [n + (z_i + z_h).sigmoid() * (state[0] - n)]
    return [{"tanh": torch.tanh, "relu": torch.relu}[module.nonlinearity](s_ih + s_hh)]
