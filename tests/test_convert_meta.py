"""scripts/convert_meta.py on real small checkpoints, and on files written by hand as Meta does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, random_net

import model
from model import ModelConfig, UserError, load
from scripts import convert_meta
from scripts.convert_meta import convert
from scripts.plan import SHAPES


def equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def read_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- real weights -------------------------------------------------------------------------------


def greedy(net, tokens, count):
    tokens = list(tokens)
    while len(tokens) < count:
        logits = net(torch.tensor([tokens]))
        tokens.append(logits[0, -1].argmax().item())
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("kind", ["meta-mp1", "meta-mp2"])
def test_real_files_convert_bit_for_bit_and_write_what_they_are_known_to_write(
    shared, tmp_path, kind
):
    source = shared / "stories260K"
    convert_meta.main([str(source / kind), str(tmp_path / "out")])
    net, tok = load(tmp_path / "out")
    assert equal_weights(net, load(source / "hf")[0])
    assert tok.size == net.cfg.vocab_size == 512 and net.cfg.kv_heads == 4
    known = json.loads((source / "greedy.json").read_text())
    assert greedy(net, known["ids"][:1], len(known["ids"])) == known["ids"]


# ---- files written by hand ----------------------------------------------------------------------

NAMES = {
    # ours: Meta's, the dimension that its files cut
    "embed_tokens": ("tok_embeddings", 1),
    "lm_head": ("output", 0),
    "norm": ("norm", None),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("attention.wq", 0),
    "k_proj": ("attention.wk", 0),
    "v_proj": ("attention.wv", 0),
    "o_proj": ("attention.wo", 1),
    "gate_proj": ("feed_forward.w1", 0),
    "down_proj": ("feed_forward.w2", 1),
    "up_proj": ("feed_forward.w3", 0),
}


def neighbours(weight, head_dim):
    """Rows in Meta's order: rows i and i + hd/2 of a head, which RoPE pairs, become neighbours."""
    half = head_dim // 2
    order = []
    for start in range(0, len(weight), head_dim):
        order += [start + i % 2 * half + i // 2 for i in range(head_dim)]
    return weight[order]


def write_meta(folder, net, tok, num_files, params=None, change=None):
    """A checkpoint as Meta writes it; `change` may edit what each file holds."""
    folder.mkdir()
    c = net.cfg
    parts = [{} for _ in range(num_files)]
    for name, w in net.state_dict().items():
        *layer, last, _ = name.replace("self_attn.", "").replace("mlp.", "").split(".")
        meta_name, dim = NAMES[last]
        if last in ("q_proj", "k_proj"):
            w = neighbours(w, c.head_dim)
        for i, part in enumerate(parts):
            piece = w if dim is None else w.chunk(num_files, dim)[i]
            part[".".join([*layer, meta_name, "weight"])] = piece.clone()
    for i, part in enumerate(parts):
        part["rope.freqs"] = torch.full((c.head_dim // 2,), 99.0)
        if change:
            change(part)
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    d = {"dim": c.dim, "n_heads": c.heads, "n_layers": c.layers, "norm_eps": c.norm_eps}
    d |= {"vocab_size": -1, "n_kv_heads": c.kv_heads}
    d |= {"multiple_of": 128, "ffn_dim_multiplier": 1.3}
    d = {k: v for k, v in (d | (params or {})).items() if v != "remove"}
    (folder / "params.json").write_text(json.dumps(d))
    shutil.copy(tok.path, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def small70b(tok):
    """70B's ratios: 8 query heads to a key head, 64 heads, ffn 1.3 * 8/3 dim, rounded up to a
    multiple of dim / 2."""
    shape = {"dim": 256, "layers": 3, "heads": 64, "kv_heads": 8, "ffn": 896}
    return random_net(ModelConfig(vocab_size=tok.size, **shape))


@pytest.mark.parametrize("num_files", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_metas_files_convert_bit_for_bit_in_their_own_precision(
    small70b, tok, tmp_path, num_files, dtype
):
    def cast(part):
        part.update({key: w.to(dtype) for key, w in part.items()})

    convert(write_meta(tmp_path / "meta", small70b, tok, num_files, change=cast), tmp_path / "hf")
    back, _ = load(tmp_path / "hf", dtype)
    assert back.cfg == small70b.cfg
    want = {name: w.to(dtype) for name, w in small70b.state_dict().items()}
    assert back.state_dict().keys() == want.keys()
    assert all(torch.equal(w, want[name]) for name, w in back.state_dict().items())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert f"torch.{config['torch_dtype']}" == str(dtype)
    index = json.loads((tmp_path / "hf" / model.SHARD_INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in want.values())


def test_transformers_reads_a_converted_folder(small70b, tok, tmp_path):
    from transformers import AutoModelForCausalLM

    convert(write_meta(tmp_path / "meta", small70b, tok, 2), tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        ours = small70b.eval()(tokens)
        torch.testing.assert_close(ours, theirs(tokens).logits, atol=1e-3, rtol=1e-3)


def test_converting_and_saving_again_give_the_same_small_files_and_weights(
    small70b, tok, tmp_path
):
    for num_files in (1, 8):
        source = write_meta(tmp_path / f"meta{num_files}", small70b, tok, num_files)
        convert(source, tmp_path / f"hf{num_files}")
    one, eight = read_files(tmp_path / "hf1"), read_files(tmp_path / "hf8")
    assert one == eight
    model.save(*load(tmp_path / "hf1"), tmp_path / "saved")
    saved = read_files(tmp_path / "saved")
    assert equal_weights(load(tmp_path / "saved")[0], load(tmp_path / "hf1")[0])
    small = [name for name in one if "model-" not in name and name != model.SHARD_INDEX]
    assert len(small) == 5 and all(one[name] == saved[name] for name in small)


def test_a_tokenizer_above_the_folder_is_taken(small70b, tok, tmp_path):
    source = write_meta(tmp_path / "meta", small70b, tok, 1)
    (source / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    convert(source, tmp_path / "hf")
    assert equal_weights(load(tmp_path / "hf")[0], small70b)


@pytest.mark.parametrize(
    "name, dim, multiple, multiplier",
    [("7b", 4096, 256, None), ("13b", 5120, 256, None), ("70b", 8192, 4096, 1.3)],
)
def test_metas_params_give_the_named_sizes(tmp_path, name, dim, multiple, multiplier):
    shape = SHAPES[name]
    d = {"dim": dim, "multiple_of": multiple, "n_heads": shape.heads, "n_layers": shape.layers}
    d |= {"norm_eps": 1e-05, "vocab_size": -1}
    if multiplier:
        d |= {"ffn_dim_multiplier": multiplier, "n_kv_heads": 8}
    (tmp_path / "params.json").write_text(json.dumps(d))
    assert convert_meta.read_params(tmp_path / "params.json", 32000) == shape


# ---- memory and interruption --------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from scripts.convert_meta import convert
small, big, out = map(Path, sys.argv[1:])

def status(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])

convert(small, out / "small")  # the pages of the libraries are there from now on
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
before = status("VmRSS")
convert(big, out / "big")
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to measure memory"
)
def test_converting_holds_a_block_and_not_the_model(small70b, tok, tmp_path):
    shape = ModelConfig(tok.size, dim=512, layers=10, heads=8, kv_heads=8, ffn=1408)
    big = random_net(shape)
    write_meta(tmp_path / "big", big, tok, 2, {"ffn_dim_multiplier": None})
    write_meta(tmp_path / "small", small70b, tok, 1)
    folders = [tmp_path / name for name in ("small", "big", "out")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", PEAK, *map(str, folders)]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    block_kib = sum(p.nbytes for p in big.layers[0].parameters()) / 1024
    assert int(done.stdout) < 4 * block_kib  # its pages of the files, the whole, the bytes written


def test_a_conversion_that_is_interrupted_leaves_no_folder_that_loads_and_can_start_again(
    small70b, tok, tmp_path, monkeypatch
):
    source = write_meta(tmp_path / "meta", small70b, tok, 2)
    with monkeypatch.context() as m:
        m.setattr(convert_meta, "write_config", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(source, tmp_path / "hf")
    with pytest.raises(UserError, match=r"config.json"):
        load(tmp_path / "hf")
    convert(source, tmp_path / "hf")
    assert equal_weights(load(tmp_path / "hf")[0], small70b)
    before = read_files(tmp_path / "hf")
    with pytest.raises(UserError, match="holds a finished model"):
        convert(source, tmp_path / "hf")
    assert read_files(tmp_path / "hf") == before


# ---- bad folders --------------------------------------------------------------------------------


def remove(name):
    return lambda tensors: tensors.pop(name)


def put(name, shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def edit(name, make):
    return lambda folder: (folder / name).write_bytes(make((folder / name).read_bytes()))


def unlink(pattern):
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def save_first(value):
    return lambda folder: torch.save(value, folder / "consolidated.00.pth")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 499723\n"
HTML = b"<!DOCTYPE html>\n<html><title>404</title></html>\n"
FIRST, LAST = "consolidated.00.pth", "consolidated.01.pth"

BAD_FOLDERS = {  # of two files; damage to the folder, what the message must name
    "html weights": (edit(FIRST, lambda b: HTML), [FIRST, "web page"]),
    "LFS pointer": (edit(LAST, lambda b: POINTER), [LAST, "LFS"]),
    "empty": (edit(FIRST, lambda b: b""), [FIRST, "empty"]),
    "truncated": (edit(LAST, lambda b: b[: len(b) // 2]), [LAST, "short"]),
    "not a dict": (save_first([1]), [FIRST]),
    "not tensors": (save_first({"a": 1}), [FIRST]),
    "code": (save_first({"a": os.system}), [FIRST]),
    "no first file": (unlink(FIRST), [FIRST, "not found"]),
    "no last file": (unlink(LAST), [LAST, "not found", "2 files"]),
    "no files": (unlink("*.pth"), [FIRST, "not found"]),
    "one file too many": (
        lambda f: shutil.copy(f / LAST, f / "consolidated.02.pth"),
        [FIRST, "shape"],
    ),
    "no params": (unlink("params.json"), ["params.json", "not found"]),
    "html params": (edit("params.json", lambda b: HTML), ["params.json", "JSON"]),
    "no tokenizer": (unlink("tokenizer.model"), ["tokenizer.model"]),
    "a Hugging Face folder": (
        lambda f: (f / "params.json").rename(f / "config.json"),
        ["Hugging Face", "--init"],
    ),
}
BAD_PARAMS = {  # what is other in params.json, what the message must name
    "no dim": ({"dim": "remove"}, ["params.json", "dim"]),
    "dim a word": ({"dim": "256"}, ["params.json"]),
    "no layers": ({"n_layers": 0}, ["params.json"]),
    "other width": ({"multiple_of": 512}, ["feed_forward.w1.weight", "448", "512"]),
    "Llama 3's rope": ({"use_scaled_rope": True}, ["params.json", "use_scaled_rope"]),
    "other vocabulary": ({"vocab_size": 32000}, ["tokenizer.model", "320", "32000"]),
}
BAD_TENSORS = {  # change of every file's tensors, what the message must name
    "embedding cut as Llama 3's": (
        put("tok_embeddings.weight", (160, 256)),
        [FIRST, "tok_embeddings.weight", "(160, 256)", "(320, 128)"],
    ),
    "output cut by columns": (put("output.weight", (320, 128)), [FIRST, "output.weight"]),
    "wo cut by rows": (
        put("layers.1.attention.wo.weight", (128, 256)),
        [FIRST, "layers.1.attention.wo.weight"],
    ),
    "not cut": (
        put("layers.1.attention.wq.weight", (256, 256)),
        [FIRST, "layers.1.attention.wq.weight"],
    ),
    "missing weight": (
        remove("layers.2.feed_forward.w3.weight"),
        [FIRST, "layers.2.feed_forward.w3.weight"],
    ),
    "extra weight": (put("layers.0.lora.weight", (1, 1)), [FIRST, "layers.0.lora.weight"]),
}


def refusal(source, target):
    """The one line in which `source` is refused; nothing of it may be written."""
    with pytest.raises(UserError) as e:
        convert(source, target)
    assert "\n" not in str(e.value) and str(source) in str(e.value)
    assert not target.exists()
    return str(e.value)


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_refused_by_one_line_that_names_the_file(small70b, tok, tmp_path, case):
    damage, words = BAD_FOLDERS[case]
    source = write_meta(tmp_path / "it", small70b, tok, 2)
    damage(source)
    message = refusal(source, tmp_path / "out")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("case", BAD_PARAMS)
def test_bad_params_are_refused_by_one_line_that_names_the_file(small70b, tok, tmp_path, case):
    params, words = BAD_PARAMS[case]
    message = refusal(write_meta(tmp_path / "it", small70b, tok, 2, params), tmp_path / "out")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused_by_one_line_that_names_them(small70b, tok, tmp_path, case):
    change, words = BAD_TENSORS[case]
    source = write_meta(tmp_path / "it", small70b, tok, 2, change=change)
    message = refusal(source, tmp_path / "out")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("number", [0, 3, 7])
def test_of_eight_files_the_missing_one_is_named(small70b, tok, tmp_path, number):
    source = write_meta(tmp_path / "it", small70b, tok, 8)
    (source / f"consolidated.{number:02}.pth").unlink()
    assert f"consolidated.{number:02}.pth: not found" in refusal(source, tmp_path / "out")


def test_one_file_that_does_not_match_the_others_is_named(small70b, tok, tmp_path):
    source = write_meta(tmp_path / "it", small70b, tok, 2)
    tensors = torch.load(source / LAST, weights_only=True)
    del tensors["layers.0.attention.wq.weight"]
    torch.save(tensors, source / LAST)
    message = refusal(source, tmp_path / "out")
    assert LAST in message and "layers.0.attention.wq.weight" in message


def test_a_folder_that_is_not_there_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("gone", "file"):
        with pytest.raises(UserError, match=f"{tmp_path}/{name}: no such folder"):
            convert_meta.main([str(tmp_path / name), str(tmp_path / "out")])
