"""Zips come from anywhere: what leads out of one, is a link or explodes is rejected, and nothing is written."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from pathlib import Path

import pytest

import nnunet_support as nnunet
from ctflow.bundle import find_bundle, read_bundle
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason

FOLDER = "Dataset001_Test/nnUNetTrainer__nnUNetPlans__3d_fullres/"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return nnunet.untrained(
        tmp_path_factory.mktemp("nnunet") / "nnUNetTrainer__nnUNetPlans__3d_fullres", nnunet.plans(), nnunet.dataset()
    )


@pytest.fixture
def archive(trained, tmp_path) -> Path:
    return nnunet.zipped(trained, tmp_path / "model.zip")


def add(archive: Path, name: str, content: bytes = b"x", mode: int = 0o100644) -> None:
    member = zipfile.ZipInfo(name)
    member.external_attr = mode << 16
    with zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr(member, content, zipfile.ZIP_DEFLATED)


@pytest.mark.parametrize(
    "name",
    ["../outside.txt", "a/../../outside.txt", "/etc/passwd", "C:/windows", "a\\..\\b"],
)
def test_names_that_lead_out_are_rejected(archive, tmp_path, name):
    add(archive, name)
    with raises_reason(BundleInvalid, "archive", names="model.zip"):
        read_bundle(find_bundle(archive))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.zip"]


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_links_and_devices_are_rejected(archive, kind):
    add(archive, FOLDER + "fold_1/checkpoint_final.pth", b"/etc/passwd", kind | 0o777)
    with raises_reason(BundleInvalid, "archive"):
        read_bundle(archive)


def test_a_name_that_occurs_twice_is_rejected(archive):
    with pytest.warns(UserWarning, match="Duplicate name"):
        add(archive, FOLDER + "plans.json")
    with raises_reason(BundleInvalid, "archive"):
        read_bundle(archive)


def test_weights_that_explode_are_rejected(archive):
    add(archive, FOLDER + "fold_1/checkpoint_final.pth", bytes(20_000_000))
    with raises_reason(BundleInvalid, "archive", names="fold_1"):
        read_bundle(archive)


def test_documents_that_explode_are_rejected(trained, tmp_path):
    archive = tmp_path / "bomb.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("plans.json", b" " * 100_000_000)
        opened.writestr("dataset.json", (trained / "dataset.json").read_bytes())
    with raises_reason(BundleInvalid, "unreadable-file", names="plans.json"):
        read_bundle(archive)


def test_a_size_that_lies_is_found(trained, tmp_path):
    archive = tmp_path / "lies.zip"
    content = (trained / "plans.json").read_bytes()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("plans.json", content)
        opened.writestr("dataset.json", (trained / "dataset.json").read_bytes())
    raw = archive.read_bytes().replace(len(content).to_bytes(4, "little") * 2, (10).to_bytes(4, "little") * 2)
    archive.write_bytes(raw)
    with raises_reason(BundleInvalid, "unreadable-file"):
        read_bundle(archive)


def test_encrypted_files_are_rejected(archive):
    raw = bytearray(archive.read_bytes())
    start = raw.rindex(b"PK\x01\x02")
    raw[start + 8] |= 1
    archive.write_bytes(raw)
    with raises_reason(BundleInvalid, "archive"):
        read_bundle(archive)


def test_a_zip_of_several_models_or_none_is_rejected(trained, tmp_path):
    several = nnunet.zipped(trained, tmp_path / "several.zip")
    add(several, "Dataset002/plans.json")
    with raises_reason(BundleInvalid, "several-bundles", names="Dataset002"):
        read_bundle(several)
    none = tmp_path / "none.zip"
    with zipfile.ZipFile(none, "w") as opened:
        opened.writestr("readme.txt", "nothing")
    with raises_reason(BundleInvalid, "no-bundle", names="no plans.json"):
        read_bundle(find_bundle(none))
    add(none, "spleen/configs/metadata.json")
    with raises_reason(BundleInvalid, "no-bundle", names="unpack it"):
        read_bundle(find_bundle(none))


@pytest.mark.parametrize("cut", [10, 1000, -1, -30])
def test_damaged_zips_are_rejected(archive, cut):
    archive.write_bytes(archive.read_bytes()[:cut])
    with raises_reason(BundleInvalid, "unreadable-file"):
        read_bundle(archive)


def test_random_bytes_never_escape_as_another_error(archive):
    raw = archive.read_bytes()
    for seed in range(60):
        position = (seed * 104_729 + 17) * 7919 % len(raw)
        damaged = io.BytesIO(raw)
        damaged.seek(position)
        damaged.write(bytes([seed * 5 % 256]) * 3)
        archive.write_bytes(damaged.getvalue())
        try:
            read_bundle(archive)
        except BundleInvalid as error:
            assert error.reason


def test_a_large_checkpoint_that_shrinks_as_weights_never_do_is_rejected(archive):
    add(archive, FOLDER + "fold_1/checkpoint_final.pth", bytes(i % 251 for i in range(997)) * 20_000)
    with zipfile.ZipFile(archive) as opened:
        member = opened.getinfo(FOLDER + "fold_1/checkpoint_final.pth")
    assert member.file_size > 2**24
    with raises_reason(BundleInvalid, "archive", names="fold_1/checkpoint_final.pth"):
        read_bundle(archive)


def test_files_that_overlap_are_rejected(archive):
    """One fold's bytes under the names of others: each is read again."""
    raw = archive.read_bytes()
    with zipfile.ZipFile(archive) as opened:
        start = opened.start_dir
        name = FOLDER + "fold_0/checkpoint_final.pth"
        assert name in opened.namelist()
    at = raw.rindex(name.encode()) - 46
    entry = raw[at : at + 46 + len(name)]
    end = bytearray(raw[raw.rindex(b"PK\x05\x06") :])
    directory = raw[start : raw.rindex(b"PK\x05\x06")]
    for number in range(1, 15):
        directory += entry.replace(b"fold_0", b"fold_%d" % (number % 10) if number < 10 else b"fold%d" % number)
    count = int.from_bytes(end[8:10], "little") + 14
    end[8:16] = struct.pack("<HHI", count, count, len(directory))
    archive.write_bytes(raw[:start] + directory + bytes(end))
    with raises_reason(BundleInvalid, "archive", names="overlap"):
        read_bundle(archive)
