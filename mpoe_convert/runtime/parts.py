"""Parts of an expert: projections (sums of chains), and adapters behind the FFN."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chains import Chain, MatrixCache, Picks
from .header import init


class Projection(nn.Module):
    """y = sum of terms + bias, for rows that each have one expert.

    `spec`: {"terms": [{"in_dims", "out_dims", "bonds", "shared"}, ...],
             "bias": "shared" | "per-expert" | None}
    """

    def __init__(self, spec: dict, num_experts: int):
        super().__init__()
        self.terms = nn.ModuleList(Chain(term, num_experts) for term in spec["terms"])
        self.is_common = [all(term["shared"]) for term in spec["terms"]]
        out_features = math.prod(spec["terms"][0]["out_dims"])
        self.bias_kind = spec["bias"]
        if self.bias_kind is None:
            self.bias = None
        else:
            size = (out_features,) if self.bias_kind == "shared" else (num_experts, out_features)
            self.bias = nn.Parameter(torch.empty(size))

    def common(self, tokens: Tensor) -> Tensor | None:
        """What terms that all experts share make of tokens (T, in): (T, out); None if there are none."""
        picks = Picks(0)
        parts = [
            term(tokens, picks) for term, shared in zip(self.terms, self.is_common, strict=True) if shared
        ]
        return sum(parts) if parts else None

    def forward(
        self,
        rows: Tensor,
        picks: Picks,
        rebuild: bool = False,
        cache: MatrixCache | None = None,
        common: Tensor | None = None,
    ) -> Tensor:
        """(N, in) -> (N, out); see `Chain`. `common`: what the shared terms make of the rows, if done."""
        y = common
        for term, shared in zip(self.terms, self.is_common, strict=True):
            if not shared or common is None:
                part = term(rows, picks, rebuild, cache)
                y = part if y is None else y + part
        if self.bias is None:
            return y
        return y + (self.bias if self.bias_kind == "shared" else self.bias[picks.experts])

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        for term in self.terms:
            term.reset_parameters(std)
        if self.bias is not None:
            init.zeros_(self.bias)


class Adapter(nn.Module):
    """One small bottleneck per expert behind an FFN that all share: y + gelu(y aux_0[e]) aux_1[e].

    PESC, arXiv 2401.02731. `aux_0` (E, H, r), `aux_1` (E, r, H).
    """

    def __init__(self, hidden_size: int, size: int, num_experts: int):
        super().__init__()
        self.hidden_size, self.size = hidden_size, size
        self.aux_0 = nn.Parameter(torch.empty(num_experts, hidden_size, size))
        self.aux_1 = nn.Parameter(torch.empty(num_experts, size, hidden_size))

    def forward(self, rows: Tensor, picks: Picks) -> Tensor:
        """(N, H) -> (N, H)."""
        inner = F.gelu(picks.right(rows.to(self.aux_0.dtype).unsqueeze(1), self.aux_0))
        return rows + picks.right(inner, self.aux_1).squeeze(1)

    @property
    def own_numbers(self) -> int:
        """Numbers that one expert has for itself."""
        return 2 * self.hidden_size * self.size

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        init.normal_(self.aux_0, std=std)
        init.zeros_(self.aux_1)
