"""`python -m finetune variants`: what a model makes of the variants of a VCF file, a row an alternative allele.

Each allele stands in the same window of the genome, N/2 bases on either side of REF, shorter at the ends of a contig.

`log_likelihood_ratio` is log P(alt) - log P(ref), in nats. Both windows are tokenized; tokens are compared between the
longest common beginning and the longest common end of the two, and at least those that cover the allele as the file
spells it. log P is the pseudo-log-likelihood of the compared tokens (Salazar et al., "Masked language model scoring",
ACL 2020): each is replaced by [MASK] alone, and the log probabilities of the true ones are summed. Overlapping k-mers are
masked all at once, since one alone could be read off its neighbours; each base then counts in up to k of them. Mind:

* a sum over fewer tokens is larger, so the ratio favours the allele that the tokenizer writes in fewer of them; `tokens_ref`
  and `tokens_alt` say how many were compared;
* non-overlapping k-mers after an indel are all others up to the end of the window, and all are compared;
* a compared [UNK] (an N) has no likelihood that means anything: the ratio is nan.

`embedding_distance` (1 - cosine) and `embedding_l2` are between the means of the last hidden states of the two windows.

The genome is read twice, one contig in memory at a time: first every REF is compared with it, then alleles are scored. The
rows have the order of the VCF file.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.cli import InputError, log, progress, replacing
from data_prep.inputs.fasta import read_fasta
from finetune.batches import micro_batches
from finetune.inference import LONGEST, MASK, UNKNOWN, Ids, Opened, add_model_arguments, open_model
from finetune.model import pool
from finetune.vcf import Listed, Variant, letters

WINDOW = 1000
BLOCK_PAIRS, BLOCK_LETTERS = 512, 1 << 20  # that are tokenized and scored together
COLUMNS = ("chrom", "pos", "id", "ref", "alt")
SCORES = ("log_likelihood_ratio", "tokens_ref", "tokens_alt", "embedding_distance", "embedding_l2")
SCORE = np.dtype([("scored", "?"), *((name, "i4" if name.startswith("tokens") else "f8") for name in SCORES)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the verb."""
    add_model_arguments(parser)
    parser.add_argument("--vcf", type=Path, required=True, metavar="FILE", help="plain, gzip or bgzip")
    parser.add_argument(
        "--fasta", type=Path, required=True, metavar="FILE", help="the genome that it refers to, plain or gzip"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.tsv", help="the table of scores")
    parser.add_argument(
        "--window", type=int, default=WINDOW, metavar="BASES", help=f"round a variant, half on each side (default: {WINDOW})"
    )
    parser.add_argument(
        "--skip-mismatches",
        action="store_true",
        help="leave out and count variants whose REF is not what the genome has there",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The verb."""
    return variants(
        args.model,
        args.vcf,
        args.fasta,
        args.out,
        window=args.window,
        skip_mismatches=args.skip_mismatches,
        dtype=args.dtype,
        kernels=args.kernels,
    )


def variants(
    model: str,
    vcf: Path,
    fasta: Path,
    out: Path,
    *,
    window: int = WINDOW,
    skip_mismatches: bool = False,
    dtype: str = "fp32",
    kernels: str = "auto",
) -> dict[str, Any]:
    """Write the table `out`; see the module.

    Returns how many `variants` there are, and how many alternative alleles: `scored`, `without_likelihood` among them (nan),
    and without a row `symbolic` (not spelled out), `mismatched` and `unfit` (a window with no token or too many).

    Raises InputError: malformed lines, a contig that the genome does not have, a REF that it does not have there.
    """
    if window < 2:
        raise InputError(f"--window {window}: must be at least 2 bases, one on each side")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=out.parent) as stream, tempfile.TemporaryFile(dir=out.parent) as numbers:
        listed = Listed(vcf, stream)
        log(f"{vcf}: {len(listed):,} variants, {listed.alleles:,} alternative alleles")
        mismatched = _check_reference(listed, fasta, skip_mismatches)
        opened = open_model(model, dtype=dtype, kernels=kernels, predicts_masked=True)
        scores = np.memmap(numbers, SCORE, "w+", shape=max(1, listed.alleles))  # a new file is zeros: nothing is scored
        total = listed.alleles - listed.symbolic - mismatched
        for block in _blocks(progress(_pairs(listed, fasta, window // 2), total=total, unit="alleles")):
            scores[[pair.allele for pair in block]] = score(opened, block)
        with replacing(out) as table:
            table.write(("\t".join(COLUMNS + SCORES) + "\n").encode())
            for variant, first in zip(listed, listed.first.tolist(), strict=False):
                table.write(_rows(variant, scores[first : first + len(variant.alts)]).encode())
        scored = int(scores["scored"].sum())
        counts = {
            "variants": len(listed),
            "scored": scored,
            "without_likelihood": int(np.isnan(scores["log_likelihood_ratio"]).sum()),
            "symbolic": listed.symbolic,
            "mismatched": mismatched,
            "unfit": total - scored,
        }
    log(f"{out}: {', '.join(f'{number:,} {name}' for name, number in counts.items() if number)}")
    return opened.about() | {"out": str(out), "window": window} | counts


def _check_reference(listed: Listed, fasta: Path, skip: bool) -> int:
    """Compare every REF with the genome; the number of spelled-out alleles where it differs, InputError unless `skip`."""
    mismatched = 0
    names: list[str] = []
    for contig, bases in _contigs(fasta, listed.contigs, names):
        for _, variant in listed.within(contig):
            if not _at(variant, bases):
                if not skip:
                    start = variant.pos - 1
                    there = bases[start : start + min(len(variant.ref), 20)].decode()
                    what = repr(there) if there else f"nothing, the record has {len(bases):,} bases"
                    raise InputError(
                        f"{listed.path}, line {variant.line}: REF is {variant.ref[:20]!r}, but {fasta} has at "
                        f"{contig}:{variant.pos} {what}; is it the right genome? --skip-mismatches leaves such variants out"
                    )
                mismatched += sum(letters(alt) is not None for alt in variant.alts)
    known = set(names)
    if unknown := [contig for contig in listed.contigs if contig not in known]:
        _, variant = next(listed.within(unknown[0]))
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        raise InputError(f"{listed.path}, line {variant.line}: {fasta} has no record {unknown[0]!r}; it has {some}")
    if mismatched:
        log(f"{listed.path}: {mismatched:,} alleles are left out, whose REF is not what {fasta} has")
    return mismatched


def _at(variant: Variant, bases: bytearray) -> bool:
    """Whether the contig has REF there."""
    return bases[variant.pos - 1 : variant.pos - 1 + len(variant.ref)] == (letters(variant.ref) or "").encode()


def _contigs(fasta: Path, wanted: Iterable[str], names: list[str] | None = None) -> Iterator[tuple[str, bytearray]]:
    """The records that are wanted, each until the next is asked for; `names` gets those of all.

    InputError where two of them have one name.
    """
    chosen, seen = set(wanted), set()
    name, bases = "", bytearray()
    for piece in read_fasta(fasta):
        if piece.start == 0 and not piece.bases:
            if name in chosen:
                yield name, bases
                bases.clear()  # before the next one grows
            name = piece.name
            if names is not None:
                names.append(name)
            if name in chosen and name in seen:
                raise InputError(f"{fasta}: has two records {name!r}; rename one")
            seen.add(name)
        elif name in chosen:
            bases += piece.bases
    if name in chosen:
        yield name, bases


@dataclass(frozen=True)
class Pair:
    """The windows of an alternative allele and of the reference."""

    allele: int  # its number among all
    ref: str
    alt: str
    start: int  # where the alleles begin in both windows
    tail: int  # letters behind them in both


def _pairs(listed: Listed, fasta: Path, flank: int) -> Iterator[Pair]:
    """Every allele that is spelled out and whose REF is right, by contig."""
    for contig, bases in _contigs(fasta, listed.contigs):
        for number, variant in listed.within(contig):
            if not _at(variant, bases):
                continue
            begin, end = variant.pos - 1, variant.pos - 1 + len(variant.ref)
            left, right = bases[max(begin - flank, 0) : begin].decode(), bases[end : end + flank].decode()
            ref = left + bases[begin:end].decode() + right
            for allele, alt in enumerate(variant.alts, int(listed.first[number])):
                if (spelled := letters(alt)) is not None:
                    yield Pair(allele, ref, left + spelled + right, len(left), len(right))


def _blocks(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Some at a time, as many as are held."""
    block: list[Pair] = []
    size = 0
    for pair in pairs:
        block.append(pair)
        size += len(pair.ref) + len(pair.alt)
        if len(block) == BLOCK_PAIRS or size >= BLOCK_LETTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def score(opened: Opened, pairs: list[Pair]) -> NDArray[np.void]:
    """The scores of all pairs, a SCORE each; those whose windows don't fit the model are not `scored`."""
    scores = np.zeros(len(pairs), dtype=SCORE)
    split = opened.encoder.split([text for pair in pairs for text in (pair.ref, pair.alt)])
    windows: list[Ids] = []  # reference and alternative by turns
    compared: list[slice] = []
    for number, (pair, ref, alt) in enumerate(zip(pairs, split[::2], split[1::2], strict=True)):
        if not all(0 < len(ids) <= LONGEST for ids in (ref, alt)):
            continue
        before, behind = _common(opened, pair, ref, alt)
        windows += [ref, alt]
        compared += [slice(before, len(ref) - behind), slice(before, len(alt) - behind)]
        scores["scored"][number] = True
    if not windows:
        return scores
    likelihood = log_likelihoods(opened, windows, compared)
    means = np.empty((len(windows), opened.config.hidden_size))
    for rows, batch, states_td in opened.states(windows):
        means[rows] = pool(states_td, batch, "mean").double().cpu().numpy()
    ref_nd, alt_nd = means[::2], means[1::2]
    cosine = (ref_nd * alt_nd).sum(1) / np.linalg.norm(ref_nd, axis=1) / np.linalg.norm(alt_nd, axis=1)
    sizes = np.array([part.stop - part.start for part in compared])
    done = scores["scored"]
    for name, values in zip(
        SCORES,
        (
            likelihood[1::2] - likelihood[::2],
            sizes[::2],
            sizes[1::2],
            np.maximum(1 - cosine, 0),  # rounding
            np.linalg.norm(ref_nd - alt_nd, axis=1),
        ),
        strict=True,
    ):
        scores[name][done] = values
    return scores


def _common(opened: Opened, pair: Pair, ref: Ids, alt: Ids) -> tuple[int, int]:
    """How many tokens at the beginning and at the end are not compared: the same in both, and none covers the allele."""
    shorter = min(len(ref), len(alt))
    same = ref[:shorter] == alt[:shorter]
    before = shorter if same.all() else int(same.argmin())
    same = ref[::-1][:shorter] == alt[::-1][:shorter]
    behind = shorter if same.all() else int(same.argmin())
    reach = opened.encoder.least_bases - 1  # bases of a token beyond where the next begins
    for ids, text in ((ref, pair.ref), (alt, pair.alt)):
        starts = opened.token_starts(text, ids)[:-1]
        first = int(np.searchsorted(starts, pair.start - reach, side="right")) - 1
        last = int(np.searchsorted(starts, len(text) - pair.tail, side="left")) - 1
        before, behind = min(before, max(first, 0)), min(behind, len(ids) - 1 - last)
    return before, min(behind, shorter - before)


def log_likelihoods(opened: Opened, windows: list[Ids], compared: list[slice]) -> NDArray[np.float64]:
    """Pseudo-log-likelihood of the compared tokens of each window, nats; nan where one of them is [UNK]."""
    total = np.zeros(len(windows))
    owners: list[int] = []
    masked: list[slice] = []  # of the window of the same number in `owners`: what is hidden at once
    for number, (ids, part) in enumerate(zip(windows, compared, strict=True)):
        if (ids[part] == UNKNOWN).any():
            total[number] = np.nan
            continue
        places = range(part.start, part.stop)
        parts = [part] if opened.encoder.overlapping else [slice(place, place + 1) for place in places]
        owners += [number] * len(parts)
        masked += parts
    for rows in micro_batches(np.array([len(windows[owner]) + 2 for owner in owners], dtype=np.int64)):
        hidden: list[Ids] = []
        index: list[NDArray[np.int64]] = []
        labels: list[Ids] = []
        begin = 1  # behind [CLS]
        for row in rows.tolist():
            ids, part = windows[owners[row]].astype(np.int32), masked[row]
            labels.append(ids[part].copy())
            ids[part] = MASK
            hidden.append(ids)
            index.append(np.arange(begin + part.start, begin + part.stop))
            begin += len(ids) + 2
        with opened.precision():
            states_td = opened.model.bert(opened.packed(hidden))
        index_m = torch.from_numpy(np.concatenate(index)).to(opened.device)
        labels_m = torch.from_numpy(np.concatenate(labels).astype(np.int64)).to(opened.device)
        found = opened.log_probabilities(states_td[index_m], labels_m).double().cpu().numpy()
        np.add.at(total, np.repeat([owners[row] for row in rows.tolist()], [len(part) for part in labels]), found)
    return total


def _rows(variant: Variant, scores: NDArray[np.void]) -> str:
    """Lines of the table for the alleles that were scored."""
    text = ""
    for alt, numbers in zip(variant.alts, scores, strict=True):
        if numbers["scored"]:
            found = (f"{numbers[name]:d}" if name.startswith("tokens") else f"{numbers[name]:.6g}" for name in SCORES)
            text += "\t".join([variant.chrom, str(variant.pos), variant.id, variant.ref, alt, *found]) + "\n"
    return text
