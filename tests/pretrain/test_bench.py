"""The speed comparison runs, and says what is missing."""

import argparse
import importlib
import json
import sys

import pytest

from data_prep.cli import InputError
from kernels.random import keep_mask
from pretrain.bench import add_arguments, bench, run
from pretrain.model import ModelConfig

CONFIG = ModelConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def test_it_compares(capfd):
    result = bench(CONFIG, batch=2, length=8, steps=2)
    json.dumps(result)
    speed = result["tokens_per_second"]
    assert result["ratio_huggingface"] == pytest.approx(speed["ours"] / speed["huggingface"])
    assert 0 < result["dropout_generator_share"] < 1
    assert result["huggingface_intermediate_size"] == 18
    flops = result["matrix_flops_per_step"]
    assert flops["ours"] == flops["huggingface_masked_logits"] < flops["huggingface"]
    assert capfd.readouterr().out == ""  # stdout is for the result
    for name in ("kernels.plain.dropout", "kernels.plain.attention"):
        assert importlib.import_module(name).keep_mask is keep_mask  # the timer is gone


def test_without_transformers_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r'extra "test"'):
        bench(CONFIG, batch=2, length=8, steps=1)


def test_the_verb(capfd):
    sizes = ["model.hidden_size=16", "model.intermediate_size=12", "model.num_attention_heads=2", "model.vocab_size=50"]
    result = run(arguments("tiny", *sizes, "--steps", "1", "--batch", "2", "--length", "8", "--threads", "1"))
    assert result["setting"]["dtype"] == "fp32" and result["setting"]["threads"] == 1
    assert "ours / Hugging Face" in capfd.readouterr().err


def test_bad_numbers():
    with pytest.raises(InputError, match="--steps 0"):
        run(arguments("tiny", "--steps", "0"))
