"""Writers that may write no more: a limit on the size of files ends in the errors that a full disk does."""

import errno
import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file

from controlbooth.trainer.run.attempt import Attempt, write_file, write_text
from controlbooth.trainer.run.disk_full import named_when_full

TENSORS = {"weight": torch.zeros(5000)}


@pytest.fixture
def narrow():
    """4096 bytes a file, until the test ends."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def copy_tree(made):
    source = made.parent.parent / "source"
    source.mkdir()
    for number in range(2):
        (source / f"{number}.bin").write_bytes(b"x" * 4096)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    shutil.copytree(source, made)


@pytest.mark.parametrize(
    "write",
    [
        lambda made: made.write_text("x" * 5000),
        lambda made: save_file(TENSORS, made),
        copy_tree,
    ],
)
def test_whatever_writes_to_a_full_disk_one_error_names_the_file_and_the_remedy(tmp_path, narrow, write):
    attempt, path = Attempt(tmp_path, 1, "id"), tmp_path / "subjects" / "rex" / "lora.safetensors"
    attempt.folder.mkdir()
    write_text(attempt, path, "before")
    with pytest.raises(OSError, match="File too large. What was finished is kept: make room") as caught:
        write_file(attempt, path, write)
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(path)
    assert path.read_text() == "before"


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError), named_when_full(tmp_path):
        raise KeyError("x")
    with pytest.raises(FileNotFoundError, match="nothing"), named_when_full(tmp_path):
        (tmp_path / "nothing").read_text()
