from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctflow.node.dicomweb.multipart import BodyRefused, PartLimits, PartReader, boundary_of, media_type
from stow_support import multipart


class Memory:
    """Counts the bytes that are kept, and refuses more than `most`."""

    def __init__(self, most: int = 10**9) -> None:
        self.now, self.peak, self.most = 0, 0, most

    def __call__(self, count: int) -> bool:
        self.now += count
        self.peak = max(self.peak, self.now)
        return self.now <= self.most


def split(body: bytes, step: int = 7, boundary: bytes = b"BOUNDARY", memory=None, **limits) -> list[tuple[dict, bytes]]:
    memory = memory or Memory()
    reader = PartReader(boundary, PartLimits(limits.get("part", 10**6), limits.get("parts", 100), memory))
    found = []
    try:
        for start in range(0, len(body), step):
            for part in reader.feed(body[start : start + step]):
                found.append((part.headers, bytes(part.content)))
                reader.release(part)
        reader.finish()
    finally:
        reader.close()
        assert memory.now == 0
    return found


@given(st.lists(st.binary(max_size=300), min_size=1, max_size=5), st.integers(1, 400))
def test_parts_come_out_as_they_went_in_wherever_the_body_is_cut(parts, step):
    boundary = "b" * 40
    assert [content for _, content in split(multipart(*parts, boundary=boundary), step, boundary.encode())] == parts


@pytest.mark.parametrize("content", [b"\r\n--BOUNDAR", b"--BOUNDARY", b"\r\n\r\n", b"\r", b"\r\n--BOUNDARX--"])
def test_what_nearly_is_a_boundary_is_content(content):
    assert split(multipart(content)) == [({"content-type": "application/dicom"}, content)]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"no boundary at all", 400),
        (b"--OTHER\r\n\r\nx\r\n--OTHER--\r\n", 400),
        (b"--BOUNDARY--\r\n", 400),
        (b"--BOUNDARY\r\nContent-Type: application/dicom\r\n\r\ncut", 400),
        (b"--BOUNDARY\r\nContent-Type: application/dicom\r\n\r\ncut\r\n--BOUNDARY\r\n", 400),
        (b"--BOUNDARY\nContent-Type: application/dicom\n\nx\n--BOUNDARY--\n", 400),
        (b"--BOUNDARY\r\nno colon\r\n\r\nx\r\n--BOUNDARY--\r\n", 400),
        (b"--BOUNDARY\r\n" + b"A: b\r\n" * 100 + b"\r\nx\r\n--BOUNDARY--\r\n", 400),
        (b"--BOUNDARY\r\nA: " + b"b" * 100_000 + b"\r\n\r\nx\r\n--BOUNDARY--\r\n", 400),
        (multipart(bytes(2000)), 413),
        (multipart(*[b"x"] * 11), 413),
    ],
)
def test_a_body_that_is_wrong_or_too_large_is_refused_before_it_is_kept(body, status):
    memory = Memory()
    with pytest.raises(BodyRefused) as refusal:
        split(body, 64, memory=memory, part=1000, parts=10)
    assert refusal.value.status == status
    assert memory.peak <= 1000


def test_a_body_waits_for_nothing_where_there_is_no_memory():
    with pytest.raises(BodyRefused) as refusal:
        split(multipart(bytes(500)), memory=Memory(most=100))
    assert refusal.value.status == 503


@given(st.binary(max_size=2000), st.integers(1, 100))
def test_random_bytes_are_refused_by_name_or_read(body, step):
    try:
        split(b"--BOUNDARY" + body, step)
    except BodyRefused as refusal:
        assert refusal.status in (400, 413)


@pytest.mark.parametrize(
    ("value", "kind", "parameters"),
    [
        ('multipart/related; type="application/dicom"; boundary=abc', "multipart/related",
         {"type": "application/dicom", "boundary": "abc"}),
        ('Multipart/Related;TYPE=application/dicom;Boundary="a b"', "multipart/related",
         {"type": "application/dicom", "boundary": "a b"}),
        ("application/dicom; transfer-syntax=1.2.840.10008.1.2.4.70", "application/dicom",
         {"transfer-syntax": "1.2.840.10008.1.2.4.70"}),
        ("", "", {}),
        ("multipart/related; type*0*=a; x*0*='; x*=1; boundary=abc", "", {}),
        ("multipart/related; boundary*=utf-8''a; type=b", "multipart/related", {"type": "b"}),
    ],
)  # fmt: skip
def test_a_content_type_is_read_as_mime_writes_it(value, kind, parameters):
    assert media_type(value) == (kind, parameters)


@pytest.mark.parametrize("boundary", ["", " ", "a ", "a" * 201, "a\u00e9", "a;b"])
def test_an_invalid_boundary_is_refused(boundary):
    with pytest.raises(BodyRefused, match="boundary"):
        boundary_of({"boundary": boundary})
