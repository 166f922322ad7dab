"""Reading base models and ControlNets in the formats that others use: diffusers folders and single .safetensors files.

Nothing here opens a network connection: what a base lacks is an error that says which file to put where.
"""

import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    ControlNetModel,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    SD3ControlNetModel,
    UNet2DConditionModel,
)
from safetensors import safe_open
from torch import nn
from transformers import AutoTokenizer

from controlbooth.data.errors import MissingFile, UserError
from controlbooth.models.architectures import MINIATURE
from controlbooth.models.base import Base, check_parts_fit, vae_dtype
from controlbooth.models.denoisers.control_lora import ControlLora, merged, share_weights, small_weights
from controlbooth.models.denoisers.flux_control_lora import FluxControlLora
from controlbooth.models.denoisers.foreign import borrow, check_trainable
from controlbooth.models.denoisers.pixel_controlnet import PixelSD3ControlNet
from controlbooth.models.denoisers.registry import DENOISERS, check_fits, denoiser_of
from controlbooth.models.denoisers.unet import build_controlnet
from controlbooth.models.denoisers.variants import VariantControlNet
from controlbooth.models.families import VAE, Family, Part
from controlbooth.models.files.loading import fill, load_module
from controlbooth.models.files.stored import stored_tensors
from controlbooth.models.files.weight_files import read_json, weights_files
from controlbooth.models.files.weights import save_pretrained
from controlbooth.models.identity import base_identity, weights_digests
from controlbooth.models.noise.checks import check_flow_scheduler, scheduler_file
from controlbooth.models.noise.process import Diffusion, FlowMatching, Process
from controlbooth.models.noise.schedules import make_noise_scheduler, read_noise_scheduler
from controlbooth.models.recognition import (
    check_beside,
    check_condition_channels,
    check_controlnet,
    check_part,
    check_tokenizer,
    parts_beside,
    recognise_file,
    recognise_folder,
)
from controlbooth.models.single_files import control_lora_file, transformer_file, unet_file

Digests = Callable[[Path, Mapping[str, Iterable[Path]]], tuple[str, dict[str, str]]]
"""What gives the digests of a base's files: `weights_digests`, or what calls it for several processes."""
DECODER_FILE = "decoder.safetensors"
"""In the ControlNet's folder of a checkpoint: the U-Net's decoder that has learned with the ControlNet, in float32."""
UNET_FOLDER = "unet"
"""In the folder of an export: the whole U-Net with that decoder, as diffusers reads it."""


def load_base(
    path: str | os.PathLike[str],
    family: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    t5: bool = True,
    text_tokens: int | None = None,
    digests_of: Digests = weights_digests,
) -> Base:
    """Reads a base model, frozen, every tensor of its networks from its files.

    path: a diffusers folder (its full-precision files, or where there are none a variant such as *.fp16.safetensors),
    a single .safetensors file in the original layout with a tokenizer/ folder beside it, or "miniature". What a file
    of SD3 or FLUX.1 does not hold, such as text encoders and the VAE, is read from folders beside it.
    t5: whether SD3's third text encoder is read; without it zeros stand for its states, as in the pipelines.
    text_tokens: to which T5's prompts are filled up or cut; None for what the family's pipelines take.
    digests_of: is called once, after all files are read, except on the device "meta".
    Under fp16 a VAE that asks for it (SDXL's overflows) stays in float32. On the device "meta" no weight is read: all
    is checked but values, in a second or two, and the base is good for nothing else.
    Raises FileNotFoundError for what is missing and ValueError for a base of another or an unknown family, or one of
    which a tensor is missing, unknown, of another shape or no number.
    """
    path, empty = MINIATURE if os.fspath(path) == "miniature" else Path(path), torch.device(device).type == "meta"
    digests_of = _no_digests if empty else digests_of
    if path.is_dir():
        base = _load_folder(path, family, dtype, empty, t5, digests_of)
    elif path.is_file():
        base = _load_single_file(path, family, dtype, empty, t5, digests_of)
    else:
        raise MissingFile(
            f"base model {path} does not exist. Give a diffusers folder, a single .safetensors file, or 'miniature'."
        )
    base.text_tokens = base.family.text_tokens if text_tokens is None else text_tokens
    check_parts_fit(base)
    modules: list[Any] = [base.vae, base.denoiser, *base.text_encoders]
    for module in modules:
        module.requires_grad_(False).eval().to(device)
    return base


