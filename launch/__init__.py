"""Starts work somewhere; never imports torch, so that help and dry runs are instant."""
