"""`controlbooth data annotate`: shards -> the same shards with more conditions.

Each shard is copied whole, all parts byte for byte, with a `key.cond.KIND.png` beside every target that can be decoded:
what comes out is plain WebDataset again, and needs neither the old shards nor a join. A shard is written under a
temporary name and renamed, and the folder is bound to one data set and one list of conditions by annotate.json, so a
shard that is there is done: the same command goes on after a kill, with any number of ranks.

On several machines or GPUs: `torchrun --nproc-per-node 8 -m controlbooth.launch.cli data annotate ...`. Ranks share the
shards and need not talk; whoever finds all of them done writes the manifest.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from controlbooth.data.condition_names import IMAGE_EXTENSIONS
from controlbooth.data.conditions.functions import CONDITIONS
from controlbooth.data.conditions.networks import NETWORKS, network_folders, open_network
from controlbooth.data.errors import UserError
from controlbooth.data.files.whole import replaced, write_whole
from controlbooth.data.order.draws import content_hash
from controlbooth.data.pictures.images import (
    MAX_PIXELS,
    BadSample,
    decode_image,
    encode_png,
    keep_freed_memory,
    memory_named,
    to_rgb,
)
from controlbooth.data.processes.cpus import usable_cpus
from controlbooth.data.processes.parent import end_with_agent
from controlbooth.data.processes.pool import run_jobs
from controlbooth.data.shards import manifest, storage
from controlbooth.data.shards.index import ensure_index
from controlbooth.data.shards.sequential import samples_of
from controlbooth.data.shards.storage import Shard

RECORD = "annotate.json"
Conditions = tuple[tuple[str, str], ...]
"""Kind and the folder of its network, "" for one that needs none."""


def run(options: argparse.Namespace) -> int:
    """Runs `controlbooth data annotate`; returns 0 when all of this rank's shards are written."""
    end_with_agent()
    conditions = parse_conditions(options.condition)
    dataset = manifest.open_dataset(options.shards)
    check(dataset, conditions, options.out)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    names = names_of(dataset.paths)
    mine = list(zip(dataset.paths, names, strict=True))[rank::ranks]
    todo = [(shard, options.out / name) for shard, name in mine if not is_done(options.out / name)]
    if options.dry_run:
        kinds = ", ".join(f"{kind}={where}" if where else kind for kind, where in conditions)
        samples = sum(row.usable for row in dataset.rows)
        print(f"{dataset.location}: {samples} samples in {len(names)} shards, {len(todo)} to do here: {kinds}")
        return 0
    bind(options.out, dataset.fingerprint, conditions)
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if any(w for _, w in conditions) and _has_cuda() else "cpu"
    workers = options.workers or (usable_cpus() if device == "cpu" else 1)
    counts = {str(shard): row.samples for shard, row in zip(dataset.paths, dataset.rows, strict=True)}
    passed_over: list[str] = []
    with tqdm(
        total=sum(counts[str(shard)] for shard, _ in mine),
        initial=sum(counts[str(shard)] for shard, _ in mine) - sum(counts[str(shard)] for shard, _ in todo),
        unit="sample",
        desc="annotate",
        disable=rank > 0,
    ) as bar:
        for (shard, _), lacking in run_jobs(_work, todo, workers, _start, (conditions, device, options.max_pixels)):
            passed_over += lacking
            bar.update(counts[str(shard)])
    for line in passed_over[:20]:
        print(f"no condition for {line}", file=sys.stderr)
    if not all(is_done(options.out / name) for name in names):
        print(f"{options.out}: this rank's {len(mine)} shards are done; the manifest is written with the last ones")
        return 0
    rows = [manifest.describe_shard(options.out / name) for name in names]
    manifest.write_manifest(rows, options.out / manifest.NAME)
    kinds = ", ".join(f"{kind} ({sum(row.conditions.get(kind, 0) for row in rows)})" for kind, _ in conditions)
    print(f"{options.out}: {sum(row.samples for row in rows)} samples in {len(rows)} shards with {kinds}")
    return 0


def parse_conditions(given: Sequence[str]) -> Conditions:
    """Parses ["canny", "depth=/models/d"] into (("canny", ""), ("depth", "/models/d")).

    Raises ValueError for an unknown kind, with those that there are, for one that is given twice, and for a network
    without its folder.
    """
    found: dict[str, str] = {}
    for text in given:
        kind, _, where = text.partition("=")
        if kind in found:
            raise UserError(f"--condition {kind} is given twice; a sample has one of each kind")
        if kind in NETWORKS and not where:
            wanted = ",".join(NETWORKS[kind][1])
            raise UserError(f"--condition {kind} is made by a network: say where its model lies, {kind}={wanted}")
        if kind not in NETWORKS and (where or kind not in CONDITIONS):
            raise UserError(
                f"--condition {text}: there are {', '.join(CONDITIONS)}, and by networks {', '.join(NETWORKS)}, "
                "each as KIND=FOLDER"
            )
        if where:
            network_folders(kind, where)  # seen here once, and not by every worker
        found[kind] = where
    return tuple(found.items())


