"""Which family a single file is of, by the names and shapes of its tensors. Free of torch."""

from collections.abc import Mapping
from typing import Any

from controlbooth.data.errors import UserError
from controlbooth.models.families import FAMILIES, FLUX_INPUTS, OTHER_INPUTS, SUPPORTED, Family

_FOREIGN_KEYS = (  # part of a key -> what such a file is
    ("double_stream_blocks.", "a diffusion transformer"),
    ("double_layers.", "AuraFlow"),
    ("adaln_single.", "PixArt or a relative of it"),
    ("patchify_proj.", "a video model"),
    ("clip_txt_pooled_mapper.", "Stable Cascade"),
    ("clip_mapper.", "Stable Cascade or Wuerstchen"),
    ("effnet_mapper.", "Stable Cascade or Wuerstchen"),
    ("edm_vpred.", "a model of EDM's noise levels (CosXL)"),
    ("edm_mean", "a model of EDM's noise levels (Playground 2.5)"),
    ("control_model.", "a ControlNet, not a base model: give it as model.controlnet"),
    ("controlnet_cond_embedding.", "a ControlNet, not a base model: give it as model.controlnet"),
    ("input_hint_block.", "a ControlNet, not a base model: give it as model.controlnet"),
    ("controlnet_blocks.", "a ControlNet, not a base model: give its diffusers folder as model.controlnet"),
    ("controlnet_x_embedder.", "a ControlNet, not a base model: give its diffusers folder as model.controlnet"),
    ("lora_", "a LoRA, not a base model"),
    (".lokr_", "a LoRA, not a base model"),
    (".hada_", "a LoRA, not a base model"),
    ("double_stream_modulation", "FLUX.2, whose blocks and text encoder are others than FLUX.1's"),
    ("distilled_guidance_layer.", "Chroma, made from FLUX.1-schnell"),
    ("individual_token_refiner.", "HunyuanVideo"),
    ("scaled_fp8", "scaled to 8 bits (fp8 with a scale for each tensor), which is not read: give it in bf16"),
    (".scale_weight", "scaled to 8 bits (fp8 with a scale for each tensor), which is not read: give it in bf16"),
    (".quant_state.", "quantised by bitsandbytes, which is not read: give it in bf16"),
    ("ip_adapter.", "an IP-Adapter, not a base model"),
)
_FOREIGN_BEGINNINGS = (
    ("down_blocks.", "a single module in diffusers' layout: give the folder that holds unet/, vae/ and text_encoder/"),
    ("transformer_blocks.", "a single module in diffusers' layout, of a diffusion transformer"),
    ("text_model.", "a text encoder alone: give the folder that holds unet/, vae/ and text_encoder/"),
    ("encoder.down", "a VAE alone: give the folder that holds unet/, vae/ and text_encoder/"),
)


def identify_file(shapes: Mapping[str, Any]) -> Family:
    """Finds the family of a single file in the layout of its authors. shapes: tensor name -> shape.

    Only what makes a family is looked at, never its sizes. Raises ValueError for a file that is no whole base of a
    known family; the message says what it is.
    """
    for part, kind in _FOREIGN_KEYS:
        if any(part in key for key in shapes):
            raise UserError(f"this file is {kind}. {SUPPORTED}")
    for part, kind in _FOREIGN_BEGINNINGS:
        if any(key.startswith(part) for key in shapes):
            raise UserError(f"this file is {kind}. {SUPPORTED}")
    for part, identify_transformer in (("joint_blocks.", _identify_sd3_file), ("double_blocks.", _identify_flux_file)):
        if any(key.removeprefix(_DENOISER).startswith(part) for key in shapes):
            prefix = _DENOISER if any(key.startswith(_DENOISER) for key in shapes) else ""
            return identify_transformer(
                {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
            )
    entry = shapes.get("model.diffusion_model.input_blocks.0.0.weight")
    if entry is None:
        raise UserError(
            "this file has no model.diffusion_model.input_blocks.0.0.weight, so it is no whole Stable Diffusion "
            f"checkpoint in the original layout. {SUPPORTED}"
        )
    if len(entry) != 4 or entry[1] != 4:
        entry = (*entry, 0, 0)
        kind = OTHER_INPUTS.get(entry[1], "not a text-to-image model")
        raise UserError(f"the U-Net of this file takes {entry[1]} channels: {kind}. {SUPPORTED}")
    prefixes = {
        "conditioner.embedders.1.model.": "sdxl",
        "cond_stage_model.model.": "sd21",
        "cond_stage_model.transformer.": "sd15",
    }
    for prefix, name in prefixes.items():
        if any(key.startswith(prefix) for key in shapes):
            return FAMILIES[name]
    if any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        raise UserError("this file is the SDXL refiner. Give the SDXL base, or a model made from it.")
    raise UserError(
        "this file holds no text encoder (none of " + ", ".join(f"{prefix}*" for prefix in prefixes) + "). "
        "Give a whole checkpoint, or a diffusers folder."
    )


_DENOISER = "model.diffusion_model."


def _identify_sd3_file(shapes: Mapping[str, Any]) -> Family:
    """Finds the family of a transformer with joint blocks. shapes: of its tensors, named without a prefix.

    Raises ValueError for an incomplete transformer, and for one that is no text-to-image model.
    """
    entry, last = shapes.get("x_embedder.proj.weight", ()), shapes.get("final_layer.linear.weight", ())
    if len(entry) != 4 or len(last) != 2 or "pos_embed" not in shapes:
        raise UserError(
            "this file has blocks of Stable Diffusion 3, and not all of x_embedder.proj.weight, pos_embed and "
            f"final_layer.linear.weight with it: it is incomplete, or a relative of it. {SUPPORTED}"
        )
    inputs, outputs = entry[1], last[0] // (entry[2] * entry[3] or 1)
    if inputs != outputs:
        raise UserError(
            f"the transformer of this file takes {inputs} channels and predicts {outputs}: no text-to-image model. "
            f"Give the text-to-image base that it was made from. {SUPPORTED}"
        )
    return FAMILIES["sd3"]


def _identify_flux_file(shapes: Mapping[str, Any]) -> Family:
    """Finds the family of a transformer with double blocks. Raises ValueError for a relative of FLUX.1-dev.

    The tensors of FLUX.1 Kontext are named and shaped as FLUX.1-dev's, so it cannot be told apart.
    """
    entry, last = shapes.get("img_in.weight", ()), shapes.get("final_layer.linear.weight", ())
    if len(entry) != 2 or len(last) != 2 or not any(key.startswith("single_blocks.") for key in shapes):
        raise UserError(
            "this file is Flux or a relative of it, and not all of img_in.weight, single_blocks. and "
            f"final_layer.linear.weight are in it as FLUX.1-dev has them. {SUPPORTED}"
        )
    if entry[1] != last[0]:
        kind = FLUX_INPUTS.get(entry[1], "no text-to-image model")
        raise UserError(
            f"the transformer of this file takes {entry[1]} features a token and predicts {last[0]}: {kind}. "
            f"{SUPPORTED}"
        )
    if not any(key.startswith("guidance_in.") for key in shapes):
        raise UserError(
            "the transformer of this file is told no guidance (it has no guidance_in.): FLUX.1-schnell, which is "
            f"distilled to a few steps and cannot be trained on as it is. Give FLUX.1-dev. {SUPPORTED}"
        )
    return FAMILIES["flux"]
