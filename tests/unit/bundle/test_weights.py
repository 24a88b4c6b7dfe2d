from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
import torch

from ctflow.bundle.weights import read_weights, weights_digest
from ctflow.core.errors import BundleInvalid
from reasons import raises_reason


@pytest.fixture
def save(tmp_path):
    (tmp_path / "models").mkdir()

    def save_as(content, **options):
        torch.save(content, tmp_path / "models" / "model.pt", **options)
        return tmp_path

    return save_as


WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3, dtype=torch.int64)}


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w, "epoch": 3}, lambda w: {"model": w}])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_is_read_plain_or_nested(save, wrap, zipped):
    read, notes = read_weights(save(wrap(WEIGHTS), _use_new_zipfile_serialization=zipped))
    assert not notes
    assert list(read) == ["a", "b"]
    torch.testing.assert_close(read["a"], WEIGHTS["a"])


PARALLEL = {f"module.{name}": value for name, value in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (PARALLEL, None),
        ({"network": PARALLEL, "optimizer": {"lr": 1}}, None),
        ({"model": {f"_orig_mod.{name}": value for name, value in PARALLEL.items()}}, None),
        ({"model": WEIGHTS, "model_ema": {"a": WEIGHTS["a"] + 1}}, "averaged"),
        ({"ema": {"n_averaged": torch.tensor(3), **PARALLEL}}, None),
        ({"epoch": 3, "best": np.float64(0.9), "scores": np.ones(2), "state_dict": {"state_dict": WEIGHTS}}, None),
        (
            {"pytorch-lightning_version": "2", "state_dict": {f"net.{name}": v for name, v in WEIGHTS.items()}},
            None,
        ),
    ],
)
def test_checkpoints_as_training_programs_save_them_hold_the_same_weights(save, content, note):
    read, notes = read_weights(save(content))
    assert weights_digest(read) == weights_digest(WEIGHTS)
    assert [note in text for text in notes] == ([True] if note else [])


def test_the_weights_are_those_under_the_loaders_name(save):
    read, _ = read_weights(save({"best": WEIGHTS, "model": {"c": WEIGHTS["a"]}}), key="best")
    assert list(read) == ["a", "b"]


def test_the_digest_depends_on_names_types_shapes_and_bytes_and_not_on_order():
    base = weights_digest(WEIGHTS)
    assert len(base) == 64
    assert weights_digest(dict(reversed(WEIGHTS.items()))) == base
    assert weights_digest({**WEIGHTS, "a": WEIGHTS["a"].t().contiguous().t()}) == base  # same values, other strides
    others = [
        {"c": WEIGHTS["a"], "b": WEIGHTS["b"]},
        {**WEIGHTS, "a": WEIGHTS["a"].reshape(3, 2)},
        {**WEIGHTS, "a": WEIGHTS["a"].to(torch.bfloat16)},
        {**WEIGHTS, "a": WEIGHTS["a"] + 1},
        {**WEIGHTS, "empty": torch.zeros(0)},
    ]
    digests = {weights_digest(other) for other in others}
    assert len(digests) == len(others)
    assert base not in digests


class Exploit:
    ran = False

    def __reduce__(self):
        return setattr, (Exploit, "ran", True)


def test_a_pickled_object_is_refused_and_not_run(save):
    with raises_reason(BundleInvalid, "weights", names=("models/model.pt", "torch.save")):
        read_weights(save({"a": Exploit()}))
    assert not Exploit.ran


def test_a_pickled_module_is_refused(save):
    with raises_reason(BundleInvalid, "weights", names="models/model.pt"):
        read_weights(save(torch.nn.Linear(2, 2)))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torchscript_is_refused(tmp_path):
    (tmp_path / "models").mkdir()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), str(tmp_path / "models" / "model.pt"))
    with raises_reason(BundleInvalid, "torchscript", names="models/model.pt"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("content", "said", "reason"),
    [
        ({}, "models/model.pt", "weights"),
        ([1, 2], "models/model.pt", "weights"),
        ({"a": 3}, "'a'", "weights"),
        ({3: torch.zeros(1)}, "holds 3", "weights"),
        ({"state_dict": {}}, "models/model.pt", "weights"),
        ({"a": torch.tensor([1.0, float("nan")])}, ": a ", "weights-not-finite"),
        ({"a": torch.tensor([float("inf")], dtype=torch.bfloat16)}, ": a ", "weights-not-finite"),
        ({"a": torch.zeros(1).expand(1000)}, ": a ", "weights"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64", "weights"),
        ({"a": torch.eye(2).to_sparse()}, "sparse", "weights"),
        ({"a": torch.zeros(2, device="meta")}, ": a ", "weights"),
    ],
)
def test_what_is_no_finite_dense_state_dict_is_refused(save, content, said, reason):
    with raises_reason(BundleInvalid, reason, names=("models/model.pt", said)):
        read_weights(save(content))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "weights"),
        (b"PK\x03\x04", "unreadable-file"),
        (b"PK\x03\x04" + b"\0" * 64, "unreadable-file"),
        (b"hello", "weights"),
        (pickle.dumps({"a": 1}, protocol=2), "weights"),
        (b"\x80\x02" + b"(" * 5000, "weights"),
    ],
)
def test_damaged_files_are_bundle_invalid(tmp_path, raw, reason):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").write_bytes(raw)
    with raises_reason(BundleInvalid, reason, names="models/model.pt"):
        read_weights(tmp_path)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9, 0.999])
def test_a_cut_file_is_bundle_invalid(save, kept):
    path = save(WEIGHTS) / "models" / "model.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with raises_reason(BundleInvalid, "unreadable-file"):
        read_weights(path.parents[1])


def test_a_compressed_archive_is_refused_before_it_is_unpacked(save):
    folder = save(WEIGHTS)
    path = folder / "models" / "model.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with raises_reason(BundleInvalid, "weights", names="models/model.pt"):
        read_weights(folder)


def test_missing_weights_are_named(tmp_path):
    with raises_reason(BundleInvalid, "missing-file", names="models/model.pt"):
        read_weights(tmp_path)
