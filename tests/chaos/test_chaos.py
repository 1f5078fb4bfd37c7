"""The bounded runs of both campaigns; the long ones are `python -m tests.chaos.campaign` and
`python -m tests.chaos.power`."""

import os
import random
from pathlib import Path

import pytest

from tests.chaos.campaign import campaign
from tests.chaos.power import NoDisk
from tests.chaos.power import campaign as cutting
from tests.peers import ORTHANC, STORESCU, needs

pytestmark = [
    pytest.mark.network,
    pytest.mark.peers,
    pytest.mark.slow,
    needs(STORESCU, ORTHANC),
]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("system", ["ext4", "xfs"])
@pytest.mark.parametrize("redo_log_mb", [70, 0])
def test_a_power_failure_under_load_loses_nothing(
    tmp_path: Path, system: str, redo_log_mb: int
) -> None:
    cuts = int(os.environ.get("DICOMNODE_CUTS", "2"))
    seed = random.SystemRandom().randrange(10**6)
    try:
        tally = cutting(tmp_path, cuts, seed, system, redo_log_mb)
    except NoDisk as why:
        pytest.skip(str(why))
    print(f"{tally}; seed {seed}")
    assert tally.acknowledged
    assert (tally.lost, tally.trouble) == ([], []), f"{tally}; seed {seed}"


@pytest.mark.timeout(900)
def test_random_kills_under_load_lose_nothing_and_duplicate_nothing(tmp_path: Path) -> None:
    kills = int(os.environ.get("DICOMNODE_KILLS", "20"))
    seed = random.SystemRandom().randrange(10**6)
    tally = campaign(tmp_path, kills, seed)
    print(f"{tally}; seed {seed}")
    assert len(tally.series) >= 4
    assert tally.clean, f"{tally}; seed {seed}"
