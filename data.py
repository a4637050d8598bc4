"""Images and clips in, batches with masks out: built-in photographs, folders, lists, CIFAR-10.

A *source* is a data set of (pixels, label), where pixels are a PIL image; floats (C, H, W) of files
of 16 bits or of other channels than 1 or 3; bytes (segments, T, C, H, W), the clips of a video; or
floats (dates, C, H, W), images of one place, then with a third item, their time stamps (dates, 3):
years since 2002, months and hours from 0.

`Samples` adds a transform and, for pre-training, a mask; `Loader` makes normalized batches on the
device. Each sample of a run has a position, 0, 1, 2, ..., and each draw for it a seed made of
(seed, purpose, position): what a step sees depends on no worker, process or interruption.
"""
import atexit
import contextlib
import functools
import math
import multiprocessing
import os
import random
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import CIFAR10
from torchvision.transforms import InterpolationMode, v2

from common import (BUILT_IN, EPOCH, LABELS, MASK, SAMPLE, WARMUP_STEPS, ImageSize, Plan, UserError,
                    all_reduce, derive_seed, get_rank, get_world_size, print_once, read_checkpoint)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".npy", ".npz",
               ".avif", ".heic", ".heif")  # what Pillow cannot read is skipped and counted
VIDEO_FILES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv")

# ------------------------------------------------------------------------------------------ sources


class Photographs(Dataset):
    """Squares of 96 to 160 pixels of the photographs in scikit-image, which are the labels.

    Training crops come from the first 60 % of a photograph along its longer side, validation crops
    from the rest, so that recognizing a photograph is not remembering a crop.
    """
    classes = ["astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel",
               "hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "rocket",
               "stereo_motorcycle"]

    def __init__(self, train: bool, channels: int = 3, length: int = 6000):
        import skimage.data
        self.regions, self.length = [], length
        for name in Photographs.classes:
            image = getattr(skimage.data, name)()
            image = image[0] if isinstance(image, tuple) else image  # the stereo pair: the left one
            axis = int(image.shape[1] >= image.shape[0])  # the longer side
            region = np.split(image, [int(0.6 * image.shape[axis])], axis)[0 if train else 1]
            self.regions.append(Image.fromarray(region).convert("RGB" if channels == 3 else "L"))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        label = index * len(self.classes) // self.length  # sorted by class, as a folder is
        region = self.regions[label]
        width, height = region.size
        draw = torch.Generator().manual_seed(derive_seed(0, BUILT_IN, index))  # always the same
        side = min(width, height, int(torch.randint(96, 161, (), generator=draw)))
        left = int(torch.randint(width - side + 1, (), generator=draw))
        top = int(torch.randint(height - side + 1, (), generator=draw))
        return region.crop((left, top, left + side, top + side)), label


class Scenes(Photographs):
    """Scenes as if seen by a satellite, made of the photographs: `channels` bands, at some dates.

    A band is a mixture of the colors, with noise; the last is like near infrared, bright where
    there is green. At each date the light differs, by month, hour and chance.
    """

    def __init__(self, train: bool, channels: int, dates: int = 1, length: int = 6000):
        super().__init__(train, 3, length)
        self.dates = dates
        self.mixtures = np.random.default_rng(0).dirichlet(np.ones(3), channels)  # (C, 3)
        self.mixtures[-1] = (-0.5, 2.0, -0.5)

    def __getitem__(self, index):
        image, label = super().__getitem__(index)
        draw = np.random.default_rng(index)
        bands = np.asarray(image) / 255 @ self.mixtures.T  # (H, W, C)
        stamps = np.stack([draw.integers(end, size=self.dates) for end in (16, 12, 24)], axis=1)
        light = 1 - 0.2 * np.cos(stamps[:, 1:] * (2 * math.pi / 12, math.pi / 12)).sum(axis=1)
        light = light * draw.uniform(0.8, 1.2, self.dates)
        noise = draw.normal(0, 0.03, (self.dates, *bands.shape))
        series = light[:, None, None, None] * bands + noise  # (dates, H, W, C)
        pixels = torch.from_numpy(series.astype(np.float32)).permute(0, 3, 1, 2)
        if self.dates == 1:
            return pixels[0], label
        return pixels, label, torch.from_numpy(stamps).float()


class Clips(Photographs):
    """Clips of a virtual camera that moves over collages: pans in 8 directions, zooms, rolls.

    A clip is (1, T, C, 64, 64), its label the motion. Each has a collage of its own: what is masked
    can be told only from what is visible and how it moves. Twice the frame stride is twice the way.
    """
    classes = ["pan right", "pan down right", "pan down", "pan down left", "pan left",
               "pan up left", "pan up", "pan up right",
               "zoom in", "zoom out", "roll left", "roll right"]
    side = 64  # pixels of a frame

    def __init__(self, train: bool, frames: int, channels: int = 3, length: int = 6000,
                 frame_stride: int = 4):
        super().__init__(train, channels, length)
        self.pictures = []
        for x in self.regions:
            for scale in (0.35, 0.5, 0.7):
                size = int(scale * x.width), int(scale * x.height)
                self.pictures.append(x.resize(size, Image.BILINEAR))
        y, x = np.mgrid[-1:1:128j, -1:1:128j]
        self.disc = Image.fromarray(x ** 2 + y ** 2 < 1)
        self.train, self.frames, self.speed = train, frames, frame_stride / 4

    def collage(self, draw, side=160, pieces=24):
        """A scene of side x side pixels: squares and discs of photographs laid over one another."""
        def part(size):  # a square of any photograph, turned or mirrored, enlarged only if need be
            picture = draw.choice(self.pictures)
            cut = min(size, *picture.size)
            left, top = draw.randint(0, picture.width - cut), draw.randint(0, picture.height - cut)
            image = picture.crop((left, top, left + cut, top + cut))
            image = image.transpose(draw.choice(list(Image.Transpose)))
            return image if cut == size else image.resize((size, size), Image.BILINEAR)

        scene = part(side)
        for _ in range(pieces):
            size = draw.randint(20, 70)
            corner = draw.randrange(-size, side), draw.randrange(-size, side)
            square = part(size)
            shape = self.disc.resize((size, size)) if draw.random() < 0.5 else None
            scene.paste(square, corner, shape)
        return scene

    def __getitem__(self, index):
        draw = random.Random(derive_seed(0, BUILT_IN, index, int(self.train)))  # always the same
        scene = self.collage(draw)
        motion, strength = draw.randrange(len(self.classes)), draw.uniform(0.5, 1)
        time = self.speed * strength * np.linspace(-0.5, 0.5, self.frames)
        x, y, zoom, angle = np.zeros((4, self.frames))  # in sides of the picture, radians
        if motion < 8:
            direction = motion * math.pi / 4
            x, y = 0.6 * time * np.cos(direction), 0.6 * time * np.sin(direction)
        elif motion < 10:
            zoom = 0.7 * time * (-1 if motion == 8 else 1)  # a smaller window: larger things
        else:
            angle = 0.8 * time * (1 if motion == 10 else -1)
        half = np.exp(zoom) * (abs(np.cos(angle)) + abs(np.sin(angle))) / 2
        reach = [(abs(x) + half).max(), (abs(y) + half).max()]  # the camera stays in the scene
        side = min(draw.uniform(48, 72), scene.width / (2 * max(reach)))
        middle = [side * r + draw.random() * (scene.width - 2 * side * r) for r in reach]

        film = Image.new(scene.mode, (self.side, self.frames * self.side))  # one below the other
        for t in range(self.frames):  # PIL asks where in the scene each pixel comes from
            step = side / self.side * math.exp(zoom[t])
            cos, sin = step * math.cos(angle[t]), step * math.sin(angle[t])
            corner = [middle[0] + side * x[t] - (cos - sin) * self.side / 2,
                      middle[1] + side * y[t] - (cos + sin) * self.side / 2]
            where = (cos, -sin, corner[0], sin, cos, corner[1])
            frame = scene.transform((self.side, self.side), Image.AFFINE, where, Image.BILINEAR)
            film.paste(frame, (0, t * self.side))
        pixels = torch.from_numpy(np.array(film).reshape(self.frames, self.side, self.side, -1))
        return pixels.permute(0, 3, 1, 2)[None], motion


