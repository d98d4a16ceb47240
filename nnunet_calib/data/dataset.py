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


_MANAGER = "LabelManager"  # nnU-Net's own


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
    labels, order = _checked_labels(content, dataset_json), _checked_order(content, dataset_json)
    name = read_json(plans).get("label_manager", _MANAGER) if plans is not None else _MANAGER
    if name == _MANAGER:
        values, regions, ignore = _as_nnunet_reads(labels, order, dataset_json)
    else:
        values, regions, ignore = _of_another_manager(name, labels, order, dataset_json, plans)
    structures = tuple(value for value in values if value) if regions is None else regions
    if not structures:
        raise InputError(f"{dataset_json}: no label besides background; there is nothing to score")
    of_value = {_structure(value): name for name, value in labels.items()}
    return Dataset(
        path=dataset_json,
        content=content,
        file_ending=content["file_ending"],
        labels=values,
        structures=structures,
        channels=values if regions is None else regions,
        region_order=None if regions is None else tuple(order or ()),
        ignore_label=ignore,
        names={key(structure): of_value.get(structure, key(structure)) for structure in (*values, *structures)},
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


def _checked_order(content: dict[str, Any], path: Path) -> list[int] | None:
    """The ``regions_class_order`` entry, if it is one."""
    order = content.get("regions_class_order")
    if order is not None and not (
        isinstance(order, list) and all(type(label) is int and 0 <= label < 1 << 16 for label in order)
    ):
        raise InputError(f"{path}: 'regions_class_order' must be a list of label values, it is {order!r:.100}")
    return order


_Read = tuple[tuple[int, ...], tuple[Structure, ...] | None, int | None]  # labels, regions, ignore label


def _as_nnunet_reads(labels: dict[str, Any], order: list[int] | None, path: Path) -> _Read:
    """Labels as nnU-Net's ``LabelManager`` has them, without its module, which imports torch."""
    ignore = labels.get("ignore")
    named = {name: _structure(value) for name, value in labels.items() if name != "ignore"}
    values = tuple(sorted({label for value in named.values() for label in _members(value)}))
    if isinstance(ignore, list) or (ignore is not None and ignore != values[-1] + 1):
        raise InputError(
            f"{path}: nnU-Net refuses these labels: the ignore label must be one above all others, "
            f"{values[-1] + 1}, not {ignore}"
        )
    if not any(len(_members(value)) > 1 for value in labels.values()):
        return values, None, ignore
    regions = tuple(value for value in named.values() if set(_members(value)) != {0})
    if order is None or len(order) != len(regions):
        raise InputError(
            f"{path}: nnU-Net refuses these labels: {len(regions)} regions need a 'regions_class_order' of as many "
            f"labels, not {order}"
        )
    return values, regions, ignore


def _of_another_manager(name: Any, labels: dict[str, Any], order: list[int] | None, path: Path, plans: Any) -> _Read:
    """Labels as a label manager has them that the plans name."""
    from nnunetv2.utilities.label_handling.label_handling import get_labelmanager_class_from_plans

    manager_class = get_labelmanager_class_from_plans({"label_manager": name}) if isinstance(name, str) else None
    if manager_class is None:
        raise InputError(f"{plans}: nnU-Net has no label manager {name!r}")
    try:
        manager = manager_class(labels, order)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{path}: nnU-Net refuses these labels: {' '.join(str(error).split())}") from error
    regions = tuple(map(_structure, manager.foreground_regions)) if manager.has_regions else None
    return tuple(int(label) for label in manager.all_labels), regions, manager.ignore_label


def _members(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _structure(value: Any) -> Structure:
    return tuple(int(member) for member in value) if isinstance(value, (tuple, list)) else int(value)
