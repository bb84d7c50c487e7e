# SPDX-License-Identifier: MIT
"""Promises of openllama.py, each kept by a test: the model equals its equations, written once more in numpy, and
transformers 4.31.0 (where that is installed; else those tests are skipped); what is said of its use holds.

    python -m pytest -q
"""

import contextlib
import copy
import functools
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import openllama
from openllama import KVCache, OpenLlamaConfig, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification, OpenLlamaModel

HERE = Path(__file__).parent
torch.set_num_threads(1)  # in models this small, threads cost more than they give

V, MAX = 50, 16  # vocabulary, max_position_embeddings
LENGTHS = {"none": (24, 24), "left": (24, 9), "right": (24, 9), "both": (24, 9)}  # real tokens of the two rows
ROPES = {"plain": None, "linear": {"type": "linear", "factor": 2.0}, "dynamic": {"type": "dynamic", "factor": 2.0}}
HEADS = {
    "shared": {},
    "tied": {"shared_input_output_embedding": False, "tie_word_embeddings": True},
    "own": {"shared_input_output_embedding": False},
}
rope, head, padding, backend = (
    pytest.mark.parametrize(name, values)
    for name, values in {"rope": ROPES, "head": HEADS, "padding": LENGTHS, "efficient": (False, True)}.items()
)


def assert_close(ours, theirs, tolerance=1e-5):
    """Within 1e-5 of the largest value: float32 rounds by up to 6e-8 an operation, and a value of these tiny models
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
    """Two rows of ids (2, 24), and their attention_mask (None for no padding); what stands in the padding is noise."""
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
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() <= theirs.keys() and ours
    for name in ours:
        assert_close(ours[name], theirs[name])


def real_labels(ids, mask):
    """Labels whose loss comes from real positions only: a token behind padding counts for nothing."""
    if mask is None:
        return ids
    return ids.masked_fill((mask == 0) | (mask.roll(1, 1) == 0), -100)


def bfloat16_bound(layers):
    """bfloat16 rounds by up to 2**-9 an operation. A layer has some 12 of them in a row; their errors add up as a
    random walk of uniform steps, of which the largest among thousands of values is within 4 standard deviations."""
    return 4 * math.sqrt(12 * layers / 3) * 2**-9


def oracle(model, ids, past=None):
    """One row of ids through Open-Llama's equations in float64: logits, hidden states, attentions and past.

    past: per layer, the keys before rotation and the values of earlier steps, (H, S, D). All keys of an attention are
    turned by the base of the present length, so that dynamic scaling decodes step by step as a cache must.
    """
    w, c = {name: value.double().numpy() for name, value in model.state_dict().items()}, model.config
    H, D, S = c.num_attention_heads, c.hidden_size // c.num_attention_heads, len(ids)
    before = 0 if past is None else past[0][0].shape[1]
    S += before
    base, positions, scaling = c.rope_theta, np.arange(S, dtype=float), c.rope_scaling
    if scaling and scaling["type"] == "linear":
        positions = positions / scaling["factor"]
    if scaling and scaling["type"] == "dynamic" and S > c.max_position_embeddings:
        s = scaling["factor"]
        base = base * (s * S / c.max_position_embeddings - (s - 1)) ** (D / (D - 2))
    turns = np.exp(1j * positions[:, None] / base ** (np.arange(0, D, 2) / D))  # (S, D/2): a rotation is a product

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
        q, k, v = ((y @ w[f"{layer}self_attn.{p}_proj.weight"].T).reshape(-1, H, D).swapaxes(0, 1) for p in "qkv")
        if past is not None:
            k, v = np.concatenate((past[n][0], k), axis=1), np.concatenate((past[n][1], v), axis=1)
        present.append((k, v))
        scores = turn(q, turns[before:]) @ turn(k, turns).swapaxes(1, 2) / math.sqrt(D)  # (H, T, S)
        weights = np.exp(scores) * visible
        weights /= weights.sum(-1, keepdims=True)
        attentions.append(weights)
        x = x + (weights @ v).swapaxes(0, 1).reshape(x.shape) @ w[layer + "self_attn.o_proj.weight"].T
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
    settings = HEADS[head] | {"use_stable_embedding": stable, "use_memory_efficient_attention": efficient}
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
    model, (ids, _) = tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=efficient), batch("none")
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
    for end in range(size, 24, size):  # a step's last token has seen all there was, in the base of all there was
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
    assert torch.equal(model.generate(ids[:, :5], max_new_tokens=12), fresh.generate(ids[:, :5], max_new_tokens=12))


@rope
@backend
@pytest.mark.parametrize("padding", ("left", "right", "both"))
@torch.no_grad()
def test_padding_changes_nothing(rope, efficient, padding):
    """A row alone is the same row in a padded batch: in a forward, and decoded on through a cache, past MAX."""
    model = tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=efficient)
    ids, mask = batch(padding)
    new = torch.randint(1, V, (2, 10), generator=torch.Generator().manual_seed(2))
    together, grown = [model(ids, mask)], mask
    for n, chunk in enumerate(new.split((1, 1, 3, 5), dim=1)):
        grown = torch.cat((grown, torch.ones_like(chunk)), dim=1)
        told = grown if n % 2 else None  # the cache knows the padding; the whole mask may be given too
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
        assert alone[0, -12:].unique().numel() > 1  # not the same token over and over, which would tell little
        assert torch.equal(together[row, 24:], alone[0, -12:])


@backend
@pytest.mark.parametrize("again", (True, False))
@torch.no_grad()
def test_positions_that_were_given_are_kept(efficient, again):
    """Also those of cached tokens, which dynamic scaling turns anew: as short as this, it is no scaling."""
    ids, first, logits = batch("none")[0][:, :8], torch.tensor([[0, 2, 4, 6, 8], [3, 4, 5, 6, 7]]), []
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
    eager, (ids, mask) = tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=False).train(), batch(padding)
    efficient = copy.deepcopy(eager)
    efficient.config.use_memory_efficient_attention = True
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    ours, theirs = (model(ids, mask, labels=real_labels(ids, mask)) for model in (efficient, eager))
    assert_close(ours.logits[real], theirs.logits[real])
    assert_close(ours.loss, theirs.loss)
    assert_same_gradients(gradients(efficient, ours.loss), gradients(eager, theirs.loss))


@pytest.fixture
def xformers_calls(monkeypatch):
    """Replace xformers' CUDA kernels by a plain computation with the mask that a bias materializes; list the calls."""
    xformers = pytest.importorskip("xformers.ops")
    calls = []

    def plain(query, key, value, attn_bias=None, p=0.0):
        (B, M, H, K), N = query.shape, key.shape[1]
        calls.append((attn_bias, query.shape, key.shape))
        scores = torch.einsum("bmhk,bnhk->bhmn", query.float(), key.float()) / math.sqrt(K)
        weights = (scores + attn_bias.materialize((B, H, M, N), device=query.device)).softmax(-1)
        return torch.einsum("bhmn,bnhk->bmhk", torch.dropout(weights, p, True), value.float()).to(query.dtype)

    monkeypatch.setattr(xformers, "memory_efficient_attention", plain)
    return calls


