"""MaskFeat: "Masked Feature Prediction for Self-Supervised Visual Pre-Training", Wei et al. 2022, arXiv 2112.09133.

Replace 40 % of an image's or a video's patches by a mask token and let a Vision Transformer predict, at each of them,
not the pixels but a feature of the pixels: the histogram of oriented gradients (HOG), which says where edges run and
leaves out colour and contrast. It needs no tokenizer, no teacher and no decoder: one linear layer makes the prediction.

    pixels (B, C, H, W), or clips (B, C, T, H, W): an image is a clip of one frame
      | cut into L patches (tubelets) and project                              (B, L, D)
      | put the mask token at the hidden places, add learned positions,
      | put the class token before them                                        (B, 1 + L, D)
    ViT over the whole sequence                                                (B, 1 + L, D)
      | take the M hidden tokens, one linear layer                             (B, M, K)
      | squared error to the HOG of these patches, K = channels * bins * cells in a patch
    loss

    python maskfeat.py                                 pre-train on the photographs that ship with scikit-image
    python maskfeat.py --frames 8 --out runs/clips     the same on clips of a camera that moves over collages
    torchrun --nproc_per_node=8 maskfeat.py --data DIR                                the paper's recipe on your images
    torchrun --nproc_per_node=8 maskfeat.py --data DIR --frames 16 --out runs/video   and on your videos
    python maskfeat.py finetune --data DIR --init runs/maskfeat/last.pt
    python maskfeat.py show --init runs/maskfeat/last.pt --image photo.jpg
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.functional import pil_to_tensor

import data
from common import (AUGMENTATION, CHANNELS, CLASSIFICATION, INPUT, MASK_SEED, PICTURE_SEED, SIZES, TRAINING, WATCH, Run,
                    UserError, ViT, accuracy, cosine, derive_seed, flag, grid_of, height_x_width, initialise, join_processes, load_model,
                    load_strictly, no_sync, parameter_groups, parse_command_line, patchify, precision_of, put,
                    read_weights, run_main, save_pictures, share, take, train_classifier, unpatchify,
                    use_checkpointing)

# flag(the paper's value for ViT-B, meaning, kind, values for other sizes, for video, in the demo on built-in data). The
# values for video are those published for MViTv2; we use a ViT instead.
MODEL = CHANNELS | dict(
    size=flag("base", "of the encoder", list(SIZES), demo="nano"),
    image_size=flag(224, "pixels, a number or HEIGHTxWIDTH", height_x_width, demo=64, demo_video=48),
    patch_size=flag(16, "side of a patch, pixels", demo=8, demo_video=16),
    frames=flag(1, "of a clip; 1 means images"),
    tubelet=flag(1, "frames that one token spans", video=2, demo_video=2),
    stride=flag(4, "frames of a video from one frame of the clip to the next"),
)
TARGET = dict(
    target=flag("hog", "what is predicted; pixels are normalised by each patch's own mean and deviation",
                ["hog", "pixels"]),
    cell=flag(8, "side of a cell of HOG, pixels; a patch holds whole cells"),
    masking=flag("block", "block is for images; cube, tube and frame for clips",
                 ["block", "cube", "tube", "frame", "random"], video="cube", demo="random", demo_video="tube"),
    mask_ratio=flag(0.4, "share of the patches that are hidden", share, demo=0.75, demo_video=0.6),
)
PRETRAIN = INPUT | MODEL | TARGET | TRAINING | dict(
    epochs=flag(300.0, "passes over the data", demo=8.5, demo_video=4.8),
    batch_size=flag(2048, "images or clips per step, on all GPUs together", video=512, demo=16, demo_video=32),
    base_lr=flag(2e-4, "learning rate per 256 of a batch", video=8e-4, demo=1.6e-2, demo_video=1.2e-2),
    min_lr=flag(1e-6, "learning rate at the end of the schedule"),
    warmup=flag(30 / 300, "share of the steps in which the learning rate rises", share, video=10 / 300, demo=0.05),
    clip_grad=flag(0.02, "largest L2 norm of the gradient"),
    flip=flag(True, "mirror half of the training samples"),
)
FINETUNE = INPUT | MODEL | TRAINING | CLASSIFICATION | AUGMENTATION | dict(
    views=flag(1, "clips of each video in the last test, their logits averaged; the tests before take one", video=10,
               demo_video=1),
    epochs=flag(100.0, "passes over the data", large=50.0, demo=10.0),
    batch_size=flag(2048, "images or clips per step, on all GPUs together", large=1024, video=512, demo=128),
    base_lr=flag(2.5e-4, "learning rate per 256 of a batch", video=9.6e-3, demo=2e-3),
    warmup=flag(20 / 100, "share of the steps in which the learning rate rises", share, large=0.1, video=0.2, demo=0.1),
    clip_grad=flag(None, "largest L2 norm of the gradient (default: no limit)", float, video=5.0, demo=None),
    layer_decay=flag(0.65, "factor on the learning rate from one block to the block below", large=0.75, video=0.75,
                     demo=0.75),
    drop_path=flag(0.1, "chance to skip a branch of the last block; rises linearly from the first", share, demo=0.0),
    flip=flag(True, "mirror half of the training samples (never of the built-in clips)"),
)
SHOW = INPUT | MODEL | TARGET | dict(
    image=flag(None, "photograph, video or folder of frames for show (default: some of --data)", str))

# --------------------------------------------------------------------------------------------------------------- HOG


def gradients(images):
    """Horizontal and vertical gradient of each channel, (B, C, H, W) -> two of the same shape, in float32.

    The filter [[1, 0, -1], [2, 0, -2], [1, 0, -1]] and its transpose, summed from left to right and top to bottom, as a
    plain float32 convolution does. The order matters: in flat regions of 8-bit images the terms cancel to zero or to
    +-1e-8, depending on how sums are rounded on the way, and the sign decides between the first bin and the last. The
    same sums in another order, in TF32 or in half precision change the targets of many cells.
    """
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    H, W = images.shape[-2:]
    a, b, c, d, _, f, g, h, i = (padded[..., row:row + H, column:column + W] for row in range(3) for column in range(3))
    return ((a - c).add_(d, alpha=2).sub_(f, alpha=2).add_(g).sub_(i),
            torch.add(a, b, alpha=2).add_(c).sub_(g).sub_(h, alpha=2).sub_(i))


@torch.no_grad()
def hog(images, bins=9, cell=8):
    """Histograms of oriented gradients: (B, C, H, W) -> (B, C, bins, H/cell, W/cell), in float32.

    At each pixel of each channel the gradient has a length and a direction in [0, pi), since an edge and its negative
    count alike. A cell's histogram adds up the lengths by direction and is divided by its L2 norm.
    """
    def by_cell(values):  # (B, C, H, W) -> (B, C, H/cell, W/cell, cell*cell)
        return values.unflatten(3, (-1, cell)).unflatten(2, (-1, cell)).transpose(3, 4).flatten(4)

    gx, gy = gradients(images)
    # The direction is measured from the vertical, as in the published code.
    bin_of = by_cell(torch.atan2(gx, gy).div_(math.pi).mul_(bins).floor_().remainder_(bins).to(torch.uint8))
    length = gx.hypot_(gy)
    del gx, gy  # the extra memory stays below four times that of the images
    length = by_cell(length)
    histogram = length.new_zeros(*length.shape[:-1], bins).scatter_add_(-1, bin_of.long(), length)
    return F.normalize(histogram, dim=-1).permute(0, 1, 4, 2, 3)


def hog_targets(images, patch=16, cell=8):
    """HOG by patch: (B, C, H, W) -> (B, L, C*bins*(patch/cell)**2), by (channel, bin, cell row, cell column)."""
    n = patch // cell
    histograms = hog(images, cell=cell).unflatten(4, (-1, n)).unflatten(3, (-1, n))  # (B, C, bins, rows, n, columns, n)
    return histograms.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)


# ----------------------------------------------------------------------------------------------------------- masking
# A mask is two lists of places, visible (B, N) and hidden (B, M): indices of tokens in raster order. M is the same for
# all samples. A grid is (rows, columns) for images, (times, rows, columns) for clips.


def split(values, count):
    """values (B, L) -> (visible, hidden): the `count` tokens with the largest values are hidden."""
    order = values.argsort(dim=1, descending=True)
    return order[:, count:], order[:, :count]


def random_mask(batch, grid, ratio, generator, device):
    noise = torch.rand(batch, math.prod(grid), generator=generator, device=device)
    return split(noise, round(ratio * math.prod(grid)))


def block_mask(batch, grid, ratio, generator, device):
    """BEiT's block-wise masking of images (arXiv 2106.08254, Algorithm 1): blocks of random area and aspect."""
    count = round(ratio * math.prod(grid))
    return lay_blocks(batch, (1, *grid), count, count // 5, None, generator, device)


def cube_mask(batch, grid, ratio, generator, device):
    """Blocks in space, of at least a fifth of the frame, that last for a random run of time steps."""
    area = math.prod(grid[1:])  # tokens of a time step
    return lay_blocks(batch, grid, round(ratio * grid[0] * area), area // 5, area, generator, device)


def tube_mask(batch, grid, ratio, generator, device):
    """The same block-wise mask at all times."""
    first = math.prod(grid[1:]) * torch.arange(grid[0], device=device)[:, None]  # index of each time's first token
    return tuple((ids[:, None] + first).flatten(1) for ids in block_mask(batch, grid[1:], ratio, generator, device))


def frame_mask(batch, grid, ratio, generator, device):
    """Whole time steps."""
    times = split(torch.rand(batch, grid[0], generator=generator, device=device), round(ratio * grid[0]))
    of_frame = torch.arange(math.prod(grid[1:]), device=device)
    return tuple((len(of_frame) * ids[:, :, None] + of_frame).flatten(1) for ids in times)


def lay_blocks(batch, grid, count, least, most, generator, device):
    """Lay random blocks over a grid (times, rows, columns) until `count` tokens are hidden: (visible, hidden).

    The area of a block in space is uniform between `least` and `most`, tokens; most = None means what is still to be
    hidden, which may be less than `least`. Its aspect is 0.3 to 1/0.3. A block that would hide too much, or is as high
    or as wide as the grid, is dropped; what 64 tries leave open is filled with single tokens.
    """
    position = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))[:, None]
    size = position.amax((2, 3, 4), keepdim=True) + 1  # of the grid, (3, 1, 1, 1, 1), without a copy to the GPU
    covered = torch.zeros(batch, *grid, dtype=torch.bool, device=device)
    left = torch.full((batch, 1, 1, 1), count, device=device)  # still to be hidden
    # For 64 tries: area, aspect, duration, and the corner in rows, columns and time.
    u = torch.rand(64, 6, batch, 1, 1, 1, generator=generator, device=device)
    aspect = torch.exp((2 * u[:, 1] - 1) * math.log(1 / 0.3))
    duration = 1 + (u[:, 2:3] * grid[0]).floor()
    where = torch.cat([u[:, 5:], u[:, 3:5]], dim=1)  # in time, row and column
    for i in range(64):
        area = least + u[i, 0] * ((left if most is None else most) - least)
        sides = torch.stack([area * aspect[i], area / aspect[i]]).sqrt().round()  # height and width
        block = torch.cat([duration[i], sides])  # (3, B, 1, 1, 1)
        corner = (where[i] * (size - block + 1)).floor()
        new = ((position >= corner) & (position < corner + block)).all(dim=0) & ~covered  # (B, times, rows, columns)
        tokens = new.sum((1, 2, 3), keepdim=True)
        fits = (tokens <= left) & (sides < size[1:]).all(dim=0)
        covered |= new & fits
        left -= tokens * fits
    noise = torch.rand(batch, math.prod(grid), generator=generator, device=device)
    return split(covered.flatten(1) + noise, count)  # what is covered first, then single tokens at random


