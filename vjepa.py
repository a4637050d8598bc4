"""V-JEPA: "Revisiting Feature Prediction for Learning Visual Representations from Video", Bardes et al. 2024,
arXiv 2404.08471.

Hide large parts of a video and predict, from the rest, not the hidden pixels but the features that a slowly following
copy of the encoder has for them. What no one can predict, such as texture and noise, need not be in the features.

    clips (B, C, T, H, W)
      | cut into tubelets (2 frames of a 16 x 16 patch), project, add 3-D sine-cosine positions      (B, L, D)
      |
      |-- the x-encoder, a ViT, sees the N context tokens alone                                      (B, N, D)
      |     | project to the width P of the predictor, add positions                                 (B, N, P)
      |     | append a mask token with its position for each of the M target places                  (B, N + M, P)
      |   the predictor, a narrow ViT; take the last M, project                                      (B, M, D)
      |                                                                                                L1 |
      |-- the y-encoder, a moving average of the x-encoder over the steps, sees all tokens           (B, L, D)
            | LayerNorm, take the targets, no gradient                                               (B, M, D)

    Each clip has two masks, many small blocks (short-range) and few large ones (long-range); the loss is their mean.

    python vjepa.py                                         pre-train on clips of a camera that moves over collages
    torchrun --nproc_per_node=8 vjepa.py --data DIR --accumulate 16         the paper's recipe on your videos
    python vjepa.py probe --data DIR --init runs/vjepa/last.pt              attentive probe of the frozen encoder
    python vjepa.py finetune --data DIR --init runs/vjepa/last.pt
    python vjepa.py show --init runs/vjepa/last.pt --image clip.mp4
"""
import copy
import functools
import math
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms import v2
from tqdm import tqdm

import data
from common import (BLOCK_SEED, CHANNELS, CLASSIFICATION, INPUT, MASK_SEED, SIZES, TRAINING, WATCH, Block, Run, UserError,
                    ViT, accuracy, compile_blocks, cosine, count, derive_seed, flag, height_x_width, initialise, join_processes, load_model,
                    load_strictly, no_sync, number, parameter_groups, parse_command_line, precision_of,
                    read_weights, run_main, save_pictures, share, sincos, take, train_classifier, use_checkpointing)

