"""sample.py: the engine against a plain loop without a cache, the sampler against explicit
distributions, the filter of new prompts, rows, the chat."""

import io
import json
import os
import random
import re
import runpy
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_net
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from model import ModelConfig, UserError, load, save
from sample import (
    DecodeStep,
    KeyValues,
    Scheduler,
    common_prefix,
    generate,
    generate_stream,
    load_for_sampling,
    prefill,
    print_response,
    propose,
    read_jsonl,
    respond,
    rouge_l,
    run_command,
    sample_from_cdf,
    sample_token,
    sampling_settings,
    too_similar,
    top_p_filter,
    uniforms,
    why_unfit,
    words,
)

VOCABULARY = 97
SHAPES = {
    "grouped": {"heads": 4, "kv_heads": 2},
    "multi-head, tied": {"heads": 4, "kv_heads": 4, "tie_embeddings": True},
    "one key head": {"heads": 4, "kv_heads": 1},
}


@pytest.fixture(scope="module")
def nets():
    """Random models of all kinds of attention."""
    base = ModelConfig(vocab_size=VOCABULARY, dim=32, layers=2, ffn=48, max_len=256)
    models = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        models[name] = random_net(replace(base, **shape), seed).eval()
    return models


@pytest.fixture(scope="module")
def prompt_lists(tok):
    """Ragged prompts: with a common beginning, without one, one a prefix of another, two equal,
    a single token."""
    common = tok.chat("Where does the otter live?")
    tails = ("The", "The otter lives in", "rivers and", "x", "")
    alone = [tok.encode("fox is red"), [tok.bos], tok.chat("Compare the bear with the seal.")]
    return {
        "common": [common + tok.encode(tail) for tail in tails],
        "none": [*alone, [tok.bos, 7]],
        "nested": [common[:3], common[:3], common, common[:5] + common],
    }


@contextmanager
def shapes_read(net):
    """The shapes (texts, tokens) of what goes through the model meanwhile."""
    shapes = []
    hook = net.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    try:
        yield shapes
    finally:
        hook.remove()


def num_read(shapes) -> int:
    return sum(rows * length for rows, length in shapes)


def random_ids(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(VOCABULARY) for _ in range(length)]


def with_common_prefix(rng, count: int) -> list[list[int]]:
    """Prompts of different lengths that begin alike."""
    prefix = random_ids(rng, 20)
    return [prefix + random_ids(rng, rng.randint(1, 30)) for _ in range(count)]


def keys_of(prompts) -> list[tuple]:
    return [(i,) for i in range(len(prompts))]


def sample_one(net, prompt, key, **settings) -> list[int]:
    """A single sample of a single prompt."""
    samples = generate(net, [prompt], [key], **settings)
    return samples[0][0]


def plain_loop(net, prompt, u, *, stop, temperature, top_p):
    """The slow truth: one text, the whole model anew for every token, nothing remembered."""
    ids = []
    for number in u.split(1):
        with torch.no_grad():
            logits = net(torch.tensor([prompt + ids]))[:, -1]
        ids.append(sample_token(logits, number, temperature, top_p).item())
        if ids[-1] in stop:
            break
    return ids


def one_by_one(net, prompts, keys, *, n, max_new, **settings):
    """What `generate` should return, by the plain loop."""
    samples = []
    for prompt, key in zip(prompts, keys, strict=True):
        numbers = [uniforms((*key, k), max_new) for k in range(n)]
        samples.append([plain_loop(net, prompt, u, **settings) for u in numbers])
    return samples


def lengths_of(samples) -> Counter:
    return Counter(len(ids) for id_lists in samples for ids in id_lists)


# ---- the engine and the plain loop -----------------------------------------------------------

