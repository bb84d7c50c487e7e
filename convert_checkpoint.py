# SPDX-License-Identifier: MIT
"""Turn a checkpoint of Open-Llama or LLaMA into one that openllama.py and transformers 4.31 load.

First a plan is made from the headers of the files, and checked whole. It tells each tensor of the
result, which tensor of the source it comes from, and what happens on the way: key and value heads
are repeated, dtypes are cast. Then the tensors are streamed, a megabyte at a time, into a
temporary folder beside the destination, which takes its place in the end.

However large the model is, memory stays at some hundred megabytes. Whenever the program is
killed, the destination is whole or absent, and the next run succeeds.

Sections:

  Reading a checkpoint      the files, and their tensors a few rows at a time
  Reading its config.json   in the spellings of Open-Llama and LLaMA
  Planning                  which tensor comes from where, and into which file it goes
  Checks                    of the source, its tensors, and the destination
  Writing                   the files, and the exchange of old for new
  Command line
"""

import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import reduce
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openllama import (
    ArgumentParser,
    OpenLlamaConfig,
    OpenLlamaForCausalLM,
    OpenLlamaForSequenceClassification,
    expect,
    read_json,
)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
BLOCK = 2**20  # bytes that are converted at a time
WINDOW = 2**27  # bytes that are read through one mapping of a pickle

# The dtypes that weights may have, by their names in safetensors. Integers and 8-bit floats are
# not among them: they belong to quantised models, which are more than their weights.
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

# The files beside the weights that the result needs as well.
COPIED = [
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
]


# --- Reading a checkpoint --------------------------------------------------------------------


# What safe_open and torch.load raise for a broken file.
BROKEN_FILE = (
    SafetensorError,
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    EOFError,
)


def byte_size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Give the bytes of a tensor, or of one row if its first dimension is left off."""
    return prod(shape) * dtype.itemsize


def is_plain(value: object) -> bool:
    """Tell whether a value is a tensor that has all its elements, so not a sparse one."""
    return isinstance(value, Tensor) and value.layout == torch.strided


def map_file(path: Path) -> dict[str, Tensor]:
    """Give the tensors of a file by their names, mapped into memory rather than read.

    ValueError where the file is broken, or holds anything else: a pickle could run code.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        else:
            tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        message = f"{path} holds more than weights"
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            message += f", and would run {code[1]}"
        raise ValueError(message) from None
    except BROKEN_FILE as error:
        kinds = "safetensors, or of torch.save since 1.6"
        raise ValueError(f"{path} is no whole file of {kinds}: {error}") from None
    fits = isinstance(tensors, dict) and all(
        isinstance(name, str) and is_plain(value) for name, value in tensors.items()
    )
    expect(fits, f"{path} holds more than weights: expected a dict of plain tensors")
    return tensors


