"""How often ``calibrate check`` calls cases unlike those of the fit that are like them, and cases that are not.

Simulated cases, whose confidences differ from case to case, and divisions at random of the cases of real data: folders
of predictions with probabilities, and a data set of nnU-Net's raw layout that a logistic regression on smoothed
intensities and position segments, fitted to 20 of its training cases.

python scripts/simulate_check.py [--raw DATASET] [--only-real] [PREDICTIONS ...]
"""

import argparse
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression

from nnunet_calib.data.cases import pair_cases
from nnunet_calib.data.dataset import read_dataset, require_dataset_json
from nnunet_calib.data.images import choose_reader
from nnunet_calib.posthoc.folders.check import FEWEST, LEVEL, case_p_value, cases_p_value
from nnunet_calib.posthoc.folders.sampling import confidence_shares, confidences_of

TRIALS = 400


def simulated(n: int, rng: np.random.Generator, temperature: float = 1.0, spread: float = 0.4) -> np.ndarray:
    """Shares (n, bins) of cases whose networks are too sure by a temperature of their own."""
    own = temperature * np.exp(rng.normal(0, spread, n))
    odds = np.abs(rng.normal(0, 4, (n, 2000))) / own[:, None]
    p = 1 / (1 + np.exp(-odds))
    return np.stack([confidence_shares(np.stack([case, 1 - case]), multilabel=False) for case in p])


def confidences(folder: Path) -> np.ndarray:
    """Shares (cases, bins) of a folder of predictions with probabilities."""
    dataset = read_dataset(require_dataset_json(folder, folder))
    cases = [case for case in pair_cases(folder, folder, dataset.file_ending) if case.probabilities]
    reader = choose_reader(dataset)
    shares = np.stack([confidences_of(case, dataset, reader) for case in cases])
    return shares[~np.isnan(shares).any(axis=1)]


def _features(image: Path) -> np.ndarray:
    """Float (voxels, features) of an image: intensities in units of its own, smoothed ones, position and its square."""
    volume = sitk.GetArrayFromImage(sitk.ReadImage(str(image))).astype(float)
    volume = (volume - volume.mean()) / volume.std()
    at = np.meshgrid(*(np.linspace(-1, 1, n) for n in volume.shape), indexing="ij")
    smooth = [gaussian_filter(volume, sigma) for sigma in (1, 2, 4)]
    return np.stack([volume, *smooth, *at, *(a * b for a in at for b in at)], axis=-1).reshape(volume.size, -1)


def confidences_of_regression(dataset: Path) -> np.ndarray:
    """Shares (cases, bins) of the training cases of a data set that the regression was not fitted to."""
    rng = np.random.default_rng(0)
    images = sorted((dataset / "imagesTr").glob("*_0000.nii.gz"))
    order = rng.permutation(len(images))
    x, y = [], []
    for i in order[:20]:
        features = _features(images[i])
        label = dataset / "labelsTr" / images[i].name.replace("_0000", "")
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(label))).reshape(-1)
        drawn = np.concatenate([np.flatnonzero(labels), rng.choice(labels.size, 3000)])
        x.append(features[drawn])
        y.append(labels[drawn])
    model = LogisticRegression(max_iter=300).fit(np.concatenate(x), np.concatenate(y))
    shares = []
    for i in order[20:]:
        p = model.predict_proba(_features(images[i])).T
        shares.append(confidence_shares(p[:, p.argmax(axis=0) > 0], multilabel=False))
    found = np.stack(shares)
    return found[~np.isnan(found).any(axis=1)]


def called(fitted: np.ndarray, new: np.ndarray) -> tuple[bool, float]:
    """Whether all together are called unlike the fit, and the share of the cases that is."""
    alone = [case_p_value(fitted, case) <= LEVEL for case in new]
    return cases_p_value(fitted, new) <= LEVEL, float(np.mean(alone))


def row(name: str, results: list[tuple[bool, float]], fitted: int) -> str:
    together, alone = (np.array(column, dtype=float) for column in zip(*results, strict=True))
    single = f"{alone.mean():.1%} ± {1.96 * alone.std() / len(alone) ** 0.5:.1%}" if fitted >= FEWEST else "not judged"
    return f"| {name} | {single} | {together.mean():.1%} ± {1.96 * together.std() / len(together) ** 0.5:.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--only-real", action="store_true")
    parser.add_argument("predictions", type=Path, nargs="*")
    args = parser.parse_args()
    print("| cases | single cases called unlike | folders called unlike |\n|---|---|---|", flush=True)
    if not args.only_real:
        simulations()
    real = {folder.name: confidences(folder) for folder in args.predictions}
    if args.raw is not None:
        real[f"{args.raw.name}, logistic regression"] = confidences_of_regression(args.raw)
    for name, shares in real.items():
        rng = np.random.default_rng(0)
        fitted = len(shares) * 2 // 3
        orders = [rng.permutation(len(shares)) for _ in range(TRIALS)]
        results = [called(shares[order[:fitted]], shares[order[fitted:]]) for order in orders]
        what = f"{name}, {fitted} in the fit, {len(shares) - fitted} new, divided at random"
        print(row(what, results, fitted), flush=True)
        for other, theirs in real.items():
            if other != name and theirs.shape == shares.shape:
                results = [called(shares[order[:fitted]], theirs[order[fitted:]]) for order in orders]
                print(row(f"{name} in the fit, {other} of other cases new", results, fitted), flush=True)


def simulations() -> None:
    """The rows of simulated cases."""
    for fitted, new in ((8, 3), (20, 6), (39, 10), (100, 1), (100, 30)):
        for temperature in (1.0, 1.5):
            rng = np.random.default_rng(0)
            results = [called(simulated(fitted, rng), simulated(new, rng, temperature)) for _ in range(TRIALS)]
            what = "the same distribution" if temperature == 1 else f"temperature {temperature}"
            print(row(f"simulated, {fitted} in the fit, {new} new, {what}", results, fitted), flush=True)


if __name__ == "__main__":
    main()
