"""The families of bases that are supported, and which one a network's configuration is of. Free of torch.

Adding a family: an entry in FAMILIES and a branch in `identify`; a text encoding in TEXT_ENCODINGS of text.py; for an
architecture that is new, a file beside denoisers/sd3.py and its entry in DENOISERS of denoisers/registry.py; its name
in `model.family` of trainer/config/run.py and subjects.py, and in PIPELINES of trainer/model_card.py. A
transformer's class also in _TRANSFORMERS here, its ControlNet's in CONTROLNETS of recognition.py, CLASSES of
pretrained.py, CLASSES and TAGS of trainer/model_card.py; its layers in JOINT of attention.py; how its text encoders fit
in base.py; and which settings it has in trainer/config/families.py. So that it can be
planned without weights, an Architecture in PUBLISHED of architectures.py; where single files are to be read, also the
keys that tell it in single_files/keys.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from controlbooth.data.errors import UserError
from controlbooth.models import architectures


@dataclass(frozen=True)
class Part:
    """A network of a base, as a diffusers folder holds it."""

    folder: str
    kind: str
    """Its class."""
    stem: str
    """What the class's library calls its weights files."""
    model_types: tuple[str, ...] = ()
    """Of transformers: what config.json may say of it."""


UNET = Part("unet", "UNet2DConditionModel", "diffusion_pytorch_model")
VAE = Part("vae", "AutoencoderKL", "diffusion_pytorch_model")
CLIP = ("clip_text_model", "clip")
CLIP_L = Part("text_encoder", "CLIPTextModel", "model", CLIP)
PROJECTED = "CLIPTextModelWithProjection"
SD3_PART = Part("transformer", "SD3Transformer2DModel", "diffusion_pytorch_model")
FLUX_PART = Part("transformer", "FluxTransformer2DModel", "diffusion_pytorch_model")


def _t5(folder: str) -> Part:
    return Part(folder, "T5EncoderModel", "model", ("t5",))


@dataclass(frozen=True)
class Family:
    name: str
    title: str
    prediction_type: str
    """What the family's published base predicts; a folder's own scheduler configuration overrules it."""
    architecture: architectures.Architecture | None
    """Module configurations for single files; None: the family exists only as folders, which bring their own."""
    text_encoders: tuple[Part, ...] = (CLIP_L,)
    denoiser: Part = UNET
    vae_factor: int = 8
    """Pixels of a picture per latent position, on each side."""
    packs_latents: bool = False
    """Whether the network takes each square of 2x2 latent positions as one token with all their channels."""
    text_tokens: int = 0
    """Of T5 in the family's pipelines; 0 without T5."""
    usual_guidance: float = 7.5
    """Of its pictures, where nobody says another."""
    condition_entry: str = "latents"
    """Of a transformer: what its ControlNets read of a condition unless a run says otherwise, latents or pixels."""
    embeds_guidance: bool = False
    """Whether guidance is a number that the network is told, in place of a second prediction."""
    single_file: architectures.TransformerFile | None = None
    """Of a transformer's family: what its single files hold."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """Returns the networks of a folder, the one that learns to denoise first."""
        return (self.denoiser, VAE, *self.text_encoders)

    @property
    def is_transformer(self) -> bool:
        """Tells whether it is a family of flow matching, with a transformer in the U-Net's place."""
        return self.denoiser != UNET

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Returns the folders of its tokenizers, one for each text encoder."""
        return tuple(part.folder.replace("text_encoder", "tokenizer") for part in self.text_encoders)

    def without_t5(self) -> "Family":
        """Returns the same family for a run that leaves T5 out."""
        return replace(self, text_encoders=tuple(part for part in self.text_encoders if part.kind != "T5EncoderModel"))


FAMILIES = {
    family.name: family
    for family in (
        Family("sd15", "Stable Diffusion 1.x", "epsilon", architectures.SD15),
        Family("sd21", "Stable Diffusion 2.x", "v_prediction", architectures.SD21),
        Family(
            "sdxl",
            "Stable Diffusion XL",
            "epsilon",
            architectures.SDXL,
            text_encoders=(CLIP_L, Part("text_encoder_2", PROJECTED, "model", CLIP)),
        ),
        Family("miniature", "the miniature shipped with controlbooth", "v_prediction", None),
        Family(
            "sd3",
            "Stable Diffusion 3",
            "flow",
            None,
            denoiser=SD3_PART,
            single_file=architectures.SD3_FILE,
            text_tokens=256,
            usual_guidance=4.5,
            text_encoders=(
                Part("text_encoder", PROJECTED, "model", CLIP),
                Part("text_encoder_2", PROJECTED, "model", CLIP),
                _t5("text_encoder_3"),
            ),
        ),
        Family(
            "flux",
            "FLUX.1-dev",
            "flow",
            None,
            denoiser=FLUX_PART,
            single_file=architectures.FLUX_FILE,
            text_tokens=512,
            usual_guidance=3.5,
            packs_latents=True,
            embeds_guidance=True,
            text_encoders=(CLIP_L, _t5("text_encoder_2")),
        ),
        Family(
            "miniature-dit",
            "the miniature with a transformer",
            "flow",
            None,
            denoiser=SD3_PART,
            usual_guidance=3.0,
            condition_entry="pixels",  # its VAE, which has seen scenes alone, loses lines of an edge map
        ),
    )
}

OTHER_INPUTS = {9: "an inpainting model", 8: "an instruction-editing model", 7: "an upscaler"}
"""Channels that a U-Net takes where a text-to-image model takes as many as its latents have."""
SUPPORTED = "Supported bases: " + ", ".join(f"{family.title} ({name})" for name, family in FAMILIES.items()) + "."


def identify(config: Mapping[str, Any]) -> Family:
    """Finds the family of a base by its denoiser's configuration in diffusers' layout (such as unet/config.json).

    Only what makes a family is looked at, never its sizes, so that a small test model is recognised too. Raises
    ValueError for a model that is no base of a known family; the message says what it is.
    """
    if str(config.get("_class_name", "")) in _TRANSFORMERS:
        return _identify_transformer_config(config)
    return _identify_unet_config(config)


_TRANSFORMERS = ("SD3Transformer2DModel", "FluxTransformer2DModel")
_MINIATURE_CHANNELS = 12
"""Of the miniature's latents; those of SD3 and SD3.5 have 16. The classes and all other settings are alike."""
FLUX_INPUTS = {128: "FLUX.1 Canny or Depth, which takes its condition beside the latents", 384: "FLUX.1 Fill"}
"""Features of a token that a relative of FLUX.1 takes where the text-to-image model takes 64."""


