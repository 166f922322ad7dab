"""What a run may say about a base of which family. Free of torch, for the launcher."""

from typing import Any

from controlbooth.models.families import Family
from controlbooth.models.recognition import recognise
from controlbooth.trainer.config.run import FlowConfig, ModelConfig, OptimizerConfig, RunConfig, base_path
from controlbooth.trainer.config.subjects import BaseConfig, SubjectRunConfig

Field = tuple[str, Any, Any, str]
"""Its name, its value, its default, and the kind of base that it is for."""
FLOW = "base of flow matching (SD3, FLUX.1)"
WITH_LORA = (
    "U-Net or FLUX.1 (pipelines for FLUX.1 take a condition as channels beside the picture's, and there are none for "
    "other transformers)"
)
WHOLE = "whole ControlNet (model.method=full) or a control-LoRA of FLUX.1"
THREE_ENCODERS, WITH_T5 = "base with T5 as its third text encoder (SD3)", "base with T5 (SD3, FLUX.1)"


def guidance_of(config: RunConfig) -> float:
    """Returns the guidance of a run's validation, its family's usual one where it says none.

    Raises FileNotFoundError and ValueError for a base that cannot be read.
    """
    if config.validation.guidance_scale is not None:
        return config.validation.guidance_scale
    return recognise(base_path(config), config.model.family).usual_guidance


def misplaced(config: RunConfig | SubjectRunConfig, family: Family) -> list[str]:
    """Returns what a run says that has no meaning with its base's family: the field, its value and a remedy."""
    of_subjects = isinstance(config, SubjectRunConfig)
    fields = _subjects_fields(config, family) if of_subjects else _controlnet_fields(config, family)
    refused = [
        f"{name}={_plain(value)} is for a {kind}, and the base is {family.title}: leave it out"
        for name, value, default, kind in fields
        if value != default
    ]
    if not of_subjects and family.name == "flux" and config.model.condition_entry == "pixels":
        told = f"model.condition_entry=pixels is for SD3, and conditions of {family.title} come in as latents"
        refused.append(f"{told}: leave it out")
    if not of_subjects and family.name == "flux" and config.model.method == "lora" and config.model.copied_blocks:
        told = f"model.copied_blocks={list(config.model.copied_blocks)} does not go with model.method=lora"
        refused.append(f"{told}, which copies no blocks of {family.title}: leave one of them out")
    return refused


def _controlnet_fields(config: RunConfig, family: Family) -> list[Field]:
    """Returns the fields of a ControlNet run that are not for this family."""
    model, optimizer = ModelConfig.model_fields, OptimizerConfig.model_fields
    own: list[tuple[str, str]]
    fields: list[Field] = []
    if family.is_transformer:
        pixels = (config.model.condition_entry or family.condition_entry) == "pixels"
        own = [
            *([] if pixels else [("hint_channels", "U-Net, or for SD3 with model.condition_entry=pixels")]),
            *((name, "U-Net") for name in ("hint_network", "trainable_copy", "connections", "only_mid_control")),
            ("unlock_decoder_at", "U-Net"),
            *([] if family.name == "flux" else [(name, WITH_LORA) for name in ("method", "rank")]),
            *([] if family.name == "sd3" else [("t5", THREE_ENCODERS)]),
            *([] if family.text_tokens else [("text_tokens", WITH_T5)]),
        ]
        gamma = config.optimizer.min_snr_gamma
        fields.append(("optimizer.min_snr_gamma", gamma, optimizer["min_snr_gamma"].default, "U-Net"))
    else:
        own = [(name, FLOW) for name in ("copied_blocks", "condition_entry", "t5", "text_tokens")]
        fields += _flow_fields(config.flow)
        if config.model.method == "lora":
            fields.append(("model.frozen.precision", config.model.frozen.precision, "engine", WHOLE))
    return fields + [(f"model.{name}", getattr(config.model, name), model[name].default, kind) for name, kind in own]


def _subjects_fields(config: SubjectRunConfig, family: Family) -> list[Field]:
    """Returns the fields of a run of subjects that are not for this family, and its layers where they are not."""
    layers, default = config.adapter.layers, type(config.adapter).model_fields["layers"].default
    fields: list[Field] = []
    if family.is_transformer:
        fields.append(("min_snr_gamma", config.min_snr_gamma, None, "U-Net"))
        if layers == "attention+convolutions":
            fields.append(("adapter.layers", layers, default, "U-Net"))
    else:
        fields += _flow_fields(config.flow)
        if layers == "attention+mlp":
            fields.append(("adapter.layers", layers, default, "transformer (SD3, FLUX.1)"))
    model = BaseConfig.model_fields
    if family.name != "sd3":
        fields.append(("model.t5", config.model.t5, model["t5"].default, THREE_ENCODERS))
    if not family.text_tokens:
        fields.append(("model.text_tokens", config.model.text_tokens, model["text_tokens"].default, WITH_T5))
    return fields


def _flow_fields(flow: FlowConfig) -> list[Field]:
    return [(f"flow.{name}", getattr(flow, name), one.default, FLOW) for name, one in FlowConfig.model_fields.items()]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
