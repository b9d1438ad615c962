"""Oddities of input and of the machine, through the whole `shard` command, as a user meets them."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from data_prep.__main__ import run
from data_prep.dataset import SPLITS, Dataset
from data_prep.inputs.fasta import UTF8_MARK
from data_prep.kmers import reverse_complement
from tests.commands import ENVIRONMENT, ROOT
from tests.data_prep.conftest import SMALL, random_bases, wrapped
from tests.data_prep.inputs.test_fasta import bgzf
from tests.data_prep.test_shard import tree

NOBODY = 65534


def command(genomes: Path, tokenizer: Path, out: Path) -> list[str]:
    files = ["--genomes", str(genomes), "--tokenizer", str(tokenizer), "--out", str(out)]
    return ["shard", *files, *SMALL, "--processes", "1"]  # others would take seconds to start


def sequences(dataset: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """Contig, start, strand and letters of every sequence."""
    whole = Dataset(dataset)
    tokenizer = Tokenizer.from_file(str(whole.tokenizer_path))
    for name in SPLITS:
        split = whole.split(name)
        for row in range(len(split.shards)):
            for number in range(len(split.blocks(row))):
                block = split.read_block(row, number)
                for each, (contig, start, strand) in enumerate(block.source.tolist()):
                    tokens = (str(tokenizer.id_to_token(token)) for token in block.sequence(each).tolist())
                    yield contig, start, strand, "".join(tokens).encode()


def odd_genomes(root: Path) -> list[tuple[str, str, str, bytes]]:
    """Write files with an oddity each; return species, file, record name and cleaned bases of each record, in order."""
    a, b, c, d, e, f, g, h = (random_bases(seed, 800) for seed in range(100, 108))
    masked = a[:300] + b"N" * 50 + a[350:500].lower() + b"RYKMSWBDHVU-.X" + a[514:]
    mended = a[:300] + b"N" * 50 + a[350:500] + b"N" * 14 + a[514:]
    two = b">x\tof two words\n" + wrapped(c, 61, b"\r\n") + b">x again\r\n" + d.lower()
    table = UTF8_MARK + b'"id","sequence","label"\r\n1,"%s",0\r\n2,,1\r\n"3, or so",%s,1\r\n\r\n' % (g, h.lower())
    contents = {
        "a folder/two  words.fa": b">masked\n\n" + wrapped(masked, 70) + b"\n",
        "crlf/no final newline.FASTA": two,
        "gue/tf/0/test.csv": b"sequence,label\nMKVL,0\n",
        "gue/tf/0/train.csv": table,
        "members.fna.gz": gzip.compress(b">m1\n" + e[:500]) + gzip.compress(e[500:] + b"\n>m2\n>\nACGTACGT"),
        "packed.fa.gz": bgzf(UTF8_MARK + b">one line>x;y\n" + f + b"\n", 300),
        "\N{GREEK SMALL LETTER ALPHA}.fa": b">r\rACGTN\r" + wrapped(b, 50, b"\r"),
    }
    for file, data in contents.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(data)
    (root / "linked.fa").symlink_to("../outside.fa")
    outside = random_bases(108, 700)
    (root / "../outside.fa").resolve().write_bytes(b">outside\n" + outside)
    return [
        ("two  words", "a folder/two  words.fa", "masked", mended),
        ("no final newline", "crlf/no final newline.FASTA", "x", c),
        ("no final newline", "crlf/no final newline.FASTA", "x", d),
        ("gue/tf/0/train", "gue/tf/0/train.csv", "row-1", g),
        ("gue/tf/0/train", "gue/tf/0/train.csv", "row-2", b""),
        ("gue/tf/0/train", "gue/tf/0/train.csv", "row-3", h),
        ("linked", "linked.fa", "outside", outside),
        ("members", "members.fna.gz", "m1", e),
        ("members", "members.fna.gz", "m2", b""),
        ("members", "members.fna.gz", "", b"ACGTACGT"),
        ("packed", "packed.fa.gz", "one", f),
        ("\N{GREEK SMALL LETTER ALPHA}", "\N{GREEK SMALL LETTER ALPHA}.fa", "r", b"ACGTN" + b),
    ]


@pytest.mark.parametrize("options", [[], ["--strands", "both"]])
def test_sequences_stand_at_their_source_whatever_the_form_of_the_file(
    tmp_path: Path, tokenizer_file: Path, options: list[str]
) -> None:
    root, out = tmp_path / "my genomes", tmp_path / "data sets/out"
    records = odd_genomes(root)
    given = root / "gue" / ".." / "." / ".." / "my genomes"
    assert run([*command(given, tokenizer_file, out), *options]) == 0
    lines = (out / "train/contigs.tsv").read_text().split("\n")[1:-1]
    rows = (
        f"{number}\t{species}\t{file}\t{name}\t{len(bases)}" for number, (species, file, name, bases) in enumerate(records)
    )
    assert lines == list(rows)
    letters = [0] * len(records)
    for contig, start, strand, text in sequences(out):
        assert records[contig][3][start : start + len(text)] == (text if strand > 0 else reverse_complement(text))
        letters[contig] += len(text) * (strand > 0)
    for (species, _, name, bases), found in zip(records, letters, strict=True):
        assert found >= len(bases) - bases.count(b"N") - 150, (species, name)  # but for short ends
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert b"../" not in path.read_bytes(), path


def test_no_permission(tmp_path: Path, genomes: Path, tokenizer_file: Path) -> None:
    """As nobody where the tests run as root, for whom modes mean nothing."""
    root_process = os.geteuid() == 0
    # Imports come first: the interpreter may lie where only root can read.
    become = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY}); " if root_process else ""
    code = f"import os, sys; from data_prep.__main__ import run; {become}sys.exit(run(sys.argv[1:]))"

    def error_of(*arguments: str) -> str:
        process = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(process, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    with tempfile.TemporaryDirectory() as folder:  # pytest's own lets nobody in
        place = Path(folder)
        place.chmod(0o755)
        mine, closed, tokenizer = place / "genomes", place / "closed", place / "tokenizer.json"
        (mine / "locked").mkdir(parents=True)
        closed.mkdir(mode=0o555)
        tokenizer.write_bytes(tokenizer_file.read_bytes())
        secret = mine / "secret.fa"
        secret.write_bytes((genomes / "root.fa").read_bytes())
        assert f"error: {closed}" in error_of(*command(mine, tokenizer, closed / "out"))
        assert not list(closed.iterdir())
        (place / "out").mkdir(mode=0o777)
        (place / "out").chmod(0o777)
        secret.chmod(0)
        assert f"error: {secret}: Permission denied" in error_of(*command(mine, tokenizer, place / "out"))
        (mine / "locked").chmod(0)  # a folder whose genomes would else be left out in silence
        assert f"error: {mine / 'locked'}: Permission denied" in error_of(*command(mine, tokenizer, place / "out"))
        assert not (place / "out/manifest.json").exists()
        (mine / "locked").chmod(0o755)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`disk(kilobytes)` gives or resizes a file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "small", path, "-o"]

    def resize(kilobytes: int) -> Path:
        remount = "remount," if os.path.ismount(path) else ""
        done = subprocess.run([*mount, f"{remount}size={kilobytes}k"], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no right to mount a disk: {done.stderr.strip()}")
        return path

    yield resize
    if os.path.ismount(path):
        subprocess.run(["umount", path], check=True)


def test_a_full_disk(
    disk: Callable[[int], Path],
    dataset: Path,
    genomes: Path,
    tokenizer_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It fails while planning, within units and while it finalizes, says where, and goes on after space was made."""
    out = disk(4) / "out"
    done: list[int] = []  # units, at each failure
    statuses: list[int] = []
    units = -1
    for kilobytes in (4, 32, 64, 128, 192, 256, 320, 384, 448, 512, 1024, 2048, 100_000):
        disk(kilobytes)
        capsys.readouterr()
        statuses.append(run(command(genomes, tokenizer_file, out)))
        markers = len(list(out.glob(".work/unit-*.json")))
        if statuses[-1] == 0:
            break
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"failed: OSError: {out}" in error and "No space left on device" in error, (kilobytes, error)
        assert not (out / "manifest.json").exists()
        assert not list(out.rglob("*.partial"))
        done.append(markers)
        if (plan := out / ".work/plan.json").is_file():
            units = len(json.loads(plan.read_bytes())["units"])
    assert statuses == [1] * (len(statuses) - 1) + [0]
    assert done == sorted(done) and done[0] == 0 and len(set(done)) > 3 and done[-1] == units, (
        "in all stages, and on from there"
    )
    assert tree(out) == tree(dataset)
