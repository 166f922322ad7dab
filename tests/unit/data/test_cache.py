"""One folder of shards for many processes: its limit, whom it serves, and what is left after a kill and a full disk."""

import fcntl
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from stores import web_server

from controlbooth.data.shards import cache as caches
from controlbooth.data.shards import storage
from controlbooth.data.shards.cache import Cache, CacheError
from controlbooth.data.shards.storage import RemoteShard, StorageError

SIZE = 1000


def content(number, size=SIZE):
    return random.Random(number).randbytes(size)


@pytest.fixture
def requests():
    """Paths that were asked for with GET, in order."""
    return []


@pytest.fixture
def url(requests):
    def note(handler):
        if handler.command == "GET":
            requests.append(handler.path)
        return False

    with web_server({f"/{i}.tar": content(i) for i in range(20)}, note) as address:
        yield address


def shard(url, number, folder=Path("indexes")):
    stat = storage.stat(f"{url}/{number}.tar")
    return RemoteShard(f"{url}/{number}.tar", stat.size, stat.etag, folder / f"{number}.idx")


def read(cache, shard):
    """-> the whole entry, and whether it was there."""
    with cache.pinned(shard) as (descriptor, hit):
        return os.pread(descriptor, shard.bytes + 1, 0), hit


def held(folder):
    """Bytes of everything in a cache folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def test_a_shard_is_fetched_once_and_then_read_from_disk(tmp_path, url, requests):
    cache = Cache(tmp_path / "cache", 10 * SIZE)
    one = shard(url, 1)
    assert not cache.holds(one)
    assert read(cache, one) == (content(1), False)
    assert read(cache, one) == (content(1), True) and cache.holds(one)
    assert read(Cache(tmp_path / "cache", 10 * SIZE), one) == (content(1), True)
    assert requests == ["/1.tar"]


def test_equal_base_names_in_different_folders_do_not_collide(tmp_path):
    files = {"/one/train/0.tar": content(1), "/two/train/0.tar": content(2)}
    with web_server(files) as url:
        cache = Cache(tmp_path, 10 * SIZE)
        shards = [shard(f"{url}/{name}/train", 0) for name in ("one", "two")]
        assert [read(cache, one)[0] for one in shards] == list(files.values())
        assert [read(cache, one) for one in shards] == [(data, True) for data in files.values()]


def test_the_least_recently_used_goes_first(tmp_path, url):
    cache = Cache(tmp_path, 3 * SIZE)
    shards = [shard(url, i) for i in range(5)]
    for i in (0, 1, 2, 0, 3, 0, 4):
        assert read(cache, shards[i])[0] == content(i)
        assert held(tmp_path) <= 3 * SIZE
    assert [cache.holds(one) for one in shards] == [True, False, False, True, True]


def test_a_pinned_entry_is_not_deleted_and_room_that_is_pinned_is_waited_for(tmp_path, url):
    cache = Cache(tmp_path, 2 * SIZE)
    shards = [shard(url, i) for i in range(3)]
    read(cache, shards[1])
    with cache.pinned(shards[0]) as (descriptor, _), cache.pinned(shards[1]), ThreadPoolExecutor(1) as pool:
        cache.prefetch(shards[2])  # which does not wait
        assert not cache.holds(shards[2]) and held(tmp_path) == 2 * SIZE
        waiting = pool.submit(read, Cache(tmp_path, 2 * SIZE), shards[2])
        time.sleep(0.3)
        assert not waiting.done()
        assert os.pread(descriptor, SIZE, 0) == content(0)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # unpins it; what is open stays readable
        assert waiting.result(timeout=20) == (content(2), False)
        assert os.pread(descriptor, SIZE, 0) == content(0)
    assert not cache.holds(shards[0]) and cache.holds(shards[1])


def test_room_that_does_not_come_is_an_error_with_the_remedy(tmp_path, url, monkeypatch):
    monkeypatch.setattr(caches, "NO_ROOM_SECONDS", 0.1)
    cache = Cache(tmp_path, SIZE)
    with cache.pinned(shard(url, 0)):
        with pytest.raises(CacheError, match=r"1000 of the 1000 bytes .*1.tar needs 1000. Raise data.cache_gib"):
            read(cache, shard(url, 1))
    assert read(cache, shard(url, 1))[0] == content(1)


def test_a_shard_above_the_limit_is_refused_at_once(tmp_path, url, requests):
    with pytest.raises(CacheError, match=r"0.tar has 1000 bytes, .* limited to 999. Raise data.cache_gib"):
        read(Cache(tmp_path, SIZE - 1), shard(url, 0))
    assert requests == []


def test_files_of_others_are_neither_counted_nor_deleted(tmp_path, url):
    (tmp_path / "notes.tar").write_bytes(bytes(5000))
    cache = Cache(tmp_path, SIZE)
    assert read(cache, shard(url, 0))[0] == content(0) and read(cache, shard(url, 1))[0] == content(1)
    assert (tmp_path / "notes.tar").stat().st_size == 5000


def test_many_threads_that_want_one_shard_fetch_it_once(tmp_path, url, requests):
    one = shard(url, 0)
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda _: read(Cache(tmp_path, 5 * SIZE), one), range(40)))
    assert {data for data, _ in seen} == {content(0)} and any(hit for _, hit in seen)
    assert requests == ["/0.tar"] and {path.suffix for path in tmp_path.iterdir()} == {".tar", ""}


def test_an_entry_that_was_cut_off_is_fetched_again(tmp_path, url, requests):
    cache = Cache(tmp_path, 5 * SIZE)
    one = shard(url, 0)
    read(cache, one)
    os.truncate(cache.path(one), 10)
    assert not cache.holds(one) and read(cache, one) == (content(0), False)
    cache.discard(one)
    assert read(cache, one) == (content(0), False) and requests == ["/0.tar"] * 3


def test_a_failed_fetch_leaves_nothing(tmp_path, url, monkeypatch):
    monkeypatch.setattr(storage, "ATTEMPTS", 2)
    monkeypatch.setattr(storage, "FIRST_DELAY_SECONDS", 0.001)
    one = shard(url, 0)
    gone = RemoteShard(one.uri.replace("0.tar", "99.tar"), one.bytes, one.etag, one.index)
    dead = RemoteShard("http://127.0.0.1:9/0.tar", one.bytes, one.etag, one.index)
    changed = RemoteShard(one.uri, one.bytes, "another version", one.index)
    for bad, kind in ((gone, FileNotFoundError), (dead, StorageError), (changed, ValueError)):
        with pytest.raises(kind):
            read(Cache(tmp_path, 5 * SIZE), bad)
    assert held(tmp_path) == 0


def test_waiting_for_another_fetch_ends_when_the_reader_is_closed(tmp_path, url):
    cache, one, closing = Cache(tmp_path, 5 * SIZE), shard(url, 0), threading.Event()
    with open(cache.path(one).with_suffix(".part"), "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        threading.Timer(0.1, closing.set).start()
        with pytest.raises(CacheError, match="as the reader was closed"):
            with cache.pinned(one, closing):
                pass


FETCH = """
import os, sys
from pathlib import Path
from controlbooth.data.shards import storage
from controlbooth.data.shards.cache import Cache
from controlbooth.data.shards.storage import RemoteShard
storage.CHUNK_BYTES = 100
folder, uri, size, etag, limit = sys.argv[1:]
shard = RemoteShard(uri, int(size), etag, Path("x"))
with Cache(Path(folder), int(limit)).pinned(shard) as (descriptor, hit):
    print(len(os.pread(descriptor, int(size), 0)))
