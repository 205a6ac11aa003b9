"""What adapter, core-space and low-rank have in common: experts share the dense FFN, and start as it."""

from __future__ import annotations

from typing import ClassVar

from .. import experts
from ..errors import RecipeError
from ..options import again, assigned, called, described


@described
class SharingOptions(experts.Options):
    """Options of such a kind: noise and experts that every token passes have no meaning."""

    KIND: ClassVar[str]

    noise: float = again(experts.Options, "noise", "Ignored, the experts start equal.")

    def check_together(self) -> None:
        if self.shared_experts:
            raise RecipeError(
                f"{called('shared_experts')} given with {assigned('kind', self.KIND)}, whose experts share "
                "the dense FFN: every token passes it already; expected another kind"
            )
