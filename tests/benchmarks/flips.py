"""Changes single bits of a checkpoint, and says what reading it makes of each: other weights never.

    .venv/bin/python tests/benchmarks/flips.py                 all bits of the small files, 2,000 of the large ones
    .venv/bin/python tests/benchmarks/flips.py --every 50 --random 200

A tiny base is trained for two steps on two ranks and for one more on one, so that the newest checkpoint but one has its
states split for another number of ranks too (universal/). Each bit is changed in place, the checkpoint is looked for as
a start looks for it, and the bit is put back:

    passed over    an older checkpoint is gone on from, and a line names this one and the file
    refused        in one sentence that names the checkpoint
    made again     of universal/: its files are not taken, but written anew from the checkpoint's own
    harmless       it is taken, and what is loaded is equal in every bit
    other weights  it is taken, and something else is loaded
    traceback      anything else

Besides, every file is cut, emptied, zeroed, exchanged for its neighbour, taken away, and one more is put beside it.
Exits with 1 where weights differ or something is not told. About ten minutes on 2 cores.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from controlbooth.data.files.records import read_json, read_yaml
from controlbooth.trainer.engine.distributed import World
from controlbooth.trainer.run.checkpoint import latest_checkpoint
from controlbooth.trainer.run.integrity import COMPLETE, files_damage
from controlbooth.trainer.run.torch_files import tensors_only

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import tiny

SMALL = 16_384
"""Bytes up to which all bits of a file of text are changed."""
UNIVERSAL = "universal"
ALONE = World(0, 1, 0, torch.device("cpu"))
OUTCOMES = ("passed over", "refused", "made again", "harmless", "other weights", "traceback")


def train(folder: Path) -> Path:
    """-> the checkpoint of step 2, written by two ranks and gone on from by one; that of step 1 is beside it."""
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    tree = tiny.run_tree(folder, "flips") | dict(max_steps=2)
    tree["data"] |= dict(held_out=None)
    tree |= dict(checkpoint=dict(every_steps=1, keep=9), validation={}, optimizer=dict(ema_decay=0.9))
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    program = str(Path(sys.executable).with_name("controlbooth"))
    for more in (["--processes", "2"], ["--processes", "1", "max_steps=3"]):
        subprocess.run([program, "train", str(folder / "run.yaml"), *more], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(folder / "runs" / "flips" / "checkpoints" / "step-00000003")
    return folder / "runs" / "flips" / "checkpoints" / "step-00000002"


def loaded(path: Path) -> Any:
    """What a file of a checkpoint comes to when it is read; nothing of the marker, which only vouches for others."""
    if path.name == COMPLETE:
        return None
    if path.suffix == ".pt":
        with tensors_only(path):
            return bits(torch.load(path, map_location="cpu"))
    if path.suffix == ".safetensors":
        return bits(load_file(path))
    return read_yaml(path, "") if path.suffix == ".yaml" else read_json(path, "") if path.suffix == ".json" else ""


def bits(tree: Any) -> Any:
    """A tree with the bytes of its tensors, which can be compared."""
    if isinstance(tree, Tensor):
        return str(tree.dtype), tuple(tree.shape), tree.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(tree, dict):
        return {key: bits(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [bits(value) for value in tree]
    return repr(vars(tree)) if hasattr(tree, "__dict__") else tree


def outcome(checkpoint: Path, path: Path, before: Any) -> str:
    """One of OUTCOMES, of a checkpoint in which this file has been changed. before: what it came to."""
    told: list[str] = []
    try:
        found = latest_checkpoint(checkpoint.parents[1], ALONE, told.append)
    except (ValueError, OSError) as error:
        said = str(error)
        return "refused" if str(checkpoint) in said and len(said.splitlines()) == 1 else "traceback"
    except Exception:
        return "traceback"
    if found != checkpoint:
        named = any(str(checkpoint) in line and len(line.splitlines()) == 1 for line in told)
        return "passed over" if named else "traceback"
    if UNIVERSAL in path.parts and files_damage(checkpoint / UNIVERSAL, 0, 1):
        return "made again"
    try:
        return "harmless" if not path.is_file() or loaded(path) == before else "other weights"
    except Exception:
        return "traceback"


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def is_small(path: Path) -> bool:
    return path.suffix not in (".pt", ".safetensors") and path.stat().st_size <= SMALL


def kind(path: Path) -> str:
    """Of a large file: each is drawn from as often as the others, so that the many of universal/ leave room."""
    return f"{'universal/' if UNIVERSAL in path.parts else ''}{path.suffix or path.name}"


def places(files: list[Path], every: int, count: int, seed: int) -> Iterator[tuple[Path, int]]:
    """(file, bit): each `every`th of the small files, and so many random ones of all large files."""
    draws = random.Random(seed)
    for path in files:
        if is_small(path):
            yield from ((path, bit) for bit in range(0, 8 * path.stat().st_size, every))
    large = [path for path in files if not is_small(path)]
    kinds = sorted(set(map(kind, large)))
    for number in range(count):
        alike = [path for path in large if kind(path) == kinds[number % len(kinds)]]
        path = draws.choices(alike, [one.stat().st_size for one in alike])[0]
        yield path, draws.randrange(8 * path.stat().st_size)


def changes(path: Path, other: Path) -> dict[str, Callable[[], object]]:
    """What can become of a file besides. other: one of the same kind."""
    data = path.read_bytes()
    return {
        "cut": lambda: path.write_bytes(data[: len(data) // 2]),
        "cut by a byte": lambda: path.write_bytes(data[:-1]),
        "a byte longer": lambda: path.write_bytes(data + b"\0"),
        "emptied": lambda: path.write_bytes(b""),
        "zeroed": lambda: path.write_bytes(bytes(len(data))),
        "exchanged": lambda: path.write_bytes(other.read_bytes()),
        "taken away": path.unlink,
        "a folder": lambda: (path.unlink(), path.mkdir()),
        "one more": lambda: path.with_name(f"more-{path.name}").write_bytes(data),
    }


def report(title: str, found: Counter[str], seconds: float) -> None:
    cells = ", ".join(f"{name} {found[name]}" for name in OUTCOMES)
    print(f"{title}: {found.total()} in {seconds / 60:.1f} min: {cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the small files' bits, each Nth")
    parser.add_argument("--random", type=int, default=2000, metavar="COUNT", help="bits of the large files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = train(Path(folder))
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        small = [path for path in files if is_small(path)]
        print(f"{len(files)} files, {len(small)} of them small: {sum(path.stat().st_size for path in small):,} bytes")
        before = {path: loaded(path) for path in files}
        found: dict[str, Counter[str]] = {}
        seconds: Counter[str] = Counter()
        for path, bit in tqdm(list(places(files, options.every, options.random, options.seed)), unit="bit"):
            group = "small files" if path in small else f"large files, {kind(path)}"
            began = time.perf_counter()
            flip(path, bit)
            result = outcome(checkpoint, path, before[path])
            flip(path, bit)
            seconds[group] += time.perf_counter() - began
            found.setdefault(group, Counter())[result] += 1
            if result in ("other weights", "traceback"):
                wrong += 1
                tqdm.write(f"{result}: {path.relative_to(checkpoint)}, bit {bit}")
        for group, counts in found.items():
            report(f"bits of {group}", counts, seconds[group])
        other: Counter[str] = Counter()
        began = time.perf_counter()
        some = random.Random(options.seed).sample([one for one in files if UNIVERSAL in one.parts], 8)
        for path in [one for one in files if UNIVERSAL not in one.parts or one in some or one.name == COMPLETE]:
            alike = [one for one in files if one.suffix == path.suffix and one != path] or files
            data = path.read_bytes()
            for name, change in changes(path, alike[0]).items():
                change()
                result = outcome(checkpoint, path, before[path])
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                path.with_name(f"more-{path.name}").unlink(missing_ok=True)
                path.write_bytes(data)
                other[result] += 1
                if result in ("other weights", "traceback"):
                    wrong += 1
                    print(f"{result}: {path.relative_to(checkpoint)}, {name}")
        report("other damage", other, time.perf_counter() - began)
    torch.distributed.destroy_process_group()
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
