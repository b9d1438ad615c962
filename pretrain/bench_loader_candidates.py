"""What `bench-loader` compares: the same sequences in the forms that other loaders read, and those loaders.

All but `webdataset_blocks` deliver micro batches of packed int64 ids, [CLS] and [SEP] among them, with int32 cu_seqlens:

    ours               `Loader`: micro batches of the global batch of a single rank, masks and dropout keys included
    ours_plain         the same without masks and dropout keys
    webdataset         one sequence a sample, as people write it: members NUMBER.npy of uint16 ids that have [CLS] and [SEP]
                       already, 8,192 samples a tar; WebDataset(tars, shardshuffle=100).shuffle(1000).decode()
                       .to_tuple("npy").batched(micro batch), with a collation that is one concatenation. No WebLoader around
                       it, and tar headers without fractions of seconds, which would only cost it time
    webdataset_blocks  our own tars through WebDataset(...).decode(), tokens and lengths only: no shuffling, no batches; the
                       most that webdataset could reach with our blocks
    energon            Megatron-Energon on the tars of `webdataset`: its own preparation, shuffle_buffer_size=1000,
                       max_samples_per_sequence=100 as in its quick start, num_workers=0, the same collation
    torchdata          StatefulDataLoader(shuffle=True, num_workers=0) over a memory map, uint16 [sequences, sequence_length]
                       padded with [PAD], one index at a time; the collation takes the padding out
    torchdata_gather   the same with `__getitems__`: a batch is one gather, which few people write

A memory map has nothing to decode or check, but it is one flat file that has to lie on a local disk, shuffled as a whole.
Ours begins each pass with a new Loader: every block is read, checked and decoded in every pass, as in training on data that
memory doesn't hold.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.cli import InputError, dump_json, log, write_atomically
from data_prep.dataset import FORMAT_VERSION, SHARD_ROW, SPECIALS, Dataset, ShardWriter, npy_bytes
from data_prep.finalize import WINDOW_BLOCKS, streams_of
from data_prep.storage import file_sha256
from pretrain.config import Config
from pretrain.loader import Loader, open_dataset
from pretrain.masking import CLS, FIRST_CONTENT, SEP

PAD = SPECIALS.index("[PAD]")
VOCABULARY, LENGTH = 4096, 128  # of the synthetic dataset; LENGTH counts [CLS] and [SEP]
SHARDS, SPECIES, TAILS = 8, 4, 0.02  # TAILS: share of sequences that are shorter, as at the ends of contigs
SAMPLES_PER_TAR = 8192
SHUFFLE_BUFFER = 1000  # samples


class Batch(NamedTuple):
    """What a candidate delivers; of `webdataset_blocks` a block's tokens and lengths."""

    ids: Any  # int64 [t], packed
    starts: Any  # int32 [sequences + 1]
    content: int  # tokens but for [CLS] and [SEP]


# Opens a loader anew at the beginning of a pass (False) or in the middle of one (True) and gives the rest of the pass.
Start = Callable[[bool], Iterator[Batch]]


class Copies(NamedTuple):
    """The first sequences of a dataset in the forms that others read."""

    tars: list[Path]  # one sequence a sample
    rows: Path  # .npy, uint16 [sequences, sequence_length], padded
    sequences: int


