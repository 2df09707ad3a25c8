"""Tests of tokenizer.py: one property each, on the CPU. The docstring of a test names the bug that it catches.

    python -m pytest -q tests/test_tokenizer.py
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import tokenizer
from data import run_main
from tokenizer import (VARIANTS, Attention, BitNorm, MergeVQ, TokenizerConfig, bits_to_codes, canonical_source,
                       codes_to_bits, keep_distribution, lfq_entropy, load_tokenizer, match_tokens, merge_schedule,
                       merge_tokens, most_likely_source, quantise, sample_keep, save_checkpoint, unmerge)

torch.set_num_threads(1)  # the models here are too small for more, and sums then have one order

# A tokenizer that trains a step in milliseconds: 16 px, f = 2, L = 64. As flags, and as a config.
SMALL = dict(size=16, base=8, norm_groups=4, mult=(1, 2), width=16, dec_width=16, depth=3, heads=2, dec_depth=1, dec_heads=2,
             keep=25, keeps=(16, 25, 36), bits=6, recovery_width=16, recovery_heads=2, align_dim=8, disc_base=4, disc_layers=1,
             data="shapes", patch=0, res_blocks=1, seed=0, w_rec=1.0, w_perceptual=0.7, w_disc=0.8, w_lecam=0.01, w_commit=0.25,
             w_entropy=0.1, w_recovery=0.5, w_align=0.1, beta1=0.5, beta2=0.9)
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def small_config(**changes):
    return TokenizerConfig(**{**SMALL, **changes})


def small_model(dtype=torch.float32, seed=0, **changes):
    """A MergeVQ in eval mode whose parameters are all random, so that no branch is switched off by its initialisation."""
    torch.manual_seed(seed)
    model = MergeVQ(small_config(**changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model.to(dtype).eval()


def random_images(num, size=16, seed=0, dtype=torch.float32):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed)).mul(2).sub(1).to(dtype)


def same(a, b, path=""):
    """Asserts that two nested structures of tensors and primitives are equal, bit for bit."""
    assert type(a) is type(b), f"{path}: {type(a)} against {type(b)}"
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{path} differs"
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            same(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, pair in enumerate(zip(a, b)):
            same(*pair, f"{path}.{i}")
    else:
        assert a == b, f"{path}: {a} against {b}"


# ---------------------------------------------------------------------------------------------------------------------
# LFQ

def brute_force_entropy(z, tau):
    """lfq_entropy as it is written in the paper: a softmax over all 2^d codes."""
    d = z.shape[-1]
    codebook = codes_to_bits(torch.arange(2 ** d), d).to(z)                # (V,d)
    log_p = (2 * z.reshape(-1, d) @ codebook.T / tau).log_softmax(-1)      # (N,V)
    p = log_p.exp()
    return -(p * log_p).sum(-1).mean(), torch.special.entr(p.mean(0)).sum()


@pytest.mark.parametrize("d", range(1, 11))
def test_entropy_equals_brute_force(d):
    """A wrong factorisation: sigmoid(2z) for sigmoid(4z), bits of the two halves swapped, odd d, a mean that is a sum."""
    for tau in (0.3, 1.0, 2.5):
        z = torch.randn(3, 7, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d), requires_grad=True)
        for fast, slow in zip(lfq_entropy(z, tau), brute_force_entropy(z, tau)):
            torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-12)
            gradients = [torch.autograd.grad(h, z, retain_graph=True)[0] for h in (fast, slow)]
            torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6 * gradients[1].abs().max().item())


@pytest.mark.parametrize("scale", (0.0, 1.0, 1e2, 1e4))
def test_entropy_is_finite_in_float32(scale):
    """0 * log 0 = nan where a sigmoid saturates: the training loss becomes NaN at the first confident bit."""
    z = torch.randn(64, 18, generator=torch.Generator().manual_seed(0)).sign() * scale
    z.requires_grad_()
    per_sample, codebook = lfq_entropy(z, 1.0)
    gradient, = torch.autograd.grad(per_sample - codebook, z)
    assert per_sample.isfinite() and codebook.isfinite() and gradient.isfinite().all()
    assert -1e-3 <= per_sample <= 18 * math.log(2) + 1e-3 and -1e-3 <= codebook <= 18 * math.log(2) + 1e-3


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads peak memory from Linux's /proc")
def test_entropy_memory():
    """The (N, 2^d) matrix: 4 GB at N = 4,096 and d = 18, which does not fit beside a model."""
    # VmHWM and not ru_maxrss: a child process inherits the latter from pytest
    script = """
