"""The loader: each rank reads its slices and nothing else, and says what is wrong with a checkpoint."""

import math
import shutil
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from parallel.checkpoint.headers import read_checkpoint
from parallel.checkpoint.load import LoadResult, load_checkpoint, place
from parallel.checkpoint.read import is_finite
from parallel.communicator import Communicator
from parallel.formats.scheme import CheckpointError
from tests.parallel.checkpoint.test_headers import write_index
from tests.parallel.quantized_models import write_pair
from tests.parallel.ranks import CPU, build, run_on_ranks

UP_PROJ = "model.layers.1.mlp.up_proj.weight"
DOWN_PROJ = "model.layers.1.mlp.down_proj.weight"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

Tensors = dict[str, Tensor]


def write_two_files(
    source: Path,
    folder: Path,
    change: Callable[[Tensors], object] = lambda tensors: None,
    in_second: str = ".layers.1.",
) -> Path:
    """The checkpoint in `source`, changed, with what has `in_second` in its name in the second of two files."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    files = {name: SECOND if in_second in name else FIRST for name in tensors}
    for file in (FIRST, SECOND):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    write_index(folder, files)
    return folder


def load_values(
    communicator: Communicator, folders: Iterable[Path], dtype: torch.dtype = torch.float32
) -> list[tuple[Tensors, LoadResult] | str]:
    """For each folder this rank's parameters and what they cost, or why they could not be loaded."""
    outcomes: list[tuple[Tensors, LoadResult] | str] = []
    for folder in folders:
        model = build(communicator, folder, dtype)
        try:
            result = load_checkpoint(model, read_checkpoint(folder), CPU)
            values = {name: p.data for name, p in model.module.named_parameters(remove_duplicate=False)}
            outcomes.append((values, result))
        except CheckpointError as error:
            outcomes.append(str(error))
    return outcomes


def refusal(folder: Path) -> str:
    outcome = run_on_ranks(load_values, 1, [folder])[0][0]
    assert isinstance(outcome, str), "it was loaded"
    return outcome


def join(shards: list[Tensor], whole: Tensor) -> Tensor:
    cut = [dim for dim in range(whole.dim()) if shards[0].shape[dim] != whole.shape[dim]]
    return torch.cat(shards, dim=cut[0]) if cut else shards[0]


@pytest.mark.parametrize("world_size", (1, 3))
@pytest.mark.parametrize(
    ("name", "stored", "asked"),
    [("demo", torch.bfloat16, torch.float32), ("llama", torch.float32, torch.bfloat16)],
)
def test_values_are_the_files_in_the_dtype_that_was_asked(
    folders: dict[str, Path], name: str, stored: torch.dtype, asked: torch.dtype, world_size: int
) -> None:
    whole = load_file(folders[name] / "model.safetensors")
    outcomes = [outcome[0] for outcome in run_on_ranks(load_values, world_size, [folders[name]], asked)]
    for key, value in whole.items():
        assert value.dtype == stored
        joined = join([values[key] for values, _ in outcomes], value)
        assert joined.dtype == asked
        assert torch.equal(joined, value.to(asked)), key
    element_bytes = torch.finfo(stored).bits // 8
    for values, result in outcomes:
        assert result.bytes_read == sum(value.numel() for value in values.values()) * element_bytes


def test_checkpoint_in_several_files_gives_the_same_values(folders: dict[str, Path], tmp_path: Path) -> None:
    two_files = write_two_files(folders["llama"], tmp_path / "two")
    for one, two in run_on_ranks(load_values, 2, [folders["llama"], two_files]):
        assert all(torch.equal(value, two[0][name]) for name, value in one[0].items())
        assert one[1].bytes_read == two[1].bytes_read


def placed(communicator: Communicator, folder: Path) -> list[str]:
    names: list[str] = []
    load_checkpoint(build(communicator, folder), read_checkpoint(folder), CPU, on_placed=names.append)
    return names


