"""model.py against transformers, published numbers, the real tokenizer and all kinds of broken
model folders."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import safetensors
import sentencepiece
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ROOT, TEXT, random_net, transformers_twin
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import model as model_py
from dpo import PackedBatch
from model import (
    CausalContext,
    Llama,
    ModelConfig,
    Tokenizer,
    UserError,
    check_tp,
    load,
    parallelize,
    rope_tables,
    rotate,
    save,
    unsharded,
)


def random_ids(cfg, count, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, cfg.vocab_size, (count, length), generator=generator)


def equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- the network -----------------------------------------------------------------------------

SHAPES = [
    {"dim": 32, "heads": 4, "kv_heads": 2, "layers": 2, "ffn": 48},
    {"dim": 48, "heads": 6, "kv_heads": 1, "layers": 3, "ffn": 100, "norm_eps": 1e-3},
    {"dim": 40, "heads": 5, "kv_heads": 5, "layers": 1, "ffn": 64, "rope_theta": 500.0},
    {"dim": 64, "heads": 8, "kv_heads": 4, "layers": 2, "ffn": 96, "tie_embeddings": True},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s['heads']}-{s['kv_heads']}")
def test_logits_and_gradients_equal_those_of_transformers(shape):
    cfg = ModelConfig(vocab_size=97, max_len=64, **shape)
    net = random_net(cfg, seed=cfg.dim, std=0.15)
    twin = transformers_twin(net)
    tokens = random_ids(cfg, 3, 33)
    ours, theirs = net(tokens), twin(tokens).logits
    assert theirs.std() > 0.3
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for logits in (ours, theirs):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    grads = {model_py.hf_name(name): p.grad for name, p in net.named_parameters()}
    assert grads
    for name, p in twin.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, atol=1e-4, rtol=1e-3)


PUBLISHED_SIZES = {
    "7b": ({}, 6_738_415_616),  # the defaults
    "13b": ({"dim": 5120, "layers": 40, "heads": 40, "kv_heads": 40, "ffn": 13824}, 13015864320),
    "70b": ({"dim": 8192, "layers": 80, "heads": 64, "kv_heads": 8, "ffn": 28672}, 68976648192),
}


@pytest.mark.parametrize("name", PUBLISHED_SIZES)
def test_llama_2s_sizes_have_the_published_number_of_parameters(name):
    shape, count = PUBLISHED_SIZES[name]
    with torch.device("meta"):
        net = Llama(ModelConfig(**shape))
    assert sum(p.numel() for p in net.parameters()) == count


def test_a_readout_takes_the_place_of_the_logits(net):
    tokens = random_ids(net.cfg, 2, 7)
    last = net(tokens, readout=lambda hidden, lm_head: lm_head(hidden[:, -1]))
    torch.testing.assert_close(last, net(tokens)[:, -1], atol=1e-5, rtol=1e-5)


def test_rope_angles_are_true_at_position_4095():
    cos, sin = rope_tables(torch.tensor([[4095]]), 128, 10000.0)
    angles = [4095 * 10000.0 ** (-2 * i / 128) for i in range(64)]  # Python floats are fp64
    true_cos = torch.tensor([math.cos(a) for a in angles])
    true_sin = torch.tensor([math.sin(a) for a in angles])
    torch.testing.assert_close(cos.flatten(), true_cos.repeat(2), atol=1e-3, rtol=0)
    want = torch.cat((-true_sin, true_sin))
    torch.testing.assert_close(sin.flatten(), want, atol=1e-3, rtol=0)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def turn(x, position):
        return rotate(x, *rope_tables(torch.tensor([[position]]), 16, 1e4))

    def product(m, n):
        return (turn(q, m) * turn(k, n)).sum()

    torch.testing.assert_close(product(7, 3), product(57, 53), atol=1e-4, rtol=1e-4)
    assert abs(product(7, 3) - product(7, 6)) > 1e-1
    torch.testing.assert_close(turn(q, 99).norm(), q.norm())


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a build without oneDNN")
def test_products_by_onednn_leave_logits_and_gradients_as_they_are(cfg, monkeypatch):
    """They serve all matrices, forward and backward, but not few rows."""
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    keeps_fp32 = model_py.onednn_keeps_fp32()
    permissions = []
    matmul_precision = model_py.matmul_precision

    def watched(precision):
        permissions.append(precision)
        return matmul_precision(precision if keeps_fp32 else before)

    def measure(ids, readout=None, use=False):
        permissions.clear()
        net = random_net(cfg)
        if use:
            model_py.use_onednn_linear(net)
        out = net(ids, None, readout)
        out.square().mean().backward()
        assert matmul.fp32_precision == before
        return [out, *(p.grad for p in net.parameters())]

    monkeypatch.setattr(model_py, "onednn_keeps_fp32", lambda: True)
    monkeypatch.setattr(model_py, "matmul_precision", watched)
    measure(random_ids(cfg, 5, 51), use=True)
    assert not permissions, "255 rows"
    many_rows = random_ids(cfg, 4, 64)
    matrices = 7 * cfg.layers + 1
    for name, readout, products in (
        ("logits", None, 2 * matrices),
        ("two dimensions", lambda hidden, lm_head: lm_head(hidden.flatten(0, 1)), 2 * matrices),
        ("few logits", lambda hidden, lm_head: lm_head(hidden[:, -1]), 2 * (matrices - 1)),
    ):
        by_onednn = measure(many_rows, readout, use=True)
        assert permissions == ["bf16"] * products, name
        for a, b in zip(by_onednn, measure(many_rows, readout), strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name


def test_onednn_is_asked_whether_it_rounds(monkeypatch):
    """Factors that are rounded to bf16 on the way are noticed."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    model_py.onednn_keeps_fp32.cache_clear()
    if model_py.onednn_keeps_fp32():
        with model_py.matmul_precision("bf16"):
            torch.testing.assert_close(
                (a @ b).double(), a.double() @ b.double(), atol=2e-4, rtol=0
            )
    model_py.onednn_keeps_fp32.cache_clear()
    plain = torch.Tensor.__matmul__

    def rounded(x, y):
        return plain(x.bfloat16().float(), y) if x.dtype == torch.float32 else plain(x, y)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not model_py.onednn_keeps_fp32()
    model_py.onednn_keeps_fp32.cache_clear()


def test_right_padding_leaves_the_logits_of_real_tokens_unchanged(net):
    tokens = random_ids(net.cfg, 2, 12)
    padded = torch.cat((tokens, torch.zeros(2, 9, dtype=torch.long)), 1)
    torch.testing.assert_close(net(padded)[:, :12], net(tokens), atol=1e-5, rtol=1e-5)


def test_no_position_sees_the_future(net):
    a = random_ids(net.cfg, 1, 12)
    b = a.clone()
    b[0, 7] = (b[0, 7] + 1) % net.cfg.vocab_size
    before, after = net(a), net(b)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert not torch.allclose(before[:, 7:], after[:, 7:], atol=1e-3)


def attend_by_hand(q, k, v):
    """Causal attention of the definition, in fp64: a query head at a time."""
    outputs = []
    group = q.shape[1] // k.shape[1]
    for head in range(q.shape[1]):
        query, key, value = q[:, head], k[:, head // group], v[:, head // group]
        scores = query.double() @ key.double().mT / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value.double())
    return torch.stack(outputs, dim=1).float()


