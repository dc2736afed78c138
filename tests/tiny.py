"""A tiny world for tests/test_train.py: a 2-layer base that writes questions, rows to learn from, and clean processes.

`start` starts processes by a fork server that has imported train once: a fresh process without the seconds that
importing torch takes, which may die (`kill`), be one of several (`world`), or run train.py as a command (`argv`).
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
from pathlib import Path

import sentencepiece
import torch
import torch.distributed as dist

import judge
import model
import train
from dpo import collate, sft_loss
from model import Llama, ModelConfig, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
ANIMALS = ["owl", "cat", "fox", "bee", "ant", "bat", "cow", "dog", "hen", "pig", "rat", "elk"]
VERBS = ["eat", "see", "hear", "like", "want", "make"]
TIMES = ["night", "noon", "dawn", "home", "sea", "school"]
JUDGE = "Grade this.\nQuestion: {prompt}\nAnswer: {response}\nEnd with Score: <n>\n"
PROPOSE = "Question: {1}\nQuestion: {2}\nQuestion: {3}\nQuestion:"
SHAPE = {"dim": 48, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 96, "max_len": 192}
RECIPE = {
    "prompts": "9,7", "max_prompt": 24, "rouge": 0.95, "candidates": 3, "votes": 2, "temperature": 1.0,
    "top_p": 1.0, "max_response": 12, "max_judgement": 24, "sample_batch": 64, "sft_lr": 3e-3, "sft_epochs": 5,
    "dpo_lr": 1e-3, "dpo_epochs": 3, "batch": 5,
}  # fmt: skip


def question(rng: random.Random) -> str:
    return f"What does the {rng.choice(ANIMALS)} {rng.choice(VERBS)} at {rng.choice(TIMES)}?"


def answer(rng: random.Random, prompt: str) -> str:
    animal, verb, time = (prompt.split()[i].strip("?") for i in (3, 4, 6))
    texts = (f"The {animal} can {verb} it at {time}.", f"At {time} a lot.", f"The {animal} is fine.", "It is so.")
    return rng.choice(texts)


def judgement(rng: random.Random) -> str:
    points = rng.randrange(6)
    return f"It is {('bad', 'poor', 'fine', 'good')[points // 2 + points // 5]}.\nScore: {points}"


def rankings(rng: random.Random, prompts: list[str]) -> list[dict]:
    return [{"prompt": p, "responses": [answer(rng, p) + x for x in ("", " So.", "?")], "ranks": [0, 1, 2]}
            for p in prompts]  # fmt: skip


def write_rows(path: Path, rows: list[dict]):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def make_data(folder: Path):
    rng = random.Random(0)
    asked = list(dict.fromkeys(question(rng) for _ in range(60)))
    train_on, test, exam = asked[:21], asked[21:26], asked[26:29]
    ift = [{"prompt": p, "response": answer(rng, p)} for p in train_on]
    folder.mkdir(parents=True)
    write_rows(folder / "ift.jsonl", ift)
    write_rows(folder / "eft.jsonl", [r | {"judgement": judgement(rng)} for r in ift])
    write_rows(folder / "eft_eval.jsonl", rankings(rng, exam))
    write_rows(folder / "test.jsonl", [{"prompt": p} for p in test])
    (folder / "judge.txt").write_text(JUDGE)
    (folder / "propose.txt").write_text(PROPOSE)
    (folder / "recipe.json").write_text(json.dumps(RECIPE, indent=2))


def make_base(folder: Path, seed: int = 0, steps: int = 300):
    """A base that has read questions, answers and judgements, so that a few steps of SFT make it a judge."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    lists = ["".join(f"Question: {question(rng)}\n" for _ in range(4)) for _ in range(300)]
    chats = []
    for _ in range(300):
        prompt = question(rng)
        response = answer(rng, prompt)
        chats += [(prompt, response), (judge.judge_prompt(JUDGE, prompt, response), judgement(rng))]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lists[:100], *(f"[INST] {p} [/INST] {r}" for p, r in chats[:400])]),
        model_prefix=str(folder / "tokenizer"), vocab_size=420, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        bos_id=1, eos_id=2, unk_id=0, pad_id=-1, character_coverage=1.0, minloglevel=2, num_threads=1,
    )  # fmt: skip
    tok = Tokenizer(folder / "tokenizer.model")
    texts = [tok.raw(text) for text in lists] + [tok.chat(p) + tok.response(r) for p, r in chats]
    torch.manual_seed(seed)
    net = Llama(ModelConfig(vocab_size=tok.size, **SHAPE))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, betas=(0.9, 0.95))
    for step in range(steps):
        tokens, targets, layout = collate([(ids[:1], ids[1:]) for ids in rng.sample(texts, 12)])
        loss, _ = sft_loss(net, tokens, targets, layout)
        (loss / (targets >= 0).sum()).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 5e-3 * min((step + 1) / 20, 1 - 0.9 * step / steps)
        optimizer.step()
        optimizer.zero_grad()
    model.save(net, tok, folder)
    return loss.item() / (targets >= 0).sum().item()


