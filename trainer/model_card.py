"""The model card of an export: what it is, how to use it, how well it obeys, and how it was made. Free of torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from controlbooth.models.families import FAMILIES
from controlbooth.models.files.weight_files import variant_of, weights_files
from controlbooth.models.recognition import recognise_folder
from controlbooth.trainer.config.run import BUILT_IN, RunConfig, base_folder, data_set_name
from controlbooth.trainer.evaluation.figures import _markdown_table, _title, evaluation_table
from controlbooth.trainer.markdown import block, code, plain

PIPELINES = {
    "sdxl": "StableDiffusionXLControlNetPipeline",
    "sd3": "StableDiffusion3ControlNetPipeline",
    "flux": "FluxControlNetPipeline",
}
CLASSES = {"sd3": "SD3ControlNetModel", "flux": "FluxControlNetModel"}
TAGS = {
    "sdxl": "stable-diffusion-xl",
    "sd3": "stable-diffusion-3",
    "flux": "flux",
    "miniature-dit": "stable-diffusion-3",
}
WHOLE_FILE, LORA_FILE = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
"""Names by which diffusers finds the weights of a ControlNet's folder, and a LoRA in a folder."""
UNPUBLISHED = ("output", "tracking")
"""Sections of a run's configuration that say where it ran, not what it is, and may hold addresses and passwords."""


@dataclass(frozen=True)
class Exported:
    """What the model card tells."""

    config: RunConfig
    state: dict[str, Any]
    """state.json of the checkpoint."""
    family: str
    title: str
    dtype: str
    weights: str
    """The weights file's name in OUT."""
    grid: bool
    """Whether samples.png lies beside the card."""
    evaluation: Mapping[str, Any] | None = None
    """evaluation.json of these very weights, where `controlbooth evaluate` has measured them."""
    unet: bool = False
    """Whether unet/ lies there too, with a decoder that has learned with the ControlNet."""
    pixels: bool = False
    """Of a transformer: whether its ControlNet reads pixels, which pipelines of diffusers do not give it."""


def model_card(exported: Exported) -> str:
    """Returns the text of README.md: a YAML header for model hubs, then what this is, how to use it, how it did and how
    it was made."""
    config, state = exported.config, exported.state
    kind = "control-LoRA" if exported.weights == LORA_FILE else "ControlNet"
    header = dict(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=_base_name(config),
        tags=[kind.lower(), TAGS.get(exported.family, "stable-diffusion"), config.data.condition_name, "controlbooth"],
    )
    is_single = exported.weights not in (WHOLE_FILE, LORA_FILE)
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# {config.name}",
        f"A {kind} for {exported.title} ({code(_base_name(config))}) that follows "
        f"**{plain(config.data.condition_name)}** pictures. "
        f"Trained with controlbooth for {state['step']:,} steps of {config.global_batch_size} samples "
        f"at {config.data.resolution} pixels.",
        _unet_note(exported) if exported.unet else "",
        _lora_note(exported) if config.model.method == "lora" else "",
        "![Samples of the validation set](samples.png)" if exported.grid else "",
        "## Use",
        _single_file_usage(exported) if is_single else f"In this folder:\n\n{block(usage(exported), 'python')}",
        "## Figures",
        evaluation_table(exported.evaluation) if exported.evaluation else _validation_table(state.get("metrics") or {}),
        "## Origin",
        _origin_table(exported),
        "<details><summary>Configuration of the run</summary>\n",
        f"{block(_published_config(config), 'yaml')}\n\n</details>",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def usage(exported: Exported) -> str:
    """Returns a script that loads the diffusers folder it lies in and turns condition.png into picture.png."""
    config = exported.config
    pipeline = PIPELINES.get(exported.family, "StableDiffusionControlNetPipeline")
    base = config.model.base
    if base == BUILT_IN:
        base_line, base_name = "from controlbooth.models.pretrained import MINIATURE\n", "MINIATURE"
    else:
        base_line, base_name = "", json.dumps(base)
    variant = variant_line(config)
    load = "from_single_file" if base.endswith(".safetensors") else "from_pretrained"
    size = config.data.resolution
    model = config.model
    if exported.pixels or exported.family == "miniature-dit":
        return own_usage(exported, base_name, base_line)
    if exported.weights == LORA_FILE:
        return lora_usage(exported, base_name, variant)
    if exported.family in CLASSES:
        return transformer_usage(exported, base_name, variant)
    if model.trainable_copy == "full" and model.hint_network == "released":
        own_line, name = "", "ControlNetModel"
        imported = f"ControlNetModel, DDIMScheduler, {pipeline}"
    else:
        own_line, name = "from controlbooth.models.denoisers.variants import VariantControlNet\n", "VariantControlNet"
        imported = f"DDIMScheduler, {pipeline}"
    unet_line = unet_argument = ""
    if exported.unet:
        imported += ", UNet2DConditionModel"
        unet_line = 'unet = UNet2DConditionModel.from_pretrained("unet", torch_dtype=torch.float32)\n'
        unet_argument = "unet=unet, "
    return f"""\
import torch
{base_line}{own_line}from diffusers import {imported}
from diffusers.utils import load_image

controlnet = {name}.from_pretrained(".", torch_dtype=torch.float32)
{unet_line}pipeline = {pipeline}.{load}(
    {base_name}, {unet_argument}controlnet=controlnet, torch_dtype=torch.float32{variant}
)
# Many bases' scheduler files leave these out, and clip latents by the defaults for pixels then.
pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False, thresholding=False)
condition = load_image("condition.png")
assert condition.size == ({size}, {size}), "make the condition at {size} x {size} pixels: shrinking blurs lines"
picture = pipeline(
    "a prompt like the captions of the training set",
    image=condition,
    num_inference_steps={config.validation.sampling_steps},
    guidance_scale={guidance_in(exported)},
    generator=torch.Generator().manual_seed(0),
).images[0]
picture.save("picture.png")
"""


