"""Packs the demo model with calibration in a process of its own, while this one compiles other variants: both are bound to one core.

    python -m effllm.hf.background RECIPE WINDOWS OUT        # what `Packing` runs
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from effllm.errors import EffllmError

_TAIL = 2000  # characters of a failed process's output that the error shows


class Packing:
    """The demo model on its way to `recipe`, calibrated on so many windows of 512 tokens. `model` waits for it."""

    def __init__(self, recipe: str, windows: int) -> None:
        self.recipe = recipe
        self._place = tempfile.TemporaryDirectory(prefix="effllm-")
        command = [sys.executable, "-m", "effllm.hf.background", recipe, str(windows), str(self._out)]
        # one thread: a second one would spin on the core that the compiler needs
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)

    @property
    def _out(self) -> Path:
        return Path(self._place.name) / "packed"

    def model(self) -> Any:
        """The packed model. Raises EffllmError (E-DEM-PACK) where the process failed."""
        from effllm.runtime.checkpoint import load

        output, _ = self._process.communicate()
        try:
            if self._process.returncode:
                cause = f"packing the demo model as {self.recipe} failed:\n{output[-_TAIL:]}"
                raise EffllmError("E-DEM-PACK", cause, "run `effllm compress demo OUT --recipe " + self.recipe + "` to see it alone")
            return load(self._out)
        finally:
            self._place.cleanup()

    def close(self) -> None:
        """End the process if it still runs, and remove what it wrote."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._place.cleanup()


def pack(recipe: str, windows: int, out: Path) -> None:
    """Compress the demo model with calibration and save it, in bf16. Calibrated in fp32 where the processor has no products of 16 bits."""
    from effllm import compat
    from effllm.compression import compress
    from effllm.hf import models, texts
    from effllm.runtime.checkpoint import save

    model, tokenizer = models.resolve("demo")
    dtype = model.dtype
    model = model.float() if compat.slow_model(model) else model
    compress(model, recipe, calibration=texts.windows(tokenizer, texts.calibration_text().text, 512, windows))
    save(model.to(dtype), out)


if __name__ == "__main__":
    pack(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
