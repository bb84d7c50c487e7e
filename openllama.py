# SPDX-License-Identifier: MIT
"""Open-Llama in one file: first the model, then what it takes to use it.

Open-Llama (s-JoL, 2023) is LLaMA (https://arxiv.org/abs/2302.13971) with three changes:

1. Stable embedding: a LayerNorm on the token embedding, from Bloom
   (https://arxiv.org/abs/2211.05100).
2. Shared embedding: the input embedding is the output matrix too, from PaLM
   (https://arxiv.org/abs/2204.02311).
3. Memory-efficient attention (https://arxiv.org/abs/2112.05682), which does not keep its T x S
   weights: by xformers on a GPU in half precision, elsewhere by PyTorch.

It also has dropout of attention weights and after the MLP. Results equal those of transformers
4.31, the last version to support this model, to rounding, but for its faults in padding, dynamic
scaling and dropout, which are mended. Tried with torch 2.11 and 2.13.

Part one, the model, runs alone.    Part two is for using it.
  1 Configuration                     9 Checkpoints
  2 RMSNorm, rotary embedding        10 Sampling
  3 Attention, MLP, layer            11 Speed
  4 Decoder                          12 Text
  5 Language model, classifier       13 Command line
  6 Positions, documents, mask
  7 Key-value cache, output
  8 Memory-efficient attention

Shapes are written in these letters; "B|1" means B, or 1 if one row serves all.

  B  batch: rows                    H  attention heads
  T  new tokens of a row            D  head size
  S  all tokens of a row,           C  hidden size, H * D
     cached and new                 V  vocabulary

This file leaves out: grouped-query attention, biases, other rotary scalings, beam search, saving
in shards, generation_config.json and other spellings of settings (see convert_checkpoint.py).
Downloads, quantisation, adapters and sharding over processes are left to libraries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial, reduce
from pathlib import Path
from typing import Literal, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node
from torch.utils.checkpoint import checkpoint

Ids = Tensor | list
Number = int | float  # as 1 may stand for 1.0 in a config.json

# =============================================================================================
# Part one: the model


# --- 1. Configuration ------------------------------------------------------------------------


@dataclass
class OpenLlamaConfig:
    """The model's sizes and switches, named as in config.json; the defaults are the 7B model's.
    ValueError names a setting that is impossible. For a setting of your own, subclass this as a
    dataclass, and name the subclass in your model's `config_class`."""

    model_type = "open-llama"  # not a setting
    vocab_size: int = 100000
    hidden_size: int = 4096
    intermediate_size: int = 11008  # of the MLP
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str | Callable = "silu"  # a name in ACTIVATIONS, or a function
    max_position_embeddings: int = 2048  # the length that the model is trained for
    initializer_range: Number = 0.02  # standard deviation of fresh weights
    rms_norm_eps: Number = 1e-6
    use_cache: bool = True  # outside of training
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2
    tie_word_embeddings: bool = False  # LLaMA's name for shared_input_output_embedding
    use_memory_efficient_attention: bool = True
    hidden_dropout_prob: Number = 0.1  # of what the MLP returns
    attention_dropout_prob: Number = 0.1  # of the attention weights
    use_stable_embedding: bool = True
    shared_input_output_embedding: bool = True
    rope_theta: Number = 10000.0
    rope_scaling: dict | None = None  # {"type": "linear" or "dynamic", "factor": at least 1}
    num_labels: int = 2  # of the classifier
    id2label: dict | None = None  # names of the labels, by number; their count is num_labels
    problem_type: str | None = None  # of the classifier; None: the labels tell
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True  # False: models return tuples

    def __post_init__(self):
        for name, kind in get_type_hints(OpenLlamaConfig).items():
            value = getattr(self, name)
            self.check(name, isinstance(value, kind), getattr(kind, "__name__", str(kind)))
            if kind is int:  # these are sizes; ids may be None, so their kind is int | None
                self.check(name, value > 0, "above 0")
        for name in ("hidden_dropout_prob", "attention_dropout_prob"):
            self.check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        even = 2 * self.num_attention_heads  # as rotary embedding turns pairs
        self.check("hidden_size", self.hidden_size % even == 0, f"a multiple of 2 x heads, {even}")
        is_pad = self.pad_token_id is None or self.pad_token_id in range(self.vocab_size)
        self.check("pad_token_id", is_pad, f"an id below vocab_size={self.vocab_size}")
        is_act = callable(self.hidden_act) or self.hidden_act in ACTIVATIONS
        self.check("hidden_act", is_act, f"a function, or one of {list(ACTIVATIONS)}")
        self.check("problem_type", self.problem_type in PROBLEM_TYPES, f"one of {PROBLEM_TYPES}")
        self.check_rope_scaling()
        if self.id2label:
            self.id2label = {int(number): name for number, name in self.id2label.items()}
            self.num_labels = len(self.id2label)

    def check(self, name: str, fits: bool, expected: str) -> None:
        expect(fits, f"{name}={getattr(self, name)!r}: expected {expected}")

    def check_rope_scaling(self) -> None:
        settings = dict(self.rope_scaling or {})
        kind = settings.pop("type", None)
        fits = kind in list(SCALINGS) and settings.keys() == {*SCALINGS[kind].settings}
        fits = fits and all(isinstance(n, Number) and n >= 1 for n in settings.values())
        expected = f"None, or a type of {list(SCALINGS)} with its settings, numbers from 1"
        self.check("rope_scaling", fits, expected)

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
        own = {setting.name for setting in fields(cls)}
        foreign = values.keys() - own - LIBRARY_KEYS
        wanted = {key: values[key] for key in foreign if values[key]}  # null and false are harmless
        expect(not wanted, f"Open-Llama does not have the settings {wanted}")
        return cls(**{key: value for key, value in values.items() if key in own})

    def to_dict(self) -> dict:
        return {"model_type": self.model_type, **asdict(self)}

    def to_json_string(self, **more: object) -> str:
        """The text of a config.json, with the keys of `more` added."""
        self.check("hidden_act", not callable(self.hidden_act), "a name, to write it to a file")
        return json.dumps(self.to_dict() | more, indent=2) + "\n"

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> OpenLlamaConfig:
        """Read a folder's config.json. OSError where there is none, ValueError if it is broken."""
        return cls.from_dict(read_config(Path(folder)))

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(self.to_json_string(), encoding="utf-8")


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
# what transformers writes into config.json about itself
LIBRARY_KEYS = {"_name_or_path", "architectures", "auto_map", "dtype", "label2id", "model_type"}
LIBRARY_KEYS |= {"tokenizer_class", "torch_dtype", "transformers_version"}


