from __future__ import annotations

import argparse
import csv
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.cli import InputError
from data_prep.tokenizing.kmer_tokenizer import OVERLAPPING
from finetune import variants as module
from finetune.inference import open_model
from finetune.variants import Pair, add_arguments, log_likelihoods, run, score
from pretrain.hf_modeling import DNABERT2ForMaskedLM
from tests.finetune.asked_models import KINDS, MASK, exported, input_ids, random_sequences, spans, write_model

HEAD = "##fileformat=VCFv4.3\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
Row = tuple[str, int, str, str, str]


def write_vcf(path: Path, rows: list[Row]) -> Path:
    path.write_text(HEAD + "".join("\t".join(map(str, row)) + "\t.\tPASS\t.\n" for row in rows))
    return path


def write_genome(path: Path, contigs: dict[str, str]) -> Path:
    path.write_text("".join(f">{name} of a test\n{text}\n" for name, text in contigs.items()))
    return path


def ask(*arguments: object) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


class Slow:
    """The same numbers, one sequence and one token at a time, by the exported code and the `tokenizers` library."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self.model: DNABERT2ForMaskedLM = exported(folder)

    def compared(self, texts: list[str], alleles: list[str], start: int) -> list[list[int]]:
        """Places of the compared tokens in each text, from 0."""
        tokens = [spans(self.folder, self.kind, text) for text in texts]
        covers = [
            [first < start + len(allele) and end > start for _, first, end in each]
            for each, allele in zip(tokens, alleles, strict=True)
        ]
        left, right = [list(range(len(each))) for each in tokens]

        def same(a: int, b: int) -> bool:
            return tokens[0][a][0] == tokens[1][b][0] and not covers[0][a] and not covers[1][b]

        while left and right and same(left[0], right[0]):
            left, right = left[1:], right[1:]
        while left and right and same(left[-1], right[-1]):
            left, right = left[:-1], right[:-1]
        return [left, right]

    def likelihood(self, text: str, places: list[int]) -> float:
        ids = input_ids(self.folder, self.kind, text)
        total = 0.0
        for hidden in [places] if self.kind == OVERLAPPING else [[place] for place in places]:
            masked = torch.tensor([ids])
            masked[0, [place + 1 for place in hidden]] = MASK
            with torch.no_grad():
                found = self.model(masked).logits[0].double().log_softmax(-1)
            total += sum(float(found[place + 1, ids[place + 1]]) for place in hidden)
        return total

    def mean(self, text: str) -> torch.Tensor:
        with torch.no_grad():
            states = self.model.bert(torch.tensor([input_ids(self.folder, self.kind, text)])).last_hidden_state
        return states[0].double().mean(0)

    def row(self, contig: str, pos: int, ref: str, alt: str, flank: int) -> tuple[float, int, int, float, float]:
        begin, end = pos - 1, pos - 1 + len(ref)
        left, right = contig[max(0, begin - flank) : begin], contig[end : end + flank]
        texts = [left + ref + right, left + alt + right]
        places = self.compared(texts, [ref, alt], len(left))
        of_ref, of_alt = (self.likelihood(text, part) for text, part in zip(texts, places, strict=True))
        a, b = map(self.mean, texts)
        distance = 1 - float(torch.nn.functional.cosine_similarity(a, b, dim=0))
        return of_alt - of_ref, len(places[0]), len(places[1]), distance, float((a - b).norm())


def random_rows(contigs: dict[str, str], count: int) -> list[Row]:
    """Substitutions, insertions and deletions anywhere, both ends of contigs among them, in no order."""
    draw = random.Random(4)
    rows: list[Row] = []
    for number in range(count):
        name = draw.choice(list(contigs))
        text = contigs[name]
        begin = draw.choice([0, 1, len(text) - 1, draw.randrange(len(text)), draw.randrange(len(text))])
        ref = text[begin : begin + draw.choice([1, 1, 2, 7])]
        alts = {"".join(draw.choices("ACGT", k=draw.choice([1, 1, 2, 5]))) for _ in range(draw.choice([1, 1, 2]))} - {ref}
        rows.append((name, begin + 1, f"v{number}", ref, ",".join(sorted(alts)) or "<DEL>"))
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_are_those_of_a_slow_loop(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_PAIRS", 7)
    folder = write_model(tmp_path / "model", kind)
    contigs = dict(zip("xyz", random_sequences(3, 150, least=100), strict=True))
    fasta = write_genome(tmp_path / "genome.fa", {"unused": "ACGT", **contigs})
    rows = random_rows(contigs, 40)
    vcf = write_vcf(tmp_path / "some.vcf", rows)
    out = tmp_path / "scores.tsv"
    result = ask("--model", folder, "--vcf", vcf, "--fasta", fasta, "--out", out, "--window", 30)
    alleles = [(*row[:4], alt) for row in rows for alt in row[4].split(",") if alt != "<DEL>"]
    assert result["scored"] == len(alleles) and result["variants"] == 40
    slow = Slow(folder, kind)
    found = table(out)
    assert [(r["chrom"], int(r["pos"]), r["id"], r["ref"], r["alt"]) for r in found] == alleles
    for line, (name, pos, _, ref, alt) in zip(found, alleles, strict=True):
        ratio, of_ref, of_alt, distance, l2 = slow.row(contigs[name], pos, ref, alt, 15)
        assert (int(line["tokens_ref"]), int(line["tokens_alt"])) == (of_ref, of_alt)
        assert float(line["log_likelihood_ratio"]) == pytest.approx(ratio, abs=2e-4)
        assert float(line["embedding_distance"]) == pytest.approx(distance, abs=2e-6)
        assert float(line["embedding_l2"]) == pytest.approx(l2, abs=1e-4)


def test_a_substitution_is_a_difference_of_two_logits(huggingface: Path) -> None:
    """With a token a base both alleles are read from one distribution."""
    pair = Pair(0, "ACGTACGTA", "ACGTCCGTA", 4, 4)
    (found,) = score(open_model(huggingface), [pair])
    model = exported(huggingface)
    ids = torch.tensor([[1, 5, 6, 7, 8, MASK, 6, 7, 8, 5, 2]])
    with torch.no_grad():
        logits = model(ids).logits[0, 5]
    assert found["log_likelihood_ratio"] == pytest.approx(float(logits[6] - logits[5]), abs=1e-5)
    assert found["tokens_ref"] == found["tokens_alt"] == 1
    assert found["embedding_distance"] > 0


def test_a_deletion_among_equal_tokens_compares_those_of_the_allele(huggingface: Path) -> None:
    """Without its own token the shorter allele would be certain."""
    opened = open_model(huggingface)
    (found,) = score(opened, [Pair(0, "CAAAAC", "CAAAC", 1, 3)])  # REF AA, ALT A
    assert (found["tokens_ref"], found["tokens_alt"]) == (2, 1)
    windows = [np.array([6, 5, 5, 5, 5, 6]), np.array([6, 5, 5, 5, 6])]
    of_ref, of_alt = log_likelihoods(opened, windows, [slice(1, 3), slice(1, 2)])
    assert found["log_likelihood_ratio"] == pytest.approx(of_alt - of_ref) and of_alt < 0


def test_unknown_letters_and_alleles_that_are_not_spelled_out(tmp_path: Path, huggingface: Path) -> None:
    fasta = write_genome(tmp_path / "genome.fa", {"c": "ACGTNNNNNACGTACGTACRT"})
    rows: list[Row] = [
        ("c", 2, ".", "c", "t,<DEL>,*"),  # N in its window
        ("c", 5, ".", "N", "A"),
        ("c", 13, ".", "T", "N"),
        ("c", 20, ".", "R", "N"),  # nothing differs
        ("elsewhere", 5, ".", "N", "<DEL>"),
        ("c", 3, ".", "G", "."),
        ("c", 16, ".", "G", "GA"),
    ]
    vcf = write_vcf(tmp_path / "some.vcf", rows)
    result = ask("--model", huggingface, "--vcf", vcf, "--fasta", fasta, "--out", tmp_path / "out.tsv", "--window", 20)
    assert {name: result[name] for name in ("scored", "without_likelihood", "symbolic", "mismatched", "unfit")} == {
        "scored": 5,
        "without_likelihood": 3,
        "symbolic": 4,
        "mismatched": 0,
        "unfit": 0,
    }
    found = table(tmp_path / "out.tsv")
    assert [(line["ref"], line["alt"]) for line in found] == [("c", "t"), ("N", "A"), ("T", "N"), ("R", "N"), ("G", "GA")]
    ratios = [float(line["log_likelihood_ratio"]) for line in found]
    assert [math.isnan(ratio) for ratio in ratios] == [False, True, True, True, False]
    assert float(found[3]["embedding_distance"]) == 0 == float(found[3]["embedding_l2"])


def test_a_reference_that_the_genome_does_not_have(tmp_path: Path, huggingface: Path) -> None:
    fasta = write_genome(tmp_path / "genome.fa", {"c": "ACGTACGTAC", "d": "TTTT", "e": "A"})
    out = tmp_path / "out.tsv"
    ends = ("--fasta", fasta, "--out", out)

    def refused(row: Row) -> str:
        vcf = write_vcf(tmp_path / "some.vcf", [("c", 1, ".", "AC", "A"), row])
        with pytest.raises(InputError) as error:
            ask("--model", huggingface, "--vcf", vcf, *ends)
        return str(error.value)

    assert "line 4: REF is 'TT', but" in (message := refused(("c", 2, ".", "TT", "T")))
    assert "has at c:2 'CG'" in message and "--skip-mismatches" in message
    assert "has at c:10 'C'" in refused(("c", 10, ".", "CA", "C"))
    assert "has at d:5 nothing, the record has 4 bases" in refused(("d", 5, ".", "T", "C"))
    assert "line 4: " in (message := refused(("chrC", 1, ".", "A", "C"))) and "no record 'chrC'; it has c, d, e" in message
    assert not out.exists()

    vcf = write_vcf(
        tmp_path / "some.vcf", [("c", 2, ".", "TT", "T,A"), ("d", 5, ".", "T", "C"), ("d", 4, "kept", "T", "G,<X>")]
    )
    result = ask("--model", huggingface, "--vcf", vcf, *ends, "--skip-mismatches")
    assert (result["scored"], result["mismatched"], result["symbolic"]) == (1, 3, 1)
    assert [line["id"] for line in table(out)] == ["kept"]
    write_genome(fasta, {"c": "AC", "d": "TTTTT", "e": "A"})
    fasta.write_text(fasta.read_text() + ">d\nTTTTT\n")
    with pytest.raises(InputError, match="two records 'd'"):
        ask("--model", huggingface, "--vcf", vcf, *ends, "--skip-mismatches")
    with pytest.raises(InputError, match="--window 1"):
        ask("--model", huggingface, "--vcf", vcf, *ends, "--window", 1)


def test_windows_that_do_not_fit_the_model_are_counted(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", OVERLAPPING)
    fasta = write_genome(tmp_path / "genome.fa", {"short": "AC", "long": "ACGTACGT"})
    vcf = write_vcf(
        tmp_path / "some.vcf",
        [("short", 1, ".", "A", "C"), ("long", 1, ".", "A", "A" + "C" * 10_240), ("long", 1, ".", "A", "C")],
    )
    result = ask("--model", folder, "--vcf", vcf, "--fasta", fasta, "--out", tmp_path / "out.tsv")
    assert (result["scored"], result["unfit"]) == (1, 2)
    empty = write_vcf(tmp_path / "empty.vcf", [])
    assert ask("--model", folder, "--vcf", empty, "--fasta", fasta, "--out", tmp_path / "out.tsv")["scored"] == 0
    assert (tmp_path / "out.tsv").read_text().startswith("chrom\tpos\tid\tref\talt\tlog_likelihood_ratio\t")
