"""Run in a network namespace: Orthanc and `ctflow serve` on loopback, a series through both; one JSON line at the end.

unshare -n python orthanc_delivery.py FOLDER SERIES plain|secured

plain: Orthanc sends with the Lua script. secured: it sends with the Python script, with TLS and storage commitment in
both directions.
"""

from __future__ import annotations

import contextlib
import json
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
from orthanc_support import DICOM, PYTHON, ask, begin_alone, content, orthanc

BIN = Path(sys.executable).parent
NODE, PAGE = 11112, 8113
QUIET_S = 1.0
RESULTS = ("SEG", "SR", "RTSTRUCT", "OT", "DOC")
SCRIPTS = Path(__file__).parents[2] / "docs" / "orthanc"  # which the documentation gives to its readers


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


def settings_of_orthanc(folder: Path, kind: str) -> dict:
    settings = {"DicomPort": DICOM, "DicomAet": "ORTHANC", "StableAge": 1, "DicomAlwaysAllowStore": True}
    if kind == "plain":
        modalities = {"ctflow": ["CTFLOW", "127.0.0.1", NODE]}
        return {**settings, "LuaScripts": [str(SCRIPTS / "ctflow.lua")], "DicomModalities": modalities}
    pair, authority = certificates(folder)["orthanc"], folder / "certificates" / "authority.pem"
    modality = {"AET": "CTFLOW", "Host": "127.0.0.1", "Port": NODE, "UseDicomTls": True}
    return {
        **settings, "Plugins": [str(PYTHON)], "PythonScript": str(SCRIPTS / "ctflow.py"),
        "DicomTlsEnabled": True, "DicomTlsCertificate": str(pair.certificate), "DicomTlsPrivateKey": str(pair.key),
        "DicomTlsTrustedCertificates": str(authority), "DicomModalities": {"ctflow": modality},
    }  # fmt: skip


@cache
def certificates(folder: Path) -> dict[str, Pair]:
    """Certificates of Orthanc and of the node; RSA, as Orthanc's own documentation makes them."""
    authority = Authority(folder / "certificates")
    return {name: authority.issue(name, rsa_bits=2048) for name in ("orthanc", "node")}


def start_node(folder: Path, kind: str) -> subprocess.Popen[bytes]:
    own, more = "", ""
    if kind == "secured":
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
        "pdf": content(f"/instances/{by_modality['DOC']['Instances'][0]}/pdf")[:5].decode(),
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


@contextlib.contextmanager
def ended(process: subprocess.Popen[bytes]):
    """Have a process end as its service manager would."""
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def main(folder: Path, series: Path, kind: str) -> None:
    begin_alone()
    try:
        with ended(start_node(folder, kind)), orthanc(folder, **settings_of_orthanc(folder, kind)):
            wait_for(is_ready, "the node is ready")
            for path in sorted(series.iterdir()):
                ask("/instances", path.read_bytes())
            wait_for(lambda: {"SEG", "SR"} <= modalities(), "SEG and SR are in Orthanc")
            wait_for(
                lambda: journal(folder, "SELECT 1 FROM series WHERE state = 'delivered'"), "the series is delivered"
            )
            found = facts(folder) | (commitment_facts(folder) if kind == "secured" else {})
            sys.stdout.write(json.dumps(found) + "\n")
    except SystemExit:
        for name in ("orthanc.log", "node.log"):
            sys.stderr.write((folder / name).read_text(errors="replace")[-3000:])
        raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
