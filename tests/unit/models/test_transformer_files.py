"""SD3 and FLUX.1 from single files of their authors' layouts, and from diffusers folders in several files or halves."""

import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import TRANSFORMER_FAMILIES
from layouts import original_transformer, original_vae, sharded
from safetensors.torch import load_file, save_file
from torch import Tensor

from controlbooth.models.architectures import FLUX_FILE, SD3_FILE
from controlbooth.models.base import Base
from controlbooth.models.families import FAMILIES
from controlbooth.models.files.stored import stored_tensors
from controlbooth.models.pretrained import load_base
from controlbooth.models.single_files.keys import identify_file

UNET_PREFIX = "model.diffusion_model."


def original_state(base: Base, encoders: bool) -> dict[str, Tensor]:
    family = base.family.name
    state = {UNET_PREFIX + name: tensor for name, tensor in original_transformer(base.denoiser, family).items()}
    if family == "flux":
        return state
    state |= original_vae(base.vae, len(base.vae.config["block_out_channels"]))
    for prefix, encoder in zip(("clip_l", "clip_g", "t5xxl"), base.text_encoders if encoders else (), strict=False):
        own = {f"text_encoders.{prefix}.transformer.{name}": one for name, one in encoder.state_dict().items()}
        own = {name: one for name, one in own.items() if not name.endswith("encoder.embed_tokens.weight")}
        state |= {name: one for name, one in own.items() if "clip_l.transformer.text_projection" not in name}
        state[f"text_encoders.{prefix}.logit_scale"] = torch.tensor(1.0)
    return state


@pytest.fixture
def write(load_tiny, base_folder, tmp_path, monkeypatch):
    """Family's name -> (a tiny file, the base that it was written of), with the folders beside that it needs."""

    def written(family: str, encoders: bool = True, prefix: str = UNET_PREFIX) -> tuple[Path, Base]:
        base = load_tiny(family)
        if family == "sd3":  # the files have no projection of the first encoder, which their authors do not use
            torch.nn.init.eye_(base.text_encoders[0].text_projection.weight)
        config = base.denoiser.config
        names = ("attention_head_dim", "sample_size") if family == "sd3" else ("attention_head_dim", "axes_dims_rope")
        tiny = dataclasses.replace(
            SD3_FILE if family == "sd3" else FLUX_FILE,
            denoiser={name: config[name] for name in names},
            vae=dict(base.vae.config),
            text_encoders=tuple(encoder.config.to_dict() for encoder in base.text_encoders),
        )
        monkeypatch.setitem(FAMILIES, family, dataclasses.replace(FAMILIES[family], single_file=tiny))
        for name in base.family.tokenizers:
            shutil.copytree(base_folder(family) / name, tmp_path / name)
        beside = [] if family == "sd3" and encoders else [part.folder for part in base.family.text_encoders]
        for name in [*beside, *(["vae"] if family == "flux" else [])]:
            shutil.copytree(base_folder(family) / name, tmp_path / name)
        if family == "sd3" and not encoders:
            base.text_encoders[0].save_pretrained(tmp_path / "text_encoder")
        state = {
            name.replace(UNET_PREFIX, prefix): tensor.contiguous()
            for name, tensor in original_state(base, encoders).items()
        }
        save_file(state, tmp_path / "model.safetensors")
        return tmp_path / "model.safetensors", base

    return written


def assert_same(ours: Base, theirs: Base) -> None:
    for one, other in zip(
        (ours.denoiser, ours.vae, *ours.text_encoders),
        (theirs.denoiser, theirs.vae, *theirs.text_encoders),
        strict=True,
    ):
        expected, found = other.state_dict(), one.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in found.values())


