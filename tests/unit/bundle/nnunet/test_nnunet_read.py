"""A trained-model folder of nnU-Net becomes a model, or is rejected with the key that ctflow does not support."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import nnunet_support as nnunet
from ctflow.bundle import find_bundle, read_body_parts, read_bundle, read_spec
from ctflow.core.errors import BundleInvalid
from ctflow.core.steps import ClipNormalize, CropNonzero, KeepLargest, Orient, ResampleSpline, Spline, ZScore
from ctflow.networks.build import network_from_model
from reasons import raises_reason


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return nnunet.untrained(tmp_path_factory.mktemp("nnunet") / "trained", nnunet.plans(), nnunet.dataset(), folds=2)


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "trained")


def change(folder: Path, name: str, path: str, value: object) -> None:
    document = json.loads((folder / name).read_text())
    holder = document
    *parts, last = path.split("#")
    for part in parts:
        holder = holder[part]
    if value is None:
        holder.pop(last, None)
    else:
        holder[last] = value
    (folder / name).write_text(json.dumps(document))


CODE = {"value": "10200004", "scheme": "SCT", "meaning": "Liver"}


def test_a_metadata_json_beside_plans_json_says_what_nnunet_does_not(folder, tmp_path):
    sidecar = {
        "name": "Liver", "version": "1.2", "intended_use": "research", "demonstration": True, "body_parts": ["abdomen"],
        "segments": [{
            "channel": 2, "label": "Tumour", "category": CODE, "type": CODE, "hu_range": [-100, 200],
            "colour": "#ff0000",
        }],
    }  # fmt: skip
    plain = read_spec(folder)
    (folder / "metadata.json").write_text(json.dumps(sidecar))
    for path in (folder, nnunet.zipped(folder, tmp_path / "model.zip")):
        spec = read_spec(path)
        assert (spec.name, spec.version, spec.intended_use, spec.demonstration) == ("Liver", "1.2", "research", True)
        assert spec.body_parts == read_body_parts(path) == ("ABDOMEN",)
        assert spec.segments[0] == plain.segments[0], "what it does not name keeps the codes of its name"
        tumour = spec.segments[1]
        assert (tumour.number, tumour.label, tumour.type.meaning) == (2, "Tumour", "Liver")
        assert (tumour.hu_range, tumour.colour) == ((-100.0, 200.0), (255, 0, 0))
        assert not [note for note in spec.notes if "intended_use" in note]
    assert any("intended_use" in note for note in plain.notes)


@pytest.mark.parametrize(
    ("key", "value"),
    [("segments", [{"channel": 3}]), ("segments", [{"channel": 1}]), ("body_parts", "CHEST"), ("version", 3)],
)
def test_a_wrong_metadata_json_is_named(folder, key, value):
    (folder / "metadata.json").write_text(json.dumps({key: value}))
    with raises_reason(BundleInvalid, "metadata", names=("metadata.json: ", key)) as caught:
        read_spec(folder)
    assert "configs" not in str(caught.value)


def step(labels: object, **more: object) -> dict:
    return {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
        "postprocessing_kwargs": [{"labels_or_regions": labels, **more}],
    }


@pytest.mark.parametrize(("labels", "kept"), [([1, 2], (1, 2)), (2, (2,)), ([[1, 2]], (1, 2)), ([[1, 9], 2], (1, 2))])
def test_steps_on_labels_beside_plans_json_are_applied(folder, labels, kept):
    (folder / "postprocessing.json").write_text(json.dumps(step(labels)))
    spec = read_spec(folder)
    assert spec.label_steps == (KeepLargest(kept, independent=False, connectivity=3, count=1),)
    assert any("largest component" in note for note in spec.notes)


def test_steps_of_a_cross_validation_are_noted_and_not_applied(folder, tmp_path):
    inner = folder / "crossval_results_folds_0_1"
    inner.mkdir()
    (inner / "postprocessing.json").write_text(json.dumps(step([1, 2])))
    (inner / "postprocessing.pkl").write_bytes(b"never opened")
    for path in (folder, nnunet.zipped(folder, tmp_path / "model.zip")):
        spec = read_spec(path)
        assert spec.label_steps == ()
        assert any("crossval_results_folds_0_1/postprocessing.json is not applied" in note for note in spec.notes)


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({}, "value"), ({"postprocessing_fns": [], "postprocessing_kwargs": [1]}, "value"),
        ({**step([1]), "postprocessing_fns": ["os.system"]}, "target"), (step([1], more=1), "argument"),
        (step("1"), "value"), (step([]), "value"), (step([1], background_label=2), "value"), (step([[[1]]]), "value"),
    ],
)  # fmt: skip
def test_other_steps_are_refused(folder, document, reason):
    (folder / "postprocessing.json").write_text(json.dumps(document))
    with raises_reason(BundleInvalid, reason, names="postprocessing.json"):
        read_spec(folder)


def test_a_folder_becomes_a_model(folder):
    assert find_bundle(folder) == folder
    model = read_bundle(folder)
    spec = model.spec
    assert (spec.name, spec.version) == ("Dataset001_Test", "nnUNetTrainer__nnUNetPlans__3d_fullres")
    assert spec.preprocessing == (
        Orient("SPL"),
        CropNonzero(),
        ClipNormalize(-1000.0, 400.0, -300.0, 400.0),
        ResampleSpline((3.0, 2.0, 2.0), Spline(3, 0, None), Spline(1, 0, None)),
    )
    assert (spec.roi, spec.overlap, spec.blend, spec.placement) == ((16, 24, 24), 0.5, "nnunet", "even")
    assert (spec.activation, spec.out_channels, spec.restored) == ("softmax", 3, "logits")
    assert spec.mirror_axes == (0, 1, 2)
    assert [segment.label for segment in spec.segments] == ["liver", "lung tumour"]
    assert spec.network.members == 2
    assert "folds averaged: 0, 1" in spec.notes
    assert read_spec(folder) == spec
    assert read_body_parts(folder) == ()


def test_folds_are_averaged(folder):
    model = read_bundle(folder)
    windows = torch.randn(1, 1, *model.spec.roi)
    shutil.rmtree(folder / "fold_1")
    first = network_from_model(read_bundle(folder))(windows)
    (folder / "fold_0").rename(folder / "fold_all")
    assert torch.equal(network_from_model(read_bundle(folder))(windows), first)
    shutil.copytree(folder / "fold_all", folder / "fold_4")
    assert read_spec(folder).notes[0] == "folds averaged: 4"
    both = network_from_model(model)(windows)
    only_second = 2 * both - first
    assert not torch.allclose(only_second, first)
    weights = {name.removeprefix("1."): value for name, value in model.weights.items() if name.startswith("1.")}
    second = network_from_model(read_bundle(folder))
    second.load_state_dict(weights)
    assert torch.allclose(second(windows), only_second, atol=1e-4)


def test_a_folder_or_zip_around_it_is_found(folder, tmp_path):
    assert find_bundle(folder.parent) == folder
    archive = nnunet.zipped(folder, tmp_path / "model.zip")
    assert find_bundle(archive) == archive
    assert read_body_parts(archive) == ()
    model, packed = read_bundle(folder), read_bundle(archive)
    assert packed.spec == model.spec
    assert packed.weights_digest == model.weights_digest


def test_residual_encoders_and_old_plans_are_read(tmp_path):
    plans = nnunet.plans(nnunet.residual())
    made = nnunet.untrained(tmp_path / "residual", plans, nnunet.dataset())
    assert type(network_from_model(read_bundle(made))).__name__ == "ResidualEncoderUNet"
    old = nnunet.untrained(tmp_path / "old", nnunet.plans(), nnunet.dataset())
    arguments = nnunet.PLAIN["arch_kwargs"]
    change(old, "plans.json", "configurations#3d_fullres#architecture", None)
    for key, value in {
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 4, "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": arguments["n_conv_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "conv_kernel_sizes": arguments["kernel_sizes"], "pool_op_kernel_sizes": arguments["strides"],
    }.items():  # fmt: skip
        change(old, "plans.json", f"configurations#3d_fullres#{key}", value)
    assert type(network_from_model(read_bundle(old))).__name__ == "PlainConvUNet"


def test_configurations_inherit(folder):
    document = json.loads((folder / "plans.json").read_text())
    configurations = document["configurations"]
    configurations["base"] = configurations["3d_fullres"]
    configurations["3d_fullres"] = {"inherits_from": "base", "spacing": [4.0, 3.0, 3.0]}
    (folder / "plans.json").write_text(json.dumps(document))
    assert read_spec(folder).preprocessing[-1].spacing_mm == (4.0, 3.0, 3.0)
    change(folder, "plans.json", "configurations#base", {"inherits_from": "3d_fullres"})
    with raises_reason(BundleInvalid, "reference", names="3d_fullres"):
        read_spec(folder)


@pytest.mark.parametrize(
    ("reader", "forward", "axes"),
    [
        ("SimpleITKIO", [0, 1, 2], "SPL"),
        ("SimpleITKIO", [2, 0, 1], "LSP"),
        ("NibabelIO", [0, 1, 2], "SPL"),
        ("NibabelIOWithReorient", [1, 0, 2], "ASR"),
    ],
)
def test_axes_follow_reader_and_transposition(folder, reader, forward, axes):
    change(folder, "plans.json", "image_reader_writer", reader)
    change(folder, "plans.json", "transpose_forward", forward)
    assert read_spec(folder).preprocessing[0] == Orient(axes)


def test_other_normalizations(folder):
    at = "configurations#3d_fullres#"
    change(folder, "plans.json", f"{at}normalization_schemes", ["ZScoreNormalization"])
    change(folder, "plans.json", f"{at}use_mask_for_norm", [True])
    assert read_spec(folder).preprocessing[2] == ZScore(masked=True)
    change(folder, "plans.json", f"{at}normalization_schemes", ["NoNormalization"])
    assert len(read_spec(folder).preprocessing) == 3


AT = "configurations#3d_fullres"


@pytest.mark.parametrize(
    ("file", "key", "value", "reason"),
    [
        ("plans.json", f"{AT}#previous_stage", "3d_lowres", "cascade"),
        ("plans.json", f"{AT}#patch_size", [64, 64], "target"),
        ("plans.json", f"{AT}#patch_size", [64, 64, "64"], "value"),
        ("plans.json", f"{AT}#patch_size", [64, 64, 1e9], "value"),
        ("plans.json", f"{AT}#spacing", [0.0, 1.0, 1.0], "value"),
        ("plans.json", f"{AT}#preprocessor_name", "Own", "value"),
        ("plans.json", f"{AT}#normalization_schemes", ["RescaleTo01Normalization"], "value"),
        ("plans.json", f"{AT}#normalization_schemes", ["CTNormalization"] * 2, "inputs"),
        ("plans.json", f"{AT}#use_mask_for_norm", ["yes"], "value"),
        ("plans.json", f"{AT}#resampling_fn_data", "resample_torch_fornnunet", "value"),
        ("plans.json", f"{AT}#resampling_fn_probabilities_kwargs", {"order": 3}, "value"),
        ("plans.json", f"{AT}#resampling_fn_data_kwargs", {"order": 3, "device": "cuda"}, "value"),
        ("plans.json", f"{AT}#architecture#network_class_name", "os.system", "target"),
        ("plans.json", f"{AT}#architecture#arch_kwargs#conv_op", "builtins.eval", "argument"),
        ("plans.json", f"{AT}#architecture#arch_kwargs#nonlin", "torch.nn.Softmax", "argument"),
        ("plans.json", f"{AT}#architecture#arch_kwargs#features_per_stage", [10**9] * 3, "value"),
        ("plans.json", f"{AT}#architecture#arch_kwargs#own", 1, "argument"),
        ("plans.json", f"{AT}#architecture#_kw_requires_import", ["conv_op", "forward"], "value"),
        ("plans.json", "configurations#3d_fullres", None, "keys"),
        ("plans.json", "image_reader_writer", "Tiff3DIO", "value"),
        ("plans.json", "transpose_forward", [0, 0, 1], "value"),
        ("plans.json", "transpose_forward", ["0", "1", "2"], "value"),
        ("plans.json", "image_reader_writer", [], "value"),
        ("plans.json", "plans_name", ["x"], "value"),
        ("plans.json", "plans_name", "a\\b", "value"),
        ("plans.json", "plans_name", "a\nb", "value"),
        ("plans.json", "label_manager", "Own", "value"),
        ("plans.json", "foreground_intensity_properties_per_channel", {"0": {"mean": 0}}, "value"),
        ("dataset.json", "channel_names", {"0": "T1", "1": "FLAIR"}, "inputs"),
        ("dataset.json", "channel_names", {"0": "MRI"}, "inputs"),
        ("dataset.json", "channel_names", None, "metadata"),
        ("dataset.json", "labels", {"liver": 1}, "metadata"),
        ("dataset.json", "labels", {"background": 0, "liver": 2}, "metadata"),
        ("dataset.json", "labels", {"background": 0}, "metadata"),
        ("dataset.json", "labels", {"background": 0, "liver": 1, "ignore": 3}, "metadata"),
        ("dataset.json", "labels", {"background": 0, "a\nb": 1}, "metadata"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(folder, file, key, value, reason):
    change(folder, file, key, value)
    named = (file,) if reason in {"target", "argument"} else (file, key.split("#")[0])
    with raises_reason(BundleInvalid, reason, names=named):
        read_bundle(folder)


def test_folders_without_a_part_are_rejected(folder):
    (folder / "dataset.json").unlink()
    with raises_reason(BundleInvalid, "missing-file", names="dataset.json"):
        read_bundle(folder)
    (folder / "dataset.json").write_text(json.dumps(nnunet.dataset()))
    for fold in ("fold_0", "fold_1"):
        (folder / fold / "checkpoint_final.pth").rename(folder / fold / "checkpoint_best.pth")
    with raises_reason(BundleInvalid, "missing-file", names="checkpoint_final.pth"):
        read_bundle(folder)


def test_labels_of_regions_are_painted_in_order(tmp_path):
    labels = {"background": 0, "kidney": [1, 2, 3], "kidney tumour": [2, 3], "kidney cyst": 3}
    given = nnunet.dataset(labels, regions_class_order=[1, 2, 3])
    spec = read_spec(nnunet.untrained(tmp_path / "regions", nnunet.plans(), given))
    assert (spec.activation, spec.threshold, spec.out_channels, spec.painted) == ("sigmoid", 0.5, 3, (1, 2, 3))
    assert [segment.label for segment in spec.segments] == [
        "kidney without kidney tumour or kidney cyst", "kidney tumour without kidney cyst", "kidney cyst"
    ]  # fmt: skip
    assert [segment.type.meaning for segment in spec.segments] == ["Kidney", "Neoplasm", "Cyst"]
    assert sum("overlap become one label map" in note for note in spec.notes) == 2


@pytest.mark.parametrize("order", [None, [1], [1, 1], [0, 1], "12"])
def test_regions_need_an_order(folder, order):
    change(folder, "dataset.json", "labels", {"background": 0, "all": [1, 2], "tumour": 2})
    change(folder, "dataset.json", "regions_class_order", order)
    with raises_reason(BundleInvalid, "metadata", names=("dataset.json", "regions_class_order")):
        read_bundle(folder)


def test_the_ignore_label_has_no_segment(tmp_path):
    given = nnunet.dataset({"background": 0, "liver": 1, "ignore": 2})
    spec = read_spec(nnunet.untrained(tmp_path / "ignored", nnunet.plans(), given))
    assert spec.out_channels == 2
    assert [segment.label for segment in spec.segments] == ["liver"]


def test_unknown_structures_keep_their_name_and_are_noted(tmp_path):
    given = nnunet.dataset({"background": 0, "Gizmo": 1, "left kidney": 2})
    spec = read_spec(nnunet.untrained(tmp_path / "named", nnunet.plans(), given))
    gizmo, kidney = spec.segments
    assert (gizmo.label, gizmo.coded, kidney.coded, kidney.side.meaning) == ("Gizmo", False, True, "Left")
    assert sum("Gizmo" in note for note in spec.notes) == 1


# ---------------------------------------------------------------------------------------------- checkpoints


class Hostile:
    """Creates a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def rewrite(folder: Path, **changed: object) -> None:
    path = folder / "fold_0" / "checkpoint_final.pth"
    entries = torch.load(path, weights_only=False)
    torch.save({**entries, **changed}, path)


