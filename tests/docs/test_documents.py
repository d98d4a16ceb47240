"""What the documents say can be done: every command is one that the parsers take, every link leads to a file."""

import argparse
import re
import shlex
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from nnunet_calib.cli.main import VERBS, _parser

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NNUNET = {command.name for command in entry_points(group="console_scripts") if command.name.startswith("nnUNetv2_")}
OTHERS = {"python", "python3", "pip", "pytest", "ruff", "mypy", "export", ".", "cd", "git", "mkdir"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def commands(document: Path) -> list[list[str]]:
    """The commands of its blocks, each as words."""
    found = []
    for language, block in BLOCK.findall(document.read_text(encoding="utf-8")):
        if language not in ("", "bash", "sh"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\$\((.*?)\)", r"; \1", line), comments=True)
            part: list[str] = []
            for word in [*words, "&&"]:
                ended = word in ("&&", ";", "|", "&") or word.endswith(";")
                part += [] if ended and word in ("&&", ";", "|", "&") else [word.rstrip(";")]
                if ended:
                    found.append([w for w in part if w and not re.fullmatch(r"[A-Z_]+=\S*", w)] or ["export"])
                    part = []
    return [words for words in found if words and "..." not in words]


def every_command(first: str) -> list:
    return [
        pytest.param(words, id=f"{document.relative_to(ROOT)}: {' '.join(words)[:80]}")
        for document in DOCUMENTS
        for words in commands(document)
        if words[0] == first
    ]


@pytest.mark.parametrize("words", every_command("nnunet-calib"))
def test_our_commands_are_ones_that_the_parsers_take(words):
    assert words[1] in VERBS
    assert _parser(words[1]).parse_args(words[1:]).verb == words[1]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_other_commands_exist(document):
    for words in commands(document):
        assert words[0] in {"nnunet-calib", *NNUNET, *OTHERS}, words
        if words[0] in ("python", "python3") and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), words


def anchors(document: Path) -> set[str]:
    """What a link to a heading is called: small letters, spaces as hyphens, no other signs."""
    heads = re.findall(r"^#+ (.+)$", BLOCK.sub("", document.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(document):
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)", document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_every_verb_is_in_the_documents():
    named = {words[1] for document in DOCUMENTS for words in commands(document) if words[0] == "nnunet-calib"}
    text = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    assert {verb for verb in VERBS if verb not in named and f"nnunet-calib {verb}" not in text} == set()


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


def test_every_page_of_results_is_in_the_index():
    index = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    pages = {file.name for file in (ROOT / "docs" / "results").glob("*.md")}
    assert {page for page in pages if f"results/{page}" not in index} == set()


PAGE = {"configure": "train", "convert": "evaluate", "diagram": "compare", "doctor": "install", "export": "faq"} | {
    "report": "compare",
    "trainers": "train",
    "trainers-path": "faq",
    "validate": "predict",
}  # of the verbs that have none of their own name


def options(parser: argparse.ArgumentParser) -> list[list[str]]:
    """The spellings of every option, those of sub-commands too."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [option for sub in action.choices.values() for option in options(sub)]
        elif action.option_strings:
            found.append(action.option_strings)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_is_on_the_page_of_its_verb(verb):
    (verbs,) = (action for action in _parser(verb)._actions if isinstance(action, argparse._SubParsersAction))
    page = (ROOT / "docs" / f"{PAGE.get(verb, verb)}.md").read_text(encoding="utf-8")
    named = {"-h", "--debug", *re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", page)}  # --debug is every verb's: the FAQ
    assert [option for option in options(verbs.choices[verb]) if not named.intersection(option)] == []
