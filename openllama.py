# SPDX-License-Identifier: MIT
"""Open-Llama in one file: first the model, then what it takes to use it.

Open-Llama (s-JoL, 2023) is LLaMA (https://arxiv.org/abs/2302.13971) with three changes:

1. Stable embedding: a LayerNorm on the token embedding, from Bloom
   (https://arxiv.org/abs/2211.05100).
2. Shared embedding: the input embedding is the output matrix too, from PaLM
   (https://arxiv.org/abs/2204.02311).
3. Memory-efficient attention (https://arxiv.org/abs/2112.05682), which does not keep its T x S
   weights: by xformers on a GPU in half precision, elsewhere by PyTorch.

It also has dropout in the attention and after the MLP. Results are those of transformers 4.31, the
last version to have this model, without its faults in padding, dynamic scaling and dropout, which
the README lists. Python 3.10 or newer is needed, and a recent torch (tried: 2.11 and 2.13).

Part one, the model, runs alone.    Part two is for using it.
  1 Configuration                     9 Checkpoints
  2 RMSNorm, rotary embedding        10 Sampling
  3 Attention, MLP, layer            11 Speed
  4 Decoder                          12 Text
  5 Language model, classifier       13 Command line
  6 Positions, documents, mask
  7 Key-value cache, output
  8 Memory-efficient attention

Shapes are written in these letters; "B|1" means B, or 1 where all rows agree.

  B  batch: rows                    H  attention heads
  T  new tokens of a row            D  head size
  S  visible tokens of a row,       C  hidden size, H * D
     cached and new                 V  vocabulary

This file leaves out: grouped-query attention, biases, other rotary scalings, beam search, saving
in shards, generation_config.json and other spellings of settings (see convert_checkpoint.py);
downloads, quantisation, adapters, sharding over processes (libraries do these, see the README).
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache, partial, reduce
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node
from torch.utils.checkpoint import checkpoint

Folder = str | os.PathLike

# =============================================================================================
# Part one: the model
# =============================================================================================


# --- 1. Configuration ------------------------------------------------------------------------


@dataclass
class OpenLlamaConfig:
    """The model's sizes and switches, named as in config.json; the defaults are the 7B model's.
    ValueError names a setting that is impossible. For a setting of your own, subclass this as a
    dataclass, and name the subclass in your model's `config_class`."""

    model_type: ClassVar[str] = "open-llama"
    vocab_size: int = 100000
    hidden_size: int = 4096
    intermediate_size: int = 11008  # of the MLP
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str | Callable[[Tensor], Tensor] = "silu"  # a name in ACTIVATIONS, or a function
    max_position_embeddings: int = 2048  # the length that the model is trained for
    initializer_range: float = 0.02  # standard deviation of fresh weights
    rms_norm_eps: float = 1e-6
    use_cache: bool = True  # outside of training
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False  # as in LLaMA: True shares the embedding, too
    use_memory_efficient_attention: bool = True
    hidden_dropout_prob: float = 0.1  # of what the MLP returns
    attention_dropout_prob: float = 0.1  # of the attention weights
    use_stable_embedding: bool = True
    shared_input_output_embedding: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"type": "linear" or "dynamic", "factor": at least 1}
    num_labels: int = 2  # of the classifier
    id2label: dict[int, str] | None = None  # names of the labels; their count is num_labels
    problem_type: str | None = None  # of the classifier; None: the labels tell
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True  # False: models return tuples

    def __post_init__(self):
        for setting in fields(OpenLlamaConfig):
            kind = type(setting.default)
            if kind is bool:
                is_bool = type(getattr(self, setting.name)) is bool
                self.check(setting.name, is_bool, "True or False")
            elif kind in (int, float):
                self.check_number(setting.name, kind)
        even = 2 * self.num_attention_heads
        self.check("hidden_size", self.hidden_size % even == 0, f"a multiple of 2 x heads, {even}")
        is_pad = self.pad_token_id is None or self.pad_token_id in range(self.vocab_size)
        self.check("pad_token_id", is_pad, f"an id below vocab_size={self.vocab_size}")
        is_act = callable(self.hidden_act) or self.hidden_act in list(ACTIVATIONS)
        self.check("hidden_act", is_act, f"a function, or one of {list(ACTIVATIONS)}")
        self.check("problem_type", self.problem_type in PROBLEM_TYPES, f"one of {PROBLEM_TYPES}")
        self.check_rope_scaling()
        names = self.id2label or {}
        is_naming = isinstance(names, dict) and all(str(key).isdecimal() for key in names)
        self.check("id2label", is_naming, "None, or names by number")
        if names:
            self.id2label = {int(key): str(name) for key, name in names.items()}
            self.num_labels = len(names)

    def check(self, name: str, fits: bool, expected: str) -> None:
        expect(fits, f"{name}={getattr(self, name)!r}: expected {expected}")

    def check_number(self, name: str, kind: type) -> None:
        value = getattr(self, name)
        is_number = type(value) in (int, kind)  # which a bool is not
        if name.endswith("dropout_prob"):
            self.check(name, is_number and 0 <= value < 1, "a number in [0, 1)")
        elif name.endswith("_token_id"):
            ids = value if isinstance(value, list) else [value]
            are_ids = value is None or all(type(n) is int for n in ids)
            self.check(name, are_ids, "None, an id, or ids")
        else:
            self.check(name, is_number and value > 0, f"{kind.__name__} above 0")

    def check_rope_scaling(self) -> None:
        rope = self.rope_scaling
        if rope is None:
            return
        is_known = isinstance(rope, dict) and rope.get("type") in list(SCALINGS)
        self.check("rope_scaling", is_known, f"None, or a type of {list(SCALINGS)}")
        needed = SCALINGS[rope["type"]].settings
        numbers = [value for name, value in rope.items() if name != "type"]
        fits = all(type(n) in (int, float) and n >= 1 for n in numbers)
        fits = fits and rope.keys() == {"type", *needed}
        self.check("rope_scaling", fits, f"besides the type {needed}, numbers from 1")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def has_own_head(self) -> bool:
        """Whether the output matrix is another one than the embedding."""
        return not (self.shared_input_output_embedding or self.tie_word_embeddings)

    @classmethod
    def from_dict(cls, values: dict) -> OpenLlamaConfig:
        """Read the contents of a config.json. ValueError for settings that this model has not."""
        # transformers 4.31 and most checkpoints misspell use_memory_efficient_attention
        values = {key.replace("memorry", "memory"): value for key, value in values.items()}
        rope = values.pop("rope_parameters", None)  # transformers 5 has all about RoPE in one
        if isinstance(rope, dict):
            values["rope_theta"] = rope.get("rope_theta", cls.rope_theta)
            if rope.get("rope_type", "default") != "default":
                values["rope_scaling"] = {"type": rope["rope_type"], "factor": rope.get("factor")}
        own = {setting.name for setting in fields(cls)}
        others = {key: value for key, value in values.items() if key not in own | LIBRARY_KEYS}
        others = {key: value for key, value in others.items() if value}  # null, false, or empty
        expect(not others, f"Open-Llama does not have the settings {others}")
        return cls(**{key: value for key, value in values.items() if key in own})

    def to_dict(self) -> dict:
        return {"model_type": self.model_type, **asdict(self)}

    def to_json_string(self, **more: object) -> str:
        """The text of a config.json, with the keys of `more` added."""
        self.check("hidden_act", not callable(self.hidden_act), "a name, to write it to a file")
        return json.dumps(self.to_dict() | more, indent=2) + "\n"

    @classmethod
    def from_pretrained(cls, folder: Folder) -> OpenLlamaConfig:
        """Read a folder's config.json. OSError where there is none, ValueError if it is broken."""
        return cls.from_dict(read_config(Path(folder)))

    def save_pretrained(self, folder: Folder) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(self.to_json_string(), encoding="utf-8")


ACTIVATIONS = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "tanh": F.tanh,
    "sigmoid": F.sigmoid,
}
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
LIBRARY_KEYS = {  # what transformers writes into config.json about itself
    *("_name_or_path", "architectures", "auto_map", "dtype", "label2id", "model_type"),
    *("tokenizer_class", "torch_dtype", "transformers_version"),
}