def test_embedding_comes_first_and_layers_are_whole_one_by_one(tmp_path: Path) -> None:
    """However dtypes, by which safetensors sorts a file, take them apart."""
    folder = write_pair("awq", tmp_path) / "quantized"
    stored = sorted(read_checkpoint(folder).tensors.items(), key=lambda item: item[1].offset)
    assert len(turns(name for name, _ in stored)) > len(set(turns(name for name, _ in stored)))
    names = run_on_ranks(placed, 1, folder)[0]
    assert names[0] == EMBEDDING
    layers = turns(names)
    assert len(layers) == len(set(layers)) > 2


def test_a_layer_in_two_files_is_loaded_in_one_go(folders: dict[str, Path], tmp_path: Path) -> None:
    """Though others come after it in its first file."""
    folder = write_two_files(folders["llama"], tmp_path / "two", in_second=".layers.0.mlp.")
    layers = turns(run_on_ranks(placed, 1, folder)[0])
    assert len(layers) == len(set(layers)) > 2


def turns(names: Iterable[str]) -> list[str]:
    """Layers, or what is in none, each as often as it begins anew."""
    return [layer for layer, _ in groupby(".".join(name.split(".")[:3]) for name in names)]


def storage_facts(communicator: Communicator, folder: Path) -> tuple[list[str], str]:
    model = build(communicator, folder)
    load_checkpoint(model, read_checkpoint(folder), CPU)
    parameters = model.module.named_parameters()
    oversized = [name for name, p in parameters if p.untyped_storage().nbytes() != p.nbytes or not p.is_contiguous()]
    return oversized, Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("world_size", (1, 2))
def test_weights_are_in_memory_of_their_own_and_the_file_is_let_go(folders: dict[str, Path], world_size: int) -> None:
    """Views of the mapped file would count the whole file as this rank's memory, and die with it."""
    for oversized, maps in run_on_ranks(storage_facts, world_size, folders["llama"]):
        assert oversized == []
        assert "model.safetensors" not in maps


