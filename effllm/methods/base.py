"""The contract of a method's parameters, and the checks that they share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from effllm.errors import RecipeError, nearest
from effllm.runtime.formats.bipolar import CHANNEL, GROUPS


@dataclass(frozen=True)
class Method:
    """Parameters of one rule of a recipe; equal parameters on equal weights and data give equal packed weights.

    `names` are the recipe's words for it.
    """

    names: ClassVar[tuple[str, ...]] = ()
    @property
    def act(self) -> str:
        """Precision of the activations."""
        return "a16"

    @property
    def calibrates(self) -> bool:
        """Whether calibration data change the result."""
        return True

    @property
    def requires_calibration(self) -> bool:
        """Whether there is no solution without calibration data."""
        return False

    @property
    def method(self) -> str:
        """The recipe's word."""
        return self.names[0]

    @property
    def aims_at_dense(self) -> bool:
        """Whether calibration is to collect the dense model's inputs too, so that the solver can undo the drift of the layers before."""
        return False

    @property
    def reads_dense(self) -> bool:
        """Whether statistics are to be those of the dense model; else each layer sees what the packed ones before it give."""
        return False

    @property
    def needs_model(self) -> bool:
        """Whether the whole dense model is looked at before the first layer is packed."""
        return False

    @property
    def label(self) -> str:
        """A few words for a table."""
        return self.method

    @classmethod
    def settings(cls) -> tuple[str, ...]:
        """What a recipe may set."""
        return tuple(f.name for f in fields(cls) if f.name != "name")

    def to_dict(self) -> dict[str, Any]:
        """What a recipe would set; `of` reads it back."""
        return {key: value for key in self.settings() if (value := getattr(self, key)) is not None}

    @classmethod
    def of(cls, name: str, values: Mapping[str, Any]) -> Self:
        """Checked parameters from a recipe's keys. Raises RecipeError."""
        for key in values:
            if key not in cls.settings():
                raise RecipeError("E-RCP-KEY", f"unknown {name} key {key!r}", nearest(str(key), cls.settings()))
        made = cls(**cls.prepare(name, values))
        made.check()
        return made

    @classmethod
    def prepare(cls, name: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Constructor arguments from a recipe's word and keys."""
        return dict(values)

    def check(self) -> None:
        """Raise RecipeError where a value is out of range."""

    def resolved(self, attrs: Mapping[str, Any]) -> Self:
        """The parameters with what the solver left open settled as in the `attrs` of a packed weight: graphs fix which tensors exist."""
        return self

    def stored_as(self) -> Self:
        """The same parameters without what does not change the stored numbers: two uses of one weight may share a pack."""
        return self


def whole(key: str, value: Any, low: int, high: int) -> None:
    """Raise RecipeError (E-RCP-VALUE) unless `value` is a whole number in the range."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RecipeError("E-RCP-VALUE", f"{key}={value!r}", f"{key} is a whole number from {low} to {high}")


def share(key: str, value: Any, *, one: bool = True) -> None:
    """Raise RecipeError (E-RCP-VALUE) unless `value` is a number above 0 and at most (one=False: below) 1."""
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1 and (one or value < 1)
    if not fits:
        raise RecipeError("E-RCP-VALUE", f"{key}={value!r}", f"{key} is a number above 0 and {'at most' if one else 'below'} 1")


def one_of(key: str, value: Any, valid: Iterable[str]) -> None:
    """Raise RecipeError (E-RCP-VALUE) unless `value` is one of the words."""
    if value not in tuple(valid):
        raise RecipeError("E-RCP-VALUE", f"{key}={value!r}", nearest(str(value), tuple(valid)))


def bits(value: Any, key: str = "bits") -> None:
    """Raise RecipeError (E-RCP-BITS) unless `value` is a precision of the bipolar format."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 8:
        raise RecipeError("E-RCP-BITS", f"{key}={value!r}", "bits is a whole number from 1 to 8")


def stored_bits(value: Any) -> None:
    """Like `bits`, or 16 for values that stay floating point."""
    if value != 16 or isinstance(value, bool):
        try:
            bits(value)
        except RecipeError:
            raise RecipeError("E-RCP-BITS", f"bits={value!r}", "bits is a whole number from 1 to 8, or 16 for floating-point values") from None


def group(value: Any) -> None:
    """Raise RecipeError (E-RCP-GROUP) unless `value` is a group size of the bipolar format."""
    if isinstance(value, bool) or value not in (CHANNEL, *GROUPS):
        raise RecipeError("E-RCP-GROUP", f"group={value!r}", f"group is one of {GROUPS}, or 'channel'")


def channel(values: Mapping[str, Any]) -> dict[str, Any]:
    """The group size "channel" as its number."""
    return dict(values) | ({"group": CHANNEL} if values.get("group") == "channel" else {})
