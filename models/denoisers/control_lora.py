"""Control-LoRA: a ControlNet whose copy of the encoder is the base's own, plus low-rank differences that are trained.

The frozen weights are the tensors of the base's U-Net themselves, held as buffers that are in no file: an optimizer,
which is given parameters, does not see them, ZeRO-3 does not split them, and they take no memory of their own. Trained
are the hint network and the zero convolutions, whole, and for each linear layer and convolution of the copy two small
matrices, W + B A of rank r. Stability's control-LoRAs (2023) are the same networks.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from diffusers import ControlNetModel
from torch import Tensor, nn

from controlbooth.models.denoisers.variants import accepted
from controlbooth.models.lora import DIFFERENCES, StackedAdapter, product

COPIED = ("conv_in", "time_embedding", "class_embedding", "add_embedding", "down_blocks", "mid_block")
"""Modules that a ControlNet has in common with its U-Net."""


class ControlLora(ControlNetModel):
    """A ControlNetModel with StackedAdapters of one subject in place of the copy's linear layers and convolutions.

    rank: of the differences, at most the lesser side of a layer's matrix. As it is made, its frozen tensors have no
    values: see `share_weights`.
    """

    shared = COPIED

    def __init__(self, rank: int = 32, **config: Any) -> None:
        super().__init__(**config)
        self.register_to_config(rank=rank)
        put_adapters(self, lambda _, layer: _adapter_of(layer, rank))


ControlLora.__init__.__signature__ = accepted(ControlLora, ControlNetModel)  # type: ignore[attr-defined]


def _adapter_of(layer: nn.Module, rank: int) -> StackedAdapter | None:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return None
    return StackedAdapter(layer, 1, min(rank, *layer.weight.flatten(1).shape))


def put_adapters(network: Any, adapter_of: Callable[[str, nn.Module], StackedAdapter | None]) -> None:
    """Puts adapters in place of layers of a network's shared parts, and makes all else of them buffers.

    network: of a class with `shared`, the names of these parts. adapter_of(name, layer) makes a layer's adapter, or
    None where it stays as it is.
    """
    for name, module in list(_parts(network, network.shared)):
        if not _is_layer(module):
            _hold(module, module)
        elif (adapter := adapter_of(name, module)) is not None:
            adapter.layer = _frozen(module)  # type: ignore[assignment]
            network.set_submodule(name, adapter)
        else:
            network.set_submodule(name, _frozen(module))


def _parts(network: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules of those parts of a network that it has, by their names."""
    for part in names:
        if (module := getattr(network, part, None)) is not None:
            yield from module.named_modules(prefix=part)


def _is_layer(module: nn.Module) -> bool:
    return not any(True for _ in module.children())


def _frozen(layer: nn.Module) -> nn.Module:
    """Makes a layer that computes as this one does, with the same tensors, as buffers that are in no file."""
    own = copy.copy(layer)
    for name, value in list(vars(own).items()):
        if isinstance(value, dict | set):  # such as of hooks: what is put on the one is not on the other
            setattr(own, name, copy.copy(value))
    _hold(own, layer)
    return own


def _hold(own: nn.Module, module: nn.Module) -> None:
    """Gives `own` the tensors that another module has itself, not those of modules in it, as buffers."""
    held = {name: None if one is None else one.detach() for name, one in module._parameters.items()}
    own._buffers = held | module._buffers
    own._parameters = {}
    own._non_persistent_buffers_set = set(own._buffers)


def share_weights(controlnet: Any, network: Any) -> None:
    """Gives a control-LoRA the base's own tensors, frozen. What is put in their place later in the base is not seen
    here.

    controlnet: of a class with `shared`. network: the base's, with which `check_fits` agrees.
    """
    for name, module in _parts(network, controlnet.shared):
        own = controlnet.get_submodule(name)
        if isinstance(own, StackedAdapter):
            own.layer = _frozen(module)  # type: ignore[assignment]
        elif _is_layer(module):
            controlnet.set_submodule(name, _frozen(module))
        else:
            _hold(own, module)


def adapters_of(controlnet: nn.Module) -> dict[str, StackedAdapter]:
    """Returns the adapted layers by their names."""
    return {name: module for name, module in controlnet.named_modules() if isinstance(module, StackedAdapter)}


def is_difference(name: str) -> bool:
    """Tells whether a trained tensor of a ControlLora is one of a low-rank difference, by its name."""
    return name.startswith(tuple(f"{part}." for part in COPIED)) and name.endswith(DIFFERENCES)


def start(controlnet: nn.Module, device: torch.device) -> None:
    """Makes the trained tensors, which have no memory, on a device: zeros, but for A, which is Gaussian.

    A keeps the variance of what it is given, so that what one step of the optimizer changes does not depend on the
    width of a layer. Drawn from torch's global generator.
    """
    for module in controlnet.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(parameter.shape, device=device))
    for adapter in adapters_of(controlnet).values():
        nn.init.normal_(adapter.down, std=adapter.down[0, 0].numel() ** -0.5)


@torch.no_grad()
def merged(controlnet: ControlLora) -> ControlNetModel:
    """Makes an ordinary ControlNet in float32 that computes the same: its weights are the base's plus the differences.

    The base's weights must have been shared with it.
    """
    known = inspect.signature(ControlNetModel.__init__).parameters
    with torch.device("meta"):
        whole = ControlNetModel(**{name: value for name, value in dict(controlnet.config).items() if name in known})
    adapters = adapters_of(controlnet)
    weights = dict(controlnet.named_parameters()) | dict(controlnet.named_buffers())
    state = {}
    for name in whole.state_dict():
        layer, _, attribute = name.rpartition(".")
        adapter = adapters.get(layer)
        if adapter is None:
            state[name] = weights[name].detach().float()
            continue
        own = getattr(adapter.layer, attribute).float()
        state[name] = own + product(adapter.up[0], adapter.down[0], own) if attribute == "weight" else own
    whole.load_state_dict({name: _apart(tensor) for name, tensor in state.items()}, assign=True)
    return whole.requires_grad_(True)


def _apart(tensor: Tensor) -> Tensor:
    """Copies a tensor, which may be the base's own."""
    return tensor if tensor.is_meta else tensor.clone()


def small_weights(controlnet: ControlLora) -> Mapping[str, Tensor]:
    """Returns the trained tensors by name, of A and B without the axis of subjects."""
    return {name: tensor[0] if is_difference(name) else tensor for name, tensor in controlnet.state_dict().items()}
