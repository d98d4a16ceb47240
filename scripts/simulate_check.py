"""How often ``calibrate check`` calls cases unlike those of the fit that are like them, and cases that are not.

Simulated cases, whose confidences differ from case to case, and divisions at random of the cases of real folders.

python scripts/simulate_check.py [PREDICTIONS ...]
"""

import sys
from pathlib import Path

import numpy as np

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


def called(fitted: np.ndarray, new: np.ndarray) -> tuple[bool, float]:
    """Whether all together are called unlike the fit, and the share of the cases that is."""
    alone = [case_p_value(fitted, case) <= LEVEL for case in new]
    return cases_p_value(fitted, new) <= LEVEL, float(np.mean(alone))


def row(name: str, results: list[tuple[bool, float]], fitted: int) -> str:
    together, alone = (np.array(column, dtype=float) for column in zip(*results, strict=True))
    single = f"{alone.mean():.1%} ± {1.96 * alone.std() / len(alone) ** 0.5:.1%}" if fitted >= FEWEST else "not judged"
    return f"| {name} | {single} | {together.mean():.1%} ± {1.96 * together.std() / len(together) ** 0.5:.1%} |"


def main() -> None:
    print("| cases | single cases called unlike | folders called unlike |\n|---|---|---|")
    for fitted, new in ((8, 3), (20, 6), (39, 10), (100, 1), (100, 30)):
        for temperature in (1.0, 1.5):
            rng = np.random.default_rng(0)
            results = [called(simulated(fitted, rng), simulated(new, rng, temperature)) for _ in range(TRIALS)]
            what = "the same distribution" if temperature == 1 else f"temperature {temperature}"
            print(row(f"simulated, {fitted} in the fit, {new} new, {what}", results, fitted), flush=True)
    real = {Path(word).name: confidences(Path(word)) for word in sys.argv[1:]}
    for name, shares in real.items():
        rng = np.random.default_rng(0)
        fitted = len(shares) * 2 // 3
        orders = [rng.permutation(len(shares)) for _ in range(TRIALS)]
        results = [called(shares[order[:fitted]], shares[order[fitted:]]) for order in orders]
        print(row(f"{name}, {fitted} in the fit, {len(shares) - fitted} new, divided at random", results, fitted))
        for other, theirs in real.items():
            if other != name and theirs.shape == shares.shape:
                results = [called(shares[order[:fitted]], theirs[order[fitted:]]) for order in orders]
                print(row(f"{name} in the fit, {other} of other cases new", results, fitted), flush=True)


if __name__ == "__main__":
    main()
