"""The networks of public weight files against the public packages, at full size and random weights. Skipped where these are not
installed; none of them is needed to run anything here:

    pip install torchvision lpips pytorch-fid "transformers>=5" && python -m pytest -q tests/test_peers.py
"""

import os
import sys

import pytest
import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import tokenizer
from eval import FIDInception, load_inception
from test_weights import dino_shapes, images, random_tensors
from tokenizer import load_dinov2, load_lpips


def assert_equal(a, b):
    """To 1e-4 of the largest value."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())


@torch.no_grad()
def test_lpips(tmp_path):
    """A distance that is not comparable with published LPIPS numbers. The heads are the package's own file, v0.1."""
    lpips = pytest.importorskip("lpips")
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    trunk = {f"features.{name}": w for part in theirs.net.children() for name, w in part.state_dict().items()}
    torch.save(trunk, tmp_path / "vgg16.pth")
    ours = load_lpips(os.path.join(os.path.dirname(lpips.__file__), "weights/v0.1/vgg.pth"), tmp_path / "vgg16.pth")
    for size in ((64, 64), (47, 81), (33, 16)):
        a, b = images(2, *size), images(2, *size, seed=1)
        assert_equal(ours(a, b), theirs(a, b).flatten())


@torch.no_grad()
def test_inception(tmp_path, monkeypatch):
    """Features or logits that are not pytorch-fid's: it loads the same file, strictly, and its fc layer adds a bias."""
    package = pytest.importorskip("pytorch_fid.inception")
    state = {name.removeprefix("trunk."): w for name, w in FIDInception().state_dict().items()}
    state = {**state, **random_tensors({name: w.shape for name, w in state.items() if w.dim() > 0})}
    torch.save(state, tmp_path / "inception.pth")
    monkeypatch.setattr(package, "load_state_dict_from_url", lambda *a, **k: state)
    ours, theirs, fc = load_inception(tmp_path / "inception.pth"), package.InceptionV3([3]).eval(), package.fid_inception_v3().fc
    for size in ((64, 64), (211, 333)):
        x = images(2, *size)
        features, logits = ours(x)
        expected = theirs((x + 1) / 2)[0].flatten(1)
        assert_equal(features, expected)
        assert_equal(logits + fc.bias, fc(expected))


@torch.no_grad()
@pytest.mark.parametrize("size", ((518, 518), (98, 182), (28, 42)))
def test_dinov2(tmp_path, monkeypatch, size):
    """A teacher that is not DINOv2. transformers stretches the position table by the size alone; the published models by the
    size + 0.1, which this test puts in its place."""
    package = pytest.importorskip("transformers")
    width, heads = 192, 3  # of ViT-Ti: an eighth of the time
    monkeypatch.setattr(tokenizer, "DINOV2", dict(tokenizer.DINOV2, width=width, heads=heads))
    state = random_tensors(dino_shapes(**tokenizer.DINOV2))
    torch.save(state, tmp_path / "dinov2.pth")
    config = package.Dinov2Config(hidden_size=width, num_hidden_layers=12, num_attention_heads=heads, patch_size=14,
                                  image_size=518)
    theirs, renamed = package.Dinov2Model(config).eval(), {}
    for name, w in state.items():
        for a, b in (("cls_token", "embeddings.cls_token"), ("mask_token", "embeddings.mask_token"),
                     ("pos_embed", "embeddings.position_embeddings"),
                     ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
                     ("blocks.", "encoder.layer."), ("attn.proj", "attention.o_proj"), ("attn.", "attention."),
                     ("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")):
            name = name.replace(a, b)
        name = "layer" + name if name.startswith("norm.") else name
        parts = w.chunk(3) if ".qkv." in name else [w]
        renamed.update({name.replace("qkv", f"{n}_proj"): part for n, part in zip("qkv", parts)})
    theirs.load_state_dict(renamed)

    def stretch(embeddings, height, width):
        position = state["pos_embed"]
        if (height, width) == (518, 518):
            return position
        table = position[:, 1:].transpose(1, 2).unflatten(2, (37, 37))
        table = F.interpolate(table, scale_factor=((height // 14 + 0.1) / 37, (width // 14 + 0.1) / 37), mode="bicubic")
        return torch.cat([position[:, :1], table.flatten(2).transpose(1, 2)], 1)

    theirs.embeddings.interpolate_pos_encoding = stretch
    x = images(1, *size)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert_equal(load_dinov2(tmp_path / "dinov2.pth")(x), theirs(((x + 1) / 2 - mean) / std).last_hidden_state[:, 0])
