"""What engines are compared on is drawn once, not in every test."""

from __future__ import annotations

import pytest

from ctflow.export import measure


@pytest.fixture(scope="session", autouse=True)
def _drawn_once():
    """A phantom takes seconds; `ctflow.export.measure` gets the same windows of it for the same model and size."""
    draw, drawn = measure.example_windows, {}

    def once(model, *arguments, **named):
        key = (model.weights_digest, repr(model.spec), arguments, tuple(sorted(named.items())))
        if key not in drawn:
            drawn[key] = draw(model, *arguments, **named)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "example_windows", once)
        yield
