from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import ctflow
from ctflow.bundle import demonstration_bundle, find_bundle, locate
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason


def test_a_bundle_is_itself_and_a_folder_with_one_bundle_means_it(bundle):
    assert find_bundle(bundle) == bundle
    (bundle.parent / "notes").mkdir()
    assert find_bundle(bundle.parent) == bundle


def test_several_bundles_are_refused_with_their_names(bundle):
    shutil.copytree(bundle, bundle.parent / "other")
    with raises_reason(BundleInvalid, "several-bundles", names="(other, small)"):
        find_bundle(bundle.parent)


def test_what_is_no_bundle_is_refused_and_says_what_was_found(tmp_path):
    (tmp_path / "pictures").mkdir()
    with raises_reason(BundleInvalid, "no-bundle", names="pictures"):
        find_bundle(tmp_path)
    with raises_reason(BundleInvalid, "no-bundle", names="pictures"):
        find_bundle(tmp_path / "pictures")
    with raises_reason(BundleInvalid, "no-bundle", names="absent"):
        find_bundle(tmp_path / "absent")
    (tmp_path / "model.ts").write_bytes(b"x")
    with raises_reason(BundleInvalid, "no-bundle", names="model.ts"):
        find_bundle(tmp_path / "model.ts")


def test_a_folder_may_hold_a_zip_instead_of_a_folder(bundle, tmp_path):
    models = tmp_path / "mounted"
    models.mkdir()
    for name in ("a.zip", "b.zip"):
        with zipfile.ZipFile(models / name, "w") as archive:
            archive.writestr("Dataset/plans.json", "{}")
        if name == "a.zip":
            (models / "notes.zip").write_text("not a zip")
            assert find_bundle(models) == models / "a.zip"
    with raises_reason(BundleInvalid, "several-bundles", names="(a.zip, b.zip)"):
        find_bundle(models)
    shutil.copytree(bundle, models / "unpacked")
    assert find_bundle(models) == models / "unpacked", "what was unpacked from them"


def test_a_name_too_long_for_the_file_system_is_bundle_invalid():
    with raises_reason(BundleInvalid, "no-bundle"):
        find_bundle(Path("x" * 5000))


def test_the_demonstration_lies_in_the_package_or_beside_the_source(tmp_path, monkeypatch):
    assert (demonstration_bundle() / "configs" / "metadata.json").is_file()
    source = demonstration_bundle()
    package = tmp_path / "site" / "lib" / "ctflow"
    package.mkdir(parents=True)
    monkeypatch.setattr(ctflow, "__file__", str(package / "__init__.py"))
    with raises_reason(BundleInvalid, "no-bundle"):
        demonstration_bundle()
    shutil.copytree(source / "configs", tmp_path / "site" / "bundle" / "configs")
    assert demonstration_bundle() == tmp_path / "site" / "bundle"
    shutil.copytree(source / "configs", package / "demonstration" / "configs")
    assert demonstration_bundle() == package / "demonstration"
    assert locate.WEIGHTS == "models/model.pt"
