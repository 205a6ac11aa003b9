"""Run by torchrun in tests/training/test_distributed.py.

An artifact wrapped by DDP or FSDP2 against the bare model.

Arguments: a folder and a way to wrap its model, and so on. Of each every process prints the relative
differences of the loss, of the worst gradient, and of the logits after an optimizer's step, with matrices
cached before it.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def batch_of(rank: int, vocab: int) -> torch.Tensor:
    return torch.randint(3, vocab, (2, 16), generator=torch.Generator().manual_seed(rank))


def load(folder: str, how: str):
    dtype = torch.bfloat16 if how.endswith("bfloat16") else torch.float32
    options = {"mpoe_cache": "all", "dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def wrap(model, how: str):
    if how.startswith("ddp"):
        return DistributedDataParallel(model)
    for _, mixture in model.mixtures():
        fully_shard(mixture.router)  # always float32, and FSDP wants one dtype per group
        fully_shard(mixture)
    return fully_shard(model)


def trained(model, batches: list[torch.Tensor]) -> tuple[float, dict, torch.Tensor]:
    """(mean loss over the batches, gradients by name, logits of the first batch after one step)."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.no_grad():
        model.eval()(batches[0])  # fills the cache with matrices that the step makes stale
    model.train()
    losses = [model(batch, labels=batch).loss for batch in batches]
    loss = torch.stack(losses).mean()
    loss.backward()
    gradients = {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}
    optimizer.step()
    with torch.no_grad():
        logits = model.eval()(batches[0]).logits
    return float(loss.detach()), gradients, logits


def compare(folder: Path, how: str) -> None:
    rank = dist.get_rank()
    bare = load(str(folder), how)
    batches = [batch_of(r, bare.config.vocab_size) for r in range(dist.get_world_size())]
    expected = trained(bare, [batches[rank], *batches[:rank], *batches[rank + 1 :]])
    found = trained(wrap(load(str(folder), how), how), [batches[rank]])
    loss = torch.tensor(found[0])
    dist.all_reduce(loss)
    numbers = {
        "loss": abs(float(loss) / dist.get_world_size() - expected[0]) / expected[0],
        "gradient": max(difference(found[1][name], g) for name, g in expected[1].items()),
        "logits": difference(found[2], expected[2]),
    }
    text = " ".join(f"{name}={value:.3e}" for name, value in numbers.items())
    sys.stdout.write(f"{how} rank {rank}: {text}\n")  # in one piece: the other rank writes as well
    sys.stdout.flush()


def main() -> None:
    dist.init_process_group("gloo")
    for folder, how in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        compare(Path(folder), how)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
