"""Images in, batches out: the photographs that ship with scikit-image, image folders, CIFAR-10.

A *source* is a map-style dataset of (image, label): a PIL image, or a float tensor (C, H, W) where there are not 1 or 3
channels. `Samples` adds the augmentation, `step_batches` decides which samples make up which step. Every draw of a
sample has its own seed, so what a step sees depends on (seed, step) alone: not on the number of workers or processes,
nor on whether the run was interrupted.
"""
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10
from torchvision.transforms import InterpolationMode, v2

from common import UserError, barrier, height_and_width, is_rank_0, mix_seed, sum_over_processes

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_FILES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy"}

# ------------------------------------------------------------------------------------------------------------ sources


class Photographs(Dataset):
    """Crops of the photographs that ship with scikit-image; the label says which photograph.

    Training crops come from the first 60 % of a photograph along its longer side and validation crops from the rest, so
    that recognising a photograph is not remembering a crop. A crop is a square of 96 to 160 pixels.
    """
    classes = ["astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
               "immunohistochemistry", "moon", "page", "retina", "rocket", "stereo_motorcycle"]

    def __init__(self, train, channels=3, length=6000):
        import skimage.data
        self.regions, self.length = [], length
        for name in self.classes:
            photograph = getattr(skimage.data, name)()
            photograph = photograph[0] if isinstance(photograph, tuple) else photograph  # the stereo pair: the left one
            image = Image.fromarray(photograph).convert("RGB" if channels == 3 else "L")
            width, height = image.size
            cut = int(0.6 * max(image.size))
            if width >= height:
                box = (0, 0, cut, height) if train else (cut, 0, width, height)
            else:
                box = (0, 0, width, cut) if train else (0, cut, width, height)
            self.regions.append(image.crop(box))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        label = index * len(self.classes) // self.length  # sorted by class, as a folder is
        region = self.regions[label]
        width, height = region.size
        draw = torch.Generator().manual_seed(mix_seed(index))  # a picture is the same at every draw
        side = min(width, height, int(torch.randint(96, 161, (), generator=draw)))
        left = int(torch.randint(width - side + 1, (), generator=draw))
        top = int(torch.randint(height - side + 1, (), generator=draw))
        return region.crop((left, top, left + side, top + side)), label


class ImageFiles(Dataset):
    """All images below a folder, at any depth; given class names, below the folders of these names in it."""

    def __init__(self, root, channels=3, classes=None):
        self.channels, self.classes = channels, classes
        folders = [root] if classes is None else [Path(root, name) for name in classes]
        found = sorted((os.path.join(where, name), label) for label, folder in enumerate(folders)
                       for where, _, names in os.walk(folder, followlinks=True)
                       for name in names if os.path.splitext(name)[1].lower() in IMAGE_FILES)
        found = [(root, 0)] if Path(root).is_file() else found
        if not found:
            raise UserError(f"there is no image below {root}")
        # Arrays and not lists: workers share their memory, where each would end up with a copy of a list's objects.
        self.names = np.array([os.fsencode(name) for name, _ in found])
        self.labels = np.array([label for _, label in found])
        self.unreadable = torch.zeros(len(found), dtype=torch.bool).share_memory_()  # one memory for all workers

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return read_image(self.path(index), self.channels), int(self.labels[index])

    def path(self, index):
        return os.fsdecode(self.names[index])


def read_image(path, channels=3):
    """A PIL image (RGB, or grey for 1 channel), or a float tensor (C, H, W) for any other number of channels."""
    if Path(path).suffix.lower() == ".npy":
        array = np.load(path, allow_pickle=False)  # (H, W) or (H, W, C)
    else:
        image = Image.open(path)
        if channels in (1, 3) and not image.mode.startswith(("I", "F")):
            return image.convert("RGB" if channels == 3 else "L")
        array = np.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[-1] == 1 and channels == 3:  # 16-bit grey
        array = array.repeat(3, axis=-1)
    if array.ndim != 3 or array.shape[2] != channels:
        raise ValueError(f"it has the shape {array.shape}, not {channels} channels")
    scale = np.iinfo(array.dtype).max if array.dtype.kind in "ui" else 1  # integers to [0, 1], real numbers as they are
    if not np.isfinite(array).all():
        raise ValueError("it has values that are not finite")
    return torch.from_numpy((array / scale).astype(np.float32)).permute(2, 0, 1)


