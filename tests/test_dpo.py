"""dpo.py: numbers by hand, a model whose logits are known, what must leave the loss unmoved."""

import inspect
import math
import random
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from conftest import random_net, transformers_twin
from torch.nn.functional import log_softmax

import dpo
from dpo import (
    IGNORE,
    PackedBatch,
    collate,
    collate_pairs,
    dpo_loss,
    make_batches,
    micro_batches,
    num_tokens,
    pair_examples,
    preference_loss,
    sequence_logps,
    sft_loss,
)

LN2 = math.log(2)
_ = IGNORE


@pytest.fixture
def examples(tok):
    """Prompt and response ids of very different lengths; the last response has no end."""
    texts = {
        "Where does the otter live?": "In rivers.",
        "fox?": "The fox is red. It hunts at night.",
        "Hi": "",
    }
    finished = [(tok.chat(prompt), tok.response(text)) for prompt, text in texts.items()]
    cut = tok.response("The bear is black and")[:-1]
    return [*finished, (tok.chat("Compare the bear with the seal."), cut)]


@pytest.fixture
def pairs(tok):
    """Two pairs: prompt, chosen, rejected."""
    prompts = [tok.chat("Where does the otter live?"), tok.chat("fox")]
    chosen = [tok.response("In rivers, and it eats fish."), tok.response("It is red.")]
    rejected = [tok.response("No."), tok.response("The fox hunts mice in the woods.")]
    return list(zip(prompts, chosen, rejected, strict=True))


class Bigram(nn.Module):
    """The hand-made model: the logits after token i are row i of a table, whatever came before."""

    def __init__(self, table):
        super().__init__()
        self.one_hot = nn.Parameter(torch.eye(len(table)), requires_grad=False)
        self.lm_head = nn.Linear(len(table), len(table), bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(torch.as_tensor(table).T)

    def forward(self, tokens, context=None, readout=None):
        hidden = self.one_hot[tokens]
        return self.lm_head(hidden) if readout is None else readout(hidden, self.lm_head)


def random_table(size, seed, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(size, size, generator=generator) * scale).tolist()


def logp(table, i, j):
    """log p(j | i) of the bigram model."""
    return table[i][j] - math.log(sum(math.exp(x) for x in table[i]))


def response_logp(table, prompt, response):
    ids = prompt[-1:] + response
    return sum(logp(table, i, j) for i, j in zip(ids[:-1], ids[1:], strict=True))


# ---- ids -> tensors --------------------------------------------------------------------------


def test_targets_are_the_response_shifted_by_one_and_nothing_else():
    examples = [([1, 5, 6], [7, 8, 2]), ([1], [9, 2]), ([1, 3, 4, 5], [2])]
    tokens, targets, batch = collate(examples)
    assert tokens.tolist() == [[1, 5, 6, 7, 8, 1, 9, 1, 3, 4, 5]]
    assert targets.tolist() == [[_, _, 7, 8, 2, 9, 2, _, _, _, 2]]
    assert batch.segments == [(5, 0, 0), (2, 1, 0), (4, 2, 0)]  # end to end, nobody's prefix
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3]]
    assert tokens.dtype == targets.dtype == torch.int64


def test_a_prompt_is_read_once_and_its_last_token_before_every_response():
    tokens, targets, batch = collate([([1, 5, 6], [7, 8, 2], [9, 2]), ([1], [4, 2], [2], [3])])
    assert tokens.tolist() == [[1, 5, 6, 7, 8, 6, 9, 1, 4, 1, 1]]
    assert targets.tolist() == [[_, _, 7, 8, 2, 9, 2, 4, 2, 2, 3]]
    assert batch.segments == [(5, 0, 0), (2, 0, 2), (2, 2, 0), (1, 2, 0), (1, 2, 0)]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1, 0, 0]]


