# SPDX-License-Identifier: MIT
"""Turn a checkpoint of Open-Llama or LLaMA into one that openllama.py and transformers 4.31 load.

Or the other way, with --to llama: into a LLaMA, which runs wherever LLaMA does.

First a plan is made from the headers of the files, and checked whole. It tells each tensor of the
result, which tensor of the source it comes from, and what happens on the way: key and value heads
are repeated, the stable embedding is computed, dtypes are cast. Then the tensors are streamed, a
megabyte at a time, into a folder beside the destination, which takes its place in the end.

However large the model is, memory stays at some hundred megabytes. Whenever the program is
killed, the destination is whole, old or new, or absent, and the next run succeeds.

Sections:

  Reading a checkpoint      the files, and their tensors a few rows at a time
  Reading its config.json   in the spellings of Open-Llama and LLaMA
  Planning                  which tensor comes from where, and into which file it goes
  Out to LLaMA              its config.json
  Checks                    of the source, its tensors, and the destination
  Writing                   the files, and the exchange of old for new
  Command line
"""

import ctypes
import errno
import json
import os
import pickle
import re
import shutil
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from io import FileIO
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from openllama import (
    COMPUTED,
    FLOATS,
    INDEX,
    ArgumentParser,
    OpenLlamaConfig,
    OpenLlamaForCausalLM,
    OpenLlamaForSequenceClassification,
    as_dtype,
    byte_size,
    check_layers,
    common_type,
    cut,
    deal,
    expect,
    expect_no_pointer,
    index_text,
    listed,
    load_tokenizer,
    mismatches,
    naming,
    no_deep_nesting,
    parse_size,
    plain_names,
    read_generation_ends,
    read_index,
    read_json,
    read_json_if_there,
    safetensors_header,
)

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = ("model.embed_layer_norm.weight", "model.embed_layer_norm.bias")  # of a stable embedding
BLOCK = 2**20  # bytes that are converted at a time
PART = 2**27  # bytes that the kernel copies at a time
WINDOW = 2**27  # bytes that are read through one mapping of a pickle

# The files beside the weights that the result needs as well.
COPIED = [
    "tokenizer.model",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
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
    struct.error,
)


