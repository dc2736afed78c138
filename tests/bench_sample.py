"""How fast text is made: our engine beside transformers' `generate`, or beside the limits of this
machine.

    python tests/bench_sample.py --only "tiny fp32" --repeats 5 --json rows.json
    python tests/bench_sample.py --first DIR            beside a checkout of the first edition, too
    python tests/bench_sample.py --limits               beside a large copy and a large product

All sides live in one process, on one thread, with the same random weights and prompts, and take
turns; a row has the medians of --repeats runs, in sampled tokens a second of CPU time. The peer's
cache is the faster of its dynamic and static one, tried before each case. Nothing ends by itself
(the weights are random) but where a case says so.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

import sample
from model import Llama, ModelConfig, hf_name, transpose_weights, use_onednn_linear

SHAPES = {
    "tiny": ModelConfig(
        vocab_size=4096, dim=256, layers=6, heads=8, kv_heads=4, ffn=688, max_len=1024
    ),
    "small": ModelConfig(dim=768, layers=12, heads=12, kv_heads=12, ffn=2048, max_len=1024),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SETTINGS = {"temperature": 0.7, "top_p": 0.9}
END = 2  # the token that ends a text where lengths are given
END_NOW = 2.0  # the random number that stands for it
LOGITS_STD = 3  # as peaked as a trained model's, so that top-p has little to look for


class Case(NamedTuple):
    """`count` prompts of `length` tokens, of which they share `common`; n samples of each, of
    `new` tokens, or of lengths in `ends`; `batch` prompts side by side; our steps compiled or
    not."""

    name: str
    shape: str
    dtype: str
    count: int
    batch: int
    length: int = 128
    new: int = 128
    common: int = 0
    n: int = 1
    ends: tuple[int, int] | None = None
    compile: bool = False

    def prompts(self) -> list[list[int]]:
        rng = random.Random(self.count)
        vocab_size = SHAPES[self.shape].vocab_size

        def random_ids(count):
            return [rng.randrange(3, vocab_size) for _ in range(count)]

        prefix = random_ids(self.common)
        return [prefix + random_ids(self.length - self.common) for _ in range(self.count)]

    def work(self) -> dict:
        return {"n": self.n, "batch": self.batch, "compile": self.compile}

    def lengths(self) -> list[int] | None:
        rng = random.Random(1)
        return [rng.randint(*self.ends) for _ in range(self.count)] if self.ends else None


def cases():
    for shape in SHAPES:
        for dtype in DTYPES:
            for count in (1, 16, 64):
                yield Case(f"{shape} {dtype} B {count}", shape, dtype, count, batch=count)
            yield Case(f"{shape} {dtype} B 1 compiled", shape, dtype, 1, batch=1, compile=True)
    for dtype in DTYPES:
        ragged = {"batch": 64, "ends": (16, 128)}
        yield Case(f"tiny {dtype} ragged 64", "tiny", dtype, 64, **ragged)
        yield Case(f"tiny {dtype} ragged queue of 256", "tiny", dtype, 256, **ragged)
        judging = {"batch": 64, "length": 400, "common": 256, "new": 48, "n": 3}
        yield Case(f"tiny {dtype} judging", "tiny", dtype, 64, **judging)


def make_weights(shape: str) -> Llama:
    torch.manual_seed(0)
    net = Llama(SHAPES[shape]).eval()
    net.lm_head.weight.data.normal_(std=LOGITS_STD * net.cfg.dim**-0.5)
    return net


# ---- the sides: (prompts, new tokens, ...) -> CPU seconds and sampled tokens -----------------


class Ours:
    """Our engine, or the first edition's."""

    def __init__(self, weights: Llama, dtype: torch.dtype):
        self.engine = sample
        self.model = Llama(weights.cfg).eval()
        self.copy_weights(weights, dtype)
        if dtype == torch.float32:  # as load_for_sampling has them
            use_onednn_linear(self.model)
            transpose_weights(self.model)

    def copy_weights(self, weights: Llama, dtype: torch.dtype):
        self.model.load_state_dict(weights.state_dict())
        self.model.to(dtype)

    def plant_ends(self, lengths: list[int]):
        """Put uniforms and a sampler in place by which text i ends after lengths[i] tokens."""
        old_uniforms, old_sample_token = sample.uniforms, sample.sample_token

        def uniforms(key, count):
            u = old_uniforms(key, count)
            u[lengths[key[0]] - 1] = END_NOW
            return u

        def sample_token(logits, u, *settings):
            ids = old_sample_token(logits, u.clamp(max=0.5), *settings)
            ids = ids.masked_fill(ids == END, END + 1)
            return ids.masked_fill(u == END_NOW, END)

        return {"uniforms": uniforms, "sample_token": sample_token}

    def run(
        self, prompts, new: int, *, n: int, batch: int, lengths=None, compile=False
    ) -> tuple[float, int]:
        keys = [(i,) for i in range(len(prompts))]
        planted = self.plant_ends(lengths) if lengths else {}
        originals = {name: getattr(self.engine, name) for name in planted}
        for name, function in planted.items():
            setattr(self.engine, name, function)
        try:
            start = time.process_time()
            samples = self.engine.generate(
                self.model,
                prompts,
                keys,
                stop=[END] if lengths else [],
                max_new=new,
                n=n,
                batch=n * batch,
                **({"compile": True} if compile and self.engine is sample else {}),
                **SETTINGS,
            )
            seconds = time.process_time() - start
        finally:
            for name, function in originals.items():
                setattr(self.engine, name, function)
        num_tokens = sum(len(ids) for id_lists in samples for ids in id_lists)
        want = sum(lengths) if lengths else len(prompts) * n * new
        assert num_tokens == want, "a random text has ended by itself"
        return seconds, num_tokens


