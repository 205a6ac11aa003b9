"""Chains of cores: contraction, which expert a row goes to, matrices that are kept, the chain itself.

A chain multiplies rows x (N, in) by a matrix (in, out) that is never stored, only its cores: core k has the
shape (l, i, o, r), left bond, input dimension, output dimension, right bond. It is stored as the matrix
(l * i, o * r), which optimizers, LoRA and kernels know; one per expert in a stack (E, l * i, o * r).

A core that carries only inputs multiplies the features of its site alike for every value p of the inputs
to its right (`L (x) I`); one that carries only outputs alike for the outputs to its left. An *untied* core
has a matrix of its own for every such value: the index p is copied, not contracted, as in a block tensor
train (BTT, arXiv 2406.06248). Its shape is (P * l, i, o, r), p slowest; stored as (P * l * i, o * r).
One at an end of a chain, with l = i = o = r = 1, is a vector that scales the inputs (or the outputs).

Where experts differ in size (HMoE, arXiv 2408.10681), so do the shapes of their cores. Such a core is one
vector, the experts' matrices one after the other, with nothing between them.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .costs import Cost, mean
from .header import init
from .linears import (
    Layers,
    as_linears,
    bytes_of,
    dtype_of,
    is_large,
    is_recorded,
    itemsize_of,
    matrix_of,
    run_by_expert,
    split_experts,
)


def merge_cores(cores: Sequence[Tensor]) -> Tensor:
    """Contract neighbouring cores into one: (..., l, i, o, r) each -> (..., l, prod i, prod o, r).

    The leading "..." is an expert axis that some cores may have and others not.
    """
    merged = cores[0]
    for core in cores[1:]:  # over the bond b between them
        merged = torch.einsum("...aIOb,...bior->...aIiOor", merged, core)  # (..., l, I, i, O, o, r)
        merged = merged.flatten(-5, -4).flatten(-3, -2)  # (..., l, I * i, O * o, r)
    return merged


def contract_chain(cores: Sequence[Tensor], copies: Sequence[int] | None = None) -> Tensor:
    """Contract a whole chain, whose outer bonds are 1: (in, out), or (E, in, out) if any core has experts.

    `copies`: per core, see `count_copies`; None: no core is untied.
    """
    if copies is None or max(copies) == 1:
        return merge_cores(cores).squeeze(-1).squeeze(-3)
    centre = next((k for k, core in enumerate(cores) if core.shape[-2] > 1), len(cores) - 1)
    merged = cores[centre]  # (..., l, I, O, r)
    for k in reversed(range(centre)):  # its inputs i stand before those to its right
        if copies[k] == 1:
            merged = merge_cores([cores[k], merged])
        else:
            untied = cores[k].unflatten(-4, (copies[k], -1)).squeeze(-2)  # (..., I, l, i, r)
            merged = _apart_left(untied, merged)
    for k in range(centre + 1, len(cores)):  # its outputs o stand behind those to its left
        if copies[k] == 1:
            merged = merge_cores([merged, cores[k]])
        else:
            untied = cores[k].unflatten(-4, (copies[k], -1)).squeeze(-3)  # (..., O, l, o, r)
            merged = _apart_right(merged, untied)
    return merged.squeeze(-1).squeeze(-3)


def _apart_left(untied: Tensor, merged: Tensor) -> Tensor:
    """(..., I, l, i, r) and (..., r, I, O, R) over r, apart for every I -> (..., l, i * I, O, R)."""
    if untied.shape[-3:] == (1, 1, 1):
        return untied.transpose(-4, -3) * merged
    if _is_plain(untied, merged):
        number, left, size, _ = untied.shape
        made = _multiply_apart(untied.flatten(1, 2), merged.transpose(0, 1).flatten(2))
        return made.reshape(left, size * number, *merged.shape[2:])
    return torch.einsum("...Ilir,...rIOR->...liIOR", untied, merged).flatten(-4, -3)


def _apart_right(merged: Tensor, untied: Tensor) -> Tensor:
    """(..., L, I, O, l) and (..., O, l, o, r) over l, apart for every O -> (..., L, I, O * o, r)."""
    if untied.shape[-3:] == (1, 1, 1):
        return merged * untied.transpose(-4, -2)
    if _is_plain(merged, untied):
        made = _multiply_apart(merged.flatten(0, 1).transpose(0, 1), untied.flatten(2))
        return made.reshape(*merged.shape[:2], -1, untied.shape[-1])
    return torch.einsum("...LIOl,...Olor->...LIOor", merged, untied).flatten(-3, -2)


def _is_plain(*cores: Tensor) -> bool:
    """Whether a product may be written in place: no expert axis, no gradient."""
    return max(core.ndim for core in cores) == 4 and not (torch.is_grad_enabled() or is_recorded())


def _multiply_apart(first: Tensor, second: Tensor) -> Tensor:
    """(P, m, k) times (P, k, n) -> (m, P, n), without a copy into that order."""
    made = first.new_empty(first.shape[1], len(first), second.shape[2])
    torch.bmm(first, second, out=made.transpose(0, 1))
    return made


def count_copies(term: dict) -> list[int]:
    """P per core of a term: how many matrices it has. 1, unless it is untied."""
    ins, outs = term["in_dims"], term["out_dims"]
    untied = term.get("untied") or [False] * len(ins)
    later = [math.prod(ins[k + 1 :]) for k in range(len(ins))]  # inputs to the right of a core
    earlier = [math.prod(outs[:k]) for k in range(len(outs))]  # outputs to its left
    return [max(i, o) if apart else 1 for i, o, apart in zip(later, earlier, untied, strict=True)]


def term_of(term: dict, expert: int) -> dict:
    """A term as one expert has it: where experts differ in size, with the dimensions of this one."""
    lists = term.get("by_expert", {})
    return term | {key: values[expert] for key, values in lists.items()}


def check_one_each(what: str, values: Sequence[Any], num_experts: int) -> None:
    """Raises ValueError: what `config.mpoe` lists by expert is not one value for each."""
    if len(values) != num_experts:
        raise ValueError(
            f"config.mpoe lists {what} of {len(values)} experts, and there are {num_experts}; expected one "
            "value for each: take config.json as it came with these weights"
        )


def chain_shapes(term: dict) -> list[tuple[int, int, int, int]]:
    """Core shapes (P * bond_left, in_dim, out_dim, bond_right) of a term, without the expert axis."""
    bonds = [1, *term["bonds"], 1]
    lefts = [copies * bond for copies, bond in zip(count_copies(term), bonds[:-1], strict=True)]
    return list(zip(lefts, term["in_dims"], term["out_dims"], bonds[1:], strict=True))


def matrix_shape(shape: tuple[int, int, int, int]) -> tuple[int, int]:
    """The shape in which a core is stored."""
    bond_left, in_dim, out_dim, bond_right = shape
    return bond_left * in_dim, out_dim * bond_right


def name_cores(term: dict) -> list[str]:
    """Parameter names of a term's cores, from left to right."""
    return [f"central_{k}" if shared else f"aux_{k}" for k, shared in enumerate(term["shared"])]