def test_every_response_token_is_a_target_once_and_eos_is_one_iff_the_response_ended(
    tok, examples, pairs
):
    tokens, targets, batch = collate(examples + pairs)
    responses = [response for prompt, *rest in examples + pairs for response in rest]
    num_prompt_tokens = sum(len(prompt) - 1 for prompt, *rest in examples + pairs)
    assert tokens.shape == targets.shape == (1, num_prompt_tokens + sum(map(len, responses)))
    segments = targets[0].split(batch.lengths)
    for response, segment in zip(responses, segments, strict=True):
        learned = segment[segment != IGNORE].tolist()
        assert learned == response
        assert learned.count(tok.eos) == (1 if response[-1] == tok.eos else 0)
    assert [response[-1] == tok.eos for prompt, response in examples] == [True, True, True, False]


def test_pairs_become_prompt_and_sampled_ids_with_their_reference(tok):
    rows = [
        {"id": 3, "prompt": "fox?", "chosen": "Red.", "rejected": "No."}
        | {"chosen_tokens": [5, 6, 2], "rejected_tokens": [7]}
        | {"reference_chosen": -1.5, "reference_rejected": -2.5},
        {"prompt": "Hi", "chosen_tokens": [8], "rejected_tokens": [9, 2]},
    ]
    examples = pair_examples(tok, rows)
    assert examples == [
        (tok.chat("fox?"), [5, 6, 2], [7], (-1.5, -2.5)),
        (tok.chat("Hi"), [8], [9, 2], (0.0, 0.0)),  # before the reference is there
    ]
    tokens, targets, batch, reference = collate_pairs(examples)
    without_reference = [example[:3] for example in examples]
    want_tokens, want_targets, want_batch = collate(without_reference)
    assert torch.equal(tokens, want_tokens) and torch.equal(targets, want_targets)
    assert batch.segments == want_batch.segments
    assert reference.tolist() == [-1.5, -2.5, 0, 0] and reference.dtype == torch.float32
    assert [num_tokens(e) for e in examples] == [
        len(tok.chat("fox?")) + 4,
        len(tok.chat("Hi")) + 3,
    ]
    assert num_tokens(([1, 2], [3, 4, 5])) == 5


def test_inputs_are_not_mutated(net, pairs):
    before = deepcopy(pairs)
    tokens, targets, batch = collate(pairs)
    inputs = tokens.clone(), targets.clone(), deepcopy(batch.segments)
    reference = torch.arange(4.0)
    preference_loss(net, tokens, targets, batch, reference)
    sft_loss(net, tokens, targets, batch)
    assert pairs == before
    assert torch.equal(tokens, inputs[0]) and torch.equal(targets, inputs[1])
    assert batch.segments == inputs[2]
    assert torch.equal(reference, torch.arange(4.0))


# ---- batches ---------------------------------------------------------------------------------


def random_examples(count, seed=0):
    """SFT examples of lengths up to 100."""
    rng = random.Random(seed)
    return [([1] * rng.randrange(1, 50), [1] * rng.randrange(50)) for _ in range(count)]


@pytest.mark.parametrize(
    "count, size, epochs", [(1, 4, 1), (21, 5, 3), (100, 3, 2), (64, 16, 2), (7, 100, 1)]
)
def test_every_example_is_seen_once_an_epoch(count, size, epochs):
    examples = random_examples(count)
    batches = make_batches(examples, size, epochs, (0, "SFT"))
    batches_an_epoch = math.ceil(count / size)
    assert len(batches) == epochs * batches_an_epoch
    for e in range(epochs):
        epoch = batches[e * batches_an_epoch : (e + 1) * batches_an_epoch]
        assert sorted(i for batch in epoch for i in batch) == list(range(count))
        sizes = sorted(map(len, epoch), reverse=True)
        assert sizes[:-1] == [size] * (batches_an_epoch - 1)  # at most one is smaller
    assert batches == make_batches(examples, size, epochs, (0, "SFT"))


