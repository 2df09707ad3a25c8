"""Stage 2 of MergeVQ (arXiv 2504.00999): generators of codes. Raster, MergeAR and RandAR.

    python mergear.py                                  # tiny MergeAR on out/tokenizer/ckpt.pt
    python mergear.py --mode raster --out out/raster   # the baseline: no cache compression
    python mergear.py --mode randar --out out/randar   # the merged codes only, in random order
    python mergear.py --model l --tokenizer out/g/ckpt.pt --batch-size 64 --accum 8   # one GPU
    torchrun --nproc_per_node=8 mergear.py --model l --tokenizer out/g/ckpt.pt        # eight GPUs
    python mergear.py --resume                         # continue the run in --out

The tokenizer turns an image into K merged codes and `source`. One gather gives each of the L
positions its code again. Three models learn these codes. Each is a change to the one before:

    raster    [class, x_0, ..., x_{L-2}] -> x_0, ..., x_{L-1}, row by row (LlamaGen, 2406.06525)
    mergear   raster with a merge instruction. A position sees the first position of each merged
              token and a short window. So the KV cache has 2 + K + window rows, not L
    randar    the K merged codes only, in an order drawn anew for each sample, several per step
              (RandAR, 2412.01827). The model also predicts where each of them comes first, and
              source recovery (tokenizer.py) fills the other positions

In reading order: config, attention mask, sub-tokens, the model, losses, KV caches, sampling, code
cache on disk, evaluation, training. Axis letters: B samples, R rows of a decoding step (2B under
guidance), L positions, K merge count, N codes of a sequence (L, or K in randar mode), D width,
S sub-tokens, T sequence length, P prefix length, h heads, n tokens fed or drawn in one step.
"""

import copy
import dataclasses
import functools
import json
import math
import os
import shutil
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import (Metrics, RunConfig, UserError, View, adamw, arg, build_dataset, catch_signals,
                  end_run, image_grid, learning_rate, load_batches, load_checkpoint, load_parts,
                  loader_workers, make_folder, micro_batch, open_out, parallel, parse_config,
                  presets, run_main, save_checkpoint, seeded, start_run, step_if_finite, subset,
                  update_ema, weights_hash)
from tokenizer import (first_position_of_token, keep_distribution, sample_keep,
                       tokenizer_from_state)

# -----------------------------------------------------------------------------
# Config. Every field of GPTFlags is a flag. GPTConfig adds what tokenizer and data decide.

MODES = ("raster", "mergear", "randar")
BETAS = {"raster": (0.9, 0.99), "mergear": (0.9, 0.99), "randar": (0.9, 0.95)}  # AdamW, Table A2

@dataclasses.dataclass
class GPTFlags(RunConfig):
    """One column per preset: tiny for a CPU, and three sizes of LlamaGen (paper: l)."""
    #                        tiny   b      l      xl
    model: str = arg(        "tiny", "b",  "l",   "xl", help="preset: tiny, b, l or xl")
    mode: str = arg("mergear", help="raster, mergear or randar", choices=MODES)
    tokenizer: str = arg("out/tokenizer/ckpt.pt", help="checkpoint of tokenizer.py")
    data: str = arg("", help="as in tokenizer.py; empty: what the tokenizer was trained on")
    out: str = arg("out/mergear")
    cache: str = arg("", help="folder of the code cache; empty: OUT/codes")
    views: int = arg(2, help="views of each image in the code cache: centre crop, its mirror "
                     "image, then random crops", low=1, high=1000)
    # the transformer
    width: int = arg(        96,    768,   1024,  1280, help="transformer width D", low=4)
    depth: int = arg(        4,     12,    24,    36,   help="transformer blocks", low=1)
    heads: int = arg(        4,     12,    16,    20,   help="attention heads", low=1)
    head_depth: int = arg(   1,     2,     2,     2,    help="blocks over the sub-tokens of a code",
                             low=0)
    window: int = arg(       8,     16,    16,    16,   low=0,
                             help="mergear: recent positions that stay visible")
    # the loss
    dropout: float = arg(    0.0,   0.1,   0.1,   0.1,  help="dropout after attention and MLP",
                             low=0, high=0.9)
    token_dropout: float = arg(0.0, 0.1,   0.1,   0.1,  low=0, high=1,
                               help="share of input codes hidden by a learned embedding")
    label_smoothing: float = arg(0.0, 0.1, 0.1,   0.1,  help="label smoothing of the codes' loss",
                                 low=0, high=0.9)
    class_dropout: float = arg(0.1, help="share of labels replaced by the null class, for guidance",
                               low=0, high=1)
    w_position: float = arg(0.3, help="randar: weight of the positions' loss", low=0)
    duplicate: str = arg("source", help="mergear, in training: a position is a repeat when its "
                         "merged token (source) or its code (codes) came before",
                         choices=("source", "codes"))
    # optimisation
    batch_size: int = arg(   32,    1024,  1024,  1024)
    max_steps: int = arg(    2800,  0,     0,     0)
    epochs: int = arg(300)
    lr: float = arg(         2e-3,  1e-4,  1e-4,  1e-4)
    lr_schedule: str = arg(  "cosine", "step", "step", "step")
    warmup: int = arg(       100,   1000,  1000,  1000)
    weight_decay: float = arg(0.05)
    eval_every: int = arg(   1400,  5000,  5000,  5000)
    save_every: int = arg(   700,   5000,  5000,  5000)

@dataclasses.dataclass
class GPTConfig(GPTFlags):
    """The flags, and what follows from tokenizer and data. Saved whole in the checkpoint."""
    bits: int = 8              # code bits d
    length: int = 64           # L
    num_classes: int = 10      # 0: unlabelled images
    class_names: tuple = ()
    keep: int = 36             # the tokenizer's target K
    keeps: tuple = (16, 25, 36, 49, 64)  # every K that has a merge instruction, ascending

    @property
    def grid(self):  # side of the token grid
        return math.isqrt(self.length)

    @property
    def prefix(self):  # P: class, and the merge instruction except in raster mode
        return 1 if self.mode == "raster" else 2

    @property
    def sub_bits(self):  # how the d bits of a code are divided into sub-tokens, low bits first
        return (self.bits,) if self.bits <= 10 else (6, self.bits - 6)

# parameters with d = 8, L = 64: tiny 0.5M; with d = 18, L = 1024: b 106M, l 343M, xl 784M
MODELS = presets(GPTFlags, ("tiny", "b", "l", "xl"))

