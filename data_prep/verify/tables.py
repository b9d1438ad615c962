"""Checks a dataset's small files: the manifest, the tokenizer, contigs.tsv, the shard tables, and what lies around.

The manifest is the root of all sums, and no sum tells of an edit of itself. Found is what then does not add up: its tables
with each other, with shards.npy and contigs.tsv, its settings with the tokenizer and the sequences, and the bases kept with
the bases that the sequences cover (command.py). Nothing here contradicts a wrong `seed`, `valid_fraction`, `region_bases`,
`region_tokens`, `unit_bases`, `order.window_blocks`, `packing` or `duplicates_removed` (but where it excludes what was
counted), category or `file_bytes` of a species, sum of its file (but with --genomes), sum of the exclusion list, number (but
whether it is 0) of sequences excluded or pairs of species in `duplicates.from`, nor bases that are told as dropped for
another reason: keep the manifest's own sum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.cli import InputError, one_line
from data_prep.codec import Codec
from data_prep.dataset import SHARD_ROW, SPLITS, Dataset
from data_prep.manifest import check_keys
from data_prep.pack import MINIMUM_TOKENS, PACKINGS, STRANDS
from data_prep.plan import CONTIGS_HEADER, DUPLICATES
from data_prep.storage import WRONG_SUM, file_sha256

Add = Callable[[Path, str], None]  # notes a problem: the file, what is wrong
CONTIGS = "train/contigs.tsv"
FILES = ("tokenizer.json", CONTIGS, *(f"{split}/shards.npy" for split in SPLITS))


class Tables(NamedTuple):
    """The small files of a dataset, as far as they are whole; None where one is not."""

    manifest: dict[str, Any]
    first_contig: list[int]  # [species]
    codec: Codec | None
    lengths: NDArray[np.int64] | None  # [contigs] in bases
    shards: dict[str, NDArray[np.void]]  # of each split whose table is whole


class _Opened(Dataset):
    """A dataset opened by its manifest alone: the other files are checked one by one, so that all damage is named."""

    def _file(self, name: str) -> Path:
        return Path(self.path) / name


def read_tables(path: Path, add: Add) -> Tables:
    """Read and check the small files. Raises InputError where there is no manifest to check anything by."""
    if not (path / "manifest.json").is_file() and (path / ".work").is_dir():
        raise InputError(f"{path}: is not finished; run its tasks and `python -m data_prep finalize {path}` first")
    manifest = _Opened(path).manifest
    check_keys(str(path / "manifest.json"), manifest)
    whole = {name for name in FILES if _is_recorded(path / name, str(manifest["files"].get(name)), add)}
    for name in sorted(set(manifest["files"]) - set(FILES)):
        add(path / "manifest.json", f"has the sum of {name!r}, which is no file of a dataset")
    codec = lengths = None
    shards: dict[str, NDArray[np.void]] = {}
    try:
        _check_settings(manifest)
        codec = _read_tokenizer(path / "tokenizer.json", manifest, "tokenizer.json" in whole, add)
        if CONTIGS in whole:
            lengths = _read_lengths(path / CONTIGS, manifest, add)
        for split in SPLITS:
            if f"{split}/shards.npy" in whole:
                table = _read_shards(path / split / "shards.npy", len(manifest["species"]), add)
                if table is not None:
                    shards[split] = table
        for found in (
            _not_adding_up(manifest, shards, lengths),
            _wrong_settings(manifest, codec),
            _wrong_removals(manifest),
        ):
            for what in found:
                add(path / "manifest.json", what)
        contigs = [row["contigs"] for row in manifest["species"]]
        first_contig: list[int] = (np.cumsum(contigs, dtype=np.int64) - contigs).tolist()
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path / 'manifest.json'}: lacks a key or holds a wrong value ({error!r}); shard again") from None
    return Tables(manifest, first_contig, codec, lengths, shards)


def _check_settings(manifest: dict[str, Any]) -> None:
    """Raise TypeError naming a setting that the checks of shards could not work with."""
    sizes = {key: manifest[key] for key in ("sequence_length", "minimum_tokens", "run_bases")}
    sizes |= {"tokenizer.vocab_size": manifest["tokenizer"]["vocab_size"], "order.streams": manifest["order"]["streams"]}
    for key, value in sizes.items():
        if not isinstance(value, int):
            raise TypeError(f"{key}: {value!r}")
    for key, values in (("strands", STRANDS), ("packing", PACKINGS), ("duplicates_removed", DUPLICATES)):
        if manifest[key] not in values:
            raise TypeError(f"{key}: {manifest[key]!r}")


def _is_recorded(path: Path, sha256: str, add: Add) -> bool:
    try:
        if file_sha256(path) == sha256:
            return True
        # Of the tokenizer more is said below.
        if path.name != "tokenizer.json":
            add(path, f"{WRONG_SUM}; what it tells of is not checked")
    except OSError as error:
        add(path, "not found" if isinstance(error, FileNotFoundError) else f"can't be read ({error.strerror})")
    return False


def _read_tokenizer(path: Path, manifest: dict[str, Any], recorded: bool, add: Add) -> Codec | None:
    """The dataset's tokenizer, or None when the file is not that."""
    expected = manifest["tokenizer"]
    known = f"{expected['kind']}, {expected['vocab_size']} tokens"
    if not path.is_file():
        return None
    try:
        codec = Codec(path)
    except InputError as error:
        add(path, f"{'' if recorded else WRONG_SUM + ': '}no tokenizer ({one_line(error)})")
        return None
    if not recorded:
        add(path, f"a foreign tokenizer ({codec.kind}, {codec.vocab_size} tokens): {WRONG_SUM} ({known})")
        return None
    for key in ("sha256", "kind", "k", "vocab_size"):
        if expected[key] != (value := getattr(codec, key)):
            add(path.with_name("manifest.json"), f"tokenizer.{key} is {expected[key]}, that of tokenizer.json is {value}")
    return codec


