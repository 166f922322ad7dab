"""What a run may say about a base of which family. Free of torch, for the launcher."""

from typing import Any

from controlbooth.models.families import Family
from controlbooth.models.recognition import recognise
from controlbooth.trainer.config.run import ModelConfig, OptimizerConfig, RunConfig, base_path


def guidance_of(config: RunConfig) -> float:
    """Returns the guidance of a run's validation, its family's usual one where it says none.

    Raises FileNotFoundError and ValueError for a base that cannot be read.
    """
    if config.validation.guidance_scale is not None:
        return config.validation.guidance_scale
    return recognise(base_path(config), config.model.family).usual_guidance


def misplaced(config: RunConfig, family: Family) -> list[str]:
    """Returns what a run says that has no meaning with its base's family: the field, its value and a remedy."""
    model, optimizer = ModelConfig.model_fields, OptimizerConfig.model_fields
    own: list[tuple[str, str]]
    fields: list[tuple[str, Any, Any, str]] = []
    if family.is_transformer:
        pixels = (config.model.condition_entry or family.condition_entry) == "pixels"
        own = [
            *([] if pixels else [("hint_channels", "U-Net, or for SD3 with model.condition_entry=pixels")]),
            *((name, "U-Net") for name in ("hint_network", "trainable_copy", "connections", "only_mid_control")),
            *((name, "U-Net") for name in ("unlock_decoder_at", "method", "rank")),
            *([] if family.name == "sd3" else [("t5", "base with T5 as its third text encoder (SD3)")]),
            *([] if family.text_tokens else [("text_tokens", "base with T5 (SD3, FLUX.1)")]),
        ]
        gamma = config.optimizer.min_snr_gamma
        fields.append(("optimizer.min_snr_gamma", gamma, optimizer["min_snr_gamma"].default, "U-Net"))
    else:
        kind = "base of flow matching (SD3, FLUX.1)"
        own = [(name, kind) for name in ("copied_blocks", "condition_entry", "t5", "text_tokens")]
        flow = type(config.flow).model_fields.items()
        fields += [(f"flow.{name}", getattr(config.flow, name), field.default, kind) for name, field in flow]
    fields += [(f"model.{name}", getattr(config.model, name), model[name].default, kind) for name, kind in own]
    refused = [
        f"{name}={_plain(value)} is for a {kind}, and the base is {family.title}: leave it out"
        for name, value, default, kind in fields
        if value != default
    ]
    if family.name == "flux" and config.model.condition_entry == "pixels":
        told = f"model.condition_entry=pixels is for SD3, and conditions of {family.title} come in as latents"
        refused.append(f"{told}: leave it out")
    return refused


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
