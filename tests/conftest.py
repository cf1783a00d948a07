from __future__ import annotations

pytest_plugins = ["tests.memory_guard"]
