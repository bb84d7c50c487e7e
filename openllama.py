# SPDX-License-Identifier: MIT
"""Open-Llama in one file: first the model, then what makes it practical.

Open-Llama (s-JoL, 2023) is LLaMA (https://arxiv.org/abs/2302.13971) with three changes:

1. Stable embedding: a LayerNorm on the token embedding, from Bloom
   (https://arxiv.org/abs/2211.05100).
2. Shared embedding: the input embedding is the output matrix too, from PaLM
   (https://arxiv.org/abs/2204.02311).
3. Memory-efficient attention (https://arxiv.org/abs/2112.05682): its T x S weights are not kept.
   xformers computes it.

It also has dropout in attention and MLP. Results are the same as transformers 4.31's, except where
those were wrong, as with padding.

Part one is the model.            Part two is what makes it practical.
  1 Configuration                   6 Padding and packed documents
  2 RMSNorm, rotary embedding       7 Key-value cache, output
  3 Attention, MLP, layer           8 Memory-efficient attention
  4 Decoder                         9 Classifier
  5 Language model                 10 Checks and checkpoints
                                   11 Sampling
                                   12 Speed
                                   13 Text
                                   14 Command line

Shapes are written in these letters:

  B  batch: rows                    H  attention heads
  T  new tokens of a row            D  head size
  S  visible tokens of a row,       C  hidden size, H * D
     cached and new                 V  vocabulary

"B|1" means B, or 1 where all rows agree; "S|1" likewise.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import copy
import io
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial, reduce
from itertools import groupby, islice, pairwise, zip_longest
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import register_pytree_node
from torch.utils.checkpoint import checkpoint

Folder = str | os.PathLike
Device = str | torch.device | None

# =============================================================================================
# Part one: the model
# =============================================================================================


# --- 1. Configuration ------------------------------------------------------------------------


@dataclass
class OpenLlamaConfig:
    """The model's sizes and switches, named as in config.json; the defaults are the 7B model's.

    An impossible value raises a ValueError that names it. To add a setting of your own, subclass
    this as a dataclass, and name the subclass in your model's `config_class`.
    """

    model_type: ClassVar[str] = "open-llama"
    vocab_size: int = 100000
    hidden_size: int = 4096
    intermediate_size: int = 11008  # of the MLP
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str | Callable[[Tensor], Tensor] = "silu"  # a name in ACTIVATIONS, or a function
    max_position_embeddings: int = 2048  # the length it is trained for
    initializer_range: float = 0.02  # standard deviation of fresh weights
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False  # True shares the embedding, too
    use_memory_efficient_attention: bool = True
    hidden_dropout_prob: float = 0.1  # of what the MLP returns
    attention_dropout_prob: float = 0.1  # of the attention weights
    use_stable_embedding: bool = True
    shared_input_output_embedding: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # {"type": "linear" or "dynamic", "factor": above 1}
    num_labels: int = 2  # of the classifier
    id2label: dict[int, str] | None = None  # of the classifier: its labels' names, if they have any
    problem_type: str | None = None  # of the classifier; None: guessed from labels
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True  # False: models return tuples

    def __post_init__(self):
        check_config(self)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_dict(cls, values: dict) -> OpenLlamaConfig:
        """Read the contents of a config.json. ValueError for what this model does not have."""
        return config_from_dict(cls, values)

    def to_dict(self) -> dict:
        """The contents of a config.json."""
        return config_values(self)

    @classmethod
    def from_pretrained(cls, folder: Folder) -> OpenLlamaConfig:
        """Read `folder`/config.json, and from generation_config.json, if any, what ends a text.
        OSError where there is none, ValueError if it is broken."""
        return load_config(cls, Path(folder))

    def save_pretrained(self, folder: Folder, **more: object) -> None:
        """Write `folder`/config.json, with the keys of `more` added."""
        save_config(self, Path(folder), more)


# --- 2. RMSNorm, rotary embedding ------------------------------------------------------------


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight (https://arxiv.org/abs/1910.07467).

    Unlike nn.RMSNorm, it computes the quotient in float32 and rounds it before the product.
    """

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return self.weight * normed.to(x.dtype)


class RotaryEmbedding:
    """Turns queries and keys, so that their products depend on how far apart the tokens are.

    RoPE (https://arxiv.org/abs/2104.09864) turns the pair n of a head, n < D/2, by the angle
    position * base ** (-2n / D). One of these objects is made for each forward. A scaling is a
    subclass, which ROTARY_EMBEDDINGS names, and which changes the base or the frequencies.
    """

    settings: tuple[str, ...] = ()  # what config.rope_scaling holds besides the type

    def __init__(self, config: OpenLlamaConfig, tokens: Tokens, dtype: torch.dtype):
        """tokens (section 6): the positions of all S tokens, and the indices of the T new ones."""
        frequencies = self.frequencies(config, tokens)
        positions = tokens.positions[:, tokens.new]  # (B|1, T)
        self.turn = cos_and_sin(positions, frequencies, dtype)  # of the new tokens

    def base(self, config: OpenLlamaConfig, tokens: Tokens) -> float | Tensor:
        return config.rope_theta

    def frequencies(self, config: OpenLlamaConfig, tokens: Tokens) -> Tensor:
        """How far each pair turns from one position to the next: (D/2,), or (..., D/2) if the
        base is one for each token."""
        even = torch.arange(0, config.head_dim, 2, device=tokens.new.device)  # 2n
        return 1.0 / self.base(config, tokens) ** (even.float() / config.head_dim)

    def turn_queries(self, q: Tensor) -> Tensor:
        return rotate(q, *self.turn)

    def turn_new_keys(self, k: Tensor) -> Tensor:
        """What happens to the new keys (B, T, H, D) before they go into the cache."""
        return rotate(k, *self.turn)

    def turn_all_keys(self, k: Tensor) -> Tensor:
        """What happens to all keys (B, S, H, D) when they come out of it."""
        return k


class LinearScaling(RotaryEmbedding):
    """All angles are divided by a factor (https://arxiv.org/abs/2306.15595)."""

    settings = ("factor",)

    def frequencies(self, config: OpenLlamaConfig, tokens: Tokens) -> Tensor:
        return super().frequencies(config, tokens) / config.rope_scaling["factor"]


class DynamicNTKScaling(RotaryEmbedding):
    """The base grows with the text (https://arxiv.org/abs/2309.00071).

    As it grows, the angles of earlier tokens change too. So the cache holds keys unturned, and
    all keys of a document are turned, by the same base, whenever they are used. (transformers 4.31
    caches turned keys, and so mixes those of many bases.)
    """

    settings = ("factor",)

    def __init__(self, config: OpenLlamaConfig, tokens: Tokens, dtype: torch.dtype):
        cos, sin = cos_and_sin(tokens.positions, self.frequencies(config, tokens), dtype)
        self.turn_of_all = (cos, sin)
        self.turn = (cos[:, tokens.new], sin[:, tokens.new])

    def base(self, config: OpenLlamaConfig, tokens: Tokens) -> Tensor:
        """A base for each token, (B|1, S|1, 1): it depends on the length of its document."""
        D = config.head_dim
        factor = config.rope_scaling["factor"]
        lengths = tokens.lengths() / config.max_position_embeddings
        growth = (factor * lengths - (factor - 1)).clamp(min=1)  # 1 up to the length trained for
        exponent = D / max(D - 2, 1)  # D = 2 has frequency base ** 0 alone
        return (config.rope_theta * growth**exponent)[..., None]

    def turn_new_keys(self, k: Tensor) -> Tensor:
        return k

    def turn_all_keys(self, k: Tensor) -> Tensor:
        return rotate(k, *self.turn_of_all)


ROTARY_EMBEDDINGS = {  # by config.rope_scaling["type"]
    "default": RotaryEmbedding,
    "linear": LinearScaling,
    "dynamic": DynamicNTKScaling,
}


def rotary_embedding(
    config: OpenLlamaConfig, tokens: Tokens, dtype: torch.dtype
) -> RotaryEmbedding:
    kind = "default"
    if config.rope_scaling is not None:
        kind = config.rope_scaling["type"]
    return ROTARY_EMBEDDINGS[kind](config, tokens, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) of x, a from its first half and b from its second, by its angle:
    a becomes a cos - b sin, and b becomes b cos + a sin. The minus is in sin (see cos_and_sin).

    The pairs of this head are (1, 3), which makes a quarter turn, and (2, 4), which makes none:

    >>> cos, sin = torch.tensor([0, 1, 0, 1]), torch.tensor([-1, 0, 1, 0])
    >>> rotate(torch.tensor([1, 2, 3, 4]), cos, sin)
    tensor([-3,  2,  1,  4])
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # b, then a
    return x * cos + swapped * sin


def cos_and_sin(
    positions: Tensor, frequencies: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `rotate` takes, each (B|1, T, 1, D), for positions (B|1, T), or S in place of T; in
    float32 until the end.

    The first half of a head gets the angle -t, the second t. As cos(-t) = cos(t), and sin(-t) =
    -sin(t), this puts the minus of a cos - b sin into the sine.
    """
    frequencies = torch.cat((-frequencies, frequencies), dim=-1)  # (D,), or (B|1, T|1, D)
    angles = positions.float()[..., None] * frequencies  # (B|1, T, D)
    angles = angles[:, :, None]  # the same in all heads
    return angles.cos().to(dtype), angles.sin().to(dtype)


# --- 3. Attention, MLP, layer ----------------------------------------------------------------


@dataclass
class Shared:
    """What the layers share in one forward."""

    rotary: RotaryEmbedding
    attend: Callable  # attend(q, k, v, dropout_p) returns (B, T, H, D), and the weights or None
    cache: KVCache | None = None


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kept: Tensor | None = None, p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """softmax(q k' / sqrt(D)) v, as in the textbook: (B, T, H, D), and its weights.

    q (B, T, H, D); k, v (B, S, H, D); mask (B|1, 1, T, S): True where a query sees a key.
    kept (B, H, T, S): False where dropout, of probability p, drops a weight; None: it drops none.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), (B, H, S, D) twice
    scores = q @ k.mT / math.sqrt(q.shape[-1])  # (B, H, T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    dropped = weights
    if kept is not None:
        dropped = weights * kept / (1 - p)
    return (dropped @ v).transpose(1, 2), weights


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float = 0.0
) -> tuple[Tensor, None]:
    """The same by a kernel of PyTorch that stores no weights.

    Without a mask it is causal, which needs T = S, or T = 1: is_causal lets the first query see the
    first key alone, the second query two keys, and so on. It knows of no keys before the queries.
    """
    T = q.shape[1]
    causal = mask is None
    if T == 1:  # a single query, the last token, sees all keys
        causal = False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=causal)
    return out.transpose(1, 2), None


class OpenLlamaAttention(nn.Module):
    """Multi-head self-attention. `Linear` is nn.Linear, but faster in inference (section 12)."""

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
        heads = (B, T, -1, self.config.head_dim)  # -1: H, or a process's share of them
        q = self.q_proj(x).view(heads)
        k = self.k_proj(x).view(heads)
        v = self.v_proj(x).view(heads)
        q = shared.rotary.turn_queries(q)
        k = shared.rotary.turn_new_keys(k)
        if shared.cache is not None:
            k, v = shared.cache.update(self.layer, k, v)  # (B, S, H, D)
        k = shared.rotary.turn_all_keys(k)
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
        self.act = config.hidden_act
        if not callable(self.act):
            self.act = ACTIVATIONS[self.act]
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
    """What the models share: fresh weights, and ways in and out of files (section 10)."""

    config_class = OpenLlamaConfig
    may_lack: tuple[str, ...] = ()  # modules that a checkpoint may lack: a head, to be trained
    ignores: tuple[str, ...] = ()  # modules that it may hold besides: the heads of other models

    def __init__(self, config: OpenLlamaConfig):
        super().__init__()
        self.config = config

    def init_weights(self, module: nn.Module) -> None:
        """Draw a module's weights. For a module that you add: module.apply(self.init_weights)."""
        if not isinstance(module, nn.Linear | nn.Embedding) or module.weight.is_meta:
            return  # other modules keep theirs; on meta there is no memory to fill
        if isinstance(module, nn.Embedding) and self.config.use_stable_embedding:
            nn.init.xavier_normal_(module.weight)  # std sqrt(2 / (V + C)), as in transformers
        else:
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(
        cls,
        folder: Folder,
        dtype: torch.dtype | str | None = None,
        device: Device = None,
        torch_dtype: torch.dtype | str | None = None,
    ) -> OpenLlamaPreTrainedModel:
        """Load config.json and model.safetensors, or shards, of a folder, in evaluation mode.

        Weights are mapped from the files, and copied only where dtype (None: the one that holds
        all of them, as a rule their own) or device (None: CPU) ask for it. torch_dtype is the name
        that dtype has in transformers 4. ValueError tells all that does not fit.
        """
        return load_model(cls, Path(folder), as_dtype(dtype or torch_dtype), device)

    def load_weights(self, folder: Folder) -> None:
        """Take the weights of a checkpoint of the same sizes, in place. If this model is sharded
        over processes, all of them call this, and each keeps its part."""
        load_weights(self, Path(folder))

    def save_pretrained(self, folder: Folder, max_shard_size: str = "10GB") -> None:
        """Write config.json and model.safetensors, or shards, which transformers 4.31 reads too.
        If this model is sharded over processes, all of them call this, and the first writes."""
        save_model(self, Path(folder), max_shard_size)

    def resize_token_embeddings(self, size: int) -> nn.Embedding:
        """Cut the vocabulary to `size`, or extend it by freshly initialised rows; in place."""
        return resize_vocabulary(self, size)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """In training, recompute each layer in the backward, for less memory; without a cache,
        which would be extended twice. Arguments are those that transformers' Trainer passes:
        settings of torch.utils.checkpoint, and two that can only be what they are."""
        expect(every_n_layers == 1 and not offload, "every layer is recomputed, and none offloaded")
        settings = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})
        self.decoder.gradient_checkpointing = settings

    def gradient_checkpointing_disable(self) -> None:
        self.decoder.gradient_checkpointing = None

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.decoder.gradient_checkpointing is not None

    @property
    def decoder(self) -> OpenLlamaModel:
        return self.model

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed_tokens

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

    def setting(self, name: str, value: bool | None) -> bool:
        """An argument of forward: `value`, or the config's where it is None."""
        if value is None:
            return getattr(self.config, name)
        return value

    def in_form(self, out: ModelOutput, return_dict: bool | None) -> ModelOutput | tuple:
        if self.setting("return_dict", return_dict):
            return out
        return out.to_tuple()


