"""LoRAs by the names of diffusers, kohya's scripts and ComfyUI: there and back, and what programs make of them."""

import copy
import functools

import diffusers
import pytest
import torch
from bases import write_base
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_cells import FAMILIES, FORMS, cell, pipeline_of, random_lora, shuffled, targets_of, tensors_in
from safetensors import safe_open
from safetensors.torch import load_file

from controlbooth.models import architectures
from controlbooth.models.lora_files.comfy_form import from_comfy
from controlbooth.models.lora_files.diffusers_form import from_diffusers
from controlbooth.models.lora_files.fusing import fused, parted
from controlbooth.models.lora_files.kohya_form import from_kohya, to_kohya
from controlbooth.models.lora_files.layers import LoraLayer, layer_shapes
from controlbooth.models.lora_files.original_names import original_layers

BLOCKS = ("blocks", "clip", "t5")
"""All that a LoRA of blocks adapts; diffusers' form has no T5."""


@functools.cache
def shapes_of(family):
    """The shapes of a tiny base's layers."""
    import tempfile
    from pathlib import Path

    from controlbooth.models.pretrained import load_base

    with tempfile.TemporaryDirectory() as folder:
        return layer_shapes(load_base(write_base(Path(folder) / family, family), device="meta"))


def read(form, tensors, family, shapes):
    if form == "diffusers":
        return from_diffusers(tensors)
    return (from_kohya if form == "kohya" else from_comfy)(tensors, family, shapes)


def written_forms(family):
    return [form for form in FORMS if (family, form) != ("miniature", "comfy")]


@pytest.mark.parametrize(("family", "form"), [(one, form) for one in FAMILIES for form in written_forms(one)])
@settings(max_examples=10, deadline=None)
@given(st.data())
def test_what_is_written_in_a_form_is_read_back_as_the_same_lora(family, form, data):
    shapes = shapes_of(family)
    names = [name for target in BLOCKS for name in targets_of(shapes, target)]
    names = [name for name in names if form != "diffusers" or ".block." not in name]
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=12, unique=True))
    ranks = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    alphas = data.draw(st.lists(st.floats(0.25, 64.0, width=32), min_size=1, max_size=3))
    lora = random_lora({name: shapes[name] for name in chosen}, 3, ranks, alphas)
    back = read(form, tensors_in(form, lora, family, shapes), family, shapes)
    assert back.keys() == lora.keys()
    for name, layer in lora.items():
        assert back[name].rank == layer.rank
        wrong = (back[name].delta() - layer.delta()).abs().max()
        assert wrong <= 1e-5 * layer.delta().abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_whose_alpha_is_its_rank_goes_there_and_back_bit_for_bit(family):
    shapes = shapes_of(family)
    for form in written_forms(family):
        lora = random_lora(targets_of(shapes, "blocks"), 5, ranks=(4,), alphas=(4.0,))
        back = read(form, tensors_in(form, lora, family, shapes), family, shapes)
        for name, layer in lora.items():
            assert torch.equal(back[name].down, layer.down) and torch.equal(back[name].up, layer.up)
            assert back[name].alpha == 4.0


def test_q_k_and_v_become_one_layer_of_three_times_the_rank_with_zeros_between_its_blocks():
    lora = random_lora({f"transformer.transformer_blocks.0.attn.to_{one}": (16, 16) for one in "qkv"}, 1, (2,), (2.0,))
    tensors = to_kohya(lora, "flux", shapes_of("flux"))
    word = "lora_unet_double_blocks_0_img_attn_qkv"
    assert tensors.keys() == {f"{word}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    down, up = tensors[f"{word}.lora_down.weight"], tensors[f"{word}.lora_up.weight"]
    assert down.shape == (6, 16) and up.shape == (48, 6) and tensors[f"{word}.alpha"] == 6.0
    blocks = up.view(3, 16, 3, 2)
    assert all(bool(blocks[i, :, j].any()) == (i == j) for i in range(3) for j in range(3))
    torch.testing.assert_close((up @ down).double(), torch.cat([layer.delta() for layer in lora.values()]))


def test_parts_of_other_ranks_and_alphas_are_filled_up_to_equal_blocks():
    parts = [
        LoraLayer(torch.ones(1, 4), torch.ones(3, 1), 8.0),
        None,
        LoraLayer(torch.ones(2, 4), torch.ones(5, 2), 1.0),
    ]
    whole = fused(parts, [3, 2, 5])
    assert whole.rank == 6 and whole.alpha == 48.0
    assert torch.equal(whole.delta(), torch.cat([parts[0].delta(), torch.zeros(2, 4), parts[2].delta()]).double())
    back = parted(whole, [3, 2, 5])
    assert back[1] is None and [one.rank for one in back if one] == [1, 2]


def test_a_joint_layer_of_another_trainer_without_blocks_is_read_too():
    shapes, word = shapes_of("flux"), "lora_unet_single_blocks_1_linear1"
    down, up = torch.randn(3, 16), torch.randn(16 * 3 + 64, 3)
    tensors = {f"{word}.lora_down.weight": down, f"{word}.lora_up.weight": up, f"{word}.alpha": torch.tensor(1.5)}
    lora = from_kohya(tensors, "flux", shapes)
    assert [name.split(".", 3)[3] for name in lora] == ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]
    together = torch.cat([layer.delta() for layer in lora.values()])
    torch.testing.assert_close(together, 0.5 * up.double() @ down.double())


