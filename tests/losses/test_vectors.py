"""The authors' own values: the shared file of vectors, and a small table that needs no file."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_calib.losses import LOSSES
from nnunet_calib.losses.neighbours import Neighbourhood, SoftTarget

from . import naive
from .cases import Case, Problem

FILE = Path(__file__).parents[2].parent / "shared" / "vectors" / "losses.json"
DOCUMENT = json.loads(FILE.read_text()) if FILE.is_file() else {"inputs": {}, "vectors": []}
absent = pytest.mark.skipif(not DOCUMENT["vectors"], reason=f"the vectors of the authors' code are not there: {FILE}")

# The file rounds to six decimals.
ROUNDED = {"rel": 1e-5, "abs": 6e-7}

# How the file names a term of ours.
TERMS = {
    "ce": "cross_entropy",
    "margin": "margin",
    "penalty": "penalty",
    "entropy_mean_over_NxC": "entropy",
    "reg": "doubt",
    "bdc": "discrimination",
    "bec": "exclusion",
}

# Losses of the file that are not in this folder, or that have a test of their own.
ELSEWHERE = {
    "MbLS-L2(authors)",
    "NACL soft target",
    "NACL soft target (MONAI)",
    "SVLS normalised kernel",
    "CE+Dice",
    "MbLS-L1+Dice",
    "BCE - lambda*ME",
    "CRaC penalty (phr)",
    "hard mL1-ACE",
    "soft mL1-ACE",
    "hard mL1-ACE + Dice + CE (0.33 each)",
    "hard/soft mL1-ACE on probabilities",
    "TEMPERATURE grid 0.1..10 step 0.1",
    "ENSEMBLE TS (T in [0.05,5], w on simplex)",
}


def case_of(vector: dict) -> Case | None:
    """Our loss and its options for a vector; None if it is not one of these losses."""
    params = vector["params"]
    match vector["loss"]:
        case "CE":
            return "ce", {}
        case "Focal":
            return "focal", {"gamma": params["gamma"]}
        case "FLSD":
            return "flsd", {"gamma": params["gamma_high_conf"]}
        case "ECP":
            return "ecp", {"weight": params["alpha"], "class_mean": True}
        case "LS":
            return "ls", {"alpha": params["alpha"]}
        case "MbLS-L1":
            return "mbls", {"margin": params["margin"], "weight": params["alpha"]}
        case "SVLS2D" | "SVLS3D":
            return "svls", {"sigma": params["sigma"], "kernel_size": params["ksize"]}
        case "NACL(authors 2D)" | "NACL(MONAI)":
            return "nacl", {
                "weight": params["alpha"],
                "kernel_size": params["kernel_size"],
                "penalty": params["distance_type"],
                "on": "probabilities" if params.get("is_softmax") else "logits",
                "prior": params["kernel_ops"],
                "sigma": params["sigma"],
                "border": "zero" if "MONAI" in vector["loss"] else "background",
            }
        case "BCE - lambda*MEEP":
            return "meep", {"weight": params["lamb"], "binary": True}
        case "BCE - lambda*MEEP_KL":
            return "meep", {"weight": params["lamb"], "binary": True, "variant": "kl"}
        case "CPC(CALS reimpl)":
            weights = params["lambd_bdc"], params["lambd_bec"]
            return "cpc", dict(zip(("discrimination_weight", "exclusion_weight"), weights, strict=True))
        case "DCA":
            return "dca", {"weight": params["beta"]}
    return None


def vectors(*losses: str) -> list:
    """The vectors of these losses as parameters, of all of ours if none is named; a skipped one without the file."""
    chosen = [v for v in DOCUMENT["vectors"] if (v["loss"] in losses if losses else case_of(v) is not None)]
    return [pytest.param(v, id=v["id"]) for v in chosen] or [pytest.param(None, marks=absent, id="no-file")]


def given(vector: dict, dtype: torch.dtype = torch.float32) -> Problem:
    entry = DOCUMENT["inputs"][vector["input"]]
    return Problem("labels", torch.tensor(entry["logits"], dtype=dtype), torch.tensor(entry["target"])[:, None], None)


@absent
def test_no_vector_of_these_losses_is_left_out():
    unused = {v["loss"] for v in DOCUMENT["vectors"] if case_of(v) is None and not v["loss"].startswith("METRIC")}
    assert {loss for loss in unused if not loss.startswith("Lagrangian")} == ELSEWHERE
    assert len(vectors()) == 107


@pytest.mark.parametrize("vector", vectors())
def test_value_parts_and_gradient_are_the_authors(vector):
    case, problem = case_of(vector), given(vector)
    value, gradient = problem.gradient(case)
    if vector["value"] == "nan":  # nothing misclassified: 0 / 0 in the authors' code, the base term alone in ours
        expected = problem.naive(case)
        assert value.item() == pytest.approx(expected["cross_entropy"], rel=1e-5)
        assert gradient.isfinite().all()
        return
    assert value.item() == pytest.approx(vector["value"], **ROUNDED)
    assert gradient.norm().item() == pytest.approx(vector["grad_l2"], **ROUNDED)
    parts = problem.loss(case).parts(problem.logits, problem.target)
    for term in TERMS.keys() & vector.get("terms", {}).keys():
        assert parts[TERMS[term]].item() == pytest.approx(vector["terms"][term], **ROUNDED), term


@pytest.mark.parametrize("vector", vectors())
def test_the_naive_reference_is_the_authors(vector):
    expected = given(vector, torch.float64).naive(case_of(vector))
    if vector["value"] == "nan":
        return
    assert expected["loss"] == pytest.approx(vector["value"], **ROUNDED)
    for term in TERMS.keys() & vector.get("terms", {}).keys():
        assert expected[TERMS[term]] == pytest.approx(vector["terms"][term], **ROUNDED), term


# ------------------------------------------------------------------------------- where the default differs on purpose


@pytest.mark.parametrize("vector", vectors("MbLS-L2(authors)"))
def test_mbls_l2_is_the_hinge_squared_and_not_the_authors(vector):
    problem, params = given(vector, torch.float64), vector["params"]
    gap = problem.logits.amax(dim=1, keepdim=True) - problem.logits
    authors = ((gap - params["margin"]) ** 2).mean().item()  # their relu comes after the square and does nothing
    assert authors == pytest.approx(vector["terms"]["margin"], **ROUNDED)

    case = ("mbls", {"margin": params["margin"], "weight": params["alpha"], "penalty": "l2"})
    value = problem.value(case).item()
    assert value == pytest.approx(problem.naive(case)["loss"], rel=1e-6)
    assert value < vector["value"] - 1e-3


@pytest.mark.parametrize("vector", vectors("ECP"))
def test_ecp_by_default_does_not_divide_the_entropy_by_the_classes(vector):
    problem, terms = given(vector), vector["terms"]
    expected = terms["ce"] - 0.1 * 3 * terms["entropy_mean_over_NxC"]
    assert problem.value(("ecp", {})).item() == pytest.approx(expected, rel=1e-5)


@absent
@pytest.mark.parametrize(
    ("border", "value"),
    [
        ("background", 1.808759),  # the authors', vector NACL(authors 2D)|K2
        ("zero", 1.805119),  # MONAI's, vector NACL(MONAI)|K2
        ("replicate", 1.807164),  # ours, from the naive reference
    ],
)
def test_nacl_borders_differ_where_a_structure_touches_the_edge(border, value):
    problem = given({"input": "K2"})
    assert problem.value(("nacl", {"border": border})).item() == pytest.approx(value, **ROUNDED)


# ------------------------------------------------------------------------------------ calibration error alone, and CRaC


def gradient_norm(term: torch.Tensor, logits: torch.Tensor) -> float:
    return torch.autograd.grad(term, logits)[0].norm().item()


@pytest.mark.parametrize("vector", vectors("hard mL1-ACE", "soft mL1-ACE"))
def test_calibration_error_is_the_authors(vector):
    problem, params = given(vector), vector["params"]
    case = (
        "ace",
        {
            "bins": params["num_bins"],
            "soft": vector["loss"].startswith("soft"),
            "ignore_absent_classes": params["ignore_empty_classes"],
            "include_background": params["include_background"],
        },
    )
    logits = problem.logits.requires_grad_()
    error = problem.loss(case).parts(logits, problem.target)["calibration_error"]
    assert error.item() == pytest.approx(vector["value"], **ROUNDED)
    assert gradient_norm(error, logits) == pytest.approx(vector["grad_l2"], **ROUNDED)
    assert given(vector, torch.float64).naive(case)["calibration_error"] == pytest.approx(vector["value"], **ROUNDED)


@pytest.mark.parametrize("vector", vectors("hard/soft mL1-ACE on probabilities"))
def test_calibration_error_of_certain_and_of_undecided_voxels_is_the_authors(vector):
    certain = 300.0  # the softmax of logits 600 apart is 0 and 1
    p, y = (torch.tensor(vector["params"][key])[:, :, None] for key in "pt")
    logits = torch.where(p == 0.5, 0.0, torch.where(p == 1, certain, -certain))
    for soft in (False, True):
        loss = LOSSES["ace"](soft=soft, bins=vector["params"]["num_bins"])
        error = loss.parts(logits, y.argmax(dim=1, keepdim=True))["calibration_error"]
        assert error.item() == pytest.approx(vector["value"]["soft" if soft else "hard"], **ROUNDED)


def crac(vector: dict, classes: int, **options) -> torch.nn.Module:
    """The loss with the vector's multiplier everywhere."""
    loss = LOSSES["crac"](rho=vector["params"]["rho"], **options)
    start = {"previous": torch.zeros(2, classes), "updates": torch.tensor(1)}
    names = {"multipliers": "lambd", "rho": "rho"}
    loss.load_state_dict(start | {name: torch.full((2, classes), vector["params"][key]) for name, key in names.items()})
    return loss


