"""What a data set's ``dataset.json`` says of its labels, as nnU-Net reads it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_calib.data.errors import InputError, UsageError
from nnunet_calib.data.files import read_json

Structure = int | tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """Labels of a data set and of the models trained on it.

    Attributes:
        path: the ``dataset.json`` all this comes from.
        content: its content.
        file_ending: of images and label maps, such as ``.nii.gz``.
        labels: every label value but the ignore label, background (0) included, ascending.
        structures: what is scored: foreground labels or, if the model has regions, the regions.
        channels: what each channel of a probability file predicts: the labels, or the regions.
        region_order: label written for each region (``regions_class_order``); None without regions.
        ignore_label: reference label of voxels that do not count; None if there is none.
        names: name of each structure, by ``key``.
    """

    path: Path
    content: dict[str, Any]
    file_ending: str
    labels: tuple[int, ...]
    structures: tuple[Structure, ...]
    channels: tuple[Structure, ...]
    region_order: tuple[int, ...] | None
    ignore_label: int | None
    names: dict[str, str]

    @property
    def has_regions(self) -> bool:
        """The model predicts overlapping regions (sigmoid), not exclusive labels (softmax)."""
        return self.region_order is not None


def key(structure: Structure) -> str:
    """Name of a label or region in records, as nnU-Net writes it: ``1`` or ``(1, 2)``."""
    return str(structure)


def read_dataset(dataset_json: Path, plans: Path | None = None) -> Dataset:
    """Read and check a ``dataset.json``.

    Args:
        dataset_json: the file.
        plans: the ``plans.json`` of the model; only needed where it names a label manager of its own.

    Raises:
        InputError: a file that cannot be read, or labels nnU-Net would refuse; one line, naming the file.
    """
    content = read_json(dataset_json)
    labels = _checked_labels(content, dataset_json)
    manager = _label_manager(content, dataset_json, plans)
    structures = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    of_value = {_structure(value): name for name, value in labels.items()}
    values = tuple(int(label) for label in manager.all_labels)
    scored = tuple(_structure(structure) for structure in structures)
    if not scored:
        raise InputError(f"{dataset_json}: no label besides background; there is nothing to score")
    return Dataset(
        path=dataset_json,
        content=content,
        file_ending=content["file_ending"],
        labels=values,
        structures=scored,
        channels=scored if manager.has_regions else values,
        region_order=tuple(int(c) for c in manager.regions_class_order) if manager.has_regions else None,
        ignore_label=manager.ignore_label,
        names={key(structure): of_value.get(structure, key(structure)) for structure in (*values, *scored)},
    )


def find_model_file(name: str, prediction_folder: Path, reference_folder: Path | None = None) -> Path | None:
    """Find the ``dataset.json`` or ``plans.json`` that belongs to a folder of predictions.

    ``nnUNetv2_predict`` copies both beside its predictions; a fold's ``validation`` folder has them two levels up; raw
    data have ``dataset.json`` beside the folder of references.
    """
    folder = prediction_folder.resolve()
    places = [folder, folder.parent.parent] + ([reference_folder.resolve().parent] if reference_folder else [])
    return next((place / name for place in places if (place / name).is_file()), None)


def require_dataset_json(prediction_folder: Path, reference_folder: Path) -> Path:
    """``find_model_file`` for ``dataset.json``.

    Raises:
        UsageError: it is in none of the usual places.
    """
    found = find_model_file("dataset.json", prediction_folder, reference_folder)
    if found is None:
        raise UsageError(f"no dataset.json in or near {prediction_folder}; name it with -djfile")
    return found


def _checked_labels(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The ``labels`` entry, if nnU-Net could use it."""
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise InputError(f"{path}: 'file_ending' must be a file ending such as '.nii.gz', it is {ending!r}")
    labels = content.get("labels")
    if not isinstance(labels, dict) or labels.get("background") != 0 or isinstance(labels.get("background"), bool):
        raise InputError(f"{path}: 'labels' must map names to label values, with 'background': 0")
    for name, value in labels.items():
        members = value if isinstance(value, list) else [value]
        if not members or not all(type(member) is int and 0 <= member < 1 << 16 for member in members):
            raise InputError(
                f"{path}: label {name!r} must be an integer in [0, 65535], or a list of them; it is {value!r:.100}"
            )
    return labels


def _label_manager(content: dict[str, Any], path: Path, plans: Path | None) -> Any:
    """nnU-Net's own reading of the labels, so that regions and keys are exactly its own."""
    from nnunetv2.utilities.label_handling.label_handling import LabelManager, get_labelmanager_class_from_plans

    manager_class = LabelManager
    if plans is not None and "label_manager" in (plans_content := read_json(plans)):
        name = plans_content["label_manager"]
        manager_class = get_labelmanager_class_from_plans(plans_content) if isinstance(name, str) else None
        if manager_class is None:
            raise InputError(f"{plans}: nnU-Net has no label manager {name!r}")
    order = content.get("regions_class_order")
    if order is not None and not (
        isinstance(order, list) and all(type(label) is int and 0 <= label < 1 << 16 for label in order)
    ):
        raise InputError(f"{path}: 'regions_class_order' must be a list of label values, it is {order!r:.100}")
    try:
        return manager_class(content["labels"], order)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: nnU-Net refuses these labels: {' '.join(str(error).split())}") from error


def _structure(value: Any) -> Structure:
    return tuple(int(member) for member in value) if isinstance(value, (tuple, list)) else int(value)
