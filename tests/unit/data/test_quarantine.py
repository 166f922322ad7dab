import fcntl
import json

import pytest
import yaml
from loaders import make_loader
from repeated import write_repeated

from controlbooth.data.inspection.ledger import read_ledgers
from controlbooth.data.inspection.quarantine import apply_changes, plan_changes
from controlbooth.data.loading.plan import order_state, plan_order, resume_position
from controlbooth.data.order.draws import hash64
from controlbooth.data.order.settings import OrderSettings
from controlbooth.data.packing.pack import pack
from controlbooth.data.packing.sources import open_scenes
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.data.shards.sidecar import index_path, load_index
from controlbooth.launch.commands.data_quarantine import main

G = 8
BAD = [3, 17, 18, 41]


@pytest.fixture
def shards(tmp_path):
    """Six shards of ten scenes, four of which have a flipped byte that the index does not know of."""
    out = tmp_path / "shards"
    assert pack(open_scenes(60, 0, 0, 16, ["edges"]), out, 10) == []
    for number in BAD:
        path = out / f"shards-{number // 10:06d}.tar"
        index = load_index(index_path(path))
        part = index.parts[number % 10][index.extensions.index("cond.edges.png")]
        data = bytearray(path.read_bytes())
        data[int(index.samples[number % 10]["offset"]) + int(part["offset"]) + 30] ^= 1
        path.write_bytes(data)
    return out


def train(shards, run, steps, start=0, rank=0, world_size=1):
    """Steps of a run without a model: the loader, and the ledger where a trainer puts it. Returns the keys."""
    run.mkdir(exist_ok=True, parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"shards": str(shards), "sources": []}}))
    with make_loader(
        open_dataset(shards), seed=0, lanes=G, shards_per_block=2, global_batch_size=G, micro_batch_size=1, rank=rank,
        world_size=world_size, condition="edges", resolution=16, prompt_dropout=0.0, random_flip=False,
        random_crop=False, num_train_timesteps=1000, latent_shape=(4, 2, 2), start_step=start, max_bad_rate=1.0,
        ledger_path=run / f"bad-samples-{rank}.jsonl",
    ) as loader:  # fmt: skip
        return [key for _ in range(steps) for batch in next(loader).micro_batches for key in batch.keys]


def order_of(dataset):
    return plan_order(dataset, OrderSettings(0, G, G, shards_per_block=2, condition="edges", resolution=16))[0]


def damage_first_picture(path):
    """Of a shard, in a byte that its index does not know of."""
    index = load_index(index_path(path))
    data = bytearray(path.read_bytes())
    part = index.parts[0][index.extensions.index("png")]
    data[int(index.samples["offset"][0]) + int(part["offset"]) + 30] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run(shards, tmp_path):
    train(shards, tmp_path / "run", 14)
    return tmp_path / "run"


def test_the_next_run_meets_none_of_the_bad_samples(shards, run, tmp_path, capsys):
    before = open_dataset(shards)
    noted = {entry["key"] for entry in read_ledgers(run)}
    assert len(noted) == 4
    assert main([str(run)]) == 0
    after = open_dataset(shards)
    text = capsys.readouterr().out
    assert f"the fingerprint changes from {before.fingerprint} to {after.fingerprint}" in text
    assert "4 flags change" in text and "56 usable samples" in text
    assert after.samples_per_shard("edges").tolist() == [9, 8, 10, 10, 9, 10]
    keys = train(shards, tmp_path / "next", 7)
    assert noted.isdisjoint(keys) and len(set(keys)) == 56 and read_ledgers(tmp_path / "next") == []


def test_a_run_that_began_before_is_refused_and_can_go_on_after_undo(shards, run, capsys):
    before = open_dataset(shards)
    state = order_state(order_of(before), before.fingerprint, 8)
    assert main([str(run)]) == 0
    assert "Runs that began before refuse to go on until: controlbooth data quarantine" in capsys.readouterr().out
    now = open_dataset(shards)
    with pytest.raises(ValueError, match="dataset_fingerprint"):
        resume_position(state, order_of(now), now.fingerprint)
    assert main([str(run), "--undo"]) == 0
    assert open_dataset(shards) == before


