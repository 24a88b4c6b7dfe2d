"""The same image in another transfer syntax is recognised, by a process that a hostile file may end."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import zlib

import numpy as np
import pydicom
import pytest
from pydicom import uid
from pydicom.dataset import Dataset

from ctflow.dicom.uids import CT_IMAGE_STORAGE
from ctflow.node.journal.writes import key_of
from ctflow.node.receive import comparer as module
from ctflow.node.receive import intake
from ctflow.node.receive.comparer import Comparer, is_same_decoded
from service_support import association, dcmtk, instance, store, wait_until

KEY = key_of("1.2.826.0.2", "1.2.826.0.3", 1)
PLAIN = uid.ExplicitVRLittleEndian


def image(number: int = 1, **changes) -> Dataset:
    dataset = instance(number, Rows=32, Columns=32, PixelRepresentation=1, **changes)
    values = (np.arange(32 * 32, dtype=np.int16) * 7 % 997 - 300).reshape(32, 32)
    dataset.PixelData = changes.get("PixelData", values.tobytes())
    return dataset


def as_syntax(dataset: Dataset, syntax: str) -> Dataset:
    if syntax in (uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless):
        dataset.compress(syntax, generate_instance_uid=False)
    elif syntax == uid.ExplicitVRBigEndian:
        dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").byteswap().tobytes()
    dataset.file_meta.TransferSyntaxUID = syntax
    return dataset


def send(node, dataset: Dataset) -> int:
    syntax = dataset.file_meta.TransferSyntaxUID
    with association(node.port, contexts={CT_IMAGE_STORAGE: [syntax]}) as found:
        return found.send_c_store(dataset).Status


def test_the_same_image_in_every_lossless_syntax_is_a_duplicate_and_another_is_not(scp):
    node = scp()
    syntaxes = (
        uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.DeflatedExplicitVRLittleEndian,
        uid.ExplicitVRBigEndian,
    )  # fmt: skip
    assert store(node.port, image()) == [0]
    assert [send(node, as_syntax(image(), syntax)) for syntax in syntaxes] == [0] * 5
    assert (len(node.files), node.journal.find(KEY).duplicates) == (1, 5)
    for changes in ({"InstanceNumber": 7}, {"PixelData": bytes(2048)}):
        assert send(node, as_syntax(image(**changes), uid.RLELossless)) == intake.CONFLICT
    assert len(node.files) == 1


def test_a_compressed_one_that_was_first_is_recognised_too(scp):
    node = scp(same_uid="newest")
    assert send(node, as_syntax(image(), uid.RLELossless)) == 0
    assert store(node.port, image()) == [0]
    (record,) = node.journal.instances(KEY)
    assert (record.transfer_syntax, record.replaced) == (uid.RLELossless, 0)


def written(tmp_path, dataset: Dataset):
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("codec", ["dcmcrle", "dcmcjpeg", "dcmcjpls"])
def test_what_a_codec_of_dcmtk_writes_is_the_same_image(tmp_path, codec):
    subprocess.run([dcmtk(codec), written(tmp_path, image()), tmp_path / "coded.dcm"], check=True)
    pair = [pydicom.dcmread(tmp_path / name) for name in ("0.dcm", "coded.dcm")]
    assert pair[0].file_meta.TransferSyntaxUID != pair[1].file_meta.TransferSyntaxUID
    assert is_same_decoded(*pair)


def test_a_process_that_ends_or_hangs_is_replaced(tmp_path, monkeypatch):
    kept, came = written(tmp_path, image()), written(tmp_path, as_syntax(image(), uid.RLELossless)).read_bytes()
    found = Comparer()
    assert found.is_same(kept, came) is True
    os.kill(found._process.pid, signal.SIGSTOP)  # it hangs
    found._limit_s = 0.2
    assert found.is_same(kept, came) is False
    found._limit_s = 60
    assert found.is_same(kept, came) is True
    os.kill(found._process.pid, signal.SIGKILL)
    wait_until(lambda: not found._process.is_alive(), "it has ended")
    assert found.is_same(kept, came) is True
    process = found._process
    found.close()
    with pytest.raises(ValueError, match="closed"):
        process.is_alive()


def test_a_bomb_ends_at_the_limit_of_memory(tmp_path):
    kept = written(tmp_path, image())
    bomb = written(tmp_path, as_syntax(image(), uid.DeflatedExplicitVRLittleEndian)).read_bytes()
    head = bomb[: 144 + int.from_bytes(bomb[140:144], "little")]  # its meta information
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = compressor.compress(bytes(2**24)) + compressor.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
    body = block * 256 + compressor.flush()  # 4 GiB in 4 MB, of which only 16 MiB had to be compressed
    found = Comparer(limit_s=60)
    assert found.is_same(kept, head + body) is False
    assert found.is_same(kept, kept.read_bytes()) is True
    found.close()


def test_who_waits_too_long_is_told_to_send_again_and_others_are_served(scp, monkeypatch):
    node = scp()
    assert store(node.port, image(1)) == [0]
    node.intake.comparer._wait_s = 0.05
    with node.intake.comparer._turn:
        assert send(node, as_syntax(image(1), uid.RLELossless)) == intake.OUT_OF_RESOURCES
        assert store(node.port, image(2)) == [0]
    assert node.journal.find(KEY).refused == 0  # the first one is kept: the series can run
    assert send(node, as_syntax(image(1), uid.RLELossless)) == 0


def test_many_at_once_are_compared_one_after_another(tmp_path):
    kept, came = written(tmp_path, image()), written(tmp_path, as_syntax(image(), uid.RLELossless)).read_bytes()
    found, answers = Comparer(60, 60), []
    threads = [threading.Thread(target=lambda: answers.append(found.is_same(kept, came))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [True] * 6
    found.close()


def test_what_is_too_large_is_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 100)
    kept = written(tmp_path, image())
    assert Comparer().is_same(kept, kept.read_bytes()) is False
    assert pydicom.dcmread(kept).Rows == 32
