import hashlib

import pytest
import torch
from bases import UNET_FAMILIES
from diffusers import UNet2DConditionModel
from inputs import batch
from torch import nn

from controlbooth.models import architectures
from controlbooth.models.denoisers.registry import check_fits, control_residuals, parameter_report, predict
from controlbooth.models.denoisers.unet import COPIED, build_controlnet
from controlbooth.models.text import TextEncoding


def weights_hash(*modules: nn.Module) -> str:
    digest = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def disturb(controlnet: nn.Module, seed=1) -> None:
    """Moves every weight away from zero, as training would."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_untrained_controlnet_changes_nothing_bit_for_bit(family, load_tiny):
    base = load_tiny(family)
    controlnet = build_controlnet(base.denoiser)
    latents, timesteps, text, conditioning = batch(base)
    with_control = predict(base.denoiser, controlnet, latents, timesteps, text, conditioning)
    without = predict(base.denoiser, None, latents, timesteps, text, None)
    assert torch.equal(with_control, without)
    disturb(controlnet)
    assert not torch.equal(predict(base.denoiser, controlnet, latents, timesteps, text, conditioning), without)


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_the_copy_computes_what_the_unets_encoder_computes(family, load_tiny):
    """Not only the weights are copied: options that have no weights, such as head counts, reach the copy too."""
    base = load_tiny(family)
    controlnet = build_controlnet(base.denoiser)
    latents, timesteps, text, conditioning = batch(base)
    seen = {}

    def keep(name):
        return lambda module, args, output: seen.__setitem__(name, output)

    for owner, module in (("unet", base.denoiser), ("copy", controlnet)):
        module.mid_block.register_forward_hook(keep(f"{owner}.mid"))
        for level, block in enumerate(module.down_blocks):
            block.register_forward_hook(keep(f"{owner}.{level}"))
    with torch.no_grad():
        predict(base.denoiser, controlnet, latents, timesteps, text, conditioning)
    for name in ("mid", *map(str, range(len(base.denoiser.down_blocks)))):
        torch.testing.assert_close(seen[f"copy.{name}"], seen[f"unet.{name}"])


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_first_backward_reaches_the_output_zero_convolutions_and_the_next_one_the_copy(family, load_tiny):
    base = load_tiny(family)
    torch.manual_seed(0)
    controlnet = build_controlnet(base.denoiser)
    latents, timesteps, text, conditioning = batch(base)
    target = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))

    def names_with_gradient():
        controlnet.zero_grad()
        loss = (predict(base.denoiser, controlnet, latents, timesteps, text, conditioning) - target).square().mean()
        loss.backward()
        return {name for name, parameter in controlnet.named_parameters() if parameter.grad.abs().max() > 0}

    zero_convolutions = {
        name for name, _ in controlnet.named_parameters() if name.startswith(("controlnet_down", "controlnet_mid"))
    }
    assert names_with_gradient() == zero_convolutions
    torch.optim.SGD(controlnet.parameters(), lr=0.1).step()
    reached = names_with_gradient()
    assert {"conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "mid_block.resnets.1.conv2.weight"} <= reached
    assert "controlnet_cond_embedding.conv_out.weight" in reached  # its own zero convolution opens here
    assert "controlnet_cond_embedding.conv_in.weight" not in reached  # and lets the hint network follow a step later


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_training_leaves_the_base_without_gradients_and_unchanged(family, load_tiny):
    base = load_tiny(family)
    locked = (base.denoiser, base.vae, *base.text_encoders)
    before = weights_hash(*locked)
    controlnet = build_controlnet(base.denoiser)
    optimizer = torch.optim.AdamW(controlnet.parameters(), lr=1e-2)
    for seed in range(3):
        latents, timesteps, text, conditioning = batch(base, seed)
        predict(base.denoiser, controlnet, latents, timesteps, text, conditioning).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.grad is None for module in locked for parameter in module.parameters())
    assert weights_hash(*locked) == before


def test_autograd_keeps_nothing_of_the_locked_encoder(load_tiny):
    """The U-Net's encoder sees nothing that needs a gradient, so its activations cost no memory."""
    base = load_tiny("sd15")
    outputs = []
    base.denoiser.down_blocks[0].register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    predict(base.denoiser, build_controlnet(base.denoiser), *batch(base)).sum().backward()
    assert not outputs[0].requires_grad


def sd15_unet_without_weights() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**architectures.SD15.denoiser)


def test_sd15_has_the_published_number_of_parameters():
    unet = sd15_unet_without_weights()
    report = parameter_report(build_controlnet(unet))
    assert sum(parameter.numel() for parameter in unet.parameters()) == 859_520_964
    assert report.copy == 348_712_960
    assert report.zero_convolutions == 11_479_680
    assert report.hint == 1_086_480
    assert report.total == 361_279_120


