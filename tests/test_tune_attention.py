"""The offline tuner of the attention kernel, as far as it goes without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from bench import tune_attention  # noqa: E402
from star_kernels.attention.table import CONFIGURATIONS, Configuration  # noqa: E402


@pytest.mark.parametrize("architecture", CONFIGURATIONS)
def test_every_row_of_the_table_is_among_its_candidates(architecture: str) -> None:
    for (itemsize, head_dim), configuration in CONFIGURATIONS[architecture].items():
        dtype = torch.float32 if itemsize == 4 else torch.bfloat16
        found = list(tune_attention.candidates(architecture, dtype, head_dim))
        assert configuration in found and len(found) == len(set(found)) < 150


def test_a_row_is_written_as_it_stands_in_the_table() -> None:
    timing = tune_attention.Timing(Configuration(128, 64, 8, 3), {"S": 0.25})
    line = tune_attention.row(torch.bfloat16, 64, timing, "a GPU")
    assert line == "(2, 64): Configuration(128, 64, 8, 3),  # a GPU: S 0.250 ms"


def test_the_best_is_best_over_all_cases() -> None:
    even = tune_attention.Timing(Configuration(128, 64, 8, 3), {"S": 1.1, "L": 1.1})
    uneven = tune_attention.Timing(Configuration(64, 64, 4, 3), {"S": 1.0, "L": 2.0})
    best = {"S": 1.0, "L": 1.1}
    assert even.score(best) < uneven.score(best)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would tune")
def test_without_a_gpu_it_counts_the_candidates_and_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tune_attention.main(["--head-dim", "64", "128", "--dtype", "bfloat16", "float32"])
    printed = capsys.readouterr()
    assert ended.value.code == 1 and "needs a GPU" in printed.err
    assert printed.out.count("candidates") == 16
