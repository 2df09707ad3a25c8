"""Stage 1 of MergeVQ (arXiv 2504.00999): the tokenizer. It merges tokens, quantises them, and
remembers where they came from.

    python tokenizer.py                                          # tiny, embedded `shapes`, a CPU
    python tokenizer.py --data path/to/folder --align-views color   # tiny, your images
    python tokenizer.py --variant g --batch-size 16 --grad-ckpt  # one GPU, reads data/imagenet
    torchrun --nproc_per_node=8 tokenizer.py --variant g         # eight GPUs
    python tokenizer.py --resume                                 # continue the run in --out

The full versions of the three stubs (a path works as well as the word download):

    python tokenizer.py --variant gr --perceptual lpips --lpips-weights download \\
        --vgg-weights download --align dinov2 --init dinov2 --teacher-weights download

An image becomes L tokens (a CNN or a patch grid). A transformer merges them to K while it runs
(ToMe). Each merged token becomes d bits (LFQ). `source` says for each of the L positions which
of the K tokens stands for it:

    image (B,3,H,W) -> CNN -> (B,L,D) -> depth x [attention, merge, MLP] -> (B,K,D) -> codes
                                                  `-> source (B,L) in [0,K)
    codes, source -> bits (B,K,d) -> one gather -> (B,L,d) -> transformer, CNN -> image

Equations of the paper: 7 match_tokens and merge_tokens, 8 SourceRecovery, 9 and the other losses
in main, 10 align_loss, 11 unmerge, 14 Attention, 15 and 16 keep_distribution.

Axis letters: B batch, L full tokens, K kept tokens, D width, d code bits, N tokens at this
layer, M tokens after a merge, h heads, C any channels.
"""

import copy
import dataclasses
import functools
import importlib.util
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
from torch.utils.checkpoint import checkpoint

from data import (AUGMENT_DRAWS, Metrics, RunConfig, UserError, adamw, arg, augment, batches,
                  catch_signals, end_run, gather_rows, image_grid, load_checkpoint, load_parts,
                  loader_workers, mean_over_ranks, micro_batch, open_data, open_out, parallel,
                  parse_config, presets, resume_run, run_main, save_run, seeded, set_learning_rate,
                  start_run, step_if_finite, subset, update_ema, val_batches)

# -----------------------------------------------------------------------------
# Config: Table A1 as a table. Every field is a flag.

def squares(first, last):
    return tuple(n * n for n in range(first, last + 1))