no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=no_gpu)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (6, 1)])
def test_without_a_context_texts_see_what_a_packed_batch_of_them_sees(heads, kv_heads, device):
    generator = torch.Generator().manual_seed(heads)
    q = torch.randn(2, heads, 5, 8, generator=generator)
    k, v = torch.randn(2, 2, kv_heads, 5, 8, generator=generator)
    want = attend_by_hand(q, k, v)
    q, k, v = (t.to(device) for t in (q, k, v))
    atol = 1e-5 if device == "cpu" else 1e-3

    causal = CausalContext(5, device)
    assert causal.positions.tolist() == [[0, 1, 2, 3, 4]]
    torch.testing.assert_close(causal.attend(0, q, k, v).cpu(), want, atol=atol, rtol=0)

    packed = PackedBatch([(5, 0, 0), (5, 1, 0)], device)
    assert packed.positions.tolist() == [[0, 1, 2, 3, 4] * 2]
    flat = (t.transpose(0, 1).flatten(1, 2)[None] for t in (q, k, v))  # (1, H or K, 2 * 5, hd)
    out = packed.attend(0, *flat)[0].unflatten(1, (2, 5)).transpose(0, 1)
    torch.testing.assert_close(out.cpu(), want, atol=atol, rtol=0)


def test_logits_of_texts_side_by_side_are_those_of_a_packed_batch(net):
    tokens = random_ids(net.cfg, 3, 11)
    packed = PackedBatch([(11, i, 0) for i in range(3)])
    logits = net(tokens.view(1, -1), packed).view(3, 11, -1)
    torch.testing.assert_close(net(tokens), logits, atol=1e-5, rtol=1e-5)


def test_dropout_acts_in_train_mode_only(cfg):
    tokens = random_ids(cfg, 2, 6)
    plain, dropping = random_net(cfg), random_net(cfg, dropout=0.3)
    assert torch.equal(dropping.eval()(tokens), plain(tokens))
    dropping.train()
    assert not torch.allclose(dropping(tokens), dropping(tokens), atol=1e-2)
    assert torch.equal(plain.train()(tokens), plain.eval()(tokens)), "rate 0 drops nothing"


# ---- text <-> ids ----------------------------------------------------------------------------


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
    ids = [29871, 30325, 30346, 30968, 30572, 30454, 30255, 30279, 243, 162, 155, 131]
    assert t.encode(text) == ids
    assert t.encode("\n")[-1] == 13 and t.newlines == [13]
    assert t.decode(t.encode(f"{text}\n\tline  two ")) == f"{text}\n\tline  two "


def test_the_chat_format_is_llama_2s(llama_tok):
    t = llama_tok
    assert t.chat("Hi") == [1, 518, 25580, 29962, 6324, 518, 29914, 25580, 29962]
    assert t.chat("  Hi\n") == t.chat("Hi"), "Meta's code strips the turns"
    # with the response: what SentencePiece makes of the documented text as a whole
    whole = t.sp.encode("[INST] Hi [/INST] Hello")
    assert t.chat("Hi") + t.response("Hello") == [1, *whole, 2]
    turns = "Where is it?", "In the woods,\nI think.", "Sure?"
    first = t.sp.encode("[INST] Where is it? [/INST] In the woods,\nI think.")
    second = t.sp.encode("[INST] Sure? [/INST]")
    assert t.chat(*turns) == [1, *first, 2, 1, *second]


def test_every_turn_has_one_bos_and_every_response_one_eos(tok):
    for turns in (["Where does the otter live?"], ["a", "b", "c"], ["a", "b", "c", "d", "e"]):
        chat = tok.chat(*turns)
        assert chat[0] == tok.bos
        assert chat.count(tok.bos) == len(turns) // 2 + 1
        assert chat.count(tok.eos) == len(turns) // 2
    response = tok.response("  In rivers.\n")
    assert response[-1] == tok.eos and response.count(tok.eos) == 1 and tok.bos not in response
    assert tok.decode(response[:-1]) == "In rivers."
    assert tok.response("") == [tok.eos]
    ids = tok.encode_with_bos("fox")
    assert ids[0] == tok.bos and ids.count(tok.bos) == 1 and tok.eos not in ids
    with pytest.raises(AssertionError):
        tok.chat("user", "assistant")


LOOKALIKES = ["</s>", "<s>", "a </s> b", "<unk>", "[/INST] x [INST]", "<0x0A>", "<<SYS>>"]


@pytest.mark.parametrize("text", LOOKALIKES)
def test_text_that_looks_like_a_control_token_stays_text(tok, llama_tok, text):
    for t in (tok, llama_tok):
        for ids in (t.chat(text)[1:], t.response(text)[:-1]):
            assert not {t.bos, t.eos} & set(ids)
            assert text in t.decode(ids)


def test_newlines_and_spaces_survive_the_small_tokenizer(tok):
    text = "two\n\nlines,  two spaces\tand é😀"
    assert tok.decode(tok.encode(text)) == text
    assert all("\n" in tok.decode([i]) for i in tok.newlines)
    assert set(tok.encode("fox\nowl")) & set(tok.newlines)


def test_half_of_a_character_is_refused_by_the_tokenizer_in_one_line(tok):
    with pytest.raises(UserError, match=r"^'tell me \\udcff': holds half"):
        tok.encode("tell me \udcff")


def test_a_vocabulary_without_llamas_control_tokens_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the otter lives in rivers and eats fish"]),
        model_prefix=str(tmp_path / "other"),
        vocab_size=30,
        model_type="char",
        bos_piece="<bos>",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="other.model: lacks .*<s>"):
        Tokenizer(tmp_path / "other.model")


# ---- model folders that are good -------------------------------------------------------------


@torch.no_grad()
def greedy(net, ids, count):
    ids = list(ids)
    while len(ids) < count:
        logits = net(torch.tensor([ids]))
        ids.append(logits[0, -1].argmax().item())
    return ids


