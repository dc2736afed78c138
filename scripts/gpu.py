"""scripts/gpu.py: a GPU -> what works on it and how fast, as a table and as runs/gpu.json.

    python -m scripts.gpu                          one card of 80 GiB or more, under ten minutes
    python -m scripts.gpu --only decode training   some parts
    python -m scripts.gpu --tiny                   tiny shapes, also on a CPU: does the script run?

Every part works in a process of its own, so that none can end, slow or starve another. A line
with a "difference" fails where that is over "at most". Exit code 1 if a part failed.

Left out: several GPUs, real weights, quality.
"""

import argparse
import copy
import multiprocessing
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch

import dpo
import judge
import sample
import train
from model import Llama, ModelConfig, UserError, parallelize, write_json
from scripts import plan

SMALL = ModelConfig(512, dim=128, layers=2, heads=4, kv_heads=2, ffn=256, max_len=512)
SECONDS = 300  # of a part, or it counts as hanging
STEP_KINDS = {"eager": {"compile": False}, "compiled": {"compile": True}}  # of a decode step
NOT_HERE = "not on this machine"


class Setup(NamedTuple):
    """Where parts work, and on which scale."""

    device: str
    tiny: bool

    def pick(self, normal, tiny):
        return tiny if self.tiny else normal


# ---- does it work? ---------------------------------------------------------------------------
# A part yields lines: a label, and figures by their names or a text.


