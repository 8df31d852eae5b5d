"""edgellama_convert: Hugging Face checkpoints to `.edgellama` files, and back.

>>> convert("meta-llama/Llama-2-7b-hf", "llama-2-7b.edgellama").bits_per_weight
>>> export_hf("llama-2-7b.edgellama", "llama-2-7b-dequantized")
"""

from .conversion import convert
from .export import export_hf
from .report import ConvertReport, ExportReport

__all__ = ["ConvertReport", "ExportReport", "convert", "export_hf"]