@pytest.mark.parametrize("padding, T", [("none", 1), ("none", 5), *((padding, 24) for padding in LENGTHS)])
def test_xformers_is_given_what_makes_it_eager_attention(padding, T, xformers_calls):
    """Layout, bias and packing, in float32. Fewer queries than keys means a cache; with padding, that is for SDPA."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask, LowerTriangularFromBottomRightMask

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
    for x, y in zip(*(torch.autograd.grad(out[seen], (q, k, v), up) for out in (ours, theirs)), strict=True):
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
    """What the first of two layers returns, before any norm, for many copies of a row of 5: (copies, 5, C)."""
    ids, _ = batch("none")
    with torch.no_grad():
        return model(ids[:1, :5].expand(copies, 5), output_hidden_states=True).hidden_states[1].double()


@backend
def test_attention_dropout_drops_weights_and_keeps_their_mean(efficient):
    model, p, N = tiny(attention_dropout_prob=0.3, use_memory_efficient_attention=efficient), 0.3, 4000
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()  # so that what is returned is linear in the attention's weights
        layer.self_attn.o_proj.weight.data = torch.eye(32)
    plain = drawn(model)
    assert torch.equal(plain[0], plain[1])  # none in evaluation
    torch.manual_seed(4)
    draws = drawn(model.train())
    deviation = draws.std(0)
    assert deviation.min() > 0
    # a mean of N draws lies within 5 standard errors, but for 6e-7 of the cases; here are 160 of them
    assert ((draws.mean(0) - plain[0]).abs() <= 5 * deviation / math.sqrt(N)).all()
    embedding = model(batch("none")[0][:1, :1], output_hidden_states=True).hidden_states[0][0, 0]
    added = (draws[:, 0] - embedding).view(N, 4, 8)  # the first token sees itself alone: all of its value, or nothing
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
    model, (ids, mask) = tiny(use_memory_efficient_attention=efficient, **dropouts).train(), batch("left")
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
    """Forwards through a cache, and a cache cut out as tuples, have the gradients of one forward."""
    model, (ids, _) = tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=efficient).train(), batch("none")
    ids, up = ids[:, :12], torch.randn(2, 5, V, generator=torch.Generator().manual_seed(6))
    expected = gradients(model, (model(ids).logits[:, 7:] * up).sum())
    cache = model(ids[:, :7]).past_key_values
    stepped = torch.cat([model(x, past_key_values=cache).logits for x in ids[:, 7:].split((3, 1, 1), dim=1)], dim=1)
    assert_same_gradients(gradients(model, (stepped * up).sum()), expected)
    past = tuple((k, v) for k, v in model(ids[:, :7]).past_key_values)
    leaves = tuple(tuple(x.detach().requires_grad_() for x in pair) for pair in past)
    second = model(ids[:, 7:], past_key_values=leaves).logits
    model.zero_grad()
    (second * up).sum().backward()
    torch.autograd.backward([x for pair in past for x in pair], [x.grad for pair in leaves for x in pair])
    assert_same_gradients({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


@backend
@pytest.mark.parametrize("training", (False, True))
def test_attentions_are_returned_by_every_backend(efficient, training):
    settings = {"use_memory_efficient_attention": efficient, "attention_dropout_prob": 0.2 * training}
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
    for value, name in zip(values, ("loss", "logits", "past_key_values", "hidden_states", "attentions"), strict=True):
        assert type(value) is type(getattr(out, name))
        assert out[name] is getattr(out, name)
    assert torch.equal(values[0], out.loss) and torch.equal(values[1], out.logits)
    assert out[0] is out.loss and out[-1] is out.attentions and out[1:3] == (out.logits, out.past_key_values)
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
            assert_close(torch.cat([out.logits for out in stepped], dim=1), model(ids[:, :12]).logits[:, 7:])
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


# ------------------------------------------------------------------------------------------------------ configuration


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
        ("pad_token_id", 100000, "pad_token_id=100000: expected None or an id below vocab_size=100000"),
        ("pad_token_id", -1, "pad_token_id=-1"),
        ("hidden_act", "sillu", "hidden_act='sillu'.*silu"),
        ("problem_type", "guessing", "problem_type='guessing'"),
        ("rope_scaling", "linear", "rope_scaling='linear'"),
        ("rope_scaling", {"type": "yarn", "factor": 2.0}, "rope_scaling=.*yarn.*expected type linear or dynamic"),
        ("rope_scaling", {"type": "linear", "factor": 1.0}, "rope_scaling=.*factor > 1"),
        ("rope_scaling", {"type": "linear", "factor": "2"}, "rope_scaling=.*factor > 1"),
        ("rope_scaling", {"type": "linear"}, "rope_scaling=.*factor > 1"),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "beta_fast": 32}, "rope_scaling=.*beta_fast"),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value, message):
    with pytest.raises(ValueError, match=message):
        OpenLlamaConfig(**{field: value})


@pytest.mark.parametrize(
    ("written", "field", "value"),
    [
        ({"use_memorry_efficient_attention": False}, "use_memory_efficient_attention", False),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling", {"type": "linear", "factor": 2.0}),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "rope_scaling", {"type": "dynamic", "factor": 4.0}),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}}, "rope_theta", 5e5),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0, "factor": 2.0}}, "rope_scaling",
         {"type": "linear", "factor": 2.0}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_scaling", None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta", 5e5),
        ({"id2label": {"0": "bad", "1": "fair", "2": "good"}}, "num_labels", 3),
        ({"model_type": "open_llama", "eos_token_id": [2, 3]}, "eos_token_id", [2, 3]),
    ],
)  # fmt: skip
def test_every_spelling_of_a_setting_is_read(written, field, value):
    assert getattr(OpenLlamaConfig.from_dict(written), field) == value


def test_what_does_not_change_the_model_is_ignored():
    library = {"architectures": ["X"], "transformers_version": "5.0", "torch_dtype": "float16", "dtype": "float16"}
    off = {"attention_bias": False, "mlp_bias": None, "pruned_heads": {}, "_name_or_path": "x"}
    so_anyway = {"num_key_value_heads": 32, "head_dim": 128}
    assert OpenLlamaConfig.from_dict(library | off | so_anyway) == OpenLlamaConfig()


@pytest.mark.parametrize(
    "changed",
    [{"attention_bias": True}, {"num_key_value_heads": 8}, {"head_dim": 64}, {"sliding_window": 4096},
     {"quantization_config": {"bits": 4}}, {"model_type": "llama"}, {"rope_scaling": {"type": "yarn", "factor": 2.0}}],
)  # fmt: skip
def test_what_would_change_the_model_is_refused(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        OpenLlamaConfig.from_dict(changed)


def test_a_config_survives_its_file(tmp_path):
    config = OpenLlamaConfig(
        rope_scaling={"type": "linear", "factor": 2}, num_labels=7, eos_token_id=[2, 5], rope_theta=7
    )
    config.save_pretrained(tmp_path / "new")
    assert OpenLlamaConfig.from_pretrained(tmp_path / "new") == config
    assert OpenLlamaConfig.from_dict(config.to_dict()) == config
    assert os.listdir(tmp_path / "new") == ["config.json"]


def test_the_activation_may_be_a_function(tmp_path):
    model, same = tiny(hidden_act=torch.nn.functional.silu), tiny()
    ids = batch("none")[0]
    assert torch.equal(model(ids).logits, same(ids).logits)
    assert not torch.allclose(tiny(hidden_act=torch.sin)(ids).logits, same(ids).logits)
    with pytest.raises(ValueError, match="hidden_act"):
        model.config.save_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------- initialisation and sizes


@pytest.mark.parametrize("stable", [False, True])
def test_weights_are_initialised_as_documented(stable):
    torch.manual_seed(0)
    sizes = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    switches = {"use_stable_embedding": stable, "shared_input_output_embedding": False, "pad_token_id": 3}
    model = OpenLlamaForCausalLM(OpenLlamaConfig(num_attention_heads=4, initializer_range=0.05, **sizes, **switches))
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.full_like(weight, float(not name.endswith("bias"))))
        else:  # the deviation of n normal draws is off by 1 / sqrt(2 n): 0.3% here, so 2% is 6 times that
            std = (2 / 2256) ** 0.5 if stable and "embed_tokens" in name else 0.05
            assert abs(weight.std().item() / std - 1) < 0.02, name
            assert abs(weight.mean().item()) < 0.02 * std
    assert not model.model.embed_tokens.weight[3].any()
    assert model.num_parameters() == 2 * 2000 * 256 + 4 * 256**2 + 3 * 256 * 512 + 3 * 256 + 2 * 256 * stable


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
    after.loss.backward()
    if size > V:
        assert embedding.weight[V:].std() > 0
        assert model(torch.full((1, 2), size - 1)).logits.isfinite().all()
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"size={wrong}"):
            model.resize_token_embeddings(wrong)


# -------------------------------------------------------------------------------------------------------- checkpoints


def shard(folder, parts=3):
    """Split model.safetensors of a folder into shards and an index."""
    from safetensors.torch import load_file, save_file

    weights, weight_map = load_file(folder / "model.safetensors"), {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        chosen = {name: weights[name] for name in sorted(weights)[part::parts]}
        save_file(chosen, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", [OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification])
def test_a_checkpoint_survives_its_files(tmp_path, kind, shards):
    model = tiny(kind, shared_input_output_embedding=False, use_stable_embedding=kind is OpenLlamaModel)
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
    assert classifier(ids).logits.isfinite().all() and classifier.score.weight.std() > 0
    classifier.save_pretrained(tmp_path / "classifier")
    assert torch.equal(OpenLlamaModel.from_pretrained(tmp_path / "classifier")(ids)[0], model.model(ids)[0])
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
    assert torch.equal(OpenLlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_all_that_is_wrong_with_the_weights_is_told_at_once(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.extra.weight"] = weights.pop("model.layers.1.mlp.up_proj.weight")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
    for name in ("model.extra.weight", "layers.1.mlp.up_proj.weight", "norm.weight", "7", "config.json"):
        assert name in str(error.value)


def test_loading_maps_the_file_and_copies_nothing(tmp_path):
    model = tiny(vocab_size=200_000, hidden_size=64)  # 51 MB of embedding
    model.save_pretrained(tmp_path)
    code = f"""if True:
        import resource, safetensors.torch
        from openllama import OpenLlamaForCausalLM
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = peak()
        model = OpenLlamaForCausalLM.from_pretrained({str(tmp_path)!r})
        print(peak() - before)"""
    grown = int(
        subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True).stdout
    )
    assert grown < 25_000  # KB; half the embedding


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


BROKEN = {
    "truncated": "model.safetensors", "garbage": "model.safetensors", "no weights": "model.safetensors",
    "config not json": "config.json is not JSON", "config a list": "config.json holds a list",
    "no checkpoint": "config.json", "missing shard": "model-00002-of-00003", "shard outside": "../model-00001",
    "index without weights": "does not fit its config.json",
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_refused_by_name(tmp_path, how, capsys):
    broken_checkpoint(tmp_path, how)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(BROKEN[how])):
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
    assert openllama.main(["--checkpoint", str(tmp_path), "--prompt-ids", "5"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and BROKEN[how] in err and err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------ bad input


def call(model, **arguments):
    return lambda: model(**{"input_ids": torch.ones(2, 3, dtype=torch.long), **arguments})


MODEL, CLASSIFIER_MODEL = tiny(), tiny(OpenLlamaForSequenceClassification, num_labels=3)
IDS = torch.ones(2, 3, dtype=torch.long)
CACHE = MODEL(IDS).past_key_values
BAD_INPUT = {
    "id too high": (call(MODEL, input_ids=torch.tensor([[1, V]])), f"input_ids from 1 to {V}: expected 0 to {V - 1}"),
    "id negative": (call(MODEL, input_ids=torch.tensor([[1, -1]])), "input_ids from -1"),
    "ids not integers": (call(MODEL, input_ids=torch.ones(1, 2)), "input_ids of type torch.float32"),
    "ids of one dimension": (call(MODEL, input_ids=torch.ones(3, dtype=torch.long)), r"expected \(B, T"),
    "empty ids": (call(MODEL, input_ids=torch.ones(2, 0, dtype=torch.long)), "not empty"),
    "neither": (call(MODEL, input_ids=None), "one of input_ids and inputs_embeds"),
    "both": (call(MODEL, inputs_embeds=torch.ones(2, 3, 32)), "one of input_ids and inputs_embeds"),
    "embeddings too wide": (call(MODEL, input_ids=None, inputs_embeds=torch.ones(2, 3, 33)), "33"),
    "mask too short": (call(MODEL, attention_mask=torch.ones(2, 2)), r"attention_mask of shape \(2, 2\): expected \(2, 3\)"),
    "mask without the cache": (call(MODEL, attention_mask=IDS, past_key_values=CACHE), r"expected \(2, 6\)"),
    "mask of four dimensions": (call(MODEL, attention_mask=torch.ones(2, 1, 3, 3)), "attention_mask of shape"),
    "positions of another length": (call(MODEL, position_ids=torch.arange(4)[None]), "position_ids of shape"),
    "labels of another shape": (call(MODEL, labels=IDS[:, 1:]), r"labels of shape \(2, 2\): expected \(2, 3\)"),
    "label too high": (call(MODEL, labels=IDS * V), f"labels from {V}"),
    "class too high": (call(CLASSIFIER_MODEL, labels=torch.tensor([0, 3])), "labels from 0 to 3"),
    "cache of another batch": (call(MODEL, input_ids=IDS[:1], past_key_values=CACHE), "past_key_values of shape"),
    "cache of another model": (call(tiny(num_attention_heads=2), past_key_values=CACHE), "past_key_values of shape"),
    "cache of too few layers": (call(MODEL, past_key_values=tuple(CACHE)[:1]), "past_key_values: 1 layers, expected 2"),
    "cache of unlike layers": (
        call(MODEL, past_key_values=((CACHE[0]), tuple(x[:, :, :1] for x in CACHE[1]))), "past_key_values of shapes"),
    "classifier without a pad id": (
        call(tiny(OpenLlamaForSequenceClassification, pad_token_id=None)), "pad_token_id=None"),
    "prompt of no tokens": (lambda: MODEL.generate(IDS[:, :0]), "empty prompt"),
    "prompt of padding": (lambda: MODEL.generate(IDS, torch.tensor([[1, 1, 1], [0, 0, 0]])), "empty prompt"),
    "prompt id too high": (lambda: MODEL.generate(IDS * V), "input_ids from"),
    "prompt's mask too long": (lambda: MODEL.generate(IDS, torch.ones(2, 4)), "attention_mask of shape"),
    "max_new_tokens 0": (lambda: MODEL.generate(IDS, max_new_tokens=0), "max_new_tokens=0"),
    "max_new_tokens negative": (lambda: MODEL.generate(IDS, max_new_tokens=-1), "max_new_tokens=-1"),
    "max_length no longer than the prompt": (lambda: MODEL.generate(IDS, max_length=3), "max_length=3"),
    "temperature negative": (lambda: MODEL.generate(IDS, temperature=-0.1), "temperature=-0.1"),
    "top_k negative": (lambda: MODEL.generate(IDS, top_k=-1), "top_k=-1"),
    "top_p 0": (lambda: MODEL.generate(IDS, top_p=0.0), "top_p=0.0"),
    "top_p above 1": (lambda: MODEL.generate(IDS, top_p=1.1), "top_p=1.1"),
    "repetition_penalty 0": (lambda: MODEL.generate(IDS, repetition_penalty=0.0), "repetition_penalty=0.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_by_name(case):
    run, message = BAD_INPUT[case]
    with pytest.raises(ValueError, match=message):
        run()


# ------------------------------------------------------------------------------------------------------------- sampling


def test_greedy_generation_takes_the_likeliest_token_each_time():
    model, (ids, _) = tiny(), batch("none")
    generated = model.generate(ids[:, :5], max_new_tokens=8, eos_token_id=None)
    for length in range(5, 13):
        assert torch.equal(model(generated[:, :length]).logits[:, -1].argmax(-1), generated[:, length])
    assert torch.equal(
        torch.stack(list(model.stream(ids[:, :5], max_new_tokens=8, eos_token_id=None)), 1), generated[:, 5:]
    )
    assert torch.equal(model.generate(ids[:, :5], max_length=13, eos_token_id=None), generated)
    assert torch.equal(
        model.generate(ids[:, :5], do_sample=True, temperature=0, max_length=13, eos_token_id=None), generated
    )
    assert model.generate(ids[:, :5], eos_token_id=None).shape == (2, MAX)


def test_a_row_ends_with_its_eos_and_goes_on_as_padding():
    model, (ids, _) = tiny(), batch("none")
    free = model.generate(ids[:, :5], max_new_tokens=10, eos_token_id=None)
    new = free[:, 5:].tolist()
    stops = next(token for token in new[0] if token not in new[1])  # ends the first row only
    at = new[0].index(stops)
    ended = model.generate(ids[:, :5], max_new_tokens=10, eos_token_id=stops, pad_token_id=7)
    assert ended[0, 5:].tolist() == new[0][: at + 1] + [7] * (9 - at) and torch.equal(ended[1], free[1])
    both = model.generate(ids[:, :5], max_new_tokens=10, eos_token_id=[stops, new[1][0]])
    assert both.shape[1] == 5 + at + 1  # and no longer than the last row needs
    model.config.eos_token_id, model.config.pad_token_id = stops, None
    assert model.generate(ids[:1, :5], max_new_tokens=10)[0, 5:].tolist() == new[0][: at + 1]
    assert model.generate(ids[:, :5], max_new_tokens=10)[0, 5:].tolist() == new[0][: at + 1] + [stops] * (9 - at)


def test_draws_follow_the_filtered_distribution():
    """2,000 draws of one token: each frequency is within 5 standard deviations of what softmax says of those that stay."""
    model, (ids, _) = tiny(), batch("none")
    prompt, rows = ids[:1, :5], 2000
    scores = model(prompt).logits[0, -1].double() / 0.7
    kept = scores.topk(5)
    probabilities = torch.zeros(V, dtype=torch.double)
    probabilities[kept.indices] = kept.values.softmax(0)
    settings = {"max_new_tokens": 1, "do_sample": True, "temperature": 0.7, "top_k": 5}
    draw = lambda seed: model.generate(
        prompt.expand(rows, -1), generator=torch.Generator().manual_seed(seed), **settings
    )[:, -1]  # fmt: skip
    frequencies = draw(0).bincount(minlength=V) / rows
    assert (
        (frequencies - probabilities).abs() <= 5 * (probabilities * (1 - probabilities) / rows).sqrt() + 1e-12
    ).all()
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize(
    ("scores", "top_k", "top_p", "stay"),
    [
        ([1.0, 3.0, 2.0, 2.0, 0.0], 2, None, [1, 2, 3]),  # ties with the k-th stay
        ([1.0, 3.0, 2.0], 10, None, [0, 1, 2]),
        ([1.0, 3.0, 2.0], 0, None, [0, 1, 2]),
        ([math.log(0.5), math.log(0.3), math.log(0.2)], None, 0.6, [0, 1]),  # the token that crosses p stays
        ([math.log(0.5), math.log(0.3), math.log(0.2)], None, 0.01, [0]),  # at least one stays
        ([math.log(0.5), math.log(0.3), math.log(0.2)], None, 1.0, [0, 1, 2]),
        ([math.log(0.5), math.log(0.3), math.log(0.2)], 2, 0.6, [0]),  # the mass is that of what top_k left: 5/8
    ],
)
def test_filters_keep_their_boundary_cases(scores, top_k, top_p, stay):
    filtered = openllama.filter_scores(torch.tensor([scores]), top_k, top_p)
    assert filtered[0].isfinite().nonzero().flatten().tolist() == stay


def test_a_repetition_penalty_counts_each_token_once_and_no_padding():
    model, (ids, _) = tiny(), batch("none")
    prompt = torch.cat((ids[:1, :5], ids[:1, :5]), 1)
    scores = model(prompt).logits[0, -1]
    for token in set(prompt[0].tolist()):
        scores[token] = scores[token] * 5 if scores[token] < 0 else scores[token] / 5
    assert model.generate(prompt, max_new_tokens=1, repetition_penalty=5.0)[0, -1] == scores.argmax()


def test_generation_is_not_disturbed_by_training_settings():
    model, (ids, _) = tiny(), batch("none")
    expected = model.generate(ids, max_new_tokens=4, eos_token_id=None)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(ids, max_new_tokens=4, eos_token_id=None), expected)
    model.config.return_dict, model.config.output_attentions, model.config.use_cache = False, True, False
    assert torch.equal(model.generate(ids, max_new_tokens=4, eos_token_id=None), expected)


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's folder, trained once for all tests."""
    folder = tmp_path_factory.mktemp("cache") / "demo"
    with contextlib.redirect_stderr(io.StringIO()) as progress:
        openllama.demo_checkpoint(folder)
    assert "step 500/500" in progress.getvalue()
    return folder


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
        [sys.executable, "openllama.py", *map(str, arguments)], cwd=HERE, text=True, encoding="utf-8",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


