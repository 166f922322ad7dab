import dataclasses
import json
import shutil

import pytest
import torch
from bases import UNET_FAMILIES
from diffusers import ControlNetModel
from layouts import original_vae
from safetensors.torch import load_file, save_file
from torch import nn

from controlbooth.models.architectures import Architecture
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.families import FAMILIES
from controlbooth.models.pretrained import load_base, load_controlnet, save_controlnet, save_single_file
from controlbooth.models.single_files import unet_file as original_layout
from controlbooth.models.text import encode_prompts

# --- base models from folders ---------------------------------------------------------------------------------------


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "base")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_base_is_frozen(family, load_tiny):
    base = load_tiny(family)
    for module in (base.denoiser, base.vae, *base.text_encoders):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())
    assert len(base.text_encoders) == len(base.tokenizers) == len(base.family.text_encoders)
    assert base.prediction_type == base.family.prediction_type
    assert base.picture_size == ((1024, 1024) if family == "flux" else (32, 32))  # FLUX.1 names no size


def test_the_digest_follows_the_weights_and_not_the_place(base_folder, tmp_path):
    folder = copied(base_folder("sd15"), tmp_path)
    assert load_base(folder).digest == load_base(base_folder("sd15")).digest
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["encoder.conv_in.bias"] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    assert load_base(folder).digest != load_base(base_folder("sd15")).digest


def test_the_scheduler_of_the_folder_is_read_as_one_for_training(base_folder, tmp_path):
    folder = copied(base_folder("sd15"), tmp_path)
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler", clip_sample=True)
    scheduler = load_base(folder).process.scheduler
    assert type(scheduler).__name__ == "DDPMScheduler"
    assert scheduler.config["beta_end"] == 0.012 and scheduler.config["steps_offset"] == 1
    assert scheduler.config["clip_sample"] is False  # latents are not pixels


