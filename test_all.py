"""Every test. `pytest -q test_all.py` takes a few minutes on two CPU cores and needs neither a GPU nor a network."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import data
import mae

HERE = Path(__file__).parent
TINY = dict(size="nano", image_size=32, patch_size=8, decoder_dim=32, decoder_depth=1, decoder_heads=2)
TINY_FLAGS = ["--recipe", "demo", "--image-size", "32", "--decoder-dim", "32", "--decoder-depth", "1",
              "--decoder-heads", "2", "--batch-size", "8", "--workers", "0", "--log-every", "1", "--device", "cpu"]


def tiny_mae(**changes):
    torch.manual_seed(0)
    return mae.MAE(**{**TINY, **changes})


def run(*arguments, processes=None):
    """Run a script as a user does; returns the finished process, its output as text."""
    start = [sys.executable]
    if processes:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*start, *map(str, arguments)], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1" if processes else "2"})


def main(monkeypatch, *arguments):
    """The same in this process, which saves the seconds of importing torch."""
    monkeypatch.setattr(sys, "argv", ["mae.py", *map(str, arguments)])
    mae.main()


def losses(out):
    return [json.loads(line)["loss"] for line in Path(out, "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A labelled folder: 2 classes, 12 training and 6 test images each; one is grey, one transparent, one broken."""
    root = tmp_path_factory.mktemp("images")
    source = data.Photographs(True)
    for split, count in (("train", 12), ("test", 6)):
        for label, name in ((0, "astronaut"), (4, "coffee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = source[label * 400 + i + (100 if split == "test" else 0)][0]
                image = image.convert("L") if i == 0 else image.convert("RGBA") if i == 1 else image
                image.save(root / split / name / f"{i}.png")
    (root / "train/coffee/7.png").write_bytes((root / "train/coffee/8.png").read_bytes()[:2000])
    return root


@pytest.fixture(scope="session")
def checkpoint(folder, tmp_path_factory):
    """A pre-trained checkpoint, made by the command line."""
    out = tmp_path_factory.mktemp("run") / "mae"
    done = run("mae.py", "--data", folder, "--out", out, "--steps", 3, *TINY_FLAGS)
    assert done.returncode == 0, done.stderr
    assert (out / "reconstruction.png").exists() and len(losses(out)) == 3
    assert done.stderr.count("coffee/7.png") == 1 and "1 of 24 files could not be read" in done.stderr
    assert "before training" in done.stdout and str(out / "last.pt") in done.stdout
    return out / "last.pt"


# -------------------------------------------------------------------------------------------------------------- blocks


def test_patchify_orders_by_row_column_channel_and_comes_back():
    images = torch.arange(2 * 3 * 8 * 12.0).reshape(2, 3, 8, 12)
    patches = common.patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    for row, column, channel in [(0, 0, 0), (1, 3, 2), (3, 2, 1)]:  # within patch 4: the second row, the second column
        assert patches[1, 4, (row * 4 + column) * 3 + channel] == images[1, channel, 4 + row, 4 + column]
    assert torch.equal(common.unpatchify(patches, 4, (2, 3)), images)


def test_sincos_positions_against_numbers_by_hand():
    table = common.sincos_2d(8, (2, 3))
    assert table.shape == (6, 8)
    # Row 1, column 2. Width 8: 4 numbers for the column, then 4 for the row, with the frequencies 1 and 1/100.
    by_hand = [math.sin(2), math.sin(0.02), math.cos(2), math.cos(0.02),
               math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    assert torch.allclose(table[5], torch.tensor(by_hand), atol=1e-7)

    table = common.sincos_3d(16, (2, 2, 3))  # 6 numbers for each of time, row, column, cut to 16
    code = lambda x: [f(x / 10000 ** (i / 3)) for f in (math.sin, math.cos) for i in range(3)]
    assert torch.allclose(table[11], torch.tensor((code(1) + code(1) + code(2))[:16]), atol=1e-7)


def test_positions_are_interpolated_and_the_class_row_is_kept():
    table = F.pad(common.sincos_2d(16, (4, 4)), (0, 0, 1, 0))[None]
    assert common.resize_positions(table, (4, 4), (4, 4)) is table
    larger = common.resize_positions(table, (4, 4), (6, 8))
    assert larger.shape == (1, 49, 16) and torch.equal(larger[:, 0], table[:, 0])
    times = torch.linspace(0, 1, 4).repeat_interleave(4)[None, :, None]  # (1, 4 times of 2 x 2, 1)
    assert torch.allclose(common.resize_positions(times, (4, 2, 2), (2, 2, 2))[0, ::4, 0], torch.tensor([1 / 6, 5 / 6]))


@pytest.mark.parametrize("size, patch, encoder, whole", [
    ("base", 16, 85.80, 111.91), ("large", 16, 303.30, 329.54), ("huge", 14, 630.76, 657.07)])
def test_parameter_counts_of_the_published_models(size, patch, encoder, whole):
    with torch.device("meta"):
        counts = [sum(p.numel() for p in model(size, patch_size=patch).parameters()) for model in (common.ViT, mae.MAE)]
    assert [round(count / 1e6, 2) for count in counts] == pytest.approx([encoder, whole], abs=0.011)


def test_names_are_those_of_the_published_files():
    names = set(tiny_mae().state_dict())
    block = {f"{part}.{kind}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
             for kind in ("weight", "bias")}
    both = {f"{part}.{kind}" for part in ("patch_embed.proj", "norm", "decoder_embed", "decoder_norm", "decoder_pred")
            for kind in ("weight", "bias")}
    assert names == {"cls_token", "pos_embed", "mask_token", "decoder_pos_embed"} | both | {
        f"blocks.{i}.{name}" for i in range(4) for name in block} | {f"decoder_blocks.0.{name}" for name in block}
    classifier = set(common.ViT("nano", pool="mean", num_classes=5).state_dict())
    assert {"fc_norm.weight", "head.weight"} < classifier and "norm.weight" not in classifier


def test_video_vit_has_a_token_per_tubelet():
    vit = common.ViT("nano", 32, 8, frames=4, tubelet=2, class_token=False, pool="mean", num_classes=3)
    assert vit.patch_embed.proj.weight.shape == (128, 3, 2, 8, 8)
    assert vit.tokens(torch.randn(2, 3, 4, 32, 32)).shape == (2, 2 * 4 * 4, 128)
    assert vit(torch.randn(2, 3, 4, 32, 32)).shape == (2, 3)


def test_drop_path_skips_whole_samples_and_only_in_training():
    block, x = common.Block(16, 2, drop_path=0.9), torch.randn(64, 3, 16)
    unchanged = (block(x) == x).flatten(1).all(1).float().mean()
    assert 0.6 < unchanged < 0.95  # 0.9 squared, since both branches have to be skipped
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


# ---------------------------------------------------------------------------------------------------- masking and loss


@pytest.mark.parametrize("masking", ["random", "block", "grid"])
@pytest.mark.parametrize("ratio, kept", [(0.75, 49), (0.5, 98), (0.4, 117)])
def test_masks_have_the_asked_number(masking, ratio, kept):
    noise = mae.MASKINGS[masking](64, (14, 14), ratio, torch.Generator().manual_seed(0), "cpu")
    visible = noise.argsort(1)[:, :kept]
    assert mae.kept_patches((14, 14), ratio) == kept
    if masking == "grid":  # a regular pattern
        keeps = torch.zeros(64, 196).scatter(1, visible, 1).view(64, 7, 2, 7, 2).sum((2, 4))
        assert ratio == 0.4 or torch.equal(keeps, torch.full_like(keeps, {0.75: 1, 0.5: 2}[ratio]))
    else:  # each sample has its own
        assert len({tuple(sorted(row)) for row in visible.tolist()}) == 64
    again = mae.MASKINGS[masking](64, (14, 14), ratio, torch.Generator().manual_seed(0), "cpu")
    assert torch.equal(noise, again)


def test_block_masks_are_blocks():
    def edges(masking):
        noise = mae.MASKINGS[masking](64, (14, 14), 0.5, torch.Generator().manual_seed(0), "cpu")
        hidden = (noise.argsort(1).argsort(1) >= 98).view(64, 14, 14)
        return sum((hidden.diff(dim=d)).sum() for d in (1, 2)).item()
    assert edges("block") < 0.5 * edges("random")


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_equals_the_obvious_computation_and_ignores_visible_patches(norm_pix_loss):
    model, images = tiny_mae(norm_pix_loss=norm_pix_loss), torch.randn(3, 3, 32, 32)
    loss, pred, mask = model(images, 0.75)
    assert mask.sum(1).tolist() == [12] * 3
    errors = []
    for b in range(3):
        for patch in range(16):
            if mask[b, patch]:
                top, left = patch // 4 * 8, patch % 4 * 8
                target = images[b, :, top:top + 8, left:left + 8].permute(1, 2, 0).flatten()
                if norm_pix_loss:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                errors.append(((pred[b, patch] - target) ** 2).mean())
    assert torch.allclose(loss, torch.stack(errors).mean(), atol=1e-6)
    visible = pred * (1 - mask[..., None])
    assert torch.autograd.grad(loss, pred)[0].mul(1 - mask[..., None]).abs().max() == 0 and visible.abs().max() > 0


def test_encoder_never_sees_a_hidden_patch():
    model, images, noise = tiny_mae().eval(), torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    latent, mask, _ = model.encode(images, 0.75, noise)
    pixels = mask.view(4, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed, *_ = model.encode(images + 100 * pixels * torch.randn_like(images), 0.75, noise)
    assert latent.shape == (4, 1 + 4, 128) and torch.equal(latent, changed)
    visible, *_ = model.encode(images + (1 - pixels), 0.75, noise)
    assert not torch.allclose(latent, visible)


def test_gradient_reaches_every_parameter():
    model = tiny_mae()
    model(torch.randn(2, 3, 32, 32))[0].backward()
    for name, parameter in model.named_parameters():
        if name in ("pos_embed", "decoder_pos_embed"):
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_initialisation():
    model = mae.MAE("base")
    bound = math.sqrt(6 / (768 + 3 * 256))  # xavier-uniform of the flattened patch projection
    assert model.patch_embed.proj.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.pos_embed[:, 0].abs().max() == 0 and model.blocks[3].attn.qkv.bias.abs().max() == 0


def test_images_of_any_shape_and_channels():
    model = tiny_mae(image_size=(32, 48), channels=5)
    loss, pred, mask = model(torch.randn(2, 5, 32, 48))
    assert pred.shape == (2, 24, 320) and mask.shape == (2, 24) and torch.isfinite(loss)


# ------------------------------------------------------------------------------------------------- schedule, optimizer


def test_cosine_schedule():
    values = [common.cosine(step, 100, 10, 2.0, 0.5) for step in (0, 5, 10, 55, 100)]
    assert values == pytest.approx([0.0, 1.0, 2.0, 1.25, 0.5])


def test_layer_decay_and_weight_decay():
    vit = common.ViT("nano", 32, 8, pool="mean", num_classes=3)
    vit.pos_embed.requires_grad_(True)
    groups = common.parameter_groups(vit, 0.05, 0.5, no_decay=("cls_token", "pos_embed"))
    scale = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {name: scale[id(p)] for name, p in vit.named_parameters()}
    assert len(scale) == len(found)
    assert found["patch_embed.proj.weight"] == (0.5 ** 5, 0.05)
    assert found["pos_embed"] == found["cls_token"] == (0.5 ** 5, 0.0)
    assert found["blocks.0.attn.qkv.weight"] == (0.5 ** 4, 0.05) and found["blocks.3.mlp.fc1.bias"] == (0.5, 0.0)
    assert found["head.weight"] == (1.0, 0.05) and found["fc_norm.weight"] == (1.0, 0.0)


def test_ridge_probe_and_exact_accuracy():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator)
    labels = torch.arange(300) % 3
    x = centres[labels] + 0.1 * torch.randn(300, 8, generator=generator)
    assert common.ridge_probe(x[:150], labels[:150], x[150:], labels[150:]) == 100
    noise = torch.randn(300, 8, generator=generator)
    assert common.ridge_probe(noise[:150], labels[:150], noise[150:], labels[150:]) < 60

    logits = torch.eye(6)[[0, 1, 2, 3]]  # top-1 right for 2 of the 3 that count
    batches = [(logits[:2], torch.tensor([0, 1])), (logits[2:], torch.tensor([5, -1]))]
    autocast, _ = common.precision_of(_args(precision=None), torch.device("cpu"))
    top1, top5 = common.accuracy(torch.nn.Identity(), batches, torch.device("cpu"), autocast)
    assert top1 == pytest.approx(200 / 3)


def _args(**values):
    return type("Args", (), values)()


# ---------------------------------------------------------------------------------------------------------------- data


def test_every_epoch_has_each_image_once_and_processes_share_each_batch():
    args = _args(batch_size=8, steps=15, accumulate=2, seed=3)
    parts = [list(data.step_batches(20, args, 0, rank, 2)) for rank in (0, 1)]
    whole = list(data.step_batches(20, _args(batch_size=8, steps=15, accumulate=1, seed=3), 0, 0, 1))
    assert len(whole) == 15 and all(len(batch) == 8 for batch in whole)
    drawn = [index for batch in whole for index, _ in batch]
    assert all(sorted(drawn[i:i + 20]) == list(range(20)) for i in range(0, 120, 20))
    assert drawn[:20] != drawn[20:40]
    for step, batch in enumerate(whole):  # two processes with two passes each see the same batch
        assert [x for part in (2 * step, 2 * step + 1) for rank in (0, 1) for x in parts[rank][part]] == batch
    assert list(data.step_batches(20, _args(batch_size=8, steps=15, accumulate=1, seed=3), 6, 0, 1)) == whole[6:]


def test_augmentation_depends_on_the_seed_alone():
    source = data.Photographs(True)
    augmentation = data.strong_augmentation(32, data.IMAGENET_MEAN, data.IMAGENET_STD, 9, 0.25)
    first = data.Samples(source, augmentation, seed=1)
    args = _args(batch_size=6, steps=2, accumulate=1, seed=1, workers=0)
    runs = []
    for args.workers in (0, 2):
        torch.manual_seed(args.workers)
        runs.append(torch.cat([x for x, _ in data.training_loader(first, args, 0, 0, 1, torch.device("cpu"))]))
    assert torch.equal(*runs)
    assert not torch.equal(first[0, 5][0], first[0, 6][0])


def test_training_and_validation_pictures_are_disjoint_regions():
    train, val = data.Photographs(True), data.Photographs(False)
    for name, a, b in zip(train.classes, train.regions, val.regions):
        whole = getattr(__import__("skimage.data").data, name)()
        height, width = (whole[0] if isinstance(whole, tuple) else whole).shape[:2]
        sums = (a.width + b.width, a.height) if width >= height else (a.width, a.height + b.height)
        assert sums == (width, height)
    assert train[2999][1] == 7 and np.array_equal(np.asarray(train[7][0]), np.asarray(train[7][0]))


def test_centre_crop():
    image = Image.fromarray(np.arange(3 * 64 * 96, dtype=np.uint8).reshape(64, 96, 3))
    assert data.CentreCrop((32, 40), [0.0], [1.0])(image).shape == (3, 32, 40)
    untouched = data.CentreCrop((64, 96), [0.0], [1.0])(image)
    assert torch.allclose(untouched * 255, torch.from_numpy(np.array(image)).permute(2, 0, 1).float(), atol=1e-3)


def test_unreadable_images_are_replaced_in_training_and_left_out_of_tests(tmp_path, capsys):
    for i in range(3):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "0.png").read_bytes()[:40])
    source = data.ImageFiles(tmp_path)
    train, test = (data.Samples(source, data.CentreCrop(40, [0.0], [1.0]), replace=r) for r in (True, False))
    assert train[1, 0][0].max().item() == pytest.approx(2 / 255)
    assert test[1, 0][1] == -1 and test[2, 0][1] == 0
    train[1, 1]
    data.report_unreadable(source, torch.device("cpu"))
    error = capsys.readouterr().err
    assert error.count("skipped, since") == 1 and "1 of 3 files" in error


def test_many_channels_from_numpy_files(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", generator.normal(5.0, 2.0, (40, 40, 5)).astype(np.float32))
    out = tmp_path / "run"
    main(monkeypatch, "--data", tmp_path, "--channels", 5, "--out", out, "--steps", 2, *TINY_FLAGS)
    settings = common.read_checkpoint(out / "last.pt")["settings"]  # measured and stored with the run
    assert settings["mean"] == pytest.approx([5.0] * 5, abs=0.2) and settings["std"][0] < 2.5


# -------------------------------------------------------------------------------------------------------- checkpoints


def test_vit_takes_a_checkpoint_at_other_sizes_and_with_a_new_head(checkpoint):
    vit = common.ViT.load(checkpoint)
    images = torch.randn(2, 3, 32, 32)
    model = tiny_mae()
    model.load_state_dict(common.read_weights(checkpoint)[0])
    assert torch.equal(vit.tokens(images), model.tokens(images)) and vit(images).shape == (2, 128)
    classifier = common.ViT.load(checkpoint, image_size=(48, 64), pool="mean", num_classes=7)
    assert classifier(torch.randn(2, 3, 48, 64)).shape == (2, 7)
    assert torch.equal(classifier.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)
    torch.save({"model": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(common.UserError, match="evil.pt"):
        common.ViT.load(tmp_path / "evil.pt")
    assert not (tmp_path / "executed").exists()


# -------------------------------------------------------------------------------------------------------------- runs


def test_finetune_linprobe_and_show_by_command_line(checkpoint, folder, tmp_path):
    flags = ["--recipe", "demo", "--data", folder, "--init", checkpoint, "--batch-size", 8, "--workers", 0]
    strong = ["--mixup", 0.8, "--cutmix", 1, "--randaugment", 9, "--erasing", 0.25, "--drop-path", 0.1]
    done = run("mae.py", "finetune", *flags, *strong, "--out", tmp_path / "f", "--epochs", 1, "--image-size", "32x40")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "f/log.jsonl").read_text().splitlines()[-1])
    assert {"step", "loss", "lr", "top1", "top5"} <= set(record)
    done = run("mae.py", "finetune", "--eval-only", "--data", folder, "--init", tmp_path / "f/last.pt", "--workers", 0)
    assert done.returncode == 0 and f"top-1 {record['top1']:.2f}" in done.stdout, done.stderr

    done = run("mae.py", "linprobe", *flags, "--out", tmp_path / "l", "--steps", 3)
    assert done.returncode == 0, done.stderr
    before, after = common.read_weights(checkpoint)[0], common.read_weights(tmp_path / "l/last.pt")[0]
    assert torch.equal(before["blocks.0.attn.qkv.weight"], after["blocks.0.attn.qkv.weight"])  # frozen
    assert after["head.1.weight"].shape == (2, 128)

    image = next((folder / "test/coffee").glob("*.png"))
    done = run("mae.py", "show", "--init", checkpoint, "--image", image, "--out", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "s/reconstruction.png").width > 3 * 32


def test_a_run_goes_on_where_it_stopped_and_ends_the_same(folder, tmp_path, monkeypatch):
    flags = ["--data", folder, "--steps", 5, "--save-every", 2, *TINY_FLAGS]
    main(monkeypatch, "--out", tmp_path / "whole", *flags)
    write = common.Log.write

    def interrupt(log, **values):
        write(log, **values)
        if log.step == 3:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Log, "write", interrupt)
        main(patch, "--out", tmp_path / "parts", *flags)
    main(monkeypatch, "--out", tmp_path / "parts", *flags)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 5
    ends = [common.read_weights(tmp_path / name / "last.pt")[0] for name in ("whole", "parts")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_processes_and_accumulation_do_not_change_the_run(folder, tmp_path, monkeypatch):
    flags = ["--data", folder, "--steps", 4, "--clip-grad", 1.0, *TINY_FLAGS]
    main(monkeypatch, "--out", tmp_path / "one", *flags)
    main(monkeypatch, "--out", tmp_path / "accumulated", "--accumulate", 4, *flags)
    done = run("mae.py", "--out", tmp_path / "two", *flags, processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("accumulated", "two"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--compile"]])
def test_bf16_and_compile_agree_with_float32(folder, tmp_path, monkeypatch, flags):
    common_flags = ["--data", folder, "--steps", 2, *TINY_FLAGS]
    main(monkeypatch, "--out", tmp_path / "plain", *common_flags)
    main(monkeypatch, "--out", tmp_path / "other", *common_flags, *flags)
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


def test_the_frozen_features_improve(tmp_path):
    done = run("mae.py", "--steps", 400, "--out", tmp_path / "run", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    numbers = [float(word) for word in done.stdout.splitlines()[-1].replace(",", "").split() if word[0].isdigit()]
    before, after = numbers[-2:]
    assert after > before + 10 and losses(tmp_path / "run")[-1] < 0.8 * losses(tmp_path / "run")[0]


# ------------------------------------------------------------------------------------------------------------ bad input


def broken_checkpoint(path):
    (path / "broken.pt").write_bytes(b"not a checkpoint")
    return path / "broken.pt"


def other_checkpoint(path):
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, path / "other.pt")
    return path / "other.pt"


def empty_folder(path):
    (path / "empty").mkdir()
    return path / "empty"


def unreadable_folder(path):
    (path / "unreadable").mkdir()
    (path / "unreadable/a.jpg").write_text("no image")
    return path / "unreadable"


def unknown_class(path):
    for name in ("train/cat", "val/cat", "val/dog"):
        (path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(path / "classes" / name / "a.png")
    return path / "classes"


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "there is no folder nowhere"),
    (["--data", empty_folder], "no image below"),
    (["--data", unreadable_folder], "none of the images can be read"),
    (["finetune", "--data", empty_folder], "needs the folders train/"),
    (["finetune", "--data", unknown_class], "class folder dog"),
    (["--image-size", "65"], "not a multiple of the patch size"),
    (["--mask-ratio", "1"], "none or all"),
    (["--mask-ratio", "-0.1"], "is not a number from 0 to 1"),
    (["--batch-size", "0"], "is not a number from 1"),
    (["--mask-ratio", "0"], "none or all"),
    (["--mask-ratio", "0.99"], "none or all"),
    (["--init", "nowhere.pt"], "there is no checkpoint"),
    (["--init", broken_checkpoint], "is broken"),
    (["finetune", "--init", other_checkpoint], "not a checkpoint of a Vision Transformer"),
    (["--mean", "0.5"], "give both"),
    (["--batch-size", "7", "--accumulate", "2"], "cannot be shared"),
    (["--channels", "4"], "1 or 3 channels"),
    (["show"], "needs --init"),
    (["--mean", "0.5", "--std", "0.5"], "need 3 numbers"),
    (["--mixup", "0.8"], "pretrain does not use --mixup"),
    (["--decoder-heads", "3"], "not a multiple of 3 attention heads"),
    (["--epochs", "nan"], "is not a number"),
    (["finetune", "--randaugment", "40"], "is not a number from 0 to 10"),
    (["finetune", "--eval-only"], "needs --init"),
    (["--sizes=base"], "unrecognized arguments"),
])
def test_bad_input_gets_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    arguments = [a(tmp_path) if callable(a) else a for a in arguments]
    monkeypatch.setattr(sys, "argv", ["mae.py", *map(str, arguments), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit:
        common.run_main(mae.main)
    error = capsys.readouterr().err.strip().splitlines()
    assert exit.value.code == 2 and message in error[-1] and error[-1].startswith("mae.py: error:")
    assert not (tmp_path / "out").exists()


def test_a_run_with_other_settings_is_not_overwritten(checkpoint, folder, monkeypatch):
    before = checkpoint.read_bytes()
    with pytest.raises(common.UserError, match="steps 3 there, 4 now.*--fresh"):
        main(monkeypatch, "--data", folder, "--out", checkpoint.parent, "--steps", 4, *TINY_FLAGS)
    with pytest.raises(common.UserError, match=f"data {folder} there, None now"):
        main(monkeypatch, "--out", checkpoint.parent, "--steps", 3, *TINY_FLAGS)
    assert checkpoint.read_bytes() == before


def test_a_wrong_command_exits_with_2_and_no_traceback():
    done = run("mae.py", "--data", "nowhere")
    assert done.returncode == 2 and done.stderr == "mae.py: error: there is no folder nowhere\n"
