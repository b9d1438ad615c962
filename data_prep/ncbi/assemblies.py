"""Reads NCBI's table of assemblies, `assembly_summary.txt`, as a stream: it has millions of rows and about 1 GB.

Its columns: https://ftp.ncbi.nlm.nih.gov/genomes/ASSEMBLY_REPORTS/README_assembly_summary.txt. They are taken by name,
because their number has grown from 20 to 38.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from data_prep.cli import InputError
from data_prep.ncbi.download import check_url

NEEDED = (
    "assembly_accession",
    "refseq_category",
    "taxid",
    "species_taxid",
    "organism_name",
    "version_status",
    "assembly_level",
    "seq_rel_date",
    "ftp_path",
)
OPTIONAL = "excluded_from_refseq"  # old tables lack it
NONE = ("", "na")  # what stands where there is nothing
CATEGORIES = {"reference genome": 2, "representative genome": 1}
LEVELS = {"Complete Genome": 3, "Chromosome": 2, "Scaffold": 1, "Contig": 0}


class Assembly(NamedTuple):
    """A row of the table, of which only what is needed is kept."""

    accession: str
    category: str
    taxid: str
    species_taxid: str
    organism: str
    status: str
    level: str
    date: str
    ftp_path: str
    excluded: str

    @property
    def rank(self) -> tuple[int, bool, int, str, str]:
        """The best assembly of a species has the greatest rank; no two are equal."""
        included = self.excluded in NONE
        return CATEGORIES.get(self.category, 0), included, LEVELS.get(self.level, -1), self.date, self.accession

    def objection(self, allow_excluded: bool) -> str:
        """Why the assembly can't be taken, or nothing."""
        if self.status != "latest":
            return self.status
        if self.ftp_path in NONE:
            return "without files"
        if not self._has_folder():
            return f"whose ftp_path is no URL of a folder ({self.ftp_path!r:.100})"
        if self.excluded not in NONE and not allow_excluded:
            return f"excluded from RefSeq ({self.excluded}; --allow-excluded takes it)"
        return ""

    def _has_folder(self) -> bool:
        try:
            return bool(urlsplit(check_url(self.ftp_path)).path.strip("/"))
        except InputError:
            return False


def read_assemblies(path: Path) -> Iterator[Assembly]:
    """Yield the rows of an assembly_summary table, plain or gzip, in constant memory.

    Tables may follow each other in one file. Raises InputError naming file and line.
    """
    positions: list[int] = []
    width = number = 0
    with path.open("rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if raw.peek(2).startswith(b"\x1f\x8b") else raw
        try:
            for number, line in enumerate(lines, 1):
                fields = line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
                if line.startswith(b"#"):
                    fields[0] = fields[0].lstrip("# ")
                    if fields[0] == NEEDED[0]:
                        if missing := [name for name in NEEDED if name not in fields]:
                            raise InputError(f"{path}: line {number}, the header, has no column {', '.join(missing)}")
                        positions, width = [fields.index(name) for name in NEEDED], len(fields)
                        positions.append(fields.index(OPTIONAL) if OPTIONAL in fields else -1)
                    continue
                if not positions:
                    raise InputError(f"{path}: line {number} comes before a header with {NEEDED[0]}; is it NCBI's table?")
                if len(fields) != width:
                    raise InputError(
                        f"{path}: line {number} has {len(fields)} columns, its header {width}; "
                        "get the table again, or remove the line"
                    )
                values = [fields[position] if position >= 0 else "" for position in positions]
                yield Assembly(*values)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InputError(f"{path}: behind line {number}: {error}; get the file again") from None
    if not positions:
        raise InputError(f"{path}: has no header with {NEEDED[0]}; is it NCBI's table?")