class Files(Dataset):
    """Files with labels, [(path, label)]: images, or with frames > 1 videos (see `read_clips`), or
    with dates > 1 folders of images of a place (see `read_series`).

    segments: number of clips, evenly spaced over each video; None: one, at a random time.
    """

    def __init__(self, files: list, channels: int = 3, frames: int = 1, frame_stride: int = 1,
                 dates: int = 1):
        self.channels, self.frames, self.frame_stride = channels, frames, frame_stride
        self.dates, self.segments = dates, None
        # Arrays, whose memory workers share: each would end up with a copy of a list's objects.
        self.names = np.array([os.fsencode(name) for name, _ in files])
        self.labels = np.array([label for _, label in files])
        self.unreadable = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        path, label = os.fsdecode(self.names[index]), int(self.labels[index])
        if self.dates > 1:
            pixels, stamps = read_series(path, self.dates, self.channels, not self.segments)
            return pixels, label, stamps
        if self.frames > 1:
            clips = read_clips(path, self.frames, self.frame_stride, self.segments, self.channels)
            return clips, label
        return read_image(path, self.channels), label

    def skip(self, index: int, error: Exception) -> None:
        """Count a file that cannot be read, and name it on stderr if it is among the first ten."""
        is_new, before = not self.unreadable[index], int(self.unreadable.sum())
        self.unreadable[index] = True
        if is_new and before < 10:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            name = os.fsdecode(self.names[index])
            print(f"\nskipped, since it cannot be read: {name} ({reason})", file=sys.stderr)
        elif is_new and before == 10:
            print("\nmore files cannot be read: they are only counted", file=sys.stderr)


def is_system_name(name: str) -> bool:
    """Whether a name is none of the user's: .ipynb_checkpoints, ._photo.jpg, @eaDir, __MACOSX."""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX")


def image_names(folder: str | Path) -> list[str]:
    """The names of the images in a folder, in the order of the numbers in them."""
    def numbers_in(name):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
    names = [name for name in os.listdir(folder)
             if name.lower().endswith(IMAGE_FILES) and not is_system_name(name)]
    return sorted(names, key=numbers_in)


def find_files(path: str | Path, classes: list[str] | None = None, clips: bool = False,
               series: bool = False) -> list[tuple[str, int]]:
    """[(path, label)] of all images below a folder, at any depth, or of a list.

    Given class names: below their folders alone, with their numbers as labels. `clips`: all videos,
    and folders that hold images and no video. `series`: all folders that hold images. Raises
    UserError if there are none.
    """
    if Path(path).is_file():
        numbers = {name: number for number, name in enumerate(classes or [])}
        return [(name, numbers.get(label, 0)) for name, label in read_list(path)]
    found, endings = [], () if series else VIDEO_FILES if clips else IMAGE_FILES
    # Each folder once: a link may point at a folder above it, or at another class.
    visited = {os.path.realpath(Path(path, folder)) for folder in ("", *(classes or []))}
    for label, folder in enumerate(classes or [""]):
        for where, folders, names in os.walk(Path(path, folder), followlinks=True):
            names = [name for name in names if not is_system_name(name)]
            files = [os.path.join(where, name) for name in names if name.lower().endswith(endings)]
            has_images = any(name.lower().endswith(IMAGE_FILES) for name in names)
            if (clips or series) and not files and has_images:
                files = [where]
            found += [(name, label) for name in files]
            targets = {name: os.path.realpath(os.path.join(where, name)) for name in folders}
            folders[:] = [name for name in folders
                          if targets[name] not in visited and not is_system_name(name)]
            visited.update(targets.values())
    if not found:
        wanted = "video and no folder of frames" if clips else "image"
        if series:
            wanted = "folder of images"
        raise UserError(f"there is no {wanted} below {path}")
    return sorted(found)


def read_list(path: str | Path) -> list[tuple[str, str | None]]:
    """[(path, label or None)] of a text file of lines `path label` or `path`, relative to it.

    Raises UserError for a line that names no image, video or folder (a header, another separator),
    and for labels that are numbers in some lines only.
    """
    try:
        if os.path.getsize(path) > 2 ** 30:
            raise ValueError("too large for a list")
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except ValueError:  # of which a UnicodeDecodeError is one
        raise UserError(f"{path} is neither a folder nor a list of paths") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line]
    if not numbered:
        raise UserError(f"{path} is empty")
    pairs = [line.rsplit(maxsplit=1) for _, line in numbered]
    files = IMAGE_FILES + VIDEO_FILES
    if any(len(pair) < 2 or pair[1].lower().endswith(files) for pair in pairs):
        pairs = [(line, None) for _, line in numbered]
    folder = Path(path).parent
    for (number, line), (name, _) in zip(numbered, pairs):
        if not name.lower().endswith(files) and not os.path.isdir(folder / name):
            raise UserError(f"line {number} of {path} names no image, video or folder: {line[:80]}")
    labels = {label for _, label in pairs} - {None}
    numbers = {label for label in labels if label.isdecimal()}
    if numbers and numbers != labels:
        raise UserError(f"{path} has the label {min(labels - numbers)} among labels that are "
                        f"numbers, such as {min(numbers)}")
    return [(str(folder / name), label) for name, label in pairs]


def class_names(path: Path) -> list[str]:
    """The names of a folder's folders, or the labels of a list, numbers in their order."""
    if path.is_dir():
        return sorted(x.name for x in path.iterdir() if x.is_dir() and not is_system_name(x.name))
    labels = {label for _, label in read_list(path)} - {None}
    return sorted(labels, key=lambda label: (int(label) if label.isdecimal() else -1, label))


