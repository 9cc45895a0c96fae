"""What the command line works on: MODEL, and the dense model that it is compared to. All options are checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from effllm.errors import OptionError
from effllm.hf import models
from effllm.runtime.recorded import recipe_of

ALONE = "no dense model to compare to: give --reference MODEL for KL and top-1 agreement"


@dataclass
class Subject:
    """A loaded checkpoint. `reference` is the dense model beside it, None without --reference."""

    model: Any
    tokenizer: Any
    reference: Any

    @property
    def recipe(self) -> str:
        """The recipe that the checkpoint was made with, and the bits that it was read at."""
        return recipe_of(self.model)


def refuse_packed(model: str) -> None:
    """Raise OptionError (E-OPT-PACKED) where MODEL cannot be packed because it is."""
    if models.is_packed(model):
        step = "give the dense model's directory, or lower the checkpoint as it is with --bits of eval and bench or effllm.load(directory, bits=...)"
        raise OptionError("E-OPT-PACKED", f"{model!r} is packed already", step)


def check_options(
    model: str, reference: str | None, recipes: Sequence[str] | None = None, baselines: Sequence[str] | None = None, calibrate: object = None
) -> None:
    """Raise OptionError where options do not go with this kind of MODEL.

    A checkpoint without --reference has no dense weights, so it goes with no recipe, no baseline and no calibration.
    """
    if not models.is_packed(model):
        if reference is not None:
            raise OptionError("E-OPT-REFERENCE", f"{model!r} is dense and its own reference", "leave --reference out, or give a checkpoint as MODEL")
        return
    if reference is not None and models.is_packed(reference):
        raise OptionError("E-OPT-REFERENCE", f"the reference {reference!r} is packed", "give the directory of the dense model, or the word demo")
    if reference is None:
        named = {"--recipe": recipes, "--baseline": baselines, "--calibrate": calibrate}
        for option, value in named.items():
            if value:
                code = "E-OPT-BASELINE" if option == "--baseline" else "E-OPT-PACKED"
                step = f"add --reference MODEL, the dense model, or leave {option} out"
                raise OptionError(code, f"{option} needs dense weights, and {model!r} is packed already", step)


def load(model: str, bits: int | None, reference: str | None) -> Subject:
    """Load a checkpoint and its reference; the tokenizer is the checkpoint's, or else the reference's.

    Raises OptionError (E-OPT-REFERENCE) where the two have different vocabularies.
    """
    packed, tokenizer = models.resolve(model, bits=bits)
    if reference is None:
        return Subject(packed, tokenizer, None)
    dense, other = models.resolve(reference)
    sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (packed, dense)]
    if sizes[0] != sizes[1]:
        cause = f"{model!r} has {sizes[0]} tokens, the reference {reference!r} has {sizes[1]}"
        raise OptionError("E-OPT-REFERENCE", cause, "give the model that the checkpoint was made from")
    return Subject(packed, other if tokenizer is None else tokenizer, dense)
