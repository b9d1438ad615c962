"""A catalog holds what the list means, or is not written: names are never guessed."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import run
from data_prep.ncbi.catalog import ALIASES, COLUMNS, read_aliases

HEADER = [
    "#assembly_accession",
    "bioproject",
    "refseq_category",
    "taxid",
    "species_taxid",
    "organism_name",
    "infraspecific_name",
    "version_status",
    "assembly_level",
    "seq_rel_date",
    "asm_name",
    "ftp_path",
    "excluded_from_refseq",
    "group",
]
FOLDER = "https://ftp.ncbi.nlm.nih.gov/genomes/all/GCF/000"
ECOLI, K12 = 562, "Escherichia coli str. K-12 substr. MG1655"


def row(number: int, organism: str, taxid: int, species: int | None = None, **values: str) -> list[str]:
    accession = values.pop("accession", f"GCF_{number:09d}.1")
    cells = dict.fromkeys(HEADER, "na") | {
        "#assembly_accession": accession,
        "taxid": str(taxid),
        "species_taxid": str(species or taxid),
        "organism_name": organism,
        "version_status": "latest",
        "assembly_level": "Scaffold",
        "seq_rel_date": "2020/05/01",
        "ftp_path": f"{FOLDER}/{accession}_ASM{number}",
    }
    return list((cells | values).values())


def table(path: Path, *rows: list[str], header: list[str] = HEADER) -> Path:
    lines = [
        "##  See ftp://ftp.ncbi.nlm.nih.gov/genomes/README_assembly_summary.txt",
        *("\t".join(each) for each in (header, *rows)),
    ]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def catalog(
    tmp_path: Path, names: list[str], *rows: list[str], options: list[str] | None = None, status: int = 0
) -> dict[str, Any]:
    """The catalog's rows by species, after a run that ends with `status`."""
    species, out = tmp_path / "species.tsv", tmp_path / "catalog.tsv"
    species.write_text("category\tspecies\n" + "".join(f"Bacteria\t{name}\n" for name in names))
    summary = table(tmp_path / "assembly_summary.txt", *rows)
    command = ["catalog", "--species", str(species), "--assembly-summary", str(summary), "--out", str(out)]
    assert run([*command, *(options or [])]) == status
    assert out.exists() == (status == 0)
    return {each["species"]: each for each in csv.DictReader(out.open(), delimiter="\t")} if status == 0 else {}


def test_a_row_says_where_the_genome_is_and_where_it_goes(tmp_path: Path) -> None:
    species, out = tmp_path / "species.tsv", tmp_path / "catalog.tsv"
    species.write_text("\ufeffspecies\tcategory\tnote\r\nMus Musculus\tOther Vertebrate\tx\r\n\r\n", newline="")
    summary = table(tmp_path / "s.txt", row(7, "Mus musculus", 10090))
    assert run(["catalog", "--species", str(species), "--assembly-summary", str(summary), "--out", str(out)]) == 0
    lines = [line.split("\t") for line in out.read_text().splitlines()]
    assert lines[0] == list(COLUMNS)
    url = f"{FOLDER}/GCF_000000007.1_ASM7/GCF_000000007.1_ASM7_genomic.fna.gz"
    file = "Other_Vertebrate/Mus_Musculus.fna.gz"
    expected = [
        "Other Vertebrate",
        "Mus Musculus",
        "Mus musculus",
        "10090",
        "GCF_000000007.1",
        "Scaffold",
        "2020-05-01",
        url,
        file,
    ]
    assert lines[1:] == [expected]


