"""Two processes that train every trainer under DistributedDataParallel; run by test_ddp.py as a program.

    python ddp_processes.py FOLDER

nnU-Net's own start is for NVIDIA's cards alone (NCCL, ``device_ids``); the trainers here are changed in just that. Each
process writes what it saw to FOLDER/rank_R.json.
"""

import copy
import itertools
import json
import os
import sys
from pathlib import Path

import nnunetv2.training.nnUNetTrainer.nnUNetTrainer as host
import torch
import torch.distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from toy import IGNORE, batch, construct, prepare_folders

from nnunet_calib.training.trainers import TRAINERS

KINDS = ("labels_ignore", "regions_ignore")
STEPS = ((0, False), (1, False), (1, True))
"""Epoch, and whether the patches of process 1 are ignored entirely; epoch 0 is nnU-Net's loss, 1 the objective."""


def on_cpu(trainer: type) -> type:
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):  # noqa: B008
        trainer.__init__(self, plans, configuration, fold, dataset_json, device)
        self.device, self.grad_scaler = torch.device("cpu"), None

    return type(trainer.__name__, (trainer,), {"__init__": __init__})


def train(name: str, kind: str) -> dict:
    settings = {"num_epochs": 2} if name == "StockTrainer" else {"num_epochs": 2, "calibrate_from": 0.5}
    trainer = construct(name, settings, kind=kind, axes=2, trainer=on_cpu(TRAINERS[name]))
    torch.manual_seed(dist.get_rank())
    trainer.initialize()
    losses = []
    for step, (epoch, ignored) in enumerate(STEPS):
        if step == epoch:
            trainer.current_epoch = epoch
            trainer.on_train_epoch_start()
        seed = 10 * step + dist.get_rank()
        data = batch(trainer, kind, all_ignored=ignored and dist.get_rank() == 1, seed=seed)
        losses.append(float(trainer.train_step(data)["loss"]))
    first, *_, last = trainer.loss.weight_factors
    return {
        "wrapped": isinstance(trainer.network, DistributedDataParallel),
        "losses": losses,
        "trace": float(last / first),
        "weights": [weights.double().sum().item() for weights in trainer.network.parameters()],
    }


def follow(kind: str) -> dict:
    """CRaC's multipliers after a validation with a batch a process, and those that follow both batches in one."""
    trainer = construct(
        "CRaCTrainer", {"calibrate_from": 0}, kind=kind, axes=2, trainer=on_cpu(TRAINERS["CRaCTrainer"])
    )
    torch.manual_seed(0)
    trainer.initialize()
    trainer.on_train_epoch_start()
    trainer.on_validation_epoch_start()
    loss = trainer.loss.loss
    both = copy.deepcopy(loss)
    with torch.no_grad():
        # The batch of process 1 is ignored but for its first row, so that a mean of means would be another number.
        data = [batch(trainer, kind, seed=rank) for rank in range(2)]
        ignore_but_first_row(data[1]["target"][0], kind)
        for seen in data:
            both(trainer.network(seen["data"])[0], seen["target"][0])
        outputs = [trainer.validation_step(data[dist.get_rank()])]
        trainer.on_validation_epoch_end(outputs)
    both.calibration.update()  # the sum over processes that saw the same: twice the violations of twice the voxels
    return {name: value.calibration.multipliers.tolist() for name, value in (("gathered", loss), ("expected", both))}


def begin() -> dict:
    """What a class that is new to the network begins with, fitted to batches of both processes."""
    trainer = construct("StockTrainer", {"num_epochs": 2}, axes=2, trainer=on_cpu(TRAINERS["StockTrainer"]))
    torch.manual_seed(0)
    trainer.initialize()
    seeds = itertools.count(100 * dist.get_rank())
    trainer.dataloader_train = (batch(trainer, "labels", seed=seed) for seed in seeds)
    trainer._new = [2]
    trainer.on_train_epoch_start()
    rows = [weights.double().sum().item() for weights in trainer.network.parameters()]
    return {"rows": rows, "class_weights": trainer._class_weights}


def ignore_but_first_row(target: torch.Tensor, kind: str) -> None:
    if kind.startswith("regions"):
        target[:, -1, 1:] = True
    else:
        target[:, :, 1:] = IGNORE


def run(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    host.DDP = lambda network, device_ids: DistributedDataParallel(network)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    seen = {f"{name}-{kind}": train(name, kind) for name in TRAINERS for kind in KINDS}
    seen |= {f"multipliers-{kind}": follow(kind) for kind in KINDS}
    seen["begun"] = begin()
    Path(folder, f"rank_{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    root = Path(sys.argv[1])
    os.environ.update(prepare_folders(root))
    mp.spawn(run, args=(str(root),), nprocs=2)
