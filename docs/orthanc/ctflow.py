"""Sends each CT series to ctflow once nothing of it came for StableAge seconds, as ctflow.lua does.

For Orthanc's Python plugin: in orthanc.json in place of "LuaScripts", with whole paths,
    "Plugins": ["/usr/share/orthanc/plugins/libOrthancPython.so"],
    "PythonScript": "/etc/orthanc/ctflow.py"
"""

import json

import orthanc


def on_change(change: int, _level: int, resource: str) -> None:
    """Take what Orthanc tells of its changes."""
    if change != orthanc.ChangeType.STABLE_SERIES:
        return
    tags = json.loads(orthanc.RestApiGet(f"/series/{resource}"))["MainDicomTags"]
    if tags.get("Modality") == "CT":
        # As a job: a failed one is kept in Orthanc's list of jobs and can be sent again there.
        order = {"Resources": [resource], "Asynchronous": True}
        orthanc.RestApiPost("/modalities/ctflow/store", json.dumps(order))


orthanc.RegisterOnChangeCallback(on_change)
