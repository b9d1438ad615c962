"""Reading from directories, HTTP and S3: right bytes or a named error, from servers that fail, through a bounded cache."""

from __future__ import annotations

import errno
import gc
import hashlib
import multiprocessing
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest

from data_prep import cache as cache_module
from data_prep import storage as module
from data_prep.cli import InputError
from data_prep.dataset import Dataset
from data_prep.storage import Cache, DamagedBlock, Storage, open_storage, redacted
from tests.data_prep.servers import FileServer, file_server

SIZE, BLOCKS = 1000, 40  # of the file `shard.tar`
KEY = "ab" + 62 * "0"
DATA = np.random.default_rng(0).bytes(SIZE * BLOCKS)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setattr(module, "FIRST_DELAY", 0.001)
    monkeypatch.setattr(module, "READ_TIMEOUT", 0.5 if "hang" in request.node.name else 20.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "files"
    path.mkdir()
    (path / "shard.tar").write_bytes(DATA)
    return path


@pytest.fixture
def server(directory: Path) -> Iterator[FileServer]:
    with file_server(directory) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**6)


@pytest.fixture
def remote(server: FileServer, cache: Cache) -> Storage:
    return open_storage(server.url, cache)


def read(storage: Storage, block: int) -> bytes:
    return storage.read("shard.tar", block * SIZE, SIZE, zlib.crc32(expected(block)), KEY)


def expected(block: int) -> bytes:
    return DATA[block * SIZE : (block + 1) * SIZE]


def cached(cache: Cache) -> list[Path]:
    return sorted((cache.directory / "blocks").glob("*/*"))


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "memory://x", "pipe:cat x", "simplecache::s3://bucket/x", "FTP://host/x"]
)
def test_other_schemes_are_refused(location: str) -> None:
    with pytest.raises(InputError) as caught:
        open_storage(location)
    assert str(caught.value).startswith(location) and "http://, https://, s3://, gs://" in str(caught.value)


def test_a_plain_path_is_a_path_and_needs_no_fsspec(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "x").write_bytes(b"1")
    assert open_storage(str(tmp_path / "a:b")).read_whole("x") == b"1"
    code = "import sys; from data_prep.dataset import Dataset; Dataset(sys.argv[1]).split('train').read_block(0, 0); "
    code += "assert not {'fsspec', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(dataset)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("location", "package", "remedy"),
    [("http://127.0.0.1:1/x", "aiohttp", r'pip install -e "\.\[remote\]"'), ("gs://bucket/x", "gcsfs", "pip install gcsfs")],
)
def test_a_missing_package_is_named(location: str, package: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"{location}: .*{package}.*; {remedy}"):
        open_storage(location)


def test_local_files_are_checked(directory: Path) -> None:
    local = open_storage(directory)
    assert all(read(local, block) == expected(block) for block in range(BLOCKS))
    assert local.file("shard.tar", SHA256) == directory / "shard.tar"
    with pytest.raises(InputError, match=r"files/shard\.tar: sha256 differs"):
        local.file("shard.tar", KEY)
    assert local.small("shard.tar", SHA256) == DATA
    with pytest.raises(DamagedBlock, match=r"files/shard\.tar is damaged \(sha256 differs"):
        local.small("shard.tar", KEY)
    with pytest.raises(DamagedBlock, match=r"files/none\.tar is damaged \(file not found\)"):
        local.small("none.tar", KEY)
    for name, offset, reason in (
        ("shard.tar", 1, "crc32 differs"),
        ("shard.tar", len(DATA) - 10, "10 of 1000 bytes"),
        ("none.tar", 0, "file not found"),
    ):
        with pytest.raises(DamagedBlock, match=rf"files/{name} at offset {offset} is damaged \({reason}\)"):
            local.read(name, offset, SIZE, zlib.crc32(expected(0)), KEY)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/mem can't be read at 0")
def test_an_input_error_of_the_disk_is_no_damage(directory: Path) -> None:
    (directory / "broken.tar").symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=r"Input/output error: '.*broken\.tar at offset 0'"):
        open_storage(directory).read("broken.tar", 0, SIZE, 0, KEY)


