import copy
import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.families import FAMILIES
from controlbooth.models.noise.process import Diffusion
from controlbooth.models.noise.schedules import SCHEDULERS, read_noise_scheduler
from controlbooth.models.pretrained import load_controlnet, save_controlnet
from controlbooth.models.sampling import Control, initial_noise, sample

PROMPTS = ["a cat", "red dog", "", "a blue cat"]
SEEDS = [3, 1, 4, 1]
SIZE = 32


def conditions(count=4):
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def trained_controlnet(base):
    """One whose residuals are not zero."""
    torch.manual_seed(0)
    controlnet = build_controlnet(base.denoiser)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return controlnet


def pipeline_pictures(folder, controlnet_folder, base, controlnet, scheduler, negative_prompt, guidance_scale):
    """The same prompts, latents and condition through diffusers' own pipeline, loaded from the folders."""
    is_sdxl = base.family.name == "sdxl"
    pipeline_class = StableDiffusionXLControlNetPipeline if is_sdxl else StableDiffusionControlNetPipeline
    extra = {} if is_sdxl else dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    save_controlnet(controlnet, controlnet_folder)
    controlnet = load_controlnet(controlnet_folder, base.denoiser).eval()
    pipeline = pipeline_class.from_pretrained(folder, controlnet=controlnet, local_files_only=True, **extra)
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        PROMPTS,
        image=conditions(),
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt and [negative_prompt] * len(PROMPTS),
        controlnet_conditioning_scale=0.7,
        latents=initial_noise(base, SEEDS, SIZE, SIZE),
        output_type="np",
    ).images
    return torch.from_numpy(np.round(pictures * 255).astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "scheduler", "negative_prompt", "guidance_scale"),
    [
        ("sd15", "unipc", "blue", 5.0),
        ("sd15", "ddim", None, 1.0),
        ("sd21", "ddim", "blue", 5.0),
        ("sdxl", "ddim", None, 5.0),
        ("sdxl", "euler", "blue", 5.0),
        ("miniature", "ddim", None, 5.0),
    ],
)
def test_pictures_equal_those_of_diffusers_pipeline(
    family, scheduler, negative_prompt, guidance_scale, load_tiny, base_folder, tmp_path
):
    base = load_tiny(family)
    controlnet = trained_controlnet(base)
    ours = sample(
        base,
        PROMPTS,
        [Control(controlnet, conditions(), scale=0.7)],
        seeds=SEEDS,
        steps=4,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        negative_prompt=negative_prompt,
    )
    theirs = pipeline_pictures(
        base_folder(family), tmp_path / "net", base, controlnet, scheduler, negative_prompt, guidance_scale
    )
    assert ours.shape == (4, SIZE, SIZE, 3) and ours.dtype == torch.uint8
    assert ours.float().std() > 10  # not one flat colour, which would agree by itself
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.01  # 1: a value that lies on a rounding border