@dataclasses.dataclass
class TokenizerConfig(RunConfig):
    """One column per variant: tiny for a CPU, and the paper's G, G+R, R. A field with a single
    value has it in all of them."""
    #                       tiny    g     gr    r
    variant: str = arg(     "tiny", "g",  "gr", "r", help="preset: tiny, g, gr or r")
    data: str = arg(        "shapes", *["data/imagenet"] * 3)
    out: str = arg(         "out/tokenizer")
    size: int = arg(        32,     256,  256,  256, help="image side in pixels", low=8, high=8192)
    # encoder: a CNN that halves the image between stages, or one patch convolution
    patch: int = arg(       0,      0,    0,    16, help="side of ViT patches; 0: CNN", low=0)
    base: int = arg(        16,     64,   64,   64, help="CNN width at full resolution", low=1)
    mult: tuple = arg(      (1, 2, 6), (1, 2, 4, 8), (1, 1, 2, 4, 8), (1, 1, 2, 4, 8), low=1,
                            help="CNN width of each stage, in units of --base")
    res_blocks: int = arg(  1,      4,    4,    4, help="residual blocks per stage", low=1)
    width: int = arg(       96,     512,  512,  768, help="encoder transformer width D", low=8)
    depth: int = arg(       3,      12,   12,   12, help="encoder transformer blocks", low=1)
    heads: int = arg(       4,      8,    8,    12, help="encoder attention heads", low=1)
    dec_depth: int = arg(   2,      12,   12,   12, help="decoder transformer blocks", low=1)
    dec_heads: int = arg(   4,      8,    8,    8, help="heads of decoder and recovery", low=1)
    recovery_width: int = arg(96,   384,  384,  384, help="source recovery width", low=8)
    layer_scale: float = arg(0.1,   1e-5, 1e-5, 1e-5, help="initial LayerScale", low=0)
    # merging and quantisation
    keep: int = arg(        36,     256,  144,  36, help="target number of merged tokens K", low=1)
    keeps: tuple = arg(     squares(4, 8), squares(15, 23), squares(11, 16), squares(6, 12),
                            help="values of K drawn in training", low=1)
    keep_sampling: str = arg("exponential", "exponential", "gaussian", "exponential",
                             help="how K is drawn (A.3)",
                             choices=("exponential", "gaussian", "fixed"))
    bits: int = arg(        8,      18,   18,   18, help="code bits d: 2^d codes", low=1, high=20)
    bit_norm: bool = arg(True, help="batch-normalise each bit, against codebook collapse")
    # loss weights
    w_rec: float = arg(     10.0,   1.0,  1.0,  1.0, help="L2 reconstruction", low=0)
    w_perceptual: float = arg(1.0,  0.7,  0.7,  0.7, help="perceptual loss", low=0)
    w_commit: float = arg(  0.25,   0.25, 0.25, 0.25, help="commitment loss", low=0)
    w_entropy: float = arg( 0.015,  0.1,  0.1,  0.1, help="LFQ entropy loss", low=0)
    w_recovery: float = arg(0.01,   0.5,  0.5,  1.0, help="source recovery", low=0)
    w_align: float = arg(   0.03,   0.1,  1.0,  1.0, help="global alignment", low=0)
    w_disc: float = arg(    0.1,    0.8,  0.8,  0.8, help="adversarial loss", low=0)
    w_lecam: float = arg(   0.01,   0.01, 0.01, 0.01, help="LeCam regularisation", low=0)
    # adversary, perceptual loss, teacher
    disc_start: int = arg(  4000,   20000, 20000, 20000, help="step of the first GAN loss", low=0)
    disc_ramp: int = arg(   1000,   5000, 5000, 5000, help="steps to its full weight", low=1)
    disc_base: int = arg(   16,     64,   64,   64, help="discriminator width", low=1)
    disc_layers: int = arg( 2,      3,    3,    3, help="strided layers of the PatchGAN", low=1)
    perceptual: str = arg("stub", help="perceptual loss: stub (edge filters), lpips or none",
                          choices=("stub", "lpips", "none"))
    lpips_weights: str = arg("", help="path of LPIPS v0.1 vgg.pth, or download")
    vgg_weights: str = arg("", help="path of torchvision's vgg16-397923af.pth, or download")
    align: str = arg("ema", help="teacher of the class token: ema (its own average), label, "
                     "dinov2 or none", choices=("ema", "label", "dinov2", "none"))
    align_dim: int = arg(256, help="alignment head's outputs", low=2)
    align_views: str = arg( "grey", *["color"] * 3, help="what --align ema compares: grey views, "
                            "for drawings, or color", choices=("grey", "color"))
    teacher_weights: str = arg("", help="path of dinov2_vitb14_pretrain.pth, or download")
    init: str = arg("random", help="encoder transformer: random, or dinov2 (weight selection)",
                    choices=("random", "dinov2"))
    # optimisation
    batch_size: int = arg(  16,     256,  256,  256)
    max_steps: int = arg(   1500,   0,    0,    0)
    epochs: int = arg(      1,      270,  270,  300)
    lr: float = arg(        2e-3,   1e-4, 1e-4, 1e-4)
    lr_schedule: str = arg( "cosine", "step", "step", "cosine")
    warmup: int = arg(      50,     1000, 1000, 1000)
    beta1: float = arg(     0.9,    0.5,  0.5,  0.5, help="AdamW beta 1", low=0, high=0.9999)
    beta2: float = arg(     0.95,   0.9,  0.9,  0.9, help="AdamW beta 2", low=0, high=0.99999)
    clip: float = arg(      5.0)
    eval_every: int = arg(  750,    5000, 5000, 5000)
    save_every: int = arg(  500,    5000, 5000, 5000)
    grad_ckpt: bool = arg(False, help="recompute activations in the backward pass: less memory")

    @property
    def factor(self):  # the downsampling ratio f
        return self.patch or 2 ** (len(self.mult) - 1)

    @property
    def length(self):  # L
        return (self.size // self.factor) ** 2

    @property
    def groups(self):  # of every GroupNorm
        return min(32, max(1, self.base // 2))

# encoder + decoder parameters: tiny 0.5 + 1.0M, g 62 + 83M, gr 63 + 83M, r 86 + 83M
VARIANTS = presets(TokenizerConfig, ("tiny", "g", "gr", "r"))

# -----------------------------------------------------------------------------
# Token merging (ToMe, arXiv 2210.09461). Pure functions: the map from old to new tokens is a
# value that is returned.

def merge_schedule(full, keep, depth):
    """How many tokens each block merges: r_i ~ (depth - i)^2, summing to full - keep.

    Square decreasing (paper A.1). At most half of the tokens can merge in one block; the rest is
    carried to the next. Raises UserError when that cannot reach `keep`.
    """
    # for a linear schedule leave the square out. No checkpoint records it, so train again
    weights = [(depth - i) ** 2 for i in range(depth)]
    schedule, merged = [], 0
    for i in range(depth):
        # the running sum is rounded, not each r: so it ends at full - keep
        aim = round((full - keep) * sum(weights[:i + 1]) / sum(weights))
        r = min(aim - merged, (full - merged) // 2)
        schedule.append(r)
        merged += r
    if not 1 <= keep <= full or merged != full - keep:
        raise UserError(f"{depth} blocks, which at most halve the tokens, cannot merge {full} to "
                        f"{keep}: pass --keep and --keeps nearer to {full}, and at most that")
    return schedule

@torch.no_grad()  # the choice of pairs is discrete and has no gradient
def match_tokens(metric, r):
    """Bipartite soft matching (2210.09461 section 3): the r most similar pairs of an even and
    an odd token merge.

    metric (B,N,C): attention keys, averaged over heads. Token 0, the class token, does not take
    part. Returns new_index (B,N) int64: the place of each old token among the N - r new ones,
    whose order is kept.
    """
    B, N, _ = metric.shape
    most = (N - 1) // 2  # even tokens besides token 0
    assert 0 <= r <= most, f"r = {r} of {N} tokens: at most {most} can merge"
    # Many scores are nearly equal. In bfloat16 many of the best ones would tie
    with torch.autocast(metric.device.type, enabled=False):
        metric = F.normalize(metric.float(), dim=-1)
        similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)        # (B,even,odd)
    similarity[:, 0] = -math.inf
    score, partner = similarity.max(dim=-1)                                  # (B,even)
    merging = score.argsort(dim=1, descending=True, stable=True)[:, :r]      # (B,r)
    remains = torch.ones(B, N, dtype=torch.bool, device=metric.device)
    remains.scatter_(1, 2 * merging, False)
    new_index = remains.cumsum(1) - 1                                        # (B,N)
    # an even token that merges takes the place of its odd partner, which always remains
    place_of_partner = new_index.gather(1, 2 * partner + 1)
    new_index[:, ::2] = torch.where(remains[:, ::2], new_index[:, ::2], place_of_partner)
    return new_index

def merge_tokens(x, size, new_index, r):
    """Size-weighted means of the tokens that share a new index.

    x (B,N,C), size (B,N) float -> (B,N-r,C), (B,N-r). A mean passes its gradient to all of its
    tokens, in proportion to their sizes.
    """
    B, N, C = x.shape
    M = N - r
    total = torch.zeros(B, M, C, device=x.device)
    weighted = (x * size[..., None]).float()
    total = total.scatter_add(1, new_index[..., None].expand(-1, -1, C), weighted)
    new_size = torch.zeros(B, M, device=x.device).scatter_add(1, new_index, size)
    return (total / new_size[..., None]).to(x.dtype), new_size

@torch.no_grad()
def first_position_of_token(source, keep=None):
    """(B,L) source -> (B,K) first raster position of each token. keep: K, if it is known."""
    B, L = source.shape
    keep = int(source.max()) + 1 if keep is None else keep
    position = torch.arange(L, device=source.device).expand(B, L)
    first = torch.full((B, keep), L, device=source.device)
    return first.scatter_reduce(1, source, position, "amin")

@torch.no_grad()
def canonical_source(source, keep=None):
    """Relabel (B,L) source so that tokens are numbered by the raster order of their first
    positions. The K codes then have a fixed order; with K = L, source is 0, 1, ..., L-1."""
    first = first_position_of_token(source, keep)                            # (B,K)
    new_label = first.argsort(dim=1).argsort(dim=1)  # argsort twice: the rank  (B,K)
    return new_label.gather(1, source)

def unmerge(x, source):
    """Give every position its token (paper Eq. 11): x (B,K,C), source (B,L) -> (B,L,C)."""
    return x.gather(1, source[..., None].expand(-1, -1, x.shape[-1]))

# -----------------------------------------------------------------------------
# Lookup-free quantisation (LFQ, MAGVIT-v2 2310.05737). Its codebook {-1,+1}^d is never built.

def codes_to_bits(codes, d):
    """int64 codes (...) -> (...,d) in {-1,+1}; bit j is worth 2^j."""
    place = torch.arange(d, device=codes.device)
    return (codes[..., None] >> place & 1).float() * 2 - 1

def bits_to_codes(bits):
    """(...,d) numbers -> int64 codes (...): sum of 2^j over the positive ones."""
    place = torch.arange(bits.shape[-1], device=bits.device)
    return ((bits > 0).long() << place).sum(-1)

def quantise(z):
    """sign(z) in {-1,+1} with the straight-through gradient: the backward pass is the identity."""
    q = (z > 0).to(z.dtype) * 2 - 1
    return z + (q - z).detach()

def lfq_entropy(z, tau=1.0):
    """Exact entropies of the soft assignment p(c|z) = softmax_c(2 z.c / tau) over all 2^d codes.

    z (...,d) -> (per_sample, codebook), 0-d, nats: mean_n H(p(.|z_n)) and H(mean_n p(.|z_n)),
    both means over all ranks. Given z the bits are independent, with p(bit_j = 1) =
    sigmoid(4 z_j / tau). So the first is a sum of d binary entropies. The mean distribution is
    one matmul of two (N, 2^(d/2)) tables. Nothing is approximated.
    """
    d = z.shape[-1]
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    logit = 4 * z.reshape(-1, d) / tau                                       # (N,d)
    p1, p0 = logit.sigmoid(), (-logit).sigmoid()
    # log-sigmoid stays finite where a sigmoid is 0
    per_sample = -(p1 * F.logsigmoid(logit) + p0 * F.logsigmoid(-logit)).sum(-1).mean()

    def table(first, last):  # (N, 2^(last-first)): probability of each combination of bits
        p = torch.ones_like(logit[:, :1])
        for j in range(first, last):
            p = torch.cat([p * p0[:, j:j + 1], p * p1[:, j:j + 1]], dim=1)
        return p

    low, high = table(0, d // 2), table(d // 2, d)
    mean = mean_over_ranks(high.T @ low / len(logit))                        # all 2^d codes
    codebook = -(mean * mean.clamp_min(1e-30).log()).sum()
    return mean_over_ranks(per_sample), codebook

class BitNorm(nn.Module):
    """Batch normalisation of each bit, without affine. Zero mean keeps a bit from being constant,
    so the codes cannot collapse to a few. Not in the paper; --no-bit-norm turns it off.

    In training the statistics are those of the batch over all ranks, and they are returned; the
    training loop moves `stats`, which evaluation uses, a tenth of the way towards them.
    """

    def __init__(self, d, on):
        super().__init__()
        self.on = on
        self.register_buffer("stats", torch.stack([torch.zeros(d), torch.ones(d)]))

    def forward(self, z):
        """z (B,K,d) -> normalised (B,K,d) in float32, mean and variance (2,d)."""
        z, (mean, var) = z.float(), self.stats
        if self.training and self.on:
            moments = torch.stack([z.mean((0, 1)), z.square().mean((0, 1))])
            mean, square = mean_over_ranks(moments)  # the gradient crosses them, on all ranks
            var = (square - mean.square()).clamp_min(0)
        return (z - mean) * (var + 1e-5).rsqrt(), torch.stack([mean, var]).detach()

# -----------------------------------------------------------------------------
# Networks, in the order in which an image meets them.

def run_block(block, grad_ckpt, *inputs):
    """Call a block; with --grad-ckpt its activations are recomputed in the backward pass."""
    if grad_ckpt and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)

def norm_silu(x, norm):
    """SiLU of an nn.GroupNorm: (B,C,H,W) -> (B,C,H,W)."""
    kernel = fused_norm(x)  # appendix 1: None but in training on a GPU
    if kernel is None:
        return F.silu(norm(x))
    return kernel(x, norm.num_groups, norm.weight[None], norm.bias[None], silu=True)

class ResBlock(nn.Module):
    """Twice GroupNorm, SiLU, 3x3 conv; plus the input."""

    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(norm_silu(x, self.norm1))
        h = self.conv2(norm_silu(h, self.norm2))
        return self.skip(x).to(h.dtype) + h

class CNN(nn.Module):
    """(B,3,H,W) -> (B,D,H/f,W/f): stages of residual blocks, a strided conv between them."""

    def __init__(self, config):
        super().__init__()
        self.grad_ckpt = config.grad_ckpt
        c = config.base * config.mult[0]
        blocks = [nn.Conv2d(3, c, 3, padding=1)]
        for i, m in enumerate(config.mult):
            if i > 0:
                blocks.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
            for _ in range(config.res_blocks):
                blocks.append(ResBlock(c, config.base * m, config.groups))
                c = config.base * m
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = run_block(block, self.grad_ckpt, x)
        return x

class Attention(nn.Module):
    """Multi-head attention of x to itself or to a context. With log_size it is proportional
    (Eq. 14): softmax(QK^T / sqrt(d_h) + log s), s the number of patches of a token (2210.09461).

    Keys have no bias: it would add the same number to all scores of a query.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width, bias=False)
        self.to_v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, context=None, log_size=None):
        """x (B,N,D), context (B,M,D), log_size (B,M) -> (B,N,D), keys averaged over heads
        (B,M,D/h)."""
        context = x if context is None else context
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2)         # (B,h,N,D/h)
                   for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        bias = None if log_size is None else log_size[:, None, None].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)        # (B,h,N,D/h)
        return self.proj(out.transpose(1, 2).flatten(2)), k.float().mean(1)

class MLP(nn.Module):
    """Two layers. With `mix` a 3x3 depthwise conv between them (MixFFN, 2105.15203)."""

    def __init__(self, width, mix=False):
        super().__init__()
        C = 4 * width
        self.up = nn.Linear(width, C)
        self.mix = nn.Conv2d(C, C, 3, padding=1, groups=C) if mix else None
        self.down = nn.Linear(C, width)

    def forward(self, x):
        x = self.up(x)                                                       # (B,N,4D)
        if self.mix is not None:
            side = math.isqrt(x.shape[1])
            grid = x.transpose(1, 2).unflatten(2, (side, side))              # (B,4D,h,w)
            x = x + self.mix(grid).flatten(2).transpose(1, 2)
        return self.down(F.gelu(x))

class Block(nn.Module):
    """Pre-norm transformer block with LayerScale. Between attention and MLP, r pairs of tokens
    merge (paper Eq. 7)."""

    def __init__(self, width, heads, mix=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.scale1 = nn.Parameter(torch.empty(width))
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, mix)
        self.scale2 = nn.Parameter(torch.empty(width))

    def forward(self, x, size=None, r=0):
        """x (B,N,D), size (B,N) or None while nothing has merged
        -> x (B,N-r,D), size, new_index (B,N) or None."""
        log_size = None if size is None else size.log()
        h, keys = self.attn(self.norm1(x), log_size=log_size)
        x = x + self.scale1 * h
        new_index = None
        if r > 0:
            new_index = match_tokens(keys, r)
            if size is None:
                size = torch.ones(x.shape[:2], device=x.device)
            x, size = merge_tokens(x, size, new_index, r)                    # (B,N-r,D)
        return x + self.scale2 * self.mlp(self.norm2(x)), size, new_index

class Encoder(nn.Module):
    """Image -> K merged tokens, source, class token.

    The hybrid encoders (G, G+R) have no position table: the CNN's padding tells position.
    """

    def __init__(self, config):
        super().__init__()
        D, patch, side = config.width, config.patch, config.size // config.factor
        self.grad_ckpt = config.grad_ckpt
        self.stem = nn.Conv2d(3, D, patch, stride=patch) if patch else CNN(config)
        self.position = nn.Parameter(torch.empty(1, D, side, side)) if patch else None
        self.cls = nn.Parameter(torch.empty(1, 1, D))
        self.blocks = nn.ModuleList(Block(D, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(D)
        # BitNorm takes the mean of each bit away, and with it a bias
        self.to_bits = nn.Linear(D, config.bits, bias=not config.bit_norm)

    def forward(self, images, keep):
        """images (B,3,H,W) -> bits before BitNorm (B,K,d), source (B,L), class token (B,D),
        merged tokens (B,K,D)."""
        x = self.stem(images)                                                # (B,D,H/f,W/f)
        if self.position is not None:
            x = x + F.interpolate(self.position, x.shape[2:], mode="bicubic", antialias=True)
        x = x.flatten(2).transpose(1, 2)                                     # (B,L,D)
        B, L, _ = x.shape
        x = torch.cat([self.cls.expand(B, -1, -1).to(x.dtype), x], dim=1)    # (B,1+L,D)
        size = None
        source = torch.arange(1, L + 1, device=x.device).expand(B, L)        # 0: class token
        for block, r in zip(self.blocks, merge_schedule(L, keep, len(self.blocks))):
            x, size, new_index = run_block(block, self.grad_ckpt, x, size, r)
            if new_index is not None:  # the map so far, then this block's
                source = new_index.gather(1, source)
        source, x = source - 1, self.norm(x)                                 # (B,1+K,D)
        # token k has to stand in row k. old_label: in which row it stands so far
        new_source = canonical_source(source, keep)
        old_label = source.gather(1, first_position_of_token(new_source, keep))
        tokens = unmerge(x[:, 1:], old_label)  # here just a gather             (B,K,D)
        return self.to_bits(tokens), new_source, x[:, 0], tokens

class AdaptiveNorm(nn.Module):
    """GroupNorm whose scale is computed from the per-image std of the code map, its shift from
    the mean (Open-MAGVIT2, 2409.04410)."""

    def __init__(self, d, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, affine=False)
        self.scale = nn.Linear(d, c)
        self.shift = nn.Linear(d, c)

    def forward(self, x, code_map):
        std = (code_map.var((2, 3)) + 1e-6).sqrt()                           # (B,d)
        scale, shift = self.scale(std), self.shift(code_map.mean((2, 3)))    # (B,C)
        kernel = fused_norm(x)
        if kernel is not None:
            return kernel(x, self.norm.num_groups, scale, shift, silu=False)
        return self.norm(x) * scale[..., None, None] + shift[..., None, None]

class Decoder(nn.Module):
    """Bits at every position (B,L,d) -> image (B,3,H,W). The encoder's mirror: a transformer
    with MixFFN that merges nothing, then a CNN."""

    def __init__(self, config):
        super().__init__()
        self.grad_ckpt = config.grad_ckpt
        c = config.base * config.mult[-1]
        self.conv_in = nn.Conv2d(config.bits, c, 3, padding=1)
        self.position = nn.Conv2d(c, c, 3, padding=1, groups=c)
        blocks = [Block(c, config.dec_heads, mix=True) for _ in range(config.dec_depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(c)
        self.adaptive = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i in reversed(range(len(config.mult))):
            self.adaptive.append(AdaptiveNorm(config.bits, c, config.groups))
            stage = nn.ModuleList()
            for _ in range(config.res_blocks + (i > 0)):
                stage.append(ResBlock(c, config.base * config.mult[i], config.groups))
                c = config.base * config.mult[i]
            if i > 0:  # twice the resolution: four times the channels, then depth to space
                conv = nn.Conv2d(c, 4 * c, 3, padding=1)
                stage.append(nn.Sequential(conv, nn.PixelShuffle(2)))
            self.stages.append(stage)
        self.norm_out = nn.GroupNorm(config.groups, c)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, bits):
        """bits (B,L,d) -> images (B,3,H,W)."""
        return self.conv_out(self.features(bits))

    def features(self, bits):
        """All but the last layer: (B,L,d) -> (B,C,H,W). --compile takes this part."""
        side = math.isqrt(bits.shape[1])
        code_map = bits.transpose(1, 2).unflatten(2, (side, side))           # (B,d,h,w)
        x = self.conv_in(code_map)                                           # (B,D,h,w)
        x = (x + self.position(x)).flatten(2).transpose(1, 2)                # (B,L,D)
        for block in self.blocks:
            x, _, _ = run_block(block, self.grad_ckpt, x)
        x = self.norm(x).transpose(1, 2).unflatten(2, (side, side))          # (B,D,h,w)
        for adaptive, stage in zip(self.adaptive, self.stages):
            x = adaptive(x, code_map)
            for block in stage:
                x = run_block(block, self.grad_ckpt, x)
        return norm_silu(x, self.norm_out)

# -----------------------------------------------------------------------------
# Source recovery (paper Eq. 8-9, Table A2): source from the K quantised tokens.

class RecoveryLayer(nn.Module):
    """A standard pre-norm transformer decoder layer: self-attention, cross-attention, MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.self_attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.cross_attn = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x, tokens):
        x = x + self.self_attn(self.norm1(x))[0]
        x = x + self.cross_attn(self.norm2(x), tokens)[0]
        return x + self.mlp(self.norm3(x))

class SourceRecovery(nn.Module):
    """Predicts source from the K tokens and their first positions.

    L learnable queries pass a 2-layer transformer decoder over the tokens. Then each query is
    classified among the tokens by a dot product (Eq. 8). A token is its embedded bits plus the
    query of its first position, so tokens with equal codes differ.
    """

    def __init__(self, config):
        super().__init__()
        D = config.recovery_width
        self.queries = nn.Parameter(torch.empty(config.length, D))
        self.embed = nn.Linear(config.bits, D)
        layers = [RecoveryLayer(D, config.dec_heads) for _ in range(2)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(D)
        self.keys = nn.Linear(D, D, bias=False)

    def forward(self, bits, first):
        """bits (B,K,d) in {-1,+1}, first (B,K) ascending positions -> logits (B,L,K).

        A position that is some token's first belongs to that token. Any other belongs to a token
        whose first position is earlier. All other logits are -inf.
        """
        B, (L, D) = len(bits), self.queries.shape
        tokens = self.embed(bits) + self.queries[first]                      # (B,K,D)
        x = self.queries.expand(B, -1, -1)                                   # (B,L,D)
        for layer in self.layers:
            x = layer(x, tokens)
        logits = self.norm(x) @ self.keys(tokens).transpose(1, 2) / D ** 0.5     # (B,L,K)
        position = torch.arange(L, device=first.device)[:, None]             # (L,1)
        is_first = first[:, None] == position                                # (B,L,K)
        owned = is_first.any(-1, keepdim=True)                               # (B,L,1)
        possible = torch.where(owned, is_first, first[:, None] <= position)
        return logits.float().masked_fill(~possible, -math.inf)

# -----------------------------------------------------------------------------
# The model (paper section 3).

class Encoded(NamedTuple):
    codes: torch.Tensor   # (B,K) int64 in [0,2^d)
    source: torch.Tensor  # (B,L) int64 in [0,K): the token of each position
    z: torch.Tensor       # (B,K,d) what the sign is taken of
    cls: torch.Tensor     # (B,D) class token

class Forward(NamedTuple):
    images: torch.Tensor     # (B,3,H,W) reconstruction
    z: torch.Tensor          # (B,K,d)
    source: torch.Tensor     # (B,L)
    recovery: torch.Tensor   # (B,L,K) logits of source
    align: torch.Tensor      # (B,align_dim) the student's outputs; None without alignment
    bit_stats: torch.Tensor  # (2,d) BitNorm's statistics of this batch

class MergeVQ(nn.Module):
    """The tokenizer. encode and decode are pure: codes and source are all that passes between
    them."""

    def __init__(self, config):
        super().__init__()
        c, top = config, config.base * config.mult[-1]
        scale = 2 ** (len(c.mult) - 1)
        assert c.size % scale == 0, f"--size {c.size} is not a multiple of {scale}"
        assert c.patch in (0, scale), f"--patch {c.patch}: the decoder upsamples by {scale}"
        assert c.width % c.heads == 0, f"--width {c.width} % --heads {c.heads}"
        for width in (top, c.recovery_width):
            assert width % c.dec_heads == 0, f"decoder width {width} % --dec-heads {c.dec_heads}"
        assert c.patch or c.width == top, f"--width {c.width}, --base x last --mult {top}"
        for keep in (c.keep, *c.keeps):
            merge_schedule(c.length, keep, c.depth)  # raises UserError where K is out of reach
        self.config = config
        self.encoder = Encoder(config)
        self.bit_norm = BitNorm(config.bits, config.bit_norm)
        self.decoder = Decoder(config)
        self.recovery = SourceRecovery(config)
        D = config.width
        head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, config.align_dim))
        self.align_head = None if config.align == "none" else head
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Xavier for linear layers, fan-in for convolutions. Residual branches of the CNNs start
        at zero, those of encoder and decoder transformers at --layer-scale."""
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
            elif isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, nonlinearity="linear")
            if isinstance(m, (nn.Linear, nn.Conv2d)) and m.bias is not None:
                nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, Block):
                nn.init.constant_(m.scale1, self.config.layer_scale)
                nn.init.constant_(m.scale2, self.config.layer_scale)
            elif isinstance(m, ResBlock):
                nn.init.zeros_(m.conv2.weight)
            elif isinstance(m, nn.Sequential) and isinstance(m[-1], nn.PixelShuffle):
                # the four pixels made of one start equal: no checkerboard (ICNR, 1707.02937)
                m[0].weight.copy_(m[0].weight[::4].repeat_interleave(4, dim=0))
            elif isinstance(m, AdaptiveNorm):  # starts as a plain GroupNorm
                nn.init.zeros_(m.scale.weight)
                nn.init.ones_(m.scale.bias)
                nn.init.zeros_(m.shift.weight)
        nn.init.trunc_normal_(self.encoder.cls, std=0.02)
        if self.encoder.position is not None:
            nn.init.trunc_normal_(self.encoder.position, std=0.02)
        # queries start as waves over the positions, of 1 down to 1/L radians per position
        L, D = self.recovery.queries.shape
        frequency = L ** -torch.linspace(0, 1, (D + 1) // 2)
        angle = torch.arange(L)[:, None] * frequency                         # (L,D/2)
        waves = torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :D]
        self.recovery.queries.copy_(waves / 2)

    def encode(self, images, keep=None):
        """images (B,3,H,W) in [-1,1], keep K (default: the config's target) -> Encoded."""
        keep = self.config.keep if keep is None else keep
        z, source, cls, _ = self.encoder(images, keep)
        z, _ = self.bit_norm(z)
        return Encoded(bits_to_codes(z), source, z, cls.float())

    def decode(self, codes, source):
        """codes (B,K) int64, source (B,L) int64 -> images (B,3,H,W). Nothing else is needed."""
        bits = codes_to_bits(codes, self.config.bits)                        # (B,K,d)
        return self.decoder(unmerge(bits, source)).float()

    def recover(self, codes, first):
        """codes (B,K), first positions of their tokens (B,K) -> source (B,L), predicted."""
        return self.recovery(codes_to_bits(codes, self.config.bits), first).argmax(-1)

    def align(self, images, keep):
        """The outputs (B,C) that --align ema compares between two views (B,3,H,W): those for the
        class token plus the mean of the merged tokens, so that both learn what the image shows."""
        _, _, cls, tokens = self.encoder(images, keep)
        return self.align_head(cls + tokens.mean(1)).float()

    def forward(self, images, keep, view=None):
        """The pass that trains: gradients cross the quantiser straight through. With a `view`
        (B,3,H,W) of the images, that is what is aligned."""
        z, source, cls, _ = self.encoder(images, keep)
        z, bit_stats = self.bit_norm(z)
        q = quantise(z)                                                      # (B,K,d)
        out = self.decoder(unmerge(q, source)).float()                       # (B,3,H,W)
        recovery = self.recovery(q, first_position_of_token(source, keep))   # (B,L,K)
        align = None
        if self.align_head is not None:
            # a view is a second pass of the encoder, in here so that DDP sees it
            align = self.align_head(cls).float() if view is None else self.align(view, keep)
        return Forward(out, z, source, recovery, align, bit_stats)

def nearest_first(first, length):
    """Source without a network, the control of source recovery: each position takes the nearest
    first position that is not later. first (B,K) -> (B,L)."""
    side = math.isqrt(length)
    position = torch.arange(length, device=first.device)[:, None]            # (L,1)
    first = first[:, None]                                                   # (B,1,K)
    rows, columns = position // side - first // side, position % side - first % side
    distance = rows ** 2 + columns ** 2                                      # (B,L,K)
    return distance.masked_fill(first > position, 2 * length).argmin(-1)

def tokenizer_from_state(state, device="cpu"):
    """{"config": dict, "ema": state dict} -> MergeVQ in eval mode, frozen."""
    model = MergeVQ(TokenizerConfig(**state["config"]))
    load_parts("the tokenizer", state, ema=model)
    return model.to(device).eval().requires_grad_(False)

def load_tokenizer(path, device="cpu"):
    """Checkpoint of this script -> MergeVQ with EMA weights in eval mode. Raises UserError."""
    return tokenizer_from_state(load_checkpoint(path, "tokenizer"), device)

class Discriminator(nn.Module):
    """PatchGAN (1611.07004): strided 4x4 convs, one logit per patch. GroupNorm, so that images
    share no statistic."""

    def __init__(self, config):
        super().__init__()
        side = config.size // 2 ** config.disc_layers
        assert side >= 3, f"--disc-layers {config.disc_layers} leave {side} of {config.size} px"
        c = config.disc_base
        layers = [nn.Conv2d(3, c, 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, config.disc_layers + 1):
            w = config.disc_base * min(2 ** i, 8)
            stride = 2 if i < config.disc_layers else 1
            layers.append(nn.Conv2d(c, w, 4, stride, 1))
            layers.append(nn.GroupNorm(math.gcd(w, config.groups), w))
            layers.append(nn.LeakyReLU(0.2))
            c = w
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, 1, 1))
        # running means of the logits of real and of fake images, for lecam_loss
        self.register_buffer("lecam", torch.zeros(2))
        for m in self.layers:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, images):  # (B,3,H,W) -> (B,1,h,w)
        return self.layers(images).float()

