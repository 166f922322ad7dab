"""Which family a base is of, and whether it is one that is supported, by what its files say. Free of torch.

What a folder's JSON files and a file's tensor names tell is enough to refuse a base before anything is loaded, so the
launcher asks here too.

Adding a family: an entry in FAMILIES and a branch in `identify` here; a text encoding in TEXT_ENCODINGS of text.py;
for an architecture that is new, a file beside sd3.py and its entry in DENOISERS of denoisers.py; its name in
`model.family` of trainer/config/run.py and subjects.py and in PIPELINES of trainer/model_card.py. So that it can be
planned without weights, an Architecture in PUBLISHED of architectures.py; where single files are to be read, also the
keys that tell it in this file.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from controlbooth.data.errors import MissingFile, UserError
from controlbooth.models import architectures
from controlbooth.models.weight_files import read_json, safetensors_header


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
        """The networks of a folder, the one that learns to denoise first."""
        return (self.denoiser, VAE, *self.text_encoders)

    @property
    def is_transformer(self) -> bool:
        """Whether it is of flow matching, with a transformer in the U-Net's place."""
        return self.denoiser != UNET

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """The folders of its tokenizers, one for each text encoder."""
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

_OTHER_INPUTS = {9: "an inpainting model", 8: "an instruction-editing model", 7: "an upscaler"}
"""Channels that a U-Net takes where a text-to-image model takes as many as its latents have."""
_SUPPORTED = "Supported bases: " + ", ".join(f"{family.title} ({name})" for name, family in FAMILIES.items()) + "."


def identify(config_or_shapes: Mapping[str, Any]) -> Family:
    """The family of a base.

    Takes either a diffusers U-Net configuration (unet/config.json) or, of a single file, a mapping of tensor names to
    shapes. Only what makes a family is looked at, never its sizes, so that a small test model is recognised too.
    Raises ValueError for a model that is no base of a known family; the message says what it is.
    """
    if any("." in key for key in config_or_shapes):
        return _identify_single_file(config_or_shapes)
    if str(config_or_shapes.get("_class_name", "")) in _TRANSFORMERS:
        return _identify_transformer_config(config_or_shapes)
    return _identify_unet_config(config_or_shapes)


_TRANSFORMERS = ("SD3Transformer2DModel", "FluxTransformer2DModel")
_MINIATURE_CHANNELS = 12
"""Of the miniature's latents; those of SD3 and SD3.5 have 16. The classes and all other settings are alike."""
_FLUX_INPUTS = {128: "FLUX.1 Canny or Depth, which takes its condition beside the latents", 384: "FLUX.1 Fill"}
"""Features of a token that a relative of FLUX.1 takes where the text-to-image model takes 64."""


def _identify_transformer_config(config: Mapping[str, Any]) -> Family:
    """The family of a transformer's configuration. That of FLUX.1 Kontext is equal to FLUX.1-dev's."""
    inputs = config.get("in_channels", 64 if config["_class_name"].startswith("Flux") else 16)
    if type(inputs) is not int:
        raise UserError(f"the transformer's in_channels is {inputs!r}, and a number of channels belongs there")
    if config["_class_name"] == "SD3Transformer2DModel":
        outputs = config.get("out_channels", inputs)
        if outputs not in (inputs, None):
            raise UserError(
                f"the transformer takes {inputs} channels and predicts {outputs}: no text-to-image model. Give the "
                f"text-to-image base that it was made from. {_SUPPORTED}"
            )
        return FAMILIES["miniature-dit" if inputs == _MINIATURE_CHANNELS else "sd3"]
    outputs = config.get("out_channels") or inputs
    if outputs != inputs:
        kind = _FLUX_INPUTS.get(inputs, "no text-to-image model")
        raise UserError(f"the transformer takes {inputs} features a token and predicts {outputs}: {kind}. {_SUPPORTED}")
    if not config.get("guidance_embeds", False):
        raise UserError(
            "the transformer is told no guidance (guidance_embeds is false): FLUX.1-schnell, which is distilled to a "
            f"few steps and cannot be trained on as it is. Give FLUX.1-dev. {_SUPPORTED}"
        )
    return FAMILIES["flux"]


def check_family(requested: str, found: Family, where: str) -> Family:
    """`requested` ("auto" or a family's name) against what was found at `where`. Raises ValueError if they differ."""
    if requested != "auto" and requested not in FAMILIES:
        raise UserError(f"family {requested!r} is not known. Use auto, {', '.join(FAMILIES)}.")
    if requested not in ("auto", found.name):
        raise UserError(
            f"family is {requested!r} ({FAMILIES[requested].title}), but {where} holds {found.title}. "
            f"Use family {found.name!r} or 'auto', or give another base."
        )
    return found


