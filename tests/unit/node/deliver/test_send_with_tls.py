"""Results go to DCMTK's storage SCP through TLS, and to nobody whose certificate is not the right one."""

from __future__ import annotations

import contextlib
import socket
import subprocess

import pytest

from certificate_support import Authority, Pair
from ctflow.core.errors import DestinationDown
from ctflow.node.deliver.storage import StorageTarget
from ctflow.node.settings.tls import ClientTls
from ctflow.node.tls import TlsContext
from reasons import raises_reason
from service_support import Archive, dcmtk, free_port, instance, wait_until

pytestmark = pytest.mark.filterwarnings("ignore:unclosed <s.*socket:ResourceWarning")  # of pynetdicom
SEG = "1.2.840.10008.5.1.4.1.1.66.4"


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path / "certificates")


@contextlib.contextmanager
def storescp(authority: Authority, server: Pair, folder):
    """DCMTK's SCP, which wants a certificate; its port."""
    folder.mkdir()
    with free_port() as port:
        pass
    words = [dcmtk("storescp"), "+tls", server.key, server.certificate, "+cf", authority.ca]
    process = subprocess.Popen([*words, "-od", folder, str(port)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
        return False

    try:
        wait_until(answers, "DCMTK's SCP answers")
        yield port
    finally:
        process.kill()
        process.communicate()


def target(port: int, tls: ClientTls) -> StorageTarget:
    return StorageTarget("CTFLOW", "PACS", "127.0.0.1", port, TlsContext("destinations[1].tls", tls))


@pytest.fixture
def result(tmp_path):
    dataset = instance(1, SOPClassUID=SEG)
    dataset.save_as(tmp_path / "segmentation.dcm", enforce_file_format=True)
    return tmp_path


@pytest.mark.parametrize("kind", ["authority", "fingerprint"])
def test_dcmtk_receives_through_tls(authority, result, kind):
    server, own = authority.issue("pacs"), authority.issue("node")
    known = {"ca": authority.ca} if kind == "authority" else {"fingerprints": (server.fingerprint,)}
    with storescp(authority, server, result / "received") as port:
        tls = ClientTls(certificate=own.certificate, key=own.key, **known)
        with target(port, tls).open() as channel:
            assert channel.send(result, "segmentation.dcm") == ""
        wait_until(lambda: list((result / "received").iterdir()), "the object is there")


@pytest.mark.parametrize(
    ("tls", "days", "names"),
    [
        ({"certificate": None, "key": None}, 30, "the peer wants a certificate from this node"),
        ({"ca": None}, 30, "its certificate is not accepted"),
        ({"ca": None, "fingerprints": ("0" * 64,)}, 30, "it is not one of `fingerprints`"),
        ({}, -1, "certificate has expired"),
    ],
)
def test_a_destination_that_is_not_the_right_one_gets_nothing_and_the_reason_is_named(
    authority, result, tls, days, names
):
    server, own = authority.issue("pacs", days=days), authority.issue("node")
    group = ClientTls(**{"ca": authority.ca, "certificate": own.certificate, "key": own.key, **tls})
    with storescp(authority, server, result / "received") as port:
        with raises_reason(DestinationDown, "tls", names=names), target(port, group).open():
            pass
        assert list((result / "received").iterdir()) == []


def test_a_destination_without_tls_is_named(authority, result):
    archive = Archive()
    try:
        tls = ClientTls(ca=authority.ca)
        with raises_reason(DestinationDown, "tls", names="PACS: "), target(archive.port, tls).open():
            pass
    finally:
        archive.close()
