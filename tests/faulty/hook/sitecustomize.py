"""Python imports this first in processes of a launch with ``INJECTED_FAULTS``: once a rank, or a
worker of vLLM, has imported its main module, that uses the faulty classes of ``tests.faulty``.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
from functools import partial


class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in ("pdlaunch.engine.rank", "pdlaunch.vllm.worker"):
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            from tests.faulty import transfers

            plan = transfers.FaultPlan(**json.loads(os.environ["INJECTED_FAULTS"]))
            new_connector = module.new_connector
            module.new_connector = lambda *setup: transfers.FaultyConnector(
                new_connector(*setup), plan
            )
            module.TransferThread = partial(transfers.FaultyTransferThread, plan)
            if name == "pdlaunch.engine.rank":  # vLLM has no packages for the host tier
                from tests.faulty.offload import FaultyOffloadWorker, FaultyRunner

                module.OffloadWorker = partial(FaultyOffloadWorker, plan)
                module.ModelRunner = partial(FaultyRunner, plan)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Hook())