def test_a_dry_run_says_what_would_change_and_changes_nothing(shards, run, capsys):
    files = {path: path.read_bytes() for path in shards.iterdir()}
    assert main([str(run), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "4 bad samples in 3 shards" in text and "shards-000000.tar, byte " in text and "CRC" in text
    assert {path: path.read_bytes() for path in shards.iterdir()} == files


def test_a_second_quarantine_changes_nothing_more(shards, run, capsys):
    main([str(run)])
    fingerprint = open_dataset(shards).fingerprint
    assert main([str(run)]) == 0
    assert open_dataset(shards).fingerprint == fingerprint
    assert "0 flags change, 4 are as they should be already" in capsys.readouterr().out


def test_one_that_was_killed_between_two_shards_is_completed_by_the_next(shards, run):
    paths = sorted(shards.glob("*.tar"))
    apply_changes(plan_changes(read_ledgers(run), paths)[:1])
    with pytest.raises(ValueError, match="written anew after the manifest"):
        open_dataset(shards)
    assert main([str(run)]) == 0
    assert open_dataset(shards).samples_per_shard("edges").sum() == 56


def test_shards_without_a_manifest_are_flagged_too(shards, run):
    (shards / "manifest.jsonl").unlink()
    assert main([str(run)]) == 0
    assert open_dataset(shards).samples_per_shard().sum() == 56 and not (shards / "manifest.jsonl").exists()


def test_entries_that_a_resume_notes_again_are_one_event(shards, tmp_path):
    whole = tmp_path / "whole"
    train(shards, whole, 14)
    resumed = tmp_path / "resumed"
    train(shards, resumed, 9)
    for rank in range(2):  # from the checkpoint of step 4, and now on two ranks
        train(shards, resumed, 10, start=4, rank=rank, world_size=2)
    lines = sum(len(path.read_text().splitlines()) for path in resumed.glob("*.jsonl"))
    assert lines > len(read_ledgers(whole)) > 0
    assert read_ledgers(resumed) == read_ledgers(whole)


def test_a_line_that_a_kill_tore_is_passed_over_and_what_was_appended_to_it_is_read(run):
    ledger = run / "bad-samples-0.jsonl"
    lines = ledger.read_text().splitlines()
    entries = read_ledgers(run)
    ledger.write_text("\n".join([*lines[:2], lines[1][:25] + lines[2], *lines[3:], lines[0][:40]]))
    assert read_ledgers(run) == entries


def test_entries_of_shards_that_were_written_anew_are_left_alone_and_counted(shards, run, capsys):
    entry = next(entry for entry in read_ledgers(run) if entry["shard"].endswith("0.tar"))
    with open(run / "bad-samples-1.jsonl", "w") as file:
        file.write(json.dumps(entry | {"position": 9999, "byte": entry["byte"] + 512}) + "\n")
        file.write(json.dumps(entry | {"position": 9998, "byte": 0, "key": "other"}) + "\n")
    assert main([str(run)]) == 0
    assert "2 entries match no sample any more" in capsys.readouterr().out
    assert open_dataset(shards).samples_per_shard().sum() == 56
    index = load_index(index_path(shards / "shards-000000.tar"))
    assert index.samples["key_hash"][index.samples["flags"] > 0].tolist() == [hash64(entry["key"])]


def test_another_sample_that_was_written_to_the_place_under_the_same_key_is_left_alone(tmp_path, capsys):
    """As a table that is packed anew: its shards, keys and first bytes are those of before."""
    folder = write_repeated(tmp_path / "shards", shards=4)
    damage_first_picture(folder / "00002.tar")
    train(folder, tmp_path / "run", 3)
    assert len(read_ledgers(tmp_path / "run")) == 1
    write_repeated(folder, shards=4, seed=6)
    assert main([str(tmp_path / "run")]) == 0
    assert "1 entries match no sample any more" in capsys.readouterr().out
    assert open_dataset(folder).samples_per_shard().sum() == 24


def test_of_equal_keys_and_names_of_shards_only_the_bad_sample_is_flagged_also_where_it_was_moved(tmp_path):
    folder = write_repeated(tmp_path / "a", shards=4)
    damage_first_picture(folder / "00002.tar")
    train(folder, tmp_path / "run", 3)
    other = write_repeated(tmp_path / "b", shards=4, seed=6)
    folder.rename(tmp_path / "elsewhere")
    assert main([str(tmp_path / "run"), "--shards", f"{tmp_path}/[be]*/*.tar"]) == 0
    assert open_dataset(tmp_path / "elsewhere").samples_per_shard().tolist() == [6, 6, 5, 6]
    assert open_dataset(other).samples_per_shard().sum() == 24
    assert not load_index(index_path(tmp_path / "elsewhere" / "00002.tar")).usable().tolist().count(0)


def test_a_ledger_of_an_earlier_version_is_read_by_its_keys(shards, run):
    ledger = run / "bad-samples-0.jsonl"
    since = ("contents", "substitute_shard", "substitute_byte")
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    lines = [json.dumps({name: value for name, value in one.items() if name not in since}) for one in entries]
    ledger.write_text("\n".join(lines) + "\n")
    assert main([str(run)]) == 0
    assert open_dataset(shards).samples_per_shard().sum() == 56


def test_a_sample_whose_header_is_damaged_is_flagged_by_its_place(shards, tmp_path):
    path = shards / "shards-000005.tar"
    data = bytearray(path.read_bytes())
    data[int(load_index(index_path(path)).samples["offset"][7]) + 3] ^= 1
    path.write_bytes(data)
    train(shards, tmp_path / "run", 14)
    assert main([str(tmp_path / "run")]) == 0
    assert load_index(index_path(path)).usable().tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]


def test_nothing_is_changed_while_the_run_is_training(shards, run):
    with open(run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is training, and reads the indexes.*stop it first"):
            main([str(run)])
    assert main([str(run)]) == 0


def test_what_is_no_run_or_another_data_set_or_no_ledger_is_refused(shards, run, tmp_path, capsys):
    with pytest.raises(ValueError, match="holds no config.yaml, so it is no run"):
        main([str(tmp_path)])
    pack(open_scenes(10, 1, 0, 16, ["edges"]), tmp_path / "other", 10)
    with pytest.raises(ValueError, match="3 shards of the ledger are not in this data set, as .*--shards"):
        main([str(run), "--shards", str(tmp_path / "other")])
    (run / "bad-samples-1.jsonl").write_text('{"position": 1}\n')
    with pytest.raises(ValueError, match="bad-samples-1.jsonl, line 1 is no ledger entry, as it has no attempt"):
        main([str(run)])
    (run / "bad-samples-1.jsonl").write_text("hello\n")
    with pytest.raises(ValueError, match="line 1 is no ledger entry: 'hello'"):
        main([str(run)])
    for ledger in run.glob("*.jsonl"):
        ledger.unlink()
    assert main([str(run)]) == 0 and "no bad samples" in capsys.readouterr().out