def expect(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


# --- 2. RMSNorm, rotary embedding ------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x**2) + eps) * weight (https://arxiv.org/abs/1910.07467).

    PyTorch computes it in float32, and rounds the result. (transformers 4.31 rounds the quotient.)
    """


class RotaryEmbedding:
    """Turns queries and keys, so that their products depend on how far apart the tokens are.

    RoPE (https://arxiv.org/abs/2104.09864) turns the pair n of a head, n < D/2, by the angle
    position * base ** (-2n / D). Each forward makes one of these. A scaling is a subclass.
    """

    settings: tuple[str, ...] = ()  # what config.rope_scaling holds besides the type

    def __init__(self, config: OpenLlamaConfig, tokens: Tokens, dtype: torch.dtype):
        """dtype: that of the queries and keys."""
        frequencies = self.frequencies(config, tokens)
        self.cos, self.sin = cos_and_sin(tokens.positions, frequencies, dtype)  # (B|1, T, 1, D)

    def base(self, config: OpenLlamaConfig, tokens: Tokens) -> float | Tensor:
        return config.rope_theta

    def frequencies(self, config: OpenLlamaConfig, tokens: Tokens) -> Tensor:
        """How far each pair turns from one position to the next, (D/2,)."""
        D = config.head_dim
        two_n = torch.arange(0, D, 2, device=tokens.new.device).float()
        return self.base(config, tokens) ** (-two_n / D)

    def rotate_queries(self, q: Tensor) -> Tensor:
        return apply_rotary(q, self.cos, self.sin)

    def rotate_new_keys(self, k: Tensor) -> Tensor:  # before they go into the cache
        return apply_rotary(k, self.cos, self.sin)

    def rotate_all_keys(self, k: Tensor) -> Tensor:  # when they come out of it
        return k


class LinearScaling(RotaryEmbedding):
    """All angles are divided by a factor (https://arxiv.org/abs/2306.15595)."""

    settings = ("factor",)

    def frequencies(self, config: OpenLlamaConfig, tokens: Tokens) -> Tensor:
        return super().frequencies(config, tokens) / config.rope_scaling["factor"]


class DynamicNTKScaling(RotaryEmbedding):
    """The base grows with the text (https://arxiv.org/abs/2309.00071).

    As it grows, the angles of earlier tokens change too. So the cache holds keys that are not
    rotated yet, and all keys of a document are rotated by the same base whenever they are used.
    (transformers 4.31 caches rotated keys, of many bases.) Tokens are always counted for this:
    position_ids have no effect.
    """

    settings = ("factor",)

    def __init__(self, config: OpenLlamaConfig, tokens: Tokens, dtype: torch.dtype):
        frequencies = self.frequencies(config, tokens)  # (B|1, S|1, D/2)
        self.all_cos, self.all_sin = cos_and_sin(tokens.counted, frequencies, dtype)
        self.cos = self.all_cos[:, tokens.new]
        self.sin = self.all_sin[:, tokens.new]

    def base(self, config: OpenLlamaConfig, tokens: Tokens) -> Tensor:
        """A base for each token, (B|1, S|1, 1): it depends on the length of its document."""
        D = config.head_dim
        factor = config.rope_scaling["factor"]
        lengths = tokens.lengths.float() / config.max_position_embeddings
        growth = (factor * lengths - (factor - 1)).clamp(min=1)  # 1 up to the length trained for
        return (config.rope_theta * growth ** (D / (D - 2)))[..., None]

    def rotate_new_keys(self, k: Tensor) -> Tensor:
        return k

    def rotate_all_keys(self, k: Tensor) -> Tensor:
        return apply_rotary(k, self.all_cos, self.all_sin)


SCALINGS = {"linear": LinearScaling, "dynamic": DynamicNTKScaling}  # by rope_scaling["type"]


def rotary_embedding(
    config: OpenLlamaConfig, tokens: Tokens, dtype: torch.dtype
) -> RotaryEmbedding:
    if config.rope_scaling is None:
        return RotaryEmbedding(config, tokens, dtype)
    return SCALINGS[config.rope_scaling["type"]](config, tokens, dtype)


def cos_and_sin(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `apply_rotary` takes, each (B|1, T, 1, D), for positions (B|1, T) and frequencies
    (D/2,), or (B|1, T|1, D/2) where tokens differ in them. All is float32 until the end."""
    angles = positions.float()[..., None] * frequencies  # (B|1, T, D/2)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)  # the same in all heads


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of x, a from its first half and b from its second, by its angle: a
    becomes a cos - b sin, and b becomes b cos + a sin. The minus is that of the sine's first half.

    The pairs of this head are (1, 3), which makes a quarter turn, and (2, 4), which makes none:

    >>> cos, sin = torch.tensor([0, 1, 0, 1]), torch.tensor([-1, 0, 1, 0])
    >>> apply_rotary(torch.tensor([1, 2, 3, 4]), cos, sin)
    tensor([-3,  2,  1,  4])
    """
    other_half = x.roll(x.shape[-1] // 2, dims=-1)  # b, then a
    return x * cos + other_half * sin


# --- 3. Attention, MLP, layer ----------------------------------------------------------------


@dataclass
class Shared:
    """What the layers share in one forward."""

    rotary: RotaryEmbedding
    attend: Callable  # attend(q, k, v, dropout_p) returns (B, T, H, D), and the weights or None
    cache: KVCache | None


def attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """softmax(q k' / sqrt(D)) v, as in the textbook: (B, T, H, D), and its weights (B, H, T, S).

    q (B, T, H, D); k, v (B, S, H, D); mask (B|1, 1, T, S): True where a query sees a key.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), (B, H, S, D) twice
    q = q / math.sqrt(q.shape[-1])  # before the product, which could overflow in float16
    scores = (q @ k.mT).masked_fill(~mask, -math.inf)  # (B, H, T, S)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    out = F.dropout(weights, dropout_p) @ v
    return out.transpose(1, 2), weights


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """The same by a kernel of PyTorch's that keeps no weights. mask None: causal attention, for
    T = S queries, or for one query that is the last token's."""
    T = q.shape[1]
    S = k.shape[1]
    if dropout_p > 0 and q.device.type == "cpu":
        # PyTorch's kernel for this keeps the weights; here they are computed again in the backward
        if mask is None:
            mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
        out, _ = checkpoint(attention, q, k, v, dropout_p, mask, use_reentrant=False)
        return out, None
    causal = mask is None
    if T == 1:  # a single query sees all keys; is_causal would let it see the first one only
        causal = False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=causal)
    return out.transpose(1, 2), None


linear = F.linear  # section 11 replaces it by one that is faster for a single token on a CPU


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class OpenLlamaAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: OpenLlamaConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer  # where the cache keeps its keys and values
        self.q_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.v_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor | None]:
        B, T, _ = x.shape
        heads = (B, T, -1, self.config.head_dim)  # -1: H, or this process's share if sharded
        q = self.q_proj(x).view(heads)
        k = self.k_proj(x).view(heads)
        v = self.v_proj(x).view(heads)
        q = shared.rotary.rotate_queries(q)
        k = shared.rotary.rotate_new_keys(k)
        if shared.cache is not None:
            k, v = shared.cache.update(self.layer, k, v)  # (B, S, H, D)
        k = shared.rotary.rotate_all_keys(k)
        dropout_p = self.config.attention_dropout_prob if self.training else 0.0
        out, weights = shared.attend(q, k, v, dropout_p)
        return self.o_proj(out.reshape(B, T, -1)), weights


class OpenLlamaMLP(nn.Module):
    """down(act(gate(x)) * up(x)): SwiGLU, if act is SiLU (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: OpenLlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACTIVATIONS.get(config.hidden_act, config.hidden_act)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x)))


class OpenLlamaDecoderLayer(nn.Module):
    def __init__(self, config: OpenLlamaConfig, layer: int):
        super().__init__()
        self.self_attn = OpenLlamaAttention(config, layer)
        self.mlp = OpenLlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, shared: Shared) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.self_attn(self.input_layernorm(x), shared)
        x = x + attended
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x, weights


# --- 4. Decoder ------------------------------------------------------------------------------


class OpenLlamaPreTrainedModel(nn.Module):
    """What the models share: fresh weights, and ways in and out of files (section 9)."""

    config_class = OpenLlamaConfig
    accepts_loss_kwargs = False  # tells transformers' Trainer of num_items_in_batch
    may_lack: tuple[str, ...] = ()  # modules that a checkpoint may lack: a head, to be trained
    ignores: tuple[str, ...] = ()  # modules that it may hold besides: the heads of other models

    def __init__(self, config: OpenLlamaConfig):
        super().__init__()
        self.config = config

    def init_weights(self, module: nn.Module) -> None:
        """Draw a module's weights. For modules that you add: module.apply(self.init_weights)."""
        weight = getattr(module, "weight", None)
        if weight is None or weight.is_meta:  # on meta there is no memory to fill
            return
        if isinstance(module, nn.RMSNorm | nn.LayerNorm):
            nn.init.ones_(weight)
        elif isinstance(module, nn.Embedding) and self.config.use_stable_embedding:
            nn.init.xavier_normal_(weight)  # std sqrt(2 / (V + C)), as in transformers
        elif isinstance(module, nn.Embedding | nn.Linear):
            nn.init.normal_(weight, std=self.config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(weight[module.padding_idx])
        if isinstance(module, nn.LayerNorm | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, folder: Folder, **how: object) -> OpenLlamaPreTrainedModel:
        """Read a folder's config.json and weights: see `load_model`."""
        return load_model(cls, Path(folder), **how)

    def save_pretrained(self, folder: Folder, state_dict: dict | None = None) -> None:
        """Write config.json and model.safetensors: see `save_model`."""
        save_model(self, Path(folder), state_dict)

    def resize_token_embeddings(self, size: int) -> nn.Embedding:
        """Cut the vocabulary to `size`, or extend it by freshly initialised rows; in place."""
        config = replace(self.config, vocab_size=size)  # ValueError for an impossible size
        self.config.vocab_size = config.vocab_size
        embedding = self.get_input_embeddings()
        head = self.get_output_embeddings() or embedding
        for module in dict.fromkeys((embedding, head)):  # which may be one
            old = module.weight
            module.weight = nn.Parameter(old.new_empty(size, old.shape[1]), old.requires_grad)
            self.init_weights(module)
            module.weight.data[: len(old)] = old.data[:size]
            size_name = "out_features" if isinstance(module, nn.Linear) else "num_embeddings"
            setattr(module, size_name, size)
        return embedding

    def gradient_checkpointing_enable(self, *_: object, **__: object) -> None:
        """In training, recompute each layer in the backward, for less memory. The arguments that
        transformers' Trainer gives have no effect."""
        self.decoder.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        self.decoder.recompute = False

    @property
    def decoder(self) -> OpenLlamaModel:
        return getattr(self, "model", self)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed_tokens

    def get_output_embeddings(self) -> nn.Module | None:
        """The module whose weight is the output matrix; None where there are no logits."""

    @property
    def device(self) -> torch.device:
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        parameters = set(self.parameters())
        if exclude_embeddings:
            parameters.discard(self.get_input_embeddings().weight)
        return sum(x.numel() for x in parameters if x.requires_grad or not only_trainable)

    def setting(self, name: str, given: bool | None) -> bool:
        """An argument of forward, or the config's where it is None."""
        return getattr(self.config, name) if given is None else given

    def in_form(self, out: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        return out if self.setting("return_dict", return_dict) else out.to_tuple()


class OpenLlamaModel(OpenLlamaPreTrainedModel):
    """The decoder: embedding, layers, final norm."""

    ignores = ("lm_head", "score")

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        self.recompute = False  # layers in training
        self.embed_tokens = (
            nn.Embedding.from_pretrained(  # which leaves the drawing to init_weights
                torch.empty(config.vocab_size, config.hidden_size),
                freeze=False,
                padding_idx=config.pad_token_id,
            )
        )
        self.embed_layer_norm = nn.Identity()
        if config.use_stable_embedding:
            self.embed_layer_norm = nn.LayerNorm(config.hidden_size)
        layers = (OpenLlamaDecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.apply(self.init_weights)

    def choose_attention(self, x: Tensor, tokens: Tokens, eager: bool) -> Callable:
        """What attends in all layers of one forward: attend(q, k, v, dropout_p) returns (B, T, H,
        D), and the weights (B, H, T, S), or None if not eager. It is xformers' in half precision on
        CUDA, if that has a kernel, but not for padding together with a cache, nor while compiling.
        A subclass may override this."""
        if eager:
            return masked_attention(visible_keys(tokens), eager)
        T = x.shape[1]
        S = tokens.counted.shape[1]
        plain = tokens.documents is None  # one document, without padding
        dtype = type_of_queries(x)
        half = x.is_cuda and dtype in (torch.float16, torch.bfloat16)
        if half and (plain or T == S) and not torch.compiler.is_compiling():
            kernel = xformers_kernel(self.config.head_dim, dtype, x.device)
            if kernel is not None:
                return xformers_attention(kernel, tokens.documents, len(x))
        if plain and T in (1, S):
            return fused_attention
        return masked_attention(visible_keys(tokens), eager)

    def run_layer(
        self, layer: nn.Module, x: Tensor, shared: Shared
    ) -> tuple[Tensor, Tensor | None]:
        if self.recompute and self.training and shared.cache is None:  # which would grow twice
            return checkpoint(layer, x, shared, use_reentrant=False)
        return layer(x, shared)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple:
        """Run the decoder.

        input_ids: (B, T); or inputs_embeds: (B, T, C), in place of the embedding and its norm.
        attention_mask: (B, S), cached tokens included; 0 for padding, on any side, else 1.
          Documents packed into a row are numbered 1, 2, ...: each gives what it would alone.
        position_ids: (B|1, T); None: each document's tokens are counted. Where they begin again at
          0, and neither attention_mask nor past_key_values is given, another document begins.
        past_key_values: a KVCache, which is extended in place; or a (key, value) for each layer,
          each (B, H, S - T, D), which is left as it is.
        use_cache: return the cache; None: as config.use_cache says, but never in training.
        The others: as the config says, where None.
        """
        expect((input_ids is None) != (inputs_embeds is None), "expected ids, or inputs_embeds")
        output_attentions = self.setting("output_attentions", output_attentions)
        output_hidden_states = self.setting("output_hidden_states", output_hidden_states)
        if use_cache is None and self.training:
            use_cache = False
        use_cache = self.setting("use_cache", use_cache)

        x = inputs_embeds  # (B, T, C)
        if x is None:
            x = self.embed_layer_norm(self.embed_tokens(input_ids))
        documents = number_documents(attention_mask, position_ids, past_key_values)
        cache = as_cache(past_key_values)
        tokens = locate_tokens(x, documents, position_ids, cache)
        eager = output_attentions or not self.config.use_memory_efficient_attention
        shared = Shared(
            rotary=rotary_embedding(self.config, tokens, dtype=type_of_queries(x)),
            attend=self.choose_attention(x, tokens, eager),
            cache=cache if use_cache or past_key_values is not None else None,
        )

        hidden_states = []
        attentions = []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            x, weights = self.run_layer(layer, x, shared)
            if output_attentions:
                attentions.append(weights)
        x = self.norm(x)

        out = ModelOutput(last_hidden_state=x)
        if use_cache:
            out["past_key_values"] = cache
        if output_hidden_states:
            out["hidden_states"] = (*hidden_states, x)
        if output_attentions:
            out["attentions"] = tuple(attentions)
        return self.in_form(out, return_dict)


# --- 5. Language model, classifier -----------------------------------------------------------


class OpenLlamaWithHead(OpenLlamaPreTrainedModel):
    """The decoder, for a head to be put on it."""

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        self.model = OpenLlamaModel(config)


class OpenLlamaForCausalLM(OpenLlamaWithHead):
    """The language model. Its output matrix is the embedding, or that of `lm_head`."""

    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # tells Trainer that labels are shifted
    generation_config = None  # PEFT looks for this, and for prepare_inputs_for_generation

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        if config.has_own_head:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
            self.init_weights(self.lm_head)
        elif config.tie_word_embeddings:
            self.ignores = ("lm_head",)  # which some checkpoints hold beside the embedding

    def get_output_embeddings(self) -> nn.Module:
        if self.config.has_own_head:
            return self.lm_head
        return self.model.embed_tokens

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V)."""
        if self.config.has_own_head:
            return self.lm_head(hidden)  # called as a module, so that hooks and adapters act
        return linear(hidden, self.model.embed_tokens.weight)

    def loss_of(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return summed_loss(self.compute_logits(hidden), targets)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor | None = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        **wanted: bool | None,
    ) -> ModelOutput | tuple:
        """Logits (B, T, V), and the loss if there are labels; other arguments: OpenLlamaModel's.

        labels: (B, T), as a rule the input_ids; -100 for those that are not to be predicted. The
          loss is the mean cross-entropy, in float32, of the tokens that follow one of their own
          document: not of padding, nor of the first token of a document.
        logits_to_keep: 0: all; n: the last n tokens'; a tensor: those at these places, (K,) or
          (B, K); None: none. If not all are kept, they are never all in memory for the loss either.
        num_items_in_batch: the loss is the sum divided by this, if given, in place of the mean.
        """
        documents = number_documents(attention_mask, position_ids, past_key_values)
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        out = self.model(*inputs, **wanted, return_dict=True)
        hidden = out.pop("last_hidden_state")
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        logits = None
        if logits_to_keep is not None:
            logits = self.compute_logits(select_tokens(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            shape = tuple(labels.shape)
            expect(shape == hidden.shape[:2], f"labels of shape {shape}: expected (B, T)")
            targets = next_tokens(labels, documents)
            if keeps_all:
                loss = summed_loss(logits, targets)
            else:  # 2,048 tokens at a time, whose logits are computed again in the backward
                pieces = (hidden.flatten(0, 1).split(2048), targets.flatten().split(2048))
                chunks = zip(*pieces, strict=True)
                losses = [checkpoint(self.loss_of, h, y, use_reentrant=False) for h, y in chunks]
                loss = sum(losses)
            if num_items_in_batch is None:
                num_items_in_batch = targets.ne(-100).sum()
            loss = loss / num_items_in_batch
        return self.in_form(ModelOutput(loss=loss, logits=logits, **out), return_dict)

    def generate(self, *inputs: Tensor | list, **settings: object) -> Tensor:  # see section 10
        return generate(self, *inputs, **settings)

    def stream(self, *inputs: Tensor | list, **settings: object) -> Iterator[Tensor]:
        return stream(self, *inputs, **settings)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: object) -> dict:
        return {"input_ids": input_ids, **inputs}


def select_tokens(x: Tensor, keep: int | Tensor) -> Tensor:
    """The last `keep` tokens of x (B, T, C), or all if 0; or those at the places (K,) or (B, K)."""
    if isinstance(keep, Tensor):
        rows = torch.arange(len(x), device=x.device)
        return x[rows[:, None], keep]
    return x[:, -keep:]


def next_tokens(labels: Tensor, documents: Tensor | None) -> Tensor:
    """For each token, the label of the next one, (B, T), or -100 if there is none to predict.

    >>> next_tokens(torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 1, 1, 2, 2]]))
    tensor([[-100,    7, -100,    9, -100]])
    """
    targets = F.pad(labels[:, 1:].long(), (0, 1), value=-100)
    if documents is None:
        return targets
    documents = documents[:, -labels.shape[1] :]
    follows = documents == F.pad(documents[:, 1:], (0, 1))
    return targets.masked_fill(~follows | (documents == 0), -100)


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of the cross-entropies of logits (..., V), in float32."""
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="sum")


class OpenLlamaForSequenceClassification(OpenLlamaWithHead):
    """A classifier: `score` of the last real token of each row."""

    may_lack = ("score",)
    ignores = ("lm_head",)

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        self.init_weights(self.score)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **wanted: bool | None,
    ) -> ModelOutput | tuple:
        """Logits (B, num_labels), and the loss if there are labels: (B,) classes, or (B,
        num_labels) numbers, by config.problem_type. Other arguments: OpenLlamaModel's.

        attention_mask tells the last real token, else pad_token_id does, else it is the last.
        """
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        out = self.model(*inputs, **wanted, return_dict=True)
        hidden = out.pop("last_hidden_state")
        B, T, _ = hidden.shape
        pad = self.config.pad_token_id
        if attention_mask is not None:
            real = attention_mask[:, -T:] != 0
        elif pad is not None and input_ids is not None:
            real = input_ids != pad
        else:  # nothing tells where rows end; transformers, too, refuses several without a pad id
            expect(B == 1 or pad is not None, f"{B} rows need an attention_mask, or a pad_token_id")
            real = torch.ones(B, T, device=hidden.device)
        logits = self.score(select_tokens(hidden, last_true(real)[:, None])[:, 0])
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config)
        return self.in_form(ModelOutput(loss=loss, logits=logits, **out), return_dict)


def last_true(flags: Tensor) -> Tensor:
    """The last place of each row that is True, (B,) of (B, T); the last of all where none is."""
    return flags.shape[1] - 1 - flags.long().flip(1).argmax(dim=1)


def classification_loss(logits: Tensor, labels: Tensor, config: OpenLlamaConfig) -> Tensor:
    """The loss of a regression, or of one label or several. If config.problem_type does not say
    which, num_labels and the type of the labels tell."""
    kind = config.problem_type
    if kind is None and config.num_labels == 1:
        kind = "regression"
    elif kind is None and labels.is_floating_point():
        kind = "multi_label_classification"
    logits = logits.float()
    if kind in (None, "single_label_classification"):
        return F.cross_entropy(logits, labels.flatten().long())
    fits = labels.numel() == logits.numel()
    expect(fits, f"labels are {tuple(labels.shape)}: expected {tuple(logits.shape)} for {kind}")
    loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels.view_as(logits).float())


# --- 6. Positions, documents, mask -----------------------------------------------------------


@dataclass
class Tokens:
    """The S tokens that one forward sees, in the cache and new, and which of them are new."""

    new: Tensor  # (T,): the indices of the new tokens among all S
    positions: Tensor  # (B|1, T): each new token's place in its document, or position_ids
    counted: Tensor  # (B|1, S): where each token stands in its document
    lengths: Tensor  # (B|1, S|1): how many tokens its document has so far
    documents: Tensor | None = None  # (B|1, S): its number, 0 for padding; None: all are 1


