"""How fast a training step is, and how much memory it takes: ours, TRL's trainers, a plain transformers loop.

    python tests/bench_train.py --only "DPO fp32" --repeats 5 --json rows.json

All sides live in one process, on one thread, with the same random weights and the same 16 rows, and take turns. A row
is the median CPU time of --repeats updates (forward, backward, clipping, fused AdamW), in tokens a second: real ones,
a prompt counted once for each response, whatever a side makes of it. Ours is what train.optimize calls, with its
default micro-batches. TRL's is what its own loop does from on_step_begin to on_step_end; the plain loop is below.
Tokenising, the peers' collating, logging and saving are outside. In bf16 all keep fp32 master weights.

Our reference is a column of the pairs, made before the first update: `DPO + reference` adds that pass to every step,
as if each pair were seen only once. Memory is the peak of a process of its own over what it held after its imports.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", PYTHONWARNINGS="ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import tokenizers
import torch
import transformers
import trl
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

import train
from dpo import IGNORE, collate, preference_loss, sft_loss
from model import Llama, ModelConfig, hf_name, parallelize

EOS, RATE = 2, 1e-5
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FLOORS = {  # issue 5: our tokens a second over the peer's, at least
    "SFT fp32 equal, transformers + AdamW": 1.6, "SFT bf16 equal, transformers + AdamW": 1.3,
    "DPO fp32 equal, TRL with reference": 3.8, "DPO fp32 equal, TRL precomputed": 2.7,
    "DPO fp32 ragged, TRL with reference": 5.3, "DPO fp32 ragged, TRL precomputed": 3.9,
    "DPO bf16 ragged, TRL with reference": 7.3, "DPO bf16 ragged, TRL precomputed": 6.1,
}  # fmt: skip


def tiny(vocab: int = 4096) -> ModelConfig:
    return ModelConfig(vocab_size=vocab, dim=256, layers=6, heads=8, kv_heads=4, ffn=688, max_len=2048)


def make_pairs(vocab: int, mean: int, spread: int, count: int) -> list[tuple]:
    """(prompt, chosen, rejected, reference) of random ids, `mean` each, and up to `spread` more or less."""
    rng = random.Random(0)
    ids = [[[rng.randrange(3, vocab) for _ in range(mean + rng.randint(-spread, spread))] for _ in range(3)]
           for _ in range(count)]  # fmt: skip
    return [(p, [*c[1:], EOS], [*r[1:], EOS], (0.0, 0.0)) for p, c, r in ids]


# ---- our side ----------------------------------------------------------------------------------------------


class Ours:
    """An update by the trainer's own functions."""

    def __init__(self, kind: str, weights: Llama, pairs: list[tuple], dtype: str, micro_tokens: int = 0):
        self.mesh, self.cfg = MESH, train.Config(micro_tokens=micro_tokens)
        self.model = Llama(weights.cfg)
        self.model.load_state_dict(weights.state_dict())
        if dtype == "bf16":
            parallelize(self.model, MESH, TYPES[dtype])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
        self.again, self.batch = kind == "DPO + reference", list(range(len(pairs)))
        if kind == "SFT":
            self.examples = [pair[:2] for pair in pairs]
            self.how = {"pack": collate, "loss": sft_loss, "units": lambda row: len(row[1])}
        else:
            self.examples = pairs
            self.refer()
            self.how = {"pack": partial(train.pack_pairs, device="cpu"), "loss": preference_loss, "units": lambda _: 1}

    def refer(self):
        """The reference's log-probs, by the model as it stands."""
        found = train.pair_logps(self.cfg, self.mesh, self.model, self.examples, [self.batch])
        self.examples = [(*pair[:3], found[i]) for i, pair in enumerate(self.examples)]

    def step(self) -> tuple[float, float]:
        """CPU seconds and the loss."""
        began = time.process_time()
        if self.again:
            self.refer()
        self.model.train()
        sums, _ = train.gradient(self.cfg, self.model, self.batch, self.examples, **self.how)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - began, sums["loss"]


# ---- the peers ---------------------------------------------------------------------------------------------