def is_plain(value: object) -> bool:
    """Tell whether a value is a tensor that has all its elements: not a sparse or a meta one."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


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
        raise ValueError(cut(f"{path} is no whole file of {kinds}: {error}", 1000)) from None
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
    name: str  # that it has there
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int | None  # of its bytes in a file of safetensors; a pickle does not tell

    @property
    def size(self) -> int:
        """Give the bytes that it takes."""
        return byte_size(self)


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Look up what a file holds; the mapping that shows it is gone afterwards."""
    tensors = map_file(path)
    offsets = {}
    if path.suffix == ".safetensors":
        offsets = data_offsets(path)
    return {
        name: Stored(path, name, tensor.dtype, tuple(tensor.shape), offsets.get(name))
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
            index = read_index(index_path)
            return sorted(set(index.values())), index_path, index
    expected = "expected model.safetensors or pytorch_model.bin, or an index"
    message = f"{folder} has no weights: {expected}"
    if adapter_files(folder):
        message += "; it has an adapter, which its own library merges into a model"
    raise FileNotFoundError(message)


def adapter_files(folder: Path) -> list[str]:
    """Name the files of adapters, as of LoRA, which are not a part of the weights."""
    found = [*folder.glob("adapter_*"), *folder.glob("*/adapter_*")]
    return sorted(str(path.relative_to(folder)) for path in found)


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
                expect(path.is_file(), f"{path} is missing")
                expect_no_pointer(path)
                found = stored_tensors(path)
            except (ValueError, OSError) as error:
                self.broken[file] = str(error)
                continue
            self.tensors |= found
            for name in found:
                self.holders[name].append(path.name)

    def use_plain_names(self) -> None:
        """Call all tensors as openllama.py does; the files go on calling them as they do."""
        plain = plain_names(self.tensors)
        self.tensors = {plain[name]: stored for name, stored in self.tensors.items()}

    def whole(self, name: str) -> Tensor:
        """Read a tensor that is small."""
        return torch.cat([block.clone() for block in self.blocks(name)])

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """Give the rows of a tensor in turn, some at a time; each block is gone with the next.

        A block has about BLOCK bytes, and its number of rows is a multiple of `multiple`, save
        for the last.
        """
        stored = self.tensors[name]
        row_size = prod(stored.shape[1:]) * stored.dtype.itemsize
        step = multiple * max(1, BLOCK // (multiple * row_size))
        if stored.offset is None:
            return self.mapped_blocks(stored, step, row_size)
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

    def mapped_blocks(self, stored: Stored, step: int, row_size: int) -> Iterator[Tensor]:
        """Read from a pickle, of which only a mapping is to be had.

        What was read through a mapping counts as memory of this process for as long as the
        mapping lives. So it is renewed after WINDOW bytes.
        """
        for start in range(0, stored.shape[0], step):
            if self.mapped_path != stored.path or self.mapped_read > WINDOW:
                self.mapped_path = stored.path
                self.mapped = map_file(stored.path)
                self.mapped_read = 0
            self.mapped_read += step * row_size
            yield self.mapped[stored.name][start : start + step]


# --- Reading its config.json -----------------------------------------------------------------


# The keys of LLaMA's config.json that say something about the model. OpenLlamaConfig judges them,
# and refuses what Open-Llama does not have; all other keys are passed over.
LLAMA_KEYS = {field.name for field in fields(OpenLlamaConfig)} | {
    "rope_parameters",
    "head_dim",
    "attention_bias",
    "mlp_bias",
}


def read_config(folder: Path) -> tuple[OpenLlamaConfig, int, dict]:
    """Read the configuration of the source.

    Beside it come the number of query heads that share a stored key and value head, and what
    config.json holds.
    """
    path = folder / "config.json"
    values = read_json(path)
    kind = values.get("model_type", "open-llama")
    known = kind in ("open-llama", "open_llama", "llama")
    expect(known, f"model_type={kind!r}: expected 'open-llama' or 'llama'")
    read_generation_ends(folder)  # as the result is to be loaded with them
    with no_deep_nesting(path):
        if kind == "llama":
            config = config_of_llama(values)
            return config, queries_per_key(values, config.num_attention_heads), values
        # Where it matters, the weights show it.
        settings = {key: value for key, value in values.items() if key != "quantization_config"}
        return OpenLlamaConfig.from_dict(settings), 1, values


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

    It is cast to the dtype of `like`, and each of its heads, of D rows, comes `repeat` times. Where
    it is normalised, its rows are what a stable embedding makes of those of the source.
    """

    name: str
    source: str
    like: Tensor  # of the same dtype and shape, but without memory
    repeat: int
    D: int
    normalised: bool

    def is_copy(self, stored: Stored) -> bool:
        """Tell whether its bytes are those of a file of safetensors, as they are."""
        changed = self.normalised or self.repeat > 1 or self.like.dtype != stored.dtype
        return stored.offset is not None and not changed

    def blocks(self, source: Source) -> Iterator[Tensor]:
        """Make its rows from the source's, a block at a time, as they are to be written.

        ValueError where a number does not fit the dtype; the plan could not know, as it has read
        headers only.
        """
        for block in self.uncast_blocks(source):
            cast = block.to(self.like.dtype)
            if overflows(block, cast):
                reason = f"its largest value is {largest_number(self.uncast_blocks(source)):g}"
                raise ValueError(f"{self.source} does not fit {self.like.dtype}: {reason}")
            yield self.repeat_heads(cast).contiguous()

    def uncast_blocks(self, source: Source) -> Iterator[Tensor]:
        """Make the blocks before they are cast, and before heads are repeated."""
        if not self.normalised:
            yield from source.blocks(self.source, multiple=self.D)
            return
        weight, bias = (source.whole(name).double() for name in NORM)
        for block in source.blocks(self.source):
            yield F.layer_norm(block.double(), weight.shape, weight, bias)

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

    def __init__(
        self, src: Path, dst: Path, to: str, dtype: str, max_shard_size: str, overwrite: bool
    ):
        expect(src.is_dir(), f"{src} is no folder")
        expect(to in RESULTS, f"to={to!r}: expected one of {RESULTS}")
        limit = parse_size(max_shard_size)
        cast = None
        if dtype != "keep":
            cast = as_dtype(dtype)
        problems = check_destination(src, dst, overwrite)
        try:
            config, group, values = read_config(src)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        try:
            self.source = Source(src)
            problems += check_source(self.source)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        refuse(problems)

        self.source.use_plain_names()
        check_quantised(self.source, values)
        check_layers(config, len(self.source.tensors))
        self.model = OpenLlamaForCausalLM
        architectures = str(values.get("architectures"))
        if "score.weight" in self.source.tensors or "ForSequence" in architectures:
            self.model = OpenLlamaForSequenceClassification
        self.to = to
        self.config = config
        if to == "llama":
            self.config = without_stable_embedding(config)
        sources, self.dropped = self.match(config, group)
        self.targets = self.make_targets(config, sources, cast)
        self.like = {target.name: target.like for target in self.targets}
        self.size = sum(map(byte_size, self.like.values()))
        self.shards = deal(self.like, limit)
        self.copied = [src / name for name in COPIED if (src / name).is_file()]
        self.notes = self.take_notes(src, values)
        check_space(dst, self.size)

    def match(self, config: OpenLlamaConfig, group: int) -> tuple[dict[str, str], list[str]]:
        """Match the tensors of the source with those that its model has.

        Give for each tensor of the model its name in the source, and the names of those that the
        result does not have. group: the query heads that share a stored key and value head.
        """
        tensors = self.source.tensors
        expected = shapes_of(self.model, config)
        sources = {name: name for name in expected}
        dropped = [name for name in tensors if name.endswith(COMPUTED)]
        if self.model is OpenLlamaForCausalLM and HEAD not in expected:
            # the head is the embedding, and was saved with it, or in its stead, or not at all
            if EMBEDDING in tensors and HEAD in tensors:
                dropped.append(HEAD)
            elif HEAD in tensors:
                sources[EMBEDDING] = HEAD
            sources[HEAD] = sources[EMBEDDING]

        shapes = {sources[name]: tensor for name, tensor in expected.items()}
        for name, tensor in shapes.items():
            if name.endswith(("k_proj.weight", "v_proj.weight")):
                shapes[name] = tensor[: len(tensor) // group]
        found = {name: stored for name, stored in tensors.items() if name not in dropped}
        refuse(mismatches(found, shapes))
        if HEAD in dropped:
            check_tied(self.source)
        return sources, dropped

    def make_targets(
        self, config: OpenLlamaConfig, sources: dict[str, str], cast: torch.dtype | None
    ) -> list[Target]:
        """Say how each tensor of the result is made; cast: its dtype, or None to keep it."""
        normalised = config.use_stable_embedding and not self.config.use_stable_embedding
        targets = []
        for name, tensor in shapes_of(self.model, self.config).items():
            stored = self.source.tensors[sources[name]]
            target = Target(
                name,
                sources[name],
                like=tensor.to(cast or stored.dtype),
                repeat=len(tensor) // stored.shape[0],
                D=config.head_dim,
                normalised=normalised and name == EMBEDDING,
            )
            targets.append(target)
        return targets

    def config_text(self) -> str:
        """Write the result's config.json, and there what tells a reader which class to load."""
        name = self.model.__name__
        values = self.config.to_dict()
        if self.to == "llama":
            name = name.removeprefix("Open")
            values = llama_values(self.config)
        dtype = str(common_type(self.like)).removeprefix("torch.")
        values |= {"architectures": [name], "torch_dtype": dtype}
        return json.dumps(values, indent=2) + "\n"

    def take_notes(self, src: Path, values: dict) -> list[str]:
        """Say what the user may not expect, though nothing is wrong with it."""
        notes = []
        theta = self.config.rope_theta
        if theta != 10000:
            notes.append(f"rope_theta={theta:g} is ignored by transformers 4.31")
        scaling = self.config.rope_scaling or {}
        if self.to == "llama" and scaling.get("type") == "dynamic":
            notes.append(
                "dynamic scaling differs elsewhere, beyond max_position_embeddings: "
                "its base follows the longest row of a batch, and cached keys keep theirs"
            )
        if values.get("quantization_config"):
            notes.append("quantization_config is left out, as the weights are not quantised")
        adapter = adapter_files(src)
        if adapter:
            notes.append(f"{listed(adapter)}: an adapter, which is not merged into the weights")
        return notes + check_tokenizer(src, self.config)

    def __str__(self) -> str:
        """Tell the plan in a line for each kind of thing that is done, and one for the whole."""
        tensors = self.source.tensors
        casts = Counter(
            f"{tensors[target.source].dtype} to {target.like.dtype}".replace("torch.", "")
            for target in self.targets
        )
        names = {target.name: tensors[target.source].name for target in self.targets}
        lists = {
            "source": self.source.files,
            "renamed": [f"{old} to {new}" for new, old in names.items() if old != new],
            "dropped": self.dropped,
            "repeated": [f"{t.name} x {t.repeat}" for t in self.targets if t.repeat > 1],
            "normalised": [target.name for target in self.targets if target.normalised],
            "dtypes": [f"{count} x {kinds}" for kinds, count in casts.items()],
            "copied": [path.name for path in self.copied],
            "result": list(self.shards),
        }
        lines = [f"{title + ':':12}{first_few(items)}" for title, items in lists.items()]
        count = sum(prod(like.shape) for like in self.like.values())
        sizes = f"{readable(sum(map(byte_size, tensors.values())))} in, {readable(self.size)} out"
        lines.append(f"{self.model.__name__}: {count:,} parameters, {sizes}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def shapes_of(model: type, config: OpenLlamaConfig) -> dict[str, Tensor]:
    """Give the tensors of a model by their names, without memory."""
    with torch.device("meta"):
        return model(config).state_dict()


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


# --- Out to LLaMA ----------------------------------------------------------------------------

# Of the three changes that make an Open-Llama of a LLaMA, attention is only computed differently,
# and the shared embedding can be written twice. The stable embedding is a function of the token
# alone: so the LayerNorm of each row is computed once and for all, and is LLaMA's embedding.

RESULTS = ["open-llama", "llama"]


def without_stable_embedding(config: OpenLlamaConfig) -> OpenLlamaConfig:
    """Say how the result is built. Its two matrices are one only where they are equal."""
    shared = config.shared_input_output_embedding or config.tie_word_embeddings
    return replace(
        config,
        use_stable_embedding=False,
        shared_input_output_embedding=shared and not config.use_stable_embedding,
        tie_word_embeddings=False,
    )


def llama_values(config: OpenLlamaConfig) -> dict:
    """Say in LLaMA's words what config.json says. There is no dropout after the MLP in a LLaMA."""
    values = config.to_dict()
    for name in (
        "use_memory_efficient_attention",
        "use_stable_embedding",
        "shared_input_output_embedding",
        "hidden_dropout_prob",
        "attention_dropout_prob",
    ):
        del values[name]
    return values | {
        "model_type": "llama",
        "num_key_value_heads": config.num_attention_heads,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": config.attention_dropout_prob,
        "tie_word_embeddings": config.shared_input_output_embedding,
    }


# --- Checks ----------------------------------------------------------------------------------


def refuse(problems: list[str]) -> None:
    """Raise a ValueError with all problems, or the first 20 of them, each a line, if any."""
    if not problems:
        return
    text = listed([" ".join(problem.split()) for problem in problems], separator="\n  ")
    if len(problems) > 1:
        text = f"{len(problems)} problems\n  {text}"
    raise ValueError(text)


def check_source(source: Source) -> list[str]:
    """List the broken files, and the tensors that are not in the one file that the index names.

    Of a broken file it is not known what it holds, so that the index is not compared with it. Nor
    does it matter where a tensor is that the result does not have.
    """
    problems = list(source.broken.values())
    index = {name: file for name, file in source.index.items() if file not in source.broken}
    for name in source.tensors | index:
        if name.endswith(COMPUTED):
            continue
        name_there = cut(name, 100)
        found = source.holders.get(name, ["no file"])
        told = index.get(name, "no file")
        if len(found) > 1:
            problems.append(f"{name_there} is there twice, in {' and '.join(found)}")
        elif source.index_path and found != [told]:
            there = f"{name_there} is in {found[0]}"
            problems.append(f"{there}, but {source.index_path} tells of {told}")
    return problems


def check_quantised(source: Source, values: dict) -> None:
    """Refuse quantised weights. A merged model, whose config.json calls it so, has plain ones."""
    packed = [name for name, stored in source.tensors.items() if stored.dtype not in FLOATS]
    if values.get("quantization_config") and packed:
        kind = f"{cut(packed[0], 100)} has dtype {source.tensors[packed[0]].dtype}"
        raise ValueError(f"quantization_config: quantised weights cannot be converted: {kind}")


def check_tokenizer(folder: Path, config: OpenLlamaConfig) -> list[str]:
    """Try the tokenizer, and say what is wrong with it. The weights are good without it."""
    try:
        for name in COPIED:
            if name.endswith(".json"):
                read_json_if_there(folder / name)
        load_tokenizer(folder, config.bos_token_id)
    except (FileNotFoundError, ImportError):  # there is none, or what reads it is not installed
        return []
    except (ValueError, OSError) as error:
        return [f"openllama.py cannot read the tokenizer: {error}"]
    return []


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


def largest_number(blocks: Iterator[Tensor]) -> float:
    """Give the largest magnitude in a tensor, infinities and NaN aside."""
    finite = (rows.where(rows.isfinite(), 0) for rows in blocks)
    return max(float(rows.abs().max()) for rows in finite)


def check_destination(src: Path, dst: Path, overwrite: bool) -> list[str]:
    """List what is wrong with the destination. Whatever is replaced there is lost in the end.

    So what holds the source is never replaced, nor what a file of the source links to.
    """
    problems = []
    places = [path.resolve() for path in (src, *src.iterdir())]
    if any(holds(folder, path) for folder in (dst, workplace(dst)) for path in places):
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


def holds(folder: Path, path: Path) -> bool:
    """Tell whether a folder is a path's own or above it, under whatever name it is mounted."""
    if not folder.exists():
        return False
    return any(other.exists() and folder.samefile(other) for other in (path, *path.parents))


def is_replaceable(folder: Path) -> bool:
    """Tell a checkpoint, or an empty folder, from one that --overwrite was not meant for."""
    names = [path.name for path in folder.iterdir()]
    weights = [name for name in names if name.startswith(("model", "pytorch_model"))]
    return not names or ("config.json" in names and len(weights) > 0)


def check_space(dst: Path, size: int) -> None:
    """Compare the size of the result with the free space.

    What a killed run has left counts as free, as it is removed before anything is written.
    """
    freed = sum(file.stat().st_size for file in (workplace(dst) / "new").rglob("*"))
    free = shutil.disk_usage(dst.parent).free + freed
    has = f"{dst.parent} has {readable(free)} of free space"
    expect(free > size, f"{has}: expected {readable(size)}")


# --- Writing ---------------------------------------------------------------------------------


def workplace(dst: Path) -> Path:
    """Name the folder that a conversion works in: beside dst, hence on the same disk."""
    return dst.with_name(f".{dst.name}.converting")


def write(plan: Plan, src: Path, dst: Path, overwrite: bool) -> None:
    """Carry out the plan beside dst, and let the result take its place.

    A rename is done at once or not at all: at no moment is there half a checkpoint at dst.
    """
    with working_at(dst) as place:
        refuse(check_destination(src, dst, overwrite))  # a killed run may have left dst elsewhere
        new = place / "new"
        new.mkdir()
        write_checkpoint(plan, new)
        refuse(check_destination(src, dst, overwrite))  # as it may have come to be meanwhile
        if not dst.exists():
            new.rename(dst)
        elif not exchange(new, dst):
            dst.rename(place / "old")
            new.rename(dst)


@contextmanager
def working_at(dst: Path) -> Iterator[Path]:
    """Make the folder to work in, and clear up there in the end, as after a run that was killed."""
    place = workplace(dst)
    expect(not place.is_symlink(), f"{place} is a link: expected nothing there")
    place.mkdir(exist_ok=True)
    with locked(place, dst):
        bring_back(place, dst)
        for path in place.iterdir():
            shutil.rmtree(path, ignore_errors=True)
        try:
            yield place
        finally:
            bring_back(place, dst)
            # what cannot be removed stays: it is hidden, and a whole result is no failure
            shutil.rmtree(place, ignore_errors=True)


def bring_back(place: Path, dst: Path) -> None:
    """Bring an old checkpoint back that nothing has replaced."""
    old = place / "old"
    if old.exists() and not dst.exists():
        old.rename(dst)


@contextmanager
def locked(place: Path, dst: Path) -> Iterator[None]:
    """Keep other runs to the same dst out, which would clear up there; a lock ends with its run."""
    if os.name == "nt":  # where two runs are the user's affair
        yield
        return
    folder = os.open(place, os.O_RDONLY)
    try:
        expect(takes_lock(folder, place), f"another conversion to {dst} is at work")
        yield
    finally:
        os.close(folder)


def takes_lock(folder: int, place: Path) -> bool:
    import fcntl

    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some network disks have no locks
        pass
    try:
        return os.path.samestat(os.fstat(folder), place.stat())
    except FileNotFoundError:  # the other run has just ended, and removed it
        return False


def exchange(a: Path, b: Path) -> bool:
    """Let two folders change places in one instant, if the system can, as Linux does."""
    at_any_folder = -100  # AT_FDCWD
    exchanging = 2  # RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, TypeError, OSError):
        return False
    return renameat2(at_any_folder, bytes(a), at_any_folder, bytes(b), exchanging) == 0


def write_checkpoint(plan: Plan, folder: Path) -> None:
    """Write all files of the result. As in transformers, a single file needs no index."""
    with progress(plan) as advance:
        targets = {target.name: target for target in plan.targets}
        for file, names in plan.shards.items():
            write_shard(folder / file, [targets[name] for name in names], plan.source, advance)
    if len(plan.shards) > 1:
        (folder / INDEX).write_text(index_text(plan.shards, plan.like))
    for path in plan.copied:
        shutil.copyfile(path, folder / path.name)
    (folder / "config.json").write_text(plan.config_text())


def write_shard(path: Path, shard: list[Target], source: Source, advance: Callable) -> None:
    """Write a file of safetensors: the header, then the bytes of the tensors."""
    with naming(path), open(path, "wb", buffering=0) as file:
        write_all(file, safetensors_header({target.name: target.like for target in shard}))
        for target in shard:
            for size in write_tensor(file, target, source):
                advance(bytes=size)
            advance(tensors=1)
    advance(files=1)


def write_tensor(file: FileIO, target: Target, source: Source) -> Iterator[int]:
    """Write a tensor, and give the number of bytes of each part that is done."""
    stored = source.tensors[target.source]
    if target.is_copy(stored) and hasattr(os, "sendfile"):
        try:
            yield from copy_bytes(stored, file)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK):
                raise
        else:
            return
    for block in target.blocks(source):
        write_all(file, block.view(torch.uint8).numpy())
        yield block.nbytes


def copy_bytes(stored: Stored, file: FileIO) -> Iterator[int]:
    """Copy from file to file in the kernel. A system that cannot says so at the first part."""
    with open(stored.path, "rb") as source:
        done = 0
        while done < stored.size:
            part = min(stored.size - done, PART)
            copied = os.sendfile(file.fileno(), source.fileno(), stored.offset + done, part)
            expect(copied > 0, f"{stored.path} has changed while it was read")
            done += copied
            yield copied


def write_all(file: FileIO, data: bytes) -> None:
    """Write to a file without a buffer, which may take less than it is given."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[file.write(rest) :]


@contextmanager
def progress(plan: Plan) -> Iterator[Callable]:
    """Count what is done, and show it on stderr.

    A terminal has one line, which is written over; anything else gets a line per file. What is
    given calls `advance` with what has been done since: bytes, tensors, files.
    """
    start = time.perf_counter()
    done = Counter()
    terminal = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
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
        say(f"{tensors}, {size}, {rate:.0f} MB/s  ", end=line_end)

    try:
        yield advance
    finally:
        if terminal:
            say("")


def say(text: str, end: str = "\n") -> None:
    """Tell it on stderr, to whoever is there: a conversion does not end because nobody is."""
    try:
        if sys.stderr is not None:
            print(text, end=end, file=sys.stderr, flush=True)
    except (OSError, ValueError):  # nobody reads it, or it is closed
        pass


# --- Command line ----------------------------------------------------------------------------


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: str = "keep",
    max_shard_size: str = "2GB",
    overwrite: bool = False,
    dry_run: bool = False,
    to: str = "open-llama",
) -> None:
    """Convert the checkpoint in the folder src into a new one, dst: of an Open-Llama, or a LLaMA.

    With dry_run, everything is checked, and the plan is printed; nothing is written.

    ValueError lists all that is wrong with either folder. OSError tells what the system refused.
    After both, dst is as it was.
    """
    start = time.perf_counter()
    folder = Path(os.path.realpath(dst))  # which, unlike resolve, bears a link to itself
    plan = Plan(Path(src), folder, to, dtype, max_shard_size, overwrite)
    if dry_run:
        print(plan)
        return
    write(plan, Path(src), folder, overwrite)
    seconds = time.perf_counter() - start
    say(f"{plan}\n{folder} is ready, after {seconds:.1f} s")


def make_parser() -> ArgumentParser:
    """Make the parser; its results are named as the arguments of convert."""
    parser = ArgumentParser(
        description="Convert an Open-Llama or LLaMA checkpoint for openllama.py, or to a LLaMA."
    )
    add = parser.add_argument
    add(
        "src",
        metavar="SRC",
        help="folder of config.json and safetensors or pytorch_model.bin, in one file or shards",
    )
    add("dst", metavar="DST", help="folder to be made")
    add(
        "--to",
        choices=RESULTS,
        default="open-llama",
        help="llama: for all that runs a LLaMA; default: %(default)s",
    )
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
        say(f"convert_checkpoint.py: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # a megabyte at a time, threads would only wait for each other
    sys.exit(main())
