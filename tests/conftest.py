"""Fixtures of servers live in tests/fixtures_*.py, one file a kind of server."""

from pathlib import Path

pytest_plugins = [f"tests.{path.stem}" for path in sorted(Path(__file__).parent.glob("fixtures_*.py"))]
