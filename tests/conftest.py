"""Shared fixtures: uninitialised memory is NaN, the golden vectors, a browser, and one tiny model of every kind."""

import os
import shutil
import zlib
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, as others' packages do
    os.environ.setdefault("TRITON_INTERPRET", "1")

from atma.config import ModelConfig

MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", MAC))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")
TESTS = Path(__file__).resolve().parent
SHARED = TESTS.parents[1] / "shared"


LONGEST = [
    "ops/test_native", "train/test_sharded_runs", "distributed/test_shared_rows", "documents/test_runs",
    "test_model", "sweep/test_dashboard", "sweep/test_command", "train/test_compiled", "train/test_parallel",
    "train/test_fine_tuning", "laws/test_laws", "test_selection", "ops/test_recurrence", "serve/test_exact",
    "documents/test_types", "third_party/test_third_party", "test_cli", "serve/http/test_page",
    "ops/test_recurrence_gpu", "ops/test_polar_gpu",
]  # fmt: skip
"""Files that take longest. A parallel run that begins with them does not wait for one of them at its end."""


def pytest_collection_modifyitems(items):
    turns = {TESTS / f"{name}.py": turn for turn, name in enumerate(LONGEST)}
    items.sort(key=lambda item: turns.get(item.path, len(turns)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Every test draws the same numbers wherever it runs: its seed is of its name, not of what ran before it."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(autouse=True)
def _nan_filled_memory():
    """`torch.empty` returns NaN: whatever reads before it writes shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def golden():
    """The folder of the flagship's golden vectors; the test skips where it is absent."""
    return _beside("golden")


@pytest.fixture
def golden_mixers():
    """The folder of golden vectors of all other mixers; the test skips where it is absent."""
    return _beside("golden_mixers")


def _beside(name: str) -> Path:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the golden vectors (../shared/{name}) are not beside this checkout")
    return SHARED / name


@pytest.fixture(scope="module")
def browser():
    """A browser without a window; the test skips where there is none. Of one module, because its event loop runs on in
    this thread and keeps `asyncio.run` from working in others."""
    if CHROMIUM is None:
        pytest.skip("no chromium on the path; install it to test the page in a browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def tab(browser):
    """One page of the browser, for all tests of a module in turn."""
    opened = browser.new_page()
    opened.set_default_timeout(120_000)  # a machine may be busy
    yield opened
    opened.close()


def tiny(core: str = "polar", memory: bool = True, window: int | None = None) -> ModelConfig:
    """Four layers, width 16, two query heads on one key/value head of width 8, vocabulary 23.

    The core "rope+canon" is rope with Canon."""
    core, _, canon = core.partition("+")
    return ModelConfig(
        vocab_size=23,
        width=16,
        depth=4,
        query_heads=2,
        key_value_heads=1,
        head_width=8,
        mlp_multiple=2,
        core=core,
        memory=memory,
        window=window,
        max_half_life=256,
        rope_canon=bool(canon),
    )
