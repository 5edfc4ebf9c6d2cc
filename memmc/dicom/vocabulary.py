"""The words an instance may pass on: closed vocabularies, anything else becomes OTHER.

None means that the object says nothing. A model name passes only when every one
of its words is a known product word or a short model number: room names,
serial numbers and anything typed by hand do not.
"""

from __future__ import annotations

import re

OTHER = "OTHER"

_MODALITY_TEXT = (  # PS3.3 C.7.3.1.1.1
    "ANN ASMT AR BDUS BI BMD CR CT CTPROTOCOL DG DMS DOC DR DX ECG EEG EMG EOG EPS ES FID GM HC HD IO IOL IVOCT IVUS "
    "KER KO LEN LS M3D MG MR NM OAM OCT OP OPM OPT OPTBSV OPTENF OPV OSS OT PA PLAN POS PR PT PX REG RESP RF RG "
    "RTDOSE RTIMAGE RTINTENT RTPLAN RTRAD RTRECORD RTSEGANN RTSTRUCT RWV SC SEG SM SMR SR SRF STAIN TEXTUREMAP TG US "
    "VA XA XC XAPROTOCOL"
)
_MODALITIES = frozenset(_MODALITY_TEXT.split())
_PHOTOMETRIC = frozenset(  # PS3.3 C.7.6.3.1.2
    (
        "MONOCHROME1",
        "MONOCHROME2",
        "PALETTE COLOR",
        "RGB",
        "YBR_FULL",
        "YBR_FULL_422",
        "YBR_PARTIAL_420",
        "YBR_ICT",
        "YBR_RCT",
        "XYB",
    )
)
_VIEW_TEXT = "AP PA LL RL RLD LLD RLO LLO CC MLO ML LM XCCL XCCM FB SIO ISO CV AT"
_VIEWS = {  # (0018,5101), PS3.3 C.8.1.3 and C.8.11.5, with common spellings
    **{term: term for term in _VIEW_TEXT.split()},
    "LAT": "LATERAL",
    "LATERAL": "LATERAL",
    "LLAT": "LL",
    "L LAT": "LL",
    "RLAT": "RL",
    "R LAT": "RL",
    "A/P": "AP",
    "A-P": "AP",
    "P/A": "PA",
    "P-A": "PA",
    "OBLIQUE": "OBLIQUE",
    "OBL": "OBLIQUE",
    "AXIAL": "AXIAL",
    "DECUB": "DECUBITUS",
}
_BODY_PART_TEXT = (  # PS3.16 Annex L
    "ABDOMEN ANKLE ARM BREAST CALCANEUS CALF CAROTID CERVIX CHEEK CHEST CLAVICLE COCCYX COLON CSPINE DUODENUM EAR "
    "ELBOW ESOPHAGUS EXTREMITY EYE FACE FEMUR FINGER FOOT FOREARM GALLBLADDER HAND HEAD HEART HIP HUMERUS ILEUM ILIUM "
    "JAW JEJUNUM KIDNEY KNEE LEG LIVER LSPINE LSSPINE LUNG MANDIBLE MAXILLA MEDIASTINUM MOUTH NECK NOSE ORBIT OVARY "
    "PANCREAS PAROTID PATELLA PELVIS PENIS PHARYNX PROSTATE RADIUS RECTUM RIB RIBS SCAPULA SCROTUM SHOULDER SIJOINT "
    "SKULL SPINE SPLEEN SSPINE STERNUM STOMACH TESTIS THIGH THORAX THUMB THYMUS THYROID TIBIA TOE TONGUE TRACHEA "
    "TSPINE ULNA URETER URETHRA UTERUS VAGINA VULVA WHOLEBODY WRIST ZYGOMA"
)
_BODY_PARTS = frozenset(_BODY_PART_TEXT.split())
_BODY_PART_SYNONYMS = {"THORAX": "CHEST", "RIBS": "RIB", "C-SPINE": "CSPINE", "T-SPINE": "TSPINE", "L-SPINE": "LSPINE"}

_IMAGE_TYPE_TEXT = (  # (0008,0008), PS3.3 C.7.6.1.1.2 and C.8
    "ORIGINAL DERIVED PRIMARY SECONDARY MIXED AXIAL LOCALIZER REFORMATTED PROJECTION IMAGE VOLUME RESAMPLED M P R I "
    "MPR MIP FFE SE IR CSA ND NORM"
)
_IMAGE_TYPES = frozenset((*_IMAGE_TYPE_TEXT.split(), "SCREEN SAVE", "SINGLE PLANE", "BIPLANE A", "BIPLANE B"))
_CONVERSION_TYPES = frozenset(("DV", "DI", "DF", "WSD", "SD", "SI", "DRW", "SYN"))  # (0008,0064), PS3.3 C.8.6.1

