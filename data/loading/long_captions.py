"""Captions that are longer than what a base reads: how many, so that nobody learns of it from the pictures."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from controlbooth.data.errors import UserError
from controlbooth.data.loading.tokens import cut_prompts
from controlbooth.data.pictures.images import BadSample
from controlbooth.data.shards.captions import read_captions
from controlbooth.data.shards.manifest import Dataset, join_datasets, open_dataset
from controlbooth.data.shards.reader import ShardReader

LOOKED_AT = 64
"""Samples whose captions are counted, at even distances."""


def cut_captions(dataset: Dataset, tokenizers: Sequence[Any], prompts: Sequence[str] = ()) -> str | None:
    """Says how much the tokenizers of a base cut off; returns None where they cut nothing of what was looked at.

    tokenizers: of transformers. prompts: other prompts that the base is to draw; each one that is cut is named. Raises
    OSError where shards cannot be read.
    """
    counted = list(some_captions(dataset))
    cut = {one.prompt: one for one in cut_prompts(tokenizers, [caption for _, caption in counted])}
    longer = [(cut[caption].tokens, key, cut[caption].kept) for key, caption in counted if caption in cut]
    told = []
    if longer:
        most, key, kept = max(longer)
        told.append(
            f"{len(longer)} of {len(counted)} captions that were looked at have more than the {kept} tokens that the "
            f"base reads, begin and end included; the most, {most}, has that of {key!r}"
        )
    for one in cut_prompts(tokenizers, prompts):
        told.append(f"the prompt {one.prompt[:60]!r} has {one.tokens} tokens of {one.kept}")
    return f"{'; '.join(told)}. What stands last is cut off: let them begin with what matters" if told else None


def some_captions(dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Yields key and caption for all captions of up to LOOKED_AT samples at even distances.

    Passes over bad samples, and over shards in a store, which are not fetched for this.
    """
    here = [isinstance(path, Path) for path in dataset.paths]
    counts = dataset.samples_per_shard() * np.array(here, np.int64)
    ends, total = np.cumsum(counts), int(counts.sum())
    reader = ShardReader(dataset, None, most_open=1, pictures=False)
    try:
        for number in np.unique(np.arange(LOOKED_AT) * total // LOOKED_AT).tolist() if total else ():
            shard = int(np.searchsorted(ends, number, side="right"))
            try:
                sample = reader.read(shard, number - int(ends[shard] - counts[shard]))
                captions = read_captions(sample.caption, sample.caption_extension, sample.key)
            except BadSample:
                continue
            yield from ((sample.key, caption) for caption in captions)
    finally:
        reader.close()


def open_tokenizers(folder: Path) -> list[Any]:
    """Opens the tokenizers of a base in diffusers' layout, or the one in `folder` itself.

    Raises ValueError where there is none.
    """
    from transformers import AutoTokenizer  # takes seconds: not for --help

    places = [folder / name for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()]
    if not places and (folder / "tokenizer_config.json").is_file():
        places = [folder]
    if not places:
        raise UserError(f"{folder} holds no tokenizer/: give the folder of a base, or of its tokenizer")
    return [AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False) for place in places]


def cut_captions_of(locations: Sequence[str], base: Path, prompts: Sequence[str] = ()) -> str | None:
    """Calls `cut_captions` for the data sets at these locations, whose shards are indexed, and a base's folder."""
    dataset = join_datasets([open_dataset(location) for location in locations])
    return cut_captions(dataset, open_tokenizers(base), prompts)
