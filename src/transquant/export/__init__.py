"""Networks for other runtimes: a module as an ONNX graph, with float or integer weights; ONNX files in and out.

`onnx` and `onnxscript` are optional (extra "onnx") and imported where they are used.
"""

from transquant.export.files import OnnxTensors, load_onnx, restored
from transquant.export.integers import ExportedWeight
from transquant.export.module import check_form, export_module

__all__ = ["ExportedWeight", "OnnxTensors", "check_form", "export_module", "load_onnx", "restored"]