def data_offsets(path: Path) -> dict[str, int]:
    """Tell where the bytes of each tensor begin in a file of safetensors.

    The file begins with the length of its header, in 8 bytes, and the header, in JSON. The
    offsets there count from the end of the header.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    start = 8 + length
    return {name: start + entry["data_offsets"][0] for name, entry in header.items()}


@dataclass
class Stored:
    """What a tensor of the source is like, and where it lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None  # of its bytes in a file of safetensors; a pickle does not tell


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Look up what a file holds; the mapping that shows it is gone afterwards."""
    tensors = map_file(path)
    offsets = {}
    if path.suffix == ".safetensors":
        offsets = data_offsets(path)
    return {
        name: Stored(path, tensor.dtype, tuple(tensor.shape), offsets.get(name))
        for name, tensor in tensors.items()
    }


def find_files(folder: Path) -> tuple[list[str], Path | None, dict[str, str]]:
    """Find the files of the weights, their index, and the file that it names for each tensor.

    Safetensors are preferred to pickles, and one file to many, which alone have an index.
    """
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / file).is_file():
            return [file], None, {}
        index_path = folder / f"{file}.index.json"
        if index_path.is_file():
            index = read_json(index_path).get("weight_map")
            fits = isinstance(index, dict) and len(index) > 0
            fits = fits and all(isinstance(shard, str) for shard in index.values())
            expect(fits, f"{index_path} has no weight_map from tensors to files")
            return sorted(set(index.values())), index_path, index
    expected = "expected model.safetensors or pytorch_model.bin, or an index"
    raise FileNotFoundError(f"{folder} has no weights: {expected}")


class Source:
    """The tensors of a checkpoint: what they are like is at hand, their rows come on demand.

    A broken file does not end the search for others, so that all can be reported at once.
    """

    def __init__(self, folder: Path):
        self.files, self.index_path, self.index = find_files(folder)
        self.tensors: dict[str, Stored] = {}
        self.holders = defaultdict(list)  # the files of a tensor: one, if all is well
        self.broken: dict[str, str] = {}  # what is wrong with a file
        # Of the pickles, one is mapped at a time, and these bytes were read through the mapping.
        self.mapped_path: Path | None = None
        self.mapped: dict[str, Tensor] = {}
        self.mapped_read = 0
        for file in self.files:
            path = folder / file
            try:
                check_shard(path, folder, self.index_path)
                found = stored_tensors(path)
            except ValueError as error:
                self.broken[file] = str(error)
                continue
            self.tensors |= found
            for name in found:
                self.holders[name].append(path.name)

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """Give the rows of a tensor in turn, some at a time; each block is gone with the next.

        A block has about BLOCK bytes, and its number of rows is a multiple of `multiple`, save
        for the last.
        """
        stored = self.tensors[name]
        row_size = byte_size(stored.shape[1:], stored.dtype)
        step = multiple * max(1, BLOCK // (multiple * row_size))
        if stored.offset is None:
            return self.mapped_blocks(name, step, row_size)
        return self.read_blocks(stored, step, row_size)

    def read_blocks(self, stored: Stored, step: int, row_size: int) -> Iterator[Tensor]:
        """Read from a file of safetensors, into one buffer: this is as fast as copying the file."""
        rows = stored.shape[0]
        buffer = memoryview(bytearray(min(step, rows) * row_size))
        with open(stored.path, "rb", buffering=0) as file:
            file.seek(stored.offset)
            for start in range(0, rows, step):
                count = min(step, rows - start)
                block = buffer[: count * row_size]
                whole = file.readinto(block) == len(block)
                expect(whole, f"{stored.path} has changed while it was read")
                yield torch.frombuffer(block, dtype=stored.dtype).view(-1, *stored.shape[1:])

    def mapped_blocks(self, name: str, step: int, row_size: int) -> Iterator[Tensor]:
        """Read from a pickle, of which only a mapping is to be had.

        What was read through a mapping counts as memory of this process for as long as the
        mapping lives. So it is renewed after WINDOW bytes.
        """
        stored = self.tensors[name]
        for start in range(0, stored.shape[0], step):
            if self.mapped_path != stored.path or self.mapped_read > WINDOW:
                self.mapped_path = stored.path
                self.mapped = map_file(stored.path)
                self.mapped_read = 0
            self.mapped_read += step * row_size
            yield self.mapped[name][start : start + step]


# --- Reading its config.json -----------------------------------------------------------------


# The keys of LLaMA's config.json that say something about the model. OpenLlamaConfig judges them,
# and refuses what Open-Llama does not have; all other keys are passed over.
LLAMA_KEYS = {field.name for field in fields(OpenLlamaConfig)} | {
    "id2label",
    "rope_parameters",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "quantization_config",
}


def read_config(folder: Path) -> tuple[OpenLlamaConfig, int, dict]:
    """Read the configuration that the result has.

    Beside it come the number of query heads that share a stored key and value head, and what
    config.json holds.
    """
    values = read_json(folder / "config.json")
    kind = values.get("model_type", "open-llama")
    known = kind in ("open-llama", "open_llama", "llama")
    expect(known, f"model_type={kind!r}: expected 'open-llama' or 'llama'")
    labels = values.get("id2label") or {}
    expect(isinstance(labels, dict), f"id2label={labels!r}: expected an object")
    if kind == "llama":
        config = config_of_llama(values)
        return config, queries_per_key(values, config.num_attention_heads), values
    return OpenLlamaConfig.from_dict(values), 1, values


def config_of_llama(values: dict) -> OpenLlamaConfig:
    """Say in Open-Llama's settings what LLaMA's config.json says."""
    # Nothing but true or false is taken, as a wrong guess would exchange a whole matrix.
    tied = values.get("tie_word_embeddings", False)
    expect(type(tied) is bool, f"tie_word_embeddings={tied!r}: expected true or false")
    settings = {"vocab_size": 32000}  # LLaMA's default, which is not Open-Llama's
    settings |= {key: value for key, value in values.items() if key in LLAMA_KEYS}
    settings |= {
        "pad_token_id": None,
        "use_stable_embedding": False,
        "tie_word_embeddings": False,
        "shared_input_output_embedding": tied,
        "hidden_dropout_prob": 0.0,
        "attention_dropout_prob": values.get("attention_dropout") or 0.0,
    }
    config = OpenLlamaConfig.from_dict(settings)
    pad = values.get("pad_token_id")
    if type(pad) is int and pad in range(config.vocab_size):  # the oldest files say -1 for none
        config.pad_token_id = pad
    return config


def queries_per_key(values: dict, heads: int) -> int:
    """Tell how many query heads share a key and value head in a LLaMA.

    In the first LLaMAs each has its own, and their config.json does not speak of it. The same
    holds for every Open-Llama, so that the heads of a newer LLaMA must be repeated.
    """
    stored = values.get("num_key_value_heads") or heads
    fits = type(stored) is int and stored > 0 and heads % stored == 0
    expected = f"expected a divisor of num_attention_heads={heads}"
    expect(fits, f"num_key_value_heads={stored!r}: {expected}")
    return heads // stored


# --- Planning --------------------------------------------------------------------------------


@dataclass
class Target:
    """A tensor of the result, and how it is made from that of `source`.

    It is cast to `dtype`, and each of its heads, of D rows, comes `repeat` times.
    """

    name: str
    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    repeat: int
    D: int

    @property
    def size(self) -> int:
        """Give the bytes that it takes in its file."""
        return byte_size(self.shape, self.dtype)

    def blocks(self, source: Source) -> Iterator[Tensor]:
        """Make its rows from the source's, a block at a time, as they are to be written.

        ValueError where a number does not fit the dtype; the plan could not know, as it has read
        headers only.
        """
        for block in source.blocks(self.source, multiple=self.D):
            cast = block.to(self.dtype)
            if overflows(block, cast):
                largest = largest_number(source, self.source)
                reason = f"its largest value is {largest:g}"
                raise ValueError(f"{self.source} does not fit {self.dtype}: {reason}")
            yield self.repeat_heads(cast).contiguous()

    def repeat_heads(self, block: Tensor) -> Tensor:
        """Put the copies of a head beside it, as query heads that share one are neighbours."""
        if self.repeat == 1:
            return block
        heads = block.unflatten(0, (-1, 1, self.D))  # (heads, 1, D, C)
        return heads.expand(-1, self.repeat, -1, -1).flatten(0, 2)


class Plan:
    """All that is to be done, checked.

    ValueError lists all that is wrong with the source and the destination. What the files hold is
    looked at only where the files themselves are in order.
    """

    def __init__(self, src: Path, dst: Path, dtype: str, max_shard_size: str, overwrite: bool):
        expect(src.is_dir(), f"{src} is no folder")
        problems = check_destination(src, dst, overwrite)
        try:
            self.config, group, values = read_config(src)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        try:
            self.source = Source(src)
            problems += check_source(self.source)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        report(problems)

        self.model = OpenLlamaForCausalLM
        architectures = str(values.get("architectures"))
        if "score.weight" in self.source.tensors or "ForSequence" in architectures:
            self.model = OpenLlamaForSequenceClassification
        self.targets, self.dropped = self.choose(group, dtype)
        self.size = sum(target.size for target in self.targets)
        self.shards = split(self.targets, limit=parse_size(max_shard_size))
        self.copied = [src / name for name in COPIED if (src / name).is_file()]
        self.more = self.describe(values)
        check_space(dst, self.size)

    def choose(self, group: int, dtype: str) -> tuple[list[Target], list[str]]:
        """Choose the tensors of the result, and the names of those that are left out of it."""
        tensors = self.source.tensors
        layers = self.config.num_hidden_layers
        # This comes first, as even without memory a model of endless layers is never made.
        fits = layers <= len(tensors)
        expect(fits, f"num_hidden_layers={layers}: expected fewer, of {len(tensors)} tensors")
        with torch.device("meta"):  # shapes without memory
            wanted = self.model(self.config).state_dict()

        sources = {name: name for name in wanted}
        dropped = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]  # computed
        tied = self.model is OpenLlamaForCausalLM and HEAD not in wanted
        if tied and HEAD in tensors:  # saved with the embedding, or in its stead
            if EMBEDDING in tensors:
                dropped.append(HEAD)
            else:
                sources[EMBEDDING] = HEAD

        targets = []
        problems = []
        for name, source in sources.items():
            if source not in tensors:
                problems.append(f"{name} is missing")
                continue
            shape = tuple(wanted[name].shape)
            repeat = 1
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                repeat = group
            expected = (shape[0] // repeat, *shape[1:])
            problems += check_tensor(source, tensors[source], expected)
            cast = getattr(torch, dtype, tensors[source].dtype)  # "keep" is no name in torch
            targets.append(Target(name, source, cast, shape, repeat, self.config.head_dim))
        problems += check_left_over(tensors, {*sources.values(), *dropped})
        report(problems)
        if HEAD in dropped:
            check_tied(self.source)
        return targets, dropped

    def describe(self, values: dict) -> dict:
        """Give what config.json holds beside the configuration.

        These are the labels of the source, which the configuration only counts, and what a
        reader must know to choose the class and the dtype to load.
        """
        more = {key: values[key] for key in ("id2label", "label2id") if key in values}
        more["architectures"] = [self.model.__name__]
        common = reduce(torch.promote_types, [target.dtype for target in self.targets])
        more["torch_dtype"] = str(common).removeprefix("torch.")
        return more

    def __str__(self) -> str:
        """Tell the plan in a line for each kind of thing that is done, and one for the whole."""
        tensors = self.source.tensors
        casts = Counter(
            f"{tensors[target.source].dtype} to {target.dtype}".replace("torch.", "")
            for target in self.targets
        )
        lists = {
            "source": self.source.files,
            "renamed": [f"{t.source} to {t.name}" for t in self.targets if t.source != t.name],
            "dropped": self.dropped,
            "repeated": [f"{t.name} x {t.repeat}" for t in self.targets if t.repeat > 1],
            "dtypes": [f"{count} x {kinds}" for kinds, count in casts.items()],
            "copied": [path.name for path in self.copied],
            "result": list(self.shards),
        }
        lines = [f"{title + ':':12}{first_few(items)}" for title, items in lists.items()]
        count = sum(prod(target.shape) for target in self.targets)
        size = sum(byte_size(stored.shape, stored.dtype) for stored in tensors.values())
        sizes = f"{readable(size)} in, {readable(self.size)} out"
        lines.append(f"{self.model.__name__}: {count:,} parameters, {sizes}")
        theta = self.config.rope_theta
        if theta != 10000:
            lines.append(f"note: rope_theta={theta:g} is ignored by transformers 4.31")
        return "\n".join(lines)


def parse_size(text: str) -> float:
    """Give the number of bytes in a size like 500MB, 2GB or 2GiB."""
    problem = f"max_shard_size={text!r}: expected a size, as in 500MB or 2GB"
    parts = re.fullmatch(r"(\d+\.?\d*) ?([KMGT]?)(i?)B?", text, re.IGNORECASE)
    expect(parts is not None, problem)
    number, prefix, binary = parts.groups()
    base = 1000
    if binary:
        base = 1024
    size = float(number) * base ** ["", "K", "M", "G", "T"].index(prefix.upper())
    expect(size > 0, problem)
    return size


def split(targets: list[Target], limit: float) -> dict[str, list[Target]]:
    """Deal the tensors to files of at most `limit` bytes, or of one tensor that is larger."""
    shards = [[]]
    size = 0
    for target in targets:
        if shards[-1] and size + target.size > limit:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += target.size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def first_few(items: list[str]) -> str:
    """Tell how many there are, and the first three."""
    if not items:
        return "0"
    shown = items[:3]
    if len(items) > 3:
        shown.append("...")
    return f"{len(items)}: {', '.join(shown)}"


def readable(size: float) -> str:
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.2f} MB"


# --- Checks ----------------------------------------------------------------------------------


def report(problems: list[str]) -> None:
    """Raise a ValueError with all problems, or the first 20 of them, each a line, if any."""
    if not problems:
        return
    lines = [" ".join(problem.split()) for problem in problems[:20]]
    if len(problems) > 1:
        lines.insert(0, f"{len(problems)} problems")
    if len(problems) > 20:
        lines.append(f"and {len(problems) - 20} more")
    raise ValueError("\n  ".join(lines))


def check_shard(path: Path, folder: Path, index_path: Path | None) -> None:
    """An index is not trusted to name files: one that lies elsewhere is not opened."""
    beside = path.parent == folder and path.name != ".."
    expect(beside, f"{index_path} names {path}: expected a file beside it")
    expect(path.is_file(), f"{path} is missing")


def check_source(source: Source) -> list[str]:
    """List the broken files, and the tensors that are not in the one file that the index names.

    Of a broken file it is not known what it holds, so that the index is not compared with it.
    """
    problems = list(source.broken.values())
    index = {name: file for name, file in source.index.items() if file not in source.broken}
    for name in source.tensors | index:
        found = source.holders.get(name, ["no file"])
        told = index.get(name, "no file")
        if len(found) > 1:
            problems.append(f"{name} is there twice, in {' and '.join(found)}")
        elif source.index_path and found != [told]:
            problems.append(f"{name} is in {found[0]}, but {source.index_path} tells of {told}")
    return problems


def check_tensor(name: str, stored: Stored, expected: tuple[int, ...]) -> list[str]:
    """Say what is wrong with a tensor, if anything is, by what the header tells of it."""
    if stored.shape != expected:
        return [f"{name} has shape {stored.shape}: expected {expected}"]
    if stored.dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        return [f"{name} has dtype {stored.dtype}: expected one of {known}"]
    return []


def check_left_over(tensors: dict[str, Stored], used: set[str]) -> list[str]:
    """A tensor without a place in the result is a sign that the source is another model."""
    unknown = sorted(tensors.keys() - used)
    return [f"{name} of shape {tensors[name].shape} is left over" for name in unknown]


def check_tied(source: Source) -> None:
    """Compare a head with the embedding to which it is tied, before the head is dropped.

    Some checkpoints have both, though config.json says that they are one. Where they differ,
    it cannot be known which of the two the model was trained with.
    """
    head = source.tensors[HEAD]
    embedding = source.tensors[EMBEDDING]
    same = head.dtype == embedding.dtype and head.shape == embedding.shape
    if same:
        pairs = zip(source.blocks(HEAD), source.blocks(EMBEDDING), strict=True)
        same = all(a.equal(b) for a, b in pairs)
    expect(same, f"{HEAD} differs from {EMBEDDING}, to which config.json ties it")


def overflows(block: Tensor, cast: Tensor) -> bool:
    """Tell whether a cast made a finite number infinite. An infinite one may stay infinite."""
    if cast.dtype == block.dtype:
        return False
    extremes = torch.stack(cast.aminmax())
    if extremes.isfinite().all():  # the usual case, told without a mask of the whole block
        return False
    return bool((cast.isinf() & block.isfinite()).any())


def largest_number(source: Source, name: str) -> float:
    """Give the largest magnitude in a tensor, infinities and NaN aside."""
    finite = (rows.where(rows.isfinite(), 0) for rows in source.blocks(name))
    return max(float(rows.abs().max()) for rows in finite)


def check_destination(src: Path, dst: Path, overwrite: bool) -> list[str]:
    """List what is wrong with the destination. Whatever is replaced there is lost in the end.

    So the source is never replaced, even by way of a link, nor is any folder that holds it.
    """
    problems = []
    if src.resolve().is_relative_to(dst):
        problems.append(f"{dst} is the source, or holds it")
    elif dst.exists() and not dst.is_dir():
        problems.append(f"{dst} is a file: expected a folder, to be made")
    elif dst.exists() and not overwrite:
        problems.append(f"{dst} exists: --overwrite would replace it")
    elif dst.exists() and not is_replaceable(dst):
        problems.append(f"{dst} is no checkpoint, and is not replaced")
    if not os.access(dst.parent, os.W_OK | os.X_OK):
        problems.append(f"{dst.parent} is no folder to write in")
    return problems


def is_replaceable(folder: Path) -> bool:
    """Tell a checkpoint, or an empty folder, from one that --overwrite was not meant for."""
    empty = not any(folder.iterdir())
    return empty or (folder / "config.json").is_file()


def temporary_prefix(dst: Path) -> str:
    """Begin the name of a temporary folder so that the next run to the same place knows it."""
    return f".{dst.name}.converting-"


def leftovers(dst: Path) -> list[Path]:
    """List the temporary folders of runs that were killed."""
    prefix = temporary_prefix(dst)
    return [path for path in dst.parent.iterdir() if path.name.startswith(prefix)]


def check_space(dst: Path, size: int) -> None:
    """What killed runs have left counts as free, as it is removed before anything is written."""
    freed = sum(file.stat().st_size for folder in leftovers(dst) for file in folder.rglob("*"))
    free = shutil.disk_usage(dst.parent).free + freed
    has = f"{dst.parent} has {readable(free)} of free space"
    expect(free > size, f"{has}: expected {readable(size)}")


# --- Writing ---------------------------------------------------------------------------------


def write(plan: Plan, dst: Path) -> None:
    """Carry out the plan in a temporary folder, and put the result in the place of dst.

    The folder lies beside dst, hence on the same disk, where a rename is done at once or not at
    all: at no moment is there half a checkpoint at dst. When it is killed between the two
    renames, there is none; when anything fails there, the old one is put back.
    """
    stale = leftovers(dst)
    replaces = dst.exists()
    with tempfile.TemporaryDirectory(prefix=temporary_prefix(dst), dir=dst.parent) as temporary:
        new = Path(temporary, "new")
        old = Path(temporary, "old")
        for path in stale:
            # Renamed first: a run that is still alive there fails, rather than finish with half.
            shutil.rmtree(path.rename(old))
        new.mkdir()
        write_checkpoint(plan, new)
        try:
            if replaces:
                dst.rename(old)
            new.rename(dst)
        finally:
            if old.exists() and not dst.exists():
                old.rename(dst)


def write_checkpoint(plan: Plan, folder: Path) -> None:
    """Write all files of the result. As in transformers, a single file needs no index."""
    with progress(plan) as advance:
        for file, shard in plan.shards.items():
            write_shard(folder / file, shard, plan.source, advance)
    if len(plan.shards) > 1:
        index = {target.name: file for file, shard in plan.shards.items() for target in shard}
        content = {"metadata": {"total_size": plan.size}, "weight_map": index}
        text = json.dumps(content, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")
    for path in plan.copied:
        shutil.copyfile(path, folder / path.name)
    plan.config.save_pretrained(folder, **plan.more)


def write_shard(path: Path, shard: list[Target], source: Source, advance: Callable) -> None:
    """Write a file of safetensors: the header, then the bytes of the tensors.

    Those of wide dtypes come first, so that each begins at a multiple of its dtype's size. This
    is written by hand, as the library's own function wants all tensors in memory.
    """
    targets = sorted(shard, key=lambda target: target.dtype.itemsize, reverse=True)
    with open(path, "wb") as file:
        file.write(shard_header(targets))
        for target in targets:
            for block in target.blocks(source):
                file.write(block.view(torch.uint8).numpy())
                advance(bytes=block.nbytes)
            advance(tensors=1)
    advance(files=1)


def shard_header(targets: list[Target]) -> bytes:
    """Tell in JSON where each tensor lies; before it comes its length, in 8 bytes."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for target in targets:
        start = end
        end = start + target.size
        header[target.name] = {
            "dtype": DTYPES[target.dtype],
            "shape": target.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the first tensor begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


@contextmanager
def progress(plan: Plan) -> Iterator[Callable]:
    """Count what is done, and show it on stderr.

    A terminal has one line, which is written over; anything else gets a line per file. What is
    given calls `advance` with what has been done since: bytes, tensors, files.
    """
    start = time.perf_counter()
    done = Counter()
    terminal = sys.stderr.isatty()
    line_end = "\n"
    if terminal:
        line_end = "\r"

    def advance(**more: int) -> None:
        done.update(more)
        if not terminal and "files" not in more:
            return
        tensors = f"{done['tensors']} of {len(plan.targets)} tensors"
        size = f"{readable(done['bytes'])} of {readable(plan.size)}"
        rate = done["bytes"] / 1e6 / (time.perf_counter() - start)
        state = f"{tensors}, {size}, {rate:.0f} MB/s  "
        print(state, end=line_end, file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        if terminal:
            print(file=sys.stderr)


# --- Command line ----------------------------------------------------------------------------


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: str = "keep",
    max_shard_size: str = "2GB",
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Convert the checkpoint in the folder src into a new one, dst.

    With dry_run, everything is checked, and the plan is printed; nothing is written.

    ValueError lists all that is wrong with either folder. OSError tells what the system refused.
    After both, dst is as it was.
    """
    start = time.perf_counter()
    folder = Path(dst).resolve()
    plan = Plan(Path(src), folder, dtype, max_shard_size, overwrite)
    if dry_run:
        print(plan)
        return
    write(plan, folder)
    seconds = time.perf_counter() - start
    print(plan, f"{folder} is ready, after {seconds:.1f} s", sep="\n", file=sys.stderr)


def make_parser() -> ArgumentParser:
    """Make the parser; its results are named as the arguments of convert."""
    parser = ArgumentParser(
        description="Convert an Open-Llama or LLaMA checkpoint for openllama.py."
    )
    add = parser.add_argument
    add(
        "src",
        metavar="SRC",
        help="folder of config.json and safetensors or pytorch_model.bin, in one file or shards",
    )
    add("dst", metavar="DST", help="folder to be made")
    add(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="default: %(default)s",
    )
    add(
        "--max-shard-size",
        default="2GB",
        metavar="SIZE",
        help="of a file; it holds one tensor at least; default: 2GB",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace the checkpoint at DST, once the new one is whole",
    )
    add("--dry-run", action="store_true", help="check everything, and print the plan only")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and give the exit status: 2 for a mistake, 130 when interrupted."""
    try:
        convert(**vars(make_parser().parse_args(argv)))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # a megabyte at a time, threads would only wait for each other
    sys.exit(main())
