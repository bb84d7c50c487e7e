# SPDX-License-Identifier: MIT
"""Turn a checkpoint of Open-Llama or LLaMA into one that openllama.py and transformers 4.31 load;
or, with --to llama, into a LLaMA, which runs wherever LLaMA does.

First a plan is made from config.json and the headers of the files, and checked whole: which tensor
of the source each tensor of the result comes from, and its type. Then the files of the result are
made one after the other, in a folder beside the destination, which is renamed to it in the end. So
a run that fails or is killed leaves nothing there, and the next one succeeds. The source is mapped,
so that memory holds one file of the result (2 GB) and little more.

This file leaves out: replacing what exists, merging adapters, quantised weights, pickles from
before torch 1.6, and a lock against two runs to the same destination.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from struct import error as StructError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openllama import OpenLlamaConfig, expect, load_tokenizer, read_json
from openllama import OpenLlamaForCausalLM as LanguageModel
from openllama import OpenLlamaForSequenceClassification as Classifier

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = ("model.embed_layer_norm.weight", "model.embed_layer_norm.bias")  # of a stable embedding
COMPUTED = "rotary_emb.inv_freq"  # ends names in old files, of what is computed and no weight
RESULTS = ("open-llama", "llama")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# The files beside the weights that the result needs, too.
TOKENIZERS = ("tokenizer.model", "tokenizer.json", "vocab.json", "merges.txt")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
COPIED = (*TOKENIZERS, *SETTINGS, "chat_template.jinja")

# Keys of config.json that are read, or without effect; that others are passed over is told.
UNTOLD = {
    *("num_key_value_heads", "head_dim", "attention_dropout", "rope_parameters", "label2id"),
    *("model_type", "architectures", "torch_dtype", "dtype", "transformers_version"),
    *("_name_or_path", "tokenizer_class", "pretraining_tp", "use_memorry_efficient_attention"),
}


# --- Reading a checkpoint --------------------------------------------------------------------


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """Put an error on the list, so that what else is wrong can be found, too."""
    try:
        yield
    except (ValueError, OSError, RecursionError) as error:  # of nested JSON, the last
        problems.append(str(error))


def refuse(problems: list[str]) -> None:
    """Raise a ValueError with all problems, or the first 20 of them, each a line, if any."""
    lines = [textwrap.shorten(problem, 1000) for problem in problems[:20]]
    if len(problems) > 20:
        lines.append(f"and {len(problems) - 20} more")
    if len(problems) > 1:
        lines.insert(0, f"{len(problems)} problems")
    expect(not problems, "\n  ".join(lines))


def find_files(folder: Path) -> list[Path]:
    """Find the files of the weights: safetensors rather than pickles, one file rather than shards.

    Of an index only the names of the files count. What they hold is seen in the files themselves.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        weight_map = read_json(index).get("weight_map")
        expect(isinstance(weight_map, dict), f"{index} has no weight_map from tensors to files")
        for file in weight_map.values():
            beside = isinstance(file, str) and Path(file).name == file
            expect(beside, f"weight_map in {index} names {file!r}: expected a file beside it")
        return [folder / file for file in sorted(set(weight_map.values()))]
    raise FileNotFoundError(f"{folder} has no model.safetensors, pytorch_model.bin, or index")


# what damaged bytes have led safetensors and torch.load to
BROKEN_FILE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)
BROKEN_FILE += (AssertionError, EOFError, SafetensorError, UnpicklingError, StructError)


def map_file(path: Path) -> dict[str, Tensor]:
    """Give the tensors of a file by their names, mapped into memory rather than read."""
    with open(path, "rb") as begin:
        pointer = begin.read(23) == b"version https://git-lfs"
    expect(not pointer, f"{path} is a git-lfs pointer, not the file: git lfs pull gets it")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in list(file.keys())}
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except BROKEN_FILE as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    expected = f"{path} holds more than weights: expected a dict of plain tensors"
    expect(isinstance(tensors, dict), expected)
    for name, tensor in tensors.items():
        plain = isinstance(name, str) and type(tensor) in (Tensor, nn.Parameter)
        expect(plain and tensor.layout == torch.strided and not tensor.is_meta, expected)
    return tensors


# Whatever comes before one of these is not Open-Llama's, as in module.model.layers.0 of
# DistributedDataParallel or base_model.model.model.layers.0 of peft. A bare decoder has layers.0.
NAME = re.compile(r"(?:.*?\.)??((?:embed_tokens|embed_layer_norm|layers|norm|lm_head|score)\..+)")