def _identify_unet_config(config: Mapping[str, Any]) -> Family:
    class_name = config.get("_class_name", "UNet2DConditionModel")
    if class_name != "UNet2DConditionModel":
        raise UserError(f"the base's denoiser is a {class_name}, not a UNet2DConditionModel. {_SUPPORTED}")
    in_channels, out_channels = config.get("in_channels", 4), config.get("out_channels", 4)
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if type(value) is not int:
            raise UserError(f"the U-Net's {name} is {value!r}, and a number of channels belongs there")
    if in_channels != out_channels:
        kind = _OTHER_INPUTS.get(in_channels, "no text-to-image model")
        raise UserError(
            f"the U-Net takes {in_channels} channels and predicts {out_channels}: {kind}. "
            f"Give the text-to-image base that it was made from. {_SUPPORTED}"
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "time_cond_proj_dim"):
        if config.get(key) is not None:
            raise UserError(
                f"the U-Net's {key} is {config[key]!r}, which no supported family has "
                f"(an upscaler, a distilled or an image-conditioned model). {_SUPPORTED}"
            )
    addition = config.get("addition_embed_type")
    if addition == "text_time":
        if config.get("projection_class_embeddings_input_dim") == 2560:  # 4 sizes and a score; the base has 6 sizes
            raise UserError("this is the SDXL refiner. Give the SDXL base, or a model made from it.")
        return FAMILIES["sdxl"]
    if addition == "text":
        return FAMILIES["miniature"]
    if addition is not None:
        raise UserError(f"the U-Net's addition_embed_type {addition!r} belongs to no supported family. {_SUPPORTED}")
    return FAMILIES["sd21" if config.get("use_linear_projection") else "sd15"]


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


def _identify_single_file(shapes: Mapping[str, Any]) -> Family:
    for part, kind in _FOREIGN_KEYS:
        if any(part in key for key in shapes):
            raise UserError(f"this file is {kind}. {_SUPPORTED}")
    for part, kind in _FOREIGN_BEGINNINGS:
        if any(key.startswith(part) for key in shapes):
            raise UserError(f"this file is {kind}. {_SUPPORTED}")
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
            f"checkpoint in the original layout. {_SUPPORTED}"
        )
    if len(entry) != 4 or entry[1] != 4:
        entry = (*entry, 0, 0)
        kind = _OTHER_INPUTS.get(entry[1], "not a text-to-image model")
        raise UserError(f"the U-Net of this file takes {entry[1]} channels: {kind}. {_SUPPORTED}")
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
    """The family of tensors with joint blocks. shapes: of the transformer, without a prefix."""
    entry, last = shapes.get("x_embedder.proj.weight", ()), shapes.get("final_layer.linear.weight", ())
    if len(entry) != 4 or len(last) != 2 or "pos_embed" not in shapes:
        raise UserError(
            "this file has blocks of Stable Diffusion 3, and not all of x_embedder.proj.weight, pos_embed and "
            f"final_layer.linear.weight with it: it is incomplete, or a relative of it. {_SUPPORTED}"
        )
    inputs, outputs = entry[1], last[0] // (entry[2] * entry[3] or 1)
    if inputs != outputs:
        raise UserError(
            f"the transformer of this file takes {inputs} channels and predicts {outputs}: no text-to-image model. "
            f"Give the text-to-image base that it was made from. {_SUPPORTED}"
        )
    return FAMILIES["sd3"]


def _identify_flux_file(shapes: Mapping[str, Any]) -> Family:
    """The family of tensors with double blocks. That of FLUX.1 Kontext is equal to FLUX.1-dev's."""
    entry, last = shapes.get("img_in.weight", ()), shapes.get("final_layer.linear.weight", ())
    if len(entry) != 2 or len(last) != 2 or not any(key.startswith("single_blocks.") for key in shapes):
        raise UserError(
            "this file is Flux or a relative of it, and not all of img_in.weight, single_blocks. and "
            f"final_layer.linear.weight are in it as FLUX.1-dev has them. {_SUPPORTED}"
        )
    if entry[1] != last[0]:
        kind = _FLUX_INPUTS.get(entry[1], "no text-to-image model")
        raise UserError(
            f"the transformer of this file takes {entry[1]} features a token and predicts {last[0]}: {kind}. "
            f"{_SUPPORTED}"
        )
    if not any(key.startswith("guidance_in.") for key in shapes):
        raise UserError(
            "the transformer of this file is told no guidance (it has no guidance_in.): FLUX.1-schnell, which is "
            f"distilled to a few steps and cannot be trained on as it is. Give FLUX.1-dev. {_SUPPORTED}"
        )
    return FAMILIES["flux"]


