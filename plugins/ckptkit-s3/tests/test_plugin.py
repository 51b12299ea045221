"""The package as it is installed: ckptkit finds it by its entry point, and it uses public names alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ckptkit
import ckptkit_s3


def test_installing_it_is_all_it_takes():
    locations = [ckptkit.default_registry().location(url) for url in ("s3://bucket/a/b", "gs://bucket/a/b")]
    assert [location.url for location in locations] == ["s3://bucket/a/b", "gs://bucket/a/b"]
    assert [location.kvstore()["driver"] for location in locations] == ["s3", "gcs"]


def test_its_import_is_cheap():
    code = "import sys, ckptkit_s3; print('tensorstore' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "False\n"


def test_it_uses_public_names_alone():
    tree = ast.parse(Path(ckptkit_s3.__file__).read_text())
    used = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {name for name in used if name.startswith("ckptkit")} == {"ckptkit", "ckptkit.storage"}
