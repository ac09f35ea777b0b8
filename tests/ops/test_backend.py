"""Which backends an operation has, and that only the chosen ones are imported."""

import subprocess
import sys

import pytest

from atma.ops.backend import BACKENDS, backend_for, backends_of, implementation, operations

ONE_CALL = """
import sys, torch
import atma.ops
from atma.ops import use_backend
x = torch.ones(1, 3, 2)
with torch.inference_mode():
    atma.ops.causal_conv(x, torch.ones(2, 2), backend="cpu")
kinds = ("reference", "cpu", "native", "gpu", "fla")
print(*sorted(name for name in sys.modules if name.startswith("atma.ops.") and name.endswith(kinds)))
print("triton" in sys.modules)
"""


def test_an_operation_has_the_backends_whose_files_its_folder_holds():
    found = {name: backends_of(name) for name in operations()}
    assert set(found) == {"chosen", "conv", "dense", "fast_weights", "loss", "polar", "recurrent"}
    assert found["recurrent"] == BACKENDS and found["polar"] == BACKENDS[:-1] and found["dense"] == ("cpu", "native")
    for name, backends in found.items():
        assert implementation(name, backends[0]).__name__ == f"atma.ops.{name}.{backends[0]}"


def test_a_backend_that_an_operation_has_not_is_refused_by_name():
    with pytest.raises(ValueError, match="loss has no backend 'fla'; it has reference, cpu, native, gpu"):
        backend_for("fla", operation="loss")


def test_a_call_imports_the_chosen_backend_of_its_operation_and_never_triton():
    result = subprocess.run([sys.executable, "-c", ONE_CALL], capture_output=True, text=True, check=True)
    modules, triton = result.stdout.splitlines()
    assert [name for name in modules.split() if name.count(".") == 3] == ["atma.ops.conv.cpu"]
    assert triton == "False"
