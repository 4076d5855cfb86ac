"""A plugin of pytest for mutations: the tests that are likely to fail come first, so that most mutations end soon.

Those are the tests of the module that differs from the one in the folder `ORIGINAL`, and the exactness of whole models.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ORIGINAL = "PPGRAPH_ORIGINAL"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the tests; those of one kind stay in order."""
    original = Path(os.environ[ORIGINAL], "passes")
    modules = (config.rootpath / "passes").glob("*.py")
    changed = {module.stem for module in modules if module.read_bytes() != (original / module.name).read_bytes()}

    def rank(item: pytest.Item) -> int:
        tested = item.path.stem.removeprefix("test_")
        return 0 if tested in changed else 1 if tested == "exactness" else 2

    items.sort(key=rank)