def test_the_best_assembly_is_taken_whatever_the_order(tmp_path: Path) -> None:
    ranked = [  # the best first
        row(1, K12, 511145, ECOLI, refseq_category="reference genome", assembly_level="Contig"),
        row(2, K12, 511145, ECOLI, refseq_category="representative genome", assembly_level="Contig"),
        row(3, "Escherichia coli", ECOLI, assembly_level="Complete Genome", seq_rel_date="2001/01/01"),
        row(4, "Escherichia coli", ECOLI, assembly_level="Chromosome", seq_rel_date="2002/01/01"),
        row(5, "Escherichia coli", ECOLI, seq_rel_date="2020/05/02"),
        row(7, "Escherichia coli", ECOLI),
        row(6, "Escherichia coli", ECOLI),
        row(9, "Escherichia coli", ECOLI, assembly_level="Contig", seq_rel_date="2024/01/01"),
    ]
    for start in range(len(ranked)):
        left = ranked[start:]
        for rows in (left, left[::-1]):
            found = catalog(tmp_path, ["escherichia COLI"], *rows)
            assert found["escherichia COLI"]["accession"] == left[0][0]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"version_status": "replaced"}, "1 replaced"),
        ({"version_status": "suppressed"}, "1 suppressed"),
        ({"ftp_path": "na"}, "1 without files"),
        ({"ftp_path": "garbage"}, "1 whose ftp_path is no URL of a folder ('garbage')"),
        ({"ftp_path": "https://ftp.ncbi.nlm.nih.gov/"}, "1 whose ftp_path is no URL of a folder ("),
        ({"ftp_path": "file:///etc/GCF_1"}, "1 whose ftp_path is no URL of a folder ("),
        ({"excluded_from_refseq": "derived from metagenome"}, "1 excluded from RefSeq (derived from metagenome; "),
    ],
)
def test_unusable_assemblies_are_not_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], values: dict[str, str], reason: str
) -> None:
    unusable = row(1, "Mus musculus", 10090, refseq_category="reference genome", **values)
    assert (
        catalog(tmp_path, ["Mus musculus"], unusable, row(2, "Mus musculus", 10090))["Mus musculus"]["accession"][-3] == "2"
    )
    (tmp_path / "catalog.tsv").unlink()
    catalog(tmp_path, ["Mus musculus"], unusable, status=2)
    assert f"Bacteria, Mus musculus: not placed, none of its assemblies can be taken: {reason}" in capsys.readouterr().err


def test_excluded_assemblies_are_taken_when_allowed_after_the_others(tmp_path: Path) -> None:
    excluded = row(1, "Mus musculus", 10090, assembly_level="Complete Genome", excluded_from_refseq="contaminated")
    options = ["--allow-excluded"]
    assert catalog(tmp_path, ["Mus musculus"], excluded, options=options)["Mus musculus"]["accession"] == excluded[0]
    both = catalog(tmp_path, ["Mus musculus"], excluded, row(2, "Mus musculus", 10090), options=options)
    assert both["Mus musculus"]["accession"] == "GCF_000000002.1"


@pytest.mark.parametrize(
    ("name", "organism", "taxid", "species"),
    [
        ("Escherichia coli", K12, 511145, ECOLI),  # the table has a strain only
        ("Candidatus Regiella Insecticola", "Candidatus Regiella insecticola LSR1", 663321, 138073),
        ("Clostridium Nexile", "[Clostridium] nexile", 29361, None),  # brackets: not of that genus any more
        (K12.upper(), K12, 511145, ECOLI),
        ("Human", "Homo sapiens", 9606, None),
        ("Paulownia Witches Phytoplasma", "Paulownia witches'-broom phytoplasma", 39647, None),
        ("Clostridium Cag 505", "Clostridium sp. CAG:505", 1262815, None),
    ],
)
def test_names_that_fit(tmp_path: Path, name: str, organism: str, taxid: int, species: int | None) -> None:
    assert catalog(tmp_path, [name], row(1, organism, taxid, species))[name]["organism"] == organism


@pytest.mark.parametrize(
    ("name", "organism", "taxid", "species"),
    [
        ("Mus", "Musa acuminata", 4641, None),
        ("Mus musculus", "Mus musculus x Mus spretus", 2, None),
        ("Mus musculus", "Mus musculusoides", 3, None),
        ("Escherichia coli", "Escherichia colic str. 1", 5, 4),
        ("Clostridiales bacterium", "Clostridiales bacterium oral taxon 876 str. F0540", 7, 6),
        ("Legionella endosymbiont", "Legionella endosymbiont of Polyplax serrata", 8, None),
        ("Bacillus", "[Bacillus] selenitireducens", 9, None),
        ("Mus musculus castaneus", "Mus musculus", 10090, None),
    ],
)
def test_names_that_must_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, organism: str, taxid: int, species: int | None
) -> None:
    catalog(tmp_path, [name], row(1, organism, taxid, species), options=["--any-of-genus"], status=2)
    assert f"line 2: Bacteria, {name}: not placed, no organism has this name" in capsys.readouterr().err


def test_a_species_has_the_assemblies_of_its_strains_but_a_strain_only_its_own(tmp_path: Path) -> None:
    rows = [
        row(1, "Escherichia coli", ECOLI),
        row(2, K12, 511145, ECOLI, refseq_category="reference genome"),
        row(3, "Escherichia coli O157:H7 str. Sakai", 386585, ECOLI),
    ]
    species = catalog(tmp_path, ["Escherichia coli"], *rows)
    assert species["Escherichia coli"]["organism"] == K12
    strain = catalog(tmp_path, ["Escherichia coli O157:H7 str. Sakai"], *rows)
    assert [each["accession"] for each in strain.values()] == ["GCF_000000003.1"]


