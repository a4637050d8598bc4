"""MaskFeat: "Masked Feature Prediction for Self-Supervised Visual Pre-Training", Wei et al. 2022,
arXiv 2112.09133.

Replace 40 % of the patches of an image or a video by a mask token and let a Vision Transformer
predict, for each, not the pixels but their histogram of oriented gradients (HOG): in which
directions edges run, whatever their brightness and contrast. It needs no tokenizer, no teacher and
no decoder.

    images (B, C, H, W), or clips (B, C, T, H, W)
      | cut into L patches (tubelets) and project                              (B, L, D)
      | replace the masked tokens by the mask token, add learned positions,
      | prepend the class token                                                (B, 1 + L, D)
    ViT over the whole sequence                                                (B, 1 + L, D)
      | the M masked tokens, one linear layer                                  (B, M, K)
      | squared error to the HOG of these patches (of a tubelet: of its first frame),
      | K = channels * bins * cells of a patch
    loss

    python maskfeat.py                                  pre-train on the photographs of scikit-image
    python maskfeat.py --frames 8 --out runs/clips      on clips of a camera over collages
    torchrun --nproc_per_node=8 maskfeat.py --data DIR  the paper's values on your images, or videos
                                                        (--frames 16 --out runs/video)
    python maskfeat.py finetune --data DIR --init runs/maskfeat/last.pt
    python maskfeat.py show --init runs/maskfeat/last.pt --image photo.jpg
"""
import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import ImageDraw
from torch import Tensor
from torchvision.transforms import v2

import common
import data
from common import (Fraction, UserError, ViT, cosine_schedule, gather_tokens, patchify,
                    scatter_tokens, unpatchify)

# --------------------------------------- configuration: the published values, for ViT-B on images


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    size: common.Size = "base"  # size of the encoder
    image_size: common.ImageSize = 224  # pixels, a number or HEIGHTxWIDTH
    patch_size: int = 16  # side of a patch, pixels
    channels: int = 3  # channels of the images
    mean: tuple[float, ...] | None = None  # channel means, in the unit of the pixels (default: ImageNet's, or measured)
    std: tuple[float, ...] | None = None  # standard deviation of each channel (default: likewise)
    frames: int = 1  # frames of a clip; 1 for images
    tubelet: int = 1  # frames that one token spans
    frame_stride: int = 4  # use every n-th frame of a video


@dataclass(frozen=True, kw_only=True)
class PredictionConfig:
    target: Literal["hog", "pixels"] = "hog"  # target: HOG, or pixels normalized by patch
    cell: int = 8  # side of a cell of HOG, pixels; a patch holds whole cells
    masking: Literal["block", "cube", "tube", "frame", "random"] = "block"  # masking strategy: block (images), cube, tube, frame (clips), random
    mask_ratio: Fraction = 0.4  # fraction of the tokens that are masked

    def __post_init__(self):
        super().__post_init__()  # of common.Training or Task, whichever comes next
        if self.masking != "random" and (self.masking == "block") != (self.frames == 1):
            kind = "images" if self.masking == "block" else "clips (--frames)"
            raise ValueError(f"--masking {self.masking} is for {kind}")


@dataclass(frozen=True, kw_only=True)
class Pretrain(PredictionConfig, EncoderConfig, common.Pretraining):
    epochs: float | None = 300  # length of the training in passes over the data (the paper's best: 1600)
    batch_size: int = 2048
    base_lr: float = 2e-4
    min_lr: float = 1e-6  # learning rate at the end of the schedule
    warmup: Fraction = 30 / 300
    weight_decay: float = 0.05  # weight decay of AdamW
    clip_grad: float | None = 0.02
    flip: bool = True  # horizontal flip of half of the training samples
    out: str = "runs/maskfeat"


@dataclass(frozen=True, kw_only=True)
class Finetune(EncoderConfig, common.Classification):
    views: int = 1  # clips of a video of --data whose logits are averaged, in the last test
    epochs: float | None = 100
    batch_size: int = 2048
    base_lr: float = 2.5e-4
    warmup: Fraction = 20 / 100
    weight_decay: float = 0.05  # weight decay of AdamW
    layer_decay: Fraction = 0.65  # layer-wise learning-rate decay
    drop_path: Fraction = 0.1  # drop path (stochastic depth) rate, rising linearly to the last block
    randaugment: common.Magnitude = 9.0  # magnitude of RandAugment, 0 to 10
    erasing: Fraction = 0.25  # probability of random erasing
    mixup: float = 0.8  # alpha of MixUp
    cutmix: float = 1.0  # alpha of CutMix
    flip: bool = True  # horizontal flip of half of the training samples (not of built-in clips)
    out: str = "runs/maskfeat-finetune"