def test_a_half_precision_variant_is_read_where_there_is_nothing_else(base_folder, tmp_path):
    folder = copied(base_folder("sdxl"), tmp_path)
    for file in folder.rglob("*.safetensors"):
        weights = {key: tensor.half() for key, tensor in load_file(file).items()}
        save_file(weights, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        if file.parent.name != "vae":
            file.unlink()
    base, original = load_base(folder), load_base(base_folder("sdxl"))
    assert base.dtype == torch.float32
    for name in ("conv_in.weight", "mid_block.resnets.0.conv1.weight"):
        expected = original.denoiser.state_dict()[name].half().float()
        assert torch.equal(base.denoiser.state_dict()[name], expected)
    assert torch.equal(base.vae.encoder.conv_in.weight, original.vae.encoder.conv_in.weight)  # full precision first


def test_dtype_reaches_every_module_but_a_vae_that_overflows_in_half(base_folder):
    base = load_base(base_folder("sdxl"), dtype=torch.bfloat16)
    assert {base.denoiser.dtype, base.vae.dtype, *(e.dtype for e in base.text_encoders)} == {torch.bfloat16}
    base = load_base(base_folder("sdxl"), dtype=torch.float16)
    assert base.denoiser.dtype == torch.float16 and base.vae.dtype == torch.float32
    latents = base.encode_latents(torch.zeros(1, 3, 16, 16))
    assert latents.dtype == torch.float16 and base.decode_latents(latents).shape == (1, 3, 16, 16)


def test_latents_are_scaled_and_noise_draws_from_the_posterior(load_tiny):
    base = load_tiny("miniature")
    pixel_values = torch.rand(2, 3, 32, 32) * 2 - 1
    posterior = base.vae.encode(pixel_values).latent_dist
    mode = base.encode_latents(pixel_values)
    assert mode.shape == (2, 12, 4, 4)
    torch.testing.assert_close(mode, posterior.mode() * 0.4)
    noise = torch.randn(2, 12, 4, 4)
    torch.testing.assert_close(base.encode_latents(pixel_values, noise), (posterior.mean + posterior.std * noise) * 0.4)
    torch.testing.assert_close(base.decode_latents(mode), base.vae.decode(posterior.mode()).sample)


def test_a_shifted_vae_is_inverted_on_decoding(load_tiny):
    base = load_tiny("sd15")
    pixel_values = torch.rand(1, 3, 32, 32)
    plain, decoded = base.encode_latents(pixel_values), base.decode_latents(base.encode_latents(pixel_values))
    base.vae.register_to_config(shift_factor=0.5)
    shifted = base.encode_latents(pixel_values)
    torch.testing.assert_close(shifted, plain - 0.5 * 0.4)
    torch.testing.assert_close(base.decode_latents(shifted), decoded)


def test_a_tokenizer_of_the_older_format_is_read(base_folder, tmp_path):
    """As in the releases of 2022: vocab.json and merges.txt, no tokenizer.json."""
    folder = copied(base_folder("sd15"), tmp_path)
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer["model"]["vocab"]))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    special = dict(bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    special["pad_token"] = "<|endoftext|>"
    config = dict(tokenizer_class="CLIPTokenizer", model_max_length=12, do_lower_case=True, **special)
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    ours = encode_prompts(load_base(folder), ["a cat", ""])
    expected = encode_prompts(load_base(base_folder("sd15")), ["a cat", ""])
    torch.testing.assert_close(ours.encoder_hidden_states, expected.encoder_hidden_states)


def spoil(folder, what):
    if what == "no scheduler":
        shutil.rmtree(folder / "scheduler")
    elif what == "no tokenizer":
        shutil.rmtree(folder / "tokenizer")
    elif what == "pickle":
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        file.rename(file.with_suffix(".bin"))
    elif what == "two variants":
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        shutil.copy(file, file.with_suffix(".ema.safetensors"))
        file.rename(file.with_suffix(".fp16.safetensors"))
    elif what == "no unet":
        shutil.rmtree(folder / "unet")
    elif what == "transformer":
        (folder / "unet").rename(folder / "transformer")
        edit_json(folder / "transformer" / "config.json", _class_name="PixArtTransformer2DModel")
    elif what == "long tokenizer":
        edit_json(folder / "tokenizer" / "tokenizer_config.json", model_max_length=77)
    elif what == "sample":
        edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="sample")


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("no scheduler", FileNotFoundError, "scheduler_config.json does not exist. It says how noise is added"),
        ("no tokenizer", FileNotFoundError, "no tokenizer/ in .*: copy the folder tokenizer/ .vocab.json"),
        ("pickle", FileNotFoundError, "is a pickle.*safe_serialization=True"),
        ("two variants", ValueError, "holds the variants ema, fp16; keep the one"),
        ("no unet", FileNotFoundError, "no diffusers folder of a base model"),
        ("transformer", ValueError, "denoiser is a PixArtTransformer2DModel"),
        ("long tokenizer", ValueError, "model_max_length is 77, but the text encoder has 12 positions"),
        ("sample", ValueError, "prediction_type 'sample' is neither epsilon nor v_prediction"),
    ],
)
def test_what_a_folder_lacks_is_named(what, error, message, base_folder, tmp_path):
    folder = copied(base_folder("sd15"), tmp_path)
    spoil(folder, what)
    with pytest.raises(error, match=message):
        load_base(folder)


def test_parts_of_different_models_are_refused(base_folder, tmp_path):
    folder = copied(base_folder("sd15"), tmp_path)
    shutil.rmtree(folder / "vae")
    shutil.copytree(base_folder("miniature") / "vae", folder / "vae")
    with pytest.raises(ValueError, match="the VAE has 12 latent channels and the U-Net takes 4"):
        load_base(folder)
    with pytest.raises(FileNotFoundError, match="holds one module, not a base model"):
        load_base(folder / "unet")
    with pytest.raises(FileNotFoundError, match="does not exist. Give a diffusers folder"):
        load_base(tmp_path / "nothing")
    with pytest.raises(ValueError, match="family is 'sd21'"):
        load_base(base_folder("sd15"), family="sd21")


# --- base models from single files ----------------------------------------------------------------------------------


def original_unet(unet: nn.Module, layers_per_block: int) -> dict[str, torch.Tensor]:
    """The U-Net's weights under the original names: the shared half as in a ControlNet, and the decoder."""
    weights = {}
    for key, tensor in unet.state_dict().items():
        parts = key.split(".")
        if parts[0] == "up_blocks":
            level, kind, index, rest = int(parts[1]), parts[2], int(parts[3]), ".".join(parts[4:])
            number = level * (layers_per_block + 1) + index
            if kind == "upsamplers":
                number = level * (layers_per_block + 1) + layers_per_block
                slot = 2 if hasattr(unet.up_blocks[level], "attentions") else 1
                name = f"output_blocks.{number}.{slot}.{rest}"
            elif kind == "attentions":
                name = f"output_blocks.{number}.1.{rest}"
            else:
                name = f"output_blocks.{number}.0.{original_layout._renamed(rest, original_layout._RESNET)}"
        elif parts[0] in ("conv_norm_out", "conv_out"):
            name = key.replace("conv_norm_out", "out.0").replace("conv_out", "out.2")
        else:
            name = original_layout.original_key(key, layers_per_block)
        weights[f"model.diffusion_model.{name}"] = tensor
    return weights


