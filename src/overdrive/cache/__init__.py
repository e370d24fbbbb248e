"""Whole responses, kept until they expire or something they read is written."""
