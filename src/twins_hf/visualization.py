"""Pictures of segmentations: a palette, overlays and a legend."""

import colorsys
from collections.abc import Mapping

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont

MARGIN = 12  # pixels around the panels and the legend


def palette(num_labels: int) -> np.ndarray:
    """Distinct colours (num_labels, 3), uint8: hues by the golden ratio, saturation and value in turn."""
    colors = [
        colorsys.hsv_to_rgb(
            (class_id * 0.618034) % 1, (0.85, 0.55, 1.0)[class_id % 3], (0.95, 0.75)[class_id // 3 % 2]
        )
        for class_id in range(num_labels)
    ]
    return (np.array(colors) * 255).round().astype(np.uint8)


def overlay(
    image: PIL.Image.Image, label_map: np.ndarray, colors: np.ndarray, opacity: float = 0.6
) -> PIL.Image.Image:
    """
    Paints class ids (height, width) over an image of the same size; ids beyond the palette (255) are left unpainted.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    is_class = label_map < len(colors)
    pixels[is_class] += opacity * (colors[label_map[is_class]] - pixels[is_class])
    return PIL.Image.fromarray(pixels.round().astype(np.uint8))


def comparison(
    image: PIL.Image.Image,
    prediction: np.ndarray,
    id2label: Mapping[int, str],
    truth: np.ndarray | None = None,
) -> PIL.Image.Image:
    """
    A picture of photo, truth (where given) and prediction side by side, with a legend of the classes in them.

    Args:
        image: The photo.
        prediction: Class ids (height, width) of the same size.
        id2label: Name of each class id.
        truth: Labels (height, width); ids without a name (255) are left unpainted.
    """
    colors = palette(max(id2label) + 1)
    panels = {"image": image.convert("RGB")}
    if truth is not None:
        panels["ground truth"] = overlay(image, truth, colors)
    panels["prediction"] = overlay(image, prediction, colors)

    shown = np.unique(np.concatenate([array.ravel() for array in (prediction, truth) if array is not None]))
    names = {int(class_id): id2label[class_id].split(",")[0] for class_id in shown if class_id in id2label}
    font = ImageFont.load_default(size=15)
    line = 22  # pixels of a legend line
    entry_width = line + max(int(font.getlength(name)) for name in names.values()) + 2 * MARGIN
    width = len(panels) * (image.width + MARGIN) + MARGIN
    columns = max(1, (width - MARGIN) // entry_width)
    rows = -(-len(names) // columns)

    picture = PIL.Image.new(
        "RGB", (max(width, entry_width + MARGIN), image.height + 2 * MARGIN + (rows + 1) * line), "white"
    )
    draw = ImageDraw.Draw(picture)
    for position, (title, panel) in enumerate(panels.items()):
        left = MARGIN + position * (image.width + MARGIN)
        draw.text((left, MARGIN // 2), title, fill="black", font=font)
        picture.paste(panel, (left, MARGIN // 2 + line))
    for position, (class_id, name) in enumerate(names.items()):
        left = MARGIN + position % columns * entry_width
        top = image.height + MARGIN + line * (1 + position // columns)
        draw.rectangle((left, top + 3, left + 14, top + 17), fill=tuple(colors[class_id].tolist()))
        draw.text((left + line, top), name, fill="black", font=font)
    return picture
