"""How long a micro-batch takes a device and its host: what was counted, at a speed that is fitted to measured steps.

The device takes the time of its products at PRODUCTS of the peak and of its other operations at BANDWIDTH of its
memory's, and is `Speed.device` times as slow as that. The host takes `Speed.launch_seconds` for each operation, and
under ZeRO-3 gathers weights. Both add up: the trainer asks for the loss, the norm and the overflow in every step and
waits for the device each time, and a CPU is host and device in one. Of three micro-batches on one H200 this predicts
each from the other two within 16 % (tests/benchmarks/plan_measured.py). If instead the host ran ahead and only the
slower of both counted, micro-batches 1 and 8, which take nearly the same time, would say nothing of 32.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from controlbooth.trainer.planning.accelerators import Accelerator
from controlbooth.trainer.planning.footprint import Footprint

PRODUCTS, BANDWIDTH = 0.6, 0.8
"""Close to what mosaicml/diffusion publishes for Stable Diffusion 2 on A100, which tests/benchmarks/plan_table.py
compares. No device is taken to be faster than that."""
GATHER_SECONDS = {"cuda": 1e-3, "cpu": 2e-3}
"""Of the hooks with which ZeRO-3 gathers and lets go of a module's weights, in both passes of a micro-batch: Python,
beside which a CPU computes nothing. 1.8 to 2.5 ms with 191 and 77 modules on two ranks of tests/benchmarks/
plan_check.py, with gloo's collectives; half of it is assumed of a GPU's host."""


@dataclass(frozen=True)
class Speed:
    """How fast a device and its host are."""

    device: float
    """Its seconds over computed ones."""
    launch_seconds: float
    """Of the host, for each operation that runs a kernel: Python, autograd and the launch."""


UNMEASURED = {"cuda": Speed(1.0, 6e-6), "cpu": Speed(1.0, 7e-5)}
"""By kind of device, where nothing was measured. Of a GPU: a program without any waste, with which others' published
figures are compared. Of a CPU: forward and backward of Stable Diffusion 1.5's structure with widths that compute next
to nothing took 25 us an operation, and 67 to 78 under DeepSpeed's engine in bf16."""


def host_seconds(one: Footprint, card: Accelerator, speed: Speed, stage: int = 0) -> float:
    """Computes the host's seconds for forward and backward of a micro-batch. stage: of ZeRO."""
    gathering = one.trained_modules * GATHER_SECONDS[card.kind] if stage == 3 else 0.0
    return one.operations * speed.launch_seconds + gathering


def device_seconds(one: Footprint, card: Accelerator, precision: str, speed: Speed) -> float:
    return speed.device * _computed_seconds(one, card, precision)


def micro_batch_seconds(one: Footprint, card: Accelerator, precision: str, speed: Speed, stage: int = 0) -> float:
    return host_seconds(one, card, speed, stage) + device_seconds(one, card, precision, speed)


def _computed_seconds(one: Footprint, card: Accelerator, precision: str) -> float:
    peak = card.single_flops if precision == "fp32" else card.half_flops
    return one.flops / (PRODUCTS * peak) + one.traffic_bytes / (BANDWIDTH * card.memory_bandwidth)


def fitted_speed(
    steps: Sequence[tuple[Footprint, float]], card: Accelerator, precision: str, unmeasured: Speed
) -> Speed:
    """Fits the speed at which micro-batches take the seconds that were measured, by least squares of relative errors.

    Micro-batches of one size do not tell host from device: both are then as many times slower as those of `unmeasured`.
    Of several sizes, the device is never taken to be faster than computed, nor the host to take less than 0 seconds.
    """
    if len({one.micro_batch_size for one, _ in steps}) == 1:
        times = sum(seconds / micro_batch_seconds(one, card, precision, unmeasured) for one, seconds in steps)
        times /= len(steps)
        return Speed(times * unmeasured.device, times * unmeasured.launch_seconds)
    launches = [one.operations / seconds for one, seconds in steps]
    work = [_computed_seconds(one, card, precision) / seconds for one, seconds in steps]
    both = _dot(launches, work)
    determinant = _dot(launches, launches) * _dot(work, work) - both**2
    device = (_dot(launches, launches) * sum(work) - both * sum(launches)) / determinant
    device = max(1.0, device)
    launch = (sum(launches) - device * both) / _dot(launches, launches)
    if launch < 0:
        return Speed(max(1.0, sum(work) / _dot(work, work)), 0.0)
    return Speed(device, launch)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(left, right, strict=True))