# -----------------------------------------------------------------------------
# Losses: plain functions, float32, named as in the paper. Each is logged unweighted.

def perceptual_stub(a, b):
    """L1 distance of oriented derivatives and a Laplacian at three scales. (B,3,H,W) twice
    -> 0-d.

    A stand-in for LPIPS that needs no weights. L2 forgives a blurred edge: few pixels are wrong,
    and each by little. The derivatives of a blurred edge are wrong by much.
    """
    filters = torch.tensor([[0, 0, 0, -1, 0, 1, 0, 0, 0], [0, -1, 0, 0, 0, 0, 0, 1, 0],
                            [-1, 0, 0, 0, 0, 0, 0, 0, 1], [0, 0, -1, 0, 0, 0, 1, 0, 0],
                            [0, 1, 0, 1, -4, 1, 0, 1, 0]], dtype=torch.float32) / 2
    filters = filters.to(a.device, non_blocking=True).view(5, 1, 3, 3).repeat(3, 1, 1, 1)
    difference, loss = (a - b).float(), 0.0
    scales = 3 if min(a.shape[2:]) >= 12 else 1  # the third has a quarter of the side
    for _ in range(scales):
        loss = loss + F.conv2d(difference, filters, groups=3).abs().mean() / scales
        difference = F.avg_pool2d(difference, 2)
    return loss

