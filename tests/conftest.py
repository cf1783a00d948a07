from __future__ import annotations

from hypothesis import settings

pytest_plugins = ["tests.memory_guard"]

# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