@dataclass(frozen=True, kw_only=True)
class Show(PredictionConfig, EncoderConfig, common.Task):
    image: str | None = None  # photograph, video or folder of frames (default: some of --data)
    out: str = "runs/maskfeat-show"  # folder of the picture


TARGETS = {"hog": "HOG", "pixels": "normalized pixels"}

# ---------------------------------------------------------------------------------------------- HOG


def gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical gradient, (B, C, H, W) -> two of the same shape, in float32.

    The filter [[1, 0, -1], [2, 0, -2], [1, 0, -1]] and its transpose, summed in raster order, as in a
    float32 convolution. Where terms cancel, rounding leaves 0 or about +-1e-7, which decides between
    the first and the last bin, and in a flat cell, after the L2 norm, between 0 and 1 in the first
    one: another order or precision changes many cells.
    """
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    H, W = images.shape[-2:]
    a, b, c, d, _, f, g, h, i = (padded[..., y:y + H, x:x + W] for y in range(3) for x in range(3))
    horizontal = (a - c).add_(d, alpha=2).sub_(f, alpha=2).add_(g).sub_(i)
    vertical = torch.add(a, b, alpha=2).add_(c).sub_(g).sub_(h, alpha=2).sub_(i)
    return horizontal, vertical


@torch.no_grad()
def hog(images: Tensor, bins: int = 9, cell: int = 8) -> Tensor:
    """Histograms of oriented gradients: (B, C, H, W) -> (B, C, bins, H/cell, W/cell), in float32.

    The histogram of a cell adds up the magnitudes of gradients by direction, in [0, pi) since an edge
    and its negative count alike, and is divided by its L2 norm.
    """
    def by_cell(values):  # (B, C, H, W) -> (B, C, H/cell, W/cell, cell*cell)
        return values.unflatten(3, (-1, cell)).unflatten(2, (-1, cell)).transpose(3, 4).flatten(4)

    gx, gy = gradients(images)
    # The direction is measured from the vertical, as in the published code.
    direction = torch.atan2(gx, gy).div_(math.pi).mul_(bins).floor_().remainder_(bins)
    direction = by_cell(direction.to(torch.uint8))
    magnitude = gx.hypot_(gy)
    del gx, gy  # the extra memory stays below four times that of the images
    magnitude = by_cell(magnitude)
    histogram = magnitude.new_zeros(*magnitude.shape[:-1], bins)
    histogram.scatter_add_(-1, direction.long(), magnitude)
    return F.normalize(histogram, dim=-1).permute(0, 1, 4, 2, 3)


def hog_targets(images: Tensor, patch: int = 16, cell: int = 8) -> Tensor:
    """(B, C, H, W) -> HOG (B, L, C*bins*(patch/cell)**2), as (channel, bin, cell row, column)."""
    n = patch // cell
    histograms = hog(images, cell=cell).unflatten(4, (-1, n)).unflatten(3, (-1, n))
    return histograms.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)


# ------------------------------------------------------------------------------------------ masking
# A mask is a boolean tensor (L,) by ([times,] rows, columns), True = masked: round(ratio * L) tokens,
# of tubes and frames in whole ones. `data.Samples` seeds the generator that draws it; `data.Loader`
# turns it into token indices.


def random_mask(grid: tuple[int, ...], ratio: float) -> Tensor:
    """Random tokens."""
    mask = torch.zeros(math.prod(grid), dtype=torch.bool)
    mask[torch.randperm(len(mask))[:round(ratio * len(mask))]] = True
    return mask


def block_mask(grid: tuple[int, int], ratio: float) -> Tensor:
    """Blocks of an image, each about a fifth of the masked patches or more; single ones fill up."""
    number = round(ratio * math.prod(grid))
    return data.blockwise_mask((1, *grid), number, min_area=number // 5)


def cube_mask(grid: tuple[int, int, int], ratio: float) -> Tensor:
    """Blocks of about a fifth of the frame or more, for a random number of time steps."""
    number, area = round(ratio * math.prod(grid)), grid[1] * grid[2]
    return data.blockwise_mask(grid, number, min_area=area // 5, max_area=area, tries=100)


def tube_mask(grid: tuple[int, int, int], ratio: float) -> Tensor:
    """The same blocks at every time step."""
    return block_mask(grid[1:], ratio).repeat(grid[0])


def frame_mask(grid: tuple[int, int, int], ratio: float) -> Tensor:
    """Whole time steps."""
    return random_mask(grid[:1], ratio).repeat_interleave(math.prod(grid[1:]))


MASKS = {"block": block_mask, "cube": cube_mask, "tube": tube_mask, "frame": frame_mask, "random": random_mask}


def draw_mask(config: Pretrain | Show, grid: tuple[int, ...], position: int) -> Tensor:
    """The mask (L,) of a sample; `position`, its number in the run, is not needed."""
    return MASKS[config.masking](grid, config.mask_ratio)


# -------------------------------------------------------------------------------------------- model


class MaskFeat(ViT):
    """A ViT with a mask token and a linear prediction head, which holds the final LayerNorm.

    target: "hog" or "pixels". cell: side of a cell of HOG, pixels. Others: as in `ViT`.
    """

    def __init__(self, size: str = "base", image_size: int | tuple[int, int] = 224, patch_size: int = 16,
                 channels: int = 3, frames: int = 1, tubelet: int = 1, target: str = "hog", cell: int = 8):
        super().__init__(size, image_size, patch_size, channels, frames, tubelet, learned_positions=True)
        if target == "hog" and patch_size % cell:
            raise ValueError(f"a patch of {patch_size} pixels does not hold whole cells of {cell}")
        self.tubelet, self.target, self.cell = tubelet, target, cell
        self.norm = nn.Identity()  # the final LayerNorm is in pred_head, as published
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        values = 9 * (patch_size // cell) ** 2 if target == "hog" else patch_size ** 2  # of a channel
        self.pred_head = nn.Sequential(nn.LayerNorm(self.dim, eps=1e-6), nn.Linear(self.dim, channels * values))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        for module in self.blocks.modules():  # the published encoder starts so
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                nn.init.constant_(module.bias, 0.02)
        self.patch_embed.proj.reset_parameters()  # the bias is Conv's default, as published
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=0.02)
        self.pred_head.apply(common.init_weights)

    def target_frames(self, pixels: Tensor) -> Tensor:
        """Images, or the first frame of each tubelet: (B, C, [T,] H, W) -> (B * times, C, H, W)."""
        if pixels.ndim == 4:
            return pixels
        return pixels[:, :, ::self.tubelet].transpose(1, 2).flatten(0, 1)

    def targets(self, pixels: Tensor) -> Tensor:
        """What is predicted, for every token: (B, C, [T,] H, W) -> (B, L, K)."""
        frames = self.target_frames(pixels)
        if self.target == "hog":
            targets = hog_targets(frames, self.patch_size, self.cell)
        else:
            patches = patchify(frames.float(), self.patch_size)
            std = (patches.var(-1, keepdim=True) + 1e-6).sqrt()
            targets = (patches - patches.mean(-1, keepdim=True)) / std
        return targets.reshape(len(pixels), -1, targets.shape[-1])

    def forward(self, pixels: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (B, C, [T,] H, W), masked (B, M) -> (loss, pred (B, M, K)); visible is unused."""
        x = scatter_tokens(self.patch_embed(pixels), masked, self.mask_token)  # (B, L, D)
        x = self.encode(x + self.pos_embed[:, 1:])  # (B, 1+L, D), the class token first
        pred = self.pred_head(gather_tokens(x[:, 1:], masked))  # (B, M, K)
        target = gather_tokens(self.targets(pixels), masked)
        return (pred.float() - target).square().mean(), pred


