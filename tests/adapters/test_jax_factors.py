"""The factors of layers in JAX are those of the same network in torch."""

import jax
import jax.numpy as jnp
import jax_models  # noqa: F401 - JAX in float64
import numpy as np
import pytest
import torch
from jax_torch import Images, Texts, as_params, images, texts

from kfaclinalg_jax import Network
from kfaclinalg_torch import KFACPreconditioner

KEY = jax.random.key(2)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("kind", "f", "x"), [(Images, images, torch.randn(6, 2, 6, 5).double()),
                                              (Texts, texts, torch.randint(7, (6, 3)))])  # fmt: skip
def test_the_factors_are_those_of_the_other_adapter(kind, f, x, sharing):
    model = kind()
    preconditioner = KFACPreconditioner(model, likelihood="categorical", estimator="exact", weight_sharing=sharing)
    outputs = model(x)
    preconditioner.update(outputs)
    outputs.square().sum().backward()
    preconditioner.step()
    params = as_params(model)
    x = jnp.asarray(x.numpy())
    net = Network(f, "categorical", example=(params, x), estimator="exact", weight_sharing=sharing)
    assert not net.skipped
    y = jnp.zeros(outputs.shape[:-1], int)
    moments = jax.jit(net.value_grad_and_statistics)(params, x, y, key=KEY)[2].moments
    for name, factors in preconditioner.layers.items():
        for pair in zip(moments[f"{name}.weight"], factors, strict=True):
            ours, theirs = (np.asarray(M.d if hasattr(M, "d") else M) for M in pair)
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_sharing_of_weights_is_checked():
    x = jnp.ones((4, 3), int)
    made = lambda sharing: Network(texts, "categorical", example=(as_params(Texts()), x), weight_sharing=sharing)  # noqa: E731
    assert made({"linear.weight": "reduce"}).reduced == {"linear.weight"}
    for sharing, error, message in (
        ("sum", ValueError, "weight_sharing is 'sum', expected one of 'expand', 'reduce'"),
        (None, TypeError, "weight_sharing is None"),
        ({"linear": "reduce"}, ValueError, "weight_sharing names linear, expected names of"),
        ({"norm.weight": "reduce"}, ValueError, "weight_sharing of 'norm.weight' is 'reduce', expected 'expand'"),
    ):
        with pytest.raises(error, match=message):
            made(sharing)
