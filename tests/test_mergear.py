"""Tests of mergear.py: one property each, on the CPU. The docstring of a test names the bug that it catches.

    python -m pytest -q tests/test_mergear.py
"""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import dataclasses

import mergear
from data import UserError
from mergear import (GPT, MODELS, GPTConfig, code_losses, draw, first_positions, guide, join_codes,
                     load_generator, mergear_mask, sample_codes, split_codes)
from tokenizer import MergeVQ, TokenizerConfig, save_checkpoint

torch.set_num_threads(1)  # the models here are too small for more, and sums then have one order


# ---------------------------------------------------------------------------------------------------------------------
# helpers

def small_gpt(seed=0, **changes):
    """A GPT whose weights are far from their initial values, so that attention, head and prefix all matter."""
    settings = dict(width=32, heads=2, depth=2, bits=4, length=16, keep=4, keeps=(2, 4, 16), window=2, num_classes=3)
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**{**settings, **changes})).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() > 1 else p)
    return gpt


def full_logits(gpt, codes, labels, keep=None):
    """forward() with the mask that a cache of `keep` first positions stands for."""
    if gpt.config.mode == "raster":
        return gpt(codes, labels)
    return gpt(codes, labels, torch.full_like(labels, keep), mergear_mask(codes, gpt.config.window, keep))


def cached_logits(gpt, codes, labels, keep=None, after_step=lambda cache, i: None):
    """The same logits from one-token steps over a cache."""
    cache = gpt.new_cache(len(labels), keep)
    subs = split_codes(codes, gpt.config.sub_bits)
    h, steps = gpt.prefill(labels, None if keep is None else torch.full_like(labels, keep), cache), []
    for i in range(codes.shape[1]):
        steps.append(gpt.head(h, subs[:, i, :-1]))
        if i < codes.shape[1] - 1:
            h = gpt.advance(codes[:, i], i, cache)
            after_step(cache, i)
    return [torch.stack([step[s] for step in steps], dim=1) for s in range(subs.shape[-1])]


def redundant_codes(batch, length, vocabulary, seed=0):
    """Sequences with runs and returns; sample b uses b + 1 different codes at most, the last ones many."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for b in range(batch):
        names = torch.randperm(vocabulary, generator=g)[:min(vocabulary, 1 + b * b)]
        rows.append(names[torch.randint(len(names), (length,), generator=g)])
    return torch.stack(rows)


def write_images(folder, per_class=12, size=8):
    """A data set of two classes, with train and val."""
    g = torch.Generator().manual_seed(1)
    for split, count in (("train", per_class), ("val", 3)):
        for name, base in (("dark", 40), ("light", 200)):
            os.makedirs(os.path.join(folder, split, name))
            for n in range(count):
                pixels = (torch.randint(-40, 40, (size, size, 3), generator=g) + base).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(os.path.join(folder, split, name, f"{n}.png"))


def write_tokenizer(path, data, seed=0, **changes):
    """A checkpoint of an untrained tokenizer: 8 px, L = 16, K = 6."""
    settings = dict(data=data, size=8, base=8, mult=(1, 2), width=16, heads=2, depth=2, dec_width=16, dec_heads=2, dec_depth=1,
                    keep=6, keeps=(4, 6, 16), bits=11, norm_groups=4, recovery_width=16, recovery_heads=2, align="none")
    torch.manual_seed(seed)
    config = TokenizerConfig(**{**settings, **changes})
    model = MergeVQ(config).train()
    with torch.no_grad():
        for _ in range(50):  # bit norm finds its running statistics
            model.encode(torch.rand(16, 3, 8, 8) * 2 - 1)
    save_checkpoint(path, "tokenizer", step=0, config=dataclasses.asdict(config), ema=model.state_dict())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images/ and tok.pt, to train on."""
    folder = tmp_path_factory.mktemp("mergear")
    write_images(folder / "images")
    write_tokenizer(folder / "tok.pt", str(folder / "images"))
    return folder


def train(place, out, *flags, tokenizer="tok.pt"):
    """Run mergear.py in this process at a size for tests. Returns its checkpoint."""
    main_flags = dict(width=16, heads=2, depth=1, batch_size=8, max_steps=4, warmup=2, log_every=1, eval_every=100,
                      save_every=100, token_dropout=0.2, label_smoothing=0.1)
    argv = [part for name, value in main_flags.items() for part in ("--" + name.replace("_", "-"), str(value))]
    mergear.main([*argv, "--tokenizer", str(place / tokenizer), "--device", "cpu", "--out", str(place / out), *flags])
    return torch.load(place / out / "ckpt.pt", weights_only=True)


