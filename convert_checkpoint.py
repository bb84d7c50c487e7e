# SPDX-License-Identifier: MIT
"""Turn a Hugging Face checkpoint of Open-Llama or LLaMA into one that openllama.py and transformers 4.31 load.

First a plan is made from the files' headers alone, and checked whole: each tensor of the result, the source's tensor
that it comes from, and what happens on the way (key and value heads are repeated, dtypes are cast). Then it is
streamed, a megabyte at a time, into a temporary folder beside the destination, which takes its place in the end.
However large the model, memory stays at some hundred megabytes; whenever it is killed, the destination is whole or
absent, and the next run succeeds.
"""

import argparse
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

from openllama import OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, expect, read_json

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
COPIED = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
COPIED.append("generation_config.json")
LLAMA_KEYS = {field.name for field in fields(OpenLlamaConfig)}.union(  # of its config.json; OpenLlamaConfig judges them
    ("id2label", "rope_parameters", "head_dim", "attention_bias", "mlp_bias", "quantization_config")
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BLOCK, WINDOW = 2**20, 2**27  # bytes that are converted at a time, and that are read through one mapping of a file


def report(problems: list[str]) -> None:
    """ValueError with all problems, or the first 20 of them, each a line; nothing where there are none."""
    lines = [" ".join(problem.split()) for problem in problems]
    more = [f"and {len(lines) - 20} more"] if len(lines) > 20 else []
    head = [f"{len(lines)} problems"] if len(lines) > 1 else []
    expect(not lines, "\n  ".join([*head, *lines[:20], *more]))


def map_file(path: Path) -> dict[str, Tensor]:
    """A file's tensors by name, mapped rather than read. ValueError where it is broken or holds anything else."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in sorted(file.keys())}
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise ValueError(f"{path} holds more than weights{code and f', and would run {code[1]}' or ''}") from None
    except (SafetensorError, OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
            EOFError) as error:  # fmt: skip
        raise ValueError(f"{path} is no whole file of safetensors, or of torch.save since 1.6: {error}") from None
    plain = lambda value: isinstance(value, Tensor) and value.layout == torch.strided
    fits = isinstance(tensors, dict) and all(isinstance(name, str) and plain(tensors[name]) for name in tensors)
    expect(fits, f"{path} holds more than weights: expected a dict of plain tensors")
    return tensors


def data_offsets(path: Path) -> dict[str, int]:
    """Where each tensor's bytes begin in a file of safetensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + header[name]["data_offsets"][0] for name in header.keys() - {"__metadata__"}}


def find_files(folder: Path) -> tuple[list[str], Path | None, dict[str, str]]:
    """The weights' files; and, where there is one, their index and the file that it tells for each tensor."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [name], None, {}
        if path.is_file():
            index = read_json(path).get("weight_map")
            fits = index and isinstance(index, dict) and all(isinstance(file, str) for file in index.values())
            expect(fits, f"{path} has no weight_map from tensors to files")
            return sorted(set(index.values())), path, index
    raise FileNotFoundError(f"{folder} has no weights: expected model.safetensors or pytorch_model.bin, or an index")


class Source:
    """The tensors of a checkpoint's files: dtype and shape at hand, rows on demand. Adds what is wrong to problems."""

    def __init__(self, folder: Path, problems: list[str]):
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.holders: dict[str, list[Path]] = defaultdict(list)
        self.offsets: dict[str, int] = {}  # of the tensors in files of safetensors
        self.mapped_path, self.mapped, self.read = None, {}, 0
        self.files, index_path, index = find_files(folder)
        for path in [folder / file for file in self.files]:
            try:
                beside = path.parent == folder and path.name != ".."
                expect(beside, f"{index_path} names {path}: expected a file beside it")
                expect(path.is_file(), f"{path} is missing")
                for name, tensor in map_file(path).items():
                    self.tensors[name] = (tensor.dtype, tuple(tensor.shape))
                    self.holders[name].append(path)
                if path.suffix == ".safetensors":
                    self.offsets |= data_offsets(path)
            except ValueError as error:
                problems.append(str(error))
                index = {name: file for name, file in index.items() if folder / file != path}
        for name in self.tensors | index:
            found, told = [path.name for path in self.holders.get(name, ())] or ["no file"], index.get(name, "no file")
            if len(found) > 1:
                problems.append(f"{name} is there twice, in {' and '.join(found)}")
            elif index_path and found != [told]:
                problems.append(f"{name} is in {found[0]}, but {index_path} tells of {told}")

    def blocks(self, name: str, rows: int = 1) -> Iterator[Tensor]:
        """A tensor's rows in turn, about BLOCK bytes and a multiple of `rows` at a time; each is gone with the next.

        Safetensors are read, which is as fast as copying a file. Of a pickle only a mapping is to be had; what was read
        through it counts as this process's memory, so that it is renewed after WINDOW bytes.
        """
        (dtype, shape), [path] = self.tensors[name], self.holders[name]
        size = prod(shape[1:]) * dtype.itemsize
        step = rows * max(1, BLOCK // (rows * size))
        starts = range(0, shape[0], step)
        if path.suffix == ".safetensors":
            buffer = bytearray(min(step, shape[0]) * size)
            with open(path, "rb", buffering=0) as file:
                file.seek(self.offsets[name])
                for start in starts:
                    read = memoryview(buffer)[: (min(start + step, shape[0]) - start) * size]
                    expect(file.readinto(read) == len(read), f"{path} has changed while it was read")
                    yield torch.frombuffer(read, dtype=dtype).view(-1, *shape[1:])
            return
        for start in starts:
            if self.mapped_path != path or self.read > WINDOW:
                self.mapped_path, self.mapped, self.read = path, map_file(path), 0
            self.read += step * size
            yield self.mapped[name][start : start + step]


@dataclass
class Target:
    """A tensor of the result: that of `source`, in `dtype`, with each head, of D rows, coming `repeat` times."""

    name: str
    source: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    repeat: int
    D: int

    @property
    def size(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def blocks(self, source: Source) -> Iterator[Tensor]:
        for block in source.blocks(self.source, self.D):
            cast = block.to(self.dtype)
            suspect = cast.dtype != block.dtype and not torch.stack(cast.aminmax()).isfinite().all()
            if suspect and (cast.isinf() & block.isfinite()).any():
                largest = max(float(rows.where(rows.isfinite(), 0).abs().max()) for rows in source.blocks(self.source))
                raise ValueError(f"{self.source} does not fit {self.dtype}: its largest value is {largest:g}")
            if self.repeat > 1:  # (heads, 1, D, C) to (heads, repeat, D, C)
                cast = cast.unflatten(0, (-1, 1, self.D)).expand(-1, self.repeat, -1, -1).flatten(0, 2)
            yield cast.contiguous()


def read_config(folder: Path) -> tuple[OpenLlamaConfig, int, dict]:
    """The result's configuration; how many query heads share a stored key and value head; the source's config.json."""
    values = read_json(folder / "config.json")
    kind, labels = values.get("model_type", "open-llama"), values.get("id2label") or {}
    expect(kind in ("open-llama", "open_llama", "llama"), f"model_type={kind!r}: expected 'open-llama' or 'llama'")
    expect(isinstance(labels, dict), f"id2label={labels!r}: expected an object")
    if kind != "llama":
        return OpenLlamaConfig.from_dict(values), 1, values
    tied = values.get("tie_word_embeddings", False)
    expect(type(tied) is bool, f"tie_word_embeddings={tied!r}: expected true or false")
    own = {"vocab_size": 32000} | {key: value for key, value in values.items() if key in LLAMA_KEYS}
    config = OpenLlamaConfig.from_dict(own | {
        "pad_token_id": None, "use_stable_embedding": False, "tie_word_embeddings": False,
        "shared_input_output_embedding": tied,
        "hidden_dropout_prob": 0.0, "attention_dropout_prob": values.get("attention_dropout") or 0.0,
    })  # fmt: skip
    H, pad = config.num_attention_heads, values.get("pad_token_id")
    config.pad_token_id = pad if type(pad) is int and pad in range(config.vocab_size) else None  # -1 in the oldest
    stored = values.get("num_key_value_heads") or H
    fits = type(stored) is int and stored > 0 and H % stored == 0
    expect(fits, f"num_key_value_heads={stored!r}: expected a divisor of num_attention_heads={H}")
    return config, H // stored, values


def check_destination(src: Path, dst: Path, overwrite: bool) -> Iterator[str]:
    if src.resolve().is_relative_to(dst):
        yield f"{dst} is the source, or holds it"
    elif dst.exists() and not dst.is_dir():
        yield f"{dst} is a file: expected a folder, to be made"
    elif dst.exists() and not overwrite:
        yield f"{dst} exists: --overwrite would replace it"
    elif dst.exists() and any(dst.iterdir()) and not (dst / "config.json").is_file():
        yield f"{dst} is no checkpoint, and is not replaced"
    if not os.access(dst.parent, os.W_OK | os.X_OK):
        yield f"{dst.parent} is no folder to write in"


def leftovers(dst: Path) -> list[Path]:
    """Temporary folders of runs that were killed."""
    return [path for path in dst.parent.iterdir() if path.name.startswith(f".{dst.name}.converting-")]


def readable(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


class Plan:
    """All that is to be done, checked: a ValueError lists all that is wrong with the source and the destination."""

    def __init__(self, src: Path, dst: Path, dtype: str, max_shard_size: str, overwrite: bool):
        expect(src.is_dir(), f"{src} is no folder")
        problems = [*check_destination(src, dst, overwrite)]
        try:
            self.config, group, values = read_config(src)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        try:
            self.source = Source(src, problems)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        report(problems)
        classifies = "score.weight" in self.source.tensors or "ForSequence" in str(values.get("architectures"))
        self.model = OpenLlamaForSequenceClassification if classifies else OpenLlamaForCausalLM
        self.targets, self.dropped = self.choose(group, dtype)
        self.size, self.shards = sum(target.size for target in self.targets), self.split(max_shard_size)
        self.copied = [src / name for name in COPIED if (src / name).is_file()]
        stored = reduce(torch.promote_types, [target.dtype for target in self.targets])
        self.more = {key: values[key] for key in ("id2label", "label2id") if key in values}  # of config.json
        self.more |= {"architectures": [self.model.__name__], "torch_dtype": str(stored).removeprefix("torch.")}
        freed = sum(file.stat().st_size for folder in leftovers(dst) for file in folder.rglob("*"))
        free = shutil.disk_usage(dst.parent).free + freed
        expect(free > self.size, f"{dst.parent} has {readable(free)} of free space: expected {readable(self.size)}")

    def choose(self, group: int, dtype: str) -> tuple[list[Target], list[str]]:
        """The tensors of the result, and the names of those that are left out of it."""
        tensors, layers, targets, problems = self.source.tensors, self.config.num_hidden_layers, [], []
        expect(layers <= len(tensors), f"num_hidden_layers={layers}: expected fewer, of {len(tensors)} tensors")
        with torch.device("meta"):
            wanted = self.model(self.config).state_dict()
        tied = self.model is OpenLlamaForCausalLM and HEAD not in wanted
        for name, like in wanted.items():
            source = HEAD if tied and name == EMBEDDING and name not in tensors else name  # where only that was saved
            stored, shape = tensors.get(source, (None, ()))
            repeat = group if name.endswith(("k_proj.weight", "v_proj.weight")) else 1
            expected = (like.shape[0] // repeat, *like.shape[1:])
            if source not in tensors:
                problems.append(f"{name} is missing")
            elif shape != expected:
                problems.append(f"{source} has shape {shape}: expected {expected}")
            elif stored not in DTYPES:
                problems.append(f"{source} has dtype {stored}: expected one of {', '.join(map(str, DTYPES))}")
            cast = getattr(torch, dtype, stored)
            targets.append(Target(name, source, cast, tuple(like.shape), repeat, self.config.head_dim))
        dropped = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]  # computed, not weights
        dropped += [HEAD] if tied and {EMBEDDING, HEAD} <= tensors.keys() else []
        unknown = tensors.keys() - {target.source for target in targets} - set(dropped)
        report(problems + [f"{name} of shape {tensors[name][1]} is left over" for name in sorted(unknown)])
        if HEAD in dropped:
            pairs = zip(self.source.blocks(HEAD), self.source.blocks(EMBEDDING))
            same = tensors[HEAD] == tensors[EMBEDDING] and all(a.equal(b) for a, b in pairs)
            expect(same, f"{HEAD} differs from {EMBEDDING}, to which config.json ties it")
        return targets, dropped

    def split(self, max_shard_size: str) -> dict[str, list[Target]]:
        parts = re.fullmatch(r"(\d+\.?\d*) ?([KMGT]?)(i?)B?", max_shard_size, re.IGNORECASE)
        limit = parts and float(parts[1]) * (1024 if parts[3] else 1000) ** " KMGT".index(parts[2].upper() or " ")
        expect(limit, f"max_shard_size={max_shard_size!r}: expected a size, as in 500MB or 2GB")
        shards = [[]]
        for target in self.targets:
            if shards[-1] and sum(other.size for other in shards[-1]) + target.size > limit:
                shards.append([])
            shards[-1].append(target)
        names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
        return dict(zip(names if len(shards) > 1 else ["model.safetensors"], shards))

    def __str__(self) -> str:
        tensors = self.source.tensors
        size = sum(prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
        casts = Counter(f"{tensors[t.source][0]} to {t.dtype}".replace("torch.", "") for t in self.targets)
        lists = {
            "source": self.source.files,
            "renamed": [f"{t.source} to {t.name}" for t in self.targets if t.source != t.name],
            "dropped": self.dropped,
            "repeated": [f"{t.name} x {t.repeat}" for t in self.targets if t.repeat > 1],
            "dtypes": [f"{count} x {kinds}" for kinds, count in casts.items()],
            "copied": [path.name for path in self.copied],
            "result": [*self.shards],
        }
        few = lambda names: f"{len(names)}{': ' * bool(names)}{', '.join(names[:3])}{', ...' * (len(names) > 3)}"
        lines = [f"{key + ':':12}{few(names)}" for key, names in lists.items()]
        count = sum(prod(target.shape) for target in self.targets)
        lines.append(f"{self.model.__name__}: {count:,} parameters, {readable(size)} in, {readable(self.size)} out")
        if self.config.rope_theta != 10000:
            lines.append(f"note: rope_theta={self.config.rope_theta:g} is ignored by transformers 4.31")
        return "\n".join(lines)


def write_shard(path: Path, shard: list[Target], source: Source, advance: Callable) -> None:
    """A safetensors file: its header's length, the header, the tensors; wide dtypes come first, so that all align."""
    header, end, shard = {"__metadata__": {"format": "pt"}}, 0, sorted(shard, key=lambda target: -target.dtype.itemsize)
    for target in shard:
        start, end = end, end + target.size
        header[target.name] = {"dtype": DTYPES[target.dtype], "shape": target.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for target in shard:
            for block in target.blocks(source):
                file.write(block.view(torch.uint8).numpy())
                advance(bytes=block.nbytes)
            advance(tensors=1)
    advance(files=1)


@contextmanager
def progress(plan: Plan) -> Iterator[Callable]:
    """Count what is done, and show it on stderr: on one line of a terminal, else on a line per file."""
    start, done, terminal = time.perf_counter(), Counter(), sys.stderr.isatty()

    def advance(**more: int) -> None:
        done.update(more)
        if terminal or "files" in more:
            tensors = f"{done['tensors']} of {len(plan.targets)} tensors"
            rate = done["bytes"] / 1e6 / (time.perf_counter() - start)
            state = f"{tensors}, {readable(done['bytes'])} of {readable(plan.size)}, {rate:.0f} MB/s  "
            print(state, end="\r" if terminal else "\n", file=sys.stderr, flush=True)

    try:
        yield advance
    finally:
        print(end="\n" * terminal, file=sys.stderr)


def write(plan: Plan, dst: Path) -> None:
    """Carry out the plan in a temporary folder, and put the result in the place of what is at dst."""
    stale, replaces = leftovers(dst), dst.exists()
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}.converting-", dir=dst.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        for path in stale:  # renamed first: a run that is still alive there fails, rather than finish with half of it
            shutil.rmtree(path.rename(old))
        new.mkdir()
        with progress(plan) as advance:
            for file, shard in plan.shards.items():
                write_shard(new / file, shard, plan.source, advance)
        if len(plan.shards) > 1:
            index = {target.name: file for file, shard in plan.shards.items() for target in shard}
            text = json.dumps({"metadata": {"total_size": plan.size}, "weight_map": index}, indent=2)
            (new / "model.safetensors.index.json").write_text(text + "\n")
        for path in plan.copied:
            shutil.copyfile(path, new / path.name)
        plan.config.save_pretrained(new, **plan.more)
        try:
            if replaces:
                dst.rename(old)
            new.rename(dst)
        finally:
            if old.exists() and not dst.exists():
                old.rename(dst)


def convert(
    src: str | os.PathLike, dst: str | os.PathLike, dtype: str = "keep", max_shard_size: str = "2GB",
    overwrite: bool = False, dry_run: bool = False,
) -> None:  # fmt: skip
    """Convert the checkpoint in folder src into a new one, dst; if dry_run, check everything and print the plan.

    ValueError lists all that is wrong with either; OSError tells what the system refused. Then dst is as it was.
    """
    start, dst = time.perf_counter(), Path(dst).resolve()
    plan = Plan(Path(src), dst, dtype, max_shard_size, overwrite)
    if dry_run:
        return print(plan)
    write(plan, dst)
    seconds = time.perf_counter() - start
    print(plan, f"{dst} is ready, after {seconds:.1f} s", sep="\n", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Convert an Open-Llama or LLaMA checkpoint for openllama.py.")
    parser.error = lambda message: expect(False, message)
    add = parser.add_argument
    add("src", metavar="SRC", help="folder of config.json and safetensors or pytorch_model.bin, in one file or shards")
    add("dst", metavar="DST", help="folder to be made")
    add("--dtype", choices=("keep", "float32", "bfloat16", "float16"), default="keep", help="default: %(default)s")
    add("--max-shard-size", default="2GB", metavar="SIZE", help="of a file; it holds one tensor at least; default: 2GB")
    add("--overwrite", action="store_true", help="replace the checkpoint at DST, once the new one is whole")
    add("--dry-run", action="store_true", help="check everything, and print the plan only")
    try:
        convert(**vars(parser.parse_args(argv)))
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"convert_checkpoint.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # a megabyte at a time, threads would only wait for each other
    sys.exit(main())