WAYS_TO_DRAW = [(0, 0.9), (1.0, 1.0), (0.7, 0.9)]  # temperature, top-p


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("prefix_length", [0, 5, 24], ids=["no prefix", "short", "held once"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_batched_decoding_equals_the_plain_loop(nets, shape, prefix_length, n):
    """Over ragged random prompts and stop tokens; a batch holds fewer prompts than there are, all
    of them, or more."""
    net = nets[shape]
    rng = random.Random(f"{shape} {prefix_length} {n}")
    lengths = Counter()
    for temperature, top_p in WAYS_TO_DRAW:
        prefix = random_ids(rng, prefix_length)
        count = rng.randint(3, 6)
        prompts = [prefix + random_ids(rng, rng.choice([1, 2, 7, 30])) for _ in range(count)]
        prompts.append(prompts[0])
        keys = [(shape, i) for i in range(len(prompts))]
        settings = {"temperature": temperature, "top_p": top_p, "n": n}
        settings["stop"] = rng.sample(range(VOCABULARY), 20)
        settings["max_new"] = rng.choice([6, 11])
        expected = one_by_one(net, prompts, keys, **settings)
        for batch in (1, 2 * n, len(prompts) * n, 1000):
            assert generate(net, prompts, keys, batch=batch, **settings) == expected
        lengths += lengths_of(expected)
    assert len(lengths) > 3, "samples should end at different steps"


@pytest.mark.parametrize("temperature, top_p", [(0, 0.9), (0.9, 0.95)])
@pytest.mark.parametrize("kind", ["common", "none", "nested"])
def test_order_batch_and_company_of_prompts_change_nothing(
    net, tok, prompt_lists, kind, temperature, top_p
):
    rng = random.Random(0)
    prompts = prompt_lists[kind]
    keys = [("k", i) for i in range(len(prompts))]
    settings = {"temperature": temperature, "top_p": top_p, "n": 3, "max_new": 12}
    settings["stop"] = rng.sample(range(tok.size), 20)
    expected = one_by_one(net, prompts, keys, **settings)
    for batch in (1, 3, 4, 6, 256):
        order = rng.sample(range(len(prompts)), len(prompts))
        ordered_prompts = [prompts[i] for i in order]
        ordered_keys = [keys[i] for i in order]
        samples = generate(net, ordered_prompts, ordered_keys, batch=batch, **settings)
        assert samples == [expected[i] for i in order]
    for prompt, key, id_lists in zip(prompts, keys, expected, strict=True):
        assert generate(net, [prompt], [key], **settings) == [id_lists]


@pytest.mark.parametrize("n", [1, 3])
def test_every_logit_is_that_of_a_forward_pass_over_the_whole_text(nets, n):
    """Not only the tokens that are drawn from them; groups are exchanged on the way."""
    net = nets["grouped"]
    rng = random.Random(n)
    prompts = with_common_prefix(rng, 7)
    texts = [list(prompt) for prompt in prompts for _ in range(n)]
    keys = keys_of(prompts)
    num_compared = 0
    with torch.no_grad():
        scheduler = Scheduler(net, prompts, keys, n, 10, 3 * n, int)
        for numbers, tokens in scheduler.run(list(range(15)), 1.0, 1.0):
            logits = scheduler.logits[list(scheduler.live)]
            whole = [net(torch.tensor([texts[number]]))[0, -1] for number in numbers]
            torch.testing.assert_close(logits, torch.stack(whole), atol=1e-4, rtol=0)
            num_compared += len(whole)
            for number, token in zip(numbers, tokens, strict=True):
                texts[number].append(token)
    num_prompt_tokens = n * sum(map(len, prompts))
    assert num_compared == sum(map(len, texts)) - num_prompt_tokens


class OnGpu(torch.Tensor):
    """Calls itself a tensor on a GPU, so that the engine goes its other way."""

    is_cuda = property(lambda self: True)


@pytest.fixture
def on_gpu(monkeypatch):
    """The engine goes its way on a GPU; the numbers of steps between two looks at the tokens."""
    plain_prefill = prefill
    plain_decode = sample.decode
    plain_steps = Scheduler.sample_steps
    steps = []

    def prefill_there(*args):
        context, logits = plain_prefill(*args)
        return context, logits.as_subclass(OnGpu)

    def count_steps(scheduler, *args):
        tokens = plain_steps(scheduler, *args)
        steps.append(len(tokens))
        return tokens

    monkeypatch.setattr(sample, "prefill", prefill_there)
    monkeypatch.setattr(sample, "decode", lambda *a: plain_decode(*a).as_subclass(OnGpu))
    monkeypatch.setattr(sample, "can_compile", lambda device: False)
    monkeypatch.setattr(Scheduler, "sample_steps", count_steps)
    return steps


def test_an_answer_that_ends_between_two_looks_is_printed(net, tok, on_gpu, capsys):
    for seed in range(8):
        settings = {"max_new": 30, "temperature": 1.5, "top_p": 1.0}
        text = print_response(net, tok, ["What is it?"], (seed,), **settings)
        assert capsys.readouterr().out == text + "\n"
    assert len(on_gpu) >= 8


@pytest.mark.parametrize("n", [1, 3])
def test_several_steps_between_two_looks_at_the_tokens_change_nothing(nets, n, request):
    """As on a GPU, whose tokens must be waited for: samples go on behind their end unseen."""
    net = nets["grouped"]
    rng = random.Random(n)
    prompts = with_common_prefix(rng, 9)
    keys = keys_of(prompts)
    settings = {"n": n, "max_new": 21, "stop": list(range(6)), "temperature": 1.0, "top_p": 0.9}
    expected = one_by_one(net, prompts, keys, **settings)
    steps = request.getfixturevalue("on_gpu")
    for batch in (2 * n, 4 * n, 100):
        assert generate(net, prompts, keys, batch=batch, **settings) == expected
    assert max(steps) == sample.STEPS_PER_SYNC > min(steps)


class NoLook(TorchDispatchMode):
    """Refuses what makes a program wait for a GPU: to look at a number, or to count."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert func not in (aten._local_scalar_dense.default, aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n", [1, 3])
def test_a_decode_step_looks_at_no_number(nets, n):
    net = nets["grouped"]
    prompts = [[1, *range(20), 30 + i] for i in range(5)]
    with torch.no_grad():
        scheduler = Scheduler(net, prompts, keys_of(prompts), n, 10, 64, int)
        next(scheduler.run([], 1.0, 1.0))
        with NoLook():
            for _ in range(3):
                scheduler.decode()
        with pytest.raises(AssertionError), NoLook():
            scheduler.logits.max().item()


@pytest.fixture
def compiled(monkeypatch):
    """Steps are traced as a whole as by torch.compile, but not compiled; the list of graphs."""
    graphs = []
    plain_compile = torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def trace(function, dynamic=None, mode=None):
        return plain_compile(function, fullgraph=True, dynamic=dynamic, backend=backend)

    monkeypatch.setattr(torch, "compile", trace)
    monkeypatch.setattr(sample, "can_compile", lambda device: True)
    sample.compiled_decode.cache_clear()
    yield graphs
    sample.compiled_decode.cache_clear()


@pytest.mark.parametrize("n", [1, 3])
def test_compiled_steps_change_nothing_and_are_compiled_once_a_width(nets, n, compiled):
    net = nets["grouped"]
    rng = random.Random(n)
    prompts = with_common_prefix(rng, 7)
    keys = keys_of(prompts)
    settings = {"n": n, "max_new": 120, "stop": list(range(6)), "temperature": 1.0, "top_p": 0.9}
    expected = generate(net, prompts, keys, batch=3 * n, **settings)
    assert not compiled, "a CPU compiles only what it is told to"
    assert generate(net, prompts, keys, batch=3 * n, compile=True, **settings) == expected
    widths = 2 if n == 1 and max(lengths_of(expected)) > 100 else 1
    assert len(compiled) <= widths
    num_graphs = len(compiled)
    generate(net, prompts, keys, batch=3 * n, compile=True, **settings)
    assert len(compiled) == num_graphs > 0, "the same shapes are not compiled again"


def test_steps_are_compiled_for_as_many_widths_as_there_are(nets, compiled, monkeypatch):
    """By itself PyTorch goes on eagerly behind eight."""
    monkeypatch.setattr(sample, "COMPILED_WIDTH", 2)
    net = nets["grouped"]
    lengths = [110, 60, 30, 14, 7, 3]
    prompts = [[5 + i] * length for i, length in enumerate(lengths)]
    settings = {"stop": [], "max_new": 9, "n": 2, "batch": 2}
    expected = generate(net, prompts, keys_of(prompts), **settings)
    assert generate(net, prompts, keys_of(prompts), compile=True, **settings) == expected
    own_widths = 3  # 2, 4 and 8; behind the ninth token no step follows
    assert len(compiled) == own_widths * len(lengths) > 8


def test_a_compiled_step_writes_only_to_what_stays_where_it_is(nets, compiled):
    """Else torch.compile makes no CUDA graph of it and tells nobody. (The mark that it goes by has
    no public name.)"""
    net = nets["grouped"]
    prompts = with_common_prefix(random.Random(0), 4)
    settings = {"stop": [], "max_new": 4, "compile": True}
    generate(net, prompts, keys_of(prompts), n=3, **settings)
    inputs = [node for node in compiled[0].graph.nodes if node.op == "placeholder"]
    moving = [i for i in inputs if not i.meta["tensor_dict"].get("_dynamo_static_input_type")]
    keys = [i for i in inputs if i not in moving and "_modules_k_param" in i.name]
    assert len(keys) == 3 * net.cfg.layers, "own tokens, prompts and prefix"
    shapes = [i.meta["example_value"].shape for i in moving]
    assert shapes == [(12,)], "the newest tokens"


def test_where_torch_compile_fails_steps_are_as_they_were(net, monkeypatch, recwarn):
    def fail(*_, **__):
        raise RuntimeError("no compiler found\nand more")

    prompts = [[1, 5 + i] for i in range(3)]
    settings = {"stop": [], "max_new": 4, "temperature": 0}
    expected = generate(net, prompts, keys_of(prompts), **settings)
    monkeypatch.setattr(torch, "compile", fail)
    sample.can_compile.cache_clear()
    for _ in range(2):
        assert generate(net, prompts, keys_of(prompts), compile=True, **settings) == expected
    sample.can_compile.cache_clear()
    (warning,) = recwarn.list
    assert str(warning.message).endswith("torch.compile fails: no compiler found")


def test_only_products_of_the_engine_may_be_rounded_and_none_is(net, monkeypatch):
    """fp32 products go to oneDNN under a permission to round, which it does not use here."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    monkeypatch.setattr(sample, "onednn_keeps_fp32", lambda: True)
    with sample.decode_by_onednn(15):
        assert matmul.fp32_precision == before, "too few rows"
    with sample.decode_by_onednn(16):
        assert matmul.fp32_precision == "bf16"
    prompts = [[1, 5 + i] for i in range(20)]
    for _ in generate_stream(net, prompts, keys_of(prompts), stop=[], max_new=3):
        assert matmul.fp32_precision == before, "not for its consumer"


def transformers_twin(net, tok, folder):
    """transformers' Llama with the same weights, by way of our model folder."""
    from transformers import AutoModelForCausalLM

    save(net, tok, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("shape", ["grouped", "multi-head, tied"])
def test_greedy_samples_are_those_of_transformers(cfg, tok, prompt_lists, shape, tmp_path):
    net = random_net(replace(cfg, **SHAPES[shape])).eval()
    twin = transformers_twin(net, tok, tmp_path / "net")
    stop = random.Random(0).sample(range(tok.size), 30)
    lengths = Counter()
    for prompts in prompt_lists.values():
        keys = keys_of(prompts)
        samples = generate(net, prompts, keys, stop=stop, max_new=15, temperature=0)
        for prompt, (ids,) in zip(prompts, samples, strict=True):
            tokens = torch.tensor([prompt])
            settings = {"do_sample": False, "max_new_tokens": 15, "pad_token_id": 0}
            mask = torch.ones_like(tokens)
            text = twin.generate(tokens, attention_mask=mask, eos_token_id=stop, **settings)[0]
            assert prompt + ids == text.tolist()
        lengths += lengths_of(samples)
    assert lengths[15] and len(lengths) > 1, "some should end early and some not"


def test_greedy_decoding_of_real_weights_gives_the_known_text(shared):
    net, tok = load(shared / "stories260K" / "hf")
    greedy = json.loads((shared / "stories260K" / "greedy.json").read_text())
    max_new = len(greedy["ids"]) - 1
    net.eval()
    ids = sample_one(net, [tok.bos], (0,), stop=[tok.eos], max_new=max_new, temperature=0)
    assert [tok.bos, *ids] == greedy["ids"]
    assert tok.decode(ids) == greedy["text"]
    prompts = [greedy["ids"][:length] for length in (1, 40, 5, 200, 90)]
    keys = keys_of(prompts)
    samples = generate(net, prompts, keys, stop=[], max_new=20, n=2, temperature=0, batch=6)
    for prompt, id_lists in zip(prompts, samples, strict=True):
        expected = greedy["ids"][len(prompt) : len(prompt) + 20]
        assert id_lists == [expected, expected]


def test_the_samples_of_a_prompt_differ_and_do_not_depend_on_how_many_are_drawn(net, prompt_lists):
    prompts = prompt_lists["common"][:2]
    keys = [(0,), (1,)]
    settings = {"stop": [], "max_new": 10, "temperature": 1.0, "top_p": 1.0}
    four = generate(net, prompts, keys, n=4, **settings)
    for id_lists in four:
        assert len({tuple(ids) for ids in id_lists}) == 4
    assert generate(net, prompts, keys, n=1, **settings) == [ids[:1] for ids in four]
    shorter = generate(net, prompts, keys, n=4, **settings | {"max_new": 4})
    assert shorter == [[ids[:4] for ids in id_lists] for id_lists in four]
    with_another_key = generate(net, prompts, [(2,), (1,)], n=4, **settings)
    assert with_another_key[0] != four[0] and with_another_key[1] == four[1]


def test_samples_exclude_the_prompt_and_end_exactly_at_a_stop_token(net, prompt_lists):
    prompts = prompt_lists["nested"] * 8
    keys = keys_of(prompts)
    settings = {"stop": list(range(0, net.cfg.vocab_size, 9)), "max_new": 16, "n": 2}
    settings |= {"temperature": 1.0, "top_p": 1.0, "batch": 10}
    num_tokens = 0
    num_ended = 0

    def count(tokens, ended):
        nonlocal num_tokens, num_ended
        num_tokens += tokens
        num_ended += ended

    samples = generate(net, prompts, keys, callback=count, **settings)
    assert [len(id_lists) for id_lists in samples] == [2] * len(prompts)
    for ids in (ids for id_lists in samples for ids in id_lists):
        assert not set(ids[:-1]) & set(settings["stop"]), "nothing follows a stop token"
        assert len(ids) == 16 or 1 <= len(ids) < 16 and ids[-1] in settings["stop"]
    lengths = lengths_of(samples)
    assert lengths[16] and len(lengths) > 5, "both ways to end occur"
    assert num_tokens == sum(lengths.elements()) and num_ended == 2 * len(prompts)


def test_the_length_limit_may_coincide_with_a_stop_token(net):
    ids = sample_one(net, [1, 5], (0,), stop=[], max_new=3)
    assert len(set(ids)) == 3
    for length, last in enumerate(ids, 1):
        again = sample_one(net, [1, 5], (0,), stop=[last], max_new=length)
        assert again == ids[:length]


EDGES = {  # prompts, n, max_new
    "no prompt": ([], 1, 4),
    "one new token": ([[1, 5, 6], [1, 7]], 3, 1),
    "one new token of one sample": ([[1, 5, 6]], 1, 1),
    "a prompt of one token": ([[1]], 1, 6),
    "prompts of one token, several samples": ([[1], [2]], 3, 6),
    "a common prefix of everything": ([list(range(30))] * 4, 3, 6),
    "a common prefix of everything, one sample each": ([list(range(30))] * 4, 1, 6),
    "one prompt, several samples": ([list(range(30))], 3, 6),
    "one prompt, one sample": ([list(range(30))], 1, 6),
    "one prompt is the prefix": ([list(range(20)), list(range(21))], 2, 6),
    "up to the context": ([list(range(80)) * 3, [1]], 2, 16),
    "more keys than one step of widths": ([list(range(33)), list(range(5, 70))], 2, 40),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges_of_the_engine_equal_the_plain_loop(nets, edge):
    prompts, n, max_new = EDGES[edge]
    keys = [(edge, i) for i in range(len(prompts))]
    settings = {"n": n, "max_new": max_new, "stop": [], "temperature": 1.0, "top_p": 0.95}
    for net in nets.values():
        expected = one_by_one(net, prompts, keys, **settings)
        assert generate(net, prompts, keys, **settings) == expected


def test_sampling_keeps_no_graph_and_leaves_gradients_on_for_its_consumer(net, monkeypatch):
    def spy(logits, *args):
        assert not torch.is_grad_enabled() and not logits.requires_grad
        return sample_token(logits, *args)

    monkeypatch.setattr(sample, "sample_token", spy)
    steps = 0
    for _ in generate_stream(net, [[1, 5]], [(0,)], stop=[], max_new=3):
        assert torch.is_grad_enabled()
        steps += 1
    assert steps == 3 and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "setting",
    [
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": -0.5},
        {"top_p": float("nan")},
        {"temperature": -1},
        {"max_new": 0},
        {"n": 0},
    ],
)
def test_settings_out_of_range_are_refused(net, setting):
    with pytest.raises(UserError, match="needs a temperature of 0") as e:
        generate(net, [[1]], [(0,)], **{"stop": [], "max_new": 2} | setting)
    assert "\n" not in str(e.value)


def test_a_prompt_too_long_for_the_context_is_named(cfg):
    small = random_net(replace(cfg, max_len=16)).eval()
    keys = [(0,), (1,)]
    settings = {"stop": [], "max_new": 4}
    samples = generate(small, [[1] * 4, [1] * 12], keys, **settings)
    assert len(samples[1][0]) == 4, "it just fits"
    with pytest.raises(UserError, match=r"prompt 1 has 13 tokens.* 4 new.* 16"):
        generate(small, [[1] * 4, [1] * 13], keys, **settings)


# ---- attention over levels -------------------------------------------------------------------

HEAD_DIM = 8


def random_level(rows: int, kv_heads: int, lengths: list[int], capacity: int, dtype) -> KeyValues:
    """Row r holds lengths[r] random keys and values, with garbage behind them."""
    shape = (rows, kv_heads, capacity, HEAD_DIM)
    k = torch.randn(shape, dtype=dtype)
    v = torch.randn(shape, dtype=dtype)
    texts = SimpleNamespace(k=[k], v=[v], lengths=torch.tensor(lengths))
    level = KeyValues(texts, rows)
    level.fill(list(range(rows)), texts)
    return level


def attention_to_all(q, k, v):
    """One query over all its keys at once in fp64: (H, hd), (K, S, hd) -> (H, hd)."""
    group = len(q) // len(k)
    k = k.double().repeat_interleave(group, 0)  # (H, S, hd)
    v = v.double().repeat_interleave(group, 0)
    scores = k @ q.double()[:, :, None]  # (H, S, 1)
    weights = (scores / HEAD_DIM**0.5).softmax(1)
    return (weights * v).sum(1)


def visible(level: KeyValues, slot: int, num_slots: int):
    """The keys and the values of a level that a slot sees, (K, length, hd)."""
    row = slot * len(level.lengths) // num_slots
    length = level.lengths[row]
    return level.k[0][row, :, :, :length].mT, level.v[0][row, :, :length]


LEVELS = {  # rows of the levels behind the slots' own tokens
    "own": [],
    "own and prefix": [1],
    "own and prompts": [4],
    "own, prompts and prefix": [4, 1],
}


@pytest.mark.parametrize("scale", [1.0, 30.0], ids=["mild", "one key wins"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("levels", LEVELS)
def test_attention_over_levels_is_attention_over_all_keys_at_once(levels, kv_heads, dtype, scale):
    """12 slots, 3 to a prompt, 6 heads; all lengths differ; the new token is seen by itself."""
    torch.manual_seed(0)
    rng = random.Random(0)
    heads = 6
    slots = 12
    shared = []
    for rows in LEVELS[levels]:
        lengths = [rng.randint(1, 50) for _ in range(rows)]
        shared.append(random_level(rows, kv_heads, lengths, 50, dtype))
    lengths = [0, 39, *(rng.randint(0, 39) for _ in range(slots - 2))]
    own = random_level(slots, kv_heads, lengths, 40, dtype)
    own.lengths += 1  # the new token
    for level in (own, *shared):
        level.resize(int(level.lengths.max()) + 1)
    step = DecodeStep([own, *shared])
    q = (torch.randn(slots, heads, 1, HEAD_DIM) * scale).to(dtype)
    k = torch.randn(slots, kv_heads, 1, HEAD_DIM, dtype=dtype)
    v = torch.randn(slots, kv_heads, 1, HEAD_DIM, dtype=dtype)
    out = step.attend(0, q, k, v)

    assert out.shape == q.shape and out.dtype == dtype
    expected = []
    for slot in range(slots):
        per_level = [visible(level, slot, slots) for level in (*shared, own)]
        keys = torch.cat([level_keys for level_keys, _ in per_level], 1)
        values = torch.cat([level_values for _, level_values in per_level], 1)
        assert torch.equal(keys[:, -1], k[slot, :, 0])
        assert torch.equal(values[:, -1], v[slot, :, 0])
        expected.append(attention_to_all(q[slot, :, 0], keys, values))
        assert step.positions[slot] == keys.shape[1] - 1
    tolerance = {"atol": 2e-6 if scale == 1 else 5e-5, "rtol": 0}
    torch.testing.assert_close(out[:, :, 0].double(), torch.stack(expected), **tolerance)


def test_columns_behind_the_longest_row_change_nothing():
    torch.manual_seed(0)
    level = random_level(3, 2, [5, 30, 64], 100, torch.float32)
    q = torch.randn(6, 2, 2, HEAD_DIM)
    outputs = {}
    for width in (100, 64, 200):  # as they are, cut off, new ones of zeros
        level.resize(width)
        assert {k.shape[3] for k in level.k} == {v.shape[2] for v in level.v} == {width}
        outputs[width] = level.attend(0, q, level.mask())
    for out, lse in outputs.values():
        torch.testing.assert_close(out, outputs[200][0])
        torch.testing.assert_close(lse, outputs[200][1])


@pytest.mark.parametrize("prefix_length", [0, 1, 17])
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_read_side_by_side_give_the_logits_of_each_alone(nets, shape, prefix_length):
    net = nets[shape]
    rng = random.Random(0)
    ids = random_ids(rng, prefix_length)
    texts = [random_ids(rng, length) for length in (1, 9, 40, 9)]
    with torch.no_grad():
        prefix = None
        if ids:
            context, _ = prefill(net, [ids])
            prefix = KeyValues(context, 1)
            prefix.fill([0], context)
        context, logits = prefill(net, texts, prefix)
        alone = [net(torch.tensor([ids + text]))[0, -1] for text in texts]
    assert {t.shape[2] for t in context.k + context.v} == {40}, "the prefix is not kept again"
    torch.testing.assert_close(logits, torch.stack(alone), atol=1e-4, rtol=0)


# ---- slots -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
def test_idle_and_ended_slots_change_no_token_of_another(nets, n, monkeypatch):
    """Their tokens, keys and values are overwritten before each step; no logit is ever NaN."""
    net = nets["grouped"]
    rng = random.Random(n)
    prompts = [random_ids(rng, rng.randint(1, 30)) for _ in range(50)]
    keys = keys_of(prompts)
    settings = {"n": n, "max_new": 12, "stop": list(range(12)), "temperature": 1.0, "top_p": 0.9}
    batch = 20 * n
    expected = generate(net, prompts, keys, batch=batch, **settings)
    assert expected[:5] == one_by_one(net, prompts[:5], keys[:5], **settings)
    plain_decode = Scheduler.decode
    num_garbled = Counter()

    def decode_with_garbage(scheduler):
        ended = torch.tensor([slot not in scheduler.live for slot in range(len(scheduler.u))])
        random_tokens = torch.randint(VOCABULARY, ended.shape)
        scheduler.tokens = torch.where(ended, random_tokens, scheduler.tokens)
        levels = {"slots": (scheduler.own, ended)}
        if n > 1:
            levels["groups"] = (scheduler.prompt_level, ended.view(-1, n).all(1))
        for name, (level, rows) in levels.items():
            num_garbled[name] += int(rows.sum())
            for t in (*level.k, *level.v):
                t[rows] = 100 * torch.randn_like(t[rows])
        plain_decode(scheduler)
        assert scheduler.logits.isfinite().all()

    monkeypatch.setattr(Scheduler, "decode", decode_with_garbage)
    assert generate(net, prompts, keys, batch=batch, **settings) == expected
    assert min(num_garbled.values()) > 20


def test_a_freed_slot_goes_to_the_queue_at_once_and_no_more_than_batch_are_running(net, tok):
    prompts = [tok.chat(f"Number {i}") for i in range(40)]
    keys = keys_of(prompts)
    settings = {"stop": list(range(0, tok.size, 12)), "max_new": 24}
    sizes = []
    for numbers, _ in generate_stream(
        net, prompts, keys, temperature=1.0, top_p=1.0, batch=8, **settings
    ):
        assert len(set(numbers)) == len(numbers) <= 8
        sizes.append(len(numbers))
    busy = sizes[: len(sizes) - 24]  # the queue is empty in the last steps
    assert sum(busy) / len(busy) > 7, "most slots are in use while there is a queue"
    assert len(sizes) < sum(sizes) / 8 + 30


def script_lengths(monkeypatch, lengths: dict[tuple, int]):
    """Samples of these lengths by their keys: token 7 all along, and 2 at the end."""

    def numbers(key, count):
        u = torch.rand(count)
        u[lengths[key] - 1] = 2
        return u

    monkeypatch.setattr(sample, "uniforms", numbers)
    monkeypatch.setattr(sample, "sample_token", lambda logits, u, *_: torch.where(u == 2, 2, 7))


def test_many_groups_of_uneven_length_keep_few_slots_idle(net, monkeypatch):
    """A group waits for some others before prompts are read, and holds its place until its last
    sample has ended."""
    rng = random.Random(0)
    lengths = {(i, k): rng.randint(1, 40) for i in range(96) for k in range(2)}
    script_lengths(monkeypatch, lengths)
    prompts = [[1, 5 + i, 6] for i in range(96)]
    keys = keys_of(prompts)
    with shapes_read(net) as shapes:
        samples = generate(net, prompts, keys, n=2, stop=[2], max_new=40, batch=64)
    sizes = {(i, k): len(ids) for i, pair in enumerate(samples) for k, ids in enumerate(pair)}
    assert sizes == lengths
    rows_decoded = sum(rows for rows, length in shapes if length == 1)
    longer_of_pairs = [max(lengths[i, 0], lengths[i, 1]) for i in range(96)]
    until_both_end = 2 * sum(longer_of_pairs)
    assert rows_decoded < 1.25 * until_both_end


@pytest.mark.parametrize("n", [1, 3])
def test_groups_that_have_ended_are_dropped_when_no_prompt_waits(net, n, monkeypatch):
    lengths = {(i, k): 3 for i in range(16) for k in range(n)}
    lengths[5, n - 1] = 20
    script_lengths(monkeypatch, lengths)
    prompts = [[1, 5 + i, 6] for i in range(16)]
    keys = keys_of(prompts)
    with shapes_read(net) as shapes:
        samples = generate(net, prompts, keys, n=n, stop=[2], max_new=20)
    sizes = [len(id_lists[-1]) for id_lists in samples]
    assert sizes == [3] * 5 + [20] + [3] * 10
    rows_decoded = [rows for rows, length in shapes if length == 1]
    assert rows_decoded[1:] == [16 * n] * 3 + [n] * 16, "the first only shows what keys are like"


def test_the_longest_prompts_are_read_first(net):
    """So that what does not fit into memory fails at once."""
    prompts = [[1, *range(5, 5 + length)] for length in (3, 9, 1, 7)]
    keys = keys_of(prompts)
    numbers, _ = next(generate_stream(net, prompts, keys, stop=[], max_new=2, batch=2))
    assert sorted(numbers) == [1, 3]


def test_random_numbers_are_drawn_when_the_turn_of_a_prompt_comes(net, monkeypatch):
    keys_used = []

    def spy(key, count):
        keys_used.append(key)
        return uniforms(key, count)

    monkeypatch.setattr(sample, "uniforms", spy)
    prompts = [[1, 5 + i % 100] for i in range(20_000)]
    keys = keys_of(prompts)
    next(generate_stream(net, prompts, keys, stop=[], max_new=4, batch=8))
    assert len(keys_used) <= 16


def test_prompts_are_read_some_at_a_time(net, prompt_lists, monkeypatch):
    prompts = prompt_lists["none"] + prompt_lists["nested"]
    keys = keys_of(prompts)
    settings = {"stop": [2], "max_new": 6, "temperature": 0.8}
    expected = generate(net, prompts, keys, **settings)
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 12)
    with shapes_read(net) as shapes:
        assert generate(net, prompts, keys, **settings) == expected
    prompts_read = shapes[: shapes.index((len(prompts), 1))]  # then the first step of all
    assert all(rows * length <= 12 or rows == 1 for rows, length in prompts_read)
    assert max(rows for rows, _ in prompts_read) > 1


# ---- what prompts begin with -----------------------------------------------------------------


def test_what_all_prompts_begin_with_is_read_once(nets):
    net = nets["grouped"]
    rng = random.Random(0)
    prefix = random_ids(rng, 60)
    prompts = [[*prefix, i, i + 1] for i in range(20)]
    keys = keys_of(prompts)
    settings = {"stop": [], "n": 3, "temperature": 0, "top_p": 1.0}
    with shapes_read(net) as shapes:
        samples = generate(net, prompts, keys, max_new=1, **settings)
    assert num_read(shapes) == 60 + 20 * 2
    assert samples == one_by_one(net, prompts, keys, max_new=1, **settings)
    with shapes_read(net) as shapes:
        generate(net, prompts, keys, max_new=5, batch=12, **settings)
    assert num_read(shapes) == 60 + 20 * 2 + 4 * 60, "and a token a step of each sample"


def test_of_equal_prompts_all_but_the_last_token_is_read_once(nets):
    prompts = [list(range(40))] * 7
    keys = keys_of(prompts)
    with shapes_read(nets["grouped"]) as shapes:
        generate(nets["grouped"], prompts, keys, stop=[], max_new=1, n=2)
    assert num_read(shapes) == 39 + 7


@pytest.mark.parametrize(
    "length, n, count",
    [
        (sample.MIN_COMMON_PREFIX - 1, 1, 3),  # too short to be worth a level
        (40, 1, 1),  # a lone sample shares nothing
    ],
)
def test_a_prefix_that_saves_nothing_is_no_level(nets, length, n, count, monkeypatch):
    prompts = [[*range(length), 50 + i] for i in range(count)]
    keys = keys_of(prompts)
    lone_token = 1  # the shape of keys is learnt from it
    with shapes_read(nets["grouped"]) as shapes:
        generate(nets["grouped"], prompts, keys, stop=[], max_new=1, n=n)
    assert num_read(shapes) == count * (length + 1) + lone_token


def test_a_common_prefix_leaves_each_prompt_a_token_of_its_own():
    rng = random.Random(0)
    for _ in range(300):
        prompts = [[rng.randrange(2) for _ in range(rng.randint(1, 6))] for _ in range(3)]
        prefix = common_prefix(prompts)
        size = len(prefix)
        assert all(prompt[:size] == prefix and len(prompt) > size for prompt in prompts)
        beginnings = {tuple(prompt[: size + 1]) for prompt in prompts}
        shortest = min(map(len, prompts))
        assert len(beginnings) > 1 or size == shortest - 1, "no longer one would do"


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n, length", [(1, 40), (4, 3), (4, 40)])
def test_half_of_the_free_memory_bounds_the_samples_side_by_side(net, n, length, monkeypatch):
    prompts = [[5 + i] * length for i in range(9)]
    keys = keys_of(prompts)
    settings = {"stop": [], "max_new": 10, "n": n}
    expected = generate(net, prompts, keys, **settings)
    cfg = net.cfg
    token_bytes = 2 * cfg.layers * cfg.kv_heads * cfg.head_dim * 4  # keys and values in fp32
    widths = {3: 16, 10: 16, 40: 48, 50: 64}  # columns for so many tokens
    tokens = widths[50]
    if n == 4:  # a prompt is held once for its samples
        tokens = 4 * widths[10] + widths[length]
    room = 3 * tokens * token_bytes

    monkeypatch.setattr(sample, "free_memory", lambda device: 2 * room)
    message = "memory holds keys of 3 prompts, not of 9$"
    with pytest.warns(UserWarning, match=message):
        assert generate(net, prompts, keys, **settings) == expected
    with pytest.warns(UserWarning, match=message):
        sizes = [len(numbers) for numbers, _ in generate_stream(net, prompts, keys, **settings)]
    assert max(sizes) == 3 * n
    with torch.no_grad(), pytest.warns(UserWarning, match=message):
        scheduler = Scheduler(net, prompts, keys, n, 10, 256, int)
        held = []
        for _ in scheduler.run([], 1.0, 1.0):
            levels = {id(level): level for level in (scheduler.own, scheduler.prompt_level)}
            held.append(sum(t.nbytes for level in levels.values() for t in (*level.k, *level.v)))
    assert max(held) == room, "what is reckoned with is what is taken"

    monkeypatch.setattr(sample, "free_memory", lambda device: 2 * room - 2)
    with pytest.warns(UserWarning, match="memory holds keys of 2 prompts"):
        generate(net, prompts, keys, **settings)
    monkeypatch.setattr(sample, "free_memory", lambda device: 0)
    with pytest.warns(UserWarning, match="memory holds keys of 1 prompts"):
        assert generate(net, prompts, keys, **settings) == expected, "one group is always tried"


def test_no_more_memory_is_taken_than_prompts_need(net, recwarn, monkeypatch):
    prompts = [[1, 5 + i] for i in range(3)]
    keys = keys_of(prompts)
    token_bytes = 2 * net.cfg.layers * net.cfg.kv_heads * net.cfg.head_dim * 4
    monkeypatch.setattr(sample, "free_memory", lambda device: 2 * 3 * 16 * token_bytes)
    generate(net, prompts, keys, stop=[], max_new=4, batch=10**9)
    assert not recwarn.list


def test_processes_that_share_a_model_agree_on_the_number_of_groups(net):
    prompts = [[1, 5 + i] for i in range(9)]
    keys = keys_of(prompts)
    settings = {"stop": [], "max_new": 4, "n": 2}
    offers = []

    def agree(groups):
        offers.append(groups)
        return groups - 3

    steps = generate_stream(net, prompts, keys, agree=agree, batch=14, **settings)
    most = max(len(numbers) for numbers, _ in steps)
    assert most == 2 * (7 - 3) and offers == [7]
    samples = generate(net, prompts, keys, agree=lambda groups: 1, **settings)
    assert samples == generate(net, prompts, keys, **settings)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A folder whose proc/ and sys/ are taken for the system's; write(name, text) puts a file."""

    def path_inside(*parts):
        return Path(tmp_path, *(str(part).lstrip("/") for part in parts))

    def write(name, text):
        path = path_inside(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    monkeypatch.setattr(sample, "Path", path_inside)
    monkeypatch.setattr(os.path, "exists", lambda path: path_inside(path).exists())
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return write


CPU = torch.device("cpu")
MEMINFO = "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:   4000 kB\n"


def test_free_memory_is_that_of_the_system_and_processes_get_equal_parts(system, monkeypatch):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert sample.free_memory(CPU) == total, "where the system does not say"
    system("/proc/meminfo", MEMINFO)
    assert sample.free_memory(CPU) == 4000 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sample.free_memory(CPU) == 1000 * 1024


def test_the_real_system_has_some_free_memory():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < sample.free_memory(CPU) <= total


@pytest.mark.parametrize(
    "group, limit, usage",
    [
        ("0::/box", "/box/memory.max", "/box/memory.current"),
        (
            "4:memory:/box\n0::/",
            "/memory/box/memory.limit_in_bytes",
            "/memory/box/memory.usage_in_bytes",
        ),
    ],
    ids=["cgroup v2", "cgroup v1"],
)
def test_the_limit_of_a_container_counts(system, group, limit, usage):
    system("/proc/meminfo", MEMINFO)
    system("/proc/self/cgroup", f"{group}\n3:cpu:/elsewhere\n")
    assert sample.free_memory(CPU) == 4000 * 1024, "a group without a limit"
    system("/sys/fs/cgroup" + usage, f"{1000 * 1024}\n")
    for text, free in (("max", 4000), (1 << 62, 4000), (3000 * 1024, 2000), (900 * 1024, -100)):
        system("/sys/fs/cgroup" + limit, f"{text}\n")
        assert sample.free_memory(CPU) == free * 1024
    stat = "/sys/fs/cgroup" + limit.rpartition("/")[0] + "/memory.stat"
    system(stat, f"cache 9\ninactive_file {500 * 1024}\n")
    assert sample.free_memory(CPU) == 400 * 1024, "copies of files can go"


# ---- one token -------------------------------------------------------------------------------


def nucleus(logits, temperature: float, top_p: float) -> dict[int, float]:
    """The distribution that top-p sampling should have, in fp64: {id: probability}."""
    probs = (logits.double() / temperature).softmax(-1).tolist()
    mass = 0.0
    least = 0.0
    for p in sorted(probs, reverse=True):
        if mass >= top_p:
            break
        mass = mass + p
        least = p
    likely = {i: p for i, p in enumerate(probs) if p >= least}
    return {i: p / sum(likely.values()) for i, p in likely.items()}


def distribution(logits, temperature: float, top_p: float, grid: int = 20_001) -> dict[int, float]:
    """What sample_token draws from: the part of [0, 1) that leads to each id."""
    u = (torch.arange(grid) + 0.5) / grid
    ids = sample_token(logits.expand(grid, -1), u, temperature, top_p)
    return {i: count / grid for i, count in Counter(ids.tolist()).items()}


def shapes_of_logits() -> dict[str, torch.Tensor]:
    noise = torch.randn(300, generator=torch.Generator().manual_seed(0))
    peaked = torch.zeros(300)
    peaked[17] = 12.0
    return {
        "random": noise,
        "wide": 4 * noise,
        "peaked": peaked,
        "flat": 0.01 * noise,
        "low tail": torch.where(noise > 1, noise, -1e9),
    }


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", shapes_of_logits())
def test_tokens_are_drawn_from_the_explicit_nucleus(shape, top_p):
    logits = shapes_of_logits()[shape]
    for temperature in (0.7, 1.3):
        expected = nucleus(logits, temperature, top_p)
        measured = distribution(logits, temperature, top_p)
        assert measured.keys() <= expected.keys()
        assert all(abs(measured.get(i, 0) - p) < 1e-4 for i, p in expected.items())


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("vocabulary", [3, 100, 2000])
def test_top_p_keeps_what_an_explicit_search_keeps_and_leaves_it_as_it_is(vocabulary, top_p):
    """From flat rows, where the first SORTED_FIRST tokens are not enough, to peaked ones; and
    transformers agrees."""
    from transformers import TopPLogitsWarper

    g = torch.Generator().manual_seed(0)
    scales = torch.tensor([0.02, 0.3, 1.0, 3.0, 10.0]).repeat(4)[:, None]
    logits = torch.randn(20, vocabulary, generator=g) * scales
    probs = logits.softmax(-1)
    likely = top_p_filter(probs, top_p)
    for row, row_logits in zip(likely, logits, strict=True):
        assert set(row.nonzero()[:, 0].tolist()) == nucleus(row_logits, 1.0, top_p).keys()
    assert torch.equal(likely, torch.where(likely > 0, probs, 0))
    assert torch.equal(likely > 0, TopPLogitsWarper(top_p)(None, logits).isfinite())
    if vocabulary == 2000 and top_p >= 0.9:
        assert (likely > 0).sum(1).max() > 3 * sample.SORTED_FIRST


def test_the_number_of_tokens_that_are_looked_at_first_changes_nothing(monkeypatch):
    g = torch.Generator().manual_seed(1)
    scales = 8 * torch.rand(500, 1, generator=g)
    probs = (torch.randn(500, 200, generator=g) * scales).softmax(-1)
    expected = top_p_filter(probs, 0.8)
    for count in (1, 4, 32, 1000):
        monkeypatch.setattr(sample, "SORTED_FIRST", count)
        assert torch.equal(top_p_filter(probs, 0.8), expected)


def test_rows_are_sampled_alike_alone_and_in_company():
    g = torch.Generator().manual_seed(1)
    scales = 8 * torch.rand(500, 1, generator=g)
    logits = torch.randn(500, 600, generator=g) * scales
    u = torch.rand(500, generator=g)
    for top_p in (0.5, 0.95, 1.0):
        together = sample_token(logits, u, 0.8, top_p)
        pairs = zip(logits.split(1), u.split(1), strict=True)
        alone = [sample_token(row, number, 0.8, top_p) for row, number in pairs]
        assert torch.equal(torch.cat(alone), together)


def test_the_token_that_crosses_p_is_kept_and_the_next_is_not():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert distribution(logits, 1.0, 0.49).keys() == {0}
    assert distribution(logits, 1.0, 0.81).keys() == {0, 1, 2}
    assert distribution(logits, 1.0, 0.6) == pytest.approx({0: 5 / 8, 1: 3 / 8}, abs=1e-3)
    everything = {0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}
    assert distribution(logits, 1.0, 1.0) == pytest.approx(everything, abs=1e-3)


def test_tokens_as_likely_as_the_one_that_crosses_p_are_kept_too():
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.2]])
    assert top_p_filter(probs, 0.4).tolist() == [pytest.approx([0, 0.2, 0.3, 0.2, 0.2])]
    assert top_p_filter(torch.full((1, 1000), 0.001), 0.01).count_nonzero() == 1000
    assert top_p_filter(probs, 1e-9).nonzero().tolist() == [[0, 2]]


BELOW_ONE = torch.ones(1).nextafter(torch.zeros(1))


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token_of_the_nucleus():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    zero = torch.zeros(1)
    assert sample_token(logits, zero, 1.0, 0.9).item() == 0
    assert sample_token(logits, zero, 1.0, 0.7).item() == 1, "id 0 is not in the likeliest 0.7"
    for top_p in (0.7, 0.9, 1.0):
        assert sample_token(logits, BELOW_ONE, 1.0, top_p).item() == 3
    u = torch.tensor([0.2, 0.25, 0.3])
    assert sample_token(torch.zeros(3, 4), u, 1.0, 1.0).tolist() == [0, 1, 1]


def test_each_token_owns_its_lower_bound_and_weights_need_no_sum():
    weights = torch.tensor([0, 0.5, 0, 0.25, 0.25, 0])
    u = torch.tensor([0, 0.4999999, 0.5, 0.7499999, 0.75, BELOW_ONE])
    for scale in (1, 1024, 2**-20):
        ids = sample_from_cdf(weights.expand(6, -1) * scale, u)
        assert ids.tolist() == [1, 1, 3, 3, 4, 4]


def test_a_weight_of_zero_is_never_drawn():
    g = torch.Generator().manual_seed(0)
    weights = torch.rand(4000, 50, generator=g) * (torch.rand(4000, 50, generator=g) < 0.1)
    weights[:, 25] += 1e-6
    weights[::2] *= 1e-30
    edges = torch.tensor([0.0, BELOW_ONE.item()]).repeat(1000)
    u = torch.cat((torch.rand(2000, generator=g), edges))
    ids = sample_from_cdf(weights, u)
    assert (weights.gather(1, ids[:, None]) > 0).all()
    absorbed = torch.tensor([[1.0, 1e-12, 0.0]])  # a sum in fp32 does not change by the second
    assert sample_from_cdf(absorbed, BELOW_ONE).item() < 2
    tiny = torch.tensor([[0.0, 1e-44, 0.0]])  # almost all of it rounds to all of it
    assert sample_from_cdf(tiny, BELOW_ONE).item() == 1


def test_weights_that_are_not_numbers_draw_an_id_of_the_vocabulary():
    """Which one is no matter: sample_token marks the row. A GPU would die of an id beyond it."""
    weights = torch.tensor([[float("nan")] * 3, [0.0, 0.0, 1.0]])
    ids = sample_from_cdf(weights, torch.tensor([0.5, 0.5])).tolist()
    assert ids[0] in range(3) and ids[1] == 2


def test_temperature_zero_is_argmax_and_a_low_one_nearly():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(2))
    u = torch.rand(50, generator=torch.Generator().manual_seed(3))
    best = logits.argmax(-1)
    assert torch.equal(sample_token(logits, u, 0, 0.9), best)
    assert torch.equal(sample_token(logits, u, 1e-4, 1.0), best)
    assert torch.equal(sample_token(logits, u, 1e-4, 0.9), best)
    assert not torch.equal(sample_token(logits, u, 1.0, 1.0), best)


@pytest.mark.parametrize("temperature, top_p", WAYS_TO_DRAW)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_of_logits_that_are_not_finite_are_marked(bad, temperature, top_p):
    logits = torch.zeros(4, 100)
    logits[2, 50] = bad
    ids = sample_token(logits, torch.full((4,), 0.5), temperature, top_p).tolist()
    assert ids[2] == -1 and min(ids[:2] + ids[3:]) >= 0


@pytest.mark.parametrize("temperature, top_p", WAYS_TO_DRAW)
def test_damaged_weights_are_reported_in_one_line(cfg, temperature, top_p):
    damaged = random_net(cfg).eval()
    with torch.no_grad():
        damaged.norm.weight[3] = float("nan")
    settings = {"stop": [], "max_new": 2, "temperature": temperature, "top_p": top_p}
    with pytest.raises(UserError, match="not finite after prompt 0; its weights") as e:
        generate(damaged, [[1, 2]], [(0,)], **settings)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("n", [1, 2])
def test_of_many_prompts_the_one_behind_which_logits_fail_is_named(net, n, monkeypatch):
    lengths = {(i, k): 1 + i for i in range(3) for k in range(n)}
    script_lengths(monkeypatch, lengths)
    scripted = sample.sample_token

    def fails_at_the_third_step(logits, *args):
        ids = scripted(logits, *args)
        return ids.masked_fill(ids == ids, -1) if len(logits) == n else ids

    monkeypatch.setattr(sample, "sample_token", fails_at_the_third_step)  # only prompt 2 is left
    with pytest.raises(UserError, match="after prompt 2;"):
        prompts = [[1, 5]] * 3
        generate(net, prompts, keys_of(prompts), stop=[2], max_new=4, n=n)


def test_an_ended_slot_may_have_logits_that_are_not_finite(net, monkeypatch):
    """Only what is drawn for somebody counts."""
    lengths = {(0, 0): 1, (0, 1): 5}
    script_lengths(monkeypatch, lengths)
    scripted = sample.sample_token

    def fails_for_the_first_slot(logits, *args):
        ids = scripted(logits, *args)
        if 2 not in first_ids:
            first_ids.append(ids[0].item())
        else:
            ids[0] = -1
        return ids

    first_ids = []
    monkeypatch.setattr(sample, "sample_token", fails_for_the_first_slot)
    (samples,) = generate(net, [[1, 5]], [(0,)], stop=[2], max_new=5, n=2)
    assert samples == [[2], [7, 7, 7, 7, 2]]


def differences(counts: Counter, expected: dict[int, float]) -> list[float]:
    """How far each measured share is beyond five deviations; negative where it is within."""
    total = counts.total()
    beyond = []
    for i, p in expected.items():
        deviation = (p / total) ** 0.5
        beyond.append(abs(counts[i] / total - p) - 5 * deviation)
    return beyond


def test_bfloat16_draws_what_its_own_probabilities_say(cfg):
    """Two tokens deep, 4,000 samples; a fixed seed, so this cannot fail by chance."""
    half = random_net(cfg, std=0.12).to(torch.bfloat16).eval()
    prompt = [1, 40, 41, 42]
    settings = {"stop": [], "max_new": 2, "batch": 500, "temperature": 0.7, "top_p": 0.9}
    (samples,) = generate(half, [prompt], [("bf16",)], n=4000, **settings)
    with torch.no_grad():
        first = nucleus(half(torch.tensor([prompt]))[0, -1], 0.7, 0.9)
        likely = max(first, key=first.get)
        second = nucleus(half(torch.tensor([[*prompt, likely]]))[0, -1], 0.7, 0.9)
    behind_likely = Counter(b for a, b in samples if a == likely)
    for counts, expected in ((Counter(a for a, _ in samples), first), (behind_likely, second)):
        assert max(differences(counts, expected)) < 0.01
        inside = sum(counts[i] for i in expected)
        assert inside > 0.98 * counts.total(), "a cached logit may round to the edge's other side"


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5)])
def test_first_tokens_come_as_often_as_their_probabilities_say(net, temperature, top_p):
    """10,000 samples through the whole engine; a fixed seed, so this cannot fail by chance."""
    prompt = [1, 40, 41, 42]
    n = 10_000
    settings = {"stop": [], "max_new": 1, "batch": n, "temperature": temperature, "top_p": top_p}
    (samples,) = generate(net, [prompt], [("chi",)], n=n, **settings)
    with torch.no_grad():
        expected = nucleus(net(torch.tensor([prompt]))[0, -1], temperature, top_p)
    counts = Counter(ids[0] for ids in samples)
    assert counts.keys() <= expected.keys() and len(expected) > 3
    common = [i for i, p in expected.items() if n * p >= 5]
    observed_counts = [counts[i] for i in common]
    expected_counts = [n * expected[i] for i in common]
    if rest := n - sum(expected_counts):
        observed_counts.append(n - sum(observed_counts))
        expected_counts.append(rest)
    scale = sum(observed_counts) / sum(expected_counts)
    expected_counts = [scale * count for count in expected_counts]
    assert stats.chisquare(observed_counts, expected_counts).pvalue > 0.01