def test_the_alphas_that_peft_notes_in_a_header_are_obeyed(load_tiny, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    base = load_tiny("sd3")
    pipeline = pipeline_of(base)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_k"], alpha_pattern={"attn2.to_q": 8})
    pipeline.transformer.add_adapter(config, "one")
    pipeline.transformer.requires_grad_(False)
    for name, parameter in pipeline.transformer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    diffusers.StableDiffusion3Pipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer, adapter_name="one"),
        transformer_lora_adapter_metadata=config.to_dict(),
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    lora = from_diffusers(load_file(path), header)
    assert {layer.alpha for name, layer in lora.items() if "attn2.to_q" in name} == {8.0}
    for name, layer in lora.items():
        module = pipeline.transformer.get_submodule(name.removeprefix("transformer."))
        torch.testing.assert_close(layer.delta(), module.get_delta_weight("one").double(), rtol=1e-5, atol=1e-6)
    assert to_kohya(lora, "sd3", layer_shapes(load_tiny("sd3")))


def layer_of(family, name):
    return random_lora({name: shapes_of(family)[name]}, 0)


@pytest.mark.parametrize(
    ("form", "family", "name", "message"),
    [
        (
            "kohya",
            "flux",
            "transformer.x_embedder",
            "x_embedder has no name in the form 'kohya'.*Use diffusers$",
        ),
        ("comfy", "sd3", "transformer.norm_out.linear", "norm_out.linear has no name.*'comfy'.*Use diffusers"),
        ("diffusers", "sd3", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q", "'diffusers'.*kohya or comfy"),
        ("kohya", "sdxl", "text_encoder_2.text_projection", "No form has one for it: leave it out"),
        ("comfy", "miniature", "unet.conv_in", "the miniature shipped with controlbooth .*Use diffusers or kohya"),
        ("kohya", "miniature-dit", "transformer.proj_out", "the form 'kohya'.*no such base. Use diffusers$"),
    ],
)
def test_what_a_form_cannot_name_is_refused_with_the_form_that_can(form, family, name, message):
    with pytest.raises(ValueError, match=message):
        tensors_in(form, layer_of(family, name), family, shapes_of(family))


def test_files_of_other_bases_and_damaged_ones_are_refused_by_their_layers():
    shapes = shapes_of("sd15")
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = layer_of("sd15", name)
    tensors = to_kohya(lora, "sd15", shapes)
    word = next(iter(tensors)).split(".")[0]
    with pytest.raises(ValueError, match="is of another base"):
        to_kohya(lora, "sdxl", {"unet.conv_in": (8, 4, 3, 3)})
    with pytest.raises(ValueError, match=r"one of shape \(16, 16\), and the base has \(32, 16\)"):
        from_kohya(tensors, "sd15", shapes | {name: (32, 16)})
    with pytest.raises(ValueError, match="lora_unet_what.alpha is of none of its layers"):
        from_kohya(tensors | {"lora_unet_what.alpha": torch.ones(())}, "sd15", shapes)
    with pytest.raises(ValueError, match="only one of lora_down and lora_up"):
        from_kohya({key: one for key, one in tensors.items() if "lora_up" not in key}, "sd15", shapes)
    with pytest.raises(ValueError, match="its alpha is 0"):
        from_kohya(tensors | {f"{word}.alpha": torch.zeros(())}, "sd15", shapes)
    with pytest.raises(ValueError, match="no LoRA in diffusers' form: it has no lora_A"):
        from_diffusers({})


@pytest.mark.parametrize("architecture", [architectures.SD15, architectures.SD21, architectures.SDXL])
def test_every_layer_of_a_full_size_unet_has_the_name_that_diffusers_reads_it_by(architecture):
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**architecture.denoiser)
    layers = {
        name: module for name, module in unet.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    shapes = {f"unet.{name}": tuple(module.weight.shape) for name, module in layers.items()}
    rows = original_layers("sdxl", shapes)
    assert len({row.name for row in rows}) == len(rows) == len(layers)
    original, expected = {}, {}
    for row in rows:
        name = row.parts[0].removeprefix("unet.")
        for kind, tensor in layers[name].named_parameters():
            original[f"model.diffusion_model.{row.name}.{kind}"] = expected[f"{name}.{kind}"] = tensor
    converted = convert_ldm_unet_checkpoint(original, unet.config)
    assert converted.keys() == expected.keys()
    assert all(tensor is expected[name] for name, tensor in converted.items())


def test_flux_at_its_own_size_has_the_304_layers_that_kohyas_scripts_list():
    with torch.device("meta"):
        transformer = diffusers.FluxTransformer2DModel(num_layers=19, num_single_layers=38)
    shapes = {
        f"transformer.{name}": tuple(module.weight.shape)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    kinds = ("attn_proj", "attn_qkv", "mlp_0", "mlp_2", "mod_lin")
    listed = {f"double_blocks_{i}_{side}_{kind}" for i in range(19) for side in ("img", "txt") for kind in kinds}
    listed |= {f"single_blocks_{i}_{kind}" for i in range(38) for kind in ("linear1", "linear2", "modulation_lin")}
    rows = original_layers("flux", shapes)
    assert {row.name.replace(".", "_") for row in rows} == listed and len(rows) == 304


# What other programs make of our files

KINDS = {
    "unet": {
        "diffusers": ("equal", "-", "some"),  # ComfyUI looks for attention under processor names
        "kohya": ("equal", "equal", "equal"),
        "comfy": ("raises ValueError", "-", "equal"),
    },
    "sd3": {
        "diffusers": ("equal", "-", "equal"),
        "kohya": ("none", "equal", "equal"),  # diffusers passes over all of it with a line in its log
        "comfy": ("raises ValueError", "-", "equal"),
    },
    "flux": {
        "diffusers": ("equal", "-", "equal"),
        "kohya": ("equal", "equal", "equal"),
        "comfy": ("equal", "-", "equal"),
    },
}
"""Form -> what diffusers, kohya's scripts and ComfyUI make of a LoRA of the attention."""


def in_words(found):
    number = found.split(" of ")[0]
    return found if not number.isdigit() else "none" if number == "0" else "some"


def read_by_all(load_tiny, family, target, form, folder, change=dict):
    return [
        in_words(cell(copy.deepcopy(load_tiny(family)), target, form, loader, folder, change))
        for loader in ("diffusers", "kohya", "comfy")
    ]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl", "sd3", "flux"])
def test_other_programs_add_what_our_lora_adds_or_the_table_says_that_they_do_not(load_tiny, family, form, tmp_path):
    expected = KINDS[family if family in KINDS else "unet"][form]
    found = read_by_all(load_tiny, family, "attention", form, tmp_path)
    assert found == [one if one != "some" else "none" for one in expected]
    if family == "flux" and form != "diffusers":
        return  # its wide layers take minutes
    blocks = read_by_all(load_tiny, family, "blocks", form, tmp_path)
    some = (family, form) == ("sd3", "diffusers")  # ComfyUI does not swap halves in the last block's modulation
    assert blocks == [*expected[:2], "some" if some else expected[2]]
    clip = read_by_all(load_tiny, family, "clip", form, tmp_path)
    assert clip == [*expected[:2], "equal"]


@pytest.mark.slow
def test_layers_of_t5_are_read_by_kohyas_scripts_and_by_comfyui(load_tiny, tmp_path):
    for family in ("sd3", "flux"):
        assert read_by_all(load_tiny, family, "t5", "kohya", tmp_path)[1:] == ["equal", "equal"]
        assert read_by_all(load_tiny, family, "t5", "comfy", tmp_path)[2] == "equal"


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_diffusers_reads_loras_of_the_miniature(load_tiny, form, tmp_path):
    assert cell(load_tiny("miniature"), "blocks", form, "diffusers", tmp_path) == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_a_lora_with_its_layers_shuffled_is_not_taken_for_equal(load_tiny, family, tmp_path):
    for form, loaders in {"diffusers": ("diffusers",), "kohya": ("kohya", "comfy"), "comfy": ("comfy",)}.items():
        for loader in loaders:
            found = cell(copy.deepcopy(load_tiny(family)), "attention", form, loader, tmp_path, shuffled)
            right, whole = map(int, found.split(" of "))
            assert right <= whole // 8