class Step(NamedTuple):
    """What a core does to rows, as a chain acts on them core after core.

    An input core takes x (N, width, inputs) and gives (N, r, inputs): one more site of the inputs is summed.
    Another takes x (N, outputs, width) and gives (N, outputs, o * r).
    """

    is_input: bool
    copies: int
    width: int  # l * i
    inputs: int  # features of the inputs that the cores behind it take
    outputs: int  # features of the outputs that the cores before it gave

    def run(self, x: Tensor, core: Any, picks: "Picks", shared: bool) -> Tensor:
        """x (N, ...) times the core, or for each row times that of its expert."""
        num_rows = x.shape[0]
        if self.is_input:
            x = x.reshape(num_rows, self.width, self.inputs)
            if self.copies > 1:
                return _multiply_untied(x.mT, core, self.copies, picks, shared).mT  # (N, r, inputs)
            if shared and self.inputs == 1:
                return multiply_right(x.mT, core).mT  # (N, r, 1)
            return multiply_left(core, x) if shared else picks.left(x, core)  # (N, r, inputs)
        x = x.reshape(num_rows, self.outputs, self.width)
        if self.copies > 1:
            return _multiply_untied(x, core, self.copies, picks, shared)
        return multiply_right(x, core) if shared else picks.right(x, core)  # (N, outputs, o * r)


