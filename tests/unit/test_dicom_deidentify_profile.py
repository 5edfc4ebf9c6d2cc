"""PS3.15 Annex E as the oracle: whatever a header's listed attributes say, at any nesting, does not come through.

The table of the package dicom-anonymizer names every attribute with an action.
Below it, the checks that validation suites make of a de-identified collection,
each with a change that must make it fail.
"""

from __future__ import annotations

import calendar
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import cache

import numpy as np
import pytest
from dicom_instances import KEY, dataset, encoded, policy, texture
from dicomanonymizer.dicom_anonymization_databases import dicomfields_2026c
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import BaseTag, Tag

from memmc.dicom.convert import Converted, convert
from memmc.dicom.deidentify import PATTERNS, Value, date_shift_days
from memmc.dicom.read import silenced
from memmc.phi.patterns import Searcher

TEXT_VRS = {"AE": 16, "CS": 16, "LO": 64, "LT": 64, "PN": 64, "SH": 16, "ST": 64, "UC": 64, "UR": 64, "UT": 64}
NESTINGS = (
    (),
    ("ReferencedSeriesSequence",),
    ("RequestAttributesSequence", "ReferencedStudySequence", "ReferencedPatientSequence"),
    ("SharedFunctionalGroupsSequence",),
    ("PerFrameFunctionalGroupsSequence", "FrameContentSequence"),
    ("VOILUTSequence",),
    ("ViewCodeSequence", "ViewModifierCodeSequence"),
)


def tags() -> list[BaseTag]:
    """Every attribute with an action; of repeating groups and private elements an example."""
    listed = [entry for entry in dicomfields_2026c.ALL_TAGS if len(entry) == 2 and entry[0] > 2]
    return [Tag(entry) for entry in sorted(listed)] + [
        Tag(0x50000005),
        Tag(0x60004000),
        Tag(0x60003000),
        Tag(0x00111001),
    ]


def vr_of(tag: BaseTag) -> str:
    try:
        return dictionary_VR(tag).split(" or ")[0]
    except KeyError:
        return "LO"  # newer than the dictionary, private, or a curve


def fill(target: Dataset, number: int) -> list[str]:
    """Plant a value of its own in every listed attribute; return what to search for."""
    values: list[str] = []
    for tag in tags():
        number += 1
        vr, text = vr_of(tag), f"QX{number:05d}Z"
        day = date(1901, 1, 1) + timedelta(days=number * 3)
        written: object = {
            "UI": f"1.2.999.777.{100000 + number}",
            "DA": day.strftime("%Y%m%d"),
            "DT": f"{day:%Y%m%d}0102{number % 60:02d}.{number:06d}",
            "TM": f"0102{number % 60:02d}.{number:06d}",
            "DS": f"9.{number:06d}1",
            "IS": f"7{number:06d}",
            "AS": "093Y",
            "US": 7,
        }.get(vr, text)
        if vr == "SQ":
            item = Dataset()
            item.PatientName, item.InstitutionName, item.PatientID = f"{text}^SQ", text, text
            target.add_new(tag, vr, [item])
        elif vr in ("OB", "UN", "OW"):
            target.add_new(tag, vr, text.encode() + b"\0" * (len(text) % 2))
        else:
            target.add_new(tag, vr, written)
        values += (
            [text] if vr in (*TEXT_VRS, "SQ", "OB", "UN", "OW") else [str(written)] if vr not in ("AS", "US") else []
        )
    return values


@cache
def planted(nesting: tuple[str, ...]) -> tuple[bytes, tuple[str, ...]]:
    """An image with everything planted at one nesting; at the top, what makes it an image stays as it is."""
    whole = dataset()
    with silenced():
        inner = Dataset()
        values = fill(inner, 1000 * NESTINGS.index(nesting))
        for keyword in reversed(nesting):
            outer = Dataset()
            setattr(outer, keyword, Sequence([inner]))
            inner = outer
        for element in inner:
            whole[element.tag] = element
    return encoded(whole), tuple(values)


def leaks(result: Converted, values: tuple[str, ...]) -> list[str]:
    searcher = Searcher(values)
    told = json.dumps(dict(result.attributes)).encode()
    found = searcher.search([told, b"\n", result.pixels or b""])
    return [values[match.identifier] for match in found]


