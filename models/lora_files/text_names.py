"""What the forms call text encoders, and the refusal of a layer or base that a form has no name for."""

import re

from controlbooth.data.errors import UserError
from controlbooth.models.families import FAMILIES

FORMS = ("diffusers", "kohya", "comfy")
NOT_ELSEWHERE = {"miniature": ("comfy",), "miniature-dit": ("kohya", "comfy")}
"""Bases of our own -> the forms whose programs have no such base. diffusers' loader reads kohya's names of a U-Net."""
_KOHYA = {"CLIP_L": "lora_te1", "CLIP_G": "lora_te2", "T5": "lora_te3"}
_COMFY = {"CLIP_L": "clip_l", "CLIP_G": "clip_g", "T5": "t5xxl"}
_CLIP = re.compile(r"text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.(self_attn|mlp)\.\w+")
_T5 = re.compile(r"text_encoder_[23]\.encoder\.block\.\d+\.layer\.\d+\.\w+\.\w+")


def encoder_kinds(family: str) -> dict[str, str]:
    """Returns folder -> CLIP_L, CLIP_G or T5 for the text encoders of a family."""
    kinds: dict[str, str] = {}
    for part in FAMILIES[family].text_encoders:
        clip = "CLIP_G" if "CLIP_L" in kinds.values() else "CLIP_L"
        kinds[part.folder] = "T5" if part.kind == "T5EncoderModel" else clip
    return kinds


def kohya_prefixes(family: str) -> dict[str, str]:
    """Returns folder -> what kohya's names of a text encoder begin with. Stable Diffusion 1 and 2 have no number."""
    kinds = encoder_kinds(family)
    return {folder: "lora_te" if len(kinds) == 1 else _KOHYA[kind] for folder, kind in kinds.items()}


def comfy_prefixes(family: str) -> dict[str, str]:
    """Returns folder -> what ComfyUI's names of a text encoder begin with."""
    named = {folder: _COMFY[kind] for folder, kind in encoder_kinds(family).items()}
    if family == "sd21":
        named["text_encoder"] = "clip_h"
    return {folder: f"text_encoders.{name}.transformer" for folder, name in named.items()}


def is_clip_layer(name: str) -> bool:
    """Tells whether a full name is of a layer in a block of CLIP."""
    return _CLIP.fullmatch(name) is not None


def is_text_layer(name: str) -> bool:
    """Tells whether a full name is of a layer in a block of a text encoder, which is what LoRAs adapt there."""
    return is_clip_layer(name) or _T5.fullmatch(name) is not None


def refuse(name: str, form: str) -> UserError:
    """Makes the error for a layer that a form cannot hold. It names the forms that can."""
    if name.startswith("text_encoder"):
        remedy = "Use kohya or comfy" if is_text_layer(name) else "No form has one for it: leave it out"
    else:
        remedy = "Use diffusers"
    return UserError(f"{name} has no name in the form {form!r} that its programs read. {remedy}")


def refuse_form(form: str, family: str) -> None:
    """Raises ValueError where no program that reads a form has such a base."""
    if form in NOT_ELSEWHERE.get(family, ()):
        others = " or ".join(one for one in FORMS if one not in NOT_ELSEWHERE[family])
        raise UserError(
            f"a LoRA of {FAMILIES[family].title} cannot be written in the form {form!r}: the programs that read it "
            f"have no such base. Use {others}"
        )