def metrics(place, out):
    with open(place / out / "metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------------------
# mask and sub-tokens

@pytest.mark.parametrize("window", [0, 1, 3, 20])
@pytest.mark.parametrize("keep", [None, 2])
def test_mask_is_the_sentence(window, keep):
    """Catches an off-by-one in the window, a repeat taken for a first, or a look ahead, by the definition in loops."""
    codes = redundant_codes(4, 20, 16)
    mask = mergear_mask(codes, window, keep)
    for b, sequence in enumerate(codes.tolist()):
        order = list(dict.fromkeys(sequence))  # distinct codes by first appearance
        for i in range(20):
            for j in range(20):
                first = j == sequence.index(sequence[j]) and (keep is None or order.index(sequence[j]) < keep)
                assert mask[b, i, j] == (j <= i and (i - j <= window or first)), (b, i, j)


def test_first_positions_of_source():
    """Catches firsts that depend on how groups are numbered."""
    source = torch.tensor([[0, 0, 1, 0, 2, 1]])
    expected = torch.tensor([[1, 0, 1, 0, 1, 0]]).bool()
    assert torch.equal(first_positions(source), expected)
    assert torch.equal(first_positions(7 - source), expected)
    assert torch.equal(first_positions(source, keep=2), torch.tensor([[1, 0, 1, 0, 0, 0]]).bool())


@pytest.mark.parametrize("d", [1, 4, 10, 11, 12, 18, 20])
def test_sub_tokens_round_trip(d):
    """Catches bits that are lost or swapped between code and sub-tokens, and a sub-token too large for a softmax."""
    sub_bits = GPTConfig(bits=d).sub_bits
    assert sum(sub_bits) == d and max(sub_bits) <= 14
    codes = torch.cat([torch.tensor([0, 1, 2 ** d - 1]), torch.randint(2 ** d, (200,))])
    subs = split_codes(codes, sub_bits)
    assert all((subs[:, s] < 2 ** n).all() for s, n in enumerate(sub_bits))
    assert torch.equal(join_codes(subs, sub_bits), codes)
    assert torch.equal(subs[:, 0], codes % 2 ** sub_bits[0])


# ---------------------------------------------------------------------------------------------------------------------
# model

@pytest.mark.parametrize("name, expected", [("b", 106e6), ("l", 343e6), ("xl", 784e6)])
def test_parameter_counts(name, expected):
    """Catches a size that is not the paper's: L must have 343M parameters."""
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**MODELS[name], bits=18, length=1024, num_classes=1000))
    assert sum(p.numel() for p in gpt.parameters()) == pytest.approx(expected, rel=0.01)


def test_loss_is_minus_log_p_of_the_code():
    """Catches sub-tokens that are scored independently, or summed wrongly: over all 2^d codes exp(-loss) must sum to 1,
    and each must be the product of the two softmaxes."""
    gpt, d = small_gpt(bits=11), 11
    codes = torch.arange(2 ** d)[:, None]                                                  # (V,1)
    subs = split_codes(codes, gpt.config.sub_bits)                                         # (V,1,2)
    h = torch.randn(32).expand(2 ** d, 1, 32)
    logits = gpt.head(h, subs[..., :-1])
    loss, bits = code_losses(logits, codes, gpt.config.sub_bits)
    assert (-loss).exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(loss, bits.sum(-1) * math.log(2), atol=1e-4)
    p = logits[0].softmax(-1)[:, 0], logits[1].softmax(-1)[:, 0]
    brute = torch.stack([p[0][n, subs[n, 0, 0]] * p[1][n, subs[n, 0, 1]] for n in range(0, 2 ** d, 7)])
    assert torch.allclose((-loss[::7, 0]).exp(), brute, rtol=1e-4)
    assert not torch.allclose(logits[1][0], logits[1][1])  # the second depends on the first


def test_label_smoothing_is_torchs():
    """Catches a smoothing term of the wrong sign or scale."""
    logits, codes = [torch.randn(2, 5, 16)], torch.randint(16, (2, 5))
    loss, _ = code_losses(logits, codes, (4,), 0.1)
    expected = torch.nn.functional.cross_entropy(logits[0].flatten(0, 1), codes.flatten(), label_smoothing=0.1, reduction="none")
    assert torch.allclose(loss.flatten(), expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["raster", "mergear"])
@pytest.mark.parametrize("bits", [4, 11])
def test_no_position_sees_the_future(mode, bits):
    """Catches a leak: changing code j may change no logit of codes 0..j, except that sub-token 1 of j sees sub-token 0."""
    gpt, keep = small_gpt(mode=mode, bits=bits), 16 if mode == "mergear" else None
    codes, labels = redundant_codes(3, 16, 2 ** bits), torch.tensor([0, 1, 3])
    before = full_logits(gpt, codes, labels, keep)
    for j in (0, 5, 15):
        changed = codes.clone()
        changed[:, j] ^= 2 ** bits - 1
        after = full_logits(gpt, changed, labels, keep)
        assert torch.allclose(before[0][:, :j + 1], after[0][:, :j + 1], atol=1e-5)
        if bits == 11:
            assert torch.allclose(before[1][:, :j], after[1][:, :j], atol=1e-5)
            assert not torch.allclose(before[1][:, j], after[1][:, j], atol=1e-3)
        assert j == 15 or not torch.allclose(before[0][:, j + 1], after[0][:, j + 1], atol=1e-3)


