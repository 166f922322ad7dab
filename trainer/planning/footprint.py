"""What one micro-batch of a run takes: bytes by category and floating-point operations, found without doing the work.

The run's own modules and its own step run on fake tensors, which have shapes and dtypes and no memory. A dispatch mode
sees every operation: it counts what does work, and follows the storage of every tensor that is made until Python lets
go of it, as it would on a device. PyTorch's own FlopCounterMode is not used beside it: the modules that it tracks keep
what gradient checkpointing recomputes alive. Its formulas are.
Only what the engine adds (gradient buckets, masters, optimizer states) is arithmetic, in `rank_memory`.
"""

import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from controlbooth.models.architectures import PUBLISHED, Config
from controlbooth.models.attention import AttentionChoice, apply_attention
from controlbooth.models.base import Base, vae_dtype
from controlbooth.models.blocks import repeated_blocks
from controlbooth.models.denoisers.control_lora import ControlLora, merged, share_weights
from controlbooth.models.denoisers.flux_control_lora import FluxControlLora
from controlbooth.models.denoisers.registry import denoiser_of, reads_latents
from controlbooth.models.denoisers.transformer_copy import fixed_tensors
from controlbooth.models.families import FAMILIES, VAE, Family, Part
from controlbooth.models.files.weight_files import read_json
from controlbooth.models.noise.checks import check_noise, scheduler_file
from controlbooth.models.noise.process import Diffusion, Process
from controlbooth.models.pretrained import check_dtype, class_of, controlnet_class, flow_process
from controlbooth.models.recognition import check_part, recognise_folder
from controlbooth.models.recomputing import recompute
from controlbooth.trainer.config.run import RunConfig, base_folder
from controlbooth.trainer.config.section import ConfigError
from controlbooth.trainer.controlnet.build import new_controlnet
from controlbooth.trainer.controlnet.step import DeviceBatch, condition_input, controlnet_loss
from controlbooth.trainer.encoding import encode_captions, encode_kept, encode_posterior
from controlbooth.trainer.engine.deepspeed import DTYPES
from controlbooth.trainer.engine.offloading import activations_on_host
from controlbooth.trainer.engine.optimizers import state_bytes
from controlbooth.trainer.planning.frozen_bytes import HeldBytes, held_bytes
from controlbooth.trainer.run.base import AnyRun, with_run_settings

WITHOUT_SCORES = ("auto", "xformers", "efficient", "flash")
"""Attention kernels that keep no matrix of tokens by tokens; `auto` takes one of them where such a matrix is large."""

aten = torch.ops.aten
FLASH, FLASH_BACKWARD = (
    (aten._scaled_dot_product_flash_attention, aten._scaled_dot_product_flash_attention_for_cpu),
    (aten._scaled_dot_product_flash_attention_backward, aten._scaled_dot_product_flash_attention_for_cpu_backward),
)


def attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Counts the floating-point operations of attention's backward pass: twice those forward, as of every product.

    PyTorch's formula has a fifth product more, of the scores that these kernels compute again: that is how they save
    memory, and not work that the step asks for.
    """
    return 2 * flop_registry[FLASH[0]](query, key, value, out_val=gradient)


PRODUCTS: dict[Any, Any] = (
    dict(flop_registry)
    | dict.fromkeys(FLASH, flop_registry[FLASH[0]])
    | dict.fromkeys(FLASH_BACKWARD, attention_backward_flops)
)
"""Matrix products, convolutions and attention -> the formula of their floating-point operations. Of the attention that
a CPU takes, on which a step is planned, PyTorch has none."""
ALLOCATIONS = (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
"""Memory that nothing is written to."""


@dataclass(frozen=True)
class Footprint:
    """What one micro-batch takes on one rank, forward and backward."""

    micro_batch_size: int
    frozen_bytes: int
    """The base: U-Net or transformer, and VAE and text encoders, which are loaded whether or not a latent cache stands
    for them; and what a ControlNet has besides its trained weights, such as SD3's table of places."""
    trained_parameters: int
    largest_parameter: int
    """Elements of the largest trained tensor."""
    trained_modules: int
    """Modules with trained weights of their own, around each of which ZeRO-3 gathers them."""
    profile: tuple[tuple[int, int], ...]
    """(activation bytes, gradient bytes) at the moments where neither is exceeded later with more of the other: weights
    excluded, gradients in the dtype of the run."""
    encoder_flops: int
    """VAE and text encoders, of the whole micro-batch; with a latent cache the VAE's for conditions that enter as
    latents, and 0 on U-Nets."""
    training_flops: int
    """ControlNet and base, forward and backward, recomputation included."""
    traffic_bytes: int
    """Read and written by operations other than products: normalisation, activations, copies. These take their time by
    the memory's bandwidth."""
    operations: int
    """Operations that run a kernel, forward and backward, encoders included: each costs the host its launch."""
    batch_bytes: int
    """What the loader hands over and the device holds of one micro-batch."""
    cached_bytes: int
    """What of that is latents and hidden states from the latent cache, as they are stored; 0 with online encoders."""
    states: tuple[tuple[int, int], ...] = ()
    """Of each trained tensor in turn its elements and the bytes that the optimizer keeps of it; empty with AdamW, which
    keeps the same of every element."""
    host_bytes: int = 0
    """In host memory: of a transformer's ControlNet, what its files hold besides trained weights, in fp32."""
    host_activation_bytes: int = 0
    """The most that is in host memory of what the backward pass needs, where engine.activations is cpu."""
    reads_conditions: bool = True
    """Whether the loader reads pictures of conditions: not where the latent cache holds their latents."""
    denoiser_blocks: tuple[tuple[int, int], ...] = ()
    """Of each of the base's blocks, which may be split over ranks or streamed, in the order in which they work: the
    bytes of its tensors, which frozen_bytes has too, and those that it takes where it is fetched."""
    encoder_blocks: tuple[tuple[int, int], ...] = ()
    """The same of the text encoders."""
    restoring_bytes: int = 0
    """What the largest quantized weight takes while it is brought back to the run's precision."""
    otherwise: tuple[tuple[str, HeldBytes], ...] = ()
    """Of each of OTHER_PRECISIONS: the bytes of the base where it is held in that."""

    @property
    def activation_bytes(self) -> int:
        return max(activations for activations, _ in self.profile)

    @property
    def flops(self) -> int:
        return self.encoder_flops + self.training_flops


OTHER_PRECISIONS = ("engine", "int8", "nf4")
"""In which a frozen base may be held instead, from the one that changes results least. fp8 takes the bytes of int8,
with fewer bits of a fraction; bf16 is that of nearly every engine."""


def held_as(one: Footprint, precision: str) -> Footprint:
    """Returns the footprint of the same step with its base held in one of OTHER_PRECISIONS."""
    return replace(one, **vars(dict(one.otherwise)[precision]))


def scaled(one: Footprint, micro_batch_size: int) -> Footprint:
    """Scales a footprint to another micro-batch: activations and work grow with it, weights and gradients do not."""
    times = micro_batch_size / one.micro_batch_size
    return replace(
        one,
        micro_batch_size=micro_batch_size,
        profile=tuple((round(activations * times), gradients) for activations, gradients in one.profile),
        **{
            name: round(getattr(one, name) * times)
            for name in (
                "encoder_flops",
                "training_flops",
                "traffic_bytes",
                "batch_bytes",
                "cached_bytes",
                "host_activation_bytes",
            )
        },
    )


def runs_a_kernel(func: Any, arguments: Iterable[Tensor], results: Iterable[Tensor]) -> bool:
    """Tells whether an operation reads or writes elements: it makes new ones, or changes what it was given.

    Questions (device, size, stride), views, `detach`, `lift` and allocations do not; `_unsafe_view` is a view that is
    not called one, so results are told from arguments by their memory.
    """
    if func._overloadpacket in ALLOCATIONS or func.is_view or torch.Tag.inplace_view in func.tags:
        return False
    if func._schema.is_mutable:
        return True
    given = {tensor.untyped_storage()._cdata for tensor in arguments}
    return any(tensor.untyped_storage()._cdata not in given for tensor in results)


