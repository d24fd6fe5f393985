"""What is left of a run that ends early, and how it goes on."""

import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess

import pytest
from conftest import TINY
from training_runs import are_equal, launch_command, launch_environment, options, results_of, run_changed, run_here

from twins_hf import TwinsForSemanticSegmentation, TwinsImageProcessor
from twins_hf.training import TrainingStopped
from twins_hf.training.checkpoints import MANIFEST, checkpoint_folders, find_damage, put_in_place

# Everything that a checkpoint has to bring back: drop path and dropout draw from each process's random state.
RANDOM = {"config_overrides": json.dumps({**TINY, "drop_path_rate": 0.2}), "ema_decay": 0.9}


def checkpoints(folder):
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_any_time_ends_with_the_weights_of_an_uninterrupted_one(image_folder, tmp_path, processes):
    """SIGKILL to all its processes at a random iteration: once, or as often as TWINS_HF_KILLS says."""
    changed = {"max_steps": 20, "save_steps": 3, "eval_steps": 10, "logging_steps": 1, "dataloader_num_workers": 1}
    environment, command = launch_environment(), launch_command(processes)
    words = {name: options(image_folder, tmp_path / name, **changed, **RANDOM) for name in ("whole", "killed")}
    subprocess.run([*command, *words["whole"]], env=environment, check=True, capture_output=True)
    again = [*command, *words["killed"], "--resume_from_checkpoint", "latest"]
    kills = int(os.environ.get("TWINS_HF_KILLS", "1"))
    for last in sorted(random.Random(processes).sample(range(4, 20), kills)):
        process = subprocess.Popen(again, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        for line in process.stderr:
            iteration = re.search(r"iteration (\d+)/", line)
            if iteration and int(iteration[1]) >= last:
                break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finished = subprocess.run(again, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "Resumed from" in finished.stderr
    assert are_equal(tmp_path / "killed", tmp_path / "whole")
    assert are_equal(tmp_path / "killed" / "best", tmp_path / "whole" / "best")
    assert results_of(tmp_path / "killed") == results_of(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_an_iteration_with_a_checkpoint_and_advice(image_folder, tmp_path, number):
    words = options(image_folder, tmp_path / "run", max_steps=10_000, logging_steps=1, dataloader_num_workers=1)
    process = subprocess.Popen(
        [*launch_command(), *words],
        env=launch_environment(),
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = ""
    for line in process.stderr:
        log += line
        if "iteration 2/" in line:
            os.killpg(process.pid, number)  # the whole group, data workers too, as Ctrl-C and schedulers do
            break
    log += process.stderr.read()
    assert process.wait() != 0
    stopped = re.search(rf"error: stopped by {signal.Signals(number).name} after iteration (\d+) of 10000", log)
    assert stopped, log[-3000:]
    assert checkpoints(tmp_path / "run") == [f"checkpoint-{stopped[1]}"]
    assert find_damage(tmp_path / "run" / f"checkpoint-{stopped[1]}") is None
    assert (
        f"checkpoint-{stopped[1]}. To go on, give the same command again with --resume_from_checkpoint latest" in log
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with checkpoints after iterations 2 and 4, and its data."""
    from conftest import image_folder

    root = tmp_path_factory.mktemp("run")
    photos = image_folder.__wrapped__(root)
    run_here(*options(photos, root / "whole", save_steps=2, eval_steps=2, **RANDOM))
    return photos, root / "whole"


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO)
    return lambda: caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: os.truncate(folder / "optimizer.bin", 1000), "optimizer.bin has 1000 bytes in place of"),
        (lambda folder: (folder / "random_states_0.pkl").unlink(), "random_states_0.pkl is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "its manifest.json cannot be read"),
        (lambda folder: overwrite(folder / "model.safetensors"), "the content of model.safetensors has changed"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_message_and_the_one_before_it_used(
    trained, tmp_path, messages, damage, message
):
    photos, folder = trained
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(folder / name, tmp_path / "run" / name)
    damage(tmp_path / "run" / "checkpoint-4")
    again = options(photos, tmp_path / "run", save_steps=2, eval_steps=2, **RANDOM)
    run_here(*again, "--resume_from_checkpoint", "latest")
    assert re.search(rf"Skipped .*checkpoint-4: {message}", messages())
    assert re.search(r"Resumed from .*checkpoint-2 at iteration 2", messages())
    assert are_equal(tmp_path / "run", folder)
    assert find_damage(tmp_path / "run" / "checkpoint-4") is None  # written anew


def overwrite(path):
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\xff" * 4)


def test_without_a_whole_checkpoint_the_run_starts_at_its_first_iteration_and_says_so(trained, tmp_path, messages):
    photos, folder = trained
    words = options(photos, tmp_path / "run", save_steps=2, eval_steps=2, resume_from_checkpoint="latest", **RANDOM)
    run_here(*words)
    assert "has no whole checkpoint to go on from: the run starts at iteration 1" in messages()
    assert are_equal(tmp_path / "run", folder)


def test_a_checkpoint_named_by_its_folder_must_be_whole(trained, tmp_path):
    photos, folder = trained
    shutil.copytree(folder / "checkpoint-4", tmp_path / "copy")
    (tmp_path / "copy" / "scheduler.bin").unlink()
    for path, message in (
        (tmp_path / "copy", "scheduler.bin is missing"),
        (tmp_path / "no", "there is no such folder"),
    ):
        words = options(photos, tmp_path / "run", resume_from_checkpoint=path, **RANDOM)
        with pytest.raises(ValueError, match=f"--resume_from_checkpoint {path}: {message}"):
            run_here(*words)


def test_the_newest_checkpoints_and_the_best_model_are_kept(trained, tmp_path):
    photos, folder = trained
    prepared, results = run_here(*options(photos, tmp_path, save_steps=1, eval_steps=1, save_total_limit=2, **RANDOM))
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-4"]
    scores = {
        record["step"]: record["eval/mean_iou"] for record in prepared.progress.history if "eval/mean_iou" in record
    }
    assert list(scores) == [1, 2, 3, 4] and scores[4] == results["eval_mean_iou"]
    assert prepared.progress.best_mean_iou == max(scores.values())
    TwinsImageProcessor.from_pretrained(tmp_path / "best")
    model = TwinsForSemanticSegmentation.from_pretrained(tmp_path / "best")
    words = options(photos, tmp_path / "scores", eval_only="true", model_name_or_path=tmp_path / "best")
    _, best = run_here(*[word for word in words if word != "--config_overrides" and "hidden_sizes" not in word])
    assert model.config.num_labels == 3
    assert best["eval_mean_iou"] == max(scores.values())


def test_where_the_disk_is_full_the_run_says_so_and_the_checkpoint_before_is_whole(trained, tmp_path, messages):
    photos, folder = trained
    shutil.copytree(folder / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    too_small = (folder / "checkpoint-2" / "optimizer.bin").stat().st_size // 2
    words = options(photos, tmp_path / "run", save_steps=2, resume_from_checkpoint="latest", **RANDOM)
    resource.setrlimit(resource.RLIMIT_FSIZE, (too_small, limits[1]))  # no file may be larger
    try:
        with pytest.raises(TrainingStopped, match=r"checkpoint-4 cannot be written: .*"):
            run_here(*words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints(tmp_path / "run") == ["checkpoint-2"]
    assert find_damage(tmp_path / "run" / "checkpoint-2") is None
    assert "To go on, give the same command again with --resume_from_checkpoint latest" in messages()


def test_an_output_folder_removed_meanwhile_is_made_anew_with_a_warning(image_folder, tmp_path):
    remove = (
        "import shutil, twins_hf.training.loop as loop\n"
        "report = loop.report\n"
        f"loop.report = lambda *args: (report(*args), shutil.rmtree({str(tmp_path / 'run')!r}, ignore_errors=True))"
    )
    words = options(image_folder, tmp_path / "run", save_steps=4, logging_steps=3, max_steps=5)
    finished = run_changed(remove, *words)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert re.search(r"run is gone: it was removed or moved while the run went on. It is made anew", finished.stderr)
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_folder_is_replaced_only_by_one_that_is_whole(tmp_path):
    for name in ("folder", "partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text(name)
    put_in_place(tmp_path / "partial", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (tmp_path / "folder" / "content").read_text() == "partial"


def test_a_checkpoint_that_is_being_written_is_no_candidate(tmp_path):
    (tmp_path / ".partial-checkpoint-8").mkdir()
    assert checkpoint_folders(tmp_path) == []
