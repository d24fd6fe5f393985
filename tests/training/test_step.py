"""An iteration, against the published recipe written out in plain torch."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from conftest import FAMILIES, TINY, randomize
from datasets import Dataset
from torch import nn

from twins_hf import TwinsConfig, TwinsForSemanticSegmentation, TwinsImageProcessor
from twins_hf.data.loading import SegmentationData
from twins_hf.training import loop, parse_arguments
from twins_hf.training.optimization import build_scheduler, parameter_groups
from twins_hf.training.preparation import Run, build_accelerator


@pytest.fixture
def fresh_accelerate():
    """What accelerate keeps for a process does not outlive the test."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def batch_of(seed):
    """Two images, and labels of three classes and 255, which is more than half of the first image."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (2, 8, 9), generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[0, :40] = labels[1, 10:, 50:] = 255
    return torch.randn(2, 3, 64, 72, generator=generator, dtype=torch.float64), labels


def model_of(family, **settings):
    """In training, with nothing random in it."""
    config = TwinsConfig(**TINY, **FAMILIES[family], num_labels=3, classifier_dropout_prob=0.0, **settings)
    # In double precision: the first iteration's update of 6e-11 would drown in rounding, and AdamW divides by nearly
    # nothing where a gradient is nearly nothing.
    return randomize(TwinsForSemanticSegmentation(config)).double().train()


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients_of(loss, model):
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


# The recipe in plain torch.


def plain_cross_entropy(logits, labels, reduction):
    logits = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    is_labelled = labels != 255
    log_probabilities = logits.log_softmax(dim=1)
    of_the_label = log_probabilities.gather(1, torch.where(is_labelled, labels, 0)[:, None])[:, 0]
    return -of_the_label[is_labelled].sum() / (labels.numel() if reduction == "all" else is_labelled.sum())


def plain_loss(model, pixel_values, labels, reduction):
    feature_maps = model.twins(pixel_values).feature_maps[1:]
    loss = plain_cross_entropy(model.decode_head(feature_maps), labels, reduction)
    if model.auxiliary_head is not None:
        loss = loss + 0.4 * plain_cross_entropy(model.auxiliary_head(feature_maps), labels, reduction)
    return loss


def plain_rate(iteration, base, max_steps, warmup_steps, power=1.0, end=0.0):
    rate = (base - end) * (1 - iteration / max_steps) ** power + end
    if iteration < warmup_steps:
        rate *= 1 - (1 - iteration / warmup_steps) * (1 - 1e-6)
    return rate


def plain_decay(name):
    """Of the published UPerNet runs, by names: none in the encoder where there is `norm` in the name, or where it is a
    position encoding. (The heads' norms are called `bn` in the references.)"""
    is_exempt = name.startswith("twins.") and ("norm" in name or "position_encoding" in name)
    return 0.0 if is_exempt else 0.01


class PlainAdamW:
    """AdamW (arXiv 1711.05101, algorithm 2) with decay times rate, betas 0.9 and 0.999, epsilon 1e-8."""

    def __init__(self, decays):
        self.decays = decays
        self.first, self.second = dict.fromkeys(decays, 0.0), dict.fromkeys(decays, 0.0)
        self.step = 0

    def update(self, weights, gradients, rate):
        self.step += 1
        for name, gradient in gradients.items():
            self.first[name] = 0.9 * self.first[name] + 0.1 * gradient
            self.second[name] = 0.999 * self.second[name] + 0.001 * gradient**2
            first, second = self.first[name] / (1 - 0.9**self.step), self.second[name] / (1 - 0.999**self.step)
            decayed = weights[name] - rate * self.decays[name] * weights[name]
            weights[name] = decayed - rate * first / (second.sqrt() + 1e-8)


def assert_same_updates(weights, plain, before):
    """Of every parameter, within 1e-5 of its largest."""
    assert weights.keys() == plain.keys()
    for name, old in before.items():
        update, expected = weights[name] - old, plain[name] - old
        largest = expected.abs().max()
        assert largest > 0, name
        assert (update - expected).abs().max() <= 1e-5 * largest, name


# What the library does, held against it.


def library_step(model, gradients, iteration, learning_rate, weight_decay, decay_norms, schedule):
    groups = parameter_groups(model, learning_rate, weight_decay, decay_norms)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate)
    scheduler = build_scheduler(optimizer, learning_rate, "published", **schedule)
    if iteration:  # as a resumed run comes to it
        scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": iteration - 1})
        optimizer.step()  # of no gradients yet
        scheduler.step()
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name]
    optimizer.step()
    return weights_of(model)


