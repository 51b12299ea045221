"""What P processes saved, Q processes restore, on rows and on grids of devices, sharded, replicated and partly replicated."""

from __future__ import annotations

import pytest
from runner import play

pytestmark = pytest.mark.slow

COUNTS = (1, 2, 4, 8)
DEVICES = {1: 8, 2: 2, 4: 2, 8: 1}  # per process


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A directory with a checkpoint of each number of processes: of ckptkit, of its zarr backend, and of Orbax."""
    directory = tmp_path_factory.mktemp("matrix")
    for count in COUNTS:
        found = play(directory, count, ["writes", "saves_matrix"], devices=DEVICES[count], label=str(count))
        assert all("value" in result for result in found["writes"].values()), found
    return directory


@pytest.mark.parametrize("count", COUNTS)
def test_any_number_of_processes_restores_what_any_number_saved(written, count):
    options = {"devices": DEVICES[count], "labels": [str(saved) for saved in COUNTS]}
    found = play(written, count, ["reads", "bytes_read"], **options)
    assert len(found["reads"]) == count
    for result in found["bytes_read"].values():
        assert len(result["value"]) == len(COUNTS)
        assert max(result["value"]) <= 1.1
    for result in found["reads"].values():
        assert result["value"] == {f"{kind} {saved}": [] for saved in COUNTS for kind in ("ckptkit", "zarr", "orbax", "to orbax")}