class FirstEdition(Ours):
    """The engine of a checkout of the first edition, whose modules have the names of ours."""

    def __init__(self, weights: Llama, dtype: torch.dtype, folder: Path):
        self.engine, model = import_first_edition(folder)
        shape = {name: getattr(weights.cfg, name) for name in vars(weights.cfg)}
        shape["tied"] = shape.pop("tie_embeddings")
        self.model = model.Llama(model.ModelConfig(**shape)).eval()
        self.copy_weights(weights, dtype)

    def plant_ends(self, lengths: list[int]):
        engine = self.engine
        old_uniforms, old_pick = engine.uniforms, engine.pick

        def uniforms(key, count):
            u = old_uniforms(key, count)
            u[engine.TRIES * (lengths[key[0]] - 1)] = END_NOW
            return u

        def pick(logits, u, *settings):
            ids = old_pick(logits, u.clamp(max=0.5), *settings)
            ids = ids.masked_fill(ids == END, END + 1)
            return ids.masked_fill(u[:, 0] == END_NOW, END)

        return {"uniforms": uniforms, "pick": pick}


def import_first_edition(folder: Path):
    """Its sample.py and model.py, as modules of other names than ours."""
    names = ("model", "sample")
    ours = {name: sys.modules.pop(name) for name in names}
    sys.path.insert(0, str(folder))
    try:
        import model as first_model
        import sample as first_sample
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules[f"first_{name}"] = sys.modules.pop(name, None)
        sys.modules.update(ours)
    assert Path(first_sample.__file__).parent == folder.resolve(), first_sample.__file__
    return first_sample, first_model


class TextsEnd(StoppingCriteria):
    """The peer's texts end after a number of tokens each."""

    def __init__(self, prompt_len: int, lengths: list[int]):
        self.ends = prompt_len + torch.tensor(lengths)

    def __call__(self, input_ids, scores, **_):
        return input_ids.shape[1] >= self.ends


class Peer:
    """transformers' `generate`, `batch` prompts of one length at a time."""

    def __init__(self, weights: Llama, dtype: torch.dtype):
        c = weights.cfg
        config = LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            intermediate_size=c.ffn,
            max_position_embeddings=c.max_len,
            rms_norm_eps=c.norm_eps,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        self.model = LlamaForCausalLM(config)
        state = {hf_name(name): p for name, p in weights.state_dict().items()}
        self.model.load_state_dict(state)
        self.model = self.model.to(dtype).eval()
        self.cache = "dynamic"

    def choose_cache(self, case: Case):
        seconds = {}
        for self.cache in ("dynamic", "static"):
            prompts = case.prompts()[: case.batch]
            runs = [self.run(prompts, 12, n=case.n, batch=case.batch) for _ in range(2)]
            seconds[self.cache] = min(runs)[0]
        self.cache = min(seconds, key=seconds.get)

    def run(
        self, prompts, new: int, *, n: int, batch: int, lengths=None, compile=False
    ) -> tuple[float, int]:
        start, num_tokens = time.process_time(), 0
        for i in range(0, len(prompts), batch):
            ids = torch.tensor(prompts[i : i + batch])
            ends = lengths[i : i + batch] if lengths else None
            self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=new,
                num_return_sequences=n,
                stopping_criteria=[TextsEnd(ids.shape[1], ends)] if ends else None,
                cache_implementation=self.cache,
                pad_token_id=0,
                **SETTINGS,
            )
            num_tokens += sum(ends) if ends else len(ids) * n * new
        return time.process_time() - start, num_tokens


