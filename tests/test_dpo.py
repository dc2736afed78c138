"""dpo.py: numbers by hand, a model whose logits are known, and what must leave the loss unmoved."""

import inspect
import math
from copy import deepcopy

import pytest
import torch
import torch.nn as nn
from conftest import random_net
from torch.nn.functional import log_softmax
from transformers import LlamaConfig, LlamaForCausalLM

import dpo
import model
from dpo import IGNORE, collate, dpo_loss, preference_loss, sequence_logps, sft_loss

LN2 = math.log(2)


@pytest.fixture
def examples(tok):
    """Prompt and response ids of very different lengths; one response has no end."""
    make = [("Where does the otter live?", "In rivers."), ("fox?", "The fox is red. It hunts at night."), ("Hi", "")]
    cut = (tok.chat("Compare the bear with the seal."), tok.response("The bear is black and")[:-1])
    return [(tok.chat(p), tok.response(r)) for p, r in make] + [cut]


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
        self.rows = nn.Parameter(torch.eye(len(table)), requires_grad=False)
        self.head = nn.Linear(len(table), len(table), bias=False)
        with torch.no_grad():
            self.head.weight.copy_(torch.as_tensor(table).T)

    def forward(self, tokens, cache=None, readout=None, layout=None):
        hidden = self.rows[tokens]
        return self.head(hidden) if readout is None else readout(hidden, self.head)


def logp(table, i, j):
    return table[i][j] - math.log(sum(math.exp(x) for x in table[i]))


# ---- ids -> tensors


def test_targets_are_the_response_shifted_by_one_and_nothing_else():
    tokens, targets, layout = collate([([1, 5, 6], [7, 8, 2]), ([1], [9, 2]), ([1, 3, 4, 5], [2])])
    _ = IGNORE
    assert tokens.tolist() == [[1, 5, 6, 7, 8, 1, 9, 1, 3, 4, 5]]
    assert targets.tolist() == [[_, _, 7, 8, 2, 9, 2, _, _, _, 2]]
    assert layout == [(5, 0, 0), (2, 1, 0), (4, 2, 0)]  # end to end: no padding, nobody's prefix
    assert tokens.dtype == targets.dtype == torch.int64


def test_a_prompt_is_read_once_and_its_last_token_before_every_response():
    tokens, targets, layout = collate([([1, 5, 6], [7, 8, 2], [9, 2]), ([1], [4, 2], [2], [3])])
    _ = IGNORE
    assert tokens.tolist() == [[1, 5, 6, 7, 8, 6, 9, 1, 4, 1, 1]]
    assert targets.tolist() == [[_, _, 7, 8, 2, 9, 2, 4, 2, 2, 3]]
    assert layout == [(5, 0, 0), (2, 0, 2), (2, 2, 0), (1, 2, 0), (1, 2, 0)]


def test_every_response_token_is_a_target_once_and_eos_is_one_iff_the_answer_ended(tok, examples, pairs):
    tokens, targets, layout = collate(examples + pairs)
    responses = [r for _, *both in examples + pairs for r in both]
    rows = targets[0].split([n for n, *_ in layout])
    assert tokens.shape == targets.shape == (1, sum(len(p) - 1 + sum(map(len, rs)) for p, *rs in examples + pairs))
    for response, row in zip(responses, rows, strict=True):
        learned = row[row != IGNORE].tolist()
        assert learned == response
        assert learned.count(tok.eos) == (1 if response[-1] == tok.eos else 0)
    assert [r[-1] == tok.eos for _, r in examples] == [True, True, True, False]


def test_inputs_are_not_mutated(net, pairs):
    before = deepcopy(pairs)
    tokens, targets, layout = collate(pairs)
    kept = tokens.clone(), targets.clone(), deepcopy(layout)
    reference = torch.arange(4.0)
    preference_loss(net, tokens, targets, layout, reference, nll=0.5)
    sft_loss(net, tokens, targets, layout)
    assert pairs == before
    assert torch.equal(tokens, kept[0]) and torch.equal(targets, kept[1]) and layout == kept[2]
    assert torch.equal(reference, torch.arange(4.0))


# ---- log-probabilities


def test_log_probabilities_are_read_one_position_before_their_token_and_summed():
    g = torch.Generator().manual_seed(0)
    table = torch.randn(6, 6, generator=g).mul(3).tolist()
    rows = [([1, 3], [4, 4, 2]), ([1, 5, 3], [2])]  # two unequal lengths
    got = sequence_logps(Bigram(table), *collate(rows))
    want = [logp(table, 3, 4) + logp(table, 4, 4) + logp(table, 4, 2), logp(table, 3, 2)]
    assert got.tolist() == pytest.approx(want, rel=1e-5)