MASKS = {"block": block_mask, "cube": cube_mask, "tube": tube_mask, "frame": frame_mask, "random": random_mask}

# -------------------------------------------------------------------------------------------------------------- model


class MaskFeat(ViT):
    """A ViT with a mask token and a linear prediction head. The norm after the last block belongs to the head.

    target: "hog" or "pixels"; cell: side of a cell of HOG, pixels. The rest as in `ViT`.
    """

    def __init__(self, size="base", image_size=224, patch_size=16, channels=3, frames=1, tubelet=1, target="hog",
                 cell=8):
        super().__init__(size, image_size, patch_size, channels, frames, tubelet, learned_positions=True)
        if target == "hog" and patch_size % cell:
            raise UserError(f"a patch of {patch_size} pixels does not hold whole cells of {cell}: change --cell")
        self.tubelet, self.target, self.cell = tubelet, target, cell
        self.norm = nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.dim))
        values = 9 * (patch_size // cell) ** 2 if target == "hog" else patch_size ** 2  # of a channel of a patch
        self.pred_head = nn.Sequential(nn.LayerNorm(self.dim, eps=1e-6), nn.Linear(self.dim, channels * values))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        initialise(self.pred_head)

    def target_frames(self, pixels):
        """Images themselves, of clips the first frame of each tubelet: (B, C, [T,] H, W) -> (B * times, C, H, W)."""
        return pixels[:, :, ::self.tubelet].transpose(1, 2).flatten(0, 1) if pixels.ndim == 5 else pixels

    def targets(self, pixels):
        """What is to be predicted at every token: (B, C, [T,] H, W) -> (B, L, K)."""
        frames = self.target_frames(pixels)
        if self.target == "hog":
            values = hog_targets(frames, self.patch_size, self.cell)
        else:
            values = patchify(frames.float(), self.patch_size)
            values = (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True) + 1e-6).sqrt()
        return values.reshape(len(pixels), -1, values.shape[-1])

    def forward(self, pixels, hidden):
        """pixels (B, C, [T,] H, W), hidden places (B, M) -> (loss, pred (B, M, K)): the prediction at these places."""
        x = put(self.patch_embed(pixels), hidden, self.mask_token)  # (B, L, D), the mask token at the hidden places
        x = self.encode(x + self.pos_embed[:, 1:])  # (B, 1 + L, D), with the class token and its position first
        pred = self.pred_head(take(x[:, 1:], hidden))  # (B, M, K)
        target = take(self.targets(pixels), hidden)
        return (pred.float() - target).square().mean(), pred


