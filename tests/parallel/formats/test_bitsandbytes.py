"""What transformers and bitsandbytes themselves make of the demo model in NF4, read on one and two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, get_4bit_type
from bitsandbytes.nn import Linear4bit
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from launcher.models.shape import shape_from_checkpoint
from parallel.communicator import Communicator
from parallel.formats.nf4 import nf4_codebook
from tests.parallel.ranks import load
from tests.parallel.small_models import DEMO
from tools.checkpoint.quantization import WRITERS
from tools.local_ranks import run_on_ranks

LEFT_ALONE = "model.layers.1.mlp.down_proj"
IDS = torch.arange(3, 51).view(2, 24)


@pytest.fixture(scope="module", params=[True, False], ids=["nested", "simple"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder that transformers wrote, and the logits of its weights as bitsandbytes dequantises them.

    Its own products are in less than float32.
    """
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param,
        llm_int8_skip_modules=["lm_head", LEFT_ALONE],
    )
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, quantization_config=config)
    folder = tmp_path_factory.mktemp("bitsandbytes")
    model.save_pretrained(folder)
    plain = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.float()
    with torch.inference_mode():
        return folder, plain(IDS).logits


def local_logits(communicator: Communicator, folder: Path) -> Tensor:
    """Of this rank's part of the vocabulary."""
    with torch.inference_mode():
        return load(communicator, folder)(IDS).logits


@pytest.mark.parametrize("world_size", [1, 2])
def test_logits_are_those_that_bitsandbytes_gives(saved: tuple[Path, Tensor], world_size: int) -> None:
    folder, expected = saved
    assert expected.std() > 1
    logits = torch.cat(run_on_ranks(local_logits, world_size, folder), dim=-1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_plan_can_read_it(saved: tuple[Path, Tensor]) -> None:
    shape = shape_from_checkpoint(saved[0])
    assert (shape.quantization, shape.not_loadable) == ("bitsandbytes", "")
    assert shape.scheme is not None and shape.scheme.layout == "nf4"
    # One linear of 35 is left as it is, in float32.
    assert 4 < shape.linear_bits < 6


def test_codebook_is_that_of_bitsandbytes() -> None:
    torch.testing.assert_close(nf4_codebook(), get_4bit_type("nf4", device="cpu"), rtol=0, atol=1e-6)


def test_what_our_tool_writes_is_read_by_bitsandbytes() -> None:
    writer = WRITERS["nf4"]
    weight = torch.randn(40, 448, generator=torch.Generator().manual_seed(1))
    stored = writer.stored(weight)
    state = QuantState.from_dict(
        {name.removeprefix("weight."): tensor for name, tensor in stored.items() if name != "weight"},
        torch.device("cpu"),
    )
    back = dequantize_4bit(stored["weight"], state).float()
    absmax = weight.unflatten(1, (-1, 64)).abs().amax(dim=2).repeat_interleave(64, dim=1)
    # In bf16, which the state says.
    assert bool(((back - weight).abs() <= 0.17 * absmax).all())
    assert 0.05 < float((back - weight).std()) < 0.12