PERCEPTUAL = {"stub": perceptual_stub, "none": lambda a, b: (a - b).mean() * 0}

def hinge_loss(real, fake):
    """Hinge loss of the discriminator's logits (1705.02894)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()

def lecam_loss(real, fake, average):
    """LeCam regularisation (2104.03310): stay near the running mean of the opposite logits.
    average (2,): of real, of fake."""
    mean_real, mean_fake = average
    return F.relu(real - mean_fake).square().mean() + F.relu(mean_real - fake).square().mean()

def adaptive_weight(pixel_loss, gan_loss, last_layer):
    """VQGAN's balance (2012.09841 Eq. 7): |gradient of the pixel losses| / |gradient of the
    adversarial loss| at the decoder's last layer, over all ranks."""
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                 for loss in (pixel_loss, gan_loss)]
    pixel, gan = mean_over_ranks(torch.stack(gradients))
    return (pixel.norm() / (gan.norm() + 1e-4)).clamp(0, 1e4).detach()

def align_loss(kind, student, teacher, labels, rank=0):
    """Global alignment (Eq. 10): the student's outputs (b,C) for this rank's images, with the
    teacher's for those of all ranks (B,C), or with labels (b,).

    ema: student and teacher see two views of each image. Among the teacher's outputs for all
    images, the student's has to be nearest to that for the same image (as in MoCo v3, 2104.02057,
    one way and without its predictor). The more images, the better; one alone teaches nothing.
    dinov2: T^2 KL at T = 4 as in the authors' release. It is Eq. 10 less the teacher's entropy,
    which has no gradient.
    """
    if kind == "none":
        return torch.zeros((), device=labels.device)
    if kind == "label":
        return F.cross_entropy(student, labels)
    if kind == "dinov2":
        target, log_q = (teacher / 4).log_softmax(-1), (student / 4).log_softmax(-1)
        return 16 * F.kl_div(log_q, target, reduction="batchmean", log_target=True)
    student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
    own = rank * len(student) + torch.arange(len(student), device=student.device)
    temperature = 0.1
    return F.cross_entropy(student @ teacher.T / temperature, own)           # (b,B) logits

