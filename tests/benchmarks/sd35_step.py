"""One real optimizer step of Stable Diffusion 3.5-medium's shapes with random weights, beside what the plan says.

    .venv/bin/python tests/benchmarks/sd35_step.py [--resolution 512] [--text-tokens 256] [--copied-blocks 12]
        [--optimizer adamw|sgd] [--precision bf16] [--device cpu|cuda] [--no-checkpointing]

Nothing is loaded: the transformer has the real configuration and random weights, made in the run's precision, and its
ControlNet is the product's own copy of it. Latents, the condition's latents and the text are given, so that neither VAE
nor text encoders are built; with gradient checkpointing, one rank and a micro-batch of 1.

A real run in bf16 keeps 18 bytes for each trained parameter (weights, fp32 gradients, masters and two moments), 22 GB
of this ControlNet alone. To fit a small machine, this step keeps all in the run's own precision instead: weights,
gradients and the moments of AdamW, 8 bytes a parameter in bf16; with `sgd` no moments, 4 bytes. The plan beside counts
the same, by the storages of this very step on fake tensors; it is no figure of `controlbooth plan`.

In the first step only what starts at zero gets a gradient other than zero, so that no other tensor moves. On a
processor without bf16 units PyTorch's products in bf16 would take hours: there their inputs are widened to fp32 one
product at a time, and the results rounded to bf16, which costs the memory of one layer's weights.
"""

import argparse
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
from diffusers import SD3Transformer2DModel
from random_weights import fill
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from controlbooth.models.architectures import SD35_MEDIUM
from controlbooth.models.attention import AttentionChoice, apply_attention
from controlbooth.models.denoisers.registry import control_residuals, denoise, parameter_report
from controlbooth.models.denoisers.transformer_copy import fixed_tensors
from controlbooth.models.pretrained import flow_process
from controlbooth.models.text import TextEncoding
from controlbooth.trainer.config.run import ModelConfig
from controlbooth.trainer.controlnet.build import new_controlnet
from controlbooth.trainer.engine.deepspeed import DTYPES, cpu_multiplies_bf16
from controlbooth.trainer.losses import weighted_mse
from controlbooth.trainer.planning.footprint import LiveStorages, tensors_of, without_memory

GIB = 2**30
CLIP_TOKENS = 77
MOMENTS = {"adamw": 2, "sgd": 0}
"""Optimizer -> how many tensors it keeps of each parameter, in the parameter's own dtype."""

PROCESS = flow_process(SD35_MEDIUM.noise_scheduler, "the published scheduler")


@dataclass(frozen=True)
class Networks:
    transformer: Any
    controlnet: Any


def networks(options: argparse.Namespace, initialise: Callable[[nn.Module], None], device: str) -> Networks:
    """Makes both networks in the precision that is asked for. initialise: gives the base's empty parameters values."""
    with torch.device("meta"):
        transformer: Any = SD3Transformer2DModel(**SD35_MEDIUM.denoiser)
    transformer = nn.Module.to(transformer.requires_grad_(False).eval(), DTYPES[options.precision])
    if device != "meta":
        transformer = transformer.to_empty(device=device)
        initialise(transformer)
    blocks = (options.copied_blocks,)
    controlnet = new_controlnet(transformer, ModelConfig(base="random", copied_blocks=blocks))
    return Networks(transformer, nn.Module.to(controlnet, DTYPES[options.precision]))


def prepare(nets: Networks, checkpointing: bool) -> None:
    """Sets the attention and the checkpointing of both, as a run does."""
    for module in (nets.transformer, nets.controlnet):
        apply_attention(module, AttentionChoice("flash", "asked for"))
        if checkpointing:
            module.enable_gradient_checkpointing()


def loss_of(nets: Networks, side: int, text_tokens: int, device: str) -> Tensor:
    """Runs the forward pass of one sample. side: of its latents."""
    config, dtype = nets.transformer.config, nets.transformer.dtype
    latents, noise, condition = (torch.randn(1, 16, side, side, device=device) for _ in range(3))
    states = torch.randn(1, CLIP_TOKENS + text_tokens, config["joint_attention_dim"], dtype=dtype, device=device)
    pooled = torch.randn(1, config["pooled_projection_dim"], dtype=dtype, device=device)
    text = TextEncoding(states, {"pooled_projections": pooled})
    noisy = PROCESS.noised(latents, noise, torch.tensor([600], device=device))
    residuals = control_residuals(nets.controlnet, noisy.latents, noisy.times, text, condition.to(dtype))
    prediction = denoise(nets.transformer, noisy.latents, noisy.times, text, residuals)
    return weighted_mse(prediction, noisy.target, torch.ones(1, device=device))


