"""Runs any module as a process that ends with its parent: ``python -m
pdlaunch.protocol.process.guarded MODULE ...``. Standard input is a pipe that the parent holds.
"""

import runpy
import sys

from pdlaunch.protocol.process.bootstrap import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
