"""Launch appends to a compressed cache: flush, ring, lengths, all decided on the device, so that a captured graph appends from empty to full.

A cache that is full cannot raise on the device without losing the process's other work there. The kernels then write nothing but four numbers into
`fault`, host memory that the device reaches; the next append or attention on that device raises them as the error that the reference raises at once.
Eager code never gets there: Layer.reserve asks before it appends.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from effllm.errors import CacheError
from effllm.kernels.triton import kv_flush_launch
from effllm.kernels.triton.kv_ring import kv_lens_kernel, kv_ring_kernel
from effllm.runtime.caches import paging
from effllm.runtime.caches.base import parse

ONE_PROGRAM = 32768  # channels of ring rows that one program still writes

_faults: dict[torch.device, tuple[Tensor, Any]] = {}  # and the same memory for the host: an item of it costs a tenth of a tensor's


def fault_of(device: torch.device) -> Tensor:
    """int64 (4,): whether an append did not fit, tokens held, tokens more, capacity. Pinned host memory for a GPU."""
    if device not in _faults:
        made = torch.zeros(4, dtype=torch.int64, pin_memory=device.type == "cuda")
        _faults[device] = made, made.numpy()
    return _faults[device][0]


def check(device: torch.device) -> None:
    """Raise CacheError (E-KVC-FULL) for an append that did not fit and has run by now, once."""
    found = _faults.get(device)
    if found is None or not found[1][0]:
        return
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the other numbers, and the same of other layers
    total, more, limit = (int(i) for i in found[1][1:])
    found[0].zero_()
    paging.check_room(total, more, limit)
    raise CacheError("E-KVC-FULL", f"{more} tokens did not fit behind {total} of {limit}", "make the cache larger; it is unchanged")


def append(pages: Tensor, ring: Tensor, lens: Tensor, start: Tensor, k: Tensor, v: Tensor, tables: list[Tensor], spec: str) -> None:
    """The op "kv_append" for every format with pages. Raises CacheError (E-KVC-FULL) for an earlier append, on CPU tensors for this one."""
    check(ring.device)
    fmt = parse(spec)
    batch, groups, n, dim = k.shape
    width = ring.shape[3]
    limit = paging.capacity(fmt, pages.shape[1])
    if n > limit:
        paging.check_room(0, n, limit)
    if n == 0 or batch * groups == 0:
        return
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (k, v))
    fault = fault_of(ring.device)
    strides = (*k.stride()[:3], *v.stride()[:3])
    record = fmt.layout(groups, dim, ring.dtype).record
    where = (ring, lens, start, n, pages.shape[1], pages.shape[2], record, groups, width, limit, *strides)
    filled = min(triton.cdiv(n, fmt.page), pages.shape[1])
    wide = max(16, triton.next_power_of_2(dim))
    rows = 2 * batch * groups * min(n, width)
    last = triton.next_power_of_2(rows) * wide <= ONE_PROGRAM
    block = triton.next_power_of_2(rows) if last else max(1, 4096 // wide)
    with torch.cuda.device_of(ring):  # Triton launches on the current device; no effect on CPU tensors
        if filled:
            kv_flush_launch.FLUSH[fmt.name](fmt, filled, k, v, pages, tables, where)
        kv_ring_kernel[(triton.cdiv(rows, block),)](
            k, v, ring, lens, fault, n, batch, groups, width, limit, *strides, D=dim, DP=wide, BR=block, PAGE=fmt.page, LAST=last, num_warps=4
        )
        if not last:
            kv_lens_kernel[(1,)](lens, fault, n, width, limit, PAGE=fmt.page, num_warps=1)
    if ring.device.type == "cpu":  # the interpreter: everything has run
        check(ring.device)
