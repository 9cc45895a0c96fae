"""How long to tune: seconds from "120", "120s", "2m" or a number."""

from __future__ import annotations

import math
import re

from effllm.errors import OptionError

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_STEP = 'give seconds or minutes, such as 120, "120s" or "2m"'


def parse_budget(value: object) -> float:
    """Seconds of a budget. Raises OptionError (E-OPT-BUDGET) for anything but a positive, finite time."""
    found = float("nan")
    if isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value)
    elif isinstance(value, str):
        matched = re.fullmatch(r"\s*(-?\d+(?:\.\d*)?)\s*([a-z]*)\s*", value.lower())
        if matched and matched[2] in _UNITS:
            found = float(matched[1]) * _UNITS[matched[2]]
    if math.isnan(found):
        raise OptionError("E-OPT-BUDGET", f"{value!r} is no budget", _STEP)
    if not 0 < found < math.inf:
        raise OptionError("E-OPT-BUDGET", f"a budget of {value} leaves no time to measure anything" if found <= 0 else "a budget without end", _STEP)
    return found
