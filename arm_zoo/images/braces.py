"""Braces in file names as bash expands them: lists, nested ones, and ranges of numbers and letters."""

import re
from itertools import pairwise, product

_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.(-?\d+))?")


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}{x,y}` -> `a0x a0y a1x ...`; braces that hold neither a list nor a range stay as they are."""
    opening = pattern.find("{")
    if opening < 0:
        return [pattern]
    before, depth, ends = pattern[:opening], 0, [opening]  # of the parts between this brace and its closing one
    for place in range(opening, len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[place], 0)
        if depth == 0 or (depth == 1 and pattern[place] == ","):
            ends.append(place)
        if depth == 0:
            break
    else:
        return [before + "{" + after for after in expand_braces(pattern[opening + 1 :])]
    parts = [pattern[first + 1 : last] for first, last in pairwise(ends)]
    choices = [choice for part in parts for choice in expand_braces(part)]
    if len(parts) == 1:
        choices = _range(parts[0]) or ["{" + choice + "}" for choice in choices]
    return [before + choice + after for choice, after in product(choices, expand_braces(pattern[ends[-1] + 1 :]))]


def _range(text: str) -> list[str]:
    """`8..10`, `010..8`, `a..e..2`: up or down, as wide as the wider end where one has leading zeros."""
    found = _RANGE.fullmatch(text)
    if not found or found[1].isalpha() != found[2].isalpha():
        return []
    letters = found[1].isalpha()
    first, last = (ord(end) if letters else int(end) for end in found.group(1, 2))
    step = abs(int(found[3] or 1)) or 1
    values = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    if letters:
        return [chr(value) for value in values]
    padded = any(re.match(r"-?0\d", end) for end in found.group(1, 2))
    width = max(len(found[1]), len(found[2])) if padded else 0
    return [f"{value:0{width}}" for value in values]
