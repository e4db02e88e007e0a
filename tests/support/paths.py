"""Where the tests find what is not theirs alone; the one module of the tests that counts path parts."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SUPPORT = TESTS / "support"
CONFIGS = SUPPORT / "configs"
GOLDEN = TESTS / "golden"

#: Beside the checkout, in no clone of it: tests that read it skip without it.
SHARED = ROOT.parent / "shared"