def llama(weights: Llama) -> LlamaForCausalLM:
    """transformers' Llama with our weights."""
    c = weights.cfg
    peer = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, intermediate_size=c.ffn, max_position_embeddings=c.max_len,
        rms_norm_eps=c.norm_eps, bos_token_id=None, eos_token_id=EOS, pad_token_id=0,
    ))  # fmt: skip
    peer.load_state_dict({hf_name(k): v for k, v in weights.state_dict().items()})
    return peer


class Plain:
    """SFT as people write it by hand: a padded batch, the model's own loss, AdamW; bf16 by autocast."""

    def __init__(self, kind: str, weights: Llama, pairs: list[tuple], dtype: str):
        assert kind == "SFT"
        self.model, self.dtype, width = llama(weights).train(), TYPES[dtype], max(len(p + c) for p, c, *_ in pairs)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
        fill = [(p + c, [0] * (width - len(p + c)), len(p)) for p, c, *_ in pairs]
        self.inputs = {
            "input_ids": torch.tensor([ids + pad for ids, pad, _ in fill]),
            "attention_mask": torch.tensor([[1] * len(ids) + pad for ids, pad, _ in fill]),
            "labels": torch.tensor([[IGNORE] * n + ids[n:] + [IGNORE] * len(pad) for ids, pad, n in fill]),
        }

    def step(self) -> tuple[float, float]:
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.model(**self.inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - began, loss.item()


class TRL(TrainerCallback):
    """One of TRL's trainers, its loop in a thread of its own that stands still between two of our calls of step."""

    def __init__(self, kind: str, weights: Llama, pairs: list[tuple], dtype: str, precomputed: bool = False):
        words = {"<pad>": 0, "<unk>": 1, "</s>": EOS} | {f"w{i}": i for i in range(3, weights.cfg.vocab_size)}
        splitter = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        splitter.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tok = PreTrainedTokenizerFast(tokenizer_object=splitter, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
        texts = [[" ".join(f"w{i}" for i in ids if i != EOS) + " " for ids in pair[:3]] for pair in pairs]
        knobs = {"output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": len(pairs), "max_steps": 1 << 20,
                 "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
                 "use_cpu": True, "bf16": dtype == "bf16", "activation_checkpointing": False, "max_length": None,
                 "optim": "adamw_torch_fused", "learning_rate": RATE, "lr_scheduler_type": "constant"}  # fmt: skip
        common = {"model": llama(weights), "processing_class": tok, "callbacks": [self]}
        if kind == "SFT":
            rows = [{"prompt": p, "completion": c} for p, c, _ in texts]
            args = trl.SFTConfig(**knobs)
            trainer = trl.SFTTrainer(args=args, train_dataset=datasets.Dataset.from_list(rows), **common)
            assert sorted(map(len, trainer.train_dataset["input_ids"])) == sorted(len(p + c) for p, c, *_ in pairs)
        else:
            rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]
            args, rows = trl.DPOConfig(precompute_ref_log_probs=precomputed, **knobs), datasets.Dataset.from_list(rows)
            trainer = trl.DPOTrainer(args=args, train_dataset=rows, ref_model=llama(weights), **common)
            trainer.ref_model = None if precomputed else trainer.ref_model  # it has done its work
            ours = [list(pair[:3]) for pair in pairs]
            assert [[r[f"{k}_ids"] for k in ("prompt", "chosen", "rejected")] for r in trainer.train_dataset] == ours
        trainer.remove_callback(PrinterCallback)
        self.trainer, self.seconds, self.error = trainer, 0.0, None
        old, self.loss = trainer.compute_loss, None

        def compute_loss(*args, **knobs):  # a look at the loss, without the loop's logging
            found = old(*args, **knobs)
            self.loss = (found[0] if isinstance(found, tuple) else found).detach()
            return found

        trainer.compute_loss = compute_loss
        self.go, self.ready, self.over = threading.Semaphore(0), threading.Semaphore(0), False
        threading.Thread(target=self.run, daemon=True).start()
        self.wait()

    def run(self):
        try:
            self.trainer.train()
        except BaseException as e:
            self.error = e
        self.ready.release()

    def wait(self):
        self.ready.acquire()
        if self.error:
            raise self.error

    def on_step_begin(self, *_, **__):
        self.ready.release()
        self.go.acquire()
        self.began = time.process_time()

    def on_step_end(self, args, state, control, **_):
        self.seconds = time.process_time() - self.began
        control.should_training_stop |= self.over

    def step(self) -> tuple[float, float]:
        self.go.release()
        self.wait()
        return self.seconds, self.loss.item()

    def close(self):
        self.over = True
        self.step()


# ---- cases -------------------------------------------------------------------------------------------------

PEERS = {
    "SFT": {"transformers + AdamW": Plain, "TRL": TRL},
    "DPO": {"TRL with reference": TRL, "TRL precomputed": partial(TRL, precomputed=True)},
    "DPO + reference": {"TRL with reference": TRL},
}


def race(kind: str, dtype: str, spread: int, repeats: int) -> tuple[int, dict[str, list[float]]]:
    """Tokens of a step, and its seconds by side. All sides begin with the same loss, or they do not do the same."""
    torch.manual_seed(0)
    weights, pairs = Llama(tiny()), make_pairs(4096, 128, spread, 16)
    sides = {name: make(kind, weights, pairs, dtype) for name, make in ({"ours": Ours} | PEERS[kind]).items()}
    first = {name: side.step()[1] for name, side in sides.items()}
    assert all(abs(loss - first["ours"]) < 3e-3 * first["ours"] for loss in first.values()), first
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side.step()[0])
    for side in sides.values():
        if isinstance(side, TRL):
            side.close()
    return sum(len(p + r) for p, *both, _ in pairs for r in (both[:1] if kind == "SFT" else both)), seconds


