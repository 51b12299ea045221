"""What every test shares: the fixtures of ckptkit's conformance suite, eight CPU devices among them."""

from __future__ import annotations

import hypothesis

hypothesis.settings.register_profile("ckptkit-torch", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ckptkit-torch")


def pytest_configure(config):
    # Not by `pytest_plugins`, which pytest takes from the topmost conftest.py alone: this suite may be run with others.
    config.pluginmanager.import_plugin("ckptkit.testing.fixtures")
