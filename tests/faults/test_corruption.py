"""One bit flipped in every byte, files cut off, lost, and swapped: the values that were saved, or an error that says so."""

from __future__ import annotations

import pytest
from corruption import FORMATS, damages, saved
from sandbox import NEEDS_LINUX, files_of, open_damaged

pytestmark = NEEDS_LINUX

SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("name", "step"),
    [("ocdbt-zstd", 20), ("zarr3", 10), *(pytest.param(name, 1, marks=SLOW) for name in FORMATS)],
)
def test_damage_is_never_taken_for_what_was_saved(tmp_path, name, step):
    sound, other = saved(tmp_path / "sound", name, 7), saved(tmp_path / "other", name, 8)
    chosen = list(damages(str(sound), str(other)))[::step]
    outcomes = open_damaged(sound, chosen)
    bad = [(d.file, o) for d, o in zip(chosen, outcomes, strict=True) if not o.good]
    assert not bad, (len(bad), bad[:3])
    assert {damage.file for damage in chosen} == set(files_of(sound))
