"""MAE: "Masked Autoencoders Are Scalable Vision Learners", He et al. 2021, arXiv 2111.06377.

Mask three quarters of an image's patches, encode the visible quarter, and let a small decoder fill
in the pixels of the masked ones, from the encoded tokens and a learned mask token. The encoder never
sees a mask token, which makes it both better and cheaper; the decoder is thrown away afterwards.

    images (B, C, H, W)
      | cut into L patches of P x P pixels, project, add positions          (B, L, D)
      | keep a random quarter, prepend the class token                      (B, 1 + L/4, D)
    encoder: ViT                                                            (B, 1 + L/4, D)
      | project, put mask tokens at the masked patches, add positions       (B, 1 + L, decoder_dim)
    decoder: a narrow ViT, then a linear layer to pixels                    (B, L, P*P*C)
      | squared error to the normalized pixels of the masked patches
    loss

    python mae.py                                  pre-train on the photographs of scikit-image
    torchrun --nproc_per_node=8 mae.py --data DIR  the paper's settings on your images, 8 GPUs
    python mae.py finetune --data DIR --init runs/mae/last.pt
    python mae.py linprobe --data DIR --init runs/mae/last.pt
    python mae.py show --init runs/mae/last.pt --image photo.jpg
    python mae.py --bands 0,1,2/3,4/5 --out runs/bands   SatMAE: six bands; --dates 3: three dates
"""
import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

import common
import data
from common import (Block, Fraction, PatchEmbed, UserError, ViT, cosine_schedule, gather_tokens,
                    patchify, scatter_tokens, sincos, sincos_1d, unpatchify)

# ------------------------------------------------- configuration: the published values, for ViT-B


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    size: common.Size = "base"  # size of the encoder
    image_size: common.ImageSize = 224  # pixels, a number or HEIGHTxWIDTH
    patch_size: int = 16  # side of a patch, pixels
    channels: int = 3  # channels of the images (with --bands, no --data and no --init: as many as those need)
    mean: tuple[float, ...] | None = None  # channel means, in the unit of the pixels (default: ImageNet's, or measured)
    std: tuple[float, ...] | None = None  # standard deviation of each channel (default: likewise)
    bands: str | None = None  # groups of channels with tokens of their own, as 0,1,2/3,4 (SatMAE)
    dates: int = 1  # images of each place, at different times, with tokens of their own (SatMAE)

    def __post_init__(self):
        super().__post_init__()  # of common.Training, Classification or Task, whichever comes next
        bands = sum(parse_bands(self.bands), ())
        if bands and self.dates > 1:
            raise ValueError("give --bands or --dates, not both")
        if len(set(bands)) < len(bands):
            raise ValueError(f"--bands {self.bands} has a band twice")
        if bands and not 0 <= min(bands) <= max(bands) < self.channels:
            raise ValueError(f"--bands {self.bands} is not among the {self.channels} channels, 0 to "
                             f"{self.channels - 1} (--channels)")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    decoder_dim: int = 512  # width of the decoder
    decoder_depth: int = 8  # blocks of the decoder
    decoder_heads: int = 16  # attention heads of the decoder
    masking: Literal["random", "block", "grid"] = "random"  # masking strategy
    mask_ratio: Fraction = 0.75  # fraction of the patches that are masked
    norm_pix_loss: bool = True  # targets normalized by mean and standard deviation of each patch
    consistent: bool = False  # the same mask in all groups of bands, or at all dates


@dataclass(frozen=True, kw_only=True)
class Pretrain(EncoderConfig, AutoencoderConfig, common.Pretraining):  # Table 8, normalized pixels
    epochs: float | None = 800
    batch_size: int = 4096
    base_lr: float = 1.5e-4
    warmup: Fraction = 40 / 800
    weight_decay: float = 0.05  # weight decay of AdamW
    out: str = "runs/mae"


@dataclass(frozen=True, kw_only=True)
class Finetune(EncoderConfig, common.Classification):  # FINETUNE.md of the published code; Table 9 differs
    pool: Literal["class", "mean"] = "mean"  # pooling: the class token or the mean of patch tokens
    epochs: float | None = 100
    batch_size: int = 1024
    base_lr: float = 5e-4
    warmup: Fraction = 5 / 100
    weight_decay: float = 0.05  # weight decay of AdamW
    layer_decay: Fraction = 0.65  # layer-wise learning-rate decay
    drop_path: Fraction = 0.1  # drop path (stochastic depth) rate, rising linearly to the last block
    randaugment: common.Magnitude = 9.0  # magnitude of RandAugment, 0 to 10; needs 1 or 3 channels
    erasing: Fraction = 0.25  # probability of random erasing
    mixup: float = 0.8  # alpha of MixUp
    cutmix: float = 1.0  # alpha of CutMix
    out: str = "runs/mae-finetune"


