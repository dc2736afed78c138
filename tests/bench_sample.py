"""How fast text is made: our sampler against transformers' `generate`, and against the limits of this machine.

    python tests/bench_sample.py --only "tiny fp32" --repeats 5 --json rows.json

Both sides live in one process, on one thread, with the same random weights and prompts, and take turns; a row is the
medians of --repeats runs, in sampled tokens a second. The peer's cache is the faster of its dynamic and static one,
tried before each case. Nothing ends by itself (the weights are random) but where a case says so.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

import sample
from model import Llama, ModelConfig, hf_name

SHAPES = {
    "tiny": ModelConfig(vocab_size=4096, dim=256, layers=6, heads=8, kv_heads=4, ffn=688, max_len=1024),
    "small": ModelConfig(vocab_size=32000, dim=768, layers=12, heads=12, kv_heads=12, ffn=2048, max_len=1024),
}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
KNOBS = {"temperature": 0.7, "top_p": 0.9}
END = 2  # the token that ends a row where lengths are given


def models(shape: str, dtype: str):
    """Our model and transformers', with the same weights."""
    c = SHAPES[shape]
    torch.manual_seed(0)
    ours = Llama(c).eval()
    ours.lm_head.weight.data.normal_(std=3 * c.dim**-0.5)  # logits with a standard deviation of 3: see PEAK
    peer = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads, intermediate_size=c.ffn, max_position_embeddings=c.max_len,
            rms_norm_eps=c.norm_eps, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )
    )  # fmt: skip
    peer.load_state_dict({hf_name(k): v for k, v in ours.state_dict().items()})
    return ours.to(TYPES[dtype]), peer.to(TYPES[dtype]).eval()


def random_prompts(vocab: int, count: int, length: int, common: int = 0) -> list[list[int]]:
    rng = random.Random(count)
    head = [rng.randrange(3, vocab) for _ in range(common)]
    return [head + [rng.randrange(3, vocab) for _ in range(length - common)] for _ in range(count)]


class Ends(StoppingCriteria):
    """The peer's rows end after a number of tokens each."""

    def __init__(self, prompt: int, lengths: list[int]):
        self.ends = prompt + torch.tensor(lengths)

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] >= self.ends


def peer_run(model, prompts, new: int, *, cache: str, n: int = 1, batch: int, lengths: list[int] | None = None):
    """Seconds of transformers' `generate`, `batch` prompts of one length at a time; also tokens, those asked for."""
    began, tokens = time.process_time(), 0
    for at in range(0, len(prompts), batch):
        ids = torch.tensor(prompts[at : at + batch])
        ends = lengths[at : at + batch] if lengths else None
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=new,
            num_return_sequences=n, stopping_criteria=[Ends(ids.shape[1], ends)] if ends else None,
            cache_implementation=cache, pad_token_id=0, **KNOBS,
        )  # fmt: skip
        tokens += sum(ends) if ends else len(ids) * n * new
    return time.process_time() - began, tokens


def our_run(model, prompts, new: int, *, n: int = 1, batch: int, lengths: list[int] | None = None):
    """The same by our sampler, as many rows at a time."""
    keys, found = [(i,) for i in range(len(prompts))], []
    planted = sample.uniforms, sample.pick
    if lengths:  # a random number of 2 says: end here

        def uniforms(key, count):
            u = planted[0](key, count)
            u[sample.TRIES * (lengths[key[0]] - 1)] = 2
            return u

        def pick(logits, u, *knobs):
            ids = planted[1](logits, u.clamp(max=0.5), *knobs)
            return ids.masked_fill(ids == END, END + 1).masked_fill(u[:, 0] == 2, END)

        sample.uniforms, sample.pick = uniforms, pick
    try:
        began = time.process_time()
        found = sample.generate(model, prompts, keys, stop=[END] if lengths else [], max_new=new, n=n, batch=n * batch, **KNOBS)  # fmt: skip  # noqa: E501
        seconds = time.process_time() - began
    finally:
        sample.uniforms, sample.pick = planted
    tokens = sum(len(ids) for samples in found for ids in samples)
    assert tokens == (sum(lengths) if lengths else len(prompts) * n * new), "a random row has ended by itself"
    return seconds, tokens


