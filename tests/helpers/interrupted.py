"""Run by torchrun in tests/training/test_distributed.py: a run that a signal to the last process ends.

Every process prints where the run ended; the first one also how many tensors differ between a run that was
not interrupted and one that went on.
"""

import json
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import load_file

from mpoe_convert import Finetuning, finetune
from mpoe_convert.training.interrupts import Interrupted
from mpoe_convert.training.trainer import MpoeTrainer


def main() -> None:
    model, data, folder, arguments = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
    options = {"length": 16, "batch_size": 2, "steps": 5, "save_every": 2, "log_every": 1}
    run = Finetuning(model, data, data, **options, arguments={"use_cpu": True} | arguments)
    finetune(run, folder / "whole")
    step = MpoeTrainer.training_step

    def send(trainer, *args, **kwargs):
        if trainer.state.global_step == 2 and dist.get_rank() == dist.get_world_size() - 1:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer, *args, **kwargs)

    MpoeTrainer.training_step = send
    try:
        finetune(run, folder / "stopped")
    except Interrupted as stopped:
        sys.stdout.write(f"rank {dist.get_rank()} step {stopped.step} signal {stopped.number}\n")
        sys.stdout.flush()
    MpoeTrainer.training_step = step
    finetune(run, folder / "stopped", resume=True)
    if dist.get_rank() == 0:
        whole, resumed = (load_file(folder / name / "model.safetensors") for name in ("whole", "stopped"))
        differ = sum(not resumed[name].equal(whole[name]) for name in whole)
        sys.stdout.write(f"differ {differ} of {len(resumed)}\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
