"""Rules about the code base itself."""

import ast
import logging
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
MODULES = sorted([*ROOT.glob("dicomnode/**/*.py"), *ROOT.glob("training/**/*.py")])
TESTS = sorted(ROOT.glob("tests/**/test_*.py"))
LONGEST_MODULE = 400
LONGEST_FUNCTION = 60


def _in_repository() -> list[Path]:
    """What git tracks or would track, existing files only."""
    git = ["/usr/bin/git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git repository, or no git")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def _functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text("utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_imports_point_downwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    loggers = {name: logging.getLogger(name) for name in logging.root.manager.loggerDict}
    silent = {name for name, logger in loggers.items() if logger.disabled}
    code = lint_imports()
    for name in loggers.keys() - silent:  # it has disabled every logger of the tests that follow
        loggers[name].disabled = False
    assert code == 0


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in [*MODULES, *TESTS]
        if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert silent == []


def test_modules_stay_readable_in_one_sitting() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in MODULES}
    assert {name: n for name, n in lengths.items() if n > LONGEST_MODULE} == {}


def test_functions_fit_on_a_screen() -> None:
    lengths = {
        f"{path.relative_to(ROOT)} {function.name}": (function.end_lineno or 0)
        - function.lineno
        + 1
        for path in MODULES
        for function in _functions(path)
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION} == {}


def test_nothing_is_left_for_later_in_a_comment() -> None:
    words = ["TO" + "DO", "FIX" + "ME", "XX" + "X:"]
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in _in_repository()
        if path.suffix in (".py", ".yaml", ".yml", ".md", ".toml") or path.name == "Makefile"
        for word in words
        if word in path.read_text("utf-8")
    ]
    assert found == []


def test_every_test_name_is_unique() -> None:
    names = Counter(
        function.name
        for path in TESTS
        for function in _functions(path)
        if function.name.startswith("test_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_no_image_of_a_patient_can_be_in_the_repository() -> None:
    """No DICOM at all, by name or by content; pictures only where generated ones are kept."""
    suspects = []
    for path in _in_repository():
        name = path.relative_to(ROOT)
        with path.open("rb") as file:
            head = file.read(132)
        picture = path.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".bmp")
        volume = name.name.lower().endswith((".dcm", ".dicom", ".ima", ".nii", ".nii.gz", ".nrrd"))
        if volume or head[128:] == b"DICM" or (picture and name.parts[:2] != ("docs", "images")):
            suspects.append(str(name))
    assert suspects == []


def test_every_link_in_the_documents_leads_to_a_file() -> None:
    broken = []
    for page in (p for p in _in_repository() if p.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []
