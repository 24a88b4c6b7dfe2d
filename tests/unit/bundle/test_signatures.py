"""ctflow's table of MONAI's arguments against the installed MONAI."""

from __future__ import annotations

import enum
import importlib
import inspect

import monai.networks.nets
import numpy as np
import pytest

from ctflow.bundle.config.signatures import (
    COMPOSE,
    ENSEMBLE_EVALUATOR,
    EVALUATOR,
    HELD,
    INFERER,
    POST,
    REQUIRED,
    SIMPLE_INFERER,
    SLICE_INFERER,
    STEPS,
    VISTA_NETWORK,
)

INFERERS = {"SlidingWindowInferer": INFERER, "SimpleInferer": SIMPLE_INFERER, "SliceInferer": SLICE_INFERER}
EVALUATORS = {"SupervisedEvaluator": EVALUATOR, "EnsembleEvaluator": ENSEMBLE_EVALUATOR}
CLASSES = {"Compose": COMPOSE, **EVALUATORS, **INFERERS, **STEPS, **HELD, **POST}
# Functions and classes stand in the defaults of MONAI; ctflow's table says what leaving the argument out means.
FUNCTIONS = {("CropForegroundd", "select_fn"), ("Lambdad", "inv_func")}
FUNCTIONS |= {(evaluator, "prepare_batch") for evaluator in EVALUATORS}


def parameters(name, signature):
    found = getattr(importlib.import_module(signature.module), name)
    assert found.__module__ == signature.module
    # A class without a constructor of its own has its parent's.
    return dict(list(inspect.signature(found.__init__).parameters.items())[1:])


def plain(default):
    if default is inspect.Parameter.empty:
        return REQUIRED
    if isinstance(default, enum.Enum):
        return default.value
    return np.dtype(default).name if isinstance(default, type) else default


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_argument_that_monai_has_is_in_the_table_with_monais_default(name):
    signature = CLASSES[name]
    found = parameters(name, signature)
    named = {key: p for key, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    assert signature.arguments - signature.more == set(named)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in found.values())
    assert open_ended or not signature.more
    ours = {**signature.read, **{key: values[0] for key, values in signature.only.items()}}
    ours = {key: value for key, value in ours.items() if key not in signature.more}
    for key, default in ours.items():
        if (name, key) not in FUNCTIONS:
            assert plain(named[key].default) == default, key
    assert signature.per_key <= signature.arguments
    assert not set(signature.read) & set(signature.only)
    assert not {*signature.read, *signature.only} & signature.held


def test_the_arguments_of_vista3d_are_monais():
    found = inspect.signature(monai.networks.nets.vista3d132).parameters
    ours = {**VISTA_NETWORK.read, **{key: values[0] for key, values in VISTA_NETWORK.only.items()}}
    assert ours == {key: each.default for key, each in found.items()}
    assert monai.networks.nets.vista3d132.__module__ == VISTA_NETWORK.module


@pytest.mark.parametrize("name", sorted(name for name in {**STEPS, **HELD, **POST} if not name.startswith("Vista")))
def test_monai_has_each_transform_under_three_names(name):
    import monai.transforms  # noqa: PLC0415

    module = importlib.import_module(CLASSES[name].module)
    for other in (f"{name[:-1]}D", f"{name[:-1]}Dict"):
        assert getattr(module, other) is getattr(monai.transforms, other) is getattr(module, name)


def test_lists_with_a_value_a_key_are_those_that_monai_repeats_for_its_keys():
    for name, signature in {**STEPS, **HELD, **POST}.items():
        found = getattr(importlib.import_module(signature.module), name)
        bases = [base for base in found.__mro__ if base.__module__ == found.__module__ and "__init__" in vars(base)]
        source = "".join(inspect.getsource(base.__init__) for base in bases)  # the pads hand their mode on
        repeated = {key for key in signature.arguments if f"ensure_tuple_rep({key}, len(self.keys))" in source}
        # "meta_keys" is not repeated: one for each key, or none.
        assert repeated - signature.held - {"meta_keys"} == signature.per_key - {"meta_keys"}, name
