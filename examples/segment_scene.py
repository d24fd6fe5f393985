#!/usr/bin/env python
"""Segments a held-out generated scene with `pipeline("image-segmentation")` and draws the overlay.

python examples/segment_scene.py outputs/quickstart
"""

import sys
from pathlib import Path

import numpy as np
from transformers import pipeline

import twins_hf  # noqa: F401  registers the Twins classes
from twins_hf.data import load_scenes
from twins_hf.visualization import comparison


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/quickstart")
    image = load_scenes()["validation"][0]["image"]

    segment = pipeline("image-segmentation", str(folder))
    segments = segment(image)

    id2label = segment.model.config.id2label
    label2id = {label: class_id for class_id, label in id2label.items()}
    label_map = np.zeros((image.height, image.width), dtype=np.int64)
    for found in segments:
        mask = np.asarray(found["mask"]) > 0
        label_map[mask] = label2id[found["label"]]
        print(f"{found['label']:<40} {100 * mask.mean():5.1f} % of the picture")
    path = folder / "pipeline.png"
    comparison(image, label_map, id2label).save(path)
    print(f"The overlay is in {path}")


if __name__ == "__main__":
    main()
