"""Orthogonal matrices of OffQ: Hadamard constructions, sorted grouping, principal bases.

All rotations act on row vectors: ``x @ Q``. Source: OffQ, arXiv 2606.07116, sections on
top-1 PCA, sorted grouping and group Hadamard.
"""

from functools import cache

import torch
from torch import Tensor

from vllm_offq.errors import UserError


def hadamard(n: int) -> Tensor:
    """The normalised Hadamard matrix of order n with a first row of ones.

    Built as Paley(m) x Sylvester(n / m) with the smallest m that works, so a value in the
    first coordinate becomes the same constant on all n channels.

    Returns: [n, n] float64, orthogonal. Callers must not write to it (it is cached).
    Raises: UserError if neither construction reaches n.
    """
    return _hadamard(n)


@cache
def _hadamard(n: int) -> Tensor:
    core = hadamard_core(n)
    matrix = core
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / n**0.5


@cache
def hadamard_core(n: int) -> Tensor:
    """The Paley matrix that Sylvester's doubling makes the Hadamard matrix of order n from.

    Returns: [m, m] float64 with entries 1 and -1 and a first row of ones, n = m * 2^k with the
    smallest m that works; [[1]] for powers of two. Callers must not write to it (it is cached).
    Raises: UserError if no m works.
    """
    if n < 1:
        raise UserError(f"a Hadamard matrix needs a positive order, not {n}")
    sylvester = n & -n
    while sylvester:
        core = _paley(n // sylvester)
        if core is not None:
            return core * core[0]  # column signs: the first row becomes ones
        sylvester //= 2
    raise UserError(
        f"no Hadamard matrix of order {n} can be constructed here; "
        "orders 2^k, 12 * 2^k, 20 * 2^k, 28 * 2^k and 36 * 2^k always can"
    )


def _paley(n: int) -> Tensor | None:
    """Unnormalised Hadamard matrix of order n by Paley's constructions over a prime field."""
    if n in (1, 2):
        return torch.tensor([[1.0]] if n == 1 else [[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if n % 4:
        return None
    q = n - 1
    if _is_prime(q):  # Paley I: n % 4 == 0, so q % 4 == 3 holds
        skew = torch.zeros(n, n, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0] = 1.0, -1.0
        skew[1:, 1:] = _jacobsthal(q)
        return skew + torch.eye(n, dtype=torch.float64)
    q = n // 2 - 1
    if q % 4 == 1 and _is_prime(q):  # Paley II
        conference = torch.ones(q + 1, q + 1, dtype=torch.float64)
        conference[0, 0] = 0.0
        conference[1:, 1:] = _jacobsthal(q)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1, dtype=plus.dtype), zero)
    return None


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    residues = {i * i % q for i in range(1, q)}
    symbol = torch.tensor(
        [0.0] + [1.0 if i in residues else -1.0 for i in range(1, q)], dtype=torch.float64
    )
    index = torch.arange(q)
    return symbol[(index[:, None] - index[None, :]) % q]


@cache
@torch.inference_mode(False)  # what is kept must serve training, too
def _core_signs(block_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """hadamard_core, copied there once: CUDA graphs can hold no copy from the host."""
    return hadamard_core(block_size).to(device=device, dtype=dtype)


def apply_block_hadamard(x: Tensor, block_size: int) -> Tensor:
    """``x @ blockdiag(H, ..., H)`` for blocks of block_size channels.

    By core, then butterflies of rising stride: K log(block_size) additions in one fixed order,
    which kernels follow operation by operation, so that their codes can be compared exactly.

    x: [..., n] floating, block_size divides n. Returns: like x.
    """
    signs = _core_signs(block_size, x.device, x.dtype)
    order = len(signs)
    blocks = x.unflatten(-1, (x.shape[-1] // order, order))
    if order > 1:
        total = blocks[..., :1] * signs[0]
        for i in range(1, order):
            total = total + blocks[..., i : i + 1] * signs[i]
        blocks = total
    stride = order
    while stride < block_size:
        pairs = (x.shape[-1] // (2 * stride), 2, stride)
        first, second = blocks.reshape(*x.shape[:-1], *pairs).unbind(-2)
        blocks = torch.stack([first + second, first - second], -2)
        stride *= 2
    return blocks.reshape(x.shape) * block_size**-0.5


def sorted_grouping(n: int, group_size: int) -> Tensor:
    """Where each channel goes so that every group holds one of the n / group_size strongest.

    Rank c (0 is the strongest) goes to group ``c % G``, slot ``c // G``: slot 0 of the
    groups holds ranks 0 to G - 1.

    Returns: [n] int64, ``ranked[..., result]`` is the grouped order.
    """
    num_groups = n // group_size
    return torch.arange(n).view(group_size, num_groups).T.flatten()


def group_rotation(basis: Tensor, group_size: int) -> Tensor:
    """``Q = U P blockdiag(H_g)``: columns of U ranked by falling strength, grouped, spread.

    basis: [n, n] float64 orthogonal, strongest column first; group_size divides n.
    Returns: [n, n] float64 orthogonal.
    """
    grouped = basis[:, sorted_grouping(basis.shape[0], group_size).to(basis.device)]
    return apply_block_hadamard(grouped, group_size)


def principal_basis(tokens: Tensor, covariance: Tensor) -> Tensor:
    """Eigenvectors of the uncentred covariance of the tokens, completed to a full basis.

    Uncentred, because the mean of the outlier direction is what becomes the offset. Fewer
    tokens than channels leave a null space; it is ordered by ``covariance``.

    tokens: [t, n]; covariance: [n, n], of all tokens.
    Returns: [n, n] float64, columns by falling eigenvalue, each with a positive largest entry.
    """
    tokens = tokens.double()
    eigenvalues, basis = torch.linalg.eigh(tokens.T @ tokens)
    eigenvalues, basis = eigenvalues.flip(0), basis.flip(1)
    floor = eigenvalues[0].clamp_min(0) * tokens.shape[1] * torch.finfo(torch.float64).eps
    rank = min(int((eigenvalues > floor).sum()), tokens.shape[0])
    null_space = basis[:, rank:]
    if null_space.shape[1]:
        _, order = torch.linalg.eigh(null_space.T @ covariance.double() @ null_space)
        basis = torch.cat([basis[:, :rank], null_space @ order.flip(1)], 1)
    strongest = basis.abs().argmax(0, keepdim=True)
    return basis * basis.gather(0, strongest).sign()
