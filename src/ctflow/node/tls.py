"""TLS by BCP 195 (DICOM PS3.15 B.12, B.13): contexts made from the site's files, and made anew when those change."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctflow.core.errors import BackendUnavailable, SettingsInvalid
from ctflow.node.settings.service import ServiceSettings
from ctflow.node.settings.tls import ClientTls, ServerTls

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

# TLS 1.2 with forward secrecy and authenticated encryption only; TLS 1.3 has nothing else (RFC 9325, 4.2).
CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
_LARGEST_FILE = 2**20
# OpenSSL's words for what a peer did, in ours.
_SAID = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer has no certificate",
    "UNSUPPORTED_PROTOCOL": "the peer offers no TLS 1.2 or newer",
    "NO_SHARED_CIPHER": "the peer offers no cipher suite of BCP 195",
    "WRONG_VERSION_NUMBER": "the peer does not speak TLS",
    "HTTP_REQUEST": "the peer speaks HTTP, not TLS",
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not trust this node's certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the peer rejects this node's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the peer says that this node's certificate has expired",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the peer wants a certificate from this node",
}


def tls_failure(error: OSError) -> str:
    """Why a handshake failed, in words without anything that the peer chose."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLEOFError) or not isinstance(error, ssl.SSLError):
        return "the peer ended the handshake"
    reason = error.reason or "no reason given"
    return _SAID.get(reason, f"TLS failed ({reason.lower().replace('_', ' ')})")


class Refusal(ssl.SSLCertVerificationError):
    """A certificate that is valid for OpenSSL is not the one that the site named."""

    verify_code = 0

    def __init__(self, why: str) -> None:
        super().__init__(1, why)
        self.verify_message = why


class _Failure:
    """Why the last connection failed."""

    why = ""


class _Front(ssl.SSLContext):
    """Hands each connection to the newest context, whole.

    A callback by the peer's name for the server could change the certificate and the authorities of a connection that
    has begun, but not that revoked certificates are looked up.
    """

    newest: Callable[[], ssl.SSLContext]

    def wrap_bio(self, *args: Any, **named: Any) -> ssl.SSLObject:
        context = self.newest()
        context.sslobject_class = self.sslobject_class
        return context.wrap_bio(*args, **named)

    def wrap_socket(self, *args: Any, **named: Any) -> ssl.SSLSocket:
        return self.newest().wrap_socket(*args, **named)


