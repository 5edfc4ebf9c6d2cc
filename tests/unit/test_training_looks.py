"""Looks at a model: planted lesions are found by a model that knows normals, and by chance by one that does not."""

from __future__ import annotations

import hashlib
import time
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import torch
from test_training_loop import CONFIG, IMAGES, MODEL, run

from memmc.errors import DataError
from memmc.model.mae import MemMCMAE
from memmc.pipeline.training_job import keep_back
from memmc.training import looks, loop
from memmc.training.looks import Fixed, HeldOut, ablations, auroc, health, patch_errors, quick_scores, with_lesions
from memmc.training.peers import Alone

HELD = torch.from_numpy(IMAGES[:24].astype(np.float32) / 65_535).permute(0, 3, 1, 2).sub(0.45).div(0.3)


@pytest.fixture(scope="module")
def trained() -> MemMCMAE:
    torch.set_num_threads(1)
    return run(CONFIG.model_copy(update={"max_steps": 10}))[1].ema_model


def fresh() -> MemMCMAE:
    torch.manual_seed(0)
    return MemMCMAE(MODEL, 32).eval()


def test_lesions_are_single_smooth_and_repeatable() -> None:
    images = torch.zeros(9, 1, 64, 64)
    planted = with_lesions(images + torch.arange(9)[:, None, None, None])
    assert torch.equal(planted, with_lesions(images + torch.arange(9)[:, None, None, None]))
    change = planted - torch.arange(9)[:, None, None, None]
    assert (change.flatten(1).abs().max(1).values > 0.4).all()
    assert (change[0::3] >= 0).all()
    assert (change[1::3] <= 0).all()
    assert ((change.abs() > 0.1).flatten(1).float().mean(1) < 0.4).all(), "a lesion fills the image"


def test_auroc_counts_pairs() -> None:
    assert auroc(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])) == 1.0
    assert auroc(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 2.0])) == pytest.approx(0.625)


def test_errors_are_of_hidden_patches_alone() -> None:
    model = fresh()
    fixed = Fixed.of(HELD, model)
    assert fixed.ids_keep_VGK.flatten(1).sort(1).values.equal(torch.arange(16).expand(24, 16))
    errors = patch_errors(model, fixed.images_VCHW, fixed.ids_keep_VGK)
    by_hand = torch.zeros(16)
    for ids in fixed.ids_keep_VGK[3]:
        with torch.no_grad():
            output = model(HELD[3:4], ids[None])
        difference = (output.pred_BLP - model.patchify(HELD[3:4])).abs().mean(-1)[0]
        by_hand += torch.where(output.mask_BL[0] == 1, difference, 0.0) / 3
    torch.testing.assert_close(errors[3], by_hand, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.25, 0.4, 0.6])
def test_every_patch_is_hidden_and_shown_at_any_mask_ratio(ratio: float) -> None:
    torch.manual_seed(0)
    model = MemMCMAE(MODEL.model_copy(update={"mask_ratio": ratio}), 32).eval()
    fixed = Fixed.of(HELD, model)
    ids = fixed.ids_keep_VGK.flatten(1)
    shown = torch.zeros(24, 16).scatter_add_(1, ids, torch.ones(ids.shape))
    assert shown.min() >= 1
    assert shown.max() < fixed.ids_keep_VGK.shape[1]
    errors = patch_errors(model, fixed.images_VCHW, fixed.ids_keep_VGK)
    assert errors.isfinite().all()
    assert (errors > 0).all()


