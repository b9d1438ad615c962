from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from data_prep.cli import InputError
from finetune.inference import LONGEST, open_model
from finetune.run import run
from finetune.sequences import Named
from pretrain.hf import import_directory
from tests.finetune.asked_models import KINDS, exported, input_ids, named, random_sequences, spans, write_model


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_where_they_begin(tmp_path: Path, kind: str) -> None:
    model = write_model(tmp_path / "model", kind)
    opened = open_model(model)
    for text in ("ACGTTGCAACGGTACG", "ACGNNGTACNACGTA", "TTTTTTTT", "ACG"):
        (ids,), _ = opened.encode(named([text]))
        expected = spans(model, kind, text)
        assert ids.tolist() == [token for token, _, _ in expected]
        starts = opened.token_starts(text, ids)
        assert starts[:-1].tolist() == [first for _, first, _ in expected] and starts[-1] == len(text)


def test_a_run_directory_answers_as_the_hugging_face_directory(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "bpe")
    import_directory(folder, tmp_path / "run")
    text = "ACGTTGCAAC"
    with torch.no_grad():
        expected = exported(folder).bert(torch.tensor([input_ids(folder, "bpe", text)])).last_hidden_state[0]
    for path in (folder, tmp_path / "run"):
        opened = open_model(path)
        parts, _ = opened.encode(named([text]))
        ((_, _, states),) = opened.states(parts)
        assert (states - expected).abs().max() < 1e-5
    opened = open_model(folder, dtype="bf16")
    ((_, _, states),) = opened.states(parts)
    difference = (states.float() - expected).abs().mean() / expected.abs().mean()
    assert 1e-4 < difference < 0.05


def test_sequences_that_the_model_cannot_take(tmp_path: Path) -> None:
    opened = open_model(write_model(tmp_path / "model", "overlapping-kmer"))
    assert opened.encoder.least_bases == 3
    with pytest.raises(InputError, match=r"test, s0: 'AC' has no token .* of 3-mers"):
        opened.encode(named(["AC"]))
    longest = "A" * (LONGEST + 2)
    assert len(opened.encode(named([longest]))[0][0]) == LONGEST <= opened.encoder.most_bases
    with pytest.raises(InputError, match=r"here: 10,239 tokens, the model takes 10,238; cut it"):
        opened.encode([Named("long", longest + "A", "here", "cut it")])
    parts, truncated = opened.encode(named([*random_sequences(1, 30, least=20), "ACGT"]), max_length=6)
    assert [len(part) for part in parts] == [4, 2] and truncated == 1


def test_a_tokenizer_with_numbers_beyond_the_model(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "bpe")
    copy = shutil.copytree(folder, tmp_path / "copy")
    contents = json.loads((copy / "tokenizer.json").read_text())
    vocabulary = contents["model"]["vocab"]
    vocabulary["TT"] = 90
    (copy / "tokenizer.json").write_text(json.dumps(contents))
    assert Tokenizer.from_file(str(copy / "tokenizer.json")).get_vocab_size() == 25
    with pytest.raises(InputError, match=r"tokenizer.json: has a token 90, but the model's vocab_size is 25"):
        open_model(copy)


def test_a_fine_tuned_model_can_be_asked_for_all_but_likelihoods(planted: Path, huggingface: Path, tmp_path: Path) -> None:
    tuned, quick = tmp_path / "tuned", {"max_steps": 4, "warmup_steps": 1, "learning_rate": 1e-2}
    run(str(huggingface), planted, tmp_path / "results", export=tuned, **quick)
    opened = open_model(tuned)
    weights = load_file(tuned / "model.safetensors")
    for name, parameter in opened.model.bert.named_parameters(prefix="bert"):
        assert torch.equal(parameter, weights[name]), name
    with pytest.raises(InputError, match="is fine-tuned and has no head for masked tokens"):
        open_model(tuned, predicts_masked=True)
