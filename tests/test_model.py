"""model.py against transformers, published numbers, the real tokenizer and every kind of broken checkpoint."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import random_net
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import model as model_py
from model import (
    CONFIGS,
    BadInput,
    Llama,
    ModelConfig,
    Tokenizer,
    attend,
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
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
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


def test_rope_angles_are_true_at_position_4095():

    cos, sin = rope_tables(torch.tensor([[4095]]), 128, 10000.0)
    angles = [4095 * 10000.0 ** (-2 * i / 128) for i in range(64)]  # Python floats are fp64
    torch.testing.assert_close(cos.flatten(), torch.tensor([math.cos(a) for a in angles]), atol=1e-3, rtol=0)
    torch.testing.assert_close(sin.flatten(), torch.tensor([math.sin(a) for a in angles]), atol=1e-3, rtol=0)


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_attention_equals_the_fused_kernel_with_and_without_a_mask(heads, kv_heads, device):
    tolerance = {"atol": 1e-5 if device == "cpu" else 1e-3, "rtol": 0}
    g = torch.Generator().manual_seed(heads)
    q = torch.randn(2, heads, 5, 8, generator=g)
    k, v = torch.randn(2, 2, kv_heads, 9, 8, generator=g)
    mask = torch.rand(2, 5, 9, generator=g) < 0.5
    mask[..., 0] = True  # every query looks somewhere
    full = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    want = F.scaled_dot_product_attention(q, *full, attn_mask=mask[:, None])
    got = attend(*(x.to(device) for x in (q, k, v, mask))).cpu()
    torch.testing.assert_close(got, want, **tolerance)

    k, v = k[:, :, :5], v[:, :, :5]
    full = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    want = F.scaled_dot_product_attention(q, *full, is_causal=True)
    torch.testing.assert_close(attend(*(x.to(device) for x in (q, k, v))).cpu(), want, **tolerance)


def test_dropout_acts_in_train_mode_only(cfg):
    tokens, plain, dropping = ids(cfg, 2, 6), random_net(cfg), random_net(cfg, dropout=0.3)
    assert torch.equal(dropping.eval()(tokens), plain(tokens))
    dropping.train()
    assert not torch.allclose(dropping(tokens), dropping(tokens), atol=1e-2)
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens)), "rate 0 drops nothing"


def test_a_cache_fed_in_ragged_pieces_gives_the_logits_of_one_pass(net):
    a, b = ids(net.cfg, 1, 11, seed=1), ids(net.cfg, 1, 8, seed=2)
    cache = net.new_cache(2, 16)
    first = torch.zeros(2, 6, dtype=torch.long)
    first[0], first[1, :3] = a[0, :6], b[0, :3]  # the second row is shorter: rubbish stays behind its end
    x = net(first, cache)
    cache.advance(torch.tensor([6, 3]), 6)
    y = net(torch.cat((a[:, 6:], b[:, 3:])), cache)  # five more tokens each
    want_a, want_b = net(a)[0], net(b)[0]
    torch.testing.assert_close(torch.cat((x[0], y[0])), want_a, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat((x[1, :3], y[1])), want_b, atol=1e-4, rtol=1e-4)


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


# ---- checkpoints that are good


@pytest.mark.parametrize("kind", ["hf", "hf-sharded"])
def test_real_weights_load_and_give_the_logits_of_transformers(shared, kind):
    ours, tok = load(shared / "stories260K" / kind)
    theirs = AutoModelForCausalLM.from_pretrained(shared / "stories260K" / kind, dtype=torch.float32)
    tokens = torch.tensor([json.loads((shared / "stories260K" / "greedy.json").read_text())["ids"]])
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert equal_weights(ours, load(shared / "stories260K" / "hf")[0])
    assert tok.size == ours.cfg.vocab_size == 512 and ours.cfg.kv_heads == 4


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
    names = {"config.json", "model.safetensors", "tokenizer.model"}
    assert {f.name for f in (tmp_path / "m").iterdir()} == names


def test_only_the_writing_process_touches_the_disk(cfg, net, tok, tmp_path):
    save(net, tok, tmp_path / "m", write=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("function", ["save_file", "write_text", "write_config"])
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
                if function == "save_file":
                    args[1].write_bytes(b"half")
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
    assert kills >= {"save_file": 3, "write_text": 2, "write_config": 1}[function]


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


def test_a_saved_checkpoint_can_be_read_by_whoever_may_read_the_users_other_files(net, tok, tmp_path):
    save(net, tok, tmp_path / "out")
    (tmp_path / "plain").write_text("")
    modes = {p.stat().st_mode for p in [tmp_path / "plain", *(tmp_path / "out").iterdir()]}
    assert len(modes) == 1
