"""The forms in which inputs come to a layer, and hooks beside ours."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from training import ESTIMATORS, assert_near, assert_same, batch, dense, gradients, network, one_step, preconditioned


def same_as_plain(model, call, expected_model=None, c=100, **options):
    """The factors, and that the outputs and gradients V are those without a preconditioner."""
    other = copy.deepcopy(model)
    preconditioner = preconditioned(model, "empirical", **options)
    outputs, expected = call(model), call(other)
    assert_near(outputs.detach(), expected.detach(), c)
    for z in (outputs, expected):
        z.square().mean().backward()
    assert_near(gradients(model), gradients(other), c)
    preconditioner.step()
    return preconditioner


def test_inputs_by_keyword():
    model, (x, y) = network(4, 3)[0], batch()
    runs = []
    for call in (lambda m: m(x), lambda m: m(input=x)):
        m = copy.deepcopy(model)
        preconditioner = preconditioned(m, "exact")
        outputs = call(m)
        preconditioner.update(outputs)
        functional.cross_entropy(outputs, y).backward()
        preconditioner.step()
        runs.append((gradients(m), dense(preconditioner.layers)))
    assert_same(*runs)


def test_a_keyword_may_come_before_the_input():
    torch.manual_seed(0)
    model = nn.ConvTranspose1d(2, 3, 3, stride=2)
    x = torch.randn(4, 2, 5)
    preconditioner = same_as_plain(model, lambda m: m(output_size=None, input=x))
    assert set(preconditioner.layers) == {""}


def test_two_keywords_may_come_in_any_order():
    torch.manual_seed(0)
    model, x, y = nn.Bilinear(2, 3, 2), torch.randn(4, 2), torch.randn(4, 3)
    runs = [
        same_as_plain(copy.deepcopy(model), call).layers
        for call in (lambda m: m(x, y), lambda m: m(input2=y, input1=x))
    ]
    assert_same(*map(dense, runs))


class Several(nn.Module):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x, *, other, flag=True):
        return self.one(x) + self.two(other)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_several_inputs(estimator):
    model, (x, y), other = Several(), batch(), batch(features=2)[0]
    preconditioner = preconditioned(model, estimator)
    outputs = model(x, other=other)
    if estimator != "empirical":
        preconditioner.update(outputs)
    functional.cross_entropy(outputs, y).backward()
    g = 12 * torch.autograd.grad(functional.cross_entropy(z := outputs.detach().requires_grad_(), y), z)[0]
    preconditioner.step()
    a = functional.pad(other, (0, 1), value=1.0)
    assert_near(preconditioner.layers["two"].A, a.mT @ a / 12)
    if estimator == "empirical":
        assert_near(preconditioner.layers["two"].G, g.mT @ g / 12)


@pytest.mark.parametrize("container", [lambda x, o: [x, o], lambda x, o: {"x": x, "other": o}])
def test_inputs_in_a_list_or_a_dictionary(container):
    class Unpacks(Several):
        def forward(self, inputs):
            x, other = inputs.values() if isinstance(inputs, dict) else inputs
            return super().forward(x.unflatten(0, (-1, 2)), other=other.unflatten(0, (-1, 2))).flatten(0, 1)

    model, (x, y), other = Unpacks(), batch(), batch(features=2)[0]
    preconditioner = preconditioned(model, "exact")
    outputs = model(container(x, other))
    preconditioner.update(outputs)
    functional.cross_entropy(outputs, y).backward()
    preconditioner.step()
    a = functional.pad(other, (0, 1), value=1.0)
    assert_near(preconditioner.layers["two"].A, a.mT @ a / 12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen", "block-tridiagonal"])
def test_a_batch_of_one(estimator, structure):
    model = network(4, 5, 3)
    preconditioner = preconditioned(model, estimator, structure=structure, damping=0.1)
    x, y = batch(1)
    came = one_step(model, preconditioner, x, y)
    assert all(bool(g.isfinite().all()) for g in came.values())
    a = functional.pad(x, (0, 1), value=1.0)
    assert_near(preconditioner.layers["0"].A, a.mT @ a)


def test_an_empty_batch_leaves_the_averages():
    model = network(4, 3)
    preconditioner = preconditioned(model, "empirical")
    one_step(model, preconditioner, *batch())
    before = dense(preconditioner.layers)
    x, y = batch(0)
    model.zero_grad()
    functional.cross_entropy(model(x), y, reduction="sum").backward()
    preconditioner.step()
    assert_same(dense(preconditioner.layers), before)


@pytest.mark.parametrize("estimator", ["exact", "empirical"])
def test_unbatched_inputs_are_a_batch_of_one(estimator):
    runs = []
    x = batch(1)[0]
    for z in (x, x[0]):
        model = network(4, 5, 3)
        preconditioner = preconditioned(model, estimator, "gaussian")
        outputs = model(z)
        if estimator == "exact":
            preconditioner.update(outputs)
        (0.5 * outputs.square().sum()).backward()
        preconditioner.step()
        runs.append((gradients(model), dense(preconditioner.layers)))
    assert_near(runs[1], runs[0])


def test_an_unbatched_image_is_a_batch_of_one():
    runs = []
    torch.manual_seed(0)
    x, first = torch.randn(1, 2, 5, 5), nn.Conv2d(2, 3, 3)
    for z in (x, x[0]):
        model = copy.deepcopy(first)
        preconditioner = preconditioned(model, "empirical")
        (0.5 * model(z).square().sum()).backward()
        preconditioner.step()
        runs.append((gradients(model), dense(preconditioner.layers)))
    assert_near(runs[1], runs[0])


class Conditioned(nn.Module):
    """A layer sees one vector, which all examples share."""

    def __init__(self, shape):
        torch.manual_seed(0)
        super().__init__()
        self.shared, self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.vector = torch.linspace(0, 1, 3).reshape(shape)

    def forward(self, x):
        return self.head(torch.tanh(self.shared(self.vector) * self.layer(x)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_vector_that_all_examples_share_is_no_batch_of_one(estimator):
    runs = []
    for shape in ((1, 3), (3,)):
        model = Conditioned(shape)
        preconditioner = preconditioned(model, estimator)
        runs.append((one_step(model, preconditioner, *batch()), dense(preconditioner.layers)))
    assert_near(*runs)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ELU, nn.Hardtanh])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_activation_in_place(activation, estimator):
    runs = []
    for inplace in (False, True):
        model = network(4, 8, 6, 3, activation=lambda inplace=inplace: activation(inplace=inplace))
        preconditioner = preconditioned(model, estimator)
        runs.append((one_step(model, preconditioner, *batch()), dense(preconditioner.layers)))
    assert_near(*runs, c=1000)


def test_a_backward_hook_of_the_user_stays():
    model, (x, y), seen = network(4, 3), batch(), []
    model[0].register_full_backward_hook(lambda module, g_in, g_out: seen.append(g_out[0].shape))
    preconditioner = preconditioned(model, "empirical")
    one_step(model, preconditioner, x.requires_grad_(), y)
    preconditioner.remove()
    assert seen == [(12, 3)]
    assert len(model[0]._backward_hooks) == 1


def test_a_functional_call_under_a_transform_is_left_alone():
    """`torch.func` gradients of a model with hooks, as for a neural tangent kernel."""
    model, (x, y) = network(4, 5, 3), batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters):
        return functional.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)

    expected = torch.func.grad(loss)(parameters)
    preconditioned(model, "empirical")
    assert_same(torch.func.grad(loss)(parameters), expected)