# ---- processes ---------------------------------------------------------------------------------------------


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def fill():
    """From here on no file may grow beyond this: what a checkpoint or weights need, and rows do not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


ACTS = {
    "die": die,
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "int": lambda: os.kill(os.getpid(), signal.SIGINT),
    "full": fill,
}


def kill_at(place: str, what: str, count: int, act: str = "die", rank: str = ""):
    """Arrange for this process to be killed: in the middle of step `count` of training model `what`, and so on.

    `act` does something else to it than to kill it; `rank` alone is hit, or all are.
    """
    if rank and os.environ.get("RANK") != rank:
        return
    act = ACTS[act]
    if place == "step":  # half of the step's line in metrics.jsonl is written
        old = train.write_metrics

        def write_metrics(cfg, line):
            if (line["model"], line["step"]) == (what, count):
                if act is die:
                    with (Path(cfg.out) / "metrics.jsonl").open("a") as f:
                        f.write(json.dumps(line)[:30])
                act()
            old(cfg, line)

        train.write_metrics = write_metrics
    elif place == "checkpoint":  # all of the checkpoint at step `count` is written, but it is not in its place
        old_json = train.write_json

        def write_json(path, d):
            old_json(path, d)
            if path.name == "training.json" and (d["model"], d["step"]) == (what, count):
                act()

        train.write_json = write_json
    elif place == "commit":  # half of the line of chunk `count` of the file `what` is written
        old_commit, chunks = train.commit, [0]

        def commit(cfg, file, line):
            chunks[0] += file == what
            if file == what and chunks[0] == count:
                if act is die:
                    with (Path(cfg.out) / (file + ".part")).open("a") as f:
                        f.write(json.dumps(line)[: len(json.dumps(line)) // 2])
                act()
            old_commit(cfg, file, line)

        train.commit = commit
    elif place == "save":  # the weights of model `what` are there, its config.json is not
        old_config = model.write_config
        model.write_config = lambda c, t, d, path: die() if path.parent.name == what else old_config(c, t, d, path)
    elif place == "sampling":  # after `count` tokens of the chapter that its bar calls `what`
        old_progress = train.progress

        @contextmanager
        def progress(cfg, mesh, name, *rest):
            with old_progress(cfg, mesh, name, *rest) as bar:
                left = [count]

                def tick(*counts):
                    left[0] -= 1
                    if name == what and left[0] <= 0:
                        act() if left[0] == 0 else die()  # who was asked to stop does not go on
                    bar(*counts)

                yield tick

        train.progress = progress
    elif place == "file":  # half of the file `what` (model/name) is written
        old_text = train.write_text

        def write_text(path, text):
            if f"{path.parent.name}/{path.name}" == what:
                path.with_name(path.name + ".tmp").write_text(text[: len(text) // 2])
                die()
            old_text(path, text)

        train.write_text = write_text
    elif place == "reference":  # at batch `count` of the reference's log-probs
        calls = [0]
        old_logps = train.sequence_logps

        def sequence_logps(*args):
            calls[0] += 1
            return die() if calls[0] == count else old_logps(*args)

        train.sequence_logps = sequence_logps
    elif place == "late":  # no death: all processes but the first look `count` seconds late for the file `what`
        old_exists = Path.exists

        def exists(path):
            time.sleep(count if path.name == what and os.environ.get("RANK") != "0" else 0)
            return old_exists(path)

        Path.exists = exists
    else:
        raise ValueError(place)


def trace(path: Path):
    """Let this file hear of every chapter of main and every part of a chapter when it begins: a time and a name."""

    def tell(name):
        with path.open("a") as f:
            f.write(f"{time.time()} {name}\n")

    def told(work, name_of):
        def wrapper(*args, **knobs):
            tell(name_of(*args))
            return work(*args, **knobs)

        return wrapper

    for name in train.main.__code__.co_names:
        work = getattr(train, name, None)
        if inspect.isfunction(work) and list(inspect.signature(work).parameters)[:2] == ["cfg", "mesh"]:
            told_work = told(work, lambda *args, name=name: " ".join([name, *(a for a in args if isinstance(a, str))]))
            setattr(train, name, told_work)
    parts = {
        "open_model": lambda *_: " loads",
        "optimize": lambda *_: " steps",
        "checkpoint": lambda *_: " writes a checkpoint",
        "write_metrics": lambda _, line: f" step {line['step']}",
        "save": lambda *_: " saves",
        "put": lambda cfg, name, file, _: f" writes {file}",
        "progress": lambda cfg, mesh, what, *_: f" {what}",
        "commit": lambda *_: " commits",
        "pair_logps": lambda *_: " log-probs of the reference",
    }
    for name, name_of in parts.items():
        setattr(train, name, told(getattr(train, name), name_of))


def job(argv, log, env, kill):
    """What a started process does: train.py with these flags, its output in files, until it ends or is killed."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update(env)
    torch.set_num_threads(1)
    if isinstance(kill, Path):
        trace(kill) if env.get("RANK", "0") == "0" else None
        train.command(argv)
    elif kill:
        kill_at(*kill)
        train.command(argv)
    else:
        sys.argv = [str(ROOT / "train.py"), *argv]
        runpy.run_path(sys.argv[0], run_name="__main__")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Result:
    def __init__(self, codes, out, err):
        self.codes, self.out, self.err = codes, out, err
        self.code = codes[0] if len(set(codes)) == 1 else None