def number_documents(
    attention_mask: Tensor | None, position_ids: Tensor | None, past: Sequence | None
) -> Tensor | None:
    """The number of each token's document, 0 for padding: (B, S) by the mask, or (B|1, T) by
    positions that begin again at 0 if nothing is cached. None: all are of one."""
    if attention_mask is not None:
        return attention_mask.long()
    if position_ids is None or past:
        return None
    begins = (position_ids[:, 1:] == 0).long()
    return F.pad(begins, (1, 0), value=1).cumsum(dim=1)


def locate_tokens(
    x: Tensor, documents: Tensor | None, position_ids: Tensor | None, cache: KVCache
) -> Tokens:
    """Find out where the new tokens x (B, T, C) stand, behind those in the cache, and make room for
    them there."""
    B, T, _ = x.shape
    S = cache.length + T
    if documents is not None:
        shape = tuple(documents.shape)
        expect(shape in ((B, S), (1, S)), f"mask or positions are {shape}: expected {(B, S)}")
        has_values = type(documents) is Tensor and not documents.is_meta
        if has_values and not torch.compiler.is_compiling() and bool(documents.eq(1).all()):
            documents = None  # attention is faster without a mask
            cache.documents = None
    new, documents = cache.begin(x, documents)
    if documents is None:
        counted = torch.arange(S, device=x.device)[None]
        lengths = counted[:, -1:] + 1
    else:
        counted, lengths = count_tokens(documents)
    if position_ids is None:
        position_ids = counted[:, new]
    return Tokens(new, position_ids, counted, lengths, documents)


