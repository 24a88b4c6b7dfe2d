"""Hostile files in torch's two formats: each ends in a named error, in seconds and little memory."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from ctflow.bundle.saved import plain
from ctflow.bundle.saved.pickles import walked
from ctflow.bundle.saved.plain import as_arrays, loaded_plainly
from ctflow.bundle.weights import read_weights
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason


class OlderReader:
    """torch's reader of a zip, as torch 2.11 has it: without the sizes of records."""

    def __init__(self, stream):
        real = REAL_READER(stream)
        self.get_record, self.get_record_offset = real.get_record, real.get_record_offset
        self.get_all_records = real.get_all_records


REAL_READER = torch._C.PyTorchFileReader


@pytest.fixture(autouse=True, params=["2.13", "2.11"])
def _reader(request, monkeypatch):
    if request.param == "2.11":
        monkeypatch.setattr(plain, "RecordReader", OlderReader)


def file_of(content: bytes, *, is_zip: bool = True, data: bytes = b"") -> bytes:
    """A file as torch saves it, with a pickle of ours as its content."""
    if not is_zip:
        head = b"".join(
            pickle.dumps(part, protocol=2)
            for part in (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
        )
        return head + content + pickle.dumps(["0"], protocol=2) + data
    saved, made = io.BytesIO(), io.BytesIO()
    torch.save({}, saved)
    with zipfile.ZipFile(saved) as old, zipfile.ZipFile(made, "w") as new:
        for member in old.infolist():
            new.writestr(member, content if member.filename.endswith("data.pkl") else old.read(member))
        new.writestr("archive/data/0", data)
    return made.getvalue()


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def tensor(count: int, view: bytes = b"") -> bytes:
    """A tensor of that many float32 in the storage "0"."""
    storage = (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(count) + view + b"tQ"
    )
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + number(count) + b"\x85K\x01\x85\x89NtR"


DEEP = b"\x85" * 1_000_000
LISTS = b"(" + b"K\x01" * 10 + b"t" + b"q\x01(" + b"h\x01" * 10 + b"t"
WIDE = b"]q\x00" + b"(K\x01K\x01tq\x01" + b"".join(b"(h\x01h\x01tq\x01" for _ in range(60)) + b"a"
DTYPE = b"cnumpy\ndtype\n" + text("i8") + b"\x89\x88\x87R"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + text("b") + b"tR"
KEYS = b"".join(b"\x8a\x0c" + (k * (2**61 - 1)).to_bytes(12, "little") + b"N" for k in range(1, 300_000))

HOSTILE = {
    "a key of a million tuples": b"}" + b")" + DEEP + b"K\x01s",
    "a value of a million tuples": b"}" + text("a") + b")" + DEEP + b"s",
    "a tuple that doubles": b"}" + text("a") + WIDE + b"s",
    "keys of one hash": b"}(" + KEYS + b"u",
    "a list in itself": b"}" + text("a") + b"]q\x00h\x00as",
    "a list that grows in another": b"}" + text("a") + b"]q\x00]q\x01ah\x01K\x01a0s",
    "a text in another coding": b"}" + text("a") + b"c_codecs\nencode\n" + text("a" * 9) + text("zlib") + b"\x86Rs",
    "bytes without data": b"}" + text("a") + b"cbuiltins\nbytearray\n" + number(2**31 - 1) + b"\x85Rs",
    "a tensor called": b"}" + text("a") + b"ctorch\nTensor\n" + (number(100_000) * 2) + b"\x86Rs",
    "a storage called": b"}" + text("a") + b"ctorch\nFloatStorage\n" + number(2**31 - 1) + b"\x85Rs",
    "an object by its class": b"}" + text("a") + b"ctorch\nSize\n)\x81s",
    "attributes of a tensor": b"}" + text("a") + tensor(2) + b"}bs",
    "more data than there are": b"}" + text("a") + tensor(2**30) + b"s",
    "data of a negative size": b"}" + text("a") + tensor(-1) + b"s",
    "a set of tuples": b"}" + text("a") + b"c__builtin__\nset\n])aq\x00\x85Rs",
    "no end": b"}",
    "an empty stack": b"s",
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_named_in_a_process_that_survives(tmp_path, name, is_zip):
    (tmp_path / "models").mkdir()
    content = b"\x80\x02" + HOSTILE[name] + b"."
    (tmp_path / "models" / "model.pt").write_bytes(file_of(content, is_zip=is_zip, data=b"\0" * 8))
    with raises_reason(BundleInvalid, "weights", names="models/model.pt"):
        read_weights(tmp_path)


@pytest.mark.parametrize("is_zip", [True, False])
def test_the_same_crafted_files_are_read_where_nothing_is_wrong(tmp_path, is_zip):
    (tmp_path / "models").mkdir()
    content = b"\x80\x02}" + text("a") + tensor(2, b"" if is_zip else b"N") + b"s."
    data = np.array([1, 2], np.float32).tobytes()
    data = data if is_zip else struct.pack("<q", 2) + data
    (tmp_path / "models" / "model.pt").write_bytes(file_of(content, is_zip=is_zip, data=data))
    weights, _ = read_weights(tmp_path)
    assert weights["a"].tolist() == [1, 2]


def test_data_that_the_older_format_leaves_out_are_not_taken_from_memory(tmp_path):
    (tmp_path / "models").mkdir()
    path = tmp_path / "models" / "model.pt"
    torch.save({"a": torch.ones(4)}, path, _use_new_zipfile_serialization=False)
    (key,) = walked_keys(path.read_bytes())
    without = path.read_bytes().replace(pickle.dumps([key], protocol=2)[2:], pickle.dumps([], protocol=2)[2:])
    path.write_bytes(without)
    with raises_reason(BundleInvalid, "weights", names="models/model.pt"):
        read_weights(tmp_path)


def test_parts_of_a_zip_that_overlap_are_not_read_again_and_again(tmp_path):
    """Ten thousand names for one megabyte, each of them in its place in the file."""
    content = b"}" + b"".join(
        text(f"w{n}") + tensor(250_000).replace(text("0"), text(str(n)), 1) + b"s" for n in range(1000)
    )
    raw = bytearray(file_of(b"\x80\x02" + content + b".", data=bytes(1_000_000)))
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        start = archive.start_dir
        entry = bytes(raw[raw.rindex(b"PK\x01\x02", start) : raw.rindex(b"PK\x05\x06")])
    name = b"archive/data/0"
    others = b""
    for number_ in range(1, 1000):
        other = f"archive/data/{number_}".encode()
        others += entry[:28] + struct.pack("<H", len(other)) + entry[30:46] + other + entry[46 + len(name) :]
    end = bytearray(raw[raw.rindex(b"PK\x05\x06") :])
    count = struct.unpack("<H", end[8:10])[0] + 999
    directory = bytes(raw[start : raw.rindex(b"PK\x05\x06")]) + others
    end[8:16] = struct.pack("<HHI", count, count, len(directory))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").write_bytes(bytes(raw[:start]) + directory + bytes(end))
    with raises_reason(BundleInvalid, "weights", names="models/model.pt"):
        read_weights(tmp_path)


def walked_keys(raw: bytes) -> tuple[str, ...]:
    stream = io.BytesIO(raw)
    return [walked(stream) for _ in range(5)][-1].items


@pytest.mark.parametrize("flags", [63, 255, 1])
def test_a_crafted_type_of_numpy_is_not_numpys(tmp_path, flags):
    state = b"(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK" + bytes([flags]) + b"t"
    raw = b"c_codecs\nencode\n" + text("A" * 32) + text("latin1") + b"\x86R"
    content = b"\x80\x02}" + text("a") + ARRAY + b"(K\x01K\x04\x85" + DTYPE + state + b"b\x89" + raw + b"tbs."
    found = loaded_plainly(io.BytesIO(file_of(content)), "a.pt")
    array = as_arrays(found)["a"]
    assert array.dtype == np.int64
    assert array.tolist() == [0x4141414141414141] * 4  # numbers, where NumPy would follow them as addresses


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"])
def test_numpys_numbers_and_arrays_are_read_as_they_were_saved(kind):
    saved = io.BytesIO()
    array = np.asfortranarray(np.arange(6).reshape(2, 3)).astype(kind)
    torch.save(
        {"a": array, "big": array.astype(array.dtype.newbyteorder(">")), "n": array[1, 2], "l": [{1: 2.5}]}, saved
    )
    saved.seek(0)
    found = as_arrays(loaded_plainly(saved, "a.pt"))
    np.testing.assert_array_equal(found["a"], array)
    np.testing.assert_array_equal(found["big"], array)
    assert found["a"].dtype == array.dtype
    assert found["n"] == array[1, 2]
    assert found["l"] == [{1: 2.5}]


def test_optimizers_logs_and_sets_of_an_honest_checkpoint_are_read():
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    saved = io.BytesIO()
    content = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "log": {
            "dice": [np.float64(0.5), np.float32(0.25)],
            "seen": {1, 2},
            "size": torch.Size((1, 2)),
            "raw": b"\xff",
        },
        "device": torch.device("cpu"),
        "type": torch.float32,
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save(content, saved)
    saved.seek(0)
    found = loaded_plainly(saved, "a.pt")
    assert found["log"]["seen"] == {1, 2}
    assert found["network"]._metadata == network.state_dict()._metadata
    assert found["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]


def test_the_walk_takes_seconds_and_little_memory_for_any_small_file():
    """In a process of its own, with 2 GB for everything."""
    code = (
        "import resource, sys, io, ctflow\n"
        "from ctflow.bundle.saved.pickles import walked\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "try:\n    walked(io.BytesIO(b'\\x80\\x02' + b'}' * 1000 + b'(' * 1_000_000 + b'N' * 4_000_000 + b'.'))\n"
        "except Exception as error:\n    print(type(error).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "UnpicklingError", done.stderr