@pytest.mark.slow
def test_sd15_has_the_thirteen_published_residuals():
    unet = sd15_unet_without_weights()
    controlnet = build_controlnet(unet)
    with torch.device("meta"):
        text = TextEncoding(torch.empty(1, 77, 768))
        args = (torch.empty(1, 4, 64, 64), torch.zeros(1, dtype=torch.int64), text, torch.empty(1, 3, 512, 512))
        down, (mid,) = control_residuals(controlnet, *args).groups
        assert predict(unet, controlnet, *args).shape == (1, 4, 64, 64)
    sides = [64] * 3 + [32] * 3 + [16] * 3 + [8] * 3
    channels = [320] * 4 + [640] * 3 + [1280] * 5
    assert [tuple(residual.shape) for residual in down] == [
        (1, channel, side, side) for channel, side in zip(channels, sides, strict=True)
    ]
    assert tuple(mid.shape) == (1, 1280, 8, 8)


@pytest.mark.parametrize(
    ("architecture", "parameters"), [(architectures.SD21, 865_910_724), (architectures.SDXL, 2_567_463_684)]
)
def test_other_families_have_the_published_number_of_parameters(architecture, parameters):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture.denoiser)
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    report = parameter_report(build_controlnet(unet))
    assert report.copy == sum(p.numel() for name, p in unet.named_parameters() if name.split(".")[0] in COPIED)


def test_conditioning_scale_multiplies_every_residual(load_tiny):
    base = load_tiny("sd15")
    controlnet = build_controlnet(base.denoiser)
    disturb(controlnet)
    with torch.no_grad():
        whole, half = (control_residuals(controlnet, *batch(base), conditioning_scale=scale) for scale in (1.0, 0.5))
    for one, other in zip(whole.each(), half.each(), strict=True):
        torch.testing.assert_close(other, one * 0.5)


def test_a_wrapped_controlnet_of_another_dtype_is_called_like_a_module(load_tiny):
    """As a DeepSpeed engine: not a ControlNetModel itself, in half precision under a float32 base."""

    class Engine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    base = load_tiny("miniature")
    controlnet = build_controlnet(base.denoiser)
    disturb(controlnet)
    expected = predict(base.denoiser, controlnet, *batch(base))
    engine = Engine(controlnet.to(torch.bfloat16))
    prediction = predict(base.denoiser, engine, *batch(base))
    assert prediction.dtype == torch.float32
    torch.testing.assert_close(prediction, expected, rtol=0.1, atol=0.1)
    assert parameter_report(engine) == parameter_report(controlnet)


def test_gradient_checkpointing_gives_the_same_gradients(load_tiny):
    base = load_tiny("sd15")
    controlnet = build_controlnet(base.denoiser)
    disturb(controlnet)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            controlnet.enable_gradient_checkpointing()
            base.denoiser.enable_gradient_checkpointing()
        controlnet.zero_grad()
        predict(base.denoiser, controlnet, *batch(base)).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in controlnet.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize(
    ("hint_channels", "message"),
    [((16, 32), "halves the condition picture 1 times"), ((16, 32, 64, 96, 256), "give four widths")],
)
def test_a_hint_network_that_misses_the_latents_size_is_refused(hint_channels, message, load_tiny):
    with pytest.raises(ValueError, match=message):
        build_controlnet(load_tiny("sd15").denoiser, hint_channels)


def test_an_option_that_a_controlnet_cannot_copy_is_refused():
    with torch.device("meta"):
        unet = UNet2DConditionModel(time_embedding_act_fn="silu")
    with pytest.raises(ValueError, match="time_embedding_act_fn is 'silu', and a ControlNet cannot copy that"):
        build_controlnet(unet)


def test_a_controlnet_of_another_base_is_refused(load_tiny):
    controlnet = build_controlnet(load_tiny("sd15").denoiser)
    check_fits(controlnet, load_tiny("sd15").denoiser)
    with pytest.raises(ValueError, match="made for another base: its .* Continue it on the base"):
        check_fits(controlnet, load_tiny("miniature").denoiser)


def test_a_condition_of_the_wrong_size_is_refused(load_tiny):
    base = load_tiny("sd15")
    latents, timesteps, text, conditioning = batch(base)
    with pytest.raises(ValueError, match="condition is 16x32 pixels, but latents of 4x4 need 32x32"):
        predict(base.denoiser, build_controlnet(base.denoiser), latents, timesteps, text, conditioning[:, :, :16])


def test_a_sparse_condition_reaches_the_end_of_an_untrained_hint_network(load_tiny):
    torch.manual_seed(0)
    hint = build_controlnet(load_tiny("sd15").denoiser, (16, 32, 96, 256)).controlnet_cond_embedding
    condition = torch.zeros(1, 3, 64, 64)
    condition[..., 20:22, 10:50] = 1.0  # an edge
    features = {name: hint.conv_in(picture) for name, picture in (("edge", condition), ("none", condition * 0))}
    for block in hint.blocks:
        features = {name: block(torch.nn.functional.silu(x)) for name, x in features.items()}
    assert (features["edge"] - features["none"]).std() > 0.01
    assert not hint.conv_out.weight.any()