@pytest.mark.parametrize("line", [2, 3, 10, 13, 18])
def test_the_demo_recites_on_from_the_beginning_of_a_line(demo, zen, capsys, line):
    prompt = zen.split("\n")[line][:14]
    out, err = sample("--demo-dir", demo, "--prompt", prompt, "--temperature", 0, capsys=capsys)
    assert len(out) > 100 and prompt + out[:100] in zen  # one prompt begins two lines, so either may follow
    for statistic in ("loaded in", "prefill", "decode", "tokens/s", "peak memory", "seed"):
        assert statistic in err


def test_the_demo_is_an_ordinary_small_checkpoint(demo, capsys):
    model = OpenLlamaForCausalLM.from_pretrained(demo)
    assert model.num_parameters() < 1e6
    given = sample("--checkpoint", demo, "--prompt", "Now is", "--seed", 5, capsys=capsys)
    assert given.out == sample("--demo-dir", demo, "--prompt", "Now is", "--seed", 5, capsys=capsys).out


def test_the_same_seed_gives_the_same_text(demo, capsys):
    texts = [sample("--demo-dir", demo, "--temperature", 2, "--seed", seed, capsys=capsys).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    several = sample("--demo-dir", demo, "--temperature", 2, "--seed", 1, "--num-samples", 2, capsys=capsys).out
    assert several.startswith(texts[0]) and len(several) > len(texts[0])


def test_prompts_come_from_arguments_files_and_stdin(demo, capsys, monkeypatch, tmp_path):
    settings = ("--demo-dir", demo, "--temperature", 0)
    expected = sample(*settings, "--prompt", "Errors should", capsys=capsys).out
    (tmp_path / "prompt").write_text("Errors should")
    assert sample(*settings, "--prompt-file", tmp_path / "prompt", capsys=capsys).out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("Errors should"))
    assert sample(*settings, "--prompt", "-", capsys=capsys).out == expected
    ids = ",".join(str(byte + 3) for byte in b"Errors should")
    printed = sample(*settings, "--prompt-ids", ids, capsys=capsys).out.split()
    assert bytes(int(number) - 3 for number in printed).decode() == expected.rstrip("\n")