def _read_lengths(path: Path, manifest: dict[str, Any], add: Add) -> NDArray[np.int64] | None:
    """Lengths in bases of all contigs, when each row of the table is the one that the species table tells of."""
    lengths = list[int]()
    owners = (row for row in manifest["species"] for _ in range(row["contigs"]))
    with path.open(encoding="utf-8", errors="replace", newline="\n") as stream:
        if stream.readline() != CONTIGS_HEADER:
            add(path, "not a table of contigs")
            return None
        for number, (line, row) in enumerate(zip_longest(stream, owners)):
            fields = line.rstrip("\n").split("\t") if line is not None else []
            expected = [str(number), row["name"], row["file"]] if row is not None else None
            if len(fields) != 5 or fields[:3] != expected or not fields[4].isdecimal():
                what = "no more contigs" if expected is None else f"number, species and file {', '.join(expected)}"
                add(path, f"line {number + 2} is {' '.join(fields) or 'missing'}; the manifest tells of {what}")
                return None
            lengths.append(int(fields[4]))
    return np.array(lengths, dtype=np.int64)


def _read_shards(path: Path, species: int, add: Add) -> NDArray[np.void] | None:
    """A split's shard table."""
    try:
        table: NDArray[np.void] = np.load(path, allow_pickle=False)
    except ValueError as error:
        add(path, f"not a .npy table ({one_line(error)})")
        return None
    if table.dtype != SHARD_ROW or table.ndim != 1:
        add(path, "not a table of shards")
    elif (np.diff(table["shard"].astype(np.int64)) <= 0).any():
        add(path, "its shards are not in ascending order")
    elif (table["species"] >= species).any():
        add(path, f"has a shard of species {table['species'].max()}, the manifest has {species}")
    else:
        return table
    return None


