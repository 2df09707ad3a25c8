"""Tests of the networks that load public weight files: LPIPS, DINOv2, weight selection, FID's InceptionV3. Nothing is fetched.

    python -m pytest -q tests/test_weights.py

The files written here are small and random, but of the published format: same names, same order of axes.
"""

import hashlib
import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import eval as evaluation  # the name of the script is also that of a builtin
import tokenizer
from data import UserError, run_main
from eval import FIDInception, load_inception
from tokenizer import Encoder, MergeVQ, TokenizerConfig, distill_loss, load_dinov2, load_lpips, load_weights, select_weights

torch.set_num_threads(1)

VGG_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)   # their positions in torchvision's vgg16.features
SMALL_VGG, SMALL_DINO = ((4, 4), (5, 5), (6, 6, 6), (7, 7, 7), (8, 8, 8)), dict(width=48, depth=4, heads=4, patch=14, grid=5)


def random_tensors(shapes, seed=0):
    """{name: shape} -> {name: tensor}, of a size that neither vanishes nor explodes; variances are positive."""
    g = torch.Generator().manual_seed(seed)
    fill = lambda name, shape: (
        torch.rand(shape, generator=g) + 0.5 if name.endswith(("var", "bn.weight")) or name.startswith("lin") else
        torch.randn(shape, generator=g) * (0.5 if len(shape) < 2 else (2 / math.prod(shape[1:])) ** 0.5 if shape[0] > 1 else 1))
    return {name: fill(name, shape) for name, shape in shapes.items()}


def vgg_shapes(widths):
    shapes, c = {}, 3
    for i, w in zip(VGG_CONVS, [w for stage in widths for w in stage]):
        shapes.update({f"features.{i}.weight": (w, c, 3, 3), f"features.{i}.bias": (w,)})
        c = w
    return shapes


def head_shapes(widths):
    return {f"lin{i}.model.1.weight": (1, stage[-1], 1, 1) for i, stage in enumerate(widths)}


