"""Starts work somewhere; never imports torch, so that help is instant; what a dry run must look at, it imports late."""
