"""Tests of mergear.py: one property each. A docstring names the bug that its test catches."""

import dataclasses
import itertools
import math
import os

import pytest
import torch
import torch.nn.functional as F
from conftest import save_tokenizer, small_gpt, two_ranks
from kills import MERGEAR, ROOT, command, difference, read, write_images
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mergear
from data import View, build_dataset, seeded
from mergear import (GPT, MODELS, MODES, GPTConfig, code_losses, draw, draw_orders, guide,
                     join_codes, load_generator, mergear_mask, position_losses, rope_table,
                     rotate, sample_codes, sequence, split_codes)

def full_logits(gpt, codes, labels, keep=None):
    """forward() with the mask that a cache of `keep` first positions stands for."""
    if gpt.config.mode == "raster":
        return gpt(codes, labels)[0]
    return gpt(codes, labels, keep, mergear_mask(codes, gpt.config.window, keep))[0]

def redundant_codes(batch, length, vocabulary):
    """Sequences with runs and returns; sample b uses b^2 + 1 different codes at most."""
    g = seeded(0)
    names = torch.randperm(vocabulary, generator=g)
    picks = torch.randint(10 ** 9, (batch, length), generator=g)
    most = (torch.arange(batch)[:, None] ** 2 + 1).clamp(max=vocabulary)
    return names[picks % most]

def settings_of(folder):
    return dict(data=str(folder / "images"), bits=11, align="none")

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with images/ and tok.pt, to train on."""
    folder = tmp_path_factory.mktemp("mergear")
    write_images(folder / "images")
    save_tokenizer(folder / "tok.pt", **settings_of(folder))
    return folder

def flags(place, out, **changes):
    settings = dict(tokenizer=place / "tok.pt", max_steps=3, eval_every=100, save_every=100,
                    dropout=0, label_smoothing=0.1, lr_schedule="constant")
    return command(MERGEAR, place / out, **{**settings, **changes})

def train(place, out, **changes):
    """Run mergear.py in this process -> its checkpoint and the rows of its metrics."""
    mergear.main(flags(place, out, **changes))
    return read(place / out)

def close(a, b):
    return all(torch.allclose(a[name], b[name], rtol=0, atol=2e-5) for name in a)

# mask and sub-tokens

@pytest.mark.parametrize("window", [0, 1, 3, 20])
@pytest.mark.parametrize("keep", [None, 2])
def test_mask_is_the_sentence(window, keep):
    """An off-by-one in the window, a repeat taken for a first, a look ahead."""
    codes = redundant_codes(4, 20, 16)
    mask = mergear_mask(codes, window, keep)
    for b, row in enumerate(codes.tolist()):
        order = list(dict.fromkeys(row))  # distinct codes by first appearance
        for i, j in itertools.product(range(20), range(20)):
            first = j == row.index(row[j]) and (keep is None or order.index(row[j]) < keep)
            assert mask[b, i, j] == (j <= i and (i - j <= window or first)), (b, i, j)

@pytest.mark.parametrize("d", [1, 10, 11, 18, 20])
def test_sub_tokens_round_trip(d):
    """Bits that are lost or swapped between code and sub-tokens; a softmax that is too large."""
    sub_bits = GPTConfig(bits=d).sub_bits
    assert sum(sub_bits) == d and max(sub_bits) <= 14
    codes = torch.cat([torch.tensor([0, 1, 2 ** d - 1]), torch.randint(2 ** d, (200,))])
    subs = split_codes(codes, sub_bits)
    assert torch.equal(join_codes(subs, sub_bits), codes)
    assert torch.equal(subs[:, 0], codes % 2 ** sub_bits[0])

# model, losses, caches

@pytest.mark.parametrize("name, expected", [("b", 106e6), ("l", 343e6), ("xl", 784e6)])
def test_parameter_counts(name, expected):
    """A size that is not the paper's: L must have 343M parameters."""
    with torch.device("meta"):
        gpt = GPT(GPTConfig(**MODELS[name], bits=18, length=1024, num_classes=1000))
    assert sum(p.numel() for p in gpt.parameters()) == pytest.approx(expected, rel=0.01)

