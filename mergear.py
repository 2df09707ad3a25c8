"""Stage 2 of MergeVQ (arXiv 2504.00999): generators of codes. Raster, MergeAR and RandAR.

    python mergear.py                                  # tiny MergeAR on out/tokenizer/ckpt.pt
    python mergear.py --mode raster --out out/raster   # the baseline: no cache compression
    python mergear.py --mode randar --out out/randar   # the merged codes only, in random order
    torchrun --nproc_per_node=8 mergear.py --model l --tokenizer out/g/ckpt.pt        # eight GPUs
    python mergear.py --resume                         # continue the run in --out

The tokenizer turns an image into K merged codes and `source`. One gather gives each of the L
positions its code again. Three models learn these codes:

    raster    [class, x_0, ..., x_{L-2}] -> x_0, ..., x_{L-1}, row by row (LlamaGen, 2406.06525)
    mergear   A position sees the first position of each merged token and a short window.
              So the KV cache has 3 + K + window rows, not L
    randar    the K merged codes only, in random order, several per step (RandAR, 2412.01827).
              The model also draws their first positions; source recovery fills the others

Equations of the paper: 12 and figure 6 mergear_mask and CompactCache, 13 (RandAR) GPT.forward and
sample_parallel.

Axis letters: B samples, R rows of a decoding step (2B under guidance), L positions, K merge count,
N codes of a sequence (L, or K in randar mode), D width, S sub-tokens, T sequence length,
P prefix length, h heads, n tokens fed or drawn in one step.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import math
import os

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import (Metrics, RunConfig, View, adamw, arg, catch_signals, end_run, gather_rows,
                  image_grid, load_batches, load_checkpoint, load_parts, loader_workers,
                  micro_batch, new_array, open_data, open_out, parallel, parse_config, presets,
                  resume_run, run_main, save_run, seeded, set_learning_rate, start_run,
                  step_if_finite, update_ema, val_batches, weights_hash)
from tokenizer import first_position_of_token, keep_distribution, sample_keep, tokenizer_from_state

# -----------------------------------------------------------------------------
# Config. Every field with arg() is a flag.

MODES = ("raster", "mergear", "randar")

@dataclasses.dataclass
class GPTConfig(RunConfig):
    """One column per preset: tiny for a CPU, and three sizes of LlamaGen (paper: l)."""
    mode: str = arg("mergear", help="raster, mergear or randar", choices=MODES)
    tokenizer: str = arg("out/tokenizer/ckpt.pt", help="checkpoint of tokenizer.py")
    data: str = arg("", help="as in tokenizer.py; empty: what the tokenizer was trained on")
    out: str = arg("out/mergear")
    cache: str = arg("", help="folder of the code caches; empty: codes/ beside the tokenizer")
    views: int = arg(2, help="centre crop, mirror image, then random crops", low=1, high=1000)
    # the transformer
    #                      tiny  b     l     xl
    model: str = arg(     "tiny", "b", "l", "xl", help="preset: tiny, b, l or xl")
    width: int = arg(      96,   768,  1024, 1280, help="transformer width D", low=4)
    depth: int = arg(      4,    12,   24,   36, help="transformer blocks", low=1)
    heads: int = arg(      4,    12,   16,   20, help="attention heads", low=1)
    head_depth: int = arg( 1,    2,    2,    2, help="blocks over the sub-tokens of a code", low=0)
    window: int = arg(     8,    16,   16,   16, help="mergear: recent visible positions", low=0)
    # the loss
    dropout: float = arg(  0.0,  0.1,  0.1,  0.1, help="after attention and MLP", low=0, high=0.9)
    token_dropout: float = arg(0.0, 0.1, 0.1, 0.1, help="share of codes hidden", low=0, high=1)
    label_smoothing: float = arg(0.0, 0.1, 0.1, 0.1, help="of the codes' loss", low=0, high=0.9)
    class_dropout: float = arg(0.1, help="share of labels hidden, for guidance", low=0, high=1)
    w_position: float = arg(0.3, help="randar: weight of the positions' loss", low=0)
    # optimisation
    batch_size: int = arg( 32,   1024, 1024, 1024)
    max_steps: int = arg(  2800, 0,    0,    0)
    epochs: int = arg(300)
    lr: float = arg(       2e-3, 1e-4, 1e-4, 1e-4)
    lr_schedule: str = arg("cosine", "step", "step", "step")
    warmup: int = arg(     100,  1000, 1000, 1000)
    weight_decay: float = arg(0.05)
    eval_every: int = arg( 1400, 5000, 5000, 5000)
    save_every: int = arg( 700,  5000, 5000, 5000)
    # from tokenizer and data: no flags
    bits: int = 8              # code bits d
    length: int = 64           # L
    num_classes: int = 10      # 0: unlabelled images
    class_names: tuple = ()
    keep: int = 36             # the tokenizer's target K
    keeps: tuple = (16, 25, 36, 49, 64)  # every K that has a merge instruction, ascending

    @property
    def prefix(self):  # P: class, and the merge instruction except in raster mode
        return 1 if self.mode == "raster" else 2

    @property
    def sub_bits(self):  # how the d bits of a code are divided into sub-tokens, low bits first
        # 18 bits: 64 and 4,096 outputs, not 262,144
        return (self.bits,) if self.bits <= 10 else (6, self.bits - 6)

# parameters with d = 8, L = 64: tiny 0.5M; with d = 18, L = 1024: b 106M, l 343M, xl 784M
MODELS = presets(GPTConfig, ("tiny", "b", "l", "xl"))

# Id spaces, defined here and nowhere else
#   class          0 .. num_classes-1, then the null class = num_classes. Unlabelled: only 0
#   instruction    index into config.keeps. Callers pass K itself, the model looks the index up
#   code           0 .. 2^d-1, bit j is worth 2^j, as in the tokenizer
#   sub-token s    0 .. 2^sub_bits[s]-1: bits of the code; s = 0 has the low ones
#   position       0 .. L-1 on the grid, row by row. It is also the position instruction
#   merged token   0 .. K-1, by ascending first position: index into `first` (B,K)
#   sequence row   t = 0 class, [1 merge instruction,] then by mode
#
#       raster   fed       c   x_0 x_1 x_2 ... x_{L-2}
#                predicts x_0  x_1 x_2 x_3 ... x_{L-1}
#       mergear  fed       c    m  x_0 x_1 x_2 ... x_{L-2}   m: merge instruction, which K
#                predicts      x_0 x_1 x_2 x_3 ... x_{L-1}   some earlier rows are masked
#       randar   fed       c    m  p_0 x_0 p_a x_a ... p_z   0, a, ... z: first positions
#                predicts          x_0     x_a     ... x_z
#                and               {p}     {p}                {p}: those that remain
#
#   seeds          (seed, step, 3) token dropout, (seed, step, 4) class dropout,
#                  (seed, step, rank, 5) nn.Dropout, (seed, step, 6) rows of the code cache,
#                  (seed, step, 7) order of the merged tokens, (seed, 1, step) K as in stage 1,
#                  (seed, view) order of a view in the code cache, (seed, sample) one sample

# -----------------------------------------------------------------------------
# MergeAR: what a position may see (paper Eq. 12 and Figure 6).

def mergear_mask(token_of, window, keep=None):
    """(B,L) merged token of each position -> (B,L,L) bool: may the row that is fed x_i (axis 1),
    and predicts x_{i+1}, attend to the row that is fed x_j (axis 2)?

    Yes if j is i, one of the `window` positions before i, or the first position of its token. In
    training token_of is source. Sampling has no source: there equal codes count as one token.
    Tokens after the first `keep` have no first: a compact cache has no place for them.
    """
    same = token_of[:, :, None] == token_of[:, None]  # (B,L,L)
    met_before = same.tril(-1).any(2)
    first = ~met_before  # (B,L)
    if keep is not None:
        first = first & (first.cumsum(1) <= keep)
    i = torch.arange(token_of.shape[1], device=token_of.device)
    distance = i[:, None] - i  # (L,L)
    near = distance <= window
    return (distance >= 0) & (near | first[:, None])

# -----------------------------------------------------------------------------
# A code as one or two small sub-tokens, so that no softmax has 2^18 outputs.

def split_codes(codes, sub_bits):
    """int64 codes (...) -> sub-tokens (...,S). Sub-token 0 has the low bits."""
    subs = [codes >> sum(sub_bits[:s]) & 2 ** n - 1 for s, n in enumerate(sub_bits)]
    return torch.stack(subs, dim=-1)

def join_codes(subs, sub_bits):
    """Sub-tokens (...,S) -> int64 codes (...). The inverse of split_codes."""
    return sum(subs[..., s] << sum(sub_bits[:s]) for s in range(len(sub_bits)))

# -----------------------------------------------------------------------------
# The model: LLaMA's block (RMSNorm, SwiGLU, rotary positions)

def rope_table(config, device):
    """cos and sin (2,P+L,D/h): half of the pairs turn with the grid row, half with the column.

    The fastest pair turns by 1 radian a step, the slowest by about 1/grid. With the base of a
    language model, 10,000, most pairs would hardly turn on a grid (2403.13298 takes 100).
    """
    position = torch.arange(config.length, device=device)
    pairs = config.width // config.heads // 4
    grid = math.isqrt(config.length)
    frequency = float(grid) ** (-torch.arange(pairs, device=device) / pairs)
    row, column = position // grid, position % grid
    angle = torch.cat([row[:, None] * frequency, column[:, None] * frequency], dim=1)
    angle = F.pad(angle, (0, 0, config.prefix, 0))  # (P+L,D/h/2). The prefix does not turn
    cos = torch.cat([angle.cos(), angle.cos()], dim=1)
    sin = torch.cat([-angle.sin(), angle.sin()], dim=1)
    return torch.stack([cos, sin])

def rotate(x, cos, sin):
    """Turn each pair (x_n, x_{n + half}) by its angle. The first half of `sin` is negative."""
    y = x.float()
    return (y * cos + y.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)

def causal_attention(q, k, v):
    """Plain causal attention (N,h,S,D/h): some SDPA kernels refuse N = B L above 65,535."""
    if q.shape[2] == 1:  # a token alone sees itself
        return v
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (N,h,S,S)
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf).softmax(-1) @ v

class Linear(nn.Linear):
    """nn.Linear without bias: (...,rows,c_in) -> (...,rows,c_out). A decoding step has few rows. On
    a CPU they are multiplied faster with the weight on the left: (W x^T)^T."""
    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out, bias=False)

    def forward(self, x):
        many = x.numel() > 256 * x.shape[-1]
        if many or x.device.type != "cpu" or torch.is_grad_enabled():
            return super().forward(x)
        return (self.weight @ x.flatten(0, -2).T).T.view(*x.shape[:-1], self.out_features)

class Block(nn.Module):
    """Pre-norm transformer block. How it attends differs between training and KV caches."""
    def __init__(self, config):
        super().__init__()
        D = config.width
        # SwiGLU has three matrices, so its hidden width is 2/3 of 4 D, rounded up
        unit = 256 if D >= 512 else 32
        hidden = math.ceil(8 * D / 3 / unit) * unit
        self.heads = config.heads
        self.dropout = nn.Dropout(config.dropout)
        self.norm1 = nn.RMSNorm(D, eps=1e-5)
        self.qkv = Linear(D, 3 * D)
        self.proj = Linear(D, D)
        self.norm2 = nn.RMSNorm(D, eps=1e-5)
        self.up = Linear(D, 2 * hidden)
        self.down = Linear(hidden, D)

    def forward(self, x, attend, rope=None):
        """x (B,T,D); attend(q, k, v), each (B,h,T,D/h), -> (B,h,T,D/h); rope: cos and sin."""
        B, T, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.heads, D // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3,B,h,T,D/h)
        q, k, v = qkv
        if rope is not None:
            q, k = rotate(qkv[:2], *rope)
        mixed = attend(q, k, v).transpose(1, 2).reshape(B, T, D)
        x = x + self.dropout(self.proj(mixed))
        gate, up = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.dropout(self.down(F.silu(gate) * up))

class GPT(nn.Module):
    """Class-conditional transformer. forward() sees whole sequences, run_blocks() one step."""
    def __init__(self, config):
        super().__init__()
        c, D = config, config.width
        # a head turns pairs of numbers, half of them with the row and half with the column
        assert D % (4 * c.heads) == 0, f"--width {D} is not a multiple of 4 x --heads {c.heads}"
        self.config = config
        self.null_class = c.num_classes
        self.class_embed = nn.Embedding(c.num_classes + 1, D)
        self.sub_embed = nn.ModuleList(nn.Embedding(2 ** n, D) for n in c.sub_bits)
        self.mask_embed = nn.Parameter(torch.empty(D))  # stands for a dropped input code
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        head_depth = c.head_depth if len(c.sub_bits) > 1 else 0
        self.head_blocks = nn.ModuleList(Block(c) for _ in range(head_depth))
        self.norm = nn.RMSNorm(D, eps=1e-5)
        self.to_logits = nn.ModuleList(nn.Linear(D, 2 ** n, bias=False) for n in c.sub_bits)
        if c.mode != "raster":
            self.merge_instruction = nn.Embedding(len(c.keeps), D)
        if c.mode == "randar":
            self.position_instruction = nn.Embedding(c.length, D)
            to_positions = nn.Linear(D, c.length, bias=False)
            self.position_head = nn.Sequential(nn.RMSNorm(D, eps=1e-5), to_positions)
        # Normal(0.02). As in GPT-2, what is added to the stream n times has 0.02 / sqrt n
        for name, p in self.named_parameters():
            stack = self.head_blocks if name.startswith("head_blocks") else self.blocks
            if p.dim() == 1 and name != "mask_embed":
                nn.init.ones_(p)  # norms
            elif name.endswith(("proj.weight", "down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * len(stack)))
            else:
                nn.init.normal_(p, std=0.02)

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
        """h (...,D), the first s sub-tokens of its code (...,s) -> list of s + 1 logits."""
        # a tiny causal transformer along the sub-tokens: [h, sub_0] -> [sub_0, sub_1]
        tokens = [h] + [self.sub_embed[s](subs[..., s]) for s in range(subs.shape[-1])]
        x = torch.stack(tokens, dim=-2).flatten(0, -3)  # (rows,s+1,D)
        for block in self.head_blocks:
            x = block(x, causal_attention)
        x = self.norm(x).view(*h.shape[:-1], len(tokens), -1)  # (...,s+1,D)
        return [self.to_logits[s](x[..., s, :]) for s in range(len(tokens))]

    def forward(self, codes, labels, keep=None, mask=None, first=None, dropped=None):
        """codes (B,N), labels (B,), what sequence() gives, dropped (B,N) bool: codes to hide ->
        S logits of sub-tokens (B,N,2^sub_bits[s]), of the next position (B,K-1,L) or None."""
        c, P = self.config, self.config.prefix
        x = self.embed_codes(codes)  # (B,N,D)
        if dropped is not None:
            hidden = dropped[:, :codes.shape[1], None]
            x = torch.where(hidden, self.mask_embed.to(x.dtype), x)
        rope = rope_table(c, x.device)  # (2,P+L,D/h)
        if c.mode == "randar":
            # Eq. 13: before each code stands the instruction that says where it goes
            asked = self.position_instruction(first).to(x.dtype)
            x = torch.stack([asked, x], dim=2).flatten(1, 2)  # (B,2K,D): p x p x ...
            # both rows of a pair turn with the grid position of its token
            row = F.pad(P + first.repeat_interleave(2, dim=1), (P, 0))  # (B,P+2K)
            rope = rope[:, row][:, :, None]  # (2,B,1,P+2K,D/h)
        prefix = self.embed_prefix(labels, keep).to(x.dtype)
        # the last code is never an input
        x = torch.cat([prefix, x[:, :-1]], dim=1)  # (B,T,D)
        T = x.shape[1]
        if mask is not None:
            causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
            # x_{L-1} is not fed, the prefix is always seen
            inner = F.pad(mask[:, :-1, :-1], (P, 0, P, 0), value=True)
            mask = (causal & inner)[:, None]  # (B,1,T,T)
        attend = functools.partial(F.scaled_dot_product_attention, attn_mask=mask,
                                   is_causal=mask is None)
        for block in self.blocks:
            x = block(x, attend, rope[..., :T, :])
        subs = split_codes(codes, c.sub_bits)[..., :-1]
        if c.mode != "randar":
            return self.head(x[:, P - 1:], subs), None
        # both are read at the instruction, before its code is fed: so one call of the model can
        # draw the codes of a step and the positions of the next
        return self.head(x[:, P::2], subs), self.position_head(x[:, P:-1:2])

    def run_blocks(self, x, rope, cache):
        """x (R,n,D) -> (R,n,D). Keys are cached after rotation: their rows may lie in any order."""
        for layer, block in enumerate(self.blocks):
            x = block(x, functools.partial(cache.attend, layer), rope)
        return x

    def new_cache(self, sequences, keep=None):
        """KV cache for R sequences. keep: how many first positions or codes it holds."""
        c = self.config
        if c.mode == "mergear":
            return CompactCache(self, sequences, keep)
        rows = 2 * keep if c.mode == "randar" else c.length
        return DenseCache(self, sequences, c.prefix + rows - 1)

# -----------------------------------------------------------------------------
# Sequences and losses of the three modes

def draw_orders(samples, keep, generator):
    """An order of the merged tokens for each sample -> (samples,K): 0, then a permutation."""
    u = torch.rand(samples, keep, generator=generator)
    u[:, 0] = -1
    return u.argsort(dim=1)

def sequence(config, codes, source, keep, order=None):
    """codes, source (B,L), K -> (codes (B,N) as they follow in the sequence, arguments of
    GPT.forward besides labels). order (B,K): randar only."""
    if config.mode == "raster":
        return codes, {}
    if config.mode == "mergear":  # Eq. 12
        return codes, dict(keep=keep, mask=mergear_mask(source, config.window))
    first = first_position_of_token(source, keep).gather(1, order)  # (B,K)
    return codes.gather(1, first), dict(keep=keep, first=first)

def code_losses(logits, codes, sub_bits, label_smoothing=0.0):
    """S logits, codes (B,N) -> (smoothed cross-entropy in nats, -log2 p(code)), (B,N) each.
    p(code) = p(sub_0) p(sub_1 | sub_0)."""
    loss, nll = 0.0, 0.0
    for s, target in enumerate(split_codes(codes, sub_bits).unbind(-1)):
        logp = logits[s].float().log_softmax(-1)  # (B,N,2^sub_bits[s])
        target_nll = -logp.gather(-1, target[..., None])[..., 0]  # (B,N)
        loss = loss + (1 - label_smoothing) * target_nll - label_smoothing * logp.mean(-1)
        nll = nll + target_nll.detach()
    return loss, nll / math.log(2)

def position_losses(logits, first):
    """Logits (B,K-1,L) of the next position, first (B,K) in sequence -> (loss (B,K-1), bits (B,)).

    The order is random: each first position that remains is next with the same probability. The
    cross-entropy to that uniform distribution is the expectation over all orders.
    bits: -log2 p of the set of positions. Position 0 is always there and costs nothing.
    """
    B, K = first.shape
    turn = torch.arange(K, device=first.device)  # (K,)
    # the turn at which each position is drawn. Row k may still ask for those of later turns
    drawn_at = torch.full((B, 1, logits.shape[2]), K, device=first.device)  # K: never
    drawn_at.scatter_(2, first[:, None], turn.expand(B, 1, K))
    possible = drawn_at > turn[:-1, None]  # (B,K-1,L)
    remain = possible & (drawn_at < K)
    logp = logits.float().masked_fill(~possible, -math.inf).log_softmax(-1)
    count = K - 1 - turn[:-1]  # positions that remain
    loss = -logp.masked_fill(~remain, 0.0).sum(-1) / count  # (B,K-1)
    # less the log2 (K-1)! bits of the order
    bits = (loss - count.log()).detach() / math.log(2)
    return loss, bits.sum(1)

def all_losses(model, config, codes, source, labels, keep, order, dropped=None):
    """A batch of the code cache -> {name: (B,)}. `loss` is what is trained."""
    codes, inputs = sequence(config, codes, source, keep, order)  # (B,N)
    logits, positions = model(codes, labels, dropped=dropped, **inputs)
    loss, bits = code_losses(logits, codes, config.sub_bits, config.label_smoothing)
    # a new loss needs an entry here, and its share of "loss"
    losses = dict(loss=loss.mean(1), bits=bits.mean(1))
    if config.mode == "randar":
        position, losses["position_bits"] = position_losses(positions, inputs["first"])
        losses["position"] = position.sum(1) / keep  # a code, as the loss of the codes
        losses["loss"] = losses["loss"] + config.w_position * losses["position"]
    return losses

# -----------------------------------------------------------------------------
# KV caches, written in place. begin() decides for all layers where new rows go and what they see.

class DenseCache:
    """Raster and randar mode: sequence row t is cache row t."""
    def __init__(self, gpt, sequences, rows):
        c, like = gpt.config, gpt.mask_embed
        self.rows, self.heads, self.device = rows, c.heads, like.device
        shape = (sequences * c.heads, rows, c.width // c.heads)  # (Rh,rows,D/h)
        self.keys = [like.new_zeros(shape) for _ in range(c.depth)]
        self.values = [like.new_zeros(shape) for _ in range(c.depth)]
        self.nbytes = sum(x.nbytes for x in self.keys + self.values)

    def limit(self, rows):
        """From now on attend to the first `rows` rows, rounded up to a multiple of 64 -> how many.
        Up to there all steps have one shape, and a CUDA graph can replay them."""
        self.visible = min(math.ceil(rows / 64) * 64, self.rows)
        return self.visible

    def begin(self, t, codes=None, n=1, alone=0):
        """n rows, from sequence row t on, after limit(). The last `alone` do not see each other."""
        column = torch.arange(self.visible, device=self.device)
        row = t + column[:n]  # (n,)
        self.place = slice(None), row
        row, last = row[:, None], t + n - alone
        unseen = (column > row) | (column >= last) & (column != row)  # (n,visible)
        self.bias = torch.zeros_like(unseen, dtype=self.keys[0].dtype)
        self.bias.masked_fill_(unseen, -math.inf)

    def attend(self, layer, q, k, v):
        """(R,h,n,D/h) each -> (R,h,n,D/h). For few queries, bmm is faster than SDPA kernels."""
        self.keys[layer][self.place] = k.flatten(0, 1)
        self.values[layer][self.place] = v.flatten(0, 1)
        keys = self.keys[layer][:, :self.visible].transpose(1, 2)
        values = self.values[layer][:, :self.visible]
        scale = q.shape[-1] ** -0.5
        scores = torch.baddbmm(self.bias, q.flatten(0, 1), keys, alpha=scale)  # (Rh,n,visible)
        return torch.bmm(scores.softmax(-1), values).view(q.shape)

class CompactCache(DenseCache):
    """Mergear mode: 3 + K + window rows per sequence, whatever L is (Figure 6).

        window + 1 rows   a ring: if sequence row t is a repeat, it is in slot t % (window + 1)
        2 + K rows        class, instruction, first positions in order of appearance, for ever

    A code is a repeat if the permanent rows already hold it, or if they are full. So a
    row sees exactly what mergear_mask(codes, window, keep=K) shows.
    """
    def __init__(self, gpt, sequences, keep):
        c = gpt.config
        self.window = c.window
        self.ring = min(c.window + 1, c.length)
        super().__init__(gpt, sequences, self.ring + c.prefix + keep)
        self.forever = c.prefix + c.length
        # (R,rows): the code in each cache row, and the last sequence row that sees it
        self.code = torch.full((sequences, self.rows), -1, device=self.device)
        self.visible_until = torch.full_like(self.code, -1)
        self.count = torch.zeros_like(self.code[:, 0])  # (R,) rows in use after the ring
        self.sequence = torch.arange(sequences * c.heads, device=self.device)[:, None]

    def limit(self, rows):
        """The same for `rows` sequence rows, each of which may be a first position."""
        super().limit(self.ring + rows)
        return self.forever if self.visible == self.rows else self.visible - self.ring

    def begin(self, t, codes=None):
        """Find a place for sequence row t (1,), which is fed codes (R,), or None: the prefix."""
        if codes is None:  # no code, which is 0 or more, and no empty row, which is -1: it stays
            codes = (-2 - t).expand_as(self.count)
        known = (self.code == codes[:, None]).any(1)  # (R,)
        first = ~known & (self.count < self.rows - self.ring)
        # a first goes behind the last permanent row, a repeat into its slot of the ring
        row = torch.where(first, self.ring + self.count, t % self.ring)[:, None]
        until = torch.where(first, self.forever, t + self.window)
        self.code.scatter_(1, row, codes[:, None])
        self.visible_until.scatter_(1, row, until[:, None])
        self.count += first
        # from here on per head
        self.place = (self.sequence, row.repeat_interleave(self.heads, 0))
        unseen = self.visible_until[:, :self.visible] < t
        unseen = unseen.repeat_interleave(self.heads, 0)[:, None]
        self.bias = torch.zeros_like(unseen, dtype=self.keys[0].dtype)  # (Rh,1,rows)
        self.bias.masked_fill_(unseen, -math.inf)

# -----------------------------------------------------------------------------
# Sampling

# Of the codes. In randar mode an unlikely code spoils all that follow, and the positions,
# which are drawn too, give variety already
TEMPERATURE = dict(raster=1.0, mergear=1.0, randar=0.2)
# Of randar's positions. Each draw may fall where no real set of positions would have one, and
# over K - 1 draws these chances add up
POSITION_TEMPERATURE = 0.3

def guide(logits, cfg):
    """Classifier-free guidance: logits (2B,V), conditional half first -> (B,V)."""
    cond, uncond = logits.float().chunk(2)
    return uncond + cfg * (cond - uncond)

def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Inverse transform sampling: logits (B,V), u (B,) uniform in [0,1) -> (B,). top_k > 0 keeps
    the k most likely, top_p < 1 the smallest set of at least that probability. temperature 0:
    argmax."""
    if temperature < 1e-3:  # below this the logits overflow
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
    cumulative = p.cumsum(-1, dtype=u.dtype)  # (B,V)
    total = cumulative[:, -1]
    # rounding must not lead past the last entry
    at = torch.minimum(u * total, total * (1 - torch.finfo(u.dtype).eps))
    return torch.searchsorted(cumulative, at[:, None], right=True)[:, 0]