# ------------------------------------------------------------------------------------- pre-training


def new_model(config: Pretrain | Show) -> MaskFeat:
    """The model before training, the same for the same seed; with --init that of the checkpoint."""
    torch.manual_seed(config.seed)
    model = common.build(MaskFeat, config.size, config.image_size, config.patch_size,
                         config.channels, config.frames, config.tubelet, config.target, config.cell)
    mask = draw_mask(config, model.grid, 0)
    if mask.all() or not mask.any():
        raise UserError(f"--mask-ratio {config.mask_ratio} masks none or all of {len(mask)} tokens")
    if config.init:
        encoder_alone = not isinstance(config, Show)
        common.load_model(model, config.init, ("pred_head.", "mask_token"), encoder_alone)
    return model


def mean_tokens(model: MaskFeat, autocast: torch.autocast) -> Callable:
    """A function pixels -> (B, times * D): the encoded patch tokens, averaged over space."""
    def encode(pixels):
        with autocast:
            tokens = model.eval().forward_features(pixels)[:, 1:].float()
        return tokens.unflatten(1, (-1, math.prod(model.grid[-2:]))).mean(dim=2).flatten(1)
    return encode


def masked_predictions(model: MaskFeat, autocast: torch.autocast) -> Callable:
    """A function of a batch -> predictions as in `data`: a list of one."""
    def predict(pixels, _, visible, masked):
        with autocast:
            _, pred = model.eval()(pixels, visible, masked)
        targets = model.targets(pixels)
        mask = data.indices_to_mask(masked, targets.shape[1])
        return [(scatter_tokens(torch.zeros_like(targets), masked, pred), targets, ~mask, mask)]
    return predict


