"""Bits a base: which bases are hidden, by hand; and the figure of runs on any ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models

from data_prep.__main__ import run
from data_prep.codec import Codec
from data_prep.dataset import SPECIALS
from data_prep.tokenizing.kmer_tokenizer import kmer_json
from pretrain.bits import hidden_bases
from pretrain.config import load_config
from pretrain.loader import Loader, MaskedBatch, open_dataset
from pretrain.masking import CLS, MASK, SEP
from pretrain.model import Packed
from tests.commands import metrics, pretrain

HIDDEN, OTHER, SHOWN = "hidden", "other", "shown"  # what the model sees of a predicted token: [MASK], a random one, itself


def make_codec(path: Path, kind: str, k: int = 0) -> Codec:
    if kind == "bpe":
        merges = [("A", "C"), ("G", "T"), ("AC", "GT")]
        words = [*SPECIALS, *"ACGT", *("".join(pair) for pair in merges)]
        Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges)).save(str(path))
    else:
        path.write_bytes(kmer_json(kind, k))
    return Codec(path)


def make_batch(codec: Codec, *sequences: tuple[str, dict[int, str]]) -> MaskedBatch:
    """Of each sequence its bases, and what becomes of which content token."""
    ids, lengths, index, labels = [], [], [], []
    for text, fates in sequences:
        tokens, _ = codec.encode([text])
        for number, fate in sorted(fates.items()):
            index.append(len(ids) + 1 + number)
            labels.append(int(tokens[number]))
            tokens[number] = {HIDDEN: MASK, OTHER: tokens[number] ^ 1, SHOWN: tokens[number]}[fate]
        ids += [CLS, *tokens.tolist(), SEP]
        lengths.append(len(tokens) + 2)
    cu_seqlens = torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32))
    packed = Packed(torch.tensor(ids, dtype=torch.int64), cu_seqlens, max(lengths, default=0))
    index_m, labels_m = torch.tensor(index, dtype=torch.int64), torch.tensor(labels, dtype=torch.int64)
    return MaskedBatch(packed, index_m, labels_m, np.arange(len(lengths)))


def test_the_bases_of_a_bpe_token_are_hidden_with_it(tmp_path: Path) -> None:
    codec = make_codec(tmp_path / "tokenizer.json", "bpe")
    # ACGT ACGT A GT T AC
    batch = make_batch(codec, ("ACGTACGTAGTTAC", {0: HIDDEN, 2: HIDDEN, 3: OTHER, 4: SHOWN, 5: HIDDEN}))
    assert hidden_bases(batch, codec).tolist() == [4, 1, 0, 0, 2]


def test_the_bases_of_kmers_side_by_side_are_hidden_with_them(tmp_path: Path) -> None:
    codec = make_codec(tmp_path / "tokenizer.json", "kmer", 3)
    # ACG TAC GTT A C: what is left over stands alone
    batch = make_batch(codec, ("ACGTACGTTAC", {1: HIDDEN, 2: OTHER, 3: HIDDEN}), ("ACGT", {0: HIDDEN, 1: SHOWN}))
    assert hidden_bases(batch, codec).tolist() == [3, 0, 1, 3, 0]


TEXT = "ACGTTGCAAC"  # eight overlapping 3-mers


@pytest.mark.parametrize(
    ("fates", "expected"),
    [
        ({3: HIDDEN}, [0]),  # can be read off the neighbours
        ({2: HIDDEN, 3: HIDDEN}, [0, 0]),
        ({2: HIDDEN, 3: HIDDEN, 4: HIDDEN}, [1, 1, 1]),  # one base, in each of them
        ({2: HIDDEN, 3: HIDDEN, 4: HIDDEN, 5: HIDDEN}, [1, 2, 2, 1]),
        ({number: HIDDEN for number in range(1, 7)}, [1, 2, 3, 3, 2, 1]),
        ({0: HIDDEN}, [1]),  # at an end a token has bases of its own
        ({0: HIDDEN, 1: HIDDEN}, [2, 1]),
        ({6: HIDDEN, 7: HIDDEN}, [1, 2]),
        ({number: HIDDEN for number in range(8)}, [3] * 8),
        ({1: HIDDEN, 2: HIDDEN, 3: HIDDEN, 4: SHOWN, 5: SHOWN, 6: SHOWN}, [1, 1, 1, 0, 0, 0]),  # a token that stays covers
        ({1: HIDDEN, 2: HIDDEN, 3: HIDDEN, 4: OTHER, 5: OTHER, 6: OTHER}, [1, 2, 3, 0, 0, 0]),  # a false one doesn't
    ],
)
def test_hidden_bases_of_overlapping_kmers(tmp_path: Path, fates: dict[int, str], expected: list[int]) -> None:
    codec = make_codec(tmp_path / "tokenizer.json", "overlapping-kmer", 3)
    assert hidden_bases(make_batch(codec, (TEXT, fates)), codec).tolist() == expected
    # What lies beside it in the batch is no neighbour.
    three = make_batch(codec, (TEXT, {7: HIDDEN}), (TEXT, fates), ("ACG", {0: HIDDEN}), (TEXT, {0: HIDDEN}))
    assert hidden_bases(three, codec).tolist() == [1, *expected, 3, 1]


def test_an_empty_batch_hides_nothing(tmp_path: Path) -> None:
    for number, kind in enumerate(("bpe", "kmer", "overlapping-kmer")):
        codec = make_codec(tmp_path / f"{number}.json", kind, 4)
        assert hidden_bases(make_batch(codec), codec).tolist() == []


@pytest.fixture(scope="module", params=["bpe", "kmer", "overlapping-kmer"])
def dataset(request: pytest.FixtureRequest, synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small genomes, by each kind of tokenizer."""
    path = tmp_path_factory.mktemp(request.param)
    tokenizer, genomes = path / "tokenizer.json", synthetic / "genomes"
    size = ["--vocab-size", "64"] if request.param == "bpe" else ["--k", "3"]
    assert run(["tokenizer", "--genomes", str(genomes), "--out", str(tokenizer), "--kind", request.param, *size]) == 0
    small = ["--region-bases", "5000", "--valid-fraction", "0.1", "--processes", "1"]
    assert run(["shard", "--genomes", str(genomes), "--tokenizer", str(tokenizer), "--out", str(path / "data"), *small]) == 0
    return path / "data"