# flag(the paper's value for ViT-L, meaning, kind, value in the demo on the built-in clips)
MODEL = CHANNELS | dict(
    size=flag("large", "of the encoder", list(SIZES), demo="nano"),
    image_size=flag(224, "pixels, a number or HEIGHTxWIDTH", height_x_width, demo=48),
    patch_size=flag(16, "side of a patch, pixels", demo=12),
    frames=flag(16, "of a clip", demo=8),
    tubelet=flag(2, "frames that one token spans"),
    stride=flag(4, "frames of a video from one frame of the clip to the next", demo=8),
)
MASKING = dict(
    masking=flag("multiblock", "what is hidden over all time: many small blocks and few large ones (two masks), one "
                 "block, or random places", ["multiblock", "block", "tube"], demo="tube"),
    mask_ratio=flag(0.9, "share of the frame that block and tube hide", share, demo=0.5),
    context_frames=flag(None, "nothing is visible after so many frames (default: of all)", count, demo=4),
    mask_group=flag(24, "clips whose lists of tokens are cut to the same lengths", demo=16),
)
PREDICTOR = dict(
    target=flag("latent", "what is predicted: features of the y-encoder, or normalised pixels", ["latent", "pixels"]),
    predictor_dim=flag(384, "width of the predictor", demo=64),
    predictor_depth=flag(12, "blocks of the predictor", demo=3),
)
STILL = dict(still=flag(False, "the data are images, each of which is repeated in time; if not given, as in --init"))
PRETRAIN = INPUT | MODEL | STILL | MASKING | PREDICTOR | TRAINING | dict(
    steps=flag(90_000, "length of the training, optimizer steps; or --epochs", demo=3000),
    epochs=flag(None, "passes over the data", number),
    batch_size=flag(3072, "clips per step, on all GPUs together", demo=16),
    base_lr=flag(6.25e-4 * 256 / 3072, "learning rate per 256 clips of a batch", demo=1.6e-2),
    start_lr=flag(0.32, "share of the learning rate at which the warm-up starts", share, demo=0.0),
    min_lr=flag(1e-6, "learning rate at the end of the schedule"),
    warmup=flag(40 / 300, "share of the steps in which the learning rate rises", share, demo=0.1),
    weight_decay=flag(0.04, "of AdamW at the start of the schedule"),
    final_weight_decay=flag(0.4, "of AdamW at its end", demo=0.04),
    momentum=flag(0.998, "of the y-encoder at the start of the schedule", share, demo=0.996),
    final_momentum=flag(1.0, "of the y-encoder at its end", share),
    stretch=flag(1.25, "length of the schedules over that of the training, which cuts them off",
                 functools.partial(number, least=1)),
    clip_grad=flag(10.0, "largest L2 norm of the gradient, of encoder and predictor apart, after the warm-up"),
    flip=flag(True, "mirror half of the training samples"),
)
FINAL_PROBE = dict(probe_labels=flag(1.0, "share of its training clips that the probe after the training gets", share))
PROBE = INPUT | MODEL | STILL | TRAINING | CLASSIFICATION | dict(
    segments=flag(8, "clips of each video, whose tokens the probe attends to together", demo=1),
    views=flag(3, "squares that each clip is cut into for a test, their probabilities averaged", demo=1),
    epochs=flag(20.0, "passes over the data", demo=5.0),
    batch_size=flag(256, "clips per step, on all GPUs together", demo=64),
    base_lr=flag(1e-3, "learning rate per 256 clips of a batch", demo=4e-3),
    min_lr=flag(0.0, "learning rate at the end of the schedule"),
    warmup=flag(0.0, "share of the steps in which the learning rate rises", share),
    weight_decay=flag(0.01, "of AdamW at the start of the schedule"),
    final_weight_decay=flag(1e-6, "of AdamW at its end"),
    clip_grad=flag(1.0, "largest L2 norm of the gradient"),
    smoothing=flag(0.0, "label smoothing", share),
    randaugment=flag(7.0, "magnitude of RandAugment, 0 to 10", functools.partial(number, most=10), demo=0.0),
    erasing=flag(0.25, "probability of random erasing", share, demo=0.0),
    flip=flag(False, "mirror half of the training samples (never of the built-in clips)"),
    classifier=flag(None, "published attentive probe to test with the encoder in --init", str),
)
FINETUNE = PROBE | dict(  # ours: the published code has none
    segments=flag(1, "clips of each video, whose tokens the probe attends to together"),
    epochs=flag(30.0, "passes over the data", demo=3.0),
    warmup=flag(0.1, "share of the steps in which the learning rate rises", share),
    weight_decay=flag(0.05, "of AdamW at the start of the schedule"),
    final_weight_decay=flag(0.05, "of AdamW at its end"),
    layer_decay=flag(0.75, "factor on the learning rate from one block to the block below"),
    drop_path=flag(0.1, "chance to skip a branch of the last block; rises linearly from the first", share, demo=0.0),
)
SHOW = INPUT | MODEL | STILL | MASKING | dict(
    image=flag(None, "video, folder of frames or photograph for show (default: a clip of --data)", str))


# ----------------------------------------------------------------------------------------------------------- masking
# A mask is two lists of places, visible (B, N) and hidden (B, M): indices of tokens in the raster order of the grid
# (times, rows, columns). All clips need the same N and M: lists are cut to the shortest, and what is cut is in neither.


def block_size(grid, scale, generator):
    """(height, width) of the blocks of a step, in tokens: a share `scale` of the frame, aspect 0.75 to 1.5."""
    rows, columns = grid[-2:]
    aspect = 0.75 + 0.75 * torch.rand((), generator=generator).item()
    area = int(scale * rows * columns)
    height, width = min(rows, round(math.sqrt(area * aspect))), min(columns, round(math.sqrt(area / aspect)))
    return height, width - (height == rows and width == columns)  # a block never fills the frame


def multiblock_mask(batch, grid, blocks, size, generator, device, context_times=None):
    """The union of `blocks` blocks at random places is hidden, over all time.

    size: (height, width) of a block, tokens. context_times: after that many time steps everything is hidden (causal
    multi-block). Clips of which nothing would be visible are drawn again.
    """
    rows, columns = grid[-2:]
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    seen = torch.zeros(batch, rows, columns, dtype=torch.bool, device=device)
    while (empty := ~seen.flatten(1).any(dim=1)).any():
        place = torch.rand(2, batch, blocks, 1, 1, generator=generator, device=device)
        top, left = (place[0] * (rows - size[0] + 1)).floor(), (place[1] * (columns - size[1] + 1)).floor()
        inside = (row >= top) & (row < top + size[0]) & (column >= left) & (column < left + size[1])
        seen[empty] = ~inside.any(dim=1)[empty]
    return over_time(seen.flatten(1), grid[0], context_times)