def pick_codes(gpt, h, noise, cfg, filters):
    """h (R,n,D), noise (B,n,S) uniform, guidance scale, settings of draw() -> codes (B,n)."""
    copies = len(h) // len(noise)
    sub_bits = gpt.config.sub_bits
    subs = noise.new_empty(*noise.shape[:2], 0, dtype=torch.long)
    for s in range(len(sub_bits)):
        # both halves of a guided batch continue with the same sub-tokens
        logits = gpt.head(h, subs.repeat(copies, 1, 1))[s]  # (R,n,2^sub_bits[s])
        logits = guide(logits, cfg) if copies == 2 else logits
        sub = draw(logits.flatten(0, 1), noise[..., s].flatten(), **filters)
        subs = torch.cat([subs, sub.view(*noise.shape[:2], 1)], dim=-1)  # (B,n,s+1)
    return join_codes(subs, sub_bits)

def repeat(step, times, device):
    """step() `times` times. It reads and writes fixed tensors only, so a GPU can record it once
    and replay it (a CUDA graph): one launch, not hundreds."""
    if device.type != "cuda" or times < 3:
        for _ in range(times):
            step()
        return
    step()  # libraries set themselves up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    for _ in range(times - 1):
        graph.replay()
    torch.cuda.synchronize(device)  # before the graph's memory goes