def test_loss_is_minus_log_p_of_the_code():
    """Sub-tokens scored independently: exp(-loss) must sum to 1 over all codes. Wrong smoothing."""
    gpt, codes = small_gpt(bits=11), torch.arange(2 ** 11)[:, None]
    subs = split_codes(codes, gpt.config.sub_bits)
    logits = gpt.head(torch.randn(32).expand(2 ** 11, 1, 32), subs[..., :-1])
    loss, bits = code_losses(logits, codes, gpt.config.sub_bits)
    assert (-loss).exp().sum().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(loss, bits * math.log(2), atol=1e-4)
    assert not torch.allclose(logits[1][0], logits[1][1])  # the second depends on the first
    flat, low = logits[0].flatten(0, 1), subs[..., 0]
    expected = F.cross_entropy(flat, low[:, 0], label_smoothing=0.1, reduction="none")
    loss, _ = code_losses(logits[:1], low, (6,), 0.1)
    assert torch.allclose(loss[:, 0], expected, atol=1e-5)

def test_class_and_instruction_matter():
    """A prefix that is never attended to; an instruction looked up by the wrong index."""
    gpt, codes = small_gpt(mode="mergear"), redundant_codes(3, 16, 16)
    mask, zero = mergear_mask(codes, 2), torch.zeros(3, dtype=torch.long)
    base = gpt(codes, zero, 4, mask)[0][0]
    assert not torch.allclose(base, gpt(codes, zero + 1, 4, mask)[0][0], atol=1e-2)
    for row, keep in enumerate(gpt.config.keeps):
        told = gpt(codes, zero, keep, mask)[0][0]
        assert torch.allclose(told, base, atol=1e-5) == (keep == 4)
        assert torch.equal(gpt.embed_prefix(zero, keep)[0, 1], gpt.merge_instruction.weight[row])

def test_dropped_inputs_are_hidden():
    """Token dropout of the wrong position: a hidden code's value must not matter."""
    gpt, codes, labels = small_gpt(mode="raster"), redundant_codes(2, 16, 16), torch.tensor([0, 1])
    dropped = torch.zeros(2, 16, dtype=torch.bool)
    dropped[:, 4] = True
    changed = codes.clone()
    changed[:, 4] ^= 15
    a = gpt(codes, labels, dropped=dropped)[0][0]
    assert torch.allclose(a, gpt(changed, labels, dropped=dropped)[0][0], atol=1e-5)
    assert not torch.allclose(a, gpt(codes, labels)[0][0], atol=1e-2)

def test_set_loss_is_the_average_over_all_orders():
    """A position loss with the wrong target, mask or spread: K = 4, all 3! orders, float64."""
    # the logits of a row may depend on what came before; here they depend on the set of it
    table = torch.randn(2 ** 8, 9, dtype=torch.float64)
    sampled, exact, bits = [], [], []
    for rest in itertools.permutations([2, 5, 7]):
        order = torch.tensor([0, *rest])
        before = [table[sum(2 ** p for p in order[:k])] for k in (1, 2, 3)]
        nll = 0.0
        for k in (1, 2, 3):
            masked = before[k - 1].index_fill(0, order[:k], -math.inf)
            nll -= masked.log_softmax(-1)[order[k]].item()
        sampled.append(nll)
        loss, row_bits = position_losses(torch.stack(before)[None], order[None])
        exact.append(loss.sum().item())
        bits.append(row_bits.item())
    ordered = sum(sampled) / 6
    assert sum(exact) / 6 == pytest.approx(ordered, abs=1e-5)
    expected = ordered / math.log(2) - math.log2(math.factorial(3))
    assert sum(bits) / 6 == pytest.approx(expected, abs=1e-5)

CACHES = [(dict(mode="raster", bits=bits, length=144), None) for bits in (4, 11)]
CACHES += [(dict(mode="mergear", window=window, length=64), keep)
           for window in (0, 1, 4, 64) for keep in (2, 4, 16)]
