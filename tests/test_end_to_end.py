"""The README's way through, command by command, each in a process of its own, pre-training on two."""

from __future__ import annotations

import json
from pathlib import Path

from tests.commands import losses, pretrain, python, result

SMALL = ["model.hidden_size=32", "model.intermediate_size=64", "train.global_batch_size=16", "train.micro_batch_size=8"]


def test_genomes_in_a_scored_checkpoint_out(tmp_path: Path) -> None:
    def command(*arguments: str | Path) -> dict[str, object]:
        done = python("-m", *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return result(done)

    made, tokenizer, dataset = tmp_path / "made", tmp_path / "tokenizer.json", tmp_path / "dataset"
    run_dir, exported, results = tmp_path / "run", tmp_path / "hf", tmp_path / "results"
    command("data_prep", "synthesize", "--out", made, "--bases", "200000", "--species", "2")
    command("data_prep", "tokenizer", "--genomes", made / "genomes", "--out", tokenizer, "--vocab-size", "300")
    sharded = command(
        "data_prep", "shard", "--genomes", made / "genomes", "--tokenizer", tokenizer, "--out", dataset,
        "--region-bases", "5000", "--valid-fraction", "0.1",
    )  # fmt: skip
    assert sharded["bases_in"] == 200_000

    overrides = [f"data.path={dataset}", f"data.tokenizer={tokenizer}", "train.max_steps=10", *SMALL]
    trained = pretrain("train", "tiny", f"run_dir={run_dir}", *overrides, "--json", ranks=2)
    assert result(trained)["step"] == 10

    assert Path(str(command("pretrain", "export", run_dir, "--out", exported)["out"])) == exported
    scored = command(
        "finetune", "run", "--model", exported, "--task", made / "gue" / "synthetic" / "motif", "--out", results,
        "--learning-rate", "1e-3", "--max-steps", "20", "--warmup-steps", "2",
    )  # fmt: skip
    assert -1 <= float(str(scored["test_mcc"])) <= 1
    command("finetune", "report", results, "--out", tmp_path / "report")
    assert "synthetic/motif" in (tmp_path / "report" / "table.md").read_text()

    # An export goes back into a run directory, and training goes on from its weights with fresh moments.
    further = tmp_path / "further"
    command("pretrain", "import", exported, "--out", further)
    pretrain("train", "tiny", f"run_dir={further}", *overrides, "train.max_steps=1", "optimizer.warmup_steps=0")
    assert losses(further)[0] < losses(run_dir)[0]


def test_a_command_that_fails_says_where_only_when_asked(tmp_path: Path) -> None:
    done = python("-m", "pretrain", "export", tmp_path, "--out", tmp_path / "hf")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "Traceback" in python("-m", "pretrain", "export", tmp_path, "--out", tmp_path / "hf", "--debug").stderr
    assert json.loads(python("-m", "data_prep", "synthesize", "--out", tmp_path / "s", "--bases", "20000", "--species", "2",
                             "--json").stdout.splitlines()[-1])  # fmt: skip