def read_image(path: str | Path, channels: int = 3) -> Image.Image | Tensor:
    """A PIL image (RGB, or gray for 1 channel), or floats (C, H, W) of 16 bits or other channels.

    uint8 and uint16 are scaled to [0, 1]; other numbers, of unknown range, stay as they are. Raises
    ValueError for other channels than asked for, a size that could be a decompression bomb, and
    values that are not finite.
    """
    suffix, array = Path(path).suffix.lower(), None
    if suffix in (".npy", ".npz"):  # (H, W), (H, W, C) or (C, H, W)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if suffix == ".npz":
            if array.zip.infolist()[0].file_size > 16 * Image.MAX_IMAGE_PIXELS:
                raise ValueError("it claims a size that could be a decompression bomb")
            array = array[array.files[0]]
    elif suffix in (".tif", ".tiff"):
        array = read_tiff(path, channels)
    if array is None:
        image = Image.open(path)
        if channels in (1, 3) and not image.mode.startswith(("I", "F")):
            return image.convert("RGB" if channels == 3 else "L")
        array = np.asarray(image)
        if image.mode == "I" and array.min() >= 0 and array.max() < 2 ** 16:
            array = array.astype(np.uint16)
    if array.ndim == 3 and array.shape[0] == channels != array.shape[2]:  # channels or pages first
        array = array.transpose(1, 2, 0)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[-1] == 1 and channels == 3:  # gray
        array = array.repeat(3, axis=-1)
    if array.ndim != 3 or array.shape[2] != channels or array.size == 0:
        raise ValueError(f"it has the shape {array.shape}, not {channels} channels")
    if array.dtype.kind not in "buif" or not np.isfinite(array).all():
        raise ValueError("it has values that are not finite numbers")
    scale = {("u", 1): 255, ("u", 2): 65535}.get((array.dtype.kind, array.dtype.itemsize), 1)
    return torch.from_numpy((array / scale).astype(np.float32)).permute(2, 0, 1)


def read_tiff(path: str | Path, channels: int) -> np.ndarray | None:
    """The array in a TIFF file, in any layout; None for an 8-bit photograph, which Pillow reads."""
    from tifffile import TiffFile  # scikit-image's reader
    with TiffFile(path) as file:
        page = file.pages.first
        gray_or_color = page.photometric != 1 or page.samplesperpixel == 1  # 1: gray, or bands
        if (channels in (1, 3) and len(file.pages) == 1 and page.bitspersample <= 8
                and page.sampleformat == 1 and page.samplesperpixel <= 4 and gray_or_color):
            return None
        if math.prod(file.series[0].shape) > 16 * Image.MAX_IMAGE_PIXELS:
            raise ValueError("it claims a size that could be a decompression bomb")
        return file.asarray()


def read_series(folder: str | Path, dates: int, channels: int,
                at_random: bool) -> tuple[Tensor, Tensor]:
    """(images (dates, C, H, W), stamps (dates, 3)) of a folder of images of one place.

    Their names tell year, month, day and, if known, hour, such as 2016-03-24T10.tif. Of more images
    some are taken, at random or evenly spaced. Raises ValueError for names without a date, too few
    images, or images that differ in size.
    """
    names = sorted(image_names(folder))
    pattern = (r"(?<!\d)((?:19|20)\d\d)[-_]?(0[1-9]|1[0-2])[-_]?(?:0[1-9]|[12]\d|3[01])"
               r"(?:T([01]\d|2[0-3])|(?!\d))")
    times = [re.search(pattern, name) for name in names]
    if not all(times):
        name = names[times.index(None)]
        raise ValueError(f"{name} has no date in its name, such as 2016-03-24T10")
    if len(names) < dates:
        raise ValueError(f"it has {len(names)} images, fewer than {dates} dates")
    chosen = evenly_spaced(len(names), dates)
    if at_random:
        chosen = torch.randperm(len(names))[:dates].sort().values.tolist()
    paths = [os.path.join(folder, names[i]) for i in chosen]
    images = [v2.functional.to_image(read_image(path, channels)) for path in paths]
    if len({image.shape for image in images}) > 1:
        raise ValueError("its images differ in size")
    stamps = [[int(times[i][1]) - 2002, int(times[i][2]) - 1, int(times[i][3] or 0)] for i in chosen]
    images = torch.stack([v2.functional.to_dtype(image, scale=True) for image in images])
    return images, torch.tensor(stamps, dtype=torch.float32)