class OpenLlamaModel(OpenLlamaPreTrainedModel):
    """The decoder: embedding, layers, final norm."""

    ignores = ("lm_head", "score")

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        self.gradient_checkpointing: dict | None = None
        self.embed_tokens = Embedding(  # nn.Embedding (section 12)
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.embed_layer_norm = nn.Identity()
        if config.use_stable_embedding:
            self.embed_layer_norm = nn.LayerNorm(config.hidden_size)
        layers = (OpenLlamaDecoderLayer(config, n) for n in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.apply(self.init_weights)

    @property
    def decoder(self) -> OpenLlamaModel:
        return self

    def choose_attention(self, x: Tensor, tokens: Tokens, eager: bool) -> Callable:
        """The `attend` of all layers for one forward; eager: one that returns the weights. A
        subclass may override it."""
        return choose_attention(x, tokens, eager)

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
        position_ids: (B|1, T); None: each document's tokens are counted.
        past_key_values: a KVCache, which is extended in place if use_cache; or a (key, value) for
          each layer, each (B, H, S - T, D), which is left as it is.
        The others: the config's, where None.
        """
        config = self.config
        recompute = self.training and self.gradient_checkpointing and past_key_values is None
        use_cache = self.setting("use_cache", use_cache) and not recompute
        output_attentions = self.setting("output_attentions", output_attentions)
        output_hidden_states = self.setting("output_hidden_states", output_hidden_states)

        check_inputs(input_ids, inputs_embeds, config)
        x = inputs_embeds  # (B, T, C)
        if x is None:
            x = self.embed_layer_norm(self.embed_tokens(input_ids))
        cache = as_cache(past_key_values, extend=use_cache)
        tokens = locate_tokens(cache, x, config, attention_mask, position_ids)
        eager = output_attentions or not config.use_memory_efficient_attention
        shared = Shared(
            rotary=rotary_embedding(config, tokens, dtype=type_of_queries(x)),
            attend=self.choose_attention(x, tokens, eager),
        )
        if use_cache or past_key_values is not None:
            shared.cache = cache

        hidden_states = []
        attentions = []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            if recompute:
                x, weights = checkpoint(layer, x, shared, **self.gradient_checkpointing)
            else:
                x, weights = layer(x, shared)
            if output_attentions:
                attentions.append(weights)
        x = self.norm(x)

        out = ModelOutput(last_hidden_state=x)
        if use_cache:
            cache.commit(tokens)
            out.past_key_values = cache
        if output_hidden_states:
            out.hidden_states = (*hidden_states, x)
        if output_attentions:
            out.attentions = tuple(attentions)
        return self.in_form(out, return_dict)


# --- 5. Language model -----------------------------------------------------------------------


class OpenLlamaWithHead(OpenLlamaPreTrainedModel):
    """The decoder, for a head to be put on it."""

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        self.model = OpenLlamaModel(config)


class OpenLlamaLanguageModel(OpenLlamaWithHead):
    """The language model. OpenLlamaForCausalLM (section 11) is the same, and can sample.

    Its output matrix is the embedding, or `lm_head` where config.json asks for one of its own.
    """

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        if not (config.shared_input_output_embedding or config.tie_word_embeddings):
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
            self.init_weights(self.lm_head)

    @property
    def output_weight(self) -> Tensor:  # (V, C)
        if hasattr(self, "lm_head"):
            return self.lm_head.weight
        return self.model.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | Sequence[tuple[Tensor, Tensor]] | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor | None = 0,
    ) -> ModelOutput | tuple:
        """Logits (B, T, V), and the loss if there are labels; other arguments: OpenLlamaModel's.

        labels: (B, T), as a rule the input_ids. The loss is the mean cross-entropy, in float32, of
          each token's next label, except those that are -100 or begin another document.
        logits_to_keep: 0: all; n: the last n tokens'; a tensor: those at these places, (K,) or
          (B, K); None: none. If not all are kept, the loss is computed in chunks, so that all
          logits are never in memory.
        """
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        wanted = (use_cache, output_attentions, output_hidden_states)
        out = self.model(*inputs, *wanted, return_dict=True)
        hidden = out.last_hidden_state
        keeps_all = isinstance(logits_to_keep, int) and logits_to_keep == 0
        logits = None
        if logits_to_keep is not None:
            logits = linear(select_tokens(hidden, logits_to_keep), self.output_weight)
        loss = None
        if labels is not None:
            check_labels(labels, hidden, self.config.vocab_size)
            targets = next_tokens(labels, attention_mask)
            if keeps_all:
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            else:
                loss = loss_in_chunks(hidden, self.output_weight, targets)
        return self.in_form(out.of_head(loss, logits), return_dict)


# =============================================================================================
# The model ends here. Part two: what makes it practical
# =============================================================================================


# --- 6. Padding and packed documents ---------------------------------------------------------


@dataclass
class Tokens:
    """The S tokens that one forward sees, in the cache and new, and which of them are new."""

    new: Tensor  # (T,): the indices of the new tokens among all S
    positions: Tensor  # (B|1, S): where each token stands in its document
    documents: Tensor | None  # (B|1, S): the number of its document, 0 for padding; None: all 1
    given: bool = False  # whether position_ids were ever given; else positions are counted

    def lengths(self) -> Tensor:
        """How many tokens each token's document has so far: (B|1, S), or (1, 1) for one."""
        if self.documents is None:
            return self.positions.new_full((1, 1), self.positions.shape[1])
        return document_lengths(self.documents)


def locate_tokens(
    cache: KVCache,
    x: Tensor,
    config: OpenLlamaConfig,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
) -> Tokens:
    """Begin a step: find out where the new tokens x (B, T, C) stand, after those in the cache."""
    B, T, _ = x.shape
    new, S = cache.begin(x, config)
    documents = cache.extended_documents(new)
    if attention_mask is not None:
        expect_shape("attention_mask", attention_mask, (B, S))
        documents = attention_mask.long()
        # if all is real, it is faster without documents; where one cannot ask, they are kept
        if has_values(documents) and bool(documents.eq(1).all()):
            documents = None
    if documents is None:
        positions = torch.arange(S, device=x.device)[None]
    else:
        positions = count_positions(documents)
    given = position_ids is not None or cache.positions is not None
    if given:
        if position_ids is not None:
            expect_shape("position_ids", position_ids, (B, T), (1, T))
        positions = with_given_positions(positions, cache.positions, position_ids, T)
    return Tokens(new, positions, documents, given)


def with_given_positions(
    counted: Tensor, cached: Tensor | None, position_ids: Tensor | None, T: int
) -> Tensor:
    """The counted positions (B|1, S), but for those that were given, now or with cached tokens."""
    S = counted.shape[1]
    if cached is None:
        cached = counted[:, : S - T]
    if position_ids is None:
        position_ids = counted[:, S - T :]
    rows = max(len(cached), len(position_ids))
    return torch.cat((cached.expand(rows, -1), position_ids.expand(rows, -1)), dim=1)


def document_begins(documents: Tensor) -> Tensor:
    """(B, S): True at the first token of each document. The numbers of documents ascend, and may
    skip some."""
    so_far = documents.cummax(dim=1).values
    return so_far > F.pad(so_far, (1, 0))[:, :-1]


def count_positions(documents: Tensor) -> Tensor:
    """Each token's position in its document, (B, S); padding's has no meaning.

    Here are two tokens of a document, padding, and two of another. The real tokens are counted, 1 2
    2 3 4, and the count at the first token of the document, 1 1 1 3 3, is taken off:

    >>> count_positions(torch.tensor([[1, 1, 0, 2, 2]]))
    tensor([[0, 1, 1, 0, 1]])
    """
    count = documents.ne(0).cumsum(dim=1)
    at_begin = count.where(document_begins(documents), 0).cummax(dim=1).values
    return count - at_begin


def document_lengths(documents: Tensor) -> Tensor:
    """How many real tokens each token's document has, (B, S). Padding says what the document
    before it has.

    >>> document_lengths(torch.tensor([[1, 1, 1, 0, 2, 2]]))
    tensor([[3, 3, 3, 3, 2, 2]])
    """
    B, S = documents.shape
    number = document_begins(documents).cumsum(dim=1)  # 1, 2, ...; 0 before the first
    lengths = number.new_zeros(B, S + 1)
    lengths = lengths.scatter_add(1, number, documents.ne(0).long())
    return lengths.gather(1, number)


def visible_keys(tokens: Tokens) -> Tensor:
    """Which keys each new token sees, (B|1, 1, T, S): those of its document, up to itself.

    Padding counts as a document, or it would see nothing, and a softmax of nothing is NaN. Here
    are two new tokens after a cache of three, the first of which is padding:

    >>> documents = torch.tensor([[0, 1, 1, 1, 1]])
    >>> tokens = Tokens(torch.tensor([3, 4]), count_positions(documents), documents)
    >>> visible_keys(tokens).long()
    tensor([[[[0, 1, 1, 1, 0],
              [0, 1, 1, 1, 1]]]])
    """
    S = tokens.positions.shape[1]
    mask = torch.arange(S, device=tokens.new.device) <= tokens.new[:, None]  # (T, S)
    if tokens.documents is not None:
        own = tokens.documents[:, tokens.new]
        mask = mask & (tokens.documents[:, None] == own[:, :, None])
    return mask.view(-1, 1, *mask.shape[-2:])


def next_tokens(labels: Tensor, attention_mask: Tensor | None) -> Tensor:
    """For each token, the label of the next one, (B, T), or -100 if there is none to predict.

    >>> next_tokens(torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[1, 1, 1, 2, 2]]))
    tensor([[   6,    7, -100,    9, -100]])
    """
    targets = F.pad(labels[:, 1:].long(), (0, 1), value=-100)
    if attention_mask is None:
        return targets
    documents = attention_mask[:, -labels.shape[1] :]
    # where document 1 begins after padding, its first token stays a target, as in transformers,
    # which knows no other documents; a label of -100 says otherwise
    begins = (documents[:, 1:] != documents[:, :-1]) & (documents[:, 1:] > 1)
    return targets.masked_fill(F.pad(begins, (0, 1)), -100)


def select_tokens(x: Tensor, keep: int | Tensor) -> Tensor:
    """The last `keep` tokens of x (B, T, C), or all if 0; or those at the places (K,) or (B, K)."""
    if isinstance(keep, Tensor):
        rows = torch.arange(len(x), device=x.device)
        return x[rows[:, None], keep]
    if keep == 0:
        return x
    return x[:, -keep:]


# --- 7. Key-value cache, output --------------------------------------------------------------


class KVCache:
    """Keys and values of the tokens so far, and their documents and positions. A forward keeps
    nothing else for the next one.

    `cache[layer]` is (key, value), each (B, H, length, D); the keys are not turned yet if the
    scaling is dynamic. A forward begins a step, updates each layer, and commits the step; if it
    fails before that, the cache is as it was. Full buffers are doubled, so that little is copied:

    >>> cache, token = KVCache(), torch.zeros(1, 1, 2, 4)  # (B, T, H, D)
    >>> with torch.no_grad():
    ...     for place in range(5):
    ...         keys, values = cache.update(0, token, token)
    ...         cache.commit(Tokens(torch.tensor([place]), positions=None, documents=None))
    >>> cache  # the buffers grew from 1 to 2, 4 and 8 positions
    KVCache(layers=1, length=5, capacity=8)
    """

    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] = (), capacity: int = 0):
        """past: a (key, value) for each layer; capacity: how many positions to begin with."""
        self.keys = [key for key, _ in past]
        self.values = [value for _, value in past]
        shapes = {tuple(tensor.shape) for tensor in self.keys + self.values}
        expect(
            len(shapes) <= 1,
            f"past_key_values of shapes {sorted(shapes)}: expected one, (B, H, S, D)",
        )
        self.length = self.keys[0].shape[2] if self.keys else 0
        self.capacity = max(capacity, self.length)
        self.documents = None  # (B, length): each token's, 0 for padding; None: all are of one
        self.positions = None  # (B|1, length), if any were given; None: they are counted

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[layer] for layer in range(len(self)))

    def __repr__(self) -> str:
        length = int(self.length)  # which is a tensor in FixedKVCache
        return f"{type(self).__name__}(layers={len(self)}, {length=}, capacity={self.capacity})"

    def begin(self, x: Tensor, config: OpenLlamaConfig) -> tuple[Tensor, int]:
        """The indices of the new tokens x (B, T, C) among all, (T,), and the number of all, S.

        ValueError if the cache is of another batch or model.
        """
        if self.length == 0:  # what a failed forward left may be of another batch
            self.keys.clear()
            self.values.clear()
        else:
            self.check(len(x), config)
        S = self.length + x.shape[1]
        return torch.arange(self.length, S, device=x.device), S

    def check(self, B: int, config: OpenLlamaConfig) -> None:
        layers = config.num_hidden_layers
        expect(len(self) == layers, f"past_key_values: {len(self)} layers, expected {layers}")
        rows, H, S, D = self.keys[0].shape  # H may be a process's share (tensor parallelism)
        expect(
            (rows, D) == (B, config.head_dim),
            f"past_key_values of shape {(rows, H, S, D)}: expected {(B, H, S, config.head_dim)}",
        )

    def extended_documents(self, new: Tensor) -> Tensor | None:
        """Each token's document, (B, S); the new ones are taken to go on with the last."""
        if self.documents is None:
            return None
        last = self.documents.amax(dim=1, keepdim=True)
        return torch.cat((self.documents, last.expand(-1, len(new))), dim=1)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v of the new tokens, (B, T, H, D); return those of all, (B, S, H, D)."""
        keys = self.extend(self.keys, layer, k.transpose(1, 2))
        values = self.extend(self.values, layer, v.transpose(1, 2))
        return keys.transpose(1, 2), values.transpose(1, 2)

    def extend(self, buffers: list[Tensor], layer: int, x: Tensor) -> Tensor:
        """Put x (B, H, T, D) after the first `length` positions of a layer's buffer."""
        B, H, T, D = x.shape
        S = self.length + T
        if layer == len(buffers):
            buffers.append(x[:, :, :0])  # empty; it grows below
        past = buffers[layer][:, :, : self.length]
        if torch.is_grad_enabled():  # what autograd has recorded may not be written to
            buffers[layer] = torch.cat((past, x), dim=2) if self.length else x
            return buffers[layer]
        if buffers[layer].shape[2] < S:
            self.capacity = max(S, 2 * self.length, self.capacity)
            with torch.inference_mode(False):  # or only inference mode could write to it later
                buffers[layer] = x.new_empty(B, H, self.capacity, D)
            buffers[layer][:, :, : self.length] = past
        buffers[layer][:, :, self.length : S] = x
        return buffers[layer][:, :, :S]

    def fork(self) -> KVCache:
        """A cache of the same tokens, whose steps leave this one as it is."""
        other = copy.copy(self)
        other.keys = list(self.keys)
        other.values = list(self.values)
        return other

    def crop(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self.length = min(self.length, length)
        self.capacity = self.length
        # cut off what is behind, too: autograd may have recorded it, so that the next step may not
        # write there, but has to copy
        self.keys = [key[:, :, : self.length] for key in self.keys]
        self.values = [value[:, :, : self.length] for value in self.values]
        if self.documents is not None:
            self.documents = self.documents[:, :length]
        if self.positions is not None:
            self.positions = self.positions[:, :length]
        if self.length == 0:  # as new, and for any batch
            self.documents = None
            self.positions = None

    def commit(self, tokens: Tokens) -> None:
        """Count the new tokens in."""
        self.length += len(tokens.new)
        self.capacity = max(self.capacity, self.length)
        self.documents = tokens.documents
        if tokens.given:
            self.positions = tokens.positions


def as_cache(
    past: KVCache | Sequence[tuple[Tensor, Tensor]] | None, extend: bool = True
) -> KVCache:
    """The argument past_key_values, as a cache: the one that was given, if it is to be extended."""
    if not isinstance(past, KVCache):
        return KVCache(past or ())
    if extend:
        return past
    return past.fork()


@dataclass(eq=False, repr=False)
class ModelOutput:
    """What a model returns: a record (out.logits), a mapping (out["logits"], "loss" in out,
    dict(out)), and a tuple (out[0], out[:2]). Fields that are None are in neither of the latter."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, T, V), or (B, num_labels) from the classifier
    last_hidden_state: Tensor | None = None  # (B, T, C), after the final norm; from the decoder
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # each layer's input, and last_hidden_state
    attentions: tuple[Tensor, ...] | None = None  # the weights of each layer, (B, H, T, S)

    def of_head(self, loss: Tensor | None, logits: Tensor | None) -> ModelOutput:
        """What a head returns, given this output of the decoder."""
        return ModelOutput(
            loss=loss,
            logits=logits,
            past_key_values=self.past_key_values,
            hidden_states=self.hidden_states,
            attentions=self.attentions,
        )

    def keys(self) -> list[str]:
        return [name for name, value in vars(self).items() if value is not None]

    def to_tuple(self) -> tuple:
        return tuple(getattr(self, name) for name in self.keys())

    def __getitem__(self, key: str | int | slice) -> object:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: str) -> bool:
        return key in self.keys()

    def __iter__(self) -> Iterator:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())

    def __repr__(self) -> str:
        return f"ModelOutput({', '.join(f'{name}={describe(self[name])}' for name in self.keys())})"


def describe(value: object) -> str:
    """A value in brief: a tensor by its shape, a tuple by its length and its first element."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, tuple):
        return f"{len(value)} x {describe(value[0])}"
    return repr(value)


def register_as_tree(kind: type) -> None:
    """Let torch find the tensors of a record: DDP, FSDP, torch.export and others look for them."""

    def flatten(record: object) -> tuple[list, tuple[str, ...]]:
        return list(vars(record).values()), tuple(vars(record))

    def unflatten(values: Iterable, names: Iterable[str]) -> object:
        record = kind.__new__(kind)
        vars(record).update(zip(names, values, strict=True))
        return record

    register_pytree_node(kind, flatten, unflatten)


register_as_tree(ModelOutput)
register_as_tree(KVCache)


# --- 8. Memory-efficient attention -----------------------------------------------------------


def choose_attention(x: Tensor, tokens: Tokens, eager: bool) -> Callable:
    """One forward's attention: attend(q, k, v, dropout_p), of q (B, T, H, D), k and v (B, S, H, D),
    returns (B, T, H, D), and the weights (B, H, T, S) or None.

    It is the textbook's if eager. Else it is xformers' in half precision on CUDA, if that is
    installed, unless there are both padding and a cache, for which it has no kernel. Else it is
    PyTorch's, which is as good in float32.
    """
    T = x.shape[1]
    S = tokens.positions.shape[1]
    causal = tokens.documents is None and T in (1, S)  # fused_attention needs no mask
    square = T == S
    half = x.is_cuda and type_of_queries(x) in (torch.float16, torch.bfloat16)
    if not eager and half and (tokens.documents is None or square):
        attend = xformers_attention(tokens.documents)
        if attend is not None:
            return attend
    if not eager and causal:
        return lean_attention
    return masked_attention(visible_keys(tokens), eager)


def masked_attention(mask: Tensor, eager: bool) -> Callable:
    """Attention, as `choose_attention` returns it, for a mask of your own, (B|1, 1, T, S)."""
    if eager:
        return partial(eager_attention, mask=mask)
    return partial(lean_attention, mask=mask)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Tensor
) -> tuple[Tensor, Tensor]:
    kept = draw_kept(q, k, dropout_p)
    return attention(q, k, v, mask, kept, dropout_p)