@pytest.mark.parametrize("nesting", NESTINGS, ids=lambda names: "/".join(names) or "top")
def test_no_listed_attribute_comes_through(nesting: tuple[str, ...]) -> None:
    data, values = planted(nesting)
    assert len(values) > 600
    assert all(value.encode() in data for value in values)  # they are there to be lost
    result = convert(data, policy())
    assert (result.outcome == "stored") == (nesting != ("VOILUTSequence",)), result.reason  # a LUT of names is none
    assert result.attributes["patient_key"] is not None
    assert leaks(result, values) == []
    assert all(value is None or name not in PATTERNS or PATTERNS[name].fullmatch(str(value))
               for name, value in result.attributes.items())  # fmt: skip


def test_a_leak_would_be_seen() -> None:
    data, values = planted(())
    result = convert(data, policy())
    for text in (values[7], values[300].lower(), values[-1]):
        leaky = replace(result, attributes={**result.attributes, "manufacturer": f"X {text}"})
        assert leaks(leaky, values)
    assert leaks(replace(result, pixels=b"\0\0" + values[3].encode("utf-16-le")), values)


# --- dates and ages -----------------------------------------------------------------------------------------------

DAYS = st.dates(date(1910, 1, 1), date(2090, 12, 31))


def day_of(found: Value) -> date:
    assert isinstance(found, str)
    return date(int(found[:4]), int(found[4:6]), int(found[6:]))


@cache
def template() -> bytes:
    return encoded(dataset(texture(16, 16), AcquisitionDate="20000101", StudyDate="", PatientAge=None))


def shifted(day: date, patient: str = "MRN0001") -> date:
    whole = dataset(texture(16, 16), AcquisitionDate=day.strftime("%Y%m%d"), StudyDate="", PatientID=patient)
    return day_of(convert(encoded(whole), policy()).attributes["acquisition_date"])


@settings(max_examples=40, deadline=None)
@given(DAYS, DAYS, st.sampled_from(["MRN1", "MRN2", "ÅÄÖ", "7" * 64]))
def test_intervals_of_a_patient_stay_and_no_date_does(one: date, two: date, patient: str) -> None:
    assert shifted(two, patient) - shifted(one, patient) == two - one
    assert 1 <= abs((shifted(one, patient) - one).days) <= 365


@pytest.mark.parametrize("year", [1996, 2000, 2020])
def test_leap_days(year: int) -> None:
    assert calendar.isleap(year)
    before, leap, after = (shifted(date(year, *day)) for day in ((2, 28), (2, 29), (3, 1)))
    assert (leap - before, after - leap) == (timedelta(1), timedelta(1))


@settings(max_examples=40, deadline=None)
@given(st.from_regex(r"[0-9]{0,7}|[0-9]{4}(0[1-9]|1[0-2])|[0-9]{8}-[0-9]{0,8}|-[0-9]{8}|[0-9.]{1,14}", fullmatch=True))
def test_partial_dates_and_ranges_are_dropped_or_moved_whole(written: str) -> None:
    whole = dataset(texture(16, 16), AcquisitionDate=written, StudyDate="")
    found = convert(encoded(whole), policy()).attributes["acquisition_date"]
    assert found is None or (len(str(found)) == 8 and str(found) not in written)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 999), st.sampled_from("DWMY"))
def test_no_age_over_89_comes_through(count: int, unit: str) -> None:
    found = convert(encoded(dataset(texture(16, 16), PatientAge=f"{count:03d}{unit}")), policy()).attributes
    years = found["patient_age_years"]
    assert years is None or (isinstance(years, int) and 0 <= years <= 90)
    assert unit != "Y" or count < 90 or years in (90, None)
    assert unit != "Y" or count > 89 or years == count


@settings(max_examples=60, deadline=None)
@given(DAYS, DAYS)
def test_ages_from_dates_are_binned_too(birth: date, study: date) -> None:
    whole = dataset(texture(16, 16), PatientAge=None)
    whole.PatientBirthDate, whole.StudyDate = birth.strftime("%Y%m%d"), study.strftime("%Y%m%d")
    years = convert(encoded(whole), policy()).attributes["patient_age_years"]
    assert (years is None) == (study < birth or (study - birth).days > 131 * 366 or _years(birth, study) > 130)
    assert years is None or years == min(_years(birth, study), 90)


def _years(birth: date, study: date) -> int:
    return study.year - birth.year - ((study.month, study.day) < (birth.month, birth.day))


