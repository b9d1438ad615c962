from pathlib import Path

import pytest

from data_prep.cli import InputError
from pretrain.config import load_config, refuse_changes
from pretrain.presets import PRESETS


def test_every_preset_is_valid_and_the_published_one_is_the_papers_recipe() -> None:
    presets = {path.stem: load_config(path.stem) for path in PRESETS.glob("*.yaml")}
    paper = presets["dnabert2_117m"]
    assert (paper.train.global_batch_size, paper.train.max_steps) == (4096, 500_000)
    assert (paper.optimizer.learning_rate, paper.optimizer.warmup_steps) == (5e-4, 30_000)
    assert (paper.optimizer.betas, paper.optimizer.eps, paper.optimizer.weight_decay) == ((0.9, 0.98), 1e-6, 1e-5)
    assert paper.model.model_dump() == type(paper.model)().model_dump()


def test_overrides_replace_values_and_make_sections() -> None:
    config = load_config("tiny", ["optimizer.learning_rate=5e-4", "train.stop_at_step=3", "data.tokenizer=t.json"])
    assert config.optimizer.learning_rate == 5e-4  # YAML 1.1 alone would read a string
    assert (config.train.stop_at_step, config.data.tokenizer) == (3, "t.json")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_step=3", ["unknown key train.max_step", "did you mean train.max_steps"]),
        ("deepsped.zero_stage=1", ["deepsped"]),
        ("train.max_steps=soon", ["train.max_steps"]),
        ("model.num_attention_heads=5", ["model", "128", "5 heads"]),
        ("train.max_steps", ["key.sub=value"]),
        ("run_dir.x=1", ["run_dir"]),
        ("train.dtype=fp16", ["train.dtype"]),
        ("optimizer.betas=[0.9,1.5]", ["optimizer.betas"]),
        ("optimizer.learning_rate=inf", ["optimizer.learning_rate"]),
    ],
)
def test_a_wrong_key_or_value_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        load_config("tiny", [override])
    assert all(word in str(error.value) for word in words)


def test_bf16_at_stage_0_is_refused() -> None:
    with pytest.raises(InputError, match=r"zero_stage 0 needs train.dtype=fp32"):
        load_config("tiny", ["train.dtype=bf16", "deepspeed.zero_stage=0"])


def test_a_file_that_is_missing_or_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"presets 2500m, 500m, dnabert2_117m, .*, tiny"):
        load_config(str(tmp_path / "none.yaml"))
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [1")
    with pytest.raises(InputError, match=r"broken\.yaml: not YAML"):
        load_config(str(broken))
    broken.write_text("run_dir: x\n")
    with pytest.raises(InputError, match="data is missing"):
        load_config(str(broken))


def test_on_resume_only_what_does_not_change_the_run_may_change() -> None:
    saved = load_config("tiny")
    refuse_changes(load_config("tiny", ["deepspeed.zero_stage=3", "train.micro_batch_size=7"]), saved, Path("c"), 1, False)
    with pytest.raises(InputError, match=r"train\.seed is 5, was 0"):
        refuse_changes(load_config("tiny", ["train.seed=5"]), saved, Path("c"), 1, False)
    lower = load_config("tiny", ["optimizer.learning_rate=1e-4"])
    with pytest.raises(InputError, match=r"optimizer.learning_rate is 0.0001"):
        refuse_changes(lower, saved, Path("c"), 1, False)
    refuse_changes(lower, saved, Path("c"), 1, going_back=True)
    with pytest.raises(InputError, match=r"train.seed is 5"):
        refuse_changes(load_config("tiny", ["train.seed=5"]), saved, Path("c"), 1, going_back=True)
