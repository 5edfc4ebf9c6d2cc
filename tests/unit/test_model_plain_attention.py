"""The form of the gated attention that is exported is the one that is trained."""

from __future__ import annotations

import pytest
import torch

from memmc.model.plain_attention import plain_level_attention


@pytest.mark.parametrize("gates", [1, 3])
def test_both_forms_agree(gates: int) -> None:
    trained = pytest.importorskip("memmc.model.gated_attention")
    generator = torch.Generator().manual_seed(0)
    sizes = [(5, 7, 3, 4), (5, 2 * 6, 2, 3, 4), (5, gates, 7, 2), (2, 3, 4)]
    parts = [torch.randn(size, generator=generator) for size in sizes]
    torch.testing.assert_close(plain_level_attention(*parts), trained.GatedLevelAttention.apply(*parts))
