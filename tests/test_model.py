"""model.py against transformers, published numbers, the real tokenizer and every kind of broken checkpoint."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench_memory
import pytest
import sentencepiece
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, random_net
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import model as model_py
from model import (
    CONFIGS,
    BadInput,
    KVCache,
    Llama,
    ModelConfig,
    Rows,
    Tokenizer,
    gathered,
    load,
    parallelize,
    rope_tables,
    rotate,
    save,
)


def transformers_twin(net: Llama) -> LlamaForCausalLM:
    """transformers' Llama with the same weights, in eval mode."""
    c = net.cfg
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.ffn,
            max_position_embeddings=c.max_len,
            rms_norm_eps=c.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
            tie_word_embeddings=c.tied,
            attn_implementation="eager",
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    state = {model_py.hf_name(k): v for k, v in net.state_dict().items()}
    twin.load_state_dict(state, strict=True)
    return twin.eval()


def ids(cfg, rows, length, seed=0):
    return torch.randint(0, cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- the network


SHAPES = [
    {"dim": 32, "heads": 4, "kv_heads": 2, "layers": 2, "ffn": 48},
    {"dim": 48, "heads": 6, "kv_heads": 1, "layers": 3, "ffn": 100, "rope_theta": 500.0, "norm_eps": 1e-3},
    {"dim": 40, "heads": 5, "kv_heads": 5, "layers": 1, "ffn": 64, "rope_theta": 1e6},
    {"dim": 64, "heads": 8, "kv_heads": 4, "layers": 2, "ffn": 96, "tied": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['heads']}-{s['kv_heads']}")
def test_logits_and_gradients_equal_those_of_transformers(shape):
    net = random_net(ModelConfig(vocab_size=97, max_len=64, **shape), seed=shape["dim"], std=0.15)
    twin = transformers_twin(net)
    tokens = ids(net.cfg, 3, 33)
    ours, theirs = net(tokens), twin(tokens).logits
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {model_py.hf_name(k): p.grad for k, p in net.named_parameters()}
    assert grads
    for name, p in twin.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name, count", [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)])
def test_the_named_sizes_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Llama(CONFIGS[name]).parameters()) == count


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("replicate", "dp", "tp"))
    dist.destroy_process_group()


@pytest.mark.parametrize("policy", ["cast", "sharded"])
def test_rope_angles_of_a_bf16_model_are_fp32_where_they_are_used(net, mesh, monkeypatch, policy):
    seen = []

    def spy(x, cos, sin):
        seen.append((x.dtype, cos.dtype, sin.dtype))
        return rotate(x, cos, sin)

    monkeypatch.setattr(model_py, "rotate", spy)
    low = Llama(net.cfg)
    low.to(torch.bfloat16) if policy == "cast" else parallelize(low, mesh, torch.bfloat16)
    low(ids(net.cfg, 1, 5))
    assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}


