"""What is wrong with a command line is told before torch is imported, which takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..folders import Folders
from ..report.runs import simulated, write_run

RUN_ALL = """
import contextlib, io, json, sys
from nnunet_calib.cli.main import main
results = []
for words in json.load(sys.stdin):
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            code = main(words)
        except SystemExit as end:
            code = end.code
    heavy = sorted({"torch", "matplotlib"} & sys.modules.keys())
    results.append([code, told.getvalue(), heavy])
print(json.dumps(results))
"""

NETWORK = {
    "patch_size": [16, 16, 16],
    "architecture": {
        "network_class_name": "n",
        "arch_kwargs": {"kernel_sizes": [[3, 3, 3]] * 2, "features_per_stage": [8, 16], "strides": [[1] * 3, [2] * 3]},
        "_kw_requires_import": [],
    },
}


def command_lines(root: Path) -> list[tuple[list[str], int, str]]:
    """Words, exit code and what is told, for every kind of mistake of every verb."""
    folders = Folders(root, labels={"background": 0, "liver": 1, "tumour": 2})
    folders.add_ambiguous("case_0")
    model = root / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    (model / "fold_0").mkdir(parents=True)
    (model / "fold_0" / "checkpoint_final.pth").write_bytes(b"weights")
    (model / "dataset.json").write_bytes(folders.dataset_json.read_bytes())
    plans = {"plans_name": "nnUNetPlans", "dataset_name": "Dataset004_Toy", "configurations": {"3d_fullres": NETWORK}}
    preprocessed = root / "preprocessed" / "Dataset004_Toy"
    preprocessed.mkdir(parents=True)
    for folder in (model, preprocessed):
        (folder / ("plans.json" if folder == model else "nnUNetPlans.json")).write_text(json.dumps(plans))
    calibrator = root / "calibrator.json"
    calibrator.write_text(
        json.dumps(
            {"format": 1, "method": "temperature", "multilabel": False, "channels": 9, "temperature": 1.5, "notes": []}
        )
    )
    task = root / "ball.fewshot"
    task.write_bytes(b"a task")
    run = str(write_run(root / "run", *simulated(0, 4)))
    labels, images, no = str(folders.reference), str(folders.prediction), str(root / "nowhere")
    out, m = str(root / "out"), str(model)

    configure = ["configure", "-d", "4", "-c", "3d_fullres", "--name", "new"]
    evaluate = ["evaluate", labels, images, "-o", out]
    fit = ["calibrate", "fit", images, "--reference", labels, "-o", out]
    predict = ["predict", "-i", images, "-o", out, "-device", "cpu"]
    learn = ["fewshot", "fit", m, "--images", images, "--labels", labels, "--label", "1", "--name", "ball", "-o", out]
    measure = [
        "fewshot",
        "evaluate",
        m,
        "--images",
        images,
        "--labels",
        labels,
        "--label",
        "1",
        "--name",
        "x",
        "-o",
        out,
    ]
    apply = ["fewshot", "apply", m, str(task), "-i", images, "-o", out]
    return [
        # names
        (["evalute"], 2, "did you mean evaluate?"),
        (["trainers", "MbLsTrainr"], 2, "did you mean MbLSTrainer?"),
        ([*configure, "--set", "margn=3"], 2, "did you mean margin (of MbLSTrainer, CRaCTrainer)?"),
        ([*configure, "--set", "margn=3", "-tr", "NACLTrainer"], 2, "allowed: balanced, border, calibrate_from"),
        ([*configure, "--set", "margin=much"], 2, "margin must be a number of at least 0"),
        ([*configure, "--set", "kernel_size=2"], 2, "kernel_size must be a positive odd integer"),
        ([*configure, "-tr", "NACLTrainr"], 2, "did you mean NACLTrainer?"),
        ([*configure, "-tr", "nnUNetTrainer"], 2, "takes no settings"),
        (["configure", "-d", "4", "-c", "3d_fulres", "--name", "new"], 2, "3d_fullres"),
        ([*configure, "-p", "NoPlans"], 1, "NoPlans.json"),
        ([*fit, "--method", "temprature"], 2, "did you mean temperature?"),
        ([*evaluate, "--nsd", "liver=2"], 2, "did you mean 1? There are 1 (liver), 2 (tumour)"),
        ([*evaluate, "--nsd", "7=2"], 2, "the structures are 1 (liver), 2 (tumour)"),
        ([*learn, "--inside", "1", "7"], 2, "--inside 7: the model's labels are 1 (liver), 2 (tumour)"),
        ([*learn[:-3], "liver", "-o", out], 2, "the model has a class 'liver' already"),
        ([*learn, "--head", "liner"], 2, "did you mean linear?"),
        (["compare", run, "--metrics", "Dise"], 2, "no metric 'Dise'; did you mean Dice?"),
        (["compare", run, "--region", "volum"], 2, "no region 'volum'; did you mean volume?"),
        (["compare", run, "--baseline", "rum"], 2, "no run 'rum'; did you mean run?"),
        (["report", run, "--region", "forground", "-o", out + ".html"], 2, "did you mean foreground?"),
        (["diagram", run, "-o", out + ".svg"], 2, "no bin counts"),
        # numbers
        ([*evaluate, "-np", "0"], 2, "must be 1 or more"),
        ([*fit, "-np", "0"], 2, "must be 1 or more"),
        (["convert", images, "-o", out, "--to", "compact", "-np", "0"], 2, "must be 1 or more"),
        ([*predict, "-m", m, "-npp", "-1"], 2, "-npp -1: it must be 0 or more"),
        ([*predict, "-m", m, "-nps", "-1"], 2, "-nps -1: it must be 0 or more"),
        ([*predict, "-m", m, "-step_size", "0"], 2, "-step_size 0"),
        ([*apply, "-npp", "-1"], 2, "-npp -1: it must be 0 or more"),
        ([*learn, "-step_size", "2"], 2, "-step_size 2: it must be above 0"),
        (["demo", "--seed", "-1"], 2, "--seed -1: it must be 0 or more"),
        (["configure", "--batchsize", "3", "-d", "4", "-c", "a", "--name", "b"], 2, "did you mean --batch_size?"),
        (
            ["calibrate", "fit", images, "--methd", "vector", "-o", out],
            2,
            "did you mean --method? (see nnunet-calib calibrate",
        ),
        # files and folders
        (["demo", "-o", labels], 2, "is not empty and no demo's folder"),
        (["evaluate", no, images, "-o", out], 2, f"{no} is not a folder"),
        ([*evaluate, "-djfile", no], 1, no),
        ([*evaluate, "--calibrator", no], 1, no),
        ([*evaluate, "--calibrator", str(calibrator)], 1, "fitted to 9 classes"),
        (["calibrate", "fit", no, "-o", out], 2, f"{no} is not a folder"),
        (["calibrate", "fit", images, "--reference", no, "-o", out], 2, f"{no} is not a folder"),
        (["calibrate", "apply", no, "-i", images, "-o", out], 1, no),
        (["calibrate", "apply", str(calibrator), "-i", no, "-o", out], 2, f"{no} is not a folder"),
        (["calibrate", "check", no, "-i", images], 1, no),
        (["calibrate", "check", str(calibrator), "-i", no], 2, f"{no} is not a folder"),
        (["convert", no, "-o", out, "--to", "compact"], 2, no),
        ([*predict, "-m", no], 2, no),
        ([*predict, "-m", m, "-f", "3"], 2, "no checkpoint_final.pth in fold 3; there are 0"),
        ([*predict, "-m", m, "-chk", "best"], 2, "no fold with best"),
        ([*predict, "-m", m, "--reference", no], 2, f"{no} is not a folder"),
        ([*predict, "-m", m, "--calibrator", no], 1, no),
        ([*predict, "-m", m, "--calibrator", str(calibrator)], 1, "fitted to 9 classes"),
        (["predict", "-i", no, "-o", out, "-m", m, "-device", "cpu"], 2, f"{no} is not a folder"),
        ([*predict, "-m", m, "-i", labels], 1, "no images; nnU-Net names them"),
        (["validate", no, "-device", "cpu"], 2, no),
        (["validate", m, "-f", "3", "-device", "cpu"], 2, "fold 3"),
        (["export", no, "-o", out], 2, no),
        (["export", m, "-f", "3", "-o", out], 2, "fold 3"),
        (["export", m, "-o", images], 2, "is there already"),
        (["export", m, "-o", out, "--calibrator", no], 1, no),
        ([*learn[:2], no, *learn[3:]], 2, no),
        ([*learn, "--images", no], 2, f"{no} is not a folder"),
        ([*learn, "--labels", no], 2, f"{no} is not a folder"),
        ([*learn, "-f", "3"], 2, "fold 3"),
        (["fewshot", "apply", m, no, "-i", images, "-o", out], 1, "there is no such task file"),
        ([*apply, "-i", no], 2, f"{no} is not a folder"),
        ([*measure, "--queries", no, labels], 2, f"{no} is not a folder"),
        (["compare", no], 2, f"{no} is not a folder"),
        (["compare", run, "--group", no], 1, no),
        (["report", no, "-o", out + ".html"], 2, f"{no} is not a folder"),
        (["report", run, "--images", no, "-o", out + ".html"], 2, f"{no} is not a folder"),
        (["diagram", no, "-o", out + ".svg"], 2, f"{no} is not a folder"),
        # no mistakes, and no need of torch
        (["trainers"], 0, "MbLSTrainer"),
        (["trainers", "NACLTrainer"], 0, "kernel_size"),
        (["trainers-path"], 0, "trainers"),
        (["doctor"], 0, "16 trainers in"),
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[tuple[list[str], int, str, list]]:
    root = tmp_path_factory.mktemp("before")
    lines = command_lines(root)
    results = root / "results"
    results.mkdir()
    from nnunet_calib._autoload import trainers_folder

    environment = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")} | {
        "nnUNet_raw": str(root),
        "nnUNet_preprocessed": str(root / "preprocessed"),
        "nnUNet_results": str(results),
        "nnUNet_extTrainer": trainers_folder(),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL],
        input=json.dumps([words for words, _, _ in lines]),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not (root / "out").exists()
    return [(*line, *result) for line, result in zip(lines, found, strict=True)]


def test_every_mistake_is_told_in_a_line_with_its_exit_code(results):
    wrong = [
        (words, code, told)
        for words, expected, text, code, told, _ in results
        if code != expected or text not in told or (expected and told.count("\n") != 1)
    ]
    assert not wrong


def test_torch_is_not_imported_to_tell_it(results):
    # the lines are run one after the other in one process: the first that imports it is the culprit
    assert not next((words for words, *_, heavy in results if heavy), None)
