"""Reads a dataset's files, whole or by byte range, from a directory or a URL. Imports no torch.

URLs are http(s)://, s3:// and gs://, read with fsspec, whose packages are ours only as the extra `remote` (for gs://, gcsfs
has to be installed too). What a URL gave is kept in a local directory of bounded size (`Cache`). The scheme decides which
code runs, so others are refused: fsspec and webdataset know some that run commands or read files of this machine.

Credentials are those of the libraries: AWS_* variables and files for s3, ~/.netrc and the proxy variables for http(s),
and for all of them fsspec's own configuration. Another S3 server than Amazon's is AWS_ENDPOINT_URL=https://host:port (or
FSSPEC_S3_ENDPOINT_URL); FSSPEC_S3='{"anon": true}' reads public buckets without an account.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from data_prep.cache import BlockCache, Cache, damage, default_directory, store
from data_prep.cli import InputError, log, one_line

SCHEMES = ("http", "https", "s3", "gs")
TRIES = 5
FIRST_DELAY = 0.5  # seconds before the second try; doubled before each further one
CONNECT_TIMEOUT = 20.0  # seconds
READ_TIMEOUT = 60.0  # seconds without a byte; ten times as long for a whole answer
WRONG_SUM = "sha256 differs from the recorded one"
REMEDY = "copy the file again or shard again"
_random = random.Random()  # not the global one: its state belongs to others


class DamagedBlock(InputError):
    """Bytes of a dataset are wrong or missing at their source: `what` names them, `reason` says how."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what, reason)
        self.what, self.reason = what, reason

    def __str__(self) -> str:
        return f"{self.what} is damaged ({self.reason}); {REMEDY}"


class Storage(Protocol):
    """The files of one dataset by their relative names. All methods may be called from several threads."""

    @property
    def location(self) -> str | Path:
        """What was opened, for messages: a path, or a URL without credentials and query."""

    def describe(self, name: str) -> str:
        """The file's path or URL, for messages."""

    def read_whole(self, name: str) -> bytes:
        """A whole file from its source. Raises FileNotFoundError, or OSError for what may pass."""

    def file(self, name: str, sha256: str) -> Path:
        """A local path of a whole file with the hexadecimal `sha256`: tokenizer and tables, of which there are few.

        Raises InputError if the file has another sum, OSError if it can't be read or its copy can't be written.
        """

    def small(self, name: str, sha256: str) -> bytes:
        """A whole small file with the hexadecimal `sha256`: an index, of which there are many.

        Raises DamagedBlock when the file is missing or has another sum, OSError for what may pass.
        """

    def read(self, name: str, offset: int, size: int, crc32: int, key: str) -> bytes:
        """`size` bytes at `offset` of the file whose content has the hexadecimal sum `key`.

        Raises DamagedBlock when the file is missing or too short or the bytes have another crc32, InputError when the server
        can't send ranges, OSError for what may pass (the network is down, an input error of the disk).
        """


def open_storage(location: str | Path, cache: Cache | None = None) -> Storage:
    """The storage behind a directory (where `cache` is not used) or a URL.

    Without a cache a URL gets one of 20 GB in the default directory. Raises InputError for other schemes and for missing
    packages.
    """
    if isinstance(location, Path) or not (found := re.match(r"([a-z][a-z0-9+.:-]*)://|pipe:", location, re.IGNORECASE)):
        return LocalStorage(Path(location))
    scheme = (found[1] or "pipe").lower()
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://" for each in SCHEMES)
        raise InputError(f"{redacted(location)}: {scheme} is not read here; give a path or a URL with {known}")
    try:
        _ = urlsplit(location).port  # half a password, where one holds such characters: it would get into messages
    except ValueError:
        reason = "no valid host and port; in a password write %2F for /, %3F for ?, %23 for #"
        raise InputError(f"{redacted(location)}: {reason}") from None
    if cache is None:
        cache = Cache(default_directory(), 20 * 10**9)
    try:
        return RemoteStorage(location, scheme, cache)
    except ImportError as error:
        package = "gcsfs" if scheme == "gs" else '-e ".[remote]"'
        raise InputError(f"{redacted(location)}: {one_line(error)}; pip install {package}") from None


class LocalStorage:
    """Files below a directory."""

    def __init__(self, path: Path) -> None:
        self.location = path
        self.file = lru_cache(maxsize=4096)(self._file)  # hashed once

    def describe(self, name: str) -> str:
        return str(self.location / name)

    def read_whole(self, name: str) -> bytes:
        return (self.location / name).read_bytes()

    def _file(self, name: str, sha256: str) -> Path:
        if file_sha256(self.location / name) != sha256:
            raise InputError(f"{self.describe(name)}: {WRONG_SUM}; {REMEDY}")
        return self.location / name

    def small(self, name: str, sha256: str) -> bytes:
        what = self.describe(name)
        try:
            data = (self.location / name).read_bytes()
        except FileNotFoundError:
            raise DamagedBlock(what, "file not found") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), what) from None
        if reason := _wrong_sum(data, sha256):
            raise DamagedBlock(what, reason)
        return data

    def read(self, name: str, offset: int, size: int, crc32: int, key: str) -> bytes:
        what = f"{self.describe(name)} at offset {offset}"
        try:
            with open(self.location / name, "rb") as stream:
                stream.seek(offset)
                data = stream.read(size)
        except FileNotFoundError:
            raise DamagedBlock(what, "file not found") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), what) from None
        if reason := damage(data, size, crc32):
            raise DamagedBlock(what, reason)
        return data


