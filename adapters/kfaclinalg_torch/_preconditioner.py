"""K-FAC as a preconditioner of gradients, for the training loop that you have."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import _resume as resume
from ._alone import step_alone
from ._chain import inverses_of
from ._control import Controlled
from ._damping import Relative
from ._discovery import FALLBACKS, found, unwrapped
from ._estimate import Estimate
from ._exchange import exchange_of
from ._gather import in_full_precision
from ._layer import Layer, owners
from ._likelihoods import Likelihood, likelihood_of, new_generator
from ._seen import Seen
from ._settings import Damping, Number, Period, check_choice, check_together, dtype_of, sharing_of, values_of
from ._shards import mesh_of
from ._table import table_of
from ._team import ALONE, is_running
from ._together import step_together


class KFACPreconditioner(Seen, Controlled):
    """The gradient of every layer becomes G⁻¹ ∇W A⁻¹, and any optimizer of `torch.optim` takes it from there.

    The layers: linear and bilinear, convolutions, embeddings, normalisations, attention, recurrent layers and experts,
    used several times and with tied weights too. Of all other parameters the diagonal of the Fisher matrix is taken;
    `fallback` lists them, and `skipped` what is left alone. A is the second moment of the inputs, G that of the
    gradients of one example's loss, both averaged over the steps; the first dimension of the model's first input counts
    the examples. Forward passes without gradients show nothing, whatever `train()` or `eval()` says.

    Args:
        model: the module; inside `DistributedDataParallel` or `torch.compile` either it or the wrapper.
        likelihood: of the outputs: "categorical" (logits in the last dimension), "bernoulli", "gaussian", or an object
            with the methods of `kfaclinalg_torch.Likelihood`. The empirical estimator needs none.
        estimator: whose gradients G is made of. `Sampled(samples)`, short "sampled": of targets drawn from the model
            itself; `ExactFisher()`, "exact": the expectation over them; both by `update(outputs)` before the loss's
            backward pass. `Empirical(reduction, grad_scaler)`, "empirical": of the loss itself.
        structure: `Factored(norm)`, short "block-diagonal" (Section 4.2), `Exact()` (eqn 6), `LowRank(rank)`,
            `Eigen()`, "eigen" (EKFAC) or `Tridiagonal(norm)`, "block-tridiagonal" (Section 4.3), of `kfaclinalg`.
        damping: λ: `Relative(fraction)`, of the mean eigenvalue of each layer, or one number for all. Factored Tikhonov
            damping takes γ = √λ (Section 6.3).
        decay: the bound of ε in the averages, ε = min(1 - 1/k, decay) (Section 5).
        statistics_period, inverse_period: in steps. The layers' inverses are refreshed in different steps of a period,
            so that none costs much more than another. With an inverse period of 1 substitution takes the place of
            explicit inverses. "auto": at most a quarter of the model's work for each; 1 and 10 where λ is a number.
        weight_sharing: "expand" takes every position by itself, "reduce" the mean input and the summed gradient of an
            example (Eschenhagen et al. 2023); for single modules, a mapping of their names.
        length: the root mean square of each layer's update, whose direction alone is then K-FAC's; None: as long as
            it is. "auto": 1e-3, None where λ is a number or with `kl_clip`.
        kl_clip, kl_lr: κ and lr, 1 unless given: the update is multiplied by `min(1, √(κ / Σ lr² |⟨V, U⟩|))`, V and U
            being the gradients before and after. None: it is not.
        layers: rules of your own by the class of a module, see `Rule`; `{MyLinear: nn.Linear}` takes one for the other.
        fallback: "diagonal", or "none": what no rule knows is left alone.
        outputs: which of what the model returns the likelihood is of: a function, or a key, index or attribute.
        mask: which positions count, True in a boolean tensor (N, ...): it, or a function of the model's inputs. The
            others enter neither A nor G. The attribute may be set anew before a forward pass.
        skip: names of modules to leave alone.
        generator: the source of the sampled targets. None: one that is seeded from torch's global one.
        factor_dtype: of A, G and the inverses. None: that of the parameters, half precision widened.
        placement: who holds A, G and the inverses: "replicated", all processes, "owner", one, or a fraction of them.
            "auto": "owner" under `fully_shard`, "replicated" else.
        wire_dtype: in which these travel: torch.bfloat16, for half the bytes. None: factor_dtype.
        group: the processes of a model in no wrapper. None: those of sharded parameters, of DDP, or all.
        short: `samples`; `reduction` and `grad_scaler`; `exact_damping`, `rank` and `pi_norm`: the constants of an
            estimator or a structure that is given by its short form.

    Raises:
        TypeError, ValueError: a wrong option, or nothing that can be preconditioned.

    >>> model = nn.Linear(2, 3)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> preconditioner = KFACPreconditioner(model, likelihood="categorical")
    >>> outputs = model(torch.ones(4, 2))
    >>> preconditioner.update(outputs)
    >>> nn.functional.cross_entropy(outputs, torch.zeros(4, dtype=torch.int64)).backward()
    >>> preconditioner.step()
    >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str | Likelihood | None = None,
        estimator: Any = "sampled",
        structure: Any = "block-diagonal",
        damping: Damping = Relative(0.1),  # noqa: B008 - a value
        decay: float = 0.95,
        statistics_period: Period = "auto",
        inverse_period: Period = "auto",
        weight_sharing: str | Mapping[str, str] = "expand",
        length: Number | str | None = "auto",
        kl_clip: Number | None = None,
        kl_lr: Number | None = None,
        layers: Mapping[type, Any] | None = None,
        fallback: str = "diagonal",
        outputs: Any = None,
        mask: Any = None,
        skip: Sequence[str] = (),
        generator: torch.Generator | None = None,
        factor_dtype: torch.dtype | None = None,
        placement: str | float = "auto",
        wire_dtype: torch.dtype | None = None,
        group: Any = None,
        **short: Any,
    ) -> None:
        self._take(damping, decay, (statistics_period, inverse_period), length, (kl_clip, kl_lr))
        check_choice("fallback", fallback, FALLBACKS)
        self.estimator, self.structure = values_of(estimator, structure, short)
        check_together(self.estimator, likelihood, length, kl_clip, kl_lr, generator)
        wrapper, model, self._wrapper = model, unwrapped(model), weakref.ref(model)
        mesh = mesh_of(model)
        fallback = fallback if mesh is None else "none"  # of a part of a parameter no example's gradient is seen
        known = found(model, skip, table_of(layers), fallback)
        self.likelihood = None if likelihood is None else likelihood_of(likelihood)
        self.generator = generator or new_generator(known.layers[0].parameters[0].device)
        self.factor_dtype = dtype_of(factor_dtype, known.layers)
        check_choice("wire_dtype", wire_dtype, (None, torch.bfloat16, torch.float32, torch.float64))
        dtypes = self.factor_dtype, wire_dtype or self.factor_dtype
        self._exchange = exchange_of(wrapper, known.layers, mesh, placement, group, dtypes, self)
        self._seed = self._exchange.common_seed(self.generator) if self._exchange else 0
        self._estimate = Estimate(
            model,
            known,
            estimator=self.estimator,
            likelihood=self.likelihood,
            sharing=sharing_of(weight_sharing, known.layers),
            dtype=self.factor_dtype,
            generator=self.generator,
            outputs=outputs,
            mask=mask,
            settled=self._settled,
            team=self._exchange.grid.all if self._exchange else ALONE,
        )
        self._model, self._fallback, self._was_running = model, fallback, is_running()
        self._inverses = inverses_of(self.structure, inverse_period, known.layers)
        self._owners = owners(model, known.layers)
        self._gone: dict[str, str] = {}  # layers that the first pass has shown to be none
        self._begin()
        weakref.finalize(self, self._estimate.capture.remove)  # where nobody has called `remove`
        if message := known.message():
            warnings.warn(f"KFACPreconditioner {message}", stacklevel=2)

    @in_full_precision
    def step(self) -> None:
        """Average what was captured, refresh the inverses whose turn it is, and precondition the gradients in place.

        Raises:
            ValueError: a module or a parameter was replaced since the preconditioner was made; the processes differ.
            RuntimeError: nothing was captured, nothing is new; another process failed, or was waited for in vain.
            LinAlgError: the factors of a layer could not be inverted in three refreshes in a row.
        """
        step_together(self, self._exchange) if self._exchange else step_alone(self)
        self._steps += 1
        self._estimate.capture.uses = []
        self._begin()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on, in tensors, numbers, lists and dictionaries."""
        return resume.preconditioner_state(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict` as if there had been no stop: bitwise, on one machine.

        Raises:
            ValueError: it is none, or of another structure or estimator, or of other layers. Nothing has changed then.
        """
        resume.load_preconditioner(self, state_dict)

    @property
    def _layers(self) -> tuple[Layer, ...]:
        return self._estimate.found.layers

    def _begin(self) -> None:
        if self._exchange:
            self._exchange.begin(self)
        self._estimate.begin(self._steps % self._period("statistics_period") == 0, self._inverses.keeps_uses)

    def _settled(self, gone: Mapping[Layer, str]) -> None:
        """These layers are none."""
        if gone:
            estimate, before = self._estimate, self._estimate.found
            estimate.take(before.without(self._model, gone, self._fallback))
            estimate.sharing |= sharing_of("expand", [x for x in estimate.found.layers if x not in before.layers])
            estimate.statistic.all = estimate.found.blocks
            self._inverses = inverses_of(self.structure, self.inverse_period, estimate.found.layers)
            if self._exchange:
                self._exchange.assign(estimate.found.layers)
            self._gone |= {layer.name: why for layer, why in gone.items()}
            warnings.warn(f"KFACPreconditioner {estimate.found.message(before)}", stacklevel=2)
