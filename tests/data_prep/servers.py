"""Real servers on 127.0.0.1 that tests read datasets from: one of files over HTTP that fails on demand, and one of S3."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class FileServer(ThreadingHTTPServer):
    """Serves a directory with byte ranges.

    Each request takes what `faults` gives next: an HTTP status, or "drop" (the connection, in mid-body), "wrong" (bytes),
    "short" (a byte less), "ignore range", "hang" (until the server ends). When it gives nothing the answer is right.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.requests: list[str] = []  # path and query of each
        self.faults: Iterator[str | int] = iter(())
        self.ending = threading.Event()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"  # connections are used again, as with real servers

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        fault = next(self.server.faults, None)
        path = self.server.directory / urlsplit(self.path).path.lstrip("/")
        self.close_connection = self.close_connection or fault in ("drop", "hang")
        if fault == "hang":
            self.server.ending.wait()
            return
        if isinstance(fault, int) or not path.is_file():
            self.send_error(fault if isinstance(fault, int) else 404)
            return
        data, status = path.read_bytes(), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and fault != "ignore range":
            if int(wanted[1]) >= len(data):
                self.send_error(416)
                return
            data, status = data[int(wanted[1]) : int(wanted[2]) + 1], 206
        if fault == "wrong":
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "short":
            data = data[:-1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "drop" else data)

    def log_message(self, *_: object) -> None:
        """Nothing: requests are counted, not printed."""


@contextmanager
def file_server(directory: Path) -> Iterator[FileServer]:
    with FileServer(directory) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ending.set()
            server.shutdown()
            thread.join()


@contextmanager
def s3_server() -> Iterator[str]:
    """An empty S3 server; gives its URL, for AWS_ENDPOINT_URL. Any key and secret will do."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()
