import pytest
import torch
import torch.nn.functional as F

from twins_hf.convolution_twins import resize
from twins_hf.loss_twins import resized_cross_entropy


def material(size=(37, 50), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 7, 9, 13, generator=generator)).to(dtype)
    labels = torch.randint(0, 7, (3, *size), generator=generator)
    labels[0, :5] = 255
    labels[2] = 255
    return logits, labels


def plain(logits, labels, ignore_index):
    return F.cross_entropy(
        resize(logits.float(), labels.shape[-2:]), labels, ignore_index=ignore_index, reduction="sum"
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(36, 52), (37, 50), (9, 13), (1, 1)])
def test_value_and_gradient_are_those_of_cross_entropy_at_label_size(size, dtype, memory_format):
    results = []
    for function in (resized_cross_entropy, plain):
        logits, labels = material(size, dtype)
        logits = logits.contiguous(memory_format=memory_format).requires_grad_()
        loss = function(logits, labels, 255) / 100
        loss.backward()
        results.append((loss, logits.grad))
    (loss, gradient), (expected_loss, expected_gradient) = results
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradient, expected_gradient)


def test_no_label_means_no_loss_and_no_gradient():
    logits, labels = material()
    logits.requires_grad_()
    loss = resized_cross_entropy(logits, torch.full_like(labels, 255), 255)
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_any_class_may_be_the_ignored_one(ignore_index):
    logits, labels = material()
    labels[labels == 255] = 3
    found, expected = resized_cross_entropy(logits, labels, ignore_index), plain(logits, labels, ignore_index)
    torch.testing.assert_close(found, expected)


def test_a_label_beyond_the_classes_is_an_error():
    logits, labels = material()
    labels[0, 20, 20] = 7
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        resized_cross_entropy(logits, labels, 255)


def test_what_waits_for_the_way_back_has_the_size_of_the_logits():
    logits, labels = material()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        resized_cross_entropy(logits.requires_grad_(), labels, 255)
    assert [tensor.shape for tensor in kept] == [logits.shape]


def test_autocast_leaves_the_loss_in_float32():
    logits, labels = material(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = resized_cross_entropy(logits.requires_grad_(), labels, 255)
    torch.testing.assert_close(found, plain(logits, labels, 255))
