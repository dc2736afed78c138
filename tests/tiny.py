"""tests/tiny.py: a world that trains in seconds, and processes that may be killed.

A 2-layer base that has read questions, answers and judgements; rows to learn from; whole runs of
train.py in this process (`run`) or in processes of their own (`start`). Those are forked from a
server that has imported train.py once: clean processes, without the seconds that importing torch
takes. They may be killed (`kill_at`), be several (`world_size`), or be watched (`trace`).
"""

import inspect
import json
import multiprocessing
import os
import random
import resource
import runpy
import signal
import socket
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import sentencepiece
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import judge
import model
import sample
import train
from dpo import collate, sft_loss
from model import Llama, ModelConfig, Tokenizer, UserError

ROOT = Path(__file__).resolve().parents[1]

# ---- a world ---------------------------------------------------------------------------------

ANIMALS = "owl cat fox bee ant bat cow dog hen pig rat elk".split()
VERBS = "eat see hear like want make".split()
TIMES = "night noon dawn home sea school".split()
JUDGE = "Grade this.\nQuestion: {prompt}\nAnswer: {response}\nEnd with Score: <n>\n"
PROPOSE = "Question: {1}\nQuestion: {2}\nQuestion: {3}\nQuestion:"
SHAPE = {"dim": 48, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 96, "max_len": 192}
RECIPE = {
    "prompts": "9,7",
    "max_prompt": 24,
    "rouge": 0.95,
    "candidates": 3,
    "votes": 2,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_response": 12,
    "max_judgement": 24,
    "sample_batch": 64,
    "sft_lr": 3e-3,
    "sft_epochs": 5,
    "dpo_lr": 1e-3,
    "dpo_epochs": 3,
    "batch": 5,
}


class World(NamedTuple):
    folder: Path
    data: Path
    base: Path


def make_world(folder: Path) -> World:
    """Data folder and base model, and what processes that tests start must find in the
    environment: the way to our modules, one thread."""
    torch.set_num_threads(1)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    os.environ["OMP_NUM_THREADS"] = "1"
    make_data(folder / "data")
    make_base(folder / "base")
    return World(folder, folder / "data", folder / "base")


def question(rng: random.Random) -> str:
    return f"What does the {rng.choice(ANIMALS)} {rng.choice(VERBS)} at {rng.choice(TIMES)}?"


def answer(rng: random.Random, prompt: str) -> str:
    animal, verb, time = (prompt.split()[i].strip("?") for i in (3, 4, 6))
    texts = [
        f"The {animal} can {verb} it at {time}.",
        f"At {time} a lot.",
        f"The {animal} is fine.",
        "It is so.",
    ]
    return rng.choice(texts)


def judgement(rng: random.Random) -> str:
    points = rng.randrange(6)
    word = ("bad", "bad", "poor", "poor", "fine", "good")[points]
    return f"It is {word}.\nScore: {points}"


def rankings(rng: random.Random, prompts: list[str]) -> list[dict]:
    """Three replies to each prompt, ranked in their order."""
    rows = []
    for prompt in prompts:
        responses = [answer(rng, prompt) + end for end in ("", " So.", "?")]
        rows.append({"prompt": prompt, "responses": responses, "ranks": [0, 1, 2]})
    return rows


