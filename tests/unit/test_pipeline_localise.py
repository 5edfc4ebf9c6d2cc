"""Box tables: looked up under the identity key, placed in the stored square, refused without telling what they hold."""

from __future__ import annotations

import numpy as np
import pytest

from memmc.dicom.deidentify import keyed_uid
from memmc.dicom.geometry import Box
from memmc.errors import DataError, UsageError
from memmc.pipeline.localise import drawn_masks, localise_masks, read_boxes

KEY = b"k" * 32
HEADER = "sop_instance_uid,x,y,width,height\n"


def test_boxes_are_read_by_keyed_uid(tmp_path):
    file = tmp_path / "b.csv"
    file.write_text(HEADER + "1.2.3,10,20,30,40\n1.2.3,1,2,3.5,4\n1.2.4,0,0,1,1\n")
    boxes = read_boxes(file, KEY)
    assert boxes[keyed_uid(KEY, "1.2.3")] == [Box(10, 20, 30, 40), Box(1, 2, 3.5, 4)]
    assert len(boxes) == 2


@pytest.mark.parametrize(
    "text",
    [
        HEADER + "1.2.3.4567,10,20,0,40\n",
        HEADER + "1.2.3.4567,ten,20,30,40\n",
        HEADER + "1.2.3.4567,nan,20,30,40\n",
        HEADER + "1.2.3.4567,1\n",
        "sop_instance_uid,x\n1.2.3.4567,1\n",
    ],
)
def test_what_is_no_box_is_refused_by_its_line_alone(tmp_path, text):
    file = tmp_path / "b.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match="line 2") as refused:
        read_boxes(file, KEY)
    assert "4567" not in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
    with pytest.raises(UsageError, match="identity key"):
        read_boxes(file, None)
    with pytest.raises(UsageError, match="cannot be read"):
        read_boxes(tmp_path / "absent.csv", KEY)


def test_masks_are_judged_at_the_calibrations_level():
    mask = np.zeros((16, 16), bool)
    mask[2:6, 9:13] = True
    found = localise_masks([mask * 4.0], [mask], {"map_level": 2.0}, 0)
    assert (found.num_images, found.dice, found.pixel_auroc) == (1, 1.0, 1.0)
    assert found.controls["centre prior"]["dice"] == 0.0
    assert localise_masks([mask * 4.0], [mask], {"map_level": 4.0}, 0).dice == 0.0
    with pytest.raises(DataError, match="memmc calibrate"):
        localise_masks([mask * 4.0], [mask], {"map_level": None}, 0)


def test_masks_that_no_map_can_agree_with_are_counted_and_left_out():
    empty, drawn = np.zeros((16, 16), bool), np.ones((16, 16), bool)
    labels = {"a": "abnormal", "b": "abnormal", "c": "normal", "d": "normal", "e": "abnormal"}
    rows = [{"sop_instance_uid": uid, "label": label} for uid, label in labels.items()]
    found, left_out = drawn_masks(rows, {"a": drawn, "b": empty, "c": drawn, "d": empty, "elsewhere": drawn})
    assert (list(found), left_out) == (["a"], 3)
