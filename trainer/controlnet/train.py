"""The training program: `torchrun ... -m controlbooth.trainer.controlnet.train run.yaml [section.key=value ...]`.

Every rank runs this file. It reads the run, builds what the run names, goes on from the latest whole checkpoint where
there is one, and loops: step, log, validate, save, stop. Started again after whatever happened, it continues the run.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are folders; nothing here may reach a hub
os.environ.setdefault("DS_LOG_LEVEL", "error")


from controlbooth.data.secrets import error_text
from controlbooth.trainer.config.loading import dump, load_config
from controlbooth.trainer.config.run import RunConfig, run_folder
from controlbooth.trainer.controlnet import unlock as unlocking
from controlbooth.trainer.controlnet.build import build, unlock_decoder
from controlbooth.trainer.controlnet.meter import Counted, Meter
from controlbooth.trainer.controlnet.network_check import network_problems
from controlbooth.trainer.controlnet.rates import learning_rates
from controlbooth.trainer.controlnet.session import (
    Run,
    TrainingStopped,
    commit,
    finish,
    note_stall,
    save,
    send_what_is_left,
)
from controlbooth.trainer.controlnet.starting import refusals
from controlbooth.trainer.controlnet.step import controlnet_step
from controlbooth.trainer.controlnet.validation import converged_long_ago, note_verdict, validate_and_log
from controlbooth.trainer.engine import deepspeed as engines
from controlbooth.trainer.engine.distributed import (
    DistError,
    World,
    end_process,
    from_first_rank,
    join,
    leave,
    on_first_rank,
)
from controlbooth.trainer.engine.offloading import keeping_activations
from controlbooth.trainer.run import checkpoint as checkpoints
from controlbooth.trainer.run.attempt import Superseded, only_run, write_text
from controlbooth.trainer.run.continuing import compared_with, describe_finished, is_finished
from controlbooth.trainer.run.failures import FAILED, RankFailed, end_superseded, failure_noted, note_refusal
from controlbooth.trainer.run.process import StopRequest, quiet_libraries, say
from controlbooth.trainer.run.starting import refuse
from controlbooth.trainer.run.status import write_own_status
from controlbooth.trainer.run.watchdog import watching


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m controlbooth.trainer.controlnet.train",
        description="One rank of a training. Start it with torchrun, deepspeed --module, or `controlbooth train`.",
    )
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # from deepspeed; the environment has it too
    options = parser.parse_intermixed_args(argv)
    stop = StopRequest()
    rank = int(os.environ.get("RANK", "0"))
    quiet_libraries()
    try:
        config = load_config(options.run, options.overrides)
        return train(config, join(config.engine.deterministic, config.engine.tf32), stop)
    except Superseded as error:
        end_superseded(error, rank)
    except (ValueError, OSError, TrainingStopped, RankFailed, DistError) as error:
        print(f"rank {rank}: {error_text(error)}", file=sys.stderr, flush=True)
        note_refusal(rank, error)
        os._exit(FAILED)  # the other ranks may be inside a collective; torchrun ends them when this one is gone
    finally:
        leave()


def train(config: RunConfig, world: World, stop: "StopRequest") -> int:
    """Runs to max_steps, to its early stop or to a stop request. Returns 0 in all cases; status.json says which."""
    folder = run_folder(config)
    # Before the run's folder is taken, and by one rank: of a thousand, each would read the headers of the base.
    refuse(from_first_rank([*network_problems(config), *refusals(config)] if world.rank == 0 else []))
    with (
        only_run(folder, world) as attempt,
        failure_noted(attempt, config, world),
        watching(attempt, world, config.engine.hang_timeout_seconds) as watchdog,
    ):
        latest = checkpoints.latest_checkpoint(folder, world, partial(say, world))
        if latest is not None:
            before = on_first_rank(lambda: compared_with(latest, config), world)
            if is_finished(before, config):
                if world.rank == 0:
                    send_what_is_left(attempt, config)
                say(world, describe_finished(before, config))
                return 0
        run = build(config, world, attempt, watchdog, latest)
        if world.rank == 0:
            write_text(attempt, folder / "config.yaml", dump(run.config))  # only now: it is the run's, and was accepted
            write_own_status(attempt, state="running", step=run.step)
        state = "failed"
        try:
            if run.held:
                note_verdict(run, validated=False)
            if run.held and not run.step and config.validation.at_start:
                validate_and_log(run)
            loop(run, stop)
            done = run.step >= config.max_steps or converged_long_ago(run)
            state = "finished" if done else "stopped"
        finally:
            finish(run, state)
    say(world, f"{state} at step {run.step} of {config.max_steps}: {folder}")
    return 0


def loop(run: Run, stop: StopRequest) -> None:
    """Takes steps until all are done, control came long enough ago, or a stop is asked for."""
    config, meter = run.config, Meter(run)
    backward = meter.pace.before(lambda loss: engines.accumulate(run.engine, loss))
    ended = run.step >= config.max_steps or converged_long_ago(run)
    while not ended:
        if unlocking.unlocks_now(config, run.step, run.engine):
            meter.settle()
            run.watchdog.begin("unlocking the decoder", run.step)
            if run.saving is not None:  # its thread writes through the engine that is about to go
                commit(run)
            unlock_decoder(run)
            meter.restart(with_a_first_step=True)
        meter.begin()
        batch = next(run.loader)

        # One optimizer step. Everything random about it was drawn from (seed, position).
        rates = learning_rates(config, run.step, run.engine)
        losses = controlnet_step(
            run.base,
            run.engine,
            backward,
            batch.micro_batches,
            config.optimizer.min_snr_gamma,
            run.world.device,
            keeping_activations(config.engine, run.base.denoiser, run.engine.module),
        )
        taken = engines.apply_gradients(run.engine, *rates.values(), tell=meter.row(batch, losses, stop.requested))
        if run.average is not None:
            run.average.update(run.step, taken.skipped)
        run.step += 1

        counted = meter.count(batch, losses, taken, rates)  # of the step before, so that this one is not waited for
        ended = close_step(run, meter, counted)
    meter.close()


def close_step(run: Run, meter: Meter, counted: Counted) -> bool:
    """Commits, validates and saves where it is time to, on every rank; -> whether that was the last step."""
    config = run.config
    if run.saving is not None and counted.written:
        counted = meter.settle()
        began = time.perf_counter()
        commit(run)
        note_stall(run, began)
        meter.restart()
    last = run.step == config.max_steps or converged_long_ago(run)
    validates = run.held is not None and (run.step % config.validation.every_steps == 0 or last)
    if not (counted.stop or last or validates or run.step % config.checkpoint.every_steps == 0):
        return False
    counted = meter.settle()
    figures = {"loss": counted.loss}
    if validates and not counted.stop:
        figures |= validate_and_log(run)
        last = last or converged_long_ago(run)
    if counted.stop or last or run.step % config.checkpoint.every_steps == 0:
        began = time.perf_counter()
        save(run, figures)
        if counted.stop or last:
            commit(run)
        note_stall(run, began)
    meter.restart()
    return counted.stop or last


if __name__ == "__main__":
    end_process(main())
