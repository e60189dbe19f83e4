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
@pytest.mark.parametrize(("kind", "f", "x"), [(Images, images, torch.randn(6, 2, 6, 5).double()),
                                              (Texts, texts, torch.randint(7, (6, 3)))])  # fmt: skip
def test_the_factors_are_those_of_the_other_adapter(kind, f, x):
    model = kind()
    preconditioner = KFACPreconditioner(model, likelihood="categorical", estimator="exact")
    outputs = model(x)
    preconditioner.update(outputs)
    outputs.square().sum().backward()
    preconditioner.step()
    params = as_params(model)
    x = jnp.asarray(x.numpy())
    net = Network(f, "categorical", example=(params, x), estimator="exact")
    assert not net.skipped
    y = jnp.zeros(outputs.shape[:-1], int)
    moments = jax.jit(net.value_grad_and_statistics)(params, x, y, key=KEY)[2].moments
    for name, factors in preconditioner.layers.items():
        for pair in zip(moments[f"{name}.weight"], factors, strict=True):
            ours, theirs = (np.asarray(M.d if hasattr(M, "d") else M) for M in pair)
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)
