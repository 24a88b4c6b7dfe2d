"""The CT segmentation bundles of MONAI's model zoo as minimal equivalents: their parts, small networks, random weights.

Each is written in the words of its public configuration (references, expressions, YAML, orders of transforms, names of
files), with fewer channels and smaller windows, so that a test takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

Json = Any
ROI = 32
BEFORE = "preprocessing"


def _image(name: str, **arguments: Json) -> dict[str, Json]:
    return {"_target_": name, "keys": "@image_key", **arguments}


def _answer(name: str, **arguments: Json) -> dict[str, Json]:
    return {"_target_": name, "keys": "pred", **arguments}


def _range(low: float, high: float) -> dict[str, Json]:
    return _image("ScaleIntensityRanged", a_min=low, a_max=high, b_min=0.0, b_max=1.0, clip=True)


LOAD = [_image("LoadImaged"), _image("EnsureChannelFirstd"), _image("Orientationd", axcodes="RAS")]
INVERT = _answer("Invertd", transform="@preprocessing", orig_keys="@image_key", nearest_interp=False, to_tensor=True)
SAVE = _answer("SaveImaged", output_dir="@output_dir", separate_folder="@separate_folder")
SOFTMAX, ARGMAX = _answer("Activationsd", softmax=True), _answer("AsDiscreted", argmax=True)
WINDOWS = {"_target_": "SlidingWindowInferer", "roi_size": [ROI] * 3, "sw_batch_size": 4, "overlap": 0.5}
WIDE = {**WINDOWS, "roi_size": [64] * 3}  # SwinUNETR takes no smaller ones


def _workflow(**parts: Json) -> dict[str, Json]:
    """The rest of a configuration of the zoo around its four parts."""
    before, after = parts.pop("before"), parts.pop("after", [SOFTMAX, INVERT, ARGMAX, SAVE])
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "image_key": "image",
        "output_dir": "$@bundle_root + '/eval'",
        "separate_folder": True,
        "load_pretrain": True,
        "dataset_dir": "/workspace/data",
        "datalist": "$list(sorted(glob.glob(@dataset_dir + '/imagesTs/*.nii.gz')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network": "$@network_def.to(@device)",
        BEFORE: {"_target_": "Compose", "transforms": before},
        "dataset": {"_target_": "Dataset", "data": "$[{'image': i} for i in @datalist]", "transform": "@preprocessing"},
        "inferer": WINDOWS,
        "postprocessing": {"_target_": "Compose", "transforms": after},
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
        },
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": True,
        },
        "initialize": ["$monai.utils.set_determinism(seed=123)"],
        "run": ["$@evaluator.run()"],
        **parts,
    }


def _spacing(*sizes: float) -> dict[str, Json]:
    return _image("Spacingd", pixdim=list(sizes), mode="bilinear")


def spleen_ct() -> dict[str, Json]:
    network = {
        "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8, 16, 16, 16],
        "strides": [2, 2, 2, 2], "num_res_units": 2, "norm": "batch",
    }  # fmt: skip
    return _workflow(network_def=network, before=[*LOAD, _spacing(1.5, 1.5, 2.0), _range(-57, 164)])


def swin_unetr_btcv() -> dict[str, Json]:
    network = {
        "_target_": "SwinUNETR", "spatial_dims": 3, "img_size": 96, "in_channels": 1, "out_channels": 14,
        "feature_size": 12, "use_checkpoint": False,
    }  # fmt: skip
    return _workflow(network_def=network, before=[*LOAD, _spacing(1.5, 1.5, 2.0), _range(-175, 250)], inferer=WIDE)


def whole_body_ct() -> dict[str, Json]:
    network = {
        "_target_": "SegResNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 105, "init_filters": 8,
        "blocks_down": [1, 1, 1, 1], "blocks_up": [1, 1, 1], "dropout_prob": 0.2,
    }  # fmt: skip
    first, channel, orient = LOAD
    scale = [_image("NormalizeIntensityd", nonzero=True), _image("ScaleIntensityd", minv=-1.0, maxv=1.0)]
    invert = INVERT | {"nearest_interp": True}
    return _workflow(
        displayable_configs={"highres": True, "sw_overlap": 0.25, "sw_batch_size": 1},
        pixdim="$[1.5, 1.5, 1.5] if @displayable_configs#highres else [3.0, 3.0, 3.0]",
        modelname="$'model.pt' if @displayable_configs#highres else 'model_lowres.pt'",
        network_def=network,
        before=[first, _image("EnsureTyped"), channel, orient, _image("Spacingd", pixdim="@pixdim"), *scale],
        inferer={
            **WINDOWS, "sw_batch_size": "@displayable_configs#sw_batch_size", "mode": "gaussian",
            "overlap": "@displayable_configs#sw_overlap", "padding_mode": "replicate",
        },
        after=[SOFTMAX, ARGMAX, invert, SAVE],
        checkpointloader={
            "_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/' + @modelname",
            "load_dict": {"model": "@network"},
        },
    )  # fmt: skip


def whole_body_ct_coarse() -> dict[str, Json]:
    """As people edit it: the low resolution, which has other weights."""
    found = whole_body_ct()
    found["displayable_configs"]["highres"] = False
    return found


def _dints(classes: int, low: float, high: float) -> dict[str, Json]:
    return _workflow(
        input_channels=1,
        output_classes=classes,
        arch_ckpt_path="$@bundle_root + '/models/search_code_18590.pt'",
        arch_ckpt="$torch.load(@arch_ckpt_path, map_location=torch.device('cpu'), weights_only=False)",
        dints_space={
            "_target_": "monai.networks.nets.TopologyInstance", "channel_mul": 0.125, "num_blocks": 4, "num_depths": 3,
            "use_downsample": True, "device": "$torch.device('cpu')",
            "arch_code": ["$@arch_ckpt['arch_code_a']", "$@arch_ckpt['arch_code_c']"],
        },
        network_def={
            "_target_": "monai.networks.nets.DiNTS", "dints_space": "@dints_space", "in_channels": "@input_channels",
            "num_classes": "@output_classes", "use_downsample": True,
            "node_a": "$torch.from_numpy(@arch_ckpt['node_a'])",
        },
        before=[*LOAD, _spacing(1, 1, 1), _range(low, high), _image("EnsureTyped")],
        inferer={**WINDOWS, "overlap": 0.625},
    )  # fmt: skip


def multi_organ() -> dict[str, Json]:
    return _dints(8, -500, 500)


def pancreas_dints() -> dict[str, Json]:
    return _dints(3, -87, 199)


def _architecture() -> dict[str, Json]:
    rng = np.random.default_rng(3)
    paths = np.ones((4, 7), dtype=np.int64)
    nodes = np.ones((5, 3), dtype=np.int64)
    return {"arch_code_a": paths, "arch_code_c": rng.integers(0, 5, (4, 7)), "node_a": nodes, "iter_num": 18590}


def _pediatric(network: dict[str, Json], weights: str) -> dict[str, Json]:
    keys = ["@image_key"]
    crop = {"_target_": "CropForegroundd", "keys": keys, "source_key": "@image_key", "mode": ["minimum"]}
    spacing = {"_target_": "Spacingd", "keys": keys, "pixdim": [1.5, 1.5, 3.0], "mode": ["bilinear"]}
    return _workflow(
        input_channels=1,
        output_channels=4,
        spatial_size=[ROI] * 3,
        spatial_dims="$len(@spatial_size)",
        network_def=network,
        before=[
            *LOAD, spacing, _range(-250, 400), crop, _image("EnsureTyped"),
            _image("CastToTyped", dtype="$torch.float32"),
        ],
        inferer={**WINDOWS, "overlap": 0.75},
        handlers=[
            {
                "_target_": "CheckpointLoader", "load_path": f"$@bundle_root + '/models/{weights}'",
                "load_dict": {"model": "@network"},
            },
            {"_target_": "StatsHandler", "iteration_log": False},
        ],
        checkpointloader=None,
    )  # fmt: skip


def pediatric_dynunet() -> dict[str, Json]:
    network = {
        "_target_": "monai.networks.nets.DynUNet", "spatial_dims": "@spatial_dims", "in_channels": "@input_channels",
        "out_channels": "@output_channels", "kernel_size": [3, 3, 3, 3], "strides": [1, 2, 2, [2, 2, 1]],
        "upsample_kernel_size": [2, 2, [2, 2, 1]], "norm_name": "instance", "deep_supervision": False,
        "res_block": True, "filters": [4, 8, 8, 8],
    }  # fmt: skip
    return _pediatric(network, "dynunet_FT.pt")


def pediatric_segresnet() -> dict[str, Json]:
    network = {
        "_target_": "SegResNet", "spatial_dims": "@spatial_dims", "in_channels": "@input_channels", "init_filters": 8,
        "out_channels": "@output_channels", "blocks_down": [1, 1, 1], "blocks_up": [1, 1],
    }  # fmt: skip
    return _pediatric(network, "segresnet_FT.pt")


def pediatric_swinunetr() -> dict[str, Json]:
    network = {
        "_target_": "SwinUNETR", "img_size": "@spatial_size", "in_channels": "@input_channels", "feature_size": 12,
        "out_channels": "@output_channels", "drop_rate": 0.0, "attn_drop_rate": 0.0, "dropout_path_rate": 0.0,
    }  # fmt: skip
    return _pediatric(network, "swinunetr_FT.pt") | {"inferer": WIDE | {"overlap": 0.75}}


_UNEST_SCRIPTS = {
    "__init__.py": "",
    "networks/__init__.py": "",
    "networks/patchEmbed3D.py": """
