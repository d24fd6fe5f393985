"""The run itself, as users start it: `accelerate launch scripts/run_semseg.py`."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TINY, image_folder
from hub_server import HubServer
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from training_runs import launch, options, results_of, run_changed, run_here
from transformers import pipeline

from twins_hf import TwinsConfig, TwinsForImageClassification, TwinsImageProcessor
from twins_hf.conversion import export_state_dict
from twins_hf.data import load_segmentation_data
from twins_hf.publishing import CODE
from twins_hf.training import DataArguments, ModelArguments
from twins_hf.training.preparation import build_image_processor, build_model, find_pretrained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of one process, its data and its log."""
    root = tmp_path_factory.mktemp("run")
    photos = image_folder.__wrapped__(root)
    finished = launch(*options(photos, root / "whole", save_steps=2))
    assert finished.returncode == 0, finished.stderr[-3000:]
    return photos, root / "whole", finished.stderr


def test_a_run_leaves_model_processor_scores_card_and_pictures(trained):
    photos, folder, log = trained
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "per_class.md", "README.md"):
        assert (folder / name).is_file()
    results = json.loads((folder / "all_results.json").read_text())
    assert 0 <= results["eval_mean_iou"] <= 1
    assert {"eval_mean_accuracy", "eval_overall_accuracy", "train_loss", "eval_samples_per_second"} <= results.keys()
    assert results["eval_per_category_iou"].keys() == {"red", "green", "blue"}
    assert [path.name for path in (folder / "overlays").iterdir()] == ["photo_0.png"]
    assert PIL.Image.open(folder / "overlays" / "photo_0.png").width > 3 * 70
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-segmentation"
    assert card.data.eval_results[0].metric_value == results["eval_mean_iou"]
    for text in (
        "photos: 4 training and 2 validation images, 3 classes",
        "4 iterations of 2 crops of 48x48",
        "| red |",
    ):
        assert text in card.text
    for text in ("Running on 1 process", "iteration 4/4: loss", "images/s", "to go", "mean IoU"):
        assert text in log


def test_the_saved_folder_segments_through_the_pipeline(trained):
    photos, folder, _ = trained
    image = PIL.Image.open(photos / "images" / "validation" / "photo_0.png")
    found = pipeline("image-segmentation", str(folder))(image)
    assert {entry["label"] for entry in found} <= {"red", "green", "blue"}
    assert sum(np.asarray(entry["mask"]) > 0 for entry in found).min() == 1  # every pixel has one class


def test_eval_only_repeats_the_score_of_the_run(trained, tmp_path):
    photos, folder, _ = trained
    words = options(photos, tmp_path / "scores", config_overrides=None, eval_only="true", model_name_or_path=folder)
    finished = launch(*words)
    assert finished.returncode == 0, finished.stderr[-3000:]
    expected = {name: value for name, value in results_of(folder).items() if name.startswith("eval_")}
    assert results_of(tmp_path / "scores") == expected
    for picture in ("per_class.png", "confusion_matrix.png", "worst"):
        assert (tmp_path / "scores" / picture).exists()


def test_a_killed_evaluation_goes_on_where_it_was(trained, tmp_path):
    """By multi-scale windows, with label maps saved."""
    photos, folder, _ = trained
    changed = {"eval_only": "true", "model_name_or_path": folder, "inference_mode": "slide", "flip": "true"}
    scales = ["--scales", "1.0", "1.5"]
    words = [options(photos, tmp_path / name, config_overrides=None, **changed) + scales for name in ("one", "two")]
    assert launch(*words[0], "--save_predictions", "true").returncode == 0
    values = np.unique(
        [np.unique(PIL.Image.open(path)).max() for path in (tmp_path / "one" / "predictions").iterdir()]
    )
    assert values.max() <= 2 and len(list((tmp_path / "one" / "predictions").iterdir())) == 2

    kill = (  # when the first image has been written down
        "import twins_hf.evaluation as evaluation\n"
        "add = evaluation.EvaluationLog.add\n"
        "evaluation.EvaluationLog.add = lambda *args: (add(*args), os.kill(os.getpid(), 9))"
    )
    assert run_changed(kill, *words[1]).returncode == -9
    finished = launch(*words[1])
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert results_of(tmp_path / "two") == results_of(tmp_path / "one")
    assert not (tmp_path / "two" / "evaluation-in-progress").exists()


def test_two_processes_score_exactly_as_one_also_on_an_uneven_set(trained, tmp_path):
    photos, folder, _ = trained
    shutil.copytree(photos, tmp_path / "photos")
    for kind in ("images", "annotations"):  # three validation images
        source = tmp_path / "photos" / kind
        shutil.copy(source / "training" / "photo_3.png", source / "validation" / "photo_9.png")
    shared = {"config_overrides": None, "eval_only": "true", "model_name_or_path": folder}
    for processes, batch_size in ((1, 4), (2, 1)):
        shared["per_device_eval_batch_size"] = batch_size
        words = options(tmp_path / "photos", tmp_path / f"scores_{processes}", **shared)
        finished = launch(*words, processes=processes)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert f"Running on {processes} process(es)" in finished.stderr
    assert results_of(tmp_path / "scores_2") == results_of(tmp_path / "scores_1")
    assert results_of(tmp_path / "scores_1")["eval_samples"] == 3


def test_accumulated_forward_passes_in_bfloat16_make_an_iteration(trained, tmp_path):
    photos, _, _ = trained
    changed = {"gradient_accumulation_steps": 2, "mixed_precision": "bf16", "save_steps": 1, "save_total_limit": 2}
    finished = launch(*options(photos, tmp_path / "run", **changed))
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "4 images, 4 crops an iteration" in finished.stderr
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("*checkpoint-*"))
    assert checkpoints == ["checkpoint-3", "checkpoint-4"]
    assert math.isfinite(results_of(tmp_path / "run")["train_loss"])
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for name, weight in weights.items() if name.endswith("weight")} == {torch.float32}


