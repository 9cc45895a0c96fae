"""Draft models for speculative decoding, out of the model itself.

A model packed at 8 bits is its own draft: the first planes of its weights are weights of fewer bits (see runtime/formats/bipolar.py). Norms,
embedding, head and every other tensor are the model's own, not copies; the codes of the truncated linears are laid out anew for the kernels,
and that is all the memory it takes (`extra_bytes`).
"""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

from torch import Tensor, nn

from effllm import compat
from effllm.errors import OptionError
from effllm.hf.engine import vocabulary
from effllm.recipe import Recipe
from effllm.runtime.formats import parts
from effllm.runtime.packed import PackedEmbedding
from effllm.runtime.weights.base import PackedWeight

_made: weakref.WeakKeyDictionary[Any, dict[Any, tuple[list[tuple[weakref.ref[Tensor], int]], Any]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def draft_of(model: Any, draft: Any) -> Any:
    """The draft model that a `draft=` stands for: bits (int), a recipe (str), or a model. Drafts of a model are made once and kept with it.

    Raises OptionError (E-OPT-DRAFT), RecipeError for a recipe.
    """
    if not isinstance(draft, (int, str)):
        found = getattr(draft, "_orig_mod", draft)
        if vocabulary(found) != vocabulary(model):
            cause = f"the draft has {vocabulary(found)} token ids and the model {vocabulary(model)}"
            raise OptionError("E-OPT-DRAFT", cause, "use a draft with the model's tokenizer")
        return found
    with _lock:
        by_kind = _made.setdefault(model, {})
        held, made = by_kind.get(draft, ([], None))
        now = _tensors(model)
        if made is None or len(held) != len(now) or any(r() is not t or v != compat.version(t) for (r, v), t in zip(held, now, strict=True)):
            made = lowered(model, draft) if isinstance(draft, int) else compressed(model, draft)
            by_kind[draft] = ([(weakref.ref(t), compat.version(t)) for t in now], made)
        return made


def lowered(model: nn.Module, bits: int) -> Any:
    """A copy of a packed model that reads at most `bits` bits of each linear's weight; all other tensors are shared with it.

    Embedding and head stay as they are. Raises OptionError (E-OPT-DRAFT) where no weight has more bits.
    """
    if not 1 <= bits <= 8:
        raise OptionError("E-OPT-DRAFT", f"draft={bits}", "bits are 1 to 8")
    memo = _shared(model)
    kept = _ends(model)
    lower = [m for m in model.modules() if isinstance(m, PackedWeight) and id(m) not in kept and parts.precision(m.canonical().attrs) > bits]
    lower = [m for m in lower if parts.precision(m.canonical().attrs) <= 8]
    if not lower:
        cause = f"no linear of {type(model).__name__} is packed with more than {bits} bits"
        raise OptionError("E-OPT-DRAFT", cause, "pack it first, effllm.compress(model, 'w8'), or give a recipe: draft='w4'")
    for m in lower:
        memo[id(m)] = type(m)(parts.truncate(m.packed(), bits), act=m.act, dtype=m.dtype, kernel=m.wanted)
    return copy.deepcopy(model, memo)


def compressed(model: nn.Module, recipe: str) -> Any:
    """A copy of a model whose linears are packed by a recipe, data-free; what the recipe leaves alone is shared with the model.

    A head that is tied to the embedding is packed with it, as the recipe says.
    """
    from effllm.compression import compress

    Recipe.parse(recipe)
    made = copy.deepcopy(model, _shared(model))
    compress(made, recipe)
    return made


def extra_bytes(model: nn.Module, draft: nn.Module) -> int:
    """Bytes of the draft's tensors that are not the model's."""
    own = {id(t) for t in _tensors(model)}
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in _tensors(draft) if id(t) not in own}.values())


def _tensors(model: nn.Module) -> list[Tensor]:
    return [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def _shared(model: nn.Module) -> dict[int, Any]:
    """What deepcopy takes over as it is."""
    return {id(t): t for t in _tensors(model)}


def _ends(model: Any) -> set[int]:
    """Packed weights of the embedding and of the head."""
    head = model.get_output_embeddings()
    ends = [m for m in model.modules() if isinstance(m, PackedEmbedding)] + ([] if head is None else [head])
    return {id(m) for end in ends for m in end.modules() if isinstance(m, PackedWeight)}
