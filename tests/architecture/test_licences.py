"""No GPL package among what ctflow needs: neither in the wheel's dependencies nor, so, in an image."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution

import pytest
from packaging.requirements import Requirement

from licence_support import is_gpl


def closure(root: str) -> dict[str, Distribution]:
    found: dict[str, Distribution] = {}
    waiting = [Requirement(root)]
    while waiting:
        requirement = waiting.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            pytest.fail(f"{name} is required and not installed")
        for line in found[name].requires or ():
            child = Requirement(line)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(child)
    return found


# Packages that name no licence, and what theirs is.
NAMELESS = {"cuda-toolkit": "LicenseRef-NVIDIA-Proprietary"}  # has no files, only requires NVIDIA's packages


def licence_of(package: Distribution) -> str:
    metadata = package.metadata
    if metadata["Name"] in NAMELESS:
        return NAMELESS[metadata["Name"]]
    classifiers = [line for line in metadata.get_all("Classifier", []) if line.startswith("License")]
    words = [metadata.get("License-Expression", ""), (metadata.get("License") or "")[:200], *classifiers]
    return " | ".join(word for word in words if word and word != "UNKNOWN")


def test_no_gpl_package_is_needed():
    packages = closure("ctflow[holoscan,nnunet,serve,bench]")
    assert {"torch", "monai", "highdicom", "python-gdcm", "holoscan-cu13"} <= set(packages)
    assert "pylibjpeg-libjpeg" not in packages
    licences = {name: licence_of(package) for name, package in packages.items()}
    assert not [name for name, licence in licences.items() if not licence], "no licence named"
    assert not {name: licence for name, licence in licences.items() if is_gpl(licence)}


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("GPL-3.0-only", True),
        ("License :: OSI Approved :: GNU General Public License v3 (GPLv3)", True),
        ("AGPL-3.0", True),
        ("LGPL-2.1", False),
        ("License :: OSI Approved :: GNU Lesser General Public License v3", False),
        ("MIT OR GPL-3.0", False),
        ("Apache-2.0", False),
    ],
)
def test_the_check_knows_a_gpl_licence(licence, expected):
    assert is_gpl(licence) is expected
