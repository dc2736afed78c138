"""sample.py: one decoder in all its disguises, the sampler against exact distributions, the prompt filter, the chat."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, random_net
from scipy import stats

import sample
from model import BadInput, load
from sample import (
    TRIES,
    answer,
    as_file,
    generate,
    pick,
    propose,
    read_questions,
    respond,
    rouge_l,
    say,
    stream,
    unfit,
    uniforms,
)


@pytest.fixture(scope="module")
def lists(tok):
    """Ragged prompts: with a common beginning, without one, one a prefix of another, two equal, a single token."""
    common = tok.chat("Where does the otter live?")
    return {
        "common": [common + tok.encode(t) for t in ("The", "The otter lives in", "rivers and", "x", "")],
        "none": [tok.encode("fox is red"), [tok.bos], tok.chat("Compare the bear with the seal."), [tok.bos, 7]],
        "nested": [common[:3], common[:3], common, common[:5] + common],
    }


def plain_loop(net, prompt, u, stop, max_new, temperature, top_p):
    """The slow truth: a full forward pass without a cache for every token."""
    out = []
    with torch.no_grad():
        for step in range(max_new):
            logits = net(torch.tensor([prompt + out]))[:, -1]
            out.append(pick(logits, u[step : step + 1], temperature, top_p).item())
            if out[-1] in stop:
                break
    return out


KNOBS = {"greedy": {"temperature": 0, "top_p": 0.9}, "sampled": {"temperature": 0.9, "top_p": 0.95}}


# ---- decoding


def test_greedy_decoding_of_real_weights_gives_the_known_text(shared):
    net, tok = load(shared / "stories260K" / "hf")
    want = json.loads((shared / "stories260K" / "greedy.json").read_text())
    new = len(want["ids"]) - 1
    out = generate(net.eval(), [[tok.bos]], [(0,)], stop=[tok.eos], max_new=new, temperature=0)
    assert [tok.bos, *out[0][0]] == want["ids"]
    assert tok.decode(out[0][0]) == want["text"]
    tokens, loop = torch.tensor([[tok.bos]]), []
    with torch.no_grad():
        for _ in range(40):
            loop.append(net(tokens)[0, -1].argmax().item())
            tokens = torch.cat((tokens, torch.tensor([loop[-1:]])), 1)
    assert out[0][0][:40] == loop


@pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS.keys())
@pytest.mark.parametrize("kind", ["common", "none", "nested"])
@pytest.mark.parametrize("shared", [1, 1000], ids=["prompts shared", "copied"])
def test_cached_batched_decoding_equals_the_uncached_loop_one_by_one(net, tok, lists, kind, knobs, shared, monkeypatch):
    """Also where the samples of a prompt, and all prompts behind their common beginning, read its keys once."""
    prompts, max_new, n = lists[kind], 12, 3
    monkeypatch.setattr(sample, "SHARED", shared)
    monkeypatch.setattr(sample, "LONG", shared)
    keys = [("k", i) for i in range(len(prompts))]
    rng = random.Random(0)
    stop = rng.sample(range(net.cfg.vocab_size), 20)  # rows end at different steps, so that rows are dropped
    us = [[uniforms((*key, k), TRIES * max_new).view(-1, TRIES) for k in range(n)] for key in keys]
    want = [[plain_loop(net, p, u, stop, max_new, **knobs) for u in row] for p, row in zip(prompts, us, strict=True)]
    assert len({len(ids) for row in want for ids in row}) > 1, "some rows should end early"
    for batch in (1, 3, 4, 256):
        assert generate(net, prompts, keys, stop=stop, max_new=max_new, n=n, batch=batch, **knobs) == want
    order = list(range(len(prompts)))
    rng.shuffle(order)
    shuffled = generate(
        net, [prompts[i] for i in order], [keys[i] for i in order], stop=stop, max_new=max_new, n=n, batch=6, **knobs
    )
    assert shuffled == [want[i] for i in order]
    alone = [generate(net, [p], [k], stop=stop, max_new=max_new, n=n, **knobs)[0] for p, k in zip(prompts, keys, strict=True)]  # fmt: skip  # noqa: E501
    assert alone == want


def test_the_samples_of_a_prompt_differ_and_do_not_depend_on_how_many_are_drawn(net, lists):
    prompts = lists["common"][:2]
    keys = [(0,), (1,)]
    knobs = {"stop": [], "max_new": 10, "temperature": 1.0, "top_p": 1.0}
    four = generate(net, prompts, keys, n=4, **knobs)
    for samples in four:
        assert len({tuple(s) for s in samples}) == 4
    assert [s[:1] for s in four] == generate(net, prompts, keys, n=1, **knobs)
    shorter = generate(net, prompts, keys, n=4, **knobs | {"max_new": 4})
    assert shorter == [[s[:4] for s in samples] for samples in four]
    assert generate(net, prompts, [(2,), (1,)], n=4, **knobs)[0] != four[0], "another key, other samples"
    assert generate(net, prompts, [(2,), (1,)], n=4, **knobs)[1] == four[1]


def test_samples_exclude_the_prompt_and_end_exactly_at_a_stop_token(net, lists):
    stop, max_new = list(range(0, net.cfg.vocab_size, 9)), 16
    prompts = lists["nested"] * 8
    heard = []
    keys = [(i,) for i in range(len(prompts))]
    out = generate(net, prompts, keys, stop=stop, max_new=max_new, n=2, temperature=1.0, top_p=1.0, batch=10,
                   tick=lambda tokens, finished: heard.append((tokens, finished)))  # fmt: skip
    flat = [ids for samples in out for ids in samples]
    assert len(flat) == 2 * len(prompts)
    lengths = Counter()
    for ids in flat:
        assert not set(ids[:-1]) & set(stop), "nothing follows a stop token"
        assert 1 <= len(ids) <= max_new and (ids[-1] in stop or len(ids) == max_new)
        lengths[len(ids)] += 1
    assert lengths[max_new] and len(lengths) > 5, "both ways to end occur"
    assert sum(t for t, _ in heard) == sum(map(len, flat))
    assert sum(f for _, f in heard) == len(flat)


def test_the_length_limit_may_coincide_with_a_stop_token(net):
    first = generate(net, [[1, 5]], [(0,)], stop=[], max_new=3, temperature=0)[0][0]
    for last in range(1, 4):
        if first[last - 1] not in first[: last - 1]:
            assert generate(net, [[1, 5]], [(0,)], stop=[first[last - 1]], max_new=last, temperature=0)[0][0] == first[:last]  # fmt: skip  # noqa: E501


def test_no_prompts_give_no_samples(net):
    assert generate(net, [], [], stop=[2], max_new=4) == []


def test_sampling_keeps_no_graph_and_leaves_gradients_on_for_its_consumer(net, monkeypatch):
    def spy(logits, *args):
        assert not torch.is_grad_enabled() and not logits.requires_grad
        return pick(logits, *args)

    monkeypatch.setattr(sample, "pick", spy)
    steps = 0
    for _ in stream(net, [[1, 5]], [(0,)], stop=[], max_new=3):
        assert torch.is_grad_enabled()
        steps += 1
    assert steps == 3 and torch.is_grad_enabled()


@pytest.mark.parametrize(
    "knobs",
    [{"top_p": 0.0}, {"top_p": 1.01}, {"top_p": -0.5}, {"temperature": -1}, {"max_new": 0}, {"n": 0},
     {"top_p": float("nan")}],
)  # fmt: skip
def test_knobs_out_of_range_are_refused(net, knobs):
    with pytest.raises(BadInput, match="temperature"):
        generate(net, [[1]], [(0,)], **{"stop": [], "max_new": 2} | knobs)


def test_a_prompt_too_long_for_the_context_is_named(cfg):
    small = random_net(replace(cfg, max_len=16))
    assert len(generate(small, [[1] * 4, [1] * 12], [(0,), (1,)], stop=[], max_new=4)[1][0]) == 4, "it just fits"
    with pytest.raises(BadInput, match=r"prompt 1 has 13 tokens.* 4 new.* 16"):
        generate(small, [[1] * 4, [1] * 13], [(0,), (1,)], stop=[], max_new=4)


# ---- one token


def nucleus(logits, temperature, top_p):
    """The distribution top-p sampling should have, by sorting in fp64: {id: probability}."""
    p = (logits.double() / temperature).softmax(-1)
    order = p.argsort(descending=True).tolist()
    kept, mass = [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += p[i].item()
    return {i: p[i].item() / mass for i in kept}


def distribution(logits, temperature, top_p, grid=40_001):
    """What pick() really draws from: the share of random numbers in [0, 1) that leads to each id.

    The first number of each token runs over a grid; so does the last, which draws from the sorted nucleus. Those
    between are random, and all four are independent of each other.
    """
    g = torch.Generator().manual_seed(0)
    u = torch.rand(grid, TRIES, generator=g)
    u[:, 0] = (torch.arange(grid) + 0.5) / grid
    u[:, -1] = u[torch.randperm(grid, generator=g), 0]
    drawn = pick(logits.expand(grid, -1), u, temperature, top_p)
    return {i: c / grid for i, c in Counter(drawn.tolist()).items()}


def shapes_of_logits():
    g = torch.Generator().manual_seed(0)
    r = torch.randn(300, generator=g)
    peaked = torch.zeros(300)
    peaked[17] = 12.0
    return {"random": r, "wide": 4 * r, "peaked": peaked, "flat": 0.01 * r, "low tail": torch.where(r > 1, r, -1e9)}


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
@pytest.mark.parametrize("shape", shapes_of_logits())
def test_pick_draws_from_the_explicit_nucleus(shape, top_p):
    logits = shapes_of_logits()[shape]
    for temperature in (0.7, 1.3):
        want = nucleus(logits, temperature, top_p)
        have = distribution(logits, temperature, top_p)
        assert have.keys() <= want.keys()
        spread = 0 if top_p == 1 else 5  # five deviations of 40,001 draws
        assert all(abs(have.get(i, 0) - p) < 1e-4 + spread * (p / 40_001) ** 0.5 for i, p in want.items())


@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_a_row_that_fails_in_all_tries_draws_from_the_sorted_nucleus(top_p):
    logits = torch.cat((torch.linspace(0, 3, 40), torch.full((400,), -4.0)))  # the tail is what a number near 1 draws
    u = torch.full((4001, TRIES), 1 - 2**-20)
    u[:, -1] = (torch.arange(4001) + 0.5) / 4001
    drawn = Counter(pick(logits.expand(4001, -1), u, 1.0, top_p).tolist())
    want = nucleus(logits, 1.0, top_p)
    assert len(want) < 40 and drawn.keys() == want.keys()
    assert all(abs(drawn[i] / 4001 - p) < 4e-4 for i, p in want.items())


def test_rows_are_picked_alike_alone_and_in_company():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(500, 200, generator=g) * torch.rand(500, 1, generator=g) * 8  # flat and peaked rows mixed
    u = torch.rand(500, TRIES, generator=g)
    together = pick(logits, u, 0.8, 0.5)
    alone = torch.cat([pick(logits[i : i + 1], u[i : i + 1], 0.8, 0.5) for i in range(500)])
    assert torch.equal(alone, together)


def test_the_token_that_crosses_p_is_kept_and_the_next_is_not():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert distribution(logits, 1.0, 0.6).keys() == {0, 1}
    assert distribution(logits, 1.0, 0.49).keys() == {0}
    assert distribution(logits, 1.0, 0.81).keys() == {0, 1, 2}
    have = distribution(logits, 1.0, 0.6)
    assert have[0] == pytest.approx(0.5 / 0.8, abs=1e-3)
    have = distribution(logits, 1.0, 1.0)
    assert have == pytest.approx({0: 0.5, 1: 0.3, 2: 0.15, 3: 0.05}, abs=1e-3)


def test_the_ends_of_the_unit_interval_pick_the_first_and_the_last_token_of_the_nucleus():
    logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
    below_one = torch.ones(1, TRIES).nextafter(torch.zeros(1))
    assert pick(logits, torch.zeros(1, TRIES), 1.0, 0.9).item() == 0
    assert pick(logits, torch.zeros(1, TRIES), 1.0, 0.7).item() == 1, "id 0 is not among the likeliest 0.7"
    assert pick(logits, below_one, 1.0, 0.9).item() == pick(logits, below_one, 1.0, 1.0).item() == 3
    u = torch.tensor([0.2, 0.25, 0.3])[:, None].expand(3, TRIES)
    equal = pick(torch.zeros(3, 4), u, 1.0, 1.0).tolist()
    assert equal[0] != equal[1] == equal[2], "each token owns its lower bound"


def test_temperature_zero_is_argmax_and_a_low_one_nearly():
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(2))
    u = torch.rand(50, TRIES, generator=torch.Generator().manual_seed(3))
    assert torch.equal(pick(logits, u, 0, 0.9), logits.argmax(-1))
    assert torch.equal(pick(logits, u, 1e-4, 1.0), logits.argmax(-1))
    assert torch.equal(pick(logits, u, 1e-4, 0.9), logits.argmax(-1))
    assert not torch.equal(pick(logits, u, 1.0, 1.0), logits.argmax(-1))


@pytest.mark.parametrize("temperature, top_p", [(0, 0.9), (0.7, 0.9), (0.7, 1.0)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_of_logits_that_are_not_finite_are_marked(bad, temperature, top_p):
    logits = torch.zeros(4, 100)
    logits[2, 50] = bad
    drawn = pick(logits, torch.full((4, TRIES), 0.5), temperature, top_p).tolist()
    assert drawn[2] == -1 and min(drawn[:2] + drawn[3:]) >= 0


def test_damaged_weights_are_reported_by_the_sampler(cfg):
    broken = random_net(cfg)
    with torch.no_grad():
        broken.norm.weight[3] = float("nan")
    with pytest.raises(BadInput, match="not finite after prompt 0; its weights"):
        generate(broken, [[1, 2]], [(0,)], stop=[], max_new=2)


def test_of_many_prompts_the_one_behind_which_logits_fail_is_named(net, monkeypatch):
    real = sample.pick

    def fails_at_the_third_step(logits, *args):
        ids = real(logits, *args)
        return ids.masked_fill(ids == ids, -1) if len(logits) == 1 else ids

    prompts = [[1, 5], [1, 6, 7], [1, 8]]
    stop = sorted({ids[0] for i in (0, 1) for ids in generate(net, [prompts[i]], [(i,)], stop=[], max_new=1)[0]})
    monkeypatch.setattr(sample, "pick", fails_at_the_third_step)  # then only prompt 2 is left
    with pytest.raises(BadInput, match="after prompt 2;"):
        generate(net, prompts, [(0,), (1,), (2,)], stop=stop, max_new=3)


# ---- slots


def test_a_freed_slot_goes_to_the_queue_at_once_and_no_more_than_batch_are_taken(net, tok):
    prompts, seen = [tok.chat(f"Number {i}") for i in range(40)], []
    keys = [(i,) for i in range(40)]
    stop = list(range(0, net.cfg.vocab_size, 12))
    for rows, _ in stream(net, prompts, keys, stop=stop, max_new=24, temperature=1.0, top_p=1.0, batch=8):
        assert len(set(rows)) == len(rows) <= 8
        seen.append(len(rows))
    tokens = sum(seen)
    busy = seen[: len(seen) - 24]  # the queue is empty in the last steps
    assert sum(busy) / len(busy) > 7, "most slots are in use while there is a queue"
    assert len(seen) < tokens / 8 + 30


def test_samples_that_go_on_for_long_keep_hardly_a_slot_idle(net, monkeypatch):
    """Kept once for its samples, a prompt holds its place until the last of them has ended; copied, it does not."""
    rng, fed, taken = random.Random(0), [], {}
    ends = {(i, k): min(60, int(rng.expovariate(1 / 12))) for i in range(96) for k in range(4)}

    def uniforms(key, count):
        u = torch.rand(count)
        u[TRIES * ends[key]] = 2
        return u

    real = sample.Decoder.__call__
    monkeypatch.setattr(sample, "pick", lambda logits, u, *_: torch.where(u[:, 0] == 2, 2, 7))
    monkeypatch.setattr(sample, "uniforms", uniforms)
    monkeypatch.setattr(sample.Decoder, "__call__", lambda d, t, c: fed.append(t.shape) or real(d, t, c))
    for long in (1, 1000):
        monkeypatch.setattr(sample, "LONG", long)
        fed.clear()
        out = generate(
            net, [[1, 5 + i, 6] for i in range(96)], [(i,) for i in range(96)], n=4, stop=[2], max_new=61, batch=64
        )
        assert {(i, k): len(ids) - 1 for i, samples in enumerate(out) for k, ids in enumerate(samples)} == ends
        taken[long] = sum(rows for rows, T in fed if T == 1)
    assert taken[1] < 1.03 * taken[1000]


def test_random_numbers_and_prompts_are_read_when_their_turn_comes(net, monkeypatch):
    asked, real = [], sample.uniforms
    monkeypatch.setattr(sample, "uniforms", lambda key, count: asked.append(key) or real(key, count))
    made = stream(net, [[1, 5 + i % 100] for i in range(100_000)], [(i,) for i in range(100_000)], stop=[],
                  max_new=4, batch=8)  # fmt: skip
    next(made)
    assert len(asked) <= 16


def test_fewer_slots_are_taken_and_said_where_memory_is_short(net, monkeypatch):
    prompts, keys, knobs = [[1, 5 + i] for i in range(9)], [(i,) for i in range(9)], {"stop": [], "max_new": 4}
    want = generate(net, prompts, keys, **knobs)
    asked = []
    monkeypatch.setattr(sample.Slots, "affordable", lambda slots, count: asked.append(count) or 3)
    most = max(len(rows) for rows, _ in stream(net, prompts, keys, agree=lambda fit: fit - 1, **knobs))
    assert asked == [9] and most == 2
    assert generate(net, prompts, keys, **knobs) == want
    monkeypatch.undo()
    with torch.no_grad():
        for n, length in ((1, 40), (4, 3), (4, 40)):  # of four samples of a long prompt, its 40 columns are held once
            decoder = sample.Decoder(net, 8)
            queue = sample.arrivals(decoder, [[5] * length, [6] * length], [(0,), (1,)], n, 100)
            slots = sample.Slots(decoder, queue, n, 100)
            with pytest.warns(
                UserWarning, match=r"memory holds keys and values of \d+ samples side by side, not 10{9}"
            ):
                few = slots.affordable(10**9)
            column = 2 * net.cfg.layers * net.cfg.kv_heads * net.cfg.head_dim * 4  # keys and values in fp32
            each = 100 + sample.GROW + (length if n == 1 or length < sample.LONG else length * 2 / n)
            room = sample.free_memory(decoder.device) / 2
            assert 0.8 * room < few * column * each < 1.2 * room
            slots.open(4)
            slots.fill()
            assert slots.shared == (n > 1 and length >= sample.LONG)
            assert slots.cache.columns == (0 if slots.shared else length) + sample.GROW
            assert not slots.shared or slots.prompts.k[0].shape[:3] == (2, net.cfg.kv_heads, length)


def test_prompts_longer_than_a_piece_are_read_in_pieces(net, tok, lists, monkeypatch):
    prompts = lists["common"] + lists["nested"]
    keys, knobs = [(i,) for i in range(len(prompts))], {"stop": [2], "max_new": 6, "temperature": 0.8}
    want = generate(net, prompts, keys, **knobs)
    sizes, real = [], sample.Decoder.__call__
    monkeypatch.setattr(sample, "PIECE", 12)
    monkeypatch.setattr(sample.Decoder, "__call__", lambda m, t, c: sizes.append(t.numel()) or real(m, t, c))
    assert generate(net, prompts, keys, **knobs) == want
    assert max(sizes) <= 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_decoder_computes_what_its_model_does_and_leaves_it_alone(cfg, rows, dtype, monkeypatch):
    net = random_net(cfg, std=0.1).to(dtype).eval()
    tokens, tolerance = torch.arange(rows * 7).view(rows, 7) + 5, {"atol": 1e-5 if dtype == torch.float32 else 0.05}
    places = {name: set(vars(module)) for name, module in net.named_modules()}
    with torch.no_grad():
        decoder, want = sample.Decoder(net, rows), net(tokens)[:, -1]
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            pytest.skip("this processor has no products in bf16")
        assert len(decoder.products) == 4 * cfg.layers + 1
        plain = []
        for module in net.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda module, _: plain.append(module))
        torch.testing.assert_close(decoder(tokens, net.new_cache(rows, 7)), want, rtol=0, **tolerance)
        assert len(plain) == 2 * cfg.layers + 1, "those of q, k, v, gate and up are not called"
        assert {name: set(vars(module)) for name, module in net.named_modules()} == places
        assert torch.equal(net(tokens)[:, -1], want)
        monkeypatch.setattr(sample, "free_memory", lambda device: 1000)
        short = sample.Decoder(net, rows)
        assert not short.products and torch.allclose(short(tokens, net.new_cache(rows, 7)), want, rtol=0, **tolerance)


def test_what_all_prompts_begin_with_is_read_once(net, tok, monkeypatch):
    common = tok.chat("Where does the otter live? " * 3)
    prompts = [common + [7 + i] for i in range(20)]
    fed, real = [], sample.Decoder.__call__
    monkeypatch.setattr(sample.Decoder, "__call__", lambda m, t, c: fed.append(t.numel()) or real(m, t, c))
    out = generate(net, prompts, [(i,) for i in range(20)], stop=[], max_new=1, n=3, temperature=0)
    assert sum(fed) == len(common) + 20
    with torch.no_grad():
        assert [ids[0][0] for ids in out] == [net(torch.tensor([p]))[0, -1].argmax().item() for p in prompts]


def test_bfloat16_draws_what_its_own_probabilities_say(cfg):
    """Two tokens deep, 4,000 samples; a fixed seed, so this cannot fail by chance."""
    half, prompt, n = random_net(cfg, std=0.12).to(torch.bfloat16).eval(), [1, 40, 41, 42], 4000
    drawn = generate(half, [prompt], [("bf16",)], n=n, stop=[], max_new=2, batch=500, temperature=0.7, top_p=0.9)[0]
    with torch.no_grad():
        first = nucleus(half(torch.tensor([prompt]))[0, -1], 0.7, 0.9)
        likely = max(first, key=first.get)
        second = nucleus(half(torch.tensor([[*prompt, likely]]))[0, -1], 0.7, 0.9)
    behind = [b for a, b in drawn if a == likely]
    for counts, want in ((Counter(a for a, _ in drawn), first), (Counter(behind), second)):
        total = sum(counts.values())
        assert all(abs(counts[i] / total - p) < 0.01 + 5 * (p / total) ** 0.5 for i, p in want.items())
        assert sum(counts[i] for i in want) > 0.98 * total  # a cached logit may round to the other side of the edge


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (1.5, 0.5)])
def test_first_tokens_come_as_often_as_their_probabilities_say(net, temperature, top_p):
    """10,000 samples of one prompt through the whole machinery; a fixed seed, so this cannot fail by chance."""
    prompt, n = [1, 40, 41, 42], 10_000
    drawn = [ids[0] for ids in generate(net, [prompt], [("chi",)], n=n, stop=[], max_new=1, batch=n,
                                        temperature=temperature, top_p=top_p)[0]]  # fmt: skip
    with torch.no_grad():
        want = nucleus(net(torch.tensor([prompt]))[0, -1], temperature, top_p)
    have = Counter(drawn)
    assert have.keys() <= want.keys() and len(want) > 3
    common = [i for i, p in want.items() if n * p >= 5]
    observed = [have[i] for i in common]
    expected = [n * want[i] for i in common]
    if rest := n - sum(expected):
        observed, expected = [*observed, n - sum(observed)], [*expected, rest]
    scale = sum(observed) / sum(expected)
    assert stats.chisquare(observed, [e * scale for e in expected]).pvalue > 0.01


# ---- random numbers


def test_uniforms_depend_on_the_key_alone():
    torch.manual_seed(1)
    random.seed(1)
    a = uniforms((0, "M1", "responses", 7, 2), 50)
    torch.manual_seed(2)
    torch.rand(10)
    assert torch.equal(uniforms((0, "M1", "responses", 7, 2), 50), a)
    assert torch.equal(uniforms((0, "M1", "responses", 7, 2), 20), a[:20]), "a longer row only goes on"
    others = [(1, "M1", "responses", 7, 2), (0, "M2", "responses", 7, 2), (0, "M1", "votes", 7, 2),
              (0, "M1", "responses", 8, 2), (0, "M1", "responses", 7, 3), (0, "M1", "responses", "7", 2),
              (0, "M1", "responses", 72), (0, "M1", "responses", 7)]  # fmt: skip
    for key in others:
        assert not torch.equal(uniforms(key, 50), a)


def test_uniforms_are_uniform_within_and_across_keys():
    within = uniforms(("w",), 20_000)
    across = torch.stack([uniforms(("a", i, k), 2) for i in range(1000) for k in range(4)])
    for drawn in (within, across[:, 0], across[:, 1]):
        assert drawn.min() >= 0 and drawn.max() < 1
        assert stats.kstest(drawn.numpy(), "uniform").pvalue > 0.01
    assert abs(stats.pearsonr(across[:, 0], across[:, 1]).statistic) < 0.05
    assert abs(stats.pearsonr(across[:-1, 0], across[1:, 0]).statistic) < 0.05


# ---- candidates


def test_responses_are_marked_truncated_iff_they_do_not_end_in_eos(cfg, tok):
    eager = random_net(cfg)
    with torch.no_grad():
        eager.lm_head.weight[tok.eos] *= 1.5  # ends early often, and not always
    rows = [{"id": i, "prompt": p} for i, p in enumerate(["What is the fox?", "the owl", "Compare", "wolf?"])]
    out = respond(eager, tok, rows, key=(0, "M1"), n=4, max_new=12, temperature=1.0, top_p=1.0)
    assert [(r["id"], r["k"]) for r in out] == [(i, k) for i in range(4) for k in range(4)]
    assert {r["truncated"] for r in out} == {True, False}
    for r in out:
        assert r["truncated"] == (r["tokens"][-1] != tok.eos)
        assert tok.eos not in r["tokens"][:-1]
        assert len(r["tokens"]) == 12 if r["truncated"] else len(r["tokens"]) <= 12
        text = tok.decode([t for t in r["tokens"] if t != tok.eos])
        assert r["response"] == text.strip()
    ended = next(r for r in out if r["id"] == 0 and not r["truncated"])
    limit = {"key": (0, "M1"), "n": 4, "temperature": 1.0, "top_p": 1.0, "max_new": len(ended["tokens"])}
    assert ended in respond(eager, tok, rows[:1], **limit), "an end at the very limit is an end"
    again = respond(eager, tok, rows[2:3], key=(0, "M1"), n=4, max_new=12, temperature=1.0, top_p=1.0)
    assert again == out[8:12], "alone as among others"
    assert respond(eager, tok, rows[:1], key=(1, "M1"), n=4, max_new=12, temperature=1.0, top_p=1.0) != out[:4]


def test_the_defaults_are_the_papers_settings(net, tok, monkeypatch):
    seen = {}

    def spy(logits, u, temperature, top_p):
        seen.update(temperature=temperature, top_p=top_p)
        return pick(logits, u, temperature, top_p)

    monkeypatch.setattr(sample, "pick", spy)
    assert len(respond(net, tok, [{"id": 0, "prompt": "Hi"}], key=(0,), max_new=2)) == 4
    assert seen == {"temperature": 0.7, "top_p": 0.9}


# ---- the filter of new prompts


def lcs(a, b):
    """The textbook table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_equals_the_textbook_table_on_random_word_lists():
    rng = random.Random(0)
    for _ in range(1500):
        letters = "abcdefghij"[: rng.randint(1, 10)]
        a, b = ([rng.choice(letters) for _ in range(rng.randint(0, rng.choice([3, 12, 80])))] for _ in range(2))
        want = 2 * lcs(a, b) / (len(a) + len(b)) if a or b else 0.0
        assert rouge_l(a, b) == pytest.approx(want)


