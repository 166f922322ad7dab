"""A decoder that learns with a ControlNet: what changes, what stays, and what is read back."""

import json
import shutil

import numpy as np
import pytest
import torch
from checkpoints import write_run
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline, UNet2DConditionModel
from inputs import disturbed
from PIL import Image

from controlbooth.launch.commands.export import main as export_main
from controlbooth.launch.commands.sample import main as sample_main
from controlbooth.models.denoisers.registry import predict
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.noise.schedules import SCHEDULERS
from controlbooth.models.pretrained import load_controlnet, save_controlnet
from controlbooth.models.sampling import Control, initial_noise, sample
from controlbooth.models.text import encode_with_dropout
from controlbooth.models.unlocked_decoder import (
    DECODER,
    UnlockedNetwork,
    controlled_prediction,
    decoder_state,
    load_networks,
    networks_of,
    save_decoder,
    with_own_decoder,
)

SIZE = 32


def a_batch(base):
    channels = base.latent_channels
    torch.manual_seed(1)
    text = encode_with_dropout(base, ["a cat", "red dog"], picture_size=(SIZE, SIZE))
    return torch.randn(2, channels, 4, 4), torch.tensor([3, 700]), text, torch.rand(2, 3, SIZE, SIZE)


def disturb(*modules):
    """Weights as a training might leave them."""
    torch.manual_seed(2)
    for module in modules:
        disturbed(module)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "miniature"])
def test_an_unlocked_network_begins_as_the_locked_one_and_learns_in_its_own_decoder_alone(family, load_tiny):
    base = load_tiny(family)
    before = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    torch.manual_seed(0)
    controlnet = build_controlnet(base.denoiser)
    network, batch = UnlockedNetwork(controlnet, base), a_batch(base)
    prediction = controlled_prediction(base, network, *batch)
    assert torch.equal(prediction, predict(base.denoiser, controlnet, *batch))
    own = networks_of(base, network)[0].denoiser
    assert (
        own.down_blocks is base.denoiser.down_blocks and own.mid_block is base.denoiser.mid_block
    )  # shared, not copied
    named = dict(network.named_parameters())
    assert {name.split(".")[1] for name in named if name.startswith("decoder.")} == set(DECODER)
    assert len(named) == len(list(controlnet.parameters())) + len(decoder_state(base.denoiser))
    prediction.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in named.items() if name.startswith("decoder.up_blocks"))
    torch.optim.AdamW(network.parameters(), lr=0.1).step()
    assert not torch.equal(controlled_prediction(base, network, *batch), prediction)
    for name, tensor in base.denoiser.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in base.denoiser.parameters())
    changed = own.state_dict()
    assert all(
        torch.equal(changed[name], before[name]) == (name not in decoder_state(base.denoiser)) for name in before
    )


def trained(folder, base):
    """A checkpoint's controlnet/ with a decoder, and the networks that it holds."""
    torch.manual_seed(0)
    controlnet, unet = build_controlnet(base.denoiser), with_own_decoder(base.denoiser, torch.float32)
    disturb(controlnet, unet.up_blocks, unet.conv_out)
    save_controlnet(controlnet, folder)
    save_decoder(decoder_state(unet), folder)
    return controlnet, unet


def test_both_networks_are_read_back_and_the_base_stays_as_it_is(load_tiny, tmp_path):
    base = load_tiny("sd15")
    original = {name: tensor.clone() for name, tensor in base.denoiser.state_dict().items()}
    controlnet, unet = trained(tmp_path / "net", base)
    changed, again = load_networks(tmp_path / "net", base)
    for name, tensor in unet.state_dict().items():
        assert torch.equal(changed.denoiser.state_dict()[name], tensor), name
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in controlnet.state_dict().items())
    assert all(torch.equal(base.denoiser.state_dict()[name], tensor) for name, tensor in original.items())
    assert not any(parameter.requires_grad for parameter in changed.denoiser.parameters())
    save_controlnet(controlnet, tmp_path / "locked")
    assert load_networks(tmp_path / "locked", base)[0] is base


def test_a_controlnet_is_not_read_without_its_decoder_nor_with_another_base(load_tiny, tmp_path):
    base = load_tiny("sd15")
    trained(tmp_path / "net", base)
    with pytest.raises(ValueError, match="trained with an unlocked decoder.* Go on with its run by raising max_steps"):
        load_controlnet(tmp_path / "net", base.denoiser)
    save_decoder(decoder_state(load_tiny("miniature").denoiser), tmp_path / "net")
    with pytest.raises(ValueError, match="the decoder in .*net was made for another base"):
        load_networks(tmp_path / "net", base)


