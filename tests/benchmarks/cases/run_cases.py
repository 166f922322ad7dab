"""Lists the cases of the kind that this file's name says."""

from case import Case

CASES: tuple[Case, ...] = ()
