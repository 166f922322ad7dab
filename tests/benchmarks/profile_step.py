"""Where a training step's time goes: a table by part of the step.

    .venv/bin/python tests/benchmarks/profile_step.py RUN.yaml [section.key=value ...] [--steps 10]

One process on the run's own data and base. `predict` is the forward pass of ControlNet and U-Net, `backward` both ways'
backward pass with the reduction of gradients; what is left is Python, logging and the loop.
"""

import argparse
import os
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from functools import partial
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from controlbooth.trainer import engine as engines
from controlbooth.trainer import train as training
from controlbooth.trainer.attempt import only_run
from controlbooth.trainer.config import load_config
from controlbooth.trainer.distributed import join, leave
from controlbooth.trainer.step import controlnet_step
from controlbooth.trainer.watchdog import watching

PARTS = ("wait for data", "encode picture", "encode prompt", "predict", "backward", "optimizer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_intermixed_args()
    world = join()
    with (
        tempfile.TemporaryDirectory() as scratch,
        only_run(Path(scratch), world) as attempt,
        watching(attempt, world, 3600.0) as watchdog,
    ):
        overrides = [*options.overrides, f"output={scratch}", "data.held_out=null"]
        config = load_config(options.run, overrides)
        run = training.build(config, world, attempt, watchdog, None)
        backward = partial(engines.accumulate, run.engine)

        def step() -> None:
            with record_function("wait for data"):
                batch = next(run.loader)
            controlnet_step(run.base, run.engine, backward, batch.micro_batches, config.seed, None, run.world.device)
            with record_function("optimizer"):
                engines.apply_gradients(run.engine, config.optimizer.learning_rate)

        for _ in range(3):
            step()
        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(options.steps):
                step()
        whole = (time.perf_counter() - started) / options.steps
        seconds = {row.key: row.cpu_time_total / 1e6 / options.steps for row in profiler.key_averages()}
        size = config.global_batch_size
        print(f"{config.name}: {whole:.3f} s a step of {size} samples, {size / whole:.1f} samples/s")
        for part in PARTS:
            print(f"  {part:<18}{seconds.get(part, 0.0):8.3f} s {100 * seconds.get(part, 0.0) / whole:6.1f} %")
        rest = whole - sum(seconds.get(part, 0.0) for part in PARTS)
        print(f"  {'everything else':<18}{rest:8.3f} s {100 * rest / whole:6.1f} %")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=40))
        run.loader.close()
        if run.tracker is not None:
            run.tracker.close(5.0)
    leave()


if __name__ == "__main__":
    main()
