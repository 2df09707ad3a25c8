"""Stage 2 of MergeVQ (arXiv 2504.00999): three generators of codes. MergeAR, RandAR, and the raster baseline.

    python mergear.py                                           # tiny, on out/tokenizer/ckpt.pt, two CPU cores
    python mergear.py --mode raster --out out/raster            # the same without cache compression: the baseline
    python mergear.py --mode randar --out out/randar            # the K merged codes alone, in any order
    python mergear.py --model l --tokenizer out/g/ckpt.pt --batch-size 64 --accum 8                # one GPU
    torchrun --nproc_per_node=8 mergear.py --model l --tokenizer out/g/ckpt.pt --accum 8           # eight GPUs
    python mergear.py --resume                                  # go on where the run in --out stopped

The tokenizer turns an image into K merged codes and `source`; one gather gives every position its code again, and these
L codes, row by row, are the sequence that a class-conditional LLaMA-style transformer learns to continue:

    [class, (merge instruction), x_0, ..., x_{L-2}]  ->  x_0, ..., x_{L-1}

Of the L codes at most K differ. MergeAR attends to the first position of each merged token and to a short window, not to
the other repeats; so a repeat that has left the window can be evicted, and the KV cache has 2 + K + window rows, not L.

RandAR (2412.01827) generates the K merged codes themselves, in an order drawn anew for each sample, several at a time;
source recovery (tokenizer.py) then says where each of them belongs.

Read top to bottom: config, attention mask, code bits, the model, KV caches, sampling, code cache on disk, main.
Axis letters: B batch, R rows of a decoding step (2B under CFG), L positions, K merge count, N codes of a sequence (L, or
K in randar mode), D width, S sub-tokens, T sequence length, P prefix length, h heads, n rows fed to a step.
"""

import copy
import dataclasses
import json
import math
import os
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import UserError, batches, build_dataset, ignore_signals, image_grid, new_array, run_main
from tokenizer import (RunConfig, Stop, adamw, any_rank, append_metrics, arg, check_bad, check_batch, check_ranges, check_trained,
                       disk_may_fail, dry_run, keep_distribution, learning_rate, load_checkpoint, loader_workers, mean_over_ranks,
                       no_sync, parallel, parse_config, plot_curves, prepare_out, reading, resume_command, sample_keep,
                       save_checkpoint, seeded, start_run, tokenizer_from_state, trim_metrics, update_ema, val_loader,
                       weights_hash)


# ---------------------------------------------------------------------------------------------------------------------
# Config. Every field of GPTFlags is a flag; GPTConfig adds what the tokenizer and the data set decide.

MODES = ("raster", "mergear", "randar")
BETAS = {"raster": (0.9, 0.99), "mergear": (0.9, 0.99), "randar": (0.9, 0.95)}  # AdamW, Table A2


@dataclasses.dataclass
class GPTFlags(RunConfig):
    """Defaults are the tiny model's; MODELS lists what the others change."""
    model: str = arg("tiny", "preset: tiny, b, l or xl", choices=("tiny", "b", "l", "xl"))
    mode: str = arg("mergear", "raster (sees every earlier position), mergear (first positions and a window) or randar "
                    "(merged codes in random order)", choices=MODES)
    tokenizer: str = arg("out/tokenizer/ckpt.pt", "checkpoint of tokenizer.py")
    data: str = arg("", "shapes | image folder | .tar or quoted glob of tar shards; empty: what the tokenizer was trained on")
    out: str = arg("out/mergear", "folder for checkpoint, metrics, pictures and the code cache")
    width: int = arg(96, "transformer width D", low=4, high=32768)
    depth: int = arg(4, "transformer blocks", low=1, high=256)
    heads: int = arg(4, "attention heads", low=1, high=1024)
    head_depth: int = arg(1, "blocks over the sub-tokens of one code, when it has more than one", low=0, high=256)
    dropout: float = arg(0.0, "dropout after attention and MLP", low=0.0, high=0.9)
    token_dropout: float = arg(0.0, "share of input codes replaced by a learned mask embedding", low=0.0, high=1.0)
    class_dropout: float = arg(0.1, "share of labels replaced by the null class, which CFG needs", low=0.0, high=1.0)
    label_smoothing: float = arg(0.0, "label smoothing of the cross-entropy", low=0.0, high=0.9)
    window: int = arg(8, "mergear: how many recent positions stay visible whatever their code", low=0, high=1000000)
    duplicate: str = arg("source", "mergear, in training: a position is a repeat if its merged token (source) or its code "
                         "(codes) came before; generation can only see codes", choices=("source", "codes"))
    order: str = arg("random", "randar: order of the merged codes, random, or raster as its baseline",
                     choices=("random", "raster"))
    views: int = arg(2, "views of each image in the code cache: centre crop, mirror image, then random crops", low=1, high=1000)
    cache: str = arg("", "folder of the code cache; empty: OUT/codes; none: encode the images at every step")
    batch_size: int = arg(32, "images an optimizer step, over all ranks and micro-batches", low=1, high=1000000)
    max_steps: int = arg(2800, "optimizer steps; 0: as many as --epochs makes", low=0)
    epochs: int = arg(300, "passes over the data, when --max-steps is 0", low=1)
    lr: float = arg(2e-3, "peak learning rate", low=0.0)
    lr_schedule: str = arg("cosine", "after warm-up: step (x0.1 at 80 and 95 %%), cosine (to 1 %%), constant",
                           choices=("step", "cosine", "constant"))
    warmup: int = arg(100, "linear warm-up steps", low=0)
    weight_decay: float = arg(0.05, "AdamW weight decay of matrices", low=0.0)
    clip: float = arg(1.0, "gradient norm is clipped to this", low=1e-9)
    ema: float = arg(0.999, "decay of the weight average that sampling uses", low=0.0, high=1.0)
    eval_every: int = arg(1400, "steps between evaluations with pictures", low=1)
    save_every: int = arg(700, "steps between checkpoints", low=1)


@dataclasses.dataclass
class GPTConfig(GPTFlags):
    """The flags, and what follows from tokenizer and data. Saved whole in the checkpoint."""
    bits: int = 12             # code bits d
    length: int = 64           # L
    num_classes: int = 10      # 0: unconditional
    class_names: tuple = ()
    keep: int = 36             # the tokenizer's target K
    keeps: tuple = (16, 25, 36, 49, 64)  # every K that a merge instruction exists for, ascending

    @property
    def grid(self):  # the side of the token grid
        return math.isqrt(self.length)

    @property
    def prefix(self):  # P: class, and except in raster mode the instruction
        return 1 if self.mode == "raster" else 2

    @property
    def sub_bits(self):  # how the d bits of a code are divided into sub-tokens, low bits first
        return (self.bits,) if self.bits <= 10 else (6, self.bits - 6)


PAPER = dict(dropout=0.1, token_dropout=0.1, label_smoothing=0.1, window=16, batch_size=1024, max_steps=0,
             lr=1e-4, lr_schedule="step", warmup=1000, head_depth=2, eval_every=5000, save_every=5000)

MODELS = {  # parameters with d = 18 (sub-tokens of 6 + 12 bits), 1,000 classes, L = 1024
    "tiny": {},                                                               # 0.49M with d = 8, 10 classes, L = 64
    "b": dict(PAPER, model="b", width=768, depth=12, heads=12),               # 106M
    "l": dict(PAPER, model="l", width=1024, depth=24, heads=16),              # 343M
    "xl": dict(PAPER, model="xl", width=1280, depth=36, heads=20),            # 784M
}