def plain_name(name: str) -> str:
    """Give the name that a tensor has in an Open-Llama. torch.compile can add to it anywhere."""
    found = NAME.fullmatch(name.replace("_orig_mod.", ""))
    if not found:
        return name
    if found[1].startswith(("lm_head.", "score.")):
        return found[1]
    return f"model.{found[1]}"


def read_tensors(files: list[Path], problems: list[str]) -> dict[str, Tensor]:
    """Map all files, and call their tensors by Open-Llama's names. Problems are added to."""
    tensors = {}
    for path in files:
        with collecting(problems):
            for name, tensor in map_file(path).items():
                floats = tensor.dtype in (torch.float64, *DTYPES.values())
                expect(floats, f"{path} has quantised weights: {name} of type {tensor.dtype}")
                plain = plain_name(name)
                if plain in tensors and not plain.endswith(COMPUTED):
                    problems.append(f"{plain} is there twice, the second time in {path}")
                tensors[plain] = tensor
    return tensors


# --- Reading its config.json -----------------------------------------------------------------


def read_config(folder: Path) -> tuple[OpenLlamaConfig, int, dict]:
    """Give the configuration, the query heads to each head of keys, and all of config.json."""
    values = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        ends = read_json(generation).get("eos_token_id")
        if ends is not None:  # they count more, as in transformers
            values["eos_token_id"] = ends
    check_settings(values)
    config = make_config(values)
    heads = config.num_attention_heads
    stored = values.get("num_key_value_heads") or heads
    fits = type(stored) is int and stored > 0 and heads % stored == 0
    expect(fits, f"num_key_value_heads={stored!r}: expected a divisor of {heads} query heads")
    return config, heads // stored, values


def check_settings(values: dict) -> None:
    """Refuse what would be computed otherwise, as far as neither shapes nor make_config show it."""
    kind = values.get("model_type", "open-llama")
    known = kind in ("open-llama", "open_llama", "llama")
    expect(known, f"model_type={kind!r}: expected 'open-llama' or 'llama'")
    same = {"attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1}
    if values.get("use_sliding_window") is not False:
        same["sliding_window"] = None
    for name, value in same.items():
        given = values.get(name)
        expect(given in (None, value), f"{name}={given!r}: an Open-Llama has nothing but {value}")


def make_config(values: dict) -> OpenLlamaConfig:
    """Say in Open-Llama's settings what a config.json says, in any of the spellings found."""
    is_llama = values.get("model_type") == "llama"
    own = [field.name for field in fields(OpenLlamaConfig)]
    settings = {"pad_token_id": 0}
    if is_llama:
        settings = {"pad_token_id": None, "vocab_size": 32000}
    for key, value in values.items():
        key = key.replace("memorry", "memory")  # which transformers 4.31 misspells
        if key in own:
            settings[key] = value
    if is_llama:
        settings |= {
            "use_stable_embedding": False,
            "shared_input_output_embedding": values.get("tie_word_embeddings", False),
            "tie_word_embeddings": False,
            "hidden_dropout_prob": 0.0,
            "attention_dropout_prob": values.get("attention_dropout") or 0.0,
        }
    settings |= rope_settings(values)
    pad = settings.pop("pad_token_id")
    config = OpenLlamaConfig(**settings, pad_token_id=None)
    if type(pad) is int and pad not in range(config.vocab_size):
        return config  # the oldest files say -1 for none, and others the first id of no token
    return replace(config, pad_token_id=pad)


def rope_settings(values: dict) -> dict:
    """Read rope_scaling, whose type became rope_type, or transformers 5's rope_parameters."""
    given = values.get("rope_parameters") or values.get("rope_scaling") or {}
    expected = f"rope_scaling={given}: expected type linear or dynamic, a factor, and no more"
    expect(isinstance(given, dict), expected)
    rope = {key: value for key, value in given.items() if value is not None}
    theta = rope.pop("rope_theta", values.get("rope_theta", 10000.0))
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind)
    factor = rope.pop("factor", None)
    length = values.get("max_position_embeddings", 2048)
    original = rope.pop("original_max_position_embeddings", length)  # which may be said again
    expect(original == length and not rope, expected)
    if kind == "default" or (kind, factor) in ((None, None), ("linear", 1)):
        return {"rope_theta": theta, "rope_scaling": None}
    in_range = isinstance(factor, int | float) and 1 <= factor < 1e6
    expect(kind in ("linear", "dynamic") and in_range, expected)
    scaling = {"type": kind, "factor": float(factor)}  # transformers 4.31 refuses an integer
    return {"rope_theta": theta, "rope_scaling": scaling}


