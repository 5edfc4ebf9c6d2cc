"""Which instances are in scope."""

from __future__ import annotations

import pytest
from dicom_instances import CR, dataset, encoded, policy
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from memmc.config import SelectConfig
from memmc.dicom.convert import convert
from memmc.dicom.read import Instance, read_instance, silenced
from memmc.dicom.select import RULES, explain

SC = "1.2.840.10008.5.1.4.1.1.7"


def view_code(value: str) -> Sequence:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "SCT", "x"
    return Sequence([item])


CASES: dict[str, tuple[str | None, dict[str, object]]] = {
    "chest": (None, {}),
    "no sop class": ("META_MISSING_TYPE1", {"SOPClassUID": None}),
    "report": ("META_SOP_CLASS_UNSUPPORTED", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}),
    "private class": ("META_SOP_CLASS_UNSUPPORTED", {"SOPClassUID": "1.2.3.4.5"}),
    "segmentation": ("META_SOP_CLASS_UNSUPPORTED", {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.66.4"}),
    "enhanced class of one frame": (None, {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.12.1.1"}),
    "ct": ("META_MODALITY_OUT_OF_SCOPE", {"Modality": "CT"}),
    "no modality": ("META_MODALITY_OUT_OF_SCOPE", {"Modality": None}),
    "one frame": (None, {"NumberOfFrames": 1}),
    "two frames": ("META_MULTIFRAME_UNSUPPORTED", {"NumberOfFrames": 2}),
    "no frames": ("META_DIMENSIONS", {"NumberOfFrames": 0}),
    "too many frames": ("META_DIMENSIONS", {"NumberOfFrames": 2_000_000_000}),
    "no study": ("META_MISSING_TYPE1", {"StudyInstanceUID": None}),
    "empty series": ("META_MISSING_TYPE1", {"SeriesInstanceUID": ""}),
    "path for a uid": ("META_UID_INVALID", {"SeriesInstanceUID": "../../../tmp/x"}),
    "long uid": ("META_UID_INVALID", {"SeriesInstanceUID": "1." * 33 + "1"}),
    "no pixels": ("META_NO_PIXELS", {"PixelData": None}),
    "burned in": ("DEID_BURNED_IN_FLAG", {"BurnedInAnnotation": "YES"}),
    "burned in, unclear": ("DEID_BURNED_IN_FLAG", {"BurnedInAnnotation": "MAYBE"}),
    "not burned in": (None, {"BurnedInAnnotation": "NO"}),
    "secondary capture": ("SELECT_SECONDARY_CAPTURE", {"SOPClassUID": SC}),
    "burned in secondary capture": ("DEID_BURNED_IN_FLAG", {"SOPClassUID": SC, "BurnedInAnnotation": "YES"}),
    "screen save": ("DEID_BURNED_IN_FLAG", {"ImageType": ["DERIVED", "PRIMARY", "SCREEN SAVE"]}),
    "scanned page": ("DEID_BURNED_IN_FLAG", {"ConversionType": "SD"}),
    "scanned page without text": (None, {"ConversionType": "SD", "BurnedInAnnotation": "NO"}),
    "derived": ("SELECT_DERIVED", {"ImageType": ["DERIVED", "SECONDARY"]}),
    "lossy copy": (None, {"ImageType": ["DERIVED", "PRIMARY"]}),
    "raw detector": ("SELECT_FOR_PROCESSING", {"PresentationIntentType": "FOR PROCESSING"}),
    "left lateral": ("SELECT_LATERAL_VIEW", {"ViewPosition": "LL"}),
    "lateral, spelled out": ("SELECT_LATERAL_VIEW", {"ViewPosition": "Lateral"}),
    "lateral by code": ("SELECT_LATERAL_VIEW", {"ViewPosition": "", "ViewCodeSequence": view_code("399067008")}),
    "frontal by code": (None, {"ViewPosition": "", "ViewCodeSequence": view_code("399348003")}),
}


@pytest.mark.parametrize("case", CASES)
def test_default_scope(case: str) -> None:
    reason, attributes = CASES[case]
    result = convert(encoded(dataset(**{"SOPClassUID": CR, **attributes})), policy())
    assert result.reason == reason
    assert result.attributes["patient_key"] is not None


def test_scope_is_configured() -> None:
    def reason(attributes: dict[str, object], *overrides: str) -> str | None:
        return convert(encoded(dataset(**attributes)), policy(*overrides)).reason

    assert reason({"Modality": "CT"}, "select.modalities=CT,MR") is None
    assert reason({"Modality": None}, "select.modalities=CT,UNKNOWN") is None
    assert reason({"Modality": None, "PixelData": None}, "select.modalities=CT,UNKNOWN") == "META_MISSING_TYPE1"
    assert reason({}, "select.modalities=CT,MR") == "META_MODALITY_OUT_OF_SCOPE"
    assert reason({"ViewPosition": "LL"}, "select.lateral_views=true") is None
    assert reason({}, "select.views=PA,AP", "select.body_parts=CHEST", "select.manufacturers=SIEMENS") is None
    assert reason({}, "select.views=AP") == "SELECT_VIEW"
    assert reason({"ViewPosition": ""}, "select.views=PA") == "SELECT_VIEW"
    assert reason({"ViewPosition": ""}, "select.views=PA,UNKNOWN") is None
    assert reason({}, "select.body_parts=KNEE") == "SELECT_BODY_PART"
    assert reason({"BodyPartExamined": "THORAX"}, "select.body_parts=CHEST") is None
    assert reason({"Manufacturer": "Nobody"}, "select.manufacturers=SIEMENS,GE") == "SELECT_MANUFACTURER"
    assert reason({"Manufacturer": "Nobody"}, "select.manufacturers=OTHER") is None
    assert reason({}, "select.min_side_px=65") == "SELECT_SIZE"
    assert reason({}, "select.min_side_px=64") is None
    assert reason({"ImageType": ["DERIVED", "SECONDARY"]}, "select.derived=true") is None
    assert reason({"BurnedInAnnotation": "YES"}, "select.burned_in_annotation=accept") is None
    capture = {"SOPClassUID": SC, "ImageType": ["DERIVED", "SECONDARY"]}
    assert reason(capture, "select.secondary_capture=true") == "DEID_BURNED_IN_FLAG"
    assert reason({**capture, "BurnedInAnnotation": "NO"}, "select.secondary_capture=true") is None
    assert reason(capture, "select.secondary_capture=true", "select.burned_in_annotation=accept") is None


def instance_of(**attributes: object) -> Instance:
    with silenced():
        return read_instance(encoded(dataset(**attributes)))


@pytest.mark.parametrize("case", CASES)
def test_an_explanation_gives_the_same_verdict(case: str) -> None:
    reason, attributes = CASES[case]
    verdicts = explain(instance_of(**attributes), policy().select)
    assert [verdict.rule for verdict in verdicts] == list(RULES)
    assert next((verdict.reason for verdict in verdicts if verdict.reason), None) == reason


def test_every_rule_can_fail_and_says_what_it_wants() -> None:
    failed: set[str] = set()
    settings = ("select.views=AP", "select.body_parts=KNEE", "select.manufacturers=GE", "select.min_side_px=65")
    for _, attributes in CASES.values():
        failed |= {v.rule.name for v in explain(instance_of(**attributes), policy(*settings).select) if v.reason}
    assert failed == {rule.name for rule in RULES}
    assert all(rule.states.endswith(".") for rule in RULES)
    assert {rule.setting for rule in RULES} - {""} == set(SelectConfig.model_fields)


def test_an_explanation_shows_terms_and_nothing_typed_by_hand() -> None:
    planted = "PHIQ9001ZK"
    keywords = ("Modality", "ViewPosition", "BodyPartExamined", "Manufacturer", "BurnedInAnnotation", "ConversionType")
    typed = {**dict.fromkeys(keywords, planted), "PresentationIntentType": planted, "PatientID": planted}
    uids = dict.fromkeys(("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"), "1.2.999.777.1")
    instance = instance_of(**typed, **uids, ImageType=["DERIVED", planted], SOPClassUID="1.2.999.777.2")
    shown = "\n".join(str(dict(verdict.values)) for verdict in explain(instance, policy().select))
    assert planted not in shown
    assert "1.2.999" not in shown
    assert "'Modality': 'OTHER'" in shown
    assert "'StudyInstanceUID': 'valid'" in shown
    assert "'ImageType': 'DERIVED\\\\OTHER'" in shown