@pytest.mark.parametrize("vector", vectors("CRaC penalty (phr)"))
def test_crac_is_the_authors_but_for_their_boundary(vector, monkeypatch):
    problem, params = given(vector), vector["params"]
    logits = problem.logits.requires_grad_()
    loss = crac(vector, logits.shape[1], margin=params["margin"], border="background")
    ours = loss.parts(logits, problem.target)["penalty"].item()
    expected = given(vector, torch.float64).naive(
        ("crac", {"border": "background", "rho": params["rho"], "multipliers": params["lambd"]})
    )
    assert ours == pytest.approx(expected["penalty"], rel=1e-5)

    # Theirs: the window's labels sum to other than 9 times their mean, which only rounding makes true.
    window = torch.nn.functional.unfold(problem.target.float(), 3, padding=1)
    rounded = (window.mean(dim=1, keepdim=True) - window).sum(dim=1).reshape(problem.target.shape) != 0
    monkeypatch.setattr("nnunet_calib.losses.crac._boundary", lambda *_: rounded.float())
    penalty = loss.parts(logits, problem.target)["penalty"]
    assert penalty.item() == pytest.approx(vector["value"], **ROUNDED)
    assert gradient_norm(penalty, logits) == pytest.approx(vector["grad_l2"], **ROUNDED)
    assert abs(ours - vector["value"]) > 1e-3