class TlsContext:
    """A context for new connections, and what its files say.

    Args:
        name: The group's place in the settings, for messages: `tls`, `destinations[1].tls`.
        group: The group.

    Attributes:
        problem: Why the newest files cannot be used; empty while they are.

    Raises:
        SettingsInvalid: A file cannot be used.
        BackendUnavailable: cryptography is not installed.
    """

    def __init__(self, name: str, group: ServerTls | ClientTls) -> None:
        self.name, self.problem = name, ""
        self._group = group
        self._failed = _Failure()
        named = (group.certificate, group.key, group.key_password_file, group.ca)
        self._files = tuple(each for each in named if each is not None)
        self._seen = self._stamps()
        self._doubted: object = None
        self._context, self._certificate = self._made()
        self._front: _Front | None = None

    @property
    def context(self) -> ssl.SSLContext:
        """For the next connection; ask each time, as it changes with the files."""
        return self._context

    @property
    def front(self) -> ssl.SSLContext:
        """For a server that keeps one context: each of its connections is made with the newest one."""
        if self._front is None:
            self._front = _Front(ssl.PROTOCOL_TLS_SERVER)
            self._front.newest = lambda: self._context
        return self._front

    @property
    def expires_at(self) -> float | None:
        """Unix time at which our certificate expires; None without one."""
        return None if self._certificate is None else self._certificate.not_valid_after_utc.timestamp()

    @property
    def failure(self) -> str:
        """Why the last connection since `forget_failure` failed; empty if TLS was not the reason. For a client."""
        return self._failed.why

    def forget_failure(self) -> None:
        """Before a connection."""
        self._failed.why = ""

    def look(self) -> bool | None:
        """Read the files again if they have changed.

        Files are replaced one after another, so they count as broken only if they are so at two looks.

        Returns:
            True if they were taken, False if they are broken and were not so before, None if there is no news.
        """
        stamps = self._stamps()
        if stamps == self._seen:
            return None
        try:
            made = self._made()
        except SettingsInvalid as error:
            if stamps != self._doubted:
                self._doubted = stamps
                return None
            self._seen, self.problem = stamps, str(error)
            return False
        self._context, self._certificate = made
        self._seen, self.problem = stamps, ""
        return True

    def _stamps(self) -> tuple[object, ...]:
        """What changes with the files."""
        found: list[object] = []
        for file in self._files:
            try:
                facts = file.stat()
            except OSError as error:
                found.append(error.errno)
            else:
                found.append((facts.st_ino, facts.st_mtime_ns, facts.st_size))
        return tuple(found)

    # -- making one ---------------------------------------------------------------------------------------------------

    def _made(self) -> tuple[ssl.SSLContext, Certificate | None]:
        group, is_server = self._group, isinstance(self._group, ServerTls)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
        context.set_ciphers(CIPHERS)
        if isinstance(group, ServerTls):
            # A resumed session would not check the client's certificate again: TLS 1.3 and 1.2 each have their tickets.
            context.num_tickets = 0
            context.options |= ssl.OP_NO_TICKET
            wanted = {"required": ssl.CERT_REQUIRED, "optional": ssl.CERT_OPTIONAL, "none": ssl.CERT_NONE}
            context.verify_mode = wanted[group.client]
        else:
            self._verify_as_client(context, group)
        if group.ca is not None:
            self._load_authorities(context, group.ca)
        certificate = None
        if group.certificate is not None:
            certificate = self._load_own(context, group.certificate, group.key or group.certificate)
        return context, certificate

    def _verify_as_client(self, context: ssl.SSLContext, group: ClientTls) -> None:
        is_pinned = bool(group.fingerprints) and group.ca is None
        context.check_hostname = group.verify_name and not is_pinned
        context.verify_mode = ssl.CERT_NONE if is_pinned else ssl.CERT_REQUIRED
        if group.ca is None and not is_pinned:
            context.load_default_certs(ssl.Purpose.SERVER_AUTH)
        context.sslsocket_class = _client_socket(frozenset(group.fingerprints), self._failed)

    def _load_authorities(self, context: ssl.SSLContext, ca: Path) -> None:
        content = self._content("ca", ca)
        try:
            context.load_verify_locations(cadata=content.decode("ascii", "ignore"))
        except (ssl.SSLError, ValueError) as error:  # a ValueError if it is empty
            raise self._unusable("ca", ca, "it holds no certificate in PEM form") from error
        # So that a certificate of a client may itself be among them, signed by whomever.
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if b"BEGIN X509 CRL" in content:
            try:
                context.load_verify_locations(cafile=ca)  # the text above takes certificates alone
            except OSError as error:  # OpenSSL's are among them
                raise self._unusable("ca", ca, "its list of revoked certificates cannot be read") from error
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF

    def _load_own(self, context: ssl.SSLContext, file: Path, key: Path) -> Certificate:
        try:
            from cryptography import x509  # noqa: PLC0415  # an optional package: the extra `serve`
            from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415
            from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415
        except ImportError as error:
            raise BackendUnavailable(
                "TLS needs cryptography: pip install 'ctflow[serve]'", reason="not-installed"
            ) from error
        password = self._password()
        try:
            certificate = x509.load_pem_x509_certificates(self._content("certificate", file))[0]
        except ValueError as error:
            raise self._unusable("certificate", file, "it holds no certificate in PEM form") from error
        try:
            loaded = load_pem_private_key(self._content("key", key), password or None)
        except TypeError as error:
            why = (
                "it has no password: omit key_password_file"
                if password
                else "it has a password: give key_password_file"
            )
            raise self._unusable("key", key, why) from error
        except ValueError as error:
            raise self._unusable("key", key, "it holds no private key in PEM form, or has another password") from error
        except UnsupportedAlgorithm as error:
            raise self._unusable("key", key, "it is of a kind that is not supported") from error
        try:
            is_its = loaded.public_key() == certificate.public_key()
        except (UnsupportedAlgorithm, ValueError) as error:
            raise self._unusable("certificate", file, "its key is of a kind that is not supported") from error
        if not is_its:
            raise self._unusable("key", key, "it does not belong to the certificate")
        try:
            context.load_cert_chain(file, key, password or b"")  # without any, OpenSSL would ask on the terminal
        except (OSError, ValueError) as error:
            said = getattr(error, "reason", None) or type(error).__name__
            raise self._unusable("certificate", file, f"OpenSSL does not take it ({said.lower()})") from error
        return certificate

    def _password(self) -> bytes:
        file = self._group.key_password_file
        return b"" if file is None else self._content("key_password_file", file).rstrip(b"\r\n")

    def _content(self, key: str, file: Path) -> bytes:
        try:
            with file.open("rb") as opened:
                content = opened.read(_LARGEST_FILE + 1)
        except OSError as error:
            raise self._unusable(key, file, f"it cannot be read ({error.strerror})") from error
        if len(content) > _LARGEST_FILE:
            raise self._unusable(key, file, "it is larger than 1 MiB")
        return content

    def _unusable(self, key: str, file: Path, why: str) -> SettingsInvalid:
        return SettingsInvalid(f"{self.name}.{key}: {file.name}: {why}", reason="certificate")


