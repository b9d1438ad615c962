"""Chooses one assembly of NCBI for each species of a list, and stops where it would have to guess.

Of NCBI's table (see assemblies.py) only what fits a name of the list is kept. A name of the list is looked for

1. in alias tables (the project's `aliases.tsv`, then the user's, which wins): they give an organism's name or its taxid;
2. among the organism names, whole and whatever their case. A species has its strains too, by NCBI's species taxid or, when
   the table has strains only, by the two words of the species in their names: "Escherichia coli" fits "Escherichia coli
   str. K-12 substr. MG1655", and never is a name a mere prefix: "Mus" does not fit "Musa". Subspecies ("Canis lupus
   familiaris") stand for a species only where nothing else does;
3. if asked for, among the genera, when it is a genus.

What fits several species, or none, is listed and nothing is written. Of a species' assemblies the reference genome comes
first, then a representative one, then by assembly level, date and accession.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from heapq import nlargest
from operator import itemgetter
from pathlib import Path
from typing import Any

from data_prep.cli import InputError, add_verb, log, write_atomically
from data_prep.ncbi.assemblies import Assembly, read_assemblies

COLUMNS = ("category", "species", "organism", "taxid", "accession", "level", "date", "url", "file")
NO_EPITHETS = {"archaeon", "bacterium", "endosymbiont", "environmental", "phage", "phytoplasma", "symbiont", "virus"}
ALIASES = Path(__file__).with_name("aliases.tsv")
NEAR = 0.85  # similarity (of 1) from which a name is worth suggesting


@dataclass
class Entry:
    """A line of the species list and what was found for it."""

    category: str
    species: str  # as the list has it
    line: int
    wanted: str  # organism name (see `normal`) or taxid
    exact: dict[str, Assembly] = field(default_factory=dict)  # the best of each species (its taxid) that fits
    whole: set[str] = field(default_factory=set)  # those of `exact` whose name is the one wanted, not only its first words
    genus: set[str] = field(default_factory=set)  # taxids of the species of the genus `wanted`
    best: Assembly | None = None  # of the genus
    objections: Counter[str] = field(default_factory=Counter)  # to assemblies that would fit

    @property
    def found(self) -> list[Assembly]:
        """The species that the name stands for, genera aside."""
        return [self.exact[taxid] for taxid in sorted(self.whole or self.exact)]

    def offer(self, key: str, row: Assembly, whole: bool) -> None:
        """Take a row of species `key` into account."""
        if whole:
            self.whole.add(key)
        if key not in self.exact or row.rank > self.exact[key].rank:
            self.exact[key] = row

    def offer_to_genus(self, row: Assembly) -> None:
        """Take a row of a species of the genus into account."""
        self.genus.add(row.species_taxid)
        if self.best is None or row.rank > self.best.rank:
            self.best = row


def read_species(path: Path, aliases: dict[str, str]) -> list[Entry]:
    """The list: a table with a header and the columns category and species. Raises InputError naming file and line."""
    rows = _rows(path)
    _, header = next(rows, (0, []))
    if not {"category", "species"} <= set(header):
        raise InputError(f"{path}: the first line must name the columns category and species, separated by tabs")
    entries: list[Entry] = []
    for line, cells in rows:
        row = dict(zip(header, cells, strict=False))
        category, species = row.get("category", ""), row.get("species", "")
        if not category or not normal(species):
            raise InputError(f"{path}: line {line} has no {'species' if category else 'category'}; complete or remove it")
        entries.append(Entry(category, species, line, normal(aliases.get(normal(species), species))))
    if not entries:
        raise InputError(f"{path}: lists no species")
    return entries


def read_aliases(path: Path | None) -> dict[str, str]:
    """What the names of aliases stand for, the user's (`path`) before the project's. Keys are normal names."""
    aliases: dict[str, str] = {}
    for each in [ALIASES] + ([path] if path else []):
        for line, cells in _rows(each):  # a header is an alias that nobody uses
            if len(cells) != 2 or not all(map(normal, cells)):
                raise InputError(f"{each}: line {line} must have two columns, alias and organism, separated by a tab")
            aliases[normal(cells[0])] = cells[1]
    return aliases


def normal(name: str) -> str:
    """A name for comparison: one case, single spaces, without the brackets and quotes of doubtful names."""
    return " ".join(re.sub(r"[][\"']", "", name).casefold().split())


def species_words(row: Assembly) -> str:
    """The species within the name of a strain or subspecies, or nothing where the name does not tell it."""
    words = row.organism.split()
    size = 3 if words[0] == "Candidatus" else 2
    known = len(words) > size and re.fullmatch("[a-z-]+", words[size - 1]) and words[size - 1] not in NO_EPITHETS
    return normal(" ".join(words[:size])) if known and row.taxid != row.species_taxid else ""


def is_subspecies(row: Assembly) -> bool:
    """Whether a row below species is an animal's or plant's subspecies by its three words: a dog is no typical wolf."""
    words = row.organism.split()
    return len(words) == 3 and words[0] != "Candidatus" and re.fullmatch("[a-z-]+", words[2]) is not None


def genus_of(name: str) -> str:
    """The genus within a normal name, which for Candidatus has two words."""
    words = name.split()
    return " ".join(words[: 2 if words[0] == "candidatus" else 1])


def place(entries: list[Entry], rows: Iterable[Assembly], *, allow_excluded: bool = False) -> None:
    """Give each entry the rows that fit it, in one pass."""
    wanted: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        wanted[entry.wanted].append(entry)
    for row in rows:
        if not (name := normal(row.organism)):
            continue
        is_species = row.taxid == row.species_taxid
        fits = [(entry, row.species_taxid if is_species else row.taxid, True) for entry in wanted.get(name, ())]
        fits += [(entry, row.taxid, True) for entry in wanted.get(row.taxid, ())]
        if not is_species:
            inexact = is_subspecies(row)
            key = row.taxid if inexact else row.species_taxid
            fits += [(entry, key, not inexact) for entry in wanted.get(row.species_taxid, ())]
            fits += [(entry, key, False) for entry in wanted.get(species_words(row), ())]
        genera = [] if row.organism.startswith("[") else wanted.get(genus_of(name), ())
        if not fits and not genera:
            continue
        objection = row.objection(allow_excluded)
        for entry, key, whole in fits:
            if objection:
                entry.objections[objection] += 1
            else:
                entry.offer(key, row, whole)
        for entry in genera:
            if objection:
                entry.objections[objection] += 1
            else:
                entry.offer_to_genus(row)


def near_names(entries: list[Entry], rows: Iterable[Assembly], number: int = 3) -> dict[int, list[str]]:
    """Up to `number` names, with taxids, that resemble the entries', by the entries' lines.

    Only names are compared that begin with the same three letters or share the second word, which is what can be afforded.
    """
    by_key: defaultdict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        for key in _keys(entry.wanted):
            by_key[key].append(entry)
    scores: defaultdict[int, dict[str, float]] = defaultdict(dict)
    seen: set[str] = set()
    for row in rows:
        name = normal(row.organism)
        fits = {entry.line: entry for key in _keys(name) for entry in by_key.get(key, ())}
        if not fits or name in seen:
            continue
        seen.add(name)
        for entry in fits.values():
            score = _similarity(_letters(entry.wanted), _letters(name))
            if score >= NEAR:
                scores[entry.line][f"{row.organism} (taxid {row.taxid})"] = score
                if len(scores[entry.line]) > 100:
                    scores[entry.line] = dict(nlargest(number, scores[entry.line].items(), key=itemgetter(1)))
    return {line: [name for name, _ in nlargest(number, found.items(), key=itemgetter(1))] for line, found in scores.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the catalog, or list what can't be placed."""
    entries = read_species(args.species, read_aliases(args.aliases))

    def rows() -> Iterator[Assembly]:
        for path in args.assembly_summary:
            yield from read_assemblies(path)

    place(entries, rows(), allow_excluded=args.allow_excluded)
    chosen: list[tuple[Entry, Assembly]] = []
    problems: dict[int, str] = {}  # by line of the list
    absent: list[Entry] = []
    for entry in entries:
        if len(entry.found) == 1:
            chosen.append((entry, entry.found[0]))
        elif entry.found:
            names = ", ".join(f"{row.organism} (taxid {row.taxid})" for row in entry.found[:5])
            problems[entry.line] = f"ambiguous, {len(entry.found)} species or subspecies have this name: {names}"
        elif entry.best is not None and (args.any_of_genus or (args.allow_genus and len(entry.genus) == 1)):
            chosen.append((entry, entry.best))
        elif entry.best is not None:
            what = "ambiguous" if args.allow_genus else "not placed"
            best = f"{entry.best.organism} (taxid {entry.best.species_taxid})"
            problems[entry.line] = f"{what}, a genus of {len(entry.genus)} species; the best assembly is of {best}"
        elif entry.objections:
            reasons = ", ".join(f"{count} {reason}" for reason, count in entry.objections.most_common(3))
            problems[entry.line] = f"not placed, none of its assemblies can be taken: {reasons}"
        else:
            absent.append(entry)
    suggestions = near_names(absent, rows()) if absent else {}
    for entry in absent:
        near = "; near: " + ", ".join(suggestions[entry.line]) if entry.line in suggestions else ""
        problems[entry.line] = f"not placed, no organism has this name{near}"
    problems.update(_clashes(chosen))
    for entry in entries:
        if entry.line in problems:
            alias = f" (alias of {entry.wanted})" if entry.wanted != normal(entry.species) else ""
            log(f"line {entry.line}: {entry.category}, {entry.species}{alias}: {problems[entry.line]}")
    if problems:
        raise InputError(
            f"{args.species}: {len(problems)} of {len(entries)} species have problems, listed above; correct the names or "
            "give them an organism or taxid in --aliases (for genera see also --allow-genus and --any-of-genus)"
        )
    lines = [COLUMNS, *(_line(entry, row) for entry, row in chosen)]
    write_atomically(args.out, "".join("\t".join(line) + "\n" for line in lines).encode())
    levels = Counter(row.level for _, row in chosen)
    log(f"{args.out}: {len(chosen)} assemblies ({', '.join(f'{count} {level}' for level, count in levels.most_common())})")
    return {"catalog": str(args.out), "species": len(chosen), "levels": dict(levels)}


