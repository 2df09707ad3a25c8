"""Tests of tokenizer.py: one property each. A docstring names the bug that its test catches."""

import contextlib
import copy
import functools
import math
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZE_16, random_images, two_ranks
from kills import ROOT, TOKENIZER, command, difference, read, write_images

import tokenizer
from data import Run, batches, build_dataset, seeded
from tokenizer import (VARIANTS, BitNorm, MergeVQ, TokenizerConfig, align_loss, bit_balance,
                       bits_to_codes, canonical_source, codes_to_bits, first_position_of_token,
                       keep_distribution, lfq_entropy, match_tokens, merge_schedule, merge_tokens,
                       psnr, quantise, sample_keep, unmerge)

# A tokenizer that trains a step in milliseconds, with the paper's weights
SMALL = dict(TOKENIZER, **SIZE_16, w_rec=1.0, w_perceptual=0.7, w_disc=0.8, w_entropy=0.1,
             w_recovery=0.5, beta1=0.5, beta2=0.9)
RUN = Run(0, 1, torch.device("cpu"), torch.float32)

def small_config(**changes):
    return TokenizerConfig(**{**SMALL, **changes})

def small_model(dtype=torch.float32, seed=0, **changes):
    """A MergeVQ in eval mode with random parameters, so that no branch is switched off."""
    torch.manual_seed(seed)
    model = MergeVQ(small_config(**changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.to(dtype).eval()

# LFQ

def brute_force_entropy(z, tau):
    """lfq_entropy as the paper writes it: a softmax over all 2^d codes."""
    d = z.shape[-1]
    codebook = codes_to_bits(torch.arange(2 ** d), d).to(z)                # (V,d)
    log_p = (2 * z.reshape(-1, d) @ codebook.T / tau).log_softmax(-1)      # (N,V)
    p = log_p.exp()
    return -(p * log_p).sum(-1).mean(), torch.special.entr(p.mean(0)).sum()

@pytest.mark.parametrize("d", range(1, 11))
def test_entropy_equals_brute_force(d):
    """A wrong factorisation: sigmoid(2z), halves swapped, odd d, a sum that should be a mean."""
    for tau in (0.3, 1.0, 2.5):
        z = torch.randn(3, 7, d, dtype=torch.float64, generator=seeded(d), requires_grad=True)
        for fast, slow in zip(lfq_entropy(z, tau), brute_force_entropy(z, tau)):
            torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-12)
            a, b = (torch.autograd.grad(h, z, retain_graph=True)[0] for h in (fast, slow))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())

@pytest.mark.parametrize("scale", (0.0, 1.0, 1e2, 1e4))
def test_entropy_is_finite_and_small(scale):
    """0 log 0 = nan where a sigmoid saturates: the loss is NaN at the first confident bit. Or the
    (N, 2^d) matrix: 4 GB at N = 4,096 and d = 18."""
    z = torch.randn(4096, 18, generator=seeded(0)).sign() * scale
    z.requires_grad_()
    sizes = []

    def note(x):
        sizes.append(x.nbytes)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        per_sample, codebook = lfq_entropy(z, 1.0)
    gradient, = torch.autograd.grad(per_sample - codebook, z)
    assert gradient.isfinite().all() and 0 < sum(sizes) < 150e6
    for entropy in (per_sample, codebook):
        assert -1e-3 <= entropy <= 18 * math.log(2) + 1e-3

