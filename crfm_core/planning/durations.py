"""Durations in words."""

from __future__ import annotations


def hours(seconds: float) -> str:
    """Hours with two digits that matter: ``0.24``, ``3.1``, ``120``."""
    value = seconds / 3600
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 0.995 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """``9.5 s``, ``40 s``, ``7 min``, ``2 h 05 min``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