def tube_mask(batch, grid, ratio, generator, device, context_times=None):
    """Random places are hidden, the same at all times."""
    noise = torch.rand(batch, grid[1] * grid[2], generator=generator, device=device)
    kept = max(1, int(noise.shape[1] * (1 - ratio)))
    seen = torch.zeros_like(noise, dtype=torch.bool).scatter_(1, noise.topk(kept, dim=1).indices, True)
    return over_time(seen, grid[0], context_times)


def over_time(seen, times, context_times=None):
    """Places of a frame (batch, rows*columns), True = visible -> (visible, hidden) of the clip, cut to the shortest."""
    early = torch.arange(times, device=seen.device) < (context_times or times)
    seen = (seen[:, None] & early[:, None]).flatten(1)  # (batch, L)
    pair = []
    for mask in (seen, ~seen):
        places = mask.byte().argsort(dim=1, descending=True, stable=True)  # first those of the mask, in raster order
        pair.append(places[:, :int(mask.sum(dim=1).min())])  # what is cut is late in time
    return pair


MASKS = {  # (blocks, share of the frame that a block takes) of each kind of mask; a share of None is --mask-ratio
    "multiblock": [(8, 0.15), (2, 0.7)],  # short-range, long-range
    "block": [(1, None)],
    "tube": [(None, None)],  # no blocks
}


def draw_masks(args, grid, step, rows, device):
    """The masks of some rows (a slice) of a step's batch: ([visible, ...], [hidden, ...]), an entry per mask of a clip.

    The sizes of blocks depend on (seed, step, kind) alone. Places are drawn for a group of `mask_group` clips, and cut
    to the shortest of the group, as the published code does for the 24 clips of a GPU. As long as the clips of a
    micro-batch divide `mask_group`, the number of processes and micro-batches does not change the masks. They are drawn
    on the CPU, since the lengths of the lists become shapes: a GPU would be waited for.
    """
    clips = rows.stop - rows.start
    size = max(clips, args.mask_group // clips * clips)  # of a group, whole micro-batches
    group = rows.start // size
    context_times = max(1, args.context_frames // args.tubelet) if args.context_frames else None
    visible, hidden = [], []
    for kind, (blocks, scale) in enumerate(MASKS[args.masking]):
        generator = torch.Generator().manual_seed(derive_seed(args.seed, MASK_SEED, step, kind, group))
        scale = scale or args.mask_ratio
        if args.masking == "tube":
            pair = tube_mask(size, grid, scale, generator, "cpu", context_times)
        else:
            of_step = torch.Generator().manual_seed(derive_seed(args.seed, BLOCK_SEED, step, kind))
            block = block_size(grid, scale, of_step)
            pair = multiblock_mask(size, grid, blocks, block, generator, "cpu", context_times)
        for lists, ids in zip((visible, hidden), pair):
            ids = ids[rows.start - group * size:rows.stop - group * size]
            if torch.device(device).type == "cuda":
                ids = ids.pin_memory()  # from other memory the copy may wait for the GPU
            lists.append(ids.to(device, non_blocking=True))
    return visible, hidden


# -------------------------------------------------------------------------------------------------------------- model


class Predictor(nn.Module):
    """A narrow ViT that predicts the features at the hidden places from the context.

    grid: of the tokens; dim: width of the encoder, heads: as many as the encoder's; out_dim: numbers to predict.
    """

    def __init__(self, grid, dim, heads, width, depth, masks, out_dim):
        super().__init__()
        self.predictor_embed = nn.Linear(dim, width)
        # One mask token for each kind of mask.
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, width)) for _ in range(masks))
        self.predictor_pos_embed = nn.Parameter(sincos(width, grid)[None], requires_grad=False)
        self.predictor_blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.predictor_norm = nn.LayerNorm(width, eps=1e-6)
        self.predictor_proj = nn.Linear(width, out_dim)
        initialise(self)  # the published classes scale each block by its depth, which their `init_video_model` undoes

    def forward(self, context, visible, hidden, kind):
        """context (B, N, D), places visible (B, N) and hidden (B, M), kind of the mask -> (B, M, out_dim)."""
        positions = self.predictor_pos_embed.expand(len(context), -1, -1)  # (B, L, P)
        x = self.predictor_embed(context) + take(positions, visible)  # (B, N, P)
        mask_tokens = self.mask_tokens[kind] + take(positions, hidden)  # (B, M, P)
        x = torch.cat([x, mask_tokens], dim=1)  # (B, N + M, P)
        for block in self.predictor_blocks:
            x = block(x)
        return self.predictor_proj(self.predictor_norm(x[:, context.shape[1]:]))