STOCHASTIC = {  # of bases as they are published: what a sampler must not take from them
    "sde": dict(_class_name="DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=3),
    "karras": dict(
        _class_name="EulerAncestralDiscreteScheduler", use_karras_sigmas=True, final_sigmas_type="sigma_min"
    ),
    "pixels": dict(_class_name="DDPMScheduler", clip_sample=True, thresholding=True, variance_type="learned_range"),
    "distilled": dict(_class_name="LCMScheduler", original_inference_steps=50, timestep_scaling=10.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_only_the_noise_schedule_of_a_bases_scheduler_reaches_a_picture(scheduler, load_tiny, base_folder, tmp_path):
    file = shutil.copytree(base_folder("sd15"), tmp_path / "base") / "scheduler" / "scheduler_config.json"
    plain, base = json.loads(file.read_text()), load_tiny("sd15")

    def drawn(changes):
        file.write_text(json.dumps(plain | changes))
        base.process = Diffusion(read_noise_scheduler(file))
        options: dict = dict(seeds=[1, 2], steps=3, guidance_scale=2.0, scheduler=scheduler)
        return [sample(base, ["a cat", "red dog"], **options) for _ in range(2)]

    first, again = drawn({})
    assert torch.equal(first, again)
    for name, changes in STOCHASTIC.items():
        one, other = drawn(changes)
        assert torch.equal(one, first) and torch.equal(other, first), name
    assert not torch.equal(drawn(dict(beta_end=0.02))[0], first)
    if scheduler == "euler":
        with pytest.raises(ValueError, match="scheduler euler cannot take the base's noise schedule.* Use ddim"):
            drawn(dict(beta_schedule="sigmoid"))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_picture_depends_on_its_seed_and_not_on_its_batch(scheduler, load_tiny):
    base = load_tiny("miniature")
    controlnet = trained_controlnet(base)

    def pictures(rows):
        return sample(
            base,
            [PROMPTS[row] for row in rows],
            [Control(controlnet, conditions()[rows])],
            seeds=[SEEDS[row] for row in rows],
            steps=2,
            guidance_scale=4.0,
            scheduler=scheduler,
        ).int()

    together = pictures([0, 1, 2, 3])
    assert torch.equal(pictures([0, 1, 2, 3]), together)
    difference = (torch.cat([pictures([2, 1]), pictures([3])]) - together[[2, 1, 3]]).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.01  # kernels round differently by batch size
    assert (together[1] - together[3]).abs().max() > 1  # the same seed, another prompt and condition


def test_first_noise_of_a_seed_is_pinned(load_tiny):
    noise = initial_noise(load_tiny("miniature"), [7, 8], 64, 32)
    assert noise.shape == (2, 12, 8, 4)
    expected = torch.tensor([-0.8201, 0.3956, 0.8989])  # any change gives every user other pictures for their seeds
    torch.testing.assert_close(noise[0, 0, 0, :3], expected, rtol=0, atol=1e-4)
    assert torch.equal(noise[1], initial_noise(load_tiny("miniature"), [8], 64, 32)[0])


def test_the_condition_changes_the_picture_and_an_untrained_controlnet_does_not(load_tiny):
    base = load_tiny("miniature")
    options = dict(seeds=[1], steps=2, guidance_scale=3.0)
    without = sample(base, ["a cat"], **options)
    assert without.shape == (1, SIZE, SIZE, 3)  # the size that the U-Net was made for
    untrained = sample(base, ["a cat"], [Control(build_controlnet(base.denoiser), conditions(1))], **options)
    assert torch.equal(untrained, without)
    controlnet = trained_controlnet(base)
    one = sample(base, ["a cat"], [Control(controlnet, conditions(1))], **options)
    other = sample(base, ["a cat"], [Control(controlnet, 1 - conditions(1))], **options)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("training", [True, False])
def test_modules_are_left_as_they_were_and_can_train_on(training, load_tiny):
    base = load_tiny("sd15")
    controlnet = trained_controlnet(base).train(training)
    with torch.inference_mode():
        sample(base, ["a cat"], [Control(controlnet, conditions(1))], seeds=[1], steps=1, guidance_scale=3.0)
    assert controlnet.training is training
    assert not base.denoiser.training
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in controlnet.parameters())
    assert not base.process.scheduler.alphas_cumprod.is_inference()


def test_modules_are_restored_after_an_error(load_tiny):
    base = load_tiny("sd15")
    controlnet = build_controlnet(base.denoiser)
    with pytest.raises(ValueError, match="condition is 36x32 pixels"):
        sample(base, ["a"], [Control(controlnet, torch.rand(1, 3, 36, 32))], seeds=[1], steps=1, guidance_scale=1.0)
    assert controlnet.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seeds=[1]), "2 prompts need 2 seeds, and there are 1"),
        (dict(steps=0), "steps is 0"),
        (dict(scheduler="ancestral"), "scheduler 'ancestral' is not known. Use ddim, unipc, dpm\\+\\+, euler"),
        (dict(controls=[dict(conditioning=conditions(3))]), "2 prompts need 2 conditions, and there are 3"),
        (dict(controls=[dict(conditioning=conditions(2)[:, :1])]), r"is RGB, .* of shape \(2, 1, 32, 32\)"),
        (dict(controls=[{}, dict(conditioning=torch.rand(2, 3, 64, 64))]), r"one size, .*\(32, 32\) and \(64, 64\)"),
        (dict(controls=[dict(schedule="cubic")]), "'cubic' is not known. Use uniform, resolution, resolution/8, 0.825"),
        (dict(controls=[dict(start=0.5, end=0.2)]), "not 0.5 to 0.2"),
    ],
)
def test_numbers_that_do_not_match_are_refused(change, message, load_tiny):
    base = load_tiny("sd15")
    options = dict(controls=[{}], seeds=[1, 2], steps=1) | change
    controls = [
        Control(build_controlnet(base.denoiser), **dict(conditioning=conditions(2)) | settings)
        for settings in options.pop("controls")
    ]
    with pytest.raises(ValueError, match=message):
        sample(base, ["a", "b"], controls, guidance_scale=2.0, **options)


def test_several_controlnets_give_the_pictures_of_diffusers_multi_controlnet(load_tiny, base_folder, tmp_path):
    base = load_tiny("sd15")
    networks = [trained_controlnet(base), trained_controlnet(base)]
    with torch.no_grad():
        for parameter in networks[1].parameters():
            parameter *= -0.9
    pictures = [conditions(), 1 - conditions()]
    controls = [Control(networks[0], pictures[0], scale=0.8), Control(networks[1], pictures[1], end=0.5)]
    options = dict(seeds=SEEDS, steps=4, guidance_scale=3.0)
    ours = sample(base, PROMPTS, controls, **options)
    for number, network in enumerate(networks):
        save_controlnet(network, tmp_path / str(number))
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        base_folder("sd15"),
        controlnet=[load_controlnet(tmp_path / str(number), base.denoiser).eval() for number in range(2)],
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler = SCHEDULERS["ddim"].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPTS,
        image=pictures,
        num_inference_steps=4,
        guidance_scale=3.0,
        controlnet_conditioning_scale=[0.8, 1.0],
        control_guidance_end=[1.0, 0.5],
        latents=initial_noise(base, SEEDS, SIZE, SIZE),
        output_type="np",
    ).images
    assert np.abs(np.round(theirs * 255) - ours.numpy()).max() <= 1
    assert not torch.equal(ours, sample(base, PROMPTS, controls[:1], **options))