def test_a_subspecies_stands_for_a_species_only_where_nothing_else_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wolf = row(1, "Canis lupus", 9612, assembly_level="Contig")
    dog = row(2, "Canis lupus familiaris", 9615, 9612, refseq_category="reference genome")
    dingo = row(3, "Canis lupus dingo", 286419, 9612)
    aliases = tmp_path / "aliases.tsv"
    aliases.write_text("Wolf\t9612\n")
    options = ["--aliases", str(aliases)]
    for name in ("Canis Lupus", "Wolf"):
        assert catalog(tmp_path, [name], dog, dingo, wolf, options=options)[name]["organism"] == "Canis lupus"
        assert catalog(tmp_path, [name], dog, options=options)[name]["organism"] == "Canis lupus familiaris"
        (tmp_path / "catalog.tsv").unlink()
        catalog(tmp_path, [name], dog, dingo, options=options, status=2)
        assert "2 species or subspecies have this name: Canis lupus dingo (taxid 286419), Canis" in capsys.readouterr().err


def test_a_genus_stands_for_a_species_only_when_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = row(1, "Vibrio cholerae", 666)
    two = row(2, "Vibrio fischeri", 668, assembly_level="Complete Genome")
    catalog(tmp_path, ["Vibrio"], one, status=2)
    assert (
        "Vibrio: not placed, a genus of 1 species; the best assembly is of Vibrio cholerae (taxid 666)"
        in capsys.readouterr().err
    )
    catalog(tmp_path, ["Vibrio"], one, two, options=["--allow-genus"], status=2)
    assert "Vibrio: ambiguous, a genus of 2 species; the best assembly is of Vibrio fischeri" in capsys.readouterr().err
    assert catalog(tmp_path, ["Vibrio"], one, options=["--allow-genus"])["Vibrio"]["taxid"] == "666"
    assert catalog(tmp_path, ["Vibrio"], one, two, options=["--any-of-genus"])["Vibrio"]["taxid"] == "668"
    (tmp_path / "catalog.tsv").unlink()
    catalog(tmp_path, ["Vibrio cholera"], one, two, options=["--any-of-genus"], status=2)  # a typo is not a genus


def test_two_species_of_one_name_are_ambiguous(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(1, "Agathis montana", 11), row(2, "Agathis montana", 22)]
    catalog(tmp_path, ["Agathis montana"], *rows, status=2)
    assert (
        "ambiguous, 2 species or subspecies have this name: Agathis montana (taxid 11), Agathis montana (taxid 22)"
        in capsys.readouterr().err
    )
    aliases = tmp_path / "aliases.tsv"
    aliases.write_text("Agathis Montana\t22\n")
    found = catalog(tmp_path, ["Agathis montana"], *rows, options=["--aliases", str(aliases)])
    assert found["Agathis montana"]["taxid"] == "22"


def test_all_problems_are_listed_with_near_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["Mucor Saturninus", "Streptomyces 8401", "Mus musculus", "Bacterium Rbg Combo", "Xyz"]
    rows = [
        row(1, "Mucor saturnius", 1),
        row(2, "Streptomyces sp. 840.1", 2),
        row(3, "Mus musculus", 10090),
        row(4, "bacterium RBG_COMBO_12_FULL", 4),
    ]
    catalog(tmp_path, names, *rows, status=2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ", 2)[1] for line in lines[:-1]] == [
        f"Bacteria, {name}" for name in names if name != "Mus musculus"
    ]
    assert [line.partition("near: ")[2] for line in lines[:-1]] == [
        "Mucor saturnius (taxid 1)",
        "Streptomyces sp. 840.1 (taxid 2)",
        "bacterium RBG_COMBO_12_FULL (taxid 4)",
        "",
    ]
    assert "4 of 5 species have problems" in lines[-1]


