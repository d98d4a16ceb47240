"""Slow reference implementations of the losses, written from the papers' formulas with plain loops in float64.

Nothing here is shared with the package. Every function takes the logits `(B, C, *S)`, the labels `(B, *S)` and the mask
of the voxels that count `(B, *S)` (None: all of them) and returns the terms by name; `loss` is the total. `two_class`
turns regions into labels, one two-class problem with the logits (0, z) a region.

In the comments s is the softmax, y the label, W the set of misclassified voxels, and q the prior of the neighbourhood.
"""

import itertools
import math

import numpy as np

Terms = dict[str, float]


def two_class(logits: np.ndarray, target: np.ndarray, valid: np.ndarray | None = None):
    """Regions `(B, R, *S)` and the mask `(B, *S)` as the label form: `B * R` images of two classes."""
    stacked_logits, stacked_target, stacked_valid = [], [], []
    for image in range(logits.shape[0]):
        for region in range(logits.shape[1]):
            z = logits[image, region]
            stacked_logits.append(np.stack([np.zeros_like(z), z]))
            stacked_target.append(target[image, region].astype(int))
            stacked_valid.append(np.ones(z.shape, bool) if valid is None else valid[image])
    return np.stack(stacked_logits), np.stack(stacked_target), np.stack(stacked_valid)


def voxels(logits: np.ndarray, target: np.ndarray, valid: np.ndarray | None):
    """Yield the index (image, *position), the logits (a list of C floats) and the label of every voxel that counts."""
    for index in np.ndindex(target.shape):
        if valid is None or valid[index]:
            image, *position = index
            yield index, [float(z) for z in logits[(image, slice(None), *position)]], int(target[index])


def log_softmax(z: list[float]) -> list[float]:
    top = max(z)
    log_sum = top + math.log(sum(math.exp(value - top) for value in z))
    return [value - log_sum for value in z]