def test_text_ends_before_the_stop_text(demo, zen, capsys):
    whole = sample("--demo-dir", demo, "--prompt", "Errors should", "--temperature", 0, capsys=capsys).out
    for stop in ("silently", "\n", " ", "s"):
        cut = sample("--demo-dir", demo, "--prompt", "Errors should", "--temperature", 0, "--stop", stop, capsys=capsys)
        assert cut.out == whole[: whole.index(stop)] + "\n"


def test_chat_follows_the_format_of_the_instruct_models(demo, monkeypatch, capsys):
    prompts = []

    def stream(model, input_ids, **settings):
        prompts.append(bytes(i - 3 if i > 2 else 0 for i in input_ids[0].tolist()))
        yield from torch.tensor([*b"ok"])[:, None] + 3
        if len(prompts) == 1:
            yield torch.tensor([1])  # the demo's eos

    monkeypatch.setattr(OpenLlamaForCausalLM, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("second\nthird\n"))
    assert sample("--demo-dir", demo, "--chat", "--prompt", "first", capsys=capsys).out == "ok\n" * 3
    turns = [b"user:first\nsystem:", b"ok\0user:second\nsystem:", b"ok\0user:third\nsystem:"]
    assert prompts == [b"".join(turns[: n + 1]) for n in range(3)]


