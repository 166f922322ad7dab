"""Ranges of bytes from real servers, and what is said when they fail."""

import errno
import json
import socket
import struct
import threading

import fsspec
import pytest
from stores import MotoStore, forget_stores, web_server

from controlbooth.data.shards import storage
from controlbooth.data.shards.storage import RemoteShard, StorageError

DATA = bytes(range(256)) * 40


@pytest.fixture(scope="module")
def store():
    moto = MotoStore()
    moto.start()
    yield moto
    moto.kill()


@pytest.fixture
def s3(store, monkeypatch):
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    forget_stores()
    yield store
    forget_stores()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between attempts, which are taken short here."""
    monkeypatch.setattr(storage, "FIRST_DELAY_SECONDS", 0.002)
    monkeypatch.setattr(storage, "ATTEMPTS", 5)


def answering(*answers):
    """A fault that gives these answers in turn, and then lets the server answer: a status, or a function."""
    left = list(answers)

    def fault(handler):
        if not left:
            return False
        answer = left.pop(0)
        if callable(answer):
            answer(handler)
        else:
            handler.send_response(answer)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
        return True

    fault.left = left
    return fault


def breaks_off(handler):
    """States 3 bytes, sends 1 and resets the connection."""
    handler.send_response(206)
    handler.send_header("Content-Length", "3")
    handler.end_headers()
    handler.wfile.write(b"x")
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True


def too_short(handler):
    """A whole answer with fewer bytes than were asked for."""
    handler.send_response(206)
    handler.send_header("Content-Length", "2")
    handler.end_headers()
    handler.wfile.write(b"xy")


def test_paths_are_not_uris_and_other_schemes_are_refused():
    assert not storage.is_remote("shards/a.tar") and not storage.is_remote("/a/b:c.tar")
    assert storage.is_remote("s3://bucket/a.tar") and storage.is_remote("https://host/a.tar")
    with pytest.raises(ValueError, match=r"ftp://host/a.tar: shards are read from .*https://, s3://.*not from ftp://"):
        storage.is_remote("ftp://host/a.tar")


def test_an_object_has_a_size_a_version_and_ranges(s3):
    uri = s3.put("bucket/dir/a.tar", DATA)
    stat = storage.stat(uri)
    assert stat.size == len(DATA) and len(stat.etag) == 32
    assert storage.read(uri, 250, 260) == DATA[250:260] and storage.read(uri, 0, len(DATA)) == DATA
    s3.put("bucket/dir/a.tar", DATA[::-1])
    assert storage.stat(uri).etag != stat.etag


def test_a_web_server_gives_the_same(s3):
    with web_server({"/dir/a.tar": DATA}) as url:
        assert storage.stat(f"{url}/dir/a.tar").size == len(DATA)
        assert storage.read(f"{url}/dir/a.tar", 250, 260) == DATA[250:260]


def test_google_storage_gives_the_same(monkeypatch):
    """Through a server that answers as Google's JSON API does, as there is none to install."""
    about = {"bucket": "bucket", "name": "dir/a.tar", "size": str(len(DATA)), "generation": "17", "etag": "x"}
    objects = "storage/v1/b/bucket/o"
    files = {
        f"/{objects}/dir%2Fa.tar": json.dumps(about).encode(),
        f"/download/{objects}/dir%2Fa.tar?alt=media": DATA,
    }
    with web_server(files) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        forget_stores()
        assert storage.stat("gs://bucket/dir/a.tar") == storage.ObjectStat(len(DATA), "17")
        assert storage.read("gs://bucket/dir/a.tar", 250, 260) == DATA[250:260]
        with pytest.raises(FileNotFoundError, match="gs://bucket/dir/gone.tar"):
            storage.stat("gs://bucket/dir/gone.tar")
    forget_stores()


def test_folders_and_globs_of_a_store_are_listed_in_order(s3):
    for name in ("b.tar", "a.tar", "notes.txt"):
        s3.put(f"listed/set/{name}", b"x")
    both = ["s3://listed/set/a.tar", "s3://listed/set/b.tar"]
    assert storage.find("s3://listed/set/") == storage.find("s3://listed/set") == both
    assert storage.find("s3://listed/*/*.tar") == both
    with pytest.raises(FileNotFoundError, match="no .tar shards.*s3://listed/other"):
        storage.find("s3://listed/other/")


def test_what_is_not_there_is_said_at_once(s3, caplog):
    s3.put("bucket/a.tar", b"x")
    with web_server({}) as url:
        for uri in ("s3://bucket/gone.tar", "s3://no-such-bucket/a.tar", f"{url}/a.tar"):
            with pytest.raises(FileNotFoundError, match=uri):
                storage.stat(uri)
            with pytest.raises(FileNotFoundError, match=uri):
                storage.read(uri, 0, 5)
    assert caplog.records == []  # each attempt after the first is told


@pytest.mark.parametrize("faults", [(503, 500), (429,), (breaks_off, breaks_off), (too_short, 408, too_short)])
def test_transient_faults_are_repeated_until_all_bytes_have_come(faults):
    fault = answering(*faults)
    with web_server({"/a.tar": DATA}, fault) as url:
        assert storage.read(f"{url}/a.tar", 10, 13) == DATA[10:13]
    assert fault.left == []