class RemoteStorage:
    """Files below a URL. What fails is tried again: proxies, and servers under load, fail in passing."""

    def __init__(self, url: str, scheme: str, cache: Cache) -> None:
        self.location = redacted(url)
        self._parts, self._scheme = urlsplit(url), scheme
        self._directory, self._cache = cache.directory, BlockCache(cache)
        # fsspec's objects don't survive a fork, so each process makes its own. A parent's object is kept all the same:
        # taking it down in the child would close the parent's connections, which hang on an epoll that both share.
        self._filesystem = lru_cache(maxsize=None)(self._connect)
        self._filesystem(os.getpid())  # a missing package is noticed here

    def _connect(self, pid: int) -> Any:
        import fsspec

        options: dict[str, Any] = {}
        if self._scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            timeout = ClientTimeout(10 * READ_TIMEOUT, connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
            headers = {"Accept-Encoding": "identity"}  # offsets are those of the file, not of a compressed answer
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True, "headers": headers}
        elif self._scheme == "s3":
            timeouts = {"connect_timeout": CONNECT_TIMEOUT, "read_timeout": READ_TIMEOUT}
            options["config_kwargs"] = {**timeouts, "retries": {"total_max_attempts": 1}}
        filesystem = fsspec.filesystem(self._scheme, skip_instance_cache=True, **options)
        filesystem.retries = 1  # s3fs: only we try again, else a server that hangs is waited for 25 times as often
        return filesystem

    def _url(self, name: str) -> str:
        return self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{name}", fragment="").geturl()

    def describe(self, name: str) -> str:
        return redacted(self._url(name))

    def read_whole(self, name: str) -> bytes:
        return self._fetch(name, self.describe(name), lambda data: None)

    def file(self, name: str, sha256: str) -> Path:
        path = self._directory / "files" / sha256
        with suppress(OSError):
            if not _wrong_sum(path.read_bytes(), sha256):
                return path
        try:
            data = self._fetch(name, self.describe(name), lambda data: _wrong_sum(data, sha256))
        except DamagedBlock as error:
            raise InputError(f"{error.what}: {error.reason}; {REMEDY}") from None
        try:
            store(path, data)
        except OSError as error:
            reason = f"{error.strerror}; {name} has to be kept there: make room, or set data.cache_dir to another directory"
            raise OSError(error.errno, reason, str(self._directory)) from None
        return path

    def small(self, name: str, sha256: str) -> bytes:
        return self._kept(sha256, sha256, name, self.describe(name), lambda data: _wrong_sum(data, sha256))

    def read(self, name: str, offset: int, size: int, crc32: int, key: str) -> bytes:
        what, limits = f"{self.describe(name)} at offset {offset}", {"start": offset, "end": offset + size}
        return self._kept(key, f"{key}-{offset}", name, what, lambda data: damage(data, size, crc32), **limits)

    def _kept(
        self, key: str, cached: str, name: str, what: str, problem: Callable[[bytes], str | None], **limits: int
    ) -> bytes:
        """`_fetch` through the cache, where the bytes are called `cached`; a missing file is damage."""
        path = self._directory / "blocks" / key[:2] / cached
        if (data := self._cache.get(path, problem)) is not None:
            return data
        try:
            data = self._fetch(name, what, problem, **limits)
        except FileNotFoundError:
            raise DamagedBlock(what, "file not found") from None
        self._cache.put(path, data)
        return data

    def _fetch(self, name: str, what: str, problem: Callable[[bytes], str | None], **limits: int) -> bytes:
        """The bytes of a file, all or from `start` to `end`. Raises DamagedBlock when `problem` keeps giving a reason."""
        failure: Exception
        for attempt in range(1, TRIES + 1):
            try:
                data: bytes = self._filesystem(os.getpid()).cat_file(self._url(name), **limits)
                if limits and len(data) > limits["end"] - limits["start"]:
                    raise InputError(f"{what}: the server ignores byte ranges; use one that sends them, or a local copy")
                if (reason := problem(data)) is None:
                    return data
                failure = DamagedBlock(what, reason)
            except InputError:
                raise
            except FileNotFoundError:
                raise FileNotFoundError(errno.ENOENT, "not found", what) from None
            except Exception as error:  # each library has its own
                reason = redacted(f"{type(error).__name__}: {one_line(error)}")
                if getattr(error, "status", None) == 416 or "not satisfiable" in reason:
                    failure = DamagedBlock(what, "the file ends before it")
                else:
                    failure = OSError(f"{what}: {reason} ({TRIES} tries); check server, network and credentials")
            if attempt < TRIES:
                # Spread, because the ranks of a run fail together and would come back together.
                delay = FIRST_DELAY * 2 ** (attempt - 1) * _random.uniform(0.5, 1.5)
                log(f"{what}: {reason}; try {attempt + 1} of {TRIES} in {delay:.1f} s")
                time.sleep(delay)
        raise failure


def _wrong_sum(data: bytes, sha256: str) -> str | None:
    return None if hashlib.sha256(data).hexdigest() == sha256 else WRONG_SUM


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def redacted(text: str) -> str:
    """The text with the user, password and query of its URLs left out.

    Up to the last @ before the query, or before the first slash: people's passwords hold @, /, # and ?, against the rules.
    """
    return re.sub(r"(?<=//)(?:[^\s?]*@|[^\s/]*@)|\?[^\s'\"]*", "", text)