# --- Planning --------------------------------------------------------------------------------


@dataclass
class Target:
    """A tensor of the result, and how it is made of one of the source."""

    name: str
    source: Tensor
    like: Tensor  # of the result's type and shape, without memory
    block: int  # the rows of a head: of keys and values these are repeated, of others just handy
    is_alone: bool  # in its memory, as are those of safetensors, and of pickles not always
    norm: tuple[Tensor, ...]  # weight and bias of the stable embedding's LayerNorm, or nothing

    def make(self) -> Tensor:
        """Make the tensor. ValueError for a number that is too large for its type."""
        dtype = self.like.dtype
        changed = dtype != self.source.dtype or self.like.shape != self.source.shape or self.norm
        if self.is_alone and not changed:
            return self.source
        result = torch.empty(self.like.shape, dtype=dtype)
        repeat = len(result) // len(self.source)
        parts = result.split(repeat * self.block)
        for rows, part in zip(self.source.split(self.block), parts, strict=True):
            if self.norm:
                weight, bias = self.norm
                rows = F.layer_norm(rows.double(), weight.shape, weight, bias)
            copies = part.unflatten(0, (repeat, -1))
            copies.copy_(rows)  # which casts it, too
            if copies.isinf().any():  # as it may have been before
                largest = rows.where(rows.isfinite(), 0).abs().max()
                fits = largest.to(dtype).isfinite()
                expect(fits, f"{self.name} does not fit {dtype}: it holds {largest:g}")
        return result


def tensors_of(model: type, config: OpenLlamaConfig) -> dict[str, Tensor]:
    """Give the tensors of a model by their names, without memory."""
    try:
        with torch.device("meta"):
            return model(config).state_dict()
    except (RuntimeError, TypeError, OverflowError) as error:  # for sizes that no tensor can have
        raise ValueError(f"config.json has impossible sizes: {error}") from None


def match(tensors: dict[str, Tensor], expected: dict[str, Tensor], group: int) -> list[str]:
    """List the tensors that do not fit those of their model. group: query heads to one of keys.

    A head that is the embedding may have been saved with it, or in its stead, which is mended.
    """
    problems = []
    if HEAD in tensors and HEAD not in expected and "score.weight" not in expected:
        head = tensors.pop(HEAD)
        embedding = tensors.setdefault(EMBEDDING, head)
        if head.dtype != embedding.dtype or not head.equal(embedding):
            problems.append(f"{HEAD} differs from {EMBEDDING}, to which config.json ties it")
    wanted = {name: list(tensor.shape) for name, tensor in expected.items()}
    for name, shape in wanted.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            shape[0] //= group
    found = {name: list(tensors[name].shape) for name in tensors if not name.endswith(COMPUTED)}
    for name in wanted | found:
        a = found.get(name, "nothing")
        b = wanted.get(name, "nothing")
        if a != b:
            problems.append(f"{name}: found {a}, expected {b}")
    return problems


def make_plan(src: Path, dst: Path, to: str, dtype: str) -> tuple[list[Target], dict, list[str]]:
    """Give the tensors of the result, its config.json, and notes. ValueError lists what is wrong.

    What the tensors are is looked at only where all else is right.
    """
    expect(to in RESULTS, f"to={to!r}: expected one of {RESULTS}")
    expect(dtype in ("keep", *DTYPES), f"dtype={dtype!r}: expected keep or one of {list(DTYPES)}")
    problems = []
    with collecting(problems):
        expect(not os.path.lexists(dst), f"{dst} exists: expected a folder to be made")
        expect(os.access(dst.parent, os.W_OK), f"{dst.parent} is no folder to write in")
    with collecting(problems):
        config, group, values = read_config(src)
        architectures = str(values.get("architectures"))
    with collecting(problems):
        files = find_files(src)
        tensors = read_tensors(files, problems)
    refuse(problems)

    layers = config.num_hidden_layers  # of too many, a model would never be ready
    fits = layers <= len(tensors)
    expect(fits, f"num_hidden_layers={layers}: expected fewer, of {len(tensors)} tensors")
    model = LanguageModel
    if "score.weight" in tensors or "ForSequence" in architectures:
        model = Classifier
    refuse(match(tensors, tensors_of(model, config), group))

    result = config
    norms = {}
    if to == "llama":
        result = without_stable_embedding(config)
    if to == "llama" and config.use_stable_embedding:
        norms[EMBEDDING] = tuple(tensors[name].double() for name in NORM)
    is_alone = files[0].suffix == ".safetensors"
    head_dim = config.hidden_size // config.num_attention_heads
    targets = []
    for name, like in tensors_of(model, result).items():
        source = tensors.get(name, tensors[EMBEDDING])  # the latter for a head that was shared
        like = like.to(DTYPES.get(dtype, source.dtype))
        targets.append(Target(name, source, like, head_dim, is_alone, norms.get(name, ())))
    return targets, result_values(result, model, targets, to), take_notes(src, values, result, to)


