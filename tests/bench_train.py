"""How fast a training step is, and how much memory it takes: ours, TRL's trainers, a plain
transformers loop.

    python tests/bench_train.py --only "DPO fp32" --repeats 5 --json rows.json

All sides live in one process, on one thread, with the same random weights and the same 16
examples, and take turns. A row is the median CPU time of --repeats updates (forward, backward,
clipping, fused AdamW), in tokens a second: real ones, a prompt counted once for each response,
whatever a side makes of it. Ours is what train.train_model calls, with its default micro-batches.
TRL's is what its own loop does from on_step_begin to on_step_end; the plain loop is below.
Tokenising, the peers' collating, logging and saving are outside. In bf16 all keep fp32 master
weights.

Our reference is a column of the pairs, made before the first update: `DPO + reference` adds that
pass to every step, as if each pair were seen only once. Memory is the peak of a process of its
own over what it held after its imports; there less is better.
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

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
os.environ["PYTHONWARNINGS"] = "ignore"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import tokenizers
import torch
import transformers
import trl
from conftest import transformers_twin
from transformers import (
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    TrainerCallback,
)

import train
from dpo import IGNORE, collate, collate_pairs, num_tokens, preference_loss, sft_loss
from model import Llama, ModelConfig, parallelize, use_onednn_linear

EOS = 2
LR = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WHOLE_BATCH = 1 << 20  # micro_tokens by which nothing is cut


def tiny(vocab_size: int = 4096) -> ModelConfig:
    shape = {"dim": 256, "layers": 6, "heads": 8, "kv_heads": 4, "ffn": 688, "max_len": 2048}
    return ModelConfig(vocab_size=vocab_size, **shape)


def make_pairs(vocab_size: int, mean: int, spread: int, count: int) -> list[tuple]:
    """(prompt, chosen, rejected, reference) of random ids, `mean` each, and up to `spread` more or
    less."""
    rng = random.Random(0)

    def random_ids():
        length = mean + rng.randint(-spread, spread)
        return [rng.randrange(3, vocab_size) for _ in range(length)]

    pairs = []
    for _ in range(count):
        prompt, chosen, rejected = random_ids(), random_ids(), random_ids()
        pairs.append((prompt, [*chosen[1:], EOS], [*rejected[1:], EOS], (0.0, 0.0)))
    return pairs


# ---- our side --------------------------------------------------------------------------------


class Ours:
    """An update by the trainer's own functions."""

    def __init__(self, kind: str, weights: Llama, pairs, dtype: str, micro_tokens: int = 0):
        cfg = train.Config(micro_tokens=micro_tokens)
        self.run = train.Run(cfg, Path(), None, MESH, "cpu", dp_rank=0, dp_size=1)
        self.model = Llama(weights.cfg)
        self.model.load_state_dict(weights.state_dict())
        if dtype == "bf16":
            parallelize(self.model, MESH, DTYPES[dtype])
        else:
            use_onednn_linear(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.batch = list(range(len(pairs)))
        self.reference_in_every_step = kind == "DPO + reference"
        if kind == "SFT":
            self.examples = [pair[:2] for pair in pairs]
            work = (collate, sft_loss, lambda example: len(example[1]))
        else:
            self.examples = pairs
            self.add_reference()
            work = (collate_pairs, preference_loss, lambda example: 1)
        self.objective = train.Objective(*work, peak_lr=LR, final_lr_ratio=1.0)

    def add_reference(self):
        """The reference's log-probs, by the model as it stands."""
        logps = train.pair_logps(self.run, self.model, self.examples, [self.batch])
        self.examples = [(*pair[:3], logps[i]) for i, pair in enumerate(self.examples)]

    def step(self) -> tuple[float, float]:
        """CPU seconds and the loss."""
        start = time.process_time()
        if self.reference_in_every_step:
            self.add_reference()
        self.model.train()
        metrics = train.accumulate_gradients(
            self.run, self.model, self.batch, self.examples, self.objective
        )
        train.clip_gradients(self.model)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - start, metrics["loss"]


# ---- the peers -------------------------------------------------------------------------------


def transformers_model(weights: Llama) -> LlamaForCausalLM:
    """transformers' Llama with our weights and its default attention."""
    settings = {"attn_implementation": "sdpa", "bos_token_id": None, "pad_token_id": 0}
    return transformers_twin(weights, eos_token_id=EOS, **settings)


class Plain:
    """SFT as people write it by hand: a padded batch, the model's own loss, AdamW; bf16 by
    autocast."""

    def __init__(self, kind: str, weights: Llama, pairs, dtype: str):
        assert kind == "SFT"
        self.model = transformers_model(weights).train()
        self.dtype = DTYPES[dtype]
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        width = max(len(prompt + response) for prompt, response, *_ in pairs)
        ids, masks, labels = [], [], []
        for prompt, response, *_ in pairs:
            padding = width - len(prompt + response)
            ids.append(prompt + response + [0] * padding)
            masks.append([1] * len(prompt + response) + [0] * padding)
            labels.append([IGNORE] * len(prompt) + response + [IGNORE] * padding)
        self.inputs = {
            "input_ids": torch.tensor(ids),
            "attention_mask": torch.tensor(masks),
            "labels": torch.tensor(labels),
        }

    def step(self) -> tuple[float, float]:
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = self.model(**self.inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - start, loss.item()


class TRL(TrainerCallback):
    """One of TRL's trainers, its loop in a thread of its own that stands still between two of our
    calls of step."""

    def __init__(self, kind: str, weights: Llama, pairs, dtype: str, precomputed: bool = False):
        self.error, self.is_over = None, False
        self.seconds, self.loss = 0.0, None
        self.go, self.ready = threading.Semaphore(0), threading.Semaphore(0)
        settings = {
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": len(pairs),
            "max_steps": 1 << 20,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": dtype == "bf16",
            "activation_checkpointing": False,
            "max_length": None,
            "optim": "adamw_torch_fused",
            "learning_rate": LR,
            "lr_scheduler_type": "constant",
        }
        common = {
            "model": transformers_model(weights),
            "processing_class": word_tokenizer(weights.cfg.vocab_size),
            "callbacks": [self],
        }
        if kind == "SFT":
            trainer = sft_trainer(pairs, settings, common)
        else:
            settings["precompute_ref_log_probs"] = precomputed
            trainer = dpo_trainer(
                pairs, settings, common | {"ref_model": transformers_model(weights)}
            )
            if precomputed:
                trainer.ref_model = None  # it has done its work
        trainer.remove_callback(PrinterCallback)
        self.trainer = trainer
        self.watch_loss()
        threading.Thread(target=self.train, daemon=True).start()
        self.wait()

    def watch_loss(self):
        """A look at the loss, without the loop's logging."""
        compute_loss = self.trainer.compute_loss

        def watched(*args, **settings):
            result = compute_loss(*args, **settings)
            self.loss = (result[0] if isinstance(result, tuple) else result).detach()
            return result

        self.trainer.compute_loss = watched

    def train(self):
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
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **_):
        self.seconds = time.process_time() - self.start
        control.should_training_stop |= self.is_over

    def step(self) -> tuple[float, float]:
        self.go.release()
        self.wait()
        return self.seconds, self.loss.item()

    def close(self):
        self.is_over = True
        self.step()


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """w7 is token 7: TRL wants texts."""
    words = {"<pad>": 0, "<unk>": 1, "</s>": EOS} | {f"w{i}": i for i in range(3, vocab_size)}
    tok = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    control_tokens = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tok, **control_tokens)


