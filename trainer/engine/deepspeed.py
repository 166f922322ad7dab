"""DeepSpeed: its configuration from ours, the engine, and what the loop asks of it.

Only what is trained is handed over. Frozen networks stay outside, so that no optimizer state, gradient or master copy
is kept for them. The optimizer is PyTorch's AdamW, which needs no compiler on the machine, or one of optimizers.py.
"""

import gc
import inspect
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from controlbooth.data.errors import UserError
from controlbooth.trainer.config.run import EngineConfig, OptimizerConfig, RunConfig, gradient_accumulation_steps
from controlbooth.trainer.engine.distributed import gather_rows
from controlbooth.trainer.engine.flat_gradients import FlatGradients, Taken, clipping, scaled_by
from controlbooth.trainer.engine.whole_tensors import WholeTensors

FLAT_ELEMENTS = 500_000_000
"""Parameters up to which several ranks at stage 2 keep all gradients until the step: as many as DeepSpeed would in its
bucket (reduce_bucket_size). Of more, it reduces them while the backward pass goes on and keeps a rank's share alone."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(requested: str, device: torch.device, zero_stage: int) -> str:
    """Returns the precision to use: for `auto`, bf16 where the device multiplies in it, else fp16 on a GPU and fp32 on
    a CPU.

    Raises ValueError for fp16 on a CPU, on which DeepSpeed has no loss scaling, and for fp16 at stage 0, at which
    DeepSpeed 0.19 divides gradients by a scale that it has not multiplied the loss with.
    """
    precision = requested
    if requested == "auto" and device.type == "cuda":
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif requested == "auto":
        precision = "bf16" if cpu_multiplies_bf16() else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("engine.precision=fp16 needs a GPU. On a CPU use bf16, fp32, or auto")
    if precision == "fp16" and zero_stage == 0:
        raise UserError("engine.precision=fp16 needs engine.zero_stage 1, 2 or 3: DeepSpeed scales no loss at stage 0")
    return precision


def cpu_multiplies_bf16() -> bool:
    """Tells whether this CPU has bf16 dot products or matrix units (AVX512-BF16, AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # no public question exists


@dataclass(frozen=True)
class BatchSizes:
    """Of one optimizer step: over all ranks, of one forward pass, and how many of these a rank makes."""

    global_batch_size: int
    micro_batch_size: int
    accumulation_steps: int

    @property
    def ranks(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.accumulation_steps)


def batch_sizes(config: RunConfig, world_size: int) -> BatchSizes:
    return BatchSizes(
        config.global_batch_size, config.micro_batch_size, gradient_accumulation_steps(config, world_size)
    )


def sums_gradients(zero_stage: int, global_batch_size: int, micro_batch_size: int) -> bool:
    """Tells whether DeepSpeed adds up gradients of several micro-batches or ranks, in fp32 whatever the precision.

    Where one rank takes the whole batch at once, stages 1 and 2 have nothing to add, and keep gradients as they come.
    """
    return zero_stage not in (1, 2) or global_batch_size > micro_batch_size


def keeps_gradients_flat(engine: EngineConfig, ranks: int, parameters: int) -> bool:
    """Tells whether FlatGradients takes the place of DeepSpeed's reduction and step. parameters: that are trained."""
    fits = engine.zero_stage == 1 or ranks == 1 or parameters <= FLAT_ELEMENTS
    return engine.zero_stage in (1, 2) and fits and not engine.offload_optimizer


def deepspeed_config(
    engine: EngineConfig, sizes: BatchSizes, max_grad_norm: float, precision: str, load_universal: bool, flat: bool
) -> dict[str, Any]:
    """Builds the configuration for deepspeed.initialize, a JSON tree. flat: of `keeps_gradients_flat`."""
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage:
        # Small models: whole buckets, reduced at the end of the backward pass, in the order of the parameters.
        zero |= {"overlap_comm": False, "contiguous_gradients": True, "round_robin_gradients": False}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    tree: dict[str, Any] = {
        "train_batch_size": sizes.global_batch_size,
        "train_micro_batch_size_per_gpu": sizes.micro_batch_size,
        "gradient_accumulation_steps": sizes.accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW on offloaded states: no compiled op is needed
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "checkpoint": {"load_universal": load_universal},
    }
    if precision == "bf16":
        tree["bf16"] = {"enabled": True, "check_grad_overflow": True}
        sums = sums_gradients(engine.zero_stage, sizes.global_batch_size, sizes.micro_batch_size)
        if engine.zero_stage and sums and not flat:
            # else every micro-batch and every rank that is added rounds to 8 bits
            tree["data_types"] = {"grad_accum_dtype": "fp32"}
            tree["communication_data_type"] = "fp32"
    if precision == "fp16":
        tree["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return tree


def initialize(
    network: nn.Module,
    engine_config: EngineConfig,
    optimizer_config: OptimizerConfig,
    sizes: BatchSizes,
    precision: str,
    load_universal: bool,
    groups: Sequence[list[nn.Parameter]] = (),
) -> Any:
    """Wraps what is trained, in fp32, in a DeepSpeed engine. The process group must have been joined.

    groups: parameters that each have a learning rate of their own; default all in one.
    """
    with _without_mlflow():
        import deepspeed  # costs seconds, and `--help` should not pay them

    parameters = sum(parameter.numel() for parameter in network.parameters())
    flat = keeps_gradients_flat(engine_config, sizes.ranks, parameters)
    check_fits(optimizer_config, sizes.ranks, flat)
    whole = optimizer_config.name != "adamw"
    optimizer = _optimizer_for_deepspeed(optimizer_config, [{"params": one} for one in groups] or network.parameters())
    # Compiled at the first start, for a minute, where there is a compiler: gloo does the same everywhere.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    engine: Any
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=optimizer,
        config=deepspeed_config(engine_config, sizes, optimizer_config.max_grad_norm, precision, load_universal, flat),
        dist_init_required=False,
    )
    if engine.zero_optimization_stage() == 0 and precision != "fp32":
        engine.optimizer.optimizer.state.clear()  # DeepSpeed has made a step with zeros, to allocate
    engine.whole_tensors = WholeTensors(engine.optimizer, network, optimizer_config) if whole else None
    move = engine.whole_tensors and engine.whole_tensors.move
    engine.flat_gradients = FlatGradients(engine.optimizer, move) if flat else None
    if not flat and hasattr(engine.optimizer, "has_overflow_partitioned_grads_serial"):
        # DeepSpeed's own asks each gradient by itself, with five kernels: 40 ms of a 275 ms step of SD1.5 on an H200
        engine.optimizer.has_overflow_partitioned_grads_serial = partial(_any_not_finite, engine.optimizer)
    if not flat and precision == "bf16" and hasattr(engine.optimizer, "has_overflow"):
        # Asked before the norm is taken, with a collective and a wait of its own. A gradient that is not finite has a
        # norm that is not finite either, and there DeepSpeed looks again and skips the step.
        if not engine_config.offload_optimizer:
            engine.optimizer.has_overflow = lambda partition_gradients=True: False
    return engine


def check_fits(config: OptimizerConfig, ranks: int, flat: bool) -> None:
    """Raises UserError where an optimizer cannot move what a rank holds. flat: of `keeps_gradients_flat`."""
    if config.name == "prodigy" and ranks > 1:
        raise UserError(
            f"optimizer.name=prodigy makes its step size of sums over all weights, which its library takes on one "
            f"rank, and there are {ranks}: start one, or take another optimizer.name"
        )
    if config.name != "adamw" and not flat:
        raise UserError(
            f"optimizer.name={config.name} moves whole tensors, and of more than {FLAT_ELEMENTS:,} parameters "
            "engine.zero_stage=2 has whole gradients on one rank alone: set engine.zero_stage=1"
        )


def _optimizer_for_deepspeed(config: OptimizerConfig, parameters: Any) -> torch.optim.Optimizer:
    """Makes the optimizer that DeepSpeed is handed: for one that moves whole tensors, one in its place that never takes
    a step and keeps no state, and has the groups with their learning rates."""
    if config.name != "adamw":
        return torch.optim.SGD(parameters, lr=config.learning_rate)
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


@contextmanager
def _without_mlflow() -> Iterator[None]:
    """Keeps DeepSpeed's autotuner from importing MLflow, which costs 0.9 s and 0.1 GiB on every rank, while only rank 0
    tracks."""
    absent = "deepspeed" not in sys.modules and "mlflow" not in sys.modules
    if absent:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if absent:
            del sys.modules["mlflow"]


def _any_not_finite(optimizer: Any) -> Tensor:
    """Tells, as a (1,) bool, whether a gradient that this rank holds has no finite norm. optimizer: of stage 1 or 2.

    Without one it could not be clipped either, and stage 0 asks the same. The Euclidean norm has a fast kernel
    everywhere; on a CPU the largest magnitude takes sixty times as long.
    """
    gradients = [one for own in optimizer.averaged_gradients.values() if own for one in own if one.numel()]
    return ~torch.stack(torch._foreach_norm(gradients)).isfinite().all().reshape(1)


def apply_settings(engine: Any, config: OptimizerConfig) -> None:
    """Sets the run's optimizer settings in place of those that a checkpoint holds. To be called after it was loaded."""
    for group in engine.optimizer.param_groups if engine.whole_tensors is None else ():
        group |= dict(betas=config.betas, eps=config.epsilon, weight_decay=config.weight_decay)
        group |= dict(fused=True, foreach=None)  # checkpoints of older versions say nothing of it, or otherwise
    if hasattr(engine.optimizer, "clip_grad"):
        engine.optimizer.clip_grad = config.max_grad_norm
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    # The universal format's counts are on the CPU. The fused kernel wants each where what it moves is: on the GPU, or
    # on the CPU under offload.
    for parameter, state in inner.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].to(parameter.device, copy=True)


