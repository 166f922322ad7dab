import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint
from safetensors.torch import load_file

from controlbooth.models import architectures
from controlbooth.models.architectures import Architecture
from controlbooth.models.denoisers.unet import COPIED, build_controlnet
from controlbooth.models.pretrained import save_controlnet, save_single_file
from controlbooth.models.single_files.unet_file import key_map


def controlnet_without_weights(architecture: Architecture) -> ControlNetModel:
    with torch.device("meta"):
        return build_controlnet(UNet2DConditionModel(**architecture.denoiser))


def test_sd15_controlnet_has_the_released_key_names():
    names = key_map(controlnet_without_weights(architectures.SD15), 2)
    assert len(names) == len(set(names.values())) == 340
    released = {  # as the module names of the released cldm.py give them
        "conv_in.weight": "input_blocks.0.0.weight",
        "time_embedding.linear_1.weight": "time_embed.0.weight",
        "time_embedding.linear_2.bias": "time_embed.2.bias",
        "down_blocks.0.resnets.0.norm1.weight": "input_blocks.1.0.in_layers.0.weight",
        "down_blocks.0.resnets.1.conv1.bias": "input_blocks.2.0.in_layers.2.bias",
        "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
        "down_blocks.1.resnets.0.conv_shortcut.weight": "input_blocks.4.0.skip_connection.weight",
        "down_blocks.1.resnets.0.time_emb_proj.weight": "input_blocks.4.0.emb_layers.1.weight",
        "down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight": (
            "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight"
        ),
        "down_blocks.2.downsamplers.0.conv.bias": "input_blocks.9.0.op.bias",
        "down_blocks.3.resnets.1.conv2.weight": "input_blocks.11.0.out_layers.3.weight",
        "mid_block.resnets.0.norm2.bias": "middle_block.0.out_layers.0.bias",
        "mid_block.attentions.0.proj_in.weight": "middle_block.1.proj_in.weight",
        "mid_block.resnets.1.conv2.weight": "middle_block.2.out_layers.3.weight",
        "controlnet_mid_block.weight": "middle_block_out.0.weight",
        "controlnet_down_blocks.0.weight": "zero_convs.0.0.weight",
        "controlnet_down_blocks.11.bias": "zero_convs.11.0.bias",
        "controlnet_cond_embedding.conv_in.weight": "input_hint_block.0.weight",
        "controlnet_cond_embedding.blocks.0.weight": "input_hint_block.2.weight",
        "controlnet_cond_embedding.blocks.5.bias": "input_hint_block.12.bias",
        "controlnet_cond_embedding.conv_out.weight": "input_hint_block.14.weight",
    }
    assert released.items() <= names.items()


@pytest.mark.parametrize("architecture", [architectures.SD15, architectures.SD21])
def test_every_full_size_key_survives_diffusers_conversion(architecture):
    controlnet = controlnet_without_weights(architecture)
    state = controlnet.state_dict()
    original = {f"control_model.{name}": state[key] for key, name in key_map(controlnet, 2).items()}
    converted = convert_controlnet_checkpoint(original, controlnet.config)
    assert {key: tensor.shape for key, tensor in converted.items()} == {key: t.shape for key, t in state.items()}


def test_sdxl_controlnet_names_its_size_conditioning_label_emb():
    names = key_map(controlnet_without_weights(architectures.SDXL), 2)
    assert names["add_embedding.linear_1.weight"] == "label_emb.0.0.weight"
    assert names["add_embedding.linear_2.bias"] == "label_emb.0.2.bias"
    deep = "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.weight"
    assert names[deep] == "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight"


@pytest.mark.parametrize("architecture", [architectures.SD15, architectures.SDXL])
def test_the_shared_half_of_every_full_size_unet_key_survives_diffusers_conversion(architecture):
    """The same table names the U-Net's encoder in a whole checkpoint."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture.denoiser)
    shared = {key: tensor for key, tensor in unet.state_dict().items() if key.split(".")[0] in COPIED}
    names = key_map(build_controlnet(unet), 2)
    original = {f"model.diffusion_model.{names[key]}": tensor for key, tensor in shared.items()}
    converted = convert_ldm_unet_checkpoint(original, unet.config)
    assert {key: t.shape for key, t in converted.items()} == {key: t.shape for key, t in shared.items()}


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_diffusers_own_conversion_reads_our_single_files(family, load_tiny, tmp_path):
    """SDXL is left out: diffusers' conversion has no rule for a ControlNet's label_emb."""
    base = load_tiny(family)
    controlnet = build_controlnet(base.denoiser)
    path = tmp_path / "control.safetensors"
    save_single_file(controlnet, path)
    converted = convert_controlnet_checkpoint(load_file(path), controlnet.config)
    expected = controlnet.state_dict()
    assert converted.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in converted.items())
    save_controlnet(controlnet, tmp_path / "config")
    loaded = ControlNetModel.from_single_file(str(path), config=str(tmp_path / "config"), local_files_only=True)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
