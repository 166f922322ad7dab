import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from controlbooth.data.bench import main as bench_main
from controlbooth.data.bench import measure
from controlbooth.data.draws import crops, hash64
from controlbooth.data.explain import (
    find_key,
    main,
    numbers_of_run,
    open_sources,
    order_of_run,
    presentations,
    steps_done,
)
from controlbooth.data.loader import Loader
from controlbooth.data.manifest import open_dataset
from controlbooth.data.pack import pack
from controlbooth.data.sidecar import MISSING_CAPTION, QUARANTINED, index_path, load_index, make_index, write_index
from controlbooth.data.sources import open_scenes

G, STEPS = 8, 20  # 160 positions: two epochs of 56 of 59 samples, and a part of a third


@pytest.fixture
def run(tmp_path):
    """A run folder on 60 scenes, one of which is flagged."""
    pack(open_scenes(60, 0, 0, 24, ["edges"]), tmp_path / "shards", 10)
    (tmp_path / "shards" / "manifest.jsonl").unlink()
    path = index_path(tmp_path / "shards" / "shards-000002.tar")
    index = load_index(path)
    samples = index.samples.copy()
    samples["flags"][4] = QUARANTINED | MISSING_CAPTION
    write_index(make_index(index.shard_bytes, index.extensions, samples, index.parts), path)
    data = dict(shards=str(tmp_path / "shards"), condition="edges", lanes=None, shards_per_block=2, prompt_dropout=0.5)
    data |= dict(random_flip=True, random_crop=True, resolution=16, sources=[], max_aspect_ratio=1.0, aspect_step=64)
    tree = dict(seed=3, global_batch_size=G, max_steps=STEPS, data=data)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def seen_by_the_loader(run):
    """key -> [(position, dropped, timestep)] of a whole run."""
    seen: dict[str, list] = {}
    with Loader(
        open_dataset(run / "shards"), seed=3, lanes=G, shards_per_block=2, global_batch_size=G, micro_batch_size=G,
        rank=0, world_size=1, condition_kind="edges", resolution=16, prompt_dropout=0.5, random_flip=True,
        random_crop=True, num_train_timesteps=1000, latent_shape=(4, 2, 2),
    ) as loader:  # fmt: skip
        for _ in range(STEPS):
            batch = next(loader).micro_batches[0]
            for i, key in enumerate(batch.keys):
                what = (int(batch.positions[i]), bool(batch.dropped[i]), int(batch.timesteps[i]))
                seen.setdefault(key, []).append(what)
    return seen


def key_of(number):
    return f"scene-0-{number:08d}"


def explained(run, key):
    numbers = numbers_of_run(run)
    dataset = open_sources(numbers)
    order, buckets = order_of_run(dataset, numbers)
    [found] = find_key(dataset, key, "edges", buckets)
    return list(presentations(order, numbers, found, key, 1))


def test_every_presentation_that_the_loader_gives_is_foretold(run):
    seen = seen_by_the_loader(run)
    for number in [number for number in range(60) if number != 24]:
        told = [item for item in explained(run, key_of(number)) if not isinstance(item, int)]
        assert [(item.position, item.dropped, item.timestep) for item in told] == seen.get(key_of(number), [])
        assert all(item.step == item.position // G for item in told)


def test_epochs_that_leave_a_sample_out_are_named(run):
    seen = seen_by_the_loader(run)
    for number in range(0, 60, 7):
        left_out = [item for item in explained(run, key_of(number)) if isinstance(item, int)]
        epochs = {position // 56 for position, _, _ in seen[key_of(number)]}
        assert epochs.isdisjoint(left_out) and {0, 1} <= epochs | set(left_out)


def test_flips_and_crops_are_those_of_the_position(run):
    told = [item for number in range(20) for item in explained(run, key_of(number)) if not isinstance(item, int)]
    assert 0.2 < np.mean([item.flipped for item in told]) < 0.8
    item = told[0]
    assert item.crop == (0, 0)  # scenes are square, so nothing is cut off
    numbers = numbers_of_run(run)
    dataset = open_sources(numbers)
    order, buckets = order_of_run(dataset, numbers)
    [found] = find_key(dataset, key_of(0), "edges", buckets)
    wide = replace(found, size=(48, 24))
    [first, *_] = presentations(order, numbers, wide, key_of(0), 1)
    assert first.crop == tuple(crops(3, np.array([first.position]), np.array([[0, 16]]))[0].tolist())


def test_the_command_tells_what_was_seen_and_what_is_to_come(run, capsys):
    with open(run / "metrics.jsonl", "w") as file:
        file.write(json.dumps({"time": 0.5, "step": 10, "metrics": {"loss": 1.0}}) + "\n")
        file.write(json.dumps({"time": 0.6, "system": {}}) + "\n" + '{"time":0.7,"step":11,"met')
    entry = dict(attempt=0, shard="s", byte=0, part="png", error="CRC", substitute=key_of(7))
    (run / "bad-samples-0.jsonl").write_text(json.dumps(dict(position=40, key=key_of(1), **entry)) + "\n")
    assert steps_done(run) == 10
    assert main([key_of(7), "--run", str(run)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.endswith(("seen", "to come"))]
    assert [(int(row[2]), row[-1] == "seen") for row in rows] == [
        (position, position < 80) for position, _, _ in seen_by_the_loader(run)[key_of(7)]
    ]
    assert f"position 40: it stood in for {key_of(1)}" in text and "24 x 24 pixels" in text
    assert main([key_of(1), "--run", str(run), "--steps", "1"]) == 0
    assert f"position 40: it was bad (CRC), and replaced by {key_of(7)}" in capsys.readouterr().out


def test_a_sample_that_is_not_trained_on_says_why(run, capsys):
    assert main([key_of(24), "--run", str(run)]) == 0
    assert "not trained on: no caption, quarantined" in capsys.readouterr().out


def test_without_a_run_the_numbers_are_given(run, capsys):
    assert main([key_of(3), "--shards", str(run / "shards"), "--global-batch-size", "8", "--steps", "7"]) == 0
    assert capsys.readouterr().out.count("caption 0") == 2  # of the sample, and of its only presentation
    with pytest.raises(ValueError, match="give --run, or the shards with --global-batch-size and steps"):
        main([key_of(3)])


def test_an_unknown_key_is_status_1(run, capsys):
    assert main(["nobody", "--run", str(run)]) == 1
    assert "has the key 'nobody'" in capsys.readouterr().out
    assert hash64("nobody") not in load_index(index_path(run / "shards" / "shards-000000.tar")).samples["key_hash"]


def test_bench_counts_what_the_loader_read(run, capsys):
    speed = measure(open_dataset(run / "shards"), 2, condition_kind="edges", resolution=16, batch_size=8, seconds=0.2)
    assert speed.samples >= 8 and speed.samples % 8 == 0 and speed.substitutions == 0
    assert 0 < speed.cpu_seconds < 1 and speed.fetch_seconds > 0 and speed.decode_seconds > 0
    assert bench_main([str(run / "shards"), "--resolution", "16", "--threads", "1", "--seconds", "0.1"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert "condition edges, 16 px" in rows[0] and rows[-1].split()[0] == "1" and float(rows[-1].split()[1]) > 0
    for seconds in ("0", "nan"):
        with pytest.raises(SystemExit):
            bench_main([str(run / "shards"), "--seconds", seconds])
        assert f"argument --seconds: {seconds} is not" in capsys.readouterr().err