# ---- random numbers --------------------------------------------------------------------------


def test_uniforms_depend_on_the_key_alone():
    torch.manual_seed(1)
    random.seed(1)
    u = uniforms((0, "M1", "responses", 7, 2), 50)
    torch.manual_seed(2)
    torch.rand(10)
    assert torch.equal(uniforms((0, "M1", "responses", 7, 2), 50), u)
    assert torch.equal(uniforms((0, "M1", "responses", 7, 2), 20), u[:20]), "more only go on"
    other_keys = [
        (1, "M1", "responses", 7, 2),
        (0, "M2", "responses", 7, 2),
        (0, "M1", "votes", 7, 2),
        (0, "M1", "responses", 8, 2),
        (0, "M1", "responses", 7, 3),
        (0, "M1", "responses", "7", 2),
        (0, "M1", "responses", 72),
        (0, "M1", "responses", 7),
    ]
    for key in other_keys:
        assert not torch.equal(uniforms(key, 50), u)


def test_uniforms_are_uniform_within_and_across_keys():
    within = uniforms(("w",), 20_000)
    across = torch.stack([uniforms(("a", i, k), 2) for i in range(1000) for k in range(4)])
    for u in (within, across[:, 0], across[:, 1]):
        assert u.min() >= 0 and u.max() < 1
        assert stats.kstest(u.numpy(), "uniform").pvalue > 0.01
    assert abs(stats.pearsonr(across[:, 0], across[:, 1]).statistic) < 0.05
    assert abs(stats.pearsonr(across[:-1, 0], across[1:, 0]).statistic) < 0.05