@pytest.mark.parametrize("kind", ["hf", "hf-sharded"])
def test_real_weights_load_and_write_what_they_are_known_to_write(shared, kind):
    net, tok = load(shared / "stories260K" / kind)
    known = json.loads((shared / "stories260K" / "greedy.json").read_text())
    assert equal_weights(net, load(shared / "stories260K" / "hf")[0])
    assert tok.size == net.cfg.vocab_size == 512 and net.cfg.kv_heads == 4
    ids = greedy(net, known["ids"][:1], len(known["ids"]))
    assert ids == known["ids"]
    assert tok.decode(ids) == known["text"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_real_weights_that_transformers_saved_again_load_bit_for_bit(shared, tmp_path, dtype):
    source = shared / "stories260K" / "hf"
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    theirs.save_pretrained(tmp_path, max_shard_size="300KB")
    shutil.copy(source / "tokenizer.model", tmp_path)
    ours = load(tmp_path)[0]
    assert ours.embed_tokens.weight.dtype == torch.float32
    assert equal_weights(ours, load(source)[0].to(dtype).float())
    tokens = random_ids(ours.cfg, 1, 60)
    logits = theirs.float()(tokens).logits
    torch.testing.assert_close(ours(tokens), logits, atol=1e-4, rtol=1e-4)


def check_weight_files(folder, net, shard_bytes):
    """No file is larger than it may be, and the index names what each holds."""
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    index_file = folder / model_py.SHARD_INDEX
    assert (len(files) > 3) == index_file.exists() == (shard_bytes == 10_000)
    if not index_file.exists():
        assert files.keys() == {"model.safetensors"}
        return
    for tensors in files.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= shard_bytes
    index = json.loads(index_file.read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in net.parameters())
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    assert index["weight_map"] == weight_map


@pytest.mark.parametrize("shard_bytes", [1 << 30, 10_000], ids=["one file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [False, True])
def test_what_we_save_loads_bit_for_bit_here_and_in_transformers(
    cfg, tok, tmp_path, monkeypatch, dtype, tie, shard_bytes
):
    monkeypatch.setattr(model_py, "SHARD_BYTES", shard_bytes)
    cfg = replace(cfg, tie_embeddings=tie, rope_theta=5000.0, norm_eps=1e-6)
    net = random_net(cfg).to(dtype)
    save(net, tok, tmp_path / "new")
    check_weight_files(tmp_path / "new", net, shard_bytes)

    back, back_tok = load(tmp_path / "new", dtype)
    assert equal_weights(net, back) and back.cfg == cfg
    assert all(p.requires_grad for p in back.parameters())
    assert back_tok.path.read_bytes() == tok.path.read_bytes()
    assert (back.lm_head.weight is back.embed_tokens.weight) == tie

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert theirs.dtype == dtype
    state = theirs.state_dict()
    for name, p in net.state_dict().items():
        assert torch.equal(state[model_py.hf_name(name)], p), name
    if dtype == torch.float32:
        tokens = random_ids(cfg, 2, 20)
        logits = theirs(tokens).logits
        torch.testing.assert_close(back(tokens), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_loads_here_bit_for_bit(cfg, tok, tmp_path, dtype, tie):
    net = random_net(replace(cfg, tie_embeddings=tie, rope_theta=777.0)).to(dtype)
    theirs = transformers_twin(net).to(dtype)
    theirs.save_pretrained(tmp_path / "new", max_shard_size="20KB")
    shutil.copy(tok.path, tmp_path / "new" / "tokenizer.model")
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    back, _ = load(tmp_path / "new", dtype)
    assert equal_weights(net, back)
    assert back.cfg == net.cfg


def test_loading_and_saving_again_gives_the_same_bytes(cfg, tok, tmp_path, monkeypatch):
    monkeypatch.setattr(model_py, "SHARD_BYTES", 50_000)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = tmp_path / f"a {dtype}", tmp_path / f"b {dtype}"
        save(random_net(cfg).to(dtype), tok, a, {"temperature": 0.7, "top_p": 0.9})
        save(*load(a, dtype), b, {"temperature": 0.7, "top_p": 0.9})
        assert read_files(a) == read_files(b) and len(read_files(a)) >= 8


def test_a_model_loads_in_the_precision_and_with_the_dropout_that_are_asked_for(
    cfg, net, tok, tmp_path
):
    save(net, tok, tmp_path / "m")
    half, _ = load(tmp_path / "m", torch.bfloat16, dropout=0.25)
    assert equal_weights(half, random_net(cfg).to(torch.bfloat16))
    assert [block.dropout.p for block in half.layers] == [0.25, 0.25]


def write_folder(folder, net, tok, config=None, change=None):
    """A model folder written by hand as transformers 4 does, with one thing changed."""
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
        "tie_word_embeddings": c.tie_embeddings,
    }
    d = {key: value for key, value in (d | (config or {})).items() if value != "remove"}
    (folder / "config.json").write_text(json.dumps(d))
    tensors = {model_py.hf_name(name): p.clone() for name, p in net.state_dict().items()}
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(tok.path, folder / "tokenizer.model")
    return folder


def test_the_folder_written_by_hand_is_good_when_nothing_is_changed(net, tok, tmp_path):
    assert equal_weights(load(write_folder(tmp_path / "it", net, tok))[0], net)


def test_a_folder_of_older_transformers_with_stored_rope_tables_loads(cfg, tok, tmp_path):
    net = random_net(replace(cfg, rope_theta=1234.0))

    def add_tables(tensors):
        for i in range(cfg.layers):
            name = f"model.layers.{i}.self_attn.rotary_emb.inv_freq"
            tensors[name] = torch.full((4,), 99.0)

    back, _ = load(write_folder(tmp_path / "old", net, tok, change=add_tables))
    assert back.cfg.rope_theta == 1234.0
    tokens = random_ids(cfg, 1, 30)
    assert torch.equal(back(tokens), net(tokens))
    assert not torch.allclose(back(tokens), random_net(cfg)(tokens), atol=1e-3), "theta matters"


def test_a_config_may_leave_out_what_has_a_default(cfg, tok, tmp_path):
    """One key/value head for each head, an output head of its own."""
    net = random_net(replace(cfg, kv_heads=cfg.heads))
    config = {"num_key_value_heads": "remove", "tie_word_embeddings": "remove"}
    back, _ = load(write_folder(tmp_path / "old", net, tok, config))
    assert equal_weights(net, back) and back.cfg == net.cfg


def test_a_tied_model_whose_file_holds_the_head_as_well_loads(cfg, tok, tmp_path):
    net = random_net(replace(cfg, tie_embeddings=True))
    folder = write_folder(tmp_path / "tied", net, tok)
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    back, _ = load(folder)
    assert equal_weights(net, back) and back.lm_head.weight is back.embed_tokens.weight


def test_a_tied_model_whose_file_holds_another_head_is_refused(cfg, tok, tmp_path):
    """By its weights it is not tied: it would answer with the wrong head."""
    net = random_net(replace(cfg, tie_embeddings=True))
    head = random_net(cfg, seed=1).lm_head.weight.detach()
    folder = write_folder(tmp_path / "it", net, tok, change=put("lm_head.weight", *head.shape))
    assert "lm_head.weight is not model.embed_tokens.weight" in refusal(folder)


def test_a_tied_model_whose_file_holds_the_head_alone_loads(cfg, tok, tmp_path):
    """safetensors' save_model writes the first of two names; so do many shards."""
    net = random_net(replace(cfg, tie_embeddings=True))
    folder = write_folder(tmp_path / "tied", net, tok, change=remove("model.embed_tokens.weight"))
    back, _ = load(folder)
    assert equal_weights(net, back) and back.lm_head.weight is back.embed_tokens.weight
    save(back, tok, tmp_path / "again")
    assert equal_weights(net, load(tmp_path / "again")[0])


def test_an_untied_model_without_its_embedding_is_refused(net, tok, tmp_path):
    folder = write_folder(tmp_path / "it", net, tok, change=remove("model.embed_tokens.weight"))
    assert "model.embed_tokens.weight" in refusal(folder)


GOOD_CONFIGS = {
    "nulls": dict.fromkeys(["rope_theta", "attention_bias", "mlp_bias", "hidden_act", "head_dim"]),
    "null rope": {"rope_parameters": {"rope_type": None, "rope_theta": None, "factor": None}},
    "null tie": {"tie_word_embeddings": None},
    "another type": {"type": "llama"},
    "strings": {"rope_theta": "1e4", "hidden_size": "32", "num_hidden_layers": "2"},
    "floats": {"hidden_size": 32.0, "vocab_size": 320.0, "num_key_value_heads": 2.0},
    "float head_dim": {"head_dim": 8.0},
    "huge context": {"max_position_embeddings": 10**9},
    "whole theta": {"rope_theta": 10000},
    "linear by 1": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "linear by 1 of version 5": {"rope_parameters": {"rope_type": "linear", "factor": 1}},
    "theta of version 5": {"rope_theta": 7.0, "rope_parameters": {"rope_theta": 10000.0}},
    "not quantized": {"quantization_config": None},
}


@pytest.mark.parametrize("case", GOOD_CONFIGS)
def test_an_odd_config_that_says_the_same_loads(net, tok, tmp_path, case):
    back, _ = load(write_folder(tmp_path / "it", net, tok, GOOD_CONFIGS[case]))
    assert equal_weights(net, back)
    max_len = GOOD_CONFIGS[case].get("max_position_embeddings", net.cfg.max_len)
    assert back.cfg == replace(net.cfg, max_len=max_len)
    types = {name: type(value) for name, value in vars(back.cfg).items()}
    assert types == {name: type(value) for name, value in vars(net.cfg).items()}


# ---- vocabularies: padded, and of other kinds ------------------------------------------------


def pad_vocabulary(net, size):
    """The same model with zero rows behind those of the vocabulary."""
    padded = random_net(replace(net.cfg, vocab_size=size))
    state = net.state_dict()
    for name in ("embed_tokens.weight", "lm_head.weight"):
        state[name] = F.pad(state[name], (0, 0, 0, size - net.cfg.vocab_size))
    padded.load_state_dict(state)
    return padded


@pytest.mark.parametrize("size", [321, 384], ids=["a pad token", "to a multiple of 64"])
def test_a_padded_vocabulary_loads_and_its_rows_are_banned(net, tok, tmp_path, size):
    folder = write_folder(tmp_path / "it", pad_vocabulary(net, size), tok)
    back, back_tok = load(folder)
    assert (back.cfg.vocab_size, back_tok.size) == (size, 320)
    assert back.banned_ids == [tok.sp.unk_id(), tok.bos, *range(320, size)]
    tokens = random_ids(net.cfg, 2, 9)
    torch.testing.assert_close(back(tokens)[..., :320], net(tokens), atol=1e-5, rtol=1e-5)
    save(back, back_tok, tmp_path / "again")
    again, _ = load(tmp_path / "again")
    assert equal_weights(back, again) and again.banned_ids == back.banned_ids
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(theirs(tokens).logits, back(tokens), atol=1e-4, rtol=1e-4)


def test_a_new_model_bans_nothing_and_an_unsharded_one_what_its_model_does(net, tok, mesh):
    assert net.banned_ids == []
    sharded = random_net(net.cfg)
    sharded.banned_ids = [0, 1, 300]
    parallelize(sharded, mesh, torch.float32)
    with unsharded(sharded, mesh) as plain:
        assert plain.banned_ids == [0, 1, 300]


LLAMA_SETTINGS = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True}
LLAMA_SETTINGS |= {"split_digits": True, "remove_extra_whitespaces": False}
LLAMA_SETTINGS |= {"normalization_rule_name": "identity", "unk_id": 0, "bos_id": 1, "eos_id": 2}
LLAMA_SETTINGS |= {"pad_id": -1, "hard_vocab_limit": False, "minloglevel": 2}
ODD_TEXT = "Ｗｉｄｅ　① ﬁne ÉCOLE straße   don't e\u0301 1234\n"


def train_vocabulary(folder, **settings) -> Tokenizer:
    if settings.get("model_type") == "bpe_with_rules":
        (folder / "rules.tsv").write_text("61\t62\n")  # "a" becomes "b"
    path = folder / "tokenizer.model"
    with path.open("wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*TEXT.strip().split("\n"), ODD_TEXT] * 2),
            model_writer=f,
            **LLAMA_SETTINGS | settings,
        )
    return Tokenizer(path)


COVERED = {
    "Llama 2's": {},
    "drops spaces": {"remove_extra_whitespaces": True},
    "no bytes": {"byte_fallback": False},
    "whole numbers": {"split_digits": False},
    "pieces of spaces": {"allow_whitespace_only_pieces": True},
    "pieces of several words": {"split_by_whitespace": False},
    "a pad token": {"pad_id": 3},
    "other ids": {"unk_id": 2, "bos_id": 0, "eos_id": 1},
    "control tokens": {"control_symbols": ["<sep>", "<cls>"]},
    "a line's end of its own": {"user_defined_symbols": ["\n"]},
}
NOT_COVERED = {
    "unigram": {"model_type": "unigram"},
    "characters": {"model_type": "char", "byte_fallback": False},
    "words": {"model_type": "word", "byte_fallback": False, "vocab_size": 60},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "nmt_nfkc, drops spaces": {
        "normalization_rule_name": "nmt_nfkc",
        "remove_extra_whitespaces": True,
    },
    "nfkc": {"normalization_rule_name": "nfkc"},
    "nfkc_cf": {"normalization_rule_name": "nfkc_cf"},
    "nmt_nfkc_cf": {"normalization_rule_name": "nmt_nfkc_cf"},
    "no leading space": {"add_dummy_prefix": False},
    "no leading space, drops spaces": {
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": True,
    },
    "a space behind a word": {"treat_whitespace_as_suffix": True},
    "symbols of chats": {"user_defined_symbols": ["<|im_start|>", "<|im_end|>"]},
    "short symbols": {"user_defined_symbols": ["tt"]},
    "symbols of spaces": {"user_defined_symbols": ["▁▁▁"]},
}


def save_vocabulary(tok, folder):
    shape = {"dim": 8, "layers": 1, "heads": 2, "kv_heads": 2, "ffn": 8}
    save(Llama(ModelConfig(vocab_size=tok.size, **shape)), tok, folder)


def random_texts(count, words, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(words, k=rng.randint(0, 10))) for _ in range(count)]


ODD_WORDS = [
    "①",
    "ﬁ",
    "Ａ",
    "É",
    "ß",
    "e\u0301",
    "\xa0",
    "\u200b",
    "\ufeff",
    "▁",
    " ",
    "   ",
    "\r",
]
ODD_WORDS += ["the otter", " lives", "<|im_start|>", "<sep>", "123", "don't", "tt", "grade"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", COVERED)
def test_autotokenizer_gives_our_ids_of_every_kind_of_vocabulary_that_is_exported(tmp_path, kind):
    tok = train_vocabulary(tmp_path, **COVERED[kind])
    save_vocabulary(tok, tmp_path / "it")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "it")
    for text in random_texts(300, PLAIN_WORDS + ODD_WORDS):
        assert theirs.encode(text) == tok.encode_with_bos(text), text


@pytest.mark.parametrize("kind", NOT_COVERED)
def test_a_vocabulary_that_cannot_be_exported_is_saved_without_a_tokenizer_json_and_a_line_says_so(
    net, tok, tmp_path, kind
):
    odd_tok = train_vocabulary(tmp_path, **NOT_COVERED[kind])
    model_py.warn_of_no_tokenizer_json.cache_clear()
    save_vocabulary(tok, tmp_path / "it")
    assert (tmp_path / "it" / "tokenizer.json").exists()
    with pytest.warns(UserWarning, match="tokenizer.json is not written.*sentencepiece") as notes:
        save_vocabulary(odd_tok, tmp_path / "it")
    assert len(notes) == 1 and "\n" not in str(notes[0].message)
    assert not (tmp_path / "it" / "tokenizer.json").exists()
    _, back_tok = load(tmp_path / "it")
    for text in random_texts(20, PLAIN_WORDS + ODD_WORDS):
        assert back_tok.encode(text) == odd_tok.encode(text)


def test_pieces_of_equal_score_cannot_be_exported(tok, monkeypatch):
    """As where new pieces were put behind an old vocabulary: the one on the left is made first."""
    assert model_py.can_export(tok)
    scores = {i: tok.sp.get_score(i) for i in range(tok.size)}
    last = sorted(tok.text_ids.values(), key=scores.get)[-2:]
    with monkeypatch.context() as m:
        m.setattr(tok.sp, "get_score", lambda i: 0.0 if i in last else scores[i])
        assert not model_py.can_export(tok)
    assert model_py.can_export(tok)


def test_the_line_about_a_vocabulary_comes_once_in_a_process(tmp_path):
    train_vocabulary(tmp_path, model_type="unigram")
    work = (
        "import sys; from model import *; tok = Tokenizer(sys.argv[1] + '/tokenizer.model')\n"
        "net = Llama(ModelConfig(tok.size, 8, 1, 2, 2, 8))\n"
        "for name in 'abc':\n"
        "    save(net, tok, sys.argv[1] + '/' + name)\n"
        "    load(sys.argv[1] + '/' + name)"
    )
    argv = [sys.executable, "-c", work, str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("is not written") == 1, done.stderr


# ---- saving ----------------------------------------------------------------------------------


def test_saving_over_a_model_leaves_nothing_of_the_old_one(cfg, tok, tmp_path, monkeypatch):
    old, new = random_net(cfg, seed=1), random_net(cfg, seed=2)
    with monkeypatch.context() as m:
        m.setattr(model_py, "SHARD_BYTES", 10_000)
        save(old, tok, tmp_path / "m")
    back, its_tok = load(tmp_path / "m")
    save(new, its_tok, tmp_path / "m")  # onto itself, tokenizer included
    assert equal_weights(load(tmp_path / "m")[0], new) and not equal_weights(back, new)
    names = {"config.json", "model.safetensors", "tokenizer.model", "tokenizer.json"}
    names |= {"tokenizer_config.json", "generation_config.json"}
    assert {path.name for path in (tmp_path / "m").iterdir()} == names


def test_only_the_writing_process_touches_the_disk(net, tok, tmp_path):
    save(net, tok, tmp_path / "m", write=False)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("writer", ["atomic_write", "write_and_sync"])
@pytest.mark.parametrize("size", [1000, 1001, 9000, 100_000])
def test_a_full_disk_is_told_by_the_name_of_the_file(tmp_path, size, writer):
    """Also where the file is so small that it is written when it is closed."""
    work = (
        f"import resource, sys; from pathlib import Path; from model import {writer}\n"
        "from sample import run_command\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"run_command(lambda: {writer}(Path(sys.argv[1]), 'x' * {size}))"
    )
    path = tmp_path / "rows.jsonl"
    argv = [sys.executable, "-c", work, str(path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)
    if size > 1000:
        suffix = ".tmp" if writer == "atomic_write" else ""
        message = f"error: {path}{suffix}: File too large; make room and start again\n"
        assert (done.returncode, done.stderr) == (1, message)
    else:
        assert path.read_text() == "x" * size


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(5, "Input/output error")], ids=repr
)
def test_what_stops_the_reading_of_weights_is_told_or_goes_on(
    net, tok, tmp_path, monkeypatch, error
):
    """torch turns what is raised there, whatever it is, into an exception of its own."""
    save(net, tok, tmp_path / "m")

    def read_data(*_):
        raise error

    monkeypatch.setattr(model_py.HuggingFaceStorageReader, "read_data", read_data)
    if isinstance(error, OSError):
        assert "Input/output error" in refusal(tmp_path / "m")
    else:
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path / "m")