# ------------------------------------------------------------------------------------------------------- pre-training


def new_model(args):
    """The model before training, the same for the same seed; with --init the one to go on from."""
    grid = grid_of(args.image_size, args.patch_size, args.frames, args.tubelet)
    if args.masking != "random" and (args.masking == "block") != (len(grid) == 2):
        kind = "images" if args.masking == "block" else "clips (--frames)"
        raise UserError(f"--masking {args.masking} is for {kind}")
    if not all(ids.numel() for ids in MASKS[args.masking](1, grid, args.mask_ratio, None, "cpu")):
        raise UserError(f"--mask-ratio {args.mask_ratio} hides none or all of the {math.prod(grid)} tokens")
    torch.manual_seed(args.seed)
    model = MaskFeat(args.size, args.image_size, args.patch_size, args.channels, args.frames, args.tubelet,
                     args.target, args.cell)
    if args.init:
        load_model(model, args, new=("pred_head.", "mask_token"))
    return model


def pretrain(args):
    """The task `pretrain`; at its end a picture, and where there are labels a probe of the features."""
    device = join_processes(args)
    train_source, val_source, classes = data.open_sources(args.data, args.channels, labelled=False, frames=args.frames,
                                                          stride=args.stride)
    data.settle(args, train_source, val_source, classes)  # fills in args.steps, args.mean and args.std
    augmentation = data.crop_and_flip(args.image_size, scale=(0.5, 1.0), flip=args.flip)
    samples = data.Samples(train_source, augmentation, args.seed)
    view = data.CentreCrop(args.image_size)
    train, val = (data.Samples(x, view, replace_unreadable=False) for x in (train_source, val_source or train_source))

    model = new_model(args).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), fused=True)
    autocast, scaler = precision_of(args)
    run = Run(args, model, optimizer, scaler)  # goes on from --out, if there is a run: then run.step > 0
    if args.checkpointing:
        use_checkpointing(model)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if args.processes > 1 else model
    net = torch.compile(net) if args.compile else net

    batches = data.training_loader(samples, args, device, run.step)
    generator = torch.Generator(device)
    for step in range(run.step, args.steps):
        lr = cosine(step, args.steps, args.warmup * args.steps, args.base_lr * args.batch_size / 256, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Every process draws the masks of the whole batch and uses its own rows: the number of GPUs changes nothing.
        # Those of 8 steps together, since the hundreds of small operations take a GPU as long for one step.
        if step % 8 == 0 or step == run.step:
            generator.manual_seed(derive_seed(args.seed, MASK_SEED, step // 8))
            _, ahead = MASKS[args.masking](8 * args.batch_size, model.grid, args.mask_ratio, generator, device)
        hidden = ahead.unflatten(0, (8, -1))[step % 8]
        for part in range(args.accumulate):
            rows = data.rows_of_process(args, part)
            pixels, _ = next(batches)  # (B, C, H, W), or (B, views, segments, C, T, H, W), of which there is one clip
            with no_sync(net, last=part == args.accumulate - 1):  # DDP averages gradients after the last micro-batch
                with autocast:
                    loss = net(data.one_clip(pixels), hidden[rows])[0]  # the prediction is not kept
                scaler.scale(loss / args.accumulate).backward()
            run.losses.append(loss.detach())
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        found = None  # no look at the features at this step
        if not args.benchmark and ((step + 1) % args.probe_every == 0 or step + 1 == args.steps):
            found = data.watch(features_of(model), train, val, args, device, bool(classes))
            model.train()
        run.step_done(lr, found)  # logs, saves
    run.close()

    if args.rank == 0:
        save_picture(model, val, args, device)
    if classes:
        models = {"before training": new_model(args).to(device), "after": model}
        data.print_probe({when: features_of(m) for when, m in models.items()}, train, val, args, device)
    data.report_unreadable(args, train_source, val_source)


def features_of(model):
    """The function pixels -> (B, times * D): the patch tokens, averaged over space and joined over time."""
    return lambda pixels: model.eval().tokens(pixels)[:, 1:].float().unflatten(
        1, (-1, math.prod(model.grid[-2:]))).mean(dim=2).flatten(1)


# --------------------------------------------------------------------------------------------------------- fine-tuning


class Classifier(ViT):
    """A ViT with a head. Of several clips of a video, (B, views, segments, C, T, H, W), the logits are averaged."""

    def forward(self, pixels):
        if pixels.ndim < 7:
            return super().forward(pixels)
        return super().forward(pixels.flatten(0, 2)).unflatten(0, pixels.shape[:3]).mean((1, 2))


def new_classifier(args, classes):
    """The encoder in --init (or a new one) with a new head; a finished classifier for --eval-only."""
    torch.manual_seed(args.seed)
    shape = {"image_size": args.image_size, "frames": args.frames, "tubelet": args.tubelet, "pool": "mean",
             "num_classes": classes, "drop_path": args.drop_path}
    if args.init:
        model = Classifier.load(args.init, **shape)
        model.pos_embed.requires_grad_(True)
    else:
        model = Classifier(args.size, patch_size=args.patch_size, channels=args.channels, learned_positions=True,
                           **shape)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    if args.eval_only:  # all of the file, with its head, which `load` leaves out where it does not fit
        load_strictly(model, read_weights(args.init)[0], args.init)
    return model


def finetune(args):
    """Classification of images or videos with the whole encoder (mean of the patch tokens, then a linear layer)."""
    device = join_processes(args)
    train_source, val_source, classes = data.open_sources(args.data, args.channels, True, args.frames, args.stride,
                                                          tested=args.init if args.eval_only else None)
    data.settle(args, train_source, val_source, classes)
    flip = args.flip and not (args.data is None and args.frames > 1)
    samples = data.Samples(train_source, data.strong_augmentation(args, flip), args.seed)
    val = data.Samples(val_source, data.CentreCrop(args.image_size), replace_unreadable=False)
    model = new_classifier(args, len(classes)).to(device)

    def test(last):
        val_source.segments = args.views if last else 1
        return accuracy(args, model, data.test_loader(val, args, device), last)

    def schedule(step):
        peak = args.base_lr * args.batch_size / 256
        return cosine(step, args.steps, args.warmup * args.steps, peak, args.min_lr), args.weight_decay

    if args.eval_only:
        test(last=True)
    else:
        optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, args.layer_decay), fused=True)
        train_classifier(args, model, optimizer, schedule, lambda first: data.training_loader(
            samples, args, device, first), test, classes, data.mix_up_and_cut_mix(args, len(classes)))
    data.report_unreadable(args, train_source, val_source)


# ------------------------------------------------------------------------------------------------------------ pictures


def save_picture(model, samples, args, device):
    """Write a picture of some images, a row each, or of a clip, with a row per time step.

    A row has the original, what is left of it under the mask, the target at all patches, and the prediction at the
    hidden patches among the targets of the visible ones. HOG is drawn by `draw_hog`.
    """
    pixels, _ = data.examples(samples, data.evenly(len(samples.source), 4 if args.frames == 1 else 1), args, device)
    pixels = data.one_clip(pixels)
    generator = torch.Generator(device).manual_seed(derive_seed(args.seed, PICTURE_SEED))
    _, hidden = MASKS[args.masking](len(pixels), model.grid, args.mask_ratio, generator, device)
    with torch.no_grad():
        _, pred = model.eval()(pixels, hidden)
        target = model.targets(pixels)  # (B, L, K)
    predicted = put(target, hidden, pred)
    mask = torch.zeros(target.shape[:2], device=device).scatter(1, hidden, 1.0)  # (B, L), 1 = hidden

    frames = model.target_frames(pixels)
    rows = len(frames)  # images, or time steps of the clip
    grid, mask = model.grid[-2:], mask.reshape(rows, -1)
    covered = unpatchify(mask[..., None].expand(-1, -1, model.patch_size ** 2), model.patch_size, grid).cpu() > 0
    frames = frames.cpu() * torch.tensor(args.std).view(-1, 1, 1) + torch.tensor(args.mean).view(-1, 1, 1)
    columns = [frames, torch.where(covered, 0.5, frames)]
    for values in (target, predicted):
        values = values.reshape(rows, *mask.shape[1:], -1).cpu()
        if model.target == "hog":
            columns.append(torch.stack([draw_hog(v, m, model) for v, m in zip(values, mask.cpu())]))
        else:
            columns.append(0.5 + 0.2 * unpatchify(values, model.patch_size, grid))
    save_pictures(columns, args.out, "prediction.png")


def draw_hog(values, mask, model):
    """HOG values (L, K) as a picture (3, H, W): in each cell a stroke along the edge of each bin's direction.

    The length of a stroke is the bin's value, averaged over the channels. Masked patches have bright strokes.
    """
    (rows, columns), n = model.grid[-2:], model.patch_size // model.cell
    side = model.cell * max(1, 224 // (columns * model.patch_size))  # of a cell, as `save_pictures` enlarges the others
    cells = values.reshape(rows, columns, -1, 9, n, n).mean(2).permute(0, 3, 1, 4, 2).reshape(rows * n, columns * n, 9)
    bright = mask.reshape(rows, columns).repeat_interleave(n, 0).repeat_interleave(n, 1)
    canvas = Image.new("RGB", (columns * n * side, rows * n * side))
    draw = ImageDraw.Draw(canvas)
    for i in range(rows * n):
        for j in range(columns * n):
            for k in cells[i, j].argsort().tolist():  # the longest on top
                angle = (k + 0.5) / 9 * math.pi  # of the gradient (sin, cos) in (x, y); the edge is across it
                reach = 0.5 * side * float(cells[i, j, k].clamp(0, 1))
                x, y = reach * math.cos(angle), -reach * math.sin(angle)
                middle = ((j + 0.5) * side, (i + 0.5) * side)
                shade = (255, 220, 90) if bright[i, j] else (110, 110, 130)
                stroke = [middle[0] - x, middle[1] - y, middle[0] + x, middle[1] + y]
                draw.line(stroke, fill=shade, width=max(1, side // 24))
    return pil_to_tensor(canvas) / 255


def show(args):
    """Write the picture of `save_picture` for --image, or for some samples of --data."""
    device, args.data = join_processes(args), args.image or args.data
    train_source, val_source, _ = data.open_sources(args.data, args.channels, False, args.frames, args.stride)
    source = val_source or train_source
    data.settle(args, source)
    save_picture(new_model(args).to(device), data.Samples(source, data.CentreCrop(args.image_size)), args, device)


TASKS = {"pretrain": (pretrain, PRETRAIN, WATCH), "finetune": (finetune, FINETUNE, {}), "show": (show, SHOW, {})}


def main():
    args = parse_command_line("maskfeat", __doc__, TASKS, MODEL | TARGET)
    TASKS[args.task][0](args)


if __name__ == "__main__":
    run_main(main)