def sample_in_order(gpt, labels, keep, noise, scales, filters):
    """Raster and mergear: labels (R,), noise (B,L,S), a guidance scale per step -> (B,L)."""
    P, L = gpt.config.prefix, gpt.config.length
    copies = len(labels) // len(noise)
    cache = gpt.new_cache(len(labels), keep)
    rope = rope_table(gpt.config, labels.device)  # (2,P+L,D/h)
    # by sequence row: what it draws. Draws of the prefix before its last row are not used
    codes = labels.new_zeros(len(noise), P - 1 + L)
    noise = F.pad(noise, (0, 0, P - 1, 0))  # (B,P-1+L,S)
    scales = torch.tensor([1.0] * (P - 1) + scales, device=labels.device)
    t = labels.new_zeros(1)  # a tensor: a number would be recorded in the CUDA graph

    def step(x=None):
        """Feed row t: the prefix x (R,D), or the code drawn last. Draw a code."""
        fed = None
        if x is None:
            fed = codes.index_select(1, t - 1)[:, 0].repeat(copies)  # (R,)
            x = gpt.embed_codes(fed)
        cache.begin(t, fed)
        h = gpt.run_blocks(x[:, None], rope.index_select(1, t), cache)  # (R,1,D)
        u = noise.index_select(1, t)
        scale = scales.index_select(0, t)
        codes.index_copy_(1, t, pick_codes(gpt, h, u, scale, filters))
        t.add_(1)

    cache.limit(P)
    for x in gpt.embed_prefix(labels, keep).unbind(1):
        step(x)
    done = P
    # the steps up to a limit of the cache are alike
    while done < codes.shape[1]:
        end = min(cache.limit(done + 1), codes.shape[1])
        repeat(step, end - done, labels.device)
        done = end
    return codes[:, P - 1:]