# ---- candidates ------------------------------------------------------------------------------


def test_responses_are_marked_truncated_iff_they_do_not_end_in_eos(cfg, tok):
    net = random_net(cfg).eval()
    with torch.no_grad():
        net.lm_head.weight[tok.eos] *= 1.5  # ends early often, and not always
    texts = ["What is the fox?", "the owl", "Compare", "wolf?"]
    rows = [{"id": i, "prompt": text} for i, text in enumerate(texts)]
    settings = {"n": 4, "temperature": 1.0, "top_p": 1.0}
    responses = respond(net, tok, rows, key=(0, "M1"), max_new=12, **settings)
    assert [(r["id"], r["k"]) for r in responses] == [(i, k) for i in range(4) for k in range(4)]
    assert {r["truncated"] for r in responses} == {True, False}
    for r in responses:
        assert set(r) == {"id", "k", "prompt", "response", "tokens", "truncated"}
        assert r["prompt"] == texts[r["id"]]
        assert r["truncated"] == (r["tokens"][-1] != tok.eos)
        assert tok.eos not in r["tokens"][:-1]
        assert len(r["tokens"]) == 12 if r["truncated"] else len(r["tokens"]) <= 12
        text = tok.decode([i for i in r["tokens"] if i != tok.eos])
        assert r["response"] == text.strip()
    ended = next(r for r in responses if r["id"] == 0 and not r["truncated"])
    max_new = len(ended["tokens"])
    shorter = respond(net, tok, rows[:1], key=(0, "M1"), max_new=max_new, **settings)
    assert ended in shorter, "an end at the very limit is an end"
    alone = respond(net, tok, rows[2:3], key=(0, "M1"), max_new=12, **settings)
    assert alone == responses[8:12], "alone as among others"
    other = respond(net, tok, rows[:1], key=(1, "M1"), max_new=12, **settings)
    assert other != responses[:4]


