"""What the loader will read: the checkpoint's tensors for each parameter, checked against names and shapes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from parallel.checkpoint.headers import Checkpoint, TensorEntry
from parallel.formats.registry import format_of
from parallel.formats.scheme import (
    CheckpointError,
    Part,
    Scheme,
    inputs_problem,
    is_expected,
    stored_shape,
    viewed_shape,
)
from parallel.shard import ShardedModel

# Checkpoints of older transformers carry these; models compute them.
COMPUTED = ("rotary_emb.inv_freq",)
PLAIN_DTYPES = ("F16", "BF16", "F32")
# Of two tensors that should be alike, so much is compared: all of a large head would take as long as a load of it.
NUM_SAMPLES, SAMPLE_BYTES = 16, 16384

Owners = dict[str, list[tuple[nn.Module, str]]]


@dataclass(frozen=True)
class Matches:
    """`plain`: parameter -> its tensor. `quantized`: linear -> the tensors that stand for its weight, by part.

    `surplus_biases`: of quantised linears that have none in the model. AutoGPTQ writes such, all zero.
    """

    plain: dict[str, TensorEntry]
    quantized: dict[str, dict[str, TensorEntry]]
    surplus_biases: list[TensorEntry]


def match_tensors(model: ShardedModel, checkpoint: Checkpoint) -> Matches:
    """The tensors of each distinct parameter, checked against the shapes that the config promises.

    A linear is quantised where the checkpoint has tensors of the scheme for it: formats spell the exceptions in many
    ways, and the names cannot be wrong about what is there.

    Raises:
        CheckpointError: tensors are missing, too many, or of another shape or dtype; the message names them.
    """
    problems: list[str] = []
    quantized = match_quantized(model, checkpoint, problems)
    plain = match_plain(model, checkpoint, quantized, problems)
    problems += tied_problems(tied_names(model.module), checkpoint)
    known = {entry.name for entries in quantized.values() for entry in entries.values()} | set(model.full_shapes)
    unknown = [name for name in checkpoint.tensors if name not in known and not name.endswith(COMPUTED)]
    biases = [name for name in unknown if name.endswith(".bias") and name.removesuffix(".bias") in quantized]
    unknown = [name for name in unknown if name not in biases]
    problems += [f"{name} in {checkpoint.tensors[name].file.name} is not part of the model" for name in unknown]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise CheckpointError(f"{checkpoint.folder} does not match its config.json: {shown}.")
    return Matches(plain, quantized, [checkpoint.tensors[name] for name in biases])


def match_plain(
    model: ShardedModel, checkpoint: Checkpoint, quantized: dict[str, dict[str, TensorEntry]], problems: list[str]
) -> dict[str, TensorEntry]:
    tied = tied_names(model.module)
    wanted: dict[str, TensorEntry] = {}
    for name, shape in model.full_shapes.items():
        entry = checkpoint.tensors.get(name)
        if name.removesuffix(".weight") in quantized:
            continue
        if entry is None:
            if name not in tied or not any(twin in checkpoint.tensors for twin in tied[name]):
                problems.append(f"{name} is missing")
        elif entry.shape != shape:
            problems.append(f"{name} in {entry.file.name} is {list(entry.shape)}, config.json makes it {list(shape)}")
        elif entry.dtype not in PLAIN_DTYPES:
            problems.append(f"{name} in {entry.file.name} is {entry.dtype}, and nothing says how to read that")
        elif not any(twin in wanted for twin in tied.get(name, ())):
            wanted[name] = entry
    return wanted


def tied_problems(tied: dict[str, set[str]], checkpoint: Checkpoint) -> Iterator[str]:
    """Weights that config.json makes one and that the checkpoint has twice, each in its own way."""
    pairs = {tuple(sorted((name, twin))) for name, twins in tied.items() for twin in twins}
    for pair in sorted(pairs):
        first, second = (checkpoint.tensors.get(name) for name in pair)
        if first is not None and second is not None and samples(first) != samples(second):
            yield (
                f"{' and '.join(pair)} are one tensor by tie_word_embeddings, and differ in the weights. If the model "
                "has a head of its own, set tie_word_embeddings to false in config.json"
            )


def samples(entry: TensorEntry) -> tuple[str, int, list[bytes]]:
    """Type, size and bytes of a few places: enough to tell whether two tensors were ever one."""
    with entry.file.open("rb") as file:
        found = []
        for place in range(NUM_SAMPLES):
            file.seek(entry.offset + entry.num_bytes * place // NUM_SAMPLES)
            found.append(file.read(min(SAMPLE_BYTES, entry.num_bytes // NUM_SAMPLES)))
    return entry.dtype, entry.num_bytes, found


def match_quantized(
    model: ShardedModel, checkpoint: Checkpoint, problems: list[str]
) -> dict[str, dict[str, TensorEntry]]:
    """Linears that the checkpoint has in the model's scheme."""
    if model.scheme is None:
        return {}
    parts = format_of(model.scheme).parts(model.scheme)
    matches = {}
    for name in model.linears:
        linear = name.removesuffix(".weight")
        entries = {part.name: checkpoint.tensors[f"{linear}.{part.name}"]
                   for part in parts if f"{linear}.{part.name}" in checkpoint.tensors}  # fmt: skip
        # A lone weight is a linear that was left as it is.
        if set(entries) <= {"weight"} and name in checkpoint.tensors:
            continue
        num_out, num_in = model.full_shapes[name]
        problems += part_problems(parts, model.scheme, linear, entries, num_out, num_in)
        matches[linear] = viewed(parts, model.scheme, entries, num_out, num_in)
    if not matches:
        problems.append(f"no linear has the tensors of {model.scheme.method}, which quantization_config promises")
    return matches


