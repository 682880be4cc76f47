"""From statistics to rotations: OffQ (arXiv 2606.07116) and QuaRot (arXiv 2404.00456)."""

from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.settings import RECIPES, HeadBasis, Settings
from calibration.statistics import Statistics
from vllm_offq.format import CheckpointConfig
from vllm_offq.rotation import (
    apply_block_hadamard,
    group_rotation,
    hadamard,
    principal_basis,
    sorted_grouping,
)

LEAST_ENERGY = 1e-6
"""Of a channel, as a fraction of the mean: gains of dead ones stay finite."""
BLOCK_SIZES = ("residual_block_size", "down_block_size")


@dataclass
class Rotations:
    """None leaves a place as it is. All float64; L layers, H_kv KV heads, D head_size."""

    residual: Tensor | None = None
    """[n, n], shared by the whole residual stream, fused."""
    residual_order: Tensor | None = None
    """[n] int64: which channel goes to each place, where only a permutation can be fused."""
    residual_gains: Tensor | None = None
    """[L, 2, n]: what the norms before attention and MLP go on multiplying by, in the original's
    order of channels; None: 1, all of it is folded into the weights."""
    final_gains: Tensor | None = None
    """[n], likewise of the norm before the head."""
    residual_block_size: int | None = None
    """Block of the Hadamard before linears that read the residual stream, online."""
    keys: Tensor | None = None
    """[L, H_kv, D, D], queries and keys after RoPE, online."""
    values: Tensor | None = None
    """[L, H_kv, D, D], fused into v and o."""
    down_order: Tensor | None = None
    """[L, intermediate], or [L, E, intermediate] with experts, int64: which channel goes to each
    place before down_proj, fused."""
    down_signs: Tensor | None = None
    """As down_order, +1 or -1, fused."""
    down_block_size: int | None = None
    """Block of the Hadamard before down_proj, online."""

    def undo_residual(self, x: Tensor) -> Tensor:
        """From the input of a linear that reads the residual stream to the original's, but for
        the order of its channels. x: [..., n]. Returns: like x."""
        if self.residual is not None:
            return x @ self.residual.T.to(x)
        if self.residual_block_size is not None:
            size = self.residual_block_size
            return (x.unflatten(-1, (-1, size)) @ hadamard(size).T.to(x)).flatten(-2)
        return x

    def to(self, device: torch.device) -> "Rotations":
        """All of them there."""
        found = copy(self)
        for name, value in vars(self).items():
            setattr(found, name, value.to(device) if isinstance(value, Tensor) else value)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """All that is there, for a file; the inverse of from_tensors."""
        return {
            name: torch.as_tensor(value) for name, value in vars(self).items() if value is not None
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> "Rotations":
        """Inverse of tensors."""
        sizes = {name: int(tensors.pop(name)) for name in BLOCK_SIZES if name in tensors}
        return cls(**tensors, **sizes)  # type: ignore[arg-type]


def compute_rotations(
    statistics: Statistics, config: CheckpointConfig, settings: Settings
) -> Rotations:
    """The rotations of the settings' recipe, but for the principal basis of the residual stream.

    That is chosen among several, see calibration.basis.
    """
    rotation = RECIPES[settings.recipe].rotation
    if rotation == "none":
        return Rotations(residual_gains=statistics.gains, final_gains=statistics.final_gains)
    online = config.sites["attention_input"].online_hadamard
    heads = config.kv_cache or config.sites["attention_output"]
    if rotation == "hadamard":
        rotations = hadamard_rotations(statistics, settings.seed, online=online is not None)
    else:
        rotations = principal_rotations(
            statistics,
            group_size=config.sites["attention_input"].group_size,
            head_group_size=heads.group_size,
            down_group_size=config.sites["mlp_output"].group_size,
            online=online is not None,
            head_basis=settings.head_basis,
        )
    if config.kv_cache is None:
        rotations.keys = None
    return rotations


def principal_rotations(
    statistics: Statistics,
    group_size: int,
    head_group_size: int,
    down_group_size: int,
    online: bool = False,
    head_basis: HeadBasis = "principal",
) -> Rotations:
    """OffQ: principal basis, sorted grouping, group Hadamard at every place but the residual.

    online: the residual stream can only be permuted, so its channels take the place of
    directions, ranked by their energy, and the group Hadamard is done online.
    """
    rotations = Rotations(
        keys=_head_rotations(statistics.keys, head_group_size, head_basis),
        values=_head_rotations(statistics.values, head_group_size, head_basis),
        down_order=_grouped_order(statistics.down_energy, down_group_size),
        down_block_size=down_group_size,
    )
    if online:
        energy = statistics.input_energy
        if statistics.weight_energy is not None:
            rotations.residual_gains = balancing_gains(energy, statistics.weight_energy)
            energy = energy * rotations.residual_gains.square()
        if statistics.head_energy is not None:
            rotations.final_gains = balancing_gains(statistics.final_energy, statistics.head_energy)
        shares = energy / energy.sum(-1, keepdim=True)
        rotations.residual_order = _grouped_order(shares.sum((0, 1)), group_size)
        rotations.residual_block_size = group_size
    return rotations


def balancing_gains(inputs: Tensor, weights: Tensor) -> Tensor:
    """Of each channel the gain, its inverse in the weight, that rounding both harms the least.

    A group's noise is shared by its channels. So with gains g, for inputs and for weights alike,
    it reaches the output in proportion to ``sum(g^2 e) sum(w / g^2)``, e and w the energies of
    the channels of either. That is least where ``g^2 e`` and ``w / g^2`` agree (Cauchy-Schwarz).

    inputs, weights: [..., n]. Returns: likewise, 0 for channels without weight, which may be the
    largest inputs of all, else 1 at least.
    """
    floored = [x.clamp_min(LEAST_ENERGY * x.mean(-1, keepdim=True)) for x in (weights, inputs)]
    gains = (floored[0] / floored[1]) ** 0.25
    return torch.where(weights > 0, gains / gains.amin(-1, keepdim=True), 0.0)


def _grouped_order(energy: Tensor, group_size: int) -> Tensor:
    """Channels by falling energy, dealt out to the groups. energy: [..., n]."""
    ranked = energy.argsort(dim=-1, descending=True, stable=True)
    return ranked[..., sorted_grouping(energy.shape[-1], group_size)]


def _head_rotations(moments: Tensor, group_size: int, head_basis: HeadBasis) -> Tensor:
    """Each head's principal direction becomes the constant of its (first) group.

    moments: [L, H_kv, D, D]. Returns: likewise. head_basis "hadamard": a Hadamard and no more.
    """
    if head_basis == "hadamard":
        identity = torch.eye(moments.shape[-1], dtype=torch.float64)
        return apply_block_hadamard(identity, group_size).expand(moments.shape)
    no_tokens = moments.new_zeros(0, moments.shape[-1])
    heads = [
        group_rotation(principal_basis(no_tokens, head), group_size)
        for head in moments.flatten(0, 1)
    ]
    return torch.stack(heads).view(moments.shape)


def hadamard_rotations(statistics: Statistics, seed: int, online: bool = False) -> Rotations:
    """QuaRot: a randomised Hadamard over the whole width at every place (heads: over a head).

    online: that of the residual stream is done before each linear, and is not randomised. Norms
    that may keep gains keep the original's.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(*shape: int) -> Tensor:
        return torch.randint(0, 2, shape, generator=generator).double() * 2 - 1

    layers, num_heads, head_size, _ = statistics.keys.shape
    hidden_size = statistics.residual.shape[0]
    head = hadamard(head_size)
    return Rotations(
        residual=None if online else signs(hidden_size)[:, None] * hadamard(hidden_size),
        residual_gains=statistics.gains,
        final_gains=statistics.final_gains,
        residual_block_size=hidden_size if online else None,
        keys=signs(layers, num_heads, head_size)[..., None] * head,
        values=signs(layers, num_heads, head_size)[..., None] * head,
        down_signs=signs(*statistics.down_energy.shape),
        down_block_size=statistics.down_energy.shape[-1],
    )
