"""Counts what a training step asks of the device and of the network, by ZeRO stage and precision.

    .venv/bin/python tests/benchmarks/step_counts.py [--ranks 2]

A tiny base on ranks of this machine, three steps of the real training loop, of which rank 0 counts what PyTorch's
dispatcher sees: `waits` are values that the host reads from tensors, for each of which a GPU would have to be waited
for; `collectives` are calls of torch.distributed that all ranks make, `messages` those by which a rank sends to
another; `copies` are those of tensors; `operations` are all, views and
questions included. They depend on the number of layers and parameters: compare them with those of another version.
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny
from record import write

ENGINES = ["ZeRO-0-fp32", *(f"ZeRO-{stage}-{precision}" for stage in (1, 2, 3) for precision in ("fp32", "bf16"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tiny.write_base(folder / "base")
        tiny.write_shards(folder)
        found = tiny.torchrun(options.ranks, "counts", folder, *ENGINES)
    rows = []
    for name, counts in found.items():
        by_name = counts.pop("by name")
        rows.append({"engine": name, **counts, "which": ", ".join(f"{n} {c:.1f}" for n, c in by_name.items())})
    write("step_counts", rows)


if __name__ == "__main__":
    main()