def _not_adding_up(
    manifest: dict[str, Any], shards: dict[str, NDArray[np.void]], lengths: NDArray[np.int64] | None
) -> Iterator[str]:
    """What of the manifest contradicts itself, the shard tables or the contigs."""
    species = manifest["species"]
    train_tokens = manifest["splits"]["train"]["tokens"]
    for split, table in shards.items():
        told = manifest["splits"][split]
        if told["shards"] != len(table):
            yield f"splits.{split}.shards is {told['shards']}, but shards.npy has {len(table)}"
        for key in ("blocks", "sequences", "tokens"):
            if told[key] != (total := int(table[key].sum(dtype=np.uint64))):
                yield f"splits.{split}.{key} is {told[key]}, but in shards.npy {total}"
        for key in ("sequences", "tokens"):
            sums = np.zeros(len(species), np.uint64)
            np.add.at(sums, table["species"], table[key])
            for row, total in zip(species, sums.tolist(), strict=True):
                if row[key][split] != total:
                    yield f"species {row['name']}: {key}.{split} is {row[key][split]}, but in shards.npy {total}"
    contig = 0
    for row in species:
        bases = row["bases"]
        if bases["in"] != bases["kept"] + sum(bases["dropped"].values()):
            yield f"species {row['name']}: bases in are not those kept and dropped together"
        if not math.isclose(row["weight"], row["tokens"]["train"] / max(1, train_tokens), rel_tol=1e-9):
            yield f"species {row['name']}: weight is not its share of the training tokens"
        if row["first_contig"] != contig:
            yield f"species {row['name']}: first_contig is {row['first_contig']}, but {contig} contigs come before it"
        if lengths is not None and bases["in"] != (length := int(lengths[contig : contig + row["contigs"]].sum())):
            yield f"species {row['name']}: {bases['in']} bases in, but its contigs have {length}"
        contig += row["contigs"]


def _wrong_settings(manifest: dict[str, Any], codec: Codec | None) -> Iterator[str]:
    """What of the settings can't be what the sequences were made by."""
    if codec is not None and manifest["packing"] == "contiguous":  # the paper's has runs of its own
        run_bases = codec.run_bases(manifest["sequence_length"] - 2)
        if manifest["run_bases"] != run_bases:
            yield f"run_bases is {manifest['run_bases']}, but {run_bases} with tokenizer.json and this sequence_length"
    if manifest["minimum_tokens"] != MINIMUM_TOKENS:
        yield f"minimum_tokens is {manifest['minimum_tokens']}, but sequences are made of {MINIMUM_TOKENS} tokens or more"
    streams, sequences = manifest["order"]["streams"], manifest["splits"]["train"]["sequences"]
    if not 1 <= streams <= sequences:
        yield f"order.streams is {streams}, not from 1 to the {sequences} training sequences"


def _wrong_removals(manifest: dict[str, Any]) -> Iterator[str]:
    """What is told of duplicates and exclusions, here and in the species' rows, and contradicts itself."""
    removed, asked, excluded = manifest["duplicates"], manifest["duplicates_removed"], manifest["excluded"]
    dropped = {
        reason: sum(row["bases"]["dropped"][reason] for row in manifest["species"])
        for reason in ("duplicate", "near_duplicate", "excluded")
    }
    for kind, reason, asked_for in (
        ("exact", "duplicate", asked != "none"),
        ("near", "near_duplicate", asked == "near"),
    ):
        if bool(removed[kind]) != bool(dropped[reason]):
            yield f"duplicates.{kind} is {removed[kind]}, but {dropped[reason]} bases were dropped as {reason}"
        elif removed[kind] and not asked_for:
            yield f"duplicates.{kind} is {removed[kind]}, but duplicates_removed is {asked}"
    sequences = excluded["sequences"] if excluded is not None else 0
    # With both strands, a sequence of the reverse one may stand on the list alone: no base of the forward one is dropped.
    alone = manifest["strands"] == "both" and not dropped["excluded"]
    if bool(sequences) != bool(dropped["excluded"]) and not alone:
        yield f"excluded.sequences is {sequences}, but {dropped['excluded']} bases were dropped as excluded"
    for kind in ("exact", "near"):
        if removed[kind] != sum(pair[kind] for pair in removed["from"]):
            yield f"duplicates.{kind} is {removed[kind]}, not the sum of duplicates.from"


def unknown_files(path: Path, shards: dict[str, NDArray[np.void]]) -> Iterator[Path]:
    """What lies in the dataset's folder and is not part of it. Shards of a split without a table all count as known."""
    numbers = {split: set(table["shard"].tolist()) for split, table in shards.items()}
    known = {"manifest.json", *FILES, *SPLITS}
    for folder, inside in (("", path), *((f"{split}/", path / split) for split in SPLITS)):
        if not inside.is_dir():
            continue
        for entry in os.scandir(inside):
            name = f"{folder}{entry.name}"
            stem, _, ending = entry.name.partition(".")
            shard = bool(folder) and ending in ("tar", "index.npy") and stem.isdecimal() and stem == f"{int(stem):06d}"
            if shard:
                split = folder.rstrip("/")
                shard = split not in numbers or int(stem) in numbers[split]
            if not shard and name not in known:
                yield path / name