def parse_size(text: str) -> float:
    """Give the number of bytes in a size like 500MB or 2GB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B", text.upper())
    expect(found is not None, f"max_shard_size={text!r}: expected a size, as in 500MB or 2GB")
    return float(found[1]) * 1000 ** ["", "K", "M", "G", "T"].index(found[2])


def deal(targets: list[Target], limit: float) -> dict[str, list[Target]]:
    """Deal tensors to files of at most `limit` bytes, or of one tensor that is larger."""
    shards = [[]]
    size = 0
    for target in targets:
        if shards[-1] and size + target.like.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(target)
        size += target.like.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    last = f"of-{len(shards):05}.safetensors"
    return {f"model-{number:05}-{last}": shard for number, shard in enumerate(shards, start=1)}


# Of the three changes that make an Open-Llama of a LLaMA, attention is only computed differently,
# and the shared embedding can be written twice. The stable embedding is a function of the token
# alone: so the LayerNorm of each row is computed once and for all, and is LLaMA's embedding.


def without_stable_embedding(config: OpenLlamaConfig) -> OpenLlamaConfig:
    """Say how the result is built. Its two matrices are one only where they are equal."""
    shared = config.shared_input_output_embedding or config.tie_word_embeddings
    shared = shared and not config.use_stable_embedding
    changes = {"use_stable_embedding": False, "tie_word_embeddings": False}
    return replace(config, **changes, shared_input_output_embedding=shared)


def result_values(config: OpenLlamaConfig, model: type, targets: list[Target], to: str) -> dict:
    """Give the result's config.json, and there what tells a reader which class to load."""
    dtype = reduce(torch.promote_types, {target.like.dtype for target in targets})
    name = model.__name__
    values = config.to_dict()
    if config.id2label:
        values["label2id"] = {label: number for number, label in config.id2label.items()}
    if to == "llama":
        name = name.removeprefix("Open")
        del values["use_memory_efficient_attention"]
        del values["use_stable_embedding"]
        del values["hidden_dropout_prob"]  # after the MLP, where a LLaMA has none
        values |= {
            "model_type": "llama",
            "num_key_value_heads": config.num_attention_heads,
            "attention_dropout": values.pop("attention_dropout_prob"),
            "tie_word_embeddings": values.pop("shared_input_output_embedding"),
        }
    return values | {"architectures": [name], "torch_dtype": str(dtype).removeprefix("torch.")}


def take_notes(src: Path, values: dict, config: OpenLlamaConfig, to: str) -> list[str]:
    """Say what the user may not expect, though nothing is wrong with it."""
    notes = []
    known = UNTOLD | {field.name for field in fields(OpenLlamaConfig)}
    others = [key for key in values if values[key] and key not in known]
    if others:
        notes.append(f"passed over, as an Open-Llama has no such settings: {', '.join(others)}")
    if config.rope_theta != 10000:
        notes.append(f"rope_theta={config.rope_theta} is ignored by transformers 4.31")
    if to == "llama" and config.rope_scaling and config.rope_scaling["type"] == "dynamic":
        differs = "its base follows the longest row of a batch, and cached keys keep theirs"
        notes.append(f"dynamic scaling differs elsewhere, beyond the trained length: {differs}")
    for path in (*src.glob("adapter_*"), *src.glob("*/adapter_*")):
        notes.append(f"{path} belongs to an adapter, which is not merged into the weights")
    try:
        load_tokenizer(src, config.bos_token_id)
    except (FileNotFoundError, ImportError):
        pass  # there is none, or what reads it is not installed
    except (ValueError, OSError) as error:
        notes.append(f"openllama.py cannot read the tokenizer: {error}")
    return notes


