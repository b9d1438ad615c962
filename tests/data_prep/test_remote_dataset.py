"""Whole datasets read from URLs: the same as on disk, over HTTP and from S3."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import InputError
from data_prep.dataset import SPLITS, Dataset
from data_prep.storage import Cache, DamagedBlock
from tests.data_prep.servers import file_server, s3_server


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10**6)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for key, value in {"ACCESS_KEY_ID": "any", "SECRET_ACCESS_KEY": "any", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)


def same(one: Dataset, other: Dataset) -> None:
    assert one.sha256 == other.sha256 and one.tokenizer_path.read_bytes() == other.tokenizer_path.read_bytes()
    for split in map(one.split, SPLITS):
        again = other.split(split.name)
        assert np.array_equal(split.shards, again.shards)
        for row in range(len(split.shards)):
            for number in range(len(split.blocks(row))):
                left, right = split.read_block(row, number), again.read_block(row, number)
                assert np.array_equal(left.tokens, right.tokens) and np.array_equal(left.lengths, right.lengths)
                assert np.array_equal(left.source, right.source)


def test_a_dataset_over_http_is_the_same_and_stays_in_the_cache(dataset: Path, cache: Cache) -> None:
    with file_server(dataset.parent) as server:
        url = f"{server.url}/{dataset.name}/"
        same(Dataset(dataset), Dataset(url, cache))
        server.requests.clear()
        same(Dataset(dataset), Dataset(url, cache))
        assert server.requests == [f"/{dataset.name}/manifest.json"]


def test_a_dataset_on_s3_is_the_same(dataset: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    with s3_server() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("bucket")
        bucket.put(str(dataset), "bucket/some/dataset", recursive=True)
        remote = Dataset("s3://bucket/some/dataset", cache)
        same(Dataset(dataset), remote)
        with pytest.raises(InputError, match=r"s3://bucket/none/manifest\.json: not found"):
            Dataset("s3://bucket/none", cache)
        name = f"train/{int(remote.split('train').shards['shard'][0]):06d}.tar"
        with pytest.raises(DamagedBlock, match="the file ends before it"):
            remote.storage.read(name, 10**9, 1000, 0, 64 * "0")
        with pytest.raises(DamagedBlock, match="file not found"):
            remote.storage.read("train/none.tar", 0, 1000, 0, 64 * "0")
    split = remote.split("train")
    assert len(split.read_block(0, 0).lengths) == split.blocks(0)["sequences"][0]  # the server is gone, the cache is there
