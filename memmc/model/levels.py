"""Which encoder levels the decoder attends to."""

from __future__ import annotations

from memmc.config import ModelConfig


def level_indices(config: ModelConfig) -> tuple[int, ...]:
    """Return the 0-based encoder blocks whose outputs the decoder gets, ascending; the last block is always one.

    ``every_K`` counts from the last block backwards: S, S - K, S - 2 K, ...

    Source: [abstract, M2] all of them; [choice] the others. Without cross-attention only the last is used [MAE].
    """
    last = config.encoder_depth - 1
    if config.levels == "last" or not config.cross_attention:
        return (last,)
    step = 1 if config.levels == "all" else int(config.levels.removeprefix("every_"))
    return tuple(range(last % step, last + 1, step))
