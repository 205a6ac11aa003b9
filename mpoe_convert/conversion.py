"""The conversion: lazy read, fit, clone, write shard by shard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from . import artifact, card, experts
from .checkpoint import Checkpoint, open_checkpoint
from .errors import CheckpointError, MpoeError, RecipeError
from .families import Source
from .planning import FFNPlan, MatrixPlan, Plan, is_buffer, plan_checkpoint
from .recipe import Recipe
from .report import MatrixReport, Report

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Router rows start small: their softmax is near uniform, yet the top k differ from token to token.
ROUTER_STD = 0.02

Progress = Callable[[str, int, int, MatrixReport | None], None]


def convert(
    recipe: Recipe,
    output: str | Path,
    *,
    overwrite: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a dense checkpoint into an artifact folder that plain transformers loads.

    Args:
        recipe: what to convert and how.
        output: the folder to write; appears whole or not at all.
        overwrite: replace an artifact of this tool that is already there.
        token: Hub token for gated or private models; by default the stored login.
        progress: called with (matrix name, FFNs done, FFNs in all, the matrix's report when done).

    Returns:
        The report that is also written as conversion_report.json.

    Raises:
        MpoeError: anything wrong with the source, the recipe or the output; nothing is left behind.
    """
    output = Path(output)
    artifact.check_output(output, overwrite)
    pick_device(recipe.device)
    checkpoint = open_checkpoint(recipe.model, revision=recipe.revision, token=token)
    plan = plan_checkpoint(recipe, checkpoint)
    source = checkpoint.folder if checkpoint.revision is None else None
    artifact.check_fit(output, source, plan.totals.stored_bytes)
    with artifact.staged(output, overwrite) as folder:
        report = _write(folder, plan, checkpoint, progress)
    return report


def pick_device(name: str) -> torch.device:
    """The torch device of a recipe; "auto" is CUDA where there is one.

    Raises:
        RecipeError: this machine has no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device.type]:
        raise RecipeError(f"device {name} is not available here; --device auto picks one that is")
    return device


def _write(folder: Path, plan: Plan, checkpoint: Checkpoint, progress: Progress | None) -> Report:
    artifact.write_companions(folder, plan, checkpoint)
    builder = _Builder(plan, checkpoint, progress)
    for file, names in plan.shards.items():
        tensors = {name: builder.take(name) for name in names}
        _save_shard(tensors, folder / file)
        del tensors
    if len(plan.shards) > 1:
        _write_index(folder, plan)
    report = Report(plan, tuple(builder.reports), card.source_license(checkpoint.folder))
    card.write(folder / artifact.CARD_FILE, report, checkpoint)
    _write_recipe(folder / artifact.RECIPE_FILE, plan.recipe)
    files = sorted({path.name for path in folder.iterdir()} | {artifact.REPORT_FILE})
    artifact.write_json(folder / artifact.REPORT_FILE, report.to_json() | {"files": files})
    return report


def _save_shard(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if "os error 28" in str(error).lower() or "no space" in str(error).lower():
            raise OSError(28, "No space left on device") from error
        raise OSError(5, f"safetensors: {error}") from error


def _write_index(folder: Path, plan: Plan) -> None:
    index = {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in plan.tensors)},
        "weight_map": {name: file for file, names in plan.shards.items() for name in names},
    }
    artifact.write_json(folder / "model.safetensors.index.json", index)


def _write_recipe(path: Path, recipe: Recipe) -> None:
    import yaml

    text = yaml.safe_dump(recipe.to_mapping(), sort_keys=False, allow_unicode=True)
    path.write_text(f"# mpoe-convert --config {path.name} -o OUT repeats this run\n{text}", encoding="utf-8")


class _Builder:
    """Makes the artifact's tensors in any order, one FFN in memory at a time."""

    def __init__(self, plan: Plan, checkpoint: Checkpoint, progress: Progress | None):
        self.plan, self.checkpoint = plan, checkpoint
        self.progress = progress or (lambda *_: None)
        self.device = pick_device(plan.recipe.device)
        self.out = {tensor.name: tensor for tensor in plan.tensors}
        self.ffns = {ffn.ffn.key: ffn for ffn in plan.ffns}
        self.ffns_done = 0
        self.pending: dict[str, Tensor] = {}
        self.reports: list[MatrixReport] = []

    def take(self, name: str) -> Tensor:
        """The named tensor; what else its FFN yields is kept until it is asked for."""
        ffn = self.out[name].ffn
        if ffn is None:
            return self._copy(name)
        if name not in self.pending:
            self.pending |= self._build(self.ffns[ffn])
        return self.pending.pop(name)

    def _copy(self, name: str) -> Tensor:
        import torch

        tensor = self.checkpoint.read(name)
        dtype = getattr(torch, self.out[name].dtype)
        if tensor.is_floating_point() and not is_buffer(name):
            check_finite(name, tensor)
            return cast(name, tensor, dtype).contiguous()
        return tensor.to(dtype).contiguous()

    def _build(self, plan: FFNPlan) -> dict[str, Tensor]:
        tensors = {}
        router = f"{plan.ffn.key}.router.weight"
        tensors[router] = _router(self.out[router].shape, self.plan.recipe.seed, router)
        for number, matrix in enumerate(plan.matrices, start=1):
            self.progress(matrix.name, self.ffns_done, len(self.ffns), None)
            with _naming(matrix.name):
                built, report = build_matrix(matrix, self.plan.recipe, self.checkpoint, self.device)
            self.reports.append(report)
            self.ffns_done += number == len(plan.matrices)
            self.progress(matrix.name, self.ffns_done, len(self.ffns), report)
            tensors |= {f"{matrix.name}.{tail}": tensor for tail, tensor in built.items()}
        for name, (shape, dtype) in plan.tensors.items():
            assert tensors[name].shape == shape and str(tensors[name].dtype) == f"torch.{dtype}", name
        return tensors


