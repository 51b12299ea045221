"""The package as ckptkit finds it: by its entry point, in a fresh process, without torch until there is a tensor."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys

import pytest

import ckptkit
import ckptkit_torch

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


def run(code):
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_is_not_imported_before_there_is_a_tensor(tmp_path):
    code = f"""
import sys, ckptkit, numpy as np
ckptkit.save({str(tmp_path / "c")!r}, {{'a': np.arange(5)}})
ckptkit.restore({str(tmp_path / "c")!r})
print('ckptkit_torch' in sys.modules, 'torch' in sys.modules)
"""
    assert run(code) == "True False\n"


def test_the_versions_agree():
    assert importlib.metadata.version("ckptkit-torch") == ckptkit_torch.__version__


def test_without_torch_a_tensor_is_refused_with_what_to_do():
    code = """
import sys; sys.modules['torch'] = None
import numpy as np
from ckptkit.leaves import LeafSpec, RestoreArgs
from ckptkit.storage import ArraySpec, Job
from ckptkit_torch import TorchHandler
spec = LeafSpec('torch.Tensor', ArraySpec('w', (3,), np.dtype(np.float32), (3,)))
print(TorchHandler().needs([spec], [RestoreArgs()], Job())[0].message)
"""
    assert re.match("a tensor, but torch cannot be imported .*; install it, or give a np.ndarray as target", run(code))


@needs_torch
def test_the_readme_prints_what_it_says(tmp_path):
    text = importlib.metadata.metadata("ckptkit-torch").get_payload()  # there where the package alone is installed
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    expected = re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE)
    assert expected
    assert run(f"import os\nos.chdir({str(tmp_path)!r})\n{code}").splitlines() == expected


@needs_torch
def test_without_the_package_the_error_names_it(tmp_path):
    import torch

    ckptkit.save(tmp_path / "c", {"a": torch.ones(2)})
    with (
        ckptkit.StandardCheckpointer(registry=ckptkit.Registry.with_builtins()) as checkpointer,
        pytest.raises(ckptkit.errors.RegistryError, match=r"ckptkit-torch .* has not registered it here"),
    ):
        checkpointer.restore(tmp_path / "c")
