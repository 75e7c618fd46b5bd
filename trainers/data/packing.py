"""Packing of pieces into sequences of fixed length (pure)."""

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of piece numbers, each bin's lengths at most `capacity` in sum: best-fit decreasing.

    The longest pieces are placed first, each in the fullest bin that has room (Johnson 1973; at most 11/9 of the
    optimum and a constant). Pieces of equal length are taken in a scattered order, so that neighbours in the source are
    not neighbours in a bin; the result is a function of the lengths alone.
    """
    bins: list[list[int]] = []
    bins_by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where some bin has room r
    for piece in sorted(range(len(lengths)), key=lambda number: (-lengths[number], scattered(number))):
        length = lengths[piece]
        if not 0 < length <= capacity:
            raise ValueError(f"piece {piece} has length {length}; it must be between 1 and {capacity}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            with_room = bins_by_room[room]
            target = with_room.pop()
            if not with_room:
                rooms &= ~(1 << room)
            bins[target].append(piece)
        else:
            room = capacity
            target = len(bins)
            bins.append([piece])
        left = room - length
        if left:
            bins_by_room.setdefault(left, []).append(target)
            rooms |= 1 << left
    return [sorted(pieces) for pieces in bins]


def split_lengths(length: int, capacity: int) -> list[int]:
    """Return the lengths of the pieces that a text of `length` tokens is cut into."""
    whole, rest = divmod(length, capacity)
    return [capacity] * whole + ([rest] if rest else [])


def scattered(number: int) -> int:
    """Return a well mixed 64-bit number, different for different ones (SplitMix64, Steele et al. 2014)."""
    mixed = (number + 1) * 0x9E3779B97F4A7C15 % 2**64
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return mixed ^ (mixed >> 31)
