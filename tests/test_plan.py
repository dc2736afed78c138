"""scripts/plan.py against counts by hand, torch's own memory tracker, and what a run does."""

import json
import os
import random
import re
import shlex
import subprocess
import sys
import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from bench_memory import CONFIGS
from conftest import ROOT, random_net

import dpo
import judge
import model
import sample
import train
from model import UserError
from sample import read_jsonl
from scripts import plan
from scripts.plan import SHAPES, GiB, Machine

TOY = CONFIGS["toy"]  # counted by hand
ATTENTION, MLP = 2 * 160 * 160 + 2 * 80 * 160, 3 * 160 * 432
EMBEDDINGS = 2 * 1024 * 160  # and the head
MATRICES = EMBEDDINGS + 4 * (ATTENTION + MLP)
NORMS = 9 * 160
BLOCK = ATTENTION + MLP + 2 * 160
BY_SIZE = {"7b": 8, "13b": 8, "70b": 64}  # GPUs of 80 GiB
JUDGE = "Grade this.\nQuestion: {prompt}\nAnswer: {response}\nEnd with Score: <n>\n"
PROPOSE = "Question: {1}\nQuestion: {2}\nQuestion:"


def data_folder(folder, **files):
    """A data folder with both templates and the given rows: ift=[...] becomes ift.jsonl."""
    folder.mkdir()
    (folder / "judge.txt").write_text(JUDGE)
    (folder / "propose.txt").write_text(PROPOSE)
    for name, rows in files.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return folder


ONE_ROW = [{"prompt": "a", "response": "b"}]


def seed_rows(ift, eft):
    return plan.SeedRows(ift, eft, replies=[], template=0, assumed=False, remarks=[])


def total(parts):
    return sum(parts.values())


def printed(capsys, *argv):
    plan.main([str(arg) for arg in argv])
    return capsys.readouterr().out


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, count", [("7b", 6_738_415_616), ("13b", 13_015_864_320), ("70b", 68_976_648_192)]
)
def test_the_named_sizes_have_the_published_number_of_parameters(name, count):
    assert plan.num_parameters(SHAPES[name])[0] == count


def test_training_memory_of_the_toy_by_hand():
    n = MATRICES + NORMS
    assert plan.num_parameters(TOY) == (n, BLOCK)
    cfg = train.Config(dropout=0.0)
    # so few tokens that the end of backward is no worse than its beginning
    parts = plan.training_memory(cfg, TOY, gpus=4, tokens=8, several=True)
    assert parts["weights"] == n  # 4 bytes, a quarter of them
    assert parts["optimizer"] == 2 * n
    assert parts["gradients"] == n
    assert parts["gathered"] == 2 * (2 * BLOCK + EMBEDDINGS + 160)
    assert parts["gradients in flight"] == 4 * BLOCK
    in_norms = 2 * 8 * 160  # bytes of a token in a block
    in_products = 2 * (5 * 160 + 4 * 432)
    assert parts["activations"] == 8 * 4 * (in_norms + in_products)
    in_logits = 1024 * 12
    in_hidden = 10 * 160
    assert parts["logits"] == 8 * (in_logits + in_hidden)
    cfg = train.Config(dropout=0.1)
    with_dropout = plan.training_memory(cfg, TOY, gpus=4, tokens=8, several=True)
    masks = with_dropout["activations"] - parts["activations"]
    assert masks == 8 * 4 * 2 * 160


def test_sampling_memory_of_the_toy_by_hand():
    cfg = train.Config(tp=2, sample_batch=13)
    machine = Machine(gpus=4, gpu_memory=80.0, rate=200.0)
    stage = plan.sampling_stage(cfg, TOY, machine, num_samples=4, longest=30, max_new=50)
    assert stage.slots == stage.wanted == 12  # three prompts, four samples of each
    assert stage.memory["weights"] == MATRICES + NORMS  # 4 bytes, a quarter of them
    assert stage.memory["gathered"] == MATRICES + NORMS  # 2 bytes, a half
    token = 2 * 4 * 1 * 40 * 2  # keys and values, layers, heads, head size, bytes
    assert plan.cache_bytes(cfg, TOY) == token
    assert stage.memory["KV cache"] == 3 * (4 * 128 + 128) * token


