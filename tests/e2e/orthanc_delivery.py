"""Run in a network namespace: Orthanc and `ctflow serve` on loopback, a series through both; one JSON line at the end.

unshare -n python orthanc_delivery.py FOLDER SERIES lua|python|secured

secured: with TLS and storage commitment in both directions.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from functools import cache
from pathlib import Path

from bundle_support import small_unet_bundle
from certificate_support import Authority, Pair

BIN = Path(sys.executable).parent
HTTP, DICOM, NODE, PAGE = 8042, 4242, 11112, 8113
QUIET_S = 1.0
RESULTS = ("SEG", "SR", "RTSTRUCT", "OT", "DOC")
# What the documentation gives to its readers, and how Orthanc is told of it.
SCRIPTS = Path(__file__).parents[2] / "docs" / "orthanc"
PYTHON_PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancPython.so")
SCRIPTS = {
    "secured": {"LuaScripts": [str(SCRIPTS / "ctflow.lua")], "Plugins": []},
    "lua": {"LuaScripts": [str(SCRIPTS / "ctflow.lua")], "Plugins": []},
    "python": {"PythonScript": str(SCRIPTS / "ctflow.py"), "Plugins": [str(PYTHON_PLUGIN)]},
}


def wait_for(happened, what: str, limit_s: float = 120.0):
    deadline = time.monotonic() + limit_s
    while True:
        with contextlib.suppress(OSError, sqlite3.Error):
            found = happened()
            if found:
                return found
        if time.monotonic() > deadline:
            raise SystemExit(f"did not happen in {limit_s:g} s: {what}")
        time.sleep(0.05)


def raw(path: str, data: bytes | None = None) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{HTTP}{path}", data=data, timeout=30) as answer:
        return answer.read()


def ask(path: str, data: bytes | None = None):
    return json.loads(raw(path, data))


def start_orthanc(folder: Path, script: str) -> subprocess.Popen[bytes]:
    settings = {
        "Name": "orthanc", "StorageDirectory": str(folder / "storage"), "IndexDirectory": str(folder / "storage"),
        "HttpPort": HTTP, "DicomPort": DICOM, "DicomAet": "ORTHANC", "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False, "StableAge": 1, **SCRIPTS[script],
        "DicomModalities": {"ctflow": ["CTFLOW", "127.0.0.1", NODE]}, "DicomAlwaysAllowStore": True,
    }  # fmt: skip
    if script == "secured":
        pair, authority = certificates(folder)["orthanc"], folder / "certificates" / "authority.pem"
        settings |= {
            "DicomTlsEnabled": True, "DicomTlsCertificate": str(pair.certificate), "DicomTlsPrivateKey": str(pair.key),
            "DicomTlsTrustedCertificates": str(authority),
            "DicomModalities": {
                "ctflow": {"AET": "CTFLOW", "Host": "127.0.0.1", "Port": NODE, "UseDicomTls": True},
            },
        }  # fmt: skip
    (folder / "orthanc.json").write_text(json.dumps(settings))
    program = shutil.which("Orthanc", path=f"{os.environ['PATH']}:/usr/sbin") or "Orthanc"
    with (folder / "orthanc.log").open("wb") as log:
        return subprocess.Popen([program, folder / "orthanc.json"], stdout=log, stderr=log)


@cache
def certificates(folder: Path) -> dict[str, Pair]:
    """Certificates of Orthanc and of the node; RSA, as Orthanc's own documentation makes them."""
    authority = Authority(folder / "certificates")
    return {name: authority.issue(name, rsa_bits=2048) for name in ("orthanc", "node")}


def start_node(folder: Path, script: str) -> subprocess.Popen[bytes]:
    own, more = "", ""
    if script == "secured":
        pair, ca = certificates(folder)["node"], folder / "certificates" / "authority.pem"
        files = f"certificate: {pair.certificate}, key: {pair.key}, ca: {ca}"
        peer = certificates(folder)["orthanc"].fingerprint
        own = f", commitment: required, tls: {{{files}}}"
        more = (
            f"tls: {{{files}}}\npeers: [{{host: 127.0.0.1, ae_title: ORTHANC, port: {DICOM}, fingerprints: {peer}}}]\n"
        )
    (folder / "node.yaml").write_text(
        f"data: {folder / 'data'}\nquiet_period_s: {QUIET_S}\nbundle: {small_unet_bundle(folder / 'bundle')}\n"
        f"engine: eager\ndevices: [cpu]\nallow_demonstration: true\nlimits: {{free_disk: 1 MB}}\n"
        f"web: {{port: {PAGE}}}\nrtstruct: true\npdf: true\nsecondary_capture: true\n"
        f"destinations: [{{name: orthanc, ae_title: ORTHANC, host: 127.0.0.1, port: {DICOM}{own}}}]\n{more}"
    )
    with (folder / "node.log").open("wb") as log:
        return subprocess.Popen([BIN / "ctflow", "serve", "-c", folder / "node.yaml"], stdout=log, stderr=log)


