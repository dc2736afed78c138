"""scripts/plan.py: a model and a machine -> memory, tokens, hours, disk; and the command.

    python -m scripts.plan 7b --data rows --gpus 8 --gpu-memory 80
    python -m scripts.plan 70b --gpus 64 --rate 400
    python -m scripts.plan Llama-2-7b-hf --data rows [any flag of train.py]

Nothing is started and no GPU is needed. A size of Llama 2, or a folder of that size, brings the
knobs that suit it; flags override them. What cannot fit is refused, with what to change.
Everything is at most: each text is as long as its limit allows, each prompt gives a pair.

Left out: requests to the prompt writer, test answers and judge evaluations, which are few; the
time of kernel launches, communication and loading.
"""

import argparse
import math
import shlex
from dataclasses import fields, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch

import dpo
import judge
import sample
import train
from model import Llama, ModelConfig, Tokenizer, UserError, check_tp, read_shape
from scripts.pages import table
from train import Config

SHAPES = {
    "7b": ModelConfig(),
    "13b": ModelConfig(dim=5120, layers=40, heads=40, kv_heads=40, ffn=13824),
    "70b": ModelConfig(dim=8192, layers=80, heads=64, kv_heads=8, ffn=28672),
}
# The machine's knobs: for 7b and 13b on 8 GPUs of 80 GiB, 70b on 64. The method's knobs are the
# paper's already, as Config's defaults.
PRESETS = {
    "7b": "--micro-tokens 8192",
    "13b": "--micro-tokens 8192 --activation-checkpointing",
    "70b": "--micro-tokens 8192 --activation-checkpointing --tp 8",
}
GPUS_A_MACHINE = 8
GiB = 1 << 30
RESERVE = 3 * GiB  # a GPU's, for the driver, buffers of collectives, gaps between tensors
BANDWIDTH = 2e12  # bytes a second that a GPU reads while it samples: 60 % of an H100's
PARTS = (  # of a GPU's memory, as they are printed
    "weights",
    "optimizer",
    "gathered",
    "gradients",
    "gradients in flight",
    "activations",
    "KV cache",
    "prefill",
    "logits",
    "reserve",
)
CHAT_TOKENS = 10  # of the chat format around a prompt and its response
PAPER_ROWS, PAPER_TOKENS = 3200, 315  # IFT: 148 + 1,072 characters a row (Li et al. 2023)


class Machine(NamedTuple):
    gpus: int
    gpu_memory: float  # GiB of a GPU
    rate: float  # TFLOP/s that a GPU sustains where it trains or reads


class SeedRows(NamedTuple):
    """Tokens of the data folder's rows, and what is to be said of them."""

    ift: list[int]
    eft: list[int]
    replies: list[int]  # judge prompts of the ranked replies of which the run makes EFT rows
    template: int  # the judge prompt around an empty prompt and response
    assumed: bool  # without ift.jsonl: all of it
    remarks: list[str]


class SamplingStage(NamedTuple):
    """Samples of one kind, such as judgements, side by side in the slots of sample.Scheduler."""

    slots: int
    wanted: int  # by --sample-batch; memory may hold fewer
    memory: dict[str, float]  # bytes a GPU by part


class Work(NamedTuple):
    """Tokens that one model of the run takes."""

    trained: int
    read: int = 0  # without a backward pass
    responses: int = 0  # tokens sampled, as the others at most
    judgements: int = 0

    @property
    def sampled(self) -> int:
        return self.responses + self.judgements


def main(argv: list[str] | None = None):
    args, train_flags = parse_args(argv)
    machine = Machine(args.gpus, args.gpu_memory, args.rate)
    cfg, shape, tok = read_model(args.model, train_flags)
    check_machine(cfg, shape, machine, args.model)
    rows = read_seed_rows(cfg, shape, tok)
    stages = sampling_stages(cfg, shape, machine, rows)
    memory = {
        "SFT": sft_memory(cfg, shape, machine.gpus, rows),
        "DPO": dpo_memory(cfg, shape, machine.gpus),
        **{name: stage.memory for name, stage in stages.items()},
    }
    print_rows(cfg, rows, tok)
    print_memory(cfg, machine, memory, stages)
    print_work(cfg, shape, machine, workload(cfg, shape, rows), stages)
    print_disk(cfg, shape)
    check_fit(cfg, machine, memory)
    print("\nThe command, where words in capitals are yours to fill in:")
    print(start_command(cfg, machine, stages, rows))


