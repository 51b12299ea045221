"""The package as ckptkit finds it: by its entry point, in a fresh process, through public names alone."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ckptkit_safetensors

PUBLIC = {f"ckptkit{name}" for name in ("", ".args", ".errors", ".options", ".storage", ".hookspecs", ".testing")}


def test_only_public_modules_of_ckptkit_are_imported():
    for file in Path(ckptkit_safetensors.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {m for m in modules if m.split(".")[0] == "ckptkit"} <= PUBLIC, file


def test_the_readme_prints_what_it_says(tmp_path):
    text = importlib.metadata.metadata("ckptkit-safetensors").get_payload()  # there where the package alone is installed
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert run(f"import os\nos.chdir({str(tmp_path)!r})\n{code}").splitlines() == expected


def test_the_versions_agree():
    assert importlib.metadata.version("ckptkit-safetensors") == ckptkit_safetensors.__version__


def run(code):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_fresh_process_saves_and_restores_unasked(tmp_path):
    path = str(tmp_path / "c")
    run(f"import ckptkit, numpy as np\nckptkit.save({path!r}, {{'a': np.arange(5)}}, storage='safetensors')")
    assert run(f"import ckptkit\nprint(ckptkit.restore({path!r})['a'])").strip() == "[0 1 2 3 4]"


def test_the_library_is_not_imported(tmp_path):
    code = f"""
import sys, ckptkit, numpy as np
ckptkit.save({str(tmp_path / "c")!r}, {{'a': np.arange(5)}}, storage='safetensors')
print('safetensors' in sys.modules)
"""
    assert run(code).strip() == "False"


@pytest.mark.parametrize("kind", ["save", "restore"])
def test_without_the_package_the_error_says_that_something_is_missing(tmp_path, kind):
    import ckptkit

    registry = ckptkit.Registry.with_builtins()
    with ckptkit.StandardCheckpointer(storage="safetensors", registry=registry) as checkpointer:
        if kind == "save":
            with pytest.raises(ckptkit.errors.RegistryError, match=r"no storage backend 'safetensors'. Known: ocdbt, zarr"):
                checkpointer.save(tmp_path / "c", {"a": 1})
        else:
            ckptkit.save(tmp_path / "c", {"a": 1}, storage="safetensors")
            with pytest.raises(ckptkit.errors.RegistryError, match=r"ckptkit-safetensors .* has not registered it here"):
                checkpointer.restore(tmp_path / "c")