def test_a_row_with_turns_is_a_chat_to_go_on_with(net, tok, monkeypatch):
    calls = []

    def spy(model, prompts, keys, **settings):
        calls.append((prompts, keys))
        return generate(model, prompts, keys, **settings)

    monkeypatch.setattr(sample, "generate", spy)
    turns = ["Tell me", "The owl hunts.", "Why?"]
    rows = [{"id": "a", "turns": turns}, {"id": "b", "prompt": "Tell me"}]
    responses = respond(net, tok, rows, key=(3, "M2"), n=2, max_new=4)
    ((prompts, keys),) = calls
    assert prompts == [tok.chat(*turns), tok.chat("Tell me")]
    assert [ids.count(tok.bos) for ids in prompts] == [2, 1], "one for each turn of a user"
    assert keys == [(3, "M2", "a"), (3, "M2", "b")]
    assert [(r["id"], r["prompt"]) for r in responses] == [("a", "Why?")] * 2 + [
        ("b", "Tell me")
    ] * 2


def test_the_defaults_are_the_papers_settings(net, tok, monkeypatch):
    settings = []

    def spy(logits, u, temperature, top_p):
        settings.append((temperature, top_p))
        return sample_token(logits, u, temperature, top_p)

    monkeypatch.setattr(sample, "sample_token", spy)
    assert len(respond(net, tok, [{"id": 0, "prompt": "Hi"}], key=(0,), max_new=2)) == 4
    assert set(settings) == {(0.7, 0.9)}