def test_characters_are_printed_whole_and_spaces_kept():
    text = "naïve 你好  🙂🙃 end"
    decode = lambda ids: bytes(ids).decode(errors="replace").lstrip(" ")  # drops a leading space, as sentencepiece does
    prompt, rest = list(b"A"), list(f" {text}".encode())
    pieces = list(openllama.stream_text(decode, prompt, rest, ""))
    assert "".join(pieces) == " " + text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert pieces.index("你") < pieces.index("🙂")  # each as soon as it is whole
    broken = list(openllama.stream_text(decode, prompt, rest[:-6], ""))  # ends inside a character
    assert "".join(broken).startswith(" naïve 你好  🙂")


@pytest.mark.parametrize("stop", ["ab", "aab", "b\n", "zz"])
def test_nothing_of_a_stop_text_is_ever_printed(stop):
    text = "aaab\nb aab\n"
    decode = lambda ids: "".join(map(chr, ids))
    pieces = list(openllama.stream_text(decode, [], map(ord, text), stop))
    assert "".join(pieces) == text.split(stop)[0]


def test_tokenizers_are_named_where_they_are_missing(tmp_path, monkeypatch, capsys):
    tiny().save_pretrained(tmp_path)
    run = lambda: (openllama.main(["--checkpoint", str(tmp_path), "--prompt", "x"]), capsys.readouterr().err)
    status, err = run()
    assert status == 2 and "tokenizer.model" in err and "--prompt-ids" in err
    for file, package in (("tokenizer.json", "tokenizers"), ("tokenizer.model", "sentencepiece")):
        (tmp_path / file).touch()
        monkeypatch.setitem(sys.modules, package, None)
        status, err = run()
        assert status == 2 and f"pip install {package}" in err and err.count("\n") == 2  # the first line: loaded