from torch import nn


class PatchEmbedding(nn.Module):
    def __init__(self, size, channels):
        super().__init__()
        self.proj, self.norm = nn.Conv3d(1, channels, size, size), nn.LayerNorm(channels)

    def forward(self, x):
        x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
""",
    "networks/unest.py": """
import torch
from monai.networks.blocks import TransformerBlock, UnetrBasicBlock, UnetrUpBlock
from monai.networks.layers import Conv
from scripts.networks.patchEmbed3D import PatchEmbedding
from torch import nn


class UNesT(nn.Module):
    def __init__(self, in_channels=1, out_channels=13, channels=8, patch_size=4):
        super().__init__()
        self.embedding = PatchEmbedding(patch_size, channels)
        self.levels = nn.ModuleList([TransformerBlock(channels, 16, 2) for _ in range(2)])
        self.encoder = UnetrBasicBlock(3, in_channels, channels, 3, 1, 'instance', True)
        self.decoder = UnetrUpBlock(3, channels, channels, 3, patch_size, 'instance', True)
        self.out = Conv['conv', 3](channels, out_channels, 1)

    def forward(self, x):
        deep = self.embedding(x)
        tokens = deep.flatten(2).transpose(1, 2)
        for level in self.levels:
            tokens = level(tokens)
        deep = tokens.transpose(1, 2).reshape(deep.shape)
        return self.out(self.decoder(deep, self.encoder(x)))