def test_class_and_instruction_matter():
    """Catches a prefix that is embedded but never attended to, or an instruction looked up by the wrong index."""
    gpt, codes = small_gpt(mode="mergear"), redundant_codes(3, 16, 16)
    base = full_logits(gpt, codes, torch.tensor([0, 0, 0]), 4)[0]
    assert not torch.allclose(base, full_logits(gpt, codes, torch.tensor([1, 1, 1]), 4)[0], atol=1e-2)
    mask = mergear_mask(codes, 2, 4)
    for keep, row in ((2, 0), (4, 1), (16, 2)):
        told = gpt(codes, torch.zeros(3, dtype=torch.long), torch.full((3,), keep), mask)[0]
        assert torch.allclose(told, base, atol=1e-5) == (keep == 4)
        assert torch.equal(gpt.embed_prefix(torch.tensor([0]), torch.tensor([keep]))[0, 1], gpt.instruction.weight[row])


def test_dropped_inputs_are_hidden():
    """Catches token dropout that hides the target, or the wrong position: a hidden code's value must not matter."""
    gpt, codes, labels = small_gpt(mode="raster"), redundant_codes(2, 16, 16, seed=3), torch.tensor([0, 1])
    dropped = torch.zeros(2, 16, dtype=torch.bool)
    dropped[:, 4] = True
    changed = codes.clone()
    changed[:, 4] ^= 15
    a, b = gpt(codes, labels, dropped=dropped)[0], gpt(changed, labels, dropped=dropped)[0]
    assert torch.allclose(a, b, atol=1e-5) and not torch.allclose(a, gpt(codes, labels)[0], atol=1e-2)


