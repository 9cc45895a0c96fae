"""LOST's trainable linear: a low-rank part and whole input channels, y = gamma a f(b x) + (1 - gamma) s x[channels].

    a (N, r), b (r, K), s (N, c), channels (c,) sorted; f is the identity, or SiLU between the factors

Without f the two parts are one product with [a, s] (N, r + c): the channels are extra columns of the second stage. Known from
reviews of the paper only, so gamma and f are options and the plain sum (gamma None) is the default.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effllm.errors import OptionError, WeightError, nearest

_BETWEEN = ("identity", "silu")


class ChannelLowRankLinear(nn.Module):
    """Linear with a low-rank part and dense columns for some input channels, all trained.

    channels: indices of input channels, each once. gamma: None for the plain sum, else the two parts' mix in [0, 1]; 1 leaves the
    low-rank part alone. Starts with b and s uniform in +-1 / sqrt(K) and a zero. Raises WeightError (E-WGT-RANK, E-WGT-SPARSE)
    and OptionError (E-OPT-LOST).
    """

    recovery_factors: ClassVar[tuple[str, ...]] = ("a", "b", "s")
    recovery_pair: ClassVar[tuple[str, str]] = ("a", "b")
    channels: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        channels: Tensor,
        *,
        gamma: float | None = None,
        between: Literal["identity", "silu"] = "identity",
        bias: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        n, k = out_features, in_features
        if not 0 < rank <= min(n, k):
            raise WeightError("E-WGT-RANK", f"rank {rank} of a {n} x {k} weight", f"give a rank of 1 to {min(n, k)}")
        if channels.dim() != 1 or len(channels.unique()) != len(channels) or (len(channels) and not (0 <= int(channels.min()) <= int(channels.max()) < k)):
            raise WeightError("E-WGT-SPARSE", f"{len(channels)} channels that are not different inputs of {k}", f"give indices of 0 to {k - 1}, each once")
        if between not in _BETWEEN:
            raise OptionError("E-OPT-LOST", f"no function {between!r} between the factors", nearest(between, _BETWEEN))
        if gamma is not None and not 0 <= gamma <= 1:
            raise OptionError("E-OPT-LOST", f"gamma={gamma}", "give a share in [0, 1], or None for the plain sum")
        self.in_features, self.out_features, self.rank, self.gamma, self.between = k, n, rank, gamma, between
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return ((torch.rand(*shape, generator=generator) * 2 - 1) * k**-0.5).to(dtype)

        self.register_buffer("channels", channels.sort().values.long())
        self.a = nn.Parameter(torch.zeros(n, rank, dtype=dtype))
        self.b = nn.Parameter(uniform(rank, k))
        self.s = nn.Parameter(uniform(n, len(channels)))
        if bias:
            self.bias = nn.Parameter(uniform(n))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_dense(
        cls, w: Tensor, rank: int, count: int, *, gamma: float | None = None, between: Literal["identity", "silu"] = "identity", bias: Tensor | None = None
    ) -> ChannelLowRankLinear:
        """Start from w (N, K): truncated SVD, and the `count` channels whose residual columns are largest.

        With the plain sum s holds the residual's columns, so these channels are exact; with gamma, as LOST has it, w's own columns.
        """
        n, k = w.shape
        u, sigma, vh = torch.linalg.svd(w.detach().double(), full_matrices=False)
        root = sigma[:rank].sqrt()
        left = w.detach().double() - (u[:, :rank] * sigma[:rank]) @ vh[:rank]
        if not 0 <= count <= k:
            raise WeightError("E-WGT-SPARSE", f"{count} channels of {k}", f"give 0 to {k}")
        channels = left.norm(dim=0).topk(count).indices.sort().values
        made = cls(k, n, rank, channels.cpu(), gamma=gamma, between=between, bias=bias is not None, dtype=w.dtype).to(w.device)
        with torch.no_grad():
            made.a.copy_(u[:, :rank] * root)
            made.b.copy_(root[:, None] * vh[:rank])
            made.s.copy_((left if gamma is None else w.detach())[:, channels])
            if bias is not None:
                made.bias.copy_(bias)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) to (..., N)."""
        low, share = F.linear(x, self.b), self.gamma
        if self.between == "silu":
            low = F.silu(low)
        picked = x.index_select(-1, self.channels).to(low.dtype)
        if share is not None:
            low, picked = low * share, picked * (1 - share)
        return F.linear(torch.cat([low, picked], -1), torch.cat([self.a, self.s], -1), self.bias)

    def dense(self) -> Tensor:
        """The weight (N, K); OptionError (E-OPT-LOST) where a function between the factors makes it no matrix."""
        if self.between != "identity":
            raise OptionError("E-OPT-LOST", f"{self.between} between the factors: there is no weight", "use between='identity'")
        share = self.gamma
        w = (self.a.detach() @ self.b.detach()) * (1.0 if share is None else share)
        w[:, self.channels] += self.s.detach() * (1.0 if share is None else 1 - share)
        return w

    def shrink(self, rank: int) -> None:
        """Keep the first ranks only."""
        if not 0 < rank <= self.rank:
            raise WeightError("E-WGT-RANK", f"rank {rank} out of {self.rank}", f"give 1 to {self.rank}")
        self.a = nn.Parameter(self.a.detach()[:, :rank].clone(), self.a.requires_grad)
        self.b = nn.Parameter(self.b.detach()[:rank].clone(), self.b.requires_grad)
        self.rank = rank

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"{self.out_features}x{self.in_features}, rank={self.rank}, channels={len(self.channels)}, gamma={self.gamma}"