def check_config(config):
    """Combinations that cannot work, each with its remedy. Raises UserError."""
    if config.width % (4 * config.heads):
        fits = 4 * config.heads * max(1, config.width // (4 * config.heads))
        raise UserError(f"--width {config.width} must be a multiple of 4 x --heads {config.heads}: rotary embedding halves a "
                        f"head between grid rows and columns; pass --width {fits}")
    if config.bits > 20:
        raise UserError(f"the tokenizer's {config.bits} bits would need a {2 ** (config.bits - 6)}-way softmax for the second "
                        "sub-token: train a tokenizer with --bits 20 or fewer")


# Id spaces, defined here and nowhere else
#   class          0 .. num_classes-1, then the null class = num_classes (unlabelled data: only the null class, 0)
#   instruction    0 .. len(keeps)-1: index into config.keeps. Callers pass K itself, the model looks the index up
#   code           0 .. 2^d-1, bit j worth 2^j, as the tokenizer numbers them
#   sub-token s    0 .. 2^sub_bits[s]-1: bits of the code; s = 0 has the low ones
#   rank           0 .. K-1: the number of a merged token, by the raster order of its first position
#   sequence row   t = 0 class, [1 instruction,] then by mode, with what the output at that row predicts below it:
#
#                     raster     c  x_0 x_1 x_2 ... x_{L-2}
#                               x_0 x_1 x_2 x_3 ... x_{L-1}
#                     mergear    c   m  x_0 x_1 x_2 ... x_{L-2}             m: merge instruction, which K
#                                   x_0 x_1 x_2 x_3 ... x_{L-1}             some earlier rows are masked
#                     randar     c   m  p_a x_a p_b x_b p_c ... p_z         a, b, c ... z: the ranks in random order
#                                       x_a     x_b     x_c     x_z         p_a: position instruction, "now rank a"
#
#   seeded() tags  (seed, step, 3) token dropout, (seed, step, 4) class dropout, (seed, step, rank, 5) other dropout,
#                  (seed, step, 6) rows of the code cache, (seed, step, 7) order of the ranks;
#                  (seed, sample) the uniform numbers of one sample


# ---------------------------------------------------------------------------------------------------------------------
# What a position may see (paper Eq. 12 and Figure 6).

@torch.no_grad()
def first_positions(groups, keep=None):
    """(B,L) group ids -> (B,L) bool: is this the first position of its group, one of the first `keep` groups to appear?"""
    ordered, order = groups.sort(dim=1, stable=True)                                       # equal groups side by side
    new = torch.ones_like(groups, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.zeros_like(new).scatter_(1, order, new)                                  # back in raster order
    return first if keep is None else first & (first.cumsum(1) <= keep)


@torch.no_grad()
def mergear_mask(groups, window, keep=None):
    """(B,L) source or codes -> (B,L,L) bool: may position i (axis 1) attend to position j (axis 2)?

    Yes if j is i itself, one of the `window` positions before i, or, however far back, the first position of its group.
    With `keep`, groups after the first `keep` to appear count as repeats from the start: what a cache of that many rows
    can hold.
    """
    i = torch.arange(groups.shape[1], device=groups.device)
    distance = i[:, None] - i                                                              # (L,L)
    return (distance >= 0) & ((distance <= window) | first_positions(groups, keep)[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# A code as one or two small sub-tokens, so that no softmax has 2^18 outputs.

def split_codes(codes, sub_bits):
    """int64 codes (...) -> sub-tokens (...,S); sub-token 0 has the low bits."""
    parts = []
    for n in sub_bits:
        parts.append(codes & (2 ** n - 1))
        codes = codes >> n
    return torch.stack(parts, dim=-1)


def join_codes(subs, sub_bits):
    """Sub-tokens (...,S) -> int64 codes (...); undoes split_codes."""
    offsets = [sum(sub_bits[:s]) for s in range(len(sub_bits))]
    return sum(subs[..., s] << offset for s, offset in enumerate(offsets))


def code_losses(logits, codes, sub_bits, label_smoothing=0.0):
    """Logits of each sub-token, codes (B,L) -> (loss (B,L), bits (B,L,S)): cross-entropy in nats, summed over sub-tokens
    and smoothed; and the plain negative log-likelihood of each sub-token in bits. Without smoothing the loss is
    -log p(code), since p(code) = p(sub_0) p(sub_1 | sub_0)."""
    loss, bits = 0.0, []
    for s, target in enumerate(split_codes(codes, sub_bits).unbind(-1)):
        logp = logits[s].float().log_softmax(-1)                                           # (B,L,2^sub_bits[s])
        nll = -logp.gather(-1, target[..., None])[..., 0]                                  # (B,L)
        loss = loss + (1 - label_smoothing) * nll - label_smoothing * logp.mean(-1)
        bits.append(nll.detach() / math.log(2))
    return loss, torch.stack(bits, dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The model: LLaMA's block (RMSNorm, SwiGLU, rotary positions), twice: along the sequence, and along the sub-tokens.

def rope_table(config, device):
    """cos, sin (P+L, D/h) of the 2D rotary embedding, for rotate(): half of a head's pairs turn with the grid row, half with
    the column. In randar mode all turn with the rank, as merged tokens have no row. Prefix rows are not turned."""
    position = torch.arange(config.length, device=device)
    axes = [position] if config.mode == "randar" else [position // config.grid, position % config.grid]
    pairs = config.width // config.heads // 2 // len(axes)
    frequency = 10_000.0 ** (-torch.arange(pairs, device=device) / pairs)
    angle = torch.cat([axis[:, None] * frequency for axis in axes], dim=1)                 # (L, D/h/2)
    angle = F.pad(angle, (0, 0, config.prefix, 0))                                         # (P+L, D/h/2)
    return torch.cat([angle.cos(), angle.cos()], dim=1), torch.cat([-angle.sin(), angle.sin()], dim=1)


def rope_of_pairs(config, order):
    """cos, sin (B,1,P+2K,D/h) of the sequence c m p_a x_a p_b x_b ...: both rows of a pair turn with its rank."""
    row = F.pad(config.prefix + order.repeat_interleave(2, dim=1), (config.prefix, 0))     # (B,P+2K); prefix: not turned
    return [table[row][:, None] for table in rope_table(config, order.device)]


def rotate(x, cos, sin):
    """Turn each pair (x_n, x_{n + half}) of the last axis by its angle, in float32. The first half of `sin` is negative."""
    y = x.float()
    return (y * cos).addcmul_(y.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def causal_attention(q, k, v):
    """Plain causal attention (N,h,S,D/h) over a handful of sub-tokens: SDPA kernels are made for long sequences, and some
    refuse a batch of more than 65,535, which N = B L easily is."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5                                 # (N,h,S,S)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v


class Linear(nn.Linear):
    """nn.Linear without bias, 1.2 to 1.8 times as fast when sampling in float32 on a CPU: MKL gives a product with few rows to
    one thread, and a batch of products, one for each part of the outputs, to all of them."""
    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, bias=False)

    def forward(self, x):
        W, rows = self.weight, x.numel() // x.shape[-1]
        few = x.device.type == "cpu" and x.dtype == torch.float32 and rows <= 256 and W.numel() >= 2 ** 16
        if not few or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return F.linear(x, W)
        parts, shape = math.gcd(2 * torch.get_num_threads(), len(W)), (*x.shape[:-1], len(W))
        x = x.reshape(1, rows, W.shape[1]).expand(parts, -1, -1)                           # (parts,rows,c_in)
        y = torch.bmm(x, W.view(parts, -1, W.shape[1]).transpose(1, 2))                    # (parts,rows,c_out/parts)
        return y.transpose(0, 1).reshape(shape)


class Block(nn.Module):
    """Pre-norm transformer block. The caller says how to attend: that is where training and the KV caches differ."""
    def __init__(self, config):
        super().__init__()
        D, unit = config.width, 256 if config.width >= 512 else 32
        hidden = math.ceil(8 * D / 3 / unit) * unit  # SwiGLU has three matrices: 2/3 of 4 D, rounded up
        self.heads, self.dropout = config.heads, nn.Dropout(config.dropout)
        self.norm1, self.qkv, self.proj = nn.RMSNorm(D, eps=1e-5), Linear(D, 3 * D), Linear(D, D)
        self.norm2, self.up, self.down = nn.RMSNorm(D, eps=1e-5), Linear(D, 2 * hidden), Linear(hidden, D)

    def forward(self, x, attend, rope=None):
        """x (B,T,D); attend(q, k, v), each (B,h,T,D/h), -> (B,h,T,D/h); rope: cos and sin of the angles of q and k."""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        (q, k), v = qkv[:2] if rope is None else rotate(qkv[:2], *rope), qkv[2]            # (B,h,T,D/h)
        x = x + self.dropout(self.proj(attend(q, k, v).transpose(1, 2).reshape(B, T, D)))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * up))


class GPT(nn.Module):
    """Class-conditional transformer over the codes of an image: all L in raster order, or in randar mode the K merged ones.

    forward() sees whole sequences (training); prefill() and advance(), in randar mode advance_pairs(), go step by step over
    a cache that the caller owns (generation). Both give the same logits.
    """
    def __init__(self, config):
        super().__init__()
        check_config(config)
        self.config, D = config, config.width
        self.class_embed = nn.Embedding(config.num_classes + 1, D)
        self.instruction = nn.Embedding(len(config.keeps), D) if config.mode != "raster" else None
        self.position = nn.Embedding(config.length, D) if config.mode == "randar" else None  # position instructions, by rank
        self.register_buffer("keeps", torch.tensor(config.keeps), persistent=False)
        self.sub_embed = nn.ModuleList(nn.Embedding(2 ** n, D) for n in config.sub_bits)
        self.mask_embed = nn.Parameter(torch.empty(D))  # stands for a dropped input code
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        several = len(config.sub_bits) > 1
        self.head_blocks = nn.ModuleList(Block(config) for _ in range(config.head_depth if several else 0))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.to_logits = nn.ModuleList(Linear(D, 2 ** n) for n in config.sub_bits)
        self.init_weights()

    def init_weights(self):
        """Normal(0.02) everywhere; what adds to the residual stream is scaled down by its number of additions (GPT-2)."""
        for name, p in self.named_parameters():
            if p.dim() == 1 and name != "mask_embed":
                nn.init.ones_(p)  # norms
            else:
                nn.init.normal_(p, std=0.02)
        for blocks in (self.blocks, self.head_blocks):
            for block in blocks:
                for linear in (block.proj, block.down):
                    nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * len(blocks)))

    @property
    def null_class(self):
        return self.config.num_classes

    def embed_prefix(self, labels, keep):
        """labels (B,), keep (B,) int64 (ignored in raster mode) -> (B,P,D): class, and what the merge count is."""
        rows = [self.class_embed(labels)]
        if self.instruction is not None:
            rows.append(self.instruction(torch.searchsorted(self.keeps, keep)))
        return torch.stack(rows, dim=1)

    def embed_codes(self, codes):
        """codes (...) -> (...,D): the sum of the sub-tokens' embeddings."""
        subs = split_codes(codes, self.config.sub_bits)
        return sum(embed(subs[..., s]) for s, embed in enumerate(self.sub_embed))

    def head(self, h, subs):
        """h (...,D) of a position, its first s sub-tokens (...,s) -> logits of sub-tokens 0 .. s, a list of s + 1.

        A tiny causal transformer along the sub-tokens: [h, embedding of sub_0, ...] predicts [sub_0, sub_1, ...].
        """
        tokens = [h] + [self.sub_embed[s](subs[..., s]) for s in range(subs.shape[-1])]
        x = torch.stack(tokens, dim=-2)                                                    # (...,s+1,D)
        shape = x.shape
        x = x.view(-1, *shape[-2:])
        for block in self.head_blocks:
            x = block(x, causal_attention)
        x = self.norm(x).view(shape)
        return [to_logits(x[..., s, :]) for s, to_logits in zip(range(shape[-2]), self.to_logits)]

    def next_sub(self, x, s, past):
        """head() one row at a time, as generation needs it: x (...,D) is h for s = 0, then the embedding of sub-token s - 1;
        past: keys and values of the rows before, a pair for each head block, [] at first -> logits (...,2^sub_bits[s]), past."""
        shape, x, new = x.shape, x.reshape(-1, 1, x.shape[-1]), []

        def attend(q, k, v):
            if past:
                k, v = (torch.cat(pair, dim=2) for pair in zip(past[len(new)], (k, v)))
            new.append((k, v))
            return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v

        for block in self.head_blocks:
            x = block(x, attend)
        return self.to_logits[s](self.norm(x)).view(*shape[:-1], -1), new

    def forward(self, codes, labels, keep=None, mask=None, order=None, dropped=None):
        """codes (B,N) in the order of the sequence, labels (B,), dropped (B,N) bool: inputs to hide. keep (B,): merge
        count, except in raster mode. mask (B,L,L): of mergear_mask, mergear mode only. order (B,K): rank of each code,
        randar mode only.

        Returns the logits of every sub-token given all codes before it and the earlier sub-tokens of its own code: a
        list of S tensors (B,N,2^sub_bits[s]).
        """
        c, P = self.config, self.config.prefix
        given = dict(keep=keep is not None, mask=mask is not None, order=order is not None)
        wanted = dict(keep=c.mode != "raster", mask=c.mode == "mergear", order=c.mode == "randar")
        assert given == wanted, f"mode {c.mode} takes {wanted}, got {given}"
        assert codes.shape[1] == c.length or c.mode == "randar", f"{codes.shape[1]} codes for a model of {c.length}"
        x = self.embed_codes(codes)                                                        # (B,N,D)
        if dropped is not None:
            x = torch.where(dropped[..., None], self.mask_embed.to(x.dtype), x)
        if order is not None:
            x = torch.stack([self.position(order).to(x.dtype), x], dim=2).flatten(1, 2)    # (B,2K,D)
        x = torch.cat([self.embed_prefix(labels, keep), x[:, :-1]], dim=1)                 # (B,T,D), T = P+N-1 or P+2K-1
        T = x.shape[1]
        if mask is not None:
            causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            inner = F.pad(mask[:, :-1, :-1], (P, 0, P, 0), value=True)                     # (B,T,T): prefix always seen
            mask = (causal & inner)[:, None]                                               # (B,1,T,T)
        rope = [table[..., :T, :] for table in (rope_table(c, x.device) if order is None else rope_of_pairs(c, order))]
        attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        for block in self.blocks:
            x = block(x, attend, rope)
        x = x[:, P - 1:] if order is None else x[:, P::2]                                  # (B,N,D): the rows that predict
        return self.head(x, split_codes(codes, c.sub_bits)[..., :-1])

    def new_cache(self, sequences, keep=None):
        """A KV cache for R sequences: compact for at most `keep` first positions in mergear mode, else one row a token."""
        if self.config.mode == "mergear":
            return CompactCache(self, sequences, keep)
        codes = 2 * keep if self.config.mode == "randar" else self.config.length
        return DenseCache(self, sequences, self.config.prefix + codes - 1)  # the last code is never an input

    def prefill(self, labels, keep, cache):
        """Start sequences: labels (R,), keep (R,) -> h (R,D), from which head() predicts x_0."""
        prefix = self.embed_prefix(labels, keep)                                           # (R,P,D)
        for t in range(self.config.prefix):
            h = self._step(prefix[:, t], t, None, cache)
        return h

    def advance(self, codes, i, cache):
        """Append x_i = codes (R,) to each sequence -> h (R,D), from which head() predicts x_{i+1}."""
        return self._step(self.embed_codes(codes), self.config.prefix + i, codes, cache)

    def _step(self, x, t, codes, cache):
        cache.begin(t, codes)
        return self.run_blocks(x[:, None], (cache.cos[t], cache.sin[t]), cache)[:, 0]

    def run_blocks(self, x, rope, cache):
        """x (R,n,D) -> (R,n,D) through all blocks, over a cache that knows where these rows go and what they may see."""
        for layer, block in enumerate(self.blocks):
            # keys are stored turned, so the order of the cache's rows does not matter
            x = block(x, lambda q, k, v: cache.attend(layer, q, k, v), rope)
        return x

    def advance_pairs(self, codes, order, done, cache):
        """Randar: append the codes drawn last, ask for the next ones. codes (R,a), order (R,a+b): the ranks of these
        codes, then of b new ones; done: how many codes came before these -> h (R,b,D), from which head() predicts.

        The a codes are laid out in pairs p x p x ... as in training. Each of the b position instructions sees all of
        them and itself, not the other b - 1; the next call overwrites these rows with pairs. With b = 1 this is
        exactly the model that was trained.
        """
        a, t = codes.shape[1], self.config.prefix + 2 * done
        asked = self.position(order)                                                       # (R,a+b,D)
        pairs = torch.stack([asked[:, :a], self.embed_codes(codes)], dim=2).flatten(1, 2)  # (R,2a,D)
        x = torch.cat([pairs, asked[:, a:]], dim=1)                                        # (R,2a+b,D)
        rank = self.config.prefix + torch.cat([order[:, :a].repeat_interleave(2, dim=1), order[:, a:]], dim=1)
        cache.begin(t, None, x.shape[1], alone=order.shape[1] - a)
        return self.run_blocks(x, (cache.cos[rank][:, None], cache.sin[rank][:, None]), cache)[:, 2 * a:]


# ---------------------------------------------------------------------------------------------------------------------
# KV caches. Allocated once, written in place, never concatenated. One query a step: two bmm and a softmax beat the SDPA
# kernels. Attended lengths are multiples of 32, for kernels that are chosen or compiled by shape.

def bucket(n, limit):
    return min((n + 31) // 32 * 32, limit)


class Cache:
    """Keys and values: for each layer a tensor (R*h, rows, D/h) of its own; and the rotary angles of every sequence row."""
    def __init__(self, gpt, sequences, rows):
        c, weight = gpt.config, gpt.mask_embed
        kind, self.rows = weight.device.type, rows
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        else:
            dtype = weight.dtype if kind != "cpu" else torch.promote_types(weight.dtype, torch.float32)  # bfloat16 is slow there
        layers = lambda: [weight.new_zeros(sequences * c.heads, rows, c.width // c.heads, dtype=dtype) for _ in range(c.depth)]
        self.keys, self.values = layers(), layers()
        self.nbytes = sum(x.nbytes for x in (*self.keys, *self.values))
        self.cos, self.sin = rope_table(c, weight.device)


class DenseCache(Cache):
    """Raster and randar mode: sequence row t is cache row t."""
    def begin(self, t, codes, n=1, alone=0):
        """Where the n tokens of sequence rows t, t + 1, ... go and what they may see: decided once, for all layers. The
        last `alone` of them do not see each other."""
        self.new, self.visible = slice(t, t + n), bucket(t + n, self.rows)
        column = torch.arange(self.visible, device=self.keys[0].device)
        row = column[self.new, None]                                                       # (n,1)
        unseen = (column > row) | (column >= t + n - alone) & (column != row)              # (n,visible)
        self.bias = torch.zeros_like(unseen, dtype=self.keys[0].dtype).masked_fill_(unseen, -math.inf)

    def attend(self, layer, q, k, v):
        """(R,h,n,D/h) each -> (R,h,n,D/h)."""
        keys, values, shape = self.keys[layer], self.values[layer], q.shape
        keys[:, self.new], values[:, self.new] = k.flatten(0, 1), v.flatten(0, 1)
        scores = torch.baddbmm(self.bias, q.flatten(0, 1).to(keys.dtype), keys[:, :self.visible].transpose(1, 2),
                               alpha=shape[-1] ** -0.5)                                    # (Rh,n,visible)
        return torch.bmm(scores.softmax(-1), values[:, :self.visible]).view(shape).to(q.dtype)

    def rows_in_use(self):
        """How many rows hold a token that the next one may attend to: the same for each sequence."""
        return self.new.stop


class CompactCache(Cache):
    """Mergear mode: 2 + window + K rows a sequence, whatever L is.

        row 0        class            never leaves
        row 1        instruction      never leaves
        row 2 ..     ring of `window` slots: the repeat at position i is in slot i % window; it is no longer seen once it
                     is more than `window` back, and the repeat at i + window, if there is one, takes its slot
        then         first positions, appended in order of appearance, at most K; they never leave

    A new code is a repeat if it equals a code among the first positions, or if there are K of those already: exactly
    mergear_mask(codes, window, keep=K). The current token sees itself without being stored, so 2 + window + K is
    a strict bound, and with window 0 a repeat is never stored at all.
    """
    def __init__(self, gpt, sequences, keep):
        c = gpt.config
        self.prefix, self.window, self.keep, self.heads = c.prefix, min(c.window, c.length), keep, c.heads
        self.firsts, self.forever = self.prefix + self.window, c.prefix + c.length  # cache row of the first first position
        super().__init__(gpt, sequences, self.firsts + keep)
        device = self.cos.device
        self.all_keys, self.all_values, self.visible = self.keys, self.values, 0  # see widen
        # bookkeeping, the same for all layers and heads
        self.last_seen = torch.full((sequences, self.rows), -1, device=device)  # last sequence row that may see a cache row
        self.code = torch.full((sequences, self.rows), -1, device=device)       # code of the token in a cache row
        self.count = torch.zeros(sequences, dtype=torch.long, device=device)    # first positions so far
        self.sequence = torch.arange(sequences * c.heads, device=device)

    def widen(self, rows):
        """Make at least so many rows of each sequence visible. `keys` and `values` have only these, without gaps, past which
        a CPU reads at 0.6 of the speed; so what is stored moves, K / 32 times an image.

        A sample must not depend on how many rows its neighbours need. More rows, all unseen, change no bit of it, as far as
        tested (MKL): but for products of fewer than 400 numbers, which ATen computes in another way. So never so few."""
        old, n = self.visible, bucket(max(rows, 400 // self.keys[0].shape[2] + 1), self.rows)
        if n > old:
            part = lambda x, n: x.view(-1)[:x.shape[0] * n * x.shape[2]].view(x.shape[0], n, x.shape[2])
            for x in (*self.all_keys, *self.all_values):
                part(x, n)[:, :old] = part(x, old).clone()
            self.keys, self.values = ([part(x, n) for x in layers] for layers in (self.all_keys, self.all_values))
            self.visible = n

    def begin(self, t, codes):
        """Where the token of sequence row t goes and what it may see: decided once, for all layers. codes: (R,) or None
        for the prefix. Vectorised over the sequences, and the GPU need not tell the CPU anything."""
        i, self.t = t - self.prefix, t
        # rows in use by now; a GPU is not asked, as it would be waited for: there, how many can be
        firsts = int(self.count.max()) if self.count.device.type == "cpu" else min(max(i, 0), self.keep)
        self.widen(self.firsts + firsts + 1)
        unseen = self.last_seen[:, :self.visible] < t
        self.bias = torch.zeros_like(unseen, dtype=self.keys[0].dtype).masked_fill_(unseen, -math.inf)[:, None]   # (R,1,n)
        if codes is None:
            row, seen = torch.full_like(self.count, t), self.forever
            self.stored = None
        else:
            first = (self.code[:, self.firsts:] != codes[:, None]).all(1) & (self.count < self.keep)
            slot = self.prefix + i % self.window if self.window else 0
            row = torch.where(first, self.firsts + self.count, slot)
            # without a ring, a repeat is "stored" in row 0 by writing there what is there already
            seen = torch.where(first, self.forever, t + self.window if self.window else self.forever)[:, None]
            self.stored = None if self.window else first.repeat_interleave(self.heads)[:, None]
            self.code.scatter_(1, row[:, None], codes[:, None])
            self.count += first
        self.last_seen.scatter_(1, row[:, None], seen)
        self.row = row.repeat_interleave(self.heads)                                       # (Rh,)

    def attend(self, layer, q, k, v):
        """(R,h,1,D/h) each -> (R,h,1,D/h). Attend to the rows seen and to oneself; then store oneself."""
        keys, values, shape = self.keys[layer], self.values[layer], q.shape
        dtype = q.dtype
        q, k, v = (x.flatten(0, 1).to(keys.dtype) for x in (q, k, v))                      # (Rh,1,D/h)
        q = q * shape[-1] ** -0.5
        scores = torch.bmm(q, keys.transpose(1, 2))                                        # (Rh,1,n)
        scores = scores.view(-1, self.heads, self.visible) + self.bias                     # (R,h,n)
        itself = (q * k).sum(-1).view(-1, self.heads, 1)                                   # (R,h,1)
        # itself first, so that more rows at the end do not change the order in which softmax adds
        weights = torch.cat([itself, scores], dim=-1).softmax(-1).view(len(q), 1, -1)      # (Rh,1,1+n)
        out = torch.bmm(weights[..., 1:], values) + weights[..., :1] * v
        k, v = k[:, 0], v[:, 0]
        if self.stored is not None:
            k = torch.where(self.stored, k, keys[self.sequence, self.row])
            v = torch.where(self.stored, v, values[self.sequence, self.row])
        keys[self.sequence, self.row], values[self.sequence, self.row] = k, v
        return out.view(shape).to(dtype)

    def rows_in_use(self):
        """How many rows hold a token that the next one may attend to, for each sequence."""
        return (self.last_seen > self.t).sum(1)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling. generate.py and evaluation use it; it is here because training draws pictures too.

def guide(logits, cfg):
    """Classifier-free guidance: logits (2B,V), conditional rows first -> uncond + cfg * (cond - uncond), (B,V)."""
    cond, uncond = logits.float().chunk(2)
    return uncond + cfg * (cond - uncond)


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """One sample of each row by inverting its distribution function: logits (B,V), u (B,) uniform in [0,1) -> (B,).

    top_k > 0 leaves the k most likely (ties with the k-th stay), top_p < 1 the fewest that hold that much probability.
    temperature 0 takes the most likely.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    p = logits.softmax(-1)
    if top_p < 1:
        ordered = p.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered                                              # mass of those ahead
        least = ordered.masked_fill(before >= top_p, math.inf).min(-1, keepdim=True).values
        p = p.masked_fill(p < least, 0.0)
    cumulative = p.cumsum(-1, dtype=u.dtype)                                               # float64 but on MPS
    total = cumulative[:, -1]
    at = torch.minimum(u * total, total * (1 - torch.finfo(u.dtype).eps))                  # never beyond the last
    return torch.searchsorted(cumulative, at[:, None], right=True)[:, 0]


def in_chunks(function, start, device, *tensors, chunk=None):
    """function over rows of `tensors` that are samples start, start + 1, ..., always `chunk` rows at a time.

    Rounding depends on the shapes a kernel is called with, and on the place of a row in them; and one flipped bit changes
    all codes after it. So sample n is always row n % chunk of a call with `chunk` rows (default: 16 on a CPU, 32 on
    a GPU), some of them empty at the ends. Then its result is the same, bit for bit, whatever the batch it came in.
    """
    chunk = chunk or (16 if device.type == "cpu" else 32)
    before, count = start % chunk, len(tensors[0])
    after = -(before + count) % chunk
    pieces = [F.pad(x, (0, 0) * (x.dim() - 1) + (before, after)).split(chunk) for x in tensors]
    return torch.cat([function(*(x.to(device) for x in piece)) for piece in zip(*pieces)])[before:before + count]


def arccos_steps(keep, steps=None):
    """How many of `keep` codes each step of parallel decoding draws: few while little is known, many at the end, at least
    one, summing to keep. Codes known after share r of the steps: 1 - 2/pi arccos(r), MaskGIT's (2202.04200) arccos.

    steps None: the paper's 64 for 144 codes and 88 for 256, and the power law through both for others.
    """
    steps = max(1, min(keep, round(64 * (keep / 144) ** 0.5535))) if steps is None else steps
    assert 1 <= steps <= keep, f"{steps} steps for {keep} codes: pass 1 to {keep}"
    counts, known = [], 0
    for s in range(1, steps + 1):
        aim = round(keep * (1 - 2 / math.pi * math.acos(s / steps)))
        counts.append(max(1, min(aim - known, keep - known - (steps - s))))
        known += counts[-1]
    return counts


@torch.no_grad()
def sample_codes(gpt, labels, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0, seed=0, start=0, keep=None, steps=None,
                 cfg_schedule="constant", chunk=None):
    """Generate: labels (B,) class ids -> codes (B,N) int64: L in raster order, in randar mode K by rank. Sample i depends on
    (seed, start + i) and its label only: not on B, nor on the other samples (on one machine, for one dtype and chunk; see
    in_chunks).

    cfg: guidance scale; 1.0 runs one row a sample, anything else two. cfg_schedule linear: the scale grows from 1 to cfg
    with the share of codes known. keep: the merge count told to the model (default: the tokenizer's target), in mergear
    mode also the bound of its cache, in randar mode the number of codes. steps: of parallel decoding, randar mode only
    (default: see arccos_steps; `keep` steps draw one code at a time). With codes of two sub-tokens, temperature, top_k and
    top_p act on each in turn: top_k = 10 leaves up to 10 x 10 codes, top_p = 0.9 at least 0.9 x 0.9 of the probability.
    The arithmetic is that of gpt's weights: gpt.to(torch.bfloat16) samples in bfloat16, and caches in it, but on a CPU, where
    attention is in float32.
    """
    c, device = gpt.config, gpt.mask_embed.device
    assert not gpt.training, "sample from a model in eval mode"
    assert c.mode == "randar" or steps is None, f"steps {steps} was passed, but a {c.mode} model draws one code at a time"
    if c.mode == "raster":
        assert keep is None, f"keep {keep} was passed, but a {c.mode} model has no merge instruction"
    else:
        keep = c.keep if keep is None else keep
        assert keep in c.keeps, f"keep {keep} is not one of the merge counts {c.keeps} of this model"
    # the only randomness: a uniform number for each sub-token of each code, and in randar mode the order of the codes
    noise, order = [], []
    for i in range(len(labels)):
        generator = seeded(seed, start + i)
        noise.append(torch.rand(c.length, len(c.sub_bits), dtype=torch.float64, generator=generator))
        order.append(draw_orders(c, 1, keep or c.length, generator))
    noise, order = torch.stack(noise), torch.cat(order)                                    # (B,L,S), (B,K)
    noise = noise.float() if device.type == "mps" else noise
    copies = 1 if cfg == 1.0 else 2

    def pick(h, noise, share):  # share of the codes that will be known after this
        scale = 1 + (cfg - 1) * share if cfg_schedule == "linear" else cfg
        return pick_codes(gpt, h, noise, copies, scale, temperature, top_k, top_p)

    def decode(labels, noise, order):
        if copies == 2:
            labels = torch.cat([labels, torch.full_like(labels, gpt.null_class)])          # (2B,)
        told = None if keep is None else torch.full_like(labels, keep)
        cache = gpt.new_cache(len(labels), keep)
        h = gpt.prefill(labels, told, cache)
        if c.mode == "randar":
            return decode_parallel(gpt, cache, noise, order, arccos_steps(keep, steps), copies, pick)
        return decode_in_turn(gpt, cache, h, noise, copies, pick)

    return in_chunks(decode, start, device, labels, noise, order, chunk=chunk)


def pick_codes(gpt, h, noise, copies, scale, temperature=1.0, top_k=0, top_p=1.0):
    """n codes of each sample, sub-token by sub-token: h (copies*B,n,D), noise (B,n,S) uniform -> (B,n)."""
    subs, past, x = [], [], h
    for s in range(noise.shape[-1]):
        logits, past = gpt.next_sub(x, s, past)                                            # (copies*B,n,2^sub_bits[s])
        logits = guide(logits, scale) if copies == 2 else logits                           # (B,n,2^sub_bits[s])
        subs.append(draw(logits.flatten(0, 1), noise[..., s].flatten(), temperature, top_k, top_p).view(noise.shape[:2]))
        x = gpt.sub_embed[s](subs[-1].repeat(copies, 1))  # both halves of CFG continue with the same sub-tokens
    return join_codes(torch.stack(subs, dim=-1), gpt.config.sub_bits)


def draw_orders(config, samples, keep, generator):
    """An order of the ranks 0 .. keep-1 for each sample: random, or with --order raster the identity. (samples,keep)"""
    if config.order == "raster":
        return torch.arange(keep).expand(samples, -1)
    return torch.rand(samples, config.length, generator=generator)[:, :keep].argsort(dim=1)


def decode_in_turn(gpt, cache, h, noise, copies, pick):
    """One code after the other, in raster order -> codes (B,L)."""
    L, codes = noise.shape[1], []
    for i in range(L):
        codes.append(pick(h[:, None], noise[:, i:i + 1], (i + 1) / L)[:, 0])
        if i < L - 1:
            h = gpt.advance(codes[-1].repeat(copies), i, cache)
    return torch.stack(codes, dim=1)


def decode_parallel(gpt, cache, noise, order, counts, copies, pick):
    """counts[0] codes at once, then counts[1], ... in the given order of ranks (B,K) -> codes (B,K) by rank."""
    codes = order[:, :0]                                                                   # (B,0), then the last ones
    drawn, old, known = [], 0, 0  # codes before `codes`, and with them
    for n in counts:
        h = gpt.advance_pairs(codes.repeat(copies, 1), order[:, old:known + n].repeat(copies, 1), old, cache)
        codes = pick(h, noise[:, known:known + n], (known + n) / order.shape[1])
        drawn.append(codes)
        old, known = known, known + n
    return torch.empty_like(order).scatter_(1, order, torch.cat(drawn, dim=1))


@torch.no_grad()
def decode_codes(gpt, tokenizer, codes, start=0, chunk=None):
    """Generated codes (B,N), of samples start, start + 1, ... -> images (B,3,H,W). In raster order every position has its
    own code; for the merged codes of randar mode, source recovery says which position gets which."""
    positions = torch.arange(tokenizer.config.length, device=codes.device)

    def decode(codes):
        source = tokenizer.recover(codes) if gpt.config.mode == "randar" else positions.expand_as(codes)
        return tokenizer.decode(codes, source)

    return in_chunks(decode, start, codes.device, codes, chunk=chunk)


def load_generator(path, device="cpu"):
    """Checkpoint of this script -> (GPT, MergeVQ), both in eval mode with EMA weights. Raises UserError on a bad file."""
    state = load_checkpoint(path, "generator")
    with reading(path):
        config = GPTConfig(**state["config"])
        check_ranges(config)
        gpt = GPT(config)
        gpt.load_state_dict(state["ema"])
        return gpt.to(device).eval().requires_grad_(False), tokenizer_from_state(state["tokenizer"], device)


# ---------------------------------------------------------------------------------------------------------------------
# The code cache: every view of every image encoded once, in memory-mapped files.
#   codes.npy (V N, L) int32 after recovery | source.npy (V N, L) int16 | labels.npy, keep.npy (V N,) int32 | meta.json
# Row v N + i is view v of image i. meta.json says what the codes were made from and is written last.

COLUMNS = dict(codes=np.int32, source=np.int16, labels=np.int32, keep=np.int32)


def read_meta(folder):
    """The meta.json of a code cache; None where there is none. Raises UserError when it cannot be read."""
    try:
        with open(os.path.join(folder, "meta.json")) as f:
            return dict(json.load(f))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as e:
        raise UserError(f"the code cache {folder} is damaged (meta.json: {e}): delete that folder, and it is made anew")


class CodeDataset(Dataset):
    """ds[i], or a batch ds[rows] -> (codes (L,), source (L,), label). Item i < len is view 0 of image i. .keep: K by row."""
    def __init__(self, folder):
        self.meta = read_meta(folder)
        try:
            *self.columns, self.keep = [np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r") for name in COLUMNS]
            fits = all(len(column) == self.meta["views"] * self.meta["images"] for column in (*self.columns, self.keep))
        except Exception:  # a damaged file can raise anything
            fits = False
        if not fits:
            raise UserError(f"the code cache {folder} is damaged: delete that folder, and it is made anew")

    def __len__(self):
        return self.meta["images"]

    def __getitem__(self, rows):
        return tuple(torch.from_numpy(np.array(column[rows], dtype=np.int64)) for column in self.columns)


def code_batches(codes, tokenizer_config, batch_size, seed, step, drawn, accum, rank, world):
    """Endless micro-batches (codes, source, labels, K) of this rank from a CodeDataset: what `batches` is for images. A step
    has one K, drawn as in stage 1 if `drawn`; which rows with it is a function of (seed, step), as in nanoGPT's get_batch."""
    rows_with = {k: np.flatnonzero(codes.keep == k) for k in np.unique(codes.keep).tolist()}
    micro = batch_size // (world * accum)
    while True:
        K = sample_keep(tokenizer_config, seed, step) if drawn else tokenizer_config.keep
        K = K if K in rows_with else tokenizer_config.keep  # a small cache may lack a rare one
        picked = rows_with[K][torch.randint(len(rows_with[K]), (batch_size,), generator=seeded(seed, step, 6)).numpy()]
        for m in range(accum):
            yield *codes[picked[(m * world + rank) * micro:(m * world + rank + 1) * micro]], K
        step += 1


class Views(Dataset):
    """Item (v, i) of a data set: view v of image i."""
    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, key):
        return self.dataset.view(key[1], key[0])


def open_codes(folder, dataset, tokenizer, config, run, views, drawn, replace=False):
    """The CodeDataset in `folder`, made now if it is not there. drawn: views after the first draw K as in training.

    A cache made from anything else is refused: UserError, or replaced if `replace`. Encoding is split over the ranks.
    """
    meta = dict(tokenizer=weights_hash(tokenizer.state_dict()), data=config.data, images=len(dataset), size=tokenizer.config.size,
                keep=tokenizer.config.keep, drawn=drawn, views=views, seed=config.seed)
    found = read_meta(folder)
    if found is not None:
        wrong = [name for name in meta if found.get(name) != meta[name]]
        if wrong and not replace:
            short = lambda value: str(value)[:12] if wrong[0] == "tokenizer" else value
            raise UserError(f"the code cache {folder} was made with {wrong[0]} {short(found.get(wrong[0]))}, this run has "
                            f"{wrong[0]} {short(meta[wrong[0]])}: delete that folder, or pass --cache another-folder")
        found = None if wrong else found
    if run.world > 1:
        dist.barrier()  # all ranks have looked before one of them writes
    if found is None:
        extract_codes(folder, dataset, tokenizer, config, run, meta)
    return CodeDataset(folder)


@torch.no_grad()
def extract_codes(folder, dataset, tokenizer, config, run, meta, batch=64):
    """Encode every view into `folder`, under temporary names until all of it is there. In float32: it is done once."""
    views, rows, L = meta["views"], meta["views"] * len(dataset), tokenizer.config.length
    temporary = {name: os.path.join(folder, f"{name}.npy.tmp") for name in COLUMNS}
    if run.main:
        try:
            os.makedirs(folder, exist_ok=True)
            if os.path.exists(os.path.join(folder, "meta.json")):
                os.remove(os.path.join(folder, "meta.json"))  # from now on there is no valid cache here
            for name, dtype in COLUMNS.items():
                new_array(temporary[name], dtype, (rows, L) if name in ("codes", "source") else (rows,))
        except OSError as e:
            raise UserError(f"the code cache {folder} cannot be written ({e.strerror}); pass --cache another-folder or none")
    if run.world > 1:
        dist.barrier()
    files = {name: np.lib.format.open_memmap(path, "r+") for name, path in temporary.items()}
    # batches of one view; number b of them goes to rank b % world, and has one K
    jobs = [(v, first) for v in range(views) for first in range(0, len(dataset), batch)]
    mine = range(run.rank, len(jobs), run.world)
    keys = ([(v, i) for i in range(first, min(first + batch, len(dataset)))] for v, first in (jobs[b] for b in mine))
    loader = DataLoader(Views(dataset), batch_sampler=keys, num_workers=max(0, config.workers), worker_init_fn=ignore_signals)
    bar = tqdm(loader, f"encoding {os.path.basename(folder)}", len(mine), unit="batch", disable=not run.main, dynamic_ncols=True)
    for (images, labels), b in zip(bar, mine):
        view, first = jobs[b]
        keep = sample_keep(tokenizer.config, config.seed, b) if meta["drawn"] and view > 0 else tokenizer.config.keep
        encoded = tokenizer.encode(images.to(run.device), keep)
        at = slice(view * len(dataset) + first, view * len(dataset) + first + len(images))
        files["codes"][at] = encoded.codes.gather(1, encoded.source).cpu().numpy()
        files["source"][at] = encoded.source.cpu().numpy()
        files["labels"][at], files["keep"][at] = labels.numpy(), keep
    for file in files.values():
        file.flush()
    if run.world > 1:
        dist.barrier()
    if run.main:
        for name, path in temporary.items():
            os.replace(path, os.path.join(folder, f"{name}.npy"))
        with open(os.path.join(folder, "meta.json.tmp"), "w") as f:
            json.dump(meta, f, indent=1)
        os.replace(os.path.join(folder, "meta.json.tmp"), os.path.join(folder, "meta.json"))
    if run.world > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation

def encode_batch(batch, tokenizer, keep, device):
    """A batch of a CodeDataset, or of images and labels that are encoded now -> codes (B,L), source (B,L), labels (B,)."""
    batch = [x.to(device, non_blocking=True) for x in batch]
    if len(batch) == 3:
        return batch
    with torch.no_grad():
        encoded = tokenizer.encode(batch[0], keep)
    return encoded.codes.gather(1, encoded.source), encoded.source, batch[1]


def to_sequence(config, codes, source, keep, order):
    """What a mode makes of codes (B,L) and source (B,L) with K = keep: the sequence (B,N), and forward()'s arguments beside
    the labels. order (B,K): of the ranks, which randar mode uses."""
    if config.mode == "raster":
        return codes, {}
    told = torch.full_like(codes[:, 0], keep)
    if config.mode == "mergear":
        return codes, dict(keep=told, mask=mergear_mask(source if config.duplicate == "source" else codes, config.window))
    merged = torch.zeros_like(order).scatter_(1, source, codes)                            # (B,K): each code once
    return merged.gather(1, order), dict(keep=told, order=order)


@torch.no_grad()
def evaluate(gpt, dataset, tokenizer, config, run):
    """Negative log-likelihood of the validation codes at the target K, bits a token, over all ranks. In randar mode a
    token is one of K, not of L, and one random order serves all images."""
    sums = torch.zeros(1 + len(config.sub_bits), device=run.device)                        # tokens, bits of each sub-token
    order = draw_orders(config, 1, config.keep, seeded(0)).to(run.device)
    for batch in val_loader(dataset, config, run, config.eval_num):
        codes, source, labels = encode_batch(batch, tokenizer, config.keep, run.device)
        codes, inputs = to_sequence(config, codes, source, config.keep, order.expand(len(codes), -1))
        with run.autocast():
            logits = gpt(codes, labels, **inputs)
        _, bits = code_losses(logits, codes, config.sub_bits)
        sums += torch.cat([sums.new_tensor([codes.numel()]), bits.sum((0, 1))])
    if run.world > 1:
        dist.all_reduce(sums)
    bits = (sums[1:] / sums[0]).tolist()
    return dict(val_bits=sum(bits), **{f"val_bits_{s}": value for s, value in enumerate(bits)})


def draw_samples(gpt, tokenizer, config, path, num=20, cfg=2.0):
    """PNG: `num` images, the classes in turn, as generate.py makes them."""
    labels = torch.arange(num) % max(1, config.num_classes)
    codes = sample_codes(gpt, labels, cfg if config.num_classes else 1.0, seed=config.seed)
    names = [config.class_names[n] for n in labels] if config.num_classes else None
    image_grid(decode_codes(gpt, tokenizer, codes).cpu(), path, labels=names)


# ---------------------------------------------------------------------------------------------------------------------
# Training

CURVES = ("loss", "bits", "val_bits", "bits_0", "bits_1", "val_bits_0", "val_bits_1", "grad_norm", "lr")


def main(argv=None):
    flags = parse_config(GPTFlags, __doc__, MODELS, "model", argv)
    ckpt_path = os.path.join(flags.out, "ckpt.pt")
    # a resumed run keeps the tokenizer inside its checkpoint, whatever has become of the file
    state = load_checkpoint(ckpt_path, "generator") if flags.resume and os.path.exists(ckpt_path) else None
    source = state or load_checkpoint(flags.tokenizer, "tokenizer")
    with reading(ckpt_path if state else flags.tokenizer):
        source = source["tokenizer"] if state else source
        tokenizer_state = dict(config=source["config"], ema=source["ema"])
        tokenizer = tokenizer_from_state(tokenizer_state)
    del source
    t = tokenizer.config
    flags.data = flags.data or t.data
    train_set = build_dataset(flags.data, "train", t.size, train=True, seed=flags.seed)
    val_set = build_dataset(flags.data, "val", t.size, train=False)
    flags.max_steps = flags.max_steps or max(1, flags.epochs * len(train_set) // flags.batch_size)
    flags.workers = loader_workers(flags)
    config = GPTConfig(**vars(flags), bits=t.bits, length=t.length, num_classes=train_set.num_classes,
                       class_names=tuple(train_set.class_names), keep=t.keep, keeps=tuple(keep_distribution(t)[0]))
    check_config(config)
    for name in ("mode", "width", "depth", "heads", "head_depth", "window", "order", "num_classes") if state else ():
        if state["config"].get(name) != getattr(config, name):
            raise UserError(f"--resume: the run in {config.out} has {name} {state['config'].get(name)}, this one would have "
                            f"{getattr(config, name)}; pass the flags that it was started with")
    run = start_run(config)
    check_batch(config, run)
    prepare_out(config, run)
    tokenizer.to(run.device)
    # before the code cache, which may take hours to make
    dry_run("generator", train, config, run, train_set, val_set, train_set, tokenizer, tokenizer_state, Stop(), cache="none")
    train_images, drawn = train_set, config.mode != "raster"  # the baseline sees the target K only
    if config.cache != "none":
        folder, replace = config.cache or os.path.join(config.out, "codes"), config.overwrite and not config.cache
        train_set = open_codes(os.path.join(folder, "train"), train_set, tokenizer, config, run, config.views, drawn, replace)
        val_set = open_codes(os.path.join(folder, "val"), val_set, tokenizer, config, run, 1, False, replace)
    with Stop() as stop:
        step = train(config, run, train_set, val_set, train_images, tokenizer, tokenizer_state, stop, state)
    if run.main:
        if step < config.max_steps:
            print(f"stopped and saved at step {step}; to go on: {resume_command('mergear.py', argv, run.world)}")
        else:
            print(f"done: {ckpt_path}, samples_{step:07d}.png, curves.png; next: python generate.py --ckpt {ckpt_path}")
    if run.world > 1:
        dist.destroy_process_group()


def train(config, run, train_set, val_set, train_images, tokenizer, tokenizer_state, stop, state=None):
    """Train until --max-steps or stop.asked, from the start or from the state of a checkpoint. Returns the step reached.

    The sets hold codes, or images that are encoded at every step; train_images are the images behind them.
    """
    torch.manual_seed(config.seed)  # the same weights on every rank

    raw_model = GPT(config).to(run.device)
    ema = copy.deepcopy(raw_model).eval().requires_grad_(False)
    optimizer = adamw(raw_model.named_parameters(), config, BETAS[config.mode], config.weight_decay, run.device)
    step, skipped = 0, 0
    if state:
        with reading(f"--resume: {config.out}/ckpt.pt"):
            for module, name in ((raw_model, "model"), (ema, "ema"), (optimizer, "optimizer")):
                module.load_state_dict(state[name])
            step, skipped = state["step"], state["skipped"]

    if config.compile:
        raw_model.compile()
    model = parallel(raw_model, run)
    t, drawn = tokenizer.config, config.mode != "raster"
    if config.cache == "none":
        stream = batches(train_set, config.batch_size, config.seed, step, config.accum, run.rank, run.world, config.workers)
    else:
        stream = code_batches(train_set, t, config.batch_size, config.seed, step, drawn, config.accum, run.rank, run.world)
    micro = config.batch_size // (run.world * config.accum)
    if run.main:
        count = sum(p.numel() for p in raw_model.parameters())
        print(f"{config.model}, {config.mode}: {count / 1e6:.2f}M parameters, {config.num_classes} classes, L = {config.length} "
              f"codes of d = {config.bits} bits as sub-tokens of {' + '.join(map(str, config.sub_bits))}")
        if config.mode == "randar":
            print(f"K = {config.keep} of {list(config.keeps)} merged codes in {config.order} order")
        if config.mode == "mergear":
            print(f"K = {config.keep} of {list(config.keeps)}, window {config.window}: {2 + config.keep + config.window} rows of "
                  f"KV cache a sample, raster has {config.length}; repeats in training by {config.duplicate}")
        print(f"{len(train_set)} train and {len(val_set)} val images of {config.data}, "
              f"{config.max_steps} steps of {config.batch_size}")

    metrics_path = os.path.join(config.out, "metrics.jsonl")
    if run.main:
        trim_metrics(metrics_path, step)
    bar = tqdm(total=config.max_steps, initial=step, disable=not run.main, dynamic_ncols=True)
    logged_at, logged_step, unsaved, stopping, streak = time.time(), step, False, False, 0
    while True:
        # evaluate, draw, save: N steps make N + 1 passes here, so that the end is no special case
        last = step == config.max_steps
        if last or step % config.eval_every == 0 and step > 0 and not stopping:
            scores = evaluate(ema, val_set, tokenizer, config, run)
            if run.main:
                append_metrics(metrics_path, step=step, **scores)
                with disk_may_fail():
                    draw_samples(ema, tokenizer, config, os.path.join(config.out, f"samples_{step:07d}.png"))
                    plot_curves(metrics_path, os.path.join(config.out, "curves.png"), CURVES)
                bar.write(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in scores.items()))
        if last or stopping or step > 0 and step % config.save_every == 0 or unsaved and step % config.log_every == 0:
            unsaved = True  # until it is done: then it is tried again with the next line of the log
            with disk_may_fail(must=last or stopping):
                if run.main:
                    save_checkpoint(os.path.join(config.out, "ckpt.pt"), "generator", config.keep_last, step=step,
                                    skipped=skipped, config=dataclasses.asdict(config), class_names=list(config.class_names),
                                    model=raw_model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(),
                                    tokenizer=tokenizer_state)
                unsaved = False
        if last or stopping:
            break

        # one optimizer step
        lr = learning_rate(step, config)
        step_keep = sample_keep(t, config.seed, step) if drawn else t.keep  # only for --cache none
        for group in optimizer.param_groups:
            group["lr"] = lr
        # randomness of the whole batch, of which this rank uses its rows; nn.Dropout's alone differs between ranks
        dropped = torch.rand(config.batch_size, config.length, generator=seeded(config.seed, step, 3)) < config.token_dropout
        unlabelled = torch.rand(config.batch_size, generator=seeded(config.seed, step, 4)) < config.class_dropout
        torch.manual_seed(seeded(config.seed, step, run.rank, 5).initial_seed())
        raw_model.train()
        logs = {}
        for m in range(config.accum):
            *batch, keep = next(stream) if config.cache != "none" else (*next(stream), step_keep)
            codes, source, labels = encode_batch(batch, tokenizer, keep, run.device)
            rows = slice((m * run.world + run.rank) * micro, (m * run.world + run.rank + 1) * micro)
            order = draw_orders(config, config.batch_size, keep, seeded(config.seed, step, 7))[rows].to(run.device)
            codes, inputs = to_sequence(config, codes, source, keep, order)
            labels = labels.masked_fill(unlabelled[rows].to(run.device), raw_model.null_class)
            with no_sync(m < config.accum - 1, model):
                with run.autocast():
                    logits = model(codes, labels, **inputs, dropped=dropped[rows, :codes.shape[1]].to(run.device))
                loss, bits = code_losses(logits, codes, config.sub_bits, config.label_smoothing)
                (loss.mean() / config.accum).backward()
            bits = bits.mean((0, 1))
            for name, value in dict(loss=loss.mean(), bits=bits.sum(), **{f"bits_{s}": b for s, b in enumerate(bits)}).items():
                logs[name] = logs.get(name, 0.0) + value.detach() / config.accum

        if step == 0:
            check_trained(raw_model.named_parameters(), optimizer)
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip)
        bad, stopping = any_rank(run, ~torch.isfinite(norm + sum(logs.values())), stop.asked)
        if not bad:
            streak = 0
            optimizer.step()
            update_ema(ema, raw_model, config.ema, step)
        else:  # a bad step changes nothing
            skipped, streak = skipped + 1, streak + 1
            check_bad(streak, step, config)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update(1)

        if step % config.log_every == 0 or step == config.max_steps:
            logs = {name: mean_over_ranks(value).item() for name, value in logs.items()}
            for name in train_images.check_skipped():
                bar.write(f"unreadable image skipped: {name}")
            speed = (step - logged_step) * config.batch_size / (time.time() - logged_at)
            logged_at, logged_step = time.time(), step
            if run.main:
                append_metrics(metrics_path, step=step, **logs, grad_norm=norm, lr=lr, images_per_s=speed, skipped=skipped)
                bar.set_postfix(bits=f"{logs['bits']:.3f}", im_s=f"{speed:.0f}", skipped=skipped)
    bar.close()
    return step


if __name__ == "__main__":
    run_main(main)