def _no_digests(root: Path, files: Mapping[str, Iterable[Path]]) -> tuple[str, dict[str, str]]:
    return "", {}


def _load_folder(folder: Path, requested: str, dtype: torch.dtype, empty: bool, t5: bool, digests_of: Digests) -> Base:
    family = recognise_folder(folder, requested)
    family = family if t5 else family.without_t5()
    check_dtype(family, dtype, str(folder))
    process = read_process(family, scheduler_file(folder))
    tokenizers = tuple(_load_tokenizer(folder, name) for name in family.tokenizers)
    modules: dict[str, Any] = {}
    files: dict[str, list[Path]] = {}
    for part in family.parts:
        check_part(folder, part)
        modules[part.folder], files[part.folder] = _load_part(folder, part, dtype, empty)
    index = folder / "model_index.json"
    settings = read_json(index) if index.is_file() else {}
    zero_empty_prompt = bool(settings.get("force_zeros_for_empty_prompt", family.name == "sdxl"))
    digest, digests = digests_of(folder, files)
    scheduler = str(read_json(scheduler_file(folder)).get("_class_name", "DDPMScheduler"))
    return Base(
        family=family,
        path=folder,
        vae=modules["vae"],
        text_encoders=tuple(module for name, module in modules.items() if name.startswith("text_encoder")),
        tokenizers=tokenizers,
        denoiser=modules[family.denoiser.folder],
        process=process,
        digest=digest,
        identity=base_identity(family, modules, tokenizers, process, scheduler, zero_empty_prompt, digests),
        zero_empty_prompt=zero_empty_prompt,
    )


def _load_part(folder: Path, part: Part, dtype: torch.dtype, empty: bool) -> tuple[Any, list[Path]]:
    """Reads a network of a base's folder, and returns it with the files that it was read from.

    Its dtype is `dtype`, but float32 for a VAE that would overflow in float16: see `vae_dtype`.
    """
    place = folder / part.folder
    files = weights_files(place, part.stem)
    own = vae_dtype(read_json(place / "config.json"), dtype) if part == VAE else dtype
    return load_module(class_of(part), place, own, part.stem, empty=empty), files


def check_dtype(family: Family, dtype: torch.dtype, where: str) -> None:
    """Raises ValueError where a network of the family cannot compute in `dtype`. where: the base, for the message."""
    if dtype == torch.float16 and any(part.kind == "T5EncoderModel" for part in family.parts):
        raise UserError(f"{where}: T5, a text encoder of {family.title}, overflows in fp16. Use bf16 or fp32")


def read_process(family: Family, file: Path) -> Process:
    """Reads how a base was trained to denoise from its scheduler_config.json. Raises ValueError, naming the file."""
    if not family.is_transformer:
        return Diffusion(read_noise_scheduler(file))
    return flow_process(read_json(file), str(file))


def flow_process(config: Mapping[str, Any], where: str) -> FlowMatching:
    """Makes flow matching of a scheduler's configuration. where: its file, for a message. Raises ValueError."""
    check_flow_scheduler(config, where)
    known = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    settings = {name: value for name, value in config.items() if name in known}
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**settings)
    return FlowMatching(scheduler)


def class_of(part: Part) -> Any:
    """Returns the class of a part of a base, of diffusers or transformers."""
    return getattr(diffusers if hasattr(diffusers, part.kind) else transformers, part.kind)


def parts_of(base: Base) -> dict[str, Any]:
    """Returns folder name -> network, of all networks that a diffusers folder of this base holds."""
    encoders = (part.folder for part in base.family.parts if part.folder.startswith("text_encoder"))
    return {base.family.denoiser.folder: base.denoiser, "vae": base.vae} | dict(
        zip(encoders, base.text_encoders, strict=True)
    )


def load_tokenizers(path: str | os.PathLike[str]) -> tuple[Any, ...]:
    """Reads the tokenizers of a base and nothing else of it: one to three. path: as for `load_base`."""
    path = MINIATURE if os.fspath(path) == "miniature" else Path(path)
    folder = path if path.is_dir() else path.parent
    names = [name for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if (folder / name).is_dir()]
    return tuple(_load_tokenizer(folder, name) for name in names or ["tokenizer"])