def parts_beside(family: Family, names: Iterable[str]) -> tuple[Part, ...]:
    """The networks of a family that are not in its single file, and so in folders beside. names: of the file's tensors.

    Of families with a U-Net a file holds all.
    """
    if family.single_file is None:
        return ()
    names = list(names)
    inside = family.single_file.inside
    there = {folder for folder, prefix in inside.items() if any(name.startswith(prefix) for name in names)}
    return tuple(part for part in family.parts if part != family.denoiser and part.folder not in there)


def check_beside(file: Path, part: Part) -> None:
    """Raises FileNotFoundError where a network that a single file lacks is not in a folder beside it, and ValueError
    where the folder holds a network of another class."""
    if not (file.parent / part.folder / "config.json").is_file():
        told = {"AutoencoderKL": "VAE", "T5EncoderModel": "T5"}.get(part.kind, "CLIP text encoder")
        without = ", or set model.t5: false to do without" if part.folder == "text_encoder_3" else ""
        raise MissingFile(
            f"{file} holds no {told}, and there is no {part.folder}/ beside it: copy the folder {part.folder}/ "
            f"(config.json and {part.stem}.safetensors) of the base's diffusers release there{without}"
        )
    check_part(file.parent, part)


_TITLES = {  # what model_index.json or a denoiser's configuration names, up to there -> what people call it
    "StableDiffusion3": "Stable Diffusion 3",
    "SD3": "Stable Diffusion 3",
    "Flux": "FLUX",
    "PixArt": "PixArt",
    "StableCascade": "Stable Cascade",
    "Wuerstchen": "Wuerstchen",
    "Kandinsky": "Kandinsky",
    "Hunyuan": "Hunyuan-DiT",
    "AuraFlow": "AuraFlow",
    "Sana": "Sana",
    "Lumina": "Lumina",
    "CogView": "CogView",
    "Kolors": "Kolors",
    "IF": "DeepFloyd IF",
    "QwenImage": "Qwen-Image",
}


def recognise(path: Path, requested: str = "auto") -> Family:
    """The family of a base, a diffusers folder or a single file. Raises as `recognise_folder` and `recognise_file`."""
    return (recognise_folder if path.is_dir() else recognise_file)(path, requested)


def recognise_folder(folder: Path, requested: str = "auto") -> Family:
    """The family of a diffusers folder. requested: as `check_family` takes it.

    Raises FileNotFoundError for a folder of something else, and ValueError for a base that is not supported, or is not
    of the requested family, with the folder and what it is.
    """
    index = folder / "model_index.json"
    pipeline = str(read_json(index).get("_class_name", "")) if index.is_file() else ""
    config = folder / "unet" / "config.json"
    if not config.is_file():
        config = folder / "transformer" / "config.json"
    title = next((title for start, title in _TITLES.items() if pipeline.startswith(start)), None)
    if config.is_file():
        tree = read_json(config)
        try:
            found = identify(tree)
            if found.name == "miniature-dit" and (folder / "text_encoder_2").is_dir():
                found = FAMILIES["sd3"]
            family = check_family(requested, found, str(folder))
            return family.without_t5() if _leaves_t5_out(index, family) else family
        except ValueError as error:
            title = title or next(
                (title for start, title in _TITLES.items() if str(tree.get("_class_name", "")).startswith(start)), None
            )
            named = "" if title is None else f" ({title})"
            raise UserError(f"{folder}{named}: {error}") from None
    if pipeline and not pipeline.startswith("StableDiffusionPipeline"):
        raise UserError(f"{folder} holds {title or 'another model'}: {index.name} names a {pipeline}. {_SUPPORTED}")
    if (folder / "config.json").exists():
        raise MissingFile(
            f"{folder} holds one module, not a base model. Give the folder that holds unet/, vae/, text_encoder/, "
            "tokenizer/ and scheduler/."
        )
    missing = folder / "unet" / "config.json"
    raise MissingFile(
        f"there is no {missing}, so {folder} is no diffusers folder of a base model: give the folder of a whole Stable "
        "Diffusion model, which holds unet/, vae/, text_encoder/ and tokenizer/"
    )


def _leaves_t5_out(index: Path, family: Family) -> bool:
    """Whether model_index.json says that the folder has no T5, as a pipeline that was saved without it does."""
    if family.name != "sd3" or not index.is_file():
        return False
    entry = read_json(index).get("text_encoder_3")
    return not isinstance(entry, list) or None in entry