@pytest.mark.parametrize("threads", [1, 2])
def test_split_product_is_the_product(threads):
    """Catches parts of the outputs in the wrong order, or rows that are mixed up, in products split over the threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for c_in, c_out, shape in ((256, 256, (8, 1)), (256, 1024, (3, 5)), (300, 262, (2, 2)), (512, 129, (4, 1)),
                                   (256, 260, (300, 1)), (256, 256, (0, 1))):
            linear, x = mergear.Linear(c_in, c_out), torch.randn(*shape, c_in)
            with torch.no_grad():
                y = linear(x)
            assert y.shape == (*shape, c_out) and y.is_contiguous()
            assert torch.allclose(y, x @ linear.weight.T, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("mode", ["raster", "mergear"])
def test_bfloat16_attends_in_float32_on_a_cpu(mode):
    """Catches a cache in bfloat16, which is slow there, one that mixes types, and a model that computes in float32 altogether."""
    gpt = small_gpt(mode=mode).to(torch.bfloat16)
    codes, labels = redundant_codes(4, 16, 16), torch.zeros(4, dtype=torch.long)
    assert gpt.new_cache(4, 4).keys[0].dtype == torch.float32
    cached, full = cached_logits(gpt, codes, labels, 4)[0], full_logits(gpt, codes, labels, 4)[0]
    assert cached.dtype == torch.bfloat16
    assert torch.allclose(cached.float(), full.float(), atol=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# caches

@pytest.mark.parametrize("bits", [4, 11])
def test_dense_cache_equals_full_forward(bits):
    """Catches a wrong rotary position, a missing or garbage row, or a cache that mixes up samples of a batch."""
    gpt = small_gpt(mode="raster", bits=bits, length=64)
    codes, labels = redundant_codes(5, 64, 2 ** bits), torch.tensor([0, 1, 2, 3, 0])
    for a, b in zip(full_logits(gpt, codes, labels), cached_logits(gpt, codes, labels)):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("window", [0, 1, 4, 64])
@pytest.mark.parametrize("keep", [2, 4, 16])
def test_compact_cache_equals_masked_forward(window, keep):
    """Catches a repeat seen after it left the window, a first that is evicted, a ring slot overwritten too early, a
    sample treated by its neighbour's repeats, and more than K distinct codes overflowing the cache."""
    gpt = small_gpt(mode="mergear", window=window, length=64)
    codes, labels = redundant_codes(6, 64, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    assert [len(row.unique()) for row in codes] == sorted(len(row.unique()) for row in codes)
    assert len(codes[0].unique()) == 1 and len(codes[-1].unique()) >= 15  # all repeats, and far more than keep
    full, cached = full_logits(gpt, codes, labels, keep)[0], cached_logits(gpt, codes, labels, keep)[0]
    assert torch.allclose(full, cached, atol=1e-4)
    if window < 4 and keep < 16:  # and the mask matters at all here
        causal = gpt(codes, labels, torch.full_like(labels, keep), torch.ones(6, 64, 64).tril().bool())[0]
        assert not torch.allclose(full, causal, atol=1e-2)


@pytest.mark.parametrize("window", [0, 3])
def test_compact_cache_stays_within_its_bound(window):
    """Catches a cache that grows with L: rows allocated are 2 + K + window, and rows in use never more; and rows that
    are out of use must not matter, so they are overwritten with rubbish after every step."""
    gpt, keep = small_gpt(mode="mergear", window=window, length=64), 4
    codes, labels = redundant_codes(6, 64, 16), torch.zeros(6, dtype=torch.long)
    used = []

    def spoil(cache, i):
        used.append(cache.rows_in_use())
        unused = (cache.last_seen <= cache.t)[:, :cache.visible].repeat_interleave(cache.heads, 0)  # (Rh, rows)
        for rows in (*cache.keys, *cache.values):
            rows.masked_fill_(unused[..., None], 1e3)

    cached = cached_logits(gpt, codes, labels, keep, spoil)[0]
    assert torch.allclose(cached, full_logits(gpt, codes, labels, keep)[0], atol=1e-4)
    cache, c = gpt.new_cache(6, keep), gpt.config
    assert cache.rows == 2 + keep + window and cache.nbytes == 2 * c.depth * 6 * cache.rows * c.width * 4
    used = torch.stack(used)
    assert used.max() == 2 + keep + window and used[:, 0].max() <= 3 + window  # one distinct code: one first
    assert used[-1, 0] == 3 + window


@pytest.mark.parametrize("heads", [1, 2, 4, 8])  # of width 64, 32, 16, 8
def test_neighbours_do_not_change_a_bit(heads):
    """Catches a sample whose rounding depends on how many rows the others of its batch need, as all attend to as many; and
    rows lost when they move to make room."""
    gpt = small_gpt(mode="mergear", length=256, bits=8, keep=128, keeps=(128,), width=64, heads=heads)
    few = torch.randint(0, 20, (1, 256), generator=torch.Generator().manual_seed(0))
    many = torch.randint(0, 256, (3, 256), generator=torch.Generator().manual_seed(1))
    labels, widths, logits = torch.tensor([0, 1, 2, 3]), [], []
    with torch.no_grad():
        for others in (few.expand(3, -1), many):
            codes = torch.cat([few, others])
            logits.append(cached_logits(gpt, codes, labels, 128, lambda cache, i: widths.append(cache.visible))[0])
        full = full_logits(gpt, codes, labels, 128)[0]
    assert torch.equal(logits[0][0], logits[1][0])
    assert widths[254] == (64 if heads == 8 else 32) and widths[-1] == 132 == gpt.new_cache(1, 128).rows
    assert torch.allclose(logits[1], full, atol=1e-3)


def test_ring_slots_are_reused():
    """Catches a ring that appends: the repeat at i + window must take the slot of the repeat at i."""
    gpt = small_gpt(mode="mergear", window=3, length=16)
    cache = gpt.new_cache(1, 4)
    gpt.prefill(torch.tensor([0]), torch.tensor([4]), cache)
    for i in range(9):  # code 5 all along: position 0 is the first, the rest are repeats
        gpt.advance(torch.tensor([5]), i, cache)
    P = gpt.config.prefix
    assert cache.firsts == 2 + 3 and cache.count.item() == 1
    expected = {2 + i % 3: P + i + 3 for i in (6, 7, 8)}  # slot -> last sequence row that sees it
    assert {row: cache.last_seen[0, row].item() for row in expected} == expected
    assert cache.last_seen[0, cache.firsts] == cache.forever and (cache.last_seen[0, cache.firsts + 1:] == -1).all()


def test_compact_cache_under_autocast():
    """Catches a cache whose type is not what attention computes in: an error, or a copy of the whole cache every step."""
    gpt = small_gpt(mode="mergear", window=0)
    codes, labels = redundant_codes(4, 16, 16), torch.zeros(4, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        assert gpt.new_cache(4, 4).keys[0].dtype == torch.bfloat16
        cached = cached_logits(gpt, codes, labels, 4)[0]
    assert torch.allclose(cached.float(), full_logits(gpt, codes, labels, 4)[0], atol=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# randar

def some_orders(batch, keep, seed=0):
    return torch.rand(batch, keep, generator=torch.Generator().manual_seed(seed)).argsort(1)


def randar_logits(gpt, codes, labels, order):
    """forward() of a randar model: sub-token 0, for codes and ranks in the order of the sequence."""
    return gpt(codes, labels, torch.full_like(labels, codes.shape[1]), order=order)[0]


@pytest.mark.parametrize("counts", [(1,) * 4, (1, 1, 2), (4,), (2, 1, 1)])
def test_parallel_steps_equal_the_full_forward(counts):
    """Catches wrong rows, rotary ranks or masks in the cache: n codes asked for at once each see all codes before them, as
    if it were their turn, and not the other n - 1. One at a time is then exactly the model that was trained."""
    gpt, labels, order = small_gpt(mode="randar"), torch.arange(6) % 3, some_orders(6, 4)
    codes = torch.randint(16, (6, 4), generator=torch.Generator().manual_seed(1))
    cache = gpt.new_cache(6, 4)
    gpt.prefill(labels, torch.full_like(labels, 4), cache)
    old, known = 0, 0
    for n in counts:
        h = gpt.advance_pairs(codes[:, old:known], order[:, old:known + n], old, cache)
        logits = gpt.head(h, codes.new_empty(6, n, 0))[0]                                  # (6,n,V)
        for j in range(n):  # the sequence in which code `known + j` comes next
            after = [known + j] + [i for i in range(4) if i >= known and i != known + j]
            turn = torch.tensor(list(range(known)) + after)
            full = randar_logits(gpt, codes[:, turn], labels, order[:, turn])
            assert torch.allclose(logits[:, j], full[:, known], atol=1e-4), (counts, known, j)
        old, known = known, known + n
    assert known == 4


def test_randar_looks_back_only():
    """Catches a leak: the logits of a code must not depend on itself or on later codes, and must on its own rank."""
    gpt, labels, order = small_gpt(mode="randar"), torch.arange(6) % 3, some_orders(6, 4)
    codes = torch.randint(16, (6, 4), generator=torch.Generator().manual_seed(1))
    before = randar_logits(gpt, codes, labels, order)
    changed = codes.clone()
    changed[:, 2] = (changed[:, 2] + 5) % 16
    after = randar_logits(gpt, changed, labels, order)
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.allclose(before[:, 3], after[:, 3], atol=1e-2)
    swapped = order[:, [0, 1, 3, 2]]
    assert not torch.allclose(before[:, 2], randar_logits(gpt, codes, labels, swapped)[:, 2], atol=1e-2)


def test_identity_order_is_raster_order():
    """Catches a permutation applied to codes but not to ranks, or undone wrongly: with the identity, the random model's
    sequence, logits and samples are those of --order raster."""
    source = torch.tensor([[0, 1, 0, 2], [0, 1, 2, 2]]).repeat_interleave(4, dim=1)         # (2,16)
    codes = torch.tensor([[5, 3, 9], [7, 7, 1]])
    full = codes.gather(1, source)
    random, raster = (GPTConfig(mode="randar", order=o, length=16) for o in ("random", "raster"))
    identity = mergear.draw_orders(raster, 2, 3, torch.Generator())
    assert identity.tolist() == [[0, 1, 2]] * 2
    a, b = (mergear.to_sequence(config, full, source, 3, identity) for config in (random, raster))
    assert torch.equal(a[0], codes) and torch.equal(a[0], b[0]) and torch.equal(a[1]["order"], b[1]["order"])
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    sequence, inputs = mergear.to_sequence(random, full, source, 3, order)
    assert sequence.tolist() == [[9, 5, 3], [7, 1, 7]] and torch.equal(inputs["order"], order)
    drawn = mergear.draw_orders(random, 500, 3, torch.Generator().manual_seed(0))
    assert len({tuple(row) for row in drawn.tolist()}) == 6 and drawn.sort(1).values.unique(dim=0).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("order", ["random", "raster"])
def test_parallel_with_one_code_a_step_is_sequential(order):
    """Catches a parallel decoder that is not the model: with K steps, the most likely code of every position given those
    drawn before must be what the full forward says; and few steps give other samples."""
    gpt, labels = small_gpt(mode="randar", order=order), torch.arange(16) % 3
    codes = sample_codes(gpt, labels, temperature=0, steps=4, seed=3)
    ranks = torch.cat([sample_order(gpt.config, 3, i) for i in range(16)])
    sequence = codes.gather(1, ranks)
    assert torch.equal(randar_logits(gpt, sequence, labels, ranks).argmax(-1), sequence)
    assert not torch.equal(codes, sample_codes(gpt, labels, temperature=0, steps=1, seed=3))
    assert codes.shape == (16, 4) and sample_codes(gpt, labels, keep=16).shape == (16, 16)


def sample_order(config, seed, i):
    """The order that sample_codes draws for sample i: after its uniform numbers."""
    generator = mergear.seeded(seed, i)
    torch.rand(config.length, len(config.sub_bits), dtype=torch.float64, generator=generator)
    return mergear.draw_orders(config, 1, config.keep, generator)


def test_arccos_steps():
    """Catches a schedule that loses or repeats codes, or has idle steps; and the paper's 64 of 144 and 88 of 256."""
    for keep in (1, 2, 7, 36, 144, 256):
        for steps in range(1, keep + 1):
            counts = mergear.arccos_steps(keep, steps)
            assert len(counts) == steps and sum(counts) == keep and min(counts) >= 1, (keep, steps)
        assert mergear.arccos_steps(keep, keep) == [1] * keep
    assert len(mergear.arccos_steps(144)) == 64 and len(mergear.arccos_steps(256)) == 88
    assert mergear.arccos_steps(256)[0] <= 2 < mergear.arccos_steps(256)[-1]  # slow at first, fast at the end


def test_linear_guidance_grows():
    """Catches a schedule that starts at full scale: with it the first code is nearly the conditional model's."""
    seen, formula = [], mergear.guide
    gpt = small_gpt(mode="randar")
    try:
        mergear.guide = lambda logits, scale: seen.append(scale) or formula(logits, scale)
        sample_codes(gpt, torch.zeros(2, dtype=torch.long), cfg=3.0, steps=4, cfg_schedule="linear")
        assert seen == [1.5, 2.0, 2.5, 3.0]
        seen.clear()
        sample_codes(gpt, torch.zeros(2, dtype=torch.long), cfg=3.0, steps=2)
        assert seen == [3.0, 3.0]
    finally:
        mergear.guide = formula


# ---------------------------------------------------------------------------------------------------------------------
# sampling

def test_sub_tokens_one_at_a_time():
    """Catches a sub-token that does not see the earlier rows of its own code, or sees another's: next_sub is head()."""
    gpt = small_gpt(bits=14, head_depth=2)
    h, codes = torch.randn(5, 3, 32), torch.randint(2 ** 14, (5, 3))
    subs = split_codes(codes, gpt.config.sub_bits)
    full, past, x = gpt.head(h, subs[..., :-1]), [], h
    for s, logits in enumerate(full):
        one, past = gpt.next_sub(x, s, past)
        assert torch.allclose(one, logits, atol=1e-5)
        x = gpt.sub_embed[s](subs[..., s])


def test_cfg_formula():
    """Catches the two guidance conventions mixed up: s = 1 is the conditional model, s = 0 the unconditional one."""
    logits = torch.randn(6, 9)
    cond, uncond = logits[:3], logits[3:]
    assert torch.allclose(guide(logits, 3.0), uncond + 3 * (cond - uncond))
    assert torch.allclose(guide(logits, 0.0), uncond)
    assert torch.allclose(guide(logits, 1.0), cond)


@pytest.mark.parametrize("mode", ["raster", "mergear"])
def test_cfg_one_is_the_conditional_model(mode):
    """Catches cfg 1.0 that runs the null class too, or rounds differently: B rows, and the codes of a plain loop."""
    gpt, labels, rows = small_gpt(mode=mode), torch.arange(16) % 3, []
    hook = gpt.blocks[0].register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    plain = sample_codes(gpt, labels, cfg=1.0, temperature=0)
    assert set(rows) == {16} and len(rows) == gpt.config.prefix + 15
    rows.clear()
    guided = sample_codes(gpt, labels, cfg=2.0, temperature=0)
    assert set(rows) == {32}
    hook.remove()
    assert not torch.equal(plain, guided)
    keep = gpt.config.keep if mode == "mergear" else None
    assert torch.equal(plain, cached_logits(gpt, plain, labels, keep)[0].argmax(-1))


def test_guided_samples_follow_the_guided_logits():
    """Catches halves of the CFG batch that continue with different codes, and a null class of the wrong id."""
    gpt, labels = small_gpt(mode="mergear", bits=11), torch.arange(16) % 3
    codes = sample_codes(gpt, labels, cfg=1.5, temperature=0)
    cond, uncond = (full_logits(gpt, codes, l, gpt.config.keep) for l in (labels, torch.full_like(labels, 3)))
    guided = [u + 1.5 * (c - u) for c, u in zip(cond, uncond)]
    chosen = split_codes(codes, gpt.config.sub_bits)
    for s, logits in enumerate(guided):  # the best by more than rounding, or a near tie
        picked = logits.gather(-1, chosen[..., s:s + 1])[..., 0]
        assert (logits.max(-1).values - picked).max() < 1e-3


@pytest.mark.parametrize("mode", mergear.MODES)
def test_samples_do_not_depend_on_the_batch(mode):
    """Catches samples that depend on the batch size, the place in the batch, or the neighbours (VAR #69, #83)."""
    gpt, labels = small_gpt(mode=mode, bits=11), torch.arange(64) % 3
    together = sample_codes(gpt, labels, cfg=2.0, seed=5)
    assert len(together.unique(dim=0)) == 64
    by_8 = torch.cat([sample_codes(gpt, labels[i:i + 8], cfg=2.0, seed=5, start=i) for i in range(0, 64, 8)])
    by_1 = torch.cat([sample_codes(gpt, labels[i:i + 1], cfg=2.0, seed=5, start=i) for i in range(13, 21)])
    assert torch.equal(together, by_8) and torch.equal(together[13:21], by_1)
    assert torch.equal(together[5:33], sample_codes(gpt, labels[5:33], cfg=2.0, seed=5, start=5))  # across chunks
    assert not torch.equal(together, sample_codes(gpt, labels, cfg=2.0, seed=6))


def test_draw_has_the_right_distribution():
    """Catches an inverted distribution function that is off by one, or a filter that leaves the wrong entries."""
    logits = torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3]).log().expand(10_000, 5)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    share = lambda **flags: torch.bincount(draw(logits, u, **flags), minlength=5) / 10_000
    assert torch.allclose(share(), torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3]), atol=1e-3)
    assert torch.allclose(share(top_k=2), torch.tensor([0, 0, 0, 4 / 7, 3 / 7]), atol=1e-3)
    assert torch.allclose(share(top_p=0.75), torch.tensor([0, 2 / 9, 0, 4 / 9, 3 / 9]), atol=1e-3)
    assert torch.allclose(share(top_p=0.3), torch.tensor([0, 0, 0, 1.0, 0]), atol=1e-3)
    assert torch.allclose(share(temperature=0.5), torch.tensor([1, 4, 0, 16, 9]) / 30, atol=1e-3)
    assert torch.allclose(share(temperature=0), torch.tensor([0, 0, 0, 1.0, 0]), atol=1e-3)
    edge = draw(torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 2), torch.tensor([0.0, 1 - 2.0 ** -53], dtype=torch.float64))
    assert edge.tolist() == [1, 2]  # never an impossible code