def cases():
    """name, shape, dtype, what `generate` is asked."""
    for shape in SHAPES:
        for dtype in TYPES:
            for rows in (1, 16, 64):
                yield f"{shape} {dtype} B {rows}", shape, dtype, {"count": rows, "length": 128, "new": 128, "batch": rows}  # fmt: skip  # noqa: E501
    for dtype in TYPES:
        ragged = {"length": 128, "new": 128, "batch": 64, "ends": (16, 128)}
        yield f"tiny {dtype} ragged 64", "tiny", dtype, ragged | {"count": 64}
        yield f"tiny {dtype} ragged queue of 256", "tiny", dtype, ragged | {"count": 256}
    for dtype in TYPES:
        yield f"tiny {dtype} judging", "tiny", dtype, {"count": 64, "length": 400, "common": 256, "new": 48, "n": 3, "batch": 64}  # fmt: skip  # noqa: E501


def compare(name, shape, dtype, work: dict, repeats: int) -> dict:
    """One row of the table: medians of our and the peer's tokens a second, taken in turns."""
    ours, peer = models(shape, dtype)
    work = dict(work)
    prompts = random_prompts(ours.cfg.vocab_size, work.pop("count"), work.pop("length"), work.pop("common", 0))
    if low_high := work.pop("ends", None):
        rng = random.Random(1)
        work["lengths"] = [rng.randint(*low_high) for _ in prompts]
    new = work.pop("new")
    short = {k: v for k, v in work.items() if k != "lengths"}
    trial = {c: min(peer_run(peer, prompts[:work["batch"]], 12, cache=c, **short)[0] for _ in range(2)) for c in ("dynamic", "static")}  # fmt: skip  # noqa: E501
    cache = min(trial, key=trial.get)
    our_run(ours, prompts[: work["batch"]], new, **short)
    speeds = {"ours": [], "peer": []}
    for _ in range(repeats):
        for side, run in (
            ("ours", lambda: our_run(ours, prompts, new, **work)),
            ("peer", lambda: peer_run(peer, prompts, new, cache=cache, **work)),
        ):
            seconds, tokens = run()
            speeds[side].append(tokens / seconds)
    a, b = (statistics.median(speeds[side]) for side in ("ours", "peer"))
    return {"case": name, "ours": a, "peer": b, "ratio": a / b, "unit": "tok/s", "note": f"peer: {cache} cache"}


def fastest(work, times: int = 9) -> float:
    work()
    seconds = []
    for _ in range(times):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


@torch.no_grad()
def limits(shape: str, dtype: str, repeats: int):
    """How near decoding (B 1) comes to a large copy's bytes a second, and prefill to a large product's FLOP/s."""
    ours, _ = models(shape, dtype)
    c, kind = ours.cfg, TYPES[dtype]
    source = torch.ones(1 << 26)  # 256 MB
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / fastest(lambda: target.copy_(source), repeats)
    a, b = torch.randn(2, 2048, 2048).to(kind)
    product = 2 * 2048**3 / fastest(lambda: a @ b, repeats)
    weights = sum(p.numel() for p in ours.parameters()) - c.vocab_size * c.dim  # of the embedding one row is read
    prompt, new = random_prompts(c.vocab_size, 1, 128), 128
    seconds = [our_run(ours, prompt, m, batch=1)[0] for _ in range(repeats) for m in (1, new + 1)]
    step = statistics.median(b - a for a, b in zip(seconds[::2], seconds[1::2], strict=True)) / new
    kv = 2 * c.layers * c.kv_heads * c.head_dim * (128 + new / 2)
    moved = (weights + kv) * a.element_size() / step
    prompts = random_prompts(c.vocab_size, 16, 256)
    prefill = statistics.median(our_run(ours, prompts, 1, batch=16)[0] for _ in range(repeats))
    flops = 16 * (256 * 2 * (weights - c.vocab_size * c.dim) + 2 * c.vocab_size * c.dim + 2 * c.layers * c.dim * 256**2)
    yield {"case": f"{shape} {dtype} decode, bytes", "ours": moved, "peer": copy, "ratio": moved / copy, "unit": "B/s", "note": "B 1; a large copy"}  # fmt: skip  # noqa: E501
    yield {"case": f"{shape} {dtype} prefill, FLOP", "ours": flops / prefill, "peer": product, "ratio": flops / prefill / product, "unit": "FLOP/s", "note": "16 x 256; a large product"}  # fmt: skip  # noqa: E501


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []

    def show(row):
        rows.append(row)
        print(f"{row['case']:34} {row['ours']:14,.0f} {row['peer']:14,.0f} {row['ratio']:7.2f}  {row['unit']:7} {row['note']}", flush=True)  # fmt: skip  # noqa: E501

    print(f"{'case':34} {'ours':>14} {'peer':>14} {'ratio':>7}")
    for case in cases():
        if args.only in case[0]:
            show(compare(*case, args.repeats))
    for shape in SHAPES:
        for dtype in TYPES:
            if args.only in f"{shape} {dtype} limits":
                for row in limits(shape, dtype, args.repeats):
                    show(row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