def test_bits_and_codes_are_inverse():
    """Bit order or an off-by-one in the shift: decode would draw other codes than encode chose."""
    codes = torch.arange(2 ** 10)
    bits = codes_to_bits(codes, 10)
    assert bits.shape == (1024, 10) and set(bits.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(bits_to_codes(bits), codes)
    assert codes_to_bits(torch.tensor(5), 4).tolist() == [1, -1, 1, -1]  # bit j is worth 2^j
    large = torch.tensor([[0, 2 ** 24 - 1], [123456, 2 ** 23]])
    assert torch.equal(bits_to_codes(codes_to_bits(large, 24)), large)

def test_quantise_is_straight_through():
    """A sign without gradient: the encoder would not learn. And 0 counts as -1, as in codes."""
    z = torch.tensor([-2.0, -0.1, 0.0, 0.3, 5.0], requires_grad=True)
    q = quantise(z)
    torch.testing.assert_close(q.detach(), torch.tensor([-1.0, -1, -1, 1, 1]))
    (q * torch.arange(5.0)).sum().backward()
    assert torch.equal(z.grad, torch.arange(5.0))
    assert bits_to_codes(z.detach()).item() == bits_to_codes(q.detach()).item() == 0b11000

def test_bit_norm():
    """Batch statistics in evaluation: an image's codes would depend on its neighbours. Unbalanced
    bits in training: collapse. Statistics written by a forward pass."""
    norm = BitNorm(8, True)
    z = torch.randn(64, 32, 8, generator=seeded(0)) * torch.linspace(0.5, 3, 8)
    z = z + torch.linspace(-20, 20, 8)
    y, stats = norm.train()(z)
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(y.square().mean((0, 1)), torch.ones(8), rtol=0, atol=1e-2)
    torch.testing.assert_close(stats, torch.stack([z.mean((0, 1)), z.var((0, 1))]), rtol=1e-3,
                               atol=1e-3)
    assert torch.equal(norm.stats, torch.stack([torch.zeros(8), torch.ones(8)]))
    norm.stats.copy_(stats)
    torch.testing.assert_close(norm.eval()(z)[0], y, rtol=0, atol=1e-2)
    torch.testing.assert_close(norm(z)[0][:1], norm(z[:1])[0])
    torch.testing.assert_close(BitNorm(8, False).train()(z)[0], z, rtol=1e-5, atol=0)

def test_bit_balance():
    """Bits counted in another order than in the codes."""
    codes = torch.randint(0, 200, (5, 30), generator=seeded(0))  # bit 8 of 9 is never set
    on = (codes_to_bits(codes, 9) > 0).float().mean((0, 1))
    imbalance, constant = bit_balance(torch.bincount(codes.flatten(), minlength=512), 9)
    assert imbalance.item() == pytest.approx((on - 0.5).abs().max().item())
    assert constant.item() == 1

# Token merging

def slow_merge(metric, x, size, r):
    """The four steps of ToMe for one image, with loops -> new_index, x, size as lists."""
    N = len(metric)
    A, B = range(2, N, 2), range(1, N, 2)
    pairs = []
    for a in A:
        cosine = {b: F.cosine_similarity(metric[a], metric[b], dim=0).item() for b in B}
        b = max(B, key=cosine.get)
        pairs.append((cosine[b], a, b))
    pairs.sort(key=lambda pair: -pair[0])
    into = {a: b for _, a, b in pairs[:r]}
    groups = {i: [i] for i in range(N) if i not in into}
    for a, b in into.items():
        groups[b].append(a)
    new_index, merged, sizes = [0] * N, [], []
    for new, old in enumerate(sorted(groups)):
        for member in groups[old]:
            new_index[member] = new
        total = sum(size[m].item() for m in groups[old])
        merged.append(sum(x[m] * size[m] for m in groups[old]) / total)
        sizes.append(total)
    return new_index, torch.stack(merged), sizes

@pytest.mark.parametrize("N", [17, 18])
def test_merging_equals_a_slow_loop(N):
    """Wrong parity, a class token that merges, unweighted means, a wrong choice of the r pairs."""
    g = seeded(N)
    metric, x = torch.randn(3, N, 6, generator=g), torch.randn(3, N, 5, generator=g)
    size = torch.randint(1, 9, (3, N), generator=g).float()
    most = (N - 1) // 2
    for r in (1, most // 2, most):
        new_index = match_tokens(metric, r)
        y, new_size = merge_tokens(x, size, new_index, r)
        for b in range(3):
            slow_index, slow_x, slow_size = slow_merge(metric[b], x[b], size[b], r)
            assert new_index[b].tolist() == slow_index
            torch.testing.assert_close(y[b], slow_x)
            assert new_size[b].tolist() == slow_size

def test_matching_is_in_float32():
    """Under autocast the scores of matching round to bfloat16, and half of the best ones tie."""
    metric = torch.randn(4, 65, 24, generator=seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        half = match_tokens(metric, 20)
    assert torch.equal(half, match_tokens(metric, 20))

def test_a_token_is_the_mean_of_its_positions():
    """Indices of the blocks composed the wrong way round, the class token's offset forgotten,
    tokens numbered unlike their vectors, means without sizes. With all branches of the blocks off,
    a merged token is the mean of the CNN's outputs over its region."""
    model, images = small_model(bit_norm=False), random_images(4)
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.scale1.zero_()
            block.scale2.zero_()
        encoded = model.encode(images, 16)
        positions = model.encoder.stem(images).flatten(2).transpose(1, 2)  # (B,L,D)
        S = F.one_hot(encoded.source).float()                              # (B,L,K)
        means = S.transpose(1, 2) @ positions / S.sum(1)[..., None]
        expected = model.encoder.to_bits(model.encoder.norm(means))
    torch.testing.assert_close(encoded.z, expected, rtol=0, atol=1e-4)
    for row, first in zip(encoded.source.tolist(), first_position_of_token(encoded.source)):
        assert list(dict.fromkeys(row)) == list(range(16)), "not by first position"
        assert first.tolist() == [row.index(k) for k in range(16)]

@pytest.mark.parametrize("variant", VARIANTS)
def test_schedule(variant):
    """A schedule that misses the sum by rounding, asks for more than half of the tokens, or is
    not the decreasing square."""
    config = TokenizerConfig(**VARIANTS[variant])
    L, depth = config.length, config.depth
    squares = [(depth - i) ** 2 for i in range(depth)]
    for keep in (*keep_distribution(config)[0], L, L - 1):
        schedule = merge_schedule(L, keep, depth)
        assert len(schedule) == depth and sum(schedule) == L - keep
        left = L
        for i, r in enumerate(schedule):
            assert 0 <= r <= left // 2
            left -= r
            aim = (L - keep) * sum(squares[:i + 1]) / sum(squares)
            assert r == (left + r) // 2 or abs(L - left - aim) <= 0.5

def test_proportional_attention():
    """log s left out: a merged token must weigh as much as the tokens that it stands for."""
    block = small_model(torch.float64).encoder.blocks[0]
    x = torch.randn(2, 5, 16, dtype=torch.float64, generator=seeded(0))
    source = torch.tensor([[0, 1, 1, 2, 3, 3, 3, 4], [0, 0, 0, 1, 2, 3, 4, 4]])
    size = F.one_hot(source).sum(1).double()                               # (B,K)
    merged, full = block(x, size)[0], block(unmerge(x, source))[0]
    torch.testing.assert_close(unmerge(merged, source), full, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(block(x)[0], merged), "sizes make no difference"

# The model

def test_codes_and_source_are_all_that_decode_needs():
    """Hidden state: a map left on the module by encode, a buffer that a forward pass changes."""
    model = small_model()
    fresh = copy.deepcopy(model)
    encoded = model.encode(random_images(3))
    images = model.decode(encoded.codes, encoded.source)
    model.encode(random_images(3, seed=1))  # other images in between change nothing
    model.train()(random_images(3), 25)
    for other in (model.eval(), fresh):
        assert torch.equal(other.decode(encoded.codes, encoded.source), images)
    assert not difference(model.state_dict(), fresh.state_dict())

def test_nothing_depends_on_the_batch():
    """A statistic over the batch in eval mode: an image's codes would depend on its neighbours."""
    images = random_images(6).double()
    model, model32 = small_model(torch.float64), small_model()  # no bit hangs on rounding
    together = model.encode(images)
    first = first_position_of_token(together.source)
    decoded = model32.decode(together.codes, together.source)
    recovered = model32.recover(together.codes, first)
    for rows in ([0], [3, 1], [5, 4, 3, 2, 1, 0]):
        alone = model.encode(images[rows])
        assert torch.equal(alone.codes, together.codes[rows])
        assert torch.equal(alone.source, together.source[rows])
        again = model32.decode(alone.codes, alone.source)
        torch.testing.assert_close(again, decoded[rows], rtol=0, atol=1e-5)
        assert torch.equal(model32.recover(alone.codes, first[rows]), recovered[rows])

def test_recovered_source_is_possible():
    """A token before its first position, or one that no position gets. At K = L there is nothing
    to recover, whatever the codes are."""
    model = small_model()
    for keep in (16, 25, 64):
        encoded = model.encode(random_images(3), keep)
        first = first_position_of_token(encoded.source, keep)
        source = model.recover(torch.randint(0, 64, (3, keep)), first)
        assert torch.equal(canonical_source(source, keep), source)
        assert torch.equal(first_position_of_token(source, keep), first)
    assert torch.equal(source, torch.arange(64).expand(3, -1))
    assert torch.equal(source, encoded.source)  # nothing merges
    logits = model.recovery(codes_to_bits(encoded.codes[:, :1], 6), first[:, :1])
    assert logits.isfinite().all()  # of a single token, all positions may be its own

def test_contracts_of_the_paper_variants():
    """A layer too many or too few: the parameter counts identify the authors' networks."""
    expected = dict(g=(62.33, 82.85), gr=(62.67, 83.37), r=(85.7, 83.37))
    for variant, counts in expected.items():
        config = TokenizerConfig(**VARIANTS[variant])
        with torch.device("meta"):
            parts = tokenizer.Encoder(config), tokenizer.Decoder(config)
        for part, millions in zip(parts, counts):
            found = sum(p.numel() for p in part.parameters()) / 1e6
            assert found == pytest.approx(millions, rel=0.005), variant

def training_loss(model, images, keep=25):
    """A loss in which every output of the model has a part."""
    out = model(images, keep)
    recovery = F.cross_entropy(out.recovery.flatten(0, 1), out.source.flatten())
    pixel = F.mse_loss(out.images, images)
    return pixel + lfq_entropy(out.z)[0] + out.align.square().mean() + recovery

@pytest.mark.parametrize("changes", ({}, dict(bit_norm=False), dict(patch=2)))
def test_every_parameter_is_trained(changes):
    """A parameter that is unused, behind a detach, or cannot change the loss: a bias of keys, or
    of bits before BitNorm, has rounding noise for a gradient."""
    model = small_model(**changes).train()
    training_loss(model, random_images(4)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        assert p.grad.abs().max() > 1e-6, f"{name} cannot change the loss"

@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_norm_groups_is_group_norm(dtype, most):
    """Statistics in bfloat16, scale and shift of the wrong image, an output that is not
    channels_last, or of another type."""
    norm = torch.nn.GroupNorm(4, 12)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (torch.randn(3, 12, 6, 6, generator=seeded(0)) * 3 + 5).to(dtype)
    y = tokenizer.norm_groups(x, 4, norm.weight[None], norm.bias[None], silu=True)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.float(), F.silu(norm(x.float())), atol=most, rtol=most)
    scale, shift = torch.randn(2, 3, 12, generator=seeded(1))
    expected = F.group_norm(x.float(), 4) * scale[..., None, None] + shift[..., None, None]
    y = tokenizer.norm_groups(x, 4, scale, shift, silu=False)
    torch.testing.assert_close(y.float(), expected, atol=most, rtol=most)

def test_adaptive_weight_is_the_ratio_at_the_last_layer():
    """Gradients at another layer, their ratio upside down: against two whole backward passes."""
    model = small_model().train()
    out, last = model(random_images(4), 25), model.decoder.conv_out.weight
    losses = out.images.square().mean(), out.images.abs().sqrt().mean()
    weight = tokenizer.adaptive_weight(*losses, last)
    norms = []
    for loss in losses:
        model.zero_grad()
        loss.backward(retain_graph=True)
        norms.append(last.grad.norm())
    torch.testing.assert_close(weight, norms[0] / (norms[1] + 1e-4))

def test_gradient_checkpointing_changes_nothing():
    """Recomputed blocks that merge other tokens than the first time, or a skipped gradient."""
    gradients = []
    for grad_ckpt in (False, True):
        model = small_model(grad_ckpt=grad_ckpt).train()
        training_loss(model, random_images(4)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)

@pytest.mark.parametrize("views", ["grey", "color"])
def test_step_on_a_meta_device(monkeypatch, views):
    """A value read back from the device, or a CPU tensor mixed in: a GPU would stop or wait. No
    data exists on `meta`, so either raises."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **more: contextlib.nullcontext())
    meta = torch.device("meta")
    with meta:
        model = MergeVQ.__new__(MergeVQ)
        model.init_weights = lambda: None
        model.__init__(small_config(align_views=views))
        images = torch.empty(4, 3, 16, 16)
        labels = torch.empty(4, dtype=torch.long)
        discriminator = tokenizer.Discriminator(small_config())
    model.train()
    draws = torch.empty(4, 2, tokenizer.AUGMENT_DRAWS, device=meta)
    view, teacher = tokenizer.teacher_outputs(model.config, RUN, model, None, images, 25, draws)
    out = model(images, 25, view)
    pixel, gan = F.mse_loss(out.images, images), -discriminator(out.images).mean()
    loss = pixel + F.cross_entropy(out.recovery.flatten(0, 1), out.source.flatten())
    loss = loss + align_loss("ema", out.align, teacher, labels) + sum(lfq_entropy(out.z))
    balance = tokenizer.adaptive_weight(pixel, gan, model.decoder.conv_out.weight)
    (loss + balance * gan).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.decode(bits_to_codes(out.z), out.source).device == meta

def test_keep_is_drawn_as_in_the_paper():
    """A.3: 2 exp(-2 i) + 0.1 for G; exp(-i^2 / (2 * 0.5^2)) + 0.05 for G+R; i = 0 at the target."""
    candidates, p = keep_distribution(TokenizerConfig(**VARIANTS["g"]))
    at = candidates.index(256)
    assert p[at + 1] / p[at] == pytest.approx((2 * math.exp(-2) + 0.1) / 2.1)
    assert keep_distribution(small_config(keep_sampling="fixed"))[1].tolist() == [0, 1, 0]
    config = TokenizerConfig(**VARIANTS["gr"])
    candidates, p = keep_distribution(config)
    assert candidates == [121, 144, 169, 196, 225, 256]
    weights = [math.exp(-i * i / 0.5) + 0.05 for i in (-1, 0, 1, 2, 3, 4)]
    assert p.tolist() == pytest.approx([w / sum(weights) for w in weights])
    draws = [sample_keep(config, step) for step in range(3000)]
    assert draws == [sample_keep(config, step) for step in range(3000)]
    for candidate, share in zip(candidates, p.tolist()):
        assert abs(draws.count(candidate) / 3000 - share) < 0.04, candidate
    config.seed = 8
    assert draws != [sample_keep(config, step) for step in range(3000)]

def test_align_is_equation_10():
    """Student and teacher swapped, a temperature on one side only, a mean over channels."""
    student = torch.randn(6, 20, generator=seeded(0), dtype=torch.float64) * 8
    teacher = torch.randn(6, 20, generator=seeded(1), dtype=torch.float64) * 8
    student.requires_grad_()
    loss = align_loss("dinov2", student, teacher, None)
    target, log_q = (teacher / 4).softmax(-1), (student / 4).log_softmax(-1)
    torch.testing.assert_close(loss, 16 * F.kl_div(log_q, target, reduction="batchmean"))
    equation = -16 * (target * log_q).sum(-1).mean()
    a, b = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, equation))
    torch.testing.assert_close(a, b)

def test_align_of_two_views():
    """A row compared with the image of another rank, a temperature or a norm left out."""
    student, teacher = torch.randn(2, 6, 20, generator=seeded(0), dtype=torch.float64)
    logits = [[F.cosine_similarity(x, y, 0) / 0.1 for y in teacher] for x in student]
    losses = -torch.tensor(logits, dtype=torch.float64).log_softmax(1).diag()
    torch.testing.assert_close(align_loss("ema", student, teacher, None), losses.mean())
    second = align_loss("ema", student[3:], teacher, None, rank=1)  # of two ranks
    torch.testing.assert_close(second, losses[3:].mean())
    assert align_loss("ema", student, student, None) < losses.mean()

def test_teacher_and_student_see_two_views():
    """One view for both, another kind of view than the flag's, draws of another image."""
    config, images = small_config(align_views="grey"), random_images(4)
    draws = torch.rand(4, 2, tokenizer.AUGMENT_DRAWS, generator=seeded(0))
    ema = SimpleNamespace(align=lambda x, keep: x)
    view, seen = tokenizer.teacher_outputs(config, RUN, ema, None, images, 25, draws)
    assert torch.equal(seen, tokenizer.augment(images, draws[:, 0], "grey"))
    assert torch.equal(view, tokenizer.augment(images, draws[:, 1], "grey"))
    config.align = "dinov2"  # knows photographs only
    dinov2 = lambda x, keep: (None, None, x, None)
    view, seen = tokenizer.teacher_outputs(config, RUN, None, dinov2, images, 25, draws)
    other = tokenizer.augment(images, draws[:, 0], "color")
    other = F.interpolate(other, (224, 224), mode="bicubic", antialias=True)
    assert view is None and torch.equal(seen, other)

def test_psnr_known_value():
    """The peak of images in [-1,1] is 2: with 1, all values are 6 dB too low."""
    a = torch.zeros(2, 3, 16, 16)
    b = a + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert psnr(a, b).tolist() == pytest.approx([20.0, 40.0])
    assert psnr(a, a).isinf().all()

# Training

@functools.cache
def noise():
    """A folder of noise images. On flat backgrounds rounding decides which of many equal tokens
    merge; here two ways to compute the same step choose the same."""
    folder = tempfile.TemporaryDirectory()  # goes with the process
    write_images(folder.name, 16)
    return folder

def flags(out, **changes):
    """Command line of a tiny run with every loss switched on."""
    settings = dict(data=noise().name, max_steps=5, lr=1e-3, lr_schedule="constant",
                    eval_every=100, save_every=100, disc_start=2)
    return command(SMALL, out, **{**settings, **changes})

def train(out, **changes):
    """Train in this process -> the checkpoint, and the lines of the training steps."""
    tokenizer.main(flags(out, **changes))
    return result(out)

def result(out):
    state, rows = read(out)
    return state, [row for row in rows if "lr" in row]

def test_before_its_start_the_discriminator_does_nothing(tmp_path):
    """A discriminator that acts on G before --disc-start, or is trained before it."""
    off, _ = train(tmp_path / "off", max_steps=3, w_disc=0.0)
    waiting, _ = train(tmp_path / "waiting", max_steps=3, disc_start=3)
    for part in ("model", "ema", "optimizer", "disc"):
        assert not difference(off[part], waiting[part]), part
    on, logs = train(tmp_path / "on", max_steps=3, disc_start=2)
    for part in ("model", "disc"):  # or the test would be empty
        assert difference(off[part], on[part])
    assert "gan" not in logs[1] and "gan" in logs[2]

def test_generator_and_discriminator_do_not_leak(tmp_path):
    """G's step leaving gradients on D, or D's loss reaching G: seen in AdamW's first moments."""
    base, _ = train(tmp_path / "base", max_steps=1, disc_start=0)
    other_g, _ = train(tmp_path / "g", max_steps=1, disc_start=0, w_disc=80.0)
    other_d, _ = train(tmp_path / "d", max_steps=1, disc_start=0, w_lecam=1e4)
    for state, optimizer in ((other_g, "disc_optimizer"), (other_d, "optimizer")):
        assert not difference(base[optimizer]["state"], state[optimizer]["state"])
    assert difference(base["model"], other_g["model"])
    assert difference(base["disc"], other_d["disc"])

RANK_OWN = {"images_per_s", "usage", "perplexity", "bit_imbalance", "dead_bits"}

def close(a, b, names, atol=5e-5):
    for part in names:
        for name, value in a[part].items():
            torch.testing.assert_close(b[part][name], value, rtol=0, atol=atol)

def test_two_ranks_equal_one_process(tmp_path):
    """Statistics of a rank where those of the batch belong: BitNorm, entropy, centre, LeCam,
    adaptive weight; a K that differs; images that both ranks see."""
    changes = dict(batch_size=8, lr=1e-4)
    one, rows = train(tmp_path / "one", **changes)
    two_ranks(f"{ROOT}/tokenizer.py", flags(tmp_path / "two", **changes))
    two, rows_two = result(tmp_path / "two")
    for a, b in zip(rows, rows_two, strict=True):
        for name in set(a) - RANK_OWN:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), (a["step"], name)
    assert {"rec", "perceptual", "commit", "entropy", "recovery", "align", "gan", "disc", "lecam",
            "grad_norm"} <= set(rows[-1])
    row = rows[-1]
    assert row["entropy"] == pytest.approx(row["entropy_sample"] - row["entropy_codebook"])
    torch.testing.assert_close(two["disc"]["lecam"], one["disc"]["lecam"], rtol=0, atol=1e-5)
    close(one, two, ("model", "disc"))

def test_decoder_learns_to_please_the_discriminator(tmp_path):
    """The adversarial gradient with the wrong sign, or added to nothing: AdamW's first moment of
    the last layer is a tenth of the gradient, here almost all of it adversarial."""
    moments = []
    for w_disc in (1e3, 0.0):
        state, _ = train(tmp_path / f"gan{w_disc}", max_steps=1, disc_start=0, disc_ramp=1,
                         w_disc=w_disc, w_rec=1.0, clip=1e9, align="none")
        moments.append(state["optimizer"]["state"])
    torch.manual_seed(state["config"]["seed"])
    config = TokenizerConfig(**state["config"])
    model, discriminator = MergeVQ(config).train(), tokenizer.Discriminator(config)
    data_set = build_dataset(config.data, "train", config.size, train=True, seed=config.seed)
    images, _ = next(batches(data_set, config, RUN))
    out = model(images, sample_keep(config, 0)).images
    (-discriminator(out).mean()).backward()
    matrices = [name for name, p in model.named_parameters() if p.dim() >= 2]
    at = matrices.index("decoder.conv_out.weight")
    adversarial = moments[0][at]["exp_avg"] - moments[1][at]["exp_avg"]
    wanted = model.decoder.conv_out.weight.grad
    assert F.cosine_similarity(adversarial.flatten(), wanted.flatten(), dim=0) > 0.99

def test_accumulation_equals_one_large_batch(tmp_path):
    """Gradients added but not averaged, or micro-batches that see the same images, for both
    networks. Without BitNorm, entropy and alignment, which look at a micro-batch."""
    changes = dict(batch_size=8, lr=1e-4, bit_norm=False, w_entropy=0.0, align="none", max_steps=3)
    (one, rows), (four, rows_four) = (
        train(tmp_path / f"accum{n}", accum=n, disc_start=100, **changes) for n in (1, 4))
    for a, b in zip(rows, rows_four, strict=True):  # AdamW hides a wrong scale, its norm does not
        for name in set(a) - RANK_OWN - {"entropy", "entropy_codebook"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), (a["step"], name)
    close(one, four, ("model",))
    # the discriminator: its first step, on equal reconstructions
    changes.update(max_steps=1, disc_start=0)
    (one, _), (four, _) = (train(tmp_path / f"disc{n}", accum=n, **changes) for n in (1, 4))
    moments = [[s["exp_avg"] for s in state["disc_optimizer"]["state"].values()]
               for state in (one, four)]
    for a, b in zip(*moments, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(four["disc"]["lecam"], one["disc"]["lecam"])
    assert difference(one["ema"], one["model"])  # what later stages load is the average
