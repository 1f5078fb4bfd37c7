"""The reader study: blinded, resumable, and its figures against known ones."""

import csv
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dicomnode.errors import ConfigError
from tests.peers import wait_for
from training import reader_study
from training.errors import TrainingError
from training.reading import Answer, AnswerLog, Study
from training.reading_figures import analyse, weighted_kappa, wilson

CASES = 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(2)
    for number in range(CASES):
        case = tmp_path / "cases" / f"case {number}"
        case.mkdir(parents=True)
        for name in ("real", "synthetic"):
            pixels = rng.integers(0, 255, (24, 32), np.uint8)
            Image.fromarray(pixels).save(case / f"{name}.png")
    return tmp_path / "cases"


@pytest.fixture
def study(folder: Path, tmp_path: Path) -> Study:
    return Study(folder, tmp_path / "answers.csv")


def answer_all(study: Study, reader: str, *, stop: int = 1000) -> None:
    for question in study.open_questions(reader)[:stop]:
        if question.kind == "single":
            study.give(reader, question.key, nature="real", artefacts=1)
        else:
            study.give(reader, question.key, similarity=4)


def test_every_reader_gets_every_case_three_times_in_an_order_of_their_own(study: Study) -> None:
    first, again, other = (study.questions(name) for name in ("A", "A", "B"))
    assert first == again
    assert [q.case for q in first] != [q.case for q in other]
    for questions in (first, other):
        assert [q.kind for q in questions] == ["single"] * 2 * CASES + ["pair"] * CASES
        singles = [(q.case, q.shown) for q in questions if q.kind == "single"]
        assert len(set(singles)) == 2 * CASES
    keys = {q.key for q in (*first, *other)}
    assert len(keys) == 6 * CASES
    assert not any("real" in key or "synth" in key or "case" in key for key in keys)


def test_sides_of_pairs_are_drawn(folder: Path, tmp_path: Path) -> None:
    study = Study(folder, tmp_path / "a.csv")
    lefts = {q.shown[0] for n in range(20) for q in study.questions(f"R{n}") if q.kind == "pair"}
    assert lefts == {"real", "synthetic"}


def test_a_reader_goes_on_where_they_stopped(folder: Path, tmp_path: Path) -> None:
    study = Study(folder, tmp_path / "answers.csv")
    answer_all(study, "A", stop=5)
    again = Study(folder, tmp_path / "answers.csv")
    assert len(again.open_questions("A")) == 3 * CASES - 5
    assert len(again.open_questions("B")) == 3 * CASES
    assert again.open_questions("A") == study.questions("A")[5:]


def test_a_line_that_a_crash_cut_off_is_asked_again(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "answers.csv"
    study = Study(folder, path)
    answer_all(study, "A", stop=3)
    whole = path.read_bytes()
    for cut in range(len(whole) - 1, whole.rindex(b"\n", 0, -1), -1):
        path.write_bytes(whole[:cut])
        assert len(Study(folder, path).open_questions("A")) == 3 * CASES - 2
    answer_all(study, "A")
    assert study.open_questions("A") == []
    assert len({answer.key for answer in AnswerLog(path).read()}) == 3 * CASES


def test_the_same_answer_twice_counts_once(study: Study) -> None:
    question = study.questions("A")[0]
    for nature in ("real", "synthetic"):
        study.give("A", question.key, nature=nature, artefacts=2)
    answers = AnswerLog(study._log.path).read()
    assert [(a.nature, a.artefacts) for a in answers] == [("real", 2)]


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"nature": "real"},
        {"nature": "real", "artefacts": 4},
        {"nature": "unsure", "artefacts": 1},
        {"similarity": 3},
        {"nature": "real", "artefacts": 1, "similarity": 3},
    ],
)
def test_an_answer_that_does_not_fit_is_refused(study: Study, answer: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match="does not fit"):
        study.give("A", study.questions("A")[0].key, **answer)
    assert len(study.open_questions("A")) == 3 * CASES