@pytest.mark.parametrize("n, longest, max_new", [(4, 130, 12), (3, 9, 300), (1, 120, 12)])
def test_as_many_samples_side_by_side_as_the_sampler_itself_allows(
    cfg, monkeypatch, n, longest, max_new
):
    net = random_net(cfg).to(torch.bfloat16)
    prompts = [[1 + i] * longest for i in range(70)]  # nothing in common
    keys = [(i,) for i in range(70)]
    weights, _ = plan.num_parameters(cfg)
    slots = []
    for free in (400_001, 900_001, 10**9):
        monkeypatch.setattr(sample, "free_memory", lambda device, free=free: free)
        monkeypatch.setattr(sample, "can_compile", lambda device: True)  # as on a GPU
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that memory holds no more
            scheduler = sample.Scheduler(net, prompts, keys, n, max_new, 64, int, True)
        memory = (free + plan.RESERVE + 6 * weights) / GiB
        stage = plan.sampling_stage(
            train.Config(sample_batch=64), cfg, Machine(1, memory, 1.0), n, longest, max_new
        )
        slots.append(stage.slots)
        assert stage.slots == len(scheduler.num_drawn)
    assert slots[0] < slots[1] < slots[2] == 64 // n * n


def test_memory_follows_rows_and_limits_and_not_the_context():
    rows = seed_rows(ift=[300] * 50, eft=[700] * 10)
    machine = Machine(8, 80.0, 200.0)
    cfg = train.Config(sample_batch=256)
    shape = SHAPES["7b"]
    wider = replace(shape, max_len=16384)
    sft, dpo_step = plan.sft_memory(cfg, shape, 8, rows), plan.dpo_memory(cfg, shape, 8)
    stages = plan.sampling_stages(cfg, shape, machine, rows)
    assert sft == plan.sft_memory(cfg, wider, 8, rows)
    assert dpo_step == plan.dpo_memory(cfg, wider, 8)
    assert stages == plan.sampling_stages(cfg, wider, machine, rows)

    twice_as_long = seed_rows(ift=[300] * 50, eft=[1400] * 10)
    longer = plan.sft_memory(cfg, shape, 8, twice_as_long)
    assert longer["activations"] == 2 * sft["activations"]
    cfg = replace(cfg, max_response=256)
    assert total(plan.dpo_memory(cfg, shape, 8)) < total(dpo_step)
    more = plan.sampling_stages(cfg, shape, machine, rows)["responses"].slots
    assert more > 3 * stages["responses"].slots


def test_tokens_at_once_are_never_fewer_than_a_process_has_in_a_micro_batch():
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.randrange(1, 2000) for _ in range(40)]
        world = rng.choice((1, 2, 3, 8))
        batch = rng.choice((1, 7, 16))
        most_tokens = rng.choice((1, 3000, 9999))
        cfg = train.Config(batch=batch, micro_tokens=most_tokens)
        most, several = plan.tokens_at_once(cfg, world, sizes)
        rows = rng.sample(range(40), batch)
        sizes_of_rows = {i: sizes[i] for i in rows}
        for rank in range(world):
            micro_batches = dpo.micro_batches(sizes_of_rows, most_tokens, rank, world)
            for rows_at_once, _ in micro_batches:
                assert sum(sizes[i] for i in rows_at_once) <= most
            assert several or len(micro_batches) == 1


# ---- torch's own memory tracker -----------------------------------------------------------------