def _load_tokenizer(folder: Path, name: str) -> Any:
    check_tokenizer(folder, name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / name, local_files_only=True, trust_remote_code=False)
        rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    except Exception as error:  # tokenizers raises Exception itself where a file is not what it expects
        raise UserError(f"{folder / name} is no tokenizer that can be read: {error}. Fetch it again") from error
    if unformed := _never_formed(tokenizer, rules):
        raise UserError(
            f"{folder / name}: {len(unformed)} tokens of the vocabulary, such as {unformed[0]!r}, come out of no "
            "merge, so the merges (merges.txt) are incomplete, or of another vocabulary. Fetch them again"
        )
    return tokenizer


def _never_formed(tokenizer: Any, rules: Mapping[str, Any]) -> list[str]:
    """Lists the tokens of a byte-pair vocabulary that no merge makes.

    There are such tokens where the end of the list of merges is missing, or all of it.
    """
    if rules.get("type") != "BPE" or rules.get("ignore_merges"):
        return []
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in rules["merges"])
    formed = {"".join(pair) for pair in merges} | set(tokenizer.added_tokens_encoder)
    suffix = rules.get("end_of_word_suffix") or ""
    return [
        token
        for token in rules["vocab"]
        if token not in formed and len(token.removesuffix(suffix) if suffix else token) > 1
    ]


def _load_single_file(
    path: Path, requested: str, dtype: torch.dtype, empty: bool, t5: bool, digests_of: Digests
) -> Base:
    """Reads a checkpoint in the original layout. Its tokenizers, and scheduler/ if any, lie in folders beside it."""
    family = recognise_file(path, requested)
    if family.is_transformer:
        return _load_transformer_file(path, family if t5 else family.without_t5(), dtype, empty, digests_of)
    tokenizers = tuple(_load_tokenizer(path.parent, name) for name in family.tokenizers)
    state = stored_tensors([path], empty)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    process = Diffusion(_single_file_scheduler(path, family, state, metadata))
    assert family.architecture is not None  # only families whose single files can be read are found in them
    unet, vae, text_encoders = unet_file.build_base(state, family.architecture, dtype, str(path))
    zero_empty_prompt = family.name == "sdxl"
    digest, digests = digests_of(path.parent, {"file": [path]})
    modules = {"unet": unet, "vae": vae}
    modules |= {part.folder: encoder for part, encoder in zip(family.parts[2:], text_encoders, strict=True)}
    return Base(
        family=family,
        path=path,
        vae=vae,
        text_encoders=text_encoders,
        tokenizers=tokenizers,
        denoiser=unet,
        process=process,
        digest=digest,
        identity=base_identity(family, modules, tokenizers, process, "", zero_empty_prompt, digests),
        zero_empty_prompt=zero_empty_prompt,
    )


def _load_transformer_file(path: Path, family: Family, dtype: torch.dtype, empty: bool, digests_of: Digests) -> Base:
    """Reads a file of SD3 or FLUX.1. What it does not hold lies beside it, in folders as in a diffusers folder."""
    check_dtype(family, dtype, str(path))
    state = stored_tensors([path], empty)
    beside = parts_beside(family, state)
    for part in beside:
        check_beside(path, part)
    tokenizers = tuple(_load_tokenizer(path.parent, name) for name in family.tokenizers)
    process, scheduler = _flow_beside(path, family)
    inside = [part for part in family.parts if part not in beside]
    modules: dict[str, Any] = dict(transformer_file.build_parts(state, family, inside, dtype, str(path)))
    files = {"file": [path]}
    for part in beside:
        modules[part.folder], files[part.folder] = _load_part(path.parent, part, dtype, empty)
    modules = {part.folder: modules[part.folder] for part in family.parts}
    digest, digests = digests_of(path.parent, files)
    return Base(
        family=family,
        path=path,
        vae=modules["vae"],
        text_encoders=tuple(modules[part.folder] for part in family.text_encoders),
        tokenizers=tokenizers,
        denoiser=modules[family.denoiser.folder],
        process=process,
        digest=digest,
        identity=base_identity(family, modules, tokenizers, process, scheduler, False, digests),
        zero_empty_prompt=False,
    )