def gpu_tests(setup: Setup):
    """The tests that wait for a GPU have cuda in their names."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda"]
    command.append(setup.pick("tests", "tests/test_model.py"))
    result = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS - 10)
    summary = (result.stdout or result.stderr).splitlines()[-1]
    counts = re.findall(r"(\d+) (passed|failed|skipped|error)", summary)
    yield "pytest -k cuda", {word: int(count) for count, word in counts}
    assert result.returncode == 0, summary


def agreement(setup: Setup):
    """The same weights on the CPU and on the device. In bf16 the device may err by twice as much
    as the CPU does; a GPU attends by varlen attention there, and once more segment by segment."""
    models = small_models(setup)
    results = {name: outputs(model) for name, model in models.items()}
    if setup.device == "cuda":
        dpo.has_varlen_attention = lambda q: False
        results["device bf16, by segments"] = outputs(models["device bf16"])
    for what, exact in results["exact"].items():
        line = compare(results["device fp32"][what], results["cpu fp32"][what], 1e-4)
        yield f"{what}, device fp32", line
        error = compare(results["cpu bf16"][what], exact, 0)["difference"]
        for name in ("device bf16", "device bf16, by segments"):
            if name in results:
                yield f"{what}, {name}", compare(results[name][what], exact, 2 * error + 1e-3)
    if setup.device == "cpu":
        yield "varlen attention", NOT_HERE


def outputs(model: Llama) -> dict[str, torch.Tensor]:
    """Logits; losses and gradients of SFT and DPO on ragged, packed batches. On the CPU."""
    device = model.embed_tokens.weight.device
    tokens = torch.tensor(random_texts(SMALL, 3, 50), device=device)
    results = {"logits": model(tokens)}
    (ids,) = random_texts(SMALL, 1, 99)
    sft = [(ids[:a], ids[a:b]) for a, b in ((5, 14), (40, 41), (1, 34))]
    pairs = [
        (ids[:a], ids[a:b], ids[b:c], (-50.0, -60.0)) for a, b, c in ((5, 14, 18), (40, 41, 74))
    ]
    losses = {"SFT": dpo.sft_loss(model, *dpo.collate(sft, device))[0]}
    losses["DPO"] = dpo.preference_loss(model, *dpo.collate_pairs(pairs, device))[0]
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results[f"{name} loss"] = loss
        results[f"{name} gradient"] = torch.cat([g.float().flatten() for g in gradients])
    return {name: tensor.detach().float().cpu() for name, tensor in results.items()}


@torch.no_grad()
def engine(setup: Setup):
    """Whole samples, three of each of some ragged prompts with one beginning. By the same random
    numbers the device draws what the CPU draws, but where rounding decides."""
    models = small_models(setup)
    beginning = list(range(3, 27))
    prompts = [beginning + list(range(100, 100 + 7 * i)) for i in range(1, 9)]
    settings = {"keys": [(i,) for i in range(8)], "n": 3, "max_new": 40, "stop": [2], "batch": 12}
    for temperature in (0.0, 1.0):
        by_device = []
        for name in ("cpu fp32", "device fp32"):
            samples = sample.generate(models[name], prompts, temperature=temperature, **settings)
            by_device.append(sum(samples, []))
        unlike = sum(a != b for a, b in zip(*by_device, strict=True)) / len(by_device[0])
        label = f"temperature {temperature:g}, share of other samples"
        yield label, {"difference": unlike, "at most": 0.1}
    regrets = {}
    for name in ("cpu bf16", "device bf16"):
        samples = sample.generate(models[name], prompts, temperature=0.0, **settings)
        regrets[name] = regret(models["exact"], prompts, samples)
    limit = 2 * regrets["cpu bf16"] + 0.01
    yield "greedy in bf16, regret", {"difference": regrets["device bf16"], "at most": limit}


def regret(model: Llama, prompts, samples) -> float:
    """How far the logits of greedy tokens are below the best, in deviations of all logits."""
    distances = []
    for prompt, (ids, *_) in zip(prompts, samples, strict=True):
        logits = model(torch.tensor([prompt + ids]))[0, len(prompt) - 1 : -1]
        best, of_ids = logits.amax(1), logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        distances.append((best - of_ids) / logits.std(1))
    return torch.cat(distances).mean().item()


def zoo(setup: Setup):
    """M0 to M2 on some rows of the zoo, stopped at the first training state, and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        data.mkdir()
        for name in ("recipe.json", "judge.txt", "propose.txt"):
            shutil.copy(Path("data/zoo") / name, data)
        counts = {"ift": setup.pick(1600, 24), "test": 8}  # gradings among them
        for name, count in counts.items():
            rows = sample.read_jsonl(Path("data/zoo") / f"{name}.jsonl")
            sample.write_jsonl(data / f"{name}.jsonl", rows[:count])
        flags = ["--data", str(data), "--out", str(out), "--iters", "2", "--prompts"]
        flags += setup.pick("40", "4 --max-response 16 --max-judgement 16").split()
        flags += ["--save-every", setup.pick("5", "2")]
        if setup.tiny:  # so few rows teach no judge
            judge.parse_score = lambda text: len(text) % 6
        save = train.save_training_state

        def save_and_stop(*args):
            save(*args)
            raise UserError("stopped")

        with redirect_stdout(StringIO()) as log:
            train.save_training_state = save_and_stop
            with suppress(SystemExit):
                train.command(flags)
            train.save_training_state = save
            train.command(flags)
        assert "SFT: goes on after step" in log.getvalue(), "it has not resumed"
        pairs = sample.read_jsonl(out / "M2" / "pairs.jsonl")
        steps = sample.read_jsonl(out / "metrics.jsonl")
    yield "stopped, resumed, done", {"updates": len(steps), "pairs": len(pairs)}
    first = next(step for step in steps if step["model"] == "M2")
    yield "DPO's first loss and ln 2", {"difference": abs(first["loss"] - 0.6931), "at most": 0.01}
    yield "an update", {"ms": 1e3 * statistics.median(step["seconds"] for step in steps)}


# ---- how fast? -------------------------------------------------------------------------------


def machine(setup: Setup):
    name = torch.cuda.get_device_name() if setup.device == "cuda" else "a CPU"
    yield "machine", f"{name}, torch {torch.__version__}"
    yield "rates", measure_rates(setup)