# ---- the model and its knobs -----------------------------------------------------------------


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and the rest, which are train.py's."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.plan",
        description="What a run needs of memory, time and disk, before anything starts.",
        epilog="All other flags are train.py's.",
        allow_abbrev=False,
    )
    parser.add_argument("model", help="7b, 13b, 70b (Llama 2) or a model folder; comes first")
    parser.add_argument("--gpus", type=int, default=8, help="of all machines (8)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GiB of a GPU (80)")
    parser.add_argument(
        "--rate", type=float, default=200.0, help="TFLOP/s a GPU sustains in training (200)"
    )
    return parser.parse_known_args(argv)


def read_model(name: str, train_flags: list[str]) -> tuple[Config, ModelConfig, Tokenizer | None]:
    """A size or a folder -> the run's knobs, the model's shape, the folder's tokenizer."""
    if name in SHAPES:
        init = f"LLAMA-2-{name.upper()}"  # a word to fill in
        size, shape, tok = name, SHAPES[name], None
    elif Path(name).is_dir():
        init = name
        shape, tok = read_shape(name)
        size = find_size(shape)
    else:
        raise UserError(f"{name}: no model folder and none of the sizes {', '.join(SHAPES)}")
    defaults = ["--init", init]
    if size:
        defaults += ["--data", "data/oasst", "--out", f"runs/{size}", *PRESETS[size].split()]
    cfg = train.parse_args(defaults + train_flags)
    if cfg.init != init:  # the flag was given
        shape, tok = read_shape(cfg.init)
    return cfg, shape, tok


def find_size(shape: ModelConfig) -> str | None:
    """The size of Llama 2 that a folder holds, whatever it says of its context."""
    for size, known in SHAPES.items():
        if (shape.dim, shape.layers) == (known.dim, known.layers):
            return size
    return None


def check_machine(cfg: Config, shape: ModelConfig, machine: Machine, name: str):
    if min(machine) <= 0:
        raise UserError("--gpus, --gpu-memory and --rate are more than 0")
    if machine.gpus % cfg.tp:
        raise UserError(f"--gpus {machine.gpus} is not a multiple of --tp {cfg.tp}: change one")
    check_tp(shape, cfg.tp, name)


# ---- the data folder's rows ------------------------------------------------------------------


def read_seed_rows(cfg: Config, shape: ModelConfig, tok: Tokenizer | None) -> SeedRows:
    """Tokens of every row that a model can be trained on; without ift.jsonl, of the paper's."""
    if Path(cfg.data).is_dir() and not (Path(cfg.data) / "ift.jsonl").exists():
        return assume_rows(cfg, shape, tok)
    data = train.read_data(cfg, Path(cfg.data))
    template = data.judge_template
    ift = [count_tokens(tok, row["prompt"], row["response"]) for row in data.ift]
    eft = []
    for row in data.eft:
        prompt = judge.judge_prompt(template, row["prompt"], row["response"])
        eft.append(count_tokens(tok, prompt, row["judgement"]))
    replies = []
    for row in judge.replies(data.eft_ranked):
        prompt = judge.judge_prompt(template, row["prompt"], row["response"])
        replies.append(count_tokens(tok, prompt))
    longest_judgement = limit_tokens(cfg.max_judgement, shape)
    replies = [n for n in replies if n + longest_judgement <= shape.max_len]
    remarks = []
    if replies:
        longest_first = sorted(replies, reverse=True)
        eft = [n + longest_judgement for n in longest_first[: cfg.eft_size]]
        remarks.append(f"eft: at most; SFT makes them of {len(replies):,} ranked replies")
    if not eft:
        reason = "--eft-size 0" if not cfg.eft_size else f"{cfg.data} has no EFT rows"
        remarks.append(f"M1 is trained on what SFT is trained on: {reason}")
    ift = [n for n in ift if n <= shape.max_len]
    eft = [n for n in eft if n <= shape.max_len]
    if not ift:
        raise UserError(f"{cfg.data}: no row of ift.jsonl fits the context of {shape.max_len}")
    return SeedRows(ift, eft, replies, count_tokens(tok, template), False, remarks)


