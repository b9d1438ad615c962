"""Presets: what each of them comes to in numbers, and how a file says only what it changes in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_prep.__main__ import run
from data_prep.cli import InputError
from data_prep.codec import Codec
from pretrain.config import Config, flatten, load_config
from pretrain.model import parameter_count
from pretrain.presets import PRESETS, read_config
from pretrain.schedule import batch_size, learning_rate

PUBLISHED = 117_074_176
PARAMETERS = {
    "500m": 482_962_176,
    "2500m": 2_555_352_576,
    "dnabert2_117m_6mer": PUBLISHED + 10 * 769,  # a row of the embeddings and a bias of the decoder for each more token
    "dnabert2_117m_overlapping_6mer": PUBLISHED + 5 * 769,
}
BILLIONS = {  # of tokens, with sequences of so many
    "dnabert2_117m": (128, 262.1),
    "dnabert2_117m_decoupled": (128, 262.1),
    "dnabert2_117m_modern": (128, 256.8),
    "dnabert2_117m_512": (512, 26.2),
    "dnabert2_117m_2048": (2048, 13.1),
    "dnabert2_117m_6mer": (128, 62.9),
    "dnabert2_117m_overlapping_6mer": (128, 62.9),
    "dnabert2_117m_further": (128, 0.41),
    "500m": (1024, 299.9),
    "2500m": (1024, 299.9),
}
CHANGES = {  # of dnabert2_117m, run_dir aside
    "dnabert2_117m_decoupled": {"optimizer.weight_decay": 0.02},
    "dnabert2_117m_modern": {
        "data.mask_probability": 0.3,
        "model.hidden_dropout_prob": 0.0,
        "train.batch_warmup.start": 768,
        "train.batch_warmup.steps": 25_000,
        "optimizer.schedule": "wsd",
        "optimizer.decay_steps": 100_000,
        "optimizer.weight_decay": 0.02,
        "optimizer.decay_norms_and_biases": False,
        "optimizer.gradient_clipping": 1.0,
        "checkpoint.keep_every": 100_000,
    },
    "dnabert2_117m_6mer": {"model.vocab_size": 4106, "train.max_steps": 120_000, "optimizer.warmup_steps": 7200},
    "dnabert2_117m_overlapping_6mer": {
        "model.vocab_size": 4101,
        "train.max_steps": 120_000,
        "optimizer.warmup_steps": 7200,
    },
}


def values(config: Config) -> dict[str, Any]:
    return flatten(config.model_dump(mode="json"))


@pytest.mark.parametrize("name", BILLIONS)
def test_sizes_and_tokens_are_those_that_the_comments_tell(name: str) -> None:
    config, text = load_config(name), (PRESETS / f"{name}.yaml").read_text()
    assert config.run_dir == f"runs/{name}"
    parameters = PARAMETERS.get(name, PUBLISHED)
    assert parameter_count(config.model) == parameters
    length, billions = BILLIONS[name]
    tokens = length * sum(batch_size(config.train, step) for step in range(config.train.max_steps))
    assert tokens / 1e9 == pytest.approx(billions, abs=0.05 if billions > 1 else 0.005)
    if name.endswith("500m"):
        assert f"{parameters:,}" in text
    if name not in ("dnabert2_117m", "dnabert2_117m_decoupled", "2500m"):  # which say 262 billion, and nothing
        assert f"{billions} billion" in text


def test_every_preset_is_here() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == {*BILLIONS, "tiny"}


@pytest.mark.parametrize("name", CHANGES)
def test_a_variant_of_the_paper_differs_in_what_it_is_about(name: str) -> None:
    paper, variant = values(load_config("dnabert2_117m")), values(load_config(name))
    assert variant.pop("run_dir") != paper.pop("run_dir")
    keys = paper.keys() | variant.keys()
    assert {key: variant.get(key) for key in keys if variant.get(key) != paper.get(key)} == CHANGES[name]


def rates(name: str, *steps: int) -> list[float]:
    config = load_config(name)
    return [learning_rate(config.optimizer, step, config.train.max_steps) for step in steps]


def test_learning_rates() -> None:
    assert rates("dnabert2_117m_modern", 29_999, 399_999, 425_000) == pytest.approx([5e-4, 5e-4, 2.5e-4])
    assert rates("dnabert2_117m_modern", 499_999)[0] < 1e-8
    # A later phase begins where BERT's linear decay stands after nine tenths of the steps.
    paper = load_config("dnabert2_117m").optimizer
    tenth = learning_rate(paper.model_copy(update={"warmup_steps": 0}), 450_000, 500_000)
    for name in ("dnabert2_117m_512", "dnabert2_117m_2048"):
        assert rates(name, 999) == pytest.approx([tenth])
    assert rates("dnabert2_117m_further", 999) == [5e-5]
    for name in ("500m", "2500m"):
        peak, last = rates(name, 15_999, 285_999)
        assert (peak, last) == pytest.approx((1e-4, 1e-4 * (16 / 286) ** 0.5), rel=0.02)


@pytest.mark.parametrize(("name", "hidden", "plain"), [("500m", 1280, 5120), ("2500m", 2560, 10240)])
def test_a_layer_has_the_flops_of_nucleotide_transformers(name: str, hidden: int, plain: int) -> None:
    model = load_config(name).model
    d, f = model.hidden_size, model.intermediate_size
    assert (d, f % 128) == (hidden, 0)
    assert 4 * d * d + 3 * d * f == pytest.approx(4 * d * d + 2 * d * plain, rel=0.01)


def test_triton_has_attention_for_the_heads_of_every_preset() -> None:
    attention = pytest.importorskip("kernels.fused.attention")
    models = [load_config(path.stem).model for path in PRESETS.glob("*.yaml")]
    assert {model.hidden_size // model.num_attention_heads for model in models} <= set(attention.HEAD_DIMS)


@pytest.mark.parametrize(("kind", "name"), [("kmer", "6mer"), ("overlapping-kmer", "overlapping_6mer")])
def test_vocabularies_of_k_mers(kind: str, name: str, tmp_path: Path) -> None:
    assert run(["tokenizer", "--kind", kind, "--k", "6", "--out", str(tmp_path / "t.json")]) == 0
    assert Codec(tmp_path / "t.json").vocab_size == load_config(f"dnabert2_117m_{name}").model.vocab_size


def test_a_file_may_say_only_what_it_changes_in_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: tiny\ndata: {path: elsewhere}\noptimizer: {warmup_steps: 7}\n")
    config = load_config(str(file), ["train.max_steps=9"])
    expected = values(load_config("tiny", ["data.path=elsewhere", "optimizer.warmup_steps=7", "train.max_steps=9"]))
    assert values(config) == expected
    assert read_config(str(file))[1]["optimizer"] == read_config("tiny")[1]["optimizer"] | {"warmup_steps": 7}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("preset: none\n", r"mine.yaml: preset: 'none' is not one of the presets 2500m, .*, tiny$"),
        ("preset: 2500m\n", r"mine.yaml: preset: 2500m changes a preset itself; name 500m, and repeat what 2500m changes"),
        ("preset: [tiny]\n", r"mine.yaml: preset: \['tiny'\] is not one"),
        ("preset: tiny\ntrain: {max_step: 3}\n", r"mine.yaml: unknown key train.max_step, did you mean train.max_steps"),
    ],
)
def test_a_wrong_preset_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        load_config(str(tmp_path / "mine.yaml"))