@torch.no_grad()
def prefill(setup: Setup):
    rates, model = measure_rates(setup), random_model(setup)
    texts = random_texts(model.cfg, *setup.pick((8, 1024), (2, 32)))
    rate = len(texts) * len(texts[0]) / seconds_of(setup, partial(sample.prefill, model, texts))
    operations = 2 * plan.num_parameters(model.cfg)[0] * rate
    share = operations / rates["TFLOP/s"] / 1e12
    yield f"{len(texts)} texts of {len(texts[0])}", {"tok/s": rate, "MFU %": 100 * share}


def decode(setup: Setup):
    """Steps of many texts, with all that belongs to a step."""
    rates, model = measure_rates(setup), random_model(setup)
    prompt, new = setup.pick((256, 160), (16, 6))
    weights = sum(p.nbytes for p in model.parameters()) - model.embed_tokens.weight.nbytes
    for kind, settings in STEP_KINDS.items():
        if kind == "compiled" and setup.device == "cpu":
            yield kind, NOT_HERE
            continue
        for batch in setup.pick((1, 16, 64, 128), (1, 4)):
            texts = random_texts(model.cfg, batch, prompt)
            reset_peak(setup)
            step = seconds_a_step(model, texts, new, **settings)
            cache = batch * (prompt + 0.6 * new) * plan.cache_bytes(train.Config(), model.cfg)
            share = (weights + cache) / step / rates["GB/s"] / 1e9
            figures = {"ms": 1e3 * step, "tok/s": batch / step, "bandwidth %": 100 * share}
            parts = plan_of_sampling(model.cfg, batch, 1, prompt, new)
            yield f"B {batch}, {kind}", figures | peak_memory(setup, parts)