# ---------------------------------------------------------------------------------------------------------------------
# training

def test_checkpoint_is_enough_to_sample(place):
    """Catches a checkpoint that needs another file, pickled objects, or returns the raw weights for the averaged ones."""
    saved = train(place, "whole", "--save-every", "2")
    gpt, tokenizer = load_generator(place / "whole/ckpt.pt")
    assert not gpt.training and not tokenizer.training
    assert same(gpt.state_dict(), saved["ema"]) and not same(saved["model"], saved["ema"])
    assert gpt.config.class_names == ("dark", "light") and gpt.config.bits == 11 and gpt.config.keeps == (4, 6, 16)
    codes = sample_codes(gpt, torch.tensor([0, 1, 0]), cfg=2.0)
    script = (f"import sys; sys.path.insert(0, {ROOT!r}); import torch; from mergear import load_generator, sample_codes;"
              f"torch.set_num_threads(1); gpt, tok = load_generator({str(place / 'moved.pt')!r});"
              f"print(sample_codes(gpt, torch.tensor([0, 1, 0]), cfg=2.0).tolist())")
    os.rename(place / "whole/ckpt.pt", place / "moved.pt")
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=place).stdout
    assert json.loads(printed) == codes.tolist()


@pytest.mark.parametrize("mode", mergear.MODES)
def test_resumed_run_is_the_same_run(place, mode):
    """Catches state that a checkpoint forgets: 4 steps must equal 2 + resume + 2 bit for bit, dropout included."""
    flags = ("--mode", mode, "--lr-schedule", "constant", "--dropout", "0.1", "--cache", str(place / f"codes-{mode}"))
    straight = train(place, f"straight-{mode}", *flags)
    train(place, f"broken-{mode}", *flags, "--max-steps", "2")
    resumed = train(place, f"broken-{mode}", *flags, "--resume")
    assert same(straight["model"], resumed["model"]) and same(straight["ema"], resumed["ema"])
    assert metrics(place, f"straight-{mode}")[-1]["val_bits"] == metrics(place, f"broken-{mode}")[-1]["val_bits"]
    with pytest.raises(UserError, match="depth 1"):
        train(place, f"broken-{mode}", *flags, "--resume", "--depth", "2")