# Id spaces, defined here and nowhere else
#   class          0 .. num_classes-1, then the null class = num_classes. Unlabelled: only 0
#   instruction    index into config.keeps. Callers pass K itself, the model looks the index up
#   code           0 .. 2^d-1, bit j is worth 2^j, as in the tokenizer
#   sub-token s    0 .. 2^sub_bits[s]-1: bits of the code; s = 0 has the low ones
#   position       0 .. L-1 on the grid, row by row. It is also the position instruction
#   merged token   0 .. K-1, by ascending first position: index into `first` (B,K)
#   sequence row   t = 0 class, [1 merge instruction,] then by mode. Below a row: its prediction
#
#       raster     c   x_0 x_1 x_2 ... x_{L-2}
#                 x_0  x_1 x_2 x_3 ... x_{L-1}
#       mergear    c    m  x_0 x_1 x_2 ... x_{L-2}         m: merge instruction, which K
#                      x_0 x_1 x_2 x_3 ... x_{L-1}         some earlier rows are masked
#       randar     c    m  p_0 x_0 p_a x_a p_b x_b ... p_z  0, a, b ... z: first positions
#                      {p} x_0 {p} x_a {p} x_b {p} ... x_z  {p}: those that remain, any order
#
#   seeded() tags  (seed, step, 3) token dropout, (seed, step, 4) class dropout,
#                  (seed, step, rank, 5) nn.Dropout, (seed, step, 6) rows of the code cache,
#                  (seed, step, 7) order of the merged tokens; (seed, sample) one sample

# -----------------------------------------------------------------------------
# MergeAR: what a position may see (paper Eq. 12 and Figure 6).

