"""Control-LoRA of FLUX.1: the base itself, with low-rank differences, and the condition as channels beside the picture.

There is no ControlNet. A token holds the noisy latents of its square and then the condition's, and the transformer with
the differences predicts by itself what is drawn under control; without them the base is the base. FLUX.1-Canny-dev-lora
and FLUX.1-Depth-dev-lora are of this kind, and diffusers' FluxControlPipeline reads it.

Adapted are the linear layers of attention and feed-forward networks in all blocks, and `x_embedder`, whose difference
alone reads the condition. B begins at zero, so at first the output is the base's, bit for bit.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.denoisers import flux
from controlbooth.models.denoisers.control_lora import adapters_of, put_adapters, share_weights, start
from controlbooth.models.denoisers.transformer_copy import on_device
from controlbooth.models.denoisers.variants import accepted
from controlbooth.models.lora import ADDED, ATTENTION, MLP, StackedAdapter
from controlbooth.models.text import TextEncoding

SHARED = (
    "time_text_embed", "context_embedder", "x_embedder", "transformer_blocks", "single_transformer_blocks", "norm_out",
    "proj_out",
)  # fmt: skip
"""All modules of the base that have weights."""
BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
ADAPTED = tuple(f".{name}" for name in (*ATTENTION, *ADDED, *MLP))
"""Ends of the names of the adapted layers in the blocks."""
ENTERS = "x_embedder"
"""The layer that makes tokens of latents."""
ZERO: tuple[str, ...] = ()
ENTRY = (f"{ENTERS}.",)


class ControlAdapter(StackedAdapter):
    """A frozen linear layer and one low-rank difference, which may read more features than the layer does."""

    scale = 1.0
    """Multiplies the difference: strength of control."""

    def __init__(self, layer: nn.Linear, rank: int, inputs: int) -> None:
        super().__init__(layer, 1, rank)
        self.down = nn.Parameter(self.down.new_zeros(1, rank, inputs))

    def forward(self, x: Tensor) -> Tensor:
        """Computes (..., inputs) -> (..., out). The layer reads the first features."""
        assert not isinstance(self.layer, nn.Conv2d)
        added, features = self.added(x), self.layer.in_features
        own = (
            x if x.shape[-1] == features else x[..., :features].contiguous()
        )  # laid out, and so rounded, as the base's
        return self.layer(own) + (added if self.scale == 1.0 else self.scale * added)


class FluxControlLora(FluxTransformer2DModel):
    """FLUX.1's transformer with ControlAdapters, for tokens of twice the features.

    rank: of every difference, the same for all, as readers of such files want it. As it is made, its frozen tensors
    have no values: see `control_lora.share_weights`.
    """

    shared = SHARED

    def __init__(self, rank: int = 32, **config: Any) -> None:
        super().__init__(**config)
        self.register_to_config(rank=rank)
        put_adapters(self, lambda name, layer: _adapter_of(name, layer, rank))


FluxControlLora.__init__.__signature__ = accepted(FluxControlLora, FluxTransformer2DModel)  # type: ignore[attr-defined]


def _adapter_of(name: str, layer: nn.Module, rank: int) -> ControlAdapter | None:
    enters = name == ENTERS
    if not isinstance(layer, nn.Linear) or not (enters or (name.startswith(BLOCKS) and name.endswith(ADAPTED))):
        return None
    return ControlAdapter(layer, rank, 2 * layer.in_features if enters else layer.in_features)


def build_controlnet(transformer: Any, rank: int, device: str | torch.device | None = None) -> FluxControlLora:
    """Makes a trainable control-LoRA in float32 on the base's own weights, on their device unless another is named."""
    device = on_device(device, transformer)
    with torch.device("meta"):
        controlnet = FluxControlLora(rank=rank, **_settings(transformer.config))
    if device.type != "meta":
        start(controlnet, device)
    share_weights(controlnet, transformer)
    return controlnet.train()


def _settings(config: Any) -> dict[str, Any]:
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


def predict(
    controlnet: nn.Module, noisy_latents: Tensor, times: Tensor, text: TextEncoding, condition: Tensor, scale: float
) -> Tensor:
    """Predicts the velocity (B, 16, h, w) under control. condition: packed latents (B, tokens, 64), as
    `encode_condition` makes it. scale: of the differences; with 0 the base predicts."""
    dtype = next(controlnet.parameters()).dtype
    for adapter in adapters_of(controlnet).values():
        assert isinstance(adapter, ControlAdapter)
        adapter.scale = scale
    inputs = flux.inputs_of(controlnet, noisy_latents, times, text, dtype)
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], condition.to(dtype)], dim=-1)
    return flux.unpack(controlnet(**inputs)[0], *noisy_latents.shape[-2:])


encode_condition = flux.encode_condition
condition_latents = flux.condition_latents
reads_latents = flux.reads_latents


def finish_reading(controlnet: Any) -> Any:
    """Returns a control-LoRA that was read from a file as it is: its frozen weights are the base's."""
    return controlnet


def must_fit(config: Any) -> tuple[str, ...]:
    """Returns the settings that a control-LoRA and its base have alike."""
    return (*flux.FITS, "num_layers", "num_single_layers", "guidance_embeds")


def check_usable(config: Any, where: str) -> None:
    """Raises ValueError for a configuration without a rank that is a number above 0. where: its folder."""
    if type(config.get("rank")) is not int or config["rank"] < 1:
        raise UserError(
            f"{where}: its rank is {config.get('rank')!r}, and a number above 0 belongs there. Copy it again"
        )


def small_weights(controlnet: nn.Module, prefix: str = "transformer.") -> Mapping[str, Tensor]:
    """Returns the differences by the names of diffusers' LoRA files: NAME.lora_A.weight (r, in) and NAME.lora_B.weight
    (out, r)."""
    weights: dict[str, Tensor] = {}
    for name, adapter in adapters_of(controlnet).items():
        weights[f"{prefix}{name}.lora_A.weight"] = adapter.down.detach()[0].contiguous()
        weights[f"{prefix}{name}.lora_B.weight"] = adapter.up.detach()[0].contiguous()
    return weights
