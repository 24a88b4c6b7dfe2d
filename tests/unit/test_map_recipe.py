"""What the image is made of, without an image: its tools, manifests and names (tests/map runs the image itself)."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from bundle_support import small_unet_bundle
from ctflow import __version__
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason

RECIPE = Path(__file__).parents[2] / "MAP"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"map_{name}", RECIPE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tools, manifests, model = load("tools"), load("manifests"), load("model")


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package's files in a folder of this machine."""
    for name in ("app", "models/small", "docs"):
        (tmp_path / name).mkdir(parents=True)
    files = {
        "app/__main__.py": "import sys; sys.exit(int(sys.argv[1]))",
        "models/small/model.pt": "weights",
        "docs/README.md": "read",
        "app.yaml": "title: x",
        "pkg.json": '{"models": []}\n',
        "app.json": json.dumps({"command": shlex.join([sys.executable, str(tmp_path / "app")])}) + "\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    names = {
        "APPLICATION": "app", "MODEL_PATH": "models", "DOCS": "docs", "CONFIG_PATH": "app.yaml", "WORKDIR": ".",
        "APP_MANIFEST_PATH": "app.json", "PKG_MANIFEST_PATH": "pkg.json",
    }  # fmt: skip
    for name, path in names.items():
        monkeypatch.setenv(f"HOLOSCAN_{name}", str(tmp_path / path))
    return tmp_path


def test_show_of_one_manifest_is_plain_json(package, capsys):
    assert tools.main(["show", "pkg"]) == 0
    assert json.loads(capsys.readouterr().out) == {"models": []}


def test_show_prints_both_manifests_under_headings(package, capsys):
    assert tools.main(["show"]) == 0
    shown = capsys.readouterr().out
    assert shown.index(" app.json ") < shown.index('"command"') < shown.index(" pkg.json ") < shown.index('"models"')


@pytest.mark.parametrize(
    "words", [["show", "all"], ["show", "app", "pkg"], ["env", "x"], ["extract", "x"], ["help", "x"]]
)
def test_words_that_the_tools_do_not_know_are_a_usage_error(package, capsys, words):
    assert tools.main(words) == 64
    assert words[0] in capsys.readouterr().err


def test_a_missing_manifest_is_named(package, capsys):
    (package / "app.json").unlink()
    assert tools.main(["show", "app"]) == 4
    assert "app.json" in capsys.readouterr().err


def test_extract_without_a_mount_says_how(tmp_path):
    with pytest.raises(tools.Failed, match="nothing is mounted") as caught:
        tools.extract(tmp_path / "export")
    assert caught.value.exit_code == 64


def test_extract_fills_an_empty_export_with_all_parts(package, tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    tools.extract(export)
    found = {path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file()}
    assert found == {
        "app/__main__.py", "models/small/model.pt", "docs/README.md",
        "config/app.yaml", "config/app.json", "config/pkg.json",
    }  # fmt: skip


def test_extract_copies_every_part_that_is_mounted_and_no_other(package, tmp_path):
    export = tmp_path / "export"
    (export / "models").mkdir(parents=True)
    (export / "docs").mkdir()
    tools.extract(export)
    found = {path.relative_to(export).as_posix() for path in export.rglob("*") if path.is_file()}
    assert found == {"models/small/model.pt", "docs/README.md"}


def test_extract_onto_what_cannot_be_written_is_exit_5(package, tmp_path):
    export = tmp_path / "export"
    (export / "docs" / "README.md").mkdir(parents=True)  # stands where the file would go
    with pytest.raises(tools.Failed, match="docs") as caught:
        tools.extract(export)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("code", [0, 2, 5, 130])
def test_the_application_takes_the_place_of_the_tools_and_its_exit_code_is_kept(package, code):
    done = subprocess.run([sys.executable, RECIPE / "tools.py", str(code)], check=False, timeout=60)
    assert done.returncode == code


def test_help_and_env_go_to_standard_output(package, capsys):
    assert tools.main(["help"]) == 0
    assert tools.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert "extract" in shown
    assert f"HOLOSCAN_DOCS={package / 'docs'}\n" in shown


def test_manifests_follow_the_configuration():
    configuration = {"application": {"version": "1.2.3"}, "resources": {"cpu": 2, "gpu": 0, "memory": "4Gi"}}
    environment = {"HOLOSCAN_INPUT_PATH": "/in", "PATH": "/bin"}
    app = manifests.application_manifest(configuration, environment)
    assert app["environment"] == {"HOLOSCAN_INPUT_PATH": "/in"}
    assert app["version"] == "1.2.3"
    assert manifests.package_manifest(configuration, "cpu", "m")["resources"]["gpu"] == 0
    assert manifests.package_manifest(configuration, "cuda", "m")["resources"]["gpu"] == 1


def test_app_yaml_says_the_version_of_ctflow():
    text = (RECIPE.parent / "app" / "app.yaml").read_text()
    assert f"  version: {__version__}\n" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ctflow demonstration", "ctflow_demonstration"),
        ("../../Lung (v2)\n", "lung_v2"),
        ("", "model"),
        ("a" * 300, "a" * 100),
    ],
)
def test_a_bundle_name_becomes_a_folder_name(tmp_path, name, expected):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "metadata.json").write_text(json.dumps({"name": name}))
    assert model.name_of(tmp_path) == expected


