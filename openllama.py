# SPDX-License-Identifier: MIT
"""Open-Llama in one file: the model, its cache, its checkpoints and its sampling.

Open-Llama (s-JoL, 2023) is LLaMA (https://arxiv.org/abs/2302.13971) with three changes:
1. stable embedding: a LayerNorm on the token embedding, from Bloom (https://arxiv.org/abs/2211.05100);
2. shared embedding: the input embedding is the output matrix too, from PaLM (https://arxiv.org/abs/2204.02311);
3. memory-efficient attention: the T x S weights are never stored (https://arxiv.org/abs/2112.05682, xformers).
Results equal those of transformers 4.31, but where the README says so. Shapes: B batch, T new positions, S all visible
positions (cached and new), H heads, D head size, C = H * D hidden size, V vocabulary; "B|1": B, or 1 if all rows agree.
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache, partial, partialmethod, reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": F.tanh, "sigmoid": F.sigmoid}
ACTIVATIONS["gelu_new"] = ACTIVATIONS["gelu_pytorch_tanh"] = partial(F.gelu, approximate="tanh")
ONEDNN = torch.backends.mkldnn.is_available()
LIBRARY_KEYS = (  # what transformers writes into config.json besides the model
    "architectures auto_map transformers_version torch_dtype dtype label2id tokenizer_class pretraining_tp max_length "
    "do_sample min_length early_stopping no_repeat_ngram_size return_dict_in_generate sep_token_id finetuning_task "
    "num_beams num_beam_groups temperature top_k top_p typical_p repetition_penalty length_penalty num_return_sequences"
).split()

def expect(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)

def expect_shape(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    fits = any(tensor.shape == torch.Size(shape) for shape in shapes)  # "in" fails under torch.compile
    expect(fits, f"{name} of shape {tuple(tensor.shape)}: expected {tuple(shapes[0])}")

@dataclass
class OpenLlamaConfig:
    """The model's shape and switches: the document's `OpenLlamaConfig`, field by field.
    rope_scaling: None, or {"type": "linear" or "dynamic", "factor": above 1}. hidden_act: a name or a function.
    An impossible value is a ValueError that names the field, the value and what was expected."""

    vocab_size: int = 100000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str | Callable[[Tensor], Tensor] = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    use_memory_efficient_attention: bool = True
    hidden_dropout_prob: float = 0.1
    attention_dropout_prob: float = 0.1
    use_stable_embedding: bool = True
    shared_input_output_embedding: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    num_labels: int = 2
    problem_type: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    head_dim = property(lambda self: self.hidden_size // self.num_attention_heads)
    rope_is_dynamic = property(lambda self: "dynamic" in (self.rope_scaling or {}).values())

    def __post_init__(self):
        if (rope := self.rope_scaling) is not None:
            expect(isinstance(rope, dict), f"rope_scaling={rope!r}: expected a dict of type and factor")
            rest = {"type" if key == "rope_type" else key: value for key, value in rope.items() if value is not None}
            self.rope_theta = rest.pop("rope_theta", self.rope_theta)
            kind, factor = rest.pop("type", None), rest.pop("factor", 0)
            ok = kind == "default" or kind in ("linear", "dynamic") and type(factor) in (int, float) and factor > 1
            expect(ok and not rest, f"rope_scaling={rope}: expected type linear or dynamic and factor > 1, no more")
            self.rope_scaling = None if kind == "default" else {"type": kind, "factor": float(factor)}
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            expect(field.type is not bool or type(value) is bool, f"{name}={value!r}: expected true or false")
            ids = (value if isinstance(value, list) else [value]) if name.endswith("_token_id") else []
            expect(all(i is None or type(i) is int for i in ids), f"{name}={value!r}: expected a token's id or None")
            if field.type in (int, float):  # 1e-30: any number above 0
                low, high, wanted = (0, 1, "in [0, 1)") if "dropout" in name else (1e-30, math.inf, "above 0")
                ok = type(value) in (int, field.type) and low <= value < high
                expect(ok, f"{name}={value!r}: expected {field.type.__name__} {wanted}")
        V, C, H, pad = self.vocab_size, self.hidden_size, self.num_attention_heads, self.pad_token_id
        expect(C % H == 0, f"hidden_size={C} is not divisible by num_attention_heads={H}")
        expect(C // H % 2 == 0, f"hidden_size={C} / num_attention_heads={H}: expected an even head size, not {C // H}")
        expect(pad is None or pad in range(V), f"pad_token_id={pad!r}: expected None or an id below vocab_size={V}")
        known = callable(self.hidden_act) or self.hidden_act in [*ACTIVATIONS]
        expect(known, f"hidden_act={self.hidden_act!r}: expected a function or one of {[*ACTIVATIONS]}")
        kinds = (None, "regression", "single_label_classification", "multi_label_classification")
        expect(self.problem_type in kinds, f"problem_type={self.problem_type!r}: expected one of {kinds}")

    @classmethod
    def from_dict(cls, values: dict) -> "OpenLlamaConfig":
        """Read a config.json's contents, in any spelling that transformers has used. ValueError for a key that could
        change the model: no field, none of the library's, not off (null, false, 0, empty), not what holds anyway."""
        values = {key.replace("memorry", "memory"): value for key, value in values.items()}  # sic, in most checkpoints
        values["rope_scaling"] = values.pop("rope_parameters", None) or values.get("rope_scaling")  # transformers 5
        kind = values.pop("model_type", "open-llama")  # one of other models is for convert_checkpoint.py
        expect(kind in ("open-llama", "open_llama"), f"model_type={kind!r}: expected 'open-llama'")
        values["num_labels"] = len(values.pop("id2label", None) or ()) or values.get("num_labels", cls.num_labels)
        own = {field.name for field in fields(cls)}
        config = cls(**{key: value for key, value in values.items() if key in own})
        same = {"num_key_value_heads": config.num_attention_heads, "head_dim": config.head_dim}
        for key in values.keys() - own - set(LIBRARY_KEYS):
            harmless = key.startswith("_") or not values[key] or values[key] == same.get(key)
            expect(harmless, f"{key}={values[key]!r} is a setting that Open-Llama does not have")
        return config

    def to_dict(self) -> dict:
        return {"model_type": "open-llama", **asdict(self)}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike) -> "OpenLlamaConfig":
        """Read `folder`/config.json. FileNotFoundError where there is none, ValueError where it is broken."""
        return cls.from_dict(read_json(Path(folder) / "config.json"))

    def save_pretrained(self, folder: str | os.PathLike, **more) -> None:
        """Write `folder`/config.json, with the keys of `more` added."""
        expect(not callable(self.hidden_act), f"hidden_act={self.hidden_act}: config.json holds a name, not a function")
        path = Path(folder) / "config.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(f".{os.getpid()}").write_text(json.dumps(self.to_dict() | more, indent=2) + "\n")
        path.with_suffix(f".{os.getpid()}").replace(path)