@pytest.mark.parametrize("fault", ["drop", "wrong", "short", "hang", 500, 403])
def test_what_fails_once_is_tried_again(
    fault: str | int, remote: Storage, server: FileServer, capfd: pytest.CaptureFixture[str]
) -> None:
    server.faults = iter([fault])
    assert read(remote, 3) == expected(3)
    assert len(server.requests) == 2
    assert f"{server.url}/shard.tar at offset 3000: " in capfd.readouterr().err
    server.faults = iter([fault])
    assert Path(remote.file("shard.tar", SHA256)).read_bytes() == DATA
    server.faults = iter([fault])
    assert remote.small("shard.tar", SHA256) == DATA


@pytest.mark.parametrize("fault", ["drop", "hang", 503])
def test_what_may_pass_is_no_damage(fault: str | int, remote: Storage, server: FileServer, cache: Cache) -> None:
    server.faults = repeat(fault)
    with pytest.raises(OSError, match=r"shard\.tar at offset 0: .*5 tries"):
        read(remote, 0)
    assert len(server.requests) == module.TRIES
    with pytest.raises(OSError, match=r"shard\.tar: .*5 tries"):
        remote.small("shard.tar", SHA256)
    assert cached(cache) == []


def test_a_server_that_is_not_there(cache: Cache) -> None:
    with pytest.raises(OSError, match=r"manifest\.json: .*Cannot connect"):
        Dataset("http://127.0.0.1:1", cache)


@pytest.mark.parametrize("fault", ["wrong", "short"])
def test_bytes_that_stay_wrong_are_damage(fault: str, remote: Storage, server: FileServer, cache: Cache) -> None:
    server.faults = repeat(fault)
    with pytest.raises(DamagedBlock, match=r"shard\.tar at offset 0 is damaged"):
        read(remote, 0)
    with pytest.raises(InputError, match=r"shard\.tar: sha256 differs"):
        remote.file("shard.tar", SHA256)
    with pytest.raises(DamagedBlock, match=r"shard\.tar is damaged \(sha256 differs"):
        remote.small("shard.tar", SHA256)
    assert len(server.requests) == 3 * module.TRIES
    assert cached(cache) == [] and not (cache.directory / "files").exists()


def test_a_file_that_is_missing_or_too_short_is_damage(remote: Storage, server: FileServer) -> None:
    with pytest.raises(DamagedBlock, match=r"none\.tar at offset 0 is damaged \(file not found\)"):
        remote.read("none.tar", 0, SIZE, 0, KEY)
    with pytest.raises(DamagedBlock, match=r"none\.tar is damaged \(file not found\)"):
        remote.small("none.tar", SHA256)
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        remote.read_whole("none.tar")
    assert len(server.requests) == 3
    with pytest.raises(DamagedBlock, match="the file ends before it"):
        remote.read("shard.tar", len(DATA), SIZE, 0, KEY)


def test_a_server_without_ranges_is_named(remote: Storage, server: FileServer) -> None:
    server.faults = repeat("ignore range")
    with pytest.raises(InputError, match="the server ignores byte ranges") as caught:
        read(remote, 0)
    assert not isinstance(caught.value, DamagedBlock)
    assert len(server.requests) == 1


