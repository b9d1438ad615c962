"""Which files are genomes, what they are called, and that regions hold every base once."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import pytest

from data_prep.cli import InputError
from data_prep.inputs.fasta import read_fasta
from data_prep.inputs.genomes import find_genomes, read_regions, scan


def test_files_are_sorted_and_named(genomes: Path) -> None:
    found = [(genome.file, genome.name, genome.category) for genome in find_genomes(genomes)]
    assert found == [
        ("bacteria/odd.fasta", "odd", "bacteria"),
        ("bacteria/strains/coli.fna.gz", "coli", "bacteria"),
        ("plant/thale.fa", "thale", "plant"),
        ("root.fa", "root", "unspecified"),
        ("virus/phage.fa", "phage", "virus"),
    ]


def test_a_repeated_file_name_is_told_apart_by_its_folder(tmp_path: Path) -> None:
    for folder in ("GCF_1", "GCF_2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "genomic.FNA").write_bytes(b">a\nACGT\n")
    (tmp_path / "GCF_2" / "._genomic.fna").write_bytes(b"not a genome")
    (tmp_path / "GCF_2" / "readme.txt").write_bytes(b"not a genome")
    assert [genome.name for genome in find_genomes(tmp_path)] == ["GCF_1/genomic", "GCF_2/genomic"]
    (tmp_path / "GCF_2" / "genomic.fa.gz").write_bytes(gzip.compress(b">a\nACGT\n"))
    with pytest.raises(InputError, match=r"genomic\.FNA and GCF_2/genomic\.fa\.gz|genomic\.fa\.gz"):
        find_genomes(tmp_path)


def test_no_genomes(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no FASTA file"):
        find_genomes(tmp_path)
    with pytest.raises(InputError, match="not a folder"):
        find_genomes(tmp_path / "missing")


def put(root: Path, *files: str) -> None:
    """Write these files, each of one short record or row."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"sequence\nACGT\n" if ".csv" in file.lower() else b">a\nACGT\n")


def test_csv_is_named_by_its_path_and_never_for_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gue = [f"GUE/{task}/{split}.csv" for task in ("tf/0", "tf/1") for split in ("train", "dev", "test")]
    put(tmp_path, *gue, "H3/test.csv", "H3/all.csv", "H3/README.csv", "H3/training_1.CSV", "mine/seqs.csv", "mine/x.fa")
    put(tmp_path, "other/validation/H4.csv", "other/testis/H4.csv", "a.csv", "test-2/train.csv", "big/My_Test.csv")
    found = {genome.name: (genome.file, genome.category) for genome in find_genomes(tmp_path)}
    assert found == {
        "GUE/tf/0/train": ("GUE/tf/0/train.csv", "GUE"),
        "GUE/tf/1/train": ("GUE/tf/1/train.csv", "GUE"),
        "H3/training_1": ("H3/training_1.CSV", "H3"),
        "a": ("a.csv", "unspecified"),
        "mine/seqs": ("mine/seqs.csv", "mine"),
        "other/testis/H4": ("other/testis/H4.csv", "other"),
        "test-2/train": ("test-2/train.csv", "test-2"),
        "x": ("mine/x.fa", "mine"),
    }
    logged = capsys.readouterr().err.splitlines()
    assert len(logged) == 1
    assert logged[0].startswith(f"{tmp_path}: left out 9 CSV files") and "GUE/tf/0/dev.csv" in logged[0]


def test_only_evaluation_data_is_nothing_to_read(tmp_path: Path) -> None:
    put(tmp_path, "H3/dev.csv", "H3/test.csv.gz")
    with pytest.raises(InputError, match="no FASTA file"):
        find_genomes(tmp_path)