def test_guess_mode_gives_the_pictures_of_diffusers_guess_mode(load_tiny, base_folder, tmp_path):
    base = load_tiny("sd15")
    controlnet = trained_controlnet(base)
    control = Control(controlnet, conditions(), schedule="logspace", branches="conditional")
    ours = sample(base, [""] * 4, [control], seeds=SEEDS, steps=4, guidance_scale=3.0)
    save_controlnet(controlnet, tmp_path / "net")
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        base_folder("sd15"),
        controlnet=load_controlnet(tmp_path / "net", base.denoiser).eval(),
        local_files_only=True,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.scheduler = SCHEDULERS["ddim"].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [""] * 4,
        image=conditions(),
        num_inference_steps=4,
        guidance_scale=3.0,
        guess_mode=True,
        latents=initial_noise(base, SEEDS, SIZE, SIZE),
        output_type="np",
    ).images
    assert np.abs(np.round(theirs * 255) - ours.numpy()).max() <= 1


def test_pictures_without_control_have_the_size_that_is_asked_for(load_tiny):
    base = load_tiny("sd15")
    options = dict(seeds=[1], steps=1, guidance_scale=1.0)
    assert sample(base, ["a cat"], picture_size=(48, 64), **options).shape == (1, 48, 64, 3)
    control = Control(build_controlnet(base.denoiser), torch.rand(1, 3, 48, 64))  # untrained, so it adds nothing
    assert torch.equal(
        sample(base, ["a cat"], [control], **options), sample(base, ["a cat"], picture_size=(48, 64), **options)
    )
    with pytest.raises(ValueError, match=r"\(36, 32\) pixels: .* makes multiples of 8"):
        sample(base, ["a cat"], picture_size=(36, 32), **options)
    with pytest.raises(ValueError, match=r"\(32, 32\) pixels cannot be controlled by conditions of \(48, 64\)"):
        sample(base, ["a cat"], [control], picture_size=(32, 32), **options)


def test_control_that_never_acts_is_no_control(load_tiny):
    base = load_tiny("miniature")
    control = Control(trained_controlnet(base), conditions(1), start=0.9, end=1.0)
    options = dict(seeds=[1], steps=2, guidance_scale=3.0)
    assert torch.equal(sample(base, ["a cat"], [control], **options), sample(base, ["a cat"], **options))


def test_every_family_samples_without_control(load_tiny):
    for family in FAMILIES:
        pictures = sample(
            load_tiny(family), ["a cat"], seeds=[1], steps=1, guidance_scale=1.0, picture_size=(SIZE, SIZE)
        )
        assert pictures.shape == (1, SIZE, SIZE, 3)


def test_the_hint_network_runs_once_for_each_condition_and_two_conditions_of_one_controlnet_stay_apart(load_tiny):
    base = load_tiny("sd15")
    controlnet = trained_controlnet(base).eval()
    first, second = conditions(), conditions().flip(0)
    runs = []
    handle = controlnet.controlnet_cond_embedding.conv_in.register_forward_hook(lambda *_: runs.append(1))
    options = dict(seeds=SEEDS, steps=4, guidance_scale=5.0)
    together = sample(base, PROMPTS, [Control(controlnet, first), Control(controlnet, second)], **options)
    assert len(runs) == 2
    handle.remove()
    apart = sample(base, PROMPTS, [Control(controlnet, first), Control(copy.deepcopy(controlnet), second)], **options)
    assert torch.equal(together, apart)
    assert not torch.equal(together, sample(base, PROMPTS, [Control(controlnet, first)] * 2, **options))
    assert "forward" not in vars(controlnet.controlnet_cond_embedding)


def test_the_hint_network_runs_once_too_where_hooks_hand_on_another_tensor_of_the_same_memory(load_tiny):
    base = load_tiny("sd15")
    controlnet = trained_controlnet(base).eval()
    hint = controlnet.controlnet_cond_embedding
    hint.register_forward_pre_hook(lambda _, given: (given[0].detach(),))  # as ZeRO-3's
    runs = []
    hint.conv_in.register_forward_hook(lambda *_: runs.append(1))
    sample(base, PROMPTS, [Control(controlnet, conditions())], seeds=SEEDS, steps=3, guidance_scale=5.0)
    assert len(runs) == 1