def test_folders_that_are_no_study_say_why(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no cases"):
        Study(tmp_path, tmp_path / "a.csv")
    (tmp_path / "case").mkdir()
    with pytest.raises(TrainingError, match="0 images named real"):
        Study(tmp_path, tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("something,else\n1,2\n")
    with pytest.raises(TrainingError, match="not the answers"):
        AnswerLog(tmp_path / "a.csv").read()


# --- figures --------------------------------------------------------------------------------------
def test_kappa_of_cohens_own_kind_of_table() -> None:
    # Table of two raters, 3 x 3, quadratic weights; sklearn.metrics.cohen_kappa_score gives 0.6190
    one = np.repeat([1, 1, 2, 2, 2, 3, 3], [8, 2, 2, 6, 2, 3, 7])
    other = np.repeat([1, 2, 1, 2, 3, 2, 3], [8, 2, 2, 6, 2, 3, 7])
    seen = np.zeros((3, 3))
    np.add.at(seen, (one - 1, other - 1), 1)
    disagreement = sum(seen[i, j] * (i - j) ** 2 for i in range(3) for j in range(3))
    chance = sum(
        seen[i].sum() * seen[:, j].sum() / 30 * (i - j) ** 2 for i in range(3) for j in range(3)
    )
    assert weighted_kappa(one, other, 3) == pytest.approx(1 - disagreement / chance)


@given(st.lists(st.integers(1, 5), min_size=2, max_size=30))
def test_readers_who_agree_have_a_kappa_of_one(scores: list[int]) -> None:
    marks = np.array(scores)
    kappa = weighted_kappa(marks, marks, 5)
    assert kappa == 1.0 if len(set(scores)) > 1 else np.isnan(kappa)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 20, 0.0, 0.1611), (5, 5, 0.5655, 1.0)],
)
def test_wilson_intervals_of_known_shares(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_the_table_counts_what_was_answered(study: Study, tmp_path: Path) -> None:
    for reader in ("A", "B"):
        answer_all(study, reader)
    rows = {
        (row[0], row[1]): row[2:] for row in analyse(AnswerLog(tmp_path / "answers.csv").read())
    }
    assert rows["A", "told real from synthetic"][0] == "50.0 %"
    assert rows["B", "synthetic taken for real"][0] == "100.0 %"
    assert rows["all", "similarity neutral or better"] == ["100.0 %", "100.0 to 100.0 %", "8"]
    assert rows["A, B", "kappa of similarity"][0] == "nan"  # both always said the same


def test_results_are_printed_and_written(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError, match="no answers"):
        reader_study.main(["analyse", str(tmp_path / "answers.csv"), str(tmp_path / "r.csv")])
    answer_all(study, "A")
    reader_study.main(["analyse", str(tmp_path / "answers.csv"), str(tmp_path / "r.csv")])
    printed = capsys.readouterr().out
    written = list(csv.reader((tmp_path / "r.csv").open()))
    assert written[0] == list(reader_study.HEAD)
    assert all(row[1] in printed for row in written)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "usage"),
        (["serve", "a"], "usage"),
        (["serve", "a", "b", "colour=1"], "no option colour"),
        (["serve", ".", "b", "window=5"], "want low,high"),
    ],
)
def test_wrong_arguments_are_named(argv: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        reader_study.main(argv)


# --- the server and the browser -------------------------------------------------------------------
@pytest.fixture
def address(study: Study) -> Iterator[str]:
    server = reader_study.reader_server(study, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def call(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_nothing_the_server_says_tells_what_is_shown(address: str) -> None:
    status, state = call(f"{address}/next?reader=A")
    assert status == 200
    assert state["total"] == 3 * CASES
    assert state.keys() == {"total", "done", "key", "kind", "slices", "similarity", "artefacts"}
    url = f"{address}/image?reader=A&key={state['key']}&side=0&slice=0"
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.headers["Content-Type"] == "image/png"
        assert "real" not in str(answer.headers).lower()


@pytest.mark.parametrize(
    "path", ["/next", "/next?reader=", "/image?reader=A&key=x&side=0&slice=0", "/image?reader=A"]
)
def test_bad_requests_are_answered_with_a_reason(address: str, path: str) -> None:
    status, said = call(address + path)
    assert status == 400
    assert said["error"]


def test_bad_answers_are_not_stored(address: str, study: Study) -> None:
    for body in ({"reader": "A"}, {"reader": "A", "key": "no"}, {"reader": "A", "key": None}):
        assert call(f"{address}/answer", body)[0] == 400
    assert call(f"{address}/elsewhere", {"reader": "A"})[0] == 400
    assert AnswerLog(study._log.path).read() == []


def test_a_whole_study_by_keyboard_in_a_real_browser(address: str, study: Study) -> None:
    driver = _browser()
    try:
        driver.get(address)
        driver.find_element("id", "name").send_keys("Reader 1\n")
        body = driver.find_element("tag name", "body")
        wait_for(lambda: driver.find_elements("css selector", "#images img"), "the first image")
        body.send_keys("r\n")  # artefacts are missing
        assert "Not answered yet: Artefacts" in driver.find_element("id", "say").text
        for number in range(3 * CASES):
            assert f"{number} of {3 * CASES}" in driver.find_element("id", "place").text
            single = number < 2 * CASES
            shown = driver.find_elements("css selector", "#images img")
            assert len(shown) == (1 if single else 2)
            wait_for(lambda: _loaded(driver), "the images")
            body.send_keys("s2\n" if single else "4\n")
            _wait_for_place(driver, f"{number + 1} of")
        assert driver.find_element("id", "end").is_displayed()
        assert not driver.find_elements("css selector", "#study:not([hidden])")
    finally:
        driver.quit()
    answers = AnswerLog(study._log.path).read()
    assert [a.key for a in answers] == [q.key for q in study.questions("Reader 1")]
    assert {(a.nature, a.artefacts, a.similarity) for a in answers} == {
        ("synthetic", 2, 0),
        ("", 0, 4),
    }
    assert all(0 < a.seconds < 600 for a in answers)


def _wait_for_place(driver: Any, words: str) -> None:
    wait_for(lambda: words in driver.find_element("id", "place").text, words)


def _loaded(driver: Any) -> bool:
    return bool(
        driver.execute_script(
            "return [...document.images].every(i => i.complete && i.naturalWidth === 32)"
        )
    )


def _browser() -> Any:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    programs = [Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")]
    if not all(program.exists() for program in programs):
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=str(programs[1]))
    return webdriver.Chrome(options=options, service=service)


def test_an_answer_survives_quotes_and_commas_in_names(folder: Path, tmp_path: Path) -> None:
    log = AnswerLog(tmp_path / "a.csv")
    answer = Answer('R "1", left', "k", "pair", "case, 1", "real synthetic", "", 0, 3, 1.5)
    log.append(answer)
    assert log.read() == [answer]
