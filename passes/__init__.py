"""Passes: one file each, with the plain functions that they share."""
