"""LoRA (arXiv 2106.09685) for many subjects at once: K adapters, stacked, beside one frozen network.

The rows of a batch belong to the subjects in equal parts, subject after subject: rows [k * b, (k + 1) * b) are of
subject k. Each adapted layer adds B_k A_k x (alpha = rank, as in diffusers' example) to the rows of subject k, by one
batched product for all, so the frozen network's own products are shared and each subject's are its own: no value and no
gradient of one subject enters another's. One subject is K = 1; there is no second implementation.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.models.quantized import QuantizedLinear

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The layers that diffusers' DreamBooth example adapts: the projections of every attention."""
CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "proj_in", "proj_out")
"""Of a U-Net's residual blocks and at the ends of its transformers, as LoCon adapts them."""
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""The projections of the text in the joint attention of SD3 and FLUX.1."""
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out")
"""What follows attention in the blocks of SD3 and FLUX.1; the last two are of FLUX.1's single blocks."""
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The projections of every attention of a CLIP text encoder."""


def layers_of(layers: str, is_transformer: bool) -> tuple[str, ...]:
    """Returns the names in which those of adapted layers end. layers: as `adapter.layers` of a run says it."""
    attention = ATTENTION + (ADDED if is_transformer else ())
    return attention + {"attention": (), "attention+convolutions": CONVOLUTIONS, "attention+mlp": MLP}[layers]


Adaptable = nn.Linear | nn.Conv2d | QuantizedLinear
"""The layers that can have adapters."""
DIFFERENCES = (".down", ".up")
"""Ends of the names of A and B."""


class StackedAdapter(nn.Module):
    """A frozen linear layer or convolution, and what K subjects add to it."""

    def __init__(self, layer: Adaptable, subjects: int, rank: int):
        super().__init__()
        self.layer = layer
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1:
                raise UserError("a grouped convolution has no LoRA in the formats that others read; leave it out")
            down, up = (rank, *layer.weight.shape[1:]), (layer.weight.shape[0], rank, 1, 1)
        else:
            down, up = (rank, layer.in_features), (layer.out_features, rank)
        device = next(iter(layer.state_dict().values())).device
        self.down = nn.Parameter(torch.zeros((subjects, *down), device=device))
        """(K, r, in), A of each subject; of convolutions (K, r, in, kh, kw)."""
        self.up = nn.Parameter(torch.zeros((subjects, *up), device=device))
        """(K, out, r), B of each subject; of convolutions (K, out, r, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Computes the layer's output, with what each subject adds to it.

        x: (K * b, ..., in), of convolutions (K * b, in, h, w).
        """
        return self.layer(x) + self.added(x)

    def added(self, x: Tensor) -> Tensor:
        """Computes what the subjects add to the layer's output, in its shape."""
        down, up = self.down.to(x.dtype), self.up.to(x.dtype)
        if isinstance(self.layer, nn.Conv2d):
            return _convolved(x, down, up, self.layer)
        rows = x.reshape(len(down), -1, x.shape[-1])  # (K, b * tokens, in)
        added = torch.bmm(torch.bmm(rows, down.mT), up.mT)  # (K, b * tokens, out)
        return added.view(*x.shape[:-1], up.shape[1])


def _convolved(x: Tensor, down: Tensor, up: Tensor, layer: nn.Conv2d) -> Tensor:
    """Computes what the subjects add to a convolution's output: (K * b, in, h, w) -> (K * b, out, h', w').

    The subjects lie side by side as groups of one convolution.
    """
    subjects, rank = down.shape[:2]
    batch = len(x) // subjects
    grouped = x.view(subjects, batch, *x.shape[1:]).transpose(0, 1).flatten(1, 2)  # (b, K * in, h, w)
    hidden = nn.functional.conv2d(
        grouped, down.flatten(0, 1), None, layer.stride, layer.padding, layer.dilation, groups=subjects
    )  # (b, K * r, h', w')
    added = nn.functional.conv2d(hidden, up.flatten(0, 1), groups=subjects)  # (b, K * out, h', w')
    return added.view(batch, subjects, -1, *added.shape[2:]).transpose(0, 1).flatten(0, 1)


def product(up: Tensor, down: Tensor, like: Tensor) -> Tensor:
    """Multiplies B (out, r, ...) and A (r, in, ...) in float32, in the shape of a layer's weight `like`."""
    return (up.float().flatten(1) @ down.float().flatten(1)).reshape(like.shape)


def adapted_names(network: nn.Module, layers: Sequence[str]) -> list[str]:
    """Returns the full names of the linear layers and convolutions of a network whose names end in one of `layers`.

    Raises ValueError where there are none.
    """
    names = [
        name
        for name, module in network.named_modules()
        if isinstance(module, Adaptable) and any(name.endswith(f".{layer}") for layer in layers)
    ]
    if not names:
        raise UserError(f"{type(network).__name__} has no layer named {', '.join(layers)}")
    return names


def attach_adapters(network: nn.Module, layers: Sequence[str], subjects: int, rank: int) -> dict[str, StackedAdapter]:
    """Puts a StackedAdapter in place of each of these layers, and returns them by the layer's full name.

    All are zero at first, so the network computes what it did before; `reset_subject` begins a subject. Every other
    weight stays frozen.
    """
    network.requires_grad_(False)
    adapters = {}
    for name in adapted_names(network, layers):
        parent, _, leaf = name.rpartition(".")
        layer = network.get_submodule(name)
        assert isinstance(layer, Adaptable)
        adapters[name] = StackedAdapter(layer, subjects, rank)
        setattr(network.get_submodule(parent), leaf, adapters[name])
    return adapters


@contextmanager
def detached_adapters(network: nn.Module, adapters: Mapping[str, StackedAdapter]) -> Iterator[None]:
    """Opens a context in which the network has no adapters, as for class images of the frozen base."""
    _put(network, {name: adapter.layer for name, adapter in adapters.items()})
    try:
        yield
    finally:
        _put(network, adapters)


@contextmanager
def chosen_subjects(adapters: Mapping[str, StackedAdapter], slots: Sequence[int]) -> Iterator[None]:
    """Opens a context in which the stack holds copies of these slots, without gradients, in this order.

    A slot is there as often as it is named. With guidance a batch goes through the network once without its prompts and
    once with them: [0, 1, 0, 1].
    """
    whole = {name: (adapter.down, adapter.up) for name, adapter in adapters.items()}
    for adapter in adapters.values():
        adapter.down = nn.Parameter(adapter.down.detach()[list(slots)], requires_grad=False)
        adapter.up = nn.Parameter(adapter.up.detach()[list(slots)], requires_grad=False)
    try:
        yield
    finally:
        for name, (down, up) in whole.items():
            adapters[name].down, adapters[name].up = down, up


def _put(network: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, module)


@torch.no_grad()
def reset_subject(adapters: Mapping[str, StackedAdapter], slot: int, rank: int, seed: int) -> None:
    """Begins a subject in a slot: A is Gaussian with deviation 1 / r, as in peft's "gaussian", B is zero.

    rank: of this subject, at most the stack's. The rows of A beyond it are zero; they take no gradient and stay so.
    The numbers depend on (seed, the layer's name) alone, not on slot, rank of the stack or device.
    """
    for number, name in enumerate(sorted(adapters)):
        down, up = adapters[name].down, adapters[name].up
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        down[slot].zero_()
        down[slot, :rank] = torch.randn(rank, *down.shape[2:], generator=generator).to(down.device) / rank
        up[slot].zero_()


def subject_weights(adapters: Mapping[str, StackedAdapter], slot: int, rank: int) -> dict[str, Tensor]:
    """Returns one subject's LoRA by peft's names (NAME.lora_A.weight, NAME.lora_B.weight), on the CPU, float32."""
    weights = {}
    for name, adapter in adapters.items():
        weights[f"{name}.lora_A.weight"] = adapter.down.detach()[slot, :rank].cpu().clone()
        weights[f"{name}.lora_B.weight"] = adapter.up.detach()[slot, :, :rank].cpu().clone()
    return weights


@torch.no_grad()
def load_subject(adapters: Mapping[str, StackedAdapter], slot: int, weights: Mapping[str, Tensor]) -> None:
    """Puts weights by peft's names into a slot. Raises ValueError where they do not fit, or are no numbers."""
    expected = {f"{name}.lora_{side}.weight" for name in adapters for side in "AB"}
    if weights.keys() != expected:
        other = sorted(weights.keys() ^ expected)
        raise UserError(f"the LoRA is of other layers: {len(other)} names differ, such as {other[0]}")
    for name, adapter in adapters.items():
        down, up = weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"]
        rank, (_, outputs, _, *kernel) = len(down), adapter.up.shape
        if rank > adapter.down.shape[1] or down.shape[1:] != adapter.down.shape[2:]:
            raise UserError(f"{name}: a LoRA of shape {tuple(down.shape)} does not fit {tuple(adapter.down.shape[1:])}")
        if up.shape != (outputs, rank, *kernel):  # one that is narrower would be repeated in silence
            raise UserError(f"{name}: a LoRA of shape {tuple(up.shape)} does not fit {(outputs, rank, *kernel)}")
        if not (down.is_floating_point() and up.is_floating_point() and down.isfinite().all() and up.isfinite().all()):
            raise UserError(f"{name}: the LoRA holds values that are no finite numbers with a fraction")
        adapter.down[slot].zero_()
        adapter.up[slot].zero_()
        adapter.down[slot, :rank] = down.to(adapter.down)
        adapter.up[slot, :, :rank] = up.to(adapter.up)


class StackedAdamW:
    """AdamW (arXiv 1711.05101) over stacked adapters, with a rate, a clip and a step count of each subject.

    Subject k's update is a function of its own gradients alone, so it is the same in every company.
    """

    def __init__(
        self,
        adapters: Mapping[str, StackedAdapter],
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-2,
        epsilon: float = 1e-8,
    ):
        self.parameters = stacked_parameters(adapters)
        self.first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.second = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.betas, self.weight_decay, self.epsilon = betas, weight_decay, epsilon

    @torch.no_grad()
    def step(self, rates: Tensor, steps: Sequence[int], max_grad_norms: Tensor) -> tuple[Tensor, Tensor]:
        """Makes one update. Returns (K,) gradient norms before clipping, and (K,) bool, which subjects were updated.

        rates: (K,) float32, 0 for an empty slot. steps: of each subject before this update. max_grad_norms: (K,).
        A subject whose gradient is not finite is left as it is.
        """
        norms = grad_norms(self.parameters)
        finite = torch.isfinite(norms)
        clip = torch.where(finite, (max_grad_norms / (norms + 1e-6)).clamp(max=1.0), 0.0)
        b1, b2 = self.betas
        moved = (rates > 0) & finite
        correction1 = torch.tensor([1.0 - b1 ** (step + 1) for step in steps], device=norms.device)
        correction2 = torch.tensor([math.sqrt(1.0 - b2 ** (step + 1)) for step in steps], device=norms.device)
        for parameter, first, second in zip(self.parameters, self.first, self.second, strict=True):
            assert parameter.grad is not None

            def by_subject(values: Tensor, like: Tensor = parameter) -> Tensor:
                return values.view(-1, *[1] * (like.dim() - 1))

            keep = by_subject(moved)
            grad = torch.where(keep, parameter.grad, 0.0) * by_subject(clip)
            first.copy_(torch.where(keep, b1 * first + (1 - b1) * grad, first))
            second.copy_(torch.where(keep, b2 * second + (1 - b2) * grad.square(), second))
            direction = first / by_subject(correction1) / (second.sqrt() / by_subject(correction2) + self.epsilon)
            change = by_subject(rates) * (direction + self.weight_decay * parameter)
            parameter.sub_(torch.where(keep, change, 0.0))
        return norms, moved

    def reset(self, slot: int) -> None:
        """Forgets what is known of a slot's gradients, for the subject that comes next."""
        for moment in (*self.first, *self.second):
            moment[slot].zero_()


def grad_norms(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Computes the norm of each subject's gradient over all layers, (K,) float32."""
    squares = [parameter.grad.flatten(1).square().sum(1) for parameter in parameters if parameter.grad is not None]
    return torch.stack(squares).sum(0).sqrt()


@torch.no_grad()
def keep_slots(adapters: Mapping[str, StackedAdapter], optimizer: StackedAdamW, slots: Sequence[int | None]) -> None:
    """Makes the stack hold these slots, in this order; None is a new, empty one. The optimizer's state follows."""

    def picked(tensor: Tensor) -> Tensor:
        empty = tensor.new_zeros(1, *tensor.shape[1:])
        rows = [empty if slot is None else tensor[slot : slot + 1] for slot in slots]
        return torch.cat([tensor[:0], *rows])

    for name in sorted(adapters):
        adapters[name].down = nn.Parameter(picked(adapters[name].down))
        adapters[name].up = nn.Parameter(picked(adapters[name].up))
    optimizer.first = [picked(moment) for moment in optimizer.first]
    optimizer.second = [picked(moment) for moment in optimizer.second]
    optimizer.parameters = stacked_parameters(adapters)


def stacked_parameters(adapters: Mapping[str, StackedAdapter]) -> list[nn.Parameter]:
    """Returns the parameters of all adapters, sorted by the layers' names."""
    return [parameter for name in sorted(adapters) for parameter in (adapters[name].down, adapters[name].up)]
