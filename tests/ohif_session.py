"""Run in a network namespace: Orthanc with its DICOMweb plugin, OHIF, and a browser.

unshare -n python ohif_session.py APP WORK

APP is an unpacked @ohif/app. Each line of the input names a study, a folder with the CT in `ct` and its results beside
it; the answer is a line of JSON with what OHIF has when it shows them. WORK gets Orthanc's store, two pictures of each
study, and what Orthanc said. Orthanc binds all addresses, hence the namespace.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import urllib.error
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pydicom

from browser_support import Browser
from orthanc_support import DICOMWEB, HTTP, begin_alone, content, orthanc

OHIF = 8080
SETTINGS = {
    "DicomServerEnabled": False, "Plugins": [str(DICOMWEB)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
}  # fmt: skip
PAGE = Path(__file__).parent / "viewers" / "ohif_page.js"
CONFIG = """window.config = {
  routerBasename: '/', extensions: [], modes: [], showStudyList: true, showLoadingIndicator: true,
  strictZSpacingForVolumeViewport: true, defaultDataSourceName: 'dicomweb', investigationalUseDialog: {option: 'never'},
  showErrorDetails: 'always', maxNumberOfWebWorkers: 1,
  dataSources: [{namespace: '@ohif/extension-default.dataSourcesModule.dicomweb', sourceName: 'dicomweb',
    configuration: {friendlyName: 'Orthanc', name: 'Orthanc', wadoUriRoot: '/dicom-web', qidoRoot: '/dicom-web',
      wadoRoot: '/dicom-web', qidoSupportsIncludeField: true, imageRendering: 'wadors', thumbnailRendering: 'wadors',
      enableStudyLazyLoad: true, supportsFuzzyMatching: true, supportsWildcard: true,
      dicomUploadEnabled: false, omitQuotationForMultipartRequest: true,
      bulkDataURI: {enabled: true, relativeResolution: 'studies'}}}]};
"""
# WebGL without a GPU.
FLAGS = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist")


class Handler(SimpleHTTPRequestHandler):
    """The application's files; what begins with /dicom-web is Orthanc's."""

    def log_message(self, *_: object) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/dicom-web"):
            self._forward()
        elif path == "/app-config.js":
            self._answer(200, "text/javascript", CONFIG.encode())
        else:
            if not Path(self.translate_path(path)).is_file():
                self.path = "/index.html"  # the application's own routes
            super().do_GET()

    def _forward(self) -> None:
        headers = {name: self.headers[name] for name in ("Accept",) if name in self.headers}
        asked = urllib.request.Request(f"http://127.0.0.1:{HTTP}{self.path}", headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                self._answer(answer.status, answer.headers["Content-Type"], answer.read())
        except urllib.error.HTTPError as error:
            self._answer(error.code, error.headers.get("Content-Type", "text/plain"), error.read())

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)


def look_at(browser: Browser, study: Path, work: Path) -> dict:
    """Open a study and what ctflow made of it; what the page then has."""
    uid = pydicom.dcmread(next((study / "ct").iterdir()), stop_before_pixels=True).StudyInstanceUID
    browser.call("Page.navigate", url="about:blank")  # or the page before would answer for the next
    browser.wait_for("location.href === 'about:blank'")
    browser.said.clear()
    browser.call("Page.navigate", url=f"http://127.0.0.1:{OHIF}/viewer?StudyInstanceUIDs={uid}")
    browser.wait_for("window.services && window.commandsManager")
    browser.value(PAGE.read_text())
    browser.value("openStudy()")
    found = {}
    for step in ("segmentation", "report"):
        found[step] = browser.value(f"open{step.title()}().catch(error => ({{error: String(error.stack)}}))")
        browser.screenshot(work / f"{study.name} {step}.png")
    return found


def main(app: Path, work: Path) -> None:
    begin_alone()
    server = ThreadingHTTPServer(("127.0.0.1", OHIF), partial(Handler, directory=str(app)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with orthanc(work, **SETTINGS):
        browser = Browser(flags=FLAGS)
        try:
            for line in sys.stdin:
                study = Path(line.rstrip("\n"))
                for path in sorted(study.rglob("*.dcm")):
                    content("/instances", path.read_bytes())
                sys.stdout.write(json.dumps(look_at(browser, study, work)) + "\n")
                sys.stdout.flush()
        finally:
            browser.close()
            server.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