def test_a_size_is_asked_for_again_too():
    with web_server({"/a.tar": DATA}, answering(503, 503, 503, 503)) as url:  # a HEAD and a GET for each attempt
        assert storage.stat(f"{url}/a.tar").size == len(DATA)


@pytest.mark.parametrize("status", [400, 401, 403, 416])
def test_other_refusals_are_not_repeated(status):
    fault = answering(*[status] * 5)
    with web_server({"/a.tar": DATA}, fault) as url:
        with pytest.raises(StorageError, match=rf"{url}/a.tar: bytes 0 to 3 cannot be read .*{status}.*credentials"):
            storage.read(f"{url}/a.tar", 0, 3)
    assert len(fault.left) == 4


def test_spent_attempts_name_the_uri_their_number_and_the_remedy(caplog):
    fault = answering(*[503] * 20)
    with web_server({"/a.tar": DATA}, fault) as url:
        with pytest.raises(StorageError, match=rf"{url}/a.tar: .* in 5 attempts over .* s, .*503.*Check the network"):
            storage.read(f"{url}/a.tar", 0, 3)
    assert len(fault.left) == 15
    assert [record.args[-1] for record in caplog.records] == [0.002, 0.004, 0.008, 0.016]  # doubling, without jitter


def test_short_answers_are_never_passed_on():
    with web_server({"/a.tar": DATA}, answering(*[too_short] * 5)) as url:
        with pytest.raises(StorageError, match="in 5 attempts.*2 of 3 bytes came"):
            storage.read(f"{url}/a.tar", 0, 3)


def test_a_server_without_ranges_is_told_so():
    with web_server({"/a.tar": DATA}, ranges=False) as url:
        with pytest.raises(StorageError, match=r"asked for 3 bytes, the server sent 10240: .*nginx"):
            storage.read(f"{url}/a.tar", 0, 3)


def test_waiting_ends_when_the_reader_is_closed(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_DELAY_SECONDS", 60.0)
    waited = []

    class Closing(threading.Event):
        def wait(self, timeout=None):
            waited.append(timeout)
            threading.Timer(0.2, self.set).start()
            return super().wait(timeout)

    closing = Closing()
    with web_server({"/a.tar": DATA}, answering(503)) as url:
        with pytest.raises(StorageError, match="given up after 1 attempts, as the reader was closed"):
            storage.read(f"{url}/a.tar", 0, 3, closing)
    assert waited == [60.0]  # once, and for what ends with the closing


@pytest.mark.parametrize("chunk", [1, 700, 10240, 99999])
def test_a_shard_is_downloaded_and_read_through_whole_in_chunks_of_any_size(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(storage, "CHUNK_BYTES", chunk)
    data = DATA if chunk > 1 else DATA[:50]
    with web_server({"/a.tar": data}, answering(503, 503)) as url:
        stat = storage.stat(f"{url}/a.tar")
        shard = RemoteShard(f"{url}/a.tar", stat.size, stat.etag, tmp_path / "a.idx")
        with open(tmp_path / "copy", "wb+") as file:
            storage.download(shard, file.fileno())
            file.seek(0)
            assert file.read() == data
        with storage.open_sequential(shard) as file:
            file.seek(7)
            assert file.read(3) == data[7:10]
            file.seek(0)
            assert file.read() == data
            assert file.read(10) == b"" and storage.read(shard.uri, 5, 5) == b""


def test_another_version_than_the_indexed_one_is_refused(s3, tmp_path):
    uri = s3.put("bucket/changing.tar", DATA)
    stat = storage.stat(uri)
    s3.put("bucket/changing.tar", DATA[::-1])
    with open(tmp_path / "copy", "wb") as file:
        with pytest.raises(ValueError, match="s3://bucket/changing.tar has 10240 bytes and version .* it was indexed"):
            storage.download(RemoteShard(uri, stat.size, stat.etag, tmp_path / "a.idx"), file.fileno())


def test_equal_base_names_of_different_buckets_have_different_names():
    names = {
        storage.version_name(uri, size, etag)
        for uri in ("s3://one/train/0.tar", "s3://two/train/0.tar", "gs://one/train/0.tar")
        for size, etag in ((5, "a"), (5, "b"), (6, "a"))
    }
    assert len(names) == 9
    assert storage.base_name("https://host/dir/0.tar?signature=a/b") == "0.tar"


def test_a_missing_package_names_the_extra(monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 's3fs'", name="s3fs")

    monkeypatch.setitem(storage._OPEN, "s3", missing)
    forget_stores()
    with pytest.raises(StorageError, match=r's3:// needs .*s3fs.*pip install "controlbooth\[remote\]"'):
        storage.stat("s3://bucket/a.tar")
    forget_stores()


def test_error_numbers_of_a_busy_store_are_transient_and_those_of_a_disk_are_not():
    assert storage._is_transient(OSError(errno.EBUSY, "SlowDown"))
    assert not storage._is_transient(OSError(errno.ENOSPC, "full")) and not storage._is_transient(PermissionError())