def arccos_steps(keep, steps=None):
    """How many of `keep` codes each step draws: one, then few, at last many. After a share r of
    the steps, 1 - 2/pi arccos(r) of the codes are known (MaskGIT, 2202.04200)."""
    # the paper's 64 steps for 144 codes and 88 for 256, and a power law through both: the
    # exponent is log(88 / 64) / log(256 / 144)
    steps = steps or max(1, min(keep, round(64 * (keep / 144) ** 0.5535)))
    assert min(2, keep) <= steps <= keep, f"{steps} steps for {keep} codes"
    shares = [1 - 2 / math.pi * math.acos(s / steps) for s in range(steps + 1)]
    known = [max(s, round(keep * share)) for s, share in enumerate(shares)]
    known[1] = 1  # position 0 alone: no row has predicted another one
    return [b - a for a, b in itertools.pairwise(known)]

def sample_parallel(gpt, labels, keep, noise, position_noise, counts, scales, filters,
                    position_temperature):
    """Randar: step s draws counts[s] codes and the positions of the next step, in one call.
    labels (R,), noise (B,L,S), position_noise (B,steps,L), scales of the steps, settings of
    draw(), temperature of the positions -> codes, first (B,K), as drawn."""
    P, L = gpt.config.prefix, gpt.config.length
    copies = len(labels) // len(noise)
    cache = gpt.new_cache(len(labels), keep)
    rope = rope_table(gpt.config, labels.device)
    x = gpt.embed_prefix(labels, keep)  # (R,P,D)
    rows = torch.arange(P, device=labels.device).expand(len(labels), -1)  # of the rotary table
    drawn = labels.new_zeros(len(noise), 1)  # (B,n)
    # -inf: a position that is drawn
    bias = torch.zeros(len(noise), L, device=labels.device)
    codes, first, t, known = [], [], 0, 0
    for s, n in enumerate(counts):
        # fed: [p x p x p x] of the step before, then [p p p] of this step, which see the pairs
        # but not each other. The next call writes its pairs over them in the cache
        at = drawn.repeat(copies, 1)  # (R,n)
        asked = gpt.position_instruction(at)
        cache.limit(t + x.shape[1] + n)
        cache.begin(t, n=x.shape[1] + n, alone=n)
        t += x.shape[1]
        x = torch.cat([x, asked], dim=1)
        rows = torch.cat([rows, P + at], dim=1)
        h = gpt.run_blocks(x, rope[:, rows][:, :, None], cache)[:, -n:]  # (R,n,D)
        u = noise[:, known:known + n]
        picked = pick_codes(gpt, h, u, scales[s], filters)  # (B,n)
        codes.append(picked)
        first.append(drawn)
        known += n
        if known == keep:
            return torch.cat(codes, dim=1), torch.cat(first, dim=1)
        answer = gpt.embed_codes(picked.repeat(copies, 1))
        x = torch.stack([asked, answer], dim=2).flatten(1, 2)  # (R,2n,D)
        rows = (P + at).repeat_interleave(2, dim=1)  # (R,2n)
        # the n largest of logits + Gumbel noise are n draws without replacement (1903.06059)
        bias.scatter_(1, drawn, -math.inf)
        # asked at the last instruction. It knows neither the codes just drawn nor the other
        # positions of this step: `bias` forbids to draw them again
        logits = gpt.position_head(h[:, -1]).float()  # (R,L)
        if copies == 2:  # positions of the next step, so its scale
            logits = guide(logits, scales[s + 1])  # (B,L)
        logits = logits / position_temperature + bias
        gumbel = -(-position_noise[:, s].clamp(min=1e-9).log()).log()  # (B,L)
        drawn = (logits + gumbel).topk(counts[s + 1]).indices

