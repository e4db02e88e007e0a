"""What several test modules read and none changes."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A :class:`tiny_world.World`, built once: a few seconds, most of them for imports."""
    from tiny_world import build_world

    return build_world(tmp_path_factory.mktemp("world") / "d")