def test_the_order_depends_on_the_key_and_the_epoch():
    examples = random_examples(100)
    batches = make_batches(examples, 10, 2, (0, "SFT"))
    assert batches != make_batches(examples, 10, 2, (1, "SFT"))
    assert batches != make_batches(examples, 10, 2, (0, "M1"))
    assert batches[:10] != batches[10:]
    assert batches[:10] == make_batches(examples, 10, 1, (0, "SFT")), "whatever follows"


def test_examples_of_like_length_share_a_batch():
    """Of a pair the longer response counts."""
    rng = random.Random(0)
    pairs = []
    for number in range(100):
        responses = [[1] * rng.randrange(5), [1] * number]
        rng.shuffle(responses)
        pairs.append(([1], *responses, (0.0, 0.0)))
    batches = make_batches(pairs, 10, 2, (0, "M2"))
    assert all(max(batch) - min(batch) < 20 for batch in batches)  # of 100 lengths
    assert batches[:10] != sorted(batches[:10], key=min), "batches are shuffled"


def deal(sizes, most_tokens, world):
    """What every process of a world is given."""
    return [micro_batches(sizes, most_tokens, rank, world) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_processes_share_a_batch_in_equally_many_micro_batches_within_the_budget(world):
    rng = random.Random(0)
    for count in (1, 2, 5, 8, 16, 17):
        sizes = {i: rng.randrange(3, 90) for i in rng.sample(range(99), count)}
        for most_tokens in (1, 60, 200, 10000):
            ranks = deal(sizes, most_tokens, world)
            assert len({len(parts) for parts in ranks}) == 1, (count, most_tokens)
            seen = []
            for part, weight in [part for parts in ranks for part in parts]:
                seen += part if weight else []
                assert part and weight in (0, 1) and set(part) <= sizes.keys()
                assert sum(sizes[i] for i in part) <= max(most_tokens, *sizes.values())
            assert sorted(seen) == sorted(sizes)  # each once
            assert ranks == deal(sizes, most_tokens, world)


@pytest.mark.parametrize("world, most_tokens", [(1, 500), (2, 500), (4, 300), (4, 10000)])
def test_micro_batches_are_few_and_processes_have_equally_much_to_do(world, most_tokens):
    rng = random.Random(1)
    sizes = {i: 20 + rng.randrange(10, 60) for i in range(64)}
    loads = []
    for parts in deal(sizes, most_tokens, world):
        loads.append([sum(sizes[i] for i in part) for part, _weight in parts])
    assert len(loads[0]) <= math.ceil(sum(sizes.values()) / world / most_tokens) + 1
    for at_once in zip(*loads, strict=True):  # they end together
        assert max(at_once) - min(at_once) <= max(sizes.values()) / 4


def test_one_long_example_does_not_cut_the_others_apart():
    sizes = {0: 1000} | dict.fromkeys(range(1, 60), 10)
    parts = [sorted(part) for part, _weight in micro_batches(sizes, 100, 0, 1)]
    assert parts == [[0], list(range(1, 60))]


# ---- attention of a packed batch -------------------------------------------------------------


def random_heads(batch, seed=0):
    """Queries of 4 heads, keys and values of 2, for every token of a packed batch."""
    generator = torch.Generator().manual_seed(seed)
    length = sum(batch.lengths)
    return [torch.randn(1, heads, length, 8, generator=generator) for heads in (4, 2, 2)]


def attend_by_hand(batch, q, k, v):
    """Token by token: the prefix that its segment has, and the segment up to the token."""
    k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
    starts = [sum(batch.lengths[:i]) for i in range(len(batch.lengths))]
    outputs = []
    for (length, prefix_of, prefix_len), start in zip(batch.segments, starts, strict=True):
        prefix_start = starts[prefix_of]
        prefix = list(range(prefix_start, prefix_start + prefix_len))
        for t in range(start, start + length):
            seen = prefix + list(range(start, t + 1))
            scores = q[:, :, [t]] @ k[:, :, seen].mT / q.shape[-1] ** 0.5
            outputs.append(scores.softmax(-1) @ v[:, :, seen])
    return torch.cat(outputs, dim=2)


def varlen_attn(q, k, v, query_ends, key_ends, most_queries, most_keys, *, window_size):
    """What torch documents of its kernel, causal from the lower right: a loop over segments and
    queries."""
    assert window_size == (-1, 0)
    assert q.shape[1] == k.shape[1] == v.shape[1]
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert most_queries == int(query_ends.diff().max())
    assert most_keys == int(key_ends.diff().max())
    assert query_ends[-1] == len(q) and key_ends[-1] == len(k) == len(v)
    out = torch.empty_like(q)
    query_spans = query_ends.unfold(0, 2, 1).tolist()
    key_spans = key_ends.unfold(0, 2, 1).tolist()
    for (first, end), (first_key, end_key) in zip(query_spans, key_spans, strict=True):
        for i in range(first, end):
            seen = slice(first_key, end_key - (end - 1 - i))
            scores = torch.einsum("hd,shd->hs", q[i], k[seen]) * q.shape[-1] ** -0.5
            out[i] = torch.einsum("hs,shd->hd", scores.softmax(-1), v[seen])
    return out


def test_both_ways_to_attend_are_those_of_the_definition(examples, pairs, monkeypatch):
    """The kernel for GPUs does not run here: its arguments are checked against what it
    promises."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    with_prefixes = [examples[3], *pairs, examples[2]]
    for packed in (with_prefixes, examples):
        _tokens, _targets, batch = collate(packed)
        heads = random_heads(batch)
        want = attend_by_hand(batch, *heads)
        for _layer in range(2):  # the second layer finds masks and indices ready
            torch.testing.assert_close(batch.attend(0, *heads), want, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(batch.attend_varlen(*heads), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("most_keys", [0, 20, 512])
def test_in_bfloat16_short_segments_are_attended_to_by_products(
    examples, pairs, monkeypatch, most_keys
):
    monkeypatch.setattr(dpo, "MAX_PLAIN_KEYS", most_keys)
    products = []
    baddbmm = torch.baddbmm

    def watched(mask, *factors, alpha):
        products.append(mask.shape[1])
        return baddbmm(mask, *factors, alpha=alpha)

    monkeypatch.setattr(torch, "baddbmm", watched)
    _tokens, _targets, batch = collate([examples[3], *pairs, examples[2]])
    heads = random_heads(batch)
    want = attend_by_hand(batch, *heads)
    out = batch.attend(0, *(t.bfloat16() for t in heads))
    torch.testing.assert_close(out.float(), want, atol=0.03, rtol=0.03)
    lengths = [length + prefix_len for length, _, prefix_len in batch.segments]
    assert products == [length for length in lengths if length <= most_keys]


def queries(is_cuda, dtype, head_dim=8):
    """As far as they must be known to choose a kernel."""
    return SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=(1, 4, 9, head_dim), device="cuda")


def test_the_kernel_for_gpus_runs_where_it_can(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert dpo.has_varlen_attention(queries(True, torch.bfloat16))
    assert not dpo.has_varlen_attention(queries(False, torch.bfloat16))
    assert not dpo.has_varlen_attention(queries(True, torch.float32))
    assert not dpo.has_varlen_attention(queries(True, torch.bfloat16, head_dim=12))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not dpo.has_varlen_attention(queries(True, torch.bfloat16))


# ---- log-probabilities -----------------------------------------------------------------------


def test_log_probabilities_are_read_one_position_before_their_token_and_summed():
    table = random_table(6, seed=0, scale=3)
    examples = [([1, 3], [4, 4, 2]), ([1, 5, 3], [2])]  # of two unequal lengths
    logps = sequence_logps(Bigram(table), *collate(examples))
    want = [logp(table, 3, 4) + logp(table, 4, 4) + logp(table, 4, 2), logp(table, 3, 2)]
    assert logps.tolist() == pytest.approx(want, rel=1e-5)


def logp_alone(logits_of, prompt, response):
    """log p(response | prompt) of one text, from the full logits."""
    logps = log_softmax(logits_of(torch.tensor([prompt + response]))[0].double(), -1)
    return sum(logps[len(prompt) - 1 + i, token] for i, token in enumerate(response))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(a, b, tolerance):
    """Equal names, and differences small against the largest entry of the tensor."""
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * b[name].abs().max(), name


def test_log_probabilities_and_gradients_equal_transformers_text_by_text(cfg, examples, pairs):
    """Also where responses share a prompt, and where one has no sibling."""
    net = random_net(cfg, std=0.15)
    three_responses = (*pairs[0], examples[1][1])
    ragged = [examples[3], *pairs, examples[2], three_responses]
    texts = [(prompt, response) for prompt, *rest in ragged for response in rest]
    weights = torch.linspace(-2, 3, len(texts))
    logps = sequence_logps(net, *collate(ragged))
    (logps * weights).sum().backward()
    twin = transformers_twin(net)
    want = torch.stack([logp_alone(lambda ids: twin(ids).logits, *text) for text in texts])
    (want * weights).sum().backward()
    torch.testing.assert_close(logps.double(), want, atol=1e-4, rtol=1e-5)
    their_gradients = {k.removeprefix("model."): g for k, g in gradients(twin).items()}
    assert_same_gradients(gradients(net), their_gradients, 1e-5)


def test_a_response_sees_nothing_of_its_neighbours(net, pairs):
    """What stands in one response changes no other one's number, to the last bit."""
    before = sequence_logps(net, *collate(pairs))
    (prompt, chosen, rejected), other = pairs
    changed_pairs = [(prompt, [7] * len(chosen), rejected), (prompt, chosen, [7] * len(rejected))]
    for number, pair in enumerate(changed_pairs):
        after = sequence_logps(net, *collate([pair, other]))
        assert [i for i in range(4) if after[i] != before[i]] == [number]


def test_the_company_of_others_moves_no_number(net, examples, pairs):
    together = sequence_logps(net, *collate(examples + pairs))
    alone = torch.cat([sequence_logps(net, *collate([e])) for e in examples + pairs])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("tokens_at_once", [1, 3, 7])
def test_chunks_of_the_vocabulary_projection_change_neither_values_nor_gradients(
    cfg, examples, monkeypatch, tokens_at_once
):
    tokens, targets, batch = collate(examples)
    num_targets = int((targets != IGNORE).sum())
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])

    def measure(max_logits):
        """Log-probs, gradients, and the positions of every projection in both passes."""
        monkeypatch.setattr(dpo, "MAX_LOGITS", max_logits)
        net, chunks = random_net(cfg), []
        net.lm_head.register_forward_hook(lambda head, args, _: chunks.append(len(args[0])))
        logps = sequence_logps(net, tokens, targets, batch)
        forward_chunks = list(chunks)
        (logps * weights).sum().backward()
        return logps.detach(), gradients(net), forward_chunks, chunks[len(forward_chunks) :]

    whole, whole_gradients, *whole_chunks = measure(1 << 30)
    assert whole_chunks == [[num_targets], []]  # and no other position
    chunked, chunked_gradients, forward, backward = measure(tokens_at_once * cfg.vocab_size)
    assert sum(forward) == num_targets and max(forward) == tokens_at_once
    assert sorted(backward) == sorted(forward), "no chunk is kept, each is computed again"
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-5)
    assert_same_gradients(chunked_gradients, whole_gradients, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_and_reference_are_bit_equal_through_the_same_function(cfg, pairs, dtype):
    packed = collate(pairs)
    net = random_net(cfg).to(dtype)
    with torch.no_grad():
        reference = sequence_logps(net, *packed)
    policy = sequence_logps(net, *packed)
    assert policy.dtype == reference.dtype == torch.float32, "sums of hundreds need fp32"
    assert torch.equal(policy, reference) and policy.requires_grad
    loss, metrics = preference_loss(net, *packed, reference)
    assert metrics["margin"] == 0 and metrics["accuracy"] == 0
    assert loss.item() == pytest.approx(2 * LN2, rel=1e-6)


# ---- SFT -------------------------------------------------------------------------------------


def test_sft_loss_is_the_sum_over_response_tokens_by_hand():
    table = random_table(6, seed=1)
    packed = collate([([1, 3], [4, 2]), ([1], [5, 5, 2])])
    loss, metrics = sft_loss(Bigram(table), *packed)
    want = -sum(logp(table, i, j) for i, j in [(3, 4), (4, 2), (1, 5), (5, 5), (5, 2)])
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert metrics["loss"] == loss and not metrics["loss"].requires_grad


def test_prompt_tokens_are_read_but_never_learned():
    """With a bigram model only the last prompt token can matter: what precedes it is a target
    nowhere."""
    table = random_table(8, seed=2, scale=1)
    losses = []
    for prompt in ([1, 3, 5], [1, 7, 6, 4, 5], [5]):
        bigram = Bigram(table)
        loss, _metrics = sft_loss(bigram, *collate([(prompt, [4, 2])]))
        loss.backward()
        losses.append(loss.item())
        by_last_token = bigram.lm_head.weight.grad.abs().sum(0)
        assert by_last_token.nonzero().flatten().tolist() == [4, 5]
    assert losses == pytest.approx([losses[0]] * 3)


def test_the_loss_is_that_of_the_response_positions_alone(net, examples):
    loss, _metrics = sft_loss(net, *collate(examples))
    want = -sum(logp_alone(net, prompt, response).item() for prompt, response in examples)
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_a_batch_without_targets_raises(net):
    tokens = torch.ones(1, 10, dtype=torch.long)
    nothing = torch.full_like(tokens, IGNORE)
    with pytest.raises(ValueError, match="masked"):
        sft_loss(net, tokens, nothing, PackedBatch([(5, 0, 0), (5, 1, 0)]))
    with pytest.raises(ValueError, match="masked"):
        sft_loss(net, *collate([([1, 5, 6], [])]))


def test_micro_batches_add_up_to_the_whole_batch(cfg, examples):
    whole, parts = random_net(cfg), random_net(cfg)
    sft_loss(whole, *collate(examples))[0].backward()
    for part in (examples[:1], examples[1:]):
        sft_loss(parts, *collate(part))[0].backward()
    assert_same_gradients(gradients(whole), gradients(parts), 1e-5)


# ---- DPO -------------------------------------------------------------------------------------


def test_the_loss_by_hand():
    """margin = 0.5 * ((-10 + 12) - (-8 + 7)) = 1.5, loss = ln(1 + e^-1.5) = 0.2014133; the second
    pair's margin is -1."""
    chosen, rejected = torch.tensor([-10.0, -3.0]), torch.tensor([-8.0, -4.0])
    reference = torch.tensor([-12.0, -2.0]), torch.tensor([-7.0, -5.0])
    losses, metrics = dpo_loss(chosen, rejected, *reference, beta=0.5)
    assert losses.tolist() == pytest.approx([0.2014133, 1.3132617], rel=1e-6)
    want = {
        "loss": losses.tolist(),
        "margin": [1.5, -1.0],
        "accuracy": [1.0, 0.0],
        "reward_chosen": [1.0, -0.5],
        "reward_rejected": [-0.5, 0.5],
        "logp_chosen": [-10.0, -3.0],
        "logp_rejected": [-8.0, -4.0],
    }
    assert {name: values.tolist() for name, values in metrics.items()} == want


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_the_loss_is_ln_2_and_there_is_no_margin_where_policy_equals_reference(beta):
    x, y = torch.tensor([-5.0, -700.0]), torch.tensor([-90.0, -1.0])
    losses, metrics = dpo_loss(x, y, x, y, beta=beta)
    assert losses.tolist() == pytest.approx([LN2, LN2]) and metrics["margin"].tolist() == [0, 0]
    assert metrics["accuracy"].tolist() == [0, 0], "a tie is no win"


def test_a_gradient_step_lifts_the_chosen_and_sinks_the_rejected():
    chosen, rejected = (torch.zeros(3, requires_grad=True) for _ in range(2))
    reference = torch.tensor([0.0, 9.0, -9.0]), torch.zeros(3)
    losses, metrics = dpo_loss(chosen, rejected, *reference, beta=0.1)
    losses.sum().backward()
    sigmoid = [1 / (1 + math.exp(margin)) for margin in (0.0, -0.9, 0.9)]
    assert chosen.grad.tolist() == pytest.approx([-0.1 * s for s in sigmoid])
    assert rejected.grad.tolist() == pytest.approx([0.1 * s for s in sigmoid])
    assert not any(values.requires_grad for values in metrics.values())


def test_extreme_margins_stay_finite():
    far = torch.tensor([1e5, -1e5], requires_grad=True)
    losses, _metrics = dpo_loss(far, torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=0.1)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.0, 1e4])
    assert far.grad.tolist() == pytest.approx([0.0, -0.1])


