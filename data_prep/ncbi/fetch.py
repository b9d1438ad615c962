"""Downloads the genomes of a catalog into a folder that the other commands read, each checked and then kept as BGZF.

    OUT/<category>/<species>.fna.gz          BGZF: gzip that can be read from any place on (see inputs/bgzip.py)
    OUT/<category>/<species>.fna.gz.gzi      its index
    OUT/<category>/<species>.fna.gz.partial  what has come of a download that is not complete
    OUT/fetched.tsv                          a row a genome: where it came from and its sums, written when it is in place

The sum is the one in NCBI's `md5checksums.txt`, which lies beside each genome. A genome with a row in `fetched.tsv` is
not fetched again; whatever else happened to a process, the same command goes on from what is there.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

from data_prep.cli import InputError, StopRequested, add_verb, fsync_directory, log, one_line, progress, write_atomically
from data_prep.dataset import safe_join
from data_prep.inputs.bgzip import compress, index_path
from data_prep.inputs.fasta import DamagedGzip, read_chunks
from data_prep.inputs.genomes import PARTIAL
from data_prep.ncbi.download import Client, DownloadFailed, check_url

NEEDED = ("species", "accession", "url", "file")  # columns of the catalog
SUMS = "md5checksums.txt"
RECORD = "fetched.tsv"
NEWS = 15.0  # seconds after which a line tells that bytes still come
GRACE = 1.0  # seconds that threads get to leave when asked to stop; a partial file is good wherever it ends


class Item(NamedTuple):
    """A line of the catalog."""

    species: str
    accession: str
    url: str
    file: str  # path below the folder


class Row(NamedTuple):
    """A genome that is in place: a line of fetched.tsv."""

    file: str
    species: str
    accession: str
    url: str
    md5: str  # of what was downloaded
    bytes: str
    stored_sha256: str  # of the BGZF file
    stored_bytes: str


class Record:
    """OUT/fetched.tsv. A line is appended when its genome is in place; one that a crash cut off is dropped at the start."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / RECORD
        self.rows: dict[str, Row] = {}
        self._lock = threading.Lock()
        lines = self.path.read_text("utf-8").splitlines(keepends=True) if self.path.is_file() else []
        for line in lines[1:]:
            cells = line.rstrip("\n").split("\t")
            if line.endswith("\n") and len(cells) == len(Row._fields):
                self.rows[cells[0]] = Row(*cells)
        self.tidy()

    def tidy(self) -> None:
        """Write the file anew, in the order of paths."""
        lines = [Row._fields, *(self.rows[file] for file in sorted(self.rows))]
        write_atomically(self.path, "".join("\t".join(line) + "\n" for line in lines).encode())

    def add(self, row: Row) -> None:
        """Record a genome, durably."""
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            self.rows[row.file] = row
            file.write("\t".join(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def has(self, item: Item) -> bool:
        """Whether the genome is in place."""
        row, path = self.rows.get(item.file), self.root / item.file
        return (
            row is not None
            and (row.accession, row.url) == (item.accession, item.url)
            and path.is_file()
            and str(path.stat().st_size) == row.stored_bytes
            and index_path(path).is_file()
        )


def read_catalog(path: Path) -> list[Item]:
    """The catalog's lines. Raises InputError naming the line that can't be fetched or would leave the folder."""
    lines = path.read_text("utf-8").splitlines()
    header = lines[0].split("\t") if lines else []
    if missing := [name for name in NEEDED if name not in header]:
        raise InputError(f"{path}: has no column {', '.join(missing)}; `python -m data_prep catalog` writes catalogs")
    items: dict[str, Item] = {}
    for number, line in enumerate(lines[1:], 2):
        cells = dict(zip(header, line.split("\t"), strict=False))
        item = Item(*(cells.get(name, "") for name in NEEDED))
        try:
            check_url(item.url)
            safe_join(Path(), item.file)
        except InputError as error:
            raise InputError(f"{path}: line {number} ({item.species}): {error}") from None
        # Each file has one way to be written then, and none is hidden from those who read genomes.
        odd = any(not part or part.startswith(".") for part in item.file.split("/"))
        if odd or not item.file.endswith(".fna.gz") or not item.file.isprintable():
            raise InputError(
                f"{path}: line {number} ({item.species}): file {item.file!r} must be a name that ends with .fna.gz, in "
                "folders if it is to be, with no part that is empty or begins with a dot"
            )
        if item.file.casefold() in items:
            raise InputError(f"{path}: line {number} ({item.species}): {item.file} stands twice in the catalog; remove one")
        items[item.file.casefold()] = item
    if not items:
        raise InputError(f"{path}: lists no genome")
    return list(items.values())


def fetch_one(item: Item, root: Path, client: Client) -> Row:
    """Download, check and store one genome; raises what `Client.file` does."""
    target = safe_join(root, item.file)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    folder, _, name = item.url.rpartition("/")
    md5 = find_sum(client.text(f"{folder}/{SUMS}"), name)
    if md5 is None:
        raise InputError(f"{folder}/{SUMS}: has no md5 of {name}; is the catalog's URL right?")
    client.file(item.url, partial, md5)
    try:
        sha256, size = store(partial, target, client.stop)
    except DamagedGzip as damage:
        raise InputError(f"{item.url}: {damage}, although its md5 is right; tell who serves it") from None
    return Row(item.file, item.species, item.accession, item.url, md5, str(partial.stat().st_size), sha256, str(size))


def find_sum(table: str, name: str) -> str | None:
    """The md5 of the file `name` in the text of an md5checksums.txt."""
    for line in table.splitlines():
        md5, _, path = line.partition(" ")
        if path.strip().removeprefix("./") == name:
            return md5.lower()
    return None


def store(source: Path, target: Path, stop: threading.Event) -> tuple[str, int]:
    """Write a gzip or plain file as BGZF with its index, atomically; its sha256 and size in bytes."""

    def chunks() -> Iterator[bytes]:
        for chunk in read_chunks(source):
            if stop.is_set():
                raise StopRequested("storing stopped")
            yield chunk

    digest, temporary = hashlib.sha256(), target.with_name(f".{target.name}.new")
    try:
        with temporary.open("wb") as file:
            index = compress(chunks(), file, digest=digest)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        write_atomically(index_path(target), index)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(target.parent)
    return digest.hexdigest(), size


def fetch(items: list[Item], root: Path, record: Record, client: Client, connections: int) -> dict[Item, Exception]:
    """Fetch all items with a thread a connection, recording what is in place; what failed, and why.

    Raises StopRequested after SIGTERM or SIGUSR1.
    """
    todo: SimpleQueue[Item | None] = SimpleQueue()
    ended: SimpleQueue[tuple[Item, Exception | None] | None] = SimpleQueue()  # None: asked to stop

    def work() -> None:
        while (item := todo.get()) is not None and not client.stop.is_set():
            try:
                record.add(fetch_one(item, root, client))
                safe_join(root, item.file + PARTIAL).unlink()
                ended.put((item, None))
            except Exception as error:
                if isinstance(error, OSError) and error.errno and error.filename is None:  # such as that of a full disk
                    error.filename = str(root / item.file)
                ended.put((item, error))

    def ends() -> Iterator[tuple[Item, Exception | None]]:
        for number in range(len(items)):
            while True:
                try:
                    end = ended.get(timeout=NEWS)
                    break
                except Empty:
                    log(f"{root}: {number}/{len(items)} genomes, {client.received:,} bytes came")
            if end is None or isinstance(end[1], StopRequested):
                deadline = time.monotonic() + GRACE
                for thread in threads:
                    thread.join(max(deadline - time.monotonic(), 0))
                raise StopRequested(f"{root}: stopped with {number} of {len(items)} genomes done")
            yield end

    for item in [*items, *[None] * connections]:
        todo.put(item)
    # Daemons: a thread that waits for a silent server must not keep a stopped process alive.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(connections, len(items)))]
    with _stop_on_signal(client.stop, ended):
        for thread in threads:
            thread.start()
        return {item: error for item, error in progress(ends(), total=len(items), unit="genomes") if error is not None}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Fetch what is not in place yet."""
    for name, least in (("connections", 1), ("retries", 0), ("timeout", 0.001), ("backoff", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: must be at least {least}")
    started, items = time.monotonic(), read_catalog(args.catalog)
    args.out.mkdir(parents=True, exist_ok=True)
    with _alone(args.out):
        record = Record(args.out)
        absent = [item for item in items if not record.has(item)]
        log(f"{args.out}: {len(items) - len(absent)} of {len(items)} genomes are in place")
        strangers = sorted(set(record.rows) - {item.file for item in items})
        if strangers:
            log(f"{args.out}: {', '.join(strangers[:5])} ({len(strangers)} in all) came from another catalog, and stay")
        failed = fetch(absent, args.out, record, Client(args.retries, args.backoff, args.timeout), args.connections)
        with suppress(OSError):  # the disk may be full, which is told below; the next start tidies too
            record.tidy()
    for item, error in failed.items():
        log(f"{item.species} ({item.accession}): {one_line(error)}" + ("" if item.url in str(error) else f" ({item.url})"))
    if failed:
        message = f"{len(failed)} of {len(items)} genomes were not fetched, for the reasons above"
        if all(isinstance(error, InputError) for error in failed.values()):
            raise InputError(f"{args.catalog}: {message}; correct the catalog and run the command again")
        raise DownloadFailed(f"{args.out}: {message}; run the same command again to go on")
    fetched = sum(int(record.rows[item.file].bytes) for item in absent)
    seconds = time.monotonic() - started
    log(f"{args.out}: all {len(items)} genomes are in place; {fetched:,} bytes came in {seconds:.1f} s")
    return {"genomes": len(items), "fetched": len(absent), "bytes": fetched, "seconds": round(seconds, 3)}


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keeps a second process from writing to the same partial files."""
    with (root / ".fetch.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{root}: another `fetch` is writing here; wait for it, or give another --out") from None
        yield


@contextmanager
def _stop_on_signal(stop: threading.Event, ended: SimpleQueue[Any]) -> Iterator[None]:
    """In the block SIGTERM and SIGUSR1, which Slurm sends before it ends a job, stop the downloads; so does leaving it."""

    def ask(number: int, frame: Any) -> None:
        stop.set()
        ended.put(None)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        stop.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = add_verb(verbs, "fetch", run, "Download a catalog's genomes. Killed or stopped, the same command goes on.")
    verb.add_argument("--catalog", type=Path, required=True, metavar="FILE", help="what `catalog` wrote")
    verb.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the genomes, for --genomes elsewhere"
    )
    verb.add_argument("--connections", type=int, default=4, metavar="N", help="at once, at most (default: 4)")
    verb.add_argument(
        "--retries", type=int, default=5, metavar="N", help="tries in a row that may bring a file no further (default: 5)"
    )
    verb.add_argument(
        "--backoff",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="wait before the second try, doubled before each further one (default: 1)",
    )
    verb.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="without a byte, after which a try ends (default: 30)"
    )