def test_users_aliases_win_and_say_so_when_they_lead_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(1, "Homo sapiens", 9606), row(2, K12, 511145, ECOLI)]
    aliases = tmp_path / "aliases.tsv"
    options = ["--aliases", str(aliases)]
    for target, taxid in (("562", "511145"), ("511145", "511145"), ("homo  sapiens", "9606")):
        aliases.write_text(f"alias\torganism\nHUMAN\t{target}\n")
        assert catalog(tmp_path, ["Human"], *rows, options=options)["Human"]["taxid"] == taxid
    (tmp_path / "catalog.tsv").unlink()
    aliases.write_text("human\tPan troglodytes\n")
    catalog(tmp_path, ["Human"], *rows, options=options, status=2)
    assert "Human (alias of pan troglodytes): not placed" in capsys.readouterr().err
    aliases.write_text("human is Homo sapiens\n")
    catalog(tmp_path, ["Human"], *rows, options=options, status=2)
    assert "aliases.tsv: line 1 must have two columns" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Human", "Homo sapiens"], "Homo sapiens: leads to the genome GCF_000000001.1 of line 2, Human"),
        (["Bos taurus alpha", "Bos taurus"], "Bos taurus: leads to the genome GCA_000000004.2 of line 2, Bos taurus alpha"),
        (["Mus musculus", "Mus: musculus"], "Mus: musculus: leads to the file Bacteria/Mus_musculus.fna.gz of line 2"),
    ],
)
def test_no_genome_comes_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str], names: list[str], message: str) -> None:
    rows = [
        row(1, "Homo sapiens", 9606),
        row(2, "Mus musculus", 10090),
        row(3, "Mus: musculus", 3),
        row(4, "Bos taurus alpha", 5, 4),
        row(4, "Bos taurus", 4, accession="GCA_000000004.2", seq_rel_date="2024/01/01"),  # GenBank's copy of the genome
    ]
    catalog(tmp_path, names, *rows, status=2)
    assert message in capsys.readouterr().err


def test_tables_old_new_packed_and_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Columns go by name; an old table has fewer, in another order, and a space after its '#'."""
    species, out = tmp_path / "species.tsv", tmp_path / "catalog.tsv"
    species.write_text("category\tspecies\nBacteria\tHuman\nBacteria\tMus musculus\n")
    order = [0, *reversed(range(2, 12))]
    old = [row(1, "Homo sapiens", 9606, ftp_path="ftp://ftp.ncbi.nlm.nih.gov/genomes/x/GCF_1_v1")[at] for at in order]
    header = ["# assembly_accession", *(HEADER[at] for at in order[1:])]
    first = table(tmp_path / "old.txt", old, header=header)
    second = tmp_path / "new.txt.gz"
    plain = table(tmp_path / "new.txt", row(2, "Mus musculus", 10090)).read_bytes()
    second.write_bytes(gzip.compress(plain))
    joined = tmp_path / "joined.txt"
    joined.write_bytes(first.read_bytes() + plain)
    command = ["catalog", "--json", "--species", str(species), "--out", str(out), "--assembly-summary"]
    results = []
    for tables in ([first, second], [joined]):
        assert run([*command, *map(str, tables)]) == 0
        results.append(out.read_text())
        assert json.loads(capsys.readouterr().out)["species"] == 2
    assert results[0] == results[1]
    assert "\thttps://ftp.ncbi.nlm.nih.gov/genomes/x/GCF_1_v1/GCF_1_v1_genomic.fna.gz\t" in results[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no header with assembly_accession"),
        (b"accession\tname\n1\t2\n", "line 1 comes before a header"),
        (b"#assembly_accession\ttaxid\n", "line 1, the header, has no column refseq_category, species_taxid"),
        ("\t".join(HEADER).encode() + b"\nGCF_1.1\tna\n", "line 2 has 2 columns, its header 14"),
        (gzip.compress(b"#" * 100_000, mtime=0)[:-20], "behind line 0: "),
    ],
)
def test_a_broken_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes, message: str) -> None:
    species, summary = tmp_path / "species.tsv", tmp_path / "summary.txt"
    species.write_text("category\tspecies\nBacteria\tHuman\n")
    summary.write_bytes(data)
    command = ["catalog", "--species", str(species), "--assembly-summary", str(summary), "--out", str(tmp_path / "out.tsv")]
    assert run(command) == 2
    assert f"{summary}: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line must name the columns category and species"),
        ("Bacteria\tHuman\n", "the first line must name the columns category and species"),
        ("category\tspecies\n", "lists no species"),
        ("category\tspecies\nBacteria\n", "line 2 has no species"),
        ("category\tspecies\nBacteria\t[]\n", "line 2 has no species"),
        ("category\tspecies\n\n\tHuman\n", "line 3 has no category"),
    ],
)
def test_a_broken_list_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    species = tmp_path / "species.tsv"
    species.write_text(text)
    assert run(["catalog", "--species", str(species), "--assembly-summary", "none", "--out", str(tmp_path / "out.tsv")]) == 2
    assert f"{species}: {message}" in capsys.readouterr().err


def test_our_own_aliases_are_sorted_and_single() -> None:
    lines = ALIASES.read_text().splitlines()
    assert lines[1:] == sorted(lines[1:])
    assert len(read_aliases(None)) == len(lines)