def write_rows(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(folder: Path):
    rng = random.Random(0)
    prompts = list(dict.fromkeys(question(rng) for _ in range(60)))
    ift = [{"prompt": prompt, "response": answer(rng, prompt)} for prompt in prompts[:21]]
    folder.mkdir(parents=True)
    write_rows(folder / "ift.jsonl", ift)
    write_rows(folder / "eft.jsonl", [row | {"judgement": judgement(rng)} for row in ift])
    write_rows(folder / "eft_eval.jsonl", rankings(rng, prompts[26:29]))
    write_rows(folder / "test.jsonl", [{"prompt": prompt} for prompt in prompts[21:26]])
    (folder / "judge.txt").write_text(JUDGE)
    (folder / "propose.txt").write_text(PROPOSE)
    (folder / "recipe.json").write_text(json.dumps(RECIPE, indent=2))


def make_base(folder: Path, seed: int = 0, steps: int = 300) -> float:
    """A base that some steps of SFT make a judge; returns its loss a token."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    lists = ["".join(f"Question: {question(rng)}\n" for _ in range(4)) for _ in range(300)]
    chats = []
    for _ in range(300):
        prompt = question(rng)
        response = answer(rng, prompt)
        judge_prompt = judge.judge_prompt(JUDGE, prompt, response)
        chats += [(prompt, response), (judge_prompt, judgement(rng))]
    make_tokenizer(folder, lists[:100] + [f"[INST] {p} [/INST] {r}" for p, r in chats[:400]])
    tok = Tokenizer(folder / "tokenizer.model")
    texts = [tok.encode_with_bos(text) for text in lists]
    texts += [tok.chat(prompt) + tok.response(response) for prompt, response in chats]
    torch.manual_seed(seed)
    net = Llama(ModelConfig(vocab_size=tok.size, **SHAPE))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, betas=(0.9, 0.95))
    for step in range(steps):
        examples = [(ids[:1], ids[1:]) for ids in rng.sample(texts, 12)]
        tokens, targets, batch = collate(examples)
        loss = sft_loss(net, tokens, targets, batch)[0] / (targets >= 0).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 5e-3 * min((step + 1) / 20, 1 - 0.9 * step / steps)
        optimizer.step()
        optimizer.zero_grad()
    model.save(net, tok, folder)
    return loss.item()


def make_tokenizer(folder: Path, texts: list[str]):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
    )


# ---- runs in this world ----------------------------------------------------------------------


def flags_of(world: World, out: Path, *flags, data: Path | None = None) -> list[str]:
    """Flags of a run in this world."""
    places = ["--init", world.base, "--data", data or world.data, "--out", out]
    return [str(flag) for flag in (*places, *flags)]


def run(world: World, out: Path, *flags, data: Path | None = None) -> Path:
    """A whole run in this process; returns its folder."""
    try:
        train.main(train.parse_args(flags_of(world, out, *flags, data=data)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return out


def read_metrics(out: Path, model: str = "") -> list[dict]:
    """The whole lines of metrics.jsonl, of one model or of all, without the clock."""
    rows = []
    for line in (out / "metrics.jsonl").read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            del row["seconds"]
            rows.append(row)
    return [row for row in rows if model in ("", row["model"])]


def products(out: Path) -> dict[str, bytes]:
    """The files that a run has finished, by name, without what names the folder or the clock."""
    files = {}
    for path in out.rglob("*"):
        unfinished = path.suffix in (".tmp", ".part") or "checkpoint" in path.parts
        if path.is_file() and not unfinished and path.name != ".lock":
            files[str(path.relative_to(out))] = path.read_bytes()
    if "config.json" in files:
        config = json.loads(files["config.json"])
        knobs = {k: v for k, v in config.items() if k not in train.MUTABLE_FIELDS + ["data"]}
        files["config.json"] = repr(knobs).encode()
    if "metrics.jsonl" in files:
        files["metrics.jsonl"] = repr(read_metrics(out)).encode()
    return files


def assert_same(files: dict[str, bytes], others: dict[str, bytes]):
    """Two sets of files are equal, or the names of those that differ."""
    names = sorted({*files, *others})
    different = [name for name in names if files.get(name) != others.get(name)]
    assert not different, different


# ---- what may happen to a process ------------------------------------------------------------


class Kill(NamedTuple):
    """Where something happens to a process, of which `PLACES` has the kinds."""

    place: str
    what: str = ""  # model, or file as in M2/pairs.jsonl
    number: int = 0
    act: str = "die"
    rank: str = ""  # this one alone is hit; empty: all are


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk():
    """From here on no file may grow beyond what rows need: training states and weights do."""
    hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard_limit))


def fail():
    raise UserError("it is lost; find it")


ACTS = {
    "die": die,
    "fail": fail,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda: os.kill(os.getpid(), signal.SIGINT),
    "full": fill_disk,
}


def before(module, name: str, happen):
    """From here on happen(*args) is called before each module.name(*args)."""
    work = getattr(module, name)

    def wrapper(*args, **settings):
        happen(*args)
        return work(*args, **settings)

    setattr(module, name, wrapper)


def short_name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def append_half_a_line(path: Path):
    with path.open("a") as f:
        f.write('{"model": "M9", "fingerpr')


def at_step(kill: Kill, act):
    """Step `number` of training model `what` is taken; dying tears its line in metrics.jsonl."""

    def happen(run, name, step, *_):
        if (name, step) == (kill.what, kill.number):
            if kill.act == "die":
                append_half_a_line(run.folder / "metrics.jsonl")
            act()

    before(train, "log_step", happen)


def at_training_state(kill: Kill, act):
    """The training state of step `number` of model `what` is written, but not in its place."""

    def happen(path, value):
        is_state = path.name == "training.json"
        if is_state and (value["model"], value["step"]) == (kill.what, kill.number):
            act()

    before(train, "write_json", happen)


def at_saving(kill: Kill, act):
    """The weights of model `what` are there, its config.json is not."""

    def happen(cfg, tok, dtype, path):
        if path.parent.name == kill.what:
            act()

    before(model, "write_config", happen)


def at_part(kill: Kill, act):
    """Chunk `number` of the file `what` is done; dying tears its line."""
    chunks = count(1)

    def happen(path, part):
        if short_name(path) == kill.what and next(chunks) == kill.number:
            if kill.act == "die":
                path.parent.mkdir(exist_ok=True)
                append_half_a_line(path.with_name(path.name + ".part"))
            act()

    before(train, "append_part", happen)


def at_sampling(kill: Kill, act):
    """After `number` decode steps for the file `what`."""
    progress, steps = train.progress, count(1)

    @contextmanager
    def watched_progress(run, path, total, unit):
        with progress(run, path, total, unit) as callback:

            def watched_callback(tokens, ended):
                if short_name(path) == kill.what and next(steps) == kill.number:
                    act()
                callback(tokens, ended)

            yield watched_callback

    train.progress = watched_progress


def at_file(kill: Kill, act):
    """Half of the file `what` is written."""

    def happen(path, text):
        if short_name(path) == kill.what:
            path.with_name(path.name + ".tmp").write_text(text[: len(text) // 2])
            act()

    before(sample, "atomic_write", happen)


def at_reference(kill: Kill, act):
    """At forward pass `number` of the reference's log-probs."""
    calls = count(1)

    def happen(*_):
        if next(calls) == kill.number:
            act()

    before(train, "sequence_logps", happen)


def looks_late(kill: Kill, act):
    """Nothing happens, but this process looks `number` seconds late for the file `what`."""

    def happen(path):
        if path.name == kill.what:
            time.sleep(kill.number)

    before(Path, "exists", happen)


PLACES = {
    "step": at_step,
    "training state": at_training_state,
    "save": at_saving,
    "part": at_part,
    "sampling": at_sampling,
    "file": at_file,
    "reference": at_reference,
    "late": looks_late,
}


def kill_at(kill: Kill):
    """Arrange for something to happen to this process."""
    if kill.rank in ("", os.environ.get("RANK")):
        PLACES[kill.place](kill, ACTS[kill.act])


def trace(path: Path):
    """Have this file told of every chapter of main, and of every part of one (after a blank),
    when it begins: a time and a name."""

    def tell(name: str):
        with path.open("a") as f:
            f.write(f"{time.time()} {name}\n")

    def tell_chapter(chapter, run, *args):
        tell(" ".join([chapter, *(arg for arg in args if isinstance(arg, str))]))

    for name in train.main.__code__.co_names:
        work = getattr(train, name, None)
        if inspect.isfunction(work) and "run" in inspect.signature(work).parameters:
            before(train, name, partial(tell_chapter, name))
    before(train, "load_model", lambda *_: tell(" loads"))
    before(train, "train_model", lambda *_: tell(" trains"))
    before(train, "log_step", lambda run, name, step, *_: tell(f" step {step}"))
    before(train, "save_training_state", lambda *_: tell(" saves its training state"))
    before(train, "save_model", lambda *_: tell(" saves the model"))
    before(train, "pair_logps", lambda *_: tell(" log-probs of the reference"))
    before(train, "progress", lambda run, path, *_: tell(f" samples {path.name}"))
    before(train, "append_part", lambda path, _: tell(f" a part of {path.name}"))
    before(sample, "atomic_write", lambda path, _: tell(f" writes {path.name}"))


# ---- processes -------------------------------------------------------------------------------


class Result(NamedTuple):
    codes: list[int]  # exit code of each process
    out: str
    err: str

    @property
    def code(self) -> int | None:
        """The exit code where all have the same."""
        return self.codes[0] if len(set(self.codes)) == 1 else None


def start(
    argv: list,
    folder: Path,
    *,
    world_size: int = 1,
    kill: Kill | None = None,
    trace_file: Path | None = None,
    watch=None,
    timeout: float = 120,
) -> Result:
    """Run train.py with these flags as one process, or as those of torchrun; wait for the end.

    trace_file: what `trace` writes to, by the first process. watch: as in `together`. What they
    print goes to files in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    argv = list(map(str, argv))
    port = str(free_port())
    logs = [folder / f"rank{rank}" for rank in range(world_size)]
    arguments = []
    for rank, log in enumerate(logs):
        env = {"CUDA_VISIBLE_DEVICES": ""}
        if world_size > 1:
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        arguments.append((argv, log, env, kill, trace_file if rank == 0 else None))
    codes = together(train_in_process, arguments, timeout, watch)
    out = "".join(log.with_suffix(".out").read_text() for log in logs)
    err = "".join(log.with_suffix(".err").read_text() for log in logs)
    assert None not in codes, f"did not end in {timeout} s: {out} {err}"
    return Result(codes, out, err)


def train_in_process(argv, log: Path, env: dict, kill: Kill | None, trace_file: Path | None):
    """What a started process does: train.py with these flags, until it ends or is killed."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        os.dup2(os.open(log.with_suffix(suffix), flags), number)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    os.environ.update(env)
    torch.set_num_threads(1)
    if trace_file:
        trace(trace_file)
    if kill:
        kill_at(kill)
    if kill or trace_file:
        train.command(argv)
    else:
        sys.argv = [str(ROOT / "train.py"), *argv]
        runpy.run_path(sys.argv[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


FORKSERVER = multiprocessing.get_context("forkserver")
# the last one is imported by optimizers
FORKSERVER.set_forkserver_preload(["train", "tiny", "pytest", "numpy", "torch._dynamo"])


def together(target, arguments: list[tuple], timeout: float = 120, watch=None) -> list[int | None]:
    """Run target(*arguments[i]) in process i, all at once; returns their exit codes, None for
    one that was stuck. watch(processes) may look on, and kill from outside."""
    processes = [FORKSERVER.Process(target=target, args=args) for args in arguments]
    for process in processes:
        process.start()
    if watch:
        watch(processes)
    end = time.time() + timeout
    for process in processes:
        process.join(max(0, end - time.time()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    # gloo of torch 2.13 has aborted so ("free(): invalid pointer") once in some hundred starts,
    # which no tool and no repetition has shown again: make test gives a test that fails with
    # these words, and no other, a second try
    assert -signal.SIGABRT not in codes, f"a process was aborted from within: {codes}"
    return codes


def check_shards(rank: int, world_size: int, tp: int, folder: Path, sources: list[Path]):
    """One of some processes that load each source sharded over a mesh, compare it with the whole
    model, and save it to folder/saved0, saved1 and so on."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    shape = (world_size // tp, tp)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    model.SHARD_BYTES = 500_000

    def shard(net):
        model.parallelize(net, mesh, torch.float32)
        is_tied = net.lm_head.weight is net.embed_tokens.weight
        assert is_tied == net.cfg.tie_embeddings, "or it would be gathered twice"

    for number, source in enumerate(sources):
        dist.barrier()
        net, tok = model.load(source, shard=shard)
        plain, _ = model.load(source)
        check_parameters(net, plain, world_size)
        tokens = torch.arange(20)[None] % tok.size
        check_forward(net, plain, tokens, mesh)
        check_gradients(net, plain, tokens)
        model.save(net, tok, f"{folder}/saved{number}", write=rank == 0)
    dist.barrier()
    dist.destroy_process_group()


def check_parameters(net, plain, world_size: int):
    """Each process holds its part, and the parts are the whole."""
    local_size = sum(p.to_local().numel() for p in net.parameters())
    whole_size = sum(p.numel() for p in plain.parameters())
    assert local_size < 1.1 * whole_size / world_size, (local_size, whole_size)
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert p.requires_grad and torch.equal(p.full_tensor(), q), name


@torch.no_grad()
def check_forward(net, plain, tokens, mesh):
    """Sampling's model computes what the whole one does, and to the last bit the same on all."""
    with model.unsharded(net, mesh) as gathered:
        logits = gathered(tokens)
    assert torch.allclose(logits, plain(tokens), atol=1e-5 * logits.abs().max())
    of_ranks = [torch.empty_like(logits) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, logits)
    assert all(torch.equal(logits, others) for others in of_ranks), "ranks would draw other tokens"


def check_gradients(net, plain, tokens):
    """All ranks have the same text, so the mean over them is the gradient of one."""
    for one in (net, plain):
        one(tokens).logsumexp(-1).sum().backward()
    for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
        atol = 1e-4 * q.grad.abs().max()
        assert torch.allclose(p.grad.full_tensor(), q.grad, rtol=1e-3, atol=atol), name