@torch.no_grad()
def sample_codes(gpt, labels, cfg=1.0, temperature=-1.0, top_k=0, top_p=1.0, seed=0, start=0,
                 keep=None, steps=None, cfg_schedule="constant",
                 position_temperature=POSITION_TEMPERATURE):
    """labels (B,) class ids -> codes (B,N), their first positions (B,N), ascending. Sample i is a
    function of (seed, start + i) and its label.

    cfg: guidance scale, 1.0 for none. cfg_schedule linear: it grows from 1 with the share of
    codes known. keep: merge instruction K, bound of the mergear cache, number of randar codes.
    steps: see arccos_steps. temperature, top_k, top_p: of the codes; temperature -1: the mode's.
    """
    c, device = gpt.config, gpt.mask_embed.device
    assert not gpt.training, "sample from a model in eval mode"
    keep = c.keep if keep is None else keep
    counts = arccos_steps(keep, steps) if c.mode == "randar" else [1] * c.length
    known = itertools.accumulate(counts)
    grow = cfg_schedule == "linear"
    scales = [1 + (cfg - 1) * n / sum(counts) if grow else cfg for n in known]
    temperature = TEMPERATURE[c.mode] if temperature < 0 else temperature
    filters = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    generators = [seeded(seed, start + i) for i in range(len(labels))]

    def uniform(*size):  # each sample has a generator of its own
        noise = torch.stack([torch.rand(size, generator=g) for g in generators])
        return noise.to(device, non_blocking=True)

    noise = uniform(c.length, len(c.sub_bits))  # (B,L,S)
    labels = labels.to(device)
    if cfg != 1.0:
        labels = torch.cat([labels, torch.full_like(labels, gpt.null_class)])  # (2B,)
    if c.mode != "randar":
        codes = sample_in_order(gpt, labels, keep, noise, scales, filters)
        return codes, torch.arange(c.length, device=device).expand_as(codes)
    position_noise = uniform(len(counts), c.length)  # (B,steps,L)
    codes, first = sample_parallel(gpt, labels, keep, noise, position_noise, counts, scales,
                                   filters, position_temperature)
    first, order = first.sort(dim=1)
    return codes.gather(1, order), first

