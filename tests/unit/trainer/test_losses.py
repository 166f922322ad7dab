import pytest
import torch
from diffusers import DDPMScheduler

from controlbooth.trainer.losses import min_snr_weights, training_target, weighted_mse

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def test_v_target_is_the_one_of_diffusers_and_epsilon_is_the_noise():
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 500, 999])
    target = training_target("v_prediction", latents, noise, timesteps, SCHEDULER.alphas_cumprod)
    torch.testing.assert_close(target, SCHEDULER.get_velocity(latents, noise, timesteps))
    assert training_target("epsilon", latents, noise, timesteps, SCHEDULER.alphas_cumprod) is noise


def test_unknown_prediction_type_names_the_known_ones():
    with pytest.raises(ValueError, match="'sample' is not supported: epsilon or v_prediction"):
        training_target("sample", *(torch.zeros(1, 1, 1, 1),) * 2, torch.tensor([0]), SCHEDULER.alphas_cumprod)


def test_min_snr_weights_follow_the_paper_by_hand():
    alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])  # SNR 9, 1, 1/9
    timesteps = torch.tensor([0, 1, 2])
    torch.testing.assert_close(
        min_snr_weights("epsilon", timesteps, alphas_cumprod, 5.0), torch.tensor([5 / 9, 1.0, 1.0])
    )
    torch.testing.assert_close(
        min_snr_weights("v_prediction", timesteps, alphas_cumprod, 5.0),
        torch.tensor([5 / 10, 1 / 2, (1 / 9) / (10 / 9)]),
    )


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
