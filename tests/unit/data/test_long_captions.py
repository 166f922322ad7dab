from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset

from controlbooth.data.loading.long_captions import cut_captions_of, open_tokenizers
from controlbooth.data.shards.index import ensure_index
from controlbooth.launch.commands.data_lint import main as lint_main
from controlbooth.launch.commands.train import train

BASE = Path(__file__).parents[3] / "models" / "miniature"
LONG = "a red ball " * 12  # 36 words are more tokens than the 24 that this base reads


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten samples; the captions of two of them are too long, and those of one cannot be read."""
    place = tmp_path_factory.mktemp("set")
    png = cv2.imencode(".png", np.eye(64, dtype=np.uint8) * 255)[1].tobytes()
    with webdataset.TarWriter(str(place / "0.tar"), encoder=False) as writer:
        for number in range(10):
            caption = {3: LONG.encode(), 7: LONG.encode() * 2, 8: b"\xff"}.get(number, b"a red ball")
            writer.write({"__key__": f"k{number}", "png": png, "cond.edges.png": png, "txt": caption})
    ensure_index(place / "0.tar")
    return place


def test_captions_and_prompts_that_a_base_cuts_are_counted_and_the_longest_is_named(folder):
    told = cut_captions_of([str(folder)], BASE, ["a red ball", LONG])
    assert told is not None and "2 of 9 captions that were looked at have more than the 24 tokens" in told
    assert "that of 'k7'" in told and "the prompt 'a red ball a red ball" in told


def test_captions_that_fit_are_not_told(folder, tmp_path):
    (tmp_path / "0.tar").write_bytes(
        (folder / "0.tar").read_bytes().replace(LONG.encode(), b"a" + b" " * (len(LONG) - 1))
    )
    ensure_index(tmp_path / "0.tar")
    assert cut_captions_of([str(tmp_path)], BASE) is None


def test_lint_and_the_dry_run_tell_of_cut_captions(folder, tmp_path, capsys):
    assert lint_main([str(folder), "--tokenizer", str(BASE), "--workers", "1"]) == 1
    assert "cut captions: 1 " in capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(
        f"name: r\noutput: {tmp_path}/runs\nmax_steps: 1\nglobal_batch_size: 2\nmicro_batch_size: 2\n"
        f"model: {{base: miniature}}\ndata: {{shards: {folder}, condition: edges, resolution: 64}}\n"
    )
    assert train(str(tmp_path / "run.yaml"), processes=1, dry_run=True) == 0
    assert "warning: 2 of 9 captions that were looked at have more than the 24 tokens" in capsys.readouterr().err


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no tokenizer/"):
        open_tokenizers(tmp_path)