def seconds_a_step(model: Llama, texts, new: int, **settings) -> float:
    """The mean over all steps but the first fifth, in which kernels may be compiled."""
    keys = [(i,) for i in range(len(texts))]
    settings |= {"stop": [], "max_new": new, "batch": len(texts)}
    times = []
    for _ in sample.generate_stream(model, texts, keys, **settings):
        times.append(time.perf_counter())
    return (times[-1] - times[new // 5 - 1]) / (new - new // 5)


def judging(setup: Setup):
    """Prompts that begin with one template, and three votes of each."""
    model = random_model(setup)
    prompts, length, new = setup.pick((128, 300, 64), (3, 20, 4))
    (template,) = random_texts(model.cfg, 1, length)
    texts = [template + text for text in random_texts(model.cfg, prompts, length)]
    keys = [(i,) for i in range(prompts)]
    settings = {"stop": [], "n": 3, "max_new": new, "batch": 3 * prompts}
    reset_peak(setup)
    work = partial(sample.generate, model, texts, keys, **settings)
    seconds = seconds_of(setup, work, repeats=1)
    figures = {"judgements/s": 3 * prompts / seconds, "tok/s": 3 * prompts * new / seconds}
    parts = plan_of_sampling(model.cfg, 3 * prompts, 3, length, new, prefix=length)
    yield f"{prompts} prompts, {new} tokens a vote", figures | peak_memory(setup, parts)


def training(setup: Setup):
    """2,048 tokens at once through forward and backward, by the trainer's own FSDP and AdamW, with
    as many layers as memory holds."""
    cfg = train.Config(activation_checkpointing=True, dtype="bfloat16")
    rates, tokens = measure_rates(setup), setup.pick(2048, 64)
    reset_peak(setup)
    shape = whole_shape = setup.pick(plan.SHAPES["7b"], SMALL)
    free = 0.95 * sample.free_memory(torch.device(setup.device)) + plan.RESERVE
    parts = plan.training_memory(cfg, shape, 1, tokens, several=True)
    while sum(parts.values()) > free:
        shape = replace(shape, layers=shape.layers - 1)
        parts = plan.training_memory(cfg, shape, 1, tokens, several=True)
    n, whole_n = plan.num_parameters(shape)[0], plan.num_parameters(whole_shape)[0]
    mesh = train.init_distributed(cfg)
    with torch.device("meta"):
        model = Llama(shape, cfg.dropout)
    parallelize(model, mesh, torch.bfloat16, activation_checkpointing=True)
    make_weights(model, setup.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    a, b, c = random_texts(shape, 3, tokens // 2)
    pair = (a, b[: tokens // 4], c[: tokens // 4], (-9.0, -9.0))
    cases = {
        "SFT": (dpo.sft_loss, dpo.collate([(a, b)], setup.device)),
        "DPO": (dpo.preference_loss, dpo.collate_pairs([pair], setup.device)),
    }

    def step(loss, tensors):
        (loss(model, *tensors)[0] / tokens).backward()

    def update():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step(*cases["SFT"])
    update()  # from here on all that a step needs is there
    for case, objective in cases.items():
        seconds = seconds_of(setup, partial(step, *objective))
        share = 6 * n * tokens / seconds / rates["TFLOP/s"] / 1e12
        rate = tokens / seconds * n / whole_n
        figures = {"ms": 1e3 * seconds, "tok/s of all layers": rate, "MFU %": 100 * share}
        yield f"{case}, {shape.layers} of {whole_shape.layers} layers", figures
    yield "clipping and AdamW", {"ms": 1e3 * seconds_of(setup, update)} | peak_memory(setup, parts)


def syncs(setup: Setup):
    """Where 32 decode steps make the host wait for the GPU."""
    if setup.device == "cpu":
        yield "32 decode steps", NOT_HERE
        return
    model = random_model(setup)
    texts, keys = random_texts(model.cfg, 8, 64), [(i,) for i in range(8)]
    steps = sample.generate_stream(model, texts, keys, stop=[], max_new=64)
    next(steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(32):
            next(steps)
    caught = [w for w in caught if "synchronizing" in str(w.message)]
    places = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught)
    yield "32 decode steps", {"syncs": len(caught)} | dict(places.most_common())


# ---- what parts are made of ------------------------------------------------------------------


def make_weights(model: Llama, device: str, std: float = 0.02):
    """Random weights for a model that has no memory yet."""
    model.to_empty(device=device)
    model.tie_weights()
    with torch.no_grad():
        for p in model.parameters():
            local = p.to_local() if hasattr(p, "to_local") else p
            local.normal_(std=std) if p.dim() == 2 else local.fill_(1.0)


def random_model(setup: Setup) -> Llama:
    """The 7b in bf16, made on the device."""
    with torch.device("meta"):
        model = Llama(setup.pick(plan.SHAPES["7b"], SMALL)).to(torch.bfloat16)
    make_weights(model, setup.device)
    return model.eval()


def small_models(setup: Setup) -> dict[str, Llama]:
    """The same weights by device and type; "exact" is what bf16 rounds, computed in fp32."""
    torch.manual_seed(0)
    model = Llama(SMALL).eval()
    make_weights(model, "cpu", std=0.1)
    half = copy.deepcopy(model).to(torch.bfloat16)
    return {
        "cpu fp32": model,
        "device fp32": copy.deepcopy(model).to(setup.device),
        "cpu bf16": half,
        "device bf16": copy.deepcopy(half).to(setup.device),
        "exact": copy.deepcopy(half).float(),
    }


def random_texts(shape: ModelConfig, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(3, shape.vocab_size, (count, length), generator=generator).tolist()


def compare(a, b, limit: float) -> dict[str, float]:
    distance = (a.double() - b.double()).norm() / b.double().norm()
    return {"difference": distance.item(), "at most": limit}


def measure_rates(setup: Setup) -> dict[str, float]:
    """Of a large copy, reads and writes counted, and of a large product in bf16."""
    size, side = setup.pick((2 << 30, 8192), (1 << 20, 128))
    a, b = torch.empty(2, size, dtype=torch.uint8, device=setup.device)
    copying = seconds_of(setup, partial(b.copy_, a))
    c, d = torch.randn(2, side, side, device=setup.device).to(torch.bfloat16)
    product = seconds_of(setup, lambda: [c @ d for _ in range(10)]) / 10
    return {"GB/s": 2 * size / copying / 1e9, "TFLOP/s": 2 * side**3 / product / 1e12}


def seconds_of(setup: Setup, work, repeats: int = 5) -> float:
    """Of a call, the median after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if setup.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def reset_peak(setup: Setup):
    if setup.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def plan_of_sampling(shape: ModelConfig, batch: int, *args, **settings) -> dict[str, float]:
    """The plan for bf16 weights alone, where memory cuts nothing."""
    roomy, cfg = plan.Machine(1, 1 << 20, 1.0), train.Config(sample_batch=batch)
    memory = plan.sampling_stage(cfg, shape, roomy, *args, **settings).memory
    return {name: size for name, size in memory.items() if name != "weights"}


def peak_memory(setup: Setup, parts: dict[str, float]) -> dict[str, float]:
    """GiB beside the planned ones; nothing on a CPU."""
    if setup.device == "cpu":
        return {}
    planned = sum(size for name, size in parts.items() if name != "reserve")
    peak = torch.cuda.max_memory_allocated()
    return {"GiB": peak / plan.GiB, "GiB planned": planned / plan.GiB}


# ---- one part after the other ----------------------------------------------------------------

PARTS = [machine, gpu_tests, agreement, engine, zoo]
PARTS += [prefill, decode, judging, training, syncs]
PARTS = {part.__name__: part for part in PARTS}


def send_lines(name: str, tiny: bool, pipe):
    """Send the lines of a part as they come, and then why it failed, or "ok"."""
    try:
        setup = Setup("cuda" if torch.cuda.is_available() else "cpu", tiny)
        if setup.device == "cpu" and not tiny:
            raise UserError("torch sees no GPU; --tiny runs on a CPU")
        for line in PARTS[name](setup):
            pipe.send(line)
        pipe.send("ok")
    except BaseException as e:
        first_line = str(e).partition("\n")[0]
        pipe.send(f"{type(e).__name__}: {first_line}")


def run_part(name: str, tiny: bool) -> dict:
    """A part in a process of its own; its lines are printed as they come."""
    context = multiprocessing.get_context("fork")
    results, there = context.Pipe(duplex=False)
    child = context.Process(target=send_lines, args=(name, tiny, there))
    start = time.time()
    child.start()
    there.close()
    lines, verdict = {}, ""
    while not verdict:
        try:
            in_time = results.poll(max(0, start + SECONDS - time.time()))
            message = results.recv() if in_time else f"no end after {SECONDS} seconds"
        except EOFError:
            child.join()
            message = f"its process ended with code {child.exitcode}"
        if isinstance(message, str):
            verdict = message
            continue
        label, lines[label] = message
        print(f"  {label}: {describe(lines[label])}", flush=True)
    child.kill()
    child.join(20)  # until its memory is free
    for label, figures in lines.items():
        if verdict == "ok" and "at most" in figures:
            within = figures["difference"] <= figures["at most"]
            verdict = "ok" if within else f"{label}: {describe(figures)}"
    return {"verdict": verdict, "seconds": round(time.time() - start, 1), "lines": lines}


def describe(figures: dict | str) -> str:
    if isinstance(figures, str):
        return figures
    return ", ".join(f"{name} {value:,.4g}" for name, value in figures.items())


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.gpu", description="What works on this GPU, and how fast."
    )
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu.json"), help="runs/gpu.json")
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in args.only:
        print(name, flush=True)
        results[name] = run_part(name, args.tiny)
        write_json(args.out, results)  # after every part, so that nothing is lost
    print("")
    for name, result in results.items():
        print(f"{name:10} {result['seconds']:6.1f} s  {result['verdict']}")
    if any(result["verdict"] != "ok" for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    sample.run_command(main)
