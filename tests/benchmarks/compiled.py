"""Whether torch.compile computes the gradients of plain PyTorch here, what it costs and what it gains.

    .venv/bin/python tests/benchmarks/compiled.py [--base FOLDER] [--resolution 64] [--micro-batch 2]

The proof that a run with engine.compile=true takes at its start, on the built-in base or another: the worst distance of
a parameter's gradients, then the median seconds of a forward and backward pass with and without, in turns.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from record import write

from controlbooth.models.denoisers.registry import denoiser_of
from controlbooth.models.pretrained import MINIATURE, load_base
from controlbooth.trainer.config.loading import build_config
from controlbooth.trainer.controlnet.build import make_controlnet
from controlbooth.trainer.controlnet.trial import trial_loss
from controlbooth.trainer.engine.compiling import compile_blocks, prove, repeated_blocks, run_plainly


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=MINIATURE)
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    base = load_base(options.base)
    config = build_config(
        dict(
            name="compiled", max_steps=1, global_batch_size=options.micro_batch, micro_batch_size=options.micro_batch,
            model=dict(base=str(options.base)),
            data=dict(shards="none", condition="canny", resolution=options.resolution),
        )
    )  # fmt: skip
    torch.manual_seed(0)
    controlnet = make_controlnet(config, base)
    loss_of, zero_parts = partial(trial_loss, config, base), denoiser_of(controlnet).file.ZERO
    rows = []
    for frozen, what in (([base.denoiser], "ControlNet and base"), ([], "ControlNet alone")):
        began = time.perf_counter()
        proof = prove(loss_of, controlnet, frozen, torch.float32, zero_parts, options.backend)
        seconds = time.perf_counter() - began
        networks = [controlnet, *frozen]
        took: dict[bool, list[float]] = {True: [], False: []}
        for number in range(options.rounds + 1):
            for compiled in (True, False):
                for network in networks:
                    compile_blocks(network, options.backend) if compiled else run_plainly(network)
                started = time.perf_counter()
                loss_of(controlnet).backward()
                if number:
                    took[compiled].append(time.perf_counter() - started)
        rows.append(
            {
                "compiled": what,
                "blocks": sum(len(repeated_blocks(network)) for network in networks),
                "gradients": proof.compared,
                "worst distance": proof.worst,
                "wrong": len(proof.wrong),
                "proof s": seconds,
                "step s": statistics.median(took[True]),
                "plain step s": statistics.median(took[False]),
            }
        )
        for network in networks:
            run_plainly(network)
    write("compiled", rows)


if __name__ == "__main__":
    main()