def read_clips(path: str | Path, frames: int, frame_stride: int, segments: int | None = None,
               channels: int = 3) -> Tensor:
    """Clips (segments, T, C, H, W), bytes, of every `frame_stride`-th frame of a video or folder.

    segments: their number, evenly spaced; None: one at a random time, from torch's generator. A
    video that is too short repeats its last frame. Time goes by the mean frame rate, so that a
    variable one does not bend the motion. Raises UserError without torchcodec or FFmpeg.
    """
    if os.path.isdir(path):  # in the order of the numbers in their names
        names = image_names(path)
        length = len(names)
    else:
        try:
            from torchcodec.decoders import VideoDecoder
            decoder = VideoDecoder(path)
        except (ImportError, RuntimeError) as error:
            missing = str(error).startswith("Could not load libtorchcodec")  # or FFmpeg is
            if isinstance(error, RuntimeError) and not missing:
                raise  # the file is at fault
            raise UserError(f"to read {path}, install torchcodec (pip install torchcodec) and "
                            "FFmpeg with its shared libraries (apt-get install ffmpeg)") from None
        meta = decoder.metadata
        begin, end = meta.begin_stream_seconds, meta.end_stream_seconds
        length = max(1, int((end - begin) * meta.average_fps + 0.01))
    latest = max(0, length - 1 - (frames - 1) * frame_stride)  # the last time to begin
    if segments is None:
        starts = torch.randint(latest + 1, (1,))
    elif segments == 1:
        starts = torch.tensor([latest // 2])
    else:
        starts = torch.linspace(0, latest, segments).round()
    times = starts[:, None] + frame_stride * torch.arange(frames)
    times = times.clamp(max=length - 1).flatten()  # (segments * T,)
    if os.path.isdir(path):
        chosen, inverse = times.int().unique(return_inverse=True)
        paths = [os.path.join(path, names[i]) for i in chosen]
        images = [v2.functional.to_image(read_image(name, channels)) for name in paths]
        pixels = stack_images(images)[inverse]
    else:
        seconds = begin + (times + 0.5) * (end - begin) / length  # the middle of a frame's time
        pixels = decoder.get_frames_played_at(seconds.tolist()).data
        pixels = v2.functional.rgb_to_grayscale(pixels) if channels == 1 else pixels
    return pixels.unflatten(0, (-1, frames))


def open_sources(data: str | None, channels: int = 3, labeled: bool = True, frames: int = 1,
                 frame_stride: int = 1, dates: int = 1, scenes: bool = False,
                 tested: str | None = None) -> tuple:
    """(training source, validation source or None, class names or None) for --data.

    data: None, "cifar10", a folder or a list. A folder is DIR/train/<class>/... with DIR/val/... or
    DIR/test/..., or DIR/train.txt with DIR/val.txt or DIR/test.txt; with labeled=False any folder
    or list, and DIR/train alone is used if there is one. frames > 1: of clips. dates > 1: of series.
    scenes: `Scenes`, not `Photographs`. tested: the checkpoint of a classifier to evaluate: its
    classes count, and no training samples are needed. Raises UserError.
    """
    built_in = Scenes if scenes or dates > 1 else Clips if frames > 1 else Photographs
    if channels not in (1, 3) and (frames > 1 or data is None and built_in is Photographs):
        kind = "clips" if frames > 1 else "the built-in photographs"
        advice = "" if data else ": give --data"
        raise UserError(f"{kind} have 1 or 3 channels, not {channels}{advice}")
    tested_classes = read_checkpoint(tested).get("classes") if tested else None
    if tested and not tested_classes and get_rank() == 0:
        print(f"{tested} does not name its classes: they are taken for the data's, in order")
    if data is not None and data != "cifar10":
        options = channels, frames, frame_stride, dates
        return open_files(Path(data), options, labeled, tested, tested_classes)

    if data is None:
        options = {"channels": channels}
        if built_in is Scenes:
            options["dates"] = dates
        elif built_in is Clips:
            options |= {"frames": frames, "frame_stride": frame_stride}
        train, val = built_in(True, **options), built_in(False, length=1500, **options)
    else:
        if channels != 3 or frames > 1 or dates > 1:
            raise UserError("CIFAR-10 has images of 3 channels and no clips")
        try:
            if get_rank() == 0:  # torchvision keeps the files in ./data
                CIFAR10("data", download=True)
            all_reduce(torch.zeros(1))  # the others wait
            train, val = CIFAR10("data", train=True), CIFAR10("data", train=False)
        except (OSError, RuntimeError) as error:
            raise UserError(f"CIFAR-10 could not be downloaded to ./data: {error}") from None
    if tested_classes and tested_classes != list(train.classes):
        names = ", ".join(tested_classes[:5])
        raise UserError(f"{tested} was trained on other classes: {names}, ...")
    return train, val, list(train.classes)


def open_files(root: Path, options: tuple, labeled: bool, tested: str | None,
               tested_classes: list | None) -> tuple:
    """`open_sources` for a path; options: channels, frames, frame_stride, dates."""
    if not root.exists():
        raise UserError(f"there is no file or folder {root}")
    _, frames, _, dates = options
    is_sample = root.is_file() and root.name.lower().endswith(IMAGE_FILES + VIDEO_FILES)
    if is_sample and not labeled:  # for `show`
        return Files([(root, 0)], *options), None, None

    def files(path, classes=None):
        return Files(find_files(path, classes, frames > 1, dates > 1), *options)

    train = first_path(root / "train.txt", root / "train")
    val = None
    if train:
        val = first_path(root / f"val{train.suffix}", root / f"test{train.suffix}")
    elif tested:
        val = first_path(root / "val", root / "test", root / "val.txt", root / "test.txt")
    train = train or val or root
    classes, val_classes = tested_classes or class_names(train), class_names(val) if val else []
    unknown = sorted(set(val_classes) - set(classes))
    if labeled and not (classes and val_classes):
        raise UserError(f"{root} needs the folders train/<class>/ and val/<class>/ (or test/<class>/), or "
                        "lists train.txt and val.txt (or test.txt), of lines of `path label`")
    if labeled and unknown:
        known = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
        raise UserError(f"{val} has the label or class folder {unknown[0]}, but {tested or train} only {known}")
    if labeled and len(classes) < 2:
        raise UserError(f"{train} has one class, {classes[0]}: a classifier needs two at least")
    if not labeled and (unknown or len(classes) < 2 or not val_classes):  # folders, no labels
        val = files(val) if val and (unknown or not classes) else None
        return files(train), val, None
    val = files(val, classes)
    val.segments = 1
    return val if tested else files(train, classes), val, classes


def first_path(*paths: Path) -> Path | None:
    """The first that exists."""
    return next((path for path in paths if path.exists()), None)


def describe_source(source: Dataset, classes: list[str] | None) -> str:
    """What a source holds, in words: "12,345 videos in 10 classes"."""
    counts = {"images": len(source)}
    if isinstance(source, Clips):
        counts = {"built-in clips": len(source)}
    elif isinstance(source, Files) and source.dates > 1:
        counts = {"series of images": len(source)}
    elif isinstance(source, Files) and source.frames > 1:
        videos = sum(os.fsdecode(name).lower().endswith(VIDEO_FILES) for name in source.names)
        counts = {"videos": videos, "folders of frames": len(source) - videos}
    words = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return words + (f" in {len(classes)} classes" if classes else "")


def report_unreadable(*sources: Dataset) -> None:
    """Say how many files of each source all processes together could not read."""
    for source in sources:
        if isinstance(source, Files):
            number = int((all_reduce(source.unreadable.int()) > 0).sum())
            if number:
                print_once(f"{number} of {len(source)} files could not be read and were skipped")


# --------------------------------------------------------------------------------------- transforms

BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR


def finetuning_transform(config, mean: list[float], std: list[float], flip: float = 0.5,
                         operations: int = 2):
    """Random crop, flip (its probability), RandAugment (its operations), random erasing."""
    transforms = [v2.RandomResizedCrop(config.image_size, (0.08, 1.0), interpolation=BICUBIC),
                  v2.RandomHorizontalFlip(flip)]
    if config.randaugment and len(mean) in (1, 3):
        magnitude = round(3 * config.randaugment)  # torchvision's is up to 30, the papers' to 10
        transforms.append(RandAugment(mean, operations, magnitude))
    transforms.append(v2.PILToTensor())
    if config.erasing:
        transforms.append(RandomErasing(config.erasing, mean, std))
    return v2.Compose(transforms)


class RandAugment(torch.nn.Module):
    """RandAugment that fills with the mean, in the unit of the picture: bytes, or real numbers.

    Real numbers out of [0, 1], where colors cannot be changed, are only sheared, moved, rotated.
    """

    def __init__(self, mean: list[float], operations: int, magnitude: int):
        super().__init__()
        options = {"num_ops": operations, "magnitude": magnitude, "interpolation": BILINEAR}
        self.for_bytes = v2.RandAugment(fill=[int(255 * value) for value in mean], **options)
        self.for_numbers = v2.RandAugment(fill=list(mean), **options)
        self.geometry = v2.RandAugment(fill=list(mean), **options)
        self.geometry._AUGMENTATION_SPACE = {
            name: values for name, values in v2.RandAugment._AUGMENTATION_SPACE.items()
            if name.startswith(("Identity", "Shear", "Translate", "Rotate"))}

    def forward(self, image):
        if not torch.is_tensor(image) or image.dtype == torch.uint8:
            return self.for_bytes(image)
        if image.amin() >= 0 and image.amax() <= 1:
            return self.for_numbers(image)
        return self.geometry(image)


class RandomErasing(v2.RandomErasing):
    """Fills a random rectangle with noise that is normal once the image is normalized."""

    def __init__(self, probability: float, mean: list[float], std: list[float]):
        super().__init__(probability, scale=(0.02, 1 / 3), ratio=(0.3, 3.3), value="random")
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        image = image / 255 if image.dtype == torch.uint8 else image
        return super().forward((image - self.mean) / self.std) * self.std + self.mean


class CenterCrop:
    """The view of a test: the shorter side resized to size / 0.875, and the center cut out.

    An image of the right size stays as it is. views > 1: that many squares, evenly spaced along the
    longer side, each as large as the shorter side, as a new first dimension.
    """

    def __init__(self, image_size: ImageSize, views: int = 1):
        self.size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.views = views

    def __call__(self, image):
        old, new = v2.functional.get_size(image), self.size
        if self.views == 1 and tuple(old) == tuple(new):
            return v2.PILToTensor()(image)
        scale = max(new[0] / old[0], new[1] / old[1])
        if self.views == 1:
            scale /= 0.875
            if max(old) > 8 * min(old):  # only the middle of a long image, which may be huge
                old = [min(length, math.ceil(8 * side / scale)) for length, side in zip(old, new)]
                image = v2.functional.center_crop(image, old)
        larger = [max(side, round(scale * length)) for side, length in zip(new, old)]
        image = v2.functional.resize(image, larger, BICUBIC if self.views == 1 else BILINEAR)
        image = v2.PILToTensor()(image)
        if self.views == 1:
            return v2.functional.center_crop(image, new)
        views = []
        for view in range(self.views):
            top = (larger[0] - new[0]) * view // (self.views - 1)
            left = (larger[1] - new[1]) * view // (self.views - 1)
            views.append(image[..., top:top + new[0], left:left + new[1]])
        return torch.stack(views)


def repeat_in_time(image: Tensor, frames: int) -> Tensor:
    """An image (..., C, H, W) as a clip that does not move, (..., 1, T, C, H, W)."""
    return torch.stack([image] * frames, dim=-4).unsqueeze(-5)


def single_clip(pixels: Tensor, frames: int) -> Tensor:
    """The only clip of a video, (1, T, C, H, W), or an image (C, H, W) as one: (T, C, H, W)."""
    return repeat_in_time(pixels, frames)[0] if pixels.ndim == 3 else pixels[0]


def mixup_cutmix(config, num_classes: int) -> Callable | None:
    """A function of (pixels, labels (B,)): MixUp or CutMix, at random; labels -> (B, classes)."""
    choices = [make(alpha=alpha, num_classes=num_classes)
               for make, alpha in ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)) if alpha]
    if not choices:
        return None

    def mix(pixels, labels):  # as images (B, all else, H, W): mixed alike in all frames
        images, labels = v2.RandomChoice(choices)(pixels.flatten(1, -3), labels)
        return images.view(pixels.shape), labels
    return mix