def test_messages_keep_secrets(server: FileServer, cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    url = server.url.replace("//", "//user:secret@") + "/?token=secret"
    remote = open_storage(url, cache)
    assert remote.read_whole("shard.tar") == DATA
    assert server.requests == ["/shard.tar?token=secret"]
    server.faults = repeat(500)
    with pytest.raises(OSError) as caught:
        remote.read_whole("shard.tar")
    messages = [str(caught.value), capfd.readouterr().err, remote.describe("shard.tar"), str(remote.location)]
    assert all("secret" not in message and server.url in message for message in messages)


@pytest.mark.parametrize("secret", ["user", "user:word", "user:wo@rd", "user:wo/rd", "us@er:wo#r/d@", "user:wo?rd"])
def test_no_user_or_password_is_left(secret: str) -> None:
    text = f"GET https://{secret}@host/some/file?token=word: 'no'; see s3://bucket/file and 1 //"
    assert redacted(text) == "GET https://host/some/file 'no'; see s3://bucket/file and 1 //"
    with pytest.raises(InputError, match=r"^ftp://host: ftp is not read here"):
        open_storage(f"ftp://{secret}@host")


@pytest.mark.parametrize("character", "/?#")
def test_a_password_that_ends_the_host_is_refused(character: str, cache: Cache) -> None:
    with pytest.raises(InputError, match=r"^https://host/x: no valid host and port; in a password write %2F"):
        open_storage(f"https://user:wo{character}rd@host/x", cache)


def test_blocks_are_fetched_once_and_damage_of_the_cache_is_mended(
    remote: Storage, server: FileServer, cache: Cache
) -> None:
    for _ in range(2):
        assert [read(remote, block) for block in range(3)] == [expected(block) for block in range(3)]
    assert len(server.requests) == 3
    first = cache.directory / "blocks" / "ab" / f"{KEY}-0"
    for damage in (first.unlink, lambda: first.write_bytes(b""), lambda: first.write_bytes(bytes(SIZE))):
        damage()
        assert read(remote, 0) == expected(0) == first.read_bytes()
    assert len(server.requests) == 6


def test_whole_files_are_fetched_once_and_damage_of_the_cache_is_mended(
    remote: Storage, server: FileServer, cache: Cache
) -> None:
    path = remote.file("shard.tar", SHA256)
    assert path == remote.file("shard.tar", SHA256) == cache.directory / "files" / SHA256
    assert len(server.requests) == 1
    path.write_bytes(DATA[:-1])
    assert remote.file("shard.tar", SHA256).read_bytes() == DATA
    assert len(server.requests) == 2


def test_small_files_are_kept_as_blocks_are(remote: Storage, server: FileServer, cache: Cache) -> None:
    assert [remote.small("shard.tar", SHA256) for _ in range(2)] == [DATA, DATA]
    assert len(server.requests) == 1
    path = cache.directory / "blocks" / SHA256[:2] / SHA256
    assert cached(cache) == [path] and not (cache.directory / "files").exists()
    path.write_bytes(DATA[:-1])
    assert remote.small("shard.tar", SHA256) == DATA == path.read_bytes()
    assert len(server.requests) == 2


def test_small_files_are_evicted_as_blocks_are(server: FileServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", (BLOCKS + 5) * SIZE)
    remote = open_storage(server.url, cache)
    remote.small("shard.tar", SHA256)
    os.utime(cached(cache)[0], (1, 1))
    for block in range(10):
        read(remote, block)
    assert not (cache.directory / "blocks" / SHA256[:2] / SHA256).exists()
    assert len(cached(cache)) == 10


def test_a_full_cache_is_not_looked_at_again_and_again(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path / "cache", BLOCKS * SIZE)
    remote = open_storage(server.url, cache)
    full = remote.file("shard.tar", SHA256)  # all of the limit, and never evicted
    looks: list[int] = []
    look = cache_module.BlockCache._look

    def counted(self: cache_module.BlockCache, room: int) -> None:
        looks.append(room)
        look(self, room)

    monkeypatch.setattr(cache_module.BlockCache, "_look", counted)
    for block in range(5):
        assert read(remote, block) == expected(block)
    assert looks == [SIZE] and cached(cache) == []
    full.unlink()
    now = time.monotonic()
    monkeypatch.setattr(cache_module.time, "monotonic", lambda: now + 2 * cache_module.PAUSE)
    read(remote, 0)
    assert len(looks) == 2 and len(cached(cache)) == 1


def test_the_cache_keeps_to_its_limit_and_what_was_used_last(server: FileServer, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 20 * SIZE)
    remote = open_storage(server.url, cache)
    read(remote, 0)
    old, new = (cache.directory / "blocks" / "ab" / name for name in (".old", ".new"))
    old.write_bytes(b"")
    new.write_bytes(b"")
    os.utime(old, (time.time() - 7200,) * 2)
    for block in range(1, 20):
        read(remote, block)
    for number, path in enumerate(cached(cache)):
        if not path.name.startswith("."):
            os.utime(path, (number, number))
    read(remote, 0)  # a hit: the oldest becomes the newest
    before = len(server.requests)
    for block in range(20, BLOCKS):
        read(remote, block)
        assert sum(path.stat().st_size for path in cached(cache)) <= cache.limit_bytes
        if block == 30:
            assert read(remote, 0) == expected(0)
    assert len(server.requests) == before + BLOCKS - 20
    assert new.exists() and not old.exists()  # another process may be writing the new one


def test_a_cache_that_cannot_be_written_costs_only_time(
    remote: Storage, server: FileServer, cache: Cache, capfd: pytest.CaptureFixture[str]
) -> None:
    cache.directory.mkdir()
    (cache.directory / "blocks").write_text("a file in the way")
    assert [read(remote, block) for block in (0, 0, 1)] == [expected(0), expected(0), expected(1)]
    assert remote.small("shard.tar", SHA256) == DATA
    assert len(server.requests) == 4
    assert capfd.readouterr().err.count("going on without keeping") == 1


def test_a_cache_below_a_plain_file(server: FileServer, cache: Cache, capfd: pytest.CaptureFixture[str]) -> None:
    cache.directory.write_text("a file in the way")
    remote = open_storage(server.url, cache)
    assert remote.small("shard.tar", SHA256) == DATA and read(remote, 0) == expected(0)
    assert capfd.readouterr().err.count("going on without keeping") == 1
    with pytest.raises(OSError, match=r"shard\.tar has to be kept there.* set data\.cache_dir .*/cache'"):
        remote.file("shard.tar", SHA256)


def test_a_disk_that_fills_up_does_not_end_a_run(
    dataset: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with file_server(dataset.parent) as server:
        split = Dataset(f"{server.url}/{dataset.name}", cache).split("train")
        monkeypatch.setattr(cache_module, "store", full)
        for row in range(len(split.shards)):
            split.read_block(row, 0)
    assert capfd.readouterr().err.count("going on without keeping") == 1


def test_an_index_over_http_is_damaged_or_missing(dataset: Path, cache: Cache) -> None:
    with file_server(dataset.parent) as server:
        split = Dataset(f"{server.url}/{dataset.name}", cache).split("train")
        server.requests.clear()
        assert split.describe_shard(0).endswith(".tar") and server.requests == []
        server.faults = repeat("wrong")
        with pytest.raises(DamagedBlock, match=r"http://.*\.index\.npy is damaged \(sha256 differs"):
            split.read_block(0, 0)
        server.faults = repeat(404)
        with pytest.raises(DamagedBlock, match=r"http://.*\.index\.npy is damaged \(file not found\)"):
            split.read_block(0, 0)
        server.faults = iter(())
        assert len(split.read_block(0, 0).lengths)


def test_threads_and_forked_processes_share_storage_and_cache(
    server: FileServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    remote = open_storage(server.url, Cache(tmp_path / "cache", 10 * SIZE))  # so small that all evict each other's blocks

    def reads(seed: int) -> None:
        blocks = np.random.default_rng(seed).integers(0, BLOCKS, 60).tolist()
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda block: read(remote, block), blocks)) == [expected(block) for block in blocks]
        gc.collect()

    reads(0)
    children = [multiprocessing.get_context("fork").Process(target=reads, args=(seed,)) for seed in (1, 2, 3)]
    for child in children:
        child.start()
    reads(4)
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    reads(5)
    assert "; try" not in capfd.readouterr().err  # no process closed another's connections


def test_a_url_without_a_cache_uses_the_users(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert open_storage(server.url).file("shard.tar", SHA256).parent == tmp_path / "home" / "dnabert2-datasets" / "files"


@pytest.fixture
def _account(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)


@pytest.mark.usefixtures("_account")
def test_s3_that_hangs_is_asked_as_often_as_others(
    server: FileServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.faults = repeat("hang")  # botocore and s3fs would each try again on their own
    with pytest.raises(OSError, match=r"s3://bucket/shard\.tar at offset 0: .*5 tries"):
        read(open_storage("s3://bucket", cache), 0)
    assert len(server.requests) == module.TRIES
