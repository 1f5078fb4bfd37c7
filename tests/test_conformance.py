"""docs/CONFORMANCE.md names every refusal, and every promise with a test that exists."""

import ast
import re
from collections.abc import Iterable, Iterator

from tests.peers import ROOT
from tests.test_shared_dicom import documented

CODE = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
REFUSING = re.compile(r"\bSeriesRefused\(|\brefused\(|refusal=")
NO_REFUSALS = {"CE_CT", "DLY_PET", "SYN_CT", "SYN_MR", "DENOISE", "IDENTITY"}
NO_REFUSALS |= {"GEMS_PETD_01", "START"}
"""Words in capitals in modules that refuse series, which are values of attributes."""
COMPUTED = {"NOT_CT", "NOT_MR"}  # volume.py: a code by the modality that is wanted


def words_in_capitals(modules: Iterable[str]) -> Iterator[str]:
    """Of Python text: those with an underscore, and single ones passed on or given back."""
    for text_of_module in modules:
        tree = ast.parse(text_of_module)
        passed: set[int] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                passed |= set(map(id, node.args))
            elif isinstance(node, ast.Return):
                passed.add(id(node.value))
            elif isinstance(node, ast.IfExp):
                passed |= {id(node.body), id(node.orelse)}
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if not isinstance(text, str) or not CODE.fullmatch(text):
                continue
            if "_" in text or (len(text) > 4 and id(node) in passed):
                yield text


def column(table: str, number: int = 1) -> list[str]:
    return [line.split("|")[number].strip() for line in documented(table)]


def test_every_code_of_a_refusal_is_explained_with_a_remedy() -> None:
    sources = [path.read_text("utf-8") for path in sorted((ROOT / "dicomnode").rglob("*.py"))]
    used = set(words_in_capitals(text for text in sources if REFUSING.search(text)))
    failures = set(column("failures"))
    assert used - NO_REFUSALS - failures | COMPUTED == set(column("refusals"))
    assert column("refusals") == sorted(column("refusals"))
    assert all(map(str.strip, column("refusals", 2) + column("refusals", 3)))


def test_every_way_a_job_fails_is_explained() -> None:
    names = ("dispatch.py", "jobs.py", "node.py", "translating.py", "worker.py")
    texts = [(ROOT / "dicomnode" / name).read_text("utf-8") for name in names]
    used = {word for word in words_in_capitals(texts) if "_" in word}
    assert used == set(column("failures"))


def test_what_became_of_a_real_folder_is_a_code_of_the_table() -> None:
    said = {word for cell in column("every folder", 3) for word in re.findall(r"[A-Z_]{5,}", cell)}
    assert said <= set(column("refusals"))


def test_every_promise_names_a_test_that_is_there() -> None:
    shown = column("promises", 2)
    assert {text.split(".")[0] for text in column("promises") if text[0].isdigit()} == {
        str(number) for number in range(1, 14)
    }
    for name in shown:
        path, test = name.split("::")
        assert f"def {test}(" in (ROOT / path).read_text("utf-8"), name
