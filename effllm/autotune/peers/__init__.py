"""Kernels of other libraries, as candidates of the kernel benchmark. Nothing of a peer is imported before it is asked for.

A further peer is a class in a file of this folder and an entry in `modules`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from effllm.autotune.peers.base import Peer
from effllm.errors import OptionError, nearest

# module -> its peers, by name; the modules themselves import no library
MODULES: dict[str, tuple[str, ...]] = {
    "dense": ("torch-bf16", "torch-fp32"),
    "torchao": ("torchao-int8", "torchao-int4", "torchao-int8-dyn"),
    "bitsandbytes": ("bitsandbytes-int8", "bitsandbytes-nf4"),
    "ggml": ("llama.cpp-q8_0", "llama.cpp-q4_0"),
    "gemlite": ("gemlite-w8a16", "gemlite-w4a16"),
}
NAMES: tuple[str, ...] = tuple(name for names in MODULES.values() for name in names)


def get(name: str) -> Peer:
    """A peer by name. Raises OptionError (E-OPT-PEER) with the nearest name."""
    for module, names in MODULES.items():
        if name in names:
            found: dict[str, Peer] = {p.name: p for p in importlib.import_module(f"effllm.autotune.peers.{module}").PEERS}
            return found[name]
    raise OptionError("E-OPT-PEER", f"unknown peer {name!r}", nearest(name, (*NAMES, "all", "none")))


def chosen(names: Sequence[str]) -> list[Peer]:
    """The peers of `--peers`: "all", "none" (torch stays: it is what a rewrite must beat), or names beside torch."""
    wanted = NAMES if "all" in names else tuple(dict.fromkeys((*MODULES["dense"], *(n for n in names if n != "none"))))
    return [get(name) for name in wanted]
