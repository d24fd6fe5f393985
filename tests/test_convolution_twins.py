"""Each fast convolution against `torch.nn.functional.conv2d` on what it stands for."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from twins_hf import convolution_twins
from twins_hf.convolution_twins import WinogradConvolution, convolve, convolve_pyramid, resize
from twins_hf.modeling_twins import TwinsConvModule


def maps(*sizes, channels=(4, 3, 2), batch_size=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch_size, width, *size, generator=generator, dtype=dtype)
        for width, size in zip(channels, sizes, strict=False)
    ]


def weights(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype) / shape[1] ** 0.5 / 3


def plain_pyramid(levels, weight, scale=None, bias=None):
    size = levels[0].shape[-2:]
    joined = torch.cat([levels[0], *(resize(level, size) for level in levels[1:])], dim=1)
    convolved = F.conv2d(joined, weight, padding=weight.shape[-1] // 2)
    scale = torch.ones(len(weight)) if scale is None else scale
    bias = torch.zeros(len(weight)) if bias is None else bias
    return convolved * scale.to(convolved)[:, None, None] + bias.to(convolved)[:, None, None]


def gradients(function, *inputs):
    """Of a weighted sum of the output, by every input."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    factors = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad((output * factors.to(output.dtype)).sum(), inputs)]


PYRAMIDS = [
    [(16, 16), (8, 8), (4, 4)],
    [(13, 18), (7, 9), (2, 3)],
    [(9, 1), (5, 1), (1, 1)],
    [(1, 1), (1, 1), (6, 6)],  # as pooled maps may be: finer than the first
    [(130, 67), (65, 34), (3, 70)],  # more positions than are resized at once
    [(5, 7)],
]


@pytest.mark.parametrize("sizes", PYRAMIDS)
def test_the_convolution_of_a_pyramid_is_that_of_the_resized_and_concatenated_maps(sizes):
    levels = maps(*sizes)
    weight, scale = weights(70, sum(level.shape[1] for level in levels), 3, 3), torch.rand(70, dtype=torch.float64)
    with torch.no_grad():  # the sum is written in place
        found = convolve_pyramid(levels, weight, scale, scale)
        torch.testing.assert_close(found, plain_pyramid(levels, weight, scale, scale))
    found = gradients(lambda weight, *levels: convolve_pyramid(levels, weight), weight, *levels)
    expected = gradients(lambda weight, *levels: plain_pyramid(levels, weight), weight, *levels)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("sizes", [((16, 24), (8, 12)), ((13, 18), (7, 9)), ((1, 5), (1, 3)), ((1, 1), (1, 1))])
