"""What every test may use."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from pathlib import Path

import pydicom.config
import pytest
from hypothesis import settings

from bundle_support import coarse_unet_bundle
from ctflow.dicom.write.ct_series import write_ct_series
from needs import skip_without, summary_of_skips
from phantom_support import phantom_drawn_once

# Tests write what the standard does not allow, of which pydicom warns; `tests/unit/compat` has it raise.
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE

# The same examples on every machine and in every run; tests/random_search.py asks for the other profile and a seed.
settings.register_profile("same", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile("random", derandomize=False, deadline=None, print_blob=True)
settings.load_profile("same")


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed: large tensors come and go, and the system would clear the same pages each time.

    That was a fifth of the processor time of all tests.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)  # not in every C library
    if adjust is not None:
        most_mapped, trim_threshold = -4, -1
        adjust(most_mapped, 0)
        adjust(trim_threshold, 2**30)


_keep_freed_memory()


@pytest.fixture(autouse=True)
def _seeded():
    """What a test draws with torch's global generator is the same in every run."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def _no_tracebacks():
    """A test that asks for tracebacks (`--debug`) leaves the next one a log without them."""
    yield
    # By its method: a level that is set otherwise leaves what the logger keeps of what it lets through.
    logging.getLogger("ctflow.core.entry_point").setLevel(logging.NOTSET)


@pytest.fixture(scope="session")
def data() -> Path:
    """Real CT (CTFLOW_DATA, or shared/data beside the checkout); the test is skipped where there is none."""
    folder = Path(os.environ.get("CTFLOW_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "lidc-idri-0314").is_dir():
        skip_without("real CT")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _plain_engine(tmp_path_factory):
    """Tests run PyTorch eager and touch no one's cache, unless they ask for another engine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CTFLOW_ENGINE", "eager")
        patch.setenv("CTFLOW_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def coarse_bundle(tmp_path_factory) -> Path:
    return coarse_unet_bundle(tmp_path_factory.mktemp("bundle") / "coarse")


@pytest.fixture(scope="session")
def series(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("series")
    write_ct_series(phantom_drawn_once(5, (24, 96, 96)).volume, folder / "ct", seed=5)
    return folder / "ct"


def pytest_collection_modifyitems(items):
    """Whole processes come first, so that none of them runs alone at the end; coverage is what unit tests run.

    A measured Python takes 2.2 times as long. Processes that a test starts are not measured anyway, and what is
    exhaustive runs the lines of its part in `make test`.
    """
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
    unit = Path(__file__).parent / "unit"
    for item in items:
        if unit not in item.path.parents or item.get_closest_marker("exhaustive"):
            item.add_marker("no_cover")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """With CI=true a skip is a failure: what a test needs must be installed there."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped although CI=true: {call.excinfo.value if call.excinfo else ''}"
    return report


def pytest_terminal_summary(terminalreporter):
    """The last line before the totals says which tests were skipped for want of what, and how to get it."""
    skipped = terminalreporter.stats.get("skipped", [])
    if line := summary_of_skips(str(report.longrepr[-1]) for report in skipped):
        terminalreporter.write_line(line, yellow=True)
