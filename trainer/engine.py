"""DeepSpeed: its configuration from ours, the engine, and what the loop asks of it.

Only the ControlNet is handed over. The frozen U-Net, VAE and text encoder stay outside, so that no optimizer state,
gradient or master copy is kept for them. The optimizer is PyTorch's AdamW, which needs no compiler on the machine.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from controlbooth.trainer.config import OptimizerConfig, RunConfig, gradient_accumulation_steps

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(requested: str, device: torch.device) -> str:
    """`auto` -> bf16 where the device multiplies in it, else fp32: a CPU without such units is ten times slower in it.

    Raises ValueError for fp16 on a CPU, on which DeepSpeed has no loss scaling.
    """
    if requested == "fp16" and device.type == "cpu":
        raise ValueError("engine.precision=fp16 needs a GPU. On a CPU use bf16, fp32, or auto")
    if requested != "auto":
        return requested
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if cpu_multiplies_bf16() else "fp32"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 dot products or matrix units (AVX512-BF16, AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # no public question exists


def deepspeed_config(config: RunConfig, precision: str, world_size: int, load_universal: bool) -> dict[str, Any]:
    """The JSON tree that deepspeed.initialize takes."""
    engine = config.engine
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage:
        # Small models: whole buckets, reduced at the end of the backward pass, in the order of the parameters.
        zero |= {"overlap_comm": False, "contiguous_gradients": True, "round_robin_gradients": False}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    tree: dict[str, Any] = {
        "train_batch_size": config.global_batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps(config, world_size),
        "gradient_clipping": config.optimizer.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW on offloaded states: no compiled op is needed
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "checkpoint": {"load_universal": load_universal},
    }
    if precision == "bf16":
        tree["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if precision == "fp16":
        tree["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return tree


def initialize(controlnet: nn.Module, config: RunConfig, precision: str, world_size: int, load_universal: bool) -> Any:
    """Wraps the ControlNet in a DeepSpeed engine. The process group must have been joined."""
    import deepspeed  # costs seconds, and `--help` should not pay them

    optimizer = torch.optim.AdamW(
        controlnet.parameters(),
        lr=config.optimizer.learning_rate,
        betas=config.optimizer.betas,
        eps=config.optimizer.epsilon,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    # Compiled at the first start, for a minute, where there is a compiler: gloo does the same everywhere.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    engine, *_ = deepspeed.initialize(
        model=controlnet,
        optimizer=optimizer,
        config=deepspeed_config(config, precision, world_size, load_universal),
        dist_init_required=False,
    )
    return engine


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Of optimizer step `step`, counted from 0. A function of the step alone, so there is nothing to resume."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = max(0.0, step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * warmup * shape


def accumulate(engine: Any, loss: Tensor) -> None:
    """Backward of one micro-batch's mean loss; DeepSpeed divides it by the number of micro-batches."""
    engine.backward(loss)
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # which only counts: the optimizer is moved by apply_gradients


def apply_gradients(engine: Any, rate: float) -> tuple[float, bool]:
    """One optimizer step with what backward has accumulated. Returns (gradient norm before clipping, skipped).

    A step whose gradients are not finite is skipped on all ranks alike: weights and optimizer stay as they were.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    plain = not hasattr(
        engine.optimizer, "overflow"
    )  # stage 0 in fp32: PyTorch's optimizer itself, which checks nothing
    if plain:
        norm = float(_gradient_norm(engine.module))
        if not math.isfinite(norm):
            engine.zero_grad()
            engine.set_gradient_accumulation_boundary(False)  # so that step only counts this micro-batch
            engine.step()
            engine.set_gradient_accumulation_boundary(None)
            return norm, True
    engine.step()
    if plain:
        return norm, False
    return float(engine.get_global_grad_norm()), bool(engine.optimizer.overflow)


def _gradient_norm(module: nn.Module) -> Tensor:
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(p.grad.float()) for p in module.parameters() if p.grad is not None])
    )


@contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """Inside, every rank sees whole parameters; outside ZeRO-3 they always are. Every rank enters together."""
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield


def full_state(engine: Any, average: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The trained weights in fp32 on the CPU of every rank: the optimizer's master copies, or the given average.

    Every rank calls this: under ZeRO the master copies are spread over ranks.
    """
    if average is not None:
        return {name: tensor.clone() for name, tensor in average.items()}
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in engine.module.named_parameters():
        whole = (
            safe_get_full_fp32_param(parameter)
            if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
            else None
        )
        state[name] = (parameter.detach() if whole is None else whole).float().cpu().clone()
    return state


def update_average(average: dict[str, Tensor], engine: Any, decay: float, step: int) -> None:
    """Exponential moving average in fp32, which warms up: decay is min(decay, (1 + step) / (10 + step))."""
    weight = 1.0 - min(decay, (1 + step) / (10 + step))
    with gathered(engine), torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            average[name].lerp_(parameter.detach().to(average[name]), weight)


@contextmanager
def averaged_weights(engine: Any, average: dict[str, Tensor] | None) -> Iterator[None]:
    """Inside, the network holds the averaged weights. Under ZeRO-3 rank 0's copy is scattered on leaving the block."""
    if average is None:
        yield
        return
    with _writable(engine), torch.no_grad():
        kept = {name: parameter.detach().clone() for name, parameter in engine.module.named_parameters()}
        for name, parameter in engine.module.named_parameters():
            parameter.copy_(average[name].to(parameter))
    try:
        yield
    finally:
        with _writable(engine), torch.no_grad():
            for name, parameter in engine.module.named_parameters():
                parameter.copy_(kept[name])


@contextmanager
def _writable(engine: Any) -> Iterator[None]:
    if engine.zero_optimization_stage() < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        yield