@pytest.mark.parametrize(
    ("family", "encoders", "prefix"),
    [("sd3", True, UNET_PREFIX), ("sd3", False, UNET_PREFIX), ("flux", False, UNET_PREFIX), ("flux", False, "")],
)
def test_a_single_file_gives_the_same_base_as_the_folder(family, encoders, prefix, write):
    path, expected = write(family, encoders, prefix)
    base = load_base(path)
    assert_same(base, expected)
    ours, theirs = dict(base.denoiser.config), dict(expected.denoiser.config)
    told = {name for name in ours if not name.startswith("_") and ours[name] != theirs[name]}
    assert told <= {"out_channels", "dual_attention_layers"}  # None for as many as come in; a tuple for a list
    assert base.family.name == family and base.process.facts() == expected.process.facts()
    assert load_base(path).digest == base.digest and load_base(path, device="meta").denoiser.device.type == "meta"
    assert load_base(path, dtype=torch.bfloat16).denoiser.dtype == torch.bfloat16
    if family == "sd3":
        assert len(load_base(path, t5=False).text_encoders) == 2


def test_diffusers_own_function_reads_the_same_of_a_file_as_wide_as_flux(monkeypatch):
    """Its function knows one width; so that our own names are compared with it at that width, without values."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    from controlbooth.models.single_files.transformer_file import _flux_to_diffusers

    with torch.device("meta"):
        network = FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)
    state = original_transformer(network, "flux")
    theirs = convert_flux_transformer_checkpoint_to_diffusers(dict(state))
    ours = _flux_to_diffusers(state)
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: one.shape for name, one in theirs.items()}
    assert ours.keys() == network.state_dict().keys()


def test_a_scheduler_beside_a_file_goes_before_the_usual_one(write):
    path, _ = write("flux")
    assert load_base(path).process.facts()["shift"] == 3.0
    (path.parent / "scheduler").mkdir()
    settings = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0, "use_dynamic_shifting": False}
    (path.parent / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    base = load_base(path)
    assert base.process.facts()["shift"] == 2.0
    assert base.identity["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("family", "part", "told"),
    [
        ("flux", "vae", "holds no VAE, and there is no vae/ beside it: copy the folder vae/"),
        ("flux", "text_encoder", "holds no CLIP text encoder, and there is no text_encoder/ beside it"),
        ("flux", "text_encoder_2", "holds no T5, and there is no text_encoder_2/ beside it"),
        ("sd3", "text_encoder_2", "holds no CLIP text encoder, and there is no text_encoder_2/ beside it"),
        ("sd3", "text_encoder_3", "holds no T5, .* no text_encoder_3/ beside it.* or set model.t5: false"),
        ("sd3", "tokenizer_3", "there is no tokenizer_3/ in "),
    ],
)
def test_what_is_neither_in_a_file_nor_beside_it_is_named(family, part, told, write):
    path, _ = write(family, encoders=False)
    shutil.rmtree(path.parent / part)
    with pytest.raises(FileNotFoundError, match=told):
        load_base(path, device="meta")
    if part == "text_encoder_3":
        assert len(load_base(path, device="meta", t5=False).text_encoders) == 2


@pytest.mark.parametrize(
    ("family", "name", "told"),
    [
        ("sd3", "joint_blocks.1.x_block.mlp.fc1.weight", "the transformer of .* lacks the tensor joint_blocks.1.x_bl"),
        ("sd3", "y_embedder.mlp.0.weight", "the transformer of .* lacks the tensor y_embedder.mlp.0.weight"),
        ("flux", "double_blocks.1.img_mlp.0.weight", "the tensor transformer_blocks.1.ff.net.0.proj.weight is missing"),
        ("flux", "vector_in.in_layer.weight", "the transformer of .* lacks the tensor vector_in.in_layer.weight"),
        ("flux", "single_blocks.0.linear1.bias", "4 tensors .single_transformer_blocks.0.attn.to_k.bias.* are missing"),
    ],
)
def test_an_incomplete_file_is_refused(family, name, told, write):
    path, _ = write(family)
    weights = load_file(path)
    whole = weights.pop(UNET_PREFIX + name)
    save_file(weights, path)
    with pytest.raises(ValueError, match=told):
        load_base(path, device="meta")
    save_file(weights | {UNET_PREFIX + name: whole, f"{UNET_PREFIX}another.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="another.weight.* unknown|unknown .another.weight"):
        load_base(path, device="meta")
    save_file(weights | {UNET_PREFIX + name: torch.full_like(whole, torch.nan)}, path)
    with pytest.raises(ValueError, match="the transformer of .*hold values that are no finite numbers"):
        load_base(path)


FLUX = {
    "img_in.weight": (3072, 64), "final_layer.linear.weight": (64, 3072), "double_blocks.0.img_mod.lin.bias": (9,),
    "single_blocks.0.linear2.bias": (9,), "guidance_in.in_layer.weight": (3072, 256),
}  # fmt: skip
SD3 = {
    "x_embedder.proj.weight": (1536, 16, 2, 2), "final_layer.linear.weight": (64, 1536), "pos_embed": (1, 36864, 1536),
    "joint_blocks.0.x_block.attn.qkv.bias": (9,),
}  # fmt: skip
without_guidance = {name: shape for name, shape in FLUX.items() if not name.startswith("guidance")}


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (without_guidance, "told no guidance .it has no guidance_in.*FLUX.1-schnell.*Give FLUX.1-dev"),
        (FLUX | {"img_in.weight": (3072, 384)}, "takes 384 features a token and predicts 64: FLUX.1 Fill"),
        (FLUX | {"img_in.weight": (3072, 128)}, "takes 128 features .*: FLUX.1 Canny or Depth"),
        (FLUX | {"double_stream_modulation_img.lin.weight": (9, 9), "img_in.weight": (6144, 128)}, "FLUX.2"),
        (FLUX | {"distilled_guidance_layer.in_proj.weight": (9, 9)}, "Chroma"),
        (FLUX | {"txt_in.individual_token_refiner.blocks.0.norm1.weight": (9,)}, "HunyuanVideo"),
        (FLUX | {"controlnet_blocks.0.weight": (9, 9)}, "a ControlNet, not a base model: give its diffusers folder"),
        ({"controlnet_x_embedder.weight": (9, 9)}, "a ControlNet, not a base model"),
        ({"transformer_blocks.0.attn.to_q.weight": (9, 9), "controlnet_blocks.0.weight": (9, 9)}, "a ControlNet"),
        ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (9, 9)}, "a LoRA, not a base model"),
        ({"double_blocks.0.img_attn.qkv.lora_A.weight": (9, 9)}, "a LoRA, not a base model"),
        ({"lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": (9, 9)}, "a LoRA, not a base model"),
        (FLUX | {"scaled_fp8": (2,)}, "scaled to 8 bits"),
        ({name: shape for name, shape in FLUX.items() if name != "img_in.weight"}, "Flux or a relative of it"),
        (SD3 | {"x_embedder.proj.weight": (1536, 33, 2, 2)}, "takes 33 channels and predicts 16: no text-to-image"),
        ({name: shape for name, shape in SD3.items() if name != "pos_embed"}, "blocks of Stable Diffusion 3, and not"),
        (SD3 | {"controlnet_blocks.0.weight": (9, 9)}, "a ControlNet, not a base model"),
    ],
)
def test_relatives_in_single_files_are_refused_by_name(shapes, told):
    for prefix in ("", UNET_PREFIX):
        with pytest.raises(ValueError, match=told):
            identify_file({prefix + name: shape for name, shape in shapes.items()})


def test_files_of_both_families_are_recognised():
    for shapes, name in ((FLUX, "flux"), (SD3, "sd3")):
        for prefix in ("", UNET_PREFIX):
            found = identify_file({prefix + name: shape for name, shape in shapes.items()})
            assert found is FAMILIES[name]


def test_fp16_with_t5_in_a_file_is_refused(write):
    path, _ = write("sd3")
    with pytest.raises(ValueError, match="T5, a text encoder of .*, overflows in fp16. Use bf16 or fp32"):
        load_base(path, dtype=torch.float16)


# --- diffusers folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", TRANSFORMER_FAMILIES)
def test_a_folder_in_several_files_is_read_whole_or_refused(family, base_folder, tmp_path):
    """T5's embedding has two names in the network, and one in one of the files."""
    base = shutil.copytree(base_folder(family), tmp_path / "base")
    last = FAMILIES[family].text_encoders[-1].folder
    for part in ("transformer", last):
        files = sharded(base, part)
    names = [name for file in files for name in load_file(file)]
    assert names.count("shared.weight") + names.count("encoder.embed_tokens.weight") == 1
    found = load_base(base)
    assert_same(found, load_base(base_folder(family)))
    t5 = found.text_encoders[-1]
    assert t5.shared.weight.data_ptr() == t5.encoder.embed_tokens.weight.data_ptr()
    files[0].unlink()
    with pytest.raises(FileNotFoundError, match=rf"{base / last} holds 1 of the 2 shards"):
        load_base(base, device="meta")