def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    expect(isinstance(value, dict), f"{path} holds a {type(value).__name__}: expected an object")
    return value

@dataclass(eq=False)
class ModelOutput:
    """What a model returns. Indexed or unpacked, it is the tuple of its fields that are not None."""
    loss: Tensor | None = None
    logits: Tensor | None = None  # (B, T, V), or (B, num_labels) from the classifier
    last_hidden_state: Tensor | None = None  # (B, T, C), after the final norm; from the bare decoder
    past_key_values: "KVCache | None" = None
    hidden_states: tuple[Tensor, ...] | None = None  # the embedding, then one per layer; the last is last_hidden_state
    attentions: tuple[Tensor, ...] | None = None  # one (B, H, T, S) per layer

    def to_tuple(self) -> tuple:
        return tuple(value for field in fields(self) if (value := getattr(self, field.name)) is not None)

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

class KVCache:
    """Keys and values of the tokens seen so far: the only state that outlives a forward, which extends it in place.
    `cache[layer]` is (key, value), each (B, H, length, D), as in the document's tuple of tuples `past`, which is only
    read. Under dynamic scaling keys are kept before rotation, as their base changes with the length. The buffers hold
    `capacity` positions and double when full; where autograd records, tensors are concatenated instead."""
    def __init__(self, past: Sequence[tuple[Tensor, Tensor]] = (), capacity: int = 0):
        self.keys, self.values = [key for key, _ in past], [value for _, value in past]
        shapes = {tuple(tensor.shape) for tensor in self.keys + self.values}
        expect(len(shapes) <= 1, f"past_key_values of shapes {sorted(shapes)}: expected one, (B, H, S, D)")
        self.length, self.capacity = self.keys[0].shape[2] if self.keys else 0, capacity
        self.documents = self.positions = None  # (B, length), None: all 1; (B|1, length), None: counted

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]

    def place(self, T: int) -> tuple[slice | Tensor, int]:
        """Where T new tokens go, and S, the number of positions that attention then reads."""
        end, fixed = self.length + T, isinstance(self.length, Tensor)
        return (self.length, self.keys[0].shape[2]) if fixed else (slice(self.length, end), end)

    def fix(self) -> None:
        """Hold `capacity` positions, the unwritten as padding, and count in a tensor: a step then changes no shape."""
        ones = self.keys[0].new_ones(1, self.length, dtype=torch.long)
        self.documents = F.pad(ones if self.documents is None else self.documents, (0, self.capacity - self.length))
        self.length = ones.new_tensor([self.length])
        for tensor in (*self.keys, *self.values, self.documents, self.length):
            torch._dynamo.mark_static_address(tensor, guard=False)  # a CUDA graph may then write to it

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Put k and v (B, T, H, D) behind the first `length` ones, which the model counts; return all, (B, S, H, D)."""
        new, S = self.place(T := k.shape[1])
        for buffers, x in ((self.keys, k.transpose(1, 2)), (self.values, v.transpose(1, 2))):  # (B, H, T, D)
            buffer = buffers[layer] if S > T else x[:, :, :0]
            if torch.is_grad_enabled():
                buffer = torch.cat((buffer[:, :, : S - T], x), dim=2) if S > T else x
            else:
                if S > buffer.shape[2]:
                    buffer = F.pad(buffer[:, :, : S - T], (0, 0, 0, max(S, 2 * (S - T), self.capacity) - S + T))
                buffer[:, :, new] = x
            buffers[layer : layer + 1] = [buffer]  # replaced, or appended in the first forward
        return self.keys[layer][:, :, :S].transpose(1, 2), self.values[layer][:, :, :S].transpose(1, 2)

def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")  # what torch.compile calls, too

def onednn_grads(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    return onednn_linear(grad, weight.T), onednn_linear(grad.T, x.T)

onednn_linear = torch.library.custom_op("openllama::linear", onednn_product, mutates_args=())
onednn_linear.register_fake(lambda x, weight: x.new_empty(len(x), len(weight)))
onednn_linear.register_autograd(onednn_grads, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight', (..., C) to (..., len(weight)): PyTorch's product, but for two cases. Compiled, a single token's is
    written as the sum that it is, which then runs at the speed of memory. And float32 on the CPU goes to oneDNN, not to
    MKL, which on AMD has half the speed, and one thread for one token. Sharded or quantised weights are PyTorch's."""
    recording, compiling = torch.is_grad_enabled(), torch.compiler.is_compiling()
    plain = type(weight) is nn.Parameter and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
    if plain and compiling and not recording and x.numel() == weight.shape[1]:
        return (weight * x.flatten()).sum(-1).view(*x.shape[:-1], -1)
    if plain and ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32:
        product = onednn_linear if recording or compiling else onednn_product
        return product(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)
    return F.linear(x, weight)

class Linear(nn.Linear):
    forward = lambda self, x: linear(x, self.weight)

