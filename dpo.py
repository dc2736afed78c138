"""dpo.py: preferences -> loss. Token ids to packed batches, log-probabilities, the two losses.

Three lines carry the method: the shift by one token and the mask in `collate`, and the margin in
`dpo_loss`. Losses come as sums over items (tokens for SFT, pairs for DPO); the trainer divides by
the number of items in the whole batch, so micro-batches and processes of any size add up to the
same gradient.

Left out: a second model. The frozen reference is two columns of numbers in pairs.jsonl, computed
once before the first update.

Shapes: T tokens of a packed batch, N target tokens, B pairs, D width, V vocabulary, H heads,
K key/value heads, hd head size.
"""

import random
from functools import cached_property, partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # target of a token that is not to be learned
MAX_LOGITS = 1 << 24  # alive at once: 64 MB in fp32, whatever the batch
# keys up to which plain products are faster than a CPU's fused attention in bf16: up to 4 times
MAX_PLAIN_KEYS = 512


# ---- examples -> batches ----------------------------------------------------------------------


def pair_examples(tok, pairs: list[dict]) -> list[tuple]:
    """(prompt ids, chosen ids, rejected ids, reference log-probs) of every pair; responses are
    the sampled ids themselves."""
    examples = []
    for pair in pairs:
        reference = (pair.get("reference_chosen", 0.0), pair.get("reference_rejected", 0.0))
        prompt = tok.chat(pair["prompt"])
        examples.append((prompt, pair["chosen_tokens"], pair["rejected_tokens"], reference))
    return examples


def num_tokens(example: tuple) -> int:
    """Of the prompt and its responses: one (SFT), or two and their reference (DPO)."""
    return sum(map(len, example[:3]))


def make_batches(examples: list[tuple], size: int, epochs: int, key: tuple) -> list[list[int]]:
    """Row numbers of every update: shuffled anew each epoch, rows of like length in one batch, so
    that its micro-batches and processes have equal work.

    Every row is seen once an epoch; the last batch may be smaller.
    """
    lengths = [len(prompt) + max(map(len, rest[:2])) for prompt, *rest in examples]
    window = 32 * size  # rows are sorted by length inside windows of the shuffled order
    batches = []
    for epoch in range(epochs):
        rng = random.Random(repr((*key, epoch)))
        order = list(range(len(examples)))
        rng.shuffle(order)
        by_length = []
        for start in range(0, len(order), window):
            by_length += sorted(order[start : start + window], key=lengths.__getitem__)
        epoch_batches = [by_length[i : i + size] for i in range(0, len(order), size)]
        rng.shuffle(epoch_batches)
        batches += epoch_batches
    return batches


def micro_batches(
    sizes: dict[int, int], most_tokens: int, rank: int, world: int
) -> list[tuple[list[int], float]]:
    """A batch, row number -> tokens, cut into micro-batches of at most most_tokens (unless one
    row has more); those of process `rank` of `world`, each with its weight.

    All processes get equally many of like size, or they would wait for each other in collectives,
    some for ever: a process without rows runs one of the batch's with weight 0.
    """
    most_tokens = max(most_tokens, *sizes.values())
    for each in range(1, len(sizes) + 1):  # micro-batches of a process: the fewest that fit
        parts = [[] for _ in range(each * world)]
        loads = [0] * len(parts)
        for i in sorted(sizes, key=sizes.get, reverse=True):  # the longest first, to the emptiest
            emptiest = loads.index(min(loads))
            parts[emptiest].append(i)
            loads[emptiest] += sizes[i]
        if max(loads) <= most_tokens:
            break
    return [(part, 1.0) if part else ([*sizes][:1], 0.0) for part in parts[rank::world]]


def collate(examples: list[tuple[list[int], ...]], device="cpu"):
    """(prompt ids, response ids, ...) -> tokens and targets, each (1, T), and their PackedBatch.

    A prompt's tokens stand once, in front of its first response. The segment of each further
    response starts with a copy of the prompt's last token, whose output predicts the response's
    first token; it attends to the earlier prompt tokens in the first segment. For a pair:
    [p1 p2 p3 c1 c2] [p3 r1 r2], where the second segment also sees p1 p2.
    targets[0, t] is the token after tokens[0, t] where that belongs to a response, else IGNORE:
    the only shift there is. The mask comes from ids, since encoding prompt and response as one
    text may give other ids.
    """
    tokens, targets, segments = [], [], []
    for prompt, *responses in examples:
        first_segment = len(segments)
        prefix_len = 0
        for response in responses:
            ids = prompt[prefix_len:] + response
            unlearned = len(ids) - 1 - len(response)
            tokens += ids[:-1]
            targets += [IGNORE] * unlearned + response
            segments.append((len(ids) - 1, first_segment, prefix_len))
            prefix_len = len(prompt) - 1
    tokens = torch.tensor([tokens], device=device)
    targets = torch.tensor([targets], device=device)
    return tokens, targets, PackedBatch(segments, device)


