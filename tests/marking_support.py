"""A segmenter without a network: what it marks is the same box in every volume, so that writing is what is tested."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ctflow.core.model import Code, Model, ModelSpec, Segment
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Volume
from ctflow.engines.contract import EngineInfo
from ctflow.pipeline.segmentation import Segmentation
from ctflow.settings.run import Settings
from dicom_support import spec_of

DIGEST = "ab" * 32
INFO = EngineInfo("eager", "fp32", "cpu", (64, 64, 64), (1, 1), DIGEST, 1)
LUNG = Segment(1, "Lung", Code("123037004", "SCT", "Anatomical Structure"), Code("39607008", "SCT", "Lung"))


def marking_model(spec: ModelSpec | None = None) -> Model:
    return Model(spec or spec_of((LUNG,)), {}, DIGEST)


class MarkingSegmenter:
    """Stands in for `ctflow.pipeline.segmenter.Segmenter`."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.warnings = model, ()

    def open(self, progress: Progress = silent) -> None:
        pass

    def with_settings(self, _settings: Settings) -> MarkingSegmenter:
        return self

    def __enter__(self) -> MarkingSegmenter:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def segment(
        self, volume: Volume, progress: Progress = silent, meanwhile: Callable[[], None] = lambda: None
    ) -> tuple[Segmentation, dict[str, float]]:
        meanwhile()
        labels = np.zeros(volume.array.shape, np.uint8)
        labels[tuple(slice(size // 4, size // 2) for size in labels.shape)] = 1
        window = {"roi": [64, 64, 64], "overlap": 0.25, "blend": "gaussian", "batch_size": 1}
        return Segmentation(labels, INFO, window), {"segment": 0.0}


class OnlyModel:
    """Stands in for `ctflow.node.work.models.OpenModels`: one model, whose segmenter is open."""

    def __init__(self, model: Model, segmenter: object) -> None:
        self._model, self._segmenter = model, segmenter

    def facts(self, _choice: object, _settings: Settings) -> Model:
        return Model(self._model.spec, {}, self._model.weights_digest)

    def body_parts(self, _choice: object) -> tuple[str, ...]:
        return tuple(self._model.spec.body_parts)

    def segmenter(self, _choice: object, settings: Settings) -> object:
        return self._segmenter.with_settings(settings)

    def close_others(self, _choice: object) -> bool:
        return False
