from fractions import Fraction

import numpy as np
import pytest

import ckptkit
from ckptkit.testing import CheckpointHandlerTests, TypeHandlerTests
from ckptkit_example.fractions import FractionHandler
from ckptkit_example.notes import NotesHandler, NotesRestore, NotesSave


class TestFractions(TypeHandlerTests):
    leaf_types = Fraction

    @pytest.fixture
    def handler(self):
        return FractionHandler()

    @pytest.fixture
    def make_leaf(self):
        return lambda seed: Fraction(seed - 10, 7)


class TestNotes(CheckpointHandlerTests):
    @pytest.fixture
    def handler(self):
        return NotesHandler()

    @pytest.fixture
    def make_item(self):
        return lambda seed: ["learning rate halved", f"seed {seed}"]

    @pytest.fixture
    def make_args(self):
        return NotesSave

    def spoil(self, item):
        item.clear()


def test_the_last_lines(tmp_path):
    ckptkit.save(tmp_path / "notes", NotesSave(["one", "two", "three"]))
    assert ckptkit.restore(tmp_path / "notes", NotesRestore(last=2)) == ["two", "three"]


def test_fractions_that_are_too_large_are_refused(tmp_path):
    with pytest.raises(ckptkit.errors.TreeError, match="save it as a str"):
        ckptkit.save(tmp_path / "tree", {"rate": Fraction(2**70, 3)})


def test_a_target_that_is_a_fraction_takes_nothing_else(tmp_path):
    ckptkit.save(tmp_path / "tree", {"rate": np.zeros((2, 3))})
    with pytest.raises(ckptkit.errors.TargetError, match="a Fraction was asked for, but none is stored"):
        ckptkit.restore(tmp_path / "tree", {"rate": Fraction(1, 2)})


def test_each_checkpoint_is_logged(tmp_path, caplog):
    with caplog.at_level("INFO", "ckptkit_example"):
        ckptkit.save(tmp_path / "tree", {"rate": Fraction(1, 3)})
    assert "tree: 1 leaves, 16 bytes" in caplog.text
