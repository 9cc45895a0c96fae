"""Device layouts of packed weights. Formats are canonical; a kernel family reads its own layout, made here and undone here.

Every layout module offers `repack(packed) -> dict` with the keys codes, scale and, for affine weights, minimum, and its exact
inverse `restore(tensors, shape, attrs) -> Packed`; `codes(tensors...)` decodes rows for gathers.

The layouts of N:M and ARMOR weights (nm_*) offer `repack` to values, index (scale, minimum, left, right), and `values`, `codes`,
`columns`, `wrapper`, which read those back in plain torch: differentiable in floating-point values, so one can train through any layout.

input_major and row_major, of kernels that skip channels, offer `weight`, the dense value, in place of rows for gathers.
"""

from __future__ import annotations

from types import ModuleType

from effllm.errors import KernelError, nearest
from effllm.runtime.layouts import input_major, nm_plain, nm_rows, nm_semi, nm_tiles, nm_words, planes, row_major, tile16, words

LAYOUTS: dict[str, ModuleType] = {
    "input_major": input_major,
    "nm_plain": nm_plain,
    "nm_rows": nm_rows,
    "nm_semi": nm_semi,
    "nm_tiles": nm_tiles,
    "nm_words": nm_words,
    "planes": planes,
    "row_major": row_major,
    "tile16": tile16,
    "words": words,
}


def get(name: str) -> ModuleType:
    """The layout module called `name`."""
    if name not in LAYOUTS:
        raise KernelError("E-KRN-LAYOUT", f"unknown weight layout {name!r}", nearest(name, LAYOUTS))
    return LAYOUTS[name]
