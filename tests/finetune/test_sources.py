from __future__ import annotations

import hashlib

import pytest

from data_prep.cli import InputError
from finetune.sources import open_source


def test_a_checkpoint_gives_weights_tokenizer_and_name(huggingface, small_config):
    source = open_source(str(huggingface), None, [])
    assert source.config == small_config
    assert source.weights is not None
    assert source.weights["bert.embeddings.word_embeddings.weight"].shape == (9, 32)
    assert source.tokenizer_sha256 == hashlib.sha256((huggingface / "tokenizer.json").read_bytes()).hexdigest()
    assert len(source.tokenizer.encode("ACGT" * 5, add_special_tokens=False).ids) == 20  # the file's truncation is off
    assert (source.about["kind"], source.about["path"]) == ("pretrained", str(huggingface))
    assert source.about["source"]["file"] == "model.safetensors"


def test_random_like_a_checkpoint_has_its_shape_and_tokenizer_only(huggingface, small_config):
    source = open_source("random", str(huggingface), [])
    assert (source.config, source.weights) == (small_config, None)
    assert source.about["kind"] == "random"


def test_random_alone_is_the_tiny_preset_with_a_tokenizer_of_the_task():
    source = open_source("random", None, ["ACGTACGTTGCA" * 5] * 10)
    assert source.weights is None
    assert source.config.hidden_size == 128
    again = open_source("random", None, ["ACGTACGTTGCA" * 5] * 10)
    assert source.tokenizer_sha256 == again.tokenizer_sha256


def test_like_needs_random():
    with pytest.raises(InputError, match="--like goes with --model random"):
        open_source("somewhere", "elsewhere", [])


def test_what_is_not_a_model_is_named(tmp_path):
    with pytest.raises(InputError, match=str(tmp_path)):
        open_source(str(tmp_path), None, [])
