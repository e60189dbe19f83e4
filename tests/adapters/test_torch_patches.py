"""Patches and their moments against what shares no code with them: the modules, autograd and `unfold`."""

from math import prod

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfaclinalg_torch import _panels
from kfaclinalg_torch import _patch_moments as module_under_test
from kfaclinalg_torch._patch_moments import patch_moment
from kfaclinalg_torch._patches import matrix_of_weight, mean_patches, patches, rows, weight_of_matrix

# (class, channels in, out, kernel, options, positions)
CASES = {
    "1d": (nn.Conv1d, 3, 4, 3, {"padding": 1}, (7,)),
    "1d kernel 1": (nn.Conv1d, 3, 2, 1, {}, (5,)),
    "1d kernel 1 stride": (nn.Conv1d, 3, 2, 1, {"stride": 2}, (6,)),
    "1d even same": (nn.Conv1d, 2, 3, 4, {"padding": "same", "dilation": 3}, (9,)),
    "1d even same circular": (nn.Conv1d, 2, 3, 4, {"padding": "same", "padding_mode": "circular"}, (9,)),
    "1d gaps": (nn.Conv1d, 2, 3, 2, {"dilation": 5}, (7,)),
    "1d stride over kernel": (nn.Conv1d, 2, 3, 2, {"stride": 4}, (13,)),
    "2d": (nn.Conv2d, 3, 4, 3, {"padding": 1}, (6, 5)),
    "2d valid": (nn.Conv2d, 3, 4, 3, {"padding": "valid"}, (6, 5)),
    "2d more padding than kernel": (nn.Conv2d, 2, 3, 2, {"padding": 3}, (3, 4)),
    "2d kernel of the image": (nn.Conv2d, 2, 3, (4, 3), {}, (4, 3)),
    "2d kernel over the image": (nn.Conv2d, 2, 3, 5, {"padding": 2}, (3, 3)),
    "2d one pixel": (nn.Conv2d, 2, 3, 3, {"padding": 1}, (1, 1)),
    "2d flat kernel": (nn.Conv2d, 2, 3, (1, 3), {"padding": (0, 1)}, (4, 5)),
    "2d even": (nn.Conv2d, 2, 3, (2, 4), {"padding": (1, 2)}, (5, 6)),
    "2d dilation": (nn.Conv2d, 2, 3, (3, 2), {"dilation": (2, 3), "padding": (2, 1)}, (6, 7)),
    "2d stride": (nn.Conv2d, 3, 4, 3, {"stride": 2, "padding": 1}, (8, 7)),
    "2d stride leaves pixels": (nn.Conv2d, 2, 3, (2, 1), {"stride": (3, 4), "dilation": (1, 2)}, (10, 7)),
    "2d kernel 1 padding": (nn.Conv2d, 2, 3, 1, {"padding": 1}, (3, 4)),
    "2d one stride": (nn.Conv2d, 2, 3, 3, {"stride": (1, 2), "padding": 1}, (5, 6)),
    "2d reflect": (nn.Conv2d, 2, 3, 3, {"padding": (2, 1), "padding_mode": "reflect"}, (5, 6)),
    "2d replicate": (nn.Conv2d, 2, 3, 3, {"padding": (2, 1), "padding_mode": "replicate"}, (5, 6)),
    "2d circular": (nn.Conv2d, 2, 3, 3, {"padding": (2, 1), "padding_mode": "circular"}, (5, 6)),
    "2d same reflect": (nn.Conv2d, 2, 3, (2, 3), {"padding": "same", "padding_mode": "reflect"}, (5, 6)),
    "2d circular stride": (nn.Conv2d, 2, 3, 3, {"padding": 1, "stride": 2, "padding_mode": "circular"}, (6, 6)),
    "2d groups": (nn.Conv2d, 6, 4, 3, {"padding": 1, "groups": 2}, (5, 6)),
    "2d groups stride": (nn.Conv2d, 6, 9, 3, {"padding": 1, "groups": 3, "stride": 2}, (5, 6)),
    "2d depthwise": (nn.Conv2d, 4, 8, 3, {"padding": 1, "groups": 4}, (5, 6)),
    "3d": (nn.Conv3d, 2, 3, (3, 2, 2), {"padding": 1}, (4, 3, 5)),
    "3d stride": (nn.Conv3d, 2, 4, (2, 1, 3), {"stride": (1, 2, 2), "padding": (1, 0, 1), "groups": 2}, (4, 5, 6)),
    "3d replicate": (nn.Conv3d, 2, 3, 2, {"padding": 1, "padding_mode": "replicate"}, (3, 4, 3)),
    "1d transposed": (nn.ConvTranspose1d, 3, 4, 3, {}, (5,)),
    "1d transposed stride": (
        nn.ConvTranspose1d,
        *(2, 3, 2),
        {"stride": 3, "padding": 2, "output_padding": 1, "dilation": 2},
        (5,),
    ),
    "2d transposed": (nn.ConvTranspose2d, 3, 2, (3, 2), {"padding": (1, 0)}, (4, 5)),
    "2d transposed crops": (nn.ConvTranspose2d, 3, 2, 2, {"padding": 2}, (5, 6)),
    "2d transposed kernel 1": (nn.ConvTranspose2d, 3, 2, 1, {"stride": 2}, (3, 4)),
    "2d transposed groups": (
        nn.ConvTranspose2d,
        *(4, 6, 3),
        {"stride": 2, "padding": 1, "output_padding": (1, 0), "groups": 2},
        (4, 3),
    ),
    "3d transposed": (nn.ConvTranspose3d, 2, 3, 2, {"stride": (2, 1, 2), "output_padding": (1, 0, 1)}, (2, 3, 2)),
}
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
every_case = pytest.mark.parametrize("name", CASES)
every_bias = pytest.mark.parametrize("bias", [False, True])
by_shifts = pytest.mark.parametrize("shifts", [False, True], ids=["patches", "shifts"])


