"""What the quality gate flags: real radiographs, and what was made of them on purpose.

    .venv/bin/python infra/benchmarks/quality_gate.py ../shared/data [--spoilt 0.075] [--normals 300]

For each of two cohorts (adults, children) the gate is fitted on the training
normals and judges images it has not seen: normals and abnormals that are in
scope, and turned, mirrored, inverted, blank, saturated, small and noisy copies
of normals, images of other modalities and body parts (files of pydicom's and
other public test suites, each picture once), and copies under another patient.
--spoilt puts turned and inverted images among the normals that the gate is
fitted on; --normals fits it on fewer of them.
"""

from __future__ import annotations

import argparse
import io
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom.data
from PIL import Image

from memmc.config import QualityConfig, load_config
from memmc.dicom.convert import ConvertPolicy, convert
from memmc.quality.duplicates import duplicates
from memmc.quality.flags import DUPLICATE
from memmc.quality.look import Look, look, thumbnails_from_bytes
from memmc.quality.reference import Reference, fit_reference

SIDE, TOP = 64, 65535
EVERYTHING = (
    "select.modalities=CR,DX,DR,RG,MR,CT,US,MG,NM,PT,SM,OT,SC,XC,XA,RF,UNKNOWN",
    "select.secondary_capture=true",
    "select.derived=true",
    "select.lateral_views=true",
    "select.frames=middle",
    "select.burned_in_annotation=accept",
    "deid.text=class",
)
Picture = tuple[np.ndarray, int, int]  # grey levels at 64 x 64 px in 16 bits; rows and columns of the original


def picture(image: Image.Image) -> Picture:
    grey = np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    return np.rint(grey / 255 * TOP).astype(np.uint16), image.height, image.width


def folder(path: Path) -> list[Picture]:
    found = []
    for file in sorted(path.rglob("*.jp*g")):
        with Image.open(file) as image:
            found.append(picture(image))
    return found


def other_images(data: Path) -> list[Picture]:
    """Return decodable images that are no chest radiographs, one of each picture."""
    policy = ConvertPolicy.from_config(load_config(overrides=EVERYTHING), b"k" * 32)
    own = Path(pydicom.data.__file__).parent / "test_files"
    found: list[Picture] = []
    for file in [*sorted((data / "dicom-zoo").rglob("*")), *sorted(own.glob("*.dcm"))]:
        if not file.is_file() or file.suffix in {".csv", ".md"}:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            done = convert(file.read_bytes(), policy)
        facts = done.attributes
        if done.outcome != "stored" or (facts["modality"] in {"CR", "DX"} and facts["body_part"] != "HIP"):
            continue
        image = np.frombuffer(done.pixels or b"", "<u2").reshape(SIDE, SIDE)
        found.append((image, int(facts["rows"] or 0), int(facts["columns"] or 0)))
    flat = np.stack([image.ravel() for image, _, _ in found]).astype(np.float64)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-9)
    first = [n for n in range(len(found)) if not (flat[:n] @ flat[n] > 0.98).any()]
    return [found[n] for n in first]


def on_pixels(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Picture], Picture]:
    return lambda item: (change(item[0]).astype(np.uint16), item[1], item[2])


def again_as_jpeg(item: Picture) -> Picture:
    file = io.BytesIO()
    Image.fromarray((item[0] / 257).astype(np.uint8)).resize((224, 224), Image.Resampling.BICUBIC).save(
        file, "JPEG", quality=40
    )
    with Image.open(file) as image:
        return picture(image)


NOISE = np.random.default_rng(0)
SPOILT: dict[str, Callable[[Picture], Picture]] = {
    "half a turn": on_pixels(lambda x: x[::-1, ::-1]),
    "upside down": on_pixels(lambda x: x[::-1]),
    "a quarter left": on_pixels(lambda x: np.rot90(x)),
    "a quarter right": on_pixels(lambda x: np.rot90(x, 3)),
    "inverted": on_pixels(lambda x: TOP - x),
    "noise": on_pixels(lambda x: NOISE.integers(0, TOP, x.shape)),
    "one grey": on_pixels(lambda x: np.full_like(x, 20_000)),
    "blank with noise": on_pixels(lambda x: 20_000 + NOISE.integers(0, 300, x.shape)),
    "burnt out": on_pixels(lambda x: np.where(x > np.quantile(x, 0.2), TOP, x)),
    "24 px": lambda item: (item[0], 24, 24),
    "a ramp": on_pixels(lambda x: np.tile(np.linspace(0, TOP, SIDE), (SIDE, 1)) + NOISE.integers(0, 9, (SIDE, 1))),
}


