"""Holds the frozen base of a run as `model.frozen` asks: in fewer bits, split over ranks, streamed from host memory.

As it is by default nothing is done here, and the base is read straight to the device. Else it is read into host memory,
so that the device never holds all of it: a ControlNet is copied from its whole weights there, and then each part is
made small and brought to where it stays. Adapters of subjects are put into it after that.
"""

import torch
from torch import nn

from controlbooth.models.base import Base
from controlbooth.models.quantized import check_installed, quantize
from controlbooth.trainer.config.run import FrozenConfig
from controlbooth.trainer.engine.distributed import World, sharing_of
from controlbooth.trainer.engine.frozen import FrozenBlocks, Supply, own_tensors
from controlbooth.trainer.run.base import AnyRun


def loading_device(config: AnyRun, device: torch.device) -> torch.device:
    """Returns where the base is read to: the device, or the host where it is to be held in another way than whole."""
    return device if config.model.frozen == FrozenConfig() else torch.device("cpu")


def quantize_encoders(config: AnyRun, base: Base) -> None:
    """Puts the text encoders' linear layers into the run's precision, of which nothing is copied.

    Raises UserError where a package that this takes is missing.
    """
    check_installed(config.model.frozen.precision)
    for encoder in base.text_encoders:
        quantize(encoder, config.model.frozen.precision)


def hold_base(config: AnyRun, base: Base, world: World) -> None:
    """Puts the denoiser into the run's precision and brings all of the base to the device, or to where its blocks are
    fetched from. Every rank calls this, once the ControlNet is made, or before adapters are attached.

    The VAE stays whole. So do text encoders that are not streamed, since ranks need not encode equally often: a
    micro-batch whose prompts are all dropped asks for none.
    """
    frozen = config.model.frozen
    if frozen == FrozenConfig():
        return
    quantize(base.denoiser, frozen.precision)
    sharing = None if frozen.shards == "none" else sharing_of(world, frozen.shards)
    streams = frozen.stream == "cpu"
    if sharing is not None or streams:
        base.denoiser.frozen_blocks = FrozenBlocks(base.denoiser, Supply(world.device, sharing, streams))
    for encoder in base.text_encoders if streams else ():
        encoder.frozen_blocks = FrozenBlocks(encoder, Supply(world.device, None, True))
    for network in (base.denoiser, base.vae, *base.text_encoders):
        nn.Module.to(network, world.device)
    base._empty = None  # which may have been computed on the host


def frozen_blocks(network: nn.Module) -> FrozenBlocks | None:
    """Returns what fetches the blocks of a network; None of one that is whole."""
    return getattr(network, "frozen_blocks", None)


def bytes_held(network: nn.Module) -> tuple[int, int]:
    """Counts the bytes of a frozen network that this rank keeps all the time, and the most of its blocks that were on
    the device beside these at once."""
    storages = {one.untyped_storage()._cdata: one.untyped_storage() for one in own_tensors(network)}
    blocks = frozen_blocks(network)
    if blocks is None:
        return sum(storage.nbytes() for storage in storages.values()), 0
    whole = sum(storage.nbytes() for storage in storages.values()) - blocks.supply.live
    return whole + blocks.kept_bytes, blocks.supply.most


def describe_frozen(config: AnyRun, base: Base, world: World) -> str | None:
    """Says how the base is held, and how much of it this rank keeps; None where it is whole, as the engine has it."""
    frozen = config.model.frozen
    if frozen == FrozenConfig():
        return None
    blocks = frozen_blocks(base.denoiser)
    ranks = 1 if blocks is None else blocks.supply.ranks
    kept, _ = bytes_held(base.denoiser)
    encoders = sum(bytes_held(encoder)[0] for encoder in base.text_encoders)
    split = f", split over {ranks} rank{'s' * (ranks > 1)}" if frozen.shards != "none" else ""
    streamed = ", blocks in host memory" if frozen.stream == "cpu" else ""
    return (
        f"frozen base: {frozen.precision}{split}{streamed}; a rank keeps {kept / 2**20:.2f} MiB of the denoiser and "
        f"{encoders / 2**20:.2f} MiB of text encoders"
    )
