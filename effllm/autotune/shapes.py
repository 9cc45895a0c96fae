"""Layer shapes of real models, as data: the problems that benchmarks and tuning are about.

Sources: the published config.json of each model; the tests check the shapes against the published parameter counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from effllm.errors import OptionError, nearest


@dataclass(frozen=True)
class Architecture:
    """The sizes of a Llama-like decoder. `tied`: head and embedding are one weight; `qk_norm`: norms on query and key heads."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    blocks: int
    tied: bool
    qk_norm: bool = False

    def layers(self) -> dict[str, tuple[int, int]]:
        """Linear layer -> (out features N, in features K). `qkv` and `gate_up` are what merging makes of their parts."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q": (q, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, q),
            "gate": (self.intermediate, self.hidden),
            "up": (self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "qkv": (q + 2 * kv, self.hidden),
            "gate_up": (2 * self.intermediate, self.hidden),
            "head": (self.vocabulary, self.hidden),
        }


MODELS: dict[str, Architecture] = {
    "SmolLM2-135M": Architecture(576, 1536, 9, 3, 64, 49152, 30, tied=True),
    "Llama-3.2-1B": Architecture(2048, 8192, 32, 8, 64, 128256, 16, tied=True),
    "Llama-3-8B": Architecture(4096, 14336, 32, 8, 128, 128256, 32, tied=False),
    "Qwen3-4B": Architecture(2560, 9728, 32, 8, 128, 151936, 36, tied=True, qk_norm=True),
    "Mistral-7B": Architecture(4096, 14336, 32, 8, 128, 32000, 32, tied=False),  # v0.1; v0.3 has 32768 tokens
}


@dataclass(frozen=True)
class Site:
    """One distinct weight shape of a model, and the layers that have it."""

    model: str
    layers: tuple[str, ...]
    n: int
    k: int

    @property
    def is_head(self) -> bool:
        """Whether only the last token of a prompt meets this weight."""
        return self.layers == ("head",)


def find(name: str) -> tuple[str, Architecture]:
    """A model by name, in any case. Raises OptionError (E-OPT-SHAPES) with the nearest name."""
    for known, architecture in MODELS.items():
        if known.lower() == name.lower():
            return known, architecture
    raise OptionError("E-OPT-SHAPES", f"no layer shapes of a model {name!r}", nearest(name, MODELS))


def sites(name: str) -> list[Site]:
    """The distinct shapes of a model, in the order of its layers. Raises OptionError (E-OPT-SHAPES)."""
    known, architecture = find(name)
    by_shape: dict[tuple[int, int], list[str]] = {}
    for layer, shape in architecture.layers().items():
        by_shape.setdefault(shape, []).append(layer)
    return [Site(known, tuple(layers), n, k) for (n, k), layers in by_shape.items()]