def dino_shapes(width, depth, heads, patch, grid):
    W = width
    shapes = {"cls_token": (1, 1, W), "pos_embed": (1, 1 + grid * grid, W), "mask_token": (1, W),
              "patch_embed.proj.weight": (W, 3, patch, patch), "patch_embed.proj.bias": (W,)}
    for i in range(depth):
        for name, shape in {"norm1.weight": (W,), "norm1.bias": (W,), "attn.qkv.weight": (3 * W, W), "attn.qkv.bias": (3 * W,),
                            "attn.proj.weight": (W, W), "attn.proj.bias": (W,), "ls1.gamma": (W,), "norm2.weight": (W,),
                            "norm2.bias": (W,), "mlp.fc1.weight": (4 * W, W), "mlp.fc1.bias": (4 * W,),
                            "mlp.fc2.weight": (W, 4 * W), "mlp.fc2.bias": (W,), "ls2.gamma": (W,)}.items():
            shapes[f"blocks.{i}.{name}"] = shape
    return {**shapes, "norm.weight": (W,), "norm.bias": (W,)}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The networks made small, and a random file for each: {kind: path}."""
    monkeypatch.setattr(tokenizer, "VGG16", SMALL_VGG)
    monkeypatch.setattr(tokenizer, "DINOV2", SMALL_DINO)
    monkeypatch.setenv("LOCAL_RANK", "0")
    content = dict(vgg16={**vgg_shapes(SMALL_VGG), "classifier.0.weight": (9, 8)}, lpips=head_shapes(SMALL_VGG),
                   dinov2=dino_shapes(**SMALL_DINO))
    for kind, shapes in content.items():
        torch.save(random_tensors(shapes), tmp_path / f"{kind}.pth")
    small_inception(tmp_path / "inception.pth")
    return {kind: str(tmp_path / f"{kind}.pth") for kind in (*content, "inception")}


def images(num, *size, seed=0):
    return torch.rand(num, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_the_published_names_and_shapes(monkeypatch):
    """A network that differs from the published one, so that the true file is refused: seen only with 350 MB at hand."""
    asked = {}

    def record(kind, path, shapes, unused=()):
        asked[kind] = {name: tuple(shape) for name, shape in shapes.items()}
        return {name: torch.empty(shape) for name, shape in shapes.items()}

    monkeypatch.setattr(tokenizer, "load_weights", record)
    monkeypatch.setattr(evaluation, "load_weights", record)
    with torch.device("meta"):  # no memory, no file
        load_lpips("", "", "meta"), load_dinov2("", "meta"), load_inception("", "meta")
    full = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    assert asked["vgg16"] == vgg_shapes(full) and asked["lpips"] == head_shapes(full)
    dino = dino_shapes(768, 12, 12, 14, 37)
    assert sum(map(math.prod, dino.values())) == 86_580_480, "the names of this test differ from the published model's"
    del dino["mask_token"]
    assert asked["dinov2"] == dino
    asked = asked["inception"]
    weights = sum(math.prod(shape) for name, shape in asked.items() if "running" not in name)
    assert weights == 23_834_568 + 8 * 2049  # torchvision's without its second head; 1,008 classes, not 1,000
    some = {"Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5b.branch_pool.bn.running_var": (32,),
            "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3), "Mixed_6c.branch7x7dbl_2.conv.weight": (160, 160, 7, 1),
            "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3), "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
            "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1), "fc.weight": (1008, 2048), "fc.bias": (1008,)}
    assert {name: asked[name] for name in some} == some


def damage(path, how):
    """Write a wrong file in place of a good one."""
    content = open(path, "rb").read()
    if how in ("truncated", "text"):
        with open(path, "wb") as f:
            f.write(content[:len(content) // 2] if how == "truncated" else b"<html>404: Not Found</html>")
        return
    state = torch.load(path)
    first, last = list(state)[0], list(state)[-2]
    if how == "lacks one":
        del state[last]
    elif how == "one too many":
        state["extra.weight"] = torch.zeros(3)
    elif how == "wrong shape":
        state[first] = state[first].repeat_interleave(2, dim=-1)
    elif how == "not tensors":
        state = {name: None for name in state}
    elif how == "a list":
        state = list(state.values())
    torch.save(state, path)


@pytest.mark.parametrize("kind", ("dinov2", "vgg16", "lpips", "inception"))
@pytest.mark.parametrize("how, words", (("truncated", ["truncated"]), ("text", ["not a readable"]), ("lacks one", ["is missing"]),
                                        ("one too many", ["extra.weight is unknown"]), ("wrong shape", ["has shape"]),
                                        ("not tensors", ["is missing", "more"]), ("a list", ["is missing"]),
                                        ("not there", ["No such file"])))
def test_wrong_files_are_refused(files, kind, how, words, capsys):
    """A half-loaded network, or a traceback, where the file is damaged or another's; an error without the file and the flag."""
    if how == "not there":
        os.remove(files[kind])
    else:
        damage(files[kind], how)
    load = dict(dinov2=lambda: load_dinov2(files["dinov2"]), inception=lambda: load_inception(files["inception"], shrink=16))
    with pytest.raises(SystemExit) as stop:
        run_main(load.get(kind, lambda: load_lpips(files["lpips"], files["vgg16"])))
    lines = capsys.readouterr().err.splitlines()
    words = [*words, files[kind], tokenizer.OFFICIAL[kind][1], "download"]
    assert stop.value.code == 2 and len(lines) == 1 and all(w in lines[0] for w in words), lines


