"""The files of examples/accelerate, through accelerate's own launcher up to the start of processes."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from accelerate.utils.other import get_free_port

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation
from twins_hf.modeling_twins import TwinsLayer

FOLDER = Path(__file__).parents[1] / "examples" / "accelerate"
FILES = {
    "multi_gpu": (DistributedType.MULTI_GPU, 1, 8),
    "multi_machine": (DistributedType.MULTI_GPU, 2, 16),
    "fsdp2": (DistributedType.FSDP, 1, 8),
    "deepspeed": (DistributedType.DEEPSPEED, 1, 8),
}


def launch_arguments(name, *words):
    """What `accelerate launch` makes of a file and of words before the script."""
    parser = launch_command_parser()
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), "--main_process_port", "0", *words]
    args, _, _ = _validate_launch_command(parser.parse_args([*words, "scripts/run_semseg.py", "settings.yaml"]))
    return args


def set_environment(monkeypatch, environment):
    for name in environment.keys() - os.environ.keys():
        monkeypatch.setenv(name, environment[name])


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_machines, config.num_processes) == FILES[name]


@pytest.mark.parametrize("name", FILES)
def test_the_head_of_a_file_says_how_it_is_used(name):
    comments = [line for line in (FOLDER / f"{name}.yaml").read_text().splitlines() if line.startswith("#")]
    assert any(f"--config_file examples/accelerate/{name}.yaml" in line for line in comments)
    assert f"`{name}.yaml`" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", FILES)
def test_the_launcher_knows_every_option_of_the_file(name):
    options = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    nested = {option: options.pop(option) for option in ("fsdp_config", "deepspeed_config") if option in options}
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert options.keys() - {"compute_environment", "distributed_type"} <= known.keys()
    args = vars(launch_arguments(name))
    for option, value in {name: value for group in nested.values() for name, value in group.items()}.items():
        assert option in known
        assert args[option] == value


def test_one_machine_starts_a_process_for_each_gpu():
    args = launch_arguments("multi_gpu")
    environment = prepare_multi_gpu_env(args)
    assert args.multi_gpu and args.nproc_per_node == "8"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "ACCELERATE_USE_FSDP" not in environment


def test_the_number_of_processes_can_be_given_instead():
    args = launch_arguments("multi_gpu", "--num_processes", "2")
    prepare_multi_gpu_env(args)
    assert args.nproc_per_node == "2"


@pytest.mark.parametrize("rank", [0, 1])
def test_each_of_two_machines_starts_its_eight_processes_and_meets_the_other_at_rank_0(rank):
    port = str(get_free_port())
    words = ["--machine_rank", str(rank), "--main_process_ip", "10.0.0.1", "--main_process_port", port]
    args = launch_arguments("multi_machine", *words)
    prepare_multi_gpu_env(args)
    assert args.multi_gpu
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", rank)
    assert args.rdzv_endpoint == f"10.0.0.1:{port}"


def test_fsdp_2_shards_every_block(monkeypatch):
    args = launch_arguments("fsdp2")
    assert args.use_fsdp and not args.multi_gpu
    set_environment(monkeypatch, prepare_multi_gpu_env(args))
    plugin = FullyShardedDataParallelPlugin()
    with torch.device("meta"):
        model = TwinsForSemanticSegmentation(TwinsConfig.from_variant("svt-s", num_labels=150))
    plugin.set_auto_wrap_policy(model)
    is_sharded = fsdp2_prepare_auto_wrap_policy(plugin, model)
    sharded = [module for module in model.modules() if is_sharded(module)]
    assert len(sharded) == sum(model.config.depths)
    assert all(isinstance(module, TwinsLayer) for module in sharded)
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward and not plugin.cpu_ram_efficient_loading
    assert plugin.state_dict_type.name == "SHARDED_STATE_DICT"


def test_deepspeed_shards_by_zero_2_and_does_not_clip_gradients(monkeypatch):
    args = launch_arguments("deepspeed")
    assert args.use_deepspeed and not args.multi_gpu
    args.deepspeed_fields_from_accelerate_config = "zero_stage"
    _, environment = prepare_deepspeed_cmd_env(args)
    assert args.nproc_per_node == "8"
    set_environment(monkeypatch, environment)
    settings = DeepSpeedPlugin().deepspeed_config
    assert settings["zero_optimization"]["stage"] == 2
    assert "gradient_clipping" not in settings  # "auto", without the file's word on it, which accelerate makes 1
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert settings["gradient_accumulation_steps"] == "auto"  # the run's own
