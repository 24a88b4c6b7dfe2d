"""app.json and pkg.json by the MONAI Application Package specification 1.0.0, from app.yaml and what is installed."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

SPECIFICATION = "1.0.0"


def application_manifest(configuration: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """app.json: what runs, from where to where.

    Args:
        configuration: app.yaml.
        environment: Variables of the image; those that begin with HOLOSCAN_ are the application's defaults.
    """
    return {
        "apiVersion": SPECIFICATION,
        "type": "application",
        "command": "python3 /opt/holoscan/app",
        "environment": {name: text for name, text in sorted(environment.items()) if name.startswith("HOLOSCAN_")},
        "input": {
            "path": "input/",
            "formats": [{"data": "image", "format": "dicom", "modality": "CT", "protocols": ["file"]}],
        },
        "output": {
            "path": "output/",
            "format": {"data": "segmentation", "format": "dicom", "modality": "SEG", "protocols": ["file"]},
        },
        "sdk": "monai-deploy",
        "sdkVersion": version("monai-deploy-app-sdk"),
        "timeout": 0,
        "version": str(configuration["application"]["version"]),
        "workingDirectory": "/var/holoscan/",
    }


def package_manifest(configuration: dict[str, Any], flavour: str, model: str) -> dict[str, Any]:
    """pkg.json: what lies where, and what it needs.

    Args:
        configuration: app.yaml; its resources are those of a machine without a GPU.
        flavour: cpu or cuda.
        model: Name of the model's folder.
    """
    return {
        "apiVersion": SPECIFICATION,
        "applicationRoot": "/opt/holoscan/app/",
        "modelRoot": "/opt/holoscan/models/",
        "models": [{"name": model, "path": model}],
        "resources": {**configuration["resources"], "gpu": 1 if flavour == "cuda" else 0},
        "version": str(configuration["application"]["version"]),
    }


def main() -> int:
    """Write both; arguments: app.yaml, flavour, model's name, target folder."""
    source, flavour, model, target = sys.argv[1:]
    configuration = yaml.safe_load(Path(source).read_text(encoding="utf-8"))
    if configuration["application"]["version"] != version("ctflow"):
        sys.stderr.write(f"{source} says another version than ctflow {version('ctflow')}\n")
        return 1
    documents = {
        "app.json": application_manifest(configuration, dict(os.environ)),
        "pkg.json": package_manifest(configuration, flavour, model),
    }
    for name, document in documents.items():
        (Path(target) / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
