"""Image data sets: the standard ones and their formats, a user's own folder and what may be wrong there."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

from tasks.image.data import Cifar10, FashionMnist, Images, Mnist, StandardConfig, cut_sheet, pixel_digest, read_idx
from tasks.image.folder import Folder
from tasks.image.grid import make_grid
from tasks.image.stream import Augment, ImageSource, pixel_views, shifted
from zoo.files import DataMissing


def idx(array):
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """As torchvision lays it out: the test images plain, the rest gzipped."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    made = {}
    for stem, count in (("train", 30), ("t10k", 7)):
        pixels = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        made[stem] = pixels, labels
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            data, path = idx(array), raw / f"{stem}-{name}-ubyte"
            if stem == "train":
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)
    return tmp_path, made


def test_fashion_mnist_in_torchvisions_format(fashion):
    root, made = fashion
    data = FashionMnist(StandardConfig(root=str(root), held_out=5))
    pixels, labels = made["train"]
    train, valid, test = (data.load(split) for split in ("train", "valid", "test"))
    assert (len(train), len(valid), len(test)) == (25, 5, 7)
    assert test.pixels.shape == (7, 28, 28, 1)
    assert np.array_equal(test.pixels[..., 0], made["t10k"][0])
    assert np.array_equal(test.labels, made["t10k"][1])
    both = {image.tobytes() for image in (*train.pixels, *valid.pixels)}
    assert both == {image.tobytes() for image in pixels}
    assert sorted((*train.labels, *valid.labels)) == sorted(labels)


def test_torchvision_reads_the_same(fashion):
    from torchvision.datasets import FashionMNIST

    root, made = fashion
    for path in (root / "FashionMNIST" / "raw").glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    theirs = FashionMNIST(str(root), train=True)
    ours = FashionMnist(StandardConfig(root=str(root))).load("train")
    assert np.array_equal(theirs.data.numpy(), ours.pixels[..., 0])
    assert theirs.targets.tolist() == ours.labels.tolist()


def test_damaged_idx_files_are_named(fashion, tmp_path):
    root, _ = fashion
    path = root / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte is truncated or damaged: 5388 values"):
        read_idx(path)
    path.write_bytes(b"PK\3\4" + whole)
    with pytest.raises(ValueError, match="no idx file of unsigned bytes: it begins with 50 4b"):
        read_idx(path)
    packed = root / "FashionMNIST" / "raw" / "train-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"\.gz is damaged"):
        FashionMnist(StandardConfig(root=str(root))).load("train")
    path.write_bytes(idx(np.zeros((7, 14, 14), np.uint8)))
    with pytest.raises(
        ValueError, match=r"does not hold image/fashion_mnist: 7 labels for images of shape \(7, 14, 14\)"
    ):
        FashionMnist(StandardConfig(root=str(root))).load("test")


def test_what_is_nowhere_says_where_it_was_looked_for(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    monkeypatch.setattr("torchvision.datasets.CIFAR10", no_network)
    for data, place in ((Mnist, "MNIST/raw"), (Cifar10, "cifar-10-batches-py")):
        with pytest.raises(DataMissing, match="no network") as error:
            data(StandardConfig(root=str(tmp_path))).load("train")
        assert str(tmp_path / place) in str(error.value)
        assert "ZOO_DATA" in str(error.value)


def test_mnist_is_the_standard_one(data_root):
    data = Mnist(StandardConfig())
    train, test = data.load("train"), data.load("test")
    assert (train.pixels.shape, test.pixels.shape) == ((60000, 28, 28, 1), (10000, 28, 28, 1))
    assert train.pixels.mean() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]


def test_cifar10_sheets_are_the_standard_images(data_root):
    """The statistics of the whole training set are in DATA.md; one sheet shows that it is cut right."""
    data = Cifar10(StandardConfig(limit=500))
    test = data.load("test")
    assert test.pixels.shape == (500, 32, 32, 3)
    first = np.asarray(Image.open(data_root / "cifar10" / "test_0.webp").convert("RGB"))
    assert np.array_equal(test.pixels[101], first[32:64, 32:64])
    inside = np.abs(np.diff(test.pixels.astype(int), axis=2)).mean()
    across = np.abs(test.pixels[1:, :, 0].astype(int) - test.pixels[:-1, :, -1].astype(int)).mean()
    assert across > 2.5 * inside  # images end where they are cut