# ---- the filter of new prompts ---------------------------------------------------------------


def longest_common_subsequence(a, b) -> int:
    """The textbook table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            either = max(table[i][j + 1], table[i + 1][j])
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else either
    return table[-1][-1]


def test_rouge_l_equals_the_textbook_table_on_random_word_lists():
    rng = random.Random(0)
    for _ in range(1500):
        letters = "abcdefghij"[: rng.randint(1, 10)]
        sizes = [rng.randint(0, rng.choice([3, 12, 80])) for _ in range(2)]
        a, b = ([rng.choice(letters) for _ in range(size)] for size in sizes)
        expected = 2 * longest_common_subsequence(a, b) / max(1, len(a) + len(b))
        assert rouge_l(a, b) == pytest.approx(expected)


def test_rouge_l_by_hand():
    a = ["the", "cat", "sat", "on", "the", "mat"]
    b = ["the", "cat", "lay", "on", "a", "mat"]
    assert rouge_l(a, b) == pytest.approx(2 * 4 / 12)
    assert rouge_l(a, a) == 1.0 and rouge_l(a, []) == 0.0 and rouge_l([], []) == 0.0
    assert rouge_l(a, list(reversed(a))) < 0.6


def random_text(rng: random.Random) -> list[str]:
    """Words of which some are frequent, as in any language."""
    return [f"w{int(rng.paretovariate(0.7))}" for _ in range(rng.randint(0, 30))]


def test_the_filter_is_rouge_l_with_every_text_of_the_pool(monkeypatch):
    rng = random.Random(0)
    num_similar, num_compared, pairs = 0, [], 0
    monkeypatch.setattr(sample, "rouge_l", lambda a, b: num_compared.append(1) or rouge_l(a, b))
    for _ in range(400):
        pool = [random_text(rng) for _ in range(20)]
        text = rng.choice([random_text(rng), list(rng.choice(pool))])
        for _ in range(rng.randint(0, 8)):  # a copy with some changes
            place = rng.randint(0, len(text))
            text[place : place + rng.randint(0, 2)] = random_text(rng)[: rng.randint(0, 2)]
        limit = rng.choice([0.0, 0.3, 0.7, 0.99, 1.0])
        expected = any(text == old or rouge_l(text, old) > limit for old in pool)
        assert too_similar(" ".join(text), pool, limit) == expected
        num_similar += expected
        pairs += 20
    assert 100 < num_similar < 300
    assert sum(num_compared) < pairs / 16, "most texts have too few words in common"


def test_words_are_letters_and_digits_in_lower_case():
    assert words("Don't STOP: it's 3.5 o'clock!\n") == "don t stop it s 3 5 o clock".split()
    assert words("?! \n_") == []


@pytest.mark.parametrize(
    "text, expected",
    [
        ("L'Été naïf, déjà 2 fois", "l été naïf déjà 2 fois".split()),
        ("Größe ЖИЗНЬ", ["größe", "жизнь"]),
        ("हिन्दी में", ["हिन्दी", "में"]),  # with its vowel signs
        ("空が青い。なぜ？", list("空が青いなぜ")),
        ("用Python写诗", ["用", "python", "写", "诗"]),
        ("한국어 문장", ["한국어", "문장"]),
    ],
)
def test_words_of_other_scripts_and_characters_where_there_are_no_blanks(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "too short"),
        ("What is this?", "too short"),
        ("What is this now?", None),
        ("word " * 150, None),
        ("word " * 151, "too long"),
        ("- List the four winds", "odd first character"),
        ("Über den Wolken fliegt er", None),
        ("¿Por qué se ve azul el cielo?", None),
        ("«Pourquoi le ciel est-il bleu ?»", "odd first character"),
        ("\U0001f600 Why is the sky blue?", "odd first character"),
        ("空が青く見える理由を説明してください。", None),
        ("成年人怎样学会游泳？", None),
        ("อธิบายว่าทำไมท้องฟ้าเป็นสีฟ้า", None),
        ("आकाश नीला क्यों दिखता है", None),
        ("空は青い？", "too short"),  # two characters make a word
        ("空" * 300, None),
        ("空" * 301, "too long"),
        ("「空」とは何か説明してください。", "odd first character"),
        ("2 birds sat on a fence", None),
        ("Write a program that adds numbers", "asks for a program"),
        ("Write a programme for the evening", "asks for a program"),
        ("Please write a program that adds", None),
        ("Describe the image shown to you", "asks for more than text"),
        ("Draw a house with a garden", "asks for more than text"),
        ("Explain the GRAPH in plain words", "asks for more than text"),
        ("Go to the shop and buy bread", "asks for more than text"),
        ("Summarise the following two files: a, b", "asks for more than text"),
        ("Imagine a filed complaint about mapping", None),  # only whole words count
        ("How did the plotter withdraw his paragraph?", None),
    ],
)
def test_unfit_prompts_are_dropped_for_the_right_reason(text, reason):
    assert why_unfit(text.strip()) == reason


VERBS = "sleep hunt hide swim sing run eat drink fly climb".split()
SEEDS = [f"Where does animal number {i} {verb} today?" for i, verb in enumerate(VERBS)]
TEMPLATE = "New questions:\n1. {1}\n2. {2}\n3. {3}\n4. {4}\n5. {5}\n6. {6}\n7. {7}\n8. {8}\n9."


def new_prompt(number: int) -> str:
    """A prompt unlike every other one."""
    rng = random.Random(number)
    return "Tell " + " ".join("".join(rng.choices("bcdfgklmnprstaeiou", k=6)) for _ in range(6))


class Writer:
    """A scripted writer: answers one request after the other from a list, then with new prompts;
    remembers the requests."""

    def __init__(self, tok, script=()):
        self.tok = tok
        self.script = list(script)
        self.requests = []
        self.keys = []
        self.waves = []

    def __call__(self, ids, keys):
        assert all(i[0] == self.tok.bos and i.count(self.tok.bos) == 1 for i in ids)
        self.requests += [self.tok.decode(i[1:]) for i in ids]
        self.waves.append(len(ids))
        id_lists = []
        for key in keys:
            number = len(self.keys)
            self.keys.append(key)
            text = self.script[number] if number < len(self.script) else new_prompt(number)
            if isinstance(text, str):
                text = [*self.tok.encode(text), self.tok.eos]
            id_lists.append(text)
        return id_lists


def examples_of(request: str) -> list[str]:
    examples = re.findall(r"^\d\. (.+)$", request, re.MULTILINE)
    assert len(examples) == 8
    return examples


def test_requests_hold_six_seeds_and_two_accepted_prompts_after_the_first_wave(tok):
    write = Writer(tok)
    prompts, tally = propose(write, tok, TEMPLATE, SEEDS, 40, key=(0,), wave=10)
    assert len(prompts) == 40 and tally["accepted"] == 40
    positions = Counter()
    for i, request in enumerate(write.requests):
        examples = examples_of(request)
        generated = [e for e in examples if e in prompts]
        assert len(set(examples)) == 8, "no example twice"
        assert sum(e in SEEDS for e in examples) == 8 - len(generated)
        assert len(generated) == (0 if i < 10 else 2)
        first_of_wave = 10 * (i // 10)
        assert all(prompts.index(e) < first_of_wave for e in generated), "accepted before"
        positions.update(examples.index(e) for e in generated)
    assert len(positions) == 8, "in random order"


def test_the_length_of_a_request_does_not_grow_over_calls(tok):
    write = Writer(tok)
    seeds = list(SEEDS)
    earlier = []
    for call in range(4):
        prompts, _ = propose(write, tok, TEMPLATE, seeds, 12, key=(call,), wave=4, earlier=earlier)
        earlier += prompts
    assert len(set(earlier)) == 48 and seeds == SEEDS
    for request in write.requests:
        assert len(examples_of(request)) == 8 and len(request.split("\n")) == 10


def test_every_bad_prompt_is_dropped_and_counted_by_its_reason(tok):
    earlier = ["Tell me which boots the ferryman wore", new_prompt(1001)]
    held_out = "Why is the evening sky so red?"
    good = new_prompt(1002)
    near = " ".join(good.split()[:-1] + ["otherwise"])  # six of seven words in common
    part = " ".join(good.split()[:4])  # rouge 8/11
    double = good + " " + " ".join(new_prompt(1003).split()[1:]) + " indeed"  # rouge 14/21
    script = {
        SEEDS[3]: "too similar",
        SEEDS[4].upper(): "too similar",
        earlier[0]: "too similar",
        earlier[1]: "too similar",
        held_out: "held out",
        good: "accepted",
        good + " ": "too similar",
        near: "too similar",
        part: "too similar",
        double: "accepted",
        "Too short this": "too short",
        "long " * 151: "too long",
        "!Odd start of a line": "odd first character",
        "Write a program that prints primes": "asks for a program",
        "Describe this picture in two words": "asks for more than text",
        "": "too short",
    }
    cut_ids = [*tok.encode("Tell me all that you know about"), tok.encode("a")[-1]]
    write = Writer(tok, [*script, cut_ids])
    rows = {"earlier": earlier, "held_out": [held_out + " \n"]}
    prompts, tally = propose(write, tok, TEMPLATE, SEEDS, 20, key=(0,), wave=5, **rows)
    expected = Counter(script.values()) + Counter(["cut by the length limit"])
    assert tally == expected | Counter(accepted=20)
    assert len(prompts) == len(set(prompts)) == 20
    assert good in prompts and double in prompts
    assert not set(prompts) & {*SEEDS, *earlier, held_out, near, part}


JAPANESE = """空が青く見える理由を説明してください。
家庭での酢の使い道を三つ挙げてください。
大人になってから泳ぎを覚えるにはどうすればよいですか。
冬についての短い詩を書いてください。
一週間の山歩きに何を持って行けばよいですか。
勉強のときの紅茶とコーヒーを比べてください。
レンズ豆のスープの作り方を教えてください。
自転車はなぜ倒れずに走れるのですか。
小さなパン屋の名前を提案してください。
預金の税金の仕組みを教えてください。""".split("\n")


def test_prompts_of_a_language_without_blanks_are_told_apart(tok):
    """Ten ordinary ones are accepted and a near copy of a seed is not."""
    seeds = JAPANESE[:2]
    script = [JAPANESE[0].replace("青", "赤"), *JAPANESE[2:]]
    prompts, tally = propose(Writer(tok, script), tok, "{1}\n{2}\n", seeds, 8, key=(0,))
    assert prompts == JAPANESE[2:]
    assert tally == {"accepted": 8, "too similar": 1}


def test_no_prompt_comes_twice_even_where_similar_ones_are_allowed(tok):
    earlier = [new_prompt(2001)]
    again = new_prompt(2002)
    write = Writer(tok, [SEEDS[0], earlier[0], again, again])
    prompts, tally = propose(write, tok, TEMPLATE, SEEDS, 5, key=(0,), earlier=earlier, rouge=1.0)
    assert len(set(prompts)) == 5 and again in prompts
    assert not set(prompts) & {*SEEDS, *earlier} and tally.total() == 5 + 3


def test_the_first_line_of_what_is_written_is_the_new_prompt(tok):
    newline = tok.encode("a\n")[-1]
    assert newline in tok.newlines
    one = new_prompt(1)
    two = new_prompt(2)
    until_newline = [*tok.encode(f"  {one} "), newline]
    write = Writer(tok, [until_newline, f"{two}\nAnswer: no"])
    prompts, _ = propose(write, tok, TEMPLATE, SEEDS, 2, key=(0,))
    assert prompts == [one, two]


def test_equal_keys_give_equal_requests_and_other_keys_others(tok):
    runs = []
    for key in [(0, "a"), (0, "a"), (1, "a")]:
        write = Writer(tok)
        proposal = propose(write, tok, TEMPLATE, SEEDS, 15, key=key, wave=6)
        runs.append((proposal, write.requests, write.keys))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]
    keys = runs[0][2]
    other_keys = runs[2][2]
    assert len(set(keys)) == len(keys), "every request has random numbers of its own"
    assert not set(keys) & set(other_keys)


def test_braces_in_seed_prompts_survive(tok):
    write = Writer(tok)
    seeds = [f"What does {{{i}}} mean in template {i}?" for i in range(1, 9)]
    propose(write, tok, TEMPLATE, seeds, 1, key=(0,))
    assert sorted(examples_of(write.requests[0])) == sorted(seeds)


def test_examples_share_the_room_and_a_longer_prompt_is_never_shown(tok):
    long = "Tell " + "x1y2 " * 100
    write = Writer(tok)
    prompts, _ = propose(
        write, tok, "{1}\n{2}\nnext:", [*SEEDS, long], 30, key=(0,), max_request_tokens=150
    )
    assert len(prompts) == 30
    assert all(len(tok.encode_with_bos(request)) <= 150 for request in write.requests)
    assert not any("x1y2" in request for request in write.requests)
    with pytest.raises(UserError, match=r"0 of 10 seed prompts are one line"):
        propose(Writer(tok), tok, TEMPLATE, SEEDS, 5, key=(0,), max_request_tokens=3)


def test_a_writer_that_repeats_itself_is_given_up_after_bounded_attempts(tok):
    write = Writer(tok, [new_prompt(0)] * 10_000)
    with pytest.raises(UserError, match=r"only 1 of 7 .*too similar") as e:
        propose(write, tok, TEMPLATE, SEEDS, 7, key=(0,), attempts=3, wave=4)
    assert "\n" not in str(e.value)
    assert 21 <= len(write.keys) <= 21 + 4 and max(write.waves) <= 4


@pytest.mark.parametrize(
    "template, seeds",
    [("no place", SEEDS), (TEMPLATE, SEEDS[:7]), ("{1} {3}", SEEDS), ("{0} {1}", SEEDS)],
)
def test_a_template_that_cannot_be_filled_is_refused(tok, template, seeds):
    with pytest.raises(UserError, match="template") as e:
        propose(Writer(tok), tok, template, seeds, 1, key=(0,))
    assert "\n" not in str(e.value)


# ---- rows of JSON lines ----------------------------------------------------------------------

GOOD_ROW = '{"prompt": "p", "response": "r", "more": 1}'


@pytest.mark.parametrize(
    "line, why",
    [
        ('{"prompt": "p", "response": ', "JSON"),
        ("prompt,response", "JSON"),
        ("{'prompt': 'p', 'response': 'r'}", "JSON"),
        ("\ufeff" + GOOD_ROW, "JSON"),
        ('{"prompt": "p"}', "response"),
        ('{"prompt": "p", "response": ""}', "response"),
        ('{"prompt": null, "response": "r"}', "prompt"),
        ("{}", "prompt and response"),
        ('["p", "r"]', "prompt"),
        ('"p"', "prompt"),
        ("7", "prompt"),
        ("null", "prompt"),
        ('{"prompt": 7, "response": "r"}', "prompt"),
        ('{"prompt": "  ", "response": "r"}', "prompt"),
        ('{"prompt": {"text": "p"}, "response": "r"}', "prompt"),
        ('{"prompt": "p", "response": "half \\ud83d"}', "'\\ud83d' alone is no character"),
        ('{"prompt": "p", "response": "r", "turns": [{"\\ude00": 1}]}', "no character"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, line, why):
    path = tmp_path / "ift.jsonl"
    path.write_text(f"{GOOD_ROW}\n\n{line}\n{GOOD_ROW}\n", encoding="utf-8")
    with pytest.raises(UserError) as e:
        read_jsonl(path, "prompt", "response")
    message = str(e.value)
    assert message.startswith(f"{path}:3: ") and why in message and "\n" not in message


@pytest.mark.parametrize(
    "line, usable",
    [
        ('{"turns": ["a"], "reference_chosen": -3.5}', True),
        ('{"turns": [], "reference_chosen": -3.5}', False),
        ('{"turns": "ab", "reference_chosen": -3.5}', False),
        ('{"turns": ["a"], "reference_chosen": null}', False),
        ('{"turns": ["a"], "reference_chosen": "-3.5"}', False),
    ],
)
def test_lists_are_not_empty_and_log_probabilities_are_numbers(tmp_path, line, usable):
    path = tmp_path / "rows.jsonl"
    path.write_text(line)
    if usable:
        assert read_jsonl(path, "turns", "reference_chosen") == [json.loads(line)]
    else:
        with pytest.raises(UserError, match=r"rows.jsonl:1: no usable (turns|reference_chosen);"):
            read_jsonl(path, "turns", "reference_chosen")


def test_escaped_characters_of_two_halves_are_read(tmp_path):
    path = tmp_path / "ift.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00 \\u00e9 \\\\ud83d", "response": "r"}')
    assert read_jsonl(path)[0]["prompt"] == "\U0001f600 \u00e9 \\ud83d"


def test_a_file_without_rows_is_named_unless_it_may_be_empty_or_missing(tmp_path):
    empty = tmp_path / "empty.jsonl"
    missing = tmp_path / "missing.jsonl"
    for content in (b"", b"\n \n"):
        empty.write_bytes(content)
        for settings in ({}, {"missing_ok": True}):
            with pytest.raises(UserError, match="empty.jsonl: holds no rows"):
                read_jsonl(empty, "prompt", **settings)
        assert read_jsonl(empty, "prompt", allow_empty=True) == []
    for settings in ({}, {"allow_empty": True}):
        with pytest.raises(UserError, match="missing.jsonl: not found"):
            read_jsonl(missing, **settings)
    assert read_jsonl(missing, "prompt", missing_ok=True) == []
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"prompt": "Käse"}'.encode("latin-1"))
    with pytest.raises(UserError, match="latin.jsonl: byte 13 is not UTF-8"):
        read_jsonl(latin)


def test_good_rows_come_back_whole(tmp_path):
    rows = [
        {"prompt": "a\u2028b \x85 c", "response": "😀\n", "n": 0},
        {"prompt": "{}", "response": "</s>", "x": None},
    ]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_bytes("\r\n\n".join(lines).encode())
    assert read_jsonl(path, "prompt", "response") == rows


# ---- settings of a model folder --------------------------------------------------------------

PAPER = {"temperature": 0.7, "top_p": 0.9}


@pytest.mark.parametrize(
    "sampling, expected",
    [
        (None, PAPER),
        ({"temperature": 1.0, "top_p": 0.95}, {"temperature": 1.0, "top_p": 0.95}),
        ({"temperature": 0.0, "top_p": 1.0}, {"temperature": 0.0, "top_p": 1.0}),
    ],
)
def test_a_folder_says_how_its_model_is_sampled(net, tok, tmp_path, sampling, expected):
    save(net, tok, tmp_path / "M1", sampling)
    assert sampling_settings(tmp_path / "M1") == expected
    assert sampling_settings(str(tmp_path / "M1")) == expected


def test_the_papers_settings_stand_in_for_what_a_folder_does_not_say(tmp_path):
    assert sampling_settings(tmp_path) == PAPER
    path = tmp_path / "generation_config.json"
    path.write_text('{"temperature": 0.6, "eos_token_id": 2}')
    assert sampling_settings(tmp_path) == PAPER | {"temperature": 0.6}
    path.write_text('{"temperature": null, "top_p": 0.5}')
    assert sampling_settings(tmp_path) == PAPER | {"top_p": 0.5}
    path.write_text("{")
    with pytest.raises(UserError, match="generation_config.json: not valid JSON"):
        sampling_settings(tmp_path)


def test_a_model_is_loaded_to_be_asked(net, tok, tmp_path):
    save(net, tok, tmp_path / "M1")
    model, vocabulary = load_for_sampling(tmp_path / "M1")
    assert not model.training and vocabulary.size == tok.size
    on_cpu = not torch.cuda.is_available()
    if on_cpu:  # its weights lie otherwise and are the same
        assert model.lm_head.weight.T.is_contiguous()
        assert all(torch.equal(w, model.state_dict()[k]) for k, w in net.state_dict().items())
    assert next(model.parameters()).dtype == (torch.float32 if on_cpu else torch.bfloat16)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_for_sampling(tmp_path / "nowhere")


# ---- in the terminal -------------------------------------------------------------------------


def test_the_printed_response_equals_the_generated_one(net, tok, capsys):
    settings = {"max_new": 30, "temperature": 1.0, "top_p": 0.95}
    turns = ["Tell me", "no", "why?"]
    num_cut = 0
    for seed in range(5):
        text = print_response(net, tok, turns, (seed,), **settings)
        assert capsys.readouterr().out == text + "\n"
        ids = sample_one(net, tok.chat(*turns), (seed,), stop=[tok.eos], **settings)
        whole = tok.decode([i for i in ids if i != tok.eos])
        assert whole.startswith(text) and whole[len(text) :].strip("\ufffd") == ""
        num_cut += whole != text
    assert num_cut < 5, "only half of a character at the very end is left out"


def test_a_character_that_is_spelt_in_bytes_is_printed_when_it_is_whole(net, tok, monkeypatch):
    """Of each step's text, the terminal sees no half of a character."""
    ids = [*tok.encode("a \U0001f600 b"), tok.eos]
    assert len(ids) > 8, "the emoji is four tokens"
    pieces = []
    monkeypatch.setattr(sample, "generate_stream", lambda *_, **__: (([0], [i]) for i in ids))
    monkeypatch.setattr(sample, "print", lambda *text, **_: pieces.extend(text), raising=False)
    assert print_response(net, tok, ["Hi"], (0,)) == "a \U0001f600 b"
    assert "".join(pieces) == "a \U0001f600 b"
    assert not any("\ufffd" in piece for piece in pieces)