def mean(values: list[float]) -> float:
    """The mean, 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def cross_entropy(logits, target, valid=None) -> float:
    return mean([-log_softmax(z)[y] for _, z, y in voxels(logits, target, valid)])


# ------------------------------------------------------------------------------------------------------------- losses


def ce(logits, target, valid=None) -> Terms:
    base = cross_entropy(logits, target, valid)
    return {"loss": base, "cross_entropy": base}


def focal(logits, target, valid=None, *, gamma=3.0) -> Terms:
    terms = []
    for _, z, y in voxels(logits, target, valid):
        log_p = log_softmax(z)[y]
        terms.append((1 - math.exp(log_p)) ** gamma * -log_p)
    return {"loss": mean(terms), "focal": mean(terms)}


def flsd(logits, target, valid=None, *, gamma=3.0) -> Terms:
    terms = []
    for _, z, y in voxels(logits, target, valid):
        log_p = log_softmax(z)[y]
        p = math.exp(log_p)
        exponent = 5.0 if p < 0.2 else 3.0 if p < 0.5 else gamma
        terms.append((1 - p) ** exponent * -log_p)
    return {"loss": mean(terms), "focal": mean(terms)}


def shannon(log_p: list[float]) -> float:
    return -sum(math.exp(value) * value for value in log_p)


def ecp(logits, target, valid=None, *, weight=0.1, class_mean=False) -> Terms:
    base = cross_entropy(logits, target, valid)
    entropy = mean([shannon(log_softmax(z)) for _, z, _ in voxels(logits, target, valid)])
    if class_mean:
        entropy /= logits.shape[1]
    return {"loss": base - weight * entropy, "cross_entropy": base, "entropy": entropy}


def ls(logits, target, valid=None, *, alpha=0.1) -> Terms:
    terms, uniform = [], []
    for _, z, y in voxels(logits, target, valid):
        log_p = log_softmax(z)
        q = [alpha / len(z) + (1 - alpha) * (c == y) for c in range(len(z))]
        terms.append(-sum(q_c * log_p_c for q_c, log_p_c in zip(q, log_p, strict=True)))
        uniform.append(-mean(log_p))
    return {"loss": mean(terms), "cross_entropy": cross_entropy(logits, target, valid), "uniform": mean(uniform)}


def svls(logits, target, valid=None, *, sigma=2.0, kernel_size=3) -> Terms:
    q = neighbourhood(target, logits.shape[1], valid, prior="gaussian", kernel_size=kernel_size, sigma=sigma)
    terms = []
    for (image, *position), z, _ in voxels(logits, target, valid):
        q_here = q[(image, slice(None), *position)]
        terms.append(-sum(q_c * log_p_c for q_c, log_p_c in zip(q_here, log_softmax(z), strict=True)))
    return {"loss": mean(terms), "soft_cross_entropy": mean(terms)}


def mbls(logits, target, valid=None, *, margin=5.0, weight=0.1, penalty="l1") -> Terms:
    base = cross_entropy(logits, target, valid)
    power = {"l1": 1, "l2": 2}[penalty]
    excess = [max(max(z) - z_c - margin, 0.0) ** power for _, z, _ in voxels(logits, target, valid) for z_c in z]
    return {"loss": base + weight * mean(excess), "cross_entropy": base, "margin": mean(excess)}


def nacl(
    logits,
    target,
    valid=None,
    *,
    weight=0.1,
    kernel_size=3,
    penalty="l1",
    on="logits",
    prior="mean",
    sigma=1.0,
    border="replicate",
    balanced=False,
) -> Terms:
    base = cross_entropy(logits, target, valid)
    q = neighbourhood(target, logits.shape[1], valid, prior, kernel_size, sigma, border)
    power = {"l1": 1, "l2": 2}[penalty]
    distances: dict[str, list[float]] = {"wrong": [], "mixed": [], "settled": []}
    for (image, *position), z, y in voxels(logits, target, valid):
        pulled = {"logits": z, "probabilities": [math.exp(value) for value in log_softmax(z)]}[on]
        shares = [q[(image, c, *position)] for c in range(len(z))]
        wrong = max(range(len(z)), key=z.__getitem__) != y
        group = "wrong" if wrong else "mixed" if max(shares) < (1 - 1e-4) * sum(shares) else "settled"
        distances[group].append(mean([abs(q_c - value) ** power for q_c, value in zip(shares, pulled, strict=True)]))
    groups = [distances["wrong"], distances["mixed"]] if balanced else [sum(distances.values(), [])]
    pull = sum(map(mean, groups))
    return {"loss": base + weight * pull, "cross_entropy": base, "penalty": pull}


def meep(logits, target, valid=None, *, weight=0.3, variant="entropy", binary=False) -> Terms:
    base, doubt = [], []
    for _, z, y in voxels(logits, target, valid):
        log_p = log_softmax(z)
        p = [math.exp(value) for value in log_p]
        base.append(mean([keras_bce(p_c, float(c == y)) for c, p_c in enumerate(p)]) if binary else -log_p[y])
        if max(range(len(z)), key=z.__getitem__) == y:
            continue
        if variant == "kl":  # KL(uniform || s) + ln C, to be made small
            doubt.append(mean(log_p))
        elif binary:
            doubt.append(mean([keras_bce(p_c, p_c) for p_c in p]))
        else:
            doubt.append(shannon(log_p))
    return {"loss": mean(base) - weight * mean(doubt), "cross_entropy": mean(base), "doubt": mean(doubt)}


def keras_bce(p: float, t: float) -> float:
    """Keras' binary cross-entropy of a probability, with its epsilon in both places: the authors' base term."""
    epsilon = 1e-7
    p = min(max(p, epsilon), 1 - epsilon)
    return -(t * math.log(p + epsilon) + (1 - t) * math.log(1 - p + epsilon))


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def cpc(logits, target, valid=None, *, discrimination_weight=0.1, exclusion_weight=1.0) -> Terms:
    base = cross_entropy(logits, target, valid)
    discrimination, exclusion = [], []
    for _, z, y in voxels(logits, target, valid):
        others = [z_c for c, z_c in enumerate(z) if c != y]
        discrimination.append(mean([softplus(z_c - z[y]) for z_c in others]))
        if len(others) > 1:
            pairs = [softplus(z_j - z_i) / 2 for z_i in others for z_j in others]
            exclusion.append(sum(pairs) / (len(others) * (len(others) - 1)))
    return {
        "loss": base + discrimination_weight * mean(discrimination) + exclusion_weight * mean(exclusion),
        "cross_entropy": base,
        "discrimination": mean(discrimination),
        "exclusion": mean(exclusion),
    }


def crac(logits, target, valid=None, *, margin=5.0, kernel_size=3, border="replicate", rho=0.1, multipliers=1e-6):
    """With the multipliers and penalty weights of the start; P is the function PHR."""
    base = cross_entropy(logits, target, valid)
    q = neighbourhood(target, logits.shape[1], valid, "mean", kernel_size, border=border)
    mixed = boundary(target, valid, kernel_size, border)
    terms = []
    for (image, *position), z, _ in voxels(logits, target, valid):
        scale = 1.0 if mixed[(image, *position)] else margin
        for c, z_c in enumerate(z):
            h = abs(scale * q[(image, c, *position)] - z_c)
            raised = ((multipliers + rho * h) ** 2 - multipliers**2) / (2 * rho)
            terms += [raised if multipliers + rho * h >= 0 else -(multipliers**2) / (2 * rho), 0.0]
    return {"loss": base + mean(terms), "cross_entropy": base, "penalty": mean(terms)}


def ace(
    logits,
    target,
    valid=None,
    *,
    weight=1.0,
    bins=20,
    soft=False,
    ignore_absent_classes=True,
    include_background=True,
) -> Terms:
    base = cross_entropy(logits, target, valid)
    width = (1 + 2**-23) / bins
    errors = []
    for image in range(target.shape[0]):
        seen = [(z, y) for index, z, y in voxels(logits, target, valid) if index[0] == image]
        if not seen:
            continue
        for c in range(0 if include_background else 1, logits.shape[1]):
            weights, gaps = np.zeros(bins), np.zeros(bins)
            for z, y in seen:
                p = math.exp(log_softmax(z)[c])
                for k, share in shares(p, bins, width, soft):
                    weights[k] += share
                    gaps[k] += share * (p - (y == c))
            filled = weights >= 0.01 if soft else weights > 0
            absent = all(y != c for _, y in seen)
            of_bins = np.abs(gaps[filled]) / weights[filled]
            errors.append(0.0 if absent and ignore_absent_classes else float(of_bins.mean()))
    error = mean(errors)
    return {"loss": base + weight * error, "cross_entropy": base, "calibration_error": error}


def shares(p: float, bins: int, width: float, soft: bool) -> list[tuple[int, float]]:
    """The bins that get a probability, and how much of it."""
    if not soft:
        return [(next(k for k in range(bins) if p <= (k + 1) * width), 1.0)]
    centres = [(k + 0.5) * width for k in range(bins)]
    if p <= centres[0]:
        return [(0, 1.0)]
    if p >= centres[-1]:
        return [(bins - 1, 1.0)]
    upper = next(k for k in range(bins) if p <= centres[k])
    share = (p - centres[upper - 1]) / width
    return [(upper - 1, 1 - share), (upper, share)]


def dca(logits, target, valid=None, *, weight=10.0) -> Terms:
    base = cross_entropy(logits, target, valid)
    confidence, correct = [], []
    for _, z, y in voxels(logits, target, valid):
        confidence.append(math.exp(max(log_softmax(z))))
        correct.append(float(max(range(len(z)), key=z.__getitem__) == y))
    difference = abs(mean(correct) - mean(confidence))
    return {"loss": base + weight * difference, "cross_entropy": base, "difference": difference}


# ---------------------------------------------------------------------------------------------- neighbourhood's prior


def neighbourhood(
    target, classes, valid=None, prior="mean", kernel_size=3, sigma=1.0, border="replicate"
) -> np.ndarray:
    """The soft labels q `(B, C, *S)` of NACL and SVLS; zero at voxels that do not count."""
    axes = target.ndim - 1
    kernel = (kernel_size,) * axes if isinstance(kernel_size, int) else tuple(kernel_size)
    valid = np.ones(target.shape, bool) if valid is None else valid
    soft = {"mean": mean_prior, "gaussian": erf_prior if border == "zero" else gaussian_prior}[prior]
    q = np.zeros((target.shape[0], classes, *target.shape[1:]))
    for image in range(target.shape[0]):
        for position in np.ndindex(target.shape[1:]):
            if valid[(image, *position)]:
                here = (image, slice(None), *position)
                q[here] = soft(target[image], valid[image], position, classes, kernel, sigma, border)
    return q


def offsets(kernel):
    """The steps of a window with `kernel` voxels along the axes."""
    return itertools.product(*(range(-(size // 2), size // 2 + 1) for size in kernel))


def clamped(position, step, shape):
    return tuple(min(max(p + d, 0), size - 1) for p, d, size in zip(position, step, shape, strict=True))


def inside(position, step, shape):
    """The neighbour's position, or None when it lies outside the image."""
    moved = tuple(p + d for p, d in zip(position, step, strict=True))
    return moved if all(0 <= m < size for m, size in zip(moved, shape, strict=True)) else None


