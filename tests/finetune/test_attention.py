from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from data_prep.cli import InputError
from finetune import attention as module
from finetune.attention import add_arguments, attention_maps, draw, run
from finetune.inference import open_model
from tests.finetune.asked_models import KINDS, exported, input_ids, named, random_sequences, spans, write_model


def ask(*arguments: str | Path) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_the_exported_code(tmp_path: Path, kind: str) -> None:
    folder = write_model(tmp_path / "model", kind)
    text = random_sequences(1, 60, least=60)[0][:50] + "NACGTACGTA"
    with torch.no_grad():
        ids = torch.tensor([input_ids(folder, kind, text)])
        expected = torch.cat(exported(folder).bert(ids, output_attentions=True).attentions).numpy()
    result = ask("--model", folder, "--sequence", text, "--out", tmp_path / "out")
    with np.load(tmp_path / "out" / "attention.npz") as arrays:
        weights = arrays["weights"]
        assert weights.dtype == np.float32 and weights.shape == expected.shape
        assert np.abs(weights - expected).max() < 1e-5
        assert np.abs(weights.sum(-1) - 1).max() < 1e-5
        assert np.abs(arrays["head_mean"] - expected.mean(1)).max() < 1e-5
        assert arrays["starts"].tolist() == [-1, *(first for _, first, _ in spans(folder, kind, text)), -1]
        tokens = arrays["tokens"].tolist()
        assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and len(tokens) == ids.shape[1] == result["tokens"]
        for token, start in zip(tokens, arrays["starts"].tolist(), strict=True):
            assert token.startswith("[") or text[start:].startswith(token)


def test_chosen_layers_of_a_part_of_a_record(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "bpe")
    (text,) = random_sequences(1, 400, least=400)
    (tmp_path / "genome.fa").write_text(f">a\nACGT\n>b\n{text}\n")
    from_file = ("--input", tmp_path / "genome.fa", "--record", "b:100-300", "--layers", "1")
    result = ask("--model", folder, *from_file, "--out", tmp_path / "out")
    assert result["sequence"] == "b:100-300" and result["bases"] == 200 and result["layers"] == [1]
    whole = attention_maps(open_model(folder), named([text[100:300]])[0], [0, 1])
    with np.load(tmp_path / "out" / "attention.npz") as arrays:
        assert np.abs(arrays["weights"][0] - whole.weights[1]).max() < 1e-6
    received = whole.received()
    assert received.shape == (2, len(whole.tokens)) and np.abs(received.mean(1) - 1).max() < 1e-5
    many_tokens = matplotlib.image.imread(tmp_path / "out" / "attention.png")
    assert many_tokens.shape[1] > 700 and len(np.unique(many_tokens.reshape(-1, 4), axis=0)) > 100
    assert draw(whole, 0, "model") != draw(whole, 1, "model")


def test_maps_larger_than_a_picture_are_averaged() -> None:
    weights = np.random.default_rng(0).random((1300, 1300)).astype(np.float32)
    small = module._shrunk(weights)
    assert small.shape == (512, 512)
    assert small.mean() == pytest.approx(0.5, abs=0.01) and small.std() < 0.5 * weights.std()
    assert module._shrunk(np.ones((1300, 1300), np.float32)) == pytest.approx(1)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "model", "kmer")
    out = ("--out", tmp_path / "out", "--model", folder)
    for arguments, message in (
        (("--sequence", "ACGT", "--record", "a"), "--record goes with --input"),
        (("--sequence", "ACGT", "--layers", "0", "2"), "--layers 0 2: .* the model's are 0 to 1"),
        (("--sequence", "ACGT", "--layers", "1", "1"), "give each once"),
        (("--sequence", "ACGT", "--layers", "1", "--heads-of", "0"), "--heads-of 0: not among"),
        (("--sequence", " "), "--sequence: '' has no token"),
    ):
        with pytest.raises(InputError, match=message):
            ask(*out, *arguments)
    monkeypatch.setattr(module, "MOST_BYTES", 2 * 3 * 12 * 12 * 4)
    ask(*out, "--sequence", "ACG" * 10)
    message = "2 layers of 3 heads over 13 tokens are 0.0 GB of weights, over .* fewer --layers or a shorter sequence"
    with pytest.raises(InputError, match=message):
        ask(*out, "--sequence", "ACG" * 11)
    ask(*out, "--sequence", "ACG" * 11, "--layers", "0")