def type_lines(monkeypatch, *lines):
    """Lines that somebody types, then Ctrl-D."""
    waiting = iter(lines)

    def type_next(mark):
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_next)


def spy_on_responses(monkeypatch) -> list[tuple]:
    """The (turns, key, response) of every response that is printed from now on."""
    calls = []

    def spy(model, tok, turns, key, **settings):
        turns = list(turns)
        text = print_response(model, tok, turns, key, **settings)
        calls.append((turns, key, text))
        return text

    monkeypatch.setattr(sample, "print_response", spy)
    return calls


def test_the_chat_remembers_its_turns_until_an_empty_line(net, tok, monkeypatch, capsys):
    type_lines(monkeypatch, "Once there was ", "and then", "", "Again")
    calls = spy_on_responses(monkeypatch)
    sample.chat(net, tok, 4, max_new=5, temperature=1.0, top_p=1.0)
    (_, _, first), (_, _, second), (_, _, third) = calls
    assert [turns for turns, _, _ in calls] == [
        ["Once there was"],
        ["Once there was", first, "and then"],
        ["Again"],
    ]
    assert [key for _, key, _ in calls] == [(4, 1), (4, 3), (4, 1)]
    help_line, *lines = capsys.readouterr().out.split("\n")
    assert "empty line" in help_line and "Ctrl-D" in help_line
    assert "\n".join(lines) == f"{first}\n{second}\n{third}\n\n"


