"""Fine-tuning with five new classes at once, as ``fewshot finetune`` does, on the sets of k = 5 of the other tables.

    python scripts/experiment_finetune.py DATA -o WORK [--sets 2] [--steps 400] [--chk checkpoint_final.pth]
    python scripts/experiment_finetune.py DATA -o WORK --csv

WORK is that of ``experiment_combined.py --only brain``: its base network and volumes. The trainings run one after the
other, on one thread, without nnU-Net's validation at their end. A row in ``docs/results/fewshot_finetune.csv`` is the
mean over sets of a structure, or of the classes that the base network knew, before and after.
"""

import argparse
import json
import os
import platform
import shutil
import time
from datetime import date
from pathlib import Path

import numpy as np
import SimpleITK
import torch
from experiment_fewshot import STUDIES, Base
from kept import FOLDER, csv_text, number

from nnunet_calib.cli.main import main as nnunet_calib
from nnunet_calib.data.files import write_whole
from nnunet_calib.data.model import CHECKPOINT
from nnunet_calib.fewshot.task.added_class import AddedClass, prepare_dataset
from nnunet_calib.prediction.model import TrainedModel
from nnunet_calib.prediction.predictor import ModelPredictor

K = 5
RATE = 0.01
STEPS_AN_EPOCH = 50
FIRST = 901
TABLE = "fewshot_finetune.csv"


def sets_of(cases: list[str]) -> list[tuple[list[str], str]]:
    """Two sets of five neighbours among six cases, and for each the case outside, as in the tables of k = 5."""
    return [([cases[(first + i) % len(cases)] for i in range(K)], cases[(first + K) % len(cases)]) for first in (0, 3)]


def link(base: Base, cases: list[str], folder: Path) -> None:
    for kind, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz")):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for case in cases:
            shutil.copy(base.new / kind / f"{case}{ending}", folder / kind)


def tune(base: Base, folder: Path, number_: int, steps: int, checkpoint: str) -> tuple[AddedClass, dict[str, float]]:
    """Prepare and train; CPU seconds of both."""
    begin = time.process_time()
    made = prepare_dataset(
        base.model,
        folder / "images",
        folder / "labels",
        number=number_,
        structures={name: base.labels[name] for name in base.novel},
        settings={
            "num_epochs": steps // STEPS_AN_EPOCH,
            "num_iterations_per_epoch": STEPS_AN_EPOCH,
            "num_val_iterations_per_epoch": 1,
            "initial_lr": RATE,
            "finetune_from": str((base.model / "fold_0" / checkpoint).resolve()),
        },
        trainer="StockTrainer",
        folds=["0"],
        checkpoint=checkpoint,
        mirroring=False,
        progress=False,
    )
    prepared = time.process_time()
    from nnunetv2.run.run_training import get_trainer_from_args

    get_trainer_from_args(
        made.name, made.configuration, "all", "StockTrainer", made.plans_name, device=torch.device("cpu")
    ).run_training()
    return made, {"prepare": prepared - begin, "train": time.process_time() - prepared}


def predict(model: TrainedModel, base: Base, case: str, target: Path) -> None:
    reader = model.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images([str(base.new / "images" / f"{case}_0000.nii.gz")])
    labels = ModelPredictor(model, mirroring=False).predict_single_npy_array(image, dict(properties))
    target.parent.mkdir(parents=True, exist_ok=True)
    reader.write_seg(labels, str(target), properties)


def write_reference(base: Base, case: str, labels: dict[str, int], target: Path) -> None:
    known = SimpleITK.ReadImage(str(base.new / "base" / f"{case}.nii.gz"))
    merged = SimpleITK.GetArrayFromImage(known)
    annotated = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(base.new / "labels" / f"{case}.nii.gz")))
    for name in base.novel:
        merged[annotated == base.labels[name]] = labels[name]
    image = SimpleITK.GetImageFromArray(merged)
    image.CopyInformation(known)
    target.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(target))


def one_set(base: Base, index: int, supports: list[str], query: str, steps: int, checkpoint: str) -> None:
    """Train, predict the query before and after, score both."""
    folder = base.folder / "finetune" / str(index)
    done = folder / "seconds.json"
    if done.is_file():
        return
    link(base, supports, folder)
    made, seconds = tune(base, folder, FIRST + index, steps, checkpoint)
    tuned = Path(os.environ["nnUNet_results"]) / made.name / f"StockTrainer__{made.plans_name}__{made.configuration}"
    write_reference(base, query, made.labels, folder / "reference" / f"{query}.nii.gz")
    for name, model in (("before", TrainedModel(base.model, ["0"], checkpoint)), ("after", TrainedModel(tuned))):
        predict(model, base, query, folder / name / f"{query}.nii.gz")
        words = ["evaluate", str(folder / "reference"), str(folder / name), "-o", str(folder / f"scores_{name}")]
        assert nnunet_calib([*words, "-djfile", str(tuned / "dataset.json")]) == 0
    write_whole(done, json.dumps({**seconds, "steps": steps, "labels": made.labels}))


def table(base: Base) -> str:
    rows: list[dict] = []
    folders = sorted(file.parent for file in (base.folder / "finetune").glob("*/seconds.json"))
    told = [json.loads((folder / "seconds.json").read_text()) for folder in folders]
    labels = told[0]["labels"]
    known = [name for name in labels if name not in (*base.novel, "background")]
    means = {
        when: [json.loads((f / f"scores_{when}" / "summary.json").read_text())["mean"] for f in folders]
        for when in ("before", "after")
    }

    def mean(when: str, names: list[str], score: str) -> float | str:
        values = [one[str(labels[name])][score] for one in means[when] for name in names]
        return number(np.mean([float(value) for value in values if value is not None]), 4)

    groups = {name: [name] for name in base.novel} | {"all new": list(base.novel), "base classes": known}
    for what, names in groups.items():
        rows.append(
            {
                "study": base.study.name,
                "k": K,
                "structure": what,
                "pairs": len(folders) * len(names),
                "Dice_before": mean("before", names, "Dice"),
                "Dice": mean("after", names, "Dice"),
                "HD95": mean("after", names, "HD95"),
                "steps": told[0]["steps"],
                "seconds_prepare": number(np.mean([one["prepare"] for one in told]), 0),
                "seconds_train": number(np.mean([one["train"] for one in told]), 0),
                "date": str(date.today()),
                "machine": f"{os.cpu_count()} CPU cores of {platform.machine()}",
            }
        )
    return csv_text(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", type=Path)
    parser.add_argument("-o", dest="work", metavar="WORK", type=Path, required=True)
    parser.add_argument("--sets", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--chk", default=CHECKPOINT, help="of the base network")
    parser.add_argument("--csv", action="store_true", help=f"write docs/results/{TABLE}")
    args = parser.parse_args()
    base = Base(next(study for study in STUDIES if study.name == "brain"), 0, args.data, args.work)
    if args.csv:
        write_whole(FOLDER / TABLE, table(base))
        return 0
    torch.set_num_threads(1)
    os.environ.update(base.environment)
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (base.new / "labels").iterdir())
    for index, (supports, query) in enumerate(sets_of(cases)[: args.sets]):
        one_set(base, index, supports, query, args.steps, args.chk)
        print("set", index, "done", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