def write_synthetic(directory: Path, sequences: int) -> Path:
    """A finished dataset of random tokens: several shards and species, nearly all sequences of full length."""
    random = np.random.default_rng(0)
    rows = []
    for shard, numbers in enumerate(np.array_split(np.arange(sequences), SHARDS)):
        writer = ShardWriter(directory / "train", shard, shard * SPECIES // SHARDS)
        for number in numbers:
            length = int(random.integers(8, LENGTH - 2)) if random.random() < TAILS else LENGTH - 2
            writer.add(random.integers(FIRST_CONTENT, VOCABULARY, length).astype(np.uint16), shard, int(number) * 600)
        rows.append(writer.close())
    table = np.array([row for row in rows if row is not None], dtype=SHARD_ROW)
    write_atomically(directory / "tokenizer.json", b"{}")
    write_atomically(directory / "train" / "shards.npy", npy_bytes(table))
    write_atomically(directory / "valid" / "shards.npy", npy_bytes(table[:0]))
    files = {name: file_sha256(directory / name) for name in ("tokenizer.json", "train/shards.npy", "valid/shards.npy")}
    species = [{"name": f"species-{number}", "category": "synthetic"} for number in range(SPECIES)]
    splits = {
        split: {"shards": len(part), **{key: int(part[key].sum()) for key in ("blocks", "sequences", "tokens")}}
        for split, part in (("train", table), ("valid", table[:0]))
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "tokenizer": {"kind": "random", "sha256": files["tokenizer.json"], "vocab_size": VOCABULARY},
        "sequence_length": LENGTH,
        "order": {"streams": streams_of(None, sequences), "window_blocks": WINDOW_BLOCKS},
        "splits": splits,
        "species": species,
        "files": files,
    }
    write_atomically(directory / "manifest.json", dump_json(manifest))
    return directory


def write_copies(dataset: Dataset, sequences: int, scratch: Path) -> Copies:
    """The first `sequences` training sequences (or all, if they are fewer) as tars of samples and as rows."""
    from webdataset import TarWriter

    count = min(sequences, int(dataset.manifest["splits"]["train"]["sequences"]))
    tars: list[Path] = []
    (scratch / "samples").mkdir()
    rows_path = scratch / "rows.npy"
    shape = (count, int(dataset.manifest["sequence_length"]))
    rows = np.lib.format.open_memmap(rows_path, "w+", np.dtype("<u2"), shape)
    rows[:] = PAD
    found = islice(_sequences(dataset), count)
    for first in range(0, count, SAMPLES_PER_TAR):
        tars.append(scratch / "samples" / f"{len(tars):06d}.tar")
        with tars[-1].open("wb") as stream:
            writer = TarWriter(stream, mtime=0)
            for number, content in enumerate(islice(found, SAMPLES_PER_TAR), first):
                ids = np.concatenate([[CLS], content, [SEP]]).astype(np.uint16)
                rows[number, : len(ids)] = ids
                writer.write({"__key__": f"{number:09d}", "npy": ids})
            writer.close()
    rows.flush()
    return Copies(tars, rows_path, count)


def _sequences(dataset: Dataset) -> Iterator[NDArray[np.uint16]]:
    """Content tokens of the training sequences in stored order."""
    split = dataset.split("train")
    for row in range(len(split.shards)):
        for number in range(int(split.shards["blocks"][row])):
            block = split.read_block(row, number)
            yield from np.split(block.tokens, np.cumsum(block.lengths, dtype=np.int64)[:-1])


def build_candidates(config: Config, copies: Copies) -> tuple[dict[str, Start], list[str]]:
    """(candidates by name, packages that are not installed). Raises InputError when there is too little to read."""
    least, size = 2 * config.train.global_batch_size, config.train.micro_batch_size
    if copies.sequences < least:
        raise InputError(f"--sequences: {copies.sequences} to read, two global batches take {least}; give more of them")
    tars = sorted(Path(config.data.path, "train").glob("*.tar"))
    candidates = {
        "ours": _ours(config, plain=False),
        "ours_plain": _ours(config, plain=True),
        "webdataset": _webdataset(copies, size),
        "webdataset_blocks": _webdataset_blocks(tars),
    }
    missing = []
    for package, build in (("megatron-energon", _energon), ("torchdata", _torchdata)):
        try:
            candidates |= build(copies, size)
        except ModuleNotFoundError as error:
            log(f'{package} is left out ({error}); see the extra "bench"')
            missing.append(package)
    return candidates, missing


def _packed(ids: Any, starts: Any) -> Batch:
    return Batch(ids, starts, len(ids) - 2 * (len(starts) - 1))


def _collate(sequences: Sequence[NDArray[np.uint16]]) -> Batch:
    """Sequences that have [CLS] and [SEP], end to end."""
    starts = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    return _packed(torch.from_numpy(np.concatenate(sequences).astype(np.int64)), torch.from_numpy(starts))


def _ours(config: Config, plain: bool) -> Start:
    def start(middle: bool) -> Iterator[Batch]:
        loader = Loader(*open_dataset(config), rank=0, ranks=1, plain=plain)
        size = config.train.global_batch_size
        steps = loader.order.epoch_length // size
        first = steps // 2 if middle else 0
        found = islice(loader.steps(first * size), steps - first)
        return (_packed(batch.packed.ids_t, batch.packed.cu_seqlens) for batches in found for batch in batches)

    return start


def _webdataset(copies: Copies, size: int) -> Start:
    from webdataset import WebDataset

    def collate(samples: Sequence[tuple[NDArray[np.uint16]]]) -> Batch:
        return _collate([ids for (ids,) in samples])

    def start(middle: bool) -> Iterator[Batch]:
        source = WebDataset([str(path) for path in copies.tars], shardshuffle=100).shuffle(SHUFFLE_BUFFER).decode()
        batches = source.to_tuple("npy").batched(size, collation_fn=collate)
        # There is no exact resume: what was seen is read again and thrown away.
        return islice(batches, copies.sequences // 2 // size if middle else 0, None)

    return start


def _webdataset_blocks(tars: list[Path]) -> Start:
    from webdataset import WebDataset

    def start(middle: bool) -> Iterator[Batch]:
        wanted = (".tokens.npy", ".lengths.npy")
        source = WebDataset(
            [str(path) for path in tars], shardshuffle=False, select_files=lambda name: name.endswith(wanted)
        )
        return (Batch(block["tokens.npy"], block["lengths.npy"], len(block["tokens.npy"])) for block in source.decode())

    return start


def _energon(copies: Copies, size: int) -> dict[str, Start]:
    energon: Any = importlib.import_module("megatron.energon")
    flavors: Any = importlib.import_module("megatron.energon.flavors")
    directory = copies.tars[0].parent
    with redirect_stdout(sys.stderr):  # it tells what it does; stdout is for the result
        flavors.BaseWebdatasetFactory.prepare_dataset(
            directory,
            [path.name for path in copies.tars],
            split_parts_ratio=[("train", 1), ("val", 0), ("test", 0)],
            shuffle_seed=None,
            workers=1,
        )
    kind = {"__module__": "megatron.energon", "__class__": "TextSample"}  # of its kinds, the one with a single field
    write_atomically(directory / ".nv-meta" / "dataset.yaml", dump_json({"sample_type": kind, "field_map": {"text": "npy"}}))

    class Encoder(energon.DefaultTaskEncoder):
        def batch(self, samples: list[Any]) -> Batch:
            return _collate([sample.text for sample in samples])

    def open_loader() -> Any:
        source = energon.get_train_dataset(
            directory,
            batch_size=size,
            shuffle_buffer_size=SHUFFLE_BUFFER,
            max_samples_per_sequence=100,
            worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=0),
            task_encoder=Encoder(),
            repeat=False,
        )
        return energon.get_savable_loader(source, watchdog_timeout_seconds=None)  # a watchdog would be a thread

    seen = open_loader()
    _skip(seen, copies.sequences // 2 // size)
    state = seen.save_state_rank()

    def start(middle: bool) -> Iterator[Batch]:
        loader = open_loader()
        if middle:
            loader.restore_state_rank(state)
        return iter(loader)

    return {"energon": start}


def _torchdata(copies: Copies, size: int) -> dict[str, Start]:
    stateful: Any = importlib.import_module("torchdata.stateful_dataloader")

    class Rows(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.rows = np.load(copies.rows, mmap_mode="r")

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, number: int) -> NDArray[np.uint16]:
            return self.rows[number]

    class GatheredRows(Rows):
        def __getitems__(self, numbers: list[int]) -> NDArray[np.uint16]:
            return self.rows[numbers]

    def collate(rows: Any) -> Batch:
        rows_bs = np.asarray(rows)
        inside = rows_bs != PAD
        starts = np.append(0, np.cumsum(inside.sum(1))).astype(np.int32)
        return _packed(torch.from_numpy(rows_bs[inside].astype(np.int64)), torch.from_numpy(starts))

    def candidate(rows: type[Rows]) -> Start:
        def open_loader() -> Any:
            return stateful.StatefulDataLoader(rows(), batch_size=size, shuffle=True, num_workers=0, collate_fn=collate)

        seen = open_loader()
        _skip(seen, copies.sequences // 2 // size)
        state = seen.state_dict()

        def start(middle: bool) -> Iterator[Batch]:
            loader = open_loader()
            if middle:
                loader.load_state_dict(state)
            return iter(loader)

        return start

    return {"torchdata": candidate(Rows), "torchdata_gather": candidate(GatheredRows)}


def _skip(loader: Any, batches: int) -> None:
    """Take and forget batches, so that the loader stands in the middle of a pass."""
    for _ in islice(loader, batches):
        pass