def test_rouge_l_by_hand():
    a, b = ["the", "cat", "sat", "on", "the", "mat"], ["the", "cat", "lay", "on", "a", "mat"]
    assert rouge_l(a, b) == pytest.approx(2 * 4 / 12)
    assert rouge_l(a, a) == 1.0 and rouge_l(a, []) == 0.0 and rouge_l([], []) == 0.0
    assert rouge_l(a, list(reversed(a))) < 0.6


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "too short"),
        ("What is this?", "too short"),
        ("What is this now?", None),
        ("word " * 150, None),
        ("word " * 151, "too long"),
        ("- List the four winds", "odd first character"),
        ("Über den Wolken fliegt er", "odd first character"),
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
    assert unfit(text.strip()) == reason


SEEDS = [f"Where does animal number {i} {verb} today?" for i, verb in enumerate(
    ["sleep", "hunt", "hide", "swim", "sing", "run", "eat", "drink", "fly", "climb"])]  # fmt: skip
TEMPLATE = "New questions:\n1. {1}\n2. {2}\n3. {3}\n4. {4}\n5. {5}\n6. {6}\n7. {7}\n8. {8}\n9."


def fresh(number: int) -> str:
    """A prompt unlike every other one."""
    rng = random.Random(number)
    return "Tell " + " ".join("".join(rng.choices("bcdfgklmnprstaeiou", k=6)) for _ in range(6))