def safe_name(text: str) -> str:
    """The text as a file name: letters, digits, dots and dashes stay, the rest becomes underscores."""
    return re.sub(r"[^\w.-]+", "_", text).strip("._") or "_"


def _line(entry: Entry, row: Assembly) -> tuple[str, ...]:
    folder = re.sub("^ftp://", "https://", row.ftp_path.rstrip("/"))
    url = f"{folder}/{folder.rsplit('/', 1)[1]}_genomic.fna.gz"
    file = f"{safe_name(entry.category)}/{safe_name(entry.species)}.fna.gz"
    date = row.date.replace("/", "-")
    return (entry.category, entry.species, row.organism, row.taxid, row.accession, row.level, date, url, file)


def _clashes(chosen: list[tuple[Entry, Assembly]]) -> dict[int, str]:
    """Lines that would put a genome, or a file name, into the dataset twice."""
    problems: dict[int, str] = {}
    first: dict[str, Entry] = {}
    for entry, row in chosen:
        file = _line(entry, row)[-1]
        number = re.sub(r"^GC[AF]_|\.\d+$", "", row.accession)  # GenBank's and RefSeq's copies of an assembly share it
        for key, what in ((number, f"the genome {row.accession}"), (file.casefold(), f"the file {file}")):
            other = first.setdefault(key, entry)
            if other is not entry:
                problems.setdefault(entry.line, f"leads to {what} of line {other.line}, {other.species}; remove one of them")
    return problems


