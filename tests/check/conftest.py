"""A command of ours that ``slime-fipo check`` has nothing to say about."""

from __future__ import annotations

import pytest

from .commands import QWEN3_4B, command_of, messages, provide_files


@pytest.fixture
def sane(tmp_path) -> list[str]:
    words = command_of(QWEN3_4B, tmp_path)
    provide_files(words)
    assert messages(words) == []
    return words
