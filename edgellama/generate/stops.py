"""Stop strings in text that arrives in pieces. Knows characters, not tokens.

The text ends at the first character that completes a stop string (of several that end there, the longest), wherever
the borders between the pieces lie. Until then everything is passed on, but for the shortest tail that could still
become a stop string. Each character costs constant time for each stop string: Knuth, Morris, Pratt (1977).
"""

from collections.abc import Sequence


class StopFinder:
    """
    >>> finder = StopFinder(["END"])
    >>> finder.push("The E"), finder.push("N"), finder.push("T EN"), finder.push("D!"), finder.found
    ('The ', '', 'ENT ', '', 'END')
    """

    def __init__(self, stops: Sequence[str] = ()):
        """`stops` are not empty strings."""
        self.found: str | None = None
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(self._stops)  # how much of each stop string the text ends with
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is certain by now; nothing more once a stop string was `found`."""
        if self.found is not None:
            return ""
        if not self._stops or not text:
            return text
        matched = self._matched
        for position, char in enumerate(text):
            for i, (stop, borders) in enumerate(self._stops):
                n = matched[i]
                while n and stop[n] != char:
                    n = borders[n]
                matched[i] = n = n + (stop[n] == char)
                if n == len(stop) and len(stop) > len(self.found or ""):
                    self.found = stop
            if self.found is not None:
                before = self._held + text[: position + 1]
                self._held = ""
                return before[: -len(self.found)]
        text = self._held + text
        certain = len(text) - max(matched)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text is over: what was held back has become no stop string."""
        held, self._held = self._held, ""
        return held


def _borders(stop: str) -> list[int]:
    """For each n, how many characters at the end of stop[:n] are also its beginning; less than n.

    >>> _borders("aab")
    [0, 0, 1, 0]
    """
    borders = [0, 0]
    n = 0
    for char in stop[1:]:
        while n and stop[n] != char:
            n = borders[n]
        n += stop[n] == char
        borders.append(n)
    return borders
