"""The basis that is chosen is the one whose grid disturbs the predictions least."""

import pytest
import torch
from tiny_models import make_tiny_llama
from torch import Tensor

from calibration.basis import residual_candidates, try_candidates
from calibration.instrument import instrument
from calibration.loader import Original, load_original
from calibration.plan import plan
from calibration.settings import Settings
from calibration.statistics import Statistics, collect

TOKENS = torch.randint(0, 512, (4, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    original = load_original(str(make_tiny_llama(tmp_path_factory.mktemp("model"))))
    instrument(original.model, original.architecture)
    return original


@pytest.fixture(scope="module")
def statistics(original: Original) -> Statistics:
    return collect(original, TOKENS, batch_size=2, advance=lambda: None)


def test_every_candidate_is_a_rotation(statistics: Statistics) -> None:
    candidates = residual_candidates(statistics, 64)
    assert set(candidates) == {"top-1", "all", "sink", "permutation"}
    identity = torch.eye(256, dtype=torch.float64)
    for rotation in candidates.values():
        torch.testing.assert_close(rotation @ rotation.T, identity)


def test_sinks_get_groups_of_their_own(statistics: Statistics) -> None:
    """What the first tokens have in common is a constant on one group: an offset, no noise."""
    rotation = residual_candidates(statistics, 64)["sink"]
    leading = torch.linalg.eigh(statistics.first)[1][:, -1]
    groups = (leading @ rotation).view(-1, 64)
    assert groups.std(1).max() < 1e-6
    assert (groups.abs().amax(1) > 0.1).sum() == 1


def test_the_better_basis_is_chosen(original: Original, statistics: Statistics) -> None:
    config = plan(original.model.config, original.architecture, Settings())
    grid = config.sites["attention_input"]

    def divergences(candidates: dict[str, Tensor]) -> dict[str, float]:
        tried = try_candidates(original, grid, candidates, TOKENS, lambda: None)
        assert [c.name for c in tried if c.chosen] == [min(tried, key=lambda c: c.divergence).name]
        return {candidate.name: candidate.divergence for candidate in tried}

    spike = torch.eye(256, dtype=torch.float64)
    candidates = residual_candidates(statistics, 64)
    found = divergences(candidates | {"identity": spike})
    assert all(divergence > 0 for divergence in found.values())
    assert found["identity"] > min(found.values())
    alone = divergences({"all": candidates["all"]})
    assert alone["all"] == pytest.approx(found["all"])  # candidates do not disturb each other
