from __future__ import annotations

import hashlib

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep.cli import InputError
from data_prep.tokenizing.kmer_tokenizer import kmer_json
from finetune.batches import pack
from finetune.data import Columns, read_rows, read_task
from finetune.leaks import leaked
from finetune.tokens import tokenize


def test_a_task_says_its_classes_and_rows(small_task):
    task = read_task(small_task)
    assert (task.name, task.classes) == ("small/task", 2)
    assert [len(task.splits[split].labels) for split in ("train", "dev", "test")] == [16, 8, 8]
    train = task.splits["train"]
    assert train.sha256 == hashlib.sha256(train.path.read_bytes()).hexdigest()
    assert train.other_letters() == (0, 0)


def test_csv_as_people_write_it(tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(b'\xef\xbb\xbfid,label,sequence\r\n7,1,"ACGT"\r\n8,0, acNN \r\n\r\n')
    rows = read_rows(path)
    assert rows.sequences == ["ACGT", "acNN"]
    assert rows.labels.tolist() == [1, 0]
    assert rows.lines.tolist() == [2, 3]
    assert rows.other_letters() == (4, 1)


@pytest.mark.parametrize(
    ("split", "text", "message"),
    [
        ("train", "", "train.csv: the file is empty"),
        ("dev", "sequence,label\n", "dev.csv: has a header but no rows"),
        ("train", "sequence,lable\nACGT,0\n", "train.csv, line 1: no column 'label'"),
        ("train", "text,label\nACGT,0\n", "train.csv, line 1: no column 'sequence'"),
        ("test", "sequence,label\nACGT,0\nACGT,yes\n", "test.csv, line 3: label 'yes' is not an integer"),
        ("test", "sequence,label\nACGT,1.0\n", "test.csv, line 2: label '1.0' is no class 0 to C-1"),
        ("test", "sequence,label\nACGT,-1\n", "test.csv, line 2: label '-1' is no class 0 to C-1"),
        ("test", "sequence,label\nACGT,\n", "test.csv, line 2: label '' is not an integer"),
        ("dev", "sequence,label\nACGT,0\n,1\n", "dev.csv, line 3: the sequence is empty"),
        ("dev", "sequence,label\nACGT\n", "dev.csv, line 2: 1 fields where the header has 2"),
        ("dev", 'sequence,label\n"ACGT,0\n', "dev.csv, line 2: not CSV"),
        ("train", "sequence,label\nACGT,1\nACGA,2\n", "train.csv: has no row of class 0"),
        ("train", "sequence,label\nACGT,0\nACGA,999999999\n", "train.csv: has no row of class 1"),
        ("dev", "sequence,label\nACGT,0\nACGA,2\n", "train.csv: has no row of class 2, but .*dev.csv, line 3"),
    ],
)
def test_bad_csv_is_named_with_its_line(damage, split, text, message):
    path = damage(split, text)
    with pytest.raises(InputError, match=message):
        read_task(path.parent)


def test_bad_bytes_are_named_with_their_line(small_task):
    (small_task / "dev.csv").write_bytes(b"sequence,label\nACGT,0\n\x1f\x8b\xff,0\n")
    with pytest.raises(InputError, match=r"dev.csv, line 3: not text"):
        read_task(small_task)


def test_missing_files_and_folders(small_task):
    (small_task / "train.csv").rename(small_task / "training.csv")
    with pytest.raises(
        InputError, match=r"train.csv: not found; .*columns sequence,label.* it has dev.csv, test.csv, training.csv"
    ):
        read_task(small_task)
    with pytest.raises(InputError, match="no such file or folder"):
        read_task(small_task / "nothing")


def test_one_class_is_nothing_to_learn(small_task):
    for split in ("train", "dev", "test"):
        (small_task / f"{split}.csv").write_text("sequence,label\nACGT,0\n")
    with pytest.raises(InputError, match="nothing to learn"):
        read_task(small_task)


def test_tokens_are_cls_content_sep(small_task, bases_tokenizer):
    (small_task / "dev.csv").write_text("sequence,label\nACGT,0\nAAN,1\nT,0\n")
    tokens = tokenize(read_rows(small_task / "dev.csv"), bases_tokenizer, 9, None)
    assert tokens.ids.tolist() == [1, 5, 6, 7, 8, 2, 1, 5, 5, 0, 2, 1, 8, 2]
    assert tokens.starts.tolist() == [0, 6, 11, 14]
    assert tokens.labels.tolist() == [0, 1, 0]
    assert tokens.truncated == 0


def test_truncation_keeps_sep_and_is_counted(small_task, bases_tokenizer):
    (small_task / "dev.csv").write_text("sequence,label\nACGT,0\nAAN,1\nT,0\n")
    tokens = tokenize(read_rows(small_task / "dev.csv"), bases_tokenizer, 9, 5)
    assert tokens.ids.tolist() == [1, 5, 6, 7, 2, 1, 5, 5, 0, 2, 1, 8, 2]
    assert tokens.truncated == 1


def test_more_sequences_than_are_tokenized_at_once(small_task, bases_tokenizer, monkeypatch):
    rows = read_rows(small_task / "train.csv")
    whole = tokenize(rows, bases_tokenizer, 9, None)
    monkeypatch.setattr("finetune.tokens._AT_ONCE", 3)
    parts = tokenize(rows, bases_tokenizer, 9, None)
    assert np.array_equal(whole.ids, parts.ids)
    assert np.array_equal(whole.starts, parts.starts)


def test_a_sequence_over_the_model_limit_is_named(small_task, bases_tokenizer):
    path = small_task / "dev.csv"
    path.write_text(f"sequence,label\nACGT,0\n{'ACGT' * 3000},1\n")
    with pytest.raises(InputError, match=r"dev.csv, line 3: 12000 tokens.*--max-length"):
        tokenize(read_rows(path), bases_tokenizer, 9, None)
    assert tokenize(read_rows(path), bases_tokenizer, 9, 100).truncated == 1


def test_tokenizer_of_another_model_is_refused(small_task, bases_tokenizer):
    with pytest.raises(InputError, match=r"dev.csv, line 2: the tokenizer gives token 8, but the model has 8"):
        tokenize(read_rows(small_task / "dev.csv"), bases_tokenizer, 8, None)


@pytest.mark.parametrize("kind", ["kmer", "overlapping-kmer"])
def test_kmer_tokenizers_read_plain_text(small_task, kind):
    """`tokenizers` alone would make one [UNK] of a text that overlapping k-mers are to be cut from."""
    tokenizer = Tokenizer.from_str(kmer_json(kind, 3).decode())
    path = small_task / "dev.csv"
    path.write_text("sequence,label\nACGTACGTA,0\nACGTNA,1\nACG,0\n")
    rows, size = read_rows(path), tokenizer.get_vocab_size()
    tokens = tokenize(rows, tokenizer, size, None)
    found = [
        [tokenizer.id_to_token(token) for token in tokens.ids[start:stop].tolist()]
        for start, stop in zip(tokens.starts[:-1], tokens.starts[1:], strict=True)
    ]
    if kind == "kmer":
        expected = [["ACG", "TAC", "GTA"], ["ACG", "T", "N", "A"], ["ACG"]]
    else:
        expected = [["ACG", "CGT", "GTA", "TAC", "ACG", "CGT", "GTA"], ["ACG", "CGT", "[UNK]", "[UNK]"], ["ACG"]]
    assert found == [["[CLS]", *content, "[SEP]"] for content in expected]
    cut = tokenize(rows, tokenizer, size, 5)
    assert cut.lengths.tolist() == [5, 5, 3] and cut.truncated == sum(len(content) > 3 for content in expected)
    assert tokenizer.id_to_token(int(cut.ids[3])) == expected[0][2]


def test_a_sequence_shorter_than_a_kmer_is_named(small_task):
    tokenizer = Tokenizer.from_str(kmer_json("overlapping-kmer", 3).decode())
    path = small_task / "dev.csv"
    path.write_text("sequence,label\nACGTACGTA,0\nAC,1\n")
    with pytest.raises(InputError, match=r"dev.csv, line 3: 'AC' has no token under the model's tokenizer of 3-mers"):
        tokenize(read_rows(path), tokenizer, tokenizer.get_vocab_size(), None)


def lines(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


def test_one_file_is_split_by_its_sequences_and_equal_ones_stay_together(tmp_path, planted):
    text = (planted / "train.csv").read_text()
    path = tmp_path / "mine.csv"
    path.write_text(text + text.split("\n", 1)[1])  # each row twice
    task = read_task(path)
    assert task.name.endswith("/mine.csv") and task.made == {"test": "mine.csv", "dev": "mine.csv"}
    texts = {split: set(rows.sequences) for split, rows in task.splits.items()}
    assert not texts["train"] & texts["dev"] and not texts["train"] & texts["test"] and not texts["dev"] & texts["test"]
    sizes = {split: len(rows.labels) for split, rows in task.splits.items()}
    assert sum(sizes.values()) == 1200 and all(60 <= sizes[split] <= 180 for split in ("dev", "test"))
    # other rows around it don't move a row to another split
    path.write_text("\n".join(["sequence,label", *text.splitlines()[201:]]) + "\n")
    assert set(read_task(path).splits["test"].sequences) <= texts["test"]


def test_dev_alone_is_split_off_train_and_the_test_file_stays(small_task, planted):
    (small_task / "train.csv").write_text((planted / "train.csv").read_text())
    (small_task / "dev.csv").unlink()
    task = read_task(small_task)
    assert task.made == {"dev": "train.csv"} and len(task.splits["test"].labels) == 8
    (small_task / "dev.csv").write_text("sequence,label\nACGT,0\nACGTT,1\n")
    (small_task / "dev.csv").rename(small_task / "validation.csv")
    assert read_task(small_task).made == {}


def test_a_task_of_the_benchmark_must_have_its_own_splits(tmp_path, small_task):
    folder = tmp_path / "copies" / "human_tf_3"
    folder.parent.mkdir()
    small_task.rename(folder)
    assert read_task(folder).name == "tf/3"
    (folder / "test.csv").unlink()
    with pytest.raises(InputError, match=r"test.csv: not found, and tf/3 is a task of the benchmark"):
        read_task(folder)


def test_pairs_are_two_columns_with_types_and_the_longer_one_is_cut(tmp_path, bases_tokenizer):
    rows = [("ACGT", "TT", 0), ("A", "GGGGGGGG", 1)] * 30
    path = lines(tmp_path / "train.csv", "seq_a,seq_b,label", rows)
    read = read_rows(path)
    assert read.seconds is not None and read.seconds[:2] == ["TT", "GGGGGGGG"]
    tokens = tokenize(read, bases_tokenizer, 9, None)
    assert tokens.ids[:9].tolist() == [1, 5, 6, 7, 8, 2, 8, 8, 2]
    batch = pack(tokens, np.array([0, 1]))
    assert batch.token_types_t is not None
    assert batch.token_types_t.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1] + [0] * 3 + [1] * 9
    cut = tokenize(read, bases_tokenizer, 9, 8)
    assert cut.truncated == 60
    assert cut.ids[:8].tolist() == [1, 5, 6, 7, 2, 8, 8, 2] and cut.ids[8:16].tolist() == [1, 5, 2, 7, 7, 7, 7, 2]


def test_pairs_in_the_two_columns_that_are_not_the_label(tmp_path):
    path = lines(tmp_path / "train.csv", "enhancer,promoter,label", [("ACGTACGT", "TTTTGGGG", 0)])
    assert read_rows(path).seconds == ["TTTTGGGG"]
    assert read_rows(path, Columns(("promoter",))).seconds is None
    path = lines(tmp_path / "train.csv", "id,seq,label", [("gene_1", "TTTTGGGG", 0)])
    assert (read_rows(path).sequences, read_rows(path).seconds) == (["TTTTGGGG"], None)
    path = lines(tmp_path / "train.csv", "name,dna,label", [("gene_1", "TTTTGGGG", 0)])
    with pytest.raises(InputError, match=r"no column 'sequence'.*--sequence-columns"):
        read_rows(path)


def test_a_class_that_came_into_a_made_split_alone_is_explained(tmp_path):
    rows = [("ACGT" * 5 + "ACGT"[number % 4] * (number // 4), number % 2) for number in range(200)]
    whole = read_task(lines(tmp_path / "mine.csv", "sequence,label", rows))
    alone = whole.splits["test"].sequences[0]
    rows = [(text, 2 if text == alone else label) for text, label in rows]
    with pytest.raises(InputError, match=r"all rows of class 2 have come into test, .* give a test.csv"):
        read_task(lines(tmp_path / "mine.csv", "sequence,label", rows))


def test_a_split_keeps_both_strands_of_a_sequence_together(tmp_path, planted):
    texts = [line.split(",")[0] for line in (planted / "train.csv").read_text().splitlines()[1:]]
    other = [text[::-1].translate(str.maketrans("ACGT", "TGCA")) for text in texts]
    rows = [(text, number % 2) for number, pair in enumerate(zip(texts, other, strict=True)) for text in pair]
    task = read_task(lines(tmp_path / "mine.csv", "sequence,label", rows))
    assert not leaked(task)["test"].any() and not leaked(task)["dev"].any()


def test_numbers_with_a_decimal_point_are_regression(tmp_path, small_task):
    rows = [(f"ACGT{'A' * number}", number / 7) for number in range(100)]
    task = read_task(lines(tmp_path / "mine.csv", "sequence,label", rows))
    assert (task.kind, task.classes) == ("regression", 1)
    assert task.splits["train"].labels.dtype == np.float64
    assert read_task(small_task, Columns(kind="regression")).kind == "regression"
    with pytest.raises(InputError, match=r"mine.csv, line 2: label '0.0' is not an integer"):
        read_task(tmp_path / "mine.csv", Columns(kind="classification"))
    rows[4] = ("ACGT", "nan")
    with pytest.raises(InputError, match=r"mine.csv, line 6: label 'nan' is not a finite number"):
        read_task(lines(tmp_path / "mine.csv", "sequence,label", rows), Columns(kind="regression"))
