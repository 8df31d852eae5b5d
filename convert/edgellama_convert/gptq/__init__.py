"""Calibrated int4: GPTQ, layer by layer, with the errors of the layers in front fed back.

device.py    where it computes, and whether there is room
work.py      what is kept on disk, and how a killed conversion goes on
driver.py    the order of things: streams, layers, steps
arithmetic.py   what it computes with: the four below, or torch
layer.py     the forward pass in parts
parts.py     work divided among threads
solve.py     one matrix: factor, groups, refinements
kernels.py   one group, compiled
torch_arithmetic.py, torch_layer.py, torch_solve.py   the same in torch, imported for its devices alone
"""

from .arithmetic import identity_of
from .device import check_disk, check_memory, check_name, choose_device
from .driver import CalibratedLayers, memory_needed
from .work import WorkFolder, work_folder_of

__all__ = [
    "CalibratedLayers",
    "WorkFolder",
    "check_disk",
    "check_memory",
    "check_name",
    "choose_device",
    "identity_of",
    "memory_needed",
    "work_folder_of",
]
