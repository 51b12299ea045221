"""Metadata changed at random, a hundred thousand times: a value or an error of ours, in bounded memory and time."""

from __future__ import annotations

import zipfile
from pathlib import Path

import malformed
import pytest
from corruption import saved
from sandbox import NEEDS_LINUX, open_damaged, unlisted

pytestmark = NEEDS_LINUX

METADATA = {
    *("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "process_0", "_strings.json", "ckptkit_index.json", "metadata"),
    *(".zarray", "zarr.json", "manifest.ocdbt", "checkpoint"),
}
SHARES = {"ocdbt": 55, "zarr": 20, "zarr3": 15, "aggregate": 8, "composite": 2}  # percent; the last takes several times as long
OLD = ("0.4.8.zip", "manager_items/3/state")


def sound(directory, name):
    """A checkpoint to start from; 'aggregate' is one of an older release, with everything in a file of msgpack."""
    if name != "aggregate":
        return unlisted(saved(directory / name, name, 7))
    with zipfile.ZipFile(Path(__file__).parent.parent / "data" / "old_checkpoints" / OLD[0]) as archive:
        archive.extractall(directory)
    return directory / OLD[1]


@pytest.mark.parametrize("total", [400, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("name", SHARES)
def test_malformed_metadata_are_refused_or_read(tmp_path, name, total):
    checkpoint = sound(tmp_path, name)
    damages = list(malformed.damages(str(checkpoint), METADATA, total * SHARES[name] // 100, seed=total))
    outcomes = open_damaged(checkpoint, damages, brief=True)
    bad = [(d, o) for d, o in zip(damages, outcomes, strict=True) if o.kind not in ("right", "wrong", "refused")]
    assert not bad, (len(bad), bad[:3])  # 'wrong' is what the changed metadata say
    assert max(outcome.peak_nbytes for outcome in outcomes) < 512 << 20
