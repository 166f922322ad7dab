"""Real servers on this machine for shards: moto's S3, and plain HTTP with byte ranges and with faults on request."""

import contextlib
import os
import re
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec

from controlbooth.data.shards import storage

SIGNATURE = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
"""moto wants to know who writes, and does not check it."""


class MotoStore:
    """moto's S3 server as a process of its own, so that it can be killed. It keeps its objects in memory.

    Clients reach it through a port that is open only while all objects are there: a store that comes back has not
    forgotten them.
    """

    def __init__(self) -> None:
        self.port, self._inner_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.objects: dict[str, bytes] = {}
        self.process: subprocess.Popen | None = None
        self._door: socketserver.ThreadingTCPServer | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What points the S3 clients of a process here."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def start(self) -> None:
        """Starts it, again after a kill with the objects that it had."""
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._inner_port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._inner_port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < until and self.process.poll() is None, "moto's server did not start"
                time.sleep(0.1)
        for name, data in self.objects.items():
            self._write(name, data)
        self._door = forward(self.port, self._inner_port)

    def kill(self) -> None:
        if self._door is not None:
            self._door.shutdown()
            self._door.server_close()
            self._door = None
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def put(self, name: str, data: bytes) -> str:
        """name: bucket/key. Returns the URI."""
        self.objects[name] = data
        self._write(name, data)
        return f"s3://{name}"

    def put_folder(self, folder: Path, name: str) -> str:
        """Uploads the tars of a folder; -> the URI of the folder."""
        for path in sorted(folder.glob("*.tar")):
            self.put(f"{name}/{path.name}", path.read_bytes())
        return f"s3://{name}/"

    def _write(self, name: str, data: bytes) -> None:
        self._request("PUT", name.split("/")[0], b"")
        self._request("PUT", name, data)

    def _request(self, method: str, name: str, data: bytes) -> None:
        headers = {"Content-Type": "application/x-tar", "Authorization": SIGNATURE}
        request = urllib.request.Request(f"http://127.0.0.1:{self._inner_port}/{name}", data, headers, method=method)
        urllib.request.urlopen(request, timeout=20).close()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def forward(port: int, to: int) -> socketserver.ThreadingTCPServer:
    """Passes connections to `port` on to the port `to`, until its shutdown(); connections end with the other side."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            try:
                other = socket.create_connection(("127.0.0.1", to))
            except OSError:
                return
            with other:
                back = threading.Thread(target=pump, args=(other, self.request), daemon=True)
                back.start()
                pump(self.request, other)
                back.join()

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True
        block_on_close = False
        request_queue_size = 64

    server = Server(("127.0.0.1", port), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def forget_stores() -> None:
    """Lets the next read see a changed environment."""
    storage._store.cache_clear()
    for scheme in ("s3", "gs", "http"):
        fsspec.get_filesystem_class(scheme).clear_instance_cache()


@contextmanager
def web_server(
    files: dict[str, bytes], fault: Callable[[BaseHTTPRequestHandler], bool] | None = None, ranges: bool = True
) -> Iterator[str]:
    """Serves files over HTTP/1.1; -> its address. fault(handler) may answer a request itself, and then returns True."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(body=True)

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def answer(self, body: bool) -> None:
            if fault is not None and fault(self):
                return
            data = files.get(self.path)
            if data is None:
                self.send_response(404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if ranges else None
            part = data[int(wanted[1]) : int(wanted[2]) + 1] if wanted else data
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", f'"{storage.version_name(self.path, len(data), str(hash(data)))}"')
            self.end_headers()
            if body:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
