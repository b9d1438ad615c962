"""What a table needs beside a pre-trained encoder: models without one, through the same splits, metrics and files.

`kmer`: counts of all words of one to six bases and logistic regression. `cnn`: two convolutions over single bases, trained
by the same loop as the encoder. Both see the whole sequence. A third one, the encoder with random weights, is a model like
any other (`--model random`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from data_prep.kmers import encode_bases, forward_words
from data_prep.tokenizing.kmer_tokenizer import KMER, kmer_json
from finetune.data import Rows
from kernels.random import root_key
from pretrain.model import SITE_CLASSIFIER, Packed

KMER_BASES = (1, 2, 3, 4, 5, 6)
CHANNELS, WIDTH, DILATIONS = 64, 9, (1, 4)
CNN_DROPOUT = 0.1
PURPOSE_CNN = 34  # of the seed's children, see kernels.random; fine-tuning has the numbers from 32


def kmer_counts(rows: Rows) -> Any:
    """How often each word stands in each row, divided by the row's length: CSR fp32 [rows, 4 + 16 + ... + 4^6].

    Lower case counts as upper case; a word with another letter than A, C, G, T doesn't count. The columns of a pair's second
    sequence come after those of the first.
    """
    from scipy.sparse import hstack

    columns = [rows.sequences] if rows.seconds is None else [rows.sequences, rows.seconds]
    return hstack([_counts(texts) for texts in columns], format="csr")


def _counts(texts: Sequence[str]) -> Any:
    from scipy.sparse import csr_array

    sizes = [4**k for k in KMER_BASES]
    offsets = np.cumsum([0, *sizes[:-1]])
    indices: list[Any] = []
    values: list[Any] = []
    ends = [0]
    for text in texts:
        codes = encode_bases(text.upper().encode("ascii", "replace"))
        bad = np.append(0, np.cumsum(codes > 3))
        codes = np.where(codes > 3, np.uint8(0), codes)
        words = []
        for k, offset in zip(KMER_BASES, offsets.tolist(), strict=True):
            if len(codes) >= k:
                whole = bad[k:] == bad[:-k]
                words.append(forward_words(codes, k, np.uint16)[whole].astype(np.int32) + offset)
        found, counts = np.unique(np.concatenate(words), return_counts=True)
        indices.append(found)
        values.append(np.asarray(counts / len(text), dtype=np.float32))
        ends.append(ends[-1] + len(found))
    shape = (len(texts), sum(sizes))
    return csr_array((np.concatenate(values), np.concatenate(indices).astype(np.int32), np.array(ends)), shape=shape)


def base_tokenizer() -> Tokenizer:
    """A token a base; what is no upper-case A, C, G, T or N is [UNK]."""
    return Tokenizer.from_str(kmer_json(KMER, 1).decode())


class ConvolutionalNetwork(nn.Module):
    """Bases -> two residual convolutions of 9 and 33 bases -> maximum and mean over the sequence -> Linear.

    Sequences are padded inside; padding is kept at 0 after each layer, so a batch's other sequences change nothing.
    """

    def __init__(self, vocab_size: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, CHANNELS)
        self.types = nn.Embedding(2, CHANNELS)  # of a pair, which sequence a base is in
        self.convolutions = nn.ModuleList(
            [nn.Conv1d(CHANNELS, CHANNELS, WIDTH, padding="same", dilation=dilation) for dilation in DILATIONS]
        )
        self.classifier = nn.Linear(2 * CHANNELS, classes)

    def forward(self, batch: Packed) -> Tensor:
        """fp32 [b, classes]."""
        lengths_b = batch.cu_seqlens.diff().long()
        x_td = self.embedding(batch.ids_t)
        if batch.token_types_t is not None:
            x_td = x_td + self.types(batch.token_types_t)
        inside_bs = torch.arange(batch.max_seqlen, device=x_td.device) < lengths_b[:, None]
        x_bsd = x_td.new_zeros(*inside_bs.shape, CHANNELS)
        x_bsd[inside_bs] = x_td
        x_bds, inside_b1s = x_bsd.transpose(1, 2), inside_bs[:, None]
        for convolution in self.convolutions:
            x_bds = (x_bds + F.gelu(convolution(x_bds))) * inside_b1s
        most_bd = x_bds.masked_fill(~inside_b1s, -torch.inf).amax(-1)
        mean_bd = x_bds.sum(-1) / lengths_b[:, None]
        pooled_bd = torch.cat([most_bd, mean_bd], dim=1)
        keys_b = None if batch.dropout_keys_t is None else batch.dropout_keys_t[batch.cu_seqlens[:-1]]
        return self.classifier(kernels.dropout(pooled_bd, CNN_DROPOUT, keys_b, SITE_CLASSIFIER)).float()


def build_cnn(vocab_size: int, classes: int, seed: int) -> ConvolutionalNetwork:
    """With weights drawn from `seed`, by torch's own initialisation of such layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(root_key(seed, PURPOSE_CNN) % (1 << 63))
        return ConvolutionalNetwork(vocab_size, classes)
