"""Export, and what transformers makes of an exported directory; test_import.py has the way back."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_prep.__main__ import run as data_prep
from data_prep.cli import InputError
from pretrain import hf
from pretrain.hf import export_run, import_directory
from pretrain.model import Packed
from pretrain.pretrained import read_run
from tests.pretrain.directories import (
    CONFIG,
    PUBLISHED_CONFIG,
    TIED,
    WORDS,
    assert_weights,
    build_model,
    write_tokenizer,
)

LENGTHS = [9, 1, 30, 4]


def test_an_exported_directory_is_complete(exported, run_dir, model):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "modeling_dnabert2.py",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((exported / "config.json").read_text())
    assert PUBLISHED_CONFIG.keys() - config.keys() == {"_name_or_path", "transformers_version"}
    assert {value.split(".")[0] for value in config["auto_map"].values()} == {"modeling_dnabert2"}
    tensors = load_file(exported / "model.safetensors")
    state = model.state_dict()
    assert tensors.keys() == state.keys()
    assert all(tensors[name].dtype == torch.float32 and torch.equal(tensors[name], state[name]) for name in state)
    assert (exported / "tokenizer.json").read_bytes() == (run_dir / "tokenizer.json").read_bytes()
    card = (exported / "README.md").read_text()
    assert "step 200" in card and "ab" * 32 in card and "trust_remote_code=True" in card
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in exported.iterdir())
    assert os.stat(exported).st_mode & 0o777 == 0o755


def test_the_card_says_how_text_becomes_overlapping_kmers(run_dir, tmp_path):
    assert data_prep(["tokenizer", "--kind", "overlapping-kmer", "--k", "3", "--out", str(tmp_path / "t.json")]) == 0
    card = hf._model_card(replace(read_run(run_dir), tokenizer=tmp_path / "t.json"))
    (line,) = [line for line in card.splitlines() if line.startswith('text = " "')]
    names = {"text": "ACGTA"}
    exec(line, names)
    assert names["text"] == "ACG CGT GTA"
    assert 'text = " "' not in hf._model_card(read_run(run_dir))


def test_the_newest_step_that_is_whole_or_the_one_asked_for(run_dir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    assert export_run(copy, tmp_path / "newest")["step"] == 200
    assert export_run(copy, tmp_path / "first", 100)["step"] == 100
    assert torch.equal(load_file(tmp_path / "first/model.safetensors")[WORDS], build_model(1).state_dict()[WORDS])
    file = next((copy / "checkpoints/step-000000200").glob("*.safetensors"))
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert export_run(copy, tmp_path / "older")["step"] == 100
    with pytest.raises(InputError, match=r"rank-.*damaged"):
        export_run(copy, tmp_path / "damaged", 200)
    with pytest.raises(InputError, match="no checkpoint of step 300; there are: 100, 200"):
        export_run(copy, tmp_path / "absent", 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "newest", "older", "run"]


def test_a_directory_in_use_is_left_alone(run_dir, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "theirs").write_text("mine")
    with pytest.raises(InputError, match="not an empty directory"):
        export_run(run_dir, tmp_path / "used")
    assert [path.name for path in tmp_path.rglob("*")] == ["used", "theirs"]
    (tmp_path / "empty").mkdir()
    export_run(run_dir, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_export_that_fails_leaves_nothing(run_dir, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "_model_card", fail)
    with pytest.raises(OSError, match="No space"):
        export_run(run_dir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="no checkpoint that is whole"):
        export_run(tmp_path, tmp_path / "out")


def packed_and_padded():
    """The same sequences laid end to end for our model and padded for transformers, with types 0 and 1."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(5, CONFIG.vocab_size, (n,), generator=generator) for n in LENGTHS]
    types = [torch.randint(0, 2, (n,), generator=generator) for n in LENGTHS]
    packed = Packed(
        torch.cat(ids), torch.tensor([0, *LENGTHS]).cumsum(0).int(), max(LENGTHS), token_types_t=torch.cat(types)
    )

    def pad(parts, value):
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    mask = pad([torch.ones_like(part) for part in ids], 0)
    return packed, {"input_ids": pad(ids, 3), "attention_mask": mask, "token_type_ids": pad(types, 0)}


