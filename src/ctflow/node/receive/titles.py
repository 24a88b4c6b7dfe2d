"""The AE titles of an A-ASSOCIATE-RQ: non-standard padding is removed, and an invalid title gets an answer.

pynetdicom aborts the association without a reason if a title is padded with NULs, as some devices do, or is blank;
it answers nothing if the called title is blank.
"""

from __future__ import annotations

HEADER = 6  # bytes: type, reserved, length (DICOM PS3.8 9.3)
TITLES_END = 42  # of a whole request; its titles have 16 bytes each (PS3.8 9.3.2)
_CALLED, _CALLING = slice(10, 26), slice(26, 42)
# PS3.8 9.3.4: rejected-permanent, by the service user; the last byte is the reason.
_CALLING_NOT_RECOGNIZED, _CALLED_NOT_RECOGNIZED = 3, 7

# Rejected-permanent, by the service provider (ACSE), no reason given: there is none for TLS.
TLS_WANTED = bytes([3, 0, 0, 0, 0, 4, 0, 1, 2, 1])


def mended_titles(body: bytes) -> bytes:
    """A request without its header, the NULs that pad its AE titles replaced by spaces."""
    start, end = _CALLED.start - HEADER, _CALLING.stop - HEADER
    return body[:start] + body[start:end].replace(b"\0", b" ") + body[end:]


def refusal_of_titles(request: bytes) -> tuple[bytes, str] | None:
    """The answer to a request with invalid AE titles (PS3.5 6.2, AE).

    Args:
        request: At least its first `TITLES_END` bytes; fewer are not checked.

    Returns:
        The A-ASSOCIATE-RJ and the reason, without the title; None if both titles are valid.
    """
    if len(request) < TITLES_END:
        return None
    for name, part, reason in (
        ("calling", _CALLING, _CALLING_NOT_RECOGNIZED),
        ("called", _CALLED, _CALLED_NOT_RECOGNIZED),
    ):
        title = request[part].replace(b"\0", b" ").strip(b" ")
        if not title:
            return _rejection(reason), f"its {name} AE title is blank"
        if not all(0x20 <= byte < 0x7F and byte != ord("\\") for byte in title):
            return _rejection(reason), f"its {name} AE title has characters that an AE title may not have"
    return None


def _rejection(reason: int) -> bytes:
    return bytes([3, 0, 0, 0, 0, 4, 0, 1, 1, reason])