def assume_rows(cfg: Config, shape: ModelConfig, tok: Tokenizer | None) -> SeedRows:
    """As many rows as in the paper, of its mean length."""
    path = Path(cfg.data) / "judge.txt"
    template = count_tokens(tok, judge.read_template(path))
    judged = template + PAPER_TOKENS
    eft_row = judged + limit_tokens(cfg.max_judgement, shape)
    remarks = [
        f"assumed, the paper's numbers: {cfg.data} has no ift.jsonl",
        "the longest of them is assumed to fill the context",
    ]
    if not cfg.eft_size:
        remarks.append("M1 is trained on what SFT is trained on: --eft-size 0")
    return SeedRows(
        ift=[PAPER_TOKENS] * PAPER_ROWS,
        eft=[eft_row] * cfg.eft_size,
        replies=[judged] * cfg.eft_size,
        template=template,
        assumed=True,
        remarks=remarks,
    )


def count_tokens(tok: Tokenizer | None, prompt: str, response: str | None = None) -> int:
    """Tokens of a chat; without a tokenizer a token is taken to have 4 characters."""
    if not tok:
        return len(prompt + (response or "")) // 4 + CHAT_TOKENS
    count = len(tok.chat(prompt))
    if response is not None:
        count += len(tok.response(response))
    return count