# ---- rows ------------------------------------------------------------------------------------


class Row(NamedTuple):
    case: str
    ours: float
    peer: float
    first: float | None  # the first edition
    unit: str
    note: str

    def show(self):
        numbers = f"{self.ours:14,.0f} {self.peer:14,.0f} {self.ours / self.peer:7.2f}"
        if self.first:
            numbers += f" {self.first:14,.0f} {self.ours / self.first:7.2f}"
        print(f"{self.case:34} {numbers}  {self.unit:7} {self.note}", flush=True)

    def to_json(self) -> dict:
        row = self._asdict() | {"ratio": self.ours / self.peer}
        return row | {"ratio_first": self.ours / self.first if self.first else None}


def compare(case: Case, repeats: int, first: Path | None) -> Row:
    """Medians of all sides' tokens a second, taken in turns."""
    weights, dtype = make_weights(case.shape), DTYPES[case.dtype]
    sides = {"ours": Ours(weights, dtype), "peer": Peer(weights, dtype)}
    if first:
        sides["first"] = FirstEdition(weights, dtype, first)
    sides["peer"].choose_cache(case)
    prompts = case.prompts()
    work = case.work()
    for name in sides.keys() - {"peer"}:  # the peer is warm by now
        sides[name].run(prompts[: case.batch], case.new, **work)
    work["lengths"] = case.lengths()
    speeds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds, num_tokens = side.run(prompts, case.new, **work)
            speeds[name].append(num_tokens / seconds)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    note = f"peer: {sides['peer'].cache} cache"
    return Row(case.name, medians["ours"], medians["peer"], medians.get("first"), "tok/s", note)


def median_seconds(work: Callable, repeats: int) -> float:
    work()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds)


@torch.no_grad()
def limits(case: Case, repeats: int):
    """What share of this machine a decode step makes use of: bytes a second of weights, keys and
    values beside a large copy's, and operations a second beside a large product's."""
    ours, dtype = Ours(make_weights(case.shape), DTYPES[case.dtype]), DTYPES[case.dtype]
    c = ours.model.cfg
    # of the embedding a step reads only rows
    num_weights = sum(p.numel() for p in ours.model.parameters()) - c.vocab_size * c.dim
    slots, ages = case.n * case.batch, case.new / 2  # own tokens of each slot, on average
    num_keys = case.common + case.batch * (case.length - case.common) + slots * ages
    num_bytes = (num_weights + 2 * c.layers * c.kv_heads * c.head_dim * num_keys) * dtype.itemsize
    attention = 2 * 2 * c.layers * c.heads * c.head_dim * (case.length + ages)
    operations = slots * (2 * num_weights + attention)

    source = torch.ones(1 << 26)  # 256 MB
    target = torch.empty_like(source)
    copy_rate = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), repeats)
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    with sample.decode_by_onednn(2048):
        product_rate = 2 * 2048**3 / median_seconds(lambda: a @ b, repeats)
    prompts, work = case.prompts(), case.work()
    ours.run(prompts, case.new, **work)
    steps = []
    for _ in range(repeats):
        one, _tokens = ours.run(prompts, 1, **work)
        all_steps, _tokens = ours.run(prompts, case.new, **work)
        steps.append((all_steps - one) / (case.new - 1))
    step = statistics.median(steps)
    note = f"a step of {1000 * step:.1f} ms; a large"
    yield Row(f"{case.name}, bytes", num_bytes / step, copy_rate, None, "B/s", f"{note} copy")
    yield Row(
        f"{case.name}, work", operations / step, product_rate, None, "FLOP/s", f"{note} product"
    )


def main():
    parser = argparse.ArgumentParser(description="Sampling, beside transformers' generate.")
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--first", type=Path, help="checkout of the first edition, a third side")
    parser.add_argument("--limits", action="store_true", help="our steps beside this machine's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    first_columns = f" {'first':>14} {'ratio':>7}" if args.first else ""
    print(f"{'case':34} {'ours':>14} {'peer':>14} {'ratio':>7}{first_columns}")
    rows = []
    for case in cases():
        if not args.limits and args.only in case.name:
            rows.append(compare(case, args.repeats, args.first))
            rows[-1].show()
    for case in cases():
        if args.limits and args.only in case.name and not case.ends:
            for row in limits(case, args.repeats):
                rows.append(row)
                row.show()
    if args.json:
        text = json.dumps([row.to_json() for row in rows], indent=1)
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