def test_ctrl_c_ends_a_chat_as_ctrl_d_does(net, tok, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    type_lines(monkeypatch, "Hi", "never typed")
    monkeypatch.setattr(sample, "print_response", interrupted)
    sample.chat(net, tok, 0, max_new=5, temperature=0, top_p=1.0)
    assert capsys.readouterr().out.endswith("ends.\n\n")


def test_a_chat_that_outgrows_the_context_begins_anew_with_the_line_at_hand(
    net, tok, monkeypatch, capsys
):
    chats = []

    def say_little(model, tok, turns, *_, **__):
        chats.append(list(turns))
        return "So it was."

    lines = ["Tell me about the owl and the fox " * 2 + str(number) for number in range(12)]
    type_lines(monkeypatch, *lines)
    monkeypatch.setattr(sample, "print_response", say_little)
    sample.chat(net, tok, 0, max_new=60, temperature=1.0, top_p=1.0)
    assert [turns[-1] for turns in chats] == lines
    assert max(len(tok.chat(*turns)) + 60 for turns in chats) <= net.cfg.max_len
    num_chats = [len(turns) for turns in chats].count(1)
    assert 1 < num_chats < 12
    out = capsys.readouterr().out
    assert out.count("(more than the context of 512 tokens: a new chat begins)") == num_chats - 1


def test_a_line_that_cannot_be_answered_does_not_end_a_chat(net, tok, monkeypatch, capsys):
    type_lines(monkeypatch, "Hi", "the owl " * 400, "\udcff", "Hi")
    calls = spy_on_responses(monkeypatch)
    sample.chat(net, tok, 0, max_new=5, temperature=0, top_p=1.0)
    out = capsys.readouterr().out
    assert len(calls) == 2 and calls[0] == calls[1]
    assert out.count("(more than the context of 512 tokens: a new chat begins)") == 1
    assert out.count("allow fewer new tokens: a new chat begins)") == 1
    assert out.count("half of a surrogate pair; mend it: a new chat begins)") == 1


@pytest.fixture
def folder(net, tok, tmp_path):
    """A model folder of a run that samples at temperature 1, top-p 0.95."""
    save(net, tok, tmp_path / "M3", {"temperature": 1.0, "top_p": 0.95})
    return tmp_path / "M3"


def run_main(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
    sample.main()


@pytest.mark.parametrize(
    "flags, settings",
    [
        ([], {"temperature": 1.0, "top_p": 0.95, "max_new": 256}),
        (["--temperature", 0], {"temperature": 0.0, "top_p": 0.95, "max_new": 256}),
        (["--top-p", 0.5], {"temperature": 1.0, "top_p": 0.5, "max_new": 256}),
        (["--max-new", 9, "--seed", 7], {"temperature": 1.0, "top_p": 0.95, "max_new": 9}),
    ],
)
def test_flags_come_before_the_settings_of_the_folder(folder, flags, settings, monkeypatch):
    calls = []
    monkeypatch.setattr(sample, "print_response", lambda *args, **kw: calls.append((args, kw)))
    monkeypatch.setattr(sample, "chat", lambda *args, **kw: calls.append((args, kw)))
    run_main(monkeypatch, folder, "Hi there", *flags)
    run_main(monkeypatch, folder, *flags)
    (_, _, turns, key), response_settings = calls[0]
    seed = 7 if "--seed" in flags else 0
    settings = settings | {"compile": None}
    assert (turns, key, response_settings) == (["Hi there"], (seed, 0), settings)
    (_, _, chat_seed), chat_settings = calls[1]
    assert (chat_seed, chat_settings) == (seed, settings)


@pytest.mark.parametrize(
    "args, message",
    [
        (["Hi", "--top-p", "0"], "top-p"),
        (["Hi", "--temperature", "-1"], "temperature"),
        (["Hi " * 400], "context"),
        (["Hi", "--max-new", "0"], "max_new"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(folder, monkeypatch, args, message):
    with pytest.raises(UserError, match=message):
        run_main(monkeypatch, folder, *args)


def run_file(monkeypatch, *args):
    """`python sample.py ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
    runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")


def test_the_command_answers_one_prompt_with_the_sample_its_seed_names(
    shared, monkeypatch, capsys
):
    folder = shared / "stories260K" / "hf"
    flags = ["--temperature", 0.8, "--top-p", 0.95, "--max-new", 20, "--seed", 7]
    run_file(monkeypatch, folder, "Once upon a time", *flags)
    net, tok = load(folder)
    settings = {"max_new": 20, "temperature": 0.8, "top_p": 0.95}
    prompt = tok.chat("Once upon a time")
    ids = sample_one(net.eval(), prompt, (7, 0), stop=[tok.eos], **settings)
    text = tok.decode([i for i in ids if i != tok.eos])
    assert capsys.readouterr().out == text + "\n"


def test_the_command_reports_what_the_user_must_mend_in_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as e:
        run_file(monkeypatch, "/nowhere", "Hi")
    assert e.value.code.startswith("error: /nowhere: ") and "\n" not in e.value.code
    assert capsys.readouterr().out == ""


def fail(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, code",
    [
        (UserError("/nowhere: not found; mend it"), "error: /nowhere: not found; mend it"),
        (OSError(28, "No space left on device"), "error: output: No space left on device"),
        (PermissionError(13, "Permission denied", "a/b"), "error: a/b: Permission denied"),
        (KeyboardInterrupt(), 130),
        (SystemExit(2), 2),
    ],
)
def test_a_command_that_fails_exits_with_one_line_or_a_code(error, code, capsys):
    """A text as exit code is printed to stderr, and the code is 1."""
    with pytest.raises(SystemExit) as e:
        run_command(fail(error))
    assert e.value.code == code
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == (code == 130)


def test_a_command_that_ends_well_flushes_what_the_terminal_can_show(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    run_command(lambda: print("Käse"))
    assert terminal.buffer.getvalue() == b"K?se\n"


def test_a_bug_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(monkeypatch, capsys):
    """As `| head` does; what Python flushes at its end goes nowhere."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as e:
            run_command(lambda: print("x" * 100_000))
        print("more")
        pipe.flush()
    assert e.value.code == 1 and capsys.readouterr().err == ""
