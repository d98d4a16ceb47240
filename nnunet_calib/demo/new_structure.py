"""The demo's few-shot part: a structure that the stock network never saw, from three annotated volumes."""

from collections.abc import Callable
from pathlib import Path

from nnunet_calib.data.files import read_json
from nnunet_calib.demo import phantom
from nnunet_calib.demo.step import Step, Tick

STEPS = ("fewshot fit", "fewshot apply", "evaluate the cyst")


class NewStructure:
    """Its volumes, its steps and what they make.

    Args:
        folder: for all of it.
        model: of the stock network.
        device: ``cpu`` or ``cuda``.
        seed: of the volumes.
        run: runs a command with a log of that name, calling the function now and then.
    """

    def __init__(
        self,
        folder: Path,
        model: Path,
        device: str,
        seed: int,
        run: Callable[[list[str], str, Callable[[], None]], None],
    ):
        self.folder = folder
        self.model = model
        self.device = device
        self.seed = seed
        self.task = folder / "cyst.fewshot"
        self.segmented = folder / "segmented"
        self.scores = folder / "scores"
        self._run = run

    @property
    def made(self) -> tuple[Path, Path, Path]:
        """What the steps after the first make, which depends on the network too."""
        return self.task, self.segmented, self.scores

    def steps(self) -> list[Step]:
        """The volumes, then a step for each command."""
        volumes = Step(
            "make volumes with a cyst",
            done=(self.folder / "dataset.json").is_file,
            work=lambda tick: phantom.write_new_structure(self.folder, self.seed),
            ticks=1,
            voids=(self.folder,),
        )
        return [volumes, *map(self._step, range(len(STEPS)))]

    def commands(self) -> list[list[str]]:
        """The commands of the steps after the first."""
        options = ["-device", self.device, "--disable_tta"]
        supports = ["--images", str(self.folder / "imagesTr"), "--labels", str(self.folder / "labelsTr")]
        cyst = ["--label", str(phantom.NEW_LABELS["cyst"]), "--name", "cyst"]
        cyst += ["--registration", "none"]  # it may lie anywhere
        queries = ["-i", str(self.folder / "imagesTs"), "-o", str(self.segmented), "--save_probabilities"]
        scored = [str(self.folder / "labelsTs"), str(self.segmented), "-o", str(self.scores)]
        return [
            ["nnunet-calib", "fewshot", "fit", str(self.model), *supports, *cyst, "-o", str(self.task), *options],
            ["nnunet-calib", "fewshot", "apply", str(self.model), str(self.task), *queries, *options],
            ["nnunet-calib", "evaluate", *scored],
        ]

    def dice(self) -> float:
        """Mean Dice of the cyst over the volumes that it was segmented in."""
        summary = read_json(self.scores / "summary.json")
        return float(summary["mean"][str(phantom.NEW_LABELS["cyst"])]["Dice"])

    def _step(self, k: int) -> Step:
        done = (
            self.task.is_file,
            lambda: len(list(self.segmented.glob("*.fewshot.json"))) == phantom.QUERIES,
            (self.scores / "summary.json").is_file,
        )

        def work(_tick: Tick) -> None:
            self._run(self.commands()[k], STEPS[k].replace(" ", "_"), lambda: None)

        return Step(STEPS[k], done=done[k], work=work, ticks=1, voids=self.made[k:])