class VJEPA(nn.Module):
    """The x-encoder (`encoder`), the `predictor`, and the y-encoder (`target_encoder`), a moving average of the first.

    predictor_dim, predictor_depth: width and blocks of the predictor; masks: kinds of masks; target: "latent" or
    "pixels". The rest as in `ViT`.
    """

    def __init__(self, size="large", image_size=224, patch_size=16, channels=3, frames=16, tubelet=2,
                 predictor_dim=384, predictor_depth=12, masks=2, target="latent"):
        super().__init__()
        self.encoder = ViT(size, image_size, patch_size, channels, frames, tubelet, class_token=False)
        self.target, self.tubelet = target, tubelet
        pixels = channels * tubelet * patch_size ** 2
        dim, heads = self.encoder.dim, self.encoder.blocks[0].heads
        self.predictor = Predictor(self.encoder.grid, dim, heads, predictor_dim, predictor_depth, masks,
                                   dim if target == "latent" else pixels)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False).eval()

    @torch.no_grad()
    def targets(self, clips):
        """What is to be predicted, at all tokens, each normalised by its own mean and deviation: (B, L, K), float32.

        K is D, or the pixels of a tubelet.
        """
        if self.target == "latent":
            return F.layer_norm(self.target_encoder.tokens(clips).float(), (self.encoder.dim,))
        tubelets = clips.float()
        for axis, side in ((2, self.tubelet), (4, self.encoder.patch_size), (6, self.encoder.patch_size)):
            tubelets = tubelets.unflatten(axis, (-1, side))  # (B, C, times, tubelet, rows, side, columns, side) at last
        tubelets = tubelets.permute(0, 2, 4, 6, 3, 5, 7, 1).flatten(4).flatten(1, 3)  # (B, L, K)
        return (tubelets - tubelets.mean(-1, keepdim=True)) / (tubelets.var(-1, keepdim=True) + 1e-6).sqrt()

    def forward(self, clips, visible, hidden):
        """clips (B, C, T, H, W), lists of places visible (B, N) and hidden (B, M), an entry per kind of mask -> loss.

        L1 in latent space, mean squared error for pixels; the mean over the kinds of masks.
        """
        targets = self.targets(clips)  # (B, L, K)
        embedded = self.encoder.embed(clips)  # (B, L, D)
        losses = []
        for kind, (context_ids, target_ids) in enumerate(zip(visible, hidden)):
            context = self.encoder.encode(take(embedded, context_ids))  # (B, N, D)
            pred = self.predictor(context, context_ids, target_ids, kind)  # (B, M, K)
            error = pred.float() - take(targets, target_ids)
            losses.append(error.abs().mean() if self.target == "latent" else error.square().mean())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def update_target_encoder(self, momentum):
        """Move the y-encoder towards the x-encoder: y = momentum * y + (1 - momentum) * x, all parameters at once."""
        torch._foreach_lerp_(list(self.target_encoder.parameters()), list(self.encoder.parameters()), 1 - momentum)


# ------------------------------------------------------------------------------------------------------- pre-training


def new_model(args):
    """The model before training, the same for the same seed; with --init the one to go on from."""
    torch.manual_seed(args.seed)
    model = VJEPA(args.size, args.image_size, args.patch_size, args.channels, args.frames, args.tubelet,
                  args.predictor_dim, args.predictor_depth, len(MASKS[args.masking]), args.target)
    _, hidden = draw_masks(args, model.encoder.grid, 0, slice(0, 1), "cpu")
    if not all(ids.numel() for ids in hidden):
        raise UserError(f"--masking {args.masking} hides none of the {math.prod(model.encoder.grid[1:])} patches of a "
                        "frame: the image is too small for its blocks, or --mask-ratio too low")
    if args.init:
        load_model(model, args, new=("predictor.",))
    return model