def lean_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Tensor | None = None
) -> tuple[Tensor, None]:
    """PyTorch's fused attention; but on the CPU, with dropout, its kernel stores the weights.

    So there the textbook's is computed, and once more in the backward: for 128 queries at a time,
    so that few weights exist at once. What is stored is which of them are kept, a byte for each: to
    draw that again would take longer.
    """
    if q.is_cuda or dropout_p == 0:
        return fused_attention(q, k, v, mask, dropout_p)
    T = q.shape[1]
    S = k.shape[1]
    causal = mask is None
    if causal:
        mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=q.device).tril(S - T)
    kept = draw_kept(q, k, dropout_p)
    size = T
    begins = [0]
    if not torch.compiler.is_compiling():  # which would unroll the loop, for this T alone
        size = 128
        begins = range(0, T, size)
    outs = []
    for begin in begins:
        end = min(begin + size, T)
        seen = S
        if causal:
            seen = S - T + end  # the keys behind these are in the future of all these queries
        inputs = (q[:, begin:end], k[:, :seen], v[:, :seen])
        masks = (mask[..., begin:end, :seen], kept[..., begin:end, :seen])
        out, _ = checkpoint(attention, *inputs, *masks, dropout_p, use_reentrant=False)
        outs.append(out)
    return torch.cat(outs, dim=1), None


def draw_kept(q: Tensor, k: Tensor, dropout_p: float) -> Tensor | None:
    """Which weights dropout leaves, (B, H, T, S); None if it does not act."""
    if dropout_p == 0:
        return None
    B, T, H, _ = q.shape
    S = k.shape[1]
    return torch.rand(B, H, T, S, device=q.device, dtype=torch.float32) >= dropout_p