@torch.no_grad()
def draw_images(gpt, tokenizer, labels, batch_size, start=0, **sampling):
    """labels (B,), B <= batch_size -> images (B,3,H,W) of samples start, start + 1, ..."""
    # rounding depends on the batch size, and one rounded code changes all that follow
    assert len(labels) <= batch_size, f"{len(labels)} labels, batch size {batch_size}"
    padded = F.pad(labels, (0, batch_size - len(labels)))
    codes, first = sample_codes(gpt, padded, start=start, **sampling)
    source = tokenizer.recover(codes, first)  # the identity when every position has its code
    return tokenizer.decode(codes, source)[:len(labels)]

def load_generator(path, device="cpu"):
    """Checkpoint -> (GPT, MergeVQ) with EMA weights, frozen, in eval mode. Raises UserError."""
    state = load_checkpoint(path, "generator", device)
    gpt = GPT(GPTConfig(**state["config"])).to(device)
    load_parts(path, state, ema=gpt)
    gpt.eval().requires_grad_(False)
    return gpt, tokenizer_from_state(state["tokenizer"], device)

# -----------------------------------------------------------------------------
# The code cache: V views of N images, encoded once. Its file holds int32, a row for each view of
# each image: L codes, L of source, class. A view is stored in a random order of its own, so that
# 64 rows of one K hold many classes.

