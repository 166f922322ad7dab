"""How noise is added and weighed: against diffusers, and the papers' formulas written apart."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3
from scipy import stats

from controlbooth.data.order import draws
from controlbooth.models.noise.checks import check_flow_scheduler
from controlbooth.models.noise.process import Diffusion, FlowMatching, FlowSettings, level_thresholds

BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def pictures(count: int = 3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 4, 2, 2, generator=generator) for _ in range(2)]


def flow(shift: float = 3.0, dynamic: bool = False, **settings) -> FlowMatching:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, use_dynamic_shifting=dynamic)
    return FlowMatching(scheduler).with_settings(FlowSettings(**settings))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(_class_name="DDPMScheduler"), "the scheduler is a DDPMScheduler, and this base is of flow matching"),
        (dict(num_train_timesteps=500), "num_train_timesteps is 500"),
        (dict(shift=0), "shift is 0, and a number above 0"),
        (dict(max_shift=None), "max_shift is None, and a number belongs"),
        (dict(base_shift="a"), "base_shift is 'a'"),
        (dict(shift_terminal=2), "shift_terminal is 2"),
        (dict(time_shift_type=1.68), "time_shift_type is 1.68, and exponential or linear"),
        (dict(base_image_seq_len=None), "base_image_seq_len is None"),
        (dict(use_dynamic_shifting="yes"), "use_dynamic_shifting is 'yes'"),
        (dict(use_dynamic_shifting=None), "use_dynamic_shifting is None, and true or false"),
        (dict(invert_sigmas=True), "invert_sigmas is true"),
        (dict(use_karras_sigmas=1), "use_karras_sigmas is 1, and true or false"),
    ],
)
def test_a_scheduler_by_which_no_base_of_flow_matching_was_trained_is_refused_by_its_field(change, message):
    config = dict(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    check_flow_scheduler(config | {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "here")
    with pytest.raises(ValueError, match=f"^here: {message}"):
        check_flow_scheduler(config | change, "here")


def test_v_target_is_the_one_of_diffusers_and_epsilon_is_the_noise():
    latents, noise = pictures()
    levels = torch.tensor([0, 500, 999])
    scheduler = DDPMScheduler(**BETAS, prediction_type="v_prediction")
    target = Diffusion(scheduler).noised(latents, noise, levels).target
    torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, levels))
    assert Diffusion(DDPMScheduler(**BETAS)).noised(latents, noise, levels).target is noise


def test_unknown_prediction_type_names_the_known_ones():
    latents, noise = pictures()
    process = Diffusion(DDPMScheduler(**BETAS, prediction_type="sample"))
    with pytest.raises(ValueError, match="'sample' is not supported: epsilon or v_prediction"):
        process.noised(latents, noise, torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("epsilon", [5 / 9, 1.0, 1.0]), ("v_prediction", [5 / 10, 1 / 2, (1 / 9) / (10 / 9)])],
)
def test_min_snr_weights_follow_the_paper_by_hand(prediction, expected):
    scheduler = DDPMScheduler(3, trained_betas=[0.1, 1 - 5 / 9, 0.8], prediction_type=prediction)  # SNR 9, 1, 1/9
    levels = torch.tensor([0, 1, 2])
    weights = Diffusion(scheduler).loss_weights(levels, torch.Size([3, 4, 2, 2]), 5.0)
    torch.testing.assert_close(weights, torch.tensor(expected))
    assert Diffusion(scheduler).loss_weights(levels, torch.Size([3, 4, 2, 2]), None) is None


def test_flow_matching_mixes_along_a_straight_line_in_float32_and_tells_sigma_times_a_thousand():
    latents, noise = pictures()
    levels = torch.tensor([0, 499, 999])
    noised = flow(3.0).noised(latents.bfloat16(), noise, levels)
    for row, u in enumerate((0.001, 0.5, 1.0)):
        sigma = 3.0 * u / (1.0 + 2.0 * u)
        mixed = (1.0 - sigma) * latents.bfloat16().float()[row] + sigma * noise[row]
        torch.testing.assert_close(noised.latents[row], mixed)
        assert noised.times[row].item() == pytest.approx(1000 * sigma, rel=1e-6)
    torch.testing.assert_close(noised.target, noise - latents.bfloat16().float())
    assert noised.latents.dtype == noised.target.dtype == noised.times.dtype == torch.float32


def test_sigmas_are_those_of_the_schedulers_own_training_table():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = flow(3.0).sigmas(torch.arange(1000), torch.Size([1, 16, 64, 64]))
    torch.testing.assert_close(ours.flip(0), scheduler.sigmas, rtol=1e-6, atol=0)


def test_a_dynamic_shift_grows_with_the_picture_as_in_the_pipelines():
    process = flow(dynamic=True)
    for side, expected in ((64, 1.878), (128, 3.158)):  # 512 and 1024 pixels
        assert process.shift(torch.Size([1, 16, side, side])) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("weighting", ["sigma_sqrt", "cosmap"])
def test_weights_are_those_of_the_scripts_of_diffusers(weighting):
    levels, shape = torch.arange(1000), torch.Size([1000, 16, 8, 8])
    process = flow(3.0, weighting=weighting)
    expected = compute_loss_weighting_for_sd3(weighting, process.sigmas(levels, shape))
    torch.testing.assert_close(process.loss_weights(levels, shape, None), expected)
    assert flow(3.0).loss_weights(levels, shape, None) is None


def test_min_snr_is_refused_for_flow_matching():
    with pytest.raises(ValueError, match="min_snr_gamma weighs DDPM's noise.*leave it out"):
        flow().loss_weights(torch.tensor([1]), torch.Size([1, 16, 8, 8]), 5.0)


def drawn(count: int, **settings) -> np.ndarray:
    """Returns u in (0, 1) of so many draws; near 0 is noise, as in the scripts of diffusers."""
    levels = draws.levels_by_density(7, np.arange(count), level_thresholds(FlowSettings(**settings)))
    return (999.5 - levels) / 1000


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6)])
def test_logit_normal_levels_have_their_distribution(mean, std):
    logits = stats.logistic.ppf(drawn(100_000, mean=mean, std=std))
    middle = np.abs(logits) < 5  # beyond it a thousandth is wide in logits
    assert stats.kstest(logits[middle], stats.norm(mean, std).cdf).statistic < 0.006


def test_uniform_levels_are_uniform():
    assert stats.kstest(drawn(100_000, density="uniform"), "uniform").statistic < 0.006


def test_mode_levels_have_the_distribution_of_the_formula():
    u = np.random.default_rng(0).random(100_000)
    expected = 1 - u - 1.29 * (np.cos(math.pi * u / 2) ** 2 - 1 + u)
    assert stats.ks_2samp(drawn(100_000, density="mode"), expected).statistic < 0.01


@pytest.mark.parametrize(
    ("density", "expected"),
    [("logit-normal", "d4a70e0c8c913cfc"), ("mode", "4d085305a7d165a4"), ("uniform", "4d8245c80cd4552b")],
)
def test_thresholds_are_pinned_so_that_draws_never_change(density, expected):
    thresholds = level_thresholds(FlowSettings(density=density))
    assert len(thresholds) == 999 and list(thresholds) == sorted(thresholds)
    assert f"{draws.hash64(*thresholds):016x}" == expected


def test_levels_of_the_validation_lie_at_even_quantiles():
    process = flow(density="uniform")
    levels = process.even_levels(np.arange(4), 4)
    assert levels.tolist() == [125, 375, 625, 875]
    spread = flow().even_levels(np.arange(100), 100)
    assert abs(np.median(spread) - 499.5) < 5 and (np.diff(spread) >= 0).all()


@pytest.mark.parametrize("name", FlowMatching.samplers)
def test_samplers_of_flow_matching_follow_a_straight_line_exactly(name):
    """With the true velocity of one picture, every solver ends at the picture."""
    latents, noise = pictures(1)
    sampler = flow(3.0).sampler(name, 6, latents.shape, torch.device("cpu"))
    x = noise
    for time in sampler.timesteps:
        x = sampler.step(noise - latents, time, x, return_dict=False)[0]
    torch.testing.assert_close(x, latents, rtol=1e-3, atol=2e-3)