def twin_of(net):
    """transformers' Llama with the same weights."""
    c = net.cfg
    twin = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, intermediate_size=c.ffn, max_position_embeddings=c.max_len,
        rms_norm_eps=c.norm_eps, bos_token_id=1, eos_token_id=2,
    )).eval()  # fmt: skip
    twin.load_state_dict({k if k.startswith("lm_head") else f"model.{k}": v for k, v in net.state_dict().items()})
    return twin


def alone(logits_of, prompt, response):
    """log p(response | prompt) of one row, from the full logits."""
    logps = log_softmax(logits_of(torch.tensor([prompt + response]))[0].double(), -1)
    return sum(logps[len(prompt) - 1 + i, t] for i, t in enumerate(response))


def gradients(model):
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def same_gradients(a, b, tolerance):
    """Equal names, and differences small against the largest entry of the tensor."""
    assert a.keys() == b.keys() and len(a) > 10
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * b[name].abs().max(), name


def test_log_probabilities_and_gradients_equal_transformers_row_by_row(cfg, examples, pairs):
    """Also where responses share a prompt, and where one has no sibling."""
    net, ragged = random_net(cfg, std=0.15), [examples[3], *pairs, examples[2], (*pairs[0], examples[1][1])]
    rows = [(prompt, response) for prompt, *responses in ragged for response in responses]
    weights = torch.linspace(-2, 3, len(rows))
    got = sequence_logps(net, *collate(ragged))
    (got * weights).sum().backward()
    twin = twin_of(net)
    want = torch.stack([alone(lambda ids: twin(ids).logits, *row) for row in rows])
    (want * weights).sum().backward()
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    same_gradients(gradients(net), {k.removeprefix("model."): g for k, g in gradients(twin).items()}, 1e-5)


def test_a_row_sees_nothing_of_its_neighbours(net, pairs):
    """What stands in one response changes no other row's number, to the last bit."""
    before = sequence_logps(net, *collate(pairs))
    (prompt, chosen, rejected), other = pairs
    for changed, moved in (((prompt, [7] * len(chosen), rejected), 0), ((prompt, chosen, [7] * len(rejected)), 1)):
        after = sequence_logps(net, *collate([changed, other]))
        assert [i for i in range(4) if after[i] != before[i]] == [moved]


def test_the_company_of_other_rows_moves_no_number(net, examples, pairs):
    together = sequence_logps(net, *collate(examples + pairs))
    single = torch.cat([sequence_logps(net, *collate([e])) for e in examples + pairs])
    torch.testing.assert_close(together, single, atol=1e-4, rtol=1e-5)


def varlen(q, k, v, ends_q, ends_k, most_q, most_k, *, window_size):
    """What torch documents of varlen_attn, causal from the lower right, in a loop over rows and queries."""
    assert (
        window_size == (-1, 0)
        and q.shape[1] == k.shape[1] == v.shape[1]
        and ends_q.dtype == ends_k.dtype == torch.int32
    )
    assert (most_q, most_k) == (int(ends_q.diff().max()), int(ends_k.diff().max()))
    assert ends_q[-1] == len(q) and ends_k[-1] == len(k) == len(v)
    out = torch.empty_like(q)
    for (a, b), (c, d) in zip(ends_q.unfold(0, 2, 1).tolist(), ends_k.unfold(0, 2, 1).tolist(), strict=True):
        for i in range(a, b):
            seen = slice(c, d - (b - 1 - i))
            weights = (torch.einsum("hd,shd->hs", q[i], k[seen]) * q.shape[-1] ** -0.5).softmax(-1)
            out[i] = torch.einsum("hs,shd->hd", weights, v[seen])
    return out