CACHES += [(dict(mode="mergear", bits=8, window=4, length=144, keeps=(100,)), 100),
           (dict(mode="mergear", bits=11, length=64), 4)]

@pytest.mark.parametrize("cfg", [1.0, 1.5])
@pytest.mark.parametrize("settings, keep", CACHES)
def test_decoding_over_a_cache_equals_the_full_forward(settings, keep, cfg):
    """A wrong rotary position; a garbage row; a repeat seen too long, a first that is evicted, more
    than K codes; guided halves that differ, a null class of a wrong id. The codes must be what the
    same noise draws from the logits of a whole masked pass."""
    gpt, labels = small_gpt(**settings), torch.arange(6) % 4
    codes, _ = sample_codes(gpt, labels, cfg=cfg, keep=keep)
    sub_bits = gpt.config.sub_bits
    noise = torch.stack([torch.rand(gpt.config.length, len(sub_bits), generator=seeded(0, i))
                         for i in range(6)])
    cond, uncond = (full_logits(gpt, codes, l, keep) for l in (labels, torch.full_like(labels, 3)))
    for s, sub in enumerate(split_codes(codes, sub_bits).unbind(-1)):
        logits = uncond[s] + cfg * (cond[s] - uncond[s])
        drawn = draw(logits.flatten(0, 1), noise[..., s].flatten())
        assert torch.equal(drawn, sub.flatten())

@pytest.mark.parametrize("window", [0, 1, 4, 64])
def test_compact_cache_is_small(window):
    """A cache that grows with L."""
    gpt = small_gpt(mode="mergear", window=window, length=64)
    assert gpt.new_cache(6, 4).keys[0].shape[1] == 2 + 4 + min(window + 1, 64)

def test_compact_cache_is_seen_as_far_as_it_can_be_in_use():
    """A part that never grows, or that ends before the last first position."""
    cache = small_gpt(mode="mergear", window=4, length=144, keeps=(100,)).new_cache(1, 100)
    assert cache.limit(1) == 64 - cache.ring and cache.visible == 64
    assert cache.limit(60) == cache.forever and cache.visible == cache.rows == 107

def test_queries_and_keys_turn():
    """A rotation that only one of them gets, or the values too: in training as in decoding."""
    gpt, seen = small_gpt(mode="raster"), []
    x, rope = torch.randn(1, 5, gpt.config.width), rope_table(gpt.config, "cpu")[:, :5]

    def attend(*qkv):
        seen.append(qkv)
        return qkv[2]

    for turn in (None, rope):
        gpt.blocks[0](x, attend, turn)
    (q, k, v), turned = seen
    for a, b in zip(turned, (rotate(q, *rope), rotate(k, *rope), v)):
        torch.testing.assert_close(a, b)

@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (1, 1, 2), (1, 3), (1, 2, 1)])
def test_parallel_steps_equal_the_full_forward(counts, monkeypatch):
    """Wrong rows, angles or masks in the cache: n codes asked for at once each see all pairs
    before them and not the other n - 1; so do the positions after the last of them. One call a
    step. Teacher-forced by the draws."""
    gpt, labels = small_gpt(mode="randar"), torch.arange(6) % 3
    seen, asked = [], []
    head = gpt.head

    def record(h, subs):
        asked.append(head(h, subs)[0])
        return head(h, subs)

    monkeypatch.setattr(gpt, "head", record)
    gpt.position_head.register_forward_hook(lambda m, i, out: seen.append(out))
    big = torch.full((6, len(counts), 16), 0.5)
    drawn, at = mergear.sample_parallel(gpt, labels, 4, torch.rand(6, 4, 1), big, counts,
                                        [1.0] * len(counts), {}, 1.0)
    monkeypatch.undo()
    positions, logits, known = seen[:], asked[:], 0  # what follows is recorded too
    assert len(logits) == len(counts) and len(positions) == len(counts) - 1
    for s, n in enumerate(counts):
        for j in range(n):  # the sequence in which code `known + j` comes next
            rest = [i for i in range(known, 4) if i != known + j]
            turn = [*range(known), known + j, *rest]
            full, next_position = gpt(drawn[:, turn], labels, 4, first=at[:, turn])
            assert torch.allclose(logits[s][:, j], full[0][:, known], atol=1e-4), (s, j)
        if s + 1 < len(counts):  # j is the last instruction of the step
            assert torch.allclose(positions[s], next_position[:, known], atol=1e-4)
        known += n