@pytest.mark.parametrize(
    "vector",
    [p for p in vectors("Lagrangian penalty phr") if p.values[0] is None or p.values[0]["params"]["h"] >= 0],
)
def test_crac_raises_a_violation_as_the_authors_do(vector):
    # One voxel and margin 0: the violations are the logits (h, 0), of 2 x 2 constraints two are empty.
    logits = torch.tensor([vector["params"]["h"], 0.0]).reshape(1, 2, 1, 1).requires_grad_()
    penalty = 4 * crac(vector, 2, margin=0.0).parts(logits, torch.zeros(1, 1, 1, 1).long())["penalty"]
    assert penalty.item() == pytest.approx(vector["value"], rel=1e-5)
    assert torch.autograd.grad(penalty, logits)[0][0, 0].item() == pytest.approx(vector["grad"], rel=1e-5)


# ------------------------------------------------------------------------------------------- soft targets and kernels


def soft_target(target: torch.Tensor, classes: int, neighbourhood: Neighbourhood) -> torch.Tensor:
    q = SoftTarget(target, None, neighbourhood, torch.float32)
    return torch.cat([q.channel(c) for c in range(classes)], dim=1)


@pytest.mark.parametrize("vector", vectors("NACL soft target", "NACL soft target (MONAI)"))
def test_soft_target_is_the_authors(vector):
    border = "zero" if "MONAI" in vector["loss"] else "background"
    window = Neighbourhood(vector["params"]["kernel_size"], vector["params"]["kernel_ops"], 1.0, border)
    actual = soft_target(given(vector).target, 3, window)
    torch.testing.assert_close(actual, torch.tensor(vector["value"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vector", vectors("SVLS normalised kernel"))
def test_a_lone_voxel_shows_the_authors_kernel(vector):
    kernel = torch.tensor(vector["value"])
    sigma = 2.0 if vector["params"]["which"].endswith("s2") else 1.0
    border = "background" if "NACL" in vector["params"]["which"] else "replicate"
    target = torch.zeros((1, 1, *(9,) * kernel.ndim), dtype=torch.int64)
    target[(0, 0, *(4,) * kernel.ndim)] = 1
    q = soft_target(target, 2, Neighbourhood(kernel.shape[0], "gaussian", sigma, border))[0, 1]
    reach = slice(4 - kernel.shape[0] // 2, 5 + kernel.shape[0] // 2)
    torch.testing.assert_close(q[(reach,) * kernel.ndim], kernel, rtol=1e-5, atol=1e-7)


# --------------------------------------------------------------------------------------------- a table without a file

LOGITS = [
    [[[2.0, -1.0, 0.5], [0.0, 3.0, -2.5]], [[1.0, 0.5, -0.5], [-4.0, 1.5, 2.0]], [[-1.0, 2.5, 0.0], [1.0, 0.5, 4.0]]]
]
LABELS = [[[[0, 2, 2], [1, 0, 1]]]]
VALID = [[[[1, 1, 0], [1, 1, 1]]]]
REGIONS = [[[[1, 1, 0], [0, 1, 0]], [[1, 0, 0], [0, 1, 1]], [[0, 1, 1], [0, 0, 1]]]]

# Labels, labels with the third voxel of the first row ignored, regions; computed with naive.py.
TABLE: list[tuple[Case, float, float, float]] = [
    (("ce", {}), 1.5658758, 1.6429970, 0.4851992),
    (("focal", {}), 1.1834448, 1.3416386, 0.1079832),
    (("flsd", {}), 1.1206007, 1.2662257, 0.1079832),
    (("ecp", {}), 1.5012856, 1.5858926, 0.4380862),
    (("ecp", {"class_mean": True}), 1.5443457, 1.6239622, 0.4616427),
    (("ls", {}), 1.6047647, 1.6896637, 0.5421436),
    (("svls", {}), 1.7370938, 1.9668569, 0.7255433),
    (("svls", {"sigma": 1.0, "kernel_size": (1, 3)}), 1.9825425, 2.3179970, 0.7629769),
    (("mbls", {"margin": 1.0}), 1.6658758, 1.7629970, 0.5226992),
    (("mbls", {"margin": 1.0, "penalty": "l2"}), 1.9047647, 2.0496637, 0.5650603),
    (("nacl", {"border": "replicate", "prior": "mean"}), 1.7137153, 1.8106690, 0.5801066),
    (("nacl", {"border": "background", "prior": "mean"}), 1.7155672, 1.8179970, 0.5943041),
    (("nacl", {"border": "zero", "prior": "mean"}), 1.7137153, 1.8138304, 0.5702300),
    (("nacl", {"border": "replicate", "prior": "gaussian"}), 1.7115249, 1.8065288, 0.5768658),
    (("nacl", {"border": "background", "prior": "gaussian"}), 1.7115249, 1.8065288, 0.5768658),
    (("nacl", {"border": "zero", "prior": "gaussian"}), 1.7154558, 1.8152872, 0.5697688),
    (("nacl", {"on": "probabilities"}), 1.5946701, 1.6763792, 0.5107916),
    (("nacl", {"penalty": "l2"}), 1.9197681, 2.0738340, 0.6644773),
    (("nacl", {"prior": "gaussian", "border": "background", "kernel_size": 5}), 1.7108314, 1.8056227, 0.5768468),
    (("meep", {}), 1.3653322, 1.4952103, 0.2928944),
    (("meep", {"variant": "kl"}), 2.2118788, 2.4349610, 0.7097942),
    (("meep", {"binary": True}), 0.6965140, 0.7485330, 0.2928943),
    (("cpc", {}), 2.6716670, 2.8048240, 0.5337191),
    (("cpc", {"discrimination_weight": 1.0}), 3.6774039, 3.8813745, 0.9703983),
    (("crac", {"margin": 2.0}), 1.6543496, 1.7507071, 0.5300192),
    (("crac", {"margin": 2.0, "border": "background"}), 1.6568531, 1.7539913, 0.5357034),
    (("ace", {}), 1.9307316, 1.9606598, 0.8130250),
    (("ace", {"soft": True}), 1.9468273, 1.9830929, 0.8404760),
    (("ace", {"include_background": False}), 1.9815417, 2.0182791, 0.8130250),
    (("dca", {}), 3.9710530, 3.5162489, 1.4619356),
]


@pytest.mark.parametrize(("case", "labels", "ignoring", "regions"), TABLE, ids=str)
def test_small_table(case, labels, ignoring, regions):
    logits = torch.tensor(LOGITS)
    on_labels = Problem("labels", logits, torch.tensor(LABELS), None)
    masked = Problem("labels", logits, torch.tensor(LABELS), torch.tensor(VALID).bool())
    on_regions = Problem("regions", logits, torch.tensor(REGIONS).bool(), None)
    actual = [problem.value(case).item() for problem in (on_labels, masked, on_regions)]
    assert actual == pytest.approx([labels, ignoring, regions], rel=1e-5)


def test_two_losses_are_those_of_torch():
    problem = Problem("labels", torch.tensor(LOGITS), torch.tensor(LABELS), None)
    for key, smoothing in (("ce", 0.0), ("ls", 0.1)):
        torchs = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(problem.logits, problem.target[:, 0])
        torch.testing.assert_close(problem.value((key, {})), torchs)


def test_by_hand():
    """One voxel of probabilities (3/4, 1/4) and label 1, wrong: every formula on the back of an envelope."""
    problem = Problem("labels", torch.tensor([3.0, 1.0]).log().reshape(1, 2, 1, 1), torch.ones(1, 1, 1, 1).long(), None)
    entropy = 0.75 * np.log(4 / 3) + 0.25 * np.log(4)
    expected = {
        "ce": np.log(4),
        "focal": 0.75**3 * np.log(4),
        "flsd": 0.75**3 * np.log(4),
        "ecp": np.log(4) - 0.1 * entropy,
        "ls": 0.95 * np.log(4) + 0.05 * np.log(4 / 3),
        "svls": np.log(4),
        "mbls": np.log(4),
        "nacl": np.log(4) + 0.1 * (np.log(3) + 1) / 2,
        "meep": np.log(4) - 0.3 * entropy,
        "cpc": 1.1 * np.log(4),
        "crac": np.log(4) + (1e-6 * (np.log(3) + 5) + 0.05 * (np.log(3) ** 2 + 25)) / 4,
        "ace": np.log(4) + 0.75 / 2,
        "dca": np.log(4) + 7.5,
    }
    assert expected.keys() == naive.NAIVE.keys() == LOSSES.keys()
    for key, value in expected.items():
        assert problem.value((key, {})).item() == pytest.approx(value, rel=1e-6), key
