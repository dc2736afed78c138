"""Memory of a GPU by part, before any GPU is rented: torch's FSDP memory tracker follows a step.

    python tests/bench_memory.py --config 70b --gpus 64 --tp 8 --rows 2 --json FILE

The process group is fake and so are the tensors: the code runs as it would on rank 0, and no
weight is ever made. They say that they lie on a CPU, so the attention of a GPU is put in its
place: kernels that keep no scores. scripts/plan.py does the same by arithmetic.
"""

import argparse
import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from dpo import PackedBatch, collate, preference_loss, sft_loss
from model import Llama, ModelConfig, parallelize, unsharded
from sample import KeyValues, prefill
from scripts.plan import SHAPES

CONFIGS = SHAPES | {
    "toy": ModelConfig(1024, dim=160, layers=4, heads=4, kv_heads=2, ffn=432, max_len=512)
}
GiB = 1 << 30
PARTS = {  # of the tracker -> as scripts/plan.py calls them
    "Sharded Param": "weights",
    "Sharded Grad": "gradients",
    "OptState": "optimizer",
    "Unsharded Param": "gathered",
    "All Gather": "gathered",
    "Unsharded Grad": "gradients in flight",
    "Reduce Scatter": "gradients in flight",
    "Activation": "activations",
    "Temp": "activations",
    "Inputs": "activations",
    "Buffer": "activations",
    "Total": "total",
}


class Assume(TorchDispatchMode):
    """Fake tensors have no values: a mask picks `count` tokens, and a number asked for is 1."""

    def __init__(self, count: int = 0):
        super().__init__()
        self.count = count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return 1.0
        if func is aten.masked_select.default:
            return args[0].new_empty(self.count)
        if func is aten.index.Tensor and is_mask(args[1][0]):
            picked = torch.empty(self.count, dtype=torch.long)
            return func(args[0], [picked] * args[1][0].dim())
        return func(*args, **(kwargs or {}))


def is_mask(index) -> bool:
    return index is not None and index.dtype == torch.bool


def peak(net, optimizer, work, targets: int = 0) -> dict[str, float]:
    """GiB by part at the moment when work(), with that many target tokens, holds most."""
    tracker = FSDPMemTracker(net, optimizer)
    with tracker, Assume(targets):
        work()
    snapshot = tracker.get_tracker_snapshot("peak")
    parts = Counter()
    for kind, size in snapshot[torch.device("cpu")].items():
        parts[PARTS[getattr(kind, "value", kind)]] += size / GiB
    return {name: size for name, size in parts.items() if size}


def measure(
    shape: ModelConfig,
    mesh,
    rows: int,
    length: int,
    dtype=torch.bfloat16,
    activation_checkpointing=False,
    cases=("sft", "dpo", "sample"),
) -> dict[str, dict[str, float]]:
    """Case -> GiB by part, on rank 0: a step of SFT on `rows` rows, of DPO on as many pairs, with
    the optimizer; or as many texts sampled, without it. Prompts have half of `length` tokens, and
    so have responses."""
    PackedBatch.attend = attend_as_on_a_gpu
    with torch.device("meta"):
        net = Llama(shape)
    parallelize(net, mesh, dtype, activation_checkpointing)
    results = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu")
        if "sample" in cases:
            work = partial(sample_texts, net, mesh, rows, length)
            parts = results["sample"] = peak(net, None, work)
            heads = shape.kv_heads // mesh["tp"].size()
            numbers = 2 * shape.layers * rows * length * heads * shape.head_dim
            parts["KV cache"] = numbers * dtype.itemsize / GiB
            parts["activations"] -= parts["KV cache"]
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        # DTensor's first look at an operation, on whole tensors, would be counted; and now the
        # optimizer has its state
        update(net, optimizer)
        targets = rows * (length // 2)
        if "sft" in cases:
            step = partial(train_step, net, optimizer, rows, length, 1, sft_loss)
            results["sft"] = peak(net, optimizer, step, targets)
        if "dpo" in cases:
            loss = partial(preference_loss, reference=torch.zeros(2 * rows))
            step = partial(train_step, net, optimizer, rows, length, 2, loss)
            results["dpo"] = peak(net, optimizer, step, 2 * targets)
    return results


def attend_as_on_a_gpu(batch, layer, q, k, v):
    return batch.attend_varlen(q, k, v)


def train_step(net, optimizer, rows: int, length: int, responses: int, loss):
    text = [0] * (length // 2)
    batch = collate([(text,) * (1 + responses)] * rows)
    loss(net, *batch)[0].backward()
    update(net, optimizer)


def update(net, optimizer):
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def sample_texts(net, mesh, rows: int, length: int):
    """Prompts are read and moved to a cache that has room for the responses."""
    prompt = [0] * (length // 2)
    net.set_reshard_after_forward(False)
    with unsharded(net, mesh):  # by net itself: the tracker counts by FSDP's hooks
        context, _ = prefill(net, [prompt] * rows)
        cache = KeyValues(context, rows)
        cache.resize(length)
        cache.fill(list(range(rows)), context)
    net.set_reshard_after_forward(True)


def fake_mesh(gpus: int, tp: int = 1):
    """The mesh of rank 0 among `gpus` processes that do not exist."""
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    return init_device_mesh("cpu", (gpus // tp, tp), mesh_dim_names=("dp", "tp"))


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description="Peak memory of one GPU, by part, from torch's FSDP memory tracker."
    )
    parser.add_argument("--config", default="7b", choices=CONFIGS)
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1, help="rows, or pairs, of one GPU at once")
    parser.add_argument(
        "--length", type=int, default=2048, help="of each: half is the prompt, half a response"
    )
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--cases", default="sft,dpo,sample")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    start = time.time()
    mesh = fake_mesh(args.gpus, args.tp)
    results = measure(
        CONFIGS[args.config],
        mesh,
        args.rows,
        args.length,
        activation_checkpointing=args.activation_checkpointing,
        cases=args.cases.split(","),
    )
    for case, parts in results.items():
        text = ", ".join(f"{name} {gib:.2f}" for name, gib in parts.items() if name != "total")
        print(f"{args.config} on {args.gpus}, {case}: {parts['total']:.2f} GiB a GPU: {text}")
    print(f"traced in {time.time() - start:.0f} s")
    if args.json:
        write_results(args, results)


def write_results(args: argparse.Namespace, results: dict[str, dict[str, float]]):
    settings = {key: v for key, v in vars(args).items() if key not in ("json", "cases")}
    rows = []
    for case, parts in results.items():
        sizes = {name: round(gib * GiB) for name, gib in parts.items()}
        rows.append(settings | {"case": case, "bytes": sizes})
    args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
