"""Run in a network namespace: Orthanc's DICOMweb plugin sends to a node by STOW-RS, and gets a result by STOW-RS.

unshare -n python orthanc_dicomweb.py WORK

One line of JSON with what each side had at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ctflow.core.errors import DestinationDown
from ctflow.node.access.users import User, hash_of_password, write_users
from ctflow.node.deliver.stow import Credentials, StowTarget
from orthanc_support import DICOMWEB, HTTP, ask, begin_alone, orthanc
from service_support import instance
from stow_support import StowNode, file_of

USER, PASSWORD = "node", "orthanc and node"
SENDER, SENDERS_PASSWORD = "orthanc", "password of orthanc"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"


def rest(path: str, body: bytes | None = None):
    """Ask Orthanc."""
    return ask(path, body, user=f"{USER}:{PASSWORD}")


def settings_of_orthanc(node_port: int) -> dict:
    """An Orthanc whose DICOMweb server `node` is the node."""
    server = {"Url": f"http://127.0.0.1:{node_port}/dicom-web/", "Username": SENDER, "Password": SENDERS_PASSWORD}
    plugin = {"Enable": True, "Servers": {"node": server}}
    return {"DicomServerEnabled": False, "Plugins": [str(DICOMWEB)], "DicomWeb": plugin}


def main(work: Path) -> None:
    begin_alone()
    users, secret = work / "users", work / "secret"
    write_users(users, {SENDER: User(SENDER, "send", hash_of_password(SENDERS_PASSWORD))})
    secret.write_text(PASSWORD)
    secret.chmod(0o600)
    node = StowNode(work / "node", sign_on="local", users_file=users)
    found: dict[str, object] = {}
    with node.listening(), orthanc(work, user=f"{USER}:{PASSWORD}", **settings_of_orthanc(node.port)):
        for number in range(1, 6):
            rest("/instances", file_of(instance(number)))
        series = rest("/series")
        job = rest("/dicom-web/servers/node/stow", json.dumps({"Resources": series, "Synchronous": True}).encode())
        found["sent"] = job
        (received,) = node.journal.series()
        found["received"] = [received.instances, received.calling_ae]
        result = work / "result"
        result.mkdir()
        seg = instance(77, SOPClassUID=SEG, Modality="SEG", SeriesInstanceUID="1.2.826.0.4")
        (result / "segmentation.dcm").write_bytes(file_of(seg))
        url = f"http://127.0.0.1:{HTTP}/dicom-web"
        target = StowTarget(url, Credentials(USER, secret))
        found["asked"] = target.ask()
        with target.open() as channel:
            found["said"] = [channel.send(result, "segmentation.dcm") for _ in range(2)]
        found["in_orthanc"] = len(rest("/instances"))
        secret.write_text("another password")
        try:
            with target.open() as channel:
                channel.send(result, "segmentation.dcm")
        except DestinationDown as error:
            found["denied"] = error.reason
    node.close()
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
