"""V-JEPA: "Revisiting Feature Prediction for Learning Visual Representations from Video", Bardes et
al. 2024, arXiv 2404.08471.

Mask large parts of a video and predict, from the rest, not the masked pixels but the features that
an exponential moving average of the encoder has for them. What no one can predict, such as texture
and noise, need not be in the features.

    clips (B, C, T, H, W)
      |
      |-- encoder: cut into tubelets (2 frames of a 16 x 16 patch), project, add positions  (B, L, D)
      |     | for each mask: a ViT on the N visible tokens alone (the context)              (B, N, D)
      |     | project, add positions, append a mask token with its position
      |     | for each of the M masked tokens (the targets)                           (B, N+M, ...)
      |   predictor: a narrow ViT; take the last M, project                                 (B, M, D)
      |                                                                                       L1 |
      |-- target encoder: the moving average of the whole encoder, once, on all tokens      (B, L, D)
            | LayerNorm without weights, take the masked tokens, no gradient                (B, M, D)

The paper calls the two encoders x-encoder and y-encoder. Each clip has two masks, many small blocks
(short-range) and few large ones (long-range); the loss is averaged over the two.

    python vjepa.py               the demo: clips of a camera over collages, one mask of random tubes
    torchrun --nproc_per_node=8 vjepa.py --data DIR     the paper's settings on your videos, 8 GPUs
    python vjepa.py probe --data DIR --init runs/vjepa/last.pt      attentive probe, frozen encoder
    python vjepa.py finetune --data DIR --init runs/vjepa/last.pt
    python vjepa.py show --init runs/vjepa/last.pt --image clip.mp4
"""
import contextlib
import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

import common
import data
from common import (MLP, Block, Fraction, UserError, ViT, cosine_schedule, gather_tokens, init_weights,
                    scatter_tokens, sincos)

# ----------------------------------------------------- configuration: the paper's values, for ViT-L


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    size: common.Size = "large"  # size of the encoder
    image_size: common.ImageSize = 224  # pixels, a number or HEIGHTxWIDTH
    patch_size: int = 16  # side of a patch, pixels
    channels: int = 3  # channels of the frames
    mean: tuple[float, ...] | None = None  # channel means, in the unit of the pixels (default: ImageNet's, or measured)
    std: tuple[float, ...] | None = None  # standard deviation of each channel (default: likewise)
    frames: int = 16  # frames of a clip
    tubelet: int = 2  # frames that one token spans
    frame_stride: int = 4  # use every n-th frame of a video
    still: bool = False  # data of images, each of which is repeated in time (default: as in --init)

    def __post_init__(self):
        super().__post_init__()  # of common.Training, Classification or Task, whichever comes next
        if self.frames < 2:
            raise ValueError("V-JEPA needs clips of several frames: --frames of 2 or more, and an --init of clips, if "
                             "any; for a data set of images add --still, which repeats each as a clip")


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    masking: Literal["multiblock", "block", "tube"] = "multiblock"  # masking strategy, alike in all frames
    mask_ratio: Fraction = 0.9  # fraction of the frame that block, about, and tube mask
    context_frames: int | None = None  # mask everything after the first n frames, in whole tubelets (default: no limit)


@dataclass(frozen=True, kw_only=True)
class PredictionConfig:
    target: Literal["latent", "pixels"] = "latent"  # target: the EMA's features, or pixels
    predictor_dim: int = 384  # width of the predictor
    predictor_depth: int = 12  # blocks of the predictor


@dataclass(frozen=True, kw_only=True)
class Pretrain(EncoderConfig, MaskingConfig, PredictionConfig, common.Pretraining):
    steps: int | None = 90_000
    batch_size: int = 3072
    base_lr: float = 6.25e-4 * 256 / 3072
    start_lr: Fraction = 0.32  # where the warm-up starts, as a fraction of the peak learning rate
    min_lr: float = 1e-6  # learning rate at the end of the schedule
    warmup: Fraction = 40 / 300
    weight_decay: float = 0.04  # weight decay of AdamW at the start of the schedule
    final_weight_decay: float = 0.4  # weight decay of AdamW at its end
    momentum: Fraction = 0.998  # momentum of the target encoder at the start of the schedule
    final_momentum: Fraction = 1.0  # momentum of the target encoder at its end
    schedule_scale: Annotated[float, 1, math.inf] = 1.25  # schedules span this multiple of the training
    clip_grad: float | None = 10.0  # maximum gradient norm of encoder and of predictor, after warm-up
    flip: bool = True  # horizontal flip of half of the training samples
    probe_labels: Fraction = 1.0  # fraction of the training clips that the ridge and k-NN probes at the end use
    out: str = "runs/vjepa"


