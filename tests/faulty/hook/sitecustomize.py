"""Python imports this first in processes of a launch with ``INJECTED_FAULTS``: once a rank has
imported its main module, that uses the faulty classes of ``tests.faulty.transfers``.
"""

import importlib.abc
import importlib.util
import json
import os
import sys
from functools import partial


class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "pdlaunch.engine.rank":
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
            module.OffloadWorker = partial(transfers.FaultyOffloadWorker, plan)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Hook())