@pytest.mark.parametrize("name", [UP_PROJ, NORM, HEAD])
def test_missing_tensor_is_named(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = write_two_files(folders["llama"], tmp_path / "broken", lambda tensors: tensors.pop(name))
    assert refusal(folder) == f"{folder} does not match its config.json: {name} is missing."


def test_extra_tensor_is_named_with_its_file(folders: dict[str, Path], tmp_path: Path) -> None:
    extra = "model.layers.1.mlp.up_proj.weight_scale"
    folder = write_two_files(folders["llama"], tmp_path / "broken", lambda t: t.update({extra: torch.ones(1)}))
    assert refusal(folder) == f"{folder} does not match its config.json: {extra} in {SECOND} is not part of the model."


@pytest.mark.parametrize("name", [UP_PROJ, DOWN_PROJ, Q_PROJ, NORM])
def test_wrong_shape_is_named_with_its_file_and_both_shapes(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    full: list[int] = []

    def cut(tensors: Tensors) -> None:
        full.extend(tensors[name].shape)
        tensors[name] = tensors[name][..., :-1].contiguous()

    folder = write_two_files(folders["llama"], tmp_path / "broken", cut)
    file = SECOND if ".layers.1." in name else FIRST
    stored = [*full[:-1], full[-1] - 1]
    problem = f"{name} in {file} is {stored}, config.json makes it {full}."
    assert refusal(folder) == f"{folder} does not match its config.json: {problem}"


def test_many_problems_are_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    def drop_layer(tensors: Tensors) -> None:
        for name in [name for name in tensors if ".layers.1." in name and "norm" not in name]:
            del tensors[name]

    message = refusal(write_two_files(folders["llama"], tmp_path / "broken", drop_layer))
    assert message.count("is missing") == 4
    assert message.endswith("; and 3 more.")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [UP_PROJ, DOWN_PROJ, NORM, EMBEDDING])
def test_weight_that_is_not_finite_is_named_with_its_file(
    folders: dict[str, Path], tmp_path: Path, name: str, value: float
) -> None:
    folder = write_two_files(
        folders["llama"], tmp_path / "broken", lambda tensors: tensors[name].view(-1)[-3:-2].fill_(value)
    )
    file = SECOND if ".layers.1." in name else FIRST
    assert refusal(folder).startswith(f"{name} in {folder / file} holds NaN or infinity.")


def test_only_the_rank_that_holds_the_broken_value_raises(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_two_files(
        folders["llama"], tmp_path / "broken", lambda tensors: tensors[DOWN_PROJ][0, -1].fill_(math.nan)
    )
    first, second = run_on_ranks(load_values, 2, [folder])
    assert not isinstance(first[0], str)
    assert DOWN_PROJ in second[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_check_sees_every_position(dtype: torch.dtype) -> None:
    values = torch.randn(3, 67, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(values)
    assert is_finite(values.new_empty(0, 5))
    for position in range(values.numel()):
        for broken in (math.nan, math.inf, -math.inf):
            copy = values.clone()
            copy.view(-1)[position] = broken
            assert not is_finite(copy), position


def test_tied_checkpoint_without_a_head_loads(folders: dict[str, Path]) -> None:
    assert HEAD not in read_checkpoint(folders["qwen2_tied"]).tensors
    for values, _ in (outcome[0] for outcome in run_on_ranks(load_values, 2, [folders["qwen2_tied"]])):
        assert torch.equal(values[HEAD], values[EMBEDDING])


def test_tied_checkpoint_with_a_head_reads_it_once(folders: dict[str, Path], tmp_path: Path) -> None:
    both = write_two_files(folders["qwen2_tied"], tmp_path / "both", lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    for without, with_head in run_on_ranks(load_values, 2, [folders["qwen2_tied"], both]):
        assert with_head[1].bytes_read == without[1].bytes_read
        assert all(torch.equal(value, with_head[0][name]) for name, value in without[0].items())


def test_tied_checkpoint_with_a_head_of_its_own_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    both = write_two_files(folders["qwen2_tied"], tmp_path / "both", lambda t: t.update({HEAD: t[EMBEDDING].flip(0)}))
    message = refusal(both)
    assert f"{HEAD} and {EMBEDDING} are one tensor by tie_word_embeddings, and differ" in message


def test_tied_checkpoint_with_only_a_head_loads(folders: dict[str, Path], tmp_path: Path) -> None:
    only_head = write_two_files(
        folders["qwen2_tied"], tmp_path / "head", lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)})
    )
    for without, with_head in run_on_ranks(load_values, 2, [folders["qwen2_tied"], only_head]):
        assert torch.equal(without[0][EMBEDDING], with_head[0][EMBEDDING])


def test_tied_checkpoint_without_head_and_embedding_names_both(folders: dict[str, Path], tmp_path: Path) -> None:
    message = refusal(write_two_files(folders["qwen2_tied"], tmp_path / "none", lambda tensors: tensors.pop(EMBEDDING)))
    assert f"{EMBEDDING} is missing" in message
    assert f"{HEAD} is missing" in message


def test_rotary_frequencies_of_old_checkpoints_are_ignored(folders: dict[str, Path], tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        for prefix in ("model.layers.0.self_attn", "model.layers.1.self_attn", "model"):
            tensors[f"{prefix}.rotary_emb.inv_freq"] = torch.full((6,), math.nan)

    old = write_two_files(folders["llama"], tmp_path / "old", add)
    new_outcome, old_outcome = run_on_ranks(load_values, 1, [folders["llama"], old])[0]
    assert new_outcome[0].keys() == old_outcome[0].keys()
    assert new_outcome[1].bytes_read == old_outcome[1].bytes_read


def test_values_beyond_float16_are_refused_where_the_model_is_float16() -> None:
    layer = torch.nn.Linear(2, 1, bias=False, device="meta", dtype=torch.float16)
    place([(layer, "weight")], torch.tensor([[1.0, 65504.0]]), "x.weight")
    with pytest.raises(CheckpointError, match=r"x\.weight holds values beyond float16.*model\.dtype=bfloat16"):
        place([(layer, "weight")], torch.tensor([[1.0, 1e5]]), "x.weight")
