"""What a packed model says about itself: the recipe that it was made with, and a Decision for every packed module."""

from __future__ import annotations

from collections import Counter

from torch import nn

from effllm.report import Decision, PassReport
from effllm.runtime.packed import PackedEmbedding, PackedLinear, packed_weights

_ATTRIBUTE = "_effllm_recipe"  # on the root module: a string, which deepcopy and moves keep


def record(model: nn.Module, recipe: str | None) -> None:
    """Note the recipe on a packed model; None notes nothing."""
    if recipe is not None:
        setattr(model, _ATTRIBUTE, recipe)


def recorded(model: nn.Module) -> str | None:
    """The noted recipe, None where there is none (a model that was put together by hand, or an older checkpoint)."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, str) else None


def recipe_of(model: nn.Module) -> str:
    """The noted recipe, or else the commonest precision of the packed weights, by their count of numbers ("w4a8")."""
    name = recorded(model)
    if name is not None:
        return name
    sizes: Counter[str] = Counter()
    for weight in packed_weights(model).values():
        sizes[weight.label] += weight.shape[0] * weight.shape[1]
    return sizes.most_common(1)[0][0] if sizes else "dense"


def lowered(recipe: str | None, bits: object) -> str | None:
    """The name of a recipe whose weights were read at fewer bits."""
    if recipe is None or bits is None:
        return recipe
    return f"{recipe} at {bits} bits" if isinstance(bits, int) else f"{recipe} at fewer bits"


def decisions(model: nn.Module) -> PassReport:
    """One Decision per module that owns a packed weight; a tied weight's bytes count once."""
    report, seen = PassReport("packed"), set[int]()
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            w = module.weight
            tied = id(w) in seen
            seen.add(id(w))
            before, after = (0, 0) if tied else (w.shape[0] * w.shape[1] * w.dtype.itemsize, w.nbytes)
            code, reason = ("tied", "shares its tied weight") if tied else ("packed", w.why)
            report.decisions.append(Decision(name, name, "applied", code, reason, before, after, kernel=w.kernel, config=w.config))
    return report
