"""Calibrated int4: GPTQ, layer by layer, with the errors of the layers in front fed back.

work.py      what is kept on disk, and how a killed conversion goes on
driver.py    the order of things: streams, layers, steps
layer.py     the forward pass in parts
parts.py     work divided among threads
solve.py     one matrix: factor, groups, refinements
kernels.py   one group, compiled
"""

from .driver import CalibratedLayers, memory_needed
from .work import WorkFolder

__all__ = ["CalibratedLayers", "WorkFolder", "memory_needed"]
