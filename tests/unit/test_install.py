"""`make install` with stand-in wheels and no network: which Python and torch it takes, what an interruption leaves."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
INSTALL = REPOSITORY / "install"
FILES_OF_TORCH = 20
MANY_FILES = 1500  # so many that pip can be stopped between two of them
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="make installs on Linux")
pytestmark = ON_LINUX

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[tool.ctflow]
torch-cpu-index = "http://cpu.invalid/whl"
"""

BACKEND = '''
import zipfile
from pathlib import Path

METADATA = """Metadata-Version: 2.1
Name: ctflow
Version: 0.1.0
Requires-Dist: torch
Provides-Extra: dev
Requires-Dist: small; extra == "dev"
"""
SCRIPT = """#!/bin/sh
echo "ctflow $*" >> commands.txt
[ "$1" != evaluate ] || { echo "mean Dice 0.9"; echo "{}"; }
"""


def build_editable(folder, config_settings=None, metadata_directory=None):
    name = "ctflow-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(Path(folder) / name, "w") as wheel:
        script = zipfile.ZipInfo("ctflow-0.1.0.data/scripts/ctflow")
        script.external_attr = 0o100755 << 16
        wheel.writestr(script, SCRIPT)
        wheel.writestr("ctflow-0.1.0.dist-info/METADATA", METADATA)
        tags = "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n"
        wheel.writestr("ctflow-0.1.0.dist-info/WHEEL", tags)
        wheel.writestr("ctflow-0.1.0.dist-info/RECORD", "")
    return name
'''

APP = """
from pathlib import Path
Path("demo/out/1.2.3").mkdir(parents=True)
Path("demo/out/1.2.3/report.html").write_text("report")
"""


def make_wheel(folder: Path, name: str, release: str, files: int, *requirements: str) -> None:
    stem = f"{name}-{release}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        for number in range(files):
            wheel.writestr(f"{name}/part{number}.txt", str(number))
        needs = "".join(f"Requires-Dist: {each}\n" for each in requirements)
        wheel.writestr(
            f"{stem}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {release}\n{needs}"
        )
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{stem}.dist-info/RECORD", "")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    make_wheel(folder, "torch", "2.13.0", FILES_OF_TORCH)
    make_wheel(folder, "small", "1.0", 3)
    return folder


@pytest.fixture(scope="module")
def large_wheels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large-wheels")
    make_wheel(folder, "torch", "2.13.0", MANY_FILES)
    make_wheel(folder, "small", "1.0", 3)
    return folder


@pytest.fixture
def project(tmp_path) -> Path:
    """A project of the same shape, whose packages are a few kilobytes, in a path with a space."""
    folder = tmp_path / "a path with a space"
    shutil.copytree(INSTALL, folder / "install", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "Makefile", folder)
    (folder / "app").mkdir()
    (folder / "app/__main__.py").write_text(APP)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "constraints.txt").write_text("torch==2.13.0\nsmall==1.0\n")
    return folder


def environment(wheels: Path | None = None, **more: str) -> dict[str, str]:
    names = ("PYTHON", "TORCH", "MAKEFLAGS", "MAKELEVEL", "PYTHONPATH")
    kept = {key: value for key, value in os.environ.items() if key not in names and not key.startswith("PIP_")}
    kept |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PYTHON": sys.executable}
    if wheels is not None:
        kept |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    return kept | more


def make(project: Path, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *words], cwd=project, env=env, capture_output=True, text=True, check=False, timeout=300
    )


def files_of_torch(project: Path) -> int:
    return len(list(project.glob(".venv/lib/*/site-packages/torch/part*.txt")))


