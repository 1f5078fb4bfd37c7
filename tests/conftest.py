"""Fixtures that every test may use; what they stand on is in factories, judges and peers."""

from pathlib import Path

import pytest

from tests.peers import identity_package, shared_data


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with the package `identity`, which returns its input."""
    folder = tmp_path_factory.mktemp("models")
    identity_package(folder)
    return folder


@pytest.fixture(scope="session")
def real_dicom() -> Path:
    """The folder of real DICOM images beside the checkout; the test is skipped where it is not."""
    folder = shared_data() / "dicom"
    if not folder.is_dir():
        pytest.skip(f"no real images at {folder}")
    return folder