class RMSNorm(nn.RMSNorm):
    """x / rms(x), computed in float32 and rounded before it is times the weight (https://arxiv.org/abs/1910.07467)."""
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.normalized_shape, None, self.eps).to(x.dtype)

def rotary_embedding(config: OpenLlamaConfig, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions (B|1, T), each (B|1, T, 1, D), in float32. RoPE: https://arxiv.org/abs/2104.09864.
    Linear scaling: https://arxiv.org/abs/2306.15595. Dynamic NTK scaling, which depends on the length of each token's
    document so far, lengths (B|1, T|1): https://arxiv.org/abs/2309.00071, appendix A."""
    D, base, rope = config.head_dim, config.rope_theta, config.rope_scaling
    if config.rope_is_dynamic:  # growth is 1, and the base plain, up to max_position_embeddings
        growth = rope["factor"] * lengths.float() / config.max_position_embeddings - (rope["factor"] - 1)
        base = (base * growth.clamp(min=1) ** (D / max(D - 2, 1)))[..., None]  # (B|1, T|1, 1)
    elif rope is not None:
        positions = positions / rope["factor"]
    frequencies = 1.0 / base ** (torch.arange(0, D, 2, device=positions.device).float() / D)  # (..., D/2)
    angles = positions.float()[..., None] * torch.cat((-frequencies, frequencies), dim=-1)  # (B|1, T, D)
    return angles.cos()[:, :, None], angles.sin()[:, :, None]

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (a[n], b[n]) of each head, whose halves are a and b, by angles position * base ** (-2n / D):
    (a, b) to (a cos - b sin, b cos + a sin). The minus is in sin."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin

def attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float, mask: Tensor | None, eager: bool):
    """softmax(q k' / sqrt(D)) v: as in the textbook, with the weights, if eager; else by PyTorch's SDPA.
    mask: True where a query sees a key, broadcast to (B, H, T, S); None: causal, and T is S or 1."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), (B, H, S, D)
    (*BHT, _), S = q.shape, k.shape[2]
    if not eager and (q.is_cuda or not dropout_p):  # on the CPU, SDPA's dropout stores the weights
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=not (BHT[2] == 1 or mask is not None))
        return out.transpose(1, 2), None
    mask = torch.ones(BHT[2], S, dtype=torch.bool, device=q.device).tril(S - BHT[2]) if mask is None else mask
    keep = torch.rand(*BHT, S, device=q.device, dtype=torch.float32) >= dropout_p if dropout_p else None
    def textbook(q, k, v):
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)  # (B, H, T, S)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
        return (weights if keep is None else weights * keep / (1 - dropout_p)) @ v, weights
    out, weights = textbook(q, k, v) if eager else checkpoint(textbook, q, k, v, use_reentrant=False)
    return out.transpose(1, 2), weights if eager else None

def xformers_attention(documents: Tensor | None) -> Callable:
    """xformers' attention, and all that this file knows of xformers. documents: (B, T), as attention_mask; None: all 1.
    Padding is packed away: rows of 3 and 2 tokens, padded to 4, are one row of 5 under a block-diagonal causal bias."""
    from xformers.ops import fmha, memory_efficient_attention
    if documents is None:
        bias = fmha.attn_bias.LowerTriangularFromBottomRightMask()
        return lambda q, k, v, dropout_p: (memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout_p), None)
    tokens = documents.flatten().nonzero().squeeze(1)
    rows = torch.arange(len(documents), device=documents.device)[:, None] * (documents.max() + 1)
    _, lengths = torch.unique_consecutive((documents + rows).flatten()[tokens], return_counts=True)
    bias = fmha.attn_bias.BlockDiagonalCausalMask.from_seqlens(lengths.tolist())
    def attend(q, k, v, dropout_p):
        packed = (x.flatten(0, 1)[None, tokens] for x in (q, k, v))  # (1, all real tokens, H, D)
        out = memory_efficient_attention(*packed, attn_bias=bias, p=dropout_p)
        return torch.zeros_like(q).flatten(0, 1).index_copy(0, tokens, out[0]).view(q.shape), None
    return attend

def choose_attention(eager: bool, x: Tensor, documents: Tensor | None, new: slice | Tensor, S: int) -> Callable:
    """One forward's attention: a function of q (B, T, H, D), k and v (B, S, H, D) and dropout_p, to output and weights.
    Eager if asked for; else xformers for half precision on CUDA, where it is installed and takes the case; else SDPA.
    A query sees its document up to itself: documents (B|1, S) as in attention_mask, where padding, 0, counts as one
    more (a softmax over nothing is NaN); None: one for all. new: where the queries stand among the keys."""
    T = x.shape[1]
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if not eager and x.is_cuda and dtype in (torch.float16, torch.bfloat16) and (documents is None or T == S):
        with contextlib.suppress(ImportError):
            return xformers_attention(documents)
    if not eager and documents is None and T in (1, S):
        return partial(attention, mask=None, eager=False)
    position = torch.arange(S, device=x.device)
    mask = (position <= position[new, None])[None]  # (1, T, S)
    if documents is not None:
        mask = mask & (documents[:, None] == documents[:, new, None])
    return partial(attention, mask=mask[:, None], eager=eager)

class OpenLlamaAttention(nn.Module):
    def __init__(self, config: OpenLlamaConfig, layer: int):
        super().__init__()
        self.config, self.layer = config, layer
        square = lambda: Linear(config.hidden_size, config.hidden_size, bias=False)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = square(), square(), square(), square()

    def forward(self, x: Tensor, turn_q: tuple, turn_k: tuple, attend: Callable, cache: KVCache | None):
        B, T, _ = x.shape
        q, k, v = (proj(x).view(B, T, -1, self.config.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate(q, *turn_q)  # (B, T, H, D)
        k = k if self.config.rope_is_dynamic else rotate(k, *turn_k)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, S, H, D)
        k = rotate(k, *turn_k) if self.config.rope_is_dynamic else k
        out, weights = attend(q, k, v, self.config.attention_dropout_prob if self.training else 0.0)
        return self.o_proj(out.reshape(B, T, -1)), weights

class OpenLlamaMLP(nn.Module):
    """down(act(gate(x)) * up(x)), which is SwiGLU where act is SiLU (https://arxiv.org/abs/2002.05202)."""
    def __init__(self, config: OpenLlamaConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = config.hidden_act if callable(config.hidden_act) else ACTIVATIONS[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x)))

