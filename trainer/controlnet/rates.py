"""Which of the trained parameters have learning rates of their own, and what these are at a step."""

from typing import Any

from torch import nn

from controlbooth.models.denoisers.control_lora import ControlLora, is_difference
from controlbooth.models.denoisers.flux_control_lora import FluxControlLora
from controlbooth.models.unlocked_decoder import UnlockedNetwork
from controlbooth.trainer.config.run import RunConfig, lora_learning_rate
from controlbooth.trainer.engine import deepspeed as engines


def parameter_groups(network: nn.Module) -> list[list[nn.Parameter]]:
    """Returns the groups of parameters that have learning rates of their own, in the order of `learning_rates`."""
    if isinstance(network, UnlockedNetwork):
        return [list(network.controlnet.parameters()), list(network.decoder.parameters())]
    if isinstance(network, ControlLora):
        named = list(network.named_parameters())
        return [[one for name, one in named if is_difference(name) == differences] for differences in (False, True)]
    return [list(network.parameters())]


def learning_rates(config: RunConfig, step: int, engine: Any) -> dict[str, float]:
    """Returns the learning rates by the names of their metrics, all on the same schedule: the ControlNet's, and that of
    the decoder once it learns, or of the low-rank differences where there are some."""
    rate = engines.learning_rate(config.optimizer, step, config.max_steps)
    lora = {"lora_learning_rate": rate * (lora_learning_rate(config) / config.optimizer.learning_rate)}
    if isinstance(engine.module, FluxControlLora):  # whose parameters all are differences
        return lora
    rates = {"learning_rate": rate}
    if isinstance(engine.module, UnlockedNetwork):
        share = config.optimizer.decoder_learning_rate / config.optimizer.learning_rate
        rates["decoder_learning_rate"] = rate * share
    if isinstance(engine.module, ControlLora):
        rates |= lora
    return rates
