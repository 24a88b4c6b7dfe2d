"""Run in a network namespace: Orthanc's DICOMweb plugin sends to a node by STOW-RS, and gets a result by STOW-RS.

unshare -n python orthanc_dicomweb.py WORK

One line of JSON with what each side had at the end.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from ctflow.core.errors import DestinationDown
from ctflow.node.access.users import User, hash_of_password, write_users
from ctflow.node.deliver.stow import Credentials, StowTarget
from service_support import instance
from stow_support import StowNode, file_of

HTTP, PLUGIN = 8042, "/usr/share/orthanc/plugins/libOrthancDicomWeb.so"
USER, PASSWORD = "node", "orthanc and node"
SENDER, SENDERS_PASSWORD = "orthanc", "password of orthanc"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"


def rest(path: str, body: bytes | None = None) -> object:
    """Ask Orthanc."""
    request = urllib.request.Request(f"http://127.0.0.1:{HTTP}{path}", data=body)
    request.add_header("Authorization", "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@contextlib.contextmanager
def orthanc(work: Path, node_port: int):
    """An Orthanc whose DICOMweb server `node` is the node."""
    store = str(work / "store")
    server = {"Url": f"http://127.0.0.1:{node_port}/dicom-web/", "Username": SENDER, "Password": SENDERS_PASSWORD}
    document = {
        "StorageDirectory": store, "IndexDirectory": store, "HttpPort": HTTP, "DicomServerEnabled": False,
        "AuthenticationEnabled": True, "RegisteredUsers": {USER: PASSWORD}, "Plugins": [PLUGIN],
        "DicomWeb": {"Enable": True, "Servers": {"node": server}},
    }  # fmt: skip
    (work / "orthanc.json").write_text(json.dumps(document))
    program = shutil.which("Orthanc", path=f"{os.environ['PATH']}:/usr/sbin") or "Orthanc"
    with (work / "orthanc.log").open("ab") as log:
        process = subprocess.Popen([program, work / "orthanc.json"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 60
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                rest("/system")
                break
            if time.monotonic() > end:
                raise SystemExit("Orthanc does not answer")
            time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        process.wait(40)


def main(work: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    users, secret = work / "users", work / "secret"
    write_users(users, {SENDER: User(SENDER, "send", hash_of_password(SENDERS_PASSWORD))})
    secret.write_text(PASSWORD)
    secret.chmod(0o600)
    node = StowNode(work / "node", sign_on="local", users_file=users)
    found: dict[str, object] = {}
    with node.listening(), orthanc(work, node.port):
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
