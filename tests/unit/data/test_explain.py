import json
from dataclasses import replace

import numpy as np
import pytest
import yaml
from loaders import make_loader
from repeated import write_repeated

from controlbooth.data.inspection.bench import measure
from controlbooth.data.inspection.explain import (
    find_samples,
    numbers_of_run,
    open_sources,
    order_of_run,
    steps_done,
    visits,
)
from controlbooth.data.order.draws import crops, hash64
from controlbooth.data.packing.pack import pack
from controlbooth.data.packing.sources import open_scenes
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.sidecar import (
    MISSING_CAPTION,
    QUARANTINED,
    index_path,
    load_index,
    make_index,
    write_index,
)
from controlbooth.launch.commands.data_bench import main as bench_main
from controlbooth.launch.commands.data_explain import main

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
    with make_loader(
        open_dataset(run / "shards"), seed=3, lanes=G, shards_per_block=2, global_batch_size=G, micro_batch_size=G,
        rank=0, world_size=1, condition="edges", resolution=16, prompt_dropout=0.5, random_flip=True,
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
    [found] = find_samples(dataset, key, "edges", buckets)
    return list(visits(order, numbers, found, 1))


def test_every_visit_that_the_loader_gives_is_foretold(run):
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
    [found] = find_samples(dataset, key_of(0), "edges", buckets)
    wide = replace(found, size=(48, 24))
    [first, *_] = visits(order, numbers, wide, 1)
    assert first.crop == tuple(crops(3, np.array([first.position]), np.array([[0, 16]]))[0].tolist())


def test_the_command_tells_what_was_seen_and_what_is_to_come(run, capsys):
    with open(run / "metrics.jsonl", "w") as file:
        file.write(json.dumps({"time": 0.5, "step": 10, "metrics": {"loss": 1.0}}) + "\n")
        file.write(json.dumps({"time": 0.6, "system": {}}) + "\n" + '{"time":0.7,"step":11,"met')
    first = run / "shards" / "shards-000000.tar"
    bad, other = (int(load_index(index_path(first)).samples["offset"][row]) for row in (1, 7))
    entry = dict(position=40, attempt=0, shard=str(first), byte=bad, key=key_of(1), part="png", error="CRC")
    entry |= dict(substitute=key_of(7), substitute_shard=str(first), substitute_byte=other)
    (run / "bad-samples-0.jsonl").write_text(json.dumps(entry) + "\n")
    assert steps_done(run) == 10
    assert main([key_of(7), "--run", str(run)]) == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.endswith(("seen", "to come"))]
    assert [(int(row[2]), row[-1] == "seen") for row in rows] == [
        (position, position < 80) for position, _, _ in seen_by_the_loader(run)[key_of(7)]
    ]
    assert f"position 40: it stood in for {first}:{key_of(1)}" in text and "24 x 24 pixels" in text
    assert main([key_of(1), "--run", str(run), "--steps", "1"]) == 0
    assert f"position 40: it was bad (CRC), and replaced by {first}:{key_of(7)}" in capsys.readouterr().out


def test_a_sample_that_is_not_trained_on_says_why(run, capsys):
    assert main([key_of(24), "--run", str(run)]) == 0
    assert "not trained on: no caption, quarantined" in capsys.readouterr().out


@pytest.fixture
def repeated(tmp_path):
    """A run on two sources of three shards each, with the same names of shards and of samples."""
    sources = [str(write_repeated(tmp_path / name, shards=3, seed=seed)) for name, seed in (("a", 1), ("b", 2))]
    data = dict(shards=None, condition="edges", lanes=None, shards_per_block=2, prompt_dropout=0.5)
    data |= dict(random_flip=True, random_crop=False, resolution=16, max_aspect_ratio=1.0, aspect_step=64)
    data |= dict(sources=[dict(shards=shards, weight=None, repeat=1) for shards in sources])
    tree = dict(seed=3, global_batch_size=4, max_steps=18, data=data)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path


def test_each_sample_of_a_key_is_told_and_shard_and_key_name_one(repeated, capsys):
    key = f"{2:09d}"
    assert main([key, "--run", str(repeated)]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"6 samples have the key '{key}'")
    paths = [str(repeated / name / f"{shard:05d}.tar") for name in "ab" for shard in range(3)]
    assert [line.partition(", ")[0] for line in told.splitlines() if line.startswith(key)] == [
        f"{key}: {path}" for path in paths
    ]
    prompts = {tuple(part.splitlines()[1:]) for part in told.split(f"{key}: ")[1:]}
    assert len(prompts) == 6  # each at its own positions, with its own draws
    assert main([f"b/00001.tar:{key}", "--run", str(repeated)]) == 0
    one = capsys.readouterr().out
    assert one.startswith(f"{key}: {paths[4]}, ") and one in told
    assert main([f"{paths[4]}:{key}", "--run", str(repeated)]) == 0 and capsys.readouterr().out == one
    assert main([f"00001.tar:{key}", "--run", str(repeated)]) == 0
    assert capsys.readouterr().out.startswith("2 samples have the key")
    assert main([f"00001.tar:{9:09d}", "--run", str(repeated)]) == 1


def test_of_very_many_samples_of_a_key_the_places_are_listed(tmp_path, capsys):
    write_repeated(tmp_path / "many", shards=12, per_shard=2)
    given = ["--shards", str(tmp_path / "many"), "--global-batch-size", "4", "--steps", "6"]
    assert main([f"{1:09d}", *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 13 and lines[1].startswith("  00000.tar:000000001, byte ")
    assert main([lines[5].split(",")[0].strip(), *given]) == 0
    assert "00004.tar, sample 1" in capsys.readouterr().out


def test_what_an_older_version_drew_is_not_told_wrongly(run):
    saved = run / "checkpoints" / "step-00000004"
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"order": {"version": 2, "weights": [[0, [59]]]}}))
    with pytest.raises(ValueError, match=f"the data order of {saved} has version 2, and this controlbooth draws by"):
        main([key_of(3), "--run", str(run)])


def test_without_a_run_the_numbers_are_given(run, capsys):
    assert main([key_of(3), "--shards", str(run / "shards"), "--global-batch-size", "8", "--steps", "7"]) == 0
    assert capsys.readouterr().out.count("caption 0") == 2  # of the sample, and of its only visit
    with pytest.raises(ValueError, match="give --run, or the shards with --global-batch-size and steps"):
        main([key_of(3)])


def test_an_unknown_key_is_status_1(run, capsys):
    assert main(["nobody", "--run", str(run)]) == 1
    assert "has the key 'nobody'" in capsys.readouterr().out
    assert hash64("nobody") not in load_index(index_path(run / "shards" / "shards-000000.tar")).samples["key_hash"]


def test_bench_counts_what_the_loader_read(run, capsys):
    speed = measure(open_dataset(run / "shards"), 2, condition="edges", resolution=16, batch_size=8, seconds=0.2)
    assert speed.samples >= 8 and speed.samples % 8 == 0 and speed.substitutions == 0
    assert 0 < speed.cpu_seconds < 1 and speed.fetch_seconds > 0 and speed.decode_seconds > 0
    assert bench_main([str(run / "shards"), "--resolution", "16", "--threads", "1", "--seconds", "0.1"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert "condition edges, 16 px" in rows[0] and rows[-1].split()[0] == "1" and float(rows[-1].split()[1]) > 0
    for seconds in ("0", "nan"):
        with pytest.raises(SystemExit):
            bench_main([str(run / "shards"), "--seconds", seconds])
        assert f"argument --seconds: {seconds} is not" in capsys.readouterr().err