def _identify_transformer_config(config: Mapping[str, Any]) -> Family:
    """Finds the family of a transformer's configuration. Raises ValueError as `identify`.

    The configuration of FLUX.1 Kontext is equal to FLUX.1-dev's, so it cannot be told apart.
    """
    inputs = config.get("in_channels", 64 if config["_class_name"].startswith("Flux") else 16)
    if type(inputs) is not int:
        raise UserError(f"the transformer's in_channels is {inputs!r}, and a number of channels belongs there")
    if config["_class_name"] == "SD3Transformer2DModel":
        outputs = config.get("out_channels", inputs)
        if outputs not in (inputs, None):
            raise UserError(
                f"the transformer takes {inputs} channels and predicts {outputs}: no text-to-image model. Give the "
                f"text-to-image base that it was made from. {SUPPORTED}"
            )
        return FAMILIES["miniature-dit" if inputs == _MINIATURE_CHANNELS else "sd3"]
    outputs = config.get("out_channels") or inputs
    if outputs != inputs:
        kind = FLUX_INPUTS.get(inputs, "no text-to-image model")
        raise UserError(f"the transformer takes {inputs} features a token and predicts {outputs}: {kind}. {SUPPORTED}")
    if not config.get("guidance_embeds", False):
        raise UserError(
            "the transformer is told no guidance (guidance_embeds is false): FLUX.1-schnell, which is distilled to a "
            f"few steps and cannot be trained on as it is. Give FLUX.1-dev. {SUPPORTED}"
        )
    return FAMILIES["flux"]


def _identify_unet_config(config: Mapping[str, Any]) -> Family:
    class_name = config.get("_class_name", "UNet2DConditionModel")
    if class_name != "UNet2DConditionModel":
        raise UserError(f"the base's denoiser is a {class_name}, not a UNet2DConditionModel. {SUPPORTED}")
    in_channels, out_channels = config.get("in_channels", 4), config.get("out_channels", 4)
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if type(value) is not int:
            raise UserError(f"the U-Net's {name} is {value!r}, and a number of channels belongs there")
    if in_channels != out_channels:
        kind = OTHER_INPUTS.get(in_channels, "no text-to-image model")
        raise UserError(
            f"the U-Net takes {in_channels} channels and predicts {out_channels}: {kind}. "
            f"Give the text-to-image base that it was made from. {SUPPORTED}"
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim"):
        if config.get(key) is not None:
            raise UserError(
                f"the U-Net's {key} is {config[key]!r}, which no supported family has "
                f"(an upscaler, a distilled or an image-conditioned model). {SUPPORTED}"
            )
    addition = config.get("addition_embed_type")
    if addition == "text_time":
        if config.get("projection_class_embeddings_input_dim") == 2560:  # 4 sizes and a score; the base has 6 sizes
            raise UserError("this is the SDXL refiner. Give the SDXL base, or a model made from it.")
        return FAMILIES["sdxl"]
    if addition == "text":
        return FAMILIES["miniature"]
    if addition is not None:
        raise UserError(f"the U-Net's addition_embed_type {addition!r} belongs to no supported family. {SUPPORTED}")
    return FAMILIES["sd21" if config.get("use_linear_projection") else "sd15"]


def check_family(requested: str, found: Family, where: str) -> Family:
    """Returns the family found at `where`. Raises ValueError if `requested` is another one, or an unknown name.

    requested: "auto" or a family's name.
    """
    if requested != "auto" and requested not in FAMILIES:
        raise UserError(f"family {requested!r} is not known. Use auto, {', '.join(FAMILIES)}.")
    if requested not in ("auto", found.name):
        raise UserError(
            f"family is {requested!r} ({FAMILIES[requested].title}), but {where} holds {found.title}. "
            f"Use family {found.name!r} or 'auto', or give another base."
        )
    return found