def test_rotary_angles():
    """A base that hardly turns on the grid, rows taken for columns. Four pairs: two for each."""
    config = GPTConfig(mode="randar", length=16, width=32, heads=4)
    cos, sin = rope_table(config, torch.device("cpu"))
    angle = torch.atan2(sin[:, 4:], cos[:, 4:])  # (P+L,D/h/2)
    assert not angle[:2].any()
    for position in range(16):
        row, column = divmod(position, 4)
        expected = torch.tensor([row, row / 2, column, column / 2])  # 4^(-1/2) is 1/2
        assert torch.allclose(angle[2 + position], expected, atol=1e-5)

def test_pairs_know_their_grid_position_only():
    """Angles or embeddings that tell the place in the sequence. A pair has the angles of raster
    mode, and with one block it says what it says wherever it stands before."""
    gpt, used = small_gpt(mode="randar", depth=1), []
    gpt.blocks[0].register_forward_pre_hook(lambda module, inputs: used.append(inputs[2]))
    codes, first = torch.tensor([[5, 3, 9, 7]]), torch.tensor([[0, 9, 5, 12]])
    found = [gpt(codes[:, turn], torch.tensor([1]), 4, first=first[:, turn])[0][0]
             for turn in ([0, 1, 2, 3], [2, 0, 1, 3], [1, 2, 0, 3])]
    raster = rope_table(GPTConfig(mode="raster", length=16, width=32, heads=2), first.device)
    rows = [0, 0, 1, 1, 10, 10, 6, 6, 13]  # raster has 1 prefix row
    assert torch.equal(used[0][:, 0, 0], raster[:, rows])
    for logits in found[1:]:
        torch.testing.assert_close(logits[:, 3], found[0][:, 3])
    assert not torch.allclose(found[0][:, 2], found[1][:, 2], atol=1e-2)

# sequences and sampling

def test_sequence_of_randar():
    """Codes by order and positions by token, or the other way round; an order without 0 first."""
    source = torch.tensor([[0, 1, 0, 2], [0, 1, 2, 2]]).repeat_interleave(4, dim=1)  # (2,16)
    codes = torch.tensor([[5, 3, 9], [7, 7, 1]]).gather(1, source)
    config = GPTConfig(mode="randar", length=16)
    order = torch.tensor([[0, 2, 1], [0, 1, 2]])
    inputs, rest = sequence(config, codes, source, 3, order)
    assert inputs.tolist() == [[5, 9, 3], [7, 7, 1]]
    assert rest["first"].tolist() == [[0, 12, 4], [0, 4, 8]]
    orders = draw_orders(500, 4, seeded(0))
    assert (orders[:, 0] == 0).all() and (orders.sort(1).values == torch.arange(4)).all()
    assert len({tuple(row) for row in orders.tolist()}) == 6

@pytest.mark.parametrize("keep, steps", [(4, 2), (4, 4), (16, 5)])
def test_positions_are_drawn_once(keep, steps):
    """A position drawn twice, 0 missing, positions that are not sorted with their codes."""
    gpt = small_gpt(mode="randar", keep=keep)
    _, first = sample_codes(gpt, torch.arange(200) % 3, cfg=2.0, steps=steps,
                            position_temperature=1.0)
    assert (first[:, 0] == 0).all() and (first.diff(dim=1) > 0).all()
    assert len(first.unique(dim=0)) > 20 or keep == 16

