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
