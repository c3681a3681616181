"""Folders that tests read from."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
FIXTURES = ROOT / "tests/fixtures"
GOLDEN = ROOT / "tests/golden"