def is_ready() -> bool:
    with urllib.request.urlopen(f"http://127.0.0.1:{PAGE}/readyz", timeout=5) as answer:
        return answer.status == 200


def journal(folder: Path, question: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(f"file:{folder}/data/journal.sqlite3?mode=ro", uri=True)) as found:
        return found.execute(question).fetchall()


def modalities() -> set[str]:
    return {ask(f"/series/{each}")["MainDicomTags"]["Modality"] for each in ask("/series")}


def facts(folder: Path) -> dict:
    """What Orthanc and the journal have at the end."""
    series = [ask(f"/series/{each}") for each in ask("/series")]
    by_modality = {each["MainDicomTags"]["Modality"]: each for each in series}
    (seg,) = by_modality["SEG"]["Instances"]
    tags = ask(f"/instances/{seg}/simplified-tags")
    referenced = tags["ReferencedSeriesSequence"][0]
    sources = [ask(f"/instances/{each}")["MainDicomTags"]["SOPInstanceUID"] for each in by_modality["CT"]["Instances"]]
    objects = [
        ask(f"/instances/{each}")["MainDicomTags"]["SOPInstanceUID"]
        for modality in RESULTS for each in by_modality[modality]["Instances"]
    ]  # fmt: skip
    ((last_at, elapsed_s),) = journal(
        folder, "SELECT s.last_at, r.elapsed_s FROM series s JOIN results r ON r.series_key = s.key"
    )
    ((arrived_at,),) = journal(folder, "SELECT sent_at FROM deliveries WHERE file = 'segmentation.dcm'")
    return {
        "modalities": sorted(by_modality),
        "pdf": raw(f"/instances/{by_modality['DOC']['Instances'][0]}/pdf")[:5].decode(),
        "studies": len(ask("/studies")),
        "source_series": by_modality["CT"]["MainDicomTags"]["SeriesInstanceUID"],
        "referenced_series": referenced["SeriesInstanceUID"],
        "source_instances": sources,
        "referenced_instances": [e["ReferencedSOPInstanceUID"] for e in referenced["ReferencedInstanceSequence"]],
        "objects_in_orthanc": objects,
        "objects_in_journal": [uid for (uid,) in journal(folder, "SELECT sop_instance_uid FROM objects")],
        "states": [state for (state,) in journal(folder, "SELECT state FROM series")],
        "beyond_quiet_and_inference_s": round(arrived_at - last_at - QUIET_S - elapsed_s, 3),
        "inference_s": round(elapsed_s, 3),
        "images": len(sources),
        "orthanc": ask("/system")["Version"],
    }


def commitment_facts(folder: Path) -> dict:
    """What ctflow says when Orthanc asks it to commit to the images that it has sent, and to one that it has not."""
    tags = [ask(f"/instances/{each}/simplified-tags") for each in ask("/instances")]
    images = [(each["SOPClassUID"], each["SOPInstanceUID"]) for each in tags if each["Modality"] == "CT"]
    wanted = {"DicomInstances": [*images, (images[0][0], "1.2.3")]}
    asked = ask("/modalities/ctflow/storage-commitment", json.dumps(wanted).encode())

    def answered():
        found = ask(asked["Path"])
        return found if found["Status"] != "Pending" else None

    answer = wait_for(answered, "ctflow reports to Orthanc")
    reported = "SELECT 1 FROM events WHERE kind = 'commitment-reported'"
    wait_for(lambda: journal(folder, reported), "the report is recorded")
    events = [kind for (kind,) in journal(folder, "SELECT kind FROM events ORDER BY id")]
    return {
        "commitment": answer["Status"],
        "committed": len(answer["Success"]),
        "failed": [(each["SOPInstanceUID"], each["FailureReason"]) for each in answer["Failures"]],
        "events": events,
        "deliveries": [state for (state,) in journal(folder, "SELECT state FROM deliveries")],
    }


def main(folder: Path, series: Path, script: str) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    servers = [start_orthanc(folder, script), start_node(folder, script)]
    try:
        wait_for(lambda: ask("/system"), "Orthanc answers")
        wait_for(is_ready, "the node is ready")
        for path in sorted(series.iterdir()):
            ask("/instances", path.read_bytes())
        wait_for(lambda: {"SEG", "SR"} <= modalities(), "SEG and SR are in Orthanc")
        wait_for(lambda: journal(folder, "SELECT 1 FROM series WHERE state = 'delivered'"), "the series is delivered")
        found = facts(folder) | (commitment_facts(folder) if script == "secured" else {})
        sys.stdout.write(json.dumps(found) + "\n")
    except SystemExit:
        for name in ("orthanc.log", "node.log"):
            sys.stderr.write((folder / name).read_text(errors="replace")[-3000:])
        raise
    finally:
        for server in servers:
            server.send_signal(signal.SIGTERM)
        for server in servers:
            try:
                server.wait(40)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