def recognise_file(file: Path, requested: str = "auto") -> Family:
    """The family of a single file in the original layout, by its header. Raises ValueError as `recognise_folder`."""
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is not a .safetensors file. A .ckpt can run code when it is read: convert it first.")
    shapes = {name: tuple(entry["shape"]) for name, entry in safetensors_header(file).items()}
    try:
        return check_family(requested, _identify_single_file(shapes), str(file))
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def check_part(folder: Path, part: Part) -> None:
    """Raises FileNotFoundError and ValueError where the folder of a base has another class of network in a part."""
    path = folder / part.folder / "config.json"
    config = read_json(path)
    if part.model_types:
        found = config.get("model_type", part.model_types[0])
        if found not in part.model_types:
            raise UserError(
                f"{path}: the text encoder is a model of the type {found!r}, and this family's is a {part.kind} "
                f"({' or '.join(part.model_types)}). {_SUPPORTED}"
            )
    elif (found := config.get("_class_name", part.kind)) != part.kind:
        raise UserError(f"{path} is of the class {found}, and this family's is {part.kind}. {_SUPPORTED}")


_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
"""Any of these is a tokenizer."""


def check_tokenizer(folder: Path, name: str) -> None:
    """Raises FileNotFoundError and ValueError where the folder of a base lacks files of a tokenizer."""
    place = folder / name
    if not place.is_dir():
        raise MissingFile(
            f"there is no {name}/ in {folder}. A base needs its tokenizer: copy the folder {name}/ (vocab.json, "
            "merges.txt, tokenizer_config.json, special_tokens_map.json) of the base's diffusers release there."
        )
    if not any(all((place / file).is_file() for file in files) for files in _TOKENIZER_FILES):
        wanted = " or ".join(" with ".join(files) for files in _TOKENIZER_FILES)
        raise MissingFile(f"{place} holds no {wanted}: the tokenizer is not whole. Download the rest of it")
    for file in sorted(place.glob("*.json")):
        read_json(file)
    length = read_json(place / "tokenizer_config.json").get("model_max_length", 1)
    if type(length) is not int or length < 1:
        raise UserError(
            f"{place / 'tokenizer_config.json'}: model_max_length is {length!r}, and a number of tokens belongs there"
        )


def refuse_for_subjects(family: Family, where: str) -> None:
    """Raises ValueError for a base on which DreamBooth cannot be trained."""
    if family.is_transformer:
        raise UserError(
            f"{where} is {family.title}, and subjects are trained on U-Nets so far: "
            + ", ".join(one.title for one in FAMILIES.values() if not one.is_transformer)
            + ". ControlNets are trained on it"
        )


SAMPLERS = ("ddim", "unipc", "dpm++", "euler", "heun")
"""Names of the samplers of noise_schedule.py, for command lines, which do without diffusers."""
NOISE_SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDPM", "DDPMParallel", "DDIM", "DDIMInverse", "DDIMParallel", "PNDM", "LMSDiscrete", "EulerDiscrete",
        "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSinglestep", "DPMSolverSDE", "DEISMultistep", "UniPCMultistep",
        "SASolver", "LCM", "TCD",
    )
)  # fmt: skip
"""Classes of diffusers whose noise is that of DDPM (arXiv 2006.11239): betas, and a prediction of noise or of v."""
PREDICTIONS = ("epsilon", "v_prediction")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")


def scheduler_file(folder: Path) -> Path:
    """Of a base's folder. Raises FileNotFoundError where it is not there."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise MissingFile(
            f"{path} does not exist. It says how noise is added and what the U-Net predicts: copy it from the base's "
            "diffusers release."
        )
    return path


FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
"""Classes of diffusers whose noise is that of flow matching."""


def check_flow_scheduler(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a scheduler's configuration by which a base of flow matching cannot have been trained."""
    name = str(config.get("_class_name", FLOW_SCHEDULERS[0]))
    if name not in FLOW_SCHEDULERS:
        raise UserError(
            f"{where}: the scheduler is a {name}, and this base is of flow matching, whose folder names a "
            f"{FLOW_SCHEDULERS[0]}. Put the base's own scheduler_config.json there"
        )
    if config.get("num_train_timesteps", 1000) != 1000:
        raise UserError(
            f"{where}: num_train_timesteps is {config['num_train_timesteps']!r}, and flow matching has 1000"
        )
    for field, least in (("shift", 0.0), ("base_shift", None), ("max_shift", None)):
        value = config.get(field)
        if value is not None and (not _is_number(value) or (least is not None and value <= least)):
            raise UserError(
                f"{where}: {field} is {value!r}, and a number{' above 0' if least == 0 else ''} belongs there"
            )
    for field in ("base_image_seq_len", "max_image_seq_len"):
        if field in config and (type(config[field]) is not int or config[field] < 1):
            raise UserError(f"{where}: {field} is {config[field]!r}, and a number of tokens belongs there")
    if type(config.get("use_dynamic_shifting", False)) is not bool:
        raise UserError(
            f"{where}: use_dynamic_shifting is {config['use_dynamic_shifting']!r}, and true or false belong there"
        )


