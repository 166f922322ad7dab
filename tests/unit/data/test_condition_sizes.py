"""Lines that were packed at twice the size at which they are read, or more, are told with figures and a remedy."""

import json

import cv2
import numpy as np
import pytest

from controlbooth.data.conditions.sizes import lines_at, shrunk_lines, warnings
from controlbooth.data.shards.manifest import open_dataset
from controlbooth.launch.commands.data_lint import main as lint_main
from controlbooth.launch.commands.data_pack import main as pack_main
from controlbooth.launch.commands.train import train

SIDE = 192


def bricks(number):
    """Edges everywhere, six pixels apart."""
    rng = np.random.default_rng(number)
    picture = rng.integers(0, 256, (SIDE // 6, SIDE // 6, 3), np.uint8)
    return cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("bricks")
    for place in ("images", "conditions/mask"):
        (root / place).mkdir(parents=True)
    for number in range(20):
        cv2.imwrite(str(root / f"images/{number:02d}.png"), bricks(number))
        mask = cv2.circle(np.zeros((SIDE, SIDE), np.uint8), (80, 90), 50, 255, -1)
        cv2.imwrite(str(root / f"conditions/mask/{number:02d}.png"), mask)
    wanted = ["--condition", "canny", "--condition", "mask", "--condition", "blur", "--caption", "bricks"]
    assert pack_main([str(root), "-o", str(root / "shards"), *wanted]) == 0
    return root / "shards"


def test_lines_that_merge_are_told_with_figures_and_what_to_do(packed):
    told = shrunk_lines(open_dataset(packed), "canny", 32)
    assert told is not None and (told.packed, told.read) == (SIDE, 32) and 0.3 < told.lost < 1.0
    words = str(told)
    assert (
        "packed at 192 pixels" in words and "read at 32" in words and f"{told.lost:.0%} of the lines' length" in words
    )
    assert "data.condition=computed:canny" in words and "shorter side has 32 pixels" in words


@pytest.mark.parametrize(
    ("kind", "resolution"), [("canny", 97), ("canny", SIDE), ("mask", 32), ("blur", 32), ("computed:canny", 32)]
)
def test_what_keeps_its_lines_or_has_none_is_not_told(packed, kind, resolution):
    assert shrunk_lines(open_dataset(packed), kind, resolution) is None


def test_a_lone_outline_loses_nothing():
    outline = cv2.circle(np.zeros((SIDE, SIDE), np.uint8), (80, 90), 50, 255, 1)
    assert lines_at([outline], "canny", 32) is None and lines_at([], "canny", 32) is None


def test_lint_finds_them_where_it_is_told_the_resolution(packed, capsys):
    lint_main([str(packed), "--resolution", "32"])
    assert "shrunk lines: 1" in (printed := capsys.readouterr().out) and "computed:canny" in printed
    lint_main([str(packed), "--resolution", "97"])
    assert "shrunk lines" not in capsys.readouterr().out


def test_pack_says_where_lines_are_exact(packed, tmp_path, capsys):
    images = packed.parent / "images"
    assert pack_main([str(images), "-o", str(tmp_path), "--condition", "canny", "--caption", "bricks"]) == 0
    assert "condition canny is exact at data.resolution=192. At 96, the lines of" in capsys.readouterr().out


def test_a_dry_run_warns(packed, tmp_path, capsys):
    run = tmp_path / "run.yaml"
    data = dict(shards=str(packed), held_out=None, condition="canny", resolution=32)
    fields = dict(name="x", output=str(tmp_path), max_steps=1, global_batch_size=2, micro_batch_size=2, data=data)
    fields |= dict(model=dict(base="miniature", hint_channels=[16, 32, 64, 96]))
    run.write_text(json.dumps(fields))
    assert train(str(run), dry_run=True) == 0
    assert f"warning: {packed}: the lines of condition canny" in capsys.readouterr().err
    assert train(str(run), ["data.condition=computed:canny"], dry_run=True) == 0
    assert "warning" not in capsys.readouterr().err
    assert warnings([str(packed)], None, 32) == []
