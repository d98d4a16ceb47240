"""Compare the numbers of ``nnunet-calib evaluate`` with the peers' own, on a folder of predictions.

    python scripts/check_against_peers.py REF PRED -djfile dataset.json

Dice, IoU and counts against nnU-Net's evaluator; HD, HD95, ASSD and NSD against MONAI; ECE, CECE and per-class ECE
against netcal, in the regions volume, reference_foreground and foreground. Prints the largest difference of each number
and ends with exit code 1 if one is larger than allowed. Needs the packages of the extra [test].
"""

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice
from netcal.metrics import ECE
from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
from tqdm import tqdm

from nnunet_calib.data.dataset import Dataset, key, read_dataset
from nnunet_calib.data.images import choose_reader, read_labels
from nnunet_calib.evaluation import Protocol, evaluate_folder

ALLOWED = {"nnU-Net": 1e-12, "MONAI": 1e-5, "netcal": 1e-6}
PROTOCOL = Protocol()


class Differences:
    """Largest difference of each number from its peer's."""

    def __init__(self):
        self.largest: dict[tuple[str, str], float] = defaultdict(float)
        self.compared: dict[tuple[str, str], int] = defaultdict(int)

    def add(self, peer: str, number: str, ours: float, theirs: float) -> None:
        """Compare one number; the same infinity, or NaN in both, is no difference."""
        same = ours == theirs or (np.isnan(ours) and np.isnan(theirs))
        difference = 0.0 if same else abs(ours - theirs)
        self.largest[peer, number] = max(self.largest[peer, number], np.inf if np.isnan(difference) else difference)
        self.compared[peer, number] += 1

    def print_table(self) -> bool:
        """Print one row per number; return whether all are within what is allowed."""
        print(f"{'number':<10}{'peer':<10}{'compared':>9}{'largest difference':>20}{'allowed':>10}")
        for (peer, number), largest in self.largest.items():
            verdict = "" if largest <= ALLOWED[peer] else "   EXCEEDED"
            compared = self.compared[peer, number]
            print(f"{number:<10}{peer:<10}{compared:>9}{largest:>20.2e}{ALLOWED[peer]:>10.0e}{verdict}")
        return all(largest <= ALLOWED[peer] for (peer, _), largest in self.largest.items())


def compare_with_nnunet(differences: Differences, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    per_file = {case["prediction_file"]: case["metrics"] for case in theirs["metric_per_case"]}
    for case in ours["metric_per_case"]:
        for structure, numbers in per_file[case["prediction_file"]].items():
            for number, value in numbers.items():
                differences.add("nnU-Net", number, case["metrics"][key(structure)][number], value)
    for structure, numbers in theirs["mean"].items():
        differences.add("nnU-Net", "mean Dice", ours["mean"][key(structure)]["Dice"], numbers["Dice"])
    differences.add("nnU-Net", "fg. Dice", ours["foreground_mean"]["Dice"], theirs["foreground_mean"]["Dice"])


def compare_with_monai(
    differences: Differences,
    case: dict[str, Any],
    dataset: Dataset,
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing,
) -> None:
    axes = [axis for axis, length in enumerate(reference.shape) if length > 1]  # MONAI would call a slice all surface
    shape, step = [reference.shape[axis] for axis in axes], [spacing[axis] for axis in axes]
    for structure in dataset.structures:
        ours = case["metrics"][key(structure)]
        y, y_pred = (
            torch.from_numpy(np.isin(labels, structure).reshape(1, 1, *shape)) for labels in (reference, prediction)
        )
        options = {"y_pred": y_pred, "y": y, "include_background": True, "spacing": step}
        theirs = {
            "HD": compute_hausdorff_distance(**options),
            "HD95": compute_hausdorff_distance(**options, percentile=95),
            "ASSD": compute_average_surface_distance(**options, symmetric=True),
            "NSD": compute_surface_dice(**options, class_thresholds=[PROTOCOL.nsd_tolerance]),
        }
        for number, value in theirs.items():
            if number == "HD95" and np.isinf(ours["HD95"]):
                continue  # MONAI says NaN for a missed structure, which hides it from the mean
            differences.add("MONAI", number, ours[number], float(value))


def compare_with_netcal(
    differences: Differences, case: dict[str, Any], dataset: Dataset, reference: np.ndarray, prediction: np.ndarray
) -> None:
    with np.load(case["probabilities_file"], allow_pickle=False) as stored:
        probabilities = stored["probabilities"].astype(np.float64)
    valid = (
        reference != dataset.ignore_label if dataset.ignore_label is not None else np.ones(reference.shape, dtype=bool)
    )
    in_reference, in_prediction = (reference != 0) & valid, (prediction != 0) & valid
    regions = {"volume": valid, "reference_foreground": in_reference, "foreground": in_reference | in_prediction}
    for region, inside in regions.items():
        if not inside.any():
            continue
        p, y, ours = probabilities[:, inside], reference[inside], case["calibration"][region]
        per_class = []
        for channel, structure in zip(p, dataset.channels, strict=True):
            per_class.append(ECE(PROTOCOL.bins).measure(channel, np.isin(y, structure).astype(int)))
            differences.add("netcal", "class ECE", ours["classes"][key(structure)]["ECE"], per_class[-1])
        differences.add("netcal", "CECE", ours["CECE"], float(np.mean(per_class)))
        if not dataset.has_regions:
            hit = np.array(dataset.labels)[p.argmax(axis=0)] == y
            differences.add("netcal", "ECE", ours["ECE"], ECE(PROTOCOL.bins).measure(p.max(axis=0), hit.astype(int)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", metavar="REF", type=Path)
    parser.add_argument("prediction", metavar="PRED", type=Path)
    parser.add_argument("-djfile", type=Path, required=True)
    parser.add_argument("-np", type=int, default=2, help="processes of the two evaluators")
    args = parser.parse_args()

    dataset = read_dataset(args.djfile)
    differences = Differences()
    with tempfile.TemporaryDirectory() as output:
        ours = evaluate_folder(
            args.reference, args.prediction, output, args.djfile, processes=args.np, chill=True, protocol=PROTOCOL
        )
    reader = choose_reader(dataset)
    theirs = compute_metrics_on_folder(
        str(args.reference),
        str(args.prediction),
        None,
        reader(),
        dataset.file_ending,
        list(dataset.structures),
        dataset.ignore_label,
        args.np,
    )
    compare_with_nnunet(differences, ours, theirs)
    ignored = [] if dataset.ignore_label is None else [dataset.ignore_label]
    for case in tqdm(ours["metric_per_case"], desc="MONAI and netcal", unit="case"):
        reference = read_labels(Path(case["reference_file"]), reader, [*dataset.labels, *ignored])
        prediction = read_labels(Path(case["prediction_file"]), reader, dataset.labels)
        if case["probabilities_file"]:
            compare_with_netcal(differences, case, dataset, reference.labels, prediction.labels)
        counts = ~np.isin(reference.labels, ignored)
        compare_with_monai(
            differences, case, dataset, reference.labels * counts, prediction.labels * counts, reference.spacing
        )
    failed = [failure["error"] for failure in ours["failed"]]
    print(f"{len(ours['metric_per_case'])} cases", *failed, sep="\n")
    return 0 if differences.print_table() and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