def part_problems(
    parts: tuple[Part, ...], scheme: Scheme, linear: str, entries: dict[str, TensorEntry], num_out: int, num_in: int
) -> Iterator[str]:
    if inputs_problem(scheme, num_in):
        yield f"{linear}: {inputs_problem(scheme, num_in)}"
        return
    for part in parts:
        entry = entries.get(part.name)
        if entry is None:
            if part.required:
                yield f"{linear}.{part.name} is missing"
            continue
        where = f"{entry.name} in {entry.file.name} is"
        if not is_expected(part, entry.shape, scheme, num_out, num_in):
            wanted = list(stored_shape(part, scheme, num_out, num_in)) if part.axes else "one number"
            yield f"{where} {list(entry.shape)}, config.json makes it {wanted}"
        elif entry.dtype not in part.dtypes:
            yield f"{where} {entry.dtype}, and must be {' or '.join(part.dtypes)}"


def viewed(
    parts: tuple[Part, ...], scheme: Scheme, entries: dict[str, TensorEntry], num_out: int, num_in: int
) -> dict[str, TensorEntry]:
    """Entries by part, what is stored in one line in the shape of its axes: slices are of that."""
    flat = {part.name: part for part in parts if part.flat_dims}
    return {
        name: replace(entry, shape=viewed_shape(flat[name], scheme, num_out, num_in)) if name in flat else entry
        for name, entry in entries.items()
    }


def parameter_owners(module: nn.Module) -> Owners:
    """Every place that holds each parameter, by each of its names: tied weights have several."""
    places: defaultdict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    names: list[tuple[str, int]] = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for attribute, parameter in owner.named_parameters(recurse=False):
            if (owner, attribute) not in places[id(parameter)]:
                places[id(parameter)].append((owner, attribute))
            names.append((f"{prefix}.{attribute}" if prefix else attribute, id(parameter)))
    return {name: places[key] for name, key in names}


def tied_names(module: nn.Module) -> dict[str, set[str]]:
    """For each parameter that several names share, the other names."""
    by_id: defaultdict[int, set[str]] = defaultdict(set)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        by_id[id(parameter)].add(name)
    return {name: group - {name} for group in by_id.values() if len(group) > 1 for name in group}