@dataclass(frozen=True, kw_only=True)
class Probe(EncoderConfig, common.Classification):
    segments: int = 8  # clips of each video, whose tokens the probe attends to together
    views: int = 3  # crops of each clip in a test, whose probabilities are averaged
    epochs: float | None = 20
    batch_size: int = 256
    base_lr: float = 1e-3
    min_lr: float = 0.0
    weight_decay: float = 0.01  # weight decay of AdamW at the start of the schedule
    final_weight_decay: float = 1e-6  # weight decay of AdamW at its end
    clip_grad: float | None = 1.0
    smoothing: Fraction = 0.0
    randaugment: common.Magnitude = 7.0  # magnitude of RandAugment, 0 to 10
    erasing: Fraction = 0.25  # probability of random erasing
    flip: bool = False  # horizontal flip of half of the training samples (not of built-in clips)
    classifier: str | None = None  # published attentive probe to evaluate, of the encoder in --init
    out: str = "runs/vjepa-probe"

    def __post_init__(self):
        super().__post_init__()
        if self.classifier and not self.eval_only:
            raise ValueError("--classifier is for --eval-only")


@dataclass(frozen=True, kw_only=True)
class Finetune(Probe):  # ours: the published code has none
    segments: int = 1
    epochs: float | None = 30
    warmup: Fraction = 0.1
    weight_decay: float = 0.05
    final_weight_decay: float = 0.05
    layer_decay: Fraction = 0.75  # layer-wise learning-rate decay
    drop_path: Fraction = 0.1  # drop path (stochastic depth) rate, rising linearly to the last block
    out: str = "runs/vjepa-finetune"


@dataclass(frozen=True, kw_only=True)
class Show(EncoderConfig, MaskingConfig, PredictionConfig, common.Task):
    image: str | None = None  # video, folder of frames or photograph (default: a clip of --data)
    out: str = "runs/vjepa-show"  # folder of the picture


TARGETS = {"latent": "features", "pixels": "normalized pixels"}

# ------------------------------------------------------------------------------------------ masking
# A mask is a boolean tensor (L,) in the order (times, rows, columns), True = masked. `data.Samples`
# seeds the generator that draws it. `data.Loader` turns the masks of a batch into indices, `visible`
# and `masked`, each cut to the shortest of the batch: what is cut is neither seen nor predicted.

MASKS = {  # for each mask of a clip: blocks, fraction of the frame in each (None: mask_ratio)
    "multiblock": [(8, 0.15), (2, 0.7)],  # short-range, long-range
    "block": [(1, None)],
    "tube": [(1, None)]}  # random patches


def sample_block_size(grid: tuple[int, int, int], scale: float, generator: torch.Generator) -> tuple[int, int]:
    """(height, width) of a block in tokens: a fraction of the frame, height / width 0.75 to 1.5."""
    rows, columns = grid[1:]
    aspect = 0.75 + 0.75 * torch.rand((), generator=generator).item()
    area = int(scale * rows * columns)
    height = min(rows, round(math.sqrt(area * aspect)))
    width = min(columns, round(math.sqrt(area / aspect)))
    if height == rows and width == columns:  # a block never fills the frame
        width -= 1
    return height, width


def multiblock_mask(grid: tuple[int, int, int], num_blocks: int, block_size: tuple[int, int]) -> Tensor:
    """Blocks at random positions in a frame: (rows, columns)."""
    _, rows, columns = grid
    height, width = block_size
    frame = torch.ones(rows, columns, dtype=torch.bool)
    while frame.all():  # drawn again if nothing is visible
        frame.fill_(False)
        for _ in range(num_blocks):
            top = int(torch.randint(rows - height + 1, ()))
            left = int(torch.randint(columns - width + 1, ()))
            frame[top:top + height, left:left + width] = True
    return frame