def test_sentencepiece_and_tokenizers_give_the_text_back(tmp_path, capsys, zen):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([zen], tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    model.save(str(tmp_path / "tokenizer.json"))
    check_tokenizer(tmp_path, None)


def test_sentencepiece_gives_the_text_back(tmp_path, zen):
    sentencepiece = pytest.importorskip("sentencepiece")
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(zen.split("\n")), model_writer=stream, vocab_size=400, byte_fallback=True,
        model_type="bpe", normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(stream.getvalue())
    encode = check_tokenizer(tmp_path, 1)
    assert encode("Now") == [1, *encode("Now", False)]
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert openllama.load_tokenizer(tmp_path, 1)[0]("Now") == encode("Now", False)


def check_tokenizer(folder, bos):
    encode, decode = openllama.load_tokenizer(folder, bos)
    text = "Simple is 你好 🙂 better  than"
    ids = encode(text, False)
    assert decode(ids) == text
    for cut in range(1, len(ids)):
        prompt, rest = ids[:cut], ids[cut:]
        if not decode(prompt).endswith("\N{REPLACEMENT CHARACTER}"):
            assert decode(prompt) + "".join(openllama.stream_text(decode, prompt, rest, "")) == text
    return encode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "many"], "--top-k"),
        (["--no-such-option"], "--no-such-option"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "abacus"], "--device"),
        (["--top-p", "1.5"], "top_p=1.5"),
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--max-new-tokens", "0"], "max_new_tokens=0"),
        (["--prompt", ""], ""),
        (["--prompt-ids", "1,x"], "x"),
        (["--prompt-ids", "100000"], "100000"),
        (["--prompt-file", "/no/such/file"], "/no/such/file"),
        (["--checkpoint", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_one_line(demo, capsys, arguments, message):
    expected = 0 if arguments == ["--prompt", ""] else 2
    assert openllama.main(["--demo-dir", str(demo), *arguments]) == expected
    err = capsys.readouterr().err
    if expected:
        lines = [line for line in err.splitlines() if "loaded in" not in line]
        assert len(lines) == 1 and message in lines[0] and lines[0].startswith("openllama.py: error:")


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


ALONE = """
import torch
from openllama import OpenLlamaConfig, OpenLlamaForCausalLM
sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
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
        [sys.executable, "-S", "-W", "ignore", "-c", ALONE], cwd=tmp_path, capture_output=True, text=True,
        check=False, env=os.environ | {"PYTHONPATH": "site"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_example_of_the_readme_runs(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(HERE)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "checkpoint")) == ["config.json", "model.safetensors"]


def test_importing_is_quiet_and_brings_in_torch_alone():
    code = "import torch, sys; before = set(sys.modules); import openllama; print(set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert done.stderr == "" and not re.search("xformers|safetensors|transformers|sympy", done.stdout)


# ----------------------------------------------------------------------------------- against transformers 4.31.0


@pytest.fixture(scope="session")
def hf():
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ != "4.31.0":
        pytest.skip(f"the reference is transformers 4.31.0, not {transformers.__version__}")
    from transformers.models.open_llama import modeling_open_llama

    modeling_open_llama.xops = None  # else its training mode needs CUDA wherever xformers is installed
    transformers.logging.set_verbosity_error()
    return transformers


def reference(hf, ours, **settings):
    """The reference model with our settings and weights: a new one, as its rotary embedding keeps the longest input."""
    settings = {key: value for key, value in ours.config.to_dict().items() if key != "model_type"} | settings
    theirs = getattr(hf, type(ours).__name__)(hf.OpenLlamaConfig(**settings))
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    tied = {"lm_head.weight"} if ours.config.tie_word_embeddings else set()
    assert not unexpected and all("rotary_emb.inv_freq" in name for name in set(missing) - tied)
    for parameter in theirs.parameters():  # not the rotary buffers: in bfloat16, positions would be lost
        parameter.data = parameter.data.to(next(ours.parameters()).dtype)
    return theirs.train(ours.training)


def counted(mask):
    """Position ids as the reference's `generate` makes them, which its forward does not."""
    return None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)


def reference_rows(hf, ours, inputs, mask, **arguments):
    """The reference's output on a batch, as (row, real, (logits, hidden states, attentions) of the row's real tokens).

    Each row is run alone under dynamic scaling: in a padded batch the reference takes its base from the padded length.
    """
    [(name, inputs)] = inputs.items()
    arguments |= {"output_hidden_states": True, "output_attentions": True}
    alone = ours.config.rope_scaling == ROPES["dynamic"]
    if not alone:
        out = reference(hf, ours)(**{name: inputs}, attention_mask=mask, position_ids=counted(mask), **arguments)
    for row in range(len(inputs)):
        real = torch.ones(inputs.shape[1], dtype=torch.bool) if mask is None else mask[row].bool()
        if alone:
            out = reference(hf, ours)(**{name: inputs[row : row + 1, real]}, **arguments)
        at, kept = (0, slice(None)) if alone else (row, real)
        hidden = [x[at, kept] for x in out.hidden_states]
        yield row, real, (out.logits[at, kept], hidden, [x[at][:, kept][:, :, kept] for x in out.attentions])


@rope
@head
@padding
@backend
@pytest.mark.parametrize("stable", (False, True))
@pytest.mark.parametrize("embedded", (False, True))
@pytest.mark.parametrize("length", (MAX - 1, 24))
@torch.no_grad()
def test_forward_equals_the_reference(hf, rope, head, padding, efficient, stable, embedded, length):
    settings = HEADS[head] | {"use_stable_embedding": stable, "use_memory_efficient_attention": efficient}
    ours, (ids, mask) = tiny(rope_scaling=ROPES[rope], **settings), batch(padding)
    kept = slice((24 - length) * {"none": 0, "right": 0, "both": 4, "left": 9}[padding] // 9, None)
    ids, mask = (x if x is None else x[:, kept][:, :length] for x in (ids, mask))
    inputs = {"input_ids": ids}
    if embedded:
        inputs = {"inputs_embeds": torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(2))}
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
    """Loss and gradients; the reference's memory-efficient training ignores padding, so that it runs without."""
    settings = HEADS[head] | {"use_stable_embedding": stable, "use_memory_efficient_attention": efficient}
    ours, (ids, mask) = tiny(rope_scaling=ROPES[rope], **settings).train(), batch(padding)
    labels = real_labels(ids, mask)
    batches = [(ids, mask, labels)]
    if rope == "dynamic" and mask is not None:  # each row alone, as in reference_rows
        batches = [(ids[n : n + 1, real], None, labels[n : n + 1, real]) for n, real in enumerate(mask.bool())]
    total, loss, theirs = (labels[:, 1:] != -100).sum(), 0, {}
    for part, part_mask, part_labels in batches:
        model = reference(hf, ours, use_memory_efficient_attention=False)
        out = model(part, attention_mask=part_mask, position_ids=counted(part_mask), labels=part_labels)
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
    ours, (ids, mask) = tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=efficient), batch(padding)
    if rope == "dynamic":  # beyond that the reference mixes keys of different bases
        ids, mask = (x if x is None else torch.cat((x[:, :3], x[:, -3:]), dim=1) for x in (ids, mask))
    theirs = reference(hf, ours)
    out = ours(ids, mask)
    expected = theirs(ids, attention_mask=mask, position_ids=counted(mask))
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert_close(out.logits[real], expected.logits[real])
    new = torch.randint(1, V, (2, 10), generator=torch.Generator().manual_seed(2))
    for chunk in new.split((1, 1, 3, 5), dim=1):
        mask = None if mask is None else torch.cat((mask, torch.ones_like(chunk)), dim=1)
        positions = None if mask is None else counted(mask)[:, -chunk.shape[1] :]
        swapped = expected.past_key_values if rope != "dynamic" else out.past_key_values  # ours keeps unturned keys
        tupled = ours(chunk, mask, past_key_values=swapped).logits if rope != "dynamic" else None
        out = ours(chunk, mask, past_key_values=out.past_key_values)
        arguments = {"attention_mask": mask, "position_ids": positions}
        expected = theirs(chunk, past_key_values=expected.past_key_values, **arguments)
        assert_close(out.logits, expected.logits)
        if tupled is not None:
            assert_close(tupled, expected.logits)
    length = expected.past_key_values[0][0].shape[2]
    real = torch.ones(2, length).bool() if mask is None else mask.bool()
    for (k, v), (their_k, their_v) in zip(out.past_key_values, expected.past_key_values, strict=True):
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
    settings = {"num_labels": num_labels, "problem_type": problem, "use_memory_efficient_attention": efficient}
    ours, (ids, mask) = tiny(OpenLlamaForSequenceClassification, **settings).train(), batch("right")
    ids = ids * mask  # where the mask is 0, the pad id
    inputs = {"input_ids": ids, "attention_mask": mask if told == "by mask" else None}
    if told == "embedded":
        inputs = {"inputs_embeds": torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(2))}
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
    new = MAX - 6 if rope == "dynamic" else 20  # beyond it the reference mixes keys of different bases
    free = ours.generate(ids, mask, max_new_tokens=new, eos_token_id=None)
    for eos, pad in ((None, 0), (int(free[0, 7]), 0), (int(free[1, 9]), 5), ([int(free[0, 8]), int(free[2, 7])], 0)):
        arguments = {"max_new_tokens": new, "eos_token_id": eos, "pad_token_id": pad}
        out = ours.generate(ids, mask, **arguments)
        arguments["eos_token_id"] = NEVER if eos is None else eos
        assert torch.equal(out, reference(hf, ours).generate(ids, attention_mask=mask, **arguments))
    out = ours.generate(ids[:1], max_length=16, repetition_penalty=1.7)
    assert torch.equal(out, reference(hf, ours).generate(ids[:1], max_length=16, repetition_penalty=1.7))