def looks(pictures: list[Picture], rules: QualityConfig) -> list[Look]:
    return [look(image, TOP, rows, columns, rules) for image, rows, columns in pictures]


def flags(found: list[Look], reference: Reference, rules: QualityConfig) -> list[set[str]]:
    thumbnails = thumbnails_from_bytes([one.thumbnail for one in found])
    judged = reference.judge(thumbnails, [f"unseen {n}" for n in range(len(found))], rules)
    return [set(one.flags) | own for one, own in zip(found, judged, strict=True)]


def line(name: str, found: list[set[str]]) -> float:
    share = sum(map(bool, found)) / len(found)
    codes = Counter(code for one in found for code in one)
    print(f"  {name:<42} {len(found):5d}  {share:7.1%}   {', '.join(f'{c} {n}' for c, n in sorted(codes.items()))}")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--spoilt", type=float, default=0.0)
    parser.add_argument("--normals", type=int, default=5000)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    data: Path = arguments.data
    rules = load_config(overrides=arguments.settings).quality
    hires = [item for side in ("normal", "abnormal") for item in folder(data / "cxr-hires" / side)]
    others = other_images(data)
    cohorts = {
        "adults": ("cxr-adult/train", "cxr-adult/val/normal", {"abnormal": "cxr-adult/val/abnormal_unverified"}),
        "children": ("cxr-kermany/train", "cxr-kermany/val/normal", {"pneumonia": "cxr-kermany/val/abnormal"}),
    }
    bad: list[float] = []
    good: list[set[str]] = []
    for name, (train, normal, abnormal) in cohorts.items():
        pictures = folder(data / train)
        pictures = [pictures[n] for n in np.random.default_rng(0).permutation(len(pictures))[: arguments.normals]]
        num_spoilt = round(len(pictures) * arguments.spoilt)
        ways = [SPOILT["half a turn"], SPOILT["inverted"], SPOILT["a quarter left"]]
        fitted = [ways[n % 3](item) if n < num_spoilt else item for n, item in enumerate(pictures)]
        found = looks(fitted, rules)
        thumbnails = thumbnails_from_bytes([one.thumbnail for one in found])
        patients = [f"patient {n}" for n in range(len(found))]
        reference = fit_reference(thumbnails, patients, rules)
        if reference is None:
            print(f"{name}: too few normals to compare with")
            continue
        print(f"{name}: fitted on {reference.num_images} normals\n  in scope{'':36} num   flagged")
        own = reference.judge(thumbnails, patients, rules)
        line("normals it was fitted on (other folds)", own[num_spoilt:])
        if num_spoilt:
            line("  spoilt ones among them", own[:num_spoilt])
        seen = folder(data / normal)
        for title, items in {"normal": seen, **{key: folder(data / at) for key, at in abnormal.items()}}.items():
            judged = flags(looks(items, rules), reference, rules)
            line(title, judged)
            good += judged
        if name == "adults":
            judged = flags(looks(hires, rules), reference, rules)
            line("other scanner, 1-2.5k px", judged)
            good += judged
        print("  out of scope")
        for title, way in SPOILT.items():
            bad.append(line(title, flags(looks([way(item) for item in seen], rules), reference, rules)))
        bad.append(line("other modalities and body parts", flags(looks(others, rules), reference, rules)))
        copies = looks([again_as_jpeg(item) for item in pictures[num_spoilt : num_spoilt + 200]], rules)
        both = [*found[num_spoilt:], *copies]
        pairs = duplicates(
            [one.perceptual_hash for one in both],
            thumbnails_from_bytes([one.thumbnail for one in both]),
            [f"p{n}" for n in range(len(both))],
            rules,
        )
        first = len(found) - num_spoilt
        line("(distinct pictures, as duplicates)", [{DUPLICATE} if n in pairs else set() for n in range(first)])
        bad.append(
            line(
                "re-encoded copies of other patients",
                [{DUPLICATE} if n in pairs else set() for n in range(first, len(both))],
            )
        )
    print(f"in scope: {sum(map(bool, good))} of {len(good)} flagged ({sum(map(bool, good)) / len(good):.1%})")
    print(f"out of scope: {np.mean(bad):.1%} flagged, mean over kinds; least {min(bad):.1%}")


if __name__ == "__main__":
    main()