def tube_mask(grid: tuple[int, int, int], ratio: float) -> Tensor:
    """Random patches of a frame: (rows, columns)."""
    length = grid[1] * grid[2]
    frame = torch.ones(length, dtype=torch.bool)
    frame[torch.randperm(length)[:max(1, int(length * (1 - ratio)))]] = False
    return frame.view(grid[1:])


def draw_masks(config: Pretrain | Show, grid: tuple[int, int, int], position: int) -> Tensor:
    """Masks (kinds, L) of sample number `position` of the run; a batch shares its block sizes."""
    frames, step = [], position // getattr(config, "batch_size", 1)  # `show` has no batches
    seed = common.derive_seed(config.seed, common.BLOCK_SIZE, step)
    for num_blocks, scale in MASKS[config.masking]:
        if config.masking == "tube":
            frames.append(tube_mask(grid, config.mask_ratio))
        else:  # from the same seed, both masks of a clip have the same aspect ratio, as published
            generator = torch.Generator().manual_seed(seed)
            block_size = sample_block_size(grid, scale or config.mask_ratio, generator)
            frames.append(multiblock_mask(grid, num_blocks, block_size))
    masks = torch.stack(frames)[:, None].repeat(1, grid[0], 1, 1)  # (kinds, times, rows, columns)
    if config.context_frames:
        masks[:, max(1, config.context_frames // config.tubelet):] = True
    return masks.flatten(1)


# -------------------------------------------------------------------------------------------- model


class Predictor(nn.Module):
    """A narrow ViT that predicts features of the masked tokens from those of the visible ones.

    dim, heads: the encoder's; kinds: masks per clip, each with a mask token; out_dim: K.
    """

    def __init__(self, grid: tuple[int, int, int], dim: int, heads: int, width: int, depth: int,
                 kinds: int, out_dim: int):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, width)
        self.mask_tokens = nn.ParameterList(torch.zeros(1, 1, width) for _ in range(kinds))  # zero, as published
        self.predictor_pos_embed = nn.Parameter(sincos(width, grid)[None], requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, out_dim)
        self.apply(init_weights)  # the published `init_video_model` undoes the scaling by depth

    def forward(self, context: Tensor, visible: Tensor, masked: Tensor, kind: int) -> Tensor:
        """Encoded visible tokens (B, N, D), visible (B, N), masked (B, M) -> (B, M, K)."""
        positions = self.predictor_pos_embed.expand(len(context), -1, -1)  # (B, L, width)
        x = self.predictor_embed(context) + gather_tokens(positions, visible)  # (B, N, width)
        mask_tokens = self.mask_tokens[kind] + gather_tokens(positions, masked)  # (B, M, width)
        x = torch.cat([x, mask_tokens], dim=1)  # (B, N+M, width)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, context.shape[1]:]))


class VJEPA(nn.Module):
    """Encoder, predictor, and target encoder: an exponential moving average (EMA) of the encoder.

    kinds: masks per clip. target: "latent" or "pixels". predictor_dim, predictor_depth: width and
    blocks of the predictor. Others: as in `ViT`.
    """

    def __init__(self, size: str = "large", image_size: int | tuple[int, int] = 224, patch_size: int = 16,
                 channels: int = 3, frames: int = 16, tubelet: int = 2, predictor_dim: int = 384,
                 predictor_depth: int = 12, kinds: int = 2, target: str = "latent"):
        super().__init__()
        self.encoder = ViT(size, image_size, patch_size, channels, frames, tubelet, class_token=False)
        self.grid, self.target, self.tubelet = self.encoder.grid, target, tubelet
        dim, heads = self.encoder.dim, self.encoder.heads
        out_dim = dim if target == "latent" else channels * tubelet * patch_size ** 2
        self.predictor = Predictor(self.grid, dim, heads, predictor_dim, predictor_depth, kinds, out_dim)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False).eval()

    @torch.no_grad()
    def targets(self, clips: Tensor) -> Tensor:
        """What is predicted, each token normalized by its own mean and std: (B, L, K), float32."""
        if self.target == "latent":
            features = self.target_encoder.forward_features(clips).float()
            return F.layer_norm(features, (self.encoder.dim,))
        P = self.encoder.patch_size
        patches = clips.float().unflatten(4, (-1, P)).unflatten(3, (-1, P))
        tubelets = patches.unflatten(2, (-1, self.tubelet))  # (B, C, times, tubelet, H/P, P, W/P, P)
        tubelets = tubelets.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)  # (B, L, K)
        std = (tubelets.var(-1, keepdim=True) + 1e-6).sqrt()
        return (tubelets - tubelets.mean(-1, keepdim=True)) / std

    def predict(self, clips: Tensor, visible: list[Tensor], masked: list[Tensor]) -> list[Tensor]:
        """Predictions at the masked tokens, (B, M, K), for each kind of mask."""
        embedded = self.encoder.embed(clips)  # (B, L, D)
        predictions = []
        for kind, (v, m) in enumerate(zip(visible, masked)):
            context = self.encoder.encode(gather_tokens(embedded, v))  # (B, N, D)
            predictions.append(self.predictor(context, v, m, kind))  # (B, M, K)
        return predictions

    def forward(self, clips: Tensor, visible: list[Tensor], masked: list[Tensor]) -> Tensor:
        """clips (B, C, T, H, W), for each kind of mask visible (B, N) and masked (B, M) -> loss."""
        targets = self.targets(clips)  # (B, L, K)
        losses = []
        for pred, m in zip(self.predict(clips, visible, masked), masked):
            error = pred.float() - gather_tokens(targets, m)
            losses.append(error.abs().mean() if self.target == "latent" else error.square().mean())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def update_target_encoder(self, momentum: float) -> None:
        """target = momentum * target + (1 - momentum) * encoder, for all parameters at once."""
        averages, weights = self.target_encoder.parameters(), self.encoder.parameters()
        torch._foreach_lerp_(list(averages), list(weights), 1 - momentum)


