"""Pictures of segmentations: a palette, overlays and a legend."""

import colorsys
from collections.abc import Mapping, Sequence

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


def bar_chart(names: Sequence[str], values: Sequence[float]) -> PIL.Image.Image:
    """Horizontal bars of values in [0, 1], the largest first, each with its name and percentage; nan is left out."""
    rows = sorted(((value, name) for name, value in zip(names, values, strict=True) if value == value), reverse=True)
    font, line, length = ImageFont.load_default(size=13), 18, 400
    left = MARGIN + max((int(font.getlength(name)) for _, name in rows), default=0) + MARGIN
    picture = PIL.Image.new("RGB", (left + length + 5 * MARGIN, 2 * MARGIN + line * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for position, (value, name) in enumerate(rows):
        top = MARGIN + position * line
        draw.text((left - MARGIN, top + line // 2), name, fill="black", font=font, anchor="rm")
        draw.rectangle((left, top + 2, left + round(length * value), top + line - 3), fill=(70, 110, 180))
        text = f"{100 * value:.1f}"
        draw.text((left + round(length * value) + 5, top + line // 2), text, fill="black", font=font, anchor="lm")
    return picture


def confusion_picture(matrix: np.ndarray, names: Sequence[str]) -> PIL.Image.Image:
    """
    A confusion matrix, pixels (label, prediction), as a grid: rows are labels, columns predictions in the same order,
    and the darker a cell, the larger its share of the row. Classes that occur in neither are left out.
    """
    occurs = (matrix.sum(axis=0) + matrix.sum(axis=1)) > 0
    matrix, names = matrix[np.ix_(occurs, occurs)], [name for name, shown in zip(names, occurs, strict=True) if shown]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cell = 14 if len(names) > 40 else 22
    font = ImageFont.load_default(size=cell - 4)
    left = 2 * MARGIN + max((int(font.getlength(name)) for name in names), default=0)
    grey = (255 * (1 - np.sqrt(shares))).round().astype(np.uint8).repeat(cell, 0).repeat(cell, 1)
    picture = PIL.Image.new("RGB", (left + grey.shape[1] + MARGIN, left + grey.shape[0] + MARGIN), "white")
    picture.paste(PIL.Image.fromarray(grey), (left, left))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left - 1, left - 1, left + grey.shape[1], left + grey.shape[0]), outline="black")
    column_names = PIL.Image.new("RGB", (left - MARGIN, grey.shape[0]), "white")
    column_draw = ImageDraw.Draw(column_names)
    for position, name in enumerate(names):
        middle = position * cell + cell // 2
        draw.text((left - MARGIN // 2, left + middle), name, fill="black", font=font, anchor="rm")
        column_draw.text((0, middle), name, fill="black", font=font, anchor="lm")
    picture.paste(column_names.transpose(PIL.Image.Transpose.ROTATE_90), (left, MARGIN // 2))
    return picture


def training_curves(history: Sequence[Mapping[str, float]]) -> PIL.Image.Image:
    """
    A run's figures over its iterations, a panel each: loss, auxiliary loss, accuracy and mean IoU.

    Args:
        history: Records with `step` and some of `train/loss`, `train/auxiliary_loss`, `train/accuracy` and
            `eval/mean_iou`.
    """
    figures = {
        "loss": "train/loss",
        "auxiliary loss": "train/auxiliary_loss",
        "accuracy in training": "train/accuracy",
        "mean IoU": "eval/mean_iou",
    }
    panels = []
    for title, key in figures.items():
        points = [(record["step"], record[key]) for record in history if np.isfinite(record.get(key, np.nan))]
        if points:
            panels.append(curve(title, *zip(*points, strict=True)))
    picture = PIL.Image.new("RGB", (panels[0].width, sum(panel.height for panel in panels)), "white")
    for position, panel in enumerate(panels):
        picture.paste(panel, (0, position * panel.height))
    return picture


def curve(title: str, steps: Sequence[int], values: Sequence[float]) -> PIL.Image.Image:
    """A line through the values, from 0 to a little above the largest, with the last one written beside it."""
    width, height, left = 640, 180, 60  # of the plotted area, and what stands before it
    font, top = ImageFont.load_default(size=13), 2 * MARGIN
    limit, last_step = 1.05 * max(*values, 1e-9), max(*steps, 1)
    picture = PIL.Image.new("RGB", (left + width + 6 * MARGIN, top + height + 3 * MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left, 4), f"{title}, by iteration", fill="black", font=font)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y, x = top + height * (1 - share), left + width * share
        draw.line((left, y, left + width, y), fill=(225, 225, 225))
        draw.text((left - 5, y), f"{share * limit:.3g}", fill="black", font=font, anchor="rm")
        draw.text((x, top + height + 3), f"{share * last_step:.0f}", fill="black", font=font, anchor="ma")
    points = [
        (left + width * step / last_step, top + height * (1 - max(value, 0.0) / limit))
        for step, value in zip(steps, values, strict=True)
    ]
    if len(points) > 1:
        draw.line(points, fill=(70, 110, 180), width=2)
    x, y = points[-1]
    draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(70, 110, 180))
    draw.text((x + 6, y), f"{values[-1]:.3g}", fill="black", font=font, anchor="lm")
    return picture