class Writer:
    """A scripted writer: answers request after request from a list, then with fresh prompts; remembers what it saw."""

    def __init__(self, tok, script=(), end=None):
        self.tok, self.script, self.end = tok, list(script), [tok.eos] if end is None else end
        self.seen, self.keys, self.waves = [], [], []

    def __call__(self, ids, keys):
        self.seen += [self.tok.decode(i[1:]) for i in ids]
        assert all(i[0] == self.tok.bos and i.count(self.tok.bos) == 1 for i in ids)
        self.waves.append(len(ids))
        out = []
        for key in keys:
            number = len(self.keys)
            self.keys.append(key)
            text = self.script[number] if number < len(self.script) else fresh(number)
            out.append(text if isinstance(text, list) else self.tok.encode(text) + self.end)
        return out


def examples(request: str) -> list[str]:
    found = re.findall(r"^\d\. (.+)$", request, re.MULTILINE)
    assert len(found) == 8
    return found


def test_requests_hold_six_seeds_and_two_accepted_prompts_after_the_first_wave(tok):
    write = Writer(tok)
    new, tally = propose(write, tok, TEMPLATE, SEEDS, 40, key=(0,), wave=10)
    assert len(new) == 40 and tally["accepted"] == 40
    places = Counter()
    for i, request in enumerate(write.seen):
        made = [e for e in examples(request) if e in new]
        assert len(set(examples(request))) == 8, "no example twice"
        assert sum(e in SEEDS for e in examples(request)) == 8 - len(made)
        assert len(made) == (0 if i < 10 else 2)
        assert all(new.index(e) < 10 * (i // 10) for e in made), "only prompts accepted before"
        places.update(examples(request).index(e) for e in made)
    assert len(places) == 8, "in random order"


def test_the_length_of_a_request_does_not_grow_over_calls(tok):
    write, seeds, taken = Writer(tok), list(SEEDS), []
    for call in range(4):
        taken += propose(write, tok, TEMPLATE, seeds, 12, key=(call,), wave=4, taken=taken)[0]
    assert len(taken) == 48 and seeds == SEEDS
    assert all(len(examples(r)) == 8 and len(r.split("\n")) == 10 for r in write.seen)


def test_every_bad_prompt_is_dropped_and_counted_by_its_reason(tok):
    taken, held_out = ["Tell me which boots the ferryman wore", fresh(1001)], ["Why is the evening sky so red? \n"]
    good = fresh(1002)
    near = " ".join(good.split()[:-1] + ["otherwise"])  # six of seven words in common
    part = " ".join(good.split()[:4])  # rouge 8/11
    double = good + " " + " ".join(fresh(1003).split()[1:]) + " indeed"  # rouge 14/21
    script = {
        SEEDS[3]: "too similar",
        SEEDS[4].upper(): "too similar",
        taken[0]: "too similar",
        taken[1]: "too similar",
        held_out[0].strip(): "held out",
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
    write = Writer(tok, [*script, tok.encode("Tell me all that you know about") + [tok.encode("a")[-1]]])
    new, tally = propose(write, tok, TEMPLATE, SEEDS, 20, key=(0,), taken=taken, held_out=held_out, wave=5)
    want = Counter(script.values()) + Counter(["cut by the length limit"])
    assert {k: v for k, v in tally.items() if v and k != "accepted"} == {k: v for k, v in want.items() if k != "accepted"}  # fmt: skip  # noqa: E501
    assert tally["accepted"] == len(new) == len(set(new)) == 20
    assert good in new and double in new
    assert not set(new) & {*SEEDS, *taken, held_out[0].strip(), near, part}


def test_no_prompt_comes_twice_even_where_similar_ones_are_allowed(tok):
    taken, made = [fresh(2001)], fresh(2002)
    write = Writer(tok, [SEEDS[0], taken[0], made, made])
    new, tally = propose(write, tok, TEMPLATE, SEEDS, 5, key=(0,), taken=taken, rouge=1.0)
    assert len(set(new)) == 5 and made in new
    assert not set(new) & {*SEEDS, *taken} and sum(tally.values()) == 5 + 3


def test_the_first_line_of_what_is_written_is_the_new_prompt(tok):
    newline = tok.encode("a\n")[-1]
    assert newline in tok.newlines
    one, two = fresh(1), fresh(2)
    write = Writer(tok, [tok.encode(f"  {one} ") + [newline], tok.encode(f"{two}\nAnswer: no") + [tok.eos]])
    new, _ = propose(write, tok, TEMPLATE, SEEDS, 2, key=(0,))
    assert new == [one, two]


def test_equal_keys_give_equal_requests_and_other_keys_others(tok):
    runs = []
    for key in [(0, "a"), (0, "a"), (1, "a")]:
        write = Writer(tok)
        runs.append((propose(write, tok, TEMPLATE, SEEDS, 15, key=key, wave=6), write.seen, write.keys))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]
    assert len(set(runs[0][2])) == len(runs[0][2]), "every request has random numbers of its own"
    assert not set(runs[0][2]) & set(runs[2][2])


def test_braces_in_seed_prompts_survive(tok):
    write = Writer(tok)
    seeds = [f"What does {{{i}}} mean in template {i}?" for i in range(1, 9)]
    propose(write, tok, TEMPLATE, seeds, 1, key=(0,))
    assert sorted(examples(write.seen[0])) == sorted(seeds)


def test_examples_share_the_room_and_a_longer_prompt_is_never_shown(tok):
    long = "Tell " + "x1y2 " * 100
    write = Writer(tok)
    new, _ = propose(write, tok, "{1}\n{2}\nnext:", [*SEEDS, long], 30, key=(0,), room=150)
    assert len(new) == 30 and all(len(tok.raw(r)) <= 150 for r in write.seen)
    assert not any("x1y2" in r for r in write.seen)
    with pytest.raises(BadInput, match=r"0 of \d+ seed prompts fit"):
        propose(Writer(tok), tok, TEMPLATE, SEEDS, 5, key=(0,), room=3)


def test_a_writer_that_repeats_itself_is_given_up_after_bounded_attempts(tok):
    write = Writer(tok, [fresh(0)] * 10_000)
    with pytest.raises(BadInput, match=r"only 1 of 7 .*too similar") as e:
        propose(write, tok, TEMPLATE, SEEDS, 7, key=(0,), attempts=3, wave=4)
    assert "\n" not in str(e.value)
    assert 21 <= len(write.keys) <= 21 + 4 and max(write.waves) <= 4


@pytest.mark.parametrize(
    "template, seeds", [("no place", SEEDS), (TEMPLATE, SEEDS[:7]), ("{1} {3}", SEEDS), ("", SEEDS)]
)
def test_a_template_that_cannot_be_filled_is_refused(tok, template, seeds):
    with pytest.raises(BadInput, match="template"):
        propose(Writer(tok), tok, template, seeds, 1, key=(0,))


# ---- in the terminal


def test_the_streamed_answer_equals_the_generated_one(net, tok, capsys):
    knobs = {"max_new": 30, "temperature": 1.0, "top_p": 0.95}
    for key in range(5):
        text = say(net, tok, ["Tell me", "no", "why?"], (key,), **knobs)
        assert capsys.readouterr().out == text + "\n"
        want = generate(net, [tok.chat("Tell me", "no", "why?")], [(key,)], stop=[tok.eos], **knobs)[0][0]
        whole = tok.decode([i for i in want if i != tok.eos])
        assert whole.rstrip("\ufffd").startswith(text.rstrip("\ufffd")) and len(text) >= len(whole.rstrip("\ufffd"))


def command(*args):
    return subprocess.run([sys.executable, "sample.py", *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def test_the_command_answers_one_prompt_with_the_sample_its_seed_names(shared):
    folder = shared / "stories260K" / "hf"
    made = command(
        folder, "Once upon a time", "--temperature", "0.8", "--top-p", "0.95", "--max-new", "20", "--seed", "7"
    )
    net, tok = load(folder)
    knobs = {"max_new": 20, "temperature": 0.8, "top_p": 0.95}
    want = generate(net, [tok.chat("Once upon a time")], [(7, 0)], stop=[tok.eos], **knobs)[0][0]
    assert made.returncode == 0, made.stderr
    assert made.stdout == tok.decode([i for i in want if i != tok.eos]) + "\n"


def test_the_chat_remembers_its_turns_until_an_empty_line(shared, monkeypatch, capsys):
    lines, seen = iter(["Once there was", "and then", "", "Again"]), []

    def type_in(mark):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    def spy(model, prompts, *args, **knobs):
        seen.extend(prompts)
        return stream(model, prompts, *args, **knobs)

    monkeypatch.setattr("builtins.input", type_in)
    monkeypatch.setattr(sample, "stream", spy)
    folder = shared / "stories260K" / "hf"
    monkeypatch.setattr(sys, "argv", ["sample.py", str(folder), "--max-new", "5"])
    sample.main()
    _, first, second, third, _ = capsys.readouterr().out.split("\n", 4)
    tok = load(folder)[1]
    assert seen == [tok.chat("Once there was"), tok.chat("Once there was", first, "and then"), tok.chat("Again")]
    assert second and third


def test_a_chat_that_outgrows_the_context_begins_anew_with_the_line_at_hand(shared, monkeypatch, capsys):
    seen, folder = [], shared / "stories260K" / "hf"
    net, tok = load(folder)
    lines = iter(["Once there was a dog and " * 4 + str(n) for n in range(12)])
    monkeypatch.setattr("builtins.input", lambda mark: next(lines))
    monkeypatch.setattr(sample, "say", lambda model, tok, turns, *_, **__: seen.append(list(turns)) or "So it was.")
    with pytest.raises(StopIteration):
        sample.chat(net, tok, 0, max_new=60, temperature=1.0, top_p=1.0)
    assert len(seen) == 12 and all(turns[-1].endswith(f" {n}") for n, turns in enumerate(seen))
    lengths = [len(tok.chat(*turns)) + 60 for turns in seen]
    assert max(lengths) <= net.cfg.max_len and [len(turns) for turns in seen].count(1) > 1
    assert capsys.readouterr().out.count("outgrown the context of 512 tokens") == [len(t) for t in seen].count(1) - 1


def test_a_line_that_cannot_be_answered_does_not_end_a_chat(net, tok, monkeypatch, capsys):
    lines, said = iter(["Hi", "the owl " * 400, "\udcff", "Hi"]), []
    monkeypatch.setattr("builtins.input", lambda mark: next(lines))
    real = sample.say
    monkeypatch.setattr(sample, "say", lambda *args, **knobs: said.append(real(*args, **knobs)) or said[-1])
    with pytest.raises(StopIteration):
        sample.chat(net, tok, 0, max_new=5, temperature=0, top_p=1.0)
    out = capsys.readouterr().out
    assert len(said) == 2 and said[0] == said[1] and out.count(": a new chat begins)") == 2
    assert "more than the context of 512" in out and "half of a surrogate pair" in out


@pytest.mark.parametrize(
    "args, message",
    [(["Hi", "--top-p", "0"], "top-p"), (["Hi " * 400], "context"), (["Hi", "--max-new", "0"], "max_new")],
)
def test_the_command_refuses_what_it_cannot_do(shared, monkeypatch, args, message):
    monkeypatch.setattr(sys, "argv", ["sample.py", str(shared / "stories260K" / "hf"), *args])
    with pytest.raises(BadInput, match=message):
        sample.main()


def test_the_command_reports_bad_input_in_one_line_and_with_exit_status_1():
    made = command("/nowhere", "Hi")
    assert made.returncode == 1 and made.stdout == ""
    assert made.stderr.startswith("error: /nowhere") and made.stderr.count("\n") == 1


# ---- files of prompts in, files of answers out

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Tell me about the owl", "And the {wolf}?"]},
    {"question_id": 111, "category": "math", "turns": ["Where does the otter live?", "Why?"]},
    {"question_id": 141, "category": "stem", "turns": ["Compare the bear with the seal."]},
]
ASKED = {"max_new": 12, "top_p": 0.95, "batch": 2}


def test_the_second_turn_of_a_question_sees_the_first_and_its_answer(net, tok):
    (done,) = answer(net, tok, QUESTIONS, key=(3,), temperature=None, **ASKED)
    assert [len(q["responses"]) for q in done] == [2, 2, 1]
    for i, (q, t) in enumerate(zip(done, (0.7, 0.0, 0.1), strict=True)):  # as FastChat does for these categories
        said = []
        for turn, text in enumerate(q["turns"]):
            said.append(text)
            ids = generate(
                net, [tok.chat(*said)], [(3, turn, i)], stop=[tok.eos], max_new=12, temperature=t, top_p=0.95
            )
            whole = ids[0][0]
            said.append(tok.decode([i for i in whole if i != tok.eos]).strip())
            assert (q["responses"][turn], q["truncated"][turn]) == (said[-1], whole[-1] != tok.eos)


def test_a_temperature_that_is_given_counts_for_all_categories(net, tok):
    (greedy,) = answer(net, tok, QUESTIONS, key=(3,), temperature=0.0, **ASKED)
    for q in greedy:
        want = generate(net, [tok.chat(q["turns"][0])], [()], stop=[tok.eos], max_new=12, temperature=0)[0][0]
        assert q["responses"][0] == tok.decode([i for i in want if i != tok.eos]).strip()


def test_ctrl_c_keeps_the_batches_that_are_answered(net, tok, tmp_path, monkeypatch):
    calls, real = [], sample.respond

    def interrupted(*args, **knobs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **knobs)

    rows = [{"turns": [f"Number {i}"]} for i in range(10)]
    whole = [*answer(net, tok, rows, key=(0,), temperature=1.0, max_new=4, top_p=1.0, batch=1)]
    assert [len(group) for group in whole] == [4, 4, 2]
    monkeypatch.setattr(sample, "respond", interrupted)
    monkeypatch.setattr(sample, "load_here", lambda folder: (net, tok))
    asked, out = tmp_path / "asked.json", tmp_path / "said.jsonl"
    asked.write_text(json.dumps([{"prompt": q["turns"][0]} for q in rows]))
    flags = ["--batch", "1", "--temperature", "1", "--top-p", "1", "--max-new", "4"]
    monkeypatch.setattr(sys, "argv", ["sample.py", "M", "--prompts", str(asked), "--out", str(out), *flags])
    with pytest.raises(SystemExit, match=r"interrupted: .*said.jsonl has the first 8 of 10 answers"):
        sample.main()
    assert out.read_text() == as_file([*whole[0], *whole[1]], "M", "asked", ".jsonl")
    out.unlink()
    calls[:] = [1]
    monkeypatch.setattr(sample, "as_file", lambda *_: sys.exit("the file was about to be written"))  # after one group
    with pytest.raises(SystemExit, match="about to be written"):
        sample.main()
    assert len(calls) == 2


def test_a_question_that_leaves_no_room_is_named_before_any_is_answered(net, tok, monkeypatch):
    monkeypatch.setattr(sample, "respond", None)
    long = {"question_id": 1, "turns": ["Hi", "the owl " * 60]}
    with pytest.raises(BadInput, match=r"^prompt 2 may need \d+ tokens with its answers, more than the context of 512"):
        next(answer(net, tok, [QUESTIONS[0], long], key=(), temperature=None, **ASKED | {"max_new": 200}))


READ = {
    "alpaca.json": ('[{"instruction": "Why?", "output": "x", "dataset": "koala"}]', [["Why?"]]),
    "rows.jsonl": ('{"prompt": "a"}\n\n{"instruction": "b{}"}\n', [["a"], ["b{}"]]),
    "question.jsonl": ('{"question_id": 1, "category": "math", "turns": ["a", "b"]}\n', [["a", "b"]]),
}


@pytest.mark.parametrize("name", READ)
def test_prompt_files_of_all_shapes_are_read(tmp_path, name):
    text, turns = READ[name]
    (tmp_path / name).write_text(text)
    assert [q["turns"] for q in read_questions(tmp_path / name)] == turns


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.json", "[]", "holds no prompts"),
        ("a.json", "{}", "not a JSON list"),
        ("a.json", '["Why?"]', "row 1 has no text"),
        ("a.json", '[{"prompt": "a"}, {"prompt": null}]', "row 2 has no text"),
        ("a.jsonl", '{"prompt": 7}', "row 1 has no text"),
        ("a.jsonl", '{"turns": "abc"}', "row 1 has no text"),
        ("a.jsonl", '{"turns": ["a", " "], "question_id": 1}', "row 1 has no text"),
        ("a.jsonl", '{"turns": ["a", "b"]}', "row 1 has 2 turns and no question_id"),
        ("a.jsonl", "", "holds no rows"),
        ("gone.jsonl", None, "not found"),
        ("gone.json", None, "not found"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=re.escape(str(tmp_path / name)) + ".*" + message):
        read_questions(tmp_path / name)


def test_files_of_answers_have_the_shapes_their_readers_want():
    done = [{"turns": ["Why?"], "responses": ["So é"], "truncated": [False], "dataset": "koala"},
            {"turns": ["Who?"], "responses": ["I"], "truncated": [True]}]  # fmt: skip
    assert json.loads(as_file(done, "M3", "own", ".json")) == [
        {"instruction": "Why?", "output": "So é", "generator": "M3", "dataset": "koala"},
        {"instruction": "Who?", "output": "I", "generator": "M3", "dataset": "own"},
    ]
    lines = as_file(done, "M3", "own", ".jsonl").splitlines()
    assert [json.loads(x) for x in lines] == [{"prompt": "Why?", "response": "So é", "truncated": False},
                                              {"prompt": "Who?", "response": "I", "truncated": True}]  # fmt: skip
    mt = [q | {"responses": ["a"] * len(q["turns"]), "truncated": [False] * len(q["turns"])} for q in QUESTIONS]
    rows = [json.loads(x) for x in as_file(mt, "M3", "own", ".jsonl").splitlines()]
    assert [set(r) for r in rows] == [{"question_id", "answer_id", "model_id", "choices", "tstamp"}] * 3
    assert [r["question_id"] for r in rows] == [81, 111, 141] and len({r["answer_id"] for r in rows}) == 3
    assert rows[0]["model_id"] == "M3" and rows[0]["choices"] == [{"index": 0, "turns": ["a", "a"]}]


def test_the_command_answers_a_file_for_alpaca_eval(shared, tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"prompt": "Once upon a time"}\n{"prompt": "There was"}\n')
    folder, out = shared / "stories260K" / "hf", tmp_path / "alpaca_eval.json"
    made = command(folder, "--prompts", tmp_path / "asked.jsonl", "--out", out, "--max-new", "9", "--name", "tiny")
    assert made.returncode == 0, made.stderr
    rows = json.loads(out.read_text())
    assert [(r["instruction"], r["generator"], r["dataset"]) for r in rows] == [
        ("Once upon a time", "tiny", "asked"), ("There was", "tiny", "asked")]  # fmt: skip
    assert all(r["output"] for r in rows)


REFUSED = [
    ["--prompts", "x.jsonl"],
    ["--out", "x.json"],
    ["Hi", "--prompts", "x", "--out", "x.json"],
    ["--prompts", "x.jsonl", "--out", "x.csv"],
    ["--prompts", "x.jsonl", "--out", "nowhere/x.json"],
    ["--prompts", "x.jsonl", "--out", "x.json", "--batch", "0"],
]


@pytest.mark.parametrize("args", REFUSED)
def test_flags_that_do_not_go_together_are_refused(monkeypatch, args):
    monkeypatch.setattr(sys, "argv", ["sample.py", "folder", *args])
    with pytest.raises(SystemExit) as e:
        sample.main()
    assert e.value.code == 2


def test_questions_of_two_turns_do_not_become_an_alpaca_eval_file(monkeypatch, tmp_path):
    (tmp_path / "q.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n")
    monkeypatch.setattr(sys, "argv", ["sample.py", "f", "--prompts", str(tmp_path / "q.jsonl"), "--out", "x.json"])
    with pytest.raises(BadInput, match="several turns"):
        sample.main()