def test_a_resized_map_is_added_in_pieces_as_in_one_with_its_gradients(sizes):
    feature_map, coarser = maps(*sizes, channels=(300, 300))

    def plain(feature_map, coarser):
        return feature_map + resize(coarser, sizes[0])

    found, expected = (
        gradients(function, feature_map, coarser) for function in (convolution_twins.add_resized, plain)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        for memory_format in (torch.contiguous_format, torch.channels_last):
            inputs = [each.clone(memory_format=memory_format) for each in (feature_map, coarser)]
            torch.testing.assert_close(convolution_twins.add_resized(*inputs), expected[0])


@pytest.mark.parametrize("length, coarse_length", [(128, 64), (171, 86), (257, 33), (65, 64), (200, 1), (70, 300)])
def test_blocks_of_upsampling_leave_out_only_zeros(length, coarse_length):
    like = torch.empty(0, dtype=torch.float64)
    whole = convolution_twins.shifted_upsampling(length, coarse_length, like)
    filled = torch.zeros_like(whole)
    for rows, columns, block in convolution_twins.upsampling_blocks(length, coarse_length, like):
        filled[rows, columns] = block
    assert torch.equal(filled, whole)


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("with_autocast", [False, True])
def test_the_convolution_of_a_pyramid_stays_near_in_bfloat16(with_autocast, with_gradients):
    levels = maps((16, 24), (8, 12), (4, 6), channels=(16, 16, 16), dtype=torch.float32)
    weight = weights(16, 48, 3, 3, dtype=torch.float32)
    expected = plain_pyramid(levels, weight)
    if not with_autocast:
        levels, weight = [level.bfloat16() for level in levels], weight.bfloat16()
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=with_autocast),
        torch.set_grad_enabled(with_gradients),
    ):
        found = convolve_pyramid(levels, weight)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_pyramid_keeps_neither_wide_nor_resized_maps_for_the_way_back():
    levels = [level.requires_grad_() for level in maps((32, 32), (16, 16), (8, 8), channels=(8, 8, 8))]
    weight = weights(8, 24, 3, 3).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        convolve_pyramid(levels, weight)
    inputs = {tensor.data_ptr() for tensor in (*levels, weight)}
    storages = [tensor.untyped_storage() for tensor in kept]
    others = [storage.nbytes() // 8 for storage in storages if storage.data_ptr() not in inputs]
    assert max(others) <= max(weight.numel(), 32 * 16 * 3)  # taps in another order, matrices of upsampling


def winograd(feature_map, weight, bias):
    output = WinogradConvolution.apply(feature_map.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)
    return output[..., : feature_map.shape[2], : feature_map.shape[3]]


@pytest.mark.parametrize("size", [(8, 8), (13, 18), (1, 1), (3, 70), (70, 3), (4, 1030)])
@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
def test_winograd_gives_the_values_and_gradients_of_the_direct_convolution(size, wanted):
    (feature_map,) = maps(size)
    inputs = [feature_map, weights(5, 4, 3, 3), weights(1, 5)[0]]
    results = []
    for function in (
        lambda x, w, b: F.conv2d(x, w, b, padding=1),
        winograd,
    ):
        leaves = [tensor.clone().requires_grad_(needed) for tensor, needed in zip(inputs, wanted, strict=True)]
        output = function(*leaves)
        output.square().sum().backward()
        results.append([output, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [(8, 8), (13, 18), (1, 1), (3, 70), (70, 3), (4, 1030)])
def test_winograd_in_one_piece_gives_the_same(size):
    (feature_map,) = maps(size)
    positions, weight, bias = feature_map.permute(0, 2, 3, 1), weights(5, 4, 3, 3), weights(1, 5)[0]
    found = convolution_twins.traced_winograd(positions, weight, bias)
    expected = convolution_twins.winograd(positions, convolution_twins.winograd_weights(weight), bias)
    torch.testing.assert_close(found[:, : size[0], : size[1]], expected[:, : size[0], : size[1]])


def test_winograd_passes_the_gradient_check():
    (feature_map,) = maps((5, 6))
    inputs = [tensor.requires_grad_() for tensor in (feature_map, weights(3, 4, 3, 3), weights(1, 3)[0])]
    assert torch.autograd.gradcheck(winograd, inputs, fast_mode=True)


@pytest.mark.parametrize("size", [(32, 32), (45, 37)])
def test_winograd_is_near_the_direct_convolution_in_float32_and_gives_the_same_bits_again(size):
    (feature_map,) = maps(size, channels=(300,), dtype=torch.float32)
    weight = weights(280, 300, 3, 3, dtype=torch.float32)
    assert convolution_twins.is_winograd_faster(feature_map, weight)
    found = gradients(convolve, feature_map, weight)
    expected = gradients(lambda x, w: F.conv2d(x, w, padding=1), feature_map.double(), weight.double())
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 3e-5 * theirs.abs().max()
    for once, again in zip(found, gradients(convolve, feature_map, weight), strict=True):
        assert torch.equal(once, again)


def test_winograd_is_left_out_where_it_does_not_pay():
    feature_map, weight = torch.empty(1, 256, 64, 64), torch.empty(256, 256, 3, 3)
    is_faster = convolution_twins.is_winograd_faster
    assert is_faster(feature_map, weight)
    assert not is_faster(feature_map[..., :15], weight)
    assert not is_faster(feature_map[:, :64], weight[:, :64])
    assert not is_faster(feature_map.bfloat16(), weight.bfloat16())
    assert not is_faster(feature_map.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_faster(feature_map, weight)


@torch.inference_mode()
def test_a_wide_module_compiled_for_any_size_is_not_compiled_again():
    torch.compiler.reset()
    module = TwinsConvModule(256, 128, 3).eval()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    compiled(*maps((40, 44), (20, 22), channels=(128, 128), dtype=torch.float32))
    with torch.compiler.set_stance("fail_on_recompile"):
        for sizes in [((45, 37), (23, 19)), ((64, 33), (32, 17))]:
            levels = maps(*sizes, channels=(128, 128), dtype=torch.float32)
            torch.testing.assert_close(compiled(*levels), module(*levels), rtol=1e-4, atol=1e-4)


def test_an_exported_wide_module_has_no_direct_convolution_and_takes_any_size():
    module = TwinsConvModule(256, 128, 3).eval()
    levels = tuple(maps((40, 44), (20, 22), channels=(128, 128), dtype=torch.float32))
    any_size = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    with torch.no_grad():
        program = torch.export.export(module, levels, dynamic_shapes=((any_size, any_size),))
        assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
        for batch_size, *sizes in [(1, (45, 37), (23, 19)), (3, (64, 33), (32, 17)), (1, (3, 2), (2, 2))]:
            levels = maps(*sizes, channels=(128, 128), batch_size=batch_size, dtype=torch.float32)
            torch.testing.assert_close(program.module()(*levels), module(*levels), rtol=1e-4, atol=1e-4)


def test_compiled_training_keeps_the_direct_convolution():
    torch.compiler.reset()
    feature_map, weight = torch.randn(1, 128, 32, 33, requires_grad=True), weights(128, 128, 3, 3, dtype=torch.float32)
    compiled = torch.compile(convolve, fullgraph=True, backend="eager")
    assert torch.equal(compiled(feature_map, weight), F.conv2d(feature_map, weight, padding=1))


@pytest.fixture(params=[1, 3])
def conv_module(request):
    """Batch norm with statistics of its own, wide enough for Winograd."""
    torch.manual_seed(0)
    module = TwinsConvModule(128, 128, request.param)
    with torch.no_grad():
        for tensor in (module.batch_norm.weight, module.batch_norm.bias, module.batch_norm.running_mean):
            tensor.normal_()
        module.batch_norm.running_var.uniform_(0.5, 2)
    return module


def plain_module(module, feature_map):
    return module.batch_norm(module.conv(feature_map)).relu()


def test_batch_norm_is_folded_into_whatever_the_weights_are_now(conv_module):
    feature_map = torch.randn(2, 128, 33, 35)
    other = TwinsConvModule(128, 128, conv_module.conv.kernel_size[0])

    def assert_equal():
        found, expected = conv_module(feature_map), plain_module(conv_module, feature_map)
        assert (found - expected).abs().max() < 3e-5 * expected.abs().max()

    keys = set(conv_module.state_dict())
    for grad_mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        conv_module.eval()
        with grad_mode():
            assert_equal()
        conv_module.train()
        conv_module(feature_map)  # moves the statistics
        conv_module.eval()
        assert_equal()
        with torch.no_grad():
            conv_module.conv.weight.mul_(1.5)
            conv_module.batch_norm.bias.data.add_(0.5)
        assert_equal()
    conv_module.load_state_dict(other.state_dict())
    assert_equal()
    conv_module = nn.SyncBatchNorm.convert_sync_batchnorm(conv_module)
    assert_equal()
    assert set(conv_module.state_dict()) == keys


def test_transformed_weights_are_neither_saved_nor_kept_when_a_model_trains_or_is_gone():
    def kept():
        return {id(owner) for owner in convolution_twins._kept_weights}

    module, feature_map, before = TwinsConvModule(128, 128, 3).eval(), torch.randn(1, 128, 32, 32), kept()
    for _ in range(2):
        with torch.no_grad():
            module(feature_map)
        assert kept() == before | {id(module.conv.weight)}
        module(feature_map)
        assert kept() == before
    with torch.no_grad():
        module(feature_map)
    assert len(pickle.dumps(module)) < 2 * 9 * 128 * 128 * 4
    del module
    assert kept() == before


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_transformed_weights_are_kept_between_inferences_and_not_beyond_what_they_are_made_of(grad_mode, monkeypatch):
    module, feature_map, transforms = TwinsConvModule(128, 130, 3).eval(), torch.randn(1, 128, 33, 35), []
    transform = convolution_twins.winograd_weights
    monkeypatch.setattr(
        convolution_twins, "winograd_weights", lambda weight: transforms.append(1) or transform(weight)
    )

    def number_of_transforms():
        transforms.clear()
        with grad_mode():
            found, expected = module(feature_map), plain_module(module, feature_map)
        assert (found - expected).abs().max() < 3e-5 * expected.abs().max()
        return len(transforms)

    assert [number_of_transforms(), number_of_transforms()] == [1, 0]
    for change in (
        lambda: module.conv.weight.data[5, 6, 1].mul_(1.5),  # which no version counter sees
        lambda: setattr(module.conv.weight, "data", torch.randn(130, 128, 3, 3)),
        lambda: module.batch_norm.running_var.mul_(2),
        lambda: module.load_state_dict(TwinsConvModule(128, 130, 3).state_dict()),
    ):
        with torch.no_grad():
            change()
        assert [number_of_transforms(), number_of_transforms()] == [1, 0]


def test_a_folded_module_has_the_gradients_of_the_plain_one(conv_module):
    feature_map = torch.randn(2, 128, 32, 33)
    conv_module.eval()
    results = []
    for function in (conv_module, lambda x: plain_module(conv_module, x)):
        conv_module.zero_grad()
        (function(feature_map) ** 2).mean().backward()
        results.append([parameter.grad.clone() for parameter in conv_module.parameters()])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_statistics_move_in_training_as_they_do_plainly(conv_module):
    feature_map = torch.randn(2, 128, 32, 33)
    statistics = []
    for function in (conv_module, lambda x: plain_module(conv_module, x)):
        conv_module.batch_norm.reset_running_stats()
        conv_module.train()
        function(feature_map)
        statistics.append(conv_module.batch_norm.running_var.clone())
    torch.testing.assert_close(*statistics, rtol=1e-4, atol=1e-5)


class Adapter(nn.Module):
    """A layer around a layer, as adapters put it."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, feature_map):
        return 2 * self.layer(feature_map)


def test_a_layer_that_an_adapter_put_in_is_called():
    torch.manual_seed(0)
    module = TwinsConvModule(9, 5, 3).eval()
    levels = [level.float() for level in maps((13, 18), (7, 9), (2, 3))]
    plain = module(*levels)
    module.conv = Adapter(module.conv)
    module.batch_norm.eps = 0.0
    torch.testing.assert_close(module(*levels), 2 * plain, rtol=1e-4, atol=1e-5)