def learning_rate(config: OptimizerConfig, step: int, max_steps: int) -> float:
    """Returns the learning rate of optimizer step `step`, counted from 0. It depends on no earlier step, so there is
    nothing to resume."""
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    progress = max(0.0, step - config.warmup_steps) / max(1, max_steps - config.warmup_steps)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.learning_rate * warmup * shape


def accumulate(engine: Any, loss: Tensor) -> None:
    """Runs the backward pass of one micro-batch's mean loss; DeepSpeed divides it by the number of micro-batches."""
    engine.backward(loss)
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # which only counts: the optimizer is moved by apply_gradients


def apply_gradients(engine: Any, *rates: float, tell: Tensor | None = None) -> Taken:
    """Takes one optimizer step with the accumulated gradients, and returns what is known of it without waiting for it.

    rates: one for each group of parameters. tell: what this rank tells the others of the step, (values,) float64 on the
    engine's device. A step whose gradients are not finite is skipped on all ranks alike: weights and optimizer stay as
    they were.
    """
    for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    row = torch.zeros(0, dtype=torch.float64, device=engine.device) if tell is None else tell
    if engine.flat_gradients is not None:
        engine.flat_gradients.row = row
        engine.step()
        return engine.flat_gradients.taken
    if not hasattr(engine.optimizer, "overflow"):  # stage 0 in fp32: PyTorch's optimizer itself, which checks nothing
        return _step_plainly(engine, row)
    engine.step()
    norm = row.new_tensor(float(engine.get_global_grad_norm()))
    skipped = torch.tensor(bool(engine.optimizer.overflow), device=engine.device)
    return Taken(norm, skipped, gather_rows(row))


