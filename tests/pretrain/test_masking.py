import itertools
from pathlib import Path

import numpy as np
import pytest

from data_prep.__main__ import run
from data_prep.codec import Codec
from data_prep.tokenizing.kmer_tokenizer import kmer_json
from pretrain.config import DataConfig, load_config
from pretrain.loader import Loader, open_dataset
from pretrain.masking import CLS, FIRST_CONTENT, MASK, SEP, Masking, span_tokens

CONTENT = np.arange(FIRST_CONTENT, FIRST_CONTENT + 126)
DRAWS = 2000


def sequence_ids(count: int) -> np.ndarray:
    return np.tile(np.concatenate([[CLS], CONTENT, [SEP]]), (count, 1))


def lengths(count: int, length: int = 126) -> np.ndarray:
    return np.full(count, length)


def test_shares_are_15_percent_and_80_10_10() -> None:
    ids = sequence_ids(DRAWS)
    chosen, labels = Masking(DataConfig(path=""), vocab_size=4096, seed=3).apply(ids, lengths(DRAWS), np.arange(DRAWS))
    whole = sequence_ids(DRAWS)
    assert (ids[~chosen] == whole[~chosen]).all()
    assert (labels == whole[chosen]).all()
    seen = ids[chosen]
    random = seen[(seen != MASK) & (seen != labels)]
    # Five standard deviations of binomials of these sizes.
    total = DRAWS * len(CONTENT)
    assert abs(len(labels) / total - 0.15) < 5 * (0.15 * 0.85 / total) ** 0.5
    for count, expected in ((np.sum(seen == MASK), 0.8), (np.sum(seen == labels), 0.1), (len(random), 0.1)):
        assert abs(count / len(labels) - expected) < 5 * (expected * (1 - expected) / len(labels)) ** 0.5
    assert random.min() >= FIRST_CONTENT and random.max() > 4000
    # Each place of a sequence alike, and no token's fate tells that of its neighbour.
    assert np.ptp(chosen[:, 1:-1].mean(axis=0)) < 10 * (0.15 * 0.85 / DRAWS) ** 0.5
    assert abs(np.mean(chosen[:, 1:-2] & chosen[:, 2:-1]) - 0.15**2) < 5 * (0.15**2 / total) ** 0.5


def test_masks_depend_on_seed_and_position_alone() -> None:
    def masked(seed: int, positions: list[int], row: int) -> list[int]:
        ids = sequence_ids(len(positions))
        Masking(DataConfig(path=""), 4096, seed).apply(ids, lengths(len(positions)), np.array(positions))
        return ids[row].tolist()

    alone = masked(1, [2**40], 0)
    assert masked(1, [7, 2**40, 8], 1) == alone
    assert masked(1, [2**40 + 1], 0) != alone
    assert masked(2, [2**40], 0) != alone


def test_specials_and_what_lies_beyond_a_sequence_are_left_alone() -> None:
    ids = sequence_ids(500)
    sizes = np.arange(500) % 127
    chosen, labels = Masking(DataConfig(path="", mask_probability=0.9), 4096, 0).apply(ids, sizes, np.arange(500))
    assert not chosen[:, 0].any() and not chosen[np.arange(128) > sizes[:, None]].any()
    assert len(labels) == chosen.sum()
    assert chosen[1:127, 1:].any(axis=1).sum() > 100


def test_a_short_sequence_may_have_nothing_to_predict() -> None:
    chosen, _ = Masking(DataConfig(path=""), 4096, 0).apply(sequence_ids(50), lengths(50, 2), np.arange(50))
    assert 0 < chosen.any(axis=1).sum() < 50


def runs(chosen: np.ndarray) -> list[tuple[int, int, int]]:
    """(row, first column, length) of each stretch of masked tokens."""
    edges = np.diff(chosen.astype(np.int8), axis=1, prepend=0, append=0)
    rows, firsts = np.nonzero(edges == 1)
    return list(zip(rows.tolist(), firsts.tolist(), (np.nonzero(edges == -1)[1] - firsts).tolist(), strict=True))


def test_masks_of_single_tokens_are_what_they_were() -> None:
    """Pinned: a run that is resumed, or repeated, masks as it did."""
    ids = sequence_ids(100)
    chosen, labels = Masking(DataConfig(path=""), 4096, 3).apply(ids, lengths(100), np.arange(100))
    assert (np.flatnonzero(chosen[0])[:5].tolist(), len(labels)) == ([5, 12, 14, 20, 21], 1801)
    assert int((ids * np.arange(128)).sum()) == 91190975


@pytest.mark.parametrize("k", [3, 6])
def test_overlapping_kmers_are_masked_in_spans(k: int) -> None:
    ids = sequence_ids(DRAWS)
    chosen, labels = Masking(DataConfig(path=""), 4096, 3, span=k).apply(ids, lengths(DRAWS), np.arange(DRAWS))
    whole = sequence_ids(DRAWS)
    assert (ids[~chosen] == whole[~chosen]).all() and (labels == whole[chosen]).all()
    # k tokens in a row are masked together: five standard deviations of that many fewer draws.
    total = DRAWS * len(CONTENT) / k
    assert abs(chosen[:, 1:-1].mean() - 0.15) < 5 * (0.15 * 0.85 / total) ** 0.5
    by_column = chosen[:, 1:-1].mean(axis=0)
    assert np.ptp(by_column) < 10 * (0.15 * 0.85 / DRAWS) ** 0.5  # the ends as often as the middle
    for _, first, length in runs(chosen):
        assert length >= k or first == 1 or first + length == 127  # spans reach over the ends
    sizes = np.array([length for _, first, length in runs(chosen) if first > 1 and first + length < 127])
    assert 0.4 < np.mean(sizes == k) < 0.9