def keep_distribution(config):
    """Values of K in training and their probabilities: (list, (n,) array). i counts the values
    from the target, which is 0. exponential (A.3, Eq. 15): p ~ 2 exp(-2 |i|) + 0.1; gaussian
    (Eq. 16): p ~ exp(-i^2 / (2 s^2)) + 0.05 with s = 0.5."""
    candidates = sorted({*config.keeps, config.keep})  # a generator's merge instructions too
    i = np.arange(len(candidates)) - candidates.index(config.keep)
    p = dict(fixed=(i == 0) * 1.0,
             exponential=2 * np.exp(-2.0 * abs(i)) + 0.1,
             gaussian=np.exp(-i ** 2 / (2 * 0.5 ** 2)) + 0.05)[config.keep_sampling]
    return candidates, p / p.sum()

def sample_keep(config, step):
    """K of a training step, a function of (seed, step): equal on all ranks and after a resume.
    A batch has one K, since its sequences must be of one length."""
    candidates, p = keep_distribution(config)
    return int(np.random.default_rng([config.seed, 1, step]).choice(candidates, p=p))

# -----------------------------------------------------------------------------
# Evaluation

def psnr(a, b):
    """Peak signal-to-noise ratio in dB: (B,C,H,W) in [-1,1] twice -> (B,). Values are clamped."""
    wide = torch.float32 if a.device.type == "mps" else torch.float64
    difference = (a.clamp(-1, 1).to(wide) - b.clamp(-1, 1).to(wide)) / 2
    return -10 * difference.square().flatten(1).mean(1).log10()