def test_a_demo_installs_runs_and_says_what_comes_next(project, wheels):
    done = make(project, "demo", env=environment(wheels))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3.7 GB" in done.stdout.partition("Looking in links")[0], "the size is named before a download begins"
    assert "TORCH=cpu" in done.stdout
    last = done.stdout.rpartition("mean Dice")[2]
    assert "demo/out/1.2.3/report.html" in last
    assert "ctflow run -i YOUR_FOLDER" in last
    (path,) = (project / ".venv" / "lib").glob("python*/site-packages/ctflow-source.pth")
    assert path.read_text() == f"{project}/src\n", "so that a folder of that name is not taken for the package"
    again = make(project, "install", env=environment(wheels))
    assert again.returncode == 0
    assert again.stdout == "", "what is installed is not installed again"
    assert make(project, "clean", env=environment()).returncode == 0
    left = {path.name for path in project.iterdir()}
    assert left == {"Makefile", "app", "backend.py", "commands.txt", "constraints.txt", "install", "pyproject.toml"}


PLACES = [
    pytest.param("==> Python", signal.SIGINT, marks=pytest.mark.exhaustive),
    pytest.param("==> torch", signal.SIGKILL, marks=pytest.mark.exhaustive),
    ("Installing collected packages: torch", signal.SIGKILL),
    pytest.param("Installing collected packages: torch", signal.SIGINT, marks=pytest.mark.exhaustive),
    pytest.param("==> ctflow and the packages", signal.SIGKILL, marks=pytest.mark.exhaustive),
    pytest.param("Installing collected packages: small", signal.SIGINT, marks=pytest.mark.exhaustive),
    pytest.param("==> engines", signal.SIGINT, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(("line", "how"), PLACES)
def test_what_was_interrupted_ends_well_the_second_time(project, large_wheels, line, how):
    env = environment(large_wheels)
    with subprocess.Popen(
        ["make", "demo"], cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        for said in process.stdout or ():
            if said.startswith(line):
                os.killpg(process.pid, how)
                break
        else:
            pytest.fail(f"never said {line!r}")
        process.communicate(timeout=60)
    assert process.returncode != 0
    done = make(project, "demo", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files_of_torch(project) == MANY_FILES, "no package is left by half"
    assert not (project / ".venv/.incomplete").exists()


class Proxy(BaseHTTPRequestHandler):
    """Serves an index that only it can reach; may lose the connection in the middle of one file."""

    wheels: Path
    seen: list[str]
    lose: str = ""

    def do_GET(self) -> None:
        self.seen.append(self.path)
        parts = self.path.removeprefix("http://index.invalid/").strip("/").split("/")
        if parts[0] == "simple":
            links = [f'<a href="/files/{path.name}">{path.name}</a>' for path in self.wheels.glob(f"{parts[1]}-*.whl")]
            return self.answer("".join(links).encode(), "text/html")
        body = (self.wheels / parts[1]).read_bytes()
        if type(self).lose and parts[1].startswith(type(self).lose):
            type(self).lose = ""
            return self.answer(body, "application/octet-stream", send=len(body) // 2)
        return self.answer(body, "application/octet-stream")

    def answer(self, body: bytes, kind: str, send: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:send])

    def log_message(self, *_: object) -> None:
        """Nothing on the test's output."""


@pytest.fixture
def proxy(wheels) -> Iterator[tuple[type[Proxy], dict[str, str]]]:
    handler = type("Handler", (Proxy,), {"wheels": wheels, "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = {"PIP_INDEX_URL": "http://index.invalid/simple", "PIP_TRUSTED_HOST": "index.invalid", "PIP_RETRIES": "0"}
    yield handler, settings | {"http_proxy": address, "HTTP_PROXY": address, "no_proxy": ""}
    server.shutdown()
    server.server_close()


def test_a_proxy_is_taken_from_the_environment_and_a_lost_network_is_survived(project, proxy):
    handler, settings = proxy
    handler.lose = "small"
    lost = make(project, "install", env=environment(**settings))
    assert lost.returncode != 0
    assert "Run the same command again" in lost.stderr
    done = make(project, "install", env=environment(**settings))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"small", "torch"} <= {path.split("/")[4] for path in handler.seen}
    assert files_of_torch(project) == FILES_OF_TORCH


@pytest.mark.exhaustive
def test_an_index_that_is_not_reached_is_said_in_one_line(project, proxy):
    settings = {**proxy[1], "HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = make(project, "install", env=environment(**settings))
    assert done.returncode != 0
    assert "HTTPS_PROXY" in done.stderr
    assert "PIP_INDEX_URL" in done.stderr


@pytest.mark.parametrize("where", ["folder", pytest.param("cpu", marks=pytest.mark.exhaustive)])
def test_torch_comes_from_where_it_was_asked_for(project, wheels, tmp_path, proxy, where):
    other = tmp_path / "torch only"
    other.mkdir()
    make_wheel(other, "torch", "2.13.0+cpu", 2)
    handler, settings = proxy
    env = environment(**settings)
    if where == "folder":
        done = make(project, "install", f"TORCH={other}", env=env)
    else:
        text = (project / "pyproject.toml").read_text().replace("http://cpu.invalid/whl", "http://index.invalid/cpu")
        (project / "pyproject.toml").write_text(text)
        done = make(project, "install", "TORCH=cpu", env=env)
        assert done.returncode != 0
        assert "http://index.invalid/cpu/torch/" in handler.seen
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert files_of_torch(project) == 2
    assert str(other) in done.stdout
    assert make(project, "install", env=env).stdout == "", "without TORCH, what is there stays"
    moved = project.with_name("moved")
    project.rename(moved)
    (moved / ".venv/.incomplete").touch()
    again = make(moved, "install", env=env | {"PYTHON": ""})
    assert again.returncode == 0, again.stdout + again.stderr
    assert files_of_torch(moved) == 2, "what starts over, or was moved, keeps its source of torch"
    script = moved / ".venv/bin/ctflow"
    assert subprocess.run([script, "--help"], cwd=moved, check=False).returncode == 0


def test_a_place_for_torch_that_is_none_is_refused_before_anything_is_downloaded(project, wheels):
    done = make(project, "install", "TORCH=/no/such/folder", env=environment(wheels))
    assert done.returncode != 0
    assert "TORCH=/no/such/folder" in done.stderr
    assert not (project / ".venv").exists()


def stand_in(folder: Path, name: str, says: str, code: int = 1) -> None:
    """An interpreter that starts and, asked by check_python.py, says so."""
    file = folder / name
    file.write_text(f'#!/bin/sh\n[ "$1" != -c ] || exit 0\necho "{says}"\nexit {code}\n')
    file.chmod(0o755)


def test_the_newest_supported_python_is_taken_else_the_reason_is_one_line(project, tmp_path):
    path = tmp_path / "bin"
    path.mkdir()
    for program in ("sh", "dirname", "cat", "cksum", "sed", "grep", "rm", "mkdir", "touch", "make", "find"):
        (path / program).symlink_to(shutil.which(program) or "")
    env = environment(PATH=str(path), PYTHON="")
    done = make(project, "install", env=env)
    assert "no python3 here" in done.stderr
    (path / "python3.13").write_text("#!/bin/sh\nexit 127\n")  # a name that starts nothing
    (path / "python3.13").chmod(0o755)
    stand_in(path, "python3", "Python 3.10 is too old")
    done = make(project, "install", env=env)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "install: python3: Python 3.10 is too old"
    stand_in(path, "python3.11", "3.11", 0)
    stand_in(path, "python3.12", "3.12", 0)
    done = make(project, "install", env=env)
    assert "3.12" in done.stdout
    assert make(project, "install", env=env | {"PYTHON": "python9"}).stderr.startswith(
        "install: PYTHON=python9: no such"
    )


@pytest.fixture(scope="module")
def check_python():
    spec = importlib.util.spec_from_file_location("check_python", INSTALL / "check_python.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"version": (3, 10)}, "3.11 to 3.13"),
        ({"version": (2, 7)}, "too old"),
        ({"version": (3, 14)}, "Holoscan's wheels end at 3.13"),
        ({"version": (3, 12), "system": "Darwin", "machine": "arm64"}, "pip install ."),
        ({"version": (3, 12), "machine": "aarch64"}, "pip install ."),
        ({"version": (3, 12), "glibc": (2, 31)}, "glibc 2.31"),
        ({"version": (3, 12), "glibc": ()}, "another C library"),
        ({"version": (3, 11), "missing": ("ensurepip",)}, "python3.11-venv"),
        ({"version": (3, 13), "free_threaded": True}, "free-threaded"),
        ({"version": (3, 13), "bits": 32}, "32-bit"),
    ],
)
def test_an_interpreter_that_cannot_run_everything_is_told_why(check_python, given, said):
    found = check_python.problem(**given)
    assert said in found
    assert "\n" not in found


@pytest.mark.parametrize("supported", [(3, 11), (3, 12), (3, 13)])
def test_a_supported_interpreter_is_told_nothing(check_python, supported):
    assert check_python.problem(supported) == ""


def resolve(project: Path, wheels: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(wheels)}
    command = [sys.executable, str(INSTALL / "resolve.py"), "--project", str(project)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=env)


def project_to_resolve(folder: Path, constraints: str) -> Path:
    text = '[project]\nname = "ctflow"\nversion = "0.1.0"\ndependencies = ["torch>=2.13", "triton>=3"]\n'
    (folder / "pyproject.toml").write_text(text)
    (folder / "constraints.txt").write_text(constraints)
    return folder


@pytest.fixture
def index(tmp_path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder, "torch", "2.13.0", 1, "triton==3.7.1", "nvidia-cudnn")
    make_wheel(folder, "nvidia_cudnn", "9.0", 1)
    for name in ("filelock", "typing_extensions", "setuptools", "sympy", "networkx", "jinja2", "fsspec"):
        make_wheel(folder, name, "1.0", 1)
    for release in ("3.7.1", "3.9.0"):
        make_wheel(folder, "triton", release, 1)
    return folder


NAMES = "filelock==1.0\ntyping_extensions==1.0\nsetuptools==1.0\nsympy==1.0\nnetworkx==1.0\njinja2==1.0\nfsspec==1.0\n"


def test_every_combination_is_resolved_and_shown(tmp_path, index):
    done = resolve(project_to_resolve(tmp_path, "torch==2.13.0\n" + NAMES), index)
    assert done.returncode == 0, done.stderr
    for row in ("CUDA torch, 3.11", "CPU torch, 3.13", "macOS", "Windows", "Arm", "oldest"):
        assert row in done.stdout


@pytest.mark.parametrize(
    ("constraints", "said"),
    [
        ("torch==2.13.0\ntriton==3.9.0\n" + NAMES, "triton"),  # the CUDA build requires another one
        ("torch==2.13.0\n" + NAMES.replace("sympy==1.0\n", ""), "not in constraints.txt: sympy"),
        ("torch==2.99.0\n" + NAMES, "torch"),
    ],
)
def test_a_conflict_ends_the_resolution_with_its_text(tmp_path, index, constraints, said):
    done = resolve(project_to_resolve(tmp_path, constraints), index)
    assert done.returncode == 1
    assert said in done.stderr


def test_an_index_without_the_cuda_build_shows_nothing_of_it(tmp_path, index):
    make_wheel(index, "torch", "2.13.0", 1)
    done = resolve(project_to_resolve(tmp_path, "torch==2.13.0\n" + NAMES), index)
    assert done.returncode == 1
    assert "no CUDA build of torch" in done.stderr


def test_the_rest_of_an_environment_is_never_taken_for_one(project, wheels):
    env = environment(wheels)
    assert make(project, "install", env=env).returncode == 0
    for gone in ("pyvenv.cfg", "bin/python"):
        (project / ".venv" / gone).unlink()
        done = make(project, "install", env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "==> Python" in done.stdout, "made anew"
        assert files_of_torch(project) == FILES_OF_TORCH


def test_what_the_cpu_build_of_torch_requires_is_known():
    if "+cpu" not in version("torch"):
        pytest.skip("torch is not a CPU build here")
    names = {Requirement(line).name.lower() for line in requires("torch") or () if "extra ==" not in line}
    text = (INSTALL / "resolve.py").read_text()
    line = next(line for line in text.splitlines() if line.startswith("TORCH_ON_CPU"))
    assert names == set(line.partition("(")[2].strip(")").replace('"', "").replace(" ", "").split(","))
