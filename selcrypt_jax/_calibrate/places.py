"""The places of levels in the order of importance, and the range of each."""

from collections.abc import Collection

from .network import Network


class Places:
    """The counts of all levels, and how they change when one level is moved.

    The *place* of a level is the number of groups that it opens from the beginning of the order.
    Below `_floor` it is only a number: ring m + 1 of a release takes as many groups as are missing
    there from behind the end. The place of level 0, which opens nothing, is the end of the
    encrypted part. If nothing is left behind the end, a place below `_floor` opens less than the
    floor instead.

    Args:
        network: the network to encrypt.
        levels: M.
        most: how many groups may be encrypted.
    """

    def __init__(self, network: Network, levels: int, most: int) -> None:
        self._network, self._levels, self._most = network, levels, most
        # Level m opens counts[m - 1] groups; counts[-1] is the number of encrypted groups, except
        # for those that rings M, M-1, ... of a release take from behind its end, up to _ends.
        self.counts = [most * level // levels for level in range(1, levels + 1)]
        self._ends: list[int] = []
        self.steered = False  # whether level 0 must not change the counts of other levels

    @property
    def bounds(self) -> list[int]:
        """The counts that `Network` expects: M, or 2M for a release."""
        return [*self.counts, *self._ends]

    @property
    def end(self) -> int:
        """The end of the groups that are taken."""
        return self._ends[-1] if self._ends else self.counts[-1]

    def begin(self, *, steered: bool) -> None:
        """Takes nothing from behind the end; from now on level 0 moves all others, or none."""
        self._ends, self.steered = [], steered

    def floor(self, level: int) -> int:
        """The number of groups left to lower rings while groups remain behind the end."""
        least = self.counts[level] * level // (2 * self._levels) if self._network.steady else 0
        return max(level, least)

    def room(self, level: int) -> tuple[int, int]:
        """The first and last place of a level."""
        if not level:
            return self.end if self.steered else self._levels, self._most
        return level - self.behind, self.counts[level] - 1

    @property
    def behind(self) -> int:
        """How many groups may be taken from behind the end."""
        return self._most - self.end if self._network.steady else 0

    def put(self, level: int, place: int) -> None:
        """Moves a level."""
        bounds = self.rings(level, place)
        self.counts = bounds[: self._levels]
        self._ends = bounds[self._levels : 2 * self._levels - level]

    def rings(self, level: int, place: int) -> list[int]:
        """All counts with a level at a place; lower levels keep their shares of the part below."""
        if level:
            taken = min(max(self.floor(level) - place, 0), self.behind)
            end, count = self.end + taken, place + taken
            lower = enumerate(self.counts[: level - 1], 1)
            parts = [max(round(n * count / self.counts[level - 1]), i) for i, n in lower]
            bounds = [*parts, count, *self.counts[level:], *self._ends, *[end] * (level + 1)]
        elif self.steered:
            bounds = [*self.bounds, place]
        else:
            scaled = [round(n * place / self.counts[-1]) for n in self.counts]
            for index in range(self._levels - 2, -1, -1):
                scaled[index] = min(max(scaled[index], index + 1), scaled[index + 1] - 1)
            bounds = [*scaled, *[place] * self._levels]
        return bounds if self._network.steady else bounds[: self._levels]

    def allowed(self, level: int, place: int, without: Collection[int] = ()) -> int:
        """The nearest place, or nearly so, at which the cipher accepts every ring.

        Raises:
            ValueError: there is none.
        """
        low, high = self.room(level)
        reason, refusals, distance = None, 0, 0
        while distance <= max(high - place, place - low) and refusals < 129:
            for near in dict.fromkeys((place + distance, place - distance)):
                if low <= near <= high and near not in without:
                    refused = self._network.refusal(self.rings(level, near))
                    if refused is None:
                        return near
                    reason, refusals = reason or refused, refusals + 1
            # Rings may be far too small.
            distance = max(distance + 1, round(1.2 * distance) if refusals > 16 else 0)
        raise ValueError(
            f"targets[{level}]: no groups left to choose from: {(reason or 'none').rstrip('.')}. "
            "Use smaller groups, scope='leaf', fewer levels, or exclude the leaves that are too "
            "small from the scores."
        )
