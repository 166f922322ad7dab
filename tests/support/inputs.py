"""What tests of networks put through them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

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


def steps_moving(controlnet: nn.Module, prediction: Callable[[], Tensor], steps: int = 3) -> Iterator[set[str]]:
    """Takes plain steps on the mean square of a prediction; -> the names of the parameters that each has moved.

    Every parameter must get a gradient in every step.
    """
    optimizer = torch.optim.SGD(controlnet.parameters(), lr=1.0)
    for _ in range(steps):
        before = {name: one.detach().clone() for name, one in controlnet.named_parameters()}
        optimizer.zero_grad()
        prediction().square().mean().backward()
        assert all(parameter.grad is not None for parameter in controlnet.parameters())
        optimizer.step()
        yield {name for name, one in controlnet.named_parameters() if not torch.equal(one, before[name])}


@torch.no_grad()
def disturbed(network, by=0.1):
    """Moves all weights, as a training might, by torch's own generator; -> the network."""
    for parameter in network.parameters():
        parameter += by * torch.randn(parameter.shape)
    return network