def planned(options: argparse.Namespace) -> dict[str, int]:
    """Returns bytes by category at the step's peak, and its operations under "flops"."""
    nets = networks(options, lambda module: None, "meta")
    with FakeTensorMode(allow_non_fake_inputs=True):
        fixed = sum(4 * tensor.numel() for tensor in fixed_tensors(nets.controlnet).values())
        for module in (nets.transformer, nets.controlnet):
            without_memory(module)
        prepare(nets, options.checkpointing)
        trained = list(nets.controlnet.parameters())
        live = LiveStorages()
        live.ignore([*tensors_of(nets.transformer), *tensors_of(nets.controlnet)])
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda p: live.is_gradient(p.grad))
        with live:
            loss_of(nets, options.resolution // 8, options.text_tokens, "cpu").backward()
    weights = sum(parameter.nbytes for parameter in trained)
    backward = max(sum(moment) for moment in live.moments)
    stepping = weights * (1 + MOMENTS[options.optimizer])  # gradients and moments
    stepping += 2 * max(parameter.nbytes for parameter in trained)  # what the optimizer makes of one tensor at a time
    return {
        "frozen weights": sum(t.nbytes for t in (*tensors_of(nets.transformer), *nets.controlnet.buffers())),
        "fp32 copies of the ControlNet's fixed tensors": fixed,
        "trained weights": weights,
        "activations and gradients, or gradients and moments": max(backward, stepping),
        "flops": live.flops,
    }


class ProductsInFp32(TorchDispatchMode):
    """Makes products of bf16 tensors in fp32, and rounds them, as units for bf16 do."""

    PRODUCTS = (
        torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.convolution,
        torch.ops.aten.convolution_backward, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
    )  # fmt: skip

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        halves = [one for one in arguments if isinstance(one, Tensor) and one.dtype == torch.bfloat16]
        if not halves or function.overloadpacket not in self.PRODUCTS:
            return function(*arguments, **options)
        wide = [one.float() if isinstance(one, Tensor) and one.dtype == torch.bfloat16 else one for one in arguments]
        made = function(*wide, **options)
        if function.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            return made[0].bfloat16(), made[1]  # the second are logarithms of sums, which stay in fp32
        return tree_map_only(Tensor, lambda one: one.bfloat16(), made)


class Peak:
    """The largest memory of this process since `begin`: resident on a CPU, allocated on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.before = 0 if self.cuda else psutil.Process().memory_info().rss

    def begin(self) -> None:
        """Forgets the peak so far, such as that of building the ControlNet in fp32."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")

    def bytes(self) -> int:
        """Returns it, beside what the process held before its first network."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        with open("/proc/self/status") as file:
            peak = next(line for line in file if line.startswith("VmHWM"))
        return 1024 * int(peak.split()[1]) - self.before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--text-tokens", type=int, default=256, help="of T5, beside CLIP's 77 (default: %(default)d)")
    parser.add_argument("--copied-blocks", type=int, default=12)
    parser.add_argument("--optimizer", choices=MOMENTS, default="adamw")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--plan-only", action="store_true", help="train nothing, and tell what would be needed")
    options = parser.parse_args()
    plan = planned(options)
    flops = plan.pop("flops")
    total = sum(plan.values())
    for name, size in plan.items():
        print(f"  {size / GIB:7.2f} GiB {name}")
    print(f"plan: {total / GIB:.2f} GiB of tensors at the peak, {flops / 1e12:.2f} TFLOP", flush=True)
    if options.plan_only:
        return
    if options.device == "cpu" and (free := psutil.virtual_memory().available) < 1.1 * total:
        raise SystemExit(f"{free / GIB:.1f} GiB of memory are free, and about {1.1 * total / GIB:.1f} are needed")
    peak = Peak(options.device)
    torch.manual_seed(0)
    nets = networks(options, fill, options.device)
    prepare(nets, options.checkpointing)
    report = parameter_report(nets.controlnet)
    print(f"ControlNet {report.total:,} = {report.copy:,} + {report.zero_convolutions:,} + {report.hint:,}", flush=True)
    trained = list(nets.controlnet.parameters())
    kinds = {
        "adamw": lambda: torch.optim.AdamW(trained, lr=1e-3, foreach=False),
        "sgd": lambda: torch.optim.SGD(trained, lr=1e-3, foreach=False),
    }
    optimizer = kinds[options.optimizer]()
    peak.begin()
    began = time.perf_counter()
    widened = options.device == "cpu" and options.precision == "bf16" and not cpu_multiplies_bf16()
    with ProductsInFp32() if widened else contextlib.nullcontext():
        loss = loss_of(nets, options.resolution // 8, options.text_tokens, options.device)
        shown = loss.item()
        forward = time.perf_counter()
        loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    backward = time.perf_counter()
    before = [parameter.detach().flatten()[:1].clone() for parameter in trained]
    optimizer.step()
    if options.device == "cuda":
        torch.cuda.synchronize()
    done = time.perf_counter()
    moved = sum(bool((p.detach().flatten()[:1] != old).any()) for p, old in zip(trained, before, strict=True))
    products = " (products in fp32)" if widened else ""
    print(
        f"one step, {options.resolution} px, {options.precision}{products}, {options.optimizer} with "
        f"{MOMENTS[options.optimizer]} moments in that precision: loss {shown:.4f}, {moved} of {len(trained)} tensors "
        f"moved; {done - began:.1f} s = forward {forward - began:.1f} + backward {backward - forward:.1f} + optimizer "
        f"{done - backward:.1f}"
    )
    host = plan["fp32 copies of the ControlNet's fixed tensors"] if options.device == "cuda" else 0
    measured, expected = peak.bytes(), total - host
    print(
        f"peak {measured / GIB:.2f} GiB on top of what the process held before, planned {expected / GIB:.2f} "
        f"({100 * (expected / measured - 1):+.1f} %)"
    )


if __name__ == "__main__":
    main()