@dataclass(frozen=True, kw_only=True)
class Linprobe(EncoderConfig, common.Classification):  # Table 10, but SGD for LARS
    pool: Literal["class", "mean"] = "class"  # pooling: the class token or the mean of patch tokens
    epochs: float | None = 90
    batch_size: int = 16384
    base_lr: float = 0.1
    min_lr: float = 0.0
    warmup: Fraction = 10 / 90
    weight_decay: float = 0.0  # weight decay of SGD
    smoothing: Fraction = 0.0
    out: str = "runs/mae-linprobe"


@dataclass(frozen=True, kw_only=True)
class Show(EncoderConfig, AutoencoderConfig, common.Task):
    norm_pix_loss: bool = False  # predictions normalized per patch (default: as the checkpoint says, else no)
    image: str | None = None  # photograph or other image, with --dates a folder of them (default: some of --data)
    out: str = "runs/mae-show"  # folder of the picture


# ------------------------------------------------------------------------------------------ masking
# A mask is a boolean tensor (L,), True = masked, with int(L * (1 - ratio)) visible patches.
# `data.Samples` seeds the generator that draws it; `data.Loader` turns it into token indices.


def random_mask(grid: tuple[int, ...], ratio: float) -> Tensor:
    """A random sample of the patches without replacement stays visible (Section 3, "Masking")."""
    length = math.prod(grid)
    mask = torch.ones(length, dtype=torch.bool)
    mask[torch.randperm(length)[:int(length * (1 - ratio))]] = False
    return mask


def grid_mask(grid: tuple[int, int], ratio: float) -> Tensor:
    """Keeps the same patch of every 2 x 2 at the ratio 0.75 (Figure 6); at 0.5 a chessboard."""
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    rank = (row + column) % 2 * 2 + row % 2  # in each 2 x 2: 0 and 1 on a diagonal, then 2 and 3
    order = (rank.flatten() + torch.rand(math.prod(grid))).argsort()  # at random within a rank
    mask = torch.ones(len(order), dtype=torch.bool)
    mask[order[:int(len(order) * (1 - ratio))]] = False
    return mask