def transformer_usage(exported: Exported, base_name: str, variant: str) -> str:
    """Returns the same script for a base of flow matching, whose scheduler is used as the base's folder has it."""
    name, pipeline = CLASSES[exported.family], PIPELINES[exported.family]
    return f"""\
import torch
from diffusers import {name}, {pipeline}
from diffusers.utils import load_image

controlnet = {name}.from_pretrained(".", torch_dtype=torch.bfloat16)
pipeline = {pipeline}.from_pretrained(
    {base_name}, controlnet=controlnet, torch_dtype=torch.bfloat16{variant}
)
{_drawing(exported)}"""


def lora_usage(exported: Exported, base_name: str, variant: str) -> str:
    """Returns the same script for a control-LoRA of FLUX.1, which a pipeline of diffusers reads into the base."""
    return f"""\
import torch
from diffusers import FluxControlPipeline
from diffusers.utils import load_image

pipeline = FluxControlPipeline.from_pretrained({base_name}, torch_dtype=torch.bfloat16{variant})
pipeline.load_lora_weights(".", weight_name="{exported.weights}")  # widens x_embedder, where the condition comes in
{_drawing(exported, 'joint_attention_kwargs={"scale": 1.0},  # strength of control')}"""


def _drawing(exported: Exported, more: str = "") -> str:
    """Returns the part of both scripts that draws. more: another argument of the pipeline, as a line."""
    config = exported.config
    size, tokens = config.data.resolution, config.model.text_tokens or FAMILIES[exported.family].text_tokens
    more = f"    {more}\n" if more else ""
    return f"""\
condition = load_image("condition.png")
assert condition.size == ({size}, {size}), "make the condition at {size} x {size} pixels: shrinking blurs lines"
picture = pipeline(
    "a prompt like the captions of the training set",
    control_image=condition,
    height={size},
    width={size},
    max_sequence_length={tokens},
    num_inference_steps={config.validation.sampling_steps},
    guidance_scale={guidance_in(exported)},
{more}    generator=torch.Generator().manual_seed(0),
).images[0]
picture.save("picture.png")
"""


def own_usage(exported: Exported, base_name: str, base_line: str) -> str:
    """Returns the same script with controlbooth, for what no pipeline of diffusers does: give a ControlNet of SD3's
    class pixels, or make SD3's text encodings with one encoder."""
    config, size = exported.config, exported.config.data.resolution
    return f"""\
import numpy as np
import torch
{base_line}from controlbooth.models.pretrained import load_base, load_controlnet
from controlbooth.models.sampling import Control, sample
from PIL import Image

base = load_base({base_name})
controlnet = load_controlnet(".", base.denoiser)
condition = Image.open("condition.png").convert("RGB")
assert condition.size == ({size}, {size}), "make the condition at {size} x {size} pixels: shrinking blurs lines"
pixels = torch.from_numpy(np.array(condition)).permute(2, 0, 1)[None] / 255
picture = sample(
    base,
    ["a prompt like the captions of the training set"],
    [Control(controlnet, pixels)],
    seeds=[0],
    steps={config.validation.sampling_steps},
    guidance_scale={guidance_in(exported)},
)[0]
Image.fromarray(picture.numpy()).save("picture.png")
"""