def _flow_beside(path: Path, family: Family) -> tuple[Process, str]:
    """Returns how a base of flow matching was trained, and the class that scheduler/ beside its file names, or ""."""
    beside = path.parent / "scheduler" / "scheduler_config.json"
    if beside.exists():
        return read_process(family, beside), str(read_json(beside).get("_class_name", ""))
    assert family.single_file is not None
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**family.single_file.scheduler)
    return FlowMatching(scheduler), ""


def _single_file_scheduler(
    path: Path, family: Family, names: Mapping[str, Any], metadata: Mapping[str, str]
) -> DDPMScheduler:
    beside = path.parent / "scheduler" / "scheduler_config.json"
    if beside.exists():
        return read_noise_scheduler(beside)
    assert family.architecture is not None
    config = dict(family.architecture.noise_scheduler)
    stated = metadata.get("modelspec.prediction_type")  # Stability AI's ModelSpec: "epsilon" or "v"
    if "v_pred" in names or stated in ("v", "v_prediction"):  # SDXL files say it by empty tensors: v_pred, ztsnr
        config["prediction_type"] = "v_prediction"
    elif stated == "epsilon":
        config["prediction_type"] = "epsilon"
    elif family.name == "sd21":
        raise UserError(
            f"{path} is Stable Diffusion 2.x, which comes in two kinds with equal keys: 512 pixels predicts epsilon, "
            f"768 pixels predicts v. Put the scheduler_config.json of its diffusers release into {beside.parent}."
        )
    if "ztsnr" in names:
        config["rescale_betas_zero_snr"] = True
    return make_noise_scheduler(config, str(path))


