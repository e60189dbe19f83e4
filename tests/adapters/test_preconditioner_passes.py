"""Which passes are captured, those of checkpoints and of `torch.compile` too, and what of them is kept."""

import gc

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from training import (
    ESTIMATORS,
    Mixed,
    assert_near,
    assert_same,
    backward,
    batch,
    dense,
    gradients,
    mixed_batch,
    network,
    one_step,
    preconditioned,
    stored,
)

# -- gradient checkpointing --


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant=None):
        torch.manual_seed(0)
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)
        self.inner = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        x = self.first(x)
        x = self.inner(x) if self.use_reentrant is None else checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return self.last(x.tanh())


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("structure", ["block-diagonal", "eigen"])
def test_non_reentrant_checkpointing_changes_nothing(estimator, structure):
    runs = []
    for use_reentrant in (None, False):
        model = Checkpointed(use_reentrant)
        preconditioner = preconditioned(model, estimator, structure=structure, inverse_period=2)
        found = [one_step(model, preconditioner, *batch(N, seed=N)) for N in (12, 6, 5, 12)]
        runs.append((found, dense(preconditioner.layers)))
    assert_near(*runs)


def test_reentrant_checkpointing_changes_nothing():
    """The loss's own backward pass shows it; `torch.autograd.grad` does not go through such a checkpoint."""
    runs = []
    for use_reentrant in (None, True):
        model = Checkpointed(use_reentrant)
        preconditioner = preconditioned(model, "empirical", inverse_period=2)
        found = [one_step(model, preconditioner, *batch(N, seed=N)) for N in (12, 6, 5, 12)]
        runs.append((found, dense(preconditioner.layers)))
    assert_near(*runs)


def test_reentrant_checkpointing_takes_parts_of_a_batch_whose_forward_passes_all_come_first():
    (x, y), runs = batch(), []
    for use_reentrant in (None, True):
        model = Checkpointed(use_reentrant)
        preconditioner = preconditioned(model, "empirical")
        losses = [
            functional.cross_entropy(model(part), targets) * len(part) / len(x)
            for part, targets in zip(x.split((5, 7)), y.split((5, 7)), strict=True)
        ]
        for loss in losses:
            loss.backward()
        preconditioner.step()
        runs.append(dense(preconditioner.layers))
    assert_near(*runs)


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_reentrant_checkpointing_of_an_extra_backward_pass_is_refused_or_right(estimator):
    """Never a statistic without the layers inside."""
    model = Checkpointed(True)
    preconditioner = preconditioned(model, estimator)
    x, y = batch()
    outputs = model(x)
    try:
        preconditioner.update(outputs)
    except (RuntimeError, ValueError) as error:
        assert "heckpoint" in str(error)  # noqa: PT017
        return
    functional.cross_entropy(outputs, y).backward()
    preconditioner.step()
    assert preconditioner.layers.keys() == {"first", "inner.0", "inner.2", "last"}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nothing_of_what_a_checkpoint_computed_again_is_kept(estimator):
    model = Checkpointed(False)
    preconditioner = preconditioned(model, estimator)
    storages = [stored(module) for module in (model.first, model.inner[0], model.inner[1])]
    one_step(model, preconditioner, *batch())
    gc.collect()
    assert all(storages)
    assert all(storage.expired() for kept in storages for storage in kept)


# -- torch.compile --


# torch hides this warning of its own, but not from a filter that makes it an error
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@compiles
@pytest.mark.parametrize(
    ("estimator", "backend"), [*((estimator, "eager") for estimator in ESTIMATORS), ("exact", "aot_eager")]
)
def test_a_compiled_model_gives_what_the_model_gives(estimator, backend):
    torch.compiler.reset()
    runs = []
    for compiled in (False, True):
        model = network(4, 8, 3)
        called = torch.compile(model, backend=backend) if compiled else model
        preconditioner = preconditioned(called, estimator, inverse_period=2)
        found = []
        for seed in range(3):
            x, y = batch(seed=seed)
            model.zero_grad()
            backward(called, preconditioner, x, y)
            preconditioner.step()
            found.append(gradients(model))
        runs.append((found, dense(preconditioner.layers)))
    assert_near(*runs)


@compiles
@pytest.mark.parametrize("when", ["in place", "after", "and run before"])
def test_a_model_may_be_compiled_in_other_ways(when):
    """In place; after the hooks are there; and one that was compiled and run before they were."""
    torch.compiler.reset()
    x, y = batch()
    expected_model = network(4, 8, 3)
    expected = one_step(expected_model, preconditioned(expected_model), x, y)
    model = network(4, 8, 3)
    called = model
    if when == "in place":
        model.compile(backend="eager")
    if when == "and run before":
        called = torch.compile(model, backend="eager")
        called(x)
    preconditioner = preconditioned(called)
    if when == "after":
        called = torch.compile(model, backend="eager")
    backward(called, preconditioner, x, y)
    preconditioner.step()
    assert_near(gradients(model), expected)


