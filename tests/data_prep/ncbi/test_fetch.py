"""Downloads from a real HTTP server that breaks connections, sends wrong bytes and is busy; killed processes go on."""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_prep.__main__ import run
from data_prep.cli import InputError
from data_prep.inputs.bgzip import open_at
from data_prep.inputs.genomes import find_genomes
from data_prep.ncbi.download import check_url
from data_prep.ncbi.fetch import find_sum
from tests.data_prep.conftest import random_bases, wrapped

TEXT = b">chr1 whole\n" + wrapped(random_bases(1, 300_000), 80)
Fault = str | int


class Mirror(ThreadingHTTPServer):
    """Serves genomes beside their md5checksums.txt as NCBI does, and fails as told.

    A request for a path takes the next of its `faults`: a status, "drop" (in mid-body), "wrong" (bytes), "hang" (in
    mid-body), "no range", "drop whole" (both), "redirect URL", "wait" (until two requests do).
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.always: dict[str, Fault] = {}
        self.requests: list[tuple[str, str]] = []  # path and Range
        self.times: list[float] = []
        self.headers: dict[str, str] = {}  # sent with statuses
        self.together = threading.Barrier(2)
        self.waiting = self.most = 0
        self.lock, self.hanging, self.ending = threading.Lock(), threading.Event(), threading.Event()

    def add(self, name: str, text: bytes = TEXT) -> None:
        """A genome `name`, in two gzip members."""
        data = gzip.compress(text[:1000], 1) + gzip.compress(text[1000:], 1)
        self.files[f"/{name}/{name}_genomic.fna.gz"] = data
        sums = f"{'0' * 32}  ./{name}_rna_from_genomic.fna.gz\n{hashlib.md5(data).hexdigest()}  ./{name}_genomic.fna.gz\n"
        self.files[f"/{name}/md5checksums.txt"] = sums.encode()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}/{name}_genomic.fna.gz"

    def asked(self, name: str) -> list[str]:
        """Range of each request for a genome."""
        return [wanted for path, wanted in self.requests if path == f"/{name}/{name}_genomic.fna.gz"]


class Handler(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range", "")
        server.requests.append((self.path, wanted))
        server.times.append(time.monotonic())
        faults = server.faults.get(self.path)
        fault = faults.pop(0) if faults else server.always.get(self.path)
        data = server.files.get(self.path)
        if isinstance(fault, int) or data is None:
            self.send_response(fault if isinstance(fault, int) else 404)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            return
        if isinstance(fault, str) and fault.startswith("redirect"):
            self.send_response(302)
            self.send_header("Location", fault.split()[1])
            self.end_headers()
            return
        start = (
            int(found[1])
            if (found := re.fullmatch(r"bytes=(\d+)-", wanted)) and fault not in ("no range", "drop whole")
            else 0
        )
        if start and start >= len(data):
            self.send_error(416)
            return
        if fault == "wait":
            with server.lock:
                server.waiting += 1
                server.most = max(server.most, server.waiting)
            server.together.wait(10)
            time.sleep(0.05)  # for a third, which must not come
            with server.lock:
                server.waiting -= 1
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        body = data[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "wrong":
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        self.wfile.write(body[: len(body) // 2] if fault in ("drop", "drop whole", "hang") else body)
        if fault == "hang":
            self.wfile.flush()
            server.hanging.set()
            server.ending.wait()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.ending.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def command(tmp_path: Path, mirror: Mirror) -> Callable[..., list[str]]:
    """`command(*names)` is the command line for a catalog of these genomes; the folder is `tmp_path / "out"`."""

    def make(*names: str, **others: str) -> list[str]:
        lines = ["category\tspecies\taccession\turl\tfile"]
        for name in names:
            lines.append(f"Bacteria\tThe {name}\tGCF_{name}\t{others.get(name, mirror.url(name))}\tBacteria/{name}.fna.gz")
        (tmp_path / "catalog.tsv").write_text("\n".join(lines) + "\n")
        return ["fetch", "--catalog", str(tmp_path / "catalog.tsv"), "--out", str(tmp_path / "out"), "--backoff", "0.001"]

    return make


def check_stored(out: Path, *names: str) -> None:
    """The folder holds these genomes whole, their indices and records, and nothing unfinished."""
    for name in names:
        path = out / f"Bacteria/{name}.fna.gz"
        assert gzip.decompress(path.read_bytes()) == TEXT
        assert b"".join(open_at(path, 200_000)) == TEXT[200_000:]
    assert [genome.name for genome in find_genomes(out)] == sorted(names)
    rows = [line.split("\t") for line in (out / "fetched.tsv").read_text().splitlines()]
    assert [row[0] for row in rows[1:]] == [f"Bacteria/{name}.fna.gz" for name in sorted(names)]
    for row in rows[1:]:
        data = (out / row[0]).read_bytes()
        assert dict(zip(rows[0], row, strict=True))["stored_sha256"] == hashlib.sha256(data).hexdigest()
    left = {path.name for path in out.rglob("*") if path.is_file()}
    assert left == {"fetched.tsv", ".fetch.lock", *(f"{name}.fna.gz{end}" for name in names for end in ("", ".gzi"))}


Command = Callable[..., list[str]]


def test_genomes_are_stored_once_and_recorded(
    tmp_path: Path, mirror: Mirror, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        mirror.add(name)
    assert run([*command("one", "two"), "--json"]) == 0
    check_stored(tmp_path / "out", "one", "two")
    size = len(mirror.files["/one/one_genomic.fna.gz"])
    result = json.loads(capsys.readouterr().out)
    assert (result["genomes"], result["fetched"], result["bytes"]) == (2, 2, 2 * size)
    line = (tmp_path / "out/fetched.tsv").read_text().splitlines()[1].split("\t")
    assert line[1:6] == [
        "The one",
        "GCF_one",
        mirror.url("one"),
        find_sum(mirror.files["/one/md5checksums.txt"].decode(), "one_genomic.fna.gz"),
        str(size),
    ]

    requests = len(mirror.requests)
    assert run(command("one", "two")) == 0
    assert len(mirror.requests) == requests
    (tmp_path / "out/Bacteria/one.fna.gz").write_bytes(b"short")
    (tmp_path / "out/Bacteria/two.fna.gz.gzi").unlink()
    assert run(command("one", "two")) == 0
    assert len(mirror.asked("one")) == len(mirror.asked("two")) == 2
    check_stored(tmp_path / "out", "one", "two")


def test_goes_on_where_the_connection_broke(tmp_path: Path, mirror: Mirror, command: Command) -> None:
    mirror.add("one")
    path = "/one/one_genomic.fna.gz"
    size = len(mirror.files[path])
    mirror.faults = {path: ["drop", 503, "drop"], "/one/md5checksums.txt": ["drop", 500]}
    assert run([*command("one"), "--retries", "2"]) == 0
    half = size // 2
    later = half + (size - half) // 2
    assert mirror.asked("one") == ["", f"bytes={half}-", f"bytes={half}-", f"bytes={later}-"]
    check_stored(tmp_path / "out", "one")


def test_progress_sets_the_count_of_tries_back(tmp_path: Path, mirror: Mirror, command: Command) -> None:
    mirror.add("one")
    mirror.faults["/one/one_genomic.fna.gz"] = ["drop"] * 8
    assert run([*command("one"), "--retries", "1"]) == 0
    check_stored(tmp_path / "out", "one")


def test_a_server_without_ranges_sends_all_again(tmp_path: Path, mirror: Mirror, command: Command) -> None:
    mirror.add("one")
    mirror.faults["/one/one_genomic.fna.gz"] = ["drop", "no range"]
    assert run(command("one")) == 0
    check_stored(tmp_path / "out", "one")
    mirror.add("two")
    mirror.always["/two/two_genomic.fna.gz"] = "drop whole"
    assert run([*command("two"), "--retries", "2"]) == 1
    assert len(mirror.asked("two")) == 3  # that the first brought something new does not count for ever


def test_wrong_bytes_are_fetched_again(tmp_path: Path, mirror: Mirror, command: Command) -> None:
    mirror.add("one")
    mirror.faults["/one/one_genomic.fna.gz"] = ["wrong", "drop"]
    assert run(command("one")) == 0
    half = len(mirror.files["/one/one_genomic.fna.gz"]) // 2
    assert mirror.asked("one") == ["", "", f"bytes={half}-"]
    check_stored(tmp_path / "out", "one")


def test_what_stays_wrong_is_an_error_and_the_others_come(
    tmp_path: Path, mirror: Mirror, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "three"):
        mirror.add(name)
    mirror.always = {"/one/one_genomic.fna.gz": "wrong", "/three/three_genomic.fna.gz": 503}
    line = [*command("one", "two", "three"), "--retries", "2", "--connections", "1"]
    assert run(line) == 1
    assert [len(mirror.asked(name)) for name in ("one", "two", "three")] == [3, 1, 3]
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        rf"The one \(GCF_one\): {mirror.url('one')}: its md5 is \w+, but should be \w+ \(gave up after 3 .*", lines[-3]
    )
    assert lines[-2].startswith(f"The three (GCF_three): {mirror.url('three')}: 503 Service Unavailable")
    assert "2 of 3 genomes were not fetched" in lines[-1]
    check_stored(tmp_path / "out", "two")
    mirror.always = {}
    assert run(line) == 0
    check_stored(tmp_path / "out", "one", "two", "three")
    assert len(mirror.asked("two")) == 1


def test_a_missing_file_is_bad_input_and_the_others_come(
    tmp_path: Path, mirror: Mirror, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "three"):
        mirror.add(name)
    del mirror.files["/one/one_genomic.fna.gz"], mirror.files["/three/md5checksums.txt"]
    mirror.files["/two/md5checksums.txt"] += b"\n"
    assert run(command("one", "two", "three", "four")) == 2
    assert len(mirror.asked("one")) == 1
    errors = capsys.readouterr().err
    assert f"The one (GCF_one): {mirror.url('one')}: 404 Not Found" in errors
    assert re.search(rf"The three \(GCF_three\): http.*/three/md5checksums.txt: 404 .* \({mirror.url('three')}\)", errors)
    assert "3 of 4 genomes were not fetched" in errors
    check_stored(tmp_path / "out", "two")


def test_a_file_without_a_sum_is_not_trusted(
    tmp_path: Path, mirror: Mirror, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror.add("one")
    mirror.files["/one/md5checksums.txt"] = b"0123  ./another_one_genomic.fna.gz\n"
    assert run(command("one")) == 2
    assert "has no md5 of one_genomic.fna.gz" in capsys.readouterr().err
    assert not mirror.asked("one")


def test_a_damaged_file_whose_sum_is_right_is_told(
    tmp_path: Path, mirror: Mirror, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror.add("one")
    data = mirror.files["/one/one_genomic.fna.gz"][:-9]
    mirror.files["/one/one_genomic.fna.gz"] = data
    mirror.files["/one/md5checksums.txt"] = f"{hashlib.md5(data).hexdigest()}  ./one_genomic.fna.gz\n".encode()
    assert run(command("one")) == 2
    assert f"{mirror.url('one')}: the gzip data is truncated, although its md5 is right" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out/Bacteria").iterdir()} == {"one.fna.gz.partial"}


@pytest.mark.parametrize("when", [lambda: "1", lambda: formatdate(time.time() + 2, usegmt=True)])
def test_waits_as_long_as_the_server_asks(mirror: Mirror, command: Command, when: Callable[[], str]) -> None:
    mirror.add("one")
    mirror.faults["/one/md5checksums.txt"] = [429]
    mirror.headers["Retry-After"] = when()  # dates have no fractions of seconds
    assert run(command("one")) == 0
    assert mirror.times[1] - mirror.times[0] >= 0.9


def test_connections_are_bounded(tmp_path: Path, mirror: Mirror, command: Command) -> None:
    names = [f"g{number}" for number in range(6)]
    for name in names:
        mirror.add(name)
        mirror.always[f"/{name}/{name}_genomic.fna.gz"] = "wait"  # for a second connection: two there are
    assert run([*command(*names), "--connections", "2", "--retries", "0"]) == 0
    assert mirror.most == 2
    check_stored(tmp_path / "out", *names)


@contextmanager
def started(line: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-m", "data_prep", *line], stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_killed_process_goes_on(
    tmp_path: Path, mirror: Mirror, command: Command, number: signal.Signals, status: int
) -> None:
    mirror.add("one")
    mirror.add("two")
    mirror.faults["/two/two_genomic.fna.gz"] = ["hang"]
    half = len(mirror.files["/two/two_genomic.fna.gz"]) // 2
    partial = tmp_path / "out/Bacteria/two.fna.gz.partial"
    with started([*command("one", "two"), "--connections", "1", "--timeout", "6"]) as process:
        assert mirror.hanging.wait(30)
        while not partial.is_file() or partial.stat().st_size < half:
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(30) == status
    with (tmp_path / "out/fetched.tsv").open("a") as record:
        record.write("Bacteria/two.fna.gz\tThe two\tGCF")  # what a crash can leave of a line
    (tmp_path / "out/Bacteria/.two.fna.gz.new").write_bytes(b"the beginning")
    assert run(command("one", "two")) == 0
    assert mirror.asked("two") == ["", f"bytes={half}-"]
    assert mirror.asked("one") == [""]
    check_stored(tmp_path / "out", "one", "two")


@pytest.mark.parametrize(("kept", "ranges"), [(None, 1), (b"0" * 10**6, 2)])
def test_a_complete_or_too_long_partial_file(
    tmp_path: Path, mirror: Mirror, command: Command, kept: bytes | None, ranges: int
) -> None:
    """Killed before it was stored; or of another version of the file."""
    mirror.add("one")
    line = command("one")
    (tmp_path / "out/Bacteria").mkdir(parents=True)
    (tmp_path / "out/Bacteria/one.fna.gz.partial").write_bytes(kept or mirror.files["/one/one_genomic.fna.gz"])
    assert run(line) == 0
    assert len(mirror.asked("one")) == ranges
    check_stored(tmp_path / "out", "one")


def test_errors_of_the_disk_are_not_tried_again(
    tmp_path: Path, mirror: Mirror, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror.add("one")
    line = command("one")
    partial = tmp_path / "out/Bacteria/one.fna.gz.partial"
    partial.mkdir(parents=True)
    assert run(line) == 1
    assert len(mirror.asked("one")) == 1
    assert f"The one (GCF_one): {partial}: Is a directory" in capsys.readouterr().err


def test_a_second_process_keeps_out(
    tmp_path: Path, mirror: Mirror, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    mirror.add("one")
    line = command("one")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out/.fetch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(line) == 2
    assert "another `fetch` is writing here" in capsys.readouterr().err
    assert run(line) == 0


def test_redirects_go_only_to_what_is_allowed(tmp_path: Path, mirror: Mirror, command: Command) -> None:
    mirror.add("one")
    mirror.files["/elsewhere"] = mirror.files["/one/one_genomic.fna.gz"]
    mirror.faults["/one/one_genomic.fna.gz"] = [
        "redirect file:///etc/passwd",
        "redirect ftp://127.0.0.1/x",
        "redirect /elsewhere",
    ]
    assert run(command("one")) == 2
    assert run(command("one")) == 2
    assert run(command("one")) == 0
    check_stored(tmp_path / "out", "one")


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("https://example.org/a/b.gz", "https://example.org/a/b.gz"),
        ("ftp://ftp.ncbi.nlm.nih.gov/genomes/x.gz", "https://ftp.ncbi.nlm.nih.gov/genomes/x.gz"),
        ("ftp://example.org/x.gz", None),
        ("file:///etc/passwd", None),
        ("FILE://localhost/etc/passwd", None),
        ("data:text/plain,x", None),
        ("s3://bucket/x.gz", None),
        ("/etc/passwd", None),
        ("https:///x.gz", None),
        ("https://example.org/a b.gz", None),
        ("https://example.org/a\r\nHost: x", None),
        ("https://[::1/x.gz", None),
        ("https://example.org:x/x.gz", None),
    ],
)
def test_urls(url: str, opened: str | None) -> None:
    if opened is None:
        with pytest.raises(InputError):
            check_url(url)
    else:
        assert check_url(url) == opened


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x\tGCF_1\tfile:///etc/passwd\tx.fna.gz", "line 3 (x): 'file:///etc/passwd': "),
        ("x\tGCF_1\thttps://h/x\t../x.fna.gz", "line 3 (x): '../x.fna.gz': paths in manifests are relative"),
        ("x\tGCF_1\thttps://h/x\t/etc/x.fna.gz", "line 3 (x): '/etc/x.fna.gz': paths in manifests are relative"),
        ("x\tGCF_1\thttps://h/x\tfetched.tsv", "line 3 (x): file 'fetched.tsv' must be a name that ends with .fna.gz"),
        ("x\tGCF_1\thttps://h/x\tBacteria/ONE.fna.gz", "line 3 (x): Bacteria/ONE.fna.gz stands twice"),
        ("x\tGCF_1\thttps://h/x\tBacteria//one.fna.gz", "line 3 (x): file 'Bacteria//one.fna.gz' must be a name"),
        ("x\tGCF_1\thttps://h/x\tBacteria/./one.fna.gz", "line 3 (x): file 'Bacteria/./one.fna.gz' must be a name"),
        ("x\tGCF_1\thttps://h/x\t.hidden/x.fna.gz", "line 3 (x): file '.hidden/x.fna.gz' must be a name"),
        ("x\tGCF_1\thttps://h/x", "line 3 (x): file '' must be a name"),
    ],
)
def test_a_bad_catalog_is_refused_before_anything_is_fetched(
    tmp_path: Path, mirror: Mirror, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    path = tmp_path / "catalog.tsv"
    path.write_text(f"species\taccession\turl\tfile\nThe one\tGCF_one\t{mirror.url('one')}\tBacteria/one.fna.gz\n{line}\n")
    assert run(["fetch", "--catalog", str(path), "--out", str(tmp_path / "out")]) == 2
    assert f"{path}: {message}" in capsys.readouterr().err
    assert not mirror.requests
    assert not (tmp_path / "out").exists()


def test_genomes_of_another_catalog_are_named(
    tmp_path: Path, mirror: Mirror, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two"):
        mirror.add(name)
    assert run(command("one")) == 0
    assert run(command("two")) == 0
    assert "Bacteria/one.fna.gz (1 in all) came from another catalog, and stay" in capsys.readouterr().err
    check_stored(tmp_path / "out", "one", "two")
