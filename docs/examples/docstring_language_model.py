"""A small transformer that writes documentation: AdamW with and without K-FAC's preconditioner.

    python docs/examples/docstring_language_model.py            # under 4 minutes on one core
    python docs/examples/docstring_language_model.py --quick    # about 15 seconds

It predicts the next character of 64 pieces, of 64 characters each, of the docstrings of Python's own standard library.
Every iteration sees all of them: there is no gradient noise, and in the end either model knows them by heart. This is
about optimisation alone, and says nothing of text that neither has seen.

The learning rate of both is from the same sweep: AdamW's has the lowest final loss, the other gets to that loss first.
The preconditioner's own options are below, and the same for all rates. Another version of Python has other docstrings,
and so slightly other numbers. Picture: build/figures/docstring_language_model.png.
"""

import importlib
import inspect
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from _preconditioned_training import Plan, run
from kfaclinalg_torch import KFACPreconditioner

# Modules written in Python, which need nothing but Python itself.
# fmt: off
MODULES = (
    "argparse", "ast", "calendar", "codecs", "collections", "contextlib", "csv", "datetime", "decimal", "difflib",
    "doctest", "enum", "functools", "heapq", "inspect", "json", "logging", "optparse", "os", "pathlib", "pickle",
    "random", "shutil", "socket", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading",
    "timeit", "tokenize", "traceback", "unittest", "urllib.parse", "urllib.request", "uuid", "warnings", "zipfile",
)
# fmt: on

# By hand, seed 0, lr 0.016: 80 iterations to AdamW's final loss; with damping 1e-2 or 0.1 81 or 82, with "expand" 90,
# without the embeddings 98, and with an inverse every 10 iterations more than 120.
KFAC = {"damping": 3e-2, "inverse_period": 1, "weight_sharing": "reduce"}
PIECES, CONTEXT = 64, 64
WIDTH, HEADS, BLOCKS = 32, 4, 2
PLAN = Plan(iterations=200, rates=(4e-3, 8e-3, 1.6e-2, 3.2e-2), seeds=(0, 1), smoothing=1)
QUICK = Plan(iterations=25, rates=(8e-3, 1.6e-2), seeds=(0,), smoothing=1)


class Block(nn.Module):
    """Causal attention, then two layers for each position by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm1(x)
        q, k, v = (layer(a).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        heads = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(heads.transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class LanguageModel(nn.Module):
    """Characters (N, T) to the logits of the next ones (N, T, characters)."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, characters)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # as in GPT-2

    def forward(self, text: Tensor) -> Tensor:
        x = self.tokens(text) + self.positions(torch.arange(text.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def corpus() -> str:
    """Every docstring of the modules once, in the order of their names, without what is not ASCII."""
    found = {text: None for name in MODULES for text in docstrings(importlib.import_module(name))}
    return "\n\n".join(found).encode("ascii", "ignore").decode()


def docstrings(module: ModuleType) -> Iterator[str]:
    """Those of a module, of its functions and classes, and of their methods."""
    own = [x for _, x in sorted(vars(module).items()) if getattr(x, "__module__", None) == module.__name__]
    methods = [x for owner in own if inspect.isclass(owner) for _, x in sorted(vars(owner).items())]
    for x in (module, *filter(inspect.isclass, own), *filter(inspect.isroutine, own + methods)):
        if isinstance(x.__doc__, str):
            yield inspect.cleandoc(x.__doc__)


def pieces(generator: torch.Generator) -> Tensor:
    """The training set (PIECES, CONTEXT + 1), from random places of the text."""
    windows = ENCODED.unfold(0, CONTEXT + 1, 1)
    return windows[torch.randint(len(windows), (PIECES,), generator=generator)]


def train(seed: int, lr: float, iterations: int, preconditioned: bool) -> Iterator[float]:
    """The training loop; it yields the loss before each step, of the whole training set."""
    torch.manual_seed(seed)
    model = LanguageModel(len(CHARACTERS))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    if preconditioned:
        preconditioner = KFACPreconditioner(model, likelihood="categorical", **KFAC)

    text = pieces(torch.Generator().manual_seed(seed))
    for _ in range(iterations):
        optimizer.zero_grad()
        outputs = model(text[:, :-1])
        if preconditioned:
            preconditioner.update(outputs)
        loss = cross_entropy(outputs.flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        if preconditioned:
            preconditioner.step()
        optimizer.step()
        yield loss.item()


TEXT = corpus()
CHARACTERS = sorted(set(TEXT))
ENCODED = torch.tensor([CHARACTERS.index(character) for character in TEXT])

if __name__ == "__main__":
    run(__doc__, "A transformer on docstrings", "docstring_language_model", train, PLAN, QUICK)