""",
}


def renal_structures() -> dict[str, Json]:
    load, channel, orient = LOAD
    loader = {
        "_target_": "CheckpointLoader", "load_path": "$@bundle_root + '/models/model.pt'",
        "load_dict": {"model": "@network"}, "strict": "True",
    }  # fmt: skip
    return _workflow(
        network_def={"_target_": "scripts.networks.unest.UNesT", "in_channels": 1, "out_channels": 4},
        before=[
            load, channel | {"channel_dim": "no_channel"}, orient, _spacing(1.0, 1.0, 1.0), _range(-175, 250),
            _image("EnsureTyped"),
        ],
        handlers=[loader, {"_target_": "StatsHandler", "iteration_log": False}],
        checkpointloader=None,
    )  # fmt: skip


_VISTA_SCRIPTS = {
    "__init__.py": "from . import inferer\n",
    "inferer.py": """
import copy

from monai.inferers import Inferer, SlidingWindowInfererAdapt


class Vista3dInferer(Inferer):
    def __init__(self, roi_size, overlap, use_point_window=False, sw_batch_size=1):
        self.roi_size, self.overlap, self.sw_batch_size = roi_size, overlap, sw_batch_size

    def __call__(self, inputs, network, point_coords, point_labels, class_vector):
        windows = SlidingWindowInfererAdapt(roi_size=self.roi_size, sw_batch_size=self.sw_batch_size, with_coord=True)
        return windows(
            inputs, network, transpose=True, point_coords=point_coords, point_labels=point_labels,
            class_vector=class_vector, prompt_class=copy.deepcopy(class_vector),
        )