def original_clip(encoder: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    weights = {f"{prefix}text_model.{key}": tensor for key, tensor in encoder.state_dict().items()}
    weights[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(12)[None]  # older files have it
    return weights


def original_open_clip(encoder: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    state = {key.removeprefix("text_model."): tensor for key, tensor in encoder.state_dict().items()}
    fixed = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    weights = {prefix + theirs: state.pop(ours) for ours, theirs in fixed.items()}
    projection = state.pop("text_projection.weight", None)
    width = len(weights[prefix + "ln_final.bias"])
    weights[prefix + "text_projection"] = torch.zeros(width, width) if projection is None else projection.T.contiguous()
    for key, tensor in state.items():
        layer, rest = key.removeprefix("encoder.layers.").split(".", 1)
        name = f"{prefix}transformer.resblocks.{layer}."
        if rest.startswith("self_attn.") and "out_proj" not in rest:
            kind = rest.split(".")[-1]
            parts = [state[f"encoder.layers.{layer}.self_attn.{which}_proj.{kind}"] for which in "qkv"]
            weights[f"{name}attn.in_proj_{kind}"] = torch.cat(parts)
        else:
            for ours, theirs in {"self_attn": "attn", "layer_norm": "ln_", "fc1": "c_fc", "fc2": "c_proj"}.items():
                rest = rest.replace(ours, theirs)
            weights[name + rest] = tensor
    return weights


def original_state(base) -> dict[str, torch.Tensor]:
    """A base's weights as the original code would have saved them."""
    state = original_unet(base.denoiser, base.denoiser.config["layers_per_block"])
    state |= original_vae(base.vae, len(base.vae.config["block_out_channels"]))
    if base.family.name == "sd15":
        return state | original_clip(base.text_encoders[0], "cond_stage_model.transformer.")
    if base.family.name == "sd21":
        return state | original_open_clip(base.text_encoders[0], "cond_stage_model.model.")
    state |= original_clip(base.text_encoders[0], "conditioner.embedders.0.transformer.")
    return state | original_open_clip(base.text_encoders[1], "conditioner.embedders.1.model.")


@pytest.fixture
def single_file(load_tiny, base_folder, tmp_path, monkeypatch):
    """Family name -> a tiny .safetensors in the original layout with its tokenizers beside it."""

    def write(family, metadata=None, extra=()):
        base = load_tiny(family)
        scheduler = FAMILIES[family].architecture.noise_scheduler
        encoders = tuple(encoder.config.to_dict() for encoder in base.text_encoders)
        tiny = Architecture(dict(base.denoiser.config), dict(base.vae.config), encoders, scheduler, family)
        monkeypatch.setitem(FAMILIES, family, dataclasses.replace(FAMILIES[family], architecture=tiny))
        for name in ("tokenizer", "tokenizer_2")[: len(base.tokenizers)]:
            shutil.copytree(base_folder(family) / name, tmp_path / name)
        state = {key: tensor.contiguous() for key, tensor in original_state(base).items()}
        state |= {key: torch.zeros(1) for key in extra}
        save_file(state, tmp_path / "model.safetensors", metadata=metadata)
        return tmp_path / "model.safetensors", base

    return write


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_single_file_gives_the_same_base_as_the_folder(family, single_file):
    path, expected = single_file(family, metadata={"modelspec.prediction_type": "epsilon"})
    base = load_base(path)
    assert base.family.name == family and base.prediction_type == "epsilon"
    assert not any(parameter.requires_grad for parameter in base.denoiser.parameters())
    pairs = zip(
        (base.denoiser, base.vae, *base.text_encoders),
        (expected.denoiser, expected.vae, *expected.text_encoders),
        strict=True,
    )
    for ours, theirs in pairs:
        theirs = theirs.state_dict()
        assert ours.state_dict().keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.state_dict().items())
    ours, theirs = (encode_prompts(b, ["a cat"], picture_size=(32, 32)) for b in (base, expected))
    torch.testing.assert_close(ours.encoder_hidden_states, theirs.encoder_hidden_states)
    assert load_base(path).digest == base.digest


def test_a_single_file_says_what_it_predicts_or_is_refused(single_file, base_folder):
    path, _ = single_file("sd21")
    with pytest.raises(ValueError, match="two kinds with equal keys.*Put the scheduler_config.json"):
        load_base(path)
    shutil.copytree(base_folder("sd21") / "scheduler", path.parent / "scheduler")
    assert load_base(path).prediction_type == "v_prediction"


def test_an_sdxl_file_marked_for_v_prediction_is_read_as_such(single_file):
    path, _ = single_file("sdxl", extra=("v_pred", "ztsnr"))
    base = load_base(path)
    assert base.prediction_type == "v_prediction"
    assert base.process.scheduler.config["rescale_betas_zero_snr"] is True


def test_a_single_file_without_its_tokenizer_says_where_to_put_it(single_file):
    path, _ = single_file("sdxl")
    shutil.rmtree(path.parent / "tokenizer_2")
    with pytest.raises(FileNotFoundError, match="there is no tokenizer_2/ in .*copy the folder tokenizer_2/"):
        load_base(path)


def test_an_incomplete_single_file_is_refused(single_file):
    path, _ = single_file("sd15")
    weights = load_file(path)
    del weights["model.diffusion_model.middle_block.1.proj_in.bias"]
    save_file(weights, path)
    with pytest.raises(ValueError, match="the U-Net of .*: the tensor mid_block.attentions.0.proj_in.bias is missing"):
        load_base(path)
    path.rename(path.with_suffix(".ckpt"))
    with pytest.raises(ValueError, match="is not a .safetensors file. Convert it without running its code: python -c "):
        load_base(path.with_suffix(".ckpt"))


# --- ControlNets ----------------------------------------------------------------------------------------------------


def random_controlnet(base):
    torch.manual_seed(0)
    controlnet = build_controlnet(base.denoiser)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            parameter.normal_()
    return controlnet


def assert_same_weights(ours: nn.Module, theirs: nn.Module):
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in ours.state_dict().items())


@pytest.mark.parametrize("family", UNET_FAMILIES)
def test_a_controlnet_folder_is_what_diffusers_reads(family, load_tiny, tmp_path):
    base = load_tiny(family)
    controlnet = random_controlnet(base)
    save_controlnet(controlnet, tmp_path / "net")
    theirs = ControlNetModel.from_pretrained(tmp_path / "net", local_files_only=True)
    assert_same_weights(theirs, controlnet)
    assert theirs.config["resnet_time_scale_shift"] == base.denoiser.config["resnet_time_scale_shift"]
    ours = load_controlnet(tmp_path / "net", base.denoiser)
    assert_same_weights(ours, controlnet)
    assert ours.training and all(parameter.requires_grad for parameter in ours.parameters())
    single_file = tmp_path / "net" / "diffusion_pytorch_model.safetensors"
    assert_same_weights(load_controlnet(single_file, base.denoiser), controlnet)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_single_file_controlnet_returns_unchanged(family, load_tiny, tmp_path):
    base = load_tiny(family)
    controlnet = random_controlnet(base)
    save_single_file(controlnet, tmp_path / "control.safetensors")
    again = load_controlnet(tmp_path / "control.safetensors", base.denoiser)
    assert_same_weights(again, controlnet)
    assert again.config["conditioning_embedding_out_channels"] == (16, 32, 96, 256)


def test_the_miniature_has_no_single_file(load_tiny, tmp_path):
    with pytest.raises(ValueError, match="add_embedding.* no name in the original layout.*diffusers format"):
        save_single_file(random_controlnet(load_tiny("miniature")), tmp_path / "control.safetensors")
    assert not (tmp_path / "control.safetensors").exists()


def test_a_controlnet_file_of_another_base_is_refused(load_tiny, tmp_path):
    save_single_file(random_controlnet(load_tiny("sdxl")), tmp_path / "control.safetensors")
    with pytest.raises(ValueError, match="does not fit ControlNetModel: .* It was made for another base"):
        load_controlnet(tmp_path / "control.safetensors", load_tiny("sd15").denoiser)
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a ControlNet in the original or the diffusers layout"):
        load_controlnet(tmp_path / "other.safetensors", load_tiny("sd15").denoiser)
    with pytest.raises(FileNotFoundError, match="does not exist. Give a diffusers folder or a .safetensors file"):
        load_controlnet(tmp_path / "nothing", load_tiny("sd15").denoiser)


def test_only_a_controlnet_is_saved(tmp_path):
    with pytest.raises(TypeError, match="expected a ControlNetModel, or an engine around one, and got Linear"):
        save_controlnet(nn.Linear(1, 1), tmp_path)