def test_preference_loss_is_the_sum_form_over_unequal_lengths_by_hand():
    table = random_table(6, seed=3)
    pairs = [([1, 3], [4, 4, 5, 2], [2]), ([1], [5, 2], [3, 3, 2])]
    reference = [-2.0, -3.0, -1.0, -0.5]
    policy = [response_logp(table, prompt, r) for prompt, *both in pairs for r in both]
    rewards = [0.3 * (a - b) for a, b in zip(policy, reference, strict=True)]
    margins = [rewards[0] - rewards[1], rewards[2] - rewards[3]]
    want = {
        "loss": sum(math.log(1 + math.exp(-margin)) for margin in margins),
        "margin": sum(margins),
        "accuracy": sum(margin > 0 for margin in margins),
        "reward_chosen": rewards[0] + rewards[2],
        "reward_rejected": rewards[1] + rewards[3],
        "logp_chosen": policy[0] + policy[2],
        "logp_rejected": policy[1] + policy[3],
    }
    packed = collate(pairs)
    loss, metrics = preference_loss(Bigram(table), *packed, torch.tensor(reference), beta=0.3)
    assert loss.item() == pytest.approx(want["loss"], rel=1e-5)
    assert {name: v.item() for name, v in metrics.items()} == pytest.approx(want, rel=1e-5)