@pytest.mark.parametrize("k", [3, 6])
def test_a_span_has_one_fate(k: int) -> None:
    """Else a token that stays would tell the base that the others hide."""
    ids = sequence_ids(DRAWS)
    chosen, labels = Masking(DataConfig(path=""), 100_000, 5, span=k).apply(ids, lengths(DRAWS), np.arange(DRAWS))
    whole = sequence_ids(DRAWS)
    fate = np.where(ids == MASK, 0, np.where(ids == whole, 2, 1))
    inner = [each for each in runs(chosen) if each[1] > 1 and each[1] + each[2] < 127]
    fates = [fate[row, first : first + length] for row, first, length in inner]
    # Fewer than 2k masked in a row are one span, or several that overlap; 2k may be two that only touch.
    assert all(np.ptp(each) == 0 for each in fates if len(each) < 2 * k)
    assert any(np.ptp(each) > 0 for each in fates)
    single = np.array([each[0] for each in fates if len(each) == k])
    for value, expected in ((0, 0.8), (1, 0.1), (2, 0.1)):
        assert abs(np.mean(single == value) - expected) < 5 * (expected * (1 - expected) / len(single)) ** 0.5
    shares = [np.mean(fate[chosen] == value) for value in range(3)]
    assert np.allclose(shares, [0.8, 0.1, 0.1], atol=5 * (0.16 * 2 * k / len(labels)) ** 0.5)
    random = ids[chosen & (fate == 1)]
    assert len(np.unique(random)) > 0.95 * len(random)  # drawn for each token by itself


def test_what_spans_hide() -> None:
    """An overlapping k-mer that is masked alone could be read off its neighbours; in spans, each hides one base or more."""
    k = 4
    chosen, _ = Masking(DataConfig(path=""), 4096, 1, span=k).apply(sequence_ids(300), lengths(300), np.arange(300))
    tokens = chosen[:, 1:-1]
    seen = np.zeros((300, 126 + k - 1), dtype=bool)  # bases that stand in a token that is not masked
    for offset in range(k):
        seen[:, offset : offset + 126] |= ~tokens
    for row, first, length in runs(tokens):
        hidden = int((~seen[row, first : first + length + k - 1]).sum())
        at_an_end = first == 0 or first + length == 126
        assert hidden == (length if at_an_end else length - k + 1) >= 1


def test_spans_depend_on_seed_and_position_alone() -> None:
    def masked(positions: list[int], sizes: list[int], width: int) -> np.ndarray:
        ids = sequence_ids(len(positions))[:, :width].copy()
        Masking(DataConfig(path=""), 4096, 7, span=5).apply(ids, np.array(sizes), np.array(positions))
        return ids

    together = masked([11, 2**40, 12], [126, 60, 126], 128)
    assert (masked([2**40], [60], 62)[0] == together[1, :62]).all()
    assert (masked([12, 11], [126, 126], 128) == together[[2, 0]]).all()
    assert (together[1, 61:] == sequence_ids(1)[0, 61:]).all()  # beyond its length


def test_the_manifest_says_whether_there_are_spans() -> None:
    """Older datasets name no kind."""
    assert span_tokens({"sha256": "", "vocab_size": 4096}) == 1
    assert span_tokens({"kind": "bpe", "k": None}) == 1
    assert span_tokens({"kind": "kmer", "k": 6}) == 1
    assert span_tokens({"kind": "overlapping-kmer", "k": 6}) == 6


def test_the_loader_takes_spans_from_the_dataset(tmp_path: Path) -> None:
    """From genomes to batches: overlapping k-mers that stand at their place and are masked in spans, in both splits."""
    bases = np.frombuffer(b"ACGT", np.uint8)[np.random.default_rng(0).integers(0, 4, 60_000)].tobytes()
    (tmp_path / "genomes").mkdir()
    (tmp_path / "genomes" / "made.fa").write_bytes(b">r\n" + bases + b"\n")
    tokenizer, dataset = str(tmp_path / "tokenizer.json"), str(tmp_path / "dataset")
    Path(tokenizer).write_bytes(kmer_json("overlapping-kmer", 4))
    options = ["--region-bases", "10000", "--valid-fraction", "0.3", "--processes", "1"]
    assert run(["shard", "--genomes", str(tmp_path / "genomes"), "--tokenizer", tokenizer, "--out", dataset, *options]) == 0
    overrides = [f"run_dir={tmp_path}", f"data.path={dataset}", "train.global_batch_size=64", "train.micro_batch_size=64"]
    loader = Loader(*open_dataset(load_config("tiny", overrides)), 0, 1)
    for batch in (loader.step(0)[0], next(loader.validation())[1]):
        chosen = np.zeros(len(batch.packed.ids_t), dtype=bool)
        chosen[batch.index_m.numpy()] = True
        starts = batch.packed.cu_seqlens.numpy()
        masked = [runs(chosen[None, start:end]) for start, end in itertools.pairwise(starts)]
        inner = [
            length
            for stretches, size in zip(masked, np.diff(starts), strict=True)
            for _, first, length in stretches
            if first > 1 and first + length < size - 1
        ]
        assert len(inner) > 20 and min(inner) == 4
        ids = batch.packed.ids_t.numpy().copy()
        ids[chosen] = batch.labels_m.numpy()
        first = Codec(Path(tokenizer)).decode(ids[1 : starts[1] - 1])
        assert first in bases and len(first) == starts[1] - 2 + 3