def open_clips(args, labelled):
    """Sources of clips, or with --still of images, as in `data.open_sources`."""
    tested = (args.classifier or args.init) if labelled and args.eval_only else None
    return data.open_sources(args.data, args.channels, labelled, 1 if args.still else args.frames, args.stride,
                             tested=tested)


def in_time(transform, args):
    """The transform itself, or for --still one that repeats the image in time."""
    return v2.Compose([transform, functools.partial(data.repeated, frames=args.frames)]) if args.still else transform


def features_of(encoder):
    """The function clips -> (B, times * D): tokens, normalised as the targets are, averaged over each time step."""
    return lambda clips: F.layer_norm(encoder.eval().tokens(clips).float(), (encoder.dim,)).unflatten(
        1, (encoder.grid[0], -1)).mean(dim=2).flatten(1)


def pretrain(args):
    """The task `pretrain`; at its end a picture, and where there are labels a probe of the features."""
    device = join_processes(args)
    train_source, val_source, classes = open_clips(args, labelled=False)
    data.settle(args, train_source, val_source, classes)  # fills in args.steps, args.mean and args.std
    augmentation = data.crop_and_flip(args.image_size, scale=(0.3, 1.0), flip=args.flip, ratio=(0.75, 1.35),
                                      interpolation=data.BILINEAR)
    samples = data.Samples(train_source, in_time(augmentation, args), args.seed)
    view = in_time(data.CentreCrop(args.image_size), args)
    train, val = (data.Samples(x, view, replace_unreadable=False) for x in (train_source, val_source or train_source))

    model = new_model(args).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), fused=True)
    autocast, scaler = precision_of(args)
    run = Run(args, model, optimizer, scaler)  # goes on from --out, if there is a run: then run.step > 0
    if args.compile:
        compile_blocks(model)  # one graph for all lengths of the lists of tokens
    if args.checkpointing:
        use_checkpointing(model)
    # DDP wraps all three networks together; the y-encoder has no gradient, so it is only copied once, at the start.
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if args.processes > 1 else model

    batches = data.training_loader(samples, args, device, run.step)
    horizon = args.stretch * args.steps  # the schedules are made for a longer run, and cut
    for step in range(run.step, args.steps):
        peak = args.base_lr * args.batch_size / 256
        lr = cosine(step + 1, horizon, args.warmup * args.steps, peak, args.min_lr, args.start_lr * peak)
        weight_decay = cosine(step + 1, horizon, 0, args.weight_decay, args.final_weight_decay)
        momentum = args.momentum + (args.final_momentum - args.momentum) * step / horizon
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = lr, weight_decay * group["decays"]

        for part in range(args.accumulate):
            visible, hidden = draw_masks(args, model.encoder.grid, step, data.rows_of_process(args, part), device)
            clips, _ = next(batches)  # (B, views, segments, C, T, H, W), of which there is one clip
            with no_sync(net, last=part == args.accumulate - 1):  # DDP averages gradients after the last micro-batch
                with autocast:
                    loss = net(data.one_clip(clips), visible, hidden)
                scaler.scale(loss / args.accumulate).backward()
            run.losses.append(loss.detach())
        if args.clip_grad and step >= args.warmup * args.steps:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.encoder.parameters(), args.clip_grad)
            nn.utils.clip_grad_norm_(model.predictor.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.update_target_encoder(momentum)

        found = None  # no look at the features at this step
        if not args.benchmark and ((step + 1) % args.probe_every == 0 or step + 1 == args.steps):
            features = features_of(model.target_encoder)
            found = data.watch(features, train, val, args, device, bool(classes))
            # Neither number depends on the scale of the features; untrained encoders have a spread of about 0.5.
            if found and (found["spread"] < 0.15 or found["rank"] < 2) and args.rank == 0:
                advice = ", raise --momentum or --batch-size" if args.target == "latent" else " or raise --batch-size"
                tqdm.write("warning: the features collapse (spread {spread:.3f}, effective rank {rank:.1f}): all clips "
                           "have nearly the same. Lower --base-lr".format(**found) + advice, sys.stderr)
        run.step_done(lr, found, momentum=momentum)  # logs, saves
    run.close()

    if args.rank == 0:
        save_picture(model.target_encoder, val, args, device)
    if classes:
        encoders = {"before training": new_model(args).to(device).target_encoder, "after": model.target_encoder}
        encoders = {when: features_of(encoder) for when, encoder in encoders.items()}
        clips = 15 * args.probe_samples
        data.print_probe(encoders, train, val, args, device, max(2, round(args.probe_labels * clips)), clips)
    data.report_unreadable(args, train_source, val_source)


# ----------------------------------------------------------------------------------------------- probe and fine-tuning


class AttentiveClassifier(nn.Module):
    """The attentive probe: a learned query gathers from all tokens, (B, N, D) -> logits (B, classes)."""

    def __init__(self, dim, heads, classes):
        super().__init__()
        self.heads, self.pooler = heads, nn.Module()  # nested as in the published files
        self.pooler.query_tokens = nn.Parameter(torch.zeros(1, 1, dim))
        attention = nn.ModuleDict({"q": nn.Linear(dim, dim), "kv": nn.Linear(dim, 2 * dim),
                                   "proj": nn.Linear(dim, dim)})
        attention["proj"].requires_grad_(False)  # the published probe has it and never uses it
        mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})
        self.pooler.cross_attention_block = nn.ModuleDict({
            "norm1": nn.LayerNorm(dim), "xattn": attention, "norm2": nn.LayerNorm(dim), "mlp": mlp})
        initialise(self)
        nn.init.trunc_normal_(self.pooler.query_tokens, std=0.02)
        with torch.no_grad():  # as in the published code, by the depth of the block, of which there is one
            self.pooler.cross_attention_block["mlp"].fc2.weight.div_(math.sqrt(2))
        self.linear = nn.Linear(dim, classes)

    def forward(self, x):
        block, query = self.pooler.cross_attention_block, self.pooler.query_tokens.expand(len(x), -1, -1)  # (B, 1, D)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (  # each (B, heads, 1 or N, D/heads)
            block["xattn"]["q"](query), *block["xattn"]["kv"](block["norm1"](x)).chunk(2, dim=-1)))
        query = query + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        query = query + block["mlp"].fc2(F.gelu(block["mlp"].fc1(block["norm2"](query))))
        return self.linear(query[:, 0])


