"""What a model holds: packed weights, other tensors, and which names share a tensor."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from effllm.errors import CheckpointError
from effllm.runtime.activated import ThresholdedActivation
from effllm.runtime.packed import PackedEmbedding, PackedLinear, PackedWeight
from effllm.runtime.shards import CODES, Spec, Unit


class Inventory:
    """The tensors of `model` by name, each once. `units` produce them; `tables` are the parts of the header that explain them."""

    def __init__(self, model: nn.Module) -> None:
        self.units: list[Unit] = []
        self.modules: dict[str, dict[str, Any]] = {}
        self.weights: dict[str, dict[str, Any]] = {}
        self.plain: dict[str, str] = {}
        self.ties: dict[str, str] = {}
        self.gates: dict[str, dict[str, Any]] = {
            name: {"limit": m.limit, "size": m.threshold.numel(), **m.about}
            for name, m in model.named_modules(remove_duplicate=False)
            if isinstance(m, ThresholdedActivation)
        }
        packed = {name: m for name, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedWeight)}
        self._packed(model, packed)
        self._plain(model, set(packed))

    def tables(self) -> dict[str, Any]:
        """modules, weights, plain, ties and gates of the header."""
        tables = {"modules": self.modules, "weights": self.weights, "plain": self.plain, "ties": self.ties}
        return tables | ({"gates": self.gates} if self.gates else {})

    def _packed(self, model: nn.Module, packed: dict[str, PackedWeight]) -> None:
        first: dict[int, str] = {}
        for name, weight in packed.items():
            if id(weight) not in first:
                first[id(weight)] = name
                self._weight(name, weight)
        covered = set()
        for name, module in model.named_modules(remove_duplicate=False):
            if not isinstance(module, PackedLinear | PackedEmbedding):
                continue
            embedding = isinstance(module, PackedEmbedding)
            padding = module.padding_idx if isinstance(module, PackedEmbedding) else None
            self.modules[name] = {"kind": "embedding" if embedding else "linear", "weight": first[id(module.weight)], "padding_idx": padding}
            covered.add(f"{name}.weight")
        loose = sorted(packed.keys() - covered)
        if loose:
            raise CheckpointError("E-CKP-MODULE", f"{loose[0]} is a packed weight outside of PackedLinear and PackedEmbedding", "wrap it in one of these")

    def _weight(self, name: str, weight: PackedWeight) -> None:
        like = weight.canonical()
        specs = [Spec(f"{name}.{key}", t.dtype, tuple(t.shape), sliced=key.rpartition(".")[2] == "planes") for key, t in like.tensors.items()]
        for t in weight.tensors().values():
            _must_have_data(name, t)

        def make() -> dict[str, Tensor]:
            return {f"{name}.{key}": t for key, t in weight.packed().tensors.items()}

        self.units.append(Unit(tuple(specs), make))
        canonical = {"format": like.format, "version": like.version, "shape": list(weight.shape), "attrs": dict(weight.attrs)}
        self.weights[name] = canonical | {"act": weight.act, "dtype": str(weight.dtype).removeprefix("torch."), "tensors": list(like.tensors)}

    def _plain(self, model: nn.Module, packed: set[str]) -> None:
        persistent = set(model.state_dict(keep_vars=True))
        named: list[tuple[str, Tensor, str]] = [(n, p, "parameter") for n, p in model.named_parameters(remove_duplicate=False)]
        named += [(n, b, "buffer" if n in persistent else "temporary") for n, b in model.named_buffers(remove_duplicate=False)]
        first: dict[int, str] = {}
        for name, t, role in named:
            if name.rpartition(".")[0] in packed:
                continue
            self.plain[name] = role
            if id(t) in first:
                self.ties[name] = first[id(t)]
                continue
            first[id(t)] = name
            _must_have_data(name, t)
            if t.dtype not in CODES:
                raise CheckpointError("E-CKP-WRITE", f"{name} has the dtype {t.dtype}", f"convert it to one of {', '.join(CODES.values())}")
            self.units.append(Unit((Spec(name, t.dtype, tuple(t.shape)),), partial(_named, name, t)))


def _named(name: str, t: Tensor) -> dict[str, Tensor]:
    return {name: t.detach()}


def _must_have_data(name: str, t: Tensor) -> None:
    if t.is_meta:
        raise CheckpointError("E-CKP-WRITE", f"{name} is on the meta device and has no data", "load the model's weights first")