def mean_prior(labels, valid, position, classes, kernel, sigma, border):
    """The share of each class in the window; outside, `border` decides; ignored voxels leave the denominator."""
    counts, total = np.zeros(classes), 0
    for step in offsets(kernel):
        neighbour = inside(position, step, labels.shape)
        if neighbour is None and border == "background":
            counts[0] += 1
            total += 1
            continue
        if neighbour is None and border == "zero":
            total += 1
            continue
        neighbour = clamped(position, step, labels.shape)
        if valid[neighbour]:
            counts[labels[neighbour]] += 1
            total += 1
    return counts / total


def boundary(target, valid, kernel_size=3, border="replicate") -> np.ndarray:
    """Where the window holds more than one label among the voxels that count."""
    axes = target.ndim - 1
    kernel = (kernel_size,) * axes if isinstance(kernel_size, int) else tuple(kernel_size)
    valid = np.ones(target.shape, bool) if valid is None else valid
    mixed = np.zeros(target.shape, bool)
    for image, *position in np.ndindex(target.shape):
        found = set()
        for step in offsets(kernel):
            neighbour = inside(position, step, target.shape[1:])
            if neighbour is None and border == "background":
                found.add(0)
            elif neighbour is not None and valid[(image, *neighbour)]:
                found.add(int(target[(image, *neighbour)]))
        mixed[(image, *position)] = len(found) > 1
    return mixed