def case(name, bias=True, N=3, dtype=torch.float64):
    torch.manual_seed(0)
    kind, C, m, kernel, options, positions = CASES[name]
    module = kind(C, m, kernel, bias=bias, dtype=dtype, **options)
    return module, torch.randn(N, C, *positions, dtype=dtype)


def choose(monkeypatch, shifts):
    """Shifts wherever they can be, or nowhere."""
    monkeypatch.setattr(module_under_test, "_shifts_pay", lambda *_: shifts)


def close(actual, expected, rtol=1e-12):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= rtol * expected.abs().max()


def moment_of(a):
    return torch.einsum("nrgi,nrgj->gij", a, a)


@every_case
@every_bias
def test_the_output_is_the_patches_times_the_weight(name, bias):
    module, x = case(name, bias)
    W = matrix_of_weight(module, module.weight)
    if bias:
        W = torch.cat([W, module.bias.view(module.groups, -1, 1)], dim=2)
    output = module(x)
    product = torch.einsum("nrgi,goi->ngor", patches(module, x, bias), W)
    close(product.flatten(1, 2).reshape(output.shape), output)
    close(rows(module, output), product.permute(0, 3, 1, 2))


@every_case
def test_the_gradient_is_rows_times_patches(name):
    module, x = case(name)
    g = torch.randn_like(module(x))
    weight, bias = torch.autograd.grad(module(x), (module.weight, module.bias), g)
    gradient = torch.einsum("nrgo,nrgi->goi", rows(module, g), patches(module, x, bias=True))
    close(gradient[:, :, :-1], matrix_of_weight(module, weight))
    close(gradient[:, :, -1].flatten(), bias)