def test_links_are_followed_and_nothing_is_read_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    put(elsewhere, "store/human.fa", "store/deep/mouse.fa", "yeast.fa")
    put(root, "plant/thale.fa")
    (root / "mammalian").symlink_to("../elsewhere/store")  # a folder outside, by a path with ".."
    (root / "yeast.fa").symlink_to(elsewhere / "yeast.fa")
    (root / "again.fa").symlink_to("plant/thale.fa")
    (root / "latest").symlink_to("plant")
    (root / "plant/loop").symlink_to("..")
    (elsewhere / "store/deep/up").symlink_to("..")
    for given in (root, root / "plant" / ".." / "." / "plant" / ".."):
        found = [(genome.name, genome.file) for genome in find_genomes(given)]
        assert found == [
            ("human", "mammalian/human.fa"),
            ("mouse", "mammalian/deep/mouse.fa"),
            ("thale", "plant/thale.fa"),
            ("yeast", "yeast.fa"),
        ][1:2] + [
            ("human", "mammalian/human.fa"),
            ("thale", "plant/thale.fa"),
            ("yeast", "yeast.fa"),
        ]
        logged = capsys.readouterr().err
        for link in ("again.fa", "latest", "plant/loop", "mammalian/deep/up"):
            assert f"{given / link}: left out, as a link to what is read as" in logged


def test_what_looks_like_a_genome_is_never_left_out_in_silence(tmp_path: Path) -> None:
    put(tmp_path, "good.fa", ".snapshot/good.fa", "folder.fa/inner.fa")
    assert [genome.name for genome in find_genomes(tmp_path)] == ["inner", "good"]
    odd = tmp_path / "odd.fa"
    for make, words in (
        (lambda: odd.symlink_to("nowhere.fa"), r"odd\.fa: no file"),
        (lambda: odd.symlink_to("odd.fa"), r"odd\.fa: no file"),
        (lambda: os.mkfifo(odd), r"odd\.fa: no file \(a link to nothing, or a pipe\)"),
    ):
        make()
        with pytest.raises(InputError, match=words):
            find_genomes(tmp_path)
        odd.unlink()
    for name, words in (
        (b"x.fa.bz2", r"can't read \.bz2"),
        (b"X.FNA.ZST", r"can't read \.ZST"),
        (b"tab\t.fa", r"'tab\\t\.fa' in .*: control characters in a file name"),
        (b"line\n.fa", "control characters"),
        (b"latin\xff.fa", "control characters"),
    ):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as stream:
            stream.write(b">a\nACGT\n")
        with pytest.raises(InputError, match=words):
            find_genomes(tmp_path)
        os.unlink(path)


def test_an_unfinished_download_is_no_genome(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "x/mouse.fna.gz.partial", "x/rat.fa", "x/yak.fna.gz.partial", "x/.cat.fna.gz.partial", "notes.partial")
    assert [genome.name for genome in find_genomes(tmp_path)] == ["rat"]
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: left out 2 unfinished downloads: x/mouse.fna.gz.partial, x/yak.fna.gz.partial; `fetch`" in line


def test_a_file_that_still_grows_is_no_genome_yet(tmp_path: Path) -> None:
    put(tmp_path, "growing.fa")
    (genome,) = find_genomes(tmp_path)
    with genome.path.open("ab") as download:
        download.write(b"ACGT\n")
    with pytest.raises(InputError, match=r"growing\.fa: has changed while it was read"):
        scan(genome)


@pytest.mark.parametrize("chunk_bytes", [3, 1000, 1 << 20])
def test_regions_hold_every_base_once(genomes: Path, chunk_bytes: int) -> None:
    for genome in find_genomes(genomes):
        whole: dict[int, bytes] = {}
        for piece in read_fasta(genome.path):
            whole[piece.record] = whole.get(piece.record, b"") + piece.bases
        regions = list(read_regions(genome.path, 1000, chunk_bytes=chunk_bytes))
        for region in regions:
            assert region.start == region.number * 1000
            assert region.bases == whole[region.record][region.start : region.start + 1000]
        assert sum(len(region.bases) for region in regions) == sum(map(len, whole.values()))
        found = scan(genome)
        assert found.lengths == [len(bases) for bases in whole.values()]
        assert found.sha256 == hashlib.sha256(genome.path.read_bytes()).hexdigest()
