"""Where windows of one size lie along a side: tiles of a scene, and windows over an image that is looked at or drawn in parts."""

from __future__ import annotations


def window_offsets(length: int, size: int, stride: int, edge: str = "shift") -> list[int]:
    """Offsets of windows of ``size`` along a side of ``length``, all in pixels: every ``stride`` (>= 1), and at the end

    ``shift``: the last window moves back so that it ends with the side;
    ``spread``: all windows move back by even amounts so that the last one ends with the side;
    ``pad``: the last window reaches beyond the side where it has to;
    ``drop``: only windows that fit.

    A side shorter than a window has one with ``pad`` and otherwise none: callers that want one pass ``min(size, length)``.
    """
    rest = length - size
    if edge == "pad":
        return [index * stride for index in range(max(0, -(-rest // stride)) + 1)]
    if rest < 0:
        return []
    if edge == "spread":
        steps = -(-rest // stride)
        return [round(index * rest / max(1, steps)) for index in range(steps + 1)]
    return [*range(0, rest, stride), rest] if edge == "shift" else [*range(0, rest + 1, stride)]