def block_mask(grid: tuple[int, int], ratio: float) -> Tensor:
    """Masks blocks of about a fifth of the number or more (Figure 6), by BEiT's rule."""
    length = math.prod(grid)
    number = length - int(length * (1 - ratio))
    return data.blockwise_mask((1, *grid), number, min_area=number // 5)


MASKS = {"random": random_mask, "block": block_mask, "grid": grid_mask}


def draw_mask(config: Pretrain | Show, grid: tuple[int, int], position: int) -> Tensor:
    """The mask of a sample, (L,), or of S slices (SatMAE), (S * L,); `position` is not used."""
    draw, slices = MASKS[config.masking], len(parse_bands(config.bands)) or config.dates
    if config.consistent:
        return draw(grid, config.mask_ratio).repeat(slices)
    if config.masking == "random":  # among all tokens; the SatMAE paper found it better than --consistent
        return draw((slices, *grid), config.mask_ratio)
    return torch.cat([draw(grid, config.mask_ratio) for _ in range(slices)])


# -------------------------------------------------------------------------------------------- model


class MAE(ViT):
    """A ViT, the encoder, with a decoder. norm_pix_loss: targets are normalized per patch."""

    def __init__(self, size: str = "base", image_size: int | tuple[int, int] = 224,
                 patch_size: int = 16, channels: int = 3, norm_pix_loss: bool = True,
                 decoder_dim: int = 512, decoder_depth: int = 8, decoder_heads: int = 16):
        super().__init__(size, image_size, patch_size, channels)
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(self.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        positions = F.pad(sincos(decoder_dim, self.grid), (0, 0, 1, 0))  # zeros for the class token
        self.decoder_pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(decoder_dim, decoder_heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size * patch_size * channels)

        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.patch_embed.proj.reset_parameters()  # the bias is Conv2d's default, as published
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))  # as a linear layer
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def targets(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels to predict (B, L, P*P*C); mean and std taken out of each patch (B, L, 1)."""
        pixels = patchify(images, self.patch_size)
        if not self.norm_pix_loss:
            return pixels, torch.zeros_like(pixels[..., :1]), torch.ones_like(pixels[..., :1])
        mean = pixels.mean(-1, keepdim=True)
        std = (pixels.var(-1, keepdim=True) + 1e-6).sqrt()  # unbiased variance
        return (pixels - mean) / std, mean, std

    def decode(self, x: Tensor, visible: Tensor, positions: Tensor) -> Tensor:
        """Encoded class and visible tokens (B, 1+N, D), positions (1 or B, 1+L, decoder_dim) ->
        decoded tokens (B, L, decoder_dim)."""
        x = self.decoder_embed(x)  # (B, 1+N, decoder_dim)
        mask_tokens = self.mask_token.expand(len(x), positions.shape[1] - 1, -1)
        tokens = scatter_tokens(mask_tokens, visible, x[:, 1:])  # (B, L, decoder_dim)
        x = torch.cat([x[:, :1], tokens], dim=1) + positions  # (B, 1+L, decoder_dim)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, 1:]

    def forward(self, images: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W), visible (B, N), masked (B, M) -> (loss, pred (B, L, P*P*C))."""
        x = self.embed(images)  # (B, L, D), with positions
        x = self.encode(gather_tokens(x, visible))  # (B, 1+N, D), the class token first
        pred = self.decoder_pred(self.decode(x, visible, self.decoder_pos_embed))  # (B, L, P*P*C)
        target, _, _ = self.targets(images)
        error = gather_tokens(pred, masked).float() - gather_tokens(target, masked)  # (B, M, P*P*C)
        return error.square().mean(), pred


# ------------------------------------------------------------------------------------- pre-training


def new_model(config: Pretrain | Show) -> MAE:
    """The model before training, the same for the same seed; with --init that of the checkpoint."""
    torch.manual_seed(config.seed)
    mae_class, satellite = MAE, {}
    if config.bands or config.dates > 1:
        mae_class, satellite = SatMAE, {"bands": parse_bands(config.bands), "dates": config.dates}
    model = common.build(mae_class, config.size, config.image_size, config.patch_size,
                         config.channels, config.norm_pix_loss, config.decoder_dim,
                         config.decoder_depth, config.decoder_heads, **satellite)
    mask = draw_mask(config, model.grid, 0)
    if mask.all() or not mask.any():
        raise UserError(f"--mask-ratio {config.mask_ratio} masks none or all of {len(mask)} tokens")
    if config.init:
        encoder_alone = not isinstance(config, Show)
        common.load_model(model, config.init, ("decoder_", "mask_token"), encoder_alone)
    return model


def target_name(config: AutoencoderConfig) -> str:
    return "normalized pixels" if config.norm_pix_loss else "pixels"


def mean_tokens(model: ViT, autocast: torch.autocast) -> Callable:
    """A function (images, *stamps) -> (B, D): the mean of the encoded patch tokens."""
    def encode(images, *stamps):
        with autocast:
            return model.eval().forward_features(images, *stamps)[:, 1:].float().mean(dim=1)
    return encode


def masked_predictions(model: MAE, autocast: torch.autocast) -> Callable:
    """A function of a batch -> predictions as in `data`, one a slice."""
    def predict(images, _, *others):
        *stamps, visible, masked = others
        with autocast:
            _, pred = model.eval()(images, visible, masked, *stamps)
        targets, _, _ = model.targets(images)
        if torch.is_tensor(pred):
            pred, targets = [pred], [targets]
        masks = data.indices_to_mask(masked, visible.shape[1] + masked.shape[1]).chunk(len(pred), dim=1)
        return [(p.float(), t, ~mask, mask) for p, t, mask in zip(pred, targets, masks)]
    return predict


def pretrain(config: Pretrain) -> None:
    """Pre-training (Table 8); at its end a picture and, if there are labels, probes."""
    device = common.init_distributed(config.device)
    train_source, val_source, classes = data.open_sources(
        config.data, config.channels, labeled=False, dates=config.dates, scenes=bool(config.bands))
    plan = data.plan_training(config, train_source, val_source, classes)
    workers = 0 if config.benchmark else config.workers  # for random pixels torch gets all cores
    loader = data.Loader(plan.mean, plan.std, device, common.share_cores(workers, device))

    model = new_model(config).to(device)
    autocast, scaler = common.mixed_precision(config.precision, device)

    crop = v2.RandomResizedCrop(config.image_size, (0.2, 1.0), interpolation=data.BICUBIC)
    augmentation = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    view = data.CenterCrop(config.image_size)
    draw = functools.partial(draw_mask, config, model.grid)
    samples = data.Samples(train_source, augmentation, config.seed, draw)
    plan = common.plan_micro_batches(config, plan, model, loader, samples, autocast)

    groups = common.parameter_groups(model, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    checkpoints = common.Checkpoints(config, plan, model, optimizer, scaler)
    start = 0 if config.benchmark else checkpoints.resume()
    net = common.wrap_model(model, config, device)

    train_view = data.Samples(train_source, view, config.seed, replace_unreadable=False)
    val_view = data.Samples(val_source or train_source, view, config.seed, replace_unreadable=False)
    masked_view = data.Samples(val_view.source, view, config.seed, draw)
    batches = loader.train(samples, config, plan, start)
    encode, predict = mean_tokens(model, autocast), masked_predictions(model, autocast)

    losses, peak_lr = [], config.base_lr * config.batch_size / 256
    if config.benchmark:
        log, steps = None, common.benchmark_steps(config, plan, device)
    else:
        log = common.Log(config, plan, start)
        steps = log.steps()
    with common.StopSignals(enabled=not config.benchmark) as stop:
        for step in steps:
            lr = cosine_schedule(step, plan.steps, config.warmup * plan.steps, peak_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            for micro_step in range(plan.accumulate):
                images, _, *stamps, visible, masked = next(batches)  # stamps: only with dates
                net.require_backward_grad_sync = micro_step == plan.accumulate - 1  # DDP syncs once
                with autocast:
                    loss = net(images, visible, masked, *stamps)[0]
                scaler.scale(loss / plan.accumulate).backward()
                losses.append(loss.detach())
            if config.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if config.benchmark:
                continue

            done, metrics = step + 1, {}
            stopped = stop.received()  # the number of a signal, or 0
            last = done == plan.steps
            if last or done % config.evaluate_every == 0:
                metrics = data.evaluate_features(encode, train_view, val_view, loader, config.evaluate_samples, classes)
                metrics |= data.evaluate_predictions(predict, model.grid, masked_view, loader, config.evaluate_samples)
                model.train()
            if last or stopped or metrics or config.log_due(done):
                log.write(done, losses, scaler, lr=lr, **metrics)
            checkpoints.save(done, metrics, now=bool(last or stopped))
            if stopped:
                raise common.Stopped(stopped, done, config.out)
    if config.benchmark:
        return
    log.close()
    checkpoints.print_paths()

    metrics = data.evaluate_predictions(predict, model.grid, masked_view, loader, config.evaluate_samples)
    if common.get_rank() == 0:
        kind = "held-out" if val_source else "training"
        print(data.describe_variance_left(metrics, f"{target_name(config)} of {kind} images"))
        save_picture(model, masked_view, loader, config)
    if classes:
        before = mean_tokens(new_model(config).to(device), autocast)
        data.print_probes({"before training": before, "after": encode}, train_view, val_view, loader)
    data.report_unreadable(train_source, val_source)


# ----------------------------------------------------------------------------------- classification


def new_classifier(config: Finetune | Linprobe, num_classes: int) -> ViT:
    """The encoder in --init or a new one, with a new head; with --eval-only that classifier."""
    torch.manual_seed(config.seed)
    is_probe, vit_class = isinstance(config, Linprobe), ViT
    arguments = {"image_size": config.image_size, "channels": config.channels,
                 "num_classes": num_classes, "drop_path": 0.0 if is_probe else config.drop_path}
    if not config.eval_only:  # else as in the checkpoint
        arguments["pool"] = config.pool
    if config.bands or config.dates > 1:
        vit_class = SatelliteViT
        arguments |= {"bands": parse_bands(config.bands), "dates": config.dates}
    if config.init:  # frames=1: an encoder of clips becomes one of images
        model = common.load_encoder(config.init, vit_class, frames=1, **arguments)
    else:
        model = common.build(vit_class, config.size, patch_size=config.patch_size, **arguments)

    head = model.head
    nn.init.zeros_(head.bias)
    if is_probe:
        nn.init.trunc_normal_(head.weight, std=0.01)
        model.requires_grad_(False)
        head.requires_grad_(True)
        model.head = nn.Sequential(nn.BatchNorm1d(model.dim, affine=False, eps=1e-6), head)
    else:
        nn.init.trunc_normal_(head.weight, std=2e-5)
        for name in ("pos_embed", "channel_embed"):  # trained in the published code too
            if hasattr(model, name):
                getattr(model, name).requires_grad_(True)
    if config.eval_only:  # with the head, which `load_encoder` leaves out where it does not fit
        weights = common.read_weights(config.init)[0] | {"pos_embed": model.pos_embed.data}  # of this image size
        common.load_strictly(model, weights, config.init)
    return model


def finetune(config: Finetune) -> None:
    """Fine-tuning of the whole encoder for classification (Section 4)."""
    classify(config, config.layer_decay)


def linprobe(config: Linprobe) -> None:
    """Linear probing: a linear classifier on the frozen encoder (Table 10, but SGD for LARS)."""
    classify(config, layer_decay=1.0)


def classify(config: Finetune | Linprobe, layer_decay: float) -> None:
    device = common.init_distributed(config.device)
    micro_batch = config.batch_size // (config.accumulate or 1) // common.get_world_size()
    if isinstance(config, Linprobe) and micro_batch < 2 and not config.eval_only:
        raise UserError("BatchNorm needs at least 2 images in a micro-batch: raise --batch-size or lower --accumulate")
    train_source, val_source, classes = data.open_sources(
        config.data, config.channels, labeled=True, dates=config.dates, scenes=bool(config.bands),
        tested=config.init if config.eval_only else None)
    plan = data.plan_training(config, train_source, val_source, classes)
    loader = data.Loader(plan.mean, plan.std, device, common.share_cores(config.workers, device))
    model = new_classifier(config, len(classes)).to(device)
    autocast, _ = common.mixed_precision(config.precision, device)
    val = data.Samples(val_source, data.CenterCrop(config.image_size), replace_unreadable=False)

    def test(last):
        return common.accuracy(model, loader.test(val), autocast, verbose=last)

    def schedule(step):
        peak_lr = config.base_lr * config.batch_size / 256
        lr = cosine_schedule(step, plan.steps, config.warmup * plan.steps, peak_lr, config.min_lr)
        return lr, config.weight_decay

    groups = common.parameter_groups(model, config.weight_decay, layer_decay, no_decay=("cls_token", "pos_embed"))
    if isinstance(config, Finetune):
        augmentation = data.finetuning_transform(config, plan.mean, plan.std)
        mix = data.mixup_cutmix(config, len(classes))
        optimizer = torch.optim.AdamW(groups, fused=True)
    else:
        crop = v2.RandomResizedCrop(config.image_size, (0.08, 1.0), interpolation=data.BICUBIC)
        augmentation, mix = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()]), None
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    if config.eval_only:
        test(last=True)
    else:
        samples = data.Samples(train_source, augmentation, config.seed)
        common.train_classifier(config, plan, classes, model, optimizer, schedule, loader, samples, test, mix)
    data.report_unreadable(train_source, val_source)


# ----------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def save_picture(model: MAE, samples: data.Samples, loader: data.Loader, config: Pretrain | Show) -> None:
    """A picture, a row for each slice: input, visible patches, [true means,] prediction."""
    groups = parse_bands(config.bands) or [range(config.channels)] * config.dates
    batch = loader.for_picture(samples, max(1, 4 // len(groups)))
    predictions = masked_predictions(model, contextlib.nullcontext())(*batch)
    _, mean, std = model.targets(batch[0])
    mean, std = ([x] if torch.is_tensor(x) else x for x in (mean, std))
    titles = ["input", "visible patches", "prediction"]
    if model.norm_pix_loss:
        titles[2:] = ["given back: true mean of each patch", "prediction, with true mean and std"]

    rows = []
    for group, (pred, target, _, mask), m, s in zip(groups, predictions, mean, std):
        patches = target * s + m
        fills = [0.0, m, pred * s + m] if model.norm_pix_loss else [0.0, pred]
        columns = [patches, *(torch.where(mask[..., None], fill, patches) for fill in fills)]
        columns = [unpatchify(column, model.patch_size, model.grid) for column in columns]
        row = torch.stack(columns, dim=1)  # (B, columns, C, H, W)
        row = row * loader.std[list(group)] + loader.mean[list(group)]
        if config.bands or not data.are_photographs(samples.source, config.channels):
            row = common.stretch(row, row[:, :1])
        rows.append(row[:, :, :3] if row.shape[2] >= 3 else row[:, :, :1].expand(-1, -1, 3, -1, -1))
    pictures = torch.stack(rows, dim=1).flatten(0, 1)  # (B * groups, columns, 3, H, W)
    metrics = data.variance_left([predictions], model.grid)
    caption = data.describe_variance_left(metrics, f"{target_name(config)} of these images")
    pictures = dict(zip(titles, pictures.unbind(dim=1)))
    common.save_pictures(pictures, Path(config.out, "reconstruction.png"), caption)


def show(config: Show) -> None:
    """A picture of what a model predicts for --image, or for some samples of --data."""
    if not config.init:
        raise UserError("show needs --init, a checkpoint")
    device = common.init_distributed(config.device)
    if not common.read_weights(config.init)[1]:
        advice = "plain pixels; --norm-pix-loss if it is a mae_pretrain_vit_*_full.pth"
        if config.norm_pix_loss:
            advice = "normalized pixels; --no-norm-pix-loss if it is a mae_visualize_vit_*.pth"
        print(f"{config.init} does not say what it predicts: taken to be {advice}")
    train_source, val_source, _ = data.open_sources(
        config.image or config.data, config.channels, labeled=False, dates=config.dates, scenes=bool(config.bands))
    source = val_source or train_source
    loader = data.Loader(*data.mean_and_std(config, source), device)
    model = new_model(config).to(device)
    view = data.CenterCrop(config.image_size)
    draw = functools.partial(draw_mask, config, model.grid)
    save_picture(model, data.Samples(source, view, config.seed, draw), loader, config)


# ------------------------------------------------------------------- SatMAE: many bands, many dates
# "SatMAE: Pre-training Transformers for Temporal and Multi-Spectral Satellite Imagery", Cong et al.
# 2022, arXiv 2207.08051: MAE with S slices, groups of bands or dates, each with its own token at
# every patch.


def parse_bands(bands: str | None) -> tuple[tuple[int, ...], ...]:
    """The groups of --bands: "0,1,2/3,4" -> ((0, 1, 2), (3, 4)), None -> (). Raises ValueError."""
    try:
        groups = bands.split("/") if bands else []
        return tuple(tuple(int(band) for band in group.split(",")) for group in groups)
    except ValueError:
        raise ValueError(f"--bands {bands} is not a list of groups such as 0,1,2/3,4") from None


def fixed_parameter(table: Tensor) -> nn.Parameter:
    """(L, D) -> a parameter (1, L, D) that is not trained."""
    return nn.Parameter(table.float()[None], requires_grad=False)


def embed_stamps(stamps: Tensor, width: int) -> Tensor:
    """Stamps (B, T, 3) of year, month, hour -> their sine-cosine codes (B, T, 3 * width)."""
    return sincos_1d(width, stamps.flatten()).unflatten(0, stamps.shape).flatten(2).float()


def slice_positions(table: Tensor, codes: Tensor) -> Tensor:
    """Positions (1, 1+L, k) and codes of slices (1 or B, S, m) -> (1 or B, S * L, k + m)."""
    patches = table[:, None, 1:].expand(*codes.shape[:2], -1, -1)
    codes = codes[:, :, None].expand(-1, -1, patches.shape[2], -1)
    return torch.cat([patches, codes], dim=3).flatten(1, 2)


def select(x: Tensor, dim: int, indices: Sequence[int]) -> Tensor:
    """x at some indices of a dimension; `x[:, list]` would copy the list to the GPU and wait."""
    return torch.stack([x.select(dim, index) for index in indices], dim)


class SatelliteViT(ViT):
    """A ViT on images of many bands, or of several dates. Other arguments: as in `ViT`.

    bands: groups of channels, as ((0, 1, 2), (3, 4)), each with a projection; others are not used.
    dates: without bands, their number; images (B, C, dates, H, W) have stamps (B, dates, 3).
    A position ends with the code of the group, or of the year, month and hour of the date.
    """

    def __init__(self, *arguments, bands: tuple[tuple[int, ...], ...] = (), dates: int = 1, **named):
        super().__init__(*arguments, **named)
        self.bands, self.slices = bands, len(bands) or dates
        self.date_width = min(128, self.dim // 24 * 4)  # as published, if the model is wide enough
        width = min(256, self.dim // 2) if bands else 3 * self.date_width
        self.pos_embed = fixed_parameter(F.pad(sincos(self.dim - width, self.grid), (0, 0, 1, 0)))
        if bands:
            self.channel_embed = fixed_parameter(sincos_1d(width, torch.arange(len(bands))))
            self.patch_embed = nn.ModuleList(PatchEmbed(self.patch_size, len(group), self.dim) for group in bands)
            for embed in self.patch_embed:
                nn.init.xavier_uniform_(embed.proj.weight.flatten(1))

    def embed(self, images: Tensor, stamps: Tensor | None = None) -> Tensor:
        """(B, C, [dates,] H, W), with dates stamps (B, dates, 3) -> (B, S * L, D) by slice."""
        if self.bands:
            x = [embed(select(images, 1, g)) for embed, g in zip(self.patch_embed, self.bands)]
            codes = self.channel_embed
        else:
            x = [self.patch_embed(image) for image in images.unbind(dim=2)]
            codes = embed_stamps(stamps, self.date_width)
        return torch.cat(x, dim=1) + slice_positions(self.pos_embed, codes)

    def encode(self, x: Tensor) -> Tensor:
        """As in `ViT`; the position of the class token is zero."""
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_features(self, images: Tensor, stamps: Tensor | None = None) -> Tensor:
        return self.encode(self.embed(images, stamps))

    def forward(self, images: Tensor, stamps: Tensor | None = None) -> Tensor:
        return self.forward_head(self.forward_features(images, stamps))


def load_satellite_encoder(path: str | Path, **changes) -> SatelliteViT:
    """As `load_encoder`. Our checkpoints know bands and dates; for a published one give them."""
    settings = common.read_weights(path)[1]
    known = {"bands": parse_bands(settings.get("bands")), "dates": settings.get("dates", 1)}
    return common.load_encoder(path, SatelliteViT, **{**known, **changes})


class SatMAE(SatelliteViT, MAE):
    """MAE of S * L tokens; targets and predictions are lists of (B, L, P*P*C), one a slice."""

    def __init__(self, *arguments, bands: tuple[tuple[int, ...], ...] = (), dates: int = 1, **named):
        super().__init__(*arguments, bands=bands, dates=dates, **named)
        decoder_dim = self.decoder_embed.out_features
        self.decoder_date_width = min(64, decoder_dim // 24 * 4)
        width = min(128, decoder_dim // 2) if bands else 3 * self.decoder_date_width
        self.decoder_pos_embed = fixed_parameter(F.pad(sincos(decoder_dim - width, self.grid), (0, 0, 1, 0)))
        if bands:
            codes = sincos_1d(width, torch.arange(len(bands) + 1))  # the last: of the class token
            self.decoder_channel_embed = fixed_parameter(codes)
            layers = [nn.Linear(decoder_dim, len(group) * self.patch_size ** 2) for group in bands]
            self.decoder_pred = nn.ModuleList(layers)
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def decoder_positions(self, stamps: Tensor | None) -> Tensor:
        """(1 or B, 1 + S * L, decoder_dim), the class token's first."""
        if self.bands:
            codes, class_code = self.decoder_channel_embed[:, :-1], self.decoder_channel_embed[:, -1:]
        else:
            codes = embed_stamps(stamps, self.decoder_date_width)
            class_code = torch.zeros_like(codes[:, :1])
        class_position = F.pad(class_code, (self.decoder_pos_embed.shape[2], 0))
        return torch.cat([class_position, slice_positions(self.decoder_pos_embed, codes)], dim=1)

    def predict(self, x: Tensor) -> list[Tensor]:
        """Decoded tokens (B, S * L, decoder_dim) -> for each slice predictions (B, L, P*P*its channels)."""
        x = x.chunk(self.slices, dim=1)
        if not self.bands:
            return [self.decoder_pred(part) for part in x]
        x = torch.cat([layer(part) for layer, part in zip(self.decoder_pred, x)], dim=2)
        x = x.unflatten(2, (-1, self.patch_size ** 2))  # (B, L, C, P*P)
        # As published, output k predicts the k-th lowest band. So with groups out of order a band may be
        # predicted from the token of another group, even where its own is visible.
        used, predictions = sorted(sum(self.bands, ())), []
        for group in self.bands:
            output = select(x, 2, [used.index(band) for band in group])
            predictions.append(output.transpose(2, 3).flatten(2))
        return predictions

    def targets(self, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """As in `MAE`, for each slice. All bands of a patch are normalized together."""
        if not self.bands:
            results = super().targets(images.transpose(1, 2).flatten(0, 1))  # (B * dates, L, ...)
            return tuple(list(x.unflatten(0, (-1, self.slices)).unbind(dim=1)) for x in results)
        target, mean, std = super().targets(select(images, 1, sum(self.bands, ())))
        target = target.unflatten(2, (self.patch_size ** 2, -1))  # (B, L, P*P, C)
        parts = target.split([len(group) for group in self.bands], dim=3)
        return [part.flatten(2) for part in parts], [mean] * self.slices, [std] * self.slices

    def forward(self, images: Tensor, visible: Tensor, masked: Tensor,
                stamps: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """images, stamps as in `embed`, visible (B, N), masked (B, M) -> (loss, predictions)."""
        x = self.encode(gather_tokens(self.embed(images, stamps), visible))  # (B, 1+N, D)
        pred = self.predict(self.decode(x, visible, self.decoder_positions(stamps)))
        # Tokens of all slices weigh the same, whatever their number of pixels.
        targets, _, _ = self.targets(images)
        errors = [(p.float() - t).square().mean(dim=2) for p, t in zip(pred, targets)]  # (B, L) each
        return torch.cat(errors, dim=1).gather(1, masked).mean(), pred


# ------------------------------------------------------------------------- presets, command line
# The demos are small enough for one CPU, on the built-in photographs.
DEMO_ENCODER = dict(size="nano", image_size=64, patch_size=8)
DEMO_DECODER = dict(decoder_dim=64, decoder_depth=1, decoder_heads=2)
DEMO_RUN = dict(log_every=20, save_every=300)
PRETRAIN_PRESETS = {
    "huge": dict(patch_size=14),
    "demo": DEMO_ENCODER | DEMO_DECODER | DEMO_RUN | dict(
        norm_pix_loss=False, epochs=12, batch_size=64, base_lr=8e-3, evaluate_every=500, evaluate_samples=400)}
FINETUNE_PRESETS = {
    "large": dict(epochs=50, base_lr=1e-3, warmup=0.1, layer_decay=0.75, drop_path=0.2),
    "huge": dict(patch_size=14, epochs=50, base_lr=1e-3, warmup=0.1, layer_decay=0.75, drop_path=0.3),
    "demo": DEMO_ENCODER | DEMO_RUN | dict(
        epochs=10, batch_size=128, base_lr=2e-3, warmup=0.1, layer_decay=0.75, drop_path=0.0,
        randaugment=0.0, erasing=0.0, mixup=0.0, cutmix=0.0)}
LINPROBE_PRESETS = {
    "large": dict(epochs=50, warmup=0.2),
    "huge": dict(patch_size=14, epochs=50, warmup=0.2),
    "demo": DEMO_ENCODER | DEMO_RUN | dict(pool="mean", epochs=10, batch_size=256, warmup=0.1)}

TASKS = {"pretrain": (pretrain, Pretrain, PRETRAIN_PRESETS),
         "finetune": (finetune, Finetune, FINETUNE_PRESETS),
         "linprobe": (linprobe, Linprobe, LINPROBE_PRESETS),
         "show": (show, Show, {})}


def configure(task: str = "pretrain", preset: str | None = None, **given):
    """The config of a task (`common.configure`), as `pretrain(configure(data="DIR", steps=9))`."""
    if given.get("bands") and not (given.get("data") or given.get("init") or given.get("channels")):
        with contextlib.suppress(ValueError, AttributeError):  # the config refuses wrong bands
            given["channels"] = max(3, 1 + max(max(group) for group in parse_bands(given["bands"])))
    return common.configure(TASKS, (EncoderConfig, AutoencoderConfig), task, preset, given)


if __name__ == "__main__":
    common.main(__doc__, TASKS, configure)