def code_statistics(counts):
    """Histogram of codes (2^d,) -> (usage: share of codes met, perplexity: exp of the entropy)."""
    p = counts.float() / counts.sum()
    return (counts > 0).float().mean(), torch.special.entr(p).sum().exp()

def bit_balance(counts, d):
    """Histogram of codes (2^d,) -> (largest distance of a bit's mean from 1/2, constant bits)."""
    codes = torch.arange(2 ** d, device=counts.device)
    share = counts.float() / counts.sum()
    on = (codes_to_bits(codes, d) > 0).float().T @ share                     # (d,)
    constant = (on < 1e-6) | (on > 1 - 1e-6)
    return (on - 0.5).abs().max(), constant.sum()

EVAL_IMAGES = 1000  # what an evaluation looks at; eval.py measures on all

@torch.no_grad()
def evaluate(model, dataset, config, run):
    """PSNR at the target K and at K = L; code usage and recovery accuracy at K; over all ranks."""
    counts = torch.zeros(2 ** config.bits, device=run.device)
    rows = [torch.zeros(0, 3)]  # a rank may have no image
    for images, _ in val_batches(dataset, EVAL_IMAGES, min(64, max(16, config.batch_size)),
                                 run, loader_workers(config)):
        with run.autocast():
            e, full = model.encode(images), model.encode(images, config.length)
            first = first_position_of_token(e.source, config.keep)
            accuracy = (model.recover(e.codes, first) == e.source).float().mean(1)
            at_keep = psnr(model.decode(e.codes, e.source), images).float()
            at_full = psnr(model.decode(full.codes, full.source), images).float()
        counts += torch.bincount(e.codes.flatten(), minlength=len(counts))
        rows.append(torch.stack([at_keep, at_full, accuracy], dim=1).cpu())
    scores = gather_rows(torch.cat(rows), run).mean(0).tolist()
    usage, perplexity = code_statistics(mean_over_ranks(counts))
    names = ("val_psnr", "val_psnr_full", "val_recovery", "val_usage", "val_perplexity")
    return dict(zip(names, [*scores, usage.item(), perplexity.item()]))

@torch.no_grad()
def draw_reconstructions(model, dataset, config, run, path, num=8):
    """PNG: originals, then reconstructions at several K, one row each."""
    images = torch.stack([dataset[i][0] for i in subset(len(dataset), num)])
    rows, titles = [images], ["original"]
    for keep in sorted({min(config.keeps), config.keep, max(config.keeps), config.length}):
        e = model.encode(images.to(run.device), keep)
        rows.append(model.decode(e.codes, e.source).cpu())
        titles.append(f"K = {keep}")
    image_grid(rows, path, row_titles=titles)

# -----------------------------------------------------------------------------
# Training

CURVES = ("rec", "perceptual", "gan", "commit", "entropy", "recovery", "align", "disc", "lecam",
          "val_psnr", "val_psnr_full", "perplexity", "bit_imbalance", "keep", "lr")

@torch.no_grad()
def teacher_outputs(config, run, ema, dinov2, images, keep, draws):
    """images (b,3,H,W), draws (b,2,14) uniform -> the student's own view of the images; the
    teacher's outputs for another one, with ema of all ranks (B,C). None: --align needs none."""
    if config.align == "dinov2":  # as in the release, the student sees the training crop
        other = augment(images, draws[:, 0])
        other = F.interpolate(other, (DINOV2.size,) * 2, mode="bicubic", antialias=True)
        with run.autocast():
            return None, dinov2(other, DINOV2.length)[2].float()
    if config.align == "ema":
        other, view = (augment(images, u, config.align_views) for u in draws.unbind(1))
        with run.autocast():
            outputs = ema.align(other, keep)
        if run.world > 1:  # this does not wait for the device
            parts = [torch.empty_like(outputs) for _ in range(run.world)]
            dist.all_gather(parts, outputs.contiguous())
            outputs = torch.cat(parts)
        return view, outputs
    return None, None