class _naming(suppress):
    """Adds the matrix name to errors from the parts that do not know it."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def __exit__(self, kind, error, traceback):
        if isinstance(error, MpoeError) and self.name not in str(error):
            raise type(error)(f"{self.name}: {error}") from error
        return False


def check_finite(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError if the tensor holds NaN or Inf."""
    if tensor.numel() and not all(bound.isfinite() for bound in tensor.aminmax()):
        bad = tensor.numel() - int(tensor.isfinite().sum())
        raise CheckpointError(
            f"{name} holds NaN or Inf in {bad} of {tensor.numel()} places; repair the source first"
        )


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite tensor in another dtype. Raises CheckpointError if a number is too large for it."""
    import torch

    if dtype != tensor.dtype and tensor.numel():
        largest = max(abs(float(bound)) for bound in tensor.aminmax())
        if largest > torch.finfo(dtype).max:
            short = str(dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{name} holds numbers up to {largest:.3g}, too large for {short}; use another --dtype"
            )
    return tensor.to(dtype)


def read_matrix(checkpoint: Checkpoint, source: Source, device: torch.device) -> Tensor:
    """The dense matrix (in, out), in the dtype of the source. Raises CheckpointError on NaN or Inf."""
    tensor = checkpoint.read(source.weight).to(device)
    check_finite(source.weight, tensor)
    if source.part is not None:
        tensor = tensor.chunk(2, dim=1 if source.transposed else 0)[source.part]
    # Contiguous: the strided copies that the decomposition would make of a transposed view are slow.
    return (tensor if source.transposed else tensor.T).contiguous()


def _read_bias(checkpoint: Checkpoint, source: Source) -> Tensor:
    tensor = checkpoint.read(source.bias)
    check_finite(source.bias, tensor)
    return tensor if source.part is None else tensor.chunk(2)[source.part]


def build_matrix(
    plan: MatrixPlan, recipe: Recipe, checkpoint: Checkpoint, device: torch.device
) -> tuple[dict[str, Tensor], MatrixReport]:
    """One projection's tensors, named below the projection and on the CPU, and their report."""
    import torch

    from .modeling_mpoe import core_names, matrix_shape
    from .mpo import relative_error

    stored = getattr(torch, plan.dtype)
    kind = experts.load(recipe.kind)
    matrix = read_matrix(checkpoint, plan.source, device)
    matrix = matrix if matrix.dtype == torch.float64 else matrix.float()
    cores, discarded = kind.fit(matrix, plan.sites, recipe)
    (term,) = plan.spec["terms"]
    generator = seeded(recipe.seed, plan.name)
    tensors, exact, clone = {}, [], []
    for name, core, shared in zip(core_names(term), cores, term["shared"], strict=True):
        if not shared:
            core = _clones(core, recipe.experts, recipe.noise, generator)
        core = cast(f"{plan.name} (core {name})", core, stored)
        exact.append(core if shared else core[0])
        clone.append(core if shared else core[1])
        tensors[f"terms.0.{name}"] = core.reshape(*core.shape[:-4], *matrix_shape(core.shape[-4:])).cpu()
    error = before = relative_error(matrix, _matrix_of(exact, matrix.dtype))
    if stored != cores[0].dtype:
        before = relative_error(matrix, _matrix_of(cores, matrix.dtype))
    drift = _drift(exact, clone, matrix.dtype) if recipe.noise else 0.0
    if plan.spec["bias"] is not None:
        bias = cast(plan.source.bias, _read_bias(checkpoint, plan.source), stored)
        per_expert = plan.spec["bias"] == "per-expert"
        tensors["bias"] = bias.repeat(recipe.experts, 1) if per_expert else bias.clone()
    norm = float(matrix.norm()) ** 2 if any(discarded) else 1.0
    measured = _Measured(error, before, tuple(lost / norm for lost in discarded), drift)
    return tensors, _matrix_report(plan, recipe, measured)