def count_tokens(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's position in its document, and how many tokens that has, both (B, S). What is
    said of padding has no meaning. The numbers of documents ascend.

    The real tokens of this row are counted, 1 2 2 3 4. At the first token of each one's document
    the count is 1 1 1 3 3, and at its last token 2 2 2 4 4:

    >>> count_tokens(torch.tensor([[1, 1, 0, 2, 2]]))
    (tensor([[0, 1, 1, 0, 1]]), tensor([[2, 2, 2, 2, 2]]))
    """
    count = documents.ne(0).cumsum(dim=1)
    ascending = documents.cummax(dim=1).values  # padding belongs to the document before it
    first = torch.searchsorted(ascending, ascending)
    last = torch.searchsorted(ascending, ascending, right=True) - 1
    at_first = count.gather(1, first)
    return count - at_first, count.gather(1, last) - at_first + 1


def visible_keys(tokens: Tokens) -> Tensor:
    """Which keys each new token sees, (B|1, 1, T, S): those of its document, up to itself.

    Padding counts as a document, or it would see nothing, and a softmax of nothing is NaN. Here
    are two new tokens after a cache of three, the first of which is padding:

    >>> documents = torch.tensor([[0, 1, 1, 1, 1]])
    >>> tokens = Tokens(torch.tensor([3, 4]), None, *count_tokens(documents), documents)
    >>> visible_keys(tokens).long()
    tensor([[[[0, 1, 1, 1, 0],
              [0, 1, 1, 1, 1]]]])
    """
    S = tokens.counted.shape[1]
    mask = torch.arange(S, device=tokens.new.device) <= tokens.new[:, None]  # (T, S)
    if tokens.documents is not None:
        own = tokens.documents[:, tokens.new]
        mask = mask & (tokens.documents[:, None] == own[:, :, None])  # (B|1, T, S)
    return mask.view(-1, 1, *mask.shape[-2:])


# --- 7. Key-value cache, output --------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens so far, and their documents. A forward keeps nothing else for
    the next one.

    `cache[layer]` is (key, value), each (B, H, length, D); the keys are not rotated yet if the
    scaling is dynamic. A forward that fails or is interrupted spoils the cache it was given.
    """

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] = ()):
        """past: a (key, value) for each layer."""
        self.keys = [key for key, _ in past]  # the buffers, (B, H, at least length, D)
        self.values = [value for _, value in past]
        self.length = self.keys[0].shape[2] if self.keys else 0
        self.documents: Tensor | None = None  # (B|1, length): 0 for padding; None: all are of one

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def begin(self, x: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Count the new tokens x (B, T, C) in. Returns their indices among all S, (T,), and the
        documents of all, (B|1, S): those that are given, or else known."""
        T = x.shape[1]
        if documents is None:
            documents = self.extended_documents(T)
        self.documents = documents
        self.length += T
        return torch.arange(self.length - T, self.length, device=x.device), documents

    def extended_documents(self, T: int) -> Tensor | None:
        """The documents of the tokens so far, and of T more that go on with the last."""
        if self.documents is None:
            return None
        last = self.documents.amax(dim=1, keepdim=True)
        return torch.cat((self.documents[:, : self.length], last.expand(-1, T)), dim=1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v of the new tokens, (B, T, H, D); return those of all, (B, S, H, D)."""
        keys = self.extend(self.keys, layer, k.transpose(1, 2))
        values = self.extend(self.values, layer, v.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def extend(self, buffers: list[Tensor], layer: int, x: Tensor) -> Tensor:
        """Put x (B, H, T, D) behind what a layer's buffer holds; return all, (B, H, S, D)."""
        S = self.length
        if layer == len(buffers):
            buffers.append(x)
            return x
        past = buffers[layer][:, :, : S - x.shape[2]]
        if torch.is_grad_enabled():  # what autograd has recorded may not be written to
            buffers[layer] = torch.cat((past, x), dim=2)
            return buffers[layer]
        if buffers[layer].shape[2] < S:  # it is doubled, so that little is copied
            B, H, _, D = x.shape
            # what is made in inference mode cannot be written to outside of it
            with torch.inference_mode(False):
                buffers[layer] = x.new_empty(B, H, 2 * S, D)
            buffers[layer][:, :, : past.shape[2]] = past
        buffers[layer][:, :, past.shape[2] : S] = x
        return buffers[layer][:, :, :S]


def as_cache(past: KVCache | Sequence[tuple[Tensor, Tensor]] | None) -> KVCache:
    """The argument past_key_values as a cache, new or given."""
    return past if isinstance(past, KVCache) else KVCache(past or ())


class ModelOutput(dict):
    """What a model returns: a dict, whose values are attributes, too (out.logits; None for what
    is not there), and in their order a tuple (out[0], out[:2], out.to_tuple())."""

    loss: Tensor | None
    logits: Tensor | None  # (B, T, V), or (B, num_labels) from the classifier
    last_hidden_state: Tensor | None  # (B, T, C), after the final norm; from the decoder
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None  # each layer's input, and last_hidden_state
    attentions: tuple[Tensor, ...] | None  # the weights of each layer, (B, H, T, S)

    def __init__(self, *pairs: Iterable, **values: object):
        values = dict(*pairs, **values)
        super().__init__({name: value for name, value in values.items() if value is not None})

    def __getattr__(self, name: str) -> object:
        if name not in ModelOutput.__annotations__:
            raise AttributeError(name)
        return self.get(name)

    def __getitem__(self, key: str | int | slice) -> object:
        if isinstance(key, str):
            return super().__getitem__(key)
        return self.to_tuple()[key]

    def __setattr__(self, name: str, value: object) -> None:
        self[name] = value

    def to_tuple(self) -> tuple:
        return tuple(self.values())


def flatten_output(out: ModelOutput) -> tuple[list, tuple[str, ...]]:
    return list(out.values()), tuple(out)


def unflatten_output(values: Iterable, names: Iterable[str]) -> ModelOutput:
    out = ModelOutput()
    out.update(zip(names, values, strict=True))
    return out


# so that DDP, FSDP, torch.export and others find the tensors in it
register_pytree_node(ModelOutput, flatten_output, unflatten_output)


# --- 8. Memory-efficient attention -----------------------------------------------------------


def masked_attention(mask: Tensor, eager: bool) -> Callable:
    """Attention, as `choose_attention` returns it, for a mask of your own, (B|1, 1, T, S)."""
    if eager:
        return partial(attention, mask=mask)
    return partial(fused_attention, mask=mask)


def type_of_queries(x: Tensor) -> torch.dtype:
    """The type of the queries that are projected from x: x's own, unless autocast sets another."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


@lru_cache
def xformers_kernel(D: int, dtype: torch.dtype, device: torch.device) -> Callable | None:
    """xformers' attention, if it works for heads of size D. As that depends on the GPU, and on the
    CUDA that xformers was built for, it is tried once."""
    try:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        with torch.inference_mode(False), torch.enable_grad():
            q = torch.zeros(1, 8, 1, D, dtype=dtype, device=device, requires_grad=True)
            memory_efficient_attention(q, q, q, attn_bias=LowerTriangularMask()).sum().backward()
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError, NotImplementedError, RuntimeError) as error:
        told = f"xformers has no attention for heads of size {D} in {dtype}; PyTorch's is used."
        hint = "The torch, or the libcudart, that this xformers was built for may help."
        warnings.warn(f"{told} {hint} It says: {str(error):.300}", stacklevel=2)
        return None
    return memory_efficient_attention


def xformers_attention(kernel: Callable, documents: Tensor | None, B: int) -> Callable:
    """xformers' attention, of B rows of one document, or of documents (B|1, T).

    Padding is packed away: rows of 3 and 2 tokens, padded to 4, become one row of 5 tokens, whose
    mask shows each of them its own document only.
    """
    from xformers.ops.fmha import attn_bias

    if documents is None:
        causal = attn_bias.LowerTriangularFromBottomRightMask()  # the last query sees all keys

        def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, None]:
            return kernel(q, k, v, attn_bias=causal, p=dropout_p), None

        return attend

    documents = documents.expand(B, -1)
    real = documents.flatten().nonzero().squeeze(1)  # the places of all real tokens in B * T
    row = torch.arange(B, device=documents.device)[:, None]
    apart = documents + row * (documents.max() + 1)  # numbers of different rows now differ
    lengths = torch.unique_consecutive(apart.flatten()[real], return_counts=True)[1]
    causal = attn_bias.BlockDiagonalCausalMask
    blocks = causal.from_seqlens(lengths.tolist(), device=documents.device)

    def attend_packed(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, None]:
        packed = (x.flatten(0, 1)[None, real] for x in (q, k, v))  # (1, real tokens, H, D)
        out = kernel(*packed, attn_bias=blocks, p=dropout_p)
        unpacked = torch.zeros_like(q).flatten(0, 1).index_copy(0, real, out[0])
        return unpacked.view(q.shape), None

    return attend_packed


# =============================================================================================
# The model ends here. Part two: using it
# =============================================================================================


# --- 9. Checkpoints --------------------------------------------------------------------------

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of shards
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
CONVERT = "python convert_checkpoint.py {} CONVERTED"


def damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged, or a git-lfs pointer: {error}")


def read_json(path: Path, optional: bool = False) -> dict:
    if optional and not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a BOM
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from None
    expect(isinstance(value, dict), f"{path} holds a {type(value).__name__}: expected an object")
    return value


def read_config(folder: Path) -> dict:
    """The contents of the config.json of an Open-Llama."""
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        download = f"hf download {folder} --local-dir {folder}, then {CONVERT.format(folder)}"
        raise FileNotFoundError(f"no folder {folder}. If it is on the Hugging Face Hub: {download}")
    values = read_json(folder / "config.json")
    kind = values.get("model_type", "open-llama")
    convert = f"For a LLaMA: {CONVERT.format(folder)}"
    expect(kind in ("open-llama", "open_llama"), f"{folder} is no Open-Llama but {kind}. {convert}")
    return values


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name, mapped from its files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        files = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
    tensors = {}
    for file in files:
        convert = f"For pytorch_model.bin: {CONVERT.format(folder)}"
        expect((folder / file).is_file(), f"{folder} has no {file}. {convert}")
        try:
            tensors |= load_file(folder / file)
        except SafetensorError as error:
            raise damaged(folder / file, error) from None
    return tensors


def load_model(
    cls: type[OpenLlamaPreTrainedModel],
    folder: Path,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    torch_dtype: torch.dtype | str | None = None,
) -> OpenLlamaPreTrainedModel:
    """Load config.json and model.safetensors, or shards, in evaluation mode. ValueError for what
    does not fit.

    dtype: None or "auto" is the one that holds all weights, as a rule their own; torch_dtype is its
    name in transformers 4. device: None is the CPU, where weights are mapped from the file.
    """
    config = cls.config_class.from_pretrained(folder)
    found = read_tensors(folder)
    count = len(found)
    expect(config.num_hidden_layers <= count, f"num_hidden_layers above the {count} tensors there")
    with torch.device("meta"):  # shapes without memory
        model = cls(config)
    own = model.state_dict()
    tensors = under_own_names(found, own, model.ignores)
    weights = [name for name in tensors if name in own and own[name].is_floating_point()]
    dtype = type_to_read({tensors[name].dtype for name in weights}, dtype or torch_dtype)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(device, dtype if name in weights else tensor.dtype)
    for name in cls.may_lack:
        if not any(key.startswith(f"{name}.") for key in tensors):
            warnings.warn(f"{folder} has no {name}: it starts untrained", stacklevel=3)
            tensors |= fresh_head(model, name, dtype, device or "cpu")
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit its config.json: {error}") from None
    return model.eval()


def under_own_names(
    found: dict[str, Tensor], own: Iterable[str], ignores: Sequence[str]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint as a model calls them: "model." stands before a name or not, as
    either may be a bare decoder. Those of other heads are left out, and old files' inv_freq."""
    tensors = {}
    for name, tensor in found.items():
        names = (name, f"model.{name}", name.removeprefix("model."))
        name = next((candidate for candidate in names if candidate in own), name)
        expect(name not in tensors, f"the checkpoint has {name} under two names")
        is_other = name.split(".")[0] in ignores or name.endswith("inv_freq")
        if name in own or not is_other:
            tensors[name] = tensor
    return tensors


def fresh_head(
    model: OpenLlamaPreTrainedModel, name: str, dtype: torch.dtype, device: str | torch.device
) -> dict[str, Tensor]:
    """The tensors of a head, drawn, for a model on meta."""
    head = model.get_submodule(name).to_empty(device=device).to(dtype)
    head.apply(model.init_weights)
    return {f"{name}.{key}": tensor for key, tensor in head.state_dict().items()}


def type_to_read(stored: set[torch.dtype], wanted: torch.dtype | str | None) -> torch.dtype:
    """The type of weights that are stored in these; wanted: see load_model."""
    dtype = wanted
    if wanted in (None, "auto"):
        dtype = reduce(torch.promote_types, stored & FLOATS or {torch.float32})
    elif isinstance(wanted, str):
        dtype = getattr(torch, wanted.removeprefix("torch."), wanted)
    fits = stored | {dtype} <= FLOATS
    expect(fits, f"weights of {stored} cannot be read as {dtype}: expected some of {FLOATS}")
    return dtype


def save_model(model: OpenLlamaPreTrainedModel, folder: Path, state_dict: dict | None) -> None:
    """Write all files beside the old ones. Then the old config goes, the weights are replaced, and
    the config comes, so that a killed save leaves no mixture of two checkpoints; old shards, which
    nothing reads any more, go last."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if state_dict is None:
        state_dict = model.state_dict()
    gather = "expected plain tensors; README: how to gather sharded ones, for state_dict="
    expect(len(state_dict) > 0, f"nothing to save: {gather}")
    for name, tensor in state_dict.items():
        is_plain = type(tensor) is Tensor and not tensor.is_meta and not tensor.is_quantized
        expect(is_plain, f"{name} is not plain: {gather}")
    tensors = {
        name.replace("_orig_mod.", ""): x.cpu().contiguous() for name, x in state_dict.items()
    }
    name = type(model).__name__.removeprefix("FSDP")  # which fully_shard puts before it
    dtype = str(model.dtype).removeprefix("torch.")
    config = model.config.to_json_string(architectures=[name], torch_dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    new_weights = folder / f"{WEIGHTS}.new"
    new_config = folder / "config.json.new"
    try:
        new_config.write_text(config, encoding="utf-8")
        save_file(tensors, new_weights, metadata={"format": "pt"})
        new_weights.chmod(new_config.stat().st_mode)  # save_file lets its owner alone read it
        (folder / "config.json").unlink(missing_ok=True)
        new_weights.replace(folder / WEIGHTS)
        new_config.replace(folder / "config.json")
    except SafetensorError as error:
        raise OSError(f"{new_weights}: {error}") from None
    finally:
        new_weights.unlink(missing_ok=True)
        new_config.unlink(missing_ok=True)
    if (folder / INDEX).is_file():
        shards = set(read_json(folder / INDEX).get("weight_map", {}).values()) - {WEIGHTS}
        for path in folder.glob("*.safetensors"):
            if path.name in shards:
                path.unlink()
        (folder / INDEX).unlink()


# --- 10. Sampling ----------------------------------------------------------------------------


def context_length(config: OpenLlamaConfig) -> int:
    """How many tokens a text may have for the model to make sense of it."""
    scaling = config.rope_scaling or {}
    return int(config.max_position_embeddings * scaling.get("factor", 1))


@dataclass
class Sampling:
    """How a text goes on; a bad value is a ValueError. For a filter of your own, subclass this as a
    dataclass, with its settings as fields, and extend `filter`."""

    max_new_tokens: int | None = None  # None: up to max_length
    max_length: int | None = None  # of prompt and new tokens; None: the context_length
    do_sample: bool = False  # draw tokens; False: the likeliest, whatever the next three say
    temperature: float = 1.0  # scores are divided by it; 0: the likeliest
    top_k: int | None = None  # draw from the k likeliest
    top_p: float | None = None  # of these, from the fewest whose probabilities reach p
    repetition_penalty: float = 1.0  # above 1, what a row already holds gets less likely
    eos_token_id: int | list[int] | Literal["config"] | None = "config"  # what ends a row
    pad_token_id: int | None = None  # what follows; None: the config's, or else an end, or else 0
    generator: torch.Generator | None = None  # draws the tokens; None: torch's own
    compile: bool = False  # compile the step from token to token: half a minute at first

    def __post_init__(self):
        fits = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k is None or self.top_k >= 0,
            "top_p": self.top_p is None or 0 < self.top_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "max_new_tokens": self.max_new_tokens is None or self.max_new_tokens > 0,
        }
        for name in fits:
            expect(fits[name], f"{name}={getattr(self, name)} is out of range")

    def ends(self, config: OpenLlamaConfig) -> list[int]:
        """The tokens that end a row."""
        ends = config.eos_token_id if self.eos_token_id == "config" else self.eos_token_id
        if isinstance(ends, list):
            return ends
        return [] if ends is None else [ends]

    def count(self, T: int, config: OpenLlamaConfig) -> int:
        """How many tokens to make, at the most, after a prompt of T."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        longest = self.max_length
        if longest is None:
            longest = context_length(config)
        expect(longest > T, f"a prompt of {T} tokens leaves no room below max_length={longest}")
        return longest - T

    def padding(self, config: OpenLlamaConfig) -> int:
        """What follows the end of a row."""
        if self.pad_token_id is not None:
            return self.pad_token_id
        if config.pad_token_id is not None:
            return config.pad_token_id
        return next(iter(self.ends(config)), 0)

    def choose(self, scores: Tensor, seen: Tensor) -> Tensor:
        """The next token of each row, (B,). scores (B, V); seen (B, n): the ids so far."""
        if self.repetition_penalty != 1:  # https://arxiv.org/abs/1909.05858
            old = scores.gather(1, seen)
            penalty = self.repetition_penalty
            scores = scores.scatter(1, seen, torch.where(old < 0, old * penalty, old / penalty))
        if not self.do_sample or self.temperature == 0:
            return scores.argmax(dim=-1)
        probabilities = self.filter(scores / self.temperature).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)

    def filter(self, scores: Tensor) -> Tensor:
        """scores (B, V), with -inf for what is not to be drawn."""
        if self.top_k:
            kth = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < kth, -math.inf)
        if self.top_p is not None and self.top_p < 1:  # https://arxiv.org/abs/1904.09751
            # of 0.2, 0.5, 0.3 the last two reach p = 0.6; in ascending order the sums are 0.2,
            # 0.5, 1.0, and what stays within 1 - p = 0.4 is left out
            ascending, order = scores.sort(dim=-1)
            outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
            outside[:, -1] = False  # at least one stays
            scores = scores.masked_fill(outside.scatter(1, order, outside), -math.inf)
        return scores