def test_preference_loss_starts_at_ln_2_and_a_step_moves_the_model_the_right_way(cfg, pairs):
    packed, net = collate(pairs), random_net(cfg)
    with torch.no_grad():
        reference = sequence_logps(net, *packed)
    before = reference.clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    loss, _metrics = preference_loss(net, *packed, reference)
    assert loss.item() / 2 == pytest.approx(LN2, rel=1e-6)
    loss.backward()
    optimizer.step()
    after, metrics = preference_loss(net, *packed, reference)
    assert after < loss and metrics["margin"] > 0 and metrics["accuracy"] == 2
    assert metrics["reward_chosen"] > 0 > metrics["reward_rejected"]
    assert torch.equal(reference, before), "the reference stands still"


def test_company_and_order_of_pairs_leave_the_preference_loss_unmoved(net, pairs):
    reference = torch.tensor([-50.0, -20.0, -10.0, -80.0])
    whole, _metrics = preference_loss(net, *collate(pairs), reference)
    parts = 0.0
    for i in (1, 0):
        part, _metrics = preference_loss(net, *collate([pairs[i]]), reference[2 * i : 2 * i + 2])
        parts += part.item()
    assert whole.item() == pytest.approx(parts, rel=1e-4)


def test_beta_must_be_named_and_is_the_papers():
    for function in (dpo_loss, preference_loss):
        beta = inspect.signature(function).parameters["beta"]
        assert beta.kind is inspect.Parameter.KEYWORD_ONLY and beta.default == 0.1
    with pytest.raises(TypeError):
        dpo_loss(*torch.zeros(4, 1), 0.5)
    with pytest.raises(TypeError):
        preference_loss(None, *torch.zeros(2, 2), [], torch.zeros(2), 0.5)