class Layout(NamedTuple):
    """The cores of a chain by their shapes (P * l, i, o, r) and their numbers P of matrices, see `Chain`."""

    shapes: list[tuple[int, int, int, int]]
    copies: list[int]

    @classmethod
    def of(cls, term: dict) -> "Layout":
        """Of a term without `by_expert`."""
        return cls(chain_shapes(term), count_copies(term))

    @property
    def sizes(self) -> list[int]:
        """Numbers in each core."""
        return [math.prod(shape) for shape in self.shapes]

    def isometric_std(self, k: int, is_left: bool) -> float | None:
        """Of random numbers that make core k nearly an isometry; None: it scales features."""
        l, i, o, r = self.shapes[k]  # noqa: E741  (bond names)
        l //= self.copies[k]  # noqa: E741  (bond names)
        return None if l * i * o * r == 1 else (l * i * o if is_left else i * o * r) ** -0.5

    def steps(self) -> list[Step]:
        """What the cores do one after the other."""
        found: list[Step] = []
        inputs, outputs = math.prod(i for _, i, _, _ in self.shapes), 1
        for (left, i, o, _), copies in zip(self.shapes, self.copies, strict=True):
            is_input = inputs > 1 and o == 1
            inputs //= i
            found.append(Step(is_input, copies, left // copies * i, inputs, outputs))
            outputs *= o
        return found

    def flops_per_row(self, steps: int | None = None) -> int:
        """Operations of the first steps, see `Chain`; None: of all."""
        flops, inputs, outputs = 0, math.prod(i for _, i, _, _ in self.shapes), 1
        for shape, copies in zip(self.shapes[:steps], self.copies[:steps], strict=True):
            _, i, o, _ = shape
            inputs //= i  # a matrix (l * i, o * r) for every input and output
            if copies == 1 or math.prod(shape) > copies:
                flops += 2 * inputs * outputs * math.prod(shape) // copies
            outputs *= o
        return flops

    def rebuild_flops(self) -> int:
        """Operations to contract the matrix."""
        flops, rows, cols = 0, 1, 1
        for shape, copies in zip(self.shapes, self.copies, strict=True):
            _, i, o, _ = shape
            flops += 2 * rows * cols * math.prod(shape) // copies  # rows * cols: what is contracted so far
            rows, cols = rows * i, cols * o
        return flops - 2 * math.prod(self.shapes[0]) // self.copies[0]  # the first core costs nothing


def multiply_left(weight: Tensor | Layers, x: Tensor) -> Tensor:
    """The transpose of weight (l, q) times every x (N, l, p) -> (N, q, p)."""
    if isinstance(weight, nn.Module):
        return weight(x.mT).mT
    if torch.is_grad_enabled():  # one product over transposed copies, whose gradient is not made per row
        return weight.mT @ x
    return torch.bmm(weight.mT.expand(x.shape[0], -1, -1), x)


def multiply_right(x: Tensor, weight: Tensor | Layers) -> Tensor:
    """Every x (N, p, l) times weight (l, q) -> (N, p, q)."""
    return weight(x) if isinstance(weight, nn.Module) else x @ weight


def multiply_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """Every x (N, P, l) times the P matrices of weight (P, l, q) -> (N, P, q)."""
    if weight.shape[-2:] == (1, 1):  # numbers that scale features
        return x * weight.squeeze(-1)
    return torch.bmm(x.transpose(0, 1), weight).transpose(0, 1)


class Picks(NamedTuple):
    """Which expert's core each of N rows is multiplied by, in the form that suits their number.

    One of four:
        one expert for all rows         experts is an int
        each row with a copy of its own experts (N,); few rows
        rows sorted by expert           experts (N,) ascending, `sizes` rows for each expert
        the same, sizes on the device   experts (N,) ascending, expert e's rows end at `ends[e]`
    """

    experts: Tensor | int
    sizes: list[int] | None = None
    ends: Tensor | None = None  # (E,) int32

    @classmethod
    def of_sorted(cls, experts: Tensor, num_experts: int, on_device: bool) -> "Picks":
        """For rows that are sorted by their experts (N,)."""
        counts = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
        counts = counts.scatter_add(0, experts, torch.ones_like(experts))  # (E,)
        if on_device:
            return cls(experts, ends=counts.cumsum(0).to(torch.int32))
        return cls(experts, sizes=counts.tolist())  # one synchronisation per FFN

    def right(self, x: Tensor, weight: Tensor | Layers) -> Tensor:
        """x (N, p, l) times its expert's matrix of (E, l, q) -> (N, p, q)."""
        if isinstance(weight, nn.Module):
            return run_by_expert(weight, x, self.experts)
        if self.sizes is not None:
            return self._by_segment(x, weight, torch.matmul)
        if self.ends is not None:
            ends = self.ends * x.shape[1]
            return _multiply_groups(x.flatten(0, 1), weight, ends).unflatten(0, (-1, x.shape[1]))
        if isinstance(self.experts, int):
            return x @ weight[self.experts]
        return torch.bmm(x, weight.index_select(0, self.experts))

    def left(self, x: Tensor, weight: Tensor | Layers) -> Tensor:
        """The transpose of its expert's matrix of (E, l, q) times x (N, l, p) -> (N, q, p)."""
        if x.shape[-1] == 1 or self.ends is not None or isinstance(weight, nn.Module):
            return self.right(x.mT.contiguous(), weight).mT
        if self.sizes is not None:
            return self._by_segment(x, weight, lambda part, own: multiply_left(own, part))
        if isinstance(self.experts, int):
            return multiply_left(weight[self.experts], x)
        return torch.bmm(weight.index_select(0, self.experts).mT, x)

    def blocks(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (N, P, l) times the P matrices of its expert in (E, P, l, q) -> (N, P, q)."""
        if weight.shape[-2:] == (1, 1) and self.sizes is None:
            return x * weight.squeeze(-1)[self.experts]
        if self.sizes is not None:
            return self._by_segment(x, weight, multiply_blocks)
        if self.ends is not None:  # P * E groups: a block's rows, expert by expert
            num_rows, num_blocks, _ = x.shape
            starts = torch.arange(num_blocks, dtype=torch.int32, device=x.device) * num_rows  # (P,)
            ends = (starts.unsqueeze(-1) + self.ends).flatten()  # (P * E,)
            grouped = weight.transpose(0, 1).flatten(0, 1)  # (P * E, l, q)
            product = _multiply_groups(x.transpose(0, 1).flatten(0, 1), grouped, ends)  # (P * N, q)
            return product.unflatten(0, (num_blocks, num_rows)).transpose(0, 1)
        if isinstance(self.experts, int):
            return multiply_blocks(x, weight[self.experts])
        return (x.unsqueeze(-2) @ weight.index_select(0, self.experts)).squeeze(-2)

    def _by_segment(self, x: Tensor, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """One product per expert: its rows of x (N, ...) with what is its own in (E, ...)."""
        assert self.sizes is not None
        hit = [expert for expert, size in enumerate(self.sizes) if size] or [0]
        # With gradients unbind, not weight[e]: they are then stacked once, not added up from E full-size
        # zeros. Without them views of the experts that nothing goes to would take longer than small products.
        own = weight.unbind() if torch.is_grad_enabled() else weight
        parts = x.split([self.sizes[expert] for expert in hit])
        products = [product(part, own[expert]) for part, expert in zip(parts, hit, strict=True)]
        return products[0] if len(products) == 1 else torch.cat(products)


def run_each(x: Tensor, picks: Picks, num_experts: int, function: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Rows x (N, ...), each by what `function` makes of it for its expert, where experts differ in size.

    In a compiled graph, whose shapes cannot follow the choices, every expert runs on all rows.
    """
    if isinstance(picks.experts, int):
        return function(x, picks.experts)
    if picks.sizes is not None:
        parts = enumerate(x.split(picks.sizes))
        made = [function(part, expert) for expert, part in parts if len(part)]
        return torch.cat(made) if made else function(x, 0)
    y = function(x, 0)
    for expert in range(1, num_experts):
        is_own = (picks.experts == expert).reshape(-1, *[1] * (y.ndim - 1))
        y = torch.where(is_own, function(x, expert), y)
    return y


def _multiply_groups(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One kernel for all experts: rows (M, l), expert e's up to `ends[e]`, with (E, l, q) -> (M, q)."""
    device, dtype = rows.device.type, rows.dtype
    if torch.is_autocast_enabled(device):  # the operators below are unknown to autocast
        dtype = torch.get_autocast_dtype(device)
    rows, weight = rows.to(dtype), weight.to(dtype).contiguous()
    if _can_group(rows, weight):
        return F.grouped_mm(rows, weight, offs=ends)
    return torch.ops.transformers.grouped_mm_fallback(rows, weight, ends)


def _can_group(rows: Tensor, weight: Tensor) -> bool:
    """Whether torch's grouped product takes these: CUDA from 8.0 on; in compiled code bfloat16 only."""
    if rows.device.type != "cuda" or not hasattr(F, "grouped_mm"):  # torch has it from 2.10 on
        return False
    if torch.cuda.get_device_capability(rows.device) < (8, 0):
        return False
    aligned = all(dim * rows.itemsize % 16 == 0 for dim in weight.shape[1:])
    if torch.compiler.is_compiling():
        return aligned and rows.dtype == torch.bfloat16
    return aligned and rows.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0


class MatrixCache:
    """Experts' matrices kept between forward passes that need no gradient.

    An entry is dropped as soon as a core it was made from has changed: an optimizer's step, loading and
    `.to()` are noticed; writing through `parameter.data` is not.

    Args:
        keep: "hit": of the experts that tokens went to; "all": of every expert, from the first use on.
        limit: bytes for all matrices of this FFN; what does not fit is built each time. None: no limit.
    """

    def __init__(self, keep: str, limit: float | None = None):
        self.keep, self.limit = keep, math.inf if limit is None else limit
        # {(id of the chain, expert): (state of its cores, matrix (in, out))}
        self.entries: dict[tuple[int, int], tuple[tuple, Tensor]] = {}

    def __reduce__(self):  # copies of a model start empty
        return MatrixCache, (self.keep, self.limit)

    @property
    def nbytes(self) -> int:
        return sum(matrix.nbytes for _, matrix in self.entries.values())

    def matrix(self, chain: "Chain", cores: list[Tensor], expert: int) -> Tensor:
        """One expert's matrix (in, out), from the cache if it is there and still right."""
        if not all(isinstance(core, nn.Parameter) for core in cores):
            return chain.matrix(cores, expert)  # parametrised (PEFT): a new tensor each time
        autocast = torch.is_autocast_enabled(cores[0].device.type)
        state = (autocast, *((core.data_ptr(), core._version, core.dtype) for core in cores))
        wanted = [expert]
        if self.keep == "all" and not chain.is_common:
            wanted += [e for e in range(chain.num_experts) if e != expert]
        for e in wanted:
            key = (id(chain), e)
            if key in self.entries and self.entries[key][0] == state:
                continue
            self.entries.pop(key, None)
            size = chain.in_features * chain.out_features * cores[0].itemsize
            if self.nbytes + size > self.limit:
                break
            self.entries[key] = (state, chain.matrix(cores, e))
        kept = self.entries.get((id(chain), expert))
        return chain.matrix(cores, expert) if kept is None else kept[1]


class Chain(nn.Module):
    """One term of a projection: a chain of shared (`central_k`) and per-expert (`aux_k`) cores.

    Attributes:
        large: per core, whether it may be rounded, and is a linear layer then; where experts differ in size,
            whether that of the largest may.
        acts: the cores can act on the activations one after the other, with no matrix built: at most one
            carries input and output, those left of it only input, those right of it only output.
        is_common: all cores are shared, so that every expert has the same matrix.
        num_start, num_end: cores that all experts share at the beginning and at the end of a chain that acts,
            and that is not common: what the first make of a token is the same for all of its experts, and the
            last may work on the sum of what several experts made.
        own_features: how many numbers per row the cores before these last ones give.
        start_flops, end_flops: what these take of `flops_per_row`.
        shapes, copies: see `Layout`; where experts differ in size, of the largest.
        layouts: one, or, where experts differ in size, one per expert.
        apart: per core, whether experts differ in its size; it is then a vector, see `split_experts`.
        shared_params: parameters that are stored once.
        own_by_expert: parameters that each expert has for itself.
        flops_per_row: operations per row (2 per multiply-add), but neither the contraction of matrices nor
            scales; of experts that differ the mean, as of `rebuild_flops`.
        rebuild_flops: operations to contract one expert's matrix.
    """

    def __init__(self, term: dict, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self._differ = "by_expert" in term
        for key, values in term.get("by_expert", {}).items():
            check_one_each(key, values, num_experts)
        terms = [term_of(term, expert) for expert in range(num_experts)] if self._differ else [term]
        self.layouts = [Layout.of(own) for own in terms]
        self.steps = [layout.steps() for layout in self.layouts]
        largest = Layout.of(term)
        self.shapes, self.copies = largest.shapes, largest.copies
        self.in_features, self.out_features = math.prod(term["in_dims"]), math.prod(term["out_dims"])
        self.shared = tuple(bool(shared) for shared in term["shared"])
        self.is_common = all(self.shared)
        self.core_names = name_cores(term)
        self.acts = all(map(_acts, terms))
        if not self.acts and (self._differ or max(self.copies) > 1):
            what = "of experts that differ in size" if self._differ else "with an untied core"
            raise ValueError(f"a chain {what} has to carry its inputs left of its outputs")
        self._add_cores()
        self._count()
        self._find_ends(term, largest)

    def _add_cores(self) -> None:
        """Parameters for the cores; which experts differ in, and which are large."""
        self._stored = [  # per core, the matrix shapes of the layouts
            list(map(matrix_shape, shapes))
            for shapes in zip(*(own.shapes for own in self.layouts), strict=True)
        ]
        self.apart = [len(set(shapes)) > 1 for shapes in self._stored]
        neighbours = itertools.groupby(range(len(self._stored)), self.apart.__getitem__)
        self._groups = [(apart, list(group)) for apart, group in neighbours]  # of cores, from left to right
        cores = zip(self.core_names, self._stored, self.shared, self.apart, strict=True)
        for name, shapes, shared, apart in cores:
            if shared and apart:
                raise ValueError(
                    f"{name} is shared by experts in which it has the shapes {sorted(set(shapes))}"
                )
            numbers = (sum(rows * cols for rows, cols in shapes),)
            size = shapes[0] if shared else numbers if apart else (self.num_experts, *shapes[0])
            self.register_parameter(name, nn.Parameter(torch.empty(size)))
        whole = self.in_features * self.out_features
        self.large = [
            copies == 1 and is_large(*matrix_shape(shape), whole)
            for copies, shape in zip(self.copies, self.shapes, strict=True)
        ]

    def _count(self) -> None:
        """Parameters and operations."""
        sizes = zip(self.layouts[0].sizes, self.shared, strict=True)
        self.shared_params = sum(size for size, shared in sizes if shared)
        own = [sum(layout.sizes) - self.shared_params for layout in self.layouts]
        self.own_by_expert = tuple(own if self._differ else own * self.num_experts)
        whole = 2 * self.in_features * self.out_features
        self.flops_per_row = mean([own.flops_per_row() if self.acts else whole for own in self.layouts])
        self.rebuild_flops = mean([layout.rebuild_flops() for layout in self.layouts])

    def _find_ends(self, term: dict, largest: Layout) -> None:
        """The cores at both ends that are the same for all experts, and what they cost."""
        begins = self.acts and not self._differ and not self.is_common
        self.num_start = [*self.shared, False].index(False) if begins else 0
        self.num_end = [*self.shared[::-1], False].index(False) if begins else 0
        self.start_flops = largest.flops_per_row(self.num_start)
        self.own_features = self._features_before_end(term)
        self.end_flops = largest.flops_per_row() - largest.flops_per_row(len(self.shared) - self.num_end)

    def _features_before_end(self, term: dict) -> int:
        """How many numbers per row the cores before the last `num_end` give."""
        place = len(self.shared) - self.num_end
        bond = [1, *term["bonds"], 1][place]
        return bond * math.prod(term["in_dims"][place:]) * math.prod(term["out_dims"][:place])

    def use_linears(self) -> None:
        """Let the large cores be linear layers from now on, with random weights."""
        for k, name in enumerate(self.core_names):
            core = getattr(self, name)
            if not self.large[k] or isinstance(core, nn.Module):
                continue
            delattr(self, name)
            shapes = self.layer_shapes(k)
            self.add_module(name, as_linears(shapes, core))
            # see `matrix_of`
            self.rebuild_flops += mean([2 * rows * rows * cols for rows, cols in shapes.values()])

    def layer_shapes(self, k: int) -> dict[str, tuple[int, int]]:
        """{what follows the name of core k: (l * i, o * r)} of the matrices in it: one, or one per expert."""
        if self.shared[k]:
            return {"": self._stored[k][0]}
        shapes = self._stored[k] * (self.num_experts // len(self._stored[k]))
        return {f".{expert}": shape for expert, shape in enumerate(shapes)}

    def forward(
        self,
        rows: Tensor,
        picks: Picks,
        rebuild: bool = False,
        cache: MatrixCache | None = None,
        span: str = "whole",
    ) -> Tensor:
        """(N, in) rows -> (N, out).

        Args:
            rows: in the order that `picks` describes.
            rebuild: contract the matrices of the experts that are hit, even if the cores could act.
            cache: where contracted matrices are kept; for `picks` of one expert.
            span: "start": the first `num_start` cores alone, (N, in) -> (N, features); "rest": the others, of
                rows that these made; "end": the last `num_end` alone; "own": those before, of rows (N, in).
        """
        picks = Picks(*picks)  # what moves a module's arguments may have made a plain tuple of it
        cores = [getattr(self, name) for name in self.core_names]
        rows = rows.to(next(filter(None, map(dtype_of, cores)), rows.dtype))
        if self.acts and not (rebuild and len(cores) > 1):
            return self._act(rows, picks, cores, span)
        if self.is_common or isinstance(picks.experts, int):
            expert = picks.experts if isinstance(picks.experts, int) and not self.is_common else 0
            if cache and not any(isinstance(core, nn.Module) for core in cores):
                return rows @ cache.matrix(self, cores, expert)
            return rows @ self._contract(cores, expert, rows)
        hit = slice(None)
        if picks.sizes is not None:  # build the matrices that are needed
            hit = [e for e, size in enumerate(picks.sizes) if size] or [0]
            picks = picks._replace(sizes=[picks.sizes[e] for e in hit])
        return picks.right(rows.unsqueeze(1), self._contract(cores, hit, rows)).squeeze(1)

    def matrix(self, cores: Sequence[Tensor], expert: int, dtype: torch.dtype | None = None) -> Tensor:
        """One expert's matrix, (in, out), computed in the cores' dtype or another."""
        own = [core.to(dtype or core.dtype) for core in self.cores_of(cores, expert)]
        return contract_chain(own, self._layout_of(expert).copies)

    def cores_of(self, cores: Sequence[Tensor], expert: int) -> list[Tensor]:
        """One expert's cores (P * l, i, o, r) of those that are stored."""
        return self._shaped(cores, expert, cores[0])

    def _layout_of(self, expert: int) -> Layout:
        return self.layouts[expert if len(self.layouts) > 1 else 0]

    def _contract(
        self, cores: Sequence[Tensor | Layers], experts: int | list[int] | slice, like: Tensor
    ) -> Tensor:
        """The matrices of an index of experts: (in, out) for an integer, else (number, in, out).

        `like`: with dtype and device of what rounded cores become.
        """
        if isinstance(experts, int) or len(self.layouts) == 1:
            copies = self._layout_of(experts if isinstance(experts, int) else 0).copies
            return contract_chain(self._shaped(cores, experts, like), copies)
        hit = range(self.num_experts)[experts] if isinstance(experts, slice) else experts
        return torch.stack([self._contract(cores, expert, like) for expert in hit])

    def _shaped(
        self, cores: Sequence[Tensor | Layers], experts: int | list[int] | slice, like: Tensor
    ) -> list[Tensor]:
        """The cores (..., P * l, i, o, r) of an index of experts: an integer where they differ in size."""
        shapes = self._layout_of(experts if isinstance(experts, int) else 0).shapes
        found = []
        for k, (core, shape) in enumerate(zip(cores, shapes, strict=True)):
            if self.apart[k]:
                assert isinstance(experts, int)
                own = self._own(core, k)[experts]
                matrix = matrix_of(own, like) if isinstance(own, nn.Module) else own
                found.append(matrix.reshape(shape))
                continue
            chosen = _choose(core, slice(None) if self.shared[k] else experts, like)
            found.append(chosen.reshape(*chosen.shape[:-2], *shape))
        return found

    def _own(self, core: Tensor | Layers, k: int) -> Sequence[Tensor | nn.Module]:
        """The experts' matrices, or layers, in core k, in whose size they differ."""
        if isinstance(core, nn.ModuleList):
            return [*core]
        assert isinstance(core, Tensor)
        return split_experts(core, self._stored[k])

    def _act(self, rows: Tensor, picks: Picks, cores: list[Tensor], span: str) -> Tensor:
        """Core after core, see `Step`: rows (N, in) -> (N, out); for `span` see `forward`."""
        x = rows
        before_end = len(cores) - self.num_end
        first = {"rest": self.num_start, "end": before_end}.get(span, 0)
        end = {"start": self.num_start, "own": before_end}.get(span, len(cores))
        for apart, group in self._groups:
            if apart:
                x = self._act_apart(x, {k: self._own(cores[k], k) for k in group}, picks)
                continue
            for k in group:
                if first <= k < end:
                    x = self.steps[0][k].run(x, cores[k], picks, self.shared[k])
        return x.flatten(1)

    def _act_apart(self, x: Tensor, own: dict[int, Sequence[Tensor | nn.Module]], picks: Picks) -> Tensor:
        """x (N, ...) by neighbouring cores in whose size experts differ, {k: the experts'} -> (N, features).

        What is between such cores may have another size for every expert.
        """

        def run(part: Tensor, expert: int) -> Tensor:
            for k, matrices in own.items():
                part = self.steps[expert][k].run(part, matrices[expert], picks, True)
            return part.flatten(1)

        return run_each(x, picks, self.num_experts, run)

    # ------------------------------------------------------------------------------------- cost

    def cost(self, rows: float, experts: float, schedule: str, spared: float = 0) -> Cost:
        """Of so many rows that go to so many experts; for the schedules see `FeedForward`.

        `spared`: operations that are not done for every row, where the cores act.
        """
        cores = [getattr(self, name) for name in self.core_names]
        sizes = zip(map(bytes_of, cores), self.shared, strict=True)
        stored = sum(size if shared else size * experts / self.num_experts for size, shared in sizes)
        if self.acts and (schedule == "apply" or len(self.shapes) == 1):
            return Cost(rows * self.flops_per_row - spared, 0, stored)
        flops = rows * 2 * self.in_features * self.out_features
        built = experts * self.in_features * self.out_features * itemsize_of(cores[0])
        if schedule == "cached":
            return Cost(flops, 0, built)
        return Cost(flops, experts * self.rebuild_flops, stored + 2 * built)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Random experts: outer cores near isometries, the largest core of scale `std`."""
        largest = Layout(self.shapes, self.copies)
        sizes = [min(of_core) for of_core in zip(*(layout.sizes for layout in self.layouts), strict=True)]
        centre = sizes.index(max(sizes))
        for k, name in enumerate(self.core_names):
            core = getattr(self, name)
            if isinstance(core, nn.Module):  # initialised as the linear layers of the stock model
                continue
            layouts = self.layouts if self.apart[k] else [largest]
            isometric = [layout.isometric_std(k, k < centre) for layout in layouts]
            stds = [own if own is None or k != centre else std for own in isometric]
            if self.apart[k]:
                pairs = zip(core.split([layout.sizes[k] for layout in layouts]), stds, strict=True)
                init.copy_(core, torch.cat([_random(part, own) for part, own in pairs]))
            elif stds[0] is None:  # it scales features
                init.ones_(core)
            else:
                init.normal_(core, std=stds[0])


def _random(like: Tensor, std: float | None) -> Tensor:
    """Numbers of this standard deviation; None: ones."""
    return torch.ones_like(like) if std is None else std * torch.randn_like(like)


def _acts(term: dict) -> bool:
    """Whether the chain can act on rows, see `Chain`."""
    inputs = [k for k, i in enumerate(term["in_dims"]) if i > 1]
    outputs = [k for k, o in enumerate(term["out_dims"]) if o > 1]
    return not inputs or not outputs or inputs[-1] <= outputs[0]


def _choose(core: Tensor | Layers, experts: int | list[int] | slice, like: Tensor) -> Tensor:
    """The experts' part of a core, which may be rounded; a shared core has one part, `slice(None)`."""
    if isinstance(core, nn.ModuleList):
        if isinstance(experts, int):
            return matrix_of(core[experts], like)
        hit = range(len(core))[experts] if isinstance(experts, slice) else experts
        return torch.stack([matrix_of(core[expert], like) for expert in hit])
    return matrix_of(core, like) if isinstance(core, nn.Module) else core[experts]


def _multiply_untied(x: Tensor, core: Tensor, copies: int, picks: Picks, shared: bool) -> Tensor:
    """x (N, P, l * i) with an untied core (P * l * i, q), or (E, P * l * i, q) -> (N, P, q)."""
    core = core.unflatten(-2, (copies, x.shape[-1]))
    return multiply_blocks(x, core) if shared else picks.blocks(x, core)
