"""What holoscan-cli asks of Docker, done with buildah and podman: nothing else of holoscan-cli is replaced.

Its Dockerfile fetches from Ubuntu's and NVIDIA's servers, by the package versions of its own base image. Here it is
built on ctflow's image, emptied of everything that packaging puts in; instructions that fetch are left out, as that
image has what they would bring. Run as a program: KEEP WORD ..., where KEEP gets a copy of the build context.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from holoscan_cli.__main__ import main as run_command_line
from holoscan_cli.common import dockerutils
from holoscan_cli.runner import runner

from map_support import IMAGE, LIMITS, PODMAN

_FETCHES = ("apt", "pip ", "curl", "rm -f /etc/apt", "groupadd", "useradd", "if id", "rm -rf /usr/lib/python3.12")
_EMPTY = """\
USER 0:0
RUN rm -rf /opt/holoscan /etc/holoscan /var/holoscan/tools /var/holoscan/app.yaml
COPY jq/bin/ /usr/local/bin/
COPY jq/lib/ /usr/local/lib/
RUN /sbin/ldconfig
"""


def instructions_of(dockerfile: str) -> list[str]:
    """The instructions without comments, continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    return [line.strip() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def offline_dockerfile(dockerfile: str, base: str) -> str:
    """The Dockerfile on another base, without what fetches."""
    kept = []
    for line in instructions_of(dockerfile):
        if line.startswith("RUN ") and line.removeprefix("RUN ").strip().startswith(_FETCHES):
            continue
        kept.append(re.sub(r"^FROM \S+ AS base$", f"FROM {base} AS base\n{_EMPTY}", line))
    return "\n".join(kept) + "\n"


def copy_jq(target: Path) -> None:
    """This machine's jq, which holoscan-cli's tools need, with its libraries."""
    program = shutil.which("jq")
    assert program, "jq is not installed"
    for name in ("bin", "lib"):
        (target / name).mkdir(parents=True)
    shutil.copy(program, target / "bin")
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    for path in re.findall(r"=> (\S*/lib(?:jq|onig)\S*)", listed):
        shutil.copy(path, target / "lib")


class Docker:
    """Stands for `python_on_whales.docker` in `holoscan_cli.common.dockerutils`.

    Args:
        keep: Gets a copy of the build context.
    """

    def __init__(self, keep: Path) -> None:
        self._keep = keep
        self.buildx = SimpleNamespace(list=list, create=lambda **_: SimpleNamespace(name="builder"), build=self._build)
        self.network = SimpleNamespace(list=lambda **_: [SimpleNamespace(name="host")])
        self.image = SimpleNamespace(exists=self._exists)
        self.container = SimpleNamespace(create=self._create)

    def _build(self, **given: Any) -> None:
        shutil.copytree(given["context_path"], self._keep)
        copy_jq(self._keep / "jq")
        dockerfile = self._keep / "Dockerfile.offline"
        dockerfile.write_text(offline_dockerfile((self._keep / "Dockerfile").read_text(), IMAGE))
        values = [word for name, text in given["build_args"].items() for word in ("--build-arg", f"{name}={text}")]
        command = ["buildah", "build", "--isolation", "chroot", "--pull=false", "--format", "docker", *values]
        (tag,) = given["tags"]
        subprocess.run([*command, "-t", f"localhost/{tag}", "-f", dockerfile, self._keep], check=True, timeout=500)

    @staticmethod
    def _exists(name: str) -> bool:
        return subprocess.run(["podman", "image", "exists", name], check=False).returncode == 0

    @staticmethod
    def _create(image: str, **given: Any) -> Container:
        # No NVIDIA runtime and no Docker network are here.
        assert given["runtime"] == "nvidia"
        words = [word for name, text in given["envs"].items() for word in ("-e", f"{name}={text}")]
        words += [word for source, target in given["volumes"] for word in ("-v", f"{source}:{target}")]
        words += ["--user", given["user"], "--workdir", given["workdir"], "--network", "none", *LIMITS]
        command = [*PODMAN, "create", *words, image, *given["command"]]
        return Container(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(), given)


class Container:
    """A container that podman made, with the attributes that holoscan-cli looks at."""

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        self.name = self.id = name
        self.config = SimpleNamespace(hostname="", user=given["user"])
        self.host_config = SimpleNamespace(ulimits=[], cap_add=[], ipc_mode="", shm_size=0)
        self.state = SimpleNamespace(exit_code=None)

    def start(self, *, attach: bool, stream: bool) -> Iterator[tuple[str, bytes]]:
        assert attach
        assert stream
        done = subprocess.run([*PODMAN, "start", "--attach", self.id], capture_output=True, check=False, timeout=500)
        self.state.exit_code = done.returncode
        yield "stdout", done.stdout
        yield "stderr", done.stderr

    def remove(self) -> None:
        subprocess.run(["podman", "rm", self.id], check=True, capture_output=True)


def main() -> None:
    keep, *words = sys.argv[1:]
    sys.argv = ["monai-deploy", *words]
    dockerutils.docker = Docker(Path(keep))
    runner._dependency_verification = lambda name: True  # looks for the program of Docker itself
    run_command_line(sys.argv)


if __name__ == "__main__":
    main()