BLOCK = 64  # rows that are encoded together, with one K

@torch.no_grad()
def open_codes(dataset, tokenizer, config, run, views, sample_k):
    """-> (file (V N,2L+1) as a memory map, K of each row (V N,)).

    sample_k: views after the first draw K as stage 1 does. The file's name is a hash of all that
    its rows depend on: it is made once, and runs share it.
    """
    t = dataclasses.replace(tokenizer.config, seed=config.seed)
    N = len(dataset)
    blocks = [(view, i) for view in range(views) for i in range(0, N, BLOCK)]
    # a block has one K, drawn as in a step of stage 1
    keeps = [sample_keep(t, b) if sample_k and view > 0 else t.keep
             for b, (view, _) in enumerate(blocks)]
    keep_of_row = np.repeat(keeps, [min(BLOCK, N - i) for _, i in blocks])
    made_from = weights_hash(tokenizer.state_dict()), dataset.digest(), t.seed, keeps
    name = hashlib.sha256(str(made_from).encode()).hexdigest()
    path = f"{config.cache}/{name[:16]}.npy"
    # all ranks have looked before one of them writes, and another run may finish meanwhile
    there = gather_rows(torch.tensor([os.path.exists(path)]), run).all()
    if not there:
        # encode in float32, split over the ranks, into a file of this run's own; then rename it
        own = hashlib.sha256(os.path.abspath(config.out).encode()).hexdigest()
        new = f"{path}.{own[:8]}"
        if run.main:
            os.makedirs(config.cache, exist_ok=True)
            new_array(new, np.int32, (views * N, 2 * t.length + 1))
        run.barrier()
        table = np.load(new, "r+")
        orders = [np.random.default_rng([t.seed, view]).permutation(N) for view in range(views)]
        mine = range(run.rank, len(blocks), run.world)
        keys = []
        for b in mine:
            view, i = blocks[b]
            keys.append([View(image, view) for image in orders[view][i:i + BLOCK].tolist()])
        stream = load_batches(dataset, keys, run, loader_workers(config))
        for b in tqdm(mine, f"encoding into {path}", disable=not run.main):
            images, labels = next(stream)
            encoded = tokenizer.encode(images, keeps[b])
            codes = encoded.codes.gather(1, encoded.source)  # (n,L)
            rows = torch.cat([codes, encoded.source, labels[:, None]], dim=1)
            view, i = blocks[b]
            first = view * N + i
            table[first:first + len(rows)] = rows.cpu()
        table.flush()
        run.barrier()
        if run.main:
            os.replace(new, path)
        run.barrier()
    return np.load(path, mmap_mode="r"), keep_of_row

def code_batches(table, keep_of_row, t, config, run, step, sample_k):
    """Endless micro-batches (codes, source, labels, K) of this rank, a function of (seed, step).
    A step has one K, drawn as in stage 1. t: the tokenizer's config."""
    t = dataclasses.replace(t, seed=config.seed)
    rows_with = {int(K): np.flatnonzero(keep_of_row == K) for K in np.unique(keep_of_row)}
    micro = micro_batch(config, run)
    while True:
        K = sample_keep(t, step) if sample_k else t.keep
        K = K if K in rows_with else t.keep  # a small cache may lack a rare one
        generator = seeded(config.seed, step, 6)
        places = torch.randint(len(rows_with[K]), (config.batch_size,), generator=generator)
        rows = rows_with[K][places.numpy()]
        for micro_step in range(config.accum):
            start = (micro_step * run.world + run.rank) * micro
            batch = torch.from_numpy(table[rows[start:start + micro]])
            batch = batch.to(run.device, non_blocking=True).long()  # (b,2L+1)
            codes, source, labels = batch.split([t.length, t.length, 1], dim=1)
            yield codes, source, labels[:, 0], K
        step += 1

# -----------------------------------------------------------------------------
# Evaluation and training

CURVES = ("loss", "bits", "val_bits", "position", "position_bits", "val_position_bits",
          "grad_norm", "lr")