import torch, tokenizer
def memory(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
def step(n):
    z = torch.randn(n, 18, requires_grad=True)
    per_sample, codebook = tokenizer.lfq_entropy(z, 1.0)
    (per_sample - codebook).backward()
step(64)
before = memory("VmRSS")
step(4096)
print(memory("VmHWM") - before)
"""
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENV, capture_output=True, text=True, check=True).stdout
    assert float(out) < 150, f"{float(out):.0f} MB"


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
    """A sign without the straight-through trick has gradient 0: the encoder would not learn. And 0 must count as -1,
    as in bits_to_codes."""
    z = torch.tensor([-2.0, -0.1, 0.0, 0.3, 5.0], requires_grad=True)
    q = quantise(z)
    assert torch.equal(q.detach().sign(), torch.tensor([-1.0, -1, -1, 1, 1]))
    torch.testing.assert_close(q.detach().abs(), torch.ones(5))
    (q * torch.arange(5.0)).sum().backward()
    assert torch.equal(z.grad, torch.arange(5.0))
    assert bits_to_codes(z.detach()[None]).item() == bits_to_codes(q.detach()[None]).item() == 0b11000


# ---------------------------------------------------------------------------------------------------------------------
# Token merging

def slow_merge(metric, x, size, r, protected):
    """The four steps of design.md section 3 for one image, with loops. Returns new_index, x, size as lists."""
    N = len(metric)
    cosine = lambda a, b: F.cosine_similarity(metric[a], metric[b], dim=0).item()
    A, B = [i for i in range(0, N, 2) if i >= protected], [i for i in range(1, N, 2) if i >= protected]
    pairs = []
    for a in A:
        b = max(B, key=lambda b: cosine(a, b))
        pairs.append((cosine(a, b), a, b))
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


@pytest.mark.parametrize("N,protected", [(17, 1), (16, 0), (18, 1), (20, 2), (21, 3)])
def test_merging_equals_a_slow_loop(N, protected):
    """Wrong parity, a class token that merges or is merged into, unweighted means, ties between the r chosen pairs."""
    g = torch.Generator().manual_seed(N)
    metric, x = torch.randn(3, N, 6, generator=g), torch.randn(3, N, 5, generator=g)
    size = torch.randint(1, 9, (3, N), generator=g).float()
    most = (N + 1) // 2 - (protected + 1) // 2
    for r in (1, most // 2, most):
        new_index = match_tokens(metric, r, protected)
        y, new_size = merge_tokens(x, size, new_index)
        assert y.shape == (3, N - r, 5) and torch.equal(new_size.sum(1), size.sum(1))
        for b in range(3):
            slow_index, slow_x, slow_size = slow_merge(metric[b], x[b], size[b], r, protected)
            assert new_index[b].tolist() == slow_index
            torch.testing.assert_close(y[b], slow_x)
            assert new_size[b].tolist() == slow_size
        assert torch.equal(new_index[:, :protected], torch.arange(protected).expand(3, -1))
        assert all((new_index == p).sum() == 3 for p in range(protected)), "something merged into a protected token"
    with pytest.raises(AssertionError, match="at most"):
        match_tokens(metric, most + 1, protected)


def test_merge_keeps_the_weighted_sum():
    """A mean that forgets sizes: after two merges a token of three patches would not be their mean."""
    g = torch.Generator().manual_seed(0)
    x, size = torch.randn(2, 9, 4, generator=g), torch.ones(2, 9)
    for _ in range(2):
        index = match_tokens(torch.randn(2, x.shape[1], 3, generator=g), 2)
        y, new_size = merge_tokens(x, size, index)
        torch.testing.assert_close((y * new_size[..., None]).sum(1), (x * size[..., None]).sum(1))
        x, size = y, new_size


def track_sets(new_indices, L):
    """Follow every position through the blocks with explicit sets: token -> the set of positions it stands for."""
    tokens = [set()] + [{i} for i in range(L)]  # the class token stands for none
    for new_index in new_indices:
        after = [set() for _ in range(max(new_index) + 1)]
        for old, new in enumerate(new_index):
            after[new] |= tokens[old]
        tokens = after
    assert tokens[0] == set(), "a position merged into the class token"
    return tokens[1:]


def test_source_equals_tracking_with_sets(monkeypatch):
    """Composing the indices of the blocks the wrong way round, forgetting the class token's offset, or renumbering the
    tokens without moving their vectors along."""
    seen, match = [], tokenizer.match_tokens
    monkeypatch.setattr(tokenizer, "match_tokens", lambda *args: seen.append(match(*args)) or seen[-1])
    model, images = small_model(torch.float64), random_images(4, dtype=torch.float64)
    encoded = model.encode(images, 16)
    assert len(seen) == 3
    for b in range(4):
        truth = track_sets([index[b].tolist() for index in seen], 64)
        found = [set((encoded.source[b] == k).nonzero().flatten().tolist()) for k in range(16)]
        assert sorted(found, key=min) == found, "tokens are not numbered by first position"
        assert found == sorted(truth, key=min)
    monkeypatch.setattr(tokenizer, "canonical_source", lambda source: source)
    raw = model.encode(images, 16)
    assert not torch.equal(raw.source, encoded.source), "the test needs an image where the order changes"
    torch.testing.assert_close(unmerge(raw.z, raw.source), unmerge(encoded.z, encoded.source))


def test_a_token_is_the_mean_of_its_positions():
    """Tokens that do not belong to the positions that source gives them. With the branches of all blocks switched off,
    a merged token must be exactly the mean of the CNN's outputs over its region, whatever happened in between."""
    model, images = small_model(bit_norm=False), random_images(4)
    with torch.no_grad():
        for block in model.encoder.blocks:
            block.scale1.zero_()
            block.scale2.zero_()
        encoded = model.encode(images, 16)
        positions = model.encoder.stem(images).flatten(2).transpose(1, 2)  # (B,L,D)
        S = F.one_hot(encoded.source).float()                              # (B,L,K)
        means = S.transpose(1, 2) @ positions / S.sum(1)[..., None]
        torch.testing.assert_close(encoded.z, model.encoder.to_bits(model.encoder.norm(means)), rtol=0, atol=1e-4)


def test_canonical_source():
    """An order by label or by group size: equal images could get differently numbered tokens."""
    source = torch.tensor([[3, 3, 0, 1, 0, 2], [0, 1, 2, 3, 3, 0]])
    assert canonical_source(source).tolist() == [[0, 0, 1, 2, 1, 3], [0, 1, 2, 3, 3, 0]]
    labels = torch.randint(0, 8, (5, 50), generator=torch.Generator().manual_seed(0))
    canonical = canonical_source(labels)
    assert torch.equal(canonical, canonical_source(canonical))
    for row, old in zip(canonical.tolist(), labels.tolist()):
        assert len(set(zip(row, old))) == len(set(row)) == 8, "not a relabelling"
        assert [row.index(k) for k in range(8)] == sorted(row.index(k) for k in range(8))


def test_keep_all():
    """K = L must be the plain tokenizer: nothing merges, source is the identity."""
    encoded = small_model().encode(random_images(2), 64)
    assert encoded.codes.shape == (2, 64) and torch.equal(encoded.source, torch.arange(64).expand(2, -1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_schedule(variant):
    """A schedule that misses the sum by rounding, asks a block for more than half of its tokens, or is not the paper's
    decreasing square."""
    config = TokenizerConfig(**VARIANTS[variant])
    L, depth = config.length, config.depth
    assert config.keep in keep_distribution(config)[0]
    for keep in (*keep_distribution(config)[0], L, L - 1):
        schedule = merge_schedule(L, keep, depth)
        assert len(schedule) == depth and sum(schedule) == L - keep
        left, clipped = L, False
        for i, r in enumerate(schedule):
            aim = (L - keep) * sum((depth - j) ** 2 for j in range(i + 1)) / sum((depth - j) ** 2 for j in range(depth))
            assert 0 <= r <= left // 2
            clipped = r == left // 2 and L - left + r < aim - 0.5
            assert clipped or abs(L - left + r - aim) <= 0.5, "neither on the curve nor at the limit"
            left -= r
        assert not clipped
    relaxed = merge_schedule(10_000, 9_000, depth)  # no block is near its limit
    assert relaxed == sorted(relaxed, reverse=True) and relaxed[0] > relaxed[-1]


def test_schedule_refuses_the_impossible():
    """A keep that halving cannot reach would end as fewer merges than promised and a shape error far away."""
    for full, keep, depth in ((64, 65, 4), (64, 0, 4), (64, 15, 2)):
        with pytest.raises(tokenizer.UserError, match="--keep"):
            merge_schedule(full, keep, depth)
    assert sum(merge_schedule(64, 16, 2)) == 48


def test_proportional_attention():
    """log s left out or added after the softmax: a merged token must weigh as much as the tokens it stands for."""
    torch.manual_seed(0)
    attention = Attention(16, 4).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    source = torch.tensor([[0, 1, 1, 2, 3, 3, 3, 4], [0, 0, 0, 1, 2, 3, 4, 4]])
    size = F.one_hot(source).sum(1).double()                               # (B,K)
    merged, _ = attention(x, size.log())
    full, _ = attention(unmerge(x, source))
    torch.testing.assert_close(unmerge(merged, source), full, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(attention(x)[0], merged), "without sizes the result must differ"
    block = small_model(torch.float64).encoder.blocks[0]
    torch.testing.assert_close(unmerge(block(x, size)[0], source), block(unmerge(x, source))[0], rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------------------------------
# The model

def test_decode_in_a_fresh_process(tmp_path):
    """Anything that decode needs beside its two integer tensors, such as a map left on the module by encode."""
    model = small_model()
    encoded = model.encode(random_images(3))
    save_checkpoint(tmp_path / "ckpt.pt", "tokenizer", config=vars(model.config), ema=model.state_dict())
    torch.save((encoded.codes, encoded.source), tmp_path / "codes.pt")
    script = f"""
import torch, tokenizer
torch.set_num_threads(1)
model = tokenizer.load_tokenizer(r"{tmp_path}/ckpt.pt")
with torch.no_grad():
    torch.save(model.decode(*torch.load(r"{tmp_path}/codes.pt")), r"{tmp_path}/images.pt")
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=ENV, check=True)
    model.encode(random_images(3, seed=1))  # other images in between change nothing here either
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), model.decode(encoded.codes, encoded.source).detach(),
                               rtol=0, atol=1e-6)


def test_nothing_depends_on_the_batch():
    """A statistic over the batch in eval mode: an image's codes would depend on its neighbours."""
    model, images = small_model(torch.float64), random_images(6, dtype=torch.float64)  # so that no bit hangs on rounding
    together = model.encode(images)
    model32 = small_model()
    decoded, recovered = model32.decode(together.codes, together.source), model32.recover(together.codes)
    for rows in ([0], [3, 1], [5, 4, 3, 2, 1, 0]):
        alone = model.encode(images[rows])
        assert torch.equal(alone.codes, together.codes[rows]) and torch.equal(alone.source, together.source[rows])
        torch.testing.assert_close(model32.decode(alone.codes, alone.source), decoded[rows], rtol=0, atol=1e-5)
        assert torch.equal(model32.recover(alone.codes), recovered[rows])


@pytest.mark.parametrize("L, K", [(5, 1), (5, 3), (6, 4), (4, 4)])
def test_most_likely_source_against_all_maps(L, K):
    """A wrong recursion: of all K^L maps, those that number K tokens by first position, the best one must be found."""
    logits = torch.randn(20, L, K, generator=torch.Generator().manual_seed(0))
    maps = torch.cartesian_prod(*(torch.arange(K),) * L)                                   # (K^L,L)
    maps = maps[[sorted(set(m)) == list(range(K)) and list(dict.fromkeys(m)) == sorted(set(m)) for m in maps.tolist()]]
    sums = logits[:, torch.arange(L), maps].sum(-1)                                        # (20,maps)
    assert torch.equal(most_likely_source(logits), maps[sums.argmax(1)])
    assert torch.equal(most_likely_source(-1e4 * logits), maps[sums.argmin(1)])  # large ones do not overflow


def test_recovered_source_is_whole():
    """A token that no position gets would be lost in the picture; at K = L there is nothing to recover."""
    model = small_model()
    for keep in (16, 25, 64):
        source = model.recover(model.encode(random_images(3), keep).codes)
        assert torch.equal(canonical_source(source), source) and (source.amax(1) == keep - 1).all(), f"keep {keep}"
    assert torch.equal(source, torch.arange(64).expand(3, -1))


def test_encode_writes_nothing():
    """Hidden state between encode and decode: an attribute or buffer that a forward changes in eval mode."""
    model = small_model()
    state = copy.deepcopy(model.state_dict())
    attributes = {name: {k: id(v) for k, v in vars(m).items() if not k.startswith("_")} for name, m in model.named_modules()}
    encoded = model.encode(random_images(2))
    model.decode(encoded.codes, encoded.source)
    model.recover(encoded.codes)
    same(state, model.state_dict())
    for name, m in model.named_modules():
        assert {k: id(v) for k, v in vars(m).items() if not k.startswith("_")} == attributes[name], name


def test_contracts_of_the_paper_variants():
    """A layer too many or too few: the parameter counts of the authors' networks identify the architecture."""
    expected = dict(g=(62.33, 82.85), gr=(62.67, 83.37), r=(85.7, 83.37))
    for variant, counts in expected.items():
        with torch.device("meta"):
            model = MergeVQ(TokenizerConfig(**VARIANTS[variant]))
        for part, millions in zip((model.encoder, model.decoder), counts):
            found = sum(p.numel() for p in part.parameters()) / 1e6
            assert found == pytest.approx(millions, rel=0.005), f"{variant} {type(part).__name__}"


def training_loss(model, images, keep=25):
    """A loss in which every output of the model has a part."""
    out = model(images, keep)
    return (F.mse_loss(out.images, images) + lfq_entropy(out.encoded.z)[0] + out.align.square().mean()
            + F.cross_entropy(out.recovery.flatten(0, 1), out.encoded.source.flatten()))


def test_every_parameter_gets_a_gradient():
    """A parameter that nobody trains: declared but unused, or behind a detach."""
    for changes in ({}, dict(bit_norm=False), dict(patch=2)):
        model = small_model(**changes).train()
        training_loss(model, random_images(4)).backward()
        for name, p in model.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, f"{name} got no gradient"


def test_gradient_checkpointing_changes_nothing():
    """Recomputed blocks that merge other tokens than the first time, or a skipped gradient."""
    gradients = []
    for grad_ckpt in (False, True):
        model = small_model(grad_ckpt=grad_ckpt).train()
        training_loss(model, random_images(4)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m: f"{name}: {m}")


def test_bit_norm():
    """Running statistics in training would let all bits collapse to one sign; batch statistics in evaluation would make
    an image's codes depend on its batch."""
    norm = BitNorm(8)
    z = torch.randn(64, 32, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.5, 3, 8) + torch.linspace(-20, 20, 8)
    y = norm.train()(z)
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(8), rtol=0, atol=1e-3)
    torch.testing.assert_close(y.square().mean((0, 1)), torch.ones(8), rtol=0, atol=1e-2)
    assert ((y > 0).float().mean((0, 1)) - 0.5).abs().max() < 0.05, "bits are not balanced"
    for _ in range(100):
        norm(z)
    torch.testing.assert_close(norm.eval()(z), y, rtol=0, atol=1e-2)
    torch.testing.assert_close(norm(z)[:1], norm(z[:1]))
    before = copy.deepcopy(norm.state_dict())
    norm(z + 5)
    same(before, norm.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_distribution_of_keep(variant):
    """A K that differs between ranks or after a resume, or a distribution whose mode is not the target."""
    config = TokenizerConfig(**VARIANTS[variant])
    candidates, p = keep_distribution(config)
    draws = [sample_keep(config, 7, step) for step in range(3000)]
    assert draws == [sample_keep(config, 7, step) for step in range(3000)]
    assert draws[:50] != [sample_keep(config, 8, step) for step in range(50)]
    assert candidates[int(p.argmax())] == config.keep
    for candidate, share in zip(candidates, p.tolist()):
        assert abs(draws.count(candidate) / 3000 - share) < 0.04, candidate


def test_paper_distribution_of_keep():
    """A.3: exponential 2 exp(-2 i) + 0.1 for G, Gaussian exp(-i^2 / (2 * 0.5^2)) + 0.05 for G+R, i = 0 at the target."""
    candidates, p = keep_distribution(TokenizerConfig(**VARIANTS["gr"]))
    assert candidates == [121, 144, 169, 196, 225, 256]
    weights = [math.exp(-i * i / 0.5) + 0.05 for i in (-1, 0, 1, 2, 3, 4)]
    torch.testing.assert_close(p, torch.tensor(weights, dtype=torch.float64) / sum(weights))
    candidates, p = keep_distribution(TokenizerConfig(**VARIANTS["g"]))
    at = candidates.index(256)
    assert p[at + 1] / p[at] == pytest.approx((2 * math.exp(-2) + 0.1) / 2.1)
    assert keep_distribution(small_config(keep_sampling="fixed"))[1].tolist() == [0.0, 1.0, 0.0]


# ---------------------------------------------------------------------------------------------------------------------
# Training

def flags(out, **changes):
    """Command line of a tiny run with every loss switched on."""
    run = dict(out=str(out), device="cpu", batch_size=4, max_steps=5, warmup=2, lr=1e-3, lr_schedule="constant", workers=0, log_every=1,
               eval_every=100, save_every=100, eval_num=4, disc_start=2, disc_ramp=2)
    argv = []
    for name, value in {**SMALL, **run, **changes}.items():
        name = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(name if value else "--no-" + name[2:])
        else:
            argv += [name, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return argv


def train(out, **changes):
    """Train in this process. Returns the checkpoint and the logged steps."""
    tokenizer.main(flags(out, **changes))
    return result(out)


def result(out):
    with open(out / "metrics.jsonl") as f:
        rows = [json.loads(line) for line in f]
    return torch.load(out / "ckpt.pt", weights_only=True), [row for row in rows if "loss" in row]


def test_before_its_start_the_discriminator_does_nothing(tmp_path):
    """A discriminator that acts on G before --disc-start, or is trained before it."""
    off, _ = train(tmp_path / "off", max_steps=3, w_disc=0.0)
    waiting, _ = train(tmp_path / "waiting", max_steps=3, disc_start=3)
    for part in ("model", "ema", "optimizer", "disc"):
        same(off[part], waiting[part], part)
    on, logs = train(tmp_path / "on", max_steps=3, disc_start=2)
    assert any(not torch.equal(v, on["model"][k]) for k, v in off["model"].items()), "D never acted: the test is empty"
    assert any(not torch.equal(v, on["disc"][k]) for k, v in off["disc"].items())
    assert "gan" not in logs[1] and "gan" in logs[2]


def test_generator_and_discriminator_do_not_leak(tmp_path):
    """G's step leaving gradients on D, or D's loss reaching G: seen in AdamW's first moments after one step."""
    base, _ = train(tmp_path / "base", max_steps=1, disc_start=0)
    other_g, _ = train(tmp_path / "g", max_steps=1, disc_start=0, w_disc=80.0)
    same(base["disc_optimizer"]["state"], other_g["disc_optimizer"]["state"], "D follows G's loss")
    other_d, _ = train(tmp_path / "d", max_steps=1, disc_start=0, w_lecam=10.0)
    same(base["optimizer"]["state"], other_d["optimizer"]["state"], "G follows D's loss")
    moments = lambda state, name: [s["exp_avg"] for s in state[name]["state"].values()]
    assert not all(map(torch.equal, moments(base, "optimizer"), moments(other_g, "optimizer")))
    assert not all(map(torch.equal, moments(base, "disc_optimizer"), moments(other_d, "disc_optimizer")))


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """A folder of noise images. On the flat backgrounds of `shapes` rounding errors decide which of many equal tokens
    merge; here two ways to compute the same step choose the same."""
    folder = tmp_path_factory.mktemp("noise")
    for split, num in (("train", 40), ("val", 4)):
        (folder / split).mkdir()
        for i in range(num):
            pixels = random_images(1, seed=i)[0].add(1).mul(127.5).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / split / f"{i}.png")
    return folder


def test_two_ranks_equal_one_process(noise, tmp_path):
    """Statistics of a rank in place of the batch: BitNorm, entropy, EMA teacher's centre, LeCam, adaptive weight,
    a K that differs, samples that both ranks see."""
    changes = dict(batch_size=8, max_steps=5, disc_start=2, lr=1e-4, data=noise)
    one, rows = train(tmp_path / "one", **changes)
    ranks = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                              os.path.join(ROOT, "tokenizer.py"), *flags(tmp_path / "two", **changes)],
                             env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        output, _ = ranks.communicate(timeout=600)
    finally:
        ranks.terminate()  # after a hang: torchrun then ends its ranks
    assert ranks.returncode == 0, output
    two, rows_two = result(tmp_path / "two")
    for a, b in zip(rows, rows_two, strict=True):
        for name in sorted(set(a) - {"images_per_s", "usage", "perplexity", "bit_imbalance", "dead_bits"}):  # rank 0's own
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-4), f"step {a['step']}: {name}"
    assert {"rec", "perceptual", "commit", "entropy", "recovery", "align", "gan", "disc", "lecam", "grad_norm"} <= set(rows[-1])
    for name in ("lecam", "center"):
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    for part in ("model", "disc"):
        for name, value in one[part].items():
            torch.testing.assert_close(two[part][name], value, rtol=0, atol=5e-5, msg=lambda m: f"{part}.{name}: {m}")


def test_resume_is_exact(tmp_path):
    """Something left out of the checkpoint: EMA, D, an optimizer, running averages, the position in the data; and lines
    of metrics.jsonl that a resumed run writes twice (it was killed after its checkpoint) or leaves out."""
    whole, _ = train(tmp_path / "whole", max_steps=6, eval_every=2)
    train(tmp_path / "parts", max_steps=4, save_every=3, eval_every=2)
    with open(tmp_path / "parts/metrics.jsonl", "a") as f:
        f.write('{"step": 5, "lr": 0.1}\n{"step": 5, "val_ps')
    parts, _ = train(tmp_path / "parts", max_steps=6, eval_every=2, resume=True)
    for state in (whole, parts):
        state.pop("config")
    same(whole, parts)
    one, two = ([{**json.loads(line), "images_per_s": 0} for line in (tmp_path / name / "metrics.jsonl").open()]
                for name in ("whole", "parts"))
    assert one == two


def test_accumulation_equals_one_large_batch(noise, tmp_path):
    """Gradients added but not averaged, micro-batches that see the same images, BitNorm, entropy or adaptive weight of a
    micro-batch in place of the whole batch; for both networks."""
    changes = dict(batch_size=8, lr=1e-4, data=noise, disc_start=1, max_steps=3)
    (one, rows), (four, rows_four) = (train(tmp_path / f"accum{n}", accum=n, **changes) for n in (1, 4))
    for a, b in zip(rows, rows_four, strict=True):  # AdamW hides a wrong scale of the gradient, its norm does not
        for name in set(a) - {"images_per_s"}:
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), f"step {a['step']}: {name}"
    assert {"gan", "disc", "lecam", "weighted_gan", "entropy_codebook"} <= set(rows[-1])
    for part in ("model", "disc"):
        for name, value in one[part].items():
            torch.testing.assert_close(four[part][name], value, rtol=0, atol=5e-5, msg=lambda m: f"{part}.{name}: {m}")
    for part in ("lecam", "center"):
        torch.testing.assert_close(four[part], one[part])
    for a, b in zip(one["disc_optimizer"]["state"].values(), four["disc_optimizer"]["state"].values(), strict=True):
        torch.testing.assert_close(b["exp_avg"], a["exp_avg"], rtol=1e-3, atol=1e-6)


def test_a_bad_step_is_skipped(tmp_path, monkeypatch):
    """NaN in one step that reaches the weights: the run is lost from there on, and often only seen hours later."""
    before, _ = train(tmp_path / "before", max_steps=2, disc_start=1)
    calls, stub = [], tokenizer.perceptual_stub

    def bad_at_third_call(a, b):
        calls.append(1)
        return stub(a, b) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(tokenizer, "perceptual_stub", bad_at_third_call)
    monkeypatch.setattr(tokenizer, "dry_run", lambda *args, **kwargs: None)  # it would be the first call
    after, rows = train(tmp_path / "after", max_steps=3, disc_start=1)
    assert after["skipped"] == 1 and after["step"] == 3 and rows[-1]["skipped"] == 1
    for name in ("model", "ema", "disc", "optimizer", "disc_optimizer", "lecam", "center"):
        same(before[name], after[name], name)


def test_a_bad_batch_leaves_no_trace(tmp_path, monkeypatch):
    """NaN in the forward pass that enters running statistics, which no skipped optimizer step undoes."""
    batches = tokenizer.batches

    def poisoned(*args, **kwargs):
        for n, (images, labels) in enumerate(batches(*args, **kwargs)):
            yield (images * math.nan if n == 1 else images), labels

    monkeypatch.setattr(tokenizer, "batches", poisoned)
    state, rows = train(tmp_path, max_steps=3, disc_start=0)
    assert state["skipped"] == 1
    for part in ("model", "ema", "disc"):
        for name, value in state[part].items():
            assert value.isfinite().all(), f"{part}.{name}"
    assert state["lecam"].isfinite().all() and state["center"].isfinite().all()
    assert math.isfinite(rows[-1]["rec"])


def test_checkpoint_is_whole_and_plain(tmp_path):
    """Prefixes of wrappers in the names, a checkpoint that needs pickled classes, weights that are not the EMA's."""
    state, _ = train(tmp_path, max_steps=2)
    model = load_tokenizer(tmp_path / "ckpt.pt")
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    same(dict(model.state_dict()), dict(state["ema"]))
    assert list(model.state_dict()) == list(state["model"]) and state["kind"] == "tokenizer"
    assert {"recon_0000002.png", "curves.png"} <= set(os.listdir(tmp_path))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    tokenizer.main(flags(out, max_steps=1))
    return out


MISTAKES = {
    "resume without a run": (dict(out="nowhere", resume=True), ["nowhere"]),
    "a run is there": (dict(), ["--overwrite", "--resume"]),
    "keep > L": (dict(keep=65), ["65", "64"]),
    "keep out of reach": (dict(keeps=(2, 25)), ["--keep"]),
    "bad size": (dict(size=15), ["15"]),
    "unknown flag": (dict(no_such_flag=1), ["--no-such-flag"]),
    "unknown variant": (dict(variant="huge"), ["huge", "tiny"]),
    "bad number": (dict(lr="fast"), ["--lr"]),
    "negative number": (dict(lr=-1.0), ["--lr"]),
    "no such data": (dict(data="no/such/folder"), ["no/such/folder"]),
    "no such device": (dict(device="cuda:99"), ["cuda:99"]),
    "damaged checkpoint": (dict(out="damaged", resume=True), ["damaged"]),
    "truncated checkpoint": (dict(out="truncated", resume=True), ["truncated"]),
    "other network": (dict(resume=True, dec_depth=2, max_steps=2), ["--resume"]),
    "batch does not divide": (dict(accum=3, overwrite=True), ["--batch-size"]),
    "too many bits": (dict(bits=25), ["--bits", "24"]),
    "labels wanted": (dict(data="flat", align="label", overwrite=True), ["--align"]),
    "no images": (dict(data="empty", overwrite=True), ["empty"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line(mistake, finished_run, tmp_path, monkeypatch, capfd):
    """A traceback where one line would do, or an error that ends with exit code 0."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished_run, "finished")
    content = (finished_run / "ckpt.pt").read_bytes()
    for name, damaged in (("damaged", b"not a checkpoint"), ("truncated", content[:len(content) // 2])):
        os.mkdir(name)
        with open(f"{name}/ckpt.pt", "wb") as f:
            f.write(damaged)
    os.mkdir("empty")
    os.mkdir("flat")
    for i in range(40):
        Image.new("RGB", (16, 16), (6 * i, 0, 0)).save(f"flat/{i}.png")
    changes, words = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: tokenizer.main(flags(**{"out": "finished", **changes})))
    error = capfd.readouterr().err
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.strip()]
    assert stop.value.code == 2 and len(lines) == 1, error
    assert all(word in lines[0] for word in words), lines[0]
    with open("finished/ckpt.pt", "rb") as f:
        assert f.read() == content, "the finished run was touched"


def test_command_line():
    """A % in a help text, work done at import that fails, an exit code that gets lost: --help is what people run first."""
    start = lambda flag: subprocess.Popen([sys.executable, "tokenizer.py", flag], cwd=ROOT, env=ENV, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    help, typo = start("--help"), start("--hepl")
    out, error = help.communicate()
    assert help.returncode == 0 and not error, error
    assert "torchrun --nproc_per_node=8 tokenizer.py --variant g" in out
    assert "--keep-sampling" in out and "--no-bit-norm" in out
    out, error = typo.communicate()
    assert typo.returncode == 2 and not out and len(error.splitlines()) == 1 and "--hepl" in error, error
