"""`controlbooth data pack`: a source -> tar shards with their indexes and a manifest.

A shard is written under a temporary name, renamed, indexed and then noted in pack.jsonl with a hash of what it was made
from. So a pack that was killed goes on at the first shard that is not noted, and shards whose samples changed are
written again: text is compared by what it says, images by size and time of change. Nothing that differs between runs is
written into a shard, so equal sources give equal bytes.
"""

import argparse
import errno
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from controlbooth.data.conditions.functions import CONDITIONS
from controlbooth.data.conditions.sizes import where_exact
from controlbooth.data.errors import UserError
from controlbooth.data.files.locks import take_lock
from controlbooth.data.files.whole import temporary_path, write_whole
from controlbooth.data.order.draws import content_hash
from controlbooth.data.packing.sources import Source, SourceSample, open_folder, open_scenes
from controlbooth.data.packing.split import HELD_OUT, NOTES, TRAIN, held_out_count, split
from controlbooth.data.packing.tables import is_rows, open_rows
from controlbooth.data.pictures.images import (
    MAX_PIXELS,
    BadSample,
    decode_image,
    encode_png,
    keep_freed_memory,
    memory_named,
    same_frame,
    to_rgb,
)
from controlbooth.data.processes.pool import WorkerError, run_jobs
from controlbooth.data.shards import manifest
from controlbooth.data.shards.captions import text_fault
from controlbooth.data.shards.index import ensure_index
from controlbooth.data.shards.sidecar import index_path, load_index

JOURNAL = "pack.jsonl"
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PN": "png", b"RIF": "webp"}


class PackError(WorkerError):
    """Something outside of the data that stops a pack; the message says how to go on."""


@dataclass(frozen=True)
class Job:
    """One shard to write."""

    path: Path
    start: int
    stop: int
    identity: str


def encode_parts(sample: SourceSample, computed: Sequence[str], max_pixels: int = MAX_PIXELS) -> dict[str, bytes]:
    """Encodes a source's sample into its parts as they are stored: {extension: bytes}.

    JPEG, PNG and WebP images are kept byte for byte, others become PNG; conditions become PNG. Everything is decoded,
    so that what cannot be is found here and not in training. What is random about a computed condition is decided by
    the stored image, as names repeat from one table to the next. Raises BadSample for what cannot be decoded, a
    condition of another aspect ratio, a text that cannot be a caption, and a fault that the source has found.
    """
    if sample.fault is not None:
        raise BadSample(sample.key, *sample.fault)
    image = decode_image(sample.image, sample.key, "image", max_pixels=max_pixels)
    kind_of_image = _MAGIC.get(sample.image[:3])
    parts = {kind_of_image: sample.image} if kind_of_image else {"png": encode_png(image)}
    bits = content_hash(next(iter(parts.values())))
    for kind, data in sample.conditions.items():
        condition = decode_image(data, sample.key, f"cond.{kind}", 0, max_pixels)
        if not same_frame(image.shape, condition.shape):
            sizes = f"{image.shape[1]}x{image.shape[0]}, {condition.shape[1]}x{condition.shape[0]}"
            raise BadSample(sample.key, f"cond.{kind}", f"its aspect ratio is not the image's ({sizes})")
        parts[f"cond.{kind}.png"] = encode_png(condition)
    rgb = to_rgb(image)
    for kind in computed:
        parts[f"cond.{kind}.png"] = encode_png(CONDITIONS[kind](rgb, bits))
    for caption in sample.captions:
        if (fault := text_fault(caption)) is not None:
            raise BadSample(sample.key, "caption", f"the caption {fault}")
    if len(sample.captions) == 1:
        parts["txt"] = sample.captions[0].encode()
    else:
        parts["json"] = json.dumps({"captions": sample.captions}).encode()
    return parts


