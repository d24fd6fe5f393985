"""What happens between the iterations: options that save memory or time, reports, and what ends a run."""

import json
import logging
import math
import re
import shutil

import PIL.Image
import pytest
import torch
from conftest import TINY, image_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import are_equal, options, results_of, run_changed, run_here, weights_of

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation
from twins_hf.data import load_segmentation_data
from twins_hf.training import TrainingStopped, loop, parse_arguments, prepare_run
from twins_hf.training.checkpoints import find_damage


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The data and the folder of a run that has every checkpoint from before the first iteration to the last."""
    root = tmp_path_factory.mktemp("run")
    photos = image_folder.__wrapped__(root)
    run_here(*options(photos, root / "plain", save_steps=1, save_total_limit=0))
    return photos, root / "plain"


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO)
    return lambda: caplog.text


def initial_weights(**changed):
    """What a run of seed 42 starts from."""
    torch.manual_seed(42)
    return TwinsForSemanticSegmentation(
        TwinsConfig.from_variant("svt-s", num_labels=3, **{**TINY, **changed})
    ).state_dict()


def assert_close(folder, other):
    """The weights moved alike: AdamW makes steps of rounding where a gradient is next to nothing, so that single ones
    differ, but all together by less than a hundredth of their way."""
    before, ours, theirs = initial_weights(), weights_of(folder), weights_of(other)
    names = [name for name in ours if ours[name].is_floating_point()]
    apart = sum((ours[name] - theirs[name]).square().sum() for name in names)
    way = sum((theirs[name] - before[name]).square().sum() for name in names)
    assert apart.sqrt() < 0.01 * way.sqrt()


def test_gradient_checkpointing_changes_no_weight(plain, tmp_path):
    photos, folder = plain
    prepared, _ = run_here(*options(photos, tmp_path, gradient_checkpointing="true"))
    assert prepared.model.is_activation_checkpointing
    assert_close(tmp_path, folder)


def test_a_compiled_run_ends_with_the_weights_of_a_plain_one(plain, tmp_path):
    photos, folder = plain
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run_here(*options(photos, tmp_path, torch_compile_backend="eager"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_close(tmp_path, folder)


def test_averaged_weights_are_the_moving_average_over_iterations(plain, tmp_path):
    photos, folder = plain
    run_here(*options(photos, tmp_path, ema_decay=0.75))
    expected = weights_of(folder / "checkpoint-1")
    for step in (2, 3, 4):
        for name, weight in weights_of(folder / f"checkpoint-{step}").items():
            is_averaged = "running" not in name and "num_batches" not in name
            expected[name] = 0.75 * expected[name] + 0.25 * weight if is_averaged else weight
    for name, weight in weights_of(tmp_path).items():
        torch.testing.assert_close(weight, expected[name])
    assert not are_equal(tmp_path, folder)


def test_a_frozen_encoder_stays_as_it_was_and_the_heads_learn(plain, tmp_path):
    photos, _ = plain
    run_here(*options(photos, tmp_path, freeze_encoder="true"))
    before = initial_weights()
    for name, weight in weights_of(tmp_path).items():
        if name.startswith("twins."):
            assert torch.equal(weight, before[name]), name
        elif "weight" in name:
            assert not torch.equal(weight, before[name]), name


def test_lora_changes_the_encoders_linear_layers_by_matrices_of_low_rank_and_saves_a_plain_model(plain, tmp_path):
    photos, _ = plain
    run_here(*options(photos, tmp_path, lora_rank=2, learning_rate=0.02))
    before, after = initial_weights(), weights_of(tmp_path)
    assert after.keys() == before.keys()
    linear = [name for name in after if name.startswith("twins.") and re.search(r"(_proj|fc\d)\.weight$", name)]
    for name in linear:
        singular_values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert singular_values[1] > 100 * singular_values[2] and singular_values[2] < 1e-6, name
    others = [name for name in after if name.startswith("twins.") and name not in linear]
    assert len(linear) == 4 * (2 + 3 + 2 * 2) and all(torch.equal(after[name], before[name]) for name in others)


def test_a_total_batch_size_is_split_into_forward_passes(plain, tmp_path):
    photos, _ = plain
    run_here(*options(photos, tmp_path / "split", total_train_batch_size=8))
    run_here(*options(photos, tmp_path / "given", gradient_accumulation_steps=4))
    assert are_equal(tmp_path / "split", tmp_path / "given")
    with pytest.raises(ValueError, match="--total_train_batch_size 9 leaves 9 crops to each of 1 process"):
        run_here(*options(photos, tmp_path / "uneven", total_train_batch_size=9))


def test_where_memory_runs_out_forward_passes_become_smaller_and_the_result_stays(
    plain, tmp_path, monkeypatch, messages
):
    photos, _ = plain
    run_here(*options(photos, tmp_path / "fitting", total_train_batch_size=8, ema_decay=0.5))
    forward, passes = TwinsForSemanticSegmentation.forward, []

    def forward_with_little_memory(self, pixel_values, **kwargs):
        passes.append(len(pixel_values))
        if passes[-1] > 4 or passes[-1] == 4 == passes.count(4):  # 8 never fit, 4 for an iteration and a half
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GB.")
        return forward(self, pixel_values, **kwargs)

    monkeypatch.setattr(TwinsForSemanticSegmentation, "forward", forward_with_little_memory)
    changed = {"total_train_batch_size": 8, "per_device_train_batch_size": 8, "ema_decay": 0.5}
    prepared, _ = run_here(*options(photos, tmp_path / "run", auto_find_batch_size="true", **changed))
    assert prepared.batch_size == 2 and passes[:5] == [8, 4, 4, 4, 4]
    assert "Out of memory with 8 crops a forward pass: trying 4" in messages()
    assert are_equal(tmp_path / "run", tmp_path / "fitting")
    monkeypatch.setattr(
        TwinsForSemanticSegmentation,
        "forward",
        lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")),
    )
    with pytest.raises(TrainingStopped, match="memory does not suffice for forward passes of 2 crops"):
        run_here(*options(photos, tmp_path / "none", auto_find_batch_size="true", **changed))


def test_clipped_gradients_leave_the_weights_where_they_are(plain, tmp_path):
    photos, _ = plain
    run_here(*options(photos, tmp_path, max_grad_norm=1e-13, weight_decay=0))
    before = initial_weights()
    for name, weight in weights_of(tmp_path).items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)


def break_loss(monkeypatch, is_broken):
    """Makes the loss of those forward passes infinite whose number, from 1, is broken."""
    segmentation_loss, calls = TwinsForSemanticSegmentation.segmentation_loss, []

    def broken(self, logits, labels):
        calls.append(1)
        loss = segmentation_loss(self, logits, labels)
        return (
            loss * math.inf if is_broken((len(calls) + 1) // 2) else loss
        )  # the auxiliary head makes a call of its own

    monkeypatch.setattr(TwinsForSemanticSegmentation, "segmentation_loss", broken)


def test_a_loss_that_is_not_finite_ends_the_run_with_the_state_from_before_it(plain, tmp_path, monkeypatch):
    photos, folder = plain
    words = options(photos, tmp_path)
    with monkeypatch.context() as context:
        break_loss(context, lambda number: number == 3)
        with pytest.raises(TrainingStopped) as stopped:
            run_here(*words)
    message = str(stopped.value)
    assert (
        "the loss of iteration 3 is not finite; its batch: " in message and f"{tmp_path}/checkpoint-2 holds" in message
    )
    assert len(re.findall(r"training/photo_\d\.png", message)) == 2
    assert are_equal(tmp_path / "checkpoint-2", folder / "checkpoint-2")
    run_here(*words, "--resume_from_checkpoint", "latest")
    assert are_equal(tmp_path, folder)


def test_as_many_iterations_as_allowed_are_left_out_and_named(plain, tmp_path, monkeypatch, messages):
    photos, folder = plain
    break_loss(monkeypatch, lambda number: number == 2)
    _, results = run_here(*options(photos, tmp_path, max_nonfinite=1, save_steps=1, save_total_limit=0))
    assert results["train_nonfinite_steps"] == 1 and math.isfinite(results["train_loss"])
    assert re.search(r"Left out: the loss of iteration 2 is not finite; its batch: .*photo_\d", messages())
    assert are_equal(tmp_path / "checkpoint-2", folder / "checkpoint-1")
    assert not are_equal(tmp_path / "checkpoint-3", folder / "checkpoint-1")


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(plain, tmp_path, monkeypatch):
    photos, folder = plain

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * math.inf

    segmentation_loss = TwinsForSemanticSegmentation.segmentation_loss
    monkeypatch.setattr(
        TwinsForSemanticSegmentation, "segmentation_loss", lambda *args: Overflow.apply(segmentation_loss(*args))
    )
    with pytest.raises(TrainingStopped, match="the gradient norm of iteration 1 is not finite"):
        run_here(*options(photos, tmp_path))
    before = initial_weights()
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(tmp_path / "checkpoint-0").items())


def test_tensorboard_shows_figures_and_overlays_by_default(plain, tmp_path):
    photos, _ = plain
    prepared, results = run_here(*options(photos, tmp_path, report_to=None, eval_steps=2))
    (folder,) = {path.parent for path in (tmp_path / "runs").rglob("events*") if path.parent.name == "twins_hf"}
    events = EventAccumulator(str(folder)).Reload()
    expected = {"loss", "auxiliary_loss", "accuracy", "grad_norm", "images_per_second", "memory_gb"}
    expected |= {"learning_rate/decayed", "learning_rate/exempt"}
    assert {f"train/{name}" for name in expected} | {"eval/mean_iou"} <= set(events.Tags()["scalars"])
    assert [(event.step, round(event.value, 5)) for event in events.Scalars("eval/mean_iou")][-1] == (
        4,
        round(results["eval_mean_iou"], 5),
    )
    assert events.Tags()["images"] == ["overlays/photo_0"]
    for record in prepared.progress.history:
        assert all(math.isfinite(value) for name, value in record.items() if name.startswith("train/"))
    assert PIL.Image.open(tmp_path / "training.png").size[0] > 600


def test_the_reports_name_what_one_watches_a_run_for(plain, tmp_path, messages):
    photos, _ = plain
    run_here(*options(photos, tmp_path))
    assert re.search(
        r"iteration 4/4: loss [\d.]+ \(auxiliary [\d.]+\), accuracy [\d.]+, learning rate [\d.e-]+, gradient norm "
        r"[\d.]+, [\d.]+ images/s, [\d.]+ GB, [\d:]+ to go",
        messages(),
    )


def test_accuracy_is_the_share_of_labelled_pixels_that_are_right():
    outputs = type("Outputs", (), {})()
    outputs.loss, outputs.auxiliary_loss = torch.tensor(2.0), torch.tensor(1.0)
    outputs.logits = torch.zeros(1, 3, 2, 2)
    outputs.logits[0, 1] = 1.0
    window = loop.Window(0, torch.device("cpu"))
    labels = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0], [255, 255, 1, 1], [255, 255, 1, 1]]])
    for _ in range(2):
        window.add(outputs, labels, accumulation=2)
    accelerator = type("Alone", (), {"reduce": staticmethod(lambda sums, how: sums)})
    figures = window.figures(accelerator)
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert (figures["loss"], figures["auxiliary_loss"]) == (2.0, 1.0)


def damage_later(monkeypatch, path):
    """Cuts a file in half at the first report, when all files have been checked and read once."""
    report, whole = loop.report, path.read_bytes()

    def report_and_damage(*args):
        report(*args)
        path.write_bytes(whole[: len(whole) // 2])

    monkeypatch.setattr(loop, "report", report_and_damage)
    return whole


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_breaks_in_a_later_epoch_ends_the_run_by_name_and_it_goes_on_when_mended(
    plain, tmp_path, monkeypatch, messages, num_workers
):
    photos, _ = plain
    path = photos / "images" / "training" / "photo_1.png"
    changed = {"max_steps": 12, "save_steps": 1, "save_total_limit": 0, "dataloader_num_workers": num_workers}
    run_here(*options(photos, tmp_path / "whole", **changed))
    words = options(photos, tmp_path / "run", **changed)
    with monkeypatch.context() as context:
        whole = damage_later(context, path)
        try:
            with pytest.raises(TrainingStopped, match=r"iteration \d+: .*photo_1.png: cannot be read as an image .*"):
                run_here(*words)
        finally:
            path.write_bytes(whole)
    assert "To go on, give the same command again with --resume_from_checkpoint latest" in messages()
    assert all(find_damage(folder) is None for folder in (tmp_path / "run").glob("checkpoint-*"))
    run_here(*words, "--resume_from_checkpoint", "latest")
    assert are_equal(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_skips_corrupt_files_counts_and_names_them(plain, tmp_path, monkeypatch, messages):
    photos, _ = plain
    path = photos / "images" / "training" / "photo_1.png"
    whole = damage_later(monkeypatch, path)
    try:
        _, results = run_here(*options(photos, tmp_path, max_steps=12, skip_corrupt="true"))
    finally:
        path.write_bytes(whole)
    assert results["train_skipped_files"] == 1 and results_of(tmp_path)["train_skipped_files"] == 1
    assert re.search(r"Skipped .*photo_1.png", messages())


def test_a_killed_data_worker_ends_the_run_in_one_sentence(plain, tmp_path):
    photos, _ = plain
    kill = (
        "import multiprocessing, twins_hf.training.loop as loop\n"
        "report = loop.report\n"
        "def report_and_kill(*args):\n"
        "    report(*args)\n"
        "    for worker in multiprocessing.active_children():\n"
        "        os.kill(worker.pid, 9)\n"
        "loop.report = report_and_kill"
    )
    finished = run_changed(kill, *options(photos, tmp_path, max_steps=200, save_steps=1, dataloader_num_workers=1))
    assert finished.returncode == 1
    assert re.search(r"error: DataLoader worker \(pid \d+\) is killed by signal: Killed", finished.stderr)
    assert "To go on, give the same command again with --resume_from_checkpoint latest" in finished.stderr
    assert find_damage(tmp_path / "checkpoint-1") is None


@pytest.fixture(scope="module")
def tables(plain, tmp_path_factory):
    """The data as parquet files, with names of the classes."""
    folder = tmp_path_factory.mktemp("tables")
    stored = load_segmentation_data(str(plain[0]))
    for split, rows in stored.splits.items():
        for shard in range(2):
            rows.shard(2, shard).to_parquet(folder / f"{split}-{shard:05d}-of-00002.parquet")
    (folder / "id2label.json").write_text(json.dumps(stored.id2label))
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_on_a_streamed_set_goes_on_with_the_sample_that_was_due(tables, tmp_path, messages, num_workers):
    changed = {"streaming": "true", "save_steps": 3, "max_steps": 7, "dataloader_num_workers": num_workers}
    run_here(*options(tables, tmp_path / "whole", **changed))
    assert "Training on streamed images" in messages()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "resumed" / "checkpoint-3")
    run_here(*options(tables, tmp_path / "resumed", resume_from_checkpoint="latest", **changed))
    assert "Resumed from" in messages()
    assert are_equal(tmp_path / "resumed", tmp_path / "whole")
    assert "streamed training and 2 validation images" in (tmp_path / "whole" / "README.md").read_text()


def test_the_pieces_of_a_sharded_model_become_a_whole_one(plain, tmp_path):
    photos, _ = plain
    prepared = prepare_run(*parse_arguments(options(photos, tmp_path)))
    state_dict = {name: torch.zeros_like(value) for name, value in prepared.model.state_dict().items()}
    whole = loop.assemble(prepared, state_dict)
    assert all((value == 0).all() for value in whole.state_dict().values())
    assert not (tmp_path / ".whole-model").exists()
