"""Small training runs: started as users start them, or within the test's own process, which is quicker."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import TINY
from safetensors.torch import load_file

from twins_hf.training import parse_arguments, prepare_run, run

SCRIPT = Path(__file__).parents[1] / "scripts" / "run_semseg.py"


def options(dataset_name, folder, /, **changed):
    """Words of a command line; an option that is `None` is left out."""
    values = {
        "dataset_name": dataset_name,
        "output_dir": folder,
        "variant": "svt-s",
        "config_overrides": json.dumps(TINY),
        "shortest_edge": 48,
        "longest_edge": 192,
        "crop_size": 48,
        "max_steps": 4,
        "logging_steps": 2,
        "learning_rate": 0.002,
        "use_cpu": "true",
        "num_pictures": 1,
        "report_to": "none",
    }
    values |= changed
    return [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]


def launch_command(processes=1, *launch_options):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += ["--num_processes", str(processes)]
    if "--num_machines" not in launch_options:
        command += ["--num_machines", "1"]
    if processes > 1:
        command += ["--multi_gpu"]
        command += [] if "--main_process_port" in launch_options else ["--main_process_port", "0"]
    return [*command, *launch_options, "--quiet", str(SCRIPT)]


def launch_environment(**environment):
    """One thread a process, so that one and two processes round alike."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}


def launch(*words, processes=1, **environment):
    return subprocess.run(
        [*launch_command(processes), *words],
        env=launch_environment(**environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_changed(change, *words):
    """The script in a process of its own, after the Python code `change`."""
    code = f"import os, runpy, sys\n{change}\nsys.argv = sys.argv[1:]\n"
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT), *words],
        env=launch_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_here(*words):
    """A run in this process; what it prepared and its results."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prepared = prepare_run(*parse_arguments(words))
        return prepared, run(prepared)
    finally:
        torch.set_num_threads(num_threads)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def find_free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def results_of(folder):
    results = json.loads((folder / "all_results.json").read_text())
    return {name: value for name, value in results.items() if "runtime" not in name and "second" not in name}


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def are_equal(ours, theirs):
    """Whether two folders hold the same weights, to the bit."""
    ours, theirs = weights_of(ours), weights_of(theirs)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
