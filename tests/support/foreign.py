"""Small folders in the layouts of other trainers."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from controlbooth.data.pictures.images import encode_png

COUNT = 4


def picture(number: int, side: int = 64) -> bytes:
    """Draws a picture of noise, another for each number, as a PNG."""
    return encode_png(np.random.default_rng(number).integers(0, 255, (side, side, 3), dtype=np.uint8))


def write(path: Path, number: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(number))
    return path


def image_folder(root: Path) -> Path:
    """An image folder with metadata.jsonl and conditioning pictures, as fill50k has them."""
    lines = []
    for number in range(COUNT):
        write(root / f"images/{number}.png", number)
        write(root / f"conditioning/{number}.png", 100 + number)
        row = {"file_name": f"images/{number}.png", "text": f"a circle {number}"}
        lines.append(json.dumps(row | {"conditioning_image": f"conditioning/{number}.png"}))
    (root / "metadata.jsonl").write_text("\n".join(lines))
    return root


def _table() -> pa.Table:
    def cells(first: int) -> list[dict]:
        return [{"bytes": picture(first + number), "path": f"{number}.png"} for number in range(COUNT)]

    texts = [f"a circle {number}" for number in range(COUNT)]
    return pa.table({"image": cells(0), "conditioning_image": cells(100), "text": texts})


def parquet(root: Path) -> Path:
    """Parquet with structs of bytes and path."""
    root.mkdir(parents=True, exist_ok=True)
    pq.write_table(_table(), root / "train.parquet")
    return root / "train.parquet"


def saved(root: Path) -> Path:
    """What save_to_disk writes: state.json, dataset_info.json and a stream of Arrow."""
    root.mkdir(parents=True, exist_ok=True)
    table = _table()
    with pa.ipc.new_stream(root / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (root / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    (root / "dataset_info.json").write_text("{}")
    return root


def kohya_folders(root: Path) -> Path:
    """Folders with repeats, spaces, captions of two suffixes, and class pictures."""
    for number in range(COUNT):
        path = write(root / f"img/10_sks dog/{number}.png", number)
        path.with_suffix(".caption" if number % 2 else ".txt").write_bytes(b"\xef\xbb\xbfsks dog, sitting\r\nmore\r\n")
        write(root / f"img/3_kcz bär/bär {number}.png", 50 + number)
        write(root / f"reg/1_dog/{number}.png", 200 + number)
    return root


def kohya_toml(root: Path) -> Path:
    """A dataset TOML with conditioning pictures and a wildcard."""
    for number in range(COUNT):
        path = write(root / f"pictures/{number}.png", number)
        path.with_suffix(".txt").write_text("a {red|blue} dog")
        write(root / f"control/{number}.png", 100 + number)
    (root / "dataset.toml").write_text(
        '[general]\nenable_bucket = true\ncaption_extension = ".txt"\n[[datasets]]\nresolution = [512, 512]\n'
        '[[datasets.subsets]]\nimage_dir = "pictures"\nconditioning_data_dir = "control"\nnum_repeats = 2\n'
        "enable_wildcard = true\n"
    )
    return root / "dataset.toml"


def simpletuner(root: Path) -> Path:
    """Backends: pictures with text files, their conditions, embeddings, and one in a store."""
    for number in range(COUNT):
        path = write(root / f"pictures/sub/{number}.png", number)
        path.with_suffix(".txt").write_text(f"a dog {number}\n")
        write(root / f"control/sub/{number}.png", 100 + number)
    backends = [
        {"id": "dogs", "type": "local", "instance_data_dir": "pictures", "caption_strategy": "textfile", "repeats": 1,
         "conditioning_data": "edges", "crop": False, "made_up": 1},
        {"id": "edges", "type": "local", "dataset_type": "conditioning", "instance_data_dir": "control"},
        {"id": "far", "type": "aws", "aws_bucket_name": "x"},
        {"id": "text", "type": "local", "dataset_type": "text_embeds", "cache_dir": "cache", "default": True},
    ]  # fmt: skip
    (root / "multidatabackend.json").write_text(json.dumps(backends))
    return root / "multidatabackend.json"


def img2dataset(root: Path) -> Path:
    """Files as img2dataset writes them: numbered folders with .txt and .json beside each picture."""
    for number in range(COUNT):
        path = write(root / f"00000/00000{number:04d}.png", number)
        path.with_suffix(".txt").write_text(f"a dog {number}")
        path.with_suffix(".json").write_text("{}")
    return root


def dreambooth(root: Path) -> Path:
    """A folder of pictures of one subject, without captions."""
    for number in range(COUNT):
        write(root / f"{number}.png", number)
    return root


LAYOUTS = {
    one.__name__: one for one in (image_folder, parquet, saved, kohya_folders, kohya_toml, simpletuner, img2dataset)
}
"""Of shards: name -> what writes a folder in this layout and returns what is to be imported."""