def test_code_in_a_checkpoint_is_not_run(folder, tmp_path):
    rewrite(folder, logging=Hostile(tmp_path / "ran"))
    with raises_reason(BundleInvalid, "weights", names="fold_0/checkpoint_final.pth"):
        read_bundle(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"network_weights": {}}, "weights"),
        ({"network_weights": {"a": 1}}, "weights"),
        ({"network_weights": {"a": torch.tensor(float("nan"))}}, "weights-not-finite"),
        ({"network_weights": {"a": torch.zeros(1).expand(10**12)}}, "weights"),
        ({"network_weights": {"a": torch.zeros(1)}}, "weights-mismatch"),
        ({"trainer_name": 3}, "weights"),
        ({"trainer_name": "nnUNetTrainerBN"}, "target"),
        ({"init_args": {}}, "weights"),
        ({"init_args": {"configuration": "2d"}}, "keys"),
        ({"inference_allowed_mirroring_axes": (0, 3)}, "weights"),
        ({"inference_allowed_mirroring_axes": "all"}, "weights"),
    ],
)
def test_checkpoints_that_are_none_are_rejected(folder, changed, reason):
    shutil.rmtree(folder / "fold_1")
    rewrite(folder, **changed)
    with raises_reason(BundleInvalid, reason):
        network_from_model(read_bundle(folder))


def test_folds_of_two_trainings_are_rejected(folder):
    rewrite(folder, trainer_name="nnUNetTrainer_5epochs")
    with raises_reason(BundleInvalid, "weights-mismatch", names="fold_1"):
        read_bundle(folder)


def test_names_that_wrappers_prefix_are_the_networks(folder):
    expected = read_bundle(folder).weights_digest
    path = folder / "fold_0" / "checkpoint_final.pth"
    weights = torch.load(path, weights_only=False)["network_weights"]
    rewrite(folder, network_weights={f"module.{name}": value for name, value in weights.items()})
    assert read_bundle(folder).weights_digest == expected


def test_a_damaged_checkpoint_is_rejected(folder):
    path = folder / "fold_0" / "checkpoint_final.pth"
    path.write_bytes(path.read_bytes()[:-200])
    with raises_reason(BundleInvalid, "unreadable-file", names="fold_0/checkpoint_final.pth"):
        read_bundle(folder)


def test_training_that_did_not_mirror_mirrors_nothing(folder):
    shutil.rmtree(folder / "fold_1")
    rewrite(folder, inference_allowed_mirroring_axes=None)
    assert read_spec(folder).mirror_axes == ()