@torch.no_grad()
def is_first_of_group(groups, keep=None):
    """(B,L) group ids -> (B,L) bool: is this the first position of its group, and the group one
    of the first `keep` to appear?"""
    ordered, order = groups.sort(dim=1, stable=True)  # equal groups side by side
    new = torch.ones_like(groups, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.zeros_like(new).scatter_(1, order, new)  # back in raster order
    return first if keep is None else first & (first.cumsum(1) <= keep)

@torch.no_grad()
def mergear_mask(groups, window, keep=None):
    """(B,L) source or codes -> (B,L,L) bool: may position i (axis 1) attend to j (axis 2)?

    Yes if j is i itself, one of the `window` positions before i, or the first position of its
    group, however far back. With `keep`, groups after the first `keep` to appear count as
    repeats from the start: a cache of that many rows has no place for them.
    """
    i = torch.arange(groups.shape[1], device=groups.device)
    distance = i[:, None] - i                                                # (L,L)
    near = distance <= window
    return (distance >= 0) & (near | is_first_of_group(groups, keep)[:, None])

# -----------------------------------------------------------------------------
# A code as one or two small sub-tokens, so that no softmax has 2^18 outputs.

def split_codes(codes, sub_bits):
    """int64 codes (...) -> sub-tokens (...,S). Sub-token 0 has the low bits."""
    subs = []
    for n in sub_bits:
        subs.append(codes & (2 ** n - 1))
        codes = codes >> n
    return torch.stack(subs, dim=-1)

def join_codes(subs, sub_bits):
    """Sub-tokens (...,S) -> int64 codes (...). The inverse of split_codes."""
    codes, offset = 0, 0
    for s, n in enumerate(sub_bits):
        codes = codes + (subs[..., s] << offset)
        offset += n
    return codes

# -----------------------------------------------------------------------------
# The model: LLaMA's block (RMSNorm, SwiGLU, rotary positions), along the sequence and again along
# the sub-tokens of one code.

def rope_table(config, device):
    """cos and sin (2,P+L,D/h) of the 2D rotary embedding: half of the pairs of a head turn with
    the grid row, half with the grid column. Row P + l is position l. Prefix rows do not turn."""
    position = torch.arange(config.length, device=device)
    pairs = config.width // config.heads // 4
    frequency = 10_000.0 ** (-torch.arange(pairs, device=device) / pairs)
    axes = (position // config.grid, position % config.grid)
    angle = torch.cat([axis[:, None] * frequency for axis in axes], dim=1)   # (L,D/h/2)
    angle = F.pad(angle, (0, 0, config.prefix, 0))                           # (P+L,D/h/2)
    cos = torch.cat([angle.cos(), angle.cos()], dim=1)
    sin = torch.cat([-angle.sin(), angle.sin()], dim=1)
    return torch.stack([cos, sin])

def rotate(x, cos, sin):
    """Turn each pair (x_n, x_{n + half}) of the last axis by its angle, in float32. The first
    half of `sin` is negative."""
    y = x.float()
    return (y * cos + y.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)

def causal_attention(q, k, v):
    """Plain causal attention (N,h,S,D/h) over a few sub-tokens. N = B L is often above 65,535,
    which some SDPA kernels refuse."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5                   # (N,h,S,S)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v

def linear(c_in, c_out):
    return nn.Linear(c_in, c_out, bias=False)

class Block(nn.Module):
    """Pre-norm transformer block. The caller says how to attend: there training and the KV
    caches differ."""

    def __init__(self, config):
        super().__init__()
        D = config.width
        # SwiGLU has three matrices, so its hidden width is 2/3 of 4 D, rounded up
        unit = 256 if D >= 512 else 32
        hidden = math.ceil(8 * D / 3 / unit) * unit
        self.heads = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.norm1 = nn.RMSNorm(D, eps=1e-5)
        self.qkv = linear(D, 3 * D)
        self.proj = linear(D, D)
        self.norm2 = nn.RMSNorm(D, eps=1e-5)
        self.up = linear(D, 2 * hidden)
        self.down = linear(hidden, D)

    def forward(self, x, attend, rope=None):
        """x (B,T,D); attend(q, k, v), each (B,h,T,D/h), -> (B,h,T,D/h); rope: cos and sin."""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads)
        qk, v = qkv.permute(2, 0, 3, 1, 4).split([2, 1])                     # (2 or 1,B,h,T,D/h)
        q, k = qk if rope is None else rotate(qk, *rope)
        mixed = attend(q, k, v[0]).transpose(1, 2).reshape(B, T, D)
        x = x + self.dropout(self.proj(mixed))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * up))

class GPT(nn.Module):
    """Class-conditional transformer over the codes of an image.

    forward() sees whole sequences (training). Sampling feeds run_blocks() step by step, over a
    cache that the caller owns. Both give the same logits.
    """

    def __init__(self, config):
        super().__init__()
        c, D = config, config.width
        assert D % (4 * c.heads) == 0, f"--width {D} is not a multiple of 4 x --heads {c.heads}"
        assert c.bits <= 20, f"{c.bits} bits: a softmax of 2^{c.bits - 6} outputs is too large"
        self.config = config
        self.class_embed = nn.Embedding(c.num_classes + 1, D)
        self.sub_embed = nn.ModuleList(nn.Embedding(2 ** n, D) for n in c.sub_bits)
        self.mask_embed = nn.Parameter(torch.empty(D))  # stands for a dropped input code
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        head_depth = c.head_depth if len(c.sub_bits) > 1 else 0
        self.head_blocks = nn.ModuleList(Block(c) for _ in range(head_depth))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.to_logits = nn.ModuleList(linear(D, 2 ** n) for n in c.sub_bits)
        if c.mode != "raster":
            self.merge_instruction = nn.Embedding(len(c.keeps), D)
        if c.mode == "randar":
            self.position_instruction = nn.Embedding(c.length, D)
            self.position_head = nn.Sequential(nn.RMSNorm(D, eps=1e-5), linear(D, c.length))
        self.init_weights()

    def init_weights(self):
        """Normal(0.02). What adds to the residual stream is scaled down by the number of
        additions, as in GPT-2."""
        for name, p in self.named_parameters():
            if p.dim() == 1 and name != "mask_embed":
                nn.init.ones_(p)  # norms
            else:
                nn.init.normal_(p, std=0.02)
        for blocks in (self.blocks, self.head_blocks):
            for block in blocks:
                for layer in (block.proj, block.down):
                    nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * len(blocks)))

    @property
    def null_class(self):
        return self.config.num_classes

    def embed_prefix(self, labels, keep):
        """labels (B,), keep K (not used in raster mode) -> (B,P,D)."""
        rows = [self.class_embed(labels)]
        if self.config.mode != "raster":
            told = self.merge_instruction.weight[self.config.keeps.index(keep)]
            rows.append(told.expand(len(labels), -1))
        return torch.stack(rows, dim=1)

    def embed_codes(self, codes):
        """codes (...) -> (...,D): the sum of the sub-tokens' embeddings."""
        subs = split_codes(codes, self.config.sub_bits)
        return sum(embed(subs[..., s]) for s, embed in enumerate(self.sub_embed))

    def head(self, h, subs):
        """h (...,D) of a row, the first s sub-tokens of its code (...,s) -> list of s + 1 logits.

        A tiny causal transformer along the sub-tokens: [h, sub_0, ...] -> [sub_0, sub_1, ...].
        """
        tokens = [h] + [self.sub_embed[s](subs[..., s]) for s in range(subs.shape[-1])]
        x = torch.stack(tokens, dim=-2).flatten(0, -3)                       # (rows,s+1,D)
        for block in self.head_blocks:
            x = block(x, causal_attention)
        x = self.norm(x).view(*h.shape[:-1], len(tokens), -1)                # (...,s+1,D)
        return [self.to_logits[s](x[..., s, :]) for s in range(len(tokens))]

    def forward(self, codes, labels, keep=None, mask=None, first=None, dropped=None):
        """The pass that trains. See sequence() for what each mode passes.

        codes (B,N) in the order of the sequence, labels (B,), keep K, mask (B,L,L) of
        mergear_mask, first (B,K) the first position of each code in randar mode, dropped (B,N)
        bool: inputs to hide.
        Returns (logits of each sub-token given the codes before and its code's earlier
        sub-tokens: S tensors (B,N,2^sub_bits[s]); randar: logits of the next position before
        each pair (B,K,L), else None).
        """
        c, P = self.config, self.config.prefix
        x = self.embed_codes(codes)                                          # (B,N,D)
        if dropped is not None:
            x = torch.where(dropped[..., None], self.mask_embed.to(x.dtype), x)
        rope = rope_table(c, x.device)                                       # (2,P+L,D/h)
        if c.mode == "randar":
            asked = self.position_instruction(first).to(x.dtype)
            x = torch.stack([asked, x], dim=2).flatten(1, 2)                 # (B,2K,D): p x p x ...
            # both rows of a pair turn with the grid position of its token
            row = F.pad(P + first.repeat_interleave(2, dim=1), (P, 0))       # (B,P+2K)
            rope = rope[:, row][:, :, None]                                  # (2,B,1,P+2K,D/h)
        # the last code is never an input
        x = torch.cat([self.embed_prefix(labels, keep).to(x.dtype), x[:, :-1]], dim=1)  # (B,T,D)
        T = x.shape[1]
        if mask is not None:
            causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            inner = F.pad(mask[:, :-1, :-1], (P, 0, P, 0), value=True)       # prefix: always seen
            mask = (causal & inner)[:, None]                                 # (B,1,T,T)
        attend = functools.partial(F.scaled_dot_product_attention, attn_mask=mask,
                                   is_causal=mask is None)
        for block in self.blocks:
            x = block(x, attend, rope[..., :T, :])
        subs = split_codes(codes, c.sub_bits)[..., :-1]
        if c.mode != "randar":
            return self.head(x[:, P - 1:], subs), None
        # x_a is predicted at p_a, the next position at the row before it
        return self.head(x[:, P::2], subs), self.position_head(x[:, P - 1::2])

    def run_blocks(self, x, rope, cache):
        """x (R,n,D) -> (R,n,D) through all blocks. The cache knows where these rows go and what
        they see. Keys are stored turned, so the order of its rows does not matter."""
        for layer, block in enumerate(self.blocks):
            x = block(x, functools.partial(cache.attend, layer), rope)
        return x

    def new_cache(self, sequences, keep=None):
        """KV cache for R sequences: compact for K first positions in mergear mode, else one row
        per token."""
        if self.config.mode == "mergear":
            return CompactCache(self, sequences, keep)
        codes = 2 * keep if self.config.mode == "randar" else self.config.length
        return DenseCache(self, sequences, self.config.prefix + codes - 1)

# -----------------------------------------------------------------------------
# Sequences and losses of the three modes

def draw_orders(config, samples, keep, generator):
    """Randar: an order of the merged tokens for each sample -> (samples,K). Token 0, whose first
    position is always 0, comes first; the others are permuted at random."""
    u = torch.rand(samples, config.length, generator=generator)[:, :keep]
    u[:, 0] = -1
    return u.argsort(dim=1)

def sequence(config, codes, source, keep, order=None):
    """codes (B,L), source (B,L) of images merged to K = keep -> (codes (B,N) as they follow in
    the sequence, arguments of GPT.forward besides labels). order (B,K): randar only."""
    if config.mode == "raster":
        return codes, {}
    if config.mode == "mergear":
        groups = source if config.duplicate == "source" else codes
        return codes, dict(keep=keep, mask=mergear_mask(groups, config.window))
    first = first_position_of_token(source, keep).gather(1, order)           # (B,K)
    return codes.gather(1, first), dict(keep=keep, first=first)

def code_losses(logits, codes, sub_bits, label_smoothing=0.0):
    """Logits of S sub-tokens, codes (B,N) -> (loss, bits), (B,N) each: smoothed cross-entropy in
    nats, and -log2 p(code). p(code) = p(sub_0) p(sub_1 | sub_0)."""
    loss, nll = 0.0, 0.0
    for s, target in enumerate(split_codes(codes, sub_bits).unbind(-1)):
        logp = logits[s].float().log_softmax(-1)                             # (B,N,2^sub_bits[s])
        target_nll = -logp.gather(-1, target[..., None])[..., 0]             # (B,N)
        loss = loss + (1 - label_smoothing) * target_nll - label_smoothing * logp.mean(-1)
        nll = nll + target_nll.detach()
    return loss, nll / math.log(2)

def position_losses(logits, first):
    """Logits (B,K,L) at the row before each pair, first (B,K) in the order of the sequence ->
    (loss (B,K) in nats, bits (B,)).

    The order is random, so each first position that remains is next with the same probability.
    The cross-entropy to that uniform distribution is the expectation over all orders. Position 0
    is certain, so row 0 predicts the same set as row 1. bits: how much is paid for the set of
    positions, -log2 p(ordered positions) less the log2 (K-1)! bits of their order.
    """
    B, K, L = logits.shape
    turn = torch.arange(K, device=first.device)
    drawn_at = torch.full((B, L), K, device=first.device)                    # K: never
    drawn_at = drawn_at.scatter(1, first, turn.expand(B, K))[:, None]        # (B,1,L)
    now = turn.clamp(min=1)[:, None]                                         # (K,1)
    logp = logits.float().masked_fill(drawn_at < now, -math.inf).log_softmax(-1)
    remain = (drawn_at >= now) & (drawn_at < K)                              # (B,K,L)
    count = (K - now[:, 0]).clamp(min=1)                                     # (K,)
    loss = -logp.masked_fill(~remain, 0.0).sum(-1) / count                   # (B,K)
    spread = count.log()  # entropy of the uniform target
    return loss, (loss - spread)[:, 1:].detach().sum(1) / math.log(2)

# -----------------------------------------------------------------------------
# KV caches. Allocated once, written in place, never concatenated. With one query per step, two
# bmm and a softmax are faster than the SDPA kernels.

class DenseCache:
    """Raster and randar mode: sequence row t is cache row t."""

    def __init__(self, gpt, sequences, rows):
        c, like = gpt.config, gpt.mask_embed
        self.rows, self.heads, self.device = rows, c.heads, like.device
        shape = sequences * c.heads, rows, c.width // c.heads                # (Rh,rows,D/h)
        self.keys = [like.new_zeros(shape) for _ in range(c.depth)]
        self.values = [like.new_zeros(shape) for _ in range(c.depth)]
        self.nbytes = sum(x.nbytes for x in self.keys + self.values)

    def begin(self, t, codes=None, n=1, alone=False):
        """Decide, for all layers, where the tokens of sequence rows t .. t+n-1 go and what they
        see. alone: they see the rows before t and themselves only."""
        self.new = slice(t, t + n)
        self.visible = min(-(-(t + n) // 32) * 32, self.rows)  # few lengths: few kernels to build
        column = torch.arange(self.visible, device=self.device)
        row = column[self.new, None]                                         # (n,1)
        unseen = (column >= t) & (column != row) if alone else column > row  # (n,visible)
        self.bias = torch.zeros_like(unseen, dtype=self.keys[0].dtype)
        self.bias.masked_fill_(unseen, -math.inf)

    def attend(self, layer, q, k, v):
        """(R,h,n,D/h) each -> (R,h,n,D/h)."""
        keys, values = self.keys[layer], self.values[layer]
        keys[:, self.new] = k.flatten(0, 1)
        values[:, self.new] = v.flatten(0, 1)
        scores = torch.baddbmm(self.bias, q.flatten(0, 1), keys[:, :self.visible].transpose(1, 2),
                               alpha=q.shape[-1] ** -0.5)                    # (Rh,n,visible)
        return torch.bmm(scores.softmax(-1), values[:, :self.visible]).view(q.shape)

class CompactCache(DenseCache):
    """Mergear mode: 2 + window + K rows per sequence, whatever L is (Figure 6).

        row 0, 1    class and merge instruction. They never leave
        row 2 ..    ring of `window` slots: the repeat at position i is in slot i % window. It is
                    unseen after `window` positions, and a later repeat takes its slot
        then        first positions in order of appearance, at most K. They never leave

    A new code is a repeat if it equals a code among the first positions, or if there are K of
    those already: exactly mergear_mask(codes, window, keep=K). The new token sees itself before
    it is stored, so a full ring still holds all `window` positions before it.
    """

    def __init__(self, gpt, sequences, keep):
        c = gpt.config
        self.prefix, self.window, self.keep = c.prefix, c.window, keep
        self.slots = min(max(1, c.window), c.length)  # window 0 has a slot that no one sees
        self.ring_end = c.prefix + self.slots
        super().__init__(gpt, sequences, self.ring_end + keep)
        self.forever = c.prefix + c.length
        # bookkeeping, shared by all layers and heads
        shape = sequences, self.rows
        self.last_seen = torch.full(shape, -1, device=self.device)  # last sequence row to see it
        self.code = torch.full(shape, -1, device=self.device)       # of the token in a cache row
        self.count = torch.zeros(sequences, dtype=torch.long, device=self.device)
        self.sequence = torch.arange(sequences * c.heads, device=self.device)

    def begin(self, t, codes=None):
        """The token of sequence row t: codes (R,), None for the prefix. No value is read back."""
        self.t = t
        unseen = self.last_seen < t                                          # (R,rows)
        self.bias = torch.zeros_like(unseen, dtype=self.keys[0].dtype)
        self.bias = self.bias.masked_fill_(unseen, -math.inf)[:, None]       # (R,1,rows)
        if codes is None:
            row = torch.full_like(self.count, t)
            seen = torch.full_like(self.count, self.forever)
        else:
            known = (self.code[:, self.ring_end:] == codes[:, None]).any(1)  # (R,)
            first = ~known & (self.count < self.keep)
            slot = self.prefix + (t - self.prefix) % self.slots
            row = torch.where(first, self.ring_end + self.count, slot)
            seen = torch.where(first, self.forever, t + self.window)
            self.code.scatter_(1, row[:, None], codes[:, None])
            self.count += first
        self.last_seen.scatter_(1, row[:, None], seen[:, None])
        self.row = row.repeat_interleave(self.heads)                         # (Rh,)

    def attend(self, layer, q, k, v):
        """(R,h,1,D/h) each -> (R,h,1,D/h): attend to the rows seen and to itself, then store."""
        keys, values, shape = self.keys[layer], self.values[layer], q.shape
        q = q.flatten(0, 1) * shape[-1] ** -0.5                              # (Rh,1,D/h)
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        scores = torch.bmm(q, keys.transpose(1, 2)).view(-1, self.heads, self.rows) + self.bias
        itself = (q * k).sum(-1).view(-1, self.heads, 1)                     # (R,h,1)
        weights = torch.cat([itself, scores], dim=-1).softmax(-1)            # (R,h,1+rows)
        weights = weights.view(len(q), 1, -1)                                # (Rh,1,1+rows)
        out = torch.bmm(weights[..., 1:], values) + weights[..., :1] * v
        keys[self.sequence, self.row] = k[:, 0]
        values[self.sequence, self.row] = v[:, 0]
        return out.view(shape)

    def rows_in_use(self):
        """How many rows hold a token that the next one sees. (R,)"""
        return (self.last_seen > self.t).sum(1)

# -----------------------------------------------------------------------------
# Sampling

class Sampled(NamedTuple):
    codes: torch.Tensor  # (B,N) int64
    first: torch.Tensor  # (B,N) the first position of each code, ascending

class Choice(NamedTuple):
    """How a code is chosen. With two sub-tokens, each setting acts on each of them in turn."""
    cfg: float
    linear: bool  # guidance grows from 1 to cfg with the share of codes known
    temperature: float
    top_k: int
    top_p: float

    def scale(self, share):
        return 1 + (self.cfg - 1) * share if self.linear else self.cfg

def guide(logits, cfg):
    """Classifier-free guidance: logits (2B,V), conditional half first -> (B,V)."""
    cond, uncond = logits.float().chunk(2)
    return uncond + cfg * (cond - uncond)

def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """One sample per row, by inverting the distribution function: logits (B,V), u (B,) uniform
    in [0,1) -> (B,).

    top_k > 0 keeps the k most likely, top_p < 1 the fewest that hold that much probability.
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
        before = ordered.cumsum(-1) - ordered  # probability of the more likely ones
        least = ordered.masked_fill(before >= top_p, math.inf).min(-1, keepdim=True).values
        p = p.masked_fill(p < least, 0.0)
    cumulative = p.cumsum(-1, dtype=u.dtype)                                 # (B,V)
    total = cumulative[:, -1]
    # rounding must not lead past the last entry
    at = torch.minimum(u * total, total * (1 - torch.finfo(u.dtype).eps))
    return torch.searchsorted(cumulative, at[:, None], right=True)[:, 0]

def pick_codes(gpt, h, noise, choice, share):
    """n codes per sample, sub-token by sub-token: h (R,n,D), noise (B,n,S) uniform -> (B,n).
    share: how much of the codes is known with these."""
    copies, sub_bits = len(h) // len(noise), gpt.config.sub_bits
    subs = noise.new_empty(*noise.shape[:2], 0, dtype=torch.long)
    for s in range(len(sub_bits)):
        # both halves of a guided batch continue with the same sub-tokens
        logits = gpt.head(h, subs.repeat(copies, 1, 1))[s]                   # (R,n,2^sub_bits[s])
        logits = guide(logits, choice.scale(share)) if copies == 2 else logits
        sub = draw(logits.flatten(0, 1), noise[..., s].flatten(), choice.temperature,
                   choice.top_k, choice.top_p)
        subs = torch.cat([subs, sub.view(*noise.shape[:2], 1)], dim=-1)      # (B,n,s+1)
    return join_codes(subs, sub_bits)

def sample_in_order(gpt, labels, keep, noise, choice):
    """Raster and mergear: one code after the other. labels (R,), noise (B,L,S) -> (B,L)."""
    P, L = gpt.config.prefix, gpt.config.length
    copies = len(labels) // len(noise)
    cache = gpt.new_cache(len(labels), keep)
    rope = rope_table(gpt.config, labels.device)
    prefix, codes = gpt.embed_prefix(labels, keep), []
    for t in range(P + L - 1):
        if t < P:
            x, latest = prefix[:, t:t + 1], None                             # (R,1,D)
        else:
            latest = codes[-1].repeat(copies)                                # (R,)
            x = gpt.embed_codes(latest)[:, None]
        cache.begin(t, latest)
        h = gpt.run_blocks(x, rope[:, t], cache)                             # (R,1,D)
        i = t - P + 1  # the position that this row predicts
        if i >= 0:
            codes.append(pick_codes(gpt, h, noise[:, i:i + 1], choice, (i + 1) / L)[:, 0])
    return torch.stack(codes, dim=1)

def arccos_steps(keep, steps=None):
    """How many of `keep` codes each step of parallel decoding draws: few while little is known,
    many at the end, at least one. After a share r of the steps, 1 - 2/pi arccos(r) of the codes
    are known (MaskGIT, 2202.04200).

    steps None: the paper's 64 for 144 codes and 88 for 256; a power law for other counts.
    """
    if steps is None:
        steps = max(1, min(keep, round(64 * (keep / 144) ** 0.5535)))
    assert 1 <= steps <= keep, f"{steps} steps for {keep} codes"
    counts, known = [], 0
    for s in range(1, steps + 1):
        aim = round(keep * (1 - 2 / math.pi * math.acos(s / steps)))
        counts.append(max(1, min(aim - known, keep - known - (steps - s))))
        known += counts[-1]
    return counts

def sample_parallel(gpt, labels, keep, noise, position_noise, counts, choice):
    """Randar: in step s, counts[s] positions without replacement, then their codes.

    labels (R,), noise (B,K,S), position_noise (B,steps,L) -> codes, first (B,K), as drawn. Two
    forward calls per step. With one code per step this is exactly the model that was trained.
    """
    P, L = gpt.config.prefix, gpt.config.length
    copies = len(labels) // len(noise)
    cache = gpt.new_cache(len(labels), keep)
    rope = rope_table(gpt.config, labels.device)
    x, turn = gpt.embed_prefix(labels, keep), rope[:, :P]
    # added to the logits of positions: the first is 0, and none comes twice
    bias = torch.zeros(len(noise), L, device=labels.device)
    bias[:, 0] = math.inf
    codes, first, t, known = [], [], 0, 0
    for s, n in enumerate(counts):
        # 1. feed the pairs drawn last. Their last row predicts the positions that remain
        cache.begin(t, n=x.shape[1])
        t += x.shape[1]
        h = gpt.run_blocks(x, turn, cache)                                   # (R,2a,D)
        logits = gpt.position_head(h[:, -1])                                 # (R,L)
        scale = choice.scale((known + n) / keep)
        logits = guide(logits, scale) if copies == 2 else logits.float()     # (B,L)
        # the n largest of logits + Gumbel noise are n draws without replacement (1903.06059)
        gumbel = -(-position_noise[:, s].clamp(min=1e-9).log()).log()
        drawn = (logits + gumbel + bias).topk(n).indices                     # (B,n)
        bias.scatter_(1, drawn, -math.inf)
        # 2. feed their instructions. Each sees all pairs and itself, not the other n - 1. The
        # next pairs overwrite these rows of the cache
        rows = drawn.repeat(copies, 1)                                       # (R,n)
        asked = gpt.position_instruction(rows)                               # (R,n,D)
        cache.begin(t, n=n, alone=True)
        h = gpt.run_blocks(asked, rope[:, P + rows][:, :, None], cache)
        picked = pick_codes(gpt, h, noise[:, known:known + n], choice, (known + n) / keep)
        x = torch.stack([asked, gpt.embed_codes(picked.repeat(copies, 1))], dim=2).flatten(1, 2)
        turn = rope[:, P + rows.repeat_interleave(2, dim=1)][:, :, None]     # (2,R,1,2n,D/h)
        codes.append(picked)
        first.append(drawn)
        known += n
    return torch.cat(codes, dim=1), torch.cat(first, dim=1)

@torch.no_grad()
def sample_codes(gpt, labels, cfg=1.0, temperature=1.0, top_k=0, top_p=1.0, seed=0, start=0,
                 keep=None, steps=None, cfg_schedule="constant"):
    """labels (B,) class ids -> Sampled. Sample i is a function of (seed, start + i) and its label.

    cfg: guidance scale. 1.0 runs one row per sample, others two. cfg_schedule linear: the scale
    grows from 1 to cfg with the share of codes known. keep: the K told to the model (default: the
    tokenizer's), in mergear mode also the bound of its cache, in randar mode the number of codes.
    steps: randar only, see arccos_steps. temperature, top_k, top_p act on codes, not positions.
    The arithmetic is that of gpt's weights: gpt.to(torch.bfloat16) samples in bfloat16.
    """
    c, device = gpt.config, gpt.mask_embed.device
    assert not gpt.training, "sample from a model in eval mode"
    assert steps is None or c.mode == "randar", f"steps {steps} in {c.mode} mode"
    assert keep is None or keep in c.keeps, f"keep {keep} is not one of {c.keeps}"
    keep = c.keep if keep is None else keep
    counts = arccos_steps(keep, steps) if c.mode == "randar" else []
    # all randomness, drawn for each sample from its own generator
    wide = torch.float32 if device.type == "mps" else torch.float64
    noise, position_noise = [], []
    for i in range(start, start + len(labels)):
        generator = seeded(seed, i)
        noise.append(torch.rand(c.length, len(c.sub_bits), dtype=wide, generator=generator))
        position_noise.append(torch.rand(len(counts), c.length, generator=generator))
    noise = torch.stack(noise).to(device, non_blocking=True)                 # (B,L,S)
    position_noise = torch.stack(position_noise).to(device, non_blocking=True)
    choice = Choice(cfg, cfg_schedule == "linear", temperature, top_k, top_p)
    labels = labels.to(device)
    if cfg != 1.0:
        labels = torch.cat([labels, torch.full_like(labels, gpt.null_class)])    # (2B,)
    if c.mode == "randar":
        codes, first = sample_parallel(gpt, labels, keep, noise, position_noise, counts, choice)
        first, order = first.sort(dim=1)
        return Sampled(codes.gather(1, order), first)
    codes = sample_in_order(gpt, labels, keep, noise, choice)
    return Sampled(codes, torch.arange(c.length, device=device).expand_as(codes))

@torch.no_grad()
def draw_images(gpt, tokenizer, labels, batch_size, start=0, **sampling):
    """labels (B,), B <= batch_size -> images (B,3,H,W) of samples start, start + 1, ...

    Rounding depends on the batch size, and one rounded code changes all that follow. So the batch
    is padded: at one batch_size a sample is the same bit for bit.
    """
    B = len(labels)
    assert B <= batch_size, f"{B} labels, batch size {batch_size}"
    codes, first = sample_codes(gpt, F.pad(labels, (0, batch_size - B)), start=start, **sampling)
    source = tokenizer.recover(codes, first)  # the identity when every position has its code
    return tokenizer.decode(codes, source)[:B]

def load_generator(path, device="cpu"):
    """Checkpoint -> (GPT, MergeVQ) with EMA weights, frozen, in eval mode. Raises UserError."""
    state = load_checkpoint(path, "generator", device)
    gpt = GPT(GPTConfig(**state["config"])).to(device)
    load_parts(path, state, ema=gpt)
    gpt.eval().requires_grad_(False)
    return gpt, tokenizer_from_state(state["tokenizer"], device)

# -----------------------------------------------------------------------------
# The code cache: every view of every image encoded once, in memory-mapped files.
#   codes.npy, source.npy (V N,L) | labels.npy, keep.npy (V N,) | meta.json: made from what
# V views of N images. A view is stored in an order of its own, drawn at random. So a block of
# rows with one K holds images of all classes.

COLUMNS = dict(codes=np.int32, source=np.int16, labels=np.int32, keep=np.int32)
BLOCK = 64  # rows that are encoded together, with one K
EVAL_IMAGES = 1000

class CodeDataset:
    """ds[rows] -> codes (n,L), source (n,L), labels (n,), int64. Rows below len(ds) are centre
    crops at the target K. .keep: the K of each row."""

    def __init__(self, folder):
        with open(f"{folder}/meta.json") as file:
            self.meta = json.load(file)
        files = [np.load(f"{folder}/{name}.npy", mmap_mode="r") for name in COLUMNS]
        *self.columns, self.keep = files

    def __len__(self):
        return len(self.keep) // self.meta["views"]

    def __getitem__(self, rows):
        return [torch.from_numpy(np.asarray(x[rows], dtype=np.int64)) for x in self.columns]

def open_codes(folder, dataset, tokenizer, config, run, views, sample_k):
    """The CodeDataset in `folder`. Made now if it is not there, or with --overwrite.

    sample_k: views after the first draw K as stage 1 does. Raises UserError when the cache was
    made from something else.
    """
    t = tokenizer.config
    kinds = f"{t.keep_sampling} of {keep_distribution(t)[0]}" if sample_k else "target"
    meta = dict(tokenizer=weights_hash(tokenizer.state_dict())[:12], data=dataset.digest()[:12],
                views=views, seed=config.seed, keep=t.keep, keeps=kinds)
    there = os.path.exists(f"{folder}/meta.json") and not (config.overwrite and not config.resume)
    found = CodeDataset(folder).meta if there else meta
    for name in meta:
        if found.get(name) != meta[name]:
            raise UserError(f"the code cache {folder} was made with {name} {found.get(name)}, "
                            f"this run has {name} {meta[name]}: delete the folder, or pass "
                            "--overwrite to make it anew")
    run.barrier()  # all ranks have looked before one of them writes
    if not there:
        encode_views(folder, dataset, tokenizer, config, run, meta, sample_k)
    return CodeDataset(folder)

@torch.no_grad()
def encode_views(folder, dataset, tokenizer, config, run, meta, sample_k):
    """Encode all views into FOLDER.tmp, split over the ranks; then rename it. In float32."""
    t, N, new = tokenizer.config, len(dataset), f"{folder}.tmp"
    shapes = dict(codes=(t.length,), source=(t.length,), labels=(), keep=())
    if run.main:
        shutil.rmtree(new, ignore_errors=True)
        make_folder(new, "--cache")
        for name, dtype in COLUMNS.items():
            shape = (meta["views"] * N, *shapes[name])
            np.lib.format.open_memmap(f"{new}/{name}.npy", "w+", dtype, shape)
    run.barrier()
    files = {name: np.lib.format.open_memmap(f"{new}/{name}.npy", "r+") for name in COLUMNS}
    blocks, keys = [], []  # (view, place in its order); the images of a block
    for view in range(meta["views"]):
        order = np.random.default_rng([config.seed, view]).permutation(N).tolist()
        for i in range(0, N, BLOCK):
            blocks.append((view, i))
            keys.append([View(image, view) for image in order[i:i + BLOCK]])
    # block b goes to rank b % world
    mine, keys = range(run.rank, len(blocks), run.world), keys[run.rank::run.world]
    stream = load_batches(dataset, keys, run, loader_workers(config))
    title = f"encoding {os.path.basename(folder)}"
    for b, (images, labels) in zip(mine, tqdm(stream, title, len(mine), disable=not run.main)):
        view, i = blocks[b]
        keep = sample_keep(t, b) if sample_k and view > 0 else t.keep
        encoded = tokenizer.encode(images, keep)
        rows = slice(view * N + i, view * N + i + len(images))
        files["codes"][rows] = encoded.codes.gather(1, encoded.source).cpu()
        files["source"][rows] = encoded.source.cpu()
        files["labels"][rows] = labels.cpu()
        files["keep"][rows] = keep
    for file in files.values():
        file.flush()
    run.barrier()
    if run.main:
        with open(f"{new}/meta.json", "w") as file:
            json.dump(meta, file)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(new, folder)
    run.barrier()

def code_batches(codes, tokenizer_config, config, run, step, sample_k):
    """Endless micro-batches (codes, source, labels, K) of this rank. A step has one K, drawn as
    in stage 1. Which rows with that K is a function of (seed, step), as in nanoGPT's get_batch."""
    rows_with = {int(K): np.flatnonzero(codes.keep == K) for K in np.unique(codes.keep)}
    micro = micro_batch(config, run)
    while True:
        K = sample_keep(tokenizer_config, step) if sample_k else tokenizer_config.keep
        K = K if K in rows_with else tokenizer_config.keep  # a small cache may lack a rare one
        generator = seeded(config.seed, step, 6)
        places = torch.randint(len(rows_with[K]), (config.batch_size,), generator=generator)
        rows = rows_with[K][places.numpy()]
        for micro_step in range(config.accum):
            start = (micro_step * run.world + run.rank) * micro
            batch = codes[rows[start:start + micro]]
            yield *(x.to(run.device, non_blocking=True) for x in batch), K
        step += 1

# -----------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def evaluate(gpt, dataset, config, run):
    """Bits per code of validation images at the target K, over all ranks. Randar: one random
    order for all of them, and the bits per image of the set of first positions."""
    sums = torch.zeros(3, device=run.device)  # bits of codes, of positions, images
    order = draw_orders(config, 1, config.keep, seeded(0)).to(run.device)
    rows = subset(len(dataset), EVAL_IMAGES)[run.rank::run.world]
    size = max(1, config.batch_size // run.world)
    for i in range(0, len(rows), size):
        codes, source, labels = (x.to(run.device) for x in dataset[rows[i:i + size]])
        codes, inputs = sequence(config, codes, source, config.keep, order.expand(len(codes), -1))
        with run.autocast():
            logits, positions = gpt(codes, labels, **inputs)
        sums[0] += code_losses(logits, codes, config.sub_bits)[1].mean(1).sum()
        if positions is not None:
            sums[1] += position_losses(positions, inputs["first"])[1].sum()
        sums[2] += len(codes)
    if run.world > 1:
        dist.all_reduce(sums)
    bits, position_bits = (sums[:2] / sums[2]).tolist()
    if config.mode != "randar":
        return dict(val_bits=bits)
    return dict(val_bits=bits, val_position_bits=position_bits)

def draw_samples(gpt, tokenizer, config, path, num=20):
    """PNG: `num` images, the classes in turn, as generate.py makes them."""
    labels = torch.arange(num) % max(1, config.num_classes)
    cfg = 2.0 if config.num_classes else 1.0
    images = draw_images(gpt, tokenizer, labels, num, cfg=cfg, seed=config.seed)
    names = [config.class_names[n] for n in labels] if config.num_classes else None
    image_grid(images.cpu(), path, labels=names)

# -----------------------------------------------------------------------------
# Training

CURVES = ("loss", "bits", "val_bits", "position", "position_bits", "val_position_bits",
          "grad_norm", "lr")

def main(argv=None):
    # set-up. A resumed run has its tokenizer in its own checkpoint
    flags = parse_config(GPTFlags, __doc__, argv, MODELS, "model")
    if flags.resume:
        made = load_checkpoint(f"{flags.out}/ckpt.pt", "generator")["tokenizer"]
    else:
        made = load_checkpoint(flags.tokenizer, "tokenizer")
    tokenizer_state = dict(config=made["config"], ema=made["ema"])
    tokenizer = tokenizer_from_state(tokenizer_state)
    t = tokenizer.config
    flags.data = flags.data or t.data
    train_set = build_dataset(flags.data, "train", t.size, True, flags.seed, flags.labels)
    val_set = build_dataset(flags.data, "val", t.size, False, labels=flags.labels)
    passes = flags.epochs * len(train_set) // flags.batch_size
    flags.max_steps = flags.max_steps or max(1, passes)
    config = GPTConfig(**vars(flags), bits=t.bits, length=t.length, keep=t.keep,
                       keeps=tuple(keep_distribution(t)[0]), num_classes=train_set.num_classes,
                       class_names=tuple(train_set.class_names))
    run = start_run(config)
    micro = micro_batch(config, run)
    state = open_out(config, run, "generator")
    tokenizer.to(run.device)
    folder, sample_k = config.cache or f"{config.out}/codes", config.mode != "raster"
    train_codes = open_codes(f"{folder}/train", train_set, tokenizer, config, run, config.views,
                             sample_k)
    val_codes = open_codes(f"{folder}/val", val_set, tokenizer, config, run, 1, False)

    torch.manual_seed(config.seed)  # the same weights on every rank
    raw_model = GPT(config).to(run.device)
    ema = copy.deepcopy(raw_model).eval().requires_grad_(False)
    optimizer = adamw(raw_model.parameters(), config, BETAS[config.mode])
    parts = dict(model=raw_model, ema=ema, optimizer=optimizer)
    step, skipped = 0, torch.zeros((), device=run.device)
    if state:
        load_parts(f"{config.out}/ckpt.pt", state, **parts)
        step, skipped = state["step"], skipped + state["skipped"]
    if config.compile:
        raw_model.compile()
    model = parallel(raw_model, run)
    if run.main:
        size = sum(p.numel() for p in raw_model.parameters())
        print(f"{config.model}, {config.mode}: {size / 1e6:.2f}M parameters, L = {config.length}, "
              f"K = {config.keep} of {config.keeps}, d = {config.bits} as sub-tokens of "
              f"{config.sub_bits} bits; {config.max_steps} steps of {config.batch_size}")
        print(f"{config.data}: train {train_set.describe()}; val {val_set.describe()}")

    stream = code_batches(train_codes, t, config, run, step, sample_k)
    metrics = Metrics(config, run, step, CURVES)
    stop, stopping = catch_signals(), False
    while True:
        # N steps make N + 1 passes. Step 0 counts: a broken evaluation shows at once
        last = step >= config.max_steps
        if last or step % config.eval_every == 0 and not stopping:
            metrics.scores(step, evaluate(ema, val_codes, config, run))
            if run.main:
                draw_samples(ema, tokenizer, config, f"{config.out}/samples_{step:07d}.png")
        if run.main and (last or stopping or step % config.save_every == 0):
            save_checkpoint(f"{config.out}/ckpt.pt", "generator", step=step,
                            config=dataclasses.asdict(config), skipped=int(skipped),
                            class_names=list(config.class_names), tokenizer=tokenizer_state,
                            **{name: part.state_dict() for name, part in parts.items()})
        if last or stopping:
            break

        # randomness of the global batch. Only nn.Dropout differs between ranks
        lr = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        hide = torch.rand(config.batch_size, config.length, generator=seeded(config.seed, step, 3))
        unlabel = torch.rand(config.batch_size, generator=seeded(config.seed, step, 4))
        torch.manual_seed(seeded(config.seed, step, run.rank, 5).initial_seed())
        logs = defaultdict(float)
        raw_model.train()
        for micro_step in range(config.accum):
            codes, source, labels, keep = next(stream)                       # (B,L), (B,L), (B,)
            # this rank's rows of the global batch
            start = (micro_step * run.world + run.rank) * micro
            rows = slice(start, start + micro)
            order = None
            if config.mode == "randar":
                generator = seeded(config.seed, step, 7)
                order = draw_orders(config, config.batch_size, keep, generator)[rows]
                order = order.to(run.device, non_blocking=True)              # (B,K)
            codes, inputs = sequence(config, codes, source, keep, order)     # (B,N)
            dropped = hide[rows, :codes.shape[1]] < config.token_dropout
            dropped = dropped.to(run.device, non_blocking=True)
            nameless = (unlabel[rows] < config.class_dropout).to(run.device, non_blocking=True)
            labels = labels.masked_fill(nameless, raw_model.null_class)
            # DDP averages the gradients in the last backward pass only
            model.require_backward_grad_sync = micro_step == config.accum - 1

            with run.autocast():
                logits, positions = model(codes, labels, **inputs, dropped=dropped)
            loss, bits = code_losses(logits, codes, config.sub_bits, config.label_smoothing)
            losses = dict(loss=loss.mean(), bits=bits.mean())
            if config.mode == "randar":
                position, position_bits = position_losses(positions, inputs["first"])
                losses.update(position=position.mean(), position_bits=position_bits.mean())
                losses["loss"] = losses["loss"] + config.w_position * losses["position"]
            (losses["loss"] / config.accum).backward()
            for name, value in losses.items():
                logs[name] += value.detach() / config.accum

        # all ranks have the same gradients. A step that is not finite changes nothing
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip)
        finite = step_if_finite(norm, optimizer)
        update_ema(ema, raw_model, config.ema, step, finite)
        skipped += ~finite
        step += 1
        if step % config.log_every == 0 or step == config.max_steps:
            values = dict(logs, grad_norm=norm, skipped=skipped)
            stopping = metrics.log(step, values, stop, ("loss", "bits", "skipped"), lr=lr)
    metrics.bar.close()
    end_run(config, run, step, "mergear.py", argv,
            f"done: {config.out}/ckpt.pt, samples_{step:07d}.png, curves.png; next: "
            f"python generate.py --ckpt {config.out}/ckpt.pt")

if __name__ == "__main__":
    run_main(main)
