"""Shards in which every name comes again, as other tools and two packed tables leave them."""

from pathlib import Path

import webdataset

from controlbooth.data.pictures.images import encode_png
from controlbooth.data.scenes import render
from controlbooth.data.shards.index import ensure_index
from controlbooth.data.shards.sidecar import index_path


def write_repeated(folder: Path, shards: int = 4, per_shard: int = 6, size: int = 24, seed: int = 5) -> Path:
    """Indexed shards 00000.tar, 00001.tar, ... with the keys 000000000, 000000001, ... in each, and other pictures.

    Samples have the parts png, txt, cond.edges.png and cond.depth.png; no two pictures of a seed are equal.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = folder / f"{shard:05d}.tar"
        with webdataset.TarWriter(str(path), encoder=False, mtime=0) as writer:
            for number in range(per_shard):
                what = render.scene(seed, shard * per_shard + number)
                drawn = render.render(what, size)
                conditions = {f"cond.{kind}.png": encode_png(getattr(drawn, kind)) for kind in ("edges", "depth")}
                text = f"shard {shard}, {what.caption}".encode()
                writer.write({"__key__": f"{number:09d}", "png": encode_png(drawn.image), "txt": text, **conditions})
        index_path(path).unlink(missing_ok=True)  # of shards that were written here before
        ensure_index(path)
    return folder
