"""Import, and opening a pre-trained model: what is accepted, what is refused, and that no code is run."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_prep.cli import InputError
from pretrain import checkpoint
from pretrain.hf import export_run, import_directory
from pretrain.model import ModelConfig
from pretrain.pretrained import load_pretrained, parse_config, read_config, read_huggingface
from tests.pretrain.directories import (
    CONFIG,
    MERGES,
    PUBLISHED_CONFIG,
    TIED,
    WORDS,
    assert_weights,
    make_published,
    write_tokenizer,
)


@pytest.fixture
def published(tmp_path, model):
    make_published(tmp_path / "published", model)
    return tmp_path / "published"


def test_import_undoes_export_bit_for_bit(exported, model, tmp_path):
    result = import_directory(exported, tmp_path / "run")
    assert result["step"] == 0 and result["dropped"] == [] and result["dtype"] == "float32"
    assert_weights(tmp_path / "run", model)
    opened = load_pretrained(tmp_path / "run")
    assert opened.config == CONFIG and opened.source["imported"]["file"] == "model.safetensors"
    export_run(tmp_path / "run", tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes(), name


def test_a_run_and_both_kinds_of_directory_open_alike(run_dir, exported, published):
    opened = [load_pretrained(path) for path in (run_dir, str(exported), published)]
    assert [found.source["kind"] for found in opened] == ["run", "huggingface", "huggingface"]
    assert opened[0].source["step"] == 200 and opened[0].source["dataset_manifest_sha256"] == "ab" * 32
    for found in opened:
        assert found.config == CONFIG and found.tokenizer.read_bytes() == (run_dir / "tokenizer.json").read_bytes()
        assert all(torch.equal(found.weights[name], opened[0].weights[name]) for name in opened[0].weights)
        json.dumps(found.source)


def test_the_published_layout_is_imported(published, model, tmp_path):
    result = import_directory(published, tmp_path / "run")
    assert result["file"] == "pytorch_model.bin"
    assert_weights(tmp_path / "run", model)


def test_the_published_configuration_is_the_default(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    path = tmp_path / "config.json"
    assert parse_config(read_config(path), path) == ModelConfig()


def test_half_precision_is_widened(published, model, tmp_path):
    for dtype in (torch.bfloat16, torch.float16):
        torch.save({n: t.to(dtype) for n, t in model.state_dict().items()}, published / "pytorch_model.bin")
        weights = read_huggingface(published).weights
        assert all(tensor.dtype == torch.float32 for tensor in weights.values())
        assert torch.equal(weights[WORDS], model.state_dict()[WORDS].to(dtype).float())


def test_a_pooler_is_dropped_and_named(published, tmp_path, model):
    pooler = {"bert.pooler.dense.weight": torch.zeros(24, 24), "bert.pooler.dense.bias": torch.zeros(24)}
    torch.save(model.state_dict() | pooler, published / "pytorch_model.bin")
    assert import_directory(published, tmp_path / "run")["dropped"] == sorted(pooler)
    assert_weights(tmp_path / "run", model)


class Harmful:
    """Unpickled without care, it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


def test_code_in_a_directory_is_never_run(published, tmp_path):
    for name in ("bert_layers.py", "configuration_bert.py", "modeling_dnabert2.py", "__init__.py", "sitecustomize.py"):
        (published / name).write_text(f"open({str(tmp_path / 'harm')!r}, 'w')\n")
    import_directory(published, tmp_path / "run")
    torch.save({WORDS: Harmful(tmp_path / "harm")}, published / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin: refused"):
        import_directory(published, tmp_path / "other")
    assert not (tmp_path / "harm").exists() and not (tmp_path / "other").exists()
    torch.load(published / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "harm").exists()  # the file really was harmful


def edit_weights(change):
    def edit(directory):
        path = directory / "pytorch_model.bin"
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return edit


def edit_config(change):
    def edit(directory):
        path = directory / "config.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def other_special_ids(directory):
    write_tokenizer(directory / "tokenizer.json", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])


