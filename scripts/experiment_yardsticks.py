"""The published ways to few-shot beside ours: episodic training (PANet, first-order MAML) and refinement on the query.

    python scripts/experiment_yardsticks.py DATA -o WORK [--sets 1] [-k 1 3] [--steps 75] [--chk NAME]
    python scripts/experiment_yardsticks.py DATA -o WORK --csv

WORK is that of ``experiment_combined.py --only brain``: its base network, volumes, structures and sets of supports.
Every trainer starts from the base network and trains on its data; ``StockTrainer`` does so without episodes, as the
control. Resumable; ``docs/results/fewshot_yardsticks.csv``.
"""

import argparse
import json
import os
import platform
import time
from datetime import date
from pathlib import Path

import torch
from experiment_combined import evaluate, means, short
from experiment_fewshot import STUDIES, Base
from kept import FOLDER, csv_text

from nnunet_calib.data.files import write_whole
from nnunet_calib.data.model import CHECKPOINT
from nnunet_calib.data.plans import add_configuration, read_plans
from nnunet_calib.fewshot.measure.pairs import read_pairs
from nnunet_calib.fewshot.measure.protocols import REAL
from nnunet_calib.fewshot.measure.trials import Trial, grid

BASE = "base"
TRAINERS = ("PANetTrainer", "MAMLTrainer", "StockTrainer")
CONFIGURATION = "episodic"
STEPS_AN_EPOCH = 25
RATE = 0.01
REFINEMENTS = ("repri", "tim", "tim_adm")
TABLE = "fewshot_yardsticks.csv"


def train(base: Base, trainer: str, steps: int, checkpoint: str) -> Path:
    """Train on from the base network, unless it is done; the model's folder."""
    model = base.model.with_name(f"{trainer}__nnUNetPlans__{CONFIGURATION}")
    if (model / "fold_0" / "checkpoint_final.pth").exists():
        return model
    if CONFIGURATION not in read_plans(base.plans)["configurations"]:
        settings = {
            "num_epochs": steps // STEPS_AN_EPOCH,
            "num_iterations_per_epoch": STEPS_AN_EPOCH,
            "num_val_iterations_per_epoch": 1,
            "initial_lr": RATE,
            "finetune_from": str((base.model / "fold_0" / checkpoint).resolve()),
        }
        add_configuration(base.plans, CONFIGURATION, "small", settings, {})
    from nnunetv2.run.run_training import get_trainer_from_args

    torch.manual_seed(0)
    begin = time.process_time()
    dataset = base.raw.name
    get_trainer_from_args(dataset, CONFIGURATION, 0, trainer, "nnUNetPlans", device=torch.device("cpu")).run_training()
    write_whole(model / "seconds.json", json.dumps({"steps": steps, "train": time.process_time() - begin}))
    return model


def trials(network: str, ks: list[int], sets: int) -> list[Trial]:
    """Of a network the head of its paper; without episodes ours and prototypes, and of the base the refinements."""
    tried: list[Trial] = []
    if network != "PANetTrainer":
        refinements = REFINEMENTS if network == BASE else ()
        tried += grid(["linear"], [12], ["aligned"], ks, [REAL], most_sets=sets, refinements=refinements)
    if network != "MAMLTrainer":
        tried += grid(["prototype"], [1], ["aligned"], ks, [REAL], most_sets=sets)
    return tried


def table(base: Base) -> str:
    """CSV: means over pairs and structures of each network, head, refinement and k."""
    rows = []
    for network in (BASE, *TRAINERS):
        file = base.folder / "yardsticks" / network / "pairs.jsonl"
        if not file.exists():
            continue
        records = read_pairs(file)
        cost = base.model.with_name(f"{network}__nnUNetPlans__{CONFIGURATION}") / "seconds.json"
        told = json.loads(cost.read_text()) if cost.exists() else {"steps": 0, "train": 0.0}
        arms = dict.fromkeys((one["head"], one["refinement"], one["k"]) for one in records)
        for head, refinement, k in sorted(arms, key=str):
            pairs = [one for one in records if (one["head"], one["refinement"], one["k"]) == (head, refinement, k)]
            kind = {"study": base.study.name, "network": network, "steps": told["steps"]}
            kind |= {"seconds_train": round(told["train"]), "head": head, "refinement": refinement or "", "k": k}
            about = {"date": str(date.today()), "machine": f"{os.cpu_count()} CPU cores of {platform.machine()}"}
            rows.append(kind | means(pairs) | about)
    return csv_text(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("-o", dest="work", metavar="WORK", type=Path, required=True)
    parser.add_argument("-k", type=int, nargs="+", default=[1, 3], help="supports (default: 1 3)")
    parser.add_argument("--sets", type=int, default=1, help="of k supports (default: 1)")
    parser.add_argument("--steps", type=int, default=75, help="of every trainer (default: 75)")
    parser.add_argument("--chk", default=CHECKPOINT, help="of the base network")
    parser.add_argument("--csv", action="store_true", help=f"write docs/results/{TABLE} from what is in WORK")
    args = parser.parse_args()
    base = Base(short(next(study for study in STUDIES if study.name == "brain")), 0, args.data, args.work)
    if args.csv:
        write_whole(FOLDER / TABLE, table(base))
        return 0
    torch.set_num_threads(1)
    os.environ.update(base.environment)
    evaluate(base, trials(BASE, args.k, args.sets), args.chk, folder=f"yardsticks/{BASE}")
    for trainer in TRAINERS:
        model = train(base, trainer, args.steps, args.chk)
        evaluate(base, trials(trainer, args.k, args.sets), CHECKPOINT, model, f"yardsticks/{trainer}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
