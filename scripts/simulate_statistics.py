"""How often intervals hold the true mean, and how often a family of true null hypotheses is rejected.

python scripts/simulate_statistics.py
"""

import numpy as np

from nnunet_calib.report.statistics import holm, sign_flip_p, spreads, wilcoxon_p

CASES = (20, 60, 200)
SAMPLES = 2000


def samples(kind: str, n: int, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """Float (n, SAMPLES) and their true mean."""
    size = (n, SAMPLES)
    if kind == "normal":
        return rng.normal(0, 1, size), 0.0
    if kind == "like Dice":
        return rng.beta(8, 1.2, size), 8 / 9.2
    if kind == "like ECE":
        return rng.gamma(2, 0.05, size), 0.1
    if kind == "heavy tail":
        return rng.lognormal(0, 0.8, size), float(np.exp(0.32))
    hard = rng.gamma(2, 0.05, size)
    return 0.2 * hard + rng.gamma(2, 0.02, size) - rng.gamma(2, 0.02, size), 0.02


def rejected(n: int, rng: np.random.Generator, trials: int = 2000, family: int = 6) -> tuple[float, float]:
    """Share of families of true null hypotheses with a p of at most 0.05 after Holm: Wilcoxon, sign flips."""
    hard = rng.gamma(2, 0.05, (n, trials, 1))
    difference = hard * (rng.gamma(2, 0.1, (n, trials, family)) - rng.gamma(2, 0.1, (n, trials, family)))
    difference += 0.01 * rng.normal(size=(n, trials, 1))
    flips = sign_flip_p(difference.reshape(n, -1), flips=1999).reshape(trials, family)
    by_ranks = [min(holm([wilcoxon_p(d) for d in difference[:, trial].T])) <= 0.05 for trial in range(trials)]
    return float(np.mean(by_ranks)), float(np.mean([min(holm(row)) <= 0.05 for row in flips]))


def main() -> None:
    rng = np.random.default_rng(1)
    for kind in ("normal", "like Dice", "like ECE", "heavy tail", "paired difference"):
        cells = []
        for n in CASES:
            values, truth = samples(kind, n, rng)
            found = spreads(values)
            held = [
                np.mean([interval[0] <= truth <= interval[1] for interval in intervals])
                for intervals in ([of.t_interval for of in found], [of.bca_interval for of in found])
            ]
            cells.append(f"{held[0]:.3f} / {held[1]:.3f}")
        print(f"| {kind} | {' | '.join(cells)} |", flush=True)
    for n in CASES:
        print(f"n = {n}: families rejected by Wilcoxon, sign flips:", *rejected(n, rng), flush=True)


if __name__ == "__main__":
    main()