# ------------------------------------------------------------------------------------- pre-training


def new_model(config: Pretrain | Show) -> VJEPA:
    """The model before training, the same for the same seed; with --init that of the checkpoint."""
    torch.manual_seed(config.seed)
    kinds = wanted = len(MASKS[config.masking])
    if config.init:
        names = common.read_weights(config.init)[0]
        kinds = sum(name.startswith("predictor.mask_tokens.") for name in names) or wanted
    model = common.build(VJEPA, config.size, config.image_size, config.patch_size,
                         config.channels, config.frames, config.tubelet, config.predictor_dim,
                         config.predictor_depth, kinds, config.target)
    if not draw_masks(config, model.grid, 0).any(dim=1).all():
        patches = math.prod(model.grid[1:])
        raise UserError(f"--masking {config.masking} masks none of the {patches} patches of a "
                        "frame: raise --image-size or --mask-ratio")
    if config.init:
        common.load_model(model, config.init, ("predictor.",))
    tokens = model.predictor.mask_tokens
    while len(tokens) < wanted:  # a mask that --init was not trained with starts from the last token
        tokens.append(tokens[-1].detach().clone())
    model.predictor.mask_tokens = tokens[:wanted]
    return model


def mean_tokens(encoder: ViT, autocast: torch.autocast) -> Callable:
    """A function clips -> (B, times * D): tokens, normalized as targets, averaged over space."""
    def encode(clips):
        with autocast:
            tokens = encoder.forward_features(clips).float()
        tokens = F.layer_norm(tokens, (encoder.dim,))
        return tokens.unflatten(1, (encoder.grid[0], -1)).mean(dim=2).flatten(1)
    return encode


def masked_predictions(model: VJEPA, autocast: torch.autocast) -> Callable:
    """A function of a batch -> predictions as in `data`, one for each of the masks."""
    def predict(clips, _, visible, masked):
        with autocast, torch.compiler.set_stance("force_eager"):  # other batch sizes would compile anew
            targets, preds = model.targets(clips), model.predict(clips, visible, masked)
        predictions = []
        for pred, v, m in zip(preds, visible, masked):
            pred = scatter_tokens(torch.zeros_like(targets), m, pred)
            masks = [data.indices_to_mask(indices, targets.shape[1]) for indices in (v, m)]
            predictions.append((pred, targets, *masks))
        return predictions
    return predict