# ------------------------------------------------------------------- what depends on the data alone


def plan_training(config, train: Dataset, val: Dataset | None, classes: list[str] | None) -> Plan:
    """Mean, std and number of steps of a run; prints what was found."""
    size, world_size = config.batch_size, get_world_size()
    accumulate = config.accumulate or 1  # None: `common.plan_micro_batches` finds it
    if size % (accumulate * world_size):
        raise UserError(f"a batch of {size} cannot be split over {world_size} processes in "
                        f"{accumulate} micro-batches each")
    mean, std = mean_and_std(config, train)
    benchmark, eval_only = getattr(config, "benchmark", None), getattr(config, "eval_only", False)
    steps = config.steps or max(1, math.ceil(config.epochs * len(train) / size))
    if get_rank() > 0 or benchmark:
        pass
    elif eval_only:
        print(f"{describe_source(val, classes)} for validation")
    else:
        validation = f"{len(val):,} for validation" if val else "none for validation"
        used = labeled_samples(config, len(train))
        part = f", {used:,} of which are used" if used < len(train) else ""
        print(f"{describe_source(train, classes)} for training{part}, {validation}; {steps:,} steps of "
              f"{size:,} are {steps * size / used:,.3g} passes over the data")
    return Plan(mean, std, steps, max(1, len(train) // size), accumulate)


def mean_and_std(config, source: Dataset) -> tuple[list[float], list[float]]:
    """Mean and std of each channel: the config's, ImageNet's for images in [0, 1], or measured."""
    mean, std = config.mean, config.std
    if bool(mean) != bool(std):
        raise UserError("give both --mean and --std, or neither")
    if config.measure or not mean and (config.channels != 3 or not are_photographs(source, 3)):
        mean, std = measure_mean_and_std(source, config.image_size)
    mean, std = list(mean or IMAGENET_MEAN), list(std or IMAGENET_STD)
    if not len(mean) == len(std) == config.channels or min(std) <= 0:
        raise UserError(f"--mean and --std need {config.channels} numbers each, one a channel, and "
                        "--std positive ones")
    return mean, std


def are_photographs(source: Dataset, channels: int) -> bool:
    """Whether images have 1 or 3 channels of bytes or in [0, 1], which can be shown as they are."""
    if channels not in (1, 3):
        return False
    if not isinstance(source, Files):
        return True
    samples = Samples(source, v2.PILToTensor())
    for index in evenly_spaced(len(source), 4):
        pixels = samples.example(index)[0]
        if pixels.is_floating_point() and not 0 <= pixels.amin() <= pixels.amax() <= 1:
            return False
    return True


def measure_mean_and_std(source: Dataset, image_size: ImageSize) -> tuple[list, list]:
    """Mean and std of each channel over up to 1,000 images, evenly spaced in a source.

    Raises UserError for a channel that is the same number everywhere. Warns of a value far from all
    others, as a code for missing data is.
    """
    samples, moments, extremes = Samples(source, CenterCrop(image_size)), [], []
    for index in evenly_spaced(len(source), 1000):
        pixels = samples.example(index)[0]
        pixels = v2.functional.to_dtype(pixels, torch.float64, scale=True)
        pixels = pixels.movedim(-3 if pixels.ndim == 3 else -4, 0).flatten(1)  # (C, the rest)
        moments.append(torch.stack([pixels.mean(1), pixels.square().mean(1)]))
        with contextlib.suppress(Exception):  # what cannot be read was replaced in `samples`
            raw = source[index][0]  # before it is resized, which blends values
            if torch.is_tensor(raw) and raw.is_floating_point():
                values = [x.unique() for x in raw.movedim(-3, 0).flatten(1)]  # sorted
                extremes.append([torch.cat([x[:2], x[-2:]]) for x in values])
    for channel, values in enumerate(zip(*extremes)):
        values = torch.cat(values).double().unique()
        for code, others in ((values[0], values[1:]), (values[-1], values[:-1])):
            if len(others) > 1 and (others - code).abs().min() > others[-1] - others[0]:
                print_once(f"warning: in channel {channel} the value {code:.6g} is far from all others; if it "
                           "stands for missing data, replace it: mean and std suffer from it")
    mean, square = torch.stack(moments).mean(0)
    std = (square - mean.square()).clamp(min=0).sqrt()
    for channel in range(len(mean)):
        if std[channel] <= 1e-6 * mean[channel].abs():
            raise UserError(f"channel {channel} is {mean[channel]:.4g} in all training images measured: "
                            "there is nothing to learn from it, or give --mean and --std")
    # Rounded, so that a run resumes on a machine that measures another last digit.
    return [float(f"{x:.4g}") for x in mean.tolist()], [float(f"{x:.4g}") for x in std.tolist()]


# -------------------------------------------------------------------------------------------- masks


def blockwise_mask(grid: tuple[int, int, int], num_masked: int, min_area: int,
                   max_area: int | None = None, tries: int = 10) -> Tensor:
    """Mask `num_masked` tokens of a grid (times, rows, columns) by blocks: (L,).

    Algorithm 1 of BEiT (arXiv 2106.08254). The area of a block is uniform between min_area and
    max_area (None: what is still missing, at the end less than min_area), its aspect ratio
    log-uniform in [0.3, 1/0.3], its duration uniform. A block that masks too many or no new tokens,
    or is as high or wide as the grid, is rejected; after `tries` in a row, random single tokens
    make up the rest. Draws from torch's default generator.
    """
    times, rows, columns = grid
    mask, missing, failed = np.zeros(grid, dtype=bool), num_masked, 0
    while missing and failed < tries:
        failed += 1
        u = torch.rand(6).tolist()
        area = min_area + u[0] * ((max_area or missing) - min_area)
        aspect = (1 / 0.3) ** (2 * u[1] - 1)
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        duration = 1 + int(u[2] * times)
        if height >= rows or width >= columns:
            continue
        start = int(u[3] * (times - duration + 1))
        top, left = int(u[4] * (rows - height + 1)), int(u[5] * (columns - width + 1))
        block = mask[start:start + duration, top:top + height, left:left + width]  # a view
        new = block.size - int(np.count_nonzero(block))
        if 0 < new <= missing:
            block[:] = True
            missing -= new
            failed = 0
    visible = np.flatnonzero(~mask)
    mask.reshape(-1)[visible[torch.randperm(len(visible))[:missing]]] = True
    return torch.from_numpy(mask).flatten()


# --------------------------------------------------------------------------------- samples, batches


class Samples(Dataset):
    """A source with a transform and, for pre-training, masks.

    A sample is (pixels, label, ...[, mask]). pixels are not normalized: images (C, H, W), series
    (C, dates, H, W), clips (..., C, T, H, W). draw_mask(position) makes the mask, a boolean tensor,
    True = masked. Transform and clip are seeded by (seed, position), the mask by a seed of its own.

    A file that a reader or the transform cannot cope with is skipped and named, and the next one
    takes its place; with replace_unreadable=False, as in a test, that one has the label -1. Raises
    UserError if none can be read.
    """

    def __init__(self, source: Dataset, transform: Callable, seed: int = 0,
                 draw_mask: Callable | None = None, replace_unreadable: bool = True):
        self.source, self.transform, self.seed = source, transform, seed
        self.draw_mask, self.replace_unreadable = draw_mask, replace_unreadable
        self.example(0)

    def __getitem__(self, item: tuple[int, int]) -> tuple:
        index, position = item
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, SAMPLE, position))
            sample = self.read(index)
            if self.draw_mask is None:
                return sample
            torch.default_generator.manual_seed(derive_seed(self.seed, MASK, position))
            return *sample, self.draw_mask(position)

    def read(self, first: int) -> tuple:
        for offset in range(len(self.source)):
            index = (first + offset) % len(self.source)
            try:
                pixels, label, *stamps = self.source[index]
                pixels = self.transform(pixels)
            except UserError:
                raise
            except Exception as error:  # damaged files fail in many ways
                if not isinstance(self.source, Files):
                    raise
                self.source.skip(index, error)
                continue
            if index != first and not self.replace_unreadable:
                label = -1
            if pixels.ndim > 3:
                pixels = pixels.transpose(-4, -3)  # channels before time
            return pixels, label, *stamps
        raise UserError(f"none of the files can be read, such as {os.fsdecode(self.source.names[0])}")

    def example(self, index: int) -> tuple:
        """The sample of this index, the same each time."""
        return self[index, 0]