@pytest.mark.parametrize(("variant", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("family", TRANSFORMER_FAMILIES)
def test_a_half_precision_variant_is_read_where_there_is_nothing_else(family, variant, dtype, base_folder, tmp_path):
    base = shutil.copytree(base_folder(family), tmp_path / "base")
    expected = load_base(base_folder(family))
    sharded(base, "transformer", index=False)
    for file in base.rglob("*.safetensors"):
        name = re.sub(r"^([^.-]+)", rf"\1.{variant}", file.name)
        halves = {key: tensor.to(dtype) for key, tensor in load_file(file).items()}
        save_file(halves, file.with_name(name), metadata={"format": "pt"})
        file.unlink()
    for module in (expected.denoiser, expected.vae, *expected.text_encoders):
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.to(dtype).float())
    assert_same(load_base(base), expected)
    assert load_base(base, dtype=torch.bfloat16).denoiser.dtype == torch.bfloat16


# --- tensors that still lie in their files --------------------------------------------------------------------------


def test_functions_of_torch_on_stored_tensors_give_what_they_give_on_tensors(tmp_path):
    values = {"a": torch.arange(24.0).view(6, 4), "b": torch.arange(3), "c": torch.tensor(2.5), "d": torch.zeros(0, 3)}
    values["e"] = torch.rand(5).to(torch.float8_e4m3fn)
    save_file(values, tmp_path / "x.safetensors")
    stored: Any = stored_tensors([tmp_path / "x.safetensors"])
    assert all(torch.equal(one.read().float(), values[name].float()) for name, one in stored.items())
    a, whole = stored["a"], values["a"]
    first, second = a.chunk(2, dim=0)
    pairs = [
        (torch.cat([second, first]), torch.cat([whole[3:], whole[:3]])),
        (torch.split(a, [1, 2, 3], dim=0)[1], whole[1:3]),
        (a[2:, :].clone().detach(), whole[2:]),
        (a.T.contiguous(), whole.T),
    ]
    for ours, expected in pairs:
        assert torch.equal(ours.read(), expected) and ours.shape == expected.shape and ours.names == {"a"}
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-40])
    with pytest.raises(ValueError, match="x.safetensors cannot be read: it ends before its tensors do. Fetch it again"):
        [one.read() for one in stored.values()]


def test_tensors_that_lie_in_their_files_hold_no_file_open_and_are_let_go_one_by_one(tmp_path):
    values = {f"weight {number}": torch.full((5000,), float(number)) for number in range(20)}
    save_file(values, file := tmp_path / "x.safetensors")
    before = len(os.listdir("/proc/self/fd"))
    read = {name: one.read() for name, one in stored_tensors([file]).items()}

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(file))

    assert (len(os.listdir("/proc/self/fd")), mapped()) == (before, 20)
    read["weight 0"][0] = 7.0  # a page of our own
    part = read["weight 3"][10:20]
    del read
    assert mapped() == 1 and torch.equal(part, torch.full((10,), 3.0))
    assert torch.equal(stored_tensors([file])["weight 0"].read(), values["weight 0"])
