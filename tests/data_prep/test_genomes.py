"""Which files are genomes, what they are called, and that regions hold every base once."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest

from data_prep.cli import InputError
from data_prep.fasta import read_fasta
from data_prep.genomes import find_genomes, read_regions, scan


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