def run_figures(dataset: Path, run_dir: Path, *overrides: str, ranks: int = 1) -> dict[str, float]:
    """What the last validation of a run says."""
    sizes = ["model.hidden_size=32", "model.num_hidden_layers=1", "train.global_batch_size=8", "train.micro_batch_size=3"]
    often = ["validation.every=1", "validation.sequences=40", "optimizer.warmup_steps=1", "train.log_every=1"]
    pretrain("train", "tiny", f"data.path={dataset}", f"run_dir={run_dir}", *sizes, *often, *overrides, ranks=ranks)
    return {key: value for key, value in metrics(run_dir)[-1].items() if key.startswith("validation")}


def test_a_model_that_knows_nothing(dataset: Path, tmp_path: Path) -> None:
    """All tokens alike: log2 of the vocabulary a token, divided by the bases that a token hides on average."""
    nothing = ["model.initializer_range=1e-9", "optimizer.learning_rate=1e-30", "train.max_steps=1"]
    found = run_figures(dataset, tmp_path / "run", *nothing)
    codec = Codec(dataset / "tokenizer.json")
    overrides = [f"data.path={dataset}", "run_dir=none", "validation.sequences=40"]
    batches = list(Loader(*open_dataset(load_config("tiny", overrides)), 0, 1).validation())
    hidden = np.concatenate([hidden_bases(batch, codec) for _, batch in batches])
    masked = sum(int((batch.packed.ids_t == MASK).sum()) for _, batch in batches)
    assert np.count_nonzero(hidden) == masked > 100  # spans leave no token that could be read off
    assert found["validation_bits_per_base"] == pytest.approx(math.log2(codec.vocab_size) * masked / hidden.sum(), rel=1e-4)
    by_category = {key for key in found if key.startswith("validation_bits_per_base/")}
    assert by_category == {f"validation_bits_per_base/{category}" for category, _ in batches}


@pytest.mark.parametrize("dataset", ["overlapping-kmer"], indirect=True)
def test_bits_are_the_same_on_any_ranks(dataset: Path, tmp_path: Path) -> None:
    alone = run_figures(dataset, tmp_path / "alone", "train.max_steps=2")
    together = run_figures(dataset, tmp_path / "together", "train.max_steps=2", "deepspeed.zero_stage=3", ranks=2)
    assert alone == pytest.approx(together, rel=1e-5)
    assert alone["validation_bits_per_base"] > 1


@pytest.mark.parametrize("dataset", ["bpe"], indirect=True)
def test_without_masked_tokens_there_are_no_bits(dataset: Path, tmp_path: Path) -> None:
    found = run_figures(dataset, tmp_path / "run", "data.replace_by_mask=0", "train.max_steps=1")
    assert "validation_loss" in found and not any("bits" in key for key in found)
