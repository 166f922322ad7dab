import pytest
import torch
from diffusers import UNet2DConditionModel

from controlbooth.models.architectures import PUBLISHED
from controlbooth.models.families import FAMILIES, check_family, identify
from controlbooth.models.single_files.keys import identify_file
from controlbooth.models.text import encode_prompts, encode_with_dropout, time_ids_of

SIZE = (32, 32)
CAPTIONS = ["", "a cat", "", "", "red dog, a blue cat", ""]


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_published_architectures_are_recognised_as_their_own_family(name):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**FAMILIES[name].architecture.denoiser)
    assert identify(unet.config) is FAMILIES[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_tiny_folders_are_recognised(name, load_tiny):
    assert load_tiny(name).family == FAMILIES[name]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "PixArtTransformer2DModel"},
            "denoiser is a PixArtTransformer2DModel.*Supported bases: Stable",
        ),
        ({"_class_name": "Flux2Transformer2DModel"}, "Flux2Transformer2DModel, not a UNet2DConditionModel"),
        ({"_class_name": "FluxTransformer2DModel"}, "guidance_embeds is false.: FLUX.1-schnell.*Give FLUX.1-dev"),
        ({"_class_name": "FluxTransformer2DModel", "in_channels": 384, "out_channels": 64}, "FLUX.1 Fill"),
        ({"_class_name": "FluxTransformer2DModel", "in_channels": 128, "out_channels": 64}, "FLUX.1 Canny or Depth"),
        (
            {"_class_name": "SD3Transformer2DModel", "in_channels": 33, "out_channels": 16},
            "33 channels and predicts 16",
        ),
        ({"in_channels": 9, "out_channels": 4}, "takes 9 channels and predicts 4: an inpainting model"),
        ({"in_channels": 8, "out_channels": 4}, "an instruction-editing model"),
        ({"num_class_embeds": 1000}, "num_class_embeds is 1000"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ({"addition_embed_type": "image"}, "addition_embed_type 'image' belongs to no supported family"),
        ({"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 2560}, "SDXL refiner"),
    ],
)
def test_a_folder_of_no_known_family_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        identify(config)


ENTRY = {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3)}


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", "sd15"),
        ("cond_stage_model.model.token_embedding.weight", "sd21"),
        ("conditioner.embedders.1.model.token_embedding.weight", "sdxl"),
    ],
)
def test_single_files_are_recognised_by_their_text_encoders(key, name):
    assert identify_file(ENTRY | {key: (1, 1)}) is FAMILIES[name]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1, 1)}, "Stable Diffusion 3"),
        ({"double_blocks.0.img_attn.qkv.weight": (1, 1)}, "Flux"),
        ({"control_model.zero_convs.0.0.weight": (1, 1)}, "a ControlNet, not a base model"),
        ({"lora_unet_down_blocks_0.lora_up.weight": (1, 1)}, "a LoRA, not a base model"),
        ({"down_blocks.0.resnets.0.conv1.weight": (1, 1)}, "a single module in diffusers' layout"),
        ({"encoder.weight": (1, 1)}, "no whole Stable Diffusion checkpoint"),
        (ENTRY, "no text encoder"),
        ({"model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}, "an inpainting model"),
        (ENTRY | {"conditioner.embedders.0.model.ln_final.weight": (1, 1)}, "SDXL refiner"),
    ],
)
def test_a_single_file_of_no_known_family_is_named(shapes, message):
    with pytest.raises(ValueError, match=message):
        identify_file(shapes)


def test_a_base_of_another_family_than_asked_for_is_refused():
    assert check_family("auto", FAMILIES["sd15"], "/bases/x") is FAMILIES["sd15"]
    with pytest.raises(ValueError, match="family is 'sd21' .Stable Diffusion 2.x., but /bases/x holds .* 1.x.*'sd15'"):
        check_family("sd21", FAMILIES["sd15"], "/bases/x")
    with pytest.raises(ValueError, match="'sd4' is not known. Use auto, sd15, sd21, sdxl, miniature, sd3, flux"):
        check_family("sd4", FAMILIES["sd15"], "/bases/x")


