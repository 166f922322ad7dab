"""ControlNets that the paper compares with its own: ControlNet-lite, and its text's hint network.

Both are kept in a diffusers folder of a class of ours, which diffusers itself does not know; `load_controlnet` reads
them. Gaussian connections and control of the middle block alone need no class: see `unet.build_controlnet`.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn
from torch.nn import functional

from controlbooth.data.errors import UserError
from controlbooth.models.architectures import VAE_FACTOR

HINT_CHANNELS = (16, 32, 96, 256)
"""Widths of the hint network of the released code."""
TrainableCopy = Literal["full", "lite"]
HintNetwork = Literal["released", "paper"]


class VariantControlNet(ControlNetModel):
    """trainable_copy="lite": one 3x3 convolution in place of each block of the copy, sees neither prompt nor timestep.
    hint_network="paper": four 4x4 convolutions with ReLU. Everything else as in ControlNetModel."""

    def __init__(
        self, trainable_copy: TrainableCopy = "full", hint_network: HintNetwork = "released", **config: Any
    ) -> None:
        super().__init__(**config)
        self.register_to_config(trainable_copy=trainable_copy, hint_network=hint_network)
        self.lite = trainable_copy == "lite"
        widths = self.config["block_out_channels"]
        if hint_network == "paper":
            hint_widths = tuple(self.config["conditioning_embedding_out_channels"])
            self.controlnet_cond_embedding: Any = PaperHintNetwork(
                widths[0], self.config["conditioning_channels"], hint_widths
            )
        if self.lite:
            for name in ("time_proj", "time_embedding", "class_embedding", "add_time_proj", "add_embedding"):
                if hasattr(self, name):
                    delattr(self, name)
            self.mid_block: Any = nn.Conv2d(widths[-1], widths[-1], 3, padding=1)
            self.down_blocks = _one_convolution_a_block(widths, self.config["layers_per_block"])

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Runs the ControlNet as ControlNetModel's forward does.

        Returns the down residuals and the middle block's; with trainable_copy="full" and return_dict=True an output of
        diffusers that holds them.
        """
        if not self.lite:
            return super().forward(
                sample,
                timestep,
                encoder_hidden_states,
                controlnet_cond,
                conditioning_scale=conditioning_scale,
                return_dict=return_dict,
                **others,
            )
        hidden: Tensor = self.conv_in(sample) + self.controlnet_cond_embedding(controlnet_cond)
        skips = [hidden]
        for convolution in self.down_blocks:
            hidden = convolution(functional.silu(hidden))
            skips.append(hidden)
        hidden = self.mid_block(functional.silu(hidden))
        down = [
            connect(skip) * conditioning_scale for connect, skip in zip(self.controlnet_down_blocks, skips, strict=True)
        ]
        return tuple(down), self.controlnet_mid_block(hidden) * conditioning_scale


def accepted(kind: type, parent: type) -> inspect.Signature:
    """Makes the signature of a class of ours whose constructor passes `**config` on to that of diffusers.

    diffusers keeps those entries of a folder's configuration that the constructor's signature names.
    """
    myself, *own, _ = inspect.signature(kind.__init__).parameters.values()
    theirs = list(inspect.signature(parent.__init__).parameters.values())[1:]
    return inspect.Signature([myself, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *theirs))])


VariantControlNet.__init__.__signature__ = accepted(VariantControlNet, ControlNetModel)  # type: ignore[attr-defined]


class PaperHintNetwork(nn.Module):
    """(B, 3, 8h, 8w) -> (B, channels, h, w): the text of arXiv 2302.05543, section 3.4, before a zero convolution.

    The paper gives all four convolutions a stride of two, which would end at a 16th of the picture, and latents have
    an 8th: the last one has a stride of one here.
    """

    def __init__(self, channels: int, conditioning_channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(conditioning_channels, widths[0], 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(
            nn.Conv2d(narrow, wide, 4, stride=2, padding=1)
            for narrow, wide in zip(widths[:-2], widths[1:-1], strict=True)
        )
        self.blocks.append(nn.Conv2d(widths[-2], widths[-1], 4, padding="same"))
        self.conv_out = nn.Conv2d(widths[-1], channels, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)  # type: ignore[arg-type]

    def forward(self, conditioning: Tensor) -> Tensor:
        hidden = conditioning
        for layer in (self.conv_in, *self.blocks):
            hidden = functional.relu(layer(hidden))
        return self.conv_out(hidden)


def _one_convolution_a_block(widths: list[int] | tuple[int, ...], layers_per_block: int) -> nn.ModuleList:
    """Makes convolutions of the shapes of the copy's blocks.

    There are layers_per_block of them at each width, and then, except at the last width, one that halves height and
    width.
    """
    convolutions = nn.ModuleList()
    before = widths[0]
    for number, width in enumerate(widths):
        for _ in range(layers_per_block):
            convolutions.append(nn.Conv2d(before, width, 3, padding=1))
            before = width
        if number < len(widths) - 1:
            convolutions.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
    return convolutions


SILU_GAIN = 1.68
"""1 / sqrt(E[silu(x)^2]) for normal x: what a layer must multiply by for the next one to see the same variance."""
RELU_GAIN = 2**0.5


def check_hint_channels(channels: Sequence[int]) -> None:
    """Raises ValueError for widths of a hint network that miss the latents' size."""
    halvings = len(channels) - 1
    if 2**halvings != VAE_FACTOR:
        raise UserError(
            f"hint_channels {tuple(channels)} halves the condition picture {halvings} times, "
            f"but latents have 1/{VAE_FACTOR} of its size: give four widths, e.g. {HINT_CHANNELS}"
        )


def check_condition_size(conditioning: Tensor, latents: Tensor) -> None:
    """Raises ValueError where conditions (B, 3, H, W) are not of the size of the pictures of latents (B, C, h, w)."""
    height, width = latents.shape[-2:]
    if conditioning.shape[-2:] != (VAE_FACTOR * height, VAE_FACTOR * width):
        raise UserError(
            f"the condition is {conditioning.shape[-2]}x{conditioning.shape[-1]} pixels, "
            f"but latents of {height}x{width} need {VAE_FACTOR * height}x{VAE_FACTOR * width}"
        )


def start_gaussian(layers: Any, gain: float) -> None:
    """Draws Gaussian weights that keep the variance of what passes after an activation of this gain; biases are
    zero."""
    for layer in layers:
        torch.nn.init.normal_(layer.weight, std=gain * layer.weight[0].numel() ** -0.5)
        torch.nn.init.zeros_(layer.bias)