def test_recomputation_gives_the_same_gradients_of_activations_made_twice(cfg, mesh, monkeypatch):
    calls, old = [], Rows.attend
    monkeypatch.setattr(Rows, "attend", lambda *args: calls.append(1) or old(*args))
    tokens, grads = ids(cfg, 2, 9), []
    for recompute, layers in ((False, 2), (True, 4)):
        low = random_net(cfg, dropout=0.1)
        parallelize(low, mesh, torch.float32, recompute)
        torch.manual_seed(0)
        calls.clear()
        low(tokens).square().sum().backward()
        assert len(calls) == layers
        grads.append([p.grad.full_tensor() for p in low.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    calls.clear()
    with torch.no_grad():
        low(tokens)
    assert len(calls) == 2


@pytest.mark.parametrize("offload", [False, True])
def test_offloaded_shards_lie_in_the_cpus_memory(cfg, mesh, monkeypatch, offload):
    """On a CPU there is nothing to see: what is asked of FSDP must do."""
    asked = []
    monkeypatch.setattr(model_py, "fully_shard", lambda module, **knobs: asked.append(knobs["offload_policy"]))
    parallelize(Llama(cfg), mesh, torch.float32, offload=offload)
    assert [type(a) is CPUOffloadPolicy for a in asked] == [offload] * 3


def test_rope_angles_are_true_at_position_4095():

    cos, sin = rope_tables(torch.tensor([[4095]]), 128, 10000.0)
    angles = [4095 * 10000.0 ** (-2 * i / 128) for i in range(64)]  # Python floats are fp64
    want = [torch.tensor([f(a) for a in angles]) for f in (math.cos, math.sin)]
    torch.testing.assert_close(cos.flatten(), torch.cat((want[0], want[0])), atol=1e-3, rtol=0)
    torch.testing.assert_close(sin.flatten(), torch.cat((-want[1], want[1])), atol=1e-3, rtol=0)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=g)

    def product(m, n):
        return (rotate(q, *rope_tables(torch.tensor([[m]]), 16, 1e4)) *
                rotate(k, *rope_tables(torch.tensor([[n]]), 16, 1e4))).sum()  # fmt: skip

    torch.testing.assert_close(product(7, 3), product(57, 53), atol=1e-4, rtol=1e-4)
    assert abs(product(7, 3) - product(7, 6)) > 1e-1
    torch.testing.assert_close(rotate(q, *rope_tables(torch.tensor([[99]]), 16, 1e4)).norm(), q.norm())


def test_right_padding_leaves_the_logits_of_real_tokens_unchanged(net):
    tokens = ids(net.cfg, 2, 12)
    padded = torch.cat((tokens, torch.zeros(2, 9, dtype=torch.long)), 1)
    torch.testing.assert_close(net(padded)[:, :12], net(tokens), atol=1e-5, rtol=1e-5)


def test_no_position_sees_the_future(net):
    a = ids(net.cfg, 1, 12)
    b = a.clone()
    b[0, 7] = (b[0, 7] + 1) % net.cfg.vocab_size
    before, after = net(a), net(b)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def remembering(start, k, v, head=None):
    """A cache whose rows hold k and v (B, K, S, hd) from the columns `start` on, behind a head (K, P, hd) if any."""
    cache = KVCache(1, *k.shape[:1], k.shape[2] + 5, k.device)
    cache.start += torch.tensor(start, device=k.device)
    cache.put(0, k, v)
    cache.end = k.shape[2]
    if head:
        cache.parent = KVCache(1, 1, head[0].shape[1], k.device)
        cache.parent.put(0, *(t[None] for t in head))
        cache.parent.end = head[0].shape[1]
    return cache


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("T, common", [(1, 0), (4, 0), (1, 5), (4, 5)])
def test_all_ways_to_attend_equal_torchs_own_attention(heads, kv_heads, T, common, device):
    """Of rows of unlike length in a cache, alone and behind what they have in common."""
    g = torch.Generator().manual_seed(heads)
    q, k, v = (torch.randn(3, n, t, 8, generator=g) for n, t in ((heads, T), (kv_heads, 9 + T), (kv_heads, 9 + T)))
    first = torch.randn(2, kv_heads, common, 8, generator=g)
    column, start = torch.arange(9 + T), torch.tensor([0, 3, 7])
    mask = (column >= start[:, None, None]) & (column <= 9 + torch.arange(T)[:, None])  # (3, T, 9 + T)
    keys, values = (torch.cat((f.expand(3, -1, -1, -1), t), 2).repeat_interleave(heads // kv_heads, dim=1)
                    for f, t in zip(first, (k, v), strict=True))  # fmt: skip
    want = F.scaled_dot_product_attention(q, keys, values, attn_mask=F.pad(mask, (common, 0), value=True)[:, None])
    q, k, v, first = (t.to(device) for t in (q, k, v, first))
    for way in ("attend", "attend_fused"):
        cache = remembering(start.tolist(), k[:, :, :9], v[:, :, :9], tuple(first) if common else None)
        assert (cache.look(T).cpu() == common + column[9:] - start[:, None]).all()
        got = getattr(cache, way)(0, q, k[:, :, 9:], v[:, :, 9:]).cpu()
        torch.testing.assert_close(got, want, atol=1e-5 if device == "cpu" else 1e-3, rtol=0)


def test_in_half_precision_the_parts_of_a_text_are_weighed_in_full():
    """Scores near 40, where numbers of bfloat16 lie 0.25 apart: that much of a sum of exponentials may not be lost."""
    g = torch.Generator().manual_seed(0)
    k, first = torch.randn(3, 1, 9, 8, generator=g), torch.randn(1, 40, 8, generator=g)
    k, first, q = k + 5, first + 5, torch.full((3, 1, 1, 8), 2.8)
    v, values = torch.zeros_like(k), torch.ones_like(first)  # what comes out is the share of the head
    cache = remembering([0, 0, 0], *(t[:, :, :8].bfloat16() for t in (k, v)), (first.bfloat16(), values.bfloat16()))
    cache.look(1)
    got = cache.attend(0, *(t.bfloat16() for t in (q, k[:, :, 8:], v[:, :, 8:])))
    scores = (
        torch.cat((first.expand(3, -1, -1), k[:, 0]), 1).bfloat16().double() @ q.bfloat16()[0, 0, 0].double()
    ) / 8**0.5
    want = scores.bfloat16().double().softmax(-1)[:, :40].sum(-1)  # (3,)
    assert want.std() > 0.01
    torch.testing.assert_close(got[:, 0, 0, 0].double(), want, atol=0.01, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_of_equal_rows_without_a_cache_is_causal(heads, kv_heads, device):
    g = torch.Generator().manual_seed(heads)
    q, k, v = (torch.randn(2, n, 5, 8, generator=g) for n in (heads, kv_heads, kv_heads))
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    rows = Rows([(5, 0, 0), (5, 1, 0)], device)
    got = rows.attend(0, *(t.transpose(0, 1).flatten(1, 2)[None].to(device) for t in (q, k, v)))
    got = got[0].unflatten(1, (2, 5)).transpose(0, 1).cpu()
    torch.testing.assert_close(got, want, atol=1e-5 if device == "cpu" else 1e-3, rtol=0)


def test_dropout_acts_in_train_mode_only(cfg):
    tokens, plain, dropping = ids(cfg, 2, 6), random_net(cfg), random_net(cfg, dropout=0.3)
    assert torch.equal(dropping.eval()(tokens), plain(tokens))
    dropping.train()
    assert not torch.allclose(dropping(tokens), dropping(tokens), atol=1e-2)
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens)), "rate 0 drops nothing"


def test_a_cache_fed_in_ragged_pieces_gives_the_logits_of_one_pass(net):
    a, b = ids(net.cfg, 1, 11, seed=1), ids(net.cfg, 1, 8, seed=2)
    cache = net.new_cache(2, 12)
    first = torch.zeros(2, 6, dtype=torch.long)
    first[0], first[1, 3:] = a[0, :6], b[0, :3]  # the second row is shorter: rubbish stands before its start
    cache.start[1] = 3
    x = net(first, cache)
    y = net(torch.cat((a[:, 6:], b[:, 3:])), cache)  # five more tokens each
    want_a, want_b = net(a)[0], net(b)[0]
    torch.testing.assert_close(torch.cat((x[0], y[0])), want_a, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat((x[1, 3:], y[1])), want_b, atol=1e-4, rtol=1e-4)


def test_rows_of_a_cache_are_replaced_dropped_and_widened_without_a_trace(net):
    """Two rows go on behind a shared head; one is replaced by a text of another length, then one is dropped."""
    head, a, b, c = (ids(net.cfg, 1, n, seed=n) for n in (7, 9, 8, 5))
    shared = net.new_cache(1, 7)
    net(head, shared)
    cache = net.new_cache(2, 6, shared)
    net(torch.cat((a[:, :6], b[:, :6])), cache)
    late = net.new_cache(1, 4, shared)
    net(c[:, :4], late)
    cache.replace(torch.tensor([1]), torch.tensor([0]), late)
    cache.resize(slice(None), 6, 9)
    y = net(torch.cat((a[:, 6:7], c[:, 4:5])), cache)
    torch.testing.assert_close(y[0, 0], net(torch.cat((head, a[:, :7]), 1))[0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(y[1, 0], net(torch.cat((head, c), 1))[0, -1], atol=1e-4, rtol=1e-4)
    cache.resize(torch.tensor([0]), 7, 9)
    y = net(a[:, 7:], cache)
    torch.testing.assert_close(y[0], net(torch.cat((head, a), 1))[0, -2:], atol=1e-4, rtol=1e-4)


def test_samples_that_share_a_prompt_behind_a_head_see_all_of_it(net):
    """Five rows go on from two prompts of unlike length, these from a head; then two rows begin another prompt."""
    head, a, b, c = (ids(net.cfg, 1, n, seed=n) for n in (7, 6, 4, 3))
    one, prompts, late = net.new_cache(1, 7), net.new_cache(2, 6), net.new_cache(1, 3)
    prompts.parent = late.parent = one
    net(head, one)
    both = torch.zeros(2, 6, dtype=torch.long)
    both[0], both[1, 2:], prompts.start[1] = a[0], b[0], 2
    net(both, prompts)
    net(c, late)
    cache, rows = net.new_cache(5, 8, prompts), torch.arange(5)
    cache.adopt(rows, torch.tensor([0, 1, 0, 0, 1]))
    texts = [torch.cat((head, prompt), 1) for prompt in (a, b, a, a, b)]

    def go_on(T, seed):
        new = ids(net.cfg, 5, T, seed=seed)
        texts[:] = [torch.cat((text, row[None]), 1) for text, row in zip(texts, new, strict=True)]
        y = net(new, cache)
        for row, text in zip(y, texts, strict=True):
            torch.testing.assert_close(row, net(text)[0, -T:], atol=1e-4, rtol=1e-4)

    go_on(1, 20)
    go_on(2, 21)
    prompts.replace(torch.tensor([1]), torch.tensor([0]), late)
    cache.adopt(torch.tensor([1, 4]), torch.tensor([1, 1]))
    texts[1] = texts[4] = torch.cat((head, c), 1)
    go_on(1, 22)
    go_on(3, 23)


# ---- text <-> ids


@pytest.fixture(scope="module")
def llama_tok(shared):
    return Tokenizer(shared / "tokenizer" / "tokenizer.model")


def test_the_real_tokenizer_gives_the_known_ids(llama_tok):
    t = llama_tok
    assert (t.size, t.bos, t.eos, t.sp.unk_id(), t.sp.pad_id()) == (32000, 1, 2, 0, -1)
    assert t.encode("Hello, world!") == [15043, 29892, 3186, 29991]
    assert t.encode("") == []
    assert t.encode("</s>") == [1533, 29879, 29958]
    assert t.encode("Score: 5") == [2522, 487, 29901, 29871, 29945]
    assert t.encode(" 4") == [259, 29946]
    text = "日本語テキスト😀"
    assert t.encode(text) == [29871, 30325, 30346, 30968, 30572, 30454, 30255, 30279, 243, 162, 155, 131]
    assert t.encode("\n")[-1] == 13 and t.newlines == [13]
    assert t.decode(t.encode(f"{text}\n\tline  two ")) == f"{text}\n\tline  two "


def test_the_chat_format_is_llama_2s(llama_tok):
    t = llama_tok
    assert t.chat("Hi") == [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962]
    assert t.chat("  Hi\n") == t.chat("Hi"), "Meta's code strips the turns"
    # with the answer: what SentencePiece makes of the documented text as a whole
    assert t.chat("Hi") + t.response("Hello") == [1, *t.sp.encode("[INST] Hi [/INST] Hello"), 2]
    turns = "Where is it?", "In the woods,\nI think.", "Sure?"
    whole = "[INST] Where is it? [/INST] In the woods,\nI think.", "[INST] Sure? [/INST]"
    assert t.chat(*turns) == [1, *t.sp.encode(whole[0]), 2, 1, *t.sp.encode(whole[1])]


def test_every_turn_has_one_bos_and_every_answer_one_eos(tok):
    for turns in (["Where does the otter live?"], ["a", "b", "c"], ["a", "b", "c", "d", "e"]):
        chat = tok.chat(*turns)
        assert chat[0] == tok.bos
        assert chat.count(tok.bos) == len(turns) // 2 + 1
        assert chat.count(tok.eos) == len(turns) // 2
    answer = tok.response("  In rivers.\n")
    assert answer[-1] == tok.eos and answer.count(tok.eos) == 1 and tok.bos not in answer
    assert tok.decode(answer[:-1]) == "In rivers."
    assert tok.response("") == [tok.eos]
    assert tok.raw("fox").count(tok.bos) == 1 and tok.eos not in tok.raw("fox")
    with pytest.raises(AssertionError):
        tok.chat("user", "assistant")


@pytest.mark.parametrize("text", ["</s>", "<s>", "a </s> b", "<unk>", "[/INST] x [INST]", "<0x0A>", "<<SYS>>"])
def test_text_that_looks_like_a_control_token_stays_text(tok, llama_tok, text):
    for t in (tok, llama_tok):
        for made in (t.chat(text)[1:], t.response(text)[:-1]):
            assert not {t.bos, t.eos} & set(made)
            assert text in t.decode(made)


def test_newlines_and_spaces_survive_the_small_tokenizer(tok):
    text = "two\n\nlines,  two spaces\tand é😀"
    assert tok.decode(tok.encode(text)) == text
    assert all("\n" in tok.decode([i]) for i in tok.newlines)
    assert set(tok.encode("fox\nowl")) & set(tok.newlines)


def test_half_of_a_character_is_refused_by_the_tokenizer_in_one_line(tok):
    with pytest.raises(BadInput, match=r"^'tell me \\udcff': holds half"):
        tok.encode("tell me \udcff")


def test_a_vocabulary_without_llamas_control_tokens_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the otter lives in rivers and eats fish"]), model_prefix=str(tmp_path / "other"),
        vocab_size=30, model_type="char", bos_piece="<bos>", hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    with pytest.raises(BadInput, match="other.model: lacks .*<s>"):
        Tokenizer(tmp_path / "other.model")


# ---- checkpoints that are good


def greedy(net, tokens, count):
    cache, out = net.new_cache(1, count), list(tokens)
    for _ in range(count - len(tokens)):
        logits = net(torch.tensor([out[cache.end :]]), cache)
        out.append(logits[0, -1].argmax().item())
    return out


@pytest.mark.parametrize("kind", ["hf", "hf-sharded", "meta-mp1", "meta-mp2"])
def test_real_weights_load_and_write_what_they_are_known_to_write(shared, kind):
    net, tok = load(shared / "stories260K" / kind)
    known = json.loads((shared / "stories260K" / "greedy.json").read_text())
    assert equal_weights(net, load(shared / "stories260K" / "hf")[0])
    assert tok.size == net.cfg.vocab_size == 512 and net.cfg.kv_heads == 4
    made = greedy(net, known["ids"][:1], len(known["ids"]))
    assert made == known["ids"]
    assert tok.decode(made) == known["text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_real_weights_that_transformers_saved_again_load_bit_for_bit(shared, tmp_path, dtype):
    theirs = AutoModelForCausalLM.from_pretrained(shared / "stories260K" / "hf", dtype=dtype)
    theirs.save_pretrained(tmp_path / "it", max_shard_size="300KB")
    shutil.copy(shared / "stories260K" / "hf" / "tokenizer.model", tmp_path)  # beside the folder does as well
    ours, first = load(tmp_path / "it")[0], load(shared / "stories260K" / "hf")[0]
    assert ours.embed_tokens.weight.dtype == torch.float32
    assert equal_weights(ours, first.to(dtype).float())
    tokens = ids(ours.cfg, 1, 60)
    torch.testing.assert_close(ours(tokens), theirs.float()(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 10_000], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_what_we_save_loads_bit_for_bit_here_and_in_transformers(cfg, tok, tmp_path, monkeypatch, dtype, tied, shard_bytes):  # fmt: skip  # noqa: E501
    monkeypatch.setattr(model_py, "SHARD_BYTES", shard_bytes)
    net = random_net(replace(cfg, tied=tied, rope_theta=5000.0, norm_eps=1e-6)).to(dtype)
    save(net, tok, tmp_path / "new", dtype=dtype)
    back, back_tok = load(tmp_path / "new", dtype=dtype)
    assert equal_weights(net, back) and back.cfg == net.cfg
    assert back_tok.path.read_bytes() == tok.path.read_bytes()
    assert (back.lm_head.weight is back.embed_tokens.weight) == tied
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert (len(files) > 3) == (shard_bytes == 10_000)
    if len(files) > 1:
        assert all(sum(t.nbytes for t in load_file(f).values()) <= 10_000 or len(load_file(f)) == 1 for f in files)
        index = json.loads((tmp_path / "new" / model_py.SHARD_INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(p.numel() for p in net.parameters()) * dtype.itemsize
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert theirs.dtype == dtype
    state = theirs.state_dict()
    for name, p in net.state_dict().items():
        assert torch.equal(state[model_py.hf_name(name)], p), name
    if dtype == torch.float32:
        tokens = ids(cfg, 2, 20)
        torch.testing.assert_close(back(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_loads_here_bit_for_bit(cfg, tok, tmp_path, dtype, tied):
    net = random_net(replace(cfg, tied=tied, rope_theta=777.0)).to(dtype)
    transformers_twin(net).to(dtype).save_pretrained(tmp_path / "new", max_shard_size="20KB")
    shutil.copy(tok.path, tmp_path / "new" / "tokenizer.model")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    back, _ = load(tmp_path / "new", dtype=dtype)
    assert equal_weights(net, back)
    assert back.cfg == net.cfg


def write_checkpoint(folder, net, tok, config=None, change=None):
    """A checkpoint written by hand, transformers-4 style, with one thing changed."""
    folder.mkdir()
    c = net.cfg
    d = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": c.dim,
        "intermediate_size": c.ffn,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "max_position_embeddings": c.max_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "vocab_size": c.vocab_size,
        "torch_dtype": "float16",
        "pad_token_id": None,
    }
    d = {k: v for k, v in (d | (config or {})).items() if v != "remove"}
    (folder / "config.json").write_text(json.dumps(d))
    tensors = {model_py.hf_name(k): v.clone() for k, v in net.state_dict().items()}
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(tok.path, folder / "tokenizer.model")
    return folder


def test_a_checkpoint_of_older_transformers_with_stored_rope_tables_loads(cfg, tok, tmp_path):
    net = random_net(replace(cfg, rope_theta=1234.0))

    def add_tables(tensors):
        for i in range(cfg.layers):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.full((4,), 99.0)

    back, _ = load(write_checkpoint(tmp_path / "old", net, tok, change=add_tables))
    assert back.cfg.rope_theta == 1234.0
    tokens = ids(cfg, 1, 30)
    assert torch.equal(back(tokens), net(tokens))
    assert not torch.allclose(back(tokens), random_net(cfg)(tokens), atol=1e-3), "theta matters"


def test_a_config_without_kv_heads_means_one_for_each_head(cfg, tok, tmp_path):
    net = random_net(replace(cfg, kv_heads=cfg.heads))
    back, _ = load(write_checkpoint(tmp_path / "old", net, tok, config={"num_key_value_heads": "remove"}))
    assert equal_weights(net, back)


def test_saving_over_a_checkpoint_leaves_nothing_of_the_old_one(cfg, tok, tmp_path, monkeypatch):
    old, new = random_net(cfg, seed=1), random_net(cfg, seed=2)
    monkeypatch.setattr(model_py, "SHARD_BYTES", 10_000)
    save(old, tok, tmp_path / "m")
    back, its_tok = load(tmp_path / "m")
    monkeypatch.setattr(model_py, "SHARD_BYTES", 1 << 30)
    save(new, its_tok, tmp_path / "m")  # onto itself, tokenizer included
    assert equal_weights(load(tmp_path / "m")[0], new) and not equal_weights(back, new)
    names = {"config.json", "model.safetensors", "tokenizer.model", "tokenizer.json", "tokenizer_config.json"}
    names.add("generation_config.json")
    assert {f.name for f in (tmp_path / "m").iterdir()} == names


def test_only_the_writing_process_touches_the_disk(cfg, net, tok, tmp_path):
    save(net, tok, tmp_path / "m", write=False)
    assert not (tmp_path / "m").exists()


def test_files_are_on_disk_before_they_take_their_place(tmp_path, monkeypatch):
    """Else a power cut may leave an empty file where a finished one stood."""
    seen, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append(os.fstat(fd).st_size))
    monkeypatch.setattr(os, "replace", lambda a, b: seen.append((Path(b).name, a.stat().st_size)) or replace(a, b))
    model_py.write_text(tmp_path / "a.txt", "seven\n\n")
    model_py.write_weights(tmp_path / "w", {"p": torch.nn.Parameter(torch.ones(3))}, torch.float32, True)
    size = (tmp_path / "w").stat().st_size
    assert seen == [7, ("a.txt", 7), size, ("w", size)] and size > 12


@pytest.mark.parametrize("function", ["write_weights", "write_text", "write_config"])
@pytest.mark.parametrize("before", [False, True], ids=["fresh", "over an old one"])
def test_a_save_that_is_interrupted_leaves_no_folder_that_loads(cfg, net, tok, tmp_path, monkeypatch, function, before):
    """Killed at every write in turn: the folder is refused each time until the save has gone through."""
    monkeypatch.setattr(model_py, "SHARD_BYTES", 20_000)
    real, kills = getattr(model_py, function), 0
    for at in range(100):
        folder = tmp_path / str(at)
        if before:
            save(random_net(cfg, seed=9), tok, folder)
        calls = iter(range(1000))

        def die(*args, _calls=calls, _at=at, **kwargs):
            if next(_calls) == _at:
                if function == "write_weights":
                    args[0].with_name(args[0].name + ".tmp").write_bytes(b"half")
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as m:
            m.setattr(model_py, function, die)
            try:
                save(net, tok, folder)
            except KeyboardInterrupt:
                kills += 1
                with pytest.raises(BadInput):
                    load(folder)
                continue
        assert equal_weights(load(folder)[0], net)
        break
    assert kills >= {"write_weights": 3, "write_text": 5, "write_config": 1}[function]


def write_meta(folder, net, tok, files, params=None, change=None):
    """A checkpoint as Meta writes it, written by hand: neighbours rotate, every file holds a slice of each matrix."""
    folder.mkdir()
    c, parts = net.cfg, [{} for _ in range(files)]
    names = {"embed_tokens": ("tok_embeddings", 1), "lm_head": ("output", 0), "norm": ("norm", None),
             "input_layernorm": ("attention_norm", None), "post_attention_layernorm": ("ffn_norm", None),
             "q_proj": ("attention.wq", 0), "k_proj": ("attention.wk", 0), "v_proj": ("attention.wv", 0),
             "o_proj": ("attention.wo", 1), "gate_proj": ("feed_forward.w1", 0), "down_proj": ("feed_forward.w2", 1),
             "up_proj": ("feed_forward.w3", 0)}  # fmt: skip
    for name, w in net.state_dict().items():
        *layer, last, _ = name.replace("self_attn.", "").replace("mlp.", "").split(".")
        theirs, dim = names[last]
        if last in ("q_proj", "k_proj"):
            half = c.head_dim // 2
            order = [
                h * c.head_dim + i % 2 * half + i // 2 for h in range(len(w) // c.head_dim) for i in range(2 * half)
            ]
            w = w[order]
        for i, part in enumerate(parts):
            cut = w if dim is None else w.chunk(files, dim)[i]
            part[".".join([*layer, theirs, "weight"])] = cut.clone()
    for i, part in enumerate(parts):
        part["rope.freqs"] = torch.full((c.head_dim // 2,), 99.0)
        if change:
            change(part)
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    d = {"dim": c.dim, "n_heads": c.heads, "n_layers": c.layers, "norm_eps": c.norm_eps, "vocab_size": -1}
    d |= {"n_kv_heads": c.kv_heads, "multiple_of": 128, "ffn_dim_multiplier": 1.3}
    d = {k: v for k, v in (d | (params or {})).items() if v != "remove"}
    (folder / "params.json").write_text(json.dumps(d))
    shutil.copy(tok.path, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def small70b(tok):
    """70B's ratios: 8 query heads to a key head, 64 heads, ffn 1.3 * 8/3 dim rounded up to a multiple of dim/2."""
    return random_net(ModelConfig(vocab_size=tok.size, dim=256, layers=3, heads=64, kv_heads=8, ffn=896))


@pytest.mark.parametrize("files", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metas_files_load_bit_for_bit(small70b, tok, tmp_path, files, dtype):
    def halve(part):
        part.update({k: w.to(dtype) for k, w in part.items()})

    folder = write_meta(tmp_path / "it", small70b, tok, files, change=halve)
    back, _ = load(folder)
    assert back.cfg == small70b.cfg
    assert back.state_dict().keys() == small70b.state_dict().keys()
    assert all(torch.equal(w, small70b.state_dict()[k].to(dtype).float()) for k, w in back.state_dict().items())


@pytest.mark.parametrize("name, dim, multiple, multiplier", [("7b", 4096, 256, None), ("13b", 5120, 256, None), ("70b", 8192, 4096, 1.3)])  # fmt: skip  # noqa: E501
def test_metas_params_give_the_named_sizes(tmp_path, name, dim, multiple, multiplier):
    c = CONFIGS[name]
    d = {"dim": dim, "multiple_of": multiple, "n_heads": c.heads, "n_layers": c.layers, "norm_eps": 1e-05}
    d |= {"vocab_size": -1} | ({"ffn_dim_multiplier": multiplier, "n_kv_heads": 8} if multiplier else {})
    (tmp_path / "params.json").write_text(json.dumps(d))
    assert model_py.read_params(tmp_path, 32000) == c


def test_loading_and_saving_again_gives_the_same_bytes(small70b, tok, tmp_path, monkeypatch):
    monkeypatch.setattr(model_py, "SHARD_BYTES", 1_000_000)
    for dtype in (torch.float32, torch.bfloat16):
        net = load(write_meta(tmp_path / f"meta {dtype}", small70b, tok, 2))[0]
        for source, target in ((None, "a"), ("a", "b")):
            net, its_tok = load(tmp_path / source) if source else (net, tok)
            save(net, its_tok, tmp_path / target, dtype)
        a, b = ({f.name: f.read_bytes() for f in (tmp_path / x).iterdir()} for x in "ab")
        assert a == b and len(a) > 8
        shutil.rmtree(tmp_path / "a"), shutil.rmtree(tmp_path / "b")


def script(text, *args):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", text, *map(str, args)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


@pytest.mark.parametrize("processes, tp", [(2, 1), (2, 2), (4, 2)])
def test_processes_load_and_save_their_shards_as_one_does_the_whole(cfg, small70b, tok, tmp_path, monkeypatch, processes, tp):  # fmt: skip  # noqa: E501
    sources = [write_meta(tmp_path / "meta", small70b, tok, 8)]
    for name, shape in (("odd", {"dim": 40, "ffn": 49 * tp, "layers": 3}), ("tied", {"tied": True})):
        save(random_net(replace(cfg, **shape)), tok, tmp_path / name)
        sources.append(tmp_path / name)
    codes = tiny.together(tiny.check_shards, [(rank, processes, tp, tmp_path, sources) for rank in range(processes)])
    assert codes == [0] * processes
    monkeypatch.setattr(model_py, "SHARD_BYTES", 500_000)
    for number, source in enumerate(sources):
        save(*load(source), tmp_path / "one", torch.bfloat16)
        one, ours = (
            {f.name: f.read_bytes() for f in x.iterdir()} for x in (tmp_path / "one", tmp_path / f"saved{number}")
        )
        assert one == ours
        shutil.rmtree(tmp_path / "one")


PEAK = """
import os, sys
from pathlib import Path
import torch
import model
small, hf, meta, out = sys.argv[1:]
model.SHARD_BYTES = 50_000_000

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

def peak(work):
    if os.fork() == 0:
        model.save(*model.load(small), out + "/small")  # a child has no pages of the libraries until it uses them
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        work()
        print(status("VmHWM") - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0

model.save(*model.load(small), out + "/small")
for folder in (hf, meta):
    peak(lambda: model.load(folder))
net, tok = model.load(hf)
for dtype in (torch.float32, torch.bfloat16):
    peak(lambda: model.save(net, tok, out + "/big", dtype))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory")
def test_loading_and_saving_need_little_more_memory_than_the_model(net, tok, tmp_path):
    shape = {"dim": 512, "layers": 8, "heads": 8, "kv_heads": 8, "ffn": 1408}
    big = random_net(ModelConfig(vocab_size=tok.size, **shape))
    save(big, tok, tmp_path / "hf")
    write_meta(tmp_path / "meta", big, tok, 1, {"ffn_dim_multiplier": None})
    save(net, tok, tmp_path / "small")
    worker = script(PEAK, *(tmp_path / name for name in ("small", "hf", "meta", "out")))
    out, err = worker.communicate(timeout=120)
    assert worker.returncode == 0, err
    size = sum(p.numel() * 4 for p in big.parameters()) / 1024
    load_hf, load_meta, save32, save16 = (int(line) / size for line in out.split())
    assert 0.9 < load_hf < 1.15
    assert 0.9 < load_meta < 1 + 1 / 8 + 0.1  # Meta's files are mapped, a block at a time
    assert max(save32, save16) < 0.15


# ---- what others read


WORDS = [
    *(
        "Hello",
        " world",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "é",
        "日本語",
        "😀",
        "👩\u200d🚀",
        "0x1F",
        "3.14",
        "Straße",
        "عربى",
        "a",
        ".",
    ),
    *("<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "s>", "<", "<|im_end|>", "\ufdd0"),
    *("{{ x }}", "{% if %}", "'", '"', "\\n", "\x00", "\u3000", "\x85", "\u2028", "code();", "▁"),
]


@pytest.mark.parametrize("which", ["Llama 2's", "small", "stories'"])
def test_autotokenizer_gives_our_ids_of_two_hundred_chats(which, tok, net, shared, tmp_path):
    if which != "small":
        folder = shared / ("tokenizer" if which == "Llama 2's" else "stories260K/hf")
        tok = Tokenizer(folder / "tokenizer.model")
    save(random_net(replace(net.cfg, vocab_size=tok.size, layers=1)), tok, tmp_path / "it", torch.bfloat16)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "it")
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id) == (tok.size, tok.bos, tok.eos)
    rng, words = random.Random(0), WORDS[: -1 if which == "stories'" else None]  # ▁ is a space there, which it drops
    for number in range(200):
        turns = ["".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(rng.choice([1, 1, 3, 5]))]
        messages = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(turns)]
        system = [{"role": "system", "content": ""}] * (number % 2)
        assert theirs.apply_chat_template(system + messages)["input_ids"] == tok.chat(*turns), turns
        answered = [*messages, {"role": "assistant", "content": "So </s> it is."}]
        assert theirs.apply_chat_template(answered)["input_ids"] == tok.chat(*turns) + tok.response("So </s> it is.")
        plain = turns[0].replace("<s>", "").replace("</s>", "").replace("<unk>", "")
        assert theirs.encode(plain) == tok.raw(plain)
        assert theirs.decode(tok.encode(plain)) == tok.decode(tok.encode(plain))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages)["input_ids"] == tok.chat("<<SYS>>\nBe kind.\n<</SYS>>\n\nHi")
    with pytest.raises(Exception, match="user, assistant"):
        theirs.apply_chat_template([{"role": "user", "content": "a"}] * 2)


def test_transformers_generates_from_our_folder_until_our_end_of_sequence(net, tok, tmp_path):
    save(net, tok, tmp_path / "it")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "it")
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (tok.bos, tok.eos)


# ---- checkpoints that are bad


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, shape):
    return lambda tensors: tensors.__setitem__(name, torch.zeros(shape))


def edit(name, make):
    return lambda folder: (folder / name).write_bytes(make((folder / name).read_bytes()))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 499723\n"
HTML = b"<!DOCTYPE html>\n<html><title>404</title></html>\n"
BAD = {
    # name: (config.json, tensors, folder, what the message must name)
    "no config": ({}, None, lambda f: (f / "config.json").unlink(), ["config.json"]),
    "broken json": ({}, None, edit("config.json", lambda b: b[: len(b) // 2]), ["config.json"]),
    "config not utf-8": ({}, None, edit("config.json", lambda b: b"\xff\xfe" + b), ["config.json"]),
    "config is a list": ({}, None, edit("config.json", lambda b: b"[]"), ["config.json"]),
    "mistral": ({"model_type": "mistral"}, None, None, ["config.json", "mistral"]),
    "no model_type": ({"model_type": "remove"}, None, None, ["config.json", "model_type"]),
    "scaled rope": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None, None, ["config.json", "llama3"]),
    "old scaled rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None, None, ["config.json", "linear"]),
    "attention bias": ({"attention_bias": True}, None, None, ["config.json", "attention_bias"]),
    "gelu": ({"hidden_act": "gelu"}, None, None, ["config.json", "gelu"]),
    "no hidden_size": ({"hidden_size": "remove"}, None, None, ["config.json", "hidden_size"]),
    "null hidden_size": ({"hidden_size": None}, None, None, ["config.json"]),
    "no heads at all": ({"num_attention_heads": 0}, None, None, ["config.json"]),
    "null context": ({"max_position_embeddings": None}, None, None, ["config.json"]),
    "other head_dim": ({"head_dim": 16}, None, None, ["config.json", "head_dim"]),
    "odd kv heads": ({"num_key_value_heads": 3}, None, None, ["config.json", "heads"]),
    "missing weight": ({}, remove("model.layers.1.mlp.up_proj.weight"), None, ["model.layers.1.mlp.up_proj.weight"]),
    "no head": ({}, remove("lm_head.weight"), None, ["lm_head.weight"]),
    "extra weight": ({}, put("model.layers.0.self_attn.q_proj.bias", 32), None, ["self_attn.q_proj.bias"]),
    "one layer more": ({"num_hidden_layers": 1}, None, None, ["model.layers.1"]),
    "wrong shape": ({}, put("model.norm.weight", 31), None, ["model.safetensors", "model.norm.weight", "31", "32"]),
    "wrong width": ({"intermediate_size": 64}, None, None, ["model.safetensors", "48", "64"]),
    "truncated": ({}, None, edit("model.safetensors", lambda b: b[: len(b) // 2]), ["model.safetensors"]),
    "empty weights": ({}, None, edit("model.safetensors", lambda b: b""), ["model.safetensors"]),
    "LFS pointer": ({}, None, edit("model.safetensors", lambda b: POINTER), ["model.safetensors", "LFS"]),
    "html weights": ({}, None, edit("model.safetensors", lambda b: HTML), ["model.safetensors"]),
    "no weights": ({}, None, lambda f: (f / "model.safetensors").unlink(), ["model.safetensors"]),
    "missing shard": ({}, None, lambda f: (f / model_py.SHARD_INDEX).write_text(
        '{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}'), ["model-00002-of-00002"]),
    "index without map": ({}, None, lambda f: (f / model_py.SHARD_INDEX).write_text("{}"), [model_py.SHARD_INDEX]),
    "broken index": ({}, None, lambda f: (f / model_py.SHARD_INDEX).write_text('{"we'), [model_py.SHARD_INDEX]),
    "no tokenizer": ({}, None, lambda f: (f / "tokenizer.model").unlink(), ["tokenizer.model"]),
    "html tokenizer": ({}, None, edit("tokenizer.model", lambda b: HTML), ["tokenizer.model"]),
    "empty tokenizer": ({}, None, edit("tokenizer.model", lambda b: b""), ["tokenizer.model"]),
    "LFS tokenizer": ({}, None, edit("tokenizer.model", lambda b: POINTER), ["tokenizer.model"]),
    "cut tokenizer": ({}, None, edit("tokenizer.model", lambda b: b[:999]), ["tokenizer.model"]),
    "other tokenizer": ({"vocab_size": 321}, None, None, ["tokenizer.model", "320", "321"]),
}  # fmt: skip


META_BAD = {
    # name: (params.json, change of every file, folder, what the message must name); two files unless more are asked for
    "html weights": ({}, None, edit("consolidated.00.pth", lambda b: HTML), ["consolidated.00.pth", "web page"]),
    "LFS pointer": ({}, None, edit("consolidated.01.pth", lambda b: POINTER), ["consolidated.01.pth", "LFS"]),
    "empty": ({}, None, edit("consolidated.00.pth", lambda b: b""), ["consolidated.00.pth", "empty"]),
    "truncated": ({}, None, edit("consolidated.01.pth", lambda b: b[: len(b) // 2]), ["consolidated.01.pth", "short"]),
    "not a dict": ({}, None, lambda f: torch.save([1], f / "consolidated.00.pth"), ["consolidated.00.pth"]),
    "not tensors": ({}, None, lambda f: torch.save({"a": 1}, f / "consolidated.00.pth"), ["consolidated.00.pth"]),
    "code": ({}, None, lambda f: torch.save({"a": os.system}, f / "consolidated.00.pth"), ["consolidated.00.pth"]),
    "no first file": ({}, None, lambda f: (f / "consolidated.00.pth").unlink(), ["consolidated.00.pth", "not found"]),
    "no last file": ({}, None, lambda f: (f / "consolidated.01.pth").unlink(), ["consolidated.01.pth", "not found"]),
    "no files": ({}, None, lambda f: [p.unlink() for p in f.glob("*.pth")], ["consolidated.00.pth", "not found"]),
    "one file too many": ({}, None, lambda f: shutil.copy(f / "consolidated.01.pth", f / "consolidated.02.pth"),
                          ["consolidated.00.pth", "shape"]),
    "embedding cut as Llama 3's": ({}, put("tok_embeddings.weight", (160, 256)), None,
                                   ["consolidated.00.pth", "tok_embeddings.weight", "(160, 256)", "(320, 128)"]),
    "output cut by columns": ({}, put("output.weight", (320, 128)), None, ["consolidated.00.pth", "output.weight"]),
    "wo cut by rows": ({}, put("layers.1.attention.wo.weight", (128, 256)), None, ["layers.1.attention.wo.weight"]),
    "not cut": ({}, put("layers.1.attention.wq.weight", (256, 256)), None, ["layers.1.attention.wq.weight"]),
    "missing weight": ({}, remove("layers.2.feed_forward.w3.weight"), None, ["model.layers.2.mlp.up_proj.weight"]),
    "extra weight": ({}, put("layers.0.lora.weight", (1, 1)), None, ["layers.0.lora.weight"]),
    "no params": ({}, None, lambda f: (f / "params.json").unlink(), ["params.json", "not found"]),
    "html params": ({}, None, edit("params.json", lambda b: HTML), ["params.json", "JSON"]),
    "no dim": ({"dim": "remove"}, None, None, ["params.json", "dim"]),
    "dim a word": ({"dim": "256"}, None, None, ["params.json"]),
    "no layers": ({"n_layers": 0}, None, None, ["params.json"]),
    "other width": ({"multiple_of": 512}, None, None, ["feed_forward.w1.weight", "448", "512"]),
    "Llama 3's rope": ({"use_scaled_rope": True}, None, None, ["params.json", "use_scaled_rope"]),
    "other vocabulary": ({"vocab_size": 32000}, None, None, ["tokenizer.model", "320", "32000"]),
    "no tokenizer": ({}, None, lambda f: (f / "tokenizer.model").unlink(), ["tokenizer.model"]),
}  # fmt: skip


@pytest.mark.parametrize("case", META_BAD)
def test_a_bad_folder_of_metas_is_refused_by_one_line_that_names_the_file(small70b, tok, tmp_path, case):
    params, change, damage, names = META_BAD[case]
    folder = write_meta(tmp_path / "it", small70b, tok, 2, params, change)
    if damage:
        damage(folder)
    with pytest.raises(BadInput) as e:
        load(folder)
    assert "\n" not in str(e.value)
    assert all(name in str(e.value) for name in [str(folder), *names]), str(e.value)


@pytest.mark.parametrize("number", [0, 3, 7])
def test_of_eight_consolidated_files_the_missing_one_is_named(small70b, tok, tmp_path, number):
    folder = write_meta(tmp_path / "it", small70b, tok, 8)
    (folder / f"consolidated.{number:02}.pth").unlink()
    with pytest.raises(BadInput, match=rf"consolidated.{number:02}.pth: not found"):
        load(folder)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_checkpoint_is_refused_by_one_line_that_names_the_file(net, tok, tmp_path, case):
    config, change, damage, names = BAD[case]
    folder = write_checkpoint(tmp_path / "it", net, tok, config, change)
    if damage:
        damage(folder)
    with pytest.raises(BadInput) as e:
        load(folder)
    message = str(e.value)
    assert "\n" not in message
    assert str(folder) in message
    for name in names:
        assert name in message


def test_the_hand_made_checkpoint_is_good_when_nothing_is_changed(net, tok, tmp_path):
    assert equal_weights(load(write_checkpoint(tmp_path / "it", net, tok))[0], net)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match=re.escape(str(tmp_path / "gone"))):
        load(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="no such folder"):
        load(tmp_path / "file")


def test_gathering_a_model_that_is_not_sharded_changes_nothing(net):
    tokens = ids(net.cfg, 1, 6)
    want = net(tokens)
    with gathered(net) as inside:
        assert inside is net
        assert torch.equal(net(tokens), want)
    assert torch.equal(net(tokens), want)
    with pytest.raises(ZeroDivisionError), gathered(net):
        1 / 0  # noqa: B018


def test_the_memory_bench_finds_the_parts_that_can_be_counted_by_hand(tmp_path):
    """The toy on four fake processes, each with half of half of every matrix and half of the norms."""
    argv = ["--config", "toy", "--gpus", "4", "--tp", "2", "--rows", "2", "--length", "128", "--json"]
    cases = [argv + [str(tmp_path / name), "--cases", *rest]
             for name, *rest in (("plain", "sft,sample"), ("recompute", "sft", "--recompute"))]  # fmt: skip
    assert tiny.together(bench_memory.main, [(case,) for case in cases]) == [0, 0]
    rows = {r["case"]: r["bytes"] for r in json.loads((tmp_path / "plain").read_text())}
    matrices = 2 * 1024 * 160 + 4 * (160 * 160 * 2 + 80 * 160 * 2 + 3 * 160 * 432)
    held = matrices // 4 + 9 * 160 // 2
    for case in rows.values():
        assert case["weights"] == 4 * held and sum(case.values()) == 2 * case["total"], case
    assert rows["sft"]["optimizer"] == pytest.approx(2 * 4 * held, rel=1e-3)
    assert rows["sft"].get("gradients", 0) <= 4 * held
    assert rows["sample"]["gathered"] == 2 * (matrices // 2 + 9 * 160)
    assert rows["sample"]["kv cache"] == 2 * 4 * 2 * 128 * 1 * 40 * 2  # k and v, layers, rows, tokens, head, hd, bf16
    assert rows["sample"]["activations"] >= 0
    (less,) = json.loads((tmp_path / "recompute").read_text())
    assert less["bytes"]["activations"] < 0.7 * rows["sft"]["activations"]


def test_a_saved_checkpoint_can_be_read_by_whoever_may_read_the_users_other_files(net, tok, tmp_path):
    save(net, tok, tmp_path / "out")
    (tmp_path / "plain").write_text("")
    modes = {p.stat().st_mode for p in [tmp_path / "plain", *(tmp_path / "out").iterdir()]}
    assert len(modes) == 1