def open_sources(data, channels=3, labelled=True):
    """(training source, validation source or None, class names or None) for --data: None, "cifar10" or a folder.

    A folder is DIR/train/<class>/... with DIR/val/<class>/... or DIR/test/<class>/...; where no labels are needed
    (labelled=False) it is any folder of images, and DIR/train alone is used if there is one.
    """
    if data is None:
        if channels not in (1, 3):
            raise UserError(f"the built-in photographs have 1 or 3 channels, not {channels}: give --data")
        return Photographs(True, channels), Photographs(False, channels, 1500), Photographs.classes
    if data == "cifar10":
        if channels != 3:
            raise UserError(f"CIFAR-10 has 3 channels, not {channels}")
        try:
            if is_rank_0():  # torchvision keeps the files in ./data
                CIFAR10("data", download=True)
            barrier()
            train, val = (CIFAR10("data", train=train) for train in (True, False))
        except (OSError, RuntimeError) as error:
            raise UserError(f"CIFAR-10 could not be downloaded to ./data: {error}") from None
        return train, val, train.classes

    root = Path(data)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}")
    train = root / "train" if (root / "train").is_dir() else root
    val = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    classes, val_classes = (sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
                            if folder else [] for folder in (train, val))
    if train == root or not classes or not val_classes:
        if labelled:
            raise UserError(f"{root} needs the folders train/<class>/ and val/<class>/ (or test/<class>/)")
        return ImageFiles(train, channels), None, None
    unknown = [name for name in val_classes if name not in classes]
    if unknown:
        raise UserError(f"{val} has the class folder {unknown[0]}, which {train} lacks")
    return ImageFiles(train, channels, classes), ImageFiles(val, channels, classes), classes


# --------------------------------------------------------------------------------------------------------- transforms

BICUBIC = InterpolationMode.BICUBIC


class Normalise:
    """PIL image, or tensor of any type -> float tensor (C, H, W): integers scaled to [0, 1], then (x - mean) / std."""

    def __init__(self, mean, std):
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image):
        image = image if torch.is_tensor(image) else v2.functional.pil_to_tensor(image)
        image = image if image.is_floating_point() else image.float().div_(torch.iinfo(image.dtype).max)
        return (image - self.mean).div_(self.std)


def crop_and_flip(image_size, mean, std, scale):
    """Random resized crop of an area share in `scale`, flip: the whole augmentation of pre-training."""
    return v2.Compose([v2.RandomResizedCrop(height_and_width(image_size), scale, interpolation=BICUBIC),
                       v2.RandomHorizontalFlip(), Normalise(mean, std)])


def strong_augmentation(image_size, mean, std, randaugment, erasing):
    """Augmentation of fine-tuning: random crop, flip, RandAugment (magnitude 0 to 10), erasing (a probability)."""
    crop, flip, normalise = crop_and_flip(image_size, mean, std, (0.08, 1.0)).transforms
    # The papers, as timm, count RandAugment's magnitude to 10, torchvision to 30. It is for 1 or 3 channels only.
    fill = [int(255 * value) for value in mean]
    colours = [v2.RandAugment(2, round(3 * randaugment), interpolation=InterpolationMode.BILINEAR, fill=fill)]
    return v2.Compose([crop, flip, *(colours if randaugment and len(mean) in (1, 3) else []), normalise,
                       v2.RandomErasing(erasing, scale=(0.02, 1 / 3), ratio=(0.3, 3.3), value="random")])


class CentreCrop:
    """The view at test time: the shorter side resized to size / 0.875 (from 256 to 224), and the centre cut out.

    An image that already has the right size, as in CIFAR-10, is taken as it is.
    """

    def __init__(self, image_size, mean, std):
        self.size, self.normalise = height_and_width(image_size), Normalise(mean, std)

    def __call__(self, image):
        height, width = image.shape[1:] if torch.is_tensor(image) else image.size[::-1]
        if (height, width) != self.size:
            factor = max(self.size[0] / height, self.size[1] / width) / 0.875
            larger = [max(side, round(factor * old)) for side, old in zip(self.size, (height, width))]
            image = v2.functional.resize(image, larger, BICUBIC)
            image = v2.functional.center_crop(image, list(self.size))
        return self.normalise(image)


def mix_up_and_cut_mix(num_classes, mixup, cutmix):
    """Of a batch (images, labels): MixUp or CutMix, each half of the time; labels become (B, num_classes)."""
    choices = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix))
               if alpha > 0]
    return v2.RandomChoice(choices) if choices else lambda images, labels: (images, labels)


def measure_mean_and_std(source, image_size, images=1000):
    """Mean and standard deviation of each channel over up to `images` images evenly taken from a source."""
    samples = Samples(source, CentreCrop(image_size, [0.0], [1.0]))
    sums, squares, count = 0, 0, 0
    for index in evenly(len(source), images):
        image = samples[index, 0][0].double()
        sums, squares, count = sums + image.sum((1, 2)), squares + image.square().sum((1, 2)), count + image[0].numel()
    mean = sums / count
    return mean.tolist(), (squares / count - mean.square()).clamp(min=1e-12).sqrt().tolist()


# ------------------------------------------------------------------------------------------------------------ batches