def _step_plainly(engine: Any, row: Tensor) -> Taken:
    """Takes the step of an engine whose optimizer is PyTorch's own; DeepSpeed's clipping asks each gradient for its
    norm by itself, a wait each, and the other ranks for what they know."""
    norm = _gradient_norm(engine.module).double()
    scale, not_finite = clipping(norm, engine.gradient_clipping())
    engine.clip_fp32_gradients = lambda: None
    with scaled_by(engine.optimizer, scale, not_finite):
        engine.step()
    return Taken(norm, not_finite.bool(), gather_rows(row))


def _gradient_norm(module: nn.Module) -> Tensor:
    return torch.linalg.vector_norm(
        torch.stack([torch.linalg.vector_norm(p.grad.float()) for p in module.parameters() if p.grad is not None])
    )


def masters(engine: Any) -> list[Tensor]:
    """Returns the fp32 tensors that the optimizer updates, as this rank holds them: its share, flat, under ZeRO."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return list(optimizer.fp32_partitioned_groups_flat)
    if engine.zero_optimization_stage() == 0:
        if hasattr(optimizer, "fp32_groups"):
            return [tensor for group in optimizer.fp32_groups for tensor in group]
        return list(engine.module.parameters())
    return list(optimizer.single_partition_of_fp32_groups)


def optimizer_state(engine: Any) -> list[dict[str, Any]]:
    """Returns the optimizer's state of each of `masters`, as this rank holds it: the dicts themselves, which may be
    changed."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [inner.state[master] for master in masters(engine)]


