"""The data commands as a user starts them: packing across a kill -9, indexing others' shards, looking at the result."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset
from loaders import make_loader

from controlbooth.data.conditions.functions import CONDITIONS
from controlbooth.data.packing.pack import JOURNAL, pack
from controlbooth.data.packing.sources import open_scenes
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.sidecar import index_path, load_index
from controlbooth.launch.commands.data_info import main as info_main
from controlbooth.launch.commands.data_order import main as order_main
from controlbooth.launch.commands.data_pack import main as pack_main
from controlbooth.launch.commands.data_show import main as show_main


def command(verb, *arguments):
    """The interpreter of the tests rather than whichever `controlbooth` is on the PATH."""
    return [sys.executable, "-m", "controlbooth.launch.cli", "data", verb, *map(str, arguments)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Six shards of scenes with edges and depth."""
    out = tmp_path_factory.mktemp("scenes") / "shards"
    assert pack(open_scenes(60, 0, 0, 32, ["edges", "depth"]), out, 10) == []
    return out


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def children(pid):
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it ended in between
            continue
        if parent == pid:
            found.append(int(entry.parent.name))
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_pack_that_was_killed_and_run_again_equals_an_uninterrupted_one(tmp_path):
    out = tmp_path / "out"
    arguments = ["--scenes", 240, "--size", 32, "--samples-per-shard", 20, "-o", out]
    process = subprocess.Popen(command("pack", *arguments, "--workers", 2), stderr=subprocess.DEVNULL)
    wait_for(lambda: (out / JOURNAL).exists() and (out / JOURNAL).read_text().count("shards-") >= 2)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    noted = (out / JOURNAL).read_text().count("shards-")
    assert 2 <= noted < 12 and not (out / "manifest.jsonl").exists()
    wait_for(lambda: not any(map(is_alive, workers)), seconds=10)  # none goes on writing

    assert pack_main([*map(str, arguments), "--workers", "1"]) == 0
    pack(open_scenes(240, 0, 0, 32, ["edges"]), tmp_path / "whole", 20)
    assert files(out) == files(tmp_path / "whole")


def test_shards_of_others_are_indexed_and_trained_on(tmp_path):
    picture = cv2.imencode(".jpg", np.full((40, 50, 3), 90, np.uint8))[1].tobytes()
    drawing = cv2.imencode(".png", np.full((40, 50), 255, np.uint8))[1].tobytes()
    pattern = str(tmp_path / "others-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=8, verbose=0, encoder=False) as writer:
        for i in range(20):
            caption = json.dumps({"caption": f"number {i}"}).encode()
            writer.write({"__key__": f"{i:09d}", "jpg": picture, "scribble.png": drawing, "json": caption})
    location = f"{tmp_path}/others-{{000000..000002}}.tar"
    done = subprocess.run(command("index", location, "--workers", 1), capture_output=True, text=True)
    assert done.returncode == 0 and "all 3 shards" in done.stdout and "scribble 8" in done.stdout
    with make_loader(
        open_dataset(tmp_path), seed=0, lanes=4, shards_per_block=1, global_batch_size=4, micro_batch_size=4, rank=0,
        world_size=1, condition="scribble", resolution=16, prompt_dropout=0.0, random_flip=False,
        random_crop=False, num_train_timesteps=1000, latent_shape=(4, 2, 2),
    ) as loader:  # fmt: skip
        steps = [next(loader).micro_batches[0] for _ in range(5)]
    assert sorted(key for step in steps for key in step.keys) == [f"{i:09d}" for i in range(20)]
    assert all(caption == f"number {int(key)}" for s in steps for key, caption in zip(s.keys, s.captions, strict=True))


def test_a_damaged_shard_makes_index_fail_with_the_byte(shards, tmp_path):
    data = bytearray((shards / "shards-000002.tar").read_bytes())
    header = int(load_index(index_path(shards / "shards-000002.tar")).samples[5]["offset"])
    data[header] ^= 0xFF
    (tmp_path / "x.tar").write_bytes(data)
    done = subprocess.run(command("index", tmp_path, "--workers", 1), capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{tmp_path}/x.tar: byte {header}, " in done.stderr and "no manifest was written" in done.stderr
    assert not list(tmp_path.glob("*.idx"))


def test_info_tells_what_a_data_set_holds(shards, capsys):
    assert info_main([str(shards)]) == 0
    text = capsys.readouterr().out
    assert open_dataset(shards).fingerprint in text
    assert "6, of 10 to 10 samples" in text and "depth (60), edges (60)" in text and "60, usable 60" in text


def test_show_draws_a_sheet_of_target_and_all_conditions(shards, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    assert show_main([str(shards), "-o", str(sheet), "--count", "5", "--columns", "2", "--resolution", "64"]) == 0
    pixels = cv2.imread(str(sheet))
    header, tile = 14 + 6, (64 + 34 + 8, 3 * 64 + 8)
    assert pixels.shape == (header + 3 * tile[0], 2 * tile[1], 3)
    assert (pixels[-tile[0] :, tile[1] :] == 255).all()  # the sixth place is empty
    assert "5 samples, conditions depth, edges" in capsys.readouterr().out
    one = ["--count", "1", "--resolution", "64", "--condition", "computed:gray"]
    assert show_main([str(shards), "-o", str(sheet), *one]) == 0
    pixels = cv2.imread(str(sheet))
    target, gray = (pixels[header + 4 : header + 68, left : left + 64] for left in (4, 68))
    assert np.array_equal(gray[..., 0], CONDITIONS["gray"](target[..., ::-1]))
    with pytest.raises(ValueError, match="condition 'pose'; conditions there are: depth, edges"):
        show_main([str(shards), "-o", str(sheet), "--condition", "pose"])
    with pytest.raises(SystemExit):
        show_main([str(shards), "-o", str(tmp_path / "absent" / "sheet.png")])
    assert "absent/sheet.png: there is no folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match="must end in .png"):
        show_main([str(shards), "-o", str(tmp_path / "sheet.gif")])


def test_order_lists_what_the_loader_gives(shards, capsys):
    numbers = ["--step", "3", "--global-batch-size", "8", "--world-size", "2", "--seed", "5", "--prompt-dropout", "0.5"]
    listed = []
    for rank in range(2):
        assert order_main([str(shards), *numbers, "--rank", str(rank), "--condition", "edges"]) == 0
        listed += [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    with make_loader(
        open_dataset(shards), seed=5, lanes=8, shards_per_block=2, global_batch_size=8, micro_batch_size=8, rank=0,
        world_size=1, condition="edges", resolution=16, prompt_dropout=0.5, random_flip=True, random_crop=True,
        num_train_timesteps=1000, latent_shape=(4, 2, 2), start_step=3,
    ) as loader:  # fmt: skip
        batch = next(loader).micro_batches[0]
    assert [int(line[0]) for line in listed] == batch.positions.tolist()
    assert [line[-1] for line in listed] == batch.keys
    assert [line[-2] == "dropped" for line in listed] == batch.dropped.tolist()