def test_sampling_with_the_same_seed_equals_the_reference(hf):
    ours, ids = tiny(**HEADS["own"]), batch("none")[0][:, :6]
    filters = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
    drawn = []
    for model in (ours, reference(hf, ours)):
        torch.manual_seed(7)
        drawn.append(model.generate(ids, do_sample=True, max_new_tokens=20, eos_token_id=NEVER, **filters))
    assert torch.equal(*drawn)


SCORES = torch.tensor(  # with ties, negative scores, and rows of which the sums reach exactly 1/2 and 3/4
    [[2.0, 1.0, 1.0, 1.0, 0.0, -1.0, -1.0, -3.0], [4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0, 4.0]]
    + [[0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625, 0.0078125, 0.0078125]]
)
SCORES[2].log_()
FILTERS = [*itertools.product((1.0, 1.8, 0.6), (1.0, 0.5, 2.0), (None, 1, 2, 3, 50), (None, 0.5))]
FILTERS += [(1.0, 1.0, None, p) for p in (1e-6, 0.25, 0.4999, 0.5001, 0.75, 0.875, 0.99, 0.9999999, 1.0)]


@pytest.mark.parametrize("penalty, temperature, top_k, top_p", FILTERS)
def test_sampling_filters_equal_the_reference(hf, monkeypatch, penalty, temperature, top_k, top_p):
    """What is drawn from, for given scores: a final norm that picks a column of lm_head returns just those."""
    model = tiny(vocab_size=8, hidden_size=32, **HEADS["own"])
    model.lm_head.weight.data[:, :3] = SCORES.T
    model.model.norm.forward = lambda x: torch.eye(3, 32)[:, None].expand(3, x.shape[1], 32)
    seen = []
    real = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda p, *args, **more: seen.append(p) or real(p, *args, **more))
    prompt = torch.tensor([[1, 5, 1], [2, 2, 2], [0, 7, 3]])
    filters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty}
    out = model.generate(prompt, do_sample=True, max_new_tokens=2, eos_token_id=None, **filters)
    steps = [hf.RepetitionPenaltyLogitsProcessor(penalty), hf.TemperatureLogitsWarper(temperature)]
    steps += [hf.TopKLogitsWarper(top_k)] if top_k else []
    steps += [hf.TopPLogitsWarper(top_p)] if top_p else []
    assert len(seen) == 2
    for n, probabilities in enumerate(seen):
        expected = functools.reduce(lambda scores, step, n=n: step(out[:, : 3 + n], scores), steps, SCORES.clone())
        assert torch.equal(probabilities, expected.softmax(-1))