@pytest.mark.slow
def test_all_of_cifar10(data_root):
    train = Cifar10(StandardConfig()).load("train")
    means = train.pixels.reshape(-1, 3).mean(axis=0)
    assert means.tolist() == pytest.approx([125.30691805, 122.95039414, 113.86538318], abs=1e-6)
    assert np.bincount(train.labels).tolist() == [5000] * 10


def test_cifar10_as_torchvision_leaves_it(tmp_path, monkeypatch):
    class Standin:
        def __init__(self, root, train, download):
            assert not download
            self.data = np.full((3, 32, 32, 3), 7 if train else 9, np.uint8)
            self.targets = [1, 2, 3]

    (tmp_path / "cifar-10-batches-py").mkdir()
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Standin)
    data = Cifar10(StandardConfig(root=str(tmp_path)))
    assert data.load("train").pixels.mean() == 7
    assert data.load("test").labels.tolist() == [1, 2, 3]


def test_cut_sheet():
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
    sheet = np.concatenate([np.concatenate(images[row * 3 : row * 3 + 3], axis=1) for row in range(2)], axis=0)
    assert np.array_equal(cut_sheet(sheet, 4), images)


@pytest.mark.parametrize("field", [{"held_out": -1}, {"limit": -1}])
def test_settings_are_checked(field):
    (name,) = field
    with pytest.raises(ValueError, match=f"dataset.{name} = -1"):
        StandardConfig(**field)


# ---------------------------------------------------------------------------------------------------------------------


def picture(path, size=(20, 12), mode="RGB", value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode != "RGB" else (value, 10, 20)).save(path)


@pytest.fixture
def pets(tmp_path):
    for number in range(6):
        picture(tmp_path / "train" / "cats" / f"{number}.png", value=number)
        picture(tmp_path / "train" / "dogs" / f"{number}.jpg", size=(12, 30), value=200)
    picture(tmp_path / "test" / "cats" / "a.png")
    picture(tmp_path / "test" / "dogs" / "b.webp")
    picture(tmp_path / "valid" / "dogs" / "c.bmp")
    return tmp_path


def folder(path, **fields):
    return Folder(Folder.Config(path=str(path), **{"size": 8, **fields}))


def test_a_folder_of_pictures(pets):
    data = folder(pets)
    train = data.load("train")
    assert data.classes == ("cats", "dogs")
    assert train.pixels.shape == (12, 8, 8, 3)
    assert np.bincount(train.labels).tolist() == [6, 6]
    assert len(data.load("test")) == 2
    assert data.load("valid").labels.tolist() == [1]
    assert data.provenance()["images"] == {"train": 12, "valid": 1, "test": 2}
    assert data.provenance()["sha256"]["train"] == pixel_digest(train)


def test_pictures_without_splits_or_classes_are_split_by_their_path(tmp_path):
    for number in range(200):
        picture(tmp_path / f"{number}.png", value=number)
    data = folder(tmp_path, share=0.1)
    counts = {split: len(data.load(split)) for split in ("train", "valid", "test")}
    assert sum(counts.values()) == 200
    assert 8 <= counts["valid"] <= 35
    assert data.classes == ("all",)