def test_planted_lesions_are_told_by_a_model_that_knows_the_image_and_not_by_a_blind_one(
    trained: MemMCMAE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two ends of the scale: errors against the image without the lesion, and errors that know nothing."""
    ends = {"knows": lambda images: trained.patchify((images - HELD.repeat(2, 1, 1, 1)).abs()).mean(-1)}
    ends["blind"] = lambda images: torch.rand(len(images), 16, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, errors in ends.items():
        monkeypatch.setattr(looks, "patch_errors", lambda _model, images, _ids, errors=errors: errors(images))
        found[name] = HeldOut(HELD, trained, Alone(), 0, 1)(trained)
    assert found["knows"]["probe_auroc"] == 1.0
    assert found["knows"]["val_error"] == pytest.approx(0.0, abs=1e-6)
    assert 0.3 < found["blind"]["probe_auroc"] < 0.7
    scores = quick_scores(torch.ones(2, 16), torch.rand(8, 16))
    assert scores[0] == scores[1]


def test_workers_share_a_look_and_agree_with_one(trained: MemMCMAE) -> None:
    parts: list[list[float]] = []

    class Collects(Alone):
        def sum(self, values: list[float]) -> list[float]:
            parts.append(values)
            return values

    for rank in range(3):
        HeldOut(HELD, trained, Collects(), rank, 3)(trained)

    class Summed(Alone):
        def sum(self, values: list[float]) -> list[float]:
            return torch.tensor(parts).sum(0).tolist()

    assert HeldOut(HELD, trained, Summed(), 0, 3)(trained) == pytest.approx(
        HeldOut(HELD, trained, Alone(), 0, 1)(trained), abs=1e-5
    )


def test_health_and_ablations_leave_the_model_as_it_is(trained: MemMCMAE) -> None:
    fixed = Fixed.of(HELD[:8], trained)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    found = health(trained, fixed)
    assert {*found} == {
        *(f"memory/{what}/layer{n}" for what in ("mass", "slots_used", "entropy") for n in (1, 2)),
        *(f"gate/level{n}" for n in (1, 2)),
    }
    assert all(0 <= value <= 1 for value in found.values())
    lost = ablations(trained, fixed)
    assert lost["ablation/error"] == pytest.approx(
        float(patch_errors(trained, fixed.images_VCHW, fixed.ids_keep_VGK).mean())
    )
    assert lost["ablation/error_without_memory"] != lost["ablation/error"]
    assert lost["ablation/error_last_level_only"] != lost["ablation/error"]
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_a_model_without_a_part_has_no_figure_of_it() -> None:
    torch.manual_seed(0)
    plain = MemMCMAE(MODEL.model_copy(update={"memory_slots": 0, "cross_attention": False}), 32).eval()
    assert {*ablations(plain, Fixed.of(HELD[:4], plain))} == {"ablation/error"}


def test_slow_looks_leave_most_of_the_time_to_training() -> None:
    began: list[float] = []

    def slow(_: MemMCMAE) -> dict[str, float]:
        began.append(time.monotonic())
        time.sleep(0.05)
        return {}

    config = CONFIG.model_copy(update={"look_seconds": 1e-9, "max_steps": 120})
    run(config, on_look=slow)
    between = [later - earlier for earlier, later in pairwise(began[:-1])]  # the last look is the run's end
    assert between
    assert min(between) >= 0.05 / 0.2


def test_the_best_average_is_kept_through_a_restart_and_patience_ends_a_run(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "_LOOKING", 1.0)  # a look at every word from rank 0, however slow this machine is
    figures = iter([0.5, 0.9, 0.7, 0.6, 0.6, 0.6])
    often = {"look_seconds": 1e-9, "checkpoint_seconds": 1e-9}
    config = CONFIG.model_copy(update={**often, "select": "probe_auroc", "max_steps": 100, "patience": 2})
    seen: list[dict] = []

    def look(average: MemMCMAE) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in average.state_dict().items()})
        return {"probe_auroc": next(figures)}

    class Stop(Exception):
        pass

    def stop(save, metrics) -> None:
        save(tmp_path)
        if metrics["step"] == 16:
            raise Stop

    with pytest.raises(Stop):
        run(config, on_look=look, on_checkpoint=stop)
    _, outcome = run(config, on_look=look, resume_from=tmp_path)
    assert outcome.selected_step == 16
    assert outcome.steps == 32, "two looks without a better figure end the run"
    assert all(torch.equal(value, seen[1][name]) for name, value in outcome.selected.state_dict().items())
    assert any(not torch.equal(value, seen[1][name]) for name, value in outcome.ema_model.state_dict().items())


def test_patients_kept_back_are_others_and_never_move() -> None:
    rows = [{"patient_key": f"p{n // 2}", "object_key": f"o{n}"} for n in range(400)]
    table = pa.Table.from_pylist(rows)
    kept, held = (part.to_pylist() for part in keep_back(table, 0.1))
    assert not {row["patient_key"] for row in kept} & {row["patient_key"] for row in held}
    assert 8 <= len(held) <= 64
    assert keep_back(table.slice(0, 300), 0.1)[0].to_pylist() == [row for row in kept if row in rows[:300]]
    assert [part.to_pylist() for part in keep_back(table, 0.0)] == [rows, []]
    with pytest.raises(DataError, match="keeps back"):
        keep_back(table.slice(0, 20), 0.05)


def test_kept_back_rows_are_told_by_the_hash_of_the_patient_and_stand_in_the_order_of_their_own() -> None:
    """Row by row, as it is defined; a run that is gone on with must find the same images in the same order."""

    def place(text: str) -> int:
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

    rows = [{"patient_key": f"p{n // 3}", "object_key": f"o{n}"} for n in range(1000)]
    is_held = [place(row["patient_key"]) < 0.3 * 2**64 for row in rows]
    held_rows = [row for row, out in zip(rows, is_held, strict=True) if out]
    kept, held = keep_back(pa.Table.from_pylist(rows), 0.3)
    assert kept.to_pylist() == [row for row, out in zip(rows, is_held, strict=True) if not out]
    ordered = sorted(held_rows, key=lambda row: place(row["patient_key"] + row["object_key"]))
    assert len(ordered) > 64
    assert held.to_pylist() == ordered[:64]
