"""Downloads a file over HTTP where connections break, servers are busy and bytes may be wrong.

What has come stays in a file of its own, from which the next try, or the next process, goes on (`Range`). Whether old and
new bytes are of one file is not asked of the server (`If-Range`), because the md5 of the whole decides at the end: if it
is another the file is fetched anew. The standard library's client does; only HTTP handlers are given to it, so no URL,
and no redirect, can open a local file.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, TypeVar
from urllib import request
from urllib.error import HTTPError
from urllib.parse import urlsplit

from data_prep.cli import InputError, StopRequested, log

NCBI = "ftp.ncbi.nlm.nih.gov"  # the same files by https as by ftp
CHUNK_BYTES = 1 << 20
BUSY = (408, 425, 429)  # statuses below 500 after which trying again may help
LONGEST_DELAY = 60.0  # seconds, of our own
LONGEST_WAIT = 600.0  # seconds that a server may ask for by Retry-After

Result = TypeVar("Result")


class Broken(Exception):
    """A try failed for a reason that may pass; `wait` is how many seconds the server asks for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class DownloadFailed(Exception):
    """All tries failed. The message names the URL and the last reason."""


@dataclass
class Client:
    """Settings of all downloads; for any number of threads, each of which has one connection at a time."""

    retries: int = 5  # tries after the first, in a row, that bring a file no further
    backoff: float = 1.0  # seconds before the second try; doubled before each further one, and up to half less by chance
    timeout: float = 30.0  # seconds without a byte
    stop: threading.Event = field(default_factory=threading.Event)  # ends downloads with StopRequested
    received: int = 0  # bytes; threads may lose some of each other's, it is for people to look at

    def __post_init__(self) -> None:
        self._opener = request.OpenerDirector()
        for handler in (
            request.ProxyHandler(),  # what the *_proxy variables say
            request.HTTPHandler(),
            request.HTTPSHandler(),
            request.HTTPDefaultErrorHandler(),
            request.HTTPErrorProcessor(),
            _Redirects(),
        ):
            self._opener.add_handler(handler)

    def text(self, url: str, limit: int = 1 << 24) -> str:
        """A small text file. Raises like `file`, and InputError when it has more than `limit` bytes."""

        def read() -> bytes:
            with self._open(url, 0) as response:
                data = b"".join(self._chunks(url, response, limit))
            return data

        return self._again(url, read, lambda: 0).decode("utf-8", "replace")

    def file(self, url: str, path: Path, md5: str) -> None:
        """Complete `path`, which may hold the beginning of the file or not exist, and check its md5 (hexadecimal).

        Raises InputError for an answer that will stay (404), DownloadFailed after too many tries, StopRequested, and
        OSError when `path` can't be written.
        """

        def read() -> None:
            self._complete(url, path)
            found = md5_of(path)
            if found != md5:
                path.unlink()
                raise Broken(f"its md5 is {found}, but should be {md5}")

        self._again(url, read, lambda: path.stat().st_size if path.is_file() else 0)

    def _complete(self, url: str, path: Path) -> None:
        """One try to append what `path` lacks."""
        have = path.stat().st_size if path.is_file() else 0
        try:
            response = self._open(url, have)
        except _NothingMore:
            if have:
                return  # complete, or too long; the md5 tells
            raise
        with response, path.open("ab") as file:
            if response.status == 206:
                sent = response.headers.get("Content-Range", "")
                if not re.match(rf"bytes {have}-", sent):
                    raise Broken(f"answers bytes from {have} on with Content-Range {sent!r}")
            else:  # the server knows no ranges and sends all
                file.truncate(0)
            for chunk in self._chunks(url, response):
                file.write(chunk)

    def _open(self, url: str, start: int) -> HTTPResponse:
        headers = {"User-Agent": "dnabert2-data-prep", "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        with _network(url):
            response: HTTPResponse = self._opener.open(
                request.Request(check_url(url), headers=headers), timeout=self.timeout
            )
        return response

    def _chunks(self, url: str, response: HTTPResponse, limit: int | None = None) -> Iterator[bytes]:
        """The answer's body. Raises Broken when it ends early."""
        length, size = response.headers.get("Content-Length"), 0
        while True:
            if self.stop.is_set():
                raise StopRequested("downloads stopped")
            with _network(url):
                chunk = response.read1(CHUNK_BYTES)
            if not chunk:
                break
            size += len(chunk)
            self.received += len(chunk)
            if limit is not None and size > limit:
                raise InputError(f"{url}: has more than {limit:,} bytes; is it the right address?")
            yield chunk
        if length is not None and size != int(length):
            raise Broken(f"the connection ended after {size:,} of {int(length):,} bytes")

    def _again(self, url: str, action: Callable[[], Result], progress: Callable[[], int]) -> Result:
        """Try until it works. Tries that bring `progress` (bytes) further than ever don't count."""
        failures, best = 0, progress()
        while True:
            if self.stop.is_set():
                raise StopRequested("downloads stopped")
            try:
                return action()
            except Broken as error:
                failures = failures + 1 if progress() <= best else 1
                best = max(best, progress())
                if failures > self.retries:
                    raise DownloadFailed(f"{url}: {error} (gave up after {failures} failures in a row)") from None
                delay = min(self.backoff * 2 ** (failures - 1), LONGEST_DELAY) * random.uniform(0.5, 1)
                delay = max(delay, min(error.wait, LONGEST_WAIT))
                log(f"{url}: {error}; next try in {delay:.1f} s")
                self.stop.wait(delay)


def check_url(url: str) -> str:
    """The URL to open: http or https, or NCBI's ftp, which becomes https. Raises InputError for all others."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise InputError(f"{url!r}: not a URL ({error})") from None
    if not url.isascii() or re.search(r"[\s\x00-\x20\x7f]", url) or not host:
        raise InputError(f"{url!r}: not a URL; it has a host, and no spaces or letters beyond ASCII")
    if parts.scheme == "ftp" and host == NCBI:
        return parts._replace(scheme="https").geturl()
    if parts.scheme not in ("http", "https"):
        raise InputError(f"{url!r}: only http://, https:// and ftp://{NCBI} are fetched")
    return url


def md5_of(path: Path) -> str:
    """The md5 of a file, hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class _NothingMore(Broken):
    """The file has no bytes from the wanted one on."""


class _Redirects(request.HTTPRedirectHandler):
    """Follows a redirect only to what could have been given as a URL, and not from https to http."""

    def redirect_request(self, req: request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(check_url(newurl)).scheme == "http" and req.type == "https":
            raise InputError(f"{req.full_url}: redirects from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextmanager
def _network(url: str) -> Iterator[None]:
    """Errors of the network, not those of our disk, as Broken; statuses that will stay as InputError."""
    try:
        yield
    except HTTPError as error:
        error.close()
        if error.code == 416:
            raise _NothingMore(f"{error.code} {error.reason}") from None
        if error.code < 500 and error.code not in BUSY:
            raise InputError(f"{url}: {error.code} {error.reason}") from None
        raise Broken(f"{error.code} {error.reason}", _seconds(error.headers.get("Retry-After", ""))) from None
    except (OSError, HTTPException) as error:
        raise Broken(str(error) or type(error).__name__) from None


def _seconds(retry_after: str) -> float:
    """The header's value, a number of seconds or a date, as seconds from now."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return 0.0