def load_controlnet(path: str | os.PathLike[str], unet: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Reads a ControlNet to continue from: a diffusers folder, or a single .safetensors file in either layout.

    It is on the CPU and trainable; a control-LoRA is made whole. Raises FileNotFoundError where it is not there, and
    ValueError if it was not made for such a U-Net, is of a kind that is not trained here (see `denoisers.foreign`), or
    if a decoder has learned with it: `unlocked_decoder.load_networks` reads these too.
    """
    path = Path(path)
    if (path / DECODER_FILE).exists() or ((path / UNET_FOLDER).exists() and (path / "config.json").exists()):
        raise UserError(
            f"the ControlNet in {path} was trained with an unlocked decoder, and is worth nothing on the base's own. "
            "Go on with its run by raising max_steps, or take one that was trained with the decoder locked"
        )
    controlnet = read_controlnet(path, unet, dtype)
    check_trainable(controlnet.config, str(path))
    return controlnet


def read_controlnet(path: Path, unet: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Reads a ControlNet as `load_controlnet` does, also one with which a decoder has learned.

    A control-LoRA becomes the whole ControlNet that its differences from the base's weights make of them; one of FLUX.1
    has no whole form, and is given the base's weights.
    unet: the base's network, a transformer too. If it is on "meta", all is checked but values.
    """
    empty = unet.device.type == "meta"
    if path.is_dir():
        controlnet = read_controlnet_folder(path, dtype, empty)
        check_fits(controlnet, unet, str(path))
        if isinstance(controlnet, ControlLora):
            share_weights(controlnet, unet)
            return nn.Module.to(merged(controlnet), dtype).train()
        if isinstance(controlnet, FluxControlLora):
            share_weights(controlnet, unet)
        borrow(controlnet, unet)
        return controlnet.train()
    if not path.is_file():
        raise MissingFile(f"ControlNet {path} does not exist. Give a diffusers folder or a .safetensors file.")
    if not isinstance(unet, UNet2DConditionModel):
        raise UserError(
            f"{path} is a single file, and ControlNets of {type(unet).__name__} are read from diffusers folders: give "
            "the folder with config.json and diffusion_pytorch_model.safetensors"
        )
    weights = stored_tensors([path], empty)
    widths = unet_file.hint_channels(weights, str(path))
    check_condition_channels(unet_file.condition_channels(weights), str(path))
    controlnet = build_controlnet(unet, widths, device="meta")
    if control_lora_file.is_control_lora(weights):
        weights = control_lora_file.merged_weights(weights, controlnet, unet, str(path))
    else:
        weights = unet_file.to_diffusers(weights, controlnet)
    fill(controlnet, weights, dtype, str(path), CONTROLNET_REMEDY)
    return controlnet


def load_control_lora(path: str | os.PathLike[str], unet: Any, rank: int) -> ControlLora | FluxControlLora:
    """Reads a control-LoRA to go on training, with the base's own weights: the folder of a checkpoint.

    Raises as `load_controlnet`, and ValueError for a whole ControlNet and for another rank.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise MissingFile(
            f"{path / 'config.json'} does not exist, and a control-LoRA is trained further from the folder of its "
            "checkpoint, RUN/checkpoints/step-N/controlnet"
        )
    controlnet = read_controlnet_folder(path, empty=unet.device.type == "meta")
    if not isinstance(controlnet, ControlLora | FluxControlLora):
        raise UserError(
            f"{path} is a whole ControlNet, and model.method=lora trains differences from the base's own weights: go "
            "on with model.method=full, or begin anew with model.controlnet=unet"
        )
    check_fits(controlnet, unet, str(path))
    if controlnet.config["rank"] != rank:
        raise UserError(
            f"{path} has differences of rank {controlnet.config['rank']}, and model.rank is {rank}: set it so"
        )
    share_weights(controlnet, unet)
    return controlnet.train()


CONTROLNET_REMEDY = "It was made for another base, or is incomplete"


def read_controlnet_folder(folder: Path, dtype: torch.dtype = torch.float32, empty: bool = False) -> Any:
    """Reads a ControlNet's folder as it is, without a base to compare it with, on the CPU.

    empty: without values, on the device "meta". Raises as `load_controlnet`.
    """
    kind = controlnet_class(folder)
    controlnet = load_module(kind, folder, dtype, WEIGHTS_STEM, empty=empty, remedy=CONTROLNET_REMEDY)
    return denoiser_of(controlnet).file.finish_reading(controlnet)


CLASSES: tuple[Any, ...] = (
    ControlNetModel,
    VariantControlNet,
    ControlLora,
    SD3ControlNetModel,
    PixelSD3ControlNet,
    FluxControlNetModel,
    FluxControlLora,
)
"""Of ControlNets."""
WEIGHTS_STEM = "diffusion_pytorch_model"
"""What diffusers calls the weights of its networks."""


def controlnet_class(folder: Path) -> Any:
    """Returns the class of the ControlNet that a folder holds, as its config.json names it.

    Raises FileNotFoundError without config.json, and ValueError for anything but a ControlNet of RGB that can be used
    here.
    """
    if not (folder / "config.json").is_file():
        raise MissingFile(f"{folder / 'config.json'} does not exist, so {folder} is no ControlNet's folder")
    config = read_json(folder / "config.json")
    check_controlnet(config, str(folder))
    kind = next(one for one in CLASSES if one.__name__ == config["_class_name"])
    DENOISERS[kind.__name__].file.check_usable(config, str(folder))
    return kind


def save_controlnet(controlnet: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes a diffusers folder: config.json and diffusion_pytorch_model.safetensors, in the module's dtype."""
    save_pretrained(_unwrapped(controlnet), folder)


def save_single_file(controlnet: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes one .safetensors in the layout of the released ControlNet 1.0 code, which image UIs read; of a
    control-LoRA in that of Stability's.

    Raises ValueError for a ControlNet of the miniature, whose pooled text has no name in that layout, and for one of
    `variants`.
    """
    module = _unwrapped(controlnet)
    if isinstance(module, VariantControlNet):
        raise UserError("a ControlNet-lite, or one with the paper's hint network, has no names in the original layout")
    if isinstance(module, ControlLora):
        control_lora_file.save(small_weights(module), module.config["layers_per_block"], Path(path))
    else:
        unet_file.save(module, Path(path))


def _unwrapped(controlnet: nn.Module) -> Any:
    """Returns the ControlNet itself, which a DeepSpeed engine or DistributedDataParallel holds as `.module`.

    Raises TypeError for another network.
    """
    module = getattr(controlnet, "module", controlnet)
    if not isinstance(module, CLASSES):
        raise TypeError(f"expected a ControlNetModel, or an engine around one, and got {type(module).__name__}")
    return module
