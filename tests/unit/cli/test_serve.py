from __future__ import annotations

import os
import signal

import pytest

from ctflow.cli import serve
from ctflow.node import node


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_node_is_built_is_a_stop_like_any_other(tmp_path, monkeypatch, sent):
    monkeypatch.setattr(serve, "check_requirements", lambda _: os.kill(os.getpid(), sent))
    monkeypatch.setattr(serve, "set_up_node_log", lambda _: None)
    monkeypatch.setattr(serve, "close_node_log", lambda _: None)
    monkeypatch.setattr(node, "run_node", lambda *_: pytest.fail("the node was built"))
    before = signal.getsignal(sent)
    assert serve.serve_command(None, {}, {"HOME": str(tmp_path)}) == 0
    assert signal.getsignal(sent) is before