@compiles
@pytest.mark.parametrize("when", ["before", "in place", "after", "and run before"])
def test_a_compiled_model_takes_batches_of_several_sizes(when):
    """The second size is compiled for any, and saves what torch's own backward pass would overwrite."""
    torch.compiler.reset()
    with torch._functorch.config.patch(donated_buffer=True):  # torch's default
        model, other = (nn.Sequential(*network(4, 8), nn.LayerNorm(8), nn.Tanh(), *network(8, 3)) for _ in range(2))
        called = torch.compile(model, backend="aot_eager") if when in ("before", "and run before") else model
        if when == "in place":
            model.compile(backend="aot_eager")
        if when == "and run before":
            for size in (5, 3):
                called(batch()[0][:size])
        preconditioner, expected = preconditioned(called), preconditioned(other)
        if when == "after":
            called = torch.compile(model, backend="aot_eager")
        for size in (4, 7, 5):
            x, y = (t[:size] for t in batch())
            for one, passes, its in ((model, called, preconditioner), (other, other, expected)):
                one.zero_grad()
                backward(passes, its, x, y)
                its.step()
            assert_near(gradients(model), gradients(other), c=1000)


@compiles
def test_a_compiled_attention_is_captured():
    torch.compiler.reset()
    x, y = mixed_batch()
    runs = []
    for compiled in (False, True):
        model = Mixed()
        called = torch.compile(model, backend="eager") if compiled else model
        preconditioner = preconditioned(called, "exact")
        backward(called, preconditioner, x, y)
        preconditioner.step()
        runs.append((gradients(model), dense(preconditioner.layers)))
    assert_near(*runs)


# -- what is captured, and what not --


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, "paused"])
def test_evaluation_captures_nothing(estimator, mode):
    """And the statistic of a training step around it is the same, bitwise."""
    runs = []
    for evaluated in (False, True):
        model = Mixed()
        preconditioner = preconditioned(model, estimator)
        x, y = mixed_batch()
        outputs = model(x)
        if estimator != "empirical":
            preconditioner.update(outputs)
        if evaluated:
            with preconditioner.paused() if mode == "paused" else mode():
                model(mixed_batch(seed=5)[0])
        functional.cross_entropy(outputs, y).backward()
        if evaluated:
            with preconditioner.paused() if mode == "paused" else mode():
                model(mixed_batch(seed=6)[0])
        preconditioner.step()
        runs.append((gradients(model), dense(preconditioner.layers)))
    assert_same(*runs)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_step_after_evaluation_alone_says_that_nothing_was_captured(estimator):
    model, (x, y) = network(4, 3), batch()
    preconditioner = preconditioned(model, estimator)
    with preconditioner.paused():
        functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="nothing was captured"):
        preconditioner.step()


def test_paused_ends_with_its_block_even_after_an_error_and_may_be_nested():
    model, (x, y) = network(4, 3), batch()
    preconditioner = preconditioned(model)

    def broken():
        with preconditioner.paused(), preconditioner.paused():
            model(x)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    one_step(model, preconditioner, x, y)
    assert set(preconditioner.layers) == {"0"}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_train_and_eval_make_no_difference(estimator):
    runs = []
    for training in (True, False):
        model = Mixed().train(training)
        preconditioner = preconditioned(model, estimator)
        runs.append((one_step(model, preconditioner, *mixed_batch()), dense(preconditioner.layers)))
    assert_same(*runs)


def test_the_captured_batch_normalisation_is_that_of_the_forward_pass():
    """Though the mode is another by the time of update()."""
    (x, y), runs = batch(), []
    for switched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        preconditioner = preconditioned(model, "exact")
        outputs = model(x)
        model.train(not switched)
        preconditioner.update(outputs)
        functional.cross_entropy(outputs, y).backward()
        preconditioner.step()
        runs.append(dense(preconditioner.layers))
    assert_same(*runs)


# -- memory --


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("structure", "N"), [("block-diagonal", 4), ("eigen", 64)])  # 4: with outer products
def test_nothing_of_a_step_lives_longer_and_nothing_grows(estimator, structure, N):
    """Without the help of the garbage collector, which knows nothing of an accelerator's memory."""
    model = network(16, 16, 3)
    preconditioner = preconditioned(model, estimator, structure=structure, inverse_period=2)
    outputs = [stored(module) for module in model]
    counts = []
    gc.collect()
    gc.disable()
    try:
        for step in range(50):
            x, y = batch(N, 16, seed=step)
            backward(model, preconditioner, x, y)
            preconditioner.step()
            model.zero_grad()
            assert all(storage.expired() for storages in outputs for storage in storages)
            del x, y
            if step in (9, 29, 49):
                counts.append(sum(issubclass(type(t), torch.Tensor) for t in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[0] == counts[1] == counts[2]
    assert preconditioner._estimate.capture.uses == []


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_passes_that_nobody_updates_or_backpropagates_do_not_pile_up(estimator):
    """Validation with gradients enabled, say: after a step nothing is left of them."""
    model = network(16, 16, 3)
    preconditioner = preconditioned(model, estimator)
    storages = stored(model[1])
    for step in range(3):
        x, y = batch(64, 16, seed=step)
        backward(model, preconditioner, x, y)
        model(x)
        preconditioner.step()
    gc.collect()
    assert len(storages) == 6
    assert all(storage.expired() for storage in storages)


def test_steps_without_a_statistic_keep_nothing():
    model = network(16, 16, 3)
    preconditioner = preconditioned(model, statistics_period=100)
    x, y = batch(64, 16)
    one_step(model, preconditioner, x, y)
    model(x)
    assert preconditioner._estimate.capture.uses == []