@every_case
def test_the_matrix_of_a_weight_has_an_inverse(name):
    module, _ = case(name)
    W = matrix_of_weight(module, module.weight)
    assert W.shape[:2] == (module.groups, module.out_channels // module.groups)
    assert torch.equal(weight_of_matrix(module, W), module.weight)
    assert torch.equal(matrix_of_weight(module, weight_of_matrix(module, W + 1)), W + 1)


@every_case
@every_bias
def test_a_bias_is_a_column_of_ones(name, bias):
    module, x = case(name)
    a = patches(module, x, bias)
    n = module.in_channels // module.groups * prod(module.kernel_size)
    assert a.shape == (3, module(x)[0, 0].numel(), module.groups, n + bias)
    if bias:
        assert torch.equal(a[..., -1], torch.ones_like(a[..., -1]))
        assert torch.equal(a[..., :-1], patches(module, x, bias=False))


@every_case
@every_bias
@by_shifts
@pytest.mark.parametrize("N", [1, 3])
def test_the_moment_is_the_sum_of_outer_products(name, bias, shifts, N, monkeypatch):
    choose(monkeypatch, shifts)
    module, x = case(name, N=N)
    M = patch_moment(module, x, bias)
    close(M, moment_of(patches(module, x, bias)))
    assert torch.equal(M, M.mT)


@every_case
@every_bias
def test_the_mean_of_the_patches(name, bias):
    module, x = case(name)
    close(mean_patches(module, x, bias), patches(module, x, bias).mean(dim=1))


@by_shifts
@pytest.mark.parametrize("stride", [1, 2])
def test_plain_images_agree_with_unfold(shifts, stride, monkeypatch):
    choose(monkeypatch, shifts)
    module = nn.Conv2d(5, 2, 3, padding=1, stride=stride)
    x = torch.randn(4, 5, 9, 8, dtype=torch.float64)
    unfolded = functional.unfold(x, 3, padding=1, stride=stride).mT
    assert torch.equal(patches(module, x, bias=False)[:, :, 0], unfolded)
    close(patch_moment(module, x, bias=False)[0], torch.einsum("nri,nrj->ij", unfolded, unfolded))


@by_shifts
@pytest.mark.parametrize("pixel", [(0, 0), (0, 5), (4, 0), (4, 5)])
def test_what_is_large_at_a_corner_stays_out_of_the_other_blocks(shifts, pixel, monkeypatch):
    """Integers, so that a border left in, or taken off twice, shows exactly."""
    choose(monkeypatch, shifts)
    module = nn.Conv2d(1, 1, 3, padding=1)
    x = torch.arange(2 * 5 * 6, dtype=torch.float64).view(2, 1, 5, 6)
    x[:, :, *pixel] = 2.0**20
    assert torch.equal(patch_moment(module, x, bias=True), moment_of(patches(module, x, bias=True)))


@by_shifts
def test_channels_last_and_strided_inputs_are_the_same(shifts, monkeypatch):
    choose(monkeypatch, shifts)
    for kernel in (1, 3):
        module = nn.Conv2d(4, 2, kernel, dtype=torch.float64)
        x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
        expected = patch_moment(module, x, bias=True)
        close(patch_moment(module, x.contiguous(memory_format=torch.channels_last), bias=True), expected)
        close(patch_moment(module, x.mT.contiguous().mT, bias=True), expected)


@pytest.mark.parametrize("name", ["2d stride", "2d groups stride", "2d kernel 1 padding"])
@pytest.mark.parametrize("buffer", [1, 5000])
def test_the_examples_may_come_in_chunks(name, buffer, monkeypatch):
    module, x = case(name, N=7)
    monkeypatch.setattr(module_under_test, "BUFFER", buffer)
    close(patch_moment(module, x, bias=True), moment_of(patches(module, x, bias=True)))


@by_shifts
@pytest.mark.parametrize("name", ["2d", "2d reflect", "2d depthwise", "3d", "2d transposed groups"])
def test_float32_loses_a_few_eps(name, shifts, monkeypatch):
    choose(monkeypatch, shifts)
    module, x = case(name, dtype=torch.float32)
    M = patch_moment(module, x, bias=True)
    assert M.dtype == torch.float32
    assert torch.equal(M, M.mT)
    close(M.double(), moment_of(patches(module, x.double(), bias=True)), rtol=10 * torch.finfo(torch.float32).eps)
    close(
        mean_patches(module, x, bias=True).double(),
        patches(module, x.double(), bias=True).mean(dim=1),
        rtol=10 * torch.finfo(torch.float32).eps,
    )


@by_shifts
@pytest.mark.parametrize(("C", "kernel", "groups"), [(1, 1, 1), (3, 1, 1), (3, 3, 1), (4, 3, 4)])
def test_float32_sums_of_many_narrow_rows_lose_a_few_eps(C, kernel, groups, shifts, monkeypatch):
    """torch's own product of 150 000 rows of up to 8 columns loses 2e-5, in float32."""
    choose(monkeypatch, shifts)
    torch.manual_seed(0)
    module, x = nn.Conv2d(C, C, kernel, groups=groups), torch.randn(64, C, 48, 48)
    expected = moment_of(patches(module, x.double(), bias=True))
    close(patch_moment(module, x, bias=True).double(), expected, rtol=10 * torch.finfo(torch.float32).eps)


@every_bias
@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ((4, 3), {"stride": (4, 3)}),
        ((4, 3), {"stride": (4, 3), "padding": (2, 1)}),
        ((2, 3), {"stride": (5, 4)}),
        ((2, 3), {"stride": (4, 6), "dilation": (3, 2), "padding": (1, 2)}),
    ],
    ids=["stride of the kernel", "padding", "stride over kernel", "dilation"],
)
@pytest.mark.parametrize("groups", [1, 3])
def test_patches_that_do_not_overlap_agree_with_unfold(kernel, options, groups, bias):
    """Integers: exactly."""
    torch.manual_seed(0)
    module = nn.Conv2d(6, 3, kernel, groups=groups, bias=bias, **options)
    x = torch.randint(-9, 10, (3, 6, 17, 14), dtype=torch.float64)
    a = functional.unfold(x, kernel, **options).unflatten(1, (groups, -1)).permute(0, 3, 1, 2)
    if bias:
        a = functional.pad(a, (0, 1), value=1.0)
    assert torch.equal(patch_moment(module, x, bias), moment_of(a))


