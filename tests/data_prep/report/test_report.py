"""The report's figures are those of the data, a sample stands for the whole, and thousands of species stay readable."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import matplotlib.colors
import matplotlib.image
import numpy as np
import pytest

from data_prep.__main__ import run
from data_prep.codec import Codec
from data_prep.dataset import SHARD_ROW, Dataset
from data_prep.pack import DROPPED
from data_prep.report import plots
from data_prep.report.command import render
from data_prep.report.markdown import bases, percent
from data_prep.report.sample import GC_BINS, Sample, choose, draw
from data_prep.report.tables import Tables

PNG = b"\x89PNG\r\n"


def table_below(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    lines = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0].splitlines()
    rows = [line for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows if "--:" not in row]


@pytest.fixture(scope="module")
def written(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    assert run(["report", str(dataset), "--out", str(out)]) == 0
    return out


def test_the_files(dataset: Path, written: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["report", str(dataset), "--out", str(tmp_path), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        result["files"]
        == sorted(path.name for path in written.iterdir())
        == sorted(["report.md", "species.tsv", "dropped.png", "gc.png", "species.png", "tokens.png"])
    )
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()  # equal data, equal report
        assert path.suffix != ".png" or path.read_bytes().startswith(PNG)
    text = (written / "report.md").read_text()
    for picture in written.glob("*.png"):
        assert f"]({picture.name})" in text


def test_the_figures_are_those_of_the_data(dataset: Path, written: Path) -> None:
    opened = Dataset(dataset)
    codec = Codec(opened.tokenizer_path)
    text = (written / "report.md").read_text()
    assert opened.sha256 in text and codec.sha256 in text
    rows = {row[0]: row for row in table_below(text, "Species")[1:]}
    split = opened.split("train")
    for number, species in enumerate(opened.manifest["species"]):
        spelt, tokens = b"", 0
        for row in np.flatnonzero(split.shards["species"] == number):
            for block in (split.read_block(row, n) for n in range(len(split.blocks(row)))):
                spelt, tokens = spelt + codec.decode(block.tokens), tokens + len(block.tokens)
        gc = 100 * (spelt.count(b"G") + spelt.count(b"C")) / len(spelt)
        cells = rows[species["name"]]
        assert cells[1] == species["category"]
        assert cells[2] == bases(species["bases"]["in"])
        assert cells[3] == percent(species["bases"]["kept"], species["bases"]["in"])
        assert cells[4:7] == [f"{count:,}" for count in (*species["sequences"].values(), tokens)]
        assert cells[7:] == [f"{100 * species['weight']:.2f} %", f"{len(spelt) / tokens:.3f}", f"{gc:.1f}"]
    lines = [line.split("\t") for line in (written / "species.tsv").read_text().splitlines()]
    by_name = {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[1:]}
    assert list(by_name) == sorted(by_name, key=lambda name: -int(by_name[name]["tokens_train"]))
    for species in opened.manifest["species"]:
        line = by_name[species["name"]]
        assert line["file_sha256"] == species["file_sha256"]
        assert int(line["bases_in"]) == int(line["bases_kept"]) + sum(int(line[reason]) for reason in DROPPED)


def test_the_sample_of_everything_counts_everything(dataset: Path) -> None:
    opened = Dataset(dataset)
    codec, split = Codec(opened.tokenizer_path), opened.split("train")
    sample = draw(opened, codec)
    blocks = [split.read_block(row, number) for row in range(len(split.shards)) for number in range(len(split.blocks(row)))]
    assert sample.blocks == sample.blocks_in_all == len(blocks)
    uses = np.bincount(np.concatenate([block.tokens for block in blocks]), minlength=codec.vocab_size)
    lengths = np.bincount(np.concatenate([block.lengths for block in blocks]), minlength=19)
    assert sample.token_uses == pytest.approx(uses) and sample.length_counts == pytest.approx(lengths)
    expected = np.zeros(GC_BINS)
    for block in blocks:
        for number in range(len(block.lengths)):
            text = codec.decode(block.sequence(number))
            expected[min(GC_BINS - 1, GC_BINS * (text.count(b"G") + text.count(b"C")) // len(text))] += 1
    assert sample.gc_sequences.sum(axis=0) == pytest.approx(expected)


def shards(blocks: list[list[int]]) -> np.ndarray:
    """A shard table: of each species the blocks of its shards."""
    rows = [(species, count) for species, counts in enumerate(blocks) for count in counts]
    table = np.zeros(len(rows), SHARD_ROW)
    table["species"], table["blocks"] = zip(*rows, strict=True)
    return table


def test_a_sample_is_spread_over_all_shards_of_all_species() -> None:
    table = shards([[100] * 5, [1], [3, 500]])
    chosen = choose(table, 3, seed=0, limit=100)
    assert len(chosen[1]) == 1 and len(chosen[0]) + len(chosen[2]) in range(90, 101)
    for number, blocks in enumerate(chosen):
        assert len(set(map(tuple, blocks.tolist()))) == len(blocks)
        assert (table["species"][blocks[:, 0]] == number).all()
        assert (blocks[:, 1] >= 0).all() and (blocks[:, 1] < table["blocks"][blocks[:, 0]]).all()
    assert np.bincount(chosen[0][:, 0]).min() >= len(chosen[0]) // 5
    assert np.array_equal(chosen[0], choose(table, 3, seed=0, limit=100)[0])
    assert not np.array_equal(chosen[0], choose(table, 3, seed=1, limit=100)[0])
    everything = choose(table, 3, seed=0, limit=10_000)
    assert [len(blocks) for blocks in everything] == [500, 1, 503]
    assert everything[2][:4].tolist() == [[6, 0], [6, 1], [6, 2], [7, 0]]
    assert [len(blocks) for blocks in choose(shards([[9], [9]]), 3, seed=0, limit=1)] == [1, 1, 0]


def test_a_sample_is_weighted_to_the_whole(dataset: Path) -> None:
    opened = Dataset(dataset)
    sample = draw(opened, Codec(opened.tokenizer_path), limit=1)
    train = opened.manifest["splits"]["train"]
    species = sum(row["tokens"]["train"] > 0 for row in opened.manifest["species"])
    assert sample.blocks == species < sample.blocks_in_all
    assert sample.token_uses.sum() == pytest.approx(train["tokens"])
    assert sample.length_counts @ np.arange(19) == pytest.approx(train["tokens"])


def invented(species: int, categories: int) -> tuple[dict[str, Any], Sample]:
    """The manifest of many species, most of them tiny, and a sample of them."""
    rng = np.random.default_rng(0)
    table = []
    for number in range(species):
        tokens, lost = int(10**8 / (1 + number)), rng.integers(0, 10**5, len(DROPPED)).tolist()
        table.append(
            {
                "name": f"species|{number}",
                "category": f"category-{number % categories}",
                "file": f"{number}.fa",
                "file_sha256": "0" * 64,
                "contigs": 3,
                "bases": {
                    "in": 5 * tokens,
                    "kept": 5 * tokens - sum(lost),
                    "dropped": dict(zip(DROPPED, lost, strict=True)),
                },
                "sequences": {"train": tokens // 100, "valid": number % 2},
                "tokens": {"train": tokens, "valid": 100 * (number % 2)},
            }
        )
    sample = Sample(
        blocks=species,
        blocks_in_all=species * 10,
        tokens=np.full(species, 1000),
        bases=np.full(species, 5000),
        gc=np.full(species, 2000.0),
        gc_sequences=rng.random((species, GC_BINS)),
        token_uses=np.ones(200),
        length_counts=np.ones(127),
    )
    pairs = [{"species": f"species|{n}", "kept_in": f"species|{n + 1}", "exact": n, "near": 1} for n in range(500)]
    splits = {
        split: {"sequences": 10, "tokens": sum(row["tokens"][split] for row in table), "shards": 5}
        for split in ("train", "valid")
    }
    duplicates = {"exact": sum(pair["exact"] for pair in pairs), "near": 500, "from": pairs}
    return {"species": table, "splits": splits, "duplicates": duplicates}, sample


def test_thousands_of_species_stay_readable(dataset: Path) -> None:
    manifest, sample = invented(species=3000, categories=20)
    opened = Dataset(dataset)
    opened.manifest |= {**manifest, "excluded": {"sha256": "5" * 64, "sequences": 1234}}
    tables = Tables(manifest["species"], sample)
    files = render(opened, Codec(opened.tokenizer_path), sample, tables)
    text = files["report.md"].decode()
    assert len(text.splitlines()) < 300 and max(map(len, text.splitlines())) < 2000
    rows = table_below(text, "Species")[1:]
    assert rows[0][0] == "species\\|0"
    assert len(rows) == 40 + 20 and rows[40][0] == "(148 more)"
    weights = [float(row[7].rstrip("< %")) for row in rows]
    assert sum(weights) == pytest.approx(100, abs=0.5)
    pairs = table_below(text, "Duplicates")[1:]
    assert pairs[0][0] == "species\\|499" and pairs[0][2] == "499"
    assert pairs[-1][0] == "(460 more pairs)" and len(pairs) == 41
    assert sum(int(row[2].replace(",", "")) for row in pairs) == manifest["duplicates"]["exact"]
    assert "No validation data: 1,500 species" in text and "and 1,470 more" in text
    assert "1,234 sequences" in text and "5" * 64 in text
    assert "a sample of 3,000 of the 30,000 blocks" in text
    assert len(files["species.tsv"].splitlines()) == 3001
    assert list(tables.groups)[-1] == "9 others" and sum(map(len, tables.groups.values())) == 3000


def painted(png: bytes, colour: str) -> np.ndarray:
    """Which pixels [height, width] have a colour."""
    pixels = np.rint(255 * matplotlib.image.imread(io.BytesIO(png))[:, :, :3])
    return (pixels == np.rint(255 * np.array(matplotlib.colors.to_rgb(colour)))).all(axis=2)


def test_a_reason_keeps_its_colour_and_has_one_only_if_it_can_be_seen() -> None:
    reasons = list(DROPPED)
    for shares, seen in (([0, 0, 0, 30, 0, 0], {3}), ([5, 0, 0, 0, 90, 0.01], {0, 4}), ([0, 0, 0, 0, 0.2, 0.1], {4, 5})):
        png = plots.dropped(["a", "b"], reasons, np.array([[0.0] * 6, shares]), ["0 of 1 kb", "some of 2 kb"])
        assert {number for number in range(6) if painted(png, plots.COLOURS[number]).any()} == seen
    nothing = plots.dropped(["a"], reasons, np.zeros((1, 6)), ["0 of 1 kb"])
    assert not any(painted(nothing, colour).any() for colour in plots.COLOURS)


def test_tokens_of_one_length_are_drawn_as_thin_as_others_and_at_their_letters() -> None:
    """Overlapping 6-mers move on by a base, but have six letters."""
    lengths = np.zeros(127)
    lengths[50] = 9
    six = np.array([0] * 5 + [6] * 4096)
    png = plots.tokens(six, np.ones(4101), lengths)
    pale = painted(png, plots.COLOURS[4])
    assert 20 < np.count_nonzero(pale.any(axis=0)) < 0.1 * pale.shape[1]  # bar and swatch of the legend
    overlapping = painted(plots.tokens(np.minimum(six, 1), np.ones(4101), lengths, 5), plots.COLOURS[4])
    assert np.flatnonzero(overlapping[200]).tolist() == np.flatnonzero(pale[200]).tolist() != []


def test_species_without_training_data_have_a_row_and_others_are_in_the_title() -> None:
    png = plots.species(["a", "b"], ["g", "h"], ["g", "h", "none of these"], [100, 0], "")
    assert [painted(png, colour).any() for colour in plots.COLOURS[:3]] == [True, True, False]  # "h" in the legend only
    with_title = plots.species(["a", "b"], ["g", "h"], ["g", "h"], [100, 0], "7 more have 1.00 % together")
    tops = [np.flatnonzero(painted(each, plots.COLOURS[0])[:, :500].any(axis=1))[0] for each in (png, with_title)]
    assert tops[0] < tops[1]  # a title of two lines


def test_numbers_for_people() -> None:
    assert [bases(count) for count in (0, 999, 1000, 2_345_678, 32_500_000_000)] == [
        "0 b",
        "999 b",
        "1.00 kb",
        "2.35 Mb",
        "32.50 Gb",
    ]
    assert [percent(part, 10**6) for part in (0, 1, 5000, 999_999, 10**6)] == [
        "0",
        "< 0.01 %",
        "0.50 %",
        "> 99.99 %",
        "100.00 %",
    ]
    assert percent(0, 0) == "0"


def test_damage_and_wrong_options_are_named(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    tar = next(iter(sorted((copy / "train").glob("*.tar"))))
    tar.write_bytes(tar.read_bytes()[:600])
    assert run(["report", str(copy), "--out", str(tmp_path / "out")]) == 2
    assert f"{tar}: block 0 at offset 0 is damaged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(["report", str(copy), "--out", str(tmp_path / "out"), "--sample-blocks", "0"]) == 2
    assert "--sample-blocks 0" in capsys.readouterr().err


def test_a_dataset_of_an_earlier_version(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(dataset, tmp_path / "old")
    path = tmp_path / "old/manifest.json"
    manifest = json.loads(path.read_bytes())
    del manifest["duplicates"]
    path.write_text(json.dumps(manifest))
    assert run(["report", str(tmp_path / "old"), "--out", str(tmp_path / "out")]) == 2
    told = f"{path}: made by an earlier version (no `duplicates`); shard again"
    assert told in capsys.readouterr().err.splitlines()[-1]