@pytest.mark.parametrize("cache", ["", "none"])
def test_accumulation_is_a_bigger_batch(place, cache):
    """Catches gradient accumulation that scales wrongly or drops other inputs: 8 images x 1 must equal 2 x 4."""
    flags = ("--max-steps", "2", "--lr-schedule", "constant", "--cache", cache and "none")
    whole, split = train(place, f"whole-{cache}", *flags), train(place, f"split-{cache}", *flags, "--accum", "4")
    for name, p in whole["model"].items():
        assert torch.allclose(p, split["model"][name], atol=2e-5), name
    a, b = (metrics(place, f"{name}-{cache}") for name in ("whole", "split"))  # AdamW would hide a wrong scale
    assert a[0]["grad_norm"] == pytest.approx(b[0]["grad_norm"], rel=1e-3) and a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-4)


def test_two_processes_equal_one(place):
    """Catches ranks that see the same images, draw their own K or dropout, or average gradients wrongly."""
    flags = ["--width", "16", "--heads", "2", "--depth", "1", "--batch-size", "8", "--max-steps", "2", "--lr-schedule", "constant",
             "--token-dropout", "0.2", "--label-smoothing", "0.1", "--tokenizer", str(place / "tok.pt"), "--device", "cpu", "--eval-num", "5"]
    one = train(place, "one", "--max-steps", "2", "--lr-schedule", "constant", "--eval-num", "5")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           os.path.join(ROOT, "mergear.py"), *flags, "--out", str(place / "two"), "--warmup", "2"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = torch.load(place / "two/ckpt.pt", weights_only=True)
    for name, p in one["model"].items():
        assert torch.allclose(p, two["model"][name], atol=2e-5), name
    for split in ("train", "val"):
        for name in mergear.COLUMNS:
            with open(place / f"one/codes/{split}/{name}.npy", "rb") as a, open(place / f"two/codes/{split}/{name}.npy", "rb") as b:
                assert a.read() == b.read(), f"{split}/{name}.npy differs"
    assert metrics(place, "one")[-1]["val_bits"] == pytest.approx(metrics(place, "two")[-1]["val_bits"], abs=1e-4)