def release(engine: Any) -> None:
    """Ends an engine and empties it, so that whoever still refers to it holds little; `reclaim` once it is dropped."""
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    held, states = masters(engine), optimizer_state(engine)
    held += [parameter.ds_tensor for parameter in engine.module.parameters() if hasattr(parameter, "ds_tensor")]
    if engine.flat_gradients is not None:
        held += engine.flat_gradients.release()
    if engine.whole_tensors is not None:
        held += engine.whole_tensors.release()
    engine.destroy()
    for state in states:
        state.clear()
    for tensor in held:
        tensor.grad, tensor.data = None, tensor.new_empty(0)
    vars(engine.optimizer).clear()
    # At stage 3 DeepSpeed puts a network here when its engine is made and never takes it out, so that it would live,
    # with its hooks and through them the engine, for as long as the process does.
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    # Nor does it take them out of the cache of a method, which is the class's and has the coordinator of a network in
    # its keys once that was run twice, as a validation does before the first step.
    release_method = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inspect.getclosurevars(release_method).nonlocals["func"].cache_clear()


def reclaim(device: torch.device) -> None:
    """Gives back the memory of engines that were released and that nobody holds any more."""
    gc.collect()  # they refer to themselves
    if device.type == "cuda":
        torch.cuda.empty_cache()


def full_state(engine: Any) -> dict[str, Tensor]:
    """Gathers the masters by parameter name, whole, in fp32, on the CPU of every rank. Every rank calls this."""
    from deepspeed.utils import safe_get_full_fp32_param

    own = engine.zero_optimization_stage() == 0  # masters themselves, which go on changing; else DeepSpeed's copies
    if own:
        wholes: dict[str, Any] = dict(zip(_names_of_masters(engine), masters(engine), strict=True))
    else:
        wholes = {name: safe_get_full_fp32_param(p) for name, p in engine.module.named_parameters()}
    return {
        name: wholes[name].detach().reshape(getattr(p, "ds_shape", p.shape)).to("cpu", torch.float32, copy=own)
        for name, p in engine.module.named_parameters()
    }


def _names_of_masters(engine: Any) -> list[str]:
    """Returns the names of the parameters in the order of `masters`, at stage 0, where each parameter has a whole
    master."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if hasattr(engine.optimizer, "fp16_groups"):  # bf16's too
        return [names[id(parameter)] for group in engine.optimizer.fp16_groups for parameter in group]
    return list(names.values())