class LiveStorages(TorchDispatchMode):
    """Follows the storages of all tensors made inside, each from its making until its last tensor is gone, and counts
    the operations between: all of them, what products multiply and add, and the bytes that the others move."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.gradients, self.traffic, self.operations, self.flops = 0, 0, 0, 0, 0
        self.on_host, self.most_on_host = 0, 0
        self.moments: list[tuple[int, int]] = []
        self._known: dict[int, Any] = {}

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves out tensors that were there before and are counted elsewhere, such as weights."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = storage  # held, so that its address is not used again

    def is_gradient(self, tensor: Tensor) -> None:
        """Counts this tensor as a gradient from now on, not as an activation."""
        size = tensor.untyped_storage().nbytes()
        self.gradients += size
        self.live -= size
        self.moments.append((self.live, self.gradients))

    def is_on_host(self, tensor: Tensor) -> None:
        """Counts this tensor, the one made last, as one in host memory from now on."""
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()

        def gone(_: Any) -> None:
            self.on_host -= size
            del self._known[address]

        self._known[address] = weakref.ref(storage, gone)
        self.live -= size
        self.moments.pop()
        self.on_host += size
        self.most_on_host = max(self.most_on_host, self.on_host)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        results = [value for value in tree_iter(made) if isinstance(value, Tensor)]
        inputs = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if runs_a_kernel(func, inputs, results):
            self.operations += 1
            if formula := PRODUCTS.get(func._overloadpacket):
                self.flops += formula(*args, **(kwargs or {}), out_val=made)
            else:
                self.traffic += sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *results))
        for tensor in results:
            self._follow(tensor)
        return made

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._known or tensor.device.type == "meta":  # DeepSpeed keeps shapes as such tensors
            return

        def gone(_: Any) -> None:
            self.live -= size
            del self._known[address]

        self._known[address] = weakref.ref(storage, gone)
        self.live += size
        self.moments.append((self.live, self.gradients))


def worst_moments(moments: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Picks the moments (activations, gradients), in bytes, for which no other has as much of both.

    Whatever a byte of gradients costs, the peak is at one of them.
    """
    kept: list[tuple[int, int]] = []
    for activations, gradients in sorted(set(moments), reverse=True):
        if not kept or gradients > kept[-1][1]:
            kept.append((activations, gradients))
    return tuple(kept)


def shapes_of(config: RunConfig, precision: str, shapes: str | None = None) -> tuple[Base, Any]:
    """Makes the base and the ControlNet of a run on the meta device. shapes: of PUBLISHED, in place of model.base.

    Raises ConfigError and ValueError as `base_shapes`.
    """
    base = base_shapes(config, precision, shapes)
    return base, nn.Module.to(_controlnet(config, base.denoiser), DTYPES[precision])


def base_shapes(config: AnyRun, precision: str, shapes: str | None = None) -> Base:
    """Makes the base of a run, or of a run of subjects, on the meta device. shapes: of PUBLISHED.

    Raises ConfigError and ValueError for a base that cannot be read, for a family of which nothing is known, and for
    settings that have no meaning with it.
    """
    family, parts, noise = _architecture(config, shapes)
    dtype = DTYPES[precision]
    where = shapes or config.model.base
    check_dtype(family, dtype, where)
    with torch.device("meta"):
        modules = {part: _empty(part, parts[part.folder]) for part in family.parts}
    for part, module in modules.items():
        own = vae_dtype(module.config, dtype) if part == VAE else dtype
        nn.Module.to(module.requires_grad_(False).eval(), own)  # diffusers' own `to` warns of what does not apply
    encoders = tuple(modules[part] for part in family.text_encoders)
    text_tokens = family.text_tokens if config.model.text_tokens is None else config.model.text_tokens
    base = Base(
        family=family,
        path=Path(where),
        vae=modules[VAE],
        text_encoders=encoders,
        tokenizers=tuple(Tokenizer(getattr(one.config, "max_position_embeddings", text_tokens)) for one in encoders),
        denoiser=modules[family.denoiser],
        process=_process(family, noise, where),
        digest="",
        text_tokens=text_tokens,
    )
    return with_run_settings(config, base)


def _empty(part: Part, config: Config) -> Any:
    """Makes a network of a base, on the device that is PyTorch's default now."""
    kind = class_of(part)
    if part.model_types:  # of transformers
        return kind(kind.config_class(**config))
    return kind.from_config(dict(config))


def _process(family: Family, config: Config, where: str) -> Process:
    if family.is_transformer:
        return flow_process(config, where)
    scheduler: Any = DDPMScheduler.from_config(dict(config))
    return Diffusion(scheduler)