def test_code_cache_holds_what_the_tokenizer_says(place):
    """Catches codes stored before recovery, views in the wrong rows, or a K that is not the one in `keep`."""
    train(place, "cache", "--views", "3", "--max-steps", "1")
    _, tokenizer = load_generator(place / "cache/ckpt.pt")
    images = mergear.build_dataset(tokenizer.config.data, "train", 8, train=True)
    codes = mergear.CodeDataset(place / "cache/codes/train")
    assert len(codes) == len(images) == 24
    for view in range(3):
        for i in (0, 5, 23):
            (x, source, label), keep = codes[24 * view + i], int(codes.keep[24 * view + i])
            encoded = tokenizer.encode(images.view(i, view)[0][None], keep)
            assert torch.equal(encoded.source[0], source) and int(label) == images[i][1]
            assert (encoded.codes.gather(1, encoded.source)[0] == x).float().mean() > 0.9  # a bit near 0 may flip by rounding
            assert view > 0 or keep == 6
            assert len(x.unique()) <= keep
    assert set(codes.keep.tolist()) <= {4, 6, 16}


def test_a_training_batch_has_one_merge_count(place):
    """Catches steps that mix K, ignore the drawn K, give two ranks the same rows, or depend on how a batch is divided."""
    train(place, "batches", "--views", "8", "--max-steps", "1")
    codes, config = mergear.CodeDataset(place / "batches/codes/train"), load_generator(place / "batches/ckpt.pt")[1].config
    stream = lambda step, drawn=True, *split: mergear.code_batches(codes, config, 8, 0, step, drawn, *(split or (1, 0, 1)))
    whole, kept = stream(0), []
    for step in range(20):
        *batch, keep = next(whole)
        kept.append(keep)
        assert all(len(row.unique()) == keep for row in batch[1])
        parts = [next(stream(step, True, 1, rank, 2)) for rank in (0, 1)]
        assert all(torch.equal(torch.cat(pair), column) for *pair, column in zip(*(part[:-1] for part in parts), batch))
    assert len(set(kept)) > 1 and kept.count(6) > 8
    assert {next(stream(step, False))[-1] for step in range(9)} == {6}