def collate_pairs(examples: list[tuple], device="cpu"):
    """B pairs -> tokens, targets and PackedBatch of 2B segments, chosen and rejected in turn, and
    their reference log-probs (2B,)."""
    tokens, targets, batch = collate([example[:3] for example in examples], device)
    logps = [logp for *_, reference in examples for logp in reference]
    return tokens, targets, batch, torch.tensor(logps, dtype=torch.float32, device=device)


class PackedBatch:
    """What tokens see in training: sequences that lie end to end in one row, without padding.

    segments: (length, prefix_of, prefix_len) of each. A segment sees the first prefix_len tokens
    of segment number prefix_of, such as the prompt that two responses share, and then itself,
    causally. `attend` is called by every layer of the model.
    """

    def __init__(self, segments: list[tuple[int, int, int]], device="cpu"):
        self.segments = segments
        self.lengths = [length for length, _, _ in segments]
        positions = [torch.arange(start, start + length) for length, _, start in segments]
        self.positions = torch.cat(positions)[None].to(device)  # (1, T)
        self.masks = None  # made in the first layer, the same in all

    def attend(self, layer: int, q, k, v):
        """Causal attention: q (1, H, T, hd), k and v (1, K, T, hd) -> (1, H, T, hd)."""
        if has_varlen_attention(q):
            return self.attend_varlen(q, k, v)
        if self.masks is None:
            self.masks = [causal_mask(n, start, q) for n, _, start in self.segments]
        qs, ks, vs = (t.split(self.lengths, dim=2) for t in (q, k, v))  # views of the segments
        outputs = []
        for i, (_, prefix_of, prefix_len) in enumerate(self.segments):
            keys, values = ks[i], vs[i]  # (1, K, length, hd)
            if prefix_len:
                keys = torch.cat((ks[prefix_of][:, :, :prefix_len], keys), dim=2)
                values = torch.cat((vs[prefix_of][:, :, :prefix_len], values), dim=2)
            outputs.append(attend_segment(qs[i], keys, values, self.masks[i]).transpose(1, 2))
        return torch.cat(outputs, dim=1).transpose(1, 2)

    def attend_varlen(self, q, k, v):
        """The same by flash attention over sequences of different lengths, on a GPU."""
        # imported here, since it brings torch's compiler along: a second
        from torch.nn.attention.varlen import varlen_attn

        key_index, *ends_and_lengths = self.varlen_index
        q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))  # (T, H or K, hd)
        if key_index is not None:
            k, v = k.index_select(0, key_index), v.index_select(0, key_index)  # (S, K, hd)
        group = q.shape[1] // k.shape[1]
        if group > 1:
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # (S, H, hd)
        # unlimited to the left, nothing to the right; a segment's last query sees all its keys
        out = varlen_attn(q, k, v, *ends_and_lengths, window_size=(-1, 0))
        return out.transpose(0, 1)[None]

    @cached_property
    def varlen_index(self):
        """The keys that segments see in turn (None: all as they lie), where segments end among
        queries and among keys, and the longest of both."""
        device = self.positions.device
        starts = [0, *accumulate(self.lengths)]
        spans = []
        for i, (length, prefix_of, prefix_len) in enumerate(self.segments):
            spans.append(torch.arange(starts[prefix_of], starts[prefix_of] + prefix_len))
            spans.append(torch.arange(starts[i], starts[i] + length))
        key_index = torch.cat(spans).to(device)  # (S,)
        if len(key_index) == starts[-1]:  # no segment has a prefix
            key_index = None
        key_lengths = [length + prefix_len for length, _, prefix_len in self.segments]
        query_ends = torch.tensor(starts, dtype=torch.int32, device=device)
        key_ends = torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32, device=device)
        return key_index, query_ends, key_ends, max(self.lengths), max(key_lengths)


def has_slow_kernel(q, num_keys: int) -> bool:
    """Is fused attention slower than plain products here? On a CPU, in bf16, to few keys."""
    return not q.is_cuda and q.dtype != torch.float32 and num_keys <= MAX_PLAIN_KEYS


def causal_mask(length: int, prefix_len: int, q):
    """(length, prefix_len + length) to add to scores, in the type of q: 0 where a token looks.
    None where the kernel takes a segment without a prefix: it needs no mask and is faster."""
    if not prefix_len and not has_slow_kernel(q, length):
        return None
    mask = torch.full((length, prefix_len + length), -torch.inf, dtype=q.dtype, device=q.device)
    return mask.triu(prefix_len + 1)


