"""The tools that ``benchmark_metrics.py`` times, ours and the peers, by part and by their name in its tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

TOLERANCE = 2.0  # mm, NSD
DEVICE = {"numpy": "cpu", "numba": "cpu", "torch": "cuda"}


def ours(backend: str) -> Callable:
    def measure(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
        from nnunet_calib import metrics

        labels = list(range(1, structures + 1))
        overlaps = metrics.overlaps(reference, prediction, labels, backend=backend)
        measured = metrics.structure_distances(
            reference, prediction, labels, spacing, backend=backend, device=DEVICE[backend]
        )
        return [
            [
                metrics.hausdorff(d),
                metrics.hausdorff_95(d),
                metrics.average_surface_distance(d),
                metrics.surface_dice(d, TOLERANCE),
                overlap.dice,
            ]
            for d, overlap in zip(measured, overlaps, strict=True)
        ]

    return measure


def monai(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
    import torch
    from monai.metrics import (
        compute_average_surface_distance,
        compute_dice,
        compute_hausdorff_distance,
        compute_surface_dice,
    )

    ours, theirs = (
        torch.stack([torch.from_numpy(labels == c) for c in range(structures + 1)])[None]
        for labels in (prediction, reference)
    )
    columns = [
        compute_hausdorff_distance(ours, theirs, spacing=spacing),
        compute_hausdorff_distance(ours, theirs, percentile=95, spacing=spacing),
        compute_average_surface_distance(ours, theirs, symmetric=True, spacing=spacing),
        compute_surface_dice(ours, theirs, [TOLERANCE] * structures, spacing=spacing),
        compute_dice(ours, theirs, include_background=False),
    ]
    return np.stack([column[0].numpy() for column in columns], axis=1).tolist()


def deepmind(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
    import surface_distance as peer

    rows = []
    for label in range(1, structures + 1):
        theirs, mine = reference == label, prediction == label
        d = peer.compute_surface_distances(theirs, mine, spacing)
        rows.append(
            [
                peer.compute_robust_hausdorff(d, 100),
                peer.compute_robust_hausdorff(d, 95),
                float(np.mean(peer.compute_average_surface_distance(d))),
                peer.compute_surface_dice_at_tolerance(d, TOLERANCE),
                peer.compute_dice_coefficient(theirs, mine),
            ]
        )
    return rows


def panoptica(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
    from panoptica import InputType, Panoptica_Evaluator
    from panoptica.metrics import Metric

    evaluator = Panoptica_Evaluator(
        expected_input=InputType.MATCHED_INSTANCE,
        instance_metrics=[Metric.DSC, Metric.HD, Metric.HD95, Metric.ASSD, Metric.NSD],
        verbose=False,
    )
    result = evaluator.evaluate(prediction, reference, voxelspacing=spacing, verbose=False)["ungrouped"]
    return [float(result.sq_dsc), float(result.sq_assd)]


def medpy(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
    from medpy.metric import binary as peer

    mine, theirs = prediction == 1, reference == 1
    return [measure(mine, theirs, spacing) for measure in (peer.hd, peer.hd95, peer.assd)] + [peer.dc(mine, theirs)]


def nnunet_dice(reference: np.ndarray, prediction: np.ndarray, spacing: tuple, structures: int) -> list:
    from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask

    return [
        [int(n) for n in compute_tp_fp_fn_tn(*(region_or_label_to_mask(m, c) for m in (reference, prediction)))]
        for c in range(1, structures + 1)
    ]


DISTANCES: dict[str, Callable] = {
    "ours, [fast]": ours("numba"),
    "ours": ours("numpy"),
    "ours, torch": ours("torch"),
    "panoptica": panoptica,
    "DeepMind surface-distance": deepmind,
    "MONAI": monai,
    "medpy (one structure)": medpy,
    "nnU-Net (Dice only)": nnunet_dice,
}


def ours_calibration(backend: str, threads: int = 1) -> Callable:
    def measure(p: np.ndarray, reference: np.ndarray) -> dict:
        from nnunet_calib import metrics

        whole = {"volume": np.ones(reference.shape, bool)}
        classes = list(range(len(p)))
        statistics, _ = metrics.calibration_statistics(
            p, reference, classes, whole, backend=backend, device=DEVICE[backend], threads=threads
        )
        scores = metrics.scores(statistics["volume"], [str(c) for c in classes])
        return {name: scores[name] for name in ("ECE", "CECE", "Brier", "NLL")}

    return measure


def read(p: np.ndarray, reference: np.ndarray) -> dict:
    """The least that any of them must do: look at every number once."""
    return {"largest": float(max(channel.max() for channel in p))}


def netcal(p: np.ndarray, reference: np.ndarray) -> dict:
    from netcal.metrics import ECE

    flat, labels = p.reshape(len(p), -1).T, reference.reshape(-1)
    classes = [ECE(15).measure(flat[:, c], (labels == c).astype(int)) for c in range(len(p))]
    return {"ECE": float(ECE(15).measure(flat, labels)), "CECE": float(np.mean(classes))}


def torchmetrics(p: np.ndarray, reference: np.ndarray) -> dict:
    import torch
    from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

    flat = torch.from_numpy(np.ascontiguousarray(p.reshape(len(p), -1).T))
    labels = torch.from_numpy(reference.reshape(-1).astype(np.int64))
    classes = [binary_calibration_error(flat[:, c], (labels == c).long(), n_bins=15).item() for c in range(len(p))]
    overall = multiclass_calibration_error(flat, labels, len(p), n_bins=15).item()
    return {"ECE": overall, "CECE": float(np.mean(classes))}


def monai_calibration(p: np.ndarray, reference: np.ndarray) -> dict:
    import torch
    from monai.metrics import CalibrationErrorMetric

    one_hot = torch.stack([torch.from_numpy(reference == c) for c in range(len(p))]).float()[None]
    metric = CalibrationErrorMetric(num_bins=15, include_background=True, calibration_reduction="expected")
    metric(torch.from_numpy(p)[None], one_hot)
    return {"CECE": float(metric.aggregate())}


CALIBRATION: dict[str, Callable] = {
    "reading the array": read,
    "ours, [fast]": ours_calibration("numba"),
    "ours, [fast], threads2": ours_calibration("numba", 2),
    "ours": ours_calibration("numpy"),
    "ours, torch": ours_calibration("torch"),
    "netcal (a tenth)": netcal,
    "torchmetrics (a tenth)": torchmetrics,
    "MONAI (CECE only)": monai_calibration,
}


def whole_case(folder: str) -> Callable:
    def measure(work: Path) -> dict:
        from nnunet_calib.data.cases import pair_cases
        from nnunet_calib.data.dataset import read_dataset
        from nnunet_calib.data.images import choose_reader
        from nnunet_calib.evaluation import Protocol, evaluate_case

        dataset = read_dataset(work / "dataset.json", None)
        files = pair_cases(work / "reference", work / folder, ".nii.gz")[0]
        result = evaluate_case(files, dataset, choose_reader(dataset), Protocol())
        return {name: result.record["calibration"]["volume"][name] for name in ("ECE", "CECE", "NLL")}

    return measure


def decompress(work: Path) -> dict:
    """What numpy needs to bring the probabilities into memory."""
    return {"largest": float(np.load(work / "npz" / "case.npz")["probabilities"][0, 0, 0, 0])}


CASES: dict[str, Callable] = {
    "decompressing the .npz (numpy)": decompress,
    "evaluate, .npz": whole_case("npz"),
    "evaluate, compact float32": whole_case("compact"),
    "evaluate, compact float16": whole_case("compact16"),
}