def test_a_pushed_run_loads_from_the_hub(trained, tmp_path):
    photos, _, _ = trained
    code = (
        "import sys\n"
        "from transformers import AutoModelForSemanticSegmentation, AutoImageProcessor\n"
        "model = AutoModelForSemanticSegmentation.from_pretrained('tester/shapes', trust_remote_code=True)\n"
        "AutoImageProcessor.from_pretrained('tester/shapes', trust_remote_code=True)\n"
        "assert 'twins_hf' not in sys.modules\n"
        "model.save_pretrained(sys.argv[1])\n"
    )
    with HubServer() as hub:
        network = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        words = options(photos, tmp_path / "run", push_to_hub="true", hub_model_id="tester/shapes", save_steps=2)
        finished = launch(*words, **network)
        assert finished.returncode == 0, finished.stderr[-3000:]
        files = hub.repositories["tester/shapes"]
        expected = {"model.safetensors", "config.json", "preprocessor_config.json", "all_results.json", "README.md"}
        expected |= {
            "per_class.md",
            "per_class.png",
            "confusion_matrix.png",
            "training.png",
            "overlays/photo_0.png",
            *(f"{name}.py" for name in CODE),
        }
        assert files.keys() == expected
        environment = {**os.environ, **network, "HF_HOME": str(tmp_path / "cache")}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "loaded")], env=environment, check=True)
        refused = launch(*words, "--overwrite_output_dir", "true", **{**network, "HF_TOKEN": "hf_wrong"})
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "loaded"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert refused.returncode == 1 and "Training on" not in refused.stderr


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"output_dir": "{photos}/id2label.json"}, "--output_dir .*id2label.json cannot be written to"),
        ({"output_dir": "{folder}"}, "--output_dir .*already holds a run"),
        ({"dataset_name": "{folder}"}, "has neither images/ nor parquet files"),
        (
            {"model_name_or_path": "{folder}", "id2label": "{names}"},
            "has 3 classes but .* has 4.*ignore_mismatched_sizes",
        ),
        ({"report_to": "swanlab"}, "--report_to swanlab: that tracker is not installed"),
        ({"resume_from_checkpoint": "{folder}/nothing"}, "--resume_from_checkpoint .*: there is no such folder"),
        ({"config_overrides": '{"depths": [1]}'}, r"depths=\[1\] must be four"),
    ],
)
def test_what_can_be_known_before_ends_in_one_sentence(trained, tmp_path, changed, message):
    photos, folder, _ = trained
    names = tmp_path / "names.json"
    names.write_text(json.dumps(dict(enumerate("abcd"))))
    paths = {"photos": photos, "folder": folder, "names": names}
    if "depths" not in changed.get("config_overrides", ""):
        changed = {name: value.format(**paths) for name, value in changed.items()}
    with pytest.raises((ValueError, OSError, StrictDataclassError), match=message):
        run_here(*options(photos, tmp_path / "out", **changed))


def test_the_script_ends_with_that_sentence_alone(trained, tmp_path):
    photos, folder, _ = trained
    finished = launch(*options(photos, folder))
    assert finished.returncode == 1
    assert re.search(r"error: --output_dir .*already holds a run", finished.stderr)
    assert "Training on" not in finished.stderr and "run_semseg.py" not in finished.stderr.split("error:")[1][:200]


@pytest.mark.parametrize("source", ["this library", "timm"])
def test_an_imagenet_checkpoint_gives_its_encoder_but_neither_processor_nor_missing_norms(
    image_folder, tmp_path, source
):
    (tmp_path / "imagenet").mkdir()
    if source == "timm":
        classifier = TwinsForImageClassification(TwinsConfig.from_variant("svt-s", num_labels=10))
        save_file(export_state_dict(classifier, "timm"), tmp_path / "imagenet" / "model.safetensors")
        (tmp_path / "imagenet" / "config.json").write_text('{"architecture": "twins_svt_small"}')
    else:
        config = TwinsConfig(**TINY, window_sizes=[7, 7, 7, 7], num_labels=10)
        classifier = TwinsForImageClassification(config)
        classifier.save_pretrained(tmp_path / "imagenet")
        processor = TwinsImageProcessor(size={"shortest_edge": 256}, crop_size=224, do_center_crop=True)
        processor.save_pretrained(tmp_path / "imagenet")
    model_args = ModelArguments(model_name_or_path=str(tmp_path / "imagenet"))
    data = load_segmentation_data(str(image_folder))
    pretrained = find_pretrained(model_args, tmp_path)
    model = build_model(model_args, pretrained, data, eval_only=False)
    assert model.config.norm_after_stage and model.config.num_labels == 3
    assert (model.config.window_padding, model.config.decoder_type) == ("mmseg", "upernet")
    overrides = ModelArguments(model_args.model_name_or_path, config_overrides='{"decoder_type": "fpn"}')
    fpn = build_model(overrides, pretrained, data, eval_only=False)
    assert fpn.config.decoder_hidden_size == 256 and fpn.auxiliary_head is None
    name = "stages.1.layers.0.attention.qkv_proj.weight"
    assert torch.equal(model.twins.state_dict()[name], classifier.twins.state_dict()[name])
    image_processor = build_image_processor(pretrained, DataArguments(crop_size=64), data)
    assert not image_processor.do_center_crop and image_processor.crop_size.height == 64
    assert dict(image_processor.size) == {"shortest_edge": 512, "longest_edge": 2048}