def test_every_patient_has_a_shift_of_its_own() -> None:
    shifts = [date_shift_days(KEY, f"{number:064x}", 365) for number in range(3000)]
    assert 0 not in shifts
    assert len(set(shifts)) > 700
    assert max(map(abs, shifts)) <= 365


# --- what validation suites check of a whole collection -----------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """An original and what became of it."""

    patient: str
    study: str
    sop: str
    day: date
    secret: str
    pixels: np.ndarray
    result: Converted


@cache
def collection() -> tuple[Case, ...]:
    cases: list[Case] = []
    for number in range(12):
        patient, study = f"MRN77{number % 4}", f"1.2.777.{number % 6}"
        sop, day, secret = (
            f"1.2.777.9.{number}",
            date(2019, 1, 1) + timedelta(days=97 * number),
            f"QXSECRET{number:03d}",
        )
        pixels = texture(64, 64, seed=number)
        whole = dataset(pixels, PatientID=patient, StudyInstanceUID=study, SOPInstanceUID=sop, InstitutionName=secret)
        whole.AcquisitionDate, whole.StudyDescription = day.strftime("%Y%m%d"), secret
        cases.append(Case(patient, study, sop, day, secret, pixels, convert(encoded(whole), policy())))
    return tuple(cases)


def mapped(cases: tuple[Case, ...], original: str, name: str) -> bool:
    """One pseudonym for one original, another for another, and none that is the original."""
    pairs = {(getattr(case, original), case.result.attributes[name]) for case in cases}
    ones, others = {one for one, _ in pairs}, {other for _, other in pairs}
    return len(pairs) == len(ones) == len(others) and not ones & others


def gaps_kept(cases: tuple[Case, ...]) -> bool:
    by_patient: dict[str, set[timedelta]] = {}
    for case in cases:
        move = day_of(case.result.attributes["acquisition_date"]) - case.day
        by_patient.setdefault(case.patient, set()).add(move)
    return all(len(moves) == 1 and moves != {timedelta(0)} for moves in by_patient.values())


def without_pixels(case: Case) -> Case:
    noise = np.random.default_rng(0).bytes(2 * case.pixels.size)
    return replace(case, result=replace(case.result, pixels=noise))


def with_attribute(name: str, value: Value) -> Callable[[Case], Case]:
    return lambda case: replace(case, result=replace(case.result, attributes={**case.result.attributes, name: value}))


def removed(cases: tuple[Case, ...]) -> bool:
    return not any(case.secret in json.dumps(dict(case.result.attributes)) for case in cases)


def kept(name: str, value: Value) -> Callable[[tuple[Case, ...]], bool]:
    return lambda cases: all(case.result.attributes[name] == value for case in cases)


def pixels_kept(cases: tuple[Case, ...]) -> bool:
    """64 px of 12 bits come out at 64 px and 16 bits: the same order and steps, whatever the header says."""
    for case in cases:
        stored = np.frombuffer(case.result.pixels or b"", "<u2")
        if stored.size != case.pixels.size or not np.corrcoef(stored, case.pixels.ravel())[0, 1] > 0.9999:
            return False
    return True


CHECKS: dict[str, tuple[Callable[[tuple[Case, ...]], bool], Callable[[Case], Case]]] = {
    "patid_consistent": (lambda c: mapped(c, "patient", "patient_key"), with_attribute("patient_key", "0" * 64)),
    "uid_consistent": (lambda c: mapped(c, "study", "study_uid"), with_attribute("study_uid", "2.25.1")),
    "uid_changed": (
        lambda c: mapped(c, "sop", "sop_instance_uid"),
        lambda c: with_attribute("sop_instance_uid", c.sop)(c),
    ),
    "date_shifted": (gaps_kept, lambda c: with_attribute("acquisition_date", c.day.strftime("%Y%m%d"))(c)),
    "text_removed": (removed, lambda c: with_attribute("manufacturer", c.secret)(c)),
    "text_retained": (kept("body_part", "CHEST"), with_attribute("body_part", "OTHER")),
    "text_notnull": (kept("modality", "CR"), with_attribute("modality", None)),
    "tag_retained": (kept("rows", 64), with_attribute("rows", None)),
    "pixels_retained": (pixels_kept, without_pixels),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_checks_of_a_collection(name: str) -> None:
    check, spoil = CHECKS[name]
    cases = collection()
    assert check(cases)
    assert not check((spoil(cases[0]), *cases[1:]))
