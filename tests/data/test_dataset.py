"""dataset.json: nnU-Net's own reading of labels and regions, and one line for what it would refuse."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_calib.data.dataset import find_model_file, key, read_dataset, require_dataset_json
from nnunet_calib.data.errors import InputError, UsageError

LABELS = {"background": 0, "anterior": 1, "posterior": 2}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}


@pytest.fixture
def write(tmp_path):
    def _write(labels, **content):
        path = tmp_path / "dataset.json"
        path.write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"} | content))
        return path

    return _write


def test_labels(write):
    dataset = read_dataset(write(LABELS))
    assert dataset.labels == dataset.channels == (0, 1, 2)
    assert dataset.structures == (1, 2)
    assert not dataset.has_regions
    assert dataset.ignore_label is None
    assert dataset.names == {"0": "background", "1": "anterior", "2": "posterior"}
    assert dataset.file_ending == ".nii.gz"


def test_regions_with_ignore_label_are_those_of_nnunet(write):
    dataset = read_dataset(write(REGIONS, regions_class_order=[1, 2, 3]))
    manager = LabelManager(REGIONS, [1, 2, 3])
    assert [key(s) for s in dataset.structures] == [key(r) for r in manager.foreground_regions]
    assert [key(s) for s in dataset.structures] == ["(1, 2, 3)", "(2, 3)", "3"]
    assert dataset.channels == dataset.structures
    assert dataset.region_order == (1, 2, 3)
    assert dataset.ignore_label == 4
    assert dataset.labels == (0, 1, 2, 3)
    assert dataset.names["(2, 3)"] == "core"


VALUES = st.one_of(st.integers(0, 5), st.lists(st.integers(0, 5), min_size=1, max_size=3))


@given(
    st.dictionaries(st.sampled_from("abcd"), VALUES, min_size=1),
    st.one_of(st.none(), st.integers(1, 6)),
    st.one_of(st.none(), st.lists(st.integers(1, 5), max_size=4)),
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_labels_are_read_as_nnunets_label_manager_reads_them(tmp_path_factory, values, ignore, order):
    labels = {"background": 0, **values} | ({} if ignore is None else {"ignore": ignore})
    path = tmp_path_factory.getbasetemp() / "labels.json"
    path.write_text(json.dumps({"labels": labels, "regions_class_order": order, "file_ending": ".nii.gz"}))
    try:
        theirs = LabelManager(labels, order)
    except AssertionError:
        with pytest.raises(InputError, match="nnU-Net refuses these labels"):
            read_dataset(path)
        return
    structures = theirs.foreground_regions if theirs.has_regions else theirs.foreground_labels
    if not structures:
        return
    dataset = read_dataset(path)
    assert dataset.labels == tuple(theirs.all_labels)
    assert dataset.structures == tuple(structures)
    assert dataset.channels == tuple(theirs.foreground_regions if theirs.has_regions else theirs.all_labels)
    assert dataset.region_order == (tuple(order) if theirs.has_regions else None)
    assert dataset.ignore_label == theirs.ignore_label


@pytest.mark.parametrize(
    ("labels", "content", "message"),
    [
        ({"a": 1}, {}, "'background': 0"),
        ({"background": 1, "a": 2}, {}, "'background': 0"),
        ([0, 1], {}, "'background': 0"),
        ({"background": 0}, {}, "nothing to score"),
        ({"background": 0, "a": "1"}, {}, "label 'a' must be an integer"),
        ({"background": 0, "a": 1.5}, {}, "label 'a' must be an integer"),
        ({"background": 0, "a": -1}, {}, "label 'a' must be an integer"),
        ({"background": 0, "a": []}, {}, "label 'a' must be an integer"),
        ({"background": 0, "a": 1, "ignore": 1}, {}, "nnU-Net refuses these labels: .*ignore label"),
        ({"background": 0, "whole": [1, 2], "core": 2}, {}, "nnU-Net refuses these labels: .*regions_class_order"),
        (LABELS, {"file_ending": None}, "'file_ending'"),
    ],
)
def test_labels_that_make_no_sense_are_refused_in_one_line(write, labels, content, message):
    path = write(labels, **content)
    with pytest.raises(InputError, match=message) as caught:
        read_dataset(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not valid JSON"), ("[]", "JSON object"), (None, "cannot be read")]
)
def test_a_file_that_is_no_dataset_json(tmp_path, text, message):
    path = tmp_path / "dataset.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_dataset(path)


def test_a_label_manager_nnunet_does_not_have(write, tmp_path):
    plans = tmp_path / "plans.json"
    plans.write_text('{"label_manager": "NoSuchManager"}')
    with pytest.raises(InputError, match="NoSuchManager"):
        read_dataset(write(LABELS), plans)
    plans.write_text('{"label_manager": 5}')
    with pytest.raises(InputError, match=r"plans\.json: nnU-Net has no label manager 5"):
        read_dataset(write(LABELS), plans)
    plans.write_text('{"label_manager": "LabelManager"}')
    assert read_dataset(write(LABELS), plans).labels == (0, 1, 2)


def test_found_where_nnunet_leaves_it(tmp_path):
    validation, labels = tmp_path / "model" / "fold_0" / "validation", tmp_path / "raw" / "labelsTs"
    validation.mkdir(parents=True)
    labels.mkdir(parents=True)
    with pytest.raises(UsageError, match="-djfile"):
        require_dataset_json(validation, labels)
    for place in (labels.parent, validation.parent.parent, validation):
        (place / "dataset.json").write_text("{}")
        assert require_dataset_json(validation, labels) == place / "dataset.json"
    assert find_model_file("plans.json", validation) is None