@pytest.fixture(scope="module")
def loaded(exported, tmp_path_factory):
    """What load_exported.py saw, in a process that can't reach this repository."""
    work = tmp_path_factory.mktemp("user")
    torch.save(packed_and_padded()[1], work / "inputs.pt")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    environment.pop("PYTHONPATH", None)
    script = Path(__file__).with_name("load_exported.py")
    command = [sys.executable, script, exported, work / "inputs.pt", work / "outputs.pt"]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(work / "outputs.pt"), work


def test_transformers_gives_our_logits(loaded, model):
    found, _ = loaded
    packed, _ = packed_and_padded()
    with torch.no_grad():
        logits = model.logits(packed, torch.arange(sum(LENGTHS)))
        states = model.bert(packed)
    assert found["ours_in_process"] == []
    assert logits.abs().max() > 1  # else the next lines would say little
    assert (found["logits"] - logits).abs().max() < 1e-4
    assert (found["states"] - states).abs().max() < 1e-4
    assert not found["padding"].any()
    relative = (found["bf16_logits"].float() - logits).abs().mean() / logits.abs().mean()
    assert relative < 0.05


def test_transformers_finds_every_key_and_nothing_else(loaded):
    found, _ = loaded
    nothing = {"missing_keys": [], "unexpected_keys": []}
    assert found["masked_lm_keys"] == nothing and found["encoder_keys"] == nothing and found["tied"]
    fresh = ["bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight"]
    assert found["classifier_keys"] == {"missing_keys": fresh, "unexpected_keys": []}
    assert found["classifier_loss"].isfinite() and found["pooler_kept"] and found["pooled_is_cls"]


def test_outputs_that_users_ask_for(loaded):
    found, _ = loaded
    b, s, d, h = len(LENGTHS), max(LENGTHS), CONFIG.hidden_size, CONFIG.num_attention_heads
    assert found["hidden_shapes"] == [(b, s, d)] * 3 and found["attention_shapes"] == [(b, h, s, s)] * 2
    assert found["kept_unasked"] == [None, None]  # hidden states nobody asked for fill the memory at evaluation
    assert found["with_attentions"] < 1e-4 and found["as_tuple"] and found["by_embeddings"]
    assert found["attention_to_padding"] == 0
    assert (found["attention_sum"] - 1).abs().max() < 1e-5
    assert found["nothing_but_padding"]


def test_it_trains_with_and_without_activation_checkpointing(loaded):
    found, _ = loaded
    (loss, norm), (same_loss, same_norm) = found["losses"][False], found["losses"][True]
    assert loss.isfinite() and norm > 0
    assert torch.equal(loss, same_loss) and torch.allclose(norm, same_norm)


def test_the_tokenizer_loads(loaded):
    found, _ = loaded
    assert found["tokenized"]["input_ids"] == [[1, 10, 20, 2, 3], [1, 10, 20, 0, 2]]
    assert found["tokenized"]["attention_mask"] == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert found["pair"] == [0, 0, 0, 1, 1] and found["special_ids"] == [0, 1, 2, 3, 4]


def test_what_transformers_saves_again_is_imported(loaded, model, tmp_path):
    """transformers leaves the tied matrix out; the tokenizer is the user's to save."""
    _, work = loaded
    copy = tmp_path / "saved_again"
    shutil.copytree(work / "saved_again", copy)
    assert TIED not in load_file(copy / "model.safetensors")
    write_tokenizer(copy / "tokenizer.json")
    import_directory(copy, tmp_path / "run")
    assert_weights(tmp_path / "run", model)