def table(shards: dict[str, list[Target]]) -> str:
    """Show the plan: a line for each file, and for each kind of tensor, whatever its layer."""
    lines = [f"{file}: {shown(shard)}" for file, shard in shards.items()]
    kinds = Counter()
    for target in itertools.chain.from_iterable(shards.values()):
        kind = re.sub(r"\.\d+\.", ".*.", target.name)
        old = f"{target.source.dtype} {list(target.source.shape)}"
        new = f"{target.like.dtype} {list(target.like.shape)}"
        if target.norm:
            new += ", normalised"
        kinds[f"{kind:46} {old:28} to {new}".replace("torch.", "")] += 1
    return "\n".join(lines + [f"{count:3} x {kind}" for kind, count in kinds.items()])


def shown(shard: list[Target]) -> str:
    parameters = sum(target.like.numel() for target in shard)
    size = sum(target.like.nbytes for target in shard)
    return f"{len(shard)} tensors, {parameters:,} parameters, {size / 1e9:.3f} GB"


# --- Writing ---------------------------------------------------------------------------------


def write(shards: dict[str, list[Target]], values: dict, src: Path, dst: Path) -> None:
    """Write the files beside dst, in a folder that takes its name when it is whole."""
    place = dst.with_name(f".{dst.name}.converting")
    inside = place.resolve() in (src.resolve(), *src.resolve().parents)
    expect(not inside, f"{src} lies in {place}, which is cleared: rename that first")
    shutil.rmtree(place, ignore_errors=True)  # what a killed run has left
    place.mkdir()
    with ExitStack() as undo:
        undo.callback(shutil.rmtree, place, ignore_errors=True)
        write_files(shards, values, place)
        for name in COPIED:
            if (src / name).is_file():
                shutil.copyfile(src / name, place / name)
        undo.pop_all()  # as it is whole
    expect(not os.path.lexists(dst), f"{dst} has come to be meanwhile; the result is in {place}")
    place.rename(dst)


def write_files(shards: dict[str, list[Target]], values: dict, folder: Path) -> None:
    """Write the weights, config.json and, as in transformers, an index where there are shards."""
    texts = {"config.json": values}
    if len(shards) > 1:
        weight_map = {target.name: file for file, shard in shards.items() for target in shard}
        size = sum(target.like.nbytes for shard in shards.values() for target in shard)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        texts["model.safetensors.index.json"] = index
    for file, value in texts.items():
        (folder / file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    for file, shard in shards.items():
        tensors = {target.name: target.make() for target in shard}
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:  # as of a disk that is full
            raise OSError(f"{folder / file} cannot be written: {error}") from None
        del tensors  # before those of the next file are made
        shutil.copymode(folder / "config.json", folder / file)  # which save_file makes private
        print(f"{file}: {shown(shard)}", file=sys.stderr)


# --- Command line ----------------------------------------------------------------------------


@torch.no_grad()
def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: str = "open-llama",
    dtype: str = "keep",
    max_shard_size: str = "2GB",
    dry_run: bool = False,
) -> None:
    """Convert the checkpoint in the folder src into a new folder dst, or print the plan (dry_run).

    ValueError tells what is wrong with them, OSError what the system refused. dst is then absent.
    """
    src, dst = Path(src), Path(dst)
    targets, values, notes = make_plan(src, dst, to, dtype)
    shards = deal(targets, parse_size(max_shard_size))
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if dry_run:
        print(table(shards))
        return
    write(shards, values, src, dst)
    print(f"{dst} is ready", file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; its results are named as the arguments of convert."""
    parser = argparse.ArgumentParser(description="Convert an Open-Llama or LLaMA for openllama.py.")
    add = parser.add_argument
    add("src", metavar="SRC", help="folder of config.json and the weights, in either format")
    add("dst", metavar="DST", help="folder to be made")
    add("--to", choices=RESULTS, default="open-llama", help="default: %(default)s")
    add("--dtype", choices=("keep", *DTYPES), default="keep", help="default: %(default)s")
    add("--max-shard-size", metavar="SIZE", default="2GB", help="of a file; default: %(default)s")
    add("--dry-run", action="store_true", help="check everything, and print the plan only")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and give the exit status: 2 for a mistake, 130 when interrupted."""
    arguments = make_parser().parse_args(argv)
    try:
        convert(**vars(arguments))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # on a busy machine threads wait for each other at every head
    sys.exit(main())