def test_the_kernel_for_gpus_is_asked_for_the_same_attention(examples, pairs, monkeypatch):
    """It does not run here: its arguments are checked against what it promises."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    tokens, _, layout = collate([examples[3], *pairs, examples[2]])
    rows = model.Rows(layout, "cpu")
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, tokens.shape[1], 8, generator=g) for heads in (4, 2, 2))
    for _ in range(2):  # the second layer finds the indices ready
        torch.testing.assert_close(rows.attend_fused(0, q, k, v), rows.attend(0, q, k, v))


@pytest.mark.parametrize("tokens_at_once", [1, 3, 7])
def test_chunks_of_the_vocabulary_projection_change_neither_values_nor_gradients(cfg, examples, monkeypatch, tokens_at_once):  # fmt: skip  # noqa: E501
    tokens, targets, layout = collate(examples)
    n = int((targets != IGNORE).sum())
    results = []
    for chunk in (1 << 30, tokens_at_once * cfg.vocab_size):
        monkeypatch.setattr(dpo, "CHUNK", chunk)
        net, seen = random_net(cfg), []
        net.lm_head.register_forward_hook(lambda _, args, out, seen=seen: seen.append(len(args[0])))
        logps = sequence_logps(net, tokens, targets, layout)
        assert seen == [n] if chunk == 1 << 30 else max(seen) <= tokens_at_once and sum(seen) == n
        (logps * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        results.append((logps.detach(), gradients(net)))
    (one, grads), (many, chunked) = results
    torch.testing.assert_close(many, one, atol=1e-4, rtol=1e-5)
    assert grads.keys() == chunked.keys() and len(grads) > 10
    for name in grads:
        torch.testing.assert_close(chunked[name], grads[name], atol=1e-4, rtol=1e-4)


def test_policy_and_reference_are_bit_equal_through_the_same_function(cfg, pairs):
    rows = collate(pairs)
    for dtype in (torch.float32, torch.bfloat16):
        net = random_net(cfg).to(dtype)
        with torch.no_grad():
            reference = sequence_logps(net, *rows)
        policy = sequence_logps(net, *rows)
        assert policy.dtype == reference.dtype == torch.float32, "sums of hundreds of tokens need fp32"
        assert torch.equal(policy, reference) and policy.requires_grad
        loss, shown = preference_loss(net, *rows, reference)
        assert shown["margin"] == 0 and shown["accuracy"] == 0
        assert loss.item() == pytest.approx(2 * LN2, rel=1e-6)


# ---- SFT


def test_sft_loss_is_the_sum_over_response_tokens_by_hand():
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).mul(2).tolist()
    loss, shown = sft_loss(Bigram(table), *collate([([1, 3], [4, 2]), ([1], [5, 5, 2])]))
    want = -sum(logp(table, i, j) for i, j in [(3, 4), (4, 2), (1, 5), (5, 5), (5, 2)])
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert shown["loss"] == loss and not shown["loss"].requires_grad


def test_prompt_tokens_are_read_but_never_learned():
    """With a bigram model only the last prompt token can matter: what precedes it is a target nowhere."""
    table = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).tolist()
    losses = []
    for prompt in ([1, 3, 5], [1, 7, 6, 4, 5], [5]):
        model = Bigram(table)
        loss, _ = sft_loss(model, *collate([(prompt, [4, 2])]))
        loss.backward()
        losses.append(loss.item())
        learned = model.head.weight.grad.abs().sum(0).nonzero().flatten().tolist()  # columns: the token read from
        assert learned == [4, 5]
    assert losses == pytest.approx([losses[0]] * 3)


def test_the_loss_is_that_of_the_response_positions_alone(net, examples):
    loss, _ = sft_loss(net, *collate(examples))
    want = 0.0
    for prompt, response in examples:
        want -= alone(net, prompt, response).item()
    assert loss.item() == pytest.approx(want, rel=1e-5)


def test_a_batch_without_targets_raises(net):
    tokens = torch.ones(1, 10, dtype=torch.long)
    with pytest.raises(ValueError, match="masked"):
        sft_loss(net, tokens, torch.full_like(tokens, IGNORE), [(5, 0, 0), (5, 1, 0)])
    with pytest.raises(ValueError, match="masked"):
        sft_loss(net, *collate([([1, 5, 6], [])]))


def test_micro_batches_add_up_to_the_whole_batch(cfg, examples):
    whole = random_net(cfg)
    sft_loss(whole, *collate(examples))[0].backward()
    parts = random_net(cfg)
    for cut in (examples[:1], examples[1:]):
        sft_loss(parts, *collate(cut))[0].backward()
    same_gradients(gradients(whole), gradients(parts), 1e-5)


# ---- DPO


def test_the_loss_by_hand():
    """margin = 0.5 * ((-10 + 12) - (-8 + 7)) = 1.5, loss = ln(1 + e^-1.5) = 0.2014133; second pair: margin -1."""
    chosen, rejected = torch.tensor([-10.0, -3.0]), torch.tensor([-8.0, -4.0])
    losses, shown = dpo_loss(chosen, rejected, torch.tensor([-12.0, -2.0]), torch.tensor([-7.0, -5.0]), beta=0.5)
    assert losses.tolist() == pytest.approx([0.2014133, 1.3132617], rel=1e-6)
    assert shown["margin"].tolist() == [1.5, -1.0]
    assert shown["accuracy"].tolist() == [1.0, 0.0]
    assert shown["reward_chosen"].tolist() == [1.0, -0.5]
    assert shown["reward_rejected"].tolist() == [-0.5, 0.5]
    assert shown["logp_chosen"].tolist() == [-10.0, -3.0] and shown["logp_rejected"].tolist() == [-8.0, -4.0]
    assert shown["loss"].tolist() == losses.tolist()


def test_the_loss_is_ln_2_and_no_margin_where_policy_equals_reference():
    x, y = torch.tensor([-5.0, -700.0]), torch.tensor([-90.0, -1.0])
    for beta in (0.01, 0.1, 5.0):
        losses, shown = dpo_loss(x, y, x, y, beta=beta)
        assert losses.tolist() == pytest.approx([LN2, LN2]) and shown["margin"].tolist() == [0, 0]
        assert shown["accuracy"].tolist() == [0, 0], "a tie is no win"


def test_a_gradient_step_lifts_the_chosen_and_sinks_the_rejected():
    chosen, rejected = (torch.zeros(3, requires_grad=True) for _ in range(2))
    losses, shown = dpo_loss(chosen, rejected, torch.tensor([0.0, 9.0, -9.0]), torch.zeros(3), beta=0.1)
    losses.sum().backward()
    sigmoid = [1 / (1 + math.exp(m)) for m in (0.0, -0.9, 0.9)]
    assert chosen.grad.tolist() == pytest.approx([-0.1 * s for s in sigmoid])
    assert rejected.grad.tolist() == pytest.approx([0.1 * s for s in sigmoid])
    assert not any(v.requires_grad for v in shown.values())


def test_extreme_margins_stay_finite():
    far = torch.tensor([1e5, -1e5], requires_grad=True)
    losses, _ = dpo_loss(far, torch.zeros(2), torch.zeros(2), torch.zeros(2), beta=0.1)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([0.0, 1e4]) and far.grad.tolist() == pytest.approx([0.0, -0.1])


def test_preference_loss_is_the_sum_form_over_unequal_lengths_by_hand():
    table = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)).mul(2).tolist()
    pairs = [([1, 3], [4, 4, 5, 2], [2]), ([1], [5, 2], [3, 3, 2])]
    reference = [-2.0, -3.0, -1.0, -0.5]

    def total(prompt, response):
        ids = prompt + response
        return sum(logp(table, ids[i - 1], ids[i]) for i in range(len(prompt), len(ids)))

    pi = [total(prompt, response) for prompt, *both in pairs for response in both]
    margins = [0.3 * ((pi[i] - reference[i]) - (pi[i + 1] - reference[i + 1])) for i in (0, 2)]
    want = sum(math.log(1 + math.exp(-m)) for m in margins)
    rows = collate(pairs)
    loss, shown = preference_loss(Bigram(table), *rows, torch.tensor(reference), beta=0.3)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert shown["margin"].item() == pytest.approx(sum(margins), rel=1e-5)
    assert shown["logp_chosen"].item() == pytest.approx(pi[0] + pi[2], rel=1e-5)
    assert shown["logp_rejected"].item() == pytest.approx(pi[1] + pi[3], rel=1e-5)

    per_token = -pi[0] / 4 - pi[2] / 2  # the chosen responses only, end of sequence included
    assert shown["nll"].item() == pytest.approx(per_token, rel=1e-5)
    loss, again = preference_loss(Bigram(table), *rows, torch.tensor(reference), beta=0.3, nll=0.7)
    assert loss.item() == pytest.approx(want + 0.7 * per_token, rel=1e-5)
    assert again["loss"].item() == pytest.approx(want, rel=1e-5), "the diagnostic is the DPO loss alone"


def test_preference_loss_starts_at_ln_2_and_a_step_moves_the_model_the_right_way(cfg, pairs):
    rows, net = collate(pairs), random_net(cfg)
    with torch.no_grad():
        reference = sequence_logps(net, *rows)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    loss, _ = preference_loss(net, *rows, reference)
    assert loss.item() / 2 == pytest.approx(LN2, rel=1e-6)
    loss.backward()
    optimizer.step()
    after, shown = preference_loss(net, *rows, reference)
    assert after < loss and shown["margin"] > 0 and shown["accuracy"] == 2
    assert shown["reward_chosen"] > 0 > shown["reward_rejected"]


def test_company_and_order_of_pairs_leave_the_preference_loss_unmoved(net, pairs):
    reference = torch.tensor([-50.0, -20.0, -10.0, -80.0])
    whole, _ = preference_loss(net, *collate(pairs), reference)
    parts = [preference_loss(net, *collate([pairs[i]]), reference[2 * i : 2 * i + 2])[0] for i in (1, 0)]
    assert whole.item() == pytest.approx(sum(parts).item(), rel=1e-4)


def test_every_knob_must_be_named():
    for f, names in ((dpo_loss, ["beta"]), (preference_loss, ["beta", "nll"])):
        parameters = inspect.signature(f).parameters
        assert all(parameters[n].kind is inspect.Parameter.KEYWORD_ONLY for n in names)
    with pytest.raises(TypeError):
        dpo_loss(*torch.zeros(4, 1), 0.5)
    with pytest.raises(TypeError):
        preference_loss(None, *torch.zeros(2, 2), [], torch.zeros(2), 0.5)
