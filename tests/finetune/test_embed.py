from __future__ import annotations

import os
import tracemalloc
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from data_prep.cli import InputError
from finetune import embed as module
from finetune.embed import embed, embeddings
from finetune.inference import open_model
from tests.finetune.asked_models import KINDS, exported, input_ids, named, random_sequences, write_model

Pooling = Literal["mean", "cls"]


def write_fasta(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(f">record-{number}\n{text}\n" for number, text in enumerate(texts)))
    return path


def padded(folder: Path, kind: str, texts: list[str], pooling: Pooling) -> NDArray[np.float32]:
    """By the exported code in one padded batch, as its model card says."""
    rows = [torch.tensor(input_ids(folder, kind, text)) for text in texts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    with torch.no_grad():
        states = exported(folder).bert(ids, attention_mask=mask).last_hidden_state
    if pooling == "cls":
        return states[:, 0].numpy()
    return ((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_both_formats_hold_what_the_exported_code_computes(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_SEQUENCES", 16)
    folder = write_model(tmp_path / "model", kind)
    texts = random_sequences(50, 90)
    source = write_fasta(tmp_path / "reads.fa", texts)
    names = [f"record-{number}" for number in range(50)]

    result = embed(str(folder), source, tmp_path / "mean.safetensors")
    with safe_open(tmp_path / "mean.safetensors", "np") as file:
        assert np.abs(file.get_tensor("embeddings") - padded(folder, kind, texts, "mean")).max() < 1e-5
        about = file.metadata()
    assert about["model"] == str(folder) and about["pooling"] == "mean" and about["hidden"] == "24"
    assert about["tokenizer_sha256"] == result["tokenizer_sha256"]
    assert (tmp_path / "mean.names.txt").read_text().splitlines() == names

    embed(str(folder), source, tmp_path / "cls.npz", pooling="cls")
    with np.load(tmp_path / "cls.npz") as arrays:
        assert arrays["names"].tolist() == names
        assert arrays["embeddings"].dtype == np.float32
        assert np.abs(arrays["embeddings"] - padded(folder, kind, texts, "cls")).max() < 1e-5
        assert '"pooling": "cls"' in str(arrays["about"])


def test_a_sequence_does_not_depend_on_its_company(tmp_path: Path) -> None:
    opened = open_model(write_model(tmp_path / "model", "bpe"))
    sequences = named(random_sequences(40, 300))
    together, _ = embeddings(opened, sequences, "mean")
    alone = np.concatenate([embeddings(opened, [sequence], "mean")[0] for sequence in sequences])
    assert np.abs(together - alone).max() < 2e-6


def test_windows_of_contigs_and_truncation(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "overlapping-kmer")
    (text,) = random_sequences(1, 101, least=101)
    source = write_fasta(tmp_path / "contigs.fa", [text, text[:20]])
    result = embed(str(folder), source, tmp_path / "out.npz", window=33)
    with np.load(tmp_path / "out.npz") as arrays:
        assert arrays["names"].tolist() == ["record-0:0-33", "record-0:33-66", "record-0:66-101", "record-1"]
        expected = padded(folder, "overlapping-kmer", [text[:33], text[33:66], text[66:], text[:20]], "mean")
        assert np.abs(arrays["embeddings"] - expected).max() < 1e-5
    assert result["sequences"] == 4 and result["truncated"] == 0
    result = embed(str(folder), source, tmp_path / "out.npz", max_length=20)  # 18 overlapping 3-mers are 20 bases
    with np.load(tmp_path / "out.npz") as arrays:
        assert np.abs(arrays["embeddings"][0] - arrays["embeddings"][1]).max() < 1e-6
    assert result["truncated"] == 1


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_memory_does_not_grow_with_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    monkeypatch.setattr(module, "BLOCK_SEQUENCES", 256)
    folder = write_model(tmp_path / "model", "kmer")
    texts = random_sequences(500, 30)

    def peak(rows: int) -> int:
        source = tmp_path / f"{rows}.csv"
        source.write_text("sequence\n" + "".join(f"{texts[row % 500]}\n" for row in range(rows)))
        tracemalloc.start()
        embed(str(folder), source, tmp_path / f"out{suffix}")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(300)  # what is imported and cached at first
    assert peak(20_000) < peak(2_000) + 200_000  # the vectors alone are 1.9 MB


def test_bad_input_is_found_before_anything_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", "overlapping-kmer")
    monkeypatch.setattr(module, "embeddings", None)
    work = tmp_path / "work"
    work.mkdir()
    cases = {
        "record 'record-1': 'AC' has no token": ["ACGT", "AC"],
        "record 'record-2': 10,239 tokens, the model takes 10,238; .*--window": ["ACGT", "A" * 10_240, "A" * 10_241],
    }
    for message, texts in cases.items():
        source = write_fasta(tmp_path / "reads.fa", texts)
        for out in ("out.npz", "out.safetensors"):
            with pytest.raises(InputError, match=message):
                embed(str(folder), source, work / out)
    for options, message in (
        ({"window": 0}, "--window 0"),
        ({"max_length": 2}, "--max-length 2: must be from 3 to 10240"),
        ({"out": work / "out.csv"}, "must end in .safetensors or .npz"),
    ):
        arguments = {"out": work / "out.npz"} | options
        with pytest.raises(InputError, match=message):
            embed(str(folder), source, **arguments)
    assert list(work.iterdir()) == []


def test_a_failure_leaves_the_files_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", "kmer")
    out = tmp_path / "work" / "out.safetensors"
    embed(str(folder), write_fasta(tmp_path / "few.fa", ["ACGT"] * 20), out)
    before = out.read_bytes()
    source = write_fasta(tmp_path / "many.fa", ["A" * 1000] * 2000)

    def cut_the_input(*arguments: Any) -> Any:
        os.truncate(source, 1_500_000)
        return embeddings(*arguments)

    monkeypatch.setattr(module, "BLOCK_SEQUENCES", 500)
    monkeypatch.setattr(module, "embeddings", cut_the_input)
    with pytest.raises(InputError, match=r"many\.fa: changed while it was read"):
        embed(str(folder), source, out, max_length=5)
    assert out.read_bytes() == before
    assert sorted(file.name for file in out.parent.iterdir()) == ["out.names.txt", "out.safetensors"]
    assert (out.parent / "out.names.txt").read_text().count("\n") == 20
