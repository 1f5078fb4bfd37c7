"""The bounded run of the kill campaign; the long one is `python -m tests.chaos.campaign`."""

import os
import random
from pathlib import Path

import pytest

from tests.chaos.campaign import campaign
from tests.peers import ORTHANC, STORESCU, needs

pytestmark = [
    pytest.mark.network,
    pytest.mark.peers,
    pytest.mark.slow,
    needs(STORESCU, ORTHANC),
]


@pytest.mark.timeout(900)
def test_random_kills_under_load_lose_nothing_and_duplicate_nothing(tmp_path: Path) -> None:
    kills = int(os.environ.get("DICOMNODE_KILLS", "20"))
    seed = random.SystemRandom().randrange(10**6)
    tally = campaign(tmp_path, kills, seed)
    print(f"{tally}; seed {seed}")
    assert len(tally.series) >= 4
    assert tally.clean, f"{tally}; seed {seed}"