@pytest.mark.parametrize("name", FAMILIES)
def test_only_kept_prompts_are_encoded_and_equal_the_plain_encoding(name, load_tiny):
    base = load_tiny(name)
    rows = []
    for encoder in base.text_encoders:
        encoder.register_forward_hook(
            lambda module, args, kwargs, output: rows.append(len(args[0] if args else kwargs["input_ids"])),
            with_kwargs=True,
        )
    encode_with_dropout(base, CAPTIONS, picture_size=SIZE)
    assert rows == [1] * len(base.text_encoders) + [2] * len(base.text_encoders)  # the empty prompt once, then two
    rows.clear()
    encoding = encode_with_dropout(base, CAPTIONS, picture_size=SIZE)
    assert rows == [2] * len(base.text_encoders)  # the empty prompt never again
    rows.clear()
    encode_with_dropout(base, ["", ""], picture_size=SIZE)
    assert rows == []
    plain = encode_prompts(base, CAPTIONS, picture_size=SIZE)
    torch.testing.assert_close(encoding.encoder_hidden_states, plain.encoder_hidden_states)
    assert encoding.added_cond_kwargs.keys() == plain.added_cond_kwargs.keys()
    for key, value in plain.added_cond_kwargs.items():
        torch.testing.assert_close(encoding.added_cond_kwargs[key], value)


def test_the_empty_prompt_kept_under_inference_mode_still_serves_training(load_tiny):
    base = load_tiny("sd15")
    with torch.inference_mode():
        encode_with_dropout(base, [""])
    weight = torch.ones(16, requires_grad=True)
    (encode_with_dropout(base, ["", "a cat"]).encoder_hidden_states * weight).sum().backward()
    assert weight.grad is not None


def test_rows_of_the_cached_empty_prompt_are_not_shared_with_callers(load_tiny):
    base = load_tiny("sd15")
    first = encode_with_dropout(base, ["", ""]).encoder_hidden_states
    expected = first.clone()
    first.zero_()
    assert torch.equal(encode_with_dropout(base, ["", ""]).encoder_hidden_states, expected)


def test_sdxl_concatenates_penultimate_layers_and_pools_the_second_encoder(load_tiny):
    base = load_tiny("sdxl")
    encoding = encode_prompts(base, ["a cat"], picture_size=SIZE)
    ids = base.tokenizers[0](["a cat"], padding="max_length", max_length=12, return_tensors="pt").input_ids
    with torch.no_grad():
        first, second = (encoder(ids, output_hidden_states=True) for encoder in base.text_encoders)
    side_by_side = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    assert torch.equal(encoding.encoder_hidden_states, side_by_side)
    assert torch.equal(encoding.added_cond_kwargs["text_embeds"], second.text_embeds)
    assert encoding.added_cond_kwargs["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


def test_sdxl_sizes_are_original_then_crop_then_target():
    ids = time_ids_of(2, (1024, 768), torch.tensor([[600, 500], [2000, 1500]]), torch.tensor([[0, 10], [20, 0]]))
    assert ids.tolist() == [[600, 500, 0, 10, 1024, 768], [2000, 1500, 20, 0, 1024, 768]]
    with pytest.raises(ValueError, match=r"crops has shape \(1, 2\), but 2 prompts need \(2, 2\)"):
        time_ids_of(2, (1024, 768), crops=torch.zeros(1, 2))


def test_sdxl_without_a_picture_size_is_refused(load_tiny):
    with pytest.raises(ValueError, match="give picture_size=.height, width. in pixels"):
        encode_with_dropout(load_tiny("sdxl"), ["a cat"])


def test_long_prompts_are_cut_at_the_tokenizers_length(load_tiny):
    assert encode_prompts(load_tiny("sd15"), ["a " * 50]).encoder_hidden_states.shape == (1, 12, 16)


def test_the_published_architectures_are_those_of_the_families():
    own = {name: one.architecture for name, one in FAMILIES.items() if one.architecture is not None}
    assert own == {name: one for name, one in PUBLISHED.items() if name in FAMILIES}
    assert all(one.family in FAMILIES for one in PUBLISHED.values())
