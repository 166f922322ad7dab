"""Commands that must know a sample, on shards in which all samples have the same names."""

import shutil

import cv2
import numpy as np
import pytest
from repeated import write_repeated

from controlbooth.data.shards.manifest import join_datasets, open_dataset
from controlbooth.launch.commands.data_order import main as order_main
from controlbooth.launch.commands.data_show import main as show_main
from controlbooth.trainer.config.section import ConfigError


@pytest.fixture
def shards(tmp_path):
    """Twelve samples of one name, in shards of their own."""
    return write_repeated(tmp_path / "shards", shards=12, per_shard=1, size=32)


def test_show_puts_each_sample_beside_its_own_conditions(shards, tmp_path):
    """The sheet is that of one shard in which each has its own name, but for the captions, which name the shards."""
    others, sheets = write_repeated(tmp_path / "others", shards=1, per_shard=12, size=32), []
    for folder in (shards, others):
        sheet = tmp_path / f"{folder.name}.png"
        kinds = ["--condition", "depth", "--condition", "edges", "--condition", "computed:canny_random"]
        given = ["--count", "6", "--columns", "1", "--resolution", "32", *kinds]
        assert show_main([str(folder), "-o", str(sheet), *given]) == 0
        sheets.append(cv2.imread(str(sheet))[14 + 6 :].reshape(6, 32 + 34 + 8, 4 * 32 + 8, 3)[:, : 32 + 4])
    assert np.array_equal(*sheets) and len({tile.tobytes() for tile in sheets[0]}) == 6


def test_order_names_shards_of_one_name_by_where_they_lie(shards, tmp_path, capsys):
    write_repeated(tmp_path / "more", shards=1, seed=2)
    assert order_main([f"{tmp_path}/*/00000.tar", "--global-batch-size", "7"]) == 0
    listed = {line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]}
    assert listed == {f"{tmp_path}/{name}/00000.tar" for name in ("more", "shards")}


def test_held_out_samples_have_the_edges_and_masks_of_their_own_pictures(shards, tmp_path):
    from controlbooth.trainer.evaluation.held_out import load_held_out

    held = load_held_out(open_dataset(shards), 12, "depth", 32)
    assert len(set(held.keys)) == 1 and len(set(held.places)) == 12
    named = load_held_out(open_dataset(write_repeated(tmp_path / "named", 1, 12, size=32)), 12, "depth", 32)
    assert held.edges is not None and named.edges is not None
    assert {target.tobytes(): edges.tobytes() for target, edges in zip(held.targets, held.edges, strict=True)} == {
        target.tobytes(): edges.tobytes() for target, edges in zip(named.targets, named.edges, strict=True)
    }


def test_a_copy_of_a_trained_shard_is_no_held_out_one_and_equal_names_are_no_matter(shards, tmp_path):
    from controlbooth.trainer.controlnet.data import check_held_out

    held = write_repeated(tmp_path / "held", shards=2, seed=2)
    training = join_datasets([open_dataset(shards), open_dataset(write_repeated(tmp_path / "more", seed=3))])
    check_held_out(training, open_dataset(held))
    for suffix in (".tar", ".tar.idx"):
        shutil.copy(shards / f"00001{suffix}", held / f"copy{suffix}")
    with pytest.raises(ConfigError, match="copy.tar of data.held_out holds the same samples as .*00001.tar"):
        check_held_out(training, open_dataset(held))
