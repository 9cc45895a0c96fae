"""2:4 weights to and from what torch and CUTLASS call semi-structured: kept values and reordered metadata words.

Metadata.  A nibble for each group of four columns holds the columns of its two kept weights, the lower one in the lower two bits.
Words of int16 (16-bit values: 4 groups) or int32 (8-bit values: 8 groups) hold nibbles from the least significant on. CUTLASS reads
the words (N, W) in another order: rows are regrouped within tiles of 32 (16-bit) or 16 rows (8-bit) as (8, tile / 8) transposed,
then the off-diagonal words of each 2 x 2 block change places, and pairs of columns are stored interleaved, column major.

Plain torch, any device. torch's own product of such tensors needs CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effllm.errors import WeightError
from effllm.runtime.formats import dense, nm, parts
from effllm.runtime.formats.base import Packed


def _word(dtype: torch.dtype) -> tuple[torch.dtype, int, int]:
    """Metadata dtype, nibbles in a word, and rows in a tile, for values of a dtype."""
    if dtype in (torch.float16, torch.bfloat16):
        return torch.int16, 4, 32
    if dtype == torch.int8:
        return torch.int32, 8, 16
    raise WeightError("E-WGT-SEMI", f"semi-structured tensors of {dtype}", "store the values in fp16 or bf16 (int8 for codes)")


def order(rows: int, words: int, tile: int) -> Tensor:
    """Where each word of (rows, words) goes in the flat tensor that CUTLASS reads, int64 (rows, words)."""
    r = torch.arange(rows).view(rows, 1)
    c = torch.arange(words).view(1, words)
    lane = r % tile
    r = r - lane + lane % 8 * (tile // 8) + lane // 8
    swap = ((r % 2 == 0) & (c % 2 == 1)).long() - ((r % 2 == 1) & (c % 2 == 0)).long()
    r, c = r + swap, c - swap
    return (c // 2) * 2 * rows + r * 2 + c % 2


def pack_meta(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns (N, K / 2) of kept weights, ascending within groups, to metadata (N, W) as CUTLASS reads it."""
    kind, nibbles, tile = _word(dtype)
    rows, kc = columns.shape
    if rows % tile or kc % (4 * nibbles):
        need = f"{tile} rows and {8 * nibbles} columns"
        raise WeightError("E-WGT-SEMI", f"a {rows} x {2 * kc} weight in tiles of {need}", f"give multiples of {need}, or keep the N:M format")
    pair = (columns % 4).view(rows, -1, nibbles, 2)
    nibble = pair[..., 0] | pair[..., 1] << 2
    word = (nibble << torch.arange(nibbles, device=columns.device) * 4).sum(-1)
    top = 1 << (4 * nibbles)
    word = torch.where(word >= top // 2, word - top, word).to(kind)
    where = order(rows, word.shape[1], tile).to(columns.device)
    return torch.empty_like(word).view(-1).scatter_(0, where.view(-1), word.reshape(-1)).view_as(word)


def unpack_meta(meta: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `pack_meta`: columns (N, K / 2)."""
    _, nibbles, tile = _word(dtype)
    rows, words = meta.shape
    word = meta.reshape(-1)[order(rows, words, tile).to(meta.device).view(-1)].view(rows, words, 1).long()
    nibble = word >> torch.arange(nibbles, device=meta.device) * 4 & 15
    place = torch.stack([nibble & 3, nibble >> 2], -1).view(rows, -1, 2)
    return (place + torch.arange(place.shape[1], device=meta.device).view(1, -1, 1) * 4).view(rows, -1)


def to_cutlass(packed: Packed) -> tuple[Tensor, Tensor]:
    """Values (N, K / 2) and metadata of a 2:4 weight with fp16 or bf16 values.

    Raises WeightError (E-WGT-SEMI) for another pattern, other values, or a shape that does not fill whole tiles.
    """
    values = parts.part(packed, "values")
    if (packed.attrs["n"], packed.attrs["m"]) != (2, 4) or values.format != dense.name or packed.shape[1] % 4:
        cause = f"{packed.attrs['n']}:{packed.attrs['m']} with {values.format} values and {packed.shape[1]} inputs"
        raise WeightError("E-WGT-SEMI", cause, "semi-structured tensors are 2:4 with dense values and whole groups")
    kept = values.tensors["values"]
    return kept, pack_meta(nm.columns_of(packed), kept.dtype)


def from_cutlass(values: Tensor, meta: Tensor) -> Packed:
    """The N:M weight of kept values (N, K / 2) and their metadata; pairs out of order are put into order."""
    columns, at = unpack_meta(meta, values.dtype).view(values.shape[0], -1, 2).sort(-1)
    if bool((columns[..., 0] == columns[..., 1]).any()):
        raise WeightError("E-WGT-SEMI", "metadata that names one column twice", "give metadata as torch or CUTLASS make it")
    kept = values.view_as(columns).gather(-1, at).reshape(values.shape)
    return nm.make(dense.make(kept), columns.reshape(values.shape), 2 * values.shape[1], 2, 4)


def to_torch(packed: Packed) -> Tensor:
    """torch's semi-structured tensor of a 2:4 weight on a GPU. Raises WeightError (E-WGT-SEMI) elsewhere."""
    device = packed.tensors["index"].device
    if device.type != "cuda":
        raise WeightError("E-WGT-SEMI", f"torch's semi-structured tensors live on CUDA, the weight is on {device}", "move it, or use to_cutlass")
    to_cutlass(packed)  # checks
    found: Tensor = torch.sparse.to_sparse_semi_structured(nm.unpack(packed, parts.part(packed, "values").tensors["values"].dtype))
    return found