def write_shard(source: Source, job: Job, skip_bad: bool, max_pixels: int = MAX_PIXELS) -> list[str]:
    """Writes and indexes one shard; -> what is wrong with the samples that cannot be packed.

    If there are such samples and they may not be skipped, no shard is left behind. Raises PackError on a full disk, and
    OutOfMemory.
    """
    from webdataset.writer import TarWriter  # imports torch, which takes seconds: not for --help

    keep_freed_memory()
    bad: list[str] = []
    temporary = temporary_path(job.path)
    try:
        with open(temporary, "wb") as file:
            # TarWriter's own close writes the end blocks; owner and time are fixed
            with TarWriter(file, encoder=False, mtime=0) as writer:
                for sample in source.read(job.start, job.stop):
                    try:
                        with memory_named(sample.key, "image"):
                            parts = encode_parts(sample, source.computed, max_pixels)
                    except BadSample as error:
                        bad.append(f"{sample.origin}: {error.part}: {error.reason}")
                        continue
                    writer.write({"__key__": sample.key, **parts})
            file.flush()
            os.fsync(file.fileno())
        if bad and not skip_bad:
            return bad
        index_path(job.path).unlink(missing_ok=True)  # one of an earlier pack would pass for this shard's
        os.replace(temporary, job.path)
        if problems := [problem for problem in ensure_index(job.path) if problem.kind != "pixels"]:
            raise PackError(f"the shard just written cannot be read back: {problems[0]}")
        return bad
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PackError(
                f"the disk is full: {os.strerror(error.errno)} while writing {job.path}. Free some space and run the "
                f"same command again; finished shards are kept."
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def pack(
    source: Source,
    out: Path,
    samples_per_shard: int,
    workers: int = 1,
    skip_bad: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> list[str]:
    """Packs a source into out/shards-*.tar and writes out/manifest.jsonl; -> what could not be packed.

    The manifest is written only when all shards are complete. max_pixels: see `decode_image`. Raises PackError,
    OutOfMemory and ValueError.
    """
    if samples_per_shard < 1 or workers < 1:
        raise UserError(f"samples per shard ({samples_per_shard}) and workers ({workers}) must be at least 1")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / JOURNAL, "a+") as journal:
        _lock(journal, out)
        description = f"{source.describe()}, {samples_per_shard} a shard"
        description += f", at most {max_pixels} pixels" if max_pixels != MAX_PIXELS else ""
        done = _read_journal(journal, out, description)
        jobs = plan(source, out, samples_per_shard)
        _remove_leftovers(out, jobs, done)
        open_jobs = [job for job in jobs if not _is_done(job, done.get(job.path.name), skip_bad)]
        bad = [line for job in jobs if job not in open_jobs for line in done[job.path.name]["skipped"]]
        finished = source.count - sum(job.stop - job.start for job in open_jobs)
        with tqdm(total=source.count, initial=finished, unit="sample", desc="pack") as progress:
            for job, found in run_jobs(_work, open_jobs, workers, _start_worker, (source, skip_bad, max_pixels)):
                progress.update(job.stop - job.start)
                bad += found
                if not found or skip_bad:
                    done[job.path.name] = {"identity": job.identity, "skipped": found}
                    journal.write(json.dumps({"shard": job.path.name, **done[job.path.name]}) + "\n")
                    journal.flush()
        if bad and not skip_bad:
            return bad
        manifest.write_manifest([manifest.describe_shard(job.path) for job in jobs], out / manifest.NAME)
        _tidy_journal(out, description, jobs, done)
        return bad


def plan(source: Source, out: Path, samples_per_shard: int) -> list[Job]:
    jobs = []
    for number, start in enumerate(range(0, source.count, samples_per_shard)):
        stop = min(start + samples_per_shard, source.count)
        jobs.append(Job(out / f"shards-{number:06d}.tar", start, stop, source.identity(start, stop)))
    return jobs


_worker_arguments: tuple[Source, bool, int]


def _start_worker(source: Source, skip_bad: bool, max_pixels: int) -> None:
    global _worker_arguments  # sent once a process and not with each job, as it may list a million files
    _worker_arguments = (source, skip_bad, max_pixels)


def _work(job: Job) -> list[str]:
    source, skip_bad, max_pixels = _worker_arguments
    return write_shard(source, job, skip_bad, max_pixels)


def _lock(journal, out: Path) -> None:
    if not take_lock(journal, "start no second pack into this folder"):
        raise PackError(f"another pack is writing to {out}; wait for it, or choose another folder")


def _read_journal(journal, out: Path, description: str) -> dict[str, dict]:
    """Reads the journal: {shard name: its line}. Begins an empty one with a line that describes the source.

    Raises ValueError where the folder holds another pack, or shards that no pack wrote.
    """
    journal.seek(0)
    lines = []
    for line in journal.read().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # a kill cut the last line short: that shard is simply written again
            journal.write("\n")
    if not lines:
        if foreign := sorted(out.glob("*.tar")):
            raise UserError(f"{out} holds {len(foreign)} shards that no pack wrote; choose another folder")
        journal.write(json.dumps({"source": description}) + "\n")
        journal.flush()
        return {}
    if lines[0] != {"source": description}:
        raise UserError(
            f"{out} holds a pack of another source or with other options ({lines[0].get('source')}), this is "
            f"{description}. Choose another folder, or delete that one."
        )
    return {line["shard"]: line for line in lines[1:]}


def _tidy_journal(out: Path, description: str, jobs: Sequence[Job], done: dict[str, dict]) -> None:
    """Rewrites the journal with a line for each shard in order, so it does not show how often packing was resumed."""
    lines = [{"source": description}]
    for job in jobs:
        entry = done[job.path.name]
        lines.append({"shard": job.path.name, "identity": entry["identity"], "skipped": entry["skipped"]})
    write_whole(out / JOURNAL, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _remove_leftovers(out: Path, jobs: Sequence[Job], done: dict[str, dict]) -> None:
    """Deletes temporary files of a killed pack, and shards of an earlier state of this source that had more samples."""
    for path in (*out.glob("shards-*.tmp"), *out.glob(f"{manifest.NAME}.*.tmp")):
        path.unlink()
    for name in done.keys() - {job.path.name for job in jobs}:
        (out / name).unlink(missing_ok=True)
        index_path(out / name).unlink(missing_ok=True)


def _is_done(job: Job, noted: dict | None, skip_bad: bool) -> bool:
    """Tells whether the shard is there, whole, and made of the same samples, none left out unless `skip_bad`."""
    if noted is None or noted["identity"] != job.identity or (noted["skipped"] and not skip_bad):
        return False
    try:
        return load_index(index_path(job.path)).shard_bytes == job.path.stat().st_size
    except (FileNotFoundError, ValueError):
        return False


def run(arguments: argparse.Namespace) -> int:
    """Runs `controlbooth data pack`; returns 0 when all is packed, else 1.

    Bad samples are listed on stderr; it is 1 then unless they may be left out, and it is 1 where none could be packed.
    """
    source = _open_source(arguments)
    for note in source.notes:
        print(note, file=sys.stderr)
    parts = _parts(arguments, source)
    if arguments.dry_run:
        for out, part in parts.items():
            _print_plan(part, out, arguments.samples_per_shard, arguments.max_pixels)
        return 0
    bad = {
        out: pack(part, out, arguments.samples_per_shard, arguments.workers, arguments.skip_bad, arguments.max_pixels)
        for out, part in parts.items()
    }
    lines = [line for own in bad.values() for line in own]
    for line in lines[:50]:
        print(line, file=sys.stderr)
    if lines and not arguments.skip_bad:
        print(
            f"{len(lines)} samples cannot be packed{' (50 shown)' if len(lines) > 50 else ''}. Replace or remove them "
            f"and run the same command again, or add --skip-bad to leave them out; finished shards are kept.",
            file=sys.stderr,
        )
        return 1
    for out, own in bad.items():
        dataset = manifest.open_dataset(out)
        samples = sum(row.samples for row in dataset.rows)
        if not samples:
            print(f"{out}: no sample could be packed, so there is nothing to train on", file=sys.stderr)
            return 1
        left_out = f", {len(own)} left out" if own else ""
        print(f"{out}: {samples} samples in {len(dataset.rows)} shards{left_out} ({dataset.fingerprint})")
    for kind in sorted({kind for row in dataset.rows for kind in row.conditions}):
        if (told := where_exact(dataset, kind)) is not None:
            print(told)
    return 0


def _parts(arguments: argparse.Namespace, source: Source) -> dict[Path, Source]:
    """Returns what goes into which folder; for --held-out, divides the samples first, and prints how many go where.

    Raises ValueError where the folder holds shards already, or where nothing can be held out.
    """
    out = arguments.out
    if arguments.held_out is None:
        return {out: source}
    held_out_count(arguments.held_out, source.count)
    if (out / JOURNAL).exists() or any(out.glob("*.tar")):
        raise UserError(
            f"{out} holds shards itself, and --held-out writes {out / TRAIN} and {out / HELD_OUT}: choose another "
            "folder"
        )
    notes = None if arguments.dry_run else out / NOTES
    train, held_out = split(source, arguments.held_out, notes, arguments.workers, arguments.max_pixels)
    wanted = held_out_count(arguments.held_out, source.count)
    short = f" ({wanted} were asked for: near copies stay together)" if held_out.count < wanted else ""
    print(f"{source.count} samples: {train.count} to train on, {held_out.count} held out{short}")
    if not held_out.count:
        raise UserError(
            f"no sample can be held out: all groups of near copies have more than {wanted} samples. Raise --held-out"
        )
    return {out / HELD_OUT: held_out, out / TRAIN: train}


def _open_source(arguments: argparse.Namespace) -> Source:
    kinds = dict(_kind_and_column(text) for text in arguments.condition)
    if (arguments.scenes is None) == (arguments.source is None):
        raise UserError("name one source: a folder, a table or a data set, or --scenes COUNT")
    if arguments.scenes is not None:
        return open_scenes(arguments.scenes, arguments.seed, arguments.start, arguments.size, list(kinds))
    if is_rows(arguments.source) or not arguments.source.is_dir():
        if arguments.caption is not None:
            raise UserError("--caption is for folders of images; rows have their own, see --caption-column")
        columns = (arguments.image_column, arguments.caption_column)
        return open_rows(arguments.source, kinds, *columns, arguments.skip_bad)
    for kind, column in kinds.items():
        if column:
            raise UserError(f"--condition {kind}={column} is for tables; folders have conditions/{kind}/")
    return open_folder(arguments.source, list(kinds), arguments.caption)


def _kind_and_column(text: str) -> tuple[str, str | None]:
    kind, _, column = text.partition("=")
    return kind, column or None


def _print_plan(source: Source, out: Path, samples_per_shard: int, max_pixels: int) -> None:
    jobs = plan(source, out, samples_per_shard)
    print(f"{source.describe()}\n{source.count} samples -> {len(jobs)} shards: {jobs[0].path} ...")
    for sample in source.read(0, min(3, source.count)):
        try:
            parts = encode_parts(sample, source.computed, max_pixels)
        except BadSample as error:
            print(f"  {sample.origin}: {error.part}: {error.reason}")
            continue
        sizes = {extension: len(data) for extension, data in parts.items()}
        print(f"  {sample.key}: {sizes} bytes, {sample.captions[0]!r:.200}")
