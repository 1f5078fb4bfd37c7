"""Set-up from nothing: what the scripts promise, and what we depend on."""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
RUNTIME = [Requirement(text) for text in PROJECT["dependencies"]]
DEVELOPMENT = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]


def _run(
    script: Path, environment: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/bin/bash", str(script)],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _clone(folder: Path) -> Path:
    """The set-up files alone, as a fresh clone would have them."""
    (folder / ".ci").mkdir()
    for name in ("pyproject.toml", ".ci/setup", ".ci/packages"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def _table(heading: str) -> dict[str, str]:
    """Package and versions of one table of docs/DEPENDENCIES.md."""
    text = (ROOT / "docs/DEPENDENCIES.md").read_text("utf-8").split(f"## {heading}\n")[1]
    rows = re.findall(r"^\| (\S+) \| (\S+) \| .+ \| .+ \|$", text.split("\n## ")[0], re.MULTILINE)
    return {name: versions for name, versions in rows if name != "Package"}


def _versions(requirements: list[Requirement]) -> dict[str, str]:
    return {
        r.name: ",".join(sorted(str(r.specifier).split(","), reverse=True)) for r in requirements
    }


@pytest.mark.parametrize(
    ("heading", "requirements"),
    [("At run time", RUNTIME), ("To develop", DEVELOPMENT)],
)
def test_every_dependency_is_explained(heading: str, requirements: list[Requirement]) -> None:
    assert _table(heading) == _versions(requirements)


def test_pytorch_is_pinned_to_one_version() -> None:
    torch = next(r for r in RUNTIME if r.name == "torch")
    assert str(torch.specifier) == "==2.13.0"


def test_every_other_dependency_has_both_ends() -> None:
    loose = [
        r.name
        for r in [*RUNTIME, *DEVELOPMENT]
        if r.name != "torch" and {s.operator for s in r.specifier} != {">=", "<"}
    ]
    assert loose == []


def test_nothing_under_the_gpl_is_needed() -> None:
    """The MIT licence of this project stays true for what a user installs with it."""
    todo, seen = [r.name for r in RUNTIME], {}
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        meta = importlib.metadata.metadata(name)
        seen[name] = " ".join(
            [
                meta["License-Expression"] or (meta["License"] or "")[:80],
                *(c for c in meta.get_all("Classifier") or [] if c.startswith("License")),
            ]
        )
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                todo.append(needed.name)
    assert {
        name: words for name, words in seen.items() if re.search("A?GPL|General Public", words)
    } == {}


def test_the_environment_is_not_made_again(tmp_path: Path) -> None:
    clone = _clone(tmp_path)
    python = clone / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/bin/true")
    words = f"{clone}\n".encode()
    words += (clone / "pyproject.toml").read_bytes() + (clone / ".ci/setup").read_bytes()
    (clone / ".venv/stamp").write_text(hashlib.sha256(words).hexdigest() + "\n")
    assert _run(clone / ".ci/setup", {"PYTHON": "/nowhere"}).returncode == 0


def test_a_changed_pyproject_makes_the_environment_again(tmp_path: Path) -> None:
    clone = _clone(tmp_path)
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/python").symlink_to("/bin/true")
    (clone / ".venv/stamp").write_text("of another pyproject.toml\n")
    done = _run(clone / ".ci/setup", {"PYTHON": "/nowhere"})
    assert done.returncode == 1
    assert "no Python 3.11 or later" in done.stderr


def test_an_old_python_is_refused_in_plain_words(tmp_path: Path) -> None:
    clone = _clone(tmp_path)
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = _run(clone / ".ci/setup", {"PYTHON": str(old)})
    assert done.returncode == 1
    assert "no Python 3.11 or later found" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_python_without_venv_is_refused_in_plain_words(tmp_path: Path) -> None:
    clone = _clone(tmp_path)
    python = tmp_path / "python3.11"
    python.write_text(
        '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *print*) echo python3.11-venv;; esac\n'
    )
    python.chmod(0o755)
    done = _run(clone / ".ci/setup", {"PYTHON": str(python), "PATH": _tools(tmp_path, user="1000")})
    assert done.returncode == 1
    assert "sudo apt-get install python3.11-venv" in done.stderr


def test_missing_programs_are_one_line_and_no_error(tmp_path: Path) -> None:
    script = tmp_path / "packages"
    text = (ROOT / ".ci/packages").read_text("utf-8")
    script.write_text(text.replace("dciodvfy:", "absent-program:"))
    done = _run(script, {"PATH": _tools(tmp_path, user="1000")})
    assert done.returncode == 0
    assert "dicom3tools missing" in done.stdout
    assert "not root" in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_packages_that_apt_cannot_fetch_are_no_error(tmp_path: Path) -> None:
    script = tmp_path / "packages"
    text = (ROOT / ".ci/packages").read_text("utf-8")
    text = text.replace("/usr/sbin/policy-rc.d", str(tmp_path / "policy-rc.d"))
    script.write_text(text.replace("dciodvfy:", "absent-program:"))
    done = _run(script, {"PATH": _tools(tmp_path, user="0", apt="exit 100")})
    assert done.returncode == 0
    assert "dicom3tools could not be installed: the tests that need it skip" in done.stdout
    assert not (tmp_path / "policy-rc.d").exists()


def test_a_service_may_not_start_while_packages_are_installed(tmp_path: Path) -> None:
    script, policy = tmp_path / "packages", tmp_path / "policy-rc.d"
    text = (ROOT / ".ci/packages").read_text("utf-8").replace("/usr/sbin/policy-rc.d", str(policy))
    script.write_text(text.replace("dciodvfy:", "absent-program:"))
    done = _run(script, {"PATH": _tools(tmp_path, user="0", apt=f"{policy}; echo $? >&2; exit 0")})
    assert done.returncode == 0
    assert done.stderr.split() == ["101", "101"]  # apt-get update, apt-get install
    assert not policy.exists()


def test_javascript_that_npm_cannot_fetch_is_one_line_and_no_error(tmp_path: Path) -> None:
    script = tmp_path / "packages"
    shutil.copy(ROOT / ".ci/packages", script)
    (tmp_path / "node").mkdir()
    shutil.copy(ROOT / ".ci/node/package-lock.json", tmp_path / "node")
    path = _tools(tmp_path, user="1000")
    (tmp_path / "tools/npm").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "tools/npm").chmod(0o755)
    done = _run(script, {"PATH": path})
    assert done.returncode == 0
    assert ".ci/node: the tests that need it skip" in done.stdout.splitlines()[-1]
    (tmp_path / "tools/npm").write_text('#!/bin/sh\nmkdir -p "$3/node_modules"\n')
    assert _run(script, {"PATH": path}).returncode == 0
    (tmp_path / "tools/npm").write_text("#!/bin/sh\necho again\nexit 1\n")
    assert "JavaScript" not in _run(script, {"PATH": path}).stdout  # it is there already


def test_javascript_is_pinned_with_its_sums() -> None:
    lock = json.loads((ROOT / ".ci/node/package-lock.json").read_text("utf-8"))
    wanted = json.loads((ROOT / ".ci/node/package.json").read_text("utf-8"))["dependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in wanted.values())
    installed = {name: of for name, of in lock["packages"].items() if name}
    assert all(of["integrity"].startswith("sha512-") for of in installed.values())
    assert {name: installed[f"node_modules/{name}"]["version"] for name in wanted} == wanted


def _tools(folder: Path, user: str, apt: str | None = None) -> str:
    """A PATH on which `id -u` says `user` and apt-get does what it is told."""
    tools = folder / "tools"
    tools.mkdir()
    fakes = {"id": f"echo {user}", **({"apt-get": apt} if apt else {})}
    for name, body in fakes.items():
        (tools / name).write_text(f"#!/bin/sh\n{body}\n")
        (tools / name).chmod(0o755)
    return f"{tools}:{os.environ['PATH']}"


def test_ci_run_works_from_anywhere(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "make").write_text("#!/bin/sh\necho $PWD: make $*\n")
    (tools / "make").chmod(0o755)
    done = _run(ROOT / ".ci/run", {"PATH": f"{tools}:{os.environ['PATH']}"}, cwd=tmp_path)
    assert done.stdout.strip() == f"{ROOT}: make test"


@pytest.mark.parametrize("name", ["setup", "packages", "run"])
def test_the_scripts_can_be_executed(name: str) -> None:
    assert os.access(ROOT / ".ci" / name, os.X_OK)


def test_the_workflow_runs_what_a_developer_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    commands = [step.get("run") for step in workflow["jobs"]["test"]["steps"]]
    assert ".ci/run" in commands
    assert "make demo" in commands


def test_every_target_of_the_makefile_is_named_by_make_help() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    helped = set(re.findall(r'echo "make (\S+)', text))
    assert set(phony[1].split()) - helped == {"help", "setup", "packages"}