def _architecture(config: AnyRun, shapes: str | None) -> tuple[Family, dict[str, Config], Config]:
    """Finds the family, the configurations of the networks by their folders and that of the noise: the published ones,
    or those that the base's folder holds."""
    folder = base_folder(config.model.base)
    if shapes is None and folder.is_dir():
        family = _without_t5(config, recognise_folder(folder, config.model.family))
        for part in family.parts:
            check_part(folder, part)
        noise = read_json(scheduler_file(folder))
        check_noise(family, noise, str(scheduler_file(folder)))
        return family, {part.folder: read_json(folder / part.folder / "config.json") for part in family.parts}, noise
    name = shapes or config.model.family
    if name not in PUBLISHED:
        raise ConfigError(
            f"model.base is {config.model.base!r}, which is no diffusers folder that could be read here. Give such a "
            f"folder, or plan by published shapes: --shapes {' or '.join(PUBLISHED)}"
        )
    published = PUBLISHED[name]
    family = FAMILIES[published.family]
    parts = dict(
        zip(
            [part.folder for part in family.parts],
            (published.denoiser, published.vae, *published.text_encoders),
            strict=True,
        )
    )
    return _without_t5(config, family), parts, published.noise_scheduler


def _without_t5(config: AnyRun, family: Family) -> Family:
    return family if config.model.t5 else family.without_t5()


def _controlnet(config: RunConfig, network: Any) -> Any:
    """Makes the ControlNet of a run on the meta device.

    Of one that is to be trained further, only the configuration is read, not the weights.
    """
    model = config.model
    if model.controlnet != "unet" and Path(model.controlnet).is_dir():
        folder = Path(model.controlnet)
        with torch.device("meta"):
            controlnet: Any = controlnet_class(folder).from_config(read_json(folder / "config.json"))
        if isinstance(controlnet, ControlLora):
            share_weights(controlnet, network)
            controlnet = controlnet if model.method == "lora" else merged(controlnet)
        if isinstance(controlnet, FluxControlLora):
            share_weights(controlnet, network)
        return denoiser_of(controlnet).file.finish_reading(controlnet).train()
    return new_controlnet(network, model)


class Tokenizer:
    """Stands for a base's: every prompt has as many tokens, since prompts are padded to that.

    length: of CLIP the encoder's positions, 77 of the published ones; T5 has no limit, and is told one at each call.
    """

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __call__(self, prompts: list[str], *, max_length: int, **_: Any) -> Any:
        return SimpleNamespace(input_ids=torch.zeros(len(prompts), max_length, dtype=torch.int64))


def footprint(
    config: RunConfig, precision: str, micro_batch_size: int, attention: str, shapes: str | None = None
) -> Footprint:
    """Runs one micro-batch, forward and backward, on fake tensors. Seconds for SD1.5.

    attention: a kernel, or auto; those WITHOUT_SCORES count as one.
    shapes: as in `shapes_of`, and its errors.
    """
    base, controlnet = shapes_of(config, precision, shapes)
    with FakeTensorMode(allow_non_fake_inputs=True):
        made: dict[int, Tensor] = {}
        for module in (base.vae, base.denoiser, controlnet, *base.text_encoders):
            without_memory(module, made)
        choice = AttentionChoice("flash" if attention in WITHOUT_SCORES else attention, "planned")
        for module in (base.denoiser, controlnet):
            apply_attention(module, choice)
            recompute(module, config.model.gradient_checkpointing)
        base.empty_prompt(encode_captions)  # once, not in every step
        return _measured(config, base, controlnet, micro_batch_size)


