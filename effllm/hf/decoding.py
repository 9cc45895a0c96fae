"""`effllm.generate` and `effllm.stream`: text or token ids in, what follows them out.

    texts = effllm.generate(model, ["first prompt", "a second, longer one"], tokenizer=tok, max_new_tokens=64)
    [ids] = effllm.generate(model, [prompt], compile=True, max_new_tokens=512)                 # one prompt, as fast as it goes
    [ids] = effllm.generate(model, [prompt], compile=True, draft=4)                            # drafted by the same weights at 4 bits
    for event in effllm.stream(model, prompts, max_new_tokens=64): ...

Each prompt gets what transformers' `generate` would return for it alone: the same tokens under greedy decoding, up to ties that the
order of floating-point sums decides. Three loops do it; the settings say which:

* neither `compile` nor `draft`: **arena** (hf/arena_decoding.py), for many prompts of any lengths. Prompts are packed into bins without padding,
  and a step is one forward over the last tokens of all sequences that still run. Nothing is compiled, nothing is allocated that is not used.
* `compile`: **static** (hf/static_decoding.py), for one prompt or a few. Caches have a fixed capacity, and the step is compiled once
  per (number of prompts, capacity), which takes seconds; later calls share the graphs.
* `draft`: **speculative** (hf/speculative.py), one prompt after the other, on static caches, compiled or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

from torch import Tensor

from effllm.errors import OptionError
from effllm.hf.arena_decoding import ArenaLoop
from effllm.hf.request import Event, Request
from effllm.hf.speculative import SpeculativeLoop, Statistics
from effllm.hf.static_decoding import StaticLoop
from effllm.hf.steps import Compiled
from effllm.runtime.speculation.settings import Speculation

Prompt = str | Tensor | Sequence[int]


@overload
def generate(model: Any, prompts: Sequence[str], **settings: Any) -> list[str]: ...
@overload
def generate(model: Any, prompts: Tensor | Sequence[Tensor] | Sequence[Sequence[int]], **settings: Any) -> list[Tensor]: ...
def generate(model: Any, prompts: Any, **settings: Any) -> Any:
    """Continue every prompt; in their order, the texts that follow (for texts) or the ids of prompt and continuation (1-D, for ids).

    `model` is a causal LM of transformers: dense, packed by `effllm.compress`, or wrapped by torch.compile. `settings` are those of
    `stream`. Raises what `stream` raises.
    """
    request, loop = _prepare(model, prompts, **settings)
    for _ in loop.events():
        pass
    return request.texts() if request.from_text else [s.whole() for s in request.sequences]


def stream(model: Any, prompts: Any, **settings: Any) -> Iterator[Event]:
    """Tokens as they come, of all prompts interleaved; the model is as before whenever the caller stops listening.

    Settings: `max_new_tokens` (20), `temperature` (0: greedy), `top_k`, `top_p`, `repetition_penalty`, `seed` (one, or one per prompt),
    `stop` (texts, with a tokenizer), `eos_token_id` (default: the model's), `tokenizer`, `capacity` (tokens of a prefill forward),
    `attention_mask` (B, S): which tokens of prompts (B, S) are no padding, on either side; padding is left out of the ids that come back.
    `cache`: a cache format such as "kivi(bits=4)", or a function that makes an empty transformers cache. Each sequence then has one of its own:
    prompts are read exactly, packed together as ever, and each goes into its cache when it is complete; decoding is one forward per sequence.
    A sequence also ends, with "length", where the model's positions end.

    `compile`: True, a recipe for weights that are still dense, or a dict: `recipe`, `prefill` (compile prompts, too), `capacity` (tokens of the
    static cache), and options of the backend; see hf/steps.py. `draft`: a smaller causal LM of the same vocabulary; a number of bits: the
    model's own packed weights read at that precision; or a recipe: a compressed copy of the model. `speculative`: "chain(tokens=4)",
    "chain(tokens=8, stop=0.4)", "constant(branching=2x2x1)", "beam(width=3, depth=3)" or a Speculation. Draws are then distributed as without a
    draft, but are not the same draws; greedy tokens are the same. `statistics`: a Statistics object, filled with what was drafted and kept.

    Raises PromptError (E-PRM-*) and OptionError (E-OPT-*) before the first forward.
    """
    return _prepare(model, prompts, **settings)[1].events()


def _prepare(
    model: Any, prompts: Any, *, capacity: int | None = None, cache: str | Callable[[], Any] | None = None, compile: Any = None, draft: Any = None,
    speculative: Speculation | str | int | None = None, statistics: Statistics | None = None, **settings: Any,
) -> tuple[Request, ArenaLoop | StaticLoop | SpeculativeLoop]:  # fmt: skip
    """The request and the loop that its settings ask for."""
    compiled = Compiled.parse(compile)
    if draft is None and (speculative is not None or statistics is not None):
        raise OptionError("E-OPT-DRAFT", "speculative= without draft=", "pass draft=, such as draft=4 for a model packed at 8 bits")
    arena = compiled is None and draft is None
    for name, value in (("cache", cache), ("capacity", capacity)):
        if value is not None and not arena:
            step = "leave it out; compile={'capacity': ...} sets the tokens of a static cache" if name == "capacity" else "leave compile= and draft= out"
            raise OptionError("E-OPT-STATIC", f"{name}= does not go with compile= or draft=", step)
    request = Request(model, prompts, **settings)
    if draft is not None:
        return request, SpeculativeLoop(request, compiled, draft, Speculation.parse(speculative), statistics)
    if compiled is not None:
        return request, StaticLoop(request, compiled)
    return request, ArenaLoop(request, capacity, cache)