def gaussian_prior(labels, valid, position, classes, kernel, sigma, border):
    """SVLS: w onehot(centre) + (1 - w) Gaussian-weighted mean of the valid neighbours, replicate padding, w = 1/2.

    The NACL authors (`border="background"`) take the neighbours' sum from the kernel's index [1, 1]: with g the
    normalised Gaussian, w = (1 - g[1, 1]) / (1 - g[1, 1] + 1 - g[centre]), 1/2 for a kernel of 3, 0.5288 for 5 with
    sigma 1.
    """
    gauss = {step: math.exp(-sum(d * d for d in step) / (2 * sigma**2)) for step in offsets(kernel)}
    total = sum(gauss.values())
    gauss = {step: value / total for step, value in gauss.items()}
    centre = (0,) * labels.ndim
    half = 0.5
    if border == "background" and len(gauss) > 1:
        corner = tuple(min(1, size // 2) - size // 2 for size in kernel)
        half = (1 - gauss[corner]) / (1 - gauss[corner] + 1 - gauss[centre])
    onehot = np.eye(classes)
    neighbours, weight = np.zeros(classes), 0.0
    for step, value in gauss.items():
        neighbour = clamped(position, step, labels.shape)
        if step != centre and valid[neighbour]:
            neighbours += value * onehot[labels[neighbour]]
            weight += value
    if weight == 0:
        return onehot[labels[position]]
    return half * onehot[labels[position]] + (1 - half) * neighbours / weight


def erf_prior(labels, valid, position, classes, kernel, sigma, border):
    """MONAI: the Gaussian integrated over each voxel, cut at 4 sigma, not renormalised; `kernel` plays no part."""
    reach = int(max(4 * sigma, 0.5) + 0.5)

    def tap(d):
        return 0.5 * (math.erf((d + 0.5) / (sigma * math.sqrt(2))) - math.erf((d - 0.5) / (sigma * math.sqrt(2))))

    sums, ignored = np.zeros(classes), 0.0
    for neighbour in np.ndindex(labels.shape):
        step = [n - p for n, p in zip(neighbour, position, strict=True)]
        if max(map(abs, step)) > reach:
            continue
        weight = math.prod(tap(d) for d in step)
        if valid[neighbour]:
            sums[labels[neighbour]] += weight
        else:
            ignored += weight
    return sums / (1 - ignored)


NAIVE = {
    "ce": ce,
    "focal": focal,
    "flsd": flsd,
    "ecp": ecp,
    "ls": ls,
    "svls": svls,
    "mbls": mbls,
    "nacl": nacl,
    "meep": meep,
    "cpc": cpc,
    "crac": crac,
    "ace": ace,
    "dca": dca,
}