def test_wrong_code_cache_is_refused(place):
    """Catches training on another tokenizer's codes (LlamaGen #39): one line that names both, and the remedy."""
    flags = ("--max-steps", "1", "--cache", str(place / "shared"))
    train(place, "first", *flags)
    write_tokenizer(place / "other.pt", str(place / "images"), seed=1)
    with pytest.raises(UserError, match=r"shared.train was made with tokenizer [0-9a-f]{12}, this run has tokenizer [0-9a-f]{12}: delete"):
        train(place, "second", *flags, tokenizer="other.pt")
    with pytest.raises(UserError, match="views 2, this run has views 3"):
        train(place, "third", *flags, "--views", "3")
    train(place, "fourth", *flags)  # the right one is used again
    train(place, "own", "--max-steps", "1")
    with pytest.raises(UserError, match="delete that folder"):
        os.remove(place / "own/ckpt.pt")
        train(place, "own", "--max-steps", "1", tokenizer="other.pt")
    train(place, "own", "--max-steps", "1", "--overwrite", tokenizer="other.pt")  # a run's own codes go with it


def test_unlabelled_images(tmp_path):
    """Catches class ids out of range without classes: the null class is then id 0, the only one."""
    write_images(tmp_path / "all")
    os.makedirs(tmp_path / "images")
    for n, path in enumerate(sorted((tmp_path / "all/train").rglob("*.png"))):
        os.rename(path, tmp_path / f"images/{n}.png")
    write_tokenizer(tmp_path / "tok.pt", str(tmp_path / "images"))
    train(tmp_path, "run", "--max-steps", "1")
    gpt, _ = load_generator(tmp_path / "run/ckpt.pt")
    assert gpt.config.num_classes == gpt.null_class == 0 and len(gpt.class_embed.weight) == 1
    assert sample_codes(gpt, torch.zeros(2, dtype=torch.long)).shape == (2, 16)


@pytest.mark.parametrize("flags, message", [(("--width", "18"), "multiple of 4 x --heads"), (("--window", "-1"), "at least 0"),
                                            (("--tokenizer", "none.pt"), "no checkpoint at none.pt"), (("--nope",), "unrecognized")])
def test_bad_flags(place, flags, message):
    """Catches a bad flag that ends in a traceback, or that leaves a folder behind."""
    with pytest.raises(UserError, match=message):
        mergear.main(["--tokenizer", str(place / "tok.pt"), "--out", str(place / "bad"), *flags])
    assert not (place / "bad").exists()