def guidance_in(exported: Exported) -> float:
    """Returns the guidance scale of the run's validations, or the usual one of its family where the run has none."""
    return exported.config.validation.guidance_scale or FAMILIES[exported.family].usual_guidance


def variant_line(config: RunConfig) -> str:
    """Returns the argument by which diffusers finds a base's weights where there is only a variant of them, such as
    fp16; else an empty text."""
    folder = base_folder(config.model.base)
    try:
        found = {
            variant_of(weights_files(folder / part.folder, part.stem)[0]) for part in recognise_folder(folder).parts
        }
    except (OSError, ValueError):  # a single file, or a base that is not here any more
        return ""
    named = sorted(found - {None}, key=str)
    return f", variant={json.dumps(named[0])}" if named else ""


def _unet_note(exported: Exported) -> str:
    config = exported.config
    return (
        f"The decoder of the U-Net has learned with it, from step {config.model.unlock_decoder_at:,} on at a learning "
        f"rate of {config.optimizer.decoder_learning_rate:g}. Use it with the U-Net in `unet/`, not with the base's."
    )


def _lora_note(exported: Exported) -> str:
    config = exported.config
    if exported.weights == LORA_FILE:
        return (
            f"It holds differences of rank {config.model.rank} from the base's own layers, and no weight of the base. "
            "The condition's latents come in as channels beside the picture's, as with FLUX.1-Canny-dev-lora."
        )
    is_single = exported.weights != WHOLE_FILE
    kept = "The file holds these, and not the base's weights" if is_single else "Here they are added to its weights"
    return (
        f"A control-LoRA: it was trained as differences of rank {config.model.rank} from the base's own encoder, "
        f"beside a hint network and zero convolutions. {kept}."
    )


def _single_file_usage(exported: Exported) -> str:
    layout = (
        "has the key names of Stability's control-LoRAs (`lora_controlnet`, `*.up`, `*.down`)"
        if exported.config.model.method == "lora"
        else "has the key names of the original ControlNet code (`control_model.*`)"
    )
    return (
        f"`{exported.weights}` {layout}. Put it where "
        f"your image UI keeps its ControlNets, and use it with a checkpoint of {exported.title}; without a "
        "preprocessor if the picture that you give is already of the kind "
        f"{plain(exported.config.data.condition_name)}."
    )


def _validation_table(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return "This checkpoint was not validated."
    rows = [[_title(name), f"{value:.4g}"] for name, value in metrics.items()]
    explained = (
        "Of the few held-out samples of its validation; `controlbooth evaluate` before the export puts figures with "
        "intervals here."
    )
    return f"{explained}\n\n{_markdown_table(['figure', 'value'], rows)}"


def _origin_table(exported: Exported) -> str:
    config, state = exported.config, exported.state
    decay = config.optimizer.ema_decay
    rows = {
        "step": state["step"],
        "samples seen": f"{state['step'] * config.global_batch_size:,}",
        "weights": exported.dtype if decay is None else f"{exported.dtype}, moving average with decay {decay}",
        "digest of the checkpoint's weights": state.get("digest"),
        "data set": data_set_name(config),
        "fingerprint of the data set": state.get("dataset_fingerprint"),
        "digest of the base model": state.get("base_digest"),
        "prompt dropout": config.data.prompt_dropout,
        "seed": config.seed,
    }
    shown = [f"| {name} | {code(value, in_table=True)} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *shown])


def _published_config(config: RunConfig) -> str:
    tree = config.model_dump(mode="json")
    return yaml.safe_dump({key: value for key, value in tree.items() if key not in UNPUBLISHED}, sort_keys=False)


def _base_name(config: RunConfig) -> str:
    """Returns the base's name for a card: a hub's owner/name or a path's last part; the whole path means nothing
    elsewhere."""
    base = config.model.base
    return base if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists() else Path(base).name
