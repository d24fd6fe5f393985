# Copyright 2026 The twins_hf contributors. Licensed under the Apache License, Version 2.0.
"""
Bilinear resizing in the fixed-point arithmetic that OpenCV has for 8-bit images, bit for bit: pixel centres aligned,
without antialiasing.
"""

import numpy as np
import torch

BAND_PIXELS = 2**14  # of a band of rows: its channels are 197 kB in 32 bits; more may come anew from the system
BYTE_SHIFTS = np.array([0, 8, 16], np.int32).reshape(3, 1, 1)  # of a packed pixel's channels


def bilinear_weights(old: int, new: int, is_width: bool) -> tuple[np.ndarray, ...]:
    """
    For each of `new` positions along a side of `old`, the two that it lies between and their weights in 2048ths, as
    OpenCV rounds them. Beyond the first and last column it takes that column alone; beyond a row, that row twice.
    """
    positions = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    lower = np.floor(positions).astype(np.int64)
    upper_weight = positions - lower.astype(np.float32)
    if is_width:
        upper_weight[(lower < 0) | (lower >= old - 1)] = 0
    weights = (np.rint(weight * np.float32(2048)).astype(np.int32) for weight in (1 - upper_weight, upper_weight))
    return lower.clip(0, old - 1), (lower + 1).clip(0, old - 1), *weights


def bands(height: int, width: int) -> list[slice]:
    """Rows, a few at a time."""
    count = max(1, BAND_PIXELS // width)
    return [slice(first, min(first + count, height)) for first in range(0, height, count)]


def pack_pixels(image: np.ndarray) -> np.ndarray:
    """RGB image (3, H, W), uint8 -> pixels (H, W), int32: red in the lowest byte, then green, then blue."""
    red, green, blue = image
    pixels = blue.astype(np.int32, order="C")
    for channel in (green, red):
        pixels <<= 8
        pixels |= channel
    return pixels


class BilinearResize:
    """
    RGB image, (3, H, W), uint8, or packed as `pack_pixels` does, (H, W), int32, resized to `size` (height, width), of
    which only the box (top, left, height, width) is computed, a band of its rows at a time; mirrored, its right column
    comes first.
    """

    def __init__(
        self,
        image: np.ndarray,
        size: tuple[int, int],
        box: tuple[int, int, int, int] | None = None,
        is_mirrored: bool = False,
    ):
        top, left, height, width = box or (0, 0, *size)
        rows, columns = (
            bilinear_weights(old, new, is_width)
            for old, new, is_width in zip(image.shape[-2:], size, (False, True), strict=True)
        )
        self.rows = [side[top : top + height] for side in rows]
        columns = [side[left : left + width] for side in columns]
        first, last = columns[0][0], columns[1][-1]
        self.image = image[..., first : last + 1]
        left, right, *self.column_weights = (side[::-1] for side in columns) if is_mirrored else columns
        self.columns = left - first, right - first

    def band(self, rows: slice) -> np.ndarray:
        """These rows of the box: (3, rows, width), int32, whole grey levels 0..255."""
        top, bottom, *row_weights = (side[rows] for side in self.rows)
        pixels = self.image[..., top[0] : bottom[-1] + 1, :]
        if pixels.ndim == 3:
            pixels = pack_pixels(pixels)
        # what takes longest is to gather, and a pixel takes no longer than one of its channels
        value, other = (pixels.take(columns, axis=1, mode="clip") >> BYTE_SHIFTS for columns in self.columns)
        for side, weight in zip((value, other), self.column_weights, strict=True):
            side &= 255
            side *= weight
        value += other
        value >>= 4

        value, other = (value.take(side - top[0], axis=1, mode="clip") for side in (top, bottom))
        for side, weight in zip((value, other), row_weights, strict=True):
            side *= weight[:, None]
            side >>= 16
        value += other
        value += 2
        value >>= 2
        return value


def resize_bilinear(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image as [`BilinearResize`] takes it, at `size` (height, width): (3, *size), uint8."""
    if image.shape[-2:] == tuple(size):
        return image if image.ndim == 3 else (image >> BYTE_SHIFTS).astype(np.uint8)
    resize = BilinearResize(image, size)
    resized = np.empty((3, *size), np.uint8)
    for rows in bands(*size):
        resized[:, rows] = resize.band(rows)
    return resized


def resize_bilinear_whole(image, size: tuple[int, int]):
    """
    Image (C, H, W), int32 array or tensor on any device, at `size` (height, width). The plain twin of
    `resize_bilinear`, several times slower on a CPU.
    """
    if tuple(image.shape[1:]) == tuple(size):
        return image
    rows, columns = bilinear_weights(image.shape[1], size[0], False), bilinear_weights(image.shape[2], size[1], True)
    if isinstance(image, torch.Tensor):
        rows, columns = ([torch.from_numpy(array).to(image.device) for array in side] for side in (rows, columns))
    left, right, left_weight, right_weight = columns
    image = (image[..., left] * left_weight + image[..., right] * right_weight) >> 4
    top, bottom, top_weight, bottom_weight = rows
    upper = (image[..., top, :] * top_weight[:, None]) >> 16
    lower = (image[..., bottom, :] * bottom_weight[:, None]) >> 16
    return (upper + lower + 2) >> 2