def warn_of_collapse(metrics: dict[str, float], target: str) -> None:
    """Warn of a collapse; both metrics are free of scale, and an untrained encoder's std is about 0.5."""
    std, rank = metrics.get("feature_std", 1.0), metrics.get("effective_rank", 2.0)
    if std < 0.15 or rank < 2:
        advice = "--momentum or --batch-size" if target == "latent" else "--batch-size"
        common.print_once(f"warning: the features collapse (feature std {std:.3f}, effective rank {rank:.1f}): all "
                          f"clips have nearly the same. Lower --base-lr, or raise {advice}")


def pretrain(config: Pretrain) -> None:
    """Pre-training; at its end a picture and, if there are labels, probes."""
    device = common.init_distributed(config.device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each new number of tokens
    train_source, val_source, classes = data.open_sources(
        config.data, config.channels, labeled=False, frames=1 if config.still else config.frames,
        frame_stride=config.frame_stride)
    plan = data.plan_training(config, train_source, val_source, classes)
    workers = 0 if config.benchmark else config.workers  # for random pixels torch gets all cores
    loader = data.Loader(plan.mean, plan.std, device, common.share_cores(workers, device))

    model = new_model(config).to(device)
    autocast, scaler = common.mixed_precision(config.precision, device)

    crop = v2.RandomResizedCrop(config.image_size, (0.3, 1.0), (0.75, 1.35))
    clip = functools.partial(data.single_clip, frames=config.frames)
    augmentation = v2.Compose([crop, v2.RandomHorizontalFlip(0.5 * config.flip), v2.PILToTensor(), clip])
    view = v2.Compose([data.CenterCrop(config.image_size), clip])
    draw = functools.partial(draw_masks, config, model.grid)
    samples = data.Samples(train_source, augmentation, config.seed, draw)
    # Token lists are cut to the shortest of a micro-batch, which as published has 24 clips.
    plan = common.plan_micro_batches(config, plan, model, loader, samples, autocast, largest=24)

    optimizer = torch.optim.AdamW(common.parameter_groups(model, config.weight_decay), fused=True)
    checkpoints = common.Checkpoints(config, plan, model, optimizer, scaler)
    start = 0 if config.benchmark else checkpoints.resume()
    net = common.wrap_model(model, config, device, by_block=True)

    train_view = data.Samples(train_source, view, config.seed, replace_unreadable=False)
    val_view = data.Samples(val_source or train_source, view, config.seed, replace_unreadable=False)
    masked_view = data.Samples(val_view.source, view, config.seed, draw)
    batches = loader.train(samples, config, plan, start)
    encode, predict = mean_tokens(model.target_encoder, autocast), masked_predictions(model, autocast)

    losses, peak_lr = [], config.base_lr * config.batch_size / 256
    warmup, horizon = config.warmup * plan.steps, config.schedule_scale * plan.steps
    if config.benchmark:
        log, steps = None, common.benchmark_steps(config, plan, device, "clips")
    else:
        log = common.Log(config, plan, start, unit="clips")
        steps = log.steps()
    with common.StopSignals(enabled=not config.benchmark) as stop:
        for step in steps:
            lr = cosine_schedule(step + 1, horizon, warmup, peak_lr, config.min_lr, config.start_lr * peak_lr)
            weight_decay = cosine_schedule(step + 1, horizon, 0, config.weight_decay, config.final_weight_decay)
            momentum = config.momentum + (config.final_momentum - config.momentum) * step / horizon
            for group in optimizer.param_groups:
                group["lr"], group["weight_decay"] = lr, weight_decay * group["decays"]

            for micro_step in range(plan.accumulate):
                clips, _, visible, masked = next(batches)
                net.require_backward_grad_sync = micro_step == plan.accumulate - 1  # DDP syncs once
                with autocast:
                    loss = net(clips, visible, masked)
                scaler.scale(loss / plan.accumulate).backward()
                losses.append(loss.detach())
            if config.clip_grad and step >= warmup:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.encoder.parameters(), config.clip_grad)
                nn.utils.clip_grad_norm_(model.predictor.parameters(), config.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            model.update_target_encoder(momentum)
            if config.benchmark:
                continue

            done, metrics = step + 1, {}
            stopped = stop.received()  # the number of a signal, or 0
            last = done == plan.steps
            if last or done % config.evaluate_every == 0:
                metrics = data.evaluate_features(encode, train_view, val_view, loader, config.evaluate_samples, classes)
                metrics |= data.evaluate_predictions(predict, model.grid, masked_view, loader, config.evaluate_samples)
                warn_of_collapse(metrics, config.target)
            if metrics or stopped or config.log_due(done):
                log.write(done, losses, scaler, lr=lr, momentum=momentum, **metrics)
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
        print(data.describe_variance_left(metrics, f"{TARGETS[config.target]} of {kind} clips"))
        save_picture(model, masked_view, loader, config)
    if classes:
        before = mean_tokens(new_model(config).to(device).target_encoder, autocast)
        limit = 15 * config.evaluate_samples
        labels = max(2, round(config.probe_labels * min(limit, len(train_source))))
        data.print_probes({"before training": before, "after": encode}, train_view, val_view, loader, labels, limit)
    data.report_unreadable(train_source, val_source)


# ---------------------------------------------------------------------------- probe and fine-tuning


class CrossAttention(nn.Module):
    """Multi-head attention of queries (B, 1, D) to tokens (B, N, D): (B, 1, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim).requires_grad_(False)  # in the published files, never used

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        q = self.q(query).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, 1, D/heads)
        k, v = self.kv(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, D/heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CrossAttentionBlock(nn.Module):
    """Cross-attention and an MLP; queries (B, 1, D), tokens (B, N, D) -> (B, 1, D)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.xattn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        query = query + self.xattn(query, self.norm1(x))
        return query + self.mlp(self.norm2(query))


class AttentiveClassifier(nn.Module):
    """Attentive probe: a learned query attends to all tokens, (B, N, D) -> (B, num_classes)."""

    def __init__(self, dim: int, heads: int, num_classes: int):
        super().__init__()
        self.pooler = nn.Module()  # nested as in the published files
        self.pooler.query_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        self.pooler.cross_attention_block = CrossAttentionBlock(dim, heads)
        self.pooler.apply(init_weights)
        nn.init.trunc_normal_(self.pooler.query_tokens, std=0.02)
        with torch.no_grad():  # as published: by sqrt(2 * depth), for a depth of 1
            self.pooler.cross_attention_block.mlp.fc2.weight.div_(math.sqrt(2))
        self.linear = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        query = self.pooler.query_tokens.expand(len(x), -1, -1)
        return self.linear(self.pooler.cross_attention_block(query, x)[:, 0])


class Classifier(nn.Module):
    """An encoder with an attentive probe on all its tokens."""

    def __init__(self, encoder: ViT, num_classes: int):
        super().__init__()
        self.encoder = encoder
        self.classifier = AttentiveClassifier(encoder.dim, encoder.heads, num_classes)

    def forward(self, clips: Tensor) -> Tensor:
        """(B, [views,] segments, C, T, H, W) -> (B, num_classes): logits, or log mean probability."""
        clips = clips.unsqueeze(1) if clips.ndim == 6 else clips
        B, views, segments = clips.shape[:3]
        x = self.encoder.forward_features(clips.flatten(0, 2))  # (B * views * segments, L, D)
        logits = self.classifier(x.reshape(B * views, -1, x.shape[2]))  # (B * views, num_classes)
        if views == 1:
            return logits
        return logits.unflatten(0, (B, views)).float().softmax(dim=-1).mean(dim=1).log()


def new_classifier(config: Probe | Finetune, num_classes: int) -> Classifier:
    """The encoder in --init or a new one, with a new probe; with --eval-only that of a checkpoint."""
    torch.manual_seed(config.seed)
    arguments = {"image_size": config.image_size, "frames": config.frames,
                 "tubelet": config.tubelet, "drop_path": getattr(config, "drop_path", 0.0)}
    if config.init:
        encoder = common.load_encoder(config.init, **arguments)
    else:
        encoder = common.build(ViT, config.size, patch_size=config.patch_size,
                               channels=config.channels, class_token=False, **arguments)
    if not isinstance(config, Finetune):
        encoder.requires_grad_(False)
    torch.manual_seed(config.seed)  # the same probe for any encoder
    model = Classifier(encoder, num_classes)
    if config.eval_only:
        path = config.classifier or config.init
        weights, prefix = common.read_weights(path)[0], "classifier."
        weights = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        common.load_strictly(model.classifier, weights, path)
    return model


def probe(config: Probe) -> None:
    """Training of the attentive probe on the frozen encoder."""
    classify(config, layer_decay=1.0)


def finetune(config: Finetune) -> None:
    """Training of the encoder and the attentive probe together."""
    classify(config, config.layer_decay)


def classify(config: Probe | Finetune, layer_decay: float) -> None:
    device = common.init_distributed(config.device)
    tested = (config.classifier or config.init) if config.eval_only else None
    train_source, val_source, classes = data.open_sources(
        config.data, config.channels, labeled=True, frames=1 if config.still else config.frames,
        frame_stride=config.frame_stride, tested=tested)
    plan = data.plan_training(config, train_source, val_source, classes)
    loader = data.Loader(plan.mean, plan.std, device, common.share_cores(config.workers, device))
    train_source.segments = config.segments if config.segments > 1 else None  # None: a random time
    val_source.segments = config.segments

    flip = 0.5 if config.flip and (config.data or config.still) else 0.0
    repeat = [functools.partial(data.repeat_in_time, frames=config.frames)] if config.still else []
    augmentation = data.finetuning_transform(config, plan.mean, plan.std, flip, operations=4)
    view = data.CenterCrop(config.image_size, 1 if config.still else config.views)
    val = data.Samples(val_source, v2.Compose([view, *repeat]), replace_unreadable=False)
    model = new_classifier(config, len(classes)).to(device)
    autocast, _ = common.mixed_precision(config.precision, device)

    def test(last):
        return common.accuracy(model, loader.test(val), autocast, verbose=last)

    def schedule(step):
        peak_lr = config.base_lr * config.batch_size / 256
        lr = cosine_schedule(step + 1, plan.steps, config.warmup * plan.steps, peak_lr, config.min_lr)
        return lr, cosine_schedule(step + 1, plan.steps, 0, config.weight_decay, config.final_weight_decay)

    if config.eval_only:
        test(last=True)
    else:
        samples = data.Samples(train_source, v2.Compose([augmentation, *repeat]), config.seed)
        groups = common.parameter_groups(model, config.weight_decay, layer_decay)
        optimizer = torch.optim.AdamW(groups, fused=True)
        common.train_classifier(
            config, plan, classes, model, optimizer, schedule, loader, samples, test, unit="clips")
    data.report_unreadable(train_source, val_source)


# ----------------------------------------------------------------------------------------- pictures


def pca_colors(tokens: Tensor, *others: Tensor) -> list[Tensor]:
    """Colors of tokens (L, D), and of others, by the first three principal components of the first."""
    mean = tokens.mean(dim=0)
    components = torch.linalg.svd(tokens - mean, full_matrices=False).Vh[:3].T  # (D, 3)
    values = (tokens - mean) @ components  # (L, 3)
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    return [(((x - mean) @ components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
            for x in (tokens, *others)]


@torch.no_grad()
def save_picture(model: VJEPA, samples: data.Samples, loader: data.Loader, config: Pretrain | Show,
                 with_predictor: bool = True) -> None:
    """A picture of a clip, time from left to right: frames; context, targets, predictions of each mask."""
    batch = loader.for_picture(samples, 1)
    predictions = masked_predictions(model, contextlib.nullcontext())(*batch)
    metrics, name = data.variance_left([predictions], model.grid), TARGETS[config.target]
    caption = data.describe_variance_left(metrics, f"{name} of this clip")
    if not with_predictor:
        caption = "no predictions, since the checkpoint has no predictor"
    predictions = [[x[0].cpu() for x in prediction] for prediction in predictions]
    targets, *preds = pca_colors(predictions[0][1], *(pred for pred, *_ in predictions))  # (L, 3)

    times = data.evenly_spaced(model.grid[0], 8)
    frames = batch[0][0, :, ::config.tubelet].transpose(0, 1)[times]  # (times, C, H, W)
    frames = frames * loader.std + loader.mean
    if not data.are_photographs(samples.source, config.channels):
        frames = common.stretch(frames, frames)
    frames = common.enlarge(frames)

    def by_time(x):  # (L, C) -> (times, C, H, W)
        x = x.float().unflatten(0, model.grid)[times].movedim(3, 1)
        return F.interpolate(x, frames.shape[-2:])

    pictures = {"frames": frames}
    for kind, (pred, (_, _, visible, masked)) in enumerate(zip(preds, predictions), 1):
        number = f" {kind}" if len(preds) > 1 else ""
        visible, masked = visible[:, None], masked[:, None]  # (L, 1)
        outlined = functools.partial(common.outline, mask=masked.unflatten(0, model.grid)[times, ..., 0])
        pictures[f"context{number}"] = torch.where(by_time(visible) > 0, frames, 0.5)
        pictures[f"target {name}{number}"] = outlined(by_time(targets))
        if with_predictor:
            pictures[f"predicted {name}{number}"] = outlined(by_time(torch.where(masked, pred, 0.5)))
    caption += "; colors: the first three principal components of the target"
    common.save_pictures(pictures, Path(config.out, "tokens.png"), caption, in_rows=True)


def show(config: Show) -> None:
    """A picture of the masks, features and predictions of --image, or of a clip of --data."""
    if not config.init:
        raise UserError("show needs --init, a checkpoint")
    device = common.init_distributed(config.device)
    still = Path(config.image).suffix.lower() in data.IMAGE_FILES if config.image else config.still
    train_source, val_source, _ = data.open_sources(
        config.image or config.data, config.channels, labeled=False,
        frames=1 if still else config.frames, frame_stride=config.frame_stride)
    source = val_source or train_source
    loader = data.Loader(*data.mean_and_std(config, source), device)
    model = new_model(config).to(device)
    names = common.read_weights(config.init)[0]
    with_predictor = any(name.startswith("predictor.") for name in names)
    clip = functools.partial(data.single_clip, frames=config.frames)
    view = v2.Compose([data.CenterCrop(config.image_size), clip])
    draw = functools.partial(draw_masks, config, model.grid)
    save_picture(model, data.Samples(source, view, config.seed, draw), loader, config, with_predictor)


# ------------------------------------------------------------------------- presets, command line
# The demos are small enough for one CPU, on the built-in clips.
DEMO_ENCODER = dict(size="nano", image_size=48, patch_size=12, frames=8, frame_stride=8)
DEMO_MASKING = dict(masking="tube", mask_ratio=0.5, context_frames=4)
DEMO_RUN = dict(log_every=20, save_every=300)
PRETRAIN_PRESETS = {
    "demo": DEMO_ENCODER | DEMO_MASKING | DEMO_RUN | dict(
        predictor_dim=64, predictor_depth=3, steps=2200, batch_size=16, base_lr=1.6e-2, start_lr=0.0,
        warmup=0.1, final_weight_decay=0.04, momentum=0.996, evaluate_every=500, evaluate_samples=400)}
PROBE_PRESETS = {
    "demo": DEMO_ENCODER | DEMO_RUN | dict(
        segments=1, views=1, epochs=5, batch_size=64, base_lr=4e-3, randaugment=0.0, erasing=0.0)}
FINETUNE_PRESETS = {"demo": PROBE_PRESETS["demo"] | dict(epochs=3, drop_path=0.0)}

TASKS = {"pretrain": (pretrain, Pretrain, PRETRAIN_PRESETS),
         "probe": (probe, Probe, PROBE_PRESETS),
         "finetune": (finetune, Finetune, FINETUNE_PRESETS),
         "show": (show, Show, {"demo": DEMO_MASKING})}


def configure(task: str = "pretrain", preset: str | None = None, **given):
    """The config of a task (`common.configure`), as `pretrain(configure(data="DIR", steps=9))`."""
    return common.configure(TASKS, (EncoderConfig, MaskingConfig, PredictionConfig), task, preset, given)


if __name__ == "__main__":
    common.main(__doc__, TASKS, configure)
