"""Every number is planted in tiny CSV files."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing

from data_prep.cli import InputError, add_verb, main
from finetune.audit import PUBLISHED_ROWS, add_arguments, run
from finetune.tasks import GROUPS

LEAKY = {  # label, sequence; the comment says what is planted
    "train": [
        "AAAACC,0",
        "AAAAGT,1",
        "AAAACC,0",  # again
        "CCCCAT,0",
        "CCCCAT,1",  # again, with another label
        "ATATNn,1",  # two other letters
    ],
    "dev": [
        "AAAACC,0",  # in train
        "ACTTTT,1",  # reverse complement of AAAAGT in train
        "GACGAC,0",
    ],
    "test": [
        "GGTTTT,1",  # reverse complement of AAAACC in train, which has label 0
        "AAAAGT,0",  # in train with label 1
        "GACGAC,0",  # in dev
        "CCCCAT,0",  # in train with 0 and 1
        "GTCGTC,1",  # reverse complement of GACGAC in dev, repeated below
        "GTCGTC,1",
        "TATATAGC,0",  # nowhere; two bases longer
    ],
}


def write(folder: Path, splits: dict[str, list[str]], header: str = "sequence,label") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in splits.items():
        (folder / f"{split}.csv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def command_line(*argv: Any) -> tuple[argparse.ArgumentParser, list[str]]:
    parser = argparse.ArgumentParser()
    add_arguments(add_verb(parser.add_subparsers(required=True), "audit", run, "audit"))
    return parser, ["audit", *map(str, argv)]


def audit(data: Path, *flags: Any) -> dict[str, Any]:
    parser, argv = command_line("--data", data, "--json", *flags)
    args = parser.parse_args(argv)
    return args.run(args)["tasks"]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def leaky(tmp_path: Path) -> Path:
    return write(tmp_path / "GUE" / "made" / "leaky", LEAKY)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One token a letter; the file itself truncates, pads and adds special tokens, none of which may count."""
    vocabulary = {text: number for number, text in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", *"ACGT"])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="[UNK]"))
    made.enable_truncation(3)
    made.enable_padding(length=50, pad_id=3)
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP] [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    (tmp_path / "model").mkdir()
    made.save(str(tmp_path / "model" / "tokenizer.json"))
    return tmp_path / "model" / "tokenizer.json"


def test_planted_twins_are_counted(leaky):
    task = audit(leaky)["made/leaky"]
    keys = ("repeats", "in_train", "in_train_other_label", "in_dev")

    def counts(split: str, suffix: str = "") -> list[int | None]:
        return [task["splits"][split].get(f"{key}{suffix}") for key in keys]

    assert counts("train") == counts("train", "_either_strand") == [2, None, None, None]
    assert counts("dev") == [0, 1, 0, None]
    assert counts("dev", "_either_strand") == [0, 2, 0, None]
    assert counts("test") == [1, 2, 2, 1]
    assert counts("test", "_either_strand") == [2, 3, 3, 5]  # GGTTTT and AAAAGT are in dev as well


def test_planted_contradictions_are_counted(leaky):
    task = audit(leaky)["made/leaky"]
    assert task["inputs"] == 9
    assert (task["contradictory"], task["contradictory_in_train"]) == (2, 1)  # AAAAGT, CCCCAT
    # GGTTTT against AAAACC, GTCGTC against GACGAC
    assert (task["contradictory_either_strand"], task["contradictory_in_train_either_strand"]) == (4, 1)
    assert [row["several_labels"] for row in task["splits"].values()] == [3, 0, 2]


def test_rows_classes_and_letters(leaky):
    task = audit(leaky)["made/leaky"]
    train, test = task["splits"]["train"], task["splits"]["test"]
    assert (train["rows"], train["rows_a_class"], train["largest_share"]) == (6, {"0": 3, "1": 3}, 0.5)
    assert (test["rows_a_class"], round(test["largest_share"], 3)) == ({"0": 4, "1": 3}, 0.571)
    assert (train["other_letters"], train["rows_with_other_letters"]) == (2, 1)
    assert [test[f"bases_{name}"] for name in ("min", "median", "max")] == [6, 6, 8]
    assert task["classes"] == 2 and not task["notes"]


def test_tables_agree_with_the_result(leaky, tmp_path):
    split = audit(leaky.parent.parent, "--out", tmp_path / "out")["made/leaky"]["splits"]["test"]
    rows = table(tmp_path / "out" / "audit.csv")
    assert [(row["task"], row["split"]) for row in rows] == [("made/leaky", name) for name in ("train", "dev", "test")]
    assert (rows[0]["in_train"], rows[2]["in_train"]) == ("", str(split["in_train"]))
    assert rows[2]["rows_a_class"] == "0:4 1:3"
    text = (tmp_path / "out" / "audit.md").read_text()
    assert "| made/leaky | test | 7 | - | 2 | 4/3 | 57.1 % | 6–8 (6) | 0 | 0 |" in text
    assert "| made/leaky | test | 1 | 2 | 2 | 1 | 2 | 3 | 3 | 5 |" in text
    assert "| made/leaky | 9 | 2 | 1 | 4 | 1 |" in text


def test_every_finding_is_listed_with_its_line(leaky, tmp_path):
    audit(leaky, "--out", tmp_path)
    found = [(row["split"], row["line"], row["class"], row["what"]) for row in table(tmp_path / "duplicates.csv")]
    assert found == [
        ("train", "3", "1", "sequence has several labels"),
        ("train", "4", "0", "repeats an earlier row of train"),
        ("train", "5", "0", "sequence has several labels"),
        ("train", "6", "1", "repeats an earlier row of train"),
        ("train", "6", "1", "sequence has several labels"),
        ("dev", "2", "0", "in train"),
        ("dev", "3", "1", "in train but for strand or case"),
        ("test", "2", "1", "in dev but for strand or case"),
        ("test", "2", "1", "in train but for strand or case"),
        ("test", "3", "0", "in dev but for strand or case"),
        ("test", "3", "0", "in train"),
        ("test", "3", "0", "in train with another label"),
        ("test", "3", "0", "sequence has several labels"),
        ("test", "4", "0", "in dev"),
        ("test", "5", "0", "in train"),
        ("test", "5", "0", "in train with another label"),
        ("test", "5", "0", "sequence has several labels"),
        ("test", "6", "1", "in dev but for strand or case"),
        ("test", "6", "1", "repeats an earlier row of test but for strand or case"),
        ("test", "7", "1", "in dev but for strand or case"),
        ("test", "7", "1", "repeats an earlier row of test"),
    ]


def test_a_missing_split_is_unknown_not_zero(tmp_path):
    task = audit(write(tmp_path / "GUE" / "splice_reconstructed", {split: LEAKY[split] for split in ("dev", "test")}))[
        "splice/reconstructed"
    ]
    dev, test = task["splits"]["dev"], task["splits"]["test"]
    assert (dev["in_train"], test["in_train"], test["in_train_other_label_either_strand"]) == (None, None, None)
    assert (test["in_dev"], task["contradictory_in_train"]) == (1, None)
    assert task["notes"][0].startswith("train: not there")
    assert task["notes"][1] == "-/3/7 rows, the benchmark's files have 36496/4562/4562"


def test_a_missing_split_has_no_number_of_rows_to_be_wrong(tmp_path):
    lines = ["ACGT,0"] * 239
    (note,) = audit(write(tmp_path / "GUE" / "mouse" / "3", {"dev": lines, "test": lines}))["mouse/3"]["notes"]
    assert note.startswith("train: not there")


def test_a_pair_is_the_same_only_with_both_sequences(tmp_path, tokenizer):
    splits = {
        "train": ["AAAA,CCCCCC,0", "AAAT,GGGGGG,1"],
        "dev": ["AAAA,GGGGGG,0"],  # each half is in train, the pair is not
        "test": ["TTTT,CCCCCC,0", "AAAT,GGGGGG,1", "CCCCCC,AAAA,0"],
    }
    folder = write(tmp_path / "pairs", splits, header="seq_a,seq_b,label")
    (task,) = audit(folder, "--tokenizer", tokenizer, "--max-length", 12).values()
    dev, test = task["splits"]["dev"], task["splits"]["test"]
    assert (dev["in_train"], test["in_train"], test["in_train_either_strand"]) == (0, 1, 2)
    assert (dev["in_train_either_strand"], task["inputs"]) == (1, 5)  # GGGGGG is CCCCCC on the other strand
    assert (dev["bases_max"], dev["second_bases_min"]) == (4, 6)
    assert (dev["tokens_max"], dev["over_max_length"]) == (4 + 6 + 3, 1)
    swapped = audit(folder, "--sequence-columns", "seq_b", "--label-column", "label")
    assert next(iter(swapped.values()))["splits"]["dev"]["in_train"] == 1


def test_numbers_to_predict(tmp_path):
    splits = {"train": ["AAAA,0.5", "AAAA,0.25", "CCCC,2.5"], "dev": ["CCCC,2.5"], "test": ["CCCC,3.0", "GTGT,1"]}
    (task,) = audit(write(tmp_path / "numbers", splits)).values()
    test = task["splits"]["test"]  # whole numbers: it is the other files that say what they are
    assert (task["kind"], task["classes"]) == ("regression", None)
    assert (test["label_min"], test["label_mean"], test["label_max"]) == (1, 2, 3)
    assert (test["in_train"], test["in_train_other_label"]) == (1, 1)
    assert task["splits"]["dev"]["in_train_other_label"] == 0
    assert (task["contradictory"], task["contradictory_in_train"]) == (2, 1)


def test_numbers_go_into_the_tables(tmp_path):
    splits = {"train": ["AAAA,0.5", "CCCC,2.5"]}
    audit(write(tmp_path / "numbers", splits), "--out", tmp_path / "out")
    assert "| 0.5 to 2.5, mean 1.5 |" in (tmp_path / "out" / "audit.md").read_text()
    assert table(tmp_path / "out" / "audit.csv")[0]["label_mean"] == "1.5"


def test_tokens_are_counted_with_cls_and_sep(tmp_path, tokenizer):
    lines = ["A" * length + ",0" for length in range(1, 101)]
    folder = write(tmp_path / "GUE" / "mouse" / "0", {"train": lines})
    train = audit(folder, "--tokenizer", tokenizer.parent)["mouse/0"]["splits"]["train"]
    assert (train["tokens_mean"], train["tokens_p99"], train["tokens_max"]) == (52.5, 101, 102)
    assert train["over_max_length"] == 100 - 28  # 30 tokens: 28 bases
    train = audit(folder, "--tokenizer", tokenizer, "--max-length", 100)["mouse/0"]["splits"]["train"]
    assert train["over_max_length"] == 2


def test_no_maximum_length_is_made_up_for_a_task_of_ones_own(leaky, tokenizer, tmp_path):
    train = audit(leaky, "--tokenizer", tokenizer, "--out", tmp_path)["made/leaky"]["splits"]["train"]
    assert (train["tokens_max"], train["over_max_length"]) == (8, None)
    assert "| made/leaky | train | 8.0 | 8 | 8 | - | - |" in (tmp_path / "audit.md").read_text()


def test_row_counts_are_held_against_the_published_ones(tmp_path):
    lines = ["ACGT,0", "CCGT,1"]
    folder = write(tmp_path / "GUE" / "tf" / "0", {"train": lines, "dev": lines, "test": lines})
    (note,) = audit(folder)["tf/0"]["notes"]
    assert note == "2/2/2 rows, the benchmark's files have 32378/1000/1000"
    assert {name for names in GROUPS.values() for name in names} == PUBLISHED_ROWS.keys()


def test_files_that_differ_from_the_paper_are_explained(tmp_path):
    """One whole benchmark dataset in its published size, whose paper counts one dev row less."""
    counts = dict(zip(("train", "dev", "test"), PUBLISHED_ROWS["EMP/H3K79me3"], strict=True))
    splits = {split: ["ACGT,0", "ACGA,1"] + ["ACGT,0"] * (count - 2) for split, count in counts.items()}
    (note,) = audit(write(tmp_path / "GUE" / "EMP" / "H3K79me3", splits))["EMP/H3K79me3"]["notes"]
    assert note == "23069/2884/2884 rows, the paper says 23069/2883/2884"


def test_classes_that_train_lacks_are_named(tmp_path):
    splits = {"train": ["ACGT,0", "CCGT,2"], "test": ["ACTT,3"]}
    (task,) = audit(write(tmp_path / "gaps", splits)).values()
    assert any("no row of class 1, 3;" in note for note in task["notes"])
    splits["test"] = ["ACTT,123456789"]
    (task,) = audit(write(tmp_path / "gaps", splits)).values()
    assert any("no row of class 1, 3, 4, 5, 6, ...;" in note for note in task["notes"])


def test_one_file_is_a_task(tmp_path):
    folder = write(tmp_path / "mine", LEAKY)
    (task,) = audit(folder / "train.csv").values()
    assert (task["splits"]["train"]["repeats"], list(task["splits"])) == (2, ["train"])
    with pytest.raises(InputError, match="is a file"):
        audit(folder / "train.csv", "--tasks", "a/b")


def test_a_bad_file_stops_nothing_but_the_exit_status(leaky, tmp_path, capsys):
    write(tmp_path / "GUE" / "made" / "bad", {"train": ["ACGT,0"], "test": ["ACGT,yes"]})
    write(tmp_path / "GUE" / "made" / "two", {"dev": ["ACGT,0"], "val": ["ACGT,1"]})
    write(tmp_path / "GUE" / "made" / "uneven", {"train": ["ACGT,0"]})
    write(tmp_path / "GUE" / "made" / "uneven", {"test": ["ACGT,TGCA,0"]}, header="seq_a,seq_b,label")
    out = tmp_path / "out"
    assert main(*command_line("--data", tmp_path / "GUE", "--out", out)) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "made/bad/test.csv, line 2: label 'yes'" in last
    assert "both could be the dev split" in last
    assert "made/uneven: some of its files have one column of sequences" in last
    assert [(row["task"], row["split"]) for row in table(out / "audit.csv")] == [
        ("made/bad", "train"),
        *(("made/leaky", split) for split in ("train", "dev", "test")),
    ]
    assert "* made/bad: " in (out / "audit.md").read_text()


def test_only_the_tasks_that_were_named(leaky, tmp_path):
    write(tmp_path / "GUE" / "made" / "bad", {"train": ["ACGT,yes"]})
    assert audit(tmp_path / "GUE", "--tasks", "made/leaky").keys() == {"made/leaky"}
    with pytest.raises(InputError, match="has no task made/none"):
        audit(tmp_path / "GUE", "--tasks", "made/none")


def test_without_a_folder_the_tables_go_to_stdout_and_json_is_the_last_line(leaky, capsys):
    assert main(*command_line("--data", leaky)) == 0
    assert capsys.readouterr().out.startswith("# Audit of ")
    assert main(*command_line("--data", leaky, "--json")) == 0
    assert capsys.readouterr().out.startswith("{")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-length", "80"], "give --tokenizer"),
        (["--tokenizer", "TOKENIZER", "--max-length", "3"], "--max-length 3: must be at least 4"),
        (["--tokenizer", "DATA/train.csv"], "not a Hugging Face tokenizer.json"),
        (["--sequence-columns", "a", "b", "c"], "--sequence-columns a b c"),
    ],
)
def test_flags_that_make_no_sense(leaky, tokenizer, flags, message):
    flags = [flag.replace("TOKENIZER", str(tokenizer)).replace("DATA", str(leaky)) for flag in flags]
    with pytest.raises(InputError, match=message):
        audit(leaky, *flags)
