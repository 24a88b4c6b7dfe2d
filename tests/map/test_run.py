"""The container segments under a hospital's flags, and its exit codes are the application's."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from bundle_support import small_unet_bundle
from map_support import HARDENED, IMAGE, LIMITS, PODMAN, run_image, writable_folder
from nnunet_support import dataset, plans, untrained, zipped
from tests_support import dciodvfy_errors

FILES = {"segmentation.dcm", "measurements.dcm", "preview.png", "report.html", "result.json"}


def result_of(output: Path) -> Path:
    (folder,) = (path for path in output.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def another_bundle(tmp_path_factory) -> Path:
    folder = small_unet_bundle(tmp_path_factory.mktemp("bundle") / "small")
    for path in (folder.parent, folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def test_a_phantom_gives_the_files_of_ctflow_run_to_any_user(chest, expected, tmp_path):
    for user in ("1000:1000", "4242:4242"):
        output = writable_folder(tmp_path / user.partition(":")[0])
        mounts = {"/var/holoscan/input:ro": chest, "/var/holoscan/output": output}
        done = run_image(mounts=mounts, options=["--user", user])
        assert done.returncode == 0, done.stderr
        assert {path.name for path in result_of(output).iterdir()} == FILES
        # The same bytes: so a second run also gives the same UIDs.
        for name in ("segmentation.dcm", "measurements.dcm"):
            assert (result_of(output) / name).read_bytes() == (result_of(expected) / name).read_bytes(), name
        document = json.loads((result_of(output) / "result.json").read_text())
        assert document["engine"]["backend"] == "openvino"
        assert document["segments"]


def test_a_user_without_an_entry_in_passwd_and_without_a_home_runs(chest, another_bundle, tmp_path):
    """As OpenShift starts containers, with nothing to write to but the output and /tmp."""
    output = writable_folder(tmp_path / "out")
    mounts = {"/var/holoscan/input:ro": chest, "/var/holoscan/output": output}
    mounts["/opt/holoscan/models:ro"] = another_bundle.parent  # quick
    options = ["--passwd=false", "--user", "54321:54321", "--unsetenv", "HOME", "-e", "CTFLOW_ENGINE=eager"]
    options += ["-e", "CTFLOW_RTSTRUCT=yes", "-e", "CTFLOW_PDF=yes"]
    done = run_image(mounts=mounts, options=options)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in result_of(output).iterdir()} == {*FILES, "structures.dcm", "report.dcm"}
    for name in ("structures.dcm", "report.dcm"):
        assert dciodvfy_errors(result_of(output) / name) == []
    assert {path.stat().st_uid for path in result_of(output).iterdir()} == {54321}


def test_a_mounted_zip_of_nnunet_runs(chest, tmp_path):
    coarse = plans(spacing=[8.0, 6.0, 6.0], patch_size=[16, 32, 32])  # quick
    folder = untrained(tmp_path / "trained", coarse, dataset())
    models, output = writable_folder(tmp_path / "models"), writable_folder(tmp_path / "out")
    zipped(folder, models / "model.zip").chmod(0o644)
    mounts = {
        "/var/holoscan/input:ro": chest, "/var/holoscan/output": output, "/opt/holoscan/models:ro": models,
    }  # fmt: skip
    done = run_image(["--mirror", "none"], mounts=mounts, options=["-e", "CTFLOW_ENGINE=eager"])
    assert done.returncode == 0, done.stderr
    document = json.loads((result_of(output) / "result.json").read_text())
    assert document["model"]["name"] == "Dataset001_Test"
    assert document["segments"]


def test_an_empty_input_is_exit_2(tmp_path):
    (tmp_path / "in").mkdir()
    output = writable_folder(tmp_path / "out")
    done = run_image(mounts={"/var/holoscan/input:ro": tmp_path / "in", "/var/holoscan/output": output})
    assert done.returncode == 2, done.stderr
    assert "NoUsableSeries [no-dicom]" in done.stderr
    assert [path.name for path in output.iterdir()] == ["result.json"]
    assert json.loads((output / "result.json").read_text())["error"]["reason"] == "no-dicom"


def test_an_output_that_cannot_be_written_is_exit_5(chest, another_bundle, tmp_path):
    output = writable_folder(tmp_path / "out")
    mounts = {"/var/holoscan/input:ro": chest, "/var/holoscan/output:ro": output}
    mounts["/opt/holoscan/models:ro"] = another_bundle.parent  # quick: the case is computed before it is written
    done = run_image(mounts=mounts, options=["-e", "CTFLOW_ENGINE=eager"])
    assert done.returncode == 5, done.stderr
    assert "NotWritten [unwritable]" in done.stderr


def test_too_little_memory_is_no_success(chest, tmp_path):
    output = writable_folder(tmp_path / "out")
    mounts = {"/var/holoscan/input:ro": chest, "/var/holoscan/output": output}
    done = run_image(mounts=mounts, options=["--memory", "300m", "--memory-swap", "300m"])
    assert done.returncode not in (0, 125, 126, 127), done.stderr  # those three are podman's own
    assert not list(output.glob("*/segmentation.dcm"))


def test_an_option_of_the_application_may_follow_the_image(chest, tmp_path):
    output = writable_folder(tmp_path / "out")
    mounts = {"/var/holoscan/input:ro": chest, "/var/holoscan/output": output}
    done = run_image(["--seg", "no-such-kind"], mounts=mounts)
    assert done.returncode == 64, done.stderr
    assert "--seg" in done.stderr


def test_a_stop_ends_it_with_the_exit_code_of_an_interruption(chest, tmp_path):
    output = writable_folder(tmp_path / "out")
    volumes = ["-v", f"{chest}:/var/holoscan/input:ro", "-v", f"{output}:/var/holoscan/output"]
    command = [*PODMAN, "run", "--rm", *LIMITS, *HARDENED, *volumes, IMAGE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:  # until it works
            if "reading headers" in line or "segmenting" in line:
                break
        process.send_signal(signal.SIGTERM)  # podman hands it to the container, as `podman stop` does
        process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert not list(output.glob("*/segmentation.dcm"))


def test_show_prints_the_manifests():
    app, package, both = run_image(["show", "app"]), run_image(["show", "pkg"]), run_image(["show"])
    assert [done.returncode for done in (app, package, both)] == [0, 0, 0]
    assert json.loads(app.stdout)["type"] == "application"
    assert json.loads(package.stdout)["models"]
    assert app.stdout in both.stdout
    assert package.stdout in both.stdout


def test_env_and_help_are_words_of_the_tools():
    environment, usage = run_image(["env"]), run_image(["help"])
    assert "HOLOSCAN_MODEL_PATH=/opt/holoscan/models/\n" in environment.stdout
    assert "extract" in usage.stdout


def test_extract_copies_every_part_or_the_mounted_one(tmp_path, root):
    everything = writable_folder(tmp_path / "everything")
    done = run_image(["extract"], mounts={"/var/run/holoscan/export": everything})
    assert done.returncode == 0, done.stderr
    assert {path.name for path in everything.iterdir()} == {"app", "config", "models", "docs"}
    assert {path.name for path in (everything / "config").iterdir()} == {"app.yaml", "app.json", "pkg.json"}
    assert (everything / "app/__main__.py").read_bytes() == (root / "opt/holoscan/app/__main__.py").read_bytes()
    assert list((everything / "models").glob("*/models/model.pt"))
    one = writable_folder(tmp_path / "config")
    done = run_image(["extract"], mounts={"/var/run/holoscan/export/config": one})
    assert done.returncode == 0, done.stderr
    assert {path.name for path in one.iterdir()} == {"app.yaml", "app.json", "pkg.json"}


def test_extract_says_what_is_missing(tmp_path):
    done = run_image(["extract"])
    assert done.returncode == 64
    assert "/var/run/holoscan/export" in done.stderr
    closed = tmp_path / "closed"
    closed.mkdir()
    done = run_image(["extract"], mounts={"/var/run/holoscan/export:ro": closed})
    assert done.returncode == 5, done.stderr


def test_a_mounted_bundle_keeps_its_engine_in_the_mounted_cache(chest, another_bundle, tmp_path):
    cache, output = writable_folder(tmp_path / "cache"), writable_folder(tmp_path / "out")
    mounts = {
        "/var/holoscan/input:ro": chest,
        "/var/holoscan/output": output,
        "/opt/holoscan/models:ro": another_bundle.parent,
        "/var/holoscan/cache": cache,
    }
    done = run_image(mounts=mounts)
    assert done.returncode == 0, done.stderr
    assert list(cache.glob("onnx-*/engine.onnx"))
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("engine.onnx")}
    again = run_image(mounts={**mounts, "/var/holoscan/output": writable_folder(tmp_path / "again")})
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("engine.onnx")} == made


def test_a_mounted_bundle_without_a_cache_wants_one_unless_pytorch_may_compute(chest, another_bundle, tmp_path):
    mounts = {"/var/holoscan/input:ro": chest, "/opt/holoscan/models:ro": another_bundle.parent}
    named = run_image(mounts={**mounts, "/var/holoscan/output": writable_folder(tmp_path / "named")})
    assert named.returncode == 5, named.stderr
    output = writable_folder(tmp_path / "auto")
    auto = run_image(mounts={**mounts, "/var/holoscan/output": output}, options=["-e", "CTFLOW_ENGINE=auto"])
    assert auto.returncode == 0, auto.stderr
    (path,) = output.glob("*/result.json")
    document = json.loads(path.read_text())
    assert document["engine"]["backend"] == "eager"
    assert any("--cache" in warning for warning in document["warnings"])