def test_files_are_on_disk_before_they_take_their_place(tmp_path, monkeypatch):
    """Else a power cut may leave an empty file where a finished one stood."""
    events, replace_file = [], os.replace

    def note_replace(source, target):
        events.append((Path(target).name, source.stat().st_size))
        replace_file(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.fstat(fd).st_size))
    monkeypatch.setattr(os, "replace", note_replace)
    model_py.atomic_write(tmp_path / "a.txt", "seven\n\n")
    model_py.write_weights(tmp_path / "w", {"p": torch.ones(3)})
    size = (tmp_path / "w").stat().st_size
    assert events == [7, ("a.txt", 7), size, ("w", size)] and size > 12


WRITERS = {"write_weights": 3, "atomic_write": 5, "write_config": 1}  # and how often save calls it


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "over an old one"])
def test_a_save_that_is_interrupted_leaves_no_folder_that_loads(
    cfg, net, tok, tmp_path, monkeypatch, writer, overwrite
):
    """Killed at every write in turn, the folder is refused until a save has gone through."""
    monkeypatch.setattr(model_py, "SHARD_BYTES", 20_000)
    write = getattr(model_py, writer)
    kills = 0
    for number in range(100):
        folder = tmp_path / str(number)
        if overwrite:
            save(random_net(cfg, seed=9), tok, folder)
        left = [number]  # calls that go through

        def die(*args, left=left):
            left[0] -= 1
            if left[0] >= 0:
                return write(*args)
            if writer == "write_weights":
                args[0].with_name(args[0].name + ".tmp").write_bytes(b"half")
            raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(model_py, writer, die)
            try:
                save(net, tok, folder)
            except KeyboardInterrupt:
                kills += 1
                with pytest.raises(UserError):
                    load(folder)
                continue
        assert equal_weights(load(folder)[0], net)
        break
    assert kills >= WRITERS[writer]