""",
}  # fmt: skip


def vista3d() -> dict[str, Json]:
    load, channel, orient = LOAD
    mark = {"_target_": "monai.apps.vista3d.transforms.VistaPostTransformd", "keys": "pred"}
    prompts = _image("monai.apps.vista3d.transforms.VistaPreTransformd", subclass="@subclass", labels_dict="@names")
    crop = _image("CropForegroundd", allow_smaller=True, margin=10, source_key="@image_key")
    invert = INVERT | {"nearest_interp": True, "transform": "$copy.deepcopy(@preprocessing)"}
    found = _workflow(
        before=[],
        after=[mark, invert, _answer("Lambdad", func="$lambda x: torch.nan_to_num(x, nan=255)"), SAVE],
        input_dict="${'image': '/data/spleen_10.nii.gz', 'label_prompt': [3]}",
        everything_labels="$list(set([i+1 for i in range(12)]) - set([2, 4, 7, 9, 10]))",
        metadata_path="$@bundle_root + '/configs/metadata.json'",
        metadata="$json.loads(pathlib.Path(@metadata_path).read_text())",
        names="$@metadata['network_data_format']['outputs']['pred']['channel_def']",
        subclass={"2": [14, 5], "20": "$list(range(28, 33))"},
        input_channels=1,
        network_def="$monai.networks.nets.vista3d132(in_channels=@input_channels, encoder_embed_dim=8)",
        transforms=[
            load, channel, _image("EnsureTyped", device="@device", track_meta=True), _spacing(1.5, 1.5, 1.5), crop,
            prompts, _range(-963.8247715525971, 1053.678477684517), orient,
            _image("CastToTyped", dtype="$torch.float32"),
        ],
        inferer={
            "_target_": "scripts.inferer.Vista3dInferer", "roi_size": [ROI] * 3, "overlap": 0.3, "sw_batch_size": 1,
            "use_point_window": True,
        },
    )  # fmt: skip
    found["imports"] += ["$import scripts", "$import copy", "$import json", "$import pathlib"]
    found["preprocessing"]["transforms"] = "$@transforms "
    found["dataset"]["data"] = "$[@input_dict]"
    prompts = {"user_prompt": True, "everything_labels": "@everything_labels"}
    found["evaluator"] |= {"_target_": "scripts.evaluator.Vista3dEvaluator", "hyper_kwargs": prompts}
    return found


_OWN_SCRIPTS = {
    "__init__.py": "",
    "shared.py": "LIMIT = 0.4\n",
    "transforms.py": """
import torch
from monai.transforms import MapTransform

from .shared import LIMIT


class Squashed(MapTransform):
    def __init__(self, keys, width, allow_missing_keys=False):
        super().__init__(keys, allow_missing_keys)
        self.width = width

    def __call__(self, data):
        return {**data, **{key: torch.tanh(data[key] / self.width) for key in self.keys}}


class Doubtfuld(MapTransform):
    def __call__(self, data):
        pred = data["pred"]
        return {**data, "pred": torch.where(pred.amax(0, keepdim=True) < LIMIT, torch.zeros_like(pred), pred)}
""",
    "inferer.py": """
from monai.inferers import SlidingWindowInferer


class Mirrored(SlidingWindowInferer):
    def __call__(self, inputs, network, *args, **kwargs):
        plain = super().__call__(inputs, network, *args, **kwargs)
        return (plain + super().__call__(inputs.flip(2), network, *args, **kwargs).flip(2)) / 2
""",
    "evaluator.py": """
from monai.engines import SupervisedEvaluator
from monai.utils import CommonKeys


class Louder(SupervisedEvaluator):
    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def _iteration(self, engine, batchdata):
        batchdata[CommonKeys.IMAGE] = batchdata[CommonKeys.IMAGE] * self.factor
        return super()._iteration(engine, batchdata)