MISSING = {
    "no path to LPIPS": (dict(perceptual="lpips", vgg_weights="FILES/vgg16.pth"), ["--lpips-weights", "vgg.pth"]),
    "no path to VGG": (dict(perceptual="lpips", lpips_weights="FILES/lpips.pth"), ["--vgg-weights", "vgg16-397923af.pth"]),
    "no such VGG": (dict(perceptual="lpips", lpips_weights="FILES/lpips.pth", vgg_weights="no/such"), ["no/such", "No such"]),
    "no path to the teacher": (dict(align="dinov2", teacher_size=28), ["--teacher-weights", "dinov2_vitb14_pretrain.pth"]),
    "no path to select from": (dict(init="dinov2"), ["--teacher-weights"]),
    "a folder": (dict(init="dinov2", teacher_weights="FILES"), ["FILES", "directory"]),
    "another's file": (dict(init="dinov2", teacher_weights="FILES/vgg16.pth"), ["DINOv2", "cls_token is missing"]),
    "teacher size": (dict(align="dinov2", teacher_size=30), ["--teacher-size 30", "14"]),
    "too wide": (dict(init="dinov2", width=64, dec_width=64, base=32, heads=4, dec_heads=4), ["--width 64", "48"]),
    "heads too wide": (dict(init="dinov2", heads=1), ["--width / --heads 16", "12"]),
    "too deep": (dict(init="dinov2", depth=5), ["--depth 5", "4"]),
}


@pytest.mark.parametrize("mistake", MISSING)
def test_mistakes_get_one_line(mistake, files, tmp_path, capsys):
    """A run that fails after it has replaced the one in --out, or with a traceback."""
    from test_tokenizer import flags
    place = os.path.dirname(files["vgg16"])
    changes, words = MISSING[mistake]
    argv = [part.replace("FILES", place) for part in flags(tmp_path / "out", **changes)]
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: tokenizer.main(argv))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and all(w.replace("FILES", place) in lines[0] for w in words), lines
    assert not os.path.exists(tmp_path / "out"), "something was written"