def _measured(config: RunConfig, base: Base, controlnet: Any, micro_batch_size: int) -> Footprint:
    trained = list(controlnet.parameters())
    frozen = [t for module in (base.vae, base.denoiser, *base.text_encoders) for t in tensors_of(module)]
    frozen += controlnet.buffers()
    live, encoders = LiveStorages(), LiveStorages()
    live.ignore([*frozen, *trained])
    handles = [p.register_post_accumulate_grad_hook(lambda p: live.is_gradient(p.grad)) for p in trained]
    batch = fake_batch(config, base, controlnet, micro_batch_size)
    with encoders, torch.no_grad():
        condition_input(base, controlnet, batch)
        if batch.pixel_values is not None:
            encode_posterior(base, batch.pixel_values)
            encode_kept(base, batch.captions)
    order: dict[nn.Module, None] = {}  # of the denoiser's blocks
    handles += [
        block.register_forward_pre_hook(lambda block, _: order.setdefault(block))
        for block in repeated_blocks(base.denoiser)
    ]
    with live:
        batch = fake_batch(config, base, controlnet, micro_batch_size)
        size, live.traffic, live.operations = live.live, 0, 0
        stay = [*frozen, *trained]
        moved = config.engine.activations == "cpu"
        with activations_on_host(stay, noted=live.is_on_host) if moved else nullcontext():
            loss = controlnet_loss(base, controlnet, batch, config.optimizer.min_snr_gamma)
        loss.backward()
    for handle in handles:
        handle.remove()
    for parameter in trained:
        parameter.grad = None
    whole = sum({one._cdata: one.nbytes() for one in map(Tensor.untyped_storage, frozen)}.values())
    encoder_blocks = [block for encoder in base.text_encoders for block in repeated_blocks(encoder)]
    return Footprint(
        micro_batch_size=micro_batch_size,
        **vars(held_bytes(base, whole, order, encoder_blocks, config.model.frozen.precision)),
        otherwise=tuple((name, held_bytes(base, whole, order, encoder_blocks, name)) for name in OTHER_PRECISIONS),
        host_activation_bytes=live.most_on_host,
        host_bytes=sum(4 * tensor.numel() for tensor in fixed_tensors(controlnet).values()),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        states=states_of(config.optimizer.name, controlnet),
        largest_parameter=max(parameter.numel() for parameter in trained),
        trained_modules=modules_with_weights(controlnet),
        profile=worst_moments(live.moments),
        encoder_flops=encoders.flops,
        training_flops=live.flops - encoders.flops,
        traffic_bytes=live.traffic,
        operations=live.operations,
        batch_bytes=size,
        cached_bytes=sum(
            t.numel() * t.element_size()
            for t in (*(batch.posterior or ()), *(batch.text or ()), batch.condition)
            if t is not None
        ),
        reads_conditions=batch.conditioning_pixel_values is not None,
    )


def states_of(optimizer: str, network: nn.Module) -> tuple[tuple[int, int], ...]:
    """Returns `Footprint.states` of a network that is trained."""
    if optimizer == "adamw":
        return ()
    return tuple((p.numel(), state_bytes(optimizer, name, p.shape)) for name, p in network.named_parameters())


def fake_batch(config: RunConfig, base: Base, controlnet: Any, size: int) -> DeviceBatch:
    """Makes a micro-batch as `to_device` leaves it: of pictures, or of what the latent cache holds."""
    side = config.data.resolution
    latent = side // base.family.vae_factor
    shape = (size, base.latent_channels, latent, latent)
    pixel_values, posterior, text, condition = None, None, None, None
    if config.data.latent_cache is None:
        pixel_values = torch.zeros(size, 3, side, side)
    else:
        posterior = (torch.zeros(shape, dtype=base.vae.dtype), torch.zeros(shape, dtype=base.vae.dtype))
        assert base._empty is not None
        states, pooled = base._empty
        text = (states.repeat(size, 1, 1), None if pooled is None else pooled.repeat(size, 1))
        condition = torch.zeros(shape, dtype=base.vae.dtype) if reads_latents(controlnet) else None
    return DeviceBatch(
        pixel_values=pixel_values,
        conditioning_pixel_values=torch.zeros(size, 3, side, side) if condition is None else None,
        captions=["a caption"] * size,
        levels=torch.zeros(size, dtype=torch.int64),
        noise=torch.zeros(shape),
        posterior_noise=torch.zeros(shape),
        weights=torch.ones(size),
        posterior=posterior,
        text=text,
        condition=condition,
    )


def modules_with_weights(module: nn.Module) -> int:
    return sum(any(True for _ in one.parameters(recurse=False)) for one in module.modules())


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def without_memory(module: nn.Module, made: dict[int, Tensor] | None = None) -> None:
    """Puts fake tensors in place of those on the meta device, which operations with other tensors would refuse.

    A parameter that has two names, as T5's embedding, stays one. made: what was put in the place of which storage, for
    modules that share tensors.
    """
    made, parameters = {} if made is None else made, dict[int, nn.Parameter]()

    def empty(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in made:
            made[storage] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return made[storage]

    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                if id(parameter) not in parameters:
                    parameters[id(parameter)] = nn.Parameter(empty(parameter), parameter.requires_grad)
                part._parameters[name] = parameters[id(parameter)]
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = empty(buffer)