"""


def fetch_command(folder, shard, limit):
    return [sys.executable, "-c", FETCH, str(folder), shard.uri, str(shard.bytes), shard.etag, str(limit)]


@pytest.mark.parametrize("same_shard", [True, False])
def test_a_process_killed_while_it_writes_leaves_no_half_shard_and_no_lost_room(tmp_path, same_shard):
    served, stop_at = [], threading.Event()

    def slow(handler):
        if "Range" in handler.headers and handler.path == "/0.tar" and not stop_at.is_set():
            served.append(handler.path)
            if len(served) > 4:
                stop_at.wait(60)  # in the middle of the shard, until it was killed
        return False

    with web_server({"/0.tar": content(0), "/1.tar": content(1)}, slow) as url:
        one = shard(url, 0)
        process = subprocess.Popen(fetch_command(tmp_path, one, SIZE))
        while len(served) < 5:
            assert process.poll() is None
            time.sleep(0.01)
        (part,) = tmp_path.glob("*.part")
        assert part.read_bytes()[:400] == content(0)[:400] and part.stat().st_size == SIZE
        process.send_signal(signal.SIGKILL)
        process.wait()
        stop_at.set()
        cache = Cache(tmp_path, SIZE)  # with room for one shard, which the dead process had reserved
        assert part.exists() and not cache.holds(one)
        wanted = one if same_shard else shard(url, 1)
        assert read(cache, wanted) == (content(0 if same_shard else 1), False)
        assert held(tmp_path) == SIZE and not part.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 64 KiB where this user may mount one; otherwise one in which no file may be so large."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield folder, None if mounted else 65536
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_a_message_and_not_half_a_file(small_disk):
    folder, file_limit = small_disk
    with web_server({"/0.tar": content(0, 100_000), "/1.tar": content(1)}) as url:
        limit = None if file_limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit,) * 2)
        command = fetch_command(folder, shard(url, 0), 10**6)
        done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)
        assert done.returncode == 1
        assert "CacheError: no room for the 100000 bytes of" in done.stderr
        assert f"0.tar in the cache {folder}" in done.stderr and "lower data.cache_gib" in done.stderr
        assert held(folder) == 0
        assert read(Cache(folder, 10**6), shard(url, 1))[0] == content(1)


SHARE = """
import os, random, sys
from pathlib import Path
from controlbooth.data.shards.cache import Cache
from controlbooth.data.shards.storage import RemoteShard
folder, seed, limit, *shards = sys.argv[1:]
shards = [RemoteShard(uri, 1000, etag, Path("x")) for uri, etag in (one.split() for one in shards)]
cache, choose = Cache(Path(folder), int(limit)), random.Random(seed)
hits = 0
for _ in range(150):
    number = choose.randrange(len(shards))
    with cache.pinned(shards[number]) as (descriptor, hit):
        data = os.pread(descriptor, 1001, 0)
        assert data == random.Random(number).randbytes(1000), (number, len(data))
    hits += hit
print(hits)
"""


@pytest.mark.slow
def test_processes_share_a_cache_smaller_than_the_data_set(tmp_path, url):
    shards = [shard(url, i) for i in range(8)]
    limit = 4 * SIZE
    named = [f"{one.uri} {one.etag}" for one in shards]
    run = [sys.executable, "-c", SHARE, str(tmp_path)]
    processes = [
        subprocess.Popen([*run, str(seed), str(limit), *named], stdout=subprocess.PIPE, text=True) for seed in (1, 2)
    ]
    most = 0
    while any(process.poll() is None for process in processes):
        with Cache(tmp_path, limit)._names():  # names do not change meanwhile
            most = max(most, held(tmp_path))
        time.sleep(0.002)
    assert [process.returncode for process in processes] == [0, 0]
    hits = [int(process.communicate()[0]) for process in processes]
    assert most == limit and all(30 < count < 150 for count in hits)
