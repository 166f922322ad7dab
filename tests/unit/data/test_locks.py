import errno
import fcntl
import json
import os
import time

import pytest

from controlbooth.data.files import locks
from controlbooth.data.files.locks import NO_LOCKS, NotALock, is_locked, know_locks, open_lock, take_lock, take_name
from controlbooth.data.shards.cache import Cache, CacheError
from controlbooth.data.shards.storage import RemoteShard
from controlbooth.deploy.retrain import lease
from controlbooth.deploy.retrain.rounds import Round, is_alive
from controlbooth.launch.commands.data_pack import main as pack
from controlbooth.trainer.engine.distributed import join, leave
from controlbooth.trainer.run.attempt import GIVEN, only_run
from controlbooth.trainer.tracking.mlflow_store import make_store

EVERY_ANSWER = pytest.mark.parametrize("number", sorted(set(NO_LOCKS)), ids=lambda number: errno.errorcode[number])


@pytest.fixture
def disk_says(monkeypatch):
    """Makes flock fail as a disk does; the folders that were told of are forgotten."""
    monkeypatch.setattr(locks, "_told", set())

    def says(number):
        def flock(file, operation):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    return says


def test_a_lock_is_held_by_one_and_seen_by_all_until_it_is_closed(tmp_path):
    path = tmp_path / ".lock"
    assert not is_locked(path)
    with open_lock(path) as ours, open_lock(path) as theirs:
        assert take_lock(ours, "") and take_lock(ours, "")
        assert not take_lock(theirs, "") and is_locked(path)
    assert not is_locked(path) and know_locks(tmp_path) and [one.name for one in tmp_path.iterdir()] == [".lock"]


def test_taking_a_lock_leaves_what_the_file_holds(tmp_path):
    path = tmp_path / "pack.jsonl"
    path.write_text("a line\n")
    with open_lock(path) as file:
        assert take_lock(file, "") and file.read() == "a line\n"


@pytest.mark.parametrize("what", ["link", "dangling link", "folder", "pipe"])
def test_what_is_no_file_of_its_own_is_no_lock_and_nothing_waits_for_it(tmp_path, what, monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    path = tmp_path / ".lock"
    if "link" in what:
        path.symlink_to(tmp_path / "other")
        if what == "link":
            (tmp_path / "other").write_text("somebody else's")
    elif what == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    assert not is_locked(path)  # a pipe that is opened as a file is would wait for ever
    with pytest.raises(NotALock, match=rf"{path} is (a symbolic link|no file), and a lock must be"):
        open_lock(path)
    assert slept == [] and (what != "dangling link" or not (tmp_path / "other").exists())


@EVERY_ANSWER
def test_a_disk_without_locks_is_named_once_and_gone_on_with(tmp_path, disk_says, capsys, number):
    disk_says(number)
    for _ in range(2):
        with open_lock(tmp_path / ".lock") as file:
            assert take_lock(file, "do this")
    assert capsys.readouterr().err == f"warning: the disk of {tmp_path} knows no locks: do this\n"
    assert not know_locks(tmp_path) and not is_locked(tmp_path / ".lock")


def test_a_disk_that_fails_is_heard(tmp_path, disk_says):
    disk_says(errno.EIO)
    with open_lock(tmp_path / ".lock") as file, pytest.raises(OSError, match="Input/output error"):
        take_lock(file, "")


def test_packing_a_run_and_a_new_store_go_on_without_locks(tmp_path, disk_says, capsys, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", GIVEN):
        monkeypatch.delenv(name, raising=False)
    disk_says(errno.ENOLCK)
    assert pack(["--scenes", "2", "--condition", "edges", "-o", str(tmp_path / "shards"), "--workers", "1"]) == 0
    world = join()
    try:
        for number in (1, 2):
            with only_run(tmp_path / "run", world) as attempt:
                assert attempt.number == number
    finally:
        leave()
    make_store(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")
    assert (tmp_path / "store" / "mlflow.db").is_file()
    said = [line for line in capsys.readouterr().err.splitlines() if "knows no locks" in line]
    assert [line.split()[4] for line in said] == [str(tmp_path / name) for name in ("shards", "run", "store")]


@EVERY_ANSWER
def test_a_cache_on_a_disk_without_locks_is_refused_in_one_sentence(tmp_path, disk_says, number):
    cache = Cache(tmp_path / "cache", 2**20)
    shard = RemoteShard("http://127.0.0.1:9/0.tar", 10, "", tmp_path / "0.tar.idx")
    disk_says(number)
    with (
        pytest.raises(CacheError, match=r"cache .*/cache knows no locks.*local disk in data.cache"),
        cache.pinned(shard),
    ):
        pass


@EVERY_ANSWER
def test_a_round_on_a_disk_without_locks_is_asked_for_by_its_process_alone(tmp_path, disk_says, number):
    (tmp_path / ".lock").touch()
    disk_says(number)
    one = Round(1, "training", str(tmp_path), "", 0.0, "", "", 1, "scratch", str(tmp_path))
    assert not is_alive(one)


def test_a_disk_without_hard_links_is_refused_by_name(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    (tmp_path / "made").write_text(json.dumps({}))
    assert take_name(tmp_path / "made", tmp_path / "name") and not take_name(tmp_path / "made", tmp_path / "name")
    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match=rf"knows no hard links.*another disk: '{tmp_path}'"):
        lease.take(tmp_path, 60.0)