def pretrain(config: Pretrain) -> None:
    """Pre-training; at its end a picture and, if there are labels, probes."""
    device = common.init_distributed(config.device)
    train_source, val_source, classes = data.open_sources(
        config.data, config.channels, labeled=False, frames=config.frames,
        frame_stride=config.frame_stride)
    plan = data.plan_training(config, train_source, val_source, classes)
    workers = 0 if config.benchmark else config.workers  # for random pixels torch gets all cores
    loader = data.Loader(plan.mean, plan.std, device, common.share_cores(workers, device))

    model = new_model(config).to(device)
    autocast, scaler = common.mixed_precision(config.precision, device)

    crop = v2.RandomResizedCrop(config.image_size, (0.5, 1.0), interpolation=data.BICUBIC)
    clip = [functools.partial(data.single_clip, frames=config.frames)] if config.frames > 1 else []
    augmentation = v2.Compose([crop, v2.RandomHorizontalFlip(0.5 * config.flip), v2.PILToTensor(), *clip])
    view = v2.Compose([data.CenterCrop(config.image_size), *clip])
    draw = functools.partial(draw_mask, config, model.grid)
    samples = data.Samples(train_source, augmentation, config.seed, draw)
    plan = common.plan_micro_batches(config, plan, model, loader, samples, autocast)

    optimizer = torch.optim.AdamW(common.parameter_groups(model, config.weight_decay), fused=True)
    checkpoints = common.Checkpoints(config, plan, model, optimizer, scaler)
    start = 0 if config.benchmark else checkpoints.resume()
    net = common.wrap_model(model, config, device)

    train_view = data.Samples(train_source, view, config.seed, replace_unreadable=False)
    val_view = data.Samples(val_source or train_source, view, config.seed, replace_unreadable=False)
    masked_view = data.Samples(val_view.source, view, config.seed, draw)
    batches = loader.train(samples, config, plan, start)
    encode, predict = mean_tokens(model, autocast), masked_predictions(model, autocast)

    unit = "clips" if config.frames > 1 else "images"
    losses, peak_lr = [], config.base_lr * config.batch_size / 256
    if config.benchmark:
        log, steps = None, common.benchmark_steps(config, plan, device, unit)
    else:
        log = common.Log(config, plan, start, unit)
        steps = log.steps()
    with common.StopSignals(enabled=not config.benchmark) as stop:
        for step in steps:
            lr = cosine_schedule(step, plan.steps, config.warmup * plan.steps, peak_lr, config.min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            for micro_step in range(plan.accumulate):
                pixels, _, visible, masked = next(batches)
                net.require_backward_grad_sync = micro_step == plan.accumulate - 1  # DDP syncs once
                with autocast:
                    loss = net(pixels, visible, masked)[0]
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
        print(data.describe_variance_left(metrics, f"{TARGETS[config.target]} of {kind} {unit}"))
        save_picture(model, masked_view, loader, config)
    if classes:
        before = mean_tokens(new_model(config).to(device), autocast)
        data.print_probes({"before training": before, "after": encode}, train_view, val_view, loader)
    data.report_unreadable(train_source, val_source)


# -------------------------------------------------------------------------------------- fine-tuning


class Classifier(ViT):
    """A ViT with a head; logits of several clips (B, segments, C, T, H, W) are averaged."""

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.ndim < 6:
            return super().forward(pixels)
        return super().forward(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]).mean(dim=1)