def check(dataset: manifest.Dataset, conditions: Conditions, out: Path) -> None:
    """Raises ValueError where shards have such a condition already, or would be written over."""
    there = {kind for row in dataset.rows for kind in row.conditions}
    if twice := [kind for kind, _ in conditions if kind in there]:
        raise UserError(f"{dataset.location} has a condition {twice[0]!r} already; leave it out, or take other shards")
    for shard in dataset.paths:
        if isinstance(shard, Path) and shard.absolute().parent == out.absolute():
            raise UserError(f"-o {out} is where the shards lie that are read; give another folder")


def names_of(shards: Sequence[Shard]) -> list[str]:
    """Gives the names of the new shards: those of the old ones, or numbers where two have the same."""
    names = [storage.base_name(str(shard)) for shard in shards]
    return names if len({*names}) == len(names) else [f"shards-{number:06d}.tar" for number in range(len(names))]


def bind(out: Path, fingerprint: str, conditions: Conditions) -> None:
    """Writes down what the folder is for. Raises ValueError where it is for something else."""
    record = {"source": fingerprint, "conditions": {kind: _digest(where) for kind, where in conditions}}
    path = out / RECORD
    if path.exists():
        if json.loads(path.read_text()) != record:
            raise UserError(f"{out} holds other shards, or other conditions (see {path}); choose another folder")
        return
    if out.exists() and any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards that no annotate wrote; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1).encode())


def _digest(where: str) -> str:
    """Hashes the JSON files and all files' names and sizes in a network's folders; returns "" without a network."""
    digest = hashlib.blake2b(digest_size=16)
    for folder in filter(None, where.split(",")):
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes() if path.suffix == ".json" else b"")
    return digest.hexdigest() if where else ""


def is_done(path: Path) -> bool:
    """Tells whether a shard has its final name, and so is whole; builds its index where a kill has prevented that."""
    return path.exists() and not ensure_index(path)


def annotate_shard(
    shard: Shard, path: Path, functions: dict[str, Callable[..., np.ndarray]], max_pixels: int = MAX_PIXELS
) -> list[str]:
    """Writes and indexes one shard; -> the samples whose targets cannot be decoded, which get no condition."""
    from webdataset.writer import TarWriter  # imports torch, which takes seconds: not for --help

    lacking: list[str] = []
    with replaced(path) as temporary, open(temporary, "wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for key, parts in samples_of(shard):
            try:
                with memory_named(key, "image"):
                    parts |= conditions_of(key, parts, functions, max_pixels)
            except BadSample as error:
                lacking.append(f"{shard}: {error}")
            writer.write({"__key__": key, **parts})
    ensure_index(path)
    return lacking


def conditions_of(
    key: str, parts: dict[str, bytes], functions: dict[str, Callable[..., np.ndarray]], max_pixels: int = MAX_PIXELS
) -> dict[str, bytes]:
    """Makes the new parts of a sample. Raises BadSample where there is no target, or none that can be decoded.

    What is random about them is decided by the target's bytes, as it is in `data pack`.
    """
    extension = next((one for one in IMAGE_EXTENSIONS if one in parts), None)
    if extension is None:
        raise BadSample(key, "image", "it has no target image")
    image = to_rgb(decode_image(parts[extension], key, extension, max_pixels=max_pixels))
    bits = content_hash(parts[extension])
    return {f"cond.{kind}.png": encode_png(function(image, bits)) for kind, function in functions.items()}


_functions: dict[str, Callable[..., np.ndarray]]
_max_pixels: int


def _start(conditions: Conditions, device: str, max_pixels: int) -> None:
    global _functions, _max_pixels
    _max_pixels = max_pixels
    keep_freed_memory()
    if any(where for _, where in conditions) and device == "cpu":
        import torch

        torch.set_num_threads(1)  # there is a process for each CPU
    _functions = {kind: open_network(kind, where, device) if where else CONDITIONS[kind] for kind, where in conditions}


def _work(job: tuple[Shard, Path]) -> list[str]:
    return annotate_shard(*job, _functions, _max_pixels)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
