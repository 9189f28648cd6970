"""How each kind of contender runs, behind one interface; libraries are imported when one starts."""

from __future__ import annotations

from vesicle.bench.contenders import HUGGING_FACE, LLAMA_CPP, ONNX, OPENVINO, Contender
from vesicle.bench.runners.base import Runner

__all__ = ["Runner", "load"]


def load(contender: Contender) -> Runner:
    """Import what a contender needs; its `load` then reads the weights."""
    if contender.runner == HUGGING_FACE:
        from vesicle.bench.runners.huggingface import HuggingFaceRunner

        return HuggingFaceRunner(contender)
    if contender.runner == LLAMA_CPP:
        from vesicle.bench.runners.llamacpp import load_where_it_runs

        return load_where_it_runs(contender)
    if contender.runner == OPENVINO:
        from vesicle.bench.runners.openvino import OpenVinoRunner

        return OpenVinoRunner(contender)
    if contender.runner == ONNX:
        from vesicle.bench.runners.onnx import OnnxRunner

        return OnnxRunner(contender)
    from vesicle.bench.runners.engine import EngineRunner

    return EngineRunner(contender)
