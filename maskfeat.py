"""MaskFeat: "Masked Feature Prediction for Self-Supervised Visual Pre-Training", Wei et al. 2022, arXiv 2112.09133.

Replace 40 % of an image's or a video's patches by a mask token and let a Vision Transformer predict, at each of them,
not the pixels but a feature of the pixels: the histogram of oriented gradients (HOG), which says where edges run and
leaves out colour and contrast. It needs no tokenizer, no teacher and no decoder: one linear layer makes the prediction.

    pixels (B, C, H, W), or clips (B, C, T, H, W): an image is a clip of one frame
      | cut into L patches (tubelets) and project                              (B, L, D)
      | put the mask token at the masked places, add learned positions,
      | put the class token before them                                        (B, 1 + L, D)
    ViT over the whole sequence                                                (B, 1 + L, D)
      | take the N masked tokens, one linear layer                             (B, N, K)
      | squared error to the HOG of these patches, K = channels * bins * cells in a patch
    loss

    python maskfeat.py                                 pre-train on the photographs that ship with scikit-image
    python maskfeat.py --frames 8 --out runs/clips     the same on clips of a camera that moves over them
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
from common import (Log, UserError, ViT, accuracy, cosine, describe, grid_of, is_rank_0, join_processes, load_strictly,
                    mix_seed, no_sync, open_run, parameter_groups, parse_command_line, patchify, precision_of,
                    put, read_weights, resize_positions, ridge_probe, run_main, save_pictures, take, unpatchify)

# Each entry is (paper's value, demo's value) and also a flag, explained below. A dictionary gives the values for images
# and videos, or by model size. Video: the published recipe of MViTv2, of which our ViT takes the place.
MODEL = {
    "size": ("base", "nano"),
    "image_size": (224, {"image": 64, "video": 48}),
    "patch_size": (16, {"image": 8, "video": 16}),
    "frames": (1, 1),
    "tubelet": ({"image": 1, "video": 2}, {"image": 1, "video": 2}),
    "stride": (4, 4),
}
RECIPES = {
    "pretrain": {
        **MODEL,
        "target": ("hog", "hog"),
        "cell": (8, 8),
        "masking": ({"image": "block", "video": "cube"}, {"image": "random", "video": "tube"}),
        "mask_ratio": (0.4, {"image": 0.75, "video": 0.6}),
        "steps": (None, {"image": 1600, "video": 900}),
        "epochs": (300, None),
        "batch_size": ({"image": 2048, "video": 512}, {"image": 16, "video": 32}),
        "base_lr": ({"image": 2e-4, "video": 8e-4}, {"image": 1.6e-2, "video": 1.2e-2}),
        "min_lr": (1e-6, 1e-6),
        "warmup": ({"image": 30 / 300, "video": 10 / 300}, 0.05),
        "weight_decay": (0.05, 0.05),
        "clip_grad": (0.02, 0.02),
        "flip": (True, True),
    },
    "finetune": {
        **MODEL,
        "label": ("photograph", "photograph"),
        "views": ({"image": 1, "video": 10}, 1),
        "epochs": ({"base": 100, "large": 50}, 10),
        "batch_size": ({"image": {"base": 2048, "large": 1024}, "video": 512}, 128),
        "base_lr": ({"image": 2.5e-4, "video": 9.6e-3}, 2e-3),
        "min_lr": (1e-6, 1e-6),
        "warmup": ({"image": {"base": 20 / 100, "large": 5 / 50}, "video": 20 / 100}, 0.1),
        "weight_decay": (0.05, 0.05),
        "clip_grad": ({"image": None, "video": 5.0}, None),
        "layer_decay": ({"image": {"base": 0.65, "large": 0.75}, "video": 0.75}, 0.75),
        "drop_path": (0.1, 0.0),
        "randaugment": ({"image": 9.0, "video": 7.0}, 0.0),
        "erasing": (0.25, 0.0),
        "mixup": (0.8, 0.0),
        "cutmix": (1.0, 0.0),
        "smoothing": (0.1, 0.1),
        "flip": (True, True),
        "eval_only": (False, False),
    },
    "show": {  # our checkpoints know their own target and cell
        **MODEL,
        "image": (None, None),
        "target": ("hog", "hog"),
        "cell": (8, 8),
        "masking": ({"image": "block", "video": "cube"}, {"image": "random", "video": "tube"}),
        "mask_ratio": (0.4, {"image": 0.75, "video": 0.6}),
    },
}
FLAGS = {  # beside those of common.py
    "target": (["hog", "pixels"], "what is predicted; pixels are normalised by each patch's own mean and deviation"),
    "cell": (int, "side of a cell of HOG, pixels; a patch holds whole cells"),
    "masking": (["block", "cube", "tube", "frame", "random"], "block is for images; cube, tube and frame for clips"),
    "mask_ratio": (float, "share of the patches that are masked"),
    "views": (int, "clips of each video in the last test, their logits averaged; the tests before take one"),
    "image": (str, "photograph, video or folder of frames for show (default: some of --data)"),
}

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
# A mask is two lists of places, visible (B, N) and hidden (B, M): numbers of tokens in raster order. M is the same for
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
    place = math.prod(grid[1:])
    return lay_blocks(batch, grid, round(ratio * grid[0] * place), place // 5, place, generator, device)


def tube_mask(batch, grid, ratio, generator, device):
    """The same block-wise mask at all times."""
    first = math.prod(grid[1:]) * torch.arange(grid[0], device=device)[:, None]  # token of each time
    return tuple((ids[:, None] + first).flatten(1) for ids in block_mask(batch, grid[1:], ratio, generator, device))


def frame_mask(batch, grid, ratio, generator, device):
    """Whole time steps."""
    times = split(torch.rand(batch, grid[0], generator=generator, device=device), round(ratio * grid[0]))
    place = torch.arange(math.prod(grid[1:]), device=device)
    return tuple((len(place) * ids[:, :, None] + place).flatten(1) for ids in times)


def lay_blocks(batch, grid, count, least, most, generator, device):
    """Lay random blocks over a grid (times, rows, columns) until `count` tokens are hidden: (visible, hidden).

    The area of a block in space is uniform between `least` and `most`, tokens; most = None means what is still to be
    hidden, which may be less than `least`. Its aspect is 0.3 to 1/0.3. A block that would hide too much is dropped;
    what the tries leave open is filled with single tokens.
    """
    place = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"))[:, None]
    size = place.amax((2, 3, 4), keepdim=True) + 1  # of the grid in each of the 3 dimensions, (3, 1, 1, 1, 1)
    hidden = torch.zeros(batch, *grid, dtype=torch.bool, device=device)
    left = torch.full((batch, 1, 1, 1), count, device=device)  # still to be hidden
    u = torch.rand(64, 6, batch, 1, 1, 1, generator=generator, device=device)  # for 64 tries
    aspect = torch.exp((2 * u[:, 1] - 1) * math.log(1 / 0.3))
    duration = 1 + (u[:, 2:3] * grid[0]).floor()
    where = torch.cat([u[:, 5:], u[:, 3:5]], dim=1)  # in time, row and column
    for i in range(64):
        area = least + u[i, 0] * ((left if most is None else most) - least)
        sides = torch.stack([area * aspect[i], area / aspect[i]]).sqrt().round()  # height and width
        block = torch.cat([duration[i], sides])  # (3, B, 1, 1, 1)
        corner = (where[i] * (size - block + 1)).floor()
        new = ((place >= corner) & (place < corner + block)).all(dim=0) & ~hidden
        tokens = new.sum((1, 2, 3), keepdim=True)
        fits = (tokens <= left) & (sides < size[1:]).all(dim=0)
        hidden |= new & fits
        left -= tokens * fits
    noise = torch.rand(batch, math.prod(grid), generator=generator, device=device)
    return split(hidden.flatten(1) + noise, count)


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
        for parameter in (self.mask_token, self.pred_head[1].weight):
            nn.init.trunc_normal_(parameter, std=0.02)
        nn.init.zeros_(self.pred_head[1].bias)

    def targets(self, pixels):
        """What is to be predicted at every token: (B, C, [T,] H, W) -> (B, L, K). Of a tubelet, its first frame."""
        frames = pixels[:, :, ::self.tubelet].transpose(1, 2).flatten(0, 1) if pixels.ndim == 5 else pixels
        if self.target == "hog":
            values = hog_targets(frames, self.patch_size, self.cell)
        else:
            values = patchify(frames.float(), self.patch_size)
            values = (values - values.mean(-1, keepdim=True)) / (values.var(-1, keepdim=True) + 1e-6).sqrt()
        return values.reshape(len(pixels), -1, values.shape[-1])

    def forward(self, pixels, hidden):
        """pixels (B, C, [T,] H, W), hidden places (B, M) -> (loss, pred (B, M, K)): the prediction at these places."""
        x = put(self.patch_embed(pixels), hidden, self.mask_token)  # (B, L, D)
        x = self.encode(x + self.pos_embed[:, 1:])  # (B, 1 + L, D), the class token first
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
        weights, settings = read_weights(args.init)
        old = describe(weights, settings, args.init)
        old_grid = grid_of(old["image_size"], old["patch_size"], old["frames"], old["tubelet"])
        weights["pos_embed"] = resize_positions(weights["pos_embed"], old_grid, model.grid)
        load_strictly(model, weights, args.init)
    return model


def pretrain(args):
    device, rank, processes = join_processes(args.device)
    train_source, val_source, classes = data.open_sources(args.data, args.channels, False, args.frames, args.stride)
    data.complete(args, train_source, device, processes)
    augmentation = data.crop_and_flip(args.image_size, args.mean, args.std, scale=(0.5, 1.0), flip=args.flip)
    samples = data.Samples(train_source, augmentation, args.seed)

    model = new_model(args).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), fused=True)
    autocast, scaler = precision_of(args, device)
    first_step = open_run(args, model, optimizer, scaler)
    net = DistributedDataParallel(model) if processes > 1 else model
    net = torch.compile(net) if args.compile else net

    batches = data.training_loader(samples, args, first_step, rank, processes, device)
    generator = torch.Generator(device)
    log = Log(args, first_step, "clips" if args.frames > 1 else "images")
    for step in range(first_step, args.steps):
        lr = cosine(step, args.steps, args.warmup * args.steps, args.base_lr * args.batch_size / 256, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        # Every process draws the masks of the whole batch and takes its rows: their number does not change the run.
        generator.manual_seed(mix_seed(args.seed, step))
        _, hidden = MASKS[args.masking](args.batch_size, model.grid, args.mask_ratio, generator, device)
        for part in range(args.accumulate):
            rows = data.rows_of_process(args.batch_size, args.accumulate, part, rank, processes)
            pixels, _ = next(batches)
            with no_sync(net, last=part == args.accumulate - 1):
                with autocast:
                    loss, _ = net(pixels, hidden[rows])
                scaler.scale(loss / args.accumulate).backward()
            log.losses.append(loss.detach())
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        log.step_done()
        if log.due:
            log.write(loss=log.mean_loss(lr, scaler), lr=lr)  # stops the run before it saves, if it is not finite
        log.save_or_leave(model, optimizer, scaler)
    log.close()

    if is_rank_0():
        view = data.CentreCrop(args.image_size, args.mean, args.std)
        save_picture(model, data.Samples(val_source or train_source, view), args)
        print(f"checkpoint {args.out}/last.pt, log {args.out}/log.jsonl")
        if classes:
            train, val = (data.Samples(source, view, replace=False) for source in (train_source, val_source))
            before, after = (probe(m, train, val, args, device) for m in (new_model(args).to(device), model))
            for name in before:
                print(f"linear probe of the frozen encoder on validation {'clips' if args.frames > 1 else 'images'}"
                      f"{'' if name == 'class' else ', ' + name}: {before[name]:.1f} % before training, "
                      f"{after[name]:.1f} % after")
    data.report_unreadable(train_source, val_source)


def probe(model, train, val, args, device, limit=3000):
    """{what: accuracy in percent} of ridge regression on the patch tokens, with up to `limit` samples of each source.

    The tokens are averaged over space and joined over time. The built-in clips have two labels.
    """

    def encode(pixels):
        tokens = model.eval().tokens(pixels)[:, 1:].float()  # (B, L, D)
        return tokens.unflatten(1, (-1, math.prod(model.grid[-2:]))).mean(dim=2).flatten(1)

    (x, y), (x_val, y_val) = (data.features(encode, samples, args, device, limit) for samples in (train, val))
    y, y_val = (data.by_label(train.source, labels) for labels in (y, y_val))
    return {name: ridge_probe(x, y[name], x_val, y_val[name]) for name in y}


# --------------------------------------------------------------------------------------------------------- fine-tuning


def new_classifier(args, classes):
    """The encoder in --init (or a new one) with a new head; a finished classifier for --eval-only."""
    torch.manual_seed(args.seed)
    changes = {"image_size": args.image_size, "frames": args.frames, "tubelet": args.tubelet, "pool": "mean",
               "num_classes": len(classes), "drop_path": args.drop_path}
    if args.init:
        model = ViT.load(args.init, **changes)
        model.pos_embed.requires_grad_(True)
    else:
        model = ViT(args.size, patch_size=args.patch_size, channels=args.channels, learned_positions=True, **changes)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    return model


def finetune(args):
    """Classification of images or videos with the whole encoder (mean of the patch tokens, then a linear layer)."""
    device, rank, processes = join_processes(args.device)
    train_source, val_source, classes = data.open_sources(args.data, args.channels, True, args.frames, args.stride,
                                                          args.label)
    data.complete(args, train_source, device, processes)
    args.num_classes = len(classes)
    flip = args.flip and not (args.data is None and args.frames > 1 and args.label == "motion")
    augmentation = data.strong_augmentation(args.image_size, args.mean, args.std, args.randaugment, args.erasing, flip)
    samples = data.Samples(train_source, augmentation, args.seed)
    val = data.Samples(val_source, data.CentreCrop(args.image_size, args.mean, args.std), replace=False)

    def test(views):
        if args.frames > 1 and isinstance(val_source, data.Files):
            val_source.views = views
        return accuracy(model, data.test_loader(val, args, device, rank, processes), device, autocast)

    model = new_classifier(args, classes).to(device)
    autocast, scaler = precision_of(args, device)
    if args.eval_only:
        load_strictly(model, read_weights(args.init)[0], args.init)
        top1, top5 = test(args.views)
        if is_rank_0():
            print(f"top-1 {top1:.2f} %, top-5 {top5:.2f} % of {len(val_source)} validation samples")
        data.report_unreadable(val_source)
        return

    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay, args.layer_decay), fused=True)
    mix = data.mix_up_and_cut_mix(len(classes), args.mixup, args.cutmix)
    first_step = open_run(args, model, optimizer, scaler)
    net = DistributedDataParallel(model) if processes > 1 else model
    net = torch.compile(net) if args.compile else net

    batches = data.training_loader(samples, args, first_step, rank, processes, device)
    log = Log(args, first_step, "clips" if args.frames > 1 else "images")
    for step in range(first_step, args.steps):
        lr = cosine(step, args.steps, args.warmup * args.steps, args.base_lr * args.batch_size / 256, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        model.train()
        torch.manual_seed(mix_seed(args.seed, step, rank))  # of drop path, MixUp and CutMix
        for part in range(args.accumulate):
            pixels, labels = mix(*next(batches))
            with no_sync(net, last=part == args.accumulate - 1):
                with autocast:
                    loss = F.cross_entropy(net(pixels), labels, label_smoothing=args.smoothing)
                scaler.scale(loss / args.accumulate).backward()
            log.losses.append(loss.detach())
        if args.clip_grad:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        log.step_done()
        tested = {}
        if log.step % max(1, len(train_source) // args.batch_size) == 0 or log.step == args.steps:  # each epoch
            tested["top1"], tested["top5"] = test(args.views if log.step == args.steps else 1)
        if tested or log.due:
            log.write(loss=log.mean_loss(lr, scaler), lr=lr, **tested)
        log.save_or_leave(model, optimizer, scaler)
    log.close()
    data.report_unreadable(train_source, val_source)
    if is_rank_0() and first_step < args.steps:
        print(f"checkpoint {args.out}/last.pt, log {args.out}/log.jsonl\n"
              f"top-1 {tested['top1']:.2f} %, top-5 {tested['top5']:.2f} % of {len(val_source)} validation samples")


# ------------------------------------------------------------------------------------------------------------ pictures


def save_picture(model, samples, args):
    """Write a picture of some images, a row each, or of a clip, with a row per time step.

    A row has the original, what is left of it under the mask, the target at all patches, and the prediction at the
    masked patches among the targets of the visible ones. HOG is drawn by `draw_hog`.
    """
    chosen = data.evenly(len(samples.source), 8 if args.frames == 1 else 1)
    pixels = torch.stack([samples[index, 0][0] for index in chosen]).to(model.cls_token.device)
    pixels = pixels.flatten(0, 1) if pixels.ndim == 6 else pixels  # a single view of each video
    generator = torch.Generator(pixels.device).manual_seed(mix_seed(args.seed))
    _, hidden = MASKS[args.masking](len(pixels), model.grid, args.mask_ratio, generator, pixels.device)
    with torch.no_grad():
        _, pred = model.eval()(pixels, hidden)
        target = model.targets(pixels)  # (B, L, K)
    predicted = put(target, hidden, pred)
    mask = torch.zeros(target.shape[:2], device=pixels.device).scatter(1, hidden, 1.0)  # (B, L), 1 = hidden

    frames = pixels[:, :, ::model.tubelet].transpose(1, 2).flatten(0, 1) if pixels.ndim == 5 else pixels
    rows = len(frames)  # images, or time steps of the clip
    grid, mask = model.grid[-2:], mask.reshape(rows, -1)
    shade = unpatchify(mask[..., None].expand(-1, -1, model.patch_size ** 2), model.patch_size, grid).cpu()
    frames = frames.cpu() * torch.tensor(args.std).view(-1, 1, 1) + torch.tensor(args.mean).view(-1, 1, 1)
    columns = [frames, torch.where(shade > 0, 0.5, frames)]
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
    args.data = args.image or args.data
    train_source, val_source, _ = data.open_sources(args.data, args.channels, False, args.frames, args.stride)
    source = val_source or train_source
    data.complete(args, source, torch.device("cpu"))
    samples = data.Samples(source, data.CentreCrop(args.image_size, args.mean, args.std))
    save_picture(new_model(args), samples, args)


def main():
    args = parse_command_line("maskfeat", __doc__, RECIPES, FLAGS)
    {"pretrain": pretrain, "finetune": finetune, "show": show}[args.task](args)


if __name__ == "__main__":
    run_main(main)
