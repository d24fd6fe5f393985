import json

import pytest

from twins_hf.training import parse_arguments


@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_options_win_over_those_of_a_file(tmp_path, suffix):
    path = tmp_path / f"run.{suffix}"
    if suffix == "yaml":
        path.write_text(
            "variant: pcpvt-s\nlearning_rate: 1e-4\nratio_range: [0.75, 1.5]\nuse_cpu: true\n"
            "config_overrides:\n  decoder_hidden_size: 64\neval_steps:\n"
        )
    else:
        options = {"variant": "pcpvt-s", "learning_rate": 1e-4, "ratio_range": [0.75, 1.5], "use_cpu": True}
        path.write_text(json.dumps(options | {"config_overrides": {"decoder_hidden_size": 64}}))
    model_args, data_args, args = parse_arguments([str(path), "--variant", "svt-b", "--max_steps", "10"])
    assert model_args.variant == "svt-b"
    assert json.loads(model_args.config_overrides) == {"decoder_hidden_size": 64}
    assert data_args.ratio_range == [0.75, 1.5]
    assert (args.learning_rate, args.max_steps, args.use_cpu, args.eval_steps) == (1e-4, 10, True, None)


def test_the_defaults_are_the_papers_setting():
    _, data_args, args = parse_arguments([])
    assert (args.max_steps, args.learning_rate, args.weight_decay) == (160_000, 6e-5, 0.01)
    assert (data_args.ratio_range, data_args.cat_max_ratio) == ([0.5, 2.0], 0.75)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--variant", "svt-xl"], "--variant: invalid choice: 'svt-xl'"),
        (["--learning_rat", "1"], "learning_rat"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--max_steps", "0"], "--max_steps 0 must be at least 1"),
        (["--per_device_train_batch_size", "1"], "--per_device_train_batch_size 1 must be at least 2"),
        (["--ratio_range", "2.0", "0.5"], "--ratio_range"),
        (["--warmup_steps", "20", "--max_steps", "10"], "--warmup_steps 20"),
        (["--eval_only"], "--eval_only needs --model_name_or_path"),
        (["--eval_only", "--model_name_or_path", "x", "--push_to_hub"], "does not go with --eval_only"),
        (["--config_overrides", "[1]"], "--config_overrides [1] must be a JSON object"),
        (["--config_overrides", "{"], "--config_overrides { is no JSON"),
        (["--config_overrides", '{"depth": [1]}'], "--config_overrides: TwinsConfig has no depth"),
        (["--total_train_batch_size", "16", "--gradient_accumulation_steps", "2"], "only one of the two can be set"),
        (["--freeze_encoder", "--lora_rank", "4"], "--freeze_encoder does not go with --lora_rank"),
        (["--ema_decay", "1.5"], "--ema_decay 1.5 must lie in (0, 1]"),
        (["--layer_decay", "0"], "--layer_decay 0.0 must lie in (0, 1]"),
        (["--lr_end", "1"], "--lr_end 1.0 must lie between 0 and --learning_rate"),
        (
            ["--lr_end", "1e-6", "--lr_scheduler_type", "cosine"],
            "--lr_end 1e-06 does not go with --lr_scheduler_type",
        ),
        (["--max_nonfinite", "-1"], "--max_nonfinite -1 must be at least 0"),
        (["missing.yaml"], "missing.yaml: "),
    ],
)
def test_a_bad_option_ends_with_a_sentence_that_names_it(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_mapping_or_has_an_unknown_option_is_refused(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    for content, message in (("- variant", "mapping of options"), ("varient: svt-s", "varient"), ("a: [", "run.yaml")):
        path.write_text(content)
        with pytest.raises(SystemExit):
            parse_arguments([str(path)])
        assert message in capsys.readouterr().err


def test_a_file_is_read_as_yaml_1_2(tmp_path):
    """In which `no` is a word and 1e-6 a number."""
    path = tmp_path / "run.yaml"
    path.write_text("mixed_precision: no\nuse_cpu: true\nconfig_overrides:\n  layer_norm_eps: 1e-6\n")
    model_args, _, args = parse_arguments([str(path)])
    assert (args.mixed_precision, args.use_cpu) == ("no", True)
    assert json.loads(model_args.config_overrides) == {"layer_norm_eps": 1e-6}
