"""The Visual-CoT reader: both published forms, boxes, ids, paths, and a corpus of bad inputs."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from laavit.data.visual_cot import VisualCoT
from laavit.images import open_image
from laavit.registry import DATASETS, UserError
from laavit.structures import Box

_spec = importlib.util.spec_from_file_location("corpus", Path(__file__).with_name("corpus.py"))
assert _spec is not None and _spec.loader is not None
corpus = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(corpus)
REQUEST, four, two, talk = corpus.REQUEST, corpus.four, corpus.two, corpus.talk


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "images"
    (folder / "cot").mkdir(parents=True)
    Image.new("RGB", (100, 50)).save(folder / "cot" / "a.png")
    Image.new("RGB", (40, 40)).save(folder / "cot" / "b.png")
    return folder


@pytest.fixture
def read(tmp_path, root):
    def reader(records, **arguments):
        file = tmp_path / "annotations.json"
        file.write_text(records if isinstance(records, str) else json.dumps(records), encoding="utf-8")
        return VisualCoT(file, root, **arguments)

    return reader


def test_both_forms_give_the_same_sample(read, root):
    long, short = read([four()])[0], read([two()])[0]
    assert long == short
    assert long.id == "1" and long.source == "flickr30k" and long.split == "train"
    assert long.question == "What does the child wear?" and long.answer == "Blue shorts."
    assert long.images == ((root / "cot/a.png").resolve(),)
    assert long.boxes == (Box(0.1, 0.2, 0.5, 0.8, 0),)


def test_registered():
    assert DATASETS.find("VisualCoT") is VisualCoT


def test_pixel_boxes_are_divided_by_the_real_size(read):
    record = two(image=["cot/a.png", "cot/a.png###[10, 10, 50, 40]"])
    del record["bboxes"]
    assert read([record])[0].boxes == (Box(0.1, 0.2, 0.5, 0.8, 0),)


def test_pixel_boxes_are_of_the_upright_image(read, root):
    """A photograph stored 60 x 40 that its EXIF data turn to 40 x 60: the box is in what is seen."""
    Image.new("RGB", (60, 40)).save(root / "cot/turned.jpg", exif=corpus.turned())
    sample = read([two(image=["cot/turned.jpg###[0, 30, 20, 60]"], bboxes=None)])[0]
    assert sample.boxes == (Box(0, 0.5, 0.5, 1),) and open_image(sample.images[0]).size == (40, 60)


def test_a_box_that_rounding_made_flat_is_taken_from_its_pixels(read):
    assert read([four(pixels="[10, 10, 10.01, 40]", box="[0.1, 0.2, 0.1, 0.8]")])[0].boxes[0].x2 == pytest.approx(
        0.1001
    )


def test_several_images_and_boxes(read):
    record = four(
        image=["cot/a.png", "cot/b.png", "cot/b.png###[0, 0, 20, 20]", "cot/a.png###[0, 0, 100, 25]"],
        conversations=talk(f"<image><image>\nSame?{REQUEST}", "[0, 0, 0.5, 0.5], [0, 0, 1, 0.5]", "<image>", "no"),
    )
    sample = read([record])[0]
    assert [path.name for path in sample.images] == ["a.png", "b.png"]
    assert sample.boxes == (Box(0, 0, 0.5, 0.5, 1), Box(0, 0, 1, 0.5, 0))
    assert sample.question == "Same?"


def test_one_path_as_text_and_no_box(read):
    record = two(image="cot/b.png")
    del record["bboxes"]
    sample = read([record])[0]
    assert sample.boxes == () and len(sample.images) == 1


def test_other_keys_become_meta_and_any_script_survives(read):
    record = two(kind="attribute", hops=[1, 2], conversations=talk("这是什么颜色？", "<answer>藍 \u202eü</answer>"))
    sample = read([record])[0]
    assert sample.meta == {"kind": "attribute", "hops": [1, 2]}
    assert sample.question == "这是什么颜色？" and sample.answer == "藍 \u202eü"


@pytest.mark.parametrize("box", ["[-0.005, 0, 0.5, 1.002]", "[0, 0, 1.01, 1]"])
def test_a_small_overshoot_is_clamped(read, box):
    corners = read([four(box=box)])[0].boxes[0]
    assert 0 <= corners.x1 < corners.x2 <= 1 and 0 <= corners.y1 < corners.y2 <= 1


def test_ids_are_prefixed_only_where_they_collide(read):
    assert read([four(1), four(2, dataset="gqa")]).ids == ("1", "2")
    assert read([four(1), four(1, dataset="gqa"), four(2)]).ids == ("flickr30k-1", "gqa-1", "flickr30k-2")
    assert read([four(1), four("1", split="val")]).ids == ("flickr30k-train-1", "flickr30k-val-1")


def test_ids_depend_on_neither_split_nor_limit(read):
    records = [four(1), four(1, split="val"), four(2)]
    whole = read(records).ids
    assert read(records, split="train").ids == (whole[0], whole[2])
    assert read(records, limit=1).ids == whole[:1]


def test_it_is_a_sequence(read):
    data = read([four(1), four(2), four(3)])
    assert len(data) == 3 and data[-1].id == "3" and [sample.id for sample in data[1:]] == ["2", "3"]
    assert [sample.id for sample in data] == list(data.ids) and data.get("2").id == "2"
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(UserError, match="'nine'"):
        data.get("nine")


def test_opening_touches_no_image(read, root):
    (root / "cot/a.png").unlink()
    data = read([four()])
    with pytest.raises(UserError, match=r"record 0 .*question_id 1.*'cot/a.png'"):
        data.check()


def test_the_header_is_enough(read, root):
    whole = (root / "cot/a.png").read_bytes()
    (root / "cot/a.png").write_bytes(whole[:45])  # the size is there, the pixels are not
    record = two(image=["cot/a.png###[10, 10, 50, 40]"])
    del record["bboxes"]
    assert read([record])[0].boxes == (Box(0.1, 0.2, 0.5, 0.8, 0),)


LATE = {
    "missing image": (four(path="cot/none.png"), "no image 'cot/none.png'"),
    "image is a folder": (four(path="cot"), "no image 'cot'"),
    "leads out by a link": (four(path="cot/out.png"), "leads out of"),
    "no image file": (two(image=["cot/text.png###[1, 1, 2, 2]"], bboxes=None), "cannot be read"),
    "pixel box too far out": (two(image=["cot/a.png###[1, 1, 102, 2]"], bboxes=None), "100 x 50 pixels"),
    "pixel box of no area": (two(image=["cot/a.png###[5, 5, 5, 9]"], bboxes=None), "no area"),
}


@pytest.mark.parametrize("case", LATE, ids=list(LATE))
def test_bad_images_and_pixel_boxes_name_the_record(read, root, tmp_path, case):
    Image.new("RGB", (100, 50)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", root / "cot/out.png")
    (root / "cot/text.png").write_text("no picture")
    record, message = LATE[case]
    data = read([record])
    with pytest.raises(UserError, match=message) as error:
        data.check()
    assert "record 0" in str(error.value) and "question_id 1" in str(error.value)


def test_bad_arguments(read, tmp_path, root):
    with pytest.raises(UserError, match="did you mean 'train'"):
        read([four()], split="trian")
    for limit in (0, -1, True, 1.5):
        with pytest.raises(UserError, match="limit"):
            read([four()], limit=limit)
        with pytest.raises(UserError, match="max_characters"):
            read([four()], max_characters=limit)
    with pytest.raises(UserError, match="does not exist"):
        VisualCoT(tmp_path / "none.json", root)
    with pytest.raises(UserError, match="image folder"):
        VisualCoT(tmp_path / "annotations.json", tmp_path / "none")
    with pytest.raises(UserError, match="cannot be read"):
        VisualCoT(tmp_path, root)
