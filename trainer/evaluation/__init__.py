"""Measuring control against chance, and showing it: figures, curves, verdicts, reports."""