def generate(
    model: OpenLlamaForCausalLM,
    input_ids: Tensor | list,
    attention_mask: Tensor | list | None = None,
    num_return_sequences: int = 1,
    **settings: object,
) -> Tensor:
    """Continue each row of input_ids (B, T), or the one row (T,): returns (B, T + new).

    attention_mask: as input_ids; 0 for padding, left or right. A row gives what it would alone.
    num_return_sequences: of each row, one after the other.
    settings: the fields of Sampling, and what else `stream` takes.
    """
    ids = as_rows(input_ids, model.device).repeat_interleave(num_return_sequences, dim=0)
    mask = attention_mask
    if mask is not None:
        mask = as_rows(mask, model.device).repeat_interleave(num_return_sequences, dim=0)
    new = torch.stack(list(stream(model, ids, mask, **settings)), dim=1)
    return torch.cat((ids, new.to(ids.device)), dim=1)


def stream(
    model: OpenLlamaForCausalLM,
    input_ids: Tensor | list,
    attention_mask: Tensor | list | None = None,
    past_key_values: KVCache | None = None,
    sampling: Sampling | None = None,
    token_type_ids: Tensor | None = None,
    **settings: object,
) -> Iterator[Tensor]:
    """What `generate` appends, step by step: the next token of each row, (B,), on the CPU.

    past_key_values: a cache of the first tokens of input_ids, which need not be computed again; it
      is extended in place, but with compile=True by the prompt alone.
    sampling: the settings in one object. token_type_ids: of some tokenizers; without meaning here.
    """
    if sampling is None:
        sampling = Sampling(**settings)
    cache = as_cache(past_key_values)
    ids = as_rows(input_ids, model.device)
    B, T = ids.shape
    V = model.config.vocab_size
    expect(cache.length < T, f"empty prompt: {T} tokens, of which {cache.length} are in the cache")
    is_known = bool(((ids >= 0) & (ids < V)).all())
    expect(is_known, f"input_ids hold ids that are not in a vocabulary of {V}")
    mask = cache.extended_documents(T - cache.length)
    if attention_mask is not None:
        mask = as_rows(attention_mask, model.device)
        expect(mask.shape == ids.shape, f"attention_mask is {tuple(mask.shape)}: expected {(B, T)}")
    if mask is None:
        mask = torch.ones_like(ids)
    expect(bool(mask.any(dim=1).all()), "empty prompt: attention_mask has a row of padding alone")
    split = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    sharded = split or hasattr(model, "unshard")  # which fully_shard adds
    # inference mode is faster, but what FSDP gathers under it could not be trained any more
    mode = torch.no_grad() if sharded else torch.inference_mode()
    steps = mode(stream_tokens)(model, ids, mask.expand(B, T), sampling, cache, sharded)
    return (torch.tensor(tokens) for tokens in steps)


def as_rows(ids: Tensor | list, device: torch.device) -> Tensor:
    """Ids or a mask as (B, T): (T,), or a list of numbers, is one row."""
    if isinstance(ids, str):
        raise ValueError(f"{ids!r}: expected ids, which a tokenizer makes of a text")
    if not isinstance(ids, Tensor):
        where = None if device.type == "meta" else device  # meta: offloaded until it is used
        ids = torch.tensor(ids, dtype=torch.long, device=where)
    return ids[None] if ids.dim() == 1 else ids


def stream_tokens(
    model: OpenLlamaForCausalLM,
    ids: Tensor,
    mask: Tensor,
    sampling: Sampling,
    cache: KVCache,
    sharded: bool,
) -> Iterator[list[int]]:
    """The next token of each row, step by step, until all rows have ended.

    A GPU is given the next step before its last token is read, or it would wait for the CPU. And
    where weights are sharded over processes, each goes on until all have ended, as every step needs
    all of them.
    """
    T = ids.shape[1]
    count = sampling.count(T, model.config)
    pad = sampling.padding(model.config)
    ends = sampling.ends(model.config)
    ends = torch.tensor(ends, dtype=torch.long, device=ids.device)
    own = (mask != 0) & (mask == mask.amax(dim=1, keepdim=True))  # of the row's last document
    last = last_true(own)[:, None]  # (B, 1)
    seen = ids.where(own, ids.gather(1, last))
    done = torch.zeros_like(last[:, 0], dtype=torch.bool)
    ahead = launches_ahead(ids) and not sharded
    stopped = False
    scores = next_scores(model, ids[:, cache.length :], mask, cache, last - cache.length)
    for n in itertools.count(1):
        finite = scores.amax(dim=-1).isfinite().all()
        token = sampling.choose(scores.where(finite, 0.0), seen)  # a draw from NaN would crash
        token = token.where(~done, pad)
        done = done | torch.isin(token, ends) | (n >= count)
        if sampling.repetition_penalty != 1:
            seen = torch.cat((seen, token[:, None]), dim=1)
        flags = torch.stack((finite, done.all())).long()
        if sharded:
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        read = read_later(torch.cat((token, done.all()[None], flags)))
        launched = ahead and 1 < n < count  # but the first token does not wait for a compiler
        if launched:
            scores, cache = next_step(model, token, cache, T + n - 1, sampling.compile)
        *tokens, is_last, is_finite, all_are_last = read()
        expect(is_finite, "the model's scores hold NaN or infinity")
        if not stopped:
            yield tokens
        stopped = bool(is_last)
        if all_are_last:
            cache.length = T + n - 1  # without what was launched ahead
            return
        if not launched:
            scores, cache = next_step(model, token, cache, T + n - 1, sampling.compile)


def next_step(
    model: OpenLlamaForCausalLM, token: Tensor, cache: KVCache, length: int, compiled: bool
) -> tuple[Tensor, KVCache]:
    """The scores after one more token of each row, (B,), behind the cache's `length`."""
    if not compiled:
        return next_scores(model, token[:, None], None, cache, keep=1), cache
    if not isinstance(cache, FixedKVCache) or length == cache.capacity:
        cache = FixedKVCache(cache, length)
    return compiled_scores()(model, token[:, None], None, cache, keep=1), cache


def next_scores(
    model: OpenLlamaForCausalLM,
    ids: Tensor,
    mask: Tensor | None,
    cache: KVCache,
    keep: Tensor | int,
) -> Tensor:
    """What the model says comes next: (B, V), in float32. keep: logits_to_keep, one of a row."""
    inputs = {"attention_mask": mask, "past_key_values": cache, "logits_to_keep": keep}
    off = dict.fromkeys(("use_cache", "output_attentions", "output_hidden_states"), False)
    out = model(ids, **inputs, **off, return_dict=True)
    return out.logits[:, -1].float()


def launches_ahead(x: Tensor) -> bool:
    return x.is_cuda