def type_of_queries(x: Tensor) -> torch.dtype:
    """The type of the queries that are projected from x: x's own, unless autocast sets another."""
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def xformers_attention(documents: Tensor | None) -> Callable | None:
    """xformers' attention, or None where it is not installed. documents: (B, T), or None.

    Padding is packed away: rows of 3 and 2 tokens, padded to 4, become one row of 5 tokens, whose
    mask shows each of them its own document only.
    """
    try:
        from xformers.ops import fmha, memory_efficient_attention
    except ModuleNotFoundError:
        return None
    if documents is None:
        causal = fmha.attn_bias.LowerTriangularFromBottomRightMask()  # the last query sees all

        def attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, None]:
            return memory_efficient_attention(q, k, v, attn_bias=causal, p=dropout_p), None

        return attend

    B = len(documents)
    real = documents.flatten().nonzero().squeeze(1)  # the places of all real tokens in B * T
    row = torch.arange(B, device=documents.device)[:, None]
    apart = documents + row * (documents.max() + 1)  # numbers of different rows now differ
    lengths = torch.unique_consecutive(apart.flatten()[real], return_counts=True)[1]
    blocks = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths.tolist())

    def attend_packed(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> tuple[Tensor, None]:
        packed = (x.flatten(0, 1)[None, real] for x in (q, k, v))  # (1, real tokens, H, D)
        out = memory_efficient_attention(*packed, attn_bias=blocks, p=dropout_p)
        unpacked = torch.zeros_like(q).flatten(0, 1).index_copy(0, real, out[0])
        return unpacked.view(q.shape), None

    return attend_packed


# --- 9. Classifier ---------------------------------------------------------------------------


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
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ModelOutput | tuple:
        """Logits (B, num_labels), and the loss if there are labels: (B,) classes, or (B,
        num_labels) numbers, by config.problem_type. Other arguments: OpenLlamaModel's.

        attention_mask tells the last real token, else pad_token_id does, else it is the last.
        """
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        wanted = (use_cache, output_attentions, output_hidden_states)
        out = self.model(*inputs, *wanted, return_dict=True)
        hidden = out.last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        last = self.last_tokens(hidden, input_ids, attention_mask)
        logits = self.score(hidden[rows, last])
        loss = None
        if labels is not None:
            loss = classification_loss(logits, labels, self.config)
        return self.in_form(out.of_head(loss, logits), return_dict)

    def last_tokens(
        self, hidden: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        """The place of each row's last real token, (B,)."""
        B, T, _ = hidden.shape
        pad = self.config.pad_token_id
        if attention_mask is not None:
            real = attention_mask[:, -T:] != 0
        elif pad is not None and input_ids is not None:
            real = input_ids != pad
        else:  # nothing tells padding: rows are taken to be whole, as in transformers, which
            # refuses several rows where the model has no pad id at all
            expect(
                B == 1 or pad is not None,
                f"cannot tell where {B} rows end: pad_token_id=None, no attention_mask",
            )
            real = torch.ones(B, T, dtype=torch.bool, device=hidden.device)
        return last_true(real)


def last_true(flags: Tensor) -> Tensor:
    """The last place of each row that is True, (B,) of (B, T); the last of all where none is."""
    return flags.shape[1] - 1 - flags.long().flip(1).argmax(dim=1)


def classification_loss(logits: Tensor, labels: Tensor, config: OpenLlamaConfig) -> Tensor:
    """The loss of a regression, or of one label or several. config.problem_type says which; if it
    is None, num_labels and the type of the labels tell."""
    kind = config.problem_type
    if kind is None and config.num_labels == 1:
        kind = "regression"
    elif kind is None and labels.is_floating_point():
        kind = "multi_label_classification"
    elif kind is None:
        kind = "single_label_classification"
    logits = logits.float()
    if kind == "single_label_classification":
        check_ids("labels", labels.masked_fill(labels == -100, 0), config.num_labels)
        return F.cross_entropy(logits, labels.flatten().long())
    shapes = [logits.shape]
    if config.num_labels == 1:
        shapes.append(logits.shape[:1])
    expect_shape("labels", labels, *shapes)
    labels = labels.view_as(logits).float()
    if kind == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


# --- 10. Checks and checkpoints --------------------------------------------------------------

# First, checks: of arguments, then of settings


def expect(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(cut(message, 4000))


def cut(text: str, length: int) -> str:
    """A text for a message, which may hold what a broken file says, however long."""
    if len(text) <= length:
        return text
    return f"{text[:length]}..."


def expect_shape(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    fits = any(tuple(tensor.shape) == tuple(shape) for shape in shapes)
    expect(fits, f"{name} of shape {tuple(tensor.shape)}: expected {tuple(shapes[0])}")


def check_ids(name: str, ids: Tensor, size: int) -> None:
    """ValueError for ids that are not integers from 0 to size - 1. The range is checked on the CPU
    only: to read them from a GPU would make it wait."""
    expect(not ids.is_floating_point(), f"{name} of type {ids.dtype}: expected integers")
    if ids.device.type == "cpu" and ids.numel() > 0 and has_values(ids):
        low, high = (int(bound) for bound in ids.aminmax())
        expect(low >= 0 and high < size, f"{name} from {low} to {high}: expected 0 to {size - 1}")


def has_values(x: Tensor) -> bool:
    """Whether code may ask what is in a tensor: not on meta, nor where its operations are compiled,
    exported, counted or traced, its values faked, or many mapped over at once."""
    return not (
        x.is_meta
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def check_inputs(ids: Tensor | None, embeds: Tensor | None, config: OpenLlamaConfig) -> None:
    expect((ids is None) != (embeds is None), "expected one of input_ids and inputs_embeds")
    if ids is not None:
        check_ids("input_ids", ids, config.vocab_size)
        fits = ids.dim() == 2 and ids.numel() > 0
        expect(fits, f"input_ids of shape {tuple(ids.shape)}: expected (B, T), not empty")
    else:
        C = config.hidden_size
        fits = embeds.dim() == 3 and embeds.shape[2] == C and embeds.numel() > 0
        shape = tuple(embeds.shape)
        expect(fits, f"inputs_embeds of shape {shape}: expected (B, T, {C}), not empty")


def check_labels(labels: Tensor, hidden: Tensor, vocab_size: int) -> None:
    expect_shape("labels", labels, hidden.shape[:2])
    check_ids("labels", labels.masked_fill(labels == -100, 0), vocab_size)


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


def check_config(config: OpenLlamaConfig) -> None:
    """Bring settings into one form. ValueError for one that no model can have; those of a subclass
    are left to it."""
    normalise_rope_scaling(config)
    normalise_labels(config)
    for field in fields(OpenLlamaConfig):
        name = field.name
        value = getattr(config, name)
        kind = type(field.default)
        if name.endswith("_token_id"):
            check_token_id(name, value)
        elif kind is bool:
            expect(type(value) is bool, f"{name}={value!r}: expected true or false")
        elif kind in (int, float):
            check_number(name, value, kind)
            setattr(config, name, kind(value))  # an integer may stand for a float
    C = config.hidden_size
    H = config.num_attention_heads
    D = C // H
    expect(C % H == 0, f"hidden_size={C} is not divisible by num_attention_heads={H}")
    expect(
        D % 2 == 0,
        f"hidden_size={C} / num_attention_heads={H}: expected an even head size, not {D}",
    )
    V = config.vocab_size
    pad = config.pad_token_id
    expect(
        pad is None or pad in range(V),
        f"pad_token_id={pad!r}: expected None or an id below vocab_size={V}",
    )
    act = config.hidden_act
    expect(
        callable(act) or act in list(ACTIVATIONS),  # a list, as what was given may not be hashable
        f"hidden_act={act!r}: expected a function or one of {list(ACTIVATIONS)}",
    )
    problems = ("regression", "single_label_classification", "multi_label_classification")
    expect(
        config.problem_type is None or config.problem_type in problems,
        f"problem_type={config.problem_type!r}: expected None or one of {problems}",
    )


MAX_SIZE = 2**28  # the bytes of a matrix of this size squared are a number of 64 bits
MAX_FLOAT = torch.finfo(torch.float32).max


def check_number(name: str, value: object, kind: type) -> None:
    number = type(value) in (int, kind)  # not a bool, which is an int, too
    if name in ("hidden_dropout_prob", "attention_dropout_prob"):
        expect(number and 0 <= value < 1, f"{name}={value!r}: expected {kind.__name__} in [0, 1)")
    elif kind is int:
        ok = number and 0 < value <= MAX_SIZE
        expect(ok, f"{name}={value!r}: expected int above 0, at most {MAX_SIZE}")
    else:
        ok = number and 0 < value <= MAX_FLOAT
        expect(ok, f"{name}={value!r}: expected float above 0, at most {MAX_FLOAT:.4g}")


def check_token_id(name: str, value: object) -> None:
    if value is None:
        return
    ids = value
    if not isinstance(value, list):
        ids = [value]
    for token in ids:
        ok = type(token) is int and abs(token) <= MAX_SIZE
        expect(ok, f"{name}={value!r}: expected a token's id or None")


def normalise_rope_scaling(config: OpenLlamaConfig) -> None:
    """Bring rope_scaling into one form: None, or a type of ROTARY_EMBEDDINGS and its settings."""
    given = config.rope_scaling
    config.rope_scaling = None
    if given is None or given == {}:
        return
    expect(isinstance(given, dict), f"rope_scaling={given!r}: expected a dict of type and factor")
    rope = {key: value for key, value in given.items() if value is not None}
    config.rope_theta = rope.pop("rope_theta", config.rope_theta)  # transformers 5 has it here
    kind = rope.pop("type", None)
    kind = rope.pop("rope_type", kind)  # its newer name
    if kind == "default" or (kind == "linear" and rope.get("factor") == 1):
        kind = "default"
        rope.pop("factor", None)  # which changes nothing
    kinds = [name for name in ROTARY_EMBEDDINGS if name != "default"]
    expected = f"rope_scaling={given}: expected type {' or '.join(kinds)} and factor > 1, no more"
    expect(kind in ["default", *kinds], expected)
    settings = ROTARY_EMBEDDINGS[kind].settings
    original = "original_max_position_embeddings"
    if original not in settings and rope.get(original) == config.max_position_embeddings:
        del rope[original]  # which says nothing new
    expect(rope.keys() == set(settings), expected)
    expect(all(is_rope_setting(*item) for item in rope.items()), expected)
    if kind != "default":
        numbers = {name: float(value) for name, value in rope.items()}
        config.rope_scaling = {"type": kind, **numbers}


def is_rope_setting(name: str, value: object) -> bool:
    least = 0
    if name == "factor":
        least = 1
    return type(value) in (int, float) and least < value <= MAX_FLOAT


def normalise_labels(config: OpenLlamaConfig) -> None:
    """Bring id2label into one form: None, or a name for each id, which num_labels then counts."""
    labels = config.id2label
    config.id2label = None
    if labels is None or labels == {}:
        return
    expected = f"id2label={labels!r}: expected a dict of ids and names"
    expect(isinstance(labels, dict), expected)
    for key, name in labels.items():
        expect(str(key).isdecimal() and isinstance(name, str | int), expected)
    count = len(labels)
    given = config.num_labels
    expect(given in (2, count), f"num_labels={given!r}: expected {count}, as id2label has names")
    config.num_labels = count
    named = {int(key): name for key, name in labels.items()}
    expect(len(named) == count, expected)
    if named != {number: f"LABEL_{number}" for number in range(count)}:  # made up by transformers
        config.id2label = named


# What transformers writes into config.json besides the model: what its PretrainedConfig knows in
# 4.31, in groups, and some keys of other versions. None of them changes an Open-Llama there.
LIBRARY_KEYS = {
    *("architectures", "auto_map", "transformers_version", "torch_dtype", "dtype", "name_or_path"),
    *("use_bfloat16", "torchscript", "tf_legacy_loss", "xla_device", "pruned_heads"),
    *("is_decoder", "is_encoder_decoder", "add_cross_attention", "cross_attention_hidden_size"),
    *("tie_encoder_decoder", "chunk_size_feed_forward", "pretraining_tp"),
    *("tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id"),
    *("label2id", "finetuning_task", "task_specific_params"),
    *("max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p"),
    *("num_beams", "num_beam_groups", "diversity_penalty", "early_stopping", "length_penalty"),
    *("repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "remove_invalid_values"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("num_return_sequences", "output_scores", "return_dict_in_generate"),
}


def config_from_dict(cls: type[OpenLlamaConfig], values: dict) -> OpenLlamaConfig:
    """Read the contents of a config.json, in any spelling that transformers has used.

    Allowed are fields, LIBRARY_KEYS, private keys (_...), what is off (null, false, 0, empty), and
    sizes that this model has anyway. ValueError for any other key: it may change the model.
    """
    # transformers 4.31 and most checkpoints misspell a key: use_memorry_efficient_attention
    values = {key.replace("memorry", "memory"): value for key, value in values.items()}
    kind = values.pop("model_type", "open-llama")  # for others there is convert_checkpoint.py
    expect(kind in ("open-llama", "open_llama"), f"model_type={kind!r}: expected 'open-llama'")
    rope_parameters = values.pop("rope_parameters", None)  # of transformers 5
    if rope_parameters:
        values["rope_scaling"] = rope_parameters
    if values.get("id2label"):  # it counts more than a number, as in transformers
        values.pop("num_labels", None)
    own = {field.name for field in fields(cls)}
    config = cls(**{key: value for key, value in values.items() if key in own})
    implied = {"num_key_value_heads": config.num_attention_heads, "head_dim": config.head_dim}
    unknown = []
    for key, value in values.items():
        known = key in own or key in LIBRARY_KEYS or key.startswith("_")
        if not known and value and value != implied.get(key):
            unknown.append(cut(f"{key}={value!r}", 200))
    expect(not unknown, f"Open-Llama does not have these settings: {listed(unknown)}")
    return config


def listed(items: list[str], separator: str = ", ") -> str:
    """The first 20, and how many more there are."""
    shown = items[:20]
    if len(items) > 20:
        shown.append(f"and {len(items) - 20} more")
    return separator.join(shown)


# Then, reading files

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of shards
ANY_WEIGHTS = r"model((-v\d+)?-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
COMPUTED = "rotary_emb.inv_freq"  # ends names in old files, of what is computed and no weight
# By their names in safetensors. Weights are FLOATS: integers and 8-bit floats belong to quantised
# models, which are more than their weights.
STORED_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
FLOATS = [dtype for dtype in STORED_TYPES if dtype.is_floating_point]


def read_json(path: Path) -> dict:
    try:
        with no_deep_nesting(path):
            # some editors begin a file with a mark of its encoding, which this drops
            value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    expect(isinstance(value, dict), f"{path} holds a {type(value).__name__}: expected an object")
    return value


@contextlib.contextmanager
def no_deep_nesting(path: Path) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise ValueError(f"{path} is nested too deep") from None


def read_json_if_there(path: Path) -> dict:
    if path.is_file():
        return read_json(path)
    return {}


def load_config(cls: type[OpenLlamaConfig], folder: Path) -> OpenLlamaConfig:
    convert = f"python convert_checkpoint.py {folder}"
    if not folder.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        raise FileNotFoundError(
            f"there is no folder {folder}; if that is a name on the Hugging Face Hub: "
            f"hf download {folder} --local-dir {folder}, then {convert} CONVERTED"
        )
    path = folder / "config.json"
    values = read_json(path)
    kind = values.get("model_type")
    expect(
        kind != "llama",
        f"{folder} holds a LLaMA, which becomes an Open-Llama by: {convert} CONVERTED",
    )
    with no_deep_nesting(path):
        config = cls.from_dict(values)
    ends = read_generation_ends(folder)
    if ends is not None:  # they count more, as in transformers
        config.eos_token_id = ends
    return config


def read_generation_ends(folder: Path) -> int | list[int] | None:
    """The ids that end a text, by generation_config.json, if it names any."""
    ends = read_json_if_there(folder / "generation_config.json").get("eos_token_id")
    check_token_id("eos_token_id", ends)
    return ends


def load_model(
    cls: type[OpenLlamaPreTrainedModel], folder: Path, dtype: torch.dtype | None, device: Device
) -> OpenLlamaPreTrainedModel:
    config = cls.config_class.from_pretrained(folder)
    tensors = read_tensors(cls, folder)
    check_layers(config, len(tensors))
    with torch.device("meta"):  # shapes without memory
        model = cls(config)
    wanted = tensors_by_name(model)
    lacking = []
    for name in cls.may_lack:
        own = [key for key in wanted if key.startswith(f"{name}.")]
        if own and not tensors.keys() & own:
            lacking.append(name)
            wanted = {key: tensor for key, tensor in wanted.items() if key not in own}
    check_tensors(tensors, wanted, folder)
    if dtype is None:
        dtype = common_type(tensors)
    for name in lacking:
        warnings.warn(f"{folder} has no {name}: it starts untrained", stacklevel=3)
        tensors |= initialised(model, name)
    prefix = checkpoint_prefix(cls)
    tensors = {
        name.removeprefix(prefix): cast(name, tensor, device, dtype)
        for name, tensor in tensors.items()
    }
    model.load_state_dict(tensors, assign=True)
    for name, buffer in model.named_buffers():
        expect(not buffer.is_meta, f"{name} is not persistent, so that no checkpoint holds it")
    return model.eval()


@torch.no_grad()
def load_weights(model: OpenLlamaPreTrainedModel, folder: Path) -> None:
    tensors = read_tensors(type(model), folder)
    own = tensors_by_name(model)
    check_tensors(tensors, own, folder)
    for name, tensor in own.items():  # all are looked at before the first is changed
        expect(not tensor.is_meta, f"{name} is on meta: model.to_empty gives it memory")
        cast(name, tensors[name], "cpu", tensor.dtype)
    for name, tensor in own.items():
        new = cast(name, tensors[name], tensor.device, tensor.dtype)
        if is_sharded(tensor):
            from torch.distributed.tensor import distribute_tensor

            new = distribute_tensor(new, tensor.device_mesh, tensor.placements)
        tensor.copy_(new)


def read_tensors(cls: type[OpenLlamaPreTrainedModel], folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, but for those that this kind of model ignores."""
    tensors = read_safetensors(folder)
    plain = plain_names(tensors)
    return {
        plain[name]: tensor
        for name, tensor in tensors.items()
        if plain[name].split(".")[0] not in cls.ignores and not name.endswith(COMPUTED)
    }


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name, mapped from its files. ValueError for a broken one."""
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        files = {WEIGHTS}
    elif index.is_file():
        files = set(read_index(index).values())
    else:
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        message = f"{folder} has no {WEIGHTS}"
        if pickles:
            message += f", but {pickles[0]}: python convert_checkpoint.py {folder} CONVERTED"
        raise FileNotFoundError(message)
    tensors = {}
    for file in sorted(files):
        expect_no_pointer(folder / file)
        try:
            with safe_open(folder / file, framework="pt") as shard:
                found = {name: shard.get_tensor(name) for name in list(shard.keys())}
        except (SafetensorError, RuntimeError) as error:
            message = f"{folder / file} is not a whole safetensors file: {error}"
            raise ValueError(cut(message, 4000)) from None
        twice = sorted(tensors.keys() & found)
        expect(not twice, f"{folder / file} has {listed(twice)}, as another file has")
        tensors |= found
    return tensors


def read_index(path: Path) -> dict[str, str]:
    """Each tensor's file, out of an index, which is not trusted to name files elsewhere."""
    index = read_json(path).get("weight_map")
    fits = isinstance(index, dict) and len(index) > 0
    fits = fits and all(isinstance(file, str) for file in index.values())
    expect(fits, f"{path} has no weight_map from tensors to files")
    for file in set(index.values()):
        beside = 0 < len(file) < 256 and file != ".." and Path(file).name == file
        expect(beside, f"{path} names {cut(file, 100)!r}: expected a file beside it")
    return index


def expect_no_pointer(path: Path) -> None:
    """ValueError for what git leaves in place of a large file that was not downloaded."""
    if path.is_file():
        with path.open("rb") as file:
            begin = file.read(40)
        pointer = begin.startswith(b"version https://git-lfs")
        expect(not pointer, f"{path} is a git-lfs pointer, not the file: git lfs pull gets it")


def tensors_by_name(model: OpenLlamaPreTrainedModel) -> dict[str, Tensor]:
    """A model's tensors by their names in a checkpoint."""
    prefix = checkpoint_prefix(type(model))
    return {prefix + plain_name(name): tensor for name, tensor in model.state_dict().items()}


def checkpoint_prefix(cls: type[OpenLlamaPreTrainedModel]) -> str:
    """A checkpoint names the tensors of the bare decoder as a model with a head does."""
    if issubclass(cls, OpenLlamaModel):
        return "model."
    return ""


def plain_name(name: str) -> str:
    """A tensor's name without what torch.compile adds to it."""
    return name.replace("_orig_mod.", "")


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """What each tensor of a checkpoint is called here. DistributedDataParallel puts a prefix before
    all names, and a bare decoder of transformers lacks one."""
    plain = {name: plain_name(name) for name in names}
    if all(new.startswith("module.") for new in plain.values()):
        plain = {name: new.removeprefix("module.") for name, new in plain.items()}
    bare = any(new.startswith("layers.") for new in plain.values())
    if bare and not any(new.startswith("model.") for new in plain.values()):
        plain = {name: f"model.{new}" for name, new in plain.items()}
    expect(len(set(plain.values())) == len(plain), "the checkpoint has a tensor under two names")
    return plain


def check_layers(config: OpenLlamaConfig, tensors: int) -> None:
    """Called before a model is made: even on meta, one of endless layers would never be done."""
    layers = config.num_hidden_layers
    fits = layers <= tensors
    expect(fits, f"num_hidden_layers={layers}: expected fewer, as there are {tensors} tensors")


def check_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], folder: Path) -> None:
    """ValueError that lists all tensors that do not fit."""
    problems = mismatches(found, wanted)
    expect(not problems, f"{folder} does not fit its config.json: {listed(problems, '; ')}")


def mismatches(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """Say which tensors are missing, left over, or of another shape or type. Of those that are
    found, no more than shape and dtype is looked at."""
    missing = [name for name in wanted if name not in found]
    left_over = [name for name in found if name not in wanted]
    prefix = common_prefix(missing, left_over)
    if prefix:
        return [f"all names begin with {cut(prefix, 100)!r}: expected {missing[0]} and so on"]
    problems = []
    # side by side, as one may be the other under another name
    for absent, extra in zip_longest(missing, left_over):
        if absent:
            problems.append(f"{absent} is missing")
        if extra:
            shape = tuple(found[extra].shape)
            problems.append(f"{cut(extra, 100)} of shape {shape} is left over")
    for name, tensor in found.items():
        if name not in wanted:
            continue
        shape = tuple(wanted[name].shape)
        if tuple(tensor.shape) != shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}: expected {shape}")
            continue
        dtypes = FLOATS
        if not wanted[name].is_floating_point():  # a buffer, which a module of yours may have
            dtypes = [wanted[name].dtype]
        if tensor.dtype not in dtypes:
            problems.append(f"{name} has dtype {tensor.dtype}: expected {listed_types(dtypes)}")
    return problems


def listed_types(dtypes: list[torch.dtype]) -> str:
    return f"one of {', '.join(map(str, dtypes))}"


def common_prefix(missing: list[str], left_over: list[str]) -> str:
    """What stands before every missing name among those that are left over, or nothing."""
    for name in left_over:
        if missing and name.endswith(f".{missing[0]}"):
            prefix = name.removesuffix(missing[0])
            if all(prefix + name in left_over for name in missing):
                return prefix
    return ""


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A type of weights, given by itself or its name; None for "auto", as transformers calls it."""
    if dtype is None or dtype == "auto":
        return None
    found = dtype
    if isinstance(dtype, str):
        found = getattr(torch, dtype.removeprefix("torch."), None)
    expect(found in FLOATS, f"dtype={dtype!r}: expected {listed_types(FLOATS)}")
    return found


def common_type(tensors: dict[str, Tensor]) -> torch.dtype:
    """The type that holds all weights' values."""
    types = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    return reduce(torch.promote_types, types or {torch.float32})


def cast(name: str, tensor: Tensor, device: Device, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.to(device)
    result = tensor.to(device, dtype)
    if result.dtype != tensor.dtype and not result.isfinite().all():
        raise ValueError(f"{name} does not fit into {dtype}: it holds {tensor.abs().max():.4g}")
    return result


def initialised(model: OpenLlamaPreTrainedModel, name: str) -> dict[str, Tensor]:
    """Make a module of a model on meta real, and draw its weights: its tensors by their names."""
    module = model.get_submodule(name).to_empty(device="cpu")
    for tensor in module.state_dict().values():
        tensor.fill_(math.nan if tensor.is_floating_point() else 0)
    for part in module.modules():
        if hasattr(part, "reset_parameters"):  # as norms have, which init_weights leaves alone
            part.reset_parameters()
    module.apply(model.init_weights)
    tensors = {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
    for key, tensor in tensors.items():
        expect(not tensor.isnan().any(), f"{key} is drawn by no reset_parameters or init_weights")
    return tensors


# Last, writing files


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the system tell the file, as it does not where a disk is full."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once it is whole."""
    temporary = path.with_suffix(f".{os.getpid()}")  # as other processes may write here, too
    try:
        with naming(path):
            yield temporary
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_config(config: OpenLlamaConfig, folder: Path, more: dict) -> None:
    text = config_text(config, more)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "config.json") as path:
        path.write_text(text, encoding="utf-8")


def config_values(config: OpenLlamaConfig) -> dict:
    values = {"model_type": config.model_type, **asdict(config)}
    if config.id2label is not None:  # transformers wants the names both ways
        values["label2id"] = {name: key for key, name in config.id2label.items()}
    return values


def config_text(config: OpenLlamaConfig, more: dict) -> str:
    act = config.hidden_act
    expect(not callable(act), f"hidden_act={act}: config.json holds a name, not a function")
    return json.dumps(config.to_dict() | more, indent=2) + "\n"


def save_model(model: OpenLlamaPreTrainedModel, folder: Path, max_shard_size: str) -> None:
    tensors = tensors_to_save(model)
    shards = deal(tensors, limit=parse_size(max_shard_size))
    dtype = str(common_type(tensors)).removeprefix("torch.")
    name = type(model).__name__.removeprefix("FSDP")  # of the class that fully_shard makes
    config = config_text(model.config, {"architectures": [name], "torch_dtype": dtype})

    # full_tensor needs all processes, so all read the whole stream, even after writing has failed
    sharded = any(is_sharded(tensor) for tensor in tensors.values())
    stream = whole_tensors(tensors[name] for names in shards.values() for name in names)
    problem = None
    if not sharded or dist.get_rank() == 0:
        try:
            write_checkpoint(folder, config, shards, tensors, stream)
        except OSError as error:  # the other processes must hear of it
            problem = error
    for _ in stream:
        pass
    if sharded:  # nobody goes on before the files are there
        box = [problem]
        dist.broadcast_object_list(box)
        problem = box[0]
    if problem is not None:
        raise problem


def tensors_to_save(model: OpenLlamaPreTrainedModel) -> dict[str, Tensor]:
    """As tensors_by_name. ValueError for what a checkpoint cannot hold."""
    once = dict(model.named_parameters())
    for name, _ in model.named_parameters(remove_duplicate=False):
        expect(name in once, f"{name} is another parameter too: a checkpoint would make two of it")
    tensors = tensors_by_name(model)
    for name, tensor in tensors.items():
        expect(
            ".parametrizations." not in name,
            f"{name} belongs to a parametrised layer: remove_parametrizations makes it plain",
        )
        fits = type(tensor) is Tensor or is_sharded(tensor)
        fits = fits and tensor.dtype in STORED_TYPES and tensor.layout == torch.strided
        kind = f"{type(tensor).__name__} of {getattr(tensor, 'dtype', 'no type')}"
        expect(fits, f"{name} is a {kind}, as of a quantised layer: expected a plain tensor")
        expect(not tensor.is_meta, f"{name} is on meta, which is no plain tensor: it has no values")
    return tensors


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, by what that alone has: its module is not imported for this."""
    return hasattr(tensor, "full_tensor")


def whole_tensors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each on the CPU, one at a time."""
    for tensor in tensors:
        if is_sharded(tensor):
            tensor = tensor.full_tensor()
        yield tensor.cpu().contiguous()


def write_checkpoint(
    folder: Path,
    config: str,
    shards: dict[str, list[str]],
    tensors: dict[str, Tensor],
    stream: Iterator[Tensor],
) -> None:
    """Write all files whole before the first of them takes its place.

    What fails or is killed until then leaves an old checkpoint as it is. Then one operation
    replaces its weights: that of model.safetensors, or of the index, which until then names the
    old shards. A config.json that differs goes before, so that for an instant there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = under_new_names(shards, folder)
    texts = {}
    if len(shards) > 1:
        texts[INDEX] = index_text(shards, tensors)
    with contextlib.ExitStack() as places:  # all are taken in the end, the last one first
        path = places.enter_context(replacing(folder / "config.json"))
        path.write_text(config, encoding="utf-8")
        places.enter_context(removing_others(folder, kept=shards | texts))
        for file, text in texts.items():
            path = places.enter_context(replacing(folder / file))
            path.write_text(text, encoding="utf-8")
        for file, names in shards.items():
            path = places.enter_context(replacing(folder / file))
            with path.open("wb") as out:
                out.write(safetensors_header({name: tensors[name] for name in names}))
                for tensor in islice(stream, len(names)):
                    out.write(tensor.reshape(-1).view(torch.uint8).numpy())
        old = folder / "config.json"
        if old.exists() and old.read_bytes() != config.encode():
            old.unlink()


def under_new_names(shards: dict[str, list[str]], folder: Path) -> dict[str, list[str]]:
    """Shards that do not take the places of others one by one: the index finds them by any name."""
    if len(shards) == 1:
        return shards
    named = shards
    version = 1
    while any((folder / file).exists() for file in named):
        version += 1
        stem = f"model-v{version}-"
        named = {file.replace("model-", stem): names for file, names in shards.items()}
    return named


@contextlib.contextmanager
def removing_others(folder: Path, kept: Iterable[str]) -> Iterator[None]:
    """In the end, remove the weights that an old checkpoint had under other names."""
    yield
    for path in folder.iterdir():
        if re.fullmatch(ANY_WEIGHTS, path.name) and path.name not in kept:
            path.unlink(missing_ok=True)


def parse_size(text: str) -> float:
    """The number of bytes in a size like 500MB, 2GB or 2GiB."""
    problem = f"max_shard_size={text!r}: expected a size, as in 500MB or 2GB"
    parts = re.fullmatch(r"(\d+\.?\d*) ?([KMGT]?)(i?)B?", str(text), re.IGNORECASE)
    expect(parts is not None, problem)
    number, prefix, binary = parts.groups()
    base = 1000
    if binary:
        base = 1024
    size = float(number) * base ** ["", "K", "M", "G", "T"].index(prefix.upper())
    expect(size > 0, problem)
    return size


def deal(tensors: dict[str, Tensor], limit: float) -> dict[str, list[str]]:
    """Deal tensors to files of at most `limit` bytes, or of one that is larger: names by file.

    In a file those of wide types come first, so that each begins at a multiple of its type's size.
    """
    shards = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + byte_size(tensor) > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += byte_size(tensor)
    for shard in shards:
        shard.sort(key=lambda name: tensors[name].dtype.itemsize, reverse=True)
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {
        f"model-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def byte_size(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def index_text(shards: dict[str, list[str]], tensors: dict[str, Tensor]) -> str:
    files = {name: file for file, names in shards.items() for name in names}
    total = sum(byte_size(tensor) for tensor in tensors.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2) + "\n"


def safetensors_header(tensors: dict[str, Tensor]) -> bytes:
    """What a file begins with: in JSON, where each tensor lies; before it its length, in 8 bytes.

    Written by hand, as the library wants all tensors in memory, and hides the file from others.
    """
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end = start + byte_size(tensor)
        header[name] = {
            "dtype": STORED_TYPES[tensor.dtype],
            "shape": tuple(tensor.shape),
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the first tensor begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def resize_vocabulary(model: OpenLlamaPreTrainedModel, size: int) -> nn.Embedding:
    config = replace(model.config, vocab_size=size)  # ValueError for one that cannot be
    embedding = model.get_input_embeddings()
    expect(not is_sharded(embedding.weight), "resize the vocabulary before the model is sharded")
    resize_rows(model, embedding, size)
    embedding.num_embeddings = size
    if hasattr(model, "lm_head"):
        resize_rows(model, model.lm_head, size)
        model.lm_head.out_features = size
    model.config.vocab_size = config.vocab_size
    return embedding


def resize_rows(model: OpenLlamaPreTrainedModel, module: nn.Module, size: int) -> None:
    old = module.weight
    new = old.new_empty(size, old.shape[1])
    module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    model.init_weights(module)
    module.weight.data[: len(old)] = old.data[:size]


# --- 11. Sampling ----------------------------------------------------------------------------


@dataclass
class Sampling:
    """How a text goes on: the settings of OpenLlamaForCausalLM.generate, which explains them.

    A bad value is a ValueError. For a filter of your own, subclass this as a dataclass, with its
    settings as fields, and extend `filter`.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    eos_token_id: int | list[int] | Literal["config"] | None = "config"
    pad_token_id: int | Literal["config"] | None = "config"
    generator: torch.Generator | None = None
    compile: bool = False

    def __post_init__(self):
        t, k, p, penalty = self.temperature, self.top_k, self.top_p, self.repetition_penalty
        # divided by far less than 1e-6, scores would overflow
        expect(t == 0 or t > 1e-6, f"temperature={t}: expected 0 or above 1e-6")
        expect(k is None or k >= 0, f"top_k={k}: expected at least 0, or None")
        expect(p is None or 0 < p <= 1, f"top_p={p}: expected a probability in (0, 1]")
        expect(penalty > 1e-6, f"repetition_penalty={penalty}: expected more than 1e-6")
        count = self.max_new_tokens
        expect(count is None or count > 0, f"max_new_tokens={count}: expected at least 1")

    def length(self, T: int, config: OpenLlamaConfig) -> int:
        """How many tokens to make, at the most, after a prompt of T."""
        longest = self.max_length
        if longest is None:
            longest = config.max_position_embeddings
        count = self.max_new_tokens
        if count is None:
            count = longest - T
        limits = f"max_new_tokens={self.max_new_tokens}, max_length={longest}"
        expect(count > 0, f"{limits}, prompt of {T}: no room for a new token")
        return count

    def ends(self, config: OpenLlamaConfig) -> list[int]:
        """The tokens that end a row."""
        eos = self.eos_token_id
        if eos == "config":
            eos = config.eos_token_id
        if eos is None:
            return []
        if isinstance(eos, int):
            return [eos]
        return list(eos)

    def padding(self, config: OpenLlamaConfig) -> int:
        """What follows the end of a row: pad_token_id, or else an end, or else 0."""
        pad = self.pad_token_id
        if pad == "config":
            pad = config.pad_token_id
        if pad is None:
            pad = next(iter(self.ends(config)), 0)
        expect(
            0 <= pad < config.vocab_size,
            f"pad_token_id={pad}: expected 0 to {config.vocab_size - 1}",
        )
        return pad

    def choose(self, scores: Tensor, counts: Tensor) -> Tensor:
        """The next token of each row, (B,). scores (B, V); counts (B, V): how often it is there."""
        if self.repetition_penalty != 1:  # https://arxiv.org/abs/1909.05858
            penalty = self.repetition_penalty
            penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
            scores = torch.where(counts > 0, penalised, scores)
        if not self.do_sample or self.temperature == 0:
            return scores.argmax(dim=-1)
        scores = self.filter(scores / self.temperature)
        probabilities = scores.softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=self.generator).squeeze(1)

    def filter(self, scores: Tensor) -> Tensor:
        """scores (B, V), with -inf for what is not to be drawn."""
        if self.top_k:
            k = min(self.top_k, scores.shape[-1])
            kth = scores.topk(k).values[:, -1:]
            scores = scores.masked_fill(scores < kth, -math.inf)
        if self.top_p is not None and self.top_p < 1:
            scores = scores.masked_fill(outside_nucleus(scores, self.top_p), -math.inf)
        return scores


def outside_nucleus(scores: Tensor, p: float) -> Tensor:
    """Which tokens are not in the nucleus, (B, V): the smallest set of the most likely tokens whose
    probabilities add up to p or more (https://arxiv.org/abs/1904.09751).

    Of the probabilities 0.2, 0.5, 0.3 the last two reach 0.6. Seen from the other end: in
    ascending order the sums are 0.2, 0.5, 1.0, and what stays within 1 - p = 0.4 is left out.

    >>> outside_nucleus(torch.tensor([[0.2, 0.5, 0.3]]).log(), 0.6)
    tensor([[ True, False, False]])
    """
    ascending, order = scores.sort(dim=-1)
    sums = ascending.softmax(dim=-1).cumsum(dim=-1)
    outside = sums <= 1 - p
    outside[:, -1] = False  # at least one stays
    return outside.scatter(1, order, outside)  # back in the vocabulary's order


class OpenLlamaForCausalLM(OpenLlamaLanguageModel):
    """The language model, and sampling from it."""

    generation_config = None  # PEFT looks for it, and for prepare_inputs_for_generation

    def generate(
        self,
        input_ids: Tensor | list,
        attention_mask: Tensor | list | None = None,
        sampling: Sampling | None = None,
        past_key_values: KVCache | None = None,
        *,
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        eos_token_id: int | list[int] | Literal["config"] | None = "config",
        pad_token_id: int | Literal["config"] | None = "config",
        generator: torch.Generator | None = None,
        compile: bool = False,
        num_return_sequences: int = 1,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Continue each row of input_ids (B, T), or the one row (T,): returns (B, T + new).

        attention_mask: as input_ids; 0 for padding, left or right. A row gives what it would alone.
        sampling: all settings that follow in one object, in place of them; see Sampling.
        past_key_values: a cache of the first tokens of input_ids, which need not be computed again;
          it is extended in place, by all tokens but the last (if compiled, by the prompt alone).
        max_new_tokens: None: until prompt and new tokens are max_length together, which defaults to
          max_position_embeddings.
        do_sample: draw the next token; else take the likeliest (temperature, top_k and top_p are
          then ignored).
        temperature: scores are divided by it; 0: take the likeliest.
        top_k, top_p: draw from the k likeliest, and of these from the fewest that reach p.
        repetition_penalty: above 1, what a row already holds gets less likely.
        eos_token_id: ends a row, which then goes on with pad_token_id; one, several, None: never.
        generator: draws the tokens; None: torch's own.
        compile: compile the step from token to token, which takes half a minute the first time.
        num_return_sequences: of each row, one after the other.
        token_type_ids: of a tokenizer that gives them; without meaning here.
        """
        if sampling is None:
            sampling = Sampling(
                max_new_tokens=max_new_tokens,
                max_length=max_length,
                do_sample=do_sample,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                repetition_penalty=repetition_penalty,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
                generator=generator,
                compile=compile,
            )
        input_ids = as_rows("input_ids", input_ids, self.device)
        count = num_return_sequences
        expect(
            type(count) is int and count > 0,
            f"num_return_sequences={count!r}: expected an int above 0",
        )
        if count > 1:
            input_ids = input_ids.repeat_interleave(count, dim=0)
            if attention_mask is not None:
                attention_mask = as_rows("attention_mask", attention_mask, self.device)
                attention_mask = attention_mask.repeat_interleave(count, dim=0)
        new = list(self.stream(input_ids, attention_mask, sampling, past_key_values))
        return torch.cat((input_ids, torch.stack(new, dim=1)), dim=1)

    def stream(
        self,
        input_ids: Tensor | list,
        attention_mask: Tensor | list | None = None,
        sampling: Sampling | None = None,
        past_key_values: KVCache | None = None,
        **settings: object,
    ) -> Iterator[Tensor]:
        """What `generate` appends, step by step: the next token of each row, (B,)."""
        if sampling is None:
            sampling = Sampling(**settings)
        cache = as_cache(past_key_values)
        return stream_tokens(self, input_ids, attention_mask, sampling, cache)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **inputs: object) -> dict:
        """Nothing is to be prepared."""
        return {"input_ids": input_ids, **inputs}


def as_rows(name: str, ids: Tensor | list, device: torch.device) -> Tensor:
    """Ids or a mask as (B, T): (T,), or a list of numbers, is one row."""
    try:
        rows = torch.as_tensor(ids, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"{name}: expected ids, one row or several of one length, not {ids!r:.60}"
        raise ValueError(message) from error
    if rows.dim() == 1:
        rows = rows[None]
    shape = tuple(rows.shape)
    expect(rows.dim() == 2, f"{name} of shape {shape}: expected (B, T), or (T,) for one row")
    return rows


def stream_tokens(
    model: OpenLlamaForCausalLM,
    input_ids: Tensor | list,
    attention_mask: Tensor | list | None,
    sampling: Sampling,
    cache: KVCache,
) -> Iterator[Tensor]:
    """The next token of each row, (B,), step by step, until all rows have ended."""
    config = model.config
    ids = as_rows("input_ids", input_ids, model.output_weight.device)
    expect(ids.numel() > 0, f"empty prompt: input_ids of shape {tuple(ids.shape)}")
    check_ids("input_ids", ids.cpu(), config.vocab_size)
    T = ids.shape[1]
    known = cache.length
    mask = cache.extended_documents(ids[0, known:])
    if attention_mask is not None:
        mask = as_rows("attention_mask", attention_mask, ids.device)
    if mask is None:
        mask = torch.ones_like(ids)
    expect_shape("attention_mask", mask, ids.shape)
    own = (mask != 0) & (mask == mask.amax(dim=1, keepdim=True))  # of the row's last document
    expect(bool(own.any(dim=1).all()), "empty prompt: attention_mask has a row of padding alone")
    keep = last_true(own)[:, None] - known  # (B, 1): whose logits are wanted of those that are fed
    expect(bool((keep >= 0).all()), f"past_key_values of {known} tokens: input_ids has {T}")
    count = sampling.length(T, config)
    pad = sampling.padding(config)
    ends = torch.tensor(sampling.ends(config), dtype=torch.long, device=ids.device)
    step = next_scores
    if sampling.compile and count > 1:
        given = "cannot compile with past_key_values of which position_ids were given"
        expect(cache.positions is None, given)
        compiled = compiled_step(ids.device)  # now, as it fails where there is no compiler

    # how often a row holds each token; of its own tokens, as padding adds 0
    counts = torch.zeros(len(ids), config.vocab_size, dtype=torch.long, device=ids.device)
    counts.scatter_add_(1, ids.long(), own.long())
    done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    fed = ids[:, known:]
    mode = inference_mode_for(model)
    for n in range(count):
        with mode():
            if sampling.compile and n > 0:
                filled = T + n - 1  # of the cache: all but the token that is fed now
                if n == 1 or filled == cache.capacity:
                    cache = FixedKVCache(cache, capacity=min(2 * filled, T + count - 1))
                    step = compiled
            scores, cache = step(model, fed, mask, cache, keep)
            likeliest = scores.amax(dim=-1)
            if not likeliest.isfinite().all():
                raise ValueError(f"the model's scores hold {likeliest.max()}")
            token = sampling.choose(scores, counts)
            if len(ends) > 0:
                token = token.where(~done, pad)
                done |= torch.isin(token, ends)
            fed = token[:, None]
            if sampling.repetition_penalty != 1:
                counts.scatter_add_(1, fed, torch.ones_like(fed))
        yield token.clone()  # unlike a tensor made in inference mode, it may be used in training
        if len(ends) > 0 and bool(done.all()):
            return
        mask = None  # the cache knows of padding
        keep = 1  # the last one's


def next_scores(
    model: OpenLlamaForCausalLM,
    ids: Tensor,
    mask: Tensor | None,
    cache: KVCache,
    keep: Tensor | int,
) -> tuple[Tensor, KVCache]:
    """What the model says comes next: (B, V), in float32. keep: logits_to_keep, one of a row."""
    out = model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        output_attentions=False,
        output_hidden_states=False,
        return_dict=True,
        logits_to_keep=keep,
    )
    return out.logits[:, -1].float(), out.past_key_values


# --- 12. Speed -------------------------------------------------------------------------------

# looked up once, for code that may be compiled; torch 2.6 has no is_exporting: bool() is False
HAS_ONEDNN = torch.backends.mkldnn.is_available()
is_exporting = getattr(torch.compiler, "is_exporting", bool)


class Linear(nn.Linear):
    """nn.Linear, with `linear` for its product."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding, whose weights are drawn by init_weights alone. (To draw them on meta, when a
    checkpoint is loaded, would make torch import its compiler, which takes a second.)"""

    def reset_parameters(self) -> None:
        pass


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias, (..., C) to (..., len(weight)): PyTorch's product, except in two cases.

    Compiled, a single token's product is written as the sum that it is, for which torch.compile
    makes a loop that runs at the speed of memory. And in inference a large float32 product on a CPU
    is oneDNN's. PyTorch's own choice is MKL, which uses one thread for a single token, and on AMD
    processors has as little as half of oneDNN's speed.
    """
    if torch.compiler.is_compiling() and is_single_token(x) and is_plain(x, weight):
        return single_token_product(x, weight, bias)
    if suits_onednn(x, weight) and is_plain(x, weight):
        if torch.compiler.is_compiling():
            return onednn_operator(x, weight, bias)
        return onednn_product(x, weight, bias)
    return F.linear(x, weight, bias)


def is_single_token(x: Tensor) -> bool:
    return x.numel() == x.shape[-1]


def single_token_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = (weight * x.flatten()).sum(dim=-1)
    if bias is not None:
        product = product + bias
    return product.view(*x.shape[:-1], -1)


def suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is faster: a call of it costs some 30 microseconds more. That is little beside
    reading a large matrix, or beside multiplying a smaller one with many rows, as in the prefill of
    a prompt."""
    if not HAS_ONEDNN or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    large = weight.numel() >= 2**19
    if large or torch.compiler.is_compiling():  # which must not depend on the number of rows
        return large
    rows = x.numel() // x.shape[-1]
    return rows * weight.numel() >= 2**25


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's product, which has no derivatives, no rule for vmap, and no count of operations."""
    # the last three arguments say that nothing is done to the result
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


# torch.compile, which has no code for this product, calls an operator as it is
onednn_operator = torch.library.custom_op(
    "openllama::onednn_linear", onednn_product, mutates_args=()
)
onednn_operator.register_fake(lambda x, weight, bias: x.new_empty(*x.shape[:-1], len(weight)))


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether only the result of a product is wanted: nothing differentiates it, maps over it,
    casts, counts, traces or exports it, and the weight is not sharded or quantised."""
    if type(weight) is not nn.Parameter or x.is_meta or torch.is_autocast_enabled(x.device.type):
        return False
    if torch.compiler.is_compiling():
        differentiated = torch.is_grad_enabled() or forward_ad._current_level >= 0
        return not (differentiated or is_exporting())
    # autograd records nothing in inference mode, and has_values sees torch.func; compiled code can
    # ask for neither
    return torch.is_inference_mode_enabled() and has_values(x)


def inference_mode_for(model: nn.Module) -> Callable:
    """torch.inference_mode, or torch.no_grad if weights are sharded: FSDP keeps what it gathers
    under inference mode, and could not train with it."""
    if all(type(parameter) is nn.Parameter for parameter in model.parameters()):
        return torch.inference_mode
    return torch.no_grad


def loss_in_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss of 256 tokens at a time, whose logits are computed again in the backward."""

    def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = linear(hidden, weight).float()
        return F.cross_entropy(logits, targets, reduction="sum")

    chunks = zip(hidden.flatten(0, 1).split(256), targets.flatten().split(256), strict=True)
    losses = [checkpoint(chunk_loss, h, y, use_reentrant=False) for h, y in chunks]
    return sum(losses) / targets.ne(-100).sum()


class FixedKVCache(KVCache):
    """A cache of which no tensor ever changes its shape or place, for the compiled step.

    It always shows all its positions; those yet to come are padding. `length` is a tensor, (1,).
    """

    def __init__(self, cache: KVCache, capacity: int):
        super().__init__()
        length = int(cache.length)
        rest = capacity - length
        self.keys = [F.pad(key, (0, 0, 0, rest)) for key, _ in cache]
        self.values = [F.pad(value, (0, 0, 0, rest)) for _, value in cache]
        self.capacity = capacity
        self.length = torch.tensor([length], device=self.keys[0].device)
        documents = cache.documents
        if documents is None:
            documents = self.length.new_ones(1, length)
        self.documents = F.pad(documents[:, :length], (0, rest))
        for tensor in (*self.keys, *self.values, self.documents, self.length):
            # a CUDA graph may write to it; without a guard, as other caches use the same code
            torch._dynamo.mark_static_address(tensor, guard=False)
        for tensor in (*self.keys, *self.values):
            torch._dynamo.maybe_mark_dynamic(tensor, 2)  # the code is for any capacity
        torch._dynamo.maybe_mark_dynamic(self.documents, 1)

    def begin(self, x: Tensor, config: OpenLlamaConfig) -> tuple[Tensor, int]:
        # not self.capacity: an int would be a constant of the compiled code
        return self.places(x.shape[1]), self.documents.shape[1]

    def places(self, T: int) -> Tensor:
        return self.length + torch.arange(T, device=self.length.device)

    def extended_documents(self, new: Tensor) -> Tensor:
        last = self.documents.amax(dim=1, keepdim=True)
        return self.documents.index_copy(1, new, last.expand(-1, len(new)))

    def extend(self, buffers: list[Tensor], layer: int, x: Tensor) -> Tensor:
        return buffers[layer].index_copy_(2, self.places(x.shape[2]), x)

    def commit(self, tokens: Tokens) -> None:
        self.length.add_(len(tokens.new))
        self.documents.copy_(tokens.documents)


@lru_cache
def compiled_step(device: torch.device) -> Callable:
    """`next_scores`, compiled for any length, once; on CUDA it is replayed as one graph."""
    torch.compile(torch.neg)(torch.ones(1, device=device))  # fails if there is no compiler
    print("compiling the decoding step, which takes half a minute at first", file=sys.stderr)
    mode = "reduce-overhead"
    try:
        # models of other sizes and settings, and other numbers of rows, compile it anew, up to the
        # limit
        return torch.compile(next_scores, mode=mode, recompile_limit=64)
    except TypeError:  # older versions of torch have a limit of 8
        return torch.compile(next_scores, mode=mode)


def tensor_parallel_plan() -> dict:
    """For parallelize_module of torch.distributed.tensor.parallel: the heads and the MLPs are
    split over the processes, the rest is whole on each."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    plan = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    return plan


# --- 13. Text --------------------------------------------------------------------------------

# First, tokenizers. encode(text, special) makes ids, with the special ones that a text begins
# with, if special; decode(ids) makes text, without special ones.


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

    special_ids = {"<pad>": 0, "</s>": 1, "<unk>": 2}

    def encode(self, text: str, special: bool = True) -> list[int]:
        ids = []
        for part in re.split(f"({'|'.join(self.special_ids)})", text):
            if part in self.special_ids:
                ids.append(self.special_ids[part])
            else:
                ids += [byte + 3 for byte in part.encode()]
        return ids

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 3 for i in ids if 3 <= i < 259).decode(errors="replace")


@dataclass
class AddedToken:
    """A token that a text holds by its name, and that sentencepiece would split into letters."""

    id: int
    special: bool  # not a part of decoded text
    lstrip: bool  # whether the whitespace before it is dropped
    rstrip: bool  # ... or after it


class SentencePieceTokenizer:
    """tokenizer.model, and the tokens that the files beside it add, as transformers 4.31 has it."""

    def __init__(self, folder: Path, settings: dict, bos: int | None):
        """settings: of tokenizer_config.json; bos: what a text begins with, if anything."""
        from sentencepiece import SentencePieceProcessor

        path = folder / "tokenizer.model"
        try:
            self.model = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a model of sentencepiece: {error}") from None
        self.size = self.model.get_piece_size()
        self.legacy = settings.get("legacy") is not False
        self.bos = bos if settings.get("add_bos_token", True) else None
        self.tokens = read_added_tokens(folder, settings, self.model)
        self.names = {
            token.id: name for name, token in self.tokens.items() if token.id >= self.size
        }
        self.special_ids = {token.id for token in self.tokens.values() if token.special}
        longest_first = sorted(self.tokens, key=len, reverse=True)
        either = "|".join(map(re.escape, longest_first)) or "(?!)"  # which is found nowhere
        self.pattern = re.compile(f"({either})")

    def encode(self, text: str, special: bool = True) -> list[int]:
        ids = []
        if special and self.bos is not None:
            ids.append(self.bos)
        parts = self.pattern.split(text)  # text, name, text, ..., name, text
        for n, part in enumerate(parts):
            if n % 2 == 1:
                ids.append(self.tokens[part].id)
                continue
            if n > 0 and self.tokens[parts[n - 1]].rstrip:
                part = part.lstrip()
            if n + 1 < len(parts) and self.tokens[parts[n + 1]].lstrip:
                part = part.rstrip()
            ids += self.encode_plain(part, first=n == 0)
        return ids

    def encode_plain(self, text: str, first: bool) -> list[int]:
        """The ids of text without tokens in it. If it is not the first of its text, and the
        tokenizer is not a legacy one, the space that sentencepiece puts before it is taken off."""
        if first or self.legacy or text.startswith(" "):
            return self.model.encode(text)
        pieces = self.model.encode(text, out_type=str)
        if pieces:
            pieces[0] = pieces[0].removeprefix("\u2581")
        return [self.model.piece_to_id(piece) for piece in pieces if piece]

    def decode(self, ids: list[int]) -> str:
        kept = [i for i in ids if i not in self.special_ids]
        texts = []
        for added, run in groupby(kept, key=self.names.__contains__):
            if added:
                texts += [self.names[i] for i in run]
            else:
                texts.append(self.model.decode([i for i in run if i < self.size]))
        return " ".join(texts)


LLAMA_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def read_added_tokens(folder: Path, settings: dict, model: object) -> dict[str, AddedToken]:
    """The tokens that files beside tokenizer.model name: special ones, and those that are no piece.

    Most are objects, which say whether they drop the whitespace around them. In transformers 4.31
    one that is a mere string does, unless it is one of four that tokenizer_config.json names (or
    nobody names: these have defaults). The last two sources are those of later versions.
    """
    tokens = {}

    def add(entry: str | dict, number: int, special: bool = False, strip: bool = True) -> None:
        if isinstance(entry, str):
            entry = {"content": entry, "lstrip": strip, "rstrip": strip}
        name = content(entry)
        special = special or bool(entry.get("special")) or (name in tokens and tokens[name].special)
        lstrip = bool(entry.get("lstrip"))
        tokens[name] = AddedToken(number, special, lstrip, rstrip=bool(entry.get("rstrip")))

    added = read_json_if_there(folder / "added_tokens.json")
    for name, number in added.items():
        add(name, number)
    defaults = LLAMA_TOKENS | {"pad_token": None}
    named = [(entry, role not in defaults) for role, entry in roles(defaults | settings)]
    mapped = roles(read_json_if_there(folder / "special_tokens_map.json"))
    named += [(entry, True) for _, entry in mapped]
    for entry, strip in named:
        name = content(entry)
        add(entry, added.get(name, model.piece_to_id(name)), special=True, strip=strip)
    for entry in read_json_if_there(folder / "tokenizer.json").get("added_tokens") or []:
        add(entry, entry["id"])
    for number, entry in (settings.get("added_tokens_decoder") or {}).items():
        add(entry, int(number))
    unknown = model.unk_id()  # the id of all that has none, as a pad_token that was never added
    unk = model.id_to_piece(unknown)
    return {name: token for name, token in tokens.items() if token.id != unknown or name == unk}


def roles(settings: dict) -> list[tuple[str, str | dict]]:
    """The special tokens that a file names, as ("eos_token", "</s>")."""
    named = [(role, entry) for role, entry in settings.items() if role.endswith("_token")]
    named += [("additional", entry) for entry in settings.get("additional_special_tokens") or []]
    # others are switches, as add_bos_token, or null
    return [(role, entry) for role, entry in named if isinstance(entry, str | dict)]


def content(entry: str | dict) -> str:
    """The name of a token, which is a string, or an object with settings."""
    if isinstance(entry, str):
        return entry
    expect(isinstance(entry.get("content"), str), f"a token without a name: {entry}")
    return entry["content"]


class JsonTokenizer:
    """tokenizer.json."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            self.model = Tokenizer.from_buffer(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is not a tokenizer: {error}") from None
        self.model.no_padding()  # the file may ask for both
        self.model.no_truncation()

    def encode(self, text: str, special: bool = True) -> list[int]:
        return self.model.encode(text, add_special_tokens=special).ids

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


Tokenizer = NumberTokenizer | ByteTokenizer | SentencePieceTokenizer | JsonTokenizer


def load_tokenizer(folder: Path, bos: int | None) -> Tokenizer:
    """The tokenizer of a checkpoint; bos: the id that a text begins with, for tokenizer.model."""
    settings = read_json_if_there(folder / "tokenizer_config.json")
    for name in ("tokenizer.model", "tokenizer.json"):
        expect_no_pointer(folder / name)
    if (folder / "tokenizer.model").is_file():
        try:
            return SentencePieceTokenizer(folder, settings, bos)
        except (LookupError, TypeError, AttributeError) as error:
            message = f"{folder}: a file beside tokenizer.model names no tokens: {error!r}"
            raise ValueError(message) from None
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder / "tokenizer.json")
    if settings.get("tokenizer_class") == "ByT5Tokenizer":
        return ByteTokenizer()
    message = f"{folder} has no tokenizer.model or tokenizer.json; --prompt-ids needs none"
    raise FileNotFoundError(message)


def special_id(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of a special token, by its name; None for text, which decoding would not lose."""
    ids = tokenizer.encode(text, special=False)
    if len(ids) == 1 and tokenizer.decode(ids) == "" and text.strip():
        return ids[0]
    return None


# Then, what a conversation looks like to the model. A message is {"role": "system", "user" or
# "assistant", "content": text}; a format writes a list of them as the text to be continued.


def open_llama_chat(messages: list[dict]) -> str:
    """The format of Open-Llama's instruct models.

    >>> question = {"role": "user", "content": "Hi!"}
    >>> open_llama_chat([question, {"role": "assistant", "content": "Hello."}, question])
    'user:Hi!\\nsystem:Hello.</s>user:Hi!\\nsystem:'
    """
    text = ""
    for message in messages:
        role = message["role"]
        expect(role in ("user", "assistant"), f"this model's chat format has no {role} text")
        if role == "user":
            text += f"user:{message['content']}\nsystem:"
        else:
            text += f"{message['content']}</s>"
    return text


def chat_format(folder: Path) -> Callable[[list[dict]], str]:
    """A checkpoint's chat template, or Open-Llama's format where it has none."""
    settings = read_json_if_there(folder / "tokenizer_config.json")
    template = settings.get("chat_template")
    if isinstance(template, list):  # of several, by name
        named = [entry for entry in template if isinstance(entry, dict)]
        template = {entry.get("name"): entry.get("template") for entry in named}.get("default", [])
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    if template is None:
        return open_llama_chat
    expect(isinstance(template, str), f"{folder}: the chat template is no text: {template!r:.60}")
    settings = read_json_if_there(folder / "special_tokens_map.json") | settings
    if (folder / "tokenizer.model").is_file():
        settings = LLAMA_TOKENS | settings
    names = {role: content(entry) for role, entry in roles(settings)}
    return template_chat(template, names)


def template_chat(template: str, names: dict[str, str]) -> Callable[[list[dict]], str]:
    """A template of Jinja, with what transformers gives to it; names: as bos_token="<s>"."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: object, ensure_ascii: bool = False, **settings: object) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **settings)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # what a template, or an expression in it, may raise
    errors = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = time.strftime

    def render(messages: list[dict]) -> str:
        try:
            parsed = environment.from_string(template)
            return parsed.render(messages=messages, add_generation_prompt=True, **names)
        except errors as error:
            raise ValueError(f"the chat template says: {error}") from None

    return render


# Last, text as it comes


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

    What is decoded are the last ids, from 8 to some 16, since a place where the text was whole:
    decoded alone, an id would lose its leading space, and bytes their character.
    """
    window = list(prompt)
    whole = len(window)  # a place in the window where no character is cut
    shown = len(decode(window))
    broken = 0  # how many ids the text has ended in a character that is not whole
    for token in new:
        window.append(token)
        text = decode(window)
        end = len(text)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            broken += 1
            end = shown
            if broken > 3:  # no character has more bytes: these will never be one
                end = max(shown, len(text) - 3)
        else:
            broken = 0
        yield text[shown:end]
        shown = end
        if len(window) >= whole + 8 and (broken == 0 or broken > 32):
            window = window[whole:]
            whole = len(window)
            shown = len(decode(window)) - (len(text) - end)
    yield decode(window)[shown:]


# --- 14. Command line ------------------------------------------------------------------------


def zen_of_python() -> str:
    """What `import this` prints. The module stores it in ROT13."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


def demo_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A byte-level model that knows the Zen of Python by heart, trained on first use."""
    if any(folder.glob("*.safetensors")):  # the last to be written
        return folder
    folder.mkdir(parents=True, exist_ok=True)  # where that fails, it fails before the training
    settings = '{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}\n'
    (folder / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    torch.manual_seed(seed)
    config = OpenLlamaConfig(
        vocab_size=259,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.1,
        hidden_dropout_prob=0,
        attention_dropout_prob=0,
    )
    model = OpenLlamaForCausalLM(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other, in matrices as small as these
    try:
        learn_by_heart(model, zen_of_python() + "</s>")
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)
    return folder


def learn_by_heart(model: OpenLlamaForCausalLM, text: str) -> None:
    """Train on the text, from the beginnings of its lines on, as if it were a ring."""
    data = torch.tensor(ByteTokenizer().encode(text))
    begins = torch.tensor([0] + [n + 1 for n, letter in enumerate(text) if letter == "\n"])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    steps = 400
    for step in range(steps):
        B = 4
        T = 160
        if step % 4 == 0:  # or attention to all of it would never be trained
            B = 1
            T = len(data)
        starts = begins[torch.randint(len(begins), (B, 1))]
        batch = data[(starts + torch.arange(T)) % len(data)]  # (B, T)
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        warmup = min(1, (step + 1) / 20)
        optimizer.param_groups[0]["lr"] = 4e-3 * warmup * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % (steps // 20) == 0:
            share = (step + 1) / steps
            print(f"\rtraining the demo: {share:.0%}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


class ArgumentParser(argparse.ArgumentParser):
    """argparse, but a mistake is a ValueError."""

    def error(self, message: str) -> None:
        raise ValueError(message)


# each number in it, whether given here or Sampling's own, is an option of the command line
COMMAND_LINE_DEFAULTS = Sampling(
    max_new_tokens=128, do_sample=True, temperature=0.8, top_k=50, top_p=1.0
)


def number_fields(sampling: Sampling) -> dict[str, int | float]:
    """The settings that the command line has options for."""
    values = asdict(sampling)
    return {name: value for name, value in values.items() if type(value) in (int, float)}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(
        description="Sample text from an Open-Llama checkpoint, or from a demo.",
        epilog="A chat is written as the checkpoint's chat template says, or else as Open-Llama's "
        "instruct models have it: user:{question}\\nsystem:{answer}</s>user:... Each line of stdin "
        "is a turn; one that ends in a backslash goes on in the next line. Ctrl-C ends an answer, "
        "Ctrl-D the chat.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        metavar="FOLDER",
        help="default: the demo, which is trained on first use",
    )
    either = parser.add_mutually_exclusive_group().add_argument
    either("--prompt", metavar="TEXT", help="text to continue; - reads it from stdin")
    either("--prompt-file", type=Path, metavar="FILE", help="file of the text to continue")
    either("--prompt-ids", metavar="IDS", help="ids to continue, as in 1,2,3; prints ids")
    for name, value in number_fields(COMMAND_LINE_DEFAULTS).items():
        option = "--" + name.replace("_", "-")
        about = f"default: {value}"
        if name == "max_new_tokens":
            about += "; in a chat, up to the end of the answer"
        add(option, type=type(value), metavar="N", help=about)
    add("--num-samples", type=int, default=1, metavar="N", help="default: 1")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help=r"end before this text, or at this special token; \n and \t are read; may be repeated",
    )
    add("--chat", action="store_true", help="hold a conversation, which --prompt may begin")
    add("--system", metavar="TEXT", help="what the chat template tells the model at first")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    add("--dtype", choices=dtypes, default="auto", help="default: as stored")
    add("--device", metavar="NAME", help="as cpu, cuda:1, mps; default: the accelerator, if any")
    add(
        "--compile",
        action="store_true",
        help="compile the decoding step: half a minute at first, then faster",
    )
    add("--demo-dir", type=Path, metavar="FOLDER", help="default: ~/.cache/openllama-zen")
    args = parser.parse_args(argv)
    expect(args.num_samples > 0, f"--num-samples {args.num_samples}: expected at least 1")
    seed = args.seed or 0
    expect(-(2**63) <= seed < 2**64, f"--seed {seed}: expected 64 bits")
    expect(all(args.stop), "--stop: expected a text")
    expect(args.chat or args.system is None, "--system: expected --chat, too")
    expect(not args.chat or args.prompt_ids is None, "--chat takes text, and not --prompt-ids")
    expect(not args.chat or args.num_samples == 1, "--chat: expected no --num-samples")
    expect(not args.stop or args.prompt_ids is None, "--stop takes text, and not --prompt-ids")
    for text in (args.system, *args.stop):
        expect_utf8(text or "")
    return args


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def read_prompt(args: argparse.Namespace) -> str | None:
    """The text to continue, or None. Files lose the newline that editors append."""
    prompt = args.prompt_ids
    if args.prompt_file:
        prompt = args.prompt_file.read_text("utf-8", errors="surrogateescape").removesuffix("\n")
    elif args.prompt == "-":
        expect(sys.stdin is not None, "--prompt -: stdin is closed")
        prompt = sys.stdin.read().removesuffix("\n")
    elif args.prompt is not None:
        prompt = args.prompt
    if prompt is not None:
        expect_utf8(prompt)
    return prompt


def expect_utf8(text: str) -> None:
    """ValueError for the surrogates by which Python stands in for bytes that it cannot decode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"a text that is not UTF-8: {text[error.start :]!r:.20}") from None


def find_device(name: str | None) -> torch.device:
    found = torch.device("cpu")
    if torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
    if name is None:
        return found
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name}: expected a device of torch, as cpu or cuda:1") from None
    here = device.type in ("cpu", found.type)
    if here and device.type != "cpu" and device.index is not None:
        here = device.index < torch.accelerator.device_count()
    expect(here, f"--device {name}: torch {torch.__version__} finds none here, but {found}")
    return device


def context_length(config: OpenLlamaConfig) -> int:
    """How many tokens a text may have for the model to make sense of it. (Dynamic scaling has no
    such end; there it is what the factor is meant for.)"""
    scaling = config.rope_scaling or {}
    return int(config.max_position_embeddings * scaling.get("factor", 1))


class Writer:
    """Continues texts on stdout, and tells on stderr how fast.

    It keeps the cache, so that a prompt that begins as the last text did is read from there on.
    """

    def __init__(
        self,
        model: OpenLlamaForCausalLM,
        tokenizer: Tokenizer,
        sampling: Sampling,
        stops: Iterable[str] = (),
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.ends = sampling.ends(model.config)
        self.stops = []
        for stop in stops:
            end = special_id(tokenizer, stop)
            if end is None:
                self.stops.append(stop)
            else:
                self.ends.append(end)
        self.sampling = replace(sampling, eos_token_id=self.ends)
        self.cache = KVCache()
        self.ids = []  # the last prompt and its continuation; the cache has them, but for the last
        self.text = ""  # the continuation, as printed
        self.cut = False  # whether it has its full number of tokens, and no end
        self.warned = False

    def write(self, prompt: list[int], max_new_tokens: int | None = None) -> None:
        """Print a continuation as it is made. max_new_tokens: None: as sampling says."""
        # what the cache shares with the prompt is kept; not the last token, which has to be fed
        self.cache.crop(common_length(self.ids[: self.cache.length], prompt[:-1]))
        read = len(prompt) - self.cache.length
        self.ids = list(prompt)
        self.text = ""
        self.cut = False
        self.times = [time.perf_counter()]
        sampling = self.sampling
        if max_new_tokens is not None:
            sampling = replace(sampling, max_new_tokens=max_new_tokens)
        new = self.new_tokens(sampling)
        for piece in stream_text(self.tokenizer.decode, prompt, new, self.stops):
            self.text += piece
            print(piece, end="", flush=True)
        print(flush=True)
        self.report(read)

    def new_tokens(self, sampling: Sampling) -> Iterator[int]:
        """The tokens up to the end, or to where they are cut off."""
        stream = self.model.stream([self.ids], sampling=sampling, past_key_values=self.cache)
        for token in stream:
            self.ids.append(int(token))
            self.times.append(time.perf_counter())
            if self.ids[-1] in self.ends:
                return
            yield self.ids[-1]
        self.cut = True

    def mind_the_context(self) -> None:
        config = self.model.config
        length = context_length(config)
        dynamic = config.rope_scaling is not None and config.rope_scaling["type"] == "dynamic"
        if len(self.ids) > length and not dynamic and not self.warned:
            log(f"the text is longer than the {length} tokens that the model is made for")
            self.warned = True

    def report(self, read: int) -> None:
        """read: how many tokens of the prompt were not in the cache."""
        seconds = [after - before for before, after in pairwise(self.times)]
        prefill, *steps = seconds
        figures = [f"prefill {read} tokens, {read / prefill:.1f} tokens/s"]
        if steps:  # the median, as one of them includes compiling
            figures.append(f"decode {1 / statistics.median(steps):.1f} tokens/s")
        figures += peak_memory(self.model.output_weight.device)
        log("; ".join(figures))
        self.mind_the_context()


def common_length(a: list[int], b: list[int]) -> int:
    """How many ids a and b begin alike."""
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


def peak_memory(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return [f"peak memory {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"]
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:  # on Windows
        return []
    unit = 1 if sys.platform == "darwin" else 1024  # bytes, or kilobytes
    return [f"peak memory {getrusage(RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB"]


class Chat:
    """A conversation, whose oldest turns are dropped when it gets too long for the model."""

    def __init__(self, writer: Writer, format: Callable[[list[dict]], str], system: str | None):
        self.writer = writer
        self.format = format
        self.system = []
        if system is not None:
            self.system = [{"role": "system", "content": system}]
            question = {"role": "user", "content": ""}
            heard = format([*self.system, question]) != format([question])
            expect(heard, "--system: this model's chat template takes none")
        self.turns = []
        self.dropped = False

    def answer(self, question: str) -> None:
        expect_utf8(question)
        turns = [*self.turns, {"role": "user", "content": question}]
        turns, prompt = self.fit(turns)
        limit = self.writer.sampling.max_new_tokens
        if limit is None:
            limit = context_length(self.writer.model.config) - len(prompt)
        if limit <= 0:
            log(f"[{len(prompt)} tokens leave no room for an answer]")
            return
        try:
            self.writer.write(prompt, limit)
            if self.writer.cut:
                log(f"[cut off after {limit} tokens]")
        except KeyboardInterrupt:
            print(flush=True)
            log("[interrupted]")
        if self.writer.text:
            self.turns = [*turns, {"role": "assistant", "content": self.writer.text}]

    def fit(self, turns: list[dict]) -> tuple[list[dict], list[int]]:
        """The last turns, as many as leave a quarter of the context free, and their ids."""
        room = context_length(self.writer.model.config) * 3 // 4
        while True:
            text = self.format(self.system + turns)
            ids = self.writer.tokenizer.encode(text, special=False)  # a template writes its own
            if len(ids) <= room or len(turns) == 1:
                return turns, ids
            turns = turns[2:]
            if not self.dropped:
                log("[the conversation is too long: its oldest turns are dropped]")
            self.dropped = True

    def hold(self, first: str | None) -> None:
        """Answer `first`, if any, then each turn of stdin."""
        expect(sys.stdin is not None, "--chat: stdin is closed")
        marker = ""
        if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)):
            marker = "> "
            with contextlib.suppress(ImportError):  # on Windows
                import readline  # noqa: F401  # lets a line be edited
        question = first
        while True:
            if question and question.strip():
                self.answer(question)
            try:
                question = read_turn(marker)
            except EOFError:
                return


def read_turn(marker: str) -> str:
    """A line of stdin, and the next while it ends in a backslash. marker: for a terminal."""
    lines = [read_line(marker)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1].removesuffix("\\")
        try:
            lines.append(read_line(marker))
        except EOFError:
            break
    return "\n".join(lines)


def read_line(marker: str) -> str:
    if marker:
        return input(marker)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def settings_of(args: argparse.Namespace) -> Sampling:
    names = number_fields(COMMAND_LINE_DEFAULTS)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.chat:
        given.setdefault("max_new_tokens", None)  # up to the end of the answer
    return replace(COMMAND_LINE_DEFAULTS, **given, compile=args.compile)


def load_for_sampling(
    args: argparse.Namespace, folder: Path, generator: torch.Generator
) -> OpenLlamaForCausalLM:
    """Load a model onto the generator's device, and tell about it, and the seed."""
    dtype = None
    if args.dtype != "auto":
        dtype = getattr(torch, args.dtype)
    start = time.perf_counter()
    model = OpenLlamaForCausalLM.from_pretrained(folder, dtype, generator.device)
    seconds = time.perf_counter() - start
    held = str(model.output_weight.dtype).removeprefix("torch.")
    log(
        f"{model.num_parameters():,} parameters loaded in {seconds:.2f} s, {held} on "
        f"{generator.device}; seed {generator.initial_seed()}"
    )
    return model


def run(args: argparse.Namespace) -> None:
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # not None, if it is closed
            stream.reconfigure(errors=errors)
    sampling = settings_of(args)
    prompt = read_prompt(args)
    generator = torch.Generator(find_device(args.device))
    if args.seed is None:
        generator.seed()  # from the system
    else:
        generator.manual_seed(args.seed)
    folder = args.checkpoint
    if folder is None:
        folder = demo_checkpoint(args.demo_dir or default_demo_folder())
        if prompt is None and not args.chat:
            prompt = "Beautiful is better"
    model = load_for_sampling(args, folder, generator)
    tokenizer = NumberTokenizer()
    if args.prompt_ids is None:
        tokenizer = load_tokenizer(folder, model.config.bos_token_id)
    stops = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in args.stop]
    writer = Writer(model, tokenizer, replace(sampling, generator=generator), stops)
    if args.chat:
        Chat(writer, chat_format(folder), args.system).hold(prompt)
        return
    for _ in range(args.num_samples):
        writer.write(tokenizer.encode(prompt or ""))


def default_demo_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    if cache:
        return Path(cache) / "openllama-zen"
    try:
        return Path.home() / ".cache" / "openllama-zen"
    except RuntimeError:
        raise ValueError("no home directory to keep the demo in: expected --demo-dir") from None


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 after an error, told in one line on stderr; 130 after Ctrl-C; 141 where
    nobody reads stdout."""
    if sys.stderr is None:  # closed; what is printed there would else go to stdout
        sys.stderr = io.StringIO()
    try:
        run(parse_arguments(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # when Python ends, it writes what is left in its buffer, and would fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        message = str(error).split("\n\n")[0]  # torch.compile's advice follows
        message = message.split("Exception raised from")[0]  # torch's stack of C++ calls
        message = " ".join(message.split())
        if isinstance(error, ModuleNotFoundError):
            message += f" - pip install {error.name}"
        log(f"openllama.py: error: {message}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