def expect(fits: bool, message: str) -> None:
    if not fits:
        raise ValueError(message)


# --- 2. RMSNorm, rotary embedding ------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x**2) + eps) * weight (https://arxiv.org/abs/1910.07467).

    PyTorch computes it in float32, and rounds once. (transformers 4.31 rounds the quotient, too.)
    """


class RotaryEmbedding:
    """Turns queries and keys, so that their products depend on how far apart the tokens are.

    RoPE (https://arxiv.org/abs/2104.09864) turns the pair n of a head, n < D/2, by the angle
    position * base ** (-2n / D). Each forward makes such an object. A scaling is a subclass.
    """

    settings: tuple[str, ...] = ()  # what config.rope_scaling holds besides the type

    def __init__(self, config: OpenLlamaConfig, tokens: Tokens, dtype: torch.dtype):
        """dtype: that of the queries and keys."""
        frequencies = self.frequencies(config, tokens)
        self.cos, self.sin = cos_sin(tokens.positions, frequencies, dtype)  # (B|1, T, 1, D)

    def base(self, config: OpenLlamaConfig, tokens: Tokens) -> float | Tensor:
        return config.rope_theta

    def frequencies(self, config: OpenLlamaConfig, tokens: Tokens) -> Tensor:
        """How far each pair turns from one position to the next, (D/2,)."""
        D = config.head_dim
        two_n = torch.arange(0, D, 2, device=tokens.new.device).float()
        return self.base(config, tokens) ** (-two_n / D)

    def rotate_queries(self, q: Tensor) -> Tensor:
        return apply_rotary(q, self.cos, self.sin)

    def rotate_new_keys(self, k: Tensor) -> Tensor:
        return apply_rotary(k, self.cos, self.sin)

    def rotate_all_keys(self, k: Tensor) -> Tensor:
        return k  # in DynamicNTKScaling they are turned after the cache, and not before it


class LinearScaling(RotaryEmbedding):
    """All angles are divided by a factor (https://arxiv.org/abs/2306.15595)."""

    settings = ("factor",)

    def frequencies(self, config: OpenLlamaConfig, tokens: Tokens) -> Tensor:
        return super().frequencies(config, tokens) / config.rope_scaling["factor"]


class DynamicNTKScaling(RotaryEmbedding):
    """The base grows with the text (https://arxiv.org/abs/2309.00071, "NTK-aware").

    As it grows, the angles of earlier tokens change too. So the cache holds keys that are not
    rotated yet, and all keys of a document are rotated by the same base whenever they are used.
    (transformers 4.31 caches rotated keys, of many bases.) Tokens are always counted for this:
    position_ids have no effect.
    """

    settings = ("factor",)

    def __init__(self, config: OpenLlamaConfig, tokens: Tokens, dtype: torch.dtype):
        frequencies = self.frequencies(config, tokens)  # (B|1, S|1, D/2)
        self.all_cos, self.all_sin = cos_sin(tokens.counted, frequencies, dtype)
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


# by rope_scaling["type"]
SCALINGS = {None: RotaryEmbedding, "linear": LinearScaling, "dynamic": DynamicNTKScaling}


def cos_sin(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `apply_rotary` takes, each (B|1, T, 1, D), for positions (B|1, T) and frequencies
    (D/2,), or (B|1, T|1, D/2) where tokens differ in them. All is float32 until the end."""
    angles = positions.float()[..., None] * frequencies  # (B|1, T, D/2)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)
    return cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)  # the same in all heads


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of x, a from its first half and b from its second, by its angle: a
    becomes a cos - b sin, and b becomes b cos + a sin. The minus is that of the sine's first half.

    The head (1, 2, 3, 4) has the pairs (1, 3), here turned by 90 degrees, and (2, 4), not turned:

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


def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Tensor) -> tuple:
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
    """The same by PyTorch's function, which keeps no weights (but for dropout on a CPU). mask None:
    causal attention, of as many queries as keys, or of one query, which is the last token's."""
    causal = mask is None
    if q.shape[1] == 1:  # one query sees all keys; is_causal would show it nothing but the first
        causal = False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=causal)
    return out.transpose(1, 2), None


linear = F.linear  # section 11 sets a function in its place that is faster on some CPUs


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
    """The base of all models: fresh weights, files (section 9), and what tools ask a model for."""

    config_class = OpenLlamaConfig
    accepts_loss_kwargs = False  # transformers' Trainer asks whether forward has num_items_in_batch
    ignores: tuple[str, ...] = ()  # modules of other models, which loading passes over
    may_lack: tuple[str, ...] = ()  # weights that loading draws if a checkpoint lacks them

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
    def from_pretrained(cls, folder: str | Path, **how: object) -> OpenLlamaPreTrainedModel:
        """Read a folder's config.json and weights. how: dtype and device, as in `load_model`."""
        return load_model(cls, Path(folder), **how)

    def save_pretrained(self, folder: str | Path, state_dict: dict | None = None) -> None:
        """Write config.json and model.safetensors. A sharded model needs a gathered state_dict."""
        save_model(self, Path(folder), self.state_dict() if state_dict is None else state_dict)

    def gradient_checkpointing_enable(self, *_: object, **__: object) -> None:
        """Training will compute each layer twice, for less memory. Arguments have no effect."""
        self.decoder.recompute = True

    def gradient_checkpointing_disable(self) -> None:
        self.decoder.recompute = False

    @property
    def decoder(self) -> OpenLlamaModel:
        return getattr(self, "model", self)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed_tokens

    @property
    def device(self) -> torch.device:
        return self.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype

    def setting(self, name: str, given: bool | None) -> bool:
        """The value of a switch: as given to forward, or else as the config says."""
        return getattr(self.config, name) if given is None else given


class OpenLlamaModel(OpenLlamaPreTrainedModel):
    """The decoder: embedding, layers, final norm."""

    ignores = ("lm_head", "score")

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        self.recompute = False  # whether training computes each layer again in the backward
        size = (config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(*size, padding_idx=config.pad_token_id)
        norm = nn.LayerNorm(config.hidden_size) if config.use_stable_embedding else nn.Identity()
        self.embed_layer_norm = norm
        layers = (OpenLlamaDecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.apply(self.init_weights)

    def choose_attention(self, tokens: Tokens, dtype: torch.dtype, eager: bool) -> Callable:
        """Choose, once for all layers, attend(q, k, v, dropout_p): a function that returns (B, T,
        H, D), and the weights (B, H, T, S) if eager, else None. A subclass may override this.

        xformers attends in half precision on CUDA, if it has a kernel, nothing is cached, and this
        is not being compiled; else PyTorch does. dtype: of q, k and v."""
        T = tokens.new.shape[0]
        S = tokens.counted.shape[1]
        if eager:
            return partial(attention, mask=visible_keys(tokens))
        one_document = tokens.documents is None
        half = tokens.new.is_cuda and dtype in (torch.float16, torch.bfloat16)
        if half and T == S and not torch.compiler.is_compiling():
            kernel = xformers_kernel(self.config.head_dim, dtype, tokens.new.device)
            if kernel is not None:
                return xformers_attention(kernel, tokens.documents)
        if one_document and T in (1, S):
            return fused_attention
        return partial(fused_attention, mask=visible_keys(tokens))

    def run_layer(self, layer: nn.Module, x: Tensor, shared: Shared) -> tuple:
        if self.recompute and self.training and shared.cache is None:  # a cache would grow twice
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
        use_cache: whether to return the cache; None: config.use_cache, and False in training.
        output_attentions, output_hidden_states, return_dict: None: as the config says.
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
        # queries will have the type of any product with x: x's own, or the one that autocast sets
        dtype = torch.mm(x.new_empty(0, 1), x.new_empty(1, 0)).dtype
        cache = as_cache(past_key_values)
        documents = number_documents(attention_mask, position_ids, bool(past_key_values))
        tokens = locate(x, documents, position_ids, cache)
        scaling = self.config.rope_scaling or {"type": None}
        eager = output_attentions or not self.config.use_memory_efficient_attention
        shared = Shared(
            rotary=SCALINGS[scaling["type"]](self.config, tokens, dtype),
            attend=self.choose_attention(tokens, dtype, eager),
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

        out = ModelOutput(
            last_hidden_state=x,
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return out if self.setting("return_dict", return_dict) else out.to_tuple()


# --- 5. Language model, classifier -----------------------------------------------------------


class OpenLlamaForCausalLM(OpenLlamaPreTrainedModel):
    """The language model. Its output matrix is the embedding, or that of `lm_head`."""

    accepts_loss_kwargs = True
    loss_type = "ForCausalLM"  # tells transformers' Trainer that forward shifts the labels
    generation_config = prepare_inputs_for_generation = None  # PEFT fails without these names

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        self.model = OpenLlamaModel(config)
        if config.has_own_head:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
            self.init_weights(self.lm_head)
        elif config.tie_word_embeddings:
            self.ignores = ("lm_head",)  # some checkpoints hold the tied matrix twice

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head if self.config.has_own_head else self.model.embed_tokens

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V)."""
        if self.config.has_own_head:
            return self.lm_head(hidden)  # called as a module, so that hooks and adapters act
        return linear(hidden, self.model.embed_tokens.weight)

    def loss_in_chunks(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """`summed_loss` of 2,048 tokens at a time. The backward computes the logits once more."""

        def loss_of(hidden: Tensor, targets: Tensor) -> Tensor:
            return summed_loss(self.compute_logits(hidden), targets)

        chunks = zip(hidden.flatten(0, 1).split(2048), targets.flatten().split(2048), strict=True)
        return sum(checkpoint(loss_of, h, y, use_reentrant=False) for h, y in chunks)

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
        logits_to_keep: 0: all; n: those of the last n tokens; a tensor: at these places, (K,) or
          (B, K); None: none. Unless 0, memory never holds all logits for the loss, either.
        num_items_in_batch: if given, the loss is the sum divided by this, in place of the mean.
        """
        # the decoder takes the numbers of documents as its attention_mask
        documents = number_documents(attention_mask, position_ids, bool(past_key_values))
        inputs = (input_ids, documents, position_ids, past_key_values, inputs_embeds)
        out = self.model(*inputs, **wanted, return_dict=True)
        hidden = out.pop("last_hidden_state")
        logits = None
        if logits_to_keep is not None:
            logits = self.compute_logits(select_tokens(hidden, logits_to_keep))
        loss = None
        if labels is not None:
            shape = tuple(labels.shape)
            expect(shape == hidden.shape[:2], f"labels of shape {shape}: expected (B, T)")
            targets = next_tokens(labels, documents)
            if isinstance(logits_to_keep, int) and logits_to_keep == 0:
                loss = summed_loss(logits, targets)
            else:
                loss = self.loss_in_chunks(hidden, targets)
            if num_items_in_batch is None:
                num_items_in_batch = targets.ne(-100).sum()
            loss = loss / num_items_in_batch
        out = ModelOutput(loss=loss, logits=logits, **out)
        return out if self.setting("return_dict", return_dict) else out.to_tuple()

    def generate(self, *inputs: Tensor | list, **settings: object) -> Tensor:  # see section 10
        return generate(self, *inputs, **settings)

    def stream(self, *inputs: Tensor | list, **settings: object) -> Iterator[Tensor]:
        return stream(self, *inputs, **settings)


def select_tokens(x: Tensor, keep: int | Tensor) -> Tensor:
    """The last `keep` tokens of x (B, T, C), or all if 0; or those at the places (K,) or (B, K)."""
    if isinstance(keep, Tensor):
        rows = torch.arange(len(x), device=x.device)
        return x[rows[:, None], keep]
    return x[:, -keep:]  # for keep = 0: x[:, 0:], which is all


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


class OpenLlamaForSequenceClassification(OpenLlamaPreTrainedModel):
    """A classifier: `score` of the last real token of each row."""

    ignores = ("lm_head",)
    may_lack = ("score.weight",)

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        self.model = OpenLlamaModel(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        self.init_weights(self.score)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **inputs: object,
    ) -> ModelOutput | tuple:
        """Logits (B, num_labels), and the loss if there are labels: (B,) classes, or (B,
        num_labels) numbers, by config.problem_type. Other arguments: OpenLlamaModel's, by name.

        attention_mask tells the last real token, else pad_token_id does, else it is the last.
        """
        out = self.model(input_ids, attention_mask, **inputs, return_dict=True)
        hidden = out.pop("last_hidden_state")
        B, T, _ = hidden.shape
        real = torch.ones(B, T, device=hidden.device)
        if attention_mask is not None:
            real = attention_mask[:, -T:] != 0
        elif input_ids is not None and self.config.pad_token_id is not None:
            real = input_ids != self.config.pad_token_id
        logits = self.score(select_tokens(hidden, last_true(real)[:, None])[:, 0])
        loss = None if labels is None else classification_loss(logits, labels, self.config)
        out = ModelOutput(loss=loss, logits=logits, **out)
        return out if self.setting("return_dict", return_dict) else out.to_tuple()


def last_true(flags: Tensor) -> Tensor:
    """Where each row (B, T) has its last True, (B,); T - 1 if it has none."""
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
    loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
    return loss(logits, labels.view_as(logits).float())


# --- 6. Positions, documents, mask -----------------------------------------------------------


@dataclass
class Tokens:
    """The S tokens of one forward: those in the cache, and behind them T new ones."""

    new: Tensor  # (T,): the indices of the new tokens among all S
    positions: Tensor  # (B|1, T): of the new tokens, for the rotary embedding
    counted: Tensor  # (B|1, S): how many tokens of its document stand before each token
    lengths: Tensor  # (B|1, S|1): the length of each token's document so far
    documents: Tensor | None = None  # (B|1, S): its number, 0 for padding; None: all are of one


def number_documents(mask: Tensor | None, positions: Tensor | None, cached: bool) -> Tensor | None:
    """Number the documents of a row 1, 2, ...; padding is 0. The attention_mask (B, S) has these
    numbers, or position_ids (B|1, T) begin again at 0 with each. None: each row is one document."""
    if mask is not None:
        return mask.long()
    if positions is None or cached:
        return None
    begins = (positions[:, 1:] == 0).long()
    return F.pad(begins, (1, 0), value=1).cumsum(dim=1)


def locate(x: Tensor, documents: Tensor | None, positions: Tensor | None, cache: KVCache) -> Tokens:
    """Count the new tokens x (B, T, C) into the cache, and tell their places behind those there."""
    B, T, _ = x.shape
    S = cache.length + T
    if documents is not None:
        shape = tuple(documents.shape)
        expect(shape in ((B, S), (1, S)), f"mask or positions are {shape}: expected {(B, S)}")
        documents = documents.expand(B, S)
        # a tensor on meta or of a tracer (FakeTensor, DTensor) has no values to look at
        has_values = type(documents) is Tensor and not documents.is_meta
        if has_values and not torch.compiler.is_compiling() and bool(documents.eq(1).all()):
            cache.documents = documents = None  # one document: attention is faster without a mask
    new, documents = cache.begin(x, documents)
    if documents is None:
        counted = torch.arange(S, device=x.device)[None]
        lengths = counted[:, -1:] + 1
    else:
        counted, lengths = count_tokens(documents)
    if positions is None:
        positions = counted[:, new]
    return Tokens(new, positions, counted, lengths, documents)


def count_tokens(documents: Tensor) -> tuple[Tensor, Tensor]:
    """Each token's position in its document, and the length of its document, both (B, S). The
    values at padding mean nothing. The numbers of documents must ascend.

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

    Padding sees itself as a document: a softmax over no key would be NaN. Here are two new tokens
    behind three cached ones, the first of which is padding:

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
    """Keys, values and documents of the tokens so far: all that a forward needs of earlier ones.

    `cache[layer]` is (key, value), each (B, H, length, D); the keys are not rotated yet if the
    scaling is dynamic. A forward that fails or is interrupted spoils the cache it was given.
    """

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] = ()):
        """past: a (key, value) for each layer."""
        self.keys = [key for key, _ in past]  # the buffers, (B, H, at least length, D)
        self.values = [value for _, value in past]
        self.length = self.keys[0].shape[2] if self.keys else 0
        self.documents: Tensor | None = None  # (B|1, length): 0 for padding; None: all are of one

    def __len__(self) -> int:  # of layers
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def begin(self, x: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Count the new tokens x (B, T, C). Returns their indices among all S, (T,), and the
        documents of all S, (B|1, S). documents None: new tokens continue the last document."""
        T = x.shape[1]
        if documents is None:
            documents = self.extended_documents(T)
        self.documents = documents
        self.length += T
        return torch.arange(self.length - T, self.length, device=x.device), documents

    def extended_documents(self, T: int) -> Tensor | None:
        """The documents of all tokens, if T more continue each row's last document."""
        if self.documents is None:
            return None
        last = self.documents.amax(dim=1, keepdim=True).clamp(min=1)
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
        if torch.is_grad_enabled():  # autograd needs what it has recorded unchanged
            buffers[layer] = torch.cat((past, x), dim=2)
            return buffers[layer]
        if buffers[layer].shape[2] < S:  # make room for S more tokens, so as to copy seldom
            with torch.inference_mode(False):  # its tensors could not be written to outside of it
                buffers[layer] = F.pad(past.detach(), (0, 0, 0, S))
        buffers[layer][:, :, past.shape[2] : S] = x
        return buffers[layer][:, :, :S]


def as_cache(past: KVCache | Sequence[tuple[Tensor, Tensor]] | None) -> KVCache:
    return past if isinstance(past, KVCache) else KVCache(past or ())


class ModelOutput(dict):
    """What a model returns. It is a dict (out["logits"]), a record (out.logits, which is None if
    there are none) and a tuple (out[0], out[:2], out.to_tuple())."""

    loss: Tensor | None
    logits: Tensor | None  # (B, T, V), or (B, num_labels) from the classifier
    last_hidden_state: Tensor | None  # (B, T, C), after the final norm; from the decoder
    past_key_values: KVCache | None
    hidden_states: tuple[Tensor, ...] | None  # each layer's input, and last_hidden_state
    attentions: tuple[Tensor, ...] | None  # the weights of each layer, (B, H, T, S)
    __slots__ = ()  # out.loss = x is an error; out["loss"] = x sets it

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

    def to_tuple(self) -> tuple:
        return tuple(self.values())


# so that DDP, FSDP, torch.export and others find the tensors in it
register_pytree_node(
    ModelOutput,
    lambda out: (list(out.values()), list(out)),
    lambda values, names: ModelOutput(zip(names, values, strict=True)),
)


# --- 8. Memory-efficient attention -----------------------------------------------------------


@lru_cache
def xformers_kernel(D: int, dtype: torch.dtype, device: torch.device) -> Callable | None:
    """xformers' attention, or None if it does not work for heads of size D. This is tried once, as
    it depends on the GPU and on the CUDA that xformers was built for."""
    try:
        from xformers.ops import LowerTriangularMask, memory_efficient_attention

        with torch.inference_mode(False), torch.enable_grad():  # the trial has a backward, too
            q = torch.zeros(1, 8, 1, D, dtype=dtype, device=device, requires_grad=True)
            memory_efficient_attention(q, q, q, attn_bias=LowerTriangularMask()).sum().backward()
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError, NotImplementedError, RuntimeError) as error:
        warnings.warn(f"PyTorch's attention is used, as xformers fails: {error}", stacklevel=2)
        return None
    return memory_efficient_attention


def xformers_attention(kernel: Callable, documents: Tensor | None) -> Callable:
    """xformers' attention without a cache, of rows of one document, or of documents (B, T).

    Padding is packed away: rows of 3 and 2 tokens, padded to 4, become one row of 5 tokens, whose
    mask shows each of them its own document only.
    """
    from xformers.ops.fmha import attn_bias

    if documents is None:
        causal = attn_bias.LowerTriangularMask()
        return lambda q, k, v, dropout_p: (kernel(q, k, v, attn_bias=causal, p=dropout_p), None)

    real = documents.flatten().nonzero().squeeze(1)  # where real tokens stand among all B * T
    row = torch.arange(len(documents), device=documents.device)[:, None]
    apart = documents + row * (documents.max() + 1)  # now no two rows have a number in common
    lengths = torch.unique_consecutive(apart.flatten()[real], return_counts=True)[1]
    bias = attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths.tolist(), device=documents.device)

    def attend_packed(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, None]:
        packed = (x.flatten(0, 1)[None, real] for x in (q, k, v))  # (1, real tokens, H, D)
        out = kernel(*packed, attn_bias=bias, p=dropout_p)
        unpacked = torch.zeros_like(q).flatten(0, 1).index_copy(0, real, out[0])
        return unpacked.view(q.shape), None

    return attend_packed


# =============================================================================================
# The model ends here. Part two: using it


# --- 9. Checkpoints --------------------------------------------------------------------------

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of shards
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
CONVERT = "For LLaMA or pytorch_model.bin: python convert_checkpoint.py {} CONVERTED"


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
    if not folder.exists():
        download = f"hf download {folder} --local-dir {folder}"
        raise FileNotFoundError(f"no folder {folder}. If it is on the Hugging Face Hub: {download}")
    values = read_json(folder / "config.json")
    kind = values.get("model_type", "open-llama")
    fits = kind in ("open-llama", "open_llama")
    expect(fits, f"{folder} is no Open-Llama but {kind}. {CONVERT.format(folder)}")
    return values


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name, mapped from its files."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = {WEIGHTS}
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        files = set(read_json(folder / INDEX).get("weight_map", {}).values())
    tensors = {}
    for file in files:
        expect((folder / file).is_file(), f"{folder} has no {file}. {CONVERT.format(folder)}")
        try:
            tensors |= load_file(folder / file)
        except SafetensorError as error:
            raise damaged(folder / file, error) from None
    return tensors


def load_model(
    cls: type, folder: Path, dtype: torch.dtype | str | None = None, device: str = "cpu"
) -> OpenLlamaPreTrainedModel:
    """Load config.json and model.safetensors, or shards, in evaluation mode. ValueError for what
    does not fit. dtype: of all weights, as torch.float16 or "float16"; None: the widest that some
    are stored in. On the CPU weights are mapped from the file."""
    config = cls.config_class.from_pretrained(folder)
    found = read_tensors(folder)
    expect(config.num_hidden_layers <= len(found), f"num_hidden_layers above {len(found)} tensors")
    with torch.device("meta"):  # shapes without memory
        model = cls(config)
    own = model.state_dict()
    tensors = {}
    for name, tensor in found.items():
        # either of file and model may be a bare decoder, whose names have no "model." before them
        candidates = (name, f"model.{name}", name.removeprefix("model."))
        name = next((candidate for candidate in candidates if candidate in own), name)
        if name.split(".")[0] not in model.ignores and not name.endswith("inv_freq"):
            tensors[name] = tensor  # old files hold inv_freq, which is computed here
    stored = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    fits = stored != set() and stored | {dtype} <= FLOATS | {None}
    expect(fits, f"weights of {stored} cannot be read as {dtype}: expected some of {FLOATS}")
    dtype = dtype or reduce(torch.promote_types, stored)
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
    for name in set(cls.may_lack) - tensors.keys():
        warnings.warn(f"{folder} has no {name}: it starts untrained", stacklevel=3)
        fresh = torch.randn(own[name].shape, dtype=dtype, device=device)
        tensors[name] = fresh * config.initializer_range
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{folder} does not fit its config.json: {error}") from None
    return model.eval()


def save_model(model: OpenLlamaPreTrainedModel, folder: Path, state_dict: dict) -> None:
    """Write the weights beside the old ones. Then the old config goes, the weights are replaced,
    and the new config comes, so that a killed save leaves no mixture of two checkpoints."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in state_dict.items():
        is_plain = type(tensor) is Tensor and not tensor.is_meta and not tensor.is_quantized
        expect(is_plain, f"{name} is not a plain tensor: pass gathered weights as state_dict=")
        tensors[name.replace("_orig_mod.", "")] = tensor.cpu().contiguous()  # of torch.compile
    expect(len(tensors) > 0, "no weights: pass gathered weights as state_dict=")
    name = type(model).__name__.removeprefix("FSDP")  # which fully_shard puts before it
    dtype = str(model.dtype).removeprefix("torch.")
    text = model.config.to_json_string(architectures=[name], torch_dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    new_weights = folder / "model.safetensors.new"
    save_file(tensors, new_weights, metadata={"format": "pt"})
    (folder / "config.json").unlink(missing_ok=True)
    new_weights.replace(folder / WEIGHTS)
    (folder / "config.json").write_text(text, encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)  # safetensors makes it 0600


# --- 10. Sampling ----------------------------------------------------------------------------


def context_length(config: OpenLlamaConfig) -> int:
    """For how many tokens the model is made: those of its training, times the scaling's factor."""
    scaling = config.rope_scaling or {}
    return int(config.max_position_embeddings * scaling.get("factor", 1))


@dataclass
class Sampling:
    """How a text goes on; a bad value is a ValueError. For a filter of your own, subclass this as a
    dataclass, with its settings as fields, and extend `filter`."""

    max_new_tokens: int | None = None  # None: up to max_length
    max_length: int | None = None  # of prompt and new tokens; None: the context_length
    do_sample: bool = False  # draw tokens; False: take the likeliest, and ignore the next three
    temperature: float = 1.0  # divides the scores; 0: take the likeliest
    top_k: int | None = None  # draw from the k likeliest
    top_p: float | None = None  # draw from the fewest of them whose probabilities sum up to p
    repetition_penalty: float = 1.0  # above 1, tokens that a row holds get less likely
    eos_token_id: int | list[int] | Literal["config"] | None = "config"  # ends a row; None: nothing
    pad_token_id: int | None = None  # stands behind a row's end; None: the config's, or else 0
    num_return_sequences: int = 1  # continue each row so often; the results follow one another
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
        return ends if isinstance(ends, list) else [n for n in [ends] if n is not None]

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
            # for p = 0.6 the tokens of 0.2, 0.5, 0.3 are sorted as 0.2, 0.3, 0.5, and summed to
            # 0.2, 0.5, 1.0: those with a sum up to 1 - p = 0.4 are left out
            ascending, order = scores.sort(dim=-1)
            outside = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - self.top_p
            outside[:, -1] = False  # at least one stays
            scores = scores.masked_fill(outside.scatter(1, order, outside), -math.inf)
        return scores


def generate(
    model: OpenLlamaForCausalLM, input_ids: Ids, attention_mask: Ids | None = None, **how: object
) -> Tensor:
    """Continue each row of input_ids (B, T), or the one row (T,): returns (B, T + new). how: the
    other arguments of `stream`."""
    new = torch.stack(list(stream(model, input_ids, attention_mask, **how)), dim=1)
    ids = as_rows(input_ids, new.device)
    ids = ids.repeat_interleave(len(new) // len(ids), dim=0)
    return torch.cat((ids, new.to(ids.device)), dim=1)


def as_rows(ids: Ids, device: torch.device, copies: int = 1) -> Tensor:
    """Ids or a mask as (B, T), of which (T,) is one row. A list becomes a tensor on the device."""
    expect(not isinstance(ids, str), f"{ids!r}: expected ids, which a tokenizer makes of a text")
    if isinstance(ids, list):
        ids = torch.tensor(ids, dtype=torch.long, device=device)
    return torch.atleast_2d(ids).repeat_interleave(copies, dim=0)


def stream(
    model: OpenLlamaForCausalLM,
    input_ids: Ids,
    attention_mask: Ids | None = None,
    past_key_values: KVCache | None = None,
    sampling: Sampling | None = None,
    **settings: object,
) -> Iterator[Tensor]:
    """What `generate` appends, step by step: the next token of each row, (B,), on the CPU.

    attention_mask: as input_ids; 0 for padding, left or right. A row gives what it would alone.
    past_key_values: a cache of the first tokens of input_ids, which are not computed again. It is
      extended in place; with compile=True it gets the prompt alone.
    settings: the fields of Sampling; or sampling: all in one object."""
    sampling = sampling or Sampling(**settings)
    cache = as_cache(past_key_values)
    ids = as_rows(input_ids, model.device, sampling.num_return_sequences)
    B, T = ids.shape
    V = model.config.vocab_size
    expect(cache.length < T, f"empty prompt: {T} tokens, of which {cache.length} are in the cache")
    fits = bool(((ids >= 0) & (ids < V)).all())
    expect(fits, f"input_ids hold ids that are not in a vocabulary of {V}")
    mask = cache.extended_documents(T - cache.length)
    if attention_mask is not None:
        mask = as_rows(attention_mask, model.device, sampling.num_return_sequences)
    mask = torch.ones_like(ids) if mask is None else mask
    expect(mask.shape in ((B, T), (1, T)), f"attention_mask: expected the shape {(B, T)}")

    # inference mode is faster, but weights that FSDP gathers in it could not be trained any more
    mode = torch.no_grad() if hasattr(model, "unshard") else torch.inference_mode()
    steps = mode(sample_steps)(model, ids, mask.expand(B, T), cache, sampling)  # off between steps
    for n, (*tokens, is_finite, all_ended) in enumerate(read_steps(steps, ids.device)):
        expect(is_finite, "the model's scores hold NaN or infinity")
        yield torch.tensor(tokens)
        if all_ended:
            cache.length = min(cache.length, T + n)  # takes back a step that was made ahead
            return


def sample_steps(
    model: OpenLlamaForCausalLM, ids: Tensor, mask: Tensor, cache: KVCache, sampling: Sampling
) -> Iterator[Tensor]:
    """Each step is one tensor, (B + 2,): the next token of each row, whether the scores are finite,
    and whether all rows have ended. A step of sharded weights needs all processes, so for them the
    last number is about the rows of all processes."""
    B, T = ids.shape
    count = sampling.max_new_tokens or (sampling.max_length or context_length(model.config)) - T
    expect(count > 0, f"a prompt of {T} tokens leaves no room below max_length={T + count}")
    own = (mask != 0) & (mask == mask.amax(dim=1, keepdim=True))  # tokens of the last document
    last = last_true(own)[:, None]  # (B, 1): each row goes on behind this token
    fits = bool((own.any(dim=1, keepdim=True) & (last >= cache.length)).all())
    expect(fits, "empty prompt: a row has nothing but padding, or has it behind the cache")
    sharded = hasattr(model, "unshard")  # a method that FSDP's fully_shard adds
    pad = next(n for n in (sampling.pad_token_id, model.config.pad_token_id, 0) if n is not None)
    ends = torch.tensor(sampling.ends(model.config), dtype=torch.long, device=ids.device)
    seen = ids.where(own, ids.gather(1, last))  # the penalty is for tokens of this document
    ended = torch.zeros(B, dtype=torch.bool, device=ids.device)
    prompt = {"attention_mask": mask, "logits_to_keep": last - cache.length}
    scores = next_scores(model, ids[:, cache.length :], past_key_values=cache, **prompt)
    step = next_scores
    if sampling.compile:
        cache = FixedKVCache(cache, T + count)
        step = torch.compile(next_scores, mode="reduce-overhead")  # torch keeps the code
    for n in itertools.count(1):
        finite = scores.amax(dim=-1).isfinite().all()
        token = sampling.choose(scores.where(finite, 0.0), seen)  # multinomial crashes on NaN
        token = token.where(~ended, pad)
        ended = ended | torch.isin(token, ends) | (n >= count)
        if sampling.repetition_penalty != 1:
            seen = torch.cat((seen, token[:, None]), dim=1)
        flags = torch.stack((finite, ended.all())).long()
        if sharded:
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        yield torch.cat((token, flags))
        if n == count and not sharded:  # else other processes may need more steps
            return
        scores = step(model, token[:, None], past_key_values=cache, logits_to_keep=1)


def next_scores(model: OpenLlamaForCausalLM, ids: Tensor, **inputs: object) -> Tensor:
    """What the model says comes next, (B, V), in float32. inputs: of its forward."""
    return model(ids, **inputs, use_cache=False, return_dict=True).logits[:, -1].float()


def read_steps(steps: Iterator[Tensor], device: torch.device) -> Iterator[list[int]]:
    """The numbers of each step. For a GPU, the next step is launched before these are read, or it
    would have nothing to do while the CPU reads."""
    if device.type != "cuda":
        yield from (step.tolist() for step in steps)
        return
    queue = torch.cuda.current_stream(device)
    copies = ((step.to("cpu", non_blocking=True), queue.record_event()) for step in steps)
    for (numbers, copied), _ in itertools.pairwise(itertools.chain(copies, [None])):
        copied.synchronize()
        yield numbers.tolist()


# --- 11. Speed -------------------------------------------------------------------------------


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias, (..., C) to (..., len(weight)). On some CPUs PyTorch multiplies a single
    token by one thread only (AMD EPYC does so, Intel Xeon does not); here all threads take part.

    Compiled, the product is written as a sum, which torch.compile fuses with what stands around it.
    Else a large float32 matrix is seen as 16 blocks of rows: threads share a batch of 16 products.
    """
    C = x.shape[-1]
    is_single = x.numel() == C and x.device.type == "cpu"
    if not is_single or bias is not None or type(weight) is not nn.Parameter:  # sharded, quantised
        return F.linear(x, weight, bias)
    if torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
        return (weight * x.flatten()).sum(dim=-1).view(*x.shape[:-1], -1)
    if x.dtype != torch.float32 or weight.numel() <= 2**20 or len(weight) % 16 != 0:
        return F.linear(x, weight)
    blocks = weight.view(16, -1, C)
    product = x.reshape(1, 1, C).expand(16, 1, C) @ blocks.mT  # (16, 1, len(weight) / 16)
    return product.view(*x.shape[:-1], -1)


linear = fast_linear  # from now on, section 3 calls this


class FixedKVCache(KVCache):
    """A cache for the compiled step: no tensor ever changes its shape or its place in memory. It
    gives keys of all `capacity` positions, of which those to come are marked as padding. `length`
    is a tensor, (1,), as torch.compile would compile again for each new number."""

    def __init__(self, cache: KVCache, S: int):
        """Continue a cache, up to S tokens."""
        super().__init__()
        self.capacity = 2 ** max(6, (S - 1).bit_length())  # few sizes: each records a CUDA graph
        rest = self.capacity - cache.length
        for key, value in cache:
            self.keys.append(F.pad(key, (0, 0, 0, rest)))
            self.values.append(F.pad(value, (0, 0, 0, rest)))
        self.length = torch.tensor([cache.length], device=self.keys[0].device)
        documents = cache.extended_documents(rest)
        self.documents = self.length.new_ones(1, self.capacity) if documents is None else documents
        for tensor in (*self.keys, *self.values, self.documents, self.length):
            # lets a CUDA graph write to it; guard=False: other caches run the same code
            torch._dynamo.mark_static_address(tensor, guard=False)

    def begin(self, x: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
        new = self.length.clone()  # a step has one new token
        self.length += 1
        there = torch.arange(self.documents.shape[1], device=x.device) < self.length
        return new, self.documents * there

    def extend(self, buffers: list[Tensor], layer: int, x: Tensor) -> Tensor:
        return buffers[layer].index_copy_(2, self.length - 1, x)


# --- 12. Text --------------------------------------------------------------------------------


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
        self.model.no_padding()  # the file may ask for padding and truncation
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

        fits = settings.get("legacy") is not False
        expect(fits, f'{folder}: a tokenizer with "legacy": false is read from tokenizer.json only')
        try:
            self.model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (RuntimeError, OSError) as error:
            raise damaged(folder / "tokenizer.model", error) from None
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
        ids = [self.bos] if special and self.bos is not None else []
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
        return " ".join(texts)  # as transformers 4.31 does


def load_tokenizer(
    folder: Path, bos: int | None
) -> ByteTokenizer | JsonTokenizer | SentencePieceTokenizer:
    """The tokenizer of a checkpoint. Its encode(text) makes ids; with special=False it does not add
    the ids that a text begins with, as bos. Its decode(ids) makes text, without special tokens."""
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder, settings, bos)
    if settings.get("tokenizer_class") == "ByT5Tokenizer":
        return ByteTokenizer()
    raise FileNotFoundError(f"{folder} has no tokenizer.model or .json; --prompt-ids needs none")


def chat_format(folder: Path) -> Callable[[list[dict]], str]:
    """A function that writes messages, {"role": "user" or "assistant", "content": text}, as a text
    to continue: the checkpoint's template, or Open-Llama's own format."""
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    if "chat_template" not in settings and not (folder / "chat_template.jinja").is_file():
        return open_llama_chat
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    expect(hasattr(tokenizer, "apply_chat_template"), "chat templates need transformers >= 4.34")
    return partial(tokenizer.apply_chat_template, tokenize=False, add_generation_prompt=True)


def open_llama_chat(messages: list[dict]) -> str:
    """The format of Open-Llama's instruct models, turns joined with nothing between them."""
    forms = {"user": "user:{}\nsystem:", "assistant": "{}</s>"}
    return "".join(forms[message["role"]].format(message["content"]) for message in messages)


def stream_text(
    decode: Callable, prompt: list[int], new: Iterable[int], stops: Sequence[str] = ()
) -> Iterator[str]:
    """The text of the new ids as they come, in whole characters, up to the first of `stops`.

    An id that is decoded alone loses its leading space, and bytes alone are no character. So all
    new ids are decoded together, behind a few of the prompt.
    """
    ids = prompt[-16:]
    text = decode(ids)
    shown = len(text)
    longest = max((len(stop) for stop in stops), default=1)
    for token in new:
        ids.append(token)
        text = decode(ids)
        places = [text.index(stop, shown) for stop in stops if stop in text[shown:]]
        if places:
            yield text[shown : min(places)]
            return
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")  # which stands for a part of a character
        end = max(len(whole) - (longest - 1), shown)  # the rest may be the beginning of a stop
        yield text[shown:end]
        shown = end
    yield text[shown:]


# --- 13. Command line ------------------------------------------------------------------------


def demo_checkpoint(folder: Path) -> Path:
    """A byte-level model that knows the Zen of Python by heart, trained on first use."""
    if (folder / "tokenizer_config.json").is_file():  # which is written last
        return folder
    log("training the demo, which takes some 20 seconds")
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in matrices as small as these, threads wait for each other
    sizes = {"vocab_size": 259, "hidden_size": 128, "intermediate_size": 344}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.1}
    others = {"hidden_dropout_prob": 0, "attention_dropout_prob": 0, "eos_token_id": 1}
    model = OpenLlamaForCausalLM(OpenLlamaConfig(**sizes, **others))
    text = subprocess.check_output([sys.executable, "-m", "this"], text=True).strip()
    data = torch.tensor([*ByteTokenizer().encode(text), 1])
    lines = torch.tensor([0] + [n + 1 for n, letter in enumerate(text) if letter == "\n"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=400)
    for step in range(400):  # each row begins with a line, and goes round the text as a ring
        B, T = (4, 160) if step % 4 else (1, len(data))
        starts = lines[torch.randint(len(lines), (B, 1))]
        batch = data[(starts + torch.arange(T)) % len(data)]  # (B, T)
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}\n')
    return folder


# settings of Sampling that are options of the command line, and their defaults there
OPTIONS = {"max_new_tokens": 128, "temperature": 0.8, "top_k": 50, "top_p": 1.0}
OPTIONS |= {"repetition_penalty": 1.0}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    about = "Sample text from an Open-Llama checkpoint, or from a demo."
    parser = argparse.ArgumentParser(description=about)
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="FOLDER", help="default: the demo, trained on first use")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--prompt", metavar="TEXT", help="text to continue; - reads it from stdin")
    either("--prompt-file", type=Path, metavar="FILE", help="file of the text to continue")
    either("--prompt-ids", metavar="IDS", help="ids to continue, as in 1,2,3; prints ids")
    for name, default in OPTIONS.items():
        option = "--" + name.replace("_", "-")
        add(option, type=type(default), default=default, metavar="N", help="default: %(default)s")
    add("--num-samples", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--stop", action="append", default=[], metavar="TEXT", help=r"end before it; \n: a newline")
    about = "each line is a turn; Ctrl-C ends an answer, Ctrl-D the conversation"
    add("--chat", action="store_true", help=about)
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as stored")
    add("--device", metavar="NAME", help="as cpu, cuda:1, mps; default: the accelerator, if any")
    add("--compile", action="store_true", help="slower to begin, then faster")
    args = parser.parse_args(argv)
    if args.prompt_ids is not None and (args.chat or args.stop):
        parser.error("--chat and --stop take text, and not --prompt-ids")
    return args


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@dataclass
class Writer:
    """Continues texts on stdout. It keeps the last text and its cache, so that a prompt that begins
    with the cached tokens is computed from there on."""

    model: OpenLlamaForCausalLM
    decode: Callable[[list[int]], str]
    sampling: Sampling
    stops: list[str]
    cache: KVCache = field(default_factory=KVCache)
    ids: list[int] = field(default_factory=list)  # the last text, with which the cache begins
    text: str = ""  # what was printed last

    def write(self, prompt: list[int]) -> None:
        """Print a continuation as it is made."""
        length = self.cache.length
        if length >= len(prompt) or self.ids[:length] != prompt[:length]:
            self.cache = KVCache()
        self.ids = list(prompt)
        self.text = ""
        for piece in stream_text(self.decode, prompt, self.new_tokens(), self.stops):
            self.text += piece
            print(piece, end="", flush=True)
        print(flush=True)
        context = context_length(self.model.config)
        if len(self.ids) > context:
            log(f"the text is longer than the {context} tokens that the model is made for")

    def new_tokens(self) -> Iterator[int]:
        given = {"past_key_values": self.cache, "sampling": self.sampling}
        for token in self.model.stream([self.ids], **given):
            self.ids.append(int(token))
            yield self.ids[-1]


def hold_chat(writer: Writer, encode: Callable, write_turns: Callable, questions: Iterable) -> None:
    """Answer each question. The oldest turns are dropped from a prompt that fills more than three
    quarters of the context."""
    room = context_length(writer.model.config) * 3 / 4
    turns = []
    for question in questions:
        turns.append({"role": "user", "content": question})
        # special=False, as a chat format writes all that a text begins with
        while len(ids := encode(write_turns(turns), special=False)) > room and len(turns) > 1:
            log("the conversation is too long: its oldest turn is dropped")
            turns = turns[2:]
        try:
            writer.write(ids)
        except KeyboardInterrupt:
            writer.cache = KVCache()  # in the old one, not all layers may have the last token
            print(flush=True)
        turns.append({"role": "assistant", "content": writer.text})


def read_questions(first: str) -> Iterator[str]:
    """`first`, if any, and the lines of stdin."""
    if first:
        yield first
    try:
        while True:
            question = input("> " if sys.stdin.isatty() and sys.stdout.isatty() else "")
            if question.strip():
                yield question
    except EOFError:
        return


def read_prompt(args: argparse.Namespace) -> str:
    if args.prompt_file is not None:
        return args.prompt_file.read_text("utf-8").removesuffix("\n")  # which editors append
    if args.prompt == "-":
        return sys.stdin.read().removesuffix("\n")
    default = "Beautiful is better" if args.checkpoint is None and not args.chat else ""
    return args.prompt_ids or args.prompt or default


def run(args: argparse.Namespace) -> None:
    sys.stdout.reconfigure(errors="replace")  # characters that a terminal lacks become ?
    prompt = read_prompt(args)
    folder = args.checkpoint
    if folder is None:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = demo_checkpoint(Path(cache) / "openllama-zen")
    device = args.device or torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = OpenLlamaForCausalLM.from_pretrained(folder, dtype=args.dtype, device=device)
    seed = torch.seed() if args.seed is None else args.seed
    torch.manual_seed(seed)
    log(f"{folder}: {model.dtype} on {model.device}; seed {seed}")
    tokenizer = NumberTokenizer()
    if args.prompt_ids is None:
        tokenizer = load_tokenizer(folder, model.config.bos_token_id)
    stops = [stop.replace("\\n", "\n") for stop in args.stop]
    tokens = [tokenizer.encode(stop, special=False) for stop in stops]
    # a stop of one token ends the text as an id, too: decoding leaves special tokens out
    ends = Sampling().ends(model.config) + [ids[0] for ids in tokens if len(ids) == 1]
    numbers = {name: getattr(args, name) for name in OPTIONS}
    sampling = Sampling(**numbers, do_sample=True, eos_token_id=ends, compile=args.compile)
    writer = Writer(model, tokenizer.decode, sampling, stops)
    if args.chat:
        hold_chat(writer, tokenizer.encode, chat_format(folder), read_questions(prompt))
        return
    for _ in range(args.num_samples):
        writer.write(tokenizer.encode(prompt))


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, 2 after an error, 130 after Ctrl-C, 141 if nobody reads stdout any more."""
    try:
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # or Python would fail again when it ends, and writes what its buffer still holds
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