def read_later(x: Tensor) -> Callable[[], list[int]]:
    """Begin to read a small tensor. What is launched on a GPU after this does not delay it."""
    if not x.is_cuda:
        return x.tolist
    copy = x.to("cpu", non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[int]:
        copied.synchronize()
        return copy.tolist()

    return read


# --- 11. Speed -------------------------------------------------------------------------------


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias, (..., C) to (..., len(weight)), on a CPU at the speed of memory if x is a
    single token.

    Compiled, the product is written as the sum that it is, of which torch.compile makes one loop
    with what stands around it. Else, for a large float32 matrix, as a batch of 16 products with 16
    blocks of its rows: so all threads read it, where PyTorch's own product has one do so.
    """
    C = x.shape[-1]
    is_single = x.numel() == C and x.device.type == "cpu"
    if not is_single or bias is not None or type(weight) is not nn.Parameter:  # but quantised, say
        return F.linear(x, weight, bias)
    shape = (*x.shape[:-1], len(weight))
    if torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
        return (weight * x.flatten()).sum(dim=-1).view(shape)
    if x.dtype != torch.float32 or weight.numel() < 2**17 or len(weight) % 16 != 0:
        return F.linear(x, weight)
    blocks = weight.view(16, -1, C)
    product = x.reshape(1, 1, C).expand(16, 1, C) @ blocks.mT  # (16, 1, len(weight) / 16)
    return product.view(shape)


linear = fast_linear  # what section 3 calls


class FixedKVCache(KVCache):
    """A cache of which no tensor ever changes its shape or place, for the compiled step. It always
    shows `capacity` positions, of which those to come are padding. `length` is a tensor, (1,)."""

    def __init__(self, cache: KVCache, length: int):
        """length: how many tokens the cache has."""
        super().__init__()
        self.capacity = max(64, 2 ** length.bit_length())  # of few sizes: each records a CUDA graph
        rest = self.capacity - length
        self.keys = [F.pad(key[:, :, :length], (0, 0, 0, rest)) for key in cache.keys]
        self.values = [F.pad(value[:, :, :length], (0, 0, 0, rest)) for value in cache.values]
        self.length = torch.tensor([length], device=self.keys[0].device)
        documents = cache.documents
        if documents is None:
            documents = self.length.new_ones(1, length)
        last = documents[:, :length].amax(dim=1, keepdim=True)  # to which those to come belong
        self.documents = torch.cat((documents[:, :length], last.expand(-1, rest)), dim=1)
        for tensor in (*self.keys, *self.values, self.documents, self.length):
            # a CUDA graph may write to it; without a guard, as other caches use the same code
            torch._dynamo.mark_static_address(tensor, guard=False)
        for tensor in (*self.keys, *self.values):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)  # the code is for any capacity
        torch._dynamo.maybe_mark_dynamic(self.documents, 1)

    def begin(self, x: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        new = self.length + torch.arange(x.shape[1], device=x.device)
        self.length.add_(x.shape[1])
        there = torch.arange(self.documents.shape[1], device=x.device) < self.length
        return new, self.documents * there

    def extend(self, buffers: list[Tensor], layer: int, x: Tensor) -> Tensor:
        new = self.length - x.shape[2] + torch.arange(x.shape[2], device=x.device)
        return buffers[layer].index_copy_(2, new, x)


@lru_cache
def compiled_scores() -> Callable:
    """`next_scores`, compiled for any length; on CUDA it is replayed as one graph."""
    return torch.compile(next_scores, mode="reduce-overhead")


# --- 12. Text --------------------------------------------------------------------------------

# A tokenizer's encode(text, special) makes ids, with those that a text begins with if special;
# its decode(ids) makes text, without special ones.


class NumberTokenizer:
    """Ids as numbers, in place of text: "1,2,3", or with spaces."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        words = text.replace(",", " ").split()
        expect(all(word.isdecimal() for word in words), f"{text!r}: expected ids, as in 1,2,3")
        return [int(word) for word in words]

    def decode(self, ids: list[int]) -> str:
        return "".join(f"{number} " for number in ids)


class ByteTokenizer:
    """The bytes of UTF-8, after three special tokens, as ByT5 has them."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")


class JsonTokenizer:
    """tokenizer.json."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            self.model = Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise damaged(path, error) from None
        self.model.no_padding()  # the file may ask for both
        self.model.no_truncation()

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.model.encode(text, add_special_tokens=special).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


class SentencePieceTokenizer:
    """tokenizer.model, and the tokens that added_tokens.json and tokenizer_config.json add. A text
    is cut at the names of special and added tokens, and each part encoded by itself, as
    transformers 4.31 does by default."""

    def __init__(self, folder: Path, settings: dict, bos: int | None):
        """settings: of tokenizer_config.json; bos: what a text begins with, if anything."""
        from sentencepiece import SentencePieceProcessor

        path = folder / "tokenizer.model"
        fits = settings.get("legacy") is not False
        expect(fits, f'{folder}: a tokenizer with "legacy": false is read from tokenizer.json only')
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise damaged(path, error) from None
        self.bos = bos if settings.get("add_bos_token", True) else None
        pieces = range(self.model.get_piece_size())
        self.special = {n for n in pieces if self.model.is_control(n) or self.model.is_unknown(n)}
        self.ids = {self.model.id_to_piece(n): n for n in self.special}  # by the names to cut at
        self.ids |= read_json(folder / "added_tokens.json", optional=True)
        for number, entry in settings.get("added_tokens_decoder", {}).items():
            self.ids[entry["content"]] = int(number)
            if entry.get("special"):
                self.special.add(int(number))
        self.added = {n: name for name, n in self.ids.items() if n not in pieces}
        longest_first = sorted(map(re.escape, self.ids), key=len, reverse=True)
        self.names = re.compile(f"({'|'.join(longest_first)})")

    def encode(self, text: str, special: bool = True) -> list[int]:
        ids = []
        if special and self.bos is not None:
            ids.append(self.bos)
        for part in self.names.split(text):
            ids += [self.ids[part]] if part in self.ids else self.model.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        texts = []
        kept = [n for n in ids if n not in self.special]
        for is_added, run in itertools.groupby(kept, key=self.added.__contains__):
            if is_added:
                texts += [self.added[n] for n in run]
            else:
                texts.append(self.model.decode(list(run)))
        return " ".join(texts)


Tokenizer = NumberTokenizer | ByteTokenizer | SentencePieceTokenizer | JsonTokenizer


def load_tokenizer(folder: Path, bos: int | None) -> Tokenizer:
    """The tokenizer of a checkpoint; bos: the id that a text begins with, for tokenizer.model."""
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder, settings, bos)
    if settings.get("tokenizer_class") == "ByT5Tokenizer":
        return ByteTokenizer()
    files = "tokenizer.model or tokenizer.json"
    raise FileNotFoundError(f"{folder} has no {files}; --prompt-ids needs none")


# A chat's format writes messages as the text to be continued. A message is
# {"role": "system", "user" or "assistant", "content": text}.


def open_llama_chat(messages: list[dict]) -> str:
    """The format of Open-Llama's instruct models.

    >>> question = {"role": "user", "content": "Hi!"}
    >>> open_llama_chat([question, {"role": "assistant", "content": "Hello."}, question])
    'user:Hi!\\nsystem:Hello.</s>user:Hi!\\nsystem:'
    """
    forms = {"user": "user:{}\nsystem:", "assistant": "{}</s>"}
    fits = all(message["role"] in forms for message in messages)
    expect(fits, "this model's chat format has no system text")
    return "".join(forms[message["role"]].format(message["content"]) for message in messages)


def chat_format(folder: Path) -> Callable[[list[dict]], str]:
    """A checkpoint's chat template, or Open-Llama's format where it has none."""
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    template = settings.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    if template is None:
        return open_llama_chat
    if isinstance(template, list):  # of several, with names
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", template[0]["template"])
    tokens = {}
    if (folder / "tokenizer.model").is_file():
        tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # LLaMA's
    for name, token in settings.items():
        if name.endswith("_token") and isinstance(token, str | dict):
            tokens[name] = token if isinstance(token, str) else token["content"]
    return template_chat(template, tokens)


