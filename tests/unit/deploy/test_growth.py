"""What changed in a data set since a run, and whether an evaluation set is apart from it."""

import shutil

import pytest
from repeated import write_repeated

from controlbooth.data.pictures.images import encode_png
from controlbooth.data.scenes import render
from controlbooth.data.shards import manifest
from controlbooth.deploy.retrain import growth
from controlbooth.launch.commands import data_pack
from controlbooth.trainer.config.section import ConfigError


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """a: scenes 0 to 23 in two shards of twelve; b: scenes 24 to 35; other: twelve others."""
    root = tmp_path_factory.mktemp("packed")
    for name, seed, start, count in (("a", 0, 0, 24), ("b", 0, 24, 12), ("other", 7, 0, 12)):
        render = ["--scenes", str(count), "--seed", str(seed), "--start", str(start), "--size", "16"]
        arguments = [*render, "--condition", "edges", "--samples-per-shard", "12", "--workers", "1"]
        assert data_pack.main([*arguments, "-o", str(root / name)]) == 0
    return root


def put(source, target, number):
    """A shard of a pack under another number."""
    target.mkdir(exist_ok=True)
    first = sorted(source.glob("*.tar"))[number % 100]
    for suffix in (".tar", ".tar.idx"):
        shutil.copy2(first.with_name(first.stem + suffix), target / f"s-{number:03d}{suffix}")


@pytest.fixture
def growing(packed, tmp_path):
    put(packed / "a", tmp_path / "data", 0)
    put(packed / "a", tmp_path / "data", 1)
    return tmp_path / "data"


def since(before, growing):
    return growth.changes(before, growth.current(f"{growing}/*.tar"), "edges")


def test_a_first_state_is_all_new(growing):
    found = since([], growing)
    assert (found.now, found.before, found.new, found.gone, found.changed) == (24, 0, 24, (), ())


def test_a_frozen_state_comes_back_and_only_what_came_later_is_new(packed, growing, tmp_path):
    growth.freeze(growth.current(f"{growing}/*.tar"), tmp_path / "rounds" / "manifest.jsonl")
    before = growth.frozen(tmp_path / "rounds" / "manifest.jsonl")
    assert since(before, growing) == growth.Changes(now=24, before=24, new=0)
    put(packed / "b", growing, 100)
    assert since(before, growing) == growth.Changes(now=36, before=24, new=12)
    frozen = manifest.open_dataset(tmp_path / "rounds" / "manifest.jsonl")  # what a run sees has not grown
    assert int(frozen.samples_per_shard("edges").sum()) == 24
    assert growth.frozen(tmp_path / "none.jsonl") == []


def test_a_data_set_that_was_moved_has_not_changed(growing, tmp_path):
    before = growth.current(f"{growing}/*.tar").rows
    growing.rename(tmp_path / "elsewhere")
    assert since(before, tmp_path / "elsewhere") == growth.Changes(now=24, before=24, new=0)


def test_shards_that_are_gone_or_rewritten_are_said_and_count_for_nothing(packed, growing):
    before = growth.current(f"{growing}/*.tar").rows
    (growing / "s-000.tar").unlink()
    (growing / "s-000.tar.idx").unlink()
    shutil.copy2(packed / "b" / "shards-000000.tar", growing / "s-001.tar")
    shutil.copy2(packed / "b" / "shards-000000.tar.idx", growing / "s-001.tar.idx")
    found = since(before, growing)
    assert (found.now, found.new, found.gone_samples) == (12, 0, 12)
    assert found.gone[0].endswith("s-000.tar") and found.changed[0].endswith("s-001.tar")
    told = growth.describe(found)
    assert "SHRANK: 1 shards with 12 samples are gone" in told and "CHANGED: 1 old shards have other contents" in told


def test_sets_of_other_samples_are_apart(packed):
    growth.check_apart(growth.current(str(packed / "a")), growth.current(str(packed / "other")))
    growth.check_apart(growth.current(str(packed / "a")), growth.current(str(packed / "b")))


def test_a_shard_in_both_is_found_by_its_place(packed):
    one = growth.current(str(packed / "a" / "shards-000001.tar"))
    with pytest.raises(ConfigError, match="1 shards are in both, such as .*shards-000001.tar"):
        growth.check_apart(growth.current(str(packed / "a")), one)


def test_a_copy_under_another_name_is_found_by_its_pictures(packed, tmp_path):
    put(packed / "a", tmp_path / "held", 1)
    with pytest.raises(ConfigError, match="12 samples of .* have the same picture.*Take these samples out of one"):
        growth.check_apart(growth.current(str(packed / "a")), growth.current(f"{tmp_path / 'held'}/*.tar"))


def pack_some_scenes(out, seed, start, size):
    render = ["--scenes", "4", "--seed", str(seed), "--start", str(start), "--size", str(size)]
    assert data_pack.main([*render, "--condition", "edges", "--workers", "1", "-o", str(out)]) == 0
    return growth.current(str(out))


def test_pictures_that_were_encoded_anew_under_their_keys_and_captions_are_found_by_how_they_look(tmp_path):
    small, large = (pack_some_scenes(tmp_path / str(size), 0, 20, size) for size in (32, 48))
    with pytest.raises(ConfigError, match="4 of its samples have the key and the caption of .* show the same, encoded"):
        growth.check_apart(small, large)


def test_sets_whose_names_are_all_equal_are_apart_where_their_pictures_differ(tmp_path):
    """Also where all captions are equal, as with `data pack --caption`."""
    training, held = (write_repeated(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    growth.check_apart(growth.current(f"{training}/*.tar"), growth.current(f"{held}/*.tar"))
    sets = []
    for name, seed in (("training", 1), ("held", 2)):
        rows = []
        for i in range(6):
            (tmp_path / f"{seed}-{i}.png").write_bytes(encode_png(render.render(render.scene(seed, i), 32).image))
            rows.append(f"{seed}-{i}.png,a photo\n")
        (tmp_path / f"{name}.csv").write_text("image,caption\n" + "".join(rows))
        assert data_pack.main([str(tmp_path / f"{name}.csv"), "-o", str(tmp_path / name), "--workers", "1"]) == 0
        sets.append(growth.current(str(tmp_path / name)))
    growth.check_apart(*sets)
