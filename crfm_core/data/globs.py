"""Files below a folder that match a glob, named by what its folder wildcards stand for."""

from __future__ import annotations

import glob
import re
from fnmatch import fnmatch
from pathlib import Path

from crfm_core import DataError


def files_by_key(
    root: Path, pattern: str, suffix: str = "", by_stem: bool = False, skip: set[Path] | None = None, exclude: list[str] | None = None
) -> dict[tuple[str, ...], Path]:
    """Files below ``root`` that match a glob, by what its folder wildcards stand for and their stem without ``suffix``.

    Raises DataError when two files have one key, or the glob leads outside ``root``.
    """
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise DataError(f"the glob {pattern} leads outside {root}; give one below the root, or another root")
    if Path(pattern).name == "**":
        pattern += "/*"
    found: dict[tuple[str, ...], Path] = {}
    for relative in sorted(glob.glob(pattern, root_dir=root, recursive=True)):
        path = root / relative
        if path in (skip or ()) or not path.is_file() or not path.stem.endswith(suffix):
            continue
        if any(fnmatch(Path(relative).as_posix(), unwanted) for unwanted in exclude or []):
            continue
        parts: tuple[str | None, ...] = ()
        if not by_stem:
            match = folder_pattern(pattern).fullmatch(str(Path(relative).parent))
            assert match, f"the glob {pattern} matches {relative}"
            parts = match.groups()
        key = (*(part.replace("/", "-") for part in parts if part and part != "."), path.stem.removesuffix(suffix))
        if key in found:
            raise DataError(f"{found[key]} and {path} both belong to scene {'-'.join(key)}; narrow the glob {pattern}")
        found[key] = path
    return found


def folder_pattern(pattern: str) -> re.Pattern:
    """The folder part of a glob as a regular expression with one group per wildcard."""

    def piece(part: str) -> str:
        if part.startswith("["):
            return f"({part.replace('[!', '[^')})"
        return {"**": "(.*)", "**/": "((?:.*/)?)", "/**": "(?:/(.*))?", "*": "([^/]*)", "?": "([^/])"}.get(part) or re.escape(part)

    return re.compile("".join(map(piece, re.split(r"(/\*\*$|\*\*/?|\*|\?|\[[^]]+\])", str(Path(pattern).parent)))))
