"""The forms of `config.mpoe` with fewer experts. Where experts differ in size, layers keep different ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..experts.matrixwise import by_expert
from ..runtime.shapes import modeling


def small_forms(
    block: Mapping[str, Any], kept: Mapping[str, Sequence[int]], experts: int, always: Sequence[int]
) -> dict[str, Any]:
    """`forms` and `ffns` of a block with fewer experts.

    Args:
        block: `config.mpoe` of the larger artifact, of which these two keys are read.
        kept: by the paths of layers, the routed experts that stay. Layers without weights here are not in it.
        experts: how many routed experts stay.
        always: the shared experts, which all stay, behind the others.
    """
    forms: list[dict] = []
    ffns = {}
    for path, number in block["ffns"].items():
        form = _cut_form(block["forms"][number], (*kept.get(path, range(experts)), *always))
        if form not in forms:
            forms.append(form)
        ffns[path] = forms.index(form)
    return {"forms": forms, "ffns": ffns}


def _cut_form(form: dict, kept: Sequence[int]) -> dict:
    cut = {}
    for key, spec in form.items():
        if isinstance(spec, list):  # widths of adapters
            widths = [spec[expert] for expert in kept]
            cut[key] = widths if len({*widths}) > 1 else widths[0]
        elif isinstance(spec, dict):
            cut[key] = spec | {"terms": [_cut_term(term, kept) for term in spec["terms"]]}
        else:
            cut[key] = spec
    return cut


def _cut_term(term: dict, kept: Sequence[int]) -> dict:
    """A term of these experts: the largest one's, and in what they differ."""
    if "by_expert" not in term:
        return term
    each = [modeling().term_of(term, expert) for expert in kept]
    each = [{key: value for key, value in own.items() if key != "by_expert"} for own in each]
    return by_expert(max(each, key=lambda own: sum(modeling().Layout.of(own).sizes)), each)


def vector_sizes(form: dict, num_experts: int) -> dict[str, list[int]]:
    """{name below a mixture's path: every expert's numbers} of tensors with one expert after the other.

    Args:
        form: one of the block's.
        num_experts: in the mixture, with those that are shared.
    """
    found = {}
    for key, spec in form.items():
        if isinstance(spec, list):
            sizes = [modeling().hidden_size_of(form) * width for width in spec]
            found |= {f"{key}.{name}": sizes for name in ("aux_0", "aux_1")}
        for number, term in enumerate(spec["terms"] if isinstance(spec, dict) else ()):
            chain = modeling().Chain(term, num_experts)
            for k, name in enumerate(chain.core_names):
                if chain.apart[k]:
                    sizes = [rows * cols for rows, cols in chain.layer_shapes(k).values()]
                    found[f"{key}.terms.{number}.{name}"] = sizes
    return found
