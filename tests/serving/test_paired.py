"""Two models on the same documents: the statistics."""

import math

import pytest

from serving.paired import disagreement, mean_difference, sign_test


def test_sign_test_is_exact() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(5, 5) == 1
    assert sign_test(8, 2) == sign_test(2, 8) == pytest.approx(112 / 1024)
    assert sign_test(0, 10) == pytest.approx(2 / 1024)


def test_sign_test_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for wins, losses in [(3, 17), (40, 61), (400, 470)]:
        expected = stats.binomtest(wins, wins + losses).pvalue
        assert sign_test(wins, losses) == pytest.approx(expected)


def test_sign_test_takes_large_counts() -> None:
    assert 0 < sign_test(2600, 2700) < 1  # 2**5300 is no float


def test_mean_difference_is_the_paired_one() -> None:
    found = mean_difference([1.0, 10.0, 100.0], [2.0, 12.0, 103.0])
    assert found.mean == pytest.approx(2)
    assert found.standard_error == pytest.approx(1 / math.sqrt(3))
    assert found.p_value == pytest.approx(math.erfc(2 * math.sqrt(3) / math.sqrt(2)))


def test_mean_difference_of_equals_has_no_p_value() -> None:
    assert mean_difference([1.0, 2.0], [1.0, 2.0]).p_value is None
    assert mean_difference([1.0], [2.0]).standard_error is None


def test_disagreement_counts_each_way() -> None:
    found = disagreement([1, 1, 1, 0, 0], [1, 0, 0, 1, 0])
    assert (found.only_first, found.only_second) == (2, 1)