class OpenLlamaDecoderLayer(nn.Module):
    def __init__(self, config: OpenLlamaConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = OpenLlamaAttention(config, layer), OpenLlamaMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, turn_q: tuple, turn_k: tuple, attend: Callable, cache: KVCache | None):
        out, weights = self.self_attn(self.input_layernorm(x), turn_q, turn_k, attend, cache)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), weights

class OpenLlamaPreTrainedModel(nn.Module):
    """What the three models share: initialisation, checkpoints, and a few accessors."""
    decoder = property(lambda self: getattr(self, "model", self))

    def init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding | nn.Linear) and not module.weight.is_meta:
            xavier = isinstance(module, nn.Embedding) and self.config.use_stable_embedding
            std = math.sqrt(2 / sum(module.weight.shape)) if xavier else self.config.initializer_range
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "padding_idx", None) is not None:
                nn.init.zeros_(module.weight[module.padding_idx])

    def get_input_embeddings(self) -> nn.Embedding:
        return self.decoder.embed_tokens

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def gradient_checkpointing_enable(self, enable: bool = True) -> None:
        """In training, recompute each layer in the backward rather than keep its activations, and return no cache."""
        self.decoder.gradient_checkpointing = enable

    gradient_checkpointing_disable = partialmethod(gradient_checkpointing_enable, False)

    def resize_token_embeddings(self, size: int) -> nn.Embedding:
        """Cut the vocabulary to `size`, or extend it by freshly initialised rows; in place."""
        embedding, pad = self.get_input_embeddings(), self.config.pad_token_id
        expect(size > (pad or 0), f"size={size}: expected more than 0 and than pad_token_id={pad}")
        for module in [embedding, self.lm_head] if hasattr(self, "lm_head") else [embedding]:
            old = module.weight
            module.weight = nn.Parameter(old.new_empty(size, old.shape[1]), requires_grad=old.requires_grad)
            self.init_weights(module)
            module.weight.data[: len(old)] = old.data[:size]
            setattr(module, "num_embeddings" if module is embedding else "out_features", size)
        self.config.vocab_size = size
        return embedding

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, dtype: torch.dtype | None = None, device=None):
        """Load a folder of config.json and model.safetensors, or shards and their index, in evaluation mode.
        Weights are mapped from the files, copied only where dtype (None: as stored) or device (None: CPU) ask for it.
        ValueError names all tensors that are missing, left over or misshaped. Only a classifier's head may be missing,
        as it is from a language model's checkpoint: it is initialised, with a warning."""
        config, tensors = OpenLlamaConfig.from_pretrained(folder), read_safetensors(Path(folder))
        with torch.device("meta"):
            model = cls(config)
        root = model if model.decoder is not model else nn.ModuleDict({"model": model})  # has a checkpoint's names
        own, inv_freq = root.state_dict(), "rotary_emb.inv_freq"  # computed, though old checkpoints hold it
        heads = () if isinstance(model, OpenLlamaForCausalLM) else {"lm_head.weight", "score.weight"} - own.keys()
        prefix = "" if any(name.startswith("model.") for name in tensors) else "model."  # a bare model of transformers
        tensors = {prefix + name: x for name, x in tensors.items() if name not in heads and not name.endswith(inv_freq)}
        if "score.weight" in own.keys() - tensors.keys():
            warnings.warn(f"{folder} has no score.weight: the classifier's head starts untrained", stacklevel=2)
            tensors["score.weight"] = torch.empty(own["score.weight"].shape).normal_(std=config.initializer_range)
        dtype = dtype or reduce(torch.promote_types, [x.dtype for x in tensors.values()] or [torch.float32])
        try:
            root.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
        except RuntimeError as error:
            raise ValueError(f"{folder} does not fit its config.json: {error}") from None
        return model.eval()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write `folder`/config.json and then model.safetensors, each of which is replaced once it is whole."""
        from safetensors.torch import save_file
        path, prefix = Path(folder) / "model.safetensors", "model." if self.decoder is self else ""
        tensors = {prefix + name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        dtype = str(tensors["model.norm.weight"].dtype)[len("torch.") :]
        self.config.save_pretrained(folder, architectures=[type(self).__name__], torch_dtype=dtype)
        save_file(tensors, path.with_suffix(f".{os.getpid()}"), metadata={"format": "pt"})
        path.with_suffix(f".{os.getpid()}").replace(path)

def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name, mapped from its files. ValueError names a file that is broken."""
    from safetensors import SafetensorError, safe_open
    index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.is_file() and not (folder / "model.safetensors").is_file():
        files = {str(file) for file in dict(read_json(index).get("weight_map") or {}).values()}
    tensors = {}
    for file in sorted(files):
        expect(Path(file).name == file, f"{index}: {file!r} is not the name of a file beside it")
        try:
            with safe_open(folder / file, framework="pt") as shard:
                tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{folder / file} is not a whole safetensors file: {error}") from None
    return tensors

