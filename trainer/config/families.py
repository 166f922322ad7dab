"""What a run may say about a base of which family. Free of torch, for the launcher."""

from typing import Any

from controlbooth.models.recognition import Family
from controlbooth.trainer.config.run import ModelConfig, OptimizerConfig, RunConfig


def misplaced(config: RunConfig, family: Family) -> list[str]:
    """Returns what a run says that has no meaning with its base's family: the field, its value and a remedy."""
    model, optimizer = ModelConfig.model_fields, OptimizerConfig.model_fields
    fields: list[tuple[str, Any, Any]]
    if family.is_transformer:
        pixels = (config.model.condition_entry or family.condition_entry) == "pixels"
        names = (
            *(() if pixels else ("hint_channels",)),
            "hint_network",
            "trainable_copy",
            "connections",
            "only_mid_control",
            "unlock_decoder_at",
        )
        fields = [(f"model.{name}", getattr(config.model, name), model[name].default) for name in names]
        fields.append(("optimizer.min_snr_gamma", config.optimizer.min_snr_gamma, optimizer["min_snr_gamma"].default))
        if family.name != "sd3":
            fields.append(("model.t5", config.model.t5, True))
        kind = "U-Net" if family.name == "sd3" else "U-Net, or SD3,"
    else:
        names = ("copied_blocks", "condition_entry", "t5", "text_tokens")
        fields = [(f"model.{name}", getattr(config.model, name), model[name].default) for name in names]
        flow = type(config.flow)
        fields += [(f"flow.{n}", getattr(config.flow, n), field.default) for n, field in flow.model_fields.items()]
        kind = "base of flow matching (SD3, FLUX.1)"
    refused = []
    if family.name == "flux" and config.model.condition_entry == "pixels":
        told = f"model.condition_entry=pixels is for SD3, and conditions of {family.title} come in as latents"
        refused = [f"{told}: leave it out"]
    return refused + [
        f"{name}={_plain(value)} is for a {kind}, and the base is {family.title}: leave it out"
        for name, value, default in fields
        if value != default
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
