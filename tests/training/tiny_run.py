"""A training run small enough to repeat, on a random Llama; also a program, to be killed."""

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from vesicle.families import find_family
from vesicle.modulator import Modulator
from vesicle.training.trainer import TrainConfig, TrainResult, train

LENGTH = 48


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def tiny_modulator(model: LlamaForCausalLM, predictor: str = "linear") -> Modulator:
    torch.manual_seed(1)
    shape = find_family(model.config).decoder_config(model.config).shape
    modulator = Modulator.new(
        shape, model_name="tiny", predictor=predictor, hidden=4, ffn_rank=4, attention_rank=4
    )
    torch.manual_seed(4)
    for standin in (modulator.ffn_standin, modulator.attention_standin):
        for parameter in standin.parameters():
            parameter.data.normal_(std=0.1)
    return modulator


def tiny_windows(n: int = 7, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 257, (n, LENGTH), generator=generator)


CONFIG = TrainConfig(
    steps=16,
    sequence_length=LENGTH,
    accumulation=2,
    warm_up=4,
    checkpoint_every=4,
    eval_every=3,
    eval_windows=2,
)


def run(
    out: Path, config: TrainConfig = CONFIG, predictor: str = "linear", restart: bool = False
) -> TrainResult:
    model = tiny_model()
    return train(
        model,
        tiny_modulator(model, predictor),
        tiny_windows(),
        tiny_windows(3, seed=3),
        config,
        out,
        restart=restart,
        tensorboard=False,
        progress=False,
        say=lambda line: print(line, flush=True),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]))