@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_gumbel_top_n_is_sequential_sampling(temperature):
    """Noise of the wrong sign: two positions at once must have the law of two draws in turn.
    A temperature that divides the noise too."""
    gpt = small_gpt(mode="randar", keep=3, keeps=(3,), num_classes=0)
    zero = torch.zeros(1, 3, dtype=torch.long)
    logits = gpt(zero, zero[0, :1], 3, first=torch.tensor([[0, 1, 2]]))[1][0, 0]
    logits[0] = -math.inf
    p = (logits / temperature).softmax(-1)
    expected = p + p * ((p / (1 - p)).sum() - p / (1 - p))  # drawn first, or second
    _, first = sample_codes(gpt, torch.zeros(4000, dtype=torch.long), steps=2,
                            position_temperature=temperature)
    share = torch.bincount(first[:, 1:].flatten(), minlength=16) / 4000
    assert torch.allclose(share, expected, atol=0.03)

@pytest.mark.parametrize("mode", MODES)
def test_cfg_one_is_the_conditional_model(mode):
    """cfg 1.0 that runs the null class too; codes that are not the model's most likely."""
    gpt, labels, rows = small_gpt(mode=mode), torch.arange(16) % 3, []
    gpt.blocks[0].register_forward_hook(lambda m, i, out: rows.append(len(out)))
    steps = 4 if mode == "randar" else None
    plain, _ = sample_codes(gpt, labels, temperature=0, steps=steps)
    assert set(rows) == {16} and len(rows) == (steps or gpt.config.prefix + 15)
    rows.clear()
    guided, _ = sample_codes(gpt, labels, cfg=2.0, temperature=0, steps=steps)
    assert set(rows) == {32} and not torch.equal(plain, guided)

class Recorder(TorchDispatchMode):
    """What a CUDA graph does: the operations of one call, again on the same memory."""
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, outs in self.calls:
            new = function(*args, **kwargs)
            for a, b in zip(tree_leaves(outs), tree_leaves(new)):
                if a.data_ptr() != b.data_ptr():  # else a view, or written in place
                    a.copy_(b)

@pytest.mark.parametrize("mode", ("raster", "mergear"))
def test_a_recorded_step_is_any_step(mode, monkeypatch):
    """A step number or a choice that Python holds, which a replayed CUDA graph repeats."""
    gpt = small_gpt(mode=mode, length=144)  # raster attends to 64, 128, then 144 rows
    labels = torch.arange(3)
    expected = sample_codes(gpt, labels, cfg=2.0)[0]
    recorded = []

    def repeat(step, times, device):
        with Recorder() as recorder:
            step()
        for _ in range(times - 1):
            recorder.replay()
        recorded.append(times)

    monkeypatch.setattr(mergear, "repeat", repeat)
    assert torch.equal(sample_codes(gpt, labels, cfg=2.0)[0], expected)
    assert max(recorded) > 10

@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("mode", ("raster", "mergear"))
def test_cuda_graphs_change_nothing(mode, monkeypatch):
    """The same with real graphs."""
    gpt, labels = small_gpt(mode=mode).cuda(), torch.arange(3)
    replayed = sample_codes(gpt, labels, cfg=2.0)[0]
    monkeypatch.setattr(mergear, "repeat", lambda step, n, device: [step() for _ in range(n)])
    assert torch.equal(sample_codes(gpt, labels, cfg=2.0)[0], replayed)

@pytest.mark.parametrize("mode", MODES)
def test_cfg_schedule(mode, monkeypatch):
    """A schedule that starts at full scale, or does not end there."""
    gpt, scales = small_gpt(mode=mode), []
    monkeypatch.setattr(mergear, "guide", lambda x, cfg: scales.append(cfg) or guide(x, cfg))
    sample_codes(gpt, torch.arange(3), cfg=3.0, cfg_schedule="linear")
    n = 4 if mode == "randar" else 16
    expected = [1 + 2 * (i + 1) / n for i in range(n)]
    expected = [1.0] * (mode == "mergear") + expected  # its prefix draws too: not used
    assert sorted({float(x) for x in scales}) == pytest.approx(expected)

def test_arccos_steps():
    """A schedule that loses codes or has idle steps; the paper's 64 of 144 and 88 of 256."""
    for keep in (1, 7, 36, 256):
        for steps in range(min(2, keep), keep + 1):
            counts = mergear.arccos_steps(keep, steps)
            assert len(counts) == steps and sum(counts) == keep and min(counts) >= 1
    assert len(mergear.arccos_steps(144)) == 64 and len(mergear.arccos_steps(256)) == 88

