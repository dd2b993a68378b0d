import torch
import torch.nn.functional as F

from orchestrator.train.tasks.loss import IGNORED, LossScale, num_targets, target_loss


def batch(virtual: int = 0):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, virtual + 5, 11, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 11, (3, 5), generator=generator)
    labels[0, :3] = IGNORED
    labels[2, 4] = IGNORED
    return logits.requires_grad_(), labels


def test_sum_over_target_tokens():
    logits, labels = batch()
    by_hand = sum(
        F.cross_entropy(logits[row, at - 1].float(), labels[row, at]).item()
        for row in range(3)
        for at in range(1, 5)
        if labels[row, at] != IGNORED
    )
    assert num_targets(labels) == 9
    assert abs(target_loss(logits, labels).item() - by_hand) < 1e-5  # float32 sums of 9 numbers near 3


def test_virtual_tokens_are_no_targets():
    logits, labels = batch(virtual=4)
    assert target_loss(logits, labels).item() == target_loss(logits[:, 4:], labels).item()


def test_a_batch_without_targets_has_a_zero_gradient_not_none():
    logits, labels = batch()
    target_loss(logits, torch.full_like(labels, IGNORED)).backward()
    assert logits.grad is not None and not logits.grad.any()


def test_the_scale_halves_at_an_overflow_and_grows_again():
    scale = LossScale(True, value=4.0, growth_interval=2)
    scale.update(True)
    assert scale.value == 2.0
    scale.update(False)
    scale.update(False)
    assert scale.value == 4.0 and scale.good_steps == 0
    for _ in range(3):
        scale.update(True)
    assert scale.is_exhausted


def test_other_precisions_are_not_scaled():
    scale = LossScale(False)
    scale.update(True)
    assert scale.value == 1.0 and not scale.is_exhausted