def evenly_spaced(length: int, count: int) -> list[int]:
    """Up to `count` indices, evenly spaced in range(length)."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def labeled_samples(config, length: int) -> int:
    """How many of the training samples are used: all, or the fraction of --labels."""
    return max(1, round(getattr(config, "labels", 1.0) * length))


def training_batches(length: int, config, plan: Plan,
                     start: int) -> Iterator[list[tuple[int, int]]]:
    """(index, position) of the samples of each micro-batch of this process, from `start` on.

    Position p of the run is in epoch p // length, whose order is seeded by (seed, epoch); the last
    batch of an epoch is filled from the next one. With --labels the samples are a random draw.
    """
    def permutation(number, *purpose):
        return np.random.default_rng(derive_seed(config.seed, *purpose)).permutation(number)

    used = np.sort(permutation(length, LABELS)[:labeled_samples(config, length)])
    length = len(used)

    @functools.lru_cache(maxsize=1)
    def order(epoch):
        return used[permutation(length, EPOCH, epoch)]

    size = config.batch_size // (plan.accumulate * get_world_size())
    for step in range(start, plan.steps):
        for micro_step in range(plan.accumulate):
            first = step * config.batch_size + (micro_step * get_world_size() + get_rank()) * size
            yield [(int(order(p // length)[p % length]), p) for p in range(first, first + size)]


def ignore_signals(worker: int) -> None:
    """For a worker: a signal that all processes get must not end it before the step is saved.

    A second SIGTERM does: the loader sends one if the worker does not end by itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


@atexit.register
def end_workers() -> None:
    """End workers that an error has kept: they note Python's SIGTERM, for whose effect it waits."""
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error when a worker ends
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def stack_images(images: list[Tensor]) -> Tensor:
    """Images or clips -> (B, ...): bytes, unless there are floats in [0, 1] among them."""
    if len({x.dtype for x in images}) > 1:
        images = [x / 255 if x.dtype == torch.uint8 else x for x in images]
    return default_collate(images)


def collate(samples: list[tuple]) -> list[Tensor]:
    """Samples -> [pixels, labels, ...[, masks]]."""
    pixels, *others = zip(*samples)
    return [stack_images(pixels), *(default_collate(list(values)) for values in others)]


def mask_to_indices(mask: Tensor) -> Tensor:
    """The indices of the True in a mask (B, L), in raster order: (B, N), N of the row with fewest.

    What another row has more is cut off, as in the published V-JEPA.
    """
    number = int(mask.sum(dim=1).min())
    first = mask & (mask.cumsum(dim=1) <= number)  # the first `number` of each row
    return first.nonzero()[:, 1].view(len(mask), number)


def indices_to_mask(indices: Tensor, length: int) -> Tensor:
    """A mask (B, length), True at the indices (B, N)."""
    mask = torch.zeros(len(indices), length, dtype=torch.bool, device=indices.device)
    return mask.scatter(1, indices, True)


# Of the built-in validation samples: a shuttle, a cat, a cup and a motorcycle; a wheel.
RECOGNIZABLE = {Photographs: [32, 308, 431, 1424], Clips: [930]}
CHUNK = 2 ** 26  # bytes, about: of the pixels that a worker hands over at once