_MANUFACTURERS = (  # word that begins the name, once upper-cased and stripped of punctuation -> name
    ("AGFA", "AGFA"),
    ("ALPINION", "ALPINION"),
    ("CANON", "CANON"),
    ("CARESTREAM", "CARESTREAM"),
    ("DEL MEDICAL", "DEL MEDICAL"),
    ("DRGEM", "DRGEM"),
    ("EASTMAN KODAK", "KODAK"),
    ("FUJI", "FUJIFILM"),
    ("FUJIFILM", "FUJIFILM"),
    ("FUJI PHOTO", "FUJIFILM"),
    ("GE", "GE"),
    ("GENERAL ELECTRIC", "GE"),
    ("GMM", "GMM"),
    ("HOLOGIC", "HOLOGIC"),
    ("IMAGING DYNAMICS", "IMAGING DYNAMICS"),
    ("KODAK", "KODAK"),
    ("KONICA", "KONICA MINOLTA"),
    ("KONICA MINOLTA", "KONICA MINOLTA"),
    ("LISTEM", "LISTEM"),
    ("LODOX", "LODOX"),
    ("LUMISYS", "LUMISYS"),
    ("MINDRAY", "MINDRAY"),
    ("ORIENTAL", "ORIENTAL"),
    ("PHILIPS", "PHILIPS"),
    ("RAYENCE", "RAYENCE"),
    ("SAMSUNG", "SAMSUNG"),
    ("SEDECAL", "SEDECAL"),
    ("SHIMADZU", "SHIMADZU"),
    ("SIEMENS", "SIEMENS"),
    ("SWISSRAY", "SWISSRAY"),
    ("TOSHIBA", "TOSHIBA"),
    ("TRIXELL", "TRIXELL"),
    ("UNITED IMAGING", "UNITED IMAGING"),
    ("VAREX", "VAREX"),
    ("VARIAN", "VARIAN"),
    ("VIEWORKS", "VIEWORKS"),
    ("VILLA", "VILLA"),
    ("ZIEHM", "ZIEHM"),
)
_MODEL_WORD_TEXT = (
    "ACCESS ADC AERODR ARCADIS ARISTOS ASCEND AXIOM BRIVO BUCKY CAPSULA CARESTREAM CENTRICITY CLASSIC CLEARVIEW "
    "COMBIDIAGNOST COMFORT COMPACT CR CROSS CXDI DEFINIUM DETECTOR DIAGNOST DIGITAL DIGITALDIAGNOST DIRECTVIEW "
    "DISCOVERY DR DRX DURADIAGNOST DX ELEVA ELITE ESSENTA EVOLUTION FCR FD FDR FLEX FLUOROSPOT GC GO HD IDT IMAGER "
    "INNOVA IQ KODAK LUMINOS LUMOS MAX MINI MOBILE MOBILEDART MOBILETT MULTIX MUX NANO NOVA NX OPTIMA OPTITOP PCR "
    "PLUS PORTABLE PRECISION PRESTIGE PRIMAX PRO PROFECT PROTEUS RAD RADNEXT RADREX RADSPEED REGIUS REVOLUTION SELECT "
    "SENSATION SIRESKOP SMART SOLO SONIALVISION STUDIO SYSTEM TITANIUM TOUCH ULTIMAX UROSKOP VELOCITY VISION VX X XG "
    "XR YSIO"
)
_MODEL_WORDS = frozenset(_MODEL_WORD_TEXT.split())
_MODEL_NUMBER = re.compile(r"(?:[A-Z]{0,3}[0-9]{1,4}|[0-9]{1,4}[A-Z]{1,2})")


def _plain(value: str | None) -> str | None:
    """Upper-case, single spaces, None for nothing; bounded, so that no long value costs time."""
    words = value[:256].upper().replace("\0", " ").split() if value else []
    return " ".join(words) or None


def _known(value: str | None, words: frozenset[str]) -> str | None:
    plain = _plain(value)
    return plain if plain is None or plain in words else OTHER


def modality(value: str | None) -> str | None:
    """Return the defined term of Modality (0008,0060)."""
    return _known(value, _MODALITIES)


def photometric(value: str | None) -> str | None:
    """Return the defined term of Photometric Interpretation (0028,0004)."""
    return _known(value, _PHOTOMETRIC)


def image_type(value: str | None) -> str:
    """Return one value of Image Type (0008,0008)."""
    return _known(value, _IMAGE_TYPES) or ""


def conversion_type(value: str | None) -> str | None:
    """Return the defined term of Conversion Type (0008,0064)."""
    return _known(value, _CONVERSION_TYPES)


def yes_no(value: str | None) -> str | None:
    """Return YES or NO."""
    return _known(value, frozenset(("YES", "NO")))


def intent(value: str | None) -> str | None:
    """Return the enumerated value of Presentation Intent Type (0008,0068)."""
    return _known(value, frozenset(("FOR PRESENTATION", "FOR PROCESSING")))


def view(value: str | None) -> str | None:
    """Return View Position (0018,5101) in one spelling."""
    plain = _plain(value)
    return None if plain is None else _VIEWS.get(plain, OTHER)


def body_part(value: str | None) -> str | None:
    """Return Body Part Examined (0018,0015) in one spelling; THORAX is CHEST."""
    plain = _plain(value)
    return None if plain is None else _known(_BODY_PART_SYNONYMS.get(plain, plain), _BODY_PARTS)


def manufacturer(value: str | None) -> str | None:
    """Return the known manufacturer that Manufacturer (0008,0070) begins with."""
    plain = _plain(value)
    if plain is None:
        return None
    words = re.sub(r"[^A-Z0-9]+", " ", plain).strip() + " "
    return next((name for start, name in _MANUFACTURERS if words.startswith(start + " ")), OTHER)


def model(known_manufacturer: str | None, value: str | None) -> str | None:
    """Return Manufacturer's Model Name (0008,1090) if it is made of product words and at most two model numbers."""
    plain = _plain(value)
    if plain is None:
        return None
    words = re.sub(r"[^A-Z0-9]+", " ", plain).split()
    numbers = [word for word in words if word not in _MODEL_WORDS]
    passes = (
        known_manufacturer not in (None, OTHER)
        and len(words) <= 5
        and len(numbers) < len(words)
        and len(numbers) <= 2
        and sum(character.isdigit() for character in "".join(words)) <= 5
        and all(_MODEL_NUMBER.fullmatch(word) for word in numbers)
    )
    return " ".join(words)[:32].rstrip() if passes else OTHER
