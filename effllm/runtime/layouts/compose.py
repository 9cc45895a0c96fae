"""Composed weights (formats/parts.py) as the flat tensors that ops take, and back.

A dense part "a" is one tensor `a`; a bipolar part becomes `a_codes`, `a_scale` and, for affine grids, `a_minimum` in the layout that
the kernel reads; a bipolar weight by itself has no prefix. Tensors that belong to no part keep their names, dots written as underscores.
"""

from __future__ import annotations

from torch import Tensor

from effllm.runtime import layouts
from effllm.runtime.formats import bipolar, dense, parts
from effllm.runtime.formats.base import Packed

_CODED = ("codes", "scale", "minimum")


def arrange(packed: Packed, layout: str) -> dict[str, Tensor]:
    """The tensors of a weight in a kernel's layout."""
    if packed.format == bipolar.name:
        return layouts.get(layout).repack(packed)  # type: ignore[no-any-return]
    out = {}
    for key in parts.names(packed):
        p = parts.part(packed, key)
        if p.format == dense.name:
            out[key] = p.tensors["values"]
        else:
            out |= {f"{key}_{name}": t for name, t in arrange(p, layout).items()}
    return out | {flat: packed.tensors[name] for name, flat in _loose(packed).items()}


def restore(like: Packed, tensors: dict[str, Tensor], layout: str) -> Packed:
    """The inverse of `arrange`; `like` is the weight on the meta device."""
    if like.format == bipolar.name:
        return layouts.get(layout).restore(tensors, like.shape, like.attrs)  # type: ignore[no-any-return]
    back: dict[str, Tensor] = {}
    for key in parts.names(like):
        p = parts.part(like, key)
        if p.format == dense.name:
            back[f"{key}.values"] = tensors[key]
        else:
            own = {name: tensors[f"{key}_{name}"] for name in _CODED if f"{key}_{name}" in tensors}
            back |= {f"{key}.{name}": t for name, t in restore(p, own, layout).tensors.items()}
    back |= {name: tensors[flat] for name, flat in _loose(like).items()}
    return Packed(like.format, like.version, like.shape, {name: back[name] for name in like.tensors}, dict(like.attrs))


def _loose(packed: Packed) -> dict[str, str]:
    """Tensors of no part: stored name -> flat name."""
    held = parts.names(packed)
    return {name: name.replace(".", "_") for name in packed.tensors if name.partition(".")[0] not in held}