class Loader:
    """Makes batches of samples, normalized and on the device: the only place that does so.

    mean, std: of each channel; workers: data loading processes.
    """

    def __init__(self, mean: list[float], std: list[float], device: torch.device, workers: int = 0):
        self.device, self.workers = device, workers
        self.largest = torch.tensor(255.0, device=device)
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def train(self, samples: Samples, config, plan: Plan, start: int) -> Iterator[tuple]:
        """This process' micro-batches: (pixels, labels, ...[, visible, masked]).

        visible (B, N), masked (B, M): index tensors, or lists of them for several masks a sample.
        """
        size = config.batch_size // (plan.accumulate * get_world_size())
        if getattr(config, "benchmark", None):
            steps = WARMUP_STEPS + config.benchmark
            return self.random_batches(samples, size, plan.accumulate * steps)
        batches = training_batches(len(samples.source), config, plan, start)
        return self.batches(samples, batches, size, self.workers)

    def test(self, samples: Samples, limit: int | None = None) -> Iterator[tuple]:
        """Each sample once, in order, split over processes; or `limit` of them, evenly spaced."""
        planes = math.prod(samples.example(0)[0].shape[:-2])  # 3 of an image, more of a clip
        size = max(1, 384 // planes)
        indices = evenly_spaced(len(samples.source), limit or len(samples.source))
        own = indices[get_rank()::get_world_size()]
        if limit and not own:
            own = indices[:1]  # for `gather_rows`
        batches = [[(index, 0) for index in own[k:k + size]] for k in range(0, len(own), size)]
        return self.batches(samples, batches, size, self.workers)

    def examples(self, samples: Samples, indices: list[int]) -> tuple:
        """A batch of these samples."""
        batches = [[(index, index) for index in indices]]
        return next(self.batches(samples, batches, len(indices), workers=0))

    def for_picture(self, samples: Samples, count: int) -> tuple:
        """A batch of up to `count` samples, evenly spaced, or of built-in ones that one recognizes."""
        indices = RECOGNIZABLE.get(type(samples.source), [])[:count]
        if not indices or len(samples.source) <= max(indices):
            indices = evenly_spaced(len(samples.source), count)
        return self.examples(samples, indices)

    def batches(self, samples: Samples, batches, size: int, workers: int) -> Iterator[tuple]:
        """Batches of `size` samples, the last of fewer, given as lists of (index, position).

        Workers make chunks of a batch, so that the shared memory which they need does not grow with
        it: two chunks each are ready or on their way.
        """
        chunk_size = max(1, CHUNK // (4 * samples.example(0)[0].numel()))  # samples, as floats
        chunks = (batch[k:k + chunk_size] for batch in batches
                  for k in range(0, len(batch), chunk_size))
        loaded = DataLoader(
            samples, batch_sampler=chunks, num_workers=workers, collate_fn=collate,
            worker_init_fn=ignore_signals, pin_memory=self.device.type == "cuda",
            generator=torch.Generator())  # of its own: torch's default one is that of drop path
        parts, count = [], 0
        for chunk in loaded:
            parts.append(chunk)
            count += len(chunk[0])
            if count == size:
                yield self.join(parts, samples.draw_mask is not None)
                parts, count = [], 0
        if parts:
            yield self.join(parts, samples.draw_mask is not None)

    def join(self, parts: list[list[Tensor]], masks: bool) -> tuple:
        """Chunks of a batch -> the batch on the device, normalized, masks as index tensors."""
        if masks:
            mask = torch.cat([part.pop() for part in parts])
        columns = [list(column) for column in zip(*(self.to_device(part) for part in parts))]
        batch = [column[0] if len(column) == 1 else torch.cat(column) for column in columns]
        return (*batch, *self.to_indices(mask)) if masks else tuple(batch)

    def to_device(self, chunk: list[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(self.copies) if self.copies else contextlib.nullcontext():
            chunk = [x.to(self.device, non_blocking=True) for x in chunk]
        if self.copies:
            torch.cuda.current_stream().wait_stream(self.copies)
            for x in chunk:  # so that its memory is not reused before the step has read it
                x.record_stream(torch.cuda.current_stream())
        pixels, *others = chunk
        is_bytes = pixels.dtype == torch.uint8
        pixels = pixels.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if is_bytes:  # by a tensor: CUDA multiplies by 1 / 255 instead, whose last bit HOG sees
            pixels.div_(self.largest)
        mean, std = self.mean, self.std
        if pixels.ndim > 4:  # (..., C, T, H, W)
            mean, std = mean[:, None], std[:, None]
        return [pixels.sub_(mean).div_(std), *others]

    def to_indices(self, mask: Tensor) -> tuple:
        """Masks (B, [kinds,] L) -> (visible, masked), or two lists with an entry a kind."""
        kinds = mask.unbind(dim=1) if mask.ndim == 3 else [mask]
        visible, masked = [], []
        for kind in kinds:
            for indices, values in ((visible, ~kind), (masked, kind)):
                values = mask_to_indices(values)
                if self.copies:
                    values = values.pin_memory()  # from other memory the copy may wait for the GPU
                indices.append(values.to(self.device, non_blocking=True))
        return (visible, masked) if mask.ndim == 3 else (visible[0], masked[0])

    def random_batches(self, samples: Samples, size: int, count: int) -> Iterator[tuple]:
        """The same random pixels at every step, masks drawn before the first."""
        pixels, *others = default_collate([samples.read(0)])
        pixels = torch.randn(size, *pixels.shape[1:], device=self.device)
        others = [x.to(self.device).expand(size, *x.shape[1:]) for x in others]
        masks = []
        if samples.draw_mask:  # those of 4,096 samples or more, then again from the first
            for batch in range(min(count, 1 + 4096 // size)):
                draws = [samples.draw_mask(batch * size + i) for i in range(size)]
                masks.append(self.to_indices(torch.stack(draws)))
        for batch in range(count):
            yield pixels, *others, *(masks[batch % len(masks)] if masks else ())


# -------------------------------------------------------------------------- what features are worth


@torch.no_grad()
def extract_features(encoders: list[Callable], samples: Samples, loader: Loader, limit: int) -> tuple:
    """([features (N, D) of each encoder], labels (N,)) of up to `limit` samples, evenly spaced.

    An encoder is a function (pixels, ...) -> (B, D). Samples that cannot be read are left out. The
    processes share the work, and all get all the features.
    """
    parts = []
    for pixels, labels, *stamps in loader.test(samples, limit):
        parts.append([*(encode(pixels, *stamps).float() for encode in encoders), labels.cpu()])
    number = min(limit, len(samples.source))
    *x, y = (gather_rows(torch.cat(part), number) for part in zip(*parts))
    return [part[y >= 0] for part in x], y[y >= 0].to(x[0].device)


def gather_rows(rows: Tensor, number: int) -> Tensor:
    """Rows 0 to `number` of a tensor of which each process has every `world size`-th, from its rank.

    Where there are fewer rows than processes, the last ones have a row that does not count.
    """
    everywhere = rows.new_zeros(number, *rows.shape[1:])
    own = everywhere[get_rank()::get_world_size()]
    own.copy_(rows[:len(own)])
    everywhere = all_reduce(everywhere)
    return everywhere.cpu() if rows.device.type == "mps" else everywhere  # MPS has no float64


def knn_accuracy(x: Tensor, labels: Tensor, train_x: Tensor | None = None,
                 train_labels: Tensor | None = None, neighbors: int = 10) -> float:
    """k-nearest-neighbor (k-NN) accuracy in percent of the features x (N, D), by cosine.

    The neighbors are training features (M, D), or without any the other ones of x.
    """
    among_themselves = train_x is None
    if among_themselves:
        train_x, train_labels, neighbors = x, labels, min(neighbors, len(x) - 1)
    mean = train_x.mean(dim=0)
    similarity = F.normalize(x - mean, dim=1) @ F.normalize(train_x - mean, dim=1).T  # (N, M)
    if among_themselves:
        similarity.fill_diagonal_(-math.inf)
    nearest = similarity.topk(min(neighbors, len(train_x))).indices
    votes = F.one_hot(train_labels[nearest]).sum(dim=1)
    return 100 * (votes.argmax(dim=1) == labels).double().mean().item()


def collapse_metrics(x: Tensor) -> dict[str, float]:
    """How far a batch of features (N, D) is from a collapse, whatever their scale.

    feature_std: standard deviation across samples, relative to the features' root mean square.
    effective_rank (RankMe, arXiv 2210.02885, of centered features): the exponential of the entropy
    of the singular values, about the number of directions in use.
    """
    scale = x.square().mean().sqrt().clamp(min=1e-12)
    x = x - x.mean(dim=0)
    p = torch.linalg.svdvals(x)
    p = p / p.sum().clamp(min=1e-12)
    return {"feature_std": (x.square().mean().sqrt() / scale).item(),
            "effective_rank": torch.exp(-torch.xlogy(p, p).sum()).item()}


def evaluate_features(encode: Callable, train: Samples, val: Samples, loader: Loader, limit: int,
                      classes: list[str] | None) -> dict[str, float]:
    """For the log: collapse metrics of validation samples and, given labels, k-NN accuracy.

    And the score that best.pt is chosen by, from *training* samples alone: the same accuracy
    ("score_knn"), or without labels the effective rank ("score_rank").
    """
    results = []
    for samples in (val, train):
        (x,), labels = extract_features([encode], samples, loader, limit)
        if len(x) < 2 or not x.isfinite().all():
            return {}  # nothing to compare; or the next loss is not finite either
        results.append(collapse_metrics(x))
        if classes:
            results[-1]["knn"] = knn_accuracy(x, labels)
    metrics, training = results
    if classes:
        return metrics | {"score_knn": training["knn"]}
    return metrics | {"score_rank": training["effective_rank"]}


def ridge_probe(train_x: Tensor, train_labels: Tensor, x: Tensor, labels: Tensor,
                penalty: float = 1e-4) -> float:
    """Accuracy in percent of ridge regression from frozen features (N, D) to one-hot labels.

    In closed form, so it needs no tuning. Features are standardized by the training set; `penalty`
    is relative to the number of training samples.
    """
    mean, std = train_x.double().mean(0), train_x.double().std(0) + 1e-6
    train_x, x = (train_x.double() - mean) / std, (x.double() - mean) / std
    y = F.one_hot(train_labels.long()).double()
    bias = y.mean(0)
    ridge = penalty * len(train_x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    gram = train_x.T @ train_x + ridge
    weights = torch.linalg.solve(gram, train_x.T @ (y - bias))
    return 100 * ((x @ weights + bias).argmax(1) == labels).double().mean().item()


def print_probes(encoders: dict[str, Callable], train: Samples, val: Samples, loader: Loader,
                 train_limit: int = 3000, limit: int = 3000) -> None:
    """Print accuracies of a ridge probe and of k-NN. encoders: {when: (pixels, ...) -> (B, D)}."""
    train_x, train_labels = extract_features(list(encoders.values()), train, loader, train_limit)
    x, labels = extract_features(list(encoders.values()), val, loader, limit)
    ridge, knn = [], []
    for when, a, b in zip(encoders, train_x, x):
        ridge.append(f"{ridge_probe(a, train_labels, b, labels):.1f} % {when}")
        knn.append(f"{knn_accuracy(b, labels, a, train_labels, neighbors=20):.1f} % {when}")
    if get_rank() == 0:
        chance = 100 / len(set(train_labels.tolist()))
        print(f"the frozen encoder on {len(x[0]):,} validation samples: chance {chance:.1f} %; ridge "
              f"probe {', '.join(ridge)}; 20 nearest of {len(train_labels):,} training samples "
              f"{', '.join(knn)}")


# ------------------------------------------------------------------------ what predictions are worth
# A prediction is (pred, targets (B, L, K), visible, masked (B, L), both boolean). A batch has a list
# of them, one for each slice (SatMAE) or kind of mask (V-JEPA).


def trivial_predictions(targets: Tensor, visible: Tensor,
                        grid: tuple[int, ...]) -> dict[str, Tensor]:
    """Predictions of every token from the targets (B, L, K) of the visible (B, L) ones, unlearned.

    neighbors: a Gaussian average over the grid ([times,] rows, columns), of a std of one token; the
    mean of all visible ones is added with the weight of one at no distance. Other stds (0.7 to 2) and
    weights (0 to 2) lower the error by at most 0.01, for HOG and for pixels.
    last_time, of clips: the same place at the last visible time before, or else the neighbors.
    """
    axes = (torch.arange(float(length), device=targets.device) for length in grid)
    positions = torch.cartesian_prod(*axes)  # (L, axes)
    weights = torch.exp(-torch.cdist(positions, positions).square() / 2)  # (L, L)
    seen = visible[..., None].to(targets.dtype)  # (B, L, 1)
    mean = (seen * targets).sum(dim=1, keepdim=True) / seen.sum(dim=1, keepdim=True).clamp(min=1)
    neighbors = (weights @ (seen * targets) + mean) / (weights @ seen + 1)
    if len(grid) < 3:
        return {"neighbors": neighbors}
    by_time = (x.unflatten(1, (grid[0], -1)) for x in (targets, seen > 0, neighbors.clone()))
    targets, seen, last = by_time  # (B, times, rows * columns, ...)
    for t in range(1, grid[0]):
        latest = torch.where(seen[:, t - 1], targets[:, t - 1], last[:, t - 1])
        last[:, t] = torch.where(seen[:, :t].any(dim=1), latest, last[:, t])
    return {"neighbors": neighbors, "last_time": last.flatten(1, 2)}


def variance_left(batches: Iterable[list[tuple]], grid: tuple[int, ...],
                  reduce: Callable = lambda x: x) -> dict[str, float]:
    """Fraction of the targets' variance at masked tokens that is not explained; their mean leaves 1.

    Of the predictions of all batches, and of the trivial ones. reduce: of sums over processes.
    """
    names = ["variance_left", "variance_left_neighbors", "variance_left_last_time"][:len(grid)]
    sums, n = {}, len(names)  # for each slice or kind of mask, since K may differ
    for predictions in batches:
        for part, (pred, targets, visible, masked) in enumerate(predictions):
            target, values = targets[masked], []  # (masked tokens, K)
            for x in (pred, *trivial_predictions(targets, visible, grid).values()):
                values.append((x[masked] - target).square().sum())
            values += [masked.sum(), target.square().sum()]
            values = torch.cat([torch.stack(values), target.sum(dim=0)]).cpu().double()
            sums[part] = sums.get(part, 0) + values
    totals = [reduce(values) for values in sums.values()]
    errors = sum(x[:n] for x in totals)
    variance = 0.0
    for x in totals:
        count, sum_of_squares, sums = x[n].clamp(min=1), x[n + 1], x[n + 2:]
        variance += sum_of_squares - sums.square().sum() / count
    return dict(zip(names, (errors / variance).tolist()))


@torch.no_grad()
def evaluate_predictions(predict: Callable, grid: tuple[int, ...], samples: Samples, loader: Loader,
                         limit: int) -> dict[str, float]:
    """For the log: `variance_left` of up to 256 samples, with the same masks each time.

    predict: a function of a batch (pixels, labels, ..., visible, masked) -> list of predictions.
    """
    indices = evenly_spaced(len(samples.source), min(limit, 256))
    # The same batches for any number of processes: V-JEPA's lists of tokens are cut by batch.
    size = max(1, 96 // math.prod(samples.example(0)[0].shape[:-2]))
    starts = range(0, len(indices), size)
    batches = [[(index, index) for index in indices[k:k + size]] for k in starts]
    own = batches[get_rank()::get_world_size()]
    loaded = loader.batches(samples, own or batches[:1], size, loader.workers)
    predictions = (predict(*batch) for batch in loaded)
    return variance_left(predictions, grid, lambda sums: all_reduce(sums * bool(own)))


def describe_variance_left(metrics: dict[str, float], what: str) -> str:
    """The result of `variance_left` as a sentence."""
    value, neighbors, *last_time = metrics.values()
    others = f"visible neighbors {neighbors:.2f}, "
    others += "".join(f"last visible time {x:.2f}, " for x in last_time)
    return f"predicts masked {what} with {value:.2f} of the variance left ({others}mean 1)"