class Classifier(nn.Module):
    """An encoder with an attentive probe on all its tokens."""

    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.classifier = AttentiveClassifier(encoder.dim, encoder.blocks[0].heads, classes)

    def forward(self, clips):
        """Clips (B, views, segments, C, T, H, W) -> logits (B, classes).

        The probe attends to the tokens of all segments together; over views, probabilities are averaged.
        """
        B, views, segments = clips.shape[:3]
        x = self.encoder.tokens(clips.flatten(0, 2))  # (B * views * segments, L, D)
        logits = self.classifier(x.reshape(B * views, -1, x.shape[2]))  # (B * views, classes)
        return logits if views == 1 else logits.unflatten(0, (B, views)).float().softmax(dim=-1).mean(dim=1).log()


def new_classifier(args, classes):
    """The encoder in --init (or a new one) with a new probe; the encoder is frozen if the task is to probe it."""
    torch.manual_seed(args.seed)
    shape = {"image_size": args.image_size, "frames": args.frames, "tubelet": args.tubelet,
             "drop_path": args.drop_path if args.task == "finetune" else 0.0}
    if args.init:
        encoder = ViT.load(args.init, **shape)
    else:
        encoder = ViT(args.size, patch_size=args.patch_size, channels=args.channels, class_token=False, **shape)
    if args.task == "probe":
        encoder.requires_grad_(False)
    torch.manual_seed(args.seed)  # the same probe for any encoder
    model = Classifier(encoder, classes)
    if args.eval_only:
        path = args.classifier or args.init
        weights = {name.removeprefix("classifier."): weight for name, weight in read_weights(path)[0].items()
                   if name.startswith("classifier.")}
        load_strictly(model.classifier, weights, path)
    return model