@every_bias
@by_shifts
@pytest.mark.parametrize("panel", [1, 4, 5, 128])
def test_a_moment_of_several_panels_is_whole(panel, shifts, bias, monkeypatch):
    choose(monkeypatch, shifts)
    monkeypatch.setattr(_panels, "PANEL", panel)
    module = nn.Conv2d(32, 1, 3, padding=1)
    x = torch.randint(-9, 10, (2, 32, 5, 4), dtype=torch.float64)
    assert torch.equal(patch_moment(module, x, bias), moment_of(patches(module, x, bias)))


class Calls(TorchDispatchMode):
    """How many operations torch was asked for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kernel", "stride"), [(16, 16), (16, 8), (7, 2)])
def test_the_calls_do_not_grow_with_the_pairs_of_kernel_elements(kernel, stride):
    counts = []
    for k, s in ((2, 2), (kernel, stride)):
        with Calls() as calls:
            patch_moment(nn.Conv2d(1, 2, k, stride=s), torch.zeros(2, 1, 32, 32), bias=True)
        counts.append(calls.count)
    assert counts[1] <= counts[0] + 40


class Largest(TorchDispatchMode):
    """The number of elements of the largest storage that was made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_shifts_make_no_patches(monkeypatch):
    choose(monkeypatch, True)
    module, x = nn.Conv2d(16, 4, 3, padding=1), torch.randn(8, 16, 24, 24)
    with Largest() as largest:
        patch_moment(module, x, bias=True)
    assert x.numel() <= largest.elements <= 1.25 * x.numel()
    with Largest() as largest:
        mean_patches(module, x, bias=True)
    assert largest.elements <= 1.25 * x.numel()
    with Largest() as largest:
        patches(module, x, bias=True)
    assert largest.elements > 9 * x.numel()


def test_a_chunk_is_bounded(monkeypatch):
    module, x = nn.Conv2d(4, 4, 3, stride=2, padding=1), torch.randn(32, 4, 24, 24)
    monkeypatch.setattr(module_under_test, "BUFFER", 4 * x.numel())
    with Largest() as largest:
        patch_moment(module, x, bias=True)
    assert largest.elements <= 1.25 * x.numel()


def test_a_pointwise_kernel_on_channels_last_is_not_copied():
    module = nn.Conv2d(16, 4, 1)
    x = torch.randn(8, 16, 24, 24).contiguous(memory_format=torch.channels_last)
    made = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != x.data_ptr():
                made.append(result.numel())
            return result

    with Copies():
        patch_moment(module, x, bias=False)
    assert max(made) <= 16 * 16


@pytest.mark.parametrize(
    ("C", "side", "N", "shifts"),
    [(64, 32, 16, True), (32, 16, 128, True), (64, 8, 128, True), (3, 32, 128, False), (64, 2, 64, False)],
)
def test_wide_layers_on_large_images_take_shifts(C, side, N, shifts, monkeypatch):
    taken = []
    for way in ("_fill_by_shifts", "_fill_by_patches"):
        monkeypatch.setattr(module_under_test, way, lambda *_, way=way: taken.append(way))
    patch_moment(nn.Conv2d(C, 1, 3, padding=1), torch.zeros(N, C, side, side), bias=False)
    assert taken == ["_fill_by_shifts" if shifts else "_fill_by_patches"]


def test_inputs_are_left_as_they_are():
    module, x = case("2d")
    before = x.clone()
    for f in (patches, mean_patches, patch_moment):
        f(module, x, True)
    assert torch.equal(x, before)