LM, BARE, CLASSIFIER = OpenLlamaForCausalLM, OpenLlamaModel, OpenLlamaForSequenceClassification
PAIRS = [(LM, LM), (LM, BARE), (LM, CLASSIFIER), (CLASSIFIER, CLASSIFIER), (CLASSIFIER, BARE), (BARE, BARE)]


@pytest.mark.parametrize("saved, loaded", PAIRS)
@pytest.mark.parametrize("shards", (False, True))
@head
@torch.no_grad()
def test_checkpoints_of_the_reference_load_here(hf, tmp_path, saved, loaded, shards, head):
    settings = HEADS[head] | {"rope_scaling": ROPES["linear"], "num_labels": 3}
    theirs, (ids, _) = reference(hf, tiny(saved, **settings)), batch("none")
    theirs.save_pretrained(tmp_path, safe_serialization=True, max_shard_size="20KB" if shards else "1GB")
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
    ours, (ids, _) = tiny(saved, rope_scaling=ROPES["dynamic"], num_labels=3, **HEADS[head]), batch("none")
    ours.save_pretrained(tmp_path)
    theirs, loading = getattr(hf, loaded.__name__).from_pretrained(tmp_path, output_loading_info=True)
    heads = {"lm_head.weight", "score.weight"}
    assert not loading["mismatched_keys"] and set(loading["unexpected_keys"]) <= heads
    assert all("inv_freq" in name or name in heads for name in loading["missing_keys"])
    assert_close(getattr(ours, "model", ours)(ids)[0], theirs.base_model(ids)[0])
    if saved is loaded:
        assert_close(ours(ids)[0], theirs(ids)[0])


def test_configs_of_the_reference_are_read_whole(hf):
    assert OpenLlamaConfig.from_dict(hf.OpenLlamaConfig().to_dict()) == OpenLlamaConfig()
    changed = {"vocab_size": 68762, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    changed |= {"num_attention_heads": 8, "hidden_act": "gelu", "max_position_embeddings": 4096}
    changed |= {"initializer_range": 0.01, "rms_norm_eps": 1e-5, "use_cache": False, "pad_token_id": 32000}
    changed |= {"bos_token_id": 3, "eos_token_id": 4, "tie_word_embeddings": True, "hidden_dropout_prob": 0.2}
    changed |= {"attention_dropout_prob": 0.3, "use_memory_efficient_attention": False, "use_stable_embedding": False}
    changed |= {"shared_input_output_embedding": False, "rope_scaling": {"type": "dynamic", "factor": 2.5}}
    changed |= {"num_labels": 5, "problem_type": "regression", "output_hidden_states": True}
    ours, theirs = OpenLlamaConfig(**changed), hf.OpenLlamaConfig(**changed)
    assert OpenLlamaConfig.from_dict(theirs.to_dict()) == ours
    back = hf.OpenLlamaConfig.from_dict(ours.to_dict())
    assert {key: getattr(back, key) for key in changed} == changed


def test_defaults_are_those_of_the_reference(hf):
    theirs = hf.OpenLlamaConfig()
    for key, value in vars(OpenLlamaConfig()).items():
        if hasattr(theirs, key):
            assert value == getattr(theirs, key), key
