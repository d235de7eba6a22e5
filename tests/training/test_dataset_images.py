"""Pictures of every kind: upright, whole, 8-bit RGB, or refused."""

import io
import os
import threading

import numpy as np
import pytest
from PIL import Image, ImageFile

from tidetable.training.dataset import images
from tidetable.training.dataset.images import BadImageError, decode, decode_mask, read_whole


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(image=PICTURE, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_rgb_is_read_as_it_is():
    picture, notes = decode(encoded())
    assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), PIXELS) and notes == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation):
    """Stored as a camera stores it, the picture comes back as it was seen."""
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Transpose that the camera applied
    stored = PICTURE if undo is None else PICTURE.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture, _ = decode(encoded(stored, exif=exif))
    assert np.array_equal(np.asarray(picture), PIXELS)


def test_sixteen_bits_keep_their_range():
    ramp = np.linspace(0, 65535, 24 * 40).reshape(24, 40).astype(np.uint16)
    picture, notes = decode(encoded(Image.fromarray(ramp)))
    assert np.abs(np.asarray(picture)[..., 0].astype(float) - ramp / 257).max() <= 0.5001
    assert "deep gray" in notes[0]


def test_floating_point_and_its_nan():
    ramp = np.linspace(0, 1, 24 * 40, dtype=np.float32).reshape(24, 40)
    picture, _ = decode(encoded(Image.fromarray(ramp), "TIFF"))
    assert np.abs(np.asarray(picture)[..., 0] / 255 - ramp).max() <= 0.5001 / 255
    ramp[3, 3] = np.nan
    with pytest.raises(BadImageError, match="contains nan or inf"):
        decode(encoded(Image.fromarray(ramp), "TIFF"))


def test_cmyk_and_palette():
    cmyk, notes = decode(encoded(PICTURE.convert("CMYK"), "JPEG", quality=95, subsampling=0))
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk).astype(float) - PIXELS).mean() < 12 and "CMYK" in notes[0]
    few = PICTURE.quantize(16)
    palette, notes = decode(encoded(few))
    assert np.array_equal(np.asarray(palette), np.asarray(few.convert("RGB"))) and notes == []


def test_transparency_is_white_whatever_lies_below():
    alpha = Image.fromarray(np.where(np.arange(40) < 20, 0, 255).astype(np.uint8)[None].repeat(24, 0))
    cut = PICTURE.copy()
    cut.putalpha(alpha)
    picture, notes = decode(encoded(cut))
    assert (np.asarray(picture)[:, :20] == 255).all() and np.array_equal(np.asarray(picture)[:, 20:], PIXELS[:, 20:])
    assert "transparent" in notes[0]
    opaque = PICTURE.copy()
    opaque.putalpha(255)
    assert decode(encoded(opaque))[1] == []


def test_the_first_frame_of_an_animation():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    picture, notes = decode(data)
    assert np.asarray(picture).max() <= 12 and "animated" in notes[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_truncated_files_are_refused_also_where_another_pack_allows_them(kind, monkeypatch):
    """Whoever sets Pillow's switch gets half-gray pictures: not here, and the switch is left as it was."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = encoded(kind=kind)
    decode(data)
    for share in (0.02, 0.5, 0.9):
        with pytest.raises(BadImageError, match="is not a whole picture"):
            decode(data[: int(len(data) * share)])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_what_is_no_picture_is_refused():
    for data in (b"", b"hello", os.urandom(1000), b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(BadImageError):
            decode(data)


def test_a_mask_is_its_brightness():
    mask = decode_mask(encoded(Image.fromarray(PIXELS[..., 0])))
    assert mask.shape == (24, 40, 1) and np.allclose(mask[..., 0].numpy() * 255, PIXELS[..., 0])


def test_a_file_that_changes_while_it_is_read_is_read_again_or_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    assert read_whole(path)[0] == encoded()
    original, changes = type(path).read_bytes, iter([b"x", b"xy"])

    def read_and_change(self, more=changes):
        data = original(self)
        for content in more:
            self.write_bytes(content)
            break
        return data

    monkeypatch.setattr(type(path), "read_bytes", read_and_change)
    assert read_whole(path)[0] == b"xy", "read again until it stays"
    monkeypatch.setattr(
        type(path), "read_bytes", lambda self: read_and_change(self, [os.urandom(9 + len(original(self)))])
    )
    with pytest.raises(BadImageError, match="changes while it is read"):
        read_whole(path)
    with pytest.raises(BadImageError, match="could not be read"):
        read_whole(tmp_path / "missing.png")


def test_threads_may_decode_at_once(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    failures = []

    def work():
        for _ in range(50):
            try:
                images.decode(encoded(kind="JPEG")[:-200])
                failures.append("a truncated picture was taken")
            except BadImageError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and ImageFile.LOAD_TRUNCATED_IMAGES is True
