"""torch.compile compiles as often as requested, without warnings on which a user cannot act.

Read for torch 2.11 to 2.13: after 8 compilations of one function it continues without compiling, with only a warning.
The limit is a process-wide switch, in a module whose name begins with an underscore. torch 2.13 has an argument of
`torch.compile` for it (pull request 177936 of pytorch/pytorch).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def compiler_at_ease(compilations: int) -> Iterator[None]:
    """Allow `compilations` compilations of one function meanwhile, without warnings."""
    from torch._dynamo import config  # noqa: PLC0415  # seconds to import

    with (
        warnings.catch_warnings(),
        config.patch(recompile_limit=compilations, accumulated_recompile_limit=compilations),
    ):
        warnings.simplefilter("ignore")
        yield