def test_download_only_when_asked(files, tmp_path, monkeypatch, capsys):
    """A network fetched unasked or from elsewhere, an unchecked sha256, a file fetched twice."""
    asked = []

    def fetch(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        torch.save(random_tensors(dino_shapes(**SMALL_DINO)), path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    load_dinov2(files["dinov2"])
    assert not asked and "sha256" in capsys.readouterr().out, "a file that is not the official one must be named as such"
    url, digits = tokenizer.OFFICIAL["dinov2"][2:]
    for _ in range(2):
        with pytest.raises(UserError, match="sha256.*delete it"):  # the stand-in is not the official file
            load_dinov2("download")
    assert asked == [(url, digits)]
    found = hashlib.sha256((tmp_path / "hub/checkpoints/dinov2_vitb14_pretrain.pth").read_bytes()).hexdigest()
    monkeypatch.setitem(tokenizer.OFFICIAL, "dinov2", (*tokenizer.OFFICIAL["dinov2"][:3], found[:16]))
    load_dinov2("download")
    assert len(asked) == 1 and not capsys.readouterr().out

    def refuse(url, path, hash_prefix):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(UserError, match="--vgg-weights download: .*vgg16-397923af.pth.*unreachable"):
        load_weights("vgg16", "download", {})


# ---------------------------------------------------------------------------------------------------------------------
# LPIPS

def test_lpips_as_published(files):
    """A tap before the ReLU or after the pooling, a head at the wrong stage, means over channels, [0,1] for [-1,1]."""
    file = {**torch.load(files["vgg16"]), **torch.load(files["lpips"])}
    a, b = images(2, 33, 47), images(2, 33, 47, seed=1)
    shift, scale = torch.tensor([-.030, -.088, -.188]).view(3, 1, 1), torch.tensor([.458, .448, .450]).view(3, 1, 1)
    x, expected = torch.cat([(a - shift) / scale, (b - shift) / scale]), 0
    for i in VGG_CONVS:
        x = F.conv2d(x, file[f"features.{i}.weight"], file[f"features.{i}.bias"], padding=1).relu()
        if i in (2, 7, 14, 21, 28):
            unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
            weight = file[f"lin{(2, 7, 14, 21, 28).index(i)}.model.1.weight"]
            expected = expected + F.conv2d((unit[:2] - unit[2:]) ** 2, weight).mean((1, 2, 3))
            x = F.max_pool2d(x, 2, 2)
    net = load_lpips(files["lpips"], files["vgg16"])
    torch.testing.assert_close(net(a, b), expected, rtol=1e-4, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(a, b), net(b, a)) and net(a.bfloat16(), b).dtype == torch.float32
        torch.testing.assert_close(net(a, b), expected, rtol=1e-4, atol=1e-6)
    assert net(a, a).tolist() == [0, 0]


def test_lpips_gradient(files):
    """Weights that gather gradients, a gradient that stops, 0 / 0 where every channel is dead."""
    net = load_lpips(files["lpips"], files["vgg16"])
    a, b = images(2, 16, 16).requires_grad_(), images(2, 16, 16, seed=1)
    net(a, b).sum().backward()
    assert a.grad.abs().amax((1, 2, 3)).min() > 0 and b.grad is None
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        net.features[0].bias.fill_(-1e3)
        net.features[2].bias.fill_(-1e3)
    a.grad = None
    distance = net(a, b)
    distance.sum().backward()
    assert distance.isfinite().all() and a.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# DINOv2

def reference_dinov2(file, x, depth, heads, patch, grid, **_):
    """DINOv2 from the names in its file: x (B,3,H,W) in [0,1], sides multiples of the patch -> class token (B,D)."""
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], file[f"{name}.weight"], file[f"{name}.bias"], eps=1e-6)
    linear = lambda x, name: x @ file[f"{name}.weight"].T + file[f"{name}.bias"]
    x = (x - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    (B, _, H, W), D = x.shape, file["cls_token"].shape[-1]
    h, w = H // patch, W // patch
    x = x.view(B, 3, h, patch, w, patch).permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, -1)
    x = x @ file["patch_embed.proj.weight"].flatten(1).T + file["patch_embed.proj.bias"]
    position = file["pos_embed"]
    if (h, w) != (grid, grid):
        table = position[0, 1:].T.reshape(1, D, grid, grid)
        table = F.interpolate(table, scale_factor=((h + 0.1) / grid, (w + 0.1) / grid), mode="bicubic").flatten(2)
        position = torch.cat([position[:, :1], table.transpose(1, 2)], 1)
    x = torch.cat([file["cls_token"].expand(B, -1, -1), x], 1) + position
    for i in range(depth):
        y = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv").view(B, -1, 3, heads, D // heads)
        q, k, v = y.permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(2, 3) / (D // heads) ** 0.5).softmax(-1) @ v
        x = x + file[f"blocks.{i}.ls1.gamma"] * linear(y.transpose(1, 2).flatten(2), f"blocks.{i}.attn.proj")
        y = F.gelu(linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1"))
        x = x + file[f"blocks.{i}.ls2.gamma"] * linear(y, f"blocks.{i}.mlp.fc2")
    return norm(x, "norm")[:, 0]


@pytest.mark.parametrize("size", ((70, 70), (28, 98), (140, 42), (14, 14)))
def test_dinov2_as_published(files, size):
    """ls1 for ls2, another LayerNorm eps, heads mixed up, height for width, the 0.1 of the published position table left out."""
    x = images(2, *size)
    expected = reference_dinov2(torch.load(files["dinov2"]), (x + 1) / 2, **SMALL_DINO)
    torch.testing.assert_close(load_dinov2(files["dinov2"])(x), expected, rtol=1e-4, atol=1e-5)


def test_dinov2_takes_any_size(files):
    """An odd side that is cut or padded rather than resized; `side` ignored; a model that trains."""
    net, x = load_dinov2(files["dinov2"]), images(2, 33, 50)
    resized = lambda *size: F.interpolate(x, size, mode="bicubic", antialias=True)
    torch.testing.assert_close(net(x), net(resized(28, 56)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(x, 42), net(resized(42, 42)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(x, 42), net(x, 56), atol=1e-3)
    assert not net.training and not any(p.requires_grad for p in net.parameters())


def test_distillation_is_equation_10(files):
    """Student and teacher swapped, a temperature on one side only, a mean over channels."""
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 20, generator=g, dtype=torch.float64) * 8 for _ in range(2))
    student.requires_grad_()
    loss = distill_loss(student, teacher)
    kl = F.kl_div((student / 4).log_softmax(-1), (teacher / 4).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(loss, 16 * kl)
    equation = -16 * ((teacher / 4).softmax(-1) * (student / 4).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, equation)))
    assert abs(distill_loss(teacher, teacher).item()) < 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# Weight selection

def small_encoder(**changes):
    from test_tokenizer import small_config
    torch.manual_seed(1)
    encoder = Encoder(small_config(**changes))
    for p in encoder.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return encoder


def test_selection_takes_spaced_elements(files):
    """q filled from k or v, heads cut across, rows and columns of a residual dimension that no longer match."""
    large, encoder = load_dinov2(files["dinov2"]), small_encoder()                       # 48, 4 heads, 4 blocks -> 16, 2, 3
    select_weights(encoder, large)
    D, blocks = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45], [0, 1, 2]  # 48 / 16 = 3; floor(i 4 / 3)
    rows = [h * 12 + j for h in (0, 2) for j in (0, 1, 3, 4, 6, 7, 9, 10)]               # heads 0 and 2 of 4; 8 of 12 in each
    hidden = [3 * i for i in range(64)]
    for ours, i in zip(encoder.blocks, blocks):
        theirs, qkv = large.blocks[i], [p * 48 + r for p in range(3) for r in rows]
        assert torch.equal(ours.attn.qkv.weight, theirs.attn.qkv.weight[qkv][:, D])
        assert torch.equal(ours.attn.qkv.bias, theirs.attn.qkv.bias[qkv])
        assert torch.equal(ours.attn.proj.weight, theirs.attn.proj.weight[D][:, rows])
        assert torch.equal(ours.mlp.up.weight, theirs.mlp.up.weight[hidden][:, D])
        assert torch.equal(ours.mlp.down.weight, theirs.mlp.down.weight[D][:, hidden])
        for name in ("norm1.weight", "norm2.bias", "scale1", "scale2", "attn.proj.bias", "mlp.down.bias"):
            assert torch.equal(ours.get_parameter(name), theirs.get_parameter(name)[D]), name
    assert torch.equal(encoder.norm.bias, large.norm.bias[D]) and torch.equal(encoder.cls, large.cls[..., D])


