from __future__ import annotations

import pytest

from service_support import RawPeer, RunningScp


@pytest.fixture
def scp(tmp_path):
    """Makes receivers, and closes them."""
    made = []

    def make(**changes) -> RunningScp:
        made.append(RunningScp(tmp_path / f"data{len(made)}", **changes))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def raw():
    """Makes raw peers, and closes them."""
    made = []

    def make(port: int, **settings) -> RawPeer:
        made.append(RawPeer(port, **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()