@dataclass(frozen=True)
class _Measured:
    error: float
    error_before_cast: float
    discarded: tuple[float, ...]
    drift: float


def _matrix_report(plan: MatrixPlan, recipe: Recipe, measured: _Measured) -> MatrixReport:
    (term,) = plan.spec["terms"]
    return MatrixReport(
        name=plan.name,
        kind=recipe.kind,
        shape=(plan.rows, plan.cols),
        in_dims=tuple(term["in_dims"]),
        out_dims=tuple(term["out_dims"]),
        bonds=tuple(term["bonds"]),
        full_bonds=plan.sites.full_bonds if plan.sites else (),
        relative_error=measured.error,
        relative_error_before_cast=measured.error_before_cast,
        discarded_weight=measured.discarded,
        clone_drift=measured.drift,
        dense_params=plan.dense_params,
        stored_params=plan.stored_params,
        dtype=plan.dtype,
    )


def _drift(exact: list[Tensor], clone: list[Tensor], dtype: torch.dtype) -> float:
    """Relative distance of a clone's matrix from expert 0's, on an eighth of the rows where there are 8.

    The noise is alike everywhere, and the whole matrix would take as long as the decomposition.
    """
    from .mpo import relative_error

    rows = max(exact[0].shape[1] // 8, 1)
    pieces = ([cores[0][:, :rows], *cores[1:]] for cores in (exact, clone))
    return relative_error(*(_matrix_of(piece, dtype) for piece in pieces))


def _matrix_of(cores: list[Tensor], dtype: torch.dtype) -> Tensor:
    from .modeling_mpoe import contract_chain

    return contract_chain([core.to(dtype) for core in cores])


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator of its own for every tensor: independent of order, subset and device."""
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _clones(core: Tensor, num_experts: int, noise: float, generator: torch.Generator) -> Tensor:
    """(l, i, o, r) -> (E, l, i, o, r): expert 0 exact, the others with noise of the core's own scale."""
    import torch

    clones = core.repeat(num_experts, 1, 1, 1, 1)
    if noise:
        scale = noise * float(core.square().mean().sqrt())
        for clone in clones[1:]:
            clone += scale * torch.randn(core.shape, generator=generator).to(core)
    return clones


def _router(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    import torch

    assert len(shape) == 2 and prod(shape), shape
    return ROUTER_STD * torch.randn(shape, generator=seeded(seed, name))
