"""Which memory-efficient kernel computes attention, and putting it into a U-Net, ControlNet or VAE.

PyTorch's scaled_dot_product_attention has four: `flash`, `cudnn` and `efficient` (these two on CUDA only) and `math`,
which multiplies matrices in float32. `plain` is a softmax between two matrix products in the run's own precision: in
bf16 a CPU takes a third of the time for it, since the others' backward passes do not use its bf16 units. xformers is
for CUDA and has its own choice of kernels. Whether a kernel runs depends on device, dtype and head width, so it is
tried rather than looked up.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, XFormersAttnProcessor
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from controlbooth.data.errors import UserError

SDP_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
KERNELS = (*SDP_KERNELS, "plain")
"""Ties go to the earlier one, which needs less memory."""
KEEP_SCORES = ("math", "plain")
"""Kernels that keep a layer's scores for the backward pass: batch * heads * query_tokens * key_tokens numbers."""
MOST_SCORES = 2**24
"""Beyond so many, `auto` leaves these kernels out. SD1.5 at 512 px has eight times as many in one sample."""


class AttentionShape(NamedTuple):
    """The shape of an attention call: query (batch, heads, query_tokens, width), key and value (batch, heads,
    key_tokens, width)."""

    batch: int
    heads: int
    query_tokens: int
    key_tokens: int
    width: int

    @property
    def key(self) -> str:
        """Returns the name of the shape in files. The batch is left out, since validation and sampling run the same
        layers with other batch sizes."""
        return f"{self.heads}x{self.query_tokens}x{self.key_tokens}x{self.width}"


MUCH_FASTER = 0.7
"""Of the time of the kernel that is faster over all shapes. A closer race is left to that one: timings vary."""
TYPICAL_SHAPES = (AttentionShape(1, 8, 64, 64, 40), AttentionShape(1, 8, 64, 77, 40))
"""Tried where the caller names no shapes: self- and cross-attention with the head width of SD1.5's first level."""


@dataclass(frozen=True)
class AttentionChoice:
    name: str
    """xformers, flash, cudnn, efficient, math or plain."""
    reason: str
    """A sentence for the log."""
    by_shape: Mapping[str, str] = field(default_factory=dict)
    """AttentionShape.key -> the kernel for that shape, where another one than `name` is much faster."""