@pytest.mark.parametrize("reduction", ["valid", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_upernet_is_that_of_the_recipe(family, reduction):
    pixel_values, labels = batch_of(seed=1)
    model = model_of(family, semantic_loss_reduction=reduction)
    before = weights_of(model)
    loss = model(pixel_values=pixel_values, labels=labels).loss
    expected_loss = plain_loss(model, pixel_values, labels, reduction)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-9)
    gradients, plain_gradients = gradients_of(loss, model), gradients_of(expected_loss, model)

    schedule = {"max_steps": 160_000, "warmup_steps": 1500, "power": 1.0, "end": 0.0}
    for iteration in (0, 1, 1499, 1500, 1501, 80_000, 159_999):
        stepped = library_step(copy.deepcopy(model), gradients, iteration, 6e-5, 0.01, False, schedule)
        plain = dict(before)
        rate = plain_rate(iteration, 6e-5, 160_000, 1500)
        PlainAdamW({name: plain_decay(name) for name in before}).update(plain, plain_gradients, rate)
        assert_same_updates(stepped, plain, before)


@pytest.mark.parametrize(("power", "end"), [(1.0, 1e-4), (0.9, 1e-6)], ids=["mmsegmentation", "authors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_semantic_fpn_is_that_of_the_recipe(family, power, end):
    pixel_values, labels = batch_of(seed=2)
    model = model_of(family, decoder_type="fpn", semantic_loss_reduction="all")
    before = weights_of(model)
    loss = model(pixel_values=pixel_values, labels=labels).loss
    expected_loss = plain_loss(model, pixel_values, labels, "all")
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-9)
    gradients, plain_gradients = gradients_of(loss, model), gradients_of(expected_loss, model)

    schedule = {"max_steps": 80_000, "warmup_steps": 0, "power": power, "end": end}
    for iteration in (0, 1, 1499, 1500, 1501, 40_000, 79_999):
        stepped = library_step(copy.deepcopy(model), gradients, iteration, 1e-4, 1e-4, True, schedule)
        plain = dict(before)
        rate = 1e-4 if end == 1e-4 else plain_rate(iteration, 1e-4, 80_000, 0, 0.9, 1e-6)
        PlainAdamW(dict.fromkeys(before, 1e-4)).update(plain, plain_gradients, rate)
        assert_same_updates(stepped, plain, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_iterations_of_the_loop_are_those_of_the_recipe(family, tmp_path, monkeypatch, fresh_accelerate):
    """Three of them, of two forward passes each, two in the warm-up."""
    batches = [batch_of(seed) for seed in range(6)]
    words = ["--max_steps", "3", "--warmup_steps", "2", "--gradient_accumulation_steps", "2", "--logging_steps", "3"]
    words += ["--save_steps", "0", "--report_to", "none", "--use_cpu", "true", "--output_dir", str(tmp_path)]
    model_args, data_args, args = parse_arguments(words)
    accelerator = build_accelerator(args, model_args)
    accelerator.gradient_accumulation_steps = 2
    model = model_of(family, semantic_loss_reduction="all")
    plain_model, before = copy.deepcopy(model), weights_of(model)
    prepared = Run(
        model_args,
        data_args,
        args,
        accelerator,
        tmp_path,
        SegmentationData("photos", {"train": Dataset.from_dict({"image": [0]})}, {0: "a", 1: "b", 2: "c"}, False),
        model,
        lora=None,
        image_processor=TwinsImageProcessor(),
        batch_size=2,
        checkpoint=None,
        hub_model_id=None,
    )
    stream = [{"pixel_values": p, "labels": y, "name": ["a", "b"], "skipped": ["", ""]} for p, y in batches]
    monkeypatch.setattr(loop, "training_batches", lambda *args: iter(stream))
    trained, figures = loop.train(prepared)

    plain, losses = dict(before), []
    optimizer = PlainAdamW({name: plain_decay(name) for name in before})
    for iteration in range(3):
        pair = [plain_loss(plain_model, *batch, "all") for batch in batches[2 * iteration : 2 * iteration + 2]]
        loss = (pair[0] + pair[1]) / 2
        losses.append(loss.item())
        optimizer.update(plain, gradients_of(loss, plain_model), plain_rate(iteration, 6e-5, 3, 2))
        plain_model.load_state_dict(plain, strict=False)
    assert figures["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)  # summed in single precision
    assert_same_updates(weights_of(trained), plain, before)