""",
}


def own_transforms() -> dict[str, Json]:
    found = spleen_ct()
    found["preprocessing"]["transforms"] = [
        *LOAD, _image("scripts.transforms.Squashed", width=200.0), _spacing(1.5, 1.5, 2.0),
        _image("GaussianSmoothd", sigma=0.5), _image("Lambdad", func="$lambda x: torch.exp(-x ** 2)"),
    ]  # fmt: skip
    return found


def own_postprocessing() -> dict[str, Json]:
    found = spleen_ct()
    doubt = _answer("scripts.transforms.Doubtfuld")
    found["postprocessing"]["transforms"] = [SOFTMAX, INVERT, doubt, _answer("AsDiscreted", argmax=True), SAVE]
    return found


def own_inferer() -> dict[str, Json]:
    found = spleen_ct()
    found["inferer"] = WINDOWS | {"_target_": "scripts.inferer.Mirrored"}
    return found


def own_evaluator() -> dict[str, Json]:
    found = spleen_ct()
    found["evaluator"] |= {"_target_": "scripts.evaluator.Louder", "factor": 1.5, "amp": False}
    found["dataloader"] = {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 2}
    return found


@dataclass(frozen=True)
class ZooBundle:
    """A configuration of a bundle of the zoo.

    Attributes:
        folder: The bundle's name.
        file: The configuration's.
        make: Its content.
        weights: The checkpoint that it loads.
        channels: Of the network's answer.
        spacing_mm: Of the network's input.
        roi: Voxels of a window along each axis.
        scripts: Its own code.
        classes: The class prompts of VISTA-3D; `channels` then counts what metadata.json names.
    """

    folder: str
    file: str
    make: Callable[[], dict[str, Json]]
    weights: str
    channels: int
    spacing_mm: tuple[float, float, float]
    roi: int = ROI
    scripts: Mapping[str, str] | None = None
    classes: tuple[int, ...] = ()


_CHEST_MM = (1.5, 1.5, 2.0)
OWN_CODE = tuple(
    ZooBundle(make.__name__, "inference.json", make, "model.pt", 2, _CHEST_MM, scripts=_OWN_SCRIPTS)
    for make in (own_transforms, own_postprocessing, own_inferer, own_evaluator)
)
_ABDOMEN, _CHEST = (1.5, 1.5, 3.0), (1.5, 1.5, 2.0)
_PEDIATRIC = "pediatric_abdominal_ct"
ZOO = (
    ZooBundle("spleen_ct", "inference.json", spleen_ct, "model.pt", 2, _CHEST),
    ZooBundle("swin_unetr_btcv", "inference.json", swin_unetr_btcv, "model.pt", 14, _CHEST, 64),
    ZooBundle("wholeBody_ct", "inference.json", whole_body_ct, "model.pt", 105, (1.5, 1.5, 1.5)),
    ZooBundle(
        "wholeBody_ct", "inference_lowres.json", whole_body_ct_coarse, "model_lowres.pt", 105, (3.0, 3.0, 3.0)
    ),
    ZooBundle("multi_organ", "inference.yaml", multi_organ, "model.pt", 8, (1.0, 1.0, 1.0)),
    ZooBundle("pancreas_ct_dints", "inference.yaml", pancreas_dints, "model.pt", 3, (1.0, 1.0, 1.0)),
    ZooBundle(_PEDIATRIC, "inference.yaml", pediatric_dynunet, "dynunet_FT.pt", 4, _ABDOMEN),
    ZooBundle(_PEDIATRIC, "inference_segresnet.yaml", pediatric_segresnet, "segresnet_FT.pt", 4, _ABDOMEN),
    ZooBundle(_PEDIATRIC, "inference_swinunetr.yaml", pediatric_swinunetr, "swinunetr_FT.pt", 4, _ABDOMEN, 64),
    ZooBundle(
        "renalStructures_UNEST", "inference.json", renal_structures, "model.pt", 4, (1.0, 1.0, 1.0),
        scripts=_UNEST_SCRIPTS,
    ),
    ZooBundle(
        "vista3d", "inference.json", vista3d, "model.pt", 14, (1.5, 1.5, 1.5),
        scripts=_VISTA_SCRIPTS, classes=(1, 3, 5, 6, 8, 11, 12),
    ),
)  # fmt: skip


def metadata_of(channels: int, key: str = "channel_def") -> dict[str, Json]:
    names = {str(channel): f"structure {channel}" if channel else "background" for channel in range(channels)}
    return {"version": "0.5.9", "name": "Zoo", "network_data_format": {"outputs": {"pred": {key: names}}}}


def written_bundle(folder: Path, bundle: ZooBundle) -> Path:
    """Write a bundle without its weights."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    document = {key: value for key, value in bundle.make().items() if value is not None}
    is_yaml = bundle.file.endswith(".yaml")
    text = yaml.safe_dump(document, sort_keys=False) if is_yaml else json.dumps(document, indent=2)
    (folder / "configs" / bundle.file).write_text(text)
    key = "label_def" if "pediatric" in bundle.folder else "channel_def"
    (folder / "configs" / "metadata.json").write_text(json.dumps(metadata_of(bundle.channels, key)))
    for name, code in (bundle.scripts or {}).items():
        (folder / "scripts" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "scripts" / name).write_text(code)
    if "search_code" in text:
        torch.save(_architecture(), folder / "models" / "search_code_18590.pt")
    return folder


def random_weights(network: torch.nn.Module, *, gain: float = 3.0) -> dict[str, torch.Tensor]:
    """Weights of which no class wins everywhere."""
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for key, value in network.state_dict().items():
        weights[key] = value
        if value.is_floating_point() and value.ndim > 1:
            weights[key] = value * (1 + torch.randn(value.shape, generator=generator)) * gain**0.5
    return weights