def main(argv=None):
    config = parse_config(TokenizerConfig, __doc__, argv, VARIANTS, "variant")
    train_set, val_set = open_data(config, config.size)
    if config.align == "label" and train_set.num_classes < 2:
        raise UserError(f"--align label needs class folders, but --data {config.data} has "
                        f"{train_set.num_classes} classes: pass --align ema")
    if config.align == "label":  # two teachers decide how many outputs there are
        config.align_dim = train_set.num_classes
    elif config.align == "dinov2":
        config.align_dim = DINOV2.width
    run = start_run(config)
    micro = micro_batch(config, run)

    torch.manual_seed(config.seed)  # the same weights on every rank
    raw_model = MergeVQ(config).to(run.device, memory_format=torch.channels_last)
    discriminator = Discriminator(config).to(run.device, memory_format=torch.channels_last)
    perceptual, dinov2 = PERCEPTUAL.get(config.perceptual), None
    if config.perceptual == "lpips":
        perceptual = load_lpips(config.lpips_weights, config.vgg_weights, run.device)
    if "dinov2" in (config.align, config.init):
        dinov2 = load_dinov2(config.teacher_weights, run.device)
    if config.init == "dinov2":
        select_weights(raw_model.encoder, dinov2)
    # the shapes of the weights do not tell these
    state = open_out(config, run, "tokenizer", ("heads", "dec_heads", "align"))

    ema = copy.deepcopy(raw_model).eval().requires_grad_(False)
    optimizer = adamw(raw_model.parameters(), config, (config.beta1, config.beta2))
    disc_optimizer = adamw(discriminator.parameters(), config, (config.beta1, config.beta2))
    # what a checkpoint holds, with config and step
    parts = dict(model=raw_model, ema=ema, disc=discriminator, optimizer=optimizer,
                 disc_optimizer=disc_optimizer)
    # buffers that follow the mean of each step, and how fast they do
    moving_averages = dict(lecam=(discriminator.lecam, 0.01), bits=(raw_model.bit_norm.stats, 0.1))
    step, skipped = resume_run(config, state, run, parts)
    if config.compile:
        raw_model.decoder.features = torch.compile(raw_model.decoder.features)
        raw_model.encoder.stem.compile()
        discriminator.compile()
    model, disc = parallel(raw_model, run), parallel(discriminator, run)
    if run.main:
        size = {name: sum(p.numel() for p in part.parameters()) / 1e6
                for name, part in raw_model.named_children() if name != "bit_norm"}
        print(f"{config.variant}:", ", ".join(f"{k} {v:.2f}M" for k, v in size.items()))
        print(f"L = {config.length}, K = {config.keep} of {keep_distribution(config)[0]}, d = "
              f"{config.bits}; {config.max_steps} steps of {config.batch_size}; {config.data}: "
              f"train {train_set.describe()}; val {val_set.describe()}")
        print(f"perceptual loss {config.perceptual}, teacher {config.align}, initial weights "
              f"{config.init} (the paper: lpips, dinov2, dinov2)")

    stream = batches(train_set, config, run, step)
    metrics = Metrics(config, run, step, CURVES)
    stop, stopping = catch_signals(), False
    while True:
        # The body runs max_steps + 1 times: the last time it only evaluates and saves. Step 0 is
        # evaluated too, so a broken evaluation shows at once
        last = step >= config.max_steps
        if last or (step % config.eval_every == 0 and not stopping):
            metrics.scores(step, evaluate(ema, val_set, config, run))
            if run.main:
                path = f"{config.out}/recon_{step:07d}.png"
                draw_reconstructions(ema, val_set, config, run, path)
        if run.main and (last or stopping or step % config.save_every == 0):
            save_run(config, "tokenizer", step, skipped, parts)
        if last or stopping:
            break

        # K and the views are drawn by (seed, 1, step) and (seed, 2, step)
        lr = set_learning_rate(step, config, optimizer, disc_optimizer)
        keep = sample_keep(config, step)
        gan_on = config.w_disc > 0 and step >= config.disc_start
        # --w-disc weighs the adversarial loss. The discriminator's own loss has weight 1
        w_gan = config.w_disc * min(1.0, (step - config.disc_start + 1) / config.disc_ramp)
        shape = config.batch_size, 2, AUGMENT_DRAWS
        draws = torch.rand(shape, generator=seeded(config.seed, 2, step))
        logs, step_means = defaultdict(float), defaultdict(float)
        raw_model.train()
        for micro_step in range(config.accum):
            images, labels = next(stream)
            first_row = (micro_step * run.world + run.rank) * micro
            rows = draws[first_row:first_row + micro].to(run.device, non_blocking=True)
            # DDP averages the gradients in the last backward pass only
            sync = micro_step == config.accum - 1
            model.require_backward_grad_sync = disc.require_backward_grad_sync = sync

            # image -> K tokens -> bits -> image. BitNorm, entropy, ema alignment and the adaptive
            # weight see the images of this micro-batch on all ranks
            view, teacher = teacher_outputs(config, run, ema, dinov2, images, keep, rows)
            with run.autocast():
                out = model(images, keep, view)
            sample_entropy, codebook_entropy = lfq_entropy(out.z)
            # a new loss needs a line here, a field w_NAME and its name in CURVES. What it needs of
            # the model goes into Forward
            losses = dict(
                rec=F.mse_loss(out.images, images),
                perceptual=perceptual(out.images, images).mean(),
                commit=F.mse_loss(out.z, out.z.detach().sign()),
                # low when each token is certain and all codes are used equally
                entropy=sample_entropy - codebook_entropy,
                # Eq. 9, finite because the true token is always possible
                recovery=F.cross_entropy(out.recovery.flatten(0, 1), out.source.flatten()),
                align=align_loss(config.align, out.align, teacher, labels, run.rank))
            loss = sum(getattr(config, f"w_{name}") * value for name, value in losses.items())
            if gan_on:  # through a frozen discriminator
                discriminator.requires_grad_(False)
                with run.autocast():
                    losses["gan"] = -discriminator(out.images).mean()
                discriminator.requires_grad_(True)
                pixel = config.w_rec * losses["rec"] + config.w_perceptual * losses["perceptual"]
                balance = adaptive_weight(pixel, losses["gan"], raw_model.decoder.conv_out.weight)
                loss = loss + w_gan * balance * losses["gan"]
            (loss / config.accum).backward()

            # the discriminator's turn, on reconstructions without a graph
            if gan_on:
                with run.autocast():
                    real, fake = disc(torch.cat([images, out.images.detach()])).chunk(2)
                losses["disc"] = hinge_loss(real, fake)
                losses["lecam"] = lecam_loss(real, fake, discriminator.lecam)
                disc_loss = losses["disc"] + config.w_lecam * losses["lecam"]
                (disc_loss / config.accum).backward()
                step_means["lecam"] += torch.stack([real.mean(), fake.mean()]).detach()
            step_means["bits"] += out.bit_stats
            losses.update(entropy_sample=sample_entropy, entropy_codebook=codebook_entropy)
            for name, value in losses.items():
                logs[name] += value.detach() / config.accum

        # all ranks have the same gradients. A step that is not finite changes nothing
        norm = nn.utils.clip_grad_norm_(raw_model.parameters(), config.clip)
        disc_norm = torch.zeros_like(norm)
        if gan_on:
            disc_norm = nn.utils.clip_grad_norm_(discriminator.parameters(), config.clip)
        finite = step_if_finite(norm + disc_norm, optimizer, disc_optimizer)
        for name, value in step_means.items():
            average, rate = moving_averages[name]
            mean = average.lerp(mean_over_ranks(value / config.accum), rate)
            average.copy_(torch.where(finite, mean, average))  # an `if` would wait for the GPU
        update_ema(ema, raw_model, config.ema, step, finite)
        skipped += ~finite
        step += 1
        if step % config.log_every == 0 or step == config.max_steps:
            # of this rank's last micro-batch. metrics.log averages over the ranks
            counts = torch.bincount(bits_to_codes(out.z).flatten(), minlength=2 ** config.bits)
            logs["usage"], logs["perplexity"] = code_statistics(counts)
            logs["bit_imbalance"], logs["dead_bits"] = bit_balance(counts, config.bits)
            logs.update(grad_norm=norm, skipped=skipped)
            stopping = metrics.log(step, logs, stop, ("rec", "perplexity", "keep", "skipped"),
                                   lr=lr, keep=keep)
    metrics.bar.close()
    end_run(config, run, step,
            f"done: {config.out}/ckpt.pt, recon_{step:07d}.png; next: python mergear.py")

# -----------------------------------------------------------------------------
# Appendix 1: GroupNorm and SiLU as one kernel, for training on a GPU. The same result, and fewer
# bytes are moved.

def norm_groups(x, groups, scale, shift, silu):
    """GroupNorm of x (B,C,H,W), times scale (1 or B,C), plus shift, then SiLU if wanted.

    Statistics in float32; the result has x's type and is channels_last, as convolutions want it.
    """
    n = x.shape[1] // groups                                                 # channels of a group
    y = x.contiguous(memory_format=torch.channels_last).float()
    # first over positions, then over channels: so neighbours in memory are read together
    moments = torch.stack([y.mean((2, 3)), y.square().mean((2, 3))])         # (2,B,C)
    mean, square = moments.unflatten(2, (groups, n)).mean(3)                 # (B,G)
    deviation = (square - mean.square()).clamp_min(0).add(1e-5).sqrt()
    scale = scale / deviation.repeat_interleave(n, 1)                        # (B,C)
    shift = shift - mean.repeat_interleave(n, 1) * scale
    y = y * scale[..., None, None] + shift[..., None, None]
    return (F.silu(y) if silu else y).to(x.dtype)

@functools.cache
def norm_kernel():
    """norm_groups as one kernel, where there is a GPU with Triton and a C compiler; else None."""
    found = importlib.util.find_spec("triton") and shutil.which("cc")
    if not found or torch.cuda.get_device_capability() < (7, 0):
        return None
    torch._dynamo.config.recompile_limit = 64  # a kernel for each shape
    return torch.compile(norm_groups, dynamic=False)

def fused_norm(x):
    """The function for x, or None. Under autocast nn.GroupNorm reads and writes float32, in NCHW:
    twice the bytes, and copies. A kernel pays in training, for large x."""
    large = x.is_cuda and x.dtype == torch.bfloat16 and x.numel() >= 2 ** 22
    if not large or not torch.is_grad_enabled():
        return None
    return norm_groups if torch.compiler.is_compiling() else norm_kernel()