def classify(args):
    """`probe`: train the attentive probe on the frozen encoder. `finetune`: train both."""
    if args.classifier and not args.eval_only:
        raise UserError("--classifier is for --eval-only")
    device = join_processes(args)
    train_source, val_source, classes = open_clips(args, labelled=True)
    data.settle(args, train_source, val_source, classes)
    train_source.segments = args.segments if args.segments > 1 else None  # a single one begins at a random time
    val_source.segments = args.segments
    flip = args.flip and not (args.data is None and not args.still)
    augmentation = data.strong_augmentation(args, flip, operations=4)
    samples = data.Samples(train_source, in_time(augmentation, args), args.seed)
    view = data.CentreCrop(args.image_size, 1 if args.still else args.views)
    val = data.Samples(val_source, in_time(view, args), replace_unreadable=False)
    model = new_classifier(args, len(classes)).to(device)

    def test(last):
        return accuracy(args, model, data.test_loader(val, args, device), last)

    def schedule(step):
        lr = cosine(step + 1, args.steps, args.warmup * args.steps, args.base_lr * args.batch_size / 256, args.min_lr)
        return lr, cosine(step + 1, args.steps, 0, args.weight_decay, args.final_weight_decay)

    if args.eval_only:
        test(last=True)
    else:
        groups = parameter_groups(model, args.weight_decay, args.layer_decay if args.task == "finetune" else 1.0)
        train_classifier(args, model, torch.optim.AdamW(groups, fused=True), schedule,
                         lambda first: data.training_loader(samples, args, device, first), test, classes)
    data.report_unreadable(args, train_source, val_source)


# ------------------------------------------------------------------------------------------------------------ pictures


def colours(tokens):
    """The first three principal components of tokens (L, D) as colours (L, 3) in [0, 1]: like features, like colour."""
    tokens = tokens - tokens.mean(dim=0)
    components = tokens @ torch.linalg.svd(tokens, full_matrices=False).Vh[:3].T  # (L, 3)
    low, high = components.quantile(0.02, dim=0), components.quantile(0.98, dim=0)
    return ((components - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def save_picture(encoder, samples, args, device):
    """Write a picture with a row per time step of a clip.

    A row has the first frame of the tubelet, what each mask leaves of it as context (a column per mask), and the
    encoder's tokens, coloured by `colours`.
    """
    times, rows, columns = encoder.grid
    clip = data.one_clip(data.examples(samples, [len(samples.source) // 4], args, device)[0])  # (1, C, T, H, W)
    with torch.no_grad():
        tokens = encoder.eval().tokens(clip)[0].float().cpu()[-times * rows * columns:]  # (L, D), no class token
    frames = clip[0, :, ::args.tubelet].transpose(0, 1).cpu()  # (times, C, H, W)
    frames = frames * torch.tensor(args.std).view(-1, 1, 1) + torch.tensor(args.mean).view(-1, 1, 1)
    visible, _ = draw_masks(args, encoder.grid, 0, slice(0, 1), "cpu")
    shown = [frames]
    for ids in visible:
        seen = torch.zeros(1, times * rows * columns).scatter_(1, ids, 1.0).view(times, 1, rows, columns)
        shown.append(torch.where(F.interpolate(seen, frames.shape[-2:]) > 0, frames, 0.5))
    shown.append(F.interpolate(colours(tokens).T.reshape(3, times, rows, columns).transpose(0, 1), frames.shape[-2:]))
    save_pictures(shown, args.out, "tokens.png")


def show(args):
    """Write the picture of `save_picture` for --image, or for a clip of --data."""
    device = join_processes(args)
    if args.image:
        args.data, args.still = args.image, Path(args.image).suffix.lower() in data.IMAGE_FILES
    train_source, val_source, _ = open_clips(args, labelled=False)
    source = val_source or train_source
    data.settle(args, source)
    samples = data.Samples(source, in_time(data.CentreCrop(args.image_size), args))
    encoder = ViT.load(args.init, image_size=args.image_size, frames=args.frames).to(device)
    save_picture(encoder, samples, args, device)


TASKS = {"pretrain": (pretrain, PRETRAIN, WATCH | FINAL_PROBE), "probe": (classify, PROBE, {}),
         "finetune": (classify, FINETUNE, {}), "show": (show, SHOW, {})}


def main():
    args = parse_command_line("vjepa", __doc__, TASKS, MODEL | STILL | MASKING | PREDICTOR)
    if args.frames < 2:
        raise UserError("V-JEPA needs clips of several frames: --frames above 1, or an --init of clips; for images "
                        "--still, which repeats them in time")
    TASKS[args.task][0](args)


if __name__ == "__main__":
    run_main(main)