def test_resizing_keeps_the_middle(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for number in range(40):
        Image.fromarray(wide).save(tmp_path / f"{number}.png")
    images = folder(tmp_path, size=10).load("train")
    assert (images.pixels == 255).all()


BAD = {
    "text": (lambda path: path.write_bytes(b"not a picture"), "is no picture of a known format"),
    "truncated": (lambda path: truncate(path), "cannot be read"),
    "grey": (lambda path: picture(path, mode="L"), r"is grey in a colour folder \(mode L\)"),
    "small": (lambda path: picture(path, size=(9, 5)), "is 9 x 5, smaller than size = 8"),
    "deep": (lambda path: Image.new("I;16", (20, 20)).save(path), "more than 8 bits"),
}


def truncate(path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize("kind", BAD)
def test_one_bad_picture_among_many_is_skipped_counted_and_listed(pets, kind, caplog):
    spoil, why = BAD[kind]
    bad = pets / "train" / "cats" / "bad.png"
    spoil(bad)
    data = folder(pets)
    assert len(data.load("train")) == 12
    assert len(data.bad) == 1
    assert str(bad) in data.bad[0]
    assert str(bad) in caplog.text
    assert data.provenance()["skipped"] == 1
    strict = folder(pets, max_bad=0)
    with pytest.raises(ValueError, match=why):
        strict.load("train")


def test_what_is_asked_for_is_converted_and_enlarged(pets):
    picture(pets / "train" / "cats" / "grey.png", mode="L")
    picture(pets / "train" / "cats" / "tiny.png", size=(3, 3))
    assert len(folder(pets, convert=True, enlarge=True).load("train")) == 14
    assert folder(pets, channels=1, convert=True).load("train").pixels.shape == (13, 8, 8, 1)
    with pytest.raises(ValueError, match="coloured in a grey folder"):
        folder(pets, channels=1).load("train")


def test_folders_that_hold_nothing(pets, tmp_path):
    (pets / "train" / "birds").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*birds holds no picture"):
        folder(pets).load("train")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds no picture; accepted endings"):
        folder(empty).load("train")
    with pytest.raises(FileNotFoundError, match=r"task\.dataset\.path = .*nowhere"):
        folder(tmp_path / "nowhere").load("train")
    with pytest.raises(ValueError, match=r"needs task\.dataset\.path"):
        Folder(Folder.Config())


def test_a_split_without_pictures_is_named(tmp_path):
    picture(tmp_path / "train" / "cats" / "1.png")
    with pytest.raises(ValueError, match="no picture for split 'test': make a folder 'test'"):
        folder(tmp_path).load("test")


# ---------------------------------------------------------------------------------------------------------------------


def source(seed, **fields):
    pixels = np.random.default_rng(1).integers(1, 256, (10, 4, 4, 1), dtype=np.uint8)
    return pixels, ImageSource(
        pixel_views(pixels, Augment(**{k: v for k, v in fields.items() if k == "flip"})),
        np.arange(10),
        list,
        seed=seed,
        shift=fields.get("shift", 0),
    )


def test_evaluation_takes_images_as_they_are():
    pixels, plain = source(None, flip=True, shift=2)
    for place in range(10):
        array, label = plain.item(place)
        assert np.array_equal(array, pixels[place])
        assert label == place


def test_flips_and_shifts_are_drawn_from_the_position():
    pixels, one = source(3, flip=True, shift=1)
    _, other = source(3, flip=True, shift=1)
    flipped = moved = 0
    for place in range(200):
        array, label = one.item(place)
        assert np.array_equal(array, other.item(place)[0])
        candidates = {
            (flip, down, right): shifted(pixels[label][:, ::-1] if flip else pixels[label], down, right)
            for flip in (False, True)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        }
        found = [key for key, value in candidates.items() if np.array_equal(value, array)]
        assert len(found) == 1
        flipped += found[0][0]
        moved += found[0][1:] != (0, 0)
    assert 60 < flipped < 140
    assert 140 < moved < 199
    for epoch in range(3):
        assert sorted(one.item(epoch * 10 + place)[1] for place in range(10)) == list(range(10))


def test_images_cut_by_a_mask():
    images = Images(np.zeros((4, 2, 2, 1), np.uint8), np.arange(4))
    assert images.part(slice(2)).labels.tolist() == [0, 1]


def test_a_grid_has_every_image_in_its_place():
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] + np.ones((5, 2, 3, 1), np.uint8)
    grid = make_grid(images, columns=3)
    assert grid.shape == (2 * 3 + 1, 3 * 4 + 1, 3)
    assert (grid[1:3, 5:8] == 2).all()
    assert (grid[4:6, 1:4] == 4).all()
    assert (grid[4:6, 9:12] == 0).all()
    assert make_grid(images).shape == (7, 13, 3)