def test_selection_between_equals_copies(files):
    """A parameter left at random: with equal sizes the transformer must be DINOv2's own."""
    large = load_dinov2(files["dinov2"])
    encoder = small_encoder(width=48, base=24, norm_groups=4, heads=4, depth=4, dec_width=48)
    stem = {name: p.clone() for name, p in encoder.named_parameters() if name.startswith(("stem", "to_bits"))}
    select_weights(encoder, large)
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0))
    for a, b in zip(encoder.blocks, large.blocks):
        torch.testing.assert_close(a(x)[0], b(x)[0], rtol=1e-4, atol=1e-3)               # their eps differ
    assert torch.equal(encoder.norm.weight, large.norm.weight) and torch.equal(encoder.cls, large.cls)
    assert all(torch.equal(encoder.get_parameter(name), p) and p.requires_grad for name, p in stem.items())


# ---------------------------------------------------------------------------------------------------------------------
# InceptionV3

def small_inception(path, shrink=16):
    state = {name.removeprefix("trunk."): w for name, w in FIDInception(shrink).state_dict().items()}
    filled = random_tensors({name: w.shape for name, w in state.items() if w.dim() > 0})
    torch.save({**state, **filled}, path)
    return load_inception(str(path), shrink=shrink)


def test_inception_as_published(tmp_path):
    """Maximum for average in a branch's pooling (or TensorFlow's average with the padding), 1x7 for 7x1, branches out of order.

    The expected numbers are this network's own, from the day when at full width it equalled pytorch-fid's (test_peers.py).
    """
    net = FIDInception(shrink=16)
    noise = lambda n, k: (torch.sin(torch.arange(n, dtype=torch.float64) * 12.9898 + k) * 43758.5453).frac()    # in (-1,1)
    state = {}
    for k, (name, w) in enumerate(net.state_dict().items()):
        if w.dim() > 0:
            scale = (3 * 2 / w[0].numel()) ** 0.5 if w.dim() > 1 else 0.3
            value = noise(w.numel(), k).view(w.shape).float() * scale
            state[name.removeprefix("trunk.")] = value + name.endswith(("var", "bn.weight"))
    torch.save(state, tmp_path / "inception.pth")
    features, logits = load_inception(str(tmp_path / "inception.pth"), shrink=16)(noise(3 * 24 * 31, 0).view(1, 3, 24, 31))
    expected = [1.65318, 0.05708, 0.09051, 2.38822, 0.0, 0.02722, 0.01966, 1.78508]
    torch.testing.assert_close(features[0, ::16], torch.tensor(expected), rtol=1e-3, atol=1e-4)
    expected = [-1.37122, -0.42558, 0.43796, -1.68781, -1.13043, -2.04889]
    torch.testing.assert_close(logits[0, ::200], torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_inception_convention(tmp_path):
    """Features under autocast, statistics of the batch, another resize, a bias in the logits, gradients kept."""
    net, x = small_inception(tmp_path / "inception.pth"), images(3, 40, 61)
    features, logits = net(x)
    assert features.shape == (3, 128) and logits.shape == (3, 1008)
    with torch.autocast("cpu", torch.bfloat16):
        again = net(x[:1])
    torch.testing.assert_close(again, (features[:1], logits[:1]), rtol=1e-4, atol=1e-6)
    assert again[0].dtype == torch.float32
    resized = F.interpolate((x + 1) / 2, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    torch.testing.assert_close(net(resized)[0], features, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(logits, features @ net.fc.weight.T)
    assert not net.training and not any(p.requires_grad for p in net.parameters()) and not features.requires_grad
    assert (features.std(0) > 0).float().mean() > 0.5, "the images make no difference"


def test_inception_refuses_wrong_files(tmp_path):
    """torchvision's own InceptionV3 (1,000 classes, an auxiliary head) taken for FID's."""
    small_inception(tmp_path / "inception.pth")
    state = torch.load(tmp_path / "inception.pth")
    for change, word in (({"fc.weight": torch.zeros(1000, 128)}, "fc.weight has shape"),
                         ({"AuxLogits.fc.bias": torch.zeros(9)}, "AuxLogits.fc.bias is unknown")):
        torch.save({**state, **change}, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=f"--inception-weights.*{word}"):
            load_inception(str(tmp_path / "wrong.pth"), shrink=16)


# ---------------------------------------------------------------------------------------------------------------------
# Training with all of them

def test_training_with_the_full_versions(files, tmp_path):
    """A teacher or LPIPS inside the checkpoint, the optimizer or the EMA; a resume that selects weights anew or differs."""
    from test_tokenizer import flags, result, same
    full = dict(perceptual="lpips", lpips_weights=files["lpips"], vgg_weights=files["vgg16"], align="dinov2", init="dinov2",
                teacher_weights=files["dinov2"], teacher_size=28, disc_start=100)
    tokenizer.main(flags(tmp_path / "whole", max_steps=3, **full))
    state, rows = result(tmp_path / "whole")
    assert all(math.isfinite(row[name]) and row[name] > 0 for row in rows for name in ("perceptual", "align"))
    alone = MergeVQ(TokenizerConfig(**state["config"]))
    assert list(state["model"]) == list(state["ema"]) == list(alone.state_dict())
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == len(list(alone.parameters()))
    assert state["model"]["align_head.2.bias"].shape == (48,), "as many outputs as the teacher"
    selected = torch.load(files["dinov2"])["norm.weight"][::3]
    assert (state["model"]["encoder.norm.weight"] - selected).abs().max() < 0.02, "training did not start from DINOv2"

    tokenizer.main(flags(tmp_path / "parts", max_steps=1, **full))
    tokenizer.main(flags(tmp_path / "parts", max_steps=3, **full, resume=True))
    same(result(tmp_path / "parts")[0]["model"], state["model"])