class OpenLlamaModel(OpenLlamaPreTrainedModel):
    """The decoder: embedding, layers, final norm."""
    def __init__(self, config: OpenLlamaConfig):
        super().__init__()
        self.config, self.gradient_checkpointing = config, False
        weight = torch.empty(config.vocab_size, config.hidden_size)  # to be initialised once, below
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=config.pad_token_id)
        self.embed_layer_norm = nn.LayerNorm(config.hidden_size) if config.use_stable_embedding else nn.Identity()
        self.layers = nn.ModuleList(OpenLlamaDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.apply(self.init_weights)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None,
    ) -> ModelOutput | tuple:  # fmt: skip
        """Run the decoder. The last four arguments, where None, are the config's.
        input_ids (B, T) or inputs_embeds (B, T, C), which pass by the stable embedding's norm.
        attention_mask (B, S): 0 for padding, on any side, else 1, cached tokens included; None: new tokens are real.
        Documents packed into a row are numbered 1, 2, ...: they do not see each other, and give what they would alone.
        position_ids (B|1, T); None: each document's tokens are counted.
        past_key_values: a KVCache, which is extended, or (key, value) per layer, each (B, H, S - T, D)."""
        config = self.config
        recompute = self.gradient_checkpointing and self.training and past_key_values is None
        use_cache = (config.use_cache if use_cache is None else use_cache) and not recompute
        output_attentions = config.output_attentions if output_attentions is None else output_attentions
        output_hidden_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        expect((input_ids is None) != (inputs_embeds is None), "expected one of input_ids and inputs_embeds")
        if (x := inputs_embeds) is None:
            check_ids("input_ids", input_ids, config.vocab_size)
            x = self.embed_layer_norm(self.embed_tokens(input_ids))
        fits = x.dim() == 3 and x.numel() > 0 and x.shape[2] == config.hidden_size
        expect(fits, f"input of shape {tuple(x.shape)}, embedded: expected (B, T, {config.hidden_size}), not empty")
        B, T, _ = x.shape
        cache = past_key_values if isinstance(past_key_values, KVCache) else KVCache(past_key_values or ())
        new, S = cache.place(T)
        if S > T:
            expect(len(cache) == len(self.layers), f"past_key_values: {len(cache)} layers, expected {len(self.layers)}")
            expect_shape("past_key_values", cache.keys[0][:, 0, : S - T], (B, S - T, config.head_dim))
        documents, positions, lengths = locate_tokens(attention_mask, position_ids, cache, B, T, x.device)
        turning = positions if config.rope_is_dynamic else positions[:, new]  # else, cached keys are rotated already
        turn_k = [part.to(x.dtype) for part in rotary_embedding(config, turning, lengths)]
        turn_q = [part[:, new] for part in turn_k] if config.rope_is_dynamic else turn_k
        eager = output_attentions or not config.use_memory_efficient_attention
        context = (turn_q, turn_k, choose_attention(eager, x, documents, new, S), cache if use_cache or S > T else None)
        hidden_states, attentions = [], []
        for layer in self.layers:
            hidden_states += [x] if output_hidden_states else []
            x, weights = checkpoint(layer, x, *context, use_reentrant=False) if recompute else layer(x, *context)
            attentions += [weights] if output_attentions else []
        x = self.norm(x)
        if use_cache:
            cache.positions = None if cache.positions is None and position_ids is None else positions
            cache.documents = documents
            cache.length += T
        hidden_states = (*hidden_states, x) if output_hidden_states else None
        out = ModelOutput(None, None, x, cache if use_cache else None, hidden_states, tuple(attentions) or None)
        return out if (config.return_dict if return_dict is None else return_dict) else out.to_tuple()

def check_ids(name: str, ids: Tensor, size: int) -> None:
    """ValueError for ids that are none; their range only on the CPU, where looking at it does not stall a device."""
    expect(not ids.is_floating_point(), f"{name} of type {ids.dtype}: expected integers")
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in ids.aminmax())
        expect(low >= 0 and high < size, f"{name} from {low} to {high}: expected 0 to {size - 1}")

def locate_tokens(attention_mask, position_ids, cache: KVCache, B: int, T: int, device):
    """The document of each token, (B|1, S), or None: all are 1; where it stands there, (B|1, S); how many tokens the
    document has, (B|1, S|1)."""
    (new, S), documents = cache.place(T), cache.documents
    if attention_mask is not None:
        expect_shape("attention_mask", attention_mask, (B, S))
        plain = not torch.compiler.is_compiling() and attention_mask.eq(1).all()
        documents = None if plain else attention_mask.long()
    elif documents is not None:
        last = documents.amax(1, keepdim=True)
        documents = documents if documents.shape[1] == S else F.pad(documents, (0, T))
        documents[:, new] = last
    if documents is None:
        positions, lengths = torch.arange(S, device=device)[None], torch.full((1, 1), S, device=device)
    else:
        real, number = documents > 0, documents.cummax(1).values
        begins = number > F.pad(number[:, :-1], (1, 0))
        count, order = real.cumsum(1), begins.cumsum(1)  # order: of the documents, 1, 2, ...
        positions = (count - count.where(begins, 1).cummax(1).values).clamp(min=0)
        lengths = torch.zeros(len(order), S + 1, device=device).scatter_add(1, order, real.float()).gather(1, order)
    if position_ids is not None or cache.positions is not None:
        old = positions[:, : S - T] if cache.positions is None else cache.positions
        late = positions[:, S - T :] if position_ids is None else position_ids
        expect_shape("position_ids", late, (B, T), (1, T))
        rows = max(len(old), len(late))
        positions = torch.cat((old.expand(rows, -1), late.expand(rows, -1)), dim=1)
    return documents, positions, lengths

class OpenLlamaWithHead(OpenLlamaPreTrainedModel):
    """The decoder and a head, which turns hidden states into logits and compares them with labels."""
    def __init__(self, config: OpenLlamaConfig):
        super().__init__()
        self.config, self.model = config, OpenLlamaModel(config)

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None, **head,
    ) -> ModelOutput | tuple:  # fmt: skip
        """Logits, and the loss where there are labels. `head`: that method's arguments; others: OpenLlamaModel's."""
        decoder_args = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds)
        out = self.model(*decoder_args, use_cache, output_attentions, output_hidden_states, return_dict=True)
        hidden, out.last_hidden_state = out.last_hidden_state, None
        mask = None if attention_mask is None else attention_mask[:, -hidden.shape[1] :]
        out.loss, out.logits = self.head(hidden, labels, input_ids, mask, **head)
        return out if (self.config.return_dict if return_dict is None else return_dict) else out.to_tuple()