def memory_of(side: str) -> float:
    """MB that two DPO steps need at V = 32,000, T = 1,024: 4 pairs at once, or as our trainer cuts them by itself."""
    with open("/proc/self/statm") as f:
        before = int(f.read().split()[1]) * resource.getpagesize()
    weights, pairs = Llama(tiny(32000)), make_pairs(32000, 512, 0, 4)
    if side == "ours":
        runner = Ours("DPO", weights, pairs, "fp32", 1 << 20)
    elif side == "ours, default micro-batches":
        runner = Ours("DPO", weights, pairs, "fp32")
    else:
        runner = PEERS["DPO"][side]("DPO", weights, pairs, "fp32")
    for _ in range(2):
        runner.step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6


def memory(only: str):
    """Rows of megabytes, each side in a process of its own; here less is better and the ratio is ours / peer."""
    found = {}
    for side in ("ours", "ours, default micro-batches", *PEERS["DPO"]):
        command = [sys.executable, __file__, "--memory-of", side]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[side] = float(done.stdout.split()[-1])
    for mine in ("ours", "ours, default micro-batches"):
        for peer in PEERS["DPO"]:
            yield f"DPO memory, {mine}: {peer}", found[mine], found[peer]


def main():
    parser = argparse.ArgumentParser(description="Training steps of ours and of the peers, side by side.")
    parser.add_argument("--only", default="", help='cases whose name holds this, such as "DPO fp32" or "memory"')
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--json", type=Path, help="file for rows {case, ours, peer, ratio}")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory_of(args.memory_of))
        return
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}, 1 thread")
    rows = []

    def say(case, ours, peer):
        rows.append({"case": case, "ours": round(ours), "peer": round(peer), "ratio": round(ours / peer, 2)})
        floor = FLOORS.get(case)
        mark = "" if floor is None else f"   floor {floor}" + ("" if ours / peer >= floor else "  <- BELOW")
        print(f"{case:60} {ours:9,.0f} {peer:9,.0f} {ours / peer:6.2f}{mark}", flush=True)

    for kind in PEERS:
        for dtype in TYPES:
            for lengths, spread in (("equal", 0), ("ragged", 96)):
                case = f"{kind} {dtype} {lengths}"
                if args.only in case:
                    tokens, seconds = race(kind, dtype, spread, args.repeats)
                    speed = {name: tokens / statistics.median(s) for name, s in seconds.items()}
                    for peer in PEERS[kind]:
                        say(f"{case}, {peer}", speed["ours"], speed[peer])
    if args.only in "DPO memory":
        for row in memory(args.only):
            say(*row)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    MESH = train.start_processes(train.Config())
    main()
    train.dist.destroy_process_group()
