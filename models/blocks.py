"""The blocks that networks repeat: compiled, kept in fewer bits, split over ranks or streamed, each as a whole."""

from torch import nn

BLOCKS = frozenset(
    {
        "BasicTransformerBlock",
        "ResnetBlock2D",
        "JointTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    }
)
"""Classes of diffusers of which U-Nets and transformers are made; none holds another."""
ENCODER_BLOCKS = frozenset({"CLIPEncoderLayer", "T5Block"})
"""The same of text encoders, of transformers."""


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a denoiser, a ControlNet or a text encoder, in the order in which it holds them."""
    return [module for module in network.modules() if type(module).__name__ in BLOCKS | ENCODER_BLOCKS]
