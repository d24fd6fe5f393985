#!/usr/bin/env python
"""Segments a held-out generated scene with `pipeline("image-segmentation")` and draws it beside the ground truth.

python examples/segment_scene.py outputs/quickstart
"""

import sys
from pathlib import Path

import numpy as np
from transformers import pipeline

import twins_hf  # noqa: F401  registers the Twins classes
from twins_hf.data import load_scenes
from twins_hf.image_processing_pil_twins import reduce_labels
from twins_hf.visualization import comparison


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/quickstart")
    scene = load_scenes()["validation"][0]
    scene["image"].save(folder / "scene.png")

    segment = pipeline("image-segmentation", str(folder))
    id2label = segment.model.config.id2label
    label2id = {label: class_id for class_id, label in id2label.items()}
    label_map = np.zeros((scene["image"].height, scene["image"].width), dtype=np.int64)
    for found in segment(str(folder / "scene.png")):
        mask = np.asarray(found["mask"]) > 0
        label_map[mask] = label2id[found["label"]]
        print(f"{found['label']:<42} {100 * mask.mean():5.1f} % of the picture")

    path = folder / "pipeline.png"
    comparison(scene["image"], label_map, id2label, reduce_labels(np.asarray(scene["label"]))).save(path)
    print(f"The picture is in {path}")


if __name__ == "__main__":
    main()