def contexts_of(settings: ServiceSettings) -> dict[str, TlsContext]:
    """The contexts for TLS, by the place of their groups in the settings.

    Raises:
        SettingsInvalid: A file cannot be used.
    """
    groups = {f"destinations[{number}].tls": each.tls for number, each in enumerate(settings.destinations, start=1)}
    page = settings.web.tls if settings.web.enabled else None
    named = {"tls": settings.tls, "web.tls": page, **groups}
    return {name: TlsContext(name, group) for name, group in named.items() if group is not None}


def context_to_peer(tls: ServerTls, fingerprints: tuple[str, ...]) -> TlsContext:
    """For a connection to a peer of the DICOM port, with the files of that port.

    Raises:
        SettingsInvalid: A file cannot be used.
    """
    group = ClientTls(tls.ca, fingerprints, False, tls.certificate, tls.key, tls.key_password_file)
    return TlsContext("tls", group)


def _client_socket(pins: frozenset[str], failed: _Failure) -> type[ssl.SSLSocket]:
    """A socket that checks the server's fingerprint before anything is sent, and remembers why it failed."""

    class ClientSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            try:
                super().do_handshake(block)
                if pins:
                    _check_pinned(self.getpeercert(binary_form=True), pins)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise
            except OSError as error:
                failed.why = tls_failure(error)
                raise

        def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
            try:  # in TLS 1.3 the server's answer to our certificate comes after the handshake
                return super().recv(buflen, flags)
            except ssl.SSLError as error:
                failed.why = tls_failure(error)
                raise

        def recv_into(self, buffer: Any, nbytes: int | None = None, flags: int = 0) -> int:
            try:  # as HTTP reads
                return super().recv_into(buffer, nbytes, flags)
            except ssl.SSLError as error:
                failed.why = tls_failure(error)
                raise

    return ClientSocket


def _check_pinned(der: bytes | None, pins: frozenset[str]) -> None:
    if der is None or fingerprint(der) not in pins:
        raise Refusal("it is not one of `fingerprints`")
    from cryptography.x509 import load_der_x509_certificate  # noqa: PLC0415  # an optional package

    found, now = load_der_x509_certificate(der), datetime.now(UTC)
    if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
        raise Refusal("certificate has expired" if now > found.not_valid_after_utc else "certificate is not yet valid")


def fingerprint(der: bytes | None) -> str:
    """SHA-256 of a certificate, as `settings.tls.Fingerprint` holds it; empty without one."""
    return "" if not der else sha256(der).hexdigest()
