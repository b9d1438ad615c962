"""The comparison with Hugging Face's Trainer compares the same thing, and says what is missing."""

import argparse
import json
import sys
from itertools import islice

import numpy as np
import pytest

import finetune.bench
from data_prep.cli import InputError
from finetune.bench import WARM_UP, add_arguments, bench, run
from finetune.model import build
from finetune.tasks import Settings
from finetune.tokens import Tokens
from finetune.train import batches

SETTINGS = Settings(batch_size=8, learning_rate=1e-2, warmup_steps=2)
SMALL = ["hidden_size=16", "intermediate_size=12", "num_attention_heads=2"]


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


def compare(config, tokenizer, train_set, dev_set, classes=2, settings=SETTINGS, **options):
    classifier = build(config, classes, None, 0, "random")
    return bench(
        classifier, config, tokenizer, train_set, dev_set, settings=settings, **{"steps": 2, "repeats": 2} | options
    )


def test_both_sides_see_the_same_tokens(small_config, bases_tokenizer, planted_tokens, capfd):
    train_set, dev_set = planted_tokens["train"], planted_tokens["dev"]
    result = compare(small_config, bases_tokenizer, train_set, dev_set)
    json.dumps(result)
    plan = list(islice(batches(0, len(train_set.labels), SETTINGS), WARM_UP + 4))
    trained = [train_set.lengths[rows] for _, rows, _ in plan[WARM_UP:]]
    evaluated = [dev_set.lengths[:8], dev_set.lengths[8:16]] * 2
    for part, lengths in (("training", trained), ("evaluation", evaluated)):
        found = result[part]
        tokens, padded = sum(int(x.sum()) for x in lengths), sum(len(x) * int(x.max()) for x in lengths)
        assert found["tokens"] == {"ours": tokens, "huggingface": tokens, "huggingface_padded": padded}
        assert found["padding_ratio"] == padded / tokens > 1
        assert found["share_of_padding"] == found["ratio_huggingface"] / found["padding_ratio"]
        assert [len(seconds) for seconds in found["seconds"].values()] == [2, 2]
        ratios = np.divide(*(found["seconds"][side] for side in ("huggingface", "ours")))
        assert found["ratio_huggingface"] == pytest.approx(np.median(ratios))
    assert set(result["versions"]) == {"python", "torch", "transformers", "accelerate"}
    assert capfd.readouterr().out == ""  # stdout is for the result


def test_without_dropout_both_end_with_the_same_loss(small_config, bases_tokenizer, planted_tokens):
    config = small_config.model_copy(update={"hidden_dropout_prob": 0.0})
    loss = compare(config, bases_tokenizer, planted_tokens["train"], planted_tokens["dev"], steps=6)["loss"]
    for moment in ("before", "after"):  # order of rows, learning rates, decay and clipping are the same
        assert loss[moment]["ours"] == pytest.approx(loss[moment]["huggingface"], abs=1e-4)
    assert abs(loss["after"]["ours"] - loss["before"]["ours"]) > 0.01


@pytest.mark.parametrize("classes", [1, 3])
def test_pairs_and_numbers(small_config, bases_tokenizer, planted_tokens, classes):
    tokens = planted_tokens["train"]
    draw = np.random.default_rng(0)
    labels = draw.normal(size=len(tokens.labels)) if classes == 1 else draw.integers(0, 3, len(tokens.labels))
    paired = Tokens(tokens.ids, tokens.starts, labels, 0, tokens.starts[:-1] + tokens.lengths // 2)
    alone = Tokens(tokens.ids, tokens.starts, labels, 0)
    before = [compare(small_config, bases_tokenizer, x, x, classes)["loss"]["before"] for x in (paired, alone)]
    for loss in before:
        assert loss["ours"] == pytest.approx(loss["huggingface"], abs=1e-4)
    assert before[0] != before[1]


def test_sides_that_compute_something_else_are_not_compared(small_config, bases_tokenizer, planted_tokens, monkeypatch):
    monkeypatch.setitem(finetune.bench.LOSSES_DIFFER, "fp32", -1.0)
    with pytest.raises(RuntimeError, match="don't compute the same"):
        compare(small_config, bases_tokenizer, planted_tokens["train"], planted_tokens["dev"])


@pytest.mark.parametrize("missing", ["transformers", "accelerate"])
def test_without_the_trainer_it_names_the_extra(monkeypatch, missing):
    monkeypatch.delitem(sys.modules, "finetune.bench_trainer", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf'{missing}.*extra "test"'):
        run(arguments("--steps", "1"))


def test_the_verb_with_random_weights(planted, tmp_path, capfd):
    out = tmp_path / "folder" / "bench.json"
    flags = ["--task", str(planted), "--steps", "1", "--repeats", "1", "--threads", "1", "--dtype", "bf16"]
    result = run(arguments(*flags, "--sizes", *SMALL, "--batch-size", "4", "--out", str(out)))
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert result["sizes"]["hidden_size"] == 16 and result["sizes"]["num_hidden_layers"] == 2
    said = {key: result["setting"][key] for key in ("batch_size", "dtype", "threads", "task", "evaluated_rows")}
    assert said == {"batch_size": 4, "dtype": "bf16", "threads": 1, "task": "made/up", "evaluated_rows": 4}
    assert "share" in capfd.readouterr().err


def test_the_verb_with_a_model_and_a_made_up_task(huggingface):
    result = run(arguments("--model", str(huggingface), "--steps", "1", "--repeats", "1", "--batch-size", "2"))
    assert result["sizes"]["vocab_size"] == 9 and result["setting"]["task"] == "synthetic/motif"


def test_bad_input(planted, huggingface):
    with pytest.raises(InputError, match="--batch-size 0"):
        run(arguments("--batch-size", "0"))
    with pytest.raises(InputError, match="--batch-size 601: the task has only 600 rows"):
        run(arguments("--task", str(planted), "--batch-size", "601", "--sizes", *SMALL))
    with pytest.raises(InputError, match="leave out --like"):
        run(arguments("--task", str(planted), "--model", str(huggingface), "--like", "tiny"))
    with pytest.raises(InputError, match=r"train\.csv: not a Hugging Face tokenizer"):
        run(arguments("--task", str(planted), "--tokenizer", str(planted / "train.csv")))
