"""Device layouts of packed weights. Formats are canonical; a kernel family reads its own layout, made here and undone here.

Every layout module offers `repack(packed) -> dict` with the keys codes, scale and, for affine weights, minimum, and its exact
inverse `restore(tensors, shape, attrs) -> Packed`; `codes(tensors...)` decodes rows for gathers.
"""

from __future__ import annotations

from types import ModuleType

from effllm.errors import KernelError, nearest
from effllm.runtime.layouts import planes, tile16, words

LAYOUTS: dict[str, ModuleType] = {"planes": planes, "tile16": tile16, "words": words}


def get(name: str) -> ModuleType:
    """The layout module called `name`."""
    if name not in LAYOUTS:
        raise KernelError("E-KRN-LAYOUT", f"unknown weight layout {name!r}", nearest(name, LAYOUTS))
    return LAYOUTS[name]
