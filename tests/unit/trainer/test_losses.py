import pytest
import torch

from controlbooth.trainer.losses import weighted_mse


def test_the_loss_of_halves_averages_to_the_loss_of_the_whole_with_zero_weights_too():
    generator = torch.Generator().manual_seed(1)
    prediction, target = (torch.randn(4, 2, 3, 3, generator=generator) for _ in range(2))
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0])
    halves = [weighted_mse(prediction[i : i + 2], target[i : i + 2], weights[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(sum(halves) / 2, weighted_mse(prediction, target, weights))
    errors = (prediction - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(weighted_mse(prediction, target, weights), (errors * weights).sum() / 4)


def test_half_precision_predictions_are_compared_in_float32():
    prediction = torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16)
    loss = weighted_mse(prediction, torch.full((1, 1, 1, 1), 1.001), torch.ones(1))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1e-6, rel=1e-2)
