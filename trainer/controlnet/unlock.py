"""The step at which the base's decoder begins to learn (`model.unlock_decoder_at`).

Until then a run knows nothing of it: the engine holds the ControlNet alone. At the step, the ControlNet's masters,
moments and average are taken out of that engine, each rank its own share, and handed to one that holds the decoder
too; the decoder's moments begin at zero there (and in fp16 the loss scale at its first value). A resume from a
checkpoint of before does the same at the same step, and one of after has the second engine's files, so a run that was
killed ends like one that was not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor

from controlbooth.models.base import Base
from controlbooth.models.denoisers.unet import keep_only_mid_control
from controlbooth.models.pretrained import DECODER_FILE, save_controlnet
from controlbooth.models.recomputing import recompute
from controlbooth.models.unlocked_decoder import UnlockedNetwork, save_decoder
from controlbooth.trainer.config.run import RunConfig
from controlbooth.trainer.controlnet.rates import parameter_groups
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine import ema
from controlbooth.trainer.run.checkpoint import as_module

CONTROLNET, DECODER = "controlnet.", "decoder."
"""What the parameters of an UnlockedNetwork are called by."""


@dataclass(frozen=True)
class Share:
    """Of one of the optimizer's tensors, as this rank holds it; on the CPU."""

    master: Tensor
    mean: Tensor | None
    """The moving average, where the run keeps one."""
    state: dict[str, Any]
    """Moments and their count; empty before the first step."""


def is_unlocked(engine: Any) -> bool:
    return isinstance(engine.module, UnlockedNetwork)


def unlocks_now(config: RunConfig, step: int, engine: Any) -> bool:
    """Tells whether the decoder must learn from this step on and does not yet."""
    at = config.model.unlock_decoder_at
    return at is not None and step >= at and not is_unlocked(engine)


def take_out(engine: Any, average: ema.Average | None) -> tuple[Any, list[Share]]:
    """Returns a new ControlNet with the engine's weights, in float32 on the CPU, and this rank's share of the
    optimizer's state.

    The engine is of no use afterwards; drop it before the next one is made, which then has its memory.
    """
    trained = engine.module
    controlnet = as_module(trained, engines.full_state(engine)).train()
    controlnet.set_attn_processor(dict(trained.attn_processors))
    states = engines.optimizer_state(engine)
    masters = engines.masters(engine)
    means = [None] * len(masters) if average is None else average.shares
    shares = [
        Share(
            master.detach().to("cpu", copy=True),
            None if mean is None else mean.to("cpu", copy=True),
            {key: value.to("cpu", copy=True) if torch.is_tensor(value) else value for key, value in state.items()},
        )
        for master, mean, state in zip(masters, means, states, strict=True)
    ]
    engines.release(engine)
    return controlnet, shares


def unlocked_engine(
    controlnet: Any,
    shares: list[Share],
    base: Base,
    config: RunConfig,
    precision: str,
    world_size: int,
) -> tuple[Any, ema.Average | None]:
    """Makes the engine, and the average if the run keeps one, that go on from what `take_out` returned. Every rank
    calls this."""
    engines.reclaim(base.device)
    if config.model.only_mid_control:
        keep_only_mid_control(controlnet)
    recompute(controlnet, config.model.gradient_checkpointing)
    network = UnlockedNetwork(controlnet, base).to(base.device)
    sizes = engines.batch_sizes(config, world_size)
    engine = engines.initialize(
        network, config.engine, config.optimizer, sizes, precision, False, parameter_groups(network)
    )
    masters = engines.masters(engine)[: len(shares)]  # in the order of the groups: the decoder's come after these
    states = engines.optimizer_state(engine)
    with torch.no_grad():
        for share, master, state in zip(shares, masters, states, strict=False):
            master.copy_(share.master)
            state |= {
                key: value.to(master.device) if torch.is_tensor(value) else value for key, value in share.state.items()
            }
    if config.optimizer.ema_decay is None:
        return engine, None
    average = ema.Average(engine, config.optimizer.ema_decay)
    for share, mean in zip(shares, average.shares, strict=False):
        assert share.mean is not None, "the average begins with the run"
        mean.copy_(share.mean)
    return engine, average


def moment_steps(engine: Any) -> list[float]:
    """Returns how many steps the moments of each of the optimizer's tensors hold, to be saved with an unlocked
    checkpoint."""
    return [float(state.get("step", 0)) for state in engines.optimizer_state(engine)]


def restore_moment_steps(engine: Any, steps: list[float]) -> None:
    """Restores the step counts of the moments after a load: the universal format of ZeRO-3 has one number for all, but
    the decoder began to learn later."""
    for state, taken in zip(engines.optimizer_state(engine), steps, strict=True):
        if torch.is_tensor(state.get("step")):
            state["step"] = torch.full_like(state["step"], taken)


def write_networks(engine: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Writes the ControlNet's folder with the decoder in it: the `write_weights` of `begin_save` for an unlocked
    engine."""
    save_controlnet(as_module(engine.module.controlnet, _named(weights, CONTROLNET)), folder)
    save_decoder(_named(weights, DECODER), folder)


def read_networks(folder: Path) -> dict[str, Tensor]:
    """Reads what `write_networks` wrote, by the names of the engine's parameters."""
    controlnet, decoder = load_file(folder / SAFETENSORS_WEIGHTS_NAME), load_file(folder / DECODER_FILE)
    return {CONTROLNET + name: tensor for name, tensor in controlnet.items()} | {
        DECODER + name: tensor for name, tensor in decoder.items()
    }


def _named(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