class Samples(Dataset):
    """A source with its augmentation: (index, position) -> (image (C, H, W), label).

    The augmentation is seeded by (seed, position), where position is the place of the draw in the whole run. Unreadable
    files are named once and counted by their source. With `replace` the next readable image takes their place; without,
    as in a test, which must not count an image twice, they give zeros with the label -1.
    """

    def __init__(self, source, transform, seed=0, replace=True):
        self.source, self.transform, self.seed, self.replace = source, transform, seed, replace
        if not any(self.read(index) for index in range(len(source))):
            raise UserError(f"none of the images can be read, for instance {source.path(0)}")

    def read(self, index):
        try:
            return self.source[index]
        except Exception as error:  # damaged files make the decoders fail in many ways
            if not isinstance(self.source, ImageFiles):
                raise
            if not self.source.unreadable[index]:
                self.source.unreadable[index] = True
                print(f"\nskipped, since it cannot be read: {self.source.path(index)} "
                      f"({error})", file=sys.stderr)

    def __getitem__(self, item):
        index, position = item
        sample = self.read(index)
        while sample is None and self.replace:
            index = (index + 1) % len(self.source)
            sample = self.read(index)
        image, label = sample or (torch.zeros(self.source.channels, 32, 32), -1)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mix_seed(self.seed, position))
            return self.transform(image), label


def evenly(length, count):
    """Up to `count` indices, evenly taken from range(length)."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def rows_of_process(batch_size, accumulate, part, rank, processes):
    """The rows of the global batch that one process takes in one of its `accumulate` passes, as a slice."""
    share = batch_size // (accumulate * processes)
    start = (part * processes + rank) * share
    return slice(start, start + share)


def step_batches(length, args, first_step, rank, processes):
    """The (index, position) pairs of each pass of each step from `first_step` on, for one process.

    Position p of the run is in epoch p // length. An epoch is a permutation seeded by (seed, epoch); the last batch of
    an epoch is filled from the next one.
    """
    order, epoch = None, None
    for step in range(first_step, args.steps):
        for part in range(args.accumulate):
            rows = rows_of_process(args.batch_size, args.accumulate, part, rank, processes)
            batch = []
            for position in range(step * args.batch_size + rows.start, step * args.batch_size + rows.stop):
                if position // length != epoch:
                    epoch = position // length
                    order = np.random.default_rng((args.seed, epoch)).permutation(length)
                batch.append((int(order[position % length]), position))
            yield batch


def training_loader(samples, args, first_step, rank, processes, device):
    """Batches of this process for the steps from `first_step` to `args.steps`, `args.accumulate` of them a step."""
    batches = step_batches(len(samples.source), args, first_step, rank, processes)
    return DataLoader(samples, batch_sampler=batches, num_workers=args.workers, pin_memory=device.type == "cuda")


def test_loader(samples, args, device, rank=0, processes=1, limit=None):
    """Each sample once, in order, every process its own ones; with `limit`, that many samples evenly taken from all."""
    chosen = evenly(len(samples.source), limit or len(samples.source))[rank::processes]
    batches = [[(index, 0) for index in chosen[i:i + 128]] for i in range(0, len(chosen), 128)]
    return DataLoader(samples, batch_sampler=batches, num_workers=args.workers, pin_memory=device.type == "cuda")


def report_unreadable(source, device):
    """Say how many files of a source could not be read so far, in all processes together."""
    if isinstance(source, ImageFiles):
        unreadable = sum_over_processes(source.unreadable.to(device, torch.int32)) > 0
        if is_rank_0() and unreadable.any():
            print(f"{int(unreadable.sum())} of {len(source)} files could not be read and were skipped", file=sys.stderr)


def complete(args, source, device, processes=1):
    """Check and fill in what depends on the data and the machine: mean and deviation, steps, workers, compile."""
    if bool(args.mean) != bool(args.std):
        raise UserError("give both --mean and --std, or neither")
    if args.measure or (not args.mean and args.channels != 3):
        args.mean, args.std = measure_mean_and_std(source, args.image_size)
    args.mean, args.std = list(args.mean or IMAGENET_MEAN), list(args.std or IMAGENET_STD)
    if len(args.mean) != args.channels or len(args.std) != args.channels or not min(args.std) > 0:
        raise UserError(f"--mean and --std need {args.channels} numbers each, one a channel, and --std positive ones")
    if args.batch_size and args.batch_size % (args.accumulate * processes):
        raise UserError(f"a batch of {args.batch_size} cannot be shared by {processes} processes "
                        f"in {args.accumulate} passes each")
    if args.steps is None and args.batch_size:
        args.steps = max(1, math.ceil(args.epochs * len(source) / args.batch_size))
    if args.workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        args.workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if args.compile is None:
        args.compile = device.type == "cuda"