@torch.no_grad()
def evaluate(gpt, val_codes, config, run):
    """Bits per code, and randar's bits per set of positions, on validation images at target K."""
    names = ["bits", "position_bits"] if config.mode == "randar" else ["bits"]
    # one order for all images
    order = draw_orders(1, config.keep, seeded(0)).to(run.device)
    results = [torch.zeros(0, len(names), device=run.device)]  # a rank may have no image
    for batch in val_codes:
        orders = order.expand(len(batch[0]), -1)
        with run.autocast():
            losses = all_losses(gpt, config, *batch, config.keep, orders)
        results.append(torch.stack([losses[name] for name in names], dim=1))
    means = gather_rows(torch.cat(results), run).mean(0).tolist()
    return {f"val_{name}": mean for name, mean in zip(names, means)}

def draw_samples(gpt, tokenizer, config, path, num=20):
    """PNG: `num` images, the classes in turn, as generate.py makes them."""
    labels = torch.arange(num) % max(1, config.num_classes)
    cfg = 2.0 if config.num_classes else 1.0
    images = draw_images(gpt, tokenizer, labels, num, cfg=cfg, seed=config.seed)
    names = [config.class_names[n] for n in labels] if config.num_classes else None
    image_grid(images.cpu(), path, labels=names)

def main(argv=None):
    config = parse_config(GPTConfig, __doc__, argv, MODELS, "model")
    # a run has its tokenizer in its own checkpoint
    if config.resume:
        saved = load_checkpoint(f"{config.out}/ckpt.pt", "generator")
        made = saved["tokenizer"]
        config.cache = config.cache or saved["config"]["cache"]
    else:
        made = load_checkpoint(config.tokenizer, "tokenizer")
    made = dict(config=made["config"], ema=made["ema"])  # all of stage 1 that a generator keeps
    tokenizer = tokenizer_from_state(made)
    t = tokenizer.config
    config.data = config.data or t.data
    train_set, val_set = open_data(config, t.size)
    config.cache = config.cache or os.path.join(os.path.dirname(config.tokenizer), "codes")
    config = dataclasses.replace(
        config, bits=t.bits, length=t.length, keep=t.keep, keeps=tuple(keep_distribution(t)[0]),
        num_classes=train_set.num_classes, class_names=tuple(train_set.class_names))
    run = start_run(config)
    micro = micro_batch(config, run)
    # neither the shapes of the weights nor the code cache's file tell these
    state = open_out(config, run, "generator", ("mode", "heads", "window", "views", "seed"))
    tokenizer.to(run.device)
    sample_k = config.mode != "raster"  # it is not told K, so it learns the codes of one K
    codes = open_codes(train_set, tokenizer, config, run, config.views, sample_k)
    val_codes = []  # codes, source, class of up to 1,000 images
    for images, labels in val_batches(val_set, 1000, min(64, micro), run, loader_workers(config)):
        encoded = tokenizer.encode(images)
        val_codes.append((encoded.codes.gather(1, encoded.source), encoded.source, labels))

    torch.manual_seed(config.seed)  # the same weights on every rank
    raw_model = GPT(config).to(run.device)
    ema = copy.deepcopy(raw_model).eval().requires_grad_(False)
    betas = (0.9, 0.95) if config.mode == "randar" else (0.9, 0.99)  # Table A2
    optimizer = adamw(raw_model.parameters(), config, betas)
    parts = dict(model=raw_model, ema=ema, optimizer=optimizer)
    step, skipped = resume_run(config, state, run, parts)
    if config.compile:
        raw_model.compile()
    model = parallel(raw_model, run)
    if run.main:
        size = sum(p.numel() for p in raw_model.parameters())
        print(f"{config.model}, {config.mode}: {size / 1e6:.2f}M parameters, L = {config.length}, "
              f"K = {config.keep}; {config.max_steps} steps of {config.batch_size}; "
              f"train {train_set.describe()}; val {val_set.describe()}")

    stream = code_batches(*codes, t, config, run, step, sample_k)
    metrics = Metrics(config, run, step, CURVES)
    stop, stopping = catch_signals(), False
    while True:
        # The body runs max_steps + 1 times: the last time it only evaluates and saves
        last = step >= config.max_steps
        if last or (step % config.eval_every == 0 and not stopping):
            metrics.scores(step, evaluate(ema, val_codes, config, run))
            if run.main:
                draw_samples(ema, tokenizer, config, f"{config.out}/samples_{step:07d}.png")
        if run.main and (last or stopping or step % config.save_every == 0):
            save_run(config, "generator", step, skipped, parts, tokenizer=made)
        if last or stopping:
            break

        # randomness of the global batch. Only nn.Dropout differs between ranks
        lr = set_learning_rate(step, config, optimizer)
        shape = config.batch_size, config.length
        hide = torch.rand(shape, generator=seeded(config.seed, step, 3)) < config.token_dropout
        unlabel = torch.rand(shape[0], generator=seeded(config.seed, step, 4))
        unlabel = unlabel < config.class_dropout
        torch.manual_seed(seeded(config.seed, step, run.rank, 5).initial_seed())
        logs = {}
        raw_model.train()
        for micro_step in range(config.accum):
            codes, source, labels, keep = next(stream)  # (B,L), (B,L), (B,)
            # K came with the codes. All micro-batches draw this table, and use rows of their own
            orders = draw_orders(config.batch_size, keep, seeded(config.seed, step, 7))
            # this rank's rows of the global batch
            start = (micro_step * run.world + run.rank) * micro
            dropped, nameless, order = (x[start:start + micro].to(run.device, non_blocking=True)
                                        for x in (hide, unlabel, orders))
            labels = labels.masked_fill(nameless, raw_model.null_class)
            # DDP averages the gradients in the last backward pass only
            model.require_backward_grad_sync = micro_step == config.accum - 1
            with run.autocast():
                losses = all_losses(model, config, codes, source, labels, keep, order, dropped)
            (losses["loss"].mean() / config.accum).backward()
            for name, value in losses.items():
                logs[name] = logs.get(name, 0) + value.detach().mean() / config.accum

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
    end_run(config, run, step,
            f"done: {config.out}/ckpt.pt, samples_{step:07d}.png, curves.png; next: "
            f"python generate.py --ckpt {config.out}/ckpt.pt")

if __name__ == "__main__":
    run_main(main)