def _letters(name: str) -> str:
    """The name's letters and digits; "sp." tells nothing, and lists lose it."""
    return re.sub(r"\bsp\.|[\W_]+", "", name)


def _keys(name: str) -> list[str]:
    words = name.split()
    return [_letters(name)[:3]] + [word for word in words[1:2] if len(word) > 4 and word not in NO_EPITHETS]


def _similarity(ours: str, theirs: str) -> float:
    """1 for equal letters, and NEAR at least for a name that goes on where ours ends: lists cut names short."""
    if theirs.startswith(ours):
        return max(NEAR, len(ours) / len(theirs))
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    return matcher.ratio() if min(matcher.real_quick_ratio(), matcher.quick_ratio()) >= NEAR else 0.0


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of the lines of a small tab-separated file that have any."""
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start}); save it as such") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, [cell.strip() for cell in line.split("\t")]


def register(verbs: Any) -> None:
    """Add the verb to the command line."""
    verb = add_verb(verbs, "catalog", run, "Choose one NCBI assembly for each species of a list; lists what it can't place.")
    verb.add_argument(
        "--species", type=Path, required=True, metavar="FILE", help="table with a header and the columns category, species"
    )
    verb.add_argument(
        "--assembly-summary",
        type=Path,
        required=True,
        nargs="+",
        metavar="FILE",
        help="NCBI's assembly_summary tables, plain or gzip (see its genomes/ASSEMBLY_REPORTS)",
    )
    verb.add_argument(
        "--aliases",
        type=Path,
        metavar="FILE",
        help="table of two columns, a name of the list and its organism (name or taxid); wins over the project's own",
    )
    verb.add_argument(
        "--allow-genus", action="store_true", help="let the name of a genus stand for its species where it has only one"
    )
    verb.add_argument(
        "--any-of-genus", action="store_true", help="let the name of a genus stand for its species with the best assembly"
    )
    verb.add_argument(
        "--allow-excluded",
        action="store_true",
        help="take assemblies that GenBank has and RefSeq excludes, such as those from metagenomes",
    )
    verb.add_argument("--out", type=Path, required=True, metavar="FILE", help="the catalog to write, for `fetch`")