def to_text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids if i != EOS) + " "


def sft_trainer(pairs, settings: dict, common: dict):
    rows = [{"prompt": to_text(p), "completion": to_text(c)} for p, c, *_ in pairs]
    dataset = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(args=trl.SFTConfig(**settings), train_dataset=dataset, **common)
    lengths = sorted(map(len, trainer.train_dataset["input_ids"]))
    assert lengths == sorted(len(p + c) for p, c, *_ in pairs)
    return trainer


def dpo_trainer(pairs, settings: dict, common: dict):
    rows = []
    for prompt, chosen, rejected, _ in pairs:
        texts = map(to_text, (prompt, chosen, rejected))
        rows.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    dataset = datasets.Dataset.from_list(rows)
    trainer = trl.DPOTrainer(args=trl.DPOConfig(**settings), train_dataset=dataset, **common)
    for row, pair in zip(trainer.train_dataset, pairs, strict=True):
        assert [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] == list(pair[:3])
    return trainer


# ---- cases -----------------------------------------------------------------------------------

PEERS = {
    "SFT": {"transformers + AdamW": Plain, "TRL": TRL},
    "DPO": {"TRL with reference": TRL, "TRL precomputed": partial(TRL, precomputed=True)},
    "DPO + reference": {"TRL with reference": TRL},
}


