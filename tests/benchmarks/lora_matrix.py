"""Prints what programs make of our LoRA files: for each family and form, in how many layers they add what ours adds.

    .venv/bin/python tests/benchmarks/lora_matrix.py [FAMILY ...]

diffusers reads with its own code. kohya's scripts and ComfyUI are read after their published names, see
tests/support/lora_readers.py. "equal": in every layer, within 1e-5 of the layer's largest value. "-": nothing to read.
The last column is the same LoRA written with its layers shuffled, read by the form's own program: what a wrong table of
names would give. It takes about a minute for each family, of FLUX.1 some more.
"""

import copy
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from bases import write_base  # noqa: E402
from lora_cells import FAMILIES, FORMS, LOADERS, cell, rows, shuffled  # noqa: E402

from controlbooth.models.pretrained import load_base  # noqa: E402


def main(families: list[str]) -> None:
    print(f"{'family':10} {'layers':10} {'form':10} " + " ".join(f"{one:18}" for one in (*LOADERS, "shuffled")))
    with tempfile.TemporaryDirectory() as folder:
        for family in families or FAMILIES:
            base = load_base(write_base(Path(folder) / family, family))
            for _, target in rows([family]):
                for form in FORMS:
                    cells = [cell(copy.deepcopy(base), target, form, loader, Path(folder)) for loader in LOADERS]
                    own = "diffusers" if family == "miniature" else form
                    cells.append(cell(copy.deepcopy(base), target, form, own, Path(folder), shuffled))
                    print(f"{family:10} {target:10} {form:10} " + " ".join(f"{one:18}" for one in cells), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
