"""Small models to be asked, one of each kind of tokenizer, and the exported Hugging Face code to compare answers with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from data_prep.tokenizing.kmer_tokenizer import KMER, OVERLAPPING, kmer_json
from finetune.sequences import Named
from pretrain.hf import huggingface_config, published_state_dict
from pretrain.hf_modeling import DNABERT2ForMaskedLM
from pretrain.model import MaskedLanguageModel, ModelConfig, initialize
from tests.pretrain.directories import write_tokenizer

KINDS = ("bpe", KMER, OVERLAPPING)
K = 3
CLS, SEP, MASK = 1, 2, 4


def write_model(folder: Path, kind: str) -> Path:
    """A Hugging Face directory; its weights are so large that all parts of the model matter."""
    folder.mkdir(parents=True)
    path = folder / "tokenizer.json"
    if kind == "bpe":
        write_tokenizer(path)
    else:
        path.write_bytes(kmer_json(kind, K))
    vocabulary = Tokenizer.from_file(str(path)).get_vocab_size()
    config = ModelConfig(
        vocab_size=vocabulary, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
    )
    model = MaskedLanguageModel(config)
    initialize(model, 0, 0.3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    weights = published_state_dict({name: weight.detach() for name, weight in model.named_parameters()})
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface_config(config)))
    return folder


def exported(folder: Path) -> DNABERT2ForMaskedLM:
    return DNABERT2ForMaskedLM.from_pretrained(folder).eval()


def spans(folder: Path, kind: str, text: str) -> list[tuple[int, int, int]]:
    """Token, first base and end of each content token, by the `tokenizers` library."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if kind == OVERLAPPING:
        pieces = [text[i : i + K] for i in range(len(text) - K + 1)]
        ids = tokenizer.encode(" ".join(pieces), add_special_tokens=False).ids
        return [(token, i, i + K) for i, token in enumerate(ids)]
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return [(token, *span) for token, span in zip(encoding.ids, encoding.offsets, strict=True)]


def input_ids(folder: Path, kind: str, text: str) -> list[int]:
    return [CLS, *(token for token, _, _ in spans(folder, kind, text)), SEP]


def random_sequences(count: int, longest: int, seed: int = 0, least: int = K) -> list[str]:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(least, longest + 1, count)
    return ["".join(draw.choice(list("ACGT"), length)) for length in lengths]


def named(texts: list[str]) -> list[Named]:
    return [Named(f"s{number}", text, f"test, s{number}") for number, text in enumerate(texts)]
