"""What reliability.json holds of a case is what was counted, to the last bit."""

import dataclasses
import json

import numpy as np
import pytest

from nnunet_calib.evaluation.write import statistics_as_json, statistics_from_json
from nnunet_calib.metrics import calibration_statistics, scores

from ..folders import ambiguous


@pytest.mark.parametrize("multilabel", [False, True])
def test_statistics_survive_json_exactly(multilabel):
    labels, p = ambiguous(0, (8, 9, 10))
    masks = {"volume": labels >= 0, "reference_foreground": labels != 0, "nothing": labels > 5}
    counted, _ = calibration_statistics(p, labels, range(3), masks, multilabel=multilabel)
    read = statistics_from_json(json.loads(statistics_as_json(counted)))
    assert read.keys() == counted.keys()
    for region, expected in counted.items():
        np.testing.assert_equal(dataclasses.asdict(read[region]), dataclasses.asdict(expected))
        np.testing.assert_equal(scores(read[region], "012"), scores(expected, "012"))