def test_draw_has_the_right_distribution():
    """A distribution function that is off by one; a filter that leaves the wrong entries."""
    logits = torch.tensor([0.1, 0.2, 0.0, 0.4, 0.3]).log().expand(10_000, 5)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for flags, expected in ((dict(), [0.1, 0.2, 0.0, 0.4, 0.3]),
                            (dict(top_k=2), [0, 0, 0, 4 / 7, 3 / 7]),
                            (dict(top_p=0.75), [0, 2 / 9, 0, 4 / 9, 3 / 9]),
                            (dict(temperature=0.5), [1 / 30, 4 / 30, 0, 16 / 30, 9 / 30]),
                            (dict(temperature=0), [0, 0, 0, 1.0, 0])):
        share = torch.bincount(draw(logits, u, **flags), minlength=5) / 10_000
        assert torch.allclose(share, torch.tensor(expected), atol=1e-3), flags
    ends = torch.tensor([0.0, 1 - 2.0 ** -24])
    possible = torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]] * 2)
    assert draw(possible, ends).tolist() == [1, 2]

@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_read_back_from_the_device(mode):
    """A value read back, or a CPU tensor mixed in, in a training step or a decoding: on the meta
    device both raise."""
    with torch.device("meta"):
        gpt = GPT(GPTConfig(mode=mode, width=32, heads=2, depth=1, bits=11, length=16, keep=4,
                            keeps=(4,)))
        codes = torch.empty(2, 16, dtype=torch.long)
        order = torch.empty(2, 4, dtype=torch.long)
        inputs, rest = sequence(gpt.config, codes, codes, 4, order)
        dropped = torch.empty(inputs.shape, dtype=torch.bool)
    logits, positions = gpt(inputs, codes[:, 0], **rest, dropped=dropped)
    loss = code_losses(logits, inputs, gpt.config.sub_bits, 0.1)[0].mean()
    if mode == "randar":
        loss = loss + position_losses(positions, rest["first"])[0].mean()
    loss.backward()
    assert all(p.grad is not None for p in gpt.parameters())  # and no parameter is forgotten
    codes, first = sample_codes(gpt.eval(), torch.zeros(2, dtype=torch.long), cfg=2.0)
    assert codes.is_meta and first.shape == codes.shape == (2, 4 if mode == "randar" else 16)

# training and the code cache

def test_checkpoint_is_enough_to_sample(place):
    """A checkpoint that needs another file, or returns raw weights for the averaged ones."""
    saved, _ = train(place, "whole")
    gpt, tokenizer = load_generator(place / "whole/ckpt.pt")
    assert not gpt.training and not tokenizer.training
    assert not difference(dict(gpt.state_dict()), dict(saved["ema"]))
    assert difference(saved["model"], saved["ema"])
    assert tuple(gpt.config.class_names) == ("a", "b") and gpt.config.keeps == (4, 6, 16)
    images = mergear.draw_images(gpt, tokenizer, torch.tensor([0, 1]), 4, cfg=2.0)
    assert images.shape == (2, 3, 8, 8)
    assert os.path.exists(place / "whole/samples_0000000.png")  # step 0 is drawn too

def test_division_changes_nothing(place):
    """Accumulation that scales wrongly; ranks that see the same images or draw their own K."""
    settings = dict(max_steps=2, mode="randar")
    one, a = train(place, "one", **settings)
    parts, b = train(place, "parts", **settings, accum=4)
    two_ranks(f"{ROOT}/mergear.py", flags(place, "two", **settings, cache=place / "others"))
    two, c = read(place / "two")
    assert close(one["model"], parts["model"]) and close(one["model"], two["model"])
    # AdamW would hide a wrong scale
    norms = [next(row["grad_norm"] for row in rows if "grad_norm" in row) for rows in (a, b, c)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-3)
    for name in ("val_bits", "val_position_bits"):
        assert a[-1][name] == pytest.approx(c[-1][name], abs=1e-3)
    made, = (place / "others").iterdir()
    assert made.read_bytes() == (place / "codes" / made.name).read_bytes()

