# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""
The decode heads' 3x3 convolutions in fewer operations, each equal to `torch.nn.functional.conv2d` up to rounding.

Maps have shape (batch, channels, height, width) outside; inside, and in memory, they are (batch, height, width,
channels): every step is then a matrix product along the channels, or along a spatial axis, all others in one piece.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils.weak import WeakTensorKeyDictionary

# F(4x4, 3x3) of "Fast Algorithms for Convolutional Neural Networks" (Lavin and Gray, arXiv 1509.09308).
TILE = 4
INPUT_TRANSFORM = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
WEIGHT_TRANSFORM = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUTPUT_TRANSFORM = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
BLOCK = 64  # positions that are resized at once


def resize(feature_map: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear resizing of (B, C, H, W) to `size` (height, width), corners not aligned."""
    return nn.functional.interpolate(feature_map, size=size, mode="bilinear", align_corners=False)


def add_resized(feature_map: torch.Tensor, coarser: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) plus (B, C, h, w) resized to its size; where there are no gradients, in place and some channels at
    a time, in memory that is had already."""
    size = feature_map.shape[2:]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return resize(coarser, size).add_(feature_map)
    for some, coarse in zip(feature_map.split(128, dim=1), coarser.split(128, dim=1), strict=True):
        some.add_(resize(coarse, size))
    return feature_map


def crop(feature_map: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The first rows and columns of (B, H, W, C)."""
    rows, columns = feature_map.shape[1:3]
    if statically_known_true(rows >= height) and statically_known_true(columns >= width):
        return feature_map[:, :height, :width]
    # A slice's strides tell whether it left something out; a program traced for any size must not depend on that.
    rows, columns = (torch.arange(side, device=feature_map.device) for side in (height, width))
    return feature_map.index_select(1, rows).index_select(2, columns)


def both_axes(transform: tuple, like: torch.Tensor) -> torch.Tensor:
    """A transform of rows and columns at once: the Kronecker product of (out, in) with itself."""
    matrix = torch.tensor(transform, dtype=like.dtype, device=like.device)
    return torch.kron(matrix, matrix)


def winograd_weights(weight: torch.Tensor) -> torch.Tensor:
    """(out, in, 3, 3) -> (36, in, out)."""
    transformed = both_axes(WEIGHT_TRANSFORM, weight) @ weight.transpose(0, 1).reshape(-1, 9).T
    return transformed.view(36, weight.shape[1], weight.shape[0])


# For each weight: the numbers it had in the last inference, and what `winograd_weights` made of them.
_kept_weights = WeakTensorKeyDictionary()


def kept_winograd_weights(weight: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
    """`winograd_weights` of what is made of `owner`, kept while that lives and `weight` has the same numbers."""
    numbers, transformed = _kept_weights.get(owner, (None, None))
    if numbers is None or not torch.equal(numbers, weight):
        numbers, transformed = weight.clone(), winograd_weights(weight)
        _kept_weights[owner] = numbers, transformed
    return transformed


def indices(shape: tuple[int, ...], like: torch.Tensor) -> list[torch.Tensor]:
    """The index along each axis of every element of a `shape`, in order."""
    position, along = torch.arange(math.prod(shape), device=like.device), []
    for length in reversed(shape):
        along.append(position % length)
        position = position // length
    return along[::-1]


def transformed_tiles(tiles: torch.Tensor, channels: int) -> torch.Tensor:
    """The 36 positions of each tile, (36, tiles * C), transformed: (36, tiles, C)."""
    return (both_axes(INPUT_TRANSFORM, tiles) @ tiles).view(36, -1, channels)


def winograd_tiles(padded: torch.Tensor) -> torch.Tensor:
    """(B, 4 * rows + 2, 4 * columns + 2, C) -> (36, B * rows * columns, C), transformed tiles of 6x6 that overlap by
    2."""
    tiles = padded.unfold(1, TILE + 2, TILE).unfold(2, TILE + 2, TILE)  # (B, rows, columns, C, 6, 6)
    return transformed_tiles(tiles.permute(4, 5, 0, 1, 2, 3).reshape(36, -1), padded.shape[-1])


def winograd_products(tiles: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Tiles (36, tiles, in) and weights (36, in, out) -> (16, tiles * out): each tile's output."""
    products = torch.bmm(tiles, weights)
    if bias is not None:
        products[7] += bias  # the one of the 36 that is added to every position
    return both_axes(OUTPUT_TRANSFORM, tiles) @ products.flatten(1)


def bands(feature_map: torch.Tensor) -> list[tuple[int, int, int]]:
    """(image, top, bottom) of bands of some 128 tiles: what lies between the steps is then so small that its memory is
    not given back to the system with each band, to be had again at a price."""
    batch_size, height, width, _ = feature_map.shape
    rows, height = max(1, 128 * TILE // width) * TILE, height + -height % TILE
    return [(image, top, min(top + rows, height)) for image in range(batch_size) for top in range(0, height, rows)]


def padded_band(feature_map: torch.Tensor, image: int, top: int, bottom: int) -> torch.Tensor:
    """Rows `top` to `bottom` of an image of (B, H, W, C), with what tiles of 6x6 see around them (zeros off it)."""
    _, height, width, _ = feature_map.shape
    rows = (int(top == 0), bottom + 1 - min(bottom + 1, height))
    band = feature_map[image, None, max(top - 1, 0) : bottom + 1]
    return nn.functional.pad(band, (0, 0, 1, -width % TILE + 1, *rows))


def tiled(band: torch.Tensor) -> torch.Tensor:
    """(4 * rows, 4 * columns, C) as (4, 4, rows, columns, C)."""
    return band.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE)).permute(1, 3, 0, 2, 4)


def winograd(feature_map: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The 3x3 convolution of (B, H, W, in), padded by one, with `winograd_weights` of (out, in, 3, 3): (B, H', W',
    out), where H' and W' are the next multiples of 4 and what lies beyond H and W has no meaning."""
    batch_size, height, width, _ = feature_map.shape
    output = feature_map.new_empty(batch_size, height + -height % TILE, width + -width % TILE, weights.shape[-1])
    for image, top, bottom in bands(feature_map):
        tiles = winograd_tiles(padded_band(feature_map, image, top, bottom))
        band = tiled(output[image, top:bottom])
        band.copy_(winograd_products(tiles, weights, bias).view(band.shape))
    return output


def traced_winograd(feature_map: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`winograd` in one piece: the same few steps for every size, whatever the program runs on."""
    batch_size, height, width, _ = feature_map.shape
    rows, columns = (height + TILE - 1) // TILE, (width + TILE - 1) // TILE
    padding = (0, 0, 1, columns * TILE - width + 1, 1, rows * TILE - height + 1)
    padded = nn.functional.pad(feature_map, padding)
    # A gather, since sliding windows over a map of any size are not in every runtime that an exported program goes to.
    shape = (TILE + 2, TILE + 2, batch_size, rows, columns)
    row, column, image, tile_row, tile_column = indices(shape, padded)
    source = (image * padded.shape[1] + tile_row * TILE + row) * padded.shape[2] + tile_column * TILE + column
    tiles = padded.flatten(0, 2).index_select(0, source)  # (36 * B * rows * columns, C)
    tiles = transformed_tiles(tiles.view(36, -1), padded.shape[-1])
    products = winograd_products(tiles, winograd_weights(weight), None)
    image, row, column = indices((batch_size, height, width), tiles)
    tile = (image * rows + row // TILE) * columns + column // TILE
    output = products.view(TILE * TILE, -1, weight.shape[0])[row % TILE * TILE + column % TILE, tile]
    output = output.view(batch_size, height, width, weight.shape[0])
    return output if bias is None else output + bias


def winograd_weight_gradient(feature_map: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Of `winograd`, for the gradient (B, H', W', out) of its output, zero beyond H and W: (out, in, 3, 3)."""
    output_transform = both_axes(OUTPUT_TRANSFORM, feature_map)
    total = feature_map.new_zeros(36, gradient.shape[-1], feature_map.shape[-1])
    for image, top, bottom in bands(feature_map):
        products = output_transform.T @ tiled(gradient[image, top:bottom]).reshape(TILE * TILE, -1)
        products = products.view(36, -1, gradient.shape[-1])
        total.baddbmm_(products.transpose(1, 2), winograd_tiles(padded_band(feature_map, image, top, bottom)))
    weight_gradient = both_axes(WEIGHT_TRANSFORM, feature_map).T @ total.flatten(1)
    return weight_gradient.T.reshape(*total.shape[1:], 3, 3)


class WinogradConvolution(torch.autograd.Function):
    """`winograd`, which keeps only its input and its weight for the way back."""

    @staticmethod
    def forward(ctx, feature_map, weight, bias):
        ctx.save_for_backward(feature_map, weight)
        return winograd(feature_map, winograd_weights(weight), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        feature_map, weight = ctx.saved_tensors
        map_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            _, height, width, _ = feature_map.shape
            map_gradient = winograd(gradient, winograd_weights(weight.flip(2, 3).transpose(0, 1)))
            map_gradient = map_gradient[:, :height, :width]
        if ctx.needs_input_grad[1]:
            weight_gradient = winograd_weight_gradient(feature_map, gradient)
        if ctx.needs_input_grad[2]:
            bias_gradient = gradient.sum((0, 1, 2))
        return map_gradient, weight_gradient, bias_gradient


def is_winograd_faster(feature_map: torch.Tensor, weight: torch.Tensor) -> bool:
    """
    Measured on CPUs: a quarter of the products pays for the transforms on wide maps that are not small. Traced, its
    steps would keep all that lies between them for the way back.
    """
    is_traced = torch.compiler.is_compiling()
    return (
        min(weight.shape[:2]) >= 128
        and feature_map.device.type == "cpu"
        and feature_map.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not (is_traced and torch.is_grad_enabled() and not torch.compiler.is_exporting())
        and not statically_known_true(feature_map.shape[-2] * feature_map.shape[-1] < 1024)
    )


def convolve(
    feature_map: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    owner: torch.Tensor | None = None,
) -> torch.Tensor:
    """A 1x1 or 3x3 convolution that keeps the size: (B, in, H, W) -> (B, out, H, W). `owner` is the parameter that
    `weight` is made of, where it is not that itself."""
    if weight.shape[-1] == 1:
        positions = feature_map.permute(0, 2, 3, 1)
        return nn.functional.linear(positions, weight.flatten(1), bias).permute(0, 3, 1, 2)
    if not is_winograd_faster(feature_map, weight):
        return nn.functional.conv2d(feature_map, weight, bias, padding=1)
    positions = feature_map.permute(0, 2, 3, 1)
    owner = weight if owner is None else owner
    if torch.compiler.is_compiling():
        output = traced_winograd(positions, weight, bias)
    elif torch.is_grad_enabled():
        _kept_weights.pop(owner, None)
        output = WinogradConvolution.apply(positions, weight, bias)
    else:
        output = winograd(positions, kept_winograd_weights(weight, owner), bias)
    return output.permute(0, 3, 1, 2)[..., : feature_map.shape[2], : feature_map.shape[3]]


def shifted_upsampling(length: int, coarse_length: int, like: torch.Tensor) -> torch.Tensor:
    """(length, coarse_length * 3): one axis's bilinear resizing (corners not aligned), then its shift by each of the
    three taps of a convolution, zeros moving in at the ends."""
    position = torch.arange(length, device=like.device)[:, None, None] + torch.arange(-1, 2, device=like.device)
    dtype = torch.promote_types(like.dtype, torch.float32)
    source = ((position.to(dtype) + 0.5) * coarse_length / length - 0.5).clamp(0, coarse_length - 1)
    weights = 1 - (source - torch.arange(coarse_length, device=like.device)[:, None]).abs()
    is_inside = (position >= 0) & (position < length)
    return (weights.clamp(min=0) * is_inside).to(like.dtype).flatten(1)


def convolve_pyramid(
    levels: Sequence[torch.Tensor],
    weight: torch.Tensor,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The convolution of all levels, resized to the first one's size and concatenated, without doing either.

    A convolution mixes channels and a resizing positions, so each of the nine taps can be applied before the resizing:
    where a level has a sixteenth of the positions, so has the work. Resizing and shifting by the tap is a product with
    a small constant matrix along each axis.

    Args:
        levels: (B, C_0, H, W) and any number of coarser (B, C_i, H_i, W_i).
        weight: (out, C_0 + C_1 + ..., 3, 3), or 1x1 for one level.
        scale: Of the output's channels, (out,), before the bias is added.
        bias: (out,).

    Returns:
        (B, out, H, W).
    """
    finest, *coarser = levels
    height, width = finest.shape[2:]
    finest_weight, *weights = weight.split([level.shape[1] for level in levels], dim=1)
    if scale is not None:
        finest_weight = finest_weight * scale[:, None, None, None]
    output = convolve(finest, finest_weight, bias, owner=weight)
    if not coarser:
        return output

    output = output.permute(0, 2, 3, 1)
    coarser = [level.permute(0, 2, 3, 1) for level in coarser]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        upsampling, add = shifted_upsampling, add_coarser_levels
    else:
        upsampling, add = upsampling_blocks, add_coarser_levels_in_place
    rows = [upsampling(height, level.shape[1], output) for level in coarser]
    columns = [upsampling(width, level.shape[2], output) for level in coarser]
    if torch.compiler.is_compiling():  # one graph, for any number of images
        taps = [taps_of(level_weight, scale) for level_weight in weights]
        return add(output, coarser, taps, rows, columns).permute(0, 3, 1, 2)

    # Some channels of one image at a time, so that what lies between the products stays in cache.
    summed = []
    for start in range(0, weight.shape[0], 64):
        channels = slice(start, start + 64)
        taps = [
            taps_of(level_weight[channels], None if scale is None else scale[channels]) for level_weight in weights
        ]
        images = zip(*(level.split(1) for level in (output[..., channels], *coarser)), strict=True)
        images = [add(image, levels, taps, rows, columns) for image, *levels in images]
        if torch.is_grad_enabled():
            summed.append(torch.cat(images))
    return (torch.cat(summed, dim=-1) if summed else output).permute(0, 3, 1, 2)


def taps_of(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """(out, in, 3, 3) -> (3, 3, out, in), the outputs scaled."""
    taps = weight.permute(2, 3, 0, 1)
    return taps if scale is None else taps * scale[:, None]


def tapped(level: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    """(B, h, w, C) by taps (3, 3, group, C): (B, h * 3, w * 3 * group)."""
    by_rows_of_taps = [nn.functional.linear(level, side.flatten(0, 1)).flatten(2) for side in taps]
    return torch.stack(by_rows_of_taps, dim=2).flatten(1, 2)


def add_coarser_levels(
    partial: torch.Tensor,
    levels: Sequence[torch.Tensor],
    taps: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    columns: Sequence[torch.Tensor],
) -> torch.Tensor:
    """(B, H, W, group), plus what each level (B, h, w, C) contributes through its taps (3, 3, group, C), resized by
    (H, h * 3) and (W, w * 3)."""
    batch_size, height, width, group = partial.shape
    total = partial.flatten(0, 1)
    for level, tap, row, column in zip(levels, taps, rows, columns, strict=True):
        resized = torch.bmm(row.expand(batch_size, -1, -1), tapped(level, tap))  # (B, H, w * 3 * group)
        resized = resized.view(batch_size * height, -1, group)
        total = torch.baddbmm(total, column.expand(batch_size * height, -1, -1), resized)
    return total.view(batch_size, height, width, group)


def upsampling_blocks(length: int, coarse_length: int, like: torch.Tensor) -> list[tuple[slice, slice, torch.Tensor]]:
    """`shifted_upsampling` in blocks without most of its zeros: the rows, the columns, and the matrix there."""
    matrix, blocks = shifted_upsampling(length, coarse_length, like), []
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        # The coarse position before the first one's left neighbour, and that before the last one's right neighbour.
        first, last = (((2 * row + 1) * coarse_length - length) // (2 * length) for row in (start - 1, end))
        rows, columns = slice(start, end), slice(3 * max(first, 0), 3 * min(last + 2, coarse_length))
        blocks.append((rows, columns, matrix[rows, columns]))
    return blocks


def add_coarser_levels_in_place(
    total: torch.Tensor,
    levels: Sequence[torch.Tensor],
    taps: Sequence[torch.Tensor],
    rows: Sequence[list],
    columns: Sequence[list],
) -> torch.Tensor:
    """`add_coarser_levels` to one image (1, H, W, group), by `upsampling_blocks`: the work then grows with the number
    of positions, where that of whole matrices grows with its square."""
    _, height, _, group = total.shape
    for level, tap, row_blocks, column_blocks in zip(levels, taps, rows, columns, strict=True):
        level = tapped(level, tap)[0]
        resized = level.new_empty(height, level.shape[1])
        for positions, coarse, matrix in row_blocks:
            torch.mm(matrix, level[coarse], out=resized[positions])
        resized = resized.unflatten(1, (-1, group))  # (H, w * 3, group)
        for positions, coarse, matrix in column_blocks:
            total[0, :, positions].baddbmm_(matrix.expand(height, -1, -1), resized[:, coarse])
    return total