def measure_speeds(kind: str, dtype: str, spread: int, repeats: int) -> dict[str, float]:
    """Median tokens a second of every side. All begin with the same loss, or they do not do the
    same."""
    torch.manual_seed(0)
    weights, pairs = Llama(tiny()), make_pairs(4096, 128, spread, 16)
    makers = {"ours": Ours} | PEERS[kind]
    sides = {name: make(kind, weights, pairs, dtype) for name, make in makers.items()}
    losses = {name: side.step()[1] for name, side in sides.items()}
    for loss in losses.values():
        assert abs(loss - losses["ours"]) < 3e-3 * losses["ours"], losses
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            seconds[name].append(side.step()[0])
    for side in sides.values():
        if isinstance(side, TRL):
            side.close()
    total = 0
    for prompt, chosen, rejected, _ in pairs:
        responses = [chosen] if kind == "SFT" else [chosen, rejected]
        total += sum(num_tokens((prompt, response)) for response in responses)
    return {name: total / statistics.median(values) for name, values in seconds.items()}


OUR_MEMORY = {"ours": WHOLE_BATCH, "ours, default micro-batches": 0}  # micro_tokens


def memory_of(side: str) -> float:
    """MB that two DPO steps need at V = 32,000, T = 1,024: 4 pairs at once, or as our trainer cuts
    them by itself."""
    with open("/proc/self/statm") as f:
        before = int(f.read().split()[1]) * resource.getpagesize()
    weights, pairs = Llama(tiny(32000)), make_pairs(32000, 512, 0, 4)
    if side in OUR_MEMORY:
        runner = Ours("DPO", weights, pairs, "fp32", OUR_MEMORY[side])
    else:
        runner = PEERS["DPO"][side]("DPO", weights, pairs, "fp32")
    for _ in range(2):
        runner.step()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (peak - before) / 1e6


def measure_memory():
    """(case, ours, peer) in megabytes, each side in a process of its own."""
    megabytes = {}
    for side in (*OUR_MEMORY, *PEERS["DPO"]):
        argv = [sys.executable, __file__, "--memory-of", side]
        result = subprocess.run(argv, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        megabytes[side] = float(result.stdout.split()[-1])
    for ours in OUR_MEMORY:
        for peer in PEERS["DPO"]:
            yield f"DPO memory, {ours}: {peer}", megabytes[ours], megabytes[peer]


def measure(only: str, repeats: int):
    """(case, ours, peer) of all cases whose names hold `only`."""
    for kind in PEERS:
        for dtype in DTYPES:
            for lengths, spread in (("equal", 0), ("ragged", 96)):
                case = f"{kind} {dtype} {lengths}"
                if only in case:
                    speeds = measure_speeds(kind, dtype, spread, repeats)
                    for peer in PEERS[kind]:
                        yield f"{case}, {peer}", speeds["ours"], speeds[peer]
    if only in "DPO memory":
        yield from measure_memory()


def main():
    parser = argparse.ArgumentParser(description="Training steps of ours and of the peers.")
    parser.add_argument(
        "--only", default="", help='cases whose name holds this, such as "DPO fp32" or "memory"'
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--json", type=Path, help="file for rows {case, ours, peer, ratio}")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(memory_of(args.memory_of))
        return
    peers = f"transformers {transformers.__version__}, TRL {trl.__version__}"
    print(f"torch {torch.__version__}, {peers}, 1 thread")
    print(f"{'case':60} {'ours':>9} {'peer':>9} {'ratio':>6}")
    rows = []
    for case, ours, peer in measure(args.only, args.repeats):
        ratio = round(ours / peer, 2)
        rows.append({"case": case, "ours": round(ours), "peer": round(peer), "ratio": ratio})
        print(f"{case:60} {ours:9,.0f} {peer:9,.0f} {ratio:6.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    MESH = train.init_distributed(train.Config())
    main()
    train.dist.destroy_process_group()
