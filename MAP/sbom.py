"""In the image: an SBOM (CycloneDX 1.6) and a licence list of every Python and Debian package inside."""

from __future__ import annotations

import re
import sys
import sysconfig
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

_STATUS = Path("/var/lib/dpkg/status")
_DOCUMENTS = Path("/usr/share/doc")
_RELEASE = Path("/etc/os-release")
_LONGEST_NAME = 80  # characters; some packages put their whole licence where its name belongs


def python_components(factory: LicenseFactory) -> Iterator[Component]:
    """Every installed distribution, with the licences that its metadata name."""
    # Not what PYTHONPATH adds: this program's own tools do not stay in the image.
    for package in distributions(path=[sysconfig.get_path("purelib")]):
        metadata = package.metadata
        yield Component(
            name=metadata["Name"],
            version=metadata["Version"],
            type=ComponentType.LIBRARY,
            purl=PackageURL("pypi", None, metadata["Name"].lower().replace("_", "-"), metadata["Version"]),
            bom_ref=f"pypi:{metadata['Name']}@{metadata['Version']}",
            licenses=[factory.make_from_string(python_licence(metadata))],
        )


def python_licence(metadata: object) -> str:
    """The licence as the metadata say it: expression, classifiers, or the free text's first line."""
    get_all = metadata.get_all  # type: ignore[attr-defined]
    expression = (get_all("License-Expression") or [""])[0]
    classifiers = [line.rpartition(" :: ")[2] for line in get_all("Classifier") or () if line.startswith("License ::")]
    text = ((get_all("License") or [""])[0].strip().splitlines() or [""])[0]
    named = text if 0 < len(text) <= _LONGEST_NAME and text != "UNKNOWN" else ""
    return expression or named or ", ".join(sorted(set(classifiers))) or "not stated"


def debian_components(factory: LicenseFactory) -> Iterator[Component]:
    """Every installed Debian or Ubuntu package, with the licences that its copyright file names."""
    system = re.search(r"^ID=\"?(\w+)", _RELEASE.read_text(encoding="utf-8"), re.MULTILINE)
    vendor = system[1] if system else "debian"
    for block in _STATUS.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(re.findall(r"^(Package|Version|Status|Architecture): (.*)$", block, re.MULTILINE))
        if not fields.get("Status", "").endswith(" installed"):
            continue
        yield Component(
            name=fields["Package"],
            version=fields["Version"],
            type=ComponentType.LIBRARY,
            purl=PackageURL("deb", vendor, fields["Package"], fields["Version"], {"arch": fields["Architecture"]}),
            bom_ref=f"deb:{fields['Package']}@{fields['Version']}",
            licenses=[factory.make_with_name(debian_licence(fields["Package"]))],
        )


def debian_licence(package: str) -> str:
    """The short names in a machine-readable copyright file; else where to read."""
    path = _DOCUMENTS / package / "copyright"
    if not path.is_file():
        return "not stated"
    names = re.findall(r"^License: *(\S.*)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    return ", ".join(sorted({name.strip() for name in names})) or f"see {path}"


def licence_lines(bom: Bom) -> Iterator[str]:
    """One line a package: kind, name, version, licences."""
    for component in sorted(bom.components, key=lambda found: (found.purl.type, found.name.lower())):
        names = [getattr(one, "value", None) or one.id or one.name for one in component.licenses]
        yield f"{component.purl.type}  {component.name} {component.version}: {'; '.join(names)}"


def main() -> int:
    """Write sbom.cdx.json and licences.txt into the folder given as argument."""
    target = Path(sys.argv[1])
    factory = LicenseFactory()
    bom = Bom()
    bom.metadata.component = Component(
        name="ctflow", version=version("ctflow"), type=ComponentType.CONTAINER, bom_ref="ctflow"
    )
    bom.components.update(python_components(factory))
    if _STATUS.is_file():
        bom.components.update(debian_components(factory))
    # The same packages give the same file: named by them, and as old as the base.
    bom.serial_number = uuid5(NAMESPACE_URL, "\n".join(sorted(str(found.purl) for found in bom.components)))
    if _STATUS.is_file():
        bom.metadata.timestamp = datetime.fromtimestamp(_STATUS.stat().st_mtime, UTC)
    bom.register_dependency(bom.metadata.component, bom.components)
    (target / "sbom.cdx.json").write_text(JsonV1Dot6(bom).output_as_string(indent=2) + "\n", encoding="utf-8")
    head = "What this image holds, and under which licences (texts: /usr/share/doc/*/copyright, *.dist-info).\n"
    (target / "licences.txt").write_text(head + "\n".join(licence_lines(bom)) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
