"""A user whom the machine does not know, with an empty environment: no passwd entry, no USER, no HOME."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from needs import skip_without

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
USER = "54321"
# The interpreter may lie in a folder of root's; a user namespace does for others what capabilities do for root.
AS_USER = (
    ["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups",
     "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    if os.geteuid() == 0
    else ["unshare", "--user", f"--map-user={USER}"]
)  # fmt: skip
WHO = "import getpass, os; print(os.getuid(), os.path.expanduser('~'), 'USER' in os.environ); getpass.getuser()"


def as_user(folder: Path, words: list[str | Path]) -> subprocess.CompletedProcess[str]:
    """Run a command as this user, with nothing in the environment but where programs are."""
    return subprocess.run(
        [*AS_USER, "env", "-i", "PATH=/usr/bin:/bin", *words],
        cwd=folder, capture_output=True, text=True, check=False, timeout=500,
    )  # fmt: skip


@pytest.mark.parametrize("command", [[BIN / "ctflow", "run"], [sys.executable, REPOSITORY / "app"]], ids=["run", "app"])
def test_a_user_whom_nobody_knows_runs(coarse_bundle, series, tmp_path, command):
    tmp_path.chmod(0o777)
    if subprocess.run([*AS_USER, "true"], capture_output=True, check=False).returncode:
        skip_without("namespaces of its own")
    who = as_user(tmp_path, [sys.executable, "-c", WHO])
    assert who.stdout == f"{USER} ~ False\n"
    assert "uid not found" in who.stderr
    words = ["-i", series, "-o", tmp_path / "out", "-m", coarse_bundle, "--engine", "eager", "--device", "cpu"]
    done = as_user(tmp_path, [*command, *words])
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*/segmentation.dcm"))) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"out"}, "nothing is left in a folder named ~"