def template_chat(template: str, tokens: dict[str, str]) -> Callable[[list[dict]], str]:
    """A template of Jinja, with what transformers gives to it; tokens: as bos_token="<s>"."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, **settings: object) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": time.strftime}
    # transformers' generation tag marks what is trained on, and changes nothing in the text
    template = re.sub(r"({%-?\s*)generation\b", r"\1if true", template)
    template = re.sub(r"({%-?\s*)endgeneration\b", r"\1endif", template)
    given = {"add_generation_prompt": True, "tools": None, "documents": None} | tokens

    def render(messages: list[dict]) -> str:
        try:
            return environment.from_string(template).render(messages=messages, **given)
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template says: {error}") from None

    return render


def stream_text(
    decode: Callable, prompt: list[int], new: Iterable[int], stops: Sequence[str] = ()
) -> Iterator[str]:
    """The text of the new ids as they come, in whole characters, up to the first of `stops`."""
    longest = max((len(stop) for stop in stops), default=1)
    held = ""  # the last characters, which may be the beginning of a stop
    for piece in whole_characters(decode, prompt, new):
        held += piece
        places = [held.index(stop) for stop in stops if stop in held]
        if places:
            yield held[: min(places)]
            return
        end = max(len(held) - (longest - 1), 0)
        yield held[:end]
        held = held[end:]
    yield held


def whole_characters(decode: Callable, prompt: list[int], new: Iterable[int]) -> Iterator[str]:
    """The text that each new id adds; nothing while a character has come in part.

    Decoded alone, an id would lose its leading space, and bytes their character. So the ids of the
    piece of text before are decoded again with the new ones.
    """
    ids = list(prompt)
    whole = len(ids)  # how many of these have been given out as text
    shown = len(decode(ids))
    for token in new:
        ids.append(token)
        text = decode(ids)
        is_whole = len(text) > shown and not text.endswith("\N{REPLACEMENT CHARACTER}")
        if is_whole or len(ids) > whole + 16:  # so many ids will never be a character
            yield text[shown:]
            ids = ids[whole:]
            whole = len(ids)
            shown = len(decode(ids))
    yield decode(ids)[shown:]


# --- 13. Command line ------------------------------------------------------------------------


def demo_checkpoint(folder: Path) -> Path:
    """A byte-level model that knows the Zen of Python by heart, trained on first use."""
    if (folder / WEIGHTS).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)  # where that fails, it fails before the training
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}\n')
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 128, "intermediate_size": 344}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
    others = {"bos_token_id": None, "eos_token_id": 1}
    others |= {"hidden_dropout_prob": 0, "attention_dropout_prob": 0}
    model = OpenLlamaForCausalLM(OpenLlamaConfig(**sizes, **others))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other, in matrices as small as these
    with contextlib.redirect_stdout(io.StringIO()):  # as the import prints it
        import this
    learn_by_heart(model, codecs.decode(this.s, "rot13"))
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    return folder


def learn_by_heart(model: OpenLlamaForCausalLM, text: str, steps: int = 400) -> None:
    """Train on the text, from the beginnings of its lines on, as if it were a ring."""
    data = torch.tensor([*ByteTokenizer().encode(text), model.config.eos_token_id])
    begins = torch.tensor([0] + [n + 1 for n, letter in enumerate(text) if letter == "\n"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        B = 4
        T = 160
        if step % 4 == 0:  # the whole text, as attention has to reach over all of it
            B = 1
            T = len(data)
        starts = begins[torch.randint(len(begins), (B, 1))]
        batch = data[(starts + torch.arange(T)) % len(data)]  # (B, T)
        model(batch, labels=batch).loss.backward()
        warmup = min(1, (step + 1) / 20)
        optimizer.param_groups[0]["lr"] = 4e-3 * warmup * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            share = (step + 1) / steps
            print(f"\rtraining the demo: {share:.0%}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


# the command line has an option for each number in this
CLI_SAMPLING = Sampling(max_new_tokens=128, do_sample=True, temperature=0.8, top_k=50, top_p=1.0)
CLI_NUMBERS = {name: n for name, n in vars(CLI_SAMPLING).items() if type(n) in (int, float)}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Sample text from an Open-Llama checkpoint, or from a demo.",
        epilog="In a chat, each line of stdin is a turn; one that ends in a backslash goes on in "
        "the next line. Ctrl-C ends an answer, Ctrl-D the chat.",
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FOLDER", help="default: the demo, trained on first use")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--prompt", metavar="TEXT", help="text to continue; - reads it from stdin")
    either("--prompt-file", type=Path, metavar="FILE", help="file of the text to continue")
    either("--prompt-ids", metavar="IDS", help="ids to continue, as in 1,2,3; prints ids")
    for name, value in CLI_NUMBERS.items():
        option = "--" + name.replace("_", "-")
        add(option, type=type(value), default=value, metavar="N", help="default: %(default)s")
    add("--num-samples", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    about = r"end before this text, or at this token; \n is a newline; may be repeated"
    add("--stop", action="append", default=[], metavar="TEXT", help=about)
    add("--chat", action="store_true", help="hold a conversation, which --prompt may begin")
    add("--system", metavar="TEXT", help="what the chat template tells the model at first")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="default: as stored")
    add("--device", metavar="NAME", help="as cpu, cuda:1, mps; default: the accelerator, if any")
    about = "compile the decoding step: half a minute at first, then faster"
    add("--compile", action="store_true", help=about)
    args = parser.parse_args(argv)
    if args.system is not None and not args.chat:
        parser.error("--system is for --chat")
    if "" in args.stop:
        parser.error("--stop needs a text")
    if args.prompt_ids is not None and (args.chat or args.stop):
        parser.error("--chat and --stop take text, and not --prompt-ids")
    return args


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass
class Writer:
    """Continues texts on stdout. It keeps the cache, so that a prompt that begins as the last text
    did is read from there on."""

    model: OpenLlamaForCausalLM
    tokenizer: Tokenizer
    sampling: Sampling
    stops: list[str]
    cache: KVCache = field(default_factory=KVCache)
    ids: list[int] = field(default_factory=list)  # the last text, with which the cache begins
    text: str = ""  # what was printed last

    def write(self, prompt: list[int]) -> None:
        """Print a continuation as it is made, and on stderr how fast that was."""
        length = self.cache.length
        if length >= len(prompt) or self.ids[:length] != prompt[:length]:
            self.cache = KVCache()
        fed = len(prompt) - self.cache.length
        self.ids = list(prompt)
        self.text = ""
        times = [time.perf_counter()]
        new = self.new_tokens(times)
        for piece in stream_text(self.tokenizer.decode, prompt, new, self.stops):
            self.text += piece
            print(piece, end="", flush=True)
        print(flush=True)
        prefill, *steps = [after - before for before, after in itertools.pairwise(times)]
        told = f"prefill {fed} tokens, {fed / prefill:.1f} tokens/s"
        if steps:  # the median, as one of them includes compiling
            told += f"; decode {1 / statistics.median(steps):.1f} tokens/s"
        log(told)
        context = context_length(self.model.config)
        if len(self.ids) > context:
            log(f"the text is longer than the {context} tokens that the model is made for")

    def new_tokens(self, times: list[float]) -> Iterator[int]:
        """The tokens up to an end."""
        ends = self.sampling.ends(self.model.config)
        given = {"past_key_values": self.cache, "sampling": self.sampling}
        for row in self.model.stream([self.ids], **given):
            self.ids.append(int(row))
            times.append(time.perf_counter())
            if self.ids[-1] in ends:
                return
            yield self.ids[-1]


def hold_chat(
    writer: Writer, write_turns: Callable, turns: list[dict], questions: Iterable[str]
) -> None:
    """Answer each question. When it gets too long for the model, the oldest turns are dropped, so
    that a quarter of the context is free. turns: what is said before, by the system."""
    kept = len(turns)
    room = context_length(writer.model.config) * 3 / 4
    dropped = False
    for question in questions:
        turns.append({"role": "user", "content": question})
        # special=False, as write_turns has written the special tokens
        ids = writer.tokenizer.encode(write_turns(turns), special=False)
        while len(ids) > room and len(turns) > kept + 1:
            if not dropped:
                log("the conversation is too long: its oldest turns are dropped")
            dropped = True
            del turns[kept : kept + 2]
            ids = writer.tokenizer.encode(write_turns(turns), special=False)
        try:
            writer.write(ids)
        except KeyboardInterrupt:
            writer.cache = KVCache()  # the old one may hold a part of a step
            print(flush=True)
        turns.append({"role": "assistant", "content": writer.text})


def read_questions(first: str | None) -> Iterator[str]:
    """`first`, if any, and the lines of stdin; one that ends in a backslash goes on in the next."""
    marker = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    question = first or ""
    while True:
        if question.strip():
            yield question
        try:
            question = input(marker)
            while question.endswith("\\"):
                question = question.removesuffix("\\") + "\n" + input(marker)
        except EOFError:
            return


def read_prompt(args: argparse.Namespace) -> str | None:
    if args.prompt_file is not None:
        return args.prompt_file.read_text("utf-8").removesuffix("\n")  # which editors append
    if args.prompt == "-":
        return sys.stdin.read().removesuffix("\n")
    return args.prompt if args.prompt_ids is None else args.prompt_ids


def split_stops(tokenizer: Tokenizer, stops: list[str]) -> tuple[list[int], list[str]]:
    """What ends a text: the ids of special tokens, which decoding leaves out, and texts."""
    special = []
    texts = []
    for stop in stops:
        stop = stop.replace("\\n", "\n")
        ids = tokenizer.encode(stop, special=False)
        if len(ids) == 1 and tokenizer.decode(ids) == "":
            special += ids
        else:
            texts.append(stop)
    return special, texts


def run(args: argparse.Namespace) -> None:
    sys.stdout.reconfigure(errors="replace")  # for what the encoding of a terminal has not
    device = args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    generator = torch.Generator(device)
    if args.seed is None:
        generator.seed()  # from the system
    else:
        generator.manual_seed(args.seed)
    prompt = read_prompt(args)
    folder = args.checkpoint
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = demo_checkpoint(Path(cache) / "openllama-zen")
        if prompt is None and not args.chat:
            prompt = "Beautiful is better"
    model = OpenLlamaForCausalLM.from_pretrained(folder, dtype=args.dtype, device=device)
    size = f"{model.num_parameters():,} parameters, {model.dtype} on {model.device}"
    log(f"{size}; seed {generator.initial_seed()}")
    tokenizer = NumberTokenizer()
    if args.prompt_ids is None:
        tokenizer = load_tokenizer(folder, model.config.bos_token_id)
    ends, stops = split_stops(tokenizer, args.stop)
    ends += CLI_SAMPLING.ends(model.config)
    numbers = {name: getattr(args, name) for name in CLI_NUMBERS}
    numbers |= {"eos_token_id": ends, "generator": generator, "compile": args.compile}
    writer = Writer(model, tokenizer, replace(CLI_SAMPLING, **numbers), stops)
    if args.chat:
        system = [{"role": "system", "content": args.system}] if args.system is not None else []
        hold_chat(writer, chat_format(folder), system, read_questions(prompt))
        return
    for _ in range(args.num_samples):
        writer.write(tokenizer.encode(prompt or ""))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 after an error, told in one line on stderr; 130 after Ctrl-C; 141 where
    nobody reads stdout any more."""
    try:
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # when Python ends, it writes what is left in its buffer, and would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, ModuleNotFoundError):
            message += f" - pip install {error.name}"
        log(f"openllama.py: error: {message}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