ROWS, LENGTH = 16, 512
BENCHES = {"plain": [], "checkpointing": ["--activation-checkpointing", "--cases", "sft,dpo"]}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Bench -> case -> bytes by part: the toy on four fake processes, two of which share every
    matrix."""
    folder = tmp_path_factory.mktemp("bench")
    processes = {}
    for name, flags in BENCHES.items():
        argv = ["--config", "toy", "--gpus", 4, "--tp", 2, "--rows", ROWS, "--length", LENGTH]
        argv += [*flags, "--json", folder / name]
        command = [sys.executable, ROOT / "tests" / "bench_memory.py", *map(str, argv)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        processes[name] = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    assert [process.wait(120) for process in processes.values()] == [0, 0]
    results = {}
    for name in BENCHES:
        cases = json.loads((folder / name).read_text())
        results[name] = {case["case"]: case["bytes"] for case in cases}
    return results


def test_the_memory_bench_finds_the_parts_that_can_be_counted_by_hand(tracked):
    """A process has half of half of every matrix, and half of the norms."""
    cases = tracked["plain"]
    shards = MATRICES // 4 + NORMS // 2
    for parts in cases.values():
        assert parts["weights"] == 4 * shards
        assert total(parts) == 2 * parts["total"]
    sft, sampling = cases["sft"], cases["sample"]
    assert sft["optimizer"] == pytest.approx(8 * shards, rel=1e-3)
    assert sft.get("gradients", 0) <= 4 * shards
    assert sampling["gathered"] == 2 * (MATRICES // 2 + NORMS)
    token = 2 * 4 * 1 * 40 * 2  # keys and values, layers, heads, head size, bytes
    assert sampling["KV cache"] == ROWS * LENGTH * token
    assert sampling["activations"] >= 0
    fewer = tracked["checkpointing"]["sft"]
    assert fewer["activations"] < 0.7 * sft["activations"]


@pytest.mark.parametrize("name", BENCHES)
def test_training_memory_is_what_torchs_tracker_finds(tracked, name):
    cfg = train.Config(tp=2, dropout=0.0, activation_checkpointing=name == "checkpointing")
    for case, responses in (("sft", 1), ("dpo", 2)):
        tokens = ROWS * (LENGTH // 2) * (1 + responses)  # prompt and responses have half each
        targets = ROWS * (LENGTH // 2) * responses
        parts = plan.training_memory(cfg, TOY, 4, tokens, False, targets)
        planned = total(parts) - plan.RESERVE
        assert planned == pytest.approx(tracked[name][case]["total"], rel=0.1), case


def test_sampling_memory_is_what_torchs_tracker_finds(tracked):
    cfg = train.Config(tp=2, sample_batch=ROWS)
    machine = Machine(4, 80.0, 1.0)
    half = LENGTH // 2
    stage = plan.sampling_stage(cfg, TOY, machine, num_samples=1, longest=half, max_new=half)
    found = tracked["plain"]["sample"]
    assert stage.memory["KV cache"] == found["KV cache"]
    assert stage.memory["gathered"] == pytest.approx(found["gathered"], rel=0.01)
    activations = stage.memory["prefill"] + stage.memory["logits"]
    assert found["activations"] < activations < 3 * found["activations"]


# ---- what is printed ----------------------------------------------------------------------------

PAPER = {  # section 3.1
    "sft_lr": 5.5e-6,
    "dpo_lr": 1e-6,
    "batch": 16,
    "dropout": 0.1,
    "beta": 0.1,
    "temperature": 0.7,
    "top_p": 0.9,
    "candidates": 4,
    "votes": 3,
}


@pytest.mark.parametrize("size", plan.PRESETS)
def test_presets_fit_with_the_papers_knobs_and_flags_override_them(size, tmp_path, capsys):
    folder = data_folder(tmp_path / "data")
    (folder / "recipe.json").write_text('{"micro_tokens": 3, "tp": 4, "max_response": 99}')
    cfg, shape, tok = plan.read_model(size, ["--data", str(folder)])
    assert {knob: getattr(cfg, knob) for knob in PAPER} == PAPER
    assert shape == SHAPES[size] and tok is None
    assert cfg.max_response == 99 and cfg.micro_tokens == 8192
    cfg, _, _ = plan.read_model(size, ["--data", str(folder), "--micro-tokens", "7"])
    assert cfg.micro_tokens == 7 and cfg.max_response == 99
    text = printed(capsys, size, "--gpus", BY_SIZE[size])
    totals = re.search("together(.*)", text)[1].split()
    assert len(totals) == 4 and all(20 < float(gib) < 80 for gib in totals)
    assert "launch of its kernels" in text and "4 models in fp32" in text


def test_the_command_that_is_printed_has_the_knobs_of_the_preset_and_of_the_flags(capsys):
    text = printed(capsys, "13b", "--gpus", 16, "--iters", 2, "--data", "data/oasst")
    command = shlex.split(text.splitlines()[-1])
    start = command.index("train.py")
    assert command[:5] == ["torchrun", "--nnodes", "2", "--nproc-per-node", "8"]
    cfg = train.parse_args(command[start + 1 :])
    assert cfg.init == "LLAMA-2-13B" and cfg.data == "ROWS"
    assert cfg.out == "runs/13b" and cfg.iters == 2
    assert cfg.activation_checkpointing and cfg.micro_tokens == 8192
    slots = max(map(int, re.search(r"(\d+) responses and (\d+) judgements", text).groups()))
    assert cfg.sample_batch == min(128, slots) and "memory holds no more" in text


def test_a_folder_of_a_known_size_brings_its_knobs_and_another_none(tmp_path, net, tok, capsys):
    model.save(net, tok, tmp_path / "small")
    data = data_folder(tmp_path / "rows", ift=ONE_ROW)
    flags = ["--data", data, "--out", "runs/it", "--no-activation-checkpointing"]
    text = printed(capsys, tmp_path / "small", *flags)
    assert text.splitlines()[-1] == (
        f"torchrun --nproc-per-node 8 train.py --init {tmp_path}/small --data {data} --out runs/it"
    )
    assert "characters" not in text  # its tokenizer counts
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    config |= {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}
    config |= {"num_key_value_heads": 8, "intermediate_size": 28672}
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    cfg = plan.read_model(str(tmp_path / "small"), [])[0]
    assert cfg.tp == 8 and cfg.activation_checkpointing and cfg.data == "data/oasst"


def test_what_is_assumed_is_said_and_parts_that_are_not_there_are_not_printed(tmp_path, capsys):
    text = printed(capsys, "7b", "--data", data_folder(tmp_path / "rows"))
    assert "ift: assumed 3,200 rows of 315 tokens" in text
    assert f"assumed, the paper's numbers: {tmp_path}/rows has no ift.jsonl" in text
    assert re.search(r"eft: assumed 1,630 rows of \d+ tokens", text)
    assert " 0.0 " not in text
    trained = dict(re.findall(r"^  (SFT|M1) +([\d,]+)", text, re.MULTILINE))
    assert trained["SFT"] == "3,024,000" != trained["M1"]
    text = printed(capsys, "7b", "--data", tmp_path / "rows", "--eft-size", 0)
    assert "M1 is trained on what SFT is trained on: --eft-size 0" in text


def test_equal_tokens_of_sft_and_m1_are_explained(tmp_path, capsys):
    data = data_folder(tmp_path / "rows", ift=ONE_ROW)
    text = printed(capsys, "7b", "--data", data)
    assert f"M1 is trained on what SFT is trained on: {data} has no EFT rows" in text
    assert "assumed" not in text and "ift: 1 rows" in text


def test_no_more_eft_rows_are_expected_than_people_have_ranked_replies(tmp_path, capsys):
    ranked = {"prompt": "a", "responses": ["b", "c", "d"], "ranks": [0, 1, 2]}
    data = data_folder(tmp_path / "rows", ift=ONE_ROW, eft_ranked=[ranked] * 5)
    text = printed(capsys, "7b", "--data", data)
    assert re.search(r"eft: 15 rows of 2\d\d tokens", text)
    assert "at most; SFT makes them of 15 ranked replies" in text
    text = printed(capsys, "7b", "--data", data, "--eft-size", 4)
    assert re.search(r"eft: 4 rows of 2\d\d tokens", text)


def test_rows_and_replies_that_exceed_the_context_do_not_count(tmp_path, cfg, net, tok):
    long_row = {"prompt": "a", "response": "b" * 3000}
    ranked = {"prompt": "a", "responses": ["b", "c" * 3000], "ranks": [0, 1]}
    data = data_folder(tmp_path / "rows", ift=[*ONE_ROW, long_row], eft_ranked=[ranked])
    rows = plan.read_seed_rows(train.Config(data=str(data)), cfg, tok)
    judged = tok.chat(judge.judge_prompt(JUDGE, "a", "b"))
    assert len(rows.ift) == 1
    assert rows.replies == [len(judged)]
    assert rows.eft == [len(judged) + 256]


def test_a_context_that_no_row_fits_is_said_so(tmp_path, cfg, tok):
    data = data_folder(tmp_path / "rows", ift=[{"prompt": "a", "response": "b" * 3000}])
    with pytest.raises(UserError, match="no row of ift.jsonl fits the context of 512"):
        plan.read_seed_rows(train.Config(data=str(data)), cfg, tok)


def test_keep_every_adds_the_models_that_it_keeps():
    cfg = train.Config(keep_every=100, prompts="5000,9000", dpo_epochs=1)
    sizes = plan.disk_bytes(cfg, TOY)
    n, _ = plan.num_parameters(TOY)
    assert sizes["8 kept by --keep-every"] == 8 * 4 * n  # 313 and 563 steps
    assert len(plan.disk_bytes(train.Config(), TOY)) == 2


def test_hours_of_the_toy_by_hand():
    n, _ = plan.num_parameters(TOY)
    machine = Machine(gpus=2, gpu_memory=80.0, rate=3.0)
    memory = {"gathered": 8e12, "KV cache": 4e12}
    stages = {
        "responses": plan.SamplingStage(10, 10, memory),
        "judgements": plan.SamplingStage(5, 5, memory),
    }
    work = plan.Work(trained=7_000_000, read=3_000_000, responses=100, judgements=200)
    operations = (6 * 7_000_000 + 2 * 3_000_000) * n
    steps = 100 / 20 + 200 / 10  # of decoding, on two GPUs
    seconds = operations / 6e12 + steps * 5  # a step reads 10 TB, at 2 TB a second
    assert plan.hours(train.Config(), TOY, machine, work, stages) == seconds / 3600


# ---- a run --------------------------------------------------------------------------------------

RECIPE = {
    "prompts": "9,7",
    "max_prompt": 24,
    "rouge": 0.95,
    "candidates": 3,
    "votes": 2,
    "max_response": 12,
    "max_judgement": 24,
    "sft_lr": 1e-4,
    "batch": 5,
    "dropout": 0.0,
    "eft_size": 8,
}


def scripted_generate(tok):
    """In place of sample.generate: texts that the limits allow and the parser reads."""
    counter = iter(range(10**6))

    def generate(net, prompts, keys, *, max_new, n=1, stop, callback=None, **_):
        samples = []
        for key in keys:
            ids = [tok.encode(text_for(key, next(counter))) for _ in range(n)]
            samples.append([[*text[: max_new - 1], tok.eos] for text in ids])
        return samples

    return generate


def text_for(key, number):
    if "responses" in key:
        return f"The {number}."
    if "judgements" in key or "eft" in key:
        return f"Good.\nScore: {number % 6}"
    return f"What is {number * 7919 % 10007} and why?"  # a new prompt


@pytest.fixture(scope="module")
def run(tmp_path_factory, tok, cfg):
    """A real run of train.py, in which only sampling is scripted."""
    folder = tmp_path_factory.mktemp("run")
    words = "owl cat fox bee ant bat cow dog hen pig".split()
    ift, ranked = [], []
    people = {"responses": ["No.", "It is.", "Yes, it is."], "ranks": [0, 1, 2]}
    for word in words:
        ift.append({"prompt": f"Where is the {word}?", "response": f"It is {word}."})
        ranked.append({"prompt": f"Is the {word} red?", **people})
    data = data_folder(folder / "data", ift=ift, eft_ranked=ranked)
    (data / "recipe.json").write_text(json.dumps(RECIPE))
    model.save(random_net(cfg), tok, folder / "base")
    flags = ["--init", folder / "base", "--data", data, "--out", folder / "out"]
    flags = [str(flag) for flag in flags]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sample, "generate", scripted_generate(tok))
        m.setattr(judge, "generate", scripted_generate(tok))
        train.main(train.parse_args(flags))
    dist.destroy_process_group()
    return folder / "out", flags


def trained_tokens(folder):
    """Model -> tokens that went through it in training."""
    tokens = Counter()
    for line in read_jsonl(folder / "metrics.jsonl"):
        tokens[line["model"]] += line["tokens"]
    return tokens


def test_the_plan_bounds_what_a_real_run_does(run, cfg, tok):
    folder, flags = run
    knobs = train.parse_args(flags)
    rows = plan.read_seed_rows(knobs, cfg, tok)
    work = plan.workload(knobs, cfg, rows)
    tokens = trained_tokens(folder)
    last_tokens = knobs.sft_epochs * len(rows.ift)  # a row's last token is not read
    assert work["SFT"].trained == tokens["SFT"] + last_tokens
    assert tokens["SFT"] < tokens["M1"] <= work["M1"].trained
    eft = read_jsonl(folder / "M1" / "eft.jsonl")
    assert len(eft) <= len(rows.eft) == knobs.eft_size
    eft_judgements = read_jsonl(folder / "M1" / "eft_judgements.jsonl")
    assert len(eft_judgements) == len(rows.replies) * knobs.votes
    assert work["M1"].judgements == len(eft_judgements) * knobs.max_judgement
    for name in ("M2", "M3"):
        prompts, candidates, judgements, pairs = (
            read_jsonl(folder / name / f"{file}.jsonl")
            for file in ("prompts", "candidates", "judgements", "pairs")
        )
        assert len(prompts) == plan.prompts_of_round(knobs, int(name[1:]))
        assert len(candidates) == len(prompts) * knobs.candidates
        prompt_tokens = len(prompts) * knobs.max_prompt
        response_tokens = len(candidates) * knobs.max_response
        assert work[name].responses == prompt_tokens + response_tokens
        assert sum(len(c["tokens"]) for c in candidates) <= response_tokens
        assert work[name].judgements == len(judgements) * knobs.max_judgement
        assert pairs and 0 < tokens[name] <= work[name].trained
    files = [folder / name / "model.safetensors" for name in work]
    saved = sum(file.stat().st_size for file in files)
    assert plan.disk_bytes(knobs, cfg)["4 models in fp32"] == pytest.approx(saved, rel=0.05)


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gpu-memory", 2], "SFT needs 3.0 GiB of 2 a GPU: try a larger --tp, more --gpus"),
        (["--gpus", 0], "more than 0"),
        (["--tp", 3, "--gpus", 3], "4 heads"),
        (["--tp", 2, "--gpus", 3], "--gpus 3 is not a multiple of --tp 2"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--votes", 0], "votes"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy_and_nothing_is_started_or_written(
    tmp_path, net, tok, monkeypatch, flags, words
):
    monkeypatch.setattr(dist, "init_process_group", None)
    model.save(net, tok, tmp_path / "base")
    data = data_folder(tmp_path / "rows", ift=ONE_ROW)
    before = sorted(tmp_path.rglob("*"))
    argv = [tmp_path / "base", "--data", data, "--out", tmp_path / "run", *flags]
    with pytest.raises(UserError, match=re.escape(words)):
        plan.main([str(arg) for arg in argv])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_size_that_does_not_fit_is_refused_by_the_command_in_one_line():
    command = [sys.executable, "-m", "scripts.plan", "7b", "--gpus", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    line = "error: SFT needs .* of 80 a GPU: .*--activation-checkpointing.*\n"
    assert re.fullmatch(line, done.stderr), done.stderr


def test_a_name_that_is_neither_a_size_nor_a_folder_is_refused():
    with pytest.raises(UserError, match="7B: no model folder and none of the sizes 7b, 13b, 70b"):
        plan.main(["7B"])