@pytest.fixture
def trained(tmp_path) -> Path:
    """A model as nnU-Net leaves it, beside its predictions of training cases."""
    folder = tmp_path / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    files = {
        "plans.json": '{"dataset_name": "Dataset007 Pancreas"}', "dataset.json": "{}", "metadata.json": "{}",
        "fold_0/checkpoint_final.pth": "weights", "fold_1/checkpoint_final.pth": "weights",
        "fold_0/checkpoint_best.pth": "other weights", "fold_0/validation/patient.nii.gz": "a patient",
        "dataset_fingerprint.json": "{}", "fold_0/progress.png": "picture",
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def zip_of(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, Path("Dataset007") / folder.name / path.relative_to(folder))
    return target


@pytest.mark.parametrize("is_zip", [False, True], ids=["folder", "zip"])
def test_of_a_training_only_the_model_is_copied(trained, tmp_path, is_zip):
    path = zip_of(trained, tmp_path / "model.zip") if is_zip else trained
    assert model.name_of(path) == "dataset007_pancreas"
    model.copy(path, tmp_path / "copied")
    copied = tmp_path / "copied"
    assert {each.relative_to(copied).as_posix() for each in copied.rglob("*") if each.is_file()} == {
        "plans.json", "dataset.json", "metadata.json", "fold_0/checkpoint_final.pth", "fold_1/checkpoint_final.pth",
    }  # fmt: skip
    assert (copied / "fold_1" / "checkpoint_final.pth").read_text() == "weights"


def test_links_and_what_is_no_model_are_refused(trained, tmp_path):
    with pytest.raises(model.Refused, match=r"configs/metadata\.json"):
        model.name_of(tmp_path)
    with pytest.raises(model.Refused, match="configs/metadata"):
        model.name_of(tmp_path / "absent.zip")
    several = zip_of(trained, tmp_path / "model.zip")
    with zipfile.ZipFile(several, "a") as archive:
        archive.writestr("other/plans.json", "{}")
    with pytest.raises(model.Refused, match="2 folders"):
        model.name_of(several)
    (trained / "dataset.json").unlink()
    (trained / "dataset.json").symlink_to("/etc/passwd")
    with pytest.raises(model.Refused, match="links"):
        model.copy(trained, tmp_path / "copied")
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        archive.writestr("plans.json", "{}")
        link = zipfile.ZipInfo("dataset.json")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(model.Refused, match="links"):
        model.name_of(tmp_path / "link.zip")
    (trained / "plans.json").write_text("{")
    with pytest.raises(model.Refused, match=r"plans\.json is damaged"):
        model.name_of(trained)


def test_the_engine_is_made_of_the_configuration_that_the_image_names(tmp_path, monkeypatch):
    bundle = small_unet_bundle(tmp_path / "models" / "small")
    (bundle / "configs" / "inference.json").rename(bundle / "configs" / "other.json")
    monkeypatch.setenv("HOLOSCAN_MODEL_PATH", str(tmp_path / "models"))
    monkeypatch.setattr(sys, "argv", ["engine.py", "cpu", "eager", str(tmp_path / "kept"), str(tmp_path / "target")])
    engine = load("engine")
    with raises_reason(BundleInvalid, "missing-file"):
        engine.main()
    monkeypatch.setenv("CTFLOW_CONFIG", "other.json")
    assert engine.main() == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--flavour", "gpu"], "neither cpu nor cuda"),
        (["--nonsense"], "no option"),
        (["--tag"], "wants a value"),
    ],
)
def test_a_wrong_option_of_the_build_is_a_usage_error(words, message):
    done = subprocess.run(
        ["bash", RECIPE / "build.sh", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 64
    assert message in done.stderr


def test_the_build_refuses_a_folder_that_is_no_bundle(tmp_path):
    done = subprocess.run(
        ["bash", RECIPE / "build.sh", "--model", tmp_path], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 3
    assert "metadata.json" in done.stderr


def test_the_build_wants_only_requirements_of_pyproject():
    def run(*extras: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(RECIPE / "requirements.py"), *extras]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    plain, fast = run().stdout.splitlines(), run("openvino").stdout.splitlines()
    assert "einops>=0.8" in plain
    assert not [line for line in plain if line.startswith("openvino")]
    assert [line for line in fast if line.startswith("openvino")]
    unknown = run("no-such-extra")
    assert unknown.returncode == 64
    assert "no-such-extra" in unknown.stderr


BUSY = "error: sealing memfd copy: Device or resource busy"


@pytest.fixture
def build(tmp_path):
    """Runs the whole of build.sh with a stand-in for buildah, which fails so many times, and without wheels."""
    (tmp_path / "bin").mkdir()
    calls = tmp_path / "calls"
    programs = {
        "python": f"""case $* in *"-m pip"*|*torch_build.py*) ;; *) exec "{sys.executable}" "$@" ;; esac""",
        "buildah": f"""
            echo "$1" >> {calls}
            echo "$@" >> {calls}.words
            if [ "$1" = "$FAILS" ] && [ "$(grep -c "^$1" {calls})" -le "$TIMES" ]; then
              echo half; echo "$MESSAGE" >&2; exit 125
            fi
            case $1 in from) echo container ;; run) echo document ;; esac""",
    }
    for name, program in programs.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{program}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(
        fails: str, times: int, message: str = BUSY, more: Sequence[str] = ()
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": "python", "MAP_PAUSE": "0",
            "FAILS": fails, "TIMES": str(times), "MESSAGE": message,
        }  # fmt: skip
        words = ["--base", "localhost/base", "--tool", "buildah", "--no-archive", "--output", tmp_path / "out", *more]
        done = subprocess.run(
            ["bash", RECIPE / "build.sh", *words],
            env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        return done, calls.read_text().split()

    return run


@pytest.mark.parametrize("step", ["build", "run"])
def test_a_step_in_which_buildah_is_busy_is_repeated(build, tmp_path, step):
    done, calls = build(step, 2)
    assert done.returncode == 0, done.stderr
    whole = ["build", "from", "run", "run", "rm"]
    first = whole.index(step)
    assert calls == [*whole[:first], step, step, *whole[first:]]
    assert done.stderr.count("was busy") == 2
    for name in ("sbom.cdx.json", "licences.txt"):
        (document,) = (tmp_path / "out").glob(f"*.{name}")
        assert document.read_text() == "document\n", "nothing of the failed attempt is in it"


def test_a_model_of_nnunet_its_networks_and_the_options_of_a_bundle_get_into_the_image(build, trained, tmp_path):
    done, _ = build("none", 0, more=["--model", str(trained), "--config", "other.yaml", "--allow-code"])
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "calls.words").read_text()
    for expected in ("MODEL=dataset007_pancreas", "CONFIG=other.yaml", "ALLOW_CODE=yes"):
        assert f"--build-arg {expected}" in words
    copied = tmp_path / "out" / "context-cpu" / "model"
    assert (copied / "fold_0" / "checkpoint_final.pth").is_file()
    assert not (copied / "fold_0" / "validation").exists()
    assert "dynamic-network-architectures==" in (tmp_path / "out" / "wheels-cpu" / "key").read_text()


def test_a_buildah_that_stays_busy_ends_the_build(build):
    done, calls = build("build", 99)
    assert done.returncode == 125
    assert calls == ["build"] * 5
    assert BUSY in done.stderr


def test_another_failure_ends_the_build_at_once(build):
    done, calls = build("build", 1, "error: no space left on device")
    assert done.returncode == 125
    assert calls == ["build"]


# Says what it is asked, is of the build that CPU_BUILD names, and downloads only what lies in the folder DOWNLOADS.
PIP_STAND_IN = """#!/bin/sh
echo "$*" >> "$ASKED"
case "$*" in
  *torch_build.py\\ installed) exit "$INSTALLED_IS_GPU" ;;
  *torch_build.py*) exec "$REAL" "$@" ;;
  -c*) echo 3.11 ;;
  *model.py*) echo demonstration ;;
  *"pip download"*--no-deps*) cp "$DOWNLOADS"/torch-* "$(echo "$*" | sed 's/.*--dest \\([^ ]*\\).*/\\1/')" ;;
  *"pip download"*) exit 3 ;;
esac
"""


def torch_wheel(folder: Path, needs: str) -> None:
    with zipfile.ZipFile(folder / "torch-2.13.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch-2.13.0.dist-info/METADATA", f"Name: torch\nRequires-Dist: sympy\n{needs}")


def collect(tmp_path: Path, *words: str, **settings: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """Runs build.sh until it has torch; what pip was asked."""
    (tmp_path / "bin").mkdir()
    python, log = tmp_path / "bin" / "python", tmp_path / "asked"
    python.write_text(PIP_STAND_IN)
    python.chmod(0o755)
    log.touch()
    env = {
        **os.environ, "PYTHON": str(python), "ASKED": str(log), "INSTALLED_IS_GPU": "1", "DOWNLOADS": str(tmp_path),
        "REAL": sys.executable, **settings,
    }  # fmt: skip
    command = ["bash", RECIPE / "build.sh", "--tool", "true", "--base", "none", "--output", tmp_path / "out", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=env)
    return done, log.read_text()


@pytest.mark.parametrize(
    ("installed_is_gpu", "torch", "offered", "said", "asked"),
    [
        ("1", "", "", "from --index-url", "--index-url https://download.pytorch.org/whl/cpu"),
        ("0", "", "", "from the index of pip", "torch==2.13.0"),
        ("0", "as installed: cpu", "", "from --index-url", "--index-url https://download.pytorch.org/whl/cpu"),
        ("0", "as installed: http://mirror.invalid", "", "mirror.invalid", "--index-url http://mirror.invalid"),
        ("1", "pip", "", "from the index of pip", "torch==2.13.0"),
        ("1", "http://mirror.invalid/cpu", "", "mirror.invalid", "--index-url http://mirror.invalid/cpu"),
        ("1", "pip", "Requires-Dist: nvidia-cudnn-cu13\n", "MAP_TORCH=cpu", "torch==2.13.0"),
        ("1", "/no/such", "", "neither pip nor cpu", ""),
    ],
)
def test_the_cpu_image_takes_torch_for_cpus_and_says_from_where(
    tmp_path, installed_is_gpu, torch, offered, said, asked
):
    if torch.startswith("as installed: "):
        (tmp_path / ".torch").write_text(torch.removeprefix("as installed: ") + "\n")
        torch = ""
    torch_wheel(tmp_path, offered)
    done, log = collect(tmp_path, TORCH=torch, INSTALLED_IS_GPU=installed_is_gpu)
    assert said in done.stderr
    assert asked in log
    if offered or torch == "/no/such":  # nothing else was fetched
        assert done.returncode in {4, 64}
        assert "cyclonedx" not in log
        assert log.count("pip download") <= 1


FOR_GPUS = "Requires-Dist: nvidia-cudnn-cu13\n"


@pytest.mark.parametrize(
    ("torch", "offered", "refused"),
    [("", "", True), ("pip", "", False), ("", FOR_GPUS, False), ("pip", FOR_GPUS, False)],
)
def test_the_image_for_gpus_takes_torch_for_cpus_only_by_name(tmp_path, torch, offered, refused):
    torch_wheel(tmp_path, offered)
    done, log = collect(tmp_path, "--flavour", "cuda", TORCH=torch)
    assert ("MAP_TORCH" in done.stderr) is refused
    assert log.count("pip download") == (1 if refused else 2)
    assert done.returncode == (4 if refused else 3)  # 3: the stand-in downloads nothing else


def test_the_scripts_pass_shellcheck():
    scripts = [
        *sorted(RECIPE.glob("*.sh")),
        *sorted((RECIPE.parent / "install").glob("*.sh")),
        *sorted((RECIPE.parent / "benchmarks").glob("*.sh")),
        RECIPE.parent / ".ci" / "run",
    ]
    done = subprocess.run(
        [Path(sys.executable).parent / "shellcheck", *scripts], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout
