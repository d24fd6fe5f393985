"""Runs of several processes, on one machine or on two."""

import subprocess
import sys

import pytest
from conftest import image_folder
from training_runs import (
    SCRIPT,
    are_equal,
    find_free_port,
    launch,
    launch_command,
    launch_environment,
    options,
    results_of,
    run_here,
)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run of two processes on one machine that validates on a single image, and its data."""
    root = tmp_path_factory.mktemp("run")
    photos = image_folder.__wrapped__(root)
    for kind in ("images", "annotations"):
        (photos / kind / "validation" / "photo_1.png").unlink()
    finished = launch(*options(photos, root / "two"), processes=2)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "4 images, 4 crops an iteration (2 process(es) x 1 forward pass(es) x 2)" in finished.stderr
    return photos, root / "two"


def test_two_machines_train_and_score_exactly_as_two_processes_of_one(two, tmp_path):
    """Two launches that meet at an address of this machine."""
    photos, folder = two
    port = find_free_port()
    launches = []
    for rank in range(2):
        rendezvous = ["--num_machines", "2", "--machine_rank", str(rank)]
        rendezvous += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command = [*launch_command(2, *rendezvous), *options(photos, tmp_path)]
        launches.append(subprocess.Popen(command, env=launch_environment(), stderr=subprocess.PIPE, text=True))
    for process in launches:
        _, log = process.communicate(timeout=300)
        assert process.returncode == 0, log[-3000:]
    assert are_equal(tmp_path, folder)
    assert results_of(tmp_path) == results_of(folder)


def test_torchrun_starts_a_run_as_accelerate_does(two, tmp_path):
    photos, folder = two
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    words = options(photos, tmp_path)
    finished = subprocess.run(
        [*command, *words], env=launch_environment(), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert are_equal(tmp_path, folder)
    assert results_of(tmp_path) == results_of(folder)


def test_a_process_without_validation_images_waits_for_the_one_that_has_some(two, tmp_path):
    photos, folder = two
    assert results_of(folder)["eval_samples"] == 1
    words = options(photos, tmp_path, eval_only="true", model_name_or_path=folder, config_overrides=None)
    _, alone = run_here(*words)
    assert results_of(folder)["eval_mean_iou"] == pytest.approx(alone["eval_mean_iou"], rel=1e-6)


def test_more_processes_than_training_images_share_the_crops_of_one(two, tmp_path):
    """Three processes of two crops on two images; a process alone takes the same six crops for an iteration."""
    photos, _ = two
    for processes, batch_size in ((1, 6), (3, 2)):
        words = options(photos, tmp_path / str(processes), max_train_samples=2, total_train_batch_size=6)
        words += ["--per_device_train_batch_size", str(batch_size)]
        finished = launch(*words, processes=processes)
        assert finished.returncode == 0, finished.stderr[-3000:]
        assert "2 images, 6 crops an iteration" in finished.stderr
    one, three = (results_of(tmp_path / str(processes))["train_loss"] for processes in (1, 3))
    assert one == pytest.approx(three, rel=0.1)  # batch norm and the mean over pixels are taken per process
