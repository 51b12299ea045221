"""One bit flipped in every byte, files cut off, lost, and swapped: the values that were saved, or an error that says so."""

from __future__ import annotations

import pytest
from corruption import FORMATS, damages, saved
from sandbox import NEEDS_LINUX, open_damaged

pytestmark = NEEDS_LINUX

UNCOVERED = {
    *("_METADATA", "_CHECKPOINT_METADATA", "_sharding", "_strings.json", "process_0", "ckptkit_index.json", "metadata"),
    *(".zarray", "zarr.json"),
}
"""Files that hold no checksum of their own; the chunks, and what is in a database, are covered by the index and by its nodes."""


class WrongValuesError(AssertionError):
    """Values came back that were never saved, and nothing worse happened."""


UNTIL_LISTED = pytest.mark.xfail(
    strict=True, raises=WrongValuesError, reason="no list of files with their checksums is written and verified yet"
)
SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("covered", [True, pytest.param(False, marks=UNTIL_LISTED)])
@pytest.mark.parametrize(
    ("name", "step"),
    [("ocdbt-zstd", 20), ("zarr3", 10), *(pytest.param(name, 1, marks=SLOW) for name in FORMATS)],
)
def test_damage_is_never_taken_for_what_was_saved(tmp_path, name, step, covered):
    sound, other = saved(tmp_path / "sound", name, 7), saved(tmp_path / "other", name, 8)
    chosen = [d for d in damages(str(sound), str(other)) if (d.file.rsplit("/", 1)[-1] not in UNCOVERED) is covered][::step]
    outcomes = open_damaged(sound, chosen)
    bad = [(d.file, o) for d, o in zip(chosen, outcomes, strict=True) if not o.good]
    if bad and all(outcome.kind == "wrong" for _, outcome in bad):
        raise WrongValuesError(f"{len(bad)} of {len(chosen)}: {bad[:3]}")
    assert not bad, (len(bad), [b for b in bad if b[1].kind != "wrong"][:3])
    assert len(chosen) > 10