def new_classifier(config: Finetune, num_classes: int) -> Classifier:
    """The encoder in --init or a new one, with a new head; with --eval-only that classifier."""
    torch.manual_seed(config.seed)
    arguments = {"image_size": config.image_size, "frames": config.frames, "tubelet": config.tubelet,
                 "pool": "mean", "num_classes": num_classes, "drop_path": config.drop_path}
    if config.init:
        model = common.load_encoder(config.init, Classifier, **arguments)
        model.pos_embed.requires_grad_(True)
    else:
        model = common.build(Classifier, config.size, patch_size=config.patch_size,
                             channels=config.channels, learned_positions=True, **arguments)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    if config.eval_only:  # with the head, which `load_encoder` leaves out where it does not fit
        weights = common.read_weights(config.init)[0] | {"pos_embed": model.pos_embed.data}  # of this size
        common.load_strictly(model, weights, config.init)
    return model


def finetune(config: Finetune) -> None:
    """Fine-tuning of the whole encoder for classification, by the mean of the patch tokens."""
    device = common.init_distributed(config.device)
    train_source, val_source, classes = data.open_sources(
        config.data, config.channels, labeled=True, frames=config.frames,
        frame_stride=config.frame_stride, tested=config.init if config.eval_only else None)
    plan = data.plan_training(config, train_source, val_source, classes)
    loader = data.Loader(plan.mean, plan.std, device, common.share_cores(config.workers, device))
    model = new_classifier(config, len(classes)).to(device)
    autocast, _ = common.mixed_precision(config.precision, device)
    val = data.Samples(val_source, data.CenterCrop(config.image_size), replace_unreadable=False)

    def test(last):
        val_source.segments = config.views if last else 1
        return common.accuracy(model, loader.test(val), autocast, verbose=last)

    def schedule(step):
        peak_lr = config.base_lr * config.batch_size / 256
        lr = cosine_schedule(step, plan.steps, config.warmup * plan.steps, peak_lr, config.min_lr)
        return lr, config.weight_decay

    if config.eval_only:
        test(last=True)
    else:
        flip = 0.5 if config.flip and (config.data or config.frames == 1) else 0.0
        augmentation = data.finetuning_transform(config, plan.mean, plan.std, flip)
        mix, unit = data.mixup_cutmix(config, len(classes)), "clips" if config.frames > 1 else "images"
        samples = data.Samples(train_source, augmentation, config.seed)
        groups = common.parameter_groups(model, config.weight_decay, config.layer_decay)
        optimizer = torch.optim.AdamW(groups, fused=True)
        common.train_classifier(config, plan, classes, model, optimizer, schedule, loader, samples, test, mix, unit)
    data.report_unreadable(train_source, val_source)


# ----------------------------------------------------------------------------------------- pictures


