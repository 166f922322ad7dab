"""A ControlNet of SD3's class whose condition comes in as pixels, not as latents of the base's VAE.

A VAE that has seen pictures alone spoils what is unlike them: fine lines of an edge map are the first to go.
It is kept in a diffusers folder of a class of ours, which diffusers itself does not know; `load_controlnet` reads it.
"""

from collections.abc import Sequence
from typing import Any

from diffusers import SD3ControlNetModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import Tensor, nn

from controlbooth.models.denoisers.variants import (
    HINT_CHANNELS,
    SILU_GAIN,
    accepted,
    check_condition_size,
    check_hint_channels,
    start_gaussian,
)


class HintTokens(ControlNetConditioningEmbedding):
    """(B, 3, H, W) in [0, 1] -> tokens (B, h/p * w/p, D): the hint network of the released code, whose last
    convolution, which is zero, makes one position of each patch of p x p latent positions."""

    def __init__(self, features: int, widths: tuple[int, ...], patch: int) -> None:
        super().__init__(features, block_out_channels=widths)
        if patch > 1:
            self.conv_out = nn.Conv2d(widths[-1], features, patch, stride=patch)
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, conditioning: Tensor) -> Tensor:
        return super().forward(conditioning).flatten(2).transpose(1, 2)

    def start(self) -> None:
        """Draws variance-preserving weights, as in a U-Net's ControlNet; the last convolution stays zero."""
        start_gaussian([self.conv_in, *self.blocks], SILU_GAIN)


class PixelSD3ControlNet(SD3ControlNetModel):
    """An SD3ControlNetModel with a hint network in place of the patch embedding of the condition's latents.

    hint_channels: its widths. Each step from one width to the next halves the picture: four widths.
    """

    def __init__(self, hint_channels: Sequence[int] = HINT_CHANNELS, **config: Any) -> None:
        check_hint_channels(hint_channels)
        super().__init__(**config)
        self.register_to_config(hint_channels=tuple(hint_channels))
        self.pos_embed_input: Any = HintTokens(self.inner_dim, tuple(hint_channels), self.config["patch_size"])

    @property
    def controlnet_cond_embedding(self) -> HintTokens:
        """Returns the hint network, under the name that it has in a U-Net's ControlNet."""
        return self.pos_embed_input

    def forward(self, *, hidden_states: Tensor, controlnet_cond: Tensor, **others: Any) -> Any:  # type: ignore[override]
        """Runs SD3ControlNetModel's forward with pixels as the condition.

        controlnet_cond: (B, 3, 8h, 8w) in [0, 1], for latents (B, C, h, w). Raises ValueError for pixels of another
        size.
        """
        check_condition_size(controlnet_cond, hidden_states)
        return super().forward(hidden_states=hidden_states, controlnet_cond=controlnet_cond, **others)


PixelSD3ControlNet.__init__.__signature__ = accepted(PixelSD3ControlNet, SD3ControlNetModel)  # type: ignore[attr-defined]