def together(target, arguments: list[tuple], timeout: float = 120, watch=None) -> list[int | None]:
    """Run target(*arguments[i]) in process i, all at once; returns their exit codes, None for one that was stuck.

    watch(processes) may look on and kill from outside.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "tiny", "pytest", "numpy", "runpy", "torch._dynamo"])  # by optimizers
    started = [context.Process(target=target, args=args) for args in arguments]
    for process in started:
        process.start()
    if watch:
        watch(started)
    end = time.time() + timeout
    for process in started:
        process.join(max(0, end - time.time()))
    codes = [p.exitcode for p in started]
    for process in started:
        process.kill()
        process.join()
    # gloo of torch 2.13 has aborted so ("free(): invalid pointer") once in some hundred starts, which no tool and no
    # repetition has shown again: make test gives a test that fails with these words, and no other, a second try
    assert -signal.SIGABRT not in codes, f"process {codes.index(-signal.SIGABRT)} was aborted from within: {codes}"
    return codes


def start(argv, folder: Path, *, world: int = 1, kill=None, timeout: float = 120, watch=None) -> Result:
    """Run train.py with flags `argv` as one process or as the `world` processes of torchrun; wait for the end.

    `kill` is what kill_at takes, or the file of `trace`; `watch` as in `together`.
    """
    ranks = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    folder.mkdir(parents=True, exist_ok=True)
    logs, arguments = [folder / f"rank{rank}" for rank in range(world)], []
    for rank, log in enumerate(logs):
        env = {"CUDA_VISIBLE_DEVICES": ""} | (ranks | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
        arguments.append((list(map(str, argv)), str(log), env, kill))
    codes = together(job, arguments, timeout, watch)
    out, err = ("".join(Path(f"{log}.{name}").read_text() for log in logs) for name in ("out", "err"))
    assert None not in codes, f"did not end in {timeout} s: {out} {err}"
    return Result(codes, out, err)


def check_shards(rank: int, world: int, tp: int, folder: Path, sources: list[Path]):
    """One of `world` processes that load each source dealt to a mesh, compare it with the whole, and save it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    names = ("replicate", "dp", "tp")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, world // tp, tp), mesh_dim_names=names)
    model.SHARD_BYTES = 500_000

    def shard(net):
        model.parallelize(net, mesh, torch.float32)
        assert (net.lm_head.weight is net.embed_tokens.weight) == net.cfg.tied  # or it would be gathered twice

    for number, source in enumerate(sources):
        dist.barrier()
        net, tok = model.load(source, shard=shard)
        plain, _ = model.load(source)
        held, count = (sum(p.numel() for p in ps) for ps in ([p.to_local() for p in net.parameters()],
                                                             plain.parameters()))  # fmt: skip
        assert held < 1.1 * count / world, (held, count)
        for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
            assert p.requires_grad and torch.equal(p.full_tensor(), q), name
        tokens = torch.arange(20)[None] % tok.size
        with torch.no_grad(), model.gathered(net):
            ours = net(tokens)
        assert torch.allclose(ours, plain(tokens), atol=1e-5 * ours.abs().max())
        all_ranks = [torch.empty_like(ours) for _ in range(world)]
        dist.all_gather(all_ranks, ours)
        assert all(torch.equal(ours, other) for other in all_ranks)  # ranks of a tp group draw the same tokens
        for one in (net, plain):  # all ranks do the same row, so the mean over them is that of one
            one(tokens).logsumexp(-1).sum().backward()
        for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(p.grad.full_tensor(), q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max()), name
        model.save(net, tok, f"{folder}/saved{number}", torch.bfloat16, write=rank == 0)
    dist.barrier()
    dist.destroy_process_group()