def attend_segment(q, k, v, mask):
    """Attention of one segment: q (1, H, T, hd), k and v (1, K, S, hd), the `causal_mask` (T, S)
    -> (1, H, T, hd)."""
    if not has_slow_kernel(q, k.shape[2]):
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=True
        )
    group = q.shape[1] // k.shape[1]
    k, v = (t[0].repeat_interleave(group, 0) for t in (k, v))  # (H, S, hd)
    scores = torch.baddbmm(mask, q[0], k.mT, alpha=q.shape[-1] ** -0.5)  # (H, T, S)
    return (scores.softmax(-1) @ v)[None]


def has_varlen_attention(q) -> bool:
    """Flash attention takes half precision, head sizes that are multiples of 8, recent GPUs."""
    if not q.is_cuda or q.dtype == torch.float32 or q.shape[-1] % 8:
        return False
    return torch.cuda.get_device_capability(q.device)[0] >= 8


# ---- log-probabilities ------------------------------------------------------------------------


def token_logps(hidden, lm_head, targets):
    """Log-probabilities of the targets in fp32, 0 where IGNORE: hidden (1, T, D) -> (1, T).

    The vocabulary projection runs on target positions only, MAX_LOGITS logits at a time, and
    again in the backward pass: the (T, V) tensor that makes DPO run out of memory never exists.
    """

    def logps_of(rows, ids):  # (n, D), (n,) -> (n,)
        return -F.cross_entropy(lm_head(rows).float(), ids, reduction="none")

    mask = targets != IGNORE
    chunk = max(1, MAX_LOGITS // lm_head.out_features)
    row_chunks = hidden[mask].split(chunk)  # of (N, D)
    id_chunks = targets[mask].split(chunk)  # of (N,)
    if len(row_chunks) > 1:
        logps_of = partial(checkpoint, logps_of, use_reentrant=False)
    logps = [logps_of(rows, ids) for rows, ids in zip(row_chunks, id_chunks, strict=True)]
    zeros = hidden.new_zeros(targets.shape, dtype=torch.float32)
    return zeros.masked_scatter(mask, torch.cat(logps))


def sequence_logps(model, tokens, targets, batch: PackedBatch):
    """log pi(response | prompt), summed over its tokens (the end of sequence among them, if it was
    sampled): a number a segment. The sum, not the mean: DPO is not length-normalised."""
    logps = model(tokens, batch, partial(token_logps, targets=targets))  # (1, T)
    return torch.stack([segment.sum() for segment in logps[0].split(batch.lengths)])


# ---- the two losses ---------------------------------------------------------------------------


def sft_loss(model, tokens, targets, batch: PackedBatch):
    """Negative log-likelihood of the targets, summed over tokens, and metrics.

    Raises ValueError when nothing is to be learned.
    """
    if not (targets != IGNORE).any():
        raise ValueError("no target token in this batch: every position is masked")
    loss = -sequence_logps(model, tokens, targets, batch).sum()
    return loss, {"loss": loss.detach()}


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, *, beta: float = 0.1):
    """Direct preference optimisation (Rafailov et al. 2023, eq. 7): sequence log-probs, each (B,)
    -> losses (B,) and metrics (B,).

    Where policy and reference are one model the margin is 0 and the loss ln 2 = 0.693: before
    the first update, dropout apart.
    """
    reward_chosen = beta * (chosen - reference_chosen)  # the implicit reward, eq. 5
    reward_rejected = beta * (rejected - reference_rejected)
    margin = reward_chosen - reward_rejected
    losses = -F.logsigmoid(margin)
    metrics = {
        "loss": losses,
        "margin": margin,
        "accuracy": (margin > 0).float(),
        "reward_chosen": reward_chosen,
        "reward_rejected": reward_rejected,
        "logp_chosen": chosen,
        "logp_rejected": rejected,
    }
    return losses, {name: values.detach() for name, values in metrics.items()}


def preference_loss(model, tokens, targets, batch: PackedBatch, reference, *, beta: float = 0.1):
    """DPO on B pairs, summed over pairs, and sums of its metrics.

    Segments are the chosen and the rejected response of each pair in turn, so one forward pass
    serves both and reads their prompt once. reference (2B,) holds M_t's log-probs of the same.
    """
    logps = sequence_logps(model, tokens, targets, batch)  # (2B,)
    losses, metrics = dpo_loss(logps[::2], logps[1::2], reference[::2], reference[1::2], beta=beta)
    return losses.sum(), {name: values.sum() for name, values in metrics.items()}