def check_noise(family: Family, config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a scheduler's configuration by which no base of this family can have been trained."""
    (check_flow_scheduler if family.is_transformer else check_scheduler)(config, where)


def check_scheduler(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a scheduler's configuration by which a U-Net of these families cannot have been trained.

    Such a U-Net predicts the noise of DDPM's betas, or v; one of flow matching or of EDM's noise levels does not, and
    reading its numbers as DDPM's would train on noise that it has never seen.
    """
    name = str(config.get("_class_name", "DDPMScheduler"))
    if name not in NOISE_SCHEDULERS:
        flow = "flow matching" if "Flow" in name else "EDM's noise levels" if "EDM" in name else None
        raise UserError(
            f"{where}: the scheduler is a {name}{f', which says {flow}' if flow else ''}, and the U-Net of the "
            "supported families predicts the noise of DDPM's betas, or v. Put the base's own scheduler_config.json "
            "there, or give a base of a supported family"
        )
    if config.get("use_flow_sigmas"):
        raise UserError(
            f"{where}: use_flow_sigmas is {config['use_flow_sigmas']!r}, which says flow matching, and the U-Net of "
            "the supported families does not predict that. Give the base's own scheduler_config.json"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise UserError(
            f"{where}: timestep_type is {config['timestep_type']!r} (EDM's noise levels, as CosXL has them), and the "
            "U-Net of the supported families is told discrete steps. Give a base of a supported family"
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UserError(f"{where}: prediction_type {prediction!r} is neither epsilon nor v_prediction")
    _check_betas(config, where)


def _check_betas(config: Mapping[str, Any], where: str) -> None:
    """The noise schedule's numbers. Raises ValueError with field and value."""
    steps = config.get("num_train_timesteps", 1000)
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if type(steps) is not int or steps < 1:
        raise UserError(f"{where}: num_train_timesteps is {steps!r}, and a number of steps belongs there")
    for field, value in (("beta_start", start), ("beta_end", end)):
        if not _is_number(value) or not 0.0 < value < 1.0:
            raise UserError(f"{where}: {field} is {value!r}, and a variance between 0 and 1 belongs there")
    trained = config.get("trained_betas")
    if trained is not None:
        if not isinstance(trained, list) or not all(_is_number(beta) and 0.0 <= beta <= 1.0 for beta in trained):
            raise UserError(f"{where}: trained_betas is no list of variances between 0 and 1, or null")
        if len(trained) != steps:
            raise UserError(f"{where}: trained_betas has {len(trained)} values for num_train_timesteps={steps}")
    for field, known in (("beta_schedule", BETA_SCHEDULES), ("timestep_spacing", TIMESTEP_SPACINGS)):
        if config.get(field, known[0]) not in known:
            raise UserError(f"{where}: {field} is {config[field]!r}, which is none of {', '.join(known)}")
    offset = config.get("steps_offset", 0)
    if type(offset) is not int or not 0 <= offset < steps:
        raise UserError(f"{where}: steps_offset is {offset!r}, and a number of steps belongs there")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


CONTROLNETS = (
    "ControlNetModel", "VariantControlNet", "SD3ControlNetModel", "PixelSD3ControlNet", "FluxControlNetModel"
)  # fmt: skip
"""Classes of ControlNets that are read: diffusers', and two of ours."""


def check_controlnet(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError where a config.json is that of no ControlNet that is read here, or of one for other conditions.

    where: its folder, for the message.
    """
    name = config.get("_class_name")
    if name not in CONTROLNETS:
        raise UserError(f"{where} holds a {name}, which is no ControlNet that is known: {', '.join(CONTROLNETS)}")
    check_condition_channels(config.get("conditioning_channels", 3), where)


def check_condition_channels(channels: object, where: str) -> None:
    """Raises ValueError for a ControlNet whose conditions are not pictures with three channels."""
    if channels != 3:
        raise UserError(
            f"{where}: its conditioning_channels is {channels!r}, and conditions here are RGB, with 3 (a gray one is "
            "repeated three times). Give a ControlNet with conditioning_channels 3"
        )