class OpenLlamaForCausalLM(OpenLlamaWithHead):
    """The language model. Its output matrix is the embedding, where that is shared or tied, else `lm_head`."""
    output_weight = property(lambda self: getattr(self, "lm_head", self.model.embed_tokens).weight)  # (V, C)

    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        if not (config.shared_input_output_embedding or config.tie_word_embeddings):
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
            self.init_weights(self.lm_head)

    def head(self, hidden: Tensor, labels: Tensor | None, _, attention_mask: Tensor | None, logits_to_keep=0):
        """Loss and logits. The loss is the mean cross-entropy of labels[:, 1:], (B, T), under logits[:, :-1], leaving
        out -100 and the first token of documents 2, 3, ...
        logits_to_keep: 0: all; n: of the last n tokens; a tensor: of these positions, (K,) or (B, K); None: none.
        Unless all are kept, the loss is computed 256 tokens at a time, and never are all logits in memory."""
        (B, T, _), weight, loss, logits = hidden.shape, self.output_weight, None, None
        if isinstance(logits_to_keep, Tensor):
            logits = linear(hidden[torch.arange(B, device=hidden.device)[:, None], logits_to_keep], weight)
        elif logits_to_keep is not None:
            logits = linear(hidden[:, -logits_to_keep:], weight)
        if labels is not None:
            expect_shape("labels", labels, (B, T))
            check_ids("labels", labels.masked_fill(labels == -100, 0), self.config.vocab_size)
            targets = F.pad(labels[:, 1:].long(), (0, 1), value=-100)  # the last token has none
            if attention_mask is not None:
                begins = (attention_mask[:, 1:] != attention_mask[:, :-1]) & (attention_mask[:, 1:] > 1)
                targets = targets.masked_fill(F.pad(begins, (0, 1)), -100)
            if isinstance(logits_to_keep, int) and logits_to_keep == 0:
                return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), logits
            part = lambda h, y: F.cross_entropy(linear(h, weight).float(), y, reduction="sum")
            chunks = zip(hidden.flatten(0, 1).split(256), targets.flatten().split(256), strict=True)
            loss = sum(checkpoint(part, h, y, use_reentrant=False) for h, y in chunks) / targets.ne(-100).sum()
        return loss, logits

    def next_scores(self, ids: Tensor, mask: Tensor | None, cache: KVCache, last: Tensor | int) -> Tensor:
        """Logits of the tokens behind each row's position `last`, (B, 1), or the last: (B, V), in float32."""
        out = self(ids, mask, None, cache, None, None, True, False, False, True, logits_to_keep=last)
        return out.logits[:, -1].float()

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **sampling) -> Tensor:
        """Continue each row of input_ids (B, T): returns (B, T + new). Arguments and errors are those of `stream`."""
        return torch.cat([input_ids, *(ids[:, None] for ids in self.stream(input_ids, attention_mask, **sampling))], 1)

    @torch.no_grad()
    def stream(
        self, input_ids, attention_mask=None, *, max_new_tokens=None, max_length=None, do_sample=False, temperature=1.0,
        top_k=None, top_p=None, repetition_penalty=1.0, eos_token_id="config", pad_token_id="config", generator=None,
        compile=False,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield the next token of each row, (B,), step by step, until all have ended. ValueError for bad arguments.
        attention_mask (B, T): 0 for padding, left or right; each row gives what it would give alone.
        max_new_tokens: default: up to max_length, prompt included; that defaults to max_position_embeddings.
        do_sample: draw by `generator` at a temperature (0: greedy) from the top_k and top_p; else take the likeliest.
        repetition_penalty: above 1, what a row already holds gets less likely (https://arxiv.org/abs/1909.05858).
        eos_token_id: ends a row, which then yields pad_token_id; one, several, or None: never.
        compile: compile the step from one token to the next, which takes about 15 seconds the first time."""
        expect(input_ids.dim() == 2 and input_ids.numel(), f"empty prompt, or no (B, T): {tuple(input_ids.shape)}")
        check_ids("input_ids", input_ids.cpu(), self.config.vocab_size)
        B, T = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        expect_shape("attention_mask", mask, (B, T))
        real = (mask.eq(mask.amax(1, keepdim=True)) & mask.ne(0)).long()  # the row's last document
        expect(real.any(1).all(), "empty prompt: attention_mask has a row without a real token")
        if max_new_tokens is None:
            max_new_tokens = (self.config.max_position_embeddings if max_length is None else max_length) - T
        expect(max_new_tokens > 0, f"{max_new_tokens=} behind {T} ({max_length=}): expected at least 1")
        expect(temperature == 0 or temperature > 1e-6, f"temperature={temperature}: expected 0 or above 1e-6")
        expect(top_k is None or top_k >= 0, f"top_k={top_k}: expected at least 0, or None")
        expect(top_p is None or 0 < top_p <= 1, f"top_p={top_p}: expected a probability in (0, 1]")
        expect(repetition_penalty > 0, f"repetition_penalty={repetition_penalty}: expected more than 0")
        eos = self.config.eos_token_id if eos_token_id == "config" else eos_token_id
        eos = torch.tensor([] if eos is None else eos, dtype=torch.long, device=input_ids.device).flatten()
        pad = self.config.pad_token_id if pad_token_id == "config" else pad_token_id
        pad = pad if pad is not None else eos[0] if len(eos) else 0
        expect(0 <= pad < self.config.vocab_size, f"pad_token_id={pad}: expected 0 to {self.config.vocab_size - 1}")
        seen = real.new_zeros(B, self.config.vocab_size)  # how often a row holds each token
        cache, done = KVCache(capacity=T + max_new_tokens), torch.zeros(B, dtype=torch.bool, device=input_ids.device)
        step, ids, last = OpenLlamaForCausalLM.next_scores, input_ids, T - 1 - real.flip(1).argmax(1, keepdim=True)
        for n in range(max_new_tokens):
            if compile and n == 1:
                step, _ = compiled_step(), cache.fix()
            scores = step(self, ids, mask, cache, last)
            if repetition_penalty != 1:
                seen.scatter_add_(1, ids.long(), real)
                penalised = torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
                scores = torch.where(seen > 0, penalised, scores)
            if do_sample and temperature > 0:
                probabilities = filter_scores(scores / temperature, top_k, top_p).softmax(-1)
                token = torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
            else:
                token = scores.argmax(-1)
            if len(eos):
                token = torch.where(done, pad, token)
                done |= torch.isin(token, eos)
            yield token
            if len(eos) and done.all():
                return
            ids, real, mask, last = token[:, None], real.new_ones(B, 1), None, 1  # the cache knows of padding

@lru_cache
def compiled_step() -> Callable:
    """The step from one token to the next, compiled for any length; on CUDA it is replayed as one graph."""
    print("compiling the decoding step, which takes about 15 seconds", file=sys.stderr)
    return torch.compile(OpenLlamaForCausalLM.next_scores, dynamic=True, mode="reduce-overhead", recompile_limit=64)

def filter_scores(scores: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """-inf for scores (B, V) below the k-th, then for those outside the nucleus (https://arxiv.org/abs/1904.09751)."""
    if top_k:
        kth = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < kth, -math.inf)
    if top_p is not None and top_p < 1:
        ascending, order = scores.sort()
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[:, -1] = False
        scores = scores.masked_fill(outside.scatter(1, order, outside), -math.inf)  # back in the vocabulary's order
    return scores

class OpenLlamaForSequenceClassification(OpenLlamaWithHead):
    """A classifier: `score` of the last real token, told by attention_mask, else by pad_token_id, else the last."""
    def __init__(self, config: OpenLlamaConfig):
        super().__init__(config)
        self.score = Linear(config.hidden_size, config.num_labels, bias=False)
        self.init_weights(self.score)

    def head(self, hidden: Tensor, labels: Tensor | None, input_ids: Tensor | None, attention_mask: Tensor | None):
        """Loss, by problem_type or by num_labels and type, of (B,) classes or (B, num_labels) numbers; and logits."""
        (B, T, _), pad = hidden.shape, self.config.pad_token_id
        known = attention_mask is not None or pad is not None or B == 1
        expect(known, f"cannot tell where {B} rows end: pad_token_id=None, no attention_mask")
        real = torch.ones_like(hidden[:, :, 0]) if pad is None or input_ids is None else input_ids != pad
        real = real if attention_mask is None else attention_mask
        last = T - 1 - real.ne(0).long().flip(1).argmax(1)  # (B,)
        logits = self.score(hidden[torch.arange(B, device=hidden.device), last])  # (B, num_labels)
        if labels is None:
            return None, logits
        guess = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        kind = self.config.problem_type or ("regression" if self.config.num_labels == 1 else guess)
        if kind == "single_label_classification":
            check_ids("labels", labels.masked_fill(labels == -100, 0), self.config.num_labels)
            return F.cross_entropy(logits.float(), labels.flatten().long()), logits
        loss = F.mse_loss if kind == "regression" else F.binary_cross_entropy_with_logits
        expect_shape("labels", labels, logits.shape, logits.shape[: 1 + (logits.shape[1] > 1)])
        return loss(logits.float(), labels.view_as(logits).float()), logits

def tensor_parallel_plan() -> dict:
    """For parallelize_module of torch.distributed.tensor.parallel: heads and MLPs are split, the rest is whole."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
    parts = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    style = lambda name: RowwiseParallel() if name in ("o_proj", "down_proj") else ColwiseParallel()
    return {f"model.layers.*.{part}.{name}": style(name) for part, names in parts.items() for name in names}

def load_tokenizer(folder: Path, bos: int | None) -> tuple[Callable, Callable]:
    """encode(text, special) to ids, with what texts begin with where special; and decode(ids) to text."""
    settings = read_json(path) if (path := folder / "tokenizer_config.json").is_file() else {}
    if (path := folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor
        model = SentencePieceProcessor(model_file=str(path))
        start = [] if bos is None or not settings.get("add_bos_token", True) else [bos]
        decode = lambda ids: model.decode([i for i in ids if i < model.get_piece_size()])
        return lambda text, special=True: start * special + model.encode(text), decode
    if (path := folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer
        model = Tokenizer.from_file(str(path))
        return lambda text, special=True: model.encode(text, add_special_tokens=special).ids, model.decode
    if settings.get("tokenizer_class") == "ByT5Tokenizer":  # UTF-8 bytes, after pad, eos and unk
        decode = lambda ids: bytes(i - 3 for i in ids if i > 2).decode(errors="replace")
        return lambda text, special=True: [byte + 3 for byte in text.encode()], decode
    raise FileNotFoundError(f"{folder} has no tokenizer.model or tokenizer.json; --prompt-ids needs none")

def stream_text(decode: Callable, prompt: list[int], new: Iterable[int], stop: str) -> Iterator[str]:
    """The text of the new ids as they come, in whole characters, up to `stop`."""
    ids, text, shown, start = list(prompt), "", 0, len(decode(prompt))
    for token in new:
        ids.append(token)
        text = decode(ids)[start:]  # decoded alone, a token would lose its leading space
        if stop and stop in text:
            text = text[: text.index(stop)]
            break
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")  # the first bytes of a character, so far
        whole = whole[: len(whole) + 1 - max(len(stop), 1)]  # what may be the beginning of `stop` waits
        yield whole[shown:]
        shown = max(shown, len(whole))
    yield text[shown:]

def demo_checkpoint(folder: Path) -> Path:
    """A byte-level model that knows the Zen of Python by heart, trained on first use: about 10 seconds on 2 cores."""
    if (folder / "model.safetensors").is_file():  # the last to be written
        return folder
    folder.mkdir(parents=True, exist_ok=True)  # where that is not allowed, it is told before the training
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer", "extra_ids": 0}\n')
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        import this
    data = torch.tensor([ord(this.d.get(letter, letter)) + 3 for letter in this.s] + [1])  # ROT13; the last ends it
    torch.manual_seed(0)
    model = OpenLlamaForCausalLM(OpenLlamaConfig(
        vocab_size=259, hidden_size=128, intermediate_size=344, num_hidden_layers=2, num_attention_heads=4,
        bos_token_id=None, eos_token_id=1, initializer_range=0.1, hidden_dropout_prob=0, attention_dropout_prob=0,
    ))  # fmt: skip
    steps, B, T, lr = 500, 4, 160, 4e-3
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(steps):
        batch = data[(torch.randint(len(data), (B, 1)) + torch.arange(T)) % len(data)]  # (B, T), from anywhere
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        end = "\n" if step + 1 == steps else ""
        print(f"\rtraining the demo: step {step + 1}/{steps}, loss {loss:.3f} ", end=end, file=sys.stderr, flush=True)
    model.save_pretrained(folder)
    return folder

def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Sample text from an Open-Llama checkpoint, or from a small demo.")
    parser.error = lambda message: expect(False, message)
    add, cache = parser.add_argument, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    add("--checkpoint", type=Path, metavar="FOLDER", help="default: the demo, which is trained on first use")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--prompt", metavar="TEXT", help="text to continue; - reads it from stdin")
    either("--prompt-file", type=Path, metavar="FILE", help="file of the text to continue")
    either("--prompt-ids", metavar="IDS", help="ids to continue, as in 1,2,3; prints ids, and needs no tokenizer")
    settings = {"max_new_tokens": 128, "temperature": 0.8, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
    for name, value in (settings | {"num_samples": 1}).items():
        add("--" + name.replace("_", "-"), type=type(value), default=value, metavar="N", help="default: %(default)s")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text")
    add("--stop", default="", metavar="TEXT", help="end before this text")
    add("--chat", action="store_true", help="hold a conversation: each line of stdin is a turn, after --prompt")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: as stored")
    add("--device", choices=("auto", "cpu", "cuda")[: 2 + torch.cuda.is_available()], default="auto")
    add("--compile", action="store_true", help="compile the decoding step: 15 seconds first, then faster")
    add("--demo-dir", type=Path, default=cache / "openllama-demo", metavar="FOLDER", help="default: %(default)s")
    args = parser.parse_args(argv)
    expect(args.num_samples > 0, f"--num-samples {args.num_samples}: expected at least 1")
    args.sampling = {name: getattr(args, name) for name in [*settings, "compile"]}
    return args

def run(args: argparse.Namespace) -> None:
    log = partial(print, file=sys.stderr, flush=True)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    folder, start = args.checkpoint or demo_checkpoint(args.demo_dir), time.perf_counter()
    model = OpenLlamaForCausalLM.from_pretrained(folder, getattr(torch, args.dtype, None), device)
    generator, eos = torch.Generator(device), model.config.eos_token_id
    seed = generator.seed() if args.seed is None else generator.manual_seed(args.seed).initial_seed()
    log(f"{model.num_parameters():,} parameters loaded in {time.perf_counter() - start:.2f} s; seed {seed}")
    log("each line is a turn; Ctrl-D ends the conversation\n" * args.chat, end="")
    encode = lambda text, special=True: [int(number) for number in text.replace(",", " ").split()]
    decode = lambda ids: "".join(f"{number} " for number in ids)
    if args.prompt_ids is None:
        encode, decode = load_tokenizer(folder, model.config.bos_token_id)
    ends = [eos] if isinstance(eos, int) else eos or []
    def sample(prompt: list[int]) -> list[int]:
        """Print a continuation as it is made; return prompt and continuation."""
        ids, times = list(prompt), [time.perf_counter()]
        def new():
            inputs = torch.tensor([prompt], dtype=torch.long, device=device)
            for token in model.stream(inputs, do_sample=True, generator=generator, **args.sampling):
                ids.append(int(token))
                times.append(time.perf_counter())
                if ids[-1] not in ends:
                    yield ids[-1]
        for text in stream_text(decode, prompt, new(), args.stop):
            print(text, end="", flush=True)
        print(flush=True)
        steps = torch.tensor(times, dtype=torch.float64).diff()  # seconds: the prompt's, then each token's
        log(f"prefill {len(prompt) / steps[0]:.1f} tokens/s, decode {1 / steps[1:].median():.1f} tokens/s")
        with contextlib.suppress(ImportError):  # on Windows
            from resource import RUSAGE_SELF, getrusage
            peak = getrusage(RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
            log(f"peak memory {torch.cuda.max_memory_allocated() / 1e9 if device == 'cuda' else peak:.2f} GB")
        return ids
    prompt = args.prompt_ids or args.prompt or ("" if args.checkpoint or args.chat else "Beautiful is better")
    prompt = args.prompt_file.read_text("utf-8") if args.prompt_file else sys.stdin.read() if prompt == "-" else prompt
    for _ in range(0 if args.chat else args.num_samples):
        sample(encode(prompt.removesuffix("\n")))  # which echo and editors append
    ids = []  # user:{prompt}\nsystem:{answer}</s>, turn after turn
    while args.chat and (line := prompt or sys.stdin.readline()):
        ids = sample(ids + encode(f"user:{line.rstrip()}\nsystem:", False))
        ids, prompt = ids if ids[-1] in ends else ids + ends[:1], ""

def main(argv: list[str] | None = None) -> int:
    """Exit status: 0; 2 after an error, told in one line on stderr; 130 after Ctrl-C; 141 where nobody reads stdout."""
    try:
        return run(parse_arguments(argv)) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        hint = ("- pip install", error.name) if isinstance(error, ImportError) else ()
        print("openllama.py: error:", *str(error).split(), *hint, file=sys.stderr)
        return 2

if __name__ == "__main__":
    sys.exit(main())