@torch.no_grad()
def save_picture(model: MaskFeat, samples: data.Samples, loader: data.Loader, config: Pretrain | Show) -> None:
    """A picture, a row for each image or time step: input, visible patches, target, prediction."""
    batch = loader.for_picture(samples, 4 if config.frames == 1 else 1)
    predictions = masked_predictions(model, contextlib.nullcontext())(*batch)
    pred, targets, _, mask = predictions[0]
    frames, grid = model.target_frames(batch[0]), model.grid[-2:]  # (B * times, C, H, W)
    pred, targets, mask = (x.cpu().reshape(len(frames), -1, *x.shape[2:]) for x in (pred, targets, mask))
    mask = mask.unflatten(1, grid)
    width = max(224, 16 * frames.shape[-1] // model.cell)  # a cell of 16 pixels has room for strokes
    frames = frames * loader.std + loader.mean
    if not data.are_photographs(samples.source, config.channels):
        frames = common.stretch(frames, frames)
    frames = common.enlarge(frames, width)
    is_masked = F.interpolate(mask[:, None].float(), frames.shape[-2:]) > 0
    pictures = {"input": frames, "visible patches": torch.where(is_masked, 0.5, frames)}
    name = TARGETS[model.target]
    for title, values, drawn in ((name, targets, torch.ones_like(mask)), (f"predicted {name}", pred, mask)):
        if model.target == "hog":
            picture = torch.stack([draw_hog(*x, model) for x in zip(frames, values, drawn)])
        else:
            picture = common.enlarge(0.5 + 0.2 * unpatchify(values, model.patch_size, grid), width)
        pictures[title] = common.outline(picture, mask)
    what = f"{name} of {'these images' if config.frames == 1 else 'this clip'}"
    caption = data.describe_variance_left(data.variance_left([predictions], model.grid), what)
    common.save_pictures(pictures, Path(config.out, "prediction.png"), caption)


def draw_hog(image: Tensor, values: Tensor, drawn: Tensor, model: MaskFeat) -> Tensor:
    """An image (3, H, W), dimmed in the patches `drawn`, and over them HOG (L, K): a stroke for each bin."""
    (rows, columns), n = drawn.shape, model.patch_size // model.cell
    side = image.shape[2] // (columns * n)  # of a cell in the picture
    cells = values.reshape(rows, columns, -1, 9, n, n).mean(2).permute(0, 3, 1, 4, 2)
    cells = cells.reshape(rows * n, columns * n, 9)
    dimmed = F.interpolate(1 - 0.6 * drawn[None, None].float(), image.shape[-2:])[0]
    canvas = v2.functional.to_pil_image(image * dimmed)
    draw = ImageDraw.Draw(canvas)
    for i, j in drawn.repeat_interleave(n, 0).repeat_interleave(n, 1).nonzero().tolist():
        x, y = (j + 0.5) * side, (i + 0.5) * side
        for k in cells[i, j].argsort().tolist():  # the longest on top
            angle = (k + 0.5) / 9 * math.pi  # the gradient is (sin, cos), the edge across it
            reach = 0.5 * side * float(cells[i, j, k].clamp(0, 1))
            dx, dy = reach * math.cos(angle), -reach * math.sin(angle)
            draw.line([x - dx, y - dy, x + dx, y + dy], fill=(255, 220, 90), width=max(1, side // 12))
    return v2.functional.pil_to_tensor(canvas) / 255


def show(config: Show) -> None:
    """A picture of what a model predicts for --image, or for some samples of --data."""
    if not config.init:
        raise UserError("show needs --init, a checkpoint")
    device = common.init_distributed(config.device)
    train_source, val_source, _ = data.open_sources(
        config.image or config.data, config.channels, labeled=False, frames=config.frames,
        frame_stride=config.frame_stride)
    source = val_source or train_source
    loader = data.Loader(*data.mean_and_std(config, source), device)
    model = new_model(config).to(device)
    clip = [functools.partial(data.single_clip, frames=config.frames)] if config.frames > 1 else []
    view = v2.Compose([data.CenterCrop(config.image_size), *clip])
    draw = functools.partial(draw_mask, config, model.grid)
    save_picture(model, data.Samples(source, view, config.seed, draw), loader, config)


# ------------------------------------------------------------------------- presets, command line
# The video presets are those published for MViTv2-S, here for a ViT of any size. The demos suit one
# CPU; they mask random patches or tubes, not the paper's blocks or cubes.
DEMO_RUN = dict(log_every=20, save_every=300)
SHOW_PRESETS = {
    "video": dict(tubelet=2, masking="cube"),
    "demo": dict(size="nano", image_size=64, patch_size=8, masking="random"),
    "demo_video": dict(image_size=48, patch_size=16, masking="tube", mask_ratio=0.6)}
PRETRAIN_PRESETS = {
    "video": SHOW_PRESETS["video"] | dict(batch_size=512, base_lr=8e-4, warmup=10 / 300),
    "demo": SHOW_PRESETS["demo"] | DEMO_RUN | dict(
        epochs=5.3, batch_size=16, base_lr=1.6e-2, warmup=0.05, evaluate_every=500, evaluate_samples=400),
    "demo_video": SHOW_PRESETS["demo_video"] | dict(epochs=4.8, batch_size=32, base_lr=1.2e-2)}
FINETUNE_PRESETS = {
    "large": dict(epochs=50, batch_size=1024, warmup=0.1, layer_decay=0.75),
    "video": dict(tubelet=2, views=10, epochs=100, batch_size=512, base_lr=9.6e-3, warmup=0.2, clip_grad=5.0,
                  layer_decay=0.75, randaugment=7.0),
    "demo": DEMO_RUN | dict(
        size="nano", image_size=64, patch_size=8, epochs=10, batch_size=128, base_lr=2e-3, warmup=0.1,
        clip_grad=None, layer_decay=0.75, drop_path=0.0, randaugment=0.0, erasing=0.0, mixup=0.0, cutmix=0.0),
    "demo_video": dict(image_size=48, patch_size=16, views=1)}

TASKS = {"pretrain": (pretrain, Pretrain, PRETRAIN_PRESETS),
         "finetune": (finetune, Finetune, FINETUNE_PRESETS),
         "show": (show, Show, SHOW_PRESETS)}


def configure(task: str = "pretrain", preset: str | None = None, **given):
    """The config of a task (`common.configure`), as `pretrain(configure(data="DIR", steps=9))`."""
    return common.configure(TASKS, (EncoderConfig, PredictionConfig), task, preset, given)


if __name__ == "__main__":
    common.main(__doc__, TASKS, configure)
