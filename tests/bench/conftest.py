"""Small machines and no peers from outside: a measurement of seconds."""

import pytest

from atma.bench import available, machine


@pytest.fixture(autouse=True, scope="module")
def small():
    """Rates of small products and copies, and no package of the extra: `transformers` and `fla` cannot be imported."""
    real = available.import_module

    def absent(name, *rest):
        if name.split(".")[0] in available.INSTALL:
            raise ImportError(name)
        return real(name, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(machine.PRODUCT_SIZES, "cpu", (64,))
        patch.setitem(machine.COPY_BYTES, "cpu", 1 << 16)
        patch.setattr(available, "import_module", absent)
        yield
