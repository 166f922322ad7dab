"""Which family a base is of, and whether all of its parts are there, by what its files say. Free of torch.

What a folder's JSON files and a file's tensor names tell is enough to refuse a base before anything is loaded, so the
launcher asks here too.
"""

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from controlbooth.data.errors import MissingFile, UserError
from controlbooth.models.families import FAMILIES, SUPPORTED, Family, Part, check_family, identify
from controlbooth.models.files.weight_files import read_json, safetensors_header
from controlbooth.models.single_files.keys import identify_file


def parts_beside(family: Family, names: Iterable[str]) -> tuple[Part, ...]:
    """Returns the networks of a family that are not in its single file, and so must be in folders beside it.

    names: of the file's tensors. A file of a family with a U-Net holds all of its networks.
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


PICKLES = (".ckpt", ".pt", ".pth", ".bin")
"""Weights in the format of torch.save, which can hold programs."""


def base_remedy(base: str) -> tuple[str, str] | None:
    """Returns the command that makes a base of what somebody has named, and where it then lies; None for no such name.

    A pickle is converted with weights_only, so that nothing in it is run; an id of the Hugging Face hub, which is no
    path here, is downloaded.
    """
    path = Path(base)
    if path.suffix in PICKLES:
        target = str(path.with_suffix(".safetensors"))
        program = (  # without a quote of the shell's, so that it stands in a message as it is typed
            "import sys, torch; from safetensors.torch import save_file; "
            'tree = torch.load(sys.argv[1], map_location="cpu", weights_only=True); '
            'tree = tree.get("state_dict", tree); '
            "save_file({name: one.clone().contiguous() for name, one in tree.items() "
            "if isinstance(one, torch.Tensor)}, sys.argv[2])"
        )
        return shlex.join(["python", "-c", program, str(path), target]), target
    if (
        re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", base)
        and path.suffix != ".safetensors"
        and not path.exists()
    ):
        target = f"models/{path.name}"
        return f"hf download {base} --local-dir {target}", target
    return None


def recognise(path: Path, requested: str = "auto") -> Family:
    """Finds the family of a diffusers folder or a single file. Raises as `recognise_folder` and `recognise_file`."""
    return (recognise_folder if path.is_dir() else recognise_file)(path, requested)


def recognise_folder(folder: Path, requested: str = "auto") -> Family:
    """Finds the family of a diffusers folder. requested: as `check_family` takes it.

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
        raise UserError(f"{folder} holds {title or 'another model'}: {index.name} names a {pipeline}. {SUPPORTED}")
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
    """Tells whether model_index.json says that the folder has no T5, as after saving a pipeline without it."""
    if family.name != "sd3" or not index.is_file():
        return False
    entry = read_json(index).get("text_encoder_3")
    return not isinstance(entry, list) or None in entry


def recognise_file(file: Path, requested: str = "auto") -> Family:
    """Finds the family of a single file in the original layout by its header. Raises as `recognise_folder`."""
    if file.suffix != ".safetensors":
        remedy = base_remedy(str(file))
        told = f" Convert it without running its code: {remedy[0]}" if remedy else ""
        raise UserError(f"{file} is not a .safetensors file.{told}")
    shapes = {name: tuple(entry["shape"]) for name, entry in safetensors_header(file).items()}
    try:
        return check_family(requested, identify_file(shapes), str(file))
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
                f"({' or '.join(part.model_types)}). {SUPPORTED}"
            )
    elif (found := config.get("_class_name", part.kind)) != part.kind:
        raise UserError(f"{path} is of the class {found}, and this family's is {part.kind}. {SUPPORTED}")


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


CONTROLNETS = (
    "ControlNetModel", "VariantControlNet", "ControlLora",
    "SD3ControlNetModel", "PixelSD3ControlNet", "FluxControlNetModel", "FluxControlLora",
)  # fmt: skip
"""Classes of ControlNets that are read: diffusers', and four of ours."""


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
