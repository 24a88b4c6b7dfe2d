"""Certificates for tests: an authority, servers and clients, expired ones, those of nobody."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from ctflow.node.tls import fingerprint


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files."""

    certificate: Path
    key: Path

    @property
    def fingerprint(self) -> str:
        found = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        return fingerprint(found.public_bytes(Encoding.DER))


class Authority:
    """An authority in a folder; `ca` is its certificate."""

    def __init__(self, folder: Path, name: str = "authority") -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.ca = folder / f"{name}.pem"
        signed = _builder(self._issuer, self._issuer, self._key, days=30, is_ca=True).sign(self._key, hashes.SHA256())
        self.ca.write_bytes(signed.public_bytes(Encoding.PEM))

    def issue(
        self, name: str, *, days: float = 30, password: bytes = b"", rsa_bits: int = 0, is_own: bool = False
    ) -> Pair:
        """A certificate for 127.0.0.1 and localhost; negative `days` make an expired one, `is_own` one by itself."""
        key = rsa.generate_private_key(65537, rsa_bits) if rsa_bits else ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, subject if is_own else self._issuer, key, days=days, is_ca=False)
        signed = builder.sign(key if is_own else self._key, hashes.SHA256())
        pair = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        pair.certificate.write_bytes(signed.public_bytes(Encoding.PEM))
        protection = BestAvailableEncryption(password) if password else NoEncryption()
        pair.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection))
        return pair

    def revoke(self, pair: Pair) -> None:
        """Add a list with this revoked certificate to the authority's file."""
        now = datetime.now(UTC)
        serial = x509.load_pem_x509_certificate(pair.certificate.read_bytes()).serial_number
        revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
        crl = (
            x509.CertificateRevocationListBuilder().issuer_name(self._issuer).last_update(now - timedelta(days=1))
            .next_update(now + timedelta(days=1)).add_revoked_certificate(revoked).sign(self._key, hashes.SHA256())
        )  # fmt: skip
        self.ca.write_bytes(self.ca.read_bytes() + crl.public_bytes(Encoding.PEM))


def _builder(subject, issuer, key, *, days: float, is_ca: bool) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=60)).not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )  # fmt: skip
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    return builder if is_ca else builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
