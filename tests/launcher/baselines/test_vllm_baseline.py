"""What vLLM is asked for, on a stand-in of its Python interface; it runs on cards only."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.baselines import vllm
from launcher.config.hardware import LimitsConfig, PeerAccess
from tests.launcher.jobs import make_job, make_run

CARD_BYTES = 96 * 2**30


class Interface(ModuleType):
    """Takes the arguments that vllm 0.33 has, keeps them, and answers with tokens."""

    def __init__(self) -> None:
        super().__init__("vllm")
        self.asked: dict[str, Any] = {}
        self.variables: dict[str, str] = {}

    def LLM(self, *, model: str, skip_tokenizer_init: bool, dtype: str, tensor_parallel_size: int, **asked: Any) -> Any:
        self.asked = asked | {"model": model, "dtype": dtype, "tensor_parallel_size": tensor_parallel_size}
        self.variables = dict(os.environ)
        return SimpleNamespace(generate=self.generate)

    def SamplingParams(self, *, temperature: float, max_tokens: int, ignore_eos: bool, detokenize: bool) -> int:
        assert temperature == 0 and ignore_eos and not detokenize
        return max_tokens

    def generate(self, prompts: list[dict[str, list[int]]], params: int, *, use_tqdm: bool) -> list[Any]:
        assert all(prompt["prompt_token_ids"] for prompt in prompts)
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1] * params)]) for _ in prompts]


@pytest.fixture
def interface(monkeypatch: pytest.MonkeyPatch) -> Interface:
    for name in (*vllm.RANK_VARIABLES, *vllm.PEER_VARIABLES):
        monkeypatch.setenv(name, "of this test")
    properties = SimpleNamespace(total_memory=CARD_BYTES)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    stand_in = Interface()
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    return stand_in


def open_with(folder: Path, limits: LimitsConfig) -> vllm.Baseline:
    run = make_run()
    run.limits = limits
    run.workload.prompt_tokens, run.workload.output_tokens, run.workload.batch_size = 20, 5, 3
    job = make_job(folder, cards=True, run=run)
    plan: Any = SimpleNamespace(dtype="bfloat16", placement=job.placement)
    return vllm.open_vllm(replace(job, plan=plan, model_folder="a/model"), torch.device("cuda"))


def test_it_gets_the_workload_and_all_cards(interface: Interface, tmp_path: Path) -> None:
    baseline = open_with(tmp_path, LimitsConfig())
    asked = {"model": "a/model", "dtype": "bfloat16", "tensor_parallel_size": 2, "max_model_len": 25, "max_num_seqs": 3}
    assert asked.items() <= interface.asked.items()
    assert not {"gpu_memory_utilization", "disable_custom_all_reduce"} & set(interface.asked)
    assert not set(vllm.RANK_VARIABLES) & set(interface.variables)
    times = baseline.answer([[1, 2], [3, 4]], 5)
    assert len(times) == 5


def test_it_keeps_to_the_limits_of_the_run(interface: Interface, tmp_path: Path) -> None:
    open_with(tmp_path, LimitsConfig(card_memory_gib=24, peer_access=PeerAccess.off))
    assert interface.asked["gpu_memory_utilization"] == 0.25
    # A card of that size has less than that to give.
    open_with(tmp_path, LimitsConfig(card_memory_gib=96, peer_access=PeerAccess.off))
    assert interface.asked["gpu_memory_utilization"] == 0.9
    assert interface.asked["disable_custom_all_reduce"] is True
    assert [interface.variables[name] for name in vllm.PEER_VARIABLES] == ["0", "0"]