class KernelAttnProcessor(AttnProcessor2_0):
    """diffusers' processors, held to the kernels of our choice: without this PyTorch chooses at every call."""

    def __init__(self, name: str, by_shape: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.name, self.by_shape = name, dict(by_shape or {})
        self._plain = AttnProcessor()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        name = self.by_shape.get(shape_of(attn, hidden_states, encoder_hidden_states).key, self.name)
        if name == "plain":
            return self._plain(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        with sdpa_kernel(SDP_KERNELS[name]):
            return super().__call__(attn, hidden_states, encoder_hidden_states, *args, **kwargs)


class KernelOf:
    """A transformer layer's own processor, held to the kernel of our choice around its call.

    What a joint layer does with two streams is its own processor's; which kernel PyTorch takes is decided here.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, inner: Any, name: str, by_shape: Mapping[str, str] | None = None) -> None:
        self.inner, self.name, self.by_shape = inner, name, dict(by_shape or {})

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Calls the layer's own processor with the chosen kernel.

        The signature names every argument that the processors of SD3 and FLUX.1 take, because layers pass on only the
        arguments that a processor's signature names.
        """
        given = {"attention_mask": attention_mask, "image_rotary_emb": image_rotary_emb}
        name = self.by_shape.get(joint_shape(attn, hidden_states, encoder_hidden_states).key, self.name)
        with sdpa_kernel(SDP_KERNELS[name]):
            return self.inner(
                attn,
                hidden_states,
                encoder_hidden_states,
                **{key: value for key, value in given.items() if value is not None},
            )


def joint_shape(layer: Any, hidden_states: Tensor, context: Tensor | None) -> AttentionShape:
    """Returns the shape of a call of a transformer's layer, where text and picture tokens are one sequence.

    hidden_states and context: (B, tokens, D); context may be None.
    """
    tokens = hidden_states.shape[1] + (0 if context is None else context.shape[1])
    return AttentionShape(hidden_states.shape[0], layer.heads, tokens, tokens, layer.inner_dim // layer.heads)


def is_joint(layer: nn.Module) -> bool:
    """Tells whether a module is an attention layer of a transformer of two streams."""
    return getattr(layer, "add_q_proj", None) is not None or type(layer).__name__ == "FluxAttention"


def shape_of(layer: Attention, hidden_states: Tensor, context: Tensor | None) -> AttentionShape:
    """Returns the shape of a call of this layer.

    hidden_states: (B, tokens, D) or (B, D, h, w). context: (B, tokens, D), or None for self-attention.
    """
    tokens = hidden_states.shape[1] if hidden_states.ndim == 3 else hidden_states.shape[2] * hidden_states.shape[3]
    keys = tokens if context is None else context.shape[1]
    return AttentionShape(hidden_states.shape[0], layer.heads, tokens, keys, layer.inner_dim // layer.heads)


def choose_attention(
    request: str,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[AttentionShape] = TYPICAL_SHAPES,
    kernels: Sequence[str] = ("xformers", *KERNELS),
) -> AttentionChoice:
    """Chooses the kernel for `shapes`, which `attention_shapes` finds.

    request: auto, xformers, flash, cudnn, efficient, math or plain. Auto times a forward and backward pass of each
    kernel that runs for all shapes and gives the same gradients every time, and takes the fastest; shapes for which
    another kernel takes less than MUCH_FASTER of its time get that one. Kernels that keep all scores are left out on a
    GPU, and on a CPU where there are more than MOST_SCORES, unless no other kernel runs. Kernels round differently and
    timings vary: a run that is to resume bit for bit keeps the name of its first choice and asks for that, and so do
    all its ranks.
    kernels: those that the network's layers can be called with. Raises ValueError for an unknown name, and for a kernel
    that cannot run here, with the reason and the kernels that can.
    """
    device = torch.device(device)
    if request not in ("auto", "xformers", *KERNELS):
        raise UserError(f"attention {request!r} is not known. Use auto, xformers, {', '.join(KERNELS)}.")
    why_not = _reason_against if request == "auto" else _obstacle
    if request not in ("auto", *kernels):
        raise UserError(
            f"attention {request!r} is for U-Nets: a transformer's layers are called by PyTorch's kernels. Use "
            f"{', '.join(kernels)}, or 'auto'"
        )
    found = {name: {shape: why_not(name, device, dtype, shape) for shape in shapes} for name in kernels}
    obstacles = {name: next(filter(None, own.values()), None) for name, own in found.items()}
    usable = [name for name, obstacle in obstacles.items() if obstacle is None]
    if request != "auto":
        if obstacles[request] is not None:
            raise UserError(
                f"attention {request!r} cannot run on {device} in {_short(dtype)}: {obstacles[request]}. "
                f"Here can: {', '.join(usable)}; or use 'auto'."
            )
        return AttentionChoice(request, "asked for")
    largest = max(shape.batch * shape.heads * shape.query_tokens * shape.key_tokens for shape in shapes)
    frugal = [name for name in usable if name not in KEEP_SCORES]
    left_out = KEEP_SCORES if frugal and (largest > MOST_SCORES or device.type != "cpu") else ()
    times = {
        name: {shape: _time(name, shape, device, dtype) for shape, obstacle in own.items() if obstacle is None}
        for name, own in found.items()
        if name not in left_out
    }
    milliseconds = {name: sum(times[name].values()) for name in usable if name in times}
    fastest, *others = milliseconds
    for name in others:
        if milliseconds[name] < 0.9 * milliseconds[fastest]:  # a tie goes to the kernel that needs less memory
            fastest = name
    figures = ", ".join(f"{name} {figure:.2f} ms" for name, figure in milliseconds.items())
    by_shape = {}
    if fastest != "xformers":  # whose processor is another, for all shapes
        for shape in shapes:
            best = min((name for name in KERNELS if shape in times.get(name, ())), key=lambda name: times[name][shape])
            if times[best][shape] < MUCH_FASTER * times[fastest][shape]:
                by_shape[shape.key] = best
    chosen = sum(times[by_shape.get(shape.key, fastest)][shape] for shape in shapes)
    mixed = f", and {chosen:.2f} ms with others for {len(by_shape)} of them" if by_shape else ""
    reason = f"by time: {figures}, forward and backward, for {len(shapes)} shapes{mixed}"
    if device.type != "cpu":
        reason += "".join(f"; not {name}: {why}" for name, why in obstacles.items() if why is not None)
    return AttentionChoice(fastest, reason, by_shape)


JOINT_KERNELS = tuple(SDP_KERNELS)
"""Those that a transformer's layers can be called with."""


def kernels_for(is_transformer: bool) -> tuple[str, ...]:
    """Returns the kernels that the layers of a base's network can be called with: a transformer's, or a U-Net's."""
    return JOINT_KERNELS if is_transformer else ("xformers", *KERNELS)


JOINT = ("JointAttn", "FluxAttn", "KernelOf")
"""Beginnings of the names of processors of transformers."""


def apply_attention(module: Any, choice: AttentionChoice) -> None:
    """Puts the chosen kernel into every attention layer of a base's network, a ControlNet or VAE.

    The kernel for a transformer must be one of JOINT_KERNELS. Raises TypeError for other modules.
    """
    if not hasattr(module, "set_attn_processor"):
        raise TypeError(f"{type(module).__name__} has no attention processors to set; give a U-Net, ControlNet or VAE")
    if any(type(one).__name__.startswith(JOINT) for one in module.attn_processors.values()):
        module.set_attn_processor(
            {
                place: KernelOf(getattr(own, "inner", own), choice.name, choice.by_shape)
                for place, own in module.attn_processors.items()
            }
        )
        return
    processor = (
        XFormersAttnProcessor() if choice.name == "xformers" else KernelAttnProcessor(choice.name, choice.by_shape)
    )
    module.set_attn_processor(processor)


def attention_shapes(module: nn.Module, run: Callable[[], Any]) -> tuple[AttentionShape, ...]:
    """Calls `run()` without gradients, and returns the distinct shapes with which it calls `module`'s attention layers.

    Those with the most query tokens times key tokens come first.
    """
    found: set[AttentionShape] = set()

    def note(layer: Any, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        context = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        found.add((joint_shape if is_joint(layer) else shape_of)(layer, hidden, context))

    layers = [layer for layer in module.modules() if isinstance(layer, Attention) or is_joint(layer)]
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return tuple(sorted(found, key=lambda shape: shape.query_tokens * shape.key_tokens, reverse=True))


def _obstacle(name: str, device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> str | None:
    """Tells why a kernel cannot run forward and backward for the shape; returns None if it can.

    At most 64 tokens are tried, which is enough to find out.
    """
    if name == "xformers":
        if device.type != "cuda":
            return "xformers has CUDA kernels only"
        if find_spec("xformers") is None:
            return "xformers is not installed (pip install 'controlbooth[cuda]')"
    if name in ("cudnn", "efficient") and device.type == "cpu":
        return "PyTorch has this kernel for CUDA only"
    small = shape._replace(batch=1, query_tokens=min(64, shape.query_tokens), key_tokens=min(64, shape.key_tokens))
    with warnings.catch_warnings(record=True) as said:  # in which PyTorch says why it has "no available kernel"
        warnings.simplefilter("always")
        try:
            _attend(name, *_tensors(small, device, dtype)).sum().backward()
        except (RuntimeError, NotImplementedError, ValueError) as error:  # what the kernels raise for what they cannot
            reasons = [str(warning.message) for warning in said] + [str(error).strip()]
            telling = [text for text in reasons if "not used because" not in text and "runtime disabled" not in text]
            return f"{shape}: {telling[0].splitlines()[0].partition(' (Triggered')[0]}"
    return None


def _reason_against(name: str, device: torch.device, dtype: torch.dtype, shape: AttentionShape) -> str | None:
    """Tells why `auto` must not choose a kernel: it cannot run, or its gradients differ from pass to pass, as those of
    kernels with atomic additions do. Returns None if nothing is against it."""
    obstacle = _obstacle(name, device, dtype, shape)
    if obstacle is not None or name == "math" or device.type == "cpu":
        return obstacle
    tensors = _tensors(shape, device, dtype)
    passes = [torch.autograd.grad(_attend(name, *tensors).square().sum(), tensors) for _ in range(3)]
    same = all(torch.equal(one, other) for again in passes[1:] for one, other in zip(passes[0], again, strict=True))
    return None if same else f"{shape}: gradients differ from pass to pass"


def _attend(name: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Computes attention with a kernel. query, key and value: (batch, heads, tokens, width) each.

    Returns (batch, heads, tokens, width), but of xformers and plain (batch * heads, tokens, width).
    """
    if name == "xformers":
        import xformers.ops  # an extra, CUDA only  # pyright: ignore[reportMissingImports]

        # the layout in which diffusers' processor calls it: heads folded into the batch
        folded = (tensor.flatten(0, 1).contiguous() for tensor in (query, key, value))
        return xformers.ops.memory_efficient_attention(*folded)
    if name == "plain":  # as diffusers' AttnProcessor has it
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
        scores = torch.baddbmm(query.new_empty(1), query, key.mT, beta=0, alpha=query.shape[-1] ** -0.5)
        return torch.bmm(scores.softmax(-1), value)
    with sdpa_kernel(SDP_KERNELS[name]):
        return F.scaled_dot_product_attention(query, key, value)


def _tensors(shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def draw(tokens: int) -> Tensor:
        size = (shape.batch, tokens, shape.heads, shape.width)  # in memory tokens before heads, as projections leave it
        tensor = torch.randn(size, generator=generator, device=device, dtype=dtype).requires_grad_()
        return tensor.transpose(1, 2)

    return draw(shape.query_tokens), draw(shape.key_tokens), draw(shape.key_tokens)


def _time(name: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype) -> float:
    """Measures a forward and backward pass in milliseconds.

    It returns the fastest of several passes, since other processes only slow one down.
    """
    seconds: list[float] = []
    tensors = _tensors(shape, device, dtype)
    while len(seconds) < 2 or (len(seconds) < 10 and sum(seconds) < 0.2):  # the first one only warms up
        _wait(device)
        start = time.perf_counter()
        _attend(name, *tensors).sum().backward()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 1000.0 * min(seconds)


def _wait(device: torch.device) -> None:
    """Waits until a GPU has finished the work that it was given; on other devices returns at once."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
