"""What tests of networks put through them."""

import torch

from controlbooth.models.text import encode_prompts

SIZE = 32
"""Pixels of a side; latents are 4x4."""


def batch(base, seed=0, count=2):
    """noisy_latents, timesteps, text, conditioning for a forward pass."""
    draw = torch.Generator().manual_seed(seed)
    channels = base.latent_channels
    latents = torch.randn(count, channels, SIZE // 8, SIZE // 8, generator=draw)
    timesteps = torch.randint(0, 1000, (count,), generator=draw)
    text = encode_prompts(base, ["a cat", "red dog"][:count], picture_size=(SIZE, SIZE))
    return latents, timesteps, text, torch.rand(count, 3, SIZE, SIZE, generator=draw)