@pytest.fixture(scope="module")
def cached(place):
    """A generator, its tokenizer and their code cache: 8 views in blocks of one K."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mergear, "BLOCK", 8)
        train(place, "cached", views=8, max_steps=1, cache=place / "eight")
        gpt, tokenizer = load_generator(place / "cached/ckpt.pt")
        run = mergear.start_run(dataclasses.replace(gpt.config, device="cpu"))
        images = build_dataset(tokenizer.config.data, "train", 8, train=True)
        codes = mergear.open_codes(images, tokenizer, gpt.config, run, 8, True)
    assert len(list((place / "eight").iterdir())) == 1  # found again
    return gpt, tokenizer, run, images, codes

def test_code_cache_holds_what_the_tokenizer_says(cached):
    """Codes stored before recovery, rows of the wrong image or K; a K that only one class sees."""
    _, tokenizer, _, images, (table, keeps) = cached
    codes, source, labels = table[:, :16], table[:, 16:32], table[:, 32]
    assert len(images) == 24 and len(table) == len(keeps) == 192
    assert (keeps[:24] == 6).all() and set(keeps.tolist()) == {4, 6, 16}
    wanted = []
    for i in range(24):
        image, label = images[View(i, 0)]
        found, true, *_ = tokenizer.encode(image[None], 6)
        wanted.append((found.gather(1, true)[0].tolist(), true[0].tolist(), label))
    rows = zip(*(column[:24].tolist() for column in (codes, source, labels)))
    assert sum(row in wanted for row in rows) >= 20  # a bit near 0 may flip by rounding
    assert 0 < labels[:8].sum() < 8  # one block holds both classes
    assert [len(set(row)) for row in source.tolist()] == keeps.tolist()

def test_a_training_batch_has_one_merge_count(cached):
    """Steps that mix K, ignore the drawn K, or depend on how a batch is divided."""
    gpt, tokenizer, run, _, codes = cached

    def stream(step, sample_k=True, rank=0, world=1):
        part = run._replace(rank=rank, world=world)
        return mergear.code_batches(*codes, tokenizer.config, gpt.config, part, step, sample_k)

    whole, kept = stream(0), []
    for step in range(20):
        *batch, keep = next(whole)
        kept.append(keep)
        assert all(len(row.unique()) == keep for row in batch[1])
        halves = [next(stream(step, True, rank, 2)) for rank in (0, 1)]
        for a, b, column in zip(*halves, batch):
            assert torch.equal(torch.cat([a, b]), column)
    assert len(set(kept)) > 1 and kept.count(6) > 8
    assert {next(stream(step, False))[-1] for step in range(9)} == {6}

def test_code_caches_are_told_apart(place):
    """Training on another tokenizer's codes, on moved images, on K drawn otherwise; codes that
    are made again."""
    cache, settings = place / "shared", dict(max_steps=1, views=8, cache=place / "shared")
    save_tokenizer(place / "other.pt", seed=1, **settings_of(place))
    moved = place / "images/train/a/0.png"

    def files_after(name, **flags):
        train(place, name, **settings, **flags)
        return {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}

    first = files_after("first")
    assert len(first) == 1 and files_after("again", mode="randar") == first
    assert len(files_after("second", tokenizer=place / "other.pt")) == 2
    assert len(files_after("third", mode="raster")) == 3
    assert len(files_after("seeded", mode="raster", seed=1)) == 4
    os.rename(moved, place / "images/train/b/moved.png")
    assert len(files_after("fourth")) == 5
    os.rename(place / "images/train/b/moved.png", moved)

def test_unlabelled_images(place):
    """Class ids out of range without classes: the null class is then id 0, the only one."""
    train(place, "run", max_steps=1, labels=False)
    gpt, _ = load_generator(place / "run/ckpt.pt")
    assert gpt.null_class == 0 and len(gpt.class_embed.weight) == 1
    assert sample_codes(gpt, torch.zeros(2, dtype=torch.long))[0].shape == (2, 16)