BAD = {
    "a missing key": (
        edit_weights(lambda state: state.pop("bert.encoder.layer.1.mlp.wo.bias")),
        r"pytorch_model.bin: missing key bert.encoder.layer.1.mlp.wo.bias$",
    ),
    "an unexpected key": (
        edit_weights(lambda state: state.update({"bert.encoder.layer.2.mlp.wo.bias": torch.zeros(24)})),
        r"unexpected key bert.encoder.layer.2.mlp.wo.bias$",
    ),
    "another shape": (
        edit_weights(lambda state: state.update({"cls.predictions.decoder.bias": torch.zeros(24)})),
        r"cls.predictions.decoder.bias has shape \[24\], by the configuration it is \[25\]",
    ),
    "an untied decoder": (
        edit_weights(lambda state: state.update({TIED: state[TIED] + 1})),
        rf"{TIED} differs from {WORDS}",
    ),
    "not a number": (
        edit_weights(lambda state: state["bert.encoder.layer.0.mlp.wo.bias"].fill_(float("nan"))),
        r"layer.0.mlp.wo.bias holds a value that is not a number",
    ),
    "integers": (
        edit_weights(lambda state: state.update({"cls.predictions.decoder.bias": torch.zeros(25, dtype=torch.int64)})),
        r"cls.predictions.decoder.bias is torch.int64",
    ),
    "not a state dict": (
        lambda directory: torch.save([torch.zeros(3)], directory / "pytorch_model.bin"),
        r"pytorch_model.bin: expected a state dict",
    ),
    "a truncated file": (
        lambda directory: os.truncate(directory / "pytorch_model.bin", 5000),
        r"pytorch_model.bin: ",
    ),
    "a truncated safetensors file": (
        lambda directory: (directory / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}"),
        r"model.safetensors: not a whole safetensors file",
    ),
    "no weights": (
        lambda directory: (directory / "pytorch_model.bin").unlink(),
        r"holds no weights; expected model.safetensors or pytorch_model.bin",
    ),
    "a configuration without a key": (
        edit_config(lambda content: content.pop("intermediate_size")),
        r"config.json: has no intermediate_size",
    ),
    "a configuration with a wrong value": (
        edit_config(lambda content: content.update(hidden_size=25)),
        r"config.json: .*hidden_size 25 is not a multiple of 3",
    ),
    "another activation": (
        edit_config(lambda content: content.update(hidden_act="gelu_new")),
        r"config.json: hidden_act is 'gelu_new'",
    ),
    "a configuration that is not JSON": (
        lambda directory: (directory / "config.json").write_text("{"),
        r"config.json: not JSON",
    ),
    "a configuration that is a list": (
        lambda directory: (directory / "config.json").write_text("[]"),
        r"config.json: expected an object",
    ),
    "no configuration": (lambda directory: (directory / "config.json").unlink(), r"config.json: not found"),
    "no tokenizer": (lambda directory: (directory / "tokenizer.json").unlink(), r"tokenizer.json: not found"),
    "a tokenizer that is none": (
        lambda directory: (directory / "tokenizer.json").write_text("{}"),
        r"tokenizer.json: not a Hugging Face tokenizer.json",
    ),
    "a tokenizer of another size": (
        lambda directory: write_tokenizer(directory / "tokenizer.json", merges=MERGES[:-1]),
        r"tokenizer.json: has 24 tokens, the model's vocab_size is 25",
    ),
    "other special ids": (other_special_ids, r"tokenizer.json: \[UNK\] has id 1, expected 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_and_leaves_nothing(published, tmp_path, what):
    spoil, message = BAD[what]
    spoil(published)
    with pytest.raises(InputError, match=message) as error:
        import_directory(published, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


def test_neither_a_run_nor_a_model(tmp_path):
    with pytest.raises(InputError, match="neither a run directory"):
        load_pretrained(tmp_path)
    for path in (tmp_path / "absent", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match="not a directory"):
            load_pretrained(path)
    with pytest.raises(InputError, match="not a directory"):
        import_directory(tmp_path / "absent", tmp_path / "run")


def test_import_leaves_a_run_alone(exported, run_dir):
    with pytest.raises(InputError, match="not an empty directory"):
        import_directory(exported, run_dir)
    assert checkpoint.steps(run_dir) == [100, 200]


def test_safetensors_are_preferred(published, model):
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    other[TIED] = other[WORDS].clone()
    save_file(other, published / "model.safetensors")
    found = read_huggingface(published)
    assert found.source["file"] == "model.safetensors" and torch.equal(found.weights[WORDS], other[WORDS])
