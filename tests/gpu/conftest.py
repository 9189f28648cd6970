"""The same tests on a GPU, or on the CPU in Triton's interpreter where there is none.

The interpreter is slow: one tiny decode step takes about a second.
"""

import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vesicle.gpu import GpuEngine


@pytest.fixture(scope="session")
def device() -> torch.device:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: pip install 'vesicle[gpu]'")
    if torch.cuda.is_available():
        return torch.device("cuda")
    # Triton reads this once, when it is imported, and transformers has imported it by now. Nothing
    # else uses Triton on a machine without a GPU, so it is imported again.
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        for name in [n for n in sys.modules if n.partition(".")[0] == "triton" and "_C" not in n]:
            del sys.modules[name]
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny_llama(**settings: Any) -> Any:
    """A random Llama of 2 layers with biases, whose sizes are no powers of two."""
    config = LlamaConfig(
        **{
            "hidden_size": 72,
            "intermediate_size": 88,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "vocab_size": 97,
            "max_position_embeddings": 256,
            "attention_bias": True,
            "mlp_bias": True,
            **settings,
        }
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data.normal_(1 if "norm" in name else 0, 0.2)
    return model


@pytest.fixture(scope="session")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="session")
def engine(llama: Any, device: torch.device) -> GpuEngine:
    return GpuEngine.from_model(llama, weight_format="fp32", device=device, max_tokens=2048)