# -----------------------------------------------------------------------------
# Appendix 2: networks that others trained, from their public weight files. Frozen, in eval mode,
# outside DDP, the optimizers, EMA and checkpoints. Nothing is fetched unless a flag says so.

RAW = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips"
FID = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights"
DINO = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14"
OFFICIAL = {  # flag that takes the path, address
    "dinov2": ("--teacher-weights", DINO + "/dinov2_vitb14_pretrain.pth"),
    "vgg16": ("--vgg-weights", "https://download.pytorch.org/models/vgg16-397923af.pth"),
    "lpips": ("--lpips-weights", RAW + "/weights/v0.1/vgg.pth"),
    "inception": ("--inception-weights", FID + "/pt_inception-2015-12-05-6726825d.pth")}

def load_weights(kind, path, net, convert=dict):
    """Load a public weight file into `net`, strictly -> net, frozen, in eval mode. path: a file,
    or `download` for the official one, which torch.hub keeps. convert: file's state dict ->
    net's. Raises UserError on a missing, damaged or wrong file."""
    flag, url = OFFICIAL[kind]
    try:
        if path == "download":
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True,
                                                       weights_only=True)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict(convert(state))
    except Exception as error:  # a missing, damaged or foreign file raises many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{flag} '{path}' cannot be used ({reason}): pass the path of "
                        f"{os.path.basename(url)}, or {flag} download")
    return net.eval().requires_grad_(False)

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

class LPIPS(nn.Module):
    """Learned perceptual distance v0.1 (1801.03924) on VGG16: images a, b (B,3,H,W) in [-1,1],
    16 px or more -> (B,). In float32 also under autocast.

    The features after the last ReLU of each stage are normalised to unit length. Their squared
    difference is weighted by channel, averaged over positions and summed over stages.
    """

    def __init__(self, widths=VGG16):
        super().__init__()
        layers, c = [], 3
        for i, stage in enumerate(widths):
            layers += [nn.MaxPool2d(2)] if i > 0 else []
            for w in stage:
                layers += [nn.Conv2d(c, w, 3, padding=1), nn.ReLU()]
                c = w
        self.features = nn.Sequential(*layers)  # torchvision's names
        self.heads = nn.ParameterList(torch.empty(1, stage[-1], 1, 1) for stage in widths)
        # the ImageNet mean and std, for images in [-1,1], rounded as in the published code
        shift, scale = torch.tensor([[-.030, -.088, -.188], [.458, .448, .450]])
        self.register_buffer("shift", shift.view(3, 1, 1), persistent=False)
        self.register_buffer("scale", scale.view(3, 1, 1), persistent=False)

    def stages(self, x):
        """Unit-length features after each stage, a list of (B,C,h,w)."""
        x, outputs = (x.float() - self.shift) / self.scale, []
        for layer in [*self.features, nn.Identity()]:
            if isinstance(layer, (nn.MaxPool2d, nn.Identity)):  # the end of a stage
                outputs.append(F.normalize(x, dim=1, eps=1e-10))
            x = layer(x)
        return outputs

    def forward(self, a, b):
        with torch.autocast(a.device.type, enabled=False):
            distance = 0.0
            for x, y, head in zip(self.stages(a), self.stages(b), self.heads):
                distance = distance + ((x - y).square() * head).sum(1).mean((1, 2))
        return distance

def load_lpips(lpips_path, vgg_path, device="cpu", widths=VGG16):
    """LPIPS' v0.1 vgg.pth and torchvision's VGG16 file, or `download` -> LPIPS, frozen."""
    net = LPIPS(widths)
    load_weights("vgg16", vgg_path, net.features,
                 convert=lambda state: {name.removeprefix("features."): tensor
                                        for name, tensor in state.items()
                                        if not name.startswith("classifier.")})
    load_weights("lpips", lpips_path, net.heads,
                 convert=lambda state: {name.removeprefix("lin").removesuffix(".model.1.weight"):
                                        tensor for name, tensor in state.items()})
    net = net.to(device, memory_format=torch.channels_last)
    return net.eval().requires_grad_(False)

# DINOv2 (2304.07193), a ViT-B/14: our own encoder, which here merges nothing
DINOV2 = TokenizerConfig(size=224, patch=14, width=768, depth=12, heads=12)

def dinov2_names(state):
    """The published state dict -> an Encoder's. Its key bias is left out: it cancels in the
    softmax."""
    pairs = (("patch_embed.proj", "stem"), ("cls_token", "cls"), ("pos_embed", "position"),
             ("ls1.gamma", "scale1"), ("ls2.gamma", "scale2"), ("fc1", "up"), ("fc2", "down"))
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in pairs:
            name = name.replace(theirs, ours)
        parts = dict(zip("qkv", tensor.chunk(3))) if "qkv" in name else {"": tensor}
        for part, rows in parts.items():
            renamed[name.replace("qkv", f"to_{part}")] = rows
    # our images are in [-1,1], its own have the mean 0 and std 1 of ImageNet
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    weight = renamed["stem.weight"] / std.view(3, 1, 1)
    renamed["stem.weight"] = weight / 2
    renamed["stem.bias"] = renamed["stem.bias"] + weight.sum((2, 3)) @ (0.5 - mean)
    # its class token has a position, which is added here. The table of 37 x 14 = 518 px is
    # stretched to 16 x 14, as published by (16 + 0.1) / 37
    cls, table = renamed["position"].split([1, renamed["position"].shape[1] - 1], dim=1)
    renamed["cls"] = renamed["cls"] + cls
    grid, side = math.isqrt(table.shape[1]), DINOV2.size // DINOV2.patch
    table = table.transpose(1, 2).unflatten(2, (grid, grid))                 # (1,D,37,37)
    scale = (side + 0.1) / grid
    renamed["position"] = F.interpolate(table, scale_factor=(scale, scale), mode="bicubic")
    return {name: tensor for name, tensor in renamed.items()
            if not name.endswith(("to_k.bias", "mask_token"))}

def load_dinov2(path, device="cpu"):
    """The published file, or `download` -> an Encoder, frozen. Raises UserError."""
    net = Encoder(DINOV2)
    net.to_bits = nn.Identity()  # a teacher needs no codes
    for m in net.modules():
        if isinstance(m, nn.LayerNorm):
            m.eps = 1e-6
    return load_weights("dinov2", path, net, dinov2_names).to(device)

@torch.no_grad()
def select_weights(encoder, larger):
    """Weight selection (2311.18823): the encoder's transformer takes uniformly spaced elements
    of a larger one's.

    Along each dimension of m elements, element i is element floor(i n / m) of the larger one's
    n; likewise the blocks along the depth. Elements of one attention head stay together.
    """
    def select(target, source):
        for dim, (m, n) in enumerate(zip(target.shape, source.shape)):
            assert m <= n, f"{m} elements of {n}: --init dinov2 selects from a larger network"
            index = torch.arange(m, device=source.device) * n // m
            source = source.index_select(dim, index)
        target.copy_(source)

    select(encoder.cls, larger.cls)
    for i, block in enumerate(encoder.blocks):
        other = larger.blocks[i * len(larger.blocks) // len(encoder.blocks)]
        for (name, target), source in zip(block.named_parameters(), other.parameters()):
            # rows of q, k, v and columns of proj are (head, element of the head)
            if name.startswith("attn.to_") or name == "attn.proj.weight":
                dim = int(name == "attn.proj.weight")
                target = target.unflatten(dim, (block.attn.heads, -1))
                source = source.unflatten(dim, (other.attn.heads, -1))
            select(target, source)
    for target, source in zip(encoder.norm.parameters(), larger.norm.parameters()):
        select(target, source)

if __name__ == "__main__":
    run_main(main)
