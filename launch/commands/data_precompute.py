"""`controlbooth data precompute`: starts the ranks that compute a run's latent cache on this machine."""

import sys
import time
from collections.abc import Sequence

from controlbooth.data.arguments import verb_parser
from controlbooth.data.errors import UserError
from controlbooth.launch.commands.train import failures, say_again
from controlbooth.launch.preflight.data import check_cache, check_data, check_shards
from controlbooth.launch.preflight.run import check_base
from controlbooth.launch.ranks.local import STOP_SIGNALS, run, start_of, this_node
from controlbooth.trainer.config.loading import load_config

WORKER = "controlbooth.trainer.controlnet.precompute"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = verb_parser(
        "data precompute",
        "Computes the VAE's mean and standard deviation of each picture and the embedding of each caption "
        "once, of each condition too where the run's ControlNet reads its latents, for the base, data, resolution and "
        "flips of a run, and writes them into its data.latent_cache, the latent and text-embedding cache. The run then "
        "takes the same steps without these encoders. Started again, it computes what is missing. With as many "
        "--processes as the training has, the latents are bitwise those "
        "of the training.",
        "examples:\n  controlbooth data precompute run.yaml data.latent_cache=shards/latents --dry-run\n"
        "  controlbooth data precompute run.yaml data.latent_cache=shards/latents --processes 8\n"
        "  controlbooth train run.yaml data.latent_cache=shards/latents --processes 8\n"
        f"  torchrun --nnodes=4 --nproc-per-node=8 ... -m {WORKER} run.yaml data.latent_cache=/shared/latents",
    )
    parser.add_argument("run", metavar="RUN.yaml", help="the run, or one of several that share data and base")
    parser.add_argument("overrides", metavar="section.key=value", nargs="*", help="a field of the run, set here")
    parser.add_argument("--processes", type=int, help="ranks (default: one per GPU, or 1 on a machine without)")
    parser.add_argument("--dry-run", action="store_true", help="tell how many bytes it will take; write nothing")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.run, options.overrides)
    if config.data.latent_cache is None:
        raise UserError(
            "data.latent_cache is not set: name the folder to write to, e.g. data.latent_cache=shards/latents"
        )
    node = this_node(1 if options.dry_run else options.processes)
    checks = (check_data, check_shards, check_cache, check_base)
    problems = [problem for check in checks for problem in check(config, node)]
    for problem in problems:
        print(f"controlbooth data precompute: {problem}", file=sys.stderr)
    if problems:
        return 2
    arguments = [*options.overrides, *(["--dry-run"] if options.dry_run else [])]
    began = time.time()
    start = start_of(node, options.run, arguments, config.name, WORKER)
    status = run(start, stopping="with the shards that are finished")
    if status not in (0, *(128 + number for number in STOP_SIGNALS)):
        say_again("controlbooth data precompute", start, failures(config.data.latent_cache, began))
    return status