def limit_tokens(count: int, shape: ModelConfig) -> int:
    """As train.limit_tokens: at most half of the context."""
    return min(count, shape.max_len // 2)


# ---- memory ----------------------------------------------------------------------------------


@cache
def num_parameters(shape: ModelConfig) -> tuple[int, int]:
    """Of the whole model, and of one of its blocks."""
    with torch.device("meta"):
        model = Llama(shape)
    whole = sum(p.numel() for p in model.parameters())
    return whole, sum(p.numel() for p in model.layers[0].parameters())


def compute_bytes(cfg: Config) -> int:
    """Of a number in compute; master weights, gradients and AdamW's moments have 4."""
    return getattr(torch, cfg.dtype or "bfloat16").itemsize


def saved_for_backward(cfg: Config, shape: ModelConfig) -> int:
    """Bytes a token that one block keeps for its backward pass.

    Of both norms their input, the scaled and the weighted output, and dropout's mask; q, k and v
    with as many heads, and attention's output twice; four vectors of the MLP. tp cuts what lies
    between column- and row-parallel layers.
    """
    b = compute_bytes(cfg)
    mask = 1 if cfg.dropout else 0
    norms = 2 * (4 + 2 * b + mask) * shape.dim
    inside = b * (5 * shape.dim + 4 * shape.ffn)
    return norms + inside // cfg.tp


def in_work(cfg: Config, shape: ModelConfig) -> int:
    """Bytes a token that pass through a block while it is at work."""
    return compute_bytes(cfg) * (4 * shape.dim + 3 * shape.ffn // cfg.tp)


def sft_memory(cfg: Config, shape: ModelConfig, gpus: int, rows: SeedRows) -> dict[str, float]:
    sizes = rows.ift + rows.eft
    if rows.assumed:
        sizes = [shape.max_len] * cfg.batch
    return training_memory(cfg, shape, gpus, *tokens_at_once(cfg, gpus, sizes))


def dpo_memory(cfg: Config, shape: ModelConfig, gpus: int) -> dict[str, float]:
    prompt = limit_tokens(cfg.max_prompt, shape) + CHAT_TOKENS
    response = limit_tokens(cfg.max_response, shape)
    pair = prompt + 2 * response  # the prompt stands there once
    sizes = [pair] * cfg.batch
    return training_memory(cfg, shape, gpus, *tokens_at_once(cfg, gpus, sizes))


def tokens_at_once(cfg: Config, gpus: int, sizes: list[int]) -> tuple[int, bool]:
    """Most tokens that a GPU puts through the model at once, and whether an update takes several
    such micro-batches (train.my_micro_batches). A process has at most as many tokens of a batch
    as its fair number of the longest rows."""
    rows_each = math.ceil(cfg.batch * cfg.tp / gpus)
    longest = sorted(sizes, reverse=True)[:rows_each]
    most = max(cfg.micro_tokens or train.DEFAULT_MICRO_TOKENS["cuda"], longest[0])
    return min(sum(longest), most), sum(longest) > most


def training_memory(
    cfg: Config,
    shape: ModelConfig,
    gpus: int,
    tokens: int,
    several: bool,
    targets: int | None = None,
) -> dict[str, float]:
    """Bytes a GPU by part in the worst moment of a step with `tokens` tokens at once.

    Memory peaks where backward is at the vocabulary projection, at the last block, or at the
    first block, when all gradients are there. With several micro-batches they always are.
    """
    n, block = num_parameters(shape)
    b = compute_bytes(cfg)
    saved, work = saved_for_backward(cfg, shape), in_work(cfg, shape)
    gradients = 4 * n / gpus
    early_gradients = gradients if several else 0.0
    if cfg.activation_checkpointing:
        all_blocks = shape.layers * b * shape.dim  # their inputs
        last_block = all_blocks + saved + work
    else:
        all_blocks = shape.layers * saved
        last_block = all_blocks + work
    num_logits = min(dpo.MAX_LOGITS, (targets or tokens) * shape.vocab_size)
    at_projection = {
        "gradients": early_gradients,
        "activations": tokens * all_blocks,
        "logits": num_logits * (8 + 2 * b) + tokens * (4 + 3 * b) * shape.dim,
    }
    at_last_block = {"gradients": early_gradients, "activations": tokens * last_block}
    at_first_block = {"gradients": gradients, "activations": tokens * (saved + work)}
    moments = (at_projection, at_last_block, at_first_block)
    worst = max(moments, key=lambda parts: sum(parts.values()))
    two_blocks_and_ends = n - (shape.layers - 2) * block  # embedding and head
    return {
        "weights": 4 * n / gpus,
        "optimizer": 8 * n / gpus,
        "gathered": b * two_blocks_and_ends / cfg.tp,
        "gradients in flight": 4 * block / cfg.tp,  # of a block, reduced in fp32
        **worst,
        "reserve": RESERVE,
    }


def sampling_stages(
    cfg: Config, shape: ModelConfig, machine: Machine, rows: SeedRows
) -> dict[str, SamplingStage]:
    prompt = limit_tokens(cfg.max_prompt, shape) + CHAT_TOKENS
    response = limit_tokens(cfg.max_response, shape)
    judgement = limit_tokens(cfg.max_judgement, shape)
    longest_reply = max(rows.replies, default=0) - rows.template
    room = max(1, shape.max_len - judgement - rows.template)
    judged = min(max(prompt + response, longest_reply), room)
    return {
        "responses": sampling_stage(cfg, shape, machine, cfg.candidates, prompt, response),
        "judgements": sampling_stage(
            cfg, shape, machine, cfg.votes, judged, judgement, rows.template
        ),
    }


def sampling_stage(
    cfg: Config,
    shape: ModelConfig,
    machine: Machine,
    num_samples: int,
    longest: int,
    max_new: int,
    prefix: int = 0,
) -> SamplingStage:
    """Samples that are held side by side: --sample-batch, or fewer where their keys and values
    would take more than half of the free memory (sample.affordable)."""
    n, _ = num_parameters(shape)
    memory = {
        "weights": 4 * n / machine.gpus,
        "gathered": compute_bytes(cfg) * n / cfg.tp,
        "reserve": RESERVE,
    }
    free = machine.gpu_memory * GiB - sum(memory.values())
    width = partial(sample.cache_width, compiled=True)  # as on a GPU
    group_tokens = width(longest + max_new)
    if num_samples > 1:  # then they share their prompt's keys
        group_tokens = num_samples * width(max_new) + width(longest)
    group_bytes = group_tokens * cache_bytes(cfg, shape)
    wanted = max(1, cfg.sample_batch // num_samples)
    groups = max(1, min(wanted, int(free / 2 / group_bytes)))
    slots = groups * num_samples
    memory["KV cache"] = groups * group_bytes + prefix * cache_bytes(cfg, shape)
    prompts_at_once = max(1, sample.PREFILL_TOKENS_GPU // longest)
    memory["prefill"] = prefill_memory(cfg, shape, min(prompts_at_once, groups), longest, prefix)
    memory["logits"] = slots * shape.vocab_size * 48  # twice; softmax, sort and sums of it
    return SamplingStage(slots, wanted * num_samples, memory)


def cache_bytes(cfg: Config, shape: ModelConfig) -> int:
    """Of a token's keys and values."""
    numbers = 2 * shape.layers * shape.kv_heads * shape.head_dim
    return compute_bytes(cfg) * numbers // cfg.tp


def prefill_memory(
    cfg: Config, shape: ModelConfig, prompts: int, length: int, prefix: int
) -> float:
    """Bytes a GPU while prompts are read behind a common prefix: a block's activations, keys and
    values of all layers before they move to the cache, those of one layer for all heads."""
    tokens = prompts * length
    seen = prompts * (prefix + length)
    repeated = 2 * compute_bytes(cfg) * shape.dim // cfg.tp
    return tokens * (in_work(cfg, shape) + cache_bytes(cfg, shape)) + seen * repeated


def check_fit(cfg: Config, machine: Machine, memory: dict[str, dict]):
    """UserError, with the remedy, where a moment does not fit."""
    for moment, parts in memory.items():
        needs = sum(parts.values()) / GiB
        if needs <= machine.gpu_memory:
            continue
        remedies = ["a larger --tp", "more --gpus"]
        if moment in ("SFT", "DPO"):
            if not cfg.activation_checkpointing:
                remedies.append("--activation-checkpointing")
            remedies.append("a smaller --micro-tokens")
        raise UserError(
            f"{moment} needs {needs:.1f} GiB of {machine.gpu_memory:g} a GPU: "
            f"try {', '.join(remedies)}"
        )


# ---- tokens, hours, disk ---------------------------------------------------------------------


def workload(cfg: Config, shape: ModelConfig, rows: SeedRows) -> dict[str, Work]:
    """Model -> the tokens that it takes."""
    judgement = limit_tokens(cfg.max_judgement, shape)
    ift, eft = sum(rows.ift), sum(rows.eft)
    work = {"SFT": Work(trained=cfg.sft_epochs * ift)}
    work["M1"] = Work(
        trained=cfg.sft_epochs * (ift + eft),
        read=sum(rows.replies),
        judgements=len(rows.replies) * cfg.votes * judgement,
    )
    for number in range(2, cfg.iters + 1):
        work[f"M{number}"] = round_work(cfg, shape, rows, prompts_of_round(cfg, number))
    return work


def prompts_of_round(cfg: Config, number: int) -> int:
    """New prompts of the round that makes M2, M3 and so on."""
    counts = [int(n) for n in cfg.prompts.split(",")]
    return counts[min(number - 1, len(counts)) - 1]


def round_work(cfg: Config, shape: ModelConfig, rows: SeedRows, num_prompts: int) -> Work:
    new_prompt = limit_tokens(cfg.max_prompt, shape)
    response = limit_tokens(cfg.max_response, shape)
    judgement = limit_tokens(cfg.max_judgement, shape)
    prompt = new_prompt + CHAT_TOKENS
    judged = min(rows.template + prompt + response, shape.max_len - judgement)
    pair = prompt + 2 * response
    num_responses = num_prompts * cfg.candidates
    reference = num_prompts * pair  # M_t reads all pairs for the reference's columns
    return Work(
        trained=cfg.dpo_epochs * num_prompts * pair,
        read=num_prompts * prompt + num_responses * judged + reference,
        responses=num_prompts * new_prompt + num_responses * response,
        judgements=num_responses * cfg.votes * judgement,
    )


def hours(
    cfg: Config, shape: ModelConfig, machine: Machine, work: Work, stages: dict[str, SamplingStage]
) -> float:
    """Training takes 6 operations a parameter and token, 8 with activation checkpointing, reading
    2 (Kaplan et al. 2020, section 2.1). A decode step, a token of every slot, takes the time to
    read the weights and half of a full cache."""
    n, _ = num_parameters(shape)
    operations = 8 if cfg.activation_checkpointing else 6
    products = (operations * work.trained + 2 * work.read) * n
    seconds = products / (machine.gpus * machine.rate * 1e12)
    for name, tokens in (("responses", work.responses), ("judgements", work.judgements)):
        stage = stages[name]
        step = (stage.memory["gathered"] + stage.memory["KV cache"] / 2) / BANDWIDTH
        side_by_side = stage.slots * machine.gpus // cfg.tp
        seconds += tokens / side_by_side * step
    return seconds / 3600


def disk_bytes(cfg: Config, shape: ModelConfig) -> dict[str, int]:
    """What the run folder holds at most, rows and judgements apart."""
    n, _ = num_parameters(shape)
    sizes = {f"{cfg.iters + 1} models in fp32": (cfg.iters + 1) * 4 * n}
    kept_models = 0
    for number in range(2, cfg.iters + 1):
        steps = cfg.dpo_epochs * math.ceil(prompts_of_round(cfg, number) / cfg.batch)
        kept_models += steps // cfg.keep_every if cfg.keep_every else 0
    if kept_models:
        sizes[f"{kept_models} kept by --keep-every"] = kept_models * 4 * n
    sizes["2 training states (the last, and one being saved)"] = 2 * 12 * n
    return sizes


# ---- what is printed -------------------------------------------------------------------------


def print_rows(cfg: Config, rows: SeedRows, tok: Tokenizer | None):
    for name, sizes in (("ift", rows.ift), ("eft", rows.eft)):
        if sizes:
            assumed = "assumed " if rows.assumed else ""
            mean = sum(sizes) // len(sizes)
            print(f"{name}: {assumed}{len(sizes):,} rows of {mean:,} tokens")
    remarks = list(rows.remarks)
    if not tok:
        remarks.append("a token is taken to have 4 characters: give a folder to count them")
    for remark in remarks:
        print(f"  ({remark})")


def print_memory(
    cfg: Config, machine: Machine, memory: dict[str, dict], stages: dict[str, SamplingStage]
):
    """GiB a GPU: a column for each moment, a line for each part that is there in any."""
    lines = []
    for part in PARTS:
        cells = [gib_or_none(parts.get(part, 0)) for parts in memory.values()]
        if any(cells):
            lines.append((part, *cells))
    lines.append(("together", *(gib_or_none(sum(parts.values())) for parts in memory.values())))
    title = f"GiB a GPU at most, of {machine.gpu_memory:g}, by part and moment"
    print(table(title, ["", *memory], lines, slots_note(cfg, stages)))


def gib_or_none(size: float) -> str | None:
    """None for what is not there, or too little to show."""
    text = f"{size / GiB:.1f}"
    return None if text == "0.0" else text


def slots_note(cfg: Config, stages: dict[str, SamplingStage]) -> str:
    slots = " and ".join(f"{stage.slots} {name}" for name, stage in stages.items())
    place = "on each GPU" if cfg.tp == 1 else f"in each group of {cfg.tp} GPUs"
    note = f"{slots} are sampled side by side {place}"
    if any(stage.slots < stage.wanted for stage in stages.values()):
        note += f"; memory holds no more (--sample-batch is {cfg.sample_batch})"
    return note + "."


def print_work(
    cfg: Config,
    shape: ModelConfig,
    machine: Machine,
    work: dict[str, Work],
    stages: dict[str, SamplingStage],
):
    total = 0.0
    lines = []
    for name, w in work.items():
        model_hours = hours(cfg, shape, machine, w, stages)
        total += model_hours
        tokens = [f"{count:,}" if count else None for count in (w.trained, w.sampled, w.read)]
        lines.append((name, *tokens, model_hours))
    title = f"tokens at most, and hours with --gpus {machine.gpus}: {total:.1f} in all"
    note = (
        f"Hours are for {machine.rate:g} TFLOP/s a GPU where it trains or reads, and "
        f"{BANDWIDTH / 1e12:g} TB/s where it samples. Bandwidth alone is short: a decode step "
        "also waits for the launch of its kernels, so sampling takes longer, with few samples "
        "side by side several times as long."
    )
    print(table(title, ["", "trained", "sampled", "read", "hours"], lines, note))


def print_disk(cfg: Config, shape: ModelConfig):
    sizes = disk_bytes(cfg, shape)
    parts = []
    for what, size in sizes.items():
        tenths = math.ceil(size / GiB * 10)  # never 0.0
        parts.append(f"{what} {tenths / 10:,.1f}")
    print(f"GiB of disk at most: {', '.join(parts)}")


def start_command(
    cfg: Config, machine: Machine, stages: dict[str, SamplingStage], rows: SeedRows
) -> str:
    """torchrun with all knobs that are not train.py's own defaults or the data folder's."""
    slots = max(stage.slots for stage in stages.values())
    cfg = replace(cfg, sample_batch=min(cfg.sample_batch, slots))
    defaults = replace(train.parse_args(["--data", cfg.data]), data=Config.data)
    if rows.assumed:
        cfg = replace(cfg, data="ROWS")
    words = ["torchrun", *torchrun_flags(machine.gpus), "train.py"]
    for field in fields(Config):
        value = getattr(cfg, field.name)
        if value == getattr(defaults, field.name):
            continue
        flag = field.name.replace("_", "-")
        if field.type is bool:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def torchrun_flags(gpus: int) -> list[str]:
    if gpus <= GPUS_A_MACHINE or gpus % GPUS_A_MACHINE:
        return ["--nproc-per-node", str(gpus)]
    nodes = ["--nnodes", str(gpus // GPUS_A_MACHINE), "--nproc-per-node", str(GPUS_A_MACHINE)]
    return [*nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", "FIRST:29500"]


if __name__ == "__main__":
    sample.run_command(main)