def test_a_saved_model_can_be_read_by_whoever_may_read_the_users_other_files(net, tok, tmp_path):
    save(net, tok, tmp_path / "out")
    (tmp_path / "plain").write_text("")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, (tmp_path / "plain").stat().st_mode)


# ---- many processes --------------------------------------------------------------------------


@pytest.fixture
def mesh():
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


@pytest.mark.parametrize("way", ["cast", "sharded", "unsharded"])
def test_rope_angles_of_a_bf16_model_are_fp32_where_they_are_used(net, mesh, monkeypatch, way):
    dtypes = set()

    def spy(x, cos, sin):
        dtypes.add((x.dtype, cos.dtype, sin.dtype))
        return rotate(x, cos, sin)

    monkeypatch.setattr(model_py, "rotate", spy)
    low, tokens = Llama(net.cfg), random_ids(net.cfg, 1, 5)
    if way == "cast":
        low.to(torch.bfloat16)
    else:
        parallelize(low, mesh, torch.bfloat16)
    if way == "unsharded":
        with unsharded(low, mesh) as plain:
            plain(tokens)
    else:
        low(tokens)
    assert dtypes == {(torch.bfloat16, torch.float32, torch.float32)}


def test_activation_checkpointing_gives_the_same_gradients_of_activations_made_twice(
    cfg, mesh, monkeypatch
):
    calls, attend = [], CausalContext.attend

    def count(*args):
        calls.append(1)
        return attend(*args)

    monkeypatch.setattr(CausalContext, "attend", count)
    tokens, grads = random_ids(cfg, 2, 9), []
    for checkpointing, num_calls in ((False, 2), (True, 4)):
        net = random_net(cfg, dropout=0.1)
        parallelize(net, mesh, torch.float32, checkpointing)
        torch.manual_seed(0)
        calls.clear()
        net(tokens).square().sum().backward()
        assert len(calls) == num_calls
        grads.append([p.grad.full_tensor() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    calls.clear()
    with torch.no_grad():
        net(tokens)
    assert len(calls) == 2


def test_unsharding_a_model_that_is_not_sharded_changes_nothing(net):
    tokens = random_ids(net.cfg, 1, 6)
    want = net(tokens)
    with unsharded(net, mesh=None) as plain:
        assert plain is net
        assert torch.equal(plain(tokens), want)
    assert torch.equal(net(tokens), want)
    with pytest.raises(KeyError), unsharded(net, mesh=None):
        raise KeyError


@pytest.mark.parametrize("tie", [False, True])
def test_an_unsharded_model_is_plain_and_shares_the_gathered_weights(cfg, mesh, tie):
    """None of FSDP's hooks run in it, dropout is off, and what was learned since is in it."""
    net = random_net(replace(cfg, tie_embeddings=tie), dropout=0.5)
    same = random_net(net.cfg).to(torch.bfloat16)
    parallelize(net, mesh, torch.bfloat16)
    net.train()
    tokens = random_ids(cfg, 2, 7)
    for _ in range(2):
        with unsharded(net, mesh) as plain, torch.no_grad():
            assert type(plain) is Llama and not plain.training
            for module in plain.modules():
                assert not isinstance(module, FSDPModule)
                assert not module._forward_pre_hooks and not module._forward_hooks
            assert (plain.lm_head.weight is plain.embed_tokens.weight) == tie
            gathered = dict(net.named_parameters())
            for name, p in plain.named_parameters():
                assert p is gathered[name] and not isinstance(p, DTensor)
            assert torch.equal(plain(tokens), same(tokens))
        assert all(isinstance(p, DTensor) for p in net.parameters())
        for one in (net, same):  # an update of both
            with torch.no_grad():
                one.layers[1].mlp.up_proj.weight.mul_(2)
    net(tokens).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())


def test_an_error_in_an_unsharded_model_leaves_the_model_sharded(cfg, mesh):
    net = random_net(cfg)
    parallelize(net, mesh, torch.float32)
    with pytest.raises(KeyError), unsharded(net, mesh):
        raise KeyError
    assert all(isinstance(p, DTensor) for p in net.parameters())


@pytest.fixture(scope="module")
def small70b(tok):
    """70B's ratios: 8 query heads to a key head, 64 heads."""
    shape = {"dim": 256, "layers": 3, "heads": 64, "kv_heads": 8, "ffn": 896}
    return random_net(ModelConfig(vocab_size=tok.size, **shape))


@pytest.mark.parametrize("world_size, tp", [(2, 1), (2, 2), (4, 2)])
def test_processes_load_and_save_their_shards_as_one_does_the_whole(
    cfg, small70b, tok, tmp_path, monkeypatch, world_size, tp
):
    odd = random_net(replace(cfg, dim=40, ffn=49 * tp, layers=3))
    tied = random_net(replace(cfg, tie_embeddings=True))
    sources = []
    for name, net in (("small70b", small70b), ("odd", odd), ("tied", tied)):
        save(net, tok, tmp_path / name)
        sources.append(tmp_path / name)
    arguments = [(rank, world_size, tp, tmp_path, sources) for rank in range(world_size)]
    assert tiny.together(tiny.check_shards, arguments) == [0] * world_size
    monkeypatch.setattr(model_py, "SHARD_BYTES", 500_000)  # as check_shards has it
    for number, source in enumerate(sources):
        one = tmp_path / f"one{number}"
        save(*load(source), one)
        assert read_files(one) == read_files(tmp_path / f"saved{number}")


class WatchedFile:
    """An open weights file that counts the bytes of the slices that are asked of it, and insists
    that a slice is a view of the mapped file: what is not in it is neither read nor copied."""

    def __init__(self, *args, **settings):
        self.opening = SAFE_OPEN(*args, **settings)
        self.asked = 0
        OPENINGS.append(self)

    def __enter__(self):
        self.file = self.opening.__enter__()
        self.keys, self.metadata = self.file.keys, self.file.metadata
        maps = Path("/proc/self/maps").read_text().splitlines()
        spans = [line.split()[0].split("-") for line in maps if line.endswith(".safetensors")]
        self.spans = [range(int(start, 16), int(end, 16)) for start, end in spans]
        return self

    def __exit__(self, *error):
        return self.opening.__exit__(*error)

    def get_slice(self, name):
        return WatchedSlice(self, self.file.get_slice(name))


class WatchedSlice:
    def __init__(self, file, whole):
        self.file, self.whole = file, whole
        self.get_shape, self.get_dtype = whole.get_shape, whole.get_dtype

    def __getitem__(self, places):
        view = self.whole[places]
        assert any(view.data_ptr() in span for span in self.file.spans), "it is a copy"
        self.file.asked += view.nbytes
        return view


SAFE_OPEN, OPENINGS = safetensors.safe_open, []


def load_a_share(rank: int, world_size: int, tp: int, folder: Path):
    """One of several processes that shard a model reads its share of the weights file alone."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store{tp}", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    mesh = init_device_mesh("cpu", (world_size // tp, tp), mesh_dim_names=("dp", "tp"))
    safetensors.safe_open = WatchedFile  # torch's reader looks it up at every call
    net, _ = load(folder, shard=partial(parallelize, mesh=mesh, dtype=torch.float32))
    share = sum(p.to_local().nbytes for p in net.parameters())
    assert sum(file.asked for file in OPENINGS) == share
    file_bytes = (folder / "model.safetensors").stat().st_size
    assert file_bytes / 4.4 < share < file_bytes / 3.6
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.parametrize("tp", [1, 2])
def test_each_process_reads_its_share_of_a_weights_file(small70b, tok, tmp_path, tp):
    save(small70b, tok, tmp_path)
    arguments = [(rank, 4, tp, tmp_path) for rank in range(4)]
    assert tiny.together(load_a_share, arguments) == [0] * 4


def decode_and_train(rank: int, folder: Path, cfg: ModelConfig):
    """One of two processes that shard a model: one decodes more tokens than the other, and then
    they take a step together."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=limit)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    net = random_net(cfg)
    parallelize(net, mesh, torch.float32)
    with unsharded(net, mesh) as plain:
        ids = greedy(plain, [1], 4 + 9 * rank)
    assert ids == greedy(random_net(cfg), [1], 4 + 9 * rank)
    net(torch.tensor([ids[:4]])).sum().backward()
    dist.barrier()
    dist.destroy_process_group()


def test_processes_that_decode_texts_of_different_lengths_do_not_wait_for_each_other(
    cfg, tmp_path
):
    arguments = [(rank, tmp_path, cfg) for rank in range(2)]
    assert tiny.together(decode_and_train, arguments, timeout=60) == [0, 0]


INDIVISIBLE = {  # by 3: what is other in the shape, what the message must name
    "heads": ({}, "4 heads"),
    "key/value heads": ({"heads": 3, "kv_heads": 1}, "1 key/value heads"),
    "ffn": ({"heads": 3, "kv_heads": 3, "ffn": 100}, "100 hidden units"),
    "vocabulary": ({"heads": 3, "kv_heads": 3, "vocab_size": 421}, "421 tokens"),
}


@pytest.mark.parametrize("case", INDIVISIBLE)
def test_a_model_that_cannot_be_divided_among_processes_is_refused_by_the_number(cfg, case):
    shape, words = INDIVISIBLE[case]
    cfg = replace(cfg, **{"vocab_size": 420} | shape)
    with pytest.raises(UserError, match=f"base: {re.escape(words)}.* 3 processes.*--tp"):
        check_tp(cfg, 3, "base")
    check_tp(cfg, 1, "base")


# ---- memory ----------------------------------------------------------------------------------

PEAK = """
import os, sys
from functools import partial
from pathlib import Path
import torch
import model
small, big, out, shard_bytes = sys.argv[1:]
torch.set_num_threads(1)
model.SHARD_BYTES = int(shard_bytes)

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

def print_peak(work):
    if os.fork() == 0:
        # a child has no pages of the libraries until it uses them
        model.save(*model.load(small), out + "/small")
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = status("VmRSS")
        work()
        print(status("VmHWM") - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0

model.save(*model.load(small), out + "/small")
print_peak(lambda: model.load(big))
net, tok = model.load(big)
print_peak(lambda: model.save(net, tok, out + "/big"))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory"
)
def test_loading_needs_the_model_and_a_file_of_it_and_saving_a_file(
    net, tok, tmp_path, monkeypatch
):
    file_bytes = 20_000_000
    monkeypatch.setattr(model_py, "SHARD_BYTES", file_bytes)
    shape = {"dim": 512, "layers": 8, "heads": 8, "kv_heads": 8, "ffn": 1408}
    big = random_net(ModelConfig(vocab_size=tok.size, **shape))
    save(net, tok, tmp_path / "small")
    save(big, tok, tmp_path / "big")
    folders = [str(tmp_path / name) for name in ("small", "big", "out")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", PEAK, *folders, str(file_bytes)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    load_peak, save_peak = (int(line) * 1024 for line in done.stdout.split())
    model_bytes = sum(p.nbytes for p in big.parameters())
    assert model_bytes > 5 * file_bytes
    assert 0.9 * model_bytes < load_peak < model_bytes + 1.3 * file_bytes
    assert save_peak < 1.3 * file_bytes


# ---- what others read ------------------------------------------------------------------------

PLAIN_WORDS = [
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
    "a",
    ".",
]
PLAIN_WORDS += ["0x1F", "3.14", "Straße", "عربى", "\u3000", "\x85", "\u2028", "code();", "\x00"]
CONTROL_WORDS = ["<s>", "</s>", "<unk>", "<0x0A>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"]
CONTROL_WORDS += ["s>", "<", "<|im_end|>", "\ufdd0", "{{ x }}", "{% if %}", "'", '"', "\\n"]


@pytest.fixture(params=["Llama 2's", "small", "stories'"])
def any_tok(request, tok):
    """A tokenizer, and words to write with it."""
    words = PLAIN_WORDS + CONTROL_WORDS
    if request.param == "small":
        return tok, words + ["▁"]
    shared = request.getfixturevalue("shared")
    folder = "stories260K/hf" if request.param == "stories'" else "tokenizer"
    return Tokenizer(shared / folder / "tokenizer.model"), words + ["▁"]


def test_autotokenizer_gives_our_ids_of_two_hundred_chats(any_tok, cfg, tmp_path):
    tok, words = any_tok
    save(random_net(replace(cfg, vocab_size=tok.size, layers=1)), tok, tmp_path / "it")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "it")
    ids = (theirs.bos_token_id, theirs.eos_token_id)
    assert (len(theirs), theirs.model_max_length) == (tok.size, cfg.max_len)
    assert ids == (tok.bos, tok.eos)

    def their_ids(messages):
        return theirs.apply_chat_template(messages)["input_ids"]

    rng = random.Random(0)
    for number in range(200):
        num_turns = rng.choice([1, 1, 3, 5])
        turns = ["".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(num_turns)]
        roles = ["user", "assistant"] * 3
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, turns, strict=False)
        ]
        empty_system = [{"role": "system", "content": ""}] * (number % 2)
        assert their_ids(empty_system + messages) == tok.chat(*turns), turns
        messages.append({"role": "assistant", "content": "So </s> it is."})
        assert their_ids(messages) == tok.chat(*turns) + tok.response("So </s> it is."), turns
        plain = turns[0]
        while re.search("<s>|</s>|<unk>", plain):  # to leave one out may make one
            plain = re.sub("<s>|</s>|<unk>", "", plain)
        assert theirs.encode(plain) == tok.encode_with_bos(plain)
        if "▁" not in plain:  # at the start of a text it may be cut off with the space
            assert theirs.decode(tok.encode(plain)) == tok.decode(tok.encode(plain))
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert their_ids(messages) == tok.chat("<<SYS>>\nBe kind.\n<</SYS>>\n\nHi")
    with pytest.raises(Exception, match="user, assistant"):
        their_ids([{"role": "user", "content": "a"}] * 2)


@pytest.mark.parametrize("literal", ["▁", " ▁ ", "▁▁a▁▁b▁▁", "a ▁", "▁ a", "  a▁  ▁b  ", "\n ▁\n"])
def test_a_literal_underline_of_sentencepiece_is_no_space_where_spaces_are_dropped(
    tmp_path, literal
):
    tok = train_vocabulary(tmp_path, remove_extra_whitespaces=True)
    save_vocabulary(tok, tmp_path / "it")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "it")
    assert theirs.encode(literal) == tok.encode_with_bos(literal)


def test_the_chat_template_is_written_in_what_all_engines_for_jinja_know():
    """llama.cpp's minja and @huggingface/jinja have no set of two targets, minja few filters."""
    template = model_py.CHAT_TEMPLATE
    for target in re.findall(r"{%-? *set (.+?) =", template):
        assert re.fullmatch(r"\w+(\.\w+)?", target), target
    assert set(re.findall(r"\| *(\w+)", template)) <= {"trim", "length", "lower", "join", "tojson"}


@pytest.mark.parametrize("drop", [False, True])
def test_tokenizer_json_has_every_key_and_no_regex_of_one_engine_only(tmp_path, drop):
    """@huggingface/tokenizers reads each key, and JavaScript has neither \\A nor \\z."""
    tok = train_vocabulary(tmp_path, remove_extra_whitespaces=drop)
    d = model_py.tokenizer_json(tok)
    names = ["version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"]
    assert set(d) == {*names, "post_processor", "decoder", "model"}
    assert d["pre_tokenizer"] is d["truncation"] is d["padding"] is None
    rules = d["normalizer"]["normalizers"]
    regexes = [rule["pattern"]["Regex"] for rule in rules if "Regex" in rule.get("pattern", {})]
    assert len(regexes) == 1 + 2 * drop
    assert not any(
        re.search(r"\\[AzZhRGK]|\(\?[>i#]|\(\?<\w|[+*]\+|\[\[:", regex) for regex in regexes
    )


def test_transformers_generates_from_our_folder_until_our_end_of_sequence(net, tok, tmp_path):
    save(net, tok, tmp_path / "it")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "it").generation_config
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tok.bos, tok.eos)
    written = json.loads((tmp_path / "it" / "generation_config.json").read_text())
    assert written.keys() == {"bos_token_id", "eos_token_id"}, "no settings but those of a run"


def test_transformers_samples_with_the_settings_that_a_model_was_trained_with(net, tok, tmp_path):
    save(net, tok, tmp_path / "it", {"temperature": 0.65, "top_p": 0.85})
    theirs = GenerationConfig.from_pretrained(tmp_path / "it")
    assert (theirs.do_sample, theirs.temperature, theirs.top_p) == (True, 0.65, 0.85)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tok.bos, tok.eos)


# ---- model folders that are bad --------------------------------------------------------------


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def edit(name, make):
    return lambda folder: (folder / name).write_bytes(make((folder / name).read_bytes()))


def unlink(name):
    return lambda folder: (folder / name).unlink()


def prefix(words, cut=""):
    """Every tensor's name with other words before it."""

    def change(tensors):
        renamed = {words + name.removeprefix(cut): t for name, t in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    return change


def cast(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def write_bin(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def keep_an_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def save_by_transformers(folder):
    """The tokenizer alone, as save_pretrained leaves it."""
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").write_text("{}")


def drop_a_shard(folder):
    """Two files, of which the second is not there."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model-00001-of-00002.safetensors")


def add_a_copy(folder):
    """A second file that has the same names and other values: which are meant?"""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t + 1 for name, t in tensors.items()}, folder / "old.safetensors")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 499723\n"
HTML = b"<!DOCTYPE html>\n<html><title>404</title></html>\n"
UP_PROJ = "model.layers.1.mlp.up_proj.weight"

BAD_CONFIGS = {  # what is other in config.json, what the message must name beside it
    "mistral": ({"model_type": "mistral"}, ["mistral"]),
    "no model_type": ({"model_type": "remove"}, ["model_type"]),
    "scaled rope": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["llama3"]),
    "old scaled rope": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["linear"]),
    "rope said twice": (
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        ["linear"],
    ),
    "attention bias": ({"attention_bias": True}, ["attention_bias"]),
    "mlp bias": ({"mlp_bias": True}, ["mlp_bias"]),
    "gelu": ({"hidden_act": "gelu"}, ["gelu"]),
    "no hidden_size": ({"hidden_size": "remove"}, ["hidden_size"]),
    "null hidden_size": ({"hidden_size": None}, ["size"]),
    "no heads at all": ({"num_attention_heads": 0}, ["size"]),
    "null context": ({"max_position_embeddings": None}, ["max_position_embeddings"]),
    "a word": ({"vocab_size": "many"}, ["size"]),
    "half a layer": ({"num_hidden_layers": 1.5}, ["num_hidden_layers"]),
    "rope of a word": ({"rope_theta": "x"}, ["size"]),
    "rope that is no object": ({"rope_parameters": "x"}, ["rope type"]),
    "endless theta": ({"rope_theta": math.inf}, ["size"]),
    "theta that is no number": ({"rope_theta": math.nan}, ["size"]),
    "layers beyond all": ({"num_hidden_layers": 10**400}, ["size"]),
    "vocabulary beyond all": ({"vocab_size": 10**30}, ["size"]),
    "a list": ({"intermediate_size": [48]}, ["size"]),
    "tied by a word": ({"tie_word_embeddings": "false"}, ["size", "false"]),
    "dynamic rope": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["dynamic"]),
    "head_dim of a word": ({"head_dim": "eight"}, ["head_dim"]),
    "head_dim of an object": ({"head_dim": {}}, ["head_dim"]),
    "odd head_dim": ({"hidden_size": 36, "head_dim": None}, ["head_dim"]),
    "no rms_norm_eps": ({"rms_norm_eps": None}, ["rms_norm_eps"]),
    "other head_dim": ({"head_dim": 16}, ["head_dim"]),
    "odd key/value heads": ({"num_key_value_heads": 3}, ["heads"]),
}
BAD_TENSORS = {  # change of the tensors, what the message must name
    "missing weight": (remove(UP_PROJ), [UP_PROJ]),
    "no head": (remove("lm_head.weight"), ["lm_head.weight"]),
    "extra weight": (put("model.layers.0.self_attn.q_proj.bias", 32), ["self_attn.q_proj.bias"]),
    "one layer more": (put("model.layers.2.mlp.up_proj.weight", 48, 32), ["model.layers.2.mlp"]),
    "wrong shape": (put("model.norm.weight", 31), ["model.norm.weight", "(31,)", "(32,)"]),
    "peft's names": (prefix("base_model.model."), ["base_model.model.", "merge_and_unload()"]),
    "compiled": (prefix("_orig_mod."), ["_orig_mod.", "without what wraps it"]),
    "data parallel": (prefix("module."), ["module.", "without what wraps it"]),
    "LlamaModel": (prefix("", cut="model."), ["place embed_tokens", "LlamaForCausalLM"]),
    "int8": (cast(UP_PROJ, torch.int8), [UP_PROJ, "I8", "quantized"]),
    "packed int4": (cast(UP_PROJ, torch.uint8), [UP_PROJ, "U8", "quantized"]),
    "fp8": (cast(UP_PROJ, torch.float8_e4m3fn), [UP_PROJ, "F8_E4M3", "quantized"]),
    "gptq": (put("model.layers.0.mlp.up_proj.qweight", 4), ["up_proj.qweight"]),
    "transposed": (put(UP_PROJ, 32, 48), [UP_PROJ, "(32, 48)", "(48, 32)"]),
}
BAD_FILES = {  # damage to the folder, what the message must name
    "no config": (unlink("config.json"), ["config.json", "not found"]),
    "broken json": (edit("config.json", lambda b: b[: len(b) // 2]), ["config.json", "JSON"]),
    "config not utf-8": (edit("config.json", lambda b: b"\xff\xfe" + b), ["config.json", "UTF-8"]),
    "config is a list": (edit("config.json", lambda b: b"[]"), ["config.json", "object"]),
    "truncated": (
        edit("model.safetensors", lambda b: b[: len(b) // 2]),
        ["model.safetensors", "cut short"],
    ),
    "empty weights": (edit("model.safetensors", lambda b: b""), ["model.safetensors", "empty"]),
    "LFS pointer": (edit("model.safetensors", lambda b: POINTER), ["model.safetensors", "LFS"]),
    "html weights": (edit("model.safetensors", lambda b: HTML), ["model.safetensors", "web page"]),
    "no weights": (unlink("model.safetensors"), ["weights", "whole"]),
    "bin weights": (write_bin, [".bin", "save_pretrained"]),
    "adapter": (keep_an_adapter, ["adapter", "merge_and_unload()"]),
    "tokenizer.json only": (save_by_transformers, ["tokenizer.model", "copy", "transformers"]),
    "missing shard": (drop_a_shard, ["lm_head.weight"]),
    "two copies": (add_a_copy, ["model.safetensors", "old.safetensors"]),
    "no tokenizer": (unlink("tokenizer.model"), ["tokenizer.model", "not found"]),
    "html tokenizer": (edit("tokenizer.model", lambda b: HTML), ["tokenizer.model", "web page"]),
    "empty tokenizer": (edit("tokenizer.model", lambda b: b""), ["tokenizer.model", "empty"]),
    "LFS tokenizer": (edit("tokenizer.model", lambda b: POINTER), ["tokenizer.model", "LFS"]),
    "cut tokenizer": (edit("tokenizer.model", lambda b: b[:999]), ["tokenizer.model", "short"]),
}


def refusal(folder) -> str:
    """The one line in which the folder is refused, before any weight is read."""
    with pytest.raises(UserError) as e:
        load(folder)
    message = str(e.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_bad_config_is_refused_by_one_line_that_names_it(net, tok, tmp_path, case):
    config, words = BAD_CONFIGS[case]
    message = refusal(write_folder(tmp_path / "it", net, tok, config))
    assert all(word in message for word in ["config.json", *words]), message


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_one_line_that_names_them(net, tok, tmp_path, case):
    change, words = BAD_TENSORS[case]
    message = refusal(write_folder(tmp_path / "it", net, tok, change=change))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_by_one_line_that_names_it(net, tok, tmp_path, case):
    damage, words = BAD_FILES[case]
    folder = write_folder(tmp_path / "it", net, tok)
    damage(folder)
    message = refusal(folder)
    assert all(word in message for word in words), message


def test_a_config_that_does_not_belong_to_the_weights_is_refused(net, tok, tmp_path):
    message = refusal(write_folder(tmp_path / "a", net, tok, {"intermediate_size": 64}))
    assert "(48, 32)" in message and "(64, 32)" in message
    message = refusal(write_folder(tmp_path / "b", net, tok, {"num_hidden_layers": 1}))
    assert "model.layers.1" in message


def test_a_tokenizer_that_does_not_belong_to_the_model_is_refused(net, tok, tmp_path):
    """A vocabulary may be padded, but not cut."""
    message = refusal(write_folder(tmp_path / "small", net, tok, {"vocab_size": 319}))
    assert all(word in message for word in ("tokenizer.model", "320", "319")), message
    message = refusal(write_folder(tmp_path / "other", net, tok, {"vocab_size": 640}))
    assert all(word in message for word in ("tokenizer.model", "320", "640")), message
    message = refusal(write_folder(tmp_path / "large", net, tok, {"vocab_size": 321}))
    assert "(320, 32)" in message and "(321, 32)" in message, message


def test_nothing_of_a_refused_model_is_read(net, tok, tmp_path, monkeypatch):
    monkeypatch.setattr(model_py.dcp, "load", lambda *_, **__: pytest.fail("read weights"))
    refusal(write_folder(tmp_path / "it", net, tok, change=put("model.norm.weight", 31)))


def test_metas_own_files_are_refused_with_the_command_that_converts_them(net, tok, tmp_path):
    folder = write_folder(tmp_path / "llama-2-7b", net, tok)
    (folder / "config.json").rename(folder / "params.json")
    (folder / "model.safetensors").rename(folder / "consolidated.00.pth")
    assert f"python -m scripts.convert_meta {folder} OUT" in refusal(folder)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert "no such folder" in refusal(tmp_path / "gone")
    (tmp_path / "file").write_text("")
    assert "no such folder" in refusal(tmp_path / "file")