@pytest.fixture
def make_run(tmp_path, load_tiny, base_folder):
    """Family -> a run with an unlocked checkpoint as the trainer leaves it, without DeepSpeed's files; its networks."""

    def make(family):
        base, networks = load_tiny(family), []
        model = dict(base=str(base_folder(family)), unlock_decoder_at=200)
        run = write_run(tmp_path, base, model, lambda folder: networks.append(trained(folder, base)), unlocked=True)
        return run, networks[0]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_diffusers_draws_our_pictures_from_an_export(family, make_run, load_tiny, base_folder, tmp_path):
    base, (run, _) = load_tiny(family), make_run(family)
    out = tmp_path / "out"
    assert export_main([str(run), str(out)]) == 0
    prompts, seeds = ["a cat", "red dog"], [3, 1]
    conditioning = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    options: dict = dict(seeds=seeds, steps=3, guidance_scale=4.0)
    changed, controlnet = load_networks(run / "checkpoints" / "step-00000300" / "controlnet", base)
    ours = sample(changed, prompts, [Control(controlnet, conditioning)], **options)
    locked = sample(base, prompts, [Control(controlnet, conditioning)], **options)
    is_sdxl = family == "sdxl"
    pipeline_class: type = StableDiffusionXLControlNetPipeline if is_sdxl else StableDiffusionControlNetPipeline
    extra = {} if is_sdxl else dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    unet = UNet2DConditionModel.from_pretrained(out / "unet", local_files_only=True)
    pipeline = pipeline_class.from_pretrained(
        base_folder(family),
        controlnet=type(controlnet).from_pretrained(out, local_files_only=True),
        unet=unet,
        local_files_only=True,
        **extra,
    )
    pipeline.scheduler = SCHEDULERS["ddim"].from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline(
        prompts,
        image=conditioning,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=initial_noise(base, seeds, SIZE, SIZE),
        output_type="np",
    ).images
    difference = (ours.int() - torch.from_numpy(np.round(pictures * 255).astype(np.uint8)).int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 0.01  # 1: a value that lies on a rounding border
    assert (ours.int() - locked.int()).abs().max() > 1
    again = sample(
        load_networks(out, base)[0], prompts, [Control(load_networks(out, base)[1], conditioning)], **options
    )
    assert torch.equal(again, ours)  # an export is measured like its run


def test_the_card_says_that_the_u_net_belongs_to_it_and_its_snippet_runs(make_run, tmp_path, monkeypatch):
    run, _ = make_run("miniature")
    out = tmp_path / "out"
    assert export_main([str(run), str(out), "--dtype", "fp16"]) == 0
    text = (out / "README.md").read_text()
    assert "has learned with it, from step 200 on at a learning rate of 2e-06. Use it with the U-Net in `unet/`" in text
    Image.fromarray(np.full((32, 32, 3), 200, np.uint8)).save(out / "condition.png")
    monkeypatch.chdir(out)
    exec(compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec"), {})
    assert Image.open(out / "picture.png").size == (SIZE, SIZE)


def test_a_single_file_and_another_base_are_refused_with_the_remedy(make_run, base_folder, tmp_path):
    run, _ = make_run("sd15")
    with pytest.raises(ValueError, match="a single file has no place for it: export it with --format diffusers"):
        export_main([str(run), str(tmp_path / "out"), "--format", "single-file"])
    state = run / "checkpoints" / "step-00000300" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"base_digest": "0" * 64}))
    with pytest.raises(ValueError, match="is not the base that step-00000300 was trained on.* put that base back"):
        export_main([str(run), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_sampling_uses_the_decoder_and_refuses_two_of_them(make_run, base_folder, load_tiny, tmp_path):
    run, _ = make_run("sd15")
    Image.fromarray(np.full((SIZE, SIZE, 3), 200, np.uint8)).save(tmp_path / "edges.png")
    few = ["--base", str(base_folder("sd15")), "--steps", "2", "--count", "1"]

    def draw(name, folder):
        given = ["--control", f"edges={folder}", "--condition", f"edges={tmp_path / 'edges.png'}", "-o"]
        assert sample_main([*given, str(tmp_path / name), *few]) == 0
        return np.asarray(Image.open(tmp_path / name / "0000.png"))

    own = draw("own", run)
    locked = tmp_path / "locked"
    shutil.copytree(run / "checkpoints" / "step-00000300" / "controlnet", locked)
    (locked / "decoder.safetensors").unlink()
    assert (draw("without", locked) != own).any()
    shutil.copytree(run / "checkpoints" / "step-00000300" / "controlnet", tmp_path / "other")
    two = ["--control", f"edges={run}", "--control", f"depth={tmp_path / 'other'}"]
    with pytest.raises(ValueError, match="edges and depth were each trained with a decoder of their own"):
        sample_main([*two, *few, "-o", str(tmp_path / "two")])
